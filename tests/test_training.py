"""Sections 5 and 7: training, checkpoints, and the main job."""

import os

import numpy as np
import pytest
import torch

import derain

SMALL_RAIN = derain.rain_degradation(derain.RAIN["small"])


@pytest.fixture(scope="module")
def faces():
    return [derain.draw_background("faces", 64, np.random.default_rng(i)) for i in range(8)]


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


class Toy(torch.nn.Module):
    """A network that needs none of derain's, so that a blank there does not stop these tests."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, degraded):
        return self.layer(degraded)


@pytest.mark.training
def test_training_sees_only_its_backgrounds_and_their_mirror_images():
    """n counts distinct backgrounds: no other clean patch may reach the degradation."""
    backgrounds = torch.rand(12, 3, 8, 8)
    allowed = [*backgrounds, *backgrounds.flip(-1)]
    seen = []

    def degrade(clean, rng):
        for patch in clean:
            seen.append([torch.equal(patch, other) for other in allowed].index(True))
        return clean

    derain.train(derain.build_network(Toy), backgrounds, degrade, 60)
    assert set(seen) == set(range(24))
    mirrored = np.array(seen).reshape(60, -1) >= 12
    assert 0 < mirrored.mean(1).std() < 0.3  # each patch by itself, not a batch as a whole


@pytest.mark.training
def test_training_is_adam_on_l1_with_a_rate_that_falls_along_half_a_cosine():
    """The same steps by hand, on the batches that the degradation was given."""
    pairs, steps = [], 4

    def degrade(clean, rng):
        pairs.append((clean.clone(), clean + 0.1))
        return clean + 0.1

    trained, network = (derain.build_network(Toy, 0) for _ in range(2))
    losses = derain.train(trained, torch.rand(5, 3, 12, 12), degrade, steps)
    optimizer = torch.optim.Adam(network.parameters())
    for step, (clean, degraded) in enumerate(pairs):
        assert clean.shape == (derain.BATCH, 3, 12, 12)
        optimizer.param_groups[0]["lr"] = derain.RATE * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = (network(degraded) - clean).abs().mean()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    assert len(losses) == len(pairs) == steps
    torch.testing.assert_close(weights_of(trained), weights_of(network), atol=1e-6, rtol=1e-5)


@pytest.mark.training
def test_a_network_may_bring_its_loss_and_its_rate():
    class Own(Toy):
        rate = 0.0

        def loss(self, degraded, clean):
            return (self(degraded) - 7).square().mean()

    network = derain.build_network(Own, 0)
    before = weights_of(network)
    losses = derain.train(network, torch.rand(2, 3, 8, 8), lambda clean, rng: clean, 2)
    assert torch.equal(weights_of(network), before) and min(losses) > 20


@pytest.mark.training
def test_training_lowers_the_loss_and_repeats_to_the_bit():
    backgrounds = torch.rand(16, 3, 24, 24) / 2
    losses, networks = [], [derain.build_network(Toy, 0) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6)):
        losses.append(derain.train(network, backgrounds, lambda clean, rng: clean + 0.4, 60, seed))
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 60
    assert torch.equal(weights_of(networks[0]), weights_of(networks[1]))
    assert np.mean(losses[0][-10:]) < 0.6 * np.mean(losses[0][:5])


def test_streams_differ_by_seed_purpose_and_step():
    purposes = ((0, "training", 0), (0, "training", 1), (1, "training", 0), (0, "test", 0), (0,))
    first = [derain.stream(*words).random() for words in purposes]
    assert len(set(first)) == 5
    assert derain.stream(0, "training", 0).random() == first[0]


def test_progress_is_printed_with_a_label_only(capsys):
    for label in ("", "faces"):
        derain.train(derain.build_network(Toy), torch.rand(2, 3, 8, 8), lambda clean, _: clean, 40,
                     label=label)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and all("faces: step" in line and "s left" in line for line in lines)


def test_ranges_nest_and_unseen_is_unseen():
    small, medium, large = (derain.RAIN[name] for name in ("small", "medium", "large"))
    for factor in ("quantity", "width", "length", "direction"):
        a, b, c = (getattr(rain_range, factor) for rain_range in (small, medium, large))
        assert c[0] < b[0] < a[0] < a[1] < b[1] < c[1]
    unseen = derain.RAIN["unseen"]
    assert unseen.length[0] > large.length[1]
    assert unseen.direction[0] > max(abs(d) for d in large.direction)


def test_few_are_among_the_many(faces):
    few, many = (derain.training_patches(faces, n, 0) for n in (8, derain.MANY))
    assert few.shape == (8, 3, derain.PATCH, derain.PATCH) and len(many) == derain.MANY
    assert torch.equal(few, many[:8])
    assert not torch.equal(few, derain.training_patches(faces, 8, 1))


def test_photographs_are_split_by_image(photos):
    training, held_out = derain.training_and_held_out(photos, "faces", 0)
    assert (len(training), len(held_out)) == (5, 1)
    assert not any(torch.equal(a, b) for a in training for b in held_out)
    other, _ = derain.training_and_held_out(photos, "faces", 1)
    assert not all(torch.equal(a, b) for a, b in zip(training, other))
    with pytest.raises(derain.BadInput):
        derain.training_and_held_out(photos / "photo0.png", "faces", 0)


def test_the_main_job_measures_four_outputs_in_two_rains(faces, monkeypatch):
    monkeypatch.setattr(derain, "TEST_PATCHES", 4)
    faces = [torch.nn.functional.interpolate(face[None], size=160)[0] for face in faces]
    rows, pictures = derain.few_against_many(faces[:6], faces[6:], 2, 5, steps=3)
    names = ["rainy", "opening", "few", "many"]
    assert [row["output"] for row in rows] == names * 2
    assert [row["rain"] for row in rows] == ["unseen"] * 4 + ["small"] * 4
    assert [row["n"] for row in rows[:4]] == [0, 0, 2, 5]
    for row in rows:
        images = pictures[row["rain"]]
        again = derain.decoupled_evaluation(images[row["output"]], images["rainy"], images["clean"])
        assert {key: row[key] for key in again} == pytest.approx(again, nan_ok=True)
    assert torch.equal(pictures["unseen"]["opening"], derain.opening(pictures["unseen"]["rainy"]))
    for row in (rows[2], rows[3]):  # the same as training alone
        network = derain.build_network(derain.ResNet)
        patches = derain.training_patches(faces[:6], row["n"], 0)
        derain.train(network, patches, SMALL_RAIN, 3)
        output = derain.predict(network, pictures["unseen"]["rainy"])
        torch.testing.assert_close(output, pictures["unseen"][row["output"]], atol=1e-4, rtol=0)


# ---- checkpoints ---------------------------------------------------------------------------------

ARGUMENTS = {"channels": 4, "blocks": 1}


def save(path, **change):
    network = derain.build_network(derain.ResNet, 2, **ARGUMENTS)
    derain.save_checkpoint(path, network, "resnet", ARGUMENTS)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    return network


def test_checkpoint_round_trip(tmp_path):
    network = save(tmp_path / "a.pt")
    assert torch.equal(weights_of(network), weights_of(derain.load_checkpoint(tmp_path / "a.pt")))


class Malicious:
    """Unpickled by anything careless, this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_does_not_run(tmp_path):
    save(tmp_path / "evil.pt", state_dict=Malicious(tmp_path / "owned"))
    with pytest.raises(derain.BadInput):
        derain.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change", [
    {"net": "vgg"}, {"arguments": {"channels": 8, "blocks": 1}}, {"arguments": None},
    {"state_dict": {}}, {"state_dict": {"head.weight": "no tensor"}}])
def test_wrong_checkpoints_are_refused_in_one_line(tmp_path, change):
    save(tmp_path / "b.pt", **change)
    with pytest.raises(derain.BadInput, match="b.pt") as problem:
        derain.load_checkpoint(tmp_path / "b.pt")
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a checkpoint"])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    for load in (derain.load_checkpoint, derain.load_vqgan):
        for path in (tmp_path / "c.pt", tmp_path / "missing.pt", tmp_path):
            with pytest.raises(derain.BadInput, match=path.name) as problem:
                load(path)
            assert "\n" not in str(problem.value)
