"""Ridge: the closed forms against refitting without a sample, without a group, and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.ridge import LAMBDAS, Ridge, solve_ridge
from sidetune.summary import summarise


def make_problem(num_samples: int, num_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    keyed = generator(0, "ridge")
    x = torch.randn(num_samples, num_features, generator=keyed, dtype=torch.float64)
    noise = torch.randn(num_samples, 2, generator=keyed, dtype=torch.float64)
    y = x[:, :2] - 0.3 * x[:, 2:4] + noise
    return x - x.mean(0), y - y.mean(0)


# more features than samples and the reverse: the two Gram matrices
SHAPES = pytest.mark.parametrize("shape", [(20, 35), (35, 8)])


@SHAPES
def test_weights_equal_scikit_learn(shape: tuple[int, int]) -> None:
    x, y = make_problem(*shape)
    for l2 in (1e-3, 1.0, 100.0):
        found = solve_ridge(x, y, lambda _: 0.0, lambdas=(l2,))
        expected = SklearnRidge(alpha=l2, fit_intercept=False, solver="svd").fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(found.weight.numpy(), expected.coef_.T, atol=1e-9)


@SHAPES
def test_left_out_fits_equal_refits_without_the_sample(shape: tuple[int, int]) -> None:
    x, y = (part.numpy() for part in make_problem(*shape))
    found = solve_ridge(torch.from_numpy(x), torch.from_numpy(y), lambda _: 0.0, lambdas=(0.7,)).left_out
    for row in range(len(x)):
        others = np.arange(len(x)) != row
        refit = SklearnRidge(alpha=0.7, solver="svd").fit(x[others], y[others])
        np.testing.assert_allclose(found[row], refit.predict(x[row : row + 1])[0], atol=1e-9)


@SHAPES
def test_left_out_groups_equal_refits_without_the_group(shape: tuple[int, int]) -> None:
    x, y = (part.numpy() for part in make_problem(*shape))
    groups = np.array([f"g{row // 3}" for row in range(len(x))])
    arguments = (torch.from_numpy(x), torch.from_numpy(y), lambda _: 0.0)
    found = solve_ridge(*arguments, lambdas=(0.7,), groups=groups).left_out
    for group in np.unique(groups):
        inside = groups == group
        refit = SklearnRidge(alpha=0.7, solver="svd").fit(x[~inside], y[~inside])
        np.testing.assert_allclose(found[inside], refit.predict(x[inside]), atol=1e-8)


def test_lambda_is_the_one_with_the_best_left_out_score() -> None:
    x, y = make_problem(40, 10)

    def score(left_out: torch.Tensor) -> float:
        return -(y - left_out).square().mean().item()

    found = solve_ridge(x, y, score)
    assert set(found.scores) == set(LAMBDAS)
    assert found.scores[found.l2] == max(found.scores.values())
    assert LAMBDAS[0] == pytest.approx(1e-5) and LAMBDAS[-1] == pytest.approx(1e2)


def test_features_are_cls_and_mean_of_the_chosen_taps_standardised() -> None:
    spec = Spec(tuple(Tap(f"block.{i}", "block", 4, (1, 2, 2), 1, "clip", 0) for i in (1, 2)))
    keyed = generator(0, "features")
    layers = tuple(torch.randn(30, 5, 4, generator=keyed) * 7 + 3 for _ in spec.taps)
    features = Features(layers, spec)
    side = Ridge(spec, taps="last")
    side.standardise(summarise(features))
    raw = np.concatenate([layers[1][:, 0].numpy(), layers[1][:, 1:].mean(1).numpy()], 1)
    expected = (raw - raw.mean(0)) / raw.std(0) / np.sqrt(8)
    np.testing.assert_allclose(side(features)[0].numpy(), expected, atol=1e-5)
    assert Ridge(spec).width == 16


def test_more_statistics_stand_behind_the_pooled_taps() -> None:
    spec = Spec(tuple(Tap(f"block.{i}", "block", 4, (1, 2, 2), 1, "clip", 0) for i in (1, 2)))
    keyed = generator(0, "statistics")
    layers = tuple(torch.randn(30, 5, 4, generator=keyed) * 7 + 3 for _ in spec.taps)
    features = Features(layers, spec)
    side = Ridge(spec, statistics="cls+mean+std+quadrants")
    side.standardise(summarise(features, side.more))
    patches = [layer[:, 1:].double().numpy() for layer in layers]
    raw = [part for layer in layers for part in (layer[:, 0].numpy(), layer[:, 1:].mean(1).numpy())]
    raw += [of_tap.std(1) for of_tap in patches]
    raw += [of_tap.reshape(30, 16) for of_tap in patches]  # on a 2 x 2 grid a quadrant is a patch
    x = np.concatenate(raw, 1)
    expected = (x - x.mean(0)) / x.std(0) / np.sqrt(2 * 4 * (2 + 1 + 4))
    assert side.width == expected.shape[1] == 56
    np.testing.assert_allclose(side(features)[0].numpy(), expected, atol=1e-5)


def test_a_constant_feature_is_no_division_by_zero() -> None:
    spec = Spec((Tap("block.1", "block", 2, (1, 1, 2)),))
    layer = torch.zeros(6, 2, 2)
    layer[:, :, 0] = torch.arange(6.0)[:, None]
    side = Ridge(spec)
    side.standardise(summarise(Features((layer,), spec)))
    out = side(Features((layer,), spec))
    assert torch.isfinite(out).all() and not out[..., 1].any()
