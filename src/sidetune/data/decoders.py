"""What decodes clips: torchcodec, else PyAV, for videos; Pillow for animations and folders of frames.

Both video libraries give the same frames of a file: that which is shown at an instant. One thread decodes a
file; several files are decoded side by side.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from sidetune.data.preprocess import DECODER_ERRORS, open_image, to_rgb
from sidetune.errors import ImageError, SidetuneError

ANIMATIONS = frozenset({".gif", ".webp"})
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
STILL_OR_MOVING = ".webp"
MISSING = 0.1  # share of a file's length that may lack a frame: more, and it is cut short
PROMISED = 0.9  # share of its length by the header that a file's frames must reach
# what FFmpeg may take a file for: a playlist in a video's clothes would have it open other files
FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc,flv,asf,ogg"
UPRIGHT = (0, 11)  # the version of torchcodec that began to turn what phones write on its side
GIF_DELAY = 0.1  # seconds that viewers show a frame whose own delay is none


class _Timeline:
    """When each frame of a clip is shown.

    Args:
        starts: in any unit, ascending.
        end: of the last.
    """

    def __init__(self, starts: Sequence[float], end: float) -> None:
        self.starts, self.end = starts, max(end, starts[-1])

    def shown(self, instants: Sequence[float]) -> list[int]:
        """The number of the frame that is shown at each instant, a share of the whole."""
        first = self.starts[0]
        return [max(0, bisect_right(self.starts, first + one * (self.end - first)) - 1) for one in instants]


def folder_of_frames(folder: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    """Frames of a folder, in the order of `frame_files`, each shown as long as the others.

    Raises:
        ImageError: there are none, or one that is asked for cannot be read.
    """
    files = frame_files(folder)
    if not files:
        raise ImageError(
            folder, f"a folder without a frame ({' '.join(sorted({*PICTURES, STILL_OR_MOVING}))})"
        )
    for number in _Timeline(range(len(files)), len(files)).shown(instants):
        try:
            yield open_image(files[number])
        except ImageError as error:
            raise ImageError(folder, f"{files[number].name}: {error.reason}") from error


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, by name, in which 10 follows 9; WebPs if the first that opens is still."""
    visible = sorted((file for file in folder.iterdir() if not file.name.startswith(".")), key=_by_number)
    either = [file for file in visible if file.suffix.lower() == STILL_OR_MOVING]
    first = next((moves for file in either if (moves := _moves(file)) is not None), False)
    suffixes = PICTURES if first else {*PICTURES, STILL_OR_MOVING}
    return [file for file in visible if file.suffix.lower() in suffixes]


def _by_number(file: Path) -> tuple[list[str | int], str]:
    """Text and numbers of a name in turn: ``f9.png`` comes before ``f10.png``."""
    parts = re.split(r"([0-9]+)", file.name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], file.name


def _moves(file: Path) -> bool | None:
    """Whether a WebP holds several pictures; None: it cannot be opened, which whoever reads it will say."""
    try:
        with Image.open(file, formats=["WEBP"]) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, Image.DecompressionBombError, *DECODER_ERRORS):
        return None


