"""Section 8: images and checkpoints, also broken and hostile ones; and the main job of section 5."""

import contextlib
import itertools
import os
import resource
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif"])
def test_grey_of_16_bits_is_read_by_its_value(name, tmp_path):
    values = np.arange(0, 65536, 256, np.uint16).reshape(32, 8)
    Image.fromarray(values).save(tmp_path / name)
    image = derain.open_image(tmp_path / name)
    assert len(image) == 3 and np.allclose(image, values / 65535)


@pytest.mark.parametrize(
    "kind, entry, other",
    [
        (np.float32, b"", b""),
        (np.int32, b"", b""),
        (np.uint16, b"\x02\1\3\0\1\0\0\0\x10", b"\x02\1\3\0\1\0\0\0\x0c"),  # 12 bits
        (np.uint16, b"\x06\1\3\0\1\0\0\0\1", b"\x06\1\3\0\1\0\0\0\0"),  # a negative
    ],
)
def test_other_grey_tiffs_are_refused_in_one_line(kind, entry, other, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((4, 4), kind)).save(path)
    path.write_bytes(path.read_bytes().replace(entry, other))
    with pytest.raises(derain.BadInput, match=r"a\.tif.*8 or 16 bits\Z"):
        derain.open_image(path)


@pytest.mark.parametrize(
    "name, mode", [("a.png", "P"), ("a.gif", "P"), ("a.jpg", "CMYK"), ("a.tif", "RGBA")]
)
def test_pictures_of_one_pixel_in_other_modes(name, mode, tmp_path, capsys):
    """Of several pictures in a file, the first is read.  An alpha channel is told in one line."""
    colour = (204, 0, 102)
    picture = Image.new("RGB", (1, 1), colour).convert(mode)
    others = {"save_all": True, "append_images": [Image.new(mode, (1, 1))]}
    picture.save(tmp_path / name, **({} if mode == "CMYK" else others))
    image = derain.open_image(tmp_path / name)
    assert image.flatten().tolist() == pytest.approx([value / 255 for value in colour], abs=0.01)
    assert capsys.readouterr().err.count("\n") == (mode == "RGBA")


def test_broken_files_are_left_out_and_named(tmp_path, photos, capsys):
    whole = (photos / "photo0.png").read_bytes()
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(whole[:5000])
    os.mkfifo(tmp_path / "pipe.png")  # who opens it waits for ever
    with pytest.raises(derain.BadInput):  # nothing is left
        derain.load_images(tmp_path)
    Image.new("RGB", (30, 200)).save(tmp_path / "thin.png")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "good.png").write_bytes(whole)
    assert len(derain.load_images(tmp_path, smallest=40)) == 1
    lines = capsys.readouterr().err.splitlines()
    names = ["empty", "half", "pipe"]
    for line, name in zip(lines, [*names, *names, "thin"], strict=True):
        assert f"{name}.png" in line


def test_what_a_mac_leaves_in_a_zip_and_linked_folders_are_no_images(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "._a.png", "b/._a.png", "__MACOSX/a.png"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "link").symlink_to(photos)
    assert [str(file) for file in derain.image_files(derain.Path("."))] == ["a.png"]
    with pytest.raises(derain.BadInput, match=r"b is no folder with images.*links.*\Z"):
        derain.image_files(tmp_path / "b")


@pytest.mark.parametrize("height, width", [(100, 70), (64, 65), (40, 130), (1, 1)])
@pytest.mark.parametrize("net", ["resnet", "unet"])
def test_strips_equal_the_whole(net, height, width, rng):
    """These networks see less than 32 pixels around each, so cutting must not change anything."""
    network = fill(derain.NETWORKS[net]())
    images = torch.from_numpy(rng.random((17, 3, height, width), np.float32))  # more than a chunk
    whole = network(images).clamp(0, 1).detach()
    torch.testing.assert_close(derain.predict(network, images), whole)
    assert (derain.restore(network, images[0], rows=64) - whole[0]).abs().max() < 1e-5


# ---- checkpoints ---------------------------------------------------------------------------------

CODES = "quantize.embedding.weight"
PUBLISHED = (8, (1, 1, 1, 1, 2), 1, (2,), 32, 8, 7, 4)  # a small VQGAN with five levels


def saved(path, net, change={}):
    """Write a checkpoint with some of its entries or weights changed; return the network."""
    vqgan = derain.build_network(derain.VQGAN, 2, **{**derain.PRIOR, "n_embed": 77})
    made = {"vqgan": vqgan, "prior": derain.VQGANPrior(vqgan)}
    network = made.get(net) or derain.build_network(derain.NETWORKS[net], 2)
    derain.save_checkpoint(path, network, net)
    content = torch.load(path, weights_only=True)
    for name, value in change.items():
        entries = content if name in content else content["state_dict"]
        entries[name] = value
    torch.save(content, path)
    return network


def load(path, net):
    return derain.load_vqgan(path) if net == "vqgan" else derain.load_checkpoint(path)


def same(network, other):
    weights, others = network.state_dict(), other.state_dict()
    return list(weights) == list(others) and all(
        map(torch.equal, weights.values(), others.values())
    )


