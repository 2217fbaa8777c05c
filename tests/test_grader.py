"""The coursework: are blanks blank and nothing else, does grading survive what students hand in, and are the tests
good graders, which catch the wrong solutions that students really write?"""

import ast
import functools
import os
import subprocess
import sys
import textwrap
import time

import pytest

import derain
from conftest import ROOT
from grader import GRADES, TooLong, graded, import_problem, key_of, limited
from make_assignment import ASSIGNMENTS, SOURCE, blank, find

# function, the mistake, what the right solution says, what the wrong one says instead
WRONG = (
    ("streak_kernel", "degrees for radians", "torch.deg2rad(direction)", "direction"),
    ("streak_kernel", "leans the other way", "torch.deg2rad(direction)", "torch.deg2rad(-direction)"),
    ("streak_kernel", "sigma for width at half brightness", "width / math.sqrt(8 * math.log(2))", "width"),
    ("streak_kernel", "half the length for the length", "length / 2", "length"),
    ("streak_kernel", "scaled to a sum of 1", "/ (2 * torch.erf(length / 2 / blur))", "/ box.sum()"),
    ("draw_factors", "one draw for the whole batch", "rng.uniform(low, high, n)", "np.full(n, rng.uniform(low, high))"),
    ("draw_factors", "mirrors all or none", "rng.choice([-1, 1], n)", "rng.choice([-1, 1])"),
    ("streak_seeds", "threshold on the wrong side", "above > 0", "above < 0"),
    ("streak_seeds", "all streaks equally bright", "low + (high - low) * above", "torch.full_like(above, high)"),
    ("streak_seeds", "seeds per 1,000 pixels", "10_000", "1_000"),
    ("render_rain", "kernel flipped from left to right", "rfft2(kernel,", "rfft2(kernel.flip(-1),"),
    ("render_rain", "one kernel for the whole batch", "rfft2(kernel,", "rfft2(kernel[:1],"),
    ("render_rain", "one noise for the whole batch", "(len(factors), *canvas)", "(1, *canvas)"),
    ("render_rain", "streaks wrap around", "margin:margin + height, margin:margin + width", ":height, :width"),
    ("render_rain", "not clipped", "rain.clamp(0, 1)", "rain"),
    ("add_rain", "not clipped", ".clamp(0, 1)", ""),
    ("add_rain", "in one channel only", "background + rain",
     "torch.cat([background[:, :1] + rain, background[:, 1:]], 1)"),
    ("rain_mask", "threshold included", "> threshold", ">= threshold"),
    ("rain_mask", "mean of the channels", "rain.amax(1", "rain.mean(1"),
    ("decoupled_evaluation", "mask of one channel", "rain_mask(rain).expand_as(clean)",
     "torch.cat([rain_mask(rain), torch.zeros_like(clean[:, 1:]).bool()], 1)"),
    ("decoupled_evaluation", "mean of roots for root of means", ".square().mean().sqrt()", ".square().sqrt().mean()"),
    ("decoupled_evaluation", "E_R against the clean image", "(output - rainy)[mask]", "(output - clean)[mask]"),
    ("decoupled_evaluation", "E_B on the mask", "[~mask]", "[mask]"),
    ("decoupled_evaluation", "not in grey levels", "255 * ", ""),
    ("psnr", "of the mean over all images", ".flatten(1).mean(1)", ".mean()"),
    ("psnr", "20 log10 of the squared error", "-10 *", "-20 *"),
    ("ssim", "zero padding", "x, y = x.double(), y.double()", "x, y = (F.pad(z.double(), (5,) * 4) for z in (x, y))"),
    ("ssim", "a flat window", "np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)", "np.ones(11)"),
    ("ssim", "of the mean of the channels", "zip(output.flatten(0, 1), clean.flatten(0, 1))",
     "zip(output.mean(1), clean.mean(1))"),
    ("sharpness", "sum of the two differences", "torch.hypot(dx, dy)", "(dx.abs() + dy.abs())"),
    ("sharpness", "one channel for grey", "patches.mean(1)", "patches[:, 0]"),
    ("sample_patches", "never the last row and column", "side - size + 1", "max(side - size, 1)"),
    ("sample_patches", "images drawn with replacement",
     "np.concatenate([rng.permutation(len(images)) for _ in range(math.ceil(n / len(images)))])[:n]",
     "rng.integers(len(images), size=n)"),
    ("draw_leaves", "radii all alike", "(smallest ** -2 * (1 - u) + largest ** -2 * u) ** -0.5", "smallest + u"),
    ("draw_leaves", "radii uniform", "(smallest ** -2 * (1 - u) + largest ** -2 * u) ** -0.5",
     "smallest + (largest - smallest) * u"),
    ("draw_leaves", "too few leaves, with gaps", "math.ceil(8 * ", "math.ceil(0.2 * "),
    ("noise_degradation", "salt and pepper in each channel by itself", "(n, 1, height, width)", "clean.shape"),
    ("noise_degradation", "uniform noise never negative", "(2 * torch.from_numpy(rng.random(clean.shape, "
     "dtype=np.float32)) - 1)", "2 * torch.from_numpy(rng.random(clean.shape, dtype=np.float32))"),
    ("noise_degradation", "blur that weakens the noise", "blur.square().sum().sqrt()", "blur.sum()"),
    ("noise_degradation", "one level for the whole batch", "(n, 1, 1, 1))", "(1, 1, 1, 1))"),
    ("noise_degradation", "residual taken after clipping", "clamp(0, 1), noise",
     "clamp(0, 1), (clean + noise).clamp(0, 1) - clean"),
    ("dense_evaluation", "projected on the change", "(change * noise).sum() / noise", "(change * noise).sum() / change"),
    ("dense_evaluation", "damage with the noise left over", "change - share * noise", "output - clean"),
    ("ResNet.forward", "blocks that replace", "features + block(features)", "block(features)"),
    ("ResNet.forward", "the skip always added", " if self.skip else self.tail(features)", ""),
    ("pad_to_multiple", "at the left and the top", "(0, right, 0, bottom)", "(right, 0, bottom, 0)"),
    ("UNet.forward", "details lost", "details.pop()", "torch.zeros_like(details.pop())"),
    ("train", "gradients that add up", "optimizer.zero_grad()", "pass"),
    ("train", "a stream that starts again when training goes on", '"training", step)', '"training", step - start)'),
    ("train", "never mirrored", "< 0.5", "< 0"),
    ("train", "a constant rate", "rate * 0.5 * (1 + math.cos(math.pi * step / steps))", "rate"),
    ("to_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("from_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("shift_mask", "the wrong way round", "0.0, -math.inf", "-math.inf, 0.0"),
    ("shift_mask", "across one pair of edges only", "3 * band(h)[:, None] + band(w)", "band(h)[:, None] + 0 * band(w)"),
    ("WindowAttention.forward", "scaled by all channels", "(c // self.heads) ** -0.5", "c ** -0.5"),
    ("WindowAttention.forward", "offsets the wrong way", "[self.offset]", "[self.offset.T]"),
    ("WindowAttention.forward", "softmax over the queries", ".softmax(-1)", ".softmax(-2)"),
    ("SwinBlock.forward", "shift not undone", "attended.roll((shift, shift), (1, 2)) if shift else attended", "attended"),
    ("SwinBlock.forward", "shift the wrong way", "(-shift, -shift)", "(shift, shift)"),
    ("SwinBlock.forward", "no mask", "mask = shift_mask(", "_ = shift_mask("),
    ("ResidualBlock.forward", "no shortcut", "self.nin_shortcut(x) + ", ""),
    ("ResidualBlock.forward", "one swish too few", "F.silu(self.norm2(y))", "self.norm2(y)"),
    ("PixelAttention.forward", "keys and queries swapped", "(q, k, v)", "(k, q, v)"),
    ("PixelAttention.forward", "attends to the input, not to its normalization", "y = self.norm(x)", "y = x"),
    ("Codebook.forward", "no straight-through gradient", "latent + (quantized - latent).detach()", "quantized"),
    ("Codebook.forward", "beta on the wrong term", "F.mse_loss(quantized.detach(), latent) + 0.25 * F.mse_loss("
     "quantized, latent.detach())", "0.25 * F.mse_loss(quantized.detach(), latent) + F.mse_loss("
     "quantized, latent.detach())"),
    ("Codebook.forward", "no stop-gradient in the loss", "quantized.detach(), latent)", "quantized, latent)"),
    ("Codebook.forward", "largest product for smallest distance", "(codes.square().sum(1) - 2 *", "(-2 *"),
    ("VQGANPrior.forward", "shows [-1, 1] for [0, 1]", "+ 1) / 2", ")"),
    ("VQGANPrior.forward", "cropped at the wrong side", "[..., :degraded.shape[2], :degraded.shape[3]]",
     "[..., -degraded.shape[2]:, -degraded.shape[3]:]"),
    ("VQGANPrior.loss", "the latent, not its codes, as target", "target, _, _ = self.vqgan.quantize("
     "self.teacher(prepare(clean, self.vqgan.encoder)))", "target = self.teacher(prepare(clean, self.vqgan.encoder))"),
    ("VQGANPrior.loss", "taught by itself", "self.teacher(", "self.vqgan.encode("),
    ("VQGANPrior.loss", "images in [0, 1]", "self.vqgan.encode(prepare(degraded, self.vqgan.encoder))",
     "self.vqgan.encode((prepare(degraded, self.vqgan.encoder) + 1) / 2)"),
    ("training_patches", "few that are not among the many", "max(run.n, NUMBERS[-1])", "run.n"),
    ("training_patches", "low and high swapped", '"low": 0, "middle": run.n, "high": 2 * run.n',
     '"low": 2 * run.n, "middle": run.n, "high": 0'),
    ("results", "the training noise among the others", "{*NOISE} - {run.trained_on}", "{*NOISE}"),
    ("results", "shares for percent", "100 * row", "row"),
    ("verdict", "most seeds are enough", "signs = set(np.sign(list(effects)))",
     "signs = {np.sign(np.median(np.nan_to_num(list(effects))))}"),
    ("verdict", "zero counts as above", "np.sign(list(effects))", "np.where(np.array(list(effects)) >= 0, 1, -1)"),
    ("verdict_rows", "spread over panels and seeds together", "found.mean(0).std(ddof", "found.std(ddof"),
    ("verdict_rows", "spread of a population", "ddof=min(1, seeds - 1)", "ddof=0"),
    ("verdict_rows", "one panel is enough to agree", "(found > 0).all(0)", "(found > 0).any(0)"),
    ("verdict_rows", "a verdict from too few seeds", "if seeds >= SEEDS", "if seeds >= 2"),
)


@functools.cache
def sources() -> dict[str, str]:
    """Of each function in WRONG its source, without decorators."""
    text = SOURCE.read_text()
    tree, lines = ast.parse(text), text.split("\n")
    nodes = {wrong[0]: find(tree, wrong[0]) for wrong in WRONG}
    return {name: textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno])) for name, node in nodes.items()}


