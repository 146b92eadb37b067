"""What is kept under OUT, so that a command that died goes on and one that ended prints the same again.

    OUT/TASK/METHOD/NAME.safetensors    a fit: what it answers, how long it took; written when it has ended
    OUT/TASK/METHOD/checkpoint-*        the fit under way
    OUT/frozen.json                     recipe hashes, written before anything of test meets its labels;
                                        and how long a training may take in the table at equal time
    results/looks.jsonl                 a line each time that test scores were looked at, by anybody

A fit belongs to its key: recipe, backbone, training rows with their labels, and the images that it answers
for, without theirs. Where any of that changes it is another fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidetune.backbones.base import canonical_json
from sidetune.errors import ArtifactError
from sidetune.files import parse_json, read_json, write_json, write_tensors

FROZEN = "frozen.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """What a fit left.

    Args:
        facts: plain JSON values: recipe, environment and commit; seconds, epochs, whether it diverged.
        outputs: name of what it answers for -> (n, K) float32.
    """

    facts: dict[str, Any]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether it has no answer, for its loss or its outputs were not finite."""
        return bool(self.facts.get("diverged"))


def digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """sha256 of canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Ledger:
    """The fits of a method on a task.

    Args:
        folder: OUT/TASK/METHOD.
    """

    folder: Path

    def read(self, name: str, key: str) -> Entry | None:
        """The fit of this key; None where it has not ended.

        Raises:
            ArtifactError: its file is damaged.
        """
        path = self._path(name, key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                facts = parse_json(stored.metadata()["facts"])
                outputs = {one: stored.get_tensor(one) for one in stored.keys()}  # noqa: SIM118 - not a dict
            if facts["key"] != key:
                raise ValueError("it holds another fit")
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ArtifactError(
                f"{path} is damaged: {str(error).partition(chr(10))[0].rstrip('.')}. Type: rm {path}, then "
                "the same command, which fits it anew"
            ) from error
        outputs.pop("none", None)
        return Entry(facts, outputs)

    def write(self, name: str, key: str, entry: Entry) -> None:
        """Keep a fit that has ended."""
        tensors = {one: tensor.float() for one, tensor in entry.outputs.items()} or {"none": torch.zeros(0)}
        facts = json.dumps({**entry.facts, "key": key}, allow_nan=False)
        write_tensors(self._path(name, key), tensors, {"facts": facts})

    def checkpoint(self, key: str) -> Path:
        """Where the fit under way stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"checkpoint-{key[:12]}.safetensors"

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:12]}.safetensors"


def freeze(out: Path, pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Write recipe hashes down, before the scores of test are looked at.

    Pairs of earlier commands stay: methods and tasks may be added, never changed.

    Args:
        out: the folder of it all.
        pairs: ``task/method`` -> its recipe's hash, and what it was chosen on.

    Returns:
        sha256 of all that is frozen there.

    Raises:
        ArtifactError: another recipe, other data or another backbone was frozen there.
    """
    path = out / FROZEN
    found = read_frozen(out)
    for name, pair in pairs.items():
        there = found.get(name)
        if there is None or there == dict(pair):
            continue
        parts = [part for part in pair if there.get(part) != pair[part]]
        raise ArtifactError(
            f"{path} froze another {' and '.join(parts)} of {name}: {str(there.get(parts[0]))[:16]} there, "
            f"{str(pair[parts[0]])[:16]} here. What was frozen is not chosen again. Type: --out with a new "
            "folder, which is a new freeze"
        )
    frozen = {name: dict(pair) for name, pair in sorted({**found, **pairs}.items())}
    if frozen != found:
        write_json(path, frozen)
    return digest(frozen)


def read_frozen(out: Path) -> dict[str, Any]:
    """All that is frozen, name -> fields; nothing where there is nothing.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = out / FROZEN
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not all(isinstance(pair, dict) for pair in found.values()):
            raise ValueError("expected an object of objects")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. Type: --out with a new folder") from error
    return found


def look(path: Path, line: Mapping[str, Any]) -> None:
    """Append a look, before anything is shown: it stays written whatever happens next.

    Args:
        path: of looks.jsonl; made with its folder.
        line: task, digest of its test images, methods, digest of what is frozen.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dict(line), allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def count_looks(path: Path, test: str) -> int:
    """How often test scores of these images were looked at.

    Args:
        path: of looks.jsonl.
        test: digest of the test images.

    Raises:
        ArtifactError: a line is damaged.
    """
    return sum(line.get("test") == test for line in _lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(
                f"{path}, line {number}: not JSON ({error.msg}); looks are counted there. Mend the line"
            ) from error
        if isinstance(line, dict):
            yield line
