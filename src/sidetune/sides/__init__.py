"""Side networks, one paper a file. The file's name is the ``--side`` name."""

from __future__ import annotations

from sidetune.sides.attentive import Attentive, AttentiveRecipe
from sidetune.sides.base import Side
from sidetune.sides.bypass import Bypass, BypassRecipe
from sidetune.sides.fusion import Fusion, FusionRecipe
from sidetune.sides.ladder import Ladder, LadderRecipe
from sidetune.sides.last import Last, LastRecipe
from sidetune.sides.linear import Linear, LinearRecipe
from sidetune.sides.losa import Losa, LosaRecipe
from sidetune.sides.ridge import Ridge, RidgeRecipe

AnySideRecipe = (
    AttentiveRecipe
    | BypassRecipe
    | FusionRecipe
    | LadderRecipe
    | LastRecipe
    | LinearRecipe
    | LosaRecipe
    | RidgeRecipe
)

SIDES: dict[str, type[Side]] = {
    "attentive": Attentive,
    "bypass": Bypass,
    "fusion": Fusion,
    "ladder": Ladder,
    "last": Last,
    "linear": Linear,
    "losa": Losa,
    "ridge": Ridge,
}

SOLVED = ("linear", "ridge")  # their heads are solved from pooled features, never trained by the loop
