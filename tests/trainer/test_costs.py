"""What a step is said to take is what a real one takes: FLOP by torch's counter, memory by torch's allocator."""

from __future__ import annotations

import gc
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.stages import stage
from common.text import MAX_TOKENS
from trainer.batches import Batch, rng_of
from trainer.costs import Ledger, blank_batch, reckon
from trainer.dataset import Prepared
from trainer.dry_run import SEVERAL, dry_run
from trainer.fit import Trainer
from trainer.presets import PRESETS, Preset, preset
from trainer.sources import NeighborSource, Source
from trainer.state import new_state, uses_bfloat16

CPU = torch.device("cpu")
VARIANTS = [
    pytest.param("tiny-64", {}, id="tiny-64"),
    pytest.param("tiny-64", {"optimizer": "adafactor", "accumulation": 2}, id="tiny-64-adafactor-accumulation"),
    pytest.param("tiny-64", {"activation_checkpointing": True}, id="tiny-64-checkpointing"),
    pytest.param("tiny-256", {}, id="tiny-256"),
    pytest.param("tiny-256-neighbors", {}, id="tiny-256-neighbors"),
    pytest.param("demo-64", {"groups": 2, "draws": 2}, id="demo-64"),
    pytest.param("demo-64", {"groups": 2, "draws": 2, "precision": "bfloat16"}, id="demo-64-bfloat16"),
    pytest.param("demo-64", {"groups": 2, "accumulation": 2}, id="demo-64-accumulation"),
    pytest.param("demo-64", {"groups": 2, "activation_checkpointing": True}, id="demo-64-checkpointing"),
    pytest.param("demo-256", {"groups": 4}, id="demo-256"),
]


def counted() -> FlopCounterMode:
    """torch's counter, told of attention as processors compute it."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
            ),
        },
    )


class Nowhere:
    """A source that is not asked."""

    def batch(self, rng: np.random.Generator, side: int) -> Batch:
        raise AssertionError

    held_out_batch = batch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels of several threads need memory for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_of(row: Preset, folder: Path, source: Source | None = None) -> Trainer:
    spec, state = stage(row.stage), new_state(row, CPU)
    return Trainer(preset=row, spec=spec, source=source or Nowhere(), folder=folder, device=CPU, state=state)


def row_of(name: str, change: dict[str, Any]) -> tuple[Preset, int]:
    """A variant of a preset, and the side at which it is measured: large enough that shapes matter, small enough to run."""
    return replace(preset(name), **change), 32 if name == "demo-64" else preset(name).curriculum[-1][1]


def stepping_peak(trainer: Trainer, row: Preset, side: int) -> int:
    """Bytes at the worst moment of a real step beside what was there before it, as torch's allocator tells them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.learn(blank_batch(row, row.groups, side, MAX_TOKENS))
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


@pytest.mark.parametrize(("name", "change"), VARIANTS)
def test_memory_and_flop_are_those_of_a_real_step(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    row, side = row_of(name, change)
    told = reckon(row, bfloat16=uses_bfloat16(row, CPU), side=side)
    trainer = trainer_of(row, tmp_path)
    with counted() as counter:
        trainer.learn(blank_batch(row, row.groups, side, MAX_TOKENS))
    assert told.step_flop * row.batch == pytest.approx(counter.get_total_flops(), rel=0.01)
    state = trainer.state
    assert told.parameters == sum(p.numel() for p in state.unet.parameters())
    assert told.weights == told.gradients == sum(p.nbytes for p in state.unet.parameters())
    assert told.averages == sum(t.nbytes for average in state.averages.values() for t in average.values())
    assert told.optimizer == sum(t.nbytes for kept in state.optimizer.state.values() for t in kept.values())
    gc.collect()
    lasting = told.weights + told.optimizer + told.averages
    assert told.peak - lasting == pytest.approx(stepping_peak(trainer, row, side), rel=0.1)


@pytest.mark.parametrize(("name", "change"), [v for v in VARIANTS if "accumulation" not in str(v.id)])
def test_activations_are_what_a_real_forward_pass_leaves(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Storages that autograd has saved, beside the weights, and the batch's own."""
    row, side = row_of(name, change)
    told = reckon(row, bfloat16=uses_bfloat16(row, CPU), side=side)
    state = trainer_of(row, tmp_path).state
    weights = {p.untyped_storage().data_ptr() for p in state.unet.parameters()}
    saved: dict[int, int] = {}
    held: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # else its address could be given to another
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = blank_batch(row, row.groups, side, MAX_TOKENS)
    for tensor in vars(batch).values():
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16(row, CPU)),
    ):
        loss = state.objective(batch)
    assert told.activations + told.casts == pytest.approx(sum(saved.values()), rel=0.1)
    assert loss.isfinite()


