"""Coursework: blanks are blank and nothing else; right solutions pass, wrong ones are caught."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from _pytest.runner import runtestprotocol

import derain
from conftest import ROOT
from golden import agree_forward, apply
from grader import ASSIGNMENTS, BLANK, replace
from make_assignment import SOURCE, TESTS, blank, find, others, page_of, points, write_handout
from wrong import RIGHT, WRONG

TEXT = SOURCE.read_text("utf-8")
NAMES = sorted({name for names in ASSIGNMENTS.values() for name in names})


def sources(text):
    """Return {function: its source}, as a text defines it."""
    tree = ast.parse(text)
    lines = text.split("\n")
    found = {}
    for name in NAMES:
        node = find(tree, name)
        found[name] = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


class Grading:
    """A pytest run in this process: puts in one solution after the other, and runs its tests."""

    def __init__(self):
        self.unfair = []  # tests that refuse a right solution
        self.unasked = []  # tests that pass although their function is blank
        self.missed = []  # wrong solutions that pass

    def passing(self, items, solutions):
        """Yield whether each test passes with {function: source}."""
        with pytest.MonkeyPatch.context() as patch:
            for name, source in solutions.items():
                made = {}
                exec(source, vars(derain), made)
                replace(patch, name, made[name.split(".")[-1]])
            for item in items:
                yield all(not report.failed for report in runtestprotocol(item, log=False))

    def pytest_runtestloop(self, session):
        blanks = sources(blank(TEXT, NAMES))
        right = sources(RIGHT)
        items = {name: [] for name in NAMES}
        for item in session.items:
            if graded := item.get_closest_marker("graded"):
                items[graded.args[0]].append(item)
        for mark, names in ASSIGNMENTS.items():
            for name in names:
                # Nothing else has to be right, neither the assignment's nor what it does not need.
                solutions = {other: blanks[other] for other in [*names, *others(mark)]}
                passing = self.passing(items[name], {**solutions, name: right[name]})
                if not all(passing):
                    self.unfair.append((mark, name))
                if any(self.passing(items[name], {name: blanks[name]})) or not items[name]:
                    self.unasked.append(name)
        for name, mistake, old, new in WRONG:
            wrong = right[name].replace(old, new)
            if all(self.passing(items[name], {name: wrong})):
                self.missed.append((name, mistake))
        return True


@pytest.fixture(scope="module")
def grading():
    found = Grading()
    files = [file for file in TESTS.glob("test_*.py") if points(file)]
    quiet = ["-q", "-s", "--tb=native", "-p", "no:cacheprovider"]
    assert pytest.main([*map(str, files), *quiet], plugins=[found]) < 2  # 1: some solutions failed
    return found


def test_right_solutions_pass(grading):
    assert grading.unfair == []


def test_blanks_have_no_points(grading):
    assert grading.unasked == []


def test_wrong_solutions_are_caught(grading):
    assert grading.missed == []


def test_the_tables_are_in_step():
    found = {}
    for file in TESTS.glob("test_*.py"):
        found |= points(file)
    assert set(NAMES) == {wrong[0] for wrong in WRONG} == set(found)
    for mark, names in ASSIGNMENTS.items():
        assert mark == "lab" or sum(found[name] for name in names) == 10
        told = ", ".join(f"`{name}` {found[name]}" for name in names)
        assert told in " ".join(page_of(mark).split())


def test_blanks_are_blank_and_nothing_else_is():
    tree = ast.parse(TEXT)
    after = ast.parse(blank(TEXT, NAMES))
    for name in NAMES:
        node, blanked = find(tree, name), find(after, name)
        documented = ast.get_docstring(node)
        assert ast.get_docstring(blanked) == documented
        only = blanked.body[-1]
        assert isinstance(only, ast.Raise) and f"{name} {BLANK}" in ast.unparse(only)
        node.body = blanked.body = []
    assert ast.dump(tree) == ast.dump(after)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_handout_has_no_solution_but_those_that_it_needs(name, tmp_path):
    write_handout(tmp_path, name)
    student = ast.parse((tmp_path / "derain.py").read_text("utf-8"))
    for function in [*ASSIGNMENTS[name], *others(name)]:
        assert isinstance(find(student, function).body[-1], ast.Raise), function
    assert not (tmp_path / "tests" / "wrong.py").exists()
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "Hand in" in page and "instructor" not in page


def test_a_failure_says_what_differs_and_where():
    network = derain.ResNet(channels=4, blocks=1)
    image = torch.ones(1, 3, 4, 4, requires_grad=True)
    expected = network(image)
    other = expected + (torch.arange(48) == 2).view(1, 3, 4, 4)
    with pytest.raises(AssertionError, match=r"ResNet.forward .* by up to 1: at \(0, 0, 0, 2\)"):
        agree_forward(network, other, image)
    with pytest.raises(AssertionError, match="ResNet.forward: the gradient of its input differs"):
        agree_forward(network, expected.detach() + 0 * expected, image)
    with pytest.raises(AssertionError, match="add_ changes its argument number 1"):
        apply(torch.Tensor.add_, torch.ones(2), 1)


def command(*arguments, cwd=ROOT):
    """Run a Python program; return its status, and what it printed."""
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, text=True, capture_output=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_a_handout_stands_alone(tmp_path):
    """With two blanks, and in a folder whose name has a space."""
    folder = tmp_path / "my handout"
    write_handout(folder, "quantization")
    (folder / "derain.py").write_text(blank(TEXT, ["VQGANPrior.draw", "train"]), "utf-8")
    status, printed, _ = command("-m", "pytest", cwd=folder)
    assert status == 1 and printed.endswith("\nderain.py: quantization 8/10\n")
    assert "quantization: Codebook.forward 3/3" in printed
    assert f"VQGANPrior.draw {BLANK}" in printed
    status, printed, _ = command("-m", "pytest", "-k", "PixelAttention.forward", cwd=folder)
    assert status == 0 and printed.endswith("\nderain.py: quantization 2/10\n")


def test_the_loop_of_the_instructor(tmp_path):
    """The first hand-in skips a test and has an endless loop; the others cannot be graded."""
    add_rain, drops = [sources(TEXT)[name] for name in ("add_rain", "drops")]
    slow = "import sys\n\nsys.modules['grader'].LIMIT = 3\n" + TEXT
    slow = slow.replace(drops, "def drops(noise, quantity):\n    while True:\n        pass\n")
    no_file = ", it cannot be imported: "
    hand_ins = {
        "a b.py": (slow.replace(add_rain, "from pytest import skip as add_rain"), '7,"/10"'),
        "b.py": (
            "import nothing",
            f"0,\"{no_file}ModuleNotFoundError: No module named 'nothing'\"",
        ),
        "c.txt": (TEXT, f'0,"{no_file}ImportError: its name does not end in .py"'),
        "d.py": (
            "import os\nos._exit(0)",
            '0,", it ended the process, or took 600 s, when it was imported"',
        ),
        "e.py": (
            TEXT.replace(add_rain, "def add_rain(background, rain):\n    os._exit(0)"),
            '0,", it ended the process, or took 600 s, in test_add_rain_is_limited_and_grey"',
        ),
    }
    expected = []
    (tmp_path / "hand-ins").mkdir()
    for name, (text, score) in hand_ins.items():
        (tmp_path / "hand-ins" / name).write_text(text, "utf-8")
        expected.append(f'"{tmp_path}/hand-ins/{name}",{score}')
    page = (TESTS / "coursework.md").read_text("utf-8")
    loop = re.search(r"^    mkdir .*? > grades.csv$", page, re.M | re.S)[0]
    for path in ("hand-ins", "logs", "grades.csv"):
        loop = loop.replace(path, f'"{tmp_path}"/{path}')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", loop], cwd=ROOT, env={**os.environ, "PATH": path}, check=True)
    assert (tmp_path / "grades.csv").read_text().splitlines() == expected
    assert "stopped after 3 s" in (tmp_path / "logs" / "a b.py.txt").read_text()


@pytest.mark.parametrize(
    "wrong", ["rane -o x.py", "rain -o tests", "rain -o no/where.py", "rain lab -o folder"]
)
def test_bad_input_is_one_line(wrong):
    status, _, errors = command("tests/make_assignment.py", *wrong.split())
    assert status == 1 and errors.count("\n") == 1
