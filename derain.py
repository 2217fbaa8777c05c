"""Why do image-restoration networks fail on degradations that they have not seen?

This file is a tutorial and a program.  In minutes, on a laptop, it makes the central experiment of Hu et
al., "Revisiting the Generalization Problem of Low-level Vision Models Through the Lens of Image Deraining"
(arXiv 2502.12600): a network trained to remove rain learns *the rain* instead of *the image* when the rain
is the simpler of the two, and then leaves alone any rain that looks different.  Train it on fewer, simpler
backgrounds, and the image becomes the simpler thing to learn: the same network now removes rain that it
never saw.

Read from the top; no section uses a later one.

    0  housekeeping           bad input, files, progress, random streams (skip it at first)
    1  rain, and noise        How is a rainy image made?
    2  backgrounds            What stands behind the rain, and how complex is it?
    3  networks               Does the architecture matter?
    4  content prior          Can a network be held to the manifold of clean images?
    5  training               What does the network actually learn from?
    6  decoupled evaluation   Was the rain removed, and was the background kept?
    7  experiments            Which of the paper's claims hold here?
    8  command line           python derain.py --help

Images are float32 tensors (n, 3, h, w) in [0, 1], a single image is (3, h, w), rain is (n, 1, h, w) in
[0, 1].  Whatever draws at random takes a numpy Generator or a seed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import textwrap
import threading
import time
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO
from zipfile import ZipFile, is_zipfile

# Threads of OpenMP wait for one another in a busy loop, and where another program runs too, the main job then
# takes three times as long.  Let them sleep soon.  (It has to be said before torch is imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

# glibc gives freed memory back and asks for it again at every training step, a third of the time.  Once it
# has seen a block of 30 MB come and go, it keeps as much.
torch.empty(30 * 2 ** 18)

# ==========================================================================================================
# 0  Housekeeping: what does every program need that has nothing to do with rain?
# ==========================================================================================================


class BadInput(ValueError):
    """What the user gave cannot work; the message says in one line what is wrong and what would work."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` if all went well: never half a file."""
    # The suffix tells PIL the format; a name may have 255 bytes.
    temporary = path.with_name(f".{path.stem[:40]}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as problem:
        raise BadInput(f"{path} cannot be written: {problem.strerror or problem}") from None
    finally:
        temporary.unlink(missing_ok=True)


def tell(text: object, file: TextIO | None = None) -> None:
    """Print one line (on standard output), over a progress line if there is one."""
    file = file or sys.stdout
    print(("\r\033[K" if file.isatty() else "") + " ".join(str(text).split()), file=file)


def complain(text: object) -> None:
    """Say in one line on standard error what went wrong, and count it: the exit status depends on that."""
    complain.count += 1
    tell(text, sys.stderr)


complain.count = 0


class Progress:
    """A line on standard error: how far a long job is, and how long it will still take.

    On a terminal the line rewrites itself; in a log a plain line appears every ten seconds.  Threads may
    share it.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.begun = self.shown = time.monotonic()
        self.live, self.lock = sys.stderr.isatty(), threading.Lock()

    def step(self, note: str = "") -> None:
        """Count one unit of work; `note` is shown behind the time left."""
        with self.lock:
            self.done += 1
            now, finished = time.monotonic(), self.done == self.total
            if now - self.shown > (0.2 if self.live else 10) or (finished and self.shown > self.begun):
                left = round((now - self.begun) / self.done * (self.total - self.done))
                text = f"{self.label}: {self.done}/{self.total}, {left // 60}:{left % 60:02} left{note}"
                ends = "\n" if finished or not self.live else ""
                print(f"\r{text}\033[K" if self.live else text, file=sys.stderr, end=ends, flush=True)
                self.shown = now


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """A random stream for each seed and purpose, such as stream(0, "training", 17) for step 17 of training.

    As the stream of any step can be made from nothing, an interrupted training need not store a random state.
    """
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in purpose)])


# ==========================================================================================================
# 1  Rain, and noise: how is a rainy image made?
#
# By linear superimposition, O = clip(B + R): a background B and a rain layer R, the same in all three
# channels. R is made as the field makes it: scatter seeds at random, and filter them with a short blurred
# line, so that each seed becomes a streak.  Four factors describe it: how many seeds; how wide, long and
# slanted the streaks. The intervals that the factors are drawn from are the training distribution that a
# network can overfit to.
# ==========================================================================================================


@dataclass(frozen=True)
class RainRange:
    """The four factors of rain, each an interval (low, high) from which every image draws uniformly.

    quantity: streak seeds per 10,000 pixels.  width, length: of a streak at half its brightness, in pixels.
    direction: degrees from vertical; positive leans like "/".  either_side: mirror the direction of half of
    the images, so that (55, 75) also stands for (-75, -55).  (Paper, Fig. 2 and 3b.)
    """

    quantity: tuple[float, float]
    width: tuple[float, float]
    length: tuple[float, float]
    direction: tuple[float, float]
    either_side: bool = False


# small lies within medium, and medium within large, in every factor.  `unseen` lies outside large in
# direction and length, and so is unseen for whoever was trained on any of the three.  Its streaks are
# longer; there are fewer of them, so that about as many pixels are wet.
RAIN = {
    "small": RainRange(quantity=(60, 80), width=(1.5, 2.0), length=(12, 16), direction=(-5, 5)),
    "medium": RainRange(quantity=(40, 120), width=(1.3, 2.5), length=(9, 20), direction=(-20, 20)),
    "large": RainRange(quantity=(20, 160), width=(1.0, 3.0), length=(6, 24), direction=(-45, 45)),
    "unseen": RainRange((25, 50), (1.3, 2.5), length=(28, 36), direction=(55, 75), either_side=True),
}
STREAK_PEAK = (0.3, 0.8)  # every streak draws its peak brightness from this interval


def draw_factors(n: int, rain_range: RainRange, rng: np.random.Generator) -> Tensor:
    """Draw the factors of n images: (n, 4), the columns being quantity, width, length, direction.

    All are drawn for each image by itself, column by column; at last the side it leans to, if either_side.
    """
    intervals = (rain_range.quantity, rain_range.width, rain_range.length, rain_range.direction)
    factors = np.stack([rng.uniform(low, high, n) for low, high in intervals], axis=1)
    if rain_range.either_side:
        factors[:, 3] *= rng.choice([-1, 1], n)
    return torch.from_numpy(factors).float()


def streak_kernel(width: float | Tensor, length: float | Tensor, direction: float | Tensor) -> Tensor:
    """The picture of one streak: a straight line of `length`, seen through a Gaussian blur, 1 at its centre.

    width, length: pixels at half brightness, above 0 (the Gaussian's sigma is width / 2.355). direction:
    degrees from vertical; positive turns the streak clockwise, so that it leans like "/". Three numbers
    give (k, k); three tensors (n,) give (n, k, k).  k is odd, and reaches length / 2 + 3 sigma to each side,
    rounded up, for the largest of the streaks.
    """
    shape = (torch.as_tensor(v, dtype=torch.float32)[..., None, None] for v in (width, length, direction))
    width, length, direction = shape  # (1, 1) or (n, 1, 1)
    sigma = width / math.sqrt(8 * math.log(2))
    radius = math.ceil((length / 2 + 3 * sigma).max().item())
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = axis[:, None], axis[None, :]  # y grows downwards, as the rows of an image do
    angle = torch.deg2rad(direction)
    along = x * torch.sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * torch.sin(angle)
    # Across, the blurred line is a Gaussian; along, it is a box whose ends the same Gaussian has softened.
    blur = math.sqrt(2) * sigma
    box = torch.erf((length / 2 - along) / blur) + torch.erf((length / 2 + along) / blur)
    return torch.exp(-(across / blur) ** 2) * box / (2 * torch.erf(length / 2 / blur))


def streak_seeds(noise: Tensor, quantity: Tensor) -> Tensor:
    """Turn uniform noise (n, h, w) in [0, 1) into seeds: a streak's peak brightness where one sits, else 0.

    quantity (n,): expected seeds per 10,000 pixels.  The pixels whose noise is in the top quantity / 10,000
    become seeds; how far above the threshold they lie, again uniform, is their brightness within STREAK_PEAK.
    """
    share = (quantity / 10_000)[:, None, None]
    above = (noise - (1 - share)) / share
    low, high = STREAK_PEAK
    return torch.where(above > 0, low + (high - low) * above, torch.zeros(()))


def render_rain(factors: Tensor, size: int | tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Rain layers (n, 1, h, w) in [0, 1] with the given factors (n, 4); size is (h, w), or one number.

    Each seed leaves its image's streak_kernel (k, k) times its brightness; where streaks meet they add up,
    to 1 at most.  Seeds also lie outside the frame: they come from rng.random((n, *canvas), np.float32), the
    canvas having sides h + k - 1 and w + k - 1 rounded up to multiples of 16, and the seed at (y, x) of it
    fills rows y - k + 1 to y and columns x - k + 1 to x of the frame.
    """
    height, width = (size, size) if isinstance(size, int) else size
    quantity, *streak = factors.unbind(1)
    kernel = streak_kernel(*streak)  # (n, k, k)
    # Streaks also come in from outside: scatter seeds on a larger canvas, keep the part that no edge touches.
    # The Fourier transform filters each layer with its own kernel; it is fastest when sides divide by 16.
    margin = kernel.shape[-1] - 1
    canvas = tuple(math.ceil((side + margin) / 16) * 16 for side in (height, width))
    noise = torch.from_numpy(rng.random((len(factors), *canvas), dtype=np.float32))
    spectrum = torch.fft.rfft2(streak_seeds(noise, quantity)) * torch.fft.rfft2(kernel, s=canvas)
    rain = torch.fft.irfft2(spectrum, s=canvas)[:, None, margin:margin + height, margin:margin + width]
    return rain.clamp(0, 1)


def rain_layers(n: int, size: int | tuple[int, int], rain_range: RainRange,
                rng: np.random.Generator) -> Tensor:
    """n rain layers (n, 1, h, w) in [0, 1], each with factors of its own; size is (h, w), or one number."""
    return render_rain(draw_factors(n, rain_range, rng), size, rng)


def add_rain(background: Tensor, rain: Tensor) -> Tensor:
    """O = clip(B + R, 0, 1), for B (n, 3, h, w) and R (n, 1, h, w) in [0, 1].  (Paper, Eq. 1.)"""
    return (background + rain).clamp(0, 1)


# All that training and evaluation know of a degradation: degrade(clean, rng) -> (degraded, residual).
Degradation = Callable[[Tensor, np.random.Generator], tuple[Tensor, Tensor]]


def rain_degradation(rain_range: RainRange) -> Degradation:
    """The degradation that rains on each clean image afresh; its residual is the rain layer."""
    def degrade(clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rain = rain_layers(len(clean), tuple(clean.shape[-2:]), rain_range, rng)
        return add_rain(clean, rain), rain
    return degrade


def stroke_rain(clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A second unseen rain, made another way, so that no claim hangs on one recipe; a Degradation.

    Drops are drawn as strokes that taper to a point, in three layers of depth: far ones many, small and
    faint; near ones few, big and bright.  They are translucent white, so what lies behind a layer shines
    through: O = 1 - (1 - B)(1 - R), "screen" blending, where R is the layers' opacity.
    """
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
    rain = torch.from_numpy(layers)[:, None]
    return 1 - (1 - clean) * (1 - rain), rain


# Noise is the other degradation that the paper looks at.  Each kind draws its level from a narrow interval,
# chosen so that every kind is about equally strong: 25 grey levels, root mean square, on mid grey.  (The
# first three are alike: white, and spread over all pixels.  The last two are the foreign ones.)
NOISE = {
    "gaussian": (0.09, 0.11),  # standard deviation, of each pixel and channel by itself
    "uniform": (0.16, 0.19),  # half the width of the interval of values
    "poisson": (40, 60),  # photons that make full brightness: the fewer, the noisier
    "salt-and-pepper": (0.03, 0.05),  # share of the pixels that turn white or black
    "correlated": (0.09, 0.11),  # standard deviation; neighbours are alike, as after a blur of sigma 1.5 px
}


def noise_degradation(kind: str) -> Degradation:
    """The degradation that adds noise of a kind in NOISE, O = clip(B + N, 0, 1), its level drawn per image.

    Its residual is N (n, 3, h, w) float32, signed, as it is before clipping.  Salt and pepper hit all
    channels of a pixel alike, half of them white; every other kind draws each channel by itself.
    """
    def degrade(clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        n, channels, height, width = clean.shape
        level = torch.from_numpy(rng.uniform(*NOISE[kind], (n, 1, 1, 1))).float()
        if kind == "gaussian":
            noise = level * torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        elif kind == "uniform":
            noise = level * (2 * torch.from_numpy(rng.random(clean.shape, dtype=np.float32)) - 1)
        elif kind == "poisson":
            noise = torch.from_numpy(rng.poisson(clean * level)) / level - clean
        elif kind == "salt-and-pepper":
            chance = torch.from_numpy(rng.random((n, 1, height, width), dtype=np.float32))
            noise = torch.where(chance < level, (chance < level / 2).float() - clean, torch.zeros(()))
        else:  # correlated
            axis = torch.arange(-4, 5) / 1.5
            blur = torch.exp(-0.5 * (axis[:, None] ** 2 + axis ** 2))
            white = rng.standard_normal((n * channels, 1, height + 8, width + 8), dtype=np.float32)
            # Weights whose squares add up to 1 keep the variance of white noise.
            noise = F.conv2d(torch.from_numpy(white), (blur / blur.square().sum().sqrt())[None, None])
            noise = level * noise.view(clean.shape)
        noise = noise.float()
        return (clean + noise).clamp(0, 1), noise
    return degrade


def degradation(name: str) -> Degradation:
    """The degradation of that name: one of RAIN, one of NOISE, or "strokes"."""
    if name == "strokes":
        return stroke_rain
    return noise_degradation(name) if name in NOISE else rain_degradation(RAIN[name])


# ==========================================================================================================
# 2  Backgrounds: what stands behind the rain, and how complex is it?
#
# The paper trains on faces (CelebA), natural images (DIV2K), manga (Manga109) and city scenes (Urban100).
# load_images reads any of those, and anybody's photographs.  For whoever has none, four painters make
# images with the property that the paper gives each category.  A painter returns an array (3, size, size),
# about in [0, 1].
# ==========================================================================================================

BACKGROUNDS = ("faces", "natural", "manga", "urban")


def paint(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour, (3,) or (3, h, w), over image (3, h, w) in place, where coverage (h, w) says."""
    colour = np.asarray(colour, dtype=np.float32)
    image += coverage * (colour.reshape(3, *(colour.shape[1:] or (1, 1))) - image)


def inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape: 1 where the signed distance to its outline is negative; a soft edge."""
    return np.clip(0.5 - distance / softness, 0, 1)


def draw_face(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth and strongly structured: one layout for all faces; colours and proportions vary."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32) - rng.uniform(-0.06, 0.06, (2, 1, 1))
    light = 1 + 0.18 * rng.choice([-1, 1]) * x - 0.1 * y
    wide, tall = rng.uniform(0.46, 0.56), rng.uniform(0.62, 0.70)
    skin = rng.uniform(0.45, 1.05) * rng.uniform([0.93, 0.68, 0.53], [0.93, 0.75, 0.63])
    hair = rng.uniform(0.15, 2.0) * rng.uniform([0.36, 0.18, 0.08], [0.36, 0.27, 0.18])

    def oval(cx, cy, rx, ry, softness=0.0):
        return inside((np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry), softness + 3 / size)

    def pair(cx, *rest):
        return oval(-cx, *rest) + oval(cx, *rest)

    image = np.zeros((3, size, size), dtype=np.float32)
    fringe = inside(y + rng.uniform(0.30, 0.45) + 0.3 * rng.choice([-1, 1]) * x, 0.06)
    for coverage, colour in (
        (np.ones_like(x), rng.uniform(0.25, 0.85) + rng.uniform(-0.15, 0.15, 3)),  # backdrop, hair, shoulders
        (oval(0, 0.02, wide + 0.14, tall + rng.uniform(0.08, 0.35), 0.06), hair),
        (oval(0, 1.25, 0.95, 0.45, 0.03), rng.uniform(0.1, 0.9, 3)),
        (oval(0, 0.70, 0.24, 0.45, 0.04), 0.82 * skin),  # neck, face, cheeks
        (oval(0, 0.06, wide, tall, 0.04), skin),
        (0.35 * pair(0.30, 0.24, 0.17, 0.13, 0.16), skin * [1.05, 0.72, 0.70]),
        (pair(0.22, -0.06, 0.115, 0.055), [0.95, 0.95, 0.93]),  # eyes, irises, pupils, brows
        (pair(0.22, -0.06, 0.055, 0.055), rng.uniform(0.1, 0.5, 3)),
        (pair(0.22, -0.06, 0.025, 0.028), [0.02, 0.02, 0.02]),
        (pair(0.22, -0.20, 0.15, 0.028, 0.02), 0.7 * hair),
        (0.5 * oval(0.02, 0.22, 0.085, 0.06, 0.07), 0.72 * skin),  # nose, lips, the line between them, fringe
        (oval(0, 0.42, 0.20, 0.065), skin * [0.95, 0.55, 0.55]),
        (oval(0, 0.42, 0.17, 0.012), skin * [0.48, 0.28, 0.28]),
        (fringe * oval(0, 0.04, wide + 0.02, tall + 0.04, 0.06), hair),
    ):
        paint(image, coverage, np.reshape(colour, (3, 1, 1)) * light)
    return image


def draw_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Dead leaves: discs with radii of density r^-3 that hide one another (Lee, Mumford & Huang 2001).

    They have the statistics of natural images: edges at every scale, occlusion, smooth shading.  The smallest
    leaf differs from scene to scene, as the distance to the subject does: its radius is 2.5 to 10 pixels.
    The largest has size / 2 + 10.  They lie eight deep, so that no gap remains; colours vary about a scene's.
    """
    image = np.zeros((3, size, size), dtype=np.float32)
    scene = rng.uniform(0.2, 0.7) + rng.normal(0, 0.08, 3)  # the light that all leaves of a scene share
    smallest, largest = 2.5 * 4 ** rng.random(), size / 2 + 10
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest ** -2 - largest ** -2)
    for _ in range(math.ceil(8 * (size + 2 * smallest) ** 2 / mean_area)):  # eight deep: no gap remains
        u = rng.random()
        r = (smallest ** -2 * (1 - u) + largest ** -2 * u) ** -0.5  # inverts the cumulative distribution
        cx, cy = rng.uniform(-r, size + r, 2)
        edges = np.clip([cy - r - 1, cy + r + 2, cx - r - 1, cx + r + 2], 0, size).astype(int)
        window = (slice(None), slice(*edges[:2]), slice(*edges[2:]))
        y, x = np.ogrid[window[1:]]
        y, x = (y - cy).astype(np.float32), (x - cx).astype(np.float32)
        colour = np.clip(scene + rng.normal(0, 0.2) + rng.normal(0, 0.06, 3), 0.05, 1).reshape(3, 1, 1)
        shading = 1 + (rng.normal(0, 0.1) * x + rng.normal(0, 0.1) * y) / r
        paint(image[window], inside(np.sqrt(x * x + y * y) - r, 1.0), colour * shading)
    return image


def draw_manga(size: int, rng: np.random.Generator) -> np.ndarray:
    """Flat white and black, sharp ink lines, screentone: a page of four panels."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (256 / size)  # a page is 256 units wide at any size
    soft = 1.2 * 256 / size
    ink = np.zeros((size, size), dtype=np.float32)

    def screentone(pitch, grey):  # a grid of dots, turned by 45 degrees, that covers the share `grey`
        u, v = (x + y) / math.sqrt(2) % pitch - pitch / 2, (x - y) / math.sqrt(2) % pitch - pitch / 2
        return inside(np.hypot(u, v) - pitch * math.sqrt(grey / math.pi), soft)

    def line(distance, thickness):
        return inside(np.abs(distance) - thickness / 2, soft)

    gutter_x, gutter_y = rng.uniform(90, 166) + rng.uniform(-0.15, 0.15) * (y - 128), rng.uniform(90, 166)
    for side, level in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        frame = np.maximum.reduce([4 - side * (x - gutter_x), 4 - level * (y - gutter_y),
                                   np.abs(x - 128) - 124, np.abs(y - 128) - 124])
        cx, cy = gutter_x.mean() + side * rng.uniform(40, 80), gutter_y + level * rng.uniform(40, 80)
        angle, radius = np.arctan2(y - cy, x - cx), np.hypot(x - cx, y - cy)
        if rng.random() < 0.5:  # speed lines towards the hero
            gap = np.abs((angle / 2 / math.pi * rng.integers(30, 60)) % 1 - 0.5) * radius / 8
            art = inside(gap - rng.uniform(0.4, 0.9), soft) * (radius > 60)
        else:  # a toned sky, a ridge drawn in ink, the dark ground
            ridge = y - cy - 25 * np.sin(x / rng.uniform(12, 40) + rng.uniform(0, 6)) - 8 * np.sin(x / 5)
            art = screentone(rng.uniform(4, 8), rng.uniform(0.1, 0.5)) * inside(ridge, soft)
            art = np.maximum.reduce([art, line(ridge, 3), inside(rng.uniform(20, 60) - ridge, soft)])
        wobble = np.sin(rng.integers(3, 9) * angle + rng.uniform(0, 6))
        hero = radius - rng.uniform(22, 42) * (1 + 0.12 * wobble)
        shadow = screentone(rng.uniform(4, 7), 0.25) * (np.sin(angle + rng.uniform(0, 6)) > 0)
        art = np.maximum(np.where(hero < 0, shadow, art), line(hero, rng.uniform(2, 4)))
        for _ in range(3):  # strokes that swell and taper, as a pen's do
            curve = y - cy - rng.uniform(-40, 40) - rng.uniform(-0.6, 0.6) * (x - cx)
            curve -= 10 * np.sin((x - cx) / rng.uniform(10, 40))
            swell = rng.uniform(1, 3.5) * (1 + np.sin((x - cx) / 30))
            art = np.maximum(art, line(curve, swell) * (radius < 80))
        ink = np.maximum.reduce([ink, art * inside(frame, soft), line(frame, 2.5)])
    return np.repeat(1 - ink[None], 3, axis=0)


def draw_facades(size: int, rng: np.random.Generator) -> np.ndarray:
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
        columns, rows, panes = rng.integers(4, 12), rng.uniform(5, 14), rng.integers(2, 4)
        wall = rng.uniform(0.25, 0.9) * np.clip(rng.normal(1, 0.15, 3), 0, 1.1)
        trim = np.minimum(wall * rng.uniform(1.15, 1.5), 1)
        glass = rng.uniform(0.05, 0.45) * np.array([0.8, 0.95, 1.1]).reshape(3, 1, 1)
        soft = 1.5 / size / width
        body = inside(np.maximum(np.abs(u - 0.5) - 0.5, -v), soft)
        cu, cv = cell(u, columns), cell(v, rows)
        half_u, half_v = rng.uniform(0.22, 0.38), rng.uniform(0.25, 0.40)
        window = np.maximum(np.abs(cu) - half_u, np.abs(cv) - half_v)  # signed distance, in cells
        bars = np.maximum(np.abs(cell(cu / (2 * half_u), panes)), np.abs(cell(cv / (2 * half_v), 2))) > 0.42
        lamps = 1 + 0.5 * np.sin(7 * np.floor(u * columns) + 13 * np.floor(v * rows))  # some rooms are lit
        paint(image, body, wall.reshape(3, 1, 1) * (1.05 - 0.25 * u))
        paint(image, body * (np.abs(cv) > 0.47), 0.75 * wall)  # the line between two storeys
        paint(image, body * inside(window - 0.07, soft * columns), trim)
        paint(image, body * inside(window, soft * columns), glass * lamps)
        paint(image, body * inside(window, soft * columns) * bars, trim)
    return image


def draw_background(category: str, size: int, rng: np.random.Generator) -> Tensor:
    """One background (3, size, size) in [0, 1].  Raises ValueError if category is not in BACKGROUNDS."""
    painters = {"faces": draw_face, "natural": draw_leaves, "manga": draw_manga, "urban": draw_facades}
    if category not in painters:
        raise ValueError(f"no background category {category!r}; there are {', '.join(BACKGROUNDS)}")
    return torch.from_numpy(painters[category](size, rng)).float().clamp(0, 1)


# Formats that PIL decodes by itself.  (Others, such as EPS, go to a program that runs what they contain.)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm")


def open_image(path: str | Path) -> Tensor:
    """Decode one image file, upright and as RGB: (3, h, w) in [0, 1].

    Applies EXIF rotation, lays transparency over white, converts CMYK, palettes and 16-bit greys.
    Raises BadInput, naming the file, if it is missing, broken, no image, or has more pixels than PIL allows.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such image file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":  # greys of 16 or 32 bits, whole or floating point
                grey = np.nan_to_num(np.asarray(picture, dtype=np.float32))
                top = 65535 if picture.mode[0] == "I" else 255 if grey.max() > 1 else 1
                return torch.from_numpy(np.clip(grey / top, 0, 1)).expand(3, -1, -1).contiguous()
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            array = np.array(picture.convert("RGB"))
    except Exception as problem:  # decoders fail in as many ways as files are damaged
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise BadInput(f"{path} cannot be read as an image: {reason}") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)


def is_image(file: Path) -> bool:
    """Whether a file in a folder is taken for an image: by its suffix, and not if it is hidden."""
    return file.suffix.lower() in SUFFIXES and file.name[0] != "." and not file.is_dir()


def image_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files that paths name: files as they are, folders searched with their subfolders, sorted."""
    files = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file == path or is_image(file)]
        if not found:
            raise BadInput(f"{path}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        files += found
    return files


def load_images(path: str | Path | Iterable[str | Path], smallest: int = 1,
                pixels: float = math.inf) -> list[Tensor]:
    """Load a file, a folder, or several of either: a list of (3, h, w) in [0, 1], each of its own size.

    A file that is broken, or below `smallest` pixels a side, is skipped with a warning on standard error.
    `pixels` bounds the memory: of a larger collection, evenly spaced files and their central parts are taken.
    Raises BadInput if nothing usable is left.
    """
    files = list({os.path.realpath(file): file for file in image_files(path)}.values())  # each image once
    most = max(1, min(len(files), pixels // 256 ** 2))
    files = [files[int(i * len(files) / most)] for i in range(int(most))]
    side = int(min(pixels / most, 1e12) ** 0.5)
    images, progress = [], Progress("reading images", len(files))
    for file in files:
        try:
            image = open_image(file)
            height, width = image.shape[1:]
            if min(height, width) < smallest:
                raise BadInput(f"{file} is {width}x{height} pixels, smaller than {smallest}x{smallest}")
            if height * width > side ** 2:
                top, left = max(0, height - side) // 2, max(0, width - side) // 2
                image = image[:, top:top + side, left:left + side].clone()
            images.append(image)
        except (BadInput, OSError) as problem:
            complain(f"skipped: {problem}")
        progress.step()
    if not images:
        raise BadInput(f"none of the {len(files)} images is usable; give photographs of at least "
                       f"{smallest}x{smallest} pixels")
    return images


# The words by which benchmarks call their rainy (first group) and their clean images.
ROLE = re.compile(r"(?<![a-z])(?:(rainy?|inputs?|lq)|no[_ -]?rain|clean|targets?|gt|hq|ground[_ -]?truth)"
                  r"(?:[_ -]?images?)?(?![a-z])")


def pair_files(folder: str | Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """The pairs (rainy, clean) of a benchmark as it is unpacked, sorted, and the images without a partner.

    One rule for all layouts.  A word of ROLE tells a file's part: the name of a folder that it is in (input/,
    target/), or else one in its own (norain-001).  Without any it is clean, or rainy if it is a version of
    another (901_1 of 901).  Partners share their path, but for such folders and words, suffix and case.  If
    several do, those with the very same file name belong together, and otherwise nobody is guessed at.  A
    rainy image without a partner takes the clean one that it is a version of, if that has no other.
    Raises BadInput if the folder is missing or holds no pair.
    """
    def version_of(key: tuple[str, ...]) -> tuple[str, ...]:
        return *key[:-1], re.sub(r"_\d+$", "", key[-1])

    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder")
    keys, roles = {}, {}
    for file in sorted(filter(is_image, Path(folder).rglob("*"))):
        *homes, stem = (part.lower() for part in file.relative_to(folder).with_suffix("").parts)
        keys[file] = (*(home for home in homes if not ROLE.fullmatch(home)), ROLE.sub("", stem).strip("-_ "))
        named = [ROLE.fullmatch(home) for home in homes if ROLE.fullmatch(home)]
        roles[file] = named[-1] if named else ROLE.search(stem)
    known, rainy, clean = set(keys.values()), defaultdict(list), defaultdict(list)
    for file, key in keys.items():
        original = version_of(key)
        wet = roles[file][1] if roles[file] else original != key and original in known
        group = rainy if wet else clean
        group[key].append(file)
    partners = {}
    for key, files in rainy.items():
        same = {file: other for file in files for other in clean[key] if file.name == other.name}
        files = [file for file in files if file not in same]
        others = [other for other in clean[key] if other not in same.values()]
        partners |= same
        if len(files) == len(others) == 1:
            partners[files[0]] = others[0]
    taken = set(partners.values())
    for key, files in rainy.items():
        original = version_of(key)
        if original != key and len(clean[original]) == 1 and clean[original][0] not in taken:
            partners |= {file: clean[original][0] for file in files if file not in partners}
    if not partners:
        raise BadInput(f"{folder}: no pairs of a rainy and a clean image, such as input/1.png and "
                       "target/1.png, rainy/rain-1.png and norain-1.png, or 901_1.jpg and 901.jpg")
    return sorted(partners.items()), sorted(keys.keys() - partners.keys() - set(partners.values()))


def sample_patches(images: list[Tensor], n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Cut n patches (n, 3, size, size) at random places, spread as evenly over the images as n allows.

    Raises ValueError if an image is smaller than a patch.
    """
    if any(min(image.shape[1:]) < size for image in images):
        raise ValueError(f"an image is smaller than a patch of {size}x{size} pixels")
    order = np.concatenate([rng.permutation(len(images)) for _ in range(math.ceil(n / len(images)))])[:n]
    patches = []
    for image in (images[i] for i in order):
        top, left = (rng.integers(side - size + 1) for side in image.shape[1:])
        patches.append(image[:, top:top + size, left:left + size])
    return torch.stack(patches)


def sharpness(patches: Tensor) -> Tensor:
    """Mean gradient magnitude of each patch, per pixel: (n, 3, h, w) in [0, 1] to (n,).

    The gradient: forward differences, down and to the right, of the mean of the channels, where both exist.
    The paper sorts DIV2K by it into low, medium and high sharpness (Fig. 5).
    """
    grey = patches.mean(1)
    dy, dx = grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]
    return torch.hypot(dx, dy).mean((1, 2))


