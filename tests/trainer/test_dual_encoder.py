"""Training the dual encoder: it learns, goes on exactly where it was stopped, and never sees what is held out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from common.checkpoint import CheckpointError
from common.dual_encoder import FILE, DualEncoder, TowerConfig, load_dual_encoder, pixels_of
from tests.trainer.shapes import WIDTH, LetterEncoder
from trainer.batches import rng_of
from trainer.clip_features import Features, view_of, write_features
from trainer.dataset import NUM_SCENES, Prepared
from trainer.dual_encoder import DEMO_CLIP, contrast, draw_batch, dual_encoder_loss, soft_targets
from trainer.fit_dual_encoder import STATE, open_dual_encoder_run
from trainer.image_trunk import fold_trunk, lite0, read_trunk

TOWER = TowerConfig(side=32, stem=8, blocks=((8, 1, 3, 1), (12, 4, 3, 2), (12, 4, 5, 1)), taps=(1, 2))
TINY = replace(
    DEMO_CLIP,
    name="tiny",
    soft_temperature=0.5,
    hidden=32,
    views=2,
    batch=16,
    steps=60,
    warmup_steps=5,
    learning_rate=3e-3,
    side=32,
)


class WordEncoder:
    """States of one token a word, each told by the word alone."""

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(text.split()) for text in texts)
        states, mask = torch.zeros(len(texts), longest, WIDTH), torch.zeros(len(texts), longest, dtype=torch.bool)
        for row, text in enumerate(texts):
            for column, word in enumerate(text.split()):
                states[row, column, zlib.crc32(word.encode()) % WIDTH] = 1.0
                mask[row, column] = True
        return states, mask


def silent(task: str, done: int, total: int) -> None:
    assert 0 < done <= total


def new_model() -> DualEncoder:
    torch.manual_seed(4)
    return DualEncoder(TOWER, hidden=TINY.hidden, size=WIDTH).eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def features(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("features")
    return write_features(prepared, folder, new_model().tower, TINY.views, WordEncoder, silent)  # type: ignore[arg-type]


def test_held_out_pairs_have_no_features_and_are_in_no_batch(features: Features, prepared: Prepared) -> None:
    held_out = set(np.flatnonzero(prepared.held_out))
    assert held_out and not held_out & set(features.pairs)
    assert len(features.pairs) == (~prepared.held_out).sum() == len(features.images)
    seen: set[int] = set()
    for step in range(40):
        seen |= set(draw_batch(features, TINY, rng_of(0, step)).pairs)
    assert seen == set(features.pairs), "every training pair is drawn, and no other"


def test_a_batch_has_each_entity_once_and_its_parts_agree(features: Features, prepared: Prepared) -> None:
    styles = set()
    for step in range(20):
        batch = draw_batch(features, TINY, rng_of(1, step))
        entities = [prepared.entities[pair] for pair in batch.pairs]
        assert len(set(entities)) == len(entities) == 6
        styles.add(len({prepared.styles[pair] for pair in batch.pairs}))
        for row, pair in enumerate(batch.pairs):
            place = int(np.flatnonzero(features.pairs == pair)[0])
            view = int(np.flatnonzero((features.captions[place] == batch.captions[row].numpy()).all(1))[0])
            np.testing.assert_array_equal(batch.images[row].numpy(), features.images[place, view].astype(np.float32))
            states, mask = prepared.text([int(pair) * NUM_SCENES + view])
            np.testing.assert_allclose(batch.captions[row], states[0][mask[0]].mean(0), rtol=1e-3, atol=1e-3)
    assert 1 in styles and max(styles) > 1, "some steps have one style"


def test_features_are_those_of_the_view_and_are_kept(prepared: Prepared, tmp_path: Path) -> None:
    tower, told = new_model().tower, []
    first = write_features(prepared, tmp_path, tower, 2, LetterEncoder, lambda *task: told.append(task))  # type: ignore[arg-type]
    pair = int(first.pairs[3])
    with torch.inference_mode():
        wanted = tower(pixels_of([view_of(prepared, pair, 1, TOWER.side)], TOWER.side))[0]
    np.testing.assert_allclose(first.images[3, 1], wanted, rtol=2e-3, atol=2e-3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = write_features(prepared, tmp_path, tower, 2, LetterEncoder, silent)  # type: ignore[arg-type]
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    np.testing.assert_array_equal(first.images, again.images)
    assert {"view 0", "view 1", "entities"} == {task for task, _, _ in told}


def test_the_loss_goes_down_and_names_find_their_pictures(features: Features, tmp_path: Path) -> None:
    run = open_dual_encoder_run(TINY, features, tmp_path, new_model())
    losses: list[float] = []
    run.run(lambda step, loss: losses.append(loss) is None)
    assert run.step == TINY.steps == len(losses)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    with torch.inference_mode():
        rows = np.unique(features.entity, return_index=True)[1]
        images = run.model.embed_features(torch.from_numpy(features.images[rows, 0].astype(np.float32)))
        texts = run.model.embed_states(torch.from_numpy(features.names[rows]))
    found = (texts @ images.T).argmax(1)
    assert (found == torch.arange(len(rows))).float().mean() >= 0.8


def test_a_stopped_run_goes_on_as_if_it_had_not_been(features: Features, tmp_path: Path) -> None:
    whole = open_dual_encoder_run(TINY, features, tmp_path / "whole", new_model())
    whole.run(lambda step, loss: step < 30)
    stopped = open_dual_encoder_run(TINY, features, tmp_path / "parts", new_model())
    stopped.run(lambda step, loss: step < 11)
    resumed = open_dual_encoder_run(TINY, features, tmp_path / "parts", new_model())
    assert resumed.step == stopped.step == 11
    resumed.run(lambda step, loss: step < 30)
    assert resumed.step == whole.step == 30
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    first, second = (load_file(tmp_path / part / STATE) for part in ("whole", "parts"))
    assert any(name.startswith("optimizer/exp_avg_sq/") for name in first)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_state_and_another_preset_are_refused(features: Features, tmp_path: Path) -> None:
    run = open_dual_encoder_run(TINY, features, tmp_path, new_model())
    run.run(lambda step, loss: False)
    with pytest.raises(CheckpointError, match="another preset"):
        open_dual_encoder_run(replace(TINY, temperature=0.2), features, tmp_path, new_model())
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"state: .* cannot be read"):
        open_dual_encoder_run(TINY, features, tmp_path, new_model())


def test_what_is_published_is_what_was_trained(features: Features, tmp_path: Path) -> None:
    run = open_dual_encoder_run(TINY, features, tmp_path / "run", new_model())
    run.run(lambda step, loss: step < 5)
    path = run.publish(tmp_path / "clip", {"trunk": "abc"})
    assert path == tmp_path / "clip" / FILE
    model, digest, trained = load_dual_encoder(tmp_path / "clip")
    assert len(digest) == 64 and trained["trunk"] == "abc" and trained["step"] == 5
    pixels = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3, 32, 32), np.float32))
    with torch.inference_mode():
        torch.testing.assert_close(model.embed_pixels(pixels), run.model.embed_pixels(pixels), atol=5e-3, rtol=0)


def test_every_knob_changes_the_loss(features: Features) -> None:
    """None of the preset's numbers is without effect."""

    def loss(**changed: float) -> float:
        preset, rng = replace(TINY, same_style=0.0, **changed), rng_of(2, 2)
        model = new_model()
        return dual_encoder_loss(model, draw_batch(features, preset, rng), preset, rng).item()

    plain = loss()
    for name, value in {
        "feature_dropout": 0.0,
        "text_noise": 2.0,
        "temperature": 0.2,
        "softness": 0.9,
        "soft_temperature": 5.0,
        "names": 0.0,
        "batch": 3,
    }.items():
        assert loss(**{name: value}) != pytest.approx(plain, abs=1e-5), name


