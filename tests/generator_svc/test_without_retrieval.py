"""Retrieval is down: the request fails, or is drawn without neighbors and says so, as the service is set."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.generator import GenerationFailed, GeneratorClient, Image, Reference, StageOverrides
from tests.generator_svc.asking import QUICK, draw, found, images, pixels, record
from tests.generator_svc.tiny_stack import Host, Service

RED = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="9" height="16" fill="red"/></svg>'
DEGRADED = "reimagen_generator_degraded_total"


def test_set_to_draw_it_draws_from_the_text_and_says_so(
    host: Host, make_generator: Callable[..., Service], client: GeneratorClient, tmp_path: Path
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock", without_retrieval="draw")
    with host.running(service) as address, GeneratorClient(address) as alone:
        events = draw(alone, QUICK)
        assert service.figure(DEGRADED, reason="no_neighbors") == 1
        assert draw(alone, replace(QUICK, without_neighbors=True))
        assert service.figure(DEGRADED, reason="no_neighbors") == 1, "nobody asked for neighbors there"
    told = found(events)
    assert told.neighbors == () and told.method == "unspecified"
    assert "nobody.sock" in told.degraded_reason and "UNAVAILABLE" in told.degraded_reason
    assert record(events)["retrieval"]["degraded_reason"] == told.degraded_reason
    assert record(events)["retrieval"]["k"] == 2
    assert record(events)["plans"][0]["guidance"]["strategy"] == "joint"
    assert (pixels(events) == pixels(draw(client, replace(QUICK, without_neighbors=True)))).all()
    (image,) = [event for event in events if isinstance(event, Image)]
    again = draw(client, replace(QUICK, prompt="", seed=None, stop_at=None, stages=(), record_json=image.record_json))
    assert images(again) == [image.image], "with retrieval up again, and no neighbor asked for"
    assert found(again).degraded_reason == told.degraded_reason


def test_what_the_caller_has_chosen_stays(host: Host, make_generator: Callable[..., Service], tmp_path: Path) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock", without_retrieval="draw")
    weighted = StageOverrides(stage=64, steps=2, guidance_strategy="weighted", neighbor_weight=3.0)
    with host.running(service) as address, GeneratorClient(address) as alone:
        events = draw(alone, replace(QUICK, stages=(weighted,)))
        assert record(events)["plans"][0]["guidance"]["strategy"] == "weighted"
        with_reference = replace(QUICK, references=(Reference(image=RED, caption="my dog"),), k=2)
        told = found(draw(alone, with_reference))
    assert len(told.neighbors) == told.num_references == 1 and told.degraded_reason


def test_a_retrieval_that_hangs_is_waited_for_no_longer_than_set(
    host: Host, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(f"{tmp_path}/deaf.sock")
        deaf.listen()
        service = make_generator(
            retrieval_address=f"unix:{tmp_path}/deaf.sock", without_retrieval="draw", retrieval_timeout_s=0.3
        )
        with host.running(service) as address, GeneratorClient(address) as alone:
            assert "did not answer" in found(draw(alone, QUICK)).degraded_reason


def test_a_retrieval_that_is_known_to_be_gone_is_not_waited_for(
    host: Host, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(f"{tmp_path}/deaf.sock")
        deaf.listen()
        service = make_generator(
            retrieval_address=f"unix:{tmp_path}/deaf.sock", without_retrieval="draw", retrieval_timeout_s=600.0
        )
        with host.running(service) as address, GeneratorClient(address) as alone:
            told = found(draw(alone, QUICK))
    assert told.degraded_reason


def test_what_retrieval_refuses_is_refused_whatever_is_set(host: Host, make_generator: Callable[..., Service]) -> None:
    service = make_generator(without_retrieval="draw")
    with host.running(service) as address, GeneratorClient(address) as alone:
        for changes, code in (
            ({"knowledge_base": "big"}, "NOT_FOUND"),
            ({"prompt": "dog, vaporwave style"}, "INVALID_ARGUMENT"),
            ({"method": "clip"}, "FAILED_PRECONDITION"),
        ):
            with pytest.raises(GenerationFailed) as caught:
                draw(alone, replace(QUICK, **changes))
            assert caught.value.code == code
    assert service.figure(DEGRADED, reason="no_neighbors") == 0


def test_the_reason_is_kept_in_the_pictures_own_record(
    host: Host, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock", without_retrieval="draw")
    with host.running(service) as address, GeneratorClient(address) as alone:
        (image,) = [event for event in draw(alone, QUICK) if isinstance(event, Image)]
    assert json.loads(image.record_json)["retrieval"]["degraded_reason"]
