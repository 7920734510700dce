"""The sampler's loop: properties for any model, scale list, schedule, options and known tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.families.base import image_keys
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.families.hmar.sampler import Known, SamplerOptions, Trace, sample_scales
from hmar_jax.families.hmar.schedules import masking_plan, resolve_schedule
from hmar_jax.settings import declaration, kinds

V, Z, CLASSES = 11, 3, 4
IDS = jnp.array([0, 1, CLASSES])


@dataclasses.dataclass(frozen=True)
class Stub:
    """A model whose logits are a fixed random function of all its inputs."""

    scales: ScaleList
    z_channels: int = Z
    null_class: int = CLASSES

    def codebook(self, params):
        return jax.random.normal(jax.random.key(7), (V, Z))

    def downsample_to_scale(self, params, f, k):
        return f[:, : self.scales.sides[k], : self.scales.sides[k]].reshape(f.shape[0], -1, Z)

    def scale_contribution(self, params, vectors, k):
        side = self.scales.sides[k]
        f = vectors.reshape(-1, side, side, Z)
        return jnp.pad(f, ((0, 0), *((0, self.scales.side - side),) * 2, (0, 0))) / (k + 1)

    def next_scale_logits(self, params, class_ids, scale_inputs, k, kv_cache=None):
        position = jax.random.normal(jax.random.key(k), (self.scales.lengths[k], V))
        logits = jnp.sin(3 * scale_inputs @ params["a"] + position + class_ids[:, None, None]) * 3
        return logits, None

    def masked_logits(self, params, class_ids, scale_inputs, token_features, is_masked, k):
        seen = jnp.where(is_masked[..., None], 1.0, token_features).mean(1, keepdims=True)
        logits, _ = self.next_scale_logits(params, class_ids, scale_inputs + seen, k)
        return logits + is_masked[..., None]


class PositionStub(Stub):
    """A model whose logits depend on the position alone."""

    def next_scale_logits(self, params, class_ids, scale_inputs, k, kv_cache=None):
        return super().next_scale_logits(params, 0 * class_ids, 0 * scale_inputs, k)

    def masked_logits(self, params, class_ids, scale_inputs, token_features, is_masked, k):
        return self.next_scale_logits(params, class_ids, scale_inputs, k)[0]


PARAMS = {"a": jax.random.normal(jax.random.key(3), (Z, V))}


def options_of(**changes):
    return SamplerOptions.of(SamplingConfig(**changes))


def run(model, schedule, seed=0, *, ids=IDS, known=None, trace=None, **changes):
    """Features and tokens of sample_scales, with options by keyword."""
    keys = image_keys(jax.random.key(seed), len(ids))
    options, plan = options_of(**changes), masking_plan(schedule)
    return sample_scales(model, PARAMS, keys, ids, options, plan, known, trace)


def random_case(seed):
    """A scale list, its schedule, some, no or all tokens of three images known, and options."""
    rng = np.random.default_rng(seed)
    sides = np.sort(rng.choice(np.arange(1, 7), rng.integers(1, 5), replace=False))
    scales = ScaleList(tuple(int(s) for s in sides))
    rows = [(scales.lengths[0],)]
    for length in scales.lengths[1:]:
        cuts = np.sort(
            rng.choice(np.arange(1, length), rng.integers(0, min(length, 6)), replace=False)
        )
        rows.append(tuple(int(n) for n in np.diff([0, *cuts, length])))
    is_kept = rng.random((3, scales.length)) < rng.choice([0, 0.2, 0.5, 0.9, 1], (3, 1))
    tokens = jnp.asarray(rng.integers(0, V, (3, scales.length)), jnp.int32)
    changes = dict(
        guidance=1.0 if seed % 2 else 0.0,
        masked_guidance=0.5 if seed % 3 else 0.0,
        top_k=(0, 5)[seed % 2],
        smooth=seed % 5 == 0,
        choice_temperature=3.0 if seed % 4 else 0.0,
        temperature=(1.0, 0.7)[seed // 2 % 2],
    )
    return scales, resolve_schedule(scales, rows), Known(tokens, jnp.asarray(is_kept)), changes


@pytest.mark.parametrize("seed", range(24))
def test_every_token_is_fixed_once_and_counts_follow_the_schedule(seed):
    scales, schedule, known, changes = random_case(seed)
    trace = Trace()
    f_hat, tokens = run(Stub(scales), schedule, seed, known=known, trace=trace, **changes)
    tokens, is_kept = np.asarray(tokens), np.asarray(known.is_kept)
    assert np.array_equal(tokens[is_kept], np.asarray(known.tokens)[is_kept])
    assert np.isfinite(f_hat).all()
    assert [p.scale for p in trace.passes] == [k for k, row in enumerate(schedule) for _ in row]
    for k, row in enumerate(schedule):
        part, length = scales.slice(k), scales.lengths[k]
        editable = ~is_kept[:, part]
        passes = [p for p in trace.passes if p.scale == k]
        # Masked before each pass: first all that is editable, then what the pass predicts; in the
        # end nothing.
        masked_before = [
            editable,
            *(np.asarray(p.is_masked) for p in passes[1:]),
            np.zeros_like(editable),
        ]
        for j, (before, after) in enumerate(zip(masked_before, masked_before[1:])):
            assert not (after & ~before).any(), "a fixed token is masked again"
            num_masked = sum(row[j + 1 :]) * editable.sum(-1) // length
            assert np.array_equal(after.sum(-1), num_masked), (k, j)
            fixed = before & ~after
            final = tokens[:, part]
            for p in passes[j:]:  # a token does not change after the pass that fixes it
                assert np.array_equal(np.asarray(p.tokens)[fixed], final[fixed])


@pytest.mark.parametrize("seed", [1, 2, 8])
def test_loop_and_trace_agree(seed):
    """The compiled loop over masked passes equals unrolled passes, for any schedule.

    Only which scales have masked passes is part of the program.
    """
    scales, schedule, known, _ = random_case(seed)
    keys = image_keys(jax.random.key(seed), 3)
    options = options_of(guidance=0.5, masked_guidance=0.5, choice_temperature=1.0)
    arguments = (Stub(scales), PARAMS, keys, IDS, options)
    compiled = jax.jit(lambda plan: sample_scales(*arguments, plan, known))
    for count in (1, 2, 3):
        rows = [
            row if len(row) == 1 else (*range(1, 1 + min(count, len(row) - 1)),) for row in schedule
        ]
        rows = tuple(
            row if len(row) == 1 or sum(part) >= sum(row) else (*part, sum(row) - sum(part))
            for row, part in zip(schedule, rows)
        )
        plan = masking_plan(resolve_schedule(scales, rows))
        f_hat, tokens = sample_scales(*arguments, plan, known, Trace())
        found_f_hat, found_tokens = compiled(plan)
        assert np.array_equal(found_tokens, tokens)
        assert np.allclose(found_f_hat, f_hat, atol=1e-5)
    assert compiled._cache_size() <= 2


def test_confidence_decides_what_stays():
    """Without noise the most confident tokens are fixed first; with much noise others are."""
    scales, traces = ScaleList((1, 4)), {}
    for noise in (0.0, 50.0):
        traces[noise] = Trace()
        run(
            Stub(scales),
            ((1,), (8, 8)),
            ids=jnp.zeros(3, jnp.int32),
            trace=traces[noise],
            choice_temperature=noise,
        )
    first, second = traces[0.0].passes[1:]
    least_confident_fixed = np.where(second.is_masked, 2, first.confidence).min(-1)
    most_confident_masked = np.where(second.is_masked, first.confidence, -1).max(-1)
    assert (least_confident_fixed >= most_confident_masked).all()
    assert not np.array_equal(second.is_masked, traces[50.0].passes[2].is_masked)


def test_smooth_vectors_approach_the_tokens_at_the_last_scale():
    """At the last scale nearly all of a mixture is one entry: that of the returned token."""
    scales = ScaleList((1, 2, 4))
    model, trace = Stub(scales), Trace()
    f_hat, tokens = run(
        model,
        ((1,), (2, 2), (16,)),
        ids=jnp.zeros(3, jnp.int32),
        trace=trace,
        smooth=True,
    )
    before = [jnp.zeros_like(f_hat), *trace.f_hats]
    added = [np.asarray(b - a) for a, b in zip(before, trace.f_hats)]
    distance = []
    for k in range(3):
        vectors = model.codebook(PARAMS)[tokens[:, scales.slice(k)]]
        hard = model.scale_contribution(PARAMS, vectors, k)
        distance.append(float(np.linalg.norm(added[k] - hard) / np.linalg.norm(hard)))
    assert distance[0] > 0.02 > distance[2], distance


# Temperature

SCALES = ScaleList((1, 2, 4))
PASSES = ((1,), (1, 3), (4, 4, 8))


def test_temperature_of_one_changes_no_bit():
    model = Stub(SCALES)
    plain = run(model, PASSES, guidance=1.0)
    given = run(model, PASSES, guidance=1.0, temperature=1.0)
    # 1.0 in the program that divides by a traced temperature
    options = options_of(guidance=1.0, temperature=0.5)
    options = dataclasses.replace(options, traced=options.traced | {"temperature": 1.0})
    assert "temperature" in options.enabled
    keys, plan = image_keys(jax.random.key(0), 3), masking_plan(PASSES)
    divided = sample_scales(model, PARAMS, keys, IDS, options, plan)
    for f_hat, tokens in (given, divided):
        assert np.array_equal(tokens, plain[1])
        assert np.asarray(f_hat).tobytes() == np.asarray(plain[0]).tobytes()


def test_low_temperature_approaches_greedy():
    model, ids = Stub(SCALES), jnp.arange(20) % CLASSES
    one_pass = resolve_schedule(SCALES, "none")
    _, greedy = run(model, one_pass, ids=ids, greedy=True)
    _, cold = run(model, one_pass, ids=ids, temperature=1e-4)
    _, plain = run(model, one_pass, ids=ids)
    assert np.array_equal(cold, greedy) and not np.array_equal(plain, greedy)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    """Tokens follow softmax(logits / T), and confidence is their probability under it."""
    model, trace = PositionStub(ScaleList((1,))), Trace()
    ids = jnp.zeros(20000, jnp.int32)
    _, tokens = run(model, ((1,),), ids=ids, trace=trace, temperature=temperature)
    logits = trace.passes[0].logits[0, 0]
    expected = np.asarray(jax.nn.softmax(logits / temperature))
    found = np.bincount(tokens[:, 0], minlength=V) / len(ids)
    np.testing.assert_allclose(found, expected, atol=0.015)
    np.testing.assert_allclose(trace.passes[0].confidence[:, 0], expected[tokens[:, 0]], rtol=1e-5)


def test_temperature_acts_on_next_scale_passes_only():
    model, schedule, ids = PositionStub(SCALES), ((1,), (4,), (2, 14)), jnp.zeros(8, jnp.int32)
    plain, cold = Trace(), Trace()
    run(model, schedule, ids=ids, trace=plain)
    run(model, schedule, ids=ids, trace=cold, temperature=0.05)
    for a, b in zip(plain.passes, cold.passes):
        assert np.array_equal(a.logits, b.logits)  # recorded before temperature
    assert not np.array_equal(plain.passes[2].tokens, cold.passes[2].tokens)
    a, b = plain.passes[3], cold.passes[3]  # the masked pass
    both = np.asarray(a.is_masked & b.is_masked)
    assert both.sum() >= 8 * 12
    assert np.array_equal(np.asarray(a.tokens)[both], np.asarray(b.tokens)[both])
    assert np.array_equal(np.asarray(a.confidence)[both], np.asarray(b.confidence)[both])


# Static and traced options


def two_values(field):
    """Two values in the option's range that switch it on."""
    kind = kinds(SamplingConfig, field)
    if bool in kind:
        return (True, True)
    if int in kind:
        return (5, 3)
    return (0.9, 0.5) if declaration(field).at_most == 1 else (0.5, 2.0)


