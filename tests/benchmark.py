"""How fast is derain.py, and how much memory does it take?  python tests/benchmark.py [--only PART] [--repeats N]

Prints one table.  Every time is the median over repeats.  Memory is the peak of the resident set beyond what the
process had after its imports.  Nothing else should run meanwhile: two cores that are busy double all times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # derain is imported where it is needed: a child's peak memory counts its parent's, too


def show(what: str, value: float, unit: str, target: str = "") -> None:
    print(f"{what:58} {value:10.3g} {unit:14} {target}".rstrip(), flush=True)


def seconds(work, repeats: int) -> float:
    """Median over repeats, after one run that does not count: the first is always slow."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def child(code: str) -> list[float]:
    """Run code in a process of its own, in which everything is new, and read the numbers that it prints last."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    return [float(word) for word in done.stdout.split("\n")[-2].split()]


def bench_import(repeats: int) -> None:
    code = "import time; t = time.perf_counter(); import derain; print(time.perf_counter() - t)"
    show("import derain", statistics.median(child(code)[0] for _ in range(repeats)), "s", "target: under 3")


def bench_main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        job = subprocess.Popen([sys.executable, ROOT / "derain.py", "--out", folder], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(job.pid, 0)
        assert status == 0
        show("main job (once)", time.perf_counter() - begun, "s")
        show("main job: memory in all", usage.ru_maxrss / 1e6, "GB")


NETWORKS = ("resnet", "unet", "swinir", "prior")
INFERENCE = """
import resource, time, torch, derain
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
network = derain.build_network({net!r})
derain.restore(network, torch.rand(3, 64, 64), quiet=True)
before, times = peak(), []
for _ in range({repeats}):
    image = torch.rand(3, {height}, {width})
    begun = time.perf_counter()
    derain.restore(network, image, quiet=True)
    times.append(time.perf_counter() - begun)
print(sorted(times)[{repeats} // 2], peak() - before)
"""


def bench_inference(repeats: int) -> None:
    for net in NETWORKS:
        for megapixels, height, width, targets in (
            (1, 1000, 1000, ("target: under 1.2", "")), (12, 3000, 4000, ("", "target: under 1")),
        ):
            if (net, megapixels) == ("prior", 12):
                continue  # two minutes; memory hardly grows, as tiles stay as they are
            runs = repeats if megapixels == 1 else 1  # (12 megapixels have 63 tiles, which repeat by themselves)
            taken, memory = child(INFERENCE.format(net=net, height=height, width=width, repeats=runs))
            if net != "resnet":
                targets = ("", "")
            show(f"restore, {net}, {megapixels} megapixels", taken, "s", targets[0])
            show(f"restore, {net}, {megapixels} megapixels: image, output, work", memory, "GB", targets[1])


def plain_rain(n: int, size: int, rain_range, rng):
    """The common recipe, an image at a time: noise, threshold, a filter with a rotated line, scaled to [0, 1].

    It is what the OpenCV tutorials do, with PIL's rotation and torch's convolution in the place of OpenCV's.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageFilter

    layers = []
    for _ in range(n):
        quantity, width, length, direction = (rng.uniform(*interval) for interval in (
            rain_range.quantity, rain_range.width, rain_range.length, rain_range.direction))
        noise = rng.random((size, size), dtype=np.float32)
        noise[noise < 1 - quantity / 10_000] = 0
        side = 2 * int(length / 2 + 2 * width) + 1
        line = np.zeros((side, side), dtype=np.uint8)
        line[(side - int(length)) // 2:(side + int(length)) // 2, side // 2] = 255
        line = Image.fromarray(line).rotate(-direction, Image.BILINEAR).filter(ImageFilter.GaussianBlur(width / 2.355))
        kernel = torch.from_numpy(np.asarray(line, dtype=np.float32))[None, None]
        rain = torch.nn.functional.conv2d(torch.from_numpy(noise)[None, None], kernel, padding=side // 2)
        layers.append(rain / rain.max().clamp(min=1e-6) * rng.uniform(0.3, 0.8))
    return torch.cat(layers)


def bench_rain(repeats: int) -> None:
    import derain
    import numpy as np
    rng, n = np.random.default_rng(0), 8
    for size in (40, 64, 128):
        taken = {}
        for recipe in (derain.rain_layers, plain_rain):  # ten batches a time, as one is over too soon
            taken[recipe] = seconds(lambda: [recipe(n, size, derain.RAIN["large"], rng) for _ in range(10)], repeats) / 10
        ours, plain = taken.values()
        show(f"large rain, {size}x{size} pixels, batches of {n}", n / ours, "layers/s")
        show(f"large rain, {size}x{size} pixels, the plain recipe", n / plain, "layers/s", f"ours: {plain / ours:.1f} times")


def bench_training(repeats: int) -> None:
    """Steps of each network, and of one without a network: the share of a step that prepares its data."""
    import derain
    import torch

    class NoNetwork(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def loss(self, degraded, clean):
            return self.weight.sum()

    steps, backgrounds = 20, torch.rand(64, 3, derain.PATCH, derain.PATCH)
    degrade = derain.rain_degradation(derain.RAIN["large"])
    none = NoNetwork()
    for net in NETWORKS:
        network, times = derain.build_network(net), []
        for _ in range(repeats):  # in turns, so that whatever else the machine does hits both
            times.append([seconds(lambda: derain.train(n, backgrounds, degrade, steps), 1) / steps for n in (network, none)])
        show(f"training, {net}", 1 / statistics.median(whole for whole, _ in times), "steps/s")
        share = 100 * statistics.median(rest / whole for whole, rest in times)
        show(f"training, {net}: what is not network", share, "% of a step", "target: under 10" if net == "resnet" else "")


PARTS = {"import": bench_import, "main": bench_main, "inference": bench_inference, "rain": bench_rain,
         "training": bench_training}  # those that start processes come first

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: 5)")
    args = parser.parse_args()
    for name, part in PARTS.items():
        if name in args.only:
            part(max(1, args.repeats))
