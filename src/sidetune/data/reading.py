"""What is stored of a sample, and what of that a network reads at once.

Of an image both are its views: one is read at a time. Of a clip some frames are stored, evenly spaced, and
a network reads fewer of them at once, a *sampling*: one frame out of each of as many equal parts of the
clip's time (the segments of Wang et al., Temporal Segment Networks, ECCV 2016). The evenly spaced sampling
is what is scored; training draws one of many at every step, which costs nothing: their frames are stored.
Where a clip's pictures are read as three squares, a sampling is of one of them, and all three are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sidetune.data.clips import Frame, Span, Square
from sidetune.data.views import PLAIN, AnyView
from sidetune.features import Features, Spec
from sidetune.keyed import generator


@dataclass(frozen=True)
class Reading:
    """See above.

    Args:
        stored: of every sample, in the order that they are stored in.
        views: what is read at once: numbers of `stored`, ascending; the first is read where nothing is drawn.
        frames: T, how many are read at once of a clip; None: views are read one by one, of images or whole
            clips.
        scored: how many of the first views are averaged where samples are scored.
    """

    stored: tuple[AnyView, ...] = (PLAIN,)
    views: tuple[tuple[int, ...], ...] = ((0,),)
    frames: int | None = None
    scored: int = 1

    @classmethod
    def of_images(cls, views: Sequence[AnyView] = (PLAIN,), *, averaged: bool = False) -> Reading:
        """Of images, the image itself first.

        Args:
            views: of every image.
            averaged: all of them are scored.
        """
        one_by_one = tuple((number,) for number in range(len(views)))
        return cls(tuple(views), one_by_one, None, len(views) if averaged else 1)

    @classmethod
    def of_clips(
        cls,
        frames: int,
        stored: int,
        *,
        drawn: int,
        scored: int = 1,
        squares: Sequence[Square | None] = (None,),
    ) -> Reading:
        """Of clips.

        Args:
            frames: T, how many a network reads at once.
            stored: how many are stored, no fewer.
            drawn: samplings beside the scored ones that training draws from; fewer where there are no more.
            scored: samplings that are averaged: evenly spaced, each a little later in its parts.
            squares: of the pictures, each stored; what is drawn takes them in turn.
        """
        assert 1 <= frames <= stored and scored >= 1, (frames, stored, scored)
        even = [
            _behind(turn * stored, _even(frames, stored, (shift + 0.5) / scored))
            for turn in range(len(squares))
            for shift in range(scored)
        ]
        more = [
            _behind(number % len(squares) * stored, _drawn(frames, stored, number)) for number in range(drawn)
        ]
        views = tuple(dict.fromkeys([*even, *more]))
        kept = len(dict.fromkeys(even))
        pictures = tuple(Frame(number, stored, square) for square in squares for number in range(stored))
        return cls(pictures, views, frames, kept)

    @classmethod
    def of_whole_clips(cls, frames: int, scored: int = 1) -> Reading:
        """Of clips, for a backbone that reads T frames at once.

        Each sampling is stored, one record; training draws one, and all are scored.

        Args:
            frames: T.
            scored: samplings: evenly spaced, each a little later in its parts.
        """
        spans = tuple(Span(number, scored, frames) for number in range(scored))
        return cls(spans, tuple((number,) for number in range(scored)), None, scored)

    @property
    def together(self) -> int:
        """How many pictures are read at once."""
        return 1 if self.frames is None else self.frames

    @property
    def pictures(self) -> int:
        """How many pictures the backbone runs over for what is read at once."""
        first = self.stored[0]
        return first.frames if isinstance(first, Span) else self.together

    def spec(self, spec: Spec) -> Spec:
        """What a network reads, of a backbone that reads pictures."""
        return spec if self.frames is None else spec.of_clips(self.frames)

    def joined(self, features: Features) -> Features:
        """Features of samples, of those of their pictures, which follow one another."""
        return features if self.frames is None else features.of_clips(self.frames)


IMAGES = Reading()


def _even(frames: int, stored: int, place: float) -> tuple[int, ...]:
    """The stored frame at the same place of every part, a share of its length."""
    return tuple(int((part + place) * stored / frames) for part in range(frames))


def _behind(first: int, numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(first + number for number in numbers)


def _drawn(frames: int, stored: int, number: int) -> tuple[int, ...]:
    """One stored frame of every part, drawn."""
    bounds = [part * stored // frames for part in range(frames + 1)]
    draw = torch.rand(frames, generator=generator(0, f"sampling/{number}"), dtype=torch.float64).tolist()
    return tuple(
        first + int(one * (end - first)) for first, end, one in zip(bounds, bounds[1:], draw, strict=False)
    )
