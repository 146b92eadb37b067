from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from sidetune import build_backbone, load_dataset, probes
from sidetune.calibration import fit_temperature
from sidetune.data import load_image
from sidetune.evaluate import headline_score
from sidetune.features import FinalNorm
from sidetune.keyed import generator
from sidetune.probes import Pooled, fit_linear, fit_ridge, headline
from sidetune.sides.linear import PENALTIES, LinearRecipe
from sidetune.sides.ridge import RidgeRecipe, beyond_summary
from sidetune.summary import summarise
from sidetune.tasks import MultiLabel, build_task


@pytest.fixture(scope="module")
def problem(image_folder):
    """Features, pooled features and the task of the shared images."""
    backbone, dataset = build_backbone("toy"), load_dataset(image_folder)
    images = [load_image(dataset.file(row), backbone.preprocess) for row in range(len(dataset))]
    features = backbone(torch.stack(images))
    targets = torch.from_numpy(dataset.targets)
    data = Pooled(summarise(features), targets, dataset.rows("train"), dataset.rows("val"))
    return backbone, features, data, build_task("classify", dataset, data.train)


def normed(problem, pool="mean"):
    backbone, _, data, _ = problem
    pooled = data.summary.pooled("block.4", pool)
    norm = backbone.norm
    return torch.nn.functional.layer_norm(pooled, (32,), norm.weight, norm.bias, norm.eps).double().numpy()


@pytest.mark.parametrize("taps", ["all", "last", ("block.1", "block.3")])
def test_ridge_from_the_summary_is_ridge_on_the_features(problem, taps):
    _, features, data, task = problem
    probe = fit_ridge(RidgeRecipe(taps=taps), data, task)
    rows = np.arange(60)
    with torch.no_grad():
        torch.testing.assert_close(probe.model(features)[0], probe.outputs(data.summary, rows))
    assert probe.detail["taps"] == {"all": 5, "last": 1}.get(taps, 2)
    assert probe.recipe == RidgeRecipe(taps=taps, l2=probe.detail["l2"])


@pytest.mark.parametrize("statistics", ["cls+mean+std", "cls+mean+quadrants"])
def test_ridge_with_more_statistics_from_the_summary_is_ridge_on_the_features(problem, statistics):
    _, features, data, task = problem
    recipe = RidgeRecipe(statistics=statistics)
    richer = replace(data, summary=summarise(features, beyond_summary(recipe)))
    probe = fit_ridge(recipe, richer, task)
    with torch.no_grad():
        torch.testing.assert_close(probe.model(features)[0], probe.outputs(richer.summary, np.arange(60)))


def test_ridge_is_scikit_learns(problem):
    _, _, data, task = problem
    probe = fit_ridge(RidgeRecipe(l2=0.01), data, task)
    x = probe.model.side.standardised(data.summary).double().numpy()
    y = np.eye(3)[data.targets.numpy()]
    oracle = Ridge(alpha=0.01).fit(x[data.train], y[data.train])
    outputs = probe.outputs(data.summary, np.arange(60)) / probe.detail["sharpness"]
    np.testing.assert_allclose(outputs, oracle.predict(x), atol=2e-5)
    assert probe.detail["l2"] == 0.01


def test_ridges_probabilities_have_the_least_loss_of_left_out_fits(problem):
    _, _, data, task = problem
    target = data.targets[data.train]
    keyed = generator(0, "left out")
    left_out = torch.nn.functional.one_hot(target, 3) + 0.7 * torch.randn(len(target), 3, generator=keyed)
    found = 1 / fit_temperature(task, left_out, target, prior_std=None)
    losses = {
        factor: task.loss((factor * left_out)[None], target).mean()
        for factor in (found, found / 1.2, found * 1.2)
    }
    assert min(losses, key=losses.__getitem__) == found
    assert losses[found] < task.loss(left_out[None], target).mean()


def test_ridge_does_not_look_at_validation(problem):
    _, _, data, task = problem
    swapped = Pooled(data.summary, data.targets, data.train, data.val[:1])
    wrong = data.targets.clone()
    wrong[data.val] = 0
    ours, theirs = (
        fit_ridge(RidgeRecipe(), other, task)
        for other in (swapped, Pooled(data.summary, wrong, data.train, data.val))
    )
    assert ours.recipe == theirs.recipe
    torch.testing.assert_close(ours.model.head.weight_MDK, theirs.model.head.weight_MDK, rtol=0, atol=0)


def test_ridge_leaves_out_whole_groups(problem):
    _, _, data, task = problem
    twins = np.repeat(data.train[:18], 2)  # every sample twice: leaving out one of two copies tells nothing
    pairs = np.full(60, "alone", dtype="<U8")
    pairs[data.train] = [f"pair {row}" for row in data.train]
    alone = Pooled(data.summary, data.targets, twins, data.val)
    paired = Pooled(data.summary, data.targets, twins, data.val, pairs)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 60))  # nothing can be learned
    guessed = [
        fit_ridge(RidgeRecipe(l2=1e-5), Pooled(one.summary, noise, one.train, one.val, one.groups), task)
        for one in (alone, paired)
    ]
    seen, unseen = (probe.detail["left_out"] for probe in guessed)
    assert seen > 0.9
    assert unseen < 0.7


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_the_linear_probe_from_the_summary_is_the_one_on_the_features(problem, pool):
    backbone, features, data, task = problem
    recipe = LinearRecipe(pool=pool, l2=1e-2)
    probe = fit_linear(recipe, data, task, norm="backbone", final_norm=backbone.norm)
    with torch.no_grad():
        torch.testing.assert_close(probe.model(features)[0], probe.outputs(data.summary, np.arange(60)))
    assert probe.recipe == recipe
    assert (probe.detail["pool"], probe.detail["l2"]) == (pool, 1e-2)
    assert probe.detail["gradient"] <= 1e-5


