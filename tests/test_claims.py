"""figures/claims.py and materials.py, against loops, closed forms and known answers."""

import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from itertools import product
from math import ceil, exp, sqrt

import numpy as np
import pytest
import torch
from torch.nn.functional import conv_transpose2d

import derain
from conftest import ROOT, t_within

sys.path.insert(0, str(ROOT / "figures"))
import claims  # noqa: E402
import materials  # noqa: E402

# ---- materials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("category", materials.PAINTERS)
def test_painters_draw_anew_for_each_seed(category):
    first, second = [materials.draw_background(category, 96, derain.stream(i)) for i in (0, 1)]
    assert (first - second).abs().mean() > 0.05


# Amount, widths, length and direction of the rain of the paper's group; the last two end before.
FACTS = {
    "group small": ((20, 40), (1, 3), (25, 36), (-10, 11)),
    "group medium": ((50, 70), (3, 5, 5, 7), (35, 46), (-30, 31)),
    "group large": ((80, 100), (7, 9), (45, 56), (-60, 61)),
}


@pytest.mark.parametrize("name, seed", [*product(FACTS, range(12))])
def test_rain_of_the_group_step_by_step(name, seed):
    amounts, widths, lengths, directions = FACTS[name]
    rng = derain.stream(seed)
    amount = rng.uniform(*amounts, 1)
    width = rng.choice(widths, 1)
    length = rng.integers(*lengths, 1)
    direction = rng.integers(*directions, 1)
    weight = rng.uniform(0.7, 1, 1)
    dry = rng.random(1) < 0.1  # if it is for training
    reach = lengths[1] // 2
    margin = 2 * reach + 10
    side = 16 * ceil((20 + margin) / 16)
    noise = 256 * rng.random((1, side, side), np.float32)
    layer = torch.tensor(noise * (noise >= 256 * (1 - amount / 10_000)))

    x = np.arange(-reach, reach + 1)
    turned = (x - 1j * x[:, None]) * np.exp(1j * np.radians(direction))
    line = np.clip(length / 2 + 0.5 - abs(turned.imag), 0, 1) * np.clip(1 - abs(turned.real), 0, 1)
    x = np.arange(-4, 5)
    bell = np.exp(-0.5 * (x / (0.3 * ((width - 1) / 2 - 1) + 0.8)) ** 2) * (abs(x) <= width / 2)
    for kernel in ([[0, 0.1, 0], [0.1, 8, 0.1], [0, 0.1, 0]], line, np.outer(bell, bell)):
        layer = conv_transpose2d(layer, torch.tensor(kernel)[None, None].to(layer))
    layer = layer[:, margin:, margin:][:, :20, :20]
    layer = (layer - layer.min()) / (layer.max() - layer.min())

    for training in (True, False):
        degrade = materials.degradation(name, training)
        rainy = degrade(torch.zeros(1, 3, 20, 20), derain.stream(seed))
        assert (rainy - (0 if training and dry else weight[0] * layer)).abs().max() < 1e-4


def test_noise_has_its_power_and_its_correlation(rng):
    for kind, alike in (("gaussian", 0), ("correlated", exp(-1 / 9)), ("salt and pepper", 0)):
        noise = materials.degradation(kind)(torch.full((40, 3, 64, 64), 0.5), rng) - 0.5
        power = noise.square().mean((1, 2, 3)).sqrt()
        assert abs(power.mean() - 0.1) < 0.006 and power.std() > 0.003
        neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        assert abs(neighbours - alike) < 0.03
    assert set(noise[:, 1].unique().tolist()) == {-0.5, 0, 0.5}


def test_controls_differ_from_the_prior_in_what_they_name():
    def changed(network):
        before = {name: value.clone() for name, value in network.vqgan.named_parameters()}
        derain.train(network, torch.rand(4, 3, 16, 16), lambda clean, rng: clean, 2)
        after = network.vqgan.named_parameters()
        return {name.split(".")[0] for name, value in after if not value.equal(before[name])}

    raw = derain.build_network(derain.VQGAN, **derain.PRIOR).decoder.conv_in.weight
    latent = torch.rand(1, derain.PRIOR["embed_dim"], 2, 2)
    parts = ("encoder", "quant_conv", "post_quant_conv", "decoder")
    for net, learn in (("prior", 2), ("no codebook", 2), ("from nothing", 4)):
        network = claims.make_network(claims.Run(net, steps=1), [torch.rand(3, 80, 80)])
        assert raw.equal(network.vqgan.decoder.conv_in.weight) == (learn == 4)
        assert latent.equal(network.vqgan.quantize(latent)[0]) == (net != "prior")
        assert changed(network) == set(parts[:learn])


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 11))
def test_interval_by_the_t_distribution_and_by_nadeau_and_bengio(n, rng):
    effects = rng.normal(3, 2, n)
    half = claims.verdict(effects).half
    q = half / sqrt(np.var(effects) / (n - 1))  # in standard errors of the mean
    assert t_within(q, n - 1) == pytest.approx(0.95, abs=1e-4)
    shared = claims.verdict(effects, photographs=True).half
    assert (shared / half) ** 2 == pytest.approx(1 + n * 6 / 18)


