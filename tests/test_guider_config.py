"""`TortoiseHareGuidance` in files: every method goes into its configuration and comes back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import ClassifierFreeGuidance

from test_guider import CURVES, N, drive, outputs
from thg_engine import CFG, THG, CFGCache, TortoiseHareGuidance
from thg_engine.errors import InvalidArgument
from thg_engine.grid import MappedGrid
from thg_engine.lowering import plan_from_timesteps

METHODS = [
    "auto",
    "thg",
    THG(grid=(0, 3, 5), boost=1.1, cutoff=0.9),
    THG(calibration=CURVES, rho=1.2),
    THG(grid=MappedGrid((0, 2), (-3.0, -1.0, 1.0), 2)),
    CFGCache(interval=3),
    plan_from_timesteps(range(N), [float(i) for i in range(N)], THG(grid=2), 7.5, "x"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "name", type(m).__name__))
def test_configuration_goes_to_a_file_and_back(method, tmp_path) -> None:
    guider = TortoiseHareGuidance(6.0, guidance_rescale=0.2, start=0.1, guidance=method)
    if hasattr(method, "rows") and not hasattr(method, "name"):
        guider = guider.new(start=0.0)  # a plan is for its number of steps
    guider.save_pretrained(tmp_path)
    loaded = TortoiseHareGuidance.from_pretrained(tmp_path)
    assert loaded.guidance == guider.guidance == guider.new().guidance
    assert loaded.guidance_scale == 6.0 and loaded._start == guider._start
    assert loaded.new(guidance_scale=2.0, guidance="cfg").guidance == CFG()
    stock = ClassifierFreeGuidance.from_config(guider.config)
    assert drive(loaded, outputs())[1] == drive(guider, outputs())[1]
    assert stock.guidance_rescale == 0.2


def test_methods_of_ones_own_stay_objects() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(THG):
        name: str = "mine"

    guider = TortoiseHareGuidance(guidance=Mine(grid=5))
    assert guider.new(guidance_scale=2.0).guidance == Mine(grid=5)
    with pytest.raises(InvalidArgument, match=r"guidance=.*Mine.*give the method itself"):
        TortoiseHareGuidance.from_config(guider.config)


def test_a_plan_of_another_length_is_refused_before_the_model_runs() -> None:
    guider = TortoiseHareGuidance(guidance=METHODS[-1])
    drive(guider, outputs())
    with pytest.raises(InvalidArgument, match="this run makes 4 model calls"):
        guider.set_state(0, 4, torch.tensor(9.0))
    assert guider.num_conditions == 2 and guider.plan is None
