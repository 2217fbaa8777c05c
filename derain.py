"""Why do image-restoration networks fail on degradations that they have not seen?

Hu et al. (arXiv 2502.12600; here "the paper") answer: not because they are too small, but because
they learn the degradation instead of the image.  A network can know how rain looks, or how images
without rain look.  Only the second helps in rain that it never saw.

Part I is the lesson.  A network that is trained on 8 plain background images removes most of a rain
that it never saw.  With one of the 8 exchanged for an image with bright, thin structure, such as an
eye, it leaves most; trained on 1,024, it leaves nearly all.  `python derain.py` shows this in about
a minute.  Part II is the rest.

Part I:   1 rain, 2 backgrounds, 3 measures, 4 network and training, 5 main job
Part II:  6 more networks, 7 content prior, 8 files, 9 commands

Images are float32 tensors (n, 3, h, w) with values in [0, 1]: n images, 3 colour channels, h rows
and w columns.  One image is (3, h, w).  Rain is (n, 1, h, w).
"""

import argparse
import copy
import csv
import io
import math
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn


class BadInput(ValueError):
    """What the user gave cannot work; the message says in one line what is wrong."""


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the random number generator that belongs to a seed and a purpose.

    For example, stream(0, "training", 17) draws what step 17 of any training with seed 0 needs.
    """
    # crc32 turns a text into a number, the same in every run.
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in purpose)])


# =================================================================================================
# PART I: THE LESSON
# =================================================================================================

# ---- 1  Rain: how is a rainy image made? --------------------------------------------------------
#
# A rainy image O is a background B plus a rain layer R, limited to the range of an image:
#
#     O = clip(B + R, 0, 1)
#
# The layer R is made from random noise in three steps, shown here on a few pixels:
#
#     uniform noise        drops: noise above       one streak,          rain layer: a streak
#                          a threshold, .95         the kernel           at every drop
#
#     .31 .90 .12 .54      ....                      /                   .../
#     .26 .65 .99 .42      ..*.            and      /           give     ../.
#     .83 .17 .38 .71      ....                    /                     ./..
#
# How many streaks there are, and how they look, is drawn anew for every image, from intervals that
# we choose.  A network can learn the intervals instead of the image: to remove bright lines that
# are vertical and 12 to 16 pixels long, and only those.


class RainRange(NamedTuple):
    """The intervals (low, high) from which the rain of each image is drawn (paper, Fig. 2)."""

    quantity: tuple[float, float]  # drops per 10,000 pixels
    width: tuple[float, float]  # pixels across a streak, where it is at least half as bright
    length: tuple[float, float]  # the same, along it
    direction: tuple[float, float]  # degrees from vertical; if positive, it leans like "/"
    either_side: bool = False  # True: with a chance of one half, it leans to the other side


# "small" lies within "medium", "medium" within "large".  No training uses "unseen": its directions
# and lengths lie outside "large".
#                    quantity   width       length    direction
RAIN = dict(
    small=RainRange((60, 80), (1.5, 2.0), (12, 16), (-5, 5)),
    medium=RainRange((40, 120), (1.3, 2.5), (9, 20), (-20, 20)),
    large=RainRange((20, 160), (1.0, 3.0), (6, 24), (-45, 45)),
    unseen=RainRange((25, 50), (1.3, 2.5), (28, 36), (55, 75), either_side=True),
)


def streak_kernel(
    width: float | Tensor, length: float | Tensor, direction: float | Tensor
) -> Tensor:
    """Return the picture of one streak: a line, blurred by a Gaussian, with 1 at its centre.

    width, length, direction: as in RainRange.  Numbers give one kernel (k, k), tensors (n,) give n
    of them (n, k, k).  The Gaussian falls to one half at width / 2: sigma is width / 2.3548.  k is
    2 radius + 1, with a radius of length / 2 + 3 sigma, rounded up (the largest of n).
    """
    # (1, 1) or (n, 1, 1), to combine with pixels (k, k)
    sigma = torch.as_tensor(width)[..., None, None] / 2.3548
    half = torch.as_tensor(length)[..., None, None] / 2
    angle = torch.deg2rad(torch.as_tensor(direction).float())[..., None, None]

    radius = math.ceil((half + 3 * sigma).max())
    x = torch.arange(-radius, radius + 1)
    y = x[:, None]  # grows downwards, as the rows of an image do

    # the position of each pixel, along the streak and across it
    along = x * torch.sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * torch.sin(angle)

    # Across, a blurred line is a Gaussian.  Along, it is a box with soft ends: a sum of two erf,
    # the integral of a Gaussian, from -1 to 1.  Inside, both are 1; beyond an end, one is -1.
    blur = math.sqrt(2) * sigma
    gaussian = torch.exp(-((across / blur) ** 2))
    box = torch.erf((half - along) / blur) + torch.erf((half + along) / blur)
    return gaussian * box / (2 * torch.erf(half / blur))  # 1 at the centre


def drops(noise: Tensor, quantity: Tensor) -> Tensor:
    """Return the drops in uniform noise: pixels with a streak's brightness, 0 elsewhere.

    noise: (n, h, w) in [0, 1).  quantity: (n,), the expected drops per 10,000 pixels.
    A pixel is a drop if its noise is above the threshold 1 - quantity / 10,000.  Its brightness
    rises with the noise, from 0.3 at the threshold to 0.8 at 1.
    """
    share = (quantity / 10_000)[:, None, None]
    above = (noise - (1 - share)) / share  # between 0 and 1 for drops, 0 or less elsewhere
    return torch.where(above > 0, 0.3 + 0.5 * above, 0)


def rain_layers(
    n: int, size: int | tuple[int, int], rain_range: RainRange, rng: np.random.Generator
) -> Tensor:
    """Return n rain layers (n, 1, h, w) in [0, 1]; size is (h, w), or one number for both.

    Each has its own quantity, width, length and direction.  Streaks add up, to at most 1; some
    enter from outside the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    quantity, streak_width, streak_length, direction = (
        torch.from_numpy(rng.uniform(low, high, n)).float() for low, high in rain_range[:4]
    )  # each (n,)
    if rain_range.either_side:
        direction = direction * torch.from_numpy(rng.choice([-1, 1], n))

    kernel = streak_kernel(streak_width, streak_length, direction=direction)  # (n, k, k)
    margin = kernel.shape[1] - 1  # in it, the transform below mixes opposite edges
    # multiples of 16 are fast
    canvas = [math.ceil((side + margin) / 16) * 16 for side in (height, width)]
    noise = torch.from_numpy(rng.random((n, *canvas), np.float32))

    # A copy of the kernel at every drop, times its brightness: a convolution, which the Fourier
    # transform turns into a product.  (If you have not met it, take these two lines as given.)
    spectrum = torch.fft.rfft2(drops(noise, quantity)) * torch.fft.rfft2(kernel, s=canvas)
    rain = torch.fft.irfft2(spectrum, s=canvas)[:, None]  # (n, 1, *canvas)
    return rain[:, :, margin : margin + height, margin : margin + width].clamp(0, 1)


def add_rain(background: Tensor, rain: Tensor) -> Tensor:
    """Return O = clip(B + R, 0, 1), for B (n, 3, h, w) and R (n, 1, h, w)."""
    return (background + rain).clamp(0, 1)


def rain_degradation(rain_range: RainRange) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """Return a function degrade(clean, rng) that adds rain of this range to images (n, 3, h, w).

    Training knows nothing else of rain: noise could take its place.
    """

    def degrade(clean, rng):
        return add_rain(clean, rain_layers(len(clean), clean.shape[2:], rain_range, rng))

    return degrade


# ---- 2  Backgrounds: what stands behind the rain, and what in it looks like rain? ---------------
#
# A network learns from small patches of clean images: photographs, or faces that we draw.
#
# A streak is bright and thin.  Some backgrounds show bright, thin structure as well: the rims
# of an eye, a twig in the sun.  A filter, the opening, removes whatever is bright and narrower
# than a small square.  What it takes from a *clean* patch is what looks like rain in it; the mean
# of this is the patch's bright detail.  Along one row of pixels, with a square of 5:
#
#     patch            2 2 9 9 2 2 7 7 7 7 7
#     opening          2 2 2 2 2 2 7 7 7 7 7      the edge stays, the thin line is gone
#     patch - opening  0 0 7 7 0 0 0 0 0 0 0
#
# A plain patch, such as a cheek, has hardly any.  It may have edges.

PATCH = 40  # side of a training patch, in pixels
MANY = 1024  # backgrounds of a network that is trained on many


