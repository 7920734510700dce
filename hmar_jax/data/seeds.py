"""Derived seeds: each purpose draws its own random numbers from one user-given seed."""

import enum

import numpy as np


class SeedPurpose(enum.IntEnum):
    """What a derived seed is used for. Every random stream depends on these numbers."""

    SHUFFLE = 0  # the order of images
    AUGMENT = 1  # the random transform of each image
    ENCODE = 2  # the images and crops that `encode_in_memory` encodes
    ORDER = 3  # the order of encoded records
    CROPS = 4  # the random crops of an encoded data set on disk


def derive_seed(seed: int, purpose: int) -> int:
    """Returns a 32-bit seed that depends on a seed and on what it is used for.

    Grain's shuffle adds the epoch to its seed. Without this step, seeds 0 and 1 would share their
    orders.
    """
    return int(np.random.SeedSequence([seed, int(purpose)]).generate_state(1)[0])
