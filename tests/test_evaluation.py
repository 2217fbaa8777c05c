"""Section 3: the measures against plain loops, known values and their limits."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import derain
from golden import apply, check, near

graded = pytest.mark.graded


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


def mask_by_hand(rainy, clean):
    changed = np.abs((rainy - clean).numpy()).max(1, keepdims=True)
    return torch.from_numpy(changed > 4 / 255 + 1e-6)


def psnr_by_hand(output, clean):
    ratios = []
    for x, y in zip(output.double().numpy(), clean.double().numpy()):
        error = root_mean_square((x - y).flatten())
        ratios.append(20 * math.log10(1 / error) if error else math.inf)
    return np.mean(ratios)


def ssim_by_hand(output, clean):
    """One window at a time, with weighted moments."""
    if min(clean.shape[2:]) < 11:
        raise ValueError
    squares = (np.arange(11) - 5) ** 2
    weight = np.exp(-np.add.outer(squares, squares) / (2 * 1.5**2)).flatten()
    images = torch.stack([output, clean]).double()
    windows = sliding_window_view(images, (11, 11), (3, 4)).reshape(2, -1, 121)
    values = []
    for x, y in zip(*windows):
        m_x, m_y = np.average([x, y], 1, weight)
        (v_x, covariance), (_, v_y) = np.cov(x, y, ddof=0, aweights=weight)
        above = (2 * m_x * m_y + 0.01**2) * (2 * covariance + 0.03**2)
        values.append(above / ((m_x**2 + m_y**2 + 0.01**2) * (v_x + v_y + 0.03**2)))
    return np.mean(values)


BY_HAND = {"rain_mask": mask_by_hand, "psnr": psnr_by_hand, "ssim": ssim_by_hand}


def measures(images, **expected):
    """Check what decoupled_evaluation returns for output, rainy and clean."""
    measured = apply(derain.decoupled_evaluation, *images)
    for name, value in expected.items():
        near(f"decoupled_evaluation: {name}", measured[name], value, 0.01)


def refuses(function, *images):
    """Check that no image may differ in shape from the others."""
    for i, image in enumerate(images):
        for axis, size in enumerate(image.shape):
            for smaller in (1, size - 1):
                changed = list(images)
                changed[i] = image.narrow(axis, 0, smaller)
                with pytest.raises(ValueError):
                    function(*changed)


@graded("rain_mask", 1)
def test_a_pixel_is_wet_if_one_channel_changed(images):
    _, rainy, clean = images
    check(derain.rain_mask, rainy, clean, expected=mask_by_hand(rainy, clean))
    assert derain.rain_mask(rainy, clean).dtype == torch.bool


@graded("rain_mask", 1)
def test_the_threshold_is_strict_for_files_of_8_bits():
    """4 grey levels are no rain, 5 are, however the division by 255 is rounded."""
    clean = torch.arange(251.0).expand(1, 3, 1, 251)
    assert not derain.rain_mask((clean + 4) / 255, clean / 255).any()
    assert derain.rain_mask((clean + 5) / 255, clean / 255).all()


@graded("decoupled_evaluation", 2)
@pytest.mark.parametrize("brightness", [1, 0])
def test_evaluation_against_a_fit(images, brightness):
    """By least squares: a line for all points (r, d), with an intercept for each image."""
    output, rainy, clean = images
    output = brightness * output
    r = 255 * (rainy - clean).double().numpy()
    d = 255 * (output - clean).double().numpy()
    intercepts = np.eye(3).repeat(3 * 13 * 10, axis=0)
    slope = np.linalg.lstsq(np.column_stack([r.flatten(), intercepts]), d.flatten())[0][0]
    wet = mask_by_hand(rainy, clean).numpy().repeat(3, axis=1)
    measures(
        (output, rainy, clean),
        rain_left=100 * slope,
        damage=root_mean_square((d - slope * r).flatten()),
        E_R=root_mean_square((d - r)[wet]),
        E_B=root_mean_square(d[~wet]),
    )


@graded("decoupled_evaluation", 1)
def test_known_values(images):
    """A share of the rain was left, and a constant added to each image."""
    _, rainy, clean = images
    for share in (1.4, 1, 0, 0.3, -0.5):
        for added in ([0, 0, 0], [-0.1, 0.2, -0.3]):
            output = clean + share * (rainy - clean) + torch.tensor(added).view(3, 1, 1, 1)
            damage = 255 * root_mean_square(added)
            measures((output, rainy, clean), rain_left=100 * share, damage=damage)


@graded("decoupled_evaluation", 1)
def test_without_a_pattern_of_rain_there_is_nothing_to_measure(images):
    output, _, clean = ((8 * image).round() / 8 for image in images)  # so that sums are exact
    everywhere = root_mean_square(255 * (output - clean).flatten())
    faint = clean.clone()
    faint[:, :, ::2] += 2 / 255
    for rainy in (clean, faint):
        dry = {"rain_left": math.nan, "damage": everywhere, "E_R": math.nan, "E_B": everywhere}
        measures((output, rainy, clean), **dry)
    lighter = clean + torch.tensor([0.125, 0.25, -0.125]).view(3, 1, 1, 1)
    measures((output, lighter, clean), rain_left=math.nan, damage=everywhere, E_B=math.nan)
    measures((clean, lighter, clean), E_R=255 * root_mean_square([0.125, 0.25, -0.125]))


@graded("decoupled_evaluation", 1)
def test_whole_images_are_measured_as_well(images, rng):
    """By PSNR and SSIM, from the clean image, and beyond [0, 1]; SSIM needs 11 x 11 pixels."""
    output, rainy, clean = [2 * image - 0.5 for image in images]
    psnr = psnr_by_hand(output, clean)
    measures((output, rainy, clean), psnr=psnr, ssim=math.nan)
    measures((output.mT, rainy.mT, clean.mT), psnr=psnr, ssim=math.nan)
    output, rainy, clean = torch.from_numpy(rng.random((3, 1, 3, 11, 12))).float()
    measures((output, rainy, clean), ssim=ssim_by_hand(output, clean))
    refuses(derain.decoupled_evaluation, *images)


@graded("psnr", 1)
def test_the_mean_of_20_and_40_dB():
    """All of the error is in one channel, and half of the pixels are right."""
    clean = 0.8 * torch.ones(2, 3, 14, 10)
    output = clean.clone()
    output[0, 1, ::2] += 6**0.5 * 0.1  # leaves the range of images
    output[1, 2, :, ::2] -= 6**0.5 * 0.01
    check(derain.psnr, output, clean, expected=30, tolerance=1e-3)
    check(derain.psnr, clean, clean, expected=math.inf)
    refuses(derain.psnr, output, clean)


@graded("ssim", 1)
def test_similarity_against_a_loop(rng):
    """Of dark images, where the constants count; and of their negatives, where it is negative."""
    brightness = np.reshape([0.02, 0.5], (2, 1, 1, 1))
    clean, noise = torch.from_numpy(brightness * rng.random((2, 2, 3, 20, 11))).float()
    output = 0.7 * clean + 0.3 * noise
    for other in (output, 1 - clean):
        check(derain.ssim, other, clean, expected=ssim_by_hand(other, clean))


@graded("ssim", 1)
def test_what_has_no_similarity_is_refused(rng):
    image = torch.from_numpy(rng.random((2, 3, 14, 17)))
    refuses(derain.ssim, image, image)
    for small in (image[:, :, :10], image[..., :10]):
        with pytest.raises(ValueError):
            derain.ssim(small, small)
    smallest = image[..., :11, :11]
    check(derain.ssim, smallest, smallest, expected=1)
