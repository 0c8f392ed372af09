"""A caller that says when its picture has begun, and is killed then: `python -m tests.soak.doomed_caller ADDRESS`."""

from __future__ import annotations

import sys

from client.generator import GenerationRequest, GeneratorClient, StageOverrides, StepDone

TIMEOUT_S = 120.0


def main(address: str, seed: int) -> None:
    """Draw for a long time."""
    steps = (StageOverrides(stage=64, steps=1000),)
    request = GenerationRequest(prompt="a guide dog", seed=seed, stop_at=64, stages=steps)
    with GeneratorClient(address) as client:
        for event in client.generate(request, timeout_s=TIMEOUT_S):
            if isinstance(event, StepDone):
                print("begun", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
