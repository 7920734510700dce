"""Properties of the sampler's loop that hold for any model, scale list, schedule and set of known tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.families.hmar import schedules
from hmar_jax.families.hmar.sampler import Draw, Known, Strength, Trace, image_keys, sample_scales

V, Z, CLASSES = 11, 3, 4


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model whose logits are a fixed random function of all that it is given."""

    scales: ScaleList
    z_channels: int = Z
    null_class: int = CLASSES

    def codebook(self, params):
        return jax.random.normal(jax.random.key(7), (V, Z))

    def area(self, params, k, f):
        return f[:, : self.scales.sides[k], : self.scales.sides[k]].reshape(f.shape[0], -1, Z)

    def residual(self, params, k, vectors):
        side = self.scales.sides[k]
        f = vectors.reshape(-1, side, side, Z)
        return jnp.pad(f, ((0, 0), *((0, self.scales.side - side),) * 2, (0, 0))) / (k + 1)

    def next_scale_logits(self, params, k, class_ids, codes, past=None):
        position = jax.random.normal(jax.random.key(k), (self.scales.lengths[k], V))
        return jnp.sin(3 * codes @ params["a"] + position + class_ids[:, None, None]) * 3, None

    def masked_logits(self, params, k, class_ids, codes, own_codes, masked):
        seen = jnp.where(masked[..., None], 1.0, own_codes).mean(1, keepdims=True)
        return self.next_scale_logits(params, k, class_ids, codes + seen)[0] + masked[..., None]


PARAMS = {"a": jax.random.normal(jax.random.key(3), (Z, V))}


def random_case(seed):
    """A scale list, a schedule for it, and known tokens of three images: some, none or all of them kept."""
    rng = np.random.default_rng(seed)
    sides = np.sort(rng.choice(np.arange(1, 7), rng.integers(1, 5), replace=False))
    scales = ScaleList(tuple(int(s) for s in sides))
    rows = [(scales.lengths[0],)]
    for length in scales.lengths[1:]:
        cuts = np.sort(
            rng.choice(np.arange(1, length), rng.integers(0, min(length, 6)), replace=False)
        )
        rows.append(tuple(int(n) for n in np.diff([0, *cuts, length])))
    keep = rng.random((3, scales.length)) < rng.choice([0, 0.2, 0.5, 0.9, 1], (3, 1))
    known = Known(jnp.asarray(rng.integers(0, V, (3, scales.length)), jnp.int32), jnp.asarray(keep))
    draw = Draw(
        guided=bool(seed % 2),
        masked_guided=bool(seed % 3),
        top_k=(0, 5)[seed % 2],
        smooth=seed % 5 == 0,
        noisy_confidence=bool(seed % 4),
    )
    return scales, schedules.resolve(scales, rows), known, draw


@pytest.mark.parametrize("seed", range(24))
def test_every_token_is_fixed_once_and_counts_follow_the_schedule(seed):
    scales, schedule, known, draw = random_case(seed)
    trace = Trace()
    strength = Strength(guidance=1.0, masked_guidance=0.5, confidence_noise=3.0)
    f_hat, tokens = sample_scales(
        Stub(scales),
        PARAMS,
        image_keys(jax.random.key(seed), 3),
        jnp.array([0, 1, CLASSES]),
        draw,
        strength,
        schedules.plan(schedule),
        known,
        trace,
    )
    tokens, keep = np.asarray(tokens), np.asarray(known.keep)
    assert np.array_equal(tokens[keep], np.asarray(known.tokens)[keep]) and np.isfinite(f_hat).all()
    assert [p.scale for p in trace.passes] == [k for k, row in enumerate(schedule) for _ in row]
    for k, row in enumerate(schedule):
        part, length = scales.slice(k), scales.lengths[k]
        free = ~keep[:, part]
        passes = [p for p in trace.passes if p.scale == k]
        # What is open before each pass: first all that is free, then what the pass is asked to predict; nothing in the end.
        open_before = [free, *(np.asarray(p.masked) for p in passes[1:]), np.zeros_like(free)]
        for j, (before, after) in enumerate(zip(open_before, open_before[1:])):
            assert not (after & ~before).any(), "a fixed token is open again"
            left = sum(row[j + 1 :]) * free.sum(-1) // length
            assert np.array_equal(after.sum(-1), left), (k, j)
            fixed = before & ~after
            final = tokens[:, part]
            for p in passes[j:]:  # from the pass that fixed it on, a token stays
                assert np.array_equal(np.asarray(p.tokens)[fixed], final[fixed])


