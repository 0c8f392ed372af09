"""`python -m trainer`: whole flows in one process, and bad input as one line and status 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint import load_stage, publish_stage
from common.unet.unet import UNet
from trainer.__main__ import main
from trainer.dataset import open_prepared
from trainer.presets import preset


@pytest.fixture
def data(prepared_folder: Path, tmp_path: Path) -> Path:
    """A copy of the prepared corpus."""
    return Path(shutil.copytree(prepared_folder, tmp_path / "data"))


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples are drawn."""
    monkeypatch.setattr("trainer.fit_command.look", lambda trainer: None)


def fit(data: Path, run: Path, *more: str) -> int:
    return main(["fit", "--preset", "tiny-256", "--data", str(data), "--run", str(run), "--threads", "1", *more])


def test_fit_resume_and_publish(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    caplog.set_level("INFO")
    assert fit(data, run, "--examples", "8") == 0
    assert caplog.messages[-1] == f"{run}: step 2, 8 of 8 examples" and "goes on" not in caplog.text
    assert {"run.json", "log.jsonl", "samples.png", "losses.png"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in run.glob("state-*")) == ["state-00000002.safetensors"]
    assert fit(data, run, "--examples", "12", "--weights", str(weights)) == 0
    assert f"{run}: goes on at step 2" in caplog.messages
    loaded = load_stage(weights, 256)
    assert loaded.unet.config == preset("tiny-256").unet
    assert (loaded.trained["preset"], loaded.trained["step"], loaded.trained["examples"]) == ("tiny-256", 3, 12)
    assert set(loaded.trained["held_out_loss"]) >= {"full"}
    assert fit(data, run, "--examples", "12") == 0
    assert sorted(p.name for p in run.glob("state-*"))[-1] == "state-00000003.safetensors", "what is reached stays"
    described = json.loads((run / "run.json").read_text())
    assert described["preset"]["name"] == "tiny-256" and len(described["corpus_fingerprint"]) == 64
    published = ["publish", "--preset", "tiny-256", "--data", str(data), "--run", str(run)]
    assert main([*published, "--weights", str(tmp_path / "again")]) == 0
    again = load_stage(tmp_path / "again", 256)
    for name, tensor in again.unet.state_dict().items():
        assert (tensor == loaded.unet.state_dict()[name]).all()


@pytest.mark.usefixtures("nobody_looks")
def test_weights_that_saw_more_are_replaced_only_where_it_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    assert fit(data, tmp_path / "longer", "--examples", "12", "--weights", str(weights)) == 0
    assert fit(data, run, "--examples", "8", "--weights", str(weights)) == 2
    assert "unet_256 that saw 12 examples, and this one 8" in capsys.readouterr().err
    assert not list(run.glob("state-*")), "before the work"
    assert fit(data, tmp_path / "longer", "--examples", "11", "--weights", str(weights)) == 0, (
        "a run's own are no others"
    )
    before = (weights / "unet_256.safetensors").read_bytes()
    assert fit(data, run, "--seconds", "0", "--weights", str(weights)) == 2, "whose end is not known before"
    assert "--replace" in capsys.readouterr().err
    assert (weights / "unet_256.safetensors").read_bytes() == before
    publishing = ["publish", "--preset", "tiny-256", "--data", str(data), "--run", str(run), "--weights", str(weights)]
    assert main(publishing) == 2 and main([*publishing, "--replace"]) == 0
    assert load_stage(weights, 256).trained["examples"] == 4


@pytest.mark.usefixtures("nobody_looks")
def test_weights_of_another_architecture_are_told_before_the_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that begins from what fits of them counts from 0, and that its time will do is not known."""
    weights, run, row = tmp_path / "weights", tmp_path / "run", preset("tiny-256")
    theirs = replace(row.unet, widths=(16, 40), consistent=True)
    publish_stage(weights, 256, theirs, UNet(theirs).state_dict(), {"step": 2, "examples": 60})
    demo = ("--start-from", str(weights), "--weights", str(weights), "--seconds", "0")
    assert fit(data, run, *demo) == 2
    said = capsys.readouterr().err
    assert "unet_256 that saw 60 examples, and this one 0: publish to another folder, or say --replace" in said
    assert (
        "(they are of another architecture: consistent is True there and False here; widths is [16, 40] there" in said
    )
    assert not list(run.glob("state-*")), "before the work"
    assert fit(data, run, *demo, "--replace") == 0
    assert (load_stage(weights, 256).trained["examples"], load_stage(weights, 256).unet.config) == (4, row.unet)


@pytest.mark.usefixtures("nobody_looks")
def test_a_run_goes_on_with_the_corpus_that_it_began_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(data, run, "--examples", "8") == 0
    described = run / "run.json"
    described.write_text(described.read_text().replace(open_prepared(data).fingerprint, "f" * 64))
    assert fit(data, run, "--examples", "12") == 2
    assert f"was trained on {'f' * 12}…: to go on from its weights, give a new --run" in capsys.readouterr().err
    assert fit(data, tmp_path / "next", "--examples", "12", "--start-from", str(run)) == 0


def test_a_warm_start_is_listed_in_print_and_in_the_run(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And samples are drawn after every so many steps."""
    weights, run = tmp_path / "weights", tmp_path / "run"
    assert fit(data, tmp_path / "first", "--examples", "8", "--weights", str(weights)) == 0
    with caplog.at_level("INFO"):
        assert fit(data, run, "--start-from", str(weights), "--examples", "16", "--evaluate-every-steps", "1") == 0
    listed = json.loads((run / "run.json").read_text())["warm_start"]
    names = set(load_stage(weights, 256).unet.state_dict())
    assert set(listed["loaded"]) == names and not listed["new"] and not listed["reshaped"] and not listed["unused"]
    assert (listed["step"], listed["examples"]) == (2, 8) and listed["origin"] == str(weights / "unet_256.safetensors")
    said = f"started from {listed['origin']}: {len(names)} weights loaded, counting on from step 2"
    assert said in caplog.messages
    assert {p.name for p in run.glob("samples-*")} == {f"samples-{n:09d}.png" for n in (12, 16)}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--metrics-address", "9400"), "--metrics-address: '9400'"),
        (("--save-every-steps", "-1"), "--save-every-steps: -1"),
        (("--loader-ahead", "0"), "--loader-ahead: 0"),
        (("--cooldown", "0"), "--cooldown: 0"),
        (("--cooldown", "9", "--examples", "8"), "--cooldown: 9 is more than the 8 examples"),
        (("--loader-workers", "-1"), "--loader-workers: -1"),
        (("--log-every", "nan"), "--log-every: nan"),
        (("--save-every", "-1"), "--save-every: -1"),
        (("--seconds", "nan"), "--seconds: nan"),
        (("--examples", "-5"), "--examples: -5"),
        (("--examples", "0"), "--examples: 0"),
        (("--examples", "65"), "--examples: 65 is more than the 64 of tiny-256"),
        (("--examples", "65", "--cooldown", "4"), "--examples: 65 is more than the 64 of tiny-256"),
        (("--threads", "-1"), "--threads: -1"),
        (("--hang-timeout", "nan"), "--hang-timeout: nan"),
        (("--hang-timeout", "0"), "--hang-timeout: 0"),
        (("--parallel", "ddp"), "--parallel: ddp"),
        (("--start-from", "nowhere"), "--start-from: nowhere"),
    ],
)
def test_flags_of_fit_that_cannot_be_are_named(
    wrong: tuple[str, str], named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(data, tmp_path / "run", *wrong) == 2
    one_line(capsys, named)


def test_super_resolution_with_text_and_neighbors_is_trained_and_published(data: Path, tmp_path: Path) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    flags = ["--preset", "tiny-256-neighbors", "--data", str(data), "--run", str(run), "--threads", "1"]
    assert main(["fit", *flags, "--examples", "8", "--accumulation", "2", "--weights", str(weights)]) == 0
    loaded = load_stage(weights, 256)
    assert loaded.unet.config == preset("tiny-256-neighbors").unet
    assert {"full", "text_only", "wrong_neighbors"} <= set(loaded.trained["held_out_loss"])
    assert (run / "samples.png").is_file()


def test_ranks_go_with_a_dry_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(data, tmp_path / "run", "--ranks", "2") == 2
    one_line(capsys, "--ranks: goes with --dry-run")
    assert fit(data, tmp_path / "run", "--accumulation", "3") == 2
    one_line(capsys, "preset.accumulation: 3 does not divide groups 4")


def test_dry_run_shows_the_resolved_configuration_and_does_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(data, tmp_path / "run", "--dry-run") == 0
    configuration, table = capsys.readouterr().out.split("\n\n", 1)
    assert json.loads(configuration)["name"] == "tiny-256"
    assert "77,600 parameters" in table and "activations" in table and "GFLOP an example" in table
    assert not (tmp_path / "run").exists()


def one_line(capsys: pytest.CaptureFixture[str], *named: str) -> None:
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if "error" in line]
    assert len(errors) == 1, said
    for name in named:
        assert name in errors[0]
    assert not any("Traceback" in line for line in said)


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path / "nowhere", tmp_path / "run") == 2
    one_line(capsys, str(tmp_path / "nowhere"))


