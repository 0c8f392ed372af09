"""The restore drill on a tiny library, over real sockets; and that it notices what does not come back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.local.knowledge_base import LIBRARY, NAME
from deploy.operators import restore_drill
from deploy.operators.__main__ import main


def test_a_snapshot_comes_back_as_it_was(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (work / LIBRARY).rglob("*") if path.is_file()}
    assert main(["restore-drill", str(work / LIBRARY), f"--knowledge-base={NAME}"]) == 0
    assert "12 pairs" in (said := capsys.readouterr().out) and "12 lookups answered as before" in said
    assert before == {path: path.read_bytes() for path in (work / LIBRARY).rglob("*") if path.is_file()}


def test_an_answer_that_differs_fails_the_drill(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sequence[str]] = []

    def otherwise(bases: object, name: str, prompts: Sequence[str]) -> list[list[str]]:
        asked.append(prompts)
        return [[f"{len(asked)}"] for _ in prompts]

    monkeypatch.setattr(restore_drill, "answers", otherwise)
    assert main(["restore-drill", str(work / LIBRARY), f"--knowledge-base={NAME}"]) == 2
    assert "found ['1'] before, and ['2'] after" in capsys.readouterr().err


def test_what_cannot_be_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore-drill", str(tmp_path / "no"), "--knowledge-base=demo"]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["restore-drill", str(work / LIBRARY), "--knowledge-base=other"]) == 2
    assert "other" in capsys.readouterr().err
