import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
from PIL import Image

from clips import grey, level, write_frames, write_gif, write_sound, write_video
from sidetune.data import decoders
from sidetune.data.clips import CLIP_SUFFIXES, Frame, frames_at, is_clip, middle_frame
from sidetune.data.dataset import sample_key
from sidetune.data.decoders import frame_files
from sidetune.data.folders import list_images
from sidetune.data.preprocess import open_image
from sidetune.errors import DataError, ImageError, SidetuneError

LEVELS = [20 + 10 * number for number in range(20)]
NEAR = 4.0  # levels that coding may cost
MIDDLES = [Frame(number, 5).instant for number in range(5)]  # of five parts of four frames each


def made(path):
    pictures = list(map(grey, LEVELS))
    if path.suffix == ".gif":
        return write_gif(path, pictures, [100] * len(pictures))
    return write_video(path, pictures) if path.suffix else write_frames(path, pictures)


def levels(file, instants=MIDDLES):
    return [level(picture) for picture in frames_at(file, instants)]


def reason(file, instants=MIDDLES):
    with pytest.raises(ImageError) as caught:
        levels(file, instants)
    assert caught.value.path == file
    return caught.value.reason


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.avi", "a.mkv", "a.webm", "a.gif", "frames"])
def test_pictures_are_those_shown_in_the_middle_of_each_part(tmp_path, name):
    file = made(tmp_path / name)
    assert is_clip(file)
    assert levels(file) == pytest.approx([LEVELS[number] for number in (2, 6, 10, 14, 18)], abs=NEAR)
    assert level(middle_frame(file)) == pytest.approx(LEVELS[10], abs=NEAR)


@pytest.mark.parametrize("rate", [5, 24, 60])
def test_a_clip_of_another_rate_shows_the_same(tmp_path, rate):
    """Two seconds that grow lighter, however many frames they have."""
    pictures = [grey(20 + 200 * (number + 0.5) / (2 * rate)) for number in range(2 * rate)]
    found = levels(write_video(tmp_path / "a.mp4", pictures, rate=rate))
    assert found == pytest.approx([20 + 200 * instant for instant in MIDDLES], abs=NEAR + 100 / (2 * rate))


@pytest.mark.parametrize("name", ["a.mkv", "a.gif", "a.webp"])
def test_frames_that_stand_unevenly_in_time_count_as_long_as_they_are_shown(tmp_path, name):
    """Nine frames in the first second, the tenth for nine seconds."""
    delays = [111] * 9 + [9000]
    pictures = list(map(grey, LEVELS[:10]))
    if name != "a.mkv":
        file = write_gif(tmp_path / name, pictures, delays)
    else:
        times = [sum(delays[:number]) / 1000 for number in range(10)]
        file = write_video(tmp_path / name, [*pictures, pictures[-1]], times=[*times, 9.9])
    assert levels(file) == pytest.approx([LEVELS[9]] * 5, abs=NEAR)
    assert levels(file, [0.0, 0.05]) == pytest.approx([LEVELS[0], LEVELS[4]], abs=NEAR)


def test_a_clip_of_one_frame_shows_it_at_every_instant(tmp_path):
    for name in ("a.mp4", "a.avi", "a.webm"):
        assert levels(write_video(tmp_path / name, [grey(90)])) == pytest.approx([90] * 5, abs=NEAR)
    assert levels(write_frames(tmp_path / "frames", [grey(90)])) == pytest.approx([90] * 5)


def test_what_is_far_ahead_is_sought_and_is_the_same(tmp_path, monkeypatch):
    pictures = [grey(20 + number) for number in range(200)]
    file = write_video(tmp_path / "a.mp4", pictures, group=10)
    decoded, stamp = [], decoders._stamp
    monkeypatch.setattr(decoders, "_stamp", lambda frame: decoded.append(frame.pts) or stamp(frame))
    found = levels(file)
    assert found == pytest.approx([20 + number for number in (20, 60, 100, 140, 180)], abs=NEAR)
    assert len(set(decoded)) < 60, "of 200"
    alone = [levels(file, [instant])[0] for instant in MIDDLES]
    assert alone == found


