"""What the address of a Triton stands for."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

UNIX = "unix:"


async def resolved(address: str) -> dict[str, str]:
    """What `address` stands for: itself for a Unix socket or a number, each of its numbers for a name; of each the name,
    which its certificate has to bear (empty: there is none).

    Raises:
        OSError: the name is not known, or nobody answers.
    """
    host, _, port = address.rpartition(":")
    if address.startswith(UNIX) or _is_number(host.strip("[]")):
        return {address: ""}
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    hosts = {str(place[0]) for _, _, _, _, place in found}
    return {f"[{each}]:{port}" if ":" in each else f"{each}:{port}": host for each in hosts}


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
