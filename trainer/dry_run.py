"""What `fit --dry-run` prints: the resolved configuration, and what a step of it takes."""

from __future__ import annotations

import json

from trainer.costs import Costs, reckon
from trainer.distributed import Parallel
from trainer.presets import Preset

SEVERAL: tuple[Parallel, ...] = ("ddp", "fsdp2")
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "averages": "averages (EMA)",
    "casts": "weights in bfloat16",
    "gathered": "gathered slices",
    "activations": "activations",
    "peak": "peak of a step",
}


def dry_run(row: Preset, *, ranks: int, bfloat16: bool) -> str:
    """The configuration as JSON, an empty line, and a table of costs: of one device, and of `ranks` where these are more.

    Raises:
        ValueError: so many ranks cannot share the preset's batch.
    """
    columns = {"one device": reckon(row, bfloat16=bfloat16)}
    for parallel in SEVERAL if ranks != 1 else ():
        columns[f"{ranks} x {parallel}"] = reckon(row, bfloat16=bfloat16, ranks=ranks, parallel=parallel)
    return f"{json.dumps(row.to_json(), indent=2)}\n\n{_table(row, columns, bfloat16=bfloat16)}"


def _table(row: Preset, columns: dict[str, Costs], *, bfloat16: bool) -> str:
    first = next(iter(columns.values()))
    lines = [
        f"{row.name}: {first.parameters:,} parameters, passes in {'bfloat16' if bfloat16 else 'float32'}, "
        f"{row.side(row.total_examples)} x {row.side(row.total_examples)} pixels, {row.batch} examples a step",
        "",
        _line("on each rank", list(columns)),
        _line("examples a pass", [str(c.examples) for c in columns.values()]),
    ]
    lines += [
        _line(label, [_size(getattr(c, part)) for c in columns.values()])
        for part, label in PARTS.items()
        if any(getattr(c, part) for c in columns.values())
    ]
    lines += [
        "",
        _line("GFLOP an example, forward", [f"{first.forward_flop / 1e9:.3f}"]),
        _line("forward and backward", [f"{first.step_flop / 1e9:.3f}"]),
    ]
    return "\n".join(lines)


def _line(label: str, values: list[str]) -> str:
    return f"{label:<26}" + "".join(f"{value:>14}" for value in values)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
