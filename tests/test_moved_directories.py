"""A run directory that is moved or deleted while the run trains."""

import shutil

from hmar_jax.cli import main as cli
from hmar_jax.io import checkpoints
from tests import tiny

CHANGES = dict(log_every=5, eval_every=1000, sample_every=1000, checkpoint_every=10, steps=40)


def test_a_run_that_is_moved_is_saved_where_it_is(tmp_path, at_step, capfd):
    """It made a second directory at the old place, with checkpoints and nothing else, status 0."""
    workdir, moved = tmp_path / "run", tmp_path / "moved" / "here"
    moved.parent.mkdir()
    arguments = tiny.train(workdir, **CHANGES)
    at_step(25, lambda: workdir.rename(moved))
    with tiny.cached():
        assert cli.main(arguments) == 2
        last = capfd.readouterr().err.splitlines()[-1]
        assert f"workdir {workdir} was moved to {moved} while" in last
        assert f"step 30 is saved there: rerun the command with --workdir={moved}" in last
        assert not workdir.exists()
        assert checkpoints.steps_of_run(moved)[-1] == 30
        assert cli.main(tiny.train(moved, **CHANGES)) == 0
    assert checkpoints.steps_of_run(moved)[-1] == 40 and not workdir.exists()


def test_a_run_that_is_deleted_ends(tmp_path, at_step, capfd):
    workdir = tmp_path / "run"
    arguments = tiny.train(workdir, **CHANGES)
    at_step(25, lambda: shutil.rmtree(workdir))
    with tiny.cached():
        assert cli.main(arguments) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"workdir {workdir} was moved or deleted while this process wrote to it" in last
    assert not workdir.exists()
