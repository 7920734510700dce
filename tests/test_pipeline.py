"""Pipelines: images do not depend on their neighbours, and what was saved comes back."""

import dataclasses
import gc
import inspect
import shutil
import subprocess
import sys
import warnings
import weakref

import jax
import numpy as np
import pytest

import hmar_jax
from hmar_jax import loading, pipeline
from hmar_jax.cli import main as cli
from hmar_jax.errors import InputError
from hmar_jax.experiment import build_experiment
from tests import tiny

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def pipe():
    return hmar_jax.load(str(tiny.model_run()))


@pytest.fixture(scope="module")
def sample_images():
    """uint8 (6, h, w, 3)."""
    rng = np.random.default_rng(5)
    return np.stack([tiny.image(label % 3, rng, tiny.SIDE) for label in range(6)])


# Sampling


def test_shapes(pipe):
    side, length = tiny.SIDE, tiny.LENGTH
    for one in (1, np.int64(1), "cross", "1", None, jax.numpy.array(1)):
        images, tokens = pipe.sample(KEY, one, return_tokens=True)
        assert images.shape == (side, side, 3) and images.dtype == np.float32
        assert tokens.shape == (length,) and tokens.dtype == np.int32
    assert pipe.sample(KEY, [1]).shape == (1, side, side, 3)
    images, tokens = pipe.sample(KEY, [0, "cross", 2], return_tokens=True)
    assert images.shape == (3, side, side, 3) and tokens.shape == (3, length)
    assert (
        images.min() >= 0 and images.max() <= 1 and 0 <= tokens.min() and tokens.max() < tiny.VOCAB
    )
    assert np.array_equal(pipe.sample(KEY, np.array([0, 1, 2])), images)
    assert np.array_equal(pipe.sample(KEY, ("circle", "cross", "stripes")), images)


def test_an_image_is_the_same_alone_and_in_any_batch(pipe):
    ids = [2, 0, 1, 1, 0, 2, 2]
    _, seven = pipe.sample(KEY, ids, return_tokens=True)
    _, three = pipe.sample(KEY, ids[:3], return_tokens=True)
    _, alone = pipe.sample(KEY, ids[0], return_tokens=True)
    assert np.array_equal(seven[:3], three) and np.array_equal(three[0], alone)
    assert len(np.unique(seven, axis=0)) > 2
    _, others = pipe.sample(
        KEY, [ids[0], 1, 2], return_tokens=True
    )  # its neighbours' classes do not matter either
    assert np.array_equal(others[0], alone)
    _, other_key = pipe.sample(jax.random.key(4), ids, return_tokens=True)
    assert not np.array_equal(other_key, seven)


