"""The optimizers of the presets, and their state as named tensors: on one device, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import optimization

from trainer.presets import Preset


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018) as Imagen uses it: no first moment, steps of an absolute size, factored kernels.

    The update is that of `transformers`. Of the two implementations at hand it is the one whose step size can be absolute
    (torch's is always a share of the parameter's own RMS, and Imagen gives Adafactor and Adam the same 1e-4), and the one
    that never waits for the device. Both factor the last two dimensions, which of a kernel [out, in, 3, 3] are its nine
    taps and would keep two thirds of its size: kernels are handed over as [3, 3, out, in], which keeps (out + in) / (out
    in) of it, as on TPUs, where they are stored so.

    State of a parameter: `step`, a number; `exp_avg_sq`, or of matrices and kernels `exp_avg_sq_row` and `exp_avg_sq_col`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            taken = [(p, _as_matrix(p.detach())) for p in group["params"] if p.grad is not None]
            if not taken:
                continue
            update = optimization.Adafactor(
                [view for _, view in taken], lr=group["lr"], scale_parameter=False, relative_step=False
            )
            for parameter, view in taken:
                view.grad = _as_matrix(parameter.grad)
                update.state[view] = self.state[parameter] or self.beginning(parameter)
                self.state[parameter] = update.state[view]
            update.step()
            for parameter, _ in taken:
                del self.state[parameter]["RMS"]  # the library's, for steps relative to it

    @staticmethod
    def beginning(parameter: Tensor) -> dict[str, Any]:
        """A parameter's state before its first step, sharded as the parameter is."""
        view = _as_matrix(parameter.detach())
        if view.ndim < 2:
            return {"step": 0, "exp_avg_sq": torch.zeros_like(view)}
        return {
            "step": 0,
            "exp_avg_sq_row": torch.zeros_like(_settled(view.mean(-1))),
            "exp_avg_sq_col": torch.zeros_like(_settled(view.mean(-2))),
        }


def _as_matrix(parameter: Tensor) -> Tensor:
    """A kernel [out, in, height, width] seen as [height, width, out, in]; anything else as it is."""
    return parameter.permute(2, 3, 0, 1) if parameter.ndim == 4 else parameter


def _settled(tensor: Tensor) -> Tensor:
    """A tensor whose ranks hold parts of a sum, as the whole sum on each."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[p if p.is_shard() else Replicate() for p in tensor.placements])


def optimizer_of(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The preset's optimizer over the parameters of `model`."""
    if preset.optimizer == "adafactor":
        return Adafactor(model.parameters(), lr=preset.learning_rate)
    return torch.optim.Adam(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.99), fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as whole tensors by "<kind>/<parameter>"; numbers are int64 without dimensions.

    Where parameters are sharded, every rank must call it: the shards are gathered.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                value = value.full_tensor()
            tensors[f"{kind}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, sharded and laid in memory as the parameters are.

    Raises:
        ValueError: a tensor is of no parameter, or of another shape than the optimizer keeps.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        by_name.setdefault(name, {})[kind] = tensor
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(by_name) - set(parameters)):
        raise ValueError(f"optimizer: state of {unknown[:5]}, which are no parameters")
    for name, values in by_name.items():
        state = _beginning(optimizer, parameters[name])
        if set(values) != set(state) or any(values[k].shape != torch.as_tensor(state[k]).shape for k in state):
            raise ValueError(f"optimizer: state {sorted(values)} of {name} is of another optimizer or shape")
        optimizer.state[parameters[name]] = {kind: _like(state[kind], values[kind]) for kind in state}


def _beginning(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    if isinstance(optimizer, Adafactor):
        return optimizer.beginning(parameter)
    # Adam keeps its step count beside its fused step's moments, which walk memory in the parameter's own order.
    moments = {kind: torch.zeros_like(parameter.detach()) for kind in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device)} | moments


def _like(pattern: Any, value: Tensor) -> Any:
    """The value as a number, or placed and laid in memory as the pattern is."""
    if not isinstance(pattern, Tensor):
        return int(value)
    if isinstance(pattern, DTensor):
        return distribute_tensor(value.to(pattern.device, pattern.dtype), pattern.device_mesh, pattern.placements)
    return torch.empty_like(pattern).copy_(value)
