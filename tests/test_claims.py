"""figures/claims.py and materials.py, against loops, closed forms and known answers."""

import math
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from functools import partial
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


@pytest.fixture
def main(monkeypatch, capsys):
    """Run `python figures/claims.py OPTIONS` without a new process; return what it printed."""

    def run(*options):
        monkeypatch.setattr("sys.argv", ["claims.py", *options])
        claims.main()
        return capsys.readouterr().out

    return run


# ---- materials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, seed", [*product(materials.GROUP, range(20, 36))])
def test_rain_of_the_group_step_by_step(name, seed):
    amounts, widths, lengths, directions = materials.GROUP[name]
    rng = derain.stream(seed)
    amount = rng.uniform(*amounts)
    width = rng.choice(widths)
    length = rng.integers(*lengths, endpoint=True)
    direction = rng.integers(*directions, endpoint=True)
    weight = rng.uniform(0.7, 1)
    if rng.random() < 0.1 and seed % 2:  # in training
        weight = 0
    reach = lengths[1] // 2 + 1
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
    layer = (layer - layer.min()) / (layer.max() - layer.min())
    degrade = materials.degradation(name, training=seed % 2 == 1)
    rainy = degrade(torch.zeros(1, 3, 20, 20), derain.stream(seed))
    assert torch.allclose(rainy, weight * layer, atol=1e-4)


@pytest.mark.parametrize(
    "kind, alike", [("gaussian", 0), ("correlated", math.exp(-1 / 9)), ("salt and pepper", 0)]
)
def test_noise_has_its_power_and_its_correlation(kind, alike, rng):
    noise = materials.degradation(kind)(torch.full((40, 3, 64, 64), 0.5), rng) - 0.5
    power = noise.square().mean((1, 2, 3)).sqrt()
    assert abs(power.mean() - 0.1) < 0.006 and power.std() > 0.003
    assert abs(noise.mean()) < 0.005
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
    assert abs(neighbours - alike) < 0.03


def test_controls_differ_from_the_prior_in_what_they_name():
    raw = derain.build_network(derain.VQGAN, **derain.PRIOR).decoder.conv_in.weight
    latent = torch.rand(1, derain.PRIOR["embed_dim"], 2, 2)
    rainy, clean = torch.rand(2, 1, 3, 16, 16)
    for net in ("prior", "no codebook", "from nothing"):
        network = claims.make_network(claims.Run(net, steps=1), [torch.rand(3, 80, 80)])
        last = network.vqgan.decoder.conv_in.weight
        assert raw.equal(last) == last.requires_grad == (net == "from nothing")
        assert latent.equal(network.vqgan.quantize(latent)[0]) == (net != "prior")
        more = network.loss(rainy, clean) - (network(rainy) - clean).abs().mean()
        assert (abs(more) < 1e-6) == (net == "from nothing")


def test_what_is_exchanged_for_what(rng):
    images = [torch.from_numpy(rng.random((3, 60, 60), np.float32)) for _ in range(4)]
    chosen = partial(materials.backgrounds, images, seed=3)
    every = chosen(n=1024, choice="any")
    order = derain.bright_detail(every).argsort()
    plain = chosen(n=512, choice="plain")
    firsts = {
        "inverted": 1 - every[order[1023]],
        "edge": plain[derain.sharpness(plain).argmax()],
        "quantile 0.9": every[order[921]],
    }
    for choice, first in firsts.items():
        assert chosen(n=8, choice=choice).equal(torch.stack([first, *plain[1:8]]))
    assert chosen(n=8, choice="opened").equal(derain.opening(every[:8]))
    assert chosen(n=8, choice="closed").equal(-derain.opening(-every[:8]))


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 11))
def test_interval_by_the_t_distribution_and_by_nadeau_and_bengio(n, rng):
    effects = rng.normal(3, 2, n)
    found = claims.verdict(effects)
    # In standard errors of the mean:
    within = t_within(found.half / math.sqrt(np.var(effects) / (n - 1)), n - 1)
    assert round(within, 4) == 0.95
    shared = claims.verdict(effects, photographs=True).half
    assert (shared / found.half) ** 2 == pytest.approx(1 + n * 6 / 18)


def test_firm_is_what_no_single_seed_decides():
    for effects, word, firm in (
        ((-10, -10.5, -11), "opposite", True),
        ((0, 9, 10, 11), "undecided", False),  # without the first one reproduced
        ((2, 9, 10, 11), "reproduced", False),  # without the last one undecided
    ):
        assert claims.verdict(np.array(effects))[-2:] == (word, firm)


def test_correlation_by_fisher():
    found = claims.correlation([(0, 0), (1, 1), (2, 0), (3, 1)])
    # r is 1 / sqrt(5), and z is 0.48121 ± 1.96.
    assert found == pytest.approx([0.4472135955, -0.9012406976, 0.9849567594])


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


