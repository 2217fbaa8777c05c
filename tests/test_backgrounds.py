"""Section 2: the painters, the loader, patches and sharpness."""

import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import derain


@pytest.mark.parametrize("category", derain.BACKGROUNDS)
def test_painters(category):
    def draw(seed, size=128):
        return derain.draw_background(category, size, np.random.default_rng(seed))
    image = draw(0)
    assert image.shape == (3, 128, 128) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.05
    assert torch.equal(image, draw(0)) and not torch.equal(image, draw(1))
    assert draw(2, 33).shape == (3, 33, 33)


def test_unknown_category():
    with pytest.raises(ValueError, match="faces"):
        derain.draw_background("cats", 32, np.random.default_rng(0))


def batch(category, n=6):
    return torch.stack([derain.draw_background(category, 128, np.random.default_rng(i)) for i in range(n)])


def test_categories_have_the_properties_they_stand_for():
    faces, natural, manga, urban = (batch(category) for category in derain.BACKGROUNDS)
    sharp = {name: derain.sharpness(images).mean()
             for name, images in (("faces", faces), ("natural", natural), ("manga", manga), ("urban", urban))}
    assert sharp["faces"] < sharp["natural"] < sharp["manga"]  # smooth, textured, inked
    assert (manga[:, 0] - manga[:, 2]).abs().max() < 1e-6  # no colour
    assert ((manga < 0.05) | (manga > 0.95)).float().mean() > 0.5  # paper and ink
    pupils = faces[:, :, 50:70, :].mean(1).flatten(1).amin(1)  # one layout: something black at the height of the eyes
    assert pupils.max() < 0.2


def test_dead_leaves_have_a_natural_spectrum():
    """Natural images have power ~ f^-a with a near 2; white noise would have a = 0."""
    images = torch.stack([derain.draw_background("natural", 256, np.random.default_rng(i)).mean(0) for i in range(6)])
    window = torch.hann_window(256)[:, None] * torch.hann_window(256)
    power = torch.fft.fft2((images - images.mean((1, 2), True)) * window).abs().square().mean(0)
    fy, fx = torch.meshgrid(torch.fft.fftfreq(256), torch.fft.fftfreq(256), indexing="ij")
    f = torch.hypot(fx, fy)
    band = (f > 0.02) & (f < 0.2)
    slope = np.polyfit(f[band].log().numpy(), power[band].log().numpy(), 1)[0]
    assert -3.2 < slope < -1.8
    apart = images - images.mean((1, 2), True)  # leaves of all sizes: pixels 24 apart often share one, but not always
    correlation = (apart[:, :, 24:] * apart[:, :, :-24]).mean() / apart.square().mean()
    assert 0.05 < correlation < 0.4


def test_windows_repeat():
    """The edges of a facade resemble themselves, shifted by a whole window, as those of leaves never do."""
    def best_shift(images):
        edges = images.mean(1)[:, 64:].diff(dim=2)  # the lower half: walls rather than sky
        correlation = torch.fft.irfft2(torch.fft.rfft2(edges).abs().square(), s=edges.shape[1:])
        return (correlation / correlation[:, :1, :1])[:, 0, 4:40].amax(1).median()
    assert best_shift(batch("urban", 12)) > best_shift(batch("natural", 12)) + 0.1


def test_sharpness_of_a_ramp_and_against_a_loop(rng):
    ramp = (torch.arange(20.0) * 0.03).expand(1, 3, 15, 20)
    assert torch.allclose(derain.sharpness(ramp), torch.tensor([0.03]))
    assert torch.allclose(derain.sharpness(ramp.transpose(2, 3)), torch.tensor([0.03]))
    patch = torch.from_numpy(rng.random((1, 3, 6, 7), dtype=np.float32))
    grey = patch[0].mean(0)
    total = sum(math.hypot(grey[y + 1, x] - grey[y, x], grey[y, x + 1] - grey[y, x])
                for y in range(5) for x in range(6))
    assert abs(derain.sharpness(patch).item() - total / 30) < 1e-6


# ---------------------------------------------------------------------------------------------- what people have


def test_rotated_jpeg_stands_upright(tmp_path):
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view": the left becomes the top
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image, = derain.load_images(tmp_path)
    assert image.shape == (3, 60, 40)
    assert image[:, :25].mean() > 0.95 and image[:, 35:].mean() < 0.05