def put(monkeypatch, name: str, old: str, new: str) -> None:
    """Replace a function or method of derain by one whose source says `new` where it said `old`."""
    *owner, last = name.split(".")
    owner, source, made = getattr(derain, owner[0]) if owner else derain, sources()[name], {}
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "wrong", "exec"), vars(derain), made)
    monkeypatch.setattr(owner, last, made[last])


class Session:
    """A pytest run in this process that, in place of running all tests, runs for each mistake those that grade it."""

    def __init__(self):
        self.keys, self.caught, self.unfair = [], {}, set()  # unfair: tests that fail without any mistake, too

    def pytest_runtestloop(self, session):
        from _pytest.runner import runtestprotocol
        items = {key_of(item.nodeid): item for item in session.items}
        self.keys, module, catchers = list(items), None, {}
        for function, mistake, old, new in (*WRONG, ("add_rain", "", "", "")):
            right = not mistake  # last of all, the tests that caught something meet the reference
            chosen = [item for test in GRADES for key, item in items.items()
                      if function in GRADES[test] and test in (key, key.split("[")[0])]
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(derain, "pretrain", lambda *_, **__: None)  # takes seconds, and is none of these
                put(monkeypatch, function, old, new)
                for item in catchers.values() if right else chosen:
                    if item.module is not module:  # within one, fixtures of the module are kept: they are slow
                        session._setupstate.teardown_exact(None)
                        module = item.module
                    sibling = next(other for other in session.items if other.module is module and other is not item)
                    failed = any(report.failed for report in runtestprotocol(item, log=False, nextitem=sibling))
                    if failed and right:
                        self.unfair.add(item.nodeid)
                    elif failed:
                        self.caught[function, mistake] = item.name
                        catchers[item.nodeid] = item
                        break
        return True


