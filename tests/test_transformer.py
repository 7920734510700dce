"""The next-scale transformer: agreement with the published code's recorded numbers, properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.losses import cross_entropy, position_weights
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


def published_names(params, config):
    """Parameters (or gradients) as {published name: array in the published layout}."""
    width = config.width
    flat = {
        "pos_start": params["embed"]["pos_start"],
        "pos_1LC": params["embed"]["pos_emb"],
        "word_embed.weight": params["embed"]["word_embed"]["kernel"].T,
        "word_embed.bias": params["embed"]["word_embed"]["bias"],
        "class_emb.weight": params["embed"]["class_emb"],
        "lvl_embed.weight": params["embed"]["level_emb"],
        "head_nm.ada_lin.1.weight": params["head"]["ada"]["kernel"].T,
        "head_nm.ada_lin.1.bias": params["head"]["ada"]["bias"],
        "head.weight": params["head"]["kernel"].T,
        "head.bias": params["head"]["bias"],
    }
    if config.shared_adaln:
        flat["shared_ada_lin.1.weight"] = params["shared"]["ada"]["kernel"].T
        flat["shared_ada_lin.1.bias"] = params["shared"]["ada"]["bias"]
    for i in range(config.depth):
        b = jax.tree.map(lambda x, i=i: x[i], params["blocks"]["block"])
        names = {
            "attn.mat_qkv.weight": b["qkv"]["kernel"].reshape(width, -1).T,
            "attn.q_bias": b["q_bias"],
            "attn.v_bias": b["v_bias"],
            "attn.proj.weight": b["proj"]["kernel"].reshape(-1, width).T,
            "attn.proj.bias": b["proj"]["bias"],
        }
        names |= {f"ffn.{fc}.weight": b[fc]["kernel"].T for fc in ("fc1", "fc2")}
        names |= {f"ffn.{fc}.bias": b[fc]["bias"] for fc in ("fc1", "fc2")}
        if config.qk_norm:
            names["attn.scale_mul_1H11"] = b["log_scale"]
        if config.shared_adaln:
            names["ada_gss"] = b["ada_table"]
        else:
            names |= {"ada_lin.1.weight": b["ada"]["kernel"].T, "ada_lin.1.bias": b["ada"]["bias"]}
        flat |= {f"blocks.{i}.{name}": value for name, value in names.items()}
    return flat


@pytest.fixture(scope="module", params=["next_scale", "next_scale_shared_aln"])
def case(request, load_golden, golden_state):
    config, params = convert.transformer_from_state(
        golden_state(request.param, "transformer"), SIDES
    )
    return NextScaleTransformer(config), params, load_golden(request.param)


def test_config_is_inferred_from_the_weights(case):
    model, _, _ = case
    config, shared = model.config, model.config.shared_adaln
    expected = (2, 64, 2) if shared else (4, 128, 2)
    assert (config.depth, config.width, config.heads) == expected
    assert config.pattern == "diagonal" and config.num_classes == 10
    assert config.qk_norm is not shared


def test_logits(case):
    model, params, z = case
    logits = jax.jit(model.logits)(params, z["labels"], z["ns_input"])
    assert relative(logits, z["logits"]) < 1e-5
    if "logits_uncond" in z:
        null = jnp.full(2, model.config.null_class)
        logits = jax.jit(model.logits)(params, null, z["ns_input"])
        assert relative(logits, z["logits_uncond"]) < 1e-5


def test_scales_one_at_a_time_equal_all_at_once(case):
    model, params, z = case
    scales = model.config.scale_list
    scale_logits = jax.jit(model.scale_logits, static_argnames="k")
    for k in range(scales.num_scales):
        logits, kv_cache = scale_logits(params, z["labels"], inputs_of_scale(z, scales, k), k=k)
        assert kv_cache is None
        assert relative(logits, z["logits"][:, scales.slice(k)]) < 1e-5


def inputs_of_scale(z, scales, k):
    """The recorded next-scale inputs of scale k, (B, l, Z); None for the first scale."""
    if k == 0:
        return None
    first = scales.lengths[0]
    return z["ns_input"][:, scales.offsets[k] - first : scales.offsets[k + 1] - first]


@pytest.mark.parametrize("kind", ["lognorm", "equal", "plain"])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_losses(case, kind, smoothing):
    model, params, z = case
    ce = cross_entropy(jnp.asarray(z["logits"]), jnp.asarray(z["tokens_BL"]), smoothing)
    assert relative(ce, z[f"ce_ls{smoothing}"]) < 1e-5
    weights = position_weights(model.config.scale_list, kind)
    np.testing.assert_allclose(weights, z[f"weights_{kind}"], rtol=1e-5)
    assert relative((weights * ce).sum(-1).mean(), z[f"loss_{kind}_ls{smoothing}"]) < 1e-5


@pytest.mark.parametrize(
    "tag,kind,smoothing", [("lognorm_ls0", "lognorm", 0), ("equal_ls0.1", "equal", 0.1)]
)
def test_gradients(case, tag, kind, smoothing):
    model, params, z = case
    weights = position_weights(model.config.scale_list, kind)

    def loss(params):
        ce = cross_entropy(
            model.logits(params, z["labels"], z["ns_input"]), z["tokens_BL"], smoothing
        )
        return (weights * ce).sum(-1).mean()

    grads = published_names(jax.jit(jax.grad(loss))(params), model.config)
    recorded = {n.split("/", 2)[2] for n in z.files if n.startswith(f"grad_{tag}/norm/")}
    assert set(grads) == recorded
    for name, grad in grads.items():
        grad = np.asarray(grad)
        norm = float(z[f"grad_{tag}/norm/{name}"])
        assert abs(np.linalg.norm(grad) - norm) <= 1e-4 * norm + 1e-9, name
        for part, values in (("first16", grad.ravel()[:16]), ("full", grad)):
            if f"grad_{tag}/{part}/{name}" in z:
                expected = z[f"grad_{tag}/{part}/{name}"]
                error = np.linalg.norm(values.ravel() - expected.ravel())
                # Entries near zero are compared with the typical entry of the tensor.
                typical = norm * (expected.size / grad.size) ** 0.5
                size = max(np.linalg.norm(expected), typical)
                assert error <= 1e-4 * size + 1e-9, (name, part)


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["lognorm", "equal"])
def test_weights_of_published_lists(load_golden, size, kind):
    weights = position_weights(ScaleList(PUBLISHED_SIDES[size]), kind)
    np.testing.assert_allclose(
        weights, load_golden("next_scale")[f"weights_{kind}_{size}"], rtol=1e-5
    )


def causal(golden_state):
    config, params = convert.transformer_from_state(
        golden_state("next_scale", "transformer"), SIDES
    )
    return NextScaleTransformer(dataclasses.replace(config, pattern="causal")), params


def test_var_logits(load_golden, golden_state):
    """The same weights with VAR's mask: all scales at once, and one at a time with a cache."""
    model, params = causal(golden_state)
    z = load_golden("var")
    logits = jax.jit(model.logits)(params, z["labels"], z["ns_input"])
    assert relative(logits, z["logits"]) < 1e-5
    scales, kv_cache = model.config.scale_list, None
    scale_logits = jax.jit(model.scale_logits, static_argnames="k")
    for k in range(scales.num_scales):
        scale_inputs = inputs_of_scale(z, scales, k)
        logits, kv_cache = scale_logits(params, z["labels"], scale_inputs, k=k, kv_cache=kv_cache)
        assert relative(logits, z["logits"][:, scales.slice(k)]) < 1e-5


