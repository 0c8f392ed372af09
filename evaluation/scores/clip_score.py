"""CLIP score: does a picture show what a text says (Hessel et al. 2021, arXiv 2104.08718, equations 1 and 2)?

    CLIP-S(c, v) = 2.5 max(cos(c, v), 0)
    RefCLIP-S(c, R, v) = harmonic mean of CLIP-S(c, v) and max(max over R of cos(v, r), 0)

Here c is the prompt, v the picture; RefCLIP-S is for pictures with references: the paper's r are captions of the same
picture, any embeddings of the same space will do. By any dual encoder: the packaged one, or a folder with a Hugging Face
CLIP (the paper: ViT-B/32, with "A photo depicts " before each caption: give it as `prefix`).

Limits: figures compare within one encoder alone. CLIP reads few words, miscounts, ignores order and places, and knows no
rare entity by its name: faithfulness to rare entities is what `entity.py` measures. The packaged encoder was trained on
the training entities of the demonstration corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.scores.feature_rows import unit_rows
from retrieval_svc.embedding import Embedder

WEIGHT = 2.5


def clip_scores(texts: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 2.5] of embeddings [N, D], row by row.

    Raises:
        ValueError: their shapes differ, or a row is not finite or all zeros.
    """
    c, v = unit_rows("texts", texts, at_least=0), unit_rows("pictures", pictures, at_least=0)
    if c.shape != v.shape:
        raise ValueError(f"pictures: {list(v.shape)}, texts have {list(c.shape)}")
    return WEIGHT * np.maximum((c * v).sum(1), 0.0)


def ref_clip_scores(texts: np.ndarray, pictures: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """The same with references [R, D] of each picture, in [0, 10 / 7]."""
    scores, v = clip_scores(texts, pictures), unit_rows("pictures", pictures, at_least=0)
    if len(references) != len(v):
        raise ValueError(f"references: of {len(references)} pictures, there are {len(v)}")
    nearest = [max(0.0, float((unit_rows(f"references[{i}]", r) @ v[i]).max())) for i, r in enumerate(references)]
    best = np.array(nearest, np.float64)
    return np.divide(2.0 * scores * best, scores + best, out=np.zeros(len(v)), where=scores + best > 0.0)


def clip_scores_of(
    embedder: Embedder, prompts: Sequence[str], pictures: Sequence[np.ndarray], *, prefix: str = ""
) -> np.ndarray:
    """CLIP-S of uint8 pictures [H, W, 3] and their prompts."""
    if len(prompts) != len(pictures):
        raise ValueError(f"pictures: {len(pictures)} for {len(prompts)} prompts")
    return clip_scores(embedder.texts([prefix + prompt for prompt in prompts]), embedder.images(pictures))
