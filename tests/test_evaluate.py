"""`evaluate --pairs` and `restore` of folders: pairs in every layout, the numbers, what fails and what goes on."""

import csv
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import derain
from conftest import ROOT
from test_evaluation import loop_ssim

LAYOUTS = {  # rainy file: its clean file; "" if it has none
    "input and target": {"input/1.png": "target/1.png", "input/2.png": "target/2.png"},
    "other suffixes": {"input/a.png": "target/a.jpg", "input/b.JPG": "target/B.png"},
    "versions with the same name": {"input/901_1.jpg": "target/901_1.jpg", "input/901_2.jpg": "target/901_2.jpg"},
    "rainy beside norain": {"rainy/rain-001.png": "norain-001.png", "rainy/rain-002.png": "norain-002.png"},
    "norain in rain": {"rain/norain-1.png": "norain-1.png", "rain/norain-2.png": "norain-2.png"},
    "rain and norain": {"rain/norain-1.png": "norain/norain-1.png", "rain/norain-2.png": "norain/norain-2.png"},
    "one folder, two words": {"rain-1.png": "norain-1.png", "RAIN-2.PNG": "NoRain-2.png"},
    "versions": {"rainy_image/901_1.jpg": "ground_truth/901.jpg", "rainy_image/901_14.jpg": "ground_truth/901.jpg"},
    "versions beside": {"901_1.jpg": "901.jpg", "901_2.jpg": "901.jpg", "902_1.jpg": "902.jpg"},
    "cases": {"INPUT/A.PNG": "Target/a.png", "rainy/RAIN-7.png": "NORAIN-7.PNG"},
    "nested": {"Rain100L/input/1.png": "Rain100L/target/1.png", "Rain100H/rainy/rain-1.png": "Rain100H/norain-1.png",
               "Rain1400/test/rainy_image/1_1.jpg": "Rain1400/test/ground_truth/1.jpg", "plain/3_1.jpg": "plain/3.jpg"},
    "roles above": {"input/A/1.png": "target/A/1.png", "input/B/1.png": "target/B/1.png", "lq/2.png": "GT/2.png"},
    "the same name first": {"input/1.jpg": "target/1.jpg", "input/1.png": "target/1.png", "input/2.png": "target/2.png",
                            "input/2_1.png": "", "input/clean.png": "target/clean.png", "input/rain.png": "target/rain.png"},
    "who is meant": {"input/1.jpg": "", "input/1.png": "", "target/1.bmp": "", "rain-2.png": "norain-2.png"},
    "no partner": {"input/1.png": "target/1.png", "input/2.png": "", "rainy/rain-9.png": ""},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pairs_of_every_layout(layout, tmp_path):
    folder = tmp_path / "rain"  # its own name must not count
    for name in {*layout, *layout.values(), "lonely/target/5.png", "notes.txt", "input/.hidden.png"} - {""}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "x.png").mkdir()  # no image
    pairs, alone = derain.pair_files(folder)
    assert {str(a.relative_to(folder)): str(b.relative_to(folder)) for a, b in pairs} == {a: b for a, b in layout.items() if b}
    assert sorted(str(f.relative_to(folder)) for f in alone) == sorted(["lonely/target/5.png", *(a for a, b in layout.items() if not b)])


