"""Evidence is a sum: patches, prefix tokens and what the image does not decide give the outputs."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from sidetune.evidence import patch_evidence
from sidetune.features import Features, FinalNorm, Spec, Tap
from sidetune.findings import DARKEST, overlay
from sidetune.keyed import generator
from sidetune.model import SideModel
from sidetune.sides import SIDES
from sidetune.sides.base import pool_tokens, token_shares

TAPS = tuple(Tap(f"block.{i}", "block", 6, (1, 2, 3), 2, "clip", 0) for i in (1, 2, 3))
SPEC = Spec((Tap("embedding", "embedding", 6, (1, 2, 3), 2, "clip", 0), *TAPS))
FRAMES = Tap("block.1", "block", 6, (3, 2, 2), 1, "frame", 0)


SMALL = {"fusion": {"heads": 2}, "ladder": {"reduction": 2, "heads": 1}}


def random_model(name: str, pool: str = "mean", norm: str = "backbone") -> tuple[SideModel, Features]:
    keyed = generator(0, "evidence")
    kind = SIDES[name]
    spec = kind.reads(SPEC)
    arguments = {} if name in ("attentive", "fusion", "ridge") else {"pool": pool}
    side = kind(spec, members=1, **arguments, **SMALL.get(name, {}))  # type: ignore[arg-type]
    final = FinalNorm(torch.rand(6, generator=keyed), torch.randn(6, generator=keyed), 1e-5)
    model = SideModel(side, 3, norm=norm, final_norm=final).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed))
    layers = tuple(torch.randn(5, 8, 6, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    return model, Features(layers, spec)


@pytest.mark.parametrize("norm", ["backbone", "trained", "none"])
@pytest.mark.parametrize("name", ["losa", "last", "linear", "attentive", "ladder", "bypass"])
def test_patches_and_prefix_add_up_to_the_difference_of_outputs(name: str, norm: str) -> None:
    model, features = random_model(name, norm=norm)
    a, b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 0, 2, 0])
    evidence = patch_evidence(model, features, a, b)
    assert evidence is not None and evidence.shape == (5, 6)
    outputs = model(features)[0]
    empty = model.norm(torch.zeros(1, 1, model.side.width, dtype=torch.float64))
    bias = model.head(empty)[0, 0]  # what norm and head say of nothing
    expected = (outputs - bias)[torch.arange(5), a] - (outputs - bias)[torch.arange(5), b]
    total = evidence.sum(1)
    if name == "attentive":  # it attends to the prefix too
        total = total + prefix_evidence(model, features, a, b)
    torch.testing.assert_close(total, expected)


def prefix_evidence(model: SideModel, features: Features, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same sum over prefix tokens, by leaving patches out of the shares."""
    shares = model.side.shares(features)
    assert shares is not None
    pooled = shares.sum(2)[0]
    prefix = shares[0, :, :2].sum(1)
    spread = (pooled.var(-1, unbiased=False, keepdim=True) + model.norm.eps).sqrt()
    if model.norm.kind == "none":
        normed = prefix
    else:
        assert model.norm.weight is not None
        normed = (prefix - prefix.mean(-1, keepdim=True)) / spread * model.norm.weight.view(1, -1)
    weight = model.head.weight_MDK[0].T
    return (normed * (weight[a] - weight[b])).sum(-1)


@pytest.mark.parametrize("name", sorted(SIDES))
def test_shares_add_up_to_what_is_pooled(name: str) -> None:
    model, features = random_model(name)
    shares = model.side.shares(features)
    if name in ("ridge", "fusion"):
        assert shares is None
        return
    assert shares is not None
    torch.testing.assert_close(shares.sum(2).expand(1, -1, -1), model.side(features))


@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean", "all"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tap", [TAPS[0], FRAMES], ids=["image", "clip"])
def test_shares_of_any_pooling_add_up(pool: str, masked: bool, tap: Tap) -> None:
    keyed = generator(1, "tokens")
    tokens = torch.randn(2, 4, tap.num_tokens, 6, generator=keyed, dtype=torch.float64)
    mask = torch.rand(4, tap.num_tokens, generator=keyed) > 0.3 if masked else None
    shares = token_shares(tokens, tap, pool, mask)  # type: ignore[arg-type]
    assert shares is not None
    torch.testing.assert_close(shares.sum(-2), pool_tokens(tokens, tap, pool, mask))  # type: ignore[arg-type]


def test_where_patches_do_not_reach_the_head_there_is_no_map() -> None:
    answer = torch.zeros(5, dtype=torch.int64)
    for name, pool in (("losa", "cls"), ("ridge", "mean"), ("fusion", "mean")):
        model, features = random_model(name, pool, "none")
        assert patch_evidence(model, features, answer, answer + 1) is None


def test_an_overlay_is_clear_over_evidence_and_dark_elsewhere() -> None:
    uri = overlay(torch.tensor([[4.0, 2.0, 0.0], [-3.0, -1.0, 4.0]]))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert (image.size, image.mode) == ((3, 2), "LA")
    luminance, alpha = np.moveaxis(np.asarray(image), -1, 0)
    dark = round(255 * DARKEST)
    assert not luminance.any()
    assert alpha.tolist() == [[0, round(255 * DARKEST / 2), dark], [dark, dark, 0]]


def test_an_overlay_without_any_evidence_is_dark_everywhere() -> None:
    uri = overlay(-torch.ones(2, 2))
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))[..., 1]
    assert (alpha == round(255 * DARKEST)).all()
