"""The `reimagen` command, against a running generator, retrieval service and trainer."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from client.command_line import BadInput, Parser, asked_at, connection_flags
from client.errors import ServiceFailed
from client.generate_command import add_generate
from client.knowledge_base_command import add_kb
from client.message_fields import FieldError
from client.service_commands import add_service_commands
from client.train_command import add_train

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 128 + signal.SIGINT
_CALLERS_FAULT = ("INVALID_ARGUMENT", "OUT_OF_RANGE")


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run one command; gives the exit status.

    0; 2 for input that cannot be, 1 for what failed, each with one line on standard error; 130 on Ctrl-C and 143 on SIGTERM,
    with the call cancelled.
    """
    before = signal.signal(signal.SIGTERM, _unwind)
    flags = argparse.Namespace()
    try:
        flags = _parser(os.environ if environment is None else environment).parse_args(arguments)
        return flags.body(flags)
    except (BadInput, FieldError) as error:
        return _say(str(error), BAD_INPUT)
    except ServiceFailed as error:
        return _say(_what_failed(error, flags), BAD_INPUT if error.code in _CALLERS_FAULT else FAILED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        return _say(f"{error.strerror or error}{place}", FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = Parser(prog="reimagen", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = connection_flags(environment)
    add_generate(commands, shared)
    add_kb(commands, shared)
    add_train(commands, shared)
    add_service_commands(commands, shared)
    return parser


def _what_failed(error: ServiceFailed, flags: argparse.Namespace) -> str:
    """The fields at fault where the service names them, else its code and what it says; and where it was asked, if nobody
    answered there."""
    if error.violations:
        return "; ".join(f"{violation.field}: {violation.description}" for violation in error.violations)
    later = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s is not None else ""
    nobody = error.code == "UNAVAILABLE" and not error.reason  # a service that answers gives a reason
    where = f" ({asked_at(flags)})" if nobody else ""
    return f"{error.code}: {error.description}{later}{where}"


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _say(text: str, status: int) -> int:
    print(f"reimagen: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
