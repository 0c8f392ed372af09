"""CLIP-like models of Hugging Face and the demonstration's own, as embedders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, PreTrainedModel

from common.dual_encoder import FILE
from retrieval_svc.clip import ClipEmbedder, packaged_clip
from tests.retrieval_svc.tiny_clip import CONTEXT, SIDE, WORDS, save_tiny, tiny_clip, tiny_dual, tiny_siglip

MODELS: dict[str, Callable[[], PreTrainedModel]] = {"clip": tiny_clip, "siglip": tiny_siglip, "dual": tiny_dual}
TEXTS = ["a red dog", "blue castle on a hill", "a guide dog on a red hill", "dog", "hill"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model = MODELS[request.param]()
    return model, save_tiny(model, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture
def folder(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "model"))


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((16, 16, 3), (40, 25, 3), (9, 33, 3), (1, 1, 3))]


def test_rows_are_unit_vectors_of_the_models_size(saved: tuple[PreTrainedModel, Path]) -> None:
    embedder = ClipEmbedder(str(saved[1]))
    for rows, count in ((embedder.texts(TEXTS), len(TEXTS)), (embedder.images(pictures()), 4)):
        assert rows.shape == (count, embedder.size) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert embedder.image_side == SIDE
    assert embedder.texts([]).shape == embedder.images([]).shape == (0, embedder.size)


def test_it_gives_what_the_model_itself_gives(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    embedder = ClipEmbedder(str(path))
    ids = torch.tensor([[10, *(WORDS.index(word) for word in ("a", "red", "dog")), 11]])
    if model.config.model_type == "siglip":  # texts padded to the context, and no mask: its paper's training
        ids = F.pad(ids, (0, CONTEXT - ids.shape[1]))
    pixels = AutoImageProcessor.from_pretrained(path)(Image.fromarray(pictures()[1]), return_tensors="pt")
    with torch.inference_mode():
        text = F.normalize(model.get_text_features(input_ids=ids).pooler_output)
        image = F.normalize(model.get_image_features(**pixels).pooler_output)
    np.testing.assert_allclose(embedder.texts(["a red dog"]), text, atol=1e-5)
    np.testing.assert_allclose(embedder.images([pictures()[1]]), image, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(saved: tuple[PreTrainedModel, Path]) -> None:
    whole, apart = ClipEmbedder(str(saved[1])), ClipEmbedder(str(saved[1]), batch=2)
    np.testing.assert_allclose(whole.texts(TEXTS), apart.texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(whole.images(pictures()), apart.images(pictures()), atol=1e-5)
    np.testing.assert_allclose(whole.texts(TEXTS)[2], whole.texts(TEXTS[2:3])[0], atol=1e-5)
    assert np.abs(whole.texts(TEXTS)[0] - whole.texts(TEXTS)[1]).max() > 1e-3


def test_a_long_text_is_cut_at_the_models_context(saved: tuple[PreTrainedModel, Path]) -> None:
    embedder = ClipEmbedder(str(saved[1]))
    long = embedder.texts(["red dog " * 40, "red dog " * 60])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)


def test_threads_share_an_embedder(saved: tuple[PreTrainedModel, Path]) -> None:
    embedder = ClipEmbedder(str(saved[1]))
    wanted, seen = embedder.texts(TEXTS), embedder.images(pictures())
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(embedder.texts, TEXTS[i % 5 :] or TEXTS) for i in range(20)]
        shown = [pool.submit(embedder.images, pictures()) for _ in range(8)]
        for i, answer in enumerate(asked):
            np.testing.assert_allclose(answer.result(), wanted[i % 5 :], atol=1e-5)
        for answer in shown:
            np.testing.assert_allclose(answer.result(), seen, atol=1e-5)


def test_the_name_names_the_weights(folder: Path) -> None:
    before = ClipEmbedder(str(folder)).name
    assert before.startswith("model-") and ClipEmbedder(str(folder)).name == before
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(sorted(tensors)))
    save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    assert ClipEmbedder(str(folder)).name != before


def test_damaged_weights_are_refused_by_name(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=str(folder)):
            ClipEmbedder(str(folder))


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(tensors) if "projection" in name or "head" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack"):
        ClipEmbedder(str(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=str(folder)):
        ClipEmbedder(str(folder))


def test_each_part_of_a_folder_is_needed(folder: Path) -> None:
    for name in ("preprocessor_config.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=str(folder)):
            ClipEmbedder(str(folder))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    for arguments, said in (
        ({"name": ""}, "embedder"),
        ({"name": str(tmp_path / "nowhere")}, "nowhere"),
        ({"name": packaged_clip(), "device": "abacus"}, "abacus"),
        ({"name": packaged_clip(), "batch": 0}, "batch: 0"),
    ):
        with pytest.raises(ValueError, match=said):
            ClipEmbedder(**arguments)  # type: ignore[arg-type]


def test_pictures_of_another_shape_are_refused() -> None:
    embedder = ClipEmbedder(packaged_clip())
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"images\[1\]"):
            embedder.images([np.zeros((4, 4, 3), np.uint8), wrong])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"images\[0\]"):
        embedder.images([np.zeros((0, 4, 3), np.uint8)])


def test_the_packaged_model_knows_a_color_from_another() -> None:
    """What needs no corpus: plain shapes on colors."""
    embedder = ClipEmbedder(packaged_clip())
    rows, columns = np.mgrid[:96, :96]
    disk = ((rows - 48) ** 2 + (columns - 48) ** 2 < 40**2)[..., None]
    shown = [np.where(disk, np.array(color, np.uint8), np.uint8(255)) for color in ((220, 40, 40), (40, 90, 220))]
    scores = embedder.texts(["red circle", "blue circle"]) @ embedder.images(shown).T
    assert scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]
    np.testing.assert_allclose(np.linalg.norm(embedder.images(shown), axis=1), 1.0, atol=1e-5)
    assert embedder.name.startswith("clip-") and embedder.size == 384


def test_the_packaged_model_does_not_depend_on_the_batch() -> None:
    whole, apart = ClipEmbedder(packaged_clip()), ClipEmbedder(packaged_clip(), batch=1)
    np.testing.assert_allclose(whole.images(pictures()), apart.images(pictures()), atol=1e-5)
    np.testing.assert_allclose(whole.texts(TEXTS), apart.texts(TEXTS), atol=1e-5)


def test_an_altered_packaged_model_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packaged_clip(), tmp_path / "clip"))
    content = bytearray((copy / FILE).read_bytes())
    content[-1] ^= 1
    (copy / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=str(copy)):
        ClipEmbedder(str(copy))
    (copy / FILE).unlink()
    with pytest.raises(ValueError, match=str(copy)):
        ClipEmbedder(str(copy))
