"""Sections 3, 5 and 7: the network, training, checkpoints, and the effect itself."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import derain

SMALL_RAIN = derain.rain_degradation(derain.RAIN["small"])


@pytest.fixture(scope="module")
def backgrounds():
    images = [derain.draw_background("faces", 64, np.random.default_rng(i)) for i in range(8)]
    return derain.sample_patches(images, 16, derain.PATCH, np.random.default_rng(0))


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", derain.NETWORKS)
def test_networks_keep_the_size_and_the_seed(name):
    network = derain.build_network(name, 3)
    for shape in ((1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 4, 4), (1, 3, 4, 9), (2, 3, 5, 8), (2, 3, 40, 40)):
        assert network(torch.rand(shape)).shape == shape
    before = torch.get_rng_state()
    assert torch.equal(weights_of(network), weights_of(derain.build_network(name, 3)))
    assert not torch.equal(weights_of(network), weights_of(derain.build_network(name, 4)))
    assert torch.equal(before, torch.get_rng_state())  # no trace in the global random state


def test_resnet_sees_ten_pixels_around():
    """1 + 4 * 2 + 1 convolutions of 3x3: the gradient of one output pixel reaches exactly 10 pixels far."""
    image = torch.zeros(1, 3, 41, 41, requires_grad=True)
    derain.build_network("resnet")(image + torch.rand(1, 3, 41, 41))[0, :, 20, 20].sum().backward()
    y, x = torch.nonzero(image.grad.abs().sum((0, 1)), as_tuple=True)
    assert (y.min(), y.max(), x.min(), x.max()) == (10, 30, 10, 30)
    assert sum(p.numel() for p in derain.ResNet().parameters()) == 19_443  # as its docstring says


def test_resnet_adds_its_blocks():
    network = derain.ResNet(channels=4, blocks=2)
    for block in network.body:  # blocks that add nothing leave head and tail
        torch.nn.init.zeros_(block[2].weight)
        torch.nn.init.zeros_(block[2].bias)
    x = torch.rand(1, 3, 9, 9)
    assert torch.allclose(network(x), network.tail(network.head(x)))


def test_training_lowers_the_loss_and_repeats_to_the_bit(backgrounds):
    networks = [derain.build_network("resnet", 0) for _ in range(2)]
    losses = [derain.train(network, backgrounds, SMALL_RAIN, 80, 5) for network in networks]
    assert losses[0] == losses[1]
    assert torch.equal(weights_of(networks[0]), weights_of(networks[1]))
    assert np.mean(losses[0][-20:]) < 0.6 * np.mean(losses[0][:5])


def test_interrupted_training_ends_with_the_same_weights(backgrounds):
    whole, parts = (derain.build_network("resnet", 0) for _ in range(2))
    derain.train(whole, backgrounds, SMALL_RAIN, 20, 5)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 8:
            raise Stop

    optimizer = derain.make_optimizer(parts)
    with pytest.raises(Stop):
        derain.train(parts, backgrounds, SMALL_RAIN, 20, 5, optimizer=optimizer, after_step=stop)
    derain.train(parts, backgrounds, SMALL_RAIN, 20, 5, start=8, optimizer=optimizer)
    assert torch.equal(weights_of(whole), weights_of(parts))


def test_training_sees_only_its_backgrounds_and_their_mirror_images():
    """n counts distinct backgrounds: no other clean patch may reach the degradation."""
    backgrounds = torch.rand(3, 3, 8, 8)
    allowed = [*backgrounds, *backgrounds.flip(-1)]
    seen = set()

    def degrade(clean, rng):
        for patch in clean:
            seen.add(next(i for i, other in enumerate(allowed) if torch.equal(patch, other)))
        return clean, torch.zeros(len(clean), 1, 8, 8)

    derain.train(derain.build_network("resnet"), backgrounds, degrade, 20)
    assert seen == set(range(6))


def test_training_is_adam_on_the_l1_loss_with_a_rate_that_falls_along_half_a_cosine():
    """The same steps by hand, on the batches that the degradation was given."""
    pairs, steps = [], 4

    def degrade(clean, rng):
        pairs.append((clean.clone(), clean + 0.1))
        return clean + 0.1, torch.zeros(len(clean), 1, 12, 12)

    trained, network = (derain.build_network("resnet", 0, channels=4, blocks=1) for _ in range(2))
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
    torch.testing.assert_close(weights_of(trained), weights_of(network), atol=1e-5, rtol=1e-3)


def test_streams_differ_by_seed_purpose_and_step():
    first = [derain.stream(*words).random() for words in
             ((0, "training", 0), (0, "training", 1), (1, "training", 0), (0, "test", 0), (0, "training"))]
    assert len(set(first)) == 5
    assert derain.stream(0, "training", 0).random() == first[0]


# ---------------------------------------------------------------------------------------------- checkpoints

CONFIG = {"net": "resnet", "arguments": {"channels": 4, "blocks": 1}, "steps": 10}


def test_checkpoint_round_trip(tmp_path):
    network = derain.build_network("resnet", 2, channels=4, blocks=1)
    derain.save_checkpoint(tmp_path / "a.pt", network, CONFIG, 10)
    loaded, content = derain.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(weights_of(network), weights_of(loaded))
    assert content["config"] == CONFIG and content["step"] == 10
    derain.save_checkpoint(tmp_path / "b.pt", loaded, content["config"], 10)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]  # no temporary file stays


class Malicious:
    """Unpickled by anything careless, this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_does_not_run(tmp_path):
    torch.save({"config": CONFIG, "step": 0, "weights": Malicious(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(derain.BadInput, match="mkdir"):
        derain.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change", [
    {"config": {**CONFIG, "net": "vgg"}}, {"config": {**CONFIG, "arguments": {"channels": 8, "blocks": 1}}},
    {"config": {**CONFIG, "arguments": {"channels": 10 ** 9, "blocks": 1}}}, {"config": None}, {"step": 11},
    {"step": "x"}, {"weights": {}}, {"weights": {"head.weight": "no tensor"}}])
def test_wrong_checkpoints_are_refused_in_one_line(tmp_path, change):
    derain.save_checkpoint(tmp_path / "a.pt", derain.build_network("resnet", 0, channels=4, blocks=1), CONFIG, 10)
    torch.save({**torch.load(tmp_path / "a.pt", weights_only=True), **change}, tmp_path / "b.pt")
    with pytest.raises(derain.BadInput, match="b.pt is no checkpoint") as problem:
        derain.load_checkpoint(tmp_path / "b.pt")
    assert "\n" not in str(problem.value)


def test_writing_leaves_nothing_half_done(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with pytest.raises(RuntimeError), derain.writing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with derain.writing(target) as temporary:
        temporary.write_text("whole")
    assert target.read_text() == "whole" and len(list(target.parent.iterdir())) == 1


# ---------------------------------------------------------------------------------------------- the effect


def test_few_backgrounds_remove_more_unseen_rain(monkeypatch):
    """The finding itself, on a tiny scale: the mean of two seeds, as one seed of 150 steps may go either way."""
    monkeypatch.setattr(derain, "TEST_PATCHES", 8)
    gaps = []
    for seed in range(2):
        training = [derain.draw_background("faces", 128, derain.stream(seed, "training", i)) for i in range(32)]
        held_out = [derain.draw_background("faces", 256, derain.stream(seed, "held out", i)) for i in range(4)]
        runs = [derain.Run(n=n, steps=150, seed=seed) for n in (4, 256)]
        rows, pictures = derain.few_against_many(*runs, training, held_out)
        assert [(row["tested_on"], row["output"], row["n"]) for row in rows] == [
            (rain, *output) for rain in ("unseen", "strokes", "small")
            for output in (("rainy", 0), ("few", 4), ("many", 256))]
        rainy, few, many, *_, many_seen = rows
        gaps.append(few["E_R"] - many["E_R"])
        assert rainy["E_R"] == 0 and rainy["psnr"] == derain.psnr(*(pictures["unseen"][k] for k in ("rainy", "clean")))
        assert many_seen["E_R"] > 2 * many["E_R"] * 0.8  # the rain of training is removed far better
        for row in (few, many):
            tested = pictures["unseen"]
            again = derain.decoupled_evaluation(*(tested[k] for k in (row["output"], "rainy", "clean", "rain")))
            assert again["E_R"] == row["E_R"]
    assert np.mean(gaps) > 5


def test_few_and_many_differ_in_the_backgrounds_alone(monkeypatch):
    """With many = few the two networks are one and the same, to the bit, though trained side by side."""
    monkeypatch.setattr(derain, "TEST_PATCHES", 2)
    images = [derain.draw_background("faces", 128, np.random.default_rng(i)) for i in range(4)]
    run = derain.Run(n=6, steps=10)
    _, pictures = derain.few_against_many(run, run, images, images)
    assert torch.equal(pictures["unseen"]["few"], pictures["unseen"]["many"])
    assert derain.measure(run, images, images, patches=(2, derain.TEST_PATCH))[1]["unseen"]["output"].equal(
        pictures["unseen"]["few"])  # and so alone


def test_networks_made_at_the_same_time_do_not_share_random_numbers():
    def make(seed):
        return [weights_of(derain.build_network("unet", seed)) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(4)))
    for seed, networks in enumerate(made):
        assert all(torch.equal(network, networks[0]) for network in networks), seed


def test_held_out_photographs_are_other_photographs(photos):
    training, held_out = derain.training_and_held_out([str(photos)], "faces", 0)
    assert len(training) == 5 and len(held_out) == 1
    assert not any(torch.equal(a, b) for a in training for b in held_out)
    single, elsewhere = derain.training_and_held_out([str(photos / "photo0.png")], "faces", 0)
    assert len(single) == 1 and len(elsewhere) == derain.HELD_OUT_IMAGES


def test_the_sentence_follows_from_the_numbers():
    def rows(few, many):
        return [{"tested_on": t, "output": o, "n": n, "E_R": e, "E_R_ideal": 80.0, "E_B": 1.0, "trained_on": "small",
                 "psnr": p, "ssim": 0.5}
                for t, o, n, e, p in (("unseen", "rainy", 0, 0.0, 9.0), ("unseen", "few", 4, few, 12.0),
                                      ("unseen", "many", 99, many, 11.0), ("small", "rainy", 0, 0.0, 9.0),
                                      ("small", "few", 4, 70.0, 20.0), ("small", "many", 99, 70.0, 30.0))]
    assert "removes more of" in derain.describe(rows(50.0, 20.0)) and "with many" in derain.describe(rows(50.0, 20.0))
    assert "removes less of" in derain.describe(rows(20.0, 50.0))
    assert "removes about as much of" in derain.describe(rows(50.5, 50.0))


def test_a_table_has_a_line_a_row_and_its_columns_in_line():
    text = derain.table([{"a": "x", "b": 1.25, "c": 3}, {"a": "long", "b": -10.5, "c": 4}], {"a": "", "b": ".1f"})
    assert text.split("\n") == ["a         b", "x       1.2", "long  -10.5"]
