"""`sidetune bench order`: whether side networks see the order of a clip's frames.

Trained and scored on `sidetune.bench.order_set`, whose classes are six orders of the same frames. A network's
rate is chosen on validation. Beside each accuracy on test stands the one on the same clips with their frames
in an order drawn for each clip, which is 1/6 for whoever looks at order alone. Intervals are of scenes and
seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import find_device
from sidetune.backbones import build_backbone
from sidetune.bench.order_set import CLIP, ORDERS, write_order_set
from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.setting import require_images
from sidetune.data import load_dataset
from sidetune.errors import DivergedError, RequestError, nearest
from sidetune.extract import sample_keys
from sidetune.files import locked
from sidetune.job import Job
from sidetune.keyed import generator
from sidetune.model import SideModel
from sidetune.opening import Part, open_jobs
from sidetune.paired import middle, seeds_difference
from sidetune.probes import Pooled, fit_linear, fit_ridge
from sidetune.recipe import Recipe
from sidetune.side_fit import new_member, open_fleet, row_outputs
from sidetune.sides import SIDES, SOLVED
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe
from sidetune.sources import StoredSource
from sidetune.train import train

RATES = (1e-3, 3e-3)
AT_ONCE = 8  # clips that are read together
CHANCE = 1 / len(ORDERS)
GOAL = 0.95  # of a network that sees time


@dataclass(frozen=True)
class OrderSetting:
    """What a run of the bench is about.

    Args:
        backbone: as on the command line.
        size: side of a frame in pixels; None: the backbone's own.
        weights: of the backbone.
        scenes: to train on, six clips each; half as many to validate and as many to test on.
        sides: to train, beside ridge and the linear probe.
        seeds: networks a side and rate.
        epochs: of every training.
        device: ``auto`` is the GPU where there is one.

    Raises:
        RequestError: a side that is not trained, or numbers that cannot be.
    """

    backbone: str = "demo"
    size: int | None = 112
    weights: str | None = None
    scenes: int = 60
    sides: tuple[str, ...] = ("attentive", "losa", "last")
    seeds: int = 3
    epochs: int = 30
    device: str = "auto"

    def __post_init__(self) -> None:
        trained = [name for name in SIDES if name not in SOLVED]
        for name in self.sides:
            if name not in trained:
                raise RequestError(f"no side named {name!r} is trained.{nearest(name, trained)}")
        for name, least in (("scenes", 2), ("seeds", 1), ("epochs", 1)):
            if getattr(self, name) < least:
                raise RequestError(
                    f"--{name} is {getattr(self, name)}, expected {least} or more. Type: --{name} {least}"
                )

    @property
    def recipe(self) -> Recipe:
        """That all share."""
        fields = {
            "backbone": {"name": self.backbone, "size": self.size, "weights": self.weights},
            "clips": {"frames": CLIP, "stored": CLIP},
            "train": {"epochs": self.epochs},
        }
        return Recipe.build(fields)


def bench_order(setting: OrderSetting, out: Path, *, quiet: bool = False) -> Bench:
    """Write the clips, extract, train, score.

    Args:
        setting: see there.
        out: where clips and store are kept; a second run finds them.
        quiet: no progress.

    Raises:
        RequestError: OUT holds other clips.
        StoreError: the store belongs to another backbone, or the disk is full.
        DivergedError: no network of a side ended.
    """
    backbone = build_backbone(setting.backbone, **setting.recipe.backbone.arguments())
    require_images(backbone)
    backbone.to(find_device(setting.device))
    with locked(out):
        few = -(-setting.scenes // 2)
        write_order_set(out / "clips", {"train": setting.scenes, "val": few, "test": setting.scenes})
        dataset = load_dataset(out / "clips", clips=True)
        keys = sample_keys(dataset)
        part = Part("", setting.recipe, dataset, out)
        (job,) = open_jobs([part], backbone, keys, out=out, store=out / "store", quiet=quiet)
        test = _Test(job, keys)
        rows = [row for name, models in _fitted(job, setting) for row in test.rows(name, models)]
    return Bench(tuple(rows), describe_machine(backbone.device, asdict(setting)))


def _fitted(job: Job, setting: OrderSetting) -> list[tuple[str, list[SideModel]]]:
    """Each method's models, a seed each; what is solved has one."""
    pooled = Pooled(job.summary, job.targets, job.split["train"], job.split["val"])
    norm, final_norm = job.recipe.head.norm, job.source.final_norm
    found = [
        ("ridge", [fit_ridge(RidgeRecipe(), pooled, job.task).model]),
        ("linear", [fit_linear(LinearRecipe(), pooled, job.task, norm=norm, final_norm=final_norm).model]),
    ]
    return found + [(name, _trained(job, name, setting.seeds)) for name in setting.sides]


