"""FID, CMMD, precision and recall, against pytorch-fid, prdc and scikit-learn, and on sets whose answer is known."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics.pairwise import rbf_kernel

from evaluation.scores.cmmd import cmmd
from evaluation.scores.frechet import Gaussian, Moments, frechet_distance, gaussian_of, read_gaussian, write_gaussian
from evaluation.scores.inception import InceptionFeatures
from evaluation.scores.manifold import precision_recall

HERE = Path(__file__).parent
ORACLES = HERE.parents[2] / "build" / "oracles"
RNG = np.random.default_rng(3)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What went in, and what pytorch-fid and prdc said of it."""

    folder: Path
    first: np.ndarray
    second: np.ndarray
    pictures: np.ndarray
    found: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    assert ORACLES.is_dir(), "`make oracles` installs what these tests compare with"
    folder = tmp_path_factory.mktemp("oracle")
    turn = RNG.normal(size=(24, 24))
    first, second = RNG.normal(size=(400, 24)) @ turn, RNG.normal(0.3, 1.4, size=(300, 24)) @ turn
    pictures = RNG.integers(0, 256, size=(2, 48, 48, 3), dtype=np.uint8)
    np.savez(folder / "arrays.npz", first=first, second=second, pictures=pictures)
    environment = os.environ | {"PYTHONPATH": str(ORACLES), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, HERE / "oracle.py", folder], env=environment, check=True, capture_output=True)
    with np.load(folder / "found.npz") as found:
        return Oracle(folder=folder, first=first, second=second, pictures=pictures, found=dict(found))


def batches(features: np.ndarray, size: int = 37) -> list[np.ndarray]:
    return [features[i : i + size] for i in range(0, len(features), size)]


def test_the_distance_is_pytorch_fids(oracle: Oracle) -> None:
    found = frechet_distance(gaussian_of(batches(oracle.first)), gaussian_of(batches(oracle.second)))
    assert found == pytest.approx(float(oracle.found["frechet"]), rel=1e-9)


