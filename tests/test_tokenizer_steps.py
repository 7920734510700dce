"""A tokenizer's training step: how the codebook is drawn and kept alive, usage figures, and the optional losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.autoencoders.vq_task import TokenizerTask, psnr
from hmar_jax.experiment import build_experiment
from tests import tiny

KEY = jax.random.key(0)
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


@pytest.fixture(autouse=True)
def quick():
    with tiny.cached():
        yield


@pytest.fixture(scope="module")
def experiment():
    """The one of tiny.tokenizer_run()."""
    return build_experiment(tiny.config_of(tiny.train_tokenizer("unused")))


def make_state(task, step, images_seen, last_hit):
    """A state of random numbers; no network is run."""
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) + 5, x.dtype)  # so that no number is 0
    state = jax.tree.map(draw, jax.eval_shape(task.init, KEY))
    return state.replace(
        step=jnp.int32(step),
        images_seen=jnp.int32(images_seen),
        last_hit=jnp.array(last_hit, jnp.int32),
    )


def moments(state):
    """Adam's two moments of the codebook."""
    found = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "codebook" in str(path)
    ]
    assert len(found) == 2
    return found


def without_codebook(state):
    """All the numbers that reviving must leave alone."""
    tree = (state.params, state.opt_state, state.step, state.images_seen)
    return [
        x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "codebook" not in str(path)
    ]


# The codebook


def test_the_codebook_is_drawn_from_data_at_the_last_unquantized_step(experiment):
    task = experiment.task
    assert task.unquantized_steps == 15
    step, state, batches = (
        jax.jit(task.train_step),
        jax.jit(task.init)(KEY),
        iter(experiment.loader()),
    )
    books = [state.params["quantizer"]["codebook"]]
    for _ in range(16):
        state, metrics = step(state, next(batches), KEY)
        books.append(state.params["quantizer"]["codebook"])
        assert np.isfinite(metrics["loss"])
    assert (
        np.abs(books[14]).max() <= 1 / tiny.VOCAB
    )  # as it was initialised: nothing has trained it
    assert np.array_equal(books[14], books[0])
    assert (
        len(np.unique(np.round(books[15], 6), axis=0)) == tiny.VOCAB
    )  # drawn at step 15, all different
    assert np.abs(books[15]).max() > 2 / tiny.VOCAB
    assert 0 < np.abs(books[16] - books[15]).max() < 0.1  # trained from then on


def test_drawn_entries_are_residuals_of_the_features():
    task = TokenizerTask(TINY, steps=10, batch_size=2, unquantized_steps=5)
    state = make_state(task, 5, 10, np.zeros((2, 4)))
    f = jax.random.normal(jax.random.key(1), (3, 2, 2, 3))
    drawn = task._draw_codebook(state, f, KEY)
    rests = task.model.apply(
        {"params": state.params}, f, method=lambda t, f: t.quantizer.unquantized_residuals(f)
    )
    distances = np.linalg.norm(
        drawn.params["quantizer"]["codebook"][:, None] - rests.reshape(-1, 3), axis=-1
    )
    assert distances.min(1).max() < 0.1 * float(rests.std())
    assert all((m == 0).all() for m in moments(drawn))
    assert all(
        np.array_equal(a, b) for a, b in zip(without_codebook(drawn), without_codebook(state))
    )
    other = task._draw_codebook(state.replace(step=jnp.int32(6)), f, KEY)
    assert np.array_equal(
        other.params["quantizer"]["codebook"], state.params["quantizer"]["codebook"]
    )