def _trained(job: Job, name: str, seeds: int) -> list[SideModel]:
    """Networks of the rate that is better on validation."""
    fields = job.recipe.model_dump(mode="json", exclude={"side", "train"})
    members = []
    for rate in RATES:
        for seed in range(seeds):
            own = {"epochs": job.recipe.train.epochs, "lr": rate, "seed": seed, "order_seed": 0}
            recipe = Recipe.build({**fields, "side": {"name": name}, "train": own})
            members.append(new_member(job, recipe, name=f"{rate:g} {seed}", rows=job.split["train"]))
    fleet = open_fleet(job, [member.recipe for member in members], job.split["train"])
    trained = train(fleet, members, quiet=job.quiet)
    best: tuple[float, list[SideModel]] = (-1.0, [])
    for rate in RATES:
        models = [trained[f"{rate:g} {seed}"].model for seed in range(seeds)]
        ended = [model for model in models if model is not None]
        right = [_right(job, row_outputs(job, model, job.split["val"]), job.split["val"]) for model in ended]
        if len(ended) == seeds and (score := float(np.mean(right))) > best[0]:
            best = (score, ended)
    if not best[1]:
        raise DivergedError(f"{name} diverged at every rate ({', '.join(f'{rate:g}' for rate in RATES)})")
    return best[1]


def _right(job: Job, outputs_nK: Tensor, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) 1 where the likeliest class is right."""
    found: NDArray[np.float64] = (outputs_nK.argmax(1).numpy() == job.dataset.targets[rows]).astype(
        np.float64
    )
    return found


class _Test:
    """Test clips, and the same with their frames shuffled.

    Args:
        job: of the clips.
        keys: of all samples.
    """

    def __init__(self, job: Job, keys: Sequence[str]) -> None:
        self.job, self.test = job, job.split["test"]
        assert isinstance(job.source, StoredSource), "the clips of a bench are stored"
        # an order a clip: a few orders for all would each be right or wrong as a whole
        orders = tuple(
            tuple(torch.randperm(CLIP, generator=generator(0, f"shuffle/{number}")).tolist())
            for number in range(len(self.test))
        )
        reading = replace(job.source.reading, views=orders)
        self.shuffled = StoredSource(job.source.store, keys, job.backbone.spec, reading)
        # the six clips of a scene are one draw of the bootstrap
        names = [job.dataset.paths[row].name for row in self.test]
        self.scene = np.unique(names, return_inverse=True)[1]

    def rows(self, name: str, models: Sequence[SideModel]) -> list[Row]:
        """Accuracy as they are and shuffled, each with its interval."""
        own = np.stack([_right(self.job, row_outputs(self.job, one, self.test), self.test) for one in models])
        other = np.stack([_right(self.job, self._shuffled(one), self.test) for one in models])
        goal = None if name in SOLVED or name == "attentive" else GOAL
        return [
            self._row(name, "accuracy", own, goal),
            self._row(name, "shuffled_accuracy", other, None),
        ]

    def _row(self, case: str, metric: str, right_SN: NDArray[np.float64], goal: float | None) -> Row:
        of_scene_SN = np.stack(
            [np.bincount(self.scene, weights=right) / np.bincount(self.scene) for right in right_SN]
        )
        value, resampled = seeds_difference(of_scene_SN, np.zeros((1, of_scene_SN.shape[1])))
        return Row(case, metric, value, "share", goal=goal, spread=middle(resampled))

    def _shuffled(self, model: SideModel) -> Tensor:
        """Outputs (n, K) of test clips, each with its frames in the order that was drawn for it."""
        device, spec = self.job.backbone.device, model.side.spec
        model.to(device)
        parts = []
        for first in range(0, len(self.test), AT_ONCE):
            rows = self.test[first : first + AT_ONCE].tolist()
            batch = self.shuffled.features(rows, spec, list(range(first, first + len(rows))))
            with torch.no_grad():
                parts.append(model(batch.to(device))[0].float().cpu())
        return torch.cat(parts)
