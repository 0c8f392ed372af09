"""What the U-Net promises about neighbors, rows, gradients and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from common.conditioning import keep
from common.diffusion.schedule import LOG_SNR_MAX
from common.unet.config import UNetConfig
from common.unet.layers import grid_positions
from common.unet.unet import UNet

CPU = torch.device("cpu")

EXACT: dict[str, float] = {"atol": 1e-10, "rtol": 1e-10}


def conditioning(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("x_t", "log_snr")}


def with_neighbors(inputs: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The inputs with the neighbors chosen by `order`."""
    chosen = {name: inputs[name][:, order] for name in inputs if name.startswith("neighbor")}
    return inputs | chosen


def test_no_neighbors_is_the_null_condition(base_config, make_unet, make_inputs, predict) -> None:
    """K = 0 says what K = 3 with every mask off says."""
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    none = predict(unet, with_neighbors(inputs, []))
    masked = predict(unet, inputs | {"neighbor_mask": torch.zeros_like(inputs["neighbor_mask"])})
    assert_close(masked, none, **EXACT)
    condition = unet.condition(**conditioning(inputs))
    yes = torch.ones(2, dtype=torch.bool)
    dropped = unet.denoise(inputs["x_t"], inputs["log_snr"], keep(condition, yes, ~yes))
    assert_close(dropped, none, **EXACT)
    assert (predict(unet, inputs) - none).abs().max() > 1e-4, "neighbors do matter"


def test_no_text_is_the_null_condition(base_config, make_unet, make_inputs, predict) -> None:
    """Zero tokens, masked tokens and a dropped text are one condition."""
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    empty = predict(unet, inputs | {"text": inputs["text"][:, :0], "text_mask": inputs["text_mask"][:, :0]})
    masked = predict(unet, inputs | {"text_mask": torch.zeros_like(inputs["text_mask"])})
    assert_close(masked, empty, **EXACT)
    condition = unet.condition(**conditioning(inputs))
    yes = torch.ones(2, dtype=torch.bool)
    dropped = unet.denoise(inputs["x_t"], inputs["log_snr"], keep(condition, ~yes, yes))
    assert_close(dropped, empty, **EXACT)
    assert (predict(unet, inputs) - empty).abs().max() > 1e-4, "text does matter"


def test_keep_is_row_by_row(base_config, make_unet, make_inputs) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config, batch=4)
    condition = unet.condition(**conditioning(inputs))
    text, neighbors = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    together = unet.denoise(inputs["x_t"], inputs["log_snr"], keep(condition, text, neighbors))
    for row in range(4):
        everywhere = keep(condition, text[row].expand(4), neighbors[row].expand(4))
        assert_close(together[row], unet.denoise(inputs["x_t"], inputs["log_snr"], everywhere)[row], **EXACT)
    assert torch.unique(together.flatten(1).round(decimals=6), dim=0).shape[0] == 4


