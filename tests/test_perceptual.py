"""The perceptual distance: against loops and by hand, its properties, and errors about files."""

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmar_jax.autoencoders.perceptual import load_perceptual, perceptual_distance
from hmar_jax.errors import InputError
from tests.conftest import relative


def small_arrays(widths=(4, 6, 8), taps=(0, 2), pools=(1, 2)):
    """A random network of the file's format."""
    rng = np.random.default_rng(0)
    arrays = {
        "taps": np.array(taps),
        "pools": np.array(pools, int),
        "shift": np.array([-0.03, -0.09, -0.19]),
        "scale": np.array([0.46, 0.45, 0.45]),
    }
    for i, (inputs, outputs) in enumerate(zip((3, *widths), widths)):
        arrays[f"conv{i}/kernel"] = rng.normal(
            0, (2 / 9 / inputs) ** 0.5, (3, 3, inputs, outputs)
        ).astype("float32")
        arrays[f"conv{i}/bias"] = rng.normal(0, 0.1, outputs).astype("float32")
    for j, tap in enumerate(taps):
        arrays[f"lin{j}"] = rng.uniform(0, 1, widths[tap])
    return arrays


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "network.npz", **arrays)
        return tmp_path / "network.npz"

    return save


@pytest.fixture
def network(save):
    return load_perceptual(save(**small_arrays()))


@pytest.fixture
def images():
    """Two batches of three."""
    return np.random.default_rng(1).uniform(-1, 1, (2, 3, 9, 8, 3)).astype("float32")


def test_file_round_trip(network):
    arrays = small_arrays()
    assert network.taps == (0, 2) and network.pools == (1, 2) and network.min_side == 4
    for i in range(3):
        np.testing.assert_array_equal(network.kernels[i], arrays[f"conv{i}/kernel"])
        np.testing.assert_array_equal(network.biases[i], arrays[f"conv{i}/bias"])
    for j in range(2):
        np.testing.assert_allclose(network.lins[j], arrays[f"lin{j}"], rtol=1e-6)
    np.testing.assert_allclose(network.shift, arrays["shift"], rtol=1e-6)
    np.testing.assert_allclose(network.scale, arrays["scale"], rtol=1e-6)
    assert len(jax.tree.leaves(network)) == 3 + 3 + 2 + 2


def test_without_linear_weights_channels_are_averaged(save):
    arrays = {name: array for name, array in small_arrays().items() if not name.startswith("lin")}
    for lin, width in zip(load_perceptual(save(**arrays)).lins, (4, 8)):
        np.testing.assert_allclose(lin, np.full(width, 1 / width), rtol=1e-6)