def made_up(runs, rng):
    """Return a table of random results."""
    table = {}
    for run in runs:
        for test, step in product(claims.tests_of(run), claims.steps_of(run)):
            table[run, test, step] = dict(zip(claims.COLUMNS, rng.random(7)))
    return table


def test_the_report_by_hand(tmp_path, rng):
    everything = claims.make_claims("photographs")
    everything["few"] = few = everything["few"]._replace(count=3)
    table = made_up(claims.all_runs(few), rng)
    for i, pair in enumerate(few.panels.values()):
        for seed in (10, 11, 12):
            first, second = [table[replace(one.run, seed=seed), one.test, 2400] for one in pair]
            first.update(rain_left=20 + seed / 100, damage=14, psnr=30 + seed % 2)
            second.update(rain_left=-40 if i < 3 else 20.12, damage=5 + seed / 100, psnr=30)
    claims.report(table, everything, [], out=tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert "| rain_left | 9 | 3 yes, 0 no | 0 yes, 9 no | 0 yes, 0 no | +0.0 to +19.9 |" in text
    assert (
        "| unet, faces | 20/14/30.3 | -40/5/30.0 | 20 20 20 "
        "| +19.9 ± 0.0 | -8.9 ± 0.0 | +0.3 ± 1.4 | reproduced, firm |"
    ) in text
    assert "| +0.01 ± 0.02 | -8.9 ± 0.0 | +0.3 ± 1.4 | undecided |" in text


def test_tracked_files_follow_from_the_tracked_rows(tmp_path, monkeypatch, main):
    figures = claims.FIGURES
    shutil.copy(figures / "runs.csv", tmp_path)
    monkeypatch.setattr(claims, "FIGURES", tmp_path)
    monkeypatch.setattr(claims, "measure", None)  # nothing is trained
    pictures = []
    for _ in range(2):
        main()
        pictures.append([path.read_bytes() for path in sorted(tmp_path.glob("*.png"))])
    assert pictures[0] == pictures[1]
    for name in ("runs.csv", "detail.csv", "claims.md"):
        text = (tmp_path / name).read_bytes()
        assert text == (figures / name).read_bytes()
    assert len(text) <= 16 * 1024 and text.count(b"\n") <= 160


# ---- runs and files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, seeds, place",
    [
        (["detail"], range(20, 30), "figures"),  # twice as many seeds with 8 any
        (["detail", "--first=0"], range(10), "runs"),
        (["few", "--seeds=3"], range(10, 13), "runs"),
    ],
)
def test_which_seeds_are_run_and_where_it_is_told(
    options, seeds, place, tmp_path, monkeypatch, main
):
    found = {}
    monkeypatch.setattr(claims, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(claims, "do_runs", lambda runs, *_, **__: found.update(runs=runs))
    monkeypatch.setattr(claims, "report", lambda *_, out, **__: found.update(out=out))
    main(*options)
    assert found["out"].name == place
    assert {run.seed for run in found["runs"] if run.choice == "any"} == set(seeds)


def test_ranks_share_the_work_and_damage_is_named(photos, tmp_path, rng, main, capsys):
    options = ["sharp", "--seeds=2", "--steps=1", f"--runs={tmp_path}"]
    with_photos = [*options, f"--backgrounds={photos}"]
    pixels = b"".join(image.numpy().tobytes() for image in derain.load_images(photos))
    everything = claims.make_claims(f"photographs-{zlib.crc32(pixels):08x}", 1)
    everything["sharp"] = sharp = everything["sharp"]._replace(count=2)
    first, _, *others = dict.fromkeys(claims.all_runs(sharp))
    made = made_up(others, rng)
    file = tmp_path / "runs.csv"
    claims.report(made, everything, [], out=tmp_path)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = subprocess.check_output([*start, ROOT / "figures" / "claims.py", *with_photos])
    assert told.count(b" of ") == 2
    by_two = file.read_bytes()
    table = claims.read_table(file)
    assert table | made == table  # what was finished is not done again

    result = claims.file_of(first, tmp_path)
    whole = result.read_text()
    left = {place: cells for place, cells in table.items() if place[0] != first}
    for content in (whole.replace("damage", "harm"), "[1, 2]", whole[:99]):
        claims.report(left, everything, [], out=tmp_path)
        result.write_text(content)
        told = main(*options)
        assert told.count(result.name) == 1 and "missing for gain of 8" in told
    assert main(*with_photos).count(" of ") == 1 and file.read_bytes() == by_two

    for damaged in (by_two[:-2], by_two.replace(b",unseen,", b",unseen,x", 1)):
        file.write_bytes(damaged)
        assert len(claims.read_table(file)) == len(table) - 1
        assert "runs.csv" in capsys.readouterr().out
