"""Pictures to be decoded, and micro-batches of them, ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from sidetune.backbones.base import MICRO_BATCH
from sidetune.data.clips import Frame, Span, frames_at
from sidetune.data.preprocess import Loaded, Preprocess, load_views
from sidetune.data.views import PLAIN, AnyView, View
from sidetune.errors import ImageError

DECODERS = 4


@dataclass(frozen=True)
class Picture:
    """A view of an image file, or a frame or a span of a clip, to be decoded.

    Args:
        file: of the sample.
        view: of it.
        key: of the sample, ``path@sha256``; a crop is drawn from it.
    """

    file: Path
    view: AnyView = PLAIN
    key: str = ""


def load_pictures(of_file: Sequence[Picture], preprocess: Preprocess) -> list[Loaded | ImageError]:
    """Pictures of one file, which is decoded once, as the backbone reads them; or why it cannot be read.

    Args:
        of_file: one or more, all of one file.
        preprocess: what the backbone reads.
    """
    try:
        spans = [picture.view for picture in of_file if isinstance(picture.view, Span)]
        if spans:
            return [*_load_spans(of_file[0].file, spans, preprocess)]
        frames = [picture.view for picture in of_file if isinstance(picture.view, Frame)]
        if frames:
            return _load_frames(of_file[0].file, frames, preprocess)
        views = [
            partial(picture.view, content=picture.key.rpartition("@")[2])
            for picture in of_file
            if isinstance(picture.view, View)
        ]
        return [*load_views(of_file[0].file, preprocess, views)]
    except ImageError as error:
        return [error] * len(of_file)


def _load_frames(file: Path, frames: Sequence[Frame], preprocess: Preprocess) -> list[Loaded | ImageError]:
    """In any order, and a frame may be asked for twice."""
    at: dict[float, list[Frame]] = {}
    for frame in dict.fromkeys(frames):
        at.setdefault(frame.instant, []).append(frame)
    instants = sorted(at)
    loaded = {
        frame: Loaded(preprocess(frame(image)), False)
        for instant, image in zip(instants, frames_at(file, instants), strict=True)
        for frame in at[instant]
    }
    return [loaded[frame] for frame in frames]


def _load_spans(file: Path, spans: Sequence[Span], preprocess: Preprocess) -> Iterator[Loaded]:
    """Each as one tensor (T, 3, size, size); the file is decoded once."""
    instants = sorted({instant for span in spans for instant in span.instants})
    shown = zip(instants, frames_at(file, instants), strict=True)
    at = {instant: preprocess(image) for instant, image in shown}
    for span in spans:
        yield Loaded(torch.stack([at[instant] for instant in span.instants]), False)


def by_file(shown: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Pictures of one file that follow one another."""
    return (list(group) for _, group in groupby(shown, key=lambda picture: picture.file))


def pictures(files: Sequence[Path], keys: Sequence[str], chosen: Sequence[AnyView]) -> list[Picture]:
    """Every view of every file, the views of a file side by side."""
    return [Picture(file, view, key) for file, key in zip(files, keys, strict=True) for view in chosen]


def decoded(
    pictures: Sequence[Picture],
    preprocess: Preprocess,
    pool: ThreadPoolExecutor,
    animated: list[Path] | None = None,
    *,
    call_size: int | None = None,
    together: int = 1,
) -> Iterator[tuple[int, Tensor, dict[int, str]]]:
    """Micro-batches of preprocessed pictures, the next one decoded while this one is used.

    A file's pictures that follow one another are decoded together where a batch holds them. A batch of clips
    has few files, so that several batches are decoded ahead, or decoders would stand still.

    Args:
        pictures: to decode.
        preprocess: what the backbone reads.
        pool: decodes.
        animated: the files of which only the first frame or page is used are added to it, in any order.
        call_size: pictures, or spans, of a batch; None: about `MICRO_BATCH`.
        together: pictures that follow one another and are in one batch, whatever its size.

    Yields:
        The first picture's index, images (b, 3, size, size) or spans (b, T, 3, size, size), and slot ->
        reason for each that could not be decoded (its pixels are zero).
    """

    def begun(batch: Sequence[Picture]) -> list[Future[list[Loaded | ImageError]]]:
        return [pool.submit(load_pictures, of_file, preprocess) for of_file in by_file(batch)]

    size = batch_size(pictures, call_size, together)
    batches = [pictures[first : first + size] for first in range(0, len(pictures), size)]
    files = len(list(by_file(batches[0]))) if batches else 1
    depth = -(-DECODERS // files)
    waiting = iter(batches)
    ahead = deque(map(begun, islice(waiting, depth)))
    for index, batch in enumerate(batches):
        current = [item for future in ahead.popleft() for item in future.result()]
        ahead.extend(map(begun, islice(waiting, depth - len(ahead))))
        bad = {slot: item.reason for slot, item in enumerate(current) if isinstance(item, ImageError)}
        view = batch[0].view
        shape = (view.frames, 3) if isinstance(view, Span) else (3,)
        blank = torch.zeros(*shape, preprocess.size, preprocess.size)
        images = torch.stack([blank if isinstance(item, ImageError) else item.pixels for item in current])
        if animated is not None:
            of_batch = zip(batch, current, strict=True)
            animated += [one.file for one, item in of_batch if isinstance(item, Loaded) and item.animated]
        yield index * size, images, bad


def batch_size(pictures: Sequence[Picture], call_size: int | None = None, together: int = 1) -> int:
    """Pictures of a batch: whole clips of their frames, where a call's size is not exceeded by that.

    A span, which is one of a call's size, counts as its frames among `MICRO_BATCH`.

    Args:
        pictures: all of them.
        call_size: pictures, or spans, that a batch should have; None: about `MICRO_BATCH`.
        together: pictures that follow one another and are in one batch, whatever its size.
    """
    view = pictures[0].view if pictures else PLAIN
    if isinstance(view, Span):
        return call_size or max(1, MICRO_BATCH // view.frames)
    frames = len(next(by_file(pictures), [])) if isinstance(view, Frame) else together
    if call_size is not None and 0 < len(pictures) <= call_size:
        return len(pictures)
    if call_size is None:
        return -(-MICRO_BATCH // frames) * frames
    whole = frames if frames <= call_size else together
    return max(1, call_size // whole) * whole
