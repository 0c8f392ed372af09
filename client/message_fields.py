"""Values into fields of messages, and enums by the names that people use."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)


class FieldError(ValueError):
    """A value that the contract cannot say; the message names its field."""


def fitted(kind: type[M], place: str = "", **fields: Any) -> M:
    """A message of these fields; `place` is where it stands, e.g. "stages[0].".

    Raises:
        FieldError: names the field that does not hold its value; protobuf names the value alone.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                raise FieldError(f"{place}{name}: {error}") from None
        raise


def number_of(kind: Any, prefix: str, field: str, name: str | None) -> Any:
    """The number of an enum's value: ("SAMPLER", "ddim") is SAMPLER_DDIM; no name is the unspecified one.

    Raises:
        FieldError: names the field, and the names that there are.
    """
    full = f"{prefix}_{(name or 'unspecified').upper()}"
    if full not in kind.keys():  # noqa: SIM118 (an enum of protobuf is no mapping)
        raise FieldError(f"{field}: {name!r} is not one of {', '.join(names_of(kind, prefix))}")
    return kind.Value(full)


def name_of(kind: Any, prefix: str, number: int) -> str:
    """The name of a number; the number itself where it is newer than this client."""
    return kind.Name(number).removeprefix(f"{prefix}_").lower() if number in kind.values() else str(number)


def names_of(kind: Any, prefix: str) -> tuple[str, ...]:
    """The names of an enum's values: of pb.Sampler and "SAMPLER", ddpm, ddim and dpmpp_2m."""
    return tuple(key.removeprefix(f"{prefix}_").lower() for key in kind.keys() if kind.Value(key))  # noqa: SIM118
