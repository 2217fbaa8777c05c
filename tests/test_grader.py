"""Coursework: blanks are blank and nothing else; right solutions pass, wrong ones are caught."""

import ast
import subprocess
import sys

import pytest

import derain
from conftest import ROOT
from grader import MARKS
from make_assignment import ASSIGNMENTS, BLANK, blank, page_of, write_handout
from wrong import SOURCE, WRONG, find, put, source_of

# A right solution that looks different; the tests must pass it.
IN_NUMPY = """
def decoupled_evaluation(output, rainy, clean):
    if output.shape != rainy.shape or rainy.shape != clean.shape:
        raise ValueError("these do not belong together")
    o, r, b = (t.numpy().astype(np.float64) * 255 for t in (output, rainy, clean))
    wet = np.repeat(rain_mask(rainy, clean).numpy(), 3, axis=1)
    def rms(x):
        return float(np.sqrt((x ** 2).sum() / x.size)) if x.size else math.nan
    try:
        similar = ssim(output, clean)
    except ValueError:
        similar = math.nan
    return {"ssim": similar, "psnr": psnr(output, clean), "E_B": rms(o[~wet] - b[~wet]),
            "E_W": rms(o[wet] - b[wet]), "E_R": rms(o[wet] - r[wet]),
            "E_R_ideal": rms(b[wet] - r[wet])}
"""

# Right solutions that differ in a part: the function, what derain.py says, what they say.
RIGHT = (
    ("rain_mask", "difference > RAIN_THRESHOLD + 1e-6", "255 * difference.double() > 4.0001"),
    ("rain_mask", ".abs().amax(1, keepdim=True)", ".square().amax(1, keepdim=True).sqrt()"),
    ("decoupled_evaluation", "difference.double()", "difference"),
    ("psnr", "(-10 * torch.log10(mse))", "(20 * torch.log10(1 / mse.sqrt()))"),
    ("psnr", "(output.double() - clean.double()).square()", "((clean - output) ** 2)"),
    ("ssim", "F.conv2d(F.conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))",
     "F.conv2d(image, torch.outer(window, window)[None, None])"),
    ("train", '"training", step)', '"mine", step)'),
    ("train", "fused=True", "lr=RATE"),
    ("Codebook.forward", "(codes.square().sum(1) - 2 * vectors @ codes.T)",
     "(vectors[..., None, :] - codes).square().sum(-1)"),
    ("Codebook.forward", "latent + (quantized - latent).detach()",
     "latent - latent.detach() + quantized.detach()"),
)


class Session:
    """A pytest run in this process: puts in each solution in turn, and runs its marked tests."""

    def __init__(self):
        self.caught, self.unfair = {}, []

    def pytest_runtestloop(self, session):
        from _pytest.runner import runtestprotocol
        solutions = [("add_rain", "", source_of("add_rain"))]  # the reference
        solutions.append(("decoupled_evaluation", "", IN_NUMPY))
        for function, old, new in RIGHT:
            assert old in source_of(function), f"{function} no longer says {old!r}"
            solutions.append((function, "", source_of(function).replace(old, new)))
        for function, mistake, old, new in WRONG:
            solutions.append((function, mistake, source_of(function).replace(old, new)))
        module = None
        for function, mistake, source in solutions:
            marks = [mark for mark, names in ASSIGNMENTS.items() if function in names]
            with pytest.MonkeyPatch.context() as patch:
                put(patch, derain, function, source)
                for item in session.items:
                    if not any(item.get_closest_marker(mark) for mark in marks):
                        continue
                    if item.module is not module:  # within a module its fixtures are kept
                        session._setupstate.teardown_exact(None)
                        module = item.module
                    others = [i for i in session.items if i.module is module and i is not item]
                    reports = runtestprotocol(item, log=False, nextitem=others[0])
                    if any(report.failed for report in reports):
                        if mistake:
                            self.caught[function, mistake] = item.name
                            break
                        self.unfair.append((function, item.name))
        return True


@pytest.fixture(scope="module")
def session() -> Session:
    found = Session()
    files = [ROOT / "tests" / f"test_{name}.py" for name in
             ("rain", "evaluation", "backgrounds", "training", "networks", "vqgan")]
    pytest.main([*map(str, files), "-q", "-s", "--tb=native", "--no-header",
                 "-p", "no:cacheprovider", "-p", "no:faulthandler"], plugins=[found])
    return found


