"""The names of ImageNet's 1000 classes (ILSVRC 2012), in the usual order: sorted by WordNet id."""

import json
import pathlib

NUM_CLASSES = 1000


def class_names() -> tuple[str, ...]:
    """Their names, each once; imagenet_classes.json states where they come from."""
    path = pathlib.Path(__file__).with_name("imagenet_classes.json")
    return tuple(json.loads(path.read_text("utf-8"))["names"])
