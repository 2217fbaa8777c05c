"""Section 4: does the VQGAN compute what the published one computes, and are its files inert?"""

import argparse
import collections
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

import derain
from golden import DATA, fill, ramp

TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,),
        "resolution": 32, "z_channels": 32, "n_embed": 64, "embed_dim": 16}


@pytest.fixture(scope="module")
def tiny() -> derain.VQGAN:
    return fill(derain.VQGAN(**TINY))


@pytest.mark.quantization
def test_vqgan_agrees_with_the_published_one(tiny):
    golden = np.load(DATA / "vqgan_tiny.npz")
    shapes = sorted(f"{k} {tuple(v.shape)}" for k, v in tiny.state_dict().items())
    assert shapes == sorted(golden["state_dict"])
    with torch.no_grad():
        latent = tiny.encode(2 * ramp(2, 3, 32, 32) - 1)
        quantized, indices, loss = tiny.quantize(latent)
        found = {"latent": latent, "quantized": quantized, "reconstruction": tiny.decode(quantized)}
    for name, value in found.items():
        assert np.abs(value.numpy() - golden[name]).max() < 1e-4 * golden[name].std(), name
    assert np.array_equal(indices.flatten(), golden["indices"])
    assert loss.item() == pytest.approx(float(golden["codebook_loss"]), rel=1e-5)


@pytest.mark.quantization
def test_a_residual_block_by_hand():
    for inputs, outputs in ((32, 32), (32, 64)):
        block, x = fill(derain.ResidualBlock(inputs, outputs)), torch.randn(2, inputs, 5, 4)
        inner = block.norm1(x) / (1 + torch.exp(-block.norm1(x)))
        inner = block.norm2(block.conv1(inner))
        expected = block.nin_shortcut(x) + block.conv2(inner * torch.sigmoid(inner))
        torch.testing.assert_close(block(x), expected)


@pytest.mark.quantization
def test_attention_of_pixels_is_that_of_a_loop():
    layer, x = fill(derain.PixelAttention(32)).requires_grad_(False), torch.randn(2, 32, 2, 3)
    y, found = layer.norm(x), layer(x)
    q, k, v = (part(y).flatten(2) for part in (layer.q, layer.k, layer.v))
    for n in range(2):
        collected = torch.zeros(32, 6)
        for i in range(6):
            scores = torch.stack([q[n, :, i] @ k[n, :, j] / 32 ** 0.5 for j in range(6)])
            weights = scores.exp() / scores.exp().sum()
            for j in range(6):
                collected[:, i] += weights[j] * v[n, :, j]
        expected = x[n] + layer.proj_out(collected.view(1, 32, 2, 3))[0]
        torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=1e-4)


def test_structure_of_the_published_imagenet_configuration():
    """Attention at level 4 alone, latents 16 times smaller, a shortcut where widths change."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in derain.VQGAN().state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (1024, 256)
    assert shapes["encoder.down.4.attn.1.q.weight"] == (512, 512, 1, 1)
    assert "encoder.down.3.attn.0.q.weight" not in shapes
    assert shapes["decoder.up.4.attn.2.q.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3)
    assert shapes["decoder.conv_out.weight"] == (3, 128, 3, 3)
    assert "encoder.down.4.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert "decoder.up.0.block.2.conv1.weight" in shapes
    assert "decoder.up.0.block.3.conv1.weight" not in shapes


def test_images_of_another_size_and_groups(tiny):
    image = torch.rand(1, 3, 48, 20)
    with torch.no_grad():
        assert tiny.encode(image).shape == (1, 16, 24, 10) and tiny(image)[0].shape == image.shape
    groups = {m.num_groups for m in derain.VQGAN(**derain.PRIOR).modules()
              if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {derain.PRIOR["groups"]}


def codebook_and_latent():
    torch.manual_seed(0)
    codebook = derain.Codebook(20, 3)
    torch.nn.init.normal_(codebook.embedding.weight)
    return codebook, torch.randn(2, 3, 4, 5, requires_grad=True)


@pytest.mark.quantization
def test_quantization_is_the_nearest_neighbour():
    codebook, latent = codebook_and_latent()
    quantized, indices, loss = codebook(latent)
    codes = codebook.embedding.weight
    for n, y, x in np.ndindex(2, 4, 5):
        distances = torch.stack([(latent[n, :, y, x] - code).norm() for code in codes])
        assert indices[n, y, x] == int(distances.argmin())
        torch.testing.assert_close(quantized[n, :, y, x], codes[indices[n, y, x]])
    distance = (quantized - latent).square().mean()
    assert loss.item() == pytest.approx(1.25 * distance.item(), rel=1e-4)


@pytest.mark.quantization
def test_gradients_of_quantization():
    """The decoder's gradient goes straight through; each term of the loss moves one side."""
    codebook, latent = codebook_and_latent()
    quantized, indices, loss = codebook(latent)
    incoming = torch.randn(quantized.shape)
    quantized.backward(incoming, retain_graph=True)
    torch.testing.assert_close(latent.grad, incoming)
    moved = codebook.embedding.weight.grad
    assert moved is None or not moved.any()
    latent.grad = codebook.embedding.weight.grad = None
    loss.backward()
    difference = (quantized - latent).detach()
    torch.testing.assert_close(latent.grad, -2 * difference / difference.numel())
    vectors = difference.permute(0, 2, 3, 1).reshape(-1, 3)
    pulled = torch.zeros(20, 3).index_add(0, indices.flatten(), vectors)
    expected = 0.25 * 2 * pulled / difference.numel()
    torch.testing.assert_close(codebook.embedding.weight.grad, expected)


