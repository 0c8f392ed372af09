"""`python -m evaluation coco | wikiimages`: the paper's sweeps on a user's local copy, through a running generator."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from client import Client, GenerationFailed
from common.files import sha256_file
from evaluation.entitydraw.progress import make_progress
from evaluation.photographs.drawing import Drawing
from evaluation.photographs.local_copy import LocalCopy, open_local_copy
from evaluation.photographs.measuring import Encoders
from evaluation.photographs.protocol import (
    NO_NEIGHBORS,
    PROTOCOLS,
    WEIGHTS_64,
    WEIGHTS_256,
    Protocol,
    Sampling,
    sweep,
)
from evaluation.photographs.run import Measured, run_sweep
from evaluation.scores.inception import InceptionFeatures
from retrieval_svc.clip import ClipEmbedder, packaged_clip

_CALL_S = 3600.0


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `coco` and `wikiimages`."""
    for protocol in PROTOCOLS:
        parser = commands.add_parser(
            protocol.name,
            help=f"the paper's sweep on a local copy of {protocol.name}: FID, CMMD, CLIP score",
            description=f"Draw {protocol.prompts:,} prompts of a local copy of {protocol.name} at 256 pixels for every pair of"
            " guidance weights and every knowledge base, and score them. May be interrupted and run again.",
        )
        _add_flags(parser, protocol)
        parser.set_defaults(body=lambda flags, protocol=protocol: _run(protocol, flags))


def _add_flags(parser: argparse.ArgumentParser, protocol: Protocol) -> None:
    where = "annotations/captions_val*.json" if protocol.name == "coco" else "WebQA's JSON of the validation split"
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help=f"local copy: {where}")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="its pictures, where they are not beside it as retrieval's import expects",
    )
    parser.add_argument("--generator", required=True, metavar="HOST:PORT", help="a running generator")
    parser.add_argument(
        "--knowledge-base",
        action="append",
        default=[],
        metavar="LABEL=NAME",
        help="a knowledge base of the generator's retrieval, e.g. in-domain=coco-train or out-of-domain=laion; repeatable",
    )
    parser.add_argument("--without-neighbors", action="store_true", help="draw from the text alone, too")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="results; a run that is there goes on"
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="pytorch-fid's pt_inception-2015-12-05 weights; without them no FID",
    )
    parser.add_argument(
        "--clip",
        default=packaged_clip(),
        metavar="MODEL",
        help="folder or hub name of a CLIP; default: the packaged one",
    )
    parser.add_argument(
        "--clip-prefix", default="", metavar="TEXT", help="before each caption; Hessel et al.: 'A photo depicts '"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=protocol.prompts,
        metavar="N",
        help="captions drawn at random; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions and of the pictures; default: 0")
    parser.add_argument(
        "--weights-64", type=float, nargs="+", default=list(WEIGHTS_64), metavar="W", help="default: %(default)s"
    )
    parser.add_argument(
        "--weights-256",
        nargs="+",
        default=[f"{weight:g}" for weight in WEIGHTS_256],
        metavar="W",
        help="default: %(default)s; none: that stage is not guided (it reads neither text nor neighbors)",
    )
    parser.add_argument("--steps-64", type=int, default=Sampling.steps_64, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps-256", type=int, default=Sampling.steps_256, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--sampler", choices=("ddpm", "ddim", "dpmpp_2m"), default=Sampling.sampler, help="default: %(default)s"
    )
    parser.add_argument("--k", type=int, default=Sampling.k, help="neighbors; default: %(default)s, as in the paper")
    parser.add_argument(
        "--method", choices=("bm25", "clip", "hybrid"), default="", help="of retrieval; default: the service's"
    )
    parser.add_argument(
        "--calls", type=int, default=4, metavar="N", help="to the generator at once; default: %(default)s"
    )
    parser.add_argument(
        "--keep-pictures", type=int, metavar="N", help="of each point; the others go once measured; default: all"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the encoders")


def _run(protocol: Protocol, flags: argparse.Namespace) -> None:
    for name, least in (
        ("prompts", 2),
        ("calls", 1),
        ("steps_64", 1),
        ("steps_256", 1),
        ("k", 1),
        ("keep_pictures", 0),
    ):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is less than {least}")
    points = sweep(_bases(flags), flags.weights_64, [_weight(text) for text in flags.weights_256])
    copy = open_local_copy(protocol, flags.source, flags.images, flags.prompts, flags.seed)
    sampling = Sampling(
        steps_64=flags.steps_64, steps_256=flags.steps_256, sampler=flags.sampler, k=flags.k, method=flags.method
    )
    device = "cuda" if flags.device != "cpu" and torch.cuda.is_available() else "cpu"
    encoders = Encoders(
        clip=ClipEmbedder(flags.clip, device=flags.device),
        inception=InceptionFeatures(flags.inception, device=device) if flags.inception else None,
        prefix=flags.clip_prefix,
    )
    with Client(flags.generator) as client:
        drawing = Drawing(
            client=client,
            sampling=sampling,
            calls=flags.calls,
            timeout_s=_CALL_S,
            keep_pictures=flags.keep_pictures,
        )
        described = _described(protocol, flags, copy, sampling, encoders, client)
        measured = run_sweep(flags.out, protocol, copy, points, encoders, drawing, described, make_progress())
    print("\n".join(_table(measured, copy, flags.out)))


def _bases(flags: argparse.Namespace) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for text in flags.knowledge_base:
        label, _, name = text.partition("=")
        if not name or label == NO_NEIGHBORS or not label.replace("-", "").isalnum():
            raise ValueError(
                f"--knowledge-base: {text!r} is not LABEL=NAME with a label of letters, digits and hyphens"
            )
        found.append((label, name))
    if flags.without_neighbors:
        found.append((NO_NEIGHBORS, ""))
    return found


def _weight(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise ValueError(f"--weights-256: {text!r} is neither a number nor none") from None


def _described(
    protocol: Protocol,
    flags: argparse.Namespace,
    copy: LocalCopy,
    sampling: Sampling,
    encoders: Encoders,
    client: Client,
) -> dict[str, Any]:
    try:
        models = client.models()
    except GenerationFailed as error:
        raise GenerationFailed(error.code, f"--generator: {flags.generator}: {error.description}") from error
    return {
        "protocol": protocol.name,
        "source": copy.fingerprint,
        "prompts": len(copy.prompts),
        "rejected": copy.rejected,
        "seed": flags.seed,
        "sampling": asdict(sampling),
        "clip": encoders.clip.name,
        "clip_prefix": encoders.prefix,
        "inception": sha256_file(flags.inception) if flags.inception else None,
        "weights": {str(stage.stage): stage.weights_sha256 for stage in models.stages},
        "text_encoder": models.text_encoder,
    }


def _table(measured: list[Measured], copy: LocalCopy, out: Path) -> list[str]:
    lines = [
        f"{len(copy.prompts)} prompts, {len(copy.references)} reference pictures",
        "point | FID | CMMD | CLIP score | neighbors a picture",
    ]
    for each in measured:
        fid = "-" if each.scores.fid is None else f"{each.scores.fid:.3f}"
        lines.append(
            f"{each.point.name} | {fid} | {each.scores.cmmd:.3f} | {each.scores.clip_score} | {each.scores.neighbors:.2f}"
        )
    best = json.loads((out / "results.json").read_text(encoding="utf-8"))["best"]
    return [*lines, *(f"best of {label}: {name}" for label, name in best.items()), f"results: {out / 'results.json'}"]
