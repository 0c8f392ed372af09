"""The restore drill on a tiny library, over real sockets; and that it notices what does not come back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.local.knowledge_base import LIBRARY, NAME
from deploy.operators import restore_drill
from deploy.operators.__main__ import main


def test_a_snapshot_comes_back_as_it_was(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (work / LIBRARY).rglob("*") if path.is_file()}
    assert main(["restore-drill", str(work / LIBRARY), f"--knowledge-base={NAME}"]) == 0
    assert "12 pairs" in (said := capsys.readouterr().out) and "12 lookups answered as before" in said
    assert before == {path: path.read_bytes() for path in (work / LIBRARY).rglob("*") if path.is_file()}


class Restored:
    """Stands in for a service: each listing gives the next of these lists of ids, the last of them again and again."""

    def __init__(self, *ids: list[str]) -> None:
        self._ids = list(ids)
        self._there = True

    def list_pairs(self, name: str) -> list[SimpleNamespace]:
        ids = self._ids.pop(0) if len(self._ids) > 1 else self._ids[0]
        return [SimpleNamespace(caption=f"a {pair_id}", pair_id=pair_id) for pair_id in ids]

    def snapshot(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(generation=1, num_pairs=2, num_bytes=3)

    def delete(self, name: str) -> None:
        self._there = False

    def list(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=NAME)] if self._there else []


@pytest.mark.parametrize(
    ("ids", "found", "wrong"),
    [
        ([["dog"]], [["1"], ["2"]], "found ['1'] before, and ['2'] after"),
        ([["dog"], ["dog"], ["cat"]], [["1"]], "came back with other pairs"),
        ([["dog"]], [["1"]], ""),
    ],
    ids=["another answer", "other pairs", "all the same"],
)
def test_what_differs_fails_the_drill(
    ids: list[list[str]],
    found: list[list[str]],
    wrong: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of services that are stood in for; the real ones are the first test's."""
    bases, answers = Restored(*ids), list(found)
    monkeypatch.setattr(restore_drill, "served", lambda *_: nullcontext(bases))
    monkeypatch.setattr(restore_drill, "_restore", lambda *_: None)
    monkeypatch.setattr(restore_drill, "answers", lambda *_: [answers.pop(0) if len(answers) > 1 else answers[0]])
    status = main(["restore-drill", str(work / LIBRARY), f"--knowledge-base={NAME}"])
    assert (status, wrong in capsys.readouterr().err) == (2 if wrong else 0, True)


def test_what_cannot_be_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore-drill", str(tmp_path / "no"), "--knowledge-base=demo"]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["restore-drill", str(work / LIBRARY), "--knowledge-base=other"]) == 2
    assert "other" in capsys.readouterr().err