def by_loops(arrays, x, y):
    """The distance of two images (h, w, 3) by the paper's formula, in float64, without batches."""

    def features(x):
        x, found = (x - arrays["shift"]) / arrays["scale"], []
        for i in range(max(arrays["taps"]) + 1):
            if i in arrays["pools"]:
                height, width = x.shape[0] // 2, x.shape[1] // 2
                x = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).max((1, 3))
            padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            kernel = arrays[f"conv{i}/kernel"].astype("float64")
            x = np.array(
                [
                    [
                        np.einsum("ijc,ijcd->d", padded[r : r + 3, c : c + 3], kernel)
                        for c in range(x.shape[1])
                    ]
                    for r in range(x.shape[0])
                ]
            )
            x = np.maximum(x + arrays[f"conv{i}/bias"], 0)
            if i in arrays["taps"]:
                found.append(x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
        return found

    taps = enumerate(zip(features(x), features(y)))
    return sum((arrays[f"lin{j}"] * (a - b) ** 2).sum(-1).mean() for j, (a, b) in taps)


def test_against_loops(network, images):
    x, y = images
    pairs = zip(x.astype("float64"), y.astype("float64"))
    expected = [by_loops(small_arrays(), a, b) for a, b in pairs]
    actual = jax.jit(perceptual_distance)(network, x, y)
    assert actual.dtype == jnp.float32 and relative(actual, expected) < 1e-5


def test_by_hand(save):
    """One convolution that copies red and green: a pixel becomes a direction in a plane."""
    kernel = np.zeros((3, 3, 3, 2))
    kernel[1, 1, 0, 0] = kernel[1, 1, 1, 1] = 1
    network = load_perceptual(
        save(
            **{
                "conv0/kernel": kernel,
                "conv0/bias": np.zeros(2),
                "taps": [0],
                "pools": [],
                "lin0": [1.0, 3.0],
                "shift": [0.5, 0.0, 0.0],
                "scale": [1.0, 2.0, 1.0],
            }
        )
    )
    # Enters as (.3, .4), (.5, 0): directions (.6, .8), (1, 0).
    x = jnp.array([[[[0.8, 0.8, -1.0], [1.0, 0.0, 0.3]]]])
    # Enters as (.5, 0), (.2, 0): directions (1, 0), (1, 0).
    y = jnp.array([[[[1.0, 0.0, 0.9], [0.7, 0.0, 0.0]]]])
    expected = (1 * 0.4**2 + 3 * 0.8**2) / 2
    assert float(perceptual_distance(network, x, y)[0]) == pytest.approx(expected, rel=1e-5)


def test_properties(network, images):
    x, y = images
    of = jax.jit(perceptual_distance)
    distance = of(network, x, y)
    assert distance.shape == (3,) and (distance > 0).all()
    np.testing.assert_allclose(of(network, x, x), 0, atol=1e-12)
    np.testing.assert_allclose(of(network, y, x), distance, rtol=1e-5)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(of(network, x[order], y[order]), distance[order], rtol=1e-5)
    nearer = of(network, x, x + 0.1 * (y - x))
    assert (nearer < distance).all()


def test_gradients(network, images):
    x, y = images
    total = jax.jit(jax.value_and_grad(lambda x, network: perceptual_distance(network, x, y).sum()))
    distance, grad = total(x, network)
    assert np.isfinite(grad).all() and all(abs(g).max() > 0 for g in grad)
    assert total(x - 1e-2 * grad, network)[0] < distance
    # Equal images are a minimum; where all features are zero, gradients are finite.
    np.testing.assert_allclose(total(y, network)[1], 0, atol=1e-7)
    dead = network.replace(biases=tuple(b - 100 for b in network.biases))
    np.testing.assert_array_equal(total(x, dead)[1], 0)


def test_invalid_images(network):
    with pytest.raises(InputError, match="need images of side 4 or more; got side 3"):
        perceptual_distance(network, jnp.zeros((1, 8, 3, 3)), jnp.zeros((1, 8, 3, 3)))
    fits = jnp.zeros((1, 4, 4, 3))
    assert jax.eval_shape(perceptual_distance, network, fits, fits).shape == (1,)
    with pytest.raises(InputError, match=r"\(2, 8, 8, 3\) and \(1, 8, 8, 3\)"):
        perceptual_distance(network, jnp.zeros((2, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"conv1/bias": None}, ["missing conv1/bias"]),
        ({"conv1/bias": None, "conv1/kernel": None}, ["missing conv1/kernel, conv1/bias"]),
        ({"taps": None}, ["missing taps"]),
        ({"lin1": None}, ["missing lin1"]),
        ({"lin2": np.ones(8)}, ["unknown lin2"]),
        ({"conv2_kernel": np.ones(8)}, ["unknown conv2_kernel"]),
        (
            {"conv0/kernel": np.ones((4, 3, 3, 3))},
            ["conv0/kernel", "(4, 3, 3, 3)", "(3, 3, 3, any)"],
        ),
        (
            {"conv1/kernel": np.ones((3, 3, 5, 6))},
            ["conv1/kernel", "(3, 3, 5, 6)", "(3, 3, 4, any)"],
        ),
        ({"conv2/bias": np.ones(7)}, ["conv2/bias", "(7,)", "(8)"]),
        ({"conv2/bias": np.array(["a"] * 8)}, ["conv2/bias", "must contain numbers"]),
        ({"conv2/bias": np.full(8, np.nan)}, ["conv2/bias", "must be finite"]),
        ({"lin0": np.ones((1, 4, 1, 1))}, ["lin0", "(1, 4, 1, 1)", "(4)"]),
        ({"lin1": -np.ones(8)}, ["lin1", "must not be negative; got -1"]),
        ({"taps": np.array([0, 3])}, ["taps", "0 to 2"]),
        ({"taps": np.array([2, 0])}, ["taps", "ascending"]),
        ({"pools": np.array([0.5])}, ["pools", "0 to 2"]),
        ({"shift": np.zeros(1)}, ["shift", "(1,)", "(3)"]),
        ({"scale": np.zeros(3)}, ["scale", "zero"]),
    ],
)
def test_invalid_files(save, changes, words):
    arrays = {
        name: array for name, array in (small_arrays() | changes).items() if array is not None
    }
    path = save(**arrays)
    with pytest.raises(InputError) as error:
        load_perceptual(path)
    message = str(error.value)
    assert all(word in message for word in [str(path), *words]) and "\n" not in message, message


def test_empty_taps(save):
    arrays = {name: array for name, array in small_arrays().items() if not name.startswith("lin")}
    with pytest.raises(InputError, match="taps is empty"):
        load_perceptual(save(**arrays | {"taps": []}))


def test_unreadable_files(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("weights")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "pickled.npz", taps=np.array([{}], object))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        other.writestr("readme", "not an array")
    for name in ("array.npy", "text.npz", "broken.npz", "empty.npz", "pickled.npz", "other.npz"):
        with pytest.raises(InputError, match=f"{name}: not an .npz file of arrays$"):
            load_perceptual(tmp_path / name)
    with pytest.raises(InputError, match="absent.npz: no such file"):
        load_perceptual(tmp_path / "absent.npz")
    with pytest.raises(InputError, match="cannot be read"):
        load_perceptual(tmp_path)
