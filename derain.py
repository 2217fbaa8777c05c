"""Why do image-restoration networks fail on degradations that they have not seen?

Two copies of a network learn to remove rain, one on 8 backgrounds, one on 1,024, and meet rain that
neither has seen: the central experiment of Hu et al. (arXiv 2502.12600), in a minute.

1 rain           RainRange, streak_kernel, streak_seeds, rain_layers, add_rain, rain_degradation
2 backgrounds    draw_face, draw_dead_leaves, open_image, load_images, sample_patches, sharpness
3 networks       ResNet, UNet, WindowAttention, SwinIR, line_openings, LineOpenings
4 content prior  Encoder, Decoder, Codebook, VQGAN, load_vqgan, pretrain, VQGANPrior
5 training       train, save_checkpoint, load_checkpoint
6 evaluation     rain_mask, decoupled_evaluation, psnr, ssim, opening, predict, restore
7 main job       training_and_held_out, training_patches, few_against_many, figure_headline
8 command line   make_parser, main

Images are float32 tensors (n, 3, h, w) in [0, 1], one image is (3, h, w), rain is (n, 1, h, w).
"""

import argparse
import copy
import csv
import math
import pickle
import re
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

torch.empty(30 * 2 ** 18)  # once glibc has freed 30 MB it keeps them: training is a third faster

class BadInput(ValueError):
    """What the user gave cannot work; the message says what is wrong."""

def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """A random stream for each seed and purpose, such as stream(0, "training", 17) for a step."""
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in purpose)])

def each(items: Iterable, work: Callable) -> list:
    """work(item) of every item; what fails is named on standard error.  BadInput if all fail."""
    results = []
    for item in items:
        try:
            results.append(work(item))
        except ValueError as problem:  # BadInput is one
            print(*f"skipped: {problem}".split(), file=sys.stderr)
    if not results:
        raise BadInput("none of the files could be used")
    return results

def print_progress(label: str, step: int, steps: int, loss: float, begun: float) -> None:
    """Print a job's step, loss and time left, twenty times in all, if it has a label."""
    if label and step % math.ceil(steps / 20) == 0:
        left = (time.monotonic() - begun) / step * (steps - step)
        print(f"{label}: step {step} of {steps}, loss {loss:.4f}, {left:.0f} s left")

# ---- 1  Rain: how is a rainy image made? ---------------------------------------------------------
# By linear superimposition, O = clip(B + R, 0, 1): a background B and a rain layer R, the same in
# all channels.  R is random seeds, filtered with a blurred line, so that each becomes a streak.
# A network can overfit to the ranges that a streak's factors are drawn from.

@dataclass(frozen=True)
class RainRange:
    """The factors of rain, intervals (low, high) that every image draws from (paper, Fig. 2)."""
    quantity: tuple[float, float]  # streak seeds per 10,000 pixels; below 0: none
    width: tuple[float, float]  # of a streak at half its brightness, in pixels
    length: tuple[float, float]  # the same
    direction: tuple[float, float]  # degrees from vertical; positive leans like "/"
    either_side: bool = False  # mirror the direction of half of the images

# small lies within medium, and that within large, in every factor; `unseen` lies outside large in
# direction and length.  `diverse`, for people's photographs, has all directions, or is no rain.
RAIN = {
    "small": RainRange(quantity=(60, 80), width=(1.5, 2.0), length=(12, 16), direction=(-5, 5)),
    "medium": RainRange(quantity=(40, 120), width=(1.3, 2.5), length=(9, 20), direction=(-20, 20)),
    "large": RainRange(quantity=(20, 160), width=(1.0, 3.0), length=(6, 24), direction=(-45, 45)),
    "unseen": RainRange((25, 50), (1.3, 2.5), (28, 36), direction=(55, 75), either_side=True),
    "diverse": RainRange(quantity=(-50, 150), width=(1, 6), length=(4, 24), direction=(-90, 90)),
}
STREAK_PEAK = (0.3, 0.8)  # every streak draws its peak brightness from this interval

def streak_kernel(width: float | Tensor, length: float | Tensor,
                  direction: float | Tensor) -> Tensor:
    """The picture of one streak: a line of `length`, blurred by a Gaussian, 1 at its centre.
    width, length: pixels at half brightness, above 0 (the Gaussian's sigma is width / 2.355).
    direction: degrees from vertical; positive leans like "/".  Numbers give (k, k), tensors (n,)
    give (n, k, k); k // 2 is length / 2 + 3 sigma, rounded up, of the largest of the streaks."""
    width = torch.as_tensor(width, dtype=torch.float32)[..., None, None]  # (1, 1) or (n, 1, 1)
    length = torch.as_tensor(length, dtype=torch.float32)[..., None, None]
    angle = torch.deg2rad(torch.as_tensor(direction, dtype=torch.float32))[..., None, None]
    sigma = width / math.sqrt(8 * math.log(2))
    radius = math.ceil((length / 2 + 3 * sigma).max().item())
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y = x[:, None]  # grows downwards, as the rows of an image do
    along = x * torch.sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * torch.sin(angle)
    # Across, the blurred line is a Gaussian; along, it is a box with ends softened by the Gaussian.
    blur = math.sqrt(2) * sigma
    box = torch.erf((length / 2 - along) / blur) + torch.erf((length / 2 + along) / blur)
    return torch.exp(-(across / blur) ** 2) * box / (2 * torch.erf(length / 2 / blur))

def streak_seeds(noise: Tensor, quantity: Tensor) -> Tensor:
    """Turn uniform noise (n, h, w) in [0, 1) into seeds: a streak's peak where one sits, else 0.
    quantity (n,): expected seeds per 10,000 pixels.  Pixels with noise in the top quantity / 10,000
    become seeds; how far above that threshold it is, linearly, is their place in STREAK_PEAK."""
    share = (quantity / 10_000)[:, None, None]
    above = (noise - (1 - share)) / share  # uniform in [0, 1) where it is not negative
    low, high = STREAK_PEAK
    return torch.where(above > 0, low + (high - low) * above, torch.zeros(()))

def rain_layers(n: int, size: int | tuple[int, int], rain_range: RainRange,
                rng: np.random.Generator) -> Tensor:
    """n rain layers (n, 1, h, w) in [0, 1]; size is (h, w) or one number.  Streaks add up, to 1.
    Draws the factors of all images, one factor after the other; the side that each image leans to,
    if either_side; then rng.random((n, *canvas), np.float32).  The canvas has sides h + k - 1 and
    w + k - 1, rounded up to multiples of 16, so that streaks also come in from outside: the kernel
    (k, k) of a seed at (y, x) fills rows y - k + 1 to y and columns x - k + 1 to x of the frame."""
    height, width = (size, size) if isinstance(size, int) else size
    intervals = (rain_range.quantity, rain_range.width, rain_range.length, rain_range.direction)
    factors = np.stack([rng.uniform(low, high, n) for low, high in intervals])  # (4, n)
    if rain_range.either_side:
        factors[3] *= rng.choice([-1, 1], n)
    factors = torch.from_numpy(factors).float()
    kernel = streak_kernel(*factors[1:])  # (n, k, k)
    margin = kernel.shape[-1] - 1
    canvas = [math.ceil((side + margin) / 16) * 16 for side in (height, width)]
    noise = torch.from_numpy(rng.random((n, *canvas), dtype=np.float32))
    # The Fourier transform filters each layer with its own kernel, fastest if sides divide by 16.
    seeds = streak_seeds(noise, factors[0].clamp(min=0))
    spectrum = torch.fft.rfft2(seeds) * torch.fft.rfft2(kernel, s=canvas)
    rain = torch.fft.irfft2(spectrum, s=canvas)[:, None, margin:, margin:]
    return rain[..., :height, :width].clamp(0, 1)

