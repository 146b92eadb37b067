"""One case of `sidetune bench cost` in a process of its own: ``python -m sidetune.bench.cost_worker``.

    .. time CASE SETTING STORE      says what it is, then runs a round for each line that it reads
    .. memory CASE SETTING STORE    says the peaks of two rounds and of all that it ever held, and ends
    .. store SETTING FOLDER         writes the small store that stored cases read, and ends

A process that has not been told to run waits in a read, and leaves the cores to the others.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sidetune.bench.cost_cases import SEED, STORE_BATCHES, CostCase, CostSetting, Trial, reading_of
from sidetune.bench.stores import in_shards, write_store
from sidetune.features import Features
from sidetune.files import write_tensors
from sidetune.keyed import generator
from sidetune.memory import PeakMemory, anonymous_bytes, resident_bytes
from sidetune.store import DTYPES, DTypeName, Plan, Store, norm_digest
from sidetune.threads import torch_threads

MARK = "sidetune-bench "  # begins the lines that the parent reads
INTERVAL = 0.002  # seconds between samples of memory: a block's largest tensor lives for some milliseconds
DTYPE: DTypeName = "fp16"  # of stored features


def peaks(case: CostCase, setting: CostSetting, store: Store | None = None) -> dict[str, int]:
    """Memory of two rounds: gradients and the optimiser's state count.

    What libraries take once, packages that are imported and kernels that oneDNN compiles for each shape, is
    taken by a round before that: some 20 MB that do not grow.

    Args:
        case: which.
        setting: sizes.
        store: as for `Trial`.

    Returns:
        ``peak_bytes`` above the backbone and the model; ``held_bytes`` with both. What a baseline trains of
        the backbone's own counts once in it, though it is there twice: that is ``doubled_bytes``.
    """
    cuda = setting.device == "cuda"
    allocated = torch.cuda.memory_allocated if cuda else anonymous_bytes
    Trial(case, setting, store).run()
    gc.collect()
    empty = int(allocated())
    trial = Trial(case, setting, store)
    before = int(allocated())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        model = _two_rounds(trial)
        peak = int(torch.cuda.max_memory_allocated())
    else:
        with PeakMemory(INTERVAL) as memory:
            model = _two_rounds(trial)
        peak = memory.peak
    return {
        "peak_bytes": max(0, peak - before - model),
        "held_bytes": max(0, peak - empty - trial.doubled_bytes()),
        "doubled_bytes": trial.doubled_bytes(),
    }


def _two_rounds(trial: Trial) -> int:
    """Bytes of the model. The optimiser's state is there from the second step on."""
    model = trial.seat()
    trial.run()
    trial.run()
    return model


def facts(trial: Trial) -> dict[str, Any]:
    """What is known of a case without running it."""
    if trial.fleet is None:
        return {}
    model = trial.model()
    with tempfile.TemporaryDirectory(prefix="sidetune-bench-") as folder:
        file = Path(folder) / "side.safetensors"
        write_tensors(file, model.state_dict())
        artifact = file.stat().st_size
    return {
        "parameters": model.num_parameters(),
        "artifact_bytes": artifact,
        "tap_bytes": trial.tap_bytes(),
    }


def write_small_store(setting: CostSetting, folder: Path) -> Store:
    """Features of noise by the real backbone: a few batches, in a store like any other."""
    backbone = setting.build_backbone()
    samples = [f"{number:05d}@bench" for number in range(STORE_BATCHES * setting.batch)]
    keys = [view.key(sample) for sample in samples for view in reading_of(setting.frames).stored]
    record_bytes = backbone.spec.record_numel() * DTYPES[DTYPE].itemsize
    norm = backbone.norm
    plan = Plan(
        backbone.identity,
        backbone.variant,
        backbone.spec,
        DTYPE,
        None if norm is None else norm.eps,
        None if norm is None else norm_digest(norm),
        in_shards(keys, record_bytes),
    )

    def taps(number: int) -> Features:
        size, parts = setting.size, []
        for key in plan.shards[number]:
            keyed = generator(SEED, f"bench/images/{key}")
            image = torch.randn(1, 3, size, size, generator=keyed).to(backbone.device)
            parts.append(backbone(image).to("cpu", DTYPES[DTYPE]).layers)
        return Features(tuple(map(torch.cat, zip(*parts, strict=True))), backbone.spec)

    return write_store(folder, plan, taps, norm=norm)


def main() -> None:
    """Do what the command line says."""
    task, *given = sys.argv[1:]
    if task == "store":
        setting = CostSetting(**json.loads(given[0]))
        with torch_threads(setting.threads):
            write_small_store(setting, Path(given[1]))
        return
    name, fields, folder = given
    setting = CostSetting(**json.loads(fields))
    with torch_threads(setting.threads):
        case, store = CostCase.parse(name), Store.open(Path(folder)) if folder else None
        if task == "memory":
            _say({**peaks(case, setting, store), "resident_bytes": resident_bytes()})
            return
        trial = Trial(case, setting, store)
        trial.seat()
        _say(facts(trial))
        for _ in sys.stdin:
            steps = trial.run()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            _say(steps)


def _say(value: object) -> None:
    print(f"{MARK}{json.dumps(value)}", flush=True)  # noqa: T201 - read by `sidetune.bench.cost`


if __name__ == "__main__":
    main()
