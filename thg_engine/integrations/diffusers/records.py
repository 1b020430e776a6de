"""How each pipeline of diffusers does guidance."""

from __future__ import annotations

from .adapter_types import AdapterRecord

_UNETS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline"),
    *("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline"),
    *("StableDiffusionAdapterPipeline", "StableDiffusionGLIGENPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLControlNetPipeline"),
    *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLAdapterPipeline"),
    *("KolorsPipeline", "AnimateDiffPipeline", "KandinskyV22Pipeline", "AudioLDM2Pipeline"),
)
_TRANSFORMERS = (
    *("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    *("StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline"),
    *("AuraFlowPipeline", "StableAudioPipeline", "CogVideoXPipeline"),
    *("CogVideoXImageToVideoPipeline", "MochiPipeline", "LTXPipeline"),
    *("LTXImageToVideoPipeline", "LTXConditionPipeline", "LattePipeline", "AllegroPipeline"),
)
_TRUE_CFG = (
    *("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline"),
    *("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageImg2ImgPipeline"),
    *("QwenImageInpaintPipeline", "HunyuanVideoPipeline"),
)
_CALLS = (
    *("ChromaPipeline", "CogView4Pipeline", "Lumina2Pipeline", "SkyReelsV2Pipeline"),
    "WanVideoToVideoPipeline",
)
_EXPERTS = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
RECORDS: dict[str, AdapterRecord] = {
    record.pipeline: record
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
        AdapterRecord("StableVideoDiffusionPipeline"),
        AdapterRecord("DiTPipeline", "transformer", cond_half=0),
        AdapterRecord("LuminaPipeline", "transformer", cond_half=0),
    )
}
