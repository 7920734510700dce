"""Text files that users write: UTF-8 with or without a mark; anything else in one clear line."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from hmar_jax import config_files
from hmar_jax.cli import main as cli
from hmar_jax.data.folder import open_folder
from hmar_jax.data.source_config import SourceConfig
from hmar_jax.errors import InputError
from hmar_jax.io import files

NAMES = "one café\ntwo Жираф\n"


@pytest.fixture
def images(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def names_of(folder):
    return open_folder(str(folder), ["train"], True, SourceConfig())["train"].class_names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_class_names_with_and_without_a_mark(images, encoding, newline):
    data = NAMES.replace("\n", newline).encode(encoding)
    (images / "class_names.txt").write_bytes(data)
    assert names_of(images) == ("café", "Жираф")


@pytest.mark.parametrize(
    "encoding, words",
    [
        ("utf-16", "is UTF-16; save it as UTF-8, for example by iconv -f UTF-16 -t UTF-8 "),
        ("utf-16-le", "is UTF-16, or no text"),
        ("latin-1", "is another encoding (line 1 has the byte 0xe9)"),
    ],
)
def test_other_encodings_are_named(images, encoding, words):
    text = NAMES.splitlines()[0] if encoding == "latin-1" else "one a\ntwo b\n"
    path = images / "class_names.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError) as error:
        names_of(images)
    message = str(error.value)
    assert message.startswith(f"a list of class names must be UTF-8 text; {path} {words}")
    assert "\n" not in message


def test_lines_without_a_class_folder_are_reported(images, caplog):
    path = images / "class_names.txt"
    path.write_text("One Apple\n\ntwo Pear\nthree Plum\n")
    with caplog.at_level(logging.WARNING, "hmar_jax"):
        assert names_of(images) == ("one", "Pear")
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: 2 of 3 lines name no class folder: 'One', 'three'"
    path.write_text("one Apple\n\ntwo\n")
    with pytest.raises(InputError, match="class_names.txt, line 3: must be a class folder and its"):
        names_of(images)


def test_a_class_folder_with_spaces(images):
    (images / "two").rename(images / "two words")
    (images / "class_names.txt").write_text("one Apple\ntwo words\tBig pear\n")
    assert names_of(images) == ("Apple", "Big_pear")


def test_json_with_a_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": 1}), encoding="utf-8-sig")
    assert files.read_json(path, "the config") == {"a": 1}


CONFIG = "from ml_collections import ConfigDict\ndef get_config(spec):\n  "


def test_a_config_with_a_mark(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(CONFIG + "return ConfigDict({'a': 'é'})\n", encoding="utf-8-sig")
    assert config_files.load_config(f"{path}:x").a == "é"


@pytest.mark.parametrize(
    "data, words",
    [
        ((CONFIG + "return 'é'\n").encode("latin-1"), "must be UTF-8 text; save it as UTF-8"),
        ((CONFIG + "return 1\n").encode("utf-16"), "must be UTF-8 text; save it as UTF-8"),
        (CONFIG.encode() + b"x = (\n", "is not valid Python: '(' was never closed (line 3)"),
        (CONFIG.encode() + b"return None\n", "must return an ml_collections.ConfigDict; got None"),
        (CONFIG.encode() + b"return {'a': 1}\n", "ml_collections.ConfigDict; got dict"),
        (CONFIG.encode() + b"return 1 / 0\n", "fails in line 3: ZeroDivisionError: division by"),
        (CONFIG.encode() + b"raise SystemExit(0)\n", "fails in line 3: SystemExit: 0"),
        (b"import nowhere_at_all\n", "fails in line 1: ModuleNotFoundError: No module named"),
        (b"def get_config():\n  pass\n", "fails: TypeError: get_config() takes 0 positional"),
        (b"get_config = 3\n", "must define get_config(spec)"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, monkeypatch, capsys, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_bytes(data)
    for command in (["train", "--workdir=run"], ["plan", "--topology=v5e:2x2"]):
        assert cli.main([*command, "--config=c.py:x"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "config 'c.py'" in err and words in err
    assert not (tmp_path / "run").exists()
