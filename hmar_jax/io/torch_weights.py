"""Reading PyTorch weights: state dicts in a .pth file, and their tensors as JAX modules keep them.

The only place that imports torch.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io import files

StateDict = Mapping[str, np.ndarray]

# Prefixes that DistributedDataParallel and torch.compile leave in names.
_WRAPPERS = ("module.", "_orig_mod.")


def load_state_dicts(path: str | os.PathLike, markers: Mapping[str, str]) -> dict[str, StateDict]:
    """Reads a .pth file and finds the models in it.

    Args:
      path: a file written by torch.save: a state dict, or a trainer's checkpoint that nests some.
      markers: for each kind of model, a parameter name that only its state dicts contain.

    Returns:
      For each kind that is found, its first state dict: numpy arrays, floats as float32, by name
      without the prefixes of wrappers.

    Raises:
      InputError: the file cannot be read, or contains none of the models.
      ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            'reading published weights needs PyTorch: pip install "hmar_jax[torch]"'
        ) from None
    path = files.expand(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: must be a .pth file; got a directory") from None
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path}: not a file of PyTorch weights ({reason})") from None
    found: dict[str, dict[str, Any]] = {}
    _find(loaded, markers, found)
    if not found:
        looked_for = ", ".join(f"{name!r} of a {kind}" for kind, name in markers.items())
        raise InputError(f"{path}: contains no model of a known kind (looked for {looked_for})")
    to_numpy = lambda tensor: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return {
        kind: {name: to_numpy(t) for name, t in state.items() if hasattr(t, "numpy")}
        for kind, state in found.items()
    }


def _find(node: Any, markers: Mapping[str, str], found: dict[str, dict[str, Any]]) -> None:
    """Collects the first state dict of each kind in nested mappings."""
    if not isinstance(node, Mapping):
        return
    names = {_unwrap(name): value for name, value in node.items() if isinstance(name, str)}
    kind = next((kind for kind, marker in markers.items() if marker in names), None)
    if kind is not None:
        found.setdefault(kind, names)
        return
    for value in node.values():
        _find(value, markers, found)


def _unwrap(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


class StateDictReader:
    """Takes tensors out of a state dict by name, in the layouts of Flax.

    Linear weights are transposed, and convolution kernels go from OIHW to HWIO.
    """

    def __init__(self, state: StateDict):
        self.state = state

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def __call__(self, name: str) -> np.ndarray:
        """The tensor of this name as it is.

        Raises:
          InputError: there is none.
        """
        if name not in self.state:
            raise InputError(
                f"the weights have no {name!r}: they are incomplete or of another model"
            )
        return self.state[name]

    def linear(self, name: str) -> dict[str, np.ndarray]:
        return {"kernel": self(f"{name}.weight").T, "bias": self(f"{name}.bias")}

    def conv(self, name: str) -> dict[str, np.ndarray]:
        kernel = self(f"{name}.weight").transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self(f"{name}.bias")}

    def conv1x1(self, name: str) -> dict[str, np.ndarray]:
        """A 1x1 convolution as a dense layer."""
        return {"kernel": self(f"{name}.weight")[:, :, 0, 0].T, "bias": self(f"{name}.bias")}

    def norm(self, name: str) -> dict[str, np.ndarray]:
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def count(self, pattern: str) -> int:
        """1 + the largest number that the pattern's group matches in a name; 0 without a match."""
        matches = (re.match(pattern, name) for name in self.state)
        return 1 + max((int(m[1]) for m in matches if m), default=-1)
