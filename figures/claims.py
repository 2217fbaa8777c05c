"""Which of the paper's claims hold here?  Runs, verdicts, figures, and figures/claims.md.

A `Run` is one training and its tests; its result is a file in runs/, written when it is done, and
never done twice.  Finished runs are collected in figures/runs.csv, which is read first.
"""

import argparse
import csv
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor, nn

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))
import derain  # noqa: E402

# ---- 1  Which other degradations are there? ------------------------------------------------------

def strokes(clean: Tensor, rng: np.random.Generator) -> Tensor:
    """A second unseen rain, of another recipe: strokes that taper to a point, in three layers of
    depth, translucent, so that O = 1 - (1 - B)(1 - R) with R their opacity.  A degradation."""
    n, _, height, width = clean.shape
    fine = 3  # drawn this much larger, then averaged: smooth edges
    layers = np.zeros((n, height, width), dtype=np.float32)
    for layer in layers:
        lean = math.radians(rng.choice([-1, 1]) * rng.uniform(55, 75))
        along = fine * np.array([math.sin(lean), -math.cos(lean)])
        across = fine * np.array([math.cos(lean), math.sin(lean)])
        for depth in (1, 1.5, 2.5):
            canvas = Image.new("L", (fine * width, fine * height))
            pen = ImageDraw.Draw(canvas)
            for _ in range(rng.poisson(height * width / 10_000 * 60 / depth ** 1.5)):
                tail = rng.uniform(-0.2, 1.2, 2) * canvas.size
                head = tail - depth * rng.uniform(12, 24) * along
                end = depth * rng.uniform(0.6, 1.2) * across
                opacity = int(255 * depth * rng.uniform(0.15, 0.3))
                pen.polygon([*tail, *(head + end), *(head - end)], fill=opacity)
            stroke = np.asarray(canvas.reduce(fine), dtype=np.float32) / 255
            layer[:] = 1 - (1 - layer) * (1 - stroke)
    return 1 - (1 - clean) * (1 - torch.from_numpy(layers)[:, None])

# The level of noise is drawn for each image; all are about as strong: 25 grey levels on mid grey.
NOISE = {
    "gaussian": (0.09, 0.11),  # standard deviation, of each pixel and channel by itself
    "salt-and-pepper": (0.03, 0.05),  # share of the pixels that turn white or black
    "correlated": (0.09, 0.11),  # standard deviation; neighbours are alike, as after a blur
    "stripes": (0.09, 0.11),  # root mean square; vertical waves of 8 pixels, one phase an image
}

