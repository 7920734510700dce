"""Commands in pipes: a reader that ends early, a full disk, and files that go to stdout."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

from hmar_jax.cli import main as cli
from hmar_jax.io import files
from tests import tiny

HMAR = f"{sys.executable} -m hmar_jax"


def shell(command, cwd):
    """Output as in a user's shell, buffered."""
    environment = {k: v for k, v in tiny.ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=cwd, env=environment, capture_output=True
    )


def test_a_reader_that_has_ended_is_no_error_to_speak_of(tmp_path):
    result = shell(f"{HMAR} --help | true", tmp_path)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_is_lost_is_said_in_one_line(tmp_path):
    result = shell(f"{HMAR} --help > /dev/full", tmp_path)
    assert result.returncode == 2
    assert result.stderr == b"hmar: cannot write to the standard output: No space left on device\n"


def test_an_image_through_a_pipe(tmp_path):
    model = tiny.model_run()
    with tiny.cached():
        result = shell(
            f"{HMAR} sample --model={model} --classes=0 --n=1 --out=/dev/stdout | cat > a.png",
            tmp_path,
        )
    assert result.returncode == 0, result.stderr
    data = (tmp_path / "a.png").read_bytes()
    Image.open(io.BytesIO(data)).load()
    assert data.endswith(b"IEND\xaeB`\x82") and b"1 images of 1 classes" in result.stderr


def test_what_a_shell_appends_to_stays(tmp_path):
    (tmp_path / "log").write_text("before\n")
    code = (
        "from hmar_jax.io import files; "
        "files.check_writable('/dev/stdout'); files.write_atomically('/dev/stdout', 'new\\n')"
    )
    result = shell(f'{sys.executable} -c "{code}" >> log; echo after >> log', tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "log").read_text() == "before\nnew\nafter\n"


def test_a_named_pipe_is_not_closed_before_it_is_written(tmp_path):
    """Its reader takes the first closing for the end."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    try:
        files.check_writable(tmp_path / "pipe")
        with pytest.raises(subprocess.TimeoutExpired):  # it still waits
            reader.wait(0.5)
        files.write_atomically(tmp_path / "pipe", "new")
        assert reader.communicate(timeout=20)[0] == b"new"
    finally:
        reader.kill()


def test_an_image_that_is_a_pipe_or_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    edit = ["edit", "--model=digits", "--box=0,0,1,1", "--out=a.png"]
    assert cli.main([*edit, "--image=pipe"]) == 2
    assert "--image pipe: must be a file that can be read twice" in capsys.readouterr().err
    assert cli.main([*edit, "--image=."]) == 2
    assert "--image .: is a folder" in capsys.readouterr().err
