"""Backbones of the GPU suite: published architectures with random weights, and their pipelines.

Configurations are those that the models' authors published; nothing is downloaded. Weights come
from the classes' own initialisation, float32, then take the dtype that people run (modules that
diffusers keeps in float32 stay). Random weights cost what trained ones do: no kernel of a denoiser
depends on values. What random weights cannot show is quality, and no number here claims any.

``tiny`` configurations have the same blocks and inputs at a size for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

Conditioning = dict[str, Tensor]
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
NOT_BY_KEYWORD = (
    "diffusers' FasterCache halves keyword arguments alone: this pipeline gives sample and timestep"
    " by position"
)
TWO_CALLS = (
    "diffusers' FasterCache splits one call of both branches: this pipeline calls once per branch"
)


@dataclass(frozen=True)
class Size:
    """What a model is built and run with.

    Attributes:
        config: arguments of the class.
        latent: shape of one sample, channels first.
        text: tokens and width of the text embedding.
        pooled: width of the pooled text embedding; 0 if the model takes none.
    """

    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0


@dataclass(frozen=True)
class Spec:
    """One model of the suite.

    Attributes:
        steps: steps of the run that people make.
        timed_steps: steps of the run that is timed here; fewer where a run takes minutes.
        seconds: budget of the timed rounds, curve and end to end.
        faster_cache: why diffusers' FasterCache does not apply; "" if it does.
    """

    name: str
    title: str
    model: str
    pipeline: str
    full: Size
    tiny: Size
    dtype: torch.dtype
    scheduler: Callable[[], Any]
    guidance_scale: float
    blocks: str
    steps: int = 50
    timed_steps: int = 50
    seconds: tuple[float, float] = (6.0, 12.0)
    faster_cache: str = NOT_BY_KEYWORD
    attribute: str = "transformer"


def _ddim() -> Any:
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**SCALED_LINEAR, **options)


def _euler() -> Any:
    options = {"timestep_spacing": "leading", "steps_offset": 1}
    return diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, **options)


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
SD35 = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "text_dim": 4096}
TINY_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_SDXL = {
    **TINY_UNET,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
TINY_SD35 = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
TINY_WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 16,
    "rope_max_seq_len": 32,
}

SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            *("sd15", "SD 1.5, 512 px", "UNet2DConditionModel", "StableDiffusionPipeline"),
            full=Size(SD15, (4, 64, 64), (77, 768)),
            tiny=Size(TINY_UNET, (4, 8, 8), (7, 16)),
            dtype=torch.float16,
            scheduler=_ddim,
            guidance_scale=7.5,
            blocks="BasicTransformerBlock",
            attribute="unet",
        ),
        Spec(
            *("sdxl", "SDXL, 1024 px", "UNet2DConditionModel", "StableDiffusionXLPipeline"),
            full=Size(SDXL, (4, 128, 128), (77, 2048), 1280),
            tiny=Size(TINY_SDXL, (4, 8, 8), (7, 16), 16),
            dtype=torch.float16,
            scheduler=_euler,
            guidance_scale=5.0,
            blocks="BasicTransformerBlock",
            seconds=(8.0, 30.0),
            attribute="unet",
        ),
        Spec(
            *("sd35", "SD 3.5 Large, 1024 px", "SD3Transformer2DModel"),
            "StableDiffusion3Pipeline",
            full=Size(SD35, (16, 128, 128), (333, 4096), 2048),
            tiny=Size(TINY_SD35, (16, 8, 8), (7, 16), 16),
            dtype=torch.bfloat16,
            scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            guidance_scale=4.5,
            blocks="JointTransformerBlock",
            steps=28,
            timed_steps=28,
            seconds=(12.0, 45.0),
            faster_cache="",
        ),
        Spec(
            *("wan", "Wan 2.1 1.3B, 480p, 81 frames", "WanTransformer3DModel", "WanPipeline"),
            full=Size(WAN_1_3B, (16, 21, 60, 104), (512, 4096)),
            tiny=Size(TINY_WAN, (16, 3, 8, 8), (7, 16)),
            dtype=torch.bfloat16,
            scheduler=lambda: diffusers.UniPCMultistepScheduler(**WAN),
            guidance_scale=5.0,
            blocks="WanTransformerBlock",
            timed_steps=6,
            seconds=(12.0, 30.0),
            faster_cache=TWO_CALLS,
        ),
    )
}
TINY_STEPS = 6
PARTS = ("text_encoder", "tokenizer")


def make_model(spec: Spec, size: Size, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, in eval mode; initialised where it will live."""
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(diffusers, spec.model)(**size.config).eval().requires_grad_(False)
    saved = set(model.state_dict())
    wide = getattr(model, "_keep_in_fp32_modules", None) or []
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if name in saved and not set(name.split(".")) & set(wide):
                tensor.data = tensor.data.to(dtype)  # one by one: never two copies of 8 billion
    return model


