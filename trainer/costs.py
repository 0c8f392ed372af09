"""What a step of a preset takes, reckoned without taking it: memory by part, and FLOP an example.

The step runs on tensors that have shapes and no memory, so that 2.5 B parameters are reckoned on a laptop. What is counted
is what the real step does: the same loss, the same optimizer, the same checkpointing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from common.stages import stage
from common.text import MAX_TOKENS
from common.unet.config import PLACEMENT_SIZE
from common.unet.layers import Attention, ResidualBlock, grid_places, grid_positions
from common.unet.unet import UNet
from trainer.batches import Batch
from trainer.distributed import Parallel, remember_less
from trainer.loss import training_loss
from trainer.optimizers import begin, optimizer_of
from trainer.presets import Preset
from trainer.state import average_names


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a step takes on each rank.

    Attributes:
        examples: of one pass, at most: a step's batch over the ranks and the parts of accumulation.
        parameters: of the U-Net, on all ranks together.
        weights, gradients, optimizer, averages: bytes of this rank's share; float32, whatever the precision.
        casts: bytes of the weights as autocast hands them to the kernels, which stay until the backward pass.
        gathered: bytes of other ranks' slices that FSDP2 holds at a time, an estimate: what lies outside of blocks, and the
            largest block with the next one and its gradients.
        activations: bytes of what the forward pass leaves for the backward pass, the batch among it.
        passing: bytes at the worst moment of the passes, beside weights, optimizer and averages: activations, casts, the
            gradients that are there by then, and what single operations need.
        stepping: bytes that the optimizer's step needs for itself.
        forward_flop, step_flop: floating-point operations an example, of the forward pass, and of forward and backward pass
            with what activation checkpointing computes again; matrix products, convolutions and attention.
    """

    examples: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    casts: int
    gathered: int
    activations: int
    passing: int
    stepping: int
    forward_flop: int
    step_flop: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment; less than all parts together where gradients come as activations go."""
        lasting = self.weights + self.optimizer + self.averages
        return lasting + max(self.passing + self.gathered, self.gradients + self.stepping)


# How torch counts each operation's FLOP, and as much for attention as processors compute it, of which torch knows nothing.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
            grad.shape, query.shape, key.shape, value.shape
        )
    ),
}


class Ledger(TorchDispatchMode):
    """FLOP, and bytes of the tensors made inside it: alive now, at most so far, and of casts of some given tensors.

    torch's `FlopCounterMode` would hold tensors of the backward pass for longer than a step without it does.
    """

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.most = self.casts = self.flop = 0
        self._watched = {id(t.untyped_storage()) for t in watched}
        self._known: set[int] = set(self._watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in FORMULAS:
            self.flop += FORMULAS[func.overloadpacket](*args, **(kwargs or {}), out_val=made)
        cast = func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self._watched
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                size = self._hold(tensor.untyped_storage())
                self.casts += size if cast else 0
        return made

    def _hold(self, storage: Any) -> int:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return 0
        self._known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._release, key, size)
        return size

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def reckon(
    preset: Preset,
    *,
    bfloat16: bool,
    ranks: int = 1,
    parallel: Parallel = "none",
    tokens: int = MAX_TOKENS,
    side: int | None = None,
) -> Costs:
    """Costs of a step on each rank.

    Args:
        bfloat16: whether passes run in bfloat16.
        ranks, parallel: over how many ranks the step is laid, and how.
        tokens: of each text.
        side: of the pictures; None: the last of the preset's curriculum.

    Raises:
        ValueError: the batch cannot be shared by so many ranks.
    """
    if ranks < 1 or preset.groups < ranks * preset.accumulation:
        raise ValueError(
            f"--ranks: {ranks} ranks in {preset.accumulation} parts each cannot share {preset.groups} sets of neighbors"
        )
    groups = -(-preset.groups // (ranks * preset.accumulation))  # the largest share
    costs = _whole_step(preset, groups, side or preset.curriculum[-1][1], tokens, bfloat16)
    return _sliced(costs, preset, ranks) if parallel == "fsdp2" else replace(costs, gathered=0)


def _sliced(costs: Costs, preset: Preset, ranks: int) -> Costs:
    """FSDP2's share of what one device would hold; its weights arrive in the type in which they are read."""
    sliced = {
        name: -(-getattr(costs, name) // ranks)
        for name in ("weights", "gradients", "optimizer", "averages", "stepping")
    }
    from_beginning = costs.gradients if preset.accumulation > 1 else 0
    there = sliced["gradients"] if preset.accumulation > 1 else 0
    passing = costs.passing - costs.casts - from_beginning + there
    return replace(costs, **sliced, casts=0, passing=passing)


@lru_cache(maxsize=32)
def _whole_step(preset: Preset, groups: int, side: int, tokens: int, bfloat16: bool) -> Costs:
    """The costs of one device that holds everything, and of what FSDP2 would gather."""
    with _fresh_positions(), FakeTensorMode():
        unet = UNet(preset.unet)
        _lay_channels_last(unet)
        if preset.activation_checkpointing:
            remember_less(unet)
        optimizer = optimizer_of(unet, preset)
        kept = sum(_bytes(t) for p in unet.parameters() for t in begin(optimizer, p).values())
        passes = _passes(preset, unet, blank_batch(preset, groups, side, tokens), bfloat16=bfloat16)
    sizes = [_bytes(p) for p in unet.parameters()]
    return Costs(
        examples=groups * preset.draws,
        parameters=sum(p.numel() for p in unet.parameters()),
        weights=sum(sizes),
        gradients=sum(sizes),
        optimizer=kept,
        averages=sum(sizes) * len(average_names(preset)),
        gathered=_gathered(unet, bfloat16=bfloat16),
        # Adafactor makes three matrices of the largest parameter's size at a time; Adam's fused step makes none.
        stepping=3 * max(sizes) if preset.optimizer == "adafactor" else 0,
        **passes,
    )


def _passes(preset: Preset, unet: UNet, batch: Batch, *, bfloat16: bool) -> dict[str, int]:
    """What a step's forward and backward passes make beside what lasts."""
    examples, spec = batch.x0.shape[0], stage(preset.stage)
    given = sum(_bytes(t) for t in vars(batch).values())
    forward = casts = activations = 0
    with Ledger(list(unet.parameters())) as ledger:
        for _ in range(min(2, preset.accumulation)):  # in the second part, gradients are there from the beginning
            before, ledger.casts, ledger.flop = ledger.alive, 0, 0
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = training_loss(unet, spec, batch)
            forward = ledger.flop
            casts = 0 if preset.activation_checkpointing else ledger.casts  # with it, they are made again
            activations = ledger.alive - before - casts + given
            loss.backward()
            del loss
    return {
        "casts": casts,
        "activations": activations,
        "passing": ledger.most + given,
        "forward_flop": forward // examples,
        "step_flop": ledger.flop // examples,
    }


def blank_batch(preset: Preset, groups: int, side: int, tokens: int) -> Batch:
    """A batch of the shapes that the preset trains on, of `groups` sets of neighbors and texts of `tokens`."""
    size, width, count = groups * preset.draws, preset.unet.text_width, preset.neighbors
    low = side // preset.unet.scale if preset.unet.scale > 1 else 0
    length, sets = tokens if width else 0, groups if width else size

    def pictures(*shape: int) -> Tensor:
        return torch.zeros(shape).contiguous(memory_format=torch.channels_last)

    return Batch(
        x0=pictures(size, 3, side, side),
        eps=pictures(size, 3, side, side),
        t=torch.full((size,), 0.5),
        low_res=pictures(size, 3, low, low),
        low_res_eps=pictures(size, 3, low, low),
        low_res_t=torch.full((size,), 0.1),
        text=torch.zeros(size, length, width),
        text_mask=torch.ones(size, length, dtype=torch.bool),
        group=torch.arange(groups).repeat_interleave(preset.draws),
        neighbors=pictures(sets * count, 3, side, side).unflatten(0, (sets, count)),
        neighbor_text=torch.zeros(sets, count, length, width),
        neighbor_text_mask=torch.ones(sets, count, length, dtype=torch.bool),
        neighbor_mask=torch.ones(sets, count, dtype=torch.bool),
        keep_text=torch.ones(size, dtype=torch.bool),
        keep_neighbors=torch.ones(size, dtype=torch.bool),
        placement=torch.zeros(size, PLACEMENT_SIZE),
    )


def _lay_channels_last(unet: UNet) -> None:
    """What `to(memory_format=...)` does to weights that have memory."""
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 4:
                laid = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(laid))


def _gathered(unet: UNet, *, bfloat16: bool) -> int:
    blocks = [m for m in unet.modules() if isinstance(m, ResidualBlock | Attention)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outside = sum(p.numel() for p in unet.parameters()) - sum(sizes)
    each = 2 if bfloat16 else 4
    return each * (outside + 3 * max(sizes, default=0))


@contextmanager
def _fresh_positions() -> Iterator[None]:
    """Positions are kept from pass to pass: those without memory must not stay, nor real ones be met."""
    for kept in (grid_places, grid_positions):
        kept.cache_clear()
    try:
        yield
    finally:
        for kept in (grid_places, grid_positions):
            kept.cache_clear()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