TINY = TransformerConfig(
    scales=(1, 2, 3), vocab_size=16, z_channels=4, num_classes=5, depth=3, width=16, heads=2
)


def test_diagonal_pattern_isolates_scales():
    model = NextScaleTransformer(TINY)
    params = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 0.3,
        jax.jit(model.init)(jax.random.key(0)),
    )
    inputs = jax.random.normal(jax.random.key(1), (1, 13, 4))
    changed = inputs.at[:, :4].add(1.0)  # the second scale's input
    logits = jax.jit(model.logits)
    before, after = (np.asarray(logits(params, jnp.array([1]), x)) for x in (inputs, changed))
    assert np.array_equal(before[:, 0], after[:, 0]) and np.array_equal(before[:, 5:], after[:, 5:])
    assert not np.allclose(before[:, 1:5], after[:, 1:5])


def test_initial_standard_deviations():
    """sqrt(1/(3C)); divided by sqrt(2N) at the end of a branch; AdaLN and head scaled down."""
    config = dataclasses.replace(TINY, width=256, heads=4, vocab_size=512)
    params = jax.jit(NextScaleTransformer(config).init)(jax.random.key(0))
    std, block = (1 / 768) ** 0.5, params["blocks"]["block"]
    expected = {
        "class": (params["embed"]["class_emb"], 1),
        "qkv": (block["qkv"]["kernel"], 1),
        "fc1": (block["fc1"]["kernel"], 1),
        "proj": (block["proj"]["kernel"], 6**-0.5),
        "fc2": (block["fc2"]["kernel"], 6**-0.5),
        "gamma": (block["ada"]["kernel"][..., :512], 1e-3),
        "scale and shift": (block["ada"]["kernel"][..., 512:], 0.5),
        "head": (params["head"]["kernel"], 0.02),
        "head ada": (params["head"]["ada"]["kernel"], 0.5),
    }
    for name, (value, factor) in expected.items():
        assert np.std(value) == pytest.approx(std * factor, rel=0.05), name
    assert block["fc1"]["kernel"].shape == (3, 256, 1024)  # stacked, each block its own
    assert not np.allclose(block["fc1"]["kernel"][0], block["fc1"]["kernel"][1])


