"""What an import leaves behind: the rejected records, a summary, and until it has ended the place to go on from.

Beside the report `R` (JSON lines: key, reason, detail) lie, while an import is under way, `R.part` (the lines so far) and
`R.resume.json` (how far the source is stored); in the end `R` and `R.summary.json` take their place. A resume file
counts only for the very same source, options and knowledge base. Without it an import is as right, only slower: what is
stored already comes back as unchanged.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import sync_folder, write_json
from retrieval_svc.imports.records import Rejected
from retrieval_svc.pairs import Outcome, Upserted

FORMAT = "reimagen-import/1"
CHECKPOINT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of a source's records.

    Attributes:
        created, replaced, unchanged: pairs stored anew, changed, and there already.
        rejected: how many by reason.
        seconds: of this run; an interrupted one before it does not count.
    """

    created: int = 0
    replaced: int = 0
    unchanged: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def num_records(self) -> int:
        return self.created + self.replaced + self.unchanged + self.num_rejected

    def lines(self) -> list[str]:
        """For people."""
        text = f"{self.num_records} records: {self.created} created, {self.replaced} replaced, "
        text += f"{self.unchanged} unchanged, {self.num_rejected} rejected, in {self.seconds:.1f} s"
        return [text, *(f"  {count:8} {reason}" for reason, count in self.rejected.items())]


class Journal:
    """Keeps the report of one import. `position` is how many records of the source are done."""

    def __init__(self, report: Path, *, fingerprint: str) -> None:
        """Go on with the report of an interrupted import of this fingerprint, or begin one.

        Raises:
            OSError: the folder cannot be written.
        """
        self._report = report
        self._part = report.with_name(f"{report.name}.part")
        self._resume = report.with_name(f"{report.name}.resume.json")
        self._fingerprint = fingerprint
        self._started = time.monotonic()
        self._saved = self._started
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self.position = 0
        report.parent.mkdir(parents=True, exist_ok=True)
        length = self._load()
        self.resumed_at = self.position
        self._stream = self._part.open("r+b" if length else "wb")
        self._stream.truncate(length)
        self._stream.seek(length)

    def _load(self) -> int:
        """Take up what the resume file says; gives how much of the lines so far belongs to it, in bytes."""
        try:
            saved = json.loads(self._resume.read_bytes())
            if saved["format"] != FORMAT or saved["fingerprint"] != self._fingerprint:
                return 0
            position, length = int(saved["position"]), int(saved["report_bytes"])
            counts = {str(name): int(count) for name, count in saved["counts"].items()}
            reasons = {str(name): int(count) for name, count in saved["rejected"].items()}
            if length and self._part.stat().st_size < length:
                return 0
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return 0  # none, or not one of ours: the import begins anew, which is right as well
        self.position, self._counts, self._reasons = position, Counter(counts), Counter(reasons)
        return length

    def reject(self, rejected: Rejected) -> None:
        """Write down a record that is not taken."""
        self._reasons[rejected.reason] += 1
        line = json.dumps(asdict(rejected))  # ASCII: a key may hold half of a surrogate pair
        self._stream.write(line.encode() + b"\n")

    def stored(self, outcomes: Iterable[tuple[str, Upserted]]) -> None:
        """Count what became of pairs (by the keys of their records) that went to the knowledge base."""
        for key, result in outcomes:
            if result.outcome is Outcome.REJECTED:
                self.reject(Rejected(key=key, reason=f"refused: {result.field or 'pair'}", detail=result.reason))
            else:
                self._counts[result.outcome.value] += 1

    def checkpoint(self, position: int, *, now: bool = False) -> None:
        """All records before `position` are done. Written to disk every few seconds, or `now`.

        Raises:
            OSError: the disk is full.
        """
        self.position = position
        if not now and time.monotonic() - self._saved < CHECKPOINT_S:
            return
        self._sync()
        document = {"format": FORMAT, "fingerprint": self._fingerprint, "position": position}
        document |= {"report_bytes": self._stream.tell(), "counts": self._counts, "rejected": self._reasons}
        write_json(self._resume, document)
        self._saved = time.monotonic()

    def finish(self, about: Mapping[str, Any]) -> Summary:
        """The source is at its end: the report and the summary take their places, the resume file goes."""
        summary = Summary(
            created=self._counts[Outcome.CREATED.value],
            replaced=self._counts[Outcome.REPLACED.value],
            unchanged=self._counts[Outcome.UNCHANGED.value],
            rejected=dict(self._reasons.most_common()),
            seconds=round(time.monotonic() - self._started, 3),
        )
        self._sync()
        self._stream.close()
        os.replace(self._part, self._report)
        sync_folder(self._report.parent)
        path = self._report.with_name(f"{self._report.name}.summary.json")
        write_json(path, {"format": FORMAT, **about, "records": summary.num_records, **asdict(summary)})
        self._resume.unlink(missing_ok=True)
        return summary

    def abandon(self) -> None:
        """The import stops before its end: keep what can be kept, whatever the reason was."""
        if not self._stream.closed:
            with suppress(OSError):  # the disk may be full, and what is known from before is right too
                self.checkpoint(self.position, now=True)
            with suppress(OSError):
                self._stream.close()

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
