"""Checkpoints of torch.save with objects beside the weights: harmless ones are read, none runs."""

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import pickle
import types
import uuid
import zipfile

import numpy as np
import pytest

import hmar_jax
from hmar_jax.cli.main import main
from hmar_jax.errors import InputError
from tests.state_dicts import SIDES, tokenizer_state, transformer_state

torch = pytest.importorskip("torch", reason="reading .pth files needs torch")


@pytest.fixture
def save(tmp_path):
    """save(content, **options of torch.save) -> the path of a checkpoint."""

    def save(content, name="model.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return str(tmp_path / name)

    return save


@pytest.fixture
def vae(save):
    return save(tensors(tokenizer_state()), "vae.pth")


def tensors(state):
    return collections.OrderedDict((name, torch.tensor(x)) for name, x in state.items())


def read(path, vae, **options):
    return hmar_jax.from_torch(path, tokenizer=vae, scales=SIDES, **options)


def class_emb(pipe):
    return np.asarray(pipe.params["transformer"]["embed"]["class_emb"])


def message_of(path, vae) -> str:
    """The message of the InputError that from_torch raises: one line without escape codes."""
    with pytest.raises(InputError) as error:
        read(path, vae)
    message = str(error.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 400, message
    return message.removeprefix(f"{path}: ")


HARMLESS = {
    "namespace": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/tmp/out"), seeds=[1, 2]),
    "simple namespace": types.SimpleNamespace(a=1),
    "path": pathlib.Path("/data/imagenet"),
    "path of Windows": pathlib.PureWindowsPath("C:/data"),
    "datetime": datetime.datetime(2025, 1, 2, 3, tzinfo=datetime.UTC),
    "time zone": datetime.timezone(datetime.timedelta(hours=1)),
    "date": datetime.date(2025, 1, 2),
    "time": datetime.time(1, 2, 3),
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(7),
    "bool": np.bool_(True),
    "text": np.str_("d16"),
    "array": np.arange(6.0).reshape(2, 3),
    "array by columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=5),
    "counter": collections.Counter("aab"),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_harmless_objects_beside_the_weights(save, vae, name, zipped):
    state = transformer_state()
    content = {"args": HARMLESS[name], "model": tensors(state), "epoch": 3}
    path = save(content, _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(class_emb(read(path, vae)), state["class_emb.weight"])


def test_arrays_of_numpy_are_weights_too(save, vae):
    state = transformer_state()
    state["blocks.0.ffn.fc1.weight"] = np.asfortranarray(state["blocks.0.ffn.fc1.weight"])
    pipe = read(save(state), vae)
    np.testing.assert_array_equal(class_emb(pipe), state["class_emb.weight"])
    fc1 = np.asarray(pipe.params["transformer"]["blocks"]["block"]["fc1"]["kernel"])
    np.testing.assert_array_equal(fc1[0], state["blocks.0.ffn.fc1.weight"].T)


def test_parameters_that_require_gradients(save, vae):
    state = {name: torch.nn.Parameter(x) for name, x in tensors(transformer_state()).items()}
    assert class_emb(read(save(state), vae)).shape == (4, 8)


class Trainer:
    """A class of a training script."""


class Writer:
    """Unpickling it runs a command that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_no_code_of_a_file_runs(save, vae, tmp_path, capsys, zipped):
    trap = tmp_path / "written"
    content = {"model": tensors(transformer_state()), "z": Writer(trap)}
    path = save(content, _use_new_zipfile_serialization=zipped)
    assert message_of(path, vae).startswith("contains posix.system beside weights, and reading ")
    out = tmp_path / "out"
    command = ["convert", f"--torch={path}", f"--tokenizer={vae}", f"--out={out}", "--scales=1,2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said
    assert not trap.exists() and not out.exists()
    with open(tmp_path / "plain.pth", "wb") as file:  # a pickle that torch.save did not write
        pickle.dump(Writer(trap), file, protocol=2)
    assert message_of(str(tmp_path / "plain.pth"), vae)
    assert not trap.exists()


def test_other_classes_are_named(save, vae):
    weights = tensors(transformer_state())
    name = f"{Trainer.__module__}.Trainer"
    assert message_of(save({"model": weights, "trainer": Trainer()}), vae) == (
        f"contains {name} beside weights, and reading such objects could run code; where the file "
        'was written, save the weights alone: torch.save(model.state_dict(), "weights.pth")'
    )
    found = message_of(save({"model": weights, "trainer": [Trainer(), print]}), vae)
    assert found.startswith(f"contains builtins.print, {name} beside weights")
    assert "torch.nn.modules.linear.Linear" in message_of(save(torch.nn.Linear(2, 2)), vae)
    counts = collections.defaultdict(list, a=[1])
    assert "defaultdict" in message_of(save({"model": weights, "counts": counts}), vae)


def test_names_from_a_file_cannot_write_to_the_terminal(save, vae, tmp_path):
    found = message_of(save({"\x1b[31mred\n" * 99: torch.ones(2)}), vae)
    assert r"it has \x1b[31mred\n\x1b[31mred" in found
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02ca\x1b[31mb\n\x1b[2Jclear\n.")
        archive.writestr("x/version", b"3\n")
    assert message_of(str(tmp_path / "x.pth"), vae).startswith(
        "contains a\\x1b[31mb.\\x1b[2Jclear beside"
    )


def test_arrays_of_python_objects_are_refused(save, vae):
    objects = np.array([{"a": 1}, None], object)
    found = message_of(save({"model": tensors(transformer_state()), "x": objects}), vae)
    assert found == "numpy values beside weights must be numbers or text; got 'O8'"


def test_nested_models_of_a_trainer(save, vae):
    raw, averaged = transformer_state(seed=1), transformer_state(seed=2)
    content = {
        "epoch": 7,
        "trainer": {
            "optimizer": {"exp_avg": tensors(averaged), "param_groups": [{"lr": 1}]},
            "model": tensors({f"module._orig_mod.{n}": x for n, x in raw.items()}),
            "ema": {"module": tensors(averaged)},
        },
    }
    content["trainer"]["itself"] = content["trainer"]
    path = save(content)
    with pytest.warns(UserWarning, match="took the weights trainer.ema; it also has trainer.mod"):
        pipe = read(path, vae)
    np.testing.assert_array_equal(class_emb(pipe), averaged["class_emb.weight"])
    for name in ("model", "trainer.model"):
        pipe = read(path, vae, weights=name)
        np.testing.assert_array_equal(class_emb(pipe), raw["class_emb.weight"])
        assert "model.pth: trainer.model, sha256" in pipe.spec.origin
    with pytest.raises(InputError, match="must be one of trainer.model, trainer.ema; got 'traine"):
        read(path, vae, weights="trainer")


def test_a_checkpoint_of_lightning(save):
    state, tokenizer = transformer_state(), tokenizer_state()
    names = {**{f"net.{n}": x for n, x in state.items()}}
    names |= {f"vae.{n}": x for n, x in tokenizer.items()}
    content = {
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"args": argparse.Namespace(depth=2), "path": pathlib.Path("/x")},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}},
        "state_dict": tensors(names),
    }
    path = save(content, "last.ckpt")
    pipe = read(path, path)
    np.testing.assert_array_equal(class_emb(pipe), state["class_emb.weight"])
    assert "last.ckpt: state_dict.vae, sha256" in pipe.spec.origin
    assert "last.ckpt: state_dict.net, sha256" in pipe.spec.origin


def test_tensors_of_other_kinds(save, vae):
    state = tensors(transformer_state())
    eight = state | {"head.weight": state["head.weight"].to(torch.float8_e4m3fn)}
    assert "the weight 'head.weight' is float8_e4m3fn: weights of 4 or 8 bits" in message_of(
        save(eight), vae
    )
    sparse = state | {"head.weight": state["head.weight"].to_sparse()}
    assert "must be a dense floating-point tensor; it is sparse_coo" in message_of(
        save(sparse), vae
    )
    half = {name: x.half() for name, x in state.items()}
    np.testing.assert_array_equal(
        class_emb(read(save(half), vae)), half["class_emb.weight"].float().numpy()
    )


def test_versions_of_torch_that_could_run_code_are_refused(save, vae, monkeypatch):
    path = save(tensors(transformer_state()))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
    with pytest.raises(ImportError, match="needs PyTorch 2.6 or newer, got 2.5.1: pip install"):
        read(path, vae)
