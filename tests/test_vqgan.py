"""Section 7: the content prior, against the published VQGAN and by hand."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import derain
from golden import DATA, agree, agree_forward, apply, fill, near, ramp

graded = pytest.mark.graded
SMALL = dict(
    ch=8,
    ch_mult=(1, 1, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=32,
    z_channels=8,
    n_embed=32,
    embed_dim=4,
)


@pytest.fixture
def small() -> derain.VQGAN:
    return fill(derain.VQGAN(**SMALL))


def test_vqgan_agrees_with_the_published_one():
    golden = dict(np.load(DATA / "vqgan_small.npz"))
    vqgan = fill(derain.VQGAN(128, (1, 2), 1, (16,), 32, 32, 64, 16)).requires_grad_(False)
    shapes = [f"{name} {tuple(value.shape)}" for name, value in vqgan.state_dict().items()]
    assert sorted(shapes) == sorted(golden["state_dict"])
    latent = vqgan.encode(2 * ramp(2, 3, 32, 32) - 1)
    quantized, indices, loss = vqgan.quantize(latent)
    found = {"latent": latent, "quantized": quantized, "reconstruction": vqgan.decode(quantized)}
    for name, value in found.items():
        near(name, value, golden[name], 1e-4 * golden[name].std())
    near("indices", indices.flatten(), golden["indices"])
    near("loss", loss, golden["codebook_loss"])


def residual_by_hand(self, x):
    def swish(x):
        return x / (1 + torch.exp(-x))

    inner = self.conv1(swish(self.norm1(x)))
    return self.nin_shortcut(x) + self.conv2(swish(self.norm2(inner)))


def pixels_by_hand(self, x):
    query, key, value = [part(self.norm(x)).flatten(2) for part in (self.q, self.k, self.v)]
    weights = (query.mT @ key / x.shape[1] ** 0.5).softmax(2)  # (n, that look, that are seen)
    return x + self.proj_out((value @ weights.mT).view(x.shape))


def codes_by_hand(self, latent):
    codes = self.embedding.weight
    differences = latent[:, None] - codes[None, :, :, None, None]
    indices = differences.square().sum(2).argmin(1)
    chosen = codes[indices].permute(0, 3, 1, 2)
    loss = (latent - chosen.detach()).square().mean()
    loss = loss + 0.25 * (latent.detach() - chosen).square().mean()
    return latent + (chosen - latent).detach(), indices, loss


def draw_by_hand(self, latent, shape):
    drawn = self.vqgan.decode(codes_by_hand(self.vqgan.quantize, latent)[0])
    return ((drawn + 1) / 2)[..., : shape[2], : shape[3]]


BY_HAND = {
    "ResidualBlock.forward": residual_by_hand,
    "PixelAttention.forward": pixels_by_hand,
    "Codebook.forward": codes_by_hand,
    "VQGANPrior.draw": draw_by_hand,
}


@graded("ResidualBlock.forward", 1)
def test_two_convolutions_and_a_shortcut():
    block = fill(derain.ResidualBlock(32, 64))
    x = torch.randn(2, 32, 5, 4, requires_grad=True)
    agree_forward(block, residual_by_hand(block, x), x)


@graded("PixelAttention.forward", 2)
def test_each_pixel_attends_to_all():
    layer = fill(derain.PixelAttention(32))
    x = torch.randn(2, 32, 2, 3, requires_grad=True)
    agree_forward(layer, pixels_by_hand(layer, x), x)


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


@graded("Codebook.forward", 3)
def test_the_nearest_codes_and_their_gradients():
    """The decoder's gradient goes straight through; each term of the loss moves one side."""
    codebook = derain.Codebook(20, 3)
    codes = torch.nn.init.normal_(codebook.embedding.weight)
    latent = torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized, indices, loss = apply(codebook, latent)
    expected, nearest, expected_loss = codes_by_hand(codebook, latent)
    inputs = {"the latent": latent, "the codes": codes}
    near("Codebook.forward: the indices", indices, nearest)
    agree("Codebook.forward: the quantized latent", quantized, expected, inputs)
    agree("Codebook.forward: the loss", loss, expected_loss, inputs)


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
    patches = torch.rand(4, 3, 40, 40)
    derain.train(network, patches, lambda clean, rng: clean / 2, 3, loss=network.loss)
    moved = set()
    for name, value in vqgan.state_dict().items():
        if not torch.equal(value, network.vqgan.state_dict()[name]):
            moved.add(name.split(".")[0])
    assert moved == {"encoder", "quant_conv"}
    assert_close(network.teacher[0].state_dict(), vqgan.encoder.state_dict())
    assert network(torch.rand(1, 3, 1, 40)).shape == (1, 3, 1, 40)


@pytest.fixture
def prior(small):
    """A prior whose encoder has already moved; what it draws exceeds the range of an image."""
    small.decoder.conv_out.weight.data *= 9
    network = derain.VQGANPrior(small)
    network.vqgan.quant_conv.weight.data *= 1.5
    return network


@graded("VQGANPrior.draw", 2)
def test_what_the_prior_shows_is_made_of_codes(prior):
    shape = (2, 3, 22, 21)
    latent = prior.vqgan.encode(prior.prepare(torch.rand(shape))).detach().requires_grad_()
    expected = draw_by_hand(prior, latent, shape)
    assert expected.min() < 0 and expected.max() > 1
    agree("VQGANPrior.draw", prior.draw(latent, shape), expected, {"the latent": latent})


@graded("VQGANPrior.loss", 2)
def test_the_loss_of_the_prior_and_its_gradient(prior):
    """L1, and the squared distance of latents from the codes of the unmoved encoder."""
    clean, degraded = torch.rand(2, 2, 3, 22, 21)
    teacher = prior.teacher(prior.prepare(clean))
    target = codes_by_hand(prior.vqgan.quantize, teacher)[0].detach()
    latent = prior.vqgan.encode(prior.prepare(degraded))
    drawn = draw_by_hand(prior, latent, clean.shape)
    expected = (latent - target).square().mean() + (drawn - clean).abs().mean()
    loss = apply(prior.loss, degraded, clean)
    learning = {name: p for name, p in prior.named_parameters() if p.requires_grad}
    agree("VQGANPrior.loss", loss, expected, learning)
