"""Classes as users name them: names before ids, and one line where a text means two classes."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import hmar_jax
from hmar_jax.class_names import (
    file_stem,
    label_of,
    resolve_class,
    resolve_classes,
    split_classes,
)
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from tests import tiny

TWELVE = tuple(sorted(map(str, range(12))))  # as folders are sorted: 0 1 10 11 2 3 ...


def resolve(given, names=TWELVE):
    return resolve_class(given, len(names), names)


@pytest.mark.parametrize(
    "given, names, expected",
    [
        ("0", TWELVE, 0),  # name and id agree
        (2, TWELVE, 2),  # an integer is an id
        (np.int64(2), TWELVE, 2),
        (np.uint8(2), TWELVE, 2),
        (np.array(2), TWELVE, 2),
        ("id:2", TWELVE, 2),
        ("name:2", TWELVE, 4),
        ("name:11", TWELVE, 3),
        ("7", ("3", "7", "42"), 1),  # no id
        ("-1", ("-1", "0", "x"), 0),
        ("007", ("005", "006", "007"), 2),
        ("7", ("005", "006", "007"), 2),
        ("007", tuple(map(str, range(10))), 7),
        ("id:1", ("id:1", "x"), 0),  # a name, exactly
        ("name:id:1", ("x", "id:1"), 1),
        ("cafe\u0301", ("the", "caf\u00e9"), 1),  # as macOS decomposes letters
        ("Great Dane", ("x", "great-dane"), 1),
        ("a, b", ("a", "a, b"), 1),
        ("3", (), 3),
    ],
)
def test_one_reading(given, names, expected):
    assert resolve_class(given, len(names) or 10, names) == expected


def test_a_text_with_two_readings_is_refused():
    with pytest.raises(InputError) as error:
        resolve("2")
    assert str(error.value) == (
        "class '2' is the name of class 4 ('2') and the id of class '10'; give name:2 or id:2"
    )
    with pytest.raises(
        InputError, match="'7' is the name of class 6 .'007'. and the id of .*'008'"
    ):
        resolve("7", tuple(f"{i:03d}" for i in range(1, 12)))
    with pytest.raises(InputError, match="'1': 2 classes have this name; give an id: id:0, id:2"):
        resolve("name:1", ("01", "5", "001"))


@pytest.mark.parametrize(
    "given, words",
    [
        (-1, r"id in \[0, 11\]; got -1"),
        (12, "got 12"),
        ("-1", "got -1"),
        ("id:12", "got 12"),
        ("name:12", "got '12'"),
        (True, "got True"),
        (1.0, "got 1.0"),
        (None, "got None"),
        ("", "got ''"),
        ("²", "got '²'"),
    ],
)
def test_no_class(given, words):
    with pytest.raises(InputError, match=words):
        resolve(given)


def test_a_similar_name_is_suggested():
    with pytest.raises(InputError, match="got 'retreiver'; did you mean 'retriever'?"):
        resolve("retreiver", ("tench", "retriever"))


def test_several_classes_in_one_text():
    assert split_classes("a, 3,id:2") == ["a", "3", "id:2"]
    assert split_classes('"great white, shark",3') == ["great white, shark", "3"]
    assert split_classes('5" disk,x') == ['5" disk', "x"]
    for text in ("", "a,,b", "a,", '"a'):
        with pytest.raises(InputError):
            split_classes(text)
    with pytest.raises(InputError, match=r"""--classes='"white, shark"'"""):
        split_classes("white, shark", ("tench", "white, shark"))


PETS = ("golden-retriever", "all", "0-2", "cat", "name:0-1")


@pytest.mark.parametrize(
    "given, names, expected",
    [
        ("all", (), list(range(10))),
        ("All", ("cat", "dog"), [0, 1]),
        ("0-3,7", (), [0, 1, 2, 3, 7]),
        ("7, 1 - 2", (), [7, 1, 2]),
        ("3-3", (), [3]),
        ("0-1,cat", ("cat", "dog"), [0, 1, 0]),
        ("golden-retriever,golden retriever", PETS, [0, 0]),
        ("name:all", PETS, [1]),
        ("id:all", PETS, [0, 1, 2, 3, 4]),
        ("name:0-2,id:0-2", PETS, [2, 0, 1, 2]),
        ("name:0-1", PETS, [4]),
        ("1990-1999", ("1980-1989", "1990-1999"), [1]),  # no ids
        ("0-0", ("0-0", "x"), [0]),  # the same class
        ("all", ("all",), [0]),
        ("0-2", ("0", "1", "2", "x"), [0, 1, 2]),  # names and ids agree
        ("id:0-2", TWELVE, [0, 1, 2]),
        ("3,id:1", (), [3, 1]),
    ],
)
def test_ranges_and_all(given, names, expected):
    assert resolve_classes(given, len(names) or 10, names) == expected


@pytest.mark.parametrize(
    "given, names, words",
    [
        ("all", PETS, "'all' is the name of class 1 .'all'. and .*; give name:all or id:all"),
        ("3,0-2", PETS, "'0-2' is the name of class 2 .* the ids 0 to 2; give name:0-2 or id:0-2"),
        (
            "0-1",
            ("a", "b", "0_1"),
            "'0-1' is the name of class 2 .'0_1'. and stands for the ids 0 to 1",
        ),
        ("0-3", TWELVE, "classes '0-3': class '2' is the name of class 4 .*; give id:0-3 for ids"),
        ("3-1", (), r"FIRST-LAST with ids in \[0, 9\], the smaller first; got '3-1'"),
        ("5-10", (), "FIRST-LAST .* got '5-10'"),
        ("id:5-10", (), "FIRST-LAST .* got '5-10'"),
        ("1-", (), "got '1-'"),
        ("cat-dog", ("cat", "dog"), "got 'cat-dog'"),
        ("", (), "each class must be"),
    ],
)
def test_ranges_with_two_readings_or_none(given, names, words):
    with pytest.raises(InputError, match=words):
        resolve_classes(given, len(names) or 10, names)


def test_classes_in_names_of_files():
    names = ("great white shark, Carcharodon", "../etc/passwd", "\u732b", "3", "03", "a\nb" * 40)
    stems = [file_stem(i, 6, names) for i in range(6)]
    assert stems[:5] == ["0_great_white_shark_Carcharodon", "1_etc_passwd", "2_\u732b", "3", "4_03"]
    assert len(stems[5]) <= 42 and "\n" not in stems[5]
    assert file_stem(7, 1000) == "007"


def test_labels_say_the_id_where_the_name_would_mislead():
    assert label_of(3) == "3"
    assert [label_of(i, ("0", "10", "2")) for i in range(3)] == ["0", "10 (id 1)", "2"]
    assert label_of(1, ("crane", "crane")) == "crane (id 1)"


def renamed(model, *names):
    """A copy of the tiny run with other class names."""
    shutil.copytree(tiny.masked_run(), model)
    config = json.loads((model / "config.json").read_text())
    config["model"]["class_names"] = names
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """A model whose classes 0, 1, 2 are called 1, 10 and 2."""
    model = renamed(tmp_path / "model", "1", "10", "2")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.image(0, np.random.default_rng(0), tiny.SIDE)).save("a.png")
    with tiny.cached():
        yield model


def test_sample_edit_and_the_api_agree(numbered, capsys):
    sample = ["sample", f"--model={numbered}", "--n=1", "--seed=3", "--npz=x.npz"]
    edit = ["edit", f"--model={numbered}", "--image=a.png", "--box=0,0,8,8"]
    assert cli.main([*sample, "--out=g.png", "--classes=1"]) == 2
    assert cli.main([*edit, "--out=e.png", "--class=1"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all(
        line.endswith("is the name of class 0 ('1') and the id of class '10'; give name:1 or id:1")
        for line in err
    )
    assert not os.path.exists("g.png") and not os.path.exists("e.png")
    assert cli.main([*sample, "--out=g.png", "--classes=name:1,id:1,10,2"]) == 0
    arrays = np.load("x.npz")
    assert arrays["labels"].tolist() == [0, 1, 1, 2]
    pipe = hmar_jax.load(str(numbered))
    images, tokens = pipe.sample(3, ["name:1", "id:1", "10", 2], return_tokens=True)
    assert np.array_equal(tokens, arrays["tokens"])
    with pytest.raises(InputError, match="give name:1 or id:1"):
        pipe.sample(3, "1")
    results = {}
    for given in ("name:1", "id:0", "id:1", "10"):
        assert cli.main([*edit, "--out=e.png", f"--class={given}"]) == 0
        results[given] = np.asarray(Image.open("e.png")).tobytes()
    assert results["name:1"] == results["id:0"] != results["id:1"] == results["10"]