def noise(kind: str, clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Add noise of a kind in NOISE and clip, O = clip(B + N, 0, 1); a degradation."""
    n, channels, height, width = clean.shape
    level = torch.from_numpy(rng.uniform(*NOISE[kind], (n, 1, 1, 1))).float()
    if kind == "gaussian":
        added = level * torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    elif kind == "salt-and-pepper":
        chance = torch.from_numpy(rng.random((n, 1, height, width), dtype=np.float32))
        added = torch.where(chance < level, (chance < level / 2).float() - clean, torch.zeros(()))
    elif kind == "correlated":
        axis = torch.arange(-4, 5) / 1.5
        blur = torch.exp(-0.5 * (axis[:, None] ** 2 + axis ** 2))
        white = rng.standard_normal((n * channels, 1, height + 8, width + 8), dtype=np.float32)
        kernel = blur / blur.square().sum().sqrt()  # keeps the variance of white noise
        added = level * F.conv2d(torch.from_numpy(white), kernel[None, None]).view(clean.shape)
    else:
        phase = torch.from_numpy(rng.uniform(0, 2 * math.pi, (n, 1, 1, 1))).float()
        added = level * math.sqrt(2) * torch.sin(2 * math.pi * torch.arange(width) / 8 + phase)
    return (clean + added).clamp(0, 1)

# Motion blur: length (pixels), and direction (degrees from vertical, to either side).
BLUR = {"blur-narrow": ((8, 12), (0, 10)), "blur-wide": ((4, 16), (0, 45)),
        "blur-other": ((8, 12), (55, 90))}

def blur(kind: str, clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur each image along a line of its own, a streak_kernel with a sum of 1; a degradation."""
    n, channels, height, width = clean.shape
    length, direction = (rng.uniform(*interval, n) for interval in BLUR[kind])
    direction = direction * rng.choice([-1, 1], n)
    line = [torch.from_numpy(factor).float() for factor in (np.full(n, 1.5), length, direction)]
    kernel = derain.streak_kernel(*line)  # (n, k, k)
    kernel = (kernel / kernel.sum((1, 2), keepdim=True)).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(clean, (kernel.shape[-1] // 2,) * 4, "reflect").flatten(0, 1)[None]
    return F.conv2d(padded, kernel, groups=n * channels).view(clean.shape).clamp(0, 1)

def degradation(name: str) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """The degradation of that name: one of RAIN, NOISE or BLUR, or "strokes"."""
    if name in NOISE:
        return partial(noise, name)
    if name in BLUR:
        return partial(blur, name)
    return strokes if name == "strokes" else derain.rain_degradation(derain.RAIN[name])

# ---- 2  Which other backgrounds are there? -------------------------------------------------------

def draw_manga(size: int, rng: np.random.Generator) -> np.ndarray:
    """Flat white and black, sharp ink lines, screentone: a page of four panels."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (256 / size)  # 256 units wide at any size
    soft = 1.2 * 256 / size
    ink = np.zeros((size, size), dtype=np.float32)

    def screentone(pitch, grey):  # dots on a grid turned by 45 degrees; they cover the share `grey`
        u = (x + y) / math.sqrt(2) % pitch - pitch / 2
        v = (x - y) / math.sqrt(2) % pitch - pitch / 2
        return derain.inside(np.hypot(u, v) - pitch * math.sqrt(grey / math.pi), soft)

    def line(distance, thickness):
        return derain.inside(np.abs(distance) - thickness / 2, soft)
    gutter_x = rng.uniform(90, 166) + rng.uniform(-0.15, 0.15) * (y - 128)
    gutter_y = rng.uniform(90, 166)
    for side, level in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        frame = np.maximum.reduce([4 - side * (x - gutter_x), 4 - level * (y - gutter_y),
                                   np.abs(x - 128) - 124, np.abs(y - 128) - 124])
        cx = gutter_x.mean() + side * rng.uniform(40, 80)
        cy = gutter_y + level * rng.uniform(40, 80)
        angle, radius = np.arctan2(y - cy, x - cx), np.hypot(x - cx, y - cy)
        if rng.random() < 0.5:  # speed lines towards the hero
            gap = np.abs((angle / 2 / math.pi * rng.integers(30, 60)) % 1 - 0.5) * radius / 8
            art = derain.inside(gap - rng.uniform(0.4, 0.9), soft) * (radius > 60)
        else:  # a toned sky, a ridge drawn in ink, the dark ground
            ridge = y - cy - 25 * np.sin(x / rng.uniform(12, 40) + rng.uniform(0, 6))
            ridge = ridge - 8 * np.sin(x / 5)
            art = screentone(rng.uniform(4, 8), rng.uniform(0.1, 0.5)) * derain.inside(ridge, soft)
            ground = derain.inside(rng.uniform(20, 60) - ridge, soft)
            art = np.maximum.reduce([art, line(ridge, 3), ground])
        wobble = np.sin(rng.integers(3, 9) * angle + rng.uniform(0, 6))
        hero = radius - rng.uniform(22, 42) * (1 + 0.12 * wobble)
        shadow = screentone(rng.uniform(4, 7), 0.25) * (np.sin(angle + rng.uniform(0, 6)) > 0)
        art = np.maximum(np.where(hero < 0, shadow, art), line(hero, rng.uniform(2, 4)))
        for _ in range(3):  # strokes that swell and taper, as a pen's do
            curve = y - cy - rng.uniform(-40, 40) - rng.uniform(-0.6, 0.6) * (x - cx)
            curve -= 10 * np.sin((x - cx) / rng.uniform(10, 40))
            swell = rng.uniform(1, 3.5) * (1 + np.sin((x - cx) / 30))
            art = np.maximum(art, line(curve, swell) * (radius < 80))
        ink = np.maximum.reduce([ink, art * derain.inside(frame, soft), line(frame, 2.5)])
    return np.repeat(1 - ink[None], 3, axis=0)

def draw_urban(size: int, rng: np.random.Generator) -> np.ndarray:
    """Buildings in perspective: one window repeated, and inside each window a pane repeated."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    sky = np.array([0.55, 0.7, 0.9]) * rng.uniform(0.6, 1.1)
    image = (sky.reshape(3, 1, 1) * (1 - 0.3 * y) + 0.25 * y).astype(np.float32)

    def cell(t, count):  # the same unit cell, `count` times; coordinates in [-0.5, 0.5)
        return (t * count) % 1 - 0.5
    for depth in range(rng.integers(2, 5)):  # from the far street to the near one
        left, width = rng.uniform(-0.2, 0.7), rng.uniform(0.45, 0.9)
        u = (x - left) / width
        v = (y - 0.55) * (1 + rng.uniform(-0.5, 0.5) * (u - 0.5))  # rows converge to one side
        v += 0.55 - rng.uniform(-0.1, 0.5) + 0.1 * depth
        columns, rows = rng.integers(4, 12), rng.uniform(5, 14)
        panes = rng.integers(2, 4)
        wall = rng.uniform(0.25, 0.9) * np.clip(rng.normal(1, 0.15, 3), 0, 1.1)[:, None, None]
        trim = np.minimum(wall * rng.uniform(1.15, 1.5), 1)
        glass = rng.uniform(0.05, 0.45) * np.array([0.8, 0.95, 1.1]).reshape(3, 1, 1)
        soft = 1.5 / size / width
        body = derain.inside(np.maximum(np.abs(u - 0.5) - 0.5, -v), soft)
        cu, cv = cell(u, columns), cell(v, rows)
        half_u, half_v = rng.uniform(0.22, 0.38), rng.uniform(0.25, 0.40)
        window = np.maximum(np.abs(cu) - half_u, np.abs(cv) - half_v)  # signed distance, in cells
        bars_u, bars_v = np.abs(cell(cu / (2 * half_u), panes)), np.abs(cell(cv / (2 * half_v), 2))
        bars = np.maximum(bars_u, bars_v) > 0.42
        lamps = 1 + 0.5 * np.sin(7 * np.floor(u * columns) + 13 * np.floor(v * rows))  # lit rooms
        opening = derain.inside(window, soft * columns)
        derain.paint(image, body, wall * (1.05 - 0.25 * u))
        derain.paint(image, body * (np.abs(cv) > 0.47), 0.75 * wall)  # between two storeys
        derain.paint(image, body * derain.inside(window - 0.07, soft * columns), trim)
        derain.paint(image, body * opening, glass * lamps)
        derain.paint(image, body * opening * bars, trim)
    return image

derain.BACKGROUNDS.update(manga=draw_manga, urban=draw_urban)

class Autoencoder(nn.Module):
    """The control of the prior: its encoder and decoder without codebook, trained from nothing."""
    rate = derain.VQGANPrior.rate

    def __init__(self):
        super().__init__()
        self.vqgan = derain.VQGAN(**derain.PRIOR)

    def forward(self, degraded: Tensor) -> Tensor:
        latent = self.vqgan.encode(2 * derain.pad_to_multiple(degraded, 8) - 1)
        restored = self.vqgan.decode(latent)
        return (restored[..., :degraded.shape[2], :degraded.shape[3]] + 1) / 2

# ---- 3  What is one experiment? ------------------------------------------------------------------

STEPS, SEEDS = 2400, 5  # of the grid in figures/; a run with fewer is a taste

@dataclass(frozen=True)
class Run:
    """One training and its tests: everything that the result depends on."""
    net: str = "resnet"  # one of NETWORKS, "autoencoder"; or untrained: "rainy" (input), "opening"
    size: int = 0  # channels of the network; 0: its default
    images: str = "faces"  # what is drawn, or photographs
    third: str = "any"  # low, high: of 3n patches, the n least or most sharp
    n: int = 1024  # backgrounds
    trained_on: str = "small"
    steps: int = STEPS
    seed: int = 0

def tests_of(run: Run) -> tuple[str, ...]:
    """The degradations that a run is tested in."""
    for family in (NOISE, BLUR):
        if run.trained_on in family:
            return tuple(family)
    return ("unseen", "strokes", run.trained_on)

@lru_cache(maxsize=3)
def images_of(images: str, seed: int, path: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Images to train on, and images held out."""
    drawn = images in derain.BACKGROUNDS
    return derain.training_and_held_out(None if drawn else path, images, seed)

def patches_of(run: Run, images: list[Tensor]) -> Tensor:
    """The run's n backgrounds (n, 3, 40, 40)."""
    if run.third == "any":
        return derain.training_patches(images, run.n, run.seed)
    patches = derain.sample_patches(images, 3 * run.n, derain.PATCH,
                                    derain.stream(run.seed, "patches"))
    order = derain.sharpness(patches).argsort()
    return patches[order[:run.n] if run.third == "low" else order[-run.n:]]

def prior_of(run: Run, folder: Path, path: str | None) -> derain.VQGAN:
    """The VQGAN of a run of the prior.  One serves all seeds, except for split photographs."""
    seed = 0 if run.images in derain.BACKGROUNDS else run.seed
    steps = max(1, round(3500 / 2400 * run.steps))
    file = folder / f"vqgan_{run.images}_{steps}_{seed}.pt"
    if not file.exists():
        vqgan = derain.build_network(derain.VQGAN, seed, **derain.PRIOR)
        derain.pretrain(vqgan, images_of(run.images, seed, path)[0], steps, seed)
        temporary = file.with_suffix(f".{os.getpid()}")
        derain.save_checkpoint(temporary, vqgan, "vqgan", derain.PRIOR)
        os.replace(temporary, file)
    return derain.load_vqgan(file)

def measure(run: Run, folder: Path, path: str | None = None) -> list[dict]:
    """Train as `run` says and test on 32 patches of 96x96 held out: a row for each test."""
    training, held_out = images_of(run.images, run.seed, path)
    if run.steps:
        arguments = {"channels": run.size} if run.size else {}
        if run.net == "prior":
            arguments = {"vqgan": prior_of(run, folder, path)}
        make = Autoencoder if run.net == "autoencoder" else derain.NETWORKS[run.net]
        network = derain.build_network(make, run.seed, **arguments)
        degrade = degradation(run.trained_on)
        derain.train(network, patches_of(run, training), degrade, run.steps, run.seed)
    clean = derain.sample_patches(held_out, 32, 96, derain.stream(run.seed, "test patches"))
    rows = []
    for kind in tests_of(run):
        degraded = degradation(kind)(clean, derain.stream(run.seed, "test", kind))
        if run.steps:
            output = derain.predict(network, degraded)
        else:
            output = degraded if run.net == "rainy" else derain.opening(degraded)
        measured = derain.decoupled_evaluation(output, degraded, clean)
        rows.append({**asdict(run), "tested_on": kind, **measured})
    return rows

def yardstick(run: Run, net: str) -> Run:
    """The untrained run, "rainy" or "opening", on the images and in the tests of `run`."""
    return Run(net, images=run.images, n=0, trained_on=run.trained_on, steps=0, seed=run.seed)

# ---- 4  How are many runs done, and kept? --------------------------------------------------------

def file_of(run: Run, folder: Path) -> Path:
    """Where the result of a run is kept until it is collected."""
    return folder / ("_".join(map(str, astuple(run))) + ".json")

def read_table(path: Path) -> dict[Run, list[dict]]:
    """The finished runs in runs.csv, each with its rows."""
    table = {}
    if path.exists():
        for row in csv.DictReader(open(path, encoding="utf-8")):
            fields = {key: type(value)(row[key]) for key, value in asdict(Run()).items()}
            words = (*fields, "tested_on")
            row = {key: row[key] if key in words else float(row[key]) for key in row} | fields
            table.setdefault(Run(**fields), []).append(row)
    return table

def write_table(table: dict[Run, list[dict]], path: Path) -> None:
    """Write all finished runs, sorted, so that the same runs give the same bytes."""
    rows = list(itertools.chain(*(table[run] for run in sorted(table, key=astuple))))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")

def do_runs(runs: list[Run], table: dict[Run, list[dict]], folder: Path, path: str | None) -> None:
    """Do the missing runs; under torchrun, this rank's share.  Rank 0 fills the table."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [run for run in runs[rank::ranks]
            if run not in table and not file_of(run, folder).exists()]
    begun = time.monotonic()
    for i, run in enumerate(mine):
        rows = measure(run, folder, path)
        temporary = file_of(run, folder).with_suffix(f".{rank}")
        temporary.write_text(json.dumps(rows))
        os.replace(temporary, file_of(run, folder))
        left = (time.monotonic() - begun) / (i + 1) * (len(mine) - i - 1) / 60
        print(f"{temporary.stem}: {i + 1} of {len(mine)}, {left:.0f} min left", flush=True)
    if rank == 0:
        for run in [run for run in runs if run not in table]:
            while not file_of(run, folder).exists():  # until the other ranks are done
                time.sleep(1)
            table[run] = json.loads(file_of(run, folder).read_text())

# ---- 5  What does the paper claim, and which runs can tell? --------------------------------------

@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and pairs of runs that differ in one thing.

    panels: of each pair the first should be the better.  tested_on: degradations; "training" is the
    one trained on, "other" the mean over all others of its family.
    """
    paper: str
    panels: dict[str, tuple[Run, Run]]
    tested_on: tuple[str, ...] = ("unseen", "strokes")

NUMBERS, RANGES = (2, 8, 64, 1024), ("small", "medium", "large")

def few(run: Run) -> tuple[Run, Run]:
    """8 backgrounds against 1,024."""
    return replace(run, n=8), replace(run, n=1024)

def make_claims(images: str, steps: int) -> dict[str, Claim]:
    """All claims, in the order in which they are run; images: faces, or the name of photographs."""
    run = Run(images=images, steps=steps)
    drawn = images in derain.BACKGROUNDS
    panels = {"resnet": few(run)}  # on faces, or photographs
    if drawn:
        for net in ("unet", "swinir"):
            panels[net] = few(replace(run, net=net))
        for kind in ("natural", "manga", "urban"):
            panels[f"resnet, {kind}"] = few(replace(run, images=kind))
    sharp = replace(run, images="natural" if drawn else images, n=64)
    large = replace(run, trained_on="large")
    claims = {
        "few": Claim("8 backgrounds beat 1,024 in unseen rain (Fig. 1, 4)", panels),
        "benchmark": Claim("the usual benchmark, in the training rain, picks 1,024 (Fig. 1)", {
            label: (many, fewer) for label, (fewer, many) in panels.items()}, ("training",)),
        "balance": Claim("the wider the range of rain, the more backgrounds are best", {
            "large rain: 1,024, 8 backgrounds": (large, replace(large, n=8)),
            "1,024 backgrounds: large, small rain": (large, run)}),
        "sharp": Claim("backgrounds of low sharpness beat those of high (Fig. 5)", {
            "64 backgrounds": (replace(sharp, third="low"), replace(sharp, third="high"))}),
        "blur": Claim("the same for motion blur of other directions", {
            "8 against 1,024": few(replace(run, trained_on="blur-narrow")),
            "wide against narrow": (replace(run, trained_on="blur-wide"),
                                    replace(run, trained_on="blur-narrow"))}, ("blur-other",)),
        "noise": Claim("the same for noise of other kinds", {
            f"on {kind}": few(replace(run, trained_on=kind)) for kind in NOISE}, ("other",)),
        "capacity": Claim("it is not network capacity: `few` holds at other sizes", {
            "5,115 parameters": few(replace(run, size=8)),
            "75,747 parameters": few(replace(run, size=32))}),
        "prior": Claim("a content prior generalises better than a network trained from nothing", {
            f"{n:,}, {net}": (replace(run, net="prior", n=n), replace(run, net=net, n=n))
            for n, net in itertools.product((1024, 8), ("resnet", "autoencoder"))}),
    }
    return claims if drawn else {name: claims[name] for name in ("few", "balance", "sharp")}

def balance_map(run: Run) -> dict[tuple[str, int], Run]:
    """The map of `balance`: range of training rain x number of backgrounds."""
    cells = itertools.product(RANGES, NUMBERS)
    return {(rain, n): replace(run, n=n, trained_on=rain) for rain, n in cells}

def runs_of(name: str, claim: Claim, seeds: int) -> list[Run]:
    """All runs that a claim needs, seed by seed, with the untrained ones."""
    runs = list(itertools.chain(*claim.panels.values()))
    if name == "balance":
        runs += balance_map(runs[0]).values()
    runs += [yardstick(run, net) for run, net in itertools.product(runs, ("rainy", "opening"))]
    pairs = itertools.product(range(seeds), dict.fromkeys(runs))
    return [replace(run, seed=seed) for seed, run in pairs]

# ---- 6  What do the numbers say? -----------------------------------------------------------------

SIGN = {"E_R": 1, "E_W": -1, "E_B": -1, "psnr": 1}  # -1: lower is better
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by n - 1

def values(table: dict, run: Run, tested_on: str, metric: str, seeds: int) -> np.ndarray:
    """A metric of a run in each seed, (seeds,)."""
    kinds = {"training": {run.trained_on}, "other": {*tests_of(run)} - {run.trained_on}}
    kinds = kinds.get(tested_on, {tested_on})
    found = []
    for seed in range(seeds):
        rows = table[replace(run, seed=seed)]
        found.append(np.mean([row[metric] for row in rows if row["tested_on"] in kinds]))
    return np.array(found)

def effect(table: dict, pair: tuple, tested_on: str, metric: str, seeds: int) -> np.ndarray:
    """What the claim says is above zero, in each seed: how much the first of the pair is better."""
    first, second = (values(table, run, tested_on, metric, seeds) for run in pair)
    return SIGN[metric] * (first - second)

def verdict(effects: np.ndarray) -> tuple[float, float, str]:
    """Mean of paired differences, half the width of its 95 % confidence interval, and a word."""
    mean, n = effects.mean(), len(effects)
    if n < SEEDS:
        return mean, math.nan, "too few seeds"
    half = T_975[n - 2] * effects.std(ddof=1) / math.sqrt(n)
    if abs(mean) <= half:
        return mean, half, "undecided"
    return mean, half, "reproduced" if mean > 0 else "refuted"

def best_numbers(table: dict, run: Run, seeds: int) -> np.ndarray:
    """log2 of the number of backgrounds with the lowest E_W, (3 ranges of rain, seeds)."""
    runs = balance_map(run)
    found = []
    for rain in RANGES:
        errors = [values(table, runs[rain, n], "unseen", "E_W", seeds) for n in NUMBERS]
        found.append(np.log2(NUMBERS)[np.argmin(errors, axis=0)])
    return np.array(found)

def cell(effects: np.ndarray) -> str:
    """Effects as text."""
    mean, half, word = verdict(effects)
    return f"{mean:+.1f} ± {half:.1f} ({(effects > 0).sum()} of {len(effects)}) {word}"

def claim_lines(claim: Claim, table: dict, seeds: int) -> list[str]:
    """A claim's verdicts and its table, as lines of claims.md."""
    lines = ["| panel | tested on | E_W: first, second, opening, rainy | E_R | E_W | PSNR |",
             "|---|---|---|---|---|---|"]
    verdicts = []
    for tested_on in claim.tested_on:
        total = np.zeros((3, seeds))
        for label, pair in claim.panels.items():
            runs = (*pair, yardstick(pair[0], "opening"), yardstick(pair[0], "rainy"))
            errors = [values(table, run, tested_on, "E_W", seeds).mean() for run in runs]
            effects = [effect(table, pair, tested_on, m, seeds) for m in ("E_R", "E_W", "psnr")]
            total += effects
            words = [label, tested_on, ", ".join(f"{e:.1f}" for e in errors), *map(cell, effects)]
            lines.append(f"| {' | '.join(words)} |")
        means = total / len(claim.panels)
        verdicts.append([f"tested on {tested_on}", *(verdict(mean)[2] for mean in means)])
        if len(claim.panels) > 1:
            words = ["**mean of the panels**", tested_on, "", *map(cell, means)]
            lines.append(f"| {' | '.join(words)} |")
    sentences = ["**{}**: by E_R {}, by E_W {}, by PSNR {}.".format(*words) for words in verdicts]
    return [*sentences, "", *lines]

# ---- 7  What does it look like? ------------------------------------------------------------------

def figure_pairs(claim: Claim, table: dict, seeds: int) -> Figure:
    """A panel in each row, a measure in each column; a line for each seed, thick for the mean."""
    names = {"E_R": "E_R, change where wet\n(best: ideal)",
             "E_W": "E_W, error where wet\n(lower: better)",
             "E_B": "E_B, error elsewhere\n(lower: better)", "psnr": "PSNR, dB\n(higher: better)"}
    figure = Figure(figsize=(9, 1.2 + 1.6 * len(claim.panels)), layout="constrained")
    grid = figure.subplots(len(claim.panels), 4, squeeze=False)
    tested_on = claim.tested_on[0]
    for line, (label, pair) in zip(grid, claim.panels.items()):
        differ = [key for key in asdict(pair[0]) if getattr(pair[0], key) != getattr(pair[1], key)]
        for axes, metric in zip(line, names):
            first, second = (values(table, run, tested_on, metric, seeds) for run in pair)
            axes.plot([0, 1], [first, second], color="#0072b2", lw=0.7)
            axes.plot([0, 1], [first.mean(), second.mean()], "o-", color="#0072b2", lw=3)
            for net, style in (("rainy", ":"), ("opening", "--")):
                mean = values(table, yardstick(pair[0], net), tested_on, metric, seeds).mean()
                axes.axhline(mean, color="#d55e00", ls=style, lw=1, label=net)
            if metric == "E_R":
                ideal = values(table, pair[0], tested_on, "E_R_ideal", seeds).mean()
                axes.axhline(ideal, color="black", lw=1, label="ideal")
            axes.set_xticks([0, 1], [getattr(run, differ[0]) for run in pair], fontsize=8)
            axes.set(xlim=(-0.3, 1.3))
            axes.set_title(names[metric] if line[0] is grid[0, 0] else "", fontsize=9)
        line[0].set_ylabel(label, fontsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{claim.paper}; tested on: {tested_on}", fontsize=10, wrap=True)
    return figure

def report(claims: dict[str, Claim], table: dict, seeds: int, out: Path) -> None:
    """Draw a figure for each claim, and write claims.md."""
    lines = ["# The claims, and what came out", "",
             f"By claims.py, from runs.csv, seeds 0 to {seeds - 1}.  E_R, E_W, PSNR: by how much"
             " the first of two runs is better, mean and half of the 95 % confidence interval."]
    for name, claim in claims.items():
        lines += ["", f"## {name}: {claim.paper}", "", *claim_lines(claim, table, seeds)]
        if name == "balance":
            best = best_numbers(table, [*claim.panels.values()][0][0], seeds)
            lines += ["", "Number of backgrounds with the lowest E_W in unseen rain, each seed:"]
            for rain, numbers in zip(RANGES, 2 ** best):
                lines.append(f"- {rain} rain: {', '.join(f'{n:.0f}' for n in numbers)}")
            lines.append(f"- large less small, in powers of 2: {cell(best[-1] - best[0])}")
        figure = figure_pairs(claim, table, seeds)
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {out / name}.png")
    (out / "claims.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {out / 'claims.md'}")

# ---- 8  Command line -----------------------------------------------------------------------------

def main() -> None:
    """Do the missing runs, collect them, and report."""
    parser = derain.Parser(description="Test the paper's claims.", prog="claims.py",
                           epilog="example: python figures/claims.py few --seeds 2 --steps 200",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="few, balance ... (none: all)")
    parser.add_argument("--backgrounds", metavar="PATH", help="photographs, not drawn images")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(2, 11), metavar="N")
    parser.add_argument("--steps", type=partial(derain.whole, least=1), default=STEPS, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of finished runs")
    parser.add_argument("--fresh", action="store_true", help="do not read figures/runs.csv")
    parser.add_argument("--draw", action="store_true", help="report what is finished, no training")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same bytes on any number of cores
    images = "faces"
    if args.backgrounds:
        names = "".join(file.name for file in derain.image_files(args.backgrounds))
        images = f"photographs-{zlib.crc32(names.encode()):08x}"
    claims = make_claims(images, args.steps)
    for name in args.claims:
        if name not in claims:
            parser.error(f"there is no claim {name!r}; there are {', '.join(claims)}")
    standard = args.seeds >= SEEDS and args.steps == STEPS and not args.fresh
    out = FIGURES / images.replace("faces", "") if standard else args.runs
    for folder in (args.runs, out):
        folder.mkdir(parents=True, exist_ok=True)
    table = read_table(out / "runs.csv")
    runs = {name: runs_of(name, claims[name], args.seeds) for name in claims}
    for name in [] if args.draw else args.claims or claims:
        do_runs(runs[name], table, args.runs, args.backgrounds)
    finished = {name: claims[name] for name in claims if table.keys() >= set(runs[name])}
    if os.environ.get("RANK", "0") == "0" and finished:
        write_table(table, out / "runs.csv")
        report(finished, table, args.seeds, out)

if __name__ == "__main__":
    try:
        main()
    except (derain.BadInput, OSError) as problem:
        print(f"claims.py: {problem}", file=sys.stderr)
        sys.exit(2)
