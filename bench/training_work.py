"""A step of training as something that can be taken again and again, and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.unet.config import PLACEMENT_SIZE
from trainer.batches import Batch
from trainer.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Work:
    """One model's training step; `forward` gives the loss of `examples` examples."""

    model: nn.Module
    forward: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    examples: int

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def figures(self) -> dict[str, Any]:
        """Parameters, and GFLOP of an example."""
        with _counting() as counter:
            loss = self.forward()
            forward = counter.get_total_flops()
            loss.backward()
            total = counter.get_total_flops()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "parameters_m": round(sum(p.numel() for p in self.model.parameters()) / 1e6, 3),
            "gflop_a_pass": round(forward / self.examples / 1e9, 3),
            "gflop_a_step": round(total / self.examples / 1e9, 3),
        }


def _counting() -> FlopCounterMode:
    """torch's counter does not know attention as processors compute it."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
        },
    )


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def random_batch(row: Preset, groups: int, side: int, tokens: int) -> Batch:
    """A batch of the preset's first stage: `groups` sets of neighbors, texts of `tokens`, nothing dropped.

    Random, since zeros would let the gradients vanish into numbers that processors are slow at.
    """
    size, width, count = groups * row.draws, row.unet.text_width, row.neighbors

    def pictures(*shape: int) -> Tensor:
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    return Batch(
        x0=pictures(size, 3, side, side),
        eps=pictures(size, 3, side, side),
        t=torch.linspace(0.05, 0.95, size),
        low_res=torch.zeros(size, 3, 0, 0),
        low_res_eps=torch.zeros(size, 3, 0, 0),
        low_res_t=torch.zeros(size),
        text=torch.randn(size, tokens, width),
        text_mask=torch.ones(size, tokens, dtype=torch.bool),
        group=torch.arange(groups).repeat_interleave(row.draws),
        neighbors=pictures(groups * count, 3, side, side).unflatten(0, (groups, count)),
        neighbor_text=torch.randn(groups, count, tokens, width),
        neighbor_text_mask=torch.ones(groups, count, tokens, dtype=torch.bool),
        neighbor_mask=torch.ones(groups, count, dtype=torch.bool),
        keep_text=torch.ones(size, dtype=torch.bool),
        keep_neighbors=torch.ones(size, dtype=torch.bool),
        placement=torch.zeros(size, PLACEMENT_SIZE),
    )
