"""Section 6: the content prior, against the published VQGAN; and are files of VQGANs inert?"""

import contextlib
import os
import sys
import types

import numpy as np
import pytest
import torch
from torch.autograd import grad
from torch.nn.functional import pad
from torch.testing import assert_close

import derain
from golden import DATA, agree, fill, ramp

graded = pytest.mark.quantization
SMALL = {
    "ch": 8,
    "ch_mult": (1, 1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
    "resolution": 32,
    "z_channels": 8,
    "n_embed": 32,
    "embed_dim": 4,
}


@pytest.fixture
def small() -> derain.VQGAN:
    return fill(derain.VQGAN(**SMALL))


@graded
def test_vqgan_agrees_with_the_published_one():
    golden = dict(np.load(DATA / "vqgan_small.npz"))
    vqgan = fill(derain.VQGAN(128, (1, 2), 1, (16,), 32, 32, 64, 16)).requires_grad_(False)
    shapes = [f"{name} {tuple(value.shape)}" for name, value in vqgan.state_dict().items()]
    assert sorted(shapes) == sorted(golden["state_dict"])
    latent = vqgan.encode(2 * ramp(2, 3, 32, 32) - 1)
    quantized, indices, loss = vqgan.quantize(latent)
    found = {"latent": latent, "quantized": quantized, "reconstruction": vqgan.decode(quantized)}
    for name, value in found.items():
        assert np.abs(value.numpy() - golden[name]).max() < 1e-4 * golden[name].std(), name
    assert np.array_equal(indices.flatten(), golden["indices"])
    assert loss.item() == pytest.approx(float(golden["codebook_loss"]), rel=1e-5)


@graded
def test_a_residual_block_by_hand():
    def swish(x):
        return x / (1 + torch.exp(-x))

    block = fill(derain.ResidualBlock(32, 64))
    x = torch.randn(2, 32, 5, 4, requires_grad=True)
    inner = block.conv1(swish(block.norm1(x)))
    expected = block.nin_shortcut(x) + block.conv2(swish(block.norm2(inner)))
    agree(block(x), expected, [x, *block.parameters()])


@graded
def test_attention_of_pixels_by_hand():
    layer = fill(derain.PixelAttention(32))
    x = torch.randn(2, 32, 2, 3, requires_grad=True)
    q, k, v = [part(layer.norm(x)).flatten(2) for part in (layer.q, layer.k, layer.v)]
    weights = (q.mT @ k / 32**0.5).softmax(2)  # (n, pixels that look, pixels that are seen)
    collected = (v @ weights.mT).view(x.shape)
    agree(layer(x), x + layer.proj_out(collected), [x, *layer.parameters()])


def test_structure_of_the_published_imagenet_configuration():
    """Attention at level 4 alone, latents 16 times smaller, a shortcut where widths change."""
    with torch.device("meta"):
        weights = derain.VQGAN().state_dict()
    for name, shape in {
        "quantize.embedding.weight": [1024, 256],
        "encoder.down.4.attn.1.q.weight": [512, 512, 1, 1],
        "decoder.up.4.attn.2.q.weight": [512, 512, 1, 1],
        "decoder.up.0.block.2.conv1.weight": [128, 128, 3, 3],
    }.items():
        assert list(weights[name].shape) == shape
    for absent in ("down.3.attn.", "down.4.downsample.", "up.0.upsample.", "up.0.block.3."):
        assert absent not in " ".join(weights)


def nearest(codes, latent):
    """Return the indices (n, h, w) of the nearest codes, by brute force."""
    differences = latent[:, None] - codes[None, :, :, None, None]
    return differences.square().sum(2).argmin(1)


@graded
def test_quantization_and_its_gradients():
    """The decoder's gradient goes straight through; each term of the loss moves one side."""
    codebook = derain.Codebook(20, 3)
    codes = torch.nn.init.normal_(codebook.embedding.weight)
    latent = torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized, indices, loss = codebook(latent)
    assert torch.equal(indices, nearest(codes, latent))
    chosen = codes[indices].permute(0, 3, 1, 2)
    assert_close(quantized, chosen)
    distance = (chosen - latent).square().mean()
    assert_close(loss, 1.25 * distance)

    both = latent, codes
    incoming = torch.randn(latent.shape)
    straight, none = grad(quantized, both, incoming, retain_graph=True, allow_unused=True)
    assert_close(straight, incoming)
    assert none is None or not none.any()
    moves_latents, moves_codes = grad(distance, both)
    assert_close(grad(loss, both), (moves_latents, 0.25 * moves_codes))


# ---- pre-training and fine-tuning ----------------------------------------------------------------

FACES = [torch.from_numpy(derain.draw_face(96, np.random.default_rng(i))) for i in range(4)]


class Watched(derain.VQGAN):
    """Keeps its codes and latents of each step.  At step 16, ten codes are put far away."""

    steps = []

    def encode(self, image):
        codes = self.quantize.embedding.weight.data
        if len(self.steps) == 16:
            codes[:10] = 100
        latent = super().encode(image)
        self.steps.append((codes.clone(), latent.detach()))
        return latent


def test_pretraining_starts_without_the_codebook_and_replaces_unused_codes():
    vqgan = derain.build_network(Watched, **SMALL)
    clean = 2 * torch.stack(FACES) - 1
    before = (vqgan(clean)[0] - clean).abs().mean()
    Watched.steps.clear()
    vqgan.quantize.embedding.weight.data[:] = torch.nan  # would spoil all that it is used for
    derain.pretrain(vqgan, FACES, 50)
    codes, latents = zip(*Watched.steps)
    for step in range(16):  # the first 30 %, and until the latent of the next step is there
        assert codes[step].isnan().all()
    vectors = latents[15].permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.cdist(codes[16][10:], vectors).amin(1).max() < 0.01
    assert (codes[40][:10] > 90).all()  # unused for 24 steps
    assert vqgan.quantize.embedding.weight.max() < 50
    assert (vqgan(clean)[0] - clean).abs().mean() < 0.7 * before


def test_fine_tuning_moves_the_encoder_alone():
    """Here with latents 16 times smaller, as in the published one: 40 pixels do not divide."""
    vqgan = fill(derain.VQGAN(**{**SMALL, "ch_mult": (1, 1, 1, 1, 1)}))
    network = derain.VQGANPrior(vqgan)
    derain.train(network, torch.rand(4, 3, 40, 40), lambda clean, rng: clean / 2, 3)
    moved = set()
    for name, value in vqgan.state_dict().items():
        if not torch.equal(value, network.vqgan.state_dict()[name]):
            moved.add(name.split(".")[0])
    assert moved == {"encoder", "quant_conv"}
    encoder = torch.nn.Sequential(vqgan.encoder, vqgan.quant_conv)
    assert_close(network.teacher.state_dict(), encoder.state_dict())
    assert network(torch.rand(1, 3, 1, 40)).shape == (1, 3, 1, 40)


def by_hand(vqgan, image):
    """Return the latent of images of 22 x 21 pixels, its nearest codes, and what they draw."""
    latent = vqgan.quant_conv(vqgan.encoder(pad(2 * image - 1, (0, 3, 0, 2), "reflect")))
    codes = vqgan.quantize.embedding.weight
    chosen = codes[nearest(codes, latent)].permute(0, 3, 1, 2)
    drawn = vqgan.decode(latent + (chosen - latent).detach())[..., :22, :21]
    return latent, chosen, (drawn + 1) / 2


@pytest.fixture
def prior(small):
    """A prior whose encoder has already moved; what it draws exceeds the range of an image."""
    small.decoder.conv_out.weight.data *= 9
    network = derain.VQGANPrior(small)
    network.vqgan.quant_conv.weight.data *= 1.5
    return network


@graded
def test_what_the_prior_shows_is_made_of_codes(prior):
    degraded = torch.rand(2, 3, 22, 21)
    _, _, drawn = by_hand(prior.vqgan, degraded)
    assert drawn.min() < 0 and drawn.max() > 1
    assert_close(prior(degraded), drawn, atol=1e-4, rtol=1e-4)


@graded
def test_the_loss_of_the_prior_and_its_gradient(small, prior):
    """L1, and the squared distance of latents from the codes of the unmoved encoder."""
    clean, degraded = torch.rand(2, 2, 3, 22, 21)
    _, target, _ = by_hand(small, clean)
    latent, _, drawn = by_hand(prior.vqgan, degraded)
    expected = (latent - target).square().mean() + (drawn - clean).abs().mean()
    loss = prior.loss(degraded, clean)
    assert_close(loss, expected)
    learning = [*prior.vqgan.encoder.parameters(), *prior.vqgan.quant_conv.parameters()]
    assert_close(grad(loss, learning), grad(expected, learning), atol=1e-5, rtol=1e-3)
