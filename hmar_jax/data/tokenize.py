"""Tokens instead of pictures: what a frozen tokenizer makes of a data set, for training the transformer."""

from typing import Callable

import grain
import jax
import numpy as np
from tqdm import tqdm

from hmar_jax.data.pipeline import Transform, derive_seed, make_loader
from hmar_jax.data.sources import Source
from hmar_jax.errors import InputError

_ENCODE, _ORDER = 2, 3  # which random numbers of a seed; pipeline.py has the first ones


class TokenSource:
    """Tokens held in memory, read by index: {"tokens": (L,) int32, "label": int32}."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray):
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"tokens": self.tokens[index], "label": np.int32(self.labels[index])}


def tokenize(
    encode: Callable[[np.ndarray], jax.Array], source: Source, transform: Transform, *, copies: int, seed: int,
    batch_size: int = 64, progress: bool = False,
) -> TokenSource:
    """Encodes every picture of a source `copies` times, each time cropped and turned anew.

    Args:
      encode: uint8 pictures (B, side, side, 3) -> tokens (B, L).
      copies: how many random versions of each picture.
      seed: of the versions; the result depends on nothing else.
      batch_size: pictures encoded at once, at most.

    Returns:
      len(source) * copies rows of tokens, less at most a thousandth that does not fill the last batch.
    """
    rows = len(source) * copies
    batch_size = next(b for b in range(min(batch_size, len(source)), 0, -1) if rows % b <= rows // 1000)
    loader = make_loader(
        source, transform, batch_size=batch_size, seed=derive_seed(seed, _ENCODE), train=True, num_epochs=copies)
    total = rows // batch_size
    tokens, labels = [], []
    for batch in tqdm(loader, total=total, desc="tokens", disable=None if progress else True, leave=False):
        tokens.append(np.asarray(encode(batch["image"])))
        labels.append(batch["label"])
    return TokenSource(np.concatenate(tokens), np.concatenate(labels))


def make_token_loader(
    source: TokenSource, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1) -> grain.IterDataset:
    """Endless shuffled batches {"tokens": (B, L), "label": (B,)} of one shard; every row once an epoch, in a new order each."""
    if batch_size * shard_count > len(source):
        raise InputError(
            f"batch size {batch_size * shard_count} is more than the {len(source)} rows of tokens; make it {len(source)} or less")
    dataset = grain.MapDataset.source(source).shuffle(seed=derive_seed(seed, _ORDER)).repeat()
    dataset = dataset.batch(batch_size, drop_remainder=True)[shard_index::shard_count]
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
