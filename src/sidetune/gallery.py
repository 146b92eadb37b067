"""The report's pictures: findings.json as captions and thumbnails, ready for the page's template.

Everything here comes from file names, labels and images of users: it is text to be escaped, and a
picture is taken only as an image inside the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sidetune.errors import ArtifactError
from sidetune.figures import label, number, phrase

Json = dict[str, Any]

PICTURES = 24  # suspects on the page at all; findings.json lists every one
SHOWN = 8  # cards of a group in sight; the rest unfolds
LONGEST = 60  # characters of a label under a picture; the table of classes has all of it
SPLITS = {"test": "test", "val": "validation"}
INLINE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]+=*")


def gallery(findings: Json, metrics: Json, own: Json) -> Json:
    """What the page shows of findings.json.

    Args:
        findings: as `fit` wrote it.
        metrics: metrics.json, for the headline's name, the task and the number of images.
        own: the run's own row of the score table.

    Returns:
        ``mistakes``, ``suspects`` and ``leaks``, the last two None where they were not looked for.

    Raises:
        ArtifactError: a picture is not an image inside the file.
        KeyError: a field is missing.
    """
    return {
        "mistakes": _mistakes(findings["mistakes"], findings["right"], metrics["task"]),
        "suspects": _suspects(findings["suspects"]) if findings["suspects"] else None,
        "leaks": _leaks(findings["leaks"], metrics, own) if findings["leaks"] else None,
    }


def _mistakes(mistakes: Json, right: Json, task: str) -> Json:
    """Mistakes and right answers, each beside what spoke for the answer where that is known."""
    rows = [*mistakes["rows"], *right["rows"]]
    return {
        "split": SPLITS[mistakes["split"]],
        "count": mistakes["count"],
        "evidence": any(row["evidence"] for row in rows),
        "groups": [
            ({"regress": "Largest errors"}.get(task, "Most confident mistakes"), _answers(mistakes["rows"])),
            ("Confident and right, to compare", _answers(right["rows"])),
        ],
    }


def _answers(rows: Sequence[Json]) -> Json:
    cards = []
    for row in rows:
        pictures = [_picture(row["thumbnail"], row["path"])]
        if row["thumbnail"] and row["evidence"]:
            alt = f"The same picture, dark where nothing speaks for {row['predicted']}"
            pictures.append(_picture(row["thumbnail"], alt, row["evidence"]))
        lines = [
            ("said", _brief(row["predicted"]), _percent(row["confidence"])),
            ("label", _brief(row["label"]), ""),
        ]
        cards.append({"pictures": pictures, "lines": lines, "paths": [row["path"]], "badges": []})
    return _folded(cards)


def _suspects(suspects: Json) -> Json:
    cards = [
        {
            "pictures": [_picture(row["thumbnail"], row["path"])],
            "lines": [
                ("label", _brief(row["label"]), _percent(row["p_label"])),
                ("ridge", _brief(row["suggested"]), _percent(row["p_suggested"])),
            ],
            "paths": [row["path"]],
            "badges": [],
        }
        for row in suspects["rows"][:PICTURES]
    ]
    return {"checked": suspects["checked"], "count": suspects["count"], "cards": _folded(cards)}


def _leaks(leaks: Json, metrics: Json, own: Json) -> Json:
    """Pairs, and the headline score with and without the images that have a twin in training."""
    headline = metrics["headline"]
    name, unit = label(headline)
    without = leaks["without"]
    score = None
    if without:
        score = {
            "name": name,
            "phrase": phrase(headline),
            "unit": unit,
            "split": SPLITS[without["split"]],
            "with": number(headline, own[without["split"]]["scores"][headline]),
            "without": number(headline, without["score"]),
            "num": metrics["data"][f"num_{without['split']}"],
            "num_without": without["num_samples"],
        }
    return {
        "train": leaks["compared"]["train"],
        "others": leaks["compared"]["others"],
        "count": leaks["count"],
        "images": leaks["images"],
        "score": score,
        "cards": _folded([_pair(row) for row in leaks["pairs"]]),
    }


def _pair(row: Json) -> Json:
    """A validation or test image and its twin in training."""
    alike = "the same bytes" if row["identical"] else f"{_similar(row['similarity'])} alike"
    return {
        "pictures": [
            _picture(row["thumbnail"], row["path"]),
            _picture(row["train_thumbnail"], row["train_path"]),
        ],
        "badges": [alike, *(["labels differ"] if row["label"] != row["train_label"] else [])],
        "lines": [
            (SPLITS[row["split"]], _brief(row["label"]), ""),
            ("training", _brief(row["train_label"]), ""),
        ],
        "paths": [row["path"], row["train_path"]],
    }


def _folded(cards: Sequence[Json]) -> Json:
    """The first cards in sight, the rest folded; a rest of one or two is not worth a fold."""
    shown = SHOWN if len(cards) > SHOWN + 2 else len(cards)
    return {"shown": cards[:shown], "rest": cards[shown:]}


def _picture(source: str | None, alt: str, over: str | None = None) -> Json:
    for uri in (source, over):
        if uri is not None and not INLINE.fullmatch(uri):
            raise ArtifactError(
                f"findings.json holds a picture that starts with {uri[:30]!r}, expected "
                "'data:image/jpeg;base64,' or png. Fit the run again with: sidetune fit"
            )
    return {"source": source, "alt": alt, "over": over}


def _brief(name: str) -> str:
    """A label's start and end: the end says yes or no, or a value."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 20]} … {name[-17:]}"


def _percent(share: float | None) -> str:
    """A probability in whole percent; never a full 100 or 0, which no model knows."""
    if share is None:
        return ""
    if share >= 0.995:
        return "> 99 %"
    return f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %"


def _similar(similarity: float) -> str:
    return "> 99.9 %" if similarity >= 0.9995 else f"{100 * similarity:.1f} %"