# ==========================================================================================================
# 3  Networks: does the architecture matter?
#
# Each network maps degraded images (n, 3, h, w) of any size to restored ones.  The paper finds the same
# failure in all of them, and concludes that it is not the architecture's doing.  Ours differ where it might
# matter.  A pixel that the ResNet draws depends on 21x21 pixels (streaks of unseen rain are longer), SwinIR's
# on 26x26, the U-Net's on 44x44.  SwinIR draws a correction to its input, the others the image.
# ==========================================================================================================


class ResNet(nn.Module):
    """A plain residual network: a convolution in, blocks that add to what they are given, a convolution out.

    No path leads around the network as a whole: it must draw all that it shows, so what it has learned to
    draw decides what comes out.  (With skip=True it draws a correction to its input instead.)  The default
    has 19,443 parameters.
    """

    def __init__(self, channels: int = 16, blocks: int = 4, skip: bool = False):
        super().__init__()
        self.skip = skip
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                                nn.Conv2d(channels, channels, 3, padding=1))
                                  for _ in range(blocks))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, degraded: Tensor) -> Tensor:
        features = self.head(degraded)  # (n, channels, h, w)
        for block in self.body:
            features = features + block(features)
        return self.tail(features) + degraded if self.skip else self.tail(features)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Grow images (n, c, h, w) at the right and the bottom until both sides divide by `multiple`.

    What is added mirrors the image, or, where the image is too small for that, repeats its edge.
    """
    bottom, right = (-side % multiple for side in images.shape[-2:])
    mirror = bottom < images.shape[-2] and right < images.shape[-1]  # or the image is too small for that
    return F.pad(images, (0, right, 0, bottom), "reflect" if mirror else "replicate")


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015), two levels deep.

    On the way down the image halves (the maximum of 2x2 pixels) and the channels double, so the network sees
    far; on the way up each level gets back the details that it had on the way down, as its first channels.
    Images are padded to sides that divide by 4, and cut again.  The default has 117,075 parameters.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        def two(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())
        self.down = nn.ModuleList([two(3, channels), two(channels, 2 * channels)])
        self.bottom = two(2 * channels, 4 * channels)
        self.grow = nn.ModuleList([nn.ConvTranspose2d(4 * channels, 2 * channels, 2, 2),
                                   nn.ConvTranspose2d(2 * channels, channels, 2, 2)])
        self.up = nn.ModuleList([two(4 * channels, 2 * channels), two(2 * channels, channels)])
        self.tail = nn.Conv2d(channels, 3, 1)

    def forward(self, degraded: Tensor) -> Tensor:
        features, details = pad_to_multiple(degraded, 4), []
        for level in self.down:
            details.append(level(features))
            features = F.max_pool2d(details[-1], 2)
        features = self.bottom(features)  # (n, 4 channels, h / 4, w / 4)
        for grow, level in zip(self.grow, self.up):
            features = level(torch.cat([details.pop(), grow(features)], 1))
        return self.tail(features)[..., :degraded.shape[2], :degraded.shape[3]]


# SwinIR (Liang et al. 2021) replaces the convolution by attention: each pixel collects from all others what
# it needs, weighted by how well they match.  All others would be too many, so pixels attend within windows;
# and so that news also crosses from window to window, every second block shifts the windows by half.

def to_windows(image: Tensor, window: int) -> Tensor:
    """Cut (n, h, w, c) into windows: (n * windows, window * window, c), windows and pixels row by row."""
    n, h, w, c = image.shape
    cut = image.view(n, h // window, window, w // window, window, c)
    return cut.transpose(2, 3).reshape(-1, window * window, c)


def from_windows(windows: Tensor, window: int, shape: torch.Size) -> Tensor:
    """Undo to_windows; shape is that of the image, (n, h, w, c)."""
    n, h, w, c = shape
    cut = windows.view(n, h // window, w // window, window, window, c)
    return cut.transpose(2, 3).reshape(shape)


@lru_cache(maxsize=16)  # made once for each image size
def shift_mask(h: int, w: int, window: int, device: torch.device) -> Tensor:
    """What to add to attention in shifted windows, (windows, window ** 2, window ** 2): 0 or -infinity.

    Shifting rolls the image (h, w) up and to the left, by window // 2, around its edges.  So a window at the
    bottom or the right holds pixels from opposite sides of the image, which must not attend to one another:
    -infinity for them, as query and key.  h and w divide by window; windows as in to_windows.
    (The original adds -100.  The weights of 1e-44 that this leaves are denormal numbers, on which some
    processors are very slow.)
    """
    def band(side: int) -> Tensor:  # 0, then 1 in the last window, then 2 in the part that was rolled in
        place = torch.arange(side, device=device)
        return (place >= side - window).long() + (place >= side - window // 2)
    region = to_windows((3 * band(h)[:, None] + band(w))[None, :, :, None], window)[..., 0]
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -math.inf)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each offset between two pixels.

    windows (b, n, c), n = window ** 2; mask (windows of an image, n, n), to be added, or None.  `qkv` makes
    queries, then keys, then values, each with its heads side by side; matches are divided by the root of a
    head's channels; offset[i, j] is the row of the bias table for query i and key j.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = (t.flatten() for t in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        offset = (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)
        self.register_buffer("offset", offset, persistent=False)  # row of the table for each pair of pixels

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = windows.shape  # windows of the batch, pixels of a window, channels
        qkv = self.qkv(windows).view(b, n, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each (b, heads, n, c / heads)
        bias = self.relative_position_bias_table[self.offset].permute(2, 0, 1)  # (heads, n, n)
        if mask is not None:
            bias = bias + mask[:, None]  # (windows of an image, heads, n, n)
        match = query * (c // self.heads) ** -0.5 @ key.transpose(-2, -1)  # (b, heads, n, n)
        # (torch's fused attention is slower here, as the bias wants a gradient.)
        weights = (match.view(-1, *bias.shape) + bias).softmax(-1).view(match.shape)
        return self.proj((weights @ value).transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    """Attention in (shifted) windows, then a two-layer perceptron for each pixel; each adds to its input.

    Each starts from a normalization of its input; the perceptron has a GELU.  With shift > 0 (always half a
    window) the image (n, h, w, c) is rolled up and to the left before it is cut, and back afterwards.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, image: Tensor) -> Tensor:  # (n, h, w, c)
        attended, shift, mask = self.norm1(image), self.shift, None
        if shift:
            attended = attended.roll((-shift, -shift), (1, 2))
            mask = shift_mask(*image.shape[1:3], self.window, image.device)
        attended = self.attn(to_windows(attended, self.window), mask)
        attended = from_windows(attended, self.window, image.shape)
        image = image + (attended.roll((shift, shift), (1, 2)) if shift else attended)
        return image + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(image))))


