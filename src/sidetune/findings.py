"""``findings.json``: what a run found out about single images, for people. The report draws it.

    leaks      validation and test images with a near-duplicate in training
    suspects   training labels that ridge, fitted on all the others, contradicts
    mistakes   of the run's side, the most confident first, with where it looked
    right      confident answers that are right, to compare

Pictures are small data URIs, so that the file needs nothing beside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sidetune.errors import ImageError
from sidetune.evaluate import scores
from sidetune.evidence import patch_evidence
from sidetune.job import Job
from sidetune.leaks import Leaks
from sidetune.methods import Row
from sidetune.suspects import Suspect, find_suspects
from sidetune.tasks import Regress

Json = dict[str, Any]

SUSPECTS, MISTAKES, RIGHT = 24, 12, 6  # with a picture; all suspects are listed, the others as they are
PAIRS = 24  # shown
THUMBNAIL = 128  # pixels of the longer side
DARKEST = 0.8  # opacity over a patch that does not speak for the answer


def collect(job: Job, rows: Sequence[Row], leaks: Leaks | None) -> Json:
    """Everything that findings.json holds.

    Args:
        job: what was fitted on.
        rows: the score table, the run's own side last.
        leaks: as `find_leaks` found them; None where nobody looked.
    """
    own = rows[-1]
    split = "test" if len(job.split["test"]) else "val"
    return {
        "leaks": None if leaks is None else _leaks(job, own, leaks, split),
        "suspects": _suspects(job, rows),
        **_answers(job, own, split),
    }


def _leaks(job: Job, own: Row, leaks: Leaks, split: str) -> Json:
    pairs = [
        {
            "path": _name(job, pair.row),
            "split": str(job.dataset.split[pair.row]),
            "label": _label(job, pair.row),
            "train_path": _name(job, pair.train_row),
            "train_label": _label(job, pair.train_row),
            "similarity": pair.similarity,
            "identical": pair.identical,
            "thumbnail": thumbnail(job, pair.row),
            "train_thumbnail": thumbnail(job, pair.train_row),
        }
        for pair in leaks.pairs[:PAIRS]
    ]
    return {
        "compared": {"train": leaks.num_train, "others": leaks.num_others},
        "count": len(leaks.pairs),
        "images": len({pair.row for pair in leaks.pairs}),
        "pairs": pairs,
        "without": _score_without(job, own, {pair.row for pair in leaks.pairs}, split),
    }


def _score_without(job: Job, own: Row, leaked: set[int], split: str) -> Json | None:
    """The headline score of the images that have no twin in training."""
    rows = job.split[split]
    kept = np.array([row not in leaked for row in rows.tolist()], dtype=bool)
    if kept.all() or not kept.any():
        return None
    predictions = own.predictions[split].double().numpy()[kept]
    found = scores(job.task, predictions, job.dataset.targets[rows[kept]])[job.task.headline]
    return {"split": split, "num_samples": int(kept.sum()), "score": found}


def _suspects(job: Job, rows: Sequence[Row]) -> Json | None:
    ridge = next((row.fitted for row in rows if row.fitted.name == "ridge"), None)
    if ridge is None or ridge.left_out is None:
        return None
    training = job.split["train"]
    left_out = job.task.predictions(ridge.left_out).double().numpy()
    found = find_suspects(job.task, left_out, job.dataset.targets[training])
    listed = [
        _suspect(job, one, int(training[one.sample]), picture=at < SUSPECTS) for at, one in enumerate(found)
    ]
    return {"checked": len(training), "count": len(found), "rows": listed}


def _suspect(job: Job, one: Suspect, row: int, *, picture: bool) -> Json:
    return {
        "path": _name(job, row),
        "label": _value(job, one.output, one.label),
        "suggested": _value(job, one.output, one.suggested),
        "p_label": one.p_label,
        "p_suggested": one.p_suggested,
        "thumbnail": thumbnail(job, row) if picture else None,
    }


def _answers(job: Job, own: Row, split: str) -> Json:
    """The most confident mistakes and, for classes, right answers."""
    predictions = own.predictions[split].double().numpy()
    targets = job.dataset.targets[job.split[split]]
    if job.task.kind == "classify":
        return _class_answers(job, own, split, predictions, targets)
    labelled = ~np.isnan(targets)
    if job.task.kind == "multilabel":
        wrong = labelled & ((predictions > 0.5) != (targets > 0.5))
        doubt = np.abs(predictions - 0.5) + 0.5
    else:
        wrong = labelled
        assert isinstance(job.task, Regress)
        doubt = np.abs(predictions - targets) / np.asarray(job.task.std)
    cells = np.argwhere(wrong)
    cells = cells[np.argsort(-doubt[wrong], kind="stable")][:MISTAKES]
    shown = []
    for at, output in cells.tolist():
        row, guess = int(job.split[split][at]), float(predictions[at, output])
        binary = job.task.kind == "multilabel"
        shown.append(
            {
                "path": _name(job, row),
                "label": _value(job, output, float(targets[at, output])),
                "predicted": _value(job, output, float(guess > 0.5) if binary else guess),
                "confidence": float(doubt[at, output]) if binary else None,
                "thumbnail": thumbnail(job, row),
                "evidence": None,
            }
        )
    return {"mistakes": {"split": split, "count": int(wrong.sum()), "rows": shown}, "right": {"rows": []}}


def _class_answers(
    job: Job, own: Row, split: str, predictions: NDArray[np.float64], targets: NDArray[Any]
) -> Json:
    guesses, confidence = predictions.argmax(1), predictions.max(1)
    surest_first = np.argsort(-confidence, kind="stable")
    wrong = [at for at in surest_first.tolist() if guesses[at] != targets[at]]
    right = [at for at in surest_first.tolist() if guesses[at] == targets[at]]
    shown = wrong[:MISTAKES] + right[:RIGHT]
    rows = job.split[split][shown]
    pictures = _pictures(job, own, rows, predictions[shown])
    cards = [
        {
            "path": _name(job, row),
            "label": job.task.outputs[int(targets[at])],
            "predicted": job.task.outputs[int(guesses[at])],
            "confidence": float(confidence[at]),
            "thumbnail": picture,
            "evidence": evidence,
        }
        for at, row, (picture, evidence) in zip(shown, rows.tolist(), pictures, strict=True)
    ]
    num_wrong = len(wrong[:MISTAKES])
    return {
        "mistakes": {"split": split, "count": len(wrong), "rows": cards[:num_wrong]},
        "right": {"rows": cards[num_wrong:]},
    }


def _pictures(
    job: Job, own: Row, rows: NDArray[np.int64], predictions: NDArray[np.float64]
) -> list[tuple[str | None, str | None]]:
    """Thumbnail and evidence of each row: for the answer and against the next likeliest."""
    order = torch.from_numpy(predictions).argsort(1, descending=True)
    model = own.fitted.model
    tap, maps = model.side.spec.last, None
    if len(rows) and tap.grid[0] == 1:
        device = next(model.buffers()).device
        features = job.source.features(rows.tolist(), model.side.spec).to(device)
        maps = patch_evidence(model, features, order[:, 0].to(device), order[:, 1].to(device))
    if maps is None:
        return [(thumbnail(job, row), None) for row in rows.tolist()]
    shown = maps.cpu().view(-1, *tap.grid[1:])
    return [(_as_seen(job, row), overlay(one)) for row, one in zip(rows.tolist(), shown, strict=True)]


def thumbnail(job: Job, row: int) -> str | None:
    """A small JPEG of a sample as a data URI; None where it cannot be read."""
    try:
        image = job.dataset.picture(row, at_least=2 * THUMBNAIL)
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _uri(image, "JPEG", quality=80)


def overlay(evidence: Tensor) -> str:
    """(H, W) evidence as a PNG of black with alpha, a pixel a patch: clear where it speaks for the answer."""
    clear = evidence.clamp(min=0) / evidence.clamp(min=0).quantile(0.98).clamp(min=1e-12)
    alpha = (255 * DARKEST * (1 - clear.clamp(max=1))).round().to(torch.uint8)
    pixels = torch.stack([torch.zeros_like(alpha), alpha], -1).numpy()
    return _uri(Image.fromarray(pixels, "LA"), "PNG", optimize=True)


def _as_seen(job: Job, row: int) -> str | None:
    """The square that the backbone reads of a sample."""
    preprocess = job.backbone.preprocess
    try:
        seen = preprocess(job.dataset.picture(row))
    except ImageError:
        return None
    std, mean = (torch.tensor(values)[:, None, None] for values in (preprocess.std, preprocess.mean))
    pixels = (255 * (seen * std + mean)).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return _uri(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), "JPEG", quality=80)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:  # noqa: ANN401 - Pillow's own options
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _name(job: Job, row: int) -> str:
    return job.dataset.paths[row].as_posix()


def _label(job: Job, row: int) -> str:
    """All that is known of a sample, in words."""
    target = job.dataset.targets[row]
    if job.task.kind == "classify":
        return job.task.outputs[int(target)]
    known = [(k, float(value)) for k, value in enumerate(target) if not np.isnan(value)]
    if job.task.kind == "multilabel":
        return ", ".join(job.task.outputs[k] for k, value in known if value > 0.5) or "none"
    return ", ".join(_value(job, k, value) for k, value in known)


def _value(job: Job, output: int, value: float) -> str:
    """One output's value in words: a class, ``scratch: yes``, ``x = 1.5``."""
    if job.task.kind == "classify":
        return job.task.outputs[int(value)]
    name = job.task.outputs[output]
    if job.task.kind == "multilabel":
        return f"{name}: {'yes' if value > 0.5 else 'no'}"
    return f"{name} = {value:.4g}"
