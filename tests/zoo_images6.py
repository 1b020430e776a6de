"""Image pipelines by priors and in pixels: DeepFloyd IF, Kandinsky 2 and 3, Stable Cascade."""

from __future__ import annotations

import functools
import inspect

import diffusers
import transformers

from pipelines import ddim, mask, picture, tokenizer
from zoo import both, clip, clip_vision, noise, prompts, seeded, sized, t5, words, zoo
from zoo_images import TWO, unet
from zoo_images4 import SIMPLE, cascade, image_embeds, movq
from zoo_images5 import prior_net

IF = {"denoiser": "unet", "callbacks": False}
FOUR = {"rows": (2, 2, 2, 2)}  # of five steps
PIXELS = {"in_channels": 3, "out_channels": 6, "cross_attention_norm": "layer_norm"}
TEXT = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
UNCLEAN = {"clean_caption": False, "output_type": "pt"}
LATE = {"strength": 0.8, "num_inference_steps": 5}
MASKS = {"image": TWO["image"], "mask_image": [mask(), mask()]}
MASKED = {**TWO, **MASKS}
UP = {**TWO, "original_image": TWO["image"]}


def floyd(name: str, larger: bool = False):
    """A stage of DeepFloyd IF; one that enlarges sees the small image and is told its noise."""
    pixels = {**PIXELS, "in_channels": 6, "class_embed_type": "timestep"} if larger else PIXELS
    noising = {"image_noising_scheduler": diffusers.DDPMScheduler()} if larger else {}
    return getattr(diffusers, name)(
        tokenizer=words(77),
        text_encoder=t5(),
        unet=unet(**SIMPLE, **pixels, **TEXT),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **noising,
    )


@zoo("IFImg2ImgPipeline", batch=TWO, **FOUR, **IF)
def if_img2img():
    return floyd("IFImg2ImgPipeline"), both(image=picture(), **LATE, **UNCLEAN)


@zoo("IFInpaintingPipeline", batch=MASKED, **FOUR, **IF)
def if_inpaint():
    given = both(image=picture(), mask_image=mask(), **LATE, **UNCLEAN)
    return floyd("IFInpaintingPipeline"), given


@zoo("IFSuperResolutionPipeline", batch=TWO, **IF)
def if_super_resolution():
    pipe = floyd("IFSuperResolutionPipeline", larger=True)
    return pipe, both(image=picture(size=8), **sized(16), **UNCLEAN)


@zoo("IFImg2ImgSuperResolutionPipeline", batch=UP, **FOUR, **IF)
def if_img2img_super_resolution():
    pipe = floyd("IFImg2ImgSuperResolutionPipeline", larger=True)
    images = {"image": picture(size=8), "original_image": picture(1)}
    return pipe, both(**images, **LATE, **UNCLEAN)


@zoo("IFInpaintingSuperResolutionPipeline", batch={**UP, **MASKED}, **FOUR, **IF)
def if_inpaint_super_resolution():
    pipe = floyd("IFInpaintingSuperResolutionPipeline", larger=True)
    images = {"image": picture(size=8), "original_image": picture(1), "mask_image": mask()}
    return pipe, both(**images, **LATE, **UNCLEAN)


