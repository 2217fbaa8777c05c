"""Section 2: faces, patches and their sharpness; and photographs, which section 8 loads."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import derain

graded = pytest.mark.backgrounds


@graded
def test_sharpness_against_a_loop(rng):
    patches = torch.from_numpy(rng.random((2, 3, 6, 8), dtype=np.float32))
    expected = []
    for grey in patches.mean(1).tolist():
        total = 0
        for y, x in np.ndindex(5, 7):
            total += math.hypot(grey[y + 1][x] - grey[y][x], grey[y][x + 1] - grey[y][x])
        expected.append(total / 35)
    for turned in (patches, patches.mT):
        assert derain.sharpness(turned).tolist() == pytest.approx(expected)


@graded
def test_patches_come_from_the_images_evenly(rng):
    images = [torch.full((3, 44 + 9 * i, 80 - 9 * i), float(i)) for i in range(5)]
    patches = derain.sample_patches(images, 12, 40, rng)
    assert sorted(patches[:, 0, 0, 0].int().bincount()) == [2, 2, 2, 3, 3]
    first = {derain.sample_patches(images, 1, 9, rng).mean().item() for _ in range(20)}
    assert len(first) > 2  # few patches, too, come from any image
    with pytest.raises(ValueError):
        derain.sample_patches(images, 5, 48, rng)


@graded
@pytest.mark.parametrize("height, width", [(5, 3), (3, 6)])
def test_patches_reach_every_place(height, width, rng):
    image = torch.arange(height * width).view(height, width).expand(3, -1, -1)
    patches = derain.sample_patches([image], 300, 2, rng)
    corners = patches[:, 0, 0, 0]
    assert torch.equal(corners.unique(), image[0, :-1, :-1].flatten())
    assert torch.equal(patches[:, 2, 1, 0], corners + width)


@graded
def test_fewer_backgrounds_are_among_the_more(rng):
    images = list(torch.from_numpy(rng.random((3, 3, 50, 44))))
    many = derain.training_patches(images, 1024, 5)
    assert torch.equal(derain.training_patches(images, 8, 5), many[:8])
    assert not torch.equal(derain.training_patches(images, 8, 6), many[:8])


@graded
@pytest.mark.parametrize("third, slopes", [("low", {1}), ("high", {3}), ("any", {1, 2, 3})])
def test_thirds_differ_in_sharpness(third, slopes):
    """Of 30 patches, 10 come from each of three images: smooth, medium and sharp."""
    images = [slope * torch.arange(60.0).expand(3, 45, 60) for slope in (1, 3, 2)]
    patches = derain.training_patches(images, 10, 0, third)
    assert patches.shape == (10, 3, derain.PATCH, derain.PATCH)
    assert set(derain.sharpness(patches).round().tolist()) == slopes


@graded
def test_more_than_a_gigabyte_is_refused():
    assert len(derain.training_patches([torch.zeros(3, 40, 40)], 6000, 0)) == 6000
    for n, third in ((60_000, "any"), (20_000, "low")):
        with pytest.raises(derain.BadInput):
            derain.training_patches([torch.zeros(3, 40, 40)], n, 0, third)


def test_a_rotated_jpeg_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view": the top becomes the right
    picture = Image.linear_gradient("L").resize((60, 40))  # black at the top, white at the bottom
    picture.save(tmp_path / "a.jpg", exif=exif)
    (image,) = derain.load_images(tmp_path)
    assert image.shape == (3, 60, 40)
    assert image[..., 0].min() > 0.9 and image[..., 39].max() < 0.1


def test_grey_of_16_bits_is_read_by_its_value(tmp_path):
    values = np.arange(0, 65536, 256, np.uint16).reshape(32, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    (image,) = derain.load_images(tmp_path)
    assert len(image) == 3 and np.allclose(image, values / 65535)


def test_broken_files_are_left_out_and_named(tmp_path, photos, capsys):
    whole = (photos / "photo0.png").read_bytes()
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(whole[:5000])
    with pytest.raises(derain.BadInput):  # nothing is left
        derain.load_images(tmp_path)
    Image.new("RGB", (30, 200)).save(tmp_path / "thin.png")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "good.png").write_bytes(whole)
    assert len(derain.load_images(tmp_path, smallest=40)) == 1
    lines = capsys.readouterr().err.splitlines()
    for line, name in zip(lines, ["empty", "half", "empty", "half", "thin"], strict=True):
        assert f"{name}.png" in line
