"""Section 7's grid: is a verdict what the numbers say, and does a grid survive whatever happens to it?"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import derain
from conftest import ROOT

GRID = ("reproduce", "sharp", "--quick", "--steps", "2")  # 2 seeds of 2 trainings


@pytest.mark.parametrize("effects, expected", (
    ([1, 2, 0.1], "reproduced"), ([-1, -2], "refuted"), ([1, -1], "undecided"), ([1, 0], "undecided"),
    ([0, 0], "undecided"), ([1, float("nan")], "undecided"), ([float("nan")], "undecided")))
def test_verdict_needs_every_seed(effects, expected):
    assert derain.verdict(effects) == expected


def by_hand(folder: Path, run: derain.Run, values: dict[str, list[float]]):
    """Write results as a grid would: for each kind of test a number a seed."""
    for seed in range(len(next(iter(values.values())))):
        rows = [{"tested_on": tested, "E_R": numbers[seed], "E_R_ideal": 50, "E_B": 3 * numbers[seed], "psnr": 1} for tested, numbers in values.items()]
        dataclasses.replace(run, seed=seed).file(folder).write_text(json.dumps(rows))


def test_verdict_table_of_hand_made_results(tmp_path):
    few, many, other = derain.Run(n=8), derain.Run(n=1024), derain.Run(n=8, net="unet")
    by_hand(tmp_path, few, {"unseen": [5, 6, 7, 8, 9]})
    by_hand(tmp_path, many, {"unseen": [1, 2, 3, 4, 5]})  # always 4 less
    by_hand(tmp_path, other, {"unseen": [0, 3, 2, 6, 4]})  # less many: -1, 1, -1, 2, -1
    claim = derain.Claim("a statement", {"one": [few, many], "two": [other, many]}, "n", {8: 1, 1024: -1}, "E_R")
    rows = {row["panel"]: row for row in derain.verdict_rows("name", claim, 5, tmp_path)}
    assert list(rows) == ["every panel", "one", "two"]
    assert rows["one"]["effect"] == 4 and rows["one"]["spread"] == 0
    assert (rows["one"]["agree"], rows["one"]["verdict"]) == (5, "reproduced")
    assert rows["two"]["effect"] == 0 and rows["two"]["spread"] == pytest.approx(np.std([-1, 1, -1, 2, -1], ddof=1))
    assert (rows["two"]["agree"], rows["two"]["verdict"]) == (2, "undecided")
    assert rows["one"]["E_B"] == 12 and rows["one"]["psnr"] == 0  # the price beside it
    assert rows["every panel"]["spread"] == pytest.approx(np.std([1.5, 2.5, 1.5, 3, 1.5], ddof=1))  # of the panels' means
    assert rows["every panel"]["effect"] == 2 and (rows["every panel"]["agree"], rows["every panel"]["verdict"]) == (2, "undecided")
    backwards = dataclasses.replace(claim, panels={"one": [few, many]}, effect={8: -1, 1024: 1})
    assert derain.verdict_rows("name", backwards, 5, tmp_path)[0]["verdict"] == "refuted"
    assert derain.verdict_rows("name", claim, 2, tmp_path)[1]["verdict"] == "too few seeds"  # though both agree


def test_which_rows_a_claim_reads(tmp_path):
    run = derain.Run(n=8, trained_on="gaussian")
    by_hand(tmp_path, run, {"gaussian": [1], "uniform": [10], "poisson": [20]})
    assert derain.results([run], "training", "E_R", 1, tmp_path) == [[1]]
    assert derain.results([run], "other noise", "E_R", 1, tmp_path) == [[15]]
    assert derain.results([run], "uniform", "removed", 1, tmp_path) == [[20]]  # % of the ideal, 50


def test_a_result_is_named_by_everything_that_it_depends_on():
    run = derain.Run(n=8)
    changed = {"n": 9, "net": "unet", "arguments": (("channels", 8),), "images": "urban", "sharpness": "low",
               "trained_on": "large", "steps": 7, "seed": 1, "device": "cuda"}
    assert set(changed) == {field.name for field in dataclasses.fields(run)}
    files = {dataclasses.replace(run, **{key: value}).file(Path()) for key, value in changed.items()}
    assert len(files | {run.file(Path())}) == len(changed) + 1


def test_claims_compare_like_with_like():
    for name, claim in derain.CLAIMS.items():
        for runs in claim.panels.values():
            compared = [claim.effect.get(getattr(run, claim.x), 0) for run in runs]
            assert sum(compared) == 0 and any(compared), name
            assert len({dataclasses.replace(run, **{claim.x: None}) for run in runs}) == 1, name
    assert derain.SEEDS >= 5
    panels = derain.CLAIMS["few"].panels.values()
    assert {run.net for runs in panels for run in runs} == {"resnet", "unet", "swinir"}
    assert {run.images for runs in panels for run in runs} == set(derain.BACKGROUNDS)


def test_thirds_by_sharpness_have_equal_numbers_and_do_not_overlap():
    images = [derain.draw_background("natural", 96, np.random.default_rng(i)) for i in range(4)]
    thirds = [derain.training_patches(derain.Run(n=10, sharpness=third), images) for third in ("low", "middle", "high")]
    assert [len(third) for third in thirds] == [10, 10, 10]
    low, middle, high = (derain.sharpness(third) for third in thirds)
    assert low.max() <= middle.min() and middle.max() <= high.min() and low.mean() < 0.8 * high.mean()


def test_few_backgrounds_are_among_the_many():
    images = [torch.rand(3, 60, 60) for _ in range(3)]
    few, many = (derain.training_patches(derain.Run(n=n), images) for n in (8, 1024))
    assert torch.equal(few, many[:8]) and len(many) == 1024


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name[0] != "."}


@pytest.fixture(scope="module")
def undisturbed(run, photos, tmp_path_factory):
    """A grid of tiny runs in one process: what it left."""
    folder = tmp_path_factory.mktemp("grid")
    done = run(*GRID, "--backgrounds", photos, "--runs", folder / "runs", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert "4 runs are missing" in done.stdout and "taste" in done.stdout
    files = content(folder)
    assert {"out/sharp.png", "out/sharp.csv", "out/verdicts-sharp.csv"} < set(files) and len(files) == 11
    return files


def test_a_killed_grid_goes_on_to_the_same_bytes(undisturbed, run, photos, tmp_path):
    command = [sys.executable, ROOT / "derain.py", *GRID, "--backgrounds", photos, "--runs", tmp_path / "runs",
               "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("runs/resnet*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = content(tmp_path / "runs")
    finished = sum(name.endswith(".json") for name in kept)
    assert 2 <= finished < 4 and not (tmp_path / "out").exists()
    done = run(*command[2:])
    assert f"{4 - finished} runs are missing" in done.stdout
    assert content(tmp_path) == undisturbed


def test_two_ranks_give_the_bytes_of_one(undisturbed, photos, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*torchrun, ROOT / "derain.py", *GRID, "--backgrounds", photos, "--runs", tmp_path / "runs",
                           "--out", tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 2  # by rank 0 alone
    assert content(tmp_path) == undisturbed


def test_nothing_is_done_twice_and_a_dry_run_does_nothing(undisturbed, call, photos, tmp_path):
    for name, data in undisturbed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    places = ("--backgrounds", photos, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "0 runs are missing" in call(*GRID, *places).stdout
    assert content(tmp_path) == undisturbed
    removed = next((tmp_path / "runs").glob("*high*seed1*"))
    removed.unlink()
    shutil.rmtree(tmp_path / "out")
    planned = call(*GRID, *places, "--dry-run")
    assert planned.returncode == 0 and removed.stem in planned.stdout and "1 of 4 runs are missing" in planned.stdout
    assert not removed.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ("one less", "other names"))
def test_other_photographs_are_other_runs(undisturbed, call, photos, tmp_path, change):
    """Other names put the same photographs in another order, and so split them otherwise."""
    for i, photo in enumerate(sorted(photos.iterdir())[:5 if change == "one less" else 6]):
        shutil.copy(photo, tmp_path / (photo.name if change == "one less" else f"{i * 5 % 6}.png"))
    planned = call(*GRID, "--backgrounds", tmp_path, "--runs", tmp_path / "runs", "--dry-run").stdout
    names = {Path(name).stem for name in undisturbed if name.startswith("runs")}
    assert len(names) == 4
    assert planned.count("photographs-") == 4 and not names & set(planned.split())


def test_claims_on_photographs_keep_their_panels_apart():
    for name, claim in derain.CLAIMS.items():
        adapted = derain.adapt(claim, "photographs-1", 1600, False, "cpu")
        assert {run.images for runs in adapted.panels.values() for run in runs} == {"photographs-1"}
        if claim.panels is derain.EVERYTHING:
            assert list(adapted.panels) == ["resnet", "unet", "swinir"]
        else:
            assert len(adapted.panels) == len(claim.panels) and not any(label.isdecimal() for label in adapted.panels)
    longer = derain.adapt(derain.CLAIMS["longer"], "photographs-1", 1600, False, "cpu")
    steps = [runs[0].steps for runs in longer.panels.values()]
    assert steps == [400, 1600, 4800, 1600, 4800]


@pytest.mark.parametrize("content", ("{", "[]", '[{"tested_on": "unseen"}]', "3"))
def test_bad_input_gets_one_line(call, tmp_path, content):
    wrong = call("reproduce", "fewer")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "few, benchmark" in wrong.stderr
    damaged = derain.Run(n=64, images="natural", sharpness="low", steps=1).file(tmp_path / "runs")
    damaged.parent.mkdir()
    for run in derain.CLAIMS["sharp"].panels["resnet, natural"]:
        dataclasses.replace(run, steps=1).file(tmp_path / "runs").write_text(content)
    bad = call("reproduce", "sharp", "--seeds", 1, "--steps", 1, "--runs", tmp_path / "runs", "--out", tmp_path)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and damaged.name in bad.stderr


@pytest.mark.parametrize("name", derain.CLAIMS)
def test_every_claim_draws_its_figure(name, tmp_path):
    """From made-up results, so that no training is needed."""
    draw = np.random.default_rng(0)
    claim = derain.adapt(derain.CLAIMS[name], None, 5, False, "cpu")
    for runs in claim.panels.values():
        for run in runs:
            for seed in range(2):
                kinds = derain.NOISE if run.trained_on in derain.NOISE else ("unseen", "strokes", run.trained_on)
                rows = [{"tested_on": kind, **dict(zip(("E_R", "E_B", "E_R_ideal", "psnr", "ssim"), draw.random(5)))}
                        for kind in kinds]
                file = dataclasses.replace(run, seed=seed).file(tmp_path)
                file.write_text(json.dumps(rows))
                Image.new("RGB", (30, 10)).save(file.with_suffix(".png"))
    drawers = {"noise": derain.figure_noise, "prior": derain.figure_prior}
    figure = drawers.get(name, derain.figure_claim)(claim, 2, tmp_path)
    figure.savefig(os.devnull, format="png")
    assert len(derain.claim_rows(claim, 2, tmp_path)) == 2 * sum(
        5 if name == "noise" else 3 for runs in claim.panels.values() for _ in runs)


def test_what_a_run_leaves_and_what_the_prior_may_know(tmp_path, monkeypatch):
    """A VQGAN for all seeds of embedded images, one a seed for photographs, whose split is the seed's."""
    embedded, photographs = derain.Run(n=8, net="prior"), derain.Run(n=8, net="prior", images="photographs-x")
    for run, files in ((embedded, 1), (photographs, 3)):
        assert len({derain.prior_file(dataclasses.replace(run, seed=seed), tmp_path) for seed in range(3)}) == files
    images = [torch.rand(3, 130, 130) for _ in range(2)]
    monkeypatch.setattr(derain, "measure", functools.partial(derain.measure, patches=(2, derain.GRID_PATCH)))
    monkeypatch.setattr(derain, "PRETRAINING_PATCHES", ((1, 40),))
    asked = []
    runs = [dataclasses.replace(embedded, seed=seed, steps=1) for seed in (1, 2)]

    def load(kind, seed):
        asked.append(seed)
        return images, images

    assert derain.do_runs(runs[:1], load, tmp_path) and asked == [0, 1]
    vqgan = derain.prior_file(runs[0], tmp_path)
    before = vqgan.read_bytes()
    assert derain.do_runs(runs[1:], load, tmp_path) and vqgan.read_bytes() == before
    with Image.open(runs[1].file(tmp_path).with_suffix(".png")) as picture:
        side = derain.GRID_PATCH
        assert picture.size == (3 * side, side)
        clean = np.asarray(picture)[:, 2 * side:] / 255
    expected = derain.sample_patches(images, 2, side, derain.stream(2, "test patches"))[0]
    assert np.abs(clean - expected.permute(1, 2, 0).numpy()).max() < 1 / 255


def test_a_second_metric_has_verdicts_of_its_own(tmp_path):
    few, many = derain.Run(n=8), derain.Run(n=1024)
    for run, numbers in ((few, [5] * 5), (many, [1] * 5)):  # psnr is 1 throughout
        by_hand(tmp_path, run, {"unseen": numbers})
    claim = derain.Claim("a statement", {"one": [few, many]}, "n", {8: 1, 1024: -1}, "E_R", also=("psnr",))
    rows = derain.verdict_rows("name", claim, 5, tmp_path)
    assert [(row["metric"], row["verdict"]) for row in rows] == [("E_R", "reproduced"), ("psnr", "undecided")]
