"""toy_denoise.py against plain loops, numpy's least squares and closed forms."""

import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import toy_denoise as toy
from conftest import t_within


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["toy_denoise.py", *options])
    toy.main()


def test_lists_differ_in_nothing_but_their_length():
    lists = toy.draw_lists(3, 5, seed=1)
    assert [len(shapes) for shapes in lists] == [3, 5, 64, 3]
    assert torch.equal(lists[1], toy.draw_lists(64, 64, seed=1)[1][:5])

    shapes = torch.cat(lists)
    assert len(shapes.unique(dim=0)) == 75  # no shape is in two lists
    assert_close(shapes.sum(1), torch.zeros(75))
    assert_close(shapes.norm(dim=1), torch.ones(75))


def test_a_sum_is_what_a_plain_loop_adds_up():
    shapes = toy.draw_lists(4, 1, seed=0)[0]
    torch.manual_seed(5)
    found = toy.draw_sums(200, toy.place_everywhere(shapes))

    torch.manual_seed(5)
    chosen, heights = torch.randint(4 * 56, (200, 3)), torch.randn(200, 3)
    for i in range(200):
        expected = torch.zeros(64)
        for atom, height in zip(chosen[i], heights[i]):
            place = atom % 56
            expected[place : place + 9] += height * shapes[atom // 56]
        assert_close(found[i], expected / expected.square().mean().sqrt())


def test_measures_are_the_regression_of_numpy():
    clean, noise, change = np.random.default_rng(0).normal(size=(3, 50))
    slope, rest, *_ = np.linalg.lstsq(noise[:, None], change)
    sizes = np.sqrt([rest[0], change @ change] / (noise @ noise))

    found = toy.measure(*map(torch.tensor, (clean + change, clean, noise)))
    np.testing.assert_allclose(found, 100 * np.append(slope, sizes))


def test_matching_pursuit_is_the_example_of_its_section_and_a_search_of_all_atoms():
    example = toy.matching_pursuit(torch.tensor([[4.0, 3]]), torch.tensor([[1, 0], [0.6, 0.8]]))
    assert_close(example, torch.tensor([[3.5968, 3.3024]]))

    atoms = toy.place_everywhere(toy.draw_lists(5, 1, seed=0)[0])
    signals = torch.randn(4, 64)
    for signal, found in zip(signals, toy.matching_pursuit(signals, atoms)):
        remains = signal
        for _ in range(3):
            trials = [remains - atom * (atom @ remains) for atom in atoms]
            remains = min(trials, key=torch.norm)
        assert_close(found, signal - remains)


def test_an_experiment_tests_the_right_noise_and_the_right_prior(monkeypatch):
    tests = []
    monkeypatch.setattr(toy, "train", lambda *_: None)
    monkeypatch.setattr(toy, "build_network", torch.nn.Identity)  # all noise is left
    monkeypatch.setattr(toy, "measure", lambda *signals: tests.append(signals))
    results, ((functions, training, _, wrong), *_) = toy.experiment(1, 1, 4, 1)

    def made_of(shapes, signals):
        """Tell by least squares whether all signals are sums of these shapes."""
        atoms = toy.place_everywhere(shapes)
        return np.linalg.lstsq(atoms.T.numpy(), signals.T.numpy())[1].max() < 1e-3

    for (noise_name, restorer, *_), (signals, clean, noise) in zip(results, tests, strict=True):
        assert made_of(functions, clean)
        assert made_of(training, noise) == (noise_name == "training")
        assert made_of(functions, signals) == (restorer == "network + prior")
        assert made_of(wrong, signals) == (restorer == "network + wrong prior")


def test_training_teaches_a_network_to_remove_the_noise():
    results = toy.experiment(1, 1, 0, 99)[0]
    assert toy.average(results, "training", "network")[2] < 60


def test_averages_and_swaps_by_hand():
    # The three swaps give 3, 18 and 1 in seed 0.
    noise_left = {(8, 1): 9.0, (64, 1): 20.0, (64, 8): 5.0, (1, 8): 6.0, (1, 64): 2.0, (8, 64): 4.0}
    results = {}
    for cell, left in noise_left.items():
        results["unseen", "network", *cell, 0] = torch.tensor([left, left])
        results["unseen", "network", *cell, 1] = torch.tensor([-left, 3.0])

    assert toy.swap_effect(results, 1) == pytest.approx(-22 / 3)
    assert toy.average(results, "unseen", "network", 8, 1).tolist() == [0, 6]


@pytest.mark.parametrize("seeds, quantile", list(enumerate(toy.STUDENT_T, 2)))
def test_the_interval_holds_95_per_cent_of_the_t_distribution(seeds, quantile):
    assert t_within(quantile, seeds - 1) == pytest.approx(0.95, abs=1e-4)

    effects = np.arange(seeds) - (seeds - 1) / 2  # mean 0
    half = quantile * np.std(effects, ddof=1) / math.sqrt(seeds)
    verdicts = {1.01: "Reproduced", 0.99: "Undecided", -0.99: "Undecided", -1.01: "Opposite"}
    for side, verdict in verdicts.items():
        text = toy.judge(effects + side * half)
        assert verdict in text and f"{(side - 1) * half:+.1f} to {(side + 1) * half:+.1f}" in text


def test_same_seed_same_bytes_and_the_table_is_what_was_measured(tmp_path, monkeypatch, capsys):
    files = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        run(monkeypatch, "--seeds=1", "--steps=3", f"--out={folder}")
        files.append([(folder / "toy.png").read_bytes(), (folder / "toy.csv").read_bytes()])
        printed = capsys.readouterr().out
        assert f"wrote {folder}/toy.png\nnetwork 3 of 9" in printed  # the first look
        assert "one seed tells no interval" in printed
    assert files[0] == files[1]

    header, *rows = files[0][1].decode().splitlines()
    assert header == "noise,restorer,K,J,seed,noise_left,damage,error"
    assert len(rows) == 54  # 2 noises, 3 restorers, 9 networks
    for key, measures in toy.experiment(8, 1, 0, 3)[0].items():
        assert ",".join([*map(str, key), *(f"{value:.3f}" for value in measures)]) in rows


@pytest.mark.parametrize("option", ("--seeds=0", "--steps=0", "--steps=x", "--out=/dev/null", "-x"))
def test_bad_options_are_one_line(option, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, option)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and option.split("=")[0] in error and error.count("\n") == 1
