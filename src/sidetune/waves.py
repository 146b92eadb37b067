"""How much memory members take, before they take it; and how many train at once.

A member costs what its step keeps for backward, measured on a few samples, and five numbers a parameter:
itself, its gradient, the same in one row, and two moments. What does not fit into a quarter of the memory
waits for the next wave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sidetune.bucket import Member
from sidetune.figures import size
from sidetune.fleet import Fleet
from sidetune.job import Job
from sidetune.kept import kept_bytes
from sidetune.keyed import Draws
from sidetune.machine import total_memory

SHARE = 4  # members get one part of so many of the memory
SAMPLES = 4  # that a forward pass is measured on
COPIES = 5  # of a parameter


def members_at_once(job: Job, fleet: Fleet, members: Sequence[Member]) -> int:
    """How many members train in one wave, said with the memory that they take.

    Args:
        job: its device, and who is told.
        fleet: that they will join.
        members: all of them.
    """
    of_kinds = {_kind(member): member for member in members}
    bytes_of = {kind: member_bytes(fleet, member) for kind, member in of_kinds.items()}
    total = sum(bytes_of[_kind(member)] for member in members)
    limit = device_memory(job.backbone.device) // SHARE
    at_once = len(members)
    if total > limit:
        at_once = max(1, min(len(members), limit // max(bytes_of.values())))
    what = f"training {len(members)} members"
    if at_once == len(members):
        what += f" in one pass: about {size(total)} beside the features"
    else:
        waves = -(-len(members) // at_once)
        what += (
            f" in {waves} passes of {at_once} at most: all would take {size(total)} at once, and a quarter "
            f"of the memory is {size(limit)}"
        )
    job.say(what)
    return at_once


def _kind(member: Member) -> tuple[str, int]:
    """What a member's memory hangs on."""
    return (member.architecture, member.recipe.train.batch_size)


def member_bytes(fleet: Fleet, member: Member) -> int:
    """Memory that a member takes while it trains, beside the features that all read.

    Args:
        fleet: whose data are read for it.
        member: of any kind.
    """
    model = fleet.build([member.recipe], fleet.num_outputs).train()
    model.start([0])
    rows = fleet.data.rows[:SAMPLES]
    draws = Draws([0])
    device = next(model.parameters()).device
    features = fleet.data.inputs(rows.tolist(), model.side.spec, draws).to(device)
    targets = member.targets[torch.from_numpy(np.asarray(rows))].to(device)
    apart = [*features.layers, *model.parameters(), *model.buffers(), *model.side.frozen()]
    kept = kept_bytes(
        lambda: member.task.loss(model(features, draws)[..., : member.task.num_outputs], targets).sum(), apart
    )
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return kept * member.recipe.train.batch_size // len(rows) + COPIES * 4 * numbers


def device_memory(device: torch.device) -> int:
    """Of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()
