"""Sections 5 and 7: training and the main job; and checkpoints."""

import os
import resource

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


# ---- the main job --------------------------------------------------------------------------------

IMAGES = list(torch.rand(6, 3, 60, 50) / 2)


def test_the_main_job_has_a_row_for_each_step_rain_and_output(monkeypatch, capsys):
    monkeypatch.setattr(derain, "TEST_PATCHES", 3)
    monkeypatch.setattr(derain, "TEST_PATCH", 32)
    monkeypatch.setitem(derain.NETWORKS, "toy", Toy)
    settings = (2, 5, "toy", "medium", 30, 0)  # 2 and 5 backgrounds, 30 steps, seed 0
    rows, pictures = derain.few_against_many(IMAGES[:4], IMAGES[4:], *settings)
    progress = capsys.readouterr().out
    numbers = {"rainy": 0, "opening 5": 0, "opening 7": 0, "few": 2, "many": 5}
    steps = sorted({row["step"] for row in rows})
    assert len(steps) >= 12 and steps[-1] == 30
    expected = []
    for step in steps:
        for rain in ("unseen", "medium"):
            expected += [(step, rain, *item) for item in numbers.items()]
    assert [tuple(row.values())[:4] for row in rows] == expected

    for row in rows[-10:]:
        shown, n = pictures[row["rain"]], row["n"]
        image, rainy = shown[row["output"]], shown["rainy"]
        measures = derain.decoupled_evaluation(image, rainy, shown["clean"])
        assert row == pytest.approx({**row, **measures})
        if n:  # the same as training alone
            network = toy()
            patches = derain.training_patches(IMAGES[:4], n, 0)
            derain.train(network, patches, derain.rain_degradation(derain.RAIN["medium"]), 30)
            assert torch.allclose(image, derain.predict(network, rainy), atol=1e-5)
            assert f"{n} backgrounds: 30 of 30 steps, loss 0." in progress


# ---- checkpoints ---------------------------------------------------------------------------------

ARGUMENTS = {"channels": 4, "blocks": 1}


def save(path, **change):
    """Write a checkpoint of a small ResNet, with some of its entries changed."""
    network = derain.build_network(derain.ResNet, 2, **ARGUMENTS)
    derain.save_checkpoint(path, network, "resnet", ARGUMENTS)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    return network


def test_checkpoint_round_trip(tmp_path):
    network = save(tmp_path / "a.pt")
    assert torch.equal(weights_of(network), weights_of(derain.load_checkpoint(tmp_path / "a.pt")))


class Malicious:
    """Unpickled by anything careless, this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},  # the first edition had none
        {"net": "vgg"},
        {"arguments": {"channels": 1500, "blocks": 12}},  # 2 GB
        {"arguments": None},
        {"state_dict": {"head.weight": "no tensor"}},
        {"state_dict": Malicious()},
    ],
)
def test_wrong_checkpoints_are_refused_in_one_line(tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "b.pt", **change)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    with pytest.raises(derain.BadInput, match=r"b\.pt.*\Z"):
        derain.load_checkpoint(tmp_path / "b.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 500_000
    assert not (tmp_path / "owned").exists()


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 cut off")
    for load in (derain.load_checkpoint, derain.load_vqgan):
        for path in (tmp_path / "c.pt", tmp_path / "missing.pt", tmp_path):
            with pytest.raises(derain.BadInput, match=rf"{path.name}.*\Z"):
                load(path)
