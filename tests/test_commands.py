"""Section 8: the command line, as its users meet it."""

import csv
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

import derain

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
    derain.save_checkpoint(path, network, "resnet", {})
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
        made = []
        for _ in range(2):
            done = call(*command)
            assert done.returncode == 0 and f"wrote {file}" in done.stdout
            made.append(file.read_bytes())
        assert made[0] == made[1]
        return done.stdout

    return run


def test_the_main_job(call, twice, photos, tmp_path):
    results = tmp_path / "deep" / "headline.csv"
    options = ("--backgrounds", photos, "--steps", 2, "--few", 2, "--many", 3, "--out")
    printed = table(twice(results, *options, results.parent))
    rows = list(csv.DictReader(results.open()))
    assert list(rows[0]) == ["step", "rain", "output", "n", *MEASURES] and len(rows) == 20
    for row, cells in zip(rows[10:], printed):
        assert row["output"].replace(" ", "_") == cells["output"]
        assert numbers(cells) == pytest.approx(numbers(row), abs=0.0051)


def test_help_shows_defaults_and_an_example(call):
    for verb in ("compare", "rain", "train", "vqgan", "restore", "evaluate"):
        done = call(verb, "--help")
        assert done.returncode == 0 and "default:" in done.stdout
        assert f"example: python derain.py {verb} ".replace(" compare", "") in done.stdout
    assert "RGB" in done.stdout


def test_rain_falls_on_a_photograph_at_its_own_size(call, twice, photos, tmp_path):
    file = tmp_path / "deep" / "x.png"
    command = ("rain", photos / "photo0.png", "-o", file, "--range", "large")
    twice(file, *command)
    rainy = np.int16(Image.open(file))
    rain = rainy - np.int16(Image.open(photos / "photo0.png"))
    assert rain.min() >= 0 and rain.max() > 50


def test_train_and_restore(call, twice, photos, tmp_path):
    file = tmp_path / "m.pt"
    options = ("--backgrounds", photos, "--steps", 2, "--n", 3, "-o", file)
    printed = twice(file, "train", *options)
    assert "2 of 2 steps" in printed and "on 1 images" in printed  # of 6
    rows = table(printed)
    assert [row["output"] for row in rows] == 2 * ["rainy", "opening_5", "opening_7", "resnet"]
    assert [row["rain"] for row in rows] == 4 * ["large"] + 4 * ["unseen"]
    assert rows[0]["rain_left"] == rows[4]["rain_left"] == "100.00"

    call("restore", file, photos / "photo0.png", "-o", tmp_path)
    (rainy,) = derain.load_images(photos / "photo0.png")
    (restored,) = derain.load_images(tmp_path / "photo0-restored.png")
    output = derain.predict(derain.load_checkpoint(file), rainy[None])[0]
    assert (output - restored).abs().max() < 0.51 / 255

    low = file.read_bytes()
    call("train", *options, "--choice", "high")
    assert file.read_bytes() != low


def test_the_prior_from_the_command_line(call, twice, photos, tmp_path):
    vqgan, prior = tmp_path / "vqgan.pt", tmp_path / "prior.pt"
    twice(vqgan, "vqgan", "--backgrounds", photos, "--steps", 4, "-o", vqgan)
    train = ("train", "--backgrounds", photos, "--steps", 2, "--n", 4, "-o", prior, "--vqgan")
    assert table(call(*train, vqgan).stdout)[-1]["output"] == "prior"
    assert call("restore", prior, photos / "photo1.png", "-o", tmp_path).returncode == 0
    done = call(*train, prior)
    assert refused(done) and "prior.pt" in done.stderr


def test_the_good_ones_are_restored_and_the_others_named(call, model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes((photos / "photo0.png").read_bytes()[:300])
    draw(tmp_path / "folder", "1.png", "below/2.jpg", "2-restored.png")
    sources = (tmp_path / "broken.png", tmp_path / "folder", tmp_path / "missing.png")
    out = tmp_path / "folder" / "below"
    for _ in range(2):  # the second time, results of the first are not restored again
        done = call("restore", model, *sources, "-o", out)
        assert done.returncode == 1 and done.stderr.count("\n") == 2
        assert "broken.png" in done.stderr and "missing.png" in done.stderr
        names = {file.name for file in out.iterdir()}
        assert names == {"2.jpg", "1-restored.png", "2-restored.png"}


def test_photographs_that_would_become_one_file_are_refused(call, model, tmp_path):
    draw(tmp_path, "0.png", "a/1.png", "b/1.jpg")
    done = call("restore", model, tmp_path, "-o", tmp_path / "out")
    assert refused(done) and "a/1.png" in done.stderr and "b/1.jpg" in done.stderr
    assert not (tmp_path / "out").exists()


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
        ("data/rainy", "data", {"1.png": "c1.png", "2.png": "c2.png"}),
        ("data", "data/clean", {"r1.png": "1.png", "r2.png": "2.png"}),
    ],
)
def test_pairs(evaluate, tmp_path, rainy, clean, pairs):
    draw(tmp_path / rainy, *pairs)
    draw(tmp_path / clean, *pairs.values())
    done, rows = evaluate(rainy, clean)
    assert done.returncode == 0
    found = {row["rainy"]: row["clean"] for row in rows}
    assert found == {str(tmp_path / rainy / a): str(tmp_path / clean / b) for a, b in pairs.items()}


