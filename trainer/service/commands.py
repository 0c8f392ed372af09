"""The trainer's own command lines, as runs and exports give them: the one place that knows its flags."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from trainer.service.run_spec import RunSpec
from trainer.service.spec_rules import Folders

TRAINER = ("-m", "trainer")
TORCHRUN = ("-m", "trainer.torchrun")
TORCHRUN_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # whole seconds from its SIGTERM to its ranks to SIGKILL; else 30
UNDER_TORCHRUN = ("-m", "--", "trainer")  # behind "--" it does not take --run for its own --run-path


def fit_arguments(name: str, spec: RunSpec, folders: Folders) -> list[str]:
    """What `python -m trainer` is given to train a run."""
    flags: dict[str, object] = {"preset": spec.preset, "data": folders.data / spec.data, "run": folders.run(name)}
    if spec.start_from:
        flags["start-from"] = folders.weights / spec.start_from
    optional = {
        "examples": spec.examples,
        "seconds": spec.limit_s,
        "log-every": spec.log_every_s,
        "evaluate-every": spec.evaluate_every_s,
        "save-every": spec.save_every_s,
        "evaluate-every-steps": spec.evaluate_every_steps,
        "save-every-steps": spec.save_every_steps,
        "parallel": spec.parallel,
        "threads": spec.threads,
        "side": spec.side,
    }
    flags |= {flag: value for flag, value in optional.items() if value}
    return ["fit", *(f"--{flag}={value}" for flag, value in flags.items())]


def local_command(arguments: Sequence[str], ranks: int, *, grace_s: float) -> list[str]:
    """The trainer here: one process, or several that torchrun starts, and kills `grace_s` after it was asked to end."""
    if ranks == 1:
        return [sys.executable, *TRAINER, *arguments]
    flags = ["--standalone", f"--nproc-per-node={ranks}", f"--shutdown-timeout={math.ceil(grace_s)}"]
    return [sys.executable, *TORCHRUN, *flags, *UNDER_TORCHRUN, *arguments]


def export_command(
    name: str, preset: str, data: str, weights: str, folders: Folders, *, replace: bool = False
) -> list[str]:
    """Writes a run's averaged weights for serving. Lines "[i/n] text" of what it says are its progress."""
    flags = {
        "preset": preset,
        "data": folders.data / data,
        "run": folders.run(name),
        "weights": folders.weights / weights,
    }
    given = [f"--{flag}={value}" for flag, value in flags.items()]
    return [sys.executable, *TRAINER, "publish", *given, *(["--replace"] if replace else [])]
