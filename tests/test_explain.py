"""figures/explain.py: the numbers agree with the pictures, by a loop or by numpy."""

import importlib.util


from conftest import ROOT

FILE = ROOT / "figures" / "explain.py"
spec = importlib.util.spec_from_file_location("explain", FILE)
explain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explain)


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