def draw_face(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a face, (3, size, size) in [0, 1]: ovals of varying colour, place and proportions."""
    uniform = rng.uniform
    line = np.linspace(-1, 1, size)
    x, y = np.meshgrid(line + uniform(-0.06, 0.06), line + uniform(-0.06, 0.06))
    skin = uniform(0.45, 1.05) * np.array([0.93, 0.71, 0.58])
    hair = uniform(0.15, 2.0) * np.array([0.36, 0.22, 0.13])
    wide = uniform(0.46, 0.56)

    # From back to front: colour, the oval's centre (x, y), radii and softness; half the image is 1.
    # Left and right are mirrored.  The numbers were chosen by eye; skip them on first reading.
    ovals = (
        (uniform(0.2, 0.9, 3), 0, 0, 9, 9, 0),  # backdrop, larger than the image
        (hair, 0, 0.02, wide + 0.14, uniform(0.75, 1), 0.06),
        (uniform(0.1, 0.9, 3), 0, 1.25, 0.95, 0.45, 0.03),  # clothes
        (0.82 * skin, 0, 0.70, 0.24, 0.45, 0.04),  # neck
        (skin, 0, 0.06, wide, 0.66, 0.04),  # face
        (skin * [1.02, 0.90, 0.90], 0.30, 0.24, 0.17, 0.13, 0.16),  # cheeks
        (np.ones(3), 0.22, -0.06, 0.115, 0.055, 0),  # eyes
        (uniform(0, 0.5, 3), 0.22, -0.06, 0.05, 0.05, 0),  # irises
        (0.7 * hair, 0.22, -0.20, 0.15, 0.028, 0.02),  # brows
        (0.86 * skin, 0, 0.22, 0.085, 0.06, 0.07),  # nose
        (skin * [0.95, 0.55, 0.55], 0, 0.42, 0.20, 0.065, 0),  # lips
        (hair, 0, -0.55, wide, 0.25, 0.06),  # hair on the forehead
    )

    light = uniform(0.8, 1.2) + uniform(-0.2, 0.2) * x  # from one side
    image = np.zeros((3, size, size), np.float32)
    for colour, centre_x, centre_y, radius_x, radius_y, softness in ovals:
        radii = np.hypot((abs(x) - centre_x) / radius_x, (y - centre_y) / radius_y)
        distance = (radii - 1) * min(radius_x, radius_y)  # from the outline, negative inside
        # 1 inside, 0 outside, soft between
        coverage = (0.5 - distance / (softness + 3 / size)).clip(0, 1)
        image += coverage * (colour[:, None, None] * light - image)
    return image.clip(0, 1)


def sample_patches(images: list[Tensor], n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Cut n patches (n, 3, size, size) out of images (3, h, w), at random places.

    All places are equally likely.  Images are taken in random order, each once before any is used
    twice.  Raises ValueError if one of these is smaller than a patch.
    """
    order = [rng.permutation(len(images)) for _ in range(math.ceil(n / len(images)))]
    patches = []
    for i in np.concatenate(order)[:n]:
        _, height, width = images[i].shape
        top = rng.integers(height - size + 1)
        left = rng.integers(width - size + 1)
        patches.append(images[i][:, top : top + size, left : left + size])
    return torch.stack(patches)


def opening(images: Tensor, size: int = 5) -> Tensor:
    """Return the morphological opening of images (n, 3, h, w), a filter; `size` must be odd.

    It replaces each pixel by the smallest value in a square around it, then by the largest of
    these.
    """
    # The smallest value is minus the largest of the negatives.
    smallest = -F.max_pool2d(-images, size, stride=1, padding=size // 2)
    return F.max_pool2d(smallest, size, stride=1, padding=size // 2)


def bright_detail(patches: Tensor) -> Tensor:
    """Return the mean (n,) of patch - opening (the white top-hat), for patches (n, 3, h, w)."""
    return (patches - opening(patches)).mean((1, 2, 3))


def sharpness(patches: Tensor) -> Tensor:
    """Return the sharpness (n,) of patches (n, 3, h, w): their mean gradient magnitude, per pixel.

    The channels are averaged first.  A gradient is the pair of differences to the pixel below and
    at the right; the last row and column are left out.  (After the paper, Fig. 5.)
    """
    grey = patches.mean(1)
    down = grey.diff(dim=1)[:, :, :-1]
    right = grey.diff(dim=2)[:, :-1]
    return torch.hypot(down, right).mean((1, 2))


def training_patches(images: list[Tensor], n: int, seed: int, choice: str = "any") -> Tensor:
    """Return n backgrounds (n, 3, PATCH, PATCH), cut out of images (3, h, w).

    choice:
      any         the first n that are cut
      low, high   of 3 n patches, the n least sharp, or the n sharpest
      plain       of MANY, those in the half with the least bright detail, in the order of cutting
      detailed    those in the other half
      exchanged   plain, but the first one is exchanged for the patch with the most bright detail
    Raises BadInput if a half has fewer than n, or if the patches that are cut take above 1 GB.
    """
    # MANY are cut even for n = 8, so that these are the first 8 of the 1,024.
    count = 3 * n if choice in ("low", "high") else max(n, MANY)
    if count > 52_000:  # of 3 * 40 * 40 numbers of 4 bytes
        raise BadInput(f"{n:,} backgrounds take more than 1 GB of memory; give fewer")
    patches = sample_patches(images, count, size=PATCH, rng=stream(seed, "patches"))
    if choice == "any":
        return patches[:n]
    if choice in ("low", "high"):
        return patches[sharpness(patches).argsort(descending=choice == "high")[:n]]

    if n > MANY // 2:
        raise BadInput(f"{choice} backgrounds are half of {MANY:,}: give {MANY // 2} or fewer")
    order = bright_detail(patches).argsort(stable=True)  # the least detail first
    half = order[MANY // 2 :] if choice == "detailed" else order[: MANY // 2]
    chosen = patches[half.sort().values[:n]]  # in the order of cutting, not of detail
    if choice == "exchanged":
        chosen[0] = patches[order[-1]]
    return chosen


# ---- 3  Measures: was the rain removed, and was the background kept? ----------------------------
#
# PSNR, the usual measure, counts rain that was left and damage to the background together.  With
# the clean image, the two can be separated.  Call what rain changed r, and the output's error d:
#
#     r = rainy - clean          d = output - clean
#
# If half of the rain is left and nothing else was changed, then d = 0.5 r.  So we draw each value
# (of a pixel, in a channel) as a point (r, d), and fit a straight line.  Its slope is the rain that
# is left.  What slope * r does not explain is damage.
#
#      d |              . /
#        |           . /    .       slope = rain_left / 100
#        |        . /   .           damage: the root mean square of d - slope * r
#        |    . /   .
#        | . /
#        |/_____________________ r
#
# In each image the line may lie higher or lower than (0, 0): the rainy image minus 0.1 has all its
# rain left.  The slope ignores this shift; damage counts it.
#
# Rain left and damage are read together: a grey image has little rain left, and only its damage
# shows that it is useless.  The paper splits the pixels instead: E_R is how much was changed where
# it rained (the wet pixels), E_B how much is wrong elsewhere.  Skip `psnr` and `ssim` at first.

RAIN_THRESHOLD = 4 / 255  # a pixel counts as wet if rain changed it by more than 4 grey levels


def rain_mask(rainy: Tensor, clean: Tensor) -> Tensor:
    """Return M (n, 1, h, w), the wet pixels: |rainy - clean| > RAIN_THRESHOLD in any channel.

    M is boolean.  1e-6 is against rounding: exactly 4 grey levels are dry.
    """
    return (rainy - clean).abs().amax(1, keepdim=True) > RAIN_THRESHOLD + 1e-6


def decoupled_evaluation(output: Tensor, rainy: Tensor, clean: Tensor) -> dict[str, float]:
    """Measure rain removal and background reconstruction apart, for images (n, 3, h, w).

    With r = rainy - clean, d = output - clean, and M the wet pixels of rain_mask, returns over all
    pixels and channels of the set:
      rain_left  100 * sum((r - mean r) * d) / sum((r - mean r)^2), in per cent, with each image's
                 mean of r.  100 for the rainy input, 0 for the clean image
      damage     root mean square of d - rain_left / 100 * r, in grey levels from 0 to 255.  0 for
                 both
      E_R        root mean square of output - rainy on M, in grey levels (paper, Fig. 4)
      E_B        root mean square of d outside M, in grey levels
      psnr, ssim as below; ssim is NaN for images that are too small
    Without rain (M is empty, or r the same everywhere in each image) rain_left is NaN, and damage
    the root mean square of d.  E_R is NaN where M is empty, E_B where M is everything.
    Raises ValueError if the shapes differ.
    """
    if not output.shape == rainy.shape == clean.shape:
        raise ValueError("output, rainy and clean differ in shape")
    r = (rainy - clean).double()
    d = (output - clean).double()
    wet = rain_mask(rainy, clean).expand_as(d)  # the same in all channels

    pattern = r - r.mean((1, 2, 3), keepdim=True)
    variance = pattern.square().mean().item()
    covariance = (pattern * d).mean().item()
    del pattern  # 0.3 GB for a photograph of 12 megapixels
    rains = wet.any() and variance > 1e-12  # less is an error of rounding
    slope = covariance / variance if rains else 0

    def rms(values):
        """Return the root mean square in grey levels; NaN of no values."""
        return 255 * values.square().mean().sqrt().item()

    return dict(
        rain_left=100 * slope if rains else math.nan,
        damage=rms(d - slope * r),
        E_R=rms((d - r)[wet]),  # d - r = output - rainy
        E_B=rms(d[~wet]),
        psnr=psnr(output, clean),
        ssim=ssim(output, clean) if min(clean.shape[2:]) >= 11 else math.nan,
    )


def psnr(output: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio, -10 log10(MSE) dB, of images (n, 3, h, w) in [0, 1].

    It is the mean of the n images' ratios, over RGB; infinite if an image equals its clean one.
    Raises ValueError if the shapes differ.
    """
    if output.shape != clean.shape:
        raise ValueError("output and clean differ in shape")
    mse = (output - clean).double().square().mean((1, 2, 3))  # (n,)
    return (-10 * torch.log10(mse)).mean().item()


def ssim(output: Tensor, clean: Tensor) -> float:
    """Return the structural similarity of images (n, 3, h, w) in [0, 1] (Wang et al. 2004).

    Means m, variances v and the covariance c of output x and clean image y are taken under a window
    of 11 x 11 pixels, with Gaussian weights of sigma 1.5 and sum 1.  With C1 = 0.01^2, C2 = 0.03^2,
        (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2))
    is averaged over all places where the window fits, channels and images.
    Raises ValueError if the shapes differ, or if an image is smaller than the window.
    """
    if output.shape != clean.shape or min(clean.shape[2:]) < 11:
        raise ValueError("SSIM needs two images of one shape, of 11 x 11 pixels or more")
    weights = torch.exp(-(torch.arange(-5, 6).double() ** 2) / 4.5)  # 4.5 = 2 * 1.5^2
    weights /= weights.sum()

    def blur(images):
        """Average under the window: it is a column times a row, so first down, then across."""
        return (images.unfold(2, 11, 1) @ weights).unfold(3, 11, 1) @ weights

    total = 0
    # bands of 16 places need 26 rows; they stay in the processor's cache
    for top in range(0, clean.shape[2] - 10, 16):
        x = output[:, :, top : top + 26].double()
        y = clean[:, :, top : top + 26].double()
        m_x = blur(x)
        m_y = blur(y)
        # v_x + v_y: the mean of the squares minus the square of the mean
        variances = blur(x**2 + y**2) - m_x**2 - m_y**2
        covariance = blur(x * y) - m_x * m_y
        brightness = (2 * m_x * m_y + 1e-4) / (m_x**2 + m_y**2 + 1e-4)
        structure = (2 * covariance + 9e-4) / (variances + 9e-4)
        total += (brightness * structure).sum().item()
    return total / output[:, :, 10:, 10:].numel()


# ---- 4  Network and training: what does a network learn from? -----------------------------------
#
# Our network takes degraded images (n, 3, h, w) of any size and returns restored ones:
#
#     output = input + layers(input)
#
# So the layers should give the rain, with a minus.  They can find it by how rain looks, or by how
# images look without it.
#
# It learns from pairs: a clean patch, which is one of n backgrounds, and the same in rain that is
# drawn anew at every step.  The number of steps is fixed: with 8 backgrounds a network sees each of
# them more often, but does not train longer.

BATCH = 8  # patches in a step
RATE = 2e-3  # the learning rate


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution of 3 x 3 pixels that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResNet(nn.Module):
    """A convolution, residual blocks, a convolution; added to the input (after He et al. 2016).

    A block is two convolutions with a ReLU between them, added to its own input, without a ReLU
    behind it.  Each of the 10 convolutions reaches one pixel further: to 21 x 21 pixels.
    """

    def __init__(self, channels: int = 16, blocks: int = 4):
        super().__init__()
        self.head = conv3x3(3, channels)
        self.body = nn.ModuleList()
        for _ in range(blocks):
            self.body.append(
                nn.Sequential(conv3x3(channels, channels), nn.ReLU(), conv3x3(channels, channels))
            )
        self.tail = conv3x3(channels, 3)

    def forward(self, degraded: Tensor) -> Tensor:
        features = self.head(degraded)  # (n, channels, h, w)
        for block in self.body:
            features = features + block(features)
        return degraded + self.tail(features)


def build_network(make: type[nn.Module], seed: int = 0, **arguments) -> nn.Module:
    """Return make(**arguments), such as ResNet(channels=8), with weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):  # torch's random state stays as it was
        torch.manual_seed(seed)
        network = make(**arguments)
    # CPUs convolve faster with the channels of a pixel side by side.
    return network.to(memory_format=torch.channels_last)


def cosine_decay(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: it falls from 1 to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def print_progress(label: str, done: int, steps: int, loss: float, begun: float):
    """Print a line after every 50th step and the last; begun: time.monotonic()."""
    if label and (done % 50 == 0 or done == steps):
        left = (time.monotonic() - begun) / done * (steps - done)
        # one string with its end of line, so that lines of several threads do not mix
        print(
            f"{label}: step {done:,} of {steps:,}, loss {loss:.4f}, {left:.0f} s left\n",
            end="",
            flush=True,
        )


def train(
    network: nn.Module,
    backgrounds: Tensor,
    degrade: Callable[[Tensor, np.random.Generator], Tensor],
    steps: int,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    rate: float = RATE,
    label: str = "",
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a network in place to undo a degradation; return the loss of every step.

    backgrounds: clean patches (n, 3, h, w) in [0, 1].
    Each step draws BATCH backgrounds with replacement, mirrors each (left to right) with a chance
    of one half, degrades them by degrade(clean, rng), and takes a step of Adam.
    loss: a function loss(degraded, clean) that calls the network itself; without one, the mean
    absolute error (L1) of the output.
    rate: of learning; at step i, counted from 0, it is multiplied by cosine_decay(i, steps).
    label: of the lines of progress; without one there are none.
    after_step: called after each step with the number of steps done.
    """
    torch.set_num_threads(1)  # of the whole process, as several trainings may run side by side
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), fused=True)  # fused: faster
    begun = time.monotonic()
    losses = []

    for step in range(steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = torch.where(mirrored, clean.flip(3), clean)
        degraded = degrade(clean, rng).to(device)
        clean = clean.to(device)

        error = loss(degraded, clean) if loss else F.l1_loss(network(degraded), clean)
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()

        losses.append(error.item())
        print_progress(label, step + 1, steps=steps, loss=error.item(), begun=begun)
        if after_step:
            after_step(step + 1)
    return losses


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Return the output for images (n, 3, h, w), on the CPU, limited to [0, 1]."""
    device = next(network.parameters()).device
    return network(images.to(device)).clamp(0, 1).cpu()


# ---- 5  Main job: what must a network know to remove rain that it never saw? --------------------
#
# Three copies of one network are trained, with the same streaks at every step.  They start from the
# same weights, so that they differ in nothing but their backgrounds:
#
#     few         8 plain patches
#     exchanged   the same, but one is exchanged for the patch with the most bright detail
#     many        1,024 patches as they come, some with eyes
#
# All are measured on other images, in rain of the training range and in unseen rain.  Beside them
# stand two openings, never trained.  They are hard to beat here: our rain is bright, thin and
# added, just what an opening removes.
#
# Why should one patch matter?  This is our reading.  Where no background shows anything bright and
# thin, a network can learn that images have nothing bright and thin, and remove it in any rain.
# (The price is damage: eyes fade.)  With an eye among them, it must tell streaks from it by how the
# training rain looks, mostly by its direction, and unseen rain has another.

TEST_PATCHES, TEST_PATCH = 16, 128  # test images: how many, and their side in pixels
# of each copy: how many backgrounds, and which
COPIES = dict(few=(8, "plain"), exchanged=(8, "exchanged"), many=(MANY, "any"))


def untrained(rainy: Tensor) -> dict[str, Tensor]:
    """Return what networks are compared with: rainy images, and two openings of them."""
    return {"rainy": rainy, "opening 5": opening(rainy), "opening 7": opening(rainy, 7)}


def test_images(held_out: list[Tensor], rain: str, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return {rain: {"clean", "rainy", "opening 5", ...: images}}, for a rain and unseen rain."""
    clean = sample_patches(
        held_out, TEST_PATCHES, size=TEST_PATCH, rng=stream(seed, "test patches")
    )
    tests = {}
    for kind in (rain, "unseen"):
        rainy = rain_degradation(RAIN[kind])(clean, stream(seed, "test", kind))
        tests[kind] = {"clean": clean, **untrained(rainy)}
    return tests


def measure(
    tests: dict[str, dict[str, Tensor]],
    output: str,
    n: int,
    step: int,
    network: nn.Module | None = None,
) -> list[dict]:
    """Return a row for each rain: a step, the name of an output, its n, its measures.

    n: the number of backgrounds.  With a network, its output is first put among the images.
    """
    rows = []
    for rain, images in tests.items():
        if network:
            images[output] = predict(network, images["rainy"])
        measures = decoupled_evaluation(images[output], images["rainy"], clean=images["clean"])
        rows.append(dict(step=step, rain=rain, output=output, n=n, **measures))
    return rows


def compare(
    training: list[Tensor],
    held_out: list[Tensor],
    make: type[nn.Module] = ResNet,
    rain: str = "small",
    steps: int = 1200,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
    """Train the three COPIES of a network side by side, and measure them while they train.

    training, held_out: images (3, h, w) to learn from, and others to test on.
    Returns the rows of `measure`, in the rain of training and in unseen rain, and pictures:
    pictures[rain][output] are the test images at the end, pictures["backgrounds"][copy] the patches
    of a copy.
    """
    tests = test_images(held_out, rain, seed=seed)
    backgrounds = {}
    networks = {name: build_network(make, seed).to(device) for name in COPIES}
    points = sorted(
        range(steps, 0, -max(1, steps // 12))
    )  # about 12 even steps, back from the last

    def train_copy(name):
        n, choice = COPIES[name]
        backgrounds[name] = training_patches(training, n, seed=seed, choice=choice)
        measured = []

        def after_step(step):
            if step in points:
                measured.extend(measure(tests, name, n=n, step=step, network=networks[name]))

        train(
            networks[name],
            backgrounds[name],
            degrade=rain_degradation(RAIN[rain]),
            steps=steps,
            seed=seed,
            label=f"{name}, {n:,} backgrounds",
            after_step=after_step,
        )
        return measured

    rows = []
    for name in ("rainy", "opening 5", "opening 7"):  # never trained: the same at all steps
        measured = measure(tests, name, n=0, step=0)
        rows += [dict(row, step=step) for step in points for row in measured]
    for measured in ThreadPoolExecutor().map(train_copy, COPIES):  # side by side
        rows += measured
    return rows, {**tests, "backgrounds": backgrounds}


def show(axes, image: Tensor, title: str = "", colour: str = "black"):
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set(color=colour, linewidth=1 if colour == "black" else 5)


def figure_headline(rows: list[dict], pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """Draw the 8 backgrounds, how much unseen rain is left during training, and a test image."""
    colours = dict(few="#0072b2", exchanged="#d55e00", many="0.3")
    names = dict(few="8 plain", exchanged="1 of 8 exchanged", many="1,024 of all kinds")
    figure = Figure((12, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    axes = top.subplot_mosaic("01xCCC;23.CCC;45.CCC;67.CCC")

    few = pictures["backgrounds"]["few"]
    show(axes["0"], few[0], title="this one", colour=colours["few"])
    for i in range(1, 8):
        show(axes[str(i)], few[i])
    show(
        axes["x"],
        pictures["backgrounds"]["exchanged"][0],
        title="exchanged for",
        colour=colours["exchanged"],
    )

    left = {}
    styles = {"opening 5": "--", "opening 7": ":"}
    for output in ("many", "exchanged", "few", "opening 5", "opening 7"):
        curve = [row for row in rows if row["rain"] == "unseen" and row["output"] == output]
        left[output] = f"{curve[-1]['rain_left']:.0f} %"
        axes["C"].plot(
            [row["step"] for row in curve],
            [row["rain_left"] for row in curve],
            styles.get(output, "o-"),
            color=colours.get(output, "0.5"),
            label=f"{names.get(output, output)}: {left[output]}, {curve[-1]['psnr']:.1f} dB",
        )
    axes["C"].set(xlabel="training step", ylabel="unseen rain that is left (%)", ylim=(0, 105))
    axes["C"].legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),  # outside
        title="at the end: rain left, PSNR",
        labelcolor="linecolor",
        fontsize=12,
    )

    titles = dict(rainy="a test image in unseen rain", **names, clean="clean image")
    for place, output in zip(bottom.subplots(1, 5), titles):
        image = pictures["unseen"][output][0]
        show(place, image, title=titles[output], colour=colours.get(output, "black"))
    figure.suptitle(
        f"Trained on 8 plain backgrounds, a network leaves {left['few']} of rain that it never "
        f"saw.\nWith one of the 8 exchanged, it leaves {left['exchanged']}; trained on 1,024, "
        f"{left['many']}.",
        size=17,
    )
    return figure


# =================================================================================================
# PART II: THE REST OF THE SYSTEM
# =================================================================================================

# ---- 6  More networks: does the architecture matter? --------------------------------------------
#
# Two others: convolutions at several resolutions, and attention.  Both add their input, too.


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Enlarge images (n, c, h, w) at the bottom and right until both sides are multiples.

    New pixels mirror the image at its last row and column, without repeating these.  If one side is
    too small for this, both repeat their last pixels instead.
    """
    height, width = images.shape[2:]
    bottom = -height % multiple  # what is missing to the next multiple
    right = -width % multiple
    fits = bottom < height and right < width
    return F.pad(images, (0, right, 0, bottom), mode="reflect" if fits else "replicate")


def crop(images: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Cut images (n, c, h, w) to the height and width of a shape."""
    return images[:, :, : shape[2], : shape[3]]


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(inputs, outputs), nn.ReLU(), conv3x3(outputs, outputs), nn.ReLU())


class UNet(nn.Module):
    """Convolutions at three resolutions; added to the input (Ronneberger et al. 2015).

    The input is padded to multiples of 4, and the output cropped.  On the way down, the sides halve
    (by max-pooling) and the channels double.  On the way up, each resolution gets back its features
    from the way down, as its first channels, before the enlarged coarse ones.
    An output pixel depends on 44 x 44 pixels, at most 23 to one side: pairs of convolutions add 4,
    8, 16, 8 and 4 pixels to a coarse one of 4 x 4.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        c, c2, c4 = channels, 2 * channels, 4 * channels
        self.down1 = two_convolutions(3, c)
        self.down2 = two_convolutions(c, c2)
        self.bottom = two_convolutions(c2, c4)
        # A transposed convolution: each pixel becomes 2 x 2 pixels.
        self.enlarge2 = nn.ConvTranspose2d(c4, c2, kernel_size=2, stride=2)
        self.up2 = two_convolutions(c4, c2)
        self.enlarge1 = nn.ConvTranspose2d(c2, c, kernel_size=2, stride=2)
        self.up1 = two_convolutions(c2, c)
        self.tail = nn.Conv2d(c, 3, kernel_size=1)

    def forward(self, degraded: Tensor) -> Tensor:
        image = pad_to_multiple(degraded, 4)
        fine = self.down1(image)  # (n, c, h, w)
        middle = self.down2(F.max_pool2d(fine, 2))  # (n, c2, h / 2, w / 2)
        coarse = self.bottom(F.max_pool2d(middle, 2))  # (n, c4, h / 4, w / 4)

        middle = self.up2(torch.cat([middle, self.enlarge2(coarse)], dim=1))
        fine = self.up1(torch.cat([fine, self.enlarge1(middle)], dim=1))
        return crop(image + self.tail(fine), degraded.shape)


# SwinIR is built on attention.  Each pixel gives other pixels a score: how well the two match.  A
# softmax turns the scores into weights that sum to 1, and the pixel's new features are the weighted
# sum of theirs.  To save time, each looks only at its own window, here of 8 x 8 pixels.
#
# So that something crosses the borders of windows, every second block shifts them by half their
# side: the image is rolled up and to the left, and what leaves at one edge comes in at the opposite
# one.  For example, 8 rows in windows of 4:
#
#     plain:    [0 1 2 3] [4 5 6 7]
#     rolled:   [2 3 4 5] [6 7|0 1]      6, 7 and 0, 1 now share a window
#
# Rows 6, 7 and rows 0, 1 lie at opposite edges of the image, and should not see each other.  So a
# mask adds -100 to their scores, and their weights become practically 0.


def to_windows(image: Tensor, window: int) -> Tensor:
    """Cut n images (n, h, w, c) into m windows each: (n * m, window * window, c).

    Windows, and pixels within them, come row by row.  h and w must be multiples of `window`.
    """
    n, h, w, c = image.shape
    # image, row of windows, row in the window, column of windows, column in the window, channel
    cut = image.view(n, h // window, window, w // window, window, c)
    return cut.transpose(2, 3).reshape(-1, window * window, c)


def from_windows(windows: Tensor, window: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Undo to_windows; shape is that of the images, (n, h, w, c)."""
    n, h, w, c = shape
    cut = windows.view(n, h // window, w // window, window, window, c)
    return cut.transpose(2, 3).reshape(shape)


def shift_mask(h: int, w: int, window: int) -> Tensor:
    """Return the mask of a rolled image (h, w), which is added to scores: 0 or -100.

    The image was rolled up and to the left by window // 2.  For each of its windows, the mask
    (windows, window * window, window * window) is -100 for two pixels if the row or the column of
    just one of them came in from the opposite edge.
    """
    shift = window // 2
    region = torch.zeros(1, h, w, 1)
    region[:, -shift:] += 2  # rows that came in
    region[:, :, -shift:] += 1  # columns
    region = to_windows(region, window)[:, :, 0]  # (windows, window * window), from 0 to 3
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias (Liu et al. 2021).

    Each pixel makes a query (what it looks for), a key (what it offers) and a value (what it passes
    on).  The score of two pixels is the dot product of one's query and the other's key, divided by
    the square root of their number of entries, plus a bias and the mask.  The channels are divided
    among heads.  `qkv` makes all queries, then all keys, then all values; in each, head 0 comes
    first.

    The bias depends on the offset of two pixels, in a window of 8 from -7 to 7 down and right.  So
    each head has 15 x 15 learned numbers, a column of position_bias:

        row of the table = (down + 7) * 15 + (right + 7)
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        side = 2 * window - 1  # 15 in a window of 8
        self.position_bias = nn.Parameter(torch.zeros(side * side, heads))

        # (n, n), for pixels i and j; n = window * window.  It follows from the window, so it is
        # neither learned nor saved.
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (n, 2)
        # from pixel j to pixel i, plus 7 so that it is not negative: (n, n, 2)
        offset = place[:, None] - place + window - 1
        table_row = offset[:, :, 0] * side + offset[:, :, 1]
        self.register_buffer("table_row", table_row, persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows (b, n, c), where n = window * window.

        mask: (windows of an image, n, n), added to the scores of every image's windows; or None.
        """
        b, n, c = windows.shape
        qkv = self.qkv(windows).view(b, n, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, n, c / heads)

        scores = query @ key.mT / math.sqrt(c // self.heads)  # (b, heads, n, n)
        scores += self.position_bias[self.table_row].permute(2, 0, 1)  # (heads, n, n)
        if mask is not None:
            # for every image; None is an axis for the heads
            scores += mask.repeat(b // len(mask), 1, 1)[:, None]
        collected = scores.softmax(3) @ value  # (b, heads, n, c / heads)
        # the channels of all heads side by side again
        return self.project(collected.transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    """Attention within windows, then two linear layers for each pixel (Liu et al. 2021).

    Each normalizes its input first (over the channels of each pixel), and adds its output to its
    input.  With a shift (half a window), the image is rolled before it is cut, and rolled back.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window=window)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, image: Tensor) -> Tensor:
        _, h, w, _ = image.shape
        mask = shift_mask(h, w, window=self.window).to(image.device) if self.shift else None
        rolled = self.norm(image).roll((-self.shift, -self.shift), dims=(1, 2))
        attended = self.attention(to_windows(rolled, self.window), mask)
        attended = from_windows(attended, self.window, shape=image.shape)
        image = image + attended.roll((self.shift, self.shift), dims=(1, 2))
        return image + self.perceptron(image)


class SwinIR(nn.Module):
    """SwinIR (Liang et al. 2021): groups of Swin blocks between convolutions.

    A group is blocks, every second one shifted, and a convolution, added to their input.  SwinIR
    computes what the published network computes for denoising.  The arguments have the published
    names: channels, blocks and heads of each group, side of a window, hidden units per channel.
    """

    def __init__(
        self,
        embed_dim: int = 16,
        depths: tuple[int, ...] = (2,),
        num_heads: tuple[int, ...] = (2,),
        window_size: int = 8,
        mlp_ratio: float = 2.0,
    ):
        super().__init__()
        self.window = window_size
        self.first = conv3x3(3, embed_dim)
        self.norm_first = nn.LayerNorm(embed_dim)
        self.groups = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(
                    SwinBlock(
                        embed_dim,
                        heads,
                        window=window_size,
                        shift=i % 2 * (window_size // 2),
                        hidden=int(embed_dim * mlp_ratio),
                    )
                )
            self.groups.append(
                nn.ModuleDict(dict(blocks=blocks, conv=conv3x3(embed_dim, embed_dim)))
            )
        self.norm_last = nn.LayerNorm(embed_dim)
        self.after_groups = conv3x3(embed_dim, embed_dim)
        self.last = conv3x3(embed_dim, 3)

    def forward(self, degraded: Tensor) -> Tensor:
        # the mean colour of a set of photographs, DIV2K, as published
        mean = torch.tensor([[[0.4488]], [[0.4371]], [[0.4040]]], device=degraded.device)
        image = pad_to_multiple(degraded, self.window)

        shallow = self.first(image - mean)  # (n, c, h, w)
        deep = self.norm_first(shallow.permute(0, 2, 3, 1))  # (n, h, w, c)
        for group in self.groups:
            features = group["blocks"](deep).permute(0, 3, 1, 2)  # (n, c, h, w) for the convolution
            deep = deep + group["conv"](features).permute(0, 2, 3, 1)
        deep = self.after_groups(self.norm_last(deep).permute(0, 3, 1, 2))  # (n, c, h, w)
        return crop(image + self.last(deep + shallow), degraded.shape)


NETWORKS = dict(resnet=ResNet, unet=UNet, swinir=SwinIR)


# ---- 7  Content prior: can a network be held to clean images? -----------------------------------
#
# A content prior is a network that knows nothing but clean images.  Ours is a VQGAN (Esser et al.
# 2021; "VQ" stands for vector quantization, "GAN" for a loss that we leave out).  It learns to give
# its input back, through a bottleneck:
#
#     image --encoder--> latent --codebook--> codes --decoder--> image
#
# The encoder turns the image into a coarse grid of vectors, the latent.  Each vector is replaced by
# the nearest entry of a list, the codebook; an entry is called a code.  The decoder draws an image
# from the codes.  All three are trained together on clean images, so there are codes for what these
# show, and none for rain.  In our prior one vector stands for 8 x 8 pixels.  A thin streak covers
# few of these, so often the nearest code stays the same.


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a normalization over groups of channels: 4 in each, or more if there are above 128.

    It takes off the mean, then divides by the deviation.  Alone, channels with the pixels (1, 3)
    and (5, 7) both become (-1, 1): that the second is brighter is lost.  In one group, of mean 4,
    they become (-3, -1) and (1, 3) before the division.
    """
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalization and a SiLU; added to the input (n, c, h, w).

    A SiLU is a smooth ReLU.  If the number of channels changes, nin_shortcut adapts the input.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.nin_shortcut = (
            nn.Conv2d(inputs, outputs, kernel_size=1) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class PixelAttention(nn.Module):
    """Attention among all pixels, with a single head; added to its input (n, c, h, w).

    Queries, keys and values are made of the normalized input, scores divided by the root of c;
    proj_out comes last.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # each (n, h * w, c): pixels in a row, with their channels
        query, key, value = [layer(y).flatten(2).mT for layer in (self.q, self.k, self.v)]
        # softmax(query @ key.mT / sqrt(c)) @ value, as in WindowAttention
        collected = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(collected.mT.reshape(x.shape))


def middle_blocks(channels: int) -> nn.Sequential:
    """Return what encoder and decoder have at the lowest resolution: block, attention, block."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResidualBlock(channels, channels),
            attn_1=PixelAttention(channels),
            block_2=ResidualBlock(channels, channels),
        )
    )


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention or by nothing.

    A level of the encoder ends with `downsample`, one of the decoder with `upsample`.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResidualBlock(inputs, outputs))
            inputs = outputs
            self.attn.append(PixelAttention(outputs) if attention else nn.Identity())
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


def encoder(
    ch: int, widths: list[int], blocks: int, attention: list[bool], z_channels: int
) -> nn.Sequential:
    """Return the layers from an image to z_channels features.

    ch: channels of the first convolution.  widths, attention: for each level, its channels, and
    whether it has attention.
    """
    conv_in = conv3x3(3, ch)
    down = nn.Sequential()
    for inputs, width, attends in zip([ch, *widths], widths, attention):
        down.append(Level(inputs, width, blocks=blocks, attention=attends))
        # One row and column are added at the right and the bottom only, as published.
        down[-1].downsample = nn.Sequential(
            OrderedDict(
                pad=nn.ZeroPad2d((0, 1, 0, 1)),
                conv=nn.Conv2d(width, width, kernel_size=3, stride=2),
            )
        )
    # The last level keeps its size.  (Made and replaced, as the weights of figures/runs.csv were
    # drawn so.)
    down[-1].downsample = nn.Identity()
    return nn.Sequential(
        OrderedDict(
            conv_in=conv_in,
            down=down,
            mid=middle_blocks(widths[-1]),
            norm_out=group_norm(widths[-1]),
            silu=nn.SiLU(),
            conv_out=conv3x3(widths[-1], z_channels),
        )
    )


def decoder(
    widths: list[int], blocks: int, attention: list[bool], z_channels: int
) -> nn.Sequential:
    """Return the layers from a latent to an image: the encoder's in reverse, level 0 last.

    Each level has one block more.
    """
    conv_in = conv3x3(z_channels, widths[-1])
    mid = middle_blocks(widths[-1])
    levels = []
    # Level i takes what level i + 1 gave.
    for inputs, width, attends in zip([*widths[1:], widths[-1]], widths, attention):
        levels.append(Level(inputs, width, blocks=blocks + 1, attention=attends))
        levels[-1].upsample = nn.Sequential(
            OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=conv3x3(width, width))
        )
    levels[0].upsample = nn.Identity()  # made and replaced, as in the encoder
    up = OrderedDict((str(i), levels[i]) for i in reversed(range(len(levels))))
    return nn.Sequential(
        OrderedDict(
            conv_in=conv_in,
            mid=mid,
            up=nn.Sequential(up),
            norm_out=group_norm(widths[0]),
            silu=nn.SiLU(),
            conv_out=conv3x3(widths[0], 3),
        )
    )


class Codebook(nn.Module):
    """Vector quantization: replaces each vector by the nearest code (van den Oord et al. 2017).

    The choice of a code jumps, so no useful gradient passes to the encoder.  Instead, the
    straight-through estimator hands the gradient of the output to the latent:

        output = latent + (quantized - latent).detach()

    has the value of `quantized`, but what is detached counts as a constant.  This is about right if
    a latent is near its code.  So a loss pulls both together, by their mean squared distance: once
    with the codes detached, so that only latents move, and once, times 0.25, with the latents
    detached (as in the published VQGAN; van den Oord et al. weigh the other way round).
    """

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        # a table of learned vectors: takes row numbers, returns rows
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized latent, the indices of its codes, and the loss.

        latent and quantized latent: (n, embed_dim, h, w).  indices: (n, h, w).
        """
        vectors = latent.permute(0, 2, 3, 1)  # (n, h, w, embed_dim)
        # the smallest of the distances (n, h, w, n_embed)
        indices = torch.cdist(vectors, self.embedding.weight).argmin(3)
        quantized = self.embedding(indices).permute(0, 3, 1, 2)

        loss = F.mse_loss(latent, quantized.detach())
        loss = loss + 0.25 * F.mse_loss(quantized, latent.detach())
        return latent + (quantized - latent).detach(), indices, loss


class VQGAN(nn.Module):
    """The autoencoder of Esser et al. (2021), with the names and defaults of their checkpoints.

    Level i has ch * ch_mult[i] channels and half the resolution of level i - 1, and attention if
    that resolution is in attn_resolutions, for images of `resolution` pixels a side.  There are
    n_embed codes of embed_dim numbers.  quant_conv turns the encoder's z_channels into embed_dim
    channels, post_quant_conv back.

    Images are in [-1, 1] here.
    """

    def __init__(
        self,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: tuple[int, ...] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        n_embed: int = 1024,
        embed_dim: int = 256,
    ):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        attention = [resolution // 2**level in attn_resolutions for level in range(len(widths))]
        shared = dict(blocks=num_res_blocks, attention=attention, z_channels=z_channels)
        self.encoder = encoder(ch, widths, **shared)
        self.decoder = decoder(widths, **shared)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)

    def encode(self, image: Tensor) -> Tensor:
        """Return the latent (n, embed_dim, h', w') of images, before quantization."""
        return self.quant_conv(self.encoder(image))

    def decode(self, quantized: Tensor) -> Tensor:
        """Return the images of quantized latents."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of images, and the codebook's loss."""
        quantized, _, loss = self.quantize(self.encode(image))
        return self.decode(quantized), loss


# a smaller VQGAN, 8 x 8 pixels a vector, to pre-train in minutes
PRIOR = dict(
    ch=32,
    ch_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    z_channels=64,
    n_embed=1024,
    embed_dim=16,
)
PRIOR_RATE = 5e-4  # at a higher learning rate, the encoder forgets what it was taught


def pretrain(vqgan: VQGAN, images: list[Tensor], steps: int, seed: int = 0, label: str = ""):
    """Train a VQGAN in place, to give clean patches of images (3, h, w) in [0, 1] back.

    The loss is L1 and that of the codebook.  (The published VQGAN has two more, for details that
    look real.)  For the first 30 % of the steps the codebook is left out: pulled to codes that mean
    nothing yet, the images would turn grey.

    A code that is far from all latents is never chosen, and so never moves.  If it was not chosen
    for more than 30 steps, it is replaced by a vector of the latents at hand.
    """
    codes = vqgan.quantize.embedding.weight  # (n_embed, embed_dim)
    # steps since a code was chosen; the first codes may be replaced at once
    idle = torch.full([len(codes)], 31, device=codes.device)
    # betas as published
    optimizer = torch.optim.Adam(vqgan.parameters(), betas=(0.5, 0.9), fused=True)
    begun = time.monotonic()

    for step in range(steps):
        rng = stream(seed, "pretraining", step)
        # Two sizes take turns: a GroupNorm that saw one size might work at this size only.
        n, side = (8, 40) if step % 2 == 0 else (2, 80)
        clean = 2 * sample_patches(images, n, size=side, rng=rng).to(codes.device) - 1
        latent = vqgan.encode(clean)  # (n, embed_dim, h', w')

        if step < 0.3 * steps:
            loss = F.l1_loss(vqgan.decode(latent), clean)
        else:
            vectors = latent.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (n h' w', embed_dim)
            # Replace unused codes by random vectors, each picked at most once.
            unused = (idle > 30).nonzero()[: len(vectors), 0]
            # .data: not seen by autograd
            codes.data[unused] = vectors[rng.permutation(len(vectors))[: len(unused)]]
            idle[unused] = 0
            quantized, indices, codebook_loss = vqgan.quantize(latent)
            idle += 1
            idle[indices] = 0
            loss = F.l1_loss(vqgan.decode(quantized), clean) + codebook_loss

        # rises from 0, as Adam's first steps rest on few gradients
        rate = 1e-3 * min(1, step / 50)
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print_progress(label, step + 1, steps=steps, loss=loss.item(), begun=begun)


class VQGANPrior(nn.Module):
    """A restoration network that draws with the codes of clean images only.

    It starts from a copy of a pre-trained VQGAN.  Codebook and decoder are frozen, so whatever
    comes out was assembled from these codes.  The encoder learns to find, in a degraded image, the
    codes of the clean one:

        degraded --encoder (learns)--> latent --codebook--> codes --decoder--> restored
                                          ^
                                          |  should be near to
                                          v
           clean --teacher, codebook--> codes

    The teacher is a copy of the pre-trained encoder, so that its codes do not change.  Images are
    in [0, 1].
    """

    def __init__(self, vqgan: VQGAN):
        super().__init__()
        self.vqgan = copy.deepcopy(vqgan)
        self.teacher = copy.deepcopy(nn.Sequential(vqgan.encoder, vqgan.quant_conv))
        self.requires_grad_(False)
        self.vqgan.encoder.requires_grad_()
        self.vqgan.quant_conv.requires_grad_()

    def prepare(self, image: Tensor) -> Tensor:
        """Return an image (n, 3, h, w) as the encoder takes it: padded, and in [-1, 1]."""
        # each level except the last halves the sides
        return 2 * pad_to_multiple(image, 2 ** (len(self.vqgan.encoder.down) - 1)) - 1

    def draw(self, latent: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Return what the decoder draws from the codes nearest to a latent, cut to a shape.

        The image may go beyond [0, 1]; `predict` limits it.
        """
        drawn = self.vqgan.decode(self.vqgan.quantize(latent)[0])
        return (crop(drawn, shape) + 1) / 2

    def forward(self, degraded: Tensor) -> Tensor:
        return self.draw(self.vqgan.encode(self.prepare(degraded)), degraded.shape)

    def loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """Return the loss of fine-tuning, for `train`: of latents, and L1 of images.

        The first is the mean squared distance of the degraded image's latent, before quantization,
        from the quantized latent that the teacher makes of the clean image.
        """
        with torch.no_grad():
            target = self.vqgan.quantize(self.teacher(self.prepare(clean)))[0]
        latent = self.vqgan.encode(self.prepare(degraded))
        return F.mse_loss(latent, target) + F.l1_loss(self.draw(latent, clean.shape), clean)


# ---- 8  Files: how are images and networks read and written? ------------------------------------
#
# Nothing of the paper follows.


def complain(message: str):
    """Print a message as one line on standard error."""
    print(" ".join(message.split()), file=sys.stderr)


def write_file(path: Path, content: bytes):
    """Write a file whole or not at all, and print its path.  Raises BadInput if it cannot."""
    temporary = path.with_name(f".{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as problem:
        raise BadInput(f"{path} cannot be written: {problem.strerror}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}")


def prepare_folder(file: Path):
    """Make the folder of a file, and try to write into it now, not after the training."""
    if file.exists() and not file.is_file():
        raise BadInput(f"{file} is a folder or device; give the name of a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=file.parent).close()


def write_table(path: Path, rows: list[dict]):
    """Write rows as a .csv; what could not be measured is "nan"."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    # surrogateescape: file names may be no valid text
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def print_table(rows: list[dict]):
    print(*(f"{key:>10}" for key in rows[0]))
    for row in rows:
        print(
            *(
                f"{cell:>10.2f}" if isinstance(cell, float) else f"{cell:>10}"
                for cell in row.values()
            )
        )


def save_figure(figure: Figure, path: Path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    write_file(path, picture.getvalue())


def each(work: Callable, items: list) -> list:
    """Return work(item) of all items that do not raise BadInput; print the others' reasons."""
    results = []
    for item in items:
        try:
            results.append(work(item))
        except BadInput as problem:
            complain(f"skipped: {problem}")
    if not results:
        raise BadInput("none of the files can be used")
    return results


# Pillow decodes these itself; others, such as EPS, can hold programs that it would let run.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = Image.registered_extensions()  # {".png": "PNG", ...}


def open_image(path: Path) -> Tensor:
    """Decode an image file, upright, as RGB: (3, h, w) in [0, 1].  Raises BadInput if it fails."""
    try:
        if not path.is_file():  # a pipe is none
            raise ValueError("there is no such file")
        picture = Image.open(path, formats=FORMATS)
        if math.prod(picture.size) > 100e6:
            raise ValueError("it has more than 100 megapixels; make it smaller")
        # a TIFF's bits, and what 0 stands for (1: black)
        if picture.mode == "F" or (
            picture.format == "TIFF"
            and picture.mode.startswith("I")  # grey, above 8 bits; "I" itself: with a sign, or 32
            and (picture.mode == "I" or (picture.tag_v2[258], picture.tag_v2[262]) != ((16,), 1))
        ):
            raise ValueError("its numbers have no known range; save it with 8 or 16 bits")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            complain(f"{path}: its alpha channel is ignored")
        if picture.mode.startswith("I"):  # grey of 16 bits
            array = np.array(picture)[:, :, None] / 257  # (h, w, 1), from 0 to 255
        else:
            array = np.array(picture.convert("RGB"))
    except Exception as problem:  # decoders fail in as many ways as files are damaged
        raise BadInput(f"{path} cannot be read as an image: {problem}")
    return torch.from_numpy(array).float().permute(2, 0, 1).expand(3, -1, -1) / 255


def save_image(image: Tensor, path: Path, source: Path):
    """Write an image (3, h, w) in [0, 1], in the format that the path's suffix names.

    It gets the colour profile of the image file `source`, if that has one for RGB.
    """
    content = io.BytesIO()
    try:
        with Image.open(source, formats=FORMATS) as picture:
            profile = (
                picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA", "P") else None
            )
        kind = SUFFIXES.get(path.suffix.lower())
        if kind not in FORMATS:
            raise ValueError(f"its name should end as those of {' '.join(FORMATS)} do")
        array = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(content, kind, quality=95, icc_profile=profile)
    except Exception as problem:  # encoders have limits, too
        raise BadInput(f"{path} cannot be written: {problem}")
    write_file(path, content.getvalue())


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; BadInput if there are none."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if SUFFIXES.get(file.suffix.lower()) in FORMATS
        and "__MACOSX" not in file.parts  # what a Mac leaves in a .zip
        and not file.name.startswith("._")
    ]
    if not files:
        raise BadInput(
            f"{folder} is no folder with images ({' '.join(FORMATS)}); "
            "links to folders are not followed"
        )
    return files


def load_images(path: Path, smallest: int = 1) -> list[Tensor]:
    """Load an image file, or all in a folder and its subfolders: (3, h, w) each, in [0, 1].

    Broken files, and those with a side below `smallest`, are left out and named.  Of large images
    only the middle is kept.  Raises BadInput if none is left.
    """
    path = Path(path)
    files = [path] if path.is_file() else image_files(path)
    side = math.isqrt(40_000_000 // len(files))  # 40 million pixels take 0.5 GB
    if side < smallest:
        raise BadInput(f"{path} has {len(files):,} images, too many for the memory; give fewer")

    def open_middle(file):
        image = open_image(file)
        if min(image.shape[1:]) < smallest:
            raise BadInput(f"{file} is smaller than {smallest} x {smallest} pixels")
        top, left = [max(0, length - side) // 2 for length in image.shape[1:]]
        return image[:, top : top + side, left : left + side].clone()  # frees the rest

    return each(open_middle, files)


def training_and_held_out(path: Path | None, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return images to train on, and others to test on: a quarter of the photographs."""
    if not path:
        faces = [
            torch.from_numpy(draw_face(256, stream(seed, "backgrounds", i))) for i in range(80)
        ]
        return faces[:64], faces[64:]
    images = load_images(path, smallest=TEST_PATCH)
    if len(images) < 2:
        raise BadInput(f"{path} has one photograph; give two or more, to train and to test on")
    stream(seed, "split").shuffle(images)
    count = max(1, len(images) // 4)
    return images[count:], images[:count]


def restore(network: nn.Module, image: Tensor, rows: int = 128) -> Tensor:
    """Restore an image (3, h, w) of any size, some rows at a time, to bound the memory.

    rows: a multiple of 8.  Each strip has margins, so that its pixels see the same neighbours as in
    the whole image.  But the normalizations of VQGANPrior depend on the strip.
    """
    strips = []
    for top in range(0, image.shape[1], rows):
        above = min(top, 32)  # UNet reaches 23 pixels
        strip = predict(network, image[None, :, top - above : top + rows + 32])[0]
        strips.append(strip[:, above : above + rows])
    return torch.cat(strips, dim=1)


def save_checkpoint(path: Path, network: nn.Module, net: str):
    """Write a network's weights, and its kind ("resnet", "prior", "vqgan", ...)."""
    file = io.BytesIO()
    torch.save(dict(format=3, net=net, state_dict=network.state_dict()), file)
    write_file(Path(path), file.getvalue())


class Placeholder:
    """Takes the place of any class that a checkpoint names, and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def load(path: Path, kinds: list[str], expected: str) -> nn.Module:
    """Return the network in a checkpoint, one of some kinds, on the CPU; raises BadInput."""
    try:
        # torch.load does not look at the checksums
        if not os.path.isfile(path) or zipfile.ZipFile(path).testzip():
            raise ValueError
        # no function that it names is run
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content["state_dict"]
        net = content["net"] if content.get("format") == 3 else "vqgan"  # a published one
        if net not in kinds:
            raise ValueError
        if net in NETWORKS:
            network = build_network(NETWORKS[net])
        else:
            part = "vqgan." if net == "prior" else ""
            n_embed = len(weights[part + "quantize.embedding.weight"])
            if not 0 < n_embed <= 65_536:
                raise ValueError
            # A published VQGAN has five levels, ours four.
            arguments = {} if part + "encoder.down.4.block.0.conv1.weight" in weights else PRIOR
            network = build_network(VQGAN, **dict(arguments, n_embed=n_embed))
            if part:
                network = VQGANPrior(network)
        # not strict: a published file has parts of its loss, too
        if network.load_state_dict(weights, strict=False).missing_keys or not all(
            weight.isfinite().all() for weight in network.state_dict().values()
        ):
            raise ValueError
        return network
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        raise BadInput(f"{path} is no {expected} ({type(problem).__name__})")


def load_checkpoint(path: Path) -> nn.Module:
    """Return the restoration network in a file of `train`."""
    return load(path, [*NETWORKS, "prior"], expected="network of `derain.py train`")


def load_vqgan(path: Path) -> VQGAN:
    """Return the VQGAN in a file of `vqgan`, or in a published one (Esser et al. 2021, f = 16)."""
    return load(
        path, ["vqgan"], expected="file of `derain.py vqgan`, nor a published VQGAN with f = 16"
    )


# ---- 9  Commands: how is all this run? ----------------------------------------------------------
#
# Each is a function run_NAME of the parsed options.  Of several files, it returns how many failed.


def run_compare(args: argparse.Namespace):
    path = args.out / "headline.png"
    prepare_folder(path)
    training, held_out = training_and_held_out(args.backgrounds, args.seed)
    rows, pictures = compare(
        training,
        held_out,
        make=NETWORKS[args.net],
        rain=args.rain,
        steps=args.steps,
        seed=args.seed,
        device=args.device,
    )
    print_table([row for row in rows if row["step"] == args.steps])
    save_figure(figure_headline(rows, pictures), path)
    write_table(path.with_suffix(".csv"), rows)


def run_rain(args: argparse.Namespace):
    prepare_folder(args.output)
    clean = open_image(args.photo)[None]
    rainy = rain_degradation(RAIN[args.range])(clean, stream(args.seed, "rain command"))
    save_image(rainy[0], args.output, source=args.photo)


def run_train(args: argparse.Namespace):
    prepare_folder(args.output)
    if args.vqgan:
        net = "prior"
        network = VQGANPrior(load_vqgan(args.vqgan))
        loss, rate = network.loss, PRIOR_RATE
    else:
        net = args.net
        network = build_network(NETWORKS[net], args.seed)
        loss, rate = None, RATE
    training, held_out = training_and_held_out(args.backgrounds, args.seed)
    patches = training_patches(training, args.n, seed=args.seed, choice=args.choice)
    train(
        network.to(args.device),
        patches,
        degrade=rain_degradation(RAIN[args.rain]),
        steps=args.steps,
        seed=args.seed,
        loss=loss,
        rate=rate,
        label=net,
    )
    save_checkpoint(args.output, network, net)

    print(f"on {len(held_out)} images that were not trained on:")
    tests = test_images(held_out, args.rain, seed=args.seed)
    rows = measure(tests, "rainy", n=0, step=0) + measure(tests, "opening 7", n=0, step=0)
    print_table(rows + measure(tests, net, n=args.n, step=args.steps, network=network))


def run_vqgan(args: argparse.Namespace):
    prepare_folder(args.output)
    training, _ = training_and_held_out(args.backgrounds, args.seed)
    vqgan = build_network(VQGAN, seed=args.seed, **PRIOR).to(args.device)
    pretrain(vqgan, training, steps=args.steps, seed=args.seed, label="vqgan")
    save_checkpoint(args.output, vqgan, net="vqgan")


def run_restore(args: argparse.Namespace) -> int:
    network = load_checkpoint(args.model).to(args.device)
    files = []
    for photo in args.photos:
        if os.path.isdir(photo):  # raises nothing
            files += [file for file in image_files(photo) if not file.stem.endswith("-restored")]
        else:
            files.append(photo)

    sources = {}
    for file in dict.fromkeys(files):  # each once
        target = args.output / f"{file.stem}-restored.png"
        if target in sources:
            raise BadInput(f"{sources[target]} and {file} would both become {target}; rename one")
        sources[target] = file
    prepare_folder(args.output / "NAME-restored.png")

    def work(target):
        save_image(restore(network, open_image(sources[target])), target, source=sources[target])

    return len(sources) - len(each(work, sources))


def names_of(file: Path, folder: Path) -> list:
    """Return what a file is recognized by, the surest first."""
    path = file.relative_to(folder)
    numbers = tuple(map(int, re.findall(r"\d+", path.stem)))
    return [path, path.with_suffix(""), path.stem, numbers, numbers[:1]]


def find_pairs(rainy_folder: Path, clean_folder: Path) -> dict[Path, Path | None]:
    """Return {rainy file: clean file}, for the files in two folders and their subfolders.

    They belong together by their paths within the folders, or else their names, or else all numbers
    in these, or else if the only number of the clean name is the first of the rainy one.  Raises
    BadInput if there is a choice between two.
    """
    rainy_files = set(image_files(rainy_folder))
    clean_files = set(image_files(clean_folder))
    if rainy_files == clean_files:
        raise BadInput("--rainy and --clean hold the same files; give two folders")
    # If one folder lies within the other, the files of the inner one belong to it alone.
    inner = rainy_files & clean_files
    known = {}  # the clean files that a name leads to
    for file in sorted((clean_files - inner) or inner):
        for name in names_of(file, clean_folder)[:4]:  # all but the first number alone
            if name:  # not (), of a name without a number
                known.setdefault(name, []).append(file)

    pairs = {}
    for file in sorted((rainy_files - inner) or inner):
        partners = next(
            (known[name] for name in names_of(file, rainy_folder) if name in known), [None]
        )
        if len(partners) > 1:
            raise BadInput(
                f"{file} may belong to {partners[0]} or {partners[1]}; give pairs the same name"
            )
        pairs[file] = partners[0]
    return pairs


def run_evaluate(args: argparse.Namespace) -> int:
    networks = {str(model): load_checkpoint(model).to(args.device) for model in args.models}
    pairs = find_pairs(args.rainy.resolve(), args.clean.resolve())
    if args.output:
        prepare_folder(args.output)

    def evaluate(file):
        """Return a row for each output."""
        if pairs[file] is None:
            raise BadInput(f"{file} has no clean partner")
        print(f"evaluate {file} against {pairs[file]}")
        rainy = open_image(file)[None]
        clean = open_image(pairs[file])[None]
        if rainy.shape != clean.shape:
            raise BadInput(f"{file} and {pairs[file]} differ in size")
        if not rain_mask(rainy, clean).any():
            print(f"no rain in {file}")
        outputs = untrained(rainy)
        for name, network in networks.items():
            outputs[name] = restore(network, rainy[0])[None]
        return [
            dict(
                rainy=file,
                clean=pairs[file],
                output=name,
                **decoupled_evaluation(output, rainy, clean=clean),
            )
            for name, output in outputs.items()
        ]

    evaluated = each(evaluate, pairs)
    print_table([mean_of(rows) for rows in zip(*evaluated)])
    if args.output:
        write_table(args.output, sum(evaluated, []))
    return len(pairs) - len(evaluated)


def mean_of(rows: list[dict]) -> dict:
    """Return the mean measures of an output over pairs."""
    means = dict(output=rows[0]["output"], pairs=len(rows))
    for name in list(rows[0])[3:]:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        if len(values) < len(rows):
            print(f"{means['output']}: {name} is a mean over {len(values)} of {len(rows)} pairs")
        means[name] = np.mean(values)  # NaN if there are none
    return means


def whole_number(text: str, least: int = 0) -> int:
    """Return the value of an option: a whole number, not below `least`."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to below 2^31")
    return int(text)


def positive(text: str) -> int:
    return whole_number(text, least=1)


def add_command(
    commands: argparse._SubParsersAction,
    run: Callable,
    about: str,
    usage: str,
    example: str,
    output: str = "",
    steps: int | None = None,
    rain: str | None = None,
) -> Callable:
    """Add a command, with the options that it shares with others; return what adds its own."""
    name = run.__name__.removeprefix("run_")
    command = commands.add_parser(
        name,
        help=about,
        description=about,
        usage=f"derain.py {name} {usage}",
        epilog=f"example: python derain.py {name} {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    add = command.add_argument
    if output:
        add("-o", "--output", type=Path, required=True, help=output)
    if steps:
        add("--backgrounds", type=Path, help="photographs, 128 x 128 or more; without, drawn faces")
        add("--steps", type=positive, default=steps, help="number of training steps")
        add("--seed", type=whole_number, default=0, help="of all random numbers")
    if rain:
        add(
            "--rain",
            choices=("small", "medium", "large"),
            default=rain,
            help="range of training rain",
        )
        add("--net", choices=NETWORKS, default="resnet", help="architecture")
    if run != run_rain:
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
        add("--device", choices=devices, default=devices[0], help="where to compute")
    return add


def add_using(commands: argparse._SubParsersAction):
    add = add_command(
        commands,
        run_rain,
        about="add rain to a photograph",
        usage="PHOTO -o FILE [OPTIONS]",
        example="photo.jpg -o rainy.png",
        output="image file to write",
    )
    add("photo", type=Path, help="image file")
    add("--range", choices=RAIN, default="medium", help="range of the rain")
    add("--seed", type=whole_number, default=0, help="of all random numbers")

    add = add_command(
        commands,
        run_restore,
        about="remove the rain of photographs; writes NAME-restored.png",
        usage="MODEL PHOTO... -o FOLDER [OPTIONS]",
        example="model.pt rainy1.jpg rainy2.jpg -o restored/",
        output="folder to write into",
    )
    add("model", type=Path, help="checkpoint of train")
    add("photos", type=Path, nargs="+", help="image files, or folders of them")

    add = add_command(
        commands,
        run_evaluate,
        about="measure networks on pairs of rainy and clean images; PSNR and SSIM are on RGB",
        usage="MODEL... --rainy FOLDER --clean FOLDER [OPTIONS]",
        example="model.pt --rainy Rain100L/rainy --clean Rain100L/norain",
    )
    add("models", type=Path, nargs="+", help="checkpoints of train")
    add("--rainy", type=Path, required=True, help="folder of rainy images")
    add("--clean", type=Path, required=True, help="folder of their clean images")
    add("-o", "--output", type=Path, help=".csv to write, with a row for each pair")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="derain.py [COMMAND] [OPTIONS]",
        description="Why do networks fail on unseen rain?  Without a command, `compare` runs.",
        epilog="example: python derain.py compare --seed 1",
    )
    commands = parser.add_subparsers(
        prog="derain.py", title="commands, each with a --help", metavar="COMMAND", required=True
    )
    add = add_command(
        commands,
        run_compare,
        about="train on 8 plain backgrounds, with one exchanged, and on 1,024; draw headline.png",
        usage="[OPTIONS]",
        example="--seed 1",
        steps=1200,
        rain="small",
    )
    add("--out", type=Path, default="figures", help="folder of headline.png")

    add = add_command(
        commands,
        run_train,
        about="train a network, and measure it on images that it was not trained on",
        usage="-o MODEL [OPTIONS]",
        example="--backgrounds photos/ -o model.pt",
        output="checkpoint to write",
        steps=2400,
        rain="large",
    )
    add("--n", type=positive, default=MANY, help="number of backgrounds")
    add(
        "--choice",
        choices=("low", "high", "any", "plain"),
        default="low",
        help="low, high: of 3 n patches the n least sharp, the n sharpest; any: as they come; "
        "plain: those with little bright detail, n up to 512: less damage, more rain left",
    )
    add("--vqgan", type=Path, help="pre-trained content prior to fine-tune, instead of --net")

    add_command(
        commands,
        run_vqgan,
        about="pre-train a VQGAN, the content prior of train --vqgan",
        usage="-o VQGAN [OPTIONS]",
        example="--backgrounds photos/ -o vqgan.pt",
        output="checkpoint to write",
        steps=5000,
    )
    add_using(commands)
    return parser


def main(arguments: list[str]) -> int:
    """Run the command line; return 0, 1 (some files failed), 2 (bad input) or 130 (Ctrl-C)."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        # for odd file names; and os._exit, below, flushes no buffer
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # two wait for each other
    args = make_parser().parse_args(arguments or ["compare"])
    try:
        return 1 if args.run(args) else 0
    except (BadInput, OSError) as problem:
        complain(f"derain.py: {problem}")
        return 2
    except KeyboardInterrupt:
        complain("derain.py: stopped")
        return 130


if __name__ == "__main__":
    # without waiting for the threads of `compare` after Ctrl-C
    os._exit(main(sys.argv[1:]))
