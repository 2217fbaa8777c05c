"""toy_denoise.py: signals, training, the two measures and the verdict, against plain loops."""
import math
import sys

import pytest
import torch

import toy_denoise as toy


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_tones_are_the_sum_that_a_plain_loop_adds_up_and_clicks_hit_four_samples():
    drawn = torch.randn(3, 16, generator=generator(5))
    for row, found in zip(drawn, toy.tones(3, 21, 4, generator(5))):
        expected = torch.zeros(toy.N)
        for i in range(4):
            angle = 2 * math.pi * (21 + i) * torch.arange(toy.N) / toy.N
            expected += row[2 * i] * angle.cos() + row[2 * i + 1] * angle.sin()
        expected /= expected.square().mean().sqrt()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    clicks = toy.clicks(2000, generator(0))
    assert ((clicks != 0).sum(1) == 4).all() and (clicks < 0).any(0).all()
    torch.testing.assert_close(clicks.square().mean(1), torch.ones(2000))


def test_training_takes_the_steps_of_a_network_written_out_by_hand():
    draws, weights = generator(3), []
    for a, b in ((toy.N, 128), (128, 128), (128, toy.N)):
        weights += [torch.randn(a, b, generator=draws).T * math.sqrt(2 / a), torch.zeros(b)]
    adam, draws = torch.optim.Adam([w.requires_grad_() for w in weights]), generator(1_000_003)
    for step in range(6):
        clean = toy.tones(32, 1, 2, draws)
        x = clean + toy.tones(32, 11, 4, draws)
        for weight, bias in zip(weights[:4:2], weights[1:4:2]):
            x = (x @ weight.T + bias).clamp(min=0)
        loss = (x @ weights[4].T + weights[5] - clean).square().mean()
        adam.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 6)) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    model, found = toy.train(2, 4, 3, 6)
    assert found == pytest.approx(loss.item(), rel=1e-3)
    torch.testing.assert_close(list(model.parameters()), weights, atol=1e-4, rtol=0)


def test_noise_left_and_damage_against_a_loop_and_closed_forms():
    clean, noise = toy.tones(9, 1, 2, generator(0)), toy.tones(9, 11, 2, generator(1))
    for gain in (1, 0, 0.3):  # all passed on, a blank output, and between
        found = toy.decoupled_evaluation(lambda x: gain * x, clean, noise)
        assert found.tolist() == pytest.approx([100 * gain, 100 - 100 * gain], abs=1e-3)
    left = damage = error = 0.0
    for c, v in zip(clean.flatten().tolist(), noise.flatten().tolist()):
        plus, minus = math.tanh(c + v), math.tanh(c - v)
        left += ((plus - minus) / 2) ** 2 / (9 * toy.N)
        damage += ((plus + minus) / 2 - c) ** 2 / (9 * toy.N)
        error += ((plus - c) ** 2 + (minus - c) ** 2) / (2 * 9 * toy.N)
    found = toy.decoupled_evaluation(torch.tanh, clean, noise).tolist()
    assert found == pytest.approx([100 * math.sqrt(left), 100 * math.sqrt(damage)], rel=1e-4)
    assert found[0] ** 2 + found[1] ** 2 == pytest.approx(1e4 * error, rel=1e-4)


def test_a_network_that_passes_all_on_with_and_without_the_prior():
    measures, (noisy, clean, output) = toy.evaluate(torch.nn.Identity(), 4, 2, seed=0)
    assert torch.equal(noisy, output)
    inside = torch.fft.rfft(torch.stack([clean, noisy - clean])).abs() > 1e-3
    assert inside[0].nonzero().flatten().tolist() == list(range(1, 5))
    assert inside[1].nonzero().flatten().tolist() == list(range(21, 29))
    through = 100 * math.sqrt(2 * 4 / toy.N)  # of the clicks: the prior passes 8 of 64 dimensions
    for noise, held in {"trained": 0, "unseen band": 0, "unseen clicks": through}.items():
        assert measures[noise, "network"].tolist() == pytest.approx([100, 0], abs=0.01)
        for restorer in ("prior alone", "network + prior"):
            assert measures[noise, restorer].tolist() == pytest.approx([held, 0], rel=0.1, abs=0.01)


def test_swap_effect_and_verdicts_by_hand():
    table = torch.tensor([[9.0, 1, 2], [5, 9, 3], [6, 7, 0]])  # rows K, columns J
    assert toy.swap_effect(torch.stack([table, table.T], -1)).tolist() == [4, -4]
    effects = torch.tensor([-2.0, -1, 0, 1, 2])  # half an interval: 2.776 sqrt(2.5 / 5) = 1.963
    for mean, word in ((2, "reproduced"), (1.9, "undecided"), (-1.9, "undecided"), (-2, "refuted")):
        assert toy.verdict(effects + mean).endswith(word)
    assert "+3.0 points (95 %: +1.0 to +5.0), 5 of 5 seeds" in toy.verdict(effects + 3)
    assert toy.verdict(effects[:4] + 9).endswith("too few seeds")


def test_same_seed_same_bytes_and_the_table_is_what_was_measured(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        options = ["--seeds=1", "--steps=3", f"--out={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", ["toy", *options])
        toy.main()
        assert f"wrote {tmp_path / name}/toy.csv" in capsys.readouterr().out
    table = (tmp_path / "one/toy.csv").read_text()
    assert table == (tmp_path / "two/toy.csv").read_text()
    header = "noise,restorer,function_tones,noise_tones,seed,noise_left,damage"
    assert table.startswith(header + "\n") and table.count("\n") == 1 + 9 * 16
    measures, _ = toy.evaluate(toy.train(8, 2, 0, 3)[0], 8, 2, 0)
    for (noise, restorer), (left, damage) in measures.items():
        assert f"\n{noise},{restorer},8,2,0,{left:.3f},{damage:.3f}\n" in table


@pytest.mark.parametrize("wrong", ["--seeds=0", "--seeds=11", "--steps=0", "--out=/dev/null", "-x"])
def test_bad_options_are_one_line_and_status_2(wrong, monkeypatch, capsys):
    monkeypatch.setattr(toy, "train", lambda *_: pytest.fail("started to train"))
    monkeypatch.setattr(sys, "argv", ["toy_denoise.py", wrong])
    with pytest.raises(SystemExit) as stop:
        toy.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and wrong.split("=")[0] in error
