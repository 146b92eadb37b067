"""A dozen pictures, brought into a store by the toy backbone; what a folder holds."""

import importlib

from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
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


def contents(folder, pattern="**/*"):
    """name -> (sha256, time of the last change) of every file."""
    files = [path for path in folder.glob(pattern) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns) for path in files}