@pytest.mark.parametrize("net", ["resnet", "unet", "swinir", "vqgan", "prior"])
def test_a_checkpoint_round_trip_and_flipped_bits(net, tmp_path, rng):
    """A file that was damaged is refused, or nothing was changed that counts."""
    path = tmp_path / "a.pt"
    network = saved(path, net)
    assert same(load(path, net), network)
    with pytest.raises(derain.BadInput):  # the other function wants another kind
        load(path, "resnet" if net == "vqgan" else "vqgan")
    whole = path.read_bytes()
    refused = 0
    for place in rng.integers(len(whole), size=12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert same(load(path, net), network)
        except derain.BadInput:
            refused += 1
    assert refused > 6


class Malicious:
    """Unpickled by anything careless, this makes a folder."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("__import__('os').mkdir('made')",)


wide = torch.ones(1).expand(10**7, 16)  # small in a file, large in memory


@pytest.mark.parametrize(
    "net, change",
    [
        ("resnet", {"format": 2}),  # the second edition
        ("resnet", {"head.weight": "no tensor"}),
        ("resnet", {"head.weight": wide}),
        ("resnet", {"tail.bias": torch.tensor([0, torch.nan, 0])}),
        ("prior", {f"vqgan.{CODES}": wide}),
        ("vqgan", {CODES: wide}),
        ("vqgan", {CODES: wide[:0]}),
        ("vqgan", {"encoder.down.4.block.0.conv1.weight": torch.ones(3)}),
    ],
)
def test_wrong_checkpoints_are_refused_in_one_line(net, change, tmp_path, monkeypatch):
    monkeypatch.setattr(derain.VQGAN.__init__, "__defaults__", PUBLISHED)
    saved(tmp_path / "b.pt", net, change)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    with pytest.raises(derain.BadInput, match=r"b\.pt.*\Z"):
        load(tmp_path / "b.pt", net)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 200_000


def test_other_files_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save({"state_dict": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("pipe.pt", "cut.pt", "old.pt", "missing.pt", "."):
        for net in ("resnet", "vqgan"):
            with pytest.raises(derain.BadInput, match=rf"{name}.* is no .*\Z"):
                load(tmp_path / name, net)


def test_a_published_checkpoint_loads_and_runs_nothing(tmp_path, monkeypatch):
    """It names classes that are not installed here, and was written on a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(derain.VQGAN.__init__, "__defaults__", PUBLISHED)
    vqgan = fill(derain.VQGAN(n_embed=33))  # the right number is that of the file
    foreign = types.ModuleType("lightning_of_old")
    foreign.Callback = type("Callback", (), {"__module__": foreign.__name__})
    content = {
        "callbacks": {foreign.Callback: np.float64(3)},
        "other": [foreign.Callback(), np.ones(3)],
        "state_dict": {**vqgan.state_dict(), "loss.discriminator.main.0.weight": torch.ones(3)},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, foreign.__name__, foreign)
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, "a.pt")
    loaded = derain.load_vqgan("a.pt")
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded(image)[0], vqgan(image)[0])  # attention is where it was
    for function in (os.mkdir, eval, exec):
        torch.save({**content, "callbacks": 0, "other": Malicious(function)}, "a.pt")
        for net in ("vqgan", "resnet"):
            with contextlib.suppress(derain.BadInput):
                load("a.pt", net)
            assert os.listdir() == ["a.pt"]
    derain.save_checkpoint("a.pt", derain.VQGANPrior(vqgan), "prior")
    assert same(derain.load_checkpoint("a.pt").vqgan, vqgan)


# ---- the main job --------------------------------------------------------------------------------


class Tiny(derain.ResNet):
    def __init__(self):
        super().__init__(channels=2, blocks=1)


def test_the_main_job_has_a_row_for_each_step_rain_and_output(monkeypatch):
    """A copy ends as it does when it is trained alone."""
    monkeypatch.setattr(derain, "TEST_PATCHES", 3)
    monkeypatch.setattr(derain, "TEST_PATCH", 32)
    images = list(torch.rand(6, 3, 60, 50) / 2)
    rows, pictures = derain.compare(images[:4], images[4:], Tiny, "medium", steps=24, seed=4)
    steps = {row["step"] for row in rows}
    assert len(steps) >= 12 and max(steps) == 24
    numbers = {"rainy": 0, "opening 5": 0, "opening 7": 0, "few": 8, "exchanged": 8, "many": 1024}
    expected = itertools.product(steps, ("unseen", "medium"), numbers.items())
    found = [tuple(row.values())[:4] for row in rows]
    assert sorted(found) == sorted((step, rain, *item) for step, rain, item in expected)

    degrade = derain.rain_degradation(derain.RAIN["medium"])
    for name, choice in {"few": "plain", "exchanged": "exchanged", "many": "any"}.items():
        patches = derain.training_patches(images[:4], numbers[name], 4, choice)
        assert torch.equal(pictures["backgrounds"][name], patches)
        alone = derain.build_network(Tiny, 4)
        derain.train(alone, patches, degrade, 24, 4)
        for rain in ("unseen", "medium"):
            output = derain.predict(alone, pictures[rain]["rainy"])
            assert torch.allclose(pictures[rain][name], output, atol=1e-5)
    for row in rows:
        if row["step"] == 24:
            shown = pictures[row["rain"]]
            output = shown[row["output"]]
            measures = derain.decoupled_evaluation(output, shown["rainy"], shown["clean"])
            assert row == pytest.approx({**row, **measures})
