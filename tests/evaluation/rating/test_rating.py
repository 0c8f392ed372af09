"""Raters and their votes within one process: checks answered rightly, disks that are full, pictures that are torn."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from evaluation.rating.checks import KINDS, MUST_SAY
from evaluation.rating.guard import Guard, is_local
from evaluation.rating.pictures import Renderer
from evaluation.rating.rating import Rater, Rating, Refused
from evaluation.rating.report import read_raters
from evaluation.rating.server import PAGE, Pages
from evaluation.rating.votes import VotesError
from tests.evaluation.rating.sample_run import sample_items


def open_rating(tmp_path: Path, check_every: int = 0, wanted: int = 3) -> Rating:
    return Rating(sample_items(tmp_path / "run"), tmp_path / "votes", check_every=check_every, wanted=wanted)


async def rate_all(rating: Rating, rater: Rater, answer: Callable[[Rater], dict[str, int]]) -> None:
    while (shown := rating.screen(rater))["item"]:
        mark = {"serial": shown["serial"], "item": shown["item"]["item"], "picture": 0}
        assert await rating.vote(rater, {**mark, **answer(rater)})


def attentive(rater: Rater) -> dict[str, int]:
    answers = {"photorealism": 1, "faithfulness": 1}
    assert rater.screen is not None
    return {**answers, **dict([MUST_SAY[rater.screen.check]])} if rater.screen.check else answers


def test_raters_pass_rates(tmp_path: Path) -> None:
    rating = open_rating(tmp_path, check_every=3)
    ways: dict[str, Callable[[Rater], dict[str, int]]] = {
        "Attentive": attentive,
        "No": lambda rater: {"photorealism": 0, "faithfulness": 0},
        "Yes": lambda rater: {"photorealism": 1, "faithfulness": 1},
    }
    for name, answer in ways.items():
        asyncio.run(rate_all(rating, rating.join(name), answer))
    found = {rater.name: rater for rater in read_raters(tmp_path / "votes")}
    for rater in rating.raters:
        kinds = [vote.check for vote in rater.file.votes if vote.check]
        assert set(kinds[:3]) == set(KINDS), "kinds take turns"
        told = found[rater.file.name]
        assert len(told.votes) == 12 and told.checks == len(kinds) in (5, 6)
        passed = {"Attentive": len(kinds), "No": len(kinds) - kinds.count("real"), "Yes": kinds.count("real")}
        assert told.passed == passed[told.name]


def test_links_are_not_guessed_from_files(tmp_path: Path) -> None:
    rating = open_rating(tmp_path)
    rater = rating.join("Ada")
    rater_id, _, secret = rater.link.partition("-")
    assert len(secret) == 32 and rating.rater(rater.link) is rater
    for path in (tmp_path / "votes").rglob("*"):
        assert not path.is_file() or secret not in path.read_text() + path.name
    for link in (rater_id, f"{rater_id}-", f"{rater_id}-{'0' * 32}", ""):
        assert rating.rater(link) is None
    rating.close()
    again = open_rating(tmp_path)
    assert [r.link for r in again.raters] == [rater.link], "and the same after a restart"


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check_every: 1 is neither 0 nor at least 2"):
        open_rating(tmp_path, check_every=1)
    with pytest.raises(ValueError, match="raters: 0"):
        open_rating(tmp_path, wanted=0)
    rating = open_rating(tmp_path)
    with pytest.raises(ValueError, match="is in use by another process"):
        open_rating(tmp_path)
    with pytest.raises(Refused, match="name: 0 characters"):
        rating.join("\n")
    rating.close()
    (tmp_path / "votes" / "key").write_text("short")
    with pytest.raises(VotesError, match="key is not 64 hexadecimal digits"):
        open_rating(tmp_path)


def over_http(rating: Rating, body: Callable[[TestClient[Any, Any], Rater], Awaitable[None]]) -> None:
    async def go() -> None:
        pages = Pages(rating, Renderer(64), PAGE.read_text(encoding="utf-8"))
        app = pages.application(Guard(host="127.0.0.1", public_url="https://rate.example/"))
        async with TestClient(TestServer(app)) as client:
            await body(client, rating.join("Ada"))

    asyncio.run(go())


def test_a_vote_that_cannot_be_written_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rating = open_rating(tmp_path)

    async def body(client: TestClient[Any, Any], rater: Rater) -> None:
        shown = await (await client.get(f"/r/{rater.link}/screen")).json()
        sent = {"serial": 0, "item": shown["item"]["item"], "picture": 0, "photorealism": 1, "faithfulness": 0}

        def refuse(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            for path in ("vote", "undo"):
                answer = await client.post(f"/r/{rater.link}/{path}", json=sent)
                assert answer.status == (503 if path == "vote" else 200)
            assert (await client.post("/join", json={"name": "Bo"})).status == 503
        again = await client.post(f"/r/{rater.link}/vote", json=sent)
        assert again.status == 200 and (await again.json())["counted"] is True
        assert [vote.item for vote in rater.file.votes] and len(rater.file.events) == 1

    over_http(rating, body)


def test_a_picture_that_is_torn_is_left_out(tmp_path: Path) -> None:
    rating = open_rating(tmp_path, check_every=2)
    torn = {item.item_id for item in rating._order.items if item.prompt_id == "old-oak"}
    for file in (tmp_path / "run" / "pictures").glob("*/old-oak/2.png"):
        file.write_bytes(b"torn")

    async def body(client: TestClient[Any, Any], rater: Rater) -> None:
        shown = await (await client.get(f"/r/{rater.link}/screen")).json()
        while shown["item"]:
            sent = {"serial": shown["serial"], "item": shown["item"]["item"], "picture": 0}
            answer = await client.post(f"/r/{rater.link}/vote", json={**sent, "photorealism": 1, "faithfulness": 1})
            shown = await answer.json()
        votes = [vote for vote in rater.file.votes if vote.check is None]
        assert len(votes) == 10 and not torn & {vote.item for vote in votes}

    over_http(rating, body)


def test_behind_a_proxy_its_name_is_ours(tmp_path: Path) -> None:
    async def body(client: TestClient[Any, Any], rater: Rater) -> None:
        for headers, status in (
            ({"Host": "rate.example", "Origin": "https://rate.example"}, 200),
            ({"Origin": "https://rate.example"}, 200),
            ({"Host": "rate.example", "Origin": "https://other.example"}, 403),
            ({"Host": "other.example", "Origin": "https://rate.example"}, 421),
        ):
            name = json.dumps(headers)[:39]
            assert (await client.post("/join", json={"name": name}, headers=headers)).status == status, headers

    over_http(open_rating(tmp_path), body)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("a.example", False),
    ],
)
def test_this_machines_own_names(host: str, local: bool) -> None:
    assert is_local(host) is local