def test_the_networks_features_are_pytorch_fids(oracle: Oracle, tmp_path: Path) -> None:
    network = InceptionFeatures(oracle.folder / "weights.pth")
    found = network(list(oracle.pictures))
    assert found.shape == (2, 2048) and np.ptp(oracle.found["features"]) > 0.01
    assert found == pytest.approx(oracle.found["features"], rel=1e-4, abs=1e-5)
    assert np.abs(network([oracle.pictures[1]])[0] - found[1]).max() < 1e-5, "whatever it was batched with"
    state = torch.load(oracle.folder / "weights.pth", weights_only=True)
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "same.safetensors")
    same = InceptionFeatures(tmp_path / "same.safetensors")
    assert np.array_equal(same([oracle.pictures[0]]), network([oracle.pictures[0]]))
    broken = load_file(tmp_path / "same.safetensors")
    broken["Mixed_7c.branch_pool.bn.weight"][3] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    del broken["Mixed_7c.branch_pool.bn.weight"]
    save_file(broken, tmp_path / "lacking.safetensors")
    (tmp_path / "cut.pth").write_bytes((oracle.folder / "weights.pth").read_bytes()[:1000])
    for name, said in (
        ("nan.safetensors", "Mixed_7c.branch_pool.bn.weight.* not finite"),
        ("lacking.safetensors", "is not pytorch-fid's: .*Mixed_7c.branch_pool.bn.weight"),
        ("cut.pth", "cannot be read"),
        ("none.pth", "does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            InceptionFeatures(tmp_path / name)
    with pytest.raises(ValueError, match="float32"):
        network([np.zeros((8, 8, 3), np.float32)])


def test_precision_and_recall_are_prdcs(oracle: Oracle) -> None:
    found = precision_recall(oracle.first, oracle.second)
    assert found.precision == pytest.approx(float(oracle.found["precision"]))
    assert found.recall == pytest.approx(float(oracle.found["recall"]))
    assert 0.0 < found.recall < 1.0 and 0.0 < found.precision < 1.0, "the case tells something"


def test_the_distance_of_known_gaussians() -> None:
    def diagonal(mean: float, deviation: float) -> Gaussian:
        return Gaussian(mean=np.full(5, mean), covariance=np.eye(5) * deviation**2)

    assert frechet_distance(diagonal(0, 2), diagonal(3, 2)) == pytest.approx(5 * 9.0)
    assert frechet_distance(diagonal(1, 2), diagonal(1, 5)) == pytest.approx(5 * 9.0)
    assert frechet_distance(diagonal(0, 0), diagonal(2, 1)) == pytest.approx(5 * 5.0), "singular: constant pictures"
    rows = RNG.normal(size=(10, 40))  # fewer pictures than features: the covariance is singular
    assert frechet_distance(gaussian_of([rows]), gaussian_of([rows])) == pytest.approx(0.0, abs=1e-5)


def test_moments_do_not_depend_on_batches_and_hold_no_features() -> None:
    rows = RNG.normal(1000.0, 1.0, size=(501, 6))  # far from 0: a plain sum of squares would lose digits
    streamed = gaussian_of([*batches(rows, 7), rows[:0]])
    assert streamed.mean == pytest.approx(rows.mean(0))
    assert streamed.covariance == pytest.approx(np.cov(rows, rowvar=False), rel=1e-9)
    moments = Moments()
    tracemalloc.start()
    for seed in range(300):
        moments.add(np.random.default_rng(seed).normal(size=(100, 64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert moments.count == 30_000 and peak < 2_000_000, "30,000 x 64 numbers would be 15 MB"


def test_statistics_are_kept_as_pytorch_fid_keeps_them(tmp_path: Path) -> None:
    kept = gaussian_of([RNG.normal(size=(9, 3))])
    write_gaussian(tmp_path / "statistics.npz", kept)
    with np.load(tmp_path / "statistics.npz") as arrays:
        assert set(arrays) == {"mu", "sigma"}
    assert np.array_equal(read_gaussian(tmp_path / "statistics.npz").covariance, kept.covariance)
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"cut\.npz is no \.npz with mu and sigma"):
        read_gaussian(tmp_path / "cut.npz")


def test_cmmd_is_that_of_whole_kernel_matrices() -> None:
    x, y = RNG.normal(size=(50, 8)), RNG.normal(0.5, 1.0, size=(70, 8))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    gamma = 1.0 / 200.0
    wanted = 1000.0 * (
        rbf_kernel(a, a, gamma).mean() + rbf_kernel(b, b, gamma).mean() - 2 * rbf_kernel(a, b, gamma).mean()
    )
    assert cmmd(x, y) == pytest.approx(wanted) == pytest.approx(cmmd(7.0 * x, y))
    assert cmmd(x, x) == pytest.approx(0.0, abs=1e-9)
    # One picture each, a right angle apart: 1000 (1 + 1 - 2 exp(-2 / 200)).
    assert cmmd(np.array([[3.0, 0.0]]), np.array([[0.0, 1.0]])) == pytest.approx(2000.0 * (1.0 - np.exp(-0.01)))


def test_what_is_left_out_lowers_recall_and_what_is_wrong_precision() -> None:
    near, far, wrong = (RNG.normal(center, 0.1, size=(60, 4)) for center in (0.0, 10.0, -10.0))
    reference = np.concatenate([near, far])
    narrow = precision_recall(near + 0.001, reference)
    assert narrow.precision > 0.95 and narrow.recall == pytest.approx(0.5, abs=0.02)
    wild = precision_recall(np.concatenate([near + 0.001, far + 0.001, wrong]), reference)
    assert wild.precision == pytest.approx(2 / 3, abs=0.02) and wild.recall > 0.95
    constant = precision_recall(np.zeros((60, 4)), reference)
    assert constant.recall == 0.0, "one picture again and again covers nothing"


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (np.zeros((0, 3)), "0 pictures"),
        (np.full((5, 3), np.nan), r"drawn\[0\]: holds a number that is not finite"),
        (np.ones((5, 2)), "reference: 3 features, drawn has 2"),
        (np.ones(5), r"drawn: \[5\] is not"),
    ],
)
def test_what_is_no_set_is_refused(first: np.ndarray, said: str) -> None:
    reference = RNG.normal(size=(6, 3))
    for score in (cmmd, precision_recall):
        with pytest.raises(ValueError, match=said):
            score(first, reference)
    if not np.array_equal(first, np.ones((5, 2))):
        with pytest.raises(ValueError, match="features"):
            gaussian_of([first])


def test_too_few_pictures_are_said() -> None:
    with pytest.raises(ValueError, match="of 1 pictures, a covariance needs 2"):
        gaussian_of([np.ones((1, 3))])
    with pytest.raises(ValueError, match="drawn: 3 pictures, at least 4"):
        precision_recall(np.ones((3, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match=r"drawn\[1\]: is all zeros"):
        cmmd(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones((2, 2)))
    with pytest.raises(ValueError, match="6 wide, those before are 3"):
        gaussian_of([np.ones((2, 3)), np.ones((2, 6))])
