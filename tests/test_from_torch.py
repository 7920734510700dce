"""Published weights to pictures: tokens as the published sampler drew them."""

import json

import jax
import numpy as np
import pytest

import hmar_jax
from hmar_jax.errors import InputError
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="reading .pth files needs torch")


def greedy(pipe, z, prefix):
    return pipe.sample(
        jax.random.key(0), z[f"{prefix}labels" if f"{prefix}labels" in z else "labels"].tolist(),
        guidance=float(z[f"{prefix}cfg" if f"{prefix}cfg" in z else "cfg"]), greedy=True, return_tokens=True)


def test_stage_1_draws_what_was_recorded(torch, golden, load_golden):
    pipe = hmar_jax.from_torch(str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES)
    z = load_golden("hmar")
    images, tokens = greedy(pipe, z, "")
    assert np.array_equal(tokens, z["a/tokens_BL"])
    assert relative(images, np.moveaxis(z["a/image"], 1, -1)) < 1e-4
    assert np.array_equal(pipe.decode(tokens), images)


def test_shared_adaln_nested_in_a_trainers_checkpoint(torch, golden, load_golden, tmp_path):
    state = torch.load(golden / "next_scale_shared_aln.pth", weights_only=True)
    vae = torch.load(golden / "vae.pth", weights_only=True)
    path = tmp_path / "checkpoint.pth"
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save({"epoch": 3, "args": {"depth": 2}, "trainer": {"vae_local": vae, "var_wo_ddp": wrapped, "opt": {"state": {}}}}, path)
    pipe = hmar_jax.from_torch(str(path), tokenizer=str(path), scales=SIDES)
    z = load_golden("next_scale_shared_aln")
    _, tokens = greedy(pipe, z, "gen/")
    assert np.array_equal(tokens, z["gen/tokens_BL"])


def test_tokenizer_alone(torch, golden, load_golden):
    vae, z = str(golden / "vae.pth"), load_golden("tokenizer")
    with pytest.raises(InputError, match="K=5 scales"):
        hmar_jax.from_torch(None, tokenizer=vae)
    with pytest.raises(InputError, match="K=3"):
        hmar_jax.from_torch(None, tokenizer=vae, scales=(1, 2, 6))
    pipe = hmar_jax.from_torch(None, tokenizer=vae, scales=SIDES)
    assert np.array_equal(pipe.encode(np.moveaxis(z["images"], 1, -1).clip(-1, 1) / 2 + 0.5), z["tokens_BL"])
    with pytest.raises(InputError, match="tokenizer alone"):
        pipe.sample(jax.random.key(0), 1)


def test_wrong_files(torch, golden, tmp_path):
    vae, model = str(golden / "vae.pth"), str(golden / "next_scale.pth")
    with pytest.raises(InputError, match="K=5 scales and L=66 tokens, which is no published list: give scales"):
        hmar_jax.from_torch(model, tokenizer=vae)
    with pytest.raises(InputError, match="L=55, but these weights have K=5 scales and L=66"):
        hmar_jax.from_torch(model, tokenizer=vae, scales=(1, 2, 3, 4, 5))
    with pytest.raises(InputError, match="no tokenizer"):
        hmar_jax.from_torch(model, tokenizer=model, scales=SIDES)
    with pytest.raises(InputError, match="no transformer"):
        hmar_jax.from_torch(vae, tokenizer=vae, scales=SIDES)
    with pytest.raises(InputError, match="no such file"):
        hmar_jax.from_torch(str(tmp_path / "none.pth"), tokenizer=vae)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a file of PyTorch weights"):
        hmar_jax.from_torch(str(tmp_path / "text.pth"), tokenizer=vae, scales=SIDES)
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="no model of this family"):
        hmar_jax.from_torch(str(tmp_path / "other.pth"), tokenizer=vae, scales=SIDES)


def test_convert_makes_a_model_directory(torch, golden, load_golden, tmp_path, capsys):
    from hmar_jax.cli import main

    out = tmp_path / "model"
    command = ["convert", f"--torch={golden / 'next_scale_shared_aln.pth'}", f"--tokenizer={golden / 'vae.pth'}", f"--out={out}"]
    assert main(command) == 2
    assert "give scales" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--scales=1,2,3,4,6"]) == 0
    assert "licence" in capsys.readouterr().out and "non-commercial" in (out / "README.md").read_text()
    _, tokens = greedy(hmar_jax.load(str(out)), load_golden("next_scale_shared_aln"), "gen/")
    assert np.array_equal(tokens, load_golden("next_scale_shared_aln")["gen/tokens_BL"])
    assert main(["info", f"--model={out}"]) == 0
    assert "depth 2, width 64, 2 heads, diagonal" in capsys.readouterr().out
    assert main([*command, "--scales=1,2,3,4,6"]) == 2  # never overwritten
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_combined_model(torch, golden, load_golden, case):
    z = load_golden("hmar")
    pipe = hmar_jax.from_torch(str(golden / "hmar.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES)
    assert pipe.spec.masked_depth == 2 and pipe.spec.transformer.depth == 4
    schedule = "none" if case == "a" else json.loads(str(z[f"schedule_{case}"]))
    _, tokens = pipe.sample(
        jax.random.key(0), z["labels"].tolist(), guidance=float(z["cfg"]), greedy=True, schedule=schedule, return_tokens=True)
    assert np.array_equal(tokens, z[f"{case}/tokens_BL"])


def test_masked_passes_need_stage_2(torch, golden):
    pipe = hmar_jax.from_torch(str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES)
    with pytest.raises(InputError, match="no stage 2"):
        pipe.sample(jax.random.key(0), 1, schedule="default")
    with pytest.raises(InputError, match=r"scale 1 \(2x2\) sums to 3"):
        pipe.sample(jax.random.key(0), 1, schedule=[[1], [1, 2], [9], [16], [36]])