def test_missing_corpus_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--corpus", str(tmp_path / "nowhere"), "--data", str(tmp_path / "d")]) == 2
    one_line(capsys, "nowhere")
    assert not (tmp_path / "d").exists()


def test_a_text_encoder_that_cannot_be_had_is_named(
    corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(where: str) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("trainer.__main__.TextEncoder", away)
    assert main(["prepare", "--corpus", str(corpus_folder), "--data", str(tmp_path), "--preset", "paper-64"]) == 2
    one_line(capsys, "--text-encoder: 'google/t5-v1_1-xxl' cannot be loaded: We couldn't connect")


def test_missing_neighbors_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "knn")
    assert fit(data, tmp_path / "run") == 2
    one_line(capsys, "--data: ", "run `python -m trainer knn` first")


def test_an_unknown_preset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--preset", "demo-2048", "--data", "x", "--run", "y"])
    assert stopped.value.code == 2
    assert "demo-2048" in capsys.readouterr().err


def test_publishing_what_was_never_trained_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", "--preset", "tiny-256", "--data", str(data), "--run", str(tmp_path / "run")]
    assert main(command) == 2
    one_line(capsys, "--weights")
    assert main([*command, "--weights", str(tmp_path / "w")]) == 2
    one_line(capsys, str(tmp_path / "run"))
    assert not (tmp_path / "w").exists() and not (tmp_path / "run").exists()