_SHARDED = """
import sys, jax, numpy as np, hmar_jax
from hmar_jax import loading, pipeline

pipe, key = hmar_jax.load(sys.argv[1]), jax.random.key(11)
ids = [i % pipe.spec.num_classes for i in (7, 0, 3, 3, 9, 5, 1)]
assert jax.device_count() == 8
images, seven = pipe.sample(key, ids, return_tokens=True)
spread = hmar_jax.load(sys.argv[1], devices=jax.devices())
many_images, many = spread.sample(key, ids + ids[::-1] + ids[:2], return_tokens=True)
assert len(many.sharding.device_set) == 8
assert np.array_equal(many[:7], seven) and np.allclose(many_images[:7], images, atol=1e-5)
image_keys = pipeline.image_keys
for i in range(7):
    pipeline.image_keys = lambda rng, count: image_keys(rng, 7)[i:i + 1]
    assert np.array_equal(pipe.sample(key, ids[i], return_tokens=True)[1], seven[i])
print("agrees")
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "digits"])
def test_an_image_is_the_same_on_eight_devices(model):
    """With masked passes and guidance; in its own process, as JAX counts devices at its start."""
    name = str(tiny.masked_run()) if model == "tiny" else model
    result = subprocess.run(
        [sys.executable, "-c", _SHARDED, name],
        env={**tiny.ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "agrees\n", result.stderr


def test_more_than_one_batch(pipe, monkeypatch):
    """70 images are sampled as 64 and 6; each is what its own key gives in a batch of 7."""
    ids = np.arange(70) % 3
    images, tokens = pipe.sample(KEY, ids, return_tokens=True)
    assert images.shape[0] == tokens.shape[0] == 70
    keys = pipeline.image_keys(KEY, 70)
    for start in range(0, 70, 7):
        part = slice(start, start + 7)
        monkeypatch.setattr(pipeline, "image_keys", lambda rng, count: keys[part])
        some_images, some_tokens = pipe.sample(KEY, ids[part], return_tokens=True)
        assert np.array_equal(some_tokens, tokens[part])
        assert np.allclose(some_images, images[part], atol=1e-5)


def test_a_batch_has_the_same_bits_whichever_others_are_sampled(pipe):
    ids = np.arange(11) % 3
    batches = list(pipe.sample_batches(KEY, ids, batch_size=4))
    assert [(b.number, b.start, len(b.images)) for b in batches] == [
        (0, 0, 4),
        (1, 4, 4),
        (2, 8, 3),
    ]
    assert np.array_equal(np.concatenate([b.class_ids for b in batches]), ids)
    again = list(pipe.sample_batches(KEY, ids.tolist(), batch_size=4, which=[2, 0]))
    for ours, theirs in zip(again, (batches[2], batches[0]), strict=True):
        assert np.array_equal(ours.images, theirs.images)
    images, tokens = pipe.sample(KEY, ids, return_tokens=True)
    assert np.array_equal(np.concatenate([b.latents for b in batches]), tokens)
    assert np.allclose(np.concatenate([b.images for b in batches]), images, atol=1e-5)
    hot = next(pipe.sample_batches(KEY, ids, batch_size=4, temperature=50.0))
    assert not np.array_equal(hot.latents, batches[0].latents)


def test_batches_are_checked_at_once_and_sampled_when_they_are_needed(pipe, monkeypatch):
    for options in (dict(class_id=[0, 7]), dict(class_id=np.array([0, 7])), dict(top_k=99)):
        with pytest.raises(InputError):
            pipe.sample_batches(KEY, **{"class_id": [0], **options})
    calls, keys = [], pipeline.image_keys
    count = lambda rng, count, start: calls.append(start) or keys(rng, count, start)
    monkeypatch.setattr(pipeline, "image_keys", count)
    batches = pipe.sample_batches(KEY, np.zeros(10**6, int), batch_size=4)
    assert calls == [] and next(batches).start == 0
    assert calls == [0, 4], "the devices compute one batch ahead"
    assert list(pipe.sample_batches(KEY, [0], which=[])) == []
    with pytest.raises(InputError, match=r"in which must be an integer in \[0, 1\]; got 2"):
        next(pipe.sample_batches(KEY, [0] * 5, batch_size=4, which=iter([2])))
    for which in ([1.0], [True], [0, 9], [-1], "12"):  # at once, not at the first batch
        with pytest.raises(InputError, match=r"in which must be an integer in \[0, [0-9]+\]; got"):
            pipe.sample_batches(KEY, [0, 1, 2], batch_size=2, which=which)
    with pytest.raises(InputError, match=r"which must be numbers of batches, .*; got 3"):
        pipe.sample_batches(KEY, [0, 1, 2], batch_size=2, which=3)
    with pytest.raises(InputError, match="batch_size must be an integer of at least 1; got True"):
        pipe.sample_batches(KEY, [0, 1, 2], batch_size=True)
    with pytest.raises(InputError, match="batch_size must be an integer of at least 1; got 0"):
        pipe.sample_batches(KEY, [0], batch_size=0)


def test_progress_of_sampling_is_reported(pipe):
    done = []
    pipe.sample(KEY, np.zeros(70, int), on_progress=done.append)
    assert done == [64, 6]


def test_the_fingerprint_of_a_model(pipe):
    whole = loading.fingerprint(pipe.spec, pipe.params)
    spec, params = loading.load_spec_and_params(str(tiny.model_run()))
    assert loading.fingerprint(spec.with_dtype("bfloat16"), params) == whole
    leaf = jax.tree.leaves(params)[-1]
    changed = jax.tree.map(lambda x: x + (x is leaf), params)
    assert loading.fingerprint(spec, changed) != whole
    renamed = dataclasses.replace(spec, class_names=("a", "b", "c"))
    assert loading.fingerprint(renamed, params) != whole
    assert loading.fingerprint(dataclasses.replace(spec, origin="x"), params) == whole


def test_other_numbers_compile_nothing(pipe):
    pipe.sample(KEY, 1, guidance=1.0)
    compiled = pipe._sampler._sample._cache_size()
    images = [pipe.sample(KEY, 1, guidance=g) for g in (0.5, 2, 30.0)]
    assert pipe._sampler._sample._cache_size() == compiled
    assert not np.array_equal(images[0], images[2])
    assert np.array_equal(
        pipe.sample(KEY, 1, top_k=0, top_p=0.0), pipe.sample(KEY, 1, top_p=1.0)
    )  # both off
    assert pipe._sampler._sample._cache_size() == compiled


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(class_id=3), r"class must be an id in \[0, 2\]; got 3"),
        (dict(class_id=-1), "got -1"),
        (dict(class_id=[0, 7]), "got 7"),
        (dict(class_id=[]), "empty"),
        (dict(class_id="dog"), "circle, cross.*'dog'"),
        (dict(class_id=1.5), "got 1.5"),
        (dict(class_id=True), "got True"),
        (dict(class_id=1, guidance=-1), "guidance must be a number of at least 0; got -1"),
        (dict(class_id=1, top_p=1.1), r"top_p must be a number in \[0, 1\]; got 1.1"),
        (dict(class_id=1, top_k=17), r"top_k must be in \[0, 16\]; got 17"),
        (dict(class_id=1, strength=1), "unknown option 'strength'; known: "),
        (dict(class_id=1, rng=0.0), "rng must be a random key"),
    ],
)
def test_wrong_options(pipe, options, words):
    with pytest.raises(InputError, match=words):
        pipe.sample(options.pop("rng", KEY), **options)


def test_the_short_call_keeps_its_pipe():
    name = str(tiny.model_run())
    with tiny.cached():
        hmar_jax._loaded.cache_clear()
        first = hmar_jax.sample(KEY, 1, model=name, guidance=0)
        again = hmar_jax.sample(KEY, class_id=1, model=name, guidance=0)
    assert hmar_jax._loaded.cache_info().misses == 1 and hmar_jax._loaded.cache_info().hits == 1
    assert first.shape == (tiny.SIDE, tiny.SIDE, 3) and np.array_equal(first, again)


# Encoding and decoding


def test_encode_and_decode(pipe, sample_images):
    tokens = pipe.encode(sample_images)
    assert tokens.shape == (6, tiny.LENGTH) and tokens.dtype == np.int32
    assert np.array_equal(pipe.encode(sample_images[2]), tokens[2])
    assert np.array_equal(pipe.encode(sample_images / np.float32(255)), tokens)
    assert np.array_equal(pipe.encode(sample_images.astype(np.float64) / 255), tokens)
    images = pipe.decode(tokens)
    assert images.shape == (6, tiny.SIDE, tiny.SIDE, 3) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    one = pipe.decode(np.asarray(tokens[2], np.int64))
    assert one.shape == images.shape[1:] and np.allclose(one, images[2], atol=1e-5)


def test_decoding_what_was_encoded_is_the_tokenizers_reconstruction(pipe, sample_images):
    with tiny.cached():
        task = build_experiment(tiny.config_of(tiny.train_tokenizer("unused"))).task
        preview = jax.jit(lambda params: task.preview(params, {}, sample_images, KEY, 80))
        originals, reconstructions = preview(pipe.params["tokenizer"])
    assert np.allclose(originals, sample_images / 255, atol=1e-6)
    images = pipe.decode(pipe.encode(sample_images))
    assert np.allclose(images, reconstructions, atol=1e-4)


def test_sampled_images_are_their_tokens_decoded(pipe):
    images, tokens = pipe.sample(KEY, [0, 1, 2], return_tokens=True)
    assert np.allclose(pipe.decode(tokens), images, atol=1e-5)


def test_images_of_another_size_are_resized_with_a_warning(pipe, sample_images):
    large = sample_images[0].repeat(3, axis=0).repeat(2, axis=1)
    with pytest.warns(
        UserWarning, match="resizing an image of 16x24 to 8x8, the model's size"
    ) as caught:
        tokens = pipe.encode(large)
    assert tokens.shape == (tiny.LENGTH,) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode(sample_images[0])


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((8, 8), np.uint8), r"got \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), "shape"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((8, 8, 3), np.int32), "got int32"),
        (np.full((8, 8, 3), 1.5), r"float images must lie in \[0, 1\]; got .*1.5"),
        (np.full((8, 8, 3), -0.1), "-0.1"),
        (np.full((8, 8, 3), np.nan), "nan"),
    ],
)
def test_wrong_images(pipe, image, words):
    with pytest.raises(InputError, match=words):
        pipe.encode(image)


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.zeros(4, int), r"shape \(5,\) or \(B, 5\); got int64 of shape \(4,\)"),
        (np.zeros((1, 1, 5), int), "shape"),
        (np.zeros(5), "float64"),
        (np.full(5, 16), r"tokens must be in \[0, 15\]; got values in \[16, 16\]"),
        (np.full(5, -1), "-1"),
    ],
)
def test_wrong_tokens(pipe, tokens, words):
    with pytest.raises(InputError, match=words):
        pipe.decode(tokens)


# Loading


def test_run_and_exported_directories_sample_alike(pipe, tmp_path):
    run, ids = str(tiny.model_run()), [0, 1, 2]
    with tiny.cached():
        assert (
            cli.main(["export", f"--model={run}", f"--out={tmp_path / 'whole'}", "--licence=none"])
            == 0
        )
        assert cli.main(["export", f"--model={run}", f"--out={tmp_path / 'half'}", "--half"]) == 0
    whole, half = (hmar_jax.load(str(tmp_path / name)) for name in ("whole", "half"))
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "config.json",
        "params",
        "README.md",
    }
    assert whole.spec.licence == "none" and "none" in (tmp_path / "whole/README.md").read_text()
    assert half.spec == pipe.spec
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(pipe.params),
        jax.tree.leaves(whole.params),
        jax.tree.leaves(half.params),
    ):
        assert np.array_equal(a, b), path
        assert c.dtype == np.float32 and np.allclose(a, c, rtol=1e-3, atol=1e-6), path
    _, wanted = pipe.sample(KEY, ids, return_tokens=True)
    _, tokens = whole.sample(KEY, ids, return_tokens=True)
    assert np.array_equal(tokens, wanted)
    _, tokens = half.sample(KEY, ids, return_tokens=True)
    assert np.mean(tokens == wanted) > 0.6  # a token that changes changes those after it
    size = lambda folder: sum(
        p.stat().st_size for p in (tmp_path / folder / "params").rglob("*") if p.is_file()
    )
    assert size("half") < size("whole")


def test_a_tokenizer_alone(sample_images):
    with tiny.cached():
        alone = hmar_jax.load(str(tiny.tokenizer_run()))
        assert alone.encode(sample_images).shape == (6, tiny.LENGTH)
        with pytest.raises(InputError, match="an autoencoder alone"):
            alone.sample(KEY, 1)


def test_what_cannot_be_loaded(tmp_path):
    fails = lambda name, words: pytest.raises(InputError, match=words)
    for name in ("nope", "", str(tmp_path), str(tmp_path / "a/b"), "x" * 300):
        with fails(name, "must be a bundled model"):
            hmar_jax.load(name)
    copy = shutil.copytree(tiny.model_run(), tmp_path / "copy")
    for step in (60, 80):
        shutil.rmtree(copy / f"checkpoints/{step}")
    with fails(copy, "has no checkpoints"):
        hmar_jax.load(str(copy))
    shutil.rmtree(copy / "tokenizer")
    (copy / "config.json").write_text("{")
    with fails(copy, "is not JSON"):
        hmar_jax.load(str(copy))
    (copy / "config.json").write_text('{"format": "other"}')
    with pytest.raises(InputError):
        hmar_jax.load(str(copy))


# Seeds and keys


def test_a_seed_in_place_of_a_key(pipe, sample_images):
    expected = pipe.sample(jax.random.key(3), [0, 1])
    for rng in (
        3,
        np.int64(3),
        np.uint32(3),
        np.array(3),
        jax.numpy.int32(3),
        jax.random.PRNGKey(3),
    ):
        assert np.array_equal(pipe.sample(rng, [0, 1]), expected), rng
    assert np.array_equal(pipe.sample(np.asarray(jax.random.PRNGKey(3)), [0, 1]), expected)
    mask = np.zeros(sample_images.shape[1:3], bool)
    mask[:4] = True
    edited = [pipe.edit(rng, sample_images[0], mask, 1) for rng in (5, jax.random.key(5))]
    assert np.array_equal(*edited)


@pytest.mark.parametrize(
    "rng, got",
    [
        (-1, "-1"),
        (2**32, "4294967296"),
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        ("3", "'3'"),
        (np.zeros(2), r"float64 of shape \(2,\)"),
        (np.zeros(3, np.uint32), r"uint32 of shape \(3,\)"),
        (jax.random.split(jax.random.key(0), 2), r"key<fry> of shape \(2,\)"),
    ],
)
def test_no_seed_and_no_key(pipe, rng, got):
    message = rf"rng must be a random key, such as jax.random.key\(0\), or a seed, .*; got {got}"
    with pytest.raises(InputError, match=message):
        pipe.sample(rng, 0)


# Classes by name


def test_classes_by_name():
    names = (
        "golden_retriever",
        "crane",
        "Great-Dane",
        "crane",
        "5",
        "tiger cat",
        "x",
        "y",
        "z",
        "CRANE",
    )
    resolve = lambda given: pipeline.resolve_class(given, 10, names)
    for given, expected in (
        ("golden_retriever", 0),
        ("Golden Retriever", 0),
        (" golden-retriever ", 0),
        ("great_dane", 2),
        ("tiger_cat", 5),
        ("CRANE", 9),
        ("id:5", 5),
        ("name:5", 4),
        (3, 3),
        ("0", 0),
    ):
        assert resolve(given) == expected, given
    with pytest.raises(
        InputError, match="class 'crane': 2 classes have this name; give an id: id:1, id:3"
    ):
        resolve("crane")
    with pytest.raises(InputError, match="'Crane': 3 classes .*: id:1, id:3, id:9"):
        resolve("Crane")
    message = r"id in \[0, 9\], or a name such as golden_retriever, .*; got 'retriever'"
    with pytest.raises(InputError, match=message):
        resolve("retriever")
    with pytest.raises(InputError, match=r"id in \[0, 9\]; got -1"):
        resolve("-1")


# What a loaded model says of itself


def test_a_pipeline_documents_the_options_of_its_family(pipe):
    parameters = inspect.signature(pipe.sample).parameters
    assert list(parameters)[:2] == ["rng", "class_id"]
    assert {"guidance", "temperature", "top_k", "schedule", "choice_temperature"} <= set(parameters)
    assert "temperature: Temperature of next-scale passes" in pipe.sample.__doc__
    assert {"dilation", "feather", "paste"} <= set(inspect.signature(pipe.edit).parameters)
    count = sum(x.size for x in jax.tree.leaves(pipe.params))
    assert repr(pipe) == (
        "<Pipeline: HMAR, next-scale prediction, 8 x 8 pixels, 3 classes, "
        f"{count:,} parameters, 1 x cpu>"
    )
    assert "guidance: Classifier-free guidance of next-scale passes; 0: none. (of at least 0; " in (
        pipe.sample.__doc__
    )
    own = pipe.spec.sampling.guidance
    assert own != 0 and f"default {own!r})" in pipe.sample.__doc__  # the model's, not the class's


def test_a_pipeline_is_freed_without_the_garbage_collector():
    """A second large model finds the first one's memory free."""
    pipe = pipeline.Pipeline(*loading.load_spec_and_params("digits"))
    gone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe
        assert gone() is None
    finally:
        gc.enable()


def test_methods_can_be_overridden():
    class Mine(pipeline.Pipeline):
        def sample(self, rng, class_id=None, **options):
            return "mine"

    pipe = Mine(*loading.load_spec_and_params("digits"))
    assert isinstance(pipe, Mine) and pipe.sample(jax.random.key(0)) == "mine"
    assert "temperature" in inspect.signature(pipe.sample).parameters
