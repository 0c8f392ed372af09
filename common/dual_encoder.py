"""The demonstration dual encoder: frozen MiniLM beside a small image tower, and the space in which they meet.

The image tower is EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; no squeeze-and-excitation, ReLU6) cut off after some
blocks, its batch normalisations folded into the convolutions: a picture never depends on its batch neighbours. A folder
holds `dual_encoder.safetensors`, whose header carries the architecture, and `manifest.json` with its sha256. MiniLM is
frozen and comes from its package: it is not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.checkpoint import MANIFEST, CheckpointError, read_manifest
from common.files import sha256_file, write_atomic, write_json

FORMAT = "reimagen-dual-encoder/1"
FILE = "dual_encoder.safetensors"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the trunk was first trained on
_WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Architecture of the image tower.

    Attributes:
        side: of the square picture it sees, in pixels.
        stem: width of the first convolution, which halves the side.
        blocks: (width, expansion, kernel, stride) of each inverted-residual block.
        taps: blocks (from 0, ascending) whose expanded maps are averaged over the picture: its features. Nothing after
            the last tap is computed.
    """

    side: int
    stem: int
    blocks: tuple[tuple[int, int, int, int], ...]
    taps: tuple[int, ...]

    @property
    def num_features(self) -> int:
        inputs = (self.stem, *(width for width, *_ in self.blocks))
        return sum(inputs[tap] * self.blocks[tap][1] for tap in self.taps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TowerConfig:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it does not describe a tower.
        """
        config = cls(
            side=int(document["side"]),
            stem=int(document["stem"]),
            blocks=tuple((int(w), int(e), int(k), int(s)) for w, e, k, s in document["blocks"]),
            taps=tuple(int(tap) for tap in document["taps"]),
        )
        if not config.taps or list(config.taps) != sorted(set(config.taps)) or config.taps[-1] >= len(config.blocks):
            raise ValueError(f"taps {config.taps} of {len(config.blocks)} blocks")
        return config


class _Block(nn.Module):
    """Expand by a 1 x 1 convolution, filter each channel, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, width: int, expansion: int, kernel: int, stride: int, *, whole: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Conv2d(inputs, hidden, 1) if expansion > 1 else None
        self.filter = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden) if whole else None
        self.project = nn.Conv2d(hidden, width, 1) if whole else None
        self.residual = stride == 1 and inputs == width

    def expanded(self, x: Tensor) -> Tensor:
        return F.relu6(self.expand(x)) if self.expand is not None else x

    def finish(self, x: Tensor, hidden: Tensor) -> Tensor:
        assert self.filter is not None and self.project is not None, "the last block of a tower ends with its tap"
        out = self.project(F.relu6(self.filter(hidden)))
        return x + out if self.residual else out


class ImageTower(nn.Module):
    """Pictures to features."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.stem, 3, 2, 1)
        blocks, inputs = [], config.stem
        for i, (width, expansion, kernel, stride) in enumerate(config.blocks[: config.taps[-1] + 1]):
            blocks.append(_Block(inputs, width, expansion, kernel, stride, whole=i < config.taps[-1]))
            inputs = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, F] of normalized pixels [B, 3, side, side] (see `pixels_of`)."""
        x, taken = F.relu6(self.stem(pixels)), []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            hidden = block.expanded(x)
            if i in self.config.taps:
                taken.append(hidden.mean((2, 3)))
            if i < self.config.taps[-1]:
                x = block.finish(x, hidden)
        return torch.cat(taken, 1)


