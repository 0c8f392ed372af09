"""How admission is set: flags and variables of the generator beside those of its server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.service.config import ConfigError, setting
from common.service.server import ServerSettings
from common.stages import STAGES
from generator_svc.admission_limits import AdmissionLimits

_POSITIVE = ("slots", "max_waiting", "max_waiting_s", "priority_aging_s")
_NOT_NEGATIVE = ("deadline_share", "deadline_share_crowded", "results_kept_s", "results_kept_bytes")


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings(ServerSettings):
    """How many are drawn, how many wait, and what is kept for those who ask again."""

    slots: int = setting(default=8, help="requests that are drawn at once; they share the stages' batches")
    max_waiting: int = setting(default=64, help="requests of one priority and those above it that may wait for a slot")
    max_waiting_s: float = setting(
        default=120.0, help="estimated seconds of work that may wait, likewise; past it requests are RESOURCE_EXHAUSTED"
    )
    priority_aging_s: float = setting(
        default=30.0, help="seconds of waiting after which a request goes as if it were one priority higher"
    )
    deadline_share: float = setting(
        default=0.7,
        help="a request whose deadline leaves less than this share of the time it is estimated to take is refused at once;"
        " 0: only once its deadline has passed",
    )
    deadline_share_crowded: float = setting(
        default=1.15,
        help="the same while all slots are taken: over 1, so that none is taken by one that will be late; how far"
        " forecasts have lately been short comes on top",
    )
    pass_seconds: str | None = setting(
        default=None,
        help="seconds of one network pass by stage until they are measured, e.g. 64=0.03,256=0.02,1024=0.08; empty: no"
        " deadline is refused by an estimate before a picture has been drawn",
    )
    results_kept_s: float = setting(
        default=120.0, help="seconds for which a request with the same id is given what was drawn; 0: it is drawn anew"
    )
    results_kept_bytes: int = setting(
        default=64 << 20, help="memory for what is kept so, in bytes; the oldest goes first"
    )

    def check_admission(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is negative, or no number")
        self.guesses()

    def limits(self) -> AdmissionLimits:
        """What is let in."""
        return AdmissionLimits(
            slots=self.slots,
            max_waiting=self.max_waiting,
            max_waiting_s=self.max_waiting_s,
            aging_s=self.priority_aging_s,
            least_time=self.deadline_share,
            least_time_crowded=self.deadline_share_crowded,
        )

    def guesses(self) -> dict[int, float]:
        """Seconds of one pass by stage. Raises ConfigError for what cannot be read."""
        guesses: dict[int, float] = {}
        for part in filter(None, (part.strip() for part in (self.pass_seconds or "").split(","))):
            stage, _, seconds = part.partition("=")
            try:
                size, guess = int(stage), float(seconds)
            except ValueError:
                raise ConfigError(f"--pass-seconds: {part!r} is not STAGE=SECONDS") from None
            if size not in {spec.size for spec in STAGES} or not 0 < guess < math.inf:
                raise ConfigError(f"--pass-seconds: {part!r} is no stage, or no time")
            guesses[size] = guess
        return guesses
