"""Planning: topologies, counting operations, reading compiled programs, and `hmar plan`."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hmar_jax import config_files
from hmar_jax.autoencoders.base import AutoencoderSpec
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.experiment import task_kind, task_shapes
from hmar_jax.families.hmar import flops
from hmar_jax.parallel import sharding
from hmar_jax.parallel.chips import CHIPS
from hmar_jax.planning import advice, hlo, jaxpr, plan, report, topology
from hmar_jax.planning.memory import MemoryPlan
from hmar_jax.planning.topology import PLANNED_CHIPS
from hmar_jax.training import step
from hmar_jax.training.trainable import IMAGENET, Parent

HMAR = "configs/hmar.py"
TINY = (
    "--config=configs/hmar.py:digits",
    "--config.model.depth=2",
    "--config.model.width=64",
    "--config.model.heads=1",
    "--config.batch_size=4",
)


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    plan.prepare_environment()
    # Set for quick tests of values on CPUs; these tests read the optimized program.
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


# Topologies


def test_topologies_by_name():
    assert topology.parse("v5p:4x4x4").num_devices == 64
    assert topology.parse("V5E:8x8").sides == (8, 8)
    assert topology.parse("tpu7x:2x2x1").num_devices == 8  # two devices a chip
    one, many = topology.parse("h100:8"), topology.parse("h100:4x8")
    assert (one.num_devices, many.num_devices) == (8, 32)
    assert one.bandwidth(8) == many.bandwidth(8) == one.chip.link_bandwidth
    assert one.bandwidth(8) > many.bandwidth(16) == many.chip.network_bandwidth


def test_only_chips_of_known_memory_are_planned_for():
    assert set(PLANNED_CHIPS) < set(CHIPS) and "l4" not in PLANNED_CHIPS
    assert all(chip.memory and chip.memory_bandwidth for chip in PLANNED_CHIPS.values())
    with pytest.raises(InputError, match="topology 'l4:1': unknown chip"):
        topology.parse("l4:1")


@pytest.mark.parametrize(
    "text, words",
    [
        ("v9:4x4", ["unknown chip", *(f"{name}:" for name in PLANNED_CHIPS)]),
        ("v5p:4x4", ["unknown shape", "2x2x1 2x2x2", "4x4x4", "16x16x24"]),
        ("v5e:3x3", ["1x1 2x2 2x4 4x4"]),
        ("h100:9", ["1 to 8"]),
        ("h100:4x4x4", ["1 to 8"]),
        ("h100", ["1 to 8"]),
        ("", list(PLANNED_CHIPS)),
        ("v5e:8 x8", ["8x8"]),
    ],
)
def test_unknown_topologies_list_those_that_exist(text, words):
    with pytest.raises(InputError) as error:
        topology.parse(text)
    message = str(error.value)
    assert repr(text) in message and "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize(
    "chip, shape, names",
    [
        ("v4", "2x2x4", ["v4:16", "v4-32", "tpu-v4-podslice:2x2x4"]),
        ("v5e", "2x4", ["v5e:8", "v5litepod-8", "v5e-8", "tpu-v5-lite-podslice:2x4"]),
        ("v5p", "4x4x4", ["v5p:64", "v5p-128", "V5P-128", "tpu-v5p-slice:4x4x4"]),
        ("v5p", "4x4x12", ["v5p:4x4x12", "tpu-v5p-slice:4x4x12"]),  # whole cubes
        ("v6e", "8x8", ["v6e:64", "v6e-64", "tpu-v6e-slice:8x8"]),
        ("tpu7x", "2x2x1", ["tpu7x:4", "tpu7x-8"]),
    ],
)
def test_names_of_the_same_slice(chip, shape, names):
    """Chips and shape, number of chips, Cloud TPU's type and GKE's label with a shape."""
    for name in (f"{chip}:{shape}", *names):
        found = topology.parse(name)
        assert (found.name, found.chip.name) == (f"{chip}:{shape}", chip), name
    number = names[0].split(":")[1]
    if number.isdecimal():
        assert found.num_devices == int(number) * found.chip.devices_per_chip


@pytest.mark.parametrize("text", ["v5p-100", "v5p-4", "v5p:4x4x6", "v5p:4x12x4", "v5p:16x16x28"])
def test_numbers_of_no_slice(text):
    with pytest.raises(InputError, match="unknown shape; known: v5p: 2x2x1 .*v5p-CORES"):
        topology.parse(text)


def test_libtpu_knows_every_topology(libtpu):
    for chip in PLANNED_CHIPS.values():
        for shape in chip.topologies:
            target = topology.parse(f"{chip.name}:{shape}")
            if target.num_devices <= 1024:  # the others take long to list
                devices = target.devices()
                assert len(devices) == target.num_devices, target.name
                assert devices[0].platform == "tpu"


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    assert cli.main(["plan", "--topology=v5e:2x2", *TINY]) == 2
    assert "hmar_jax[tpu]" in capsys.readouterr().err


# Operations


SMALL = TokenizerConfig(
    scales=(1, 2, 6),
    vocab_size=512,
    z_channels=8,
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention=False,
    groups=4,
)


class Shapes(NamedTuple):
    """What experiment.task_shapes returns."""

    task: Any
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    kind: str


def small(stage: str = "next_scale", **changes) -> Shapes:
    """A published config, smaller; stage 2 on the same."""
    config = config_files.load_config(f"{HMAR}:d16_256,stage={stage}")
    if stage == "next_scale":
        sizes = {"model.depth": 3, "model.width": 256, "model.heads": 4}
        parent = Parent("", AutoencoderSpec(SMALL))
    else:
        sizes = {"model.masked_depth": 1}
        parent = Parent("", small().task.spec)
    sizes |= {"image_side": SMALL.image_side, "batch_size": 2, "sampling.top_k": 0}
    values = sizes | changes
    for key, value in values.items():
        config_files.override(config, key, str(value))
    return Shapes(*task_shapes(config, parent, IMAGENET))


def counted(shapes: Shapes) -> jaxpr.OperationCounts:
    init = functools.partial(step.init_state, shapes.task)
    state = jax.eval_shape(init, jax.random.key(0), shapes.frozen)
    train = functools.partial(step.train_step, shapes.task)
    return jaxpr.count(jax.make_jaxpr(train)(state, shapes.frozen, shapes.batch, jax.random.key(0)))


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("next_scale", {"grad_accum_steps": 2}),
        ("next_scale", {"model.pattern": "causal", "model.shared_adaln": True}),
        ("masked", {}),
    ],
)
def test_traced_step_and_formula_agree(stage, changes):
    shapes = small(stage, **changes)
    assert shapes.kind == "tokens" and set(shapes.batch) == {"label", "tokens"}
    found = counted(shapes)
    # They differ a little: without a kernel, scores that the mask removes are computed, and scores
    # are not computed again; and the step has the quantizer.
    assert found.total == pytest.approx(2 * shapes.task.flops_per_image, rel=0.03)
    assert found.float32 > 0  # the quantizer's


def test_rematerialization_is_counted():
    none, matmuls, blocks = (
        counted(small(**{"model.remat": r})) for r in ("none", "matmuls", "blocks")
    )
    c = small().task.transformer
    forward = 2 * c.depth * sum(flops.block_forward(c))  # for two images
    assert blocks.total - none.total == pytest.approx(forward, rel=0.05)
    assert none.total < matmuls.total < blocks.total
    assert none.residuals > matmuls.residuals > blocks.residuals


# Compiled programs


def compile_for(name: str, sizes, function, *arrays) -> hlo.HloModule:
    """A function of the mesh and bfloat16 arrays, compiled for a topology.

    Args:
      arrays: pairs of a shape and a PartitionSpec.
    """
    mesh = sharding.make_mesh(*sizes, devices=topology.parse(name).devices())
    shapes = [
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, spec))
        for shape, spec in arrays
    ]
    traced = jax.jit(functools.partial(function, mesh)).trace(*shapes)
    return hlo.HloModule(traced.lower().compile().as_text())


def test_collectives_in_a_loop(libtpu):
    """Kinds, bytes, group sizes and counts of explicit collectives, some in a loop of length 5."""

    def program(mesh, x):
        def body(x, _):  # (128, 512)
            x = x + jax.lax.psum(x, "data")
            x = x + jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])
            gathered = jax.lax.all_gather(x, "data", tiled=True)  # (512, 512)
            return jnp.sin(jax.lax.psum_scatter(gathered * 2, "data", tiled=True)), None

        def whole(x):
            x, _ = jax.lax.scan(body, x, length=5)
            return jax.lax.psum(x, ("data", "fsdp"))

        return jax.shard_map(whole, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=P())(x)

    found = compile_for(
        "v5e:2x4", (4, 2, 1), program, ((512, 1024), P("data", "fsdp"))
    ).collectives()
    block = 128 * 512 * 2
    seen = {(c.kind, c.group, c.times, c.bytes // block) for c in found}
    assert seen == {
        ("all-reduce", 4, 5, 1),
        ("collective-permute", 8, 5, 1),
        ("all-gather", 4, 5, 4),
        ("reduce-scatter", 4, 5, 4),
        ("all-reduce", 8, 1, 1),
    }


def test_weights_gathered_in_a_loop(libtpu):
    """Scanned layers whose weights are divided: the bytes are those of the unrolled loop."""

    def program(mesh, x, weights, unroll=1):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]

    arrays = ((2048, 512), P("fsdp")), ((6, 512, 512), P(None, "fsdp"))
    rolled, unrolled = (
        sum(
            c.bytes * c.times
            for c in compile_for(
                "v5e:2x2", (1, 4, 1), functools.partial(program, unroll=n), *arrays
            ).collectives()
            if c.kind == "all-gather"
        )
        for n in (1, 6)
    )
    assert rolled == unrolled == 6 * 512 * 512 * 2


def test_memory_traffic(libtpu):
    one = lambda function, *shapes: compile_for(
        "v5e:1x1", (1, 1, 1), function, *((shape, P()) for shape in shapes)
    ).memory_bytes()
    read_and_written = one(lambda mesh, x: jnp.sin(x) * 2, (16384, 4096))
    assert read_and_written == pytest.approx(2 * 2 * 16384 * 4096, rel=0.01)
    # Of an array that a loop slices, each iteration reads its own part, not the whole.
    scanned = one(
        lambda mesh, xs: jax.lax.scan(
            lambda c, x: (c + jnp.sin(x).sum(), None), jnp.float32(0), xs
        )[0],
        (16, 4096, 4096),
    )
    assert scanned == pytest.approx(2 * 16 * 4096 * 4096, rel=0.05)


def test_errors_of_the_compiler():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (76.79G) exceeds available HBM (15.75G)."
    )
    assert plan.out_of_memory(text) == (76.79 * 2**30, 15.75 * 2**30)
    assert plan.out_of_memory("INTERNAL: something else (1.0G)") is None


# hmar plan


def test_plan_for_tpus(libtpu, capsys, tmp_path):
    """The real step of a small model, with its kernels."""
    arguments = [
        "plan",
        "--topology=v5e:2x2",
        *TINY,
        "--config.mesh.fsdp=2",
        f"--json={tmp_path}/plan.json",
    ]
    assert cli.main(arguments) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    for words in ("fits", "block_attention_forward", "nothing here is measured"):
        assert words in text
    assert found["fits"] and found["kernels"] == [
        "block_attention_forward",
        "block_attention_d_q",
        "block_attention_d_kv",
    ]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and found["devices"] == 4
    memory = found["memory"]
    assert memory["available"] == 15.75 * 2**30 and memory["arguments"] < memory["peak"] < 2**26
    # Parameters and both moments in float32, and the frozen tokenizer: some divided by two, some
    # copied.
    whole = 4 * (3 * found["parameters"] + found["frozen_parameters"])
    assert whole / 2 < memory["arguments"] < whole
    assert 0 < memory["unused"] < 4 * found["frozen_parameters"]
    kinds = {t["kind"] for t in found["traffic"]}
    assert {"all-gather", "all-reduce"} <= kinds
    # At least the four weight matrices of two blocks are gathered, forward and backward.
    assert sum(t["times"] for t in found["traffic"] if t["kind"] == "all-gather") >= 2 * 2 * 4
    assert found["step_flops"] > found["model_flops"] > 0
    low, high = found["roofline_step_seconds"]
    assert 0 < low <= high


def advised(tmp_path, capsys, *arguments) -> tuple[str, list[dict]]:
    """Verdict and advice for a plan that does not fit."""
    assert cli.main(["plan", *arguments, f"--json={tmp_path}/plan.json"]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "DOES NOT FIT" in verdict
    return verdict, json.loads((tmp_path / "plan.json").read_text())["advice"]


@pytest.mark.slow
def test_advice_fits_and_names_nothing_that_is_set(tmp_path, capsys):
    verdict, found = advised(
        tmp_path,
        capsys,
        *TINY,
        "--topology=h100:8",
        "--config.batch_size=4194304",
        "--config.model.remat=matmuls",
    )
    assert [one["changes"] for one in found] == [
        {"model.remat": "blocks"},
        {"grad_accum_steps": "2"},
    ]
    available = 0.92 * 80e9
    assert all(one["fits"] and one["peak"] <= available for one in found)
    assert "fits with --config.model.remat=blocks (needs " in verdict and "matmuls" not in verdict


def test_advice_where_all_is_set(tmp_path, capsys):
    """Nothing is left to change but the devices, the batch and the model."""
    everything = (
        "--config.model.remat=blocks",
        "--config.mesh.data=1",
        "--config.batch_size=1",
        "--config.model.width=65536",
        "--config.model.heads=1024",
    )
    verdict, found = advised(tmp_path, capsys, *TINY, "--topology=h100:1", *everything)
    assert found == [] and "try more devices, a smaller batch_size or a smaller model" in verdict
    assert "--config." not in verdict
    # With two devices, there is one change left, which is not enough.
    devices = ("--topology=h100:2", "--config.mesh.data=2", "--config.batch_size=2")
    verdict, found = advised(tmp_path, capsys, *TINY, *everything, *devices)
    assert [one["changes"] for one in found] == [{"mesh.data": "-1", "mesh.fsdp": "2"}]
    assert not found[0]["fits"]
    assert "even with --config.mesh.data=-1 --config.mesh.fsdp=2 it needs" in verdict


def test_advice_for_tpus_is_not_checked():
    """Each check would compile for minutes. Only what can help is named."""
    config = config_files.load_config(f"{HMAR}:d16_256,batch_size=32")
    for key, value in (("model.remat", "matmuls"), ("mesh.fsdp", "2")):
        config_files.override(config, key, value)
    fields = {field.name: None for field in dataclasses.fields(plan.TrainingPlan)} | {
        "topology": "v5e:2x4",
        "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
        "batch_size": 32,
        "grad_accum_steps": 1,
        "memory": MemoryPlan(2.0, 0.0, 8.0, 10.0, 5.0),
    }
    target = topology.parse("v5e:8")
    find = lambda memory: advice.find_advice(
        config, target, plan.TrainingPlan(**fields | {"memory": memory})
    )
    found = find(fields["memory"])
    assert [one.changes for one in found] == [
        {"mesh.fsdp": "4"},
        {"model.remat": "blocks"},
        {"grad_accum_steps": "2"},
    ]
    assert {one.fits for one in found} == {None}
    # The arguments alone are too large: they have to be divided.
    assert [one.changes for one in find(MemoryPlan(6.0, 0.0, 8.0, 14.0, 5.0))] == [
        {"mesh.fsdp": "4"}
    ]
    assert find(MemoryPlan(2.0, 0.0, 2.0, 4.0, 5.0)) == ()


def planned(capsys, *arguments) -> dict:
    """The plan of these arguments, which must fit, from the JSON output."""
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_for_gpus(capsys):
    """Estimated from shapes; then a stage 2, divided."""
    one = planned(capsys, *TINY, "--topology=h100:8", "--config.batch_size=8")
    whole = 4 * (3 * one["parameters"] + one["frozen_parameters"])
    assert one["memory"]["arguments"] == pytest.approx(whole, rel=0.01)
    assert one["memory"]["peak"] > one["memory"]["arguments"] + 4 * one["parameters"]
    assert {(t["kind"], t["group"]) for t in one["traffic"]} == {("all-reduce", 8)}
    assert all("estimate" in how for how in one["how"].values()) and one["fits"]
    two = planned(
        capsys,
        f"--config={HMAR}:digits,stage=masked",
        "--config.init_from=digits",
        "--topology=h100:8",
        "--config.mesh.fsdp=4",
    )
    whole = 4 * (3 * two["parameters"] + two["frozen_parameters"])
    assert two["parameters"] < two["frozen_parameters"] and two["model_flops"] > 0
    assert whole / 4 < two["memory"]["arguments"] < whole / 2  # small arrays are copied
    assert {(t["kind"], t["group"]) for t in two["traffic"]} == {
        ("all-gather", 4),
        ("reduce-scatter", 4),
        ("all-reduce", 2),
    }


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--topology=v5p:5x5x5"], "16x16x24"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], "8 devices"),
        (["--topology=h100:8", "--config.mesh.data=4"], "8 devices"),
        (["--topology=h100:8", "--config.batch_size=12"], "multiple of 8"),
        (["--topology=h100:8", "--config.batch_size=0"], "batch_size must be at least 1; got 0"),
        (
            ["--topology=h100:8", "--config.grad_accum_steps=7"],
            "batch_size must be a multiple of 56",
        ),
        (["--topology=h100:8", "--config.grad_accum_steps=0"], "grad_accum_steps must be at least"),
        (
            ["--topology=h100:8", "--config.image_side=100", "--config.tokenizer="],
            "image_side must be one of 256, 512, 1024, for which a tokenizer is published; got 100",
        ),
        (["--topology=h100:8", "--config.model.remat=some"], "model.remat must be one of none"),
        (["--topology=h100:8", "--config.model.attention=some"], "model.attention must be"),
        (["--topology=h100:8", "--config.nothing=1"], "unknown config key 'nothing'"),
        (["--topology=h100:8", "--json=no/such/folder/x"], "no/such/folder"),
    ],
)
def test_bad_input(arguments, word, capsys):
    assert cli.main(["plan", f"--config={HMAR}:d16_256", *arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": the packaged file " not in line]
    assert out == "" and len(lines) == 1 and word in lines[0]


def test_plan_with_a_named_attention(capsys):
    found = planned(capsys, *TINY, "--topology=h100:8", "--config.batch_size=8")
    named = ("--topology=h100:8", "--config.batch_size=8", "--config.model.attention=xla")
    named = planned(capsys, *TINY, *named)
    assert named.pop("config") != found.pop("config") and named == found


def test_stage_1_that_a_stage_2_assumes():
    """The config's stage1_config, where init_from names no model yet."""
    assert "stage1_config" not in config_files.load_config(f"{HMAR}:d16_256")
    config = config_files.load_config(f"{HMAR}:d20_256,stage=masked,batch_size=8")
    stage1 = config_files.load_config(f"{HMAR}:{config.stage1_config}")
    spec = task_kind(config)[0].planning_parent(config, stage1)
    assert spec.transformer.depth == stage1.model.depth == 20 and not spec.masked_depth
    assert spec.autoencoder.image_side == 256
    with pytest.raises(InputError, match="config.init_from is empty"):
        task_kind(config)[0].planning_parent(config, None)
    target = topology.parse("h100:8")
    found = plan.make_plan(config, target, name="stage 2", parent_config=stage1)
    assert found.frozen_parameters > found.parameters > 0
    assert report.format_plan(found).startswith("plan           stage 2 on h100:8, 8 devices")


