"""Files of weights without torch: safetensors, which model of a file is taken, and other files."""

import gzip
import io
import json
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import hmar_jax
from hmar_jax.cli.main import main
from hmar_jax.errors import InputError
from tests.state_dicts import SIDES, tokenizer_state, transformer_state


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As on a machine without torch: importing it fails."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def vae(tmp_path):
    return write(tmp_path / "vae.safetensors", tokenizer_state())


def write(path, state, **changes):
    save_file({**state, **changes}, path)
    return str(path)


def class_emb(pipe):
    return np.asarray(pipe.params["transformer"]["embed"]["class_emb"])


def read(path, vae, **options):
    return hmar_jax.from_torch(str(path), tokenizer=vae, scales=SIDES, **options)


def message_of(path, vae, **options) -> str:
    """The message of the InputError that from_torch raises: one line that names the file."""
    with pytest.raises(InputError) as error:
        read(path, vae, **options)
    message = str(error.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 400, message
    return message.replace(str(path), "FILE")


# safetensors


def test_safetensors_need_no_torch(tmp_path, vae):
    state = transformer_state()
    path = write(tmp_path / "model.safetensors", state)
    pipe = read(path, vae)
    np.testing.assert_array_equal(class_emb(pipe), state["class_emb.weight"])
    codebook = pipe.params["tokenizer"]["quantizer"]["codebook"]
    np.testing.assert_array_equal(codebook, tokenizer_state()["quantize.embedding.weight"])
    out = tmp_path / "model"
    command = ["convert", f"--torch={path}", f"--tokenizer={vae}", f"--out={out}"]
    assert main([*command, "--scales=1,2"]) == 0
    assert class_emb(hmar_jax.load(str(out))).shape == (4, 8)


def test_pth_files_need_torch(tmp_path, vae, capsys):
    path = tmp_path / "model.pth"
    path.write_bytes(archive(model__data_x_pkl="x"))
    with pytest.raises(ImportError, match=r"model.pth needs PyTorch: pip install"):
        read(path, vae)
    command = ["convert", f"--torch={path}", f"--tokenizer={vae}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 2
    assert "needs PyTorch: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_of_other_sizes_become_float32(tmp_path, vae, dtype):
    state = {name: x.astype(dtype) for name, x in transformer_state().items()}
    found = class_emb(read(write(tmp_path / "model.safetensors", state), vae))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, state["class_emb.weight"].astype(np.float32))


def test_types_without_a_value_of_their_own_are_refused(tmp_path, vae):
    state = transformer_state()
    bits = state["head.weight"].astype(np.int8)
    path = write(tmp_path / "int8.safetensors", state, **{"head.weight": bits})
    assert message_of(path, vae).startswith(
        "the weight 'head.weight' must be of floating-point numbers; it is int8: quantized"
    )
    header = json.dumps({"pos_1LC": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}})
    path = tmp_path / "fp8.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    assert message_of(path, vae).startswith("the weight 'pos_1LC' is F8_E4M3: weights of 4 or 8")


def test_values_that_are_not_finite_are_said(tmp_path, vae):
    state = transformer_state(causal=True)  # whose mask has infinite values
    assert class_emb(read(write(tmp_path / "fine.safetensors", state), vae)).shape == (4, 8)
    state["blocks.1.ffn.fc2.weight"][0, :2] = np.nan, np.inf
    assert message_of(write(tmp_path / "nan.safetensors", state), vae).startswith(
        "the weight 'blocks.1.ffn.fc2.weight' has 2 of 256 values that are not finite"
    )


def test_a_model_in_parts(tmp_path, vae):
    state = transformer_state()
    names = sorted(state)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, own in parts.items():
        write(tmp_path / file, {name: state[name] for name in own})
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, own in parts.items() for name in own}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    np.testing.assert_array_equal(class_emb(read(index, vae)), state["class_emb.weight"])
    assert message_of(tmp_path, vae).endswith(
        "must be a .pth file; got a directory; name a file in it: FILE/model.safetensors.index.json"
    )
    (tmp_path / "b.safetensors").unlink()
    assert message_of(index, vae).startswith("FILE: 1 of its 2 parts are missing, such as ")
    index.write_text(json.dumps({"weight_map": {"pos_1LC": "../a.safetensors"}}))
    assert message_of(index, vae).startswith("FILE: its parts must be files beside it; got '../")


