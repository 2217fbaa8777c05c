"""Section 1's noise and second rain, and the evaluation where every pixel is noisy."""

import math

import numpy as np
import pytest
import torch

import derain

GREY = torch.full((6, 3, 120, 120), 0.5)


def noise_of(kind: str, clean=GREY, seed=0) -> torch.Tensor:
    """The residual, of the level in the middle of the kind's interval."""
    low, high = derain.NOISE[kind]
    derain.NOISE[kind] = ((low + high) / 2,) * 2
    try:
        return derain.degradation(kind)(clean, np.random.default_rng(seed))[1]
    finally:
        derain.NOISE[kind] = (low, high)


@pytest.mark.parametrize("kind", derain.NOISE)
def test_noise_is_clipped_and_added_and_comes_from_its_stream(kind):
    clean = torch.rand(3, 3, 30, 40)
    noisy, noise = derain.degradation(kind)(clean, np.random.default_rng(5))
    assert noisy.dtype == noise.dtype == torch.float32 and noise.shape == clean.shape
    torch.testing.assert_close(noisy, (clean + noise).clamp(0, 1))
    again = derain.degradation(kind)(clean, np.random.default_rng(5))
    other = derain.degradation(kind)(clean, np.random.default_rng(6))
    assert torch.equal(again[1], noise) and not torch.equal(other[1], noise)


@pytest.mark.parametrize("kind, variance", (
    ("gaussian", 0.1 ** 2), ("uniform", 0.175 ** 2 / 3), ("poisson", 0.5 / 50),
    ("salt-and-pepper", 0.04 * 0.5 ** 2), ("correlated", 0.1 ** 2)))
def test_variance_is_that_of_the_closed_form(kind, variance):
    """On mid grey.  Poisson: x / photons; salt and pepper: share * 0.5 ** 2, as both ends are 0.5 away."""
    noise = noise_of(kind)
    assert noise.square().mean().item() == pytest.approx(variance, rel=0.04)
    assert abs(noise.mean().item()) < 0.004
    assert 20 < 255 * math.sqrt(variance) < 28  # all kinds are about equally strong


def test_levels_are_drawn_per_image_within_their_interval():
    noise = derain.degradation("gaussian")(GREY.repeat(4, 1, 1, 1), np.random.default_rng(0))[1]
    levels = noise.flatten(1).std(1)
    assert levels.min() > 0.085 and levels.max() < 0.115 and levels.std() > 0.003


def test_uniform_noise_is_bounded_and_gaussian_is_not():
    assert noise_of("uniform").abs().max() <= 0.175
    assert noise_of("gaussian").abs().max() > 0.35


def test_poisson_noise_grows_with_brightness():
    bright, dark = noise_of("poisson", torch.full_like(GREY, 0.8)), noise_of("poisson", torch.full_like(GREY, 0.2))
    assert (bright.var() / dark.var()).item() == pytest.approx(4, rel=0.06)
    photons = (noise_of("poisson") + 0.5) * 50
    torch.testing.assert_close(photons, photons.round(), atol=1e-4, rtol=0)


def test_salt_and_pepper_hits_whole_pixels_and_leaves_the_others():
    clean = torch.rand(2, 3, 200, 200) * 0.8 + 0.1
    noisy, noise = derain.degradation("salt-and-pepper")(clean, np.random.default_rng(0))
    hit = (noisy == 0) | (noisy == 1)
    assert torch.equal(hit.all(1), hit.any(1))
    assert torch.equal(noisy[~hit], clean[~hit]) and (noise[~hit] == 0).all()
    assert 0.03 < hit.float().mean() < 0.05
    assert (noisy == 1).sum() / hit.sum() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind, near, far", (("gaussian", 0, 0), ("uniform", 0, 0), ("poisson", 0, 0),
                                             ("correlated", math.exp(-1 / 9), math.exp(-4 / 9))))
