"""Block attention on a GPU: times beside PyTorch's, checks against float64, and the choice of tile sizes.

    python benchmarks/attention.py [--dtype=bfloat16] [--beside=varlen,sdpa,flex] [--json=PATH]   times, one row a case
    python benchmarks/attention.py --check [--small]       errors and reproducibility, through JAX
    compute-sanitizer --tool=memcheck|racecheck python benchmarks/attention.py --check --small
    python benchmarks/tune_attention.py                    another command: finds the tile sizes in the code

Two times of the Triton kernels: `launched`, on PyTorch tensors from a CUDA graph and timed with CUDA events, the L2 cache
flushed before each run (only with PyTorch), and `triton`, what one more call costs in a chain of calls in one jitted
function. `mosaic`: the same of mosaic_gpu.py, where it can run. TFLOP/s, GB/s and the fraction of the floor are of the one
that `block_attention` takes by itself, which is marked *. TFLOP/s count the scores that the mask keeps: 4 D operations
forward, 10 D backward (2.5 times as many, as is usual). The floor is the larger of operations at 785 TFLOP/s and bytes at
3.02 TB/s, both measured on an H100; bytes are those of each input and output once. Milliseconds, medians.
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

from pallas_kernels import mosaic_gpu, triton_plan
from pallas_kernels import triton as jax_kernels

try:
    import torch
except ModuleNotFoundError:
    torch = None

DEVICE = "cuda"
DIM = 64
SCALE = DIM**-0.5
OPERATIONS_PER_SECOND = 785e12
BYTES_PER_SECOND = 3.02e12

LISTS = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; must and goal are (forward, backward) milliseconds on an H100."""

    length: int
    batch: int
    heads: int
    pattern: str
    must: tuple[float, float] | None = None
    goal: tuple[float, float] | None = None

    @property
    def sizes(self):
        return tuple(side * side for side in LISTS[self.length])

    @property
    def shape(self):
        return (self.batch, self.length, self.heads, DIM)

    @property
    def cells(self):
        """Scores that the mask keeps, of all pictures and heads."""
        stops = np.cumsum(self.sizes)
        keys = self.sizes if self.pattern == "diagonal" else stops
        return int(np.dot(self.sizes, keys)) * self.batch * self.heads

    def work(self, backward):
        """(operations, bytes)"""
        operations = (10 if backward else 4) * DIM * self.cells
        return operations, (8 if backward else 4) * 2 * int(np.prod(self.shape))

    def floor(self, backward):
        """Seconds"""
        operations, size = self.work(backward)
        return max(operations / OPERATIONS_PER_SECOND, size / BYTES_PER_SECOND)

    def __str__(self):
        return f"{self.length} {self.batch}x{self.heads} {self.pattern}"


ROWS = (
    Row(680, 64, 16, "diagonal", (0.19, 0.60), (0.14, 0.38)),
    Row(680, 64, 16, "causal", (0.30, 0.95), (0.22, 0.70)),
    Row(2240, 16, 16, "diagonal", (0.30, 1.00), (0.24, 0.70)),
    Row(2240, 16, 16, "causal", (0.58, 1.75), (0.45, 1.30)),
    Row(9451, 2, 16, "diagonal", (0.55, 1.75), (0.46, 1.30)),
    Row(9451, 2, 16, "causal", (1.20, 4.0), (1.00, 3.0)),
    Row(680, 4, 30, "diagonal"),
    Row(2240, 4, 30, "diagonal"),
    Row(9451, 4, 30, "diagonal"),
)


def problem_of(row, tuning=None):
    """The Triton kernels' Problem, with the tile sizes in the code if none are given."""
    gpu = triton_plan.gpu_name(jax.devices()[0].device_kind)
    tuning = tuning or triton_plan.tuning_for(gpu, row.length, DIM, "float16", row.pattern)
    return triton_plan.Problem(row.sizes, row.pattern, SCALE, tuning)


