import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sidetune import leaks as module
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.extract import sample_keys
from sidetune.leaks import find_leaks
from sidetune.sources import LiveSource

NUM = 40


def photograph(rng, size=64):
    """Smooth as photographs are: light, some shapes, fine texture."""
    light, texture = (rng.uniform(0, 255, (n, n, 3)).astype(np.uint8) for n in (4, 20))
    parts = [
        Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC) for part in (light, texture)
    ]
    return Image.blend(*parts, 0.5)


def make_split(folder, classes, images, rng):
    for number in range(images):
        place = folder / f"class{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        photograph(rng).save(place / f"{number:04d}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training images, and test images of which some are copies of them."""
    root = tmp_path_factory.mktemp("leaks")
    rng = np.random.default_rng(9)
    for split, count in (("train", NUM), ("val", 2), ("test", 10)):
        make_split(root / split, 2, count, rng)

    def original(number):
        return Image.open(root / f"train/class{number % 2}/{number:04d}.png")

    (root / "test/class0/same.png").write_bytes((root / "train/class0/0004.png").read_bytes())
    original(6).save(root / "test/class0/compressed.jpg", quality=50)
    original(8).resize((40, 40), Image.Resampling.BICUBIC).save(root / "test/class0/smaller.png")
    ImageEnhance.Brightness(original(7)).enhance(1.15).save(root / "test/class1/brighter.png")
    original(9).save(root / "val/class1/compressed.webp", quality=60)
    return root


def found_in(root):
    dataset = load_dataset(root)
    source = LiveSource(dataset, build_backbone("toy"), quiet=True)
    others = np.sort(np.concatenate([dataset.rows("val"), dataset.rows("test")]))
    found = find_leaks(dataset, sample_keys(dataset), source.summary(), dataset.rows("train"), others)
    names = {
        dataset.paths[pair.row].as_posix(): (dataset.paths[pair.train_row].as_posix(), pair)
        for pair in found.pairs
    }
    return found, names


def test_copies_are_found_and_others_are_not(folder):
    found, names = found_in(folder)
    assert {name: twin for name, (twin, _) in names.items()} == {
        "test/class0/same.png": "train/class0/0004.png",
        "test/class0/compressed.jpg": "train/class0/0006.png",
        "test/class0/smaller.png": "train/class0/0008.png",
        "test/class1/brighter.png": "train/class1/0007.png",
        "val/class1/compressed.webp": "train/class1/0009.png",
    }
    assert (found.num_train, found.num_others) == (NUM, 17)
    assert [pair.identical for pair in found.pairs] == [True, False, False, False, False]
    similarities = [pair.similarity for pair in found.pairs]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] == 1.0 and min(similarities) >= module.SAME


def test_pictures_without_content_resemble_nothing(tmp_path):
    for split, level in (("train", 100), ("val", 102), ("test", 103)):
        for kind in (0, 1):
            (tmp_path / split / f"class{kind}").mkdir(parents=True)
            for number in range(4):
                grey = Image.new("L", (32, 32), level + 40 * kind + 7 * number)
                grey.save(tmp_path / split / f"class{kind}/{number}.png")
    assert found_in(tmp_path)[0].pairs == ()


def test_what_all_pictures_share_makes_no_two_of_them_copies(tmp_path):
    """Like solar cells: one frame of strong lines, and little else."""
    rng = np.random.default_rng(0)
    frame = np.zeros((64, 64))
    frame[::8] = frame[:, ::8] = 90
    for split, count in (("train", 40), ("val", 4), ("test", 20)):
        for kind in (0, 1):
            (tmp_path / split / f"class{kind}").mkdir(parents=True)
            for number in range(count):
                pixels = frame + 100 + rng.normal(0, 8, (64, 64))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    tmp_path / split / f"class{kind}/{number}.png"
                )
    assert found_in(tmp_path)[0].pairs == ()


def test_of_too_many_images_a_drawn_share_is_compared_and_said(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS", 5 * NUM)
    found, _ = found_in(folder)
    assert found.num_others == 6, "one that is the same, and five that were drawn"
    again, _ = found_in(folder)
    assert again.pairs == found.pairs


def test_nothing_to_compare_is_no_leak(folder):
    dataset = load_dataset(folder)
    source = LiveSource(dataset, build_backbone("toy"), quiet=True)
    none = np.zeros(0, np.int64)
    found = find_leaks(dataset, sample_keys(dataset), source.summary(), dataset.rows("train"), none)
    assert found.pairs == () and found.num_others == 0


def test_the_same_bytes_are_found_among_any_number(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRS", NUM)
    found, names = found_in(folder)
    assert names["test/class0/same.png"][1].identical
    assert found.num_others == 2, "one that is the same, and one that was drawn"
