"""`python -m deploy.images`: locks, digests and builds of images; bills of materials, provenance, signatures."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import sha256_file, write_json
from common.service.command import run_command
from deploy.images import bom, envelope, provenance
from deploy.images.bases import known_digests, write_digests
from deploy.images.building import build_arguments, build_command, run_build, source_revision
from deploy.images.catalog import BASES, IMAGES, LOCKS, ROOT, Lock
from deploy.images.locks import TORCH_INDEX, write_lock

Runner = Callable[[argparse.Namespace], None]
ENGINES = ("docker", "podman")
DAY = re.compile(r"\d{8}T\d{6}Z")  # as snapshot.debian.org names its archives
OF_BASES = f"that `digests` wrote; default: {BASES.relative_to(ROOT)} or, where it is not there, the published ones"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    flags = parser().parse_args(arguments)
    return run_command("deploy.images", lambda: flags.run(flags), expected=(ValueError,))


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.images", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, run: Runner, said: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=said, description=said)
        added.set_defaults(run=run)
        return added

    digests = command("digests", _digests, "ask registries for the digests of what our images begin with")
    digests.add_argument("--out", type=Path, default=BASES, metavar="FILE", help="default: %(default)s")
    lock = command("lock", _lock, "resolve the locks anew, as requirements.txt says")
    lock.add_argument("--torch-index", default=TORCH_INDEX, metavar="PLACE", help="of torch for processors")
    lock.add_argument("--upgrade", action="store_true", help="newer versions of what requirements.txt does not name")
    build = command("build", _build, "build an image")
    build.add_argument("image", choices=tuple(IMAGES))
    build.add_argument("--engine", choices=ENGINES, default="docker")
    build.add_argument("--tag", default="", metavar="NAME:TAG", help="default: reimagen/IMAGE:dev")
    build.add_argument("--lock", default="", metavar="LOCK", help="another environment, such as retrieval-clip")
    build.add_argument("--snapshot", default="", metavar="DAY", help="of Debian's archive, such as 20261101T000000Z")
    build.add_argument("--bases", type=Path, metavar="FILE", help=OF_BASES)
    build.add_argument("--context", type=Path, default=ROOT, metavar="FOLDER", help="for models: the model repository")
    build.add_argument("--dry-run", action="store_true", help="print the command, build nothing")
    bill = command("sbom", _sbom, "write a bill of materials (CycloneDX 1.6)")
    what = bill.add_mutually_exclusive_group(required=True)
    what.add_argument("--environment", type=Path, metavar="PYTHON", help="of the Python that is there")
    what.add_argument("--weights", type=Path, metavar="FOLDER", help="of published weights")
    bill.add_argument("--out", type=Path, required=True, metavar="FILE")
    _add_statements(command)
    return made


def _add_statements(command: Callable[[str, Runner, str], argparse.ArgumentParser]) -> None:
    weights = command("provenance-weights", _provenance_weights, "write where a file of weights comes from (SLSA 1)")
    weights.add_argument("weights", type=Path, metavar="FILE")
    weights.add_argument("--commit", default="", help="of the code that trained it; default: that published it")
    image = command("provenance-image", _provenance_image, "write where an image comes from (SLSA 1)")
    image.add_argument("image", choices=tuple(IMAGES))
    image.add_argument("--sha256", required=True, metavar="DIGEST", help="of the image, as the registry calls it")
    image.add_argument("--lock", default="", metavar="LOCK")
    image.add_argument("--snapshot", default="", metavar="DAY")
    image.add_argument("--bases", type=Path, metavar="FILE", help=OF_BASES)
    for added in (weights, image):
        added.add_argument("--builder", default=provenance.BUILDER, metavar="URI", help="who says so")
        added.add_argument("--out", type=Path, required=True, metavar="FILE")
    sign = command("sign", _sign, "put a statement in a signed envelope (DSSE)")
    sign.add_argument("statement", type=Path, metavar="FILE")
    sign.add_argument("--key", type=Path, required=True, metavar="PEM", help="private, PKCS #8")
    sign.add_argument("--out", type=Path, required=True, metavar="FILE")
    verify = command("verify", _verify, "whether a statement is signed by a key's owner, and of a file")
    verify.add_argument("envelope", type=Path, metavar="FILE")
    verify.add_argument("--key", type=Path, required=True, metavar="PEM", help="public")
    verify.add_argument("--of", type=Path, required=True, metavar="FILE", help="whose sha256 it must be of")


def _digests(flags: argparse.Namespace) -> None:
    for argument, value in write_digests(flags.out).items():
        print(f"{argument}={value}")


def _lock(flags: argparse.Namespace) -> None:
    for lock in LOCKS:
        write_lock(lock, torch_index=flags.torch_index, upgrade=flags.upgrade)
        print(lock.path.relative_to(ROOT), flush=True)


def _build(flags: argparse.Namespace) -> None:
    arguments = _arguments(flags)
    tag = flags.tag or f"reimagen/{flags.image}:dev"
    command = build_command(flags.engine, flags.image, tag, arguments, context=flags.context)
    print(" ".join(command), flush=True)
    if not flags.dry_run:
        run_build(command, arguments["CREATED"])


def _arguments(flags: argparse.Namespace) -> dict[str, str]:
    if flags.snapshot and not DAY.fullmatch(flags.snapshot):
        raise ValueError(f"--snapshot: {flags.snapshot!r} is no day of Debian's archive, such as 20261101T000000Z")
    revision, created = source_revision()
    digests = known_digests(flags.bases) if IMAGES[flags.image] else {}
    return build_arguments(
        flags.image, digests, lock=flags.lock, snapshot=flags.snapshot, revision=revision, created=created
    )


def _sbom(flags: argparse.Namespace) -> None:
    if flags.weights is not None:
        bom.of_weights(flags.weights, flags.out)
    else:
        bom.of_environment(flags.environment, flags.out)
    print(flags.out)


def _provenance_weights(flags: argparse.Namespace) -> None:
    write_json(flags.out, provenance.of_weights(flags.weights, commit=flags.commit, builder=flags.builder))
    print(flags.out)


def _provenance_image(flags: argparse.Namespace) -> None:
    arguments = _arguments(flags)
    if arguments["REVISION"].endswith("-dirty"):
        raise ValueError(f"source: {arguments['REVISION']}: check out the commit that the image was built from")
    lock = Lock(name=arguments["LOCK"], python="").path if "LOCK" in arguments else None
    sha256 = flags.sha256.removeprefix("sha256:")
    made = provenance.of_image(
        flags.image, sha256, lock=lock, arguments=arguments, commit=arguments["REVISION"], builder=flags.builder
    )
    write_json(flags.out, made)
    print(flags.out)


def _sign(flags: argparse.Namespace) -> None:
    statement = _json("statement", flags.statement)
    provenance.check(statement)
    with _naming("--key", flags.key):
        signed = envelope.sign(statement, flags.key.read_bytes())
    write_json(flags.out, signed)
    print(flags.out)


def _verify(flags: argparse.Namespace) -> None:
    document = _json("envelope", flags.envelope)
    with _naming("--key", flags.key):
        key = envelope.public_key(flags.key.read_bytes())
    with _naming("envelope", flags.envelope):
        statement = envelope.verify_file(document, key, flags.of, sha256_file(flags.of))
    provenance.check(statement)
    print(json.dumps(statement["predicate"]["buildDefinition"], indent=2))


def _json(field: str, path: Path) -> Any:
    with _naming(field, path):
        return json.loads(path.read_bytes())


@contextmanager
def _naming(field: str, path: Path) -> Iterator[None]:
    """What is wrong with a file is told with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
