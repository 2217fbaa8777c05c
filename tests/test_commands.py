"""Section 9: the command line, as its users meet it."""

import csv
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import derain
from conftest import ROOT

MEASURES = ["rain_left", "damage", "E_R", "E_B", "psnr", "ssim"]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr(derain, "TEST_PATCHES", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that returns its input, as a checkpoint."""
    network = derain.build_network(derain.ResNet)
    for parameter in network.tail.parameters():
        parameter.data.zero_()
    path = tmp_path_factory.mktemp("model") / "idle.pt"
    derain.save_checkpoint(path, network, "resnet")
    return path


def draw(folder, *names):
    """Write small black images under several paths."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 14)).save(path)


def refused(done):
    return done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def table(text):
    """Return the rows of a printed table as dicts."""
    lines = [line.replace("opening ", "opening_").split() for line in text.splitlines()]
    (start,) = [i for i, line in enumerate(lines) if line[-6:] == MEASURES]
    return [dict(zip(lines[start], line)) for line in lines[start + 1 :]]


def numbers(row):
    return [float(row[name]) for name in MEASURES]


@pytest.fixture
def twice(call):
    """Run a command two times, which must write the same file; return what it printed."""

    def run(file, *command):
        made = set()
        for _ in range(2):
            done = call(*command)
            assert done.returncode == 0 and f"wrote {file}" in done.stdout
            made.add(file.read_bytes())
        assert len(made) == 1
        return done.stdout

    return run


def test_the_main_job(call, twice, photos, tmp_path):
    results = tmp_path / "deep" / "headline.csv"
    command = ("compare", "--backgrounds", photos, "--steps", 2, "--out", results.parent)
    printed = table(twice(results, *command))
    rows = list(csv.DictReader(results.open()))
    last = [row for row in rows if row["step"] == "2"]
    for row, cells in zip(last, printed[:12], strict=True):
        assert numbers(cells) == pytest.approx(numbers(row), abs=0.0051)


def test_the_main_job_runs_without_a_command(call, monkeypatch):
    def run_compare(args):
        print(args.net, args.rain, args.steps, args.seed, args.out)

    monkeypatch.setattr(derain, "run_compare", run_compare)
    assert call().stdout == "resnet small 1200 0 figures\n"


def test_help_shows_defaults_and_an_example(call):
    for verb in ("compare", "rain", "train", "vqgan", "restore", "evaluate"):
        shown = call(verb, "--help").stdout
        assert "default:" in shown and f"example: python derain.py {verb} " in shown


def test_rain_falls_on_a_photograph_at_its_own_size(twice, photos, tmp_path):
    file = tmp_path / "deep" / "x.png"
    twice(file, "rain", photos / "photo0.png", "-o", file, "--range", "large")
    rain = np.int16(Image.open(file)) - np.int16(Image.open(photos / "photo0.png"))
    assert rain.min() >= 0 and rain.max() > 50


def test_train_and_restore(call, twice, photos, tmp_path):
    file = tmp_path / "m.pt"
    command = ("train", "--backgrounds", photos, "--steps", 2, "--n", 3, "-o", file)
    printed = twice(file, *command)
    assert "2 of 2" in printed and "on 1 images" in printed  # of 6
    rows = {(row["rain"], row["output"]) for row in table(printed)}
    assert {("unseen", "opening_7"), ("unseen", "resnet"), ("large", "resnet")} < rows

    call("restore", file, photos / "photo0.png", "-o", tmp_path)
    (rainy,) = derain.load_images(photos / "photo0.png")
    (restored,) = derain.load_images(tmp_path / "photo0-restored.png")
    output = derain.predict(derain.load_checkpoint(file), rainy[None])[0]
    assert (output - restored).abs().max() < 0.51 / 255

    low = file.read_bytes()
    call(*command, "--choice", "plain")
    assert low != file.read_bytes()


def test_the_prior_from_the_command_line(call, twice, photos, tmp_path):
    vqgan, prior = tmp_path / "vqgan.pt", tmp_path / "prior.pt"
    twice(vqgan, "vqgan", "--backgrounds", photos, "--steps", 4, "-o", vqgan)
    train = ("train", "--backgrounds", photos, "--steps", 2, "--n", 4, "-o", prior, "--vqgan")
    assert table(call(*train, vqgan).stdout)[-1]["output"] == "prior"
    assert call("restore", prior, photos / "photo1.png", "-o", tmp_path).returncode == 0
    done = call(*train, prior)
    assert refused(done) and "prior.pt" in done.stderr


def test_a_colour_profile_is_kept_if_it_is_one_for_rgb(call, model, tmp_path):
    for mode, kept in (("RGB", b"profile"), ("CMYK", None)):
        Image.new(mode, (9, 9)).save(tmp_path / "a.jpg", icc_profile=b"profile")
        call("rain", tmp_path / "a.jpg", "-o", tmp_path / "b.png")
        call("restore", model, tmp_path / "a.jpg", "-o", tmp_path)
        for name in ("b.png", "a-restored.png"):
            assert Image.open(tmp_path / name).info.get("icc_profile") == kept


def test_the_good_ones_are_restored_and_the_others_named(call, model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes((photos / "photo0.png").read_bytes()[:300])
    draw(tmp_path / "folder", "1.png", "below/2.jpg", "2-restored.png", f"{250 * 'x'}.png")
    sources = (tmp_path / "broken.png", tmp_path / "folder", tmp_path / "missing.png")
    out = tmp_path / "folder" / "below"
    for _ in range(2):  # the second time, results of the first are not restored again
        done = call("restore", model, *sources, "-o", out)
        assert done.returncode == 1
        for line, name in zip(done.stderr.splitlines(), ("broken", "xxx", "missing"), strict=True):
            assert name in line
        names = {file.name for file in out.iterdir()}
        assert names == {"2.jpg", "1-restored.png", "2-restored.png"}


# ---- evaluate ------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(call, model, tmp_path):
    """Evaluate the idle network; return what was said, and the rows of the table that it wrote."""

    def run(rainy="rainy", clean="clean"):
        results = tmp_path / "new" / "results.csv"
        folders = ("--rainy", tmp_path / rainy, "--clean", tmp_path / clean)
        done = call("evaluate", model, *folders, "-o", results)
        rows = list(csv.DictReader(results.open(errors="replace"))) if results.exists() else []
        return done, rows

    return run


@pytest.mark.parametrize(
    "rainy, clean, pairs",
    [
        ("rainy", "clean", {"a/1.png": "a/1.jpg", "b/1.png": "b/1.jpg"}),
        ("rainy", "clean", {"a/x1.png": "b/x1.jpg", "a/x2.png": "x2.png", "y1.png": "a/y1.png"}),
        ("rainy", "clean", {"rain-07.png": "norain-7.png", "9_1.png": "9.png", "9_2.png": "9.png"}),
        ("rainy", "clean", {"2023-rain-1.png": "2023-clean-1.png", "2023-rain-2.png": None}),
        ("rainy", "clean", {"A_0-4-R-000.png": "A_0-4-C-000.png", "B_0-0-R-000.png": None}),
        ("data/rainy", "data", {"1.png": "c1.png", "2.png": "c2.png"}),
        ("data", "data/clean", {"r1.png": "1.png", "r2.png": "2.png"}),
    ],
)
def test_pairs(evaluate, tmp_path, rainy, clean, pairs):
    draw(tmp_path / rainy, *pairs)
    draw(tmp_path / clean, *filter(None, pairs.values()))
    done, rows = evaluate(rainy, clean)
    found = {row["rainy"]: row["clean"] for row in rows}
    for name, partner in pairs.items():
        expected = partner and str(tmp_path / clean / partner)
        assert found.get(str(tmp_path / rainy / name)) == expected
        assert (name in done.stderr) == (partner is None)
    assert done.returncode == done.stderr.count("\n") == (None in pairs.values())


@pytest.mark.parametrize("choice", [["a/274.png", "b/274.png"], ["x274.png", "y274.png"]])
def test_a_choice_between_clean_images_is_refused(evaluate, tmp_path, choice):
    draw(tmp_path / "rainy", "1.png", "274.png")
    draw(tmp_path / "clean", "1.png", *choice)
    done, rows = evaluate()
    assert refused(done) and not rows and "same name" in done.stderr
    assert all(name in done.stderr for name in choice)


def test_pairs_that_cannot_be_measured_are_named(evaluate, tmp_path):
    draw(tmp_path / "rainy", "1.png", "2.png", "3.png")
    draw(tmp_path / "clean", "1.png", "3.png")
    Image.new("RGB", (12, 13)).save(tmp_path / "clean" / "1.png")
    done, rows = evaluate()
    assert done.returncode == 1 and len(rows) == 4
    first, second = done.stderr.splitlines()
    assert "rainy/1.png" in first and "clean/1.png" in first and "rainy/2.png" in second


def test_measures_are_means_over_pairs(evaluate, call, photos, tmp_path, monkeypatch):
    """The third pair is dry.  The network has no output: this must not be taken for dry pairs."""
    monkeypatch.setattr(derain, "restore", lambda network, image: image * np.nan)
    for seed in (0, 1):
        photo = f"photo{seed}.png"
        call("rain", photos / photo, "--seed", seed, "-o", tmp_path / "rainy" / photo)
    shutil.copy(photos / "photo2.png", tmp_path / "rainy")
    done, rows = evaluate(clean=photos)
    assert done.returncode == 0 and done.stderr == ""
    assert list(rows[0]) == ["rainy", "clean", "output", *MEASURES]

    printed = table(done.stdout)
    for i, size in enumerate((1, 5, 7)):
        values = []
        for row in rows[i::4]:
            rainy, clean = [derain.load_images(row[name])[0][None] for name in ("rainy", "clean")]
            measures = derain.decoupled_evaluation(derain.opening(rainy, size), rainy, clean)
            assert numbers(row) == pytest.approx(list(measures.values()), nan_ok=True)
            values.append(numbers(row))
        mean = np.ma.masked_invalid(values).mean(0)
        assert numbers(printed[i]) == pytest.approx(mean, abs=0.0051)
    assert "no rain in" not in done.stdout.replace(f"no rain in {tmp_path}/rainy/photo2.png", "")
    for told in ("rainy: psnr is a mean over 2 of 3", "idle.pt: damage is a mean over 0 of 3"):
        assert told in done.stdout


# ---- what goes wrong -----------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(call, model, photos, tmp_path):
    photo = photos / "photo0.png"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "huge.ppm").write_text("P6 100000001 1 255 ")
    (tmp_path / "link").symlink_to(photos)
    os.mkfifo(tmp_path / "pipe.pt")
    Image.new("RGB", (16384, 1)).save(tmp_path / "long.png")
    draw(tmp_path / "outer" / "inner", "1.png", "a/1.jpg")
    (tmp_path / "many").mkdir()
    for i in range(2500):
        (tmp_path / "many" / f"{i}.png").touch()
    for command, reason in (
        ("compare --out {0} --backgrounds {0}/nowhere", "nowhere"),
        ("compare --out {0} --backgrounds {photo}", "one photograph"),
        ("rain {photo} -o {0}/out.txt", "out.txt"),
        ("rain {photo} -o {0}/text.png/out.png", "text.png"),
        ("rain {0}/huge.ppm -o {0}/out.png", "100 megapixels"),
        ("rain {0}/long.png -o {0}/out.webp", "16383"),
        ("train -o {0}/pipe.pt", "folder or device"),
        ("train -o {0}/out.pt --backgrounds {0}/many", "2,500"),
        ("train -o {0}/out.pt --backgrounds {photos} --n 1000000", "memory"),
        ("train -o {0}/out.pt --backgrounds {photos} --n 513 --choice plain", "512"),
        ("restore {0}/text.png {photo} -o {0}", "text.png"),
        ("restore {model} {0}/outer -o {0}/out.put", "would both become"),
        ("evaluate {model} --rainy {0}/nowhere --clean {photos}", "nowhere"),
        ("evaluate {model} --rainy {photos} --clean {0}/link", "give two"),
        ("evaluate {model} --rainy {0}/outer --clean {0}/outer/inner", "give two"),
    ):
        places = {"photo": photo, "photos": photos, "model": model}
        done = call(*command.format(tmp_path, **places).split())
        assert refused(done) and reason in done.stderr, command
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    "options",
    [
        "--seed 1",
        "compare --few 0",
        "train --n 0",
        "x",
        "--",
    ],
)
def test_wrong_options_are_two_lines_and_status_2(call, options):
    done = call(*options.split())
    usage, problem = done.stderr.splitlines()
    assert done.returncode == 2 and usage.startswith("usage: derain.py ") and "error" in problem


