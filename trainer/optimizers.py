"""The optimizers of the presets: on one device, or over parameters that FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import optimization

from trainer.presets import Preset


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018) as Imagen uses it: no first moment, steps of an absolute size, factored kernels.

    The update is that of `transformers`. Of the two implementations at hand it is the one whose step size can be absolute
    (torch's is always a share of the parameter's own RMS, and Imagen gives Adafactor and Adam the same 1e-4), and the one
    that never waits for the device. Both factor the last two dimensions, which of a kernel [out, in, 3, 3] are its nine
    taps and would keep two thirds of its size: kernels are handed over as [3, 3, out, in], which keeps (out + in) / (out
    in) of it, as on TPUs, where they are stored so.

    State of a parameter: `step`, on the host; `exp_avg_sq`, or of matrices and kernels `exp_avg_sq_row` and `exp_avg_sq_col`.
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
                update.state[view] = self.state[parameter] or self.begin(parameter)
                self.state[parameter] = update.state[view]
            update.step()
            for parameter, _ in taken:
                del self.state[parameter]["RMS"]  # the library's, for steps relative to it

    @staticmethod
    def begin(parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step, sharded as the parameter is."""
        view, step = _as_matrix(parameter.detach()), torch.zeros((), dtype=torch.float32)
        if view.ndim < 2:
            return {"step": step, "exp_avg_sq": torch.zeros_like(view)}
        return {
            "step": step,
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


def begin(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a parameter before its first step: tensors, sharded and laid in memory as it is.

    Whoever restores a run copies the saved values into them and sets `optimizer.state[parameter]`.
    """
    if isinstance(optimizer, Adafactor):
        return optimizer.begin(parameter)
    # Adam's fused step walks memory in the parameter's own order (channels last): its moments must lie as it does.
    moments = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}
