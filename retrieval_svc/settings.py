"""What the retrieval service is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.service.config import ConfigError, setting
from common.service.server import ServerSettings

PREFIX = "REIMAGEN_RETRIEVAL_"


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(ServerSettings):
    """What the retrieval service is told, by flags or by REIMAGEN_RETRIEVAL_ variables."""

    data: Path = setting(help="data folder of the knowledge bases; made if it is not there")  # noqa: RUF009 (a field)
    max_request_bytes: int = setting(default=64 << 20, help="largest request taken, in bytes")
    default_deadline_s: float = setting(default=30.0, help="seconds that a call without a deadline gets; 0: no limit")
    max_deadline_s: float = setting(default=600.0, help="seconds that any call gets at most; 0: no limit")
    search_threads: int = setting(default=2, help="lookups at work at once")
    search_queue: int = setting(default=64, help="lookups that wait; more are RESOURCE_EXHAUSTED")
    change_threads: int = setting(default=2, help="changes at work at once")
    change_queue: int = setting(default=32, help="changes that wait; more are RESOURCE_EXHAUSTED")
    clip: str | None = setting(
        default=None, help="CLIP model: its folder or name, or packaged; empty: none, BM25 alone embeds nothing"
    )
    clip_device: str = setting(default="cpu", help="where the CLIP model runs: cpu, cuda or cuda:N")
    clip_threads: int = setting(default=0, help="CPU threads of the CLIP model; 0: one for each core")
    snapshots: Path | None = setting(  # noqa: RUF009 (a field)
        default=None, help="folder in which snapshots are made; empty: none are"
    )
    image_prefixes: str | None = setting(
        default=None,
        help="addresses that pictures may be read from, with commas between: file:///FOLDER/, https://HOST/PATH/",
    )

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        for name in ("search_threads", "change_threads", "max_concurrent_calls", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not positive")
        for name in (
            "search_queue",
            "change_queue",
            "clip_threads",
            "default_deadline_s",
            "max_deadline_s",
            "drain_delay_s",
            "grace_s",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is negative")

    def allowed_image_prefixes(self) -> tuple[str, ...]:
        """The prefixes one by one."""
        return tuple(part.strip() for part in (self.image_prefixes or "").split(",") if part.strip())
