"""Section 4: training."""

import numpy as np
import pytest
import torch

import derain

graded = pytest.mark.training


class Toy(torch.nn.Conv2d):
    """A network that needs none of derain's, so that a blank there does not stop these tests."""

    def __init__(self):
        super().__init__(3, 3, 3, padding=1)


def toy():
    return derain.build_network(Toy)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@graded
def test_backgrounds_are_drawn_and_mirrored_evenly():
    """Each draw is independent of the others, and no other clean patch is ever seen."""
    backgrounds = torch.rand(12, 3, 8, 6)
    allowed = torch.cat([backgrounds, backgrounds.flip(-1)])
    seen = []

    def degrade(clean, rng):
        for patch in clean:
            equal = (patch == allowed).flatten(1).all(1)
            seen.append(equal.tolist().index(True))
        return clean

    derain.train(toy(), backgrounds, degrade, 150)
    assert len(set(seen)) == 24 and torch.equal(backgrounds, allowed[:12])
    batches = np.reshape(seen, (150, derain.BATCH))
    mirrored = batches >= 12
    assert abs(mirrored.mean() - 0.5) < 0.07
    assert 0.1 < mirrored.mean(1).std() < 0.3  # each by chance, not every second, nor all at once
    repeated = [len(set(batch)) < derain.BATCH for batch in batches % 12]
    # In turn or shuffled, this is below 0.5; with replacement, 0.95 is expected.
    assert np.mean(repeated) > 0.7


@graded
def test_training_is_adam_on_l1_with_a_rate_that_falls_along_half_a_cosine(capsys):
    """The same steps by hand, on the batches that the degradation was given."""
    steps = 4
    patches, measured = [], []

    def degrade(clean, rng):
        patches.append(clean.clone())
        return clean + 0.1

    def after_step(done):
        measured.append(weights_of(trained))
        assert done == len(measured) == len(patches)

    trained, network = toy(), toy()
    backgrounds = torch.rand(5, 3, 14, 9)
    losses = derain.train(trained, backgrounds, degrade, steps, after_step=after_step)
    optimizer = torch.optim.Adam(network.parameters())
    for step, clean in enumerate(patches):
        assert clean.shape == (derain.BATCH, 3, 14, 9)
        optimizer.param_groups[0]["lr"] = derain.RATE * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = (network(clean + 0.1) - clean).abs().mean()
        loss.backward()
        optimizer.step()
        assert isinstance(losses[step], float)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        assert torch.allclose(measured[step], weights_of(network), atol=1e-6)
    assert len(losses) == len(measured) == steps
    assert capsys.readouterr().out == ""  # without a label


@graded
def test_a_network_may_bring_its_loss_and_its_rate():
    class Own(Toy):
        rate = 0.5

        def loss(self, degraded, clean):
            return (degraded - clean).mean() + self.bias.sum()

    network = derain.build_network(Own)
    before = network.bias.sum().item()
    losses = derain.train(network, torch.rand(2, 3, 8, 6), lambda clean, rng: clean + 1, 2)
    # Adam moves each of 3 biases by the rate, and after half of a cosine by half of it.
    assert losses == pytest.approx([1 + before, 1 + before - 3 * 0.5], abs=1e-4)
    assert network.bias.sum().item() == pytest.approx(before - 3 * 0.75, abs=1e-4)


@graded
def test_the_seed_alone_decides_every_draw():
    """The degradation is given random numbers that are new at every step."""
    backgrounds = torch.rand(16, 3, 8, 6)

    def draws(seed, elsewhere):
        np.random.seed(elsewhere)
        torch.manual_seed(elsewhere)
        seen = []

        def degrade(clean, rng):
            seen.extend([rng.random(), clean.sum().item()])
            return clean

        derain.train(toy(), backgrounds, degrade, 6, seed)
        return seen

    first = draws(5, 0)
    assert first == draws(5, 1)
    assert len({*first, *draws(600, 0)}) == 24
