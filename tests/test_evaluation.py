"""Section 4: the measures against plain loops, known values and their limits; tiles."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import derain
from golden import fill

lab = pytest.mark.lab
evaluation = pytest.mark.evaluation


@pytest.fixture
def images(rng):
    """Return output, rainy and clean, (3, 3, 13, 10), too small for SSIM.

    The first image has rain that brightens, the second one some that also darkens, the third one
    too little to be seen.  The rain differs from channel to channel.
    """
    shape = (3, 3, 13, 10)
    clean = torch.from_numpy(rng.random(shape, dtype=np.float32))
    rain = torch.from_numpy(rng.uniform(-0.2, 0.6, shape) * (rng.random(shape) < 0.2)).float()
    rain[0].abs_()
    rain[2] = 0.01
    output = torch.from_numpy(rng.random(shape, dtype=np.float32))
    return output, clean + rain, clean


def root_mean_square(values):
    return math.sqrt(sum(value**2 for value in values) / len(values))


@lab
@evaluation
def test_mask_is_of_the_channel_that_changed_most(images):
    _, rainy, clean = images
    changed = np.abs((rainy - clean).numpy()).max(1, keepdims=True)
    mask = derain.rain_mask(rainy, clean)
    assert mask.dtype == torch.bool and np.array_equal(mask, changed > 4 / 255 + 1e-6)


@lab
@evaluation
def test_mask_threshold_is_strict_for_files_of_8_bits():
    """4 grey levels are no rain, 5 are, however the division by 255 is rounded."""
    clean = torch.arange(251.0).expand(1, 3, 1, 251)
    assert not derain.rain_mask((clean + 4) / 255, clean / 255).any()
    assert derain.rain_mask((clean + 5) / 255, clean / 255).all()
    black = torch.zeros(1, 3, 1, 1)
    assert not derain.rain_mask(black + 4 / 255 + 3e-7, black).any()
    assert derain.rain_mask(black + 4 / 255 + 3e-6, black).all()


@lab
@evaluation
@pytest.mark.parametrize("brightness", [1, 0], ids=["noise", "black"])
def test_evaluation_against_loops(images, brightness):
    output, rainy, clean = images
    output = brightness * output
    measured = derain.decoupled_evaluation(output, rainy, clean)

    # One slope for all points (r, d), and an intercept for each image, by least squares.
    r = (rainy - clean).flatten().numpy()
    d = (output - clean).flatten().numpy()
    intercepts = np.eye(3).repeat(3 * 13 * 10, axis=0)
    slope = np.linalg.lstsq(np.column_stack([r, intercepts]), d)[0][0]

    rest, removed, background = [], [], []
    for i, y, x in np.ndindex(3, 13, 10):
        o, rain, b = (255 * image[i, :, y, x].numpy() for image in (output, rainy, clean))
        rest.extend(o - b - slope * (rain - b))
        if max(abs(rain - b)) > 4.0003:
            removed.extend(o - rain)
        else:
            background.extend(o - b)
    expected = {
        "rain_left": 100 * slope,
        "damage": root_mean_square(rest),
        "E_R": root_mean_square(removed),
        "E_B": root_mean_square(background),
        "psnr": derain.psnr(output, clean),
        "ssim": math.nan,
    }
    assert measured == pytest.approx(expected, rel=1e-4, nan_ok=True)


@lab
@evaluation
@pytest.mark.parametrize("share", [1.4, 0, 0.3, -0.5])
@pytest.mark.parametrize("light", [0, 1], ids=["same light", "other light"])
def test_known_values(images, share, light):
    """A share of the rain was left, and a constant added to each image."""
    _, rainy, clean = images
    added = torch.tensor([-0.1, 0.2, -0.3]) * light
    output = clean + share * (rainy - clean) + added.view(3, 1, 1, 1)
    measured = derain.decoupled_evaluation(output, rainy, clean)
    assert measured["rain_left"] == pytest.approx(100 * share, abs=0.01)
    assert measured["damage"] == pytest.approx(255 * root_mean_square(added), abs=0.01)


@lab
@evaluation
def test_no_pattern_of_rain_and_rain_everywhere(images):
    output, _, clean = ((8 * image).round() / 8 for image in images)  # so that sums are exact
    wrong = 255 * (output - clean).flatten()
    faint = clean.clone()
    faint[:, :, ::2] += 2 / 255
    lighter = clean + torch.tensor([0.125, 0.25, -0.125]).view(3, 1, 1, 1)
    for rainy in (clean, faint, lighter):
        measured = derain.decoupled_evaluation(output, rainy, clean)
        assert math.isnan(measured["rain_left"])
        assert measured["damage"] == pytest.approx(root_mean_square(wrong), rel=1e-4)
        assert math.isnan(measured["E_R"]) == (rainy is not lighter)
        assert math.isnan(measured["E_B"]) == (rainy is lighter)


@lab
@evaluation
def test_the_tensors_given_stay_as_they_are(images):
    images = [2 * image - 0.5 for image in images]  # also outside [0, 1]
    before = [image.clone() for image in images]
    derain.decoupled_evaluation(*images)
    derain.psnr(*images[:2])
    assert all(map(torch.equal, images, before))


@lab
@evaluation
@pytest.mark.parametrize("wrong", range(3))
def test_wrong_shapes_are_refused(images, wrong):
    for axis in range(4):
        changed = list(images)
        changed[wrong] = changed[wrong].narrow(axis, 0, 1)
        with pytest.raises(ValueError):
            derain.decoupled_evaluation(*changed)
        if wrong < 2:
            with pytest.raises(ValueError):
                derain.psnr(*changed[:2])


@lab
@evaluation
def test_psnr_is_a_mean_over_images():
    """Of 20 and 40 dB.  All of the error is in one channel, and half of the pixels are right."""
    clean = 0.8 * torch.ones(2, 3, 14, 10)
    output = clean.clone()
    output[0, 1, ::2] += 6**0.5 * 0.1  # leaves the range of images
    output[1, 2, :, ::2] -= 6**0.5 * 0.01
    assert derain.psnr(output, clean) == pytest.approx(30, abs=1e-3)
    assert derain.decoupled_evaluation(output, clean, clean)["psnr"] == pytest.approx(30, abs=1e-3)
    assert derain.psnr(clean, clean) == math.inf


def loop_ssim(x, y):
    """Return the SSIM of two arrays of 20 x 11, a window at a time, with weighted moments."""
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2)).ravel()
    values = []
    for top in range(10):
        a, b = (image[top : top + 11].ravel() for image in (x, y))
        m, n = np.average([a, b], 1, weight)
        (v, c), (_, w) = np.cov(a, b, ddof=0, aweights=weight)
        above = (2 * m * n + 1e-4) * (2 * c + 9e-4)
        values.append(above / ((m**2 + n**2 + 1e-4) * (v + w + 9e-4)))
    return np.mean(values)


@evaluation
def test_ssim_against_a_loop(rng):
    clean = rng.random((2, 3, 20, 11)) * 0.2 + np.linspace(0, 0.8, 11)
    clean[0] *= 0.05  # dark, so that the constants count
    output = clean + 0.1 * clean.max((2, 3), keepdims=True) * rng.normal(size=clean.shape)
    expected = np.mean([loop_ssim(output[i, c], clean[i, c]) for i, c in np.ndindex(2, 3)])
    output = torch.from_numpy(output).float()
    clean = torch.from_numpy(clean).float()
    assert derain.ssim(output, clean) == pytest.approx(expected, abs=1e-5)
    measured = derain.decoupled_evaluation(output, output, clean)
    assert measured["ssim"] == pytest.approx(expected, abs=1e-5)


@evaluation
def test_ssim_refuses_what_it_cannot_measure(rng):
    image = torch.from_numpy(rng.random((2, 3, 14, 17)))
    low = image[:, :, :10]
    narrow = image[..., :10]
    for output, clean in ((low, low), (narrow, narrow), (image, image[:1])):
        with pytest.raises(ValueError):
            derain.ssim(output, clean)
    for image in (low, narrow):
        assert math.isnan(derain.decoupled_evaluation(image, image, image)["ssim"])


@pytest.mark.parametrize("size", [5, 7])
def test_opening_against_all_squares(size, rng):
    image = rng.random((16, 11))

    def squares(picture, beyond):
        padded = np.pad(picture, size // 2, constant_values=beyond)
        return sliding_window_view(padded, (size, size))

    smallest = squares(image, 1).min((2, 3))
    opened = derain.opening(torch.from_numpy(image).expand(2, 3, -1, -1), size)
    assert np.array_equal(opened[1, 2], squares(smallest, 0).max((2, 3)))
