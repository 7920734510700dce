"""The shipped configs, overriding single values, and what the package's modules import."""

import math
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from hmar_jax import config_files
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.autoencoders.vq_task import TokenizerTask
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.masked_task import MaskedTask
from hmar_jax.families.hmar.next_scale_task import NextScaleTask
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
HMAR, TOKENIZER = (str(ROOT / "configs" / name) for name in ("hmar.py", "tokenizer.py"))
NAMES = (
    "digits",
    "cifar10",
    "d16_256",
    "d20_256",
    "d24_256",
    "d30_256",
    "d24_512",
    "d36_512",
    "d16_1024",
)
IMAGENET = 1_281_167  # images to train


def transformer(config, scales=PUBLISHED_SIDES[256], num_classes=1000) -> TransformerConfig:
    return config_files.build(
        TransformerConfig, config.model, scales=scales, num_classes=num_classes
    )


def parameters(model: TransformerConfig) -> int:
    shapes = jax.eval_shape(NextScaleTransformer(model).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# The shipped configs


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name):
    for spec, pattern in ((name, "diagonal"), (f"{name},pattern=causal", "causal")):
        config = config_files.load_config(f"{HMAR}:{spec}")
        side = config.image_side if config.image_side in PUBLISHED_SIDES else 256
        model = transformer(config, PUBLISHED_SIDES[side])
        assert model.pattern == pattern and config.task == "next_scale"
        assert name in ("digits", "cifar10") or side == config.image_side == 16 * model.scales[-1]
        task = config_files.build(
            NextScaleTask,
            config.recipe,
            transformer=model,
            tokenizer=TokenizerConfig(scales=model.scales),
            steps=config.steps or config.epochs * IMAGENET // config.batch_size,
            batch_size=config.batch_size,
        )
        assert task.optimizer() and 0 < task.warmup_steps < task.steps


