"""Settings of what is read of a data set: keys of the group `data` of a config, and options of
`hmar tokenize`, `hmar evaluate` and, in part, `hmar edit`."""

import dataclasses

from hmar_jax.settings import Settings, setting

# Which files of a folder are images of which class, and which are held out. A run and a token set
# keep the rules that they were started with, because these decide the order of the images.
#   1  as in version 0.1: eight endings; every folder that is not hidden is a class; 2 % of all
#      files are held out, whatever their class.
#   2  all endings that the decoder reads; folders of operating systems are ignored; class folders
#      must have images; a share of each class is held out.
FOLDER_RULES = 2


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Settings):
    """Which images are decoded."""

    prefix = "data."

    # About 7 bytes a pixel while an image is decoded: 1.4 GB at the limit, in each thread. Cameras
    # of phones reach 16320 x 12240.
    max_pixels: int = setting(
        200_000_000,
        "Images of more pixels (width times height) count as unreadable.",
        at_least=1,
        harmless=True,  # as a file that was repaired: the other images stay where they are
    )


@dataclasses.dataclass(frozen=True)
class SourceConfig(DecodeConfig):
    """What is read of a data set. All but max_pixels concerns folders, archives and hf: alone."""

    held_out: float = setting(
        0.02,
        "Share of each class that is held out of data without validation images.",
        above=0,
        below=1,
    )
    allow_empty_classes: bool = setting(
        False, "Accept classes without images; they stay classes.", harmless=True
    )
    folder_rules: int | None = setting(
        None,
        "How a folder is listed and held-out images are chosen: 2, or 1 as in version 0.1. "
        "Default: as the run or token set was started; 2 for a new one.",
        at_least=1,
        at_most=FOLDER_RULES,
        new=FOLDER_RULES,
        before=1,
    )
