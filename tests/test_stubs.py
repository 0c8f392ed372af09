"""Every generated stub imports: the pinned generator and the installed protobuf and grpcio agree."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[1] / "proto"
FILES = sorted(path.relative_to(PROTO).with_suffix("") for path in PROTO.rglob("*.proto"))


def test_there_are_protos() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=str)
@pytest.mark.parametrize("suffix", ["_pb2", "_pb2_grpc"])
def test_a_stub_imports(file: Path, suffix: str) -> None:
    module = importlib.import_module(".".join(file.parts) + suffix)
    if suffix == "_pb2":
        assert module.DESCRIPTOR.package == ".".join(file.parts[:-1])
