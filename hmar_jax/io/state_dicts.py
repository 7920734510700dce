"""Tensors of PyTorch state dicts in the layouts of Flax."""

import re

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io.weight_files import StateDict


class StateDictReader:
    """Takes tensors out of a state dict by name, in the layouts of Flax.

    Linear weights are transposed, and convolution kernels go from OIHW to HWIO.
    """

    def __init__(self, state: StateDict):
        self.state = state

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def __call__(self, name: str) -> np.ndarray:
        """The parameter of this name as it is.

        Raises:
          InputError: there is none, or it is not of finite floating-point numbers.
        """
        value = np.asarray(self.buffer(name))
        if not np.issubdtype(value.dtype, np.floating):
            raise InputError(
                f"the weight {name!r} must be of floating-point numbers; it is {value.dtype}: "
                "quantized models must be converted to float32 or bfloat16 first"
            )
        if not np.isfinite(value).all():
            count = value.size - np.isfinite(value).sum()
            raise InputError(
                f"the weight {name!r} has {count:,} of {value.size:,} values that are not finite "
                "(NaN or infinite): its training diverged, or a conversion to half precision "
                "overflowed; take other weights"
            )
        return value

    def buffer(self, name: str) -> np.ndarray:
        """The tensor of this name, of any type and with any values.

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
