"""figures/claims.py: degradations, runs, and verdicts, against numpy and closed forms."""

import csv
import importlib.util
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import derain
from conftest import ROOT

@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "figures" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module
    spec.loader.exec_module(module)
    yield module
    for name in ("manga", "urban"):
        derain.BACKGROUNDS.pop(name)

# ---- degradations --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gaussian", "correlated", "stripes"])
def test_noise_has_the_power_that_it_says(claims, kind, rng):
    grey = torch.full((40, 3, 64, 64), 0.5)
    noise = claims.degradation(kind)(grey, rng) - grey
    found = noise.square().mean((1, 2, 3)).sqrt()
    low, high = claims.NOISE[kind]
    assert abs(found.mean() - (low + high) / 2) < 0.006
    assert low - 0.012 < found.min() and found.max() < high + 0.012
    assert found.std() > 0.003  # a level for each image

def test_salt_and_pepper_hits_whole_pixels_and_leaves_the_others(claims, rng):
    grey = torch.full((40, 3, 50, 50), 0.5)
    noisy = claims.degradation("salt-and-pepper")(grey, rng)
    hit = (noisy != grey)
    assert torch.equal(hit.any(1), hit.all(1))
    assert set(noisy[hit].tolist()) == {0.0, 1.0}
    assert abs(hit.float().mean() - 0.04) < 0.004 and abs(noisy[hit].mean() - 0.5) < 0.05

def test_correlated_noise_is_alike_next_door_and_white_noise_is_not(claims, rng):
    grey = torch.full((20, 3, 64, 64), 0.5)
    for kind, expected in (("correlated", math.exp(-1 / (4 * 1.5 ** 2))), ("gaussian", 0)):
        noise = claims.degradation(kind)(grey, rng) - grey
        found = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        assert abs(found - expected) < 0.03

def test_stripes_have_one_frequency(claims, rng):
    stripes = claims.degradation("stripes")(torch.full((1, 3, 16, 64), 0.5), rng) - 0.5
    power = torch.fft.rfft(stripes[0, 0, 0]).abs()
    assert power.argmax() == 8 and power[8] > 0.999 * power.norm()
    assert torch.equal(stripes[0, 0, 0], stripes[0, 2, 9])

@pytest.mark.parametrize("kind", ["blur-narrow", "blur-wide", "blur-other"])
def test_blur_is_a_mean_along_a_line(claims, kind, rng):
    flat = torch.full((2, 3, 30, 40), 0.3)
    assert torch.allclose(claims.degradation(kind)(flat, rng), flat, atol=1e-5)
    dot = torch.zeros(1, 3, 41, 41)
    dot[..., 20, 20] = 1
    blurred = claims.degradation(kind)(dot, rng)[0, 0].numpy()
    assert blurred.sum() == pytest.approx(1, abs=1e-4)  # light is kept
    y, x = np.mgrid[-20:21, -20:21]
    angle = math.degrees(0.5 * math.atan2(2 * (blurred * x * y).sum(),
                                          (blurred * (x ** 2 - y ** 2)).sum()))
    direction = 90 - abs(angle)  # the line's axis, from vertical, to either side
    low, high = claims.BLUR[kind][1]
    assert low - 3 < direction < high + 3

def test_strokes_only_brighten_and_painters_paint(claims, rng):
    clean = torch.rand(2, 3, 60, 60)
    assert (claims.degradation("strokes")(clean, rng) >= clean - 1e-6).all()
    for category in ("manga", "urban"):
        images = [derain.draw_background(category, 96, np.random.default_rng(s)) for s in (0, 0, 1)]
        assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
        assert images[0].std() > 0.1

# ---- verdicts ------------------------------------------------------------------------------------

def made_up(claims, pairs, seeds=5):
    """A table of random results for the runs, and the same numbers for numpy."""
    rng, table = np.random.default_rng(3), {}
    for run in pairs:
        for seed in range(seeds):
            rows = []
            for kind in claims.tests_of(run):
                values = rng.uniform(10, 50, 6)
                measures = dict(zip(("E_R", "E_R_ideal", "E_W", "E_B", "psnr", "ssim"), values))
                rows.append({**asdict(replace(run, seed=seed)), "tested_on": kind, **measures})
            table[replace(run, seed=seed)] = rows
    return table

def test_effects_by_hand(claims):
    few, many = claims.few(claims.Run())
    table = made_up(claims, (few, many))
    for metric, sign in (("E_R", 1), ("E_W", -1), ("psnr", 1)):
        expected = []
        for seed in range(5):
            first, second = (table[replace(run, seed=seed)] for run in (few, many))
            expected.append(sign * (first[1][metric] - second[1][metric]))  # strokes come second
        found = claims.effect(table, (few, many), "strokes", metric, 5)
        assert found == pytest.approx(np.array(expected))
    noise = claims.few(claims.Run(trained_on="gaussian"))
    table = made_up(claims, noise)
    others = [row["E_W"] for row in table[noise[0]] if row["tested_on"] != "gaussian"]
    assert len(others) == 3
    assert claims.values(table, noise[0], "other", "E_W", 5)[0] == pytest.approx(np.mean(others))
    own = [row["psnr"] for row in table[noise[0]] if row["tested_on"] == "gaussian"]
    assert claims.values(table, noise[0], "training", "psnr", 5)[0] == own[0]

