"""What a super-resolution U-Net keeps of the picture that it enlarges: means of squares, in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from common.diffusion.schedule import alpha_sigma
from common.unet.enlargement import Consistency

CLEAN = torch.tensor([20.0, 20.0])


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(7)
    return (
        torch.from_numpy(rng.uniform(-1, 1, (2, 3, 16, 8)).astype(np.float32)),
        torch.from_numpy(rng.uniform(-1, 1, (2, 3, 4, 2)).astype(np.float32)),
    )


def squares(picture: torch.Tensor) -> np.ndarray:
    return picture.detach().numpy().reshape(2, 3, 4, 4, 2, 4).mean((3, 5))


def test_a_drawn_picture_shrinks_to_the_one_it_was_made_from(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    drawn, low_res = pictures
    kept = Consistency()(drawn, low_res, CLEAN)
    np.testing.assert_allclose(squares(kept), low_res.numpy(), atol=1e-4)
    change = (kept - drawn).detach().numpy().reshape(2, 3, 4, 4, 2, 4)
    assert np.ptp(change, (3, 5)).max() < 1e-6, "what shrinking loses is the network's"
    torch.testing.assert_close(Consistency()(kept, low_res, CLEAN), kept, atol=1e-4, rtol=0)


def test_under_noise_a_mean_is_that_of_two_gaussians(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The mode of their product, found on a grid."""
    drawn, noised = pictures
    log_snr = torch.tensor([6.0, 2.0])
    module = Consistency()
    with torch.no_grad():
        module.log_variance.fill_(float(np.log(0.3**2)))
    kept = squares(module(drawn, noised, log_snr))
    for row in range(2):
        alpha, sigma = (float(value) for value in alpha_sigma(log_snr[row]))
        place = (row, 1, 2, 1)
        grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
        mean = float(squares(drawn)[place])
        likely = Normal(mean, 0.3).log_prob(grid) + Normal(alpha * grid, sigma).log_prob(noised[place].double())
        assert kept[place] == pytest.approx(float(grid[likely.argmax()]), abs=2e-4)


def test_its_variance_is_learned(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    drawn, low_res = pictures
    module = Consistency()
    module(drawn, low_res, torch.tensor([6.0, 2.0])).square().sum().backward()
    assert module.log_variance.grad is not None and module.log_variance.grad.abs() > 0
