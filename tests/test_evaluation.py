"""Section 6: the measures against plain loops, closed forms and their limits; tiled restoration against the whole."""

import math

import numpy as np
import pytest
import torch

import derain


@pytest.fixture
def images(rng):
    """output, rainy, clean (2, 3, 14, 17) and rain (2, 1, 14, 17)."""
    clean = torch.from_numpy(rng.random((2, 3, 14, 17), dtype=np.float32))
    rain = torch.from_numpy(np.where(rng.random((2, 1, 14, 17)) < 0.3, rng.random((2, 1, 14, 17)), 0).astype("f4"))
    output = torch.from_numpy(rng.random((2, 3, 14, 17), dtype=np.float32))
    return output, (clean + rain).clamp(0, 1), clean, rain


def loop_evaluation(output, rainy, clean, rain):
    """E_R, E_B and E_R_ideal, a pixel at a time."""
    sums = {"E_R": [0.0, 0], "E_B": [0.0, 0], "E_R_ideal": [0.0, 0]}
    n, channels, height, width = clean.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                raining = rain[i, 0, y, x].item() > derain.RAIN_THRESHOLD
                for c in range(channels):
                    o, r, b = (255 * t[i, c, y, x].item() for t in (output, rainy, clean))
                    for name, difference, counts in (("E_R", o - r, raining), ("E_R_ideal", b - r, raining),
                                                     ("E_B", o - b, not raining)):
                        if counts:
                            sums[name][0] += difference ** 2
                            sums[name][1] += 1
    return {name: math.sqrt(total / count) for name, (total, count) in sums.items()}


def test_against_a_loop(images):
    measured = derain.decoupled_evaluation(*images)
    assert set(measured) == {"E_R", "E_B", "E_R_ideal", "psnr", "ssim"}
    for name, value in loop_evaluation(*images).items():
        assert measured[name] == pytest.approx(value, rel=1e-5)


def test_limits(images):
    _, rainy, clean, rain = images
    idle = derain.decoupled_evaluation(rainy, rainy, clean, rain)
    assert idle["E_R"] == 0 and idle["E_R_ideal"] > 0
    perfect = derain.decoupled_evaluation(clean, rainy, clean, rain)
    assert perfect["E_R"] == perfect["E_R_ideal"] > 0 and perfect["E_B"] == 0
    assert perfect["psnr"] == math.inf and perfect["ssim"] == pytest.approx(1)


def test_constant_errors_in_closed_form():
    """Rain of 0.2 on the left half; the output takes off 0.1 of it, and adds 0.05 on the right half."""
    clean = torch.full((3, 3, 12, 20), 0.4)
    rain = torch.zeros(3, 1, 12, 20)
    rain[..., :10] = 0.2
    rainy = (clean + rain).clamp(0, 1)
    output = rainy.clone()
    output[..., :10] -= 0.1
    output[..., 10:] += 0.05
    measured = derain.decoupled_evaluation(output, rainy, clean, rain)
    assert measured["E_R"] == pytest.approx(25.5, rel=1e-5)
    assert measured["E_R_ideal"] == pytest.approx(51, rel=1e-5)
    assert measured["E_B"] == pytest.approx(12.75, rel=1e-5)


def test_no_rain_and_rain_everywhere(images):
    output, _, clean, rain = images
    dry = derain.decoupled_evaluation(output, clean, clean, torch.zeros_like(rain))
    assert math.isnan(dry["E_R"]) and dry["E_B"] > 0
    wet = derain.decoupled_evaluation(output, clean, clean, torch.ones_like(rain))
    assert math.isnan(wet["E_B"]) and wet["E_R"] > 0


def test_mask_is_strict_and_joins_channels():
    t = derain.RAIN_THRESHOLD
    assert derain.rain_mask(torch.tensor([0.0, t, t + 0.01]).view(1, 1, 1, 3)).flatten().tolist() == [False, False, True]
    colour = torch.zeros(1, 3, 1, 2)
    colour[0, 2, 0, 1] = 2 * t  # one channel is enough, whatever the mean of the three
    assert derain.rain_mask(colour).shape == (1, 1, 1, 2)
    assert derain.rain_mask(colour).flatten().tolist() == [False, True]
    assert derain.rain_mask(colour, threshold=0.6).sum() == 0


def test_coloured_rain_and_tiny_images(images):
    output, rainy, clean, rain = images
    grey = derain.decoupled_evaluation(output, rainy, clean, rain)
    assert derain.decoupled_evaluation(output, rainy, clean, rain.expand(-1, 3, -1, -1)) == grey
    tiny = derain.decoupled_evaluation(*(t[..., :5, :5] for t in images))
    assert math.isnan(tiny["ssim"]) and tiny["E_R"] > 0


def test_wrong_shapes_are_refused(images):
    output, rainy, clean, rain = images
    with pytest.raises(ValueError, match="shapes"):
        derain.decoupled_evaluation(output[:1], rainy, clean, rain)
    with pytest.raises(ValueError, match="shapes"):
        derain.decoupled_evaluation(output, rainy, clean, rain[..., :-1])
    with pytest.raises(ValueError):
        derain.psnr(output, clean[:1])
    with pytest.raises(ValueError, match="11"):
        derain.ssim(output[..., :10], clean[..., :10])


def test_psnr_closed_form_is_a_mean_over_images():
    clean = torch.zeros(2, 3, 12, 12)
    output = torch.stack([torch.full((3, 12, 12), 0.1), torch.full((3, 12, 12), 0.01)])
    assert derain.psnr(output, clean) == pytest.approx((20 + 40) / 2, abs=1e-4)


def loop_ssim(x, y):
    """SSIM of two (h, w) arrays by the formulas of Wang et al. 2004, a window at a time, with weighted moments."""
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    weight /= weight.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top:top + 11, left:left + 11], y[top:top + 11, left:left + 11]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
            covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
            values.append((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                          / ((mean_a ** 2 + mean_b ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_against_a_loop(noise, rng):
    clean = np.clip(rng.random((2, 3, 20, 23)) * 0.2 + np.linspace(0, 0.8, 23), 0, 1)
    output = np.clip(clean + noise * rng.normal(size=clean.shape), 0, 1)
    expected = np.mean([loop_ssim(output[i, c], clean[i, c]) for i in range(2) for c in range(3)])
    measured = derain.ssim(torch.from_numpy(output).float(), torch.from_numpy(clean).float())
    assert measured == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("height, width", [(150, 131), (64, 65), (40, 200), (30, 17), (1, 1), (112, 112)])
def test_tiles_equal_the_whole(height, width, rng):
    """The ResNet sees 10 pixels around each; 16 are thrown away, so that tiling must not change anything."""
    network = derain.build_network("resnet", 1)
    image = torch.from_numpy(rng.random((3, height, width), dtype=np.float32))
    whole = derain.predict(network, image[None])[0]
    assert (derain.restore(network, image, tile=64) - whole).abs().max() < 1e-5


class TileMean(torch.nn.Module):
    """The worst network for tiling: each tile comes out flat, at its own mean."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)


def test_tiles_fade_without_a_seam():
    image = torch.linspace(0, 1, 300).expand(3, 100, 300)
    restored = derain.restore(TileMean(), image, tile=96)
    steps = restored.diff(dim=2).abs()
    largest = (restored.amax() - restored.amin()).item()
    assert largest > 0.3 and steps.max() < 0.03  # tiles differ by 0.16, spread over the 16 pixels of the fade
