"""What is answered to whom: the rater's own page alone, and no more than it needs."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

MAX_BODY = 4096  # bytes


def security_headers(page: str) -> dict[str, str]:
    """For every response. The page's own script and style run, named by their hashes, and nothing else."""
    script, style = (_hashed(tag, page) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src {script}; style-src {style}; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",  # the rater's address is the rater's key
        "Server": "reimagen",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "X-Robots-Tag": "noindex",
    }


def _hashed(tag: str, page: str) -> str:
    """Content Security Policy level 3, section 2.3.1."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


class Guard:
    """Refuses what another site's page could send, and names of hosts that are not ours (DNS rebinding)."""

    def __init__(self, *, host: str, public_url: str) -> None:
        """
        Args:
            host: that is listened on; where it is this machine's own, only its names are answered to.
            public_url: how raters reach the page through a proxy; empty: as it is listened on.
        """
        self._public = urlsplit(public_url).netloc.lower()
        self._only_local = is_local(host)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """For every request."""
        host = request.host.lower()
        if self._only_local and host != self._public and not is_local(urlsplit(f"//{host}").hostname or ""):
            raise web.HTTPMisdirectedRequest(text="host: this is another's name\n")
        if request.method == "POST":
            self._check_post(request, {host, self._public})
        return await handler(request)

    def _check_post(self, request: web.Request, ours: Collection[str]) -> None:
        """A browser says where a request comes from (Fetch standard, 3.2); what is no browser cannot be tricked."""
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise web.HTTPForbidden(text="origin: another site\n")
        origin = request.headers.get("Origin")
        if origin is not None and (urlsplit(origin).netloc.lower() or origin) not in ours:
            raise web.HTTPForbidden(text="origin: another site\n")
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="content type: application/json is needed\n")


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
