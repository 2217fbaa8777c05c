"""Section 4: training."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import derain
from golden import apply, near

graded = pytest.mark.graded
BY_HAND = {}  # what a network computes does not matter here


class Toy(nn.Conv2d):
    """A network that needs none of derain's, so that a blank there does not stop these tests."""

    def __init__(self):
        super().__init__(3, 3, kernel_size=3, padding=1)


def toy():
    return derain.build_network(Toy)


def weights_of(network):
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def factor(step, steps):
    """Return by how much the learning rate falls along half a cosine."""
    return (1 + np.cos(np.pi * step / steps)) / 2


@graded("train", 1)
def test_backgrounds_are_drawn_and_mirrored_by_chance():
    """Each alone; and no other clean patch is ever seen."""
    backgrounds = torch.rand(12, 3, 8, 6)
    allowed = torch.cat([backgrounds, backgrounds.flip(-1)])
    drawn = []

    def degrade(clean, rng):
        equal = (clean[:, None] == allowed).flatten(2).all(2)  # (batch, 24)
        assert equal.any(1).all(), "train: a patch is no background, nor a mirrored one"
        drawn.append(equal.int().argmax(1).tolist())
        return clean

    apply(derain.train, toy(), backgrounds, degrade, 300)
    drawn = np.reshape(drawn, (300, derain.BATCH))
    often = np.bincount(drawn.flatten(), minlength=24)
    near("train: how often each is drawn", often, 24 * [100], 50)
    near("train: the share of mirrored ones", (drawn >= 12).mean(), 0.5, 0.05)
    spread = (drawn >= 12).mean(1).std()
    near("train: how much the share of mirrored ones varies", spread, 0.125**0.5 / 2, 0.035)
    # One in 12 of the 28 pairs in a batch shows the same background.
    pairs = [np.triu(batch[:, None] == batch, 1).sum() for batch in drawn % 12]
    near("train: pairs of one background in a batch", np.mean(pairs), 28 / 12, 0.45)


@graded("train", 1)
def test_training_lowers_l1(capsys):
    """The same steps by hand, on the batches that the degradation was given."""
    patches, measured = [], []

    def degrade(clean, rng):
        patches.append(clean.clone())
        return clean + 0.1

    def after_step(done):
        measured.append(weights_of(trained))
        assert done == len(measured) == len(patches)

    trained, network = toy(), toy()
    backgrounds = torch.rand(5, 3, 14, 9)
    losses = derain.train(trained, backgrounds, degrade, 4, after_step=after_step)
    optimizer = torch.optim.Adam(network.parameters())
    for step, clean in enumerate(patches):
        optimizer.param_groups[0]["lr"] = 2e-3 * factor(step, 4)
        optimizer.zero_grad()
        loss = (network(clean + 0.1) - clean).abs().mean()
        loss.backward()
        optimizer.step()
        assert isinstance(losses[step], float)
        near(f"train: the loss of step {step}", losses[step], loss)
        near(f"train: the weights after step {step}", measured[step], weights_of(network))
    assert len(losses) == 4
    assert capsys.readouterr().out == ""  # without a label


@graded("train", 1)
def test_adam_has_its_own_loss_and_a_rate_that_falls_to_nothing():
    """The gradient of each bias is always 1, of some weights only at first, of the others 0."""
    network = toy().double()
    measured = []

    def measure(done):
        measured.append([p.detach().flatten()[0].item() for p in (network.bias, *network.weight)])

    def loss(degraded, clean):
        first = 1 if len(measured) == 1 else 0
        return (degraded - clean).mean() * (network.bias.sum() + first * network.weight[0].sum())

    measure(0)
    derain.train(
        network,
        torch.zeros(2, 3, 8, 6),
        lambda clean, rng: clean + 1,
        100,
        loss=loss,
        rate=0.01,
        after_step=measure,
    )
    step = np.arange(100)
    rates = 0.01 * factor(step, 100)
    momentum = 0.9**step * 0.1 / (1 - 0.9 ** (step + 1))
    scale = np.sqrt(0.999**step * 0.001 / (1 - 0.999 ** (step + 1)))
    moved = -np.diff(measured, axis=0).T
    near("train: steps where the gradient is 1", moved[0], rates, 1e-8)
    near("train: steps after a gradient of 1", moved[1], rates * momentum / scale, 1e-7)
    near("train: steps where the gradient is 0", moved[2:], np.zeros((2, 100)), 1e-12)


@graded("train", 1)
def test_the_seed_alone_decides_every_draw():
    """Nothing repeats, also not in another seed; the global random states stay as they are."""
    backgrounds = torch.rand(100, 3, 8, 6)

    def draws(seed):
        seen = []

        def degrade(clean, rng):
            seen.extend([rng.random(), clean.double().sum().item()])
            return clean

        derain.train(toy(), backgrounds, degrade, 200, seed)
        return seen

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    first = draws(5)
    assert len({*first, *draws(6)}) == 800, "train: a draw is repeated"
    assert states() == before, "train: a global random state was set or used"
    assert first == draws(5)
