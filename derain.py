"""Why do image-restoration networks fail on degradations that they have not seen?

Hu et al. (arXiv 2502.12600) answer: not because the networks are too small, but because they learn
the degradation instead of the image.  A network can tell rain from image in two ways.  It can know
how the rain looks, or how images without rain look.  Both ways work in the rain of training, and
only the second works in other rain.

Part I of this file is the lesson: rain, backgrounds, measures, a network, and one experiment.  The
network is trained on 8 plain background images, and it removes rain that it never saw.  Then one of
the 8 is exchanged for an image with bright, thin structure, such as an eye, and it fails.  It fails
on 1,024 images, too.  `python derain.py` runs this in about a minute.  Part II adds two more
networks, a content prior, and the files and commands.

Part I
  1 rain                  How is a rainy image made?
  2 backgrounds           What stands behind the rain, and what in it looks like rain?
  3 measures              Was the rain removed, and was the background kept?
  4 network and training  What does a network learn from?
  5 main job              What must a network know to remove rain that it never saw?
Part II
  6 more networks         Does the architecture matter?
  7 content prior         Can a network be held to clean images?
  8 files                 How are images and networks read and written?
  9 commands              How is all this run?

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

    For example, stream(0, "training", 17) draws what step 17 of a training with seed 0 needs.  What
    one purpose draws does not depend on what others drew before it.
    """
    # crc32 turns a text into a number, the same in every run.
    words = [zlib.crc32(str(word).encode()) for word in purpose]
    return np.random.default_rng([seed, *words])


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
#     .31 .90 .12 .54      .   .   .   .                  /                .  .  .  /
#     .26 .65 .99 .42      .   .   *   .       and       /        give     .  .  /  .
#     .83 .17 .38 .71      .   .   .   .                /                  .  /  .  .
#
# The threshold decides how many streaks there are, the kernel what they look like.  These factors
# are drawn anew for every image, from intervals that we choose.  A network can learn the intervals
# instead of the image: for example, to remove bright lines that are vertical and 12 to 16 pixels
# long, and only those.


class RainRange(NamedTuple):
    """The intervals (low, high) from which the rain of each image is drawn (paper, Fig. 2)."""

    quantity: tuple[float, float]  # drops per 10,000 pixels
    width: tuple[float, float]  # pixels across a streak, where it is at least half as bright
    length: tuple[float, float]  # the same, along the streak
    direction: tuple[float, float]  # degrees from vertical; with positive ones it leans like "/"
    either_side: bool = False  # True: an image's rain leans to the other side half of the time


# In every factor, "small" lies within "medium", and "medium" within "large".  No training uses
# "unseen": its directions and lengths lie outside "large".
#                    quantity   width       length    direction
RAIN = {
    "small": RainRange((60, 80), (1.5, 2.0), (12, 16), (-5, 5)),
    "medium": RainRange((40, 120), (1.3, 2.5), (9, 20), (-20, 20)),
    "large": RainRange((20, 160), (1.0, 3.0), (6, 24), (-45, 45)),
    "unseen": RainRange((25, 50), (1.3, 2.5), (28, 36), (55, 75), either_side=True),
}
STREAK_PEAK = (0.3, 0.8)  # the brightness of each streak is drawn from this interval


def streak_kernel(
    width: float | Tensor, length: float | Tensor, direction: float | Tensor
) -> Tensor:
    """Return the picture of one streak: a line, blurred by a Gaussian, with 1 at its centre.

    width, length: pixels between points of half brightness, above 0.  A Gaussian falls to one half
    of its height at 1.1774 sigma, so sigma is width / 2.3548.
    direction: degrees from vertical; with a positive one the streak leans like "/".
    Numbers give one kernel (k, k); tensors (n,) give n kernels (n, k, k).  The size k is
    2 radius + 1.  The radius of a streak is length / 2 + 3 sigma, rounded up; the largest counts.
    """
    # Two axes are added, for the rows and columns of the kernel: (1, 1), or (n, 1, 1).
    sigma = torch.as_tensor(width)[..., None, None] / 2.3548
    half = torch.as_tensor(length)[..., None, None] / 2
    angle = torch.deg2rad(torch.as_tensor(direction).float())[..., None, None]

    radius = math.ceil((half + 3 * sigma).max())
    x = torch.arange(-radius, radius + 1)
    y = x[:, None]  # grows downwards, as the rows of an image do

    # The position of each pixel, measured along the streak and across it: the axes are rotated.
    along = x * torch.sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * torch.sin(angle)

    # Across, a blurred line is a Gaussian.  Along, it is a box with soft ends.  erf is the integral
    # of a Gaussian: it rises from -1 to 1 around 0.  The first erf falls at the upper end of the
    # streak, the second rises at its lower end.  Between the ends both are near 1, so they add up;
    # beyond an end one of them is near -1, so they cancel.
    blur = math.sqrt(2) * sigma
    gaussian = torch.exp(-((across / blur) ** 2))
    box = torch.erf((half - along) / blur) + torch.erf((half + along) / blur)
    # At the centre along = 0, so both are erf(half / blur).  Divided by their sum, it is 1 there.
    return gaussian * box / (2 * torch.erf(half / blur))


def drops(noise: Tensor, quantity: Tensor) -> Tensor:
    """Turn uniform noise into drops: a streak's brightness at its centre, 0 elsewhere.

    noise: (n, h, w) in [0, 1).  quantity: (n,), the expected drops per 10,000 pixels.
    A pixel becomes a drop if its noise is above the threshold 1 - quantity / 10,000.  Among the
    drops, the noise is uniform from this threshold to 1.  So it also gives their brightness: it is
    stretched to STREAK_PEAK, the threshold to the lower end, 1 to the upper end.
    """
    share = (quantity / 10_000)[:, None, None]
    above = (noise - (1 - share)) / share  # between 0 and 1 for drops, 0 or less elsewhere
    low, high = STREAK_PEAK
    return torch.where(above > 0, low + (high - low) * above, 0)


def rain_layers(
    n: int, size: int | tuple[int, int], rain_range: RainRange, rng: np.random.Generator
) -> Tensor:
    """Return n rain layers (n, 1, h, w) in [0, 1]; size is (h, w), or one number for both.

    Streaks that overlap add up, to at most 1.  The noise covers a canvas that is larger than the
    image, so that streaks also enter from outside.
    """
    height, width = (size, size) if isinstance(size, int) else size

    def uniform(interval):
        return torch.from_numpy(rng.uniform(*interval, n)).float()  # (n,)

    quantity = uniform(rain_range.quantity)
    streak_width = uniform(rain_range.width)
    length = uniform(rain_range.length)
    direction = uniform(rain_range.direction)
    if rain_range.either_side:
        direction = direction * torch.from_numpy(rng.choice([-1, 1], n))

    kernel = streak_kernel(streak_width, length, direction=direction)  # (n, k, k)
    margin = kernel.shape[-1] - 1
    # Multiples of 16, as the transform below is fast on them.
    canvas = [math.ceil((side + margin) / 16) * 16 for side in (height, width)]
    noise = torch.from_numpy(rng.random((n, *canvas), np.float32))

    # Add a copy of the kernel at every drop, times the drop's brightness.  This is a convolution.
    # The product of two Fourier transforms is the transform of the convolution; for kernels as
    # large as these, that way is faster.  (If you have not met the Fourier transform, take these
    # two lines as given.)  s=canvas fills the kernel up with zeros.
    spectrum = torch.fft.rfft2(drops(noise, quantity)) * torch.fft.rfft2(kernel, s=canvas)
    rain = torch.fft.irfft2(spectrum, s=canvas)[:, None]  # (n, 1, *canvas)

    # The transform treats the canvas as if its opposite edges were joined.  The first `margin` rows
    # and columns hold parts of streaks that came in from the opposite edge, so they are cut off.
    # Sums may be above 1, and rounding leaves some slightly below 0: hence clamp.
    return rain[..., margin : margin + height, margin : margin + width].clamp(0, 1)


def add_rain(background: Tensor, rain: Tensor) -> Tensor:
    """Return O = clip(B + R, 0, 1), for B (n, 3, h, w) and R (n, 1, h, w)."""
    return (background + rain).clamp(0, 1)


def rain_degradation(rain_range: RainRange) -> Callable[[Tensor, np.random.Generator], Tensor]:
    """Return a function degrade(clean, rng) that adds rain of this range to images (n, 3, h, w).

    Training and tests know nothing else of the rain.  So a function that adds noise or blur can be
    given to them in place of this one.
    """

    def degrade(clean, rng):
        rain = rain_layers(len(clean), clean.shape[-2:], rain_range=rain_range, rng=rng)
        return add_rain(clean, rain)

    return degrade


# ---- 2  Backgrounds: what stands behind the rain, and what in it looks like rain? ---------------
#
# A network learns from small patches of clean images.  Where no photographs are given, faces are
# drawn.
#
# A streak is bright and thin.  Some backgrounds show bright, thin structure as well: the white of
# an eye, a twig in the sun.  A filter, the opening, removes whatever is bright and thinner than a
# square of some pixels.  What it takes away from a *clean* patch is what looks like rain in it.  We
# call its mean the bright detail of the patch.  Along one row of pixels, with a square of 5:
#
#     patch            2 2 2 2 9 9 2 2 2 7 7 7 7 7 7
#     opening          2 2 2 2 2 2 2 2 2 7 7 7 7 7 7      the edge stays, the thin line is gone
#     patch - opening  0 0 0 0 7 7 0 0 0 0 0 0 0 0 0
#
# A plain patch, such as a cheek or a backdrop, has hardly any bright detail.  It may have edges.

PATCH = 40  # side of a training patch, in pixels
MANY = 1024  # backgrounds of a network that is trained on many


