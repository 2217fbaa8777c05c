"""Write a copy of derain.py with some functions left to the student, or a folder that stands alone.

    python tests/make_assignment.py                       which assignments there are
    python tests/make_assignment.py rain -o student.py    one, or several; graded by
    python -m pytest -m rain --module student.py
    python tests/make_assignment.py rain -o handout/      a folder, where `pytest -m rain` grades
    python tests/make_assignment.py testing -o mine.py    the student writes tests, graded by
    python tests/make_assignment.py --grade mine.py

What each asks is in tests/coursework.md.
"""

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

from wrong import SOURCE, WRONG, find, put, source_of

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BLANK = "is not written yet"  # ends the message of each blank; grader.py knows blanks by it
EVALUATION = ["rain_mask", "decoupled_evaluation", "psnr"]
ASSIGNMENTS = {
    "lab": EVALUATION,
    "rain": ["streak_kernel", "streak_seeds", "rain_layers", "add_rain"],
    "evaluation": [*EVALUATION, "ssim"],
    "backgrounds": ["sharpness", "sample_patches", "draw_dead_leaves"],
    "training": ["ResNet.forward", "pad_to_multiple", "UNet.forward", "train"],
    "attention": ["to_windows", "from_windows", "shift_mask", "WindowAttention.forward",
                  "SwinBlock.forward"],
    "quantization": ["ResidualBlock.forward", "PixelAttention.forward", "Codebook.forward",
                     "VQGANPrior.draw", "VQGANPrior.loss"],
}
TEST_FILE = '''"""Tests of rain_mask, decoupled_evaluation and psnr, from their docstrings.

Each test is a function that takes no arguments: no fixtures, no parametrize.
None of the three may change its inputs, whatever these are.
"""

import pytest
import torch

import derain


def test_nothing_done_is_nothing_removed():
    """An example, which catches little."""
    clean = torch.full((1, 3, 20, 20), 0.4)
    rainy = clean.clone()
    rainy[..., :5] += 0.3
    assert derain.decoupled_evaluation(rainy, rainy, clean)["E_R"] == 0
'''


def blank(source: str, names: list[str]) -> str:
    """The source with the body of each named function replaced by a raise; docstrings stay."""
    tree, lines = ast.parse(source), source.split("\n")
    nodes = {find(tree, name): name for name in names}
    for node in sorted(nodes, key=lambda node: -node.lineno):
        documented = ast.get_docstring(node) is not None
        start = node.body[0].end_lineno if documented else node.body[0].lineno - 1
        message = f'raise NotImplementedError("{nodes[node]} {BLANK}")'
        lines[start:node.end_lineno] = [" " * node.body[0].col_offset + message]
    return "\n".join(lines)


def page_of(name: str) -> str:
    """The part of coursework.md about an assignment."""
    text = (TESTS / "coursework.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {name}\b.*?(?=^## |\Z)", text, re.M | re.S)
    return found[0] if found else ""


def write_handout(folder: Path, name: str, student: str) -> None:
    """A folder with the blanks, the tests that grade, and what they and the page refer to."""
    tests = [file for file in TESTS.glob("test_*.py")
             if f"pytest.mark.{name}\n" in file.read_text(encoding="utf-8")]
    page = re.sub(r"^   - [012]: .*\n", "", page_of(name), flags=re.M)  # without the rubrics
    text = page + "".join(file.read_text(encoding="utf-8") for file in tests)
    files = tests + [TESTS / f"{helper}.py" for helper in ("conftest", "grader", "golden")]
    files += [file for file in TESTS.glob("data/*") if file.name in text]
    files += [ROOT / link for link in re.findall(r"\]\(\.\./([^)]+)\)", page)]
    for file in [*files, ROOT / "requirements.txt"]:
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "derain.py").write_text(student, encoding="utf-8")
    grading = (f"`python -m pytest -m {name}` grades derain.py.  The code's points are the share of"
               " tests that pass, halved if the ablation is not run and reported.\n\n")
    (folder / "README.md").write_text(grading + page.replace("](../", "]("), encoding="utf-8")


