"""A pair as a caller gives it becomes a pair that can be stored, or is refused with the field at fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.images import ImageError
from common.pictures import Picture, take_in
from common.service.errors import InvalidArgument, ServiceError
from retrieval_svc.manifest import MAX_FACET_VALUES, MAX_FACETS, Manifest, facet_name_fault
from retrieval_svc.pairs import NewPair, StoredPair, has_control_characters
from retrieval_svc.query import Vocabulary, value_key
from retrieval_svc.query_rules import check_embedding

MAX_PAIR_ID_BYTES, MAX_CAPTION_CHARACTERS, MAX_TEXT_CHARACTERS = 200, 2000, 2000
MAX_FACET_VALUE_CHARACTERS = 200
MAX_ATTRIBUTES, MAX_ATTRIBUTE_BYTES = 256, 65_536  # of all attributes together

_LINE_BREAKS = str.maketrans("", "", "\t\n\r")  # captions of the web hold them

UriReader = Callable[[str], bytes]


class PairRejected(Exception):
    """A pair that cannot be stored."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(kw_only=True)
class Draft:
    """A pair on its way into the store; it has no version yet.

    Attributes:
        position: in the request.
        picture: what is stored; None for a pair that has a URI alone.
        look: what is embedded; None where there is nothing to embed.
        embedding: float32 [D] of unit length.
        pair: set by `laid_down`.
    """

    position: int
    new: NewPair
    picture: Picture | None
    look: Picture | None
    embedding: np.ndarray | None
    pair: StoredPair = field(default_factory=lambda: StoredPair(pair_id="", caption="", entity=""))


