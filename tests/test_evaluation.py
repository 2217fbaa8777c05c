"""Section 6: the measures against plain loops, closed forms and their limits; tiles."""

import math

import numpy as np
import pytest
import torch

import derain


@pytest.fixture
def images(rng):
    """output, rainy, clean (2, 3, 10, 13): rain that brightens, darkens, and differs by channel.
    Too small for SSIM, so that a blank there costs nothing here."""
    clean = torch.from_numpy(rng.random((2, 3, 10, 13), dtype=np.float32))
    rain = rng.uniform(-0.6, 0.6, (2, 3, 10, 13)) * (rng.random((2, 3, 10, 13)) < 0.2)
    output = torch.from_numpy(rng.random((2, 3, 10, 13), dtype=np.float32))
    return output, (clean + torch.from_numpy(rain).float()).clamp(0, 1), clean


def loop_mask(rainy, clean):
    mask = np.zeros((len(clean), *clean.shape[2:]), dtype=bool)
    for i, y, x in np.ndindex(*mask.shape):
        for c in range(3):
            if abs(rainy[i, c, y, x].item() - clean[i, c, y, x].item()) > derain.RAIN_THRESHOLD:
                mask[i, y, x] = True
    return mask


def loop_evaluation(output, rainy, clean):
    """The four root mean squares, a pixel at a time."""
    mask = loop_mask(rainy, clean)
    squares = {"E_R": [], "E_R_ideal": [], "E_W": [], "E_B": []}
    for i, c, y, x in np.ndindex(*clean.shape):
        o, r, b = (255 * t[i, c, y, x].item() for t in (output, rainy, clean))
        if mask[i, y, x]:
            squares["E_R"].append((o - r) ** 2)
            squares["E_R_ideal"].append((b - r) ** 2)
            squares["E_W"].append((o - b) ** 2)
        else:
            squares["E_B"].append((o - b) ** 2)
    return {name: math.sqrt(sum(values) / len(values)) for name, values in squares.items()}


@pytest.mark.lab
@pytest.mark.evaluation
def test_mask_against_a_loop(images):
    _, rainy, clean = images
    mask = derain.rain_mask(rainy, clean)
    assert mask.shape == (2, 1, 10, 13) and mask.dtype == torch.bool
    assert np.array_equal(mask[:, 0].numpy(), loop_mask(rainy, clean))
    assert 0.1 < mask.float().mean() < 0.9


def test_mask_threshold_is_strict_for_files_of_8_bits():
    """4 grey levels are no rain, 5 are, however the division by 255 is rounded."""
    clean = torch.arange(250).float()[None, None, None].expand(1, 3, 1, 250)
    assert not derain.rain_mask((clean + 4) / 255, clean / 255).any()
    assert not derain.rain_mask(clean / 255, (clean + 4) / 255).any()
    assert derain.rain_mask((clean + 5) / 255, clean / 255).all()