def test_permuting_neighbors_changes_nothing(base_config, make_unet, make_inputs, predict) -> None:
    """Neither what is said, nor what is learnt."""
    outcomes = []
    for order in ([0, 1, 2], [2, 0, 1]):
        unet, inputs = make_unet(base_config), with_neighbors(make_inputs(base_config), order)
        said = predict(unet, inputs)
        (said.square().mean() + said.sum()).backward()
        outcomes.append((said.detach(), {n: p.grad for n, p in unet.named_parameters()}))
    (said, gradients), (permuted, permuted_gradients) = outcomes
    assert_close(permuted, said, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        assert_close(permuted_gradients[name], gradient, atol=1e-8, rtol=1e-6, msg=name)


def test_masking_equals_removing(base_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    mask = torch.tensor([[True, False, True]] * 2)
    assert_close(
        predict(unet, inputs | {"neighbor_mask": mask}), predict(unet, with_neighbors(inputs, [0, 2])), **EXACT
    )


def test_masked_tokens_of_a_neighbors_caption_are_not_read(base_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    mask = torch.ones_like(inputs["neighbor_text_mask"])
    mask[..., 2:] = False
    cut = {"neighbor_text": inputs["neighbor_text"][:, :, :2], "neighbor_text_mask": mask[:, :, :2]}
    assert_close(predict(unet, inputs | {"neighbor_text_mask": mask}), predict(unet, inputs | cut), **EXACT)
    assert (predict(unet, inputs | cut) - predict(unet, inputs)).abs().max() > 1e-6, "captions of neighbors matter"


def test_masked_text_is_not_read(base_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    said = predict(unet, inputs)
    text = inputs["text"].clone()
    text[~inputs["text_mask"]] = 77.0
    assert_close(predict(unet, inputs | {"text": text}), said, **EXACT)


def test_each_neighbor_is_read_with_its_own_caption(base_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    swapped = inputs | {"neighbor_text": inputs["neighbor_text"][:, [1, 0, 2]]}
    assert (predict(unet, swapped) - predict(unet, inputs)).abs().max() > 1e-6


def test_neighbors_are_encoded_by_the_same_dstack_at_time_0(base_config, make_unet, make_inputs, predict) -> None:
    """A neighbor's feature maps are those of a clean x_t with its caption as the text (Re-Imagen, section 3.2)."""
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    inputs["neighbor_text_mask"][:, :, 3:] = False
    features: list[list[Tensor]] = []
    unet.dstack.register_forward_hook(lambda module, given, maps: features.append([m.detach() for m in maps]))
    unet.condition(**conditioning(inputs))
    rows = 6
    as_x_t = make_inputs(base_config, batch=rows, num_neighbors=0) | {
        "x_t": inputs["neighbors"].flatten(0, 1),
        "text": inputs["neighbor_text"].flatten(0, 1),
        "text_mask": inputs["neighbor_text_mask"].flatten(0, 1),
        "log_snr": torch.full((rows,), LOG_SNR_MAX, dtype=torch.float64),
    }
    predict(unet, as_x_t)
    assert len(features) == 2
    for of_neighbor, of_x_t in zip(*features, strict=True):
        assert_close(of_neighbor, of_x_t, **EXACT)


def of_the_picture(unet: UNet) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters that the picture's loss trains; which neighbor is preferred has a loss of its own."""
    return [(n, p) for n, p in unet.named_parameters() if not n.startswith("preference.")]


def test_gradient_reaches_every_parameter(any_config, make_unet, make_inputs, predict) -> None:
    unet = make_unet(any_config)
    predict(unet, make_inputs(any_config)).square().mean().backward()
    without = [n for n, p in of_the_picture(unet) if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_gradient_reaches_every_parameter_from_the_initial_weights(any_config, make_inputs, predict) -> None:
    """A few steps from initialisation there is no dead parameter either (some start behind a zero)."""
    torch.manual_seed(0)
    unet, inputs = UNet(any_config).double(), make_inputs(any_config)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (predict(unet, inputs) - 1.0).square().mean().backward()
        optimizer.step()
    assert not [n for n, p in of_the_picture(unet) if p.grad is None or not p.grad.abs().max() > 0]


def test_rows_of_a_batch_are_independent(any_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(any_config), make_inputs(any_config, batch=3)
    said = predict(unet, inputs)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert_close(predict(unet, alone)[0], said[row], **EXACT)
    other = {n: v.clone() for n, v in inputs.items()}
    for value in other.values():
        value[1] = ~value[1] if value.dtype == torch.bool else value[1] + 1.0
    changed = predict(unet, other)
    assert_close(changed[0], said[0], atol=0, rtol=0)
    assert_close(changed[2], said[2], atol=0, rtol=0)
    assert (changed[1] - said[1]).abs().max() > 1e-4


def test_rows_do_not_leak_gradient(any_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(any_config), make_inputs(any_config)
    leaves = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in inputs.items()}
    predict(unet, leaves)[0].square().sum().backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad and leaf.grad is not None and leaf.numel():
            assert not leaf.grad[1].abs().any(), name
    assert leaves["x_t"].grad[0].abs().any()


def test_group_equals_repeating(base_config, make_unet, make_inputs) -> None:
    """Two neighbor sets shared by five rows say what five sets say."""
    unet, inputs = make_unet(base_config), make_inputs(base_config, batch=5)
    group = torch.tensor([1, 0, 0, 1, 0])
    sets = make_inputs(base_config, batch=2, seed=3)
    sets["neighbor_mask"][1, 2] = False
    sets = {n: v for n, v in sets.items() if n.startswith("neighbor")}
    shared = unet.condition(**conditioning(inputs) | sets, group=group)
    repeated = unet.condition(**conditioning(inputs) | {n: v[group] for n, v in sets.items()})
    x_t, log_snr = inputs["x_t"], inputs["log_snr"]
    assert_close(unet.denoise(x_t, log_snr, shared), unet.denoise(x_t, log_snr, repeated), **EXACT)


def test_condition_is_computed_once_and_reused(any_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(any_config), make_inputs(any_config)
    condition = unet.condition(**conditioning(inputs))
    for step in range(3):
        now = inputs | {"x_t": inputs["x_t"] * (1.0 - 0.3 * step), "log_snr": inputs["log_snr"] + step}
        assert_close(unet.denoise(now["x_t"], now["log_snr"], condition), predict(unet, now), atol=0, rtol=0)


def test_noise_level_and_augmentation_level_matter(any_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(any_config), make_inputs(any_config)
    said = predict(unet, inputs)
    assert (predict(unet, inputs | {"log_snr": inputs["log_snr"] + 1.0}) - said).abs().max() > 1e-4
    if any_config.scale > 1:
        assert (predict(unet, inputs | {"augmentation": inputs["augmentation"] + 1}) - said).abs().max() > 1e-4
        assert (predict(unet, inputs | {"low_res": inputs["low_res"] + 1}) - said).abs().max() > 1e-4


def test_finite_differences(base_config, make_unet, make_inputs, predict) -> None:
    """The gradient of a few entries of every kind of parameter against central differences."""
    unet, inputs = make_unet(base_config), make_inputs(base_config)

    def loss() -> Tensor:
        return (predict(unet, inputs) * torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16)).sum()

    loss().backward()
    parameters = dict(unet.named_parameters())
    names = [
        "stem.weight",
        "embed_noise.mlp.0.weight",
        "dstack.levels.1.residual.0.norm_in.gain",
        "dstack.levels.1.text_attention.0.null_key",
        "ustack.levels.0.self_attention.1.temperature",
        "neighbor_attention.0.to_key.weight",
        "neighbor_attention.1.position.weight",
        "pool_text.weight",
        "head.bias",
    ]
    for name in names:
        flat, gradient = parameters[name].data.view(-1), parameters[name].grad
        assert gradient is not None
        index, step = int(gradient.abs().argmax()), 1e-5
        with torch.no_grad():
            flat[index] += step
            above = loss()
            flat[index] -= 2 * step
            below = loss()
            flat[index] += step
        assert float((above - below) / (2 * step)) == pytest.approx(float(gradient.view(-1)[index]), rel=1e-5), name


def test_crops_agree_with_the_whole_inside(super_resolution_config, make_unet, make_inputs, predict) -> None:
    """Super-resolution trains on crops and serves whole pictures: far from a crop's edge they are the same."""
    config = replace(super_resolution_config, blocks=(1, 1))
    unet = make_unet(config)
    # Reach: 6 convolutions on the 4-pixel grid and 4 on the 8-pixel grid, 56 pixels, rounded out to a coarse cell.
    whole = make_inputs(config, batch=1, side=224)
    crop = whole | {"x_t": whole["x_t"][..., 32:192, 24:184], "low_res": whole["low_res"][..., 8:48, 6:46]}
    said, cropped = predict(unet, whole)[..., 32:192, 24:184], predict(unet, crop)
    assert_close(cropped[..., 64:96, 64:96], said[..., 64:96, 64:96], atol=1e-6, rtol=1e-6)
    assert (cropped - said)[..., 0, :].abs().max() > 1e-4, "the comparison can tell"


def test_super_resolution_adds_a_residual_to_bicubic(super_resolution_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(super_resolution_config), make_inputs(super_resolution_config)
    torch.nn.init.zeros_(unet.head.weight)
    torch.nn.init.zeros_(unet.head.bias)
    enlarged = torch.nn.functional.interpolate(inputs["low_res"].float(), (16, 16), mode="bicubic").double()
    assert_close(predict(unet, inputs), enlarged, atol=1e-6, rtol=0)


def test_channels_last_equals_contiguous(any_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(any_config, torch.float32), make_inputs(any_config, dtype=torch.float32)
    said = predict(unet, inputs)
    unet = unet.to(memory_format=torch.channels_last)
    inputs["x_t"] = inputs["x_t"].contiguous(memory_format=torch.channels_last)
    if "low_res" in inputs:
        inputs["low_res"] = inputs["low_res"].contiguous(memory_format=torch.channels_last)
    assert_close(predict(unet, inputs), said, atol=1e-5, rtol=1e-5)


def test_sampling_first_does_not_hinder_training_afterwards(base_config, make_unet, make_inputs, predict) -> None:
    """What is cached in inference mode must not be what training then saves for its backward pass."""
    grid_positions.cache_clear()
    unet, inputs = make_unet(base_config, torch.float32), make_inputs(base_config, dtype=torch.float32)
    with torch.inference_mode():
        predict(unet, inputs)
    predict(unet, inputs).square().mean().backward()
    assert unet.neighbor_attention[0].position.weight.grad is not None


def test_a_place_means_the_same_at_every_resolution() -> None:
    """Positions are in canvas units: the middle of a 2 x 2 block of a fine grid is its coarse cell."""
    torch.testing.assert_close(grid_positions(5, 5, 16, CPU)[12], grid_positions(15, 15, 16, CPU)[7 * 15 + 7])
    torch.testing.assert_close(grid_positions(4, 8, 16, CPU)[0, :4], grid_positions(4, 2, 16, CPU)[0, :4])
    assert torch.unique(grid_positions(8, 8, 16, CPU), dim=0).shape[0] == 64, "every place has its own"


def test_low_res_is_refused_where_it_does_not_belong(
    base_config, super_resolution_config, make_unet, make_inputs
) -> None:
    given = conditioning(make_inputs(super_resolution_config))
    unet = make_unet(super_resolution_config)
    for missing in ({"low_res"}, {"augmentation"}, {"low_res", "augmentation"}):
        with pytest.raises(ValueError, match="low_res"):
            unet.condition(**{n: v for n, v in given.items() if n not in missing})
    extra = {n: given[n] for n in ("low_res", "augmentation")}
    with pytest.raises(ValueError, match="low_res"):
        make_unet(base_config).condition(**conditioning(make_inputs(base_config)) | extra)


def test_forward_is_denoise(base_config, make_unet, make_inputs) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    condition = unet.condition(**conditioning(inputs))
    assert_close(
        unet(inputs["x_t"], inputs["log_snr"], condition), unet.denoise(inputs["x_t"], inputs["log_snr"], condition)
    )


@pytest.mark.parametrize("side", [(16, 24), (32, 16)])
def test_pictures_need_not_be_square(base_config: UNetConfig, side, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(base_config), make_inputs(base_config)
    inputs["x_t"] = torch.randn(2, 3, *side, dtype=torch.float64)
    assert predict(unet, inputs).shape == (2, 3, *side)
