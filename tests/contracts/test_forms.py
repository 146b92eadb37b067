"""A fast form equals the textbook form: outputs and every gradient, with all parameters drawn non-zero."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.contracts.test_sides import ROWS, draw_all, make_features, make_model, make_spec
from torch import Tensor

from sidetune.errors import SideError
from sidetune.features import Features
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.sides import SIDES
from sidetune.sides.chunks import over_chunks, split, threads_to_chunks
from sidetune.threads import torch_threads

FAST = [name for name, row in ROWS.items() if row.side in ("losa", "last")]
every_fast = pytest.mark.parametrize("name", FAST)


def with_mask(features: Features) -> Features:
    mask = torch.ones(len(features), features.spec.last.num_tokens, dtype=torch.bool)
    mask[::2, -2:] = False
    mask[1, 2] = False
    return Features(features.layers, features.spec, mask)


def outputs_and_gradients(model: SideModel, features: Features, seeds: tuple[int, ...]) -> dict[str, Tensor]:
    output = model.train()(features, Draws(seeds))
    output.retain_grad()
    weights = torch.randn(output.shape, generator=generator(1, "loss"), dtype=torch.float64).to(output.dtype)
    (output * weights).sum().backward()
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def both(
    name: str,
    features: Features,
    seeds: tuple[int, ...] = (0,),
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> list[tuple[str, Tensor, Tensor]]:
    forms = []
    for form in ("textbook", "fast"):
        model = draw_all(make_model(name, seeds, form=form, **more)).to(dtype)
        model.norm.kind = "none"  # a layer norm would hide a wrong scale
        forms.append(outputs_and_gradients(model, features, seeds))
    return [(key, forms[0][key], forms[1][key]) for key in forms[0]]


@every_fast
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one", "three"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_float64_elementwise(name: str, seeds: tuple[int, ...], masked: bool, drop_path: float) -> None:
    features = with_mask(make_features()) if masked else make_features()
    for key, textbook, fast in both(name, features, seeds, drop_path=drop_path):
        assert textbook.abs().max() > 0 or "bias" in key, key
        torch.testing.assert_close(
            fast, textbook, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@every_fast
def test_each_member_has_its_own_drop_path(name: str) -> None:
    rates = [0.4, 0.0, 0.2]
    for key, textbook, fast in both(name, make_features(), (0, 1, 2), drop_path=rates):
        torch.testing.assert_close(fast, textbook, rtol=1e-9, atol=1e-9, msg=key)
    model = draw_all(make_model(name, (0, 1, 2), drop_path=rates))
    dropped, kept = model.train()(make_features(), Draws((0, 1, 2))), model.eval()(make_features())
    equal = [torch.allclose(*pair, rtol=1e-12) for pair in zip(dropped, kept, strict=True)]
    assert equal == [False, True, False]


@every_fast
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_float32_from_stored_taps(name: str, stored: torch.dtype) -> None:
    features = with_mask(make_features(batch=9, dtype=stored))
    for key, textbook, fast in both(name, features, (0, 1), torch.float32, drop_path=0.3):
        assert fast.dtype == torch.float32
        assert (fast - textbook).norm() <= 1e-5 * textbook.norm(), key


@pytest.mark.parametrize("name", ["losa", "last"])
@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean", "all", "tokens"])
def test_every_pooling(name: str, pool: str) -> None:
    features, found = with_mask(make_features()), []
    for form in ("textbook", "fast"):
        side = SIDES[name](make_spec(), rank=4, members=2, pool=pool, form=form).double()
        side.start((0, 1))
        with torch.no_grad():
            for i, parameter in enumerate(side.parameters()):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator(i, "all")))
        pooled = side(features)
        pooled.square().sum().backward()
        found.append([pooled.detach(), *(parameter.grad for parameter in side.parameters())])
    for textbook, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, textbook, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("a", [0.7, -2.0])
def test_the_scale_of_the_mixers(a: float) -> None:
    for key, textbook, fast in both("losa", make_features(), (0, 1), a=a):
        torch.testing.assert_close(fast, textbook, rtol=1e-9, atol=1e-9, msg=key)


def test_a_constant_on_all_channels_does_not_cost_precision() -> None:
    """LAST's layer norms take it away; sums of squares that were not centred first would drown in it."""
    features = make_features()
    lifted = Features(tuple(layer + 30.0 for layer in features.layers), features.spec)
    exact = {key: textbook for key, textbook, _ in both("last", lifted)}
    single = Features(tuple(layer.float() for layer in lifted.layers), features.spec)
    for key, textbook, fast in both("last", single, (0,), torch.float32):
        assert (fast - exact[key]).norm() <= 2 * (textbook - exact[key]).norm() + 1e-6 * exact[key].norm(), (
            key
        )


