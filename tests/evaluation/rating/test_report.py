"""What people said, on votes whose figures are known."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.__main__ import main
from evaluation.rating.command import add_rating
from evaluation.rating.report import MIN_PASS_RATE, RaterVotes, as_markdown, evaluate_votes, read_raters, write_report
from evaluation.rating.votes import RaterFile, Vote
from evaluation.scores.intervals import compare, mean_interval
from tests.evaluation.rating.served import ROOT

PROMPTS = [f"p{i}" for i in range(8)]


def vote(system: str, prompt_id: str, photorealism: int, faithfulness: int, **more: object) -> Vote:
    number = int(prompt_id[1:])
    fields: dict[str, object] = {
        "serial": 0,
        "item": f"{system}-{prompt_id}",
        "system": system,
        "prompt_id": prompt_id,
        "category": "animals" if number < 4 else "foods",
        "entity": prompt_id,
        "frequent": number % 2 == 0,
        "check": None,
        "picture": "",
        "seed": 0,
        "photorealism": photorealism,
        "faithfulness": faithfulness,
        "seconds": 2.0 + number,
        "at": "",
    }
    return Vote(**{**fields, **more})  # type: ignore[arg-type]


def rater(name: str, votes: list[Vote], passed: int = 4, checks: int = 4) -> RaterVotes:
    return RaterVotes(rater_id=name.lower(), name=name, votes=votes, checks=checks, passed=passed)


def two_raters() -> list[RaterVotes]:
    """Ours is faithful on 6 of 8, plain on 2; Bo says the same as Ada but of one prompt, and rates half of them."""
    ours = [vote("ours", p, 1, int(i < 6)) for i, p in enumerate(PROMPTS)]
    plain = [vote("plain", p, int(i < 4), int(i < 2)) for i, p in enumerate(PROMPTS)]
    other = [vote("ours", "p0", 1, 0), *ours[1:4], *plain[:4]]
    return [rater("Ada", ours + plain), rater("Bo", other, checks=0, passed=0)]


def test_figures_per_system_category_and_frequency() -> None:
    report = evaluate_votes(two_raters())
    ours, plain = report["systems"]["ours"], report["systems"]["plain"]
    faithful = [0.5, 1, 1, 1, 1, 1, 0, 0]
    assert ours["all"]["faithfulness"] == mean_interval(faithful).to_json(), "a prompt counts once, not each vote"
    assert ours["all"]["photorealism"]["estimate"] == 1.0 and ours["all"]["photorealism"]["low"] < 1.0
    assert ours["all"]["votes"] == 12 and ours["all"]["both"]["prompts"] == 8
    assert ours["categories"]["foods"]["faithfulness"]["estimate"] == 0.5
    assert ours["frequency"]["frequent"]["faithfulness"]["estimate"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert (
        plain["all"]["both"]["estimate"] == 0.25 and plain["categories"]["animals"]["photorealism"]["estimate"] == 1.0
    )
    compared = {c["question"]: c for c in report["comparisons"]}
    expected = compare(faithful, [1, 1, 0, 0, 0, 0, 0, 0])
    assert {**compared["faithfulness"], **expected.to_json()} == compared["faithfulness"]
    assert (compared["faithfulness"]["first"], compared["faithfulness"]["second"]) == ("ours", "plain")


def test_agreement_of_raters() -> None:
    found = evaluate_votes(two_raters())["agreement"]["faithfulness"]
    assert found["items"] == 8 and found["pairs"] == [{"first": "ada", "second": "bo", "kappa": 5 / 7, "items": 8}]
    # Coincidences: 7 items agree of 8; of 16 answers 11 are 1... counted: ones 6 + 5, zeros 2 + 3.
    assert found["alpha"] == pytest.approx(1 - 15 * 2 / (2 * 11 * 5))


def test_raters_who_fail_checks_do_not_count() -> None:
    raters = [*two_raters(), rater("Careless", [vote("ours", p, 0, 0) for p in PROMPTS], passed=2, checks=3)]
    report = evaluate_votes(raters)
    assert report["systems"] == evaluate_votes(two_raters())["systems"]
    assert [(r["name"], r["counted"], r["pass_rate"]) for r in report["raters"]] == [
        ("Ada", True, 1.0),
        ("Bo", True, None),
        ("Careless", False, 2 / 3),
    ]
    assert report["raters"][0]["seconds_median"] == 5.5
    assert evaluate_votes(raters, 0.6)["systems"] != report["systems"]
    assert "24 votes of 2 raters" in as_markdown(evaluate_votes([*raters, rater("Silent", [])]))
    with pytest.raises(ValueError, match=r"min_pass_rate: 1\.5 is not between 0 and 1"):
        evaluate_votes(raters, 1.5)
    with pytest.raises(ValueError, match="votes: none counts: 1 of 1 raters passed under 75%"):
        evaluate_votes(raters[2:])


def test_names_stay_text(tmp_path: Path) -> None:
    hostile = "<img src=x> | $x$ _a_ [b](c) `d`"
    votes = [vote(hostile, p, 1, 0, category=hostile) for p in PROMPTS]
    text = write_report(tmp_path, evaluate_votes([rater(hostile, votes)]))
    assert "<img" not in text and "&lt;img src=x> \\| $x$ _a_ \\[b](c) \\`d\\`" in text
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} <= {5, 6, 7, 8}
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "report.png").read_bytes())).convert("RGB"))
    assert picture.std() > 5, "something is drawn"
    assert json.loads((tmp_path / "report.json").read_text())["votes"] == 8


def test_the_report_of_a_folder_of_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in two_raters():
        file = RaterFile.create(tmp_path / "votes" / "raters", given.name)
        check = vote("", "p0", 1, 1, check="real", item="check")
        for serial, each in enumerate([check, *given.votes]):
            file.append(Vote(**{**vars(each), "serial": serial}))
    found = [(r.name, len(r.votes), r.pass_rate) for r in read_raters(tmp_path / "votes")]
    assert found == [("Ada", 16, 1.0), ("Bo", 8, 1.0)]
    out = tmp_path / "out"
    assert main(["rate-report", "--votes", str(tmp_path / "votes"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said == (out / "report.md").read_text() == as_markdown(json.loads((out / "report.json").read_text()))
    assert "| Ada | 16 | 1 of 1 | 5.5 | yes |" in said and "| ours | all | 8 | 12 | 1.000 \\[" in said
    assert main(["rate-report", "--votes", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"evaluation: error: votes: {tmp_path} holds no rater's votes\n"


def test_the_guide_names_every_flag() -> None:
    """What it shows is what the commands take, with these defaults."""
    commands = argparse.ArgumentParser().add_subparsers()
    add_rating(commands)
    guide = (ROOT / "evaluation" / "rating" / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `--([a-z-]+)` \|.*\| `?([^`|]*?)`? \|$", guide, re.MULTILINE))
    taken = {a.option_strings[0][2:]: a for a in commands.choices["rate"]._actions if a.dest != "help"}
    assert shown.keys() == taken.keys() - {"run", "votes"}
    assert shown == {name: str(taken[name].default or "none") for name in shown}
    for words in re.findall(r"^python -m evaluation (.*)$", guide, re.MULTILINE):
        name, *flags = words.split()
        commands.choices[name].parse_args(flags)
    assert "--min-pass-rate" in guide and f"{MIN_PASS_RATE:.0%}".replace("%", " %") in guide
