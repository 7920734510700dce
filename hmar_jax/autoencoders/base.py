"""What the rest of the package needs to know of an autoencoder.

Data sets are encoded, models are trained on latents, and samples are decoded through the
Autoencoder protocol; which kind of autoencoder it is does not matter there. AutoencoderSpec is
the contents of config.json in the directory of an autoencoder without a generative model.

Letters: B images, h w sides of an image.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmar_jax.autoencoders import config_from_json
from hmar_jax.errors import InputError
from hmar_jax.parallel.sharding import Rules

if TYPE_CHECKING:
    from hmar_jax.data.record_spec import RecordSpec

AUTOENCODER = "tokenizer"  # where the parameters of a model have those of its autoencoder
FORMAT = "hmar_jax model 1"  # of config.json

Params = Any  # a pytree of arrays
Latents = dict[str, jax.Array]  # arrays (B, ...), named as the fields of the record spec

# Keys of the first version's files that say nothing about a tokenizer alone.
_IGNORED_KEYS = (
    "masked_depth",
    "next_scale",
    "guidance",
    "top_k",
    "top_p",
    "masked_guidance",
    "confidence_noise",
)


class AutoencoderConfig(Protocol):
    """The architecture: a frozen dataclass of plain values, which are the keys of its JSON."""

    kind: ClassVar[str]  # a key of AUTOENCODERS
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_side(self) -> int: ...


class Autoencoder(Protocol):
    """Pure functions of params: a frozen dataclass of the config alone."""

    kind: ClassVar[str]  # a key of AUTOENCODERS
    config_class: ClassVar[type]
    partition_rules: ClassVar[Rules]  # how a mesh divides the parameters

    def __init__(self, config: Any): ...

    @property
    def config(self) -> AutoencoderConfig: ...

    @property
    def image_side(self) -> int:
        """h = w, pixels."""
        ...

    @property
    def record_spec(self) -> "RecordSpec":
        """What an encoded data set stores for one image."""
        ...

    def init(self, rng: jax.Array) -> Params:
        """Random parameters."""
        ...

    def encode(self, params: Params, images: jax.Array) -> Latents:
        """Images as arrays of the record spec's fields.

        Args:
          images: (B, h, w, 3), uint8 or floats in [0, 1].
        """
        ...

    def decode(self, params: Params, latents: Latents) -> jax.Array:
        """What `encode` returns -> (B, h, w, 3) float32 in [0, 1]."""
        ...

    def encoder_params(self, params: Params) -> Params:
        """The parameters that encoding needs."""
        ...

    def decoder_params(self, params: Params) -> Params:
        """The parameters that are needed once images are latents."""
        ...

    def describe(self, num_params: int) -> list[tuple[str, str]]:
        """Rows of `hmar info`: names and values."""
        ...

    def fingerprint(self, params: Params) -> str:
        """Hexadecimal digits that differ where latents are made, or mean, something different."""
        ...


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
    """An autoencoder by itself: architecture, classes of its training data, origin and licence."""

    autoencoder: AutoencoderConfig
    class_names: tuple[str, ...] = ()
    origin: str = ""  # where the parameters come from
    licence: str = ""

    sampling: ClassVar[None] = None  # options of sampling: an autoencoder alone cannot sample

    def __post_init__(self):
        check_texts(self.class_names, self.origin, self.licence)

    @property
    def family(self) -> str:
        """The kind of autoencoder, in place of a family of generative models."""
        return self.autoencoder.kind

    @property
    def kind(self) -> str:
        """What kind of model this is, in words."""
        return "tokenizer"

    def with_dtype(self, dtype: str) -> "AutoencoderSpec":
        """The same model with convolutions in another type."""
        autoencoder = dataclasses.replace(self.autoencoder, dtype=dtype)
        return dataclasses.replace(self, autoencoder=autoencoder)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; from_json returns an equal spec."""
        return {
            "format": FORMAT,
            "autoencoder": config_to_json(self.autoencoder),
            "class_names": list(self.class_names),
            "origin": self.origin,
            "licence": self.licence,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "AutoencoderSpec":
        """Reads what to_json wrote, and the files of the first version.

        Args:
          where: names the file in errors.

        Raises:
          InputError: another format, a generative model, or unknown or missing keys.
        """
        check_format(data, where)
        fields = {key: value for key, value in data.items() if key not in ("format", "family")}
        try:
            if "tokenizer" in fields:  # the first version
                if fields.pop("transformer", None) is not None:
                    raise InputError(
                        "must be the config of an autoencoder; got one with a transformer"
                    )
                fields = {key: fields[key] for key in fields if key not in _IGNORED_KEYS}
                fields["autoencoder"] = {"kind": "vq", **fields.pop("tokenizer")}
            return cls(
                autoencoder=config_from_json(fields.pop("autoencoder")),
                class_names=pop_class_names(fields),
                **fields,
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{where}: not a config that this version can read ({error})"
            ) from None


def check_texts(class_names: Any, origin: Any, licence: Any) -> None:
    """Raises InputError unless these are texts, as people may have written them by hand."""
    for name, text in (("origin", origin), ("licence", licence)):
        if not isinstance(text, str):
            raise InputError(f"{name} must be a text; got {text!r}")
    for name in class_names:
        if not isinstance(name, str):
            raise InputError(f"class_names must be a list of texts; it has {name!r}")


def pop_class_names(fields: dict[str, Any]) -> tuple[str, ...]:
    """Takes the class names out of the content of a config.json.

    Raises:
      InputError: they are no list.
    """
    names = fields.pop("class_names", [])
    if not isinstance(names, list):
        raise InputError(f"class_names must be a list of texts; got {names!r}")
    return tuple(names)


def check_format(data: Any, where: str) -> None:
    """Raises InputError unless the content of a config.json is that of a model."""
    found = data.get("format") if isinstance(data, Mapping) else None
    if isinstance(data, Mapping) and found == FORMAT:
        return
    got = f"format {found!r}" if isinstance(data, Mapping) else f"{json.dumps(data)[:40]}"
    kind, _, number = FORMAT.rpartition(" ")
    newer = re.fullmatch(rf"{kind} (\d+)", str(found))
    cure = ""
    if newer and int(newer[1]) > int(number):
        cure = "; a newer version of this program has written it: update hmar_jax"
    raise InputError(f"{where} must be the config of a model (format {FORMAT!r}); got {got}{cure}")


def config_to_json(config: AutoencoderConfig) -> dict[str, Any]:
    """For json.dumps: {"kind": "vq", ...}; config_from_json returns an equal config."""
    return {"kind": config.kind, **json.loads(json.dumps(dataclasses.asdict(config)))}


def make_encoder(
    autoencoder: Autoencoder, params: Params, batch_size: int, devices: Sequence[jax.Device]
) -> tuple[Callable[[np.ndarray], Latents], int]:
    """Compiled encoding of batches that are divided among devices.

    Args:
      params: of the autoencoder; only those that encoding needs are put on the devices.
      batch_size: images at once, on all devices together.

    Returns:
      encode, from (B, h, w, 3) uint8 to the latents of B images, and B: batch_size rounded up to a
      multiple of the number of devices.
    """
    mesh = Mesh(np.array(devices), ("data",))
    by_image = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    needed = jax.tree.map(jnp.asarray, autoencoder.encoder_params(params))
    needed = jax.device_put(needed, replicated)
    run = jax.jit(
        lambda params, images: autoencoder.encode(params, images),
        in_shardings=(replicated, by_image),
        out_shardings=by_image,
    )
    rounded = -(-batch_size // len(devices)) * len(devices)
    return (lambda images: run(needed, images)), rounded
