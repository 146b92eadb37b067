"""The one loop: one member or many, sides or baselines.

It sees ``model(inputs, draws) -> (M, B, K)``. Members never mix: each has its own loss, its own
gradient norm and its own slice of every parameter. All randomness is keyed by (seed, purpose, epoch,
step), so a checkpoint holds no generator state and a resumed run ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sidetune.checkpoint import Epoch, Scores, State, load_checkpoint, save_checkpoint
from sidetune.errors import DivergedError
from sidetune.features import Features
from sidetune.keyed import Draws
from sidetune.model import SideModel
from sidetune.progress import Progress
from sidetune.reader import AHEAD, Ahead, EpochOrder, Layout, pinned, sent
from sidetune.recipe import TrainRecipe
from sidetune.sides.chunks import threads_to_chunks
from sidetune.tasks import Task

CHECKPOINT_SECONDS = 20.0  # at most this much training is lost to a kill


class Inputs(Protocol):
    """Gives a batch of what the model reads: `Features` for sides."""

    def __call__(self, rows: Sequence[int], draws: Draws) -> Features:
        """Inputs of these rows, in this order; `draws` chooses among views of them."""


@dataclass(frozen=True)
class TrainingSet:
    """What the loop trains on.

    Args:
        inputs: rows and the step's draws -> a batch of inputs.
        targets: of every row that `rows` names, as the task takes them.
        rows: (n,) rows to train on.
        layout: where they are read; None: their order makes no difference.
        window: shards of the layout that are shuffled together; None: all.
        ahead: batches that `inputs` prepares on another thread while one is used, in the steps' order.
    """

    inputs: Inputs
    targets: Tensor
    rows: NDArray[np.int64]
    layout: Layout | None = None
    window: int | None = None
    ahead: int = AHEAD


@dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Args:
        history: one `Epoch` an epoch.
        dropped: members whose loss was not finite; their weights are of no use.
        window: shards that were shuffled together: the checkpoint's where training went on from one.
    """

    history: list[Epoch]
    dropped: tuple[int, ...]
    window: int | None


@dataclass(frozen=True)
class Batch:
    """One step's inputs.

    Args:
        rows: (B,) of the data.
        draws: of the step.
        inputs: of these rows.
    """

    rows: NDArray[np.int64]
    draws: Draws
    inputs: Features


def train(  # noqa: PLR0913 - the loop is the meeting place of all parts
    model: nn.Module,
    data: TrainingSet,
    task: Task,
    recipe: TrainRecipe,
    *,
    seeds: Sequence[int],
    validate: Callable[[nn.Module], Sequence[Scores]],
    checkpoint: Path | None = None,
    run_hash: str = "",
    quiet: bool = False,
) -> Trained:
    """Train every member of a model in place.

    Args:
        model: (inputs, draws) -> (M, B, K); started, on its device.
        data: inputs, targets, rows.
        task: its loss; its headline score decides ``select: best``.
        recipe: resolved.
        seeds: one a member. The first also orders the batches.
        validate: called after every epoch; scores, one dict a member.
        checkpoint: file to resume from and to write to; None: neither.
        run_hash: what the checkpoint must belong to.
        quiet: no progress.

    Returns:
        The history and the members that were dropped.

    Raises:
        DivergedError: no member's loss is finite any more.
        ArtifactError: the checkpoint belongs to another run.
    """
    assert recipe.epochs is not None, "resolve the recipe first"
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, recipe)
    state = State(
        loss_sum=torch.zeros(len(seeds), dtype=torch.float64),
        alive=torch.ones(len(seeds)).bool(),
        window=data.window,
    )
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, run_hash, model, optimizer, state)
    steps = math.ceil(len(data.rows) / recipe.batch_size)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_is_bf16(recipe, device))
    saved = time.monotonic()
    with Progress("train", recipe.epochs * steps, "steps", done=_done(state, steps), quiet=quiet) as progress:
        while state.epoch < recipe.epochs:
            started = time.monotonic() - state.seconds
            model.train()
            with _batches(data, recipe, seeds, state, device) as batches:
                for batch in batches:
                    lr = learning_rate(_done(state, steps), recipe.epochs * steps, recipe)
                    inputs, targets = sent(batch.inputs, device), data.targets[batch.rows].to(device)
                    with step_threads(model):
                        with autocast:
                            loss = task.loss(model(inputs, batch.draws), targets).mean(1)
                        _drop_members(loss, state)
                        take_step(model, optimizer, loss, state.alive, lr, recipe.clip_norm)
                    state.loss_sum += loss.detach().double().cpu() * len(batch.rows)
                    state.step += 1
                    progress.advance(1, _note(state, len(data.rows), steps, recipe, task))
                    if checkpoint is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                        state.seconds = time.monotonic() - started
                        save_checkpoint(checkpoint, run_hash, model, optimizer, state)
                        saved = time.monotonic()
            model.eval()
            lr = learning_rate(_done(state, steps) - 1, recipe.epochs * steps, recipe)
            _end_epoch(state, validate(model), lr, len(data.rows), time.monotonic() - started)
            _keep_best(model, state, task, recipe)
    if recipe.select == "best":
        model.load_state_dict(state.best_weights)
    return Trained(state.history, tuple((~state.alive).nonzero().flatten().tolist()), state.window)


