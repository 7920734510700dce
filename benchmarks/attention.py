"""Times block attention on a GPU next to PyTorch's attention, and checks it against float64.

    python benchmarks/attention.py [--dtype=bfloat16] [--compare=varlen,sdpa,flex] [--json=PATH]
        times, one line per case
    python benchmarks/attention.py --check [--small]
        errors and reproducibility, through JAX
    compute-sanitizer --tool=memcheck|racecheck python benchmarks/attention.py --check --small
        memory errors and data races
    python benchmarks/tune_attention.py
        another command: finds the tile sizes that are in the code

All times are medians in milliseconds, forward/backward. Columns of the table:

    graph       the Triton kernels on PyTorch tensors, launched from a CUDA graph and timed with
                CUDA events, with the L2 cache flushed before each run (only with PyTorch)
    triton      the Triton kernels in JAX: what one more call costs in a chain of calls in one
                jitted function
    mosaic_gpu  the same for mosaic_gpu.py, where it can run
    TFLOP/s, GB/s, of roofline
                of the implementation that `block_attention` selects by default, marked *
    varlen, sdpa, flex
                PyTorch's attention
    required, goal
                times on an H100 that the kernels must meet, and should meet

FLOPs count the scores that the mask keeps: 4 D each forward, 10 D backward (2.5 times as many, as
is usual). Bytes count each input and output once. The roofline is the larger of FLOPs at 785
TFLOP/s and bytes at 3.02 TB/s, both measured on an H100.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import time

# PyTorch allocates in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic_gpu, triton_launches, triton_tuning
from pallas_kernels import triton as triton_calls
from pallas_kernels.platform import gpu_name

try:
    import torch
except ModuleNotFoundError:
    torch = None

DEVICE = "cuda"
DIM = 64
SCALE = DIM**-0.5
FLOPS_PER_SECOND = 785e12
BYTES_PER_SECOND = 3.02e12

# Sides of the square scales of the published models, by their number of tokens.
SIDES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table; required and goal are (forward, backward) milliseconds."""

    length: int  # L
    batch: int
    heads: int
    pattern: str
    required: tuple[float, float] | None = None
    goal: tuple[float, float] | None = None

    @property
    def sizes(self):
        """Block sizes."""
        return tuple(side * side for side in SIDES[self.length])

    @property
    def shape(self):
        """(B, L, H, D)"""
        return (self.batch, self.length, self.heads, DIM)

    @property
    def num_scores(self):
        """Scores that the mask keeps, of all images and heads."""
        stops = np.cumsum(self.sizes)
        keys = self.sizes if self.pattern == "diagonal" else stops
        return int(np.dot(self.sizes, keys)) * self.batch * self.heads

    def work(self, backward):
        """(FLOPs, bytes) of a forward or backward pass in half precision."""
        flops = (10 if backward else 4) * DIM * self.num_scores
        return flops, (8 if backward else 4) * 2 * int(np.prod(self.shape))

    def roofline_seconds(self, backward):
        """The least time that the FLOPs or the bytes of a pass take on an H100."""
        flops, num_bytes = self.work(backward)
        return max(flops / FLOPS_PER_SECOND, num_bytes / BYTES_PER_SECOND)

    def __str__(self):
        return f"{self.length} {self.batch}x{self.heads} {self.pattern}"


CASES = (
    Case(680, 64, 16, "diagonal", (0.19, 0.60), (0.14, 0.38)),
    Case(680, 64, 16, "causal", (0.30, 0.95), (0.22, 0.70)),
    Case(2240, 16, 16, "diagonal", (0.30, 1.00), (0.24, 0.70)),
    Case(2240, 16, 16, "causal", (0.58, 1.75), (0.45, 1.30)),
    Case(9451, 2, 16, "diagonal", (0.55, 1.75), (0.46, 1.30)),
    Case(9451, 2, 16, "causal", (1.20, 4.0), (1.00, 3.0)),
    Case(680, 4, 30, "diagonal"),
    Case(2240, 4, 30, "diagonal"),
    Case(9451, 4, 30, "diagonal"),
)


def triton_problem(case, tuning=None):
    """The Problem of the Triton kernels, with the tile sizes in the code if none are given."""
    gpu = gpu_name(jax.devices()[0].device_kind)
    tuning = tuning or triton_tuning.tuning_for(gpu, case.length, DIM, "float16", case.pattern)
    return triton_launches.Problem(case.sizes, case.pattern, SCALE, tuning)


