"""Calibration files: exact round trip, interpolation, and every way to be damaged."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curves_fixture import calibration, random_calibration
from thg_engine.curves import FORMAT, VERSION, Calibration
from thg_engine.errors import CalibrationError, InvalidArgument


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_is_exact(tmp_path, seed):
    curves = random_calibration(seed, points=1 + 7 * seed)
    path = tmp_path / "curves.json"
    curves.save(path)
    assert Calibration.load(path) == curves
    assert Calibration.load(str(path)) == curves
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == (FORMAT, VERSION)
    assert document["lambdas"] == list(curves.lambdas)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=9), st.floats(-19, 19))
def test_any_curve_survives_json(tmp_path_factory, errors, first):
    path = tmp_path_factory.getbasetemp() / "any.json"
    lambdas = [first + i * math.pi for i in range(len(errors))]
    curves = calibration(lambdas, errors, errors[::-1])
    curves.save(path)
    assert Calibration.load(path) == curves


def test_ratio_is_log_linear_and_constant_beyond():
    curves = calibration([-2.0, 0.0, 3.0], [1.0, 8.0, 8.0], [1.0, 2.0, 0.5])
    w = 5.0
    expected = {
        -math.inf: 1.0,
        -7.0: 1.0,
        -2.0: 1.0,
        -1.0: 2.0,  # geometric mean of 1 and 4
        0.0: 4.0,
        1.0: 4.0 * 4.0 ** (1 / 3),
        3.0: 16.0,
        9.0: 16.0,
        math.inf: 16.0,
    }
    found = curves.ratio(list(expected), w)
    assert found == pytest.approx([value / (w - 1) for value in expected.values()], rel=1e-14)
    assert curves.ratio([0.0], 1.5)[0] == pytest.approx(8.0, rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(1.01, 50))
def test_ratio_against_pointwise_interpolation(seed, w):
    curves = random_calibration(seed)
    rng = np.random.default_rng(seed)
    for x in rng.uniform(-5, 5, 4):
        points = list(zip(curves.lambdas, curves.tortoise, curves.hare, strict=True))
        if x <= points[0][0]:
            value = points[0][1] / points[0][2]
        elif x >= points[-1][0]:
            value = points[-1][1] / points[-1][2]
        else:
            (a, ta, ha), (b, tb, hb) = next(
                (p, q) for p, q in pairwise(points) if p[0] <= x <= q[0]
            )
            share = (x - a) / (b - a)
            value = (ta / ha) ** (1 - share) * (tb / hb) ** share
        assert curves.ratio([x], w)[0] == pytest.approx(value / (w - 1), rel=1e-10)


@pytest.mark.parametrize("w", [1.0, 0.5, -3.0, math.nan, math.inf])
def test_no_ratio_without_a_hare(w):
    with pytest.raises(InvalidArgument, match="guidance_scale="):
        random_calibration(0).ratio([0.0], w)


def damaged(**changes):
    document = {"format": FORMAT, "version": VERSION}
    curves = random_calibration(3, points=4)
    document |= {field.name: getattr(curves, field.name) for field in fields(curves)}
    document |= changes
    return {key: value for key, value in document.items() if value is not ...}


CURVE = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "changes",
    [
        *({field.name: ...} for field in fields(Calibration)),
        {"format": ...},
        {"format": "thg-engine-plan"},
        {"version": ...},
        {"version": VERSION + 1},
        {"version": "1"},
        *({name: [1.0, 2.0, math.nan, 4.0]} for name in ("lambdas", "tortoise", "hare")),
        *({name: [1.0, 2.0, 3.0, math.inf]} for name in ("lambdas", "tortoise", "hare")),
        *({name: []} for name in ("lambdas", "tortoise", "hare")),
        *({name: CURVE[:3]} for name in ("lambdas", "tortoise", "hare")),
        *({name: "abcd"} for name in ("lambdas", "tortoise", "hare")),
        *({name: None} for name in ("lambdas", "tortoise", "hare")),
        *({name: ["1", "2", "3", "4"]} for name in ("lambdas", "tortoise", "hare")),
        {"lambdas": [1.0, 2.0, 2.0, 4.0]},
        {"lambdas": [4.0, 3.0, 2.0, 1.0]},
        {"lambdas": [], "tortoise": [], "hare": []},
        {"tortoise": [1.0, 0.0, 1.0, 1.0]},
        {"hare": [1.0, -1.0, 1.0, 1.0]},
        {"order": 0},
        {"order": 1.5},
        {"order": "1"},
        {"order": True},
        {"guidance_scale": "7.5"},
        {"num_prompts": None},
        {"fingerprint": 12},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_damaged_files_are_refused(tmp_path, changes):
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(damaged(**changes)))
    with pytest.raises(CalibrationError, match=r"damaged\.json"):
        Calibration.load(path)


def test_undamaged_document_loads(tmp_path):
    path = tmp_path / "good.json"
    path.write_text(json.dumps(damaged()))
    assert Calibration.load(path) == random_calibration(3, points=4)


@pytest.mark.parametrize("content", [b"", b"not json", b"{", b"[]", b"3", b"null", b"\xff\xfe\x00"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"other\.json"):
        Calibration.load(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(CalibrationError, match="cannot read calibration"):
            Calibration.load(path)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        random_calibration(0).order = 2
