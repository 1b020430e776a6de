"""Small Stable Diffusion pipelines with random weights: genuine classes, milliseconds per step."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from thg_engine import CFG, THG, CFGCache, GuidanceInterval, SelectiveGuidance

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "house", "tree", "bad"]
KINDS = ["text", "img2img", "inpaint", "inpaint9"]
METHODS = {
    "cfg": CFG(),
    "thg": THG(),
    "thg-grid": THG(grid=(0, 1, 4), boost=1.2, cutoff=5),
    "thg-interval": THG(grid=3, boost=0.9),
    "thg-nfe": THG(nfe=0.6),
    "cfg-cache": CFGCache(3, 0.25),
    "guidance-interval": GuidanceInterval(0.2, 0.7),
    "selective": SelectiveGuidance(0.5),
}
TOKENS = 16  # room for every prompt of the tests
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def ddim(**kwargs):
    return diffusers.DDIMScheduler(**{**SD, **DDIM, **kwargs})


def tokenizer() -> CLIPTokenizer:
    tokens = [f"{word}</w>" for word in WORDS] + sorted({c for w in WORDS for c in w})
    tokens += [f"{c}</w>" for c in sorted({c for w in WORDS for c in w})]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def components(seed: int = 0, in_channels: int = 4, dtype=torch.float32) -> dict:
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    for name, weight in unet.named_parameters():
        if "attn2.to_out" in name:
            weight.data *= 20.0  # guidance that shows
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return {
        "unet": _cast(unet, dtype),
        "vae": _cast(vae, dtype),
        "text_encoder": CLIPTextModel(config).to(dtype).eval(),
        "tokenizer": words,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _cast(module, dtype):
    """In eval mode and ``dtype``; diffusers' own ``to`` warns of every cast."""
    torch.nn.Module.to(module, dtype)
    return module.eval()


def tiny(kind: str = "text", scheduler=None, seed: int = 0, **kwargs):
    """A pipeline of one of `KINDS`; "inpaint9" has the inpainting UNet of 9 channels."""
    name = {
        "text": "StableDiffusionPipeline",
        "img2img": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }[kind.removesuffix("9")]
    parts = components(seed, 9 if kind.endswith("9") else 4, **kwargs)
    pipe = getattr(diffusers, name)(**parts, scheduler=ddim())
    if scheduler is not None:
        pipe.scheduler = scheduler  # the constructor would switch clip_sample off
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name: str, **config):
    """A scheduler by name, with SD's schedule."""
    if name == "DPMSolverSDEScheduler":
        config = {"noise_sampler_seed": 7, **config}  # it does not take the call's generator
    # Not from ddim().config: from_config drops what is noted there as left at its default.
    return getattr(diffusers, name).from_config({**SD, **DDIM, **config})


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(size: int = 16) -> Image.Image:
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[4:12, 4:12] = 255
    return Image.fromarray(pixels)


def arguments(pipe, seed: int = 1, **kwargs) -> dict:
    """What `call` passes: latents (B, 4, 8, 8) unless told otherwise."""
    kind = type(pipe).__name__
    given = {"prompt": "a photo of cat", "num_inference_steps": 8, "guidance_scale": 5.0}
    if "Img2Img" in kind or "Inpaint" in kind:
        given.update(image=picture(), strength=0.8)
    if "Inpaint" in kind:
        given.update(mask_image=mask(), height=16, width=16)
    if kind == "StableDiffusionPipeline":
        given.update(height=16, width=16)
    given.update(output_type="latent", generator=torch.Generator().manual_seed(seed))
    return {**given, **kwargs}


def call(pipe, seed: int = 1, **kwargs):
    """One call with a fixed seed; the latents."""
    return pipe(**arguments(pipe, seed, **kwargs)).images


def pattern(plan, w: float = 5.0) -> list[tuple[str, float]]:
    """A plan as `reference` takes it: branches of each row and boost."""
    steps = []
    for row in plan.rows:
        held = "held" if row.guidance_weight and row.delta_weights else "none"
        steps.append(("both" if row.evaluates_both else held, row.guidance_weight / (w - 1)))
    return steps


Edit = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, bool]]