def test_dead_entries_are_replaced_by_current_residuals():
    task = TokenizerTask(
        TINY, steps=1000, batch_size=2, unquantized_steps=5, revive_every=10, revive_after=100
    )
    # Entry 0: hit by scale 0 just now. 1: by scale 1 exactly 100 images ago. 2: 101 images ago. 3: never.
    last_hit = [[500, 0, 399, -(2**30)], [0, 400, 0, -(2**30)]]
    state = make_state(task, 100, 500, last_hit)
    z = 100 + jax.random.normal(jax.random.key(1), (3, 5, 3))
    revived, count = task._revive(state, z, KEY)
    old, new = state.params["quantizer"]["codebook"], revived.params["quantizer"]["codebook"]
    assert count == 2
    assert np.array_equal(new[:2], old[:2]) and not np.isclose(new[2:], old[2:]).any()
    assert np.linalg.norm(new[2:, None] - z.reshape(-1, 3), axis=-1).min(1).max() < 0.1 * float(
        z.std()
    )
    for before, after in zip(moments(state), moments(revived)):
        assert (
            np.array_equal(after[:2], before[:2]) and (after[2:] == 0).all() and (before != 0).all()
        )
    assert revived.last_hit[:, 2:].tolist() == [[500, 500], [500, 500]]
    assert np.array_equal(revived.last_hit[:, :2], state.last_hit[:, :2])
    assert all(
        np.array_equal(a, b) for a, b in zip(without_codebook(revived), without_codebook(state))
    )


@pytest.mark.parametrize(
    "step, why", [(101, "not a multiple of revive_every"), (50, "drawn less than 100 images ago")]
)
def test_nothing_is_revived_out_of_time(step, why):
    task = TokenizerTask(
        TINY, steps=1000, batch_size=2, unquantized_steps=5, revive_every=10, revive_after=100
    )
    state = make_state(task, step, 500, np.full((2, 4), -(2**30)))
    same, count = task._revive(state, jnp.ones((3, 5, 3)), KEY)
    assert count == 0, why
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state)):
        assert np.array_equal(a, b)


def test_usage_counts_the_last_images_of_each_scale():
    task = TokenizerTask(TINY, steps=10, batch_size=2, usage_window=100)
    # Images 401 to 500 are the last 100. Scale 0 used entries 0 and 1 of 4, scale 1 used 1, 2 and 3; all were used.
    state = make_state(task, 8, 500, [[500, 401, 400, 0], [-(2**30), 450, 499, 402]])
    assert {k: float(v) for k, v in task.usage(state).items()} == {
        "usage/1x1": 0.5,
        "usage/2x2": 0.75,
        "usage/any": 1.0,
    }


def test_hits_are_marked_by_scale():
    task = TokenizerTask(TINY, steps=10, batch_size=2)
    tokens = jnp.array([[3, 0, 0, 1, 1], [3, 0, 1, 0, 0]])  # one token of scale 0, four of scale 1
    assert task._hits(jnp.full((2, 4), -7), tokens, 20).tolist() == [
        [-7, -7, -7, 20],
        [20, 20, -7, -7],
    ]


# Optional losses


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("network") / "network.npz"
    np.savez(
        path,
        **{
            "conv0/kernel": rng.normal(size=(3, 3, 3, 4)).astype(np.float32),
            "conv0/bias": np.zeros(4, np.float32),
            "taps": np.array([0]),
            "pools": np.array([], int),
            "shift": np.zeros(3),
            "scale": np.ones(3),
        },
    )
    return path


BATCH = {
    "image": np.stack(
        [tiny.image(label, np.random.default_rng(label), tiny.SIDE) for label in (0, 1, 2, 0, 1, 2)]
    )
}
WITH_BOTH = dict(
    adversarial_weight=0.5,
    adversarial_start=2,
    discriminator_channels=16,
    discriminator_layers=1,
    perceptual_weight=0.5,
)