@pytest.fixture(scope="module")
def session() -> Session:
    found = Session()
    files = sorted({test.split("::")[0] for test in GRADES})
    pytest.main([*(str(SOURCE.parent / "tests" / file) for file in files), "-q", "-s", "--tb=native", "--no-header",
                 "-p", "no:cacheprovider", "-p", "no:faulthandler"], plugins=[found])
    return found


@pytest.mark.parametrize("function, mistake, old, new", WRONG, ids=[" ".join(wrong[:2]) for wrong in WRONG])
def test_wrong_solutions_are_caught(session, function, mistake, old, new):
    assert old in sources()[function], f"{function} no longer says {old!r}: mend WRONG"
    assert (function, mistake) in session.caught, f"{function}: the tests do not see {mistake!r}"


def test_the_reference_is_not_caught(session):
    assert not session.unfair and session.caught


def test_the_table_is_in_step(session):
    tree = ast.parse(SOURCE.read_text())
    functions = [name for assignment in ASSIGNMENTS.values() for name in assignment["functions"]]
    for name in functions:
        find(tree, name)
    for test in GRADES:
        assert any(graded(key) and test in (key, key.split("[")[0]) for key in session.keys), f"no test {test}"
    assert 6 <= len(ASSIGNMENTS) <= 8 and len(set(functions)) == len(functions)
    assert {wrong[0] for wrong in WRONG} == set(functions)


