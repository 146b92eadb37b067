"""The recipe: everything that decides a run's result, in frozen models that refuse unknown keys.

A run is known by the sha256 of its recipe's canonical JSON without paths, devices and workers, never
by a parsed name. ``--set side.rank=16`` reaches any field. Each part's dials are documented where the
part is; defaults that depend on the data are None here and filled by `TrainRecipe.resolved`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from sidetune.backbones.base import Precision, Runtime, canonical_json
from sidetune.baselines import BASELINES, AnyBaselineRecipe
from sidetune.data.clips import SQUARES
from sidetune.data.dataset import TaskKind
from sidetune.data.reading import Reading
from sidetune.data.views import MOST_TILES, views
from sidetune.errors import RecipeError, nearest
from sidetune.model import NormKind
from sidetune.recipe_checks import check_clips, check_fleet, check_views, check_whole_clips
from sidetune.settings import complaint, not_a_setting, setting_value, shortened
from sidetune.sides import SIDES, AnySideRecipe
from sidetune.sides.losa import LosaRecipe
from sidetune.store import DTypeName

METHODS = {*SIDES, *BASELINES}

# where weights are is no part of what they are, and all forms and runtimes compute the same but for rounding
UNHASHED = {"backbone": ("weights", "runtime"), "side": ("form",)}

# settings that came after runs did: where they are left alone, a recipe's hash does not know them
LATER = {
    "data": ("focal_gamma", "split_by"),
    "backbone": ("pooled",),
    "features": ("tiles",),
    "clips": ("crops",),
    "head": ("ridge",),
    "train": ("shuffle_window", "order_seed", "total_decay"),
    "fleet": ("members", "folds", "ensemble", "own_order"),
    "side": ("statistics", "time"),
}

TASK_OPTIONS = {"class_weights", "label_smoothing", "focal_gamma"}  # fields of `DataRecipe` about the loss


class Part(BaseModel):
    """A frozen part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(Part):
    """Which targets are read and how samples without a split are split. See `load_dataset`.

    Args:
        task: what the targets are; ``--task``.
        labels: the label columns of a CSV; None: ``label``. ``--labels``.
        split_by: the class column of a CSV that drawn splits and folds are stratified by; None: the targets,
            or the first of several class columns.
        split_seed: draws the splits that the data does not have.
        val_fraction: share of the training samples that becomes validation where the data has none.
        test_fraction: the same for test; 0: none is drawn.
        class_weights: ``balanced`` weighs a sample by the rarity of its class in training.
        label_smoothing: share of the target spread over all classes in training.
        focal_gamma: of the focal loss, 2 in its paper; 0: plain cross-entropy. See `sidetune.focal`.
    """

    task: TaskKind = "classify"
    labels: tuple[str, ...] | None = None
    split_by: str | None = None
    split_seed: int = Field(0, ge=0)
    val_fraction: float = Field(0.2, gt=0, lt=1)
    test_fraction: float = Field(0.2, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    focal_gamma: float = Field(0.0, ge=0)

    @property
    def columns(self) -> tuple[str, ...]:
        """The class columns that have a network each; none where there is one network."""
        several = self.task == "classify" and self.labels is not None and len(self.labels) > 1
        return tuple(label.strip() for label in self.labels or ()) if several else ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_datasets`; the others are the task's."""
        return self.model_dump(exclude=TASK_OPTIONS)

    def task_options(self) -> dict[str, Any]:
        """Options of `build_task`."""
        return self.model_dump(include=TASK_OPTIONS)


class BackboneRecipe(Part):
    """Which backbone and how it is run. See `build_backbone`.

    Args:
        name: ``demo``, ``toy``, ``timm:MODEL`` or ``hf:MODEL``; ``--backbone``.
        size: side of the image in pixels; None: the backbone's own. ``--size``.
        taps: names of the taps to read; None: the embedding and every block.
        weights: a file, a folder, ``hub`` or ``random``; no part of the recipe's hash. ``--weights``.
        runtime: ``streamed`` leaves the blocks on disk and reads one after another; no part of the hash.
        precision: ``bf16`` runs the backbone under autocast.
        resize: ``squash`` keeps all of the image, ``crop`` its aspect ratio; None: squash.
        seed: of a random start.
        pooled: k: the mean of k x k neighbouring patch tokens in the place of each, and a store of about
            1/k² the bytes; None: every token.
    """

    name: str = "demo"
    size: int | None = Field(None, gt=0)
    taps: tuple[str, ...] | None = None
    weights: str | None = None
    runtime: Runtime = "eager"
    precision: Precision = "fp32"
    resize: Literal["squash", "crop"] | None = None
    seed: int | None = None
    pooled: int | None = Field(None, ge=2)

    @property
    def reads_clips(self) -> bool:
        """Whether it is named as one that reads a clip at once, of which no single frames are stored."""
        return self.name.partition(":")[0] == "hf"

    def arguments(self) -> dict[str, Any]:
        """Arguments of `build_backbone` that were asked for; every backbone runs eagerly."""
        return {name: value for name, value in self if name != "name" and value not in (None, "eager")}


class FeaturesRecipe(Part):
    """How features reach the side.

    Args:
        mode: ``stored`` runs the backbone once an image; ``live`` at every epoch.
        dtype: of features, stored or live.
        views: more views of each image: its mirror image, then seeded crops. Training draws one of
            them, or the image itself, at every step; each costs what an image costs to extract.
        flip: whether views may be mirrored. Off where left and right differ in meaning.
        tiles: of an axis: 2 cuts each image into 4 parts, which are views, too, seen at twice the
            resolution; for photographs far larger than the backbone's size whose details decide. 0: none.
        average_views: outputs for validation, test and predict are the mean over all views.
        tap_scale: ``rms`` brings every tap to the scale of the last, measured on the training split.
    """

    mode: Literal["stored", "live"] = "stored"
    dtype: DTypeName = "fp16"
    views: int = Field(0, ge=0)
    flip: bool = True
    tiles: int = Field(0, ge=0, le=MOST_TILES)
    average_views: bool = False
    tap_scale: Literal["rms", "none"] = "rms"


class ClipsRecipe(Part):
    """Samples that are clips. See `sidetune.data.reading`.

    Args:
        frames: T, frames of a clip that a network reads at once; None: the samples are images. ``--frames``.
        stored: frames of a clip that are stored, evenly spaced, T or more. ``--frames-stored``.
        drawn: samplings of T among the stored that training draws from; 0: what is scored alone.
        scored: evenly spaced samplings whose outputs are averaged for validation, test and predict.
        crops: 3 reads three squares along a picture's longer side instead of the whole picture; each is
            stored, training draws one, and outputs are averaged over the three.
    """

    frames: int | None = Field(None, ge=1)
    stored: int = Field(16, ge=1)
    drawn: int = Field(32, ge=0)
    scored: int = Field(1, ge=1)
    crops: Literal[1, 3] = 1


class HeadRecipe(Part):
    """The common norm before the head. See `sidetune.model`.

    Args:
        norm: layer norm with the affine of the backbone's final norm (``backbone``), with one that is
            trained and starts there (``trained``), or no norm at all (``none``).
        ridge: share of ridge in the answer, the rest is the network's; 0: the network alone; ``auto``: the
            share with the least loss on validation, or out of fold. See `sidetune.blend`.
    """

    norm: NormKind = "backbone"
    ridge: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = 0.0


class TrainRecipe(Part):
    """The one loop's dials.

    Args:
        epochs: None: clamp(30,000 / training images, 10, 100).
        batch_size: samples a step.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's, of matrices; norms, biases and vectors have none. None: about total_decay / (lr
            x steps), and 0.05 for `full`, whose matrices are the backbone's own.
        total_decay: over the whole training, whatever its length; see `Recipe.weight_decay`. Nothing where
            weight_decay is given.
        warmup: share of the steps in which the rate climbs from lr/100; then cosine to lr/1000.
        clip_norm: largest norm of a member's gradient; None: no clipping.
        select: which epoch is kept: the ``last``, or the ``best`` on validation.
        precision: ``auto`` is bf16 autocast on a GPU and fp32 on a CPU. The fast forms of ``losa`` and
            ``last`` stay in fp32: they are to be exact.
        seed: of start, order and drop-path.
        order_seed: of the batches' order and of views; None: the seed. Members of a fleet share one.
        shuffle_window: shards of the store that are shuffled together; None: all where half of the
            memory holds them, else as many as a quarter holds. See `sidetune.reader`. Nothing without a
            store.
    """

    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    total_decay: float = Field(2.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_norm: float | None = Field(1.0, gt=0)
    select: Literal["last", "best"] = "last"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    order_seed: int | None = None
    shuffle_window: int | None = Field(None, ge=1)

    def is_bf16(self, device: torch.device) -> bool:
        """Whether the side runs under bf16 autocast there."""
        return self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")

    def resolved(self, num_images: int) -> TrainRecipe:
        """The same with data-dependent defaults filled in."""
        if self.epochs is not None:
            return self
        # few images need many passes; 30,000 image visits are enough for any set that we measured
        return self.model_copy(update={"epochs": min(100, max(10, 30_000 // num_images))})


class FleetRecipe(Part):
    """Several side networks in one run. See `sidetune.members`.

    Args:
        members: what they differ in, as ``lr=1e-3,3e-3;seed=0,1``: every combination trains; ``--members``.
        folds: cross-validation over training and validation samples: how many folds, or ``column`` for
            those of the CSV, which are taken, too, where they are as many. A network a fold, and out-of-fold
            scores. ``--folds``.
        ensemble: choose members, greedily and with weights, whose joint answer is best on what they were
            not trained on; else the best one answers. ``--ensemble``.
        own_order: members of another seed read batches in another order; else in one, which is read once.
    """

    members: str | None = None
    folds: Annotated[int, Field(ge=2)] | Literal["column"] | None = None
    ensemble: bool = False
    own_order: bool = False


class Recipe(Part):
    """A whole run, but for where the data are and where the result goes."""

    data: DataRecipe = DataRecipe()
    backbone: BackboneRecipe = BackboneRecipe()
    features: FeaturesRecipe = FeaturesRecipe()
    clips: ClipsRecipe = ClipsRecipe()
    side: Annotated[AnySideRecipe | AnyBaselineRecipe, Discriminator("name")] = LosaRecipe()
    head: HeadRecipe = HeadRecipe()
    train: TrainRecipe = TrainRecipe()
    fleet: FleetRecipe = FleetRecipe()

    @property
    def sample(self) -> str:
        """What a sample is called: image or clip."""
        return "image" if self.clips.frames is None else "clip"

    def data_arguments(self) -> dict[str, Any]:
        """Arguments of `load_datasets`."""
        return {**self.data.arguments(), "clips": self.clips.frames is not None}

    def reading(self, frames: int | None = None) -> Reading:
        """What is stored of a sample, and what a network reads of it at once.

        Args:
            frames: of a clip that the backbone reads at once, as `Backbone.frames`.

        Raises:
            RecipeError: it reads other clips than are asked for.
        """
        clips, features = self.clips, self.features
        if frames is not None:
            check_whole_clips(clips, frames)
            return Reading.of_whole_clips(frames, clips.scored)
        if clips.frames is not None:
            squares = SQUARES if clips.crops == len(SQUARES) else (None,)
            return Reading.of_clips(
                clips.frames, clips.stored, drawn=clips.drawn, scored=clips.scored, squares=squares
            )
        shown = views(features.views, flip=features.flip, tiles=features.tiles)
        return Reading.of_images(shown, averaged=features.average_views)

    def weight_decay(self, steps: int) -> float:
        """AdamW's: what was given, else what adds up to the total decay over the whole training.

        At the peak rate all steps would shrink a matrix that nothing pulls at to exp(-total_decay); by the
        schedule it is about the root of that, 0.37. A fixed number, as the usual 0.05, does nothing in a few
        hundred steps, and networks learn few images by heart (docs/log.md). What counts is the decay's time
        in passes over the data (Wang & Aitchison, arXiv 2405.13698).

        Args:
            steps: of the whole training.
        """
        given = self.side.usual_decay if self.train.weight_decay is None else self.train.weight_decay
        return -math.expm1(-self.train.total_decay / steps) / self.train.lr if given is None else given

    @classmethod
    def build(cls, fields: dict[str, Any], settings: Sequence[str] = ()) -> Self:
        """A recipe from nested fields, then ``part.field=value`` settings.

        Raises:
            RecipeError: an unknown key (with the nearest name), or a value that does not fit.
        """
        for part, value in fields.items():
            if not isinstance(value, Mapping):
                raise RecipeError(
                    f"{part} is {shortened(value)}, expected settings. Type: --set side.rank=16"
                )
        fields = {key: dict(value) for key, value in fields.items()}
        for setting in settings:
            path, separator, text = setting.partition("=")
            part, dot, field = path.partition(".")
            if not separator or not dot:
                raise RecipeError(not_a_setting(setting, path, text, cls().model_dump()))
            fields.setdefault(part, {})[field] = setting_value(setting, text)
        name = fields.get("side", {}).setdefault("name", "losa") if "side" in fields else "losa"
        if not isinstance(name, str) or name not in METHODS:
            raise RecipeError(f"no side named {shortened(name)}.{nearest(str(name), SIDES)}")
        try:
            recipe = cls.model_validate(fields)
        except ValidationError as error:
            known = cls.model_validate({"side": {"name": name}}).model_dump()
            raise RecipeError(complaint(error, known, METHODS)) from None
        check_clips(recipe)
        check_views(recipe.features)
        own, total = recipe.train.weight_decay, recipe.train.total_decay
        if own is not None and total != TrainRecipe().total_decay:
            raise RecipeError(f"train.weight_decay is {own:g} and train.total_decay {total:g}. Leave one out")
        check_fleet(recipe)
        return recipe

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON without paths and forms: 64 hex digits. Equal recipes, equal runs.

        A setting that came later and is left to itself is left out: runs from before it keep their hash.
        """
        fields = self.model_dump(mode="json")
        for part, names in UNHASHED.items():
            for name in names:
                fields[part].pop(name, None)
        for part, later in LATER.items():
            own = getattr(self, part)
            known = type(own).model_fields  # one side has a setting, another has not
            for field in later:
                if field in known and getattr(own, field) == known[field].default:
                    fields[part].pop(field)
        if not fields["fleet"]:
            fields.pop("fleet")
        if self.clips == ClipsRecipe():
            fields.pop("clips")
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()