def mosaic_config(case, tuning=None):
    """The CallConfig of the Mosaic GPU kernels, with the tuning in the code if none is given."""
    gpu = gpu_name(jax.devices()[0].device_kind)
    tuning = tuning or mosaic_gpu.tuning_for(gpu, case.length, DIM, case.pattern)
    core_count = jax.devices()[0].core_count
    return mosaic_gpu.CallConfig(case.sizes, case.pattern, SCALE, tuning, core_count)


# Times on PyTorch tensors.


def torch_inputs(case, dtype):
    """q, k, v and d_out, (B, L, H, D) each."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = functools.partial(
        torch.randn, case.shape, generator=generator, device=DEVICE, dtype=getattr(torch, dtype)
    )
    return [make() for _ in range(4)]


def torch_median(function, repeat_ms=60):
    """Median milliseconds of a function on PyTorch tensors."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=repeat_ms, return_mode="median")


def capture_graph(function):
    """Captures the launches of a function in a CUDA graph; returns a function that replays it.

    Several short kernels then run without Python between them.
    """
    function()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_triton_graph(case, problem, dtype):
    """(forward, backward) of the Triton kernels in a CUDA graph."""
    from torch_launch import TorchAttention

    q, k, v, d_out = torch_inputs(case, dtype)
    attention = TorchAttention(problem, q)
    return (
        torch_median(capture_graph(lambda: attention.forward(q, k, v))),
        torch_median(capture_graph(lambda: attention.backward(q, k, v, d_out))),
    )


def time_autograd(function, inputs, d_out):
    """(forward, backward) of a PyTorch function of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        forward = torch_median(lambda: function(*inputs))
    out = function(*inputs)
    return forward, torch_median(
        lambda: torch.autograd.grad(out, inputs, d_out.view_as(out), retain_graph=True)
    )


def block_indices(case):
    """(L,): the block of each token."""
    sizes = torch.tensor(case.sizes)
    return torch.repeat_interleave(torch.arange(len(case.sizes)), sizes).to(DEVICE)


def time_varlen(case, dtype):
    """PyTorch's flash attention over sequences of any length; diagonal pattern only."""
    from torch.nn.attention.varlen import varlen_attn

    if case.pattern != "diagonal":
        return None
    *inputs, d_out = (x.flatten(0, 1) for x in torch_inputs(case, dtype))
    edges = torch.tensor([0, *np.cumsum(case.sizes * case.batch)], dtype=torch.int32, device=DEVICE)
    longest = max(case.sizes)
    return time_autograd(
        lambda q, k, v: varlen_attn(q, k, v, edges, edges, longest, longest), inputs, d_out
    )


def time_sdpa(case, dtype):
    """PyTorch's scaled_dot_product_attention with a boolean mask."""
    *inputs, d_out = (x.transpose(1, 2) for x in torch_inputs(case, dtype))
    block = block_indices(case)
    mask = block[:, None] == block if case.pattern == "diagonal" else block[:, None] >= block
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask)
    return time_autograd(attend, inputs, d_out)


def time_flex(case, dtype):
    """PyTorch's FlexAttention, compiled, with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *inputs, d_out = (x.transpose(1, 2) for x in torch_inputs(case, dtype))
    block = block_indices(case)

    def diagonal(b, h, query, key):
        return block[query] == block[key]

    def causal(b, h, query, key):
        return block[query] >= block[key]

    torch._dynamo.reset()  # each case compiles its own program
    mask_mod = diagonal if case.pattern == "diagonal" else causal
    mask = create_block_mask(mask_mod, None, None, case.length, case.length)
    attend = torch.compile(flex_attention, dynamic=False)
    return time_autograd(functools.partial(attend, block_mask=mask), inputs, d_out)


TORCH_ATTENTION = {"varlen": time_varlen, "sdpa": time_sdpa, "flex": time_flex}


# Times inside jit.


def time_in_jit(case, dtype):
    """{implementation: (forward, backward)} of one call in a chain of dependent calls."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, case.shape, dtype) for key in keys]
    config = triton_calls.CallConfig(triton_problem(case))
    times = {"triton": time_chain(triton_calls, config, *arrays)}
    if mosaic_gpu.unsupported_reason(arrays[0]) is None:
        times["mosaic_gpu"] = time_chain(mosaic_gpu, mosaic_config(case), *arrays)
    return times


