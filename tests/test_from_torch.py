"""Published weights to images: the tokens that the published sampler generated."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import hmar_jax
from hmar_jax.errors import InputError
from hmar_jax.families.base import image_keys
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.families.hmar.sampler import SamplerOptions, Trace, sample
from hmar_jax.families.hmar.schedules import masking_plan, resolve_schedule
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="reading .pth files needs torch")


def greedy(pipe, z, prefix):
    return pipe.sample(
        jax.random.key(0),
        z[f"{prefix}labels" if f"{prefix}labels" in z else "labels"].tolist(),
        guidance=float(z[f"{prefix}cfg" if f"{prefix}cfg" in z else "cfg"]),
        greedy=True,
        return_tokens=True,
    )


def test_stage_1_samples_the_recorded_tokens(torch, golden, load_golden):
    pipe = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
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
    trainer = {"vae_local": vae, "var_wo_ddp": wrapped, "opt": {"state": {}}}
    torch.save({"epoch": 3, "args": {"depth": 2}, "trainer": trainer}, path)
    pipe = hmar_jax.from_torch(str(path), tokenizer=str(path), scales=SIDES)
    z = load_golden("next_scale_shared_aln")
    _, tokens = greedy(pipe, z, "gen/")
    assert np.array_equal(tokens, z["gen/tokens_BL"])


def test_tokenizer_alone(torch, golden, load_golden):
    vae, z = str(golden / "vae.pth"), load_golden("tokenizer")
    assert message_of(tokenizer=vae) == (
        "a tokenizer's weights do not record its scale list: give the sides of its K=5 scales, "
        "such as scales=(1, 2, 3, 4, 6)"
    )
    assert message_of(tokenizer=vae, scales=(1, 2, 6)) == (
        "scales 1,2,6 have K=3 and L=41, but these weights have K=5 scales"
    )
    pipe = hmar_jax.from_torch(None, tokenizer=vae, scales=SIDES)
    images = np.moveaxis(z["images"], 1, -1).clip(-1, 1) / 2 + 0.5
    assert np.array_equal(pipe.encode(images), z["tokens_BL"])
    with pytest.raises(InputError, match="an autoencoder alone .* cannot sample"):
        pipe.sample(jax.random.key(0), 1)


def message_of(*args, **options) -> str:
    """The message of the InputError that from_torch raises."""
    with pytest.raises(InputError) as error:
        hmar_jax.from_torch(*args, **options)
    return str(error.value)


def test_invalid_files(torch, golden, tmp_path):
    vae, model = str(golden / "vae.pth"), str(golden / "next_scale.pth")
    assert message_of(model, tokenizer=vae) == (
        "these weights have K=5 scales and L=66 tokens, which is no published list: give scales, "
        "such as scales=(1, 2, 3, 4, 6)"
    )
    assert message_of(model, tokenizer=vae, scales=(1, 2, 3, 4, 5)) == (
        "scales 1,2,3,4,5 have K=5 and L=55, but these weights have K=5 scales and L=66 tokens"
    )
    weights = dict(tokenizer=vae, scales=SIDES)
    assert message_of(model, tokenizer=model, scales=SIDES) == (
        f"{model} must hold a tokenizer, such as vae.pth; it holds a transformer"
    )
    assert message_of(vae, **weights) == (
        f"{vae} must hold a transformer, such as hmar.pth; it holds a tokenizer"
    )
    assert message_of(model, scales=SIDES).startswith("the tokenizer's file is required: ")
    assert message_of(model, tokenizer=vae, scales=(0,)) == (
        "scales: each item must be an integer of at least 1; got 0"
    )
    assert message_of(model, **weights, depth=3).startswith("unknown option 'depth'; known: heads")
    missing = str(tmp_path / "none.pth")
    assert message_of(missing, tokenizer=vae) == f"{missing}: no such file"
    (tmp_path / "text.pth").write_text("hello")
    found = message_of(str(tmp_path / "text.pth"), **weights)
    assert found.startswith(f"{tmp_path / 'text.pth'}: not a file of PyTorch weights (")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    found = message_of(str(tmp_path / "other.pth"), **weights)
    assert found.startswith(f"{tmp_path / 'other.pth'}: contains no model of a known kind")


def test_convert_writes_a_model_directory(torch, golden, load_golden, tmp_path, capsys):
    from hmar_jax.cli.main import main

    out = tmp_path / "model"
    command = [
        "convert",
        f"--torch={golden / 'next_scale_shared_aln.pth'}",
        f"--tokenizer={golden / 'vae.pth'}",
        f"--out={out}",
    ]
    assert main(command) == 2
    assert "give scales" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--scales=1,2,3,4,6"]) == 0
    assert "licence" in capsys.readouterr().out
    assert "non-commercial" in (out / "README.md").read_text()
    _, tokens = greedy(hmar_jax.load(str(out)), load_golden("next_scale_shared_aln"), "gen/")
    assert np.array_equal(tokens, load_golden("next_scale_shared_aln")["gen/tokens_BL"])
    assert main(["info", f"--model={out}"]) == 0
    assert "depth 2, width 64, 2 heads, diagonal" in capsys.readouterr().out
    assert main([*command, "--scales=1,2,3,4,6"]) == 2  # nothing is overwritten
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_combined_model(torch, golden, load_golden, case):
    z = load_golden("hmar")
    pipe = hmar_jax.from_torch(
        str(golden / "hmar.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    assert pipe.spec.masked_depth == 2 and pipe.spec.transformer.depth == 4
    schedule = "none" if case == "a" else json.loads(str(z[f"schedule_{case}"]))
    _, tokens = pipe.sample(
        jax.random.key(0),
        z["labels"].tolist(),
        guidance=float(z["cfg"]),
        greedy=True,
        schedule=schedule,
        return_tokens=True,
    )
    assert np.array_equal(tokens, z[f"{case}/tokens_BL"])


def test_masked_passes_require_stage_2(torch, golden):
    pipe = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    with pytest.raises(InputError) as error:
        pipe.sample(jax.random.key(0), 1, schedule="default")
    assert str(error.value) == (
        "schedule 'default' has masked passes, which require stage 2; this model has none: "
        "use schedule=none"
    )
    with pytest.raises(InputError) as error:
        pipe.sample(jax.random.key(0), 1, schedule=[[1], [1, 2], [9], [16], [36]])
    assert str(error.value) == "schedule of scale 1 (2x2) must sum to its 4 tokens; got sum 3"


def test_stage_2_with_its_stage_1(torch, golden, load_golden):
    """Two files give the same model as the combined one."""
    weights = dict(tokenizer=str(golden / "vae.pth"), scales=SIDES)
    stage1, stage2 = str(golden / "next_scale.pth"), str(golden / "masked.pth")
    combined = str(golden / "hmar.pth")
    pipe = hmar_jax.from_torch(stage1, masked=stage2, **weights)
    expected = hmar_jax.from_torch(combined, **weights)
    assert pipe.spec.masked_depth == 2
    assert jax.tree.structure(pipe.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, pipe.params, expected.params)

    other = str(golden / "next_scale_shared_aln.pth")
    assert message_of(other, masked=stage2, **weights) == (
        "stage 2 does not fit stage 1: depth is 4 there and 2 here"
    )
    assert message_of(stage1, masked=stage1, **weights) == f"{stage1} must be a stage 2 by itself"
    assert message_of(combined, masked=stage2, **weights) == (
        f"{combined} must be a stage 1 with masked={stage2}"
    )
    assert message_of(masked=stage2, **weights) == (
        f"masked={stage2} requires the stage 1 it was trained on"
    )


def test_stage_2_of_another_stage_1(torch, golden, tmp_path):
    state = torch.load(golden / "next_scale.pth", weights_only=True)
    state["blocks.0.ffn.fc1.bias"] = state["blocks.0.ffn.fc1.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    message = message_of(
        str(tmp_path / "other.pth"),
        masked=str(golden / "masked.pth"),
        tokenizer=str(golden / "vae.pth"),
        scales=SIDES,
    )
    assert message == (
        "stage 2 was trained on another stage 1: its frozen parameters differ from this one's"
    )


@pytest.mark.slow
def test_stage_2_alone(torch, golden, load_golden, tmp_path, capsys):
    """It predicts as stage 2 of the combined model, and whole scales from masks alone."""
    from hmar_jax.cli.main import main

    out = tmp_path / "masked"
    command = [
        "convert",
        f"--torch={golden / 'masked.pth'}",
        f"--tokenizer={golden / 'vae.pth'}",
        "--scales=1,2,3,4,6",
    ]
    assert main([*command, f"--out={out}"]) == 0 and main(["info", f"--model={out}"]) == 0
    assert "HMAR, masked prediction alone" in capsys.readouterr().out
    alone = hmar_jax.load(str(out))
    whole = hmar_jax.from_torch(
        str(golden / "hmar.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    rng, z = np.random.default_rng(0), load_golden("tokenizer")
    ids, scale_inputs = np.array([1, 2]), z["ns_input"][:, 1:5]
    features = z["mask_input"][:, 1:5]
    for is_masked in (rng.random((2, 4)) < 0.5, np.ones((2, 4), bool)):
        predictions = []
        for pipe in (alone, whole):
            model = CombinedModel(pipe.spec)
            logits = jax.jit(model.masked_logits, static_argnames="k")
            predictions.append(logits(pipe.params, ids, scale_inputs, features, is_masked, k=1))
        assert relative(*predictions) < 1e-5
    # Its first pass sees masks only.
    logits = jax.jit(CombinedModel(alone.spec).next_scale_logits, static_argnames="k")
    first, _ = logits(alone.params, ids, scale_inputs, k=1)
    assert relative(first, predictions[1]) < 1e-5
    command = ["sample", f"--model={out}", "--classes=1", "--n=1", f"--out={tmp_path / 'x.png'}"]
    assert main(command) == 0


def test_combined_model_as_a_directory(torch, golden, load_golden, tmp_path, capsys):
    from hmar_jax.cli.main import main

    out, z = tmp_path / "hmar", load_golden("hmar")
    weights = [
        f"--torch={golden / 'hmar.pth'}",
        f"--tokenizer={golden / 'vae.pth'}",
        "--scales=1,2,3,4,6",
    ]
    assert main(["convert", *weights, f"--out={out}"]) == 0
    assert main(["info", f"--model={out}"]) == 0
    assert "next-scale and masked prediction" in capsys.readouterr().out
    npz = tmp_path / "x.npz"
    command = [
        "sample",
        f"--model={out}",
        "--classes=1,2",
        "--n=1",
        "--greedy",
        f"--guidance={float(z['cfg'])}",
        f"--schedule={json.dumps(json.loads(str(z['schedule_c'])))}",
        f"--npz={npz}",
        f"--out={tmp_path / 'x.png'}",
    ]
    assert main(command) == 0
    assert np.array_equal(np.load(npz)["tokens"], z["c/tokens_BL"])


def test_var_with_its_cache(torch, golden, load_golden):
    """Greedy VAR with cached keys and values: every pass's logits, tokens, features, image."""
    z = load_golden("var")
    stage1 = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    spec = dataclasses.replace(
        stage1.spec, transformer=dataclasses.replace(stage1.spec.transformer, pattern="causal")
    )
    plan = masking_plan(resolve_schedule(spec.autoencoder.scale_list, "none"))
    options = SamplerOptions.of(SamplingConfig(greedy=True, guidance=float(z["cfg"])))

    @jax.jit
    def run(params):
        trace = Trace()
        keys, ids = image_keys(jax.random.key(0), 2), jax.numpy.asarray(z["labels"])
        images, tokens = sample(CombinedModel(spec), params, keys, ids, options, plan, trace)
        return images, tokens, [p.logits for p in trace.passes], trace.f_hats

    images, tokens, logits, f_hats = run(stage1.params)
    assert np.array_equal(tokens, z["gen/tokens_BL"])
    for k in range(len(SIDES)):
        assert relative(logits[k], z[f"gen/pass{k:02}_logits"]) < 1e-4
        assert relative(f_hats[k], np.moveaxis(z[f"gen/fhat_scale{k}"], 1, -1)) < 1e-4
    assert relative(images, np.moveaxis(z["gen/image"], 1, -1)) < 1e-4
