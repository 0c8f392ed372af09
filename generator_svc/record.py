"""The record of a picture: everything that drew it, and whose work it shows. `recorded.py` reads it again.

A picture's own record holds no times and no versions, so that the same request gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from generator_svc.neighbors import Neighbor, Retrieved
from generator_svc.order import CheckedOrder
from generator_svc.recorded import FORMAT
from generator_svc.stage_backend import StageInfo


def order_record(
    checked: CheckedOrder, retrieved: Retrieved, *, infos: Mapping[int, StageInfo], text_encoder: str
) -> dict[str, Any]:
    """What all pictures of an order have in common.

    Args:
        infos: of the stages that drew it, by the stage's size.
        text_encoder: its name.
    """
    order = checked.order
    return {
        "format": FORMAT,
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt,
        "retrieval": {
            "k": checked.k,
            "knowledge_base": retrieved.knowledge_base,
            "index_fingerprint": retrieved.index_fingerprint,
            "method": retrieved.method,
            "excluded_pair_ids": list(order.excluded_pair_ids),
            "exclude_exact": order.exclude_exact,
            "shortfall_reason": retrieved.shortfall_reason,
            "degraded_reason": retrieved.degraded_reason,
        },
        "neighbors": [_neighbor(neighbor) for neighbor in retrieved.neighbors],
        "start_from_sha256": sha256(order.start_from.image) if order.start_from else "",
        "weights": {f"unet_{size}": infos[size].weights_sha256 for size in checked.sizes},
        "text_encoder": text_encoder,
    }


def picture_record(common: Mapping[str, Any], checked: CheckedOrder, picture: int) -> str:
    """The JSON of one picture's own record; `picture` in it counts those of its seed."""
    plans = [plans[picture] for plans in checked.stages]
    record = {
        **common,
        "seed": plans[0].seed,
        "picture": plans[0].sample,
        "plans": [plan.to_json() for plan in plans],
    }
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def full_record(
    common: Mapping[str, Any],
    checked: CheckedOrder,
    timings_s: Mapping[str, float],
    *,
    infos: Mapping[int, StageInfo],
) -> dict[str, Any]:
    """The record of the whole order: with every picture's plans, versions, and timings in seconds."""
    return {
        **common,
        "seed": checked.seeds[0],
        "seeds": list(checked.seeds),
        "num_pictures": checked.num_pictures,
        "plans": [plan.to_json() for plans in checked.stages for plan in plans],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "models": {f"unet_{size}": infos[size].version for size in checked.sizes},
        "timings_s": {name: round(seconds, 4) for name, seconds in timings_s.items()},
    }


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _neighbor(neighbor: Neighbor) -> dict[str, Any]:
    return {
        "rank": neighbor.rank,
        "score": neighbor.score,
        "pair_id": neighbor.pair_id,
        "caption": neighbor.caption,
        "entity": neighbor.entity,
        "image_sha256": neighbor.image_sha256,
        "facets": dict(neighbor.facets),
        "author": neighbor.author,
        "source": neighbor.source,
        "license": neighbor.license,
        "is_reference": neighbor.is_reference,
    }