def _batches(
    data: TrainingSet, recipe: TrainRecipe, seeds: Sequence[int], state: State, device: torch.device
) -> Ahead[int, Batch]:
    """The rest of an epoch. Its order hangs on seed, epoch and window alone: a resumed one has the same."""
    layout = data.layout
    shards = np.zeros(len(data.rows), np.int64) if layout is None else layout.shards
    order = EpochOrder.draw(data.rows, shards, state.window, seed=seeds[0], epoch=state.epoch)
    size, epoch, begin = recipe.batch_size, state.epoch, state.step

    def make(step: int) -> Batch:
        if layout is not None and order.shards:
            layout.fetch(order.soon(step * size, (step + 1) * size, begins=step == begin))
        rows, draws = order.rows[step * size : (step + 1) * size], Draws(seeds, epoch, step)
        inputs = data.inputs(rows.tolist(), draws)
        # what is on the GPU already comes from a backbone that runs there
        pin = device.type == "cuda" and inputs.layers[0].device.type == "cpu"
        return Batch(rows, draws, pinned(inputs) if pin else inputs)

    return Ahead(range(begin, math.ceil(len(order.rows) / size)), make, ahead=data.ahead)


def learning_rate(step: int, total: int, recipe: TrainRecipe) -> float:
    """Linear from lr/100 over the warm-up's steps, then cosine to lr/1000 at the last step."""
    warm = round(recipe.warmup * total)
    if step < warm:
        return recipe.lr * (0.01 + 0.99 * step / warm)
    through = (step - warm) / max(total - 1 - warm, 1)
    return recipe.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(through, 1.0))))


def _is_bf16(recipe: TrainRecipe, device: torch.device) -> bool:
    return recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")


def make_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms, biases and vectors (one axis beside the member axis) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 2]
    vectors = [parameter for parameter in trained if parameter.ndim <= 2]
    assert len(matrices) + len(vectors) == len(trained) > 0
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def step_threads(model: nn.Module) -> AbstractContextManager[None]:
    """The threads of a step: on the CPU a side that works in chunks gets them all."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return threads_to_chunks(when=on_cpu and isinstance(model, SideModel) and model.side.form == "fast")


def _drop_members(loss: Tensor, state: State) -> None:
    """A member whose loss is not finite takes no further part.

    Raises:
        DivergedError: none is left.
    """
    state.alive &= torch.isfinite(loss.detach()).cpu()
    if not state.alive.any():
        raise DivergedError(
            f"the loss is {loss.detach().tolist()} at epoch {state.epoch}, step {state.step}: every member "
            "diverged. Type: --set train.lr=3e-4"
        )


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    alive: Tensor,
    lr: float,
    clip: float | None,
) -> None:
    """One update. The sum of the members' losses has each member's own gradient in its own slice.

    Args:
        model: whose parameters are updated.
        optimizer: of `make_optimizer`.
        loss: (M,), with its graph.
        alive: (M,) bool; the others' gradients are zero.
        lr: of this step.
        clip: largest norm of a member's gradient; None: any.
    """
    optimizer.zero_grad()
    loss.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    dead = (~alive).nonzero().flatten().tolist()
    for gradient in gradients if dead else ():
        gradient[dead] = 0.0
    if clip is not None:
        _clip_members(gradients, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def _clip_members(gradients: Sequence[Tensor], clip: float) -> None:
    """Scale each member's gradient to norm `clip` at most, over all its parameters together."""
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)  # (M,)
    scale = (clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def _end_epoch(state: State, val: Sequence[Scores], lr: float, num_rows: int, seconds: float) -> None:
    loss = tuple((state.loss_sum / num_rows).tolist())
    state.history.append(Epoch(state.epoch, loss, lr, tuple(val), seconds))
    state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
    state.loss_sum = torch.zeros_like(state.loss_sum)


def _keep_best(model: nn.Module, state: State, task: Task, recipe: TrainRecipe) -> None:
    """Remember the weights of the best epoch on validation (of the members' mean headline score)."""
    if recipe.select != "best":
        return
    val = state.history[-1].val
    scores = [score for member in val if (score := member.get(task.headline)) is not None]
    mean = sum(scores) / len(scores) if scores else -math.inf
    if mean > state.best or not scores:  # where the score is not defined, the last epoch is kept
        state.best = mean
        state.best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _done(state: State, steps: int) -> int:
    return state.epoch * steps + state.step


def _note(state: State, num_rows: int, steps: int, recipe: TrainRecipe, task: Task) -> str:
    seen = min(state.step * recipe.batch_size, num_rows)
    text = f"epoch {state.epoch + 1}/{recipe.epochs} loss {state.loss_sum.nanmean().item() / seen:.3f}"
    if state.history and (score := state.history[-1].val[0].get(task.headline)) is not None:
        text += f" val {score:.3f}"
    return text
