"""What many members cost: result lines in results/members.jsonl.

    python scripts/members_results.py [--runs 3]

`sidetune bench side --members 16` for a ViT-S of 257 and of 65 tokens, then a step with the live backbone:
DINOv2-S at 224 px, 32 images, 16 members against one, in turn. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from speed_results import lines, measure

from sidetune.backbones import build_backbone
from sidetune.bench.rows import describe_machine
from sidetune.bucket import Bucket, Member, Place
from sidetune.features import Features
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.sides.losa import Losa
from sidetune.tasks import Classify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "members.jsonl"
BENCHES = ("side --members 16", "side --members 16 --tokens 65 --batch 32")
MEMBERS, BATCH, ROUNDS, LIVE_GOAL = 16, 32, 4, 1.25


def live() -> dict[str, Any]:
    """A step of 16 members and of one on batches that the backbone makes, in turn."""
    backbone = build_backbone("demo", size=224)
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    buckets = {count: bucket(backbone.spec.names, backbone, count) for count in (1, MEMBERS)}
    seconds: dict[int, list[float]] = {count: [] for count in buckets}
    rows = np.arange(BATCH)
    for turn in range(ROUNDS + 1):
        for count, one in buckets.items():
            started = time.perf_counter()
            with torch.no_grad():
                features = backbone(images)
            own: Features = features.select(one.model.side.spec.names)
            one.step(rows, own, epoch=0, step=turn, total=ROUNDS + 1)
            seconds[count].append(time.perf_counter() - started)
    times = {count: median(found[1:]) for count, found in seconds.items()}  # the first warms up
    shared = {"metric": "step_s", "unit": "s"}
    alone = {"case": "live-m1", "value": times[1], "against": None, "ratio": None, "goal": None}
    ratio = times[MEMBERS] / times[1]
    many = {
        "case": f"live-m{MEMBERS}",
        "value": times[MEMBERS],
        "against": "live-m1",
        "ratio": ratio,
        "goal": LIVE_GOAL,
    }
    about = describe_machine(
        torch.device("cpu"), {"batch": BATCH, "members": MEMBERS, "size": 224, "rounds": ROUNDS}
    )
    return {"rows": [{**alone, **shared}, {**many, **shared}], "environment": about}


def bucket(names: Any, backbone: Any, count: int) -> Bucket:  # noqa: ANN401 - a spec's names, any backbone
    """Members that differ in their rates and seeds."""
    task, targets = Classify(tuple(map(str, range(10))), (0.1,) * 10), torch.arange(BATCH) % 10

    def build(recipes: Any, num_outputs: int) -> SideModel:  # noqa: ANN401 - recipes
        return SideModel(Losa(backbone.spec, members=len(recipes)), num_outputs, final_norm=backbone.norm)

    places = []
    for number in range(count):
        recipe = Recipe.build({"train": {"epochs": 1, "seed": number, "lr": 1e-3 * (1 + number)}})
        places.append(Place(Member(str(number), recipe, task, targets, np.arange(BATCH))))
    return Bucket(places, build, 10, np.arange(BATCH))


def main() -> None:
    """Measure, and write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--live", action="store_true", help="one live measurement, as JSON")
    asked = parser.parse_args()
    if asked.live:
        print(json.dumps(live(), default=str))
        return
    text: list[str] = []
    for run in range(asked.runs):
        for command in BENCHES:
            text += lines(measure(command.split()), command, run)
        done = subprocess.run(
            [sys.executable, __file__, "--live"], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        found["environment"]["commit"] = commit.stdout.strip()
        text += [
            line.replace("sidetune bench live", "python scripts/members_results.py --live")
            for line in lines(found, "live", run)
        ]
        RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
