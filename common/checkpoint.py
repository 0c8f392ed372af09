"""Published stage weights: safetensors whose header carries the architecture, checked against a manifest of sha256.

A weights folder holds `manifest.json` and one `unet_<size>.safetensors` for each stage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import sha256_file, write_atomic, write_json
from common.unet.config import UNetConfig
from common.unet.unet import UNet

FORMAT = "reimagen-stage/1"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """Weights are missing, altered, cut short, or not of this architecture; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class StageWeights:
    """A loaded stage: its U-Net in evaluation mode, the file's sha256, and what the file says of its training."""

    unet: UNet
    sha256: str
    trained: Mapping[str, Any]


def publish_stage(
    folder: Path,
    size: int,
    config: UNetConfig,
    weights: Mapping[str, Tensor],
    trained: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a stage's weights and its line of the manifest; returns the weights' path.

    Stopped at any moment, the folder holds the old weights or the new ones: until the new file has taken the old one's
    place, the manifest names both. One publisher at a time: another one waits.

    Args:
        dtype: of the numbers in the file: float16, or bfloat16 for weights that float16 does not hold.

    Raises:
        CheckpointError: a weight is not finite in that; nothing is written.
    """
    path = folder / f"unet_{size}.safetensors"
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"weights: {broken[:5]} are not finite in {dtype}; nothing is published")
    header = {
        "format": FORMAT,
        "stage": str(size),
        "unet": json.dumps(config.to_json()),
        "trained": json.dumps(trained),
    }
    content = _in_order(save(tensors, metadata=header))
    line: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "stage": size}
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
        there = sha256_file(path) if path.is_file() else ""
        both = line | ({"replaces": there} if _vouched(there, manifest.get(path.name, {})) else {})
        write_json(folder / MANIFEST, dict(sorted((manifest | {path.name: both}).items())))
        write_atomic(path, content)
        write_json(folder / MANIFEST, dict(sorted((manifest | {path.name: line}).items())))
    return path


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which are written in any order: the same weights are the same bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)  # tensors begin at a multiple of eight
    return len(said).to_bytes(8, "little") + said + content[end:]


def _vouched(digest: str, line: Mapping[str, Any]) -> bool:
    """Whether a line of the manifest is of a file with this sha256."""
    return bool(digest) and digest in (line.get("sha256"), line.get("replaces"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder, waiting for whoever does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a weights folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"weights: {path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"weights: {path} is not JSON ({error})") from None
    if not isinstance(manifest, dict) or not all(isinstance(v, dict) and "sha256" in v for v in manifest.values()):
        raise CheckpointError(f"weights: {path} does not give each file's sha256")
    return manifest


def load_stage(folder: Path, size: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> StageWeights:
    """Load a stage strictly: every tensor there, none unknown, every shape right, bytes as the manifest says.

    Raises:
        CheckpointError: any of that is not so.
    """
    path = folder / f"unet_{size}.safetensors"
    line = read_manifest(folder).get(path.name)
    if line is None or not path.is_file():
        raise CheckpointError(f"weights: {path} is missing (the manifest {'names' if line else 'does not name'} it)")
    digest = sha256_file(path)
    if not _vouched(digest, line):
        raise CheckpointError(
            f"weights: {path} is corrupted: sha256 {digest[:12]}…, manifest {line['sha256'][:12]}…, {path.stat().st_size} bytes"
        )
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"weights: {path} is no safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"weights: {path} has format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("stage") != str(size):
        raise CheckpointError(f"weights: {path} is of stage {header.get('stage')!r}, not {size}")
    try:
        config, trained = UNetConfig.from_json(json.loads(header["unet"])), json.loads(header["trained"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"weights: {path} has a damaged header ({error!r})") from None
    unet = build_unet(config, tensors, path)
    unet = unet.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    unet.requires_grad_(False)
    return StageWeights(unet=unet, sha256=digest, trained=trained)


def build_unet(config: UNetConfig, tensors: Mapping[str, Tensor], path: Path) -> UNet:
    """A U-Net of this architecture with these weights; `path` is named when they do not fit."""
    unet = UNet(config)
    expected = unet.state_dict()
    if set(tensors) != set(expected):
        raise CheckpointError(f"weights: {path} lacks or adds tensors: {sorted(set(tensors) ^ set(expected))[:5]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"weights: {path}: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )
    dtype = next(iter(tensors.values())).dtype
    unet = unet.to(dtype=dtype, device=next(iter(tensors.values())).device)
    unet.load_state_dict(dict(tensors), strict=True)
    return unet
