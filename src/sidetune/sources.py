"""Where a run's features come from: a store, or the backbone itself.

Both give the same thing for the same rows of a dataset, so everything after them (tap scale, ridge,
probes, the loop, scores) is one code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.backbones.base import MICRO_BATCH, Backbone
from sidetune.data.clips import Frame, Span
from sidetune.data.dataset import Dataset
from sidetune.data.pictures import DECODERS, Picture, decoded, load_pictures
from sidetune.data.reading import IMAGES, Reading
from sidetune.data.views import PLAIN
from sidetune.errors import BackboneError, ImageError, SidetuneError
from sidetune.extract import run_rounded
from sidetune.features import Features, FinalNorm, Spec
from sidetune.progress import Progress
from sidetune.reader import AHEAD, Ahead, Layout
from sidetune.store import DTYPES, DTypeName, Store
from sidetune.summary import Statistic, Summary, gathered, over_time, summarise


class Source(ABC):
    """Features of a dataset's rows.

    Attributes:
        spec: the taps it gives.
        final_norm: the backbone's, None where it has none.
        valid: (n,) bool, False where an image could not be decoded.
        skipped: row -> why it is not valid.
        reading: of every sample: what is stored, and what is read at once.
        animated: rows whose files hold more frames or pages than the first, which is the one that counts.
        ahead: batches to read ahead of their use, on a thread of their own; 0: none.
    """

    spec: Spec
    final_norm: FinalNorm | None
    valid: NDArray[np.bool_]
    skipped: dict[int, str]
    reading: Reading
    animated: tuple[int, ...]
    ahead: int = 0

    @abstractmethod
    def features(
        self, rows: Sequence[int], spec: Spec | None = None, views: Sequence[int] | int = 0
    ) -> Features:
        """Features of these rows, in this order: outside any autograd graph, on any device.

        float32 where the backbone runs, else the stored dtype.

        Args:
            rows: B rows of the dataset.
            spec: the taps to give, a subset of this source's; None: all.
            views: number of the view of each row, or of all of them; of `Reading.views`.
        """

    @abstractmethod
    def summary(self, view: int = 0) -> Summary:
        """Pooled taps of a view of every row of the dataset; rows that are not valid hold no meaning."""

    def richer(self, statistics: tuple[Statistic, ...], view: int = 0) -> Summary:
        """The same with more statistics, from one pass over the features of all rows, which is remembered.

        Args:
            statistics: that `Summary.more` holds; none: the summary as it is.
            view: of every row.
        """
        if not statistics:
            return self.summary(view)
        key = (statistics, view)
        if key not in self._richer:
            batches = self.batches(np.arange(len(self.valid)), view=view)
            parts = (summarise(batch.to("cpu"), statistics) for batch in batches)
            self._richer[key] = gathered(parts, len(self.valid))
        return self._richer[key]

    @cached_property
    def _richer(self) -> dict[tuple[tuple[Statistic, ...], int], Summary]:
        return {}

    def batches(self, rows: NDArray[np.int64], spec: Spec | None = None, view: int = 0) -> Iterator[Features]:
        """The features of a view of many rows, a micro-batch at a time, in order."""
        size = max(1, MICRO_BATCH // self.reading.pictures)
        parts = (rows[first : first + size].tolist() for first in range(0, len(rows), size))
        with Ahead(parts, partial(self.features, spec=spec, views=view), ahead=self.ahead) as batches:
            yield from batches

    def layout(self, rows: NDArray[np.int64], spec: Spec | None = None) -> Layout | None:
        """Where these rows are read of these taps; None where their order makes no difference."""
        return None


class StoredSource(Source):
    """Reads a store. Nothing of the backbone is needed.

    Args:
        store: complete.
        keys: the dataset's sample keys, in row order.
        spec: the taps to read, of a picture; None: all of the store's.
        reading: of every sample; the store holds what it asks for.

    Raises:
        StoreError: the store lacks samples.
        RequestError: the store lacks a tap.
    """

    ahead = AHEAD

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        spec: Spec | None = None,
        reading: Reading = IMAGES,
    ) -> None:
        self.store, self.reading = store, reading
        self.keys = [[view.key(key) for key in keys] for view in reading.stored]
        for view_keys in self.keys:
            store.require(view_keys)
        self.spec = reading.spec(store.plan.spec if spec is None else store.plan.spec.select(spec.names))
        self.final_norm = store.final_norm
        self.skipped = store.skipped_rows(self.keys)
        self.valid = np.array([row not in self.skipped for row in range(len(keys))], dtype=bool)
        self.animated = tuple(row for row, key in enumerate(keys) if key in store.animated)

    def features(
        self, rows: Sequence[int], spec: Spec | None = None, views: Sequence[int] | int = 0
    ) -> Features:
        """See `Source.features`."""
        chosen = [views] * len(rows) if isinstance(views, int) else views
        keys = [
            self.keys[stored][row]
            for row, view in zip(rows, chosen, strict=True)
            for stored in self.reading.views[view]
        ]
        return self.reading.joined(self.store.features(keys, self._of_pictures(spec)))

    def layout(self, rows: NDArray[np.int64], spec: Spec | None = None) -> Layout | None:
        """See `Source.layout`. The views of an image stand beside it, unless they were asked for later."""
        return self.store.layout([self.keys[0][row] for row in rows], self._of_pictures(spec))

    def summary(self, view: int = 0) -> Summary:
        """See `Source.summary`."""
        pictures = self._of_pictures(None)
        shown = self.reading.views[view]
        parts = (self.store.summary(self.keys[stored]).select(pictures) for stored in shown)
        return next(parts) if self.reading.frames is None else over_time(parts, self.spec)

    def _of_pictures(self, spec: Spec | None) -> Spec:
        """The store's taps of these names."""
        return self.store.plan.spec.select((self.spec if spec is None else spec).names)