def add_rain(background: Tensor, rain: Tensor) -> Tensor:
    """O = clip(B + R, 0, 1), for B (n, 3, h, w) and R (n, 1, h, w) in [0, 1].  (Paper, Eq. 1.)"""
    return (background + rain).clamp(0, 1)

def rain_degradation(rain_range: RainRange) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """A degradation, degrade(clean, rng) -> degraded, that rains on each image (n, 3, h, w)."""
    def degrade(clean: Tensor, rng: np.random.Generator) -> Tensor:
        return add_rain(clean, rain_layers(len(clean), clean.shape[-2:], rain_range, rng))
    return degrade

# ---- 2  Backgrounds: what stands behind the rain, and how complex is it? -------------------------
# Without photographs, two painters stand in: faces, and dead leaves, a model of natural images.

def inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape: 1 where the signed distance to its outline is negative."""
    return np.clip(0.5 - distance / softness, 0, 1)

def paint(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour (3, 1, 1) or (3, h, w) over image (3, h, w), in place, by coverage (h, w)."""
    image += coverage * (np.asarray(colour, dtype=np.float32) - image)

def draw_face(size: int, rng: np.random.Generator) -> np.ndarray:
    """A face (3, size, size): smooth, one layout for all; colours and proportions vary."""
    shift = rng.uniform(-0.06, 0.06, (2, 1, 1))
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32) - shift
    light = 1 + 0.18 * rng.choice([-1, 1]) * x - 0.1 * y
    wide = rng.uniform(0.46, 0.56)
    tall = rng.uniform(0.62, 0.70)
    skin = rng.uniform(0.45, 1.05) * rng.uniform([0.93, 0.68, 0.53], [0.93, 0.75, 0.63])
    hair = rng.uniform(0.15, 2.0) * rng.uniform([0.36, 0.18, 0.08], [0.36, 0.27, 0.18])
    fringe = inside(y + rng.uniform(0.30, 0.45) + 0.3 * rng.choice([-1, 1]) * x, 0.06)
    image = np.zeros((3, size, size), dtype=np.float32)

    def oval(cx, cy, rx, ry, softness=0.0):
        distance = (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)
        return inside(distance, softness + 3 / size)

    def pair(cx, *rest):
        return oval(-cx, *rest) + oval(cx, *rest)

    def layer(coverage, colour):
        paint(image, coverage, np.reshape(colour, (3, 1, 1)) * light)

    layer(np.ones_like(x), rng.uniform(0.25, 0.85) + rng.uniform(-0.15, 0.15, 3))  # backdrop
    layer(oval(0, 0.02, wide + 0.14, tall + rng.uniform(0.08, 0.35), 0.06), hair)
    layer(oval(0, 1.25, 0.95, 0.45, 0.03), rng.uniform(0.1, 0.9, 3))  # shoulders
    layer(oval(0, 0.70, 0.24, 0.45, 0.04), 0.82 * skin)  # neck
    layer(oval(0, 0.06, wide, tall, 0.04), skin)
    layer(0.35 * pair(0.30, 0.24, 0.17, 0.13, 0.16), skin * [1.05, 0.72, 0.70])  # cheeks
    layer(pair(0.22, -0.06, 0.115, 0.055), [0.95, 0.95, 0.93])  # eyes, irises, pupils, brows
    layer(pair(0.22, -0.06, 0.055, 0.055), rng.uniform(0.1, 0.5, 3))
    layer(pair(0.22, -0.06, 0.025, 0.028), [0.02, 0.02, 0.02])
    layer(pair(0.22, -0.20, 0.15, 0.028, 0.02), 0.7 * hair)
    layer(0.5 * oval(0.02, 0.22, 0.085, 0.06, 0.07), 0.72 * skin)  # nose
    layer(oval(0, 0.42, 0.20, 0.065), skin * [0.95, 0.55, 0.55])  # lips, the line between them
    layer(oval(0, 0.42, 0.17, 0.012), skin * [0.48, 0.28, 0.28])
    layer(fringe * oval(0, 0.04, wide + 0.02, tall + 0.04, 0.06), hair)
    return image

def draw_dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Dead leaves (3, size, size): discs, radii of density r^-3 (Lee, Mumford & Huang 2001)."""
    image = np.zeros((3, size, size), dtype=np.float32)
    scene = rng.uniform(0.2, 0.7) + rng.normal(0, 0.08, 3)
    smallest = 2.5 * 4 ** rng.random()
    largest = size / 2 + 10
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest ** -2 - largest ** -2)
    for _ in range(math.ceil(8 * (size + 2 * smallest) ** 2 / mean_area)):
        u = rng.random()
        r = (smallest ** -2 * (1 - u) + largest ** -2 * u) ** -0.5  # inverts the distribution of r
        cx, cy = rng.uniform(-r, size + r, 2)
        edges = np.clip([cy - r - 1, cy + r + 2, cx - r - 1, cx + r + 2], 0, size).astype(int)
        window = (slice(*edges[:2]), slice(*edges[2:]))  # where the disc is
        y, x = np.ogrid[window]
        y, x = (y - cy).astype(np.float32), (x - cx).astype(np.float32)
        colour = np.clip(scene + rng.normal(0, 0.2) + rng.normal(0, 0.06, 3), 0.05, 1)
        shading = 1 + (rng.normal(0, 0.1) * x + rng.normal(0, 0.1) * y) / r
        coverage = inside(np.sqrt(x * x + y * y) - r, 1.0)
        paint(image[:, *window], coverage, colour[:, None, None] * shading)
    return image

BACKGROUNDS = {"faces": draw_face, "natural": draw_dead_leaves}

def draw_background(category: str, size: int, rng: np.random.Generator) -> Tensor:
    """One background (3, size, size) in [0, 1] of a category, a key of BACKGROUNDS."""
    return torch.from_numpy(BACKGROUNDS[category](size, rng)).float().clamp(0, 1)

# What PIL decodes by itself.  (Others, such as EPS, it gives to programs that run their content.)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm")

def open_image(path: str | Path) -> Tensor:
    """Decode an image file, upright, as RGB: (3, h, w) in [0, 1].  Raises BadInput if it fails."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            array = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as problem:  # decoders fail in as many ways as files are damaged
        raise BadInput(f"{path} is no image that can be read: {problem}") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 255

