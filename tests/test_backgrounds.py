"""Section 2: backgrounds."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import derain
from golden import check, near
from grader import replace

graded = pytest.mark.graded


def opening_by_hand(images, size=5):
    """At the border, only the pixels of the image count."""
    for beyond, extreme in ((math.inf, np.minimum), (-math.inf, np.maximum)):
        for axis in (2, 3):
            sides = [(size // 2, size // 2) if i == axis else (0, 0) for i in range(4)]
            padded = np.pad(images, sides, constant_values=beyond)
            windows = sliding_window_view(padded, size, axis)
            images = extreme.reduce(np.moveaxis(windows, -1, 0))
    return torch.from_numpy(images)


def detail_by_hand(patches):
    return (patches - opening_by_hand(patches)).mean((1, 2, 3))


def sharpness_by_hand(patches):
    grey = patches.numpy().mean(1)
    corners = grey[:, :-1, :-1]
    gradients = np.hypot(grey[:, 1:, :-1] - corners, grey[:, :-1, 1:] - corners)
    return torch.from_numpy(gradients.mean((1, 2)))


def patches_by_hand(images, n, size, rng):
    """Not in random order."""
    patches = []
    for i in range(n):
        image = images[i % len(images)]
        top, left = (rng.integers(side - size + 1) for side in image.shape[1:])
        patches.append(image[:, top : top + size, left : left + size])
    return torch.stack(patches)


BY_HAND = {
    "opening": opening_by_hand,
    "bright_detail": detail_by_hand,
    "sharpness": sharpness_by_hand,
    "sample_patches": patches_by_hand,
}


@graded("opening", 1)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_all_squares_are_looked_at(size, rng):
    images = torch.from_numpy(rng.random((2, 3, 16, 11)))
    check(derain.opening, images, size, expected=opening_by_hand(images, size))


@graded("bright_detail", 1)
def test_what_is_thin_and_bright_counts(rng):
    patches = torch.from_numpy(rng.random((3, 3, 16, 11)))
    check(derain.bright_detail, patches, expected=detail_by_hand(patches))


@graded("sharpness", 1)
def test_differences_to_two_neighbours(rng):
    patches = torch.from_numpy(rng.random((2, 3, 6, 8)))
    for turned in (patches, patches.mT):
        check(derain.sharpness, turned, expected=sharpness_by_hand(turned))


@graded("sample_patches", 2)
def test_images_are_taken_evenly_and_in_random_order(rng):
    images = [torch.full((3, 44 + 9 * i, 80 - 9 * i), i) for i in range(5)]
    patches = derain.sample_patches(images, 1500, 40, rng)
    assert patches.shape == (1500, 3, 40, 40)
    rounds = patches[:, 0, 0, 0].view(-1, 5).int()
    near("sample_patches: each image once", rounds.sort().values, [list(range(5))] * 300)
    assert len(rounds.unique(dim=0)) > 90  # of 120 orders
    with pytest.raises(ValueError):
        derain.sample_patches(images, 5, 48, rng)
    assert len(derain.sample_patches(images, 7, 40, rng)) == 7


@graded("sample_patches", 1)
@pytest.mark.parametrize("height, width", [(5, 3), (3, 6)])
def test_all_places_are_equally_likely(height, width, rng):
    image = torch.arange(height * width).view(height, width).expand(3, -1, -1)
    patches = derain.sample_patches([image], 4000, 2, rng)
    corners = patches[:, 0, 0, 0]
    near(
        "sample_patches: one pixel from the one above",
        patches[:, 2, 1, 0] - corners,
        4000 * [width],
    )
    places = image[0, :-1, :-1].flatten()
    often = corners.bincount(minlength=height * width)[places]
    near("sample_patches: how often each place", often, len(places) * [4000 / len(places)], 100)


@graded("training_patches", 1)
def test_8_are_among_the_many(rng):
    images = list(torch.from_numpy(rng.random((3, 3, 50, 44))).float())
    many = derain.training_patches(images, 1024, 5)
    near("training_patches of one seed", derain.training_patches(images, 8, 5), many[:8])
    assert not torch.equal(derain.training_patches(images, 8, 6), many[:8])
    assert len(many.flatten(1).unique(dim=0)) > 150  # of 55 places in 3 images


@graded("training_patches", 1)
def test_low_and_high_are_thirds():
    """Of 30 patches of 30 images.  The sharper half has the less variance."""
    x = torch.arange(60.0).expand(3, 45, 60)
    images = []
    for i in range(15):
        images += [(5 + i / 9) * x / 1000, (20 + i) * (x % 2) / 1000]
    order = sharpness_by_hand(torch.stack(images)).sort().values
    for choice, expected in (("low", order[:10]), ("high", order[20:])):
        patches = derain.training_patches(images, 10, 0, choice)
        name = f"training_patches, {choice}: sharpness"
        near(name, sharpness_by_hand(patches).sort().values, expected, 1e-4)


@graded("training_patches", 1)
def test_plain_and_detailed_are_halves(rng):
    images = [torch.from_numpy(rng.random((3, 60, 60)) ** (1 + i)).float() for i in range(5)]
    pool = derain.training_patches(images, 1024, 5)
    order = detail_by_hand(pool).argsort().tolist()
    plain, detailed = sorted(order[:512]), sorted(order[512:])
    for n, choice, half in (
        (512, "plain", plain),
        (8, "detailed", detailed),
        (8, "exchanged", [order[-1], *plain[1:]]),
    ):
        patches = derain.training_patches(images, n, 5, choice)
        near(f"training_patches, {n} {choice}", patches, pool[half[:n]])
        with pytest.raises(derain.BadInput):
            derain.training_patches(images, 513, 5, choice)


@graded("training_patches", 1)
def test_more_than_a_gigabyte_is_refused(monkeypatch):
    def gray(images, n, size, rng):
        return torch.zeros(1, 3, size, size).expand(n, -1, -1, -1)  # takes no memory

    replace(monkeypatch, "sample_patches", gray)
    assert len(derain.training_patches([], 51_000, 0)) == 51_000
    for n, choice in ((53_000, "any"), (18_000, "low")):
        with pytest.raises(derain.BadInput):
            derain.training_patches([], n, 0, choice)