@pytest.mark.slow
def test_estimates_for_gpus_agree_with_measurements(capsys):
    """Other code with models of these sizes and the same rematerialization took 15 and 37 GB."""
    for name, batch, measured in (("d16_256", 32, 15e9), ("d30_256", 8, 37e9)):
        found = planned(
            capsys,
            f"--config={HMAR}:{name}",
            "--topology=h100:1",
            f"--config.batch_size={batch}",
            "--config.model.remat=matmuls",
        )
        assert found["memory"]["peak"] == pytest.approx(measured, rel=0.15)


# The published sizes at their batch sizes take minutes each: pytest -m slow tests/test_plan.py


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, topology, overrides, hbm",
    [
        ("d30_256", "v5p:4x4x4", ["mesh.data=-1", "mesh.fsdp=4", "model.remat=matmuls"], 95.74),
        (
            "d30_256",
            "v5e:8x8",
            ["mesh.data=-1", "mesh.fsdp=16", "model.remat=matmuls", "grad_accum_steps=2"],
            15.75,
        ),
        ("d16_256", "v5e:4x4", ["mesh.data=-1", "mesh.fsdp=4", "model.remat=matmuls"], 15.75),
        ("d36_512", "v5p:4x4x4", ["mesh.data=-1", "mesh.fsdp=8", "model.remat=matmuls"], 95.74),
    ],
)
def test_published_sizes_fit(name, topology, overrides, hbm, libtpu, capsys):
    found = planned(
        capsys,
        f"--config={HMAR}:{name}",
        f"--topology={topology}",
        *(f"--config.{o}" for o in overrides),
    )
    assert found["batch_size"] == {"d30_256": 1024}.get(name, 768) and len(found["kernels"]) == 3
    assert found["memory"]["peak"] <= found["memory"]["available"] == hbm * 2**30
