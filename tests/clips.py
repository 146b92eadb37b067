"""Videos and animations whose every frame is one grey level, so that a decoded picture says which it is."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

CODECS = {".mp4": "libx264", ".mov": "libx264", ".avi": "mpeg4", ".mkv": "libx264", ".webm": "libvpx"}
SIDE = 48
CLIPS, LENGTH = 12, 9  # a class; frames of a clip


def grey(level: float) -> Image.Image:
    """A picture of one level, 0 to 255."""
    return Image.fromarray(np.full((SIDE, SIDE, 3), round(level), np.uint8))


def write_video(
    file: Path,
    pictures: Sequence[Image.Image],
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    group: int = 12,
) -> Path:
    """Encode pictures.

    Args:
        file: its ending names the container, and that the codec.
        pictures: of one size.
        rate: frames a second.
        times: seconds at which each is shown; None: evenly.
        group: frames from one that needs no other to the next.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unit = Fraction(1, rate) if times is None else Fraction(1, 1000)
    stamps = range(len(pictures)) if times is None else [round(1000 * seconds) for seconds in times]
    with av.open(str(file), "w") as container:
        track = container.add_stream(CODECS[file.suffix], rate=rate)
        track.width, track.height = pictures[0].size
        track.pix_fmt = "yuv420p"
        track.gop_size = group
        track.codec_context.time_base = unit
        for stamp, picture in zip(stamps, pictures, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = stamp, unit
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return file


def write_sound(file: Path) -> Path:
    """A file with sound alone."""
    with av.open(str(file), "w") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return file


def write_gif(file: Path, pictures: Sequence[Image.Image], delays: Sequence[int]) -> Path:
    """An animation; delays in milliseconds."""
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=list(delays))
    return file


def write_frames(folder: Path, pictures: Sequence[Image.Image]) -> Path:
    """A folder of frames."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03d}.png")
    return folder


def level(picture: Image.Image) -> float:
    """The mean of a picture."""
    return float(np.asarray(picture, np.float32).mean())


def picture(kind: int, number: int, time: int) -> Image.Image:
    """A square that goes right in one class and left in the other, over noise."""
    noise = np.random.default_rng([kind, number, time])
    pixels = noise.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    left = 4 * (time if kind else LENGTH - 1 - time)
    pixels[16:32, left : left + 12, kind] = 250
    return Image.fromarray(pixels)


def make_clips(root: Path) -> Path:
    """Videos, animations and folders of frames of two classes."""
    for kind, name in enumerate(("left", "right")):
        for number in range(CLIPS):
            shown = [picture(kind, number, time) for time in range(LENGTH)]
            if number % 4 == 0:
                (root / name).mkdir(parents=True, exist_ok=True)
                write_gif(root / name / f"{number:02d}.gif", shown, [80] * LENGTH)
            elif number % 4 == 1:
                write_frames(root / name / f"{number:02d}", shown)
            else:
                write_video(root / name / f"{number:02d}.{'mp4' if number % 4 == 2 else 'mkv'}", shown)
    return root
