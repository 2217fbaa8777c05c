"""Every command that reads images against 300 that are damaged, mislabelled, enormous, tiny or odd.

Whatever the file: never a traceback, one line that names it, never half a file, the rest of the batch done, and an
exit status that says so.
"""

import errno
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import derain

FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "ppm": "PPM"}


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, FORMATS[kind], **options)
    return file.getvalue()


def scene(draw, size):
    return Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def enormous(kind, draw):
    """A few bytes that declare an image of about 50,000x50,000 pixels."""
    side = int(draw.integers(45_000, 60_000))
    if kind == "png":
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(9999))) + png_chunk(b"IEND", b"")
    if kind == "ppm":
        return b"P6 %d %d 255\n" % (side, side) + bytes(99)
    data = bytearray(encoded(scene(draw, (30, 20)), kind))
    if kind == "jpg":
        at = data.index(b"\xff\xc0") + 5
        data[at:at + 4] = struct.pack(">HH", side, side)
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", side, side)
    else:  # tif: the first two tags are width and height
        at = data.index(struct.pack("<HHI", 256, 4, 1))
        data[at + 8:at + 12] = data[at + 20:at + 24] = struct.pack("<I", side)
    return bytes(data)


def odd(name, draw):
    """An image that is not plain RGB, but good."""
    picture = scene(draw, (30, 20))
    frames = [scene(draw, (30, 20)).convert("P") for _ in range(3)]
    turned = Image.Exif()
    turned[0x0112] = 6
    levels = draw.integers(0, 65536, (20, 30))
    return {
        "palette.png": lambda: encoded(picture.convert("P"), "png"),
        "transparent-palette.png": lambda: encoded(picture.convert("P"), "png", transparency=3),
        "cmyk.jpg": lambda: encoded(picture.convert("CMYK"), "jpg"),
        "cmyk.tif": lambda: encoded(picture.convert("CMYK"), "tif"),
        "16bit.png": lambda: encoded(Image.fromarray(levels.astype(np.uint16)), "png"),
        "float.tif": lambda: encoded(Image.fromarray((levels / 65535).astype(np.float32)), "tif"),
        "not-a-number.tif": lambda: encoded(Image.fromarray(np.full((20, 30), np.nan, np.float32)), "tif"),
        "alpha.png": lambda: encoded(picture.convert("RGBA"), "png"),
        "grey-alpha.png": lambda: encoded(picture.convert("LA"), "png"),
        "alpha.webp": lambda: encoded(picture.convert("RGBA"), "webp"),
        "1bit.png": lambda: encoded(picture.convert("1"), "png"),
        "1bit.tif": lambda: encoded(picture.convert("1"), "tif"),
        "animated.gif": lambda: encoded(frames[0], "gif", save_all=True, append_images=frames[1:]),
        "turned.jpg": lambda: encoded(picture, "jpg", exif=turned),
        "profile.jpg": lambda: encoded(picture, "jpg", icc_profile=b"no profile at all"),
        "one-pixel.png": lambda: encoded(scene(draw, (1, 1)), "png"),
        "thin.bmp": lambda: encoded(scene(draw, (1, 60)), "bmp"),
        "jpg-named.png": lambda: encoded(picture, "jpg"),
        "png-named.JPG": lambda: encoded(picture, "png"),
        "gif-named.tif": lambda: encoded(picture, "gif"),
    }[name]()


ODD = ("palette.png", "transparent-palette.png", "cmyk.jpg", "cmyk.tif", "16bit.png", "float.tif", "not-a-number.tif",
       "alpha.png", "grey-alpha.png", "alpha.webp", "1bit.png", "1bit.tif", "animated.gif", "turned.jpg", "profile.jpg",
       "one-pixel.png", "thin.bmp", "jpg-named.png", "png-named.JPG", "gif-named.tif")


