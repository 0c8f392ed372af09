"""The formats by name, and which one a source is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval_svc.imports.coco import is_coco, open_coco
from retrieval_svc.imports.corpus_folder import open_corpus
from retrieval_svc.imports.imagefolder import METADATA, open_imagefolder
from retrieval_svc.imports.json_files import read_json
from retrieval_svc.imports.parquet import open_parquet
from retrieval_svc.imports.records import Options, Source, SourceError
from retrieval_svc.imports.webdataset import open_webdataset
from retrieval_svc.imports.wikiimages import open_wikiimages

FORMATS: Mapping[str, Callable[[Path, Options], Source]] = {
    "imagefolder": open_imagefolder,
    "webdataset": open_webdataset,
    "parquet": open_parquet,
    "coco": open_coco,
    "wikiimages": open_wikiimages,
    "corpus": open_corpus,
}


def open_source(path: Path, kind: str, options: Options) -> Source:
    """The source at `path`; `kind` is one of `FORMATS` or "auto".

    Raises:
        SourceError: there is nothing there, or nothing of that format.
        CorpusError: the same of a corpus.
    """
    if not path.exists():
        raise SourceError(f"import: {path} does not exist")
    return FORMATS[detect(path) if kind == "auto" else kind](path, options)


def detect(path: Path) -> str:
    """The format of what is at `path`, by its files' names; of a JSON file by its parts.

    Raises:
        SourceError: it cannot be told.
    """
    if path.is_dir():
        if (path / "corpus.json").is_file():
            return "corpus"
        if any((path / name).is_file() for name in METADATA):
            return "imagefolder"
        # img2dataset writes a parquet beside each shard.
        return next(
            (kind for kind, glob in (("webdataset", "*.tar"), ("parquet", "*.parquet")) if any(path.glob(glob))),
            "imagefolder",
        )
    suffix = path.suffix.lower()
    if suffix == ".json":
        return "coco" if is_coco(read_json("import", path)) else "wikiimages"
    if suffix in (".tar", ".parquet"):
        return "webdataset" if suffix == ".tar" else "parquet"
    raise SourceError(f"import: the format of {path} cannot be told; name it with --format")
