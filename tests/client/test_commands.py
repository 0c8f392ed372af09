"""The `reimagen` command against the real services, with tiny weights."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.__main__ import main
from client.command_line import print_table
from tests.client.canned import CannedGenerator, bad_request, fails, retry_info, serving
from tests.client.test_client import PROMPT, _until_idle
from tests.generator_svc.tiny_stack import Service

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
QUICK = ["--prompt", PROMPT, "--seed", "7", "--stop-at", "64", "--steps-64", "2"]

Reimagen = Callable[..., tuple[int, str, str]]


@pytest.fixture
def environment(generator_address: str, retrieval_address: str) -> dict[str, str]:
    """Where the running stack is."""
    return {"REIMAGEN_GENERATOR": generator_address, "REIMAGEN_RETRIEVAL": retrieval_address}


@pytest.fixture
def reimagen(environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Reimagen:
    """Runs the command: status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments], environment)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def start(environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    """The command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "client", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> list[str]:
    """Every file in a folder, at any depth."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_generate_leaves_its_files(reimagen: Reimagen, tmp_path: Path) -> None:
    status, out, err = reimagen("generate", *QUICK, "--preview-every", 1, "--out", tmp_path / "out")
    assert status == 0, err
    assert out.splitlines() == [str(tmp_path / "out" / name) for name in ("image-7.png", "record.json")]
    previews = [f"previews/picture-0-stage-64-step-000{step}.png" for step in (1, 2)]
    assert names(tmp_path / "out") == ["image-7.png", *previews, "record.json"]
    with Image.open(tmp_path / "out" / "image-7.png") as picture:
        assert picture.size == (64, 64)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["prompt"], record["seed"], record["plans"][0]["steps"]) == (PROMPT, 7, 2)
    for said in ("seed 7", "guide dog  noto  author of noto  CC-BY-4.0", "stage 64: 2/2"):
        assert said in err


def test_every_stage_of_several_pictures(reimagen: Reimagen, tmp_path: Path) -> None:
    flags = ["--prompt", PROMPT, "--seeds", "3,4", "--stop-at", 256, "--steps-64", 2, "--steps-256", 2, "--every-stage"]
    status, out, err = reimagen("generate", *flags, "--json", "--out", tmp_path)
    assert status == 0, err
    assert names(tmp_path) == ["image-3.png", "image-4.png", "record.json", "stage-64-3.png", "stage-64-4.png"]
    said = json.loads(out)
    assert [(image["path"], image["seed"]) for image in said["images"]] == [
        (str(tmp_path / f"image-{seed}.png"), seed) for seed in (3, 4)
    ]
    assert all(image["record"]["prompt"] == PROMPT for image in said["images"])
    assert [stage["path"] for stage in said["stages"]] == [str(tmp_path / f"stage-64-{seed}.png") for seed in (3, 4)]
    assert [neighbor["license"] for neighbor in said["neighbors"]["neighbors"]] == ["CC-BY-4.0"] * 2
    assert "stage 64: 4/4" in err, "steps of both pictures"


def test_a_picture_is_drawn_again_from_its_file(reimagen: Reimagen, tmp_path: Path) -> None:
    assert reimagen("generate", *QUICK, "--format", "webp", "--out", tmp_path / "first")[0] == 0
    first = tmp_path / "first" / "image-7.webp"
    status, _, err = reimagen("generate", "--record", first, "--format", "webp", "--out", tmp_path / "second")
    assert status == 0, err
    assert (tmp_path / "second" / "image-7.webp").read_bytes() == first.read_bytes()


def test_all_pictures_are_drawn_again_from_the_record_of_a_drawing(reimagen: Reimagen, tmp_path: Path) -> None:
    flags = ["--prompt", PROMPT, "--seed", 5, "--num-pictures", 2, "--stop-at", 64, "--steps-64", 2]
    assert reimagen("generate", *flags, "--out", tmp_path / "first")[0] == 0
    record = tmp_path / "first" / "record.json"
    status, _, err = reimagen("generate", "--record", record, "--out", tmp_path / "second")
    assert status == 0, err
    pictures = names(tmp_path / "first")[:2]
    assert pictures == ["image-5-0.png", "image-5-1.png"]
    for name in pictures:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_stages_of_an_earlier_drawing_go_and_its_pictures_stay(reimagen: Reimagen, tmp_path: Path) -> None:
    sizes = ["--stop-at", 256, "--steps-64", 2, "--steps-256", 2, "--every-stage"]
    assert reimagen("generate", "--prompt", PROMPT, "--seed", 8, *sizes, "--out", tmp_path)[0] == 0
    assert names(tmp_path) == ["image-8.png", "record.json", "stage-64.png"]
    assert reimagen("generate", *QUICK, "--out", tmp_path)[0] == 0
    assert names(tmp_path) == ["image-7.png", "image-8.png", "record.json"]


