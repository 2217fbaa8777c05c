"""What all tests share: the module under test, a few small photographs, and the command line."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest_plugins = ["grader"]
os.environ["OMP_NUM_THREADS"] = "1"  # for torch: a second thread would cost more than it brings


def t_within(limit: float, freedom: int) -> float:
    """Return how much of Student's t-distribution is within a limit, by its density."""
    t = np.linspace(-limit, limit, 100_001)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) / math.sqrt(freedom * math.pi)
    density *= math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    return 2 * limit * density.mean()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of six photographs of 160x140 pixels: smooth random blobs, no two alike."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(7)
    for i in range(6):
        small = Image.fromarray(draw.integers(0, 256, (7, 8, 3), dtype=np.uint8))
        small.resize((160, 140), Image.BICUBIC).save(folder / f"photo{i}.png")
    return folder


@pytest.fixture
def call(capfd):
    """Run `python derain.py ARGUMENTS` without a new process; return status, output and errors."""

    def command(*arguments):
        import derain

        capfd.readouterr()
        try:
            status = derain.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)

    return command
