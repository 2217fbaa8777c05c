"""Section 8: images and checkpoints, also broken and hostile ones; and the main job of section 5."""

import contextlib
import os
import resource
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import derain
from golden import fill


def test_a_rotated_jpeg_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view": the top becomes the right
    picture = Image.linear_gradient("L").resize((60, 40))  # black at the top, white at the bottom
    picture.save(tmp_path / "a.jpg", exif=exif)
    (image,) = derain.load_images(tmp_path)
    assert image.shape == (3, 60, 40)
    assert image[..., 0].min() > 0.9 and image[..., 39].max() < 0.1


def test_grey_of_16_bits_is_read_by_its_value(tmp_path):
    values = np.arange(0, 65536, 256, np.uint16).reshape(32, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    (image,) = derain.load_images(tmp_path)
    assert len(image) == 3 and np.allclose(image, values / 65535)


def test_broken_files_are_left_out_and_named(tmp_path, photos, capsys):
    whole = (photos / "photo0.png").read_bytes()
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(whole[:5000])
    with pytest.raises(derain.BadInput):  # nothing is left
        derain.load_images(tmp_path)
    Image.new("RGB", (30, 200)).save(tmp_path / "thin.png")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "good.png").write_bytes(whole)
    assert len(derain.load_images(tmp_path, smallest=40)) == 1
    lines = capsys.readouterr().err.splitlines()
    for line, name in zip(lines, ["empty", "half", "empty", "half", "thin"], strict=True):
        assert f"{name}.png" in line


def test_predictions_are_limited_to_the_range_of_images(rng):
    images = torch.from_numpy(rng.normal(size=(18, 3, 6, 5))).float()  # more than fit one chunk
    network = derain.build_network(derain.ResNet)
    torch.testing.assert_close(derain.predict(network, images), network(images).clamp(0, 1))


@pytest.mark.parametrize("height, width", [(150, 131), (64, 65), (40, 200), (1, 1)])
@pytest.mark.parametrize("net", ["resnet", "unet"])
def test_tiles_equal_the_whole(net, height, width, rng):
    """These networks see less than 32 pixels around each, so tiling must not change anything."""
    network = fill(derain.NETWORKS[net]())
    image = torch.from_numpy(rng.random((3, height, width), dtype=np.float32))
    whole = derain.predict(network, image[None])[0]
    assert (derain.restore(network, image, tile=64) - whole).abs().max() < 1e-5


# ---- checkpoints ---------------------------------------------------------------------------------

ARGUMENTS = {"channels": 4, "blocks": 1}


def save(path, **change):
    """Write a checkpoint of a small ResNet, with some of its entries changed."""
    network = derain.build_network(derain.ResNet, 2, **ARGUMENTS)
    derain.save_checkpoint(path, network, "resnet", ARGUMENTS)
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    return network


def test_checkpoint_round_trip(tmp_path):
    network = save(tmp_path / "a.pt")
    assert torch.equal(weights_of(network), weights_of(derain.load_checkpoint(tmp_path / "a.pt")))


