"""The toy family's config: --config=tests/toy_config.py:toy."""

from tests.toy_family import TASKS


def get_config(spec):
    config = TASKS["fit"].schema.default_config()
    config.family, config.task = spec, "fit"
    config.steps, config.batch_size = 80, 6
    config.log_every, config.eval_every, config.sample_every = 10, 40, 80
    config.checkpoint_every = 20
    config.data.transform.kind = "random_crop"
    config.recipe.update(learning_rate=0.05, warmup_steps=0)
    return config
