"""Grade a student's file: a pytest plugin with the option --module and a mark for each assignment.

python -m pytest -m rain --module student.py

Each test of an assignment is a point.  The last lines say how many points each function has, and
how many there are in all.  A test that takes longer than LIMIT fails.
"""

import importlib.util
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

MARKS = ("lab", "rain", "evaluation", "backgrounds", "training", "attention", "quantization")
BLANK = "is not written yet"  # ends the message of each blank that make_assignment.py leaves
LIMIT = 20  # seconds

# The tests of each function; others are of several.  What a function calls has to be right, too.
TESTS = {
    "rain_mask": (
        "test_mask_is_of_the_channel_that_changed_most",
        "test_mask_threshold_is_strict_for_files_of_8_bits",
    ),
    "decoupled_evaluation": (
        "test_evaluation_against_loops",
        "test_known_values",
        "test_no_pattern_of_rain_and_rain_everywhere",
        "test_the_tensors_given_stay_as_they_are",
        "test_wrong_shapes_are_refused",
    ),
    "psnr": ("test_psnr_is_a_mean_over_images",),
    "ssim": ("test_ssim_against_a_loop", "test_ssim_refuses_what_it_cannot_measure"),
    "streak_kernel": ("test_kernel_is_a_blurred_line", "test_kernel_batch_equals_singles"),
    "streak_seeds": ("test_quantity_is_the_number_of_seeds",),
    "rain_layers": ("test_layers_equal_a_plain_loop",),
    "add_rain": ("test_add_rain_clips_and_is_grey", "test_a_degradation_rains_afresh"),
    "sharpness": ("test_sharpness_against_a_loop",),
    "sample_patches": (
        "test_patches_come_from_the_images_evenly",
        "test_patches_reach_every_place",
    ),
    "training_patches": (
        "test_fewer_backgrounds_are_among_the_more",
        "test_thirds_differ_in_sharpness",
        "test_more_than_a_gigabyte_is_refused",
    ),
    "ResNet.forward": ("test_resnet_by_hand",),
    "pad_to_multiple": ("test_padding_reflects_or_else_repeats_the_edge",),
    "UNet.forward": ("test_unet_by_hand",),
    "train": (
        "test_backgrounds_are_drawn_and_mirrored_evenly",
        "test_training_is_adam_on_l1_with_a_rate_that_falls_along_half_a_cosine",
        "test_a_network_may_bring_its_loss_and_its_rate",
        "test_the_seed_alone_decides_every_draw",
    ),
    "to_windows": ("test_windows_are_cut",),
    "from_windows": ("test_windows_are_put_back",),
    "shift_mask": ("test_shift_mask_separates_opposite_sides",),
    "WindowAttention.forward": ("test_attention_of_one_window_needs_nothing_else",),
    "SwinBlock.forward": ("test_a_swin_block_is_a_loop_over_pixels",),
    "ResidualBlock.forward": ("test_a_residual_block_by_hand",),
    "PixelAttention.forward": ("test_attention_of_pixels_by_hand",),
    "Codebook.forward": ("test_quantization_and_its_gradients",),
    "VQGANPrior.draw": ("test_what_the_prior_shows_is_made_of_codes",),
    "VQGANPrior.loss": ("test_the_loss_of_the_prior_and_its_gradient",),
}
FUNCTIONS = {test: function for function, tests in TESTS.items() for test in tests}


def pytest_addoption(parser):
    parser.addoption("--module", metavar="FILE", help="a student's file, tested as derain.py")


def marks_of(item):
    """Return the assignments that a test belongs to."""
    return {mark.name for mark in item.iter_markers()} & set(MARKS)


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
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: tests that grade this assignment")
    file = config.getoption("--module")
    if not file and config.option.markexpr not in MARKS:
        return
    file = file or Path(__file__).resolve().parent.parent / "derain.py"
    if not Path(file).is_file():
        raise pytest.UsageError(f"--module {file}: no such file")
    config.option.continue_on_collection_errors = True  # of tests that grade something else
    spec = importlib.util.spec_from_file_location("derain", file)
    sys.modules["derain"] = importlib.util.module_from_spec(spec)
    try:
        with time_limit():
            spec.loader.exec_module(sys.modules["derain"])
    except (Exception, SystemExit, pytest.fail.Exception) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        pytest.exit(f"{Path(file).name}: 0, as it cannot be imported: {reason}", returncode=1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Note every test that grades, before -m chooses among them."""
    config.passed = {item: False for item in items if marks_of(item)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not marks_of(item):
        return (yield)
    with time_limit():
        return (yield)


pytest_runtest_setup = pytest_runtest_call  # fixtures call the student's functions, too


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note what passed; report a blank in one line."""
    report = yield
    if item in item.config.passed and (report.when == "call" or report.failed):
        item.config.passed[item] = report.passed
    if call.excinfo and BLANK in str(call.excinfo.value):
        report.longrepr = f"{item.name}: {str(call.excinfo.value).splitlines()[0]}"
    return report


def pytest_sessionfinish(session):
    """A test that is skipped, as a student's function may ask, is not passed."""
    passed = getattr(session.config, "passed", {})
    if not all(passed.get(item, True) for item in session.items):
        session.exitstatus = 1


def pytest_unconfigure(config):
    """Print the points of each function and, as the last line, the grade."""
    expression = config.option.markexpr
    asked = [mark for mark in MARKS if mark in expression.split()]
    file = config.getoption("--module")
    if not hasattr(config, "passed") or not (file or asked):
        return
    grades = []
    for mark in asked if expression else MARKS:
        points = {}
        for item, passed in config.passed.items():
            if mark in marks_of(item):
                function = FUNCTIONS.get(item.originalname, "together")
                points.setdefault(function, []).append(passed)
        for function, results in points.items():
            print(f"{mark}: {function} {sum(results)}/{len(results)}")
        results = sum(points.values(), [])
        if results:
            grades.append(f"{mark} {sum(results)}/{len(results)}")
    print(f"{Path(file or 'derain.py').name}: {', '.join(grades) or 'no test ran'}")
