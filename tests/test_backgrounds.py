"""Section 2: the painters, the loader, patches and sharpness."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import derain


@pytest.mark.parametrize("category", [
    "faces", pytest.param("natural", marks=pytest.mark.backgrounds)])
def test_painters(category):
    def draw(seed, size=128):
        return derain.draw_background(category, size, np.random.default_rng(seed))

    image = draw(0)
    assert image.shape == (3, 128, 128) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.05
    assert torch.equal(image, draw(0)) and not torch.equal(image, draw(1))
    assert draw(2, 33).shape == (3, 33, 33)


def batch(category, n=6):
    images = [derain.draw_background(category, 128, np.random.default_rng(i)) for i in range(n)]
    return torch.stack(images)


def test_dead_leaves_are_sharper_than_faces():
    def mean_gradient(images):
        grey = images.mean(1)
        return grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean()

    assert mean_gradient(batch("natural")) > 1.2 * mean_gradient(batch("faces"))


@pytest.mark.backgrounds
def test_dead_leaves_leave_no_gap_and_hide_one_another():
    flat = []
    for seed in range(6):
        leaves = derain.draw_dead_leaves(128, np.random.default_rng(seed))
        assert (leaves == 0).all(0).mean() < 0.03  # the empty canvas is 0
        flat.append((np.abs(np.diff(leaves.clip(0, 1).mean(0))) < 0.01).mean())
    assert np.mean(flat) > 0.7  # if leaves shine through, their edges multiply


@pytest.mark.backgrounds
def test_dead_leaves_have_a_natural_spectrum():
    """Natural images have power ~ f^-a with a near 2; white noise would have a = 0."""
    images = [derain.draw_dead_leaves(256, np.random.default_rng(i)) for i in range(6)]
    images = torch.from_numpy(np.stack(images)).clamp(0, 1).mean(1)
    images = images - images.mean((1, 2), True)
    window = torch.hann_window(256)[:, None] * torch.hann_window(256)
    power = torch.fft.fft2(images * window).abs().square().mean(0)
    f = torch.hypot(torch.fft.fftfreq(256)[:, None], torch.fft.fftfreq(256))
    band = (f > 0.02) & (f < 0.2)
    slope = np.polyfit(f[band].log().numpy(), power[band].log().numpy(), 1)[0]
    assert -3.2 < slope < -1.8
    # Leaves of all sizes: pixels 24 apart often share one, but not always.
    correlation = (images[:, :, 24:] * images[:, :, :-24]).mean() / images.square().mean()
    assert 0.05 < correlation < 0.4


@pytest.mark.backgrounds
def test_sharpness_of_a_ramp_and_against_a_loop(rng):
    ramp = (torch.arange(20.0) * 0.03).expand(1, 3, 15, 20)
    two = torch.cat([ramp, 0.5 * ramp])
    assert torch.allclose(derain.sharpness(two), torch.tensor([0.03, 0.015]))
    assert torch.allclose(derain.sharpness(two.transpose(2, 3)), torch.tensor([0.03, 0.015]))
    patch = torch.from_numpy(rng.random((1, 3, 6, 7), dtype=np.float32))
    grey = patch[0].mean(0)
    total = 0
    for y in range(5):
        for x in range(6):
            total += math.hypot(grey[y + 1, x] - grey[y, x], grey[y, x + 1] - grey[y, x])
    assert abs(derain.sharpness(patch).item() - total / 30) < 1e-6


@pytest.mark.backgrounds
def test_patches_come_from_the_images_evenly(rng):
    images = [torch.full((3, 50 + i, 60), i / 10) for i in range(5)]
    patches = derain.sample_patches(images, 12, 40, rng)
    assert patches.shape == (12, 3, 40, 40)
    counts = torch.bincount((patches[:, 0, 0, 0] * 10).round().long(), minlength=5)
    assert counts.min() == 2 and counts.max() == 3
    first = {derain.sample_patches(images, 1, 9, rng).mean().item() for _ in range(20)}
    assert len(first) > 2  # few patches, too, come from any image
    with pytest.raises(ValueError):
        derain.sample_patches(images, 5, 55, rng)


@pytest.mark.backgrounds
def test_patches_reach_every_corner(rng):
    image = torch.arange(9.0).view(1, 3, 3).expand(3, 3, 3)
    seen = {patch[0, 0, 0].item() for patch in derain.sample_patches([image], 100, 2, rng)}
    assert seen == {0.0, 1.0, 3.0, 4.0}


def test_rotated_jpeg_stands_upright(tmp_path):
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view": the left becomes the top
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image, = derain.load_images(tmp_path)
    assert image.shape == (3, 60, 40)
    assert image[:, :25].mean() > 0.95 and image[:, 35:].mean() < 0.05


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.bmp", "a.jpg", "grey.png"])
def test_formats_come_back(name, tmp_path):
    picture = Image.new("RGB", (20, 10), (51, 102, 204))
    expected = torch.tensor([51, 102, 204]).view(3, 1, 1) / 255
    if name == "grey.png":
        picture, expected = Image.new("L", (20, 10), 102), torch.full((3, 1, 1), 102 / 255)
    picture.save(tmp_path / name)
    image, = derain.load_images(tmp_path / name)
    assert image.shape == (3, 10, 20) and image.dtype == torch.float32
    assert (image - expected).abs().max() < 3 / 255


def test_broken_files_are_skipped_and_named(tmp_path, photos, capsys):
    whole = (photos / "photo0.png").read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not counted as an image")
    Image.new("RGB", (30, 200)).save(tmp_path / "thin.png")
    assert len(derain.load_images(tmp_path, smallest=40)) == 1
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 4
    for name in ("truncated.png", "text.jpg", "empty.png", "thin.png"):
        assert sum(name in line for line in warnings) == 1


def test_nothing_usable(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(derain.BadInput):
            derain.load_images(path)
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(derain.BadInput):
        derain.load_images(tmp_path)


def test_memory_is_bounded(photos, monkeypatch):
    """Of 1,300 files of 900x500 pixels at most 600 are kept, and 40 million pixels in all."""
    monkeypatch.setattr(derain, "image_files", lambda path: [photos / "photo0.png"] * 1300)
    monkeypatch.setattr(derain, "open_image", lambda path: torch.zeros(3, 1, 1).expand(3, 500, 900))
    images = derain.load_images(photos)
    assert 300 < len(images) <= 600
    assert sum(image[0].numel() for image in images) <= 40e6
