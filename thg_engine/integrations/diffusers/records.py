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
    *("StableDiffusionDiffEditPipeline", "PaintByExamplePipeline", "PIAPipeline"),
    *("AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoPipeline"),
    *("AnimateDiffVideoToVideoControlNetPipeline", "AnimateDiffSparseControlNetPipeline"),
    *("AnimateDiffSDXLPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline"),
    *("I2VGenXLPipeline",),
    *("KolorsPipeline", "AnimateDiffPipeline", "KandinskyV22Pipeline", "AudioLDM2Pipeline"),
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
    *("HiDreamImagePipeline", "HunyuanDiTControlNetPipeline", "CogView3PlusPipeline"),
    *("LTXImageToVideoPipeline", "LTXConditionPipeline", "LattePipeline", "AllegroPipeline"),
)
RECORDS: dict[str, AdapterRecord] = {
    record.pipeline: record
    for record in (
        *(AdapterRecord(name) for name in _UNETS),
        *(AdapterRecord(name, "transformer") for name in _TRANSFORMERS),
        AdapterRecord("StableVideoDiffusionPipeline", scale="max_guidance_scale"),
        AdapterRecord("DiTPipeline", "transformer", cond_half=0),
        AdapterRecord("LuminaPipeline", "transformer", cond_half=0),
        AdapterRecord("StableCascadePriorPipeline", "prior", cond_half=0),
        AdapterRecord("StableCascadeDecoderPipeline", "decoder", cond_half=0),
    )
}