def test_the_linear_probe_is_scikit_learns(problem):
    backbone, _, data, task = problem
    l2 = 1e-2
    recipe = LinearRecipe(pool="mean", l2=l2)
    probe = fit_linear(recipe, data, task, norm="backbone", final_norm=backbone.norm)
    x = normed(problem)
    x = (x - x[data.train].mean(0)) / x[data.train].std(0)
    oracle = LogisticRegression(C=1 / (l2 * len(data.train)), tol=1e-10, max_iter=10_000)
    oracle.fit(x[data.train], data.targets[data.train])
    ours = task.predictions(probe.outputs(data.summary, data.val))
    np.testing.assert_allclose(ours, oracle.predict_proba(x[data.val]), atol=1e-4)


def test_validation_chooses_pool_and_penalty(problem):
    backbone, _, data, task = problem
    best = fit_linear(LinearRecipe(), data, task, norm="backbone", final_norm=backbone.norm)
    assert best.recipe.pool in ("cls", "mean", "cls+mean")
    assert best.recipe.l2 in PENALTIES

    def on_validation(probe):
        output, target = probe.outputs(data.summary, data.val).double(), data.targets[data.val]
        return headline(task, output, target), -task.loss(output[None], target).mean().item()

    chosen = on_validation(best)
    for pool in ("cls", "mean", "cls+mean"):
        one = fit_linear(LinearRecipe(pool=pool), data, task, norm="backbone", final_norm=backbone.norm)
        score, loss = on_validation(one)
        assert chosen >= (score, loss - 1e-4)


def test_a_backbone_without_class_token_has_the_mean_alone(problem):
    _, _, data, task = problem
    spec = type(data.summary.spec)(
        tuple(type(tap)(tap.name, tap.kind, 32, (1, 4, 4)) for tap in data.summary.spec.taps)
    )
    empty = tuple(torch.zeros(60, 0) for _ in spec.taps)
    summary = type(data.summary)(spec, data.summary.mean, empty, data.summary.mean_square)
    bare = Pooled(summary, data.targets, data.train, data.val)
    probe = fit_linear(LinearRecipe(), bare, task, norm="backbone", final_norm=None)
    assert probe.recipe.pool == "mean"
    assert fit_ridge(RidgeRecipe(), bare, task).model.side.width == 5 * 32


def test_a_trained_norm_is_the_backbones_own_in_a_probe(problem):
    backbone, _, data, task = problem
    recipe = LinearRecipe(pool="mean", l2=1e-2)
    weight = torch.linspace(0.5, 2, 32)
    norm = FinalNorm(weight, torch.ones(32), backbone.norm.eps)
    trained, copied = (
        fit_linear(recipe, data, task, norm=kind, final_norm=norm).model for kind in ("trained", "backbone")
    )
    assert not list(trained.norm.parameters())
    torch.testing.assert_close(trained.norm.weight, copied.norm.weight)
    torch.testing.assert_close(trained.head.weight_MDK, copied.head.weight_MDK)


def test_a_headline_that_is_not_defined_is_the_worst(problem):
    _, _, _, task = problem
    assert headline(task, torch.eye(3)[:2] * 9, torch.tensor([0, 1])) == 1
    labels = MultiLabel(("a",), (0.5,))
    assert headline(labels, torch.zeros(2, 1), torch.ones(2, 1)) == -np.inf


def test_a_focal_loss_is_not_what_probes_are_solved_for(problem):
    """It has no single minimum: both say so, and are what they are without it."""
    _, _, data, task = problem
    focused = replace(task, focal_gamma=2.0)
    for fitted in (
        lambda task: fit_ridge(RidgeRecipe(l2=1.0), data, task),
        lambda task: fit_linear(LinearRecipe(l2=0.1), data, task, norm="none", final_norm=None),
    ):
        plain, other = fitted(task), fitted(focused)
        assert torch.equal(plain.model.head.weight_MDK, other.model.head.weight_MDK)
        assert other.detail == {**plain.detail, "focal_gamma": "not used"}


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_probes_are_chosen_by_the_metric_asked_for(problem, metric, monkeypatch):
    _, _, data, task = problem
    asked = set()

    def score(task, predictions, targets, metric=None):
        asked.add(metric)
        return headline_score(task, predictions, targets, metric)

    monkeypatch.setattr(probes, "headline_score", score)
    fit_ridge(RidgeRecipe(), data, task, metric=metric)
    assert asked == {metric}
    asked.clear()
    fit_linear(LinearRecipe(pool="mean"), data, task, norm="none", final_norm=None, metric=metric)
    assert asked == {metric}
