"""Grade a student's file with the tests of derain.py: a pytest plugin, in use only under --module.

    python -m pytest --module student.py                       # everything
    python -m pytest --module student.py --assignment rain     # what grades one assignment, or several: a,b
    for s in hand-ins/*.py; do python -m pytest --module $s -q | tail -n 1; done    # one line a student

The file stands in for the module `derain`, in this process and in those that tests start.  A test that ran into
a function that is still blank fails if it grades that function, and else is reported as blocked by it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest

from make_assignment import ASSIGNMENTS, MARK

TESTS = Path(__file__).resolve().parent
BLANK = re.compile(re.escape(MARK) + r"([\w.]+) is not written")
IMPORT_LIMIT = 60  # seconds
GRADES = {}  # for each test the functions that it grades
for _assignment in ASSIGNMENTS.values():
    for _function, _tests in _assignment["functions"].items():
        for _test in _tests:
            GRADES.setdefault(_test, set()).add(_function)

# Imports a file in a process of its own, which may do with it what it likes, and says how it went.
TRIAL = """
import runpy, sys, traceback
try:
    runpy.run_path(sys.argv[1], run_name="derain")
    print("\\nREASON ok")
except BaseException as problem:
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == sys.argv[1]]
    line = [problem.lineno] if isinstance(problem, SyntaxError) else lines[-1:]
    text = "it calls sys.exit" if isinstance(problem, SystemExit) else f"{type(problem).__name__}: {problem}"
    print("\\nREASON", " ".join(text.split())[:200], *(f"(line {number})" for number in line))
"""


def import_problem(module: Path, limit: float) -> str:
    """Why a file cannot be imported, in one line; empty if it can."""
    try:
        trial = subprocess.run([sys.executable, "-c", TRIAL, str(module)], timeout=limit, capture_output=True,
                               text=True, errors="replace", stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not imported after {limit:g} s: does it work at import, or loop for ever?"
    reason = re.findall(r"^REASON (.*)$", trial.stdout, re.MULTILINE)
    if not reason:
        return f"it ended the process, with status {trial.returncode}"
    return "" if reason[-1] == "ok" else reason[-1]


class TooLong(BaseException):
    """A time limit is over.  Not an Exception, so that code that catches those does not catch this."""


@contextlib.contextmanager
def limited(seconds: float):
    """Raise TooLong in the main thread after so many seconds, and again each second until it gets out."""
    def stop(*_):
        raise TooLong(f"stopped after {seconds:g} s: does it loop for ever?")

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def key_of(nodeid: str) -> str:
    """A test's name without folders, as the table of assignments has it; it may end in [parameters]."""
    file, _, name = nodeid.partition("::")
    return f"{Path(file).name}::{name}"


def graded(key: str) -> set[str]:
    """The functions that a test grades."""
    return GRADES.get(key, set()) | GRADES.get(key.split("[")[0], set())


def pytest_addoption(parser):
    group = parser.getgroup("coursework", "coursework (tests/coursework.md)")
    group.addoption("--module", type=Path, metavar="FILE", help="run the tests against this file instead of derain.py")
    group.addoption("--assignment", default="", metavar="NAMES", help="with --module: only the tests that grade these")
    group.addoption("--limit", type=float, default=60, metavar="SECONDS",
                    help="with --module: of each test (default: 60)")


def pytest_configure(config):
    """Under --module, put the student's file in derain's place before any test module is imported."""
    module = config.getoption("module")
    if module is None:
        return
    chosen = [name for name in config.getoption("assignment").split(",") if name]
    if not module.is_file():
        raise pytest.UsageError(f"--module {module}: no such file")
    if not set(chosen) <= set(ASSIGNMENTS):
        raise pytest.UsageError(f"--assignment {','.join(chosen)}: no such assignment; there are {', '.join(ASSIGNMENTS)}")
    grader = Grader(module.resolve(), chosen, config.getoption("limit"))
    problem = grader.load()
    if problem:
        grader.say(f"{module.name}: 0, as it cannot be imported: {problem}")
        grader.clean()
        pytest.exit("no test was run", returncode=1)
    config.option.continue_on_collection_errors = True  # a student's file may lack what one file of tests needs
    config.pluginmanager.register(grader, "coursework")