def test_correlation_of_neighbours(kind, near, far):
    """White noise after a blur of sigma s: pixels d apart correlate by exp(-d^2 / 4 s^2); here s = 1.5."""
    noise = noise_of(kind)
    noise = noise / noise.std()
    for dim in (2, 3):
        for distance, expected in ((1, near), (2, far)):
            a, b = noise.narrow(dim, 0, 100), noise.narrow(dim, distance, 100)
            assert (a * b).mean().item() == pytest.approx(expected, abs=0.03)
    assert abs((noise[:, 0] * noise[:, 1]).mean().item()) < 0.04  # channels by themselves


def test_strokes_are_screen_blended():
    clean = torch.rand(3, 3, 96, 80)
    rainy, rain = derain.stroke_rain(clean, np.random.default_rng(0))
    assert rain.shape == (3, 1, 96, 80) and 0 <= rain.min() and rain.max() <= 1
    torch.testing.assert_close(rainy, clean + rain * (1 - clean))
    white = torch.ones(2, 3, 50, 50)
    torch.testing.assert_close(derain.stroke_rain(white, np.random.default_rng(0))[0], white)
    assert 0.2 < derain.rain_mask(rain).float().mean() < 0.5


def orientation(layers: torch.Tensor) -> torch.Tensor:
    """Dominant direction of streaks, degrees from vertical to either side, from the structure tensor."""
    smooth = torch.nn.functional.avg_pool2d(layers, 3, 1)[:, 0]
    dy, dx = smooth[:, 2:, 1:-1] - smooth[:, :-2, 1:-1], smooth[:, 1:-1, 2:] - smooth[:, 1:-1, :-2]
    xx, yy, xy = ((a * b).sum((1, 2)) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    return torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy)).abs()  # of the gradient, which crosses the streak


def test_both_unseen_rains_are_slanted_as_no_training_rain_is():
    clean = torch.zeros(24, 3, 128, 128)
    for name in ("unseen", "strokes"):
        _, rain = derain.degradation(name)(clean, np.random.default_rng(1))
        assert orientation(rain).min() > 47, name
    for name in ("small", "medium", "large"):
        _, rain = derain.degradation(name)(clean, np.random.default_rng(1))
        assert orientation(rain).max() < 47, name


class TestDenseEvaluation:
    clean = 0.4 + 0.2 * torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))

    def test_ends(self):
        perfect = derain.dense_evaluation(self.clean, self.noisy, self.clean)
        ideal = 255 * (self.noisy - self.clean).square().mean().sqrt().item()
        assert perfect["E_R"] == pytest.approx(ideal) and perfect["E_R_ideal"] == pytest.approx(ideal)
        assert perfect["E_B"] == pytest.approx(0, abs=1e-4)
        untouched = derain.dense_evaluation(self.noisy, self.noisy, self.clean)
        assert untouched["E_R"] == pytest.approx(0) and untouched["E_B"] == pytest.approx(0)

    def test_removal_and_damage_are_told_apart(self):
        noise = (self.noisy - self.clean).double()
        damage = torch.randn(noise.shape, dtype=torch.float64) * 0.03
        damage -= noise * (damage * noise).sum() / noise.square().sum()
        output = (self.noisy.double() - 0.7 * noise + damage).float()
        measured = derain.dense_evaluation(output, self.noisy, self.clean)
        assert measured["E_R"] == pytest.approx(0.7 * measured["E_R_ideal"], rel=1e-5)
        assert measured["E_B"] == pytest.approx(255 * damage.square().mean().sqrt().item(), rel=1e-5)

    def test_the_squares_add_up_to_the_whole_error(self):
        output = torch.rand(self.clean.shape)
        measured = derain.dense_evaluation(output, self.noisy, self.clean)
        error = 255 * (output - self.clean).double().square().mean().sqrt().item()
        assert math.hypot(measured["E_R_ideal"] - measured["E_R"], measured["E_B"]) == pytest.approx(error)

    def test_wrecking_the_image_shows_in_e_b_alone(self):
        blank = torch.zeros_like(self.clean)
        measured = derain.dense_evaluation(blank, self.noisy, self.clean)
        assert measured["E_R"] == pytest.approx(measured["E_R_ideal"], rel=0.1) and measured["E_B"] > 100
