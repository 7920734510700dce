"""What a model is: the architectures, the classes and how it likes to be sampled. The contents of a model's config.json."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from hmar_jax.autoencoders.vq import TokenizerConfig
from hmar_jax.errors import InputError
from hmar_jax.families.hmar.transformer import TransformerConfig

FORMAT = "hmar_jax model 1"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A tokenizer, and on top of it perhaps a transformer, and stage 2 of that perhaps."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig | None = None
    masked_depth: int = 0  # M, blocks of stage 2; 0: there is no stage 2
    next_scale: bool = True  # False: stage 2 alone, whose tail is the transformer's too and predicts whole scales from masks
    class_names: tuple[str, ...] = ()
    guidance: float = 0.0  # what this model is sampled with unless the caller says otherwise
    top_k: int = 0
    top_p: float = 0.0
    masked_guidance: float = 0.0
    confidence_noise: float = 0.0
    origin: str = ""  # where the parameters come from
    licence: str = ""

    def __post_init__(self):
        t = self.transformer
        if t is None:
            if self.masked_depth:
                raise InputError(f"masked_depth={self.masked_depth}, but there is no transformer")
            return
        if not 0 <= self.masked_depth <= t.depth:
            raise InputError(
                f"masked_depth={self.masked_depth}: the transformer has {t.depth} blocks"
            )
        shared = ("scales", "vocab_size", "z_channels")
        for name in shared:
            if getattr(t, name) != getattr(self.tokenizer, name):
                raise InputError(
                    f"transformer and tokenizer do not fit: {name} is {getattr(t, name)} in one and "
                    f"{getattr(self.tokenizer, name)} in the other"
                )

    @property
    def kind(self) -> str:
        if self.transformer is None:
            return "tokenizer"
        if self.masked_depth:
            return (
                "HMAR, next-scale and masked prediction"
                if self.next_scale
                else "HMAR, masked prediction alone"
            )
        return "VAR" if self.transformer.pattern == "causal" else "HMAR, next-scale prediction"

    def to_json(self) -> dict[str, Any]:
        """For json.dumps; from_json gives back an equal spec."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "ModelSpec":
        """Reads what to_json wrote; `where` names the file in errors.

        Raises:
          InputError: another format, or unknown or missing keys.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise InputError(
                f"{where}: not the config of a model (format {found!r}, expected {FORMAT!r})"
            )
        fields = {k: v for k, v in data.items() if k != "format"}
        try:
            transformer = fields.pop("transformer", None)
            return cls(
                tokenizer=TokenizerConfig(**fields.pop("tokenizer")),
                transformer=None if transformer is None else TransformerConfig(**transformer),
                class_names=tuple(fields.pop("class_names", ())),
                **fields,
            )
        except (TypeError, KeyError) as e:
            raise InputError(f"{where}: not a config this version understands ({e})") from None

    def resolve_class(self, given) -> int:
        """An id, an id as text, or a class name -> the id. In names, case does not matter, and spaces and hyphens are underscores.

        Raises:
          InputError: there is no such class, or there are several (ImageNet has two called "crane").
        """
        count = self.transformer.num_classes
        text = str(given).strip()
        if not text.lstrip("-").isdigit():
            plain = lambda name: re.sub(r"[\s-]", "_", name.strip().casefold())
            named = [i for i, name in enumerate(self.class_names) if name == text]
            named = named or [
                i for i, name in enumerate(self.class_names) if plain(name) == plain(text)
            ]
            if len(named) > 1:
                raise InputError(
                    f"class {text!r}: {len(named)} classes have this name, give an id: {', '.join(map(str, named))}"
                )
            if named:
                return named[0]
        try:
            number = int(text)
        except ValueError:
            names = (
                f", or a name such as {', '.join(self.class_names[:3])}" if self.class_names else ""
            )
            raise InputError(
                f"class {text!r}: an id from 0 to {count - 1} is wanted{names}"
            ) from None
        if not 0 <= number < count:
            raise InputError(f"class {number}: ids of this model go from 0 to {count - 1}")
        return number
