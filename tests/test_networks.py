"""Section 3: does each network compute what its original computes, on images of any size?"""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, conv_transpose2d, gelu, max_pool2d, pad

import derain
from golden import DATA, agree, fill, ramp, swinir_names

TINY = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 8, "mlp_ratio": 2}


@pytest.mark.attention
def test_swinir_agrees_with_the_published_one():
    golden = np.load(DATA / "swinir_tiny.npz")
    network = derain.SwinIR(**TINY)
    names = swinir_names(network)
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in names.items()]
    assert sorted(shapes) == sorted(golden["state_dict"])
    assert len(names) == len(network.state_dict())  # nothing else is stored
    with torch.no_grad():
        output = fill(network, names)(ramp(2, 3, 20, 28)).numpy()
    assert np.abs(output - golden["output"]).max() < 1e-4 * golden["output"].std()


def attention_by_hand(block, image, window, shift):
    """Each pixel attends to the pixels that no window edge separates from it."""
    n, h, w, dim = image.shape
    attention = block.attention
    heads = attention.heads
    table = attention.position_bias.view(2 * window - 1, 2 * window - 1, heads)
    qkv = attention.qkv(block.norm(image))
    expected = image.clone()
    for k, y, x in np.ndindex(n, h, w):
        near = []
        for i, j in np.ndindex(h, w):
            # Window edges stand at shift, shift + window, shift + 2 window, ...
            same_row = (i - shift) // window == (y - shift) // window
            if same_row and (j - shift) // window == (x - shift) // window:
                near.append((i, j))
        collected = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            query = qkv[k, y, x, :dim][part] * (dim / heads) ** -0.5
            scores = []
            for i, j in near:
                bias = table[y - i + window - 1, x - j + window - 1, head]
                scores.append(query @ qkv[k, i, j, dim : 2 * dim][part] + bias)
            value = torch.stack([qkv[k, i, j, 2 * dim :][part] for i, j in near])
            collected.append(torch.stack(scores).softmax(0) @ value)
        expected[k, y, x] += attention.project(torch.cat(collected))
    return expected


@pytest.mark.attention
@pytest.mark.parametrize("shift", (0, 2), ids=("plain", "shifted"))
def test_a_swin_block_is_a_loop_over_pixels(shift):
    """Windows of 4 on two images of 8x12."""
    block = fill(derain.SwinBlock(6, 3, 4, shift, 12))
    image = 10 * ramp(2, 8, 12, 6).square().requires_grad_()
    attended = attention_by_hand(block, image, 4, shift)
    norm, widen, _, narrow = block.perceptron
    expected = attended + narrow(gelu(widen(norm(attended))))
    agree(block(image), expected, [image, *block.parameters()])


@pytest.mark.attention
def test_attention_of_one_window_needs_nothing_else():
    """A mask of -100 leaves a pixel with itself: what comes out is the projected value."""
    attention = fill(derain.WindowAttention(6, 2, 2))
    windows = ramp(3, 4, 6)
    mask = -100 * (1 - torch.eye(4))[None]
    value = attention.qkv(windows)[..., 12:]
    torch.testing.assert_close(attention(windows, mask), attention.project(value))


@pytest.mark.attention
def test_windows_are_cut():
    image = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    windows = derain.to_windows(image, 4)
    assert windows.shape == (12, 16, 3)
    assert torch.equal(windows[1].view(4, 4, 3), image[0, :4, 4:8])  # second from the left, top row


@pytest.mark.attention
def test_windows_are_put_back():
    windows = torch.arange(12 * 16 * 3).view(12, 16, 3)
    image = derain.from_windows(windows, 4, torch.Size((2, 8, 12, 3)))
    assert torch.equal(image[0, :4, 4:8], windows[1].view(4, 4, 3))
    assert torch.equal(image[1, 4:, 8:], windows[11].view(4, 4, 3))


@pytest.mark.attention
def test_shift_mask_separates_opposite_sides():
    """Pixels of a rolled image may attend to one another if they were neighbours before rolling."""
    mask = derain.shift_mask(8, 12, 4)
    assert mask.shape == (6, 16, 16)
    before = torch.arange(8 * 12).view(8, 12).roll((-2, -2), (0, 1))
    for window in range(6):
        top = 4 * (window // 3)
        left = 4 * (window % 3)
        pixels = before[top : top + 4, left : left + 4].flatten()
        for a in range(16):
            near_y = (pixels // 12 - pixels[a] // 12).abs() < 4
            near_x = (pixels % 12 - pixels[a] % 12).abs() < 4
            assert torch.equal(mask[window, a] == 0, near_y & near_x)
            assert (mask[window, a][~(near_y & near_x)] == -100).all()


@pytest.mark.training
@pytest.mark.parametrize("height, width", [(6, 9), (9, 6), (3, 10), (2, 9), (9, 2), (1, 1)])
def test_padding_reflects_or_else_repeats_the_edge(height, width):
    """2 rows cannot be reflected to 5, nor can 1; such an image is repeated on both sides."""
    image = ramp(2, 5, height, width)
    sides = ((0, 0), (0, 0), (0, -height % 5), (0, -width % 5))
    expected = np.pad(image, sides, "reflect" if min(height, width) > 2 else "edge")
    assert np.array_equal(derain.pad_to_multiple(image, 5), expected)


@pytest.mark.training
def test_resnet_by_hand():
    """From its parameters, which come in the order of their use."""
    network = fill(derain.ResNet(channels=4, blocks=2))
    image = ramp(2, 3, 9, 7).requires_grad_()
    parameters = iter(network.parameters())

    def conv(x):
        return conv2d(x, next(parameters), next(parameters), padding=1)

    features = conv(image)
    for _ in range(2):
        features = features + conv(conv(features).relu())
    expected = image + conv(features)
    agree(network(image), expected, [image, *network.parameters()])


@pytest.mark.training
@pytest.mark.parametrize("height, width", [(7, 9), (10, 5), (8, 12)])
def test_unet_by_hand(height, width):
    network = fill(derain.UNet(channels=4))
    image = ramp(2, 3, height, width).requires_grad_()
    parameters = iter(network.parameters())

    def two(x):
        x = conv2d(x, next(parameters), next(parameters), padding=1).relu()
        return conv2d(x, next(parameters), next(parameters), padding=1).relu()

    def enlarge(x):
        return conv_transpose2d(x, next(parameters), next(parameters), stride=2)

    fine = two(pad(image, (0, -width % 4, 0, -height % 4), "reflect"))
    middle = two(max_pool2d(fine, 2))
    coarse = two(max_pool2d(middle, 2))
    middle = two(torch.cat([middle, enlarge(coarse)], 1))
    fine = two(torch.cat([fine, enlarge(middle)], 1))
    change = conv2d(fine, next(parameters), next(parameters))[..., :height, :width]
    agree(network(image), image + change, [image, *network.parameters()])


@pytest.mark.parametrize("name", ("resnet", "unet", "swinir"))
def test_networks_take_images_of_any_size_and_keep_their_seed(name):
    before = torch.get_rng_state()
    network, same, other = (derain.build_network(derain.NETWORKS[name], s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())  # no trace in the global random state
    image = ramp(1, 3, 21, 13)
    assert torch.equal(network(image), same(image))
    assert not torch.equal(network(image), other(image))
    network(image).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())

    *_, weight, bias = network.parameters()  # of the last layer
    torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(bias)
    for h, w in ((1, 1), (3, 50), (17, 8), (40, 40)):
        image = ramp(2, 3, h, w)
        torch.testing.assert_close(network(image), image)  # all that is left is the skip
