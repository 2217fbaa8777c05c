"""Section 4: does the VQGAN compute what the published one computes, and open its files without running them?"""

import argparse
import collections
import os
import pathlib
import signal
import sys
import types

import numpy as np
import pytest
import torch

import derain
from golden import DATA, fill, ramp

TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,), "resolution": 32,
        "z_channels": 32, "n_embed": 64, "embed_dim": 16}


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Steps of pre-training with fewer patches, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derain, "PRETRAINING_PATCHES", ((2, 40), (1, 56)))
        patch.setattr(derain, "TEST_PATCHES", 2)
        yield


@pytest.fixture(scope="module")
def tiny() -> derain.VQGAN:
    return fill(derain.VQGAN(**TINY))


def test_vqgan_agrees_with_the_published_one(tiny):
    golden = np.load(DATA / "vqgan_tiny.npz")
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in tiny.state_dict().items()) == sorted(golden["state_dict"])
    with torch.no_grad():
        latent = tiny.encode(2 * ramp(2, 3, 32, 32) - 1)
        quantized, indices, loss = tiny.quantize(latent)
        found = {"latent": latent, "quantized": quantized, "reconstruction": tiny.decode(quantized)}
    for name, value in found.items():
        assert np.abs(value.numpy() - golden[name]).max() < 1e-4 * golden[name].std(), name
    assert np.array_equal(indices.flatten(), golden["indices"])
    assert loss.item() == pytest.approx(float(golden["codebook_loss"]), rel=1e-5)


def test_a_residual_block_by_hand():
    for inputs, outputs in ((32, 32), (32, 64)):
        block, x = fill(derain.ResidualBlock(inputs, outputs)), torch.randn(2, inputs, 5, 4)
        inner = block.norm1(x) / (1 + torch.exp(-block.norm1(x)))
        inner = block.norm2(block.conv1(inner))
        expected = block.nin_shortcut(x) + block.conv2(inner * torch.sigmoid(inner))
        torch.testing.assert_close(block(x), expected)


def test_attention_of_pixels_is_that_of_a_loop():
    layer, x = fill(derain.PixelAttention(32)).requires_grad_(False), torch.randn(2, 32, 2, 3)
    y, found = layer.norm(x), layer(x)
    q, k, v = (part(y).flatten(2) for part in (layer.q, layer.k, layer.v))
    for n in range(2):
        collected = torch.zeros(32, 6)
        for i in range(6):
            weights = torch.tensor([float(q[n, :, i] @ k[n, :, j]) / 32 ** 0.5 for j in range(6)]).exp()
            for j in range(6):
                collected[:, i] += weights[j] / weights.sum() * v[n, :, j]
        expected = x[n] + layer.proj_out(collected.view(1, 32, 2, 3))[0]
        torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=1e-4)