def test_a_turned_clip_stands_upright(tmp_path):
    """Phones write the picture as the sensor lies, and how it is to be turned."""
    file = tmp_path / "a.mp4"
    left_white = grey(20)
    left_white.paste(grey(230).crop((0, 0, 24, 48)), (0, 0))
    write_video(file, [left_white] * 3)
    content = bytearray(file.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # the matrix of the track header, version 0
    one = (1 << 16).to_bytes(4, "big")
    assert content[at : at + 4] == one
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30]  # a quarter, clockwise
    content[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in turned)
    file.write_bytes(content)
    shown = middle_frame(file)
    assert level(shown.crop((0, 0, 48, 20))) > 200 and level(shown.crop((0, 28, 48, 48))) < 50


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((-1, 0, 0, 1), (24, 0, 48, 48)),  # mirrored: what was left is right
        ((1, 0, 0, -1), (0, 0, 24, 48)),
        ((0, 1, 1, 0), (0, 0, 48, 24)),
        ((0, -1, -1, 0), (0, 24, 48, 48)),
    ],
)
def test_a_mirrored_clip_is_shown_as_players_do(tmp_path, matrix, bright):
    file = tmp_path / "a.mp4"
    left_white = grey(20)
    left_white.paste(grey(230).crop((0, 0, 24, 48)), (0, 0))
    write_video(file, [left_white] * 3)
    content = bytearray(file.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (number << 16 for number in matrix)
    numbers = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    content[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    file.write_bytes(content)
    assert level(middle_frame(file).crop(bright)) > 200


def test_what_a_trim_leaves_hidden_is_not_shown(tmp_path):
    """A cut that encodes nothing anew keeps the frames before it, for later ones need them."""
    whole, cut = made(tmp_path / "a.mp4"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as given, av.open(str(cut), "w") as container:
        track = given.streams.video[0]
        other = container.add_stream_from_template(track)
        for packet in given.demux(track):
            if packet.dts is not None:
                early = 10 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - early, packet.dts - early, other
                container.mux(packet)
    assert levels(cut) == pytest.approx([LEVELS[number] for number in (11, 13, 15, 17, 19)], abs=NEAR)
    assert level(middle_frame(cut)) == pytest.approx(LEVELS[15], abs=NEAR)


def test_a_name_with_a_colon_is_no_address(tmp_path, monkeypatch):
    made(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert levels(Path("12:30.mp4")) == levels(tmp_path / "12:30.mp4")


def test_bad_files_say_why(tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert reason(empty) == "the file is empty"
    assert reason(tmp_path / "none.mp4") == "there is no such file"
    text = tmp_path / "text.mp4"
    text.write_text("no video at all\n" * 100)
    assert reason(text).startswith("not a video that is read, or damaged (")
    assert reason(write_sound(tmp_path / "sound.mp4")) == "has no moving pictures: sound alone, or a cover"
    (tmp_path / "folder").mkdir()
    assert reason(tmp_path / "folder").startswith("a folder without a frame (.bmp .jpeg")
    gif = tmp_path / "text.gif"
    gif.write_text("no animation")
    assert reason(gif) == "not an animation that Pillow reads"


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_clip_that_is_cut_short_is_refused_or_whole(tmp_path, name, share):
    """What is read of a cut file shows what the whole one shows, at every instant that is asked for."""
    pictures = [grey(40 + number) for number in range(150)]
    file = write_video(tmp_path / name, pictures)
    whole = levels(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    try:
        found = levels(file)
    except ImageError:
        return
    assert found == pytest.approx(whole, abs=NEAR + 15)


def test_a_frame_in_a_folder_that_cannot_be_read_is_named(tmp_path):
    folder = write_frames(tmp_path / "frames", list(map(grey, LEVELS)))
    (folder / "010.png").write_bytes(b"")
    assert reason(folder) == "010.png: the file is empty"
    assert len(levels(folder, [0.0, 0.9])) == 2


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, shown in enumerate(LEVELS):
        grey(shown).save(folder / f"shot2_{number}.png")
    assert levels(folder) == pytest.approx([LEVELS[number] for number in (2, 6, 10, 14, 18)])


def test_still_webps_are_frames_and_moving_ones_are_clips(tmp_path):
    (tmp_path / "still").mkdir()
    for number, shown in enumerate(LEVELS):
        grey(shown).save(tmp_path / "still" / f"{number}.webp", lossless=True)
    assert is_clip(tmp_path / "still") and len(frame_files(tmp_path / "still")) == len(LEVELS)
    assert levels(tmp_path / "still", [0.0, 0.5]) == pytest.approx([LEVELS[0], LEVELS[10]], abs=1)
    (tmp_path / "moving").mkdir()
    write_gif(tmp_path / "moving" / "a.webp", list(map(grey, LEVELS)), [100] * len(LEVELS))
    assert not is_clip(tmp_path / "moving") and is_clip(tmp_path / "moving" / "a.webp")
    (tmp_path / "still" / "0.webp").write_bytes(b"")
    assert reason(tmp_path / "still", [0.0]) == "0.webp: the file is empty"
    (tmp_path / "moving" / "0.webp").write_bytes(b"")
    assert not is_clip(tmp_path / "moving"), "the first that opens says what they are"


def test_a_clip_of_webp_frames_is_listed_once(tmp_path):
    for number in range(3):
        file = tmp_path / "a" / "one" / f"{number}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey(9).save(file, lossless=True)
    write_gif(tmp_path / "a" / "two.gif", [grey(1), grey(2)], [100, 100])
    found = [tmp_path / "a" / "one", tmp_path / "a" / "two.gif"]
    assert list_images([tmp_path], clips=True) == found
    assert list_images([tmp_path / "a" / "one"], clips=True) == found[:1]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").touch()
    with pytest.raises(
        DataError, match=r"none is a folder without a clip \(.*\.mp4.* Type: sidetune predict"
    ):
        list_images([tmp_path / "none"], clips=True)


def test_an_animation_of_giant_pictures_is_refused(tmp_path):
    file = made(tmp_path / "a.gif")
    content = bytearray(file.read_bytes())
    content[6:10] = (60_000).to_bytes(2, "little") * 2
    file.write_bytes(content)
    assert reason(file) == "its pictures are too large"


def test_pictures_that_end_before_the_header_says_are_refused(tmp_path):
    decoders._require_length(tmp_path, 8.7, 8.6)
    with pytest.raises(ImageError, match=r"cut short: pictures end after 0.6 s, expected 8.6 s or more"):
        decoders._require_length(tmp_path, 0.6, 8.6)


def test_torchcodec_refuses_what_is_cut_short(tmp_path):
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError))
    file = write_video(tmp_path / "a.avi", [grey(40 + number) for number in range(150)])
    assert len(list(decoders._by_torchcodec(file, MIDDLES))) == len(MIDDLES)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="avi: cut short: pictures end after"):
        list(decoders._by_torchcodec(file, MIDDLES))


def test_a_playlist_in_a_videos_clothes_opens_no_other_file(tmp_path):
    other = made(tmp_path / "other.mkv")
    playlist = tmp_path / "a.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n")
    assert "not a video that is read" in reason(playlist)
    playlist.write_text(f"ffconcat version 1.0\nfile {other.name}\n")
    assert "not a video that is read" in reason(playlist)


def test_without_a_library_it_says_what_to_type(tmp_path, monkeypatch):
    file = made(tmp_path / "a.mp4")
    decoders._library.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    assert decoders.decoding() == f"PyAV {av.__version__}"
    decoders._library.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SidetuneError, match=r"Type: pip install 'sidetune\[video\]'"):
        levels(file)
    assert len(levels(made(tmp_path / "a.gif"))) == 5, "which Pillow reads"


def test_a_torchcodec_that_leaves_phone_videos_on_their_side_is_not_taken(monkeypatch):
    package, part = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.__version__, package.decoders, part.VideoDecoder = "0.10.2+cpu", part, None
    for name, module in (("torchcodec", package), ("torchcodec.decoders", part)):
        monkeypatch.setitem(sys.modules, name, module)
    decoders._library.cache_clear()
    assert decoders.decoding() == f"PyAV {av.__version__}"
    package.__version__ = "0.11.0+cpu"
    decoders._library.cache_clear()
    assert decoders.decoding() == "torchcodec 0.11.0+cpu"
    decoders._library.cache_clear()


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.webm"])
def test_a_video_among_images_says_how_clips_are_asked_for(tmp_path, name):
    with pytest.raises(ImageError, match="a video, not an image: for clips type --frames 8"):
        open_image(made(tmp_path / name))


def test_squares_lie_along_the_longer_side():
    y, x = np.mgrid[:4, :10]
    wide = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    for image, axis in ((wide, 1), (wide.transpose(Image.Transpose.TRANSPOSE), 0)):
        for square, first in (("first", 0), ("middle", 3), ("last", 6)):
            frame = Frame(3, 16, square)
            shown = np.asarray(frame(image))
            assert shown.shape == (4, 4, 3)
            assert np.array_equal(shown, np.take(np.asarray(image), range(first, first + 4), axis))
            assert Frame.parse(frame.name) == frame and frame.name == f"frame03of16+{square}"
    assert Frame(3, 16)(wide) is wide
    assert Frame.parse("frame03of16+left") is None and Frame.parse("frame03of16+") is None


def test_names_of_frames_sort_as_frames_do():
    frames = [Frame(number, 16) for number in range(16)]
    assert [frame.name for frame in frames] == sorted(frame.name for frame in frames)
    assert frames[3].name == "frame03of16" and Frame.parse("frame03of16") == frames[3]
    assert [Frame.parse(name) for name in ("frame3of16", "frame16of16", "mirror", "")] == [None] * 4


def test_a_folder_of_frames_has_a_key_of_all_its_bytes(tmp_path):
    folder = write_frames(tmp_path / "frames", [grey(1), grey(2)])
    key = sample_key(folder.relative_to(tmp_path), folder)
    assert key.startswith("frames@") and key == sample_key(folder.relative_to(tmp_path), folder)
    grey(3).save(folder / "001.png")
    changed = sample_key(folder.relative_to(tmp_path), folder)
    (folder / "001.png").rename(folder / "002.png")
    assert len({key, changed, sample_key(folder.relative_to(tmp_path), folder)}) == 3


def test_what_is_a_clip(tmp_path):
    assert {".mp4", ".avi", ".mkv", ".webm", ".gif"} <= CLIP_SUFFIXES
    (tmp_path / "nothing").mkdir()
    assert not is_clip(tmp_path / "nothing") and not is_clip(tmp_path / "a.jpg")
    folder = write_frames(tmp_path / "frames", [grey(1), grey(2)])
    assert is_clip(folder)
    write_video(folder / "session.mp4", [grey(1)])
    assert not is_clip(folder), "its pictures may be a cover, and the video would be lost"
    animated = write_frames(tmp_path / "animated", [grey(1)])
    write_gif(animated / "0.gif", [grey(1), grey(2)], [100, 100])
    assert not is_clip(animated), "and so would an animation"
    above = write_frames(tmp_path / "above", [grey(1)])
    assert is_clip(above)
    write_frames(above / "camera", [grey(1), grey(2)])
    assert not is_clip(above) and is_clip(above / "camera"), "the picture above is a cover"
    deep = write_frames(tmp_path / "deep", [grey(1), grey(2)])
    write_frames(deep / "masks", [grey(1), grey(2)])
    write_gif(deep / "masks" / "preview.gif", [grey(1), grey(2)], [100, 100])
    assert is_clip(deep), "frames, and what belongs to them"
    write_video(deep / "day" / "camera" / "a.mp4", [grey(1)])
    assert not is_clip(deep)