@pytest.mark.parametrize("name", [name for name in FAST if ROWS[name].side == "losa"])
@pytest.mark.parametrize("rows", [3, 6], ids=["a layer", "two layers"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_of_layers_and_groups_of_members_change_nothing(
    name: str, rows: int, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidetune.sides.losa_fast.BLOCK_ROWS", rows)
    monkeypatch.setattr("sidetune.sides.losa_fast.MOST_MEMBERS", 2)
    monkeypatch.setattr("sidetune.sides.products.WIDE", 1)  # as large products are multiplied
    features = make_features(batch=9, dtype=dtype)
    features = with_mask(features) if masked else features
    for key, textbook, fast in both(name, features, (0, 1, 2), dtype, drop_path=[0.3, 0.0, 0.5]):
        assert (fast - textbook).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * textbook.norm(), key


@every_fast
def test_members_of_a_fleet_are_what_they_are_alone(name: str) -> None:
    features, fleet = make_features(), draw_all(make_model(name, (0, 1, 2, 3, 4)))
    found = fleet(features)
    for member in range(5):
        solo = make_model(name, (member,))
        for one, many in zip(solo.parameters(), fleet.parameters(), strict=True):
            one.data.copy_(many[member : member + 1])
        solo.side.tap_scale.copy_(fleet.side.tap_scale)
        torch.testing.assert_close(found[member], solo(features)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["losa", "last"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_chunks_on_threads_change_nothing(
    name: str, masked: bool, several_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidetune.sides.chunks.LEAST_BYTES", 1)
    features = make_features(batch=11)
    features = with_mask(features) if masked else features
    for key, textbook, fast in both(name, features, (0, 1), drop_path=0.3):
        torch.testing.assert_close(fast, textbook, rtol=1e-9, atol=1e-9, msg=key)
    first, again = both(name, features, (0, 1)), both(name, features, (0, 1))
    for (key, _, one), (_, _, other) in zip(first, again, strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", ["losa", "last"])
def test_chunks_on_threads_run_where_nothing_is_trained(
    name: str, several_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`predict` runs under inference_mode, which a thread does not inherit."""
    monkeypatch.setattr("sidetune.sides.chunks.LEAST_BYTES", 1)
    features = make_features(batch=11)
    model = draw_all(make_model(name))
    with torch.inference_mode():
        found = model.side(features)
    assert torch.equal(found, model.side(features).detach())


FORKED = """
import os, torch
from sidetune.sides.chunks import over_chunks
torch.set_num_threads(2)
assert over_chunks(lambda rows: rows.start, 4, 2**23, torch.device("cpu")) == [0, 1, 2, 3]
if os.fork() == 0:
    os._exit(over_chunks(lambda rows: rows.start, 4, 2**23, torch.device("cpu")) != [0, 1, 2, 3])
print(os.wait()[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "0\n", done.stderr


def test_the_threads_follow_their_number() -> None:
    def asked(count: int) -> list[int]:
        with torch_threads(count):
            return over_chunks(lambda rows: torch.get_num_threads(), 12, 2**22, torch.device("cpu"))

    before = torch.get_num_threads()
    for count in (2, 3, 2):
        assert set(asked(count)) == {1}
        assert torch.get_num_threads() == before


def test_chunks_get_the_threads_that_operations_leave(several_threads: None) -> None:
    with threads_to_chunks():
        assert torch.get_num_threads() == 1
        assert len(over_chunks(lambda rows: rows, 12, 2**22, torch.device("cpu"))) == 4
        with threads_to_chunks():
            assert torch.get_num_threads() == 1
        assert len(over_chunks(lambda rows: rows, 12, 2**22, torch.device("cpu"))) == 4
    assert torch.get_num_threads() == 2
    with threads_to_chunks(when=False):
        assert torch.get_num_threads() == 2


@pytest.fixture
def several_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["losa", "last"])
def test_autocast_leaves_the_fast_form_exact(name: str) -> None:
    features = make_features(dtype=torch.float32)
    side = draw_all(make_model(name)).float().side
    with torch.autocast("cpu", torch.bfloat16):
        inside = side(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, side(features))


@every_fast
def test_what_is_kept_for_backward(name: str) -> None:
    """LoSA: arguments of GELUs, R(N+D) numbers a layer. LAST: q, k, v, output, 1/std, sum: 4R+1+heads."""
    row, features = ROWS[name], make_features(batch=64, dtype=torch.float32)
    model = make_model(name).float()
    pooled = model.side(features)
    node = next(
        node for node in walk(pooled.grad_fn) if type(node).__name__.startswith(("Factored", "Cached"))
    )
    samples = sum(t.numel() for t in node.saved_tensors if 64 in t.shape[:3])
    layers, rank = len(model.side.blocks), row.arguments["rank"]
    num_tokens, width = make_spec().last.num_tokens, make_spec().last.width
    token = width if row.arguments.get("mix_tokens", True) else 0
    numbers = layers * rank * (num_tokens + token) if row.side == "losa" else 0
    heads = row.arguments.get("heads", 1)
    numbers = numbers or (layers + 1) * num_tokens * (4 * rank + 1 + heads)
    assert samples == 64 * numbers


def walk(node: Any) -> Any:
    yield node
    for below, _ in node.next_functions:
        if below is not None:
            yield from walk(below)


@pytest.mark.parametrize("name", ["losa", "last"])
def test_a_tap_that_wants_a_gradient_is_refused(name: str) -> None:
    features = make_features()
    features.layers[2].requires_grad_()
    with pytest.raises(SideError, match=r"tap 'block\.2' wants a gradient"):
        make_model(name).side(features)


def test_an_unknown_form() -> None:
    with pytest.raises(SideError) as caught:
        SIDES["losa"](make_spec(), form="fats")
    assert str(caught.value) == (
        "form is 'fats'. Did you mean 'fast'? Known: fast, textbook. Type: --set side.form=fast"
    )


@pytest.mark.parametrize(
    ("batch", "sample_bytes", "threads", "count"),
    [
        (50, 2**20, 2, 4),  # two a thread
        (31, 2**20, 2, 2),  # four would be short of work
        (12, 2**20, 2, 2),
        (7, 2**20, 2, 1),
        (50, 2**20, 1, 2),  # as many as fit into the cache
        (50, 2**22, 2, 8),
        (50, 1, 2, 1),  # too little to share
        (3, 2**23, 2, 2),  # one of two samples
        (1, 2**30, 8, 1),
        (0, 2**20, 2, 1),
    ],
)
def test_chunks_cover_a_batch_evenly(batch: int, sample_bytes: int, threads: int, count: int) -> None:
    chunks = split(batch, sample_bytes, threads)
    assert len(chunks) == count
    assert [row for rows in chunks for row in range(rows.start, rows.stop)] == list(range(batch))
    lengths = {rows.stop - rows.start for rows in chunks}
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_an_error_in_a_chunk_reaches_the_caller(several_threads: None) -> None:
    def work(rows: slice) -> None:
        raise ZeroDivisionError(rows.start)

    with pytest.raises(ZeroDivisionError):
        over_chunks(work, 8, 2**22, torch.device("cpu"))