def mosaic_call(row, tuning=None):
    """The same for the Mosaic kernels."""
    gpu = triton_plan.gpu_name(jax.devices()[0].device_kind)
    tuning = tuning or mosaic_gpu.tuning_for(gpu, row.length, DIM, row.pattern)
    return mosaic_gpu.Call(row.sizes, row.pattern, SCALE, tuning, jax.devices()[0].core_count)


# Times on PyTorch tensors.


def torch_inputs(row, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = functools.partial(
        torch.randn, row.shape, generator=generator, device=DEVICE, dtype=getattr(torch, dtype)
    )
    return [make() for _ in range(4)]


def torch_median(function, repeat_ms=60):
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=repeat_ms, return_mode="median")


def captured(function):
    """A replay of the launches of a function from a CUDA graph: several short kernels, without Python between them."""
    function()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def kernel_times(row, problem, dtype):
    """(forward, backward) of our kernels."""
    from torch_launch import TorchAttention

    q, k, v, d_out = torch_inputs(row, dtype)
    attention = TorchAttention(problem, q)
    return (
        torch_median(captured(lambda: attention.forward(q, k, v))),
        torch_median(captured(lambda: attention.backward(q, k, v, d_out))),
    )


def autograd_times(function, inputs, d_out):
    """(forward, backward) of a PyTorch function of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        forward = torch_median(lambda: function(*inputs))
    out = function(*inputs)
    return forward, torch_median(
        lambda: torch.autograd.grad(out, inputs, d_out.view_as(out), retain_graph=True)
    )


def block_numbers(row):
    return torch.repeat_interleave(torch.arange(len(row.sizes)), torch.tensor(row.sizes)).to(DEVICE)


def varlen_times(row, dtype):
    """PyTorch's flash attention over sequences of any length: the diagonal pattern."""
    from torch.nn.attention.varlen import varlen_attn

    if row.pattern != "diagonal":
        return None
    *inputs, d_out = (x.flatten(0, 1) for x in torch_inputs(row, dtype))
    edges = torch.tensor([0, *np.cumsum(row.sizes * row.batch)], dtype=torch.int32, device=DEVICE)
    longest = max(row.sizes)
    return autograd_times(
        lambda q, k, v: varlen_attn(q, k, v, edges, edges, longest, longest), inputs, d_out
    )


def sdpa_times(row, dtype):
    """PyTorch's scaled_dot_product_attention with a boolean mask."""
    *inputs, d_out = (x.transpose(1, 2) for x in torch_inputs(row, dtype))
    block = block_numbers(row)
    mask = block[:, None] == block if row.pattern == "diagonal" else block[:, None] >= block
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask)
    return autograd_times(attend, inputs, d_out)


def flex_times(row, dtype):
    """PyTorch's FlexAttention, compiled, with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *inputs, d_out = (x.transpose(1, 2) for x in torch_inputs(row, dtype))
    block = block_numbers(row)

    def diagonal(b, h, query, key):
        return block[query] == block[key]

    def causal(b, h, query, key):
        return block[query] >= block[key]

    torch._dynamo.reset()  # each row's is a program of its own
    rule = diagonal if row.pattern == "diagonal" else causal
    mask = create_block_mask(rule, None, None, row.length, row.length)
    attend = torch.compile(flex_attention, dynamic=False)
    return autograd_times(functools.partial(attend, block_mask=mask), inputs, d_out)


BESIDE = {"varlen": varlen_times, "sdpa": sdpa_times, "flex": flex_times}


# Times inside jit.


def in_jit_times(row, dtype):
    """{name: (forward, backward)}: what a call costs in a chain of calls, each of which needs the one before."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, row.shape, dtype) for key in keys]
    times = {"triton": chain_times(jax_kernels, jax_kernels.Call(problem_of(row)), *arrays)}
    if mosaic_gpu.why_not(arrays[0]) is None:
        times["mosaic"] = chain_times(mosaic_gpu, mosaic_call(row), *arrays)
    return times


