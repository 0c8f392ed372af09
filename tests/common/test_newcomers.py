"""Neighbors encoded beside the rows of a first step: the same pictures as with neighbors encoded before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common.diffusion.guidance import Guidance
from common.diffusion.plan import Plan
from common.trajectories import NEWCOMERS, Trajectory, begin, step_together, under_text
from common.unet.condition import Newcomers
from common.unet.unet import UNet

SIDE = 16
SETS = "neighbors", "neighbor_text", "neighbor_text_mask"


def plan(steps: int, seed: int) -> Plan:
    guidance = Guidance(strategy="interleaved", text_weight=2.0, neighbor_weight=1.5, eta=0.5)
    return Plan(
        stage=SIDE,
        schedule="cosine",
        steps=steps,
        sampler="ddim",
        guidance=guidance,
        thresholding="dynamic",
        seed=seed,
    )


@pytest.fixture
def unet(base_config, make_unet) -> UNet:
    return make_unet(base_config, torch.float32).eval().requires_grad_(False)


@pytest.fixture
def given(base_config, make_inputs) -> Any:
    """Arguments of a condition of one row, by numbers of tokens and neighbors."""

    def make(tokens: int, count: int, seed: int) -> dict[str, Tensor]:
        inputs = make_inputs(
            base_config, batch=1, num_tokens=tokens, num_neighbors=count, dtype=torch.float32, seed=seed
        )
        return {name: value for name, value in inputs.items() if name not in ("x_t", "log_snr")}

    return make


def order(unet: UNet, inputs: dict[str, Tensor], *, later: bool, pictures: int = 1, seed: int = 7) -> list[Trajectory]:
    """An order's pictures before their first step, the text without its last token as what is not to be drawn."""
    with torch.inference_mode():
        condition = unet.condition(**inputs, later=later)
        negative = under_text(unet, condition, inputs["text"][:, :-1], inputs["text_mask"][:, :-1])
        newcomers = Newcomers(pictures=inputs[SETS[0]], text=inputs[SETS[1]], text_mask=inputs[SETS[2]])
    given = newcomers if later else None
    return [begin(plan(3 + i, seed + i), condition, negative=negative, newcomers=given) for i in range(pictures)]


def finish(unet: UNet, live: list[Trajectory]) -> list[Tensor]:
    while running := [each for each in live if not each.done]:
        step_together(unet, "v", running)
    return [each.x_t for each in live]


@pytest.fixture
def passes(unet: UNet) -> list[int]:
    """Rows of each pass of the DStack."""
    rows: list[int] = []
    unet.dstack.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    return rows


def test_one_that_brings_its_neighbors_is_drawn_as_with_neighbors_encoded_before(unet: UNet, given: Any) -> None:
    """Alone, and beside others: with captions of other lengths than the texts, one of them in its second step."""
    inputs = [given(3, 2, 1), given(6, 1, 2), given(4, 3, 3)]
    before = [finish(unet, order(unet, each, later=False, seed=i))[0] for i, each in enumerate(inputs)]
    alone = [finish(unet, order(unet, each, later=True, seed=i))[0] for i, each in enumerate(inputs)]
    together = [order(unet, each, later=True, seed=i)[0] for i, each in enumerate(inputs)]
    step_together(unet, "v", together[:1])
    for expected, lone, drawn in zip(before, alone, finish(unet, together), strict=True):
        torch.testing.assert_close(lone, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-2, "inputs do not matter"


def test_they_are_rows_of_the_first_pass_and_of_no_other(unet: UNet, given: Any, passes: list[int]) -> None:
    (one,) = order(unet, given(4, 2, 1), later=True)
    assert passes == []
    columns = one.table.guidance
    finish(unet, [one])
    asked = [int((columns[step] != 0).sum()) for step in range(3)]
    assert passes == [asked[0] + 2, *asked[1:]]
    assert one.newcomers is None


def test_the_pictures_of_an_order_share_them_whoever_comes_first(unet: UNet, given: Any, passes: list[int]) -> None:
    """In batches of their own, as where an order has more pictures than a batch."""
    first, second = order(unet, given(4, 2, 1), later=True, pictures=2)
    expected = finish(unet, order(unet, given(4, 2, 1), later=False, pictures=2))
    del passes[:]
    step_together(unet, "v", [second])
    step_together(unet, "v", [first])
    assert passes[0] - passes[1] == 2, "the second pass has none to encode"
    for drawn, same in zip(finish(unet, [first, second]), expected, strict=True):
        torch.testing.assert_close(drawn, same, atol=1e-5, rtol=1e-5)


def test_many_do_not_swell_a_pass_of_few(unet: UNet, given: Any, passes: list[int]) -> None:
    """They have a pass of their own, as before."""
    count = NEWCOMERS + 1
    expected = finish(unet, order(unet, given(4, count, 1), later=False))[0]
    del passes[:]
    (one,) = order(unet, given(4, count, 1), later=True)
    torch.testing.assert_close(finish(unet, [one])[0], expected, atol=1e-5, rtol=1e-5)
    assert passes[0] == count and max(passes[1:]) < count


def test_room_for_them_takes_no_memory(unet: UNet, given: Any) -> None:
    with torch.inference_mode():
        later, now = (unet.condition(**given(4, 2, 1), later=later) for later in (True, False))
    for mine, its in zip(later.neighbors, now.neighbors, strict=True):
        for room, tokens in zip(mine, its, strict=True):
            assert room.shape == tokens.shape and room.dtype == tokens.dtype
            assert room.untyped_storage().nbytes() == room.element_size()


def test_a_pass_that_fails_can_be_taken_again(unet: UNet, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finish(unet, order(unet, given(4, 2, 1), later=False))[0]
    (one,) = order(unet, given(4, 2, 1), later=True)

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(unet.dstack, "forward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            step_together(unet, "v", [one])
    assert isinstance(one.newcomers, Newcomers) and one.newcomers.encoded is None
    torch.testing.assert_close(finish(unet, [one])[0], expected, atol=1e-5, rtol=1e-5)