class LiveSource(Source):
    """Decodes images and runs the backbone whenever features are asked for; nothing is stored.

    Nothing is read ahead: the backbone would take the cores or the GPU from the side that trains, and another
    thread has another number of torch threads, so its sums would be others.

    One pass over the dataset at the start measures the summary and finds images that do not decode.

    Args:
        dataset: the images.
        backbone: frozen; runs under no_grad.
        dtype: of features. A store's: then the same numbers reach the side as from one, in half the memory.
        keys: the dataset's sample keys, which crops are drawn from; needed for more views than one.
        reading: of every sample.
        quiet: no progress for the first pass.

    Raises:
        StoreError: a feature is more than the type can hold, or not finite.
    """

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        *,
        dtype: DTypeName = "fp32",
        keys: Sequence[str] | None = None,
        reading: Reading = IMAGES,
        quiet: bool = False,
    ) -> None:
        self.files = [dataset.file(row) for row in range(len(dataset))]
        self.keys = [""] * len(dataset) if keys is None else list(keys)
        drawn = reading.frames is None and reading.stored != (PLAIN,)
        assert not drawn or keys is not None, "crops are drawn from the sample keys"
        self.backbone, self.reading = backbone, reading
        self.dtype: DTypeName = dtype
        self._giving = backbone.giving(DTYPES[dtype])
        self.spec, self.final_norm = reading.spec(backbone.spec), backbone.norm
        self.skipped = {}
        self._pool = ThreadPoolExecutor(DECODERS)
        self._summaries = {0: self._pass(0, quiet)}
        if isinstance(reading.stored[0], Frame | Span):
            self._try_later_frames()
        self.valid = np.array([row not in self.skipped for row in range(len(dataset))], dtype=bool)

    def features(
        self, rows: Sequence[int], spec: Spec | None = None, views: Sequence[int] | int = 0
    ) -> Features:
        """See `Source.features`."""
        chosen = [views] * len(rows) if isinstance(views, int) else views
        pictures = [one for row, view in zip(rows, chosen, strict=True) for one in self._pictures(row, view)]
        spec = self.spec if spec is None else self.spec.select(spec.names)
        backbone, whole = self._reading(spec.names), list[Tensor]()
        for first, images, bad in self._decoded(pictures):
            for slot, reason in bad.items():
                if self.valid[rows[(first + slot) // self.reading.together]]:
                    raise SidetuneError(
                        f"{pictures[first + slot].file}: {reason}; it could be read when the run began. "
                        "Put it back, then type the same command: it resumes"
                    )
            part = self._run(backbone, images).select(spec.names).layers
            if len(images) == len(pictures):
                return Features(part, spec)
            if not whole:
                whole = [layer.new_empty(len(rows), *layer.shape[1:]) for layer in part]
            at = first // self.reading.together
            for into, layer in zip(whole, part, strict=True):
                into[at : at + len(layer)] = layer
            del part, layer  # before the next part is there, too
        return Features(tuple(whole), spec)

    def _reading(self, taps: Sequence[str]) -> Backbone:
        """The backbone with these taps alone where it can leave others out, or as it is."""
        if tuple(taps) == self.backbone.spec.names:
            return self._giving
        try:
            return self._giving.reading(taps)
        except BackboneError:
            return self._giving

    def summary(self, view: int = 0) -> Summary:
        """See `Source.summary`. Another view than the first costs a pass when it is first asked for."""
        if view not in self._summaries:
            self._summaries[view] = self._pass(view, quiet=True)
        return self._summaries[view]

    def _pictures(self, row: int, view: int) -> list[Picture]:
        shown = [self.reading.stored[stored] for stored in self.reading.views[view]]
        return [Picture(self.files[row], one, self.keys[row]) for one in shown]

    def _decoded(
        self, pictures: Sequence[Picture], animated: list[Path] | None = None
    ) -> Iterator[tuple[int, Tensor, dict[int, str]]]:
        """See `decoded`; as many at a time as the backbone asks for."""
        call_size, together = self.backbone.call_size, self.reading.together
        return decoded(
            pictures, self.backbone.preprocess, self._pool, animated, call_size=call_size, together=together
        )

    def _pass(self, view: int, quiet: bool) -> Summary:
        animated: list[Path] = []
        pictures = [one for row in range(len(self.files)) for one in self._pictures(row, view)]
        together = self.reading.together
        with Progress("features", len(pictures), "images", quiet=quiet) as progress:

            def parts() -> Iterator[Summary]:
                for first, images, bad in self._decoded(pictures, animated):
                    self.skipped |= {(first + slot) // together: reason for slot, reason in bad.items()}
                    with torch.no_grad():
                        features = run_rounded(images, self.backbone, self.dtype)
                    progress.advance(len(images))
                    yield summarise(self.reading.joined(features).to("cpu"))

            summary = gathered(parts(), len(self.files))
        frames = set(animated)
        self.animated = tuple(row for row, file in enumerate(self.files) if file in frames)
        return summary

    def _try_later_frames(self) -> None:
        """Decode what is drawn later alone: one frame that cannot be read would end the run there."""
        shown = [self.reading.stored[stored] for stored in self.reading.views[0]]
        later = [view for view in self.reading.stored if view not in shown]
        rows = [row for row in range(len(self.files)) if later and row not in self.skipped]

        def reasons(row: int) -> list[str]:
            pictures = [Picture(self.files[row], view, self.keys[row]) for view in later]
            loaded = load_pictures(pictures, self.backbone.preprocess)
            return [one.reason for one in loaded if isinstance(one, ImageError)]

        for row, found in zip(rows, self._pool.map(reasons, rows), strict=True):
            if found:
                self.skipped[row] = found[0]

    def _run(self, backbone: Backbone, images: Tensor) -> Features:
        with torch.no_grad():
            features = backbone(images).to(self.backbone.device, DTYPES[self.dtype])
            return self.reading.joined(features)