def test_a_full_disk_leaves_what_was_there(call, photos, tmp_path):
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))  # no file may be longer
    try:
        done = call("rain", photos / "photo0.png", "-o", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert refused(done) and "x.png cannot be written" in done.stderr
    assert os.listdir(tmp_path) == ["x.png"] and target.read_bytes() == b"old"


def test_a_notebook_or_a_closed_stdout(monkeypatch, photos, tmp_path):
    for stdout in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert derain.main(["rain", str(photos / "photo0.png"), "-o", str(tmp_path / "a.png")]) == 0


def test_processes(photos, tmp_path):
    """What is printed reaches a pipe; if nobody reads it, or at Ctrl-C, one line says so."""

    def start(command):
        return subprocess.Popen(
            [sys.executable, "-OO", ROOT / "derain.py", *command.split()],
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    read = start(f"rain {photos}/photo0.png -o {tmp_path}/a.png")
    unread = start(f"rain {photos}/photo0.png -o {tmp_path}/b.png")
    unread.stdout.close()
    job = start(f"compare --backgrounds {photos} --steps 4000 --out {tmp_path}/new")
    while not (tmp_path / "new").exists():  # until the imports are done
        time.sleep(0.1)
    time.sleep(1)
    begun = time.monotonic()
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate()
    assert time.monotonic() - begun < 5
    assert job.returncode == 130 and errors.count("\n") == 1
    assert read.communicate() == (f"wrote {tmp_path}/a.png\n", "")
    assert unread.stderr.read().count("\n") == 1 and unread.wait() == 2