class Malicious:
    """Unpickled by anything careless, this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},  # the first edition had none
        {"net": "vgg"},
        {"arguments": {"channels": 1500, "blocks": 12}},  # 2 GB
        {"arguments": None},
        {"state_dict": {"head.weight": "no tensor"}},
        {"state_dict": Malicious()},
    ],
)
def test_wrong_checkpoints_are_refused_in_one_line(tmp_path, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "b.pt", **change)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    with pytest.raises(derain.BadInput, match=r"b\.pt.*\Z"):
        derain.load_checkpoint(tmp_path / "b.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 500_000
    assert not (tmp_path / "owned").exists()


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 cut off")
    for load in (derain.load_checkpoint, derain.load_vqgan):
        for path in (tmp_path / "c.pt", tmp_path / "missing.pt", tmp_path):
            with pytest.raises(derain.BadInput, match=rf"{path.name}.*\Z"):
                load(path)


# ---- files ---------------------------------------------------------------------------------------

EXPECTED = r"a\.ckpt.* published VQGAN.*\Z"  # in the one line that refuses a file


@pytest.fixture
def published(monkeypatch):
    """Make the default arguments, which published files have, those of a small network."""
    defaults = {**SMALL, "n_embed": 7}  # the right number is that of the file
    monkeypatch.setattr(derain.VQGAN.__init__, "__defaults__", tuple(defaults.values()))


def test_a_checkpoint_in_the_published_layout_loads(small, tmp_path, monkeypatch, published):
    """It names a class that is not installed here, and was written on a GPU."""
    foreign = types.ModuleType("lightning_of_old")
    foreign.Callback = type("Callback", (), {"__module__": foreign.__name__})
    content = {
        "epoch": 7,
        "callbacks": {foreign.Callback: {"best": torch.ones(()), "score": np.float64(3)}},
        "other": [foreign.Callback(), np.ones(3)],
        "state_dict": {**small.state_dict(), "loss.discriminator.main.0.weight": torch.ones(3)},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, foreign.__name__, foreign)
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, tmp_path / "a.ckpt")
    loaded = derain.load_vqgan(tmp_path / "a.ckpt")
    image = torch.rand(1, 3, 32, 32)
    assert_close(loaded(image)[0], small(image)[0])  # so attention stands where it stood


class Malicious:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("__import__('os').mkdir('made')",)


@pytest.mark.parametrize("function", (os.mkdir, eval, exec))
def test_a_malicious_checkpoint_runs_nothing(small, tmp_path, function, published, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {**small.state_dict(), "loss": Malicious(function)}}
    for zipped in (True, False):
        torch.save(content, "a.ckpt", _use_new_zipfile_serialization=zipped)
        with contextlib.suppress(derain.BadInput):
            derain.load_vqgan("a.ckpt")
        assert os.listdir() == ["a.ckpt"]


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": {"conv.weight": torch.ones(3)}},
        {"state_dict": None},
        {"decoder.conv_out.bias": None},
        {"decoder.conv_out.bias": torch.ones(4)},
        {"arguments": {**SMALL, "ch": 512}},
        {"arguments": {"groups": 8}},  # of the first edition
    ],
)
def test_other_contents_are_refused_in_one_line(small, tmp_path, change, published):
    content = {"state_dict": {**small.state_dict(), **change}, **change}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(derain.BadInput, match=EXPECTED):
        derain.load_vqgan(tmp_path / "a.ckpt")


# ---- the main job --------------------------------------------------------------------------------

IMAGES = list(torch.rand(6, 3, 60, 50) / 2)


def test_the_main_job_has_a_row_for_each_step_rain_and_output(monkeypatch, capsys):
    monkeypatch.setattr(derain, "TEST_PATCHES", 3)
    monkeypatch.setattr(derain, "TEST_PATCH", 32)
    monkeypatch.setitem(derain.NETWORKS, "toy", Toy)
    settings = (2, 5, "toy", "medium", 30, 0)  # 2 and 5 backgrounds, 30 steps, seed 0
    rows, pictures = derain.few_against_many(IMAGES[:4], IMAGES[4:], *settings)
    progress = capsys.readouterr().out
    numbers = {"rainy": 0, "opening 5": 0, "opening 7": 0, "few": 2, "many": 5}
    steps = sorted({row["step"] for row in rows})
    assert len(steps) >= 12 and steps[-1] == 30
    expected = []
    for step in steps:
        for rain in ("unseen", "medium"):
            expected += [(step, rain, *item) for item in numbers.items()]
    assert [tuple(row.values())[:4] for row in rows] == expected

    for row in rows[-10:]:
        shown, n = pictures[row["rain"]], row["n"]
        image, rainy = shown[row["output"]], shown["rainy"]
        measures = derain.decoupled_evaluation(image, rainy, shown["clean"])
        assert row == pytest.approx({**row, **measures})
        if n:  # the same as training alone
            network = toy()
            patches = derain.training_patches(IMAGES[:4], n, 0)
            derain.train(network, patches, derain.rain_degradation(derain.RAIN["medium"]), 30)
            assert torch.allclose(image, derain.predict(network, rainy), atol=1e-5)
            assert f"{n} backgrounds: 30 of 30 steps, loss 0." in progress
