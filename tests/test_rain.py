"""Section 1: rain, against brute force and against what can be measured in the layer itself."""

import math
import time

import numpy as np
import pytest
import torch

import derain


def brute_force_streak(width, length, direction, size):
    """Sum many small Gaussians along the line; scale so that the centre is 1."""
    sigma = width / 2.3548
    centre = size // 2
    y, x = np.mgrid[:size, :size] - centre
    angle = math.radians(direction)
    picture = np.zeros((size, size))
    for t in np.linspace(-length / 2, length / 2, 4001):
        # Clockwise from "up": a positive direction moves the upper end to the right.
        px, py = t * math.sin(angle), -t * math.cos(angle)
        picture += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma ** 2))
    return picture / picture[centre, centre]


@pytest.mark.parametrize("width, length, direction", [(2, 15, 0), (1.5, 12, 30), (3, 21, -65), (2, 9, 90)])
def test_kernel_is_a_blurred_line(width, length, direction):
    kernel = derain.streak_kernel(width, length, direction).numpy()
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert np.abs(kernel - brute_force_streak(width, length, direction, len(kernel))).max() < 2e-3
    border = np.concatenate([kernel[0], kernel[-1], kernel[:, 0], kernel[:, -1]])
    assert border.max() < 0.03  # nothing is cut off