@dataclass
class Backbone:
    """A model with its inputs; called as the engine calls a denoiser.

    Attributes:
        steps: of the run that is timed.
        smoke: whether the model is the tiny one.
    """

    spec: Spec
    model: torch.nn.Module
    size: Size
    device: str
    dtype: torch.dtype
    steps: int
    smoke: bool = False
    _compiled: dict[torch.nn.Module, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, name: str, device: str, smoke: bool, dtype: torch.dtype | None = None
    ) -> Backbone:
        """Build ``name``; the tiny one, in float32 unless told otherwise, where ``smoke``."""
        spec = SPECS[name]
        size = spec.tiny if smoke else spec.full
        dtype = dtype or (torch.float32 if smoke else spec.dtype)
        model = make_model(spec, size, device, dtype)
        steps = TINY_STEPS if smoke else spec.timed_steps
        return cls(spec, model, size, device, dtype, steps, smoke)

    def __call__(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction for R rows; see `thg_engine.engine.Denoiser`."""
        given = {"encoder_hidden_states": conditioning["text"], "return_dict": False}
        if "time_ids" in conditioning:
            added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
            given["added_cond_kwargs"] = added
        elif "pooled" in conditioning:
            given["pooled_projections"] = conditioning["pooled"]
        if self.spec.attribute == "unet":
            return self.model(x, timestep, **given)[0]
        return self.model(hidden_states=x, timestep=timestep, **given)[0]

    def conditioning(self, seed: int, batch: int = 1) -> Conditioning:
        """Random text features of ``batch`` rows."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            value = torch.randn(batch, *shape, generator=generator)
            return value.to(self.device, self.dtype)

        found = {"text": draw(*self.size.text)}
        if self.size.pooled:
            found["pooled"] = draw(self.size.pooled)
        if self.size.config.get("addition_embed_type") == "text_time":
            height, width = self.pixels()
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype)
            found["time_ids"] = ids.repeat(batch, 1).to(self.device)
        return found

    def noise(self, batch: int = 1) -> Tensor:
        """Unit noise, shape (batch, *latent)."""
        generator = torch.Generator().manual_seed(1)
        value = torch.randn(batch, *self.size.latent, generator=generator)
        return value.to(self.device, self.dtype)

    def call_inputs(self, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
        """What one call of ``batch`` rows takes."""
        t = torch.full((batch,), 500.0, device=self.device)
        return self.noise(batch), t, self.conditioning(2, batch)

    def pixels(self) -> tuple[int, int]:
        """Height and width of the image; the pipelines take 8 for the VAE's scale."""
        return 8 * self.size.latent[-2], 8 * self.size.latent[-1]

    def set_compiled(self, on: bool) -> None:
        """Switch regional torch.compile of the repeated blocks, Inductor's CUDA graphs off.

        Off and on again costs nothing: code that was compiled is kept.
        """
        if on and not self._compiled:
            # Widths, batches and their mixtures share one block's code: more variants than 8.
            torch._dynamo.config.recompile_limit = 64
            for block in self._blocks():
                block.compile(backend="eager" if self.smoke else "inductor")
                self._compiled[block] = block._compiled_call_impl
        for block, compiled in self._compiled.items():
            block._compiled_call_impl = compiled if on else None

    def _blocks(self) -> Iterator[torch.nn.Module]:
        names = getattr(self.model, "_repeated_blocks", None) or [self.spec.blocks]
        return (block for block in self.model.modules() if type(block).__name__ in names)

    def pipeline(self) -> Any:
        """The genuine pipeline around the model; text encoders and VAE are not there."""
        absent = {
            "sd15": ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
            "sdxl": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
            "sd35": ("vae", *(f"{part}{n}" for part in PARTS for n in ("", "_2", "_3"))),
            "wan": ("vae", "text_encoder", "tokenizer"),
        }[self.spec.name]
        given = {**dict.fromkeys(absent), self.spec.attribute: self.model}
        if self.spec.name == "sd15":
            given["requires_safety_checker"] = False
        pipe = getattr(diffusers, self.spec.pipeline)(**given, scheduler=self.spec.scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run_pipeline(self, pipe: Any, steps: int, **options: Any) -> Tensor:
        """One call of the pipeline from `noise`, the conditions 3 and 4; the latents."""
        cond, uncond = self.conditioning(3), self.conditioning(4)
        height, width = self.pixels()
        given = {"height": height, "width": width, "output_type": "latent", "return_dict": False}
        if self.spec.name == "wan":
            given["num_frames"] = 4 * (self.size.latent[1] - 1) + 1
        if "pooled" in cond:
            given["pooled_prompt_embeds"] = cond["pooled"]
            given["negative_pooled_prompt_embeds"] = uncond["pooled"]
        return pipe(
            prompt_embeds=cond["text"],
            negative_prompt_embeds=uncond["text"],
            latents=self.noise(),
            num_inference_steps=steps,
            guidance_scale=self.spec.guidance_scale,
            **given,
            **options,
        )[0]