@pytest.fixture
def foreign():
    """Classes of a package that was installed where a checkpoint was written, and is not here."""
    module = types.ModuleType("lightning_of_old")
    place = {"__module__": "lightning_of_old"}
    module.ModelCheckpoint = type("ModelCheckpoint", (), dict(place))
    methods = {"__init__": lambda self, *_: None,
               "__reduce__": lambda self: (type(self), (1, 2), {"a": [3]})}
    module.Config = type("Config", (), {**place, **methods})
    module.AttributeDict = type("AttributeDict", (dict,), dict(place))
    module.ListConfig = type("ListConfig", (list,), dict(place))
    sys.modules["lightning_of_old"] = module
    yield module
    sys.modules.pop("lightning_of_old", None)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_checkpoint_in_the_published_layout_loads(tiny, foreign, tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    state = {**tiny.state_dict(), "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4, 3),
             "loss.discriminator.main.0.weight": torch.zeros(4, 3)}
    content = {"epoch": 7, "callbacks": {foreign.ModelCheckpoint: {"best": torch.ones(())}},
               "other": [foreign.ModelCheckpoint(), foreign.Config(), foreign.ListConfig([1, 2])],
               "hparams": foreign.AttributeDict(lr=1), "numbers": [np.ones(3), np.float64(3)],
               "counts": collections.defaultdict(list, {"a": [1]}), "names": {"a", "b"},
               "hyper_parameters": argparse.Namespace(lr=1), "path": pathlib.PosixPath("a"),
               "optimizer_states": [{"lr": 1e-4}], "state_dict": state}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    sys.modules.pop("lightning_of_old")
    loaded = derain.load_vqgan(tmp_path / "a.ckpt")
    assert loaded.state_dict().keys() == tiny.state_dict().keys()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(image)[0], tiny(image)[0])  # so attention stands where it stood


class Malicious:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize("function", (os.mkdir, eval, np.load, exec), ids=lambda f: f.__name__)
def test_a_malicious_checkpoint_runs_nothing(tiny, tmp_path, function, zipped):
    target = tmp_path / "made"
    argument = str(target)
    if function in (eval, exec):
        argument = f"__import__('os').mkdir({str(target)!r})"
    content = {"callbacks": Malicious(function, argument), "state_dict": tiny.state_dict()}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert derain.load_vqgan(tmp_path / "a.ckpt").state_dict().keys() == tiny.state_dict().keys()
    assert not target.exists()


def test_a_torchscript_program_is_not_loaded(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.ckpt"))
    with pytest.raises(derain.BadInput):
        derain.load_vqgan(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", ({"state_dict": {"conv.weight": torch.ones(3)}}, {"a": 1}, [1],
                                     torch.ones(2)))
def test_a_file_that_is_no_vqgan_is_refused_in_one_line(content, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput, match="a.ckpt") as refusal:
        derain.load_vqgan(tmp_path / "a.ckpt")
    assert "\n" not in str(refusal.value)


def test_a_vqgan_without_all_weights_is_refused(tmp_path, tiny):
    weights = dict(tiny.state_dict())
    del weights["decoder.conv_out.bias"]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput):
        derain.load_vqgan(tmp_path / "a.ckpt")


# ---- pre-training and fine-tuning ----------------------------------------------------------------

def faces(n: int) -> list[torch.Tensor]:
    return [derain.draw_background("faces", 96, np.random.default_rng(i)) for i in range(n)]


