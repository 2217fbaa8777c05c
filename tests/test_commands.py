"""Section 8: the command line, as its users meet it."""

import csv
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import derain


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that returns its input, as a checkpoint."""
    network = derain.build_network(derain.SwinIR)
    for parameter in network.conv_last.parameters():
        torch.nn.init.zeros_(parameter)
    path = tmp_path_factory.mktemp("model") / "idle.pt"
    derain.save_checkpoint(path, network, "swinir", {})
    return path


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    derain.save_image(image, path)


def test_the_main_job(call, photos, tmp_path):
    done = call("--backgrounds", photos, "--steps", 2, "--few", 2, "--many", 3,
                "--out", tmp_path / "new")
    assert done.returncode == 0
    words = [line.split()[:2] for line in done.stdout.splitlines()]
    outputs = ["rainy", "opening", "few", "many"]
    for rain in ("unseen", "small"):
        for output in outputs:
            assert [rain, output] in words
    assert "E_W" in done.stdout and "headline.png" in done.stdout
    rows = list(csv.DictReader(open(tmp_path / "new" / "headline.csv")))
    assert [row["output"] for row in rows] == outputs * 2
    assert Image.open(tmp_path / "new" / "headline.png").size[0] > 800


def test_help_shows_defaults_and_an_example(capsys):
    for verb in ((), ("rain",), ("train",), ("vqgan",), ("restore",), ("evaluate",)):
        with pytest.raises(SystemExit) as stop:
            derain.main([*verb, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "example: python derain.py" in text
        assert "default:" in text


def test_rain_falls_on_a_photograph_at_its_own_size(call, photos, tmp_path):
    files = []
    for seed in (0, 0, 1):
        files.append(tmp_path / f"deep/{len(files)}.png")
        options = ("--range", "large", "--seed", seed)
        done = call("rain", photos / "photo0.png", "-o", files[-1], *options)
        assert done.returncode == 0 and str(files[-1]) in done.stdout
    clean, rainy = derain.open_image(photos / "photo0.png"), derain.open_image(files[0])
    assert rainy.shape == clean.shape
    assert (rainy >= clean - 1 / 255).all() and (rainy > clean + 0.2).any()
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_train_and_restore(call, photos, tmp_path):
    options = ("--backgrounds", photos, "--steps", 2, "--n", 3)
    for name in ("a.pt", "b.pt"):
        done = call("train", *options, "-o", tmp_path / name)
        assert done.returncode == 0 and name in done.stdout and "loss" in done.stdout
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    done = call("restore", tmp_path / "a.pt", photos / "photo0.png", "-o", tmp_path / "out")
    assert done.returncode == 0
    network = derain.load_checkpoint(tmp_path / "a.pt")
    image = derain.open_image(photos / "photo0.png")
    restored = derain.open_image(tmp_path / "out" / "photo0-restored.png")
    assert (restored - derain.predict(network, image[None])[0]).abs().max() < 0.51 / 255


def test_simple_backgrounds_are_the_least_sharp(call, photos, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(derain, "train", lambda net, patches, *_, **__: taken.append(patches))
    call("train", "--backgrounds", photos, "--n", 9, "--simple", "-o", tmp_path / "model.pt")
    images, _ = derain.training_and_held_out(photos, "", 0)
    patches = derain.sample_patches(images, 27, derain.PATCH, derain.stream(0, "patches"))
    assert torch.equal(derain.sharpness(taken[0]), derain.sharpness(patches).sort().values[:9])


def test_the_prior_from_the_command_line(call, photos, tmp_path):
    vqgan, prior = tmp_path / "vqgan.pt", tmp_path / "prior.pt"
    assert call("vqgan", "--backgrounds", photos, "--steps", 2, "-o", vqgan).returncode == 0
    train = ("train", "--backgrounds", photos, "--steps", 2, "--n", 4, "-o", prior, "--vqgan")
    assert call(*train, vqgan).returncode == 0
    assert isinstance(derain.load_checkpoint(prior), derain.VQGANPrior)
    assert call("restore", prior, photos / "photo1.png", "-o", tmp_path).returncode == 0
    refused = call(*train, prior)
    assert refused.returncode == 2 and "prior.pt" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_good_ones_are_restored_and_the_others_named(call, model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes((photos / "photo0.png").read_bytes()[:300])
    missing = tmp_path / "missing.png"
    done = call("restore", model, tmp_path / "broken.png", photos / "photo1.png", missing,
                "-o", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 2
    assert "broken.png" in done.stderr and "missing.png" in done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["photo1-restored.png"]


def test_evaluate_pairs_by_number_and_averages(call, model, tmp_path, rng):
    clean = torch.from_numpy(rng.random((3, 3, 30, 24), dtype=np.float32)) * 0.7
    names = (("norain-001.png", ["rain-001.png"]), ("901.png", ["901_1.png", "901_2.png"]),
             ("2.png", ["2.png"]))
    expected = []
    for image, (partner, files) in zip(clean, names):
        save(tmp_path / "clean" / partner, image)
        for file in files:
            rain = torch.from_numpy(rng.random((1, 30, 24), dtype=np.float32)) * 0.3
            save(tmp_path / "rainy" / file, image + rain)
            pair = [derain.open_image(tmp_path / part)[None]
                    for part in (f"rainy/{file}", f"clean/{partner}")]
            for output in (pair[0], derain.opening(pair[0]), pair[0]):
                expected.append(derain.decoupled_evaluation(output, *pair))
    command = ("evaluate", model, "--rainy", tmp_path / "rainy", "--clean", tmp_path / "clean")
    done = call(*command)
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][2:] == list(expected[0])
    for i, name in enumerate(("rainy", "opening", str(model))):
        means = [np.mean([row[key] for row in expected[i::3]]) for key in expected[0]]
        assert lines[1 + i][:2] == [name, "4"]
        assert [float(cell) for cell in lines[1 + i][2:]] == pytest.approx(means, abs=0.0051)
    save(tmp_path / "rainy" / "77_1.png", clean[0])
    save(tmp_path / "clean" / "88.png", clean[0])
    save(tmp_path / "rainy" / "2_9.png", clean[0, :, :20])
    done = call(*command)
    assert done.returncode == 1 and done.stderr.count("\n") == 3
    assert all(name in done.stderr for name in ("77_1.png", "88.png", "2_9.png"))
    again = [line.split() for line in done.stdout.splitlines()]
    assert again == lines


def test_bad_input_is_one_line_and_status_2(call, model, photos, tmp_path, capfd):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "small.png")
    out = tmp_path / "out.pt"
    cases = (
        ("--backgrounds", tmp_path / "nowhere"), ("--backgrounds", tmp_path / "empty"),
        ("--backgrounds", photos / "photo0.png"), ("--few", 0), ("--steps", "many"), ("--seed", -1),
        ("--net", "vgg"), ("--device", "tpu"), ("paint",), ("--colour", "red"), ("rain",),
        ("rain", tmp_path / "text.png", "-o", tmp_path / "x.png"),
        ("rain", tmp_path / "missing.png", "-o", tmp_path / "x.png"),
        ("rain", photos / "photo0.png", "-o", tmp_path / "x.txt"),
        ("rain", photos / "photo0.png", "-o", tmp_path / "small.png" / "x.png"),
        ("rain", photos / "photo0.png", "-o", tmp_path / "x.png", "--range", "hail"),
        ("train", "--backgrounds", tmp_path / "empty", "-o", out),
        ("train", "--vqgan", model, "-o", out), ("train", "--vqgan", tmp_path / "no.pt", "-o", out),
        ("restore", tmp_path / "text.png", photos / "photo0.png", "-o", tmp_path),
        ("restore", tmp_path / "missing.pt", photos / "photo0.png", "-o", tmp_path),
        ("evaluate", model, "--rainy", tmp_path / "nowhere", "--clean", photos))
    for case in cases:
        try:
            done = call(*case)
            status, errors = done.returncode, done.stderr
        except SystemExit as stop:  # argparse
            status, errors = stop.code, capfd.readouterr().err
        assert status == 2 and errors.count("\n") == 1 and len(errors) > 15, (case, errors)
    alone = call("--backgrounds", tmp_path / "small.png")  # skipped, and then nothing is left
    assert alone.returncode == 2 and "small.png" in alone.stderr and alone.stderr.count("\n") <= 2
    assert not out.exists()


def test_it_runs_as_a_program():
    command = [sys.executable, derain.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "restore" in done.stdout


def test_the_contents_name_what_is_there():
    """The lines of the module's docstring that begin with a section's number."""
    names = []
    for line in derain.__doc__.splitlines():
        if line[:1].isdigit():
            names += line[16:].replace(",", " ").split()
    assert len(names) > 40
    assert all(hasattr(derain, name) for name in names)


def test_sections_use_only_earlier_ones():
    """A function is not called in any section above its own."""
    source = open(derain.__file__, encoding="utf-8").read()
    sections = source.split("# ---- ")[1:]
    for i, section in enumerate(sections):
        later = "".join(sections[i + 1:])
        for line in later.splitlines():
            if line.startswith(("def ", "class ")):
                name = line.split()[1].split("(")[0].rstrip(":")
                called = re.search(rf"(?<![\w.`]){name}\(", section)
                assert not called, f"{name} is used in section {i + 1}"
