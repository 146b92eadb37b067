"""What the mean of five fold networks brings over one of them: results/folds-112.jsonl.

    python scripts/fold_results.py ../shared/data/vtab-mini --stores runs/folds/stores

LoSA on each task of the suite at 112 px: three seeds times five folds of the 1,000 training and validation
images, fifteen networks in one pass. A network sees 800 images and is calibrated on the 200 that it does
not see. *One* is the mean over these networks of what each scores alone; *five* is the mean prediction of
the five of a seed, as `sidetune fit --folds 5` answers. Intervals: paired bootstrap over test images, the
seeds averaged. Outputs are kept beside the stores, so that what is there already is not trained again.
``--held-out`` prints how out-of-fold predictions are best averaged (docs/log.md); it does not look at test.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import HARDWARE, git
from torch import Tensor

from sidetune.backbones import build_backbone
from sidetune.calibration import calibration_error, fit_temperature
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.ensemble import pooled
from sidetune.evaluate import scores
from sidetune.extract import extract, sample_keys
from sidetune.fleet_fit import fit_fleets, side_outputs
from sidetune.job import Job, Work
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.sources import StoredSource
from sidetune.tasks import Task, build_task

TASKS = ("cifar", "caltech101", "dtd10", "rsscn7", "elpv", "sprites_loc", "sprites_ori", "shapes_count")
METRICS = ("accuracy", "balanced_accuracy", "log_loss", "calibration_error")
SHOWN = {"accuracy": (100, 1), "log_loss": (1, 3), "calibration_error": (100, 1)}  # factor and digits
RESAMPLES = 2000
OUT = Path("results/folds-112.jsonl")


def main() -> None:
    """Train, keep the outputs, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--stores", type=Path, default=Path("runs/folds/stores"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--held-out", action="store_true", help="print ways of averaging, write nothing")
    options = parser.parse_args()
    recipe = Recipe.build(
        {
            "backbone": {"name": "demo", "size": 112},
            "train": {"epochs": options.epochs},
            "fleet": {"members": "seed=0,1,2", "folds": 5},
        }
    )
    if options.held_out:
        for name in options.tasks.split(","):
            kept = options.stores / f"{name}-{recipe.hash[:12]}.npz"
            print(name, *held_out(options.data / name, kept), sep="\n  ")
        return
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    OUT.touch()
    lines = [json.loads(line) for line in OUT.read_text("utf-8").splitlines()]
    for name in options.tasks.split(","):
        dataset = load_dataset(options.data / name)
        task = build_task("classify", dataset, dataset.rows("train"))
        kept = options.stores / f"{name}-{recipe.hash[:12]}.npz"
        if not kept.exists():
            train(recipe, dataset, task, options.stores / name, kept)
        lines = [line for line in lines if line["task"] != f"{name} at 112 px"]
        lines += result_lines(name, recipe, dataset, task, kept)
        OUT.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(table(lines))


def train(recipe: Recipe, dataset: Dataset, task: Task, store: Path, kept: Path) -> None:
    """Fifteen networks; their outputs for all samples, and the temperatures, go into a file."""
    backbone, keys = build_backbone("demo", size=112), sample_keys(dataset)
    source = StoredSource(extract(dataset, backbone, store, keys=keys), keys)
    split = {part: dataset.rows(part) for part in ("train", "val", "test")}
    out = store.parent / f"{store.name}-run"
    out.mkdir(exist_ok=True)
    job = Job(recipe, dataset, backbone, out, False, source, source.summary(), split, task, 0.0)
    fleet = fit_fleets(Work((job,), recipe, out))[0].fleet
    assert fleet is not None
    pairs = [(candidate, entry) for candidate in fleet.ranked for entry in candidate.entries]
    rows = np.arange(len(dataset))
    np.savez(
        kept,
        commit=git("rev-parse", "HEAD"),
        seed=[entry.member.recipe.train.seed for _, entry in pairs],
        fold=[entry.fold for _, entry in pairs],
        temperature=[candidate.temperature for candidate, _ in pairs],
        trained=np.stack([np.isin(rows, entry.member.rows) for _, entry in pairs]),
        outputs=side_outputs(job, [entry for _, entry in pairs], rows).numpy(),
    )
    (out / "checkpoint.safetensors").unlink(missing_ok=True)


def result_lines(name: str, recipe: Recipe, dataset: Dataset, task: Task, kept: Path) -> list[dict[str, Any]]:
    """Lines of a task: a metric of one and of five, a seed; and the paired differences."""
    found = np.load(kept)
    test = dataset.rows("test")
    outputs, targets = torch.from_numpy(found["outputs"])[:, test], dataset.targets[test]
    shared = {
        "task": f"{name} at 112 px",
        "command": f"python scripts/fold_results.py vtab-mini --tasks {name}",
        "commit": str(found["commit"]),
        "hardware": HARDWARE,
        "recipe": recipe.hash,
        "environment": environment(torch.device("cpu")),
    }
    lines, ones, fives = [], [], []
    for seed in np.unique(found["seed"]).tolist():
        mine = np.flatnonzero(found["seed"] == seed)
        temperatures = found["temperature"][mine].tolist()
        alone = [task.predictions(outputs[k] / t) for k, t in zip(mine, temperatures, strict=True)]
        together = pooled(task, alone, [1 / len(mine)] * len(mine))
        ones.append(alone)
        fives.append(together)
        scored = [scores(task, one.double().numpy(), targets) for one in alone]
        whole = scores(task, together.double().numpy(), targets)
        for metric in METRICS:
            mean = float(np.mean([one[metric] for one in scored]))
            for method, value in (("losa, one", mean), ("losa, five folds", whole[metric])):
                lines.append(
                    {"method": method, "seed": seed, "metric": f"test_{metric}", "value": value, **shared}
                )
    for metric, (value, interval) in differences(ones, fives, targets).items():
        line = {"method": "losa, five folds - one", "seed": "0, 1, 2", "metric": f"test_{metric}"}
        lines.append({**line, "value": value, "interval": interval, **shared})
    return lines


