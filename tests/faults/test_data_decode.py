"""One decoder: the same pixels in training, evaluation and pictures, and bounds on what is decoded."""

import io
import itertools
import logging
import struct
import zlib

import numpy as np
import pytest

from dyntoken import data
from dyntoken.data import decode
from dyntoken.data.resample import resize_centre
from dyntoken.tools import show
from tests.faults.folder import picture

tf = pytest.importorskip("tensorflow")
PIL = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
COLOUR = picture(1, 5, (31, 23))
DEEP = (np.arange(23 * 31, dtype=np.uint16) * 91).reshape(23, 31)  # 16 bits, many levels


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width, height, rows=b"", depth=8, colour=0):
    """A PNG whose header states any size."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_rgb16():
    rows = RNG.integers(0, 65536, (23, 31, 3)).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return png(31, 23, zlib.compress(lines), 16, 2), (rows >> 8).astype(np.uint8)


def alpha():
    image = COLOUR.convert("RGBA")
    image.putalpha(PIL.fromarray(RNG.integers(0, 256, (23, 31), dtype=np.uint8)))
    return image


FILES = {
    "jpeg": encoded(COLOUR, "JPEG", quality=80),
    "jpeg grey": encoded(COLOUR.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(COLOUR.convert("CMYK"), "JPEG"),
    "png": encoded(COLOUR, "PNG"),
    "png grey 16": encoded(PIL.fromarray(DEEP), "PNG"),
    "png rgb 16": png_rgb16()[0],
    "png 1 bit": encoded(COLOUR.convert("1"), "PNG"),
    "png palette": encoded(COLOUR.quantize(32), "PNG", transparency=b"\x00\x80\xff"),
    "png alpha": encoded(alpha(), "PNG"),
    "png grey alpha": encoded(alpha().convert("LA"), "PNG"),
    "bmp palette": encoded(COLOUR.quantize(32), "BMP"),
    "gif": encoded(COLOUR, "GIF"),
    "webp": encoded(COLOUR, "WEBP"),
    "webp alpha": encoded(alpha(), "WEBP", lossless=True),
    "tiff": encoded(COLOUR, "TIFF"),
    "tiff grey 16": encoded(PIL.fromarray(DEEP), "TIFF"),
    "ppm": encoded(COLOUR, "PPM"),
    "pgm 16": b"P5 31 23 65535 " + DEEP.astype(">u2").tobytes(),
    "jpeg 2000": encoded(COLOUR, "JPEG2000"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("channels", [3, 1])
def test_training_evaluation_and_pictures_see_the_same(channels, tmp_path):
    """Of every kind, a class each."""
    seen = {}
    for label, kind in enumerate(FILES):
        path = tmp_path / f"{label:02} {kind}" / "x.png"  # the name says nothing
        path.parent.mkdir()
        path.write_bytes(FILES[kind])
        seen[label] = decode.read_image(path, channels)
        assert seen[label].shape == (23, 31, channels) and seen[label].dtype == np.uint8, kind
    request = {"size": (23, 31), "channels": channels, "shards": 1, "batch": len(FILES)}
    (evaluated,) = data.eval_batches(f"folder:{tmp_path}", split="train", **request)
    trained = next(data.train_batches(f"folder:{tmp_path}", seed=0, **request))
    for batch in (evaluated, trained):
        assert sorted(batch["label"]) == list(seen) and batch["mask"].all()
        for label, image in zip(batch["label"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, seen[label], list(FILES)[label])


def test_sixteen_bits_are_scaled():
    for kind in ("png grey 16", "tiff grey 16", "pgm 16"):
        np.testing.assert_array_equal(decode.decode(FILES[kind], 1)[..., 0], DEEP >> 8)
    content, pixels = png_rgb16()
    np.testing.assert_array_equal(decode.decode(content, 3), pixels)


def test_a_palette_is_looked_up():
    expected = np.asarray(COLOUR.quantize(32).convert("RGB"))
    np.testing.assert_array_equal(decode.decode(FILES["bmp palette"], 3), expected)


LINE = np.zeros((1, 20_000), np.uint8)
BAD = {
    "1 x 20000": (encoded(PIL.fromarray(LINE), "PNG"), "20000 pixels"),
    "20000 x 1": (encoded(PIL.fromarray(LINE.T), "JPEG"), "20000 x 1 pixels"),
    "3 x 1500 webp": (encoded(PIL.fromarray(np.zeros((3, 1500, 3), np.uint8)), "WEBP"), "3 x 1500 pixels"),
    "bomb": (png(60_000, 60_000, zlib.compress(bytes(1000))), "pixels"),
    "bomb jpeg": (
        FILES["jpeg"].replace(struct.pack(">HH", 23, 31), struct.pack(">HH", 60_000, 60_000), 1),
        "pixels",
    ),
    "float tiff": (
        encoded(PIL.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
        "32-bit",
    ),
    "int32 tiff": (encoded(PIL.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF"), "32-bit"),
    "cut png": (FILES["png"][:200], ""),
    "cut webp": (FILES["webp"][:60], ""),
    "empty": (b"", "not a picture that pillow can read"),
    "8 bytes": (FILES["png"][:8], ""),
    "html": (b"<html>404", "not a picture that pillow can read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_decode_is_one_line_that_names_the_file(kind, tmp_path):
    content, words = BAD[kind]
    path = tmp_path / "some picture.png"
    path.write_bytes(content)
    with pytest.raises(data.DataError) as error:
        decode.read_image(path, 3)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.thorough
def test_the_run_goes_on_without_them(tmp_path, caplog):
    """In evaluation and training, at a small and a common size; memory stays bounded."""
    for label in range(2):
        (tmp_path / f"c{label}").mkdir()
        for number in range(8):
            picture(label, number).save(tmp_path / f"c{label}" / f"{number}.png")
    for number, (content, _) in enumerate(BAD.values()):
        (tmp_path / "c0" / f"bad{number}.png").write_bytes(content)
    name = f"folder:{tmp_path}"
    for size in (16, 224):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dyntoken.data"):
            batches = list(data.eval_batches(name, split="train", batch=7, size=size))
        assert sum(b["mask"].sum() for b in batches) == 16
        assert len(caplog.records) == len(BAD) and "20000 pixels" in caplog.text
    request = {"batch": 8, "shards": 4, "seed": 0, "size": 16, "split": "train"}
    for augment in ({}, {"repeats": 2}):
        steps = list(itertools.islice(data.train_batches(name, **request, augment=augment), 4))
        assert all(b["image"][b["mask"] > 0].any((1, 2, 3)).all() for b in steps)


@pytest.mark.thorough
def test_what_is_just_within_the_bounds_is_resized(tmp_path):
    long = np.zeros((20, 20 * decode.MAX_ASPECT), np.uint8)
    long[:, 2300:2800] = 200
    for label, image in enumerate((long, long.T)):
        (tmp_path / f"c{label}").mkdir()
        PIL.fromarray(image).save(tmp_path / f"c{label}" / "x.png")
    for size in (4, 48):
        (batch,) = data.eval_batches(f"folder:{tmp_path}", split="train", batch=2, size=size, crop_pct=1.0)
        assert batch["mask"].all() and (batch["image"] == 200).all()
        made = resize_centre(long[None, ..., None], (size, size), 1.0, "bicubic")
        assert (made == 200).all()
    with pytest.raises(data.DataError, match="1 x 20000 pixels"):
        resize_centre(LINE[None, ..., None], (224, 224), 0.875, "bicubic")
    with pytest.raises(data.DataError, match="crop_pct 1e-09"):
        data.eval_batches(f"folder:{tmp_path}", split="train", batch=2, size=48, crop_pct=1e-9)


def test_show_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(BAD["1 x 20000"][0])
    for argument, words in (("x.png", "1 x 20000 pixels"), ("", "is a folder")):
        assert show.main(["dtps_vit_mini_patch4_28", "--weights=none.npz", str(tmp_path / argument)]) == 1
        err = capsys.readouterr().err
        assert words in err and str(tmp_path) in err and err.count("\n") == 1
