"""The whole stack under callers of every kind while its processes are killed: nothing is lost, hangs, grows or stays.

Half a minute of it is part of the suite. `make soak SOAK_SECONDS=600 SOAK_SEED=1` runs longer, with every kind of fault
in every stage as far as time allows, and then measures memory and the times of health.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.deploy.test_local_up import free_ports
from tests.generator_svc.tiny_stack import write_knowledge_base, write_weights
from tests.soak.faults import Fault
from tests.soak.soak import SoakSettings, drain, soak
from tests.soak.stack import SoakStack, running_stack, wait_until

SECONDS = float(os.environ.get("REIMAGEN_SOAK_SECONDS", "0"))
SEED = int(os.environ.get("REIMAGEN_SOAK_SEED", "1"))
IS_SHORT = SECONDS < 60
# The product's bounds are 5 and 10 s; a machine that does other things at once takes its time.
NOTICED_S, RECOVERED_S = (15.0, 30.0) if IS_SHORT else (5.0, 10.0)
WARM_UP_S = 125.0  # what is kept for those who ask again is kept for 120 s
MEASURED_FROM_S = 500.0  # of a shorter soak, memory is told only
MAX_GROWTH = 0.1  # of itself, over the time in which memory is measured: a quarter of the soak and more
STRAYS_S = 10.0
LEAST_CALM_S = 15.0  # in which a shorter soak looks at memory, however late its last fault was mended


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoakStack]:
    weights = write_weights(tmp_path_factory.mktemp("weights"))
    work = write_knowledge_base(tmp_path_factory.mktemp("work"))
    with running_stack(weights, work, tmp_path_factory.mktemp("soak") / "state", free_ports()) as running:
        yield running
    wait_until(lambda: not running.strays(), STRAYS_S, f"processes that stay: {running.strays()}")
    assert not running.leftovers(), "shared memory stays"


def settings() -> SoakSettings:
    if IS_SHORT:
        faults = (Fault(kind="stub", size=64), Fault(kind="retrieval", size=256))
        return SoakSettings(seed=SEED, seconds=20, faulty_s=0, num_callers=3, faults=faults)
    calm_s = 20.0 if SECONDS < MEASURED_FROM_S else SECONDS / 2
    return SoakSettings(
        seed=SEED,
        seconds=SECONDS,
        faulty_s=SECONDS - calm_s,
        warm_up_s=0 if SECONDS < MEASURED_FROM_S else WARM_UP_S,
        calm_s=LEAST_CALM_S,
        num_callers=6,
    )


def test_soak(stack: SoakStack) -> None:
    report = soak(stack, settings())
    print(f"\n{report}")
    assert not report.unexplained()
    assert not report.hanging
    assert not report.live, "requests live on in a stage"
    assert not report.leftovers, "shared memory of a killed server stays"
    for struck in report.struck:
        assert struck.noticed_s <= NOTICED_S and struck.recovered_s <= RECOVERED_S, struck
    if not IS_SHORT:
        assert {growth.name for growth in report.growths} >= {"generator", "retrieval", "tritonserver", "unet_64"}
    if SECONDS >= MEASURED_FROM_S:
        assert not [growth for growth in report.growths if growth.share > MAX_GROWTH]


def test_a_generator_that_is_asked_to_end_finishes_what_it_has_accepted(stack: SoakStack) -> None:
    outcomes = drain(stack, num_calls=6)
    assert len(outcomes) == 6
    assert [(outcome.code, outcome.reason) for outcome in outcomes] == [("OK", "")] * 6