def held_out(data: Path, kept: Path) -> list[str]:
    """Log loss and calibration error of out-of-fold predictions, one a seed, and of ways to average them."""
    found, dataset = np.load(kept), load_dataset(data)
    task = build_task("classify", dataset, dataset.rows("train"))
    rows = np.sort(np.concatenate([dataset.rows("train"), dataset.rows("val")]))
    targets, alone = dataset.targets[rows], []
    for seed in np.unique(found["seed"]):
        outputs = np.empty((len(rows), task.num_outputs), np.float32)
        for k in np.flatnonzero(found["seed"] == seed):
            unseen = ~found["trained"][k][rows]
            outputs[unseen] = found["outputs"][k][rows][unseen]
            temperature = float(found["temperature"][k])
        alone.append(task.predictions(torch.from_numpy(outputs) / temperature))
    share = [1 / len(alone)] * len(alone)
    together = pooled(task, alone, share)
    logs = together.double().log()
    again = fit_temperature(task, logs, torch.from_numpy(targets), prior_std=None)
    ways = {
        "mean of probabilities": torch.stack(alone).mean(0),
        "mean of log probabilities": together,
        "the same over one more temperature": task.predictions(logs / again),
    }
    scored = [scores(task, one.double().numpy(), targets) for one in alone]
    lines = [_way("one seed", {name: float(np.mean([one[name] for one in scored])) for name in METRICS})]
    return lines + [_way(name, scores(task, one.double().numpy(), targets)) for name, one in ways.items()]


def _way(name: str, found: Mapping[str, float | None]) -> str:
    error = 100 * (found["calibration_error"] or 0.0)
    return f"{name}: log loss {found['log_loss']:.3f}, calibration error {error:.1f} %"


def differences(
    ones: list[list[Tensor]], fives: list[Tensor], targets: NDArray[np.int64]
) -> dict[str, tuple[float, list[float]]]:
    """Metric -> (five minus one, its 95 % interval over resamples of the test images)."""
    truth = torch.from_numpy(targets)
    drawn = np.random.default_rng(0).integers(len(targets), size=(RESAMPLES, len(targets)))
    found = {}
    for metric, of_samples in {"accuracy": correct, "log_loss": losses}.items():
        one = torch.stack([of_samples(each, truth) for seed in ones for each in seed]).mean(0)
        five = torch.stack([of_samples(each, truth) for each in fives]).mean(0)
        apart = (five - one).numpy()
        found[metric] = (float(apart.mean()), interval(apart[drawn].mean(1)))
    resampled = [
        np.mean([ece(each, targets, rows) for each in fives])
        - np.mean([ece(each, targets, rows) for seed in ones for each in seed])
        for rows in (np.arange(len(targets)), *drawn[:200])
    ]
    found["calibration_error"] = (float(resampled[0]), interval(np.array(resampled[1:])))
    return found


def correct(predictions: Tensor, truth: Tensor) -> Tensor:
    """(n,) 1 where the likeliest class is the true one."""
    return (predictions.argmax(1) == truth).double()


def losses(predictions: Tensor, truth: Tensor) -> Tensor:
    """(n,) log loss."""
    return (
        -predictions.double().clamp(min=torch.finfo(torch.float64).eps).log()[torch.arange(len(truth)), truth]
    )


def ece(predictions: Tensor, targets: NDArray[np.int64], rows: NDArray[np.int64]) -> float:
    """Calibration error of some samples."""
    values, guesses = (one.numpy() for one in predictions[rows].double().max(1))
    return calibration_error(values, guesses == targets[rows])


def interval(values: NDArray[np.float64]) -> list[float]:
    """95 % of them."""
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def table(lines: list[dict[str, Any]]) -> str:
    """A row a task, as the docs show it: one, five, and the difference with its interval."""
    rows = ["| task | accuracy, % | log loss | calibration error, % |", "| --- | --- | --- | --- |"]
    for task in dict.fromkeys(line["task"] for line in lines):
        cells = [task.partition(" ")[0]]
        for metric, (factor, digits) in SHOWN.items():
            of = [line for line in lines if line["task"] == task and line["metric"] == f"test_{metric}"]
            one, five = (
                factor * np.mean([line["value"] for line in of if line["method"] == method])
                for method in ("losa, one", "losa, five folds")
            )
            (difference,) = (line for line in of if "interval" in line)
            low, high = (f"{factor * value:+.{digits}f}" for value in difference["interval"])
            shown = f"{factor * difference['value']:+.{digits}f} ({low} .. {high})"
            cells.append(f"{one:.{digits}f} → {five:.{digits}f}, {shown}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
