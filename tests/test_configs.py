"""The shipped configs, their schemas, and overriding and comparing values."""

import math
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from hmar_jax import config_files, settings
from hmar_jax.autoencoders.base import AutoencoderSpec
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.experiment import task_kind
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from hmar_jax.training.trainable import IMAGENET, Parent

ROOT = pathlib.Path(__file__).resolve().parent.parent
HMAR, TOKENIZER = (str(ROOT / "configs" / name) for name in ("hmar.py", "tokenizer.py"))
NAMES = (
    "digits",
    "photos",
    "cifar10",
    "d16_256",
    "d20_256",
    "d24_256",
    "d30_256",
    "d24_512",
    "d36_512",
    "d16_1024",
)
SMALL = ("digits", "photos", "cifar10")


def setup_of(config, parent_config=None):
    """What a config trains, on a tokenizer with the published scales."""
    trainable, kind = task_kind(config)
    kind.schema.check(config)
    parent = None
    if kind.parent_key is not None:
        side = config.image_side if config.image_side in PUBLISHED_SIDES else 256
        config.image_side = 0  # the small ones have other tokenizers
        parent = Parent("", AutoencoderSpec(TokenizerConfig(scales=PUBLISHED_SIDES[side])))
        if parent_config is not None:
            parent = Parent("", setup_of(parent_config).spec)
    return trainable.make_task(config, parent, IMAGENET)


def transformer(config) -> TransformerConfig:
    return setup_of(config).spec.transformer


def num_parameters(model: TransformerConfig) -> int:
    shapes = jax.eval_shape(NextScaleTransformer(model).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# The shipped configs


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name):
    for spec, pattern in ((name, "diagonal"), (f"{name},pattern=causal", "causal")):
        config = config_files.load_config(f"{HMAR}:{spec}")
        side = config.image_side
        assert config.task == "next_scale" and config.family == "hmar"
        task = setup_of(config).task
        model = task.transformer
        assert model.pattern == pattern
        assert name in SMALL or side == 16 * model.scales[-1]
        assert task.optimizer.make(task.steps, task.decay_mask)
        assert 0 < task.optimizer.warmup_steps < task.steps