def time_chain(module, config, q, k, v, d_out):
    """(forward, backward) of one call in a chain of dependent calls, in milliseconds."""
    out, lse = jax.jit(module.run_forward(config))(q, k, v)

    # The output replaces q, and d_v replaces v; neither leaves its range over the calls. Unrolled,
    # because a loop would copy its carry.
    def forward(q, k, v, num_calls):
        for _ in range(num_calls):
            q = module.run_forward(config)(q, k, v)[0]
        return q

    def backward(q, k, v, d_out, out, lse, num_calls):
        results = []
        for _ in range(num_calls):
            d_q, d_k, v = module.run_backward(config)(q, k, v, out, lse, d_out)
            results += [d_q, d_k]  # returned: unused results would not be computed
        return results, v

    return jit_medians((forward, (q, k, v)), (backward, (q, k, v, d_out, out, lse)))


def jit_medians(*cases, few=2, many=12, repeats=15):
    """Milliseconds of one more call inside each function.

    Args:
      cases: (function, arrays) each; function(*arrays, num_calls=n) makes n calls.
      few, many: the two numbers of calls whose times are compared.
      repeats: timed runs of each.
    """

    def compiled(case, num_calls):
        function, arrays = case
        return jax.jit(functools.partial(function, num_calls=num_calls)).lower(*arrays).compile()

    # Compiles in parallel, since it takes longer than the timing.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        pending = [
            [threads.submit(compiled, case, num_calls) for num_calls in (few, many)]
            for case in cases
        ]
    medians = []
    for (_, arrays), runs in zip(cases, pending, strict=True):
        seconds = [[], []]
        for repeat in range(repeats + 1):
            for run, times in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run.result()(*arrays))
                if repeat:  # the first run warms up
                    times.append(time.perf_counter() - start)
        short, long = (statistics.median(times) for times in seconds)
        medians.append(1e3 * (long - short) / (many - few))
    return medians


# The table.


def measure(case, dtype, compare):
    """All times of one case as a JSON-ready dict: name -> [forward, backward] in ms, or None."""
    times = {}
    if torch is not None:
        times["graph"] = time_triton_graph(case, triton_problem(case), dtype)
        for name in compare:
            try:
                times[name] = TORCH_ATTENTION[name](case, dtype)
            except Exception as error:  # another version of PyTorch must not stop the benchmark
                message = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{case}: {name} failed: {message}", flush=True)
                times[name] = None
    return times | time_in_jit(case, dtype)


def selected_implementation(case, dtype):
    """The name of the implementation that `block_attention` selects by default."""
    q = jax.ShapeDtypeStruct(case.shape, dtype)
    if mosaic_gpu.unsupported_reason(q) is None and mosaic_gpu.is_faster(q, case.pattern):
        return "mosaic_gpu"
    return "triton"


def format_pair(x, digits=3):
    """Formats (forward, backward) as "forward/backward", and None as "-"."""
    return f"{x[0]:.{digits}f}/{x[1]:.{digits}f}" if x else "-"


def print_case(case, times, compare, selected):
    """Prints one line of the table."""

    def marked(name):
        return f"{format_pair(times.get(name))}{'*' * (name == selected)}"

    work = [case.work(backward) for backward in (False, True)]
    seconds = [1e-3 * x for x in times[selected]]
    roofline = [case.roofline_seconds(backward) for backward in (False, True)]
    columns = [
        f"{case!s:22}",
        f"{format_pair(times.get('graph')):12}",
        f"{marked('triton'):13}",
        f"{marked('mosaic_gpu'):13}",
        f"{format_pair([w[0] / s / 1e12 for w, s in zip(work, seconds)], 0):8}",
        f"{format_pair([w[1] / s / 1e9 for w, s in zip(work, seconds)], 0):10}",
        f"{format_pair([r / s for r, s in zip(roofline, seconds)], 2):11}",
        *(f"{format_pair(times.get(name)):12}" for name in compare),
        f"{format_pair(case.required, 2):10}",
        f"{format_pair(case.goal, 2)}",
    ]
    print(" ".join(columns), flush=True)


def print_header(compare):
    """Prints the column names of the table."""
    columns = {
        "case": 22,
        "graph": 12,
        "triton": 13,
        "mosaic_gpu": 13,
        "TFLOP/s": 8,
        "GB/s": 10,
        "of roofline": 11,
        **{name: 12 for name in compare},
        "required": 10,
        "goal": 10,
    }
    print(" ".join(f"{name:{width}}" for name, width in columns.items()), flush=True)


# Checks.