@pytest.mark.parametrize("choice", [["274-14_0_3.png", "274_0_3.png"], ["a/274.png", "b/274.png"]])
def test_a_choice_between_clean_images_is_refused(evaluate, tmp_path, choice):
    draw(tmp_path / "rainy", "1.png", "274.png")
    draw(tmp_path / "clean", "1.png", *choice)
    done, rows = evaluate()
    assert refused(done) and not rows and "same name" in done.stderr
    assert all(name in done.stderr for name in choice) and done.stdout == ""


def test_pairs_that_cannot_be_measured_are_named(evaluate, tmp_path):
    draw(tmp_path / "rainy", "1.png", "2.png", "3.png")
    draw(tmp_path / "clean", "1.png", "3.png")
    Image.new("RGB", (12, 13)).save(tmp_path / "clean" / "1.png")
    done, rows = evaluate()
    assert done.returncode == 1 and len(rows) == 4
    first, second = done.stderr.splitlines()
    assert "rainy/1.png" in first and "clean/1.png" in first and "rainy/2.png" in second


def measured(pairs):
    """Return rain_left, damage, E_R and E_B over the pixels of all (output, rainy, clean)."""
    d = np.concatenate([output - clean for output, _, clean in pairs])
    r = np.concatenate([rainy - clean for _, rainy, clean in pairs])
    pattern = np.concatenate([rainy - clean - np.mean(rainy - clean) for _, rainy, clean in pairs])
    wet = np.abs(r).max(1) > 4.01
    slope = np.sum(pattern * d) / np.sum(pattern**2)
    parts = (d - slope * r, (d - r)[wet], d[~wet])
    return [100 * slope, *(np.mean(part**2) ** 0.5 for part in parts)]


def test_measures_are_pooled_over_all_pairs(evaluate, tmp_path, rng):
    """The third pair is dry: rainy and clean are equal, and so is what the idle network returns."""
    pictures = []
    for i, (height, width) in enumerate([(30, 24), (12, 41), (20, 16)]):
        clean = rng.integers(0, 200, (height, width, 3), np.uint8)
        rain = 50 * (rng.random((height, width, 1)) < 0.2) * (i < 2)
        pair = [Image.fromarray(np.uint8(image)) for image in (clean + rain, clean)]
        for picture, folder in zip(pair, ("rainy", "clean")):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{i}.png")
        pictures.append(pair)
    done, rows = evaluate()
    assert done.returncode == 0 and done.stderr == "" and "rainy/2.png" in done.stdout
    assert "rainy: 1 infinite" in done.stdout and "idle.pt: 1 infinite" in done.stdout

    for cells, size in zip(table(done.stdout), (1, 5, 7, 1)):
        pairs = []
        for rainy, clean in pictures:
            smallest = rainy.filter(ImageFilter.MinFilter(size))
            shown = (smallest.filter(ImageFilter.MaxFilter(size)), rainy, clean)
            pairs.append([np.float64(picture).reshape(-1, 3) for picture in shown])
        errors = [np.mean((output - clean) ** 2) for output, _, clean in pairs]
        decibels = [20 * np.log10(255 / error**0.5) for error in errors if error]
        expected = [*measured(pairs[:2])[:3], measured(pairs)[3], np.mean(decibels)]
        assert numbers(cells)[:5] == pytest.approx(expected, abs=0.0051)

    assert list(rows[0]) == ["rainy", "clean", "output", *MEASURES]
    names = ["rainy", "opening 5", "opening 7", "idle.pt"]
    assert [row["output"] for row in rows] == 3 * names
    assert [row["rain_left"] == row["E_R"] == "" for row in rows] == 8 * [False] + 4 * [True]


# ---- what goes wrong -----------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(call, model, photos, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "huge.ppm").write_text("P6 100000001 1 255 ")
    (tmp_path / "many").mkdir()
    for i in range(2500):
        (tmp_path / "many" / f"{i}.png").touch()
    photo = photos / "photo0.png"
    compare = ("--out", tmp_path, "--backgrounds")
    rain = ("rain", photo, "-o")
    train = ("train", "-o", tmp_path / "out.pt", "--backgrounds")
    for command, reason in (
        ((*compare, tmp_path / "nowhere"), "nowhere"),
        ((*compare, photo), "one photograph"),
        ((*compare, photos, "--many", 10**6), "memory"),
        ((*rain, tmp_path / "out.txt"), "out.txt"),
        ((*rain, tmp_path / "text.png" / "out.png"), "text.png"),
        ((*rain, tmp_path), "folder"),
        (("rain", tmp_path / "missing.png", "-o", tmp_path / "out.png"), "missing.png"),
        (("rain", tmp_path / "huge.ppm", "-o", tmp_path / "out.png"), "100 megapixels"),
        ((*train, tmp_path / "many"), "2,500"),
        ((*train, photos, "--n", 10**6), "memory"),
        (("restore", tmp_path / "text.png", photo, "-o", tmp_path), "text.png"),
        (("evaluate", model, "--rainy", tmp_path / "nowhere", "--clean", photos), "nowhere"),
    ):
        done = call(*command)
        assert refused(done) and reason in done.stderr, command
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("options", ["--few 0", "--steps x", "--seed -1", "--net vgg", "x", "rain"])
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


def test_ctrl_c_stops_the_main_job_and_its_threads(call, photos, tmp_path):
    threads = threading.active_count()
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    try:
        done = call("--backgrounds", photos, "--steps", 4000, "--out", tmp_path)
    finally:
        timer.cancel()
    assert done.returncode == 130 and done.stderr.count("\n") == 1
    assert time.monotonic() - begun < 5 and threading.active_count() == threads
