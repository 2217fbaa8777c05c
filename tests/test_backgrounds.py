"""Section 2: backgrounds."""

import math

import numpy as np
import pytest
import torch

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
