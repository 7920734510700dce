"""The spec of an HMAR or VAR model: the contents of config.json in a model directory."""

import dataclasses
import json
from typing import Any

from hmar_jax.autoencoders import config_from_json
from hmar_jax.autoencoders.base import (
    FORMAT,
    check_format,
    check_texts,
    config_to_json,
    pop_class_names,
)
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.options import SamplingConfig
from hmar_jax.families.hmar.transformer import TransformerConfig
from hmar_jax.settings import names_of_task

NAME = "hmar"

# What a model stores of its sampling options; the others are the caller's alone.
STAGE1_SAMPLING = names_of_task(SamplingConfig, "next_scale")
STAGE2_SAMPLING = names_of_task(SamplingConfig, "masked")


@dataclasses.dataclass(frozen=True)
class HmarSpec:
    """A tokenizer, a transformer (stage 1) and, optionally, stage 2."""

    autoencoder: Any  # config of the tokenizer
    transformer: TransformerConfig
    masked_depth: int = 0  # M, blocks of stage 2; 0: there is no stage 2
    # False: there is no stage 1. Stage 2 predicts whole scales from masks; its tail also stands for
    # that of the transformer.
    next_scale: bool = True
    class_names: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()  # defaults
    origin: str = ""  # where the parameters come from
    licence: str = ""

    def __post_init__(self):
        t = self.transformer
        check_texts(self.class_names, self.origin, self.licence)
        if len(self.class_names) not in (0, t.num_classes):
            raise InputError(
                f"class_names must have {t.num_classes} names, one for each class; got "
                f"{len(self.class_names)}"
            )
        if type(self.masked_depth) is not int or not 0 <= self.masked_depth <= t.depth:
            raise InputError(
                f"masked_depth must be an integer in [0, {t.depth}], the blocks of the "
                f"transformer; got {self.masked_depth!r}"
            )
        for name in ("scales", "vocab_size", "z_channels"):
            ours, theirs = getattr(t, name), getattr(self.autoencoder, name)
            if ours != theirs:
                raise InputError(
                    f"transformer and tokenizer do not fit: {name} is {ours} in one and "
                    f"{theirs} in the other"
                )

    @property
    def family(self) -> str:
        return NAME

    @property
    def kind(self) -> str:
        """What kind of model this is, in words."""
        if self.masked_depth:
            what = (
                "next-scale and masked prediction" if self.next_scale else "masked prediction alone"
            )
            return f"HMAR, {what}"
        return "VAR" if self.transformer.pattern == "causal" else "HMAR, next-scale prediction"

    @property
    def num_classes(self) -> int:
        return self.transformer.num_classes

    @property
    def null_class(self) -> int:
        return self.transformer.null_class

    def with_dtype(self, dtype: str) -> "HmarSpec":
        return dataclasses.replace(
            self,
            autoencoder=dataclasses.replace(self.autoencoder, dtype=dtype),
            transformer=dataclasses.replace(self.transformer, dtype=dtype),
        )

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; from_json returns an equal spec."""
        fields = dataclasses.asdict(self)
        fields["autoencoder"] = config_to_json(self.autoencoder)
        kept = stored_sampling(self)
        fields["sampling"] = {name: fields["sampling"][name] for name in kept}
        return {"format": FORMAT, "family": NAME, **json.loads(json.dumps(fields))}

    @classmethod
    def from_json(cls, data: Any, where: str) -> "HmarSpec":
        """Reads what to_json wrote, or a file of the first version.

        In the first version the tokenizer's config has the key "tokenizer", and sampling options
        are at the top level.

        Args:
          data: the parsed file.
          where: how errors name the file.

        Raises:
          InputError: another format, or unknown or missing keys.
        """
        check_format(data, where)
        fields = {k: v for k, v in data.items() if k not in ("format", "family")}
        try:
            tokenizer = fields.pop("autoencoder", None) or {"kind": "vq", **fields.pop("tokenizer")}
            sampling = fields.pop("sampling", {})
            if "confidence_noise" in fields:
                fields["choice_temperature"] = fields.pop("confidence_noise")
            for name in STAGE2_SAMPLING:
                if name in fields:
                    sampling[name] = fields.pop(name)
            return cls(
                autoencoder=config_from_json(tokenizer),
                transformer=TransformerConfig(**fields.pop("transformer")),
                class_names=pop_class_names(fields),
                sampling=SamplingConfig(**sampling),
                **fields,
            )
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        except (TypeError, KeyError, ValueError) as e:
            raise InputError(f"{where} is a config this version does not know ({e})") from None


def stored_sampling(spec: HmarSpec) -> tuple[str, ...]:
    """Names of the sampling options of which a model stores its own default."""
    return STAGE2_SAMPLING if spec.masked_depth else STAGE1_SAMPLING