@pytest.mark.parametrize("seed", [1, 2, 8])
def test_loop_and_record_agree(seed):
    """The compiled loop over masked passes does what the unrolled passes do, for schedules that it was not compiled for."""
    scales, schedule, known, draw = random_case(seed)
    arguments = (
        Stub(scales),
        PARAMS,
        image_keys(jax.random.key(seed), 3),
        jnp.array([0, 1, CLASSES]),
        draw,
        Strength(0.5, 0.5, 1.0, 1.0),
    )
    compiled = jax.jit(lambda plan: sample_scales(*arguments, plan, known))
    for count in (1, 2, 3):
        rows = [
            row if len(row) == 1 else (*range(1, 1 + min(count, len(row) - 1)),) for row in schedule
        ]
        rows = tuple(
            row if len(row) == 1 or sum(part) >= sum(row) else (*part, sum(row) - sum(part))
            for row, part in zip(schedule, rows)
        )
        plan = schedules.plan(schedules.resolve(scales, rows))
        f_hat, tokens = sample_scales(*arguments, plan, known, Trace())
        assert np.array_equal(compiled(plan)[1], tokens) and np.allclose(
            compiled(plan)[0], f_hat, atol=1e-5
        )
    assert (
        compiled._cache_size() <= 2
    )  # what is compiled anew is which scales have masked passes, and nothing else


def test_confidence_decides_what_stays():
    """Without noise the surest tokens are fixed first; with much noise others are."""
    scales = ScaleList((1, 4))
    trace = {}
    for noise in (0.0, 50.0):
        trace[noise] = Trace()
        sample_scales(
            Stub(scales),
            PARAMS,
            image_keys(jax.random.key(0), 3),
            jnp.zeros(3, jnp.int32),
            Draw(guided=False, noisy_confidence=noise > 0),
            Strength(confidence_noise=noise),
            schedules.plan(((1,), (8, 8))),
            trace=trace[noise],
        )
    first, second = trace[0.0].passes[1:]
    least_sure_fixed = np.where(second.masked, 2, first.confidence).min(-1)
    surest_open = np.where(second.masked, first.confidence, -1).max(-1)
    assert (least_sure_fixed >= surest_open).all()
    assert not np.array_equal(second.masked, trace[50.0].passes[2].masked)


def test_smooth_codes_approach_the_tokens_at_the_last_scale():
    """At the last scale nearly all of a smooth code is one entry: the returned token's."""
    scales = ScaleList((1, 2, 4))
    model = Stub(scales)
    trace = Trace()
    f_hat, tokens = sample_scales(
        model,
        PARAMS,
        image_keys(jax.random.key(0), 3),
        jnp.zeros(3, jnp.int32),
        Draw(guided=False, smooth=True),
        Strength(),
        schedules.plan(((1,), (2, 2), (16,))),
        trace=trace,
    )
    added = [
        np.asarray(b - a) for a, b in zip([jnp.zeros_like(f_hat), *trace.f_hats], trace.f_hats)
    ]
    distance = []
    for k in range(3):
        hard = model.residual(PARAMS, k, model.codebook(PARAMS)[tokens[:, scales.slice(k)]])
        distance.append(float(np.linalg.norm(added[k] - hard) / np.linalg.norm(hard)))
    assert distance[0] > 0.02 > distance[2], distance
