"""What people use today, for comparison: gradients cross the backbone. One method a file.

They train in the one loop, on the same features, batches and scores as side networks; `sidetune bench` runs
them. The name is that of the recipe's ``side`` and of the method in a result line.
"""

from __future__ import annotations

from typing import Any

from sidetune.baselines.adaptformer import AdaptFormer, AdaptFormerRecipe
from sidetune.baselines.base import Baseline
from sidetune.baselines.choice import BitFit, BitFitRecipe, Full, FullRecipe, Norms, NormsRecipe
from sidetune.baselines.lora import Lora, LoraRecipe
from sidetune.baselines.stadapter import StAdapter, StAdapterRecipe
from sidetune.baselines.vpt import Vpt, VptRecipe

AnyBaselineRecipe = (
    AdaptFormerRecipe | BitFitRecipe | FullRecipe | LoraRecipe | NormsRecipe | StAdapterRecipe | VptRecipe
)

BASELINES: dict[str, type[Baseline[Any]]] = {
    "adaptformer": AdaptFormer,
    "bitfit": BitFit,
    "full": Full,
    "lora": Lora,
    "norms": Norms,
    "stadapter": StAdapter,
    "vpt": Vpt,
}