def test_references_starts_and_negative_prompts_change_the_picture(reimagen: Reimagen, tmp_path: Path) -> None:
    dog = tmp_path / "dog.png"
    Image.new("RGB", (64, 64), "orange").save(dog)
    knobs = {
        "plain": [],
        "reference": ["--reference", f"{dog}=my orange dog", "--reference-license", "CC0-1.0"],
        "start": ["--start-from", dog, "--strength", 0.5],
        "negative": ["--negative-prompt", "red apple"],
        "alone": ["--without-neighbors"],
    }
    drawn: dict[str, bytes] = {}
    for name, flags in knobs.items():
        status, _, err = reimagen("generate", *QUICK, *flags, "--out", tmp_path / name)
        assert status == 0, err
        with Image.open(tmp_path / name / "image-7.png") as picture:
            drawn[name] = picture.convert("RGB").tobytes()
    assert len(set(drawn.values())) == len(knobs), "a knob that does nothing"
    record = json.loads((tmp_path / "reference" / "record.json").read_text())
    assert [(n["caption"], n["license"]) for n in record["neighbors"]] == [("my orange dog", "CC0-1.0")]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt", " "], "prompt: "),
        (["--prompt", PROMPT, "--num-pictures", "9"], "num_pictures: 9"),
        (["--prompt", PROMPT, "--steps-64", "0"], "stages[0].steps: 0"),
        (["--prompt", "a guide dog, vaporwave style"], "prompt: names style 'vaporwave'"),
        (["--prompt", PROMPT, "--seed", "-1"], "seed: Value out of range: -1"),
        (["--prompt", PROMPT, "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--prompt", PROMPT, "--sampler-64", "euler"], "--sampler-64: invalid choice: 'euler'"),
        (["--prompt", PROMPT, "--k", "0"], "--k: 0 is less than 1"),
        (["--prompt", PROMPT, "--seeds", "1,b"], "--seeds: '1,b' is not whole numbers"),
        (["--prompt", PROMPT, "--strength", "0.5"], "--strength: does nothing without --start-from"),
        (["--prompt", PROMPT, "--reference", "dog.png"], "--reference: 'dog.png' is not of the form"),
        (["--prompt", PROMPT, "--reference", "nowhere.png=dog"], "--reference: nowhere.png: No such file"),
        (["--prompt", PROMPT, "--reference-author", "me"], "--reference: is missing"),
        (["--prompt", PROMPT, "--api-key-file", "nowhere"], "--api-key-file: nowhere: No such file"),
        (["--prompt", PROMPT, "--tls-key", "nowhere"], "--tls-certificate: is missing"),
        (["--prompt", PROMPT, "--generator", ""], "--generator: is missing; give it, or set REIMAGEN_GENERATOR"),
        (["--record", "nowhere"], "error: --record: nowhere: No such file"),
        ([], "--prompt: is missing"),
        (["--colour", "red", "--prompt", PROMPT], "unrecognized arguments: --colour red"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(
    reimagen: Reimagen, tmp_path: Path, flags: list[str], named: str
) -> None:
    status, out, err = reimagen("generate", "--out", tmp_path / "out", *flags)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("reimagen: error: ") and named in line
    assert not (tmp_path / "out").exists()


def test_where_nobody_answers_the_address_and_what_sets_it_are_named(reimagen: Reimagen) -> None:
    nowhere = "127.0.0.1:1"  # where no service listens
    status, _, err = reimagen("kb", "list", "--retrieval", nowhere)
    assert status == 1 and f"--retrieval, or REIMAGEN_RETRIEVAL, is {nowhere}" in err


def test_failures_are_one_line_with_status_1(reimagen: Reimagen, tmp_path: Path) -> None:
    full = fails("RESOURCE_EXHAUSTED", "too much is being drawn", retry_info(0.5))
    refused = fails("INVALID_ARGUMENT", "no", bad_request("eta", "2 is too much"), bad_request("k", "70 is too much"))
    for fault, expected in (
        (full, (1, "RESOURCE_EXHAUSTED: too much is being drawn (try again in 0.5 s)")),
        (refused, (2, "eta: 2 is too much; k: 70 is too much")),
        (fails("NOT_FOUND", "no such\nknowledge base"), (1, "NOT_FOUND: no such knowledge base")),
    ):
        with serving(CannedGenerator([fault])) as address:
            status, out, err = reimagen("generate", *QUICK, "--out", tmp_path / "out", "--generator", address)
        assert (status, out, err) == (expected[0], "", f"reimagen: error: {expected[1]}\n")
    status, _, err = reimagen("generate", *QUICK, "--out", "/dev/null/out")
    assert (status, err) == (1, "reimagen: error: Not a directory: /dev/null\n")
    late = ["--prompt", PROMPT, "--steps-64", 1000, "--timeout-s", 0.5, "--out", tmp_path / "out"]
    assert reimagen("generate", *late)[0] == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_an_interrupted_command_cancels_its_call(
    environment: dict[str, str], generator: Service, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    long = [f"--steps-{size}=1000" for size in (64, 256, 1024)]  # minutes: it is not over before the signal comes
    process = start(environment, "generate", "--prompt", PROMPT, *long, "--out", tmp_path / "out")
    assert process.stderr is not None
    assert any("stage 64: 100/1000" in line for line in process.stderr)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == status and "Traceback" not in err
    assert number == signal.SIGTERM or err.splitlines()[-1] == "reimagen: error: interrupted"
    assert not (tmp_path / "out").exists()
    _until_idle(generator)


def test_knowledge_bases_from_the_first_to_the_last(reimagen: Reimagen, tmp_path: Path) -> None:
    gnome, frog = tmp_path / "gnome.png", tmp_path / "frog.png"
    for path, color in ((gnome, "red"), (frog, "green")):
        Image.new("RGB", (8, 8), color).save(path)
    style = ("--facet", "style={value} style=clay,tin", "--alike", "style=clay:tin")
    assert reimagen("kb", "create", "garden", *style)[:2] == (0, "garden\n")
    try:
        _use_garden(reimagen, gnome, frog)
        status, out, _ = reimagen("kb", "remove", "garden", "gnome", "nobody")
        assert (status, out) == (0, "1\n")
    finally:
        assert reimagen("kb", "delete", "garden")[:2] == (0, "")
    assert [line.split("\t")[0] for line in reimagen("kb", "list")[1].splitlines()] == ["demo"]
    assert reimagen("kb", "stats", "garden")[0] == 1


def _use_garden(reimagen: Reimagen, gnome: Path, frog: Path) -> None:
    credits = ["--author", "me", "--license", "CC0-1.0", "--facet", "style=clay"]
    status, out, err = reimagen("kb", "add", "garden", f"{gnome}=garden gnome", f"{frog}=tree frog", *credits)
    assert (status, out) == (0, "gnome\tcreated\nfrog\tcreated\n") and "pairs: 2/2" in err
    while json.loads(reimagen("kb", "stats", "garden", "--json")[1])["num_indexed_pairs"] < 2:
        pass  # a lookup sees them within a second
    out_folder = gnome.parent / "found"
    search = ["kb", "search", "garden", "garden gnome, clay style", "--k", 1, "--license", "CC0-1.0"]
    status, out, _ = reimagen(*search, "--facet", "style=clay", "--out", out_folder)
    assert out.split("\t")[2:] == ["gnome", "garden gnome", "me", "CC0-1.0\n"]
    assert (out_folder / "neighbor-1.png").read_bytes() == gnome.read_bytes()
    found = json.loads(reimagen(*search, "--json")[1])
    assert (found["method"], found["neighbors"][0]["pair"]["facets"]) == ("bm25", {"style": "clay"})
    assert reimagen(*search, "--exclude-pair", "gnome", "--facet", "style=tin")[1] == ""
    status, out, _ = reimagen("kb", "get", "garden", "frog", "--out", gnome.parent / "got.png", "--json")
    assert json.loads(out)["author"] == "me" and (gnome.parent / "got.png").read_bytes() == frog.read_bytes()
    gnome.write_bytes(b"no picture")
    status, out, err = reimagen("kb", "add", "garden", f"{gnome}=garden gnome", "--pair-id", "bad")
    assert status == 2 and out.startswith("bad\trejected\timage: ")
    assert "error: 1 rejected; bad: image: " in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["create", "Zoo"], "name: "),
        (["create", "zoo", "--facet", "style"], "--facet: 'style' is not of the form"),
        (["create", "zoo", "--alike", "style=clay"], "--alike: 'style=clay' is not of the form"),
        (["create", "zoo", "--alike", "hue=red:pink"], "--alike: 'hue=red:pink' is of 'hue', which no --facet names"),
        (["create", "zoo", "--embedding-size", "-1"], "embedding_size: Value out of range: -1"),
        (["add", "demo", "nowhere.png=frog"], "IMAGE=CAPTION: nowhere.png: cannot be read"),
        (["add", "demo", "a=b", "c=d", "--pair-id", "x"], "--pair-id: 'x' cannot name 2 pairs"),
        (["search", "demo", "dog", "--k", "-1"], "k: "),
        (["search", "demo", "dog", "--k", "70"], "k: 70"),
        (["search", "demo"], "prompt"),
        (["list", "--retrieval", ""], "--retrieval: is missing; give it, or set REIMAGEN_RETRIEVAL"),
        ([], "COMMAND"),
    ],
)
def test_what_a_knowledge_base_cannot_be_asked_is_named(reimagen: Reimagen, arguments: list[str], named: str) -> None:
    status, out, err = reimagen("kb", *arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("reimagen: error: ") and named in err


def test_models(reimagen: Reimagen) -> None:
    status, out, err = reimagen("models")
    assert status == 0, err
    assert [line.split("\t")[:2] for line in out.splitlines()] == [[f"{s}", f"unet_{s}"] for s in (64, 256, 1024)]
    said = json.loads(reimagen("models", "--json")[1])
    assert all(len(stage["weights_sha256"]) == 64 and stage["parameters"] > 0 for stage in said["stages"])


def test_health(reimagen: Reimagen) -> None:
    status, out, _ = reimagen("health")
    assert status == 0 and [line.split("\t")[2] for line in out.splitlines()] == ["SERVING"] * 3
    status, out, _ = reimagen("health", "--json", "--generator", "127.0.0.1:1")
    assert status == 1
    assert [health["status"] for health in json.loads(out)] == ["UNAVAILABLE", "SERVING", "SERVING"]
    assert reimagen("health", "--generator", "", "--retrieval", "")[0] == 2


def test_a_key_comes_from_a_file_or_from_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("from the file\n")
    service = CannedGenerator()
    with serving(service) as address:
        common: list[Any] = ["generate", "--prompt", "p", "--out", tmp_path / "out", "--generator", address]
        arguments = [str(argument) for argument in common]
        assert main(arguments, {"REIMAGEN_API_KEY": "from the environment"}) == 0
        assert main([*arguments, "--api-key-file", str(tmp_path / "key")], {}) == 0
        (tmp_path / "key").write_bytes(b"\xff\n\n")
        assert main([*arguments, "--api-key-file", str(tmp_path / "key")], {}) == 2
    said = [metadata.get("authorization") for metadata in service.metadata]
    assert said == ["Bearer from the environment", "Bearer from the file"]
    assert "--api-key-file: the key has characters" in capsys.readouterr().err


def test_the_installed_command_says_what_it_can() -> None:
    script = Path(sys.executable).parent / "reimagen"
    said = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert said.returncode == 0, said.stderr
    for command in ("generate", "kb", "models", "health"):
        assert f"    {command} " in said.stdout


def test_whoever_reads_the_output_may_stop(environment: dict[str, str]) -> None:
    process = start(environment, "health")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(TIMEOUT_S) in (0, 1) and "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_tables_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["health", "--generator", "127.0.0.1:1"], {}) == 1
    assert "service" in terminal.getvalue() and "UNAVAILABLE" in terminal.getvalue()
    monkeypatch.setenv("COLUMNS", "60")
    print_table(("run", *"abcd"), [("demo-64-0123456789abcdef", *["a-word-of-24-characters-!"] * 4)], uncut="run")
    assert "demo-64-0123456789abcdef" in terminal.getvalue(), "what other commands need is never cut"