def test_dropout_and_stochastic_depth_require_a_key():
    model = NextScaleTransformer(
        dataclasses.replace(TINY, dropout=0.5, drop_path=0.5, init_adaln_gamma=1.0)
    )
    params = jax.jit(model.init)(jax.random.key(0))
    inputs, ids = jnp.ones((2, 13, 4)), jnp.array([0, 1])
    logits = jax.jit(model.logits)
    deterministic = logits(params, ids, inputs)
    assert np.array_equal(deterministic, logits(params, ids, inputs))
    a, b = (logits(params, ids, inputs, jax.random.key(i)) for i in (1, 2))
    assert np.array_equal(a, logits(params, ids, inputs, jax.random.key(1)))
    assert not np.allclose(a, b) and not np.allclose(a, deterministic)


@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_named_attention_is_the_default_one(pattern):
    """model.attention names the implementation of block_attention; empty: the best that runs."""
    config = dataclasses.replace(TINY, pattern=pattern)
    params = jax.jit(NextScaleTransformer(config).init)(jax.random.key(0))
    inputs, ids = jax.random.normal(jax.random.key(1), (2, 13, 4)), jnp.array([0, 1])
    default, named = (
        jax.jit(NextScaleTransformer(dataclasses.replace(config, attention=name)).logits)(
            params, ids, inputs
        )
        for name in ("", "xla")
    )
    assert np.array_equal(default, named)  # on the CPU, XLA's is the best
    assert TransformerConfig((1, 2), attention=None).attention == ""  # as older files have it
    model = NextScaleTransformer(dataclasses.replace(config, attention="flash"))
    with pytest.raises(InputError, match="^model.attention must be empty or .*; got 'flash'"):
        model.logits(params, ids, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("sides", [PUBLISHED_SIDES[256], PUBLISHED_SIDES[512]], ids=len)
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_gradients_through_gpu_kernels(pattern, sides):
    """The GPU kernels against XLA's attention, in scanned and rematerialized blocks."""
    config = TransformerConfig(
        scales=sides,
        vocab_size=64,
        z_channels=8,
        num_classes=5,
        depth=2,
        width=256,
        heads=4,
        pattern=pattern,
        dtype="bfloat16",
        init_adaln_gamma=1.0,
        init_head=1.0,
    )
    params = jax.jit(NextScaleTransformer(config).init)(jax.random.key(0))
    length = config.scale_list.length
    inputs = jax.random.normal(jax.random.key(1), (2, length - 1, 8))
    targets = jax.random.randint(jax.random.key(2), (2, length), 0, 64)

    def gradients(**changes):
        model = NextScaleTransformer(dataclasses.replace(config, **changes))

        def loss(params):
            log_probs = jax.nn.log_softmax(model.logits(params, jnp.arange(2), inputs))
            return -jnp.take_along_axis(log_probs, targets[..., None], 2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    flatten = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    loss, grads = gradients(remat="matmuls")
    expected_loss, expected = gradients(attention="xla")
    assert abs(loss - expected_loss) < 1e-3
    assert relative(flatten(grads), flatten(expected)) < 2e-2