# ---------------------------------------------------------------------------------------------- what a student gets


def test_blanks_are_blank_and_nothing_else_is():
    """Without the bodies, and without what stands in their place, both files have the same lines."""
    names = sorted({wrong[0] for wrong in WRONG})
    source, result = SOURCE.read_text(), blank(SOURCE.read_text(), names)
    tree, after = ast.parse(source), ast.parse(result)
    lines, bodies = source.splitlines(), set()
    for name in names:
        node, blanked = find(tree, name), find(after, name)
        documented = ast.get_docstring(node)
        bodies |= set(range(node.body[0].end_lineno if documented else node.body[0].lineno - 1, node.end_lineno))
        assert ast.get_docstring(blanked) == documented and isinstance(blanked.body[-1], ast.Raise)
        assert len(blanked.body) == 1 + (documented is not None) and name in ast.unparse(blanked.body[-1])
    raises = [line for line in result.splitlines() if 'raise NotImplementedError("coursework: ' in line]
    assert len(raises) == len(names)
    assert [line for i, line in enumerate(lines) if i not in bodies] \
        == [line for line in result.splitlines() if line not in raises]


def test_decorators_comments_and_first_lines_stay():
    source = '@cache\ndef f(x,\n      y):  # why\n    # how\n    @cache\n    def g():\n        pass\n    return g\n\nz = 1\n'
    assert blank(source, ["f"]) == ('@cache\ndef f(x,\n      y):  # why\n    # how\n    raise NotImplementedError('
                                    '"coursework: f is not written yet")\n\nz = 1\n')
    with pytest.raises(KeyError):
        blank(source, ["h"])


def assign(*arguments):
    return subprocess.run([sys.executable, ROOT / "tests" / "make_assignment.py", *arguments], text=True, capture_output=True)


