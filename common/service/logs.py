"""Logs of a service on standard error: one JSON object a line for machines, or plain lines for people."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

TRACE = "trace"  # the name in `extra` of a trace that was written (and redacted) by its logger
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, all of `extra`, an error's trace."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line[TRACE] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A plain line; what `extra` brought follows as name=value, and its trace on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        known = {name: value for name, value in vars(record).items() if name not in _OWN}
        trace = known.pop(TRACE, "")
        extra = " ".join(f"{name}={value}" for name, value in known.items())
        return super().formatMessage(record) + (f" [{extra}]" if extra else "") + (f"\n{trace}" if trace else "")


def configure_logs(*, service: str, level: str, style: str, stream: TextIO | None = None) -> None:
    """Send every log of this process to `stream` (standard error), in `style` "json" or "text", from `level`
    up.

    Called once, by `__main__`; it replaces what was configured before.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service) if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
