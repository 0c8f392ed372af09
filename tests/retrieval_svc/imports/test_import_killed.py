"""kill -9 in the middle of an import: a later run goes on, and in the end everything is there, once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from retrieval_svc.__main__ import main
from retrieval_svc.library import Library
from tests.retrieval_svc.imports.small_sources import picture, write_shard

ROOT = Path(__file__).parents[3]
NUM_PICTURES = 1400  # two batches
KILLS = 2


def test_a_killed_import_goes_on(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(NUM_PICTURES):
        members |= {f"k{number:05}.png": picture(number), f"k{number:05}.txt": b"a pet"}
        if number % 100 == 0:
            members[f"bad{number:05}.jpg"] = picture(number)  # has no caption
    shard = write_shard(tmp_path / "pets.tar", members)
    data = tmp_path / "data"
    flags = ["import", str(shard), "--knowledge-base", "pets", "--data", str(data)]
    command = [sys.executable, "-m", "retrieval_svc", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    rng = random.Random(7)
    for kill in range(KILLS):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        _wait_for_pictures(
            data, process, rng.randrange(NUM_PICTURES * kill // KILLS + 1, NUM_PICTURES * (kill + 1) // KILLS)
        )
        process.kill()
        process.wait()
    assert main(flags) == 0
    report = data / "pets" / "imports" / "pets.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"bad{number:05}" for number in range(0, NUM_PICTURES, 100)]
    summary = json.loads(report.with_name("pets.jsonl.summary.json").read_text())
    assert summary["records"] == NUM_PICTURES + len(lines) and summary["replaced"] == 0
    with closing(Library.open(data)) as library:
        stats = library.get("pets").stats()
        assert stats.num_pairs == stats.num_indexed_pairs == stats.num_images == NUM_PICTURES
    assert sorted(path.name for path in report.parent.iterdir()) == ["pets.jsonl", "pets.jsonl.summary.json"]


def _wait_for_pictures(data: Path, process: subprocess.Popen[bytes], count: int) -> None:
    """Until so many pictures are stored, or the import has ended."""
    images = data / "pets" / "images"
    give_up = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < give_up:
        if sum(1 for folder in images.glob("??") for _ in folder.iterdir()) >= count:
            return
        time.sleep(0.05)