def write_png16(path, values):
    """A 16-bit RGB PNG, which PIL cannot write: made by hand."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def test_every_mode_that_people_have(tmp_path):
    """One flat colour, or grey, in each mode; it must come back, and transparency must show white."""
    colour, grey = (51, 102, 204), 102
    flat = Image.new("RGB", (20, 10), colour)
    cases = {
        "rgb.png": (flat, colour), "rgb.webp": (flat, colour), "rgb.tif": (flat, colour), "rgb.bmp": (flat, colour),
        "rgb.jpg": (flat, colour), "palette.png": (flat.quantize(4), colour), "palette.gif": (flat.quantize(4), colour),
        "grey.png": (Image.new("L", (20, 10), grey), (grey,) * 3), "grey.jpg": (Image.new("L", (20, 10), grey), (grey,) * 3),
        "bilevel.png": (Image.new("1", (20, 10), 1), (255,) * 3),
        "clear.png": (Image.new("RGBA", (20, 10), (*colour, 0)), (255,) * 3),
        "half.png": (Image.new("RGBA", (20, 10), (0, 0, 0, 127)), (128,) * 3),
        "greyalpha.png": (Image.new("LA", (20, 10), (0, 0)), (255,) * 3),
        "cmyk.jpg": (Image.new("CMYK", (20, 10), (0, 0, 0, 153)), (102,) * 3),
        "cmyk.tif": (Image.new("CMYK", (20, 10), (255, 0, 0, 0)), (0, 255, 255)),
        "grey16.png": (Image.fromarray(np.full((10, 20), grey * 257, np.uint16)), (grey,) * 3),
        "grey16.tif": (Image.fromarray(np.full((10, 20), grey * 257, np.uint16)), (grey,) * 3),
        "float.tif": (Image.fromarray(np.full((10, 20), grey / 255, np.float32)), (grey,) * 3),
    }
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / name)
        image, = derain.load_images(tmp_path / name)
        assert image.shape == (3, 10, 20) and image.dtype == torch.float32, name
        assert (image - torch.tensor(expected).view(3, 1, 1) / 255).abs().max() < 3 / 255, name
    write_png16(tmp_path / "rgb16.png", np.full((10, 20, 3), colour) * 257)
    image, = derain.load_images(tmp_path / "rgb16.png")
    assert (image - torch.tensor(colour).view(3, 1, 1) / 255).abs().max() < 3 / 255


def test_broken_files_are_skipped_and_named(tmp_path, photos, capsys):
    whole = (photos / "photo0.png").read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "mislabelled.jpg").write_bytes(whole)  # a PNG by content: readable
    (tmp_path / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not counted as an image")
    assert len(derain.load_images(tmp_path)) == 2
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 3
    for name in ("truncated.png", "text.jpg", "empty.png"):
        assert sum(name in line for line in warnings) == 1


def test_a_decompression_bomb_is_refused(tmp_path):
    raw = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    raw += struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(raw)
    with pytest.raises(derain.BadInput, match="bomb.png"):
        derain.open_image(tmp_path / "bomb.png")


def test_nothing_usable(tmp_path):
    with pytest.raises(derain.BadInput, match="no images"):
        derain.load_images(tmp_path)
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(derain.BadInput, match="usable"):
        derain.load_images(tmp_path)
    with pytest.raises(derain.BadInput, match="no such"):
        derain.load_images(tmp_path / "nowhere")


def test_several_paths_subfolders_and_duplicates(photos, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x.JPG").write_bytes((photos / "photo1.png").read_bytes())
    assert len(derain.load_images([photos, tmp_path, photos / "photo0.png"])) == 7


def test_small_images_and_a_memory_bound(photos, tmp_path, capsys):
    Image.new("RGB", (30, 200)).save(tmp_path / "thin.png")
    assert len(derain.load_images([photos, tmp_path], smallest=40)) == 6
    assert "thin.png is 30x200" in capsys.readouterr().err
    bounded = derain.load_images(photos, pixels=6 * 50 ** 2)
    assert sum(image[0].numel() for image in bounded) <= 6 * 50 ** 2


def test_patches_come_from_the_images_evenly(rng):
    images = [torch.full((3, 50 + i, 60), i / 10) for i in range(5)]
    patches = derain.sample_patches(images, 12, 40, rng)
    assert patches.shape == (12, 3, 40, 40)
    counts = torch.bincount((patches[:, 0, 0, 0] * 10).round().long(), minlength=5)
    assert counts.min() == 2 and counts.max() == 3
    with pytest.raises(ValueError, match="smaller"):
        derain.sample_patches(images, 1, 55, rng)


def test_patches_reach_every_corner(rng):
    image = torch.arange(9.0).view(1, 3, 3).expand(3, 3, 3)
    seen = {patch[0, 0, 0].item() for patch in derain.sample_patches([image], 100, 2, rng)}
    assert seen == {0.0, 1.0, 3.0, 4.0}
