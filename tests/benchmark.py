"""How fast is derain.py, and how much memory does it take?

Times are medians, on one core but for the main job.  Nothing else should run meanwhile.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import derain  # noqa: E402

def seconds(work: Callable) -> float:
    """Median time of five times work(), after one that does not count: it is always slow."""
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])

def show(what: str, value: float, unit: str) -> None:
    print(f"{what:45} {value:9.3g} {unit}", flush=True)

def make(net: str) -> torch.nn.Module:
    """An untrained network; speed does not depend on the weights."""
    arguments = {"vqgan": derain.PRIOR} if net == "prior" else {}
    return derain.build_network(derain.NETWORKS[net], **arguments)

def bench_rain() -> None:
    """Batches for training."""
    rng = np.random.default_rng(0)
    def work() -> None:
        for _ in range(10):
            derain.rain_layers(derain.BATCH, derain.PATCH, derain.RAIN["large"], rng)
    show("large rain on training patches", 10 * derain.BATCH / seconds(work), "layers/s")

def bench_training() -> None:
    """Steps of the training loop, with the rain."""
    backgrounds = torch.rand(64, 3, derain.PATCH, derain.PATCH)
    degrade = derain.rain_degradation(derain.RAIN["large"])
    for net in derain.NETWORKS:
        network = make(net)
        taken = seconds(lambda: derain.train(network, backgrounds, degrade, steps=20))
        show(f"training, {net}", 20 / taken, "steps/s")

def bench_restore() -> None:
    """One image of a megapixel."""
    image = torch.rand(3, 1000, 1000)
    for net in derain.NETWORKS:
        network = make(net)
        taken = seconds(lambda: derain.restore(network, image))
        show(f"restore 1 megapixel, {net}", taken, "s")

def bench_main() -> None:
    """`python derain.py`, once, as it takes a minute, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "derain.py", "--out", folder]
        begun = time.perf_counter()
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(job.pid, 0)
        if status:
            sys.exit("benchmark.py: the main job failed")
        show("main job, once", time.perf_counter() - begun, "s")
        show("main job, peak memory", usage.ru_maxrss / 2 ** 20, "GiB")  # ru_maxrss is in KiB

if __name__ == "__main__":
    torch.set_num_threads(1)
    for bench in (bench_rain, bench_training, bench_restore, bench_main):
        bench()