def test_flop_of_drawn_batches(prepared: Prepared, tmp_path: Path) -> None:
    """Not only of blank ones: forward and backward of a batch of pictures, texts and neighbors."""
    row = preset("tiny-64")
    source = NeighborSource(prepared=prepared, preset=row)
    batch = source.batch(rng_of(0, 0), 32)
    told = reckon(row, bfloat16=False, tokens=batch.text.shape[1])
    state = trainer_of(row, tmp_path, source).state
    with counted() as counter:
        loss = state.objective(batch)
        assert told.forward_flop * row.batch == pytest.approx(counter.get_total_flops(), rel=0.1)
        loss.backward()
    assert told.step_flop * row.batch == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_as_its_matrix_products(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 17, 17))
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool) if masked else None
    product = 2 * (2 * 3 * 10 * 17 * 8)
    with Ledger([]) as fused:
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert fused.flop == 2 * product
        read.sum().backward()
    assert fused.flop == (2 + 5) * product, "the weights are computed again"
    with counted() as plain, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert plain.get_total_flops() == 2 * product


def test_the_papers_base_is_reckoned_without_its_memory() -> None:
    """2.5 B parameters over eight ranks: every part is shared by FSDP2, none by DDP; nothing of it is allocated."""
    row = preset("paper-64")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ddp, sharded = (reckon(row, bfloat16=True, ranks=8, parallel=p) for p in ("ddp", "fsdp2"))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ddp.weights / 8
    assert ddp.weights == ddp.gradients == ddp.averages == 4 * ddp.parameters
    assert ddp.optimizer < 0.01 * ddp.weights, "Adafactor"
    assert ddp.casts == pytest.approx(2 * ddp.parameters, rel=0.02)
    assert sharded.weights == sharded.gradients == -(-ddp.weights // 8)
    assert sharded.activations == ddp.activations and sharded.peak < 0.5 * ddp.peak < 0.5 * 80 * 2**30
    assert ddp.examples == 8


def test_more_ranks_than_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="--ranks: 5 ranks in 1 parts each cannot share 4 sets"):
        reckon(preset("tiny-64"), bfloat16=False, ranks=5)


def test_a_dry_run_shows_each_part() -> None:
    row = preset("tiny-64")
    configuration, table = dry_run(row, ranks=2, bfloat16=False).split("\n\n", 1)
    assert json.loads(configuration) == json.loads(json.dumps(row.to_json()))
    told = reckon(row, bfloat16=False)
    lines = {line[:26].strip(): line[26:].split() for line in table.splitlines()}
    assert lines["on each rank"] == ["one", "device", "2", "x", "ddp", "2", "x", "fsdp2"]
    assert lines["examples a pass"] == ["8", "4", "4"]
    assert lines["activations"][0] == f"{told.activations / 2**20:.2f}"
    assert {"weights", "gradients", "optimizer", "averages (EMA)", "peak of a step"} <= set(lines)
    assert lines["GFLOP an example, forward"] == [f"{told.forward_flop / 1e9:.3f}"]
    assert lines["forward and backward"] == [f"{told.step_flop / 1e9:.3f}"]


def test_the_guides_table_is_what_is_reckoned() -> None:
    guide = (Path(__file__).parents[2] / "trainer" / "README.md").read_text()
    table = {
        cells[0].strip("`"): cells[1:]
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in guide.splitlines())
        if cells[0].strip("`") in PRESETS
    }
    assert set(table) == {name for name in PRESETS if not name.startswith("tiny-")}
    for name, said in table.items():
        row, paper = preset(name), name.startswith("paper-")
        ddp, sharded = (
            reckon(row, bfloat16=paper, ranks=8 if paper else 1, parallel=p if paper else "none") for p in SEVERAL
        )
        assert said[1:3] == [row.optimizer, str(ddp.examples)], name
        assert said[0] == f"{ddp.parameters / 1e6:,.1f} M", name
        parts = (ddp.weights, ddp.optimizer, ddp.casts, ddp.activations, ddp.peak, *([sharded.peak] if paper else []))
        sizes = [float(cell) for cell in said[3:9] if cell != "-"]
        assert sizes == pytest.approx([part / 2**30 for part in parts], rel=0.02, abs=0.006), name
        flop = [float(cell.replace(",", "")) for cell in said[9:]]
        assert flop == pytest.approx([ddp.forward_flop / 1e9, ddp.step_flop / 1e9], rel=0.01, abs=0.06), name
