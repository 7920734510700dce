"""The same images in a folder, a zip archive and Parquet files train to the same bits."""

import signal
import time

import pytest

from hmar_jax.cli import main as cli
from tests import tiny
from tests.test_data_failures import start
from tests.test_training import assert_same_end
from tests.test_zip import archive_of


@pytest.fixture
def sources(tmp_path):
    """The tiny images in each form; Parquet in another order of rows."""
    datasets = pytest.importorskip("datasets", reason="requires datasets")
    from tests.test_hf import tables_of, write_parquet

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield {
        "folder": f"folder:{tiny.images()}",
        "zip": archive_of(tiny.images(), tmp_path / "images.zip", top="images/"),
        "hf": write_parquet(tables_of(tiny.images()), tmp_path / "parquet"),
    }
    patch.undo()


@pytest.mark.parametrize("kind", ["zip", "hf"])
def test_a_transformer_trains_to_the_same_bits(sources, tmp_path, kind):
    with tiny.cached():
        assert cli.main(tiny.train(tmp_path / "run", data__source=sources[kind])) == 0
    assert_same_end(tmp_path / "run", tiny.model_run())


@pytest.mark.slow
def test_a_killed_run_goes_from_one_form_to_the_next(sources, tmp_path, monkeypatch):
    """With two worker processes; it ends as the run that was left alone on the folder."""
    monkeypatch.setitem(tiny.ENVIRONMENT, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    arguments = lambda kind: tiny.train_tokenizer(
        run, data__source=sources[kind], data__in_memory=False, data__workers=2, data__threads=1
    )
    for kind, step in (("folder", 20), ("zip", 40)):
        killed = start(arguments(kind))
        while not (run / f"checkpoints/{step}").exists() and killed.poll() is None:
            time.sleep(0.002)
        killed.kill()
        text, _ = killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL, text
    last = start(arguments("hf"))
    text, _ = last.communicate(timeout=200)
    assert last.returncode == 0 and "resuming from step 40" in text, text
    assert_same_end(run, tiny.tokenizer_run())