def test_the_interval_covers_the_truth_19_times_in_20(claims):
    rng = np.random.default_rng(0)
    for n in (5, 8):
        found = [claims.verdict(rng.normal(0.0, 2.0, n))[2] for _ in range(4000)]
        wrong = sum(word != "undecided" for word in found) / 4000
        assert 0.04 < wrong < 0.06
        assert 0.4 < found.count("reproduced") / max(1, wrong * 4000) < 0.6

def test_verdicts_of_known_effects(claims):
    assert claims.verdict(np.array([1.0, 1.1, 0.9, 1.2, 0.8]))[2] == "reproduced"
    assert claims.verdict(-np.array([1.0, 1.1, 0.9, 1.2, 0.8]))[2] == "refuted"
    assert claims.verdict(np.array([1.0, 1, 1, 1, -9]))[2] == "undecided"
    assert claims.verdict(np.array([1.0, 1, 1]))[2] == "too few seeds"
    mean, half, _ = claims.verdict(np.array([1.0, 2, 3, 4, 5]))
    assert (mean, half) == pytest.approx((3, 2.776 * math.sqrt(2.5 / 5)), rel=1e-3)

def test_numbers_of_the_readme_follow_from_the_table():
    """With plain numpy: differences in unseen rain, their mean, and their interval."""
    rows = list(csv.DictReader(open(ROOT / "figures" / "runs.csv", encoding="utf-8")))

    def measured(metric, **fields):
        fields = {"net": "resnet", "size": 0, "images": "faces", "third": "any", "n": 1024,
                  "trained_on": "small", "steps": 2400, "tested_on": "unseen", **fields}
        found = {row["seed"]: float(row[metric]) for row in rows
                 if all(row[key].split("-")[0] == str(fields[key]) for key in fields)}
        return np.array([found[str(seed)] for seed in range(5)])

    wide = measured("psnr", trained_on="large") - measured("psnr", trained_on="large", n=8)
    large = measured("E_W", size=32) - measured("E_W", size=32, n=8)
    simple = [measured("E_W", images="photographs", third=third, n=64) for third in ("high", "low")]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for gain in (wide, large, simple[0] - simple[1]):
        half = 2.776 * gain.std(ddof=1) / math.sqrt(5)
        assert f"{gain.mean():.1f} ± {half:.1f}" in readme

def test_panels_differ_in_one_thing(claims):
    everything = claims.make_claims("photographs-1", 10)
    for first, second in everything.pop("advice").panels.values():
        assert second == claims.yardstick(first, "opening")
    for claim in everything.values():
        for first, second in claim.panels.values():
            a, b = asdict(first), asdict(second)
            assert sum(a[key] != b[key] for key in a) == 1
    sizes = {8: 5115, 32: 75_747}
    for channels, parameters in sizes.items():
        assert sum(p.numel() for p in derain.ResNet(channels).parameters()) == parameters

def test_thirds_by_sharpness_have_equal_numbers_and_do_not_overlap():
    images = [derain.draw_background("natural", 96, np.random.default_rng(i)) for i in range(3)]
    low, high = (derain.training_patches(images, 9, 0, third) for third in ("low", "high"))
    assert len(low) == len(high) == 9
    assert derain.sharpness(low).max() <= derain.sharpness(high).min()

# ---- runs ----------------------------------------------------------------------------------------

def program(arguments, ranks=1):
    """Run claims.py as a user would, in one process or under torchrun."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*start, ROOT / "figures" / "claims.py", *map(str, arguments)], text=True,
                          capture_output=True, timeout=100, cwd=ROOT)

def test_two_ranks_and_a_second_start_give_the_same_table(tmp_path):
    options = ("blur", "--seeds", 2, "--steps", 2, "--runs")
    with ThreadPoolExecutor() as pool:
        folders = ((*options, tmp_path / "one"), (*options, tmp_path / "two"))
        assert not any(done.returncode for done in pool.map(program, folders, (1, 2)))
    assert len({(tmp_path / name / "runs.csv").read_bytes() for name in ("one", "two")}) == 1
    (tmp_path / "one" / "runs.csv").unlink()  # as if killed before the end
    results = sorted((tmp_path / "one").glob("*.json"))
    marked = json.loads(results[0].read_text())
    marked[0]["E_W"] = 123.0
    results[0].write_text(json.dumps(marked))  # a finished run is not done again
    again = program((*options, tmp_path / "one"))
    assert again.returncode == 0 and ",123.0," in (tmp_path / "one" / "runs.csv").read_text()
    for name in ("blur.png", "claims.md"):
        assert (tmp_path / "one" / name).exists() and name in again.stdout
    assert "too few seeds" in (tmp_path / "one" / "claims.md").read_text()

def test_bad_input_is_one_line(claims, monkeypatch, capsys):
    for wrong in (["fewer"], ["few", "--seeds", "1"], ["few", "--steps", "0"], ["--colour"]):
        monkeypatch.setattr("sys.argv", ["claims.py", *wrong])
        with pytest.raises(SystemExit) as stop:
            claims.main()
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    refused = program(("few", "--backgrounds", "nowhere"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