def draw_face(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a face, (3, size, size) in [0, 1]: ovals on a plain backdrop.

    All faces have the same layout.  Their colours, proportions, place and light vary.
    """
    line = np.linspace(-1, 1, size)
    x, y = np.meshgrid(line + rng.uniform(-0.06, 0.06), line + rng.uniform(-0.06, 0.06))
    skin = rng.uniform(0.45, 1.05) * np.array([0.93, 0.71, 0.58])
    hair = rng.uniform(0.15, 2.0) * np.array([0.36, 0.22, 0.13])
    wide = rng.uniform(0.46, 0.56)

    # From back to front: colour, then the oval's centre (x, y), radii and softness.  The middle of
    # the face is (0, 0), and half the image is 1.  An oval whose x is not 0 is drawn twice, at the
    # right and mirrored at the left.  All numbers were chosen by eye; skip them on first reading.
    ovals = (
        (rng.uniform(0.2, 0.9, 3), 0, 0, 9, 9, 0),  # backdrop, larger than the image
        (hair, 0, 0.02, wide + 0.14, rng.uniform(0.75, 1), 0.06),
        (rng.uniform(0.1, 0.9, 3), 0, 1.25, 0.95, 0.45, 0.03),  # clothes
        (0.82 * skin, 0, 0.70, 0.24, 0.45, 0.04),  # neck
        (skin, 0, 0.06, wide, 0.66, 0.04),  # face
        (skin * [1.02, 0.90, 0.90], 0.30, 0.24, 0.17, 0.13, 0.16),  # cheeks
        (np.ones(3), 0.22, -0.06, 0.115, 0.055, 0),  # eyes
        (rng.uniform(0, 0.5, 3), 0.22, -0.06, 0.05, 0.05, 0),  # irises
        (0.7 * hair, 0.22, -0.20, 0.15, 0.028, 0.02),  # brows
        (0.86 * skin, 0, 0.22, 0.085, 0.06, 0.07),  # nose
        (skin * [0.95, 0.55, 0.55], 0, 0.42, 0.20, 0.065, 0),  # lips
        (hair, 0, -0.55, wide, 0.25, 0.06),  # hair on the forehead
    )

    light = rng.uniform(0.8, 1.2) + rng.uniform(-0.2, 0.2) * x  # from one side
    image = np.zeros((3, size, size), np.float32)
    for colour, centre_x, centre_y, radius_x, radius_y, softness in ovals:
        # The distance from the centre, in radii: 1 on the outline.
        radii = np.hypot((abs(x) - centre_x) / radius_x, (y - centre_y) / radius_y)
        # The distance from the outline, negative inside.  (For a long oval it is not exact.)
        distance = (radii - 1) * min(radius_x, radius_y)
        # How much the oval covers a pixel: from 1 inside to 0 outside, over 1.5 pixels at least (a
        # pixel is 2 / size).  Where it is 1, the colour replaces the image; where 0, it does not.
        coverage = (0.5 - distance / (softness + 3 / size)).clip(0, 1)
        image += coverage * (colour[:, None, None] * light - image)
    return image.clip(0, 1)


def sample_patches(images: list[Tensor], n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Cut n patches (n, 3, size, size) out of images (3, h, w), at random places.

    All places in an image are equally likely.  The images are taken in random order, and every one
    is used once before any is used twice.  Raises ValueError if an image is smaller than a patch.
    """
    rounds = math.ceil(n / len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(rounds)])

    patches = []
    for i in order[:n]:
        _, height, width = images[i].shape
        top = rng.integers(height - size + 1)
        left = rng.integers(width - size + 1)
        patches.append(images[i][:, top : top + size, left : left + size])
    return torch.stack(patches)


