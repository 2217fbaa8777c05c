"""figures/claims.py and materials.py, against loops, closed forms and known answers."""

import math
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import derain
from conftest import ROOT, t_within

sys.path.insert(0, str(ROOT / "figures"))
import claims  # noqa: E402
import materials  # noqa: E402

# ---- materials ----------------------------------------------------------------------------------

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
    amount = rng.uniform(*amounts)
    width = rng.choice(widths)
    length = rng.integers(*lengths)
    direction = rng.integers(*directions)
    weight = rng.uniform(0.7, 1)
    dry = rng.random() < 0.1
    reach = lengths[1] // 2
    margin = 2 * reach + 10
    side = 16 * math.ceil((20 + margin) / 16)
    noise = 256 * rng.random((1, side, side), np.float32)
    layer = torch.tensor(noise * (noise >= 256 * (1 - amount / 10_000)))

    x = np.arange(-reach, reach + 1)
    turned = (x - 1j * x[:, None]) * np.exp(1j * np.radians(direction))
    line = np.clip(length / 2 + 0.5 - abs(turned.imag), 0, 1) * np.clip(1 - abs(turned.real), 0, 1)
    x = np.arange(-4, 5)
    bell = np.exp(-0.5 * (x / (0.15 * width + 0.35)) ** 2) * (abs(x) <= width / 2)
    for kernel in ([[0, 0.1, 0], [0.1, 8, 0.1], [0, 0.1, 0]], line, np.outer(bell, bell)):
        layer = F.conv_transpose2d(layer, torch.tensor(kernel)[None, None].to(layer))
    layer = layer[:, margin:, margin:][:, :20, :20]
    layer = weight * (layer - layer.min()) / (layer.max() - layer.min())
    for training, expected in ((False, layer), (True, 0 if dry else layer)):
        degrade = materials.degradation(name, training)
        rainy = degrade(torch.zeros(1, 3, 20, 20), derain.stream(seed))
        assert (rainy - expected).abs().max() < 1e-4


def test_noise_has_its_power_and_its_correlation(rng):
    for kind, alike in (("gaussian", 0), ("correlated", math.exp(-1 / 9)), ("salt and pepper", 0)):
        noise = materials.degradation(kind)(torch.full((40, 3, 64, 64), 0.5), rng) - 0.5
        power = noise.square().mean((1, 2, 3)).sqrt()
        assert abs(power.mean() - 0.1) < 0.006 and power.std() > 0.003
        neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        assert abs(neighbours - alike) < 0.03
    assert set(noise[:, 1].unique().tolist()) == {-0.5, 0, 0.5}


def test_controls_differ_from_the_prior_in_what_they_name():
    raw = derain.build_network(derain.VQGAN, **derain.PRIOR).decoder.conv_in.weight
    latent = torch.rand(1, derain.PRIOR["embed_dim"], 2, 2)
    rainy, clean = torch.rand(2, 4, 3, 16, 16)
    parts = ("encoder", "quant_conv", "post_quant_conv", "decoder")
    for net, learn in (("prior", 2), ("no codebook", 2), ("from nothing", 4)):
        network = claims.make_network(claims.Run(net, steps=1), [torch.rand(3, 80, 80)])
        assert raw.equal(network.vqgan.decoder.conv_in.weight) == (learn == 4)
        assert latent.equal(network.vqgan.quantize(latent)[0]) == (net != "prior")
        l1 = (network(rainy) - clean).abs().mean()
        assert (abs(network.loss(rainy, clean) - l1) < 1e-6) == (learn == 4)
        before = {name: value.clone() for name, value in network.vqgan.named_parameters()}
        derain.train(network, clean, lambda clean, rng: clean, steps=2, loss=network.loss)
        after = network.vqgan.named_parameters()
        learned = {name.split(".")[0] for name, value in after if not value.equal(before[name])}
        assert learned == set(parts[:learn])


