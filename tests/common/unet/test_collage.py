"""Neighbors cut out, and which of them a noisy picture shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import norm

from common.unet.collage import NEAR_WHITE, Posterior, Preference, cut_out, over_ground, windowed


def disc(inside: tuple[float, float, float], size: int = 24) -> torch.Tensor:
    """A disc of one color on white, anti-aliased, with a white hole in it [3, H, W] in [-1, 1]."""
    rows, columns = np.mgrid[:size, :size] - size / 2 + 0.5
    radius = np.hypot(rows, columns)
    opacity = np.clip(size / 3 - radius, 0, 1) * np.clip(radius - size / 8, 0, 1)
    color = np.array(inside)[:, None, None]
    return torch.from_numpy(opacity * color + (1 - opacity)).float()


def test_a_cut_out_picture_over_white_is_the_picture() -> None:
    pictures = torch.stack([disc((-0.5, 0.2, 0.7)), torch.rand(3, 24, 24) * 2 - 1])[None]
    torch.testing.assert_close(over_ground(cut_out(pictures), torch.ones(1, 3)), pictures)


def test_the_ground_goes_and_the_hole_stays() -> None:
    """Over blue, the disc is drawn as if it had been drawn on blue; what is white within it is its own."""
    inside, ground = (-0.5, 0.2, -0.8), torch.tensor([[-0.6, -0.2, 0.7]])
    layer = cut_out(disc(inside)[None, None])
    assert (layer[0, 0, 3, 0] == 0).all() and (layer[0, 0, 3, 11:13, 11:13] == 1).all()
    composed = over_ground(layer, ground)[0, 0]
    torch.testing.assert_close(composed[:, 0, 0], ground[0])
    torch.testing.assert_close(composed[:, 12, 12], torch.ones(3))
    rows, columns = np.mgrid[:24, :24] - 11.5
    radius = torch.from_numpy(np.hypot(rows, columns))
    edge = (radius > 6.5) & (radius < 8.5)
    color = torch.tensor(inside)[:, None, None]
    opacity = (8 - radius).clamp(0, 1).float()
    expected = opacity * color + (1 - opacity) * ground[0][:, None, None]
    assert (composed - expected).abs()[:, edge].mean() < 0.05  # white kept at the edge would be off by 0.3


def test_the_ground_is_what_a_flood_from_the_border_reaches() -> None:
    """Against SciPy's connected components, on blots."""
    free = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((8, 24, 24)), (0, 2, 2)) > -0.05
    layers = cut_out(torch.from_numpy(np.where(free, 1.0, -1.0)).float()[:, None].expand(-1, 3, -1, -1))
    for opacity, cells in zip(layers[:, 3].numpy(), free, strict=True):
        labels, _ = ndimage.label(cells)
        border = {*labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]} - {0}
        np.testing.assert_array_equal(opacity == 0, np.isin(labels, list(border)))


def test_a_picture_without_white_ground_is_opaque() -> None:
    assert (cut_out(torch.full((1, 3, 8, 8), 2 * NEAR_WHITE - 1.1))[:, 3] == 1).all()


def test_weights_are_bayes_rule_on_one_pixel() -> None:
    """One pixel of one color: the posterior of a mixture of Gaussians, by SciPy's densities."""
    posterior = Posterior().double()
    variance = 0.3
    with torch.no_grad():
        # One window at a time: the other's variance is so large that it says nothing.
        posterior.log_variance.copy_(torch.tensor([variance, 1e12], dtype=torch.float64).log())
    alpha, sigma = 0.8, 0.6
    pictures = torch.tensor([-0.7, 0.1, 0.9], dtype=torch.float64).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 1, 1)
    scores = torch.tensor([[0.2, -0.4, 1.0]], dtype=torch.float64)
    x_t = torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64).reshape(1, 3, 1, 1)
    log_snr = torch.tensor([2 * np.log(alpha / sigma)], dtype=torch.float64)
    said = posterior(x_t, log_snr, pictures, scores, torch.ones(1, 3, dtype=torch.bool)).exp().flatten()
    deviation = np.sqrt(sigma**2 + variance * alpha**2)
    density = [norm.pdf(x_t.flatten().numpy(), alpha * m, deviation).prod() for m in (-0.7, 0.1, 0.9)]
    expected = np.exp(scores[0].numpy()) * density
    np.testing.assert_allclose(said.detach().numpy(), expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("log_snr", [-12.0, 0.0, 8.0])
def test_weights_sum_to_one_in_any_order_and_masked_neighbors_have_none(log_snr: float) -> None:
    torch.manual_seed(0)
    pictures, x_t, scores = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, 3)
    mask, level = torch.tensor([[True, True, False], [True] * 3]), torch.full((2,), log_snr)
    posterior = Posterior()
    weights = posterior(x_t, level, pictures, scores, mask).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 16, 16))
    assert (weights[0, 2] == 0).all()
    order = [2, 0, 1]
    turned = posterior(x_t, level, pictures[:, order], scores[:, order], mask[:, order]).exp()
    torch.testing.assert_close(turned, weights[:, order])
    none = posterior(x_t, level, pictures, scores, torch.zeros_like(mask))
    assert torch.isfinite(none).all()


def test_what_the_noisy_picture_shows_is_found() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(1, 2, 3, 32, 32) * 2 - 1
    x_t = 0.6 * pictures[:, 1] + 0.8 * torch.randn(1, 3, 32, 32)
    log_snr = torch.tensor([2 * np.log(0.6 / 0.8)]).float()
    weights = Posterior()(x_t, log_snr, pictures, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert (weights[0, 1].exp() > 0.99).all()


def test_a_window_is_summed_around_each_pixel() -> None:
    maps = torch.rand(1, 2, 9, 9, dtype=torch.float64)
    by_hand = ndimage.uniform_filter(maps.numpy(), (1, 1, 5, 5)) * 25
    np.testing.assert_allclose(windowed(maps, 5)[..., 2:-2, 2:-2].numpy(), by_hand[..., 2:-2, 2:-2])
    torch.testing.assert_close(windowed(torch.ones(1, 1, 9, 9), 5), torch.full((1, 1, 9, 9), 25.0))


def test_a_text_that_is_not_there_prefers_no_neighbor() -> None:
    torch.manual_seed(0)
    preference = Preference(16)
    text, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [False] * 5])
    scores = preference.score(preference.asked(text, mask), torch.randn(2, 3, preference.width))
    assert scores.shape == (2, 3) and (scores[0] != 0).all() and (scores[1] == 0).all()
