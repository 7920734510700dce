"""What masked passes change: metrics of samples by schedule, each at its own best guidance.

    python benchmarks/refinement.py --model=digits [--seeds=5] \\
        [--variants none default default,choice_temperature=4]

A variant is a schedule followed by sampling options. For each variant, every guidance is tried with
some seeds. The best one has the lowest mean Fréchet distance among those whose class accuracy is at
least that of held-out real digits (if there is none, the highest class accuracy). It is then
sampled with other seeds. Fréchet distances are over the features of the independent classifier,
against held-out digits (evaluation/report.py).

--losses prints the validation loss of stage 2 by tenth of the mask ratio: does it fall as more of a
scale is known?
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

import hmar_jax
from hmar_jax.data.sources import open_source
from hmar_jax.evaluation.classifier import read_all
from hmar_jax.evaluation.report import classifier_report
from hmar_jax.families.hmar.masked_task import MaskedTask, ratio_metric
from hmar_jax.training.metrics import average

_METRICS = ("class_accuracy", "diversity", "nearest_train_ratio", "frechet")
_FIRST_SEARCH_SEED = 1000


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--variants", nargs="+", default=["none", "default"])
    parser.add_argument(
        "--guidances", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0, 1.5]
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--search_seeds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first_seed",
        type=int,
        default=1,
        help="of the runs after the search, which itself uses 1000 and above",
    )
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()

    pipe = hmar_jax.load(args.model)
    real = [read_all(open_source(args.reference, split)) for split in ("train", "validate")]
    results = {"losses": losses(pipe, *real[1])} if args.losses else {}
    if args.losses:
        print(
            "validation loss of masked tokens by mask ratio: "
            + "  ".join(
                f"{name.removeprefix('loss/ratio_')} {value:.3f}"
                for name, value in results["losses"].items()
            )
        )
    for variant in args.variants:
        search = [
            average(
                evaluate(pipe, real, variant, g, _FIRST_SEARCH_SEED + i, args.samples)
                for i in range(args.search_seeds)
            )
            for g in args.guidances
        ]
        accurate = [
            i for i, f in enumerate(search) if f["class_accuracy"] >= f["held_out_accuracy"]
        ]
        best = (
            min(accurate, key=lambda i: search[i]["frechet"])
            if accurate
            else max(range(len(search)), key=lambda i: search[i]["class_accuracy"])
        )
        runs = [
            evaluate(pipe, real, variant, args.guidances[best], args.first_seed + i, args.samples)
            for i in range(args.seeds)
        ]
        results[variant] = {
            "search": dict(zip(map(str, args.guidances), search)),
            "best": args.guidances[best],
            "runs": runs,
        }
        print(f"\n{variant}")
        for g, f in zip(args.guidances, search):
            print(f"  guidance {g:<5g}" + "  ".join(f"{name} {f[name]:.4f}" for name in _METRICS))
        print(
            f"  best {args.guidances[best]:g}, {args.seeds} seeds: "
            + "  ".join(f"{name} {mean_and_deviation(runs, name)}" for name in _METRICS)
            + f"  (Fréchet of real training digits: {runs[0]['frechet_floor']:.3f})",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


def mean_and_deviation(runs: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in runs]
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def evaluate(
    pipe, real, variant: str, guidance: float, seed: int, samples: int
) -> dict[str, float]:
    """The classifier report of `samples` images, with the classes in turn."""
    schedule, *options = variant.split(",")
    options = {key: float(value) for key, value in (o.split("=") for o in options)}
    ids = np.arange(samples) % pipe.spec.num_classes
    images = pipe.sample(jax.random.key(seed), ids, guidance=guidance, schedule=schedule, **options)
    return classifier_report(np.asarray(images), ids, *real)


def losses(pipe, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy of masked tokens of real images, by tenth of the mask ratio."""
    task = MaskedTask(spec=pipe.spec, steps=1, batch_size=1)  # steps and batches of no training
    batch = {
        "tokens": pipe.encode(images),
        "label": jnp.asarray(labels),
        "valid": jnp.ones(len(labels), bool),
    }
    metrics = jax.jit(task.eval_metrics)(pipe.params["masked"], pipe.params, batch)
    found = average([jax.device_get(metrics)])
    return {ratio_metric(i): found[ratio_metric(i)] for i in range(10)}


if __name__ == "__main__":
    main()
