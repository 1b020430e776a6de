"""LoRAs and `thg_engine.compile`: turned, loaded and unloaded at any time, by hand and exact."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import thg_engine
from composition_cases import HELD, close
from pipelines import CountRows, pattern, reference, tiny
from pipelines import call as call_sd
from thg_engine import CFG

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)


def add_lora(pipe, name: str, seed: int) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    parts = ["to_q", "to_v", "to_out.0"]
    config = LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=parts)
    pipe.unet.add_adapter(config, adapter_name=name)


def saved_lora(folder, seed: int) -> str:
    """The folder of a LoRA as `load_lora_weights` takes it."""
    from peft import get_peft_model_state_dict

    pipe = tiny()
    add_lora(pipe, "one", seed)
    weights = get_peft_model_state_dict(pipe.unet, adapter_name="one")
    pipe.save_lora_weights(folder, unet_lora_layers=weights)
    return str(folder)


def as_by_hand(pipe, monkeypatch) -> torch.Tensor:
    """What the compiled pipeline gives now: checked against the stock one and the loop."""
    found, plan = call_sd(pipe), pipe.thg.plan
    assert pipe.thg.stats()["last_nfe"] == plan.nfe == 12
    monkeypatch.setenv("THG_DISABLE", "1")
    stock = call_sd(pipe)
    monkeypatch.delenv("THG_DISABLE")
    thg_engine.compile(pipe, CFG())
    assert torch.equal(call_sd(pipe), stock)
    expected, _ = reference(thg_engine.uncompile(pipe), pattern(plan))
    thg_engine.compile(pipe, HELD)
    assert close(found, expected)
    return found


@needs_peft
def test_loras_between_calls(monkeypatch, tmp_path) -> None:
    one, two = saved_lora(tmp_path / "one", 1), saved_lora(tmp_path / "two", 2)
    pipe = thg_engine.compile(tiny(), HELD)
    plain = as_by_hand(pipe, monkeypatch)
    pipe.load_lora_weights(one, adapter_name="one")
    loaded = as_by_hand(pipe, monkeypatch)
    pipe.set_adapters(["one"], [0.3])
    scaled = as_by_hand(pipe, monkeypatch)
    pipe.fuse_lora()
    assert close(as_by_hand(pipe, monkeypatch), scaled, 1e-3)
    pipe.unfuse_lora()
    assert close(as_by_hand(pipe, monkeypatch), scaled, 1e-3)
    pipe.set_adapters(["one"], [1.0])
    pipe.load_lora_weights(two, adapter_name="one", hotswap=True)
    swapped = as_by_hand(pipe, monkeypatch)
    pipe.unload_lora_weights()
    assert close(as_by_hand(pipe, monkeypatch), plain, 1e-3)
    stages = [plain, loaded, scaled, swapped]
    for i, stage in enumerate(stages):
        assert not any(close(stage, other, 0.05) for other in stages[:i])
    fresh = tiny()
    fresh.load_lora_weights(two, adapter_name="one")
    assert close(call_sd(thg_engine.compile(fresh, HELD)), swapped, 1e-3)


@needs_peft
def test_a_lora_loaded_before_compile_leaves_with_the_hook_on(monkeypatch) -> None:
    pipe = tiny()
    stock = call_sd(pipe)
    add_lora(pipe, "one", 1)
    thg_engine.compile(pipe, HELD)
    as_by_hand(pipe, monkeypatch)
    pipe.delete_adapters("one")
    pipe.unload_lora_weights()
    assert torch.equal(call_sd(thg_engine.compile(pipe, CFG())), stock)
    assert torch.equal(call_sd(thg_engine.uncompile(pipe)), stock)


@needs_peft
@pytest.mark.parametrize("what", ["scale", "other", "none", "swap"])
def test_a_lora_turned_in_the_middle_refreshes_delta(what: str, tmp_path) -> None:
    pipe = tiny()
    first, second = (saved_lora(tmp_path / str(k), k) for k in (1, 2))
    add_lora(pipe, "one", 1)
    add_lora(pipe, "two", 2)

    def turn(i: int) -> bool:
        if i != 2:
            return False
        if what == "none":
            pipe.disable_lora()
        elif what == "swap":
            pipe.load_lora_weights(second, adapter_name="one", hotswap=True)
        else:
            pipe.set_adapters(["one" if what == "scale" else "two"], [0.3])
        return True

    def start() -> None:
        pipe.enable_lora()
        pipe.set_adapters(["one"], [1.0])
        if what == "swap":
            pipe.load_lora_weights(first, adapter_name="one", hotswap=True)

    def callback(pipe, i, t, tensors):
        turn(i)
        return tensors

    start()
    thg_engine.compile(pipe, HELD)
    with CountRows(pipe.unet) as count:
        found = call_sd(pipe, callback_on_step_end=callback)
    plan = pipe.thg.plan
    assert pipe.thg.stats()["refreshes"] == 1 and count.total == plan.nfe + 1
    thg_engine.uncompile(pipe)
    start()
    expected, rows = reference(pipe, pattern(plan), edit=lambda i, x, e: (x, e, turn(i)))
    assert rows == count.total and close(found, expected)
