"""Meshes of devices: how parameters are divided by their names, and batches by image.

The mesh has three axes. Over "data", parameters are copied. Over "fsdp", they are divided, and
gathered where they are used (ZeRO, arXiv 1910.02054; PyTorch's FSDP, arXiv 2304.11277). Over
"tensor", the heads and hidden units of a layer are divided (Megatron-LM, arXiv 1909.08053). Images
are divided over "data" and "fsdp". XLA's partitioner turns a program for one device into one for
the mesh; this file has what it must know. A model supplies its rules; no model is known here.

Letters: B images, l tokens of one scale, H heads, D head dim.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hmar_jax.errors import InputError
from hmar_jax.settings import Settings, setting

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that images are divided over

# Ordered (regular expression, axes). The first expression that matches anywhere in the path of an
# array, such as "opt_state/1/mu/blocks/block/qkv/kernel", gives the mesh axis, or axes, that each
# dimension is divided over.
Rules = tuple[tuple[str, tuple[Any, ...]], ...]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Sizes of the mesh axes: the config group "mesh"."""

    prefix: ClassVar[str] = "config.mesh."

    data: int = setting(
        -1,
        "Groups of devices that hold copies of the parameters; -1: all devices left.",
        at_least=-1,
        harmless=True,
    )
    fsdp: int = setting(
        1,
        "Devices that parameters and optimizer state are divided over; -1: all left.",
        at_least=-1,
        harmless=True,
    )
    tensor: int = setting(
        1,
        "Devices that heads and hidden units are divided over; -1: all left.",
        at_least=-1,
        harmless=True,
    )


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Makes a mesh of all devices, with neighbours on the last axis nearest to each other.

    With several slices (of TPUs), "data" is the axis across slices.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1, which takes all devices left.
      devices: used instead of jax.devices(); may be those of a topology.

    Raises:
      InputError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise InputError(
                f"mesh {_describe(sizes)}: mesh.data must be a multiple of the {slices} slices, "
                f"since no other axis goes across slices; got {sizes[0]}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            [sizes[0] // slices, *sizes[1:]],
            [slices, 1, 1],
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> list[int]:
    """The sizes of the axes for a number of devices, with -1 replaced; raises as make_mesh does."""
    sizes = [data, fsdp, tensor]
    given = _describe(sizes)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(
            f"mesh {given}: sizes must be 1 or more; one of them may be -1 (all devices left)"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -math.prod(sizes))
    if math.prod(sizes) != devices:
        raise InputError(
            f"mesh {given}: the sizes must multiply to {devices} devices; "
            "mesh.data=-1 takes all devices left"
        )
    return sizes


def _describe(sizes: list[int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))


# Arrays by name


def shardings(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for each array or ShapeDtypeStruct; what no rule matches is copied."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, rules, mesh)), tree
    )


def with_shardings(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes, types and shardings of a tree as jax.ShapeDtypeStruct.

    Arrays that the mesh cannot divide as the rules say are logged at INFO, with their bytes.
    """
    log_undivided(tree, rules, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, rules, mesh),
    )


def log_undivided(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> None:
    """Logs, in one line, the arrays that the mesh cannot divide as the rules say, with bytes."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if _undivided(leaf.shape, _axes_of(name, leaf.shape, rules), mesh):
            found.append((leaf.size * leaf.dtype.itemsize, name))
    if found:
        _log.info(
            "the mesh cannot divide %d arrays as their rules say, and copies them (%.1f MB): %s",
            len(found),
            sum(size for size, _ in found) / 1e6,
            ", ".join(f"{name} ({size:,} bytes)" for size, name in sorted(found, reverse=True)),
        )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _axes_of(name: str, shape: tuple[int, ...], rules: Rules) -> tuple[Any, ...]:
    """For each dimension that the first matching rule names, its mesh axis, axes or None."""
    axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
    if len(axes) > len(shape):
        raise ValueError(
            f"{name} has shape {shape}, but its rule divides {len(axes)} dimensions: {axes}"
        )
    return axes


def _num_parts(axes: Any, mesh: Mesh | AbstractMesh) -> int:
    """How many parts a dimension is divided into by an axis, several axes, or None."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def _undivided(shape: tuple[int, ...], axes: tuple[Any, ...], mesh: Mesh | AbstractMesh) -> bool:
    return any(length % _num_parts(axis, mesh) for length, axis in zip(shape, axes))


def _spec(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | AbstractMesh) -> P:
    spec = []
    for length, axes in zip(shape, _axes_of(name, shape, rules)):
        parts = _num_parts(axes, mesh)
        spec.append(axes if parts > 1 and length % parts == 0 else None)
    return P(*spec)


# Inside a program that is traced for a mesh


def traced_on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """Wraps a function for jax.jit: it is traced with this mesh as JAX's abstract mesh.

    Its arguments must have shardings of the mesh.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def _current_mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    divided = (
        not mesh.empty and mesh.size > 1 and tuple(mesh.axis_names) == AXES and not mesh.manual_axes
    )
    return mesh if divided else None


def constrain_batch(x: jax.Array) -> jax.Array:
    """Divides the images of (B, …) over the mesh and copies the other dimensions.

    Without a mesh, or where B is no multiple of its parts (as in small previews), x is unchanged.
    """
    mesh = _current_mesh()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def constrain_like_params(tree: Any, rules: Rules) -> Any:
    """Gives gradients the shardings of the parameters of the same names."""
    mesh = _current_mesh()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, _spec(_name(path), leaf.shape, rules, mesh)
        ),
        tree,
    )