def test_structure_of_the_published_imagenet_configuration():
    """Facts of the published file: attention at level 4 alone, 16 times smaller latents, a shortcut where widths change."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in derain.VQGAN().state_dict().items()}
    assert shapes["quantize.embedding.weight"] == (1024, 256)
    assert shapes["encoder.down.4.attn.1.q.weight"] == (512, 512, 1, 1) and "encoder.down.3.attn.0.q.weight" not in shapes
    assert shapes["decoder.up.4.attn.2.q.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3) and shapes["decoder.conv_out.weight"] == (3, 128, 3, 3)
    assert "encoder.down.4.downsample.conv.weight" not in shapes and "decoder.up.0.upsample.conv.weight" not in shapes
    assert sum(key.startswith("decoder.up.0.block") and key.endswith("conv1.weight") for key in shapes) == 3


def test_images_of_another_size(tiny):
    image = torch.rand(1, 3, 48, 20)
    with torch.no_grad():
        reconstruction, loss = tiny(image)
        assert tiny.encode(image).shape == (1, 16, 24, 10) and reconstruction.shape == image.shape


def test_quantization_is_the_nearest_neighbour():
    torch.manual_seed(0)
    codebook = derain.Codebook(20, 3)
    torch.nn.init.normal_(codebook.embedding.weight)
    latent = torch.randn(2, 3, 4, 5)
    quantized, indices, loss = codebook(latent)
    for n in range(2):
        for y in range(4):
            for x in range(5):
                distances = [(latent[n, :, y, x] - code).norm() for code in codebook.embedding.weight]
                assert indices[n, y, x] == int(torch.stack(distances).argmin())
                torch.testing.assert_close(quantized[n, :, y, x], codebook.embedding.weight[indices[n, y, x]])
    assert loss.item() == pytest.approx(1.25 * (quantized - latent).square().mean().item(), rel=1e-5)


def test_gradients_of_quantization():
    """What comes back from the decoder goes straight through; the two terms of the loss pull one side each."""
    codebook = derain.Codebook(20, 3)
    torch.nn.init.normal_(codebook.embedding.weight)
    latent = torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized, indices, loss = codebook(latent)
    incoming = torch.randn(quantized.shape)
    quantized.backward(incoming, retain_graph=True)
    assert torch.equal(latent.grad, incoming) and codebook.embedding.weight.grad is None
    latent.grad = None
    loss.backward()
    difference = (quantized - latent).detach()
    torch.testing.assert_close(latent.grad, -2 * difference / difference.numel())
    pulled = torch.zeros(20, 3).index_add(0, indices.flatten(), difference.permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(codebook.embedding.weight.grad, 0.25 * 2 * pulled / difference.numel())


@pytest.fixture
def foreign():
    """Classes of a package that was installed where a checkpoint was written, and is not here."""
    module = types.ModuleType("lightning_of_old")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "lightning_of_old"})
    module.Config = type("Config", (), {"__module__": "lightning_of_old", "__init__": lambda self, *_: None,
                                        "__reduce__": lambda self: (type(self), (1, 2), {"content": [3]})})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "lightning_of_old"})
    module.ListConfig = type("ListConfig", (list,), {"__module__": "lightning_of_old"})
    sys.modules["lightning_of_old"] = module
    yield module
    sys.modules.pop("lightning_of_old", None)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_checkpoint_in_the_published_layout_loads(tiny, foreign, tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # they were written on a GPU
    state = {**tiny.state_dict(), "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4, 3),
             "loss.discriminator.main.0.weight": torch.zeros(4, 3)}
    content = {"epoch": 7, "callbacks": {foreign.ModelCheckpoint: {"best": torch.ones(()), "where": "x.ckpt"}},
               "other": [foreign.ModelCheckpoint(), foreign.Config(), foreign.ListConfig([1, 2]), np.ones(3)],
               "hparams": foreign.AttributeDict(lr=1), "counts": collections.defaultdict(list, {"a": [1]}), "optimizer_states": [{"lr": 1e-4}],
               "hyper_parameters": argparse.Namespace(lr=1), "path": pathlib.PosixPath("a"), "score": np.float64(3),
               "state_dict": state}
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
@pytest.mark.parametrize("function, name", ((os.mkdir, "mkdir"), (eval, "eval"), (np.load, "load"), (exec, "exec")))
def test_a_malicious_checkpoint_is_refused_by_name_and_not_run(tiny, tmp_path, function, name, zipped):
    target = tmp_path / "made"
    argument = target if name in ("mkdir", "load") else f"__import__('os').mkdir({str(target)!r})"
    torch.save({"callbacks": Malicious(function, str(argument)), "state_dict": tiny.state_dict()},
               tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(derain.BadInput, match=name) as refusal:
        derain.load_vqgan(tmp_path / "a.ckpt")
    assert "\n" not in str(refusal.value) and not target.exists()


@pytest.mark.parametrize("content", ({"state_dict": {"conv.weight": torch.ones(3)}}, {"a": 1}, [1], torch.ones(2)))
def test_a_file_that_is_no_vqgan_is_refused_in_one_line(content, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput, match="no VQGAN") as refusal:
        derain.load_vqgan(tmp_path / "a.ckpt")
    assert "\n" not in str(refusal.value)


def test_no_checkpoint_at_all(tmp_path, tiny):
    for data in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        (tmp_path / "a.ckpt").write_bytes(data)
        with pytest.raises(derain.BadInput, match="cannot be read"):
            derain.load_vqgan(tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput, match="no such file"):
        derain.load_vqgan(tmp_path / "missing.ckpt")
    weights = dict(tiny.state_dict())
    del weights["decoder.conv_out.bias"]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput, match="decoder.conv_out.bias"):
        derain.load_vqgan(tmp_path / "a.ckpt")


def faces(n: int) -> list[torch.Tensor]:
    return [derain.draw_background("faces", 96, np.random.default_rng(i)) for i in range(n)]


@pytest.fixture(scope="module")
def pretrained() -> derain.VQGAN:
    training = derain.seeded(derain.Pretraining, 0, **derain.PRIOR)
    derain.pretrain(training, faces(4), 24)
    return training.vqgan


def test_pretraining_is_deterministic_and_learns(pretrained):
    reports = []
    again = derain.seeded(derain.Pretraining, 0, **derain.PRIOR)
    derain.pretrain(again, faces(4), 24, after_step=lambda *report: reports.append(report))
    assert all(torch.equal(a, b) for a, b in zip(again.vqgan.state_dict().values(), pretrained.state_dict().values()))
    assert [step for step, _, _ in reports] == list(range(1, 25))
    quality = [psnr for _, psnr, _ in reports]
    assert np.mean(quality[-6:]) > np.mean(quality[:6]) + 1 and all(0 < alive <= 1 for _, _, alive in reports)


def test_dead_codes_come_back_to_life():
    training = derain.seeded(derain.Pretraining, 0, **{**derain.PRIOR, "n_embed": 64})
    with torch.no_grad():
        training.vqgan.quantize.embedding.weight[1:] = 100  # nothing is near, so all choose code 0
    reports = []
    derain.pretrain(training, faces(2), 42, after_step=lambda *report: reports.append(report))
    assert reports[32][2] > 0.9 and training.vqgan.quantize.embedding.weight.abs().max() < 50


def test_the_critic_learns_to_tell_and_not_to_please():
    """Its gradient is the hinge loss's alone: that of the same patches, real and drawn, put to it by hand."""
    training = derain.seeded(derain.Pretraining, 0, **derain.PRIOR)
    seen = []
    training.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    optimizer = torch.optim.SGD(training.parameters(), lr=0.0)  # its schedule is set, its weights stay
    optimizer.step = lambda: None
    derain.pretrain(training, faces(2), 2, optimizer=optimizer)  # the second step has a critic
    drawn, real, again = seen
    assert torch.equal(drawn, again)
    found = [p.grad.clone() for p in training.critic.parameters()]
    hinge = torch.relu(1 - training.critic(real)).mean() + torch.relu(1 + training.critic(drawn)).mean()
    for expected, gradient in zip(torch.autograd.grad(hinge, training.critic.parameters()), found):
        torch.testing.assert_close(gradient, expected)


