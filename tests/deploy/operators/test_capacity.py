"""The capacity model against closed forms, and its command against what it must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.operators.__main__ import CURVE, main
from deploy.operators.capacity import Curve, latencies, mean_of_symmetric_queue, outcome, plan, read_curve

PICTURES = 100_000


def test_one_slot_is_m_d_1() -> None:
    """Mean wait rho / (2 mu (1 - rho)) by Pollaczek and Khinchine, and a picture's own time."""
    mu, arrivals = 2.0, 1.4
    rho = arrivals / mu
    wanted = rho / (2 * mu * (1 - rho)) + 1 / mu
    assert latencies(Curve(pictures_per_s=(mu,)), arrivals, pictures=PICTURES).mean() == pytest.approx(wanted, rel=0.02)


def test_enough_slots_without_a_gain_is_processor_sharing() -> None:
    """Mean 1 / (mu - arrivals), whatever the distribution of work."""
    curve = Curve(pictures_per_s=(2.0,) * 200)
    assert latencies(curve, 1.4, pictures=PICTURES).mean() == pytest.approx(1 / (2.0 - 1.4), rel=0.03)
    assert mean_of_symmetric_queue(curve, 1.4) == pytest.approx(1 / (2.0 - 1.4), rel=1e-6)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_the_measured_curve_with_enough_slots_has_the_product_form(load: float) -> None:
    curve = read_curve(CURVE, "triton", slots=200)
    arrivals = load * curve.peak
    simulated = latencies(curve, arrivals, pictures=PICTURES).mean()
    assert simulated == pytest.approx(mean_of_symmetric_queue(curve, arrivals), rel=0.04)


def test_an_empty_replica_takes_as_long_as_one_picture() -> None:
    curve = read_curve(CURVE, "triton", slots=8)
    took = latencies(curve, 1e-4, pictures=1000)
    np.testing.assert_allclose(np.median(took), 1 / curve.pictures_per_s[0], rtol=1e-6)


def test_a_plan_is_the_fewest_replicas_that_do() -> None:
    curve = read_curve(CURVE, "triton", slots=8)
    tried = plan(curve, 40.0, 1.2, share=0.99)
    assert tried[-1].in_time >= 0.99 > outcome(curve, 40.0, 1.2, tried[-1].replicas - 1).in_time
    assert tried[-1].replicas > plan(curve, 40.0, 5.0, share=0.99)[-1].replicas, "a longer deadline needs fewer"
    assert outcome(curve, 40.0, 5.0, 1).in_time == 0.0, "more than it can do"


def test_the_curve_is_the_measured_one_and_a_line_between() -> None:
    curve = read_curve(CURVE, "triton", slots=20, scale=0.5)
    measured = json.loads(CURVE.read_text())["triton"]["callers"]
    for n in (1, 2, 4, 8, 16):
        assert curve.pictures_per_s[n - 1] == pytest.approx(measured[str(n)]["pictures_per_s"] / 2)
    between = (measured["2"]["pictures_per_s"] + measured["4"]["pictures_per_s"]) / 4
    assert curve.pictures_per_s[2] == pytest.approx(between)
    assert curve.peak == curve.pictures_per_s[15]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--arrivals=0", "--deadline=5"], "arrivals"),
        (["--arrivals=nan", "--deadline=5"], "arrivals"),
        (["--arrivals=3", "--deadline=0.01"], "a picture alone takes"),
        (["--arrivals=3", "--deadline=5", "--share=1"], "share"),
        (["--arrivals=3", "--deadline=5", "--slots=0"], "slots"),
        (["--arrivals=3", "--deadline=5", "--curve=README.md"], "README.md"),
        (["--arrivals=3", "--deadline=5", "--curve=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_named(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", *flags]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


def test_a_result_without_a_curve_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("{}")
    assert main(["capacity", "--arrivals=3", "--deadline=5", f"--curve={tmp_path}/empty.json"]) == 2
    assert "triton" in capsys.readouterr().err
