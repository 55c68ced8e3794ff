"""Decoding: every kind of picture becomes the right channels, every broken one a `BadImageError` with its name."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from hf_masked.processing.decoding import MODES, BadImageError, open_image, to_channels, to_uint8_tensor


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(), mode=None if mode != "CMYK" else "CMYK")


def values(image, channels: int = 3) -> np.ndarray:
    """uint8 (channels, height, width)."""
    image = to_channels(image, channels)
    return (to_uint8_tensor(image) if isinstance(image, Image.Image) else image).numpy()


def decoded(content: bytes, channels: int = 3) -> np.ndarray:
    return values(open_image(content, "name"), channels)


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_rgb_is_untouched():
    assert np.array_equal(decoded(encoded(noise())), np.asarray(noise()).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_transparency_is_dropped_or_kept(channels):
    array = np.asarray(noise("RGBA")).transpose(2, 0, 1)
    ours = decoded(encoded(noise("RGBA")), channels)
    expected = {1: np.asarray(noise("RGBA").convert("L"))[None], 3: array[:3], 4: array}[channels]
    assert np.array_equal(ours, expected)


def test_rgb_is_opaque_in_four_channels():
    assert (decoded(encoded(noise()), 4)[3] == 255).all()


def test_gray_with_alpha_keeps_its_gray():
    image = Image.merge("LA", [noise().getchannel("R"), noise().getchannel("G")])
    for channels in (1, 3):
        assert np.array_equal(decoded(encoded(image), channels)[0], np.asarray(noise())[..., 0])


def test_palette_becomes_its_colours():
    palette = noise().quantize(16)
    assert np.array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_black_and_white_spans_the_range():
    image = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(decoded(encoded(image), 1)[0], np.eye(8, dtype=np.uint8) * 255)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind):
    colours = {"cyan": ((255, 0, 0, 0), (0, 255, 255)), "black": ((0, 0, 0, 255), (0, 0, 0))}
    for inks, rgb in colours.values():
        ours = decoded(encoded(Image.new("CMYK", (16, 16), inks), kind))
        assert np.abs(ours[:, 8, 8].astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind, channels):
    array = np.array([[0, 257, 33_153, 65_535]], dtype=np.uint16)
    ours = decoded(encoded(Image.fromarray(array), kind), channels)
    assert ours.tolist() == [[[0, 1, 129, 255]]] * channels


def test_32_bit_integers_of_16_bits_are_scaled():
    image = Image.fromarray(np.array([[0, 33_153, 65_535]], dtype=np.int32))
    assert image.mode == "I" and values(image, 1).tolist() == [[[0, 129, 255]]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("floats", "expected"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([-5.0, float("nan"), 400.0, float("inf")], [0, 0, 255, 255]),
    ],
)
def test_float_tiff_becomes_8_bits(floats, expected):
    ours = decoded(encoded(Image.fromarray(np.array([floats], dtype=np.float32)), "TIFF"), 1)
    assert ours.tolist() == [[expected]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    array = np.zeros((20, 40, 3), dtype=np.uint8)
    array[:10, :10] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(Image.fromarray(array), exif=exif)
    ours = decoded(content)
    # Orientation as the EXIF standard words it: where the stored row 0 and column 0 are in the upright picture.
    row_side, column_side = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    sides = {row_side, column_side}
    assert ours.shape == ((3, 20, 40) if orientation < 5 else (3, 40, 20))
    corner = ours[:, -10:] if "b" in sides else ours[:, :10]
    corner = corner[:, :, -10:] if "r" in sides else corner[:, :, :10]
    assert (corner == 255).all() and ours.mean() == pytest.approx(255 / 8)
    lazy = Image.open(io.BytesIO(content))
    assert np.array_equal(values(open_image(lazy, "name")), ours)


def test_upright_pillow_picture_is_not_copied():
    image = noise()
    assert open_image(image, "name") is image


def test_path_is_opened(tmp_path):
    noise().save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(values(open_image(path, "name")), values(noise()))


def test_one_pixel_is_a_picture():
    assert decoded(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1]], [[2]], [[3]]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"These are words.", "no picture"),
        (encoded(noise(), "JPEG")[:-300], "truncated"),
        (encoded(noise())[:-1000], "truncated"),
        (encoded(noise())[:20], ""),
        (declared_png(14_000, 14_000), "196000000 pixels|14000 x 14000"),
        (declared_png(20_000, 20_000), "DecompressionBomb"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "header only", "large", "bomb"],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_broken_files_are_bad_images(content, reason):
    with pytest.raises(BadImageError, match=f"^photos/7: .*({reason})") as caught:
        open_image(content, "photos/7")
    assert "0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImageError, match=r"^photos/7: FileNotFoundError"):
        open_image(tmp_path / "none.png", "photos/7")


def test_truncated_lazy_picture_is_a_bad_image():
    for use in (lambda image: open_image(image, "photos/7"), lambda image: to_channels(image, 1)):
        with pytest.raises(BadImageError, match="truncated"):
            use(Image.open(io.BytesIO(encoded(noise(), "JPEG")[:-300])))


@pytest.mark.parametrize("orientation", [b"\xff\xff\xff\xff", b"garbage" * 9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(orientation):
    content = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0" + orientation)
    assert decoded(content).shape == (3, 30, 40)


def test_exif_that_pillow_cannot_read_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda self: struct.unpack("<I", b""))
    with pytest.raises(BadImageError, match=r"^photos/7: error: unpack"):
        open_image(encoded(noise()), "photos/7")


@pytest.mark.parametrize("mode", ["LAB", "La"])
def test_mode_without_conversion_is_a_bad_image(mode):
    with pytest.raises(BadImageError, match=f"mode {mode}"):
        to_channels(Image.new(mode, (4, 3)), 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("channels", MODES)
def test_every_common_mode_converts(mode, channels):
    assert values(Image.new(mode, (4, 3)), channels).shape == (channels, 3, 4)


def test_pictures_have_no_13_channels():
    with pytest.raises(BadImageError, match="13 channels: give arrays"):
        to_channels(noise(), 13)


@pytest.mark.parametrize(
    ("shape", "channels", "axes"),
    [
        ((6, 5, 3), 3, (2, 0, 1)),
        ((3, 6, 5), 3, (0, 1, 2)),
        ((3, 5, 3), 3, (0, 1, 2)),
        ((13, 6, 5), 13, (0, 1, 2)),
        ((6, 5, 13), 13, (2, 0, 1)),
        ((6, 5, 1), 1, (2, 0, 1)),
        ((1, 1, 3), 3, (2, 0, 1)),
    ],
)
def test_arrays_with_channels_first_or_last(shape, channels, axes):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for content in (array, torch.from_numpy(array)):
        assert np.array_equal(values(content, channels), array.transpose(axes))


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (6, 5, 1)])
def test_gray_arrays_fill_all_channels(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(values(array, 3), np.stack([array.reshape(6, 5)] * 3))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((6, 5, 3)), "float64.*must be uint8"),
        (np.zeros((6, 5, 2), np.uint8), r"\(6, 5, 2\); expected .*\(3, height, width\)"),
        (np.zeros((2, 3, 6, 5), np.uint8), r"\(2, 3, 6, 5\); expected"),
        (np.zeros((3, 0, 5), np.uint8), r"\(3, 0, 5\); expected"),
        (np.zeros(7, np.uint8), r"\(7,\); expected"),
    ],
)
def test_unfit_arrays_are_bad_images(array, reason):
    with pytest.raises(BadImageError, match=reason):
        to_channels(array, 3)
