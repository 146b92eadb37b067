"""The report's part about the members of a fleet: what each scored on what was held out, and who answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sidetune.figures import LABELS, forest, label, number, phrase

Json = dict[str, Any]

DRAWN = 16  # members with a dot
SHOWN = 200  # members in the table
SECOND = {"classify": "log_loss", "multilabel": "mean_average_precision", "regress": "mae"}


def held_out(fleet: Mapping[str, Any], sample: str = "image") -> str:
    """What members were scored on, in words: ``48 images out of fold``."""
    samples = f"{fleet['held_out']['num_samples']:,} {sample}s"
    return f"{samples} of validation" if fleet["folds"] is None else f"{samples} out of fold"


def who_answers(metrics: Mapping[str, Any], sample: str = "image") -> str:
    """One sentence: which members answer for a run, and what they score together.

    Args:
        metrics: as metrics.json holds it, with its fleet.
        sample: what a sample is called.
    """
    fleet, headline = metrics["fleet"], metrics["headline"]
    chosen = [one["member"] for one in fleet["members"] if one["weight"]]
    networks = f" ({fleet['answering']} networks)" if fleet["answering"] > len(chosen) else ""
    if len(chosen) == 1:
        of = f", the best of {len(fleet['members'])}" if len(fleet["members"]) > 1 else ""
        who = f"{chosen[0]}{networks} answers{of}"
    else:
        who = f"{len(chosen)} of {len(fleet['members'])} members{networks} answer together"
    score, unit = fleet["held_out"]["scores"][headline], label(headline)[1]
    reached = f"{number(headline, score)}{unit and f' {unit}'}"
    return f"{who}: {phrase(headline)} {reached} on {held_out(fleet, sample)}."


def members_view(metrics: Mapping[str, Any], sample: str = "image") -> Json | None:
    """Everything that the page shows of a fleet, as text and coordinates; None where there was none.

    Args:
        metrics: as metrics.json holds it.
        sample: what a sample is called.
    """
    if "fleet" not in metrics:
        return None
    fleet, names = metrics["fleet"], [metrics["headline"], SECOND[metrics["task"]]]
    return {
        "answer": who_answers(metrics, sample),
        "held": held_out(fleet, sample),
        "folds": fleet["folds"],
        "ensemble": fleet["ensemble"],
        "several": fleet["answering"] > 1,
        "forest": _dots(metrics),
        "columns": [label(name) for name in names],
        "rows": _rows(fleet["members"][:SHOWN], names),
        "count": len(fleet["members"]),
        "cut": len(fleet["members"]) > SHOWN,
        "folded": len(fleet["members"]) > DRAWN,
        "first": next(one["member"] for one in fleet["members"] if one["weight"]),
    }


def _dots(metrics: Mapping[str, Any]) -> Json | None:
    """The headline score of the first members, those that answer in the run's colour."""
    headline, shown = metrics["headline"], metrics["fleet"]["members"][:DRAWN]
    rows = [
        {"method": one["member"], "held": {"scores": one["scores"], "intervals": {}}}
        for one in shown
        if one["scores"] is not None
    ]
    drawn = forest({"headline": headline, "side": "", "rows": rows}, "held")
    if drawn is not None:
        answering = {one["member"] for one in shown if one["weight"]}
        for row in drawn["rows"]:
            row["own"] = row["method"] in answering
    return drawn


def _rows(members: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Json]:
    """A line a member; the best of a column is marked."""
    best = {}
    for name in names:
        values = [v for one in members if one["scores"] and (v := one["scores"].get(name)) is not None]
        if len(values) > 1:
            best[name] = max(values) if LABELS.get(name, ("", "", True))[2] else min(values)
    return [
        {
            "member": one["member"],
            "networks": one["networks"],
            "diverged": one["diverged"],
            "own": bool(one["weight"]),
            "cells": [
                (number(name, score), "", name in best and score == best[name])
                for name in names
                for score in ((one["scores"] or {}).get(name),)
            ],
            "weight": f"{one['weight']:.2f}" if one["weight"] else "–",
        }
        for one in members
    ]
