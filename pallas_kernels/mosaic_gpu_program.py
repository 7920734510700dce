"""What the Mosaic GPU kernels have in common: memory, barriers, and the loops of a persistent program.

A program has three warpgroups. One copies (TMA): the own rows of an item, and the rows of the other side step by step.
Two compute, each for its own 64 rows; they take turns at the matrix units, so that one's products run beside the
other's exponentials (FlashAttention 3, arXiv 2407.08608, "pingpong").
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu_plan import ITEM, ROWS, WARPGROUPS

_OWN_BUFFERS = 2  # own rows of this item and of the next
_COMPUTE_REGISTERS, _COPY_REGISTERS = (
    232,
    40,
)  # a thread's, of 65,536 for two and one warpgroups of 128


@dataclasses.dataclass(frozen=True)
class Stream:
    """Arrays of the other side that are copied together."""

    matrices: int  # arrays (B, L, H, D)
    vectors: int = 0  # arrays (B, H, steps, columns) float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shared memory of a kernel."""

    dtype: Any
    dim: int
    columns: int  # rows of the other side in a step
    stages: int  # steps in shared memory
    own: int  # arrays (B, L, H, D) of own rows
    streams: tuple[
        Stream, ...
    ]  # one or two; a step's first stream may be freed before the second is needed
    outputs: int  # results (B, L, H, D) of own rows
    row_outputs: int  # results (B, H, tiles, ROWS) float32
    narrower: tuple[
        int, ...
    ] = ()  # columns that an item's last step may have, in place of `columns`


@dataclasses.dataclass(frozen=True)
class Program:
    """What the computing part of a kernel works with. `plgpu` is Pallas' module for Mosaic GPU."""

    plgpu: Any
    warpgroup: jax.Array
    own: tuple  # each (buffers, WARPGROUPS, ROWS, D) in tiles, for products
    streams: tuple  # each a tuple of (stages, columns, D) in tiles, then of (stages, columns)
    ready: tuple  # a stream's copies have arrived; one barrier a stage
    free: tuple  # both warpgroups have read them
    own_free: Any
    turn: Any
    outputs: tuple  # (tiles, flat) views of (WARPGROUPS, ROWS, D)
    row_outputs: tuple  # (WARPGROUPS, ROWS)
    stages: int

    @property
    def matrix(self):
        return self.plgpu.Layout.WGMMA

    @property
    def per_row(self):
        return self.plgpu.Layout.WGMMA.reduce(1)

    @property
    def per_column(self):
        return self.plgpu.Layout.WGMMA.reduce(0)

    def stage(self, number):
        return lax.rem(number, jnp.int32(self.stages))

    def zeros(self, *shape):
        """Zeros for a product, or for a number a row."""
        layout = self.matrix if len(shape) == 2 else self.per_row
        return self.plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def load_rows(self, ref):
        """(ROWS,) from global memory."""
        return self.plgpu.load(ref, layout=self.per_row, optimized=False)

    def give_turn(self):
        """The other warpgroup may use the matrix units; call `wait_turn` before using them again."""
        self.plgpu.barrier_arrive(self.turn)

    def wait_turn(self):
        self.plgpu.barrier_wait(self.turn)

    def pass_turn(self):
        self.give_turn()
        self.wait_turn()

    def seen(self, lo, hi, first_column, columns):
        """(ROWS, columns) bool: the columns, counted from first_column, within the bounds of each row."""
        shape = (ROWS, columns)
        index = self.plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=self.matrix) + first_column
        return (index >= along_rows(lo, columns)) & (index < along_rows(hi, columns))

    def wait_for_outputs(self):
        """Until what the item before left in shared memory has been copied."""
        self.plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def write(self, work, rows, results, targets, row_results=(), row_targets=()):
        """Stores results (ROWS, D), of which the first `rows` rows are copied, and numbers a row, which all are.

        After `wait_for_outputs`. targets: arrays (B, L, H, D) and (B, H, tiles, ROWS) in global memory.
        """
        plgpu, warpgroup = self.plgpu, self.warpgroup
        for (tiled, _), result in zip(self.outputs, results, strict=True):
            tiled[warpgroup] = result
        for ref, result in zip(self.row_outputs, row_results, strict=True):
            ref[warpgroup] = result
        plgpu.commit_smem()
        first = work["start"] + ROWS * warpgroup
        size = ROWS
        while size:  # copies have fixed sizes: the binary digits of `rows`

            @pl.when((rows & size) != 0)
            def _(size=size):
                at = rows & ~(2 * size - 1)
                for (_, flat), target in zip(self.outputs, targets, strict=True):
                    plgpu.copy_smem_to_gmem(
                        flat.at[warpgroup, pl.ds(at, size)],
                        target.at[work["batch"], pl.ds(first + at, size), work["head"]],
                        commit_group=False,
                    )

            size //= 2
        for ref, target in zip(self.row_outputs, row_targets, strict=True):
            plgpu.copy_smem_to_gmem(
                ref.at[warpgroup],
                target.at[work["batch"], work["head"], work["tile"] + warpgroup],
                commit_group=False,
            )
        plgpu.commit_smem_to_gmem_group()


