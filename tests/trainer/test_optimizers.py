"""Adafactor against its paper, and optimizer state that comes back exactly, on one device and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.optimizers import Adafactor, begin, optimizer_of
from trainer.presets import preset


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


def paper_update(parameter: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """Shazeer & Stern 2018, algorithms 4 and 5 with absolute steps; matrices [..., n, m] factor their last two axes."""
    x = parameter.astype(np.float64)
    rows = columns = v = 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient.astype(np.float64)
        beta = 1 - t**-0.8
        squares = g**2 + 1e-30
        if g.ndim < 2:
            v = beta * v + (1 - beta) * squares
            estimate = v
        else:
            rows = beta * rows + (1 - beta) * squares.sum(-1, keepdims=True)
            columns = beta * columns + (1 - beta) * squares.sum(-2, keepdims=True)
            estimate = rows * columns / rows.sum(-2, keepdims=True)
        u = g / np.sqrt(estimate)
        x = x - rate * u / max(1.0, np.sqrt((u**2).mean()))
    return x


@pytest.mark.parametrize("shape", [(7,), (5, 6), (5, 4, 3, 3)])
def test_adafactor_is_the_papers(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal(shape).astype(np.float32)
    gradients = [(rng.standard_normal(shape) * 10.0**-i).astype(np.float32) for i in range(4)]
    parameter = nn.Parameter(torch.from_numpy(first.copy()))
    optimizer = Adafactor([parameter], lr=1e-2)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    kernel = len(shape) == 4
    wanted = paper_update(
        first.transpose(2, 3, 0, 1) if kernel else first,
        [g.transpose(2, 3, 0, 1) if kernel else g for g in gradients],
        1e-2,
    )
    wanted = wanted.transpose(2, 3, 0, 1) if kernel else wanted
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=2e-5, atol=2e-6)


def test_adafactor_keeps_a_small_part_of_a_kernels_size() -> None:
    kernel = nn.Parameter(torch.randn(64, 32, 3, 3))
    optimizer = Adafactor([kernel], lr=1e-3)
    kernel.grad = torch.randn_like(kernel)
    optimizer.step()
    kept = sum(v.numel() for v in optimizer.state[kernel].values())
    assert kept == 1 + 9 * (64 + 32) < 0.05 * kernel.numel()


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    row = replace(preset("tiny-64"), optimizer=kind)  # type: ignore[arg-type]
    unbroken, half, restored = network(), network(), network()
    train(unbroken, optimizer_of(unbroken, row), range(6))
    first = optimizer_of(half, row)
    train(half, first, range(3))
    on_disk = load(save({n: t.contiguous() for n, t in state_of(half, first).items()}))
    restored.load_state_dict(half.state_dict())
    second = optimizer_of(restored, row)
    restore(restored, second, on_disk)
    train(restored, second, range(3, 6))
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    written = {}
    for kind in ("adam", "adafactor"):
        row = replace(preset("tiny-64"), optimizer=kind)  # type: ignore[arg-type]
        model = network()
        fully_shard(model.to(memory_format=torch.contiguous_format), mesh=mesh)  # pyright: ignore[reportCallIssue]
        optimizer = optimizer_of(model, row)
        train(model, optimizer, range(2), slice(rank, None, 2))
        tensors = state_of(model, optimizer)
        again = optimizer_of(model, row)  # the state goes through whole tensors in the middle
        restore(model, again, tensors)
        train(model, again, range(2, 4), slice(rank, None, 2))
        written |= {f"{kind}/{n}": t.full_tensor() for n, t in model.state_dict().items()}
        written |= {f"{kind}/state/{n}": t for n, t in state_of(model, again).items()}
    if rank == 0:
        (folder / "two.safetensors").write_bytes(save(written))
    dist.destroy_process_group()


def test_two_sharded_ranks_step_as_one_does(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    two = load((tmp_path / "two.safetensors").read_bytes())
    for kind in ("adam", "adafactor"):
        model = network()
        optimizer = optimizer_of(model, replace(preset("tiny-64"), optimizer=kind))  # type: ignore[arg-type]
        train(model, optimizer, range(4))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(two[f"{kind}/{name}"], tensor, rtol=1e-4, atol=1e-5)
        for name, tensor in state_of(model, optimizer).items():
            torch.testing.assert_close(two[f"{kind}/state/{name}"], tensor, rtol=1e-4, atol=1e-6)
