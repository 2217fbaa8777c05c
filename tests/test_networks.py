"""Sections 4 and 6: does each network compute what its original computes, on images of any size?"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import derain
from golden import DATA, agree_forward, check, fill, near, ramp, swinir_names

graded = pytest.mark.graded
TINY = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 8, "mlp_ratio": 2}


def test_swinir_agrees_with_the_published_one():
    golden = np.load(DATA / "swinir_tiny.npz")
    network = derain.SwinIR(**TINY)
    names = swinir_names(network)
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in names.items()]
    assert sorted(shapes) == sorted(golden["state_dict"])
    assert len(names) == len(network.state_dict())  # nothing else is stored
    with torch.no_grad():
        output = fill(network, names)(ramp(2, 3, 20, 28))
    near("SwinIR", output, golden["output"], 1e-4 * golden["output"].std())


def padded_by_hand(images, multiple):
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    mode = "reflect" if below < height and right < width else "edge"
    # By their numbers, so that gradients pass.
    rows = np.pad(np.arange(height), (0, below), mode)
    columns = np.pad(np.arange(width), (0, right), mode)
    return images[:, :, rows][..., columns]


def windows_by_hand(image, window):
    squares = image.unfold(1, window, window).unfold(2, window, window)
    pixels = squares.flatten(4).mT  # (n, h / window, w / window, window * window, c)
    return pixels.flatten(0, 2)


def image_by_hand(windows, window, shape):
    """Where each number goes is found by cutting an image of numbers."""
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    order = windows_by_hand(places, window).flatten().argsort()
    return windows.flatten()[order].view(shape)


def mask_by_hand(h, w, window):
    """What was rolled comes in from the opposite edge: the first rows and columns."""
    shift = window // 2
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(1, h, w, 2)
    came_in = (places < shift).roll((-shift, -shift), (1, 2))
    came_in = windows_by_hand(came_in, window)
    return torch.where((came_in[:, :, None] == came_in[:, None]).all(-1), 0, -100)


def attend(attention, pixels, places, mask=0):
    """Return what attention makes of n pixels (n, c) at places (n, 2)."""
    side = round(len(attention.position_bias) ** 0.5)
    offsets = places[:, None] - places + side // 2
    bias = attention.position_bias[offsets @ torch.tensor([side, 1])].permute(2, 0, 1)
    qkv = attention.qkv(pixels).view(len(pixels), 3, attention.heads, -1)
    query, key, value = qkv.unbind(1)
    scores = torch.einsum("ihd,jhd->hij", query, key) / query.shape[-1] ** 0.5
    weights = (scores + bias + mask).softmax(-1)
    return attention.project(torch.einsum("hij,jhd->ihd", weights, value).flatten(1))


def attention_by_hand(self, windows, mask):
    side = torch.arange(int(windows.shape[1] ** 0.5))
    places = torch.cartesian_prod(side, side)
    masks = [0] if mask is None else mask
    found = []
    for i, pixels in enumerate(windows):
        found.append(attend(self, pixels, places, masks[i % len(masks)]))
    return torch.stack(found)


BY_HAND = {
    "pad_to_multiple": padded_by_hand,
    "to_windows": windows_by_hand,
    "from_windows": image_by_hand,
    "shift_mask": mask_by_hand,
    "WindowAttention.forward": attention_by_hand,
}


@graded("to_windows", 1)
def test_windows_are_cut():
    image = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    check(derain.to_windows, image, 4, expected=windows_by_hand(image, 4))


@graded("from_windows", 1)
def test_windows_are_put_back():
    windows = torch.arange(12 * 16 * 3).view(12, 16, 3)
    shape = torch.Size((2, 8, 12, 3))
    check(derain.from_windows, windows, 4, shape, expected=image_by_hand(windows, 4, shape))


@graded("shift_mask", 2)
@pytest.mark.parametrize("h, w, window", [(8, 12, 4), (8, 4, 4), (10, 15, 5)])
def test_opposite_sides_are_masked(h, w, window):
    check(derain.shift_mask, h, w, window, expected=mask_by_hand(h, w, window))


@graded("WindowAttention.forward", 3)
@pytest.mark.parametrize("masked", [False, True])
def test_each_pixel_attends_to_its_window(masked):
    """3 windows of 4 pixels in each of 2 images, with 2 heads of 3 channels."""
    attention = fill(derain.WindowAttention(6, 2, 2))
    windows = (10 * ramp(6, 4, 6)).requires_grad_()
    mask = torch.randn(3, 4, 4) if masked else None
    agree_forward(attention, attention_by_hand(attention, windows, mask), windows, mask)


@graded("SwinBlock.forward", 3)
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_are_shifted_and_nothing_else(shift):
    """Of 4 x 4 pixels; their edges stand at shift, shift + 4, shift + 8, ..."""
    block = fill(derain.SwinBlock(6, 3, 4, shift, 12))
    block(ramp(1, 12, 8, 6))  # nothing of it may be left
    image = (10 * ramp(2, 8, 12, 6).square()).requires_grad_()
    places = torch.cartesian_prod(torch.arange(8), torch.arange(12))
    regions = (places - shift) // 4
    pixels = image.flatten(1, 2)
    attended = pixels.clone()
    for region in regions.unique(dim=0):
        inside = (regions == region).all(1)
        for k in range(2):
            near_by = block.norm(pixels[k, inside])
            attended[k, inside] += attend(block.attention, near_by, places[inside])
    norm, widen, _, narrow = block.perceptron
    expected = attended + narrow(F.gelu(widen(norm(attended))))
    agree_forward(block, expected.view(image.shape), image)


@graded("pad_to_multiple", 1)
@pytest.mark.parametrize("multiple", [4, 5, 16])
def test_padding_reflects_or_else_repeats_the_edge(multiple):
    """2 rows cannot be reflected to 4 or 5; such an image is repeated on both sides."""
    for height in (1, 2, 3, 6, 9, 12, 20):
        for width in (2, 5, 8, 16, 17):
            image = ramp(2, 3, height, width)
            expected = padded_by_hand(image, multiple)
            check(derain.pad_to_multiple, image, multiple, expected=expected)


@graded("ResNet.forward", 2)
def test_resnet_by_hand():
    """From its parameters, which come in the order of their use."""
    network = fill(derain.ResNet(channels=4, blocks=2))
    image = ramp(2, 3, 9, 7).requires_grad_()
    parameters = iter(network.parameters())

    def conv(x):
        return F.conv2d(x, next(parameters), next(parameters), padding=1)

    features = conv(image)
    for _ in range(2):
        features = features + conv(conv(features).relu())
    agree_forward(network, image + conv(features), image)


@graded("UNet.forward", 3)
@pytest.mark.parametrize("height, width", [(7, 9), (10, 5), (8, 12)])
def test_unet_by_hand(height, width):
    network = fill(derain.UNet(channels=4))
    image = ramp(2, 3, height, width).requires_grad_()
    parameters = iter(network.parameters())

    def two(x):
        x = F.conv2d(x, next(parameters), next(parameters), padding=1).relu()
        return F.conv2d(x, next(parameters), next(parameters), padding=1).relu()

    def enlarge(x):
        return F.conv_transpose2d(x, next(parameters), next(parameters), stride=2)

    fine = two(padded_by_hand(image, 4))
    middle = two(F.max_pool2d(fine, 2))
    coarse = two(F.max_pool2d(middle, 2))
    middle = two(torch.cat([middle, enlarge(coarse)], 1))
    fine = two(torch.cat([fine, enlarge(middle)], 1))
    change = F.conv2d(fine, next(parameters), next(parameters))[..., :height, :width]
    agree_forward(network, image + change, image)


@pytest.mark.parametrize("name", ["resnet", "unet", "swinir"])
def test_networks_take_images_of_any_size_and_keep_their_seed(name):
    network, same, other = (derain.build_network(derain.NETWORKS[name], s) for s in (3, 3, 4))
    image = ramp(1, 3, 21, 13)
    assert torch.equal(network(image), same(image))
    assert not torch.equal(network(image), other(image))

    for weight in [*network.parameters()][-2:]:  # of the last layer
        torch.nn.init.zeros_(weight)
    for h, w in ((1, 1), (3, 50), (17, 8), (40, 40)):
        image = ramp(2, 3, h, w)
        near(name, network(image), image)  # all that is left is the skip
