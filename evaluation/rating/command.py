"""The commands `rate` and `rate-report`."""

from __future__ import annotations

import argparse
import asyncio
import logging
from contextlib import closing
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from evaluation.rating.items import Judge, load_items
from evaluation.rating.pictures import Renderer
from evaluation.rating.rating import Rating
from evaluation.rating.report import MIN_PASS_RATE, evaluate_votes, read_raters, write_report
from evaluation.rating.server import serve


def add_rating(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands; their `body` takes the flags."""
    rate = commands.add_parser("rate", help="a page on which people rate the pictures of runs, blind to the system")
    rate.add_argument(
        "--run", type=Path, action="append", required=True, help="folder of a run; give it again for more"
    )
    rate.add_argument("--votes", type=Path, required=True, help="folder of the votes; made where there is none")
    rate.add_argument("--address", default="127.0.0.1:8080", help="HOST:PORT, port 0: any; default: %(default)s")
    rate.add_argument("--public-url", default="", help="how raters reach the page, where a proxy stands before it")
    rate.add_argument("--judge", choices=get_args(Judge), default="best", help="the best picture of a prompt, or each")
    rate.add_argument("--side", type=int, default=512, help="pixels of a picture on the page; default: %(default)s")
    rate.add_argument("--check-every", type=int, default=10, help="one of so many is an attention check; 0: none is")
    rate.add_argument("--raters", type=int, default=3, help="votes a picture should get; default: %(default)s")
    rate.set_defaults(body=_rate)
    report = commands.add_parser("rate-report", help="what people said, per system and category: JSON, Markdown, plot")
    report.add_argument("--votes", type=Path, required=True, help="folder of the votes")
    report.add_argument("--out", type=Path, help="folder of the report; default: that of the votes")
    report.add_argument(
        "--min-pass-rate", type=float, default=MIN_PASS_RATE, help="share of attention checks a rater must pass"
    )
    report.set_defaults(body=_report)


def _rate(flags: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    host, port = parse_address(flags.address)
    if not 64 <= flags.side <= 2048:
        raise ValueError(f"side: {flags.side} is not between 64 and 2048")
    if flags.public_url and urlsplit(flags.public_url).scheme not in ("http", "https"):
        raise ValueError(f"public_url: {flags.public_url!r} is no http or https address")
    items = load_items(flags.run, flags.judge)
    with closing(Rating(items, flags.votes, check_every=flags.check_every, wanted=flags.raters)) as rating:

        def ready(url: str) -> None:
            systems, prompts = len({item.system for item in items}), len({item.prompt_id for item in items})
            print(
                f"{len(items)} items to rate: {prompts} prompts, {systems} systems; votes in {flags.votes}", flush=True
            )
            for rater in rating.raters:
                print(f"  {rater.file.name}, {len(rater.file.votes)} votes: {url}/r/{rater.link}", flush=True)
            print(f"new raters: {url}/", flush=True)

        serving = serve(rating, Renderer(flags.side), host=host, port=port, public_url=flags.public_url, ready=ready)
        asyncio.run(serving)


def _report(flags: argparse.Namespace) -> None:
    report = evaluate_votes(read_raters(flags.votes), flags.min_pass_rate)
    print(write_report(flags.out or flags.votes, report), end="")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT ([HOST]:PORT of IPv6); a ValueError where it is none."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.netloc != text or "@" in text:
        raise ValueError(f"address: {text!r} is not HOST:PORT")
    return host, port
