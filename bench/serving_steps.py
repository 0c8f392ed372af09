"""What continuous batching is measured against: a server that takes one RPC for each step, and batches what waits.

Two ways of it. `draw`: a step brings everything that it needs, so that any replica can take it, and its conditions are
encoded with it. `draw_sticky`: conditions stay in the server, which must then be the same for all steps; only x_t and
the estimate travel. Run as a process; `StepClient` draws by it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import threading
from concurrent.futures import Future
from dataclasses import fields
from itertools import count
from pathlib import Path
from queue import Queue

import grpc
import grpc.aio
import numpy as np
import torch

from bench.serving_stage import StageOrder
from common.checkpoint import load_stage
from common.diffusion.plan import Plan
from common.service.server import die_with_parent
from common.stages import StageSpec, stage
from common.trajectories import Trajectory, step_together
from common.unet.packed import packed
from common.unet.unet import UNet
from generator_svc.stage_engine import StageEngine
from generator_svc.stage_inputs import StageInputs

SERVICE = "reimagen.bench.Steps"
MAX_BATCH = 8


class _Batcher:
    """Takes one step of whatever waits, on a thread."""

    def __init__(self, unet: UNet, spec: StageSpec) -> None:
        self._unet, self._spec = unet, spec
        self._waiting: Queue[tuple[Trajectory, Future[None]]] = Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def step(self, trajectory: Trajectory) -> Future[None]:
        """Done when the step is."""
        done = Future[None]()
        self._waiting.put((trajectory, done))
        return done

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                step_together(self._unet, self._spec.prediction, [trajectory for trajectory, _ in batch])
            except Exception as error:  # the callers are told: nobody waits for ever
                for _, done in batch:
                    done.set_exception(error)
                continue
            for _, done in batch:
                done.set_result(None)


class _Steps:
    def __init__(self, engine: StageEngine, batcher: _Batcher) -> None:
        self._engine, self._batcher = engine, batcher
        self._live: dict[int, Trajectory] = {}
        self._names = count()

    async def begin(self, request: bytes, context: object) -> bytes:
        name = next(self._names)
        self._live[name] = await asyncio.to_thread(self._begun, _unpack(request))
        return name.to_bytes(8, "big")

    async def step_alone(self, request: bytes, context: object) -> bytes:
        arrays = _unpack(request)
        trajectory = await asyncio.to_thread(self._begun, arrays)
        trajectory.step = int(arrays["step"])
        trajectory.x_t, trajectory.x0 = (torch.from_numpy(each.copy()) for each in arrays["state"])
        await asyncio.wrap_future(self._batcher.step(trajectory))
        return np.stack([trajectory.x_t.numpy(), trajectory.x0.numpy()]).tobytes()

    def _begun(self, arrays: dict[str, np.ndarray]) -> Trajectory:
        plan = Plan.from_json(json.loads(str(arrays["plan"])))
        inputs = StageInputs(**{field.name: arrays.get(field.name) for field in fields(StageInputs)})  # pyright: ignore[reportArgumentType]
        return self._engine.begin([plan], inputs).trajectories[0]

    async def step(self, request: bytes, context: object) -> bytes:
        name = int.from_bytes(request[:8], "big")
        trajectory = self._live[name]
        shape = trajectory.x_t.shape
        x_t, x0 = np.frombuffer(request, np.float32, offset=8).reshape(2, *shape)
        trajectory.x_t, trajectory.x0 = torch.from_numpy(x_t.copy()), torch.from_numpy(x0.copy())
        await asyncio.wrap_future(self._batcher.step(trajectory))
        if trajectory.done:
            del self._live[name]
        return np.stack([trajectory.x_t.numpy(), trajectory.x0.numpy()]).tobytes()


class StepClient:
    """Draws by a server of steps."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._begin = channel.unary_unary(f"/{SERVICE}/Begin")
        self._step = channel.unary_unary(f"/{SERVICE}/Step")
        self._step_alone = channel.unary_unary(f"/{SERVICE}/StepAlone")
        self.wire_bytes = 0

    async def draw(self, order: StageOrder) -> np.ndarray:
        """The picture of an order, a call for each of its steps, which brings all that it needs."""
        start = order.plan.start()
        state = np.stack([start, start])
        for step in range(order.plan.steps):
            request = _pack(order, step=np.array(step), state=state)
            answer = await self._step_alone(request)
            self.wire_bytes += len(request) + len(answer)
            state = np.frombuffer(answer, np.float32).reshape(2, *start.shape)
        return state[0]

    async def draw_sticky(self, order: StageOrder) -> np.ndarray:
        """The same by a server that keeps the conditions."""
        request = _pack(order)
        name = await self._begin(request)
        self.wire_bytes += len(request)
        start = order.plan.start()
        state = np.stack([start, start]).tobytes()
        for _ in range(order.plan.steps):
            state = await self._step(name + state)
            self.wire_bytes += 2 * len(state)
        return np.frombuffer(state, np.float32).reshape(2, *start.shape)[0]


def _pack(order: StageOrder, **more: np.ndarray) -> bytes:
    given = {field.name: getattr(order.inputs, field.name) for field in fields(StageInputs)}
    packed = io.BytesIO()
    arrays = more | {name: array for name, array in given.items() if array is not None}
    np.savez(packed, plan=np.array(json.dumps(order.plan.to_json())), **arrays)  # pyright: ignore[reportArgumentType]
    return packed.getvalue()


def _unpack(request: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(request), allow_pickle=False) as given:
        return {name: given[name] for name in given.files}


async def _serve(size: int, weights: Path, address: str) -> None:
    spec, unet = stage(size), packed(load_stage(weights, size).unet)
    engine = StageEngine(spec, unet, max_batch=MAX_BATCH, max_live_bytes=1 << 30)
    steps = _Steps(engine, _Batcher(unet, spec))
    handlers = {
        "Begin": grpc.unary_unary_rpc_method_handler(steps.begin),
        "Step": grpc.unary_unary_rpc_method_handler(steps.step),
        "StepAlone": grpc.unary_unary_rpc_method_handler(steps.step_alone),
    }
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(address)
    await server.start()
    print(f"ready {address}", flush=True)
    await server.wait_for_termination()


def main() -> int:
    """Serve until the parent ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving_steps", description=__doc__)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    flags = parser.parse_args()
    die_with_parent(flags.parent_pid)
    torch.set_num_threads(flags.threads)
    asyncio.run(_serve(flags.size, flags.weights, flags.address))
    return 0


if __name__ == "__main__":
    sys.exit(main())
