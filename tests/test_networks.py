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


def test_swinir_agrees_with_the_published_one(tiny):
    golden = np.load(DATA / "swinir_tiny.npz")
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in tiny.state_dict().items()) == sorted(golden["state_dict"])
    with torch.no_grad():
        output = tiny(ramp(2, 3, 20, 28)).numpy()
    assert np.abs(output - golden["output"]).max() < 1e-4 * golden["output"].std()


def test_swinir_loads_published_checkpoints_strictly(tiny):
    weights = dict(tiny.state_dict())
    weights["layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(64, 64)
    weights["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(64, 64, 64)
    derain.SwinIR(**TINY).load_state_dict(weights, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected"):
        derain.SwinIR(**TINY).load_state_dict({**weights, "layers.9.norm.weight": torch.zeros(24)})


@pytest.mark.parametrize("shift", (0, 2), ids=("plain", "shifted"))
def test_window_attention_is_that_of_a_loop_over_pixels(shift):
    """Window 4 on an image of 8x12; each pixel attends to the pixels that no window edge separates from it."""
    window, heads, dim, h, w = 4, 2, 6, 8, 12
    torch.manual_seed(0)
    block = derain.SwinBlock(dim, heads, window, shift, 12).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.nn.init.zeros_(block.mlp["fc2"].weight)  # leaves attention alone
    torch.nn.init.zeros_(block.mlp["fc2"].bias)
    image = torch.randn(2, h, w, dim, dtype=torch.float64)
    expected = image.clone()
    table = block.attn.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    qkv = block.attn.qkv(block.norm1(image))
    for n in range(2):
        for y in range(h):
            for x in range(w):
                # Window edges stand at shift, shift + window, shift + 2 window, ...
                near = [(i, j) for i in range(h) for j in range(w)
                        if (i - shift) // window == (y - shift) // window
                        and (j - shift) // window == (x - shift) // window]
                collected = []
                for head in range(heads):
                    part = slice(head * dim // heads, (head + 1) * dim // heads)
                    query = qkv[n, y, x, :dim][part]
                    match = torch.stack([query @ qkv[n, i, j, dim:2 * dim][part] * (dim / heads) ** -0.5
                                         + table[y - i + window - 1, x - j + window - 1, head]
                                         for i, j in near])
                    value = torch.stack([qkv[n, i, j, 2 * dim:][part] for i, j in near])
                    collected.append(match.softmax(0) @ value)
                expected[n, y, x] += block.attn.proj(torch.cat(collected))
    torch.testing.assert_close(block(image), expected)


def test_windows_are_cut_and_put_back():
    image = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    windows = derain.to_windows(image, 4)
    assert windows.shape == (12, 16, 3)
    assert torch.equal(windows[1].view(4, 4, 3), image[0, :4, 4:8])  # the second from the left, top row
    assert torch.equal(derain.from_windows(windows, 4, image.shape), image)


@pytest.mark.parametrize("name", derain.NETWORKS)
def test_networks_take_images_of_any_size(name):
    network = derain.build_network(name)
    for h, w in ((1, 1), (3, 50), (17, 8), (40, 40)):
        image = torch.rand(2, 3, h, w)
        assert network(image).shape == image.shape
    network(torch.rand(2, 3, 21, 13)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ("resnet", "unet", "swinir"))
def test_padding_does_not_move_the_image(name):
    """A network that sees little of the padding gives the same in the far corner of a padded image."""
    network = derain.build_network(name)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        whole, cut = network(image), network(image[..., :61, :59])
    torch.testing.assert_close(cut[..., :24, :24], whole[..., :24, :24], atol=1e-5, rtol=0)
    assert not torch.allclose(cut, whole[..., :61, :59], atol=1e-4)  # or the test would see nothing


def test_docstrings_state_the_size():
    for network in (derain.ResNet, derain.UNet, derain.SwinIR):
        assert f"{sum(p.numel() for p in network().parameters()):,} parameters" in " ".join(network.__doc__.split())
    capacity = derain.CLAIMS["capacity"].panels
    for label, runs in capacity.items():
        size = sum(p.numel() for p in derain.ResNet(**dict(runs[0].arguments)).parameters())
        assert label == f"{size:,} parameters"


def test_unet_gets_its_details_back():
    """What is lost in the halving must reach the output around it: silence the bottom, and edges remain sharp."""
    network = derain.build_network("unet")
    for parameter in network.bottom.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(image)[0, :, 7, 7].sum().backward()
    reached = image.grad[0].abs().sum(0) > 0
    assert reached[7, 7] and reached[6, 8]


def test_resnet_with_a_skip_draws_a_correction():
    network = derain.build_network("resnet", skip=True)
    torch.nn.init.zeros_(network.tail.weight)
    torch.nn.init.zeros_(network.tail.bias)
    image = torch.rand(1, 3, 9, 9)
    assert torch.equal(network(image), image)
