"""Perceptual distance of images, from the features of a network that you provide.

LPIPS (arXiv 1801.03924, section 3, equation 1): both images pass a classifier. At some of its
layers the features are normalized to unit length over the channels, subtracted, squared, weighted
by channel and averaged over positions; the layers are summed. This package contains no weights of
such a network: they come from an .npz file with these arrays, i = 0..n-1, j = 0..taps-1:

    conv{i}/kernel  (3, 3, in, out)  convolutions, stride 1, zero padding 1, each followed by ReLU;
                                     conv0 takes RGB
    conv{i}/bias    (out,)
    taps            (taps,) int      convolutions after whose ReLU features are compared, ascending
    pools           (pools,) int     convolutions that follow a 2x2 max pool of stride 2, ascending;
                                     may be empty
    lin{j}          (C_j,)           weights of tap j's channels, not negative; without any lin,
                                     every weight is 1 / C_j
    shift, scale    (3,) each        images x in [-1, 1] enter as (x - shift) / scale

LPIPS with VGG16, from torchvision's weights and the linear weights that its authors publish
(vgg.pth, version 0.1):

    import numpy as np, torch, torchvision

    vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").features
    linear = torch.load("vgg.pth", map_location="cpu")
    arrays = {
        "taps": [1, 3, 6, 9, 12],  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        "pools": [2, 4, 7, 10],
        "shift": [-0.030, -0.088, -0.188],
        "scale": [0.458, 0.448, 0.450],
    }
    # k: the convolutions among vgg's layers; torch keeps kernels as (out, in, 3, 3)
    for i, k in enumerate([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]):
        arrays[f"conv{i}/kernel"] = vgg[k].weight.detach().numpy().transpose(2, 3, 1, 0)
        arrays[f"conv{i}/bias"] = vgg[k].bias.detach().numpy()
    for j in range(5):
        arrays[f"lin{j}"] = linear[f"lin{j}.model.1.weight"].numpy().ravel()  # from (1, C_j, 1, 1)
    np.savez("lpips_vgg16.npz", **arrays)

Without the linear weights leave out the last loop: this is then a feature distance, not LPIPS,
and its values cannot be compared with LPIPS.

Letters: B images, h w sides of an image, C_j channels of tap j.
"""

import os
import re
import zipfile
from typing import NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io import files

_EPS = 1e-10  # of the unit length; under the root, so that all-zero features have a finite gradient


@flax.struct.dataclass
class PerceptualNetwork:
    """The arrays of the file, never trained: a pytree to pass to jitted functions."""

    kernels: tuple[jax.Array, ...]  # (3, 3, in, out) each
    biases: tuple[jax.Array, ...]  # (out,) each
    lins: tuple[jax.Array, ...]  # (C_j,) each, one for each tap
    shift: jax.Array  # (3,)
    scale: jax.Array  # (3,)
    taps: tuple[int, ...] = flax.struct.field(pytree_node=False)
    pools: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def min_side(self) -> int:
        """Pixels of the smallest image that every pool can halve."""
        return 2 ** sum(i <= self.taps[-1] for i in self.pools)


