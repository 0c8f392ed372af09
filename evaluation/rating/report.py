"""What people said: per system, category and frequency, who was better on the same prompts, and how far raters agree.

A prompt counts once, whatever number of votes it got (`evaluation.scores.intervals` says how sure that is). Raters who
passed too few attention checks do not count; they are listed. The intervals speak of other prompts, not of other raters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from common.files import write_atomic, write_json
from evaluation.rating.agreement import cohen_kappa, krippendorff_alpha
from evaluation.rating.checks import passes
from evaluation.rating.plot import plot_report
from evaluation.rating.votes import RaterFile, Vote
from evaluation.scores.intervals import compare, mean_interval

FORMAT = "reimagen-rating-report/1"
MIN_PASS_RATE = 0.75
QUESTIONS: dict[str, Callable[[Vote], int]] = {
    "photorealism": lambda vote: vote.photorealism,
    "faithfulness": lambda vote: vote.faithfulness,
    "both": lambda vote: vote.photorealism * vote.faithfulness,
}


@dataclass(frozen=True, kw_only=True)
class RaterVotes:
    """One rater's votes that stand, and how the attention checks went."""

    rater_id: str
    name: str
    votes: Sequence[Vote]
    checks: int
    passed: int

    @property
    def pass_rate(self) -> float | None:
        """None before the first check."""
        return self.passed / self.checks if self.checks else None


def read_raters(folder: Path) -> list[RaterVotes]:
    """All raters of a folder of votes, which may be in use.

    Raises:
        VotesError: a file is damaged.
        ValueError: there is no rater.
    """
    files = [RaterFile.read(path) for path in sorted((folder / "raters").glob("*.jsonl"))]
    raters = [_rater(file) for file in files if file is not None]
    if not raters:
        raise ValueError(f"votes: {folder} holds no rater's votes")
    return sorted(raters, key=lambda rater: rater.name.casefold())


def _rater(file: RaterFile) -> RaterVotes:
    checks = [passes(v.check, v.photorealism, v.faithfulness) for v in file.votes if v.check is not None]
    votes = [vote for vote in file.votes if vote.check is None]
    return RaterVotes(rater_id=file.rater_id, name=file.name, votes=votes, checks=len(checks), passed=sum(checks))


def evaluate_votes(raters: Sequence[RaterVotes], min_pass_rate: float = MIN_PASS_RATE) -> dict[str, Any]:
    """The figures.

    Raises:
        ValueError: the rate is no share, or no vote counts.
    """
    if not 0.0 <= min_pass_rate <= 1.0:
        raise ValueError(f"min_pass_rate: {min_pass_rate} is not between 0 and 1")
    counted = [rater for rater in raters if rater.pass_rate is None or rater.pass_rate >= min_pass_rate]
    votes = [vote for rater in counted for vote in rater.votes]
    if not votes:
        failed = len(raters) - len(counted)
        raise ValueError(
            f"votes: none counts: {failed} of {len(raters)} raters passed under {min_pass_rate:.0%} of their attention"
            " checks (min_pass_rate), the others gave none"
        )
    systems = sorted({vote.system for vote in votes})
    return {
        "format": FORMAT,
        "votes": len(votes),
        "min_pass_rate": min_pass_rate,
        "raters": [_told(rater, rater in counted) for rater in raters],
        "systems": {system: _of_system([vote for vote in votes if vote.system == system]) for system in systems},
        "comparisons": _comparisons(votes, systems),
        "agreement": {name: _agreement(counted, question) for name, question in QUESTIONS.items() if name != "both"},
    }


def _told(rater: RaterVotes, is_counted: bool) -> dict[str, Any]:
    seconds = [vote.seconds for vote in rater.votes if vote.seconds is not None]
    return {
        "rater": rater.rater_id,
        "name": rater.name,
        "votes": len(rater.votes),
        "checks": rater.checks,
        "passed": rater.passed,
        "pass_rate": rater.pass_rate,
        "seconds_median": round(median(seconds), 2) if seconds else None,
        "counted": is_counted,
    }


def _of_system(votes: Sequence[Vote]) -> dict[str, Any]:
    return {
        "all": _figures(votes),
        "categories": _grouped(votes, lambda vote: vote.category),
        "frequency": _grouped(votes, lambda vote: "frequent" if vote.frequent else "infrequent"),
    }


def _grouped(votes: Iterable[Vote], group: Callable[[Vote], str]) -> dict[str, Any]:
    groups: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        groups[group(vote)].append(vote)
    return {name: _figures(groups[name]) for name in sorted(groups)}


def _figures(votes: Sequence[Vote]) -> dict[str, Any]:
    prompts = [vote.prompt_id for vote in votes]
    figures = {n: mean_interval([q(vote) for vote in votes], prompts).to_json() for n, q in QUESTIONS.items()}
    return {"votes": len(votes), **figures}


