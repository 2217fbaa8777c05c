"""Grade a student's file: a pytest plugin, with the option --module and a mark for each assignment.

python -m pytest -m rain --module=student.py

A test that grades says which function, and for how many points: @pytest.mark.graded("psnr", 1).  It
has them if all its cases pass.  A test that takes longer than LIMIT fails.  The tests run in a
process of their own: however that ends, the last line on standard output is the score.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MEASURES = ["rain_mask", "decoupled_evaluation", "psnr"]
ASSIGNMENTS = {
    "lab": MEASURES,
    "rain": ["streak_kernel", "drops", "rain_layers", "add_rain"],
    "evaluation": [*MEASURES, "ssim"],
    "backgrounds": [
        "opening",
        "bright_detail",
        "sharpness",
        "sample_patches",
        "training_patches",
    ],
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
BLANK = "is not written yet"  # ends the message of each blank that make_assignment.py leaves
LIMIT = 10  # seconds for a test
WHOLE_LIMIT = 600  # seconds for all tests of a file
RESULT = "DERAIN_RESULT"  # tells the process that runs the tests where to leave the last line
ENDED = f"it ended the process, or took {WHOLE_LIMIT} s,"


def pytest_addoption(parser):
    parser.addoption("--module", metavar="FILE", help="a student's file, tested as derain.py")


def asked(config) -> list[str]:
    """Return the assignments that -m names, as in `-m rain` or `-m "rain or lab"`."""
    words = config.option.markexpr.split()
    return [word for word in words if word in ASSIGNMENTS and "not" not in words]


def module_of(config) -> Path:
    """Return the file that is graded."""
    own = Path(__file__).resolve().parent.parent / "derain.py"
    return Path(config.getoption("--module") or own).expanduser()


def pytest_cmdline_main(config):
    """Let another process run the tests, and print the last line; return the exit status."""
    if RESULT in os.environ or not (config.getoption("--module") or asked(config)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        result.write_text("no test ran")
        status = 1
        with suppress(subprocess.TimeoutExpired):
            status = subprocess.run(
                [sys.executable, "-m", "pytest", *config.invocation_params.args],
                cwd=config.invocation_params.dir,
                env={**os.environ, RESULT: str(result)},
                stdin=subprocess.DEVNULL,  # nobody is there to answer
                timeout=WHOLE_LIMIT,
            ).returncode
        print(f"{module_of(config).name}: {result.read_text('utf-8')}", flush=True)
    return status


def note(text: str):
    """Leave the last line, which stands if no other one follows."""
    Path(os.environ[RESULT]).write_text(" ".join(text.split()), "utf-8", "replace")


def note_zero(config, reason: str):
    """Leave a last line such as "rain 0, it ended the process in test_x"."""
    note(", ".join([*(f"{mark} 0" for mark in asked(config) or ["all"]), reason]))


@contextmanager
def time_limit():
    """Fail what takes longer than LIMIT; Windows has no such timer, and no limit."""

    def stop(number, frame):
        pytest.fail(f"stopped after {LIMIT} s", pytrace=False)

    timer = getattr(signal, "setitimer", None)
    if timer:
        signal.signal(signal.SIGALRM, stop)
        timer(signal.ITIMER_REAL, LIMIT, 1)  # again after a second, should a student catch it
    try:
        yield
    finally:
        if timer:
            timer(signal.ITIMER_REAL, 0)


def pytest_configure(config):
    config.left = Counter()  # of each test that grades, the cases that have not passed
    config.addinivalue_line("markers", "graded(function, points): a test that grades")
    for mark in ASSIGNMENTS:
        config.addinivalue_line("markers", f"{mark}: tests that grade this assignment")
    if RESULT not in os.environ:
        return
    config.option.continue_on_collection_errors = True  # a file may lack what others test
    note_zero(config, f"{ENDED} when it was imported")
    try:
        with time_limit():
            spec = importlib.util.spec_from_file_location("derain", module_of(config))
            if spec is None:
                raise ImportError("its name does not end in .py")
            sys.modules["derain"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["derain"])
    except (Exception, SystemExit, pytest.fail.Exception) as problem:
        reason = f"it cannot be imported: {type(problem).__name__}: {problem}"
        note_zero(config, reason)
        pytest.exit(reason, returncode=1)
    note("no test ran")


def pytest_ignore_collect(collection_path):
    """When a file is graded, leave out what grades nothing."""
    if RESULT in os.environ and collection_path.suffix == ".py":
        return "@graded(" not in collection_path.read_text("utf-8") or None


def case_of(item):
    """Return function, points and test of a case, or None if it does not grade."""
    mark = item.get_closest_marker("graded")
    return (*mark.args, item.originalname) if mark else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests that grade, by assignment and for -k, before others are left out."""
    for item in items:
        if case := case_of(item):
            config.left[case] += 1
            item.extra_keyword_matches.add(case[0])
            for mark, functions in ASSIGNMENTS.items():
                if case[0] in functions:
                    item.add_marker(mark)


@pytest.fixture(autouse=True)
def right_others(request, monkeypatch):
    """Where a test grades a function, those that it may call are right: its file's BY_HAND."""
    if case := case_of(request.node):
        for name, function in request.module.BY_HAND.items():
            if name != case[0]:
                replace(monkeypatch, name, function)


def replace(monkeypatch, name: str, function):
    """Replace a function of derain, or a method, such as "ResNet.forward"."""
    *owner, last = name.split(".")
    derain = sys.modules["derain"]
    monkeypatch.setattr(getattr(derain, owner[0]) if owner else derain, last, function)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not case_of(item):
        return (yield)
    if RESULT in os.environ:
        note_zero(item.config, f"{ENDED} in {item.name}")
    with time_limit():
        return (yield)


pytest_runtest_setup = pytest_runtest_call  # fixtures call the student's functions, too


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count what passed; a skip, as a function may ask for, is none; a blank takes one line."""
    report = yield
    if case := case_of(item):
        if call.excinfo and (report.skipped or BLANK in str(call.excinfo.value)):
            report.outcome = "failed"
            report.longrepr = f"{item.name}: {str(call.excinfo.value).splitlines()[0]}"
        if report.when == "call" and report.passed:
            item.config.left[case] -= 1
    return report


def pytest_unconfigure(config):
    """Print the points of each function, and leave the score."""
    if RESULT not in os.environ or not config.left:
        return
    scores = []
    for mark in asked(config) or ASSIGNMENTS:
        score = whole = 0
        for function in ASSIGNMENTS[mark]:
            tests = [case for case in config.left if case[0] == function]
            points = sum(case[1] for case in tests)
            reached = sum(case[1] for case in tests if config.left[case] == 0)
            print(f"{mark}: {function} {reached}/{points}")
            score += reached
            whole += points
        scores.append(f"{mark} {score}/{whole}")
    note(", ".join(scores))
