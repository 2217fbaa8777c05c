"""figures/explain.py: the numbers agree with the pictures, by a loop or by numpy."""

import importlib.util

import numpy as np
import pytest

import derain
from conftest import ROOT

FILE = ROOT / "figures" / "explain.py"
spec = importlib.util.spec_from_file_location("explain", FILE)
explain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explain)


def pictures(figure) -> list[np.ndarray]:
    """What a figure shows, in the order of its axes."""
    return [np.array(axes.images[0].get_array(), float) for axes in figure.axes if axes.images]


def test_pictures_and_numbers_are_written(tmp_path, capsys):
    assert explain.main(["--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("rain", "backgrounds", "decoupled"):
        draw = getattr(explain, f"figure_{name}")
        rows = draw(3)[1]  # drawn again: the same seed, the same rows
        assert rows != draw(4)[1]
        lines = [",".join(str(value) for value in row.values()) for row in rows]
        written = (tmp_path / f"{name}.csv").read_text().replace('"', "").splitlines()
        assert written == [",".join(rows[0]), *lines]
        assert f"{name}.png" in printed and (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert explain.main(["--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sharpness_is_that_of_the_pictures_by_a_loop():
    figure, rows = explain.figure_backgrounds(0)
    shown = pictures(figure)
    assert len(shown) == len(rows) == 20
    for i in (0, 9, 19):  # a face, a patch of low sharpness, one of high
        grey = shown[i].mean(2).tolist()
        total = 0
        for above, below in zip(grey, grey[1:]):
            for x in range(len(above) - 1):
                total += np.hypot(below[x] - above[x], above[x + 1] - above[x])
        assert rows[i]["sharpness"] == pytest.approx(total / (len(grey) - 1) ** 2, rel=1e-3)
    values = [row["sharpness"] for row in rows]
    assert max(values[5:10]) < min(values[15:20])  # the low third, and the high third


def test_rain_left_and_damage_are_a_straight_line_through_the_pictures():
    figure, rows = explain.figure_decoupled(0)
    rainy, half, *others = pictures(figure)
    clean = 2 * half - rainy
    r = (rainy - clean).ravel()
    for output, row in zip((rainy, half, *others), rows, strict=True):
        d = (output - clean).ravel()
        slope = np.polyfit(r, d, 1)[0]
        assert row["rain_left"] == pytest.approx(100 * slope, abs=0.01)
        damage = 255 * np.sqrt(np.mean((d - slope * r) ** 2))
        assert row["damage"] == pytest.approx(damage, abs=0.01)


def test_rain_has_the_factors_that_its_rows_name():
    figure, rows = explain.figure_rain(0)
    layers = pictures(figure)[5:]  # after the steps
    for layer, row in zip(layers, rows, strict=True):
        wet = (layer > derain.RAIN_THRESHOLD).mean()
        assert row["wet_share"] == pytest.approx(wet, abs=1e-6)
    assert np.all(np.diff([layer.mean() for layer in layers[:4]]) > 0)  # more and more seeds
    for layer, row in zip(layers[12:16], rows[12:16]):  # gradients of a streak lie across it
        down, right = np.gradient(layer)
        angle = np.arctan2(2 * (down * right).mean(), (right**2 - down**2).mean()) / 2
        assert np.rad2deg(angle) == pytest.approx(float(row["layer"].split()[-1]), abs=6)
