"""Shared fixtures: where golden numbers and data lie, and what this machine lacks."""

import os
import pathlib
import shutil
import tempfile

# Compiling for the CPU takes most of the suite's time; the programs are small, and need not be fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
    marks = config.option.markexpr
    if "gpu" not in marks or "not gpu" in marks:
        # They are tests for the CPU; JAX would also look for other devices, and where libtpu is installed tell of it at length.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Before the worker processes start: they all share what tiny.py makes.
    if not hasattr(config, "workerinput"):
        os.environ["HMAR_TINY_FOLDER"] = tempfile.mkdtemp(prefix="hmar_tiny_")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("HMAR_TINY_FOLDER"), ignore_errors=True)


def _folder(variable: str, name: str) -> pathlib.Path:
    folder = pathlib.Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set {variable} to the folder of {name} files")
    return folder


@pytest.fixture(scope="session")
def golden():
    """Path of the folder with numbers recorded from the published code."""
    return _folder("HMAR_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_folder():
    return _folder("HMAR_DATA", "data")


@pytest.fixture(scope="session")
def load_golden(golden):
    """load_golden("next_scale") -> the arrays of next_scale.npz, by name."""
    return lambda name: np.load(golden / f"{name}.npz")


@pytest.fixture(scope="session")
def golden_state(golden):
    """golden_state("vae", "tokenizer") -> the state dict of vae.pth as numpy arrays."""
    pytest.importorskip("torch", reason="reading .pth files needs torch")
    from hmar_jax.families.hmar import convert

    return lambda name, kind: convert.read_state(str(golden / f"{name}.pth"), kind)


def relative(actual, wanted) -> float:
    """|actual - wanted| / |wanted|, both as one vector."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return float(np.linalg.norm(actual - wanted) / max(np.linalg.norm(wanted), 1e-30))
