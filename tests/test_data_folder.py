"""Images from disk: folder layouts, unusual and damaged files, TensorFlow Datasets."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from hmar_jax.data.decode_errors import DecodeErrorLog
from hmar_jax.data.loader import make_loader
from hmar_jax.data.sources import (
    ImageDecodeError,
    Source,
    SourceConfig,
    decode_image,
    open_source,
)
from hmar_jax.data.transforms import Transform
from hmar_jax.errors import InputError


def save(path, color=(200, 100, 50), size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


def names(source):
    return [os.path.basename(file) for file in source.files]


def labels(source):
    return [int(label) for label in source.labels]


# Layouts


@pytest.mark.parametrize("validate_folder", ["validate", "val", "validation"])
def test_imagenet_layout(tmp_path, validate_folder):
    for part in ("train", validate_folder):
        save(tmp_path / part / "n02" / "n02_10.JPEG", format="jpeg")
        save(tmp_path / part / "n01" / "n01_7.png", color=(1, 2, 3))
    save(tmp_path / "train" / "n03" / "x.bmp")
    train, validate = (open_source(f"folder:{tmp_path}", split) for split in ("train", "validate"))
    assert isinstance(train, Source)
    assert (
        train.class_names == validate.class_names == ("n01", "n02", "n03")
        and train.num_classes == 3
    )
    assert names(train) == ["n01_7.png", "n02_10.JPEG", "x.bmp"] and labels(train) == [0, 1, 2]
    assert names(validate) == ["n01_7.png", "n02_10.JPEG"] and labels(validate) == [0, 1]
    example = train[0]
    assert example["label"] == 0 and type(example["label"]) is int
    assert example["image"].shape == (10, 12, 3) and (example["image"] == [1, 2, 3]).all()


def test_readable_class_names(tmp_path):
    files = {
        "n01440764": ["n01440764_tench.jpg"],
        "n01496331": ["n01496331_electric_ray.jpg", "n01496331_electric_ray_2.jpg"],
        "n01530575": [
            "n01530575_10026.jpg",  # ImageNet's own file names contain no class names
            "n01530575_10027.jpg",
        ],
        "n01558993": ["n01558993_robin.jpg", "n01558993_thrush.jpg"],
        "n01601694": ["n01601694_water_ouzel.jpg", "other.jpg"],
        "n01608432": ["n01608432_10.jpg"],
    }
    for folder, names_in_folder in files.items():
        for name in names_in_folder:
            save(tmp_path / "train" / folder / name)
    want = ("tench", "electric_ray", "n01530575", "n01558993", "n01601694", "n01608432")
    assert open_source(f"folder:{tmp_path}").class_names == want


@pytest.mark.parametrize("file", ["class_names.txt", "LOC_synset_mapping.txt"])
def test_listed_class_names(tmp_path, file):
    for folder in ("n01440764", "n02099601", "n09999999"):
        save(tmp_path / "train" / folder / f"{folder}_1.jpg")
    lines = [
        "n01440764 tench, Tinca tinca",
        "",
        "n02099601  golden retriever",
        "n03000000 something else",
    ]
    (tmp_path / file).write_text("\n".join(lines))
    assert open_source(f"folder:{tmp_path}").class_names == (
        "tench",
        "golden_retriever",
        "n09999999",
    )
    (tmp_path / file).write_text("n01440764 tench\nn02099601\n")
    assert_one_line_error(
        f"folder:{tmp_path}",
        f"{file}, line 2",
        "a class folder and its name, such as",
        "got 'n02099601'",
    )


@pytest.mark.parametrize("inside", ["", "train"])
def test_images_without_class_folders_where_classes_are_needed(tmp_path, inside):
    for i in range(3):
        save(tmp_path / inside / f"{i}.png")
    with pytest.raises(
        InputError, match="has images but no class folders; move them .* such as .*/CLASS/0.png"
    ):
        open_source(f"folder:{tmp_path}", need_classes=True)
    (tmp_path / "sorted" / "all").mkdir(parents=True)
    for i in range(3):
        (tmp_path / inside / f"{i}.png").rename(tmp_path / "sorted" / "all" / f"{i}.png")
    assert open_source(f"folder:{tmp_path / 'sorted'}", need_classes=True).class_names == ("all",)


def test_class_folders_without_train(tmp_path):
    for i in range(120):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", size=(1, 1))
    train, validate = (open_source(f"folder:{tmp_path}", split) for split in ("train", "validate"))
    assert (len(train), len(validate)) == (116, 4) and sorted(labels(validate)) == [0, 0, 1, 1]
    assert train.class_names == validate.class_names == ("a", "b")
    assert sorted(names(train) + names(validate)) == sorted(f"{i}.png" for i in range(120))
    assert [int(file[0] == "b") for file in train.files] == labels(train)
    assert open_source(f"folder:{tmp_path}", "validate").files == validate.files


def test_train_folder_without_validation_holds_out(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "a" / f"{i}.png")
    assert [len(open_source(f"folder:{tmp_path}", split)) for split in ("train", "validate")] == [
        2,
        1,
    ]


@pytest.mark.parametrize("inside", ["", "train"])
def test_flat_folder(tmp_path, inside):
    for i in range(10):
        save(tmp_path / inside / f"{i}.png")
    (tmp_path / inside / "notes").mkdir()
    train, validate = (open_source(f"folder:{tmp_path}", split) for split in ("train", "validate"))
    assert train.class_names == ("all",) and set(labels(train)) == {0}
    assert (len(train), len(validate)) == (8, 2) and not set(train.files) & set(validate.files)


def test_adding_an_image_keeps_the_split_of_the_others(tmp_path):
    for i in range(100):
        save(tmp_path / f"{i}.png", size=(1, 1))
    before = set(open_source(f"folder:{tmp_path}", "validate").files)
    save(tmp_path / "new.png", size=(1, 1))
    after = set(open_source(f"folder:{tmp_path}", "validate").files)
    assert len(after - before - {"new.png"}) == 0


def test_search_is_recursive_and_skips_hidden_and_other_files(tmp_path):
    for file in (
        "a/x/y/deep.WebP",
        "a/one.TIF",
        "a/.hidden.png",
        "a/.thumbs/t.png",
        ".git/g.png",
        "b/two.jpeg",
    ):
        save(tmp_path / "train" / file)
    (tmp_path / "train" / "a" / "readme.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "validate" / "a").mkdir(parents=True)
    source = open_source(f"folder:{tmp_path}")
    assert source.files == (
        "a/one.TIF",
        "a/x/y/deep.WebP",
        "b/two.jpeg",
    ) and source.class_names == ("a", "b")


def test_an_empty_class_is_refused_or_keeps_its_label(tmp_path):
    for folder in "ac":
        save(tmp_path / "train" / folder / "1.png")
        save(tmp_path / "val" / folder / "1.png")
    (tmp_path / "train" / "b").mkdir()
    assert_one_line_error(f"folder:{tmp_path}", "none in b", "allow_empty_classes=true")
    source = open_source(f"folder:{tmp_path}", config=SourceConfig(allow_empty_classes=True))
    assert source.class_names == ("a", "b", "c") and labels(source) == [0, 2]


def test_opening_reads_no_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    assert len(open_source(f"folder:{tmp_path}")) == 2


def assert_one_line_error(spec, *parts, split="train"):
    with pytest.raises(InputError) as error:
        open_source(spec, split)
    message = str(error.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def test_folder_errors(tmp_path):
    folders = ("missing", "empty", "mixed", "one", "extra", "bare")
    missing, empty, mixed, one, extra, bare = (tmp_path / name for name in folders)
    assert_one_line_error(f"folder:{missing}", missing, "does not exist", "DIR/train/CLASS")
    (empty / "train" / "a").mkdir(parents=True)
    assert_one_line_error(f"folder:{empty}", empty / "train", "no images", ".jpg")
    save(mixed / "a" / "1.png")
    save(mixed / "2.png")
    assert_one_line_error(f"folder:{mixed}", mixed, "2.png", "next to folders of images (a)")
    assert_one_line_error(f"folder:{mixed / '2.png'}", "is a file, not a folder")
    save(one / "1.png")
    assert_one_line_error(f"folder:{one}", one, "at least two")
    save(extra / "train" / "a" / "1.png")
    save(extra / "val" / "z" / "1.png")
    assert_one_line_error(f"folder:{extra}", extra / "val", "class folder 'z'", split="validate")
    save(bare / "train" / "a" / "1.png")
    (bare / "val" / "a").mkdir(parents=True)
    assert_one_line_error(f"folder:{bare}", bare / "val", "no images", split="validate")
    save(bare / "val" / "loose.png")
    assert_one_line_error(
        f"folder:{bare}", bare / "val", "images outside class folders", split="validate"
    )


# Pixels


def gradient(h=8, w=16):
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // (w - 1), y * 255 // (h - 1), np.full((h, w), 128)], -1).astype(
        np.uint8
    )


def decoded(path):
    image = decode_image(str(path))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


def test_rgb_and_gray(tmp_path):
    pixels = gradient()
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(decoded(tmp_path / "rgb.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(decoded(tmp_path / "gray.png"), np.repeat(pixels[..., :1], 3, -1))
    Image.fromarray(pixels[..., 0] > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(
        decoded(tmp_path / "bits.png")[..., 0], np.where(pixels[..., 0] > 100, 255, 0)
    )


def test_cmyk(tmp_path):
    Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK").save(
        tmp_path / "cmyk.jpg", quality=95
    )
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    np.testing.assert_allclose(decoded(tmp_path / "cmyk.jpg").mean((0, 1)), [250, 20, 20], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_gray(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)).save(path)
    assert Image.open(path).mode.startswith("I")
    assert decoded(path)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_transparency_is_composited_over_white(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert decoded(tmp_path / "rgba.png")[0].tolist() == [
        [200, 0, 0],
        [255, 255, 255],
        [244, 204, 204],
    ]
    Image.fromarray(pixels[..., [1, 3]]).save(tmp_path / "la.png")
    assert decoded(tmp_path / "la.png")[0].tolist() == [[0] * 3, [255] * 3, [204] * 3]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"p.{suffix}")
    assert decoded(tmp_path / f"p.{suffix}")[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    image.save(tmp_path / f"t.{suffix}", transparency=0)
    assert decoded(tmp_path / f"t.{suffix}")[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_an_animation_decodes_to_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    assert (decoded(tmp_path / "a.gif") == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    pixels = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "rotated.png", exif=exif)
    # From the EXIF standard: the sides that row 0 and column 0 of the stored image belong to.
    t = pixels.transpose(1, 0, 2)
    upright = [
        pixels,
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[::-1],
        t,
        t[:, ::-1],
        t[::-1, ::-1],
        t[::-1],
    ]
    np.testing.assert_array_equal(decoded(tmp_path / "rotated.png"), upright[orientation - 1])


def test_one_pixel(tmp_path):
    save(tmp_path / "dot.png", size=(1, 1))
    assert decoded(tmp_path / "dot.png").tolist() == [[[200, 100, 50]]]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_at_full_size(tmp_path, mode):
    Image.fromarray(gradient(320, 480)).convert(mode).save(tmp_path / "big.jpg")
    assert decoded(tmp_path / "big.jpg").shape == (320, 480, 3)


# Damage


def damaged(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "float":
        Image.new("F", (4, 4)).save(path, format="tiff")
    elif kind == "missing":
        pass
    else:
        Image.fromarray(gradient(64, 64)).save(path, format=kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "kind", ["empty", "text", "missing", "float", "jpeg", "png", "gif", "webp", "bmp", "tiff"]
)
def test_damaged_file_is_a_broken_image(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    damaged(path, kind)
    with pytest.raises(ImageDecodeError) as error:
        decode_image(str(path))
    assert error.value.path == str(path) and error.value.reason and "\n" not in error.value.reason


def test_damaged_files_do_not_stop_a_run(tmp_path):
    for i in range(6):
        save(tmp_path / "train" / "a" / f"{i}.png")
    for kind in ("empty", "text", "jpeg"):
        damaged(tmp_path / "train" / "a" / f"{kind}.jpg", kind)
    save(tmp_path / "val" / "a" / "1.png")
    log = DecodeErrorLog()
    source = open_source(f"folder:{tmp_path}", in_memory=True)
    transform = Transform(8, "resize_crop")
    for batch in make_loader(
        source, transform, batch_size=4, seed=0, train=True, num_epochs=4, broken=log
    ):
        assert np.abs(batch["image"].astype(int) - [200, 100, 50]).max() <= 1
    assert sorted(os.path.basename(path) for path, _ in log.items) == [
        "empty.jpg",
        "jpeg.jpg",
        "text.jpg",
    ]


# TensorFlow Datasets


def write_tfds(root, splits):
    """Writes the files of `tfds build --file_format=array_record` without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="array_record is not installed"
    )
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
        }
    )
    features.save_config(folder)
    infos = []
    for split, count in splits.items():
        writer = module.ArrayRecordWriter(
            str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for i in range(count):
            save(root / "image.png", color=(i, 2 * i, 3 * i))
            writer.write(
                features.serialize_example({"image": str(root / "image.png"), "label": i % 2})
            )
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"name": split, "shardLengths": [str(count)], "filepathTemplate": template})
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("validation", ["validation", "test"])
def test_tfds(tmp_path, validation):
    """Without TensorFlow installed, this also shows that it is not required."""
    write_tfds(tmp_path, {"train": 7, validation: 3})
    train, validate = (
        open_source(f"tfds:tiny@{tmp_path}", split) for split in ("train", "validate")
    )
    assert isinstance(train, Source)
    assert (
        (len(train), len(validate)) == (7, 3)
        and train.class_names == ("ant", "bee")
        and train.name == "tfds:tiny"
    )
    assert train[5]["label"] == 1 and train[5]["image"].shape == (10, 12, 3)
    assert (train[5]["image"] == [5, 10, 15]).all()
    batches = list(
        make_loader(validate, Transform(8, "resize_crop"), batch_size=2, seed=0, train=False)
    )
    assert [batch["image"][:, 0, 0, 1].tolist() for batch in batches] == [[0, 2], [4, 0]]


