"""Write a copy of derain.py with some functions left to the student, or a folder that stands alone.

python tests/make_assignment.py                       which assignments there are
python tests/make_assignment.py rain -o student.py    one, or several; graded by
python -m pytest -m rain --module=student.py
python tests/make_assignment.py rain -o handout/      a folder, where `python -m pytest` grades

What each asks is in tests/coursework.md.
"""

import argparse
import ast
import re
import shutil
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from grader import ASSIGNMENTS, BLANK, LIMIT

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCE = ROOT / "derain.py"
# The assignments that a handout shows solved, as its tests, its figure or its exercises call them.
SHOWN = {
    "lab": ["evaluation"],
    "rain": [],
    "evaluation": ["rain", "backgrounds"],
    "backgrounds": ["rain", "evaluation", "training"],
    "training": ["rain", "evaluation", "backgrounds"],
    "attention": ["rain", "evaluation", "backgrounds", "training"],
    "quantization": ["rain", "evaluation", "backgrounds", "training"],
}

INTRODUCTION = """\
# derain: {name}

Install, in this folder, with Python 3.11 or newer (some minutes):

    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt

Below, `python` stands for `.venv/bin/python`. The paper: Hu et al., "Revisiting the
Generalization Problem of Low-level Vision Models Through the Lens of Image Deraining",
<https://arxiv.org/abs/2502.12600>.

Write the functions in derain.py that say "is not written yet", as their docstrings ask, in the
order in which they stand below. What is left to other assignments is not needed here. These grade
derain.py, as often as you like: all of it, or one function, after you have written it.

    python -m pytest
    python -m pytest -k {first}

The last line is your score, the lines above it are that of each function. A test has all its points
or none. When a function is tested, right ones stand in for the others, so a mistake costs its own
points only. A test that takes longer than {limit} s fails.

An assignment (not the lab) has 30 points: 10 for the code, which is the score; 10 for the ablation:
4 for a prediction with its reason, written before the run, right or wrong, and 6 for the plot and a
sentence that it bears; 5 for each of questions 1 and 2, an answer of some lines with its reason.

{page}"""


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """Return the function of a dotted name, such as "ResNet.forward"."""
    node = tree
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    return node


def points(file: Path) -> Counter[str]:
    """Return how many points each function has in the tests of a file."""
    found = Counter()
    for function, number in re.findall(r'@graded\("(.+)", (\d)\)', file.read_text("utf-8")):
        found[function] += int(number)
    return found


def blank(source: str, names: Collection[str], reason: str = BLANK) -> str:
    """Return the source with the body of each named function replaced; docstrings stay."""
    tree = ast.parse(source)
    lines = source.split("\n")
    nodes = {find(tree, name): name for name in names}
    for node in sorted(nodes, key=lambda node: -node.lineno):
        documented = ast.get_docstring(node) is not None
        start = node.body[0].end_lineno if documented else node.body[0].lineno - 1
        message = f'raise NotImplementedError("{nodes[node]} {reason}")'
        lines[start : node.end_lineno] = [" " * node.body[0].col_offset + message]
    return "\n".join(lines)


def page_of(name: str) -> str:
    """Return the part of coursework.md about an assignment, without that for the instructor."""
    text = (TESTS / "coursework.md").read_text("utf-8")
    page = re.search(rf"^## {name}\n.*?(?=^### For the instructor|^## )", text, re.M | re.S)
    return page[0]


def others(name: str) -> set[str]:
    """Return the functions that a handout neither asks for nor shows."""
    known = {function for part in (name, *SHOWN[name]) for function in ASSIGNMENTS[part]}
    return {function for part in ASSIGNMENTS.values() for function in part} - known


def write_handout(folder: Path, name: str) -> None:
    """Write a folder with the blanks, the tests that grade, and what they and the page refer to."""
    page = page_of(name)
    files = [TESTS / f"{helper}.py" for helper in ("conftest", "grader", "golden")]
    files += [file for file in TESTS.glob("data/*") if file.name in page]
    files += [ROOT / link for link in re.findall(r"\]\(\.\./([^)]+)\)", page)]
    for file in TESTS.glob("test_*.py"):
        if set(points(file)) & set(ASSIGNMENTS[name]):
            files.append(file)
    for file in [*files, ROOT / "requirements.txt"]:
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)

    student = blank(SOURCE.read_text("utf-8"), ASSIGNMENTS[name])
    student = blank(student, others(name), "is left to another assignment")
    (folder / "derain.py").write_text(student, "utf-8")
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = -m {name} --tb=short\n")
    first = ASSIGNMENTS[name][0]
    page = page.replace("](../", "](")
    readme = INTRODUCTION.format(name=name, first=first, limit=LIMIT, page=page)
    (folder / "README.md").write_text(readme, "utf-8")


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Write a copy of derain.py with blanks.",
        epilog="example: make_assignment.py lab -o handout/",
    )
    parser.add_argument("assignments", nargs="*", help=", ".join(ASSIGNMENTS))
    parser.add_argument("-o", "--output", help="a new file, student.py, or a new folder, handout/")
    args = parser.parse_args()
    if not args.assignments:
        for name, functions in ASSIGNMENTS.items():
            print(f"{name}: {', '.join(functions)}")
        return
    for name in args.assignments:
        if name not in ASSIGNMENTS:
            sys.exit(f"there is no assignment {name!r}; there are {', '.join(ASSIGNMENTS)}")
    if not args.output:
        sys.exit("say where the student's file goes, such as -o student.py")
    target = Path(args.output)
    if target.exists():
        sys.exit(f"{target} is there already; move it away, or choose another name")
    if len(args.assignments) > 1 and target.suffix != ".py":
        sys.exit("one assignment a folder, please")

    names = {name for chosen in args.assignments for name in ASSIGNMENTS[chosen]}
    try:
        if target.suffix == ".py":
            target.write_text(blank(SOURCE.read_text("utf-8"), names), "utf-8")
        else:
            write_handout(target, args.assignments[0])
    except OSError as problem:
        sys.exit(f"{target} cannot be written: {problem.strerror}")
    print(f"wrote {target}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