def test_contrast_is_the_mean_of_both_cross_entropies() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    logits = np.array([[1.0, 0.6], [0.0, 0.8]]) / 0.5

    def cross(rows: np.ndarray) -> float:
        return float(-np.mean([row[i] - np.log(np.exp(row).sum()) for i, row in enumerate(rows)]))

    value = contrast(images, texts, torch.eye(2), 0.5)
    assert float(value) == pytest.approx((cross(logits) + cross(logits.T)) / 2, abs=1e-6)


def test_targets_are_soft_for_names_alike() -> None:
    names = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    targets = soft_targets(names, replace(TINY, softness=0.4, soft_temperature=0.5))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert (targets.diagonal() > 0.6).all() and targets[0, 1] > 2 * targets[0, 2]
    torch.testing.assert_close(soft_targets(names, replace(TINY, softness=0.0)), torch.eye(4))


def unfolded(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Features at the third block, with the normalisations left in: the network as its paper has it."""

    def layer(
        x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        out = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        parts = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        out = F.batch_norm(out, *parts, eps=1e-3)
        return F.relu6(out) if relu else out

    x = layer(x, "_conv_stem", "_bn0", 2)
    x = layer(
        layer(x, "_blocks.0._depthwise_conv", "_blocks.0._bn1", groups=32),
        "_blocks.0._project_conv",
        "_blocks.0._bn2",
        relu=False,
    )
    hidden = layer(x, "_blocks.1._expand_conv", "_blocks.1._bn0")
    hidden = layer(hidden, "_blocks.1._depthwise_conv", "_blocks.1._bn1", 2, groups=96)
    x = layer(hidden, "_blocks.1._project_conv", "_blocks.1._bn2", relu=False)
    return layer(x, "_blocks.2._expand_conv", "_blocks.2._bn0").mean((2, 3))


def test_the_trunk_is_folded_from_a_checkpoint(tmp_path: Path) -> None:
    rng, tensors = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()

    def convolution(name: str, norm: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=rng) * 0.3
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{part}"] = torch.rand(shape[0], generator=rng) + 0.5

    convolution("_conv_stem", "_bn0", 32, 3, 3, 3)
    for i, (inputs, hidden, width) in enumerate(((32, 32, 16), (16, 96, 24), (24, 144, 24))):
        if i:
            convolution(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", hidden, inputs, 1, 1)
        convolution(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", hidden, 1, 3, 3)
        convolution(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", width, hidden, 1, 1)
    config = lite0(32, (2,))
    x = torch.randn(2, 3, 32, 32, generator=rng)
    torch.testing.assert_close(fold_trunk(tensors, config)(x), unfolded(tensors, x), rtol=1e-4, atol=1e-4)
    del tensors["_blocks.1._bn1.bias"]
    with pytest.raises(KeyError, match=r"_blocks\.1\._bn1\.bias"):
        fold_trunk(tensors, config)
    (tmp_path / "trunk.pth").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"trunk: .*trunk\.pth"):
        read_trunk(tmp_path / "trunk.pth", config)
