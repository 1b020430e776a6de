"""Why pipelines of diffusers are left alone, where more can be said than that no record is there.

`tests/test_pipeline_table.py` holds these lists to the sources of the installed diffusers.
"""

from __future__ import annotations

from typing import Any

DISTILLED = "guidance is distilled into the network: one branch, nothing to save"
THREE = "its guidance has further branches, not one delta to hold"
PERTURBED = "its attention processors split the batch into the branches of perturbed attention"
UNGUIDED = "it has no classifier-free guidance in a loop of its own"
_ONNX = "an ONNX network, which cannot be hooked"
_TWO_STAGES = "several denoisers, each with a scheduler of its own"
_CHUNKS = "one run of all timesteps for every chunk of the video: rows are not timesteps"
_TEXT_TOO = "the network puts out the places of the text too, as many as its branch has"
_BLOCKS = "its blocks call the network for each branch by themselves, without a guider"
_OWN_COPIES = "copies of the scheduler step the frames, each at a noise level of its own"
_STEERED = "its attention maps and gradients steer the latents"
_HALVES = "its attention splits the batch into two halves by itself"

_DISTILLED = (
    *("DreamLiteMobilePipeline", "Flux2Pipeline", "FluxControlImg2ImgPipeline"),
    *("FluxControlInpaintPipeline", "FluxControlNetImg2ImgPipeline"),
    *("FluxControlNetInpaintPipeline", "FluxControlPipeline", "FluxFillPipeline"),
    *("LatentConsistencyModelImg2ImgPipeline", "LatentConsistencyModelPipeline"),
    *("SanaSprintImg2ImgPipeline", "SanaSprintPipeline", "VisualClozeGenerationPipeline"),
    *("EchoModularPipeline", "Flux2KleinModularPipeline", "Flux2ModularPipeline"),
    *("Flux3DistilledModularPipeline", "FluxKontextModularPipeline", "FluxModularPipeline"),
    *("Krea2TurboModularPipeline", "MiniMaxH3ModularPipeline", "QwenImage21TurboModularPipeline"),
    "WanAnimate2DistilledModularPipeline",
)
_THREE = (
    *("CycleDiffusionPipeline", "DreamLitePipeline", "LEditsPPPipelineStableDiffusion"),
    *("LEditsPPPipelineStableDiffusionXL", "OmniGenPipeline", "SemanticStableDiffusionPipeline"),
    *("StableDiffusionPipelineSafe", "StableDiffusionSAGPipeline", "UniDiffuserPipeline"),
)
_PERTURBED = (
    *("AnimateDiffPAGPipeline", "HunyuanDiTPAGPipeline", "KolorsPAGPipeline"),
    *("PixArtSigmaPAGPipeline", "SanaPAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"),
    *("StableDiffusion3PAGPipeline", "StableDiffusionControlNetPAGInpaintPipeline"),
    *("StableDiffusionControlNetPAGPipeline", "StableDiffusionPAGImg2ImgPipeline"),
    *("StableDiffusionPAGInpaintPipeline", "StableDiffusionPAGPipeline"),
    *("StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusionXLControlNetPAGPipeline"),
    *("StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
    "StableDiffusionXLPAGPipeline",
)
_UNGUIDED = (
    *("AudioDiffusionPipeline", "ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline"),
    *("DanceDiffusionPipeline", "DiffusionGemmaPipeline", "Flux2KleinKVPipeline"),
    *("FluxPriorReduxPipeline", "Kandinsky6SRPipeline", "KandinskyCombinedPipeline"),
    *("KandinskyImg2ImgCombinedPipeline", "KandinskyInpaintCombinedPipeline"),
    *("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline"),
    *("KandinskyV22InpaintCombinedPipeline", "KarrasVePipeline", "LDMPipeline"),
    *("LDMSuperResolutionPipeline", "LLaDA2Pipeline", "LTX2DFRPipeline"),
    *("LTX2DFRTemporalRefinePipeline", "LTX2LatentUpsamplePipeline"),
    *("LTX2VideoDiffusionDecodePipeline", "LTXLatentUpsamplePipeline", "MarigoldDepthPipeline"),
    *("MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline", "PNDMPipeline"),
    *("RFD4ProteinaPipeline", "RePaintPipeline", "SanaWMLTX2Refiner", "ScoreSdeVePipeline"),
    *("SpectrogramDiffusionPipeline", "StableAudio3AudioToAudioPipeline"),
    *("StableAudio3InpaintPipeline", "StableCascadeCombinedPipeline", "VersatileDiffusionPipeline"),
    *("VisualClozePipeline", "WuerstchenCombinedPipeline"),
)
REASONS: dict[str, str] = {
    **dict.fromkeys(_DISTILLED, DISTILLED),
    **dict.fromkeys(_THREE, THREE),
    **dict.fromkeys(_PERTURBED, PERTURBED),
    **dict.fromkeys(_UNGUIDED, UNGUIDED),
    "OnnxStableDiffusionPipeline": _ONNX,
    "OnnxStableDiffusionImg2ImgPipeline": _ONNX,
    "OnnxStableDiffusionInpaintPipeline": _ONNX,
    "OnnxStableDiffusionInpaintPipelineLegacy": _ONNX,
    "OnnxStableDiffusionUpscalePipeline": _ONNX,
    "StableDiffusionOnnxPipeline": _ONNX,
    "UnCLIPPipeline": _TWO_STAGES,
    "UnCLIPImageVariationPipeline": _TWO_STAGES,
    "LTXI2VLongMultiPromptPipeline": _CHUNKS,
    "AnyFlowFARPipeline": f"{_CHUNKS}; a cache holds keys of both branches",
    "StableDiffusionAttendAndExcitePipeline": _STEERED,
    "StableDiffusionPix2PixZeroPipeline": _STEERED,
    "StableDiffusionPanoramaPipeline": "several windows per step, each in calls of its own",
    "StableDiffusionParadigmsPipeline": "many steps in one call, repeated until they agree",
    "TextToVideoZeroPipeline": _HALVES,
    "TextToVideoZeroSDXLPipeline": _HALVES,
    "Cosmos2_5_TransferPipeline": _CHUNKS,
    "HunyuanVideoFramepackPipeline": _CHUNKS,
    "HeliosPipeline": _CHUNKS,
    "HeliosPyramidPipeline": f"{_CHUNKS}, at several sizes",
    "WanAnimatePipeline": _CHUNKS,
    "SkyReelsV2DiffusionForcingPipeline": _OWN_COPIES,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _OWN_COPIES,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _OWN_COPIES,
    "ChronoEditPipeline": "it drops frames in the course of a run: what is held has another shape",
    "Ideogram4Pipeline": f"a network for each branch; {_TEXT_TOO}",
    "QwenImage21Pipeline": _TEXT_TOO,
    "UniDiffuserPipeline": "picture, features and text in one answer; the mode says what guides",
    "StableDiffusionGLIGENTextImagePipeline": (
        "two doubled calls per step, with boxes and without, and half of each is used"
    ),
    "Cosmos3DistilledModularPipeline": _BLOCKS,
    "Cosmos3OmniModularPipeline": _BLOCKS,
    "Ideogram4ModularPipeline": _BLOCKS,
    "Kandinsky6TI2VAPipeline": "picture and sound, both guided, with a scheduler each",
    "Cosmos3OmniPipeline": "picture, sound and action, all guided, with a scheduler each",
    "EasyAnimateControlPipeline": "its call fails in diffusers itself (an unknown argument)",
}


def reason_for(pipeline_class: type[Any]) -> str:
    """Why a pipeline without a record is left alone; "" where there is nothing to say."""
    for parent in pipeline_class.__mro__:
        if "__call__" in vars(parent) or parent.__name__ in REASONS:
            known = parent.__module__.startswith("diffusers.")
            return REASONS.get(parent.__name__, "") if known else ""
    return ""
