"""toy_denoise.py: signals, the ensemble, the two measures and the verdict, against plain loops."""

import csv
import math

import numpy as np
import pytest
import torch

import toy_denoise as toy


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("first, count", [(1, 1), (11, 4), (21, 8)])
def test_tones_are_sinusoids_of_their_band_at_rms_1(first, count):
    signals = toy.tones(toy.draw(6, generators(0))[0], first, count)
    assert signals.shape == (6, toy.N)
    assert torch.allclose(signals.square().mean(-1), torch.ones(6), atol=1e-5)
    power = torch.fft.rfft(signals).abs()
    inside = power[:, first:first + count].square().sum(1)
    assert torch.allclose(inside, power.square().sum(1), rtol=1e-4)
    assert (power[:, first:first + count].amin(0) < power[:, first:first + count].amax(0)).all()


def test_clicks_hit_few_samples():
    clicks = toy.clicks(50, generators(0)[0])
    assert ((clicks != 0).sum(1) == toy.CLICKS).all()
    assert torch.allclose(clicks.square().mean(1), torch.ones(50), atol=1e-5)


def test_the_grid_pairs_every_function_with_every_noise():
    functions = [torch.full((2, 3, 4), float(k)) for k in range(2)]
    noises = [torch.full((2, 3, 4), float(10 + j)) for j in range(3)]
    clean, noise = toy.grid(functions, noises)
    pairs = [(clean[i, 0, 0].item(), noise[i, 0, 0].item()) for i in range(12)]
    assert pairs == [(k, j) for k in (0, 1) for j in (10, 11, 12) for _ in range(2)]


def test_an_ensemble_is_as_good_as_one_by_one():
    together = toy.train([1, 8], [2], [3, 4], 6)
    for k, tones in enumerate((1, 8)):
        for s, seed in enumerate((3, 4)):
            alone = toy.train([tones], [2], [seed], 6)
            for weight, other in zip(together, alone):
                torch.testing.assert_close(weight[2 * k + s], other[0], atol=1e-4, rtol=1e-3)


def test_the_network_is_a_plain_perceptron():
    weights = [w[None] for w in toy.initial_weights(1)]
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(),
                                torch.nn.Linear(128, 128),
                                torch.nn.ReLU(), torch.nn.Linear(128, 64))
    with torch.no_grad():
        for layer, weight, bias in zip(model[::2], weights[::2], weights[1::2]):
            layer.weight.copy_(weight[0].T)
            layer.bias.copy_(bias[0, 0])
        x = torch.randn(1, 5, 64)
        torch.testing.assert_close(toy.network(weights, x), model(x))


def test_noise_left_and_damage_against_a_loop(rng):
    clean, noise = (torch.from_numpy(rng.normal(size=(2, 3, 8))) for _ in range(2))

    def restore(x):
        return 0.3 * x + x ** 2

    found = toy.decoupled_evaluation(restore, clean, noise)
    for member in range(2):
        left, damage, power, loud = 0.0, 0.0, 0.0, 0.0
        for i, t in np.ndindex(3, 8):
            c, v = clean[member, i, t].item(), noise[member, i, t].item()
            plus, minus = restore(c + v), restore(c - v)
            left += ((plus - minus) / 2) ** 2
            damage += ((plus + minus) / 2 - c) ** 2
            power += v ** 2
            loud += c ** 2
        assert found[0, member].item() == pytest.approx(100 * math.sqrt(left / power))
        assert found[1, member].item() == pytest.approx(100 * math.sqrt(damage / loud))


def test_limits_of_the_measures_and_their_sum():
    clean = toy.tones(toy.draw(50, generators(0)), 1, 2)
    noise = toy.tones(toy.draw(50, generators(1)), 11, 2)
    for restore, expected in ((lambda x: x, (100, 0)), (lambda x: 0 * x, (0, 100)),
                              (lambda x: clean, (0, 0)), (lambda x: 0.5 * x, (50, 50))):
        found = toy.decoupled_evaluation(restore, clean, noise)[:, 0]
        assert found.tolist() == pytest.approx(expected, abs=1e-3)
    left, damage = toy.decoupled_evaluation(torch.tanh, clean, noise)[:, 0].tolist()
    whole = [(torch.tanh(clean + sign * noise) - clean).square().mean() for sign in (1, -1)]
    assert left ** 2 + damage ** 2 == pytest.approx(1e4 * sum(whole).item() / 2, rel=1e-4)


def test_the_prior_is_a_projection_onto_clean_functions():
    functions = toy.tones(toy.draw(toy.N, generators(0)), 1, 4)
    prior = toy.content_prior(functions)[0]
    assert torch.allclose(prior @ prior, prior, atol=1e-4)
    fresh = toy.tones(toy.draw(9, generators(5))[0], 1, 4)
    noise = toy.tones(toy.draw(9, generators(6))[0], 11, 8)
    assert torch.allclose(fresh @ prior, fresh, atol=1e-3) and (noise @ prior).abs().max() < 1e-3


def test_effects_and_verdicts_by_hand():
    left = torch.arange(16.0).view(4, 4)[..., None] * torch.tensor([1.0, 2.0])
    pairs = [(k, j) for k in range(4) for j in range(k)]
    expected = np.mean([4 * k + j - 4 * j - k for k, j in pairs])
    assert toy.swap_effect(left).tolist() == pytest.approx([expected, 2 * expected])
    effects = torch.tensor([1.0, 2, 3, 4, 5])
    assert "+3.0 +- 2.0" in toy.verdict(effects) and "5 of 5 seeds" in toy.verdict(effects)
    assert toy.verdict(effects).endswith("reproduced") and toy.verdict(-effects).endswith("refuted")
    assert toy.verdict(torch.tensor([1.0, 1, 1, 1, -9])).endswith("undecided")
    assert "5 seeds" in toy.verdict(effects[:3]) and "reproduced" not in toy.verdict(effects[:3])


def test_the_script(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        options = ["--seeds", "1", "--steps", "3", "--out", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", ["toy_denoise.py", *options])
        toy.main()
        assert "toy.png" in capsys.readouterr().out
    assert (tmp_path / "one/toy.csv").read_bytes() == (tmp_path / "two/toy.csv").read_bytes()
    rows = list(csv.DictReader(open(tmp_path / "one" / "toy.csv")))
    assert len(rows) == 3 * 3 * 16 and {"noise_left", "damage"} <= set(rows[0])
    assert (tmp_path / "one" / "toy.png").stat().st_size > 20_000
    taken = str(tmp_path / "one" / "toy.csv")
    for wrong in (["--seeds", "0"], ["--seeds", "x"], ["--out", taken], ["--colour"]):
        monkeypatch.setattr("sys.argv", ["toy_denoise.py", *wrong, "--steps", "1"])
        with pytest.raises(SystemExit) as stop:
            toy.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
