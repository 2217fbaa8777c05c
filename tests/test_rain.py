"""Section 1: rain, against brute force."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import derain
from golden import check, near
from grader import replace

graded = pytest.mark.graded


def kernel_by_hand(width, length, direction):
    """Sum many small Gaussians along each line, and scale so that the centre is 1."""
    streaks = np.stack([width, length, direction], axis=-1).reshape(-1, 3)
    sigma = streaks[:, 0] / 2.3548
    radius = math.ceil(max(streaks[:, 1] / 2 + 3 * sigma))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kernels = []
    for (_, length, direction), deviation in zip(streaks, sigma):
        angle = math.radians(direction)
        # Clockwise from "up": a positive direction moves the upper end to the right.
        line = np.linspace(-0.495, 0.495, 100)[:, None, None] * length
        distances = np.hypot(x - line * math.sin(angle), y + line * math.cos(angle))
        picture = np.exp(-((distances / deviation) ** 2) / 2).sum(0)
        kernels.append(picture / picture[radius, radius])
    kernels = torch.from_numpy(np.array(kernels)).float()
    return kernels if np.ndim(width) else kernels[0]


def drops_by_hand(noise, quantity):
    found = []
    for image, share in zip(noise.double(), quantity.tolist()):
        threshold = 1 - share / 10_000
        found.append(np.interp(image, [threshold, 1], [0.3, 0.8], left=0))
    return torch.tensor(np.array(found)).float()


BY_HAND = {"streak_kernel": kernel_by_hand, "drops": drops_by_hand}


@graded("streak_kernel", 3)
@pytest.mark.parametrize(
    "streak", [(2, 15, 0), (1.5, 12, 30), (3, 21, -65), (2, 9, 90), (5, 2, 30)], ids=str
)
def test_a_streak_is_a_blurred_line(streak):
    """The last one is short and wide, so that both blurred ends reach its middle."""
    expected = kernel_by_hand(*streak)
    check(derain.streak_kernel, *streak, expected=expected, tolerance=1e-3)


@graded("streak_kernel", 1)
def test_a_batch_of_streaks_equals_single_ones():
    """All are as large as the largest."""
    streaks = torch.tensor([(1.2, 8.0, -40.0), (3.0, 20.0, 10.0), (4.0, 5.0, 0.0)]).T
    expected = kernel_by_hand(*streaks)
    check(derain.streak_kernel, *streaks, expected=expected, tolerance=1e-3)


@graded("drops", 2)
def test_the_highest_noise_becomes_drops(rng):
    noise = torch.from_numpy(rng.random((2, 60, 50), np.float32))
    quantity = torch.tensor([200.0, 4000.0])
    expected = drops_by_hand(noise, quantity)
    check(derain.drops, noise, quantity, expected=expected, tolerance=1e-3)


@pytest.fixture
def asked(monkeypatch):
    """Note, for each image, what rain_layers asks of streak_kernel and drops, and what it gets."""
    noted = {"streak": [], "kernel": [], "quantity": [], "noise": [], "drops": []}

    def streak_kernel(width, length, direction):
        kernels = kernel_by_hand(width, length, direction)
        streaks = np.stack([width, length, direction], axis=-1)
        noted["streak"].extend(streaks.reshape(-1, 3))
        noted["kernel"].extend(kernels.reshape(-1, *kernels.shape[-2:]))
        return kernels

    def drops(noise, quantity):
        found = drops_by_hand(noise, quantity)
        noted["quantity"].extend(quantity)
        noted["noise"].extend(noise)
        noted["drops"].extend(found)
        return found

    replace(monkeypatch, "streak_kernel", streak_kernel)
    replace(monkeypatch, "drops", drops)
    return noted


@graded("rain_layers", 2)
@pytest.mark.parametrize("name, size", [("large", (40, 29)), ("large", 30), ("unseen", (37, 18))])
def test_each_drop_leaves_its_streak(name, size, asked):
    """Also if it lies outside the frame."""
    again, layers = [
        derain.rain_layers(4, size, derain.RAIN[name], np.random.default_rng(3)) for _ in range(2)
    ]
    near("rain_layers of the same generator", layers, again, 0)
    height, width = (size, size) if isinstance(size, int) else size
    assert layers.shape == (4, 1, height, width) and layers.dtype == torch.float32
    assert layers.min() >= 0 and layers.max() <= 1
    assert len(asked["kernel"]) == len(asked["drops"]) == 8, "rain_layers: call both functions"
    for layer, kernel, drops in zip(layers, asked["kernel"], asked["drops"]):
        # The sum of all streaks, at most 1; the frame may lie anywhere on it.
        rain = F.conv2d(drops[None, None], kernel.flip(0, 1)[None, None])[0].clamp(0, 1)
        frames = rain.unfold(1, height, 1).unfold(2, width, 1)
        differences = (frames - layer[:, None, None]).abs().amax((-2, -1))
        assert differences.min() < 1e-4, "rain_layers: not the sum of a streak for each drop"


@graded("rain_layers", 1)
def test_each_image_has_its_own_rain(asked):
    """Factors and sides of 100 images are uniform, and the noise is always new."""
    rain_range = derain.RAIN["unseen"]
    rng = np.random.default_rng(0)
    for _ in range(2):
        derain.rain_layers(50, 2, rain_range, rng)
    factors = np.column_stack([asked["quantity"], asked["streak"]])
    side = np.sign(factors[:, 3])
    near("rain_layers: the mean side", side.mean(), 0, 0.5)
    factors[:, 3] *= side
    for values, (low, high), name in zip(factors.T, rain_range, rain_range._fields):
        shares = (np.sort(values) - low) / (high - low)
        near(f"rain_layers: the distribution of {name}", shares, np.linspace(0, 1, 100), 0.2)
    assert len({image.numpy().tobytes() for image in asked["noise"]}) == 100


@graded("add_rain", 1)
def test_add_rain_is_limited_and_grey():
    background = torch.rand(2, 3, 4, 5)
    rain = torch.rand(2, 1, 4, 5)
    expected = (background.numpy() + rain.numpy()).clip(0, 1)
    check(derain.add_rain, background, rain, expected=expected)


def test_a_degradation_rains_afresh(rng):
    clean = torch.full((2, 3, 30, 30), 0.2)
    degrade = derain.rain_degradation(derain.RAIN["large"])
    rain = derain.rain_layers(2, 30, derain.RAIN["large"], np.random.default_rng(0))
    near("degrade", degrade(clean, np.random.default_rng(0)), (clean + rain).clamp(max=1))
    assert not torch.equal(degrade(clean, rng), degrade(clean, rng))
