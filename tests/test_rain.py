"""Section 1: rain, against brute force and against what can be measured in the layer itself."""

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
        px, py = t * math.sin(angle), -t * math.cos(angle)
        picture += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma ** 2))
    return picture / picture[centre, centre]


@pytest.mark.parametrize("width, length, direction",
                         [(2, 15, 0), (1.5, 12, 30), (3, 21, -65), (2, 9, 90)])
def test_kernel_is_a_blurred_line(width, length, direction):
    kernel = derain.streak_kernel(width, length, direction).numpy()
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    expected = brute_force_streak(width, length, direction, len(kernel))
    assert np.abs(kernel - expected).max() < 2e-3
    border = np.concatenate([kernel[0], kernel[-1], kernel[:, 0], kernel[:, -1]])
    assert border.max() < 0.03  # nothing is cut off


def test_kernel_has_one_at_its_centre():
    """Also where it is short and wide, so that both blurred ends reach the middle."""
    for width, length in ((5, 6), (1, 30), (4, 1)):
        kernel = derain.streak_kernel(width, length, 30)
        assert kernel.max() == pytest.approx(1)
        assert kernel[len(kernel) // 2, len(kernel) // 2] == kernel.max()


def test_kernel_batch_equals_singles():
    width, length = torch.tensor([1.2, 3.0]), torch.tensor([8.0, 20.0])
    direction = torch.tensor([-40.0, 10.0])
    batch = derain.streak_kernel(width, length, direction)
    for i in range(2):
        single = derain.streak_kernel(width[i], length[i], direction[i])
        cut = (len(batch[i]) - len(single)) // 2
        inner = batch[i][cut:len(batch[i]) - cut, cut:len(batch[i]) - cut]
        assert torch.allclose(inner, single, atol=1e-6)


def test_quantity_is_the_number_of_seeds(rng):
    noise = torch.from_numpy(rng.random((2, 1000, 1000), dtype=np.float32))
    both = derain.streak_seeds(noise, torch.tensor([20.0, 100.0]))
    low, high = derain.STREAK_PEAK
    for seeds, above, quantity in zip(both, noise, (20, 100)):
        expected = quantity / 10_000 * seeds.numel()
        assert abs((seeds > 0).sum().item() - expected) < 5 * math.sqrt(expected)
        peaks = seeds[seeds > 0]
        assert low <= peaks.min() and peaks.max() <= high
        assert abs(peaks.mean() - (low + high) / 2) < 0.01  # uniform within the interval
        assert np.corrcoef(peaks, above[seeds > 0])[0, 1] > 0.999  # the highest is the brightest


def fourier_angle(layer):
    """Degrees from vertical of streaks (h, w): across the long axis of the power spectrum."""
    power = np.abs(np.fft.fft2(layer - layer.mean())) ** 2
    fy = np.fft.fftfreq(layer.shape[0])[:, None]
    fx = np.fft.fftfreq(layer.shape[1])[None]
    power *= np.hypot(fx, fy) < 0.2  # away from the corners, where the pixel grid shows
    axis = 0.5 * math.atan2(2 * (power * fx * fy).sum(), (power * (fx ** 2 - fy ** 2)).sum())
    return math.degrees(axis)  # vertical streaks have a horizontal spectrum


@pytest.mark.parametrize("direction", [-60, -20, 0, 35, 70])
def test_direction_can_be_measured(direction, rng):
    fixed = derain.RainRange((50, 50), (2, 2), (18, 18), (direction, direction))
    layers = derain.rain_layers(4, 256, fixed, rng)[:, 0].numpy()
    assert abs(np.mean([fourier_angle(layer) for layer in layers]) - direction) < 2


@pytest.mark.parametrize("name", ["large", "unseen"])
def test_layers_equal_a_plain_loop(name, monkeypatch):
    """Each seed leaves one kernel, its own image's, also when it lies outside the frame.
    Simple kernels and seeds stand in, so that this test needs rain_layers only."""
    def kernel(width, length, direction):  # (n, 15, 15)
        slope = (width + 0.1 * length + 0.01 * direction)[:, None, None]
        return slope * torch.arange(225).view(15, 15) / 900

    monkeypatch.setattr(derain, "streak_kernel", kernel)
    monkeypatch.setattr(derain, "streak_seeds", lambda noise, quantity:
                        noise * (noise > 1 - quantity.view(-1, 1, 1) / 10_000))
    rain_range, n, height, width = derain.RAIN[name], 3, 40, 29
    layers = derain.rain_layers(n, (height, width), rain_range, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    factors = []
    for factor in ("quantity", "width", "length", "direction"):
        factors.append(rng.uniform(*getattr(rain_range, factor), n))
    if rain_range.either_side:
        factors[3] = factors[3] * rng.choice([-1, 1], n)
    quantity, *streak = (torch.from_numpy(factor).float() for factor in factors)
    kernels = derain.streak_kernel(*streak).numpy()
    k = kernels.shape[-1]
    canvas = [math.ceil((side + k - 1) / 16) * 16 for side in (height, width)]
    noise = torch.from_numpy(rng.random((n, *canvas), dtype=np.float32))
    seeds = derain.streak_seeds(noise, quantity)
    assert layers.shape == (n, 1, height, width)
    for i in range(n):
        plain = np.zeros((canvas[0] + k, canvas[1] + k))
        for y, x in torch.nonzero(seeds[i]):
            plain[y:y + k, x:x + k] += seeds[i, y, x].item() * kernels[i]
        plain = np.clip(plain[k - 1:k - 1 + height, k - 1:k - 1 + width], 0, 1)
        assert np.abs(layers[i, 0].numpy() - plain).max() < 1e-5


def test_add_rain_clips_and_is_grey():
    background = torch.tensor([0.0, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone()
    before = background.clone()
    rainy = derain.add_rain(background, torch.full((1, 1, 2, 2), 0.3))
    assert torch.allclose(rainy[0, :, 0, 0], torch.tensor([0.3, 0.8, 1.0]))
    assert torch.equal(background, before)  # the caller's tensor is left alone


def test_a_degradation_rains_afresh():
    clean = torch.full((2, 3, 30, 20), 0.2)
    degrade = derain.rain_degradation(derain.RAIN["large"])
    rainy = degrade(clean, np.random.default_rng(0))
    rain = derain.rain_layers(2, (30, 20), derain.RAIN["large"], np.random.default_rng(0))
    assert torch.equal(rainy, derain.add_rain(clean, rain))
    assert not torch.equal(rainy, degrade(clean, np.random.default_rng(1)))
    dry = derain.RainRange(quantity=(-9, -1), width=(1, 2), length=(4, 8), direction=(0, 0))
    assert torch.equal(derain.rain_degradation(dry)(clean, np.random.default_rng(0)), clean)
