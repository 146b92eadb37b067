"""The artifact: a trained side that can be moved, loaded and trusted.

    RUN/side.safetensors    side, norm and head
    RUN/artifact.json       the authority for loading, with the sha256 of the weights; written last, so
                            its presence means complete

`sidetune.predict` puts an artifact on its backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sidetune.backbones.base import Backbone, Identity, Variant
from sidetune.baselines import BASELINES
from sidetune.baselines.base import BaselineRecipe
from sidetune.errors import (
    ArtifactError,
    RequestError,
    SideError,
    first_complaint,
    nearest,
    nearest_path,
)
from sidetune.features import FinalNorm, Spec
from sidetune.files import read_json, sha256_file, write_json, write_tensors
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.sides import SIDES, SOLVED
from sidetune.tasks import Task

FORMAT = 2
ENSEMBLE_FORMAT = 3  # of a run that several members answer for: `sidetune.ensemble`
COLUMNS = "columns.json"  # names the runs of several label columns: `sidetune.columns`
AGAIN = "Type: the fit command with a new --out"
COPY = f"Copy the whole run folder again, or fit anew. {AGAIN}"


@dataclass(frozen=True)
class Artifact:
    """A trained side with everything needed to use it.

    Args:
        model: side, norm and head, in eval mode.
        recipe: with every choice filled in.
        task: what the outputs mean.
        spec: the taps the side reads.
        identity: of the backbone it was trained on.
        variant: how that backbone was run.
        norm_eps: epsilon of the backbone's final norm; None where it has none.
        check_values: mean and std a tap on the built-in image.
        temperature: that outputs are divided by before they are read as probabilities.
        data: fingerprint of what it was fitted on.
        scores: of the run, by split.
    """

    model: SideModel
    recipe: Recipe
    task: Task
    spec: Spec
    identity: Identity
    variant: Variant
    norm_eps: float | None
    check_values: dict[str, tuple[float, float]]
    temperature: float
    data: str
    scores: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write side.safetensors, then artifact.json."""
        tensors = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        weights = folder / "side.safetensors"
        write_tensors(weights, tensors)
        write_json(
            folder / "artifact.json",
            {
                "format": FORMAT,
                "sidetune": version("sidetune"),
                "recipe": self.recipe.model_dump(mode="json"),
                "task": self.task.to_json(),
                "spec": self.spec.to_json(),
                "identity": self.identity.to_json(),
                "variant": self.variant.to_json(),
                "norm_eps": self.norm_eps,
                "members": self.model.side.members,
                "weights": sha256_file(weights),
                "check_values": {name: list(pair) for name, pair in self.check_values.items()},
                "temperature": self.temperature,
                "data": self.data,
                "scores": self.scores,
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read an artifact without its backbone.

        Raises:
            ArtifactError: there is none, it is damaged, or it has another format version.
        """
        fields = read_fields(folder)
        if fields["format"] == ENSEMBLE_FORMAT:
            raise ArtifactError(
                f"{folder} holds an ensemble, expected one side. Type: sidetune predict {folder}, or the "
                f"path of one of its members, under {folder / 'members'}"
            )
        with refused(folder / "artifact.json"):
            spec = Spec.from_json(fields["spec"])
            recipe = Recipe.build(fields["recipe"])
            task = Task.from_json(fields["task"])
            rest = _Rest.model_validate(fields)
            if lacking := set(spec.names) - set(rest.check_values):
                raise ValueError(f"check_values lack {', '.join(sorted(lacking))}")
        tensors = _read_weights(folder / "side.safetensors", rest.weights)
        with refused(folder / "artifact.json"):
            norm = _stored_norm(tensors, rest.norm_eps)
            _check_shapes(recipe, spec, task.num_outputs, norm, tensors)
            model = build_model(recipe, spec, task.num_outputs, norm)
            model.load_state_dict(tensors)
        return cls(
            model.eval(),
            recipe,
            task,
            spec,
            rest.identity,
            rest.variant,
            rest.norm_eps,
            rest.check_values,
            rest.temperature,
            rest.data,
            rest.scores,
        )


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """What does not fit inside is damage.

    Raises:
        ArtifactError: in place of what came out of reading.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = first_complaint(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(
            f"{path} is damaged, or of another version of sidetune: {reason}. {AGAIN}"
        ) from error


class _Rest(BaseModel):
    """What artifact.json holds beside recipe, task and spec."""

    weights: str
    identity: Identity
    variant: Variant
    norm_eps: FiniteFloat | None
    check_values: dict[str, tuple[FiniteFloat, FiniteFloat]]
    temperature: FiniteFloat = Field(gt=0)
    data: str
    scores: dict[str, Any]


def build_model(
    recipe: Recipe,
    spec: Spec,
    num_outputs: int,
    final_norm: FinalNorm | None,
    *,
    drop_paths: Sequence[float] | None = None,
    backbone: Backbone | None = None,
) -> SideModel:
    """The model that a recipe describes, its parameters not yet drawn or loaded.

    Args:
        recipe: of side and head.
        spec: taps that there are.
        num_outputs: K.
        final_norm: the backbone's.
        drop_paths: one a member; None: one member, with the recipe's.
        backbone: whose blocks a baseline runs; sides need none.

    Raises:
        SideError: the side cannot read these taps, or pools in a way that no task reads.
        BackboneError: a baseline is asked for, and the backbone cannot be taken apart.
    """
    if isinstance(recipe.side, BaselineRecipe):
        assert backbone is not None, "a baseline is built around a backbone"
        if recipe.head.ridge:
            raise SideError(
                f"head.ridge is {recipe.head.ridge} and {recipe.side.name} is a baseline: ridge shares "
                "in what side networks answer. Type: --set head.ridge=0"
            )
        baseline = BASELINES[recipe.side.name](spec, backbone.stages(), recipe.side)
        return SideModel(baseline, num_outputs, norm=recipe.head.norm, final_norm=final_norm)
    arguments = recipe.side.arguments()
    if recipe.side.name in SOLVED:
        arguments.pop("l2")  # a choice of the solver, not of the module
    if arguments.get("pool") == "best":
        arguments["pool"] = "mean"  # every backbone has it; validation has not chosen yet
    if arguments.get("pool") == "tokens":
        raise SideError(
            "side.pool is 'tokens', and every task reads pooled tokens. Type: --set side.pool=mean"
        )
    kind = SIDES[recipe.side.name]
    if drop_paths is not None and "drop_path" in arguments:
        arguments["drop_path"] = drop_paths
    members = 1 if drop_paths is None else len(drop_paths)
    side = kind(kind.reads(spec), members=members, **arguments)
    norm = "none" if recipe.side.name == "ridge" else recipe.head.norm
    if recipe.side.name == "linear" and norm == "trained":
        norm = "backbone"
    return SideModel(side, num_outputs, norm=norm, final_norm=final_norm, ridge=recipe.head.ridge != 0)


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        RequestError: an unknown device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        meant = " Did you mean 'cuda'?" if kind == "gpu" else ""  # whose letters are nearer to cpu
        known = nearest("" if meant else name, ("auto", "cpu", "cuda", "cuda:0"))
        raise RequestError(f"no device named {name!r}.{meant}{known}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"got device {name!r}, and PyTorch finds {torch.cuda.device_count()} GPUs here. "
            "Type: --device auto"
        )
    return torch.device(name)


def not_a_run(folder: Path) -> str:
    """What to say of a folder without artifact.json: a fit was interrupted there, or there is no run."""
    if (folder / COLUMNS).exists():
        return f"{folder} holds a run a label column, in folders of their own. Type: the path of one of these"
    said = f"{folder} is not a finished run: it has no artifact.json."
    if (folder / "recipe.json").exists():
        return (
            f"{said} A fit was begun there and not ended. Type: the same fit command again: it resumes. "
            "If the folder was copied, copy all of it"
        )
    hint = "" if folder.exists() else nearest_path(folder)
    return f"{said}{hint} Type: sidetune fit DATA --out {folder}, or the path of a finished run"


def read_fields(folder: Path) -> dict[str, Any]:
    """What a run's artifact.json holds.

    Raises:
        ArtifactError: there is none, it is damaged, or of a version that is not read here.
    """
    path = folder / "artifact.json"
    if not path.exists():
        raise ArtifactError(not_a_run(folder))
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. {AGAIN}") from error
    value = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
    if not isinstance(fields, dict) or not isinstance(value, int) or value not in (FORMAT, ENSEMBLE_FORMAT):
        newer = isinstance(value, int) and value > ENSEMBLE_FORMAT
        remedy = "Type: pip install -U sidetune" if newer else AGAIN
        raise ArtifactError(
            f"{path} has format {repr(value)[:40]}, expected {FORMAT} or {ENSEMBLE_FORMAT}. {remedy}"
        )
    return fields


def _read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.exists():
        raise ArtifactError(f"{path} is missing, expected the side's weights. {COPY}")
    found = sha256_file(path)
    if found != expected:
        raise ArtifactError(
            f"{path} is damaged or was exchanged: its sha256 starts with {found[:12]}, expected "
            f"{expected[:12]}. {COPY}"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}. {COPY}") from error


def _check_shapes(
    recipe: Recipe, spec: Spec, num_outputs: int, norm: FinalNorm | None, tensors: dict[str, Tensor]
) -> None:
    """Weights of other shapes are refused before memory is taken for the model that is described."""
    with torch.device("meta"):
        model = build_model(recipe, spec, num_outputs, norm)
    for name, tensor in model.state_dict().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            raise ValueError(f"side.safetensors has {got} for {name!r}, expected {tuple(tensor.shape)}")


def _stored_norm(tensors: dict[str, Tensor], eps: float | None) -> FinalNorm | None:
    """A norm of the right shape for the model to load into."""
    if eps is None:
        return None
    width = tensors["norm.weight"].shape[-1] if "norm.weight" in tensors else 1
    return FinalNorm(torch.ones(width), torch.zeros(width), eps)