def test_the_command_that_makes_assignments(tmp_path):
    listing = assign().stdout
    for name, assignment in ASSIGNMENTS.items():
        assert f"{name} ({assignment['time']})" in listing and assignment["teaches"] in listing
        assert ", ".join(assignment["functions"]) in listing
    made = assign("rain", "evaluation", "-o", tmp_path / "student.py")
    assert made.returncode == 0 and (tmp_path / "student.py").read_text().count("coursework: ") == 9
    (tmp_path / "student.py").write_text("a week's work")
    for wrong, word in ((("rane", "-o", tmp_path / "x.py"), "rain"), (("rain",), "-o"), (("rain", "--hard"), "--hard"),
                        (("rain", "-o", tmp_path / "student.py"), "already"), (("rain", "-o", tmp_path / "a" / "b.py"), "b.py")):
        refused = assign(*wrong)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and word in refused.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["conftest.py", "student.py"]
    assert (tmp_path / "student.py").read_text() == "a week's work"


def test_coursework_md_tells_of_each():
    text = (ROOT / "tests" / "coursework.md").read_text()
    for name, assignment in ASSIGNMENTS.items():
        assert f"--assignment {name}\n" in text and f"make_assignment.py {name} " in text
        for function in assignment["functions"]:
            assert f"`{function}`" in text, function


# ---------------------------------------------------------------------------------------------- what students hand in


@pytest.mark.parametrize("content, reason", (
    ("x = 1\nraise ValueError('two\\nlines')", "ValueError: two lines (line 2)"), ("def f(:", "SyntaxError"),
    ("import sys; sys.exit(0)", "calls sys.exit (line 1)"), ("import os; os._exit(0)", "ended the process"),
    ("while True: pass", "not imported after 1 s"), ("x = 1", "")), ids=lambda value: value[:20])
def test_files_that_cannot_be_imported(content, reason, tmp_path):
    (tmp_path / "student.py").write_text(content)
    problem = import_problem(tmp_path / "student.py", 1 if "while" in content else 60)
    assert reason in problem and "\n" not in problem and bool(problem) == bool(reason)


def test_a_loop_is_stopped_even_if_it_catches_exceptions():
    begin = time.monotonic()
    with pytest.raises(TooLong), limited(0.1):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass
    assert time.monotonic() - begin < 5


def grade(module, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run([sys.executable, "-m", "pytest", "--module", module, "-p", "no:cacheprovider", *arguments],
                          cwd=ROOT, text=True, capture_output=True, timeout=120, env=environment)


def test_a_crash_at_import_is_a_zero_with_a_reason(tmp_path):
    assert assign("rain", "-o", tmp_path / "ann.py").returncode == 0  # its conftest.py is what pytest needs
    (tmp_path / "ann.py").write_text("import nothing_of_the_kind")
    done = grade(tmp_path / "ann.py")
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("ann.py: 0, as it cannot be imported: ModuleNotF")
    assert "Traceback" not in done.stdout + done.stderr


def test_failed_blocked_and_full_marks(tmp_path):
    """One function blank, one that calls sys.exit; the others are the reference's, and have full marks."""
    student = blank(SOURCE.read_text(), ["streak_seeds"])
    wrong = student.replace("    return (background + rain).clamp(0, 1)\n", "    sys.exit(0)\n")
    assert wrong != student
    assert assign("rain", "-o", tmp_path / "bob.py").returncode == 0
    (tmp_path / "bob.py").write_text(wrong)
    done = grade(tmp_path / "bob.py", "--assignment", "rain,evaluation")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[-1] == "bob.py: rain 9/22, evaluation 10/10", done.stdout
    assert "3 failed" in lines[-2] and "10 blocked" in lines[-2]
    assert "not written yet: streak_seeds" in done.stdout and "SystemExit" in done.stdout
    assert any(line.split() == ["streak_seeds", "0/2", "blocks", "10", "more"] for line in lines)
    assert any(line.split() == ["render_rain", "0/9"] for line in lines)
