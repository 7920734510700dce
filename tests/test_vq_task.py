"""Training a tokenizer: codebook initialization and resets, usage, optional losses, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders import vq_training
from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.autoencoders.vq import TokenizerConfig, apply_tokenizer, to_float
from hmar_jax.autoencoders.vq_task import VQRecipe, VQTask
from hmar_jax.errors import InputError
from hmar_jax.training.trainable import DataInfo

KEY = jax.random.key(0)
NEVER = -(2**30)
SIDE = 8

# Scales of 1 and 2 at 4 pixels a token, for state that no network has to compute.
TINY = TokenizerConfig(
    scales=(1, 2),
    vocab_size=4,
    z_channels=3,
    channels=8,
    channel_multipliers=(1,),
    num_res_blocks=0,
    patch_size=4,
    attention=False,
    groups=2,
)
# For steps.
TASK = VQTask(
    dataclasses.replace(TINY, vocab_size=16, z_channels=4),
    steps=80,
    batch_size=6,
    recipe=VQRecipe(
        learning_rate=5e-3,
        warmup_steps=5,
        vq_start_step=15,
        reset_after=60,
        usage_window=60,
    ),
)


def tiny_task(**recipe):
    return VQTask(TINY, steps=1000, batch_size=2, recipe=VQRecipe(**recipe))


def with_recipe(task, **changes):
    return dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, **changes))


def make_images(count, seed=0):
    """Noisy circles, crosses and stripes by turns: (count, 8, 8, 3) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    circle, cross = x**2 + y**2 < (SIDE / 2.6) ** 2, (abs(x) < 1) | (abs(y) < 1)
    stripes = np.mgrid[:SIDE, :SIDE][0] % 4 < 2
    shapes = np.stack([(circle, cross, stripes)[i % 3] for i in range(count)])
    noise = np.random.default_rng(seed).uniform(0, 55, (count, SIDE, SIDE, 3))
    return (200 * shapes[..., None] + noise).astype(np.uint8)


BATCH = {"image": make_images(6)}


def make_state(task, step, images_seen, last_used):
    """A state of random numbers; no network is run."""
    rng = np.random.default_rng(0)
    sample = lambda x: jnp.asarray(rng.normal(size=x.shape) + 5, x.dtype)  # no number is 0
    state = jax.tree.map(sample, jax.eval_shape(task.init_state, KEY, {}))
    return state.replace(
        step=jnp.int32(step),
        images_seen=jnp.int32(images_seen),
        last_used=jnp.array(last_used, jnp.int32),
    )


def codebook(state):
    return state.params["quantizer"]["codebook"]


