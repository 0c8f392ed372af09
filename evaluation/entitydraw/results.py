"""The folder that a run leaves: pictures, what shaped each of them, and what was measured.

Layout (the contract with whoever reads a run: scores, rating, report)::

    RUN/run.json            suite (name, sha256, file), systems (their rows), generator (models, weights), versions, command,
                            pictures a prompt, started and finished (RFC 3339, UTC; finished is null until all is drawn)
    RUN/pictures/<system>/<prompt id>/<seed>.png    as the service gave it, its record inside
    RUN/pictures.jsonl      a row a picture, see `PictureRow`; sorted by system, prompt and seed once the run is finished
    RUN/references/<sha256>.<svg|png|jpg|webp>      each reference and neighbor once, named by the sha256 of its content
    RUN/scores.jsonl        a row a picture: system, prompt_id, seed, sha256 of the picture, scores (name to number or null)
    RUN/figures.json        what the scores say together: see `evaluation.entitydraw.figures`

Paths in rows are relative to RUN, with `/`. System names and prompt ids hold a-z, 0-9 and hyphens alone, so that they are
names of folders anywhere.

A picture counts from the moment its file has its name: files come by rename, references before the pictures that name
them, rows after. A row that is missing is made again from the record in the picture, so a run that was killed goes on
where it was, draws nothing twice, and counts nothing half-written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import write_atomic, write_json

FORMAT = "reimagen-entitydraw-run/1"


class RunError(ValueError):
    """A run's folder is not what it should be; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class NeighborRow:
    """A pair that shaped a picture.

    Attributes:
        pair_id: its id in the knowledge base; empty for a reference that was given.
        file: the picture's file, relative to RUN; empty where the run was given none.
        is_reference: whether the suite gave it, and retrieval did not find it.
    """

    pair_id: str
    caption: str
    entity: str
    file: str
    sha256: str
    is_reference: bool
    author: str = ""
    source: str = ""
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One picture of a run.

    Attributes:
        system: name of the row of `run.json` that drew it.
        prompt: the text that was drawn.
        category, entity: as the suite names them.
        frequency: the suite's number; see `frequent`.
        frequent: whether the entity is in the top half of its category by frequency.
        other: the entity that was mixed in or stood in its place, of systems that do so; else empty.
        file: relative to RUN.
        sha256: of the file.
        neighbors: in the order in which the generator had them.
        suite_references: files of the suite's own reference pictures of the entity, relative to RUN.
        seconds: of the call, by the number of its pictures; None where the row was made again from the picture.
    """

    system: str
    prompt_id: str
    prompt: str
    category: str
    entity: str
    frequency: float
    frequent: bool
    seed: int
    file: str
    sha256: str
    neighbors: tuple[NeighborRow, ...] = ()
    suite_references: tuple[str, ...] = ()
    other: str = ""
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What a run has one of."""
        return self.system, self.prompt_id, self.seed

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PictureRow:
        """Inverse of `asdict`; a TypeError where a name is missing or unknown."""
        given = dict(document)
        given["neighbors"] = tuple(NeighborRow(**neighbor) for neighbor in given.get("neighbors", ()))
        given["suite_references"] = tuple(given.get("suite_references", ()))
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """What was measured of one picture; None where a score does not apply to it (a corner that no prompt names)."""

    system: str
    prompt_id: str
    seed: int
    sha256: str
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """The picture's."""
        return self.system, self.prompt_id, self.seed


