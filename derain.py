"""Why do image-restoration networks fail on degradations that they have not seen?

This file is a tutorial and a program.  In minutes, on a laptop, it makes the central experiment of Hu et
al., "Revisiting the Generalization Problem of Low-level Vision Models Through the Lens of Image Deraining"
(arXiv 2502.12600): a network trained to remove rain learns *the rain* instead of *the image* when the rain
is the simpler of the two, and then leaves alone any rain that looks different.  Train it on fewer, simpler
backgrounds, and the image becomes the simpler thing to learn: the same network now removes rain that it
never saw.

Read from the top; no section uses a later one.

    0  housekeeping           bad input, files, progress, random streams (skip it at first)
    1  rain                   How is a rainy image made?
    2  backgrounds            What stands behind the rain, and how complex is it?
    3  networks               Does the architecture matter?
    5  training               What does the network actually learn from?
    6  decoupled evaluation   Was the rain removed, and was the background kept?
    7  experiments            Which of the paper's claims hold here?
    8  command line           python derain.py --help

(Section 4, the content prior, is not written yet.)  Images are float32 tensors (n, 3, h, w) in [0, 1], a
single image is (3, h, w), rain is (n, 1, h, w) in [0, 1].  Whatever draws at random takes a numpy Generator
or a seed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Threads of OpenMP wait for one another in a busy loop, and where another program runs too, the main job then
# takes three times as long.  Let them sleep soon.  (It has to be said before torch is imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

# ==========================================================================================================
# 0  Housekeeping: what does every program need that has nothing to do with rain?
# ==========================================================================================================


class BadInput(ValueError):
    """What the user gave cannot work; the message says in one line what is wrong and what would work."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` if all went well: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")  # the suffix tells PIL the format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
# 1  Rain: how is a rainy image made?
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
    """Draw the factors of n images: (n, 4), the columns being quantity, width, length, direction."""
    intervals = (rain_range.quantity, rain_range.width, rain_range.length, rain_range.direction)
    factors = np.stack([rng.uniform(low, high, n) for low, high in intervals], axis=1)
    if rain_range.either_side:
        factors[:, 3] *= rng.choice([-1, 1], n)
    return torch.from_numpy(factors).float()


def streak_kernel(width: float | Tensor, length: float | Tensor, direction: float | Tensor) -> Tensor:
    """The picture of one streak: a straight line seen through a Gaussian blur, with 1 at its centre.

    width, length: pixels at half brightness, above 0 (the Gaussian's sigma is width / 2.355). direction:
    degrees from vertical; positive turns the streak clockwise, so that it leans like "/". Three numbers
    give (k, k); three tensors (n,) give (n, k, k).  k is odd, just large enough for all streaks.
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
    """Rain layers (n, 1, h, w) in [0, 1] with the given factors (n, 4); size is (h, w), or one number."""
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
    leaf differs from scene to scene, as the distance to the subject does.
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


def image_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files that paths name: files as they are, folders searched with their subfolders, sorted."""
    files = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [f for f in found if f == path or (f.suffix.lower() in SUFFIXES and f.name[0] != ".")]
        if not found:
            raise BadInput(f"{path}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        files += found
    return list({file.resolve(): file for file in files}.values())  # named twice, still one image


def load_images(path: str | Path | Iterable[str | Path], smallest: int = 1,
                pixels: float = math.inf) -> list[Tensor]:
    """Load a file, a folder, or several of either: a list of (3, h, w) in [0, 1], each of its own size.

    A file that is broken, or below `smallest` pixels a side, is skipped with a warning on standard error.
    `pixels` bounds the memory: of a larger collection, evenly spaced files and their central parts are taken.
    Raises BadInput if nothing usable is left.
    """
    files = image_files(path)
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
        except BadInput as problem:
            print(f"skipped: {problem}", file=sys.stderr)
        progress.step()
    if not images:
        raise BadInput(f"none of the {len(files)} images is usable; give photographs of at least "
                       f"{smallest}x{smallest} pixels")
    return images


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
# failure in all of them, and concludes that it is not the architecture's doing.
# ==========================================================================================================


class ResNet(nn.Module):
    """A plain residual network: a convolution in, blocks that add to what they are given, a convolution out.

    No path leads around the network as a whole: it must draw all that it shows, so what it has learned to
    draw decides what comes out.  The default has 19,443 parameters.
    """

    def __init__(self, channels: int = 16, blocks: int = 4):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                                nn.Conv2d(channels, channels, 3, padding=1))
                                  for _ in range(blocks))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, degraded: Tensor) -> Tensor:
        features = self.head(degraded)  # (n, channels, h, w)
        for block in self.body:
            features = features + block(features)
        return self.tail(features)


