"""Code that the documentation shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import thg_engine

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(name: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text("utf-8"), re.M | re.S)


def test_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample, a loop and a server: one after the other, as a reader would type them."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    first, loop, server = blocks("embedding.md")
    for code in (first, loop):
        exec(compile(code, "docs/embedding.md", "exec"), namespace)
    assert "replays" in capsys.readouterr().out
    assert torch.isfinite(namespace["x_0"]).all() and namespace["preview"].shape == (2, 4, 16, 16)
    exec(compile(server, "docs/embedding.md", "exec"), namespace)
    images = namespace["images"]
    assert len(images) == 4 and all(torch.isfinite(image).all() for image in images)
    assert not torch.equal(images[0], images[1])
    again = namespace["engine"].sample(
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)),
        namespace["cond"], namespace["uncond"], namespace["plan"],
    )  # fmt: skip
    assert torch.equal(images[3], again)


def test_guiders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks("guiders.md"):
        exec(compile(code, "docs/guiders.md", "exec"), namespace)
    guider = namespace["guider"]
    assert guider.nfe == guider.plan.nfe == 30 and torch.isfinite(namespace["sample"]).all()
    assert guider.plan.solver == "FlowMatchEulerDiscreteScheduler"
    assert type(guider).from_pretrained("guider").guidance == guider.guidance


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    """The worked example, and that its network ran as often as it says."""
    namespace: dict[str, object] = {"__name__": "example"}
    for code in blocks("adapters.md"):
        exec(compile(code, "docs/adapters.md", "exec"), namespace)
    assert "NFE 28 of 40" in capsys.readouterr().out
    assert not torch.equal(namespace["fast"], namespace["plain"])
    thg_engine.adapters.unregister(namespace["MyPipeline"])
    with pytest.warns(UserWarning, match="MyPipeline"):
        thg_engine.compile(namespace["pipe"])
