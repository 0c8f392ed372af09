"""COCO captions: `captions_*.json` (Lin et al. 2014; Chen et al. 2015) and a folder of pictures.

COCO tells five captions a picture. One pair is made of each picture with its first caption (the one of the lowest
annotation id), or with "all" one pair of each caption; the first keeps the picture's key either way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retrieval_svc.imports.json_files import read_json
from retrieval_svc.imports.picture_files import file_within, reader
from retrieval_svc.imports.records import (
    Options,
    Record,
    Rejected,
    Source,
    SourceError,
    Unreadable,
    fingerprint_of,
    plain,
    record_of,
    source_name,
)

_TOLD_OTHERWISE = ("id", "file_name", "license", "flickr_url", "coco_url")


def is_coco(document: Any) -> bool:
    """Whether a JSON document has the parts of COCO's."""
    return isinstance(document, dict) and {"images", "annotations"} <= set(document)


def open_coco(path: Path, options: Options) -> Source:
    """The captions in the file `path`.

    Raises:
        SourceError: it is no such file, or the folder of pictures is not found.
    """
    document = read_json("coco", path)
    if not is_coco(document) or not all(isinstance(document[part], list) for part in ("images", "annotations")):
        raise SourceError(f"coco: {path} lacks the lists 'images' and 'annotations'")
    images = options.images or _images_beside(path)
    if not images.is_dir():
        raise SourceError(f"coco: --images: {images} is not a folder")
    return Source(
        name=options.name or source_name(path.stem),
        fingerprint=fingerprint_of("coco", options, [path]),
        records=partial(_records, document, images, options),
        num_records=None if options.captions == "all" else len(document["images"]),
    )


def _images_beside(path: Path) -> Path:
    """`<root>/annotations/captions_val2017.json` describes `<root>/val2017`."""
    split = path.stem.removeprefix("captions_")
    for folder in (path.parent.parent / split, path.parent / split, path.parent / "images"):
        if folder.is_dir():
            return folder
    raise SourceError(f"coco: no folder {split!r} beside {path}; name the pictures' with --images")


def _records(document: Mapping[str, Any], images: Path, options: Options) -> Iterator[Record | Rejected]:
    captions, strays = _captions(document)
    licenses = {
        entry["id"]: plain(entry.get("name")) or plain(entry.get("url"))
        for entry in document.get("licenses") or ()
        if isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
    }
    for number, entry in enumerate(document["images"]):
        try:
            yield from _of_picture(entry, captions, licenses, images, options)
        except Unreadable as error:
            key = plain(entry.get("file_name")) if isinstance(entry, dict) else ""
            yield Rejected(key=key or f"images[{number}]", reason=error.reason, detail=error.detail)
    yield from strays


def _captions(document: Mapping[str, Any]) -> tuple[dict[Any, list[str]], list[Rejected]]:
    """Captions by image id in the order of annotation ids; and the annotations that belong to no picture."""
    known = {image["id"] for image in document["images"] if isinstance(image, dict) and _is_id(image.get("id"))}
    found: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    strays = []
    for number, entry in enumerate(document["annotations"]):
        image = entry.get("image_id") if isinstance(entry, dict) else None
        if not _is_id(image) or image not in known:
            strays.append(Rejected(key=f"annotations[{number}]", reason="caption of no picture", detail=f"{image!r}"))
        elif text := plain(entry.get("caption")):
            order = str(entry.get("id", number)).rjust(20, "0")
            found[image].append((order, text))
    return {image: [text for _, text in sorted(captions)] for image, captions in found.items()}, strays


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _of_picture(
    entry: Any, captions: Mapping[Any, list[str]], licenses: Mapping[Any, str], images: Path, options: Options
) -> Iterator[Record]:
    if not isinstance(entry, dict) or not _is_id(entry.get("id")):
        raise Unreadable("metadata unreadable", "an entry of 'images' without id")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise Unreadable("no file name", f"picture {entry['id']}")
    texts = captions.get(entry["id"])
    if not texts:
        raise Unreadable("no caption")
    load = reader(file_within(images, name))
    license_id = entry.get("license")
    for index, text in enumerate(texts if options.captions == "all" else texts[:1]):
        key = Path(name).stem + (f"-{index + 1}" if index else "")
        record = record_of(key, entry, options=options, load=load, caption=text, used=_TOLD_OTHERWISE)
        yield replace(
            record,
            source=plain(entry.get("flickr_url")) or plain(entry.get("coco_url")),
            license=licenses.get(license_id, "") if _is_id(license_id) else "",
        )
