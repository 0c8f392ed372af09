"""Adafactor against its paper, and optimizer state that comes back exactly; on two ranks: test_distributed.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tests.trainer.small_networks import network, restore, state_of, train
from trainer.optimizers import Adafactor, optimizer_of
from trainer.presets import preset


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
