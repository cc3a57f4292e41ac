"""Any image file becomes 8-bit sRGB or one error that names the file."""

import io
import os
import re
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from afterimage.config import AfterimageError
from afterimage.data.decode import MAX_ASPECT, decode, load_image, resize_to_cover
from some_images import png, some_image, swapped_profile


def encoded(sample_image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    sample_image.save(file, kind, **options)
    return file.getvalue()


def colour(content: bytes) -> tuple[int, ...]:
    sample_image = decode(content, "x")
    assert sample_image.mode == "RGB"
    return sample_image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("sample_image", "kind", "expected"),
    [
        (Image.new("RGB", (2, 2), (10, 20, 30)), "PNG", (10, 20, 30)),
        (Image.new("L", (2, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("I;16", (2, 2), 0x8080), "PNG", (128, 128, 128)),
        (Image.new("I;16", (2, 2), 33050), "PNG", (129, 129, 129)),  # 128.6
        (Image.new("I;16", (2, 2), 0xFFFF), "TIFF", (255, 255, 255)),
        (Image.new("I", (2, 2), 65535), "TIFF", (255, 255, 255)),
        (Image.new("F", (2, 2), 0.5), "TIFF", (128, 128, 128)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), "PNG", (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 51)), "PNG", (204, 204, 204)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_has_the_expected_colour(sample_image, kind, expected):
    assert colour(encoded(sample_image, kind)) == expected


def test_lab():
    content = encoded(Image.new("LAB", (2, 2), (255, 128, 128)), "TIFF")
    assert np.abs(np.subtract(colour(content), (255, 255, 255))).max() <= 1


def test_cmyk_jpeg():
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.subtract(colour(content), (255, 0, 0))).max() <= 2


@pytest.mark.parametrize("transparent", [0, bytes([0, 255])])
def test_palette_with_transparency_is_laid_on_white(transparent):
    sample_image = Image.new("P", (2, 1))
    sample_image.putpalette([200, 0, 0, 0, 0, 200])
    sample_image.putdata([0, 1])
    result = decode(encoded(sample_image, "PNG", transparency=transparent), "x")
    assert [result.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 200)]


def test_transparent_colour_key():
    sample_image = Image.new("RGB", (2, 1), (9, 9, 9))
    sample_image.putpixel((1, 0), (1, 2, 3))
    result = decode(encoded(sample_image, "PNG", transparency=(9, 9, 9)), "x")
    assert [result.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (1, 2, 3)]


def test_sixteen_bits_a_channel():
    rows = b"\0" + struct.pack(">6H", 0xFFFF, 0x8080, 0, 0, 0xFFFF, 0)
    result = decode(png(2, 1, 16, 2, rows), "x")
    assert [result.getpixel((x, 0)) for x in range(2)] == [(255, 128, 0), (0, 255, 0)]


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
WHITE = (255, 255, 255)


def grey(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "expected"),
    [
        (1, GREY, b"\x60", struct.pack(">H", 0), [WHITE, WHITE, WHITE]),
        (1, GREY, b"\x60", struct.pack(">H", 1), [(0, 0, 0), WHITE, WHITE]),
        (2, GREY, b"\x18", struct.pack(">H", 1), [(0, 0, 0), WHITE, (170, 170, 170)]),
        (4, GREY, b"\x12\x30", struct.pack(">H", 2), [(17, 17, 17), WHITE, (51, 51, 51)]),
        (8, GREY, b"\x11\x12\x13", struct.pack(">H", 0x12), [(17, 17, 17), WHITE, (19, 19, 19)]),
        # Of 16 bits all count: 0x1234 and 0x1235 are one grey of 8 bits.
        (
            16,
            GREY,
            struct.pack(">3H", 0x1235, 0x1234, 0),
            struct.pack(">H", 0x1234),
            [*grey(18), WHITE, *grey(0)],
        ),
        (
            8,
            COLOUR,
            bytes([1, 2, 3, 1, 2, 4, 3, 2, 1]),
            struct.pack(">3H", 1, 2, 3),
            [WHITE, (1, 2, 4), (3, 2, 1)],
        ),
        (
            16,
            COLOUR,
            struct.pack(">9H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9ABD, 0, 0, 0),
            struct.pack(">3H", 0x1234, 0x5678, 0x9ABC),
            [WHITE, (0x12, 0x56, 0x9A), (0, 0, 0)],
        ),
        (
            16,  # that a colour of 8 bits has the numbers of the transparent one says nothing
            COLOUR,
            struct.pack(">9H", 0x0101, 0x0202, 0x0303, 1, 2, 3, 0, 0, 0),
            struct.pack(">3H", 1, 2, 3),
            [(1, 2, 3), WHITE, (0, 0, 0)],
        ),
        (2, PALETTE, b"\x18", bytes([0, 102]), [WHITE, (153, 153, 255), (0, 200, 0)]),
        (8, PALETTE, b"\0\1\2", bytes([255, 0]), [(200, 0, 0), WHITE, (0, 200, 0)]),
        (16, GREY_ALPHA, struct.pack(">6H", 0, 0xFFFF, 0, 0x3333, 0, 0), b"", grey(0, 204, 255)),
        (16, COLOUR_ALPHA, struct.pack(">12H", *[0, 0, 0, 0x3333] * 3), b"", grey(204, 204, 204)),
    ],
)
def test_whatever_a_png_calls_transparent_is_white(bits, kind, row, transparent, expected):
    palette = {b"PLTE": bytes([200, 0, 0, 0, 0, 255, 0, 200, 0])} if kind == PALETTE else {}
    chunks = palette | ({b"tRNS": transparent} if transparent else {})
    result = decode(png(3, 1, bits, kind, b"\0" + row, chunks), "x")
    assert result.mode == "RGB" and [result.getpixel((x, 0)) for x in range(3)] == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(some_image(1), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert decode(content, "x").size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(decode(content, "x"), expected)


def test_damaged_exif_is_no_reason_to_refuse_a_image():
    content = encoded(some_image(1), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(content, "x"), some_image(1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(kind):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    assert colour(encoded(red, kind, save_all=True, append_images=[blue], **options)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_another_colour_profile_is_converted(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    content = encoded(Image.new("RGB", (16, 16), "red"), kind, icc_profile=swapped_profile(), **options)
    assert np.abs(np.subtract(colour(content), (0, 0, 255))).max() <= 4


def test_profile_of_a_transparent_image():
    content = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), "PNG", icc_profile=swapped_profile())
    assert np.abs(np.subtract(colour(content), (204, 204, 255))).max() <= 4


def test_a_profile_that_only_mentions_srgb_is_converted():
    profile = swapped_profile(b"Linear sRGB")
    content = encoded(Image.new("RGB", (16, 16), "red"), "PNG", icc_profile=profile)
    assert np.abs(np.subtract(colour(content), (0, 0, 255))).max() <= 4


def tiff(bits, pixels, photometric):
    """An uncompressed grey TIFF, as Pillow cannot write it."""
    height, width = pixels.shape
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(int)
        packed = np.stack(
            [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
        )
        data = packed.astype(np.uint8).tobytes()
    else:
        data = pixels.astype("<u2").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1)]
    tags += [(278, height), (279, len(data))]
    tags[5] = (273, 8 + 2 + 12 * len(tags) + 4)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_grey_tiffs_of_more_than_8_bits(bits, photometric):
    levels = np.tile(np.linspace(0, 2**bits - 1, 16).round().astype(int), (4, 1))
    expected = np.rint(levels / (2**bits - 1) * 255)
    decoded = np.asarray(decode(tiff(bits, levels, photometric), "x"))[..., 0]
    assert np.abs(decoded - (expected if photometric else 255 - expected)).max() <= 1


def test_srgb_and_damaged_profiles_change_nothing():
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", swapped_profile()[:200]):
        content = encoded(some_image(2), "PNG", icc_profile=profile)
        assert np.array_equal(decode(content, "x"), some_image(2))
    grey = encoded(some_image(2, mode="L"), "PNG", icc_profile=swapped_profile())  # a profile for RGB
    assert np.array_equal(decode(grey, "x"), some_image(2, mode="L").convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(tmp_path, kind):
    path = tmp_path / "half.jpg"
    content = encoded(some_image(3, 80, 60), kind)
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(AfterimageError, match=r"half\.jpg: is "):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not an image at all", "not an image in a format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format that is read"),
        (png(60_000, 60_000, 8, 2, b""), "too large"),
        (png(15_000, 12_000, 8, 2, b""), "too large"),
        (encoded(Image.new("F", (2, 2), 300.0), "TIFF"), "floating-point"),
        (encoded(Image.new("F", (2, 2), float("nan")), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (2, 2), 2**20), "TIFF"), "32-bit"),
    ],
    ids=["empty", "text", "postscript", "bomb", "large", "float", "nan", "int"],
)
def test_bad_content_is_one_error(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(AfterimageError, match=rf"bad\.png: .*{message}"):
        load_image(path)


def test_half_as_large_as_pillow_refuses_is_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(some_image(1), "PNG"), "x").size == (40, 30)


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    cases = {".": "is a folder", "pipe.png": "not a regular file", "loop.png": "too many levels"}
    cases |= {"dangling.png": "no such file", "missing.png": "no such file", "a\0b.png": "null"}
    for name, message in cases.items():
        with pytest.raises(AfterimageError, match=message):
            load_image(f"{tmp_path}/{name}")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_unreadable_file():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "secret.png")
        some_image(1).save(path)
        path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(AfterimageError, match=r"secret\.png: permission denied"):
                load_image(path)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("name", ["café ☕ <script>.png".encode(), b"\xff\xfe.png", b"a\nb\x1b[31m.png"])