class RunFolder:
    """A run's folder, read and written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, str] | None = None  # names of the references' files by sha256

    @property
    def run_file(self) -> Path:
        """Says what was run."""
        return self.path / "run.json"

    @property
    def rows_file(self) -> Path:
        """A row a picture."""
        return self.path / "pictures.jsonl"

    @property
    def scores_file(self) -> Path:
        """A row of scores a picture."""
        return self.path / "scores.jsonl"

    @property
    def figures_file(self) -> Path:
        """What the scores say together."""
        return self.path / "figures.json"

    @staticmethod
    def digest(sha256s: Iterable[str]) -> str:
        """One sha256 that names many files."""
        return hashlib.sha256("\n".join(sha256s).encode()).hexdigest()

    def read_run(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            RunError: there is none, or it is another format's.
        """
        try:
            document = json.loads(self.run_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"run: {self.run_file} does not exist") from None
        except ValueError as error:
            raise RunError(f"run: {self.run_file} is not JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise RunError(f"run: {self.run_file} is not of format {FORMAT!r}")
        return document

    def write_run(self, document: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        write_json(self.run_file, {"format": FORMAT, **document})

    def picture_file(self, system: str, prompt_id: str, seed: int) -> Path:
        """Where a picture is, or will be."""
        return self.path / "pictures" / system / prompt_id / f"{seed}.png"

    def has_pictures(self, system: str = "*") -> bool:
        """Whether anything was drawn, of a system or at all."""
        return next(self.path.glob(f"pictures/{system}/*/*.png"), None) is not None

    def relative(self, path: Path) -> str:
        """As rows name a file."""
        return path.relative_to(self.path).as_posix()

    def keep_reference(self, image: bytes, image_format: str) -> str:
        """Write a neighbor's or reference's file, once; gives its name in rows."""
        sha256 = hashlib.sha256(image).hexdigest()
        if not (file := self.reference_by_sha256(sha256)):
            file = f"references/{sha256}.{image_format}"
            write_atomic(self.path / file, image)
            self._kept_references()[sha256] = file
        return file

    def reference_by_sha256(self, sha256: str) -> str:
        """Name in rows of a file that is kept; empty where none is."""
        return self._kept_references().get(sha256, "")

    def _kept_references(self) -> dict[str, str]:
        if self._kept is None:
            found = sorted((self.path / "references").glob("[0-9a-f]*.*"))
            self._kept = {path.stem: self.relative(path) for path in found}
        return self._kept

    def rows(self) -> list[PictureRow]:
        """The rows whose pictures are there; of two with one key the later. A line cut short by a kill is left out.

        Raises:
            RunError: a line in the middle is no row.
        """
        found: dict[tuple[str, str, int], PictureRow] = {}
        for number, document in self._lines(self.rows_file):
            try:
                row = PictureRow.from_json(document)
            except (TypeError, ValueError) as error:
                raise RunError(f"run: {self.rows_file}:{number} is no row of a picture ({error})") from None
            if (self.path / row.file).is_file():
                found[row.key] = row
        return list(found.values())

    def append(self, row: PictureRow) -> None:
        """Add a row at the end."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.rows_file.open("a", encoding="utf-8") as stream:
            stream.write(_line(asdict(row)))

    def write_rows(self, rows: Iterable[PictureRow]) -> None:
        """Write all rows, sorted."""
        ordered = sorted(rows, key=lambda row: row.key)
        write_atomic(self.rows_file, "".join(_line(asdict(row)) for row in ordered))

    def scores(self) -> list[ScoreRow]:
        """The scores that are there; none before anything was measured.

        Raises:
            RunError: a line in the middle is no row.
        """
        found: list[ScoreRow] = []
        for number, document in self._lines(self.scores_file):
            try:
                found.append(ScoreRow(**document))
            except TypeError as error:
                raise RunError(f"run: {self.scores_file}:{number} is no row of scores ({error})") from None
        return found

    def write_scores(self, rows: Iterable[ScoreRow]) -> None:
        """Write all scores, sorted."""
        ordered = sorted(rows, key=lambda row: row.key)
        write_atomic(self.scores_file, "".join(_line(asdict(row)) for row in ordered))

    def _lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
            except ValueError:
                if number == len(lines):
                    return
                raise RunError(f"run: {path}:{number} is not JSON") from None
            if not isinstance(document, dict):
                raise RunError(f"run: {path}:{number} is no row")
            yield number, document


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n"
