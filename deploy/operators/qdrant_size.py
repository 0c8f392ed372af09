"""Memory and disk of a Qdrant that holds N pairs, by the sizes of what it keeps; see sizing.md for where each is from."""

from __future__ import annotations

import math
from dataclasses import dataclass

OVERHEAD = 1.2  # of memory, for what is not counted: segments, caches of pages, queries under way
ID_BYTES = 20  # of a point: its id both ways, its version
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a point is kept, and where.

    Attributes:
        name: of the plan.
        bits: of each dimension of what is searched, pinned in memory.
        m: edges of a point in the graph; twice as many on its lowest level.
    """

    name: str
    bits: float
    m: int


# `turbo4` is what retrieval_svc asks a server for by default (4 bits a dimension, m 16).
PLANS = (
    Plan(name="int8", bits=8, m=16),
    Plan(name="turbo4", bits=4, m=16),
    Plan(name="binary", bits=1, m=6),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of all copies together, in GB (1e9 bytes).

    Attributes:
        memory_gb: of one copy.
        disk_gb: of one copy.
        nodes: of `node_gb` that hold all copies, never fewer than the copies.
    """

    plan: str
    memory_gb: float
    disk_gb: float
    nodes: int


def size(pairs: int, plan: Plan, *, dimensions: int, payload_bytes: float, copies: int, node_gb: float) -> Size:
    """Memory and disk of `pairs` pairs.

    Memory of a copy is (vectors that are searched + links + ids) * 1.2: d * bits / 8, 2 m * 4 and 20 bytes a point. On disk are
    those, the originals as float16, and the payload; and once more the largest segment while it is rebuilt, taken as a quarter.

    Args:
        payload_bytes: of a pair: caption, author, license, address of its picture.
        copies: replication factor.
        node_gb: memory of a node; three quarters of it are counted on.

    Raises:
        ValueError: a number is not positive.
    """
    given = {
        "pairs": pairs,
        "dimensions": dimensions,
        "payload_bytes": payload_bytes,
        "copies": copies,
        "node_gb": node_gb,
    }
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value} is not positive")
    searched = pairs * (dimensions * plan.bits / 8 + 2 * plan.m * 4 + ID_BYTES)
    disk = (searched + pairs * (dimensions * 2 + payload_bytes)) * 1.25
    memory = searched * OVERHEAD
    nodes = max(copies, math.ceil(memory * copies / GB / (0.75 * node_gb)))
    return Size(plan=plan.name, memory_gb=memory / GB, disk_gb=disk / GB, nodes=nodes)
