from dataclasses import replace
from pathlib import Path

import numpy as np

from sidetune.data import Dataset, load_dataset, sample_key


def test_rows_and_files_of_a_dataset(image_folder: Path) -> None:
    dataset = load_dataset(image_folder)
    assert len(dataset) == 60
    assert dataset.file(0) == image_folder / dataset.paths[0]
    rows = np.concatenate([dataset.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows.tolist()) == list(range(60))


def test_a_fingerprint_sees_labels_splits_and_keys() -> None:
    dataset = Dataset(
        root=Path("data"),
        paths=(Path("a.png"), Path("b.png")),
        task="classify",
        targets=np.array([0, 1]),
        outputs=("x", "y"),
        split=np.array(["train", "test"]),
    )
    keys = ("a.png@1", "b.png@2")
    first = dataset.fingerprint(keys)
    assert first == replace(dataset, root=Path("elsewhere")).fingerprint(keys)
    others = [
        dataset.fingerprint(("a.png@1", "b.png@3")),
        replace(dataset, targets=np.array([1, 1])).fingerprint(keys),
        replace(dataset, split=np.array(["train", "val"])).fingerprint(keys),
        replace(dataset, outputs=("x", "z")).fingerprint(keys),
    ]
    assert len({first, *others}) == 5


def test_a_sample_key_follows_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    before = sample_key(Path("x/a.png"), file)
    assert before.startswith("x/a.png@")
    assert len(before) == len("x/a.png@") + 64
    file.write_bytes(b"two")
    assert sample_key(Path("x/a.png"), file) != before