def test_the_interval_covers_the_truth_19_times_in_20(rng):
    for truth, word in ((-2, "opposite"), (0, "undecided"), (2, "reproduced")):
        found = [claims.verdict(rng.normal(truth, 1, 5)) for _ in range(5000)]
        assert 0.94 < np.mean([abs(one.mean - truth) < one.half for one in found]) < 0.96
        assert np.mean([one.word == word for one in found]) > 0.85


# ---- claims -------------------------------------------------------------------------------------

# What the runs of a panel differ in, if not only in their number of backgrounds.
VARIES = {"steps": {"n", "step"}, "factors": {"n", "test"}, "balance": {"n", "trained_on"}}
VARIES |= {"prior": {"net"}, "gain": {"n", "third"}, "sharp": {"third"}}


def test_panels_differ_in_what_they_name_and_in_nothing_else():
    for name, claim in claims.make_claims("photographs").items():
        for panel, terms in claim.panels.items():
            about = [{**asdict(term.run), "test": term.test, "step": term.step} for term in terms]
            varies = {key for key in about[0] if len({one[key] for one in about}) > 1}
            assert varies == VARIES.get(panel.split()[0], VARIES.get(name, {"n"})), panel
            for term in terms:
                assert term.test in claims.tests_of(term.run)
                assert term.step in claims.steps_of(term.run)


def made_up(runs, seeds, rng):
    """Return a table of random results."""
    table = {}
    for run in claims.seeded(runs, seeds):
        for test, step in product(claims.tests_of(run), claims.steps_of(run)):
            table[run, test, step] = dict(zip(claims.MEASURES, rng.uniform(-30, 50, 3)))
    return table


def test_a_contrast_by_hand(rng):
    terms = claims.make_claims("photographs")["steps"].panels["resnet, faces"]
    table = made_up([claims.Run(n=8), claims.Run(n=1024)], (10, 11), rng)
    total = 0
    for seed in (10, 11):
        for n, step, sign in ((1024, 2400, 1), (8, 2400, -1), (1024, 200, -1), (8, 200, 1)):
            total += sign * abs(table[claims.Run(n=n, seed=seed), "unseen", step]["rain_left"])
    found = claims.judge(table, terms, (10, 11))
    assert found["rain_left"].mean == pytest.approx(total / 2)


def test_photographs_set_aside_are_no_part_of_the_choice():
    for split in ("choice", "check"):
        training, tests = map(set, claims.images_of("", split, 100, tuple(range(24))))
        aside = set(range(0, 24, 3))
        assert not training & (tests | aside)
        assert tests == aside if split == "check" else len(tests - aside) == 4


# ---- runs and files -----------------------------------------------------------------------------


def test_ranks_share_the_work_and_damage_is_named(photos, tmp_path, rng, monkeypatch, capsys):
    options = ["sharp", "--seeds=2", "--steps=1", f"--runs={tmp_path}"]
    with_photos = [*options, f"--backgrounds={photos}"]

    def main(options=options):
        monkeypatch.setattr("sys.argv", ["claims.py", *options])
        claims.main()
        return capsys.readouterr().out

    report = tmp_path / "claims.md"
    report.touch()
    assert "no report" in main() and not report.read_text()

    pixels = b"".join(image.numpy().tobytes() for image in derain.load_images(photos))
    everything = claims.make_claims(f"photographs-{zlib.crc32(pixels):08x}", 1)
    runs = claims.runs_of(everything["sharp"])
    made = made_up(runs[2:], (10, 11), rng) | made_up(runs[:2], [11], rng)  # two are left to do
    file = tmp_path / "runs.csv"
    claims.write_table(made, file)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = subprocess.check_output([*start, ROOT / "figures" / "claims.py", *with_photos])
    assert told.count(b" of ") == 2
    by_two = file.read_bytes()
    table = claims.read_table(file)
    assert table | made == table  # what was finished is not done again
    assert " of " not in main() and file.read_bytes() == by_two

    result = claims.file_of(replace(runs[0], seed=10), tmp_path)
    whole = result.read_text()
    for content in (whole.replace("damage", "harm"), "", "[1, 2]", whole[:-9], "7"):
        claims.write_table(made, file)
        result.write_text(content)
        assert main().count(result.name) == 1
        assert "| gain of 8" not in report.read_text() and "| 64, low" in report.read_text()
    assert main(with_photos).count(" of ") == 1 and file.read_bytes() == by_two

    claims.write_table(made, file)
    result.write_text(whole.replace('"damage"', '"new": 1.5, "damage"'))
    assert "missing" not in main() and b",1.5" in file.read_bytes()
    claims.write_table(made, file)
    lines = file.read_text()
    for damaged in (lines[:-2], lines.replace(",unseen,", ",unseen,x", 1)):
        file.write_text(damaged)
        found = claims.read_table(file)
        assert "runs.csv" in capsys.readouterr().out
        assert sum(not claims.finished(found, run) for run in {key[0] for key in made}) == 1
