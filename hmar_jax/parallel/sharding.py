"""Where arrays lie: one mesh of devices, rules that divide parameters by their names, batches divided by image.

The mesh has three axes. Over "data" parameters are copied; over "fsdp" they are divided and gathered where they are used
(ZeRO, arXiv 1910.02054; PyTorch's FSDP, arXiv 2304.11277); over "tensor" a layer's heads and hidden units are divided
(Megatron-LM, arXiv 1909.08053). Images are divided over "data" and "fsdp". XLA's partitioner makes a program for the mesh
out of one that is written for one device; what it must be told is here. A model offers its rules; nothing here knows a model.

Letters: B images, l tokens, H heads, D head dim.
"""

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hmar_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that images are divided over

# Ordered (regular expression, axes): the first expression that is found in an array's path, such as
# "opt_state/1/mu/blocks/block/qkv/kernel", says over which mesh axis, or axes, each of its dimensions is divided.
Rules = tuple[tuple[str, tuple[Any, ...]], ...]

_log = logging.getLogger(__name__)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of all the devices, neighbours of the last axis nearest; with several slices, "data" goes across them.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1, what is left.
      devices: in place of jax.devices(); those of a topology will do.

    Raises:
      InputError: the sizes do not make the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    asked = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise InputError(
                f"mesh {asked}: {slices} slices must divide mesh.data={sizes[0]}, which alone goes across them"
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
    """The sizes of the axes for so many devices, -1 filled in; raises as make_mesh does."""
    sizes = [data, fsdp, tensor]
    asked = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(
            f"mesh {asked}: sizes of 1 or more are wanted, one of them may be -1 (what is left)"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -math.prod(sizes))
    if math.prod(sizes) != devices:
        raise InputError(
            f"mesh {asked}: there are {devices} devices, which the product of the sizes must make; "
            "mesh.data=-1 takes those that the others leave"
        )
    return sizes


# Arrays by name


def shardings(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a tree. Arrays that no rule names are copied."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, rules, mesh)), tree
    )


def with_shardings(tree: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """The tree's shapes and types as jax.ShapeDtypeStruct with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, rules, mesh),
    )


def _name(path) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def _spec(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | AbstractMesh) -> P:
    axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
    if len(axes) > len(shape):
        raise ValueError(
            f"{name} has shape {shape}, its rule divides {len(axes)} dimensions: {axes}"
        )
    sizes = mesh.shape
    spec = []
    for length, wanted in zip(shape, axes):
        parts = math.prod(
            sizes[a] for a in ((wanted,) if isinstance(wanted, str) else wanted or ())
        )
        if length % parts:
            _log.debug("%s: its %d rows are copied, not divided into %d", name, length, parts)
        spec.append(wanted if parts > 1 and length % parts == 0 else None)
    return P(*spec)


# Inside a program that is traced for a mesh


def traced_on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """The function, traced with this mesh around it: for jax.jit, with shardings of the mesh for its arguments."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def _mesh_around() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    divided = (
        not mesh.empty and mesh.size > 1 and tuple(mesh.axis_names) == AXES and not mesh.manual_axes
    )
    return mesh if divided else None


def constrain_batch(x: jax.Array) -> jax.Array:
    """(B, …), laid out with the images divided and all else copied; as it is without a mesh, or where it does not divide B,
    as a few images that are shown may not."""
    mesh = _mesh_around()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))


def constrain_like_params(tree: Any, rules: Rules) -> Any:
    """Gradients, laid out as the rules lay out the parameters of the same names."""
    mesh = _mesh_around()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, _spec(_name(path), leaf.shape, rules, mesh)
        ),
        tree,
    )


def map_over_images_and_heads(attend: Callable, *arrays: jax.Array) -> jax.Array:
    """Calls attend(*arrays), each (B, l, H, D), once a device with the device's own images and heads.

    The partitioner cannot look into a kernel; attention does nothing across images or heads, so none is needed.
    """
    mesh = _mesh_around()
    if mesh is None:
        return attend(*arrays)
    batch, _, heads, _ = arrays[0].shape
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch % parts or heads % mesh.shape["tensor"]:
        raise InputError(
            f"{batch} images and {heads} heads cannot be divided over the mesh: multiples of {parts} and {mesh.shape['tensor']} "
            "are wanted"
        )
    spec = P(BATCH, None, "tensor", None)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
    )(*arrays)


# Batches and other arrays of the hosts


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the images of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises InputError where a batch cannot be divided over the mesh, and over the hosts with it."""
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate):
        over = f"{parts} devices (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']})"
        if not isinstance(mesh, AbstractMesh):
            hosts = len({d.process_index for d in mesh.devices.flat})
            over += f" of {hosts} host{'s' * (hosts > 1)}"
        times = f" in {accumulate} parts (accumulate={accumulate})" if accumulate > 1 else ""
        raise InputError(
            f"batch_size={batch_size} cannot be divided over {over}{times}: a multiple of {parts * accumulate} is wanted"
        )


def host_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of every batch this host reads: (index, count). Hosts that hold the same images read the same part.

    Raises:
      InputError: the hosts cannot share the batch: it does not divide, or the mesh gives them unequal parts.
    """
    check_batch(mesh, batch_size)
    rows: dict[int, set] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).add(index[0].indices(batch_size)[:2])
    shares = sorted({tuple(sorted(part)) for part in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != batch_parts(mesh):
        raise InputError(
            f"mesh {dict(mesh.shape)}: its axes cut through hosts so that they would read unequal parts of a batch; "
            "choose mesh.tensor and mesh.fsdp that divide, or are multiples of, the devices of a host"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """The batch of all hosts, of which this one has read its part: arrays (B / hosts, …) -> (B, …), divided by image."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def place(tree: Any, tree_of_shardings: Any) -> Any:
    """Arrays that every host holds whole, put on the devices as the shardings say."""

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, tree_of_shardings)


def place_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A random key that every host has alike, copied to all devices."""
    data = place(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
