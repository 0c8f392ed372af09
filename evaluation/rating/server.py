"""The rating page over HTTP: one page, its state as JSON, pictures by names that mean nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from common.images import ImageError
from evaluation.rating.guard import MAX_BODY, Guard, security_headers
from evaluation.rating.items import Item, Shown
from evaluation.rating.pictures import MEDIA_TYPE, Renderer
from evaluation.rating.rating import Rater, Rating, Refused

PAGE = Path(__file__).parent / "page.html"
_LOG = logging.getLogger(__name__)


class Pages:
    """Handlers of requests."""

    def __init__(self, rating: Rating, renderer: Renderer, page: str) -> None:
        self._rating = rating
        self._renderer = renderer
        self._page = page
        self._ahead: set[asyncio.Task[None]] = set()

    def application(self, guard: Guard) -> web.Application:
        """All routes, guarded."""
        app = web.Application(middlewares=[guard.check], client_max_size=MAX_BODY)
        headers = security_headers(self._page)

        async def protect(request: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(headers)
            response.headers.setdefault("Cache-Control", "no-store")

        app.on_response_prepare.append(protect)
        app.router.add_get("/", self.front)
        app.router.add_get("/favicon.ico", self.icon)
        app.router.add_post("/join", self.join)
        app.router.add_get("/r/{link}", self.front)
        app.router.add_get("/r/{link}/screen", self.screen)
        app.router.add_post("/r/{link}/vote", self.vote)
        app.router.add_post("/r/{link}/undo", self.undo)
        app.router.add_get("/r/{link}/picture/{token}", self.picture)
        return app

    async def front(self, request: web.Request) -> web.Response:
        """The page, for a rater or for one who is to be."""
        if "link" in request.match_info:
            self._rater(request)
        return web.Response(text=self._page, content_type="text/html")

    async def icon(self, request: web.Request) -> web.Response:
        """Browsers ask for one."""
        return web.Response(status=204)

    async def join(self, request: web.Request) -> web.Response:
        """A new rater by name; gives the last part of the rater's address."""
        given = await _document(request)
        return web.json_response({"link": _taken(lambda: self._rating.join(given.get("name"))).link})

    async def screen(self, request: web.Request) -> web.Response:
        """What the rater's page shows."""
        return await self._answer(self._rater(request))

    async def vote(self, request: web.Request) -> web.Response:
        """Keep a vote; answers with what comes next."""
        rater, given = self._rater(request), await _document(request)
        try:
            counted = await self._rating.vote(rater, given)
        except Refused as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except OSError as error:
            raise _unwritten(error) from None
        return await self._answer(rater, counted=counted)

    async def undo(self, request: web.Request) -> web.Response:
        """Take the last vote back; answers with its item."""
        rater, given = self._rater(request), await _document(request)
        try:
            counted = await self._rating.undo(rater, given)
        except Refused as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except OSError as error:
            raise _unwritten(error) from None
        return await self._answer(rater, counted=counted)

    async def picture(self, request: web.Request) -> web.Response:
        """A picture that is, or was, on the rater's screen."""
        shown = self._rater(request).tokens.get(request.match_info["token"])
        if shown is None:
            raise web.HTTPNotFound(text="picture: none of yours\n")
        body = await asyncio.to_thread(self._renderer.encode, shown)
        return web.Response(body=body, content_type=MEDIA_TYPE, headers={"Cache-Control": "private, max-age=3600"})

    def _rater(self, request: web.Request) -> Rater:
        rater = self._rating.rater(request.match_info["link"])
        if rater is None:
            raise web.HTTPNotFound(text="This link is no rater's.\n")
        return rater

    async def _answer(self, rater: Rater, **more: Any) -> web.Response:
        """The rater's screen, once its pictures are ready; one that cannot be read is left out."""
        while (item := self._rating.show(rater)) is not None:
            try:
                await self._prepare(item)
                break
            except (ImageError, OSError) as error:
                _LOG.warning("left out: %s of %s (%s)", item.prompt_id, item.system or item.check, error)
                if rater.screen is item:
                    self._rating.drop(rater, item)
        self._prepare_ahead(self._rating.after(rater))
        return web.json_response({**more, **self._rating.screen(rater)})

    async def _prepare(self, item: Item) -> None:
        await asyncio.gather(*(asyncio.to_thread(self._renderer.encode, shown) for shown in _all_shown(item)))

    def _prepare_ahead(self, item: Item | None) -> None:
        """While the rater looks; what cannot be read is found out when it is that item's turn."""
        if item is None:
            return

        async def prepare() -> None:
            with suppress(ImageError, OSError):
                await self._prepare(item)

        task = asyncio.create_task(prepare())
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)


def _all_shown(item: Item) -> list[Shown]:
    return [*item.pictures, *(Shown(path=path) for path in item.references)]


async def _document(request: web.Request) -> dict[str, Any]:
    try:
        document = json.loads(await request.text())
    except ValueError:  # of UTF-8 too
        document = None
    except RecursionError:
        document = None
    if not isinstance(document, dict):
        raise web.HTTPBadRequest(text="body: not an object of JSON\n")
    return document


def _taken(body: Callable[[], Rater]) -> Rater:
    try:
        return body()
    except Refused as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    except OSError as error:
        raise _unwritten(error) from None


def _unwritten(error: OSError) -> web.HTTPException:
    """Whoever sent it keeps it, and tries again."""
    _LOG.error("not written: %s", error)
    return web.HTTPServiceUnavailable(text="The answer could not be written; it is tried again.\n")


async def serve(
    rating: Rating, renderer: Renderer, *, host: str, port: int, public_url: str, ready: Callable[[str], None]
) -> None:
    """Answer until SIGTERM or Ctrl-C.

    Args:
        ready: told the page's address once it answers; of port 0, with the port that was free.

    Raises:
        OSError: the address cannot be listened on.
    """
    pages = Pages(rating, renderer, PAGE.read_text(encoding="utf-8"))
    runner = web.AppRunner(
        pages.application(Guard(host=host, public_url=public_url)), shutdown_timeout=2.0, access_log=None
    )
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        bound = runner.addresses[0][1]
        shown = f"[{host}]" if ":" in host else host
        ready(public_url.rstrip("/") or f"http://{shown}:{bound}")
        await stop.wait()
    finally:
        await runner.cleanup()
