"""Two ranks of torchrun train what one does: the same curve, states that each other reads, an end that is agreed on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.trainer.runs import CASES, STEPS, Case, curve
from tests.trainer.small_networks import KINDS, network, state_of, train
from trainer.batches import rng_of
from trainer.dataset import Prepared
from trainer.distributed import ALONE, open_ranks
from trainer.fit import Schedule, Trainer, open_run
from trainer.loader import share_of
from trainer.optimizers import optimizer_of
from trainer.presets import Preset, preset
from trainer.sources import NeighborSource
from trainer.state import new_state
from trainer.state_file import read_tensors

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NAMES = [case.name for case in CASES]


def alone(case: Case, prepared: Prepared, folder: Path) -> Trainer:
    return open_run(case.row, NeighborSource(prepared=prepared, preset=case.row), folder, CPU)[0]


@pytest.fixture(scope="module")
def of_one(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """Each case on one rank: its last state and its curve, twice as long as that of two."""
    found = {}
    for case in CASES:
        trainer = alone(case, prepared, tmp_path_factory.mktemp("one"))
        seen = curve(trainer, STEPS, case)
        found[case.name] = trainer.save(), seen + (curve(trainer, STEPS, case) if case.name == "ddp" else [])
    return found


@pytest.fixture(scope="module")
def of_two(
    of_one: dict[str, tuple[Path, list[Any]]], prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """All cases on two ranks: their folders, and what each rank saw."""
    out = tmp_path_factory.mktemp("two")
    for name in ("resumed", "damaged"):
        (out / name).mkdir()
        shutil.copy(of_one["ddp"][0], out / name)
    whole = (out / "damaged" / of_one["ddp"][0].name).read_bytes()
    (out / "damaged" / "state-00000099.safetensors").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.trainer.several_ranks", str(prepared_folder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'build/stubs'}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_have_the_curve_of_one(name: str, of_one: Any, of_two: Any) -> None:
    """Loss and gradient norm of each step, and the weights and averages that come of them."""
    out, ranks = of_two
    path, expected = of_one[name]
    for rank in ranks:
        for seen, wanted in zip(rank[name]["curve"], expected, strict=False):
            assert seen == pytest.approx(wanted, rel=1e-4, nan_ok=True)
        assert len(rank[name]["curve"]) == STEPS
    mine, theirs = read_tensors(path)[0], read_tensors(out / name / path.name)[0]
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    fresh = new_state(next(c.row for c in CASES if c.name == name), CPU).unet.state_dict()
    # As a whole: where a gradient is nearly zero, Adam makes whole steps of its rounding.
    for part in {n.split("/")[0] for n in mine} - {"optimizer"}:
        moved = torch.cat([(mine[f"{part}/{n}"] - fresh[n]).flatten() for n in fresh]).norm()
        apart = torch.cat([(mine[f"{part}/{n}"] - theirs[f"{part}/{n}"]).flatten() for n in fresh]).norm()
        assert moved > 0.1 and apart < 0.02 * moved, (part, float(moved), float(apart))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(of_two: Any) -> None:
    _, ranks = of_two
    for case in CASES:
        for rank in ranks:
            skipped = [bool(step[2]) for step in rank[case.name]["curve"]]
            assert skipped == [step + 1 == case.spoilt for step in range(STEPS)], case.name


def test_two_ranks_go_on_from_the_state_of_one(of_one: Any, of_two: Any) -> None:
    """A state that one process wrote, read into slices."""
    _, ranks = of_two
    for rank in ranks:
        assert rank["resumed"]["begun"] == STEPS
        for seen, wanted in zip(rank["resumed"]["curve"], of_one["ddp"][1][STEPS:], strict=True):
            assert seen == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_rank_goes_on_from_the_state_of_two(name: str, of_one: Any, of_two: Any, prepared: Prepared) -> None:
    case = next(c for c in CASES if c.name == name)
    trainer = alone(case, prepared, of_two[0] / name)
    assert trainer.state.step == STEPS
    for seen, wanted in zip(curve(trainer, STEPS, case), of_one["ddp"][1][STEPS:], strict=True):
        assert seen == pytest.approx(wanted, rel=1e-4)


def test_all_ranks_fall_back_to_the_same_state(of_two: Any) -> None:
    _, ranks = of_two
    assert [rank["fallen back"]["begun"] for rank in ranks] == [STEPS, STEPS]
    assert [rank["fallen back"]["skipped"] for rank in ranks] == [1, 0], "the first rank says it, once"


def test_what_fails_on_the_first_rank_ends_all(of_two: Any) -> None:
    _, (first, second) = of_two
    assert first["full disk"] == f"error {errno.ENOSPC}"
    assert second["full disk"] == "exit 4"
    assert (first["bad input"], second["bad input"]) == ("ValueError", "exit 2")
    assert (first["fault"], second["fault"]) == ("ZeroDivisionError", "exit 1"), "a fault may not happen again"
    assert first["told"] == second["told"] == "früh"


@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_ranks_step_as_one_does(kind: str, of_two: Any) -> None:
    """Also a kernel whose outputs they share unevenly; the state that they write together is the state of one."""
    two = load((of_two[0] / "optimizers.safetensors").read_bytes())
    model = network()
    optimizer = optimizer_of(model, replace(preset("tiny-64"), optimizer=kind))  # type: ignore[arg-type]
    train(model, optimizer, range(4))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(two[f"{kind}/{name}"], tensor, rtol=1e-4, atol=1e-5)
    for name, tensor in state_of(model, optimizer).items():
        torch.testing.assert_close(two[f"{kind}/state/{name}"], tensor, rtol=1e-4, atol=1e-6)


def test_a_batch_is_cut_into_its_parts(prepared: Prepared, tiny: Preset) -> None:
    """Every example once, with its own neighbors."""
    batch = NeighborSource(prepared=prepared, preset=replace(tiny, groups=5)).batch(rng_of(0, 0), 16)
    parts = [share_of(batch, i, 3) for i in range(3)]
    assert [len(p.neighbors) for p in parts] == [1, 2, 2]
    for name in ("x0", "eps", "t", "text", "text_mask", "keep_text", "keep_neighbors", "placement"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name)), name
    mine = torch.cat([p.neighbors[p.group] for p in parts])
    assert torch.equal(mine, batch.neighbors[batch.group])
    with pytest.raises(ValueError, match="5 neighbor sets cannot be cut into 6 parts"):
        share_of(batch, 0, 6)


def test_a_batch_smaller_than_its_parts_is_refused_before_the_first_step(
    prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    row = replace(tiny, groups=2, accumulation=1)
    trainer = alone(Case(name="", parallel="", row=row), prepared, tmp_path)
    trainer.state.ranks = replace(ALONE, world=4)
    with pytest.raises(ValueError, match="2 neighbor sets a step are fewer than 4 ranks x 1 parts"):
        trainer.run(Schedule(), lambda examples, figures: None, lambda trainer: None)


@pytest.mark.parametrize(
    ("wanted", "environment", "said"),
    [
        ("ddp", {}, "needs torchrun"),
        ("fsdp2", {}, "needs torchrun"),
        ("none", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "torchrun started 2"),
        ("tp", {}, "'tp' is not one of"),
    ],
)
def test_parallel_that_does_not_go_with_its_start_is_named(wanted: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said), open_ranks(wanted, environment):
        pass
