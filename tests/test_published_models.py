"""Converted published models: sampling options, class names, files known by their checksums."""

import json

import numpy as np
import pytest

import hmar_jax
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.cli.main import main
from hmar_jax.data import imagenet
from hmar_jax.families.hmar import published
from hmar_jax.families.hmar.transformer import TransformerConfig
from tests.state_dicts import SIDES, tokenizer_state, transformer_state

safetensors = pytest.importorskip("safetensors.numpy")


def transformer(depth, side=256, **changes):
    given = dict(scales=PUBLISHED_SIDES[side], depth=depth, width=64 * depth, heads=depth)
    return TransformerConfig(**(given | changes))


def sampling(*args, **changes):
    config = transformer(*args, **changes)
    found = published.published_sampling(TokenizerConfig(scales=config.scales), config)
    return found and (found.guidance, found.top_k, found.top_p)


def test_published_sampling_options():
    assert sampling(16) == (1.7, 1000, 0.99) and sampling(30) == (1.6, 650, 0.99)
    assert sampling(16, pattern="causal") == (1.5, 900, 0.96)
    assert sampling(36, 512, pattern="causal", shared_adaln=True) == (1.5, 900, 0.96)
    others = [sampling(12), sampling(16, num_classes=10), sampling(16, width=512)]
    others += [sampling(24, 512), sampling(36, pattern="causal"), sampling(16, vocab_size=512)]
    assert others == [None] * len(others)


def test_a_published_model_is_sampled_as_published(tmp_path, monkeypatch, capsys):
    """The conversion of a d16 in all but its size: the architecture's widths are made small."""
    monkeypatch.setattr(published, "_HEAD_SIZE", 4)
    monkeypatch.setattr(published, "_HMAR_SAMPLING", {2: (1.7, 12, 0.99)})
    monkeypatch.setattr(published, "PUBLISHED_SIDES", {256: SIDES})
    small = lambda scales: TokenizerConfig(scales=scales, vocab_size=16, z_channels=4)
    monkeypatch.setattr(published, "TokenizerConfig", small)
    vae, model = str(tmp_path / "vae.safetensors"), str(tmp_path / "hmar.safetensors")
    safetensors.save_file(tokenizer_state(), vae)
    safetensors.save_file(transformer_state(classes=1000), model)
    out = tmp_path / "model"
    command = ["convert", f"--torch={model}", f"--tokenizer={vae}", f"--out={out}", "--scales=1,2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "guidance 1.7" in said and "top k 12" in said and "1000: tench, goldfish" in said
    config = json.loads((out / "config.json").read_text())
    assert config["sampling"] | {"temperature": 1.0} == {
        "guidance": 1.7,
        "top_k": 12,
        "top_p": 0.99,
        "temperature": 1.0,
    }
    assert config["class_names"][207] == "golden retriever"
    pipe = hmar_jax.load(str(out))
    assert pipe.spec.sampling.guidance == 1.7
    assert pipe.resolve_class("golden_retriever") == 207 and pipe.resolve_class("980") == 980


def test_models_of_other_classes_have_no_names(tmp_path):
    vae, model = str(tmp_path / "vae.safetensors"), str(tmp_path / "hmar.safetensors")
    safetensors.save_file(tokenizer_state(), vae)
    safetensors.save_file(transformer_state(), model)
    spec = hmar_jax.from_torch(model, tokenizer=vae, scales=SIDES).spec
    assert spec.class_names == () and spec.sampling.guidance == 0


def test_names_of_imagenet():
    names = imagenet.class_names()
    assert len(names) == imagenet.NUM_CLASSES == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 980: "volcano"}
    assert all(names[i] == name for i, name in known.items()) and names[999] == "toilet tissue"
    plain = {name.casefold().replace(" ", "_").replace("-", "_") for name in names}
    assert len(plain) == 1000 and not any("," in name for name in names)


def test_files_are_known_by_their_checksum(tmp_path, monkeypatch):
    vae, model = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    safetensors.save_file(tokenizer_state(), vae)
    safetensors.save_file(transformer_state(causal=True), model)
    convert = lambda: hmar_jax.from_torch(model, tokenizer=vae, scales=SIDES).spec
    digests = [published.sha256(path) for path in (vae, model)]
    spec = convert()
    assert spec.origin == (
        f"converted from a.safetensors and b.safetensors (a.safetensors: sha256 "
        f"{digests[0][:12]}; b.safetensors: sha256 {digests[1][:12]})"
    )
    assert "non-commercial" in spec.licence
    known = {d: published.PublishedFile(f"file {i}", "MIT") for i, d in enumerate(digests)}
    monkeypatch.setattr(published, "_FILES", known)
    spec = convert()
    assert spec.licence == "MIT"
    assert f"b.safetensors: file 1, sha256 {digests[1][:12]}" in spec.origin
    assert np.all([len(d) == 64 and int(d, 16) for d in published._FILES])