def test_kernel_has_one_at_its_centre():
    """Also where it is short and wide, so that both blurred ends reach the middle."""
    for width, length in ((5, 6), (1, 30), (4, 1)):
        kernel = derain.streak_kernel(width, length, 30)
        assert kernel.max() == pytest.approx(1) and kernel[len(kernel) // 2, len(kernel) // 2] == kernel.max()


def test_kernel_leans_like_a_slash():
    kernel = derain.streak_kernel(2.0, 15.0, 30.0)
    upper, lower = kernel[:len(kernel) // 2 - 2], kernel[len(kernel) // 2 + 3:]
    column = torch.arange(len(kernel), dtype=torch.float32)
    assert (upper.sum(0) * column).sum() / upper.sum() > (lower.sum(0) * column).sum() / lower.sum() + 3


def test_kernel_batch_equals_singles():
    width, length, direction = torch.tensor([1.2, 3.0]), torch.tensor([8.0, 20.0]), torch.tensor([-40.0, 10.0])
    batch = derain.streak_kernel(width, length, direction)
    for i in range(2):
        single = derain.streak_kernel(width[i], length[i], direction[i])
        cut = (len(batch[i]) - len(single)) // 2
        inner = batch[i][cut:len(batch[i]) - cut, cut:len(batch[i]) - cut]
        assert torch.allclose(inner, single, atol=1e-6)


def fourier_angle(layer):
    """Degrees from vertical of the streaks in (h, w): at right angles to the long axis of the power spectrum."""
    power = np.abs(np.fft.fft2(layer - layer.mean())) ** 2
    fy, fx = np.meshgrid(np.fft.fftfreq(layer.shape[0]), np.fft.fftfreq(layer.shape[1]), indexing="ij")
    power *= np.hypot(fx, fy) < 0.2  # away from the corners, where the pixel grid shows
    axis = 0.5 * math.atan2(2 * (power * fx * fy).sum(), (power * (fx ** 2 - fy ** 2)).sum())
    return math.degrees(axis)  # of vertical streaks the spectrum is horizontal, 0 degrees from the x axis


@pytest.mark.parametrize("direction", [-60, -20, 0, 35, 70])
def test_direction_can_be_measured(direction, rng):
    fixed = derain.RainRange((50, 50), (2, 2), (18, 18), (direction, direction))
    layers = derain.rain_layers(4, 256, fixed, rng)[:, 0].numpy()
    assert abs(np.mean([fourier_angle(layer) for layer in layers]) - direction) < 2


def test_either_side_mirrors_half(rng):
    fixed = derain.RainRange((50, 50), (2, 2), (18, 18), (60, 60), either_side=True)
    angles = [fourier_angle(layer[0].numpy()) for layer in derain.rain_layers(40, 96, fixed, rng)]
    right = sum(angle > 0 for angle in angles)
    assert 8 <= right <= 32 and all(abs(abs(angle) - 60) < 12 for angle in angles)


@pytest.mark.parametrize("quantity", [20, 100])
def test_quantity_is_the_number_of_seeds(quantity, rng):
    noise = torch.from_numpy(rng.random((1, 1000, 1000), dtype=np.float32))
    seeds = derain.streak_seeds(noise, torch.tensor([float(quantity)]))
    expected = quantity / 10_000 * noise.numel()
    assert abs((seeds > 0).sum().item() - expected) < 5 * math.sqrt(expected)
    low, high = derain.STREAK_PEAK
    peaks = seeds[seeds > 0]
    assert low <= peaks.min() and peaks.max() <= high
    assert abs(peaks.mean() - (low + high) / 2) < 0.01  # uniform within the interval


def test_quantity_can_be_measured_in_the_layer(rng):
    """With thin rain that hardly overlaps, layer mass / streak mass is the number of streaks."""
    fixed = derain.RainRange((5, 5), (2, 2), (12, 12), (0, 0))
    layer = derain.rain_layers(1, 1200, fixed, rng)
    per_streak = derain.streak_kernel(2, 12, 0).sum() * sum(derain.STREAK_PEAK) / 2
    streaks = layer.sum() / per_streak
    assert abs(streaks.item() / (5 / 10_000 * 1200 ** 2) - 1) < 0.1


def test_width_and_length_at_half_brightness():
    kernel = derain.streak_kernel(5.0, 31.0, 0.0)
    centre = len(kernel) // 2
    assert abs((kernel[centre] > 0.5).sum() - 5) <= 1
    assert abs((kernel[:, centre] > 0.5).sum() - 31) <= 1


def test_filtering_equals_a_plain_loop():
    """A convolution: each seed leaves one kernel, its own image's, also when it lies outside the frame."""
    factors = torch.tensor([[120.0, 1.7, 11.0, 25.0], [70.0, 1.2, 8.0, -40.0]])
    size = 40
    layers = derain.render_rain(factors, size, np.random.default_rng(3))[:, 0].numpy()
    kernels = derain.streak_kernel(*factors[:, 1:].T).numpy()
    k = kernels.shape[-1]
    side = math.ceil((size + k - 1) / 16) * 16
    noise = torch.from_numpy(np.random.default_rng(3).random((2, side, side), dtype=np.float32))
    for layer, kernel, seeds in zip(layers, kernels, derain.streak_seeds(noise, factors[:, 0])):
        plain = np.zeros((side + k, side + k))
        for y, x in torch.nonzero(seeds):
            plain[y:y + k, x:x + k] += seeds[y, x].item() * kernel
        plain = np.clip(plain[k - 1:k - 1 + size, k - 1:k - 1 + size], 0, 1)
        assert np.abs(layer - plain).max() < 1e-5


def test_layers_shape_range_and_sizes(rng):
    for size, expected in ((64, (64, 64)), ((30, 51), (30, 51)), (1, (1, 1))):
        layers = derain.rain_layers(5, size, derain.RAIN["large"], rng)
        assert layers.shape == (5, 1, *expected) and layers.dtype == torch.float32
        assert layers.min() >= 0 and layers.max() <= 1
    assert derain.rain_layers(5, 64, derain.RAIN["large"], rng).amax((1, 2, 3)).min() > 0.2


def test_same_seed_same_bytes():
    first, second, other = (derain.rain_layers(4, 50, derain.RAIN["unseen"], np.random.default_rng(s))
                            for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_ranges_nest_and_unseen_is_unseen():
    for factor in ("quantity", "width", "length", "direction"):
        small, medium, large = (getattr(derain.RAIN[name], factor) for name in ("small", "medium", "large"))
        assert large[0] < medium[0] < small[0] < small[1] < medium[1] < large[1]
    large, unseen = derain.RAIN["large"], derain.RAIN["unseen"]
    assert unseen.length[0] > large.length[1]
    assert unseen.direction[0] > max(abs(d) for d in large.direction)


def test_factors_stay_in_their_intervals(rng):
    for rain_range in derain.RAIN.values():
        factors = derain.draw_factors(500, rain_range, rng).numpy()
        factors[:, 3] = np.abs(factors[:, 3]) if rain_range.either_side else factors[:, 3]
        for column, name in enumerate(("quantity", "width", "length", "direction")):
            low, high = getattr(rain_range, name)
            assert factors[:, column].min() >= low - 1e-4 and factors[:, column].max() <= high + 1e-4
            assert np.ptp(factors[:, column]) > 0.9 * (high - low)


def test_add_rain_clips_and_is_grey():
    background = torch.tensor([0.0, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    rainy = derain.add_rain(background, torch.full((1, 1, 2, 2), 0.3))
    assert torch.allclose(rainy[0, :, 0, 0], torch.tensor([0.3, 0.8, 1.0]))


def test_rain_is_cheap(rng):
    """Under 0.2 ms a layer for 32 layers of 64x64; the best of several tries, as other programs may be running."""
    best = math.inf
    for _ in range(30):
        begin = time.process_time()
        derain.rain_layers(32, 64, derain.RAIN["large"], rng)
        best = min(best, time.process_time() - begin)
    assert best / 32 < 0.2e-3
