import torch
from torch import nn

from sidetune.backbones.base import Identity, canonical_json, weights_digest

ONE = Identity("ab" * 32, "toy", {"size": 32}, {"mean": [0.5, 0.5, 0.5]})


def test_difference_has_one_line_a_field_and_shortens_hashes():
    other = Identity("cd" * 32, "toy", {"size": 64}, {"mean": [0.5, 0.5, 0.5]})
    assert ONE.difference(other) == [
        "arguments.size: 32 here, 64 there",
        "weights: abababababab.. here, cdcdcdcdcdcd.. there",
    ]
    assert ONE.difference(ONE) == []


def test_difference_shows_a_field_that_only_one_side_has():
    other = Identity("ab" * 32, "toy", {"size": 32, "patch": 8}, {"mean": [0.5, 0.5, 0.5]})
    assert ONE.difference(other) == ["arguments.patch: None here, 8 there"]


def test_digest_is_fixed_and_survives_json():
    assert Identity.from_json(ONE.to_json()) == ONE
    assert ONE.to_json()["digest"] == ONE.digest
    assert len(ONE.digest) == 64
    assert canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


def test_weights_digest_sees_name_dtype_shape_and_value():
    class Net(nn.Module):
        def __init__(self, name: str, value: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer(name, value)

    zeros = torch.zeros(2, 3)
    digests = {
        weights_digest(Net(name, value))
        for name, value in [
            ("a", zeros),
            ("b", zeros),
            ("a", zeros.half()),
            ("a", zeros.reshape(3, 2)),
            ("a", zeros + 1),
            ("a", torch.tensor(0.0)),
        ]
    }
    assert len(digests) == 6
    assert weights_digest(Net("a", zeros.t().contiguous().t())) == weights_digest(Net("a", zeros))