@pytest.mark.parametrize("name", NAMES)
def test_stage_2_of_transformers(name):
    stage1, config = (
        config_files.load_config(f"{HMAR}:{name}{more}") for more in ("", ",stage=masked")
    )
    assert (config.task, config.init_from, config.stage1_config) == ("masked", "", name)
    assert (config.batch_size, config.data) == (stage1.batch_size, stage1.data)
    small = name in SMALL
    assert config.model.masked_depth == (max(1, stage1.model.depth // 2) if small else 8)
    task = setup_of(config, stage1).task
    assert 0 < task.optimizer.warmup_steps < task.steps
    recipe = task.recipe
    assert (recipe.loss_weights, recipe.mask_ratios, recipe.shared_mask) == (
        "unweighted",
        "uniform",
        False,
    )
    if name in PUBLISHED:
        assert config.epochs == 100
    if name == "d16_256":
        model = task.transformer
        below = jax.eval_shape(NextScaleTransformer(model).init, jax.random.key(0))
        stage2 = jax.eval_shape(task.model.init, jax.random.key(0), below)
        added = sum(math.prod(x.shape) for x in jax.tree.leaves(stage2))
        # The paper's 465 M are half as much again as VAR's 310 M.
        assert 0.45 < added / num_parameters(model) < 0.55


@pytest.mark.parametrize("name", ["digits", "photos", "cifar10", "vae_256"])
def test_tokenizers(name):
    config = config_files.load_config(f"{TOKENIZER}:{name}")
    task = setup_of(config).task
    assert 0 < task.recipe.vq_start_step < task.steps
    side = {"digits": 32, "photos": 64, "cifar10": 32, "vae_256": 256}[name]
    assert task.tokenizer.image_side == side
    if name == "vae_256":  # the defaults are the published architecture
        assert task.tokenizer == TokenizerConfig(dtype="bfloat16")


@pytest.mark.parametrize(
    "name, digits, published",
    [("d16_256", 2, 0.31), ("d20_256", 2, 0.60), ("d24_256", 1, 1.0), ("d30_256", 1, 2.0)],
)
def test_parameter_counts_of_var(name, digits, published):
    """In billions, rounded as VAR's README gives them."""
    count = num_parameters(transformer(config_files.load_config(f"{HMAR}:{name},pattern=causal")))
    assert round(count / 1e9, digits) == published, count


# Batch, epochs, base learning rate, initial gamma, last learning rate, weight decay, last decay,
# guidance, top-k.
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
    assert r.warmup_steps == round(epochs / 50 * IMAGENET.num_images / batch)
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
    assert config_files.load_config("hmar:digits").task == "next_scale"  # by its name alone
    text = (
        "from ml_collections import ConfigDict\n"
        "def get_config(spec):\n  return ConfigDict({'task': spec})\n"
    )
    (tmp_path / "mine.py").write_text(text)
    assert config_files.load_config("mine.py:x=1").task == "x=1"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/hmar.py").write_text(text)
    assert config_files.load_config("other/hmar.py:x").task == "x"


@pytest.mark.parametrize(
    "argument, words",
    [
        ("configs/nope.py:digits", "config 'configs/nope.py': no such"),
        # Another folder must have the file: it is not looked for by its last name.
        ("elsewhere/hmar.py:digits", "config 'elsewhere/hmar.py': no such"),
        ("README.md:digits", "no such Python file"),
        ("x" * 300, "no such"),
        ("a\0b.py:digits", "no such"),
        (
            "configs/hmar.py:nope",
            "'nope' must be one of digits, photos, cifar10, finetune, d16_256",
        ),
        (
            "configs/tokenizer.py:nope",
            "'nope' must be one of digits, photos, cifar10, finetune, vae_256",
        ),
        ("configs/hmar.py", "config name ''"),
        ("configs/hmar.py:digits,seed", "'seed' after the config name"),
        ("configs/hmar.py:digits,nope=1", "unknown config key 'nope'; known: batch_size, "),
        (
            "configs/hmar.py:digits,model.nope=1",
            "unknown config key 'model.nope'; known: attention, depth, ",
        ),
        ("configs/empty.py:digits", "must define get_config"),
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
        ("nope", "1", "unknown config key 'nope'; known: data, flag, group"),
        ("group.nope", "1", "unknown config key 'group.nope'; known: log, steps"),
        ("steps.nope", "1", "unknown config key 'steps.nope'"),
        ("", "1", "unknown config key"),
        ("group", "1", "is a group; its keys: group.log, group.steps"),
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


def test_differing_keys(config):
    one, other = (dict(config_files.flatten(config_files.to_dict(config))) for _ in range(2))
    differing = lambda: config_files.differing_keys(one, other, ("log_every", "data.threads"))
    assert differing() == []
    other["log_every"], other["data.threads"] = 99, 99
    assert differing() == []
    other["group.steps"], other["steps"] = 9, 6
    assert differing() == ["group.steps", "steps"]
    del other["flag"]
    assert differing() == ["flag", "group.steps", "steps"]


# Schemas


def schema():
    return task_kind(config_files.load_config(f"{HMAR}:digits,stage=masked"))[1].schema


def test_an_older_config_gets_present_names_and_defaults():
    config = config_files.to_dict(config_files.load_config(f"{HMAR}:digits,stage=masked"))
    older = {**config, "sampling": {**config["sampling"]}, "accumulate": 2}
    del older["grad_accum_steps"], older["model"], older["sampling"]["temperature"]
    older["sampling"]["confidence_noise"] = older["sampling"].pop("choice_temperature")
    found = schema().upgrade(older)
    assert found["grad_accum_steps"] == 2 and "accumulate" not in found
    assert found["sampling"]["choice_temperature"] == 4.0
    assert found["sampling"]["temperature"] == 1.0 and found["model"]["masked_depth"] == 8


def test_former_names_are_accepted_with_a_warning():
    config = config_files.load_config(f"{HMAR}:digits,stage=masked")
    former = schema().former_names()
    with pytest.warns(FutureWarning, match="sampling.confidence_noise is deprecated"):
        config_files.override(config, "sampling.confidence_noise", "2", former)
    assert config.sampling.choice_temperature == 2.0


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("batch_size", 0, "config.batch_size must be an integer of at least 1; got 0"),
        ("ema_decay", 1.0, "config.ema_decay must be a number in \\[0, 1\\); got 1.0"),
        ("sampling.top_p", 2.0, "config.sampling.top_p must be a number in \\[0, 1\\]; got 2.0"),
        ("model.remat", "some", "config.model.remat must be one of none, matmuls, blocks"),
        ("data.transform.kind", "x", "config.data.transform.kind must be one of resize_crop"),
    ],
)
def test_values_out_of_range(key, value, words):
    config = config_files.load_config(f"{HMAR}:digits,stage=masked")
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(InputError, match=words):
        schema().check(config)


def test_unknown_and_missing_keys():
    config = config_files.load_config(f"{HMAR}:digits,stage=masked")
    with config.unlocked():
        config.model.nope = 1
    with pytest.raises(InputError, match="unknown config key 'model.nope'; known: attention, "):
        schema().check(config)
    with config.unlocked():
        del config.model.nope, config.recipe.clip
    with pytest.raises(InputError, match="config key recipe.clip is missing"):
        schema().check(config)


def test_what_may_differ_between_the_starts_of_a_run():
    harmless = schema().harmless()
    assert {"log_every", "data.threads", "mesh.fsdp", "grad_accum_steps", "model.remat"} <= harmless
    assert not {"seed", "batch_size", "model.dtype", "sampling.guidance"} & harmless


def test_every_setting_has_a_help_text():
    for name in ("digits", "digits,stage=masked"):
        found = task_kind(config_files.load_config(f"{HMAR}:{name}"))[1].schema
        for group in found.groups:
            for key, (_, field) in found.fields(group).items():
                assert settings.declaration(field).help.endswith("."), (group, key)