def chain_times(module, call, q, k, v, d_out):
    out, lse = jax.jit(module.run_forward(call))(q, k, v)

    # The output takes the place of q, and dv that of v; neither drifts out of range over the calls. Unrolled: a loop
    # would copy what it carries.
    def forward(q, k, v, calls):
        for _ in range(calls):
            q = module.run_forward(call)(q, k, v)[0]
        return q

    def backward(q, k, v, d_out, out, lse, calls):
        results = []
        for _ in range(calls):
            d_q, d_k, v = module.run_backward(call)(q, k, v, out, lse, d_out)
            results += [d_q, d_k]  # returned: what nothing uses is not computed
        return results, v

    return jit_medians((forward, (q, k, v)), (backward, (q, k, v, d_out, out, lse)))


def jit_medians(*cases, few=2, many=12, repeats=15):
    """For each (function, arrays): milliseconds of one more call in function(*arrays, calls=…)."""

    def compiled(case, calls):
        function, arrays = case
        return jax.jit(functools.partial(function, calls=calls)).lower(*arrays).compile()

    with (
        concurrent.futures.ThreadPoolExecutor() as threads
    ):  # side by side: it takes longer than the timing
        pending = [
            [threads.submit(compiled, case, calls) for calls in (few, many)] for case in cases
        ]
    medians = []
    for (_, arrays), runs in zip(cases, pending, strict=True):
        seconds = [[], []]
        for repeat in range(repeats + 1):
            for run, times in zip(runs, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run.result()(*arrays))
                if repeat:  # the first warms up
                    times.append(time.perf_counter() - start)
        short, long = (statistics.median(times) for times in seconds)
        medians.append(1e3 * (long - short) / (many - few))
    return medians


# The table.


def measure(row, dtype, beside):
    """A JSON-ready dict of all times of one row: name -> [forward, backward] in ms, None where there is none."""
    times = {}
    if torch is not None:
        times["launched"] = kernel_times(row, problem_of(row), dtype)
        for name in beside:
            try:
                times[name] = BESIDE[name](row, dtype)
            except Exception as error:  # another version of PyTorch must not cost us our own times
                print(
                    f"{row}: {name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True
                )
                times[name] = None
    return times | in_jit_times(row, dtype)


def pair(x, digits=3):
    return f"{x[0]:.{digits}f}/{x[1]:.{digits}f}" if x else "-"


def taken(row, dtype):
    """The name of the kernels that `block_attention` takes by itself."""
    q = jax.ShapeDtypeStruct(row.shape, dtype)
    return (
        "mosaic"
        if mosaic_gpu.why_not(q) is None and mosaic_gpu.is_faster(q, row.pattern)
        else "triton"
    )


def print_row(row, times, beside, ours):
    def mark(name):
        return f"{pair(times.get(name))}{'*' * (name == ours)}"

    work = [row.work(backward) for backward in (False, True)]
    seconds = [1e-3 * x for x in times[ours]]
    columns = [
        f"{row!s:22}",
        f"{pair(times.get('launched')):12}",
        f"{mark('triton'):13}",
        f"{mark('mosaic'):13}",
        f"{pair([w[0] / s / 1e12 for w, s in zip(work, seconds)], 0):8}",
        f"{pair([w[1] / s / 1e9 for w, s in zip(work, seconds)], 0):10}",
        f"{pair([row.floor(b) / s for b, s in zip((False, True), seconds)], 2):10}",
        *(f"{pair(times.get(name)):12}" for name in beside),
        f"{pair(row.must, 2):10}",
        f"{pair(row.goal, 2)}",
    ]
    print(" ".join(columns), flush=True)


