"""Run folders for the report, with numbers drawn from a seed, and a reader of the page."""

import json
from html.parser import HTMLParser

import numpy as np

from findings import add_calibration, make_findings
from sidetune.evaluate import evaluate
from sidetune.tasks import Classify, MultiLabel, Regress

VOID = {"meta", "link", "line", "polyline", "circle", "rect", "br", "img"}
HOSTILE = "<script>alert('x')</script>\" onload=\"x"


class Page(HTMLParser):
    """Collects text, tags and attributes, and fails on tags that do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data.strip())

    @property
    def ids(self):
        return [value for name, value in self.attributes if name == "id"]

    @property
    def links(self):
        return [value for name, value in self.attributes if name in ("src", "href")]

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


def make_task(kind, num_outputs):
    names = (HOSTILE, *(f"class {k}" for k in range(1, num_outputs)))
    even = (1 / num_outputs,) * num_outputs
    return {
        "classify": Classify(names, even),
        "multilabel": MultiLabel(names, even),
        "regress": Regress(names, (0.0,) * num_outputs, (1.0,) * num_outputs),
    }[kind]


def evaluation(task, seed, num_samples=80):
    rng = np.random.default_rng(seed)
    if task.kind == "classify":
        targets = rng.integers(task.num_outputs, size=num_samples)
        logits = rng.normal(size=(num_samples, task.num_outputs))
        logits[np.arange(num_samples), targets] += 1 + seed % 10 / 2
        return evaluate(task, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), targets).to_json()
    targets = rng.normal(size=(num_samples, task.num_outputs))
    predictions = targets + rng.normal(size=targets.shape)
    if task.kind == "multilabel":
        return evaluate(task, 1 / (1 + np.exp(-predictions)), (targets > 0).astype(float)).to_json()
    return evaluate(task, predictions, targets).to_json()


def write_run(
    folder, kind="classify", num_outputs=3, epochs=8, test=True, methods=("ridge", "linear", "losa")
):
    task = make_task(kind, num_outputs)
    rows = [
        {
            "method": method,
            "detail": {"lambda": 0.01} if method == "ridge" else {},
            "parameters": 1000 * (i + 1),
            "seconds": 3.0 + 100 * i,
            "val": evaluation(task, i),
            "test": evaluation(task, i + 10) if test else None,
        }
        for i, method in enumerate(methods)
    ]
    metrics = {
        "side": methods[-1],
        "backbone": "toy",
        "task": kind,
        "outputs": list(task.outputs),
        "headline": task.headline,
        "data": {"name": "cells", "num_train": 1000, "num_val": 80, "num_test": 80, "num_skipped": 2},
        "rows": rows,
        "cost": {
            "parameters": 73856,
            "head_parameters": 1155,
            "seconds": {"features": 184.2, "ridge": 0.4, "linear": 2.5, "train": 95.0, "evaluate": 3.1},
            "peak_memory_bytes": 3 * 2**30,
            "store_bytes": 790 * 2**20,
        },
        "environment": {"python": "3.11", "versions": {"torch": "2.8", "sidetune": "0.1.0"}},
    }
    recipe = {
        "recipe": {"side": {"name": "losa", "rank": 8, "order": "channel-token"}, "train": {"lr": 0.001}},
        "hash": "ab" * 32,
        "data": "cd" * 32,
        "backbone": "ef" * 32,
    }
    history = [
        {
            "epoch": epoch,
            "loss": 1.1 * 0.8**epoch,
            "lr": 0.001,
            "val": {task.headline: 0.8 - 0.3 * 0.6**epoch} if epoch % 2 else None,
            "seconds": 1.0,
        }
        for epoch in range(epochs)
    ]
    for row in rows:  # an older version wrote no calibration
        for split in filter(None, (row["val"], row["test"])):
            del split["calibration"], split["answered"]
    folder.mkdir(exist_ok=True)
    for name, value in {"metrics": metrics, "recipe": recipe, "artifact": {"format": 1, "spec": []}}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    return metrics


def add_fleet(folder, labels, folds=None, answering=2):
    """Give a run a fleet: the first members answer, the last one diverged."""
    metrics = json.loads((folder / "metrics.json").read_text())
    val = metrics["rows"][-1]["val"]
    headline, each = metrics["headline"], folds or 1
    members = [
        {
            "member": label,
            "networks": each,
            "diverged": 0,
            "scores": val["scores"] | {headline: val["scores"][headline] - 0.01 * i},
            "weight": 1 / answering if i < answering else 0.0,
        }
        for i, label in enumerate(labels)
    ]
    members[-1] |= {"diverged": 1, "scores": None, "weight": 0.0}
    metrics["fleet"] = {
        "networks": each * len(labels),
        "answering": each * answering,
        "folds": folds,
        "ensemble": answering > 1,
        "held_out": val,
        "members": members,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def write_full_run(folder, **options):
    """A run with calibration and findings; `findings` in place of full ones."""
    findings = options.pop("findings", make_findings)
    metrics = write_run(folder, **options)
    add_calibration(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    found = findings(metrics)
    (folder / "findings.json").write_text(json.dumps(found))
    return metrics, found
