"""findings.json as `fit` writes it, and the calibration that metrics.json holds, drawn from a seed."""

import base64
import io
from itertools import pairwise

import numpy as np
from PIL import Image

from images import draw_shape

HEADLINE_WITHOUT = 0.7125


def data_uri(image, kind="JPEG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def thumbnail(image, size=128):
    small = image.convert("RGB")
    small.thumbnail((size, size))
    return data_uri(small)


def evidence(rng, grid=7):
    """Black with alpha: clear around one patch, dark far from it."""
    y, x = np.mgrid[:grid, :grid]
    cy, cx = rng.integers(1, grid - 1, 2)
    alpha = 1 - np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4)
    pixels = np.stack([np.zeros((grid, grid)), 200 * alpha], -1).astype(np.uint8)
    return data_uri(Image.fromarray(pixels, "LA"), "PNG")


class Pictures:
    """(path, picture) one after another; drawn shapes unless told otherwise."""

    def __init__(self, rng, given=(), paths=()):
        self.rng, self.given, self.paths, self.taken = rng, list(given), list(paths), 0

    def __call__(self):
        i, self.taken = self.taken, self.taken + 1
        path = self.paths[i % len(self.paths)] if self.paths else f"images/{i:04d}.png"
        if self.given:
            return path, self.given[i % len(self.given)]
        return path, draw_shape(i % 3, 3, self.rng, size=96)


def make_findings(metrics, *, seed=0, pairs=24, suspects=24, mistakes=12, given=(), paths=()):
    """Full findings of a run, as findings.json holds them.

    given and paths: pictures and their names, in place of drawn shapes.
    """
    rng = np.random.default_rng(seed)
    take = Pictures(rng, given, paths)
    names, kind = metrics["outputs"], metrics["task"]
    split = "test" if metrics["data"]["num_test"] else "val"

    def answers():
        a, b = (int(k) for k in rng.permutation(len(names))[:2]) if len(names) > 1 else (0, 0)
        if kind == "classify":
            return names[a], names[b]
        if kind == "multilabel":
            return f"{names[a]}: yes", f"{names[a]}: no"
        return f"{names[a]} = {rng.normal():.4g}", f"{names[a]} = {rng.normal():.4g}"

    def answer(confidence, right=False):
        (path, image), (truth, guess) = take(), answers()
        return {
            "path": path,
            "label": truth,
            "predicted": truth if right else guess,
            "confidence": None if kind == "regress" else confidence,
            "thumbnail": thumbnail(image.convert("RGB").resize((128, 128))),
            "evidence": evidence(rng),
        }

    def pair(similarity):
        (path, image), (train_path, _), (truth, other) = take(), take(), answers()
        return {
            "path": path,
            "split": split,
            "label": truth,
            "train_path": train_path,
            "train_label": other if similarity < 0.92 else truth,
            "similarity": similarity,
            "identical": similarity == 1.0,
            "thumbnail": thumbnail(image),
            "train_thumbnail": thumbnail(image),
        }

    def suspect(p_suggested):
        (path, image), (truth, other) = take(), answers()
        known = kind != "regress"
        return {
            "path": path,
            "label": truth,
            "suggested": other,
            "p_label": 1 - p_suggested if known else None,
            "p_suggested": p_suggested if known else None,
            "thumbnail": thumbnail(image),
        }

    data = metrics["data"]
    found = {
        "leaks": {
            "compared": {"train": data["num_train"], "others": data["num_val"] + data["num_test"]},
            "count": pairs,
            "images": (pairs + 1) // 2,
            "pairs": [pair(1.0 - 0.004 * i) for i in range(min(pairs, 24))],
            "without": {"split": split, "num_samples": 71, "score": HEADLINE_WITHOUT} if pairs else None,
        },
        "suspects": {
            "checked": data["num_train"],
            "count": 2 * suspects,
            "rows": [suspect(0.999 - 0.015 * i) for i in range(suspects)],
        },
        "mistakes": {
            "split": split,
            "count": 3 * mistakes,
            "rows": [answer(0.999 - 0.02 * i) for i in range(mistakes)],
        },
        "right": {"rows": [answer(0.99, right=True) for _ in range(6 if kind == "classify" else 0)]},
    }
    if mistakes > 3:
        found["mistakes"]["rows"][3] |= {"thumbnail": None, "evidence": None}  # the file is gone
    return found


def empty_findings(metrics, *, switched_off=False):
    """Nothing was found; or nothing was looked for."""
    found = make_findings(metrics, pairs=0, suspects=0, mistakes=0)
    found["right"]["rows"] = []
    return found | {"leaks": None, "suspects": None} if switched_off else found


def add_calibration(metrics, *, seed=0, bins=15, num_samples=2000):
    """Calibration and answered shares for every row, and a temperature of the run's own."""
    rng = np.random.default_rng(seed)
    confidence = 1 - rng.beta(1, 4, num_samples)
    right = rng.random(num_samples) < confidence**1.4
    cuts = np.linspace(0, 1, bins + 1)
    rows = []
    for low, high in pairwise(cuts.tolist()):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            mean, share = float(confidence[inside].mean()), float(right[inside].mean())
            row = {"low": low, "high": high, "count": int(inside.sum())}
            rows.append(row | {"confidence": mean, "accuracy": share})
    answered = [
        {
            "threshold": t,
            "share": float((confidence >= t).mean()),
            "accuracy": float(right[confidence >= t].mean()),
        }
        for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    ]
    answered.append({"threshold": 0.99999, "share": 0.0, "accuracy": None})
    for row in metrics["rows"]:
        for split in ("val", "test"):
            if row[split] and metrics["task"] != "regress":
                row[split]["calibration"] = rows
                if metrics["task"] == "classify":
                    row[split]["answered"] = answered
    metrics["rows"][-1]["detail"]["temperature"] = 1.3456
    metrics["cost"]["seconds"]["findings"] = 6.5
