"""Grade a student's file: a pytest plugin with the option --module and a mark for each assignment.

    python -m pytest -m rain --module student.py
"""

import importlib.util
import sys
from pathlib import Path

import pytest

MARKS = ("lab", "rain", "evaluation", "backgrounds", "training", "attention", "quantization")
BLANK = "is not written yet"  # ends the message of each blank that make_assignment.py leaves


def pytest_addoption(parser):
    parser.addoption("--module", metavar="FILE", help="a student's file, tested as derain.py")


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: tests that grade this assignment")
    file = config.getoption("--module")
    if not file:
        return
    if not Path(file).is_file():
        raise pytest.UsageError(f"--module {file}: no such file")
    config.option.continue_on_collection_errors = True  # of tests that grade something else
    spec = importlib.util.spec_from_file_location("derain", file)
    sys.modules["derain"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules["derain"])
    except (Exception, SystemExit) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        pytest.exit(f"{Path(file).name}: 0, as it cannot be imported: {reason}", returncode=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A blank is reported in one line."""
    report = yield
    if call.excinfo and BLANK in str(call.excinfo.value):
        report.longrepr = f"{item.name}: {str(call.excinfo.value).splitlines()[0]}"
    return report


def pytest_terminal_summary(terminalreporter, config):
    """One line for the gradebook: passed tests of each mark."""
    if not config.getoption("--module"):
        return
    right = terminalreporter.getreports("passed")
    wrong = terminalreporter.getreports("failed") + terminalreporter.getreports("error")
    grades = []
    asked = config.option.markexpr
    for mark in [asked] if asked in MARKS else MARKS:
        passed = sum(mark in report.keywords for report in right)
        failed = sum(mark in getattr(report, "keywords", ()) for report in wrong)
        if passed + failed:
            grades.append(f"{mark} {passed}/{passed + failed}")
    name = Path(config.getoption("--module")).name
    config.grade = f"{name}: {', '.join(grades) or 'no test ran'}"


def pytest_unconfigure(config):
    """The grade is the last line, behind pytest's own."""
    if hasattr(config, "grade"):
        print(config.grade)