@dataclass(frozen=True, kw_only=True)
class FacetSpellings:
    """How the values of the manifest's facets are spelled: facet name to `value_key` to value."""

    known: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, manifest: Manifest) -> FacetSpellings:
        """Those of a manifest."""
        return cls(known={f.name: {value_key(value): value for value in f.values} for f in manifest.facets})

    def new_values(self, facets: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
        """Values that the manifest's facets do not have yet."""
        fresh: dict[str, dict[str, str]] = {}
        for named in facets:
            for name, value in named.items():
                if name in self.known and value_key(value) not in self.known[name]:
                    fresh.setdefault(name, {}).setdefault(value_key(value), value)
        return {name: list(values.values()) for name, values in fresh.items()}

    def spelled(self, facets: Mapping[str, str]) -> dict[str, str]:
        """`facets` in the manifest's spelling."""
        return {name: self.known.get(name, {}).get(value_key(value), value) for name, value in facets.items()}


def begin_draft(
    new: NewPair,
    position: int,
    *,
    manifest: Manifest,
    spellings: FacetSpellings,
    read_uri: UriReader | None,
    known_pictures: Mapping[str, str],
) -> Draft:
    """Check a pair and take its picture in; one of the `known_pictures` (format by sha256) is stored, and so was taken in.

    Raises:
        PairRejected: something about it cannot be; the field is named as in knowledge_base.proto.
    """
    _check_texts(new)
    _check_facets(new.facets, spellings)
    if not new.image and not new.image_uri:
        raise PairRejected("image", "is missing, and so is image_uri")
    known = known_pictures.get(hashlib.sha256(new.image).hexdigest()) if known_pictures else None
    picture = Picture(image=new.image, format=known) if known else None
    if picture is None and new.image:
        picture = _taken_in(new.image, "image")
    look, embedding = picture, None
    if new.embedding is not None:
        embedding = _unit(new.embedding, manifest)
    elif picture is None and manifest.embedding_size and read_uri is not None:
        look = _read(new.image_uri, read_uri)
    return Draft(position=position, new=new, picture=picture, look=look, embedding=embedding)


def laid_down(draft: Draft, vocabulary: Vocabulary, spellings: FacetSpellings) -> StoredPair:
    """The pair to store; an entity or facets that are not given are those of the caption. Its version is 0."""
    new, picture = draft.new, draft.picture
    entity, facets = new.entity, spellings.spelled(new.facets)
    if not entity or not facets:
        caption = vocabulary.understand_caption(new.caption)
        entity = entity or ", ".join((caption.entity, *caption.details))
        facets = facets or dict(caption.facets)
    return StoredPair(
        pair_id=new.pair_id,
        caption=new.caption,
        entity=entity,
        facets=facets,
        author=new.author,
        source=new.source,
        license=new.license,
        safe=new.safe,
        image_sha256=hashlib.sha256(picture.image).hexdigest() if picture else "",
        image_format=picture.format if picture else "",
        image_uri=new.image_uri,
        attributes=dict(new.attributes),
    )


def _check_texts(new: NewPair) -> None:
    if not 1 <= _num_bytes(new.pair_id) <= MAX_PAIR_ID_BYTES or has_control_characters(new.pair_id):
        raise PairRejected(
            "pair_id", f"{new.pair_id[:40]!r} is not 1 to {MAX_PAIR_ID_BYTES} bytes without control characters"
        )
    if not new.caption.strip() or len(new.caption) > MAX_CAPTION_CHARACTERS:
        raise PairRejected(
            "caption", f"has {len(new.caption.strip())} characters; 1 to {MAX_CAPTION_CHARACTERS} are taken"
        )
    for name in ("caption", "entity", "image_uri", "author", "source", "license"):
        text = getattr(new, name)
        if len(text) > MAX_TEXT_CHARACTERS:
            raise PairRejected(name, f"has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are taken")
        if has_control_characters(text if name == "image_uri" else text.translate(_LINE_BREAKS)):
            raise PairRejected(name, "holds control characters")
    if len(new.attributes) > MAX_ATTRIBUTES:
        raise PairRejected("attributes", f"holds {len(new.attributes)}; at most {MAX_ATTRIBUTES} are taken")
    size = sum(_num_bytes(name) + _num_bytes(value) for name, value in new.attributes.items())
    if size > MAX_ATTRIBUTE_BYTES or "" in new.attributes:
        raise PairRejected("attributes", f"has {size} bytes of at most {MAX_ATTRIBUTE_BYTES}, or one without a name")
    if any(has_control_characters(t.translate(_LINE_BREAKS)) for item in new.attributes.items() for t in item):
        raise PairRejected("attributes", "holds control characters")


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _check_facets(facets: Mapping[str, str], spellings: FacetSpellings) -> None:
    if len(facets) > MAX_FACETS:
        raise PairRejected("facets", f"holds {len(facets)}; at most {MAX_FACETS} are taken")
    for name, value in facets.items():
        if fault := facet_name_fault(name):
            raise PairRejected("facets", fault)
        if not value.strip() or len(value) > MAX_FACET_VALUE_CHARACTERS or has_control_characters(value):
            raise PairRejected(
                "facets", f"{name} {value[:40]!r} is not 1 to {MAX_FACET_VALUE_CHARACTERS} characters of plain text"
            )
        known = spellings.known.get(name)
        if known is None:
            continue
        key = value_key(value)
        if not key:
            raise PairRejected("facets", f"{name} {value!r} holds no word that a prompt could name")
        if key not in known and len(known) >= MAX_FACET_VALUES:
            raise PairRejected("facets", f"{name} {value!r} would be one value more than {MAX_FACET_VALUES}")


def _unit(embedding: np.ndarray, manifest: Manifest) -> np.ndarray:
    if manifest.embedding_size == 0:
        raise PairRejected("embedding", f"knowledge base {manifest.name!r} has no embeddings")
    try:
        check_embedding("embedding", embedding, manifest.embedding_size)
    except InvalidArgument as error:
        raise PairRejected("embedding", error.violations[0][1]) from None
    wide = embedding.astype(np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def _taken_in(image: bytes, field: str) -> Picture:
    try:
        return take_in(image)
    except ImageError as error:
        raise PairRejected(field, str(error).removeprefix("image: ")) from None


def _read(uri: str, read_uri: UriReader) -> Picture | None:
    """The picture at an address that the operator allows; None: it may not be read."""
    try:
        image = read_uri(uri)
    except (OSError, ValueError, ServiceError) as error:
        raise PairRejected("image_uri", f"cannot be read ({error})") from None
    return _taken_in(image, "image_uri") if image else None
