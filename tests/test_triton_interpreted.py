"""The Triton kernels against float64 in Triton's interpreter, on short lists and small tiles.

Needs no GPU. The interpreter computes in numpy: it checks indices, masks and formulas, but not the
compiled code. It cannot multiply bfloat16 matrices, a type that numpy lacks; the tests on a GPU do.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

MISSING = [name for name in ("triton", "torch") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"requires {' and '.join(MISSING)}")

TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


def random_sizes(seed, length=60):
    rng = np.random.default_rng(seed)
    cuts = rng.choice(np.arange(1, length), size=rng.integers(0, 8), replace=False)
    return np.diff([0, *sorted(cuts), length]).tolist()


def case(sizes, pattern, dtype="float32", dim=16, scale=None, **options):
    scale = dim**-0.5 if scale is None else scale
    return dict(sizes=sizes, pattern=pattern, dtype=dtype, dim=dim, scale=scale, **options)


CASES = [
    *(case(s, p, t) for s in ([1], [7, 50, 3]) for p in ("diagonal", "causal") for t in TOLERANCE),
    *(
        case(random_sizes(n), ("diagonal", "causal")[n % 2], list(TOLERANCE)[n // 2 % 2])
        for n in range(4)
    ),
    case([1, 4, 40], "causal", dim=8),  # fewer columns than the matrix units need
    case([5, 40], "diagonal", dim=24, batch=3, heads=3),  # columns that are not a power of two
    case([1, 4, 40], "causal", scale=-0.5),
    case([1, 4, 40], "diagonal", scale=0.0),
    case([1, 5, 30, 2], "diagonal", spread=20.0),  # scores in the thousands
    case([1, 5, 30, 2], "causal", spread=20.0),
    # Gradients that would vanish, or overflow, as float16 d_scores.
    case([1, 60], "diagonal", "float16", d_out_size=1e-4),
    case([1, 60], "causal", "float16", d_out_size=1e-4),
    case([20, 7], "diagonal", "float16", scale=0.01, d_out_size=1000.0),
    case([20, 40], "causal", "float16", scale=0.01, d_out_size=1000.0),
]


@pytest.fixture(scope="module")
def errors():
    """Relative errors of out, d_q, d_k, d_v of each case, from one process for all."""
    script = pathlib.Path(__file__).with_name("triton_interpreted.py")
    result = subprocess.run(
        [sys.executable, str(script), json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(c) for c in CASES])
def test_errors_against_float64(number, errors):
    options = CASES[number]
    tolerance = TOLERANCE[options["dtype"]]
    if options.get("d_out_size", 1.0) < 1:
        tolerance = (
            1e-2  # the results themselves are small numbers, of which float16 has few digits
        )
    if "spread" in options:
        tolerance = 0.1  # softmax is nearly one-hot, and the gradients are mostly rounding errors
    for name, error in zip(("out", "d_q", "d_k", "d_v"), errors[number], strict=True):
        assert error < tolerance, f"{name}: relative error {error:.1e}"
