import importlib
import os
import pickle
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sidetune.data.dataset import sample_key
from sidetune.data.preprocess import Preprocess, built_in_image, load_image, load_noted, open_image
from sidetune.errors import ImageError, SidetuneError

MODULE = importlib.import_module("sidetune.data.preprocess")
HALVES = np.zeros((20, 30), dtype=np.uint8)
HALVES[:, 15:] = 200


def pixels(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1", "RGB", "YCbCr"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    values = HALVES if mode != "1" else np.where(HALVES > 0, 255, 0).astype(np.uint8)
    file = tmp_path / "image.tif"
    Image.fromarray(values).convert("RGB").convert(mode).save(file)
    with Image.open(file) as stored:
        assert stored.mode == mode
    np.testing.assert_allclose(pixels(file), np.repeat(values[..., None], 3, -1), atol=2)


def test_colours_of_a_palette_survive(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 60)).quantize(4)
    image.save(tmp_path / "palette.png")
    assert (pixels(tmp_path / "palette.png") == (200, 30, 60)).all()


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str, dtype: type) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(dtype)
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(file)
    expected = np.rint(values / 257)
    assert len(np.unique(expected)) == 256
    np.testing.assert_array_equal(pixels(file), np.repeat(expected[..., None], 3, -1))


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ImageError, match="32-bit pixels from 70000 to 70000, expected 0 to 65535"):
        open_image(tmp_path / "wide.tif")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="float pixels"):
        open_image(tmp_path / "float.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "clear.png"
    if mode in ("P", "L"):  # one index, or one grey value, is transparent
        values = np.array([[0, 255]], dtype=np.uint8)
        Image.fromarray(values).convert(mode).save(file, transparency=0)
        assert pixels(file).tolist() == [[[255, 255, 255], [255, 255, 255]]]
    else:
        image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 128))
        image.putpixel((2, 0), (0, 0, 0, 255))
        image.convert(mode).save(file)
        assert pixels(file)[0, :, 0].tolist() == [255, 127, 0]