def test_a_second_clean_image_of_one_name_is_named(tmp_path):
    for name in ("rain/norain-1.png", "norain/norain-1.png", "norain-1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    pairs, alone = derain.pair_files(tmp_path)
    assert len(pairs) == len(alone) == 1 and alone[0] not in pairs[0]


def loop_luma(image):
    """Y of BT.601 from 8-bit levels, a pixel at a time: (h, w, 3) in 0..255 to (h, w) in 0..1."""
    y = np.zeros(image.shape[:2])
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            r, g, b = (float(v) / 255 for v in image[row, column])
            y[row, column] = (16 + 65.481 * r + 128.553 * g + 24.966 * b) / 255
    return y


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two pairs of 20x17 pixels and two models that were hardly trained: the folder, the models."""
    folder, draw = tmp_path_factory.mktemp("bench"), np.random.default_rng(3)
    (folder / "pairs" / "rainy").mkdir(parents=True)
    for i in (1, 2):
        clean = draw.integers(0, 200, (17, 20, 3), dtype=np.uint8)
        rain = draw.integers(5, 56, (17, 20, 1), dtype=np.uint8) * (draw.random((17, 20, 1)) < 0.3)
        Image.fromarray(clean).save(folder / "pairs" / f"norain-{i}.png")
        Image.fromarray((clean + rain).astype(np.uint8)).save(folder / "pairs" / "rainy" / f"rain-{i}.png")
    models = folder / "one.pt", folder / "two.pt"
    for seed, model in enumerate(models):
        config = {"net": "resnet", "arguments": {"channels": 4, "blocks": 1}, "steps": 1}
        derain.save_checkpoint(model, derain.build_network("resnet", seed, channels=4, blocks=1), config, 1)
    return folder / "pairs", models


def test_numbers_of_a_pair_against_loops(call, bench, tmp_path):
    pairs, models = bench
    done = call("evaluate", *models, "--pairs", pairs, "--csv", tmp_path / "t.csv", "--save", tmp_path / "kept")
    assert done.returncode == 0 and done.stderr == ""
    with open(tmp_path / "t.csv") as file:
        rows = list(csv.DictReader(file))
    files = ["rainy/rain-1.png", "rainy/rain-2.png", "mean of 2"]
    assert [(r["file"], r["output"]) for r in rows] == [(f, o) for f in files for o in ("rainy input", "one", "two")]
    numbers = [key for key in rows[0] if key not in ("file", "output")]
    assert set(numbers) == {"E_R", "E_R_ideal", "E_B", "psnr", "ssim", "psnr_y", "ssim_y"}
    for row in rows:
        assert all(f"{float(row[key]):.1f}" in done.stdout for key in ("E_R", "E_R_ideal", "E_B"))
        if row["file"] == "mean of 2":
            for key in numbers:
                assert float(row[key]) == pytest.approx(np.mean([float(r[key]) for r in rows if r is not row
                                                                and r["output"] == row["output"]]), rel=1e-4)
            continue
        rainy = np.asarray(Image.open(pairs / row["file"]))
        clean = np.asarray(Image.open(pairs / row["file"].replace("rainy/", "no")))
        kept = tmp_path / "kept" / row["output"] / row["file"]
        output = np.asarray(Image.open(kept)) if kept.exists() else rainy
        assert kept.exists() == (row["output"] != "rainy input")
        o, r, c = (a.astype(float) for a in (output, rainy, clean))
        wet = (r - c).max(2) > 4  # in grey levels; saved outputs are rounded to them, hence the tolerance
        expected = {"E_R": np.sqrt(((o - r)[wet] ** 2).mean()), "E_B": np.sqrt(((o - c)[~wet] ** 2).mean()),
                    "E_R_ideal": np.sqrt(((c - r)[wet] ** 2).mean()),
                    "psnr": 20 * math.log10(255 / np.sqrt(((o - c) ** 2).mean()))}
        y, clean_y = loop_luma(output), loop_luma(clean)
        expected["psnr_y"] = -10 * math.log10(((y - clean_y) ** 2).mean())
        expected["ssim_y"] = loop_ssim(y, clean_y)
        for key, value in expected.items():
            assert float(row[key]) == pytest.approx(value, rel=2e-3, abs=0.02), (row, key)
        if row["output"] == "rainy input":
            assert float(row["E_R"]) == 0 and float(row["psnr_y"]) == pytest.approx(expected["psnr_y"], abs=1e-4)
            assert float(row["ssim_y"]) == pytest.approx(expected["ssim_y"], abs=1e-5)


def test_only_what_is_brighter_is_rain():
    """In closed form: 20 levels brighter on the left, darker on the right."""
    clean = torch.full((1, 3, 12, 12), 100 / 255)
    rainy = clean.clone()
    rainy[..., :6] += 20 / 255
    rainy[..., 6:] -= 20 / 255
    measured = derain.evaluate_pair(clean, rainy, clean)
    assert measured["E_R"] == measured["E_R_ideal"] == pytest.approx(20, rel=1e-5) and measured["E_B"] == 0
    assert derain.evaluate_pair(rainy, rainy, clean)["E_B"] == pytest.approx(20, rel=1e-5)


def test_four_levels_of_rain_are_four_levels_on_any_background():
    """In float32 the difference of two grey levels depends on the levels; the mask must not."""
    clean = torch.arange(200, dtype=torch.float32).expand(1, 3, 200, 200).contiguous()
    rain = torch.where(torch.arange(200)[:, None] % 2 == 0, 4.0, 44.0).expand(200, 200)
    measured = derain.evaluate_pair(clean / 255, (clean + rain) / 255, clean / 255)
    assert measured["E_R_ideal"] == pytest.approx(44, rel=1e-5) and measured["E_B"] == 0


def test_outputs_are_kept_apart_from_one_another_and_from_the_pairs(call, bench, tmp_path):
    pairs, (model, _) = bench
    folder = tmp_path / "pairs"
    for part in ("input", "target"):
        (folder / part).mkdir(parents=True)
        for name in ("1.png", "1.jpg", "2.jpg"):
            Image.open(pairs / "rainy" / "rain-1.png").save(folder / part / name)
    done = call("evaluate", model, "--pairs", folder, "--save", tmp_path / "kept")
    assert done.returncode == 0 and "mean of 3" in done.stdout
    assert sorted(f.name for f in (tmp_path / "kept").rglob("*.png")) == ["1.jpg.png", "1.png.png", "2.png"]
    (tmp_path / "one").mkdir()
    folder.rename(tmp_path / "one" / "one")  # called as the model: its outputs would lie among the pairs
    for save in (tmp_path / "one", tmp_path / "one" / "one" / "deeper"):
        done = call("evaluate", model, "--pairs", tmp_path / "one" / "one", "--save", save)
        assert done.returncode == 2 and "another folder" in done.stderr and done.stderr.count("\n") == 1


def test_names_that_are_no_text_and_readers_who_leave(run, bench, tmp_path):
    pairs, (model, _) = bench
    for part, name in ((b"input", "rainy/rain-1.png"), (b"target", "norain-1.png")):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"p", part))
        shutil.copy(pairs / name, os.path.join(os.fsencode(tmp_path), b"p", part, b"b\xff.png"))
    done = run("evaluate", model, "--pairs", tmp_path / "p", "--csv", tmp_path / "t.csv", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "mean of 1" in done.stdout, done.stderr
    assert b"input/b\xff.png" in (tmp_path / "t.csv").read_bytes()
    job = subprocess.Popen([sys.executable, ROOT / "derain.py", "evaluate", model, "--pairs", pairs], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.close()
    assert job.wait() == -signal.SIGPIPE and job.stderr.read() == ""  # as other programs end, and not with 0


def test_what_fails_is_named_and_the_rest_goes_on(call, bench, tmp_path):
    pairs, (model, _) = bench
    folder = tmp_path / "pairs"
    for part in ("input", "target"):
        (folder / part).mkdir(parents=True)
        for name, size in (("good", (12, 12)), ("sizes", (12, 12 + (part == "input"))), ("tiny", (1, 3))):
            Image.new("RGB", size, "grey").save(folder / part / f"{name}.png")
    (folder / "input" / "alone.png").write_bytes(b"")
    for part in ("input", "target"):
        (folder / part / "text.jpg").write_text("no image")
    done = call("evaluate", model, "--pairs", folder)
    assert done.returncode == 1 and "mean of 2" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("failed: ") for line in lines)
    assert "alone.png has no partner" in lines[0] and "12x13" in lines[1] and "12x12" in lines[1] and "text.jpg" in lines[2]
    for part in ("input", "target"):
        for name in ("sizes.png", "text.jpg"):
            (folder / part / name).unlink()
    assert call("evaluate", model, "--pairs", folder).returncode == 1  # for the one without a partner
    for name in ("good", "tiny"):
        (folder / "target" / f"{name}.png").write_bytes(b"")
    done = call("evaluate", model, "--pairs", folder, "--csv", tmp_path / "t.csv")
    assert done.returncode == 2 and not (tmp_path / "t.csv").exists()
    for arguments, word in (((model, "--pairs", tmp_path / "none"), "no such folder"), ((model, model, "--pairs", pairs), "two models are called"),
                            ((model, "--pairs", pairs, "--csv", tmp_path / "t.txt"), ".csv")):
        done = call("evaluate", *arguments)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_ctrl_c_leaves_the_pairs_that_were_measured(call, bench, tmp_path, monkeypatch):
    pairs, (model, _) = bench
    measure, calls = derain.evaluate_pair, []

    def interrupted(*images):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*images)

    monkeypatch.setattr(derain, "evaluate_pair", interrupted)
    done = call("evaluate", model, "--pairs", pairs, "--csv", tmp_path / "t.csv")
    assert done.returncode == 130 and "1 of 2 were done" in done.stderr
    assert "mean of 1" in (tmp_path / "t.csv").read_text()


def test_restore_of_a_folder_goes_on_where_it_stopped(call, bench, tmp_path):
    pairs, (model, _) = bench
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/a.png"):
        Image.open(pairs / "rainy" / "rain-1.png").save(photos / name)
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    out = photos / "out"  # within the folder that it is made from
    done = call("restore", model, photos, "-o", out)
    assert done.returncode == 1 and "3 photographs restored" in done.stdout
    assert done.stderr.count("\n") == 1 and "broken.png" in done.stderr
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*.*")) == ["a.png", "b.jpg", "deep/a.png"]
    assert call("restore", model, photos / "a.png", "-o", tmp_path / "one.png").returncode == 0
    assert (tmp_path / "one.png").read_bytes() == (out / "a.png").read_bytes()
    (out / "a.png").write_bytes(b"mine")
    (out / "b.jpg").unlink()
    (photos / "broken.png").unlink()
    done = call("restore", model, photos, "-o", out)
    assert done.returncode == 0 and "1 photographs restored" in done.stdout and "2 there already" in done.stdout
    assert (out / "a.png").read_bytes() == b"mine" and (out / "b.jpg").exists()
    done = call("restore", model, photos, "-o", photos)
    assert done.returncode == 2 and "another folder" in done.stderr
    done = call("restore", model, tmp_path / "none", "-o", out)
    assert done.returncode == 2 and "no such photograph or folder" in done.stderr
    done = call("restore", model, photos, "-o", photos / "a.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for file in [f for f in photos.rglob("*.*") if f.is_file()]:
        file.write_text("no image")
    assert call("restore", model, photos, "-o", tmp_path / "none").returncode == 2


def test_compare_shows_both(call, bench, tmp_path):
    pairs, (model, _) = bench
    photo = pairs / "rainy" / "rain-1.png"
    assert call("restore", model, photo, "-o", tmp_path / "alone.png").returncode == 0
    assert call("restore", model, photo, "-o", tmp_path / "both.png", "--compare").returncode == 0
    both, alone, before = (np.asarray(Image.open(p)) for p in (tmp_path / "both.png", tmp_path / "alone.png", photo))
    assert np.array_equal(both, np.concatenate([before, alone], axis=1))


def test_train_has_the_recommended_recipe_and_the_main_job_its_own():
    parse = derain.make_parser().parse_args
    train = parse(["train", "-o", "a.pt"])
    assert (train.rain, train.sharpness, train.n) == ("large", "low", 64) and parse([]).rain == "small"


def test_simple_backgrounds_are_the_least_sharp(call, photos, tmp_path, monkeypatch):
    taken = {}
    for third in ("any", "low", "high"):
        monkeypatch.setattr(derain, "train", lambda network, patches, *_, **__: taken.update({third: patches}) or [])
        assert call("train", "--backgrounds", photos, "--n", 6, "--sharpness", third, "-o", tmp_path / "a.pt").returncode == 0
    assert all(len(patches) == 6 for patches in taken.values())
    low, some, high = (derain.sharpness(taken[third]).mean() for third in ("low", "any", "high"))
    assert low < some < high
