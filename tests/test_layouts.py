"""Halves of calls that are not tensors of one batch, and outputs that are not one tensor."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from thg_engine.integrations.diffusers.adapter_types import ArgumentLayout
from thg_engine.integrations.diffusers.layouts import LAYOUTS
from thg_engine.integrations.diffusers.outputs import may_wait, sample_of, with_sample
from thg_engine.integrations.diffusers.slicing import (
    CannotSlice,
    is_doubled,
    is_extra,
    slice_half,
)

PLAIN = ArgumentLayout("x", ())
PAIR = ArgumentLayout("x", (), outputs=2)


def rows(count: int, *shape: int) -> torch.Tensor:
    return torch.arange(count).float().reshape(-1, *([1] * len(shape))).expand(count, *shape)


@pytest.mark.parametrize("half", [0, 1])
def test_lists_are_halved_by_items(half: int) -> None:
    layout = LAYOUTS["ZImageTransformer2DModel"]
    images = [rows(1, 2, 2)[0] for _ in range(4)]
    named = {"x": images, "t": rows(4), "cap_feats": [rows(1, k)[0] for k in (1, 2, 3, 4)]}
    made = slice_half(named, layout, half)
    assert len(made["x"]) == 2 and made["t"].tolist() == [2.0 * half, 2.0 * half + 1]
    assert [len(text) for text in made["cap_feats"]] == [2 * half + 1, 2 * half + 2]
    with pytest.raises(CannotSlice, match="cap_feats has 3 items, its batch is not 4"):
        slice_half({**named, "cap_feats": named["cap_feats"][:3]}, layout, half)


def test_the_batch_may_be_in_the_second_dimension() -> None:
    layout = LAYOUTS["HiDreamImageTransformer2DModel"]
    named = {"hidden_states": rows(2, 3), "encoder_hidden_states_llama3": torch.zeros(5, 2, 3)}
    assert slice_half(named, layout, 1)["encoder_hidden_states_llama3"].shape == (5, 1, 3)


def test_a_batch_of_two_samples_is_no_pair() -> None:
    layout = LAYOUTS["AceStepTransformer1DModel"]
    two = {"hidden_states": rows(2, 3)}
    assert not is_doubled(two, layout) and not is_doubled({"hidden_states": rows(3, 3)}, layout)
    assert is_doubled({"hidden_states": torch.ones(2, 3)}, layout)
    assert is_doubled({"x": rows(2, 3)}, PLAIN), "where it is not asked"
    with pytest.raises(CannotSlice, match="not the same sample twice"):
        slice_half(two, layout, 0)


def test_calls_of_another_guidance_are_known_by_their_arguments() -> None:
    layout = LAYOUTS["LTX2VideoTransformer3DModel"]
    usual = {"isolate_modalities": False, "spatio_temporal_guidance_blocks": None}
    assert not is_extra(usual, layout) and not is_extra({}, layout)
    assert is_extra({**usual, "isolate_modalities": True}, layout)
    assert is_extra({**usual, "spatio_temporal_guidance_blocks": [1]}, layout)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "class"])
def test_one_tensor_in_any_wrapping(kind: str) -> None:
    value, other = rows(2, 3), rows(4, 3)
    wrap = {
        "tensor": lambda tensor: tensor,
        "tuple": lambda tensor: (tensor, "rest"),
        "class": lambda tensor: Transformer2DModelOutput(sample=tensor),
    }[kind]
    output = wrap(value)
    assert sample_of(output, PLAIN) is value and may_wait(output, PLAIN)
    made = with_sample(output, other, PLAIN)
    assert type(made) is type(output) and sample_of(made, PLAIN) is other
    if kind == "tuple":
        assert made[1] == "rest"


def test_a_list_is_stacked_and_made_a_list_again() -> None:
    output = ([torch.ones(3), torch.zeros(3)],)
    assert torch.equal(sample_of(output, PLAIN), torch.stack(output[0]))
    assert not may_wait(output, PLAIN)
    (made,) = with_sample(output, rows(4, 3), PLAIN)
    assert isinstance(made, list) and len(made) == 4 and torch.equal(made[3], rows(4, 3)[3])


def test_two_outputs_are_one_sample() -> None:
    """Of half the batch, put back as the whole of it."""
    picture, sound = torch.rand(1, 2, 3), torch.rand(1, 5)
    output = (picture, sound, "rest")
    joined = sample_of(output, PAIR)
    assert joined.shape == (1, 11) and not may_wait(output, PAIR)
    made = with_sample(output, torch.cat([joined, 2 * joined]), PAIR)
    assert torch.equal(made[0], torch.cat([picture, 2 * picture]))
    assert torch.equal(made[1], torch.cat([sound, 2 * sound])) and made[2] == "rest"
