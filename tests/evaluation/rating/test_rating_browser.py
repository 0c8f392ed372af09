"""The rating page in a real browser, as a person meets it: at a desk and on a phone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.rating.report import read_raters
from tests.evaluation.rating.browser import Browser, chromium
from tests.evaluation.rating.sample_run import make_run
from tests.evaluation.rating.served import Served, serving

PHONE = (360, 640)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("rating")
    with serving(make_run(folder / "run").path, folder / "votes", "--check-every", 4, "--side", 256) as page:
        yield page


@pytest.fixture(scope="module")
def desk() -> Iterator[Browser]:
    with chromium(1280, 800) as browser:
        yield browser


@pytest.fixture(scope="module")
def phone() -> Iterator[Browser]:
    with chromium(*PHONE, is_phone=True) as browser:
        yield browser


def test_a_rating_by_keyboard_from_name_to_thanks(served: Served, desk: Browser) -> None:
    desk.join(served.url, "Ada")
    assert desk.find("#questions button").get_attribute("disabled"), "first a picture is chosen"
    desk.press("y", "3")
    assert desk.run("return [picked, JSON.stringify(answers)]") == [2, "{}"]
    first = desk.run("return screen_.item.item")
    desk.press("n", "y")
    desk.wait_for(1)
    (vote,) = served.events(desk.rater_id)
    assert (vote["photorealism"], vote["faithfulness"]) == (0, 1) and 0 < vote["seconds"] < 300
    assert desk.find("#status").text == "Kept: real no, as asked yes"
    desk.press("u")
    desk.wait_for(0)
    assert desk.run("return screen_.item.item") == first
    desk.press("z")
    assert desk.run("return document.getElementById('zoom').open")
    desk.press("\ue014", "\ue014", "2", "z")  # arrow right, twice
    assert desk.run("return [picked, zoomed, document.getElementById('zoom').open]") == [1, 1, False]
    desk.press("?")
    assert desk.run("return document.getElementById('help').open")
    desk.press("?")
    total, seen = desk.run("return screen_.total"), set()
    for done in range(total):
        seen.add(desk.run("return screen_.item.prompt"))
        desk.press("1", "y", "y")
        desk.wait_for(done + 1)
    assert desk.find("#done").is_displayed() and "Thank you" in desk.find("#done").text
    assert len(seen) == 6 and any("<img src=x onerror=" in prompt for prompt in seen)
    assert desk.driver.title == "Rate pictures", "a name is text, whatever it holds"
    assert desk.complaints() == [], "nothing that the policy blocks, no error"
    (told,) = [rater for rater in read_raters(served.votes) if rater.name == "Ada"]
    assert len(told.votes) == 12 and told.checks >= 3
    kept = {v["item"]: v["check"] for v in served.events(desk.rater_id) if v["event"] == "vote"}  # one was taken back
    assert told.passed == list(kept.values()).count("real") < told.checks, (
        "whoever always says yes passes no other check"
    )


def test_nothing_on_the_page_tells_the_system(served: Served, desk: Browser) -> None:
    desk.join(served.url, "Blind")
    for done in range(6):
        page = desk.run("return document.documentElement.outerHTML + JSON.stringify(screen_) + location.href")
        asked = desk.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert asked and all(name.startswith(served.url) for name in asked), "nothing from elsewhere"
        for word in ("secret", "retrieving", "pictures/", "references/", ".png", '"check"', "scrambled"):
            assert word not in page + json.dumps(asked), word
        sizes = desk.run(
            "return [...document.images].filter((i) => i.src).map((i) => [i.naturalWidth, i.naturalHeight])"
        )
        assert len(sizes) >= 5 and {tuple(size) for size in sizes} == {(256, 256)}
        desk.press("2", "n", "n")
        desk.wait_for(done + 1)


def test_a_phone_by_touch(served: Served, phone: Browser) -> None:
    phone.join(served.url, "Cy")
    assert phone.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360], "nothing to the side"
    boxes = phone.run(
        "return [...document.querySelectorAll('main button, #bar button')].filter((b) => b.offsetParent)"
        ".map((b) => { const r = b.getBoundingClientRect(); return [r.left, r.right, r.width, r.height]; })"
    )
    assert len(boxes) >= 15
    assert [box for box in boxes if box[0] < 0 or box[1] > 360 or min(box[2:]) < 36] == [], "large enough for a finger"
    answers = phone.run(
        "const r = document.getElementById('questions').getBoundingClientRect(); return [r.top, r.bottom]"
    )
    assert answers[1] <= PHONE[1] + 1 and answers[1] - answers[0] < 150, (
        "the answers stay on the screen, the pictures too"
    )
    phone.tap("#pictures .tile:nth-child(4) .closer")
    assert phone.run("return zoomed") == 3 and phone.find("#caption").text == "drawn 4 of 4"
    assert phone.run("return document.getElementById('zoom').getBoundingClientRect().width") > 330
    phone.find("#best").click()
    for name, value in (("photorealism", 1), ("faithfulness", 0)):
        phone.find(f"[data-name={name}] [data-value='{value}']").click()
    phone.wait_for(1)
    (vote,) = served.events(phone.rater_id)
    assert (vote["photorealism"], vote["faithfulness"]) == (1, 0)
    phone.find("#undo").click()
    phone.wait_for(0)
    assert [e["event"] for e in served.events(phone.rater_id)] == ["vote", "undo"]
    assert phone.complaints() == []


def test_two_raters_at_once_who_come_back(served: Served, desk: Browser, phone: Browser) -> None:
    desk.join(served.url, "Di")
    phone.join(served.url, "Ed")
    prompts: dict[str, list[str]] = {"desk": [], "phone": []}
    for done in range(4):
        for name, browser in (("desk", desk), ("phone", phone)):
            prompts[name].append(browser.run("return screen_.item.prompt"))
            browser.press("1", "y", "n")
            browser.wait_for(done + 1)
    assert prompts["desk"] != prompts["phone"] and desk.rater_id != phone.rater_id
    for browser in (desk, phone):
        assert len(served.events(browser.rater_id)) == 4
    own = desk.driver.current_url
    desk.driver.get(served.url)
    assert desk.find("#again").text == "Go on as Di"
    desk.find("#again").click()
    desk.wait_for(4)
    assert desk.driver.current_url == own and not desk.run("return document.getElementById('help').open")
    desk.driver.get(own[:-1])
    assert "This link is no rater's." in desk.find("body").text
    assert [message for message in desk.complaints() if "404" not in message] == phone.complaints() == []


def test_a_server_that_is_killed_under_an_open_page(tmp_path: Path, desk: Browser) -> None:
    with serving(make_run(tmp_path / "run").path, tmp_path / "votes", "--side", 64) as page:
        desk.join(page.url, "Flo")
        desk.press("1", "y", "y")
        desk.wait_for(1)
        page.kill()
        desk.press("2", "n", "y")
        desk.until("return document.getElementById('status').textContent.startsWith('No connection')")
        desk.press("n", "n", "u")
        time.sleep(0.7)  # it tries again, in vain
        page.start()
        desk.wait_for(2)
        events = page.events(desk.rater_id)
        assert [(e["event"], e["photorealism"], e["faithfulness"]) for e in events] == [("vote", 1, 1), ("vote", 0, 1)]
        desk.driver.refresh()
        desk.wait_for(2)
        desk.press("1", "y", "y")
        desk.wait_for(3)
        assert len({e["item"] for e in page.events(desk.rater_id)}) == 3
        refused = desk.complaints(lambda message: "ERR_CONNECTION" in message or "ERR_EMPTY_RESPONSE" in message)
        assert refused == []