def print_header(beside):
    names = [
        "row",
        "launched",
        "triton",
        "mosaic",
        "TFLOP/s",
        "GB/s",
        "of floor",
        *beside,
        "must",
        "goal",
    ]
    widths = [22, 12, 13, 13, 8, 10, 10, *(12 for _ in beside), 10, 10]
    print(
        " ".join(f"{name:{width}}" for name, width in zip(names, widths, strict=True)), flush=True
    )


# Checks.


def expected_by_blocks(sizes, pattern, q, k, v, d_out):
    """[out, dq, dk, dv] in float64, one query block at a time: no (L, L) array."""
    q, k, v, d_out = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, d_out))
    results = [np.zeros_like(q) for _ in range(4)]
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
    """Relative L2 errors on lists, for random inputs, and whether two runs agree in every bit."""
    rng = np.random.default_rng(int(time.time()))
    for sizes in lists:
        length = sum(sizes)
        for pattern in ("diagonal", "causal"):
            for dtype in ("float16", "bfloat16"):
                arrays = [
                    jnp.asarray(rng.standard_normal((1, length, 2, DIM)), dtype) for _ in range(4)
                ]
                expected = expected_by_blocks(sizes, pattern, *arrays)
                for name, module in (("triton", jax_kernels), ("mosaic_gpu", mosaic_gpu)):
                    if module.why_not(arrays[0]) is not None:
                        continue
                    attend = functools.partial(
                        module.attention, block_sizes=sizes, pattern=pattern, scale=SCALE
                    )
                    print(
                        f"{name:10} {length:5} {pattern:9} {dtype:9} {verdict(attend, arrays, expected)}",
                        flush=True,
                    )


def verdict(attend, arrays, expected):
    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    ours, again = ([np.asarray(x) for x in run(*arrays)] for _ in range(2))
    same = all(x.tobytes() == y.tobytes() for x, y in zip(ours, again, strict=True))
    errors = [
        np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        for x, y in zip(ours, expected, strict=True)
    ]
    allowed = {"float16": 1e-3, "bfloat16": 1e-2}[arrays[0].dtype.name]
    shown = "  ".join(f"{name} {e:.1e}" for name, e in zip(("out", "dq", "dk", "dv"), errors))
    runs = "two runs equal" if same else "two runs DIFFER"
    return f"{shown}  {runs}  {'ok' if max(errors) < allowed and same else 'WRONG'}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument(
        "--beside",
        default="varlen,sdpa",
        help="of PyTorch's: varlen, sdpa, flex (compiles for long)",
    )
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--small", action="store_true", help="of --check: two short lists")
    parser.add_argument("--json", help="file for all numbers")
    args = parser.parse_args()
    start(args.dtype)
    if args.check:
        published = [tuple(side * side for side in sides) for sides in LISTS.values()]
        check([(1, 4, 9), (7, 129, 3)] if args.small else published)
        return

    beside = [name for name in args.beside.split(",") if name] if torch is not None else []
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, torch {torch and torch.__version__}"
    )
    print_header(beside)
    found = []
    for row in ROWS:
        if args.rows not in str(row):
            continue
        times = measure(row, args.dtype, beside)
        ours = taken(row, args.dtype)
        print_row(row, times, beside, ours)
        found.append(
            {
                "row": str(row),
                "dtype": args.dtype,
                "taken": ours,
                "tuning": repr(problem_of(row).tuning),
                **times,
            }
        )
        if args.json:
            with open(args.json, "w") as file:
                json.dump(found, file, indent=1)


def start(dtype):
    """Ends with a message where the kernels cannot run; keeps Triton's cache where it was."""
    reason = jax_kernels.why_not(jnp.zeros((1, 1, 1, DIM), dtype))
    if reason is not None:
        raise SystemExit(f"cannot run here: {reason}")
    # jax_triton empties this variable when imported, and Triton would then cache in the working directory.
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
    import jax_triton  # noqa: F401

    os.environ["TRITON_CACHE_DIR"] = cache


if __name__ == "__main__":
    main()