NETWORKS: dict[str, type[nn.Module]] = {"resnet": ResNet}


def build_network(name: str, seed: int = 0, **arguments) -> nn.Module:
    """A network of NETWORKS, its weights drawn from `seed`; torch's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Channels-last keeps the channels of a pixel together in memory, which CPU convolutions prefer.
        return NETWORKS[name](**arguments).to(memory_format=torch.channels_last)


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
    """Train a network in place to undo `degrade`; returns the L1 loss of every step.

    backgrounds: clean patches (n, 3, h, w) in [0, 1].  degrade: see Degradation.
    Step i depends only on the weights, the optimizer's state, `seed` and i: a training that goes on at step
    `start`, with the optimizer that it stopped with, ends with the weights of one that never stopped.
    after_step(steps done, loss) is called between steps, and may raise to stop there.
    """
    device = next(network.parameters()).device
    optimizer = optimizer or make_optimizer(network)
    # glibc gives freed memory back and asks for it again at every step, a third of the time.  Once it has
    # seen a block of 30 MB come and go, it keeps as much.
    torch.empty(30 * 2 ** 18)
    losses = []
    for step in range(start, steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        degraded, _ = degrade(clean, rng)
        clean, degraded = (t.to(device, memory_format=torch.channels_last) for t in (clean, degraded))
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.l1_loss(network(degraded), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after_step:
            after_step(step + 1, losses[-1])
    return losses


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `train` uses; made beforehand by whoever wants to keep its state."""
    return torch.optim.Adam(network.parameters(), lr=RATE, fused=True)


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
    with writing(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict]:
    """Read what save_checkpoint wrote: the network, on the CPU, and the content ("config", "step", ...).

    Reads tensors and plain containers only, and runs nothing that the file names.  Raises BadInput for a file
    that is missing or is no checkpoint of ours.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; `python derain.py train -o {path}` would make it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = content["config"], content["weights"]
        # A stranger's configuration may ask for any amount of memory.  On the "meta" device a network has
        # shapes but no memory; build it only if the file holds weights of these very shapes.
        with torch.device("meta"):
            expected = NETWORKS[config["net"]](**config["arguments"]).state_dict()
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
            raise ValueError("its weights do not fit its configuration")
        if not 0 <= content["step"] <= config["steps"]:
            raise ValueError("its number of steps is impossible")
        network = build_network(config["net"], **config["arguments"])
        network.load_state_dict(weights)
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        named = re.search(r"GLOBAL (\S+)", str(problem))  # what an unpickler that ran code would have called
        reason = f"it names {named[1]}, which is not run" if named else f"{type(problem).__name__}: {problem}"
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


def psnr(output: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio, -10 log10(MSE) dB, of images (n, 3, h, w) in [0, 1]; mean over images.

    Infinite for equal images.  Raises ValueError if the shapes differ.
    """
    if output.shape != clean.shape:
        raise ValueError(f"shapes differ: {tuple(output.shape)} and {tuple(clean.shape)}")
    mse = (output.double() - clean.double()).square().flatten(1).mean(1)  # (n,)
    return (-10 * torch.log10(mse)).mean().item()


