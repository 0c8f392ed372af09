"""A new version on running Tritons: one after another, and back again on all of them where one cannot serve it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from common.files import write_atomic
from generator_svc.model_versions import CONFIG, served_version
from generator_svc.triton_client import LoadFailed, TritonClient

LOAD_TIMEOUT_S = 600.0  # weights of gigabytes are read, checked and warmed up within it


class RollOutFailed(RuntimeError):
    """A version was not taken; the message says where, why, and what is served now."""


async def roll_out(
    repository: Path,
    models: Iterable[str],
    before: Mapping[str, str],
    addresses: Sequence[str],
    *,
    admin_key: str,
    credentials: grpc.ChannelCredentials | None = None,
    timeout_s: float = LOAD_TIMEOUT_S,
) -> None:
    """Have Tritons load what the repository says, one at a time; requests under way end with the version they began with.

    Args:
        models: which; a Triton that has loaded one as it is keeps it as it is.
        before: `configurations` of the repository before it was changed.
        addresses: of the Tritons, all of which serve this repository.
        admin_key: which they ask for.
        credentials: of TLS; None: the connections are in the clear.
        timeout_s: what one model at one Triton may take, its warm-up included.

    Raises:
        RollOutFailed: a Triton did not load a model. Its configuration is the one before again, and the Tritons that had
            taken the new one were told so.
    """
    async with _clients(addresses, credentials) as clients:
        for model in sorted(models):
            await _load_everywhere(repository / model, before.get(model), clients, admin_key, timeout_s)


async def _load_everywhere(
    model: Path, before: str | None, clients: Sequence[TritonClient], admin_key: str, timeout_s: float
) -> None:
    version = served_version(model)
    loaded: list[TritonClient] = []
    for client in clients:
        try:
            await client.load(model.name, admin_key=admin_key, timeout_s=timeout_s)
            loaded.append(client)
        except LoadFailed as error:
            back = "no other version was served before"
            if before is not None and before != (model / CONFIG).read_text():
                write_atomic(model / CONFIG, before)
                lost = await _reload(model.name, loaded, admin_key, timeout_s)
                back = f"the repository says version {served_version(model)} again, which is what is served{lost}"
            raise RollOutFailed(f"{model.name} version {version}: {error}; {back}") from None


async def _reload(model: str, clients: Sequence[TritonClient], admin_key: str, timeout_s: float) -> str:
    """Load what the configuration names again; says where that failed."""
    lost: list[str] = []
    for client in clients:
        try:
            await client.load(model, admin_key=admin_key, timeout_s=timeout_s)
        except LoadFailed:
            lost.append(client.address)
    return f", but not at {', '.join(lost)}" if lost else ""


@asynccontextmanager
async def _clients(
    addresses: Sequence[str], credentials: grpc.ChannelCredentials | None
) -> AsyncIterator[list[TritonClient]]:
    clients = [TritonClient(address, credentials=credentials) for address in addresses]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()
