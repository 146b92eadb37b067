"""What `sidetune bench cost` compares: a name says which method trains, and how.

    NAME = METHOD-SUFFIX-SUFFIX..      losa   losa-stored   lora-linear   lora-last3   last-m4

A method is a side network, or a baseline whose gradients cross the backbone. A suffix changes a field of its
recipe, or how it is run; what is not named is the method's own default. ``forward`` is the backbone alone to
its last block, ``features`` the same with every tap kept; both may be streamed, as what reads them live may.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch

from sidetune.artifact import build_model
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone, Precision
from sidetune.baselines import BASELINES
from sidetune.baselines.base import Baseline, BaselineRecipe
from sidetune.bench.setting import LEFT_OPEN, require_device, require_least
from sidetune.data.reading import Reading
from sidetune.data.views import split_key
from sidetune.errors import RequestError, nearest
from sidetune.features import Features, Spec
from sidetune.fleet import Fleet, Member, TrainingSet
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.recipe import Recipe, TrainRecipe
from sidetune.sides import SIDES, SOLVED
from sidetune.sources import StoredSource
from sidetune.store import DTYPES, Store
from sidetune.tasks import Classify

FORWARD = "forward"  # the backbone alone, to its last block: the floor of what stores nothing
FEATURES = "features"  # likewise, every tap kept
STREAMED = "streamed"
METHODS = (*(name for name in SIDES if name not in SOLVED), *BASELINES)
DEFAULT = (
    *(FORWARD, "losa", "last", "losa-stored", "last-stored"),
    *("lora", "norms", "bitfit", "adaptformer", "vpt", "full"),
)
NUM_CLASSES = 10
STORE_BATCHES = 4  # of the small store: more than a cache holds at the default sizes
STORE_PASSES = 4  # over it in one round, so that reading ahead is under way for most of the steps
SEED = 0
LATER = ("frames", "precision", "weights", "depth")  # fields of `CostSetting` that came after results did

# what a suffix says of a recipe: its part, field and value
FIELDS: dict[str, tuple[str, str, Any]] = {
    "textbook": ("side", "form", "textbook"),
    "linear": ("side", "layers", "linear"),
    "checkpointing": ("side", "checkpointing", True),
    "compile": ("side", "compiled", True),
    "bf16": ("train", "precision", "bf16"),
}


@dataclass(frozen=True)
class CostSetting:
    """What a run of the bench is about. The defaults are those that the goals are about.

    Args:
        backbone: as on the command line; its weights are random where it is one of timm.
        size: side of the image in pixels.
        batch: B, images a step; or clips.
        images: of the whole job, whose time is computed; or clips.
        epochs: of the whole job.
        threads: of torch; None: as they are.
        rounds: in which every case runs once.
        device: ``cpu`` or ``cuda``.
        frames: T of a clip; None: the samples are images.
        precision: of the backbone, as ``backbone.precision``.
        weights: a file of a timm model's; None: drawn in memory.
        depth: blocks of a timm model; None: as its name says.

    Raises:
        RequestError: a size that cannot be.
    """

    backbone: str = "timm:vit_small_patch14_dinov2"
    size: int = 224
    batch: int = 16
    images: int = 1000
    epochs: int = 100
    threads: int | None = None
    rounds: int = 5
    device: str = "cpu"
    frames: int | None = None
    precision: Precision = "fp32"
    weights: str | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "batch", "images", "epochs", "threads", "rounds", "frames"):
            require_least(name, getattr(self, name), 1, LEFT_OPEN.get(name) or getattr(CostSetting, name))
        if self.precision not in get_args(Precision):
            raise RequestError(
                f"precision is {self.precision!r}.{nearest(self.precision, get_args(Precision))} "
                "Type: --precision bf16"
            )
        require_device(self.device)

    @property
    def is_the_goals(self) -> bool:
        """Whether the goals are about it: they were set on a CPU, for the defaults."""
        return replace(self, rounds=CostSetting.rounds, threads=None) == CostSetting()

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch of the whole job."""
        return -(-self.images // self.batch)

    @property
    def pictures(self) -> int:
        """Images that the backbone sees a step."""
        return self.batch * (self.frames or 1)

    @property
    def model(self) -> str:
        """What timm calls it.

        Raises:
            RequestError: it is no model of timm.
        """
        kind, _, model = self.backbone.partition(":")
        if kind != "timm":
            raise RequestError(
                f"{self.backbone} cannot be streamed or cut, expected a model of timm. "
                "Type: --backbone timm:vit_base_patch16_224"
            )
        return model

    def build_backbone(self, *, streamed: bool = False) -> Backbone:
        """The backbone on its device; it reads the embedding and every block."""
        how: dict[str, Any] = {"size": self.size, "precision": self.precision}
        if self.backbone.startswith("timm"):
            if self.depth is not None:
                return self._shallow(how, streamed).to(self.device)
            how |= {"weights": self.weights or "random", "runtime": STREAMED if streamed else "eager"}
        return build_backbone(self.backbone, **how).to(self.device)

    def _shallow(self, how: dict[str, Any], streamed: bool) -> Backbone:
        """Its first blocks alone."""
        assert self.depth is not None
        if streamed:
            from sidetune.backbones.streamed import StreamedBackbone

            assert self.weights is not None, "drawn before"
            return StreamedBackbone(self.model, weights=self.weights, depth=self.depth, **how)
        from sidetune.bench.shallow import ShallowBackbone

        return ShallowBackbone(self.model, self.depth, **how)

    def to_json(self) -> dict[str, Any]:
        """Plain values by name; those that came later are left out where they are left alone."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER or value != getattr(CostSetting, name)
        }


@dataclass(frozen=True)
class CostCase:
    """What a case's name says.

    Args:
        name: itself.
        recipe: of the method; None: the backbone runs, and nothing trains.
        stored: whether features come from a store.
        streamed: whether the backbone's blocks stay on disk.
        members: that train in one model.
    """

    name: str
    recipe: Recipe | None = field(default=None, repr=False)
    stored: bool = False
    members: int = 1
    streamed: bool = False

    @property
    def keeps_taps(self) -> bool:
        """Whether the backbone runs for all of its taps, and nothing trains."""
        return self.recipe is None and self.name.startswith(FEATURES)

    @classmethod
    def parse(cls, name: str) -> CostCase:
        """Read a name.

        Raises:
            RequestError: no such method or suffix.
            RecipeError: the method has no such field.
        """
        method, *suffixes = name.split("-")
        if method in (FORWARD, FEATURES) and suffixes in ([], [STREAMED]):
            return cls(name, streamed=bool(suffixes))
        if method not in METHODS:
            raise RequestError(f"no case named {name!r}.{nearest(method, (FORWARD, FEATURES, *METHODS))}")
        parts: dict[str, dict[str, Any]] = {"side": {"name": method}, "train": {"epochs": 1}}
        how: dict[str, Any] = {}
        for suffix in suffixes:
            if suffix in FIELDS:
                part, key, value = FIELDS[suffix]
                parts[part][key] = value
            elif suffix in ("stored", STREAMED):
                how[suffix] = True
            elif found := re.fullmatch(r"m([1-9]\d*)", suffix):
                how["members"] = int(found[1])
            elif found := re.fullmatch(r"last([1-9]\d*)", suffix):
                parts["side"]["blocks"], how["stored"] = int(found[1]), True
            else:
                known = (*FIELDS, "stored", STREAMED, "m4", "last3")
                raise RequestError(f"case {name!r} ends in {suffix!r}.{nearest(suffix, known)}")
        if how.get(STREAMED) and (how.get("stored") or method in BASELINES):
            raise RequestError(
                f"case {name!r} is streamed, expected a side network that is live: a store needs no "
                f"backbone, and a baseline trains inside of it. Type: --cases losa-{STREAMED}, or with bench "
                "stream --side losa"
            )
        return cls(name, Recipe.build(parts), **how)


class Trial:
    """A case that is ready to run: the loop's own fleet, on features that a backbone or a store gives.

    Args:
        case: which.
        setting: sizes.
        store: of `write_small_store`; None where the case reads none.
    """

    def __init__(self, case: CostCase, setting: CostSetting, store: Store | None = None) -> None:
        self.case, self.setting = case, setting
        keyed = generator(SEED, "bench/images")
        self.images = torch.randn(setting.pictures, 3, setting.size, setting.size, generator=keyed)
        self.images = self.images.to(setting.device)
        self.backbone: Backbone | None = None
        if store is None or isinstance(case.recipe and case.recipe.side, BaselineRecipe):
            whole = setting.build_backbone(streamed=case.streamed)
            self.backbone = whole.reading(self._taps(whole.spec))
            if case.keeps_taps:
                self.backbone = self.backbone.giving(self.dtype)
        self.fleet = None if case.recipe is None else self._fleet(case.recipe, store)

    def run(self) -> int:
        """One round: how many steps it made."""
        if self.fleet is None:
            assert self.backbone is not None
            self.backbone(self.images)
            return 1
        self.fleet.train_epoch()
        return self.fleet.steps(self.setting.batch)

    def model(self) -> SideModel:
        """What trained, as it is saved."""
        assert self.fleet is not None
        return self.fleet.model(self.fleet.names[0])

    def seat(self) -> int:
        """Build the model and its optimiser: bytes of the model, which are no part of what training takes."""
        if self.fleet is None:
            return 0
        (bucket,) = self.fleet.buckets()
        return sum(one.nbytes for one in (*bucket.model.parameters(), *bucket.model.buffers()))

    def doubled_bytes(self) -> int:
        """Bytes of the backbone's own parameters that a baseline trains: nobody needs both."""
        if self.fleet is None:
            return 0
        (bucket,) = self.fleet.buckets()
        side = bucket.model.side
        return side.doubled_bytes() if isinstance(side, Baseline) else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the taps that a step holds: as in fit, that of features; a baseline goes on from its tap."""
        recipe = self.case.recipe or Recipe()
        return torch.float32 if isinstance(recipe.side, BaselineRecipe) else DTYPES[recipe.features.dtype]

    def tap_bytes(self) -> int:
        """Bytes of the taps that the method reads of a batch."""
        if self.fleet is None:
            return 0
        (bucket,) = self.fleet.buckets()
        return self.dtype.itemsize * self.setting.batch * bucket.model.side.spec.record_numel()

    def _taps(self, every: Spec) -> tuple[str, ...]:
        """What the backbone reads: no more than the method does."""
        if self.case.recipe is None:
            return every.names if self.case.keeps_taps else (every.blocks[-1].name,)
        side = self.case.recipe.side
        if isinstance(side, BaselineRecipe):
            return (BASELINES[side.name].first_tap(len(every.blocks), side),)
        return SIDES[side.name].reads(every).names

    def _fleet(self, recipe: Recipe, store: Store | None) -> Fleet:
        """Members that differ in their seeds, seated when they first run."""
        if store is None:
            assert self.backbone is not None
            data, norm = live(self.backbone, self.images, self.dtype, self.setting.frames), self.backbone.norm
        else:
            data, norm = stored(store, self.setting), store.final_norm

        def build(recipes: Sequence[Recipe], num_outputs: int) -> SideModel:
            model = build_model(
                recipes[0],
                data.spec,
                num_outputs,
                norm,
                drop_paths=[0.0] * len(recipes),
                backbone=self.backbone,
            )
            return model.to(self.setting.device)

        fleet = Fleet(data, build, NUM_CLASSES)
        task = Classify(tuple(map(str, range(NUM_CLASSES))), (1 / NUM_CLASSES,) * NUM_CLASSES)
        targets = torch.arange(int(data.rows.max()) + 1) % NUM_CLASSES
        train = trained_as(recipe, self.setting)
        members = []
        for seed in range(self.case.members):
            own = recipe.model_copy(update={"train": train.model_copy(update={"seed": seed})})
            members.append(Member(str(seed), own, task, targets, np.unique(data.rows)))
        fleet.add(members)
        return fleet


def trained_as(recipe: Recipe, setting: CostSetting) -> TrainRecipe:
    """How a case trains: batches of the setting; a baseline's blocks, which are the backbone's, as those.

    Raises:
        RequestError: a baseline in fp16, whose gradients would need a scale.
    """
    own: dict[str, Any] = {"batch_size": setting.batch, "order_seed": SEED}
    if isinstance(recipe.side, BaselineRecipe) and recipe.train.precision == "auto":
        if setting.precision == "fp16":
            raise RequestError(
                f"precision is fp16 and {recipe.side.name} a baseline, expected fp32 or bf16. "
                "Type: --precision bf16"
            )
        own["precision"] = setting.precision
    return recipe.train.model_copy(update=own)


def live(
    backbone: Backbone, images: torch.Tensor, dtype: torch.dtype, frames: int | None = None
) -> TrainingSet:
    """A batch that the backbone computes anew at every step; an epoch has one step.

    Args:
        backbone: that runs.
        images: of the batch, a clip's frames one after another.
        dtype: of its taps.
        frames: T of a clip; None: the samples are images.
    """
    giving, reading = backbone.giving(dtype), reading_of(frames)

    def inputs(rows: object, spec: Spec, draws: Draws) -> Features:
        with torch.no_grad():
            return reading.joined(giving(images).to(backbone.device, dtype).select(spec.names))

    rows = np.arange(len(images) // reading.together)
    return TrainingSet(inputs, _not_scored, rows, reading.spec(backbone.spec), ahead=0)


def stored(store: Store, setting: CostSetting) -> TrainingSet:
    """Batches of a store, read ahead; an epoch goes through it some times."""
    samples = dict.fromkeys(split_key(key)[0] for shard in store.plan.shards for key in shard)
    source = StoredSource(store, list(samples), reading=reading_of(setting.frames))

    def inputs(rows: Any, spec: Spec, draws: Draws) -> Features:  # noqa: ANN401 - row numbers
        return source.features(rows, spec)

    rows = np.tile(np.arange(STORE_BATCHES * setting.batch), STORE_PASSES)
    return TrainingSet(inputs, _not_scored, rows, source.spec, ahead=source.ahead)


def reading_of(frames: int | None) -> Reading:
    """What is stored and read of a sample: of a clip all of its T frames."""
    return Reading() if frames is None else Reading.of_clips(frames, frames, drawn=0)


def _not_scored(rows: object, spec: Spec, view: int) -> Any:  # noqa: ANN401 - never called
    raise AssertionError("a bench scores nothing")
