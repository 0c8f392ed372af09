"""x0, eps and v follow from one another, and their losses are one loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.parameterization import PREDICTIONS, Prediction, diffuse, loss_weight, target, to_x0
from common.diffusion.schedule import alpha_sigma

LOG_SNRS = st.floats(-6.0, 6.0)


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (3, 4, 4)), rng.standard_normal((3, 4, 4))


@given(log_snr=LOG_SNRS, kind=st.sampled_from(PREDICTIONS))
def test_the_true_prediction_gives_the_true_picture(log_snr: float, kind: Prediction) -> None:
    x0, eps = draw()
    alpha, sigma = alpha_sigma(np.float64(log_snr))
    x_t = diffuse(x0, eps, alpha, sigma)
    np.testing.assert_allclose(to_x0(kind, target(kind, x0, eps, alpha, sigma), x_t, alpha, sigma), x0, atol=1e-9)


def test_v_by_hand() -> None:
    """v = alpha eps - sigma x0, at alpha 0.6, sigma 0.8, x0 = 0.5, eps = 2."""
    assert diffuse(0.5, 2.0, 0.6, 0.8) == pytest.approx(1.9)
    assert target("v", 0.5, 2.0, 0.6, 0.8) == pytest.approx(0.8)
    assert to_x0("v", 0.8, 1.9, 0.6, 0.8) == pytest.approx(0.5)
    assert to_x0("eps", 2.0, 1.9, 0.6, 0.8) == pytest.approx(0.5)
    assert to_x0("x0", 0.25, 1.9, 0.6, 0.8) == 0.25


@given(log_snr=LOG_SNRS, gamma=st.floats(1.0, 20.0))
def test_loss_weights_weigh_the_same_error_of_the_picture_the_same(log_snr: float, gamma: float) -> None:
    """The loss of eps, v and x0 predictions that imply one picture is one number: min(SNR + 1, gamma) |x0 error|^2."""
    x0, eps = draw()
    guess = x0 + draw(1)[1] * 0.1
    snr = np.exp(np.float64(log_snr))
    alpha, sigma = alpha_sigma(np.float64(log_snr))
    x_t = diffuse(x0, eps, alpha, sigma)
    implied_eps = (x_t - alpha * guess) / sigma
    expected = min(float(snr) + 1.0, gamma) * np.mean((guess - x0) ** 2)
    for kind in PREDICTIONS:
        said, wanted = target(kind, guess, implied_eps, alpha, sigma), target(kind, x0, eps, alpha, sigma)
        loss = loss_weight(kind, snr, gamma) * np.mean((said - wanted) ** 2)
        assert loss == pytest.approx(expected, rel=1e-6)


def test_loss_weights_by_hand() -> None:
    assert loss_weight("x0", 3.0, 5.0) == pytest.approx(4.0)
    assert loss_weight("x0", 30.0, 5.0) == pytest.approx(5.0)
    assert loss_weight("v", 3.0, 5.0) == pytest.approx(1.0)
    assert loss_weight("v", 9.0, 5.0) == pytest.approx(0.5)
    assert loss_weight("eps", 2.0, 5.0) == pytest.approx(1.5)
    in_float32 = loss_weight("v", torch.tensor([-12.0, 0.0, 12.0]).exp(), 5.0)
    np.testing.assert_allclose(in_float32.numpy(), [1.0, 1.0, 5.0 / (np.exp(12.0) + 1)], rtol=5e-3)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_torch_and_numpy_are_the_same_lines(kind: Prediction) -> None:
    x0, eps = draw()
    tensors = torch.from_numpy(x0), torch.from_numpy(eps)
    wanted = target(kind, x0, eps, 0.6, 0.8)
    np.testing.assert_allclose(target(kind, *tensors, 0.6, 0.8).numpy(), wanted, rtol=1e-15)
    x_t = diffuse(x0, eps, 0.6, 0.8)
    in_torch = to_x0(kind, torch.from_numpy(wanted), torch.from_numpy(x_t), 0.6, 0.8)
    np.testing.assert_allclose(in_torch.numpy(), to_x0(kind, wanted, x_t, 0.6, 0.8), rtol=1e-15)


def test_unknown_prediction_is_named() -> None:
    for call in (
        lambda: target("score", 0.0, 0.0, 1.0, 0.0),  # type: ignore[arg-type]
        lambda: to_x0("score", 0.0, 0.0, 1.0, 0.0),  # type: ignore[arg-type]
        lambda: loss_weight("score", 1.0, 5.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="prediction: 'score'"):
            call()
