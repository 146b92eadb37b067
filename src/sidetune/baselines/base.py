"""What every baseline is: the rest of a backbone behind one tap, with something trained in it.

Gradients cross the backbone here, which is what side networks are built to avoid. To the loop a baseline is
a side of one member that reads one tap, so features, batches, optimiser and scores are those of all others:

    ``embedding``   all blocks run here, their input comes live or from a store
    ``block.k``     the last L - k blocks run here, on a stored prefix
    ``image``       the embedding runs here, too

A clip's frames run as images and come together again where they are pooled.

The backbone's modules are never touched. The baseline runs copies of them that share its tensors; what is
trained stands beside them, with a member axis, and is put into the copies for each step: to take it away is
to forget the copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sidetune.backbones.base import Stages, shared_copy
from sidetune.errors import SideError
from sidetune.features import Features, Spec
from sidetune.keyed import Draws, generator
from sidetune.sides.base import Side, SideRecipe


class BaselineRecipe(SideRecipe):
    """What every baseline's recipe shares.

    Args:
        pool: as of a side.
        checkpointing: keep the input of each block only and run it again for backward: less memory, more
            time.
        compiled: blocks by torch.compile.
    """

    pool: Literal["mean", "cls", "cls+mean", "all"] = "mean"
    checkpointing: bool = False
    compiled: bool = False


AnyRecipe = TypeVar("AnyRecipe", bound=BaselineRecipe)


@dataclass(frozen=True)
class Stage:
    """A changed copy of one module of the backbone.

    Args:
        module: shares the backbone's tensors, and has none where something is trained.
        places: of what is trained: submodule and attribute.
        keys: the same in `Baseline.trained`.
        call: the module, compiled if asked for: tokens or images -> tokens.
    """

    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    keys: tuple[str, ...]
    call: Callable[[Tensor], Tensor]


class Baseline(Side, Generic[AnyRecipe]):
    """The rest of a backbone behind one tap.

    Args:
        spec: taps that there are.
        stages: the backbone, taken apart.
        recipe: the method's dials.

    Raises:
        SideError: the tap that it begins at is not among the features.
    """

    def __init__(self, spec: Spec, stages: Stages, recipe: AnyRecipe) -> None:
        reads = self.first_tap(len(stages.blocks), recipe)
        if reads not in spec.names:
            raise SideError(
                f"this baseline reads the tap {reads!r} and got {', '.join(spec.names)}. "
                f"Type: --set backbone.taps=[{reads}]"
            )
        own, last = spec.select([reads]), Spec((stages.tap,))
        frames, rest = divmod(own.last.grid[0], stages.tap.grid[0])
        if rest or not frames:
            raise SideError(
                f"the tap {reads!r} has {own.last.grid[0]} steps of time and the backbone's blocks give "
                f"{stages.tap.grid[0]} a picture, expected a multiple. Type: --frames 8"
            )
        out = last if frames == 1 else last.of_clips(frames)
        super().__init__(own, pool=recipe.pool, out=out.last)
        self.recipe, self.frames = recipe, frames
        self.trained = nn.ParameterDict()
        self._frozen: dict[str, Tensor] = {}  # the starts of those that are the backbone's own
        self.stages = [self._stage(name, module) for name, module in _behind(reads, stages).items()]

    @staticmethod
    def first_tap(num_blocks: int, recipe: AnyRecipe) -> str:
        """The tap that it reads, of a backbone of L blocks."""
        return "embedding"

    def _stage(self, where: str, module: nn.Module) -> Stage:
        own = {id(parameter) for parameter in module.parameters()}
        changed = self.changed(shared_copy(module)).eval()
        places, keys = [], []
        for name, parameter in list(changed.named_parameters()):
            if id(parameter) in own and not self.is_trained(changed, name):
                continue
            key = f"{where}.{name}".replace(".", "/")  # a dot separates modules
            self.trained[key] = nn.Parameter(torch.empty((1, *parameter.shape)))
            if id(parameter) in own:
                self._frozen[key] = parameter
            parent, _, attribute = name.rpartition(".")
            place = changed.get_submodule(parent)
            delattr(place, attribute)
            places.append((place, attribute))
            keys.append(key)
        call = torch.compile(changed) if self.recipe.compiled else changed
        return Stage(changed, tuple(places), tuple(keys), call)

    def changed(self, module: nn.Module) -> nn.Module:
        """Put something new into a copy of one of the backbone's modules."""
        return module

    def is_trained(self, module: nn.Module, name: str) -> bool:
        """Whether one of the backbone's own parameters is trained; what is new always is."""
        return False

    def drawn(self, key: str, shape: torch.Size, keyed: torch.Generator) -> Tensor:
        """The starting value of a new parameter; the backbone's own start as they are."""
        raise NotImplementedError

    def start(self, seeds: Sequence[int | None]) -> None:
        """See `Side.start`."""
        (seed,) = seeds
        if seed is None:
            return
        keyed = generator(seed, "start")
        with torch.no_grad():
            for key, parameter in self.trained.items():
                own = self._frozen.get(key)
                parameter[0] = self.drawn(key, parameter.shape[1:], keyed) if own is None else own

    def doubled_bytes(self) -> int:
        """Bytes of the backbone's own parameters that are trained here, and so are there twice."""
        return sum(start.nbytes for start in self._frozen.values())

    def frozen(self) -> Iterator[Tensor]:
        """See `Side.frozen`."""
        for stage in self.stages:
            yield from stage.module.parameters()
            yield from stage.module.buffers()

    def tokens(self, features: Features, draws: Draws | None = None) -> Tensor:
        """The last block's output: (1, B, N, D); of clips the tokens of all frames."""
        tap = self.spec.last
        tokens = features[tap.name].to(self.tap_scale.dtype)
        if self.frames > 1:
            tokens = tokens.unflatten(1, (self.frames, -1)).flatten(0, 1)
        if tap.kind == "image":
            tokens = tokens.transpose(1, 2).unflatten(2, tap.grid[1:])
        for stage in self.stages:
            self.give(stage)
            if self.recipe.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(_run, stage, tokens, use_reentrant=False)
            else:
                tokens = _run(stage, tokens)
        if self.frames > 1:
            tokens = tokens.unflatten(0, (-1, self.frames)).flatten(1, 2)
        return tokens[None]

    def give(self, stage: Stage) -> None:
        """Put what is trained where the copied module reads it, as views that gradients come through."""
        for (place, attribute), key in zip(stage.places, stage.keys, strict=True):
            place.__dict__[attribute] = self.trained[key][0]


def _run(stage: Stage, tokens: Tensor) -> Tensor:
    """A stage, with the kernel that its attention is quickest with.

    On a CPU in bf16 the backward of PyTorch's flash kernel takes several times what plain products take: with
    65 tokens a third of LoRA's whole step. With 257 tokens, and in fp32, the two are even.
    """
    if tokens.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with sdpa_kernel(SDPBackend.MATH):
            return stage.call(tokens)
    return stage.call(tokens)


def _behind(reads: str, stages: Stages) -> dict[str, nn.Module]:
    """The backbone's modules behind a tap, in running order."""
    blocks = {f"blocks.{number}": block for number, block in enumerate(stages.blocks, start=1)}
    if reads == "image":
        return {"embed": stages.embed} | blocks
    first = 0 if reads == "embedding" else int(reads.removeprefix("block."))
    return dict(list(blocks.items())[first:])


def kaiming(shape: torch.Size, keyed: torch.Generator) -> Tensor:
    """Uniform within 1/sqrt(fan in), as torch starts its linear layers."""
    return (2 * torch.rand(shape, generator=keyed) - 1) / math.sqrt(shape[-1])
