"""`reimagen kb`: knowledge bases are made, filled, looked into and changed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.command_line import BadInput, connected, print_json, print_table, read_file, split_pair
from client.display import make_display
from client.generation_messages import METHODS
from client.outputs import write_output, write_outputs
from client.retrieval_types import FacetSpec, Filter, Lookup, Pair

VALUE = "{value}"


def add_kb(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands and their flags."""
    kb = commands.add_parser("kb", help="knowledge bases").add_subparsers(required=True, metavar="COMMAND")
    json_flag = argparse.ArgumentParser(add_help=False)
    json_flag.add_argument("--json", action="store_true", help="print JSON")

    def command(name: str, body: Any, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        parser = kb.add_parser(name, parents=[shared, json_flag], help=text)
        if named:
            parser.add_argument("name", metavar="NAME", help="of the knowledge base")
        parser.set_defaults(body=body)
        return parser

    command("list", _list, "all of them", named=False)
    _add_create_flags(command("create", _create, "make one"))
    command("delete", _delete, "remove one with all its pairs")
    _add_add_flags(command("add", _add, "add or replace pairs"))
    get = command("get", _get, "one pair")
    get.add_argument("pair_id", metavar="ID")
    get.add_argument("--out", type=Path, metavar="FILE", help="write its picture here")
    remove = command("remove", _remove, "remove pairs")
    remove.add_argument("pair_ids", nargs="+", metavar="ID")
    _add_search_flags(command("search", _search, "the best pairs for a prompt or a picture"))
    command("stats", _stats, "sizes and state of one")


def _add_create_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--facet",
        action="append",
        default=[],
        metavar=f'NAME="{VALUE} words"=A,B',
        help=f'what prompts may name, e.g. style="{VALUE} style"=noto,twemoji; may be repeated',
    )
    parser.add_argument(
        "--alike",
        action="append",
        default=[],
        metavar="NAME=VALUE:A,B",
        help="what stands in for a facet's value, the most alike first, e.g. style=noto:twemoji; may be repeated",
    )
    parser.add_argument("--scene-phrase", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--embedding-size", type=int, default=0, metavar="N", help="default: that of the CLIP model")


def _add_add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", nargs="+", metavar="IMAGE=CAPTION", help="a file, and what it shows")
    parser.add_argument("--pair-id", default="", metavar="ID", help="of one pair (default: the file's name)")
    parser.add_argument("--facet", action="append", default=[], metavar="NAME=VALUE", help="of all; may be repeated")
    for credit in ("entity", "author", "source", "license"):
        parser.add_argument(f"--{credit}", default="", metavar="TEXT", help=f"{credit} of all these pairs")
    parser.add_argument("--safe", action="store_true", help="declare all of them safe")


def _add_search_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to look for")
    parser.add_argument("--k", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--method", choices=METHODS, default="", help="how")
    parser.add_argument("--exclude-pair", action="append", default=[], metavar="ID", help="may be repeated")
    parser.add_argument("--exclude-exact", action="store_true", help="leave out the very pair that is asked for")
    parser.add_argument("--facet", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--license", action="append", default=[], metavar="ID", help="may be repeated")
    parser.add_argument("--source", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the pictures here")


def _list(flags: argparse.Namespace) -> int:
    with connected(flags, retrieval=True) as client:
        bases = list(client.knowledge_bases.list())
    if flags.json:
        print_json(bases)
    else:
        print_table(
            ("name", "embeddings", "model", "created"),
            [(base.name, base.embedding_size, base.embedding_model, base.created_at) for base in bases],
        )
    return 0


def _create(flags: argparse.Namespace) -> int:
    facets = _with_likeness([_facet_spec(text) for text in flags.facet], flags.alike)
    with connected(flags, retrieval=True) as client:
        made = client.knowledge_bases.create(
            flags.name, facets=facets, scene_phrases=flags.scene_phrase, embedding_size=flags.embedding_size
        )
    if flags.json:
        print_json(made)
    else:
        print(made.name)
    return 0


def _delete(flags: argparse.Namespace) -> int:
    with connected(flags, retrieval=True) as client:
        client.knowledge_bases.delete(flags.name)
    return 0


def _add(flags: argparse.Namespace) -> int:
    if flags.pair_id and len(flags.pairs) > 1:
        raise BadInput(f"--pair-id: {flags.pair_id!r} cannot name {len(flags.pairs)} pairs")
    facets = dict(split_pair("--facet", text) for text in flags.facet)
    files = [split_pair("IMAGE=CAPTION", text) for text in flags.pairs]
    for path, _ in files:
        if not os.access(path, os.R_OK):
            raise BadInput(f"IMAGE=CAPTION: {path}: cannot be read")

    def pairs() -> Iterator[Pair]:
        for path, caption in files:
            yield Pair(
                pair_id=flags.pair_id or Path(path).stem,
                caption=caption,
                image=read_file("IMAGE=CAPTION", Path(path)),
                facets=facets,
                safe=flags.safe,
                entity=flags.entity,
                author=flags.author,
                source=flags.source,
                license=flags.license,
            )

    display = make_display()
    outcomes = []
    with connected(flags, retrieval=True) as client, display.live():
        for outcome in client.knowledge_bases.upsert(flags.name, pairs()):
            display.built("pairs", len(files), outcome.pair_id)
            outcomes.append(outcome)
    if flags.json:
        print_json(outcomes)
    else:
        for outcome in outcomes:
            why = (f"{outcome.field}: {outcome.reason}",) if outcome.reason else ()
            print("\t".join((outcome.pair_id, outcome.outcome, *why)))
    rejected = [outcome for outcome in outcomes if outcome.outcome == "rejected"]
    if rejected:
        first = rejected[0]
        raise BadInput(f"{len(rejected)} rejected; {first.pair_id}: {first.field}: {first.reason}")
    return 0


def _get(flags: argparse.Namespace) -> int:
    with connected(flags, retrieval=True) as client:
        pair = client.knowledge_bases.get(flags.name, flags.pair_id, include_image=flags.out is not None)
    if flags.out:
        write_output(flags.out, pair.image)
    if flags.json:
        print_json(pair)
    else:
        fields = ("pair_id", "caption", "entity", "author", "source", "license", "image_format", "image_sha256")
        print_table(("field", "value"), [(field, getattr(pair, field)) for field in fields])
    return 0


def _remove(flags: argparse.Namespace) -> int:
    with connected(flags, retrieval=True) as client:
        num_removed = client.knowledge_bases.delete_pairs(flags.name, flags.pair_ids)
    print_json({"num_removed": num_removed}) if flags.json else print(num_removed)
    return 0


def _search(flags: argparse.Namespace) -> int:
    facets: dict[str, list[str]] = {}
    for name, value in (split_pair("--facet", text) for text in flags.facet):
        facets.setdefault(name, []).append(value)
    lookup = Lookup(
        prompt=flags.prompt,
        knowledge_base=flags.name,
        k=flags.k,
        method=flags.method,
        image=read_file("--image", flags.image) if flags.image else b"",
        excluded_pair_ids=tuple(flags.exclude_pair),
        exclude_exact=flags.exclude_exact,
        filter=Filter(facets=facets, licenses=tuple(flags.license), sources=tuple(flags.source)),
        omit_images=flags.out is None,
    )
    with connected(flags, retrieval=True) as client:
        found = client.knowledge_bases.retrieve(lookup)
    if flags.out:
        files = {f"neighbor-{n.rank}.{n.pair.image_format}": n.pair.image for n in found.neighbors if n.pair.image}
        write_outputs(flags.out, files)
    if flags.json:
        print_json(found)
    else:
        rows = [
            (n.rank, f"{n.score:.3f}", n.pair.pair_id, n.pair.caption, n.pair.author, n.pair.license)
            for n in found.neighbors
        ]
        print_table(("rank", "score", "pair", "caption", "author", "license"), rows)
    return 0


def _stats(flags: argparse.Namespace) -> int:
    with connected(flags, retrieval=True) as client:
        stats = client.knowledge_bases.stats(flags.name)
    if flags.json:
        print_json(stats)
    else:
        numbers = [(name, value) for name, value in vars(stats).items() if name != "knowledge_base"]
        print_table(("what", "how much"), numbers)
    return 0


def _facet_spec(text: str) -> FacetSpec:
    """style="{value} style"=noto,twemoji"""
    parts = text.split("=")
    if len(parts) != 3 or VALUE not in parts[1]:
        raise BadInput(f"--facet: {text!r} is not of the form NAME={VALUE} words=A,B")
    name, template, values = parts
    return FacetSpec(name=name, template=template, values=tuple(filter(None, values.split(","))))


def _with_likeness(facets: list[FacetSpec], texts: Sequence[str]) -> list[FacetSpec]:
    """The facets, with what style=noto:twemoji,fxemoji says of each."""
    alike: dict[str, dict[str, tuple[str, ...]]] = {facet.name: {} for facet in facets}
    for text in texts:
        name, said = split_pair("--alike", text)
        value, colon, others = said.partition(":")
        if not colon:
            raise BadInput(f"--alike: {text!r} is not of the form NAME=VALUE:A,B")
        if name not in alike:
            raise BadInput(f"--alike: {text!r} is of {name!r}, which no --facet names")
        if value in alike[name]:
            raise BadInput(f"--alike: {text!r} says again what stands in for {value!r}")
        alike[name][value] = tuple(filter(None, others.split(",")))
    return [replace(facet, alike=alike[facet.name]) for facet in facets]