def opening(images: Tensor, size: int = 5) -> Tensor:
    """Return the morphological opening of images (n, 3, h, w), a filter; `size` must be odd.

    It replaces each pixel by the smallest value in a square around it, then by the largest of
    these.  Whatever is bright and thinner than `size` pixels disappears.
    """
    # The smallest value is minus the largest of the negatives.
    smallest = -F.max_pool2d(-images, size, stride=1, padding=size // 2)
    return F.max_pool2d(smallest, size, stride=1, padding=size // 2)


def bright_detail(patches: Tensor) -> Tensor:
    """Return the bright detail (n,) of patches (n, 3, h, w): the mean of patch - opening(patch, 5).

    patch - opening is known as the white top-hat.
    """
    return (patches - opening(patches, 5)).mean((1, 2, 3))


def sharpness(patches: Tensor) -> Tensor:
    """Return the sharpness (n,) of patches (n, 3, h, w): their mean gradient magnitude, per pixel.

    The three channels are averaged first.  The gradient of a pixel is then the pair of differences
    to the pixel below and to the pixel at the right.  Pixels that lack one of these two (the last
    row and column) are left out.  (After the paper, Fig. 5.)
    """
    grey = patches.mean(1)
    down = grey.diff(dim=1)[:, :, :-1]
    right = grey.diff(dim=2)[:, :-1]
    return torch.hypot(down, right).mean((1, 2))


def training_patches(images: list[Tensor], n: int, seed: int, choice: str = "any") -> Tensor:
    """Return n backgrounds (n, 3, PATCH, PATCH), cut out of images (3, h, w).

    choice:
      any         as they come; 8 are the first 8 of MANY
      low, high   of 3 n patches, the n least sharp, or the n sharpest
      plain       of the first MANY patches, those in the half with the least bright detail, in the
                  order in which they were cut
      detailed    those in the other half
      exchanged   plain, but the first one is exchanged for the patch with the most bright detail
    Raises BadInput if more than MANY / 2 are taken from a half, or if the patches that are cut
    would take more than 1 GB.
    """
    halves = choice in ("plain", "detailed", "exchanged")
    if halves and n > MANY // 2:
        raise BadInput(f"{choice} backgrounds are half of {MANY:,}: give {MANY // 2} or fewer")
    # Another count would give other patches, so it is the same for every n up to MANY.
    count = 3 * n if choice in ("low", "high") else max(n, MANY)
    if count > 52_000:  # of 3 * 40 * 40 numbers of 4 bytes
        raise BadInput(f"{n:,} backgrounds take more than 1 GB of memory; give fewer")
    patches = sample_patches(images, count, size=PATCH, rng=stream(seed, "patches"))

    if choice in ("low", "high"):
        return patches[sharpness(patches).argsort(descending=choice == "high")][:n]
    if not halves:
        return patches[:n]
    order = bright_detail(patches).argsort(stable=True)  # the least detail first
    half = order[MANY // 2 :] if choice == "detailed" else order[: MANY // 2]
    chosen = patches[half.sort().values[:n]]
    if choice == "exchanged":
        chosen[0] = patches[order[-1]]
    return chosen


# ---- 3  Measures: was the rain removed, and was the background kept? ----------------------------
#
# PSNR, the usual measure, asks only how near the output is to the clean image.  It cannot tell rain
# that was left from a background that was damaged.  The clean image lets us ask both questions.
# Call what rain changed r, and what is still wrong in the output d:
#
#     r = rainy - clean          d = output - clean
#
# If half of the rain is left and nothing else was changed, then d = 0.5 r.  So we draw each value
# (of a pixel, in a channel) as a point (r, d), and fit a straight line to all points.  Its slope is
# the rain that is left.  What slope * r does not explain is damage.
#
#      d |                 .  /
#        |             . .  /  .         slope = rain_left / 100
#        |         .   .  / .            damage: the root mean square of d - slope * r
#        |     .  .  /  .
#        |___.__/_._____________ r
#
# The line need not go through (0, 0): in each image it may lie higher or lower.  (For this, each
# image's mean is taken off r.)  Why?  Think of an output that is the rainy image, only darker.  All
# its rain is left.  But a line through (0, 0) would be less steep, as if rain had been removed.
# Damage is measured from slope * r, a line through (0, 0).  So a change of brightness is damage.
#
# The two are read together.  A grey image has little rain left, and only its damage shows that it
# is useless.  The paper's own measures split the pixels instead.  E_R asks how much was changed
# where it rained (the wet pixels), E_B how much is wrong elsewhere.

RAIN_THRESHOLD = 4 / 255  # a pixel counts as wet if rain changed it by more than 4 grey levels


def rain_mask(rainy: Tensor, clean: Tensor) -> Tensor:
    """Return M (n, 1, h, w), the wet pixels: |rainy - clean| > RAIN_THRESHOLD in any channel.

    M is boolean.  A tolerance of 1e-6 is added to the threshold, as 4 / 255 is rounded: a
    difference of exactly 4 grey levels stays dry.
    """
    difference = (rainy - clean).abs().amax(1, keepdim=True)
    return difference > RAIN_THRESHOLD + 1e-6


def decoupled_evaluation(output: Tensor, rainy: Tensor, clean: Tensor) -> dict[str, float]:
    """Measure rain removal and background reconstruction apart, for images (n, 3, h, w) in [0, 1].

    With r = rainy - clean, d = output - clean, and M the wet pixels of rain_mask, returns over all
    pixels and channels of the set:
      rain_left  100 * sum((r - mean r) * d) / sum((r - mean r)^2), in per cent, with each image's
                 mean of r.  100 for the rainy input, 0 for the clean image, below 0 where more was
                 taken than the rain had brought.
      damage     root mean square of d - rain_left / 100 * r, in grey levels from 0 to 255.  0 for
                 the rainy input and for the clean image.
      E_R        root mean square of output - rainy on M, in grey levels (paper, Fig. 4).  Damage
                 raises it, too.
      E_B        root mean square of d outside M, in grey levels.
      psnr, ssim as below; ssim is NaN for images smaller than its window of 11 x 11 pixels.
    Without rain (M is empty, or r is the same everywhere in each image) rain_left is NaN, and
    damage is the root mean square of d.  E_R is NaN where M is empty, E_B where M is everything.
    Raises ValueError if the shapes differ.
    """
    if not output.shape == rainy.shape == clean.shape:
        raise ValueError("output, rainy and clean differ in shape")
    r = (rainy - clean).double()
    d = (output - clean).double()
    wet = rain_mask(rainy, clean).expand_as(clean)

    pattern = r - r.mean((1, 2, 3), keepdim=True)
    variance = pattern.square().mean().item()
    rain_left = math.nan
    rest = d
    if wet.any() and variance > 1e-12:  # less is an error of rounding
        rain_left = (pattern * d).mean().item() / variance
        rest = d - rain_left * r

    def rms(values):
        return 255 * values.square().mean().sqrt().item()  # NaN if there are none

    return {
        "rain_left": 100 * rain_left,
        "damage": rms(rest),
        "E_R": rms((d - r)[wet]),  # d - r = output - rainy
        "E_B": rms(d[~wet]),
        "psnr": psnr(output, clean),
        "ssim": ssim(output, clean) if min(clean.shape[-2:]) >= 11 else math.nan,
    }


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

    It compares local brightness, contrast and pattern, and is 1 for equal images.
    x is the output, y the clean image.  Means m, variances v and the covariance c are those of the
    pixels under a window of 11 x 11 with Gaussian weights of sigma 1.5 and sum 1.  Similarity is
        (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)),
    in each channel, averaged over all places where the window fits, and over the images.  The parts
    with m compare brightness, those with c and v contrast and pattern.  C1 = 0.01^2 and
    C2 = 0.03^2 prevent a division by 0.
    Raises ValueError if the shapes differ, or if an image is smaller than the window.
    """
    if output.shape != clean.shape or min(clean.shape[-2:]) < 11:
        raise ValueError("SSIM needs two images of one shape, of 11 x 11 pixels or more")
    weights = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(image):
        """Average under the window; it is a column times a row, so first down, then across."""
        for axis in (0, 1):
            places = image.shape[axis] - 10  # where the window fits
            image = sum(weights[i] * image.narrow(axis, i, places) for i in range(11))
        return image

    similarities = []
    for x, y in zip(output.flatten(0, 1), clean.flatten(0, 1)):  # the channels of all images
        x = x.double()
        y = y.double()
        mean_x = blur(x)
        mean_y = blur(y)
        # v_x + v_y.  A variance is the mean of the squares minus the square of the mean.
        variances = blur(x * x + y * y) - mean_x**2 - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        brightness = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        pattern = (2 * covariance + 0.03**2) / (variances + 0.03**2)
        similarities.append((brightness * pattern).mean().item())
    return sum(similarities) / len(similarities)


# ---- 4  Network and training: what does a network learn from? -----------------------------------
#
# Our network takes degraded images (n, 3, h, w) of any size and returns restored ones.  It adds its
# input to what it computes, as most restoration networks do:
#
#     output = input + change(input)
#
# So the layers compute only a change.  In rain, this change should be the rain, with a minus.  The
# network can find the rain by how rain looks, or by how the image would look without rain.
#
# It learns from pairs: a clean patch, which is one of n backgrounds, and the same patch in rain
# that is drawn anew at every step.  The number of steps is fixed, whatever n is: a network with 8
# backgrounds sees each of them more often, but does not train longer.

BATCH = 8  # patches in a step


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution of 3 x 3 pixels that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResNet(nn.Module):
    """A convolution, residual blocks, a convolution; added to the input (after He et al. 2016).

    A block is two convolutions with a ReLU between them, added to its own input; there is no ReLU
    behind it.  Each of the 10 convolutions reaches one pixel further, so with 4 blocks an output
    pixel depends on 10 pixels to each side: 21 x 21.
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
    with torch.random.fork_rng(devices=[]):  # torch's own random state stays as it was
        torch.manual_seed(seed)
        network = make(**arguments)
    # With the channels of a pixel next to each other in memory, CPUs convolve faster.
    return network.to(memory_format=torch.channels_last)


def cosine_decay(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: it falls from 1 to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def print_progress(
    label: str, done: int, total: int, note: str, begun: float, printed: float
) -> float:
    """Print how far a job is, if its last line is 4 s old; return the time of the last line.

    begun, printed: times by time.monotonic().  Without a label nothing is printed.
    """
    now = time.monotonic()
    if not label or (now - printed < 4 and done < total):
        return printed
    left = (now - begun) / done * (total - done)
    # One string with its end of line, so that lines of several threads do not mix.
    print(f"{label}: {done} of {total} {note}, {left:.0f} s left\n", end="", flush=True)
    return now


def train(
    network: nn.Module,
    backgrounds: Tensor,
    degrade: Callable[[Tensor, np.random.Generator], Tensor],
    steps: int,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    rate: float = 2e-3,
    label: str = "",
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a network in place to undo a degradation; return the loss of every step.

    backgrounds: clean patches (n, 3, h, w) in [0, 1].
    Each step draws BATCH backgrounds with replacement, mirrors each (left to right) with a chance
    of one half, degrades them by one call degrade(clean, rng), and takes a step of Adam.
    loss: a function loss(degraded, clean); without one, the mean absolute error (L1) of the output.
    rate: the learning rate of the first step; step i, counted from 0, has rate times
    cosine_decay(i, steps).
    label: what progress is printed under; without one, nothing is printed.
    after_step: called after each step with the number of steps done, to measure while training.
    """
    # These networks are small: a second thread gains little, and costs much when cores are busy.
    torch.set_num_threads(1)
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), fused=True)  # all weights at once: faster
    begun = printed = time.monotonic()
    losses = []

    for step in range(steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[torch.from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = torch.from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        degraded = degrade(clean, rng).to(device)
        clean = clean.to(device)

        if loss:
            error = loss(degraded, clean)
        else:
            error = F.l1_loss(network(degraded), clean)
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()

        losses.append(error.item())
        note = f"steps, loss {losses[-1]:.4f}"
        printed = print_progress(
            label, step + 1, total=steps, note=note, begun=begun, printed=printed
        )
        if after_step:
            after_step(step + 1)
    return losses


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Return the network's output for images (n, 3, h, w), on the CPU, limited to [0, 1].

    The network sees 16 images at a time, to bound the memory.
    """
    device = next(network.parameters()).device
    outputs = [network(chunk.to(device)).clamp(0, 1).cpu() for chunk in images.split(16)]
    return torch.cat(outputs)


# ---- 5  Main job: what must a network know to remove rain that it never saw? --------------------
#
# Three copies of one network are trained in the same rain.  They start from the same weights, so
# that they differ in nothing but their backgrounds:
#
#     few         8 plain patches
#     exchanged   the same, but one is exchanged for the patch with the most bright detail: 1 of 8
#     many        all 1,024 patches
#
# While they train, all are measured on other images, in rain of the training range and in unseen
# rain.  Beside them stand two openings, filters that were never trained.  Rain here is bright, thin
# and added, just what an opening removes, so no network should be proud of beating the input.

IMAGE = 256  # side of a drawn background, in pixels
TEST_PATCHES, TEST_PATCH = 16, 128  # test images: how many, and their side in pixels
# What each copy is trained on: how many backgrounds, and which.
COPIES = {"few": (8, "plain"), "exchanged": (8, "exchanged"), "many": (MANY, "any")}


def test_images(held_out: list[Tensor], rain: str, seed: int) -> dict[str, Tensor]:
    """Return clean test images, the same in rain, and what two openings make of these."""
    rng = stream(seed, "test patches")
    clean = sample_patches(held_out, TEST_PATCHES, size=TEST_PATCH, rng=rng)
    rainy = rain_degradation(RAIN[rain])(clean, stream(seed, "test", rain))
    filtered = {"opening 5": opening(rainy), "opening 7": opening(rainy, 7)}
    return {"clean": clean, "rainy": rainy, **filtered}


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
    Returns rows and pictures.  A row holds a step, a rain ("unseen", or the one of training), an
    output, its number n of backgrounds (0 if it was not trained), and its measures.  The outputs
    are rainy, opening 5, opening 7, few, exchanged and many.
    pictures[rain][output] holds the test images at the end; output may also be "clean".
    pictures["backgrounds"][copy] holds the patches that a copy was trained on.
    """
    tests = {kind: test_images(held_out, kind, seed=seed) for kind in ("unseen", rain)}
    degrade = rain_degradation(RAIN[rain])
    # The steps at which to measure, counted back from the last one, which is one of them.
    points = range(steps, 0, -max(1, steps // 12))
    backgrounds = {}
    for copy_name, (n, choice) in COPIES.items():
        backgrounds[copy_name] = training_patches(training, n, seed=seed, choice=choice)

    def measure(output, kind):
        images = tests[kind]
        return decoupled_evaluation(images[output], images["rainy"], clean=images["clean"])

    rows = []
    for kind in tests:
        for output in ("rainy", "opening 5", "opening 7"):
            measures = measure(output, kind)  # these are never trained: the same at all steps
            for step in points:
                rows.append({"step": step, "rain": kind, "output": output, "n": 0, **measures})

    def train_copy(output):
        n, choice = COPIES[output]
        network = build_network(make, seed=seed).to(device)

        def after_step(step):
            if step in points:
                for kind, images in tests.items():
                    images[output] = predict(network, images["rainy"])
                    about = {"step": step, "rain": kind, "output": output, "n": n}
                    rows.append({**about, **measure(output, kind)})

        label = f"{output} ({n:,} {choice})"
        train(
            network,
            backgrounds[output],
            degrade=degrade,
            steps=steps,
            seed=seed,
            label=label,
            after_step=after_step,
        )

    # Each copy is trained in a thread of its own.  A GPU does better with one after the other.
    pool = ThreadPoolExecutor(len(COPIES) if device == "cpu" else 1)
    for job in [pool.submit(train_copy, output) for output in COPIES]:
        job.result()  # waits for the thread; raises what went wrong in it

    order = [*tests, "rainy", "opening 5", "opening 7", *COPIES]
    rows.sort(key=lambda row: (row["step"], order.index(row["rain"]), order.index(row["output"])))
    return rows, {**tests, "backgrounds": backgrounds}


def show(axes, image: Tensor, title: str = ""):
    """Draw an image (3, h, w) without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, size=11)


def frame(axes, colour: str):
    """Draw a thick frame around a picture."""
    for line in axes.spines.values():
        line.set(color=colour, linewidth=4)


def figure_headline(rows: list[dict], pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """Draw the backgrounds, how much unseen rain is left in training, and a test image."""
    colours = {"few": "#0072b2", "exchanged": "#d55e00", "many": "black"}
    names = {"few": "8 plain", "exchanged": "1 of 8 exchanged", "many": f"all {MANY:,}"}
    figure = Figure((12, 8.2), layout="constrained")
    figure.suptitle("A network with 8 plain backgrounds.  Exchange one, and it fails.", size=17)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    left, right = top.subfigures(1, 2, width_ratios=(1, 1.65))

    left.suptitle("The network is trained on 8 backgrounds", size=12)
    tiles = left.subplots(4, 3)
    few = pictures["backgrounds"]["few"]
    for axes, patch in zip(tiles[:, :2].flat, few):
        show(axes, patch)
    for axes in tiles[:, 2]:
        axes.axis("off")
    frame(tiles[0, 0], colours["few"])
    tiles[0, 2].axis("on")
    show(tiles[0, 2], pictures["backgrounds"]["exchanged"][0])
    frame(tiles[0, 2], colours["exchanged"])
    tiles[1, 2].text(0.5, 1, "exchanged for\nthe framed one", size=11, ha="center", va="top")

    axes = right.subplots()
    axes.set_title("Rain that it never saw, while it is trained", size=12)
    axes.set(xlabel="training step", ylabel="unseen rain that is left (%)")
    unseen = [row for row in rows if row["rain"] == "unseen"]
    last = unseen[-1]["step"]
    for output, colour in colours.items():
        curve = [row for row in unseen if row["output"] == output]
        left_over = [row["rain_left"] for row in curve]
        axes.plot([row["step"] for row in curve], left_over, "o-", color=colour)
        label = f" {names[output]}: {left_over[-1]:.0f} %"
        axes.text(last, left_over[-1], label, color=colour, size=12, va="center")
    for row in unseen:
        if row["step"] == last and row["output"].startswith("opening"):
            axes.axhline(row["rain_left"], color="0.6", linestyle="--", zorder=0)
            label = f"{row['output']} (a filter)"
            axes.text(0.01 * last, row["rain_left"] + 1, label, color="0.4", size=10)
    axes.axis((0, 1.42 * last, 0, 105))

    titles = {"rainy": "unseen rain", **names, "clean": "clean image"}
    bottom.suptitle("A test image, as it comes out of each network", size=12)
    for axes, (output, title) in zip(bottom.subplots(1, 5), titles.items()):
        show(axes, pictures["unseen"][output][0], title=title)
        if output in colours:
            frame(axes, colours[output])
    return figure


# =================================================================================================
# PART II: THE REST OF THE SYSTEM
# =================================================================================================

# ---- 6  More networks: does the architecture matter? --------------------------------------------
#
# Two networks of other kinds: convolutions at several resolutions, and attention.  Both add their
# input to their output, as the ResNet does.


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Enlarge images (n, c, h, w) at the bottom and right until both sides are multiples.

    The new pixels mirror the image at its last row and column, which are not repeated.  If the
    image is too small for this on either side, its last row and column are repeated instead, on
    both sides.
    """
    height, width = images.shape[-2:]
    bottom = -height % multiple  # what is missing to the next multiple
    right = -width % multiple
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions, each with a ReLU behind it."""
    return nn.Sequential(conv3x3(inputs, outputs), nn.ReLU(), conv3x3(outputs, outputs), nn.ReLU())


class UNet(nn.Module):
    """Convolutions at three resolutions, from fine to coarse and back (Ronneberger et al. 2015).

    The input is padded to multiples of 4, and the output cropped.  On the way down, the sides halve
    (by max-pooling) and the channels double.  On the way up, each resolution gets back its features
    from the way down, as its first channels; the enlarged coarse features follow.
    An output pixel depends on 44 x 44 pixels, at most 23 to one side.  Follow it back: it needs 5
    fine pixels, which come from 3 of the middle resolution; with two convolutions 7, which come
    from 4 coarse ones; with two convolutions 8 coarse pixels.  These are 16 middle ones, with two
    convolutions 20, or 40 fine ones, and again two convolutions: 44.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        c = channels
        self.down1 = two_convolutions(3, c)
        self.down2 = two_convolutions(c, 2 * c)
        self.bottom = two_convolutions(2 * c, 4 * c)
        # A transposed convolution of size 2 and stride 2: each pixel becomes 2 x 2 pixels.
        self.enlarge2 = nn.ConvTranspose2d(4 * c, 2 * c, kernel_size=2, stride=2)
        self.up2 = two_convolutions(4 * c, 2 * c)
        self.enlarge1 = nn.ConvTranspose2d(2 * c, c, kernel_size=2, stride=2)
        self.up1 = two_convolutions(2 * c, c)
        self.tail = nn.Conv2d(c, 3, kernel_size=1)

    def forward(self, degraded: Tensor) -> Tensor:
        height, width = degraded.shape[-2:]
        image = pad_to_multiple(degraded, 4)
        fine = self.down1(image)  # (n, c, h, w)
        middle = self.down2(F.max_pool2d(fine, 2))  # (n, 2 c, h / 2, w / 2)
        coarse = self.bottom(F.max_pool2d(middle, 2))  # (n, 4 c, h / 4, w / 4)

        middle = self.up2(torch.cat([middle, self.enlarge2(coarse)], dim=1))
        fine = self.up1(torch.cat([fine, self.enlarge1(middle)], dim=1))
        return (image + self.tail(fine))[..., :height, :width]


# SwinIR is built on attention.  In attention, each pixel gives every pixel a score: how well the
# two match.  A softmax turns the scores into weights that sum to 1.  The pixel's new features are
# the weighted sum of the features of all pixels.  To look at all pixels of an image would cost too
# much, so each looks only at those of its own window, here of 8 x 8 pixels.
#
# With these windows alone, nothing would ever cross the border of a window.  So the network repeats
# attention in several blocks, and every second block shifts the windows by half their side.  The
# code leaves the windows where they are, and moves the image instead.  The image is rolled up and
# to the left.  What leaves at one edge comes in at the opposite edge.  An example, with the 8 rows
# of an image in windows of 4:
#
#     plain:    [0 1 2 3] [4 5 6 7]
#     rolled:   [2 3 4 5] [6 7|0 1]      6, 7 and 0, 1 now share a window
#
# Rows 7 and 0 lie at opposite edges of the image, and should not see each other.  A mask prevents
# it: -100 is added to their score, so that their weight becomes practically 0.


def to_windows(image: Tensor, window: int) -> Tensor:
    """Cut n images (n, h, w, c) into m windows each: (n * m, window * window, c).

    Windows follow each other row by row, and so do the pixels within a window.  The channels come
    last here.  h and w must be multiples of `window`.
    """
    n, h, w, c = image.shape
    # image, row of windows, row in the window, column of windows, column in the window, channel
    cut = image.view(n, h // window, window, w // window, window, c)
    # The two axes that count windows come next to each other, and are joined.
    return cut.transpose(2, 3).reshape(-1, window * window, c)


def from_windows(windows: Tensor, window: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Undo to_windows; shape is that of the images, (n, h, w, c)."""
    n, h, w, c = shape
    cut = windows.view(n, h // window, w // window, window, window, c)
    return cut.transpose(2, 3).reshape(shape)


def shift_mask(h: int, w: int, window: int) -> Tensor:
    """Return what is added to scores of attention in a rolled image (h, w): 0 or -100.

    The image was rolled up and to the left by window // 2.  The mask has the shape (windows,
    window * window, window * window); windows are those of to_windows.  It is -100 for two pixels
    of a window if the row of one, and not that of the other, came in from the opposite edge, or the
    column.  Otherwise it is 0.
    """
    row_came_in = torch.arange(h) >= h - window // 2
    column_came_in = torch.arange(w) >= w - window // 2
    # Each pixel gets the number of its region: 0 to 3.
    region = 2 * row_came_in.long()[:, None] + column_came_in.long()  # (h, w)
    region = to_windows(region[None, :, :, None], window)[..., 0]  # (windows, window * window)
    same = region[:, :, None] == region[:, None, :]
    return torch.where(same, 0.0, -100.0)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias (Liu et al. 2021).

    Each pixel makes three vectors: a query (what it looks for), a key (what it offers to others)
    and a value (what it passes on).  The score of two pixels is the dot product of one's query and
    the other's key.  A sum of many products is large, so it is divided by the square root of how
    many numbers a key has.  Then a bias is added, and the mask.

    The channels are divided among several heads, so that each head can look for something else.
    The linear layer `qkv` makes all queries, then all keys, then all values.  In each of these
    three, the channels of head 0 come first, then those of head 1, and so on.

    Queries and keys do not tell where a pixel lies.  The bias adds this.  It depends only on how
    far, and in which direction, one pixel lies from the other.  In a window of 8, this offset runs
    from -7 to 7 down and from -7 to 7 to the right.  So a head needs only a list of 15 x 15 learned
    numbers for all 64 x 64 pairs of pixels:

        place in the list = (down + 7) * 15 + (right + 7)

    The lists of all heads are the columns of a table with 225 rows, position_bias.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        side = 2 * window - 1  # 15 in a window of 8
        self.position_bias = nn.Parameter(torch.zeros(side * side, heads))

        # Which row of the table belongs to pixels i and j: (n, n), with n = window * window.  It
        # follows from the size of the window, so it is not learned and need not be saved.
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (n, 2)
        # From pixel j to pixel i, plus 7 in a window of 8, so that it is not negative: (n, n, 2).
        offset = place[:, None] - place + window - 1
        table_row = offset[..., 0] * side + offset[..., 1]
        self.register_buffer("table_row", table_row, persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows (b, n, c), where n = window * window.

        mask: (windows of an image, n, n), added to the scores of every image's windows; or None.
        """
        b, n, c = windows.shape
        qkv = self.qkv(windows).view(b, n, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, n, c / heads)

        scores = query @ key.transpose(-2, -1) / math.sqrt(c // self.heads)  # (b, heads, n, n)
        bias = self.position_bias[self.table_row]  # (n, n, heads)
        scores = scores + bias.permute(2, 0, 1)
        if mask is not None:
            # The masks of one image are repeated for every image; None is an axis for the heads.
            scores = scores + mask.repeat(b // len(mask), 1, 1)[:, None]
        collected = scores.softmax(-1) @ value  # (b, heads, n, c / heads)
        # The channels of all heads are put side by side again.
        return self.project(collected.transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    """Attention within windows, then a perceptron for each pixel (Liu et al. 2021).

    Each of the two normalizes its input first (LayerNorm: over the channels of each pixel), and
    adds its output to its input.  The perceptron (MLP) is two linear layers with a GELU, a smooth
    ReLU, between them.  With a shift (half a window), the image is rolled before it is cut into
    windows, and rolled back after.
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
        """Map features (n, h, w, c) to features of the same shape."""
        _, h, w, _ = image.shape
        mask = shift_mask(h, w, window=self.window).to(image.device) if self.shift else None
        rolled = self.norm(image).roll((-self.shift, -self.shift), dims=(1, 2))
        attended = self.attention(to_windows(rolled, self.window), mask)
        attended = from_windows(attended, self.window, shape=image.shape)
        image = image + attended.roll((self.shift, self.shift), dims=(1, 2))
        return image + self.perceptron(image)


class SwinGroup(nn.Module):
    """Swin blocks, every second one shifted, then a convolution; added to their input."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, hidden: int):
        super().__init__()
        self.blocks = nn.Sequential()
        for i in range(depth):
            shift = 0 if i % 2 == 0 else window // 2
            self.blocks.append(SwinBlock(dim, heads, window=window, shift=shift, hidden=hidden))
        self.conv = conv3x3(dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        features = self.blocks(image).permute(0, 3, 1, 2)  # (n, c, h, w), as convolutions need it
        return image + self.conv(features).permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """SwinIR (Liang et al. 2021): groups of Swin blocks between convolutions.

    It computes what the published network computes for denoising, where the output has the size of
    the input.  The arguments have the published names.  embed_dim: channels.  depths, num_heads:
    blocks and heads of each group.  window_size: side of a window.  mlp_ratio: the hidden layer of
    a perceptron has mlp_ratio times as many channels.
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
        self.groups = nn.Sequential()
        hidden = int(embed_dim * mlp_ratio)
        for depth, heads in zip(depths, num_heads, strict=True):
            group = SwinGroup(embed_dim, depth, heads=heads, window=window_size, hidden=hidden)
            self.groups.append(group)
        self.norm_last = nn.LayerNorm(embed_dim)
        self.after_groups = conv3x3(embed_dim, embed_dim)
        self.last = conv3x3(embed_dim, 3)

    def forward(self, degraded: Tensor) -> Tensor:
        height, width = degraded.shape[-2:]
        # The mean colour of DIV2K, a set of photographs.  The published code takes it off, too.
        mean = torch.tensor([0.4488, 0.4371, 0.4040], device=degraded.device).view(3, 1, 1)
        image = pad_to_multiple(degraded, self.window)

        shallow = self.first(image - mean)  # (n, c, h, w)
        deep = self.norm_first(shallow.permute(0, 2, 3, 1))  # (n, h, w, c)
        deep = self.norm_last(self.groups(deep))
        deep = self.after_groups(deep.permute(0, 3, 1, 2))  # (n, c, h, w)
        return (image + self.last(deep + shallow))[..., :height, :width]


NETWORKS = {"resnet": ResNet, "unet": UNet, "swinir": SwinIR}


# ---- 7  Content prior: can a network be held to clean images? -----------------------------------
#
# Few backgrounds are one way to make a network learn images.  Another is a content prior: a network
# that knows nothing but clean images.  Ours is a VQGAN (Esser et al. 2021; "VQ" stands for vector
# quantization, "GAN" for a loss that we leave out).  It is an autoencoder: a network that learns to
# give its input back.  On the way, the image must pass a bottleneck:
#
#     image --encoder--> latent --codebook--> codes --decoder--> image
#
# The encoder turns the image into a coarse grid of vectors, the latent.  Each vector is replaced by
# the nearest entry of a list, the codebook; an entry is called a code.  The decoder draws an image
# from the codes.  All three are trained together, on clean images alone, to give the image back.
# So there are codes for what clean images show, and none for rain.  In our prior one vector stands
# for 8 x 8 pixels.  A thin streak covers few of these pixels, so it moves the vector little.  Often
# the nearest code stays the same.  Where it does not, the encoder has to be trained to ignore the
# streak; that is what VQGANPrior does.
#
# The names of all parts are those of the published VQGAN, so that its checkpoints can be loaded.


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution of single pixels: it mixes channels."""
    return nn.Conv2d(inputs, outputs, kernel_size=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a normalization over groups of channels: 4 in each, or more if there are above 128.

    It subtracts the mean of all pixels, then divides by the deviation.  Take two channels with the
    pixels (1, 3) and (5, 7).  Normalized alone, both become (-1, 1): that the second was brighter
    is lost.  In one group, with the mean 4, they become (-3, -1) and (1, 3), before the division.
    """
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalization and a SiLU; added to the input (n, c, h, w).

    A SiLU is a smooth ReLU.  If the number of channels changes, a 1 x 1 convolution adapts the
    input; nin_shortcut is its published name.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.nin_shortcut = conv1x1(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class PixelAttention(nn.Module):
    """Attention among all pixels, with a single head; added to its input (n, c, h, w).

    Queries, keys and values are made from the normalized input by the 1 x 1 convolutions q, k and
    v; scores are divided by the root of c.  A fourth convolution, proj_out, comes last.
    It is used only on coarse grids, which have few pixels, so no windows are needed.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = conv1x1(channels, channels)
        self.k = conv1x1(channels, channels)
        self.v = conv1x1(channels, channels)
        self.proj_out = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query = self.q(y).flatten(2).transpose(1, 2)  # (n, h * w, c)
        key = self.k(y).flatten(2).transpose(1, 2)
        value = self.v(y).flatten(2).transpose(1, 2)
        # softmax(query @ key^T / sqrt(c)) @ value, as in WindowAttention
        collected = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(collected.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """What encoder and decoder have at the lowest resolution: block, attention, block."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PixelAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve the sides of an image, by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # At the right and the bottom only, as published weights were learned with this.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides of an image: repeat each pixel, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention or by nothing."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(blocks):
            self.block.append(ResidualBlock(inputs if i == 0 else outputs, outputs))
            self.attn.append(PixelAttention(outputs) if attention else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return x


class Encoder(nn.Module):
    """From an image to what quant_conv makes the latent of, level by level.

    widths: the channels of each level; the sides halve from one level to the next.  ch: channels of
    the first convolution.  blocks: residual blocks of a level.  attention: a list that says, for
    each level, whether it has attention.  z_channels: channels of the output.
    """

    def __init__(
        self, ch: int, widths: list[int], blocks: int, attention: list[bool], z_channels: int
    ):
        super().__init__()
        self.conv_in = conv3x3(3, ch)
        self.down = nn.ModuleList()
        inputs = [ch, *widths[:-1]]  # each level takes what the one before it gave
        for i in range(len(widths)):
            level = Level(inputs[i], widths[i], blocks=blocks, attention=attention[i])
            level.downsample = Downsample(widths[i])
            self.down.append(level)
        # The last level keeps its size.  Its Downsample was made all the same, so that the weights
        # behind it are drawn as they were for the runs in figures/runs.csv.
        self.down[-1].downsample = nn.Identity()
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent to image: the levels of the encoder in reverse, each with one block more.

    up[0] is the level with the resolution of the image, and comes last.
    """

    def __init__(self, widths: list[int], blocks: int, attention: list[bool], z_channels: int):
        super().__init__()
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        inputs = [*widths[1:], widths[-1]]  # each level takes what the one behind it gave
        for i in range(len(widths)):
            level = Level(inputs[i], widths[i], blocks=blocks + 1, attention=attention[i])
            level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.up[0].upsample = nn.Identity()  # as in the encoder
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Vector quantization: replaces each vector by the nearest code (van den Oord et al. 2017).

    To choose the nearest code is a step function: it has no useful gradient, so the encoder in
    front of it would not learn.  The straight-through estimator pretends that the codebook was not
    there: on the way back, the gradient of the output is handed to the input unchanged.  In code,

        output = latent + (quantized - latent).detach()

    has the value of `quantized`, as latent - latent is 0.  What is detached counts as a constant.
    So the gradient goes to `latent` alone.  It is not the true gradient: it is computed at the
    code, but it moves the latent.  If the two are near each other, it points to about the same
    improvement.

    Two problems remain.  The codes get no gradient at all, so they do not learn.  And nothing keeps
    the latents near their codes.  A loss of two terms pulls both together.  Both are the squared
    distance of a latent and its code.  In one the code is detached, so only the latent moves; in
    the other the latent is detached, so only the code moves.
    """

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        # An Embedding is a table of learned vectors: it takes row numbers, and returns the rows.
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized latent, the indices of its codes, and the loss.

        latent and quantized latent: (n, embed_dim, h, w).  indices: (n, h, w).  Both terms of the
        loss are means over all elements.  The one that moves latents has the weight 1, the one that
        moves codes 0.25, as in VQGAN's published code (van den Oord et al.: the other way round).
        """
        vectors = latent.permute(0, 2, 3, 1)  # (n, h, w, embed_dim)
        codes = self.embedding.weight[None, None]  # the same codes for all images and rows
        distances = torch.cdist(vectors, codes)  # (n, h, w, n_embed)
        indices = distances.argmin(-1)
        quantized = self.embedding(indices).permute(0, 3, 1, 2)

        moves_latents = F.mse_loss(latent, quantized.detach())
        moves_codes = F.mse_loss(quantized, latent.detach())
        quantized = latent + (quantized - latent).detach()  # straight-through
        return quantized, indices, moves_latents + 0.25 * moves_codes


class VQGAN(nn.Module):
    """The autoencoder of Esser et al. (2021), with its published names and default arguments.

    Level i has ch * ch_mult[i] channels and half the resolution of level i - 1.  Take an image of
    `resolution` pixels a side.  In level i, its features have resolution / 2^i pixels a side.  If
    this number is in attn_resolutions, the level has attention.  With 256 and (16,) it is level 4.
    n_embed codes of embed_dim numbers each.  The encoder gives z_channels channels, which may be
    more.  quant_conv makes embed_dim channels of them, and post_quant_conv z_channels again.

    Note: images are in [-1, 1] here, not in [0, 1].
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
        attention = [resolution // 2**level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = Encoder(
            ch, widths, blocks=num_res_blocks, attention=attention, z_channels=z_channels
        )
        self.decoder = Decoder(widths, num_res_blocks, attention=attention, z_channels=z_channels)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = conv1x1(z_channels, embed_dim)
        self.post_quant_conv = conv1x1(embed_dim, z_channels)

    def encode(self, image: Tensor) -> Tensor:
        """Return the latent (n, embed_dim, h', w') of images (n, 3, h, w), before quantization."""
        return self.quant_conv(self.encoder(image))

    def decode(self, quantized: Tensor) -> Tensor:
        """Return the images (n, 3, h, w) of quantized latents (n, embed_dim, h', w')."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of images (n, 3, h, w), and the loss of the codebook."""
        quantized, _, loss = self.quantize(self.encode(image))
        return self.decode(quantized), loss


# The prior that we can pre-train in minutes: a smaller VQGAN.  Its latents are 8 times smaller than
# the image, and it has attention only in the middle.
PRIOR = {
    "ch": 32,
    "ch_mult": (1, 1, 2, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "z_channels": 64,
    "n_embed": 1024,
    "embed_dim": 16,
}
# The learning rate of fine-tuning: at a higher one the encoder forgets what it was taught.
PRIOR_RATE = 5e-4


def pretrain(vqgan: VQGAN, images: list[Tensor], steps: int, seed: int = 0, label: str = ""):
    """Train a VQGAN in place, to give clean patches of images (3, h, w) in [0, 1] back.

    The loss is L1 and that of the codebook.  The published VQGAN was trained with two more losses,
    which make details look real: one compares features of a network that was trained on other
    photographs, one comes from a second network that learns to tell its images from photographs.

    For the first 30 % of the steps the codebook is left out.  With it from the start, the latents
    would be pulled to codes that mean nothing yet, and the network would learn to draw hardly more
    than grey.

    A code moves only if it is chosen.  One that is far from all latents is never chosen, so it
    stays far and is wasted.  So a code that was not chosen for more than 30 steps is replaced by a
    vector of the latents at hand.  `idle` counts these steps.  It starts at 31, so that the random
    codes of the start are soon replaced.
    """
    torch.set_num_threads(1)  # as in `train`
    codes = vqgan.quantize.embedding.weight  # (n_embed, embed_dim)
    idle = torch.full([len(codes)], 31, device=codes.device)  # steps since a code was chosen
    betas = (0.5, 0.9)  # as published
    optimizer = torch.optim.Adam(vqgan.parameters(), betas=betas, fused=True)
    begun = printed = time.monotonic()

    for step in range(steps):
        rng = stream(seed, "pretraining", step)
        # GroupNorm takes the mean over all pixels of a patch.  So a network that saw one size of
        # patches only might work at this size only.  Therefore two sizes take turns.
        n, side = (8, 40) if step % 2 == 0 else (2, 80)
        clean = 2 * sample_patches(images, n, size=side, rng=rng).to(codes.device) - 1
        latent = vqgan.encode(clean)  # (n, embed_dim, h', w')

        if step < 0.3 * steps:
            loss = F.l1_loss(vqgan.decode(latent), clean)
        else:
            vectors = latent.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (n h' w', embed_dim)
            # Replace unused codes by vectors that are picked at random, each at most once.
            unused = (idle > 30).nonzero()[: len(vectors), 0]
            picked = torch.from_numpy(rng.permutation(len(vectors))[: len(unused)])
            with torch.no_grad():
                codes[unused] = vectors[picked]
            idle[unused] = 0
            quantized, indices, codebook_loss = vqgan.quantize(latent)
            idle += 1
            idle[indices.flatten()] = 0
            loss = F.l1_loss(vqgan.decode(quantized), clean) + codebook_loss

        # A warm-up: the rate rises from 0, as Adam's first steps rest on very few gradients.
        rate = 1e-3 * min(1, step / 50)
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note = f"steps, loss {loss.item():.4f}"
        printed = print_progress(
            label, step + 1, total=steps, note=note, begun=begun, printed=printed
        )


class VQGANPrior(nn.Module):
    """A restoration network that draws with the codes of clean images only.

    It starts from a pre-trained VQGAN, which is copied.  The codebook and the decoder are frozen:
    their weights do not change any more, so whatever comes out was assembled from codes of clean
    images.  The encoder is fine-tuned: it learns to find, in a degraded image, the codes of the
    clean one.

        degraded --encoder (learns)--> latent --codebook--> codes --decoder--> restored
                                          ^         (codebook and decoder: frozen)
                                          |  should be near to
                                          v
           clean --teacher, codebook--> codes

    Gradients pass through frozen layers, and straight through the codebook, to the encoder.
    The teacher is a copy of the encoder as it was pre-trained.  It gives the codes of the clean
    image.  If the learning encoder gave them, they would change while it learns.

    Images in and out are in [0, 1].
    """

    def __init__(self, vqgan: VQGAN):
        super().__init__()
        self.vqgan = copy.deepcopy(vqgan)
        self.teacher = nn.Sequential(copy.deepcopy(vqgan.encoder), copy.deepcopy(vqgan.quant_conv))
        self.requires_grad_(False)
        self.vqgan.encoder.requires_grad_(True)
        self.vqgan.quant_conv.requires_grad_(True)

    def prepare(self, image: Tensor) -> Tensor:
        """Return an image (n, 3, h, w) as the encoder takes it: padded, and in [-1, 1]."""
        halvings = len(self.vqgan.encoder.down) - 1  # each level except the last halves the sides
        return 2 * pad_to_multiple(image, 2**halvings) - 1

    def draw(self, latent: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Return what the decoder draws from the codes nearest to a latent, cut to a shape.

        The image (n, 3, h, w) should lie in [0, 1], but may go beyond; `predict` limits it.
        """
        quantized, _, _ = self.vqgan.quantize(latent)
        return (self.vqgan.decode(quantized)[..., : shape[2], : shape[3]] + 1) / 2

    def forward(self, degraded: Tensor) -> Tensor:
        return self.draw(self.vqgan.encode(self.prepare(degraded)), degraded.shape)

    def loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """Return the loss of fine-tuning for a batch, for `train`: of latents, and L1 of images.

        The first is the mean squared distance of the degraded image's latent, before quantization,
        from the quantized latent that the teacher makes of the clean image.
        """
        with torch.no_grad():
            clean_codes, _, _ = self.vqgan.quantize(self.teacher(self.prepare(clean)))
        latent = self.vqgan.encode(self.prepare(degraded))
        return F.mse_loss(latent, clean_codes) + F.l1_loss(self.draw(latent, clean.shape), clean)


# ---- 8  Files: how are images and networks read and written? ------------------------------------
#
# Nothing of the paper is in sections 8 and 9; you can stop reading here.


def write_file(path: Path, content: bytes):
    """Write bytes to a file and print its path; raises BadInput.

    The content is first written under another name, so that `path` never holds half a file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        raise BadInput(f"{path} cannot be written: {problem.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}")


def prepare_folder(file: Path):
    """Make the folder of a file, and try to write into it now, not after hours of training."""
    folder = file.parent
    if file.is_dir():
        raise BadInput(f"{file} is a folder; give the name of a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise BadInput(f"cannot write into {folder}: {problem.strerror}") from None


def write_table(path: Path, rows: list[dict]):
    """Write rows as a .csv; what could not be measured (NaN) is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(rows[0])
    for row in rows:
        table.writerow("" if str(cell) == "nan" else cell for cell in row.values())
    # surrogateescape: a file may have a name that is not valid text; its bytes are kept.
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def print_table(rows: list[dict]):
    """Print rows under a header; what could not be measured (NaN) is "-"."""
    print(*(f"{key:>10}" for key in rows[0]))
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print(*(f"{'-' if cell == 'nan' else cell:>10}" for cell in cells))


def save_figure(figure: Figure, path: Path):
    """Write a figure as a .png."""
    picture = io.BytesIO()
    # Without the version of matplotlib in it, the file depends less on this version.
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    write_file(path, picture.getvalue())


def each(work: Callable, items: list, label: str = "") -> list:
    """Return work(item) of all items; where it raises BadInput, print that in one line and go on.

    Raises BadInput if nothing is left.
    """
    begun = printed = time.monotonic()
    results = []
    for done, item in enumerate(items, start=1):
        try:
            results.append(work(item))
        except BadInput as problem:
            print("skipped:", " ".join(str(problem).split()), file=sys.stderr)  # in one line
        printed = print_progress(
            label, done, total=len(items), note="files", begun=begun, printed=printed
        )
    if not results:
        raise BadInput("none of the files can be used")
    return results


# The formats that Pillow decodes itself.  Files of other formats, such as EPS, can contain
# programs, and Pillow hands them to software that runs these.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = Image.registered_extensions()  # {".png": "PNG", ...}


def open_image(path: Path) -> Tensor:
    """Decode an image file, upright, as RGB: (3, h, w) in [0, 1].  Raises BadInput if it fails."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        picture = Image.open(path, formats=FORMATS)
        if picture.width * picture.height > 100e6:
            raise ValueError("it has more than 100 megapixels; make it smaller")
        if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
            raise ValueError("its numbers have 32 bits and no known range; save it with 8 or 16")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            if picture.convert("RGBA").getextrema()[3] != (255, 255):
                print(f"{path}: its transparency is ignored", file=sys.stderr)
        if picture.mode.startswith("I"):  # grey of 16 bits, which convert() would clip
            array = np.array(picture)[..., None] / 257  # (h, w, 1), from 0 to 255
        else:
            array = np.array(picture.convert("RGB"))
    except Exception as problem:  # decoders fail in as many ways as files are damaged
        raise BadInput(f"{path} cannot be read as an image: {problem}") from None
    return torch.from_numpy(array).float().permute(2, 0, 1).expand(3, -1, -1) / 255


def colour_profile(path: Path) -> bytes | None:
    """Return the ICC profile of an image file, if it has one for RGB."""
    with Image.open(path, formats=FORMATS) as picture:
        return picture.info.get("icc_profile") if picture.mode.startswith("RGB") else None


def save_image(image: Tensor, path: Path, profile: bytes | None = None):
    """Write an image (3, h, w) in [0, 1], in the format that the path's suffix names."""
    kind = SUFFIXES.get(path.suffix.lower())
    if kind not in FORMATS:
        raise BadInput(f"{path} should end in .png, .jpg or the like ({' '.join(FORMATS)})")
    array = (255 * image).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    try:
        Image.fromarray(array).save(content, kind, quality=95, icc_profile=profile)
    except Exception as problem:  # such as too many pixels for the format
        raise BadInput(f"{path} cannot be written as {kind}: {problem}") from None
    write_file(path, content.getvalue())


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; BadInput if there are none.

    What a Mac leaves in a zip (__MACOSX/, ._name.png) is no image.
    """
    files = []
    for file in folder.rglob("*"):
        if SUFFIXES.get(file.suffix.lower()) in FORMATS and file.is_file():
            if not file.name.startswith("._") and "__MACOSX" not in file.parts:
                files.append(file)
    if not files:
        formats = " ".join(FORMATS)
        raise BadInput(f"{folder} is no folder with images ({formats}); links are not followed")
    return sorted(files)


def load_images(path: Path, smallest: int = 1) -> list[Tensor]:
    """Load an image file, or all in a folder and its subfolders: (3, h, w) each, in [0, 1].

    A file that is broken, or has a side below `smallest`, is left out, and its name is printed.  Of
    a large image, only the middle is kept.  How much depends on the number of images: all together
    take 0.5 GB at most.  Raises BadInput if none is left.
    """
    path = Path(path)
    files = [path] if path.is_file() else image_files(path)
    side = int((40e6 / len(files)) ** 0.5)  # 40 million pixels take 0.5 GB
    if side < smallest:
        raise BadInput(f"{path} has {len(files):,} images, too many for the memory; give fewer")

    def load(file):
        image = open_image(file)
        _, height, width = image.shape
        if min(height, width) < smallest:
            raise BadInput(f"{file} is smaller than {smallest} x {smallest} pixels")
        top = max(0, height - side) // 2
        left = max(0, width - side) // 2
        return image[:, top : top + side, left : left + side].clone()

    return each(load, files)


def training_and_held_out(path: Path | None, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return images (3, h, w) to train on and others to test on.

    They are three quarters and one quarter of the photographs in `path`, or drawn faces if there is
    no path.  Raises BadInput if fewer than two photographs can be used.
    """
    if not path:
        faces = []
        for i in range(80):
            face = draw_face(IMAGE, stream(seed, "backgrounds", i))
            faces.append(torch.from_numpy(face))
        return faces[:64], faces[64:]
    images = load_images(path, smallest=TEST_PATCH)
    if len(images) < 2:
        raise BadInput(f"{path} has one photograph; give two or more, to train and to test on")
    images = [images[i] for i in stream(seed, "split").permutation(len(images))]
    count = max(1, len(images) // 4)
    return images[count:], images[:count]


def restore(network: nn.Module, image: Tensor, tile: int = 512) -> Tensor:
    """Restore an image (3, h, w) of any size, tile by tile, to bound the memory.

    Each tile is restored together with `margin` pixels around it, which are then cut off, so that
    its pixels see the same neighbours as in the whole image.  (This is not quite so for VQGANPrior:
    its normalization and attention use all pixels of a tile.)
    """
    margin = 32  # an output pixel of the three networks depends on at most 23 to each side
    output = torch.empty_like(image)
    for top in range(0, image.shape[1], tile):
        for left in range(0, image.shape[2], tile):
            y = max(top - margin, 0)
            x = max(left - margin, 0)
            piece = image[None, :, y : top + tile + margin, x : left + tile + margin]
            # The piece begins at (y, x).  Cut off its margin: first above and left, then the rest.
            restored = predict(network, piece)[0, :, top - y :, left - x :]
            output[:, top : top + tile, left : left + tile] = restored[:, :tile, :tile]
    return output


def save_checkpoint(path: Path, network: nn.Module, net: str):
    """Write a network's weights, and its kind ("resnet", "prior", "vqgan", ...)."""
    file = io.BytesIO()
    torch.save({"format": 3, "net": net, "state_dict": network.state_dict()}, file)
    write_file(Path(path), file.getvalue())


def check_sums(path: Path):
    """Raise ValueError if a part of a checkpoint was changed: torch.load does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")


def set_weights(network: nn.Module, weights: dict[str, Tensor]):
    """Give a network the weights of a file; raises ValueError if one of them is not finite.

    What does not fit raises other exceptions.  So a file cannot make a network larger.
    """
    network.load_state_dict(weights)
    for weight in network.state_dict().values():
        if not weight.isfinite().all():
            raise ValueError("a weight is not finite")


def vqgan_for(weights: dict[str, Tensor]) -> VQGAN:
    """Return a VQGAN of the kind that weights belong to: PRIOR, or published, with five levels."""
    n_embed = len(weights["quantize.embedding.weight"])
    if n_embed > 65_536:
        raise ValueError("too many codes")
    published = "encoder.down.4.block.0.conv1.weight" in weights
    arguments = {} if published else PRIOR
    return build_network(VQGAN, **{**arguments, "n_embed": n_embed})


def load_checkpoint(path: Path) -> nn.Module:
    """Return the restoration network in a file of `train`, on the CPU; nothing in the file is run.

    torch.save writes files with Python's pickle.  Such a file can hold commands, which run when the
    "unpickler" loads it.  weights_only=True refuses them.
    Raises BadInput if the file is anything else, or damaged.
    """
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content["state_dict"]
        if content["format"] != 3:
            raise ValueError("it is of another edition")
        if content["net"] == "prior":
            parts = {name.removeprefix("vqgan."): value for name, value in weights.items()}
            network = VQGANPrior(vqgan_for(parts))
        else:
            network = build_network(NETWORKS[content["net"]])
        set_weights(network, weights)
        return network
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        reason = type(problem).__name__
        raise BadInput(f"{path} is no network of `derain.py train` ({reason})") from None


class Placeholder:
    """Takes the place of a class that a checkpoint asks for, but that we do not want to run.

    The unpickler calls both methods; they do nothing.
    """

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def load_vqgan(path: Path) -> VQGAN:
    """Return the VQGAN in a file of `vqgan`, or in a published one, on the CPU.

    Published ones are those of Esser et al. (2021) with latents 16 times smaller than the image
    (called f = 16).  They name classes of packages that are not installed here.  Each is replaced
    by a Placeholder, and nothing in the file is run.  Raises BadInput if it holds no such VQGAN.
    """
    try:
        check_sums(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        items = content["state_dict"].items()
        weights = {name: value for name, value in items if not name.startswith("loss.")}
        vqgan = vqgan_for(weights)
        set_weights(vqgan, weights)
        return vqgan
    except Exception as problem:
        expected = "a file of `derain.py vqgan` or a published VQGAN with f = 16 was expected"
        raise BadInput(f"{path}: {expected} ({type(problem).__name__})") from None


# ---- 9  Commands: how is all this run? ----------------------------------------------------------
#
# Each command is a function run_NAME, which takes the parsed options.  One that works on several
# files returns how many of them failed.


def run_compare(args: argparse.Namespace):
    """Run the main job, and draw it."""
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
    """Add rain to a photograph."""
    prepare_folder(args.output)
    degrade = rain_degradation(RAIN[args.range])
    rainy = degrade(open_image(args.photo)[None], stream(args.seed, "rain command"))[0]
    save_image(rainy, args.output, profile=colour_profile(args.photo))


def run_train(args: argparse.Namespace):
    """Train a network, and measure it on images that it was not trained on."""
    prepare_folder(args.output)
    training, held_out = training_and_held_out(args.backgrounds, args.seed)
    patches = training_patches(training, args.n, seed=args.seed, choice=args.choice)
    degrade = rain_degradation(RAIN[args.rain])
    options = {"degrade": degrade, "steps": args.steps, "seed": args.seed}
    if args.vqgan:
        net = "prior"
        network = VQGANPrior(load_vqgan(args.vqgan)).to(args.device)
        train(network, patches, loss=network.loss, rate=PRIOR_RATE, label=net, **options)
    else:
        net = args.net
        network = build_network(NETWORKS[net], seed=args.seed).to(args.device)
        train(network, patches, label=net, **options)
    save_checkpoint(args.output, network, net=net)

    rows = []
    for rain in (args.rain, "unseen"):
        images = test_images(held_out, rain, seed=args.seed)
        images[net] = predict(network, images["rainy"])
        for name in ("rainy", "opening 5", "opening 7", net):
            measures = decoupled_evaluation(images[name], images["rainy"], clean=images["clean"])
            rows.append({"rain": rain, "output": name, **measures})
    print(f"on {len(held_out)} images that were not trained on:")
    print_table(rows)


def run_vqgan(args: argparse.Namespace):
    """Pre-train a VQGAN, the content prior of train --vqgan."""
    prepare_folder(args.output)
    training, _ = training_and_held_out(args.backgrounds, args.seed)
    vqgan = build_network(VQGAN, seed=args.seed, **PRIOR).to(args.device)
    pretrain(vqgan, training, steps=args.steps, seed=args.seed, label="vqgan")
    save_checkpoint(args.output, vqgan, net="vqgan")


def run_restore(args: argparse.Namespace) -> int:
    """Remove the rain of photographs."""
    network = load_checkpoint(args.model).to(args.device)
    files = []
    for photo in args.photos:
        if photo.is_dir():
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
        file = sources[target]
        restored = restore(network, open_image(file))
        save_image(restored, target, profile=colour_profile(file))

    return len(sources) - len(each(work, list(sources)))


def names_of(file: Path, folder: Path) -> list[tuple]:
    """Return by what a file can be recognized, the surest first."""
    path = file.relative_to(folder)
    numbers = tuple(int(number) for number in re.findall(r"\d+", path.stem))
    return [
        ("path", path),
        ("path without suffix", path.with_suffix("")),
        ("name", path.stem),
        ("numbers", numbers or file),  # without a number, nothing else is equal to it
        ("numbers", numbers[:1] or file),
    ]


def find_pairs(rainy_folder: Path, clean_folder: Path) -> dict[Path, Path | None]:
    """Return {rainy file: clean file}, for the files in two folders and their subfolders.

    Two files belong together if their paths within the folders are equal; or else their names; or
    else all numbers in their names; or else if the only number of the clean name is the first one
    of the rainy name.  Suffixes do not count.  A rainy file without a clean one has the partner
    None.  Raises BadInput if there is a choice between two clean files.
    """
    if rainy_folder == clean_folder:
        raise BadInput(f"--rainy and --clean are both {rainy_folder}; give two folders")
    rainy_files = image_files(rainy_folder)
    clean_files = image_files(clean_folder)
    # If one folder lies within the other, the files of the inner one belong to it alone.
    if clean_folder.is_relative_to(rainy_folder):
        rainy_files = [file for file in rainy_files if not file.is_relative_to(clean_folder)]
    else:
        clean_files = [file for file in clean_files if not file.is_relative_to(rainy_folder)]

    known = {}  # the clean files that a name leads to
    for file in clean_files:
        for name in names_of(file, clean_folder)[:4]:
            known.setdefault(name, []).append(file)

    pairs = {}
    for file in rainy_files:
        found = []
        for name in names_of(file, rainy_folder):
            found = found or known.get(name, [])
        if len(found) > 1:
            choice = f"{found[0]} or {found[1]}"
            raise BadInput(f"{file} may belong to {choice}; give files of a pair the same name")
        pairs[file] = found[0] if found else None
    return pairs


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure networks on pairs of rainy and clean images."""
    networks = {model.name: load_checkpoint(model).to(args.device) for model in args.models}
    if len(networks) < len(args.models):
        raise BadInput("two models have the same file name; rename one")
    pairs = find_pairs(args.rainy.resolve(), args.clean.resolve())
    if args.output:
        prepare_folder(args.output)

    def measure(file):
        """Return a row for each output of a pair."""
        partner = pairs[file]
        if partner is None:
            raise BadInput(f"{file} has no clean partner")
        rainy = open_image(file)[None]
        clean = open_image(partner)[None]
        if rainy.shape != clean.shape:
            raise BadInput(f"{file} and {partner} differ in size")
        if not rain_mask(rainy, clean).any():
            print(f"no rain in {file}: left out of rain_left and E_R")

        rows = []
        for name in ("rainy", "opening 5", "opening 7", *networks):
            if name in networks:
                output = restore(networks[name], rainy[0])[None]
            elif name == "rainy":
                output = rainy
            else:
                output = opening(rainy, int(name[-1]))
            measures = decoupled_evaluation(output, rainy, clean=clean)
            rows.append({"rainy": file, "clean": partner, "output": name, **measures})
        return rows

    done = each(measure, list(pairs), label="evaluate")
    print_table([mean_of(rows) for rows in zip(*done)])
    if args.output:
        write_table(args.output, [row for rows in done for row in rows])
    return len(pairs) - len(done)


def mean_of(rows: list[dict]) -> dict:
    """Return the mean measures of an output over pairs; tell what could not be part of a mean."""
    row = {"output": rows[0]["output"], "pairs": len(rows)}
    for measure in ("rain_left", "damage", "E_R", "E_B", "psnr", "ssim"):
        values = [row[measure] for row in rows if math.isfinite(row[measure])]
        if len(values) < len(rows):
            print(f"{row['output']}: {measure} is a mean over {len(values)} of {len(rows)} pairs")
        row[measure] = sum(values) / len(values) if values else math.nan
    return row


def whole_number(text: str, least: int = 0) -> int:
    """Return the value of an option: a whole number, not below `least`."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to 2^31")
    return int(text)


def positive(text: str) -> int:
    """Return the value of an option: a whole number above 0."""
    return whole_number(text, least=1)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="derain.py [COMMAND] [OPTIONS]",
        description="Why do networks fail on rain that they have not seen?  "
        "Without a command, `compare` runs with its defaults.",
        epilog="example: python derain.py compare --seed 1",
    )
    commands = parser.add_subparsers(title="commands, each with a --help", metavar="COMMAND")

    def add_command(run, options, about, example, parents=()):
        name = run.__name__.removeprefix("run_")
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            usage=f"derain.py {name} {options}",
            epilog=f"example: python derain.py {name} {example}",
            parents=parents,
        )
        command.set_defaults(run=run)
        return command.add_argument

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    ranges = ("small", "medium", "large")
    default = "(default: %(default)s)"

    computing = argparse.ArgumentParser(add_help=False)
    add = computing.add_argument
    add("--device", choices=devices, default=devices[0], help=f"where to compute {default}")
    learning = argparse.ArgumentParser(add_help=False, parents=[computing])
    add = learning.add_argument
    add("--backgrounds", type=Path, help="photographs, 128 x 128 or more (default: drawn faces)")
    add("--seed", type=whole_number, default=0, help=f"of all random numbers {default}")
    restoring = argparse.ArgumentParser(add_help=False, parents=[learning])
    add = restoring.add_argument
    add("--net", choices=NETWORKS, default="resnet", help=f"architecture {default}")

    about = "train on 8 plain backgrounds, on 1 of 8 exchanged, on 1,024; draw headline.png"
    add = add_command(run_compare, "[OPTIONS]", about, "--seed 1", parents=[restoring])
    add("--rain", choices=ranges, default="small", help=f"range of training rain {default}")
    add("--steps", type=positive, default=1200, help=f"training steps {default}")
    add("--out", type=Path, default=Path("figures"), help=f"folder of headline.png {default}")

    about = "add rain to a photograph"
    add = add_command(run_rain, "PHOTO -o FILE [OPTIONS]", about, "photo.jpg -o rainy.png")
    add("photo", type=Path, help="image file")
    add("-o", "--output", type=Path, required=True, help="image file to write")
    add("--range", choices=RAIN, default="medium", help=f"range of the rain {default}")
    add("--seed", type=whole_number, default=0, help=f"of all random numbers {default}")

    about = "train a network, and measure it on images that it was not trained on"
    example = "--backgrounds photos/ -o model.pt"
    add = add_command(run_train, "-o MODEL [OPTIONS]", about, example, parents=[restoring])
    add("-o", "--output", type=Path, required=True, help="checkpoint to write")
    add("--rain", choices=ranges, default="large", help=f"range of training rain {default}")
    add("--steps", type=positive, default=2400, help=f"training steps {default}")
    add("--n", type=positive, default=MANY, help=f"number of backgrounds {default}")
    choices = "low, high: of 3 n patches the n least sharp or sharpest; plain: of 1,024 those with"
    choices += " the least bright detail, n at most 512: less damage, more rain left; any"
    add(
        "--choice",
        choices=("any", "low", "high", "plain"),
        default="low",
        help=f"{choices} {default}",
    )
    add("--vqgan", type=Path, help="pre-trained content prior to fine-tune, instead of --net")

    about = "pre-train a VQGAN, the content prior of train --vqgan"
    example = "--backgrounds photos/ -o vqgan.pt"
    add = add_command(run_vqgan, "-o VQGAN [OPTIONS]", about, example, parents=[learning])
    add("-o", "--output", type=Path, required=True, help="checkpoint to write")
    add("--steps", type=positive, default=5000, help=f"training steps {default}")

    about = "remove the rain of photographs; writes NAME-restored.png"
    example = "model.pt rainy1.jpg rainy2.jpg -o restored/"
    usage = "MODEL PHOTO... -o FOLDER [OPTIONS]"
    add = add_command(run_restore, usage, about, example, parents=[computing])
    add("model", type=Path, help="checkpoint of train")
    add("photos", type=Path, nargs="+", help="image files, or folders of them")
    add("-o", "--output", type=Path, required=True, help="folder to write into")

    about = "measure networks on pairs of rainy and clean images; PSNR and SSIM are on RGB"
    example = "model.pt --rainy Rain100L/rainy --clean Rain100L/norain"
    usage = "MODEL... --rainy FOLDER --clean FOLDER [OPTIONS]"
    add = add_command(run_evaluate, usage, about, example, parents=[computing])
    add("models", type=Path, nargs="+", help="checkpoints of train")
    add("--rainy", type=Path, required=True, help="folder of rainy images")
    add("--clean", type=Path, required=True, help="folder of their clean images")
    add("-o", "--output", type=Path, help=".csv to write, with a row for each pair")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status.

    It is 0, or 1 if some of several files failed, 2 if nothing was done, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a notebook's has not
            output.reconfigure(errors="replace")  # for names that the terminal cannot show
    # Pillow and torch warn about some of the files that they are given; users need not see it.
    warnings.simplefilter("ignore")
    args = make_parser().parse_args(arguments or ["compare"])
    try:
        return 1 if args.run(args) else 0
    except (BadInput, OSError) as problem:
        print("derain.py:", " ".join(str(problem).split()), file=sys.stderr)  # in one line
        return 2
    except KeyboardInterrupt:
        print("derain.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    # This does not wait for the threads of `compare`, which Ctrl-C leaves at work.
    os._exit(status)