def test_weights_that_do_not_fit_together(tmp_path, vae):
    state = transformer_state()
    wrong = {"blocks.0.ffn.fc1.bias": np.zeros(5, np.float32)}
    path = write(tmp_path / "bias.safetensors", {**state, **wrong}, **wrong)
    assert "FILE: the shapes of its weights do not fit together" in message_of(path, vae)
    path = write(tmp_path / "head.safetensors", state, **{"head.bias": np.zeros(5, np.float32)})
    assert message_of(path, vae) == (
        "the weights do not fit the model that they seem to be: transformer.head.bias must have "
        "shape (16,); got shape (5,)"
    )


# Which model of a file


PREFIXES = [
    ("module.", ""),
    ("_orig_mod.module.", ""),
    ("module._orig_mod.", ""),
    ("model.", "model"),
    ("model._orig_mod.", "model"),
    ("_orig_mod.model.module.", "model"),
    ("net.model.module._orig_mod.", "net.model"),
]


@pytest.mark.parametrize("prefix, place", PREFIXES)
def test_prefixes_in_any_order_and_depth(tmp_path, vae, prefix, place):
    state = transformer_state()
    path = write(tmp_path / "m.safetensors", {prefix + name: x for name, x in state.items()})
    pipe = read(path, vae)
    np.testing.assert_array_equal(class_emb(pipe), state["class_emb.weight"])
    assert f"m.safetensors: {place}{', ' * bool(place)}sha256 " in pipe.spec.origin


def test_wrappers_inside_names(tmp_path, vae):
    """torch.compile of single blocks, FSDP and activation checkpointing."""
    inner = {"blocks.0.": "blocks.0._orig_mod.", "blocks.1.": "blocks.1._fsdp_wrapped_module."}
    state = transformer_state()
    renamed = {}
    for name, value in state.items():
        for old, new in inner.items():
            name = name.replace(old, new)
        renamed[f"module.{name.replace('pos_1LC', '_checkpoint_wrapped_module.pos_1LC')}"] = value
    pipe = read(write(tmp_path / "m.safetensors", renamed), vae)
    np.testing.assert_array_equal(
        np.asarray(pipe.params["transformer"]["blocks"]["block"]["fc1"]["bias"])[1],
        state["blocks.1.ffn.fc1.bias"],
    )


def several(tmp_path):
    """A file with the tokenizer, the raw weights and their average, under prefixes."""
    raw, averaged = transformer_state(seed=1), transformer_state(seed=2)
    named = {"model": raw, "ema": averaged, "vae": tokenizer_state()}
    flat = {f"{key}.{name}": x for key, state in named.items() for name, x in state.items()}
    return write(tmp_path / "several.safetensors", flat), raw, averaged


def test_which_of_several_models_is_taken(tmp_path):
    path, raw, averaged = several(tmp_path)
    with pytest.warns(UserWarning, match="took the weights ema; it also has model, which the "):
        pipe = read(path, path)
    np.testing.assert_array_equal(class_emb(pipe), averaged["class_emb.weight"])
    assert "several.safetensors: ema, sha256" in pipe.spec.origin
    for name, state in (("model", raw), ("ema", averaged)):
        pipe = read(path, path, weights=name)
        np.testing.assert_array_equal(class_emb(pipe), state["class_emb.weight"])
        assert f"several.safetensors: {name}, sha256" in pipe.spec.origin
    assert message_of(path, path, weights="emma") == (
        "FILE: weights must be one of ema, model; got 'emma'"
    )
    plain = write(tmp_path / "plain.safetensors", raw)
    assert message_of(plain, path, weights="ema") == (
        "FILE: weights must be left out: the file has one model; got 'ema'"
    )


def test_the_command_line_says_and_chooses_the_weights(tmp_path, capsys):
    path, raw, _ = several(tmp_path)
    command = ["convert", f"--torch={path}", f"--tokenizer={path}", "--scales=1,2"]
    assert main([*command, f"--out={tmp_path / 'a'}"]) == 0
    printed = capsys.readouterr()
    assert "took the weights ema; it also has model" in printed.err
    assert "several.safetensors: ema, sha256" in printed.out
    assert main([*command, "--weights=model", f"--out={tmp_path / 'b'}"]) == 0
    assert "took" not in capsys.readouterr().err
    found = class_emb(hmar_jax.load(str(tmp_path / "b")))
    np.testing.assert_array_equal(found, raw["class_emb.weight"])
    assert main([*command, "--weights=x", f"--out={tmp_path / 'c'}"]) == 2
    assert "weights must be one of ema, model; got 'x'" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# Files that are no weights


