"""Placement: the text says where the neighbors are read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.conditioning import keep
from common.unet.layers import encode_places, grid_places, grid_positions
from common.unet.reference import Copy, Laid, Placement, Reference, place_layers

CPU = torch.device("cpu")


def conditioning(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("x_t", "log_snr")}


def test_it_begins_by_moving_nothing(base_config, make_unet, make_inputs) -> None:
    inputs = make_inputs(base_config)
    unet = make_unet(base_config)
    with torch.no_grad():
        for parameter in unet.placement.to_out.parameters():
            parameter.zero_()
    condition = unet.condition(**conditioning(inputs))
    assert (condition.placement == 0).all()
    places = unet._places(condition.placement, (4, 6))
    torch.testing.assert_close(places, grid_places(4, 6, CPU).to(places.dtype).expand_as(places))


def test_zoom_and_shift_by_hand(base_config, make_unet) -> None:
    """The top left corner, twice as large: the middle of that quarter is the middle of the neighbor."""
    places = make_unet(base_config)._places(torch.tensor([[1.0, 1.0, 0.5, 0.5, 0, 0, 0]]), (2, 2))
    torch.testing.assert_close(places[0], torch.tensor([[0.5, 0.5], [0.5, 1.5], [1.5, 0.5], [1.5, 1.5]]))


def test_places_on_the_grid_are_the_grids_positions() -> None:
    torch.testing.assert_close(encode_places(grid_places(3, 5, CPU), 16), grid_positions(3, 5, 16, CPU))


def test_dropped_text_places_nothing(base_config, make_unet, make_inputs) -> None:
    condition = make_unet(base_config).condition(**conditioning(make_inputs(base_config)))
    condition = replace(condition, placement=torch.ones_like(condition.placement))
    rows = condition.num_rows
    yes, no = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    assert (keep(condition, yes, no).placement == 1).all() and (keep(condition, no, yes).placement == 0).all()


def test_masked_tokens_say_nothing() -> None:
    torch.manual_seed(0)
    placement = Placement(16)
    torch.nn.init.normal_(placement.to_out.weight)
    text, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    said = placement(text, mask)
    torch.testing.assert_close(said[:1], placement(text[:1, :3], mask[:1, :3]))
    assert (said[1] == 0).all()


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def layers(seed: int = 0) -> torch.Tensor:
    """Cut-out pictures that are opaque everywhere."""
    return torch.cat([pictures(seed), torch.ones(2, 3, 1, 8, 8)], 2)


STILL = torch.zeros(2, 7)
THERE = torch.ones(2, 3, dtype=torch.bool)


def test_layers_are_placed_by_hand() -> None:
    """Not moved: the very layer. Small in the top left corner: averaged there, nothing elsewhere."""
    torch.testing.assert_close(place_layers(layers(), STILL, (8, 8)), layers())
    constant = torch.full((2, 3, 4, 8, 8), 0.5)
    corners = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0, 0, 0], [1.0, 1.0, -0.5, 0.5, 0, 0, 0]])
    placed = place_layers(constant, corners, (8, 8))
    assert (placed[0, :, :, :4, :4] - 0.5).abs().max() < 1e-6 and placed[0, :, :, 5:].abs().max() < 1e-6
    assert (placed[1, :, :, 4:, :4] - 0.5).abs().max() < 1e-6 and placed[1, :, :, :3].abs().max() < 1e-6
    assert placed[:, :, :, :, 5:].abs().max() < 1e-6


def test_neighbors_are_laid_over_the_color_that_the_text_names() -> None:
    """A layer that is opaque in its left half, on a ground of (0, 0.5, -1)."""
    half = torch.cat([torch.full((2, 3, 3, 8, 8), -0.25), torch.ones(2, 3, 1, 8, 8)], 2)
    half[..., 4:] = 0.0
    placement = torch.tensor([[0.0, 0, 0, 0, -1.0, -0.5, -2.0]] * 2)
    laid = reference().lay(half, THERE, placement, (8, 8))
    assert (laid.pictures[..., :4] == -0.25).all()
    torch.testing.assert_close(laid.pictures[0, 0, :, 0, 4], torch.tensor([0.0, 0.5, -1.0]))


def reference() -> Reference:
    torch.manual_seed(3)
    made = Reference(4, 2)
    torch.nn.init.normal_(made.to_out.weight)
    torch.nn.init.normal_(made.guess.weight)
    return made


def even(mask: torch.Tensor) -> torch.Tensor:
    """Logarithms of even weights [B, K, 8, 8] of the neighbors that are there."""
    logits = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    return logits.log_softmax(1)[:, :, None, None].expand(-1, -1, 8, 8)


def pooled(made: Reference, shown: torch.Tensor, mask: torch.Tensor, placement: torch.Tensor) -> torch.Tensor:
    return made(made.lay(shown, mask, placement, (8, 8)), even(mask))


def test_the_reference_begins_by_adding_nothing() -> None:
    said = pooled(Reference(4, 2), layers(), THERE, STILL)
    assert said.shape == (2, 4, 4, 4) and (said == 0).all()


def test_the_reference_knows_no_order_and_sees_no_masked_neighbor() -> None:
    made = reference()
    said = pooled(made, layers(), THERE, STILL)
    torch.testing.assert_close(pooled(made, layers()[:, [2, 0, 1]], THERE, STILL), said)
    two = torch.tensor([[True, True, False]] * 2)
    torch.testing.assert_close(pooled(made, layers(), two, STILL), pooled(made, layers()[:, :2], two[:, :2], STILL))
    assert (pooled(made, layers(), ~THERE, STILL) == 0).all()


def test_the_reference_reads_what_is_there() -> None:
    made = reference()
    said = pooled(made, layers(), THERE, STILL)
    assert not torch.allclose(pooled(made, layers(1), THERE, STILL), said)
    assert not torch.allclose(pooled(made, layers(), THERE, torch.full((2, 7), 0.3)), said)


def copying(score: float | None = None) -> tuple[Copy, torch.Tensor, torch.Tensor, Laid]:
    """A copy mechanism with random scores (or one score for all), what is drawn, the hidden features, the neighbors."""
    torch.manual_seed(4)
    made = Copy(4, 2, boldness=20.0)
    assert made.score.bias is not None
    if score is None:
        torch.nn.init.normal_(made.score.weight, std=0.4)
    else:
        torch.nn.init.constant_(made.score.bias, score / Copy.SHARPNESS)
    drawn, hidden = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    laid = reference().lay(layers(), THERE, STILL, (8, 8))
    return made, drawn, hidden, laid


CLEAR, NOISY = torch.full((2,), Copy.MUCH), torch.full((2,), Copy.LITTLE)


def test_a_pixel_is_the_mixture_that_its_shares_say() -> None:
    made, drawn, hidden, laid = copying(score=math.log(3.0))  # three weights of a third, times three: a quarter each
    torch.testing.assert_close(made(drawn, hidden, laid, even(THERE), CLEAR), (drawn + laid.pictures.sum(1)) / 4)
    made, drawn, hidden, laid = copying(score=30.0)  # only neighbors, by their weights
    torch.testing.assert_close(made(drawn, hidden, laid, even(THERE), CLEAR), laid.pictures.mean(1))
    uneven = torch.tensor([0.5, 0.25, 0.25]).log()[None, :, None, None].expand(2, -1, 8, 8)
    mixed = torch.einsum("k,bkchw->bchw", uneven[0, :, 0, 0].exp(), laid.pictures)
    torch.testing.assert_close(made(drawn, hidden, laid, uneven, CLEAR), mixed)


def test_neighbors_are_copied_while_the_noisy_picture_shows_little() -> None:
    made, _, hidden, laid = copying(score=Copy.BEGINNING)
    assert (made.shares(hidden, laid, even(THERE), CLEAR)[:, 0] > 0.94).all()
    assert (made.shares(hidden, laid, even(THERE), NOISY)[:, 0] < 0.01).all()
    torch.testing.assert_close(
        made.shares(hidden, laid, even(THERE), None), made.shares(hidden, laid, even(THERE), CLEAR)
    )
    between = made.shares(hidden, laid, even(THERE), (CLEAR + NOISY) / 2)[:, 0]
    torch.testing.assert_close(
        between, torch.full_like(between, 1 / (1 + math.exp(Copy.BEGINNING + made.boldness / 2)))
    )


def test_a_masked_neighbor_is_not_copied_and_none_leaves_the_drawing() -> None:
    made, drawn, hidden, laid = copying()
    two = torch.tensor([[True, True, False]] * 2)
    first = Laid(
        pictures=laid.pictures[:, :2], layers=laid.layers[:, :2], features=laid.features[:, :2], mask=two[:, :2]
    )
    torch.testing.assert_close(
        made(drawn, hidden, replace(laid, mask=two), even(two), CLEAR),
        made(drawn, hidden, first, even(two[:, :2]), CLEAR),
    )
    for log_snr in (CLEAR, NOISY):
        torch.testing.assert_close(made(drawn, hidden, replace(laid, mask=~laid.mask), even(~THERE), log_snr), drawn)


def test_shares_follow_the_neighbor_that_they_are_of() -> None:
    made, drawn, hidden, laid = copying()
    turned = replace(laid, **{n: getattr(laid, n)[:, [2, 0, 1]] for n in ("pictures", "layers", "features", "mask")})
    said = made(drawn, hidden, laid, even(THERE), CLEAR)
    torch.testing.assert_close(made(drawn, hidden, turned, even(THERE), CLEAR), said)
    shares = made.shares(hidden, laid, even(THERE), CLEAR)
    assert shares.shape == (2, 4, 1, 8, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 1, 8, 8))
    assert shares.std(1).min() > 0  # the scores tell the neighbors apart


def test_a_u_net_without_neighbors_has_none(base_config) -> None:
    with pytest.raises(ValueError, match="placement"):
        replace(base_config, neighbor_attention=(False, False), placement=True)
