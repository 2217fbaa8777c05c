"""Write a copy of derain.py with some functions left to the student, or a folder that stands alone.

python tests/make_assignment.py                       which assignments there are
python tests/make_assignment.py rain -o student.py    one, or several; graded by
python -m pytest -m rain --module student.py
python tests/make_assignment.py rain -o handout/      a folder, where `pytest -m rain` grades

What each asks is in tests/coursework.md.
"""

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

from grader import BLANK, LIMIT
from wrong import SOURCE, find

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MEASURES = ["rain_mask", "decoupled_sums", "decoupled_measures", "decoupled_evaluation", "psnr"]
ASSIGNMENTS = {
    "lab": MEASURES,
    "rain": ["streak_kernel", "streak_seeds", "rain_layers", "add_rain"],
    "evaluation": [*MEASURES, "ssim"],
    "backgrounds": ["sharpness", "sample_patches", "training_patches"],
    "training": ["ResNet.forward", "pad_to_multiple", "UNet.forward", "train"],
    "attention": [
        "to_windows",
        "from_windows",
        "shift_mask",
        "WindowAttention.forward",
        "SwinBlock.forward",
    ],
    "quantization": [
        "ResidualBlock.forward",
        "PixelAttention.forward",
        "Codebook.forward",
        "VQGANPrior.draw",
        "VQGANPrior.loss",
    ],
}
# What a handout shows of other assignments, as its tests, its figure or its exercises call it.
SHOWN = {
    "lab": ["ssim"],
    "evaluation": ASSIGNMENTS["rain"],
    "training": sum(map(ASSIGNMENTS.get, ("rain", "evaluation", "backgrounds")), []),
}
SHOWN["attention"] = SHOWN["quantization"] = [*SHOWN["training"], "pad_to_multiple", "train"]

INTRODUCTION = """\
# derain: {name}

Install, in this folder, with Python 3.11 or newer (some minutes):

    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt

Below, `python` stands for `.venv/bin/python`. The paper: Hu et al., "Revisiting the
Generalization Problem of Low-level Vision Models Through the Lens of Image Deraining",
<https://arxiv.org/abs/2502.12600>.

Write the functions in derain.py that say "is not written yet", as their docstrings ask. What is
left to other assignments is not needed here. The tests grade derain.py, as often as you like:

    python -m pytest -m {name}

They take seconds; one that takes longer than {limit} s fails. The last line is your score:
`derain.py: {name} 2/9` says that 2 of 9 tests pass. The lines above it say so for each function.
An assignment (not the lab) has 12 points: 4 for the code, times this share; 4 for the ablation, of
which 2 are for a prediction, written before you run it; 2 for each of the first two questions.

{page}"""


def blank(source: str, names: list[str], reason: str = BLANK) -> str:
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


def others(name: str) -> list[str]:
    """Return the functions of other assignments that a handout does not need."""
    own = {*ASSIGNMENTS[name], *SHOWN.get(name, [])}
    return sorted({function for names in ASSIGNMENTS.values() for function in names} - own)


def write_handout(folder: Path, name: str) -> None:
    """Write a folder with the blanks, the tests that grade, and what they and the page refer to."""
    tests = []
    for file in TESTS.glob("test_*.py"):
        if re.search(rf"pytest\.mark\.{name}\b", file.read_text("utf-8")):
            tests.append(file)
    page = page_of(name)
    text = page + "".join(file.read_text("utf-8") for file in tests)
    helpers = [TESTS / f"{helper}.py" for helper in ("conftest", "grader", "golden")]
    data = [file for file in TESTS.glob("data/*") if file.name in text]
    linked = [ROOT / link for link in re.findall(r"\]\(\.\./([^)]+)\)", page)]
    for file in [*tests, *helpers, *data, *linked, ROOT / "requirements.txt"]:
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)

    student = blank(SOURCE.read_text("utf-8"), ASSIGNMENTS[name])
    student = blank(student, others(name), "is left to another assignment")
    (folder / "derain.py").write_text(student, "utf-8")
    readme = INTRODUCTION.format(name=name, limit=LIMIT, page=page.replace("](../", "]("))
    (folder / "README.md").write_text(readme, "utf-8")


def write_plugin() -> None:
    """Tell pytest of --module, wherever a student's file is, if it runs in the project's root.

    pytest loads the plugins that a folder *.egg-info names, as installed packages have one.
    """
    folder = ROOT / "grader.egg-info"
    folder.mkdir(exist_ok=True)
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: grader\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[pytest11]\ngrader = tests.grader\n")
    print(f"wrote {folder}, by which pytest knows --module")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Write a copy of derain.py with blanks.",
        epilog="example: make_assignment.py lab -o handout/",
    )
    parser.add_argument("assignments", nargs="*", help=", ".join(ASSIGNMENTS))
    parser.add_argument("-o", "--output", help="a new file, student.py, or a new folder, handout/")

    def fail(problem: str):
        print(f"make_assignment.py: {problem}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail
    args = parser.parse_args()
    if not args.assignments:
        for name, functions in ASSIGNMENTS.items():
            print(f"{name}: {', '.join(functions)}")
        return 0
    for name in args.assignments:
        if name not in ASSIGNMENTS:
            fail(f"there is no assignment {name!r}; there are {', '.join(ASSIGNMENTS)}")
    if not args.output:
        fail("say where the student's file goes, such as -o student.py")
    target = Path(args.output)
    if target.exists():
        fail(f"{target} is there already; move it away, or choose another name")
    if len(args.assignments) > 1 and target.suffix != ".py":
        fail("one assignment a folder, please")

    names = sorted({name for chosen in args.assignments for name in ASSIGNMENTS[chosen]})
    try:
        if target.suffix == ".py":
            student = blank(SOURCE.read_text("utf-8"), names)
            target.write_text(student, "utf-8")
            write_plugin()
        else:
            write_handout(target, args.assignments[0])
    except OSError as problem:
        fail(f"{target} cannot be written: {problem.strerror}")
    print(f"wrote {target}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