def codebook_moments(state):
    """Adam's two moments of the codebook."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found = [leaf for path, leaf in leaves if "codebook" in str(path)]
    assert len(found) == 2
    return found


def without_codebook(state):
    """All numbers that resetting entries must not change."""
    tree = (state.params, state.opt_state, state.step, state.images_seen)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if "codebook" not in str(path)]


def all_equal(xs, ys):
    return all(np.array_equal(x, y) for x, y in zip(xs, ys, strict=True))


def distances(vectors, z):
    """From each of (V, Z) to the nearest of (B, L, Z)."""
    return np.linalg.norm(vectors[:, None] - z.reshape(-1, z.shape[-1]), axis=-1).min(1)


# The codebook


def test_the_codebook_is_initialized_just_before_the_first_quantizing_step():
    step, state = jax.jit(TASK.train_step), jax.jit(TASK.init_state)(KEY, {})
    books = [codebook(state)]
    for i in range(16):
        state, metrics = step(state, {}, {"image": make_images(6, seed=i)}, KEY)
        books.append(codebook(state))
        assert np.isfinite(metrics["loss"])
    assert np.abs(books[14]).max() <= 1 / 16  # the initial values: nothing has trained it
    assert np.array_equal(books[14], books[0])
    assert len(np.unique(np.round(books[15], 6), axis=0)) == 16  # set at step 15, all different
    assert np.abs(books[15]).max() > 2 / 16
    assert 0 < np.abs(books[16] - books[15]).max() < 0.1  # trained from then on


def test_initial_entries_are_residuals_of_the_features():
    task = tiny_task(vq_start_step=5)
    state = make_state(task, 5, 10, np.zeros((2, 4)))
    f = jax.random.normal(jax.random.key(1), (3, 2, 2, 3))
    new = task._init_codebook(state, f, KEY)
    residuals = apply_tokenizer(TINY, state.params, f, method="unquantized_residuals")
    assert distances(codebook(new), residuals).max() < 0.1 * float(residuals.std())
    assert all((m == 0).all() for m in codebook_moments(new))
    assert all_equal(without_codebook(new), without_codebook(state))
    later = state.replace(step=jnp.int32(6))
    assert np.array_equal(codebook(task._init_codebook(later, f, KEY)), codebook(state))


def test_unused_entries_are_reset_to_current_residuals():
    task = tiny_task(vq_start_step=5, reset_every=10, reset_after=100)
    # Entry 0: used by scale 0 just now. 1: by scale 1 exactly 100 images ago. 2: 101 images ago.
    # 3: never.
    state = make_state(task, 100, 500, [[500, 0, 399, NEVER], [0, 400, 0, NEVER]])
    z = 100 + jax.random.normal(jax.random.key(1), (3, 5, 3))
    reset, count = task._reset_dead_codes(state, z, KEY)
    old, new = codebook(state), codebook(reset)
    assert count == 2
    assert np.array_equal(new[:2], old[:2]) and not np.isclose(new[2:], old[2:]).any()
    assert distances(new[2:], z).max() < 0.1 * float(z.std())
    for before, after in zip(codebook_moments(state), codebook_moments(reset)):
        assert (before != 0).all()
        assert np.array_equal(after[:2], before[:2]) and (after[2:] == 0).all()
    assert reset.last_used[:, 2:].tolist() == [[500, 500], [500, 500]]
    assert np.array_equal(reset.last_used[:, :2], state.last_used[:, :2])
    assert all_equal(without_codebook(reset), without_codebook(state))


@pytest.mark.parametrize(
    "step, why",
    [(101, "not a multiple of reset_every"), (50, "initialized less than 100 images ago")],
)
def test_entries_are_reset_only_when_due(step, why):
    task = tiny_task(vq_start_step=5, reset_every=10, reset_after=100)
    state = make_state(task, step, 500, np.full((2, 4), NEVER))
    same, count = task._reset_dead_codes(state, jnp.ones((3, 5, 3)), KEY)
    assert count == 0, why
    assert all_equal(jax.tree.leaves(same), jax.tree.leaves(state))


def test_usage_counts_the_last_images_of_each_scale():
    task = tiny_task(usage_window=100)
    # Images 401 to 500 are the last 100. Scale 0 used entries 0 and 1 of 4, scale 1 used 1, 2, 3.
    state = make_state(task, 8, 500, [[500, 401, 400, 0], [NEVER, 450, 499, 402]])
    assert {k: float(v) for k, v in task.usage(state).items()} == {
        "usage/1x1": 0.5,
        "usage/2x2": 0.75,
        "usage/any": 1.0,
    }


def test_used_entries_are_marked_by_scale():
    tokens = jnp.array([[3, 0, 0, 1, 1], [3, 0, 1, 0, 0]])  # one token of scale 0, four of scale 1
    assert tiny_task()._mark_used(jnp.full((2, 4), -7), tokens, 20).tolist() == [
        [-7, -7, -7, 20],
        [20, 20, -7, -7],
    ]


# Optional losses


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The .npz file of a perceptual network."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("network") / "network.npz"
    arrays = {
        "conv0/kernel": rng.normal(size=(3, 3, 3, 4)).astype(np.float32),
        "conv0/bias": np.zeros(4, np.float32),
        "taps": np.array([0]),
        "pools": np.array([], int),
        "shift": np.zeros(3),
        "scale": np.ones(3),
    }
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def frozen(network):
    return {"perceptual": load_perceptual(network)}


def metrics_of(task, frozen):
    state = jax.eval_shape(task.init_state, KEY, frozen)
    return jax.eval_shape(task.train_step, state, frozen, BATCH, KEY)


def test_losses_of_weight_0_are_left_out(frozen):
    state, metrics = metrics_of(TASK, {})
    optional = {"adversarial", "adaptive_weight", "discriminator_loss", "perceptual"}
    assert not optional & metrics.keys() and "codes_reset" in metrics
    assert not jax.tree.leaves(state.discriminator)
    task = with_recipe(TASK, perceptual_weight=0.5, reset_every=0)
    _, metrics = metrics_of(task, frozen)
    assert "perceptual" in metrics
    assert not {"adversarial", "discriminator_loss", "codes_reset"} & metrics.keys()


def test_adversarial_and_perceptual_losses_train(frozen):
    one_scale = dataclasses.replace(TASK.tokenizer, scales=(2,))  # compiles sooner
    task = with_recipe(
        dataclasses.replace(TASK, tokenizer=one_scale),
        adversarial_weight=0.5,
        adversarial_start=2,
        discriminator_channels=16,
        discriminator_layers=1,
        perceptual_weight=0.5,
    )
    step, start = jax.jit(task.train_step), jax.jit(task.init_state)(KEY, frozen)
    state, history = start, []
    for i in range(20):
        state, metrics = step(state, frozen, BATCH, KEY)
        assert all(np.isfinite(v) for v in metrics.values()), (i, metrics)
        quantizer = metrics["quantizer_loss"] if i >= task.recipe.vq_start_step else 0  # weight 1
        expected = metrics["l2"] + 0.2 * metrics["l1"] + 0.5 * metrics["perceptual"] + quantizer
        assert np.isclose(metrics["loss"], expected, rtol=1e-5)
        assert metrics["adaptive_weight"] > 0
        history.append(metrics)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert history[14]["l2"] < history[0]["l2"]
    assert history[14]["perceptual"] < history[0]["perceptual"]
    for layer, trained in state.discriminator.items():
        if "kernel" in trained:
            assert not np.array_equal(trained["kernel"], start.discriminator[layer]["kernel"])

    # The adversarial loss counts from adversarial_start on: nothing else in these steps differs.
    (early, a), (late, b) = (
        step(start.replace(step=jnp.int32(i)), frozen, BATCH, KEY) for i in (1, 2)
    )
    assert a["loss"] == b["loss"] and not np.isclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    leaves = jax.tree.leaves
    assert all_equal(leaves(early.discriminator), leaves(late.discriminator))  # always trained
    assert not all_equal(leaves(early.params["decoder"]), leaves(late.params["decoder"]))


def test_the_config_names_the_perceptual_network(network, tmp_path):
    config = vq_training.TASKS["tokenizer"].schema.default_config()
    config.model.update(dataclasses.asdict(TASK.tokenizer))
    config.recipe.perceptual_weight = 0.5
    config.recipe.update(adversarial_weight=0.1, discriminator_layers=1, discriminator_channels=16)
    config.steps, config.batch_size, config.perceptual_network = 10, 2, str(network)
    task = vq_training.make_task(config, None, DataInfo("", 3, ("a", "b", "c"), 36)).task
    assert task.recipe.perceptual_weight == 0.5 and task.discriminator.num_layers == 1
    frozen = vq_training.frozen_params(config, None, {}, "image")
    images = jnp.asarray(BATCH["image"] / 127.5 - 1, jnp.float32)
    assert (perceptual_distance(frozen["perceptual"], images, images[::-1]) > 0).any()
    config.perceptual_network = str(tmp_path / "none.npz")
    with pytest.raises(InputError, match="none.npz: no such file"):
        vq_training.frozen_params(config, None, {}, "image")


# Evaluation


def test_padding_does_not_change_metrics():
    """Means over the images marked valid, whatever the others are."""
    params = jax.jit(TASK.init_params)(KEY, {})
    evaluate = jax.jit(TASK.eval_metrics)
    valid = np.array([True, True, False, True, False, False])
    images = np.where(valid[:, None, None, None], BATCH["image"], 255).astype(np.uint8)
    one, other = (
        evaluate(params, {}, {"image": x, "valid": valid}, 20) for x in (BATCH["image"], images)
    )
    assert one.keys() == {"loss", "l1", "l2", "psnr", "quantizer_loss"}
    for name, mean in one.items():
        assert mean.count == 3 and np.isclose(mean.total, other[name].total, rtol=1e-5), name


def test_validation_and_training_have_the_same_loss(frozen):
    """Of the same images and parameters: the same terms, the perceptual distance among them."""
    task = with_recipe(TASK, perceptual_weight=0.5, reset_every=0)
    state = jax.jit(task.init_state)(KEY, frozen).replace(step=jnp.int32(20))
    _, training = jax.jit(task.train_step)(state, frozen, BATCH, KEY)
    valid = np.ones(len(BATCH["image"]), bool)
    batch = {"image": BATCH["image"], "valid": valid}
    validation = jax.jit(task.eval_metrics)(state.params, frozen, batch, 20)
    for name in ("loss", "l1", "l2", "quantizer_loss", "perceptual"):
        mean = validation[name].total / validation[name].count
        np.testing.assert_allclose(mean, training[name], rtol=1e-5, err_msg=name)


def test_no_validation_loss_before_anything_is_quantized():
    """The loss is less then, and such a checkpoint, no tokenizer yet, would be kept as the best."""
    params = jax.jit(TASK.init_params)(KEY, {})
    batch = {"image": BATCH["image"], "valid": np.ones(len(BATCH["image"]), bool)}
    start = TASK.recipe.vq_start_step
    counts = [
        jax.jit(TASK.eval_metrics)(params, {}, batch, step)["loss"].count
        for step in (start - 1, start)
    ]
    assert counts == [0, len(BATCH["image"])]


def test_preview_shows_images_and_reconstructions():
    params = jax.jit(TASK.init_params)(KEY, {})
    images = make_images(TASK.num_preview_images)
    preview = jax.jit(TASK.preview)
    rows = preview(params, {}, images, KEY, 20)
    assert rows.shape == (2, 8, SIDE, SIDE, 3) and len(TASK.preview_labels()) == 2
    np.testing.assert_allclose(rows[0], images / 255, atol=1e-6)
    reconstructed = jax.jit(TASK.reconstruct)(params, to_float(jnp.asarray(images)), 20)
    np.testing.assert_allclose(rows[1], (reconstructed + 1) / 2, atol=1e-5)
    # Without quantizing before vq_start_step: the tokens' features are another image.
    assert not np.allclose(preview(params, {}, images, KEY, 0)[1], rows[1], atol=1e-3)


def test_init_params_are_those_of_the_state():
    params = jax.jit(TASK.init_params)(KEY, {})
    state = jax.jit(TASK.init_state)(KEY, {})
    assert all_equal(jax.tree.leaves(params), jax.tree.leaves(state.params))
    shapes = TASK.batch_shapes("image")
    assert shapes["image"].shape == (6, SIDE, SIDE, 3) and shapes["image"].dtype == np.uint8


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(vq_start_step=-1), "vq_start_step must be an integer of at least 0; got -1"),
        (dict(l1_weight=-1.0), "l1_weight must be a number of at least 0; got -1.0"),
        (dict(b2=1.5), r"b2 must be a number in \[0, 1\); got 1.5"),
    ],
)
def test_invalid_recipes(values, message):
    with pytest.raises(InputError, match=message):
        VQRecipe(**values)