def test_tfds_errors(tmp_path):
    write_tfds(tmp_path, {"train": 2})
    assert_one_line_error(
        f"tfds:nope@{tmp_path}", "tfds:nope", tmp_path, "tfds build nope --file_format=array_record"
    )
    assert_one_line_error(f"tfds:tiny:9.0.0@{tmp_path}", "tfds:tiny:9.0.0", "not prepared")
    assert_one_line_error(f"tfds:tiny@{tmp_path}", "has train", "validation", split="validate")


def test_tfds_is_imported_only_on_demand(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert_one_line_error("tfds:cifar10", "pip install tensorflow-datasets")


def test_sklearn_is_imported_only_on_demand(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_one_line_error("digits", 'pip install "hmar_jax[demo]"')


# Photographs


def photograph(rng) -> Image.Image:
    """Smooth colours with some noise, of random size; every fifth is grey."""
    height, width = rng.integers(60, 200, 2)
    colours = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))
    image = Image.fromarray((smooth * 0.9 + rng.uniform(0, 25, smooth.shape)).astype(np.uint8))
    return image.convert("L") if rng.random() < 0.2 else image


def test_an_epoch_of_photographs(tmp_path):
    rng, count = np.random.default_rng(0), 100
    for i in range(count):
        name = f"kind_{chr(97 + i // 26)}{chr(97 + i % 26)}"
        file = tmp_path / "train" / f"n{i:08}" / f"n{i:08}_{name}.jpg"
        file.parent.mkdir(parents=True)
        photograph(rng).save(file, quality=85)
    train, validate = (open_source(f"folder:{tmp_path}", split) for split in ("train", "validate"))
    assert (len(train), len(validate), train.num_classes) == (99, 1, 100)
    assert train.class_names[:2] == ("kind_aa", "kind_ab")
    log = DecodeErrorLog()
    batches = list(
        make_loader(
            train,
            Transform(64, "resize_crop"),
            batch_size=33,
            seed=0,
            train=True,
            num_epochs=1,
            broken=log,
        )
    )
    images = np.concatenate([batch["image"] for batch in batches])
    assert images.shape == (99, 64, 64, 3) and log.count == 0
    assert sorted(np.concatenate([batch["label"] for batch in batches])) == sorted(train.labels)
    assert 110 < images.mean() < 140 and images.std() > 40