def mclip():
    """The encoder of Kandinsky 2.1: a text's embedding and those of its words."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=16,
        transformerDimensions=16,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=80,
        pad_token_id=0,
    )
    config.transformerDimensions, config.numDims = 16, 16
    return seeded(lambda: MultilingualCLIP(config))


def kandinsky(name: str, channels: int = 4):
    """Kandinsky 2.1; its network also learns a variance."""
    image = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}
    return getattr(diffusers, name)(
        text_encoder=mclip(),
        tokenizer=words(77),
        unet=unet(**SIMPLE, **image, in_channels=channels, out_channels=8),
        scheduler=ddim(),
        movq=movq(),
    )


PLAIN = {"callbacks": False, "other": sized(24)}


@zoo("KandinskyPipeline", denoiser="unet", batch={**prompts(), **image_embeds(2)}, **PLAIN)
def kandinsky21():
    given = both(**image_embeds(), **sized(16), output_type="pt")
    return kandinsky("KandinskyPipeline"), given


@zoo("KandinskyImg2ImgPipeline", denoiser="unet", batch=None, copies=None, **FOUR, **PLAIN)
def kandinsky21_img2img():
    given = both(image=picture(), **image_embeds(), **sized(16), **LATE, output_type="pt")
    pipe = kandinsky("KandinskyImg2ImgPipeline")
    return pipe, given


@zoo("KandinskyInpaintPipeline", denoiser="unet", batch=None, **PLAIN)
def kandinsky21_inpaint():
    images = {"image": picture(), "mask_image": mask(), "output_type": "pt"}
    return kandinsky("KandinskyInpaintPipeline", 9), both(**images, **image_embeds(), **sized(16))


def kandinsky22(name: str, channels: int = 4, hint: bool = False):
    """Kandinsky 2.2, led by image embeddings, maybe by a picture of depths too."""
    kind = "image_hint" if hint else "image"
    image = {"addition_embed_type": kind, "encoder_hid_dim_type": "image_proj"}
    net = unet(**SIMPLE, **image, in_channels=channels, out_channels=8)
    return getattr(diffusers, name)(unet=net, scheduler=ddim(), movq=movq())


def led(**kwargs) -> dict:
    given = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    return {**given, **image_embeds(), **sized(16), **kwargs}


EMBEDDED = {"denoiser": "unet", "batch": image_embeds(2), "other": sized(24)}


@zoo("KandinskyV22Img2ImgPipeline", **{**EMBEDDED, "other": None})
def kandinsky22_img2img():
    return kandinsky22("KandinskyV22Img2ImgPipeline"), led(image=picture(), **LATE)


@zoo("KandinskyV22InpaintPipeline", **{**EMBEDDED, "batch": {**MASKS, **image_embeds(2)}})
def kandinsky22_inpaint():
    return kandinsky22("KandinskyV22InpaintPipeline", 9), led(image=picture(), mask_image=mask())


HINTED = {**EMBEDDED, "batch": None, "other": None, "callbacks": False}


@zoo("KandinskyV22ControlnetPipeline", **HINTED)
def kandinsky22_controlnet():
    pipe = kandinsky22("KandinskyV22ControlnetPipeline", 8, hint=True)
    return pipe, led(hint=noise(1, 3, 64, 64, seed=9), output_type="pt")


@zoo("KandinskyV22ControlnetImg2ImgPipeline", **FOUR, **HINTED)
def kandinsky22_controlnet_img2img():
    pipe = kandinsky22("KandinskyV22ControlnetImg2ImgPipeline", 8, hint=True)
    given = led(hint=noise(1, 3, 64, 64, seed=9), image=picture(), **LATE)
    return pipe, {**given, "output_type": "pt"}


def image_processor():
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.CLIPImageProcessor(**sizes)


def prior(name: str):
    """A prior from text to the embedding of an image."""
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
    )
    return getattr(diffusers, name)(
        prior=prior_net(num_embeddings=16, additional_embeddings=4),
        image_encoder=clip_vision(),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(),
        scheduler=scheduler,
        image_processor=image_processor(),
    )


# They run the negative prompt as a prompt of its own, for what it would have given.
PRIOR = {"denoiser": "prior", "result": "image_embeds", "rows": (4, 4, 4, 4)}


@zoo("KandinskyPriorPipeline", callbacks=False, **PRIOR)
def kandinsky21_prior():
    return prior("KandinskyPriorPipeline"), both(output_type="pt")


@zoo("KandinskyV22PriorPipeline", **PRIOR)
def kandinsky22_prior():
    return prior("KandinskyV22PriorPipeline"), both(output_type="pt")


@zoo("KandinskyV22PriorEmb2EmbPipeline", callbacks=False, batch=None, **PRIOR)
def kandinsky22_prior_emb2emb():
    given = both(image=noise(1, 16, seed=4), **LATE, output_type="pt")
    return prior("KandinskyV22PriorEmb2EmbPipeline"), given


def kandinsky3(name: str):
    make = functools.partial(
        diffusers.Kandinsky3UNet,
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )
    return getattr(diffusers, name)(
        unet=seeded(make, gain=20.0),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        text_encoder=t5(),
        tokenizer=words(128),
        movq=movq(),
    )


@zoo("Kandinsky3Pipeline", denoiser="unet", other=sized(128))
def kandinsky3_text():
    """Its w is one less than other pipelines': (w + 1) c - w u."""
    return kandinsky3("Kandinsky3Pipeline"), both(**sized(64))


@zoo("Kandinsky3Img2ImgPipeline", denoiser="unet", batch=TWO)
def kandinsky3_img2img():
    return kandinsky3("Kandinsky3Img2ImgPipeline"), both(image=picture(size=64), **LATE)


DECODER = {"denoiser": "decoder", "pattern": "concat-reversed", "copies": None}
DECODER["batch"] = {**prompts(), "image_embeddings": noise(2, 4, 4, 4, seed=5)}


@zoo("StableCascadeDecoderPipeline", **DECODER)
def stable_cascade_decoder():
    parts = cascade(
        "decoder",
        in_channels=4,
        out_channels=4,
        patch_size=2,
        effnet_in_channels=4,
        switch_level=None,
        conditioning_dim=16,
        clip_seq=4,
    )
    pipe = diffusers.StableCascadeDecoderPipeline(**parts, vqgan=None, latent_dim_scale=4.0)
    return pipe, both(image_embeddings=noise(1, 4, 4, 4, seed=5), guidance_scale=3.0)


def beside(name: str, pipeline: str = "WuerstchenPriorPipeline"):
    """A class that diffusers keeps beside that pipeline alone."""
    return getattr(inspect.getmodule(getattr(diffusers, pipeline)), name)


def wuerstchen(**nets) -> dict:
    return {
        **nets,
        "tokenizer": tokenizer(),
        "text_encoder": clip(),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


@zoo(
    "WuerstchenPriorPipeline",
    denoiser="prior",
    result="image_embeddings",
    pattern="concat-reversed",
    other=sized(96),
)
def wuerstchen_prior():
    make = functools.partial(
        beside("WuerstchenPrior"), c_in=2, c=8, depth=2, c_cond=16, c_r=8, nhead=2
    )
    parts = wuerstchen(prior=seeded(make, gain=20.0))
    pipe = diffusers.WuerstchenPriorPipeline(**parts, resolution_multiple=16.0)
    return pipe, both(**sized(64), output_type="pt")


@zoo("WuerstchenDecoderPipeline", **{**DECODER, "batch": None})
def wuerstchen_decoder():
    make = functools.partial(
        beside("WuerstchenDiffNeXt", "WuerstchenDecoderPipeline"),
        c_cond=16,
        c_hidden=[8, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=16,
    )
    parts = wuerstchen(decoder=seeded(make, gain=20.0))
    pipe = diffusers.WuerstchenDecoderPipeline(**parts, vqgan=None, latent_dim_scale=4.0)
    return pipe, both(image_embeddings=noise(1, 4, 4, 4, seed=5), guidance_scale=3.0)