def make_images(n, seed):
    """n files: their names and bytes, and whether each must be readable (None: who knows)."""
    draw, files = np.random.default_rng(seed), {}
    for i in range(n):
        kind = list(FORMATS)[i % len(FORMATS)]
        data = encoded(scene(draw, (30, 20)), kind)
        if i % 5 == 0:
            name = ODD[i // 5 % len(ODD)]
            data, good = odd(name, draw), True
        elif i % 5 == 1:  # within the header, or nothing at all
            name, data, good = f"cut.{kind}", data[:draw.integers(0, 12)], False
        elif i % 5 == 2:
            name, data, good = f"shortened.{kind}", data[:draw.integers(12, len(data))], None
        elif i % 5 == 3:
            data = bytearray(data)
            for _ in range(draw.integers(1, 30)):
                data[draw.integers(len(data))] = draw.integers(256)
            name, good = f"flipped.{kind}", None
        elif i % 2 and kind != "webp":  # (webp has no room to declare so much)
            name, data, good = f"enormous.{kind}", enormous(kind, draw), False
        else:
            name, data, good = f"text.{kind}", bytes(draw.integers(32, 127, draw.integers(1, 200), dtype=np.uint8)), False
        files[f"{i:03}-{name}"] = bytes(data), good
    return files


FILES = make_images(300, seed=0)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    arguments = {"channels": 4, "blocks": 1}
    config = {"net": "resnet", "arguments": arguments, "steps": 1}
    derain.save_checkpoint(path, derain.build_network("resnet", 0, **arguments), config, 1)
    return path


def outcome(done):
    """Status and lines of standard error of a command."""
    return done.returncode, done.stderr.splitlines()


def files_in(folder):
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def check(failed, done, names=FILES):
    """Each file is either done or named in one line, and those known to be good or bad are so."""
    assert not failed & done and failed | done == set(names)
    for name in names:
        assert FILES[name][1] in (None, name in done), name


def named(lines, start):
    """The files that lines name, each one in a line of its own."""
    found = [[name for name in FILES if name in line] for line in lines]
    assert all(line.startswith(start) and len(line) < 400 and line.isprintable() for line in lines), lines
    assert all(len(names) == 1 for names in found), lines
    assert len({names[0] for names in found}) == len(lines)
    return {names[0] for names in found}


def test_the_files_are_of_many_kinds():
    assert len({data for data, _ in FILES.values()}) > 280
    assert all(sum(good is verdict for _, good in FILES.values()) >= 60 for verdict in (True, False, None))
    assert sum("enormous" in name for name in FILES) >= 20


def test_rain(call, damaged, tmp_path):
    done, failed = set(), set()
    for name in FILES:
        status, lines = outcome(call("rain", damaged / name, "-o", tmp_path / name))
        if status:
            assert status == 2 and not (tmp_path / name).exists() and len(lines) == 1
            failed |= named(lines, "derain.py: ")
        else:
            assert lines == []
            done.add(name)
    check(failed, done)
    whole(tmp_path, done)


def whole(folder, names):
    """The folder holds those files and nothing else, and all of them are complete images."""
    assert files_in(folder) == names
    for name in names:
        Image.open(folder / name).convert("RGB").load()


def test_restore(call, damaged, model, tmp_path):
    status, lines = outcome(call("restore", model, damaged, "-o", tmp_path / "out"))
    failed = named(lines, "failed: ")
    done = set(FILES) - failed
    assert status == 1
    check(failed, done)
    whole(tmp_path / "out", done)
    again, same = outcome(call("restore", model, damaged, "-o", tmp_path / "out"))
    assert again == 1 and same == lines


def test_evaluate(call, damaged, model, tmp_path):
    """Good rainy images against damaged clean ones, and the other way round."""
    names = list(FILES)
    for i, name in enumerate(names):
        good, bad = ("input", "target") if i % 2 else ("target", "input")
        for part in (good, bad):
            (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / bad / name).write_bytes((damaged / name).read_bytes())
        Image.new("RGB", (30, 20), "grey").save(tmp_path / good / f"{name.rsplit('.', 1)[0]}.png")
    status, lines = outcome(call("evaluate", model, "--pairs", tmp_path, "--csv", tmp_path / "t.csv"))
    failed = named([line for line in lines if line.startswith("failed: ")], "failed: ")
    assert status == 1 and len(lines) == len(failed)
    measured = {line.split(",")[0].split("/")[1].rsplit(".", 1)[0] for line in (tmp_path / "t.csv").read_text().splitlines()
                if line.startswith(("input/", "target/"))}
    done = {name for name in names if name.rsplit(".", 1)[0] in measured}
    assert not failed & done and failed | done == set(names)
    for name in failed:  # what is good may still have another size than its partner
        line = next(line for line in lines if name in line)
        assert FILES[name][1] is not True or "pixels" in line
    assert all(FILES[name][1] is not False for name in done) and len(done) > 40


@pytest.mark.parametrize("command", ["train", "vqgan"])
def test_training(command, call, damaged, tmp_path, monkeypatch):
    """Only what is readable, and large enough, is trained on; alone, damaged files are an error."""
    small = {**derain.PRIOR, "ch": 32, "n_embed": 8}
    for name, value in {"PRIOR": small, "TEST_PATCH": 20, "TEST_PATCHES": 2, "PATCH": 20,
                        "PRETRAINING_PATCHES": ((2, 16),)}.items():
        monkeypatch.setattr(derain, name, value)
    status, lines = outcome(call(command, "--backgrounds", damaged, "--steps", 1, "-o", tmp_path / "a.pt"))
    failed = named(lines, "skipped: ")
    assert status == 1 and files_in(tmp_path) == {"a.pt"}
    check(failed - {n for n in FILES if "one-pixel" in n or "thin" in n}, set(FILES) - failed,
          [n for n in FILES if not ("one-pixel" in n or "thin" in n)])
    bad = [damaged / name for name, (_, good) in FILES.items() if good is False]
    status, lines = outcome(call(command, "--backgrounds", *bad, "--steps", 1, "-o", tmp_path / "b.pt"))
    assert status == 2 and len(named(lines[:-1], "skipped: ")) == len(bad) and lines[-1].startswith("derain.py: none of")
    assert files_in(tmp_path) == {"a.pt"}


@pytest.mark.parametrize("kind, width", [("webp", 17_000), ("jpg", 66_000), ("gif", 66_000)])
def test_what_a_format_cannot_hold(kind, width, call, tmp_path):
    Image.new("RGB", (width, 1)).save(tmp_path / "wide.png")
    status, lines = outcome(call("rain", tmp_path / "wide.png", "-o", tmp_path / f"wide.{kind}"))
    assert status == 2 and "wide." in lines[-1] and "cannot be written" in lines[-1]
    assert files_in(tmp_path) == {"wide.png"}


def test_links_that_lead_nowhere_and_folders_that_look_like_images(call, model, tmp_path):
    photos = tmp_path / "photos"
    (photos / "album.png").mkdir(parents=True)
    Image.new("RGB", (8, 9)).save(photos / "album.png" / "good.png")
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "new\nline.png").write_text("no image")
    status, lines = outcome(call("restore", model, photos, "-o", tmp_path / "out"))
    assert status == 1 and len(lines) == 2 and "loop.png" in lines[0] and "new line.png" in lines[1]
    assert files_in(tmp_path / "out") == {"album.png/good.png"}


def test_a_disk_that_is_full(call, model, tmp_path, monkeypatch):
    Image.new("RGB", (8, 9)).save(tmp_path / "a.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(derain.os, "replace", full)
    for command in (("rain", tmp_path / "a.png", "-o", tmp_path / "b.png"), ("train", "--n", 4, "--steps", 1, "-o", tmp_path / "m.pt")):
        status, lines = outcome(call(*command))
        assert status == 2 and len(lines) == 1 and "cannot be written: No space left" in lines[0] and str(command[-1]) in lines[0]
    assert files_in(tmp_path) == {"a.png"}


def test_names_as_long_as_they_may_be(call, model, tmp_path):
    photo = tmp_path / ("ü" * 125 + ".png")  # 254 bytes
    Image.new("RGB", (8, 9)).save(photo)
    assert outcome(call("restore", model, photo, "-o", tmp_path / ("ö" * 125 + ".png"))) == (0, [])
