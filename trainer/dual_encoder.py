"""The dual encoder's objective: pictures and texts of one entity meet, nothing of a held-out one is seen.

Symmetric contrastive loss (CLIP, arXiv 2103.00020, figure 3) with the tower frozen (LiT, arXiv 2111.07991), and soft
targets: beside its own text, a picture may be near texts that MiniLM finds alike. So the space keeps MiniLM's geometry,
which is what carries over to names that training has never seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.dual_encoder import DualEncoder
from trainer.clip_features import Features


@dataclass(frozen=True, kw_only=True)
class DualEncoderPreset:
    """A training run of the dual encoder.

    Attributes:
        side: of the pictures, in pixels.
        taps: blocks of the trunk whose maps become features.
        hidden: width of the image projection's middle.
        views: pictures of each pair: as it is, and in views - 1 scenes.
        batch: entities in a step, each with one pair in one view.
        steps: the run ends here.
        learning_rate, warmup_steps: linear warm-up, then a cosine to 0.
        weight_decay: of the image projection; the text projection is pulled towards the identity by as much.
        feature_dropout: share of features that a step does not see.
        text_noise: standard deviation added to each coordinate of a unit text embedding, times sqrt(1 / size).
        temperature: of the logits.
        softness: share of a target that goes to texts alike, in proportion to exp(cosine / soft_temperature).
        names: share of the loss that compares pictures with entity names alone, without style and scene.
        same_style: share of steps whose pairs all have one style.
        seed: of every draw.
    """

    name: str
    side: int
    taps: tuple[int, ...]
    hidden: int
    views: int
    batch: int
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    feature_dropout: float
    text_noise: float
    temperature: float
    softness: float
    soft_temperature: float
    names: float
    same_style: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEMO_CLIP = DualEncoderPreset(
    name="demo-clip",
    side=96,
    taps=(5, 8, 11),
    hidden=512,
    views=3,
    batch=256,
    steps=1500,
    learning_rate=2e-3,
    warmup_steps=100,
    weight_decay=0.3,
    feature_dropout=0.3,
    text_noise=0.3,
    temperature=0.07,
    softness=0.3,
    soft_temperature=0.1,
    names=0.6,
    same_style=0.3,
    seed=0,
)


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """B pairs of B entities: features [B, F], caption and name means [B, D], the pairs' numbers [B]."""

    images: Tensor
    captions: Tensor
    names: Tensor
    pairs: np.ndarray


def draw_batch(features: Features, preset: DualEncoderPreset, rng: np.random.Generator) -> ClipBatch:
    """Draw entities, a pair of each, and a view of each pair; fewer than `batch` where there are fewer entities."""
    among = np.arange(len(features.pairs))
    if rng.random() < preset.same_style:
        among = np.flatnonzero(features.style == features.style[rng.integers(len(among))])
    shuffled = rng.permutation(among)
    _, first = np.unique(features.entity[shuffled], return_index=True)  # one pair of each entity, any
    rows = rng.permutation(shuffled[first])[: preset.batch]
    views = rng.integers(0, features.images.shape[1], len(rows))
    return ClipBatch(
        images=torch.from_numpy(features.images[rows, views].astype(np.float32)),
        captions=torch.from_numpy(features.captions[rows, views]),
        names=torch.from_numpy(features.names[rows]),
        pairs=features.pairs[rows],
    )


def begin(model: DualEncoder, features: Features) -> None:
    """Standardise the features, and let texts begin as MiniLM has them."""
    plain = torch.from_numpy(features.images[:, 0].astype(np.float32))
    model.feature_mean.copy_(plain.mean(0))
    model.feature_scale.copy_(1.0 / (plain.std(0) + 1e-2))
    with torch.no_grad():
        model.text_projection.weight.copy_(torch.eye(model.size))
        # Sentence embeddings share a large mean; without it their differences fill the sphere.
        model.text_projection.bias.copy_(-F.normalize(torch.from_numpy(features.names), dim=-1).mean(0))


def soft_targets(names: Tensor, preset: DualEncoderPreset) -> Tensor:
    """Target distribution [B, B] of each picture over the batch's texts; row i has most of its mass on i."""
    alike = F.normalize(names - names.mean(0), dim=-1)
    near = torch.softmax(alike @ alike.T / preset.soft_temperature, dim=-1)
    return (1.0 - preset.softness) * torch.eye(len(names)) + preset.softness * near


def contrast(images: Tensor, texts: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of both directions; images and texts are unit vectors [B, D], targets [B, B] symmetric in use."""
    logits = images @ texts.T / temperature
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def dual_encoder_loss(
    model: DualEncoder, batch: ClipBatch, preset: DualEncoderPreset, rng: np.random.Generator
) -> Tensor:
    """The loss of one step."""
    kept = torch.from_numpy(rng.random(batch.images.shape, np.float32) >= preset.feature_dropout)
    images = model.project(model.standardized(batch.images) * kept / (1.0 - preset.feature_dropout))
    targets = soft_targets(batch.names, preset)
    losses = []
    for means in (batch.captions, batch.names):
        noise = torch.from_numpy(rng.standard_normal(means.shape, np.float32)) / means.shape[1] ** 0.5
        texts = F.normalize(model.embed_states(means) + preset.text_noise * noise, dim=-1)
        losses.append(contrast(images, texts, targets, preset.temperature))
    return (1.0 - preset.names) * losses[0] + preset.names * losses[1]
