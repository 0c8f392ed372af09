"""What an import needs of the place where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from retrieval_svc.pairs import NewPair, Upserted


class BatchRefused(Exception):
    """The batch as a whole was refused for what is in it: `field` and `reason`. Its pairs can be tried one by one."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Sink(Protocol):
    """Takes pairs for one knowledge base.

    Attributes:
        identity: names the knowledge base: another one of the same name, made later, has another.
        max_pairs, max_bytes: of one batch; a single pair may be larger.
    """

    @property
    def identity(self) -> str: ...

    @property
    def max_pairs(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    def upsert(self, pairs: Sequence[NewPair]) -> list[Upserted]:
        """Store the pairs; durable on return, an outcome for each, in order.

        Raises:
            BatchRefused: see there.
        """
        ...

    def finish(self) -> None:
        """All pairs are stored: wait until they can be found."""
        ...