def test_a_palette_with_alpha_a_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "alpha.png", transparency=bytes([0, 255]))
    assert pixels(tmp_path / "alpha.png").tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(HALVES).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "turned.png")[..., 0], np.rot90(HALVES, -1))


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (1, HALVES),
        (2, HALVES[:, ::-1]),
        (3, np.rot90(HALVES, 2)),
        (4, HALVES[::-1]),
        (5, HALVES.T),
        (6, np.rot90(HALVES, -1)),
        (7, np.rot90(HALVES, 2).T),
        (8, np.rot90(HALVES)),
        (99, HALVES),
    ],
)
def test_every_exif_rotation(tmp_path: Path, turn: int, expected: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("turned.png", "turned.jpg", "turned.tif", "turned.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(HALVES).save(tmp_path / name, exif=exif, **options)
        np.testing.assert_allclose(pixels(tmp_path / name)[..., 0], expected, atol=3)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame_and_says_so(tmp_path: Path, suffix: str) -> None:
    file, still = tmp_path / f"moving.{suffix}", tmp_path / f"still.{suffix}"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    frames[0].save(still, **options)
    assert (pixels(file) == (255, 0, 0)).all()
    assert load_noted(file, Preprocess(size=4)).animated
    assert not load_noted(still, Preprocess(size=4)).animated


def test_a_second_frame_that_is_damaged_does_not_spoil_the_first(tmp_path: Path) -> None:
    frames = [Image.effect_noise((32, 32), 80) for _ in range(2)]
    file = tmp_path / "cut.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    whole = file.read_bytes()
    first = pixels(file)
    for length in (len(whole) * 5 // 8, len(whole) * 6 // 8, len(whole) - 20):
        file.write_bytes(whole[:length])
        np.testing.assert_array_equal(pixels(file), first)


def test_a_phones_second_picture_is_no_frame(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    with Image.open(tmp_path / "phone.jpg") as stored:
        assert (stored.format, stored.n_frames) == ("MPO", 2)
    assert not load_noted(tmp_path / "phone.jpg", Preprocess(size=4)).animated
    assert abs(pixels(tmp_path / "phone.jpg").astype(int) - (255, 0, 0)).max() < 5


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, depth: int, kind: int, *extra: bytes) -> bytes:
    """A PNG as Pillow does not write it: any depth, colour type and chunks; values as (height, width, ..)."""
    order = values.astype(f">u{max(1, depth // 8)}")
    rows = b"".join(b"\0" + row.tobytes() for row in order)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), depth, kind, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_sixteen_bits_a_colour_and_sixteen_bit_alpha(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    grey = np.array([[0, 51 * 257, 65535]])
    file.write_bytes(png(np.stack([grey] * 3, -1), 16, 2))
    assert pixels(file)[0, :, 0].tolist() == [0, 51, 255]
    half = np.full_like(grey, 128 * 257)
    file.write_bytes(png(np.stack([grey, half], -1), 16, 4))  # grey and alpha
    found = pixels(file)[0, :, 0]
    np.testing.assert_allclose(found, [127, 153, 255], atol=1)
    file.write_bytes(png(np.stack([grey, grey, grey, half], -1), 16, 6))
    np.testing.assert_array_equal(pixels(file)[0, :, 0], found)


def test_the_transparent_value_of_a_deep_grey_and_of_a_colour_image(tmp_path: Path) -> None:
    file = tmp_path / "clear.png"
    file.write_bytes(png(np.array([[0, 257, 514]]), 16, 0, chunk(b"tRNS", struct.pack(">H", 257))))
    assert pixels(file)[0, :, 0].tolist() == [0, 255, 2]
    colours = np.array([[[1, 2, 3], [4, 5, 6]]])
    file.write_bytes(png(colours, 8, 2, chunk(b"tRNS", struct.pack(">HHH", 4, 5, 6))))
    assert pixels(file).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_a_pixel_span_black_to_white(tmp_path: Path, bits: int) -> None:
    row = np.array([[0x1B if bits == 2 else 0x0F]])
    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" + row.astype(np.uint8).tobytes()))
    (tmp_path / "few.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")
    )
    expected = [0, 85, 170, 255] if bits == 2 else [0, 255]
    assert pixels(tmp_path / "few.png")[0, :, 0].tolist() == expected


def test_portable_grey_and_colour_maps_of_sixteen_bits(tmp_path: Path) -> None:
    grey = np.array([[0, 51 * 257, 65535]], dtype=">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 65535\n" + grey.tobytes())
    (tmp_path / "deep.ppm").write_bytes(b"P6 3 1 65535\n" + np.repeat(grey[..., None], 3, -1).tobytes())
    for name in ("deep.pgm", "deep.ppm"):
        assert pixels(tmp_path / name)[0, :, 0].tolist() == [0, 51, 255]


def test_photographs_of_printers_and_of_the_web(tmp_path: Path) -> None:
    """CMYK as Adobe writes it has its values inverted: Pillow turns them back where it is marked so."""
    image = Image.fromarray(np.stack([HALVES, HALVES // 2, 255 - HALVES], -1))
    image.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()
    image.save(tmp_path / "web.jpg", quality=95, progressive=True)
    for name in ("print.jpg", "web.jpg"):
        found = pixels(tmp_path / name)[:, [2, -3]]
        np.testing.assert_allclose(found, np.asarray(image)[:, [2, -3]], atol=8)


def test_the_bytes_decide_what_it_is_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    assert (pixels(tmp_path / "named.jpg") == (10, 20, 30)).all()


def test_postscript_is_not_run_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript, which runs it."""
    Image.new("RGB", (4, 4)).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "photo.jpg")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with Image.open(tmp_path / "photo.jpg") as program, pytest.raises(Exception, match="exit status"):
        program.load()
    assert (tmp_path / "was-run").exists(), "Pillow alone runs it"
    (tmp_path / "was-run").unlink()
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "photo.jpg")
    assert caught.value.reason == "PostScript, which is a program and is not run: convert it to PNG"
    assert not (tmp_path / "was-run").exists()


def test_what_phones_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(ImageError, match="HEIC, which is not read: convert it to JPEG"):
        open_image(tmp_path / "phone.jpg")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "pipe.png")
    assert caught.value.reason == "a pipe, a socket or a device, not a file"
    with pytest.raises(OSError, match=r"pipe\.png is a pipe, a socket or a device, not a file"):
        sample_key(Path("pipe.png"), tmp_path / "pipe.png")


def test_a_long_line_of_pixels_is_not_blown_up(tmp_path: Path) -> None:
    """1 x 60,000 pixels would become 224 x 13 million before the middle is cut out."""
    Image.new("L", (1, 60_000)).save(tmp_path / "line.png")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "line.png", Preprocess(resize="crop"))
    assert caught.value.reason == (
        "1 x 60000 pixels: too long and narrow to crop its middle. Remove it, or type: "
        "--set backbone.resize=squash"
    )
    assert load_image(tmp_path / "line.png", Preprocess(size=8)).shape == (3, 8, 8)
    assert Preprocess(resize="crop").num_resized(300, 100) == 224 * 672
    assert Preprocess(size=8).num_resized(300, 100) == 64


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    monkeypatch.setattr(MODULE, "LARGE", 300)
    with ThreadPoolExecutor(2) as pool:
        with MODULE._LARGE:
            waiting = pool.submit(load_image, tmp_path / "large.png", Preprocess(size=8))
            pool.submit(load_image, tmp_path / "small.png", Preprocess(size=8)).result(timeout=10)
            assert not waiting.done()
        assert waiting.result(timeout=10).shape == (3, 8, 8)
    assert not MODULE._LARGE.locked()
    (tmp_path / "large.png").write_bytes((tmp_path / "large.png").read_bytes()[:50])
    with pytest.raises(ImageError):
        load_image(tmp_path / "large.png", Preprocess(size=8))
    assert not MODULE._LARGE.locked()


def test_no_memory_left_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(MODULE, "to_rgb", full)
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    with pytest.raises(ImageError, match="needs more memory than there is"):
        open_image(tmp_path / "image.png")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_of_text_is_refused_before_it_is_unpacked(tmp_path: Path, kind: bytes) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    head = b"c\0\1\0\0\0" if kind == b"iTXt" else b"c\0\0"
    (tmp_path / "bomb.png").write_bytes(png(np.zeros((4, 4)), 8, 0, chunk(kind, head + bomb)))
    tracemalloc.start()
    with pytest.raises(ImageError, match="Decompressed data too large"):
        open_image(tmp_path / "bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_missing_file_and_a_folder_are_image_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file") as caught:
        open_image(tmp_path / "absent.png")
    assert caught.value.reason == "No such file or directory"
    assert str(caught.value).count("absent.png") == 1
    with pytest.raises(ImageError, match="Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"hello, no image here", "not an image that Pillow reads")],
)
def test_files_without_an_image(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "odd.jpg")
    assert caught.value.reason == reason
    assert isinstance(caught.value, SidetuneError)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_truncated_file_is_an_image_error(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(file)
    whole = file.read_bytes()
    for length in (len(whole) // 8, len(whole) // 2, len(whole) - 300):
        file.write_bytes(whole[:length])
        with pytest.raises(ImageError):
            open_image(file)


def test_the_reason_of_a_truncated_file(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 80).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "cut.jpg")
    assert caught.value.reason == "damaged or cut short"


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)  # 200 Mpx, one bit each
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    png += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "bomb.png")
    assert caught.value.reason == "too large: more than 179 Mpx"


def test_between_pillows_warning_and_its_error_an_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (12, 12)).save(tmp_path / "large.png")
    Image.new("RGB", (15, 15)).save(tmp_path / "larger.png")
    assert open_image(tmp_path / "large.png").size == (12, 12)  # warnings are errors in tests
    with pytest.raises(ImageError, match="too large"):
        open_image(tmp_path / "larger.png")
    assert Image.MAX_IMAGE_PIXELS == 100


def test_an_image_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a/b.png"), "the file is empty")))
    assert (error.path, error.reason, str(error)) == (
        Path("a/b.png"),
        "the file is empty",
        "a/b.png: the file is empty",
    )


def test_squash_sees_the_whole_image_and_crop_its_centre() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))  # the middle third
    plain = {"size": 30, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    squashed = Preprocess(resize="squash", **plain)(image)
    assert squashed.shape == (3, 30, 30)
    assert squashed.dtype == torch.float32
    torch.testing.assert_close(squashed.mean(), torch.tensor(1 / 3), atol=0.01, rtol=0)
    cropped = Preprocess(resize="crop", **plain)(image)
    assert cropped.shape == (3, 30, 30)
    assert cropped[..., 2:-2].min() == 1.0
    tall = Preprocess(resize="crop", crop_fraction=0.5, **plain)(image.rotate(90, expand=True))
    assert tall.shape == (3, 30, 30)
    assert tall.min() == 1.0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(64, 91), (200, 77), (31, 31)])
@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.9])
def test_agrees_with_torchvisions_own_transforms(
    interpolation: str, shape: tuple[int, int], fraction: float
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    mode = v2.InterpolationMode(interpolation)
    ending = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    crop = v2.Compose(
        [v2.PILToTensor(), v2.Resize(int(56 / fraction), mode, antialias=True), v2.CenterCrop(56), *ending]
    )
    squash = v2.Compose([v2.PILToTensor(), v2.Resize((56, 56), mode, antialias=True), *ending])
    ours = Preprocess(size=56, resize="crop", crop_fraction=fraction, interpolation=interpolation)
    assert torch.equal(ours(image), crop(image))
    assert torch.equal(ours.model_copy(update={"resize": "squash"})(image), squash(image))


def test_load_image_is_open_then_preprocess(image_folder: Path) -> None:
    file, preprocess = image_folder / "class0" / "0000.png", Preprocess(size=28)
    assert torch.equal(load_image(file, preprocess), preprocess(open_image(file)))


def test_preprocess_round_trips_and_refuses_unknown_fields() -> None:
    preprocess = Preprocess(size=98, resize="crop", crop_fraction=0.9, mean=(0.5, 0.4, 0.3))
    again = Preprocess.model_validate_json(preprocess.model_dump_json())
    assert again == preprocess
    with pytest.raises(ValueError, match="sizes"):
        Preprocess(sizes=98)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Preprocess(crop_fraction=1.5)


def test_the_built_in_image_is_the_same_everywhere() -> None:
    image = built_in_image(64)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert zlib.crc32(image.tobytes()) == 3432251729
