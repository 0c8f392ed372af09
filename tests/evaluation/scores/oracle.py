"""pytorch-fid and prdc on the arrays of a folder, in a process of their own: `python oracle.py FOLDER`.

Reads `arrays.npz` (first, second: features; pictures: uint8 [N, H, W, 3]) and writes `weights.pth`, an Inception with random
weights as pytorch-fid's file is written, and `found.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import torchvision
except (
    RuntimeError
):  # its compiled operators are of another torch; the Python is all that is needed, and asks for these two
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision

import prdc
import pytorch_fid.inception as theirs
from pytorch_fid.fid_score import calculate_frechet_distance
from torchvision.transforms import functional as TF


def random_weights(**_: Any) -> dict[str, torch.Tensor]:
    """In place of the file that pytorch-fid fetches."""
    torch.manual_seed(5)
    model = torchvision.models.inception_v3(init_weights=False, num_classes=1008, aux_logits=False, weights=None)
    model.Mixed_5b = theirs.FIDInceptionA(192, pool_features=32)
    model.Mixed_7b = theirs.FIDInceptionE_1(1280)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            spread = torch.rand(tensor.shape) + 0.5
            state[name] = spread if name.endswith("running_var") else tensor + 0.02 * torch.randn(tensor.shape)
    return state


def main(folder: Path) -> None:
    """Everything that the tests compare with."""
    arrays = np.load(folder / "arrays.npz")
    first, second = arrays["first"], arrays["second"]
    moments = [(features.mean(0), np.cov(features, rowvar=False)) for features in (first, second)]
    shares = prdc.compute_prdc(real_features=second, fake_features=first, nearest_k=3)
    state = random_weights()
    torch.serialization.save(state, folder / "weights.pth")
    theirs.load_state_dict_from_url = lambda url, progress: state
    model = theirs.InceptionV3().eval()
    with torch.inference_mode():
        pixels = torch.stack([TF.to_tensor(picture) for picture in arrays["pictures"]])
        features = model(pixels)[0].squeeze(3).squeeze(2).numpy()
    np.savez(
        folder / "found.npz",
        frechet=calculate_frechet_distance(*moments[0], *moments[1]),
        precision=shares["precision"],
        recall=shares["recall"],
        features=features,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