def _comparisons(votes: Sequence[Vote], systems: Sequence[str]) -> list[dict[str, Any]]:
    """Each two systems, on the prompts that were voted on for both."""
    found = []
    for name, question in QUESTIONS.items():
        means = {system: _by_prompt(votes, system, question) for system in systems}
        for first, second in combinations(systems, 2):
            common = sorted(means[first].keys() & means[second].keys())
            if common:
                compared = compare([means[first][p] for p in common], [means[second][p] for p in common])
                found.append({"question": name, "first": first, "second": second, **compared.to_json()})
    return found


def _by_prompt(votes: Iterable[Vote], system: str, question: Callable[[Vote], int]) -> dict[str, float]:
    answers: dict[str, list[int]] = defaultdict(list)
    for vote in votes:
        if vote.system == system:
            answers[vote.prompt_id].append(question(vote))
    return {prompt_id: sum(given) / len(given) for prompt_id, given in answers.items()}


def _agreement(raters: Sequence[RaterVotes], question: Callable[[Vote], int]) -> dict[str, Any]:
    answers: dict[str, dict[Hashable, Hashable]] = {
        rater.rater_id: {vote.item: question(vote) for vote in rater.votes} for rater in raters
    }
    units: dict[Hashable, list[Hashable]] = defaultdict(list)
    for given in answers.values():
        for item, answer in given.items():
            units[item].append(answer)
    pairs = []
    for one, other in combinations(answers, 2):
        kappa, common = cohen_kappa(answers[one], answers[other])
        if common:
            pairs.append({"first": one, "second": other, "kappa": kappa, "items": common})
    return {
        "alpha": krippendorff_alpha(list(units.values())),
        "items": sum(len(unit) > 1 for unit in units.values()),
        "pairs": pairs,
    }


def write_report(folder: Path, report: dict[str, Any]) -> str:
    """Write `report.json`, `report.md` and `report.png`; gives the Markdown."""
    text = as_markdown(report)
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.png", plot_report(report))
    write_atomic(folder / "report.md", text)
    return text


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    counted = sum(rater["counted"] and rater["votes"] > 0 for rater in report["raters"])
    lines = [
        "# What people said",
        "",
        f"{report['votes']} votes of {counted} raters. Shares with 95 % intervals over prompts.",
        "",
        "![per system and category](report.png)",
        "",
        *_table(
            ("system", "of", "prompts", "votes", *QUESTIONS),
            [
                (system, group, figures["both"]["prompts"], figures["votes"], *(_said(figures[n]) for n in QUESTIONS))
                for system, groups in report["systems"].items()
                for group, figures in _flat(groups)
            ],
        ),
    ]
    if report["comparisons"]:
        lines += ["", "## On the same prompts", "", *_table(*_compared(report["comparisons"]))]
    lines += ["", "## How far raters agree", "", *_table(*_agreed(report))]
    lines += [
        "",
        "## Raters",
        "",
        f"Who passes under {report['min_pass_rate']:.0%} of the attention checks does not count.",
    ]
    lines += ["", *_table(*_listed(report["raters"]))]
    return "\n".join(lines) + "\n"


def _flat(groups: dict[str, Any]) -> list[tuple[str, Any]]:
    return [("all", groups["all"]), *groups["frequency"].items(), *groups["categories"].items()]


def _compared(comparisons: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    rows = [
        (
            c["question"],
            f"{c['first']} less {c['second']}",
            c["difference"]["prompts"],
            _said(c["difference"], "+.3f"),
            f"{c['p_difference']:.3g}",
            f"{c['better']} / {c['worse']} / {c['tied']}",
        )
        for c in comparisons
    ]
    return ("question", "systems", "prompts", "difference", "p", "better / worse / tied"), rows


def _agreed(report: dict[str, Any]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    names = {rater["rater"]: rater["name"] for rater in report["raters"]}
    rows: list[tuple[Any, ...]] = []
    for question, found in report["agreement"].items():
        rows.append((question, "all: Krippendorff's alpha", found["items"], _number(found["alpha"])))
        for pair in found["pairs"]:
            who = f"{names[pair['first']]}, {names[pair['second']]}: Cohen's kappa"
            rows.append((question, who, pair["items"], _number(pair["kappa"])))
    return ("question", "raters", "items", "agreement"), rows


def _listed(raters: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    rows = [
        (
            rater["name"],
            rater["votes"],
            f"{rater['passed']} of {rater['checks']}",
            "" if rater["seconds_median"] is None else f"{rater['seconds_median']:.1f}",
            "yes" if rater["counted"] else "no",
        )
        for rater in raters
    ]
    return ("rater", "votes", "checks passed", "seconds a vote", "counts"), rows


def _said(interval: dict[str, Any], style: str = ".3f") -> str:
    estimate = format(interval["estimate"], style)
    if interval["low"] is None:
        return f"{estimate} (one prompt)"
    return f"{estimate} [{interval['low']:{style}}, {interval['high']:{style}}]"


def _number(value: float | None) -> str:
    return "cannot be told" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Of Markdown; names are people's and suites' own text, and stay text."""
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)]


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_text(str(cell)) for cell in cells) + " |"


def _text(cell: str) -> str:
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`"), ("*", "\\*")):
        cell = cell.replace(sign, written)
    return " ".join(cell.split())
