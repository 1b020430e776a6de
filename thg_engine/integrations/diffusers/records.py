"""How each pipeline of diffusers does guidance."""

from __future__ import annotations

from dataclasses import replace

from .adapter_types import AdapterRecord

_UNETS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline"),
    *("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline"),
    *("StableDiffusionAdapterPipeline", "StableDiffusionGLIGENPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetPipeline"),
    *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLAdapterPipeline"),
    *("StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline"),
    *("StableDiffusionDepth2ImgPipeline", "StableDiffusionImageVariationPipeline"),
    *("StableDiffusionLDM3DPipeline", "StableDiffusionControlNetXSPipeline"),
    *("StableDiffusionXLControlNetXSPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
    *("StableDiffusionXLControlNetUnionPipeline", "StableUnCLIPImg2ImgPipeline"),
    *("StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableUnCLIPPipeline"),
    *("StableDiffusionXLControlNetUnionInpaintPipeline", "IFPipeline", "IFImg2ImgPipeline"),
    *("IFInpaintingPipeline", "IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline"),
    *("IFInpaintingSuperResolutionPipeline", "KandinskyPipeline", "KandinskyImg2ImgPipeline"),
    *("KandinskyInpaintPipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"),
    *("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"),
    *("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"),
    *("StableDiffusionModelEditingPipeline", "StableDiffusionInpaintPipelineLegacy"),
    *("StableDiffusionDiffEditPipeline", "PaintByExamplePipeline", "PIAPipeline"),
    *("AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoPipeline"),
    *("AnimateDiffVideoToVideoControlNetPipeline", "AnimateDiffSparseControlNetPipeline"),
    *("AnimateDiffSDXLPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline"),
    *("I2VGenXLPipeline", "AudioLDMPipeline", "MusicLDMPipeline", "LDMTextToImagePipeline"),
    *("KolorsPipeline", "KolorsImg2ImgPipeline", "AnimateDiffPipeline"),
    *("KandinskyV22Pipeline", "AudioLDM2Pipeline"),
)
_TRANSFORMERS = (
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    *("StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline"),
    *("AuraFlowPipeline", "StableAudioPipeline", "CogVideoXPipeline"),
    *("CogVideoXImageToVideoPipeline", "MochiPipeline", "LTXPipeline"),
    *("StableDiffusion3ControlNetInpaintingPipeline", "SanaControlNetPipeline"),
    *("CogVideoXVideoToVideoPipeline", "CogVideoXFunControlPipeline"),
    *("BriaPipeline", "BriaFiboPipeline", "PRXPipeline", "ErnieImagePipeline"),
    *("LTX2Pipeline", "LTX2ImageToVideoPipeline", "SanaVideoPipeline", "AmusedPipeline"),
    *("SanaImageToVideoPipeline", "EasyAnimatePipeline", "EasyAnimateInpaintPipeline"),
    *("AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "LTX2ConditionPipeline"),
    *("HiDreamImagePipeline", "HunyuanDiTControlNetPipeline", "CogView3PlusPipeline"),
    *("AnyFlowPipeline", "LTX2InContextPipeline", "LTX2HDRPipeline", "StableAudio3Pipeline"),
    *("LTXImageToVideoPipeline", "LTXConditionPipeline", "LattePipeline", "AllegroPipeline"),
)
_TRUE_CFG = (
    *("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline"),
    *("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageImg2ImgPipeline"),
    *("QwenImageInpaintPipeline", "HunyuanVideoPipeline", "FluxInpaintPipeline"),
    *("FluxKontextInpaintPipeline", "FluxControlNetPipeline", "QwenImageControlNetPipeline"),
    *("QwenImageControlNetInpaintPipeline", "QwenImageEditInpaintPipeline"),
    *("QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"),
    *("HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
)
_CALLS = (
    *("ChromaPipeline", "CogView4Pipeline", "Lumina2Pipeline", "SkyReelsV2Pipeline"),
    *("WanVideoToVideoPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    *("CogView4ControlPipeline", "Krea2Pipeline", "Flux2KleinPipeline"),
    *("Flux2KleinInpaintPipeline", "LongCatImagePipeline", "OvisImagePipeline"),
    *("NucleusMoEImagePipeline", "GlmImagePipeline", "BriaFibo2Pipeline"),
    *("JoyImageEditPipeline", "SkyReelsV2ImageToVideoPipeline", "Kandinsky5T2VPipeline"),
    *("Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
    *("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"),
    *("Cosmos2_5_PredictBasePipeline", "LongCatImageEditPipeline", "LongCatAudioDiTPipeline"),
)
_EXPERTS = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline")
_LISTS = (
    *("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    *("ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline"),
)
_CONTROLLED = {
    *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    *("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetPipeline"),
    *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
    *(
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    ),
    *("StableDiffusionXLControlNetUnionInpaintPipeline", "StableDiffusion3ControlNetPipeline"),
    *("StableDiffusion3ControlNetInpaintingPipeline", "HunyuanDiTControlNetPipeline"),
    *("SanaControlNetPipeline", "AnimateDiffControlNetPipeline"),
    *("AnimateDiffVideoToVideoControlNetPipeline", "AnimateDiffSparseControlNetPipeline"),
    *("ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline"),
}
_PREDICTED = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
"""They ask the scheduler for x0 of each branch before they step."""
_ANCHORED = {
    *_PREDICTED,
    *("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline", "Krea2Pipeline", *_LISTS),
    *("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline"),
}
"""Their guidance is c + scale (c - u)."""
_PRIORS = (
    *("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"),
    *("ShapEPipeline", "ShapEImg2ImgPipeline"),
)
RECORDS: dict[str, AdapterRecord] = {
    record.pipeline: replace(
        record,
        companions=("controlnet",) if record.pipeline in _CONTROLLED else (),
        anchor=float(record.pipeline in _ANCHORED),
    )
    for record in (
        *(AdapterRecord(name) for name in _UNETS),
        *(AdapterRecord(name, "transformer") for name in _TRANSFORMERS),
        *(AdapterRecord(name, "transformer", calls=True) for name in _CALLS),
        *(
            AdapterRecord(name, "transformer", scale="true_cfg_scale", calls=True)
            for name in _TRUE_CFG
        ),
        *(
            AdapterRecord(name, "transformer", calls=True, experts=("transformer_2",))
            for name in _EXPERTS
        ),
        *(AdapterRecord(name, "transformer", calls=True, whole_step=True) for name in _PREDICTED),
        AdapterRecord("StableVideoDiffusionPipeline"),
        AdapterRecord("StableDiffusionInstructPix2PixPipeline", cond_half=0, branches=3),
        AdapterRecord("StableDiffusionXLInstructPix2PixPipeline", cond_half=0, branches=3),
        AdapterRecord("DiTPipeline", "transformer", cond_half=0),
        AdapterRecord("LuminaPipeline", "transformer", cond_half=0),
        AdapterRecord("StableCascadePriorPipeline", "prior", cond_half=0),
        AdapterRecord("StableCascadeDecoderPipeline", "decoder", cond_half=0),
        AdapterRecord("WuerstchenPriorPipeline", "prior", cond_half=0),
        AdapterRecord("WuerstchenDecoderPipeline", "decoder", cond_half=0),
        *(AdapterRecord(name, "prior") for name in _PRIORS),
        *(AdapterRecord(name, "transformer", cond_half=0) for name in _LISTS),
    )
}
