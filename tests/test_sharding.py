"""Meshes, rules and batches; a step on 8 devices equals that on one.

The process with 8 devices runs on_a_mesh.py.
"""

import dataclasses
import json
import logging
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.transformer import (
    PARTITION_RULES,
    NextScaleTransformer,
    TransformerConfig,
)
from hmar_jax.parallel import sharding
from hmar_jax.training import step
from hmar_jax.training.metrics import Mean
from tests import tiny


def on_eight_devices(*cases: str) -> dict:
    command = [sys.executable, "-m", "tests.on_a_mesh", *cases]
    done = subprocess.run(
        command,
        env=tiny.ENVIRONMENT,
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    return json.loads(done.stdout)


def check(found: dict) -> None:
    for case, result in found.items():
        assert result["loss"] < 1e-5 and result["gradient"] < 1e-5, (case, result)
        assert result["largest"] > 1e-4, (case, result)
        assert not result["metrics"] and not result["evaluated"], (case, result)


@pytest.mark.slow
def test_a_step_on_a_mixed_mesh_equals_that_on_one_device():
    found = on_eight_devices("stage1:data=2,fsdp=2,tensor=2,remat=matmuls")
    check(found)
    assert 0.25 < next(iter(found.values()))["held"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("task", ["stage1", "stage2", "tokenizer"])
def test_a_step_on_every_mesh_equals_that_on_one_device(task):
    cases = [
        f"{task}:{mesh}"
        for mesh in (
            "data=8",
            "fsdp=8",
            "tensor=8",
            "data=2,fsdp=2,tensor=2",
            "data=4,fsdp=2,evaluate=1",
        )
    ]
    if task != "tokenizer":
        cases += [
            f"{task}:data=2,fsdp=2,tensor=2,grad_accum_steps=2,remat=blocks",
            f"{task}:fsdp=4,data=2,grad_accum_steps=2",
        ]
    found = on_eight_devices(*cases)
    check(found)
    assert found[f"{task}:data=8"]["held"] == 1
    assert found[f"{task}:fsdp=8"]["held"] < (0.2 if task != "tokenizer" else 0.5)


def test_every_large_parameter_is_divided():
    """In the published architecture, less than 2 % of the parameters are copied."""
    config = TransformerConfig(
        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, width=1024, heads=16
    )
    params = jax.eval_shape(NextScaleTransformer(config).init, jax.random.key(0))
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 4, "tensor": 4})
    copied = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding._name(path)
        if not any(sharding._spec(name, leaf.shape, PARTITION_RULES, mesh)):
            copied[name] = leaf.size
    assert sum(copied.values()) < 0.02 * sum(x.size for x in jax.tree.leaves(params)), copied


def test_the_first_rule_that_matches_applies():
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 3})
    rules = (
        (r"b/kernel$", ("fsdp", None)),
        (r"kernel$", (None, ("fsdp", "tensor"))),
        (r"bias$", ("tensor",)),
    )
    spec = lambda name, *shape: sharding._spec(name, shape, rules, mesh)
    assert spec("opt_state/0/mu/b/kernel", 4, 6) == P("fsdp", None)
    assert spec("opt_state/0/mu/c/kernel", 4, 6) == P(None, ("fsdp", "tensor"))
    assert spec("c/kernel", 4, 7) == P(None, None)  # not divisible: copied
    assert spec("c/bias", 9) == P("tensor") and spec("step") == P() and spec("kernels", 6) == P()
    with pytest.raises(ValueError, match="c/kernel"):
        spec("c/kernel", 4)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(data=3), "data=3 x fsdp=1 x tensor=1: the sizes must multiply to 1 devices"),
        (dict(data=-1, fsdp=2), "must multiply to 1 devices"),
        (dict(data=0), "1 or more"),
        (dict(data=-1, fsdp=-1), "one of them may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, words):
    with pytest.raises(InputError, match=words):
        sharding.make_mesh(**sizes)


def test_a_mesh_that_does_not_fit_on_the_command_line(tmp_path, capfd):
    assert cli.main(tiny.train_tokenizer(tmp_path / "run", mesh__data=3)) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "mesh data=3" in message and "to 1 devices" in message
    assert not (tmp_path / "run").exists()


def test_mesh_config():
    config = sharding.MeshConfig()
    assert dataclasses.asdict(config) == {"data": -1, "fsdp": 1, "tensor": 1}
    assert sharding.make_mesh(**dataclasses.asdict(config)).size == 1
    with pytest.raises(InputError, match=r"config.mesh.fsdp must be an integer .* got 1.5"):
        sharding.MeshConfig(fsdp=1.5)


def test_what_a_mesh_cannot_divide_is_logged_with_its_bytes(caplog):
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    tree = {
        "opt_state": ({"kernel": jax.ShapeDtypeStruct((6, 8), jnp.bfloat16)},),
        "kernel": jax.ShapeDtypeStruct((8, 3), jnp.float32),
        "divided": {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)},
        "no rule": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    with caplog.at_level(logging.INFO, logger="hmar_jax"):
        placed = sharding.with_shardings(tree, ((r"kernel$", ("fsdp", "tensor")),), mesh)
        specs = jax.tree.map(lambda x: x.sharding.spec, placed)
        assert specs["opt_state"][0]["kernel"] == P(None, "tensor")
        assert specs["kernel"] == P("fsdp", None)
        assert specs["divided"]["kernel"] == P("fsdp", "tensor") and specs["no rule"] == P()
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.getMessage().endswith(
            "2 arrays as their rules say, and copies them (0.0 MB): "
            "opt_state/0/kernel (96 bytes), kernel (96 bytes)"
        )
        sharding.with_shardings(tree, (), mesh)
        assert len(caplog.records) == 1


def test_a_batch_that_does_not_divide():
    devices = np.array([types.SimpleNamespace(process_index=i // 4) for i in range(8)])
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "tensor": 1}, devices=devices)
    sharding.check_batch(mesh, 32, grad_accum_steps=4)
    with pytest.raises(
        InputError, match=r"batch_size must be a multiple of 8 .* 8 devices .* of 2 hosts; got 12"
    ):
        sharding.check_batch(mesh, 12)
    with pytest.raises(
        InputError, match=r"multiple of 32 .*in 4 microbatches \(grad_accum_steps=4\)"
    ):
        sharding.check_batch(mesh, 48, grad_accum_steps=4)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    params = {"w": jnp.arange(3.0)}
    rows = {"x": jax.random.normal(jax.random.key(0), (12, 3)), "weight": jnp.arange(12.0)}

    def loss(params, rows, key):
        each = (rows["x"] @ params["w"] - 1) ** 2
        return each.mean(), {"loss": each.mean(), "weighted": Mean.of(each, rows["weight"])}

    whole, metrics = step.gradients(loss, params, rows, jax.random.key(1), 1)
    for parts in (2, 3, 12):
        grads, found = step.gradients(loss, params, rows, jax.random.key(1), parts)
        assert np.allclose(grads["w"], whole["w"], rtol=1e-6)
        assert np.isclose(found["loss"], metrics["loss"]) and np.allclose(
            found["weighted"], metrics["weighted"]
        )