def test_what_is_exchanged_for_what(rng):
    images = [torch.from_numpy(rng.random((3, 60, 60), np.float32)) ** 9 for _ in range(4)]

    def chosen(choice, n=8):
        return materials.backgrounds(images, n, seed=3, choice=choice)

    every = chosen("any", 1024)
    order = derain.bright_detail(every).argsort()
    plain = chosen("plain", 512)
    steepest = max(plain, key=lambda patch: derain.sharpness(patch[None]).item())
    firsts = {
        "inverted": 1 - every[order[1023]],
        "edge": steepest,
        "quantile 0.9": every[order[921]],
    }
    for choice, first in firsts.items():
        assert chosen(choice).equal(torch.stack([first, *plain[1:8]]))
    assert chosen("opened").equal(derain.opening(every[:8]))
    assert (1 - chosen("closed") - derain.opening(1 - every[:8])).abs().max() < 1e-6


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 11))
def test_interval_by_the_t_distribution_and_by_nadeau_and_bengio(n, rng):
    effects = rng.normal(3, 2, n)
    half = claims.verdict(effects).half
    q = half / math.sqrt(np.var(effects) / (n - 1))  # in standard errors of the mean
    assert t_within(q, n - 1) == pytest.approx(0.95, abs=1e-4)
    shared = claims.verdict(effects, photographs=True).half
    assert (shared / half) ** 2 == pytest.approx(1 + n * 6 / 18)


@pytest.mark.parametrize(
    "effects, word, firm",
    [
        ((10, 10.5, 11), "reproduced", True),
        ((-10, -10.5, -11), "opposite", True),
        ((9, 10, 11, 0), "undecided", False),  # without the last one reproduced
        ((1, 9, 10, 11, 11), "reproduced", False),  # without the last one undecided
        ((10, 10.1), "reproduced", False),
        ((np.nan, np.nan, np.nan), "undecided", True),
    ],
)
def test_firm_is_what_no_single_seed_decides(effects, word, firm):
    found = claims.verdict(np.array(effects))
    assert (found.word, found.firm) == (word, firm)


def test_correlation_by_fisher(rng):
    points = rng.normal(size=(10, 2)) @ [[1, 2], [0, 1]]
    x, y = (points - points.mean(0)).T
    r = sum(x * y) / math.sqrt(sum(x * x) * sum(y * y))
    ends = [math.tanh(math.log((1 + r) / (1 - r)) / 2 + z / math.sqrt(7)) for z in (-1.96, 1.96)]
    assert claims.correlation(points) == pytest.approx([r, *ends])


# ---- claims -------------------------------------------------------------------------------------

# What the runs of a panel differ in, if not only in their number of backgrounds.
VARIES = {"steps": {"n", "step"}, "factors": {"n", "test"}, "balance": {"n", "trained_on"}}
VARIES |= {"prior": {"net"}, "gain": {"n", "choice"}, "sharp": {"choice"}}
VARIES |= {"detail": {"choice"}, "default": {"choice", "trained_on"}}


def test_panels_differ_in_what_they_name_and_in_nothing_else():
    for name, claim in claims.make_claims("photographs").items():
        for panel, terms in claim.panels.items():
            about = [{**asdict(term.run), "test": term.test, "step": term.step} for term in terms]
            varies = {key for key in about[0] if len({one[key] for one in about}) > 1}
            assert varies == VARIES.get(panel.split()[0], VARIES.get(name, {"n"})), panel
            assert [term.weight for term in terms] in ([1, -1], [1, -1, -1, 1])
            for term in [*terms, *claim.shown, *claim.often]:
                assert term.test in claims.tests_of(term.run)
                assert term.step in claims.steps_of(term.run)


def made_up(runs, rng):
    """Return a table of random results."""
    table = {}
    for run in runs:
        for test, step in product(claims.tests_of(run), claims.steps_of(run)):
            table[run, test, step] = dict(zip(claims.COLUMNS, rng.uniform(-30, 50, 7)))
    return table