def image_files(folder: str | Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; BadInput if there are none."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise BadInput(f"{folder} is no folder with images ({' '.join(SUFFIXES)})")
    return files

def load_images(path: str | Path, smallest: int = 1) -> list[Tensor]:
    """Load an image file, or those in a folder: (3, h, w) each.  What is broken, or smaller than
    `smallest` a side, is skipped, and named.  Collections are thinned out and cropped to 0.5 GB."""
    files = [Path(path)] if Path(path).is_file() else image_files(path)
    files = files[::math.ceil(len(files) / 600)]
    most = int((40e6 / len(files)) ** 0.5)  # pixels a side

    def load(file: Path) -> Tensor:
        image = open_image(file)
        if min(image.shape[1:]) < smallest:
            raise BadInput(f"{file} is below {smallest}x{smallest} pixels")
        top, left = (max(0, side - most) // 2 for side in image.shape[1:])
        return image[:, top:top + most, left:left + most].clone()

    return each(files, load)

def sample_patches(images: list[Tensor], n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Cut n patches (n, 3, size, size) at random places, as evenly from all images as n allows.
    Raises ValueError if an image is smaller than a patch."""
    order = [rng.permutation(len(images)) for _ in range(math.ceil(n / len(images)))]
    patches = []
    for i in np.concatenate(order)[:n]:
        top, left = (rng.integers(side - size + 1) for side in images[i].shape[1:])
        patches.append(images[i][:, top:top + size, left:left + size])
    return torch.stack(patches)

def sharpness(patches: Tensor) -> Tensor:
    """Mean gradient magnitude of each patch (n, 3, h, w), per pixel: (n,).  (Paper, Fig. 5.)
    The gradient: forward differences, down and right, of the channels' mean, where both exist."""
    grey = patches.mean(1)
    down = grey[:, 1:, :-1] - grey[:, :-1, :-1]
    right = grey[:, :-1, 1:] - grey[:, :-1, :-1]
    return torch.hypot(down, right).mean((1, 2))

# ---- 3  Networks: does the architecture matter? --------------------------------------------------
# Each maps degraded images (n, 3, h, w) of any size to restored ones.  An output pixel depends on
# 21x21 input pixels in the ResNet, 44x44 in the U-Net, 26x26 in SwinIR, which predicts a change.

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)  # keeps the size of the image

def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Reflect images at the right and bottom until sides divide by `multiple`; or repeat edges."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    reflect = bottom < images.shape[-2] and right < images.shape[-1]
    return F.pad(images, (0, right, 0, bottom), "reflect" if reflect else "replicate")

class ResNet(nn.Module):
    """Convolution, residual blocks, convolution, no more.  What its output shows, it has drawn."""
    def __init__(self, channels: int = 16, blocks: int = 4):
        super().__init__()
        self.head = conv3x3(3, channels)
        self.body = nn.ModuleList()
        for _ in range(blocks):
            layers = [conv3x3(channels, channels), nn.ReLU(), conv3x3(channels, channels)]
            self.body.append(nn.Sequential(*layers))
        self.tail = conv3x3(channels, 3)

    def forward(self, degraded: Tensor) -> Tensor:
        features = self.head(degraded)  # (n, channels, h, w)
        for block in self.body:
            features = features + block(features)
        return self.tail(features)

class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015).  Twice, sides halve (max pooling) and channels double;
    each level on the way up gets back, as its first channels, what it was on the way down."""
    def __init__(self, channels: int = 16):
        super().__init__()
        def level(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(conv3x3(inputs, outputs), nn.ReLU(),
                                 conv3x3(outputs, outputs), nn.ReLU())
        c = channels
        self.down = nn.ModuleList([level(3, c), level(c, 2 * c)])
        self.bottom = level(2 * c, 4 * c)
        self.grow = nn.ModuleList([nn.ConvTranspose2d(4 * c, 2 * c, 2, 2),
                                   nn.ConvTranspose2d(2 * c, c, 2, 2)])
        self.up = nn.ModuleList([level(4 * c, 2 * c), level(2 * c, c)])
        self.tail = nn.Conv2d(c, 3, 1)

    def forward(self, degraded: Tensor) -> Tensor:
        features = pad_to_multiple(degraded, 4)
        details = []
        for level in self.down:
            details.append(level(features))
            features = F.max_pool2d(details[-1], 2)
        features = self.bottom(features)  # (n, 4 channels, h / 4, w / 4)
        for grow, level in zip(self.grow, self.up):
            features = level(torch.cat([details.pop(), grow(features)], 1))
        return self.tail(features)[..., :degraded.shape[2], :degraded.shape[3]]

def to_windows(image: Tensor, window: int) -> Tensor:
    """Cut (n, h, w, c) into windows (n * windows, window ** 2, c), both in rows of the image."""
    n, h, w, c = image.shape
    cut = image.view(n, h // window, window, w // window, window, c)
    return cut.transpose(2, 3).reshape(-1, window * window, c)

def from_windows(windows: Tensor, window: int, shape: torch.Size) -> Tensor:
    """Undo to_windows; shape is that of the image, (n, h, w, c)."""
    n, h, w, c = shape
    cut = windows.view(n, h // window, w // window, window, window, c)
    return cut.transpose(2, 3).reshape(shape)

def shift_mask(h: int, w: int, window: int) -> Tensor:
    """What is added to attention in shifted windows (windows, window ** 2, window ** 2): 0 or -100.
    Shifting rolls the image (h, w) up and to the left by window // 2, around its edges.  -100 keeps
    query and key from opposite sides of the image apart.  Windows are those of to_windows."""
    def band(side: int) -> Tensor:  # 0, then 1 in the last window, then 2 in the part rolled in
        place = torch.arange(side)
        return (place >= side - window).long() + (place >= side - window // 2)
    region = 3 * band(h)[:, None] + band(w)
    region = to_windows(region[None, :, :, None], window)[..., 0]  # (windows, window ** 2)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)

class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias for each offset of two pixels.
    windows (b, n, c), n = window ** 2; mask (windows of an image, n, n), to be added, or None.
    `qkv` makes queries, then keys, then values, each with its heads side by side; scores are
    divided by the root of a head's channels; offset[i, j]: the table's row for query i, key j."""
    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = np.divmod(np.arange(window ** 2), window)
        down = y[:, None] - y + window - 1
        right = x[:, None] - x + window - 1
        offset = torch.from_numpy(down * (2 * window - 1) + right)  # (n, n)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = windows.shape
        qkv = self.qkv(windows).view(b, n, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each (b, heads, n, c / heads)
        bias = self.relative_position_bias_table[self.offset].permute(2, 0, 1)  # (heads, n, n)
        if mask is not None:
            bias = bias + mask[:, None]  # (windows of an image, heads, n, n)
        scores = query * (c // self.heads) ** -0.5 @ key.transpose(-2, -1)  # (b, heads, n, n)
        weights = (scores.view(-1, *bias.shape) + bias).softmax(-1).view(scores.shape)
        return self.proj((weights @ value).transpose(1, 2).reshape(b, n, c))

class SwinBlock(nn.Module):
    """Attention in windows, then a perceptron for each pixel; each adds to its input (n, h, w, c).
    Each starts with a normalization of its input; the perceptron has a GELU.  With shift > 0 (half
    a window) the image is rolled up and to the left before it is cut into windows, then back."""
    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, image: Tensor) -> Tensor:
        mask = None
        if self.shift:
            mask = shift_mask(image.shape[1], image.shape[2], self.window).to(image.device)
        rolled = self.norm1(image).roll((-self.shift, -self.shift), (1, 2))
        attended = self.attn(to_windows(rolled, self.window), mask)
        attended = from_windows(attended, self.window, image.shape)
        image = image + attended.roll((self.shift, self.shift), (1, 2))
        return image + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(image))))