def load_perceptual(path: str | os.PathLike) -> PerceptualNetwork:
    """Reads an .npz file of the format that the module's docstring describes.

    Arrays become float32.

    Raises:
      InputError: there is no such file, it is no .npz file, an array is missing or unknown, or an
        array does not fit the others.
    """
    arrays = _read(path)

    def fail(message: str) -> NoReturn:
        raise InputError(f"{path}: {message}")

    def get(name: str, shape: tuple[int | None, ...]) -> jax.Array:
        """The array as float32; None in `shape` stands for any size."""
        array = arrays[name]
        if array.dtype.kind not in "fiu":
            fail(f"{name} must contain numbers; got dtype {array.dtype}")
        fits = array.ndim == len(shape) and all(
            size in (None, actual) for size, actual in zip(shape, array.shape)
        )
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            fail(f"{name} must have shape ({sizes}); got {array.shape}")
        if not np.isfinite(array).all():
            fail(f"{name} must be finite; got NaN or infinite values")
        return jnp.asarray(array, jnp.float32)

    def get_indices(name: str) -> tuple[int, ...]:
        array = arrays[name]
        integers = array.dtype.kind in "iu" or not array.size
        indices = array.tolist()
        ascending = array.ndim == 1 and integers and indices == sorted(set(indices))
        if not ascending or not all(0 <= i < num_convs for i in indices):
            fail(
                f"{name} must be an ascending list of convolutions from 0 to {num_convs - 1}; "
                f"got {str(indices):.80}"
            )
        return tuple(indices)

    matches = (re.fullmatch(r"conv(\d+)/(?:kernel|bias)", name) for name in arrays)
    num_convs = max((int(m[1]) for m in matches if m), default=0) + 1
    names = [f"conv{i}/{part}" for i in range(num_convs) for part in ("kernel", "bias")]
    names += ["taps", "pools", "shift", "scale"]
    if "taps" in arrays and any(name.startswith("lin") for name in arrays):  # all of them or none
        names += [f"lin{j}" for j in range(arrays["taps"].size)]
    if missing := [name for name in names if name not in arrays]:
        fail(f"missing {_join(missing)}")
    if unknown := sorted(set(arrays) - set(names)):
        fail(f"unknown {_join(unknown)}; the docstring of {__name__} describes the format")

    kernels: list[jax.Array] = []
    biases: list[jax.Array] = []
    for i in range(num_convs):
        inputs = kernels[-1].shape[-1] if kernels else 3
        kernels.append(get(f"conv{i}/kernel", (3, 3, inputs, None)))
        biases.append(get(f"conv{i}/bias", (kernels[-1].shape[-1],)))
    taps, pools = get_indices("taps"), get_indices("pools")
    if not taps:
        fail("taps is empty; name at least one convolution whose features are compared")
    widths = [kernels[i].shape[-1] for i in taps]
    if "lin0" in arrays:
        lins = [get(f"lin{j}", (width,)) for j, width in enumerate(widths)]
    else:
        lins = [jnp.full(width, 1 / width) for width in widths]
    for j, lin in enumerate(lins):
        if (lin < 0).any():
            fail(f"lin{j} must not be negative; got {lin.min():g}")
    shift, scale = get("shift", (3,)), get("scale", (3,))
    if (scale == 0).any():
        fail("scale must not contain zero")
    return PerceptualNetwork(tuple(kernels), tuple(biases), tuple(lins), shift, scale, taps, pools)


def perceptual_distance(network: PerceptualNetwork, x: jax.Array, y: jax.Array) -> jax.Array:
    """The distance of each pair of images, 0 where their features agree.

    Symmetric. Each image passes the network in a forward pass of its own, so a target costs no
    backward pass.

    Args:
      x, y: (B, h, w, 3) in [-1, 1].

    Returns:
      (B,) float32.

    Raises:
      InputError: the shapes differ, or the images are too small for the network's pools.
    """
    if x.shape != y.shape:
        raise InputError(f"images must have equal shapes; got {x.shape} and {y.shape}")
    if min(x.shape[1:3]) < network.min_side:
        raise InputError(
            f"the pools of the perceptual network need images of side {network.min_side} or more; "
            f"got side {min(x.shape[1:3])}"
        )
    distance = jnp.zeros(x.shape[0])
    for lin, a, b in zip(network.lins, _features(network, x), _features(network, y)):
        distance += jnp.mean(jnp.sum(lin * (_unit(a) - _unit(b)) ** 2, axis=-1), axis=(1, 2))
    return distance


def _features(network: PerceptualNetwork, x: jax.Array) -> list[jax.Array]:
    """(B, h, w, 3) -> (B, h_j, w_j, C_j) for each tap."""
    x = (x.astype(jnp.float32) - network.shift) / network.scale
    taps = []
    for i in range(network.taps[-1] + 1):
        if i in network.pools:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x,
            network.kernels[i],
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + network.biases[i])
        if i in network.taps:
            taps.append(x)
    return taps


def _unit(features: jax.Array) -> jax.Array:
    """Unit length over the last axis; zero stays zero."""
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + _EPS)


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name."""
    path = files.expand(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file (the docstring of {__name__} shows how to make one)"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    # np.load gives a bare array for .npy files. It takes other files for pickles and refuses them.
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
        raise InputError(f"{path}: not an .npz file of arrays") from None
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # another kind of zip
        raise InputError(f"{path}: not an .npz file of arrays")
    return arrays


def _join(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
