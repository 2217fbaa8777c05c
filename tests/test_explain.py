"""figures/explain.py: what it writes, and that a face shows what it should."""

import csv
import importlib.util

from conftest import ROOT

spec = importlib.util.spec_from_file_location("explain", ROOT / "figures" / "explain.py")
explain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explain)


def test_pictures_and_numbers_are_written(tmp_path):
    assert explain.main(["--seed", "3", "--out", str(tmp_path / "new")]) == 0
    for name, draw in explain.DRAW.items():
        rows = draw(3)[1]  # drawn again: the same seed, the same rows
        written = csv.reader((tmp_path / "new" / f"{name}.csv").open())
        assert [[*map(str, row.values())] for row in rows] == list(written)[1:]
        assert (tmp_path / "new" / f"{name}.png").stat().st_size > 10_000


def test_an_eye_has_bright_detail_and_a_cheek_has_not():
    cheek, eye, *ordered = [row["bright_detail"] for row in explain.figure_backgrounds(1)[1]]
    assert eye > 30 * cheek and ordered == sorted(ordered)


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stop(seed):
        raise KeyboardInterrupt

    monkeypatch.setitem(explain.DRAW, "rain", stop)
    assert explain.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.count("\n") == 1
