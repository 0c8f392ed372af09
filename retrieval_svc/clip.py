"""CLIP-like models as embedders: any of Hugging Face by folder or name, and the demonstration's own dual encoder.

The only file of this service that knows `transformers`. It imports torch at its top, which takes seconds: only the wiring
of a service that was given a model may import it, so that one without starts fast. Weights are read from safetensors
alone, and no code of a model's repository is run.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from common.dual_encoder import FILE, load_dual_encoder, mean_states, pixels_of
from common.files import sha256_file
from common.text import TextEncoder, packaged_encoder

PUBLIC_CLIP = "openai/clip-vit-base-patch32"  # the production default, fetched by name


class _Model(Protocol):
    """What the two kinds of model have in common; called by one thread at a time for texts, by any for pictures."""

    name: str
    size: int
    image_side: int

    def text_vectors(self, texts: list[str]) -> Tensor: ...

    def image_vectors(self, pictures: list[np.ndarray]) -> Tensor: ...


class ClipEmbedder:
    """An `Embedder` of texts and pictures. Safe to use from several threads."""

    def __init__(self, name: str, *, device: str = "cpu", batch: int = 64) -> None:
        """Load a model.

        Args:
            name: a folder, or the name of a model of the hub. The folder holds a Hugging Face model that has both
                `get_text_features` and `get_image_features` (CLIP, SigLIP, a vision-text dual encoder), or what
                `python -m trainer fit-clip` published.
            device: "cpu", "cuda", or "auto": a GPU if there is one.
            batch: so many texts or pictures go through the model at once.

        Raises:
            ValueError: there is no such model, it is damaged or of another kind; the message names it.
        """
        if batch < 1:
            raise ValueError(f"batch: {batch} is below 1")
        self._batch = batch
        self._model = _open(name, _device(device))
        self._tokenizing = threading.Lock()  # a fast tokenizer keeps its padding rule in itself

    @property
    def name(self) -> str:
        """Names the weights: a folder's name and the start of their sha256, or a hub name and its revision."""
        return self._model.name

    @property
    def size(self) -> int:
        """Size of the embeddings."""
        return self._model.size

    @property
    def image_side(self) -> int:
        """Side in pixels of the picture that the model sees."""
        return self._model.image_side

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, size], rows of unit length. A text longer than the model's context is cut off there."""
        with self._tokenizing:
            return self._embed(list(texts), self._model.text_vectors)

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The same of uint8 RGB pictures [H, W, 3].

        Raises:
            ValueError: a picture has another shape or type; the message gives its place.
        """
        for i, picture in enumerate(images):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
                raise ValueError(f"images[{i}]: {picture.dtype} {picture.shape} is not uint8 [H, W, 3]")
        return self._embed(list(images), self._model.image_vectors)

    @torch.inference_mode()
    def _embed(self, items: list[Any], vectors: Callable[[list[Any]], Tensor]) -> np.ndarray:
        parts = [
            F.normalize(vectors(items[start : start + self._batch]).float(), dim=-1).cpu().numpy()
            for start in range(0, len(items), self._batch)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.size), np.float32)


def packaged_clip() -> str:
    """Folder of the demonstration dual encoder, as the repository carries it."""
    return str(Path(__file__).resolve().parent.parent / "weights" / "clip")


def _device(asked: str) -> str:
    if asked not in ("cpu", "cuda", "auto"):
        raise ValueError(f"device: {asked!r} is not cpu, cuda or auto")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is asked for, and torch finds no GPU")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _open(name: str, device: str) -> _Model:
    if not name:
        raise ValueError("embedder: the name is empty")
    folder = Path(name)
    if (folder / FILE).exists() or folder.resolve() == Path(packaged_clip()):
        return _DemonstrationModel(folder, device)  # CheckpointError is a ValueError
    try:
        return _HuggingFaceModel(name, device)
    except Exception as error:  # transformers, tokenizers and safetensors tell of damaged files each in their own types
        why = " ".join(str(error).split())
        raise ValueError(f"embedder: {name} holds no CLIP-like model that can be loaded ({why})") from error


class _DemonstrationModel:
    """The dual encoder that the trainer publishes, over the packaged MiniLM."""

    def __init__(self, folder: Path, device: str) -> None:
        self._model, digest, _ = load_dual_encoder(folder, device=device)
        self._text = TextEncoder(packaged_encoder(), device=device)
        self._device = device
        self.name = f"{folder.resolve().name}-{digest[:12]}"
        self.size, self.image_side = self._model.size, self._model.config.side

    def text_vectors(self, texts: list[str]) -> Tensor:
        states, mask = self._text.encode(texts)
        return self._model.embed_states(mean_states(states, mask))

    def image_vectors(self, pictures: list[np.ndarray]) -> Tensor:
        return self._model.embed_pixels(pixels_of(pictures, self.image_side).to(self._device))


class _HuggingFaceModel:
    """A model of `transformers` with its own tokenizer and preprocessing."""

    def __init__(self, name: str, device: str) -> None:
        config = AutoConfig.from_pretrained(name)
        loaded = AutoModel.from_pretrained(name, config=config, use_safetensors=True, output_loading_info=True)
        model, report = loaded
        lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ()))
        if lacking:
            raise ValueError(f"its weights lack {lacking[:3]}, or have other shapes there")
        if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
            raise ValueError(f"{config.model_type} does not embed both texts and pictures")
        self._model = model.eval().to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(name)
        self._processor = AutoImageProcessor.from_pretrained(name)
        self._device = device
        # SigLIP was trained with texts padded to their full length, without a mask.
        self._padded = str(config.model_type).startswith("siglip")
        self._context = min(self._tokenizer.model_max_length, int(config.text_config.max_position_embeddings))
        self.name = _weights_name(name, config)
        self.image_side = int(config.vision_config.image_size)
        self.size = int(self.text_vectors(["picture"]).shape[1])

    def text_vectors(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts,
            padding="max_length" if self._padded else True,
            truncation=True,
            max_length=self._context,
            return_tensors="pt",
        ).to(self._device)
        mask = {} if self._padded else {"attention_mask": tokens["attention_mask"]}
        with torch.inference_mode():
            return _pooled(self._model.get_text_features(input_ids=tokens["input_ids"], **mask))

    def image_vectors(self, pictures: list[np.ndarray]) -> Tensor:
        # As PIL pictures: of an array a few pixels wide the processor would guess where the channels are.
        prepared = self._processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        return _pooled(self._model.get_image_features(pixel_values=prepared["pixel_values"].to(self._device)))


def _pooled(output: Any) -> Tensor:
    """`get_*_features` gives a tensor in `transformers` 4, and an output that holds it in 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _weights_name(name: str, config: Any) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(sha256_file(path).encode())
    return f"{folder.resolve().name}-{digest.hexdigest()[:12]}"
