"""What the Mosaic GPU kernels share: memory, barriers, and the loops of a persistent program.

A program has three warpgroups (warp specialization). One copies with the tensor memory accelerator
(TMA): the resident rows of an item, and the streamed rows step by step (both are explained in
mosaic_gpu_work_lists.py). Two compute, each for its own 64 resident rows; they take turns at the
matrix units, so that the products of one overlap with the exponentials of the other
(FlashAttention 3, arXiv 2407.08608, "pingpong" scheduling).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu_work_lists import ITEM_FIELDS, ROWS, WARPGROUPS, WorkList

_RESIDENT_BUFFERS = 2  # resident rows of this item and of the next
# Registers of a thread. The 65,536 of a multiprocessor serve two computing warpgroups of 128
# threads, and one that copies.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Stream:
    """Arrays of the streamed side that are copied together."""

    num_matrices: int  # arrays (B, L, H, D)
    num_vectors: int = 0  # arrays (B, H, steps, columns) float32


@dataclasses.dataclass(frozen=True)
class SharedMemoryLayout:
    """The buffers of a kernel in shared memory."""

    dtype: Any
    dim: int  # D
    columns: int  # streamed rows of a step
    stages: int  # steps in shared memory
    num_resident: int  # arrays (B, L, H, D) of resident rows
    # One or two. The first stream of a step may be freed before the second is needed.
    streams: tuple[Stream, ...]
    num_outputs: int  # results (B, L, H, D) of resident rows
    num_row_outputs: int  # results (B, H, tiles, ROWS) float32
    partial_columns: tuple[int, ...] = ()  # columns that the last step of an item may have instead


@dataclasses.dataclass(frozen=True)
class KernelContext:
    """What the computing part of a kernel works with. `plgpu` is Pallas' module for Mosaic GPU.

    "Tiled" and "flat" are the two views of a matrix in shared memory; see `_allocate`.
    """

    plgpu: Any
    warpgroup: jax.Array
    resident: tuple  # each (buffers, WARPGROUPS, ROWS, D), tiled
    streams: tuple  # each a tuple of (stages, columns, D), tiled, then of (stages, columns)
    ready: tuple  # barriers of each stream, one per stage: its copies have arrived
    free: tuple  # barriers of each stream, one per stage: both warpgroups have read it
    resident_free: Any  # barriers, one per buffer: both warpgroups have read the resident rows
    turn: Any  # barrier at which the warpgroups hand over the matrix units
    outputs: tuple  # (tiled, flat) views of (WARPGROUPS, ROWS, D)
    row_outputs: tuple  # each (WARPGROUPS, ROWS)
    stages: int

    @property
    def matrix(self):
        """Register layout of (ROWS, columns) and (ROWS, D)."""
        return self.plgpu.Layout.WGMMA

    @property
    def per_row(self):
        """Register layout of (ROWS,)."""
        return self.plgpu.Layout.WGMMA.reduce(1)

    @property
    def per_column(self):
        """Register layout of (columns,)."""
        return self.plgpu.Layout.WGMMA.reduce(0)

    def stage(self, step):
        """The stage of shared memory that holds a step, counted over all items of the program."""
        return lax.rem(step, jnp.int32(self.stages))

    def zeros(self, *shape):
        """float32 zeros: an accumulator of a product, or one number per row."""
        layout = self.matrix if len(shape) == 2 else self.per_row
        return self.plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def load_rows(self, ref):
        """Loads (ROWS,) from global memory."""
        return self.plgpu.load(ref, layout=self.per_row, optimized=False)

    def give_turn(self):
        """Lets the other warpgroup use the matrix units, until `wait_turn` returns."""
        self.plgpu.barrier_arrive(self.turn)

    def wait_turn(self):
        """Waits until this warpgroup may use the matrix units again."""
        self.plgpu.barrier_wait(self.turn)

    def pass_turn(self):
        """Lets the other warpgroup use the matrix units once, and waits for it."""
        self.give_turn()
        self.wait_turn()

    def visible(self, lower, upper, first_column, columns):
        """Whether each streamed row is within the bounds of each resident row.

        Args:
          lower, upper: (ROWS,) int32, row numbers.
          first_column: number of the first streamed row.
          columns: number of streamed rows.

        Returns:
          (ROWS, columns) bool.
        """
        shape = (ROWS, columns)
        index = self.plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=self.matrix) + first_column
        return (index >= along_rows(lower, columns)) & (index < along_rows(upper, columns))

    def wait_for_outputs(self):
        """Waits until the outputs of the previous item have been copied from shared memory."""
        self.plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def write(self, item, num_rows, results, targets, row_results=(), row_targets=()):
        """Writes the results of this warpgroup. Call `wait_for_outputs` first.

        Args:
          item: the item as a dict of ITEM_FIELDS.
          num_rows: how many rows are written of each of `results`; of `row_results`, all are.
          results: (ROWS, D) each.
          targets: arrays (B, L, H, D) in global memory, one per result.
          row_results: (ROWS,) each.
          row_targets: arrays (B, H, tiles, ROWS) in global memory, one per row result.
        """
        plgpu, warpgroup = self.plgpu, self.warpgroup
        for (tiled, _), result in zip(self.outputs, results, strict=True):
            tiled[warpgroup] = result
        for ref, result in zip(self.row_outputs, row_results, strict=True):
            ref[warpgroup] = result
        plgpu.commit_smem()
        first = item["start"] + ROWS * warpgroup
        size = ROWS
        while size:  # copies have fixed sizes: the binary digits of num_rows

            @pl.when((num_rows & size) != 0)
            def _(size=size):
                at = num_rows & ~(2 * size - 1)
                for (_, flat), target in zip(self.outputs, targets, strict=True):
                    plgpu.copy_smem_to_gmem(
                        flat.at[warpgroup, pl.ds(at, size)],
                        target.at[item["batch"], pl.ds(first + at, size), item["head"]],
                        commit_group=False,
                    )

            size //= 2
        for ref, target in zip(self.row_outputs, row_targets, strict=True):
            plgpu.copy_smem_to_gmem(
                ref.at[warpgroup],
                target.at[item["batch"], item["head"], item["tile"] + warpgroup],
                commit_group=False,
            )
        plgpu.commit_smem_to_gmem_group()


def along_rows(x, columns):
    """(ROWS,) -> (ROWS, columns), constant along each row."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def along_columns(x):
    """(columns,) -> (ROWS, columns), constant along each column."""
    return lax.broadcast_in_dim(x, (ROWS, *x.shape), [1])