def animation(file: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    """Frames of a GIF or a WebP, each shown as long as it says.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        with Image.open(file, formats=["GIF", "WEBP"]) as image:
            delays = [_delay(frame) for frame in ImageSequence.Iterator(image)]
            starts = np.cumsum([0.0, *delays]).tolist()
            for number in _Timeline(starts[:-1], starts[-1]).shown(instants):
                image.seek(number)
                yield to_rgb(image.copy())
    except UnidentifiedImageError as error:
        raise ImageError(file, "not an animation that Pillow reads") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError(file, "its pictures are too large") from error
    except (OSError, *DECODER_ERRORS) as error:
        raise ImageError(file, "damaged or cut short") from error


def _delay(frame: Image.Image) -> float:
    """Seconds that a frame is shown; of a WebP it is known once its pixels are."""
    if frame.format == "WEBP":
        frame.load()
    return float(frame.info.get("duration") or 0) / 1000 or GIF_DELAY


def video(file: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    """Frames of a video.

    Raises:
        ImageError: it cannot be read.
        SidetuneError: no library is installed that decodes videos.
    """
    return _library()[1](file, instants)


def decoding() -> str:
    """The library that decodes videos, with its version.

    Raises:
        SidetuneError: there is none.
    """
    return _library()[0]


Decode = Callable[[Path, Sequence[float]], Iterator[Image.Image]]


@cache
def _library() -> tuple[str, Decode]:
    reasons = []
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder  # noqa: F401

        if tuple(map(int, torchcodec.__version__.split(".")[:2])) < UPRIGHT:
            raise ImportError(f"{torchcodec.__version__} leaves turned videos on their side")
        return f"torchcodec {torchcodec.__version__}", _by_torchcodec
    except (ImportError, RuntimeError, OSError) as error:  # it is there, and the FFmpeg that it needs is not
        reasons.append(f"torchcodec: {str(error).splitlines()[0]}")
    try:
        import av
    except ImportError as error:
        reasons.append(f"av: {error}")
    else:
        return f"PyAV {av.__version__}", _by_pyav
    raise SidetuneError(
        f"clips need torchcodec or PyAV, and neither can be imported ({'; '.join(reasons)}). "
        "Type: pip install 'sidetune[video]'"
    )


def _by_torchcodec(file: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(str(file.absolute()), dimension_order="NHWC", num_ffmpeg_threads=1)
        about = decoder.metadata
        first, end = about.begin_stream_seconds, about.end_stream_seconds
        if about.num_frames_from_header != about.num_frames_from_content:
            _require_length(file, end - first, PROMISED * (about.duration_seconds_from_header or 0))
        for instant in instants:
            frame = decoder.get_frame_played_at(first + instant * (end - first))
            yield Image.fromarray(frame.data.numpy())
    except ImageError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, MemoryError) as error:
        raise ImageError(file, _reason(error)) from error


def _by_pyav(file: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    import av

    try:
        with _opened(file) as container:
            packets = _packets(file, container)
        with _opened(file) as container:
            wanted = [packets.stamps[number] for number in packets.timeline.shown(instants)]
            yield from _decoded(file, container, packets, wanted)
    except ImageError:
        raise
    except (av.FFmpegError, OSError, ValueError, TypeError, MemoryError) as error:
        raise ImageError(file, _reason(error)) from error


def _opened(file: Path) -> Any:  # noqa: ANN401 - PyAV's container
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    return av.open(str(file.absolute()), container_options=options)  # 12:30.mp4 alone would be a protocol's


@dataclass(frozen=True)
class _Packets:
    """What a file says of its frames before any is decoded.

    Args:
        stamps: when each is shown, in the track's unit, ascending.
        keys: of those that are decoded without others.
        timeline: the same.
    """

    stamps: tuple[int, ...]
    keys: tuple[int, ...]
    timeline: _Timeline


def _packets(file: Path, container: Any) -> _Packets:  # noqa: ANN401 - PyAV's container
    """Read a file's packets, which costs little beside decoding them.

    What was cut off without being encoded anew may be there, for later frames need it, and is not shown.
    """
    track = _track(file, container)
    starts: list[int] = []
    keys: list[int] = []
    hidden = end = 0
    for packet in container.demux(track):
        stamp = packet.dts if packet.pts is None else packet.pts
        if not packet.size or stamp is None:
            continue
        keys += [stamp] * packet.is_keyframe
        if packet.is_discard:
            hidden += 1
            continue
        starts.append(stamp)
        end = max(end, stamp + (packet.duration or 0))
    if not starts:
        raise ImageError(file, "damaged or cut short: it holds no frame")
    starts.sort()
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0  # of the last, where it says none
    timeline = _Timeline(starts, max(end, starts[-1] + usual))
    if len(starts) + hidden != track.frames:
        there = (timeline.end - starts[0]) * float(track.time_base)
        _require_length(file, there, _promised(container, track))
    return _Packets(tuple(starts), tuple(sorted(keys)), timeline)


def _require_length(file: Path, there: float, promised: float) -> None:
    """Seconds of pictures that are there, and that the header promises at least."""
    if there < promised:
        raise ImageError(
            file, f"cut short: pictures end after {there:.1f} s, expected {promised:.1f} s or more"
        )


def _promised(container: Any, track: Any) -> float:  # noqa: ANN401 - PyAV's container and its track
    """Seconds that a whole file's pictures last at least, by its header. Sound may go on without them."""
    if track.duration:
        return PROMISED * float(track.duration * track.time_base)
    alone = len(container.streams) == 1
    return (PROMISED if alone else PROMISED / 2) * (container.duration or 0) / 1e6


def _track(file: Path, container: Any) -> Any:  # noqa: ANN401 - PyAV's container and its track
    from av.stream import Disposition

    tracks = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not tracks:
        raise ImageError(file, "has no moving pictures: sound alone, or a cover")
    tracks[0].thread_count = 1
    return tracks[0]


def _decoded(
    file: Path,
    container: Any,  # noqa: ANN401 - PyAV's container
    packets: _Packets,
    wanted: Sequence[int],
) -> Iterator[Image.Image]:
    """The frames that are shown at some stamps, ascending; what is far ahead is reached by its key frame."""
    track = _track(file, container)
    frames = container.decode(track)
    shown, ahead = None, next(frames, None)
    for stamp in wanted:
        before = bisect_right(packets.keys, stamp)
        key = packets.keys[before - 1] if before else packets.stamps[0]
        if ahead is not None and key > _stamp(ahead):
            container.seek(key, stream=track)
            frames = container.decode(track)
            shown, ahead = None, next(frames, None)
        while ahead is not None and (shown is None or _stamp(ahead) <= stamp):
            shown, ahead = ahead, next(frames, None)
        length = packets.timeline.end - packets.stamps[0]
        if shown is None or stamp - _stamp(shown) > MISSING * length:
            there = 0.0 if shown is None else (_stamp(shown) - packets.stamps[0]) / length
            raise ImageError(file, f"damaged or cut short: no frame can be decoded after {there:.0%} of it")
        yield _upright(shown)


def _upright(frame: Any) -> Image.Image:  # noqa: ANN401 - PyAV's frame
    """A frame as it is to be seen: turned, or mirrored and turned."""
    image: Image.Image = frame.to_image()
    given = next((one for one in frame.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if given is not None:
        a, b, _, c, d = struct.unpack("=5i", bytes(given)[:20])
        if a * d < b * c:
            image = ImageOps.flip(image)
    return image.rotate(frame.rotation, expand=True)


def _stamp(frame: Any) -> int:  # noqa: ANN401 - PyAV's frame
    """When a frame is shown, in the track's unit."""
    return int(frame.dts if frame.pts is None else frame.pts)


def _reason(error: Exception) -> str:
    """What a library says, on one line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return f"not a video that is read, or damaged ({text})"
