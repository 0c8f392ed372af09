"""Features as rows, and distances between many of them in little memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CELLS = 16_000_000  # of one block of distances: 128 MB


def checked_rows(name: str, features: np.ndarray, *, at_least: int = 1) -> np.ndarray:
    """float64 [N, D].

    Raises:
        ValueError: it is no table of finite numbers with `at_least` rows; the message begins with `name`.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or (len(rows) and not rows.shape[1]):
        raise ValueError(f"{name}: {list(rows.shape)} is not [pictures, features]")
    if len(rows) < at_least:
        raise ValueError(f"{name}: {len(rows)} pictures, at least {at_least} are needed")
    broken = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(broken):
        raise ValueError(f"{name}[{broken[0]}]: holds a number that is not finite")
    return rows


def checked_pair(
    first_name: str, first: np.ndarray, second_name: str, second: np.ndarray, *, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Two such tables of one width.

    Raises:
        ValueError: see `checked_rows`; or the widths differ.
    """
    one, two = checked_rows(first_name, first, at_least=at_least), checked_rows(second_name, second, at_least=at_least)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"{second_name}: {two.shape[1]} features, {first_name} has {one.shape[1]}")
    return one, two


def unit_rows(name: str, features: np.ndarray, *, at_least: int = 1) -> np.ndarray:
    """The rows with length 1.

    Raises:
        ValueError: see `checked_rows`; or a row is all zeros, and so points nowhere.
    """
    rows = checked_rows(name, features, at_least=at_least)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    nowhere = np.flatnonzero(lengths == 0.0)
    if len(nowhere):
        raise ValueError(f"{name}[{nowhere[0]}]: is all zeros, and points nowhere")
    return rows / lengths


def squared_distances(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared Euclidean distances of rows [N, D] to rows [M, D], some of the N at a time: which, and float64 [n, M]."""
    lengths, at_once = (second**2).sum(1), max(1, _CELLS // max(1, len(second)))
    for start in range(0, len(first), at_once):
        rows = slice(start, min(start + at_once, len(first)))
        block = (first[rows] ** 2).sum(1)[:, None] + lengths - 2.0 * (first[rows] @ second.T)
        yield rows, np.maximum(block, 0.0, out=block)
