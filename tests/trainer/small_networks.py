"""A small network whose optimizer is looked into, whole or in slices over two ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.optimizers import begin, optimizer_of
from trainer.presets import preset

KINDS = ("adam", "adafactor")


def network() -> nn.Module:
    """A kernel whose outputs two ranks share unevenly, a matrix, vectors; laid in memory as the U-Net is."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(64, 6))
    return made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def pictures(step: int) -> Tensor:
    return torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        model(pictures(step)[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole state tensors by "<kind>/<parameter>"."""
    return {
        f"{kind}/{name}": whole(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Copies saved values into a beginning, as a resumed run does."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = begin(optimizer, parameter)
        for kind, target in optimizer.state[parameter].items():
            value = tensors[f"{kind}/{name}"]
            if isinstance(target, DTensor):
                value = distribute_tensor(value, target.device_mesh, target.placements)
            target.copy_(value)


def sharded_steps(rank: int, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Weights and state after four steps of each optimizer on two ranks, whole; in the middle the state goes through whole
    tensors."""
    written: dict[str, Tensor] = {}
    for kind in KINDS:
        row = replace(preset("tiny-64"), optimizer=kind)  # type: ignore[arg-type]
        model = network()
        fully_shard(model.to(memory_format=torch.contiguous_format), mesh=mesh)  # pyright: ignore[reportCallIssue]
        optimizer = optimizer_of(model, row)
        train(model, optimizer, range(2), slice(rank, None, 2))
        tensors = state_of(model, optimizer)
        again = optimizer_of(model, row)
        restore(model, again, tensors)
        train(model, again, range(2, 4), slice(rank, None, 2))
        written |= {f"{kind}/{n}": whole(t) for n, t in model.state_dict().items()}
        written |= {f"{kind}/state/{n}": t for n, t in state_of(model, again).items()}
    return written