def test_losses_of_weight_0_are_left_out(experiment, network):
    plain = experiment.task
    state, metrics = jax.eval_shape(
        lambda s, b: plain.train_step(s, b, KEY), jax.eval_shape(plain.init, KEY), BATCH
    )
    assert (
        not {"adversarial", "adaptive_weight", "discriminator_loss", "perceptual"} & metrics.keys()
    )
    assert not jax.tree.leaves(state.discriminator)
    perceptual = dataclasses.replace(plain, perceptual_weight=0.5, revive_every=0)
    state, metrics = jax.eval_shape(
        lambda s, b, n: perceptual.train_step(s, b, KEY, n),
        jax.eval_shape(plain.init, KEY),
        BATCH,
        load_perceptual(network),
    )
    assert (
        "perceptual" in metrics
        and not {"adversarial", "discriminator_loss", "revived"} & metrics.keys()
    )


def test_adversarial_and_perceptual_losses_train(experiment, network):
    network = load_perceptual(network)
    one_scale = dataclasses.replace(experiment.task.tokenizer, scales=(2,))  # compiles sooner
    task = dataclasses.replace(experiment.task, tokenizer=one_scale, **WITH_BOTH)
    step, start = jax.jit(task.train_step), jax.jit(task.init)(KEY)
    state, losses = start, []
    for i in range(20):
        state, metrics = step(state, BATCH, KEY, network)
        assert all(np.isfinite(v) for v in metrics.values()), (i, metrics)
        quantizer = metrics["quantizer_loss"] if i >= task.unquantized_steps else 0  # of weight 1
        wanted = metrics["l2"] + 0.2 * metrics["l1"] + 0.5 * metrics["perceptual"] + quantizer
        assert np.isclose(metrics["loss"], wanted, rtol=1e-5)
        assert metrics["adaptive_weight"] > 0
        losses.append(metrics)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert losses[14]["l2"] < losses[0]["l2"] and losses[14]["perceptual"] < losses[0]["perceptual"]
    for layer, trained in state.discriminator.items():
        assert "kernel" not in trained or not np.array_equal(
            trained["kernel"], start.discriminator[layer]["kernel"]
        )

    # The discriminator's opinion counts from adversarial_start on: nothing else in these two steps differs.
    (early, a), (late, b) = (
        step(start.replace(step=jnp.int32(i)), BATCH, KEY, network) for i in (1, 2)
    )
    assert a["loss"] == b["loss"] and not np.isclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    same = lambda part: [
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (part(early), part(late))))
    ]
    assert all(same(lambda s: s.discriminator))  # it learns all along
    assert not all(same(lambda s: s.params["decoder"]))


def test_the_command_takes_the_network_by_name(network):
    config = tiny.config_of(
        tiny.train_tokenizer(
            "unused",
            perceptual_network=network,
            recipe__perceptual_weight=0.5,
            recipe__adversarial_weight=0.1,
            recipe__discriminator_layers=1,
            recipe__discriminator_channels=16,
        )
    )
    built = build_experiment(config)
    assert built.task.perceptual_weight == 0.5 and built.task.discriminator.num_layers == 1
    real_images = jnp.asarray(BATCH["image"] / 127.5 - 1, jnp.float32)
    assert (perceptual_distance(*built.extra, real_images, real_images[::-1]) > 0).any()


# Evaluation


def test_evaluation_leaves_padding_out(experiment):
    """Means over the images marked valid, whatever the others are."""
    state = jax.jit(experiment.task.init)(KEY)
    step = jax.jit(experiment.task.eval_step)
    valid = np.array([True, True, False, True, False, False])
    images = np.where(valid[:, None, None, None], BATCH["image"], 255).astype(np.uint8)
    one, other = (step(state, {"image": x, "valid": valid}) for x in (BATCH["image"], images))
    for name, mean in one.items():
        assert mean.count == 3 and np.isclose(mean.total, other[name].total, rtol=1e-5), name


def test_psnr():
    a = jnp.zeros((4, 4, 3))
    assert np.isclose(psnr(a + 0.2, a), 20.0, atol=1e-4)  # the range is 2: 10 log10(4 / 0.04)
    assert np.isclose(psnr(a, a), 10 * np.log10(4e10), rtol=1e-5)  # equal images: finite
