"""The command `hmar` in a process of its own, which records the images of every training batch.

    python -m tests.recorded FILE train --config=… --workdir=…

Images are identified by their colour, see `colours`. Each line of FILE: the batch's number in the
run, and its images.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from PIL import Image

CLASSES, EACH = ("a", "b", "c"), 12
COUNT = len(CLASSES) * EACH


def colours(root: pathlib.Path) -> pathlib.Path:
    """A folder of images of one colour each to train on, and a few to validate."""
    for split, count in (("train", EACH), ("validate", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (label * EACH + i, 255 - 7 * i, 80 * label)
                Image.fromarray(np.full((10, 10, 3), colour, np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


class Recorded:
    """A loader that records what its iterator gives."""

    def __init__(self, loader, path: str):
        self.loader, self.path = loader, path

    def __iter__(self):
        self.iterator = iter(self.loader)
        self.get_state, self.set_state, self.close = (
            self.iterator.get_state,
            self.iterator.set_state,
            self.iterator.close,
        )
        return self

    def __next__(self):
        batch = next(self.iterator)
        with open(self.path, "a") as file:
            file.write(
                json.dumps([self.get_state()["next_index"], batch["image"][:, 0, 0, 0].tolist()])
                + "\n"
            )
        return batch


def recording(build, path):
    """build_experiment, with a loader that records to a file."""

    def build_recorded(*args):
        experiment = build(*args)
        return dataclasses.replace(experiment, loader=lambda: Recorded(experiment.loader(), path))

    return build_recorded


def main() -> None:
    sys.modules["torch"] = None  # tensorboardX imports it where it finds it: two seconds
    from hmar_jax import experiment as experiments
    from hmar_jax.cli import main as cli

    path, *arguments = sys.argv[1:]
    experiments.build_experiment = recording(experiments.build_experiment, path)
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main()
