"""As a program: what members of a fleet take beside the features they read, predicted and measured.

In a process of its own, whose allocator gives back what is freed: what counts is alive.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sidetune.artifact import build_model
from sidetune.bench.peak import GLIBC
from sidetune.bucket import Member
from sidetune.features import Features, Spec, Tap
from sidetune.fleet import Fleet, TrainingSet
from sidetune.keyed import generator
from sidetune.memory import PeakMemory, anonymous_bytes
from sidetune.recipe import Recipe
from sidetune.tasks import Classify
from sidetune.waves import member_bytes

LAYERS, PATCHES, WIDTH, BATCH, MEMBERS = 12, 64, 96, 32, 8
GRID = {"grid": (1, 8, 8), "num_prefix": 1, "cls_index": 0}
SPEC = Spec(
    (
        Tap("embedding", "embedding", WIDTH, **GRID),
        *(Tap(f"block.{i + 1}", "block", WIDTH, **GRID) for i in range(LAYERS)),
    )
)
TASK = Classify(("a", "b"), (0.5, 0.5))


def measure(side: str, form: str) -> tuple[int, int]:
    """Bytes of all members, predicted and taken."""
    recipe = Recipe.build({"side": {"name": side, "form": form}, "train": {"epochs": 1, "batch_size": BATCH}})
    keyed = generator(0, "taps")
    every = Features(
        tuple(torch.randn(2 * BATCH, PATCHES + 1, WIDTH, generator=keyed) for _ in SPEC.taps), SPEC
    )

    def inputs(rows, spec, draws):
        return every.select(spec.names).rows(slice(0, len(rows)))

    def build(recipes, num_outputs):
        rates = [one.side.drop_path for one in recipes]
        return build_model(recipes[0], SPEC, num_outputs, None, drop_paths=rates)

    rows = np.arange(2 * BATCH)
    targets = torch.arange(2 * BATCH) % 2
    data = TrainingSet(inputs, partial(inputs, draws=None), rows, SPEC, ahead=1)

    def member(seed):
        own = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"seed": seed, "order_seed": 0})}
        )
        return Member(str(seed), own, TASK, targets, rows)

    members = [member(seed) for seed in range(MEMBERS)]
    warm = Fleet(data, build, 2)
    warm.add([member(99)])
    warm.train_epoch()
    warm.remove(["99"])
    predicted = sum(member_bytes(Fleet(data, build, 2), one) for one in members)
    fleet = Fleet(data, build, 2)
    before = anonymous_bytes()
    with PeakMemory() as memory:
        fleet.add(members)
        fleet.train_epoch()
    return predicted, memory.peak - before


def measured(cases: list[str]) -> dict[str, list[int]]:
    """``side-form`` -> `measure` of it, with one thread, in one process of their own."""
    paths = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, **GLIBC, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__, *cases], capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({case: measure(*case.split("-")) for case in sys.argv[1:]}))
