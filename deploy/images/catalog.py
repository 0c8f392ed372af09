"""Which images there are: what each is built from, and which locks it may be built with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "images"
PACKAGES = FOLDER / "packages"
BASES = ROOT / "build" / "images" / "bases.json"  # what `digests` found


@dataclass(frozen=True, kw_only=True)
class Base:
    """An image of others that ours begin with.

    Attributes:
        registry: host that is asked for it.
        repository, tag: what it is called there.
        argument: of the build, which takes its digest.
        published: a digest of its index that was read in published records (README.md says which), not asked of the registry;
            empty: none that two records agree on.
    """

    registry: str
    repository: str
    tag: str
    argument: str
    published: str = ""

    @property
    def name(self) -> str:
        """As a Dockerfile says it, without the digest."""
        return (
            f"{'docker.io' if self.registry == 'registry-1.docker.io' else self.registry}/{self.repository}:{self.tag}"
        )


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What an environment is made of: `packages/NAME.in` names packages, `packages/NAME.lock` every file by its sha256.

    Attributes:
        name: of the files.
        python: version that it is for.
    """

    name: str
    python: str

    @property
    def names(self) -> Path:
        """The file of names, whose versions requirements.txt has."""
        return PACKAGES / f"{self.name}.in"

    @property
    def path(self) -> Path:
        """The file of versions and hashes."""
        return PACKAGES / f"{self.name}.lock"


DEBIAN = Base(
    registry="registry-1.docker.io",
    repository="library/debian",
    tag="bookworm-slim",
    argument="DEBIAN_DIGEST",
    published="sha256:3783cc01769c7b2b1b83a5c5ad96c815348e28ed7da68e2e3687004faa906251",  # of bookworm-20260918-slim
)
TRITON = Base(registry="nvcr.io", repository="nvidia/tritonserver", tag="26.07-py3", argument="TRITON_DIGEST")
BASE_IMAGES = (DEBIAN, TRITON)

DEBIAN_PYTHON = "3.11"  # of Debian bookworm
TRITON_PYTHON = "3.12"  # of the container; its Dockerfile refuses another one
LOCKS = (
    *(
        Lock(name=name, python=DEBIAN_PYTHON)
        for name in ("generator", "retrieval", "retrieval-clip", "stubs", "trainer", "trainer-cpu")
    ),
    Lock(name="triton", python=TRITON_PYTHON),
    Lock(name="triton-stubs", python=TRITON_PYTHON),
)

# Each image, with the locks that its build's argument LOCK may name, the default first.
IMAGES: dict[str, tuple[str, ...]] = {
    "retrieval": ("retrieval", "retrieval-clip"),
    "generator": ("generator",),
    "trainer": ("trainer", "trainer-cpu"),
    "triton": ("triton",),
    "models": (),
}


def dockerfile(image: str) -> Path:
    """Of an image.

    Raises:
        ValueError: there is no such image.
    """
    if image not in IMAGES:
        raise ValueError(f"image: {image!r} is none of {', '.join(IMAGES)}")
    return FOLDER / f"{image}.Dockerfile"
