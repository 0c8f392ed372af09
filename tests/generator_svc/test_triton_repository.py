"""Versions on a real tritonserver: a broken one is never served, the one before it goes on; who may ask for what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from common.checkpoint import MANIFEST, publish_stage
from common.files import sha256_file
from deploy.local.children import ChildFailed
from deploy.local.tritonserver import ADMIN_HEADER, TritonServer, TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from generator_svc.model_versions import CONFIG, version_policy
from generator_svc.stage_tensors import StageRequest, pack_texts, unpack_encoded
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import TINY_UNETS, tiny_unet
from tests.generator_svc.triton_server import Admin, inputs_of, stream

MODEL = "unet_64"


@pytest.fixture
def repository(triton_repository: Path, tmp_path: Path) -> Path:
    """A repository of the first stage alone, to be damaged."""
    shutil.copytree(triton_repository / MODEL, tmp_path / "repository" / MODEL)
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A tritonserver over it."""
    settings = TritonSettings(repository=repository, log=tmp_path / "triton.log", exit_on_error=False)
    with running_triton(settings) as running:
        yield running


def draw(server: TritonServer) -> tuple[np.ndarray, str]:
    """A picture, and the version that drew it."""
    with stream(server) as opened:
        opened.send(MODEL, StageRequest(plans=plans(64, 3, 2), inputs=text_inputs(1, 2)), name="a")
        last = opened.finish({"a"})["a"][-1]
    assert last.pictures is not None and last.model is not None
    return last.pictures, last.model.version


def other_weights(weights: Path, folder: Path) -> Path:
    """The weights, but for a first stage that draws something else."""
    shutil.copytree(weights, folder)
    weights = {name: tensor * 1.1 for name, tensor in tiny_unet(64).state_dict().items()}
    publish_stage(folder, 64, TINY_UNETS[64], weights, {"examples": 1})
    return folder


def cut(version: Path) -> None:
    path = version / f"{MODEL}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def alter(version: Path) -> None:
    path = version / f"{MODEL}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lose_weights(version: Path) -> None:
    (version / f"{MODEL}.safetensors").unlink()


def not_finite(version: Path) -> None:
    """Whole by its sha256, and yet no network."""
    path = version / f"{MODEL}.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    path.write_bytes(content[: 8 + header] + b"\x00\x7c" * ((len(content) - 8 - header) // 2))
    (version / MANIFEST).write_text(json.dumps({path.name: {"sha256": sha256_file(path)}}))


BROKEN = (cut, alter, lose_weights, not_finite)


def test_a_broken_version_never_serves_and_the_old_one_goes_on(
    server: TritonServer, repository: Path, weights: Path, tmp_path: Path
) -> None:
    admin = Admin(server)
    before, version = draw(server)
    assert version == "1"
    settings = ExportSettings(
        weights=other_weights(weights, tmp_path / "w"), repository=tmp_path / "next", threads=1, batches="1"
    )
    export(settings)
    new = repository / MODEL / "2"
    config = (repository / MODEL / CONFIG).read_text()
    (repository / MODEL / CONFIG).write_text(config.replace(version_policy(1), version_policy(2)))
    for damage in BROKEN:
        shutil.copytree(tmp_path / "next" / MODEL / "1", new)
        damage(new)
        said = admin.load(MODEL)
        assert said, f"{damage.__name__}: loaded"
        assert not admin.is_ready(MODEL, "2") and admin.is_ready(MODEL, "1"), damage.__name__
        again, version = draw(server)
        assert version == "1" and again.tobytes() == before.tobytes(), damage.__name__
        shutil.rmtree(new)
    shutil.copytree(tmp_path / "next" / MODEL / "1", new)
    assert admin.load(MODEL) == ""
    after, version = draw(server)
    assert version == "2" and np.abs(after - before).max() > 0.01


def test_a_broken_version_ends_the_start_where_errors_do(repository: Path, tmp_path: Path) -> None:
    alter(repository / MODEL / "1")
    settings = TritonSettings(repository=repository, log=tmp_path / "triton.log", control="none")
    with pytest.raises(ChildFailed, match="corrupted"), running_triton(settings):
        pass


def test_versions_are_published_whole_and_only_when_they_differ(weights: Path, tmp_path: Path) -> None:
    settings = ExportSettings(weights=weights, repository=tmp_path / "r", threads=1)
    assert set(export(settings).values()) == {1} and set(export(settings).values()) == {1}
    newer = ExportSettings(weights=other_weights(weights, tmp_path / "w"), repository=tmp_path / "r", threads=1)
    assert export(newer) == {"unet_64": 2, "unet_256": 1, "unet_1024": 1, "text_encoder": 1}
    assert sorted(p.name for p in (tmp_path / "r" / MODEL).iterdir()) == ["1", "2", "config.pbtxt"]


def closed(call: Callable[[], object]) -> bool:
    """Whether the call is refused for want of the key."""
    try:
        call()
    except InferenceServerException as error:
        return "restricted" in str(error).lower() or "unavailable" in str(error.status()).lower()
    return False


def test_all_but_inference_health_and_metadata_needs_the_key(triton_server: TritonServer) -> None:
    client = triton.InferenceServerClient(triton_server.address)
    closed_calls: list[Callable[[], object]] = [
        lambda: client.load_model(MODEL),
        lambda: client.unload_model(MODEL),
        lambda: client.get_model_repository_index(),
        lambda: client.get_model_config(MODEL),
        lambda: client.get_inference_statistics(MODEL),
        lambda: client.get_trace_settings(MODEL),
        lambda: client.get_log_settings(),
        lambda: client.register_system_shared_memory("a", "/a", 8),
        lambda: client.get_system_shared_memory_status(),
        lambda: client.register_cuda_shared_memory("a", b"", 0, 8),
    ]
    assert [i for i, call in enumerate(closed_calls) if not closed(call)] == []
    assert client.is_server_ready() and client.get_model_metadata(MODEL)
    key = {ADMIN_HEADER: triton_server.admin_key}
    assert len(client.get_model_repository_index(headers=key).models) == 4  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    client.close()


def test_the_text_encoder_is_the_packaged_one(triton_server: TritonServer) -> None:
    client = triton.InferenceServerClient(triton_server.address)
    long, short = "a guide dog, noto style, on a blue background", "a dog"

    def encode(*texts: str) -> tuple[np.ndarray, np.ndarray]:
        result = client.infer("text_encoder", inputs_of(pack_texts(texts)))
        assert result is not None
        encoded = unpack_encoded({name: np.array(result.as_numpy(name)) for name in ("states", "mask")})
        return encoded.states, encoded.mask

    states, mask = encode(long, short)
    alone, alone_mask = encode(short)
    assert states.shape == (2, mask.shape[1], 384) and mask[0].all() and alone_mask.all()
    assert mask[1].sum() == alone.shape[1] < mask.shape[1]
    assert np.abs(states[1, : alone.shape[1]] - alone[0]).max() < 1e-5 and not states[1, alone.shape[1] :].any()
    for wrong in ([], [1]):
        with pytest.raises(InferenceServerException, match=r"InvalidArgument.*texts"):
            client.infer("text_encoder", inputs_of(pack_texts(wrong)))  # type: ignore[arg-type]
    client.close()
