"""FID: the Frechet distance of two sets of features, seen as Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    |m - m_w|^2 + Tr(C + C_w - 2 (C C_w)^(1/2))

on the features of `inception.py`; equal to pytorch-fid on the same features (covariance with N - 1). The trace of the root
is taken from the eigenvalues of the symmetric C^(1/2) C_w C^(1/2), which are those of C C_w: no imaginary parts, and
nothing is added to a singular covariance. Moments are summed batch by batch (Chan, Golub & LeVeque 1983), so that 30,000
pictures need the memory of one batch and one covariance.

Limits: biased upwards, more with fewer pictures: compare figures of equally many alone, and with fewer than some 10,000
(less than the 2,048 features at the least) trust no digits. Blind to what Inception does not see; low where a system
copies its reference.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import linalg

from common.files import write_atomic
from evaluation.scores.feature_rows import checked_rows


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """What FID keeps of a set: mean [D] and covariance [D, D], float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that come in batches."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        """Take in features [N, D]; N may be 0.

        Raises:
            ValueError: one is not finite, or D is not that of the others.
        """
        rows = checked_rows("features", features, at_least=0)
        if not len(rows):
            return
        if not self.count:
            self._mean, self._scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        if rows.shape[1] != len(self._mean):
            raise ValueError(f"features: {rows.shape[1]} wide, those before are {len(self._mean)}")
        total, mean = self.count + len(rows), rows.mean(0)
        centered, shift = rows - mean, mean - self._mean
        self._scatter += centered.T @ centered + np.outer(shift, shift) * (self.count * len(rows) / total)
        self._mean = self._mean + shift * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian of all that was added.

        Raises:
            ValueError: that is less than two pictures.
        """
        if self.count < 2:
            raise ValueError(f"features: of {self.count} pictures, a covariance needs 2 at least")
        return Gaussian(mean=self._mean.copy(), covariance=self._scatter / (self.count - 1))


def gaussian_of(batches: Iterable[np.ndarray]) -> Gaussian:
    """The Gaussian of features that come as batches [N, D]."""
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    return moments.gaussian()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Equation 6, not below 0; squared units of the features.

    Raises:
        ValueError: their widths differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"second: {len(second.mean)} features, the first has {len(first.mean)}")
    values, vectors = linalg.eigh(first.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    product = linalg.eigvalsh(root.T @ second.covariance @ root)
    shift = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(shift @ shift + traces - 2.0 * np.sqrt(np.maximum(product, 0.0)).sum()))


def read_gaussian(path: Path) -> Gaussian:
    """Statistics as pytorch-fid saves them: an .npz with `mu` and `sigma`.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with np.load(path) as arrays:
            mean, covariance = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"statistics: {path} is no .npz with mu and sigma ({error})") from None
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2 or not np.isfinite(covariance).all():
        raise ValueError(f"statistics: {path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit")
    return Gaussian(mean=mean, covariance=covariance)


def write_gaussian(path: Path, gaussian: Gaussian) -> None:
    """Write what `read_gaussian` and pytorch-fid read."""
    stream = io.BytesIO()
    np.savez(stream, mu=gaussian.mean, sigma=gaussian.covariance)
    write_atomic(path, stream.getvalue())