def tar(content: bytes) -> bytes:
    return content + bytes(257 - len(content)) + b"ustar\x0000" + bytes(700)


def archive(**files: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, text in files.items():
            z.writestr(name.replace("__", "/").replace("_x_", "."), text)
    return file.getvalue()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb\nsize 1240000\n"
)
OTHER_FILES = [
    ("model.pth", POINTER, "is a Git LFS pointer of a file of 1,240,000 bytes, not the weights"),
    ("model.pth", b"\n<!DOCTYPE html><html>Sign in", "is a web page, not weights; download from"),
    ("model.pth", b"<html><body>404</body></html>", "is a web page, not weights"),
    ("model.pth", b'{"error":"Repo is gated"}', "is a JSON text, not weights: 'Repo is gated'"),
    ("model.pth", b'["a"]', "is a JSON text, not weights; give a .pth"),
    ("model.pth", b"{broken", "not a file of PyTorch weights (it is text)"),
    ("model.pth", b"Access denied\n", "not a file of PyTorch weights (it is text)"),
    ("model.pth", bytes(range(1, 200)), "not a file of PyTorch weights (it begins as none"),
    ("model.pth", b"", "is empty; download it again"),
    ("model.pth", archive(model__data_x_pkl="x" * 99)[:-40], "is cut short or damaged ("),
    ("model.pth", archive(a__data_x_pkl="x", a__constants_x_pkl="x"), "is a TorchScript program"),
    ("model.npz", archive(a_x_npy="x", b_x_npy="x"), "is a NumPy archive (.npz); give a .pth"),
    ("model.keras", archive(model_x_weights_x_h5="x"), "is a Keras model; give a .pth"),
    ("model.zip", archive(var_x_pth="x"), "is a zip archive, not weights; unpack it first"),
    ("model.npy", b"\x93NUMPY\x01\x00", "is a NumPy file; give a .pth"),
    ("model.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras or TensorFlow); give a .pth"),
    ("m.data-00000-of-00001", b"\x01\x02\xff" * 9, "is a TensorFlow checkpoint; give a .pth"),
    ("model.pth.gz", gzip.compress(b"x", mtime=0), "is compressed (gzip); unpack it first"),
    ("model.pth.xz", b"\xfd7zXZ\x00\x00", "is compressed (xz); unpack it first"),
    ("model.tar", tar(b"model.pth"), "is a tar archive; unpack it first"),
    ("m.safetensors", struct.pack("<Q", 999) + b'{"a":', "is cut short (13 bytes); download"),
]


@pytest.mark.parametrize("name, content, said", OTHER_FILES)
def test_files_that_are_no_weights(tmp_path, vae, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert message_of(tmp_path / name, vae).startswith(f"FILE: {said}")
    with pytest.raises(InputError) as error:  # the tokenizer's file likewise
        hmar_jax.from_torch(None, tokenizer=str(tmp_path / name), scales=SIDES)
    assert str(error.value).startswith(f"{tmp_path / name}: {said}")


def test_safetensors_cut_short(tmp_path, vae):
    path = tmp_path / "model.safetensors"
    write(path, transformer_state())
    path.write_bytes(path.read_bytes()[:-5])
    assert message_of(path, vae).startswith("FILE: is damaged or cut short (")


def test_directories(tmp_path, vae):
    def said(*names):
        folder = tmp_path / "-".join(names).replace("/", "_")
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        return message_of(folder, vae).removeprefix("FILE: must be a .pth file; got a directory")

    assert said("notes.txt") == ""
    assert said("a.pth", "b.txt") == "; name a file in it: FILE/a.pth"
    assert said("saved_model.pb").startswith(" of TensorFlow (saved_model.pb)")
    assert said(".metadata", "0.distcp").startswith(" of torch.distributed.checkpoint; join it")
    assert said("config.json", "params").startswith(", a model directory of this program")
