import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sidetune.data.preprocess import Preprocess, built_in_image, load_image, open_image
from sidetune.errors import ImageError, SidetuneError

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


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("moving.gif", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert (pixels(tmp_path / name) == (255, 0, 0)).all()


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
