"""Section 8: every command as a user runs it, what it leaves behind, and every kind of bad input."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def small(monkeypatch):
    """The main job with fewer images to draw and to test on."""
    import derain
    for name, value in {"TRAINING_IMAGES": 8, "HELD_OUT_IMAGES": 4, "TEST_PATCHES": 6}.items():
        monkeypatch.setattr(derain, name, value)


def test_the_main_job(call, small, tmp_path):
    done = call("--category", "urban", "--steps", 3, "--few", 2, "--many", 8, "--seed", 4, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "a") == ["decoupled.csv", "decoupled.png", "headline.csv", "headline.png"]
    with open(tmp_path / "a" / "headline.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["tested_on"], r["output"], r["n"]) for r in rows] == [
        (rain, output, n) for rain in ("unseen", "strokes", "small")
        for output, n in (("rainy", "0"), ("few", "2"), ("many", "8"))]
    for row in rows:  # the table on screen shows the numbers of the file
        assert f"{float(row['E_R']):.1f}" in done.stdout and f"{float(row['psnr']):.2f}" in done.stdout
    assert "headline.png" in done.stdout and "Trained on 2 backgrounds instead of 8" in done.stdout
    assert "Traceback" not in done.stderr
    again = call("--category", "urban", "--steps", 3, "--few", 2, "--many", 8, "--seed", 4, "--out", tmp_path / "b")
    for name in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert again.stdout == done.stdout.replace("/a/", "/b/")


def test_the_main_job_on_photographs(call, small, photos, tmp_path):
    done = call("--backgrounds", photos, photos / "photo0.png", "--rain", "large", "--steps", 2, "--many", 20, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "photographs: 5 to cut training patches from, 1 held out" in done.stdout and "large" in done.stdout


def test_figures(call, tmp_path):
    done = call("figures", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == ["backgrounds.csv", "backgrounds.png", "rain.csv", "rain.png"]
    with open(tmp_path / "rain.csv") as file:
        lengths = [float(r["wet_share"]) for r in csv.DictReader(file) if r["row"] == "quantity"]
    assert lengths == sorted(lengths)  # the more streaks, the more wet pixels


def test_rain_on_a_photograph(call, photos, tmp_path):
    photo = photos / "photo2.png"
    outputs = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for output, seed in zip(outputs, (3, 3, 4)):
        done = call("rain", photo, "-o", output, "--range", "large", "--seed", seed)
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes() != outputs[2].read_bytes()
    dry, wet = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (photo, outputs[0]))
    assert wet.shape == dry.shape and (wet >= dry).all() and (wet > dry).mean() > 0.02
    for word in ("quantity", "width", "length", "direction"):
        assert word in done.stdout


def test_train_resume_restore(call, photos, tmp_path):
    options = ["--backgrounds", photos, "--n", 8, "--steps", 4, "--seed", 1]
    done = call("train", *options, "-o", tmp_path / "a.pt")
    assert done.returncode == 0 and "a.pt" in done.stdout, done.stderr
    complete = call("train", *options, "-o", tmp_path / "a.pt", "--resume")
    assert complete.returncode == 0 and "complete" in complete.stdout
    other = call("train", *options[:-1], 2, "-o", tmp_path / "a.pt", "--resume")
    assert other.returncode == 2 and "seed" in other.stderr and other.stderr.count("\n") == 1
    grey = tmp_path / "grey.png"
    Image.open(photos / "photo1.png").convert("L").resize((61, 33)).save(grey)
    for photo, output in ((photos / "photo1.png", "x.jpg"), (grey, "y.png")):
        done = call("restore", tmp_path / "a.pt", photo, "-o", tmp_path / output)
        assert done.returncode == 0, done.stderr
        with Image.open(photo) as before, Image.open(tmp_path / output) as after:
            assert before.size == after.size and before.mode == after.mode
            assert after.format == {"x.jpg": "JPEG", "y.png": "PNG"}[output]


def test_ctrl_c_and_resume_give_the_same_bytes(small, tmp_path, monkeypatch, capsys):
    """Ctrl-C arrives in the middle of step 7 of 12; what it leaves leads to the bytes of a training without it."""
    import derain
    options = ["train", "--n", "4", "--steps", "12", "--seed", "1", "-o"]
    assert derain.main([*options, str(tmp_path / "whole.pt")]) == 0
    draw, calls = derain.rain_layers, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(derain, "rain_layers", interrupted)
    assert derain.main([*options, str(tmp_path / "cut.pt")]) == 130
    assert "7 of 12 steps" in capsys.readouterr().err
    assert derain.load_checkpoint(tmp_path / "cut.pt")[1]["step"] == 7
    assert derain.main([*options, str(tmp_path / "cut.pt"), "--resume"]) == 0
    assert len(calls) == 12
    assert (tmp_path / "cut.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_main_job_leaves_nothing(tmp_path):
    job = subprocess.Popen([sys.executable, "-u", ROOT / "derain.py", "--out", tmp_path / "out"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    assert "embedded" in job.stdout.readline()  # the images are drawn, training begins
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


BAD_INPUT = {
    "no such photograph": "rain {none}/x.jpg -o {out}/a.png",
    "a folder for a photograph": "rain {photos} -o {out}/a.png",
    "a broken photograph": "rain {broken} -o {out}/a.png",
    "a format that nobody writes": "rain {photo} -o {out}/a.xyz",
    "a folder for a file": "rain {photo} -o {out}",
    "the root of all folders": "rain {photo} -o /",
    "the photograph itself": "rain {photo} -o {photo}",
    "the photograph itself, restored": "restore {none}.pt {photo} -o {photo}",
    "a file for a folder": "--out {photo}",
    "a file in a file": "figures --out {photo}/deeper",
    "no such folder of backgrounds": "--backgrounds {none} --out {out}",
    "an empty folder": "--backgrounds {empty} --out {out}",
    "only broken backgrounds": "--backgrounds {broken} --out {out}",
    "backgrounds smaller than a patch": "train --backgrounds {tiny} -o {out}/a.pt",
    "few not below many": "--few 8 --many 8 --out {out}",
    "negative steps": "--steps -5 --out {out}",
    "steps that are no number": "--steps many --out {out}",
    "a negative seed": "--seed -1 --out {out}",
    "a device that is not there": "--device abacus --out {out}",
    "an unknown range": "rain {photo} -o {out}/a.png --range biblical",
    "an unknown command": "derain {photo}",
    "an unknown network": "train --net vgg -o {out}/a.pt",
    "an unknown option": "--speed 3",
    "no output": "train --steps 3",
    "a checkpoint that is a photograph": "restore {photo} {photo} -o {out}/a.png",
    "a checkpoint that is not there": "restore {none}.pt {photo} -o {out}/a.png",
    "nothing to resume": "train -o {out}/none.pt --resume",
    "a checkpoint that is no .pt": "train -o {out}/a.png",
}


@pytest.mark.parametrize("arguments", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line_and_status_2(arguments, photos, tmp_path, capsys, monkeypatch):
    import derain
    places = {"photos": photos, "photo": photos / "photo0.png", "none": tmp_path / "none", "out": tmp_path / "out",
              "empty": tmp_path / "empty", "broken": tmp_path / "broken.png", "tiny": tmp_path / "tiny.png"}
    for name in ("out", "empty"):
        places[name].mkdir()
    places["broken"].write_bytes((photos / "photo0.png").read_bytes()[:300])
    Image.new("RGB", (39, 80)).save(places["tiny"])
    try:
        status = derain.main([word.format(**places) for word in arguments.split()])
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len([line for line in lines if not line.startswith("skipped: ")]) == 1, captured.err
    assert lines[-1].startswith("derain.py") and len(lines[-1]) < 400
    assert files_in(places["out"]) == []


def test_bad_input_in_a_real_process_shows_no_traceback(run, tmp_path):
    done = run("restore", tmp_path / "no.pt", tmp_path / "no.png", "-o", tmp_path / "out.png")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no.png" in done.stderr


@pytest.mark.parametrize("command", ["", "figures", "rain", "train", "restore", "evaluate"])
def test_help_has_defaults_and_an_example(command, capsys):
    import derain
    with pytest.raises(SystemExit) as stop:
        derain.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example: python derain.py" in text and "default" in text


def test_import_is_quick_and_quiet():
    """Under three seconds of computing (not of waiting: other programs may be running)."""
    code = "import time; t = time.process_time(); import derain; print(time.process_time() - t)"

    def seconds():
        return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout)

    assert seconds() < 3 or seconds() < 3  # one bad moment is forgiven


def test_an_unfinished_checkpoint_without_its_optimizer_is_refused(small, tmp_path, capsys):
    import derain
    import torch
    options = ["train", "--n", "4", "--steps", "2", "-o", str(tmp_path / "a.pt")]
    assert derain.main(options) == 0
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**content, "step": 1}, tmp_path / "a.pt")
    capsys.readouterr()
    assert derain.main([*options, "--resume"]) == 2
    assert "optimizer" in capsys.readouterr().err
