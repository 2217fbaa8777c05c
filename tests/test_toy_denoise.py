"""Tests of toy_denoise.py: each compares with a closed form, a plain loop or an invariant."""
import csv
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "toy_denoise.py"
try:
    import toy_denoise as toy
except ImportError:
    sys.path.insert(0, str(SCRIPT.parent))
    import toy_denoise as toy

N, TONES = toy.N, toy.TONES
GRID = (len(TONES), len(TONES))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


# ---- the generators, against closed forms ----

def test_tones_are_the_sum_that_a_plain_loop_adds_up():
    c = torch.randn(5, 16, generator=rng())
    for row, signal_ in zip(c, toy.tones(c, first=11, count=3)):
        plain = [sum(row[2 * i] * math.cos(2 * math.pi * (11 + i) * t / N)
                     + row[2 * i + 1] * math.sin(2 * math.pi * (11 + i) * t / N) for i in range(3))
                 for t in range(N)]
        plain = torch.tensor(plain)
        torch.testing.assert_close(signal_, plain / math.sqrt(sum(p * p for p in plain) / N), atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", (toy.FUNCTION_BAND, toy.NOISE_BAND, toy.UNSEEN_BAND))
@pytest.mark.parametrize("count", TONES)
def test_tones_fill_their_band_and_nothing_else_at_rms_1(first, count):
    x = toy.tones(torch.randn(300, 16, generator=rng()), first, count)
    assert x.shape == (300, N)
    torch.testing.assert_close(rms(x), torch.ones(300))
    power = torch.fft.rfft(x).abs().square()
    inside = torch.zeros(N // 2 + 1, dtype=torch.bool)
    inside[first:first + count] = True
    assert (power[:, ~inside] < 1e-4).all()
    assert (power[:, inside].mean(0) > 1).all()


def test_the_three_bands_do_not_overlap_and_stay_below_the_nyquist_frequency():
    bands = [set(range(first, first + TONES[-1]))
             for first in (toy.FUNCTION_BAND, toy.NOISE_BAND, toy.UNSEEN_BAND)]
    assert len(set.union(*bands)) == sum(map(len, bands))
    assert min(set.union(*bands)) > 0 and max(set.union(*bands)) < N / 2


def test_tones_have_the_autocovariance_of_their_band_and_the_spread_of_a_random_direction():
    n, first, count = 40_000, 11, 4
    x = toy.tones(torch.randn(n, 8, generator=rng(1)), first, count)
    t = torch.arange(N)
    lags = (t[:, None] - t)[None] * torch.arange(first, first + count)[:, None, None]
    expected = torch.cos(2 * math.pi * lags / N).mean(0)                # random phases, equal expected power
    torch.testing.assert_close(x.T @ x / n, expected, atol=0.03, rtol=0)
    # each tone's share of the power is Beta(1, count - 1): mean 1 / count, and this variance
    share = torch.fft.rfft(x)[:, first:first + count].abs().square() * 2 / N**2
    torch.testing.assert_close(share.mean(0), torch.full((count,), 1 / count), atol=0.01, rtol=0)
    variance = (count - 1) / (count**2 * (count + 1))
    torch.testing.assert_close(share.var(0), torch.full((count,), variance), atol=0.0015, rtol=0)


def test_tones_ignore_spare_coefficients_and_use_all_the_others():
    c = torch.randn(16, generator=rng())
    for i in range(16):
        other = c.clone()
        other[i] += 1
        assert torch.equal(toy.tones(c, 1, 4), toy.tones(other, 1, 4)) == (i >= 8)


def test_clicks_hit_few_samples_anywhere_with_either_sign_at_rms_1():
    x = toy.clicks(20_000, rng())
    assert x.shape == (20_000, N)
    torch.testing.assert_close(rms(x), torch.ones(20_000))
    hit = x != 0
    assert (hit.sum(1) == toy.CLICKS).all()
    p = toy.CLICKS / N
    tolerance = 5 * math.sqrt(p * (1 - p) / 20_000)
    torch.testing.assert_close(hit.double().mean(0), torch.full((N,), p).double(), atol=tolerance, rtol=0)
    assert abs((x > 0).sum() / hit.sum() - 0.5) < 0.01


def test_draw_gives_each_seed_its_own_normal_numbers_whatever_the_other_seeds():
    both = toy.draw(1000, [rng(3), rng(4)])
    assert both.shape == (2, 1000, 2 * TONES[-1])
    assert torch.equal(toy.draw(1000, [rng(4)])[0], both[1]) and not torch.equal(both[0], both[1])
    assert abs(both.mean()) < 0.03 and abs(both.std() - 1) < 0.03


def test_grid_lists_the_members_by_function_then_noise_then_seed():
    functions, noises = list(torch.randn(3, 2, 5, N, generator=rng())), list(torch.randn(4, 2, 5, N))
    clean, noise = toy.grid(functions, noises)
    member = 0
    for f in functions:
        for z in noises:
            for seed in range(2):
                assert torch.equal(clean[member], f[seed]) and torch.equal(noise[member], z[seed])
                member += 1
    assert len(clean) == len(noise) == member == 24


# ---- the ensemble, against one network trained alone with torch.nn ----

def plain_network(weights: list[torch.Tensor]) -> torch.nn.Sequential:
    layers = []
    for weight, bias in zip(weights[::2], weights[1::2]):
        layer = torch.nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = weight.T.clone(), bias[0].clone()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def test_initial_weights_have_the_variance_of_he_et_al_and_no_bias():
    weights = toy.initial_weights(5)
    assert [tuple(w.shape) for w in weights[::2]] == list(zip(toy.WIDTHS, toy.WIDTHS[1:]))
    for weight, bias in zip(weights[::2], weights[1::2]):
        assert abs(weight.var() * weight.shape[0] / 2 - 1) < 0.05
        assert bias.shape == (1, weight.shape[1]) and not bias.any()
    assert not torch.equal(weights[0], toy.initial_weights(6)[0])


def test_network_gives_each_member_what_torch_nn_gives():
    weights = [torch.randn(3, *w.shape[-2:], generator=rng()) for w in toy.initial_weights(0)]
    x = torch.randn(3, 7, N, generator=rng(1))
    outputs = toy.network(weights, x)
    for m in range(3):
        expected = plain_network([w[m] for w in weights])(x[m])
        torch.testing.assert_close(outputs[m], expected, rtol=1e-4, atol=1e-2)     # outputs are about 1000


def train_alone(k: int, j: int, seed: int, steps: int) -> torch.nn.Sequential:
    """The training as anyone would write it for a single network."""
    model, data = plain_network(toy.initial_weights(seed)), rng(1_000_000 + seed)
    adam = torch.optim.Adam(model.parameters(), lr=toy.LEARNING_RATE)
    for step in range(steps):
        adam.param_groups[0]["lr"] = toy.LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        clean = toy.tones(torch.randn(toy.BATCH, 2 * TONES[-1], generator=data), toy.FUNCTION_BAND, k)
        noise = toy.tones(torch.randn(toy.BATCH, 2 * TONES[-1], generator=data), toy.NOISE_BAND, j)
        adam.zero_grad()
        torch.nn.functional.mse_loss(model(clean + noise), clean).backward()
        adam.step()
    return model


def test_each_member_of_the_ensemble_gets_the_weights_that_it_gets_alone():
    function_tones, noise_tones, seeds, steps = [1, 8], [2, 4, 8], [0, 3], 12
    together = toy.train(function_tones, noise_tones, seeds, steps)
    assert len(together[0]) == 12
    member = 0
    for k in function_tones:
        for j in noise_tones:
            for seed in seeds:
                alone = train_alone(k, j, seed, steps)
                batch_of_one = toy.train([k], [j], [seed], steps)
                moved = (together[2][member] - toy.initial_weights(seed)[2]).abs().max()
                assert moved > 0.02                                     # the comparison is not one of starts
                for layer in range(3):
                    weight, bias = together[2 * layer][member], together[2 * layer + 1][member, 0]
                    torch.testing.assert_close(weight, alone[2 * layer].weight.T, atol=2e-4, rtol=0)
                    torch.testing.assert_close(bias, alone[2 * layer].bias, atol=2e-4, rtol=0)
                    torch.testing.assert_close(weight, batch_of_one[2 * layer][0], atol=2e-4, rtol=0)
                member += 1


def test_training_removes_the_training_noise_and_reports_every_step():
    steps = []
    weights = toy.train([1], [4], [0], 300, steps.append)
    assert steps == list(range(1, 301))
    data = rng(9)
    clean = toy.tones(torch.randn(1, 200, 16, generator=data), toy.FUNCTION_BAND, 1)
    noise = toy.tones(torch.randn(1, 200, 16, generator=data), toy.NOISE_BAND, 4)
    E_R, E_B = toy.decoupled_evaluation(lambda x: toy.network(weights, x), clean, noise)
    assert E_R < 15 and E_B < 15


def test_nothing_touches_the_global_random_state():
    before = torch.random.get_rng_state()
    seeds = [0]
    toy.measure(toy.train(TONES, TONES, seeds, 1), seeds, n=4)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- E_R and E_B ----

@pytest.fixture
def clean_and_noise():
    return (toy.tones(torch.randn(3, 500, 16, generator=rng(1)), 1, 4),
            2 * toy.tones(torch.randn(3, 500, 16, generator=rng(2)), 11, 4))      # noise of RMS 2


@pytest.mark.parametrize("restore, E_R, E_B", (
    (lambda x: x, 100, 0),                      # all passed on
    (lambda x: 0 * x, 0, 100),                  # blank
    (lambda x: -x, 100, 200),
    (lambda x: 0.3 * x, 30, 70),
    (lambda x: 0 * x + 3, 0, math.sqrt(1 + 9) * 100)))
def test_decoupled_evaluation_of_restorers_known_in_closed_form(restore, E_R, E_B, clean_and_noise):
    both = toy.decoupled_evaluation(restore, *clean_and_noise)
    assert both.shape == (2, 3)
    torch.testing.assert_close(both, torch.tensor([[E_R] * 3, [E_B] * 3]).float(), atol=1e-2, rtol=0)


def test_decoupled_evaluation_tells_kept_function_from_left_noise_member_by_member(clean_and_noise):
    clean, noise = clean_and_noise
    pass_low = torch.tensor([0.0, 0.5, 0.9])[:, None, None]
    pass_high = torch.tensor([0.2, 0.4, 1.1])[:, None, None]

    def restore(x):
        spectrum = torch.fft.rfft(x)
        return torch.fft.irfft(torch.cat([pass_low * spectrum[..., :10], pass_high * spectrum[..., 10:]], -1))

    E_R, E_B = toy.decoupled_evaluation(restore, clean, noise)
    torch.testing.assert_close(E_R, torch.tensor([20.0, 40.0, 110.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(E_B, torch.tensor([100.0, 50.0, 10.0]), atol=1e-2, rtol=0)


def test_E_R_and_E_B_split_the_mean_squared_error_of_any_network(clean_and_noise):
    clean, noise = clean_and_noise[0], clean_and_noise[1] / 2           # equal RMS
    weights = [torch.stack(w) for w in zip(*map(toy.initial_weights, range(3)))]
    restore = lambda x: toy.network(weights, x)                         # noqa: E731
    E_R, E_B = toy.decoupled_evaluation(restore, clean, noise)
    error = sum((restore(clean + sign * noise) - clean).square().mean((1, 2)) for sign in (1, -1)) / 2
    torch.testing.assert_close((E_R / 100) ** 2 + (E_B / 100) ** 2, error)


# ---- the content prior ----

@pytest.mark.parametrize("k", TONES)
def test_content_prior_is_the_filter_that_passes_the_functions_band_only(k):
    dictionary = toy.tones(torch.randn(2, N, 16, generator=rng()), toy.FUNCTION_BAND, k)
    prior = toy.content_prior(dictionary)
    assert prior.shape == (2, N, N)
    x = torch.randn(2, 50, N, generator=rng(1))
    spectrum = torch.fft.rfft(x)
    spectrum[..., :1] = 0
    spectrum[..., k + 1:] = 0
    torch.testing.assert_close(x @ prior, torch.fft.irfft(spectrum), atol=1e-4, rtol=0)


# ---- measuring: networks whose answers are known ----

def linear_members(matrices: torch.Tensor) -> list[torch.Tensor]:
    """Weights (members, ...) with which `network` computes x @ matrix: relu(x) - relu(-x) = x."""
    m, eye = len(matrices), torch.eye(N)
    split = torch.cat([eye, -eye], 1)
    return [split.repeat(m, 1, 1), torch.zeros(m, 1, 2 * N), torch.eye(2 * N).repeat(m, 1, 1),
            torch.zeros(m, 1, 2 * N), split.T @ matrices, torch.zeros(m, 1, N)]


def test_measure_reports_each_member_in_its_own_cell():
    seeds = [0, 1, 5]
    gains = torch.linspace(0, 1, 48).view(*GRID, 3)
    results, views = toy.measure(linear_members(gains.view(48, 1, 1) * torch.eye(N)), seeds, n=40)
    for kind in ("trained", "unseen band", "unseen clicks"):
        E_R, E_B = results[kind, "network"]
        torch.testing.assert_close(E_R, 100 * gains, atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(E_B, 100 - 100 * gains, atol=1e-2, rtol=1e-4)
    for kind in ("trained", "unseen band"):                             # noise outside the functions' band
        torch.testing.assert_close(results[kind, "network + prior"][0], torch.zeros(*GRID, 3), atol=1e-2, rtol=0)
        torch.testing.assert_close(results[kind, "network + prior"][1], 100 - 100 * gains, atol=1e-2, rtol=1e-4)
    E_R, E_B = results["unseen clicks", "prior alone"]                  # white: 2 K of N dimensions get through
    expected = 100 * torch.tensor([math.sqrt(2 * k / N) for k in TONES])
    torch.testing.assert_close(E_R.mean((1, 2)), expected, atol=0, rtol=0.1)
    assert (E_B < 1e-2).all()
    assert len(results) == 9 and all(v.shape == (2, *GRID, 3) for v in results.values())

    noisy, clean, output = views
    torch.testing.assert_close(output, gains[:, :, 0, None] * noisy, atol=1e-4, rtol=0)
    spectrum = torch.fft.rfft(noisy - clean).abs()
    assert (spectrum[..., :toy.UNSEEN_BAND] < 1e-3).all() and (spectrum[..., toy.UNSEEN_BAND] > 1e-2).all()
    for row, k in zip(clean, TONES):
        assert (torch.fft.rfft(row).abs()[:, k + 1:] < 1e-3).all()
        assert (torch.fft.rfft(row).abs()[:, k] > 1e-3).all()


def test_the_trained_noise_of_measure_is_that_of_the_training_and_its_signals_are_new():
    high = torch.zeros(N // 2 + 1)                                      # passes the lowest frequency of the noise
    high[toy.NOISE_BAND] = 1
    passing = torch.fft.irfft(torch.fft.rfft(torch.eye(N)) * high)
    results, views = toy.measure(linear_members(passing.expand(16, N, N)), [0], n=2000)
    E_R = results["trained", "network"][0, 0, :, 0]                     # J tones share the power alike
    torch.testing.assert_close(E_R, 100 * torch.tensor(TONES).float().rsqrt(), atol=0, rtol=0.05)
    training = toy.tones(toy.draw(toy.BATCH, [rng(1_000_000)])[0], toy.FUNCTION_BAND, 8)
    assert (views[1, 3, 0] - training).abs().amax(1).min() > 0.1


# ---- the verdict, on tables made by hand ----

def test_swap_effect_is_that_of_a_plain_loop():
    E_R = torch.rand(4, 4, 5, generator=rng())
    for seed in range(5):
        pairs = [E_R[k, j, seed] - E_R[j, k, seed] for k in range(4) for j in range(4) if k > j]
        torch.testing.assert_close(toy.swap_effect(E_R)[seed], sum(pairs) / len(pairs))


def test_swap_effect_of_a_hand_made_table():
    table = torch.tensor([[9.0, 1.0, 2.0], [5.0, 9.0, 3.0], [6.0, 7.0, 0.0]])     # rows K, columns J
    both = torch.stack([table, table.T], -1)                                     # the second seed: swapped
    torch.testing.assert_close(toy.swap_effect(both), torch.tensor([4.0, -4.0]))


@pytest.mark.parametrize("effects, expected", (
    ([1.0, 0.1, 2.0], "reproduced"), ([-1.0, -0.1, -2.0], "refuted"), ([1.0, -0.1, 2.0], "undecided"),
    ([-1.0, -2.0, 0.5], "undecided"), ([1.0, 0.0], "undecided"), ([-1.0, 0.0], "undecided"),
    ([3.0], "reproduced"), ([-3.0], "refuted"), ([0.0], "undecided"), ([1.0, math.nan], "undecided"),
    ([math.nan, -1.0], "undecided")))
def test_verdict_of_hand_made_effects(effects, expected):
    assert toy.verdict(effects) == toy.verdict(torch.tensor(effects)) == expected


def test_verdict_of_no_seeds_is_an_error():
    with pytest.raises(RuntimeError):
        toy.verdict([])


# ---- the figure ----

def test_figure_shows_every_cell_mean_in_its_place():
    results = {(kind, name): 60 * torch.rand(2, *GRID, 3, generator=rng(i)) for i, (kind, name) in enumerate(
        (kind, name) for kind in ("unseen band", "trained") for name in ("network", "network + prior"))}
    views = torch.randn(3, *GRID, N, generator=rng())
    left, right = toy.draw_figure(results, views).subfigs
    assert len(right.axes) == 4
    for i, axes in enumerate(right.axes):
        expected = results["unseen band", ("network", "network + prior")[i // 2]][i % 2].mean(-1)
        assert ("E_R", "E_B")[i % 2] in axes.get_title() and ("prior" in axes.get_title()) == (i >= 2)
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), expected)
        assert axes.images[0].origin == "lower"
        shown = {t.get_position(): t.get_text().split(": ")[-1] for t in axes.texts}
        assert shown == {(j, k): f"{expected[k, j]:.0f}" for k in range(4) for j in range(4)}
    for axes, (k, j) in zip(left.axes, ((0, 3), (3, 0))):
        lines = {line.get_label(): torch.as_tensor(line.get_ydata()) for line in axes.lines}
        for view, label in zip(views, ("noisy", "clean", "output")):
            torch.testing.assert_close(lines[label], view[k, j])
        assert f"{results['unseen band', 'network'][0, k, j].mean():.0f} %" in axes.get_title()
        assert f"K = {TONES[k]}, J = {TONES[j]}" in axes.get_title()


# ---- the command line ----

def run(*arguments, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=100)


def read_csv(path: Path) -> dict:
    with open(path, newline="") as file:
        return {(row["noise"], row["restorer"], int(row["function_tones"]), int(row["noise_tones"]),
                 int(row["seed"])): (float(row["E_R"]), float(row["E_B"])) for row in csv.DictReader(file)}


def test_same_seed_same_bytes_and_the_table_is_what_was_measured(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)                              # one folder is there already, one is not
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda more: run("--seeds", 2, "--steps", 3, *more, cwd=tmp_path), ((), ("--out", "a/b"))))
    for done, folder in zip(runs, ("figures", "a/b")):
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert f"wrote {folder}/toy.csv" in done.stdout and f"wrote {folder}/toy.png" in done.stdout
        assert sorted(os.listdir(tmp_path / folder)) == ["toy.csv", "toy.png"]
    for name in ("toy.csv", "toy.png"):
        assert (tmp_path / "figures" / name).read_bytes() == (tmp_path / "a/b" / name).read_bytes()

    table, seeds = read_csv(tmp_path / "figures/toy.csv"), [0, 1]
    results, _ = toy.measure(toy.train(TONES, TONES, seeds, 3), seeds)
    assert len(table) == 9 * 16 * 2
    for (kind, name), values in results.items():
        for k, K in enumerate(TONES):
            for j, J in enumerate(TONES):
                for seed in seeds:
                    expected = values[:, k, j, seed].tolist()
                    assert table[kind, name, K, J, seed] == pytest.approx(expected, abs=0.05)

    # the last line is the claim's verdict, worked out again from the table
    effects = [sum(table["unseen band", "network", K, J, s][0] - table["unseen band", "network", J, K, s][0]
                   for K in TONES for J in TONES if K > J) / 6 for s in seeds]
    mean, sd = sum(effects) / 2, abs(effects[0] - effects[1]) / math.sqrt(2)
    last = runs[0].stdout.splitlines()[-1]
    assert last.startswith("toy: the simpler the functions against the noise, the better unseen noise is removed")
    assert f"{mean:+.1f} ± {sd:.1f} points" in last
    assert f"{sum(e > 0 for e in effects)} of 2 seeds agree: {toy.verdict(effects)}" in last


@pytest.mark.parametrize("arguments, word", (
    (["--seeds", "0"], "--seeds"), (["--seeds", "51"], "--seeds"), (["--seeds", "1.5"], "--seeds"),
    (["--steps", "x"], "--steps"), (["--steps", "-3"], "--steps"), (["--steps"], "--steps"),
    (["--out", "a_file"], "a_file"), (["--out", "a_file/below"], "a_file/below"), (["--out", "/proc/x"], "/proc/x"),
    (["--out", "/proc"], "/proc"),
    (["--out", ""], "--out"), (["--nonsense"], "--nonsense"), (["--step", "5"], "--step")))
def test_bad_input_is_one_clear_line_and_leaves_nothing(arguments, word, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy_denoise.py", *arguments])
    monkeypatch.setattr(toy, "train", lambda *_: pytest.fail("started to train"))
    with pytest.raises(SystemExit) as stop:
        toy.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("toy_denoise.py: ") and word in said.err
    assert os.listdir(tmp_path) == ["a_file"] and (tmp_path / "a_file").read_text() == "mine"


def test_a_failure_while_writing_keeps_the_old_files_and_leaves_no_others(tmp_path):
    for name in ("toy.csv", "toy.png"):
        (tmp_path / name).write_text("old")

    class FullDisk:
        def savefig(self, *_, **__):
            raise OSError("no space left")

    with pytest.raises(OSError):
        toy.write(str(tmp_path), {("trained", "network"): torch.ones(2, *GRID, 1)}, FullDisk(), [0])
    assert sorted(os.listdir(tmp_path)) == ["toy.csv", "toy.png"]
    assert {(tmp_path / name).read_text() for name in ("toy.csv", "toy.png")} == {"old"}


def test_help_gives_defaults_and_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy_denoise.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        toy.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(part in text for part in ("default: 5", "default: 1500", "default: figures", "example: python"))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_ctrl_c_ends_with_one_line_and_nothing_written(tmp_path):
    ours, theirs = os.openpty()                                         # a terminal, so the progress line is live
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--steps", "100000"], cwd=tmp_path, stderr=theirs,
                               stdout=subprocess.PIPE)
    os.close(theirs)
    said = b""
    while b"s left" not in said:                                        # the training has begun
        said += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    try:
        while more := os.read(ours, 1000):
            said += more
    except OSError:                                                     # how Linux reports the other end closed
        pass
    os.close(ours)
    assert process.returncode == 130 and out == b""
    progress, line, rest = said.decode().replace("\r\n", "\n").split("\n")
    assert progress.startswith("\r") and "of 100000" in progress and "stopped" in line and rest == ""
    assert os.listdir(tmp_path / "figures") == []


# ---- the promises about the source ----

def test_the_script_stays_short_and_on_its_own():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) < 250 and max(map(len, lines)) <= 110
    assert not any(line.split()[:2] in (["import", "derain"], ["from", "derain"]) for line in lines)