def num_whole_steps(item):
    """The number of steps of an item that have all columns."""
    return item["num_steps"] - jnp.where(item["last_columns"] > 0, 1, 0)


def run_kernel(
    layout: SharedMemoryLayout,
    compute: Callable,
    work_list: WorkList,
    num_programs: int,
    operands: dict,
    resident: tuple[str, ...],
    streams: tuple[tuple[str, ...], ...],
    out_types: dict,
) -> dict:
    """Runs a kernel.

    Args:
      layout: its shared memory.
      compute: a function of (KernelContext, {name: operand or result in global memory}, item as a
        dict of ITEM_FIELDS, rows of it that are this warpgroup's, resident buffer, number of steps
        before the item). Each computing warpgroup runs it for each item that has rows for it. It
        must free the resident buffer once and each stream once per step, and pass the turn twice
        per step.
      work_list: the items of the programs.
      num_programs: programs that run at once.
      operands: {name: array}.
      resident: names of the operands whose rows are resident.
      streams: for each stream, the names of its operands: matrices, then vectors.
      out_types: {name: ShapeDtypeStruct}.

    Returns:
      {name: array} of the results.
    """
    # Slow to import, and of no use on other devices.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands = {
        **operands,
        "bounds": work_list.bounds,
        "items": work_list.items,
        "counts": work_list.counts,
    }
    names = (*operands, *out_types)

    def entry(*refs):
        _allocate(plgpu, layout, functools.partial(run, dict(zip(names, refs, strict=True))))

    def run(
        refs,
        resident_buffers,
        stream_buffers,
        outputs,
        row_outputs,
        resident_ready,
        resident_free,
        ready,
        free,
        turn,
    ):
        tiled, flat = 0, 1
        context = KernelContext(
            plgpu=plgpu,
            warpgroup=lax.axis_index("warpgroup"),
            resident=tuple(views[tiled] for views in resident_buffers),
            streams=tuple(
                tuple(views[tiled] for views in matrices) + tuple(vectors)
                for matrices, vectors in stream_buffers
            ),
            ready=ready,
            free=free,
            resident_free=resident_free,
            turn=turn,
            outputs=tuple(outputs),
            row_outputs=tuple(row_outputs),
            stages=layout.stages,
        )
        items, count = _item_reader(refs["items"]), refs["counts"][lax.axis_index("program")]

        @pl.when(context.warpgroup < WARPGROUPS)
        def _():
            _run_compute_loop(
                context, items, count, resident_ready, lambda *args: compute(context, refs, *args)
            )

        @pl.when(context.warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @pl.loop(0, count, init_carry=jnp.int32(0))
            def _(n, steps_before):
                item, buffer = items(n), lax.rem(n, jnp.int32(_RESIDENT_BUFFERS))
                pl.when(n >= _RESIDENT_BUFFERS)(
                    lambda: plgpu.barrier_wait(resident_free.at[buffer])
                )
                for name, views in zip(resident, resident_buffers, strict=True):
                    for index in range(WARPGROUPS):
                        rows = pl.ds(item["start"] + ROWS * index, ROWS)
                        source = refs[name].at[item["batch"], rows, item["head"]]
                        plgpu.copy_gmem_to_smem(
                            source, views[flat].at[buffer, index], resident_ready.at[buffer]
                        )

                def copy_step(columns, j):
                    stage = context.stage(steps_before + j)
                    rows = pl.ds(item["streamed_start"] + j * layout.columns, columns)
                    target = pl.ds(0, columns)
                    for stream, (matrices, vectors) in enumerate(stream_buffers):
                        used = steps_before + j >= layout.stages
                        pl.when(used)(
                            lambda stream=stream: plgpu.barrier_wait(free[stream].at[stage])
                        )
                        sources = [refs[name] for name in streams[stream]]
                        for views, source in zip(matrices, sources[: len(matrices)], strict=True):
                            source = source.at[item["batch"], rows, item["head"]]
                            plgpu.copy_gmem_to_smem(
                                source, views[flat].at[stage, target], ready[stream].at[stage]
                            )
                        for ref, source in zip(vectors, sources[len(matrices) :], strict=True):
                            source = source.at[item["batch"], item["head"], item["first_step"] + j]
                            plgpu.copy_gmem_to_smem(source, ref.at[stage], ready[stream].at[stage])

                whole = num_whole_steps(item)
                pl.loop(0, whole)(functools.partial(copy_step, layout.columns))
                for columns in layout.partial_columns:
                    pl.when(item["last_columns"] == columns)(
                        functools.partial(copy_step, columns, whole)
                    )
                return steps_before + item["num_steps"]

    kernel = plgpu.kernel(
        entry,
        out_type=list(out_types.values()),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return dict(zip(out_types, kernel(*(jnp.asarray(x) for x in operands.values())), strict=True))


def _allocate(plgpu, layout, run):
    """Allocates shared memory and barriers, and calls run(*them).

    wgmma instructions need matrices in tiles of (8, 64), and copies of such tiles start at
    multiples of 8 rows; blocks start anywhere. With rows of 64 numbers (128 bytes), a tile is just
    8 consecutive rows, and the swizzle depends on addresses only. So the same memory has two views:
    tiled for the products, flat for copies that start and stop at any row.
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

    def barriers(count, num_arrivals):
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=count)

    # In the order of the parameters of `run` in `run_kernel`.
    pl.run_scoped(
        run,
        [matrix(_RESIDENT_BUFFERS, WARPGROUPS, ROWS) for _ in range(layout.num_resident)],
        [
            (
                [matrix(layout.stages, layout.columns) for _ in range(stream.num_matrices)],
                [vector(layout.stages, layout.columns) for _ in range(stream.num_vectors)],
            )
            for stream in layout.streams
        ],
        [matrix(WARPGROUPS, ROWS) for _ in range(layout.num_outputs)],
        [vector(WARPGROUPS, ROWS) for _ in range(layout.num_row_outputs)],
        barriers(_RESIDENT_BUFFERS, layout.num_resident * WARPGROUPS),
        barriers(_RESIDENT_BUFFERS, WARPGROUPS),
        tuple(
            barriers(layout.stages, stream.num_matrices + stream.num_vectors)
            for stream in layout.streams
        ),
        tuple(barriers(layout.stages, WARPGROUPS) for _ in layout.streams),
        barriers(1, WARPGROUPS),
        collective_axes="warpgroup",
    )


def _item_reader(items_ref):
    """Returns a function from the number of an item of this program to the item as a dict."""
    program = lax.axis_index("program")
    return lambda n: {
        name: items_ref[program, n, column] for column, name in enumerate(ITEM_FIELDS)
    }


def _run_compute_loop(context, items, count, resident_ready, compute):
    """The loop of a computing warpgroup over the items of its program."""
    plgpu, warpgroup = context.plgpu, context.warpgroup
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    # The first turn of the second warpgroup comes after that of the first.
    pl.when(warpgroup == 1)(context.pass_turn)

    def skip_item(item, buffer, steps_before):
        """Arrives at and waits for all barriers of an item without rows for this warpgroup."""
        plgpu.barrier_arrive(context.resident_free.at[buffer])

        @pl.loop(0, item["num_steps"])
        def _(j):
            stage = context.stage(steps_before + j)
            for ready, free in zip(context.ready[:-1], context.free[:-1], strict=True):
                plgpu.barrier_wait(ready.at[stage])
                context.pass_turn()
                plgpu.barrier_arrive(free.at[stage])
            plgpu.barrier_wait(context.ready[-1].at[stage])
            for _ in range(2 - len(context.ready[:-1])):
                context.pass_turn()
            plgpu.barrier_arrive(context.free[-1].at[stage])

    @pl.loop(0, count, init_carry=jnp.int32(0))
    def _(n, steps_before):
        item, buffer = items(n), lax.rem(n, jnp.int32(_RESIDENT_BUFFERS))
        num_rows = jnp.minimum(item["num_rows"] - ROWS * warpgroup, ROWS)
        plgpu.barrier_wait(resident_ready.at[buffer])
        pl.when(num_rows > 0)(lambda: compute(item, num_rows, buffer, steps_before))
        pl.when(num_rows <= 0)(lambda: skip_item(item, buffer, steps_before))
        return steps_before + item["num_steps"]

    pl.when(warpgroup == 0)(context.pass_turn)
    plgpu.wait_smem_to_gmem(0)