@pytest.mark.lab
@pytest.mark.evaluation
def test_evaluation_against_a_loop(images, monkeypatch):
    """The mask and PSNR are replaced, so that this test needs decoupled_evaluation only."""
    mask = torch.from_numpy(loop_mask(*images[1:]))[:, None]
    monkeypatch.setattr(derain, "rain_mask", lambda rainy, clean: mask)
    monkeypatch.setattr(derain, "psnr", lambda output, clean: 0.0)
    measured = derain.decoupled_evaluation(*images)
    assert set(measured) == {"E_R", "E_R_ideal", "E_W", "E_B", "psnr", "ssim"}
    for name, value in loop_evaluation(*images).items():
        assert measured[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.lab
@pytest.mark.evaluation
def test_wet_and_dry_make_the_whole(images):
    """255^2 MSE = |M| E_W^2 + (1 - |M|) E_B^2."""
    output, rainy, clean = images
    measured = derain.decoupled_evaluation(output, rainy, clean)
    wet = loop_mask(rainy, clean).mean()
    whole = 255 ** 2 * (output - clean).double().square().mean().item()
    parts = wet * measured["E_W"] ** 2 + (1 - wet) * measured["E_B"] ** 2
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.lab
@pytest.mark.evaluation
def test_limits(images):
    _, rainy, clean = images
    idle = derain.decoupled_evaluation(rainy, rainy, clean)
    assert idle["E_R"] == 0 and idle["E_W"] == pytest.approx(idle["E_R_ideal"], rel=1e-4)
    perfect = derain.decoupled_evaluation(clean, rainy, clean)
    assert perfect["E_R"] == pytest.approx(perfect["E_R_ideal"], rel=1e-4)
    assert perfect["E_B"] == perfect["E_W"] == 0 and perfect["psnr"] == math.inf


@pytest.mark.lab
@pytest.mark.evaluation
def test_no_rain_and_rain_everywhere(images):
    output, _, clean = images
    dry = derain.decoupled_evaluation(output, clean, clean)
    assert math.isnan(dry["E_R"]) and math.isnan(dry["E_W"]) and dry["E_B"] > 0
    wet = derain.decoupled_evaluation(output, 1 - clean.round(), clean.round())
    assert math.isnan(wet["E_B"]) and wet["E_W"] > 0


@pytest.mark.lab
@pytest.mark.evaluation
def test_the_tensors_given_stay_as_they_are(images):
    images = [2 * image - 0.5 for image in images]  # also outside [0, 1]
    before = [image.clone() for image in images]
    derain.decoupled_evaluation(*images)
    derain.psnr(*images[:2])
    assert all(torch.equal(a, b) for a, b in zip(images, before))


@pytest.mark.lab
@pytest.mark.evaluation
@pytest.mark.parametrize("wrong", range(3))
def test_wrong_shapes_are_refused(images, wrong):
    for cut in (lambda t: t[:1], lambda t: t[:, :1], lambda t: t[..., :1, :], lambda t: t[..., :1]):
        changed = [cut(image) if i == wrong else image for i, image in enumerate(images)]
        with pytest.raises(ValueError):
            derain.decoupled_evaluation(*changed)
        if wrong < 2:
            with pytest.raises(ValueError):
                derain.psnr(*changed[:2])


@pytest.mark.lab
@pytest.mark.evaluation
def test_psnr_closed_form_is_a_mean_over_images():
    clean = torch.zeros(2, 3, 12, 12)
    output = torch.stack([torch.full((3, 12, 12), 0.1), torch.full((3, 12, 12), 0.01)])
    assert derain.psnr(output, clean) == pytest.approx((20 + 40) / 2, abs=1e-3)


def loop_ssim(x, y):
    """SSIM of two (h, w) arrays by Wang et al. 2004, a window at a time, with weighted moments."""
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset ** 2) / (2 * 1.5 ** 2))
    weight /= weight.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top:top + 11, left:left + 11], y[top:top + 11, left:left + 11]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a = (weight * (a - mean_a) ** 2).sum()
            var_b = (weight * (b - mean_b) ** 2).sum()
            covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
            similar = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
            values.append(similar / ((mean_a ** 2 + mean_b ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    return np.mean(values)


@pytest.mark.evaluation
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_against_a_loop(noise, rng):
    clean = np.clip(rng.random((2, 3, 20, 23)) * 0.2 + np.linspace(0, 0.8, 23), 0, 1)
    output = np.clip(clean + noise * rng.normal(size=clean.shape), 0, 1)
    expected = []
    for i in range(2):
        expected += [loop_ssim(output[i, c], clean[i, c]) for c in range(3)]
    measured = derain.ssim(torch.from_numpy(output).float(), torch.from_numpy(clean).float())
    assert measured == pytest.approx(np.mean(expected), abs=1e-4)
    same = torch.from_numpy(clean).float()
    assert derain.ssim(same, same) == pytest.approx(1)
    output = torch.from_numpy(output).float()
    of_all = derain.decoupled_evaluation(output, same / 2, same)
    assert of_all["ssim"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert of_all["psnr"] == pytest.approx(derain.psnr(output, same), abs=1e-4)


@pytest.mark.evaluation
def test_ssim_refuses_what_it_cannot_measure():
    image = torch.rand(2, 3, 14, 17)
    pairs = ((image[..., :10, :],) * 2, (image[..., :10],) * 2, (image, image[:1]))
    for output, clean in pairs:
        with pytest.raises(ValueError):
            derain.ssim(output, clean)


def test_opening_against_a_loop(rng):
    image = torch.from_numpy(rng.random((1, 3, 9, 11), dtype=np.float32))

    def extreme(picture, choose):
        result = np.zeros_like(picture)
        for c, y, x in np.ndindex(*picture.shape):
            result[c, y, x] = choose(picture[c, max(0, y - 2):y + 3, max(0, x - 2):x + 3])
        return result

    expected = extreme(extreme(image[0].numpy(), np.min), np.max)
    opened = derain.opening(image)
    assert np.array_equal(opened[0].numpy(), expected)
    assert (opened <= image).all() and torch.equal(derain.opening(opened), opened)


@pytest.mark.parametrize("height, width", [(150, 131), (64, 65), (40, 200), (1, 1)])
@pytest.mark.parametrize("net", ["resnet", "unet"])
def test_tiles_equal_the_whole(net, height, width, rng):
    """These networks see less than 32 pixels around each, so tiling must not change anything."""
    network = derain.build_network(derain.NETWORKS[net], 1)
    image = torch.from_numpy(rng.random((3, height, width), dtype=np.float32))
    whole = derain.predict(network, image[None])[0]
    assert (derain.restore(network, image, tile=64) - whole).abs().max() < 1e-5