@pytest.mark.parametrize("name", NAMES)
def test_stage_2_of_transformers(name):
    stage1, config = (
        config_files.load_config(f"{HMAR}:{name}{more}") for more in ("", ",stage=masked")
    )
    assert (
        config.task == "masked"
        and config.init_from == ""
        and (config.batch_size, config.data) == (stage1.batch_size, stage1.data)
    )
    model = transformer(stage1)
    depth = config.model.masked_depth
    assert depth == (
        8 if name in PUBLISHED else max(1, model.depth // 2) if name in ("digits", "cifar10") else 8
    )
    task = config_files.build(
        MaskedTask,
        config.recipe,
        transformer=model,
        tokenizer=TokenizerConfig(scales=model.scales),
        masked_depth=depth,
        steps=config.steps or config.epochs * IMAGENET // config.batch_size,
        batch_size=config.batch_size,
    )
    assert task.optimizer() and 0 < task.warmup_steps < task.steps
    assert (task.loss_weights, task.mask_ratios, task.shared_mask) == (
        "unweighted",
        "uniform",
        False,
    )
    if name in PUBLISHED:
        assert config.epochs == 100
    total = parameters(model)
    stage2 = jax.eval_shape(
        task.model.init,
        jax.random.key(0),
        jax.eval_shape(NextScaleTransformer(model).init, jax.random.key(0)),
    )
    added = sum(math.prod(x.shape) for x in jax.tree.leaves(stage2))
    if name == "d16_256":
        assert (
            0.45 < added / total < 0.55
        )  # the paper's 465 M are half as much again as VAR's 310 M


@pytest.mark.parametrize("name", ["digits", "photos", "cifar10", "vae_256"])
def test_tokenizers(name):
    config = config_files.load_config(f"{TOKENIZER}:{name}")
    model = config_files.build(TokenizerConfig, config.model)
    task = config_files.build(
        TokenizerTask,
        config.recipe,
        tokenizer=model,
        steps=config.steps,
        batch_size=config.batch_size,
    )
    assert task.optimizer() and 0 < task.unquantized_steps < task.steps
    assert model.image_side == {"digits": 32, "photos": 64, "cifar10": 32, "vae_256": 256}[name]
    if name == "vae_256":
        assert model == TokenizerConfig(
            dtype="bfloat16"
        )  # whose defaults are the published architecture


@pytest.mark.parametrize(
    "name, digits, published",
    [("d16_256", 2, 0.31), ("d20_256", 2, 0.60), ("d24_256", 1, 1.0), ("d30_256", 1, 2.0)],
)
def test_parameter_counts_of_var(name, digits, published):
    """In thousand millions, rounded as VAR's README gives them."""
    count = parameters(transformer(config_files.load_config(f"{HMAR}:{name},pattern=causal")))
    assert round(count / 1e9, digits) == published, count


# depth: batch, epochs, base learning rate, initial gamma, last learning rate, weight decay, last one, guidance, top-k
PUBLISHED = {
    "d16_256": (768, 200, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.7, 1000),
    "d20_256": (768, 250, 1e-4, 1e-3, 0.1, 0.05, 0.05, 1.9, 950),
    "d24_256": (768, 350, 8e-5, 1e-4, 0.01, 0.05, 0.05, 2.1, 900),
    "d30_256": (1024, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08, 1.6, 650),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    batch, epochs, base_lr, gamma, end, decay, decay_end, guidance, top_k = PUBLISHED[name]
    c, depth = config_files.load_config(f"{HMAR}:{name}"), int(name[1:3])
    assert (c.batch_size, c.epochs, c.steps) == (batch, epochs, 0)
    assert (c.model.depth, c.model.width, c.model.heads, c.model.mlp_ratio) == (
        depth,
        64 * depth,
        depth,
        4.0,
    )
    assert math.isclose(c.model.drop_path, 0.1 * depth / 24)
    assert (c.model.init_adaln_gamma, c.model.init_adaln, c.model.init_head) == (gamma, 0.5, 0.02)
    r = c.recipe
    assert math.isclose(r.learning_rate, base_lr * batch / 256)
    assert r.warmup_steps == round(epochs / 50 * IMAGENET / batch)
    assert (r.schedule, r.start_ratio, r.end_ratio) == ("lin0", 0.005, end)
    assert (r.weight_decay, r.weight_decay_end, r.b1, r.b2, r.clip) == (
        decay,
        decay_end,
        0.9,
        0.95,
        2.0,
    )
    assert (r.loss_weights, r.class_dropout, r.label_smoothing) == ("lognorm", 0.1, 0.0)
    assert (c.sampling.guidance, c.sampling.top_k, c.sampling.top_p) == (guidance, top_k, 0.99)
    t = c.data.transform
    assert (t.kind, t.resize_ratio, t.flip) == ("resize_crop", 1.125, False)


def test_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load_config("configs/hmar.py:digits").task == "next_scale"
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(spec):\n  return ConfigDict({'task': spec})\n"
    )
    assert config_files.load_config("mine.py:x=1").task == "x=1"


@pytest.mark.parametrize(
    "argument, words",
    [
        ("configs/nope.py:digits", "config 'configs/nope.py': no such"),
        ("README.md:digits", "no such Python file"),
        ("x" * 300, "no such"),
        ("a\0b.py:digits", "no such"),
        ("configs/hmar.py:nope", "'nope': known are digits, cifar10, d16_256"),
        ("configs/tokenizer.py:nope", "'nope': known are digits, photos, cifar10, vae_256"),
        ("configs/hmar.py", "config name ''"),
        ("configs/hmar.py:digits,seed", "'seed' after the config name"),
        ("configs/hmar.py:digits,nope=1", "'nope': unknown; there are accumulate, batch_size, "),
        ("configs/hmar.py:digits,model.nope=1", "'model.nope': unknown; there are depth, "),
        ("configs/empty.py:digits", "has no get_config"),
    ],
)
def test_wrong_names(argument, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/empty.py").write_text("")
    with pytest.raises(InputError) as caught:
        config_files.load_config(argument)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Single values


@pytest.fixture
def config():
    return ConfigDict(
        dict(
            steps=5,
            rate=0.1,
            flag=False,
            name="a",
            sides=(1, 2),
            group=dict(steps=7, log=1),
            log_every=10,
            data=dict(threads=2, source="x"),
        )
    )


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("steps", "12", 12),
        ("steps", "-1", -1),
        ("rate", "3", 3.0),
        ("rate", "1e-3", 1e-3),
        ("flag", "true", True),
        ("flag", "False", False),
        ("name", "3", "3"),
        ("name", "a=b", "a=b"),
        ("name", "", ""),
        ("sides", "1,2,4", (1, 2, 4)),
        ("sides", "(3, 5)", (3, 5)),
        ("sides", "[7]", (7,)),
        ("sides", "7", (7,)),
        ("group.steps", "8", 8),
    ],
)
def test_overrides_keep_types(config, key, text, value):
    config_files.override(config, key, text)
    found = config
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("nope", "1", "'nope': unknown; there are data, flag, group"),
        ("group.nope", "1", "'group.nope': unknown; there are log, steps"),
        ("steps.nope", "1", "'steps.nope': unknown"),
        ("", "1", "unknown"),
        ("group", "1", "is a group; its keys are group.log, group.steps"),
        ("steps", "1.5", "type int"),
        ("steps", "abc", "type int"),
        ("steps", "", "type int"),
        ("steps", "True", "type int"),
        ("rate", "abc", "type float"),
        ("rate", "nan", "type float"),
        ("flag", "1", "type bool"),
        ("sides", "1,x", "type tuple"),
        ("sides", "1.5,2", "type tuple"),
        ("sides", "'a'", "type tuple"),
        ("steps", "__import__('os')", "type int"),
    ],
)
def test_wrong_overrides(config, key, text, words):
    before = config.to_json()
    with pytest.raises(InputError) as caught:
        config_files.override(config, key, text)
    assert words in str(caught.value) and config.to_json() == before


def test_a_group_with_unknown_keys(config):
    with pytest.raises(InputError, match="'log': unknown; there are .*learning_rate"):
        config_files.build(TokenizerTask, config.group)


def test_first_difference(config):
    other = config_files.to_dict(config)
    difference = lambda: config_files.first_difference(config_files.to_dict(config), other)
    assert difference() is None
    other["log_every"], other["data"]["threads"] = 99, 99
    assert difference() is None
    other["steps"] = 6
    assert difference() == "steps is 5 there and 6 here"
    other["group"]["steps"] = 9
    assert difference() == "group.steps is 7 there and 9 here"
    del other["flag"]
    assert difference() == "flag is False there and missing (another version) here"
