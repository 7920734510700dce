"""Settings and fixtures that all tests share."""

import lzma
import os
import pathlib
import shutil
import tempfile

# Compilation takes most of the suite's time, and the compiled programs are small.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import numpy as np
import pytest

from tests import launch_sandbox

# Numbers recorded from the published code; tests/golden/README.md describes them.
GOLDEN = pathlib.Path(
    os.environ.get("HMAR_GOLDEN") or pathlib.Path(__file__).resolve().parent / "golden"
)


def pytest_configure(config):
    marks = config.option.markexpr
    if "gpu" not in marks or "not gpu" in marks:
        # Otherwise JAX looks for accelerators too, and logs at length where libtpu is installed.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Set before pytest-xdist starts its workers, which share the runs that tiny.py trains.
    if not hasattr(config, "workerinput"):
        folder = os.environ["HMAR_TINY_FOLDER"] = tempfile.mkdtemp(prefix="hmar_tiny_")
        # Many tests compile the same programs; this run's processes share them, as tiny.py does.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("HMAR_TINY_FOLDER"), ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def no_lines_on_slow_phases():
    """Output does not depend on how busy the machine is."""
    from hmar_jax import progress

    progress.QUIET_SECONDS = 3600


@pytest.fixture(scope="session")
def load_golden():
    """load_golden("next_scale") -> the arrays of next_scale.npz, by name."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """Path of a folder with the golden files as the published code writes them, .pth included."""
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
    folder = tmp_path_factory.mktemp("golden")
    for path in GOLDEN.iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            (folder / path.name).symlink_to(path)
    if not (folder / "next_scale.pth").exists():
        combined = torch.load(folder / "hmar.pth", weights_only=True)
        torch.save(_stage_of(combined, "ns"), folder / "next_scale.pth")
        torch.save(_stage_of(combined, "mask"), folder / "masked.pth")
    return folder


def _stage_of(combined: dict, stage: str) -> dict:
    """The state dict of stage 1 ("ns") or stage 2 ("mask") from that of the combined model.

    The combined model holds both stages: the blocks that they share as base_blocks, and the blocks
    and the head of each under the stage's own prefix.
    """
    num_base = len({name.split(".")[1] for name in combined if name.startswith("base_blocks.")})
    other = {"ns": "mask", "mask": "ns"}[stage]
    state = {}
    for name, value in combined.items():
        group, _, rest = name.partition(".")
        if group.startswith(f"{other}_") or (stage == "ns" and name == "mask_embed.weight"):
            continue
        if group == "base_blocks":
            name = f"blocks.{rest}"
        elif group == f"{stage}_blocks":
            index, _, rest = rest.partition(".")
            name = f"blocks.{num_base + int(index)}.{rest}"
        elif stage == "ns" and name == "word_embed_bias":
            name = "word_embed.bias"
        elif group != "mask_embed":
            name = name.removeprefix(f"{stage}_")
        state[name] = value
    return state


@pytest.fixture(scope="session")
def golden_state(golden):
    """golden_state("vae", "tokenizer") -> the state dict of vae.pth as numpy arrays."""
    from hmar_jax.families.hmar import convert

    return lambda name, kind: convert.read_state(str(golden / f"{name}.pth"), kind)


def relative(actual, expected) -> float:
    """|actual - expected| / |expected|, both as one vector."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.fixture
def sandbox(tmp_path):
    """For tests of the launch scripts."""
    return launch_sandbox.Sandbox(tmp_path)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): calls `do` after n steps of this process."""
    from hmar_jax.training.reporting import Reporter  # JAX is imported where it is needed

    def install(number, do):
        advance, count = Reporter.advance, []

        def advance_and_do(self):
            advance(self)
            count.append(1)
            if len(count) == number:
                do()

        monkeypatch.setattr(Reporter, "advance", advance_and_do)

    return install
