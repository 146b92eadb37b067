"""What a store's folder must be before extraction writes to it, and what of it cannot be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sidetune.backbones.base import Backbone
from sidetune.data.pictures import Picture
from sidetune.data.views import parse_view, split_key
from sidetune.errors import RequestError, StoreError, without_remedy
from sidetune.shards import entry_path, is_written, shard_path
from sidetune.store import DTypeName, Plan, Store, read_norm

ANOTHER = "Type: fit --store OTHER, or extract --out OTHER"


def check_free(folder: Path) -> None:
    """A folder without a plan holds nothing but what a store's beginning may leave.

    Raises:
        RequestError: it holds something else.
    """
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name != "norm.safetensors")
    if others:
        raise RequestError(
            f"{folder} holds no store but {', '.join(others[:3])}{' ..' if len(others) > 3 else ''}; "
            "expected a store, an empty or a new folder. Type: fit --store NEW, or extract --out NEW"
        )


def check_plan(folder: Path, plan: Plan, backbone: Backbone, dtype: DTypeName) -> None:
    """Refuse a store as `check_backbone` does, or one of another dtype.

    Raises:
        StoreError: says what differs.
    """
    check_backbone(folder, plan, backbone)
    if plan.dtype != dtype:
        raise StoreError(
            f"{folder} holds {plan.dtype}, asked for {dtype}. Type: --set features.dtype={plan.dtype}"
        )


def check_backbone(folder: Path, plan: Plan, backbone: Backbone) -> None:
    """Refuse another backbone's store, one of another precision, or one with fewer taps.

    Raises:
        StoreError: names each field that differs.
    """
    difference = backbone.identity.difference(plan.identity)
    if difference:
        raise StoreError(
            f"{folder} holds features of another backbone; " + "; ".join(difference) + f". {ANOTHER}"
        )
    held, asked = plan.variant.precision, backbone.variant.precision
    if held != asked:
        raise StoreError(
            f"{folder} holds features computed in {held}, asked for {asked}. "
            f"Type: --set backbone.precision={held}, or fit --store OTHER, or extract --out OTHER"
        )
    lacking = [name for name in backbone.spec.names if name not in plan.spec.names]
    if lacking:
        raise StoreError(f"{folder} lacks the taps {', '.join(lacking)}. {ANOTHER}")


def possible_shards(folder: Path, plan: Plan, keys: set[str]) -> tuple[tuple[str, ...], ...]:
    """Cut the plan at the first unwritten shard that asks for samples this dataset does not have.

    Raises:
        StoreError: that shard is not at the end: it was written once and has been damaged.
    """
    unwritten = [number for number in plan.numbers if not is_written(folder, number, plan.claim(number))]
    impossible = [number for number in unwritten if not keys.issuperset(plan.shards[number])]
    if not impossible:
        return plan.shards
    first = impossible[0]
    if sum(number >= first for number in plan.numbers) > sum(number >= first for number in unwritten):
        raise StoreError(_unmendable(shard_path(folder, first)))
    return plan.shards[:first]


def check_alike(folder: Path, plan: Plan, backbone: Backbone, todo: Sequence[int]) -> None:
    """All shards of a store have the same taps."""
    if todo and backbone.spec != plan.spec:
        raise StoreError(
            f"{folder} lacks {sum(len(plan.shards[number]) for number in todo)} of these samples and cannot "
            f"be extended: it holds {len(plan.spec)} taps, the backbone reads {len(backbone.spec)}. {ANOTHER}"
        )


def norm_is_off(folder: Path, plan: Plan) -> bool:
    """Whether the final norm must be written anew."""
    try:
        read_norm(folder, plan)
    except StoreError:
        return True
    return False


def give_up(
    store: Store, damaged: Mapping[int, str], new: Sequence[int], backbone: Backbone, keys: set[str]
) -> None:
    """Take the checksum files from damaged shards, so that they count as not written.

    Raises:
        StoreError: a shard cannot be mended: its data are not all here, the backbone reads fewer taps, or
            it was written just now.
    """
    for number, defect in damaged.items():
        path = shard_path(store.folder, number)
        if number in new:
            raise StoreError(
                f"shard {path} was written just now and reads otherwise than written: disk or memory fail. "
                f"{ANOTHER} on another disk"
            )
        if not keys.issuperset(store.plan.shards[number]):
            raise StoreError(_unmendable(path))
        if backbone.spec != store.plan.spec:
            raise StoreError(
                f"{without_remedy(defect)}. It holds {len(store.plan.spec)} taps and the backbone "
                f"reads {len(backbone.spec)}, so it cannot be written anew. {ANOTHER}"
            )
    for number in damaged:
        entry_path(store.folder, number).unlink()


def other_views(folder: Path, pictures: Mapping[str, Picture]) -> dict[str, Picture]:
    """Views of these images that were not asked for and stand in the store: a shard is written as a whole."""
    if not (folder / "plan.json").exists():
        return {}
    found = {}
    for keys in Plan.read(folder).shards:
        for key in keys:
            sample, name = split_key(key)
            view = parse_view(name)
            if key not in pictures and sample in pictures and view is not None:
                found[key] = Picture(pictures[sample].file, view, sample)
    return found


def _unmendable(path: Path) -> str:
    return (
        f"shard {path} is damaged, and only the data that it was extracted from can mend it. "
        f"Type: extract that data again, or {ANOTHER.removeprefix('Type: ')}"
    )