def along_rows(x, columns):
    """(ROWS,) -> (ROWS, columns), the same along each row."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def along_columns(x):
    """(columns,) -> (ROWS, columns), the same along each column."""
    return lax.broadcast_in_dim(x, (ROWS, *x.shape), [1])


def whole_steps(work):
    """How many steps of an item have all columns."""
    return work["steps"] - jnp.where(work["last"] > 0, 1, 0)


def call(layout: Layout, compute: Callable, plan, programs: int, operands: dict, out_types):
    """Runs a kernel.

    Args:
      layout: its shared memory.
      compute: a function of (Program, {name: operand or result in global memory}, item as a dict of ITEM, rows of it
        that are this warpgroup's, own buffer, steps before it), run by each computing warpgroup for each item that has
        rows for it. It must free the own buffer once and each stream once a step, and use the turn twice a step.
      plan: a mosaic_gpu_plan.Plan.
      programs: how many run at once.
      operands: {name: array}. "own": a tuple of names of own rows; "streams": a tuple of tuples of names.
      out_types: {name: ShapeDtypeStruct}.

    Returns:
      {name: array}
    """
    from jax.experimental.pallas import (
        mosaic_gpu as plgpu,
    )  # slow to import, and of no use to other devices

    own_names, stream_names = operands.pop("own"), operands.pop("streams")
    operands = {**operands, "bounds": plan.bounds, "items": plan.items, "counts": plan.counts}
    names = (*operands, *out_types)

    def entry(*refs):
        _allocate(plgpu, layout, functools.partial(run, dict(zip(names, refs, strict=True))))

    def run(refs, own, streams, outputs, row_outputs, own_ready, own_free, ready, free, turn):
        tiled, flat = 0, 1
        program = Program(
            plgpu=plgpu,
            warpgroup=lax.axis_index("warpgroup"),
            own=tuple(views[tiled] for views in own),
            streams=tuple(
                tuple(v[tiled] for v in matrices) + tuple(vectors) for matrices, vectors in streams
            ),
            ready=ready,
            free=free,
            own_free=own_free,
            turn=turn,
            outputs=tuple(outputs),
            row_outputs=tuple(row_outputs),
            stages=layout.stages,
        )
        items, count = _items(refs["items"]), refs["counts"][lax.axis_index("program")]

        @pl.when(program.warpgroup < WARPGROUPS)
        def _():
            _compute(program, items, count, own_ready, lambda *args: compute(program, refs, *args))

        @pl.when(program.warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @pl.loop(0, count, init_carry=jnp.int32(0))
            def _(n, steps_before):
                work, buffer = items(n), lax.rem(n, jnp.int32(_OWN_BUFFERS))
                pl.when(n >= _OWN_BUFFERS)(lambda: plgpu.barrier_wait(own_free.at[buffer]))
                for name, views in zip(own_names, own, strict=True):
                    for index in range(WARPGROUPS):
                        rows = pl.ds(work["start"] + ROWS * index, ROWS)
                        source = refs[name].at[work["batch"], rows, work["head"]]
                        plgpu.copy_gmem_to_smem(
                            source, views[flat].at[buffer, index], own_ready.at[buffer]
                        )

                def copy_step(columns, j):
                    stage = program.stage(steps_before + j)
                    rows, target = (
                        pl.ds(work["other"] + j * layout.columns, columns),
                        pl.ds(0, columns),
                    )
                    for stream, (matrices, vectors) in enumerate(streams):
                        used = steps_before + j >= layout.stages
                        pl.when(used)(
                            lambda stream=stream: plgpu.barrier_wait(free[stream].at[stage])
                        )
                        sources = [refs[name] for name in stream_names[stream]]
                        for views, source in zip(matrices, sources[: len(matrices)], strict=True):
                            source = source.at[work["batch"], rows, work["head"]]
                            plgpu.copy_gmem_to_smem(
                                source, views[flat].at[stage, target], ready[stream].at[stage]
                            )
                        for ref, source in zip(vectors, sources[len(matrices) :], strict=True):
                            source = source.at[work["batch"], work["head"], work["other_tile"] + j]
                            plgpu.copy_gmem_to_smem(source, ref.at[stage], ready[stream].at[stage])

                whole = whole_steps(work)
                pl.loop(0, whole)(functools.partial(copy_step, layout.columns))
                for columns in layout.narrower:
                    pl.when(work["last"] == columns)(functools.partial(copy_step, columns, whole))
                return steps_before + work["steps"]

    kernel = plgpu.kernel(
        entry,
        out_type=list(out_types.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return dict(zip(out_types, kernel(*(jnp.asarray(x) for x in operands.values())), strict=True))


def _allocate(plgpu, layout, run):
    """Shared memory and barriers.

    wgmma wants matrices in tiles of (8, 64), and copies of such tiles start at multiples of 8 rows; blocks start
    anywhere. With rows of 64 numbers (128 bytes) a tile is just 8 consecutive rows, and the swizzle goes by addresses;
    so the same memory has two views: in tiles for the products, flat for copies that start and end at any row.
    """
    swizzle = plgpu.SwizzleTransform(128)

    def matrix(*shape):
        shape = (*shape, layout.dim)
        return plgpu.RefUnion(
            plgpu.SMEM(shape, layout.dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
            plgpu.SMEM(shape, layout.dtype, transforms=(swizzle,)),
        )

    def vector(*shape):
        return plgpu.SMEM(shape, jnp.float32)

    def barriers(count, arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    pl.run_scoped(
        run,
        [matrix(_OWN_BUFFERS, WARPGROUPS, ROWS) for _ in range(layout.own)],
        [
            (
                [matrix(layout.stages, layout.columns) for _ in range(stream.matrices)],
                [vector(layout.stages, layout.columns) for _ in range(stream.vectors)],
            )
            for stream in layout.streams
        ],
        [matrix(WARPGROUPS, ROWS) for _ in range(layout.outputs)],
        [vector(WARPGROUPS, ROWS) for _ in range(layout.row_outputs)],
        barriers(_OWN_BUFFERS, layout.own * WARPGROUPS),
        barriers(_OWN_BUFFERS, WARPGROUPS),
        tuple(
            barriers(layout.stages, stream.matrices + stream.vectors) for stream in layout.streams
        ),
        tuple(barriers(layout.stages, WARPGROUPS) for _ in layout.streams),
        barriers(1, WARPGROUPS),
        collective_axes="warpgroup",
    )


def _items(items_ref):
    """A function from the number of an item to the item."""
    program = lax.axis_index("program")
    return lambda n: {name: items_ref[program, n, column] for column, name in enumerate(ITEM)}


def _compute(program, items, count, own_ready, compute):
    """The loop of a computing warpgroup."""
    plgpu, warpgroup = program.plgpu, program.warpgroup
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    # The second has its first turn after the first's.
    pl.when(warpgroup == 1)(program.pass_turn)

    def let_pass(work, buffer, steps_before):
        """An item that has no rows for this warpgroup: the others wait for it all the same."""
        plgpu.barrier_arrive(program.own_free.at[buffer])

        @pl.loop(0, work["steps"])
        def _(j):
            stage = program.stage(steps_before + j)
            for ready, free in zip(program.ready[:-1], program.free[:-1], strict=True):
                plgpu.barrier_wait(ready.at[stage])
                program.pass_turn()
                plgpu.barrier_arrive(free.at[stage])
            plgpu.barrier_wait(program.ready[-1].at[stage])
            for _ in range(2 - len(program.ready[:-1])):
                program.pass_turn()
            plgpu.barrier_arrive(program.free[-1].at[stage])

    @pl.loop(0, count, init_carry=jnp.int32(0))
    def _(n, steps_before):
        work, buffer = items(n), lax.rem(n, jnp.int32(_OWN_BUFFERS))
        rows = jnp.minimum(work["rows"] - ROWS * warpgroup, ROWS)
        plgpu.barrier_wait(own_ready.at[buffer])
        pl.when(rows > 0)(lambda: compute(work, rows, buffer, steps_before))
        pl.when(rows <= 0)(lambda: let_pass(work, buffer, steps_before))
        return steps_before + work["steps"]

    pl.when(warpgroup == 0)(program.pass_turn)
    plgpu.wait_smem_to_gmem(0)
