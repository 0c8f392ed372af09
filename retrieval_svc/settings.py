"""What the retrieval service is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from common.service.config import ConfigError, setting
from common.service.server import ServerSettings
from retrieval_svc.bm25 import AUTO_PROCESS_PAIRS
from retrieval_svc.qdrant_connection import QdrantSettings

PREFIX = "REIMAGEN_RETRIEVAL_"


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Where pairs are kept: in the data folder, or on a Qdrant server that several replicas share."""

    bm25: Literal["tantivy", "qdrant"] = setting(
        default="tantivy", help="what answers BM25: tantivy (an index on this disk) or qdrant (its sparse vectors)"
    )
    shared_pictures: Path | None = setting(  # noqa: RUF009 (a field, as are the next)
        default=None,
        help="of a Qdrant server: folder of the pictures, which all replicas share; empty: in the data folder",
    )
    qdrant_url: str | None = setting(
        default=None, help="http(s)://HOST[:PORT] of a Qdrant server's gRPC; empty: pairs are in the data folder"
    )
    qdrant_api_key_file: Path | None = setting(  # noqa: RUF009
        default=None, help="holds Qdrant's API key; read anew at each call"
    )
    qdrant_ca_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificates of Qdrant's authority; empty: those that the system trusts"
    )
    qdrant_prefix: str = setting(default="reimagen-", help="begins the names of our collections")
    qdrant_timeout_s: int = setting(default=10, help="deadline of a call to Qdrant, in seconds")
    qdrant_build_timeout_s: float = setting(default=3600.0, help="deadline of waiting for Qdrant's graphs, in seconds")
    qdrant_poll_s: float = setting(default=0.25, help="seconds between looks for what other replicas have written")
    qdrant_replication_factor: int = setting(default=2, help="new collections: copies of each shard")
    qdrant_write_consistency_factor: int = setting(
        default=1, help="new collections: copies that must have confirmed a write"
    )
    qdrant_shards: int = setting(default=0, help="new collections: shards; 0: one for each node")
    qdrant_quantization: Literal["turbo4", "int8", "none"] = setting(
        default="turbo4", help="new collections: what searches run over in memory: turbo4 (1/8), int8 (1/4) or none"
    )
    qdrant_on_disk_originals: bool = setting(
        default=True, help="new collections: embeddings are read from disk, as float16, to compare the best once more"
    )
    qdrant_m: int = setting(default=16, help="new collections: edges of a node of the HNSW graph")
    qdrant_ef_construct: int = setting(default=128, help="new collections: candidates while the graph is built")
    qdrant_hnsw_ef: int = setting(default=128, help="candidates of a search")
    qdrant_oversampling: float = setting(
        default=2.0, help="so many times the asked number are taken from the quantized search"
    )

    def qdrant(self) -> QdrantSettings | None:
        """How the Qdrant server is used; None: there is none.

        Raises:
            ConfigError: a value cannot be, or is for a server and there is none; by the setting's name.
        """
        least = {
            "timeout_s": 1,
            "build_timeout_s": 1,
            "poll_s": 0.01,
            "replication_factor": 1,
            "write_consistency_factor": 1,
            "shards": 0,
            "m": 1,
            "ef_construct": 1,
            "hnsw_ef": 1,
            "oversampling": 1,
        }
        for name, bound in least.items():
            value = getattr(self, f"qdrant_{name}")
            if not bound <= value < math.inf:
                raise ConfigError(f"--qdrant-{name.replace('_', '-')}: {value} is not at least {bound}")
        if self.qdrant_write_consistency_factor > self.qdrant_replication_factor:
            raise ConfigError(
                f"--qdrant-write-consistency-factor: {self.qdrant_write_consistency_factor} is more than the"
                f" {self.qdrant_replication_factor} copies that there are"
            )
        if not self.qdrant_url:
            self._check_nothing_is_for_a_server()
            return None
        return QdrantSettings(
            url=self.qdrant_url,
            api_key_file=self.qdrant_api_key_file,
            ca_file=self.qdrant_ca_file,
            timeout_s=self.qdrant_timeout_s,
            build_timeout_s=self.qdrant_build_timeout_s,
            replication_factor=self.qdrant_replication_factor,
            write_consistency_factor=self.qdrant_write_consistency_factor,
            shard_number=self.qdrant_shards or None,
            quantization=None if self.qdrant_quantization == "none" else self.qdrant_quantization,
            on_disk_originals=self.qdrant_on_disk_originals,
            oversampling=self.qdrant_oversampling,
            m=self.qdrant_m,
            ef_construct=self.qdrant_ef_construct,
            hnsw_ef=self.qdrant_hnsw_ef,
        )

    def _check_nothing_is_for_a_server(self) -> None:
        for field in fields(StoreSettings):
            is_for_one = field.name.startswith("qdrant_") or field.name == "shared_pictures"
            if is_for_one and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name.replace('_', '-')}: is of a Qdrant server; give --qdrant-url as well")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(ServerSettings, StoreSettings):
    """What the retrieval service is told, by flags or by REIMAGEN_RETRIEVAL_ variables."""

    data: Path = setting(help="data folder of the knowledge bases; made if it is not there")  # noqa: RUF009 (a field)
    max_request_bytes: int = setting(default=64 << 20, help="largest request taken, in bytes")
    default_deadline_s: float = setting(default=30.0, help="seconds that a call without a deadline gets; 0: no limit")
    max_deadline_s: float = setting(default=600.0, help="seconds that any call gets at most; 0: no limit")
    search_threads: int = setting(default=2, help="lookups at work at once")
    search_queue: int = setting(default=64, help="lookups that wait; more are RESOURCE_EXHAUSTED")
    change_threads: int = setting(default=2, help="changes at work at once")
    change_queue: int = setting(default=32, help="changes that wait; more are RESOURCE_EXHAUSTED")
    bm25_process: Literal["auto", "on", "off"] = setting(
        default="auto",
        help="of tantivy: on: a process of its own searches; off: the service itself; auto: the former, where there"
        f" are two cores, in each knowledge base of {AUTO_PROCESS_PAIRS:,} pairs and more",
    )
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
        qdrant = self.qdrant()
        if self.bm25 != "tantivy" and self.bm25_process == "on":
            raise ConfigError("--bm25-process: on is of tantivy, and --bm25 is qdrant")
        if qdrant and 0 < self.default_deadline_s <= qdrant.timeout_s:
            raise ConfigError(
                f"--qdrant-timeout-s: {qdrant.timeout_s} is not below the {self.default_deadline_s:g} s of"
                " --default-deadline-s: a call would be given up before Qdrant is"
            )
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
