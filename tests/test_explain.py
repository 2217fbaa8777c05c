"""figures/explain.py: numbers agree with the pictures, by a loop or by numpy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import derain

FILE = Path(__file__).resolve().parent.parent / "figures" / "explain.py"
spec = importlib.util.spec_from_file_location("explain", FILE)
explain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explain)

def pictures(figure) -> list[np.ndarray]:
    """What a figure shows, in the order of its axes; NaN where it is masked."""
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    return [np.ma.filled(picture.astype(float), np.nan) for picture in shown]

def test_pictures_and_numbers_are_written_and_a_bad_folder_is_one_line(tmp_path, capsys):
    assert explain.main(["--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("rain", "backgrounds", "decoupled"):
        draw = getattr(explain, f"figure_{name}")
        rows = draw(3)[1]  # drawn again: the same seed, the same rows
        assert rows != draw(4)[1]
        lines = [",".join(str(value) for value in row.values()) for row in rows]
        written = (tmp_path / f"{name}.csv").read_text().replace('"', "").splitlines()
        assert written == [",".join(rows[0]), *lines]
        assert (tmp_path / f"{name}.png").exists() and f"{name}.png" in printed
    assert explain.main(["--out", str(tmp_path / "rain.csv" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

def test_sharpness_is_that_of_the_pictures_by_a_loop():
    figure, rows = explain.figure_backgrounds(0)
    for i in (0, 9):  # a face, dead leaves
        grey = pictures(figure)[i].mean(2).tolist()
        total = 0
        for above, below in zip(grey, grey[1:]):
            for x in range(len(above) - 1):
                total += ((below[x] - above[x]) ** 2 + (above[x + 1] - above[x]) ** 2) ** 0.5
        assert rows[i]["sharpness"] == pytest.approx(total / (len(grey) - 1) ** 2, rel=1e-4)

def test_errors_are_those_of_the_pictures():
    figure, rows = explain.figure_decoupled(0)
    shown = pictures(figure)
    rainy, clean = shown[0], shown[4]
    wet = (abs(rainy - clean) > 4 / 255 + 1e-6).any(2)
    for output, wet_map, dry_map, row in zip(shown, shown[5:], shown[10:], rows):
        expected = {"E_R": (output - rainy)[wet], "E_W": (output - clean)[wet],
                    "E_B": (output - clean)[~wet], "E_W of the map": wet_map[wet] / 255,
                    "E_B of the map": dry_map[~wet] / 255}
        for name, difference in expected.items():
            rms = 255 * (difference ** 2).mean() ** 0.5
            assert row[name[:3]] == pytest.approx(rms, rel=1e-4, abs=1e-4), name
        assert np.isnan(wet_map[~wet]).all() and np.isnan(dry_map[wet]).all()
    assert not shown[1].any()  # black
    assert max(rows, key=lambda row: row["E_R"]) == rows[1]  # as the title says

def test_rain_has_the_factors_that_its_rows_name():
    figure, rows = explain.figure_rain(0)
    layers = pictures(figure)[5:]  # after the steps
    for layer, row in zip(layers, rows, strict=True):
        assert row["wet_share"] == pytest.approx((layer > derain.RAIN_THRESHOLD).mean(), abs=1e-6)
    assert np.all(np.diff([layer.mean() for layer in layers[:4]]) > 0)  # more and more seeds
    for layer, axes in zip(layers[12:16], figure.axes[17:21]):  # "/": gradients of one sign
        down, right = np.gradient(layer)
        angle = np.rad2deg(np.arctan2(2 * (down * right).mean(), (right**2 - down**2).mean())) / 2
        assert angle == pytest.approx(float(axes.get_title().rstrip("°")), abs=6)
