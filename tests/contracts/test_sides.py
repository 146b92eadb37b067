"""Every side network passes the same tests. An exception is a field of its row, with the reason."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from sidetune.errors import SideError
from sidetune.features import Features, FinalNorm, Spec, Tap
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.sides import SIDES, SOLVED
from sidetune.sides.base import kept_blocks

WIDTH, BLOCKS, CLASSES = 12, 4, 3


@dataclass(frozen=True)
class Row:
    side: str
    count: Callable[[int, int, int], int]  # (D, N, L) -> parameters without norm and head
    arguments: dict[str, Any] = field(default_factory=dict)
    is_probe_at_start: bool = True
    probe_pool: str = "mean"
    num_tokens_matter: bool = False  # parameters tied to N


def losa(width: int, num_tokens: int, blocks: int, rank: int = 3) -> int:
    return 2 * rank * blocks * (width + num_tokens)


def last(width: int, _: int, blocks: int, rank: int = 4) -> int:
    return (blocks + 1) * (4 * width * rank + 2 * width)


def ladder(width: int, _: int, blocks: int, reduction: int = 2) -> int:
    narrow = width // reduction
    per_block = 12 * narrow * narrow + 4 * narrow + 1
    return (blocks + 2) * width * narrow + blocks * per_block + 2 * narrow


LADDER = {"reduction": 2, "heads": 3}

ROWS = {
    "losa": Row("losa", losa, {"rank": 3}),
    "losa token->channel": Row("losa", losa, {"rank": 3, "order": "token->channel"}),
    "losa parallel": Row("losa", losa, {"rank": 3, "order": "parallel"}),
    "losa channels alone": Row("losa", lambda D, N, L: 2 * 3 * L * D, {"rank": 3, "mix_tokens": False}),
    "losa every 2": Row("losa", lambda D, N, L: losa(D, N, L // 2), {"rank": 3, "every": 2}),
    "losa cls+mean": Row("losa", losa, {"rank": 3, "pool": "cls+mean"}, probe_pool="cls+mean"),
    "losa from zero": Row("losa", losa, {"rank": 3, "first_state": "zero"}, is_probe_at_start=False),
    "losa from z_0": Row("losa", losa, {"rank": 3, "first_state": "z_0"}, is_probe_at_start=False),
    "last": Row("last", last, {"rank": 4}),
    "last 2 heads": Row("last", last, {"rank": 4, "heads": 2}),
    "last cls": Row("last", last, {"rank": 4, "pool": "cls"}, probe_pool="cls"),
    "last every 2": Row("last", lambda D, N, L: last(D, N, L // 2), {"rank": 4, "every": 2}),
    "last without z_L": Row("last", last, {"rank": 4, "keep_last": False}, is_probe_at_start=False),
    "attentive": Row("attentive", lambda D, N, L: D + D * D, probe_pool="all"),
    "bypass": Row("bypass", lambda D, N, L: 4 * L * D * 3, {"rank": 3}, is_probe_at_start=False),
    "bypass every 2": Row(
        "bypass", lambda D, N, L: 2 * L * D * 3, {"rank": 3, "every": 2}, is_probe_at_start=False
    ),
    "fusion": Row("fusion", lambda D, N, L: D + 3 * D * D, {"heads": 3}, is_probe_at_start=False),
    "ladder": Row("ladder", ladder, LADDER),
    "ladder cls+mean": Row("ladder", ladder, {**LADDER, "pool": "cls+mean"}, probe_pool="cls+mean"),
    "ladder every 2": Row("ladder", lambda D, N, L: ladder(D, N, L // 2), {**LADDER, "every": 2}),
    "ladder without b_L": Row("ladder", ladder, {**LADDER, "keep_last": False}, is_probe_at_start=False),
    "linear": Row("linear", lambda D, N, L: 0, {"pool": "cls+mean"}, probe_pool="cls+mean"),
    "ridge": Row("ridge", lambda D, N, L: 0, is_probe_at_start=False),
    "ridge with more statistics": Row(
        "ridge", lambda D, N, L: 0, {"statistics": "cls+mean+std+quadrants"}, is_probe_at_start=False
    ),
}
TRAINED = [name for name, row in ROWS.items() if row.side not in SOLVED]
DROPPING = ["losa", "last", "ladder"]
every_row = pytest.mark.parametrize("name", ROWS)
every_trained = pytest.mark.parametrize("name", TRAINED)


def make_spec(width: int = WIDTH, blocks: int = BLOCKS, grid: tuple[int, int, int] = (1, 2, 3)) -> Spec:
    def tap(name: str, kind: Any) -> Tap:
        return Tap(name, kind, width, grid, num_prefix=1, cls_index=0)

    return Spec((tap("embedding", "embedding"), *(tap(f"block.{i}", "block") for i in range(1, blocks + 1))))


def make_features(batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Features:
    spec, keyed = make_spec(), generator(seed, "features")
    return Features(
        tuple(
            torch.randn(batch, tap.num_tokens, tap.width, generator=keyed, dtype=torch.float64).to(dtype)
            for tap in spec.taps
        ),
        spec,
    )


def make_norm() -> FinalNorm:
    keyed = generator(0, "norm")
    return FinalNorm(torch.rand(WIDTH, generator=keyed) + 0.5, torch.randn(WIDTH, generator=keyed), 1e-6)


def make_model(name: str, seeds: tuple[int, ...] = (0,), **more: Any) -> SideModel:
    row = ROWS[name]
    side = SIDES[row.side](make_spec(), members=len(seeds), **{**row.arguments, **more})
    model = SideModel(
        side, CLASSES, norm="none" if row.side == "ridge" else "backbone", final_norm=make_norm()
    )
    model.start(seeds)
    return model.double()


def draw_all(model: SideModel, seed: int = 0) -> SideModel:
    """Every parameter non-zero, up-projections too."""
    keyed = generator(seed, "all parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        model.side.tap_scale.copy_(torch.linspace(0.5, 1.5, len(model.side.tap_scale)))
    return model


@every_row
def test_count_equals_the_formula(name: str) -> None:
    row, spec = ROWS[name], make_spec()
    assert make_model(name).side.num_parameters() == row.count(WIDTH, spec.last.num_tokens, BLOCKS)
    assert make_model(name, (0, 1)).side.num_parameters() == row.count(WIDTH, spec.last.num_tokens, BLOCKS)


def test_counts_of_the_papers() -> None:
    vit_b = make_spec(768, 12, (1, 14, 14))
    assert SIDES["losa"](vit_b, rank=8).num_parameters() == 185_280  # 0.19 M published
    assert SIDES["last"](vit_b, rank=16).num_parameters() == 658_944  # 0.66 M published
    assert SIDES["bypass"](vit_b, rank=11).num_parameters() == 405_504  # 0.4 M published
    assert SIDES["ladder"](vit_b).num_parameters() == 2_364_108  # about 2.4 M
    assert SIDES["fusion"](vit_b).num_parameters() == 1_770_240


@every_row
def test_starts_as_the_linear_probe_where_the_paper_says_so(name: str) -> None:
    row, features = ROWS[name], make_features()
    pooled = make_model(name).side(features)
    if row.probe_pool == "all":
        expected = features.layers[-1].mean(1)[None]
    else:
        expected = SIDES["linear"](make_spec(), pool=row.probe_pool)(features)
    if row.is_probe_at_start:
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    else:  # and so the row says the truth
        assert pooled.shape != expected.shape or not torch.allclose(pooled, expected)


@every_trained
def test_every_parameter_has_a_gradient_by_step_two(name: str) -> None:
    model, features = make_model(name), make_features(batch=8)
    target = torch.arange(8) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features)[0], target).backward()
        optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@every_trained
def test_learns_eight_samples(name: str) -> None:
    model, features = make_model(name), make_features(batch=8)
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(features)[0], target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert (model(features)[0].argmax(-1) == target).all()


@every_row
def test_save_and_load_is_bitwise(name: str) -> None:
    model, other = draw_all(make_model(name)), make_model(name, (7,))
    other.load_state_dict(load(save({key: value.contiguous() for key, value in model.state_dict().items()})))
    assert torch.equal(model(make_features()), other(make_features()))


@every_trained
def test_a_member_starts_and_computes_as_it_would_alone(name: str) -> None:
    fleet, solo = make_model(name, (3, 1, 2)), make_model(name, (1,))
    for (key, many), one in zip(fleet.named_parameters(), solo.parameters(), strict=True):
        assert torch.equal(many[1], one[0]), key
    draw_all(fleet)
    solo.load_state_dict(
        {
            key: tensor[1:2] if key in dict(fleet.named_parameters()) else tensor
            for key, tensor in fleet.state_dict().items()
        }
    )
    torch.testing.assert_close(fleet(make_features())[1], solo(make_features())[0], rtol=1e-11, atol=1e-11)


@every_trained
def test_members_do_not_share_gradients(name: str) -> None:
    fleet = draw_all(make_model(name, (0, 1)))
    fleet(make_features())[1].square().sum().backward()
    for key, parameter in fleet.named_parameters():
        assert parameter.grad is not None
        assert not parameter.grad[0].any(), key
        assert parameter.grad[1].any(), key


@every_row
def test_a_sample_alone_equals_the_sample_in_a_batch(name: str) -> None:
    model, features = draw_all(make_model(name)), make_features()
    batch = model(features)
    for row in range(len(features)):
        torch.testing.assert_close(model(features.rows(slice(row, row + 1)))[:, 0], batch[:, row])


@every_trained
def test_masked_tokens_do_not_matter(name: str) -> None:
    """Two masked patch tokens may hold anything; a model that reads them is wrong."""
    model, features = draw_all(make_model(name)), make_features()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1:, 5:] = False
    dirty = tuple(layer.masked_fill(~mask[:, :, None], 1e3) for layer in features.layers)
    clean = model(Features(features.layers, features.spec, mask))
    torch.testing.assert_close(model(Features(dirty, features.spec, mask)), clean, rtol=1e-10, atol=1e-10)
    unmasked = model(features)
    torch.testing.assert_close(clean[:, 0], unmasked[:, 0], rtol=1e-10, atol=1e-10)
    if name not in ("last cls", "losa channels alone"):
        assert not torch.allclose(clean[:, 1:], unmasked[:, 1:])


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize(
    ("rates", "says"),
    [
        (
            [0.1, 0.2, 0.3],
            "drop_path has 3 rates, expected one number or one for each of 2 members. Type: drop_path=0.0",
        ),
        ([0.1, 1.0], "drop_path is 1, expected 0 or more and less than 1. Type: drop_path=0.1"),
    ],
)
def test_drop_path_that_cannot_be(name: str, rates: list[float], says: str) -> None:
    with pytest.raises(SideError) as caught:
        make_model(name, (0, 1), drop_path=rates)
    assert str(caught.value) == says


@pytest.mark.parametrize("name", DROPPING)
def test_drop_path_is_keyed_by_member_and_step(name: str) -> None:
    model = draw_all(make_model(name, (0, 1, 0), drop_path=0.5)).train()
    features = make_features(batch=16)
    first = model(features, Draws((0, 1, 0), epoch=2, step=3))
    assert torch.equal(first, model(features, Draws((0, 1, 0), epoch=2, step=3)))
    assert not torch.equal(first, model(features, Draws((0, 1, 0), epoch=2, step=4)))
    solo = model(features, Draws((1, 1, 1), epoch=2, step=3))
    assert torch.equal(first[1], solo[1])
    assert not torch.equal(first[0], solo[0])
    assert torch.equal(model.eval()(features), model(features))


def test_branches_are_read_like_blocks_where_they_are_tapped() -> None:
    taps = [Tap("embedding", "embedding", 8, (1, 2, 2))]
    for i in (1, 2):
        taps += [Tap(f"attention.{i}", "attention", 8, (1, 2, 2)), Tap(f"ffn.{i}", "ffn", 8, (1, 2, 2))]
    spec = Spec((*taps, Tap("block.2", "block", 8, (1, 2, 2))))
    assert [tap.name for tap in kept_blocks(spec, 1, "losa")] == list(spec.names[1:])
    assert [tap.name for tap in kept_blocks(spec, 2, "losa")] == ["attention.1", "attention.2", "block.2"]
    attention = spec.select(["attention.1", "attention.2", "block.2"])
    side = SIDES["losa"](attention, rank=2)
    features = Features(tuple(torch.ones(2, 4, 8) * i for i in (1.0, 2.0, 3.0)), attention)
    assert torch.equal(side(features)[0], torch.full((2, 8), 3.0)), "b_L at the start, no branch"


@pytest.mark.parametrize(
    ("side", "arguments", "spec", "says"),
    [
        ("losa", {"pool": "men"}, make_spec(), "Did you mean 'mean'"),
        ("losa", {"first_state": "z_0"}, make_spec().select(["block.1", "block.4"]), "first_state=b_L"),
        ("last", {}, make_spec().select(["block.1", "block.4"]), "last reads the tap 'embedding'"),
        ("last", {"heads": 3}, make_spec(), "heads 3 does not divide rank 16"),
        ("ladder", {}, make_spec().select(["block.1", "block.4"]), "ladder reads the tap 'embedding'"),
        ("ladder", {}, make_spec(), "reduction 8 does not divide width 12. Type: --set side.reduction=1"),
        ("ladder", {"reduction": 2}, make_spec(), "heads 4 does not divide width 6. Type: --set side.heads"),
        ("bypass", {}, make_spec().select(["block.4"]), "bypass reads the tap 'embedding' and got block.4"),
        ("fusion", {"heads": 5}, make_spec(), "heads 5 does not divide width 12. Type: --set side.heads=1"),
        ("losa", {}, make_spec().select(["embedding"]), "losa reads block taps and got embedding"),
        ("losa", {"every": 0}, make_spec(), "every is 0, expected 1 or more"),
        (
            "losa",
            {},
            Spec((Tap("block.1", "block", 8, (1, 2, 2)), Tap("block.2", "block", 16, (1, 1, 1)))),
            "one width and one grid, got block.1 4x8, block.2 1x16. Type: --side ridge",
        ),
        (
            "losa",
            {"pool": "cls"},
            Spec((Tap("block.1", "block", 8, (1, 2, 2)),)),
            "pool 'cls' needs a class token and this backbone has none. Type: --set side.pool=mean",
        ),
    ],
)
def test_refusals_say_what_to_type(side: str, arguments: dict[str, Any], spec: Spec, says: str) -> None:
    with pytest.raises(SideError) as error:
        SIDES[side](spec, **arguments)
    assert says in str(error.value)