def ssim(output: Tensor, clean: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of images (n, 3, h, w) in [0, 1]; mean over images.

    An 11x11 Gaussian window of sigma 1.5; K = 0.01 and 0.03; each channel by itself; averaged over the area
    in which the window lies within the image.  Raises ValueError if the shapes differ or a side is below
    11.
    """
    if output.shape != clean.shape or min(clean.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs two equal shapes of at least 11x11 pixels, "
                         f"not {tuple(output.shape)} and {tuple(clean.shape)}")
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:  # to (n, 3, h - 10, w - 10), by 11 weighted shifts down, 11 across
        height, width = image.shape[2] - 10, image.shape[3] - 10
        image = sum(weight * image[:, :, i:i + height] for i, weight in enumerate(window))
        return sum(weight * image[:, :, :, i:i + width] for i, weight in enumerate(window))

    x, y = output.double(), clean.double()
    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2))).mean().item()


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output for images (n, 3, h, w), clipped to [0, 1]; 16 at a time, to bound the memory."""
    device = next(network.parameters()).device
    chunks = (chunk.to(device, memory_format=torch.channels_last) for chunk in images.split(16))
    return torch.cat([network(chunk).clamp(0, 1).cpu() for chunk in chunks])


def restore(network: nn.Module, image: Tensor, tile: int = 512, overlap: int = 48) -> Tensor:
    """Restore one image (3, h, w) in [0, 1] of any size, by overlapping tiles, so that memory stays bounded.

    Near the inner edges of a tile the network misses what lies beyond.  So in the overlap of two tiles the
    outer third of each does not count, and across the middle third the one fades into the other.
    """
    output, third = torch.empty(image.shape), overlap // 3
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
            progress.step()
        lay(strip, output, 1, top)
    return output


# ==========================================================================================================
# 7  Experiments: which of the paper's claims hold here?
#
# The first claim: the same network, trained for the same number of steps on few and on many backgrounds, then
# asked to remove rain of the kind that it was trained on, and rain that it never saw.
# ==========================================================================================================

IMAGE = 256  # side of an embedded background, pixels
TRAINING_IMAGES, HELD_OUT_IMAGES = 64, 16  # embedded ones; photographs are split 3 : 1
TEST_PATCHES, TEST_PATCH = 48, 128  # number and side of the patches that networks are tested on
PHOTO_PIXELS = 40e6  # photographs are cut to this many pixels in all, which take 480 MB


def training_and_held_out(paths: list[str] | None, category: str,
                          seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images to train on and others to test on: embedded ones, or photographs split by image, not by patch.

    category: one of BACKGROUNDS, or "all".  A single photograph cannot be split: the test then uses
    embedded images.
    """
    def embedded(part: str, n: int) -> list[Tensor]:
        chosen = BACKGROUNDS if category == "all" else (category,)
        return [draw_background(chosen[i % len(chosen)], IMAGE, stream(seed, part, i)) for i in range(n)]

    if not paths:
        return embedded("backgrounds", TRAINING_IMAGES), embedded("held-out backgrounds", HELD_OUT_IMAGES)
    images = load_images(paths, smallest=TEST_PATCH, pixels=PHOTO_PIXELS)
    if len(images) == 1:
        print("one photograph cannot be split; the test uses embedded images", file=sys.stderr)
        return images, embedded("held-out backgrounds", HELD_OUT_IMAGES)
    order = stream(seed, "split").permutation(len(images))
    held_out = max(1, len(images) // 4)
    return [images[i] for i in order[held_out:]], [images[i] for i in order[:held_out]]


def train_in_parallel(networks: list[nn.Module], backgrounds: list[Tensor], degrade: Degradation, steps: int,
                      seed: int) -> None:
    """Train several networks in place, each on backgrounds of its own and in a thread of its own.

    Small networks cannot keep several cores busy; two trainings side by side, a core each, can.
    """
    progress, stopped = Progress("training", len(networks) * steps), threading.Event()

    def after_step(step: int, loss: float) -> None:
        progress.step()
        if stopped.is_set():
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(networks), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            jobs = [pool.submit(train, network, patches, degrade, steps, seed, after_step=after_step)
                    for network, patches in zip(networks, backgrounds)]
            for job in jobs:
                job.result()
        finally:
            stopped.set()
            torch.set_num_threads(threads)


def few_against_many(training: list[Tensor], held_out: list[Tensor], few: int, many: int, steps: int,
                     seed: int, rain: str = "small", device: str = "cpu") -> tuple[list[dict], dict]:
    """Train the ResNet on few and on many backgrounds in one rain; test both on unseen rain and on that rain.

    The few are among the many; both networks start from the same weights.  Returns the table, a row for
    each test rain and each of the rainy input and the two outputs; and for each test rain its images:
    "rainy", "few", "many" (the outputs), "clean" (TEST_PATCHES, 3, TEST_PATCH, TEST_PATCH) and "rain" (one
    channel).
    """
    patches = sample_patches(training, many, PATCH, stream(seed, "patches"))
    networks = [build_network("resnet", seed).to(device) for _ in range(2)]
    train_in_parallel(networks, [patches[:few], patches], rain_degradation(RAIN[rain]), steps, seed)
    clean = sample_patches(held_out, TEST_PATCHES, TEST_PATCH, stream(seed, "test patches"))
    rows, pictures = [], {}
    for tested in ("unseen", rain):
        rainy, layer = rain_degradation(RAIN[tested])(clean, stream(seed, "test rain", tested))
        outputs = {"rainy": rainy, "few": predict(networks[0], rainy), "many": predict(networks[1], rainy)}
        for name, n in (("rainy", 0), ("few", few), ("many", many)):
            rows.append({"tested_on": tested, "output": name, "backgrounds": n, "trained_on": rain,
                         "steps": steps, "seed": seed,
                         **decoupled_evaluation(outputs[name], rainy, clean, layer)})
        pictures[tested] = {**outputs, "clean": clean, "rain": layer}
    return rows, pictures


def describe(rows: list[dict]) -> str:
    """The table of few_against_many as text, and one sentence that follows from its numbers."""
    lines = [f"{'rain':8}{'output of':>24}{'E_R':>8}{'ideal':>8}{'E_B':>8}{'PSNR dB':>10}{'SSIM':>8}"]
    for row in rows:
        name = "(the rainy input)" if row["output"] == "rainy" else f"{row['backgrounds']} backgrounds"
        lines.append("{:8}{:>24}{:8.1f}{:8.1f}{:8.1f}{:10.2f}{:8.3f}".format(
            row["tested_on"], name, *(row[key] for key in ("E_R", "E_R_ideal", "E_B", "psnr", "ssim"))))
    _, few, many, _, few_seen, many_seen = rows
    gap = few["E_R"] - many["E_R"]
    better = "about as much" if abs(gap) < 2 else "more" if gap > 0 else "less"
    pick = "few" if few_seen["psnr"] > many_seen["psnr"] else "many"
    lines.append(
        f"\nTrained on {few['backgrounds']} backgrounds instead of {many['backgrounds']}, the network "
        f"removes {better} of the rain that it never saw:\nE_R {few['E_R']:.1f} against {many['E_R']:.1f} "
        f"(ideal {few['E_R_ideal']:.1f}), at E_B {few['E_B']:.1f} against {many['E_B']:.1f}.\nA benchmark on "
        f"the training rain would have picked the one with {pick}: PSNR {few_seen['psnr']:.1f} against "
        f"{many_seen['psnr']:.1f} dB.")
    return "\n".join(lines)


def show(axes, picture: Tensor, title: str = "", **options):
    """Draw an image (3, h, w) or a map (h, w) without ticks; returns matplotlib's handle."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    picture = picture.permute(1, 2, 0) if picture.ndim == 3 else picture
    return axes.imshow(picture, interpolation="nearest", **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})


def typical_image(tested: dict[str, Tensor]) -> int:
    """Which tested image to show, unbiased: the one whose gap in E_R, few minus many, is the median."""
    mask = rain_mask(tested["rain"])

    def e_r(name: str) -> Tensor:  # (n,), of each image by itself
        change = (tested[name] - tested["rainy"]).square() * mask
        return (change.sum((1, 2, 3)) / mask.sum((1, 2, 3))).sqrt()

    return int((e_r("few") - e_r("many")).argsort()[len(mask) // 2])


def figure_headline(rows: list[dict], pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """One held-out image in unseen and in training rain: rainy, output of few, of many, clean, mask."""
    figure = Figure(figsize=(11.5, 5.5), layout="constrained")
    index = typical_image(pictures["unseen"])
    titles = {"rainy": "rainy input", "few": f"trained on {rows[1]['backgrounds']} backgrounds",
              "many": f"trained on {rows[2]['backgrounds']} backgrounds", "clean": "clean",
              "mask": "mask: where it rains"}
    for line, (rain, tested) in zip(figure.subplots(2, 5), pictures.items()):
        measured = {row["output"]: row for row in rows if row["tested_on"] == rain}
        images = {**tested, "mask": rain_mask(tested["rain"]).float().expand_as(tested["clean"])}
        for axes, (name, title) in zip(line, titles.items()):
            show(axes, images[name][index], title if rain == "unseen" else "")
            if name in ("few", "many"):
                axes.set_xlabel("E_R {E_R:.0f} of {E_R_ideal:.0f},  E_B {E_B:.0f}".format(**measured[name]))
        line[0].set_ylabel("unseen rain" if rain == "unseen" else "rain as in training", fontsize=11)
    figure.suptitle("E_R: rain removed; higher is better, up to the ideal.  E_B: background broken; lower is "
                    "better.\n"
                    "(grey levels, over the whole test set)", fontsize=10)
    return figure


def figure_decoupled(tested: dict[str, Tensor]) -> tuple[Figure, list[dict]]:
    """E_R and E_B explained on one tested image of few_against_many, and the numbers shown."""
    index = typical_image(tested)
    output, rainy, clean, rain = (tested[k][index:index + 1] for k in ("few", "rainy", "clean", "rain"))
    measured = decoupled_evaluation(output, rainy, clean, rain)
    mask = rain_mask(rain)[0, 0]
    changed, broken = (255 * (output - other)[0].square().mean(0).sqrt() for other in (rainy, clean))
    figure = Figure(figsize=(12, 3.0), layout="constrained")
    axes = figure.subplots(1, 5)
    show(axes[0], rainy[0], "rainy input")
    show(axes[1], mask.float(), "mask: where it rains")
    show(axes[2], output[0], "output of a network")
    colours = {"cmap": "viridis", "vmin": 0, "vmax": 100}
    show(axes[3], torch.where(mask, changed, math.nan), "changed, on the mask", **colours)
    axes[3].set_xlabel("root mean square: E_R {E_R:.0f}\n(perfect: {E_R_ideal:.0f})".format(**measured))
    handle = show(axes[4], torch.where(mask, math.nan, broken), "broken, off the mask", **colours)
    axes[4].set_xlabel("root mean square: E_B {E_B:.0f}\n(perfect: 0)".format(**measured))
    figure.colorbar(handle, ax=axes[3:], label="grey levels", shrink=0.8)
    return figure, [{"image": index, **measured}]


def figure_rain(seed: int = 0) -> tuple[Figure, list[dict]]:
    """The synthesis step by step, each factor varied alone, and each range; a row of numbers a layer."""
    figure, rows, size = Figure(figsize=(8, 14.5), layout="constrained"), [], 96
    grid = figure.subplots(9, 5)
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


# ==========================================================================================================
# 8  Command line: how does one run it?
# ==========================================================================================================


def check_output(path: Path, suffixes: Iterable[str]) -> Path:
    """Complain before the work, not after it, about a file that cannot be written; returns the path."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file in it")
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"{path} should end in {' or '.join(suffixes)}")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{path} cannot be written, because {parent} is no folder that you may write to")
    return path


def save_figure(figure: Figure, rows: list[dict], path: Path) -> None:
    """Write a figure, and the numbers behind it as a .csv of the same name."""
    with writing(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    print(f"wrote {path} and {path.with_suffix('.csv')}")


def save_image(image: Tensor, path: Path, original: Path) -> None:
    """Write an image (3, h, w); grey, or with a colour profile, if the original is."""
    levels = torch.stack([channel.mul(255).round_().byte() for channel in image], dim=-1)  # (h, w, 3)
    picture = Image.fromarray(levels.numpy())
    with Image.open(original, formats=FORMATS) as source:
        profile = source.info.get("icc_profile") if source.mode in ("RGB", "RGBA", "L") else None
        if source.mode[0] in "1LIF":
            picture = picture.convert("L")
    with writing(path) as temporary:
        picture.save(temporary, quality=95, icc_profile=profile)
    print(f"wrote {path}")


def pick_device(name: str) -> str:
    """The device asked for; "auto" is a GPU if there is one.  Raises BadInput if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.zeros(1, device=name).device)
    except Exception:
        raise BadInput(f"there is no device {name} here; try --device cpu") from None


def command_headline(args: argparse.Namespace) -> None:
    if args.few >= args.many:
        raise BadInput(f"--few {args.few} should be less than --many {args.many}")
    device, target = pick_device(args.device), check_output(args.out / "headline.png", (".png",))
    training, held_out = training_and_held_out(args.backgrounds, args.category, args.seed)
    what = "photographs" if args.backgrounds else f"embedded images ({args.category})"
    print(f"{what}: {len(training)} to cut training patches from, {len(held_out)} held out; "
          f"{args.steps} steps in {args.rain} rain, seed {args.seed}, {device}")
    rows, pictures = few_against_many(training, held_out, args.few, args.many, args.steps, args.seed,
                                      args.rain, device)
    rows = [{"images": "photographs" if args.backgrounds else args.category, **row} for row in rows]
    print(f"\n{describe(rows)}\n")
    save_figure(figure_headline(rows, pictures), rows, target)
    save_figure(*figure_decoupled(pictures["unseen"]), args.out / "decoupled.png")


def command_figures(args: argparse.Namespace) -> None:
    for name, draw in (("rain", figure_rain), ("backgrounds", figure_backgrounds)):
        target = check_output(args.out / f"{name}.png", (".png",))
        save_figure(*draw(args.seed), target)


def command_rain(args: argparse.Namespace) -> None:
    target = check_output(args.output, SUFFIXES)
    image = open_image(args.photo)
    rng = stream(args.seed, "rain command")
    factors = draw_factors(1, RAIN[args.range], rng)
    rain = render_rain(factors, tuple(image.shape[1:]), rng)
    print("{} rain, seed {}: quantity {:.1f} streaks per 10,000 pixels, width {:.2f} px, length {:.1f} px, "
          "direction {:.1f} degrees from vertical (above 0 leans like /)".format(
              args.range, args.seed, *factors[0].tolist()))
    save_image(add_rain(image[None], rain)[0], target, args.photo)


def command_train(args: argparse.Namespace) -> None:
    device, target = pick_device(args.device), check_output(args.output, (".pt",))
    if args.backgrounds:
        images = load_images(args.backgrounds, smallest=PATCH, pixels=PHOTO_PIXELS)
    else:
        images, _ = training_and_held_out(None, args.category, args.seed)
    patches = sample_patches(images, args.n, PATCH, stream(args.seed, "patches"))
    config = {"net": args.net, "arguments": {}, "n": args.n, "rain": args.rain, "steps": args.steps,
              "seed": args.seed, "backgrounds": hashlib.sha256(patches.numpy().tobytes()).hexdigest()}
    network, start = build_network(args.net, args.seed).to(device), 0
    optimizer = make_optimizer(network)
    if args.resume:
        saved, content = load_checkpoint(target)
        for key, value in config.items():
            if content["config"].get(key) != value:
                raise BadInput(f"{target} was trained with {key} {content['config'].get(key)}, not {value}; "
                               "repeat the options of then, or leave out --resume to begin anew")
        start = content["step"]
        network.load_state_dict(saved.state_dict())
        if start == args.steps:
            print(f"{target} is complete: all {start} steps are done")
            return
        try:
            optimizer.load_state_dict(content["optimizer"])
        except Exception:
            raise BadInput(f"{target} lacks the optimizer's state; begin anew without --resume") from None
    progress, interrupted = Progress("training", args.steps - start), threading.Event()

    def after_step(step: int, loss: float) -> None:
        progress.step(f", L1 {loss:.4f}")
        if step < args.steps and (interrupted.is_set() or step % 500 == 0):
            save_checkpoint(target, network, config, step, optimizer)
            if interrupted.is_set():
                raise KeyboardInterrupt(f"{step} of {args.steps} steps are in {target}; --resume goes on")

    # Ctrl-C within a step would leave weights that no uninterrupted training ever has, so it waits for the
    # end.
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        losses = train(network, patches, rain_degradation(RAIN[args.rain]), args.steps, args.seed,
                       start=start, optimizer=optimizer, after_step=after_step)
    finally:
        signal.signal(signal.SIGINT, before)
    save_checkpoint(target, network, config, args.steps)
    print(f"mean L1 loss of the last {len(losses[-100:])} steps: {np.mean(losses[-100:]):.4f}")
    print(f"wrote {target}")


def command_restore(args: argparse.Namespace) -> None:
    target = check_output(args.output, SUFFIXES)
    network, content = load_checkpoint(args.model)
    if content["step"] < content["config"]["steps"]:
        print(f"note: {args.model} is unfinished, at step {content['step']} of {content['config']['steps']}",
              file=sys.stderr)
    image = open_image(args.photo)
    save_image(restore(network.to(pick_device(args.device)), image), target, args.photo)


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
    """Every command and option, each described where it is declared."""
    shared = {
        "--backgrounds": dict(nargs="+", metavar="PATH", help="photographs (files, folders) to use instead"),
        "--category": dict(choices=(*BACKGROUNDS, "all"), default="faces", help="embedded images to use"),
        "--rain": dict(choices=("small", "medium", "large"), default="small", help="rain to train on"),
        "--steps": dict(type=whole(1), default=2500, metavar="N", help="training steps"),
        "--seed": dict(type=whole(0), default=0, metavar="N", help="of all that is drawn at random"),
        "--device": dict(default="auto", metavar="NAME", help="cpu or cuda; auto: a GPU if there is one"),
        "--out": dict(type=Path, default=Path("figures"), metavar="FOLDER", help="where results go"),
    }

    def add_options(parser: Parser, *names: str) -> None:
        for name in names:
            default = f" (default: {shared[name]['default']})" if "default" in shared[name] else ""
            parser.add_argument(name, **{**shared[name], "help": shared[name]["help"] + default})

    parser = Parser(prog="derain.py", epilog="example: python derain.py --backgrounds photos/ --seed 1",
                    description="Without a command: train a network on few backgrounds and another on many, "
                                "and compare how they remove rain that neither saw.")
    parser.add_argument("--few", type=whole(1), default=8, metavar="N",
                        help="backgrounds of one network (default: 8)")
    parser.add_argument("--many", type=whole(2), default=1024, metavar="N",
                        help="backgrounds of the other (default: 1024)")
    add_options(parser, *shared)
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
    add_options(command, "--seed", "--out")
    command = add_command(command_rain, "add rain to a photograph",
                          "rain photo.jpg -o rainy.png --range large --seed 3", "the rainy photograph")
    command.add_argument("photo", type=Path, help="the photograph, of any size")
    command.add_argument("--range", choices=RAIN, default="medium", help="kind of rain (default: medium)")
    add_options(command, "--seed")
    command = add_command(command_train, "train a network and keep it",
                          "train --backgrounds photos/ --n 64 --rain small --steps 3000 -o model.pt",
                          "the checkpoint, a .pt file")
    command.add_argument("--net", choices=NETWORKS, default="resnet", help="which network (default: resnet)")
    command.add_argument("--n", type=whole(1), default=64, metavar="N",
                         help="number of distinct background patches (default: 64)")
    command.add_argument("--resume", action="store_true", help="go on with the interrupted training in FILE")
    add_options(command, "--backgrounds", "--category", "--rain", "--steps", "--seed", "--device")
    command = add_command(command_restore, "remove the rain from a photograph",
                          "restore model.pt photo.jpg -o clean.png", "the restored photograph")
    command.add_argument("model", type=Path, help="a checkpoint that `train` wrote")
    command.add_argument("photo", type=Path, help="the photograph, of any size")
    add_options(command, "--device")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    args = make_parser().parse_args(words)
    try:
        if args.run is not command_headline and words[0].startswith("-"):
            raise BadInput("options belong behind the command, not before it")
        args.run(args)
    except (BadInput, OSError) as problem:
        print(f"derain.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nstopped: {stop if stop.args else 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
