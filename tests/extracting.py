"""A dozen pictures, brought into a store by the toy backbone; what a folder holds."""

import hashlib
import importlib
import json
from pathlib import Path

from sidetune.backbones import build_backbone
from sidetune.backbones.base import canonical_json
from sidetune.data import load_dataset
from sidetune.data.views import place_by_hash
from sidetune.extract import extract
from sidetune.files import sha256_file

EXTRACT = importlib.import_module("sidetune.extract")  # the package's attribute is the function
FEW = 12  # pictures


def toy(**arguments):
    return build_backbone("toy", **arguments)


def bring(images, folder, *, backbone=None, dtype="fp32"):
    """Extract a folder of images; returns its dataset and store."""
    dataset = load_dataset(images)
    return dataset, extract(dataset, backbone or toy(), folder, dtype=dtype, quiet=True)


def in_shard_order(keys):
    """Keys as `extract` puts them into new shards."""
    return tuple(sorted(keys, key=place_by_hash))


def contents(folder, pattern="**/*"):
    """name -> (sha256, time of the last change) of every file."""
    files = [path for path in folder.glob(pattern) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns) for path in files}


def seal_again(store: Path) -> None:
    """Seal every shard of a store that was changed by hand, as somebody could who means harm."""
    plan = json.loads((store / "plan.json").read_text())
    head = {name: value for name, value in plan.items() if name != "shards"}
    for number, keys in enumerate(plan["shards"]):
        path = store / "shards" / f"{number:05d}.json"
        entry = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
        claim = hashlib.sha256(canonical_json([head, keys]).encode()).hexdigest()
        seal = hashlib.sha256(canonical_json({"claim": claim, **entry}).encode()).hexdigest()
        path.write_text(json.dumps({**entry, "seal": seal}))
