"""Started by torchrun: trains small runs on its ranks and writes what each of them saw, for test_distributed.py."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from common.images import shrink
from tests.trainer.runs import CASES, STEPS, Case, curve
from tests.trainer.small_networks import sharded_steps
from trainer.dataset import Prepared, open_prepared
from trainer.distributed import Ranks, open_ranks
from trainer.fit import open_run
from trainer.sources import NeighborSource


def opened(folder: Path) -> Prepared:
    """The prepared corpus, with a small entity's size for 16-pixel pictures."""
    found = open_prepared(folder)
    return replace(found, pictures={**found.pictures, 8: shrink(found.pictures[16], 2)})


def go_on(case: Case, prepared: Prepared, folder: Path, ranks: Ranks, steps: int) -> dict[str, Any]:
    """Open a run folder, take steps, save."""
    trainer, skipped = open_run(
        case.row, NeighborSource(prepared=prepared, preset=case.row), folder, torch.device("cpu"), None, ranks
    )
    found = {"begun": trainer.state.step, "skipped": len(skipped), "curve": curve(trainer, steps, case)}
    trainer.save()
    return found


def failing(ranks: Ranks, failure: Exception) -> str:
    """What happens on this rank when the first one fails."""

    def body() -> None:
        raise failure

    try:
        ranks.led(body)
    except OSError as error:
        return f"error {error.errno}"
    except (ValueError, ZeroDivisionError) as error:
        return type(error).__name__
    except SystemExit as error:
        return f"exit {error.code}"
    return "nothing"


def main(data: Path, out: Path) -> None:
    """All cases, one after the other, in one start of the ranks."""
    torch.set_num_threads(1)
    prepared = opened(data)
    with open_ranks("fsdp2", os.environ) as (sharded, _):
        whole = replace(sharded, parallel="ddp", mesh=None)
        found: dict[str, Any] = {"told": sharded.told("früh" if sharded.leads else "spät")}
        for case in CASES:
            ranks = sharded if case.parallel == "fsdp2" else whole
            found[case.name] = go_on(case, prepared, out / case.name, ranks, STEPS)
        case = CASES[0]
        found["resumed"] = go_on(case, prepared, out / "resumed", sharded, STEPS)
        found["fallen back"] = go_on(case, prepared, out / "damaged", whole, 0)
        found["full disk"] = failing(whole, OSError(errno.ENOSPC, "No space left on device"))
        found["bad input"] = failing(whole, ValueError("--side: 0 cannot be"))
        found["fault"] = failing(whole, ZeroDivisionError())
        assert sharded.mesh is not None
        steps = sharded_steps(sharded.rank, sharded.mesh)
        if sharded.leads:
            (out / "optimizers.safetensors").write_bytes(save(steps))
        (out / f"rank-{sharded.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
