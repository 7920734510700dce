"""Transforms, the loader and its state, on sources that are small enough to check by hand."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from hmar_jax.autoencoders.vq import to_float
from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import (
    loader_state_to_bytes,
    make_loader,
    restore_loader_state,
)
from hmar_jax.data.sources import ImageDecodeError, InMemory, Source, open_source
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError

AS_IS = Transform(4, "random_crop")  # does not change a 4x4 image


@dataclasses.dataclass
class Numbered:
    """n images; the red and green of image i are its number. Those in `broken` cannot be read."""

    n: int
    side: int = 4
    broken: tuple = ()
    name: str = "numbered"
    class_names: tuple = ("even", "odd")

    def fingerprint(self):
        return str(self.n)

    @property
    def num_classes(self):
        return 2

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.broken:
            raise ImageDecodeError(f"{index}.jpg", "truncated")
        image = np.zeros((self.side, self.side, 3), np.uint8)
        image[..., 0], image[..., 1] = divmod(index, 256)
        return {"image": image, "label": index % 2}


def loader(source, batch_size=4, transform=AS_IS, seed=0, train=True, **options):
    return make_loader(source, transform, batch_size=batch_size, seed=seed, train=train, **options)


def numbers(batch):
    return (batch["image"][:, 0, 0, 0].astype(int) * 256 + batch["image"][:, 0, 0, 1]).tolist()


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def stream(dataset, count):
    return [number for batch in take(dataset, count) for number in numbers(batch)]


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# Transforms


@pytest.mark.parametrize(
    "h, w, size", [(20, 30, (13, 9)), (30, 20, (9, 13)), (5, 7, (12, 9)), (16, 16, (9, 9))]
)
def test_resize_crop(h, w, size):
    image = noise(h, w)
    resized = np.asarray(
        Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    )  # 9 = 1.125 * 8
    assert min(resized.shape[:2]) == 9
    assert_crops(Transform(8, "resize_crop"), image, resized)


def test_random_crop_takes_native_pixels():
    assert_crops(Transform(8, "random_crop"), noise(10, 11), noise(10, 11))


def test_random_crop_enlarges_only_what_is_too_small():
    image = noise(4, 5)
    resized = np.asarray(Image.fromarray(image).resize((10, 8), Image.Resampling.LANCZOS))
    assert_crops(Transform(8, "random_crop"), image, resized)


def assert_crops(transform, image, resized):
    """Training returns every crop of `resized` and nothing else; validation the center crop."""
    side = transform.side
    rows, columns = resized.shape[0] - side + 1, resized.shape[1] - side + 1
    crops = {
        resized[top : top + side, left : left + side].tobytes(): (top, left)
        for top in range(rows)
        for left in range(columns)
    }
    assert len(crops) == rows * columns
    rng = np.random.default_rng(1)
    seen = {crops[transform(image, rng).tobytes()] for _ in range(40 * len(crops))}
    assert seen == set(crops.values())

    top, left = crops[transform(image, None).tobytes()]
    assert abs((rows - 1) / 2 - top) <= 0.5 and abs((columns - 1) / 2 - left) <= 0.5


def test_center_crop_rounds_half_to_even_as_torchvision():
    image = noise(11, 9)  # 3 and 1 spare: offsets 1.5 and 0.5
    np.testing.assert_array_equal(Transform(8, "random_crop")(image, None), image[2:10, 0:8])


def test_flip_mirrors_about_half_and_never_in_validation():
    transform, image = Transform(8, "random_crop", flip=True), noise(8, 8)
    rng = np.random.default_rng(0)
    results = [transform(image, rng).tobytes() for _ in range(200)]
    assert set(results) == {image.tobytes(), image[:, ::-1].tobytes()}
    assert 60 < results.count(image.tobytes()) < 140
    assert transform(image, None).tobytes() == image.tobytes()


def test_affine_without_range_changes_nothing():
    identity = Transform(32, "affine", rotate=0, shift=0, scale=0, shear=0)
    image = noise(32, 32)
    np.testing.assert_array_equal(identity(image, np.random.default_rng(0)), image)
    np.testing.assert_array_equal(Transform(32, "affine")(image, None), image)


def centroid(image):
    weight = image[..., 0].astype(float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def test_affine_keeps_the_center_and_shifts_within_its_range():
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, 12:20] = 255
    rng = np.random.default_rng(0)
    for _ in range(20):
        mapped = Transform(32, "affine", rotate=45, shift=0, scale=0.1, shear=0.1)(image, rng)
        np.testing.assert_allclose(centroid(mapped), [16, 16], atol=0.15)
    shift = Transform(32, "affine", rotate=0, shift=3, scale=0, shear=0)
    moved = np.array([centroid(shift(image, rng)) - 16 for _ in range(200)])
    assert np.abs(moved).max() < 3.1 and (moved.max(0) > 2).all() and (moved.min(0) < -2).all()


def test_affine_rotates_scales_and_shears_within_its_ranges():
    image = np.zeros((64, 64, 3), np.uint8)
    image[24:40, 16:48] = 255
    rng = np.random.default_rng(0)

    def moments(**ranges):
        """Relative area, rotation in degrees and shear of the rectangle, by second moments."""
        transform = Transform(
            64, "affine", **{"rotate": 0, "shift": 0, "scale": 0, "shear": 0, **ranges}
        )
        found = []
        for _ in range(150):
            weight = transform(image, rng)[..., 0].astype(float)
            y, x = np.mgrid[:64, :64] - 31.5
            xx, yy, xy = (
                (weight * product).sum() / weight.sum() for product in (x * x, y * y, x * y)
            )
            found.append(
                (
                    weight.sum() / image[..., 0].sum(),
                    np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2),
                    xy / yy,
                )
            )
        return np.array(found).T

    _, degrees, _ = moments(rotate=10)
    assert degrees.min() == pytest.approx(-10, abs=0.5) and degrees.max() == pytest.approx(
        10, abs=0.5
    )
    area, degrees, _ = moments(scale=0.2)
    assert area.min() == pytest.approx(0.8**2, abs=0.03) and area.max() == pytest.approx(
        1.2**2, abs=0.03
    )
    assert np.abs(degrees).max() < 0.1
    area, _, shear = moments(shear=0.3)
    assert shear.min() == pytest.approx(-0.3, abs=0.03) and shear.max() == pytest.approx(
        0.3, abs=0.03
    )
    np.testing.assert_allclose(area, 1, atol=0.01)


def test_affine_fills_with_black():
    white = np.full((32, 32, 3), 255, np.uint8)
    rotated = Transform(32, "affine", rotate=45, shift=0, scale=0, shear=0)(
        white, np.random.default_rng(3)
    )
    assert rotated[0, 0].max() == 0 and rotated[16, 16].min() == 255


@pytest.mark.parametrize("kind", ["resize_crop", "random_crop", "affine"])
@pytest.mark.parametrize("h, w", [(1, 1), (1, 5000), (5000, 1), (3, 200), (64, 64)])
def test_any_size_comes_out_square(kind, h, w):
    for rng in (None, np.random.default_rng(0)):
        out = Transform(16, kind)(noise(h, w), rng)
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and out.flags.c_contiguous


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "crop"}, "transform.kind must be one of resize_crop, .*; got 'crop'"),
        ({"side": 0}, "transform.side must be an integer of at least 1; got 0"),
        ({"resize_ratio": 0.9}, "resize_ratio must be a number of at least 1; got 0.9"),
        ({"scale": 1.0}, r"scale must be a number in \[0, 1\); got 1.0"),
        ({"rotate": -1}, "rotate must be a number of at least 0; got -1"),
    ],
)
def test_transform_checks_its_fields(fields, message):
    with pytest.raises(InputError, match=message):
        Transform(**{"side": 8, "kind": "resize_crop", **fields})


def test_to_float():
    images = np.array([[0, 255], [127, 128]], np.uint8)
    out = jax.jit(to_float)(images)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, images / 127.5 - 1, atol=1e-6)


# Training batches


def test_batch_shapes():
    batch = take(loader(Numbered(10, side=9), transform=Transform(8, "resize_crop")), 1)[0]
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


def test_labels_stay_with_their_images():
    for batch in take(loader(Numbered(10)), 5):
        assert batch["label"].tolist() == [number % 2 for number in numbers(batch)]


def test_each_epoch_is_another_permutation():
    order = stream(loader(Numbered(300), batch_size=100), 12)
    epochs = [order[start : start + 300] for start in range(0, 1200, 300)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(300))
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(300)) not in epochs


def test_batches_run_across_epochs():
    order = stream(loader(Numbered(10)), 5)
    assert sorted(order) == sorted(2 * list(range(10)))
    assert sorted(order[:10]) == list(range(10))


def test_neighbouring_seeds_share_no_epoch():
    orders = [stream(loader(Numbered(100), batch_size=50, seed=seed), 6) for seed in range(4)]
    epochs = [tuple(order[start : start + 100]) for order in orders for start in (0, 100, 200)]
    assert len(set(epochs)) == 12


def test_num_epochs_ends_and_drops_the_remainder():
    batches = list(loader(Numbered(10), num_epochs=3))
    assert len(batches) == 7  # 30 images, 2 dropped
    assert sorted(number for batch in batches[:5] for number in numbers(batch)) == sorted(
        2 * list(range(10))
    )


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_same_seed_same_batches_whatever_the_threads(threads):
    crop = Transform(4, "random_crop", flip=True)
    source = _Noise(23)
    want = take(loader(source, transform=crop, threads=2), 15)
    got = take(loader(source, transform=crop, threads=threads), 15)
    assert all(map(same, want, got))
    other = take(loader(source, transform=crop, seed=1), 15)
    assert not any(map(same, want, other))


class _Noise(Numbered):
    def __getitem__(self, index):
        return {"image": noise(9, 9, index), "label": index % 2}


@pytest.mark.parametrize("train, digest", [(True, "0e60c4153bb2fe8c"), (False, "cead5539409b95b1")])
def test_order_and_crops_never_change(train, digest):
    """Runs that an earlier version started resume with the batches they would have had."""
    transform = Transform(4, "random_crop", flip=True)
    batches = take(loader(_Noise(23), transform=transform, seed=3, train=train), 15 if train else 5)
    data = b"".join(batch[key].tobytes() for batch in batches for key in sorted(batch))
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_crops_differ_between_epochs():
    one = _Noise(1)
    crops = take(loader(one, batch_size=1, transform=Transform(4, "random_crop")), 20)
    assert len({batch["image"].tobytes() for batch in crops}) > 10


@pytest.mark.parametrize("n, shards", [(24, 3), (25, 4)])
def test_shards_are_parts_of_one_global_stream(n, shards):
    crop = Transform(4, "random_crop")
    whole = take(loader(_Noise(n), batch_size=2 * shards, transform=crop), 30)
    parts = [
        take(
            loader(_Noise(n), batch_size=2, transform=crop, shard_index=shard, shard_count=shards),
            30,
        )
        for shard in range(shards)
    ]
    for step, batch in enumerate(whole):
        for shard in range(shards):
            mine = {key: value[2 * shard : 2 * shard + 2] for key, value in batch.items()}
            assert same(mine, parts[shard][step])


def test_shards_partition_an_epoch():
    shards = [
        stream(loader(Numbered(30), batch_size=5, shard_index=s, shard_count=3), 2)
        for s in range(3)
    ]
    assert sorted(sum(shards, [])) == list(range(30))


def test_shards_give_equally_many_batches():
    for options in (
        {"train": True, "num_epochs": 3},
        {"train": False},
        {"train": False, "pad": False},
    ):
        lengths = {
            len(list(loader(Numbered(25), shard_index=s, shard_count=3, **options)))
            for s in range(3)
        }
        assert len(lengths) == 1, options


# Validation batches


def test_validation_pads_the_last_batch():
    batches = list(loader(Numbered(10), train=False))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch["valid"].tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    assert batches[0]["valid"].dtype == bool
    assert batches[2]["image"].shape == (4, 4, 4, 3) and batches[2]["label"].tolist() == [
        0,
        1,
        0,
        0,
    ]


def test_validation_without_padding_drops_the_remainder():
    batches = list(loader(Numbered(10), train=False, pad=False))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_validation_may_be_smaller_than_a_batch():
    (batch,) = loader(Numbered(3), train=False)
    assert batch["valid"].tolist() == [True, True, True, False]


def test_validation_shards_partition():
    seen = []
    for shard in range(3):
        for batch in loader(Numbered(25), train=False, shard_index=shard, shard_count=3):
            seen += np.array(numbers(batch))[batch["valid"]].tolist()
    assert sorted(seen) == list(range(25))


def test_validation_ignores_the_seed():
    crop = Transform(4, "random_crop", flip=True)
    first = list(loader(_Noise(9), transform=crop, train=False, seed=0))
    second = list(loader(_Noise(9), transform=crop, train=False, seed=1))
    assert all(map(same, first, second))


# State


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_state_restores_bit_identical_batches(train, threads, taken):
    def fresh():
        transform = Transform(8, "resize_crop", flip=True)
        return iter(loader(_Noise(33), transform=transform, train=train, threads=threads))

    first = fresh()
    for _ in range(taken):
        next(first)
    saved = loader_state_to_bytes(first)
    json.loads(saved)
    rest = [next(first) for _ in range(4 if not train else 12)]

    second = fresh()
    restore_loader_state(second, saved)
    assert loader_state_to_bytes(second) == saved
    assert all(same(want, next(second)) for want in rest)

    restore_loader_state(first, saved)  # also in place, with batches already read ahead
    assert same(rest[0], next(first))


def test_state_survives_another_number_of_shards():
    one = iter(loader(Numbered(30), batch_size=6))
    for _ in range(3):
        next(one)
    halves = [
        iter(loader(Numbered(30), batch_size=3, shard_index=shard, shard_count=2))
        for shard in range(2)
    ]
    for half in halves:
        restore_loader_state(half, loader_state_to_bytes(one))
    want = numbers(next(one))
    assert [numbers(next(half)) for half in halves] == [want[:3], want[3:]]


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[1]", b"{}", b'{"next_index": "a"}', b'{"next_index": 99}']
)
def test_bad_state(data):
    with pytest.raises(InputError, match="the saved loader state"):
        restore_loader_state(iter(loader(Numbered(10), train=False)), data)


# Unreadable images


def test_broken_images_are_replaced_and_noted_once():
    log = DecodeErrorLog()
    order = stream(loader(Numbered(40, broken=(3, 4, 39)), broken=log), 20)
    for epoch in (order[:40], order[40:]):
        assert sorted(epoch) == sorted([*(set(range(40)) - {3, 4, 39}), 5, 5, 0])
    assert log.count == 3
    assert sorted(log.items) == [
        ("3.jpg", "truncated"),
        ("39.jpg", "truncated"),
        ("4.jpg", "truncated"),
    ]


def test_broken_images_do_not_count_in_validation():
    batches = list(loader(Numbered(8, broken=(2,)), train=False))
    assert numbers(batches[0]) == [0, 1, 3, 3]
    assert batches[0]["valid"].tolist() == [True, True, False, True]


def test_one_log_for_two_loaders():
    log = DecodeErrorLog()
    list(loader(Numbered(8, broken=(2,)), train=False, broken=log))
    list(loader(Numbered(8, broken=(2, 5)), train=False, broken=log))
    assert log.count == 2


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_broken_images_stop_the_run(threads):
    few = Numbered(200, broken=tuple(range(10)))  # 5 %, but only ten files
    assert len(list(loader(few, train=False, threads=threads))) == 50
    share = Numbered(1100, broken=tuple(range(11)))  # eleven, but only 1 %
    assert len(list(loader(share, batch_size=100, train=False, threads=threads))) == 11
    many = Numbered(1000, broken=tuple(range(11)))
    with pytest.raises(
        InputError,
        match="numbered: 11 of the 1000 images cannot be read; .*first: 0.jpg, 1.jpg, 2",
    ):
        list(loader(many, train=False, threads=threads))


def test_one_shard_of_many_stops_too():
    broken = tuple(
        range(0, 8000, 50)
    )  # 2 %; one of 8 shards reads 20 of 1000, which is not 1 % of the whole
    with pytest.raises(InputError, match="numbered: 2. of the 1000 images cannot be read"):
        take(loader(Numbered(8000, broken=broken), 100, shard_index=3, shard_count=8), 80)
    few = tuple(range(0, 8000, 200))  # 0.5 %
    take(loader(Numbered(8000, broken=few), 100, shard_index=3, shard_count=8), 80)


def test_worker_processes_change_nothing_and_report_broken_images():
    source, log = Numbered(60, side=9, broken=(3, 4, 39)), DecodeErrorLog()
    options = dict(transform=Transform(4, "random_crop"), threads=1)
    alone = iter(loader(source, **options))
    want = take(loader(source, **options), 30)
    several = iter(loader(source, workers=2, broken=log, **options))
    assert all(same(batch, next(several)) for batch in want[:17])
    assert sorted(log.items) == [
        ("3.jpg", "truncated"),
        ("39.jpg", "truncated"),
        ("4.jpg", "truncated"),
    ]
    saved = loader_state_to_bytes(several)
    several.close()
    restore_loader_state(alone, saved)  # with another number of processes, none
    assert same(want[17], next(alone))
    again = iter(loader(source, workers=1, **options))
    restore_loader_state(again, loader_state_to_bytes(alone))
    assert same(want[18], next(again))
    again.close()


@pytest.mark.slow
def test_worker_processes_stop_at_too_many_broken_images():
    many = Numbered(1000, broken=tuple(range(11)))
    with pytest.raises(
        InputError,
        match="numbered: 11 of the 1000 images cannot be read; .*first: 0.jpg, 1.jpg, 2",
    ):
        list(loader(many, train=False, workers=2))
    assert len(list(loader(Numbered(40), train=False, workers=3))) == 10
    with pytest.raises(InputError, match="none of its 4 images can be read"):
        list(loader(Numbered(4, broken=(0, 1, 2, 3)), train=False, workers=1))


def test_nothing_readable():
    with pytest.raises(InputError, match="none of its 4 images can be read; the first: "):
        list(loader(Numbered(4, broken=(0, 1, 2, 3)), train=False))


# Arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 11}, "batch_size must be at most 10, the number of images; got 11"),
        (
            {"batch_size": 4, "shard_count": 3},
            "batch_size must be at most 3, the number of images in each of 3 shards; got 4",
        ),
        ({"batch_size": 11, "train": False, "pad": False}, "batch_size must be at most 10"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index must be in \[0, 2\); got 2"),
        ({"shard_count": 0}, "shard_count must be at least 1; got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, or None; got 0"),
        ({"num_epochs": 1, "train": False}, "num_epochs must be None for validation; got 1"),
        ({"threads": -1}, "threads must be at least 0; got -1"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
    ],
)
def test_loader_checks_its_arguments(options, message):
    with pytest.raises(InputError, match=message):
        loader(Numbered(10), **options)


# Digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return open_source("digits"), open_source("digits", "validate")


def test_digits(digits):
    train, validate = digits
    assert isinstance(train, Source)
    assert (len(train), len(validate), train.num_classes) == (1437, 360, 10)
    assert train.class_names == tuple("0123456789") and train.name == "digits"
    for source, fewest in ((train, 130), (validate, 30)):
        assert (
            np.bincount([source[i]["label"] for i in range(len(source))], minlength=10).min()
            > fewest
        )
    example = train[0]
    assert example["image"].shape == (32, 32, 3) and example["image"].dtype == np.uint8
    assert type(example["label"]) is int
    assert (example["image"] == example["image"][..., :1]).all()
    assert example["image"].min() == 0 and example["image"].max() > 200


def test_digits_split_is_fixed_and_disjoint(digits):
    from sklearn.datasets import load_digits

    train, validate = digits
    again = open_source("digits", "validate")
    assert all(
        np.array_equal(again[i]["image"], validate[i]["image"]) for i in range(len(validate))
    )
    labels = np.concatenate([train.labels, validate.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    # Literal values, so that a change in numpy or here cannot change the split unnoticed.
    assert [validate[i]["label"] for i in range(12)] == [3, 7, 3, 9, 0, 8, 7, 0, 8, 0, 3, 3]


def test_in_memory_decodes_once(digits):
    reads = []

    class Counted(Numbered):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    kept = InMemory(Counted(5, broken=(2,)))
    assert isinstance(kept, Source) and len(kept) == 5 and kept.class_names == ("even", "odd")
    first, second = kept[1], kept[1]
    assert same(first, second) and reads == [1]
    assert not first["image"].flags.writeable
    with pytest.raises(ImageDecodeError):
        kept[2]
    assert len(open_source("digits", in_memory=True)) == 1437


@pytest.mark.parametrize("spec", ["mnist", "folder", "folder:", "tfds:", "", "digits:x"])
def test_unknown_spec(spec):
    with pytest.raises(
        InputError, match="unknown data .*digits, folder:DIR, zip:FILE, hf:NAME_OR_DIR, tfds:"
    ):
        open_source(spec)


def test_unknown_split():
    with pytest.raises(InputError, match="unknown split 'test'; must be one of train, validate"):
        open_source("digits", "test")