class SwinIR(nn.Module):
    """SwinIR (Liang et al. 2021): groups of Swin blocks, every second one shifted, between
    convolutions.  As published for denoising, so that a published checkpoint's "params" load."""
    def __init__(self, embed_dim: int = 16, depths: tuple[int, ...] = (2,),
                 num_heads: tuple[int, ...] = (2,), window_size: int = 8, mlp_ratio: float = 2.0):
        super().__init__()
        self.window = window_size
        self.conv_first = conv3x3(3, embed_dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList()
        hidden = int(embed_dim * mlp_ratio)
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = nn.Sequential()
            for i in range(depth):
                shift = window_size // 2 if i % 2 else 0
                blocks.append(SwinBlock(embed_dim, heads, window_size, shift, hidden))
            group = nn.ModuleDict({"blocks": blocks})
            conv = conv3x3(embed_dim, embed_dim)
            self.layers.append(nn.ModuleDict({"residual_group": group, "conv": conv}))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = conv3x3(embed_dim, embed_dim)
        self.conv_last = conv3x3(embed_dim, 3)
        for weights in self.parameters():
            if weights.ndim == 2:  # linear layers and bias tables start small
                nn.init.trunc_normal_(weights, std=0.02)
        mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)  # of DIV2K
        self.register_buffer("mean", mean, persistent=False)

    def load_state_dict(self, weights: dict[str, Tensor], *options, **more):
        """As usual, but for tables in published checkpoints that follow from the arguments."""
        derived = ("relative_position_index", "attn_mask")
        weights = {key: weights[key] for key in weights if not key.endswith(derived)}
        return super().load_state_dict(weights, *options, **more)

    def forward(self, degraded: Tensor) -> Tensor:
        image = pad_to_multiple(degraded, self.window) - self.mean
        shallow = self.conv_first(image)  # (n, c, h, w)
        deep = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1))  # (n, h, w, c) from here on
        for layer in self.layers:
            features = layer["residual_group"]["blocks"](deep)
            deep = deep + layer["conv"](features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        deep = self.conv_after_body(self.norm(deep).permute(0, 3, 1, 2)) + shallow
        restored = image + self.conv_last(deep) + self.mean
        return restored[..., :degraded.shape[2], :degraded.shape[3]]

def line_openings(images: Tensor, reach: int = 4, directions: int = 12) -> Tensor:
    """Openings of images (n, 3, h, w), the largest of the smallest along lines of 2 reach + 1
    pixels that turn by 180 / directions degrees: (n, directions, 3, h, w).  Borders wrap around."""
    opened = []
    for angle in np.linspace(0, math.pi, directions, endpoint=False):
        line = np.outer(np.arange(-reach, reach + 1), [math.cos(angle), math.sin(angle)])
        shifts = line.round().astype(int).tolist()  # down, right
        smallest = reduce(torch.minimum, (images.roll(shift, (2, 3)) for shift in shifts))
        opened.append(reduce(torch.maximum, (smallest.roll(shift, (2, 3)) for shift in shifts)))
    return torch.stack(opened, 1)

class LineOpenings(nn.Module):
    """A weighted mean of an image and its line_openings: can draw neither rain nor image.  (Ours.)
    A line across a streak removes it, and harms less than a square.  The weights, one each, depend
    on how much in the image is thin and bright, as rain is, and thin and dark, along each line."""
    def __init__(self, hidden: int = 32):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(4, hidden), nn.SiLU(), nn.Linear(hidden, 2))

    def forward(self, degraded: Tensor) -> Tensor:
        choices = torch.cat([degraded[:, None], line_openings(degraded)], 1)  # (n, 13, 3, h, w)
        bright = (degraded[:, None] - choices[:, 1:]).mean((2, 3, 4))  # (n, 12)
        dark = (-line_openings(-degraded) - degraded[:, None]).mean((2, 3, 4))
        thin = torch.log(torch.stack([bright, dark], -1) + 1e-3)  # (n, 12, 2)
        mean = thin.mean(1, keepdim=True)
        seen = torch.cat([thin - mean, mean.expand_as(thin)], -1)  # (n, 12, 4)
        line, keep = self.score(seen).unbind(-1)
        weights = torch.cat([keep.mean(1, keepdim=True), line], 1).softmax(1)  # (n, 13)
        return (weights[..., None, None, None] * choices).sum(1)

NETWORKS = {"resnet": ResNet, "unet": UNet, "swinir": SwinIR, "lines": LineOpenings}

def build_network(make: type[nn.Module], seed: int = 0, **arguments) -> nn.Module:
    """make(**arguments), such as ResNet(channels=8), with weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):  # torch's own random state stays as it was
        torch.manual_seed(seed)
        # Channels-last memory, the channels of a pixel side by side, makes CPU convolutions fast.
        return make(**arguments).to(memory_format=torch.channels_last)

# ---- 4  Content prior: can a network be held to the manifold of clean images? --------------------
# A VQGAN (Esser et al. 2021) is an autoencoder: its encoder turns an image into a grid of vectors,
# each is replaced by the nearest of a fixed list, the codebook, and its decoder draws an image from
# those.  Trained on clean images, it has codes for what they show, and none for rain.

group_norm = partial(nn.GroupNorm, 32, eps=1e-6)  # of a number of channels that divides by 32

class ResidualBlock(nn.Module):
    """Two convolutions, each after normalization and swish (SiLU), added to nin_shortcut(input)."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))

class PixelAttention(nn.Module):
    """Single-head self-attention among all pixels, added to its input (n, c, h, w).
    q, k, v are of the normalized input; scores are divided by the root of c; proj_out is last."""
    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).mT for layer in (self.q, self.k, self.v))  # (n, h w, c)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.mT.reshape(x.shape))