class SwinIR(nn.Module):
    """SwinIR (Liang et al. 2021) for denoising: groups of Swin blocks between convolutions.

    It predicts a correction to its input.  Arguments, names and numerics are the published ones, so that the
    published denoising checkpoints load; only the default is smaller, with 10,935 parameters.
    """

    def __init__(self, embed_dim: int = 16, depths: tuple[int, ...] = (2,), num_heads: tuple[int, ...] = (2,),
                 window_size: int = 8, mlp_ratio: float = 2.0):
        super().__init__()
        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1)
        self.window = window_size
        self.conv_first = conv(3, embed_dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = nn.Sequential(*(SwinBlock(embed_dim, heads, window_size, i % 2 * (window_size // 2),
                                               int(embed_dim * mlp_ratio)) for i in range(depth)))
            group = nn.ModuleDict({"blocks": blocks})
            self.layers.append(nn.ModuleDict({"residual_group": group, "conv": conv(embed_dim, embed_dim)}))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body, self.conv_last = conv(embed_dim, embed_dim), conv(embed_dim, 3)
        for name, weights in self.named_parameters():
            if weights.ndim == 2:  # linear layers and bias tables start small
                nn.init.trunc_normal_(weights, std=0.02)
            elif name.endswith(("qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")):
                nn.init.zeros_(weights)
        mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)  # of DIV2K
        self.register_buffer("mean", mean, persistent=False)
        self.register_load_state_dict_pre_hook(self.drop_derived)

    @staticmethod
    def drop_derived(_, weights: dict[str, Tensor], *__) -> None:
        """Published checkpoints also hold tables that follow from the configuration; leave them out."""
        for key in [k for k in weights if k.endswith(("relative_position_index", "attn_mask"))]:
            del weights[key]

    def forward(self, degraded: Tensor) -> Tensor:
        image = pad_to_multiple(degraded, self.window) - self.mean
        shallow = self.conv_first(image)
        deep = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1))  # (n, h, w, c) from here on
        for layer in self.layers:
            features = layer["residual_group"]["blocks"](deep)
            deep = deep + layer["conv"](features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        deep = self.conv_after_body(self.norm(deep).permute(0, 3, 1, 2)) + shallow
        restored = image + self.conv_last(deep) + self.mean
        return restored[..., :degraded.shape[2], :degraded.shape[3]]


NETWORKS: dict[str, type[nn.Module]] = {"resnet": ResNet, "unet": UNet, "swinir": SwinIR}


RANDOM_STATE = threading.Lock()  # torch's own is shared by all threads


def seeded(make: Callable[..., nn.Module], seed: int, **arguments) -> nn.Module:
    """make(**arguments), its weights drawn from `seed`; torch's own random state stays as it was."""
    with RANDOM_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Channels-last keeps the channels of a pixel together in memory, which CPU convolutions prefer.
        return make(**arguments).to(memory_format=torch.channels_last)


def build_network(name: str, seed: int = 0, **arguments) -> nn.Module:
    """A network of NETWORKS with weights drawn from `seed`."""
    return seeded(NETWORKS[name], seed, **arguments)


# ==========================================================================================================
# 4  Content prior: can a network be held to the manifold of clean images?
#
# A VQGAN (Esser et al. 2021) is an autoencoder with a narrow waist.  Its encoder turns an image into a small
# grid of vectors; each is replaced by the nearest of a fixed list, the codebook; its decoder draws an image
# from those.  Trained on clean images, it has words for what clean images hold, and none for rain.
# ==========================================================================================================


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalization that a VQGAN uses throughout; channels must divide by 32."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalization and a swish (SiLU), added to the input's nin_shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class PixelAttention(nn.Module):
    """Every pixel collects from all others what it needs (single-head attention), and adds it to itself.

    q, k, v come from the normalized input; matches are divided by the root of the channels; then proj_out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (n, h w, c)
        collected = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(collected.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """The blocks at one resolution, each with attention behind it or without."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(outputs) if attention else nn.Identity() for _ in self.block)

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip(self.block, self.attn):
            x = attend(block(x))
        return x


def middle(channels: int) -> nn.Sequential:
    """Block, attention, block: what both halves have at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResidualBlock(channels, channels),
                                     attn_1=PixelAttention(channels),
                                     block_2=ResidualBlock(channels, channels)))


class Encoder(nn.Module):
    """Image to latent, halving the sides between levels."""

    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(inputs, outputs, blocks, attends) for inputs, outputs, attends in
                                  zip(widths, widths[1:], attention))
        for level, width in zip(self.down, widths[1:]):
            level.downsample = nn.Identity() if level is self.down[-1] else nn.Sequential(OrderedDict(
                pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent to image, doubling the sides between levels; one block a level more than the encoder."""

    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList(Level(inputs, outputs, blocks + 1, attends) for inputs, outputs, attends in
                                zip(widths[2:] + widths[-1:], widths[1:], attention))
        for level, width in zip(self.up, widths[1:]):
            level.upsample = nn.Identity() if level is self.up[0] else nn.Sequential(OrderedDict(
                grow=nn.Upsample(scale_factor=2), conv=nn.Conv2d(width, width, 3, padding=1)))
        self.norm_out, self.conv_out = group_norm(widths[1]), nn.Conv2d(widths[1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # up[0] is the level of the image itself, and comes last
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Vector quantization: replaces each vector by the nearest code (van den Oord et al. 2017)."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent (n, d, h, w) to the quantized latent, the codes' indices (n, h, w), and the codebook loss.

        Choosing the nearest has no gradient, so the quantized latent passes the gradient that it gets
        straight through to the latent.  The loss, mean((sg(z_q) - z)^2) + 0.25 mean((z_q - sg(z))^2) where sg
        stops the gradient, draws latents to their codes and, more slowly, codes to their latents.  (The paper
        has the factor on the other term; this is what its published code does.)
        """
        vectors = latent.permute(0, 2, 3, 1)  # (n, h, w, d)
        codes = self.embedding.weight
        # |v - c|^2 = |v|^2 - 2 v c + |c|^2, and |v|^2 is the same for all codes.
        indices = (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)
        quantized = self.embedding(indices).permute(0, 3, 1, 2)
        loss = F.mse_loss(quantized.detach(), latent) + 0.25 * F.mse_loss(quantized, latent.detach())
        return latent + (quantized - latent).detach(), indices, loss


class VQGAN(nn.Module):
    """The VQGAN of Esser et al. (2021): structure, names and numerics are the published ones.

    ch * ch_mult[i] channels at the i-th level, which has half the resolution of the one before; attention at
    the levels whose resolution is in attn_resolutions, if the image has `resolution` pixels a side (it may
    have any other, which then divides by 2 ** (levels - 1)).  n_embed codes of embed_dim numbers.
    Images are in [-1, 1] here.  The default is the published ImageNet configuration with 1024 codes.
    """

    def __init__(self, ch: int = 128, ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 attn_resolutions: tuple[int, ...] = (16,), resolution: int = 256, z_channels: int = 256,
                 n_embed: int = 1024, embed_dim: int = 256):
        super().__init__()
        widths = [ch, *(ch * factor for factor in ch_mult)]
        attention = [resolution // 2 ** level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = Encoder(widths, num_res_blocks, attention, z_channels)
        self.decoder = Decoder(widths, num_res_blocks, attention, z_channels)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Image (n, 3, h, w) in [-1, 1] to its latent before quantization, (n, embed_dim, h', w')."""
        return self.quant_conv(self.encoder(image))

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized latent (n, embed_dim, h', w') to an image (n, 3, h, w), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (n, 3, h, w) in [-1, 1] to its reconstruction and the codebook loss."""
        quantized, _, loss = self.quantize(self.encode(image))
        return self.decode(quantized), loss


class StandIn(dict):
    """Takes the place of an object that a checkpoint holds beside its tensors, and makes nothing of it."""

    def __init__(self, *_, **__):
        super().__init__()

    __hash__ = object.__hash__
    __setstate__ = append = extend = add = lambda self, *_: None


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers, and runs nothing that a file names.

    A name of a package that is not installed, or of harmless data, becomes a StandIn; any other is refused.
    """

    TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
               "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size", "torch.device")
    HARMLESS = {"set", "frozenset", "list", "dict", "tuple", "int", "float", "bytearray", "Namespace",
                "deque", "PosixPath", "WindowsPath", "defaultdict", "Counter", "datetime", "timedelta",
                "date", "dtype", "scalar", "ndarray", "encode", "_reconstruct", "_reconstructor"}

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" in self.TENSORS or isinstance(vars(torch).get(name), torch.dtype):
            return super().find_class(module, name)
        package = module.split(".")[0]
        installed = package in (*sys.stdlib_module_names, "__builtin__", "copy_reg") or (
            package != "__main__" and find_spec(package))
        if installed and name not in self.HARMLESS:
            raise BadInput(f"it names {module}.{name}, which no VQGAN needs; it was not run")
        return StandIn


def vqgan_arguments(weights: dict[str, Tensor]) -> dict:
    """The configuration of a VQGAN, from the names and shapes of its weights; resolution is a nominal one."""
    levels = len({key.split(".")[2] for key in weights if key.startswith("encoder.down.")})
    ch, resolution = len(weights["encoder.conv_in.weight"]), 2 ** levels
    n_embed, embed_dim = weights["quantize.embedding.weight"].shape
    return dict(
        ch=ch, z_channels=len(weights["encoder.conv_out.weight"]), n_embed=n_embed, embed_dim=embed_dim,
        ch_mult=tuple(len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(levels)),
        num_res_blocks=len({key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}),
        attn_resolutions=tuple(resolution // 2 ** i for i in range(levels)
                               if f"encoder.down.{i}.attn.0.q.weight" in weights), resolution=resolution)


def load_vqgan(path: str | Path) -> VQGAN:
    """Open a published VQGAN checkpoint (Lightning's .ckpt, old or new format), or one of ours.

    The configuration follows from the shapes of its tensors.  Nothing that the file names is run.
    Raises BadInput for a file that is missing, unfinished, names what it should not, or holds no VQGAN.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, or a folder")
    reader = SimpleNamespace(__name__="reader", Unpickler=TensorUnpickler,
                             load=lambda file, **options: TensorUnpickler(file, **options).load())
    try:
        if is_zipfile(path) and any(name.endswith("/constants.pkl") for name in ZipFile(path).namelist()):
            raise BadInput("it is a TorchScript program")
        content = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        reason = str(problem) if isinstance(problem, BadInput) else "it is no file of torch.save, or damaged"
        raise BadInput(f"{path} cannot be read as a checkpoint: {reason}") from None
    try:
        every = content.get("state_dict") or content.get("weights") or content
        named = {key.removeprefix("vqgan."): value for key, value in every.items()}  # in a Pretraining
        weights = {key: value.float() for key, value in named.items() if key.split(".")[0] in (
            "encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")}
        with torch.device("meta"):  # shapes without memory
            vqgan = VQGAN(**vqgan_arguments(weights))
        vqgan.load_state_dict(weights, assign=True)
    except Exception as problem:
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:150]
        raise BadInput(f"{path} holds no VQGAN with a codebook ({reason})") from None
    if "optimizer" in content:
        raise BadInput(f"{path} is unfinished; the `vqgan` command that began it goes on")
    return vqgan.requires_grad_(True)


# Our own prior: 4 times smaller latents and 256 codes, few enough that they cannot spell out rain as well.
PRIOR = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(), resolution=64, z_channels=64,
             n_embed=256, embed_dim=16)
# Number and side of the patches of a step, in turns.  A group's mean and variance are taken over the whole
# patch: a VQGAN that has seen patches of one size only draws images of other sizes badly.
PRETRAINING_PATCHES = ((8, 40), (2, 80))


class Critic(nn.Sequential):
    """A patch discriminator: for each place of an image a number, high where it looks like a real one."""

    def __init__(self, channels: int = 32):
        super().__init__(nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2),
                         nn.Conv2d(channels, 2 * channels, 4, 2, 1), group_norm(2 * channels),
                         nn.LeakyReLU(0.2), nn.Conv2d(2 * channels, 1, 4, 1, 1))


class Pretraining(nn.Module):
    """A VQGAN of these arguments, and what only its training needs: a critic, and each code's idle steps."""

    def __init__(self, **arguments):
        super().__init__()
        self.vqgan, self.critic = VQGAN(**arguments), Critic()
        self.register_buffer("idle", torch.zeros(len(self.vqgan.quantize.embedding.weight)))

    def optimizer(self) -> torch.optim.Optimizer:
        """One for both players."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, betas=(0.5, 0.9), fused=True)


def pretrain(training: Pretraining, images: list[Tensor], steps: int, seed: int = 0, *,
             start: int = 0, optimizer: torch.optim.Optimizer | None = None,
             after_step: Callable[[int, float, float], None] | None = None) -> None:
    """Train a VQGAN in place to reconstruct clean patches, cut from images (3, h, w) in [0, 1].

    Three losses, as in Esser et al. (2021), Section 3.1: L1; the codebook's; and, in the second half, the
    opinion of a critic that is trained alongside (hinge loss).  The critic's weight is adaptive: at the last
    layer its gradient is a tenth as long as that of L1.  A code that was not chosen for 30 steps is dead, and
    starts anew at a vector that the encoder has just made.
    start, optimizer: as in `train`, to go on with a pre-training that stopped.
    after_step(steps done, PSNR of this step in dB, share of the codes alive) is called between steps.
    """
    vqgan, critic, idle = training.vqgan, training.critic, training.idle
    optimizer = optimizer or training.optimizer()
    last, codes = vqgan.decoder.conv_out.weight, vqgan.quantize.embedding.weight
    for step in range(start, steps):
        rng = stream(seed, "pretraining", step)
        n, side = PRETRAINING_PATCHES[step % len(PRETRAINING_PATCHES)]
        clean = 2 * sample_patches(images, n, side, rng) - 1
        clean = clean.to(last.device, memory_format=torch.channels_last)
        warm_up, cosine = min(1, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1e-3 * warm_up * cosine
        optimizer.zero_grad()
        latent = vqgan.encode(clean)
        quantized, indices, codebook_loss = vqgan.quantize(latent)
        output = vqgan.decode(quantized)
        l1_loss = F.l1_loss(output, clean)
        loss = l1_loss + codebook_loss
        if step >= steps // 2:
            critic_loss = -critic(output).mean()
            strength = [torch.autograd.grad(part, last, retain_graph=True)[0].norm()
                        for part in (l1_loss, critic_loss)]
            loss = loss + 0.1 * strength[0] / (strength[1] + 1e-4) * critic_loss
            hinge = F.relu(1 - critic(clean)).mean() + F.relu(1 + critic(output.detach())).mean()
            hinge.backward()
        loss.backward(inputs=list(vqgan.parameters()))  # the critic must not learn to please
        optimizer.step()
        with torch.no_grad():
            idle += 1
            idle[indices.flatten()] = 0
            if step < 0.8 * steps:  # the last ones would have no time to learn
                vectors = latent.permute(0, 2, 3, 1).flatten(0, 2)
                dead = (idle > 30).nonzero()[:len(vectors), 0]
                chosen = torch.from_numpy(rng.permutation(len(vectors))[:len(dead)]).to(last.device)
                codes[dead], idle[dead] = vectors[chosen], 0
        if after_step:
            mse = F.mse_loss(output.detach(), clean).item() / 4  # [-1, 1] is twice as wide as [0, 1]
            after_step(step + 1, -10 * math.log10(mse), (idle < 30).float().mean().item())


def prepare(image: Tensor, encoder: Encoder) -> Tensor:
    """An image in [0, 1] as an encoder takes it: in [-1, 1], and grown until every level can halve it.

    A single pixel at the last level would be too few to normalize over: there are two by two at least.
    """
    factor = 2 ** (len(encoder.down) - 1)
    return 2 * pad_to_multiple(image, factor if min(image.shape[-2:]) > factor else 2 * factor) - 1


class VQGANPrior(nn.Module):
    """A pre-trained VQGAN as a restoration network: what it shows is assembled from codes of clean images.

    Codebook and decoder are frozen.  The encoder learns to find the codes of the clean image in the degraded
    one.  vqgan: a VQGAN (it is copied), or the arguments of one.  Images are in [0, 1] here, of any size:
    they are prepared for the VQGAN, and what it draws is brought back to about [0, 1] and cut to their size.
    """

    rate = 5e-4  # a learning rate that does not wipe out what the encoder knows already
    tile = 256  # for `restore`: where every pixel looks at all others, twice the side is 16 times the work

    def __init__(self, vqgan: VQGAN | dict | None = None):
        super().__init__()
        self.vqgan = copy.deepcopy(vqgan) if isinstance(vqgan, VQGAN) else VQGAN(**(vqgan or PRIOR))
        self.teacher = copy.deepcopy(nn.Sequential(self.vqgan.encoder, self.vqgan.quant_conv))
        self.requires_grad_(False)
        for part in (self.vqgan.encoder, self.vqgan.quant_conv):
            part.requires_grad_(True)

    def forward(self, degraded: Tensor) -> Tensor:
        restored, _ = self.vqgan(prepare(degraded, self.vqgan.encoder))
        return (restored[..., :degraded.shape[2], :degraded.shape[3]] + 1) / 2

    def loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """What training lowers: the squared distance of the latent from the clean image's codes.

        A mean over all numbers; the codes are those of the clean image's latent by the frozen `teacher`.
        L1 of the drawn image, through the gradient that quantization lets pass, may be added.  It buys 0.3 dB
        of PSNR on unseen rain, and training takes half as long again, as the decoder must run: we left it
        out.  Alone it does as well in five trainings of six, and fails in one (tests/prior_losses.py).
        """
        with torch.no_grad():
            target, _, _ = self.vqgan.quantize(self.teacher(prepare(clean, self.vqgan.encoder)))
        return F.mse_loss(self.vqgan.encode(prepare(degraded, self.vqgan.encoder)), target)


class Autoencoder(nn.Module):
    """The prior's encoder and decoder without codebook and pre-training: what the architecture does alone."""

    tile = VQGANPrior.tile

    def __init__(self, **arguments):
        super().__init__()
        vqgan = VQGAN(**{**PRIOR, **arguments})
        self.layers = nn.Sequential(vqgan.encoder, vqgan.quant_conv, vqgan.post_quant_conv, vqgan.decoder)

    def forward(self, degraded: Tensor) -> Tensor:
        restored = self.layers(prepare(degraded, self.layers[0]))
        return (restored[..., :degraded.shape[2], :degraded.shape[3]] + 1) / 2


NETWORKS |= {"autoencoder": Autoencoder, "prior": VQGANPrior}


# ==========================================================================================================
# 5  Training: what does the network actually learn from?
#
# From pairs: a clean patch, one of n backgrounds, and the same patch in rain that is drawn anew at every
# step. The number of steps is the same whatever n is.  So n counts *distinct backgrounds*, never compute: a
# network with few backgrounds sees each of them more often, and always in different rain.
# ==========================================================================================================

PATCH = 40  # side of a training patch, pixels
BATCH = 8
RATE = 2e-3  # Adam's learning rate at the start; it falls to 0 along half a cosine


def train(network: nn.Module, backgrounds: Tensor, degrade: Degradation, steps: int, seed: int = 0, *,
          start: int = 0, optimizer: torch.optim.Optimizer | None = None,
          after_step: Callable[[int, float], None] | None = None) -> list[float]:
    """Train a network in place to undo `degrade`; returns the loss (L1, but for the prior) of every step.

    backgrounds: clean patches (n, 3, h, w) in [0, 1].  degrade: see Degradation.
    Step i of `steps`, from 0: BATCH patches drawn at random, each mirrored (left to right) with a chance of
    one half, then degraded; a step of the optimizer at RATE * (1 + cos(pi i / steps)) / 2.  A network that
    has a `rate` or a `loss(degraded, clean)` of its own is trained with those.
    Step i depends only on the weights, the optimizer's state, `seed` and i: a training that goes on at step
    `start`, with the optimizer that it stopped with, ends with the weights of one that never stopped.
    after_step(steps done, loss) is called between steps, and may raise to stop there.
    """
    device = next(network.parameters()).device
    optimizer = optimizer or make_optimizer(network)
    losses = []
    for step in range(start, steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        degraded, _ = degrade(clean, rng)
        clean, degraded = (t.to(device, memory_format=torch.channels_last) for t in (clean, degraded))
        # The prior, which is no beginner, has a loss and a rate of its own.
        rate, own = getattr(network, "rate", RATE), getattr(network, "loss", None)
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = own(degraded, clean) if own else F.l1_loss(network(degraded), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after_step:
            after_step(step + 1, losses[-1])
    return losses


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `train` uses; made beforehand by whoever wants to keep its state."""
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=RATE, fused=True)


def save_checkpoint(path: str | Path, network: nn.Module, config: dict, step: int,
                    optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write a network, the configuration that made it, and the number of steps done.

    config holds plain values; "net" and "arguments" say how to build the network, "steps" how many it
    should get. The optimizer's state belongs in the checkpoint of an unfinished training only.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = {"config": config, "step": step, "weights": weights}
    if optimizer:
        content["optimizer"] = optimizer.state_dict()
    with writing(Path(path)) as temporary:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path, networks: dict = NETWORKS) -> tuple[nn.Module, dict]:
    """Read what save_checkpoint wrote: the network, on the CPU, and the content ("config", "step", ...).

    networks: those that are allowed.  Reads tensors and plain containers only, and runs nothing that the file
    names.  Raises BadInput for a file that is missing or is no checkpoint of ours.
    """
    if Path(path).is_dir():
        raise BadInput(f"{path} is a folder, where a checkpoint should be")
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; `python derain.py train -o {path}` would make it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = content["config"], content["weights"]
        if config["net"] not in networks:
            raise ValueError(f"it holds a {config['net']}")
        # A stranger's configuration may ask for any amount of memory.  On the "meta" device a network has
        # shapes but no memory; build it only if the file holds weights of these very shapes.
        with torch.device("meta"):
            expected = networks[config["net"]](**config["arguments"]).state_dict()
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
            raise ValueError("its weights do not fit its configuration")
        if not 0 <= content["step"] <= config["steps"]:
            raise ValueError("its number of steps is impossible")
        network = seeded(networks[config["net"]], 0, **config["arguments"])
        network.load_state_dict(weights)
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        named = re.search(r"GLOBAL (\S+)", str(problem))  # what an unpickler that ran code would have called
        reason = f"it names {named[1]}, which is not run" if named else f"{type(problem).__name__}: {problem}"
        if isinstance(problem, pickle.UnpicklingError) and not named:
            reason = "it is no file of torch.save, or damaged"
        reason = reason.split("\n")[0][:100]
        raise BadInput(f"{path} is no checkpoint that `derain.py train` wrote ({reason})") from None
    return network, content


# ==========================================================================================================
# 6  Decoupled evaluation: was the rain removed, and was the background kept?
#
# PSNR over the whole image cannot tell a network that removes nothing from one that removes all and blurs
# the rest.  But we know where it rained, so we can ask the two questions apart (paper, Fig. 2).  *On* the
# rainy pixels: how far did the output move from the input (E_R)?  *Off* them: how far is it from the clean
# image (E_B)?
# ==========================================================================================================

RAIN_THRESHOLD = 4 / 255  # rain fainter than this is invisible, and not counted as rain


def rain_mask(rain: Tensor, threshold: float = RAIN_THRESHOLD) -> Tensor:
    """M, where it rains: rain (n, c, h, w) to booleans (n, 1, h, w), true where a channel > threshold."""
    return rain.amax(1, keepdim=True) > threshold


def decoupled_evaluation(output: Tensor, rainy: Tensor, clean: Tensor, rain: Tensor) -> dict[str, float]:
    """Measure rain removal and background reconstruction apart.

    Images (n, 3, h, w) and rain (n, 1, h, w), or (n, 3, h, w) if it is coloured, all in [0, 1].
    With M the rain mask, and in grey levels from 0 to 255, returns:
      E_R        RMS(output - rainy) on M: how much was changed where it rained; higher is better, up to
                 E_R_ideal.  Wrecking the image raises it too, so never read it without E_B.
      E_B        RMS(output - clean) off M: how much was broken where it did not rain; lower is better.
      E_R_ideal  RMS(clean - rainy) on M: the E_R of a perfect output.
      psnr, ssim the usual whole-image measures, mean over the images, which hide the story.
    An RMS is one root of one mean over all pixels and channels of the set, and NaN if there is none; ssim is
    NaN for images below 11x11.
    Raises ValueError if the shapes do not belong together.  (Paper, Section 3; Gu et al. 2023, Section 3.)
    """
    if not output.shape == rainy.shape == clean.shape or rain_mask(rain).shape != clean[:, :1].shape:
        raise ValueError("shapes do not fit: output {}, rainy {}, clean {}, rain {}".format(
            *(tuple(t.shape) for t in (output, rainy, clean, rain))))
    mask = rain_mask(rain).expand_as(clean)

    def rms(difference: Tensor) -> float:
        return 255 * difference.double().square().mean().sqrt().item()

    return {"E_R": rms((output - rainy)[mask]), "E_B": rms((output - clean)[~mask]),
            "E_R_ideal": rms((clean - rainy)[mask]), "psnr": psnr(output, clean),
            "ssim": ssim(output, clean) if min(clean.shape[-2:]) >= 11 else math.nan}


def dense_evaluation(output: Tensor, noisy: Tensor, clean: Tensor) -> dict[str, float]:
    """What stands in for decoupled_evaluation where every pixel is noisy, so that no mask tells them apart.

    The change that a network makes, noisy - output, is split into the part that points along the noise v =
    noisy - clean, which is removal, and the rest, which is damage.  In grey levels, over the whole set:
      E_R        s RMS(v), s = <noisy - output, v> / <v, v>: how much noise was removed; E_R_ideal is RMS(v).
      E_B        RMS(output - clean - (1 - s) v): what is wrong in the output and is no noise left over.
    The two parts are orthogonal: RMS(output - clean)^2 = (E_R_ideal - E_R)^2 + E_B^2.  Damage that has
    nothing to do with the noise raises E_B alone.  But a blank output holds no noise either: as ever, E_R
    means nothing without E_B.  psnr and ssim as in decoupled_evaluation.
    """
    noise, change = (noisy - clean).double(), (noisy - output).double()
    share = (change * noise).sum() / noise.square().sum()
    ideal = 255 * noise.square().mean().sqrt()
    damage = 255 * (change - share * noise).square().mean().sqrt()
    return {"E_R": (share * ideal).item(), "E_B": damage.item(), "E_R_ideal": ideal.item(),
            "psnr": psnr(output, clean), "ssim": ssim(output, clean)}


def psnr(output: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio, -10 log10(MSE) dB, of each image (3, h, w) in [0, 1]; mean over images.

    Infinite for equal images.  Raises ValueError if the shapes differ.
    """
    if output.shape != clean.shape:
        raise ValueError(f"shapes differ: {tuple(output.shape)} and {tuple(clean.shape)}")
    mse = (output.double() - clean.double()).square().flatten(1).mean(1)  # (n,)
    return (-10 * torch.log10(mse)).mean().item()


def ssim(output: Tensor, clean: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of images (n, 3, h, w) in [0, 1]; mean over images.

    With means m, variances v and covariance c under an 11x11 Gaussian window of sigma 1.5 and sum 1, it is
    (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)), C1 = 0.01^2, C2 = 0.03^2; each
    channel by itself; averaged over all places where the window lies within the image.  Raises ValueError if
    the shapes differ or a side is below 11.
    """
    if output.shape != clean.shape or min(clean.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs two equal shapes of at least 11x11 pixels, "
                         f"not {tuple(output.shape)} and {tuple(clean.shape)}")
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:  # (h, w) to (h - 10, w - 10), by 11 weighted shifts down, 11 across
        height, width = image.shape[0] - 10, image.shape[1] - 10
        image = sum(weight * image[i:i + height] for i, weight in enumerate(window))
        return sum(weight * image[:, i:i + width] for i, weight in enumerate(window))

    similar, c1, c2 = [], 0.01 ** 2, 0.03 ** 2
    for x, y in zip(output.flatten(0, 1), clean.flatten(0, 1)):  # a channel at a time, to bound the memory
        x, y = x.double(), y.double()
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
        covariance = blur(x * y) - mean_x * mean_y
        similar.append(((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                        / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2))).mean())
    return torch.stack(similar).mean().item()


def evaluate_pair(output: Tensor, rainy: Tensor, clean: Tensor) -> dict[str, float]:
    """decoupled_evaluation of images (n, 3, h, w) in [0, 1] whose rain is known from rainy and clean alone.

    R is rainy - clean, where above 0: what got darker is no rain.  It is rounded to grey levels, so that 4 of
    them are never above RAIN_THRESHOLD.  Where a pair was compressed, as .jpg, the traces of that count as
    rain if they are above it in any channel.
    Adds "psnr_y" and "ssim_y", the field's convention: measured on the luma of BT.601, not rounded.
    """
    def luma(images: Tensor) -> Tensor:  # from 16 / 255 to 235 / 255
        weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
        return (16 + torch.einsum("c,nchw->nhw", weights, images.double())[:, None]) / 255

    y = luma(output), luma(clean)
    rain = (255 * (rainy - clean)).round().clamp(min=0) / 255
    return {**decoupled_evaluation(output, rainy, clean, rain),
            "psnr_y": psnr(*y), "ssim_y": ssim(*y) if min(clean.shape[-2:]) >= 11 else math.nan}


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output for images (n, 3, h, w), clipped to [0, 1]; 16 at a time, to bound the memory."""
    device = next(network.parameters()).device
    chunks = (chunk.to(device, memory_format=torch.channels_last) for chunk in images.split(16))
    return torch.cat([network(chunk).clamp(0, 1).cpu() for chunk in chunks])


def restore(network: nn.Module, image: Tensor, tile: int = 0, overlap: int = 48,
            quiet: bool = False) -> Tensor:
    """Restore one image (3, h, w) in [0, 1] of any size, by overlapping tiles, so that memory stays bounded.

    Near the inner edges of a tile the network misses what lies beyond.  So in the overlap of two tiles the
    outer third of each does not count, and across the middle third the one fades into the other.
    tile: their side in pixels; 0 is what suits the network.
    """
    output, third, tile = torch.empty(image.shape), overlap // 3, tile or getattr(network, "tile", 512)
    tops, lefts = (range(0, max(side - overlap, 1), tile - overlap) for side in image.shape[1:])
    progress = Progress("restoring tiles", len(tops) * len(lefts))

    def lay(piece: Tensor, canvas: Tensor, dim: int, start: int) -> None:
        below = canvas.narrow(dim, start, piece.shape[dim])
        weight = (torch.arange(piece.shape[dim]) + 0.5 - third) / third if start else torch.ones(1)
        weight = weight.clamp(0, 1).view(-1, 1) if dim == 1 else weight.clamp(0, 1)
        below.copy_(torch.where(weight < 1, torch.lerp(below, piece, weight), piece))

    for top in tops:  # tiles make a strip, strips make the image
        strip = torch.empty(3, min(tile, image.shape[1] - top), image.shape[2])
        for left in lefts:
            lay(predict(network, image[None, :, top:top + tile, left:left + tile])[0], strip, 2, left)
            if not quiet:
                progress.step()
        lay(strip, output, 1, top)
    return output


# ==========================================================================================================
# 7  Experiments: which of the paper's claims hold here?
#
# An experiment is a training and its tests.  A `Run` says all that its result depends on; `measure` does what
# it says.  To test a claim is to compare runs that differ in one thing only, with several seeds.
# ==========================================================================================================

IMAGE = 256  # side of an embedded background, pixels
TRAINING_IMAGES, HELD_OUT_IMAGES = 64, 16  # embedded ones; photographs are split 3 : 1
PHOTO_PIXELS = 40e6  # photographs are cut to this many pixels in all, which take 480 MB
TEST_PATCHES, TEST_PATCH = 48, 128  # number and side of the patches that networks are tested on
GRID_PATCHES, GRID_PATCH = 32, 96  # the same for the many runs of the grid, below
NUMBERS = (2, 8, 64, 1024)  # of training backgrounds
STEPS = 800  # of a run of the grid


def training_and_held_out(paths: list[str] | None, category: str,
                          seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images to train on and others to test on: embedded ones, or photographs split by image, not by patch.

    category: one of BACKGROUNDS, or "all".  A single photograph cannot be split: the test then uses
    embedded images.
    """
    def embedded(part: str, n: int) -> list[Tensor]:
        chosen = (category,) if category in BACKGROUNDS else BACKGROUNDS
        return [draw_background(chosen[i % len(chosen)], IMAGE, stream(seed, part, i)) for i in range(n)]

    if not paths:
        return embedded("backgrounds", TRAINING_IMAGES), embedded("held-out backgrounds", HELD_OUT_IMAGES)
    images = load_images(paths, smallest=TEST_PATCH, pixels=PHOTO_PIXELS)
    if len(images) == 1:
        tell("one photograph cannot be split; the test uses embedded images", sys.stderr)
        return images, embedded("held-out backgrounds", HELD_OUT_IMAGES)
    order = stream(seed, "split").permutation(len(images))
    held_out = max(1, len(images) // 4)
    return [images[i] for i in order[held_out:]], [images[i] for i in order[:held_out]]


@dataclass(frozen=True)
class Run:
    """One training and its tests: everything that the result depends on."""

    n: int  # number of backgrounds
    net: str = "resnet"
    arguments: tuple[tuple[str, int], ...] = ()  # of the network
    images: str = "faces"  # one of BACKGROUNDS, "all", or photographs (with a digest of what is in them)
    sharpness: str = "any"  # or low, middle, high: which third of the patches
    trained_on: str = "small"
    steps: int = STEPS
    seed: int = 0
    device: str = "cpu"

    def file(self, folder: Path) -> Path:
        """Where the grid keeps the result."""
        words = [self.net, *(f"{key}{value}" for key, value in self.arguments), self.images, self.sharpness,
                 f"n{self.n}", self.trained_on, f"steps{self.steps}", f"seed{self.seed}", self.device]
        return folder / f"{'_'.join(words)}.json"

    def row(self) -> dict:
        """The run as the first columns of a table."""
        return {**asdict(self), "arguments": " ".join(f"{key}={value}" for key, value in self.arguments)}


def training_patches(run: Run, images: list[Tensor]) -> Tensor:
    """The run's n backgrounds: the first of many, or, of 3n sorted by sharpness, the n of a third.

    Patches of side PATCH from stream(seed, "patches"); "many" is NUMBERS[-1], or n if that is more.
    """
    pool = 3 * run.n if run.sharpness != "any" else max(run.n, NUMBERS[-1])
    patches = sample_patches(images, pool, PATCH, stream(run.seed, "patches"))
    if run.sharpness != "any":
        patches = patches[sharpness(patches).argsort()]
    first = {"any": 0, "low": 0, "middle": run.n, "high": 2 * run.n}[run.sharpness]
    return patches[first:first + run.n]


def measure(run: Run, training: list[Tensor], held_out: list[Tensor], vqgan: VQGAN | None = None,
            patches: tuple[int, int] = (GRID_PATCHES, GRID_PATCH),
            after_step: Callable[[int, float], None] | None = None) -> tuple[list[dict], dict[str, dict]]:
    """Train as `run` says, and test on patches (number, side) held out, in unseen rains first.

    vqgan: for the prior.  Returns rows {"tested_on", "E_R", ...}, one for each kind of degradation; and for
    each kind its images (n, 3, h, w) {"degraded", "output", "clean"} and its "residual" (see Degradation).
    """
    arguments = {"vqgan": vqgan} if run.net == "prior" else dict(run.arguments)
    network = build_network(run.net, run.seed, **arguments).to(run.device)
    train(network, training_patches(run, training), degradation(run.trained_on), run.steps, run.seed,
          after_step=after_step)
    clean, rows, tests = sample_patches(held_out, *patches, stream(run.seed, "test patches")), [], {}
    for kind in tuple(NOISE) if run.trained_on in NOISE else ("unseen", "strokes", run.trained_on):
        degraded, residual = degradation(kind)(clean, stream(run.seed, "test", kind))
        output = predict(network, degraded)
        if kind in NOISE and kind != "salt-and-pepper":
            measured = dense_evaluation(output, degraded, clean)
        else:
            measured = decoupled_evaluation(output, degraded, clean, residual.abs())
        rows.append({"tested_on": kind, **measured})
        tests[kind] = {"degraded": degraded, "output": output, "clean": clean, "residual": residual}
    return rows, tests


# The first claim: the same network, trained for the same number of steps on few and on many backgrounds, then
# asked to remove rain that it never saw, and rain of the kind that it was trained on.

def few_against_many(few: Run, many: Run, training: list[Tensor], held_out: list[Tensor],
                     vqgan: VQGAN | None = None) -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
    """Measure two runs side by side, each in a thread of its own.

    (Small networks cannot keep several cores busy; two trainings, a core each, can.)  If the runs differ in n
    only, the few backgrounds are among the many, and both networks start from the same weights.  Returns a
    row for each kind of test and each "output": "rainy" (the input), "few", "many"; and for each kind of test
    the images of that name, "clean", and "rain".
    """
    progress, stopped = Progress("training", few.steps + many.steps), threading.Event()

    def after_step(*_) -> None:
        progress.step()
        if stopped.is_set():
            raise KeyboardInterrupt

    threads, patches = torch.get_num_threads(), (TEST_PATCHES, TEST_PATCH)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            measured = list(pool.map(lambda run: measure(run, training, held_out, vqgan, patches, after_step),
                                     (few, many)))
        finally:
            stopped.set()
            torch.set_num_threads(threads)
    rows, pictures = [], {}
    for (kind, test), *found in zip(measured[0][1].items(), measured[0][0], measured[1][0]):
        rainy, clean, rain = test["degraded"], test["clean"], test["residual"]
        untouched = {"tested_on": kind, **decoupled_evaluation(rainy, rainy, clean, rain)}
        rows += [{"output": output, **run.row(), **numbers} for output, run, numbers in zip(
            ("rainy", "few", "many"), (replace(few, n=0), few, many), (untouched, *found))]
        pictures[kind] = {"rainy": rainy, "few": test["output"], "many": measured[1][1][kind]["output"],
                          "clean": clean, "rain": rain}
    return rows, pictures


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as text: a column for each key, in its format; words (no format) are set to the left."""
    lines = [dict(zip(columns, columns))]
    lines += [{key: format(row[key], form) for key, form in columns.items()} for row in rows]
    width = {key: max(len(line[key]) for line in lines) for key in columns}
    return "\n".join("  ".join(line[key].rjust(width[key]) if form else line[key].ljust(width[key])
                               for key, form in columns.items()).rstrip() for line in lines)


def describe(rows: list[dict]) -> str:
    """The table of few_against_many as text, and one sentence that follows from its numbers."""
    few, many, few_seen, many_seen = (
        next(row for row in rows if (row["tested_on"], row["output"]) == (rain, output))
        for rain in ("unseen", rows[0]["trained_on"]) for output in ("few", "many"))
    gap = few["E_R"] - many["E_R"]
    better = "about as much" if abs(gap) < 2 else "more" if gap > 0 else "less"
    pick = "few" if few_seen["psnr"] > many_seen["psnr"] else "many"
    columns = {"tested_on": "", "output": "", "n": "d", "E_R": ".1f", "E_R_ideal": ".1f", "E_B": ".1f",
               "psnr": ".2f", "ssim": ".3f"}
    return table(rows, columns) + (
        f"\n\nTrained on {few['n']} backgrounds instead of {many['n']}, the network removes {better} of the "
        f"rain that it never saw:\nE_R {few['E_R']:.1f} against {many['E_R']:.1f} (ideal "
        f"{few['E_R_ideal']:.1f}), at E_B {few['E_B']:.1f} against {many['E_B']:.1f}.\nA benchmark on the "
        f"training rain would have picked the one with {pick}: PSNR {few_seen['psnr']:.1f} against "
        f"{many_seen['psnr']:.1f} dB.")


def show(axes, picture: Tensor, title: str = "", **options):
    """Draw an image (3, h, w) or a map (h, w) without ticks; returns matplotlib's handle."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    picture = np.asarray(picture.permute(1, 2, 0) if picture.ndim == 3 else picture)
    return axes.imshow(picture, interpolation="nearest", **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})


def figure_headline(rows: list[dict], pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """The first held-out image in unseen and in training rain: rainy, output of few, of many, clean, mask."""
    figure = Figure(figsize=(11.5, 5.5), layout="constrained")
    titles = {"rainy": "rainy input", "few": f"trained on {rows[1]['n']} backgrounds",
              "many": f"trained on {rows[2]['n']} backgrounds", "clean": "clean",
              "mask": "mask: where it rains"}
    for line, rain in zip(figure.subplots(2, 5), ("unseen", rows[0]["trained_on"])):
        measured = {row["output"]: row for row in rows if row["tested_on"] == rain}
        images = {**pictures[rain], "mask": rain_mask(pictures[rain]["rain"]).float()}
        for axes, (name, title) in zip(line, titles.items()):
            show(axes, images[name][0].squeeze(0), title if rain == "unseen" else "")
            if name in ("few", "many"):
                axes.set_xlabel("E_R {E_R:.0f} of {E_R_ideal:.0f},  E_B {E_B:.0f}".format(**measured[name]))
        line[0].set_ylabel("unseen rain" if rain == "unseen" else "rain as in training", fontsize=11)
    figure.suptitle("E_R: rain removed; higher is better, up to the ideal.  E_B: background broken; lower is "
                    "better.\n(grey levels, over the whole test set)", fontsize=10)
    return figure


def figure_decoupled(tested: dict[str, Tensor]) -> tuple[Figure, list[dict]]:
    """E_R and E_B explained on the second image that few_against_many tested, and the numbers shown.

    (On the first, E_R happens to be that of a perfect output: here too little changed, there too much.)
    """
    output, rainy, clean, rain = (tested[key][1:2] for key in ("few", "rainy", "clean", "rain"))
    measured = decoupled_evaluation(output, rainy, clean, rain)
    mask = rain_mask(rain)[0, 0]
    changed, broken = (255 * (output - other)[0].square().mean(0).sqrt() for other in (rainy, clean))
    figure = Figure(figsize=(12, 3.0), layout="constrained")
    axes = figure.subplots(1, 5)
    for left, picture, title in zip(axes, (rainy[0], mask.float(), output[0]), (
            "rainy input", "mask: where it rains", "output of a network")):
        show(left, picture, title)
    for right, values, title, label in (
            (axes[3], torch.where(mask, changed, math.nan), "changed, on the mask",
             "root mean square: E_R {E_R:.0f}\n(perfect: {E_R_ideal:.0f})"),
            (axes[4], torch.where(mask, math.nan, broken), "broken, off the mask",
             "root mean square: E_B {E_B:.0f}\n(perfect: 0)")):
        right.set_facecolor("0.8")  # where there is no number
        handle = show(right, values, title, cmap="viridis", vmax=100)
        right.set_xlabel(label.format(**measured))
    figure.colorbar(handle, ax=axes[3:], label="grey levels", shrink=0.8)
    return figure, [measured]


def figure_rain(seed: int = 0) -> tuple[Figure, list[dict]]:
    """The synthesis step by step, each factor alone, each range, strokes, noise; a row of numbers a layer."""
    figure, rows, size = Figure(figsize=(8, 17.5), layout="constrained"), [], 96
    grid = figure.subplots(11, 5)
    kernel = streak_kernel(2.0, 16.0, 20.0)
    noise = torch.from_numpy(stream(seed, "figure").random((1, size, size), dtype=np.float32))
    seeds = streak_seeds(noise, torch.tensor([60.0]))
    layer = F.conv2d(seeds[None], kernel.flip(0, 1)[None, None], padding="same").clamp(0, 1)
    rainy = add_rain(draw_background("urban", size, stream(seed, "figure background"))[None], layer)
    steps = {"1 noise": noise[0], "2 threshold: seeds": seeds[0], "3 streak kernel": kernel,
             "4 filtered: R": layer[0, 0], "5 clip(B + R)": rainy[0]}
    for axes, (title, picture) in zip(grid[0], steps.items()):
        show(axes, picture, title)
    grid[0, 0].set_ylabel("step by step", fontsize=11)
    names = ("quantity", "width", "length", "direction")
    varied = (((10, 25, 50, 100, 160), " / 10,000 px"), ((1, 1.5, 2, 2.5, 3), " px"),
              ((6, 12, 18, 24, 36), " px"), ((-70, -45, 0, 45, 70), "°"))
    lines = []
    for column, (values, unit) in enumerate(varied):
        factors = torch.tensor([[50.0, 2.0, 18.0, 10.0]]).repeat(5, 1)
        factors[:, column] = torch.tensor(values)
        lines.append((names[column], factors, [f"{value}{unit}" for value in values]))
    for name, rain_range in RAIN.items():
        lines.append((f"range: {name}", draw_factors(5, rain_range, stream(seed, "figure", name)), [""] * 5))
    for line, (label, factors, titles) in zip(grid[1:], lines):
        layers = render_rain(factors, size, stream(seed, "figure layers", label))
        line[0].set_ylabel(label, fontsize=11)
        for axes, drawn, rain, title in zip(line, factors.tolist(), layers[:, 0], titles):
            show(axes, rain, title)
            rows.append({"row": label, **dict(zip(names, drawn)), "mean_rain": rain.mean().item(),
                         "wet_share": rain_mask(rain[None, None]).float().mean().item()})
    clean = draw_background("urban", size, stream(seed, "figure background")).expand(5, -1, -1, -1)
    grid[9, 0].set_ylabel("unseen, too:\nstrokes", fontsize=11)
    grid[10, 0].set_ylabel("noise", fontsize=11)
    for axes, image in zip(grid[9], stroke_rain(clean, stream(seed, "figure strokes"))[0]):
        show(axes, image)
    for axes, kind in zip(grid[10], NOISE):
        show(axes, noise_degradation(kind)(clean[:1], stream(seed, "figure noise"))[0][0], kind)
    return figure, rows


def figure_backgrounds(seed: int = 0) -> tuple[Figure, list[dict]]:
    """Five embedded backgrounds of each category with their sharpness, and a row of numbers for each."""
    figure, rows = Figure(figsize=(9, 7.7), layout="constrained"), []
    for line, category in zip(figure.subplots(4, 5), BACKGROUNDS):
        line[0].set_ylabel(category, fontsize=12)
        for i, axes in enumerate(line):
            image = draw_background(category, IMAGE, stream(seed, "figure", category, i))
            rows.append({"category": category, "image": i, "sharpness": sharpness(image[None]).item()})
            show(axes, image, f"sharpness {rows[-1]['sharpness']:.3f}")
    return figure, rows


# The other claims are many such trainings: a grid.  As a `Run` says all that its result depends on, claims
# can share runs, and a grid that was stopped can go on.  A `Claim` says which runs to compare.
#
# Chosen before any effect was looked at: five seeds, because a verdict needs them all to agree.  8 and 1,024
# backgrounds, as in the main job; 2, to see the background break; 64, in between, also for each third by
# sharpness.  800 steps, and fewer and smaller test patches than the main job's, because timed runs said that
# the whole grid then takes an hour on two slow cores.  Quick: what ten minutes of one core allow.
# (Results are kept under the name of their Run.  Whoever changes more than that needs a new folder: --runs.)

PRETRAINING = 5  # steps of pre-training a VQGAN for each step of training a network
SEEDS = 5
QUICK_SEEDS, QUICK_STEPS = 2, 120


@dataclass(frozen=True)
class Claim:
    """A statement, most of them the paper's, that runs can confirm or refute.

    panels: each a list of runs that differ in the field `x` (and, later, in their seeds).  In each panel, for
    each kind of test, and for each seed, the effect is the sum of coefficient * metric over the values of x
    in `effect`; the statement holds where that is above zero.  {8: 1, 1024: -1} is the metric at 8 less that
    at 1024; {2: 1, 8: -2, 1024: 1} is (that at 2 less 8) less (that at 8 less 1024).
    """

    statement: str
    panels: dict[str, list[Run]]
    x: str
    effect: dict[int | str, int]
    metric: str
    tested_on: tuple[str, ...] = ("unseen",)
    also: tuple[str, ...] = ()  # more metrics, each with a verdict of its own


def over_numbers(**fixed) -> list[Run]:
    """Runs that differ in the number of backgrounds only."""
    return [Run(n=n, **fixed) for n in NUMBERS]


THREE_NETWORKS = {f"{net}, faces": over_numbers(net=net) for net in ("resnet", "unet", "swinir")}
EVERYTHING = {**THREE_NETWORKS, **{f"resnet, {kind}": over_numbers(images=kind) for kind in BACKGROUNDS[1:]}}
CLAIMS = {
    "few": Claim("E_R on unseen rain: 8 backgrounds > 1,024", EVERYTHING, "n", {8: 1, 1024: -1}, "E_R",
                 ("unseen", "strokes")),
    "benchmark": Claim("PSNR on the training rain: 1,024 backgrounds > 8, so a benchmark picks 1,024",
                       EVERYTHING, "n", {1024: 1, 8: -1}, "psnr", ("training",)),
    "too-few": Claim("E_B on unseen rain: 2 backgrounds instead of 8 cost more than 8 instead of 1,024",
                     EVERYTHING, "n", {2: 1, 8: -2, 1024: 1}, "E_B"),
    "sharp": Claim("E_R on unseen rain: 64 backgrounds of low sharpness > 64 of high, of the same images",
                   {"resnet, natural": [Run(n=64, images="natural", sharpness=third)
                                        for third in ("low", "middle", "high")]},
                   "sharpness", {"low": 1, "high": -1}, "E_R", ("unseen", "strokes")),
    "range": Claim("E_R on unseen rain: trained on large rain > trained on small",
                   {f"{n:,} backgrounds": [Run(n=n, trained_on=rain) for rain in ("small", "medium", "large")]
                    for n in (8, 1024)},
                   "trained_on", {"large": 1, "small": -1}, "E_R", ("unseen", "strokes")),
    "capacity": Claim("E_R on unseen rain: 8 backgrounds > 1,024, at a quarter and at four times the size",
                      {f"{size} parameters": [Run(n=n, arguments=more) for n in (8, 1024)]
                       for size, more in (("5,115", (("channels", 8),)), ("19,443", ()),
                                          ("75,747", (("channels", 32),)))},
                      "n", {8: 1, 1024: -1}, "E_R"),
    "noise": Claim("noise removed, on four kinds not trained on: 8 backgrounds > 1,024",
                   {f"trained on {kind}": [Run(n=n, trained_on=kind) for n in (8, 1024)] for kind in NOISE},
                   "n", {8: 1, 1024: -1}, "removed", ("other noise",)),
    "prior": Claim("E_R, and PSNR, on unseen rain: a pre-trained VQGAN > a network trained from nothing",
                   {f"{n:,} backgrounds, {net}": [Run(n=n, net=net), Run(n=n, net="prior")]
                    for n in (8, 1024) for net in ("resnet", "unet", "swinir", "autoencoder")},
                   "net", {"prior": 1, "resnet": -1, "unet": -1, "swinir": -1, "autoencoder": -1}, "E_R",
                   ("unseen", "strokes"), ("psnr",)),
    # Not in the paper, but in our toy: a network that draws the correction learns the degradation.
    "skip": Claim("(ours) E_R on unseen rain: 8 backgrounds > 1,024, even if the network adds to its input",
                  {label: [Run(n=n, arguments=arguments) for n in (8, 1024)] for label, arguments in (
                      ("resnet", ()), ("resnet, global skip", (("skip", 1),)))},
                  "n", {8: 1, 1024: -1}, "E_R", ("unseen", "strokes")),
    # Nor this: does the gap close or open as training goes on?  (Added after the first results of `few`, to
    # find out whether its 800 steps are too few.)
    "longer": Claim("(ours) E_R on unseen rain: 8 backgrounds > 1,024, at fewer steps and at more",
                    {f"{net}, {label}": [Run(n=n, net=net, steps=steps) for n in (8, 1024)]
                     for net, label, steps in (("resnet", "1/4 of the steps", STEPS // 4),
                                               ("resnet", "the steps", STEPS),
                                               ("resnet", "3 times the steps", 3 * STEPS),
                                               ("swinir", "the steps", STEPS),
                                               ("swinir", "3 times the steps", 3 * STEPS))},
                    "n", {8: 1, 1024: -1}, "E_R"),
}


def adapt(claim: Claim, images: str | None, steps: int, quick: bool, device: str) -> Claim:
    """The claim with other images (panels that then repeat one another are left out), device, and steps.

    quick keeps only the runs that the effect needs.
    """
    panels = {}
    for label, runs in claim.panels.items():
        adapted = [replace(run, images=images or run.images, steps=math.ceil(run.steps * steps / STEPS),
                           device=device)
                   for run in runs if not quick or getattr(run, claim.x) in claim.effect]
        if adapted not in panels.values():
            panels[label.removesuffix(f", {runs[0].images}") if images else label] = adapted
    return replace(claim, panels=panels)


def prior_file(run: Run, folder: Path) -> Path:
    """Where the VQGAN of a run of the prior is kept; one serves all seeds.

    Not so with photographs, which each seed splits anew: no VQGAN may know a photograph held out.
    """
    seed = 0 if run.images in BACKGROUNDS else run.seed
    return folder / f"vqgan_{run.images}_steps{PRETRAINING * run.steps}_seed{seed}_{run.device}.pt"


def reconstruction(vqgan: VQGAN, clean: Tensor) -> tuple[float, int]:
    """How well a VQGAN draws clean images (n, 3, h, w): PSNR in dB, and the number of codes that it used."""
    with torch.no_grad():
        latent = vqgan.encode(2 * clean.to(next(vqgan.parameters()).device) - 1)
        quantized, indices, _ = vqgan.quantize(latent)
        output = ((vqgan.decode(quantized) + 1) / 2).clamp(0, 1).cpu()
    return psnr(output, clean), len(indices.unique())


@lru_cache(maxsize=None)
def read_result(path: Path) -> list[dict]:
    """The rows of a finished run, as `measure` gave them."""
    try:
        rows = json.loads(path.read_text())
        if not rows or any(not {"tested_on", "E_R", "E_B", "E_R_ideal", "psnr"} <= set(row) for row in rows):
            raise ValueError
        return rows
    except (ValueError, TypeError):
        raise BadInput(f"{path} is damaged; delete it, and the run will be done again") from None


def results(runs: list[Run], tested_on: str, metric: str, seeds: int, folder: Path) -> np.ndarray:
    """A metric of finished runs: (seeds, runs), of seeds 0, 1, ... whatever the runs' own.

    tested_on: a degradation; "training", the one trained on; or "other noise", the mean over all the others.
    metric: a key of the rows, such as "E_B", or "removed", E_R in % of E_R_ideal.
    """
    def one(run: Run) -> float:
        kinds = {"training": {run.trained_on}, "other noise": {*NOISE} - {run.trained_on}}
        rows = [row for row in read_result(run.file(folder))
                if row["tested_on"] in kinds.get(tested_on, {tested_on})]
        return np.mean([100 * row["E_R"] / row["E_R_ideal"] if metric == "removed" else row[metric]
                        for row in rows])
    return np.array([[one(replace(run, seed=seed)) for run in runs] for seed in range(seeds)])


def verdict(effects: Iterable[float]) -> str:
    """"reproduced" if every effect is above zero, "refuted" if every one is below, else "undecided".

    Zero and NaN are neither above nor below.
    """
    signs = set(np.sign(list(effects)))
    return "reproduced" if signs == {1} else "refuted" if signs == {-1} else "undecided"


def verdict_rows(name: str, claim: Claim, seeds: int, folder: Path) -> list[dict]:
    """The verdict on a claim: for each kind of test a row for all panels together, and one for each panel.

    Keys, in this order: claim (the name), tested_on, panel ("every panel", left out where there is but one,
    or its label), metric (the claim's, then each of `also`, with rows of its own), effect, spread, E_B, psnr,
    agree (a number of seeds), seeds, verdict ("too few seeds" below SEEDS).
    effect and spread are mean and standard deviation (n - 1) over the seeds (of the panels' mean, in the row
    for all); a seed agrees with the row for all if each of its panels does, and its verdict needs every panel
    in every seed.  E_B and psnr are what the same comparison gives in those metrics, on average: the price.
    """
    rows = []
    for metric, tested in itertools.product((claim.metric, *claim.also), claim.tested_on):
        panels = {"every panel": list(claim.panels.values())} if len(claim.panels) > 1 else {}
        panels |= {label: [runs] for label, runs in claim.panels.items()}
        for label, parts in panels.items():
            def effect(measure: str) -> np.ndarray:  # (parts, seeds)
                return np.array([results(runs, tested, measure, seeds, folder)
                                 @ [claim.effect.get(getattr(run, claim.x), 0) for run in runs]
                                 for runs in parts])
            found = effect(metric)
            rows.append({"claim": name, "tested_on": tested, "panel": label, "metric": metric,
                         "effect": found.mean(), "spread": found.mean(0).std(ddof=min(1, seeds - 1)),
                         "E_B": effect("E_B").mean(), "psnr": effect("psnr").mean(),
                         "agree": int((found > 0).all(0).sum()), "seeds": seeds,
                         "verdict": verdict(found.flat) if seeds >= SEEDS else "too few seeds"})
    return rows


def claim_rows(claim: Claim, seeds: int, folder: Path) -> list[dict]:
    """Everything measured for a claim: a row for each panel, run, seed and kind of test."""
    runs = [(label, replace(run, seed=seed)) for label, panel in claim.panels.items() for run in panel
            for seed in range(seeds)]
    return [{"panel": label, **run.row(), **row} for label, run in runs
            for row in read_result(run.file(folder))]


def figure_claim(claim: Claim, seeds: int, folder: Path) -> Figure:
    """A column a panel, a row a metric, over the claim's x: mean of the seeds, and a band that holds all.

    Big dots are what the claim compares.
    """
    metrics = {"E_R": ("E_R", "E_B"), "E_B": ("E_B",), "psnr": ("psnr",)}[claim.metric]
    names = {"E_R": "E_R: rain removed\n(higher is better)",
             "E_B": "E_B: background broken\n(lower is better)",
             "psnr": "PSNR, dB\n(higher is better)", "n": "training backgrounds",
             "trained_on": "range of training rain", "sharpness": "sharpness of backgrounds",
             "unseen": "unseen rain", "strokes": "unseen rain of another make (strokes)",
             "training": "the training rain"}
    figure = Figure(figsize=(max(5.5, 1.5 + 1.9 * len(claim.panels)), 1.3 + 2.2 * len(metrics)),
                    layout="constrained")
    grid = figure.subplots(len(metrics), len(claim.panels), squeeze=False, sharex=True, sharey="row")
    effects = {row["panel"]: row["effect"] for row in verdict_rows("", claim, seeds, folder)
               if row["tested_on"] == claim.tested_on[0]}
    for metric, line in zip(metrics, grid):
        for axes, (label, runs) in zip(line, claim.panels.items()):
            values = [getattr(run, claim.x) for run in runs]
            place = np.log2(values) if claim.x == "n" else range(len(values))
            for tested, colour in zip(dict.fromkeys((*claim.tested_on, "unseen")), ("#0072b2", "#d55e00")):
                measured = results(runs, tested, metric, seeds, folder)
                axes.fill_between(place, measured.min(0), measured.max(0), color=colour, alpha=0.2, lw=0)
                axes.plot(place, measured.mean(0), "-", color=colour, label=names[tested])
                compared = [45 if value in claim.effect else 12 for value in values]
                axes.scatter(place, measured.mean(0), compared, color=colour)
                if metric == "E_R":
                    ideal = results(runs, tested, "E_R_ideal", seeds, folder).mean(0)
                    axes.plot(place, ideal, "--", color=colour, lw=1, label=f"{names[tested]}: ideal")
                    axes.set_ylim(0, 1.3 * ideal.max() if tested == "unseen" else None)
            axes.set_xticks(place, [f"{value:,}" if claim.x == "n" else value for value in values])
            if metric == metrics[-1]:
                axes.set_xlabel(names[claim.x])
            if metric == metrics[0]:
                axes.set_title(f"{label}\neffect {effects[label]:+.1f}", fontsize=10)
        line[0].set_ylabel(names[metric])
        if metric == "E_B":
            line[0].set_ylim(bottom=0)
    figure.suptitle(textwrap.fill(claim.statement, int(12 * figure.get_figwidth())), fontsize=10)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def figure_noise(claim: Claim, seeds: int, folder: Path) -> Figure:
    """Training kind against testing kind, for few backgrounds, many, and the gap: removal and damage."""
    numbers = [run.n for run in next(iter(claim.panels.values()))]
    figure = Figure(figsize=(11.5, 7.5), layout="constrained")
    for line, (metric, name, top) in zip(figure.subplots(2, 3, sharex=True, sharey=True), (
            ("removed", "noise removed, % (more is better)", 100),
            ("E_B", "E_B: image broken (less is better)", 30))):
        few, many = (np.array([[results([runs[i]], tested, metric, seeds, folder).mean() for tested in NOISE]
                               for runs in claim.panels.values()]) for i in range(2))  # (trained, tested)
        for axes, cells, title in zip(line, (few, many, few - many), (
                f"{numbers[0]} backgrounds", f"{numbers[1]:,} backgrounds", "few less many")):
            gap = axes is line[2]
            most = np.abs(cells).max() if gap else top
            better = "PuOr" if metric == "removed" else "PuOr_r"  # purple is better
            colours = {"cmap": better, "vmin": -most} if gap else {"cmap": "viridis", "vmin": 0}
            handle = axes.imshow(cells, vmax=most, **colours)
            for (i, j), value in np.ndenumerate(cells):
                dark = abs(value) > 0.7 * most if gap else value < 0.6 * most
                axes.text(j, i, f"{round(value):+}" if gap else round(value), ha="center", va="center",
                          color="white" if dark else "black", weight="bold" if i == j else "normal")
            axes.set_xticks(range(len(NOISE)), NOISE, rotation=30, ha="right")
            axes.set_yticks(range(len(NOISE)), NOISE)
            axes.set_title(f"{name}\n{title}" if axes is line[0] else title, fontsize=10)
            figure.colorbar(handle, ax=axes, shrink=0.8)
        line[0].set_ylabel("trained on")
    figure.supxlabel("tested on (bold: the kind trained on)", fontsize=10)
    return figure


def figure_prior(claim: Claim, seeds: int, folder: Path) -> Figure:
    """Each network's E_R, E_B and PSNR on unseen rain, a dot a seed; and what each makes of one image."""
    runs = list(dict.fromkeys(run for panel in claim.panels.values() for run in panel))
    nets, numbers = (list(dict.fromkeys(getattr(run, field) for run in runs)) for field in ("net", "n"))
    nets.append(nets.pop(nets.index("prior")))
    grid = [[next(run for run in runs if (run.net, run.n) == (net, n)) for net in nets] for n in numbers]
    figure = Figure(figsize=(11, 7.3), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    for axes, (metric, name) in zip(top.subplots(1, 3), (
            ("E_R", "E_R: rain removed (higher is better)"),
            ("E_B", "E_B: background broken (lower is better)"), ("psnr", "PSNR, dB (higher is better)"))):
        for line, n, colour, shift in zip(grid, numbers, ("#0072b2", "#d55e00"), (-0.15, 0.15)):
            found = results(line, "unseen", metric, seeds, folder)  # (seeds, nets)
            place = np.arange(len(nets)) + shift
            axes.plot(np.tile(place, (seeds, 1)), found, "o", color=colour, alpha=0.4, ms=5, mew=0)
            axes.plot(place, found.mean(0), "_", color=colour, ms=18, mew=3, label=f"{n:,} backgrounds")
        if metric == "E_R":
            axes.axhline(results(line, "unseen", "E_R_ideal", seeds, folder).mean(), color="black", ls="--",
                         lw=1, label="ideal")
        if metric != "psnr":
            axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(nets)), nets, rotation=20)
        axes.get_xticklabels()[-1].set_fontweight("bold")
        axes.set_title(name, fontsize=10)
    handles = top.axes[0].get_legend_handles_labels()
    top.legend(*handles, loc="outside lower center", ncols=3, fontsize=9)
    for line, row, n in zip(grid, bottom.subplots(len(grid), len(nets) + 2, squeeze=False), numbers):
        files = [run.file(folder).with_suffix(".png") for run in line]
        outputs = [open_image(path).chunk(3, dim=-1) for path in files]  # degraded, output, clean
        shown = [outputs[0][0], *(output for _, output, _ in outputs), outputs[0][2]]
        for axes, picture, title in zip(row, shown, ("unseen rain", *nets, "clean")):
            show(axes, picture, title if line is grid[0] else "")
        row[0].set_ylabel(f"{n:,} backgrounds")
    figure.suptitle(f"The claim to test: {claim.statement}", fontsize=10)
    return figure


# ==========================================================================================================
# 8  Command line: how does one run it?
# ==========================================================================================================


def check_output(path: Path, suffixes: Iterable[str], source: str | Path = "") -> Path:
    """Complain before the work, not after it, about a file that cannot be written; returns the path.

    source: a file that is needed, and must not be overwritten.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file in it")
    if source and os.path.realpath(path) == os.path.realpath(source):
        raise BadInput(f"{path} is what it is made from; name another file for the output")
    parent = next(p for p in path.absolute().parents if p.exists())
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"{path} should end in {' or '.join(suffixes)}")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{path} cannot be written, because {parent} is no folder that you may write to")
    return path


def save_table(rows: list[dict], path: Path) -> None:
    """Write rows as a .csv file."""
    with writing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                          errors="surrogateescape") as file:
        lines = csv.DictWriter(file, rows[0], lineterminator="\n")
        lines.writeheader()
        for row in rows:
            lines.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def save_figure(figure: Figure, rows: list[dict], path: Path) -> None:
    """Write a figure, and the numbers behind it as a .csv of the same name."""
    save_table(rows, path.with_suffix(".csv"))
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    tell(f"wrote {path} and {path.with_suffix('.csv')}")


def to_picture(image: Tensor) -> Image.Image:
    """An image (3, h, w) in [0, 1] as PIL has them."""
    levels = torch.stack([channel.mul(255).round_().byte() for channel in image], dim=-1)  # (h, w, 3)
    return Image.fromarray(levels.numpy())


def save_image(image: Tensor, path: Path, original: Path) -> None:
    """Write an image (3, h, w); grey, or with a colour profile, if the original is."""
    picture = to_picture(image)
    with warnings.catch_warnings(action="ignore"), Image.open(original, formats=FORMATS) as source:
        profile = source.info.get("icc_profile") if source.mode in ("RGB", "RGBA", "L") else None
        if source.mode[0] in "1LIF" and source.mode != "LAB":
            picture = picture.convert("L")
    with writing(path) as temporary:
        try:
            picture.save(temporary, quality=95, icc_profile=profile)
        except Exception as problem:  # encoders, too, fail in many ways
            raise BadInput(f"{path} cannot be written: {problem}") from None
    tell(f"wrote {path}")


def each(label: str, items: Iterable, work: Callable) -> int:
    """work(item) for every item; one that fails is named, and the rest goes on. Returns how many failed."""
    failed, progress = 0, Progress(label, len(items))
    for item in items:
        try:
            work(item)
        except (BadInput, OSError) as problem:
            failed += 1
            complain(f"failed: {problem}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{progress.done} of {progress.total} were done") from None
        progress.step()
    return failed


def pick_device(name: str) -> str:
    """The device asked for; "auto" is a GPU if there is one.  Raises BadInput if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.zeros(1, device=name)
        one.item()  # (the device "meta" holds no numbers)
        return str(one.device)
    except Exception:
        raise BadInput(f"there is no device {name} here; try --device cpu") from None


def pick_vqgan(args: argparse.Namespace) -> VQGAN | None:
    """The VQGAN that --net prior needs, and no other network."""
    if (args.net == "prior") != bool(args.vqgan):
        raise BadInput("--net prior and --vqgan FILE go together; `python derain.py vqgan` makes the file")
    return load_vqgan(args.vqgan) if args.vqgan else None


def command_headline(args: argparse.Namespace) -> None:
    if args.few >= args.many:
        raise BadInput(f"--few {args.few} should be less than --many {args.many}")
    device, target = pick_device(args.device), check_output(args.out / "headline.png", (".png",))
    vqgan = pick_vqgan(args)
    training, held_out = training_and_held_out(args.backgrounds, args.category, args.seed)
    what = "photographs" if args.backgrounds else f"embedded images ({args.category})"
    print(f"{what}: {len(training)} to cut training patches from, {len(held_out)} held out; "
          f"{args.net}, {args.steps} steps in {args.rain} rain, seed {args.seed}, {device}")
    few = Run(args.few, args.net, images="photographs" if args.backgrounds else args.category,
              trained_on=args.rain, steps=args.steps, seed=args.seed, device=device)
    rows, pictures = few_against_many(few, replace(few, n=args.many), training, held_out, vqgan)
    print(f"\n{describe(rows)}\n")
    save_figure(figure_headline(rows, pictures), rows, target)
    save_figure(*figure_decoupled(pictures["unseen"]), args.out / "decoupled.png")


def command_figures(args: argparse.Namespace) -> None:
    for name, draw in (("rain", figure_rain), ("backgrounds", figure_backgrounds)):
        target = check_output(args.out / f"{name}.png", (".png",))
        save_figure(*draw(args.seed), target)


def command_rain(args: argparse.Namespace) -> None:
    target = check_output(args.output, SUFFIXES, args.photo)
    image = open_image(args.photo)
    rng = stream(args.seed, "rain command")
    factors = draw_factors(1, RAIN[args.range], rng)
    rain = render_rain(factors, tuple(image.shape[1:]), rng)
    print("{} rain, seed {}: quantity {:.1f} streaks per 10,000 pixels, width {:.2f} px, length {:.1f} px, "
          "direction {:.1f} degrees from vertical (above 0 leans like /)".format(
              args.range, args.seed, *factors[0].tolist()))
    save_image(add_rain(image[None], rain)[0], target, args.photo)


def digest(images: Iterable[Tensor]) -> str:
    """What tells these images from others."""
    total = hashlib.sha256()
    for image in images:
        total.update(image.numpy().tobytes())
    return total.hexdigest()


def keep_training(target: Path, resume: bool, network: nn.Module, optimizer: torch.optim.Optimizer,
                  config: dict, work: Callable) -> None:
    """Train, and keep a checkpoint on the way; an unfinished one in `target` is gone on with.

    work(start, after_step) trains, and calls after_step(steps done, note) between steps.  With `resume`, it
    is an error if there is nothing to go on with, and nothing is done to a training that is complete.
    """
    start, steps, content = 0, config["steps"], {}
    try:
        saved, content = load_checkpoint(target, {**NETWORKS, "vqgan": Pretraining})
    except BadInput:
        if resume:
            raise
    if resume or "optimizer" in content:  # which a finished one does not hold
        for key, value in config.items():
            if content["config"].get(key) != value:
                raise BadInput(f"{target} was trained with {key} {content['config'].get(key)}, not {value}; "
                               "repeat the options of then, or delete it to begin anew")
        start = content["step"]
        network.load_state_dict(saved.state_dict())
        if start == steps:
            print(f"{target} is complete: all {start} steps are done")
            return
        try:
            optimizer.load_state_dict(content["optimizer"])
        except Exception:
            raise BadInput(f"{target} lacks the optimizer's state; delete it to begin anew") from None
        print(f"going on with {target}, at step {start} of {steps}")
    progress, interrupted = Progress("training", steps - start), threading.Event()

    def after_step(step: int, note: str) -> None:
        progress.step(note)
        if step < steps and (interrupted.is_set() or step % 500 == 0):
            save_checkpoint(target, network, config, step, optimizer)
            if interrupted.is_set():
                raise KeyboardInterrupt(f"{step} of {steps} steps are in {target}; the same command goes on")

    # Ctrl-C in the middle of a step would leave weights that no uninterrupted training ever has: let it wait.
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        work(start, after_step)
    finally:
        signal.signal(signal.SIGINT, before)
    save_checkpoint(target, network, config, steps)
    tell(f"wrote {target}")


def make_prior(target: Path, resume: bool, images: list[Tensor], steps: int, seed: int, device: str) -> VQGAN:
    """Pre-train a VQGAN on clean images, and keep it in `target`."""
    training = seeded(Pretraining, seed, **PRIOR).to(device)
    config = {"net": "vqgan", "arguments": PRIOR, "steps": steps, "seed": seed, "backgrounds": digest(images)}
    optimizer = training.optimizer()
    keep_training(target, resume, training, optimizer, config, lambda start, after_step: pretrain(
        training, images, steps, seed, start=start, optimizer=optimizer,
        after_step=lambda step, quality, alive: after_step(
            step, f", {quality:.1f} dB, {alive:.0%} of the codes in use")))
    return training.vqgan


def command_vqgan(args: argparse.Namespace) -> None:
    device, target = pick_device(args.device), check_output(args.output, (".pt", ".ckpt"))
    images, held_out = training_and_held_out(args.backgrounds, args.category, args.seed)
    vqgan = make_prior(target, args.resume, images, args.steps, args.seed, device)
    clean = sample_patches(held_out, TEST_PATCHES, TEST_PATCH, stream(args.seed, "test patches"))
    quality, used = reconstruction(vqgan, clean)
    print(f"held-out images: reconstructed at {quality:.1f} dB, with {used} of {PRIOR['n_embed']} codes")


def command_train(args: argparse.Namespace) -> None:
    device, vqgan = pick_device(args.device), pick_vqgan(args)
    target = check_output(args.output, (".pt",), args.vqgan)
    if args.backgrounds:
        images = load_images(args.backgrounds, smallest=PATCH, pixels=PHOTO_PIXELS)
    else:
        images, _ = training_and_held_out(None, args.category, args.seed)
    patches = training_patches(Run(args.n, sharpness=args.sharpness, seed=args.seed), images)
    config = {"net": args.net, "arguments": {"vqgan": vqgan_arguments(vqgan.state_dict())} if vqgan else {},
              "n": args.n, "sharpness": args.sharpness, "rain": args.rain, "steps": args.steps,
              "seed": args.seed, "backgrounds": digest(patches)}
    network = build_network(args.net, args.seed, **({"vqgan": vqgan} if vqgan else {})).to(device)
    optimizer = make_optimizer(network)
    keep_training(target, args.resume, network, optimizer, config, lambda start, after_step: train(
        network, patches, rain_degradation(RAIN[args.rain]), args.steps, args.seed, start=start,
        optimizer=optimizer, after_step=lambda step, loss: after_step(step, f", loss {loss:.4f}")))


def load_trained(path: Path, device: str) -> nn.Module:
    """A network that `train` wrote, ready for use; says so if its training is unfinished."""
    network, content = load_checkpoint(path)
    if content["step"] < content["config"]["steps"]:
        tell(f"note: {path} is unfinished, at step {content['step']} of {content['config']['steps']}",
             sys.stderr)
    return network.to(device)


def command_restore(args: argparse.Namespace) -> int:
    if not args.photo.exists():
        raise BadInput(f"{args.photo}: no such photograph or folder")
    folder = args.photo.is_dir()
    check_output(args.output / "photo.png" if folder else args.output, SUFFIXES, args.photo)
    network = load_trained(args.model, pick_device(args.device))

    def work(photo: Path, target: Path) -> None:
        image = open_image(photo)
        output = restore(network, image, quiet=folder)
        save_image(torch.cat([image, output], 2) if args.compare else output, target, photo)

    if not folder:
        work(args.photo, args.output)
        return 0
    if args.output.suffix.lower() in SUFFIXES:
        raise BadInput(f"{args.output} looks like a file; the output of a folder is a folder")
    output = Path(os.path.realpath(args.output))
    if Path(os.path.realpath(args.photo)).is_relative_to(output):
        raise BadInput(f"{args.output} holds the photographs; name another folder for the output")
    targets = {photo: args.output / photo.relative_to(args.photo) for photo in image_files(args.photo)
               if not Path(os.path.realpath(photo.parent)).is_relative_to(output)}
    missing = [item for item in targets.items() if not item[1].is_file()]
    failed = each("restoring photographs", missing, lambda item: work(*item))
    tell(f"{args.output}: {len(missing) - failed} photographs restored, {len(targets) - len(missing)} there "
         f"already, {failed} failed")
    return 2 if failed and failed == len(targets) else 0


def command_evaluate(args: argparse.Namespace) -> int:
    if args.csv:
        check_output(args.csv, (".csv",))
    networks, device = {"rainy input": lambda image: image}, pick_device(args.device)
    for path in args.models:
        if path.stem in networks:
            raise BadInput(f"two models are called {path.stem}, which is what tells them apart; rename one")
        networks[path.stem] = partial(restore, load_trained(path, device), quiet=True)
        if args.save:
            check_output(args.save / path.stem / "output.png", (".png",))
            if Path(os.path.realpath(args.save / path.stem)).is_relative_to(os.path.realpath(args.pairs)):
                raise BadInput(f"--save {args.save} would mix outputs with the pairs; name another folder")
    pairs, alone = pair_files(args.pairs)
    for file in alone:
        complain(f"failed: {file} has no partner")
    rows, saved = [], Counter(pair[0].relative_to(args.pairs).with_suffix(".png") for pair in pairs)

    def work(pair: tuple[Path, Path]) -> None:
        rainy, clean = map(open_image, pair)
        if rainy.shape != clean.shape:
            raise BadInput("{} is {}x{} pixels, {} {}x{}".format(
                pair[0], *rainy.shape[:0:-1], pair[1], *clean.shape[:0:-1]))
        name, measured = pair[0].relative_to(args.pairs), []
        clash = saved[name.with_suffix(".png")] > 1  # as of 1.png and 1.jpg
        for label, network in networks.items():
            output = network(rainy)
            measured.append({"file": str(name), "output": label,
                             **evaluate_pair(output[None], rainy[None], clean[None])})
            if args.save and output is not rainy:
                target = args.save / label / name
                save_image(output, Path(f"{target}.png") if clash else target.with_suffix(".png"), pair[0])
        rows.extend(measured)

    try:
        each("evaluating pairs", pairs, work)
    finally:  # Ctrl-C, too, leaves what was finished
        if rows:
            numbers = torch.tensor([list(row.values())[2:] for row in rows], dtype=torch.float64)
            means = numbers.unflatten(0, (-1, len(networks))).nanmean(0).tolist()  # over the files
            name = f"mean of {len(rows) // len(networks)}"
            rows += [dict(zip(rows[0], (name, label, *mean))) for label, mean in zip(networks, means)]
            print("Rain is rainy less clean.  E_R and E_B in grey levels, PSNR in dB; psnr_y and ssim_y on "
                  "the luma of BT.601.\n")
            print(table(rows, {"file": "", "output": "", "E_R": ".1f", "E_R_ideal": ".1f", "E_B": ".1f",
                               "psnr": ".2f", "ssim": ".3f", "psnr_y": ".2f", "ssim_y": ".3f"}))
            if args.csv:
                save_table(rows, args.csv)
                tell(f"wrote {args.csv}")
    return 0 if rows else 2


def command_reproduce(args: argparse.Namespace) -> None:
    names = list(dict.fromkeys(args.claims or CLAIMS))
    for name in names:
        if name not in CLAIMS:
            raise BadInput(f"there is no claim {name!r}; there are {', '.join(CLAIMS)}")
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    taste = f" (a taste: {seeds} seeds, {steps} steps)" if seeds < SEEDS or steps < STEPS else ""
    usual = "runs/taste" if taste else "figures/photographs" if args.backgrounds else "figures"
    args.out = args.out or Path(usual)
    check_output(args.out / "verdicts.csv", (".csv",))
    check_output(args.runs / "a run.json", (".json",))

    load = lru_cache(maxsize=1)(lambda images, seed: training_and_held_out(args.backgrounds, images, seed))
    images = None
    if args.backgrounds:  # other photographs are another experiment
        digests = [digest([image]) for part in load("", 0) for image in part]
        images = f"photographs-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}"
    device = pick_device(args.device)
    claims = {name: adapt(CLAIMS[name], images, steps, args.quick, device) for name in names}
    claims = {name: replace(claim, statement=claim.statement + taste) for name, claim in claims.items()}
    wanted = {replace(run, seed=seed) for claim in claims.values() for runs in claim.panels.values()
              for run in runs for seed in range(seeds)}
    missing = sorted((run for run in wanted if not run.file(args.runs).exists()),
                     key=lambda run: (run.seed, run.images, run.file(args.runs)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # numbers that do not depend on the number of cores; torchrun uses more cores
    try:
        if args.dry_run:
            print(*(run.file(Path()).stem for run in missing), sep="\n")
            minutes = seconds(missing, load, args.runs) / 60
            print(f"{len(missing)} of {len(wanted)} runs are missing: about {minutes:.1f} minutes in one "
                  "process, which uses one core; divide by the number of ranks under torchrun")
        elif do_runs(missing, load, args.runs):
            report(claims, seeds, args.runs, args.out)
            if taste:
                print(f"\nThis was a taste: the claims are tested with {SEEDS} seeds and {STEPS} steps.")
    finally:
        torch.set_num_threads(threads)


def do_runs(missing: list[Run], load: Callable, folder: Path) -> bool:
    """Do the missing runs and store each in `folder`; under torchrun, this rank's share of them.

    Returns whether this process should report: it is the only one, or rank 0, and all runs are in.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it also sets RANK and WORLD_SIZE
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if torchrun else (0, 1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        agreed = [missing]
        torch.distributed.broadcast_object_list(agreed)  # by now, a fast rank may have done some
        missing = agreed[0]
    if rank == 0:
        print(f"{len(missing)} runs are missing; each is kept in {folder} when it is done", flush=True)
    priors = {prior_file(run, folder): run for run in missing if run.net == "prior"}
    for path, run in list(priors.items())[rank::ranks]:
        seed = 0 if run.images in BACKGROUNDS else run.seed
        make_prior(path, path.exists(), load(run.images, seed)[0], PRETRAINING * run.steps, seed, run.device)
    if ranks > 1:
        torch.distributed.barrier()  # until every VQGAN is there
    mine, done = missing[rank::ranks], 0
    progress = Progress(f"training, rank {rank} of {ranks}", sum(run.steps for run in mine))
    try:
        for run in mine:
            vqgan = load_vqgan(prior_file(run, folder)) if run.net == "prior" else None
            rows, tests = measure(run, *load(run.images, run.seed), vqgan,
                                  after_step=lambda *_: progress.step(f", {done} of {len(mine)} runs done"))
            test = next(iter(tests.values()))
            with writing(run.file(folder).with_suffix(".png")) as temporary:
                strip = torch.cat([test[key][0] for key in ("degraded", "output", "clean")], dim=-1)
                to_picture(strip).save(temporary)
            with writing(run.file(folder)) as temporary:
                temporary.write_text(json.dumps(rows, indent=1) + "\n")
            done += 1
        if ranks > 1:
            torch.distributed.barrier()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} of {len(mine)} runs were done; the same command goes on") from None
    if ranks > 1:
        torch.distributed.destroy_process_group()
    return rank == 0


def seconds(missing: list[Run], load: Callable, folder: Path) -> float:
    """How long the runs will take in one process, from the times of short ones (less the drawing of images).

    Each network, and the pre-training of a VQGAN, is timed for 2 and for 12 steps.
    """
    jobs = [((run.net, run.arguments), run, run.steps) for run in missing]
    priors = {prior_file(run, folder): run for run in missing if run.net == "prior"}
    jobs += [("VQGAN", run, PRETRAINING * run.steps) for path, run in priors.items() if not path.exists()]
    total, costs, progress = 0, {}, Progress("timing short runs", len({kind for kind, _, _ in jobs}))
    for kind, run, steps in jobs:
        if kind not in costs:
            (training, held_out), times = load(run.images, run.seed), []
            for n in (1, 2, 12):  # the first is always slow
                begun = time.monotonic()
                if kind == "VQGAN":
                    pretrain(seeded(Pretraining, 0, **PRIOR), training, n)
                else:
                    measure(replace(run, steps=n), training, held_out)
                times.append(time.monotonic() - begun)
            costs[kind] = times[1], max(0, times[2] - times[1]) / 10
            progress.step()
        total += costs[kind][0] + costs[kind][1] * steps
    return total


def report(claims: dict[str, Claim], seeds: int, folder: Path, out: Path) -> None:
    """Write a figure and a table for each claim, then the verdicts; print the verdicts."""
    verdicts = {name: verdict_rows(name, claim, seeds, folder) for name, claim in claims.items()}
    for name, claim in claims.items():
        draw = {"noise": figure_noise, "prior": figure_prior}.get(name, figure_claim)
        save_figure(draw(claim, seeds, folder), claim_rows(claim, seeds, folder), out / f"{name}.png")
    path = out / ("verdicts.csv" if len(claims) == len(CLAIMS) else f"verdicts-{'-'.join(claims)}.csv")
    save_table(list(itertools.chain(*verdicts.values())), path)
    tell(f"wrote {path}")
    for name, claim in claims.items():
        print(f"\n{name}: {claim.statement}")
        print(table(verdicts[name], {"metric": "", "tested_on": "", "panel": "", "effect": "+.2f",
                                     "spread": ".2f", "E_B": "+.2f", "psnr": "+.2f", "agree": "d",
                                     "seeds": "d", "verdict": ""}))


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def whole(least: int) -> Callable[[str], int]:
    """An argument type: a whole number from `least` to 2,000,000,000."""
    def parse(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= 2_000_000_000):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2000000000")
        return int(text)
    return parse


def make_parser() -> argparse.ArgumentParser:
    """Every option and command, each described where it is declared."""
    options = {
        "few": dict(type=whole(1), default=8, metavar="N", help="backgrounds of one network"),
        "many": dict(type=whole(2), default=1024, metavar="N", help="backgrounds of the other"),
        "n": dict(type=whole(1), default=64, metavar="N", help="number of distinct background patches"),
        "sharpness": dict(choices=("any", "low", "middle", "high"), default="low",
                          help="any: N patches; else: of 3 N, the N of that third by sharpness"),
        "backgrounds": dict(nargs="+", metavar="PATH",
                            help="photographs (files, folders), instead of embedded images"),
        "category": dict(choices=(*BACKGROUNDS, "all"), default="faces", help="embedded images to use"),
        "net": dict(choices=NETWORKS, default="resnet", help="which network"),
        "vqgan": dict(metavar="FILE", help="pre-trained VQGAN, for --net prior: ours or a published one"),
        "rain": dict(choices=("small", "medium", "large"), default="small", help="rain to train on"),
        "range": dict(choices=RAIN, default="medium", help="kind of rain"),
        "steps": dict(type=whole(1), default=2500, metavar="N", help="training steps"),
        "seeds": dict(type=whole(1), metavar="N",
                      help=f"number of seeds (default: {SEEDS}; quick: {QUICK_SEEDS})"),
        "resume": dict(action="store_true", help="insist on going on with the unfinished training in FILE"),
        "seed": dict(type=whole(0), default=0, metavar="N", help="of all that is drawn at random"),
        "device": dict(default="auto", metavar="NAME", help="cpu or cuda; auto: a GPU if there is one"),
        "out": dict(type=Path, default=Path("figures"), metavar="FOLDER", help="where results go"),
        "quick": dict(action="store_true", help="a taste: few seeds and steps"),
        "dry-run": dict(action="store_true", help="name the missing runs, and time them"),
        "runs": dict(type=Path, default=Path("runs"), metavar="FOLDER",
                     help="where the result of each run is kept, to go on from"),
        "compare": dict(action="store_true", help="write photograph and result side by side"),
        "pairs": dict(type=Path, required=True, metavar="FOLDER",
                      help="the benchmark as unpacked: input/ and target/, rainy/rain-1.png and "
                           "norain-1.png, 901_1.jpg and 901.jpg, and the like"),
        "csv": dict(type=Path, metavar="FILE", help="write the table here, too"),
        "save": dict(type=Path, metavar="FOLDER", help="keep the outputs here, as .png"),
    }

    def add_options(parser: Parser, *names: str, **changed: dict) -> None:
        for name in (*names, *changed):
            option = {**options[name], **changed.get(name, {})}
            if option.get("default") is not None:
                option["help"] += f" (default: {option['default']})"
            parser.add_argument(f"--{name}", **option)

    parser = Parser(prog="derain.py", epilog="example: python derain.py --backgrounds photos/ --seed 1",
                    description="Without a command: train a network on few backgrounds and another on many, "
                                "and compare how they remove rain that neither saw.")
    add_options(parser, "few", "many", "backgrounds", "category", "net", "vqgan", "rain", "steps", "seed",
                "device", "out")
    parser.set_defaults(run=command_headline)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", description="each has a --help")

    def add_command(run: Callable, about: str, example: str, output: str = "") -> Parser:
        command = commands.add_parser(example.split()[0], help=about, description=about,
                                      epilog=f"example: python derain.py {example}")
        command.set_defaults(run=run)
        if output:
            command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=output)
        return command

    command = add_command(command_figures, "draw the figures that explain rain and backgrounds",
                          "figures --out figures")
    add_options(command, "seed", "out")
    command = add_command(command_rain, "add rain to a photograph",
                          "rain photo.jpg -o rainy.png --range large --seed 3", "the rainy photograph")
    command.add_argument("photo", type=Path, help="the photograph, of any size")
    add_options(command, "range", "seed")
    command = add_command(command_train, "train a network and keep it",
                          "train --backgrounds photos/ -o model.pt", "the checkpoint, a .pt file")
    add_options(command, "n", "sharpness", "resume", "net", "vqgan", "backgrounds", "category", "steps",
                "seed", "device", rain={"default": "large"})  # the main job's shows the effect, this serves
    command = add_command(command_vqgan, "pre-train the content prior, a VQGAN, on clean images",
                          "vqgan --backgrounds photos/ -o vqgan.pt", "the VQGAN, a .pt file")
    add_options(command, "resume", "backgrounds", "category", "seed", "device", steps={"default": 3500})
    command = add_command(command_reproduce, "test the paper's claims: trainings, figures, tables, verdicts "
                          "(with two cores: torchrun --nproc_per_node=2 derain.py reproduce)",
                          "reproduce few range --backgrounds photos/")
    command.add_argument("claims", nargs="*", metavar="CLAIM",
                         help=f"{', '.join(CLAIMS)} (default: all)")
    add_options(command, "quick", "dry-run", "seeds", "runs", "backgrounds", device={"default": "cpu"},
                steps={"default": None, "help": f"training steps (default: {STEPS}; quick: {QUICK_STEPS})"},
                out={"default": None, "help": "where figures and tables go (default: figures, or "
                     "figures/photographs; what has fewer seeds or steps than usual: runs/taste)"})
    command = add_command(command_restore, "remove the rain from a photograph, or from every one in a folder",
                          "restore model.pt photo.jpg -o clean.png",
                          "the restored photograph; of a folder: a folder, where what exists stays")
    command.add_argument("model", type=Path, help="a checkpoint that `train` wrote")
    command.add_argument("photo", type=Path, help="the photograph, of any size, or a folder of them")
    add_options(command, "compare", "device")
    command = add_command(command_evaluate, "measure networks on a benchmark's pairs of a rainy and a clean "
                          "image: E_R, E_B, PSNR and SSIM, these also on the Y channel of BT.601",
                          "evaluate model.pt other.pt --pairs Rain100L/ --csv rain100l.csv")
    command.add_argument("models", type=Path, nargs="+", metavar="model", help="what `train` wrote")
    add_options(command, "pairs", "csv", "save", "device")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: all done; 1: some files of many failed; 2: bad input, or nothing could be done; 130: Ctrl-C.
    """
    words = sys.argv[1:] if arguments is None else arguments
    args, complain.count = make_parser().parse_args(words), 0
    try:
        if args.run is not command_headline and words[0].startswith("-"):
            raise BadInput("options belong behind the command, not before it")
        return args.run(args) or int(complain.count > 0)
    except (BadInput, OSError) as problem:
        tell(f"derain.py: {problem}", sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)
        tell(f"stopped: {stop if stop.args else 'nothing was written'}", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout, sys.stderr = (out or open(os.devnull, "w") for out in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # of names that are no text
    if hasattr(signal, "SIGPIPE"):  # who read the output, such as head, has seen enough: end as others do
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # of libraries, about files that are odd, but can be read
    sys.exit(main())
