"""The next-scale transformer against the published code's recorded numbers, and its properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.losses import cross_entropy, position_weights
from hmar_jax.families.hmar.transformer import NextScaleTransformer, TransformerConfig
from tests.conftest import relative

SIDES = (1, 2, 3, 4, 6)


def published_names(grads, config):
    """Gradients (or parameters) as {published name: array in the published layout}."""
    width = config.width
    flat = {
        "pos_start": grads["embed"]["pos_start"],
        "pos_1LC": grads["embed"]["pos_emb"],
        "word_embed.weight": grads["embed"]["word_embed"]["kernel"].T,
        "word_embed.bias": grads["embed"]["word_embed"]["bias"],
        "class_emb.weight": grads["embed"]["class_emb"],
        "lvl_embed.weight": grads["embed"]["level_emb"],
        "head_nm.ada_lin.1.weight": grads["head"]["ada"]["kernel"].T,
        "head_nm.ada_lin.1.bias": grads["head"]["ada"]["bias"],
        "head.weight": grads["head"]["kernel"].T,
        "head.bias": grads["head"]["bias"],
    }
    if config.shared_adaln:
        flat["shared_ada_lin.1.weight"] = grads["shared"]["ada"]["kernel"].T
        flat["shared_ada_lin.1.bias"] = grads["shared"]["ada"]["bias"]
    for i in range(config.depth):
        b = jax.tree.map(lambda g: g[i], grads["blocks"]["block"])
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


def test_config_is_read_off_the_weights(case):
    model, _, _ = case
    shared = model.config.shared_adaln
    assert (model.config.depth, model.config.width, model.config.heads) == (
        (2, 64, 2) if shared else (4, 128, 2)
    )
    assert (
        model.config.pattern == "diagonal"
        and model.config.num_classes == 10
        and model.config.qk_norm is not shared
    )


def test_logits(case):
    model, params, z = case
    logits = jax.jit(model.logits)(params, z["labels"], z["ns_input"])
    assert relative(logits, z["logits"]) < 1e-5
    if "logits_uncond" in z:
        null = jnp.full(2, model.config.null_class)
        assert (
            relative(jax.jit(model.logits)(params, null, z["ns_input"]), z["logits_uncond"]) < 1e-5
        )


def test_scales_one_at_a_time_equal_all_at_once(case):
    model, params, z = case
    scales = model.config.scale_list
    first = scales.lengths[0]
    for k in range(scales.num_scales):
        codes = (
            z["ns_input"][:, scales.offsets[k] - first : scales.offsets[k + 1] - first]
            if k
            else None
        )
        logits, past = jax.jit(model.scale_logits, static_argnums=1)(params, k, z["labels"], codes)
        assert past is None
        assert relative(logits, z["logits"][:, scales.slice(k)]) < 1e-5


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
                wanted = z[f"grad_{tag}/{part}/{name}"]
                error = np.linalg.norm(values.ravel() - wanted.ravel())
                # a few entries of a tensor can be near zero: measured against the tensor's typical entry
                assert (
                    error
                    <= 1e-4 * max(np.linalg.norm(wanted), norm * (wanted.size / grad.size) ** 0.5)
                    + 1e-9
                ), (name, part)


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
    """The same weights with VAR's mask: all at once, and scale by scale with cached keys and values."""
    model, params = causal(golden_state)
    z = load_golden("var")
    logits = jax.jit(model.logits)(params, z["labels"], z["ns_input"])
    assert relative(logits, z["logits"]) < 1e-5
    scales, past = model.config.scale_list, None
    for k in range(scales.num_scales):
        codes = z["ns_input"][:, scales.offsets[k] - 1 : scales.offsets[k + 1] - 1] if k else None
        logits, past = jax.jit(model.scale_logits, static_argnums=1)(
            params, k, z["labels"], codes, past
        )
        assert relative(logits, z["logits"][:, scales.slice(k)]) < 1e-5


TINY = TransformerConfig(
    scales=(1, 2, 3), vocab_size=16, z_channels=4, num_classes=5, depth=3, width=16, heads=2
)


def test_diagonal_scales_do_not_see_each_other():
    model = NextScaleTransformer(TINY)
    params = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 0.3,
        jax.jit(model.init)(jax.random.key(0)),
    )
    codes = jax.random.normal(jax.random.key(1), (1, 13, 4))
    changed = codes.at[:, :4].add(1.0)  # the second scale's input
    logits = jax.jit(model.logits)
    before, after = (np.asarray(logits(params, jnp.array([1]), c)) for c in (codes, changed))
    assert np.array_equal(before[:, 0], after[:, 0]) and np.array_equal(before[:, 5:], after[:, 5:])
    assert not np.allclose(before[:, 1:5], after[:, 1:5])


def test_initial_deviations():
    """Spec: linear and embedding std sqrt(1/(3C)); branches' ends over sqrt(2N); AdaLN rows and head scaled down."""
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
    assert block["fc1"]["kernel"].shape == (3, 256, 1024)  # stacked: one draw a block
    assert not np.allclose(block["fc1"]["kernel"][0], block["fc1"]["kernel"][1])


def test_dropout_and_stochastic_depth_need_a_key():
    model = NextScaleTransformer(
        dataclasses.replace(TINY, dropout=0.5, drop_path=0.5, init_adaln_gamma=1.0)
    )
    params, codes, ids = (
        jax.jit(model.init)(jax.random.key(0)),
        jnp.ones((2, 13, 4)),
        jnp.array([0, 1]),
    )
    logits = jax.jit(model.logits)
    still = logits(params, ids, codes)
    assert np.array_equal(still, logits(params, ids, codes))
    a, b = (logits(params, ids, codes, jax.random.key(i)) for i in (1, 2))
    assert not np.allclose(a, b) and np.array_equal(
        a, logits(params, ids, codes, jax.random.key(1))
    )
    assert not np.allclose(a, still)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("sides", [PUBLISHED_SIDES[256], PUBLISHED_SIDES[512]], ids=len)
@pytest.mark.parametrize("pattern", ["diagonal", "causal"])
def test_gradients_through_the_gpus_kernels(pattern, sides):
    """As a training step has them: the kernels in blocks that are scanned and rematerialised, against XLA's attention."""
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
    codes = jax.random.normal(jax.random.key(1), (2, length - 1, 8))
    targets = jax.random.randint(jax.random.key(2), (2, length), 0, 64)

    def gradients(**changes):
        model = NextScaleTransformer(dataclasses.replace(config, **changes))

        def loss(params):
            return -jnp.take_along_axis(
                jax.nn.log_softmax(model.logits(params, jnp.arange(2), codes)),
                targets[..., None],
                2,
            ).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, grads), (expected, wanted) = gradients(remat="matmuls"), gradients(attention="xla")
    assert abs(loss - expected) < 1e-3
    flat, like = (
        jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (grads, wanted)
    )
    assert relative(flat, like) < 2e-2
