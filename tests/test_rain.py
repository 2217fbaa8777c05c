"""Section 1: rain, against brute force."""

import math

import numpy as np
import pytest
import torch

import derain

pytestmark = pytest.mark.rain


def brute_force_streak(width, length, direction, size):
    """Sum many small Gaussians along the line; scale so that the centre is 1."""
    sigma = width / 2.3548
    centre = size // 2
    y, x = np.mgrid[:size, :size] - centre
    angle = math.radians(direction)
    picture = np.zeros((size, size))
    for t in np.linspace(-length / 2, length / 2, 4001):
        # Clockwise from "up": a positive direction moves the upper end to the right.
        px = t * math.sin(angle)
        py = -t * math.cos(angle)
        picture += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2))
    return picture / picture[centre, centre]


@pytest.mark.parametrize(
    "width, length, direction", [(2, 15, 0), (1.5, 12, 30), (3, 21, -65), (2, 9, 90), (5, 2, 30)]
)
def test_kernel_is_a_blurred_line(width, length, direction):
    """The last one is short and wide, so that both blurred ends reach its middle."""
    kernel = derain.streak_kernel(width, length, direction).numpy()
    size = 2 * math.ceil(length / 2 + 3 * width / 2.3548) + 1
    assert kernel.shape == (size, size)
    expected = brute_force_streak(width, length, direction, size)
    assert np.abs(kernel - expected).max() < 2e-3


def test_kernel_batch_equals_singles():
    streaks = [(1.2, 8.0, -40.0), (3.0, 20.0, 10.0), (4.0, 5.0, 0.0)]
    batch = derain.streak_kernel(*torch.tensor(streaks).T)
    singles = [derain.streak_kernel(*streak) for streak in streaks]
    assert batch.shape[-1] == max(map(len, singles))
    for kernel, single in zip(batch, singles):
        cut = (len(kernel) - len(single)) // 2
        inner = kernel[cut : cut + len(single), cut : cut + len(single)]
        torch.testing.assert_close(inner, single, atol=1e-6, rtol=0)


def test_quantity_is_the_number_of_seeds(rng):
    noise = torch.from_numpy(rng.random((2, 1250, 800), dtype=np.float32))
    before = noise.clone()
    both = derain.streak_seeds(noise, torch.tensor([20.0, 100.0]))
    assert both.shape == noise.shape and (both >= 0).all() and torch.equal(noise, before)
    for seeds, above, quantity in zip(both, noise, (20, 100)):
        expected = 100 * quantity  # of a million pixels
        peaks = seeds[seeds > 0]
        assert abs(len(peaks) - expected) < 5 * math.sqrt(expected)
        interval = peaks.min(), peaks.max()
        assert interval == pytest.approx(derain.STREAK_PEAK, abs=0.01)
        # The higher the noise, the brighter: so the brightness is uniform, too.
        assert np.corrcoef(peaks, above[seeds > 0])[0, 1] > 0.999


@pytest.mark.parametrize(
    "name, height, width", [("large", 40, 29), ("large", 21, 50), ("unseen", 37, 18)]
)
def test_layers_equal_a_plain_loop(name, height, width):
    """Each seed leaves one kernel, its own image's, also when it lies outside the frame."""
    rain_range = derain.RAIN[name]
    layers = derain.rain_layers(4, (height, width), rain_range, np.random.default_rng(3))
    assert layers.shape == (4, 1, height, width) and layers.dtype == torch.float32

    rng = np.random.default_rng(3)
    factors = [rng.uniform(*interval, 4) for interval in rain_range[:4]]
    if rain_range.either_side:
        factors[3] *= rng.choice([-1, 1], 4)
    quantity, *streaks = torch.tensor(np.array(factors)).float()
    kernels = derain.streak_kernel(*streaks).numpy()
    k = kernels.shape[-1]
    canvas = [math.ceil((side + k - 1) / 16) * 16 for side in (height, width)]
    noise = torch.from_numpy(rng.random((4, *canvas), dtype=np.float32))
    seeds = derain.streak_seeds(noise, quantity).numpy()
    for i in range(4):
        plain = np.zeros((canvas[0] + k, canvas[1] + k))
        for y, x in np.argwhere(seeds[i]):
            plain[y : y + k, x : x + k] += seeds[i, y, x] * kernels[i]
        frame = plain[k - 1 : k - 1 + height, k - 1 : k - 1 + width]
        assert np.abs(layers[i, 0].numpy() - frame.clip(0, 1)).max() < 1e-5


def test_add_rain_clips_and_is_grey():
    background = torch.tensor([0.0, 0.5, 0.9]).view(1, 3, 1, 1).repeat(2, 1, 4, 2)
    before = background.clone()
    rain = torch.tensor([0.3, 0.6]).view(2, 1, 1, 1).repeat(1, 1, 4, 2)
    rainy = derain.add_rain(background, rain)
    expected = torch.tensor([[0.3, 0.8, 1], [0.6, 1, 1]])[..., None, None].expand(2, 3, 4, 2)
    torch.testing.assert_close(rainy, expected)
    assert torch.equal(background, before)  # the caller's tensor is left alone


def test_a_degradation_rains_afresh(rng):
    clean = torch.full((2, 3, 30, 30), 0.2)
    degrade = derain.rain_degradation(derain.RAIN["large"])
    rain = derain.rain_layers(2, 30, derain.RAIN["large"], np.random.default_rng(0))
    rainy = degrade(clean, np.random.default_rng(0))
    torch.testing.assert_close(rainy, (clean + rain).clamp(max=1))
    assert not torch.equal(degrade(clean, rng), degrade(clean, rng))