def test_the_report_by_hand(tmp_path, rng):
    everything = claims.make_claims("photographs")
    few = everything["few"] = everything["few"]._replace(count=3)
    table = made_up(claims.all_runs(few), rng)
    for i, pair in enumerate(few.panels.values()):
        for seed in (10, 11, 12):
            first, second = [table[replace(one.run, seed=seed), one.test, 2400] for one in pair]
            first.update(rain_left=20 + seed / 100, damage=14, psnr=30 + seed % 2)
            second.update(rain_left=-40 if i < 3 else 20.11, damage=5 + seed / 100, psnr=30)
    claims.report(table, everything, [], out=tmp_path)
    lines = (tmp_path / "claims.md").read_text().splitlines()

    def line(start):
        return [line for line in lines if line.startswith(start)][0]

    assert "| rain_left | 9 | 3 yes, 0 no | 0 yes, 9 no | 0 yes, 0 no | +0.0 to +19.9 |" in line(
        "| `few`"
    )
    numbers = "| 20/14/30.3 | -40/5/30.0 | 20 20 20 | +19.9 ± 0.0 | -8.9 ± 0.0 | +0.3 ± 1.4 |"
    assert line("| unet") == f"| unet, faces {numbers} reproduced, firm |"
    assert line("| resnet, manga").endswith(
        "| +0.00 ± 0.02 | -8.9 ± 0.0 | +0.3 ± 1.4 | undecided |"
    )


def test_tracked_files_follow_from_the_tracked_rows(tmp_path, monkeypatch, capsys):
    figures = ROOT / "figures"
    shutil.copy(figures / "runs.csv", tmp_path)
    monkeypatch.setattr(claims, "FIGURES", tmp_path)
    monkeypatch.setattr("sys.argv", ["claims.py"])
    pictures = []
    for _ in range(2):
        claims.main()
        pictures.append([path.read_bytes() for path in sorted(tmp_path.glob("*.png"))])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3
    for name in ("runs.csv", "detail.csv", "claims.md"):
        text = (tmp_path / name).read_bytes()
        assert text == (figures / name).read_bytes()
    assert len(text) <= 16 * 1024 and text.count(b"\n") <= 160


# ---- runs and files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, seeds, place",
    [
        (["detail"], range(20, 30), "figures"),
        (["few"], range(10, 15), "figures"),
        (["detail", "--first=40", "--seeds=3"], range(40, 46), "runs"),
        (["few", "--first=0", "--runs=X"], range(5), "X"),
        (["few", "--steps=24"], range(10, 15), "runs"),
    ],
)
def test_which_seeds_are_run_and_where_it_is_told(options, seeds, place, tmp_path, monkeypatch):
    done = []
    told = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(claims, "do_runs", lambda runs, *_, **__: done.extend(runs))
    monkeypatch.setattr(claims, "report", lambda *_, out, **__: told.append(out))
    monkeypatch.setattr("sys.argv", ["claims.py", *options])
    claims.main()
    assert told[0].absolute() == tmp_path / place
    assert {run.seed for run in done if (run.choice, run.n) == ("any", 8)} == set(seeds)
    if options[0] == "detail":  # twice as many seeds for these alone
        assert {run.seed for run in done if run.choice == "plain"} == set(seeds[: len(seeds) // 2])


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
    everything["sharp"] = sharp = everything["sharp"]._replace(count=2)
    first, second, *others = dict.fromkeys(claims.all_runs(sharp))
    made = made_up(others, rng)
    file = tmp_path / "runs.csv"
    claims.report(made, everything, [], out=tmp_path)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = subprocess.check_output([*start, ROOT / "figures" / "claims.py", *with_photos])
    assert told.count(b" of ") == 2
    by_two = file.read_bytes()
    table = claims.read_table(file)
    assert table | made == table  # what was finished is not done again
    assert " of " not in main() and file.read_bytes() == by_two

    result = claims.file_of(first, tmp_path)
    whole = result.read_text()
    left = {place: cells for place, cells in table.items() if place[0] != first}
    for content in (whole.replace("damage", "harm"), "", "[1, 2]", whole[:-9], "7"):
        claims.report(left, everything, [], out=tmp_path)
        result.write_text(content)
        assert main().count(result.name) == 1
        assert "| gain of 8" not in report.read_text() and "| 64, low" in report.read_text()
    assert main(with_photos).count(" of ") == 1 and file.read_bytes() == by_two

    lines = by_two.decode()
    for damaged in (lines[:-2], lines.replace(",unseen,", ",unseen,x", 1)):
        file.write_text(damaged)
        found = claims.read_table(file)
        assert "runs.csv" in capsys.readouterr().out and len(found) == len(table) - 1