class Level(nn.Module):
    """The residual blocks at one resolution, each followed by attention or not."""
    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(blocks):
            self.block.append(ResidualBlock(outputs if i else inputs, outputs))
            self.attn.append(PixelAttention(outputs) if attention else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip(self.block, self.attn):
            x = attend(block(x))
        return x

def middle(channels: int) -> nn.Sequential:
    """Block, attention, block: what encoder and decoder have at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResidualBlock(channels, channels),
                                     attn_1=PixelAttention(channels),
                                     block_2=ResidualBlock(channels, channels)))

class Encoder(nn.Module):
    """Image to latent, halving the sides between levels.  widths: channels of input and levels."""
    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z_channels: int):
        super().__init__()
        self.conv_in = conv3x3(3, widths[0])
        self.down = nn.ModuleList()
        for inputs, outputs, attends in zip(widths, widths[1:], attention):
            self.down.append(Level(inputs, outputs, blocks, attends))
        for level, width in zip(self.down[:-1], widths[1:]):
            level.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](self.conv_in(x))
        for above, level in zip(self.down, self.down[1:]):
            x = level(above.downsample["conv"](F.pad(x, (0, 1, 0, 1))))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

class Decoder(nn.Module):
    """Latent to image, doubling the sides between levels, with one block a level more."""
    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z_channels: int):
        super().__init__()
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the level of the image itself, and comes last
        for inputs, outputs, attends in zip(widths[2:] + widths[-1:], widths[1:], attention):
            self.up.append(Level(inputs, outputs, blocks + 1, attends))
        for level, width in zip(self.up[1:], widths[2:]):
            level.upsample = nn.ModuleDict({"conv": conv3x3(width, width)})
        self.norm_out = group_norm(widths[1])
        self.conv_out = conv3x3(widths[1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up[1:]):
            x = level.upsample["conv"](F.interpolate(level(x), scale_factor=2))
        return self.conv_out(F.silu(self.norm_out(self.up[0](x))))

class Codebook(nn.Module):
    """Vector quantization: replaces each vector by the nearest code (van den Oord et al. 2017)."""
    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent (n, d, h, w) to the quantized latent, the codes' indices (n, h, w), and a loss.
        The gradient of the quantized latent with respect to the latent is the identity.  The loss
        sums two mean squared errors, over all elements: one moves only the latents to their codes,
        with weight 1, the other only the codes, with beta = 0.25, as in VQGAN's published code."""
        vectors = latent.permute(0, 2, 3, 1)  # (n, h, w, d)
        codes = self.embedding.weight
        # |v - c|^2 = |v|^2 - 2 v c + |c|^2, and |v|^2 is the same for all codes.
        indices = (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)
        quantized = self.embedding(indices).permute(0, 3, 1, 2)
        to_codes = F.mse_loss(latent, quantized.detach())
        loss = to_codes + 0.25 * F.mse_loss(quantized, latent.detach())
        return latent + (quantized - latent).detach(), indices, loss

class VQGAN(nn.Module):
    """The VQGAN of Esser et al. (2021), with the published one's names, numerics and defaults.
    ch * ch_mult[i] channels at level i, which has half the resolution of the one before; attention
    where that is in attn_resolutions, for images of `resolution` pixels a side.  n_embed codes of
    embed_dim numbers.  groups: of every normalization.  Images are in [-1, 1] here."""
    def __init__(self, ch: int = 128, ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
                 num_res_blocks: int = 2, attn_resolutions: tuple[int, ...] = (16,),
                 resolution: int = 256, z_channels: int = 256, n_embed: int = 1024,
                 embed_dim: int = 256, groups: int = 32):
        super().__init__()
        widths = [ch, *(ch * factor for factor in ch_mult)]
        attention = [resolution // 2 ** level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = Encoder(widths, num_res_blocks, attention, z_channels)
        self.decoder = Decoder(widths, num_res_blocks, attention, z_channels)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = groups

    def encode(self, image: Tensor) -> Tensor:
        """Image (n, 3, h, w) to its latent before quantization, (n, embed_dim, h', w')."""
        return self.quant_conv(self.encoder(image))

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized latent (n, embed_dim, h', w') to an image (n, 3, h, w)."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (n, 3, h, w) to its reconstruction and the codebook loss."""
        quantized, _, loss = self.quantize(self.encode(image))
        return self.decode(quantized), loss

class Placeholder(dict):
    """Dummy for an object in a checkpoint that is neither a tensor nor a plain container."""
    __hash__ = object.__hash__
    __init__ = __call__ = __setstate__ = append = extend = add = lambda self, *_, **__: None

class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers; any other name is a Placeholder, nothing is run."""
    KNOWN = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
             "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size")

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" in self.KNOWN or isinstance(vars(torch).get(name), torch.dtype):
            return super().find_class(module, name)
        return Placeholder

def vqgan_arguments(weights: dict[str, Tensor]) -> dict:
    """The arguments of a VQGAN, but for groups, from its weights; resolution is nominal."""
    levels = len({key.split(".")[2] for key in weights if key.startswith("encoder.down.")})
    blocks = len({key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")})
    ch = len(weights["encoder.conv_in.weight"])
    widths = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
    attends = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights]
    n_embed, embed_dim = weights["quantize.embedding.weight"].shape
    return dict(ch=ch, ch_mult=tuple(width // ch for width in widths), num_res_blocks=blocks,
                attn_resolutions=tuple(2 ** (levels - i) for i in attends), resolution=2 ** levels,
                z_channels=len(weights["encoder.conv_out.weight"]), n_embed=n_embed,
                embed_dim=embed_dim)

def load_vqgan(path: str | Path) -> VQGAN:
    """The VQGAN in a published Lightning .ckpt, or in one of ours; runs nothing in it."""
    reader = SimpleNamespace(__name__="reader", Unpickler=TensorUnpickler,
                             load=lambda file, **options: TensorUnpickler(file, **options).load())
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    try:
        if zipfile.is_zipfile(path) and "constants.pkl" in str(zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript program, which torch.load would run")
        content = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
        weights = {k: v.float() for k, v in content["state_dict"].items() if k.startswith(parts)}
        arguments = content.get("arguments") or vqgan_arguments(weights)
        vqgan = VQGAN(**arguments)
        vqgan.load_state_dict(weights)
        vqgan.arguments = arguments  # which a checkpoint of the prior needs
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        raise BadInput(f"{path} holds no VQGAN ({type(problem).__name__})") from None
    return vqgan

# Our own prior: latents 8 times smaller than the image, 1,024 codes.  8 groups: 4 channels in each,
# as published; 32 groups would subtract each channel's mean over the patch, brightness included.
PRIOR = dict(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=64,
             z_channels=64, n_embed=1024, embed_dim=16, groups=8)

def pretrain(vqgan: VQGAN, images: list[Tensor], steps: int, seed: int = 0, label="") -> None:
    """Train a VQGAN in place, with L1 and the codebook's loss, on patches of images (3, h, w).
    A code that was not chosen for 30 steps is replaced by a vector that the encoder just made."""
    codes = vqgan.quantize.embedding.weight
    optimizer = torch.optim.Adam(vqgan.parameters(), betas=(0.5, 0.9), fused=True)
    idle = torch.zeros(len(codes), device=codes.device)  # steps since each code was chosen
    begun = time.monotonic()
    for step in range(steps):
        rng = stream(seed, "pretraining", step)
        # Normalization depends on the size of the patch, so train on two sizes in turns.
        n, side = (2, 80) if step % 2 else (8, 40)
        clean = 2 * sample_patches(images, n, side, rng).to(codes.device) - 1
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * decay
        latent = vqgan.encode(clean)
        quantized, indices, codebook_loss = vqgan.quantize(latent)
        loss = F.l1_loss(vqgan.decode(quantized), clean) + codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        idle += 1
        idle[indices.flatten()] = 0
        if step < 0.8 * steps:  # later replacements would have no time to learn
            vectors = latent.detach().permute(0, 2, 3, 1).flatten(0, 2)
            dead = (idle > 30).nonzero()[:len(vectors), 0]
            chosen = rng.permutation(len(vectors))[:len(dead)]
            codes.data[dead] = vectors[torch.from_numpy(chosen).to(codes.device)]
            idle[dead] = 0
        print_progress(label, step + 1, steps, loss.item(), begun)

class VQGANPrior(nn.Module):
    """A pre-trained VQGAN as a restoration network: it draws from codes of clean images only.
    Codebook and decoder are frozen; the encoder learns to find the clean codes in degraded images.
    vqgan: a VQGAN, copied, or its arguments.  Images in [0, 1]; forward keeps size, unclamped."""
    rate = 5e-4  # for `train`; a higher learning rate destroys what the encoder has learned

    def __init__(self, vqgan: VQGAN | dict):
        super().__init__()
        self.vqgan = VQGAN(**vqgan) if isinstance(vqgan, dict) else copy.deepcopy(vqgan)
        self.teacher = copy.deepcopy(nn.Sequential(self.vqgan.encoder, self.vqgan.quant_conv))
        self.requires_grad_(False)
        self.vqgan.encoder.requires_grad_(True)
        self.vqgan.quant_conv.requires_grad_(True)

    def prepare(self, image: Tensor) -> Tensor:
        """An image in [0, 1] as the encoder takes it: padded, and in [-1, 1]."""
        return 2 * pad_to_multiple(image, 2 ** (len(self.vqgan.encoder.down) - 1)) - 1

    def draw(self, latent: Tensor, shape: torch.Size) -> Tensor:
        """What the decoder draws of the codes nearest to a latent, in [0, 1], cut to a shape."""
        quantized, _, _ = self.vqgan.quantize(latent)
        return (self.vqgan.decode(quantized)[..., :shape[2], :shape[3]] + 1) / 2

    def forward(self, degraded: Tensor) -> Tensor:
        return self.draw(self.vqgan.encode(self.prepare(degraded)), degraded.shape)

    def loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """L1, plus the mean squared distance of the encoder's latent of the degraded image, before
        quantization, from the quantized latent that `teacher` makes of the clean one."""
        with torch.no_grad():
            codes, _, _ = self.vqgan.quantize(self.teacher(self.prepare(clean)))
        latent = self.vqgan.encode(self.prepare(degraded))
        return F.mse_loss(latent, codes) + F.l1_loss(self.draw(latent, clean.shape), clean)

NETWORKS["prior"] = VQGANPrior

# ---- 5  Training: what does the network actually learn from? -------------------------------------
# From pairs: a clean patch, one of n backgrounds, and the same patch in rain drawn anew each step.
# The number of steps is the same whatever n is: n counts distinct backgrounds, never compute.

PATCH, BATCH = 40, 8  # side of a training patch in pixels, and patches in a step
RATE = 2e-3  # Adam's learning rate at the start

def train(network: nn.Module, backgrounds: Tensor, degrade: Callable, steps: int, seed: int = 0,
          label: str = "") -> list[float]:
    """Train a network in place to undo `degrade`; returns the loss of every step.
    backgrounds: clean patches (n, 3, h, w) in [0, 1].  A step: BATCH drawn with replacement, each
    mirrored (left to right) with a chance of one half, degraded; the gradient of L1, or of
    network.loss(degraded, clean); Adam at the rate RATE, or network.rate, times
    (1 + cos(pi step / steps)) / 2, with steps from 0."""
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], fused=True)
    peak_rate = getattr(network, "rate", RATE)
    own_loss = getattr(network, "loss", None)
    losses = []
    begun = time.monotonic()
    for step in range(steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        degraded = degrade(clean, rng)
        clean = clean.to(device, memory_format=torch.channels_last)
        degraded = degraded.to(device, memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = peak_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = own_loss(degraded, clean) if own_loss else F.l1_loss(network(degraded), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print_progress(label, step + 1, steps, losses[-1], begun)
    return losses

def save_checkpoint(path: str | Path, network: nn.Module, net: str, arguments: dict) -> None:
    """Write a network's weights, its name in NETWORKS, and the arguments that it was made with."""
    with open(path, "wb") as file:  # (given a path, torch.save would write the file's name into it)
        torch.save({"net": net, "arguments": arguments, "state_dict": network.state_dict()}, file)
    print(f"wrote {path}")

def load_checkpoint(path: str | Path) -> nn.Module:
    """The network that save_checkpoint wrote, on the CPU; runs nothing in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        network = NETWORKS[content["net"]](**content["arguments"])
        network.load_state_dict(content["state_dict"])
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        raise BadInput(f"{path} is no checkpoint of `train` ({type(problem).__name__})") from None
    return network.to(memory_format=torch.channels_last)

# ---- 6  Decoupled evaluation: was the rain removed, and was the background kept? -----------------
# The clean image shows where it rained, so the two can be asked apart (paper, Fig. 2).

RAIN_THRESHOLD = 4 / 255  # fainter rain is invisible, and not counted as rain

def rain_mask(rainy: Tensor, clean: Tensor) -> Tensor:
    """M (n, 1, h, w): whether |rainy - clean| > RAIN_THRESHOLD + 1e-6 in some channel."""
    difference = (rainy - clean).abs().amax(1, keepdim=True)
    return difference > RAIN_THRESHOLD + 1e-6  # which 4 of 255 grey levels never are, when rounded

def decoupled_evaluation(output: Tensor, rainy: Tensor, clean: Tensor) -> dict[str, float]:
    """Measure rain removal and background reconstruction apart, for images (n, 3, h, w) in [0, 1].
    With M the rain mask, and in grey levels from 0 to 255, returns:
      E_R        RMS(output - rainy) on M: what was changed where it rained; higher is better, up to
                 E_R_ideal.  Damage raises it too, so it is never read without E_W.
      E_R_ideal  RMS(clean - rainy) on M: the E_R of a perfect output.
      E_W        RMS(output - clean) on M (W: wet): rain left, or damage; lower is better.
      E_B        RMS(output - clean) off M: what was broken elsewhere; lower is better.
      psnr, ssim over whole images; ssim is NaN for images below 11x11.
    An RMS is one root of one mean over all pixels and channels of the set, NaN if it is empty.  So
    255^2 MSE = |M| E_W^2 + (1 - |M|) E_B^2, with |M| the share of wet pixels.  Raises ValueError if
    the shapes differ.  (Paper, Section 3; E_W is ours.)"""
    if not output.shape == rainy.shape == clean.shape:
        raise ValueError("output, rainy and clean differ in shape")
    wet = rain_mask(rainy, clean).expand_as(clean)
    def rms(difference: Tensor) -> float:
        return 255 * difference.double().square().mean().sqrt().item()
    large = min(clean.shape[-2:]) >= 11
    return {"E_R": rms((output - rainy)[wet]), "E_R_ideal": rms((clean - rainy)[wet]),
            "E_W": rms((output - clean)[wet]), "E_B": rms((output - clean)[~wet]),
            "psnr": psnr(output, clean), "ssim": ssim(output, clean) if large else math.nan}

def psnr(output: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio, -10 log10(MSE) dB, of images (n, 3, h, w); mean over the n.
    Infinite for equal images.  Raises ValueError if the shapes differ."""
    if output.shape != clean.shape:
        raise ValueError("output and clean differ in shape")
    mse = (output.double() - clean.double()).square().flatten(1).mean(1)  # (n,)
    return (-10 * torch.log10(mse)).mean().item()

def ssim(output: Tensor, clean: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of images (n, 3, h, w) in [0, 1]; mean over images.
    With means m, variances v, covariance c under an 11x11 Gaussian window of sigma 1.5 and sum 1,
    (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)), C1 = 0.01^2, C2 = 0.03^2,
    of each channel, averaged where the window fits.  ValueError: shapes differ, or below 11x11."""
    if output.shape != clean.shape or min(clean.shape[-2:]) < 11:
        raise ValueError("SSIM needs two images of one shape, of 11x11 pixels or more")
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    window = window / window.sum()
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    def blur(image: Tensor) -> Tensor:  # (1, h, w) to (1, h - 10, w - 10): columns, then rows
        return F.conv2d(F.conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    similarity = []
    for x, y in zip(output.flatten(0, 1), clean.flatten(0, 1)):  # one by one, to bound the memory
        x, y = x.double()[None], y.double()[None]
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
        covariance = blur(x * y) - mean_x * mean_y
        similarity.append(((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                           / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2))).mean())
    return torch.stack(similarity).mean().item()

def opening(images: Tensor, size: int = 5) -> Tensor:
    """Morphological opening of images (n, 3, h, w): the largest of the smallest in size x size.
    The untrained yardstick: it removes whatever is bright and thinner than `size`."""
    smallest = -F.max_pool2d(-images, size, 1, size // 2)
    return F.max_pool2d(smallest, size, 1, size // 2)

@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output for images (n, 3, h, w), clipped to [0, 1]; 16 at a time, for memory."""
    device = next(network.parameters()).device
    chunks = images.contiguous(memory_format=torch.channels_last).split(16)
    return torch.cat([network(chunk.to(device)).clamp(0, 1).cpu() for chunk in chunks])

def restore(network: nn.Module, image: Tensor, tile: int = 512, margin: int = 32) -> Tensor:
    """Restore an image (3, h, w) of any size, by tiles with a margin each, to bound the memory."""
    output = torch.empty_like(image)
    for top in range(0, image.shape[1], tile):
        for left in range(0, image.shape[2], tile):
            y, x = max(top - margin, 0), max(left - margin, 0)
            piece = image[None, :, y:top + tile + margin, x:left + tile + margin]
            restored = predict(network, piece)[0, :, top - y:, left - x:]
            output[:, top:top + tile, left:left + tile] = restored[:, :tile, :tile]
    return output

# ---- 7  Main job: do fewer backgrounds make a network remove rain that it never saw? -------------

IMAGE, MANY = 256, 1024  # side of a drawn background in pixels, and number of backgrounds
TEST_PATCHES, TEST_PATCH = 48, 128  # number and side

def training_and_held_out(path: str | None, category: str, seed: int) -> tuple[list, list]:
    """Images (3, h, w) to train on and others to test on: drawn, or photographs if path is given.
    Photographs are split by image, not by patch.  Raises BadInput if fewer than two are usable."""
    def drawn(part: str, n: int) -> list[Tensor]:
        return [draw_background(category, IMAGE, stream(seed, part, i)) for i in range(n)]
    if not path:
        return drawn("backgrounds", 64), drawn("held-out backgrounds", 16)
    images = load_images(path, smallest=TEST_PATCH)
    if len(images) < 2:
        raise BadInput(f"{path}: one photograph cannot be split into training and test; give more")
    images = [images[i] for i in stream(seed, "split").permutation(len(images))]
    count = max(1, len(images) // 4)
    return images[count:], images[:count]

def training_patches(images: list[Tensor], n: int, seed: int, third: str = "any") -> Tensor:
    """n backgrounds (n, 3, PATCH, PATCH): the first of MANY, so that the few are among the many.
    third: "low" or "high" for the least or the most sharp third of 3 n patches (paper, Fig. 5)."""
    if third == "any":
        return sample_patches(images, max(n, MANY), PATCH, stream(seed, "patches"))[:n]
    patches = sample_patches(images, 3 * n, PATCH, stream(seed, "patches"))
    order = sharpness(patches).argsort()
    return patches[order[:n] if third == "low" else order[-n:]]

def few_against_many(training: list[Tensor], held_out: list[Tensor], few: int = 8, many: int = MANY,
                     net: str = "resnet", rain: str = "small", steps: int = 2500, seed: int = 0,
                     device: str = "cpu") -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
    """Train a network on few backgrounds, its twin on many; test both in unseen and in `rain`.
    Both start from the same weights and meet the same rain.  Returns a row of measures for each
    rain and output ("rainy", "opening", "few", "many"), and by rain the images, "clean" as well."""
    numbers = {"few": few, "many": many}
    networks = {name: build_network(NETWORKS[net], seed).to(device) for name in numbers}

    for name, network in networks.items():
        patches = training_patches(training, numbers[name], seed)
        train(network, patches, rain_degradation(RAIN[rain]), steps, seed, label=name)
    clean = sample_patches(held_out, TEST_PATCHES, TEST_PATCH, stream(seed, "test patches"))
    rows, pictures = [], {}
    for kind in ("unseen", rain):
        rainy = rain_degradation(RAIN[kind])(clean, stream(seed, "test", kind))
        outputs = {"rainy": rainy, "opening": opening(rainy)}
        for name, network in networks.items():
            outputs[name] = predict(network, rainy)
        for name, output in outputs.items():
            measured = decoupled_evaluation(output, rainy, clean)
            rows.append({"rain": kind, "output": name, "n": numbers.get(name, 0), **measured})
        pictures[kind] = {**outputs, "clean": clean}
    return rows, pictures

def print_table(rows: list[dict]) -> None:
    """Print rows, numbers with two digits behind the point."""
    print("".join(f"{key:>11}" for key in rows[0]))
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else v for v in row.values())
        print("".join(f"{cell:>11}" for cell in cells))

def figure_headline(rows: list[dict], pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """The first test image in both rains, with the numbers of the whole test set."""
    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    grid = figure.subplots(2, 5, subplot_kw={"xticks": [], "yticks": []})
    for line, (rain, images) in zip(grid, pictures.items()):
        line[0].set_ylabel("unseen rain" if rain == "unseen" else "rain as in training")
        for axes, name in zip(line, images):
            axes.imshow(images[name][0].permute(1, 2, 0).numpy())
            axes.set_title(name)
    for axes, row in zip(grid[:, :4].flat, rows):
        if row["n"]:
            axes.set_title(f"{row['n']} backgrounds")
        axes.set_xlabel("E_W {E_W:.0f}, E_B {E_B:.0f}, {psnr:.1f} dB".format(**row))
    figure.suptitle("E_W: error where it rained, E_B: error elsewhere, in grey levels over all test"
                    " images (lower is better).  PSNR: higher is better.", fontsize=10)
    return figure

def save_figure(figure: Figure, rows: list[dict], path: Path) -> None:
    """Write a figure, and the numbers behind it as a .csv of the same name; print both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {path} and {path.with_suffix('.csv')}")

# ---- 8  Command line: python derain.py --help ----------------------------------------------------

def save_image(image: Tensor, path: Path) -> None:
    """Write an image (3, h, w) in the format that the path's suffix names, and print the path."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path} should end in one of {' '.join(SUFFIXES)}")
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path, quality=95)
    print(f"wrote {path}")

def command_main(args: argparse.Namespace) -> None:
    images = training_and_held_out(args.backgrounds, args.category, args.seed)
    rows, pictures = few_against_many(*images, args.few, args.many, args.net, args.rain, args.steps,
                                      args.seed, args.device)
    print_table(rows)
    save_figure(figure_headline(rows, pictures), rows, args.out / "headline.png")

def command_rain(args: argparse.Namespace) -> None:
    clean = open_image(args.photo)[None]
    rainy = rain_degradation(RAIN[args.range])(clean, stream(args.seed, "rain command"))
    save_image(rainy[0], args.output)

def command_train(args: argparse.Namespace) -> None:
    images, _ = training_and_held_out(args.backgrounds, args.category, args.seed)
    if args.vqgan:
        vqgan = load_vqgan(args.vqgan)
        net, network, arguments = "prior", VQGANPrior(vqgan), {"vqgan": vqgan.arguments}
    else:
        net, network, arguments = args.net, build_network(NETWORKS[args.net], args.seed), {}
    patches = training_patches(images, args.n, args.seed, "low" if args.simple else "any")
    degrade = rain_degradation(RAIN[args.rain])
    train(network.to(args.device), patches, degrade, args.steps, args.seed, label=net)
    save_checkpoint(args.output, network, net, arguments)

def command_vqgan(args: argparse.Namespace) -> None:
    images, _ = training_and_held_out(args.backgrounds, args.category, args.seed)
    vqgan = build_network(VQGAN, args.seed, **PRIOR).to(args.device)
    pretrain(vqgan, images, args.steps, args.seed, label="vqgan")
    save_checkpoint(args.output, vqgan, "vqgan", PRIOR)

def command_restore(args: argparse.Namespace) -> int:
    network = load_checkpoint(args.model).to(args.device)
    def work(photo: Path) -> None:
        save_image(restore(network, open_image(photo)), args.output / f"{photo.stem}-restored.png")
    return 1 if len(each(args.photos, work)) < len(args.photos) else 0

def number_in(file: Path) -> int | str:
    """The first number in a file's name, 1 in norain-001, or the name if it has none."""
    digits = re.search(r"\d+", file.stem)
    return int(digits[0]) if digits else file.stem

def command_evaluate(args: argparse.Namespace) -> int:
    networks = {str(path): load_checkpoint(path).to(args.device) for path in args.models}
    files = image_files(args.rainy)
    numbers = {number_in(file) for file in files}
    partners = {number_in(file): file for file in image_files(args.clean)}
    files += [file for number, file in partners.items() if number not in numbers]

    def measure(file: Path) -> dict[str, dict]:
        number = number_in(file)
        if number not in numbers or number not in partners:
            raise BadInput(f"{file} has no partner")
        rainy, clean = open_image(file)[None], open_image(partners[number])[None]
        if rainy.shape != clean.shape:
            raise BadInput(f"{file} and {partners[number]} differ in size")
        outputs = {"rainy": rainy, "opening": opening(rainy)}
        for name, network in networks.items():
            outputs[name] = restore(network, rainy[0])[None]
        return {name: decoupled_evaluation(outputs[name], rainy, clean) for name in outputs}

    pairs = each(files, measure)
    rows = []
    for name in pairs[0]:
        means = np.nanmean([list(pair[name].values()) for pair in pairs], axis=0)
        rows.append({"output": name, "pairs": len(pairs), **dict(zip(pairs[0][name], means))})
    print_table(rows)
    return 1 if len(pairs) < len(files) else 0

def whole(text: str, least: int = 0) -> int:
    """An option's value: a whole number, not below `least`."""
    if not text.isdecimal() or not least <= int(text) < 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to 2 ** 31")
    return int(text)

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is told in one line."""
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

def make_parser() -> Parser:
    """Every command, with its options."""
    layout = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    number = dict(type=partial(whole, least=1), metavar="N")
    parser = Parser(prog="derain.py", epilog="example: python derain.py --seed 1", **layout,
                    description="Without a command: compare training on few and many backgrounds.")
    parser.set_defaults(run=command_main)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands, each with a --help")

    def command(run: Callable, about: str, example: str) -> Parser:
        verb = commands.add_parser(example.split()[0], help=about, description=about, **layout,
                                   epilog=f"example: python derain.py {example}")
        verb.set_defaults(run=run)
        return verb

    rain = command(command_rain, "add rain to a photograph", "rain a.jpg -o rainy.png")
    rain.add_argument("photo")
    rain.add_argument("--range", choices=RAIN, default="medium", help="kind of rain")
    train = command(command_train, "train a network", "train --backgrounds photos/ -o model.pt")
    train.add_argument("--n", **number, default=64, help="backgrounds")
    train.add_argument("--simple", action="store_true", help="the N least sharp of 3 N")
    train.add_argument("--vqgan", metavar="FILE", help="fine-tune this pre-trained prior; no --net")
    vqgan = command(command_vqgan, "pre-train the content prior", "vqgan -o vqgan.pt")
    restore = command(command_restore, "remove rain of photographs", "restore m.pt a.jpg -o out/")
    restore.add_argument("model", help="a checkpoint of `train`")
    restore.add_argument("photos", type=Path, nargs="+", metavar="photo")
    evaluate = command(command_evaluate, "measure networks on pairs of rainy and clean images",
                       "evaluate model.pt --rainy Rain100L/rainy --clean Rain100L/norain")
    evaluate.add_argument("models", nargs="+", metavar="model", help="a checkpoint of `train`")
    evaluate.add_argument("--rainy", required=True, metavar="FOLDER", help="rain-001.png, 1_1.png")
    evaluate.add_argument("--clean", required=True, metavar="FOLDER", help="norain-001.png, 1.png")
    parser.add_argument("--few", **number, default=8, help="backgrounds of one network")
    parser.add_argument("--many", **number, default=MANY, help="backgrounds of the other")
    parser.add_argument("--out", type=Path, default="figures", help="folder of headline.png")
    for verb in (rain, train, vqgan, restore):
        verb.add_argument("-o", "--output", type=Path, required=True, help="where the result goes")
    for verb in (parser, train):
        verb.add_argument("--net", choices=("resnet", "unet", "swinir", "lines"),
                          default="lines" if verb is train else "resnet", help="architecture")
        verb.add_argument("--rain", choices=("small", "medium", "large", "diverse"),
                          default="diverse" if verb is train else "small", help="rain of training")
    for verb in (parser, train, vqgan):
        verb.add_argument("--backgrounds", metavar="PATH", help="photographs, not drawn images")
        verb.add_argument("--category", choices=BACKGROUNDS, default="faces", help="what to draw")
        verb.add_argument("--steps", **number, default=5000 if verb is vqgan else 2500)
    for verb in (parser, rain, train, vqgan):
        verb.add_argument("--seed", type=whole, default=0, help="of all that is drawn at random")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for verb in (parser, train, vqgan, restore, evaluate):
        verb.add_argument("--device", choices=devices, default=devices[0], help="of torch")
    return parser

def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if some of several files were skipped, 2 for bad input."""
    args = make_parser().parse_args(arguments)
    try:
        if "output" in args:  # make its folder before the work, so that it cannot fail after it
            folder = args.output if args.run is command_restore else args.output.parent
            folder.mkdir(parents=True, exist_ok=True)
        return int(args.run(args) or 0)
    except (BadInput, OSError) as problem:
        print(*f"derain.py: {problem}".split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
