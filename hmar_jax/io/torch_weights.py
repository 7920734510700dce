"""Reading files that torch.save wrote. The only place that imports torch."""

import os
import pickle
import re
import warnings
from typing import Any

import numpy as np

from hmar_jax.errors import InputError
from hmar_jax.io import pickled_objects
from hmar_jax.io.weight_formats import printable

# Before it, a file could make torch.load run code even with weights_only=True (CVE-2025-32434).
_SAFE_SINCE = "2.6"
_MAX_NAMED = 3  # classes that a message lists


def load_torch_file(path: str | os.PathLike) -> Any:
    """The content of a file of torch.save: tensors on the CPU, in containers and plain objects.

    No code of the file runs: classes other than those of `pickled_objects` are refused.

    Raises:
      InputError: the file has other classes, or is damaged.
      ImportError: torch is not installed, or older than 2.6.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            f'reading {path} needs PyTorch: pip install "hmar_jax[torch]" (.safetensors files '
            "need none)"
        ) from None
    if torch.__version__ < _SAFE_SINCE:
        raise ImportError(
            f"reading {path} needs PyTorch {_SAFE_SINCE} or newer, got {torch.__version__}: "
            'pip install "hmar_jax[torch]"'
        )
    allowed = torch.serialization.safe_globals(pickled_objects.allowed_globals())
    with allowed, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about pickles that are then refused
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # torch raises many kinds for damaged or foreign files
            raise InputError(f"{path}: {_reason(torch, path, error)}") from None


def _reason(torch: Any, path: str | os.PathLike, error: Exception) -> str:
    """What is wrong with a file that torch.load refused, in one line."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    names = re.findall(r"GLOBAL (\S+)", text) or re.findall(r"got <class '([^']+)'>", text)
    if names:
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
        except Exception:  # a file of the format before PyTorch 1.6: the first class it is
            pass
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        shown = ", ".join(printable(name) for name in names[:_MAX_NAMED])
        return (
            f"contains {shown}{more} beside weights, and reading such "
            "objects could run code; where the file was written, save the weights alone: "
            'torch.save(model.state_dict(), "weights.pth")'
        )
    if "TorchScript" in text:
        return "is a TorchScript program, not weights; save model.state_dict() instead"
    if isinstance(error, pickle.UnpicklingError | EOFError) or "magic number" in text:
        text = "a pickle that torch.save did not write"
    shown = printable(_clip(text), 200)
    return f"is damaged, or not a file of PyTorch weights ({shown}); download it again"


def _clip(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"


def to_numpy(name: str, tensor: Any) -> np.ndarray:
    """A tensor as an array, floats as float32.

    Raises:
      InputError: it is quantized, sparse or has no values.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized or tensor.is_meta or layout != "strided":
        kind = "empty (meta)" if tensor.is_meta else dtype if tensor.is_quantized else layout
        raise InputError(
            f"the weight {name!r} must be a dense floating-point tensor; it is {kind}: convert the "
            "model to float32 or bfloat16 first"
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    check_dtype(name, dtype)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def check_dtype(name: str, dtype: str) -> None:
    """Refuses types whose values mean nothing without scales that are stored elsewhere.

    Args:
      dtype: as torch or safetensors names it.
    """
    if re.match(r"float[48]|f[48]_", dtype.lower()):
        raise InputError(
            f"the weight {name!r} is {dtype}: weights of 4 or 8 bits are not supported; convert "
            "the model to float32, float16 or bfloat16 first"
        )
