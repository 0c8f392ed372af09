"""Ids that callers give their requests (AIP-155), so that the same one again does nothing again."""

from __future__ import annotations

import hashlib
import secrets
import uuid

from common.service.errors import InvalidArgument

MAX_REQUESTS = 100  # ids that a run, or an export, remembers: the newest


def canonical(request_id: str) -> str:
    """A request's id as it is kept; empty for none.

    Raises:
        InvalidArgument: it is no UUID.
    """
    try:
        return str(uuid.UUID(request_id)) if request_id else ""
    except ValueError:
        raise InvalidArgument("request_id", f"{request_id!r} is not a UUID") from None


def eight_digits(request_id: str) -> str:
    """Hex digits that a request decides, or chance. Of a hash: the first ones of a version 7 id are the time alone."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:8] if request_id else secrets.token_hex(4)
