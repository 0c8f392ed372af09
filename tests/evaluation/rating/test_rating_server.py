"""The rating page over real sockets: what counts, what is told, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.rating.command import parse_address
from tests.evaluation.rating.sample_run import SYSTEMS, make_run
from tests.evaluation.rating.served import ROOT, HttpRater, Served, command, serving

CHECK_EVERY = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("rating") / "run").path


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(run, tmp_path_factory.mktemp("votes"), "--check-every", CHECK_EVERY, "--side", 64) as page:
        yield page


def test_a_rater_sees_everything_once_and_is_not_told_who_drew_it(served: Served, run: Path) -> None:
    """Nothing that reaches the browser, headers and names of pictures included, has a name of a system, a path or a seed."""
    rater = HttpRater(served, "Ada")
    heard = [json.dumps(rater.screen)]
    keys: set[str] = set()
    while rater.screen["item"]:
        item = rater.screen["item"]
        keys |= set(item)
        for token in [*item["pictures"], *item["references"]]:
            status, headers, body = rater.send("GET", f"picture/{token}")
            assert status == 200 and headers["Content-Type"] == "image/webp" and body[12:16] == b"VP8L"
            heard += [json.dumps(headers), body.decode("latin-1")]
        assert len(item["pictures"]) == 4
        heard.append(json.dumps(rater.vote(picture=3)))
    for word in (
        "secret",
        "plain",
        "retriev",
        "seed",
        "system",
        "check",
        "broken-",
        str(run),
        run.name + "/",
    ):
        assert not [text for text in heard if word in text], word
    assert keys == {"item", "entity", "category", "prompt", "pictures", "references"}
    votes = served.events(rater.rater_id)
    real = [v for v in votes if v["check"] is None]
    assert Counter(v["system"] for v in real) == {system: 6 for system in SYSTEMS}
    assert len({v["item"] for v in votes}) == len(votes) == rater.screen["done"] == rater.screen["total"]
    assert len(votes) - len(real) == len(votes) // CHECK_EVERY
    assert len({v["seed"] for v in real}) > 1, "the order of the pictures is the rater's own, too"


def test_a_vote_is_kept_as_it_was_given(served: Served) -> None:
    rater = HttpRater(served, "Bo")
    entity = rater.screen["item"]["entity"]
    assert rater.vote(photorealism=0, faithfulness=1, picture=2)["counted"] is True
    (vote,) = served.events(rater.rater_id)
    assert (vote["photorealism"], vote["faithfulness"], vote["seconds"]) == (0, 1, 1.25)
    assert vote["entity"] == entity and vote["serial"] == 0
    assert rater.screen["last"] == {"photorealism": 0, "faithfulness": 1} and rater.screen["done"] == 1


def test_the_same_vote_sent_often_counts_once(served: Served) -> None:
    rater = HttpRater(served, "Cy")
    sent = {**rater.mark, "photorealism": 1, "faithfulness": 0, "picture": 1, "seconds": 2}
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(json.loads(rater.send("POST", "vote", sent)[2])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a["counted"] for a in answers) == [False] * 7 + [True]
    assert len({json.dumps({**a, "counted": 0}, sort_keys=True) for a in answers}) == 1, "all are shown what comes next"
    assert len(served.events(rater.rater_id)) == 1


def test_the_last_vote_can_be_undone_and_made_again(served: Served) -> None:
    rater = HttpRater(served, "Di")
    first, second = rater.screen["item"], rater.vote()["item"]
    late = {**rater.mark, "photorealism": 1, "faithfulness": 1, "picture": 0}
    rater.vote()
    stale = {"serial": rater.screen["serial"]}
    assert rater.undo()["item"] == second and rater.screen["done"] == 1
    assert json.loads(rater.send("POST", "undo", stale)[2])["counted"] is False, "a second tap undoes nothing"
    assert json.loads(rater.send("POST", "vote", late)[2])["counted"] is False, "nor does what arrives late count"
    assert rater.undo()["item"] == first and rater.screen["last"] is None
    assert rater.undo()["counted"] is False, "nothing is left to undo"
    assert rater.vote(0, 0)["item"] == second and rater.vote(0, 0)["done"] == 2
    assert [e["event"] for e in served.events(rater.rater_id)] == ["vote", "vote", "undo", "undo", "vote", "vote"]


def test_two_raters_at_once(served: Served) -> None:
    raters = [HttpRater(served, name) for name in ("Ed", "Flo")]
    orders: dict[str, list[str]] = {rater.rater_id: [] for rater in raters}

    def work(rater: HttpRater) -> None:
        for _ in range(9):
            orders[rater.rater_id].append(rater.screen["item"]["prompt"])
            rater.vote()

    threads = [threading.Thread(target=work, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other = raters
    assert orders[one.rater_id] != orders[other.rater_id]
    for rater in raters:
        events = served.events(rater.rater_id)
        assert [e["serial"] for e in events] == list(range(9))
        votes = Counter(e["system"] for e in events if e["check"] is None)
        assert abs(votes[SYSTEMS[0]] - votes[SYSTEMS[1]]) <= 1
    token = one.screen["item"]["pictures"][0]
    assert one.send("GET", f"picture/{token}")[0] == 200
    assert other.send("GET", f"picture/{token}")[0] == 404, "pictures are the rater's own"


def test_a_name_is_one_raters(served: Served) -> None:
    HttpRater(served, "Gus \x07  O'Neill")
    status, _, body = served.send("POST", "/join", {"name": "gus o'neill"})
    assert status == 400 and b"name: gus o'neill is taken" in body
    for name in ("", "   ", "x" * 41, 7, None):
        assert served.send("POST", "/join", {"name": name})[0] == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("photorealism", 2),
        ("photorealism", True),
        ("photorealism", None),
        ("faithfulness", "1"),
        ("faithfulness", 0.5),
        ("picture", 4),
        ("picture", -1),
        ("picture", "0"),
        ("serial", None),
        ("serial", "0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(served: Served, field: str, value: object) -> None:
    rater = HttpRater(served, f"Hy {field} {value}")
    sent = {**rater.mark, "photorealism": 1, "faithfulness": 1, "picture": 0, field: value}
    status, _, body = rater.send("POST", "vote", sent)
    assert status == 400 and body.startswith(f"{field}: ".encode())
    assert served.events(rater.rater_id) == []


def test_an_item_that_is_not_the_raters_counts_nothing(served: Served) -> None:
    one, other = HttpRater(served, "Ida"), HttpRater(served, "Jo")
    for item in (other.screen["item"]["item"], "x", None, ["x"]):
        sent = {"serial": 0, "item": item, "photorealism": 1, "faithfulness": 1, "picture": 0}
        status, _, body = one.send("POST", "vote", sent)
        assert status == 200 and json.loads(body)["counted"] is False
    assert served.events(one.rater_id) == []


def test_what_another_sites_page_could_send_is_refused(served: Served) -> None:
    rater = HttpRater(served, "Kai")
    path = f"/r/{rater.link}/vote"
    sent = {**rater.mark, "photorealism": 1, "faithfulness": 1, "picture": 0}
    ours = f"http://127.0.0.1:{served.port}"
    for headers, status in (
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{served.port + 1}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "elsewhere.example"}, 421),
        ({"Host": f"127.0.0.1.elsewhere.example:{served.port}"}, 421),
    ):
        assert served.send("POST", path, sent, headers)[0] == status, headers
    assert served.send("GET", "/", None, {"Host": "elsewhere.example"})[0] == 421
    assert served.events(rater.rater_id) == []
    assert served.send("POST", path, sent, {"Origin": ours, "Sec-Fetch-Site": "same-origin"})[0] == 200
    assert len(served.events(rater.rater_id)) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/r/none/screen",
        "/r/none",
        "/../../../etc/passwd",
        "/r/{link}/picture/../../../../etc/passwd",
        "/r/{link}/picture/..%2f..%2f..%2fetc%2fpasswd",
        "/r/{link}/picture/%2e%2e",
        "/r/{link}/picture/x%00",
        "/r/{link}/raters",
        "/key",
        "/page.html",
    ],
)
def test_there_is_nothing_else(served: Served, path: str) -> None:
    name = f"Lu {path}"[:40]
    rater = HttpRater(served, name)
    status, headers, body = served.send("GET", path.format(link=rater.link))
    assert status == 404 and b"root:" not in body
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_bodies_have_a_bound(served: Served) -> None:
    assert served.send("POST", "/join", b'{"name": "' + b"x" * 5000 + b'"}')[0] == 413
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 4000):
        assert served.send("POST", "/join", body)[0] == 400, body[:10]


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    status, headers, body = served.send("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "reimagen", "not which versions run"
    text = body.decode()
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text


def test_a_kill_loses_nothing_and_an_open_page_goes_on(run: Path, tmp_path: Path) -> None:
    with serving(run, tmp_path / "votes", "--check-every", 3, "--side", 64) as page:
        rater = HttpRater(page, "Ada")
        for _ in range(4):
            rater.vote(1, 0)
        rater.undo()
        shown = rater.screen["item"]
        page.kill()
        before = page.events(rater.rater_id)
        assert len(before) == 5
        with (page.votes / "raters" / f"{rater.rater_id}.jsonl").open("a") as stream:
            stream.write('{"event": "vote", "serial": 5, "it')  # it was killed while it wrote
        page.start()
        assert page.events(rater.rater_id) == before
        assert any(rater.link in line and "Ada, 3 votes" in line for line in page.said), "links can be given again"
        assert rater.vote(0, 0)["counted"] is True, "the page that was open all the time"
        assert page.events(rater.rater_id)[-1]["item"] == before[-1]["item"], "what was undone came first again"
        assert rater.look()["item"]["item"] != shown["item"] and rater.screen["done"] == 4
        while rater.screen["item"]:
            rater.vote()
        votes = [e for e in page.events(rater.rater_id) if e["event"] == "vote"]
        assert len({v["item"] for v in votes}) == rater.screen["done"] == len(votes) - 1
        again = command("rate", "--run", run, "--votes", page.votes, "--address", "127.0.0.1:0")
        in_use = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert in_use.returncode == 2
        assert in_use.stderr == f"evaluation: error: votes: {page.votes} is in use by another process\n"
        assert stat.S_IMODE((page.votes / "key").stat().st_mode) == 0o600
        assert page.stop() == 0


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("rate.example:443", ("rate.example", 443))],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["8080", ":8080", "127.0.0.1", "127.0.0.1:x", "a:70000", "a@b:1", "a:1/x", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"address: .* is not HOST:PORT"):
        parse_address(text)
