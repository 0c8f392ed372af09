"""The record of a picture: everything that drew it, and whose work it shows.

A picture's own record holds no times and no versions, so that the same request gives the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.diffusion.plan import Plan
from generator_svc.neighbors import Neighbor, Retrieved
from generator_svc.order import CheckedOrder

FORMAT = "reimagen-record/1"
CHUNK = "reimagen"  # keyword of the PNG's iTXt chunk


def order_record(
    checked: CheckedOrder, retrieved: Retrieved, *, weights: Mapping[int, str], text_encoder: str
) -> dict[str, Any]:
    """What all pictures of an order have in common.

    Args:
        weights: sha256 of each stage's weights, by the stage's size.
        text_encoder: its name.
    """
    order = checked.order
    return {
        "format": FORMAT,
        "prompt": order.prompt,
        "seed": checked.seed,
        "retrieval": {
            "k": checked.k,
            "knowledge_base": retrieved.knowledge_base,
            "index_fingerprint": retrieved.index_fingerprint,
            "method": retrieved.method,
            "excluded_pair_ids": list(order.excluded_pair_ids),
            "exclude_exact": order.exclude_exact,
            "shortfall_reason": retrieved.shortfall_reason,
        },
        "neighbors": [_neighbor(neighbor) for neighbor in retrieved.neighbors],
        "weights": {f"unet_{plan.stage}": weights[plan.stage] for plan in checked.plans},
        "text_encoder": text_encoder,
    }


def picture_chunks(common: Mapping[str, Any], plans: Sequence[Plan], picture: int) -> dict[str, str]:
    """The text chunks of a picture's PNG."""
    record = {**common, "picture": picture, "plans": [replace(plan, sample=picture).to_json() for plan in plans]}
    return {CHUNK: json.dumps(record, ensure_ascii=False, sort_keys=True)}


def full_record(common: Mapping[str, Any], checked: CheckedOrder, timings_s: Mapping[str, float]) -> dict[str, Any]:
    """The record of the whole order: with every picture's plans, versions, and timings in seconds."""
    return {
        **common,
        "num_pictures": checked.order.num_pictures,
        "plans": [plan.to_json() for stage in checked.plans for plan in checked.stage_plans(stage)],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "timings_s": {name: round(seconds, 4) for name, seconds in timings_s.items()},
    }


def _neighbor(neighbor: Neighbor) -> dict[str, Any]:
    return {
        "rank": neighbor.rank,
        "score": neighbor.score,
        "pair_id": neighbor.pair_id,
        "caption": neighbor.caption,
        "entity": neighbor.entity,
        "facets": dict(neighbor.facets),
        "author": neighbor.author,
        "source": neighbor.source,
        "license": neighbor.license,
    }