class DualEncoder(nn.Module):
    """Features and mean text states into one space of unit vectors. MiniLM itself is not in it."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: TowerConfig, *, hidden: int, size: int) -> None:
        """`hidden`: width of the image projection's middle; `size`: of MiniLM's states and of the embeddings."""
        super().__init__()
        self.config, self.hidden, self.size = config, hidden, size
        self.tower = ImageTower(config)
        self.register_buffer("feature_mean", torch.zeros(config.num_features))
        self.register_buffer("feature_scale", torch.ones(config.num_features))
        self.image_in = nn.Linear(config.num_features, hidden)
        self.image_out = nn.Linear(hidden, size)
        self.text_projection = nn.Linear(size, size)

    def embed_features(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, size] of tower features [B, F]."""
        return self.project(self.standardized(features))

    def standardized(self, features: Tensor) -> Tensor:
        """Features [B, F] with mean 0 and deviation about 1, by the training pictures' statistics."""
        return (features - self.feature_mean) * self.feature_scale

    def project(self, standardized: Tensor) -> Tensor:
        """Unit embeddings [B, size] of standardized features [B, F]."""
        return F.normalize(self.image_out(F.gelu(self.image_in(standardized))), dim=-1)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit embeddings [B, size] of normalized pixels [B, 3, side, side]."""
        return self.embed_features(self.tower(pixels))

    def embed_states(self, means: Tensor) -> Tensor:
        """Unit embeddings [B, size] of texts' mean token states [B, size] (see `mean_states`)."""
        return F.normalize(self.text_projection(F.normalize(means, dim=-1)), dim=-1)


def mean_states(states: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] of token states [B, L, D] where the mask [B, L] is true: MiniLM's own sentence embedding."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def fit_square(picture: np.ndarray, side: int) -> np.ndarray:
    """A uint8 picture [H, W, 3], scaled to fit a white square of `side` pixels and centred there: [side, side, 3]."""
    if picture.shape[:2] == (side, side):
        return picture
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    if size == (side, side):
        return np.asarray(resized)
    canvas = Image.new("RGB", (side, side), _WHITE)
    canvas.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(canvas)


def pixels_of(pictures: Sequence[np.ndarray], side: int) -> Tensor:
    """Normalized pixels float32 [B, 3, side, side] of uint8 pictures [H, W, 3]."""
    squares = torch.from_numpy(np.stack([fit_square(picture, side) for picture in pictures]))
    unit = (squares.float() / 255.0 - torch.tensor(_MEAN)) / torch.tensor(_STD)
    return unit.permute(0, 3, 1, 2)  # channels last in memory, as the convolutions like it


def publish_dual_encoder(folder: Path, model: DualEncoder, trained: dict[str, Any]) -> Path:
    """Write the weights as fp16 and the manifest, each atomically; returns the weights' path.

    Raises:
        CheckpointError: a weight is not finite in fp16.
    """
    tensors = {name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"weights: {broken[:5]} are not finite in fp16; nothing is published")
    architecture = {"tower": model.config.to_json(), "hidden": model.hidden, "size": model.size}
    header = {"format": FORMAT, "model": json.dumps(architecture), "trained": json.dumps(trained)}
    path = folder / FILE
    write_atomic(path, save(tensors, metadata=header))
    write_json(folder / MANIFEST, {FILE: {"sha256": sha256_file(path), "bytes": path.stat().st_size}})
    return path


def load_dual_encoder(folder: Path, *, device: str = "cpu") -> tuple[DualEncoder, str, Mapping[str, Any]]:
    """Load strictly: the model in evaluation mode, the file's sha256, and what the file says of its training.

    Raises:
        CheckpointError: the file is missing, altered, cut short, or of another format; the message names it.
    """
    path = folder / FILE
    line = read_manifest(folder).get(FILE)
    if line is None or not path.is_file():
        raise CheckpointError(f"weights: {path} is missing (the manifest {'names' if line else 'does not name'} it)")
    digest = sha256_file(path)
    if digest != line["sha256"]:
        raise CheckpointError(
            f"weights: {path} is corrupted: sha256 {digest[:12]}…, manifest {line['sha256'][:12]}…, {path.stat().st_size} bytes"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise CheckpointError(f"weights: {path} has format {header.get('format')!r}, expected {FORMAT!r}")
        described, trained = json.loads(header["model"]), json.loads(header["trained"])
        config = TowerConfig.from_json(described["tower"])
        model = DualEncoder(config, hidden=int(described["hidden"]), size=int(described["size"]))
        model.load_state_dict(tensors, strict=True)
    except CheckpointError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"weights: {path} is damaged ({error})") from None
    model = model.to(device).to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    model.requires_grad_(False)
    return model, digest, trained