class Grader:
    """The hooks, and what they have seen."""

    def __init__(self, module: Path, chosen: list[str], limit: float):
        self.module, self.chosen, self.limit = module, chosen, limit
        self.files = {test.split("::")[0] for name in chosen for tests in ASSIGNMENTS[name]["functions"].values()
                      for test in tests}  # of tests that are wanted; all, if empty
        self.met: set[str] = set()  # blanks that the running test ran into
        self.outcomes: dict[str, str] = {}  # key of a test: passed, failed, blocked or skipped
        self.blockers: dict[str, set[str]] = {}  # function: the tests that it blocks
        self.stuck = ""  # why the run was given up
        self.folder = Path(tempfile.mkdtemp(prefix="coursework-"))  # where processes find the student's derain.py
        self.terminal = os.dup(1)  # the real one, as pytest captures the other
        self.totals: dict[str, set[str]] = {}  # assignment: the keys of its tests, on the reference

    def say(self, text: str) -> None:
        sys.stdout.flush()
        os.write(self.terminal, f"{text}\n".encode())

    def load(self) -> str:
        """Import the student's file as `derain`, and count the reference's tests; returns what went wrong."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        collection = subprocess.Popen(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
             *(str(TESTS / name) for name in sorted(self.files) or [""])],
            stdout=subprocess.PIPE, text=True, cwd=TESTS.parent, env=environment)
        problem = import_problem(self.module, IMPORT_LIMIT)
        if not problem:
            problem = self.load_here()
        if problem:
            collection.kill()
        listing, _ = collection.communicate()
        keys = [key_of(line) for line in listing.splitlines() if "::" in line and "test_grader.py" not in line]
        for name, assignment in ASSIGNMENTS.items():
            self.totals[name] = {key for key in keys if graded(key) & set(assignment["functions"])}
        self.totals["the rest"] = set(keys).difference(*self.totals.values())
        return problem

    def load_here(self) -> str:
        met = self.met

        class Blank(NotImplementedError):  # the name that the student's module finds before the built-in one
            def __init__(self, *arguments):
                super().__init__(*arguments)
                met.update(BLANK.findall(" ".join(map(str, arguments))))

        shutil.copy(self.module, self.folder / "derain.py")
        module = types.ModuleType("derain")
        module.__file__, module.NotImplementedError = str(self.module), Blank
        Blank.__name__ = Blank.__qualname__ = "NotImplementedError"
        sys.modules["derain"] = module
        try:
            with limited(IMPORT_LIMIT):
                exec(compile(self.module.read_bytes(), str(self.module), "exec"), module.__dict__)
        except BaseException as problem:  # it did not in a process of its own, but who knows
            return f"{type(problem).__name__}: {problem}"
        return ""

    # ------------------------------------------------------------------------------------------------ hooks

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        try:
            with limited(IMPORT_LIMIT):
                return (yield)
        except SystemExit:
            return pytest.CollectReport(collector.nodeid, "failed", f"{self.module.name} calls sys.exit", [])

    def pytest_ignore_collect(self, collection_path):
        name = collection_path.name  # test_grader.py tests the grader, on the reference
        return name == "test_grader.py" or (name[:5] == "test_" and bool(self.files) and name not in self.files) or None

    def pytest_collection_modifyitems(self, config, items):
        if self.chosen:
            wanted = {function for name in self.chosen for function in ASSIGNMENTS[name]["functions"]}
            left_out = [item for item in items if not graded(key_of(item.nodeid)) & wanted]
            items[:] = [item for item in items if graded(key_of(item.nodeid)) & wanted]
            config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """What catches every exception, or never comes back from a library, can only be ended from outside."""
        self.met.clear()
        watch = threading.Timer(3 * self.limit + 5, self.give_up, [item.name])
        watch.daemon = True
        watch.start()
        try:
            return (yield)
        finally:
            watch.cancel()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        with limited(self.limit):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with limited(self.limit):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            texts = [report.longreprtext]
            for entry in call.excinfo.traceback:  # what a process wrote, in the variables of the test
                for value in entry.frame.f_locals.values():
                    error = value if isinstance(value, str) else getattr(value, "__dict__", {}).get("stderr")
                    texts.append(error if isinstance(error, str) else "")
            missing = self.met.union(*map(BLANK.findall, texts))
            own = missing & graded(key_of(item.nodeid))
            if own:
                report.longrepr = f"not written yet: {', '.join(sorted(own))}"
            elif missing:
                reason = f"blocked by {', '.join(sorted(missing))}"
                report.outcome, report.longrepr, report.blocked = "skipped", (str(item.path), 0, reason), True
                for function in missing:
                    self.blockers.setdefault(function, set()).add(key_of(item.nodeid))
        return report

    def pytest_runtest_logreport(self, report):
        key = key_of(report.nodeid)
        if report.outcome != "passed":
            self.outcomes[key] = "blocked" if getattr(report, "blocked", False) else report.outcome
        elif report.when == "call":
            self.outcomes.setdefault(key, "passed")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        if getattr(report, "blocked", False):
            return "blocked", "b", report.longrepr[2].upper()[:7] + report.longrepr[2][7:]
        return None

    # ---------------------------------------------------------------------------------------------- summary

    def passed(self, keys: set[str]) -> str:
        """How many of these tests passed, of how many."""
        return f"{sum(self.outcomes.get(key) == 'passed' for key in keys)}/{len(keys)}"

    def line(self) -> str:
        """The student's line."""
        names = self.chosen or list(self.totals)
        scores = ", ".join(f"{name} {self.passed(self.totals[name])}" for name in names)
        return f"{self.module.name}: {scores}{self.stuck}"

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        terminalreporter.section(f"coursework: {self.module.name}")
        for name, keys in self.totals.items():
            if not keys & self.outcomes.keys() and name not in self.chosen:
                continue
            not_run = len(keys - self.outcomes.keys())
            write(f"{name:16}{self.passed(keys):>8}" + (f"   ({not_run} not run)" if not_run else ""))
            for function in ASSIGNMENTS.get(name, {"functions": ()})["functions"]:
                own = {key for key in keys if function in graded(key)}
                blocks = len(self.blockers.get(function, ()))
                if any(self.outcomes.get(key, "passed") != "passed" for key in own):
                    write(f"    {function:28}{self.passed(own):>7}" + (f"   blocks {blocks} more" if blocks else ""))

    def pytest_unconfigure(self, config):
        self.say(self.line())
        self.clean()
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            os._exit(1)  # a thread of the student's still runs, and Python would wait for it

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def give_up(self, test: str) -> None:
        self.stuck = f"; given up in {test}, which could not be stopped"
        self.say("\n" + self.line())
        self.clean()
        os._exit(1)
