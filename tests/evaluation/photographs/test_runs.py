"""The sweeps on small made-up copies, through a running stack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy import linalg

from client.picture_record import read_record
from common.images import decode_rgb
from evaluation.__main__ import main
from evaluation.photographs import command, measuring
from evaluation.photographs.local_copy import middle_square, open_local_copy, reference_pictures
from evaluation.photographs.protocol import PROTOCOLS, Sampling, sweep
from evaluation.scores.cmmd import cmmd
from retrieval_svc.clip import ClipEmbedder, packaged_clip

COCO, WIKIIMAGES = PROTOCOLS


class FakeInception:
    """Eight numbers of a picture, in place of 2,048: the real network is tested with the scores."""

    def __init__(self, path: Path, *, device: str) -> None:
        self.path = path

    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        squares = np.stack(pictures).reshape(len(pictures), 2, 128, 2, 128, 3).mean((2, 4)).reshape(len(pictures), -1)
        return squares[:, :8].astype(np.float32)


def evaluate(out: Path, source: Path, address: str, *flags: str, name: str = "coco") -> int:
    fast = ("--prompts", "3", "--steps-64", "2", "--steps-256", "1", "--sampler", "ddim", "--device", "cpu")
    return main([name, "--source", f"{source}", "--generator", address, "--out", f"{out}", *fast, *flags])


@pytest.fixture(scope="module")
def swept(coco: Path, guided_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SHARD", 2)
        patch.setattr(command, "InceptionFeatures", FakeInception)
        flags = ("--knowledge-base", "out-of-domain=demo", "--without-neighbors", "--inception", str(coco))
        assert evaluate(out, coco, guided_address, *flags, "--weights-64", "1", "2", "--weights-256", "5") == 0
    return out


def test_every_point_is_drawn_as_the_protocol_says(swept: Path) -> None:
    results = json.loads((swept / "results.json").read_text())
    assert results["prompts"] == 3 and results["reference_pictures"] == 5, "FID-30K compares with the whole split"
    assert [(p["label"], p["weight_64"], p["weight_256"]) for p in results["points"]] == [
        ("out-of-domain", 1.0, 5.0),
        ("out-of-domain", 2.0, 5.0),
        ("none", 1.0, 5.0),
        ("none", 2.0, 5.0),
    ]
    seeds: dict[str, set[int]] = {}
    for point in results["points"]:
        for path in sorted((swept / "points" / point["point"] / "pictures").iterdir()):
            record = json.loads(read_record(path.read_bytes()))
            small, large = record["plans"]
            assert (small["steps"], large["steps"], large["sampler"]) == (2, 1, "ddim")
            assert small["guidance"]["strategy"] == large["guidance"]["strategy"] == "joint"
            assert (small["guidance"]["text_weight"], large["guidance"]["text_weight"]) == (point["weight_64"], 5.0)
            assert len(record["neighbors"]) in ((0, 2) if point["knowledge_base"] else (0,)), "0: nothing matches"
            assert decode_rgb(path.read_bytes()).shape == (256, 256, 3)
            seeds.setdefault(record["prompt"], set()).add(record["seed"])
    assert [p["neighbors"] > 0 for p in results["points"]] == [True, True, False, False]
    assert len(seeds) == 3 and all(len(found) == 1 for found in seeds.values()), "a prompt has one seed in every point"
    assert Image.open(swept / "sweep.png").width > 500


def test_the_scores_are_those_of_the_pictures_on_disk(swept: Path, coco: Path) -> None:
    """Computed anew from the files, the Frechet distance by its definition."""
    results = json.loads((swept / "results.json").read_text())
    copy = open_local_copy(COCO, coco, None, 3, 0)
    network, clip = FakeInception(coco, device="cpu"), ClipEmbedder(packaged_clip())
    true = list(reference_pictures(copy.references))
    reference = network(true).astype(float)
    for point in results["points"]:
        files = sorted((swept / "points" / point["point"] / "pictures").iterdir())
        pictures = [decode_rgb(path.read_bytes()) for path in files]
        drawn = network(pictures).astype(float)
        covariances = np.cov(drawn, rowvar=False), np.cov(reference, rowvar=False)
        root = np.asarray(linalg.sqrtm(covariances[0] @ covariances[1])).real
        shift = drawn.mean(0) - reference.mean(0)
        wanted = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert point["fid"] == pytest.approx(wanted, rel=1e-3)
        assert point["cmmd"] == pytest.approx(cmmd(clip.images(pictures), clip.images(true)), abs=1e-3)
        texts = clip.texts([prompt.text for prompt in copy.prompts])
        cosines = np.maximum((texts * clip.images(pictures)).sum(1), 0.0)
        assert point["clip_score"]["estimate"] == pytest.approx(2.5 * cosines.mean(), abs=1e-4)
    best = min((p for p in results["points"] if p["label"] == "none"), key=lambda p: p["fid"])
    assert results["best"]["none"] == best["point"]


def test_a_run_goes_on_where_it_was(
    swept: Path,
    coco: Path,
    guided_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measuring, "SHARD", 2)
    monkeypatch.setattr(command, "InceptionFeatures", FakeInception)
    flags = ["--knowledge-base", "out-of-domain=demo", "--without-neighbors", "--inception", str(coco)]
    flags += ["--weights-64", "1", "2", "--weights-256", "5"]
    before = (swept / "results.json").read_text()
    point = swept / "points" / "none--w64-1--w256-5"
    lost, kept = point / "pictures" / "000002.png", point / "pictures" / "000000.png"
    drawn, touched = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (point / "features-00001.safetensors").unlink()
    assert evaluate(swept, coco, guided_address, *flags) == 0
    assert np.array_equal(decode_rgb(lost.read_bytes()), decode_rgb(drawn)), "the same picture"
    assert kept.stat().st_mtime_ns == touched, "not drawn again"
    assert (swept / "results.json").read_text() == before
    assert evaluate(swept, coco, "127.0.0.1:1", *flags) != 0, "a generator that is not there is said"
    assert "--generator: 127.0.0.1:1: " in capsys.readouterr().err


def test_another_run_is_not_mixed_in(
    swept: Path, coco: Path, guided_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(swept, coco, guided_address, "--without-neighbors", "--seed", "5", "--weights-256", "5") == 2
    assert "run.json: inception is" in capsys.readouterr().err


def test_wikiimages_without_inception_and_in_little_space(
    wikiimages: Path, generator_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--knowledge-base", "in-domain=demo", "--weights-64", "1.5", "--keep-pictures", "1")
    assert evaluate(tmp_path, wikiimages, generator_address, *flags, "--weights-256", "5", name="wikiimages") == 2
    assert "--weights-256:" in (said := capsys.readouterr().err) and "neither text nor neighbors" in said
    assert evaluate(tmp_path, wikiimages, generator_address, *flags, "--weights-256", "none", name="wikiimages") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["run"]["rejected"] == 1, "the caption with a date"
    assert results["reference_pictures"] == 3 and results["points"][0]["fid"] is None
    assert [p.name for p in (tmp_path / "points").glob("*/pictures/*")] == ["000000.png"]
    assert load_file(next((tmp_path / "points").glob("*unguided/features-00000.safetensors")))["clip"].shape[0] == 3
    said = capsys.readouterr().out.splitlines()
    row = next(line for line in said if line.startswith("in-domain--w64-1.5--w256-unguided | - |"))
    assert row.count("|") == next(line for line in said if line.startswith("point")).count("|")


def test_prompts_are_drawn_from_all_captions_and_their_pictures_excluded(coco: Path) -> None:
    copy = open_local_copy(COCO, coco, None, 10, 0)
    assert len({prompt.text for prompt in copy.prompts}) == 10 and copy.rejected == 1
    later = next(prompt for prompt in copy.prompts if prompt.key.endswith("-2"))
    stem = later.key.removesuffix("-2")
    assert later.excluded == (f"captions_val2017--{later.key}", f"captions_val2017--{stem}")
    assert [p.key for p in open_local_copy(COCO, coco, None, 10, 0).prompts] == [p.key for p in copy.prompts]
    assert [p.key for p in open_local_copy(COCO, coco, None, 10, 1).prompts] != [p.key for p in copy.prompts]
    with pytest.raises(ValueError, match=r"--prompts: 11 asked for, .* has 10 captions"):
        open_local_copy(COCO, coco, None, 11, 0)


def test_pictures_are_cut_to_their_middle() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (middle_square(wide, 16) == 200).all() and (middle_square(wide.swapaxes(0, 1), 16) == 200).all()


def test_the_papers_sweep() -> None:
    points = sweep([("in-domain", "a"), ("out-of-domain", "b")], command.WEIGHTS_64, command.WEIGHTS_256)
    assert len(points) == 2 * 5 * 4 and len({point.name for point in points}) == 40
    request = points[0].request("a dog", 3, ("x",), Sampling())
    assert [stage.steps for stage in request.stages] == [1000, 1000] and request.k == 2 and request.stop_at == 256
    assert (COCO.prompts, WIKIIMAGES.prompts) == (30_000, 20_000)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--knowledge-base or --without-neighbors: at least one is needed"),
        (("--knowledge-base", "demo"), "--knowledge-base: 'demo' is not LABEL=NAME"),
        (("--without-neighbors", "--weights-64", "1", "1"), "--weights-64: 1.0 is named twice"),
        (("--without-neighbors", "--weights-256", "none", "none"), "--weights-256: none is named twice"),
        (("--without-neighbors", "--weights-256", "wild"), "--weights-256: 'wild'"),
        (("--without-neighbors", "--weights-64", "101"), "--weights-64: 101.0"),
        (("--without-neighbors", "--calls", "0"), "--calls: 0"),
        (("--without-neighbors", "--prompts", "99"), "10 captions that qualify; 1 do not, 1 of them: "),
        (("--without-neighbors", "--source", "nothing.json"), "nothing.json"),
    ],
)
def test_wrong_flags_are_named(
    flags: tuple[str, ...], said: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "out", coco, "127.0.0.1:1", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["coco", "wikiimages"])
def test_every_flag_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    for flag in ("--source", "--inception", "--knowledge-base", "--weights-256", "--keep-pictures", "--clip-prefix"):
        assert flag in said


def test_the_guides_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They end where their local copy is missing: every flag before that was taken."""
    guide = (Path(command.__file__).parents[1] / "README.md").read_text()
    said = [line.split()[3:] for line in guide.splitlines() if line.startswith(".venv/bin/python -m evaluation ")]
    mine = [words for words in said if words[0] in ("coco", "wikiimages")]
    assert [words[0] for words in mine] == ["coco", "wikiimages"]
    monkeypatch.chdir(tmp_path)
    for words in mine:
        assert main(words) == 2
        assert f"import: {words[words.index('--source') + 1]} does not exist" in capsys.readouterr().err
