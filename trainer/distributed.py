"""Training on several ranks: who there is, what they tell one another, and how the U-Net is laid over them.

The gradient of a step is that of its whole batch, whatever the number of ranks: each takes its share of the examples,
and weighs its loss by it. `ddp` keeps every weight on every rank; `fsdp2` keeps a slice of each (Zhao et al. 2023,
arXiv 2304.11277), gathers a block's weights where it runs, and scatters the sum of its gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.service.command import status_of
from common.stages import StageSpec
from common.unet.layers import Attention, ResidualBlock
from common.unet.unet import UNet
from trainer.batches import Batch
from trainer.loss import training_loss

Parallel = Literal["none", "ddp", "fsdp2"]
PARALLEL: tuple[Parallel, ...] = ("none", "ddp", "fsdp2")
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # evaluation on the first rank may last; what hangs is found by the watchdog

T = TypeVar("T")


class Objective(nn.Module):
    """The training loss of a batch as a module: all that reads weights in a step happens inside its `forward`."""

    def __init__(self, unet: UNet, spec: StageSpec) -> None:
        super().__init__()
        self.unet = unet
        self.spec = spec

    def forward(self, batch: Batch) -> Tensor:
        return training_loss(self.unet, self.spec, batch)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a run, seen from one of them; by default there is one.

    Methods that say "together" must be called by all ranks in the same order.

    Attributes:
        parallel: how weights are laid over the ranks.
        rank: this one, from 0; the first writes everything that a run leaves behind.
        world: how many there are.
        mesh: of FSDP2.
    """

    parallel: Parallel = "none"
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def lay(self, unet: UNet, spec: StageSpec, device: torch.device, *, bfloat16: bool) -> nn.Module:
        """The objective over `unet`, whose parameters may be replaced by slices of them; together."""
        objective = Objective(unet, spec)
        if self.parallel == "ddp":
            ids = [device] if device.type == "cuda" else None
            return DistributedDataParallel(
                objective, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        if self.parallel == "fsdp2":
            self._shard(objective, bfloat16=bfloat16 and device.type == "cuda")
        return objective

    def _shard(self, objective: Objective, *, bfloat16: bool) -> None:
        """Blocks are gathered one by one; what lies outside of them stays gathered through a step."""
        # Keys and values are views; nothing here changes a tensor in place, which is what the warning is about.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        # Weights travel in the type in which autocast reads them; gradients are summed in float32.
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            if bfloat16
            else MixedPrecisionPolicy()
        )
        for module in objective.unet.modules():
            if isinstance(module, ResidualBlock | Attention):
                fully_shard(module, mesh=self.mesh, mp_policy=policy)
                if isinstance(module, Attention):
                    register_fsdp_forward_method(module, "keys_values")
        fully_shard(objective, mesh=self.mesh, mp_policy=policy)

    def without_exchange(self, objective: nn.Module) -> AbstractContextManager[None]:
        """Gradients stay local inside this block, and are exchanged with those of the next pass outside of it.

        FSDP2 exchanges each part's: whole gradients of every part kept would be what it is there to avoid.
        """
        return objective.no_sync() if isinstance(objective, DistributedDataParallel) else nullcontext()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks; together."""
        if self.world == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(row)
        return row.tolist()

    def told(self, text: str) -> str:
        """The first rank's text, on every rank; together."""
        if self.world == 1:
            return text
        payload = np.frombuffer(text.encode(), np.uint8).copy()
        length = torch.tensor([len(payload)])
        dist.broadcast(length, 0)
        sent = torch.from_numpy(payload) if self.leads else torch.zeros(int(length), dtype=torch.uint8)
        if int(length):
            dist.broadcast(sent, 0)
        return sent.numpy().tobytes().decode()

    def led(self, body: Callable[[], T]) -> T | None:
        """What `body` gives on the first rank, None on the others, which wait; together.

        Where it fails, all ranks end: the first with its error, the others without a word.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.leads:
            try:
                result = body()
            except Exception as error:
                failure = error
        is_ours = failure is not None and not isinstance(failure, OSError | ValueError)  # a fault: no status says why
        failed = self.told("" if failure is None else str(1 if is_ours else status_of(failure)))
        if failure is not None:
            raise failure
        if failed:
            raise SystemExit(int(failed))
        return result

    def full(self, tensor: Tensor) -> Tensor:
        """A tensor whole, on every rank; together."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def hand_out(self, target: Tensor, source: Tensor | None) -> None:
        """Copy the first rank's whole `source` into `target`, or into this rank's slice of it; together."""
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if self.leads:
            assert source is not None
            whole.copy_(source)
        if self.world > 1:
            dist.broadcast(whole, 0)
        if isinstance(target, DTensor):
            whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        with torch.no_grad():
            own(target).copy_(own(whole))


ALONE = Ranks()


def own(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor, which shares its memory; the tensor itself where it is not sliced."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def remember_less(unet: UNet) -> None:
    """Activation checkpointing: blocks are computed again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""
    for module in unet.modules():
        if isinstance(module, ResidualBlock | Attention):
            module.forward = _computed_again(module.forward)


def _computed_again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]

    return run


@contextmanager
def open_ranks(wanted: str | None, environment: Mapping[str, str]) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun started, for the length of a `with` block; also this rank's device.

    Args:
        wanted: a name of PARALLEL; None: `ddp` under torchrun, `none` without.
        environment: the process's, where torchrun says which rank this is.

    Raises:
        ValueError: `wanted` does not go with the environment.
    """
    world, rank, local = (int(environment.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    launched = "WORLD_SIZE" in environment and "MASTER_ADDR" in environment
    parallel = wanted or ("ddp" if launched and world > 1 else "none")
    if parallel not in PARALLEL:
        raise ValueError(f"--parallel: {parallel!r} is not one of {list(PARALLEL)}")
    if parallel != "none" and not launched:
        raise ValueError(f"--parallel: {parallel} needs torchrun, which says which rank this is")
    if parallel == "none" and world > 1:
        raise ValueError(f"--parallel: none has one rank, torchrun started {world}")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if parallel == "none":
        yield ALONE, device
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (world,)) if parallel == "fsdp2" else None
        yield Ranks(parallel=parallel, rank=rank, world=world, mesh=mesh), device
    finally:
        dist.destroy_process_group()
