"""Every pass of the sampler, next-scale and masked, against the published code's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.convert import tokenizer_from_state
from hmar_jax.autoencoders.scales import ScaleList
from hmar_jax.families.base import image_keys
from hmar_jax.families.hmar import convert
from hmar_jax.families.hmar.combined import CombinedModel
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.families.hmar.sampler import SamplerOptions, Trace, least_confident, sample
from hmar_jax.families.hmar.schedules import masking_plan, resolve_schedule
from hmar_jax.families.hmar.spec import HmarSpec
from tests.conftest import relative

SCALES = ScaleList((1, 2, 3, 4, 6))


@pytest.fixture(scope="module")
def parts(golden_state):
    tokenizer, tokenizer_params = tokenizer_from_state(golden_state("vae", "tokenizer"), SCALES)
    config, transformer = convert.transformer_from_state(
        golden_state("next_scale", "transformer"), SCALES
    )
    masked = convert.masked_from_state(
        golden_state("masked", "transformer"), config, ["blocks.2", "blocks.3"], "head"
    )
    params = {"tokenizer": tokenizer_params, "transformer": transformer, "masked": masked}
    spec = HmarSpec(tokenizer, config, masked_depth=2)
    return CombinedModel(spec), jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("case", [*"abcd", pytest.param("e", marks=pytest.mark.slow)])
def test_every_pass_of_recorded_case(case, parts, load_golden):
    model, params = parts
    z = load_golden("hmar")
    recorded = {"a": '"none"', "b": str(z["schedule_b"])}.get(case, str(z["schedule_c"]))
    plan = masking_plan(resolve_schedule(SCALES, json.loads(recorded)))
    options = SamplerOptions.of(
        SamplingConfig(
            guidance=0.0 if case == "d" else float(z["cfg"]),
            greedy=True,
            top_k=12 if case == "e" else 0,
            top_p=0.995 if case == "e" else 0.0,
        )
    )
    keys, ids = image_keys(jax.random.key(0), 2), jnp.asarray(z["labels"])

    @jax.jit
    def run(params):
        trace = Trace()
        images, tokens = sample(model, params, keys, ids, options, plan, trace)
        passes = [p._replace(scale=jnp.array(p.scale)) for p in trace.passes]
        return images, tokens, passes, trace.f_hats

    images, tokens, passes, f_hats = run(params)
    assert [int(p.scale) for p in passes] == z[f"{case}/pass_scale"].tolist()
    for i, p in enumerate(passes):
        name = f"{case}/pass{i:02}"
        assert np.array_equal(p.is_masked, z[f"{name}_mask"]), name
        assert np.array_equal(jnp.argmax(p.logits, -1), z[f"{name}_tokens"]), name
        assert np.array_equal(p.tokens, z[f"{name}_merged"]), name
        np.testing.assert_allclose(p.confidence, z[f"{name}_conf"], rtol=1e-4, atol=1e-7)
        if f"{name}_logits" in z:
            assert relative(p.logits, z[f"{name}_logits"]) < 1e-4
    assert np.array_equal(tokens, z[f"{case}/tokens_BL"])
    for k, f_hat in enumerate(f_hats):
        assert relative(f_hat, np.moveaxis(z[f"{case}/fhat_scale{k}"], 1, -1)) < 1e-4
    if f"{case}/image" in z:
        assert relative(images, np.moveaxis(z[f"{case}/image"], 1, -1)) < 1e-4

    if case not in "de":
        return
    # As users run it: without a trace, the passes of a scale in one loop.
    again = jax.jit(lambda plan: sample(model, params, keys, ids, options, plan))(plan)
    assert np.array_equal(again[1], tokens) and relative(again[0], images) < 1e-5


def test_least_confident():
    confidence = jnp.array([[0.9, 0.1, 0.5, 0.2]])
    assert least_confident(confidence, jnp.ones((1, 4), bool), 2).tolist() == [
        [False, True, False, True]
    ]
    among = jnp.array([[True, False, True, True]])
    assert least_confident(confidence, among, 2).tolist() == [[False, False, True, True]]
    assert not least_confident(confidence, among, 0).any()
