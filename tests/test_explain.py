"""figures/explain.py: the numbers agree with the pictures, by a loop or by numpy."""

import importlib.util

import numpy as np
import pytest

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