def test_fine_tuning_moves_the_encoder_alone(pretrained):
    network = derain.build_network("prior", vqgan=pretrained)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    clean = derain.sample_patches(faces(2), 8, derain.PATCH, np.random.default_rng(0))
    derain.train(network, clean, derain.degradation("small"), 3)
    moved = {name for name, t in network.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and all(name.startswith(("vqgan.encoder.", "vqgan.quant_conv.")) for name in moved)
    for name, t in pretrained.state_dict().items():  # the VQGAN that was given is left alone
        assert torch.equal(t, before[f"vqgan.{name}"])


def test_what_the_prior_shows_is_made_of_codes(pretrained):
    network = derain.build_network("prior", vqgan=pretrained)
    image = torch.rand(1, 3, 30, 21)
    padded = derain.pad_to_multiple(image, 4)
    assert padded.shape == (1, 3, 32, 24)
    indices = network.vqgan.quantize(network.vqgan.encode(2 * padded - 1))[1]
    with torch.no_grad():
        drawn = network.vqgan.decode(network.vqgan.quantize.embedding(indices).permute(0, 3, 1, 2))
        torch.testing.assert_close(network(image), (drawn[..., :30, :21] + 1) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("levels", (3, 5))
def test_fine_tuning_with_a_vqgan_of_any_depth(levels):
    """A published one makes latents 16 times smaller, which a side of 40 does not divide by."""
    network = derain.seeded(derain.VQGANPrior, 0, vqgan={**derain.PRIOR, "ch_mult": (1,) * levels})
    losses = derain.train(network, torch.rand(4, 3, 40, 40), derain.degradation("small"), 2)
    assert np.isfinite(losses).all() and network(torch.rand(1, 3, 21, 40)).shape == (1, 3, 21, 40)


def test_the_loss_of_the_prior(pretrained):
    """The squared distance of the latents from the clean image's codes, by hand."""
    network = derain.build_network("prior", vqgan=pretrained)
    clean, degraded = torch.rand(2, 2, 3, 24, 24)
    with torch.no_grad():
        torch.nn.init.normal_(network.vqgan.quant_conv.weight)  # the fine-tuned encoder is another than the teacher
        target = pretrained.quantize(pretrained.encode(2 * clean - 1))[0]
        expected = (network.vqgan.encode(2 * degraded - 1) - target).square().mean()
        assert network.loss(degraded, clean).item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_interrupted_pretraining_goes_on_to_the_same_bytes(tmp_path, monkeypatch, call):
    draw, calls = derain.sample_patches, []
    monkeypatch.setattr(derain, "HELD_OUT_IMAGES", 1)
    monkeypatch.setattr(derain, "TRAINING_IMAGES", 2)

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    options = ("vqgan", "--steps", 4, "-o")
    assert call(*options, tmp_path / "whole.pt").returncode == 0
    monkeypatch.setattr(derain, "sample_patches", interrupted)
    stopped = call(*options, tmp_path / "cut.pt")
    assert stopped.returncode == 130 and "3 of 4 steps" in stopped.stderr
    refused = call("train", "--net", "prior", "--vqgan", tmp_path / "cut.pt", "-o", tmp_path / "prior.pt")
    assert refused.returncode == 2 and "unfinished" in refused.stderr and refused.stderr.count("\n") == 1
    assert call("vqgan", "--steps", 5, "-o", tmp_path / "cut.pt").returncode == 2  # that would be another
    assert call(*options, tmp_path / "cut.pt").returncode == 0
    assert (tmp_path / "cut.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert derain.load_vqgan(tmp_path / "cut.pt")


def test_the_prior_from_the_command_line(call, photos, tmp_path):
    made = call("vqgan", "--backgrounds", photos, "--steps", 2, "-o", tmp_path / "vqgan.pt")
    assert made.returncode == 0 and "dB" in made.stdout and derain.load_vqgan(tmp_path / "vqgan.pt")
    again = call("vqgan", "--backgrounds", photos, "--steps", 2, "-o", tmp_path / "vqgan.pt", "--resume")
    assert "complete" in again.stdout and made.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    train = ("train", "--backgrounds", photos, "--steps", 2, "--n", 4, "-o", tmp_path / "prior.pt", "--net", "prior")
    refused = call(*train)
    assert refused.returncode == 2 and "--vqgan" in refused.stderr and refused.stderr.count("\n") == 1
    assert call(*train, "--vqgan", tmp_path / "vqgan.pt").returncode == 0
    photo = next(photos.iterdir())
    assert call("restore", tmp_path / "prior.pt", photo, "-o", tmp_path / "clean.png").returncode == 0
