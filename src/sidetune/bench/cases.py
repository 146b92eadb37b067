"""The cases of `sidetune bench side`: the steps that training takes, and the least they could cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sidetune.bench.rows import Row
from sidetune.bench.setting import Setting
from sidetune.bench.timing import Timing
from sidetune.bucket import step_threads
from sidetune.features import Features, FinalNorm
from sidetune.keyed import Draws, generator
from sidetune.model import LAYER_NORM_EPS, SideModel
from sidetune.optimizer import MemberAdamW, Update
from sidetune.recipe import TrainRecipe
from sidetune.sides import SIDES
from sidetune.sides.base import Form
from sidetune.tasks import Classify

CASES: dict[str, tuple[str, Form]] = {
    f"{side}-{form}": (side, form) for form in ("fast", "textbook") for side in ("losa", "last")
}
NUM_CLASSES = 10
UP_STD = 0.02  # of parameters that start at zero: with zeros in them a step would be cheaper than it is
GEMM = 1024  # rows and columns of the product that says how fast this machine multiplies
SECOND = 1000.0  # milliseconds
WEIGHT_DECAY = 0.05  # AdamW's; whatever it is, a step costs the same


class Case:
    """A side network with its head and optimiser, and the batches it trains on.

    Args:
        name: of `CASES`; with ``-m16`` behind it, 16 members in one model.
        setting: sizes.
        pool: batches of random taps, read in turn; every case gets the same.
    """

    def __init__(self, name: str, setting: Setting, pool: Sequence[Features]) -> None:
        case, _, members = name.partition("-m")
        (self.side, self.form), self.members = CASES[case], int(members or 1)
        names = [tap.name for tap in setting.spec.blocks]
        if self.side == "last":
            names = list(setting.spec.names)
        self.taps = [features.select(names) for features in pool]
        self.task = Classify(tuple(map(str, range(NUM_CLASSES))), (1 / NUM_CLASSES,) * NUM_CLASSES)
        self.targets = torch.arange(setting.batch, device=setting.device) % NUM_CLASSES
        self.model = _model(self, setting)
        recipe = TrainRecipe()
        self._update = Update(recipe.lr, WEIGHT_DECAY, recipe.clip_norm)
        self._optimizer = MemberAdamW(self.model.parameters())
        self._turn = itertools.cycle(self.taps)

    @property
    def tap_bytes(self) -> int:
        """Bytes of the stored taps that the side reads in one step."""
        return sum(layer.nbytes for layer in self.taps[0].layers)

    def loss(self, features: Features) -> Tensor:
        """Forward: taps -> the loss of each member, (M,)."""
        output = self.model(features, Draws(range(self.members)))
        return self.task.loss(output, self.targets[: len(features)]).mean(1)

    def step(self) -> None:
        """Forward, backward and update on the next batch, as the loop does it."""
        with step_threads(self.model):
            self.loss(next(self._turn)).sum().backward()
            self._optimizer.step(dict.fromkeys(range(self.members), self._update))


def _model(case: Case, setting: Setting) -> SideModel:
    """Started, with every parameter that starts at zero drawn."""
    arguments: dict[str, Any] = {"rank": setting.ranks()[case.side], "form": case.form}
    network = SIDES[case.side](case.taps[0].spec, members=case.members, **arguments)
    norm = FinalNorm(torch.ones(setting.width), torch.zeros(setting.width), LAYER_NORM_EPS)
    model = SideModel(network, NUM_CLASSES, final_norm=norm)
    model.start(range(case.members))
    keyed = generator(0, "bench/up")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=keyed) * UP_STD)
    return model.to(setting.device).train()


def machine_cases(setting: Setting, pool: Sequence[Features]) -> dict[str, Callable[[], object]]:
    """What the floor is made of: two ways to read one batch of taps once, and one large product."""
    reads, copies = itertools.cycle(pool), itertools.cycle(pool)
    into = [torch.empty_like(layer) for layer in pool[0].layers]
    keyed = generator(0, "bench/gemm")
    a, b = (torch.randn(GEMM, GEMM, generator=keyed).to(setting.device) for _ in range(2))
    product = torch.empty_like(a)

    def read() -> None:
        for layer in next(reads).layers:
            flat = layer.flatten()
            flat[: flat.numel() // 8 * 8].view(torch.int64).sum()

    def copy() -> None:
        for layer, buffer in zip(next(copies).layers, into, strict=True):
            buffer.copy_(layer)

    return {"read": read, "copy": copy, "gemm": lambda: torch.mm(a, b, out=product)}


def floor_rows(setting: Setting, timings: Mapping[str, Timing]) -> list[Row]:
    """The least a step could cost here, ms an image: `floor` of LoSA, `floor-last` of LAST.

        floor = 2 * bytes of the side's stored taps / read rate + FLOPs / product rate

    The taps are read twice: forward, and backward for the gradients of the down-projections. The read
    rate is the better of summing the taps as integers and of copying them; the product rate is that of
    one square float32 product of 1024 rows. Both are measured in the run's own rounds. An image's FLOPs
    (a product of sizes a, b, c has 2abc), forward and backward together:

        LoSA   L * 4 * 2NDR                        both down-projections, and their gradients
        LAST   (L + 1) * (3 * 2ND(3R) + 3 * 2NRD   qkv and out; backward is twice forward
                          + 6 * 2NNR)              scores and mixing: two products forward, four backward

    Args:
        setting: sizes.
        timings: of `machine_cases`, measured on a batch with all taps.
    """
    layers, tokens, width = setting.layers, setting.tokens, setting.width
    losa, last = setting.ranks()["losa"], setting.ranks()["last"]
    image = setting.record_bytes() / (layers + 1)  # bytes of one tap
    flops = {
        "floor": layers * 4 * 2 * tokens * width * losa,
        "floor-last": (layers + 1) * (24 * tokens * width * last + 12 * tokens**2 * last),
    }
    taps = {"floor": layers, "floor-last": layers + 1}
    read = setting.batch * setting.record_bytes() / min(timings["read"].median, timings["copy"].median)
    product = 2 * GEMM**3 / timings["gemm"].median
    return [
        Row(
            name,
            "ms_per_image",
            SECOND * (2 * taps[name] * image / read + flops[name] / product),
            "ms",
        )
        for name in flops
    ]