@pytest.fixture(scope="module")
def pretrained() -> derain.VQGAN:
    vqgan = derain.build_network(derain.VQGAN, 0, **derain.PRIOR)
    derain.pretrain(vqgan, faces(4), 25)
    return vqgan


def test_pretraining_is_deterministic_and_learns(pretrained):
    again = derain.build_network(derain.VQGAN, 0, **derain.PRIOR)
    clean = 2 * derain.sample_patches(faces(4), 4, 40, np.random.default_rng(0)) - 1
    with torch.no_grad():
        before = (again(clean)[0] - clean).abs().mean()
        after = (pretrained(clean)[0] - clean).abs().mean()
    assert after < 0.9 * before
    derain.pretrain(again, faces(4), 25)
    pairs = zip(again.state_dict().values(), pretrained.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dead_codes_are_replaced():
    vqgan = derain.build_network(derain.VQGAN, 0, **{**derain.PRIOR, "n_embed": 64})
    with torch.no_grad():
        vqgan.quantize.embedding.weight[1:] = 100  # nothing is near, so all choose code 0
    derain.pretrain(vqgan, faces(2), 40)
    assert vqgan.quantize.embedding.weight.abs().max() < 50


def test_our_own_checkpoint_comes_back(pretrained, tmp_path):
    derain.save_checkpoint(tmp_path / "v.pt", pretrained, "vqgan", derain.PRIOR)
    loaded = derain.load_vqgan(tmp_path / "v.pt")
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():  # groups, too, are as they were
        torch.testing.assert_close(loaded(image)[0], pretrained(image)[0], atol=1e-4, rtol=1e-3)


def test_fine_tuning_moves_the_encoder_alone(pretrained):
    network = derain.VQGANPrior(pretrained)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    clean = derain.sample_patches(faces(2), 8, derain.PATCH, np.random.default_rng(0))
    derain.train(network, clean, derain.rain_degradation(derain.RAIN["small"]), 3)
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(n.startswith(("vqgan.encoder.", "vqgan.quant_conv.")) for n in moved)
    for name, t in pretrained.state_dict().items():  # the VQGAN that was given is left alone
        assert torch.equal(t, before[f"vqgan.{name}"])


class Stub(torch.nn.Module):
    """Stands for a VQGAN, so that a blank elsewhere costs nothing here: means of 4x4 pixels."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.down = [None] * 3

    def encode(self, image):
        return torch.nn.functional.avg_pool2d(image, 4)

    def quantize(self, latent):
        return (10 * latent).round() / 10, None, None

    def decode(self, quantized):
        return torch.nn.functional.interpolate(quantized, scale_factor=4)


@pytest.fixture
def prior() -> derain.VQGANPrior:
    network = derain.VQGANPrior(derain.PRIOR)
    network.vqgan, network.teacher = Stub(), torch.nn.MaxPool2d(4)
    return network


@pytest.mark.quantization
def test_what_the_prior_shows_is_made_of_codes(prior):
    image = torch.rand(1, 3, 30, 21)
    padded = derain.pad_to_multiple(image, 4)
    codes = (10 * torch.nn.functional.avg_pool2d(2 * padded - 1, 4)).round() / 10
    expected = (codes.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :30, :21] + 1) / 2
    torch.testing.assert_close(prior(image), expected)


@pytest.mark.quantization
def test_the_loss_of_the_prior(prior):
    """L1, and the squared distance of latents from the codes of the teacher's latents, by hand."""
    clean, degraded = torch.rand(2, 2, 3, 22, 24)
    padded, target = (2 * derain.pad_to_multiple(x, 4) - 1 for x in (degraded, clean))
    target = (10 * torch.nn.functional.max_pool2d(target, 4)).round() / 10
    latent = torch.nn.functional.avg_pool2d(padded, 4)
    drawn = ((10 * latent).round() / 10).repeat_interleave(4, 2).repeat_interleave(4, 3)
    l1 = ((drawn[..., :22, :24] + 1) / 2 - clean).abs().mean()
    expected = (latent - target).square().mean() + l1
    assert prior.loss(degraded, clean).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("levels", (3, 5))
def test_fine_tuning_with_a_vqgan_of_any_depth(levels):
    """A published one makes latents 16 times smaller, which a side of 40 does not divide by."""
    network = derain.VQGANPrior({**derain.PRIOR, "ch_mult": (1,) * levels})
    degrade = derain.rain_degradation(derain.RAIN["small"])
    losses = derain.train(network, torch.rand(4, 3, 40, 40), degrade, 2)
    assert np.isfinite(losses).all() and network(torch.rand(1, 3, 1, 40)).shape == (1, 3, 1, 40)