def expected_by_blocks(sizes, pattern, q, k, v, d_out):
    """[out, d_q, d_k, d_v] in float64, one query block at a time: no (L, L) array."""
    q, k, v, d_out = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, d_out))
    results = [np.zeros_like(q) for _ in range(4)]  # (B, H, L, D)
    out, d_q, d_k, d_v = results
    stops = np.cumsum(sizes)
    for start, stop in zip(stops - sizes, stops, strict=True):
        queries = np.s_[:, :, start:stop]
        keys = queries if pattern == "diagonal" else np.s_[:, :, :stop]
        p = SCALE * (q[queries] @ k[keys].swapaxes(2, 3))
        p = np.exp(p - p.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[queries] = p @ v[keys]
        d_p = d_out[queries] @ v[keys].swapaxes(2, 3)
        d_scores = SCALE * p * (d_p - (p * d_p).sum(-1, keepdims=True))
        d_q[queries] = d_scores @ k[keys]
        d_k[keys] += d_scores.swapaxes(2, 3) @ q[queries]
        d_v[keys] += p.swapaxes(2, 3) @ d_out[queries]
    return [x.transpose(0, 2, 1, 3) for x in results]


def check(lists):
    """Prints relative L2 errors for random inputs, and whether two runs agree in every bit."""
    rng = np.random.default_rng(int(time.time()))
    for sizes in lists:
        length = sum(sizes)
        for pattern in ("diagonal", "causal"):
            for dtype in ("float16", "bfloat16"):
                arrays = [
                    jnp.asarray(rng.standard_normal((1, length, 2, DIM)), dtype) for _ in range(4)
                ]
                expected = expected_by_blocks(sizes, pattern, *arrays)
                for name, module in (("triton", triton_calls), ("mosaic_gpu", mosaic_gpu)):
                    if module.unsupported_reason(arrays[0]) is not None:
                        continue
                    attend = functools.partial(
                        module.attention, block_sizes=sizes, pattern=pattern, scale=SCALE
                    )
                    result = check_result(attend, arrays, expected)
                    print(f"{name:10} {length:5} {pattern:9} {dtype:9} {result}", flush=True)


def check_result(attend, arrays, expected):
    """The errors of one implementation, in words."""

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    first, second = ([np.asarray(x) for x in run(*arrays)] for _ in range(2))
    same = all(x.tobytes() == y.tobytes() for x, y in zip(first, second, strict=True))
    errors = [
        np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        for x, y in zip(first, expected, strict=True)
    ]
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2}[arrays[0].dtype.name]
    shown = "  ".join(f"{name} {e:.1e}" for name, e in zip(("out", "d_q", "d_k", "d_v"), errors))
    runs = "two runs equal" if same else "two runs DIFFER"
    return f"{shown}  {runs}  {'ok' if max(errors) < tolerance and same else 'WRONG'}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument(
        "--compare",
        default="varlen,sdpa",
        help="PyTorch's attention to time as well: varlen, sdpa, flex (compiles slowly)",
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--check", action="store_true", help="check errors instead of timing")
    parser.add_argument("--small", action="store_true", help="with --check: two short lists")
    parser.add_argument("--json", help="file to write all numbers to")
    args = parser.parse_args()
    require_triton(args.dtype)
    if args.check:
        published = [tuple(side * side for side in sides) for sides in SIDES.values()]
        check([(1, 4, 9), (7, 129, 3)] if args.small else published)
        return

    compare = [name for name in args.compare.split(",") if name] if torch is not None else []
    versions = f"jax {jax.__version__}, {args.dtype}, torch {torch and torch.__version__}"
    print(f"{jax.devices()[0].device_kind}, {versions}")
    print_header(compare)
    results = []
    for case in CASES:
        if args.cases not in str(case):
            continue
        times = measure(case, args.dtype, compare)
        selected = selected_implementation(case, args.dtype)
        print_case(case, times, compare, selected)
        results.append(
            {
                "case": str(case),
                "dtype": args.dtype,
                "selected": selected,
                "tuning": repr(triton_problem(case).tuning),
                **times,
            }
        )
        if args.json:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=1)


def require_triton(dtype):
    """Exits with a message if the Triton kernels cannot run here; preserves Triton's cache path."""
    reason = triton_calls.unsupported_reason(jnp.zeros((1, 1, 1, DIM), dtype))
    if reason is not None:
        raise SystemExit(f"cannot run here: {reason}")
    # jax_triton clears this variable on import; Triton would then cache in the working directory.
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
    import jax_triton  # noqa: F401

    os.environ["TRITON_CACHE_DIR"] = cache


if __name__ == "__main__":
    main()
