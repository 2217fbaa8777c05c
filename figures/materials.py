"""Which degradations and backgrounds do the claims need that derain.py does without?"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