def map_over_images_and_heads(attend: Callable, *arrays: jax.Array) -> jax.Array:
    """Calls attend(*arrays), each (B, l, H, D), on every device with its own images and heads.

    XLA's partitioner cannot divide a kernel. Attention is independent across images and heads, so
    no communication is needed.

    Raises:
      InputError: the mesh does not divide the images or the heads.
    """
    mesh = _current_mesh()
    if mesh is None:
        return attend(*arrays)
    batch, _, heads, _ = arrays[0].shape
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch % parts or heads % mesh.shape["tensor"]:
        raise InputError(
            f"attention over the mesh: images must be a multiple of {parts} and heads one of "
            f"{mesh.shape['tensor']}; got {batch} images, {heads} heads"
        )
    spec = P(BATCH, None, "tensor", None)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
    )(*arrays)


# Batches and other arrays of the hosts


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays (B, …): the images are divided."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the images of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, grad_accum_steps: int = 1) -> None:
    """Raises InputError where the mesh, and with it the hosts, cannot divide a batch.

    Args:
      grad_accum_steps: number of microbatches whose gradients are accumulated.
    """
    parts = batch_parts(mesh)
    if batch_size % (parts * grad_accum_steps):
        over = f"{parts} devices (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']})"
        if not isinstance(mesh, AbstractMesh):
            hosts = len({d.process_index for d in mesh.devices.flat})
            over += f" of {hosts} host{'s' * (hosts > 1)}"
        times = (
            f" in {grad_accum_steps} microbatches (grad_accum_steps={grad_accum_steps})"
            if grad_accum_steps > 1
            else ""
        )
        raise InputError(
            f"batch_size must be a multiple of {parts * grad_accum_steps} to be divided over "
            f"{over}{times}; got {batch_size}"
        )


def host_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of every batch this host reads; hosts with the same images read the same part.

    Returns:
      Index of the part, number of parts.

    Raises:
      InputError: the mesh cannot divide the batch, or divides it unequally among hosts.
    """
    check_batch(mesh, batch_size)
    rows: dict[int, set] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).add(index[0].indices(batch_size)[:2])
    shares = sorted({tuple(sorted(part)) for part in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != batch_parts(mesh):
        raise InputError(
            f"mesh {dict(mesh.shape)}: hosts would read unequal parts of a batch; mesh.tensor and "
            "mesh.fsdp must divide the number of devices of a host, or be multiples of it"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Joins the parts of a batch that the hosts have read.

    Args:
      batch: this host's part, arrays (B / hosts, …).
      batch_size: B, of all hosts.

    Returns:
      Arrays (B, …), with the images divided over the mesh.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def place(tree: Any, tree_of_shardings: Any) -> Any:
    """Puts arrays that every host holds whole on the devices, with the given shardings."""

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, tree_of_shardings)


def place_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Copies a random key, the same on every host, to all devices."""
    data = place(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
