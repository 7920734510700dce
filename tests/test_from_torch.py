"""Published weights to images: tokens as the published sampler drew them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import hmar_jax
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import sampler, schedules
from hmar_jax.families.hmar.combined import CombinedModel
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


def test_stage_1_draws_what_was_recorded(torch, golden, load_golden):
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
    torch.save(
        {
            "epoch": 3,
            "args": {"depth": 2},
            "trainer": {"vae_local": vae, "var_wo_ddp": wrapped, "opt": {"state": {}}},
        },
        path,
    )
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
    assert np.array_equal(
        pipe.encode(np.moveaxis(z["images"], 1, -1).clip(-1, 1) / 2 + 0.5), z["tokens_BL"]
    )
    with pytest.raises(InputError, match="tokenizer alone"):
        pipe.sample(jax.random.key(0), 1)


def test_wrong_files(torch, golden, tmp_path):
    vae, model = str(golden / "vae.pth"), str(golden / "next_scale.pth")
    with pytest.raises(
        InputError, match="K=5 scales and L=66 tokens, which is no published list: give scales"
    ):
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
    assert (
        "licence" in capsys.readouterr().out and "non-commercial" in (out / "README.md").read_text()
    )
    _, tokens = greedy(hmar_jax.load(str(out)), load_golden("next_scale_shared_aln"), "gen/")
    assert np.array_equal(tokens, load_golden("next_scale_shared_aln")["gen/tokens_BL"])
    assert main(["info", f"--model={out}"]) == 0
    assert "depth 2, width 64, 2 heads, diagonal" in capsys.readouterr().out
    assert main([*command, "--scales=1,2,3,4,6"]) == 2  # never overwritten
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


def test_masked_passes_need_stage_2(torch, golden):
    pipe = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    with pytest.raises(InputError, match="no stage 2"):
        pipe.sample(jax.random.key(0), 1, schedule="default")
    with pytest.raises(InputError, match=r"scale 1 \(2x2\) sums to 3"):
        pipe.sample(jax.random.key(0), 1, schedule=[[1], [1, 2], [9], [16], [36]])


def test_stage_2_beside_its_stage_1(torch, golden, load_golden):
    """The two files are the combined one."""
    weights = dict(tokenizer=str(golden / "vae.pth"), scales=SIDES)
    pipe = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), masked=str(golden / "masked.pth"), **weights
    )
    combined = hmar_jax.from_torch(str(golden / "hmar.pth"), **weights)
    assert pipe.spec.masked_depth == 2 and jax.tree.structure(pipe.params) == jax.tree.structure(
        combined.params
    )
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(combined.params))
    )
    # Its own stage 1 is asked for, and nothing else.
    for model, masked, words in (
        ("next_scale_shared_aln.pth", "masked.pth", "depth is 4 there and 2 here"),
        ("next_scale.pth", "next_scale.pth", "is no stage 2"),
        ("hmar.pth", "masked.pth", "holds a stage 2 already"),
    ):
        with pytest.raises(InputError, match=words):
            hmar_jax.from_torch(str(golden / model), masked=str(golden / masked), **weights)
    with pytest.raises(InputError, match="without a model"):
        hmar_jax.from_torch(masked=str(golden / "masked.pth"), **weights)


def test_stage_2_of_another_stage_1(torch, golden, tmp_path):
    state = torch.load(golden / "next_scale.pth", weights_only=True)
    state["blocks.0.ffn.fc1.bias"] = state["blocks.0.ffn.fc1.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match="another stage 1"):
        hmar_jax.from_torch(
            str(tmp_path / "other.pth"),
            masked=str(golden / "masked.pth"),
            tokenizer=str(golden / "vae.pth"),
            scales=SIDES,
        )


def test_stage_2_alone(torch, golden, load_golden, tmp_path, capsys):
    """It predicts what stage 2 of the combined model does, whole scales from masks too; and a model directory of it works."""
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
    ids, codes = np.array([1, 2]), z["ns_input"][:, 1:5]
    for masked in (rng.random((2, 4)) < 0.5, np.ones((2, 4), bool)):
        predictions = [
            jax.jit(
                lambda p: CombinedModel(pipe.spec).masked_logits(
                    p, 1, ids, codes, z["mask_input"][:, 1:5], masked
                )
            )(pipe.params)
            for pipe in (alone, whole)
        ]
        assert relative(*predictions) < 1e-5
    first = jax.jit(lambda p: CombinedModel(alone.spec).next_scale_logits(p, 1, ids, codes)[0])(
        alone.params
    )
    assert relative(first, predictions[1]) < 1e-5  # the first pass sees masks only
    assert (
        main(["sample", f"--model={out}", "--classes=1", "--n=1", f"--out={tmp_path / 'x.png'}"])
        == 0
    )


def test_combined_model_as_a_directory(torch, golden, load_golden, tmp_path, capsys):
    from hmar_jax.cli.main import main

    out, z = tmp_path / "hmar", load_golden("hmar")
    weights = [
        f"--torch={golden / 'hmar.pth'}",
        f"--tokenizer={golden / 'vae.pth'}",
        "--scales=1,2,3,4,6",
    ]
    assert (
        main(["convert", *weights, f"--out={out}"]) == 0 and main(["info", f"--model={out}"]) == 0
    )
    assert "next-scale and masked prediction" in capsys.readouterr().out
    npz = tmp_path / "x.npz"
    schedule = json.dumps(json.loads(str(z["schedule_c"])))
    assert (
        main(
            [
                "sample",
                f"--model={out}",
                "--classes=1,2",
                "--n=1",
                "--greedy",
                f"--guidance={float(z['cfg'])}",
                f"--schedule={schedule}",
                f"--npz={npz}",
                f"--out={tmp_path / 'x.png'}",
            ]
        )
        == 0
    )
    assert np.array_equal(np.load(npz)["tokens"], z["c/tokens_BL"])


def test_var_with_its_cache(torch, golden, load_golden):
    """Greedy generation with keys and values of earlier scales: logits of every pass, tokens, running sums, image."""
    z = load_golden("var")
    stage1 = hmar_jax.from_torch(
        str(golden / "next_scale.pth"), tokenizer=str(golden / "vae.pth"), scales=SIDES
    )
    spec = dataclasses.replace(
        stage1.spec, transformer=dataclasses.replace(stage1.spec.transformer, pattern="causal")
    )
    plan, draw = (
        schedules.plan(schedules.resolve(spec.tokenizer.scale_list, "none")),
        sampler.Draw(greedy=True),
    )

    @jax.jit
    def run(params):
        trace = sampler.Trace()
        images, tokens = sampler.sample(
            CombinedModel(spec),
            params,
            sampler.image_keys(jax.random.key(0), 2),
            jax.numpy.asarray(z["labels"]),
            draw,
            sampler.Strength(guidance=float(z["cfg"])),
            plan,
            trace,
        )
        return images, tokens, [p.logits for p in trace.passes], trace.f_hats

    images, tokens, logits, f_hats = run(stage1.params)
    assert np.array_equal(tokens, z["gen/tokens_BL"])
    for k in range(len(SIDES)):
        assert relative(logits[k], z[f"gen/pass{k:02}_logits"]) < 1e-4
        assert relative(f_hats[k], np.moveaxis(z[f"gen/fhat_scale{k}"], 1, -1)) < 1e-4
    assert relative(images, np.moveaxis(z["gen/image"], 1, -1)) < 1e-4
