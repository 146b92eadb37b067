from dataclasses import replace

import pytest
from PIL import Image

from sidetune.bench.cases import CASES
from sidetune.bench.picture import check_picture, draw_growth, growth_lines
from sidetune.bench.rows import Bench, Row
from sidetune.bench.setting import Setting
from sidetune.bench.side import growth_points
from sidetune.errors import RequestError

ABOUT = {
    "cpu": "a processor",
    "threads": 2,
    "torch": "2.8",
    "setting": {**Setting().to_json(), "growth_batch": 12},
}


@pytest.fixture
def bench():
    rows = [
        Row(f"growth/{label}/{case}", "ms_per_image", number * point.tokens * point.batch / 100, "ms")
        for label, point in growth_points(replace(Setting(), batch=12))
        for number, case in enumerate(CASES, start=1)
    ]
    return Bench((*rows, Row("losa-fast", "ms_per_image", 3.0, "ms")), ABOUT)


def test_lines_are_those_of_the_rows_with_sizes_rising(bench):
    lines = {(axis, case): points for axis, case, points in growth_lines(bench)}
    assert set(lines) == {(axis, case) for axis in "NDLRB" for case in CASES}
    assert [size for size, _ in lines["N", "losa-fast"]] == [65, 129, 257, 513]
    assert lines["B", "last-fast"] == [(size, 2 * 257 * size / 100) for size in (3, 6, 12, 24)]


def test_a_png_and_an_svg_are_drawn(bench, tmp_path):
    draw_growth(bench, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > image.height > 500
        assert len(image.convert("RGB").getcolors(10**6)) > 20
    draw_growth(bench, tmp_path / "growth.svg")
    first = (tmp_path / "growth.svg").read_bytes()
    draw_growth(bench, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_bytes() == first
    assert b"#1d5fd1" in first
    assert b"#c94a22" in first


def test_a_picture_that_cannot_be_is_said_before_measuring(bench, tmp_path):
    with pytest.raises(
        RequestError, match=r"expected a name that ends in \.svg or \.png\. Type: --picture g\.svg"
    ):
        check_picture(tmp_path.__class__("g.jpg"))
    with pytest.raises(RequestError, match=r"there is no folder .*nowhere\. Type: mkdir -p .*nowhere"):
        check_picture(tmp_path / "nowhere" / "g.svg")
    with pytest.raises(
        RequestError, match=r"no growth rows, expected some\. Type: sidetune bench side --growth"
    ):
        draw_growth(replace(bench, rows=bench.rows[-1:]), tmp_path / "g.svg")
