"""Section 3: does each network compute what its original computes, on images of any size?"""

import numpy as np
import pytest
import torch

import derain
from golden import DATA, fill, ramp

TINY = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 8, "mlp_ratio": 2}


@pytest.fixture
def tiny() -> derain.SwinIR:
    return fill(derain.SwinIR(**TINY))


@pytest.mark.attention
def test_swinir_agrees_with_the_published_one(tiny):
    golden = np.load(DATA / "swinir_tiny.npz")
    shapes = sorted(f"{k} {tuple(v.shape)}" for k, v in tiny.state_dict().items())
    assert shapes == sorted(golden["state_dict"])
    with torch.no_grad():
        output = tiny(ramp(2, 3, 20, 28)).numpy()
    assert np.abs(output - golden["output"]).max() < 1e-4 * golden["output"].std()


def test_swinir_loads_published_checkpoints_strictly(tiny):
    weights = dict(tiny.state_dict())
    weights["layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(64, 64)
    weights["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(64, 64, 64)
    derain.SwinIR(**TINY).load_state_dict(weights, strict=True)
    with pytest.raises(RuntimeError):
        derain.SwinIR(**TINY).load_state_dict({**weights, "layers.9.norm.weight": torch.zeros(24)})


def attention_by_hand(block, image, window, shift):
    """Each pixel attends to the pixels that no window edge separates from it."""
    n, h, w, dim = image.shape
    heads = block.attn.heads
    table = block.attn.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    qkv = block.attn.qkv(block.norm1(image))
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
                scores.append(query @ qkv[k, i, j, dim:2 * dim][part] + bias)
            value = torch.stack([qkv[k, i, j, 2 * dim:][part] for i, j in near])
            collected.append(torch.stack(scores).softmax(0) @ value)
        expected[k, y, x] += block.attn.proj(torch.cat(collected))
    return expected


@pytest.mark.attention
@pytest.mark.parametrize("shift", (0, 2), ids=("plain", "shifted"))
def test_a_swin_block_is_a_loop_over_pixels(shift):
    """Windows of 4 on an image of 8x12."""
    torch.manual_seed(0)
    block = derain.SwinBlock(6, 2, 4, shift, 12).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    image = torch.randn(2, 8, 12, 6, dtype=torch.float64)
    attended = attention_by_hand(block, image, 4, shift)
    hidden = torch.nn.functional.gelu(block.mlp["fc1"](block.norm2(attended)))
    torch.testing.assert_close(block(image), attended + block.mlp["fc2"](hidden))


@pytest.mark.attention
def test_attention_of_one_window_needs_nothing_else():
    """A mask of -100 leaves a pixel with itself: what comes out is the projected value."""
    torch.manual_seed(0)
    attention = derain.WindowAttention(6, 2, 2)
    windows = torch.randn(3, 4, 6)
    mask = (-100 * (1 - torch.eye(4)))[None]
    value = attention.qkv(windows)[..., 12:]
    torch.testing.assert_close(attention(windows, mask), attention.proj(value))


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
def test_shift_mask_separates_opposite_sides(monkeypatch):
    """Pixels of a rolled image may attend to one another if they were neighbours before rolling."""
    def windows_of_one(image, window):  # so that this test needs shift_mask only
        rows = image.split(window, 1)
        return torch.cat([torch.cat(row.split(window, 2)) for row in rows]).flatten(1, 2)

    monkeypatch.setattr(derain, "to_windows", windows_of_one)
    mask = derain.shift_mask(8, 12, 4)
    assert mask.shape == (6, 16, 16)
    place = torch.arange(8 * 12).view(1, 8, 12, 1)
    before = place.roll((-2, -2), (1, 2))[0, :, :, 0]
    for window in range(6):
        top, left = 4 * (window // 3), 4 * (window % 3)
        pixels = before[top:top + 4, left:left + 4].flatten()
        for a in range(16):
            near_y = (pixels // 12 - pixels[a] // 12).abs() < 4
            near_x = (pixels % 12 - pixels[a] % 12).abs() < 4
            assert torch.equal(mask[window, a] == 0, near_y & near_x)
            assert (mask[window, a][~(near_y & near_x)] <= -50).all()


@pytest.mark.attention
def test_a_swin_block_needs_nothing_else(monkeypatch):
    """On an image of one window, with attention that passes on what it gets."""
    monkeypatch.setattr(derain, "to_windows", lambda image, window: image.flatten(1, 2))
    monkeypatch.setattr(derain, "from_windows", lambda windows, window, shape: windows.view(shape))
    monkeypatch.setattr(derain, "shift_mask", lambda h, w, window: torch.zeros(1, 9, 9))
    block, image = derain.SwinBlock(6, 2, 3, 1, 12), torch.randn(2, 3, 3, 6)
    monkeypatch.setattr(block.attn, "forward", lambda windows, mask: windows)
    middle = image + block.norm1(image)
    hidden = torch.nn.functional.gelu(block.mlp["fc1"](block.norm2(middle)))
    torch.testing.assert_close(block(image), middle + block.mlp["fc2"](hidden))


@pytest.mark.parametrize("name", ("resnet", "unet", "swinir", "lines"))
def test_networks_take_images_of_any_size_and_keep_their_seed(name):
    network = derain.build_network(derain.NETWORKS[name], 3)
    for h, w in ((1, 1), (3, 50), (17, 8), (40, 40)):
        image = torch.rand(2, 3, h, w)
        assert network(image).shape == image.shape
    network(torch.rand(2, 3, 21, 13)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    before = torch.get_rng_state()
    weights = [next(derain.build_network(derain.NETWORKS[name], seed).parameters())
               for seed in (3, 4)]
    assert torch.equal(weights[0], next(network.parameters()))
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(before, torch.get_rng_state())  # no trace in the global random state


def test_openings_along_lines_remove_what_they_cross_and_never_draw():
    image = torch.full((1, 3, 32, 32), 0.2)
    image[..., 14:17, :] = 0.9  # a bright beam, three rows thick
    opened = derain.line_openings(image)[0]  # along lines: 0 is vertical, 6 horizontal
    assert torch.equal(opened[6], image[0]) and opened[0].max() == image.min()
    noise = torch.rand(2, 3, 20, 23)
    opened, network = derain.line_openings(noise), derain.build_network(derain.LineOpenings)
    for i in range(12):
        assert (opened[:, i] < noise).any()
        assert torch.equal(derain.line_openings(opened[:, i])[:, i], opened[:, i])  # idempotent
    lowest = opened.amin(1) - 1e-6
    assert (network(noise) <= noise + 1e-6).all() and (network(noise) >= lowest).all()
    network.score[2].bias.data[:] = torch.tensor([-99.0, 99.0])  # keep the image as it is
    torch.testing.assert_close(network(noise), noise)


@pytest.mark.training
def test_padding_reflects_at_the_right_and_the_bottom():
    image = torch.rand(2, 3, 6, 9)
    padded = derain.pad_to_multiple(image, 4)
    assert padded.shape == (2, 3, 8, 12) and torch.equal(padded[..., :6, :9], image)
    assert torch.equal(padded[..., 6, :9], image[..., 4, :])  # the edge itself is not repeated
    assert torch.equal(padded[..., :6, 11], image[..., 5])
    assert torch.equal(derain.pad_to_multiple(padded, 4), padded)
    tiny = derain.pad_to_multiple(image[..., :1, :2], 8)
    assert tiny.shape == (2, 3, 8, 8) and torch.equal(tiny[..., 7, 7], image[..., 0, 1])


def run_and_record(network, image):
    """The output, and what went into each layer and came out of it."""
    into, out = {}, {}

    def keep(layer, inputs, output):
        into[layer], out[layer] = inputs[0], output

    for layer in network.modules():
        layer.register_forward_hook(keep)
    return network(image), into, out


@pytest.mark.training
def test_unet_gets_its_details_back(monkeypatch):
    """What goes into each layer came out of the right ones; needs no pad_to_multiple."""
    monkeypatch.setattr(derain, "pad_to_multiple",
                        lambda images, _: torch.nn.functional.pad(images, (0, 3, 0, 1)))
    network = derain.UNet(channels=4)
    restored, into, out = run_and_record(network, torch.rand(2, 3, 7, 9))
    first, second = network.down
    for upper, lower in ((first, second), (second, network.bottom)):
        assert torch.equal(into[lower], torch.nn.functional.max_pool2d(out[upper], 2))
    assert torch.equal(into[network.grow[0]], out[network.bottom])
    for details, grow, level in zip((second, first), network.grow, network.up):
        left, right = into[level].chunk(2, 1)
        assert torch.equal(left, out[details]) and torch.equal(right, out[grow])
    assert torch.equal(restored, out[network.tail][..., :7, :9])


@pytest.mark.training
def test_resnet_adds_its_blocks():
    network = derain.ResNet(channels=4, blocks=2)
    restored, into, out = run_and_record(network, torch.rand(1, 3, 9, 9))
    first, second = network.body
    assert torch.equal(into[first], out[network.head])
    torch.testing.assert_close(into[second] - into[first], out[first], atol=1e-6, rtol=0)
    torch.testing.assert_close(into[network.tail] - into[second], out[second], atol=1e-6, rtol=0)
    assert torch.equal(restored, out[network.tail])


def test_fields_of_view():
    """A pixel depends on 21x21 pixels in the ResNet, as section 3 says."""
    image = torch.rand(1, 3, 41, 41, requires_grad=True)
    derain.build_network(derain.ResNet)(image)[0, :, 20, 20].sum().backward()
    y, x = torch.nonzero(image.grad.abs().sum((0, 1)), as_tuple=True)
    assert (y.min(), y.max(), x.min(), x.max()) == (10, 30, 10, 30)