def test_odd_names_are_read_and_can_be_printed(tmp_path, name):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    some_image(1).save(path, "PNG")
    assert load_image(path).size == (40, 30)
    path.write_bytes(b"no image")
    with pytest.raises(AfterimageError) as error:
        load_image(path)
    assert str(error.value).encode() and str(error.value).isprintable()


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
FILES = {kind: encoded(some_image(4, 24, 16), kind) for kind in FORMATS}


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_a_image_or_an_error(kind, data):
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 1] = data.draw(st.binary(max_size=4))
        if not content:
            break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sample_image = decode(bytes(content), "x.png")
        except AfterimageError as error:
            assert str(error).startswith("x.png: is ")
        else:
            assert sample_image.mode == "RGB"


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_shorter_side_is_what_torchvision_does(width, height, size):
    sample_image = some_image(5, width, height)
    result = resize_to_cover(sample_image, size)
    assert min(result.size) == size
    if max(width, height) <= MAX_ASPECT * min(width, height):
        assert np.array_equal(result, reference.resize(sample_image, [size], InterpolationMode.BICUBIC))


def test_shorter_side_is_antialiased():
    sample_image = some_image(6, 300, 200)
    pixels = torch.from_numpy(np.array(sample_image)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, (50, 75), mode="bicubic", antialias=True)
    result = torch.from_numpy(np.array(resize_to_cover(sample_image, 50))).permute(2, 0, 1)
    assert (expected[0].clamp(0, 255) - result).abs().max() <= 1.01


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1), (3, 4000)])
def test_strips_are_bounded(size):
    result = resize_to_cover(some_image(7, *size), 256)
    assert min(result.size) == 256
    assert max(result.size) <= 256 * MAX_ASPECT


def test_a_strip_keeps_its_middle():
    strip = Image.new("RGB", (1000, 1))
    strip.putpixel((500, 0), (255, 255, 255))
    bright = np.asarray(resize_to_cover(strip, 8).convert("L"))[0].argmax()
    assert abs(bright - 8 * MAX_ASPECT / 2) <= 8


def test_the_limit_holds_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(AfterimageError, match=re.escape("178,956,970")):
        decode(png(60_000, 60_000, 8, 2, b""), "x")