FIELDS = [field for field in dataclasses.fields(SamplingConfig) if field.name != "schedule"]
TRACED = {
    field.name: two_values(field) for field in FIELDS if float in kinds(SamplingConfig, field)
}
STATIC = {field.name: two_values(field)[0] for field in FIELDS if field.name not in TRACED}


def test_every_option_is_static_or_traced():
    """The schedule is neither: it becomes a MaskingPlan."""
    assert {"guidance", "temperature", "top_p"} <= set(TRACED) and "top_k" in STATIC
    options = options_of()
    assert set(options.traced) == set(TRACED) and not options.enabled
    assert dict(options.static).keys() == STATIC.keys()
    assert len(jax.tree.leaves(options)) == len(TRACED)


@pytest.mark.parametrize("name", TRACED)
def test_another_value_compiles_nothing(name):
    """Except where it switches the option on or off."""
    model, keys = Stub(ScaleList((1, 2))), image_keys(jax.random.key(0), 3)
    plan = masking_plan(((1,), (1, 3)))
    compiled = jax.jit(lambda options: sample_scales(model, PARAMS, keys, IDS, options, plan))
    off, (one, two) = getattr(SamplingConfig(), name), TRACED[name]
    sizes, tokens = [], []
    for value in (off, one, two, off):
        tokens.append(compiled(options_of(**{name: value}))[1])
        sizes.append(compiled._cache_size())
    assert sizes == [1, 2, 2, 2]
    assert np.array_equal(tokens[0], tokens[3])
    for value, found in zip((one, two), tokens[1:3]):  # the traced value has its effect
        _, expected = run(model, ((1,), (1, 3)), **{name: value})
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("name, value", STATIC.items())
def test_static_options_are_part_of_the_program(name, value):
    same, other = options_of(), options_of(**{name: value})
    assert jax.tree.structure(same) == jax.tree.structure(options_of(**{name: type(value)(0)}))
    assert jax.tree.structure(same) != jax.tree.structure(other)


def test_top_p_of_one_is_off():
    assert not options_of(top_p=1.0).enabled and options_of(top_p=0.99).enabled == {"top_p"}
