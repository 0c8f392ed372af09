"""Architectures as JSON, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from common.unet.config import UNetConfig


def test_json_round_trip(any_config: UNetConfig) -> None:
    assert UNetConfig.from_json(json.loads(json.dumps(any_config.to_json()))) == any_config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"blocks": (1,)}, "blocks"),
        ({"attention": (False, True, True)}, "attention"),
        ({"neighbor_attention": ()}, "neighbor_attention"),
        ({"head_width": 5}, r"head_width: 5 does not divide width"),
        ({"widths": (6, 16), "neighbor_attention": (False, True)}, r"widths: 6"),
        ({"text_attention": (True,)}, "text_attention"),
        ({"patch": 3, "scale": 2}, r"patch: 3 .* scale 2"),
        ({"text_width": 0, "placement": False}, r"text_attention: needs"),
        ({"skip_scale": 0.0}, r"skip_scale: 0\.0"),
        ({"skip_scale": 1.5}, r"skip_scale: 1\.5"),
        ({"patch": 0}, r"patch: 0"),
        ({"scale": 0}, r"scale 0"),
    ],
)
def test_nonsense_is_refused_by_name(base_config: UNetConfig, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(base_config, **change)


def test_unknown_and_missing_names_are_refused(base_config: UNetConfig) -> None:
    document = base_config.to_json()
    with pytest.raises(ValueError, match="dropout"):
        UNetConfig.from_json(document | {"dropout": 0.1})
    for name in set(document) - {"boldness", "consistent"}:  # weights of before they were there are neither
        with pytest.raises(ValueError, match=name):
            UNetConfig.from_json({k: v for k, v in document.items() if k != name})


def test_documents_of_the_first_published_weights_are_read(
    base_config: UNetConfig, super_resolution_config: UNetConfig
) -> None:
    """Then, blocks that attended to themselves attended to the text, where there was one."""
    for config in (super_resolution_config, base_config):
        first = {k: v for k, v in config.to_json().items() if k not in ("text_attention", "skip_scale", "positions")}
        assert UNetConfig.from_json(json.loads(json.dumps(first))) == config
    with pytest.raises(ValueError, match="dropout"):
        UNetConfig.from_json(first | {"dropout": 0.1})
    with pytest.raises(ValueError, match="skip_scale"):
        UNetConfig.from_json(first | {"text_attention": (False, True), "positions": True})


def test_only_laid_neighbors_are_taken_over_boldly(base_config: UNetConfig) -> None:
    bold = replace(base_config, boldness=3.0)
    assert UNetConfig.from_json(bold.to_json()) == bold
    assert UNetConfig.from_json({k: v for k, v in base_config.to_json().items() if k != "boldness"}) == base_config
    for change in ({"boldness": -1.0}, {"boldness": 3.0, "placement": False}):
        with pytest.raises(ValueError, match="boldness"):
            replace(base_config, **change)


def test_derived_figures(base_config: UNetConfig, super_resolution_config: UNetConfig) -> None:
    assert base_config.uses_neighbors and not super_resolution_config.uses_neighbors
    assert base_config.granularity == 4, "patch 2, one halving"
    assert super_resolution_config.granularity == 8, "patch 4, one halving"