@torch.no_grad()
def reference(
    pipe,
    steps: Sequence[tuple[str, float]],
    seed: int = 1,
    scale: Callable[[int], float] | None = None,
    edit: Edit | None = None,
    **kwargs,
):
    """The denoising loop written out, guidance formed straight from held deltas.

    Args:
        pipe: an uncompiled pipeline; its loop is not used.
        steps: per model call "both", "held" or "none", and the boost on delta.
        scale: guidance scale of row i; at most 1 there means: the conditional branch alone, and
            nothing held survives it.
        edit: called after row i with sample and embeddings [uncond, cond]; returns both and
            whether what is held has become stale.
        kwargs: as for `call`.
    """
    given = arguments(pipe, seed, **kwargs)
    generator, scheduler = given["generator"], pipe.scheduler
    scale = scale or (lambda i: given["guidance_scale"])
    copies = given.get("num_images_per_prompt", 1)
    cond, uncond = pipe.encode_prompt(
        given["prompt"], "cpu", copies, True, given.get("negative_prompt")
    )
    embeds = torch.cat([uncond, cond])
    scheduler.set_timesteps(given["num_inference_steps"])
    x, timesteps, channels, blend = _start(pipe, given, cond, generator)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": given.get("eta", 0.0), "generator": generator}
    options = {name: value for name, value in options.items() if name in accepted}
    delta, rows = None, 0
    for i, t in enumerate(timesteps):
        kind, boost = steps[i]
        batch, w = len(x), scale(i)
        fed = torch.cat([scheduler.scale_model_input(x, t), channels[:batch]], dim=1)
        if w <= 1:
            out, delta, rows = _unet(pipe, fed, t, embeds[-batch:]), None, rows + batch
        elif kind == "both" or (kind == "held" and delta is None):
            pair = _unet(pipe, torch.cat([fed, fed]), t, embeds)
            c, rows = pair[batch:], rows + 2 * batch
            delta = c.float() - pair[:batch].float()
            out = _guided(c, (w - 1) * boost * delta, given.get("guidance_rescale", 0.0))
        else:
            c, rows = _unet(pipe, fed, t, embeds[batch:]), rows + batch
            held = delta if kind == "held" else torch.zeros_like(c)
            out = _guided(c, (w - 1) * boost * held, given.get("guidance_rescale", 0.0))
        x = scheduler.step(out, t, x, **options, return_dict=False)[0]
        x = blend(i, x)
        if edit is not None:
            x, embeds, stale = edit(i, x, embeds)
            delta = None if stale else delta
    return x, rows


def _unet(pipe, fed, t, embeds):
    return pipe.unet(fed, t, encoder_hidden_states=embeds).sample


def _guided(c, push, rescale: float):
    out = c + push
    spread = c.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)
    return (rescale * spread * out + (1 - rescale) * out).to(c.dtype)


def _start(pipe, given, cond, generator):
    """First sample, timesteps, further input channels and blending, by the pipeline's own parts."""
    batch, kind = len(cond), type(pipe).__name__
    timesteps, dtype = pipe.scheduler.timesteps, cond.dtype
    none = torch.empty(batch, 0, 1, 1, dtype=dtype)
    size = (given.get("height", 16), given.get("width", 16))
    if kind == "StableDiffusionPipeline":
        none = none.expand(batch, 0, size[0] // 2, size[1] // 2)
        x = pipe.prepare_latents(batch, 4, *size, dtype, "cpu", generator)
        return x, timesteps, none, lambda i, x: x
    timesteps, _ = pipe.get_timesteps(given["num_inference_steps"], given["strength"], "cpu")
    first = timesteps[:1].repeat(batch)
    none = none.expand(batch, 0, 8, 8)
    image = pipe.image_processor.preprocess(given["image"])
    if "Img2Img" in kind:
        x = pipe.prepare_latents(image, first, batch, 1, dtype, "cpu", generator)
        return x, timesteps, none, lambda i, x: x
    plain = pipe.unet.config.in_channels == 4
    full = given["strength"] == 1.0
    options = {"image": image, "timestep": first, "is_strength_max": full, "return_noise": True}
    x, noise, *clean = pipe.prepare_latents(
        batch, 4, *size, dtype, "cpu", generator, **options, return_image_latents=plain
    )
    hole = pipe.mask_processor.preprocess(given["mask_image"])
    hole, masked = pipe.prepare_mask_latents(
        hole, image * (hole < 0.5), batch, *size, dtype, "cpu", generator, False
    )

    def blend(i, x):
        kept = clean[0]
        if i + 1 < len(timesteps):
            kept = pipe.scheduler.add_noise(kept, noise, timesteps[i + 1 : i + 2])
        return (1 - hole) * kept + hole * x

    if plain:
        return x, timesteps, none, blend
    return x, timesteps, torch.cat([hole, masked], dim=1), lambda i, x: x


class CountRows:
    """Counts the rows that a denoiser evaluates, seen from inside the network."""

    def __init__(self, unet) -> None:
        self.rows: list[int] = []
        self.handle = unet.conv_in.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.rows.append(output.shape[0])

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.handle.remove()

    @property
    def total(self) -> int:
        return sum(self.rows)