def failures(file: Path) -> dict[str, str]:
    """The student's tests that fail on the module as it is now, and how."""
    import pytest
    problems = {}
    mine = {"__name__": "mine"}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), mine)
    for name in [name for name in mine if name.startswith("test")]:
        try:
            mine[name]()
        except (Exception, pytest.fail.Exception) as problem:  # the second is none of the first
            problems[name] = f"{type(problem).__name__} {problem}".splitlines()[0]
    return problems


def grade_tests(file: Path) -> int:
    """Run the student's tests on the right solution and on wrong ones; returns the exit status."""
    import pytest
    sys.path.insert(0, str(ROOT))
    import derain
    try:
        unfair = failures(file)
    except Exception as problem:
        print(f"{file} cannot be run: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    caught, all_wrong = 0, [wrong for wrong in WRONG if wrong[0] in EVALUATION]
    for function, mistake, old, new in all_wrong:
        with pytest.MonkeyPatch.context() as patch:
            put(patch, derain, function, source_of(function).replace(old, new))
            found = failures(file).keys() - unfair.keys()
        caught += bool(found)
        print(f"{'caught' if found else 'missed'}: {function}, {mistake}")
    for name, problem in unfair.items():
        print(f"unfair: {name} fails on the right solution ({problem}), and does not count")
    print(f"{file.name}: {caught} of {len(all_wrong)} wrong solutions caught, {len(unfair)} unfair")
    return int(bool(unfair))


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a copy of derain.py with blanks.",
                                     epilog="example: make_assignment.py lab -o handout/")
    parser.add_argument("assignments", nargs="*", help=f"{', '.join(ASSIGNMENTS)}; or testing")
    parser.add_argument("-o", "--output", help="a new file, student.py, or a new folder, handout/")
    parser.add_argument("--grade", type=Path, metavar="FILE", help="tests that a student wrote")

    def fail(problem: str):
        print(f"make_assignment.py: {problem}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail
    args = parser.parse_args()
    if args.grade:
        if not args.grade.is_file():
            fail(f"{args.grade}: no such file")
        return grade_tests(args.grade)
    if not args.assignments:
        for name, functions in ASSIGNMENTS.items():
            print(f"{name}: {', '.join(functions)}")
        print("testing: tests of rain_mask, decoupled_evaluation and psnr")
        return 0
    for name in args.assignments:
        if name not in (*ASSIGNMENTS, "testing"):
            fail(f"there is no assignment {name!r}; there are {', '.join(ASSIGNMENTS)}, testing")
    if not args.output:
        fail("say where the student's file goes, such as -o student.py")
    target = Path(args.output)
    if target.exists():
        fail(f"{target} is there already; move it away, or choose another name")
    if len(args.assignments) > 1 and (target.suffix != ".py" or "testing" in args.assignments):
        fail("one assignment a folder, and testing alone, please")
    names = [name for chosen in args.assignments for name in ASSIGNMENTS.get(chosen, [])]
    student = blank(SOURCE.read_text(encoding="utf-8"), names)
    try:
        if args.assignments == ["testing"]:
            target.write_text(TEST_FILE, encoding="utf-8")
        elif target.suffix == ".py":
            target.write_text(student, encoding="utf-8")
            beside = ROOT / "conftest.py"  # or pytest takes student.py for a test
            if target.resolve().parent == ROOT and not beside.exists():
                beside.write_text(f"import sys\n\nsys.path.insert(0, {str(TESTS)!r})\n"
                                  'pytest_plugins = ["grader"]\n')
                print(f"wrote {beside}, which tells pytest of --module")
        else:
            write_handout(target, args.assignments[0], student)
    except OSError as problem:
        fail(f"{target} cannot be written: {problem.strerror}")
    print(f"wrote {target}: {', '.join(names) or 'an example of a test'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
