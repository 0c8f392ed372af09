"""Our samplers against diffusers' schedulers, step by step: same model outputs, same noise, same alphas, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from common.diffusion.parameterization import Prediction
from common.diffusion.sampler import Sampler, StepTable, step_coefficients, trajectory
from common.diffusion.threshold import Thresholding

SHAPE = (3, 8, 8)
NAMES: dict[Prediction, str] = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
PREDICTIONS: list[Prediction] = ["x0", "eps", "v"]
SPACINGS = [("linear", "leading"), ("linear", "trailing"), ("squaredcos_cap_v2", "leading")]
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def table_of(sampler: Sampler, alphas_cumprod: np.ndarray) -> StepTable:
    """A table through the given alphas (alpha^2, from noise to picture, the final one included)."""
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
    a, b, c, d = step_coefficients(sampler, alpha, sigma).T
    log_snr = np.arange(len(a), dtype=np.float64)  # here it only tells the model which step it is asked for
    guidance = np.tile([1.0, 0.0, 0.0, 0.0], (len(a), 1))
    return StepTable(log_snr=log_snr, alpha=alpha[:-1], sigma=sigma[:-1], a=a, b=b, c=c, d=d, guidance=guidance)


def model_of(steps: int) -> Callable[[Tensor, int], Tensor]:
    """A model whose output depends on x_t and on the step."""
    drawn = torch.randn((steps, *SHAPE), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return lambda x_t, step: drawn[step] + 0.5 * torch.tanh(x_t)


def ours(
    table: StepTable, prediction: Prediction, thresholding: Thresholding = "none", noise_seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_s, x0) after each step."""
    model, source = model_of(len(table)), torch.Generator().manual_seed(noise_seed)
    for _, x_s, x0 in trajectory(
        lambda x_t, log_snr, columns: {0: model(x_t, int(log_snr))},
        table,
        start(),
        prediction=prediction,
        thresholding=thresholding,
        noise=lambda: torch.randn(SHAPE, generator=source, dtype=torch.float64),
    ):
        yield x_s, x0


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def in_float64(scheduler: DDPMScheduler | DDIMScheduler) -> None:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "one"):
        scheduler.one = scheduler.one.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()


def assert_same_steps(table: StepTable, theirs: Iterator[tuple[Tensor, Tensor | None]], mine: Iterator) -> None:
    compared = 0
    for (their_x, their_x0), (my_x, my_x0) in zip(theirs, mine, strict=True):
        torch.testing.assert_close(my_x, their_x, atol=TOLERANCE, rtol=TOLERANCE)
        if their_x0 is not None:
            torch.testing.assert_close(my_x0, their_x0, atol=TOLERANCE, rtol=TOLERANCE)
        compared += 1
    assert compared == len(table)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("schedule", "spacing"), SPACINGS)
@pytest.mark.parametrize("thresholding", ["none", "static", "dynamic"])
def test_ddpm(prediction: Prediction, schedule: str, spacing: str, thresholding: Thresholding) -> None:
    scheduler = DDPMScheduler(
        beta_schedule=schedule,
        variance_type="fixed_small",
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        clip_sample=thresholding == "static",
        thresholding=thresholding == "dynamic",
        dynamic_thresholding_ratio=0.995,
        sample_max_value=1e9,
    )
    in_float64(scheduler)
    scheduler.set_timesteps(20)

    def theirs() -> Iterator[tuple[Tensor, Tensor]]:
        model, source, x_t = model_of(20), torch.Generator().manual_seed(9), start()[None]
        for step, t in enumerate(scheduler.timesteps):
            said = model(x_t[0], step)[None]
            output = scheduler.step(said, t, x_t, generator=source)
            x_t = output.prev_sample
            yield x_t[0], output.pred_original_sample[0]

    alphas = np.append(scheduler.alphas_cumprod[scheduler.timesteps].numpy(), 1.0)
    table = table_of("ddpm", alphas)
    assert (table.d[:-1] > 0).all() and table.d[-1] == 0, "only the last step is without noise"
    assert_same_steps(table, theirs(), ours(table, prediction, thresholding, noise_seed=9))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("schedule", "spacing"), SPACINGS)
@pytest.mark.parametrize("to_clean", [True, False])
def test_ddim(prediction: Prediction, schedule: str, spacing: str, to_clean: bool) -> None:
    scheduler = DDIMScheduler(
        beta_schedule=schedule,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
        set_alpha_to_one=to_clean,
    )
    in_float64(scheduler)
    scheduler.set_timesteps(25)

    def theirs() -> Iterator[tuple[Tensor, Tensor]]:
        model, x_t = model_of(25), start()
        for step, t in enumerate(scheduler.timesteps.tolist()):
            output = scheduler.step(model(x_t, step), t, x_t, eta=0.0)
            x_t = output.prev_sample
            yield x_t, output.pred_original_sample

    alphas = scheduler.alphas_cumprod[scheduler.timesteps].numpy()
    table = table_of("ddim", np.append(alphas, float(scheduler.final_alpha_cumprod)))
    assert_same_steps(table, theirs(), ours(table, prediction))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_clipping_follows_the_clipped_picture(prediction: Prediction) -> None:
    """Imagen's and GLIDE's reading of clipping: eps is derived anew from the clipped x0."""
    scheduler = DDIMScheduler(prediction_type=NAMES[prediction], clip_sample=True, clip_sample_range=1.0)
    in_float64(scheduler)
    scheduler.set_timesteps(10)

    def theirs() -> Iterator[tuple[Tensor, Tensor]]:
        model, x_t = model_of(10), start()
        for step, t in enumerate(scheduler.timesteps.tolist()):
            output = scheduler.step(model(x_t, step), t, x_t, eta=0.0, use_clipped_model_output=True)
            x_t = output.prev_sample
            yield x_t, output.pred_original_sample

    alphas = scheduler.alphas_cumprod[scheduler.timesteps].numpy()
    table = table_of("ddim", np.append(alphas, 1.0))
    assert_same_steps(table, theirs(), ours(table, prediction, "static"))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 7, 14, 15, 30])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_dpmpp_2m(prediction: Prediction, steps: int, final: str, schedule: str) -> None:
    """With a final sigma above zero the last step is of first order only under 15 steps."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=schedule,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        prediction_type=NAMES[prediction],
        final_sigmas_type=final,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    alphas = scheduler.alphas_cumprod.double()
    last = 1.0 if final == "zero" else float(alphas[0])
    through = np.append(alphas[timesteps].numpy(), last)
    scheduler.sigmas = torch.from_numpy(np.sqrt((1.0 - through) / through))

    def theirs() -> Iterator[tuple[Tensor, Tensor]]:
        model, x_t = model_of(steps), start()
        for step, t in enumerate(timesteps):
            x_t = scheduler.step(model(x_t, step), t, x_t).prev_sample
            yield x_t, scheduler.model_outputs[-1]

    table = table_of("dpmpp_2m", through)
    assert_same_steps(table, theirs(), ours(table, prediction))


def test_dpmpp_2m_of_one_step_is_ddim() -> None:
    alphas = np.array([0.01, 0.3])
    np.testing.assert_allclose(table_of("dpmpp_2m", alphas).a, table_of("ddim", alphas).a, rtol=1e-14)
    np.testing.assert_allclose(table_of("dpmpp_2m", alphas).b, table_of("ddim", alphas).b, rtol=1e-14)
