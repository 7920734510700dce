"""Perceptual distance of images, by the features of a network that you bring.

LPIPS (arXiv 1801.03924, section 3, equation 1): both images go through a classifier; at some of its layers the
features are scaled to unit length over the channels, subtracted, squared, weighted by channel, averaged over
positions; the layers are summed. The weights are not ours to ship, so they come from an .npz file with these arrays,
i = 0..n-1, j = 0..taps-1:

    conv{i}/kernel  (3, 3, in, out)  convolutions, stride 1, zero padding 1, each followed by ReLU; conv0 takes RGB
    conv{i}/bias    (out,)
    taps            (taps,) int      convolutions after whose ReLU features are compared, ascending
    pools           (pools,) int     convolutions before which a 2x2 max pool of stride 2 stands, ascending; or empty
    lin{j}          (C_j,)           weights of tap j's channels, not negative; without any lin, every weight is 1 / C_j
    shift, scale    (3,) each        images x in [-1, 1] enter as (x - shift) / scale

LPIPS with VGG16, from torchvision's weights and the linear weights that its authors publish (vgg.pth, version 0.1):

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

Without the linear weights leave out the last loop: this is then a feature distance, not LPIPS, and its numbers are
its own.
"""

import os
import re
import zipfile

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hmar_jax.errors import InputError

_EPS = 1e-10  # of the unit length; under the root, so that features that are all zero have a finite gradient


@flax.struct.dataclass
class PerceptualNetwork:
    """The arrays of the file, a frozen pytree: pass it to jitted functions as an argument. Never trained."""

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
    """Reads the .npz file that the module's docstring describes. Arrays become float32.

    Raises:
      InputError: no such file, not an .npz, a name missing or unknown, or an array that does not fit, by name.
    """
    arrays = _read(path)

    def fail(message):
        raise InputError(f"{path}: {message}")

    def get(name, shape):
        """The array as float32; `shape` has None where any size will do."""
        array = arrays[name]
        if array.dtype.kind not in "fiu":
            fail(f"{name} is {array.dtype}, not numbers")
        if array.ndim != len(shape) or any(
            want not in (None, size) for want, size in zip(shape, array.shape)
        ):
            fail(
                f"{name} has shape {array.shape}, not ({', '.join('any' if n is None else str(n) for n in shape)})"
            )
        if not np.isfinite(array).all():
            fail(f"{name} has values that are not finite")
        return jnp.asarray(array, jnp.float32)

    def get_indices(name):
        array = arrays[name]
        indices = (
            array.tolist()
            if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
            else None
        )
        if (
            indices is None
            or indices != sorted(set(indices))
            or not all(0 <= i < num_convs for i in indices)
        ):
            fail(f"{name} is not an ascending list of convolutions, 0 to {num_convs - 1}")
        return tuple(indices)

    convs = [
        int(m[1])
        for m in (re.fullmatch(r"conv(\d+)/(?:kernel|bias)", name) for name in arrays)
        if m
    ]
    num_convs = max(convs, default=0) + 1
    names = [f"conv{i}/{part}" for i in range(num_convs) for part in ("kernel", "bias")]
    names += ["taps", "pools", "shift", "scale"]
    if "taps" in arrays and any(name.startswith("lin") for name in arrays):  # all of them or none
        names += [f"lin{j}" for j in range(arrays["taps"].size)]
    if missing := [name for name in names if name not in arrays]:
        fail(f"lacks {_some(missing)}")
    if unknown := sorted(set(arrays) - set(names)):
        fail(f"has unknown {_some(unknown)}")

    kernels, biases = [], []
    for i in range(num_convs):
        kernels.append(
            get(f"conv{i}/kernel", (3, 3, kernels[-1].shape[-1] if kernels else 3, None))
        )
        biases.append(get(f"conv{i}/bias", (kernels[-1].shape[-1],)))
    taps, pools = get_indices("taps"), get_indices("pools")
    if not taps:
        fail("taps is empty: nothing would be compared")
    widths = [kernels[i].shape[-1] for i in taps]
    if "lin0" in arrays:
        lins = [get(f"lin{j}", (width,)) for j, width in enumerate(widths)]
    else:
        lins = [jnp.full(width, 1 / width) for width in widths]
    for j, lin in enumerate(lins):
        if (lin < 0).any():
            fail(f"lin{j} has negative weights")
    shift, scale = get("shift", (3,)), get("scale", (3,))
    if (scale == 0).any():
        fail("scale has a zero")
    return PerceptualNetwork(tuple(kernels), tuple(biases), tuple(lins), shift, scale, taps, pools)


def perceptual_distance(network: PerceptualNetwork, x, y):
    """The distance of each pair of images: 0 for equal ones, else positive unless the features agree.

    Args:
      x, y: (B, h, w, 3) in [-1, 1]; symmetric. Each takes its own forward pass, so a target costs no backward pass.

    Returns:
      (B,) float32.

    Raises:
      InputError: the shapes differ, or the images are too small for the network's pools.
    """
    if x.shape != y.shape:
        raise InputError(
            f"images of shapes {x.shape} and {y.shape} have no distance: they must be equal"
        )
    if min(x.shape[1:3]) < network.min_side:
        raise InputError(
            f"images of side {min(x.shape[1:3])} are too small for the pools of the perceptual network: "
            f"it needs side {network.min_side} or more"
        )
    distance = 0.0
    for lin, a, b in zip(network.lins, _features(network, x), _features(network, y)):
        distance += jnp.mean(jnp.sum(lin * (_unit(a) - _unit(b)) ** 2, axis=-1), axis=(1, 2))
    return distance


def _features(network, x):
    """(B, h, w, 3) -> for each tap, (B, h_j, w_j, C_j)."""
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


def _unit(features):
    """Unit length over the last axis; zero stays zero."""
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + _EPS)


def _read(path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file (hmar_jax/models/perceptual.py says how to make one)"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    # np.load gives a bare array for .npy, and a file that is none of its kinds is taken for a pickle, which is refused
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
        raise InputError(f"{path}: not an .npz file of arrays") from None
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # some other zip
        raise InputError(f"{path}: not an .npz file of arrays")
    return arrays


def _some(names) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
