"""Registry of genuine diffusers pipelines of tiny random parts, and the parts they share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipelines import TOKENS, WORDS, tokenizer

ZOO: dict[str, Zoo] = {}
PROMPT, NEGATIVE = "a photo of cat", "bad dog"
CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %} {% endfor %}"
)


@dataclass(frozen=True)
class Zoo:
    """One pipeline of the zoo, and what may be asked of it.

    Attributes:
        cls: name of the diffusers class.
        name: of the entry; one class may have several.
        make: a new pipeline and the keyword arguments of one call.
        denoiser: attribute that holds the network; several are separated by commas.
        result: field of the output that holds the result.
        scale: argument with the guidance scale; None where guidance is distilled or a guider's.
        guided: whether classifier-free guidance is on in the call.
        guider: name of the component that guides, for pipelines of that kind.
        callbacks: whether ``callback_on_step_end`` is taken.
        batch: arguments that make the call one of two prompts; None where that is refused.
        copies: argument for several results per prompt; None where there is none.
        other: arguments of a second resolution; None where there is none.
        needs: diffusers classes without which the entry is skipped.
        slow: whether the test of the entry takes more than ten seconds.
        pattern: of the network's calls: "concat" ([uncond, cond]), "concat-reversed",
            "calls" (one per branch), "three" (branches in one call), "three-calls",
            "skip-layer" (concat, and a call more in some steps), or "none".
        rows: of every call, where steps differ in calls.
    """

    cls: str
    name: str
    make: Callable[[], tuple[Any, dict]]
    denoiser: str
    result: str = "images"
    scale: str | None = "guidance_scale"
    guided: bool = True
    guider: str | None = None
    callbacks: bool = True
    batch: dict | None = field(default_factory=lambda: {**prompts()})
    copies: str | None = "num_images_per_prompt"
    other: dict | None = None
    needs: tuple[str, ...] = ()
    slow: bool = False
    pattern: str = "concat"
    rows: tuple[int, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Classes that the installed diffusers lacks, or that lack a library of their own."""
        found = {name: getattr(diffusers, name, None) for name in (self.cls, *self.needs)}
        return [name for name, cls in found.items() if cls is None or "dummy" in cls.__module__]


def zoo(cls: str, denoiser: str, **options) -> Callable:
    """Registers a function that makes a pipeline and the arguments of one call."""

    def register(make: Callable[[], tuple[Any, dict]]) -> Callable[[], tuple[Any, dict]]:
        if make.__name__ in ZOO:
            raise ValueError(f"{make.__name__} is in the zoo already")
        ZOO[make.__name__] = Zoo(cls, make.__name__, make, denoiser, **options)
        return make

    return register


def prompts() -> dict:
    """Two prompts with their negatives."""
    return {"prompt": [PROMPT, "red house"], "negative_prompt": [NEGATIVE, "bad tree"]}


def both(**kwargs) -> dict:
    """The usual arguments of a guided call."""
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0}
    return {**given, "num_inference_steps": 4, "output_type": "latent", **kwargs}


def sized(size: int, **kwargs) -> dict:
    return {"height": size, "width": size, **kwargs}


@functools.cache
def _given(name: str) -> dict:
    return ZOO[name].make()[1]


def build(entry: Zoo):
    """A new pipeline without a progress bar."""
    pipe = entry.make()[0]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(entry: Zoo, seed: int = 1, **changes) -> dict:
    """Arguments of one call with a seeded generator; ``changes`` replace what they name."""
    given = copy.deepcopy(_given(entry.name))
    return {**given, "generator": torch.Generator().manual_seed(seed), **changes}


def call(entry: Zoo, pipe, seed: int = 1, **changes) -> torch.Tensor:
    """The result of one call as one tensor."""
    torch.manual_seed(seed)  # for noise that is not drawn from the call's generator
    return tensor(pipe(**arguments(entry, seed, **changes)), entry.result)


def tensor(output, field: str = "images") -> torch.Tensor:
    """A pipeline's output as a tensor: latents, arrays, or lists of either."""
    found = getattr(output, field) if hasattr(output, field) else output
    if isinstance(found, (list, tuple)):
        return torch.stack([tensor(one, field) for one in found])
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))


def seeded(make: Callable[[], Any], seed: int = 0, gain: float = 1.0):
    """A module with weights of the seed: where the class starts at zero, at random instead."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    module = make().eval()
    for weight in module.parameters():
        if not weight.any() and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    if gain != 1.0:
        louder(module, gain)
    torch.set_rng_state(state)
    return module


def louder(module, gain: float, *names: str) -> None:
    """Scales the weights so named (attention's outputs by default): guidance that shows."""
    for name, weight in module.named_parameters():
        if any(part in name for part in names or ("to_out", "to_add_out")):
            weight.data *= gain


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(length: int = TOKENS, side: str = "right", eos: bool = True, kind=None, **specials):
    """A fast tokenizer of whole words; it ends with </s>, and has a chat template."""
    pieces = ["<pad>", "</s>", "<unk>", "<s>", *WORDS, *specials.values()]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos:
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    made = (kind or transformers.PreTrainedTokenizerFast)(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
        padding_side=side,
        additional_special_tokens=list(specials.values()),
    )
    made.chat_template = CHAT
    return made


def clip_config(**kwargs):
    names = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes.update(num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=16)
    ids = {f"{kind}_token_id": getattr(names, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return transformers.CLIPTextConfig(vocab_size=len(names), **{**sizes, **ids, **kwargs})


def clip(seed: int = 0, projected: bool = False, **kwargs):
    """A CLIP text encoder of width 16; with a projection of 16 where asked."""
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return seeded(lambda: getattr(transformers, kind)(clip_config(**kwargs)), seed)


def clip_vision(seed: int = 0, width: int = 16):
    """A CLIP vision encoder with a projection of ``width``."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=width,
    )
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config), seed)


def t5(seed: int = 0, width: int = 16, kind: str = "T5EncoderModel"):
    """A T5 encoder for `words`; ``kind`` may be MT5EncoderModel or UMT5EncoderModel."""
    config = getattr(transformers, kind.replace("EncoderModel", "Config"))(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return seeded(lambda: getattr(transformers, kind)(config), seed)


def decoder(kind: str, seed: int = 0, width: int = 16, layers: int = 2, **kwargs):
    """A decoder language model such as LlamaForCausalLM, Gemma2Model, Qwen3Model, GlmModel."""
    family = kind.removesuffix("ForCausalLM").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        **{"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, **kwargs},
    )
    model = seeded(lambda: getattr(transformers, kind)(config), seed)
    louder(model, 50.0, "embed_tokens")  # from a deviation of 0.02
    return model


def vae(channels: int = 4, levels: int = 2, seed: int = 0, **kwargs):
    """An image autoencoder that shrinks by 2 per level but one."""
    make = functools.partial(
        diffusers.AutoencoderKL,
        block_out_channels=(4, 8, 8, 8)[:levels],
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        sample_size=16,
        **kwargs,
    )
    return seeded(make, seed)


def flux_vae(channels: int = 4, levels: int = 2):
    """The autoencoder of the flow models: no quantisation layers, a shift of latents."""
    options = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(channels, levels, shift_factor=0.06, scaling_factor=1.5, **options)


def flow(**kwargs):
    return diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)
