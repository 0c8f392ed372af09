"""Published weights: what was written is what is loaded, and whatever is not right is refused by the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import CheckpointError, load_stage, publish_stage
from common.files import sha256_file, write_atomic
from common.unet.unet import UNet

NAME = "unet_64.safetensors"


@pytest.fixture
def published(tmp_path: Path, base_config, make_unet) -> tuple[Path, UNet]:
    """A weights folder with a first stage, and the U-Net that was published."""
    unet = make_unet(base_config, torch.float32)
    publish_stage(tmp_path, 64, base_config, unet.state_dict(), {"examples": 12, "preset": "tiny"})
    return tmp_path, unet


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Rewrite the file with changed tensors or header, and a manifest that vouches for it."""
    path = folder / NAME
    with safe_open(path, framework="pt") as file:
        tensors, header = {n: file.get_tensor(n) for n in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    vouch(folder)


def vouch(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[NAME]["sha256"] = sha256_file(folder / NAME)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, *named: str, size: int = 64) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_stage(folder, size)
    for name in named:
        assert name in str(caught.value), f"{caught.value} does not name {name}"


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_a_publisher_that_is_stopped_leaves_the_old_weights_or_the_new(
    published: tuple[Path, UNet], base_config, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of the three writes, twice over, then let through."""
    folder, unet = published
    known = {load_stage(folder, 64).sha256}
    for factor in (2.0, 3.0):
        weights = {name: tensor * factor for name, tensor in unet.state_dict().items()}
        writes = 0

        def write(path: Path, content: bytes | str) -> None:
            nonlocal writes
            writes += 1
            if writes == stopped_at:
                raise KeyboardInterrupt
            write_atomic(path, content)

        with monkeypatch.context() as patched:
            patched.setattr("common.checkpoint.write_atomic", write)
            patched.setattr("common.checkpoint.write_json", lambda path, said: write(path, json.dumps(said)))
            with pytest.raises(KeyboardInterrupt):
                publish_stage(folder, 64, base_config, weights, {})
        known.add(load_stage(folder, 64).sha256)
    publish_stage(folder, 64, base_config, weights, {})
    assert set(json.loads((folder / "manifest.json").read_text())[NAME]) == {"sha256", "bytes", "stage"}
    assert len(known) == (1 if stopped_at < 3 else 3)


def test_round_trip(published: tuple[Path, UNet], base_config, make_inputs, predict) -> None:
    folder, unet = published
    loaded = load_stage(folder, 64)
    assert loaded.unet.config == base_config
    assert loaded.trained == {"examples": 12, "preset": "tiny"}
    assert loaded.sha256 == sha256_file(folder / NAME)
    assert not loaded.unet.training
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor.half().float(), atol=0, rtol=0)
    inputs = make_inputs(base_config, dtype=torch.float32)
    torch.testing.assert_close(predict(loaded.unet, inputs), predict(unet, inputs), atol=2e-2, rtol=2e-2)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path, base_config, make_unet) -> None:
    weights, said = make_unet(base_config).state_dict(), {"examples": 12}
    paths = [publish_stage(tmp_path / str(i), 64, base_config, weights, said) for i in range(8)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_dtype_is_chosen_when_loading(published: tuple[Path, UNet]) -> None:
    assert load_stage(published[0], 64, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert load_stage(published[0], 64).unet.dtype == torch.float32


def test_stages_share_a_manifest_and_publishing_again_replaces(
    published: tuple[Path, UNet], super_resolution_config, make_unet
) -> None:
    folder, unet = published
    publish_stage(folder, 256, super_resolution_config, make_unet(super_resolution_config).state_dict(), {})
    better = {n: t + 0.5 for n, t in unet.state_dict().items()}
    publish_stage(folder, 64, unet.config, better, {"examples": 13})
    assert set(json.loads((folder / "manifest.json").read_text())) == {NAME, "unet_256.safetensors"}
    assert load_stage(folder, 64).trained == {"examples": 13}
    assert load_stage(folder, 256).unet.config.scale == 4
    torch.testing.assert_close(load_stage(folder, 64).unet.stem.bias, better["stem.bias"].half().float())


def test_cut_file(published: tuple[Path, UNet]) -> None:
    path = published[0] / NAME
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(published[0], str(path), "corrupted")
    vouch(published[0])  # a manifest made after the cut cannot vouch for it either
    refused(published[0], str(path))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_no_safetensors_file(published: tuple[Path, UNet], content: bytes) -> None:
    path = published[0] / NAME
    path.write_bytes(content)
    vouch(published[0])
    refused(published[0], str(path))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_flipped_byte(published: tuple[Path, UNet], place: float) -> None:
    path = published[0] / NAME
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    refused(published[0], str(path), "corrupted")


def test_missing_file(published: tuple[Path, UNet]) -> None:
    (published[0] / NAME).unlink()
    refused(published[0], str(published[0] / NAME), "missing")


def test_stage_that_was_never_published(published: tuple[Path, UNet]) -> None:
    refused(published[0], "unet_1024.safetensors", size=1024)


def test_missing_manifest(published: tuple[Path, UNet]) -> None:
    (published[0] / "manifest.json").unlink()
    refused(published[0], str(published[0] / "manifest.json"))


@pytest.mark.parametrize(
    "content", ["", "{", '["unet_64.safetensors"]', '{"unet_64.safetensors": {"bytes": 3}}', "\udcff"]
)
def test_damaged_manifest(published: tuple[Path, UNet], content: str) -> None:
    (published[0] / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(published[0], str(published[0]))


def test_missing_tensor(published: tuple[Path, UNet]) -> None:
    rewrite(published[0], lambda tensors, header: tensors.__delitem__("stem.bias"))
    refused(published[0], str(published[0] / NAME), "stem.bias")


def test_extra_tensor(published: tuple[Path, UNet]) -> None:
    rewrite(published[0], lambda tensors, header: tensors.update({"stem.extra": torch.zeros(1)}))
    refused(published[0], str(published[0] / NAME), "stem.extra")


def test_wrong_shape(published: tuple[Path, UNet]) -> None:
    rewrite(published[0], lambda tensors, header: tensors.update({"stem.bias": torch.zeros(9)}))
    refused(published[0], str(published[0] / NAME), "stem.bias", "(9,)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_published(tmp_path: Path, base_config, make_unet, value: float) -> None:
    weights = make_unet(base_config, torch.float32).state_dict()
    weights["head.bias"][0] = value
    with pytest.raises(ValueError, match=r"head\.bias"):
        publish_stage(tmp_path, 64, base_config, weights, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", "reimagen-stage/9"), ("format", None), ("unet", None), ("unet", "{"), ("unet", "{}"), ("trained", "{")],
)
def test_damaged_header(published: tuple[Path, UNet], name: str, value: str | None) -> None:
    def change(tensors: dict[str, Any], header: dict[str, str]) -> None:
        header.pop(name)
        if value is not None:
            header[name] = value

    rewrite(published[0], change)
    refused(published[0], str(published[0] / NAME))


def test_another_architecture_in_the_header(published: tuple[Path, UNet]) -> None:
    other = replace(published[1].config, widths=(8, 24))
    rewrite(published[0], lambda tensors, header: header.update(unet=json.dumps(other.to_json())))
    refused(published[0], str(published[0] / NAME))


def test_a_file_of_another_stage_under_this_name(
    published: tuple[Path, UNet], super_resolution_config, make_unet
) -> None:
    """Renamed by hand, with a manifest that vouches for its bytes: its header still says whose it is."""
    folder = published[0]
    publish_stage(folder, 256, super_resolution_config, make_unet(super_resolution_config).state_dict(), {})
    (folder / "unet_256.safetensors").replace(folder / NAME)
    vouch(folder)
    refused(folder, str(folder / NAME))