@pytest.mark.parametrize("wrong", WRONG, ids=[" ".join(wrong[:2]) for wrong in WRONG])
def test_wrong_solutions_are_caught(session, wrong):
    function, mistake, old, _ = wrong
    assert old in source_of(function), f"{function} no longer says {old!r}: mend wrong.py"
    assert (function, mistake) in session.caught, f"{function}: the tests do not see {mistake!r}"


def test_right_solutions_pass(session):
    assert session.unfair == [] and session.caught


def test_the_tables_are_in_step():
    assert set(ASSIGNMENTS) == set(MARKS)
    functions = {name for names in ASSIGNMENTS.values() for name in names}
    assert functions == {wrong[0] for wrong in WRONG}
    for name, names in ASSIGNMENTS.items():
        assert all(f"`{function}`" in page_of(name) for function in names), name


def test_blanks_are_blank_and_nothing_else_is():
    names = sorted({wrong[0] for wrong in WRONG})
    source = SOURCE.read_text(encoding="utf-8")
    tree, after = ast.parse(source), ast.parse(blank(source, names))
    for name in names:
        node, blanked = find(tree, name), find(after, name)
        assert ast.get_docstring(node) == ast.get_docstring(blanked)
        assert isinstance(blanked.body[-1], ast.Raise) and BLANK in ast.unparse(blanked)
        assert len(blanked.body) == 1 + (ast.get_docstring(node) is not None)
        node.body, blanked.body = [], []
    assert ast.dump(tree) == ast.dump(after)


def command(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=100)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_handout_has_no_solution(name, tmp_path):
    source = SOURCE.read_text(encoding="utf-8")
    write_handout(tmp_path, name, blank(source, ASSIGNMENTS[name]))
    files = [*tmp_path.rglob("*.py"), *tmp_path.rglob("*.md")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for function in ASSIGNMENTS[name]:
        node = find(ast.parse(source), function)
        body = source.splitlines()[node.body[0].end_lineno:node.end_lineno]
        assert f"`{function}`" in text and max(body, key=len).strip() not in text
    assert "wrong.py" not in {file.name for file in files}
    assert str(ROOT) not in text and "   - 2:" not in text  # no rubric


def test_a_handout_stands_alone(tmp_path):
    folder = tmp_path / "handout"
    assert command("tests/make_assignment.py", "quantization", "-o", folder).returncode == 0
    graded = command("-m", "pytest", "-q", "-m", "quantization", cwd=folder)
    assert graded.returncode == 1 and "Codebook.forward is not written yet" in graded.stdout
    assert "Traceback" not in graded.stdout and " passed" not in graded.stdout
    (folder / "derain.py").write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    assert command("-m", "pytest", "-q", "-m", "quantization", cwd=folder).returncode == 0


def test_a_file_is_graded_in_one_line(tmp_path):
    student = tmp_path / "eve.py"
    assert command("tests/make_assignment.py", "lab", "-o", student).returncode == 0
    graded = command("-m", "pytest", "tests", "-q", "-m", "lab", "--module", student)
    assert graded.stdout.splitlines()[-1].startswith("eve.py: lab 0/"), graded.stdout
    student.write_text("import nothing_of_the_kind")
    graded = command("-m", "pytest", "tests", "-m", "lab", "--module", student)
    assert graded.returncode == 1 and "eve.py: 0, as it cannot be imported" in (
        graded.stdout + graded.stderr)


def test_tests_of_students_are_graded(tmp_path):
    mine = tmp_path / "mine.py"
    assert command("tests/make_assignment.py", "testing", "-o", mine).returncode == 0
    mine.write_text(mine.read_text() + "    with pytest.raises(ValueError):\n"
                    "        derain.psnr(clean, clean[..., :9])\n\ndef test_b():\n    assert False")
    graded = command("tests/make_assignment.py", "--grade", mine)
    assert graded.returncode == 1 and "caught: decoupled_evaluation, E_R against" in graded.stdout
    assert "missed: psnr, 20 log10" in graded.stdout and "1 unfair" in graded.stdout
    assert "caught: psnr, shapes unchecked" in graded.stdout


@pytest.mark.parametrize("wrong", [("rane", "-o", "x.py"), ("rain",), ("rain", "--hard"),
                                   ("rain", "-o", "tests"), ("rain", "-o", "no/where.py"),
                                   ("--grade", "nothing.py")])
def test_bad_input_is_one_line(wrong):
    refused = command("tests/make_assignment.py", *wrong)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
