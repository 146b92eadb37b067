import numpy as np
import torch
from PIL import Image

from sidetune.data import load_dataset
from sidetune.data.pictures import Picture, load_pictures, pictures
from sidetune.data.preprocess import Preprocess, load_image
from sidetune.data.views import AREA, ASPECT, PLAIN, View, views
from sidetune.extract import sample_keys


def ramp(width: int = 200, height: int = 160) -> Image.Image:
    """Red is the column, green the row: a crop says where it was cut."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_the_first_view_is_the_image_itself_then_its_mirror_image_then_crops() -> None:
    assert [view.name for view in views(4)] == ["", "mirror", "crop1", "crop2+mirror", "crop3"]
    assert [view.name for view in views(3, flip=False)] == ["", "crop1", "crop2", "crop3"]
    assert views(0) == views(0, flip=False) == (PLAIN,)
    assert views(4)[:3] == views(2), "more views keep those that a store holds already"


def test_tiles_stand_behind_the_image_and_cut_it_without_gap_or_overlap() -> None:
    shown = views(1, tiles=3)
    assert [view.name for view in shown] == ["", *(f"tile{k}of9" for k in range(1, 10)), "mirror"]
    parts = [np.asarray(view(ramp(), "x")) for view in shown[1:10]]
    rows = [np.concatenate(parts[first : first + 3], 1) for first in (0, 3, 6)]
    assert np.array_equal(np.concatenate(rows), np.asarray(ramp()))
    for size in [(1, 1), (2, 1), (1, 500)]:
        assert all(min(view(Image.new("RGB", size), "x").size) == 1 for view in views(0, tiles=3))


def test_a_view_has_a_key_of_its_own() -> None:
    assert PLAIN.key("a#b.png@12") == "a#b.png@12"
    assert View(2, mirror=True).key("a#b.png@12") == "a#b.png@12#crop2+mirror"


def test_the_mirror_image_is_mirrored() -> None:
    mirrored = np.asarray(View(mirror=True)(ramp(), "x"))
    assert np.array_equal(mirrored, np.asarray(ramp())[:, ::-1])


def test_a_crop_is_a_box_inside_the_image_drawn_from_its_content_and_number() -> None:
    areas, aspects, corners = [], [], set()
    for content in range(60):
        crop = np.asarray(View(crop=1)(ramp(), str(content))).astype(int)
        height, width = crop.shape[:2]
        left, top = crop[0, 0, :2]
        assert np.array_equal(crop, np.asarray(ramp()).astype(int)[top : top + height, left : left + width])
        areas.append(height * width / (200 * 160))
        aspects.append(width / height)
        corners.add((int(left), int(top), width, height))
    assert len(corners) == 60
    assert AREA[0] - 0.02 <= min(areas) < 0.5 and 0.85 < max(areas) <= AREA[1]
    assert ASPECT[0] - 0.02 <= min(aspects) and max(aspects) <= ASPECT[1] + 0.02
    again, other = View(crop=1)(ramp(), "0"), View(crop=2)(ramp(), "0")
    assert np.array_equal(np.asarray(again), np.asarray(View(crop=1)(ramp(), "0")))
    assert again.size != other.size


def test_a_crop_of_one_pixel_or_of_a_thread_is_still_an_image() -> None:
    for size in [(1, 1), (500, 1), (1, 500)]:
        crop = View(crop=1)(Image.new("RGB", size), "x")
        assert 1 <= crop.width <= size[0] and 1 <= crop.height <= size[1]


def test_pictures_are_every_view_of_every_file_side_by_side(image_folder) -> None:
    dataset = load_dataset(image_folder)
    keys, preprocess = sample_keys(dataset), Preprocess(size=32)
    shown = pictures([dataset.file(0), dataset.file(1)], keys[:2], views(2))
    assert [(picture.file, picture.view.name) for picture in shown[:4]] == [
        (dataset.file(0), ""),
        (dataset.file(0), "mirror"),
        (dataset.file(0), "crop1"),
        (dataset.file(1), ""),
    ]
    plain, mirrored, crop = (loaded.pixels for loaded in load_pictures(shown[:3], preprocess))
    assert torch.equal(plain, load_image(dataset.file(0), preprocess))
    assert torch.allclose(mirrored.flip(-1), plain, atol=1e-5)
    assert not torch.allclose(crop, plain, atol=0.1)
    moved = Picture(dataset.file(0), View(crop=1), f"elsewhere/{keys[0]}")
    assert torch.equal(load_pictures([moved], preprocess)[0].pixels, crop), (
        "a file that has moved keeps its crops"
    )
