"""Why do image-restoration networks fail on degradations that they have not seen?

Hu et al. (arXiv 2502.12600) answer: not because the networks are too small, but because they learn
the degradation instead of the image.  A network can tell rain from image in two ways.  It can know
how the rain looks, or it can know how images without rain look.  Both ways work in the rain that it
was trained in; only the second works in other rain.  It learns whichever of the two is simpler.

This file shows it.  Two copies of one network are trained in the same rain, one on 8 background
images, the other on 1,024.  Eight backgrounds are simpler than the rain, so the first copy learns
the images.  1,024 are less simple than the rain, so the second copy learns the rain.  Then both
meet rain that they have not seen.  `python derain.py` runs this experiment in about a minute.

Read the file from the top.  Each section opens with its question, and uses the sections above it.
These are the main functions; their helpers stand beside them.

1 rain           RainRange, RAIN, streak_kernel, streak_seeds, rain_layers, add_rain,
                 rain_degradation
2 backgrounds    draw_face, sample_patches, sharpness, training_patches
3 networks       ResNet, UNet, to_windows, from_windows, shift_mask, WindowAttention, SwinBlock,
                 SwinIR, build_network
4 evaluation     rain_mask, decoupled_evaluation, psnr, ssim, opening, predict, restore
5 training       train
6 content prior  Encoder, Decoder, Codebook, VQGAN, pretrain, VQGANPrior
7 main job       few_against_many, figure_headline
8 files          load_images, load_checkpoint, load_vqgan, and the command line: main

Images are float32 tensors (n, 3, h, w) with values in [0, 1]: n images, 3 colour channels, h rows
and w columns.  One image is (3, h, w).  Rain is (n, 1, h, w).
"""

import csv
import os
import re
import sys
import tempfile
import warnings
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from io import BytesIO, StringIO
from math import ceil, cos, inf, isfinite, isnan, nan, pi, sqrt
from pathlib import Path
from time import monotonic
from typing import Callable, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor, arange, as_tensor, cat, erf, exp, from_numpy, no_grad, sin, where
from torch.fft import irfft2, rfft2
from torch.nn import (
    GELU,
    Conv2d,
    ConvTranspose2d,
    Embedding,
    GroupNorm,
    Identity,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Parameter,
    ReLU,
    Sequential,
    Upsample,
    ZeroPad2d,
)
from torch.nn.functional import conv2d, l1_loss, max_pool2d, mse_loss, pad
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.optim import Adam


class BadInput(ValueError):
    """What the user gave cannot work; the message says in one line what is wrong."""


def stream(seed: int, *purpose: str | int) -> Generator:
    """Return the random number generator that belongs to a seed and a purpose.

    For example, stream(0, "training", 17) draws what step 17 of a training with seed 0 needs.  What
    one purpose draws does not depend on what others drew before it.  The global random generators
    of numpy and torch stay as they are.
    """
    # crc32 turns a text into a number, the same in every run.
    words = [zlib.crc32(str(word).encode()) for word in purpose]
    return np.random.default_rng([seed, *words])


# ---- 1  Rain: how is a rainy image made? --------------------------------------------------------
#
# A rainy image O is a background B plus a rain layer R, limited to the range of an image:
#
#     O = clip(B + R, 0, 1)
#
# The layer R is made from random noise in three steps, shown here on a few pixels:
#
#     uniform noise        seeds: noise above       one streak,          rain layer: a streak
#                          a threshold, .95         the kernel           at every seed
#
#     .31 .90 .12 .54      .   .   .   .                  /                .  .  .  /
#     .26 .65 .99 .42      .   .   *   .       and       /        give     .  .  /  .
#     .83 .17 .38 .71      .   .   .   .                /                  .  /  .  .
#
# (A seed here is a pixel where a streak lies.  It is not the seed of a random generator.)  The
# threshold decides how many streaks there are, the kernel what they look like.  These factors are
# drawn anew for every image, from intervals that we choose.  A network can learn the intervals
# instead of the image: for example, to remove bright lines that are vertical and 12 to 16 pixels
# long, and only those.  That is what all experiments here are about.


class RainRange(NamedTuple):
    """The intervals (low, high) from which the rain of each image is drawn (paper, Fig. 2)."""

    quantity: tuple  # streak seeds per 10,000 pixels
    width: tuple  # pixels across a streak, where it is at least half as bright as its centre
    length: tuple  # the same, along the streak
    direction: tuple  # degrees from vertical; with positive ones a streak leans like "/"
    either_side: bool = False  # True: an image's rain leans to the other side half of the time


# In every factor, "small" lies within "medium", and "medium" within "large".  No training uses
# "unseen": its directions and lengths lie outside "large".  It has fewer streaks, but longer ones.
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

    width, length: pixels between points of half brightness, above 0.
    A Gaussian falls to one half of its height at 1.1774 sigma, so sigma is width / 2.3548.
    direction: degrees from vertical; with a positive one the streak leans like "/".
    Numbers give one kernel (k, k); tensors (n,) give n kernels (n, k, k).  The size k is
    2 radius + 1.  The radius of a streak is length / 2 + 3 sigma, rounded up; the largest counts.
    """
    # Two axes are added, for the rows and columns of the kernel: (1, 1), or (n, 1, 1).
    sigma = as_tensor(width)[..., None, None] / 2.3548
    half = as_tensor(length)[..., None, None] / 2
    angle = torch.deg2rad(as_tensor(direction).float())[..., None, None]

    radius = ceil((half + 3 * sigma).max())
    x = arange(-radius, radius + 1)
    y = x[:, None]  # grows downwards, as the rows of an image do

    # The position of each pixel, measured along the streak and across it: the axes are rotated.
    # (In this file sin, erf and exp are those of torch.  cos and sqrt are those of Python's math,
    # for plain numbers, so here it is torch.cos.)
    along = x * sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * sin(angle)

    # A blurred line is a Gaussian across.  Along, it is a box with soft ends.  erf is the integral
    # of a Gaussian: it rises from -1 to 1 around 0.  The first erf falls at the upper end of the
    # streak, the second rises at its lower end.  Between the ends both are near 1, so they add up.
    # Beyond an end one of them is near -1, so they cancel.
    # The Gaussian of this sigma is exp(-(x / blur)^2), and its integral is erf(x / blur), up to a
    # constant factor.
    blur = sqrt(2) * sigma
    gaussian = exp(-((across / blur) ** 2))
    box = erf((half - along) / blur) + erf((half + along) / blur)
    # At the centre along = 0, so both are erf(half / blur).  Divided by their sum, it is 1 there.
    return gaussian * box / (2 * erf(half / blur))


def streak_seeds(noise: Tensor, quantity: Tensor) -> Tensor:
    """Turn uniform noise into seeds: a streak's brightness at its centre, 0 elsewhere.

    noise: (n, h, w) in [0, 1).  quantity: (n,), the expected seeds per 10,000 pixels.
    A pixel becomes a seed if its noise is above the threshold 1 - quantity / 10,000.  Among the
    seeds, the noise is uniform from this threshold to 1.  So it also gives their brightness: it is
    stretched to STREAK_PEAK, the threshold to the lower end, 1 to the upper end.
    """
    share = (quantity / 10_000)[:, None, None]
    above = (noise - (1 - share)) / share  # between 0 and 1 for seeds, 0 or less elsewhere
    low, high = STREAK_PEAK
    return where(above > 0, low + (high - low) * above, 0)


def rain_layers(n: int, size: int | tuple, rain_range: RainRange, rng: Generator) -> Tensor:
    """Return n rain layers (n, 1, h, w) in [0, 1]; size is (h, w), or one number for both.

    Streaks that overlap add up, to at most 1.  The noise covers a canvas that is larger than the
    image, so that streaks also enter from outside: its sides are h + k - 1 and w + k - 1 for a
    kernel of k x k pixels, rounded up to multiples of 16.  A seed at (y, x) of the canvas is the
    upper left corner of its kernel.  At the end the first k - 1 rows and columns are cut off.  So
    in the image, pixel (y, x) is the lower right corner of this kernel.
    Whoever draws in this order from the same generator gets the same rain: n quantities, n widths,
    n lengths, n directions; rng.choice([-1, 1], n) if either_side, by which the directions are
    multiplied; rng.random((n, *canvas), np.float32).
    """
    height, width = (size, size) if isinstance(size, int) else size

    factors = np.stack([rng.uniform(low, high, n) for low, high in rain_range[:4]])
    if rain_range.either_side:  # factors[3] are the directions
        factors[3] *= rng.choice([-1, 1], n)
    # streaks: the widths, lengths and directions.
    quantity, *streaks = from_numpy(factors).float()

    kernel = streak_kernel(*streaks)  # (n, k, k)
    margin = kernel.shape[-1] - 1
    canvas = [ceil((side + margin) / 16) * 16 for side in (height, width)]
    noise = from_numpy(rng.random((n, *canvas), np.float32))
    seeds = streak_seeds(noise, quantity)

    # Add a copy of the kernel at every seed, times the seed's brightness.  This is a convolution.
    # The product of two Fourier transforms is the transform of the convolution; for kernels as
    # large as these, that way is faster.  (If you have not met the Fourier transform, take these
    # two lines as given.)  s=canvas fills the kernel up with zeros.  Multiples of 16 are fast.
    spectrum = rfft2(seeds) * rfft2(kernel, s=canvas)
    rain = irfft2(spectrum, s=canvas)[:, None]

    # The transform treats the canvas as if its opposite edges were joined.  The first `margin` rows
    # and columns hold parts of streaks that came in from the opposite edge, so they are cut off.
    # What the rounding to multiples of 16 added is cut off at the other end.
    # Sums may be above 1, and the transform rounds, so that a little may be below 0: hence clamp.
    return rain[..., margin : margin + height, margin : margin + width].clamp(0, 1)


def add_rain(background: Tensor, rain: Tensor) -> Tensor:
    """Return O = clip(B + R, 0, 1), for B (n, 3, h, w) and R (n, 1, h, w).  (Paper, Eq. 1.)"""
    return (background + rain).clamp(0, 1)


def rain_degradation(rain_range: RainRange) -> Callable:
    """Return a function degrade(clean, rng) that adds rain of this range to images (n, 3, h, w).

    Training and tests know nothing else of the rain.  So a function that adds noise or blur can be
    given to them in place of this one.
    """

    def degrade(clean, rng):
        return add_rain(clean, rain_layers(len(clean), clean.shape[-2:], rain_range, rng))

    return degrade


# ---- 2  Backgrounds: what stands behind the rain, and how complex is it? ------------------------
#
# A network learns from small patches of clean images.  The paper varies two things about them: how
# many there are, and how sharp they are.  More patches are harder to learn.  So are sharper ones,
# as they have more detail.  Where no photographs are given, faces are drawn.

PATCH = 40  # side of a training patch, in pixels
MANY = 1024  # backgrounds of the network that is trained on many


def draw_face(size: int, rng: Generator) -> np.ndarray:
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


def sample_patches(images: list, n: int, size: int, rng: Generator) -> Tensor:
    """Cut n patches (n, 3, size, size) out of images (3, h, w), at random places.

    All places in an image are equally likely.  The images are taken in random order, and every one
    is used once before any is used twice.  Raises ValueError (in rng.integers) if an
    image is smaller than a patch.
    """
    order = [rng.permutation(len(images)) for _ in range(ceil(n / len(images)))]

    patches = []
    for i in np.concatenate(order)[:n]:
        _, height, width = images[i].shape
        top = rng.integers(height - size + 1)
        left = rng.integers(width - size + 1)
        patches.append(images[i][:, top : top + size, left : left + size])
    return torch.stack(patches)


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


def opening(images: Tensor, size: int = 5) -> Tensor:
    """Return the morphological opening of images (n, 3, h, w), a filter; `size` must be odd.

    It replaces each pixel by the smallest value in a square around it, then by the largest of
    these.  Whatever is bright and thinner than `size` pixels disappears.
    """
    # The smallest value is minus the largest of the negatives.
    smallest = -max_pool2d(-images, size, 1, size // 2)
    return max_pool2d(smallest, size, 1, size // 2)


def bright_detail(patches: Tensor) -> Tensor:
    """Return the bright detail (n,) of patches (n, 3, h, w): the mean of patch - opening(patch, 5).

    patch - opening(patch) is the white top-hat: what is bright and thinner than 5 pixels.
    """
    return (patches - opening(patches)).mean((1, 2, 3))


def training_patches(images: list, n: int, seed: int, choice: str = "any") -> Tensor:
    """Return n backgrounds (n, 3, PATCH, PATCH), cut out of images (3, h, w).

    choice: "any" takes patches as they come; "low" cuts 3 n and keeps the least sharp, "high" the
    sharpest.  "plain" keeps, of the first MANY, the half with the least bright detail, "detailed"
    the other half; "exchanged" is plain with the first patch replaced by the one of the MANY with
    the most bright detail.  Raises BadInput.
    """
    halves = choice in ("plain", "detailed", "exchanged")
    if halves and n > MANY // 2:
        raise BadInput(f"{choice} backgrounds are taken out of {MANY:,}: give at most {MANY // 2}")
    count = 3 * n if choice in ("low", "high") else max(n, MANY)
    if count > 52_000:  # of 3 * 40 * 40 numbers of 4 bytes
        raise BadInput(f"{n:,} backgrounds take more than 1 GB of memory; give fewer")
    patches = sample_patches(images, count, PATCH, stream(seed, "patches"))
    if choice in ("low", "high"):
        patches = patches[sharpness(patches).argsort(descending=choice == "high")]
    if halves:
        order = bright_detail(patches).argsort(stable=True)
        half = order[MANY // 2 :] if choice == "detailed" else order[: MANY // 2]
        chosen = patches[half.sort().values]
        if choice == "exchanged":
            chosen[0] = patches[order[-1]]
        patches = chosen
    return patches[:n]


# ---- 3  Networks: which architectures are compared? ---------------------------------------------
#
# Three networks of different kinds: plain convolutions, convolutions at several resolutions, and
# attention.  Each takes degraded images (n, 3, h, w) of any size and returns restored ones.  Each
# adds its input to what it computes, as most restoration networks do:
#
#     output = input + change(input)
#
# So the layers compute only a change.  In rain, this change should be the rain, with a minus.  The
# network can find the rain by how rain looks, or by how the image would look without rain.

# partial(f, a=1) is the function f with the argument a=1 already given.
conv3x3 = partial(Conv2d, kernel_size=3, padding=1)  # conv3x3(inputs, outputs) keeps h and w
conv1x1 = partial(Conv2d, kernel_size=1)


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
    return pad(images, (0, right, 0, bottom), mode)


def crop(images, like):
    """Undo pad_to_multiple: cut images to the height and width of others."""
    return images[..., : like.shape[-2], : like.shape[-1]]


class ResNet(Module):
    """A convolution, residual blocks, a convolution (after He et al. 2016).

    With 4 blocks, an output pixel depends on 21 x 21 pixels of the input.
    """

    def __init__(self, channels=16, blocks=4):
        super().__init__()
        self.head = conv3x3(3, channels)
        self.body = ModuleList()
        for _ in range(blocks):
            self.body.append(
                Sequential(conv3x3(channels, channels), ReLU(), conv3x3(channels, channels))
            )
        self.tail = conv3x3(channels, 3)

    def forward(self, degraded):
        features = self.head(degraded)  # (n, channels, h, w)
        for block in self.body:
            features = features + block(features)
        return degraded + self.tail(features)


def two_convolutions(inputs, outputs):
    """Return two convolutions, each with a ReLU behind it."""
    return Sequential(conv3x3(inputs, outputs), ReLU(), conv3x3(outputs, outputs), ReLU())


class UNet(Module):
    """Convolutions at three resolutions, from fine to coarse and back (Ronneberger et al. 2015).

    On the way down, the sides halve (by max-pooling) and the channels double.  On the way up, each
    resolution gets back its features from the way down, as its first channels; the enlarged coarse
    features follow.
    An output pixel depends on 44 x 44 pixels of the input.
    """

    def __init__(self, channels=16):
        super().__init__()
        c = channels
        self.down1 = two_convolutions(3, c)
        self.down2 = two_convolutions(c, 2 * c)
        self.bottom = two_convolutions(2 * c, 4 * c)
        # A transposed convolution of size 2 and stride 2: each pixel becomes 2 x 2 pixels.
        self.enlarge2 = ConvTranspose2d(4 * c, 2 * c, 2, 2)
        self.up2 = two_convolutions(4 * c, 2 * c)
        self.enlarge1 = ConvTranspose2d(2 * c, c, 2, 2)
        self.up1 = two_convolutions(2 * c, c)
        self.tail = conv1x1(c, 3)

    def forward(self, degraded):
        image = pad_to_multiple(degraded, 4)
        fine = self.down1(image)  # (n, c, h, w)
        middle = self.down2(max_pool2d(fine, 2))  # (n, 2 c, h / 2, w / 2)
        coarse = self.bottom(max_pool2d(middle, 2))  # (n, 4 c, h / 4, w / 4)

        middle = self.up2(cat([middle, self.enlarge2(coarse)], 1))
        fine = self.up1(cat([fine, self.enlarge1(middle)], 1))
        return crop(image + self.tail(fine), degraded)


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

    Windows follow each other row by row, and so do the pixels within a window.  Note that the
    channels come last here.  h and w must be multiples of `window`.  The numbers may be of any
    type.  (shift_mask, below, cuts an image of whole numbers.)
    """
    n, h, w, c = image.shape
    cut = image.view(n, h // window, window, w // window, window, c)
    # Axes 0 to 5 now: image, row of windows, row in the window, column of windows, column in the
    # window, channel.  transpose(2, 3) brings the two axes that count windows next to each other.
    # Then reshape joins axes 0 to 2 to one, and the two axes inside the window to another.
    return cut.transpose(2, 3).reshape(-1, window * window, c)


def from_windows(windows: Tensor, window: int, shape: tuple) -> Tensor:
    """Undo to_windows; shape is that of the images, (n, h, w, c)."""
    n, h, w, c = shape
    cut = windows.view(n, h // window, w // window, window, window, c)
    return cut.transpose(2, 3).reshape(shape)


def shift_mask(h: int, w: int, window: int) -> Tensor:
    """Return what is added to scores of attention in a rolled image (h, w): 0 or -100.

    The image was rolled up and to the left by window // 2.  The mask has the shape (windows,
    window * window, window * window); windows are those of to_windows.  Take two pixels of one
    window.  If the row of one came in from the opposite edge and the row of the other did not, it
    is -100.  If the column of one came in and the column of the other did not, it is -100, too.
    Otherwise it is 0.
    """

    def rolled_in(side):
        """Tell which rows (or columns) came in from the opposite edge."""
        return arange(side) >= side - window // 2

    # Each pixel gets a number: 2 if its row came in, plus 1 if its column came in.  Two pixels may
    # see each other if their numbers are equal.
    region = 2 * rolled_in(h)[:, None] + rolled_in(w)  # (h, w)
    # to_windows needs an axis of images and one of channels.
    region = to_windows(region[None, :, :, None], window)[..., 0]  # (windows, window * window)
    # Compare each pixel of a window with each other one.
    return where(region[:, :, None] == region[:, None], 0.0, -100.0)


class WindowAttention(Module):
    """Multi-head attention within windows, with a relative position bias (Liu et al. 2021).

    Each pixel makes three vectors: a query (what it looks for), a key (what it offers to others)
    and a value (what it passes on).  The score of two pixels is the dot product of one's query and
    the other's key.  A sum of many products is large, so it is divided by the square root of how
    many numbers a key has.  Then a bias is added, and the mask.

    The channels are divided among several heads, so that each head can look for something else.
    Each head does all this with its own channels.  The linear layer `qkv` makes all queries, then
    all keys, then all values.  In each of these three, the channels of head 0 come first, then
    those of head 1, and so on.

    Queries and keys do not tell where a pixel lies.  The bias adds this.  It depends only on how
    far, and in which direction, one pixel lies from the other.  In a window of 8, this offset runs
    from -7 to 7 down and from -7 to 7 to the right.  So a head needs only a list of 15 x 15 learned
    numbers for all 64 x 64 pairs of pixels:

        place in the list = (down + 7) * 15 + (right + 7)

    The lists of all heads are the columns of a table with 225 rows, position_bias.
    """

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.project = Linear(dim, dim)
        side = 2 * window - 1  # 15 in a window of 8
        self.position_bias = Parameter(torch.zeros(side * side, heads))

        # Which row of the table belongs to pixels i and j: (n, n).  Here n is not the number of
        # images, but the pixels of a window: n = window * window.  A buffer moves to a GPU with
        # the network.  It is not trained, and not saved (persistent=False).
        place = torch.cartesian_prod(arange(window), arange(window))  # (n, 2): row, column
        # (n, n, 2): from pixel j to pixel i, plus 7 (in a window of 8), so that it is not negative.
        offset = place[:, None] - place + window - 1
        self.register_buffer("table_row", offset[..., 0] * side + offset[..., 1], persistent=False)

    def forward(self, windows, mask):
        """Attend within windows (b, n, c), where n = window * window.

        mask: (windows of an image, n, n), added to the scores of every image's windows; or None.
        """
        b, n, c = windows.shape
        qkv = self.qkv(windows).view(b, n, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, n, c / heads)

        # mT swaps the last two axes, so that every query meets every key: (b, heads, n, n).
        scores = query @ key.mT / sqrt(c // self.heads)
        # position_bias[table_row] is (n, n, heads).  The heads move to the front: (heads, n, n).
        scores = scores + self.position_bias[self.table_row].permute(2, 0, 1)
        if mask is not None:
            # The masks of one image are repeated for every image; None is an axis for the heads.
            scores = scores + mask.repeat(b // len(mask), 1, 1)[:, None]
        collected = scores.softmax(-1) @ value  # (b, heads, n, c / heads)
        # The channels of all heads are put side by side again.
        return self.project(collected.transpose(1, 2).reshape(b, n, c))


class SwinBlock(Module):
    """Attention within windows, then a perceptron for each pixel (Liu et al. 2021).

    Each of the two normalizes its input first (LayerNorm: over the channels of each pixel), and
    adds its output to its input.  The perceptron (MLP) is two linear layers with a GELU, a smooth
    ReLU, between them.  With a shift (half a window), the image is rolled before it is cut into
    windows, and rolled back after.
    """

    def __init__(self, dim, heads, window, shift, hidden):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm = LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window)
        self.perceptron = Sequential(
            LayerNorm(dim), Linear(dim, hidden), GELU(), Linear(hidden, dim)
        )

    def forward(self, image):
        """Map features (n, h, w, c) to features of the same shape."""
        _, h, w, _ = image.shape
        mask = shift_mask(h, w, self.window).to(image.device) if self.shift else None
        rolled = self.norm(image).roll((-self.shift, -self.shift), (1, 2))
        attended = self.attention(to_windows(rolled, self.window), mask)
        attended = from_windows(attended, self.window, image.shape)
        image = image + attended.roll((self.shift, self.shift), (1, 2))
        return image + self.perceptron(image)


class SwinGroup(Module):
    """Swin blocks, every second one shifted, then a convolution; added to their input."""

    def __init__(self, dim, depth, heads, window, hidden):
        super().__init__()
        self.blocks = Sequential()
        for i in range(depth):
            # The shift is 0 in the first block, half a window in the second, and so on.
            self.blocks.append(SwinBlock(dim, heads, window, i % 2 * (window // 2), hidden))
        self.conv = conv3x3(dim, dim)

    def forward(self, image):
        features = self.blocks(image).permute(0, 3, 1, 2)  # (n, c, h, w), as convolutions need it
        return image + self.conv(features).permute(0, 2, 3, 1)


class SwinIR(Module):
    """SwinIR (Liang et al. 2021): groups of Swin blocks between convolutions.

    It computes what the published network computes for denoising, where the output has the size of
    the input.  The arguments have the published names.  embed_dim: channels.  depths, num_heads:
    blocks and heads of each group.  window_size: side of a window.  mlp_ratio: the hidden layer of
    a perceptron has mlp_ratio times as many channels.
    """

    def __init__(
        self,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        mlp_ratio=2.0,
    ):
        super().__init__()
        self.window = window_size
        self.first = conv3x3(3, embed_dim)
        self.norm_first = LayerNorm(embed_dim)
        self.groups = Sequential()
        for depth, heads in zip(depths, num_heads, strict=True):
            sizes = (depth, heads, window_size, int(embed_dim * mlp_ratio))
            self.groups.append(SwinGroup(embed_dim, *sizes))
        self.norm_last = LayerNorm(embed_dim)
        self.after_groups = conv3x3(embed_dim, embed_dim)
        self.last = conv3x3(embed_dim, 3)

    def forward(self, degraded):
        # The mean colour of DIV2K, a set of photographs.  The published code takes it off, too.
        mean = torch.tensor([0.4488, 0.4371, 0.4040], device=degraded.device).view(3, 1, 1)
        image = pad_to_multiple(degraded, self.window)

        shallow = self.first(image - mean)  # (n, c, h, w)
        deep = self.norm_first(shallow.permute(0, 2, 3, 1))  # (n, h, w, c)
        deep = self.norm_last(self.groups(deep))
        deep = self.after_groups(deep.permute(0, 3, 1, 2))  # (n, c, h, w)

        return crop(image + self.last(deep + shallow), degraded)


NETWORKS = {"resnet": ResNet, "unet": UNet, "swinir": SwinIR}


def build_network(make: type[Module], seed: int = 0, **arguments) -> Module:
    """Return make(**arguments), such as ResNet(channels=8), with weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):  # torch's own random state stays as it was
        torch.manual_seed(seed)
        network = make(**arguments)
    # In channels-last memory, all channels of one pixel come together.  (Usually, all pixels of one
    # channel do.)  Convolutions on a CPU are faster this way.
    return network.to(memory_format=torch.channels_last)


# ---- 4  Evaluation: was the rain removed, and was the background kept? --------------------------
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
# The line need not go through (0, 0).  In each image it may lie higher or lower; only the slope is
# the same for all.  (For this, decoupled_evaluation below takes each image's mean off r.)  Why?
# Think of an output that is the rainy image, only darker.  All its rain is left.  But a line
# through (0, 0) would be less steep, as if rain had been removed.  Damage is different: it is
# measured from slope * r, a line through (0, 0).  So a change of brightness counts as damage.
#
# The two are read together.  No single number can stand alone: a constant image has little rain
# left, and only its damage shows that it is useless.  The paper's own measures split the pixels
# instead.  E_R asks how much was changed where it rained (the wet pixels), E_B how much is wrong
# elsewhere.

RAIN_THRESHOLD = 4 / 255  # a pixel counts as wet if rain changed it by more than 4 grey levels


def rain_mask(rainy: Tensor, clean: Tensor) -> Tensor:
    """Return M (n, 1, h, w), the wet pixels: |rainy - clean| > RAIN_THRESHOLD in any channel.

    M is boolean.  A tolerance of 1e-6 is added to the threshold, as 4 / 255 is rounded.  So a
    difference of exactly 4 grey levels stays dry.
    """
    difference = (rainy - clean).abs().amax(1, keepdim=True)
    return difference > RAIN_THRESHOLD + 1e-6


def decoupled_sums(output, rainy, clean):
    """Return the sums over one image (3, h, w) from which decoupled_measures makes its measures.

    The products of pattern, r and d serve rain_left and damage, as explained above.  "wet
    removed^2" serves E_R, and "dry d * d" serves E_B.  Sums of several images can be added, so a
    set of images need not be in memory at once.  (decoupled_evaluation, below, has the formulas.)
    """
    r = (rainy - clean).double()
    d = (output - clean).double()
    pattern = r - r.mean()  # so that the line may lie at any height
    wet = rain_mask(rainy[None], clean[None])[0].expand_as(clean)

    sums = {
        "all": r == r,  # True everywhere; its sum is the number of values
        "wet": wet,
        "pattern * pattern": pattern * pattern,
        "pattern * d": pattern * d,
        "r * r": r * r,
        "r * d": r * d,
        "d * d": d * d,
        "wet removed^2": (d - r)[wet] ** 2,  # d - r = output - rainy
        "dry d * d": d[~wet] ** 2,
    }
    return {name: terms.sum().item() for name, terms in sums.items()}


def decoupled_measures(parts):
    """Return rain_left, damage, E_R and E_B of a set of images, from a dict of sums for each.

    decoupled_evaluation, below, says what they mean.
    """
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    # Is there rain, and does it vary?  What is below 1e-12 is an error of rounding.
    rain = sums["wet"] > 0 and sums["pattern * pattern"] > 1e-12 * sums["all"]
    slope = sums["pattern * d"] / sums["pattern * pattern"] if rain else 0
    # The sum of (d - slope * r)^2, multiplied out.  Rounding may make it slightly negative.
    rest = sums["d * d"] - 2 * slope * sums["r * d"] + slope**2 * sums["r * r"]

    def rms(squares, count):
        return 255 * sqrt(max(squares, 0) / count) if count else nan

    return {
        "rain_left": 100 * slope if rain else nan,
        "damage": rms(rest, sums["all"]),
        "E_R": rms(sums["wet removed^2"], sums["wet"]),
        "E_B": rms(sums["dry d * d"], sums["all"] - sums["wet"]),
    }


def decoupled_evaluation(output: Tensor, rainy: Tensor, clean: Tensor) -> dict:
    """Measure rain removal and background reconstruction apart, for images (n, 3, h, w) in [0, 1].

    With r = rainy - clean, d = output - clean, and M the wet pixels of rain_mask, returns over all
    pixels and channels of the set:
      rain_left  100 * sum((r - mean r) * d) / sum((r - mean r)^2), in per cent, with each image's
                 mean of r.  100 for the rainy input, 0 for the clean image, below 0 where more was
                 taken than the rain had brought.
      damage     root mean square of d - rain_left / 100 * r, in grey levels from 0 to 255.  0 for
                 the rainy input and for the clean image.
      E_R        root mean square of output - rainy on M, in grey levels: the paper's measure of
                 removal.  Damage raises it, too.
      E_B        root mean square of d outside M, in grey levels: the paper's measure of
                 reconstruction.
      psnr, ssim over whole images; ssim is NaN for images below 11 x 11 pixels.
    Where M is empty, or r is the same everywhere in each image, there is no rain to measure:
    rain_left is NaN, and damage is the root mean square of d.  E_R is NaN where M is empty, and E_B
    where M is everything.  Raises ValueError if the shapes differ.
    (E_R, E_B: paper, Section 3.  rain_left and damage are ours.)
    """
    if not output.shape == rainy.shape == clean.shape:
        raise ValueError("output, rainy and clean differ in shape")
    triples = zip(output, rainy, clean)
    measures = decoupled_measures([decoupled_sums(*images) for images in triples])
    measures["psnr"] = psnr(output, clean)
    measures["ssim"] = ssim(output, clean) if min(clean.shape[-2:]) >= 11 else nan
    return measures


def psnr(output: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio, -10 log10(MSE) dB, of images (n, 3, h, w) in [0, 1].

    It is the mean of the n images' ratios, over RGB; infinite if an image equals its clean one.
    Raises ValueError if the shapes differ.
    """
    if output.shape != clean.shape:
        raise ValueError("output and clean differ in shape")
    mse = ((output - clean).double() ** 2).mean((1, 2, 3))  # (n,)
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
    window = exp(-(arange(-5, 6).double() ** 2) / 4.5)  # 2 sigma^2 = 4.5
    window /= window.sum()

    # The 11 x 11 window is a column times a row, so two thin convolutions do the work of one.
    def blur(image):
        columns = conv2d(image[None], window.view(1, 1, 11, 1))  # (1, h - 10, w)
        return conv2d(columns, window.view(1, 1, 1, 11))  # (1, h - 10, w - 10)

    total = 0
    # x: a channel of an output, (h, w); y: the same of the clean image.
    for x, y in zip(output.flatten(0, 1).double(), clean.flatten(0, 1).double()):
        mean_x = blur(x)
        mean_y = blur(y)
        # v_x + v_y.  A variance is the mean of the squares minus the square of the mean.
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
        denominator = (mean_x**2 + mean_y**2 + 1e-4) * (variances + 9e-4)
        total += (numerator / denominator).mean().item()
    return total / (3 * len(clean))


@no_grad()
def predict(network: Module, images: Tensor) -> Tensor:
    """Return the network's output for images (n, 3, h, w), on the CPU, limited to [0, 1].

    The network sees 16 images at a time, to bound the memory.  No network here has dropout or batch
    normalization, so network.eval() would change nothing.
    """
    device = next(network.parameters()).device
    outputs = []
    for chunk in images.split(16):
        outputs.append(network(chunk.to(device)).clamp(0, 1).cpu())
    return cat(outputs)


def restore(network: Module, image: Tensor, tile: int = 512) -> Tensor:
    """Restore an image (3, h, w) of any size, tile by tile, to bound the memory.

    Each tile is restored together with `margin` pixels around it, which are then cut off, so that
    its pixels see the same neighbours as in the whole image.  (This is not quite so
    for VQGANPrior, in section 6: its normalization and attention use all pixels of a tile.)
    """
    margin = 32  # An output pixel of the three networks depends on at most 23 pixels to each side.
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


# ---- 5  Training: what does a network learn from? -----------------------------------------------
#
# From pairs: a clean patch, which is one of n backgrounds, and the same patch in rain that is drawn
# anew at every step.  The number of steps is fixed, whatever n is: a network with 8 backgrounds
# sees each of them more often, but does not train longer.

BATCH = 8  # patches in a step
RATE = 2e-3  # learning rate at the start


def cosine_decay(step, steps):
    """Return the factor of the learning rate at a step: it falls from 1 to 0 along a cosine."""
    return 0.5 * (1 + cos(pi * step / steps))


def make_progress(label, total):
    """Return a function report(done, note), which prints a line every few seconds.

    The line tells how far a job of `total` steps is, and the time that it will still take.  Without
    a label, nothing is printed.  (This only prints; skip it on first reading.)
    """
    begun = printed = monotonic()

    def report(done, note):
        nonlocal printed
        now = monotonic()
        if label and (now - printed > 4 or done == total):
            left = (now - begun) / done * (total - done)
            # One string with its end of line, as two threads print in section 7, and their lines
            # should not mix.
            print(f"{label}: {done} of {total} {note}, {left:.0f} s left\n", end="", flush=True)
            printed = now

    return report


def train(
    network: Module,
    backgrounds: Tensor,
    degrade: Callable,
    steps: int,
    seed: int = 0,
    label: str = "",
    after_step: Callable = None,
) -> list:
    """Train a network in place to undo a degradation; return the loss of every step.

    backgrounds: clean patches (n, 3, h, w) in [0, 1].
    Each step draws BATCH backgrounds with replacement, mirrors each (left to right) with a chance
    of one half, degrades them by one call degrade(clean, rng), and takes a step of Adam that lowers
    the mean absolute error (L1).  The global random generators are neither used nor set.
    The learning rate is RATE times cosine_decay(step, steps), with steps counted from 0.
    A network may bring its own network.loss(degraded, clean) in place of L1, and its own
    network.rate in place of RATE, as VQGANPrior does in section 6.
    label: what progress is printed under; nothing is printed without one.
    after_step: called after each step with the number of steps done, to measure while training.
    """
    # These networks are small: a second thread gains little, and costs much when cores are busy.
    torch.set_num_threads(1)
    device = next(network.parameters()).device
    optimizer = Adam(network.parameters(), fused=True)  # fused: all weights at once, faster
    rate = getattr(network, "rate", RATE)
    own_loss = getattr(network, "loss", None)
    report = make_progress(label, steps)
    losses = []

    for step in range(steps):
        rng = stream(seed, "training", step)
        clean = backgrounds[from_numpy(rng.integers(len(backgrounds), size=BATCH))]
        mirrored = from_numpy(rng.random((BATCH, 1, 1, 1)) < 0.5)
        clean = where(mirrored, clean.flip(-1), clean)
        degraded = degrade(clean, rng)

        clean = clean.to(device)
        degraded = degraded.to(device)
        if own_loss:
            loss = own_loss(degraded, clean)
        else:
            loss = l1_loss(network(degraded), clean)

        # This sets Adam's learning rate.
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        losses.append(loss.item())
        report(step + 1, f"steps, loss {losses[-1]:.4f}")
        if after_step:
            after_step(step + 1)
    return losses


# ---- 6  Content prior: can a network be made to draw nothing but clean images? ------------------
#
# Few backgrounds are one way to make a network learn images.  Another is a content prior: a network
# that knows nothing but clean images.  Ours is a VQGAN (Esser et al. 2021; "VQ" stands for vector
# quantization, "GAN" for a loss that we leave out).  It is an autoencoder: a network that
# learns to give its input back.  On the way, the image must pass a bottleneck:
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


def group_norm(channels):
    """Return a normalization over groups of channels: 4 in each, or more if there are above 128.

    A normalization takes off the mean over all pixels.  Alone, each channel would lose its mean,
    and with it the brightness of the patch.  In a group, only the mean of all its channels is lost.
    One channel can still be higher than another, and so keep the brightness.
    """
    return GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(Module):
    """Two convolutions, each after a normalization and a SiLU; added to the input (n, c, h, w).

    A SiLU is a smooth ReLU.  If the number of channels changes, a 1 x 1 convolution adapts the
    input; nin_shortcut is its published name.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.nin_shortcut = conv1x1(inputs, outputs) if inputs != outputs else Identity()

    def forward(self, x):
        y = self.conv1(silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(silu(self.norm2(y)))


class PixelAttention(Module):
    """Attention among all pixels, with a single head; added to the input (n, c, h, w).

    It is used only on coarse grids, which have few pixels, so no windows are needed.
        Queries, keys and values are made from the normalized input by 1 x 1 convolutions; scores
        are
    divided by the root of c.  A fourth 1 x 1 convolution, proj_out, comes last.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        for name in ("q", "k", "v", "proj_out"):  # self.q is the query's, and so on
            self.add_module(name, conv1x1(channels, channels))

    def forward(self, x):
        y = self.norm(x)
        # Each of these is (n, h * w, c): pixels in a row, with their channels.
        query, key, value = [layer(y).flatten(2).mT for layer in (self.q, self.k, self.v)]
        # The softmax of query @ key.mT / sqrt(c), then @ value, as in WindowAttention.
        collected = scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(collected.mT.reshape(x.shape))


def named(**parts):
    """Return a Sequential whose parts have names, such as those of a published checkpoint."""
    return Sequential(OrderedDict(parts))


class Level(Module):
    """The residual blocks of one resolution, each followed by attention or by nothing."""

    def __init__(self, inputs, outputs, blocks, attention):
        super().__init__()
        self.block = ModuleList()
        self.attn = ModuleList()
        for i in range(blocks):
            self.block.append(ResidualBlock(outputs if i else inputs, outputs))
            self.attn.append(PixelAttention(outputs) if attention else Identity())

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return x


def middle(channels):
    """Return what encoder and decoder have at the lowest resolution: block, attention, block."""
    return named(
        block_1=ResidualBlock(channels, channels),
        attn_1=PixelAttention(channels),
        block_2=ResidualBlock(channels, channels),
    )


class Encoder(Module):
    """From an image to what quant_conv makes the latent of, level by level.

    widths: the channels of each level; the sides halve from one level to the next.  ch: channels of
    the first convolution.  blocks: residual blocks of a level.  attention: a list that says, for
    each level, whether it has attention.  z_channels: channels of the output.
    """

    def __init__(self, ch, widths, blocks, attention, z_channels):
        super().__init__()
        self.conv_in = conv3x3(3, ch)
        self.down = ModuleList()
        # Each level takes what the one before it gave.
        for inputs, width, attends in zip([ch, *widths], widths, attention):
            level = Level(inputs, width, blocks, attends)
            # As published: pad at the right and the bottom, then halve.
            level.downsample = named(pad=ZeroPad2d((0, 1, 0, 1)), conv=Conv2d(width, width, 3, 2))
            self.down.append(level)
        self.down[-1].downsample = Identity()  # the last level keeps its size
        self.mid = middle(width)  # of the last level
        self.norm_out = group_norm(width)
        self.conv_out = conv3x3(width, z_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        x = self.mid(x)
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(Module):
    """Latent to image: the levels of the encoder in reverse, each with one block more.

    up[0] is the level with the resolution of the image, and comes last.
    """

    def __init__(self, widths, blocks, attention, z_channels):
        super().__init__()
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = ModuleList()
        # The levels run from the last to the first.  So level i takes the output of level i + 1.
        # The last level takes the output of self.mid.
        for inputs, width, attends in zip([*widths[1:], widths[-1]], widths, attention):
            level = Level(inputs, width, blocks + 1, attends)
            level.upsample = named(repeat=Upsample(scale_factor=2), conv=conv3x3(width, width))
            self.up.append(level)
        self.up[0].upsample = Identity()  # level 0 has the image's size already
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(silu(self.norm_out(x)))


class Codebook(Module):
    """Vector quantization: replaces each vector by the nearest code (van den Oord et al. 2017).

    To choose the nearest code is a step function: it has no useful gradient, so the encoder in
    front of it would not learn.  The straight-through estimator pretends that the codebook was not
    there: on the way back, the gradient of the output is handed to the input unchanged.  This is
    not the true gradient.  It is computed at the code, but it moves the latent.  If the two are
    near each other, the direction that improves the image is about the same for both.  In code,

        output = latent + (quantized - latent).detach()

    has the value of `quantized`, as latent - latent is 0.  What is detached counts as a constant.
    So the gradient goes to `latent` alone.

    Two problems remain.  The codes get no gradient at all, so they do not learn.  And nothing keeps
    the latents near their codes.  A loss of two terms pulls both together.
    Both terms are the squared distance of a latent and its code.  In one the code is detached, so
    only the latent moves; in the other the latent is detached, so only the code moves.
    """

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        # An Embedding is a table of learned vectors: it takes row numbers, and returns the rows.
        self.embedding = Embedding(n_embed, embed_dim)

    def forward(self, latent):
        """Return the quantized latent, the indices of its codes, and the loss.

        latent and quantized latent: (n, embed_dim, h, w).  indices: (n, h, w).  Both terms of the
        loss are means over all elements; the term that moves the latents has the weight 1, the one
        that moves the codes 0.25, as in VQGAN's published code.
        """
        vectors = latent.permute(0, 2, 3, 1)  # (n, h, w, embed_dim)
        # cdist gives the distance of each vector of one list to each of another: here of a row of
        # the latent, and of the codebook.  The axes None let one codebook serve all rows and
        # images.
        distances = torch.cdist(vectors, self.embedding.weight[None, None])  # (n, h, w, n_embed)
        indices = distances.argmin(-1)
        quantized = self.embedding(indices).permute(0, 3, 1, 2)

        moves_latents = mse_loss(latent, quantized.detach())
        moves_codes = mse_loss(quantized, latent.detach())
        quantized = latent + (quantized - latent).detach()  # straight-through
        return quantized, indices, moves_latents + 0.25 * moves_codes


class VQGAN(Module):
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
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attn_resolutions=(16,),
        resolution=256,
        z_channels=256,
        n_embed=1024,
        embed_dim=256,
    ):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        attention = [resolution // 2**level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = Encoder(ch, widths, num_res_blocks, attention, z_channels)
        self.decoder = Decoder(widths, num_res_blocks, attention, z_channels)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = conv1x1(z_channels, embed_dim)
        self.post_quant_conv = conv1x1(embed_dim, z_channels)

    def encode(self, image):
        """Return the latent (n, embed_dim, h', w') of images (n, 3, h, w), before quantization."""
        return self.quant_conv(self.encoder(image))

    def decode(self, quantized):
        """Return the images (n, 3, h, w) of quantized latents (n, embed_dim, h', w')."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, image):
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


def pretrain(vqgan: VQGAN, images: list, steps: int, seed: int = 0, label: str = ""):
    """Train a VQGAN in place, to give clean patches of images (3, h, w) in [0, 1] back.

    The published VQGAN was trained with two more losses: a perceptual one, which compares features
    of a network that was trained on other photographs, and an adversarial one.  This one
    comes from a second network, which learns to tell the VQGAN's images from photographs.  They
    make details look real.  Here there are neither; L1 and the loss of the codebook suffice to see
    what a content prior does.

    For the first 30 % of the steps the codebook is left out.  With it from the start, the latents
    would be pulled to codes that mean nothing yet, and the network would learn to draw hardly more
    than grey.

    A code moves only if it is chosen.  One that is far from all latents is never chosen, so it
    stays far and is wasted.  So a code that was not chosen for more than 30 steps is replaced by a
    vector of the latents at hand.  `idle` counts these steps.  It starts at 31, so that the
    random codes of the start are soon replaced: in each step, as many as there are vectors at hand.
    """
    torch.set_num_threads(1)  # as in `train`
    codes = vqgan.quantize.embedding.weight  # (n_embed, embed_dim)
    idle = torch.full(codes.shape[:1], 31, device=codes.device)  # steps since a code was chosen
    optimizer = Adam(vqgan.parameters(), betas=(0.5, 0.9), fused=True)  # betas as published
    report = make_progress(label, steps)

    for step in range(steps):
        rng = stream(seed, "pretraining", step)
        # GroupNorm takes the mean over all pixels of a patch.  So a network that saw one size of
        # patches only might work at this size only.  Therefore two sizes take turns.
        n, side = (2, 80) if step % 2 else (8, 40)
        clean = 2 * sample_patches(images, n, side, rng).to(codes.device) - 1
        # (n, embed_dim, h', w').  In the first 30 % of the steps, "quantized" stays the bare
        # latent.
        quantized = latent = vqgan.encode(clean)
        codebook_loss = 0

        if step >= 0.3 * steps:
            vectors = latent.detach().permute(0, 2, 3, 1).flatten(0, 2)  # (n h' w', embed_dim)
            # Replace unused codes by vectors that are picked at random, each at most once.
            unused = (idle > 30).nonzero()[: len(vectors), 0]
            picked = rng.permutation(len(vectors))[: len(unused)]
            codes.data[unused] = vectors[from_numpy(picked)]  # .data: not seen by autograd
            idle[unused] = 0
            quantized, indices, codebook_loss = vqgan.quantize(latent)
            idle += 1
            idle[indices.flatten()] = 0

        loss = l1_loss(vqgan.decode(quantized), clean) + codebook_loss
        # A warm-up: the rate rises from 0, as Adam's first steps rest on very few gradients.
        rate = 1e-3 * min(1, step / 50)
        optimizer.param_groups[0]["lr"] = rate * cosine_decay(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1, f"steps, loss {loss.item():.4f}")


class VQGANPrior(Module):
    """A restoration network that draws with the codes of clean images only.

    It starts from a pre-trained VQGAN.  The codebook and the decoder are frozen: their weights do
    not change any more, so whatever comes out was assembled from codes of clean images.  The
    encoder is fine-tuned: it learns to find, in a degraded image, the codes of the clean one.

        degraded --encoder (learns)--> latent --codebook--> codes --decoder--> restored
                                          ^         (codebook and decoder: frozen)
                                          |  should be near to
                                          v
           clean --teacher, codebook--> codes

    Gradients pass through frozen layers, and straight through the codebook, to the encoder.
    The teacher is a copy of the encoder as it was pre-trained.  It gives the codes of the clean
    image.  If the learning encoder gave them, they would change while it learns.

    vqgan: a VQGAN, which is copied; or the arguments of one, whose weights load_checkpoint (section
    8) sets later.  Images in and out are in [0, 1].
    """

    rate = 5e-4  # for `train`: at a higher learning rate the encoder forgets what it was taught

    def __init__(self, vqgan):
        super().__init__()
        self.vqgan = VQGAN(**vqgan) if isinstance(vqgan, dict) else deepcopy(vqgan)
        # The encoder in two parts.  These are the layers of self.vqgan themselves, not copies.
        # Below, all weights are frozen first, then those of the encoder are set free again.  The
        # teacher is a copy, so it stays frozen.  (Adam skips weights that have no gradient.)
        encoder = Sequential(self.vqgan.encoder, self.vqgan.quant_conv)
        self.teacher = deepcopy(encoder)
        self.requires_grad_(False)
        encoder.requires_grad_(True)

    def prepare(self, image):
        """Return an image (n, 3, h, w) as the encoder takes it: padded, and in [-1, 1]."""
        # Each level except the last halves the sides.
        return 2 * pad_to_multiple(image, 2 ** (len(self.vqgan.encoder.down) - 1)) - 1

    def draw(self, latent, shape):
        """Return what the decoder draws from the codes nearest to a latent, cut to a shape.

        The image (n, 3, h, w) should lie in [0, 1], but may go beyond; `predict` limits it.
        """
        quantized, _, _ = self.vqgan.quantize(latent)
        return (self.vqgan.decode(quantized)[..., : shape[2], : shape[3]] + 1) / 2

    def forward(self, degraded):
        return self.draw(self.vqgan.encode(self.prepare(degraded)), degraded.shape)

    def loss(self, degraded, clean):
        """Return the loss of fine-tuning for a batch: a distance of latents, and L1 of images.

        The first is the mean squared distance of the degraded image's latent, before quantization,
        from the quantized latent that the teacher makes of the clean image.
        """
        with no_grad():
            clean_codes, _, _ = self.vqgan.quantize(self.teacher(self.prepare(clean)))
        latent = self.vqgan.encode(self.prepare(degraded))
        return mse_loss(latent, clean_codes) + l1_loss(self.draw(latent, clean.shape), clean)


# ---- 7  Main job: do fewer backgrounds make a network remove rain that it never saw? ------------
#
# Two copies of one network start from the same weights and are trained side by side in the same
# rain, one on few backgrounds, one on many.  While they train, both are measured on other images,
# in rain of the training range and in unseen rain.

IMAGE = 256  # side of a drawn background, in pixels
TEST_PATCHES, TEST_PATCH = 16, 128  # test images: how many, and their side in pixels
OUTPUTS = ("rainy", "opening 5", "opening 7", "few", "many")  # what the main job measures


def untrained(rainy):
    """Return what every network is compared with: the rainy images, and two openings of them."""
    return {"rainy": rainy, "opening 5": opening(rainy), "opening 7": opening(rainy, 7)}


def test_images(held_out, rain, seed):
    """Return clean test images, the same in rain, and the openings of these."""
    clean = sample_patches(held_out, TEST_PATCHES, TEST_PATCH, stream(seed, "test patches"))
    rainy = rain_degradation(RAIN[rain])(clean, stream(seed, "test", rain))
    return {"clean": clean, **untrained(rainy)}


def few_against_many(
    training: list,
    held_out: list,
    few: int = 8,
    many: int = MANY,
    net: str = "resnet",
    rain: str = "small",
    steps: int = 1600,
    seed: int = 0,
    device: str = "cpu",
) -> tuple:
    """Train one network on few backgrounds and its twin on many; measure both while they train.

    training, held_out: images (3, h, w) to learn from, and others to test on.
    Returns rows and pictures.  A row holds a step, a rain ("unseen", or the one of training), an
    output (one of OUTPUTS), its number n of backgrounds (0 if it was not trained), and its measures
    over all test images after that step.
    pictures[rain][output] holds the images at the end; pictures[rain]["clean"] the clean ones.
    """
    pictures = {kind: test_images(held_out, kind, seed) for kind in ("unseen", rain)}
    numbers = {"few": few, "many": many}
    networks = {name: build_network(NETWORKS[net], seed).to(device) for name in numbers}
    # The steps at which to measure, counted back from the last one, which is one of them.
    points = range(steps, 0, -max(1, steps // 16))
    rows = []
    # The threads look at this list after each step.  Once it holds something, they end, for example
    # after Ctrl-C.
    stopped = []

    def measure(name, when):
        """Append the rows of an output, as it is now, for all steps in `when`."""
        for kind, images in pictures.items():
            if name in networks:
                images[name] = predict(networks[name], images["rainy"])
            measures = decoupled_evaluation(images[name], images["rainy"], images["clean"])
            about = {"rain": kind, "output": name, "n": numbers.get(name, 0)}
            rows.extend({"step": step, **about, **measures} for step in when)

    def after_step(name, step):
        if stopped:
            raise KeyboardInterrupt
        if step in points:
            measure(name, [step])

    # Each network is trained in a thread of its own.  A GPU does better with one after the other.
    degrade = rain_degradation(RAIN[rain])
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        jobs = []
        try:
            for name, n in numbers.items():
                patches = training_patches(training, n, seed)
                options = (steps, seed, f"{n} backgrounds", partial(after_step, name))
                jobs.append(pool.submit(train, networks[name], patches, degrade, *options))
            for name in OUTPUTS[:3]:  # these are never trained, so they are the same at all steps
                measure(name, points)
            for job in jobs:
                job.result()  # waits for the thread; raises what went wrong in it
        finally:
            stopped.append(True)  # the threads should not go on alone

    order = [*pictures, *OUTPUTS]
    rows.sort(key=lambda row: (row["step"], order.index(row["rain"]), order.index(row["output"])))
    return rows, pictures


def figure_headline(rows: list, pictures: dict) -> Figure:
    """Draw how much unseen rain is left while both networks train, and the first test image."""
    figure = Figure((11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    top.suptitle("Two copies of one network learn to remove rain.  How much unseen rain is left?")
    axes = top.subplots()
    axes.set(xlabel="training step", ylabel="unseen rain that is left (%)")
    names = {"rainy": "unseen rain", "clean": "clean image"}
    colours = {"few": "#0072b2", "many": "#d55e00", "opening 5": "0.5", "opening 7": "0.5"}

    for output, colour in colours.items():
        curve = [row for row in rows if row["rain"] == "unseen" and row["output"] == output]
        steps = [row["step"] for row in curve]
        left = [row["rain_left"] for row in curve]
        n = curve[0]["n"]
        names[output] = f"{n:,} backgrounds" if n else f"{output} (never trained)"
        axes.plot(steps, left, "o-" if n else "--", color=colour)
        label = f"  {names[output]}: {left[-1]:.0f} %"
        # At the end of the curve of a network; at the left (0) for an opening, whose n is 0.
        axes.text(n and steps[-1], left[-1] + 1, label, color=colour, size=12)
    axes.axis((0, 1.3 * steps[-1], 0, 105))

    for axes, name in zip(bottom.subplots(1, 5), ("rainy", "opening 7", "few", "many", "clean")):
        axes.imshow(pictures["unseen"][name][0].permute(1, 2, 0))
        axes.set(title=names[name], xticks=[], yticks=[])
    return figure


# ---- 8  Files and command line: how are images and networks read, written and used? -------------
#
# Nothing of the paper is in this section; you can stop reading here.  `python derain.py --help`
# lists the commands.


def write_file(path, content):
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


def prepare_folder(file):
    """Make the folder of a file, and try to write into it now, not after hours of training."""
    folder = file.parent
    if file.is_dir():
        raise BadInput(f"{file} is a folder; give the name of a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise BadInput(f"cannot write into {folder}: {problem.strerror}") from None


def write_table(path, rows):
    """Write rows (dicts) as a .csv; what could not be measured (NaN) is an empty cell."""
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(rows[0])
    for row in rows:
        # Only NaN differs from itself.
        table.writerow("" if cell != cell else cell for cell in row.values())
    # surrogateescape: a file may have a name that is not valid text; its bytes are kept.
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def print_table(rows):
    """Print rows (dicts) under a header; what could not be measured (NaN) is "-"."""
    print(*(f"{key:>10}" for key in rows[0]))
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values()]
        print(*(f"{'-' if cell == 'nan' else cell:>10}" for cell in cells))


def save_figure(figure, rows, path):
    """Write a figure as a .png, and the numbers behind it as a .csv of the same name."""
    prepare_folder(path)
    picture = BytesIO()
    # Without the version of matplotlib in it, the file depends less on this version.
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    write_file(path, picture.getvalue())
    write_table(path.with_suffix(".csv"), rows)


def each(work, items, label=""):
    """Return work(item) of all items; where it raises BadInput, print that in one line and go on.

    Raises BadInput if nothing is left.
    """
    report = make_progress(label, len(items))
    results = []
    for done, item in enumerate(items, 1):
        try:
            results.append(work(item))
        except BadInput as problem:
            # split() takes out line breaks, so that it is one line.
            print("skipped:", *str(problem).split(), file=sys.stderr)
        report(done, "files")
    if not results:
        raise BadInput("none of the files can be used")
    return results


# The formats that Pillow decodes itself.  Files of other formats, such as EPS, can contain
# programs, and Pillow hands them to software that runs these.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = Image.registered_extensions()  # {".png": "PNG", ...}


def open_image(path):
    """Decode an image file, upright, as RGB: (3, h, w) in [0, 1].  Raises BadInput if it fails."""
    try:
        picture = Image.open(path, formats=FORMATS)
        if picture.width * picture.height > 100e6:
            raise ValueError("it has more than 100 megapixels; make it smaller")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # grey of 16 bits, which convert() would clip
            array = np.array(picture)[..., None] / 257  # (h, w, 1), from 0 to 255
        else:
            array = np.array(picture.convert("RGB"))
    except Exception as problem:  # decoders fail in as many ways as files are damaged
        raise BadInput(f"{path} cannot be read as an image: {problem}") from None
    return from_numpy(array).float().permute(2, 0, 1).expand(3, -1, -1) / 255


def save_image(image, path):
    """Write an image (3, h, w) in [0, 1], in the format that the path's suffix names."""
    kind = SUFFIXES.get(path.suffix.lower())
    if kind not in FORMATS:
        raise BadInput(f"{path} should end in .png, .jpg or the like ({' '.join(FORMATS)})")
    array = (255 * image).round().byte().permute(1, 2, 0).numpy()
    content = BytesIO()
    Image.fromarray(array).save(content, kind, quality=95)
    write_file(path, content.getvalue())


def image_files(folder):
    """Return the image files in a folder and its subfolders, sorted; BadInput if there are none."""
    files = [file for file in folder.rglob("*") if SUFFIXES.get(file.suffix.lower()) in FORMATS]
    if not files:
        raise BadInput(f"{folder} is no folder with images ({' '.join(FORMATS)})")
    return sorted(files)


def load_images(path: Path, smallest: int = 1) -> list:
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


def training_and_held_out(path, seed):
    """Return images (3, h, w) to train on and others to test on.

    They are three quarters and one quarter of the photographs in `path`, or drawn faces if there is
    no path.  Raises BadInput if fewer than two photographs can be used.
    """
    if not path:
        faces = [from_numpy(draw_face(IMAGE, stream(seed, "backgrounds", i))) for i in range(80)]
        return faces[:64], faces[64:]
    images = load_images(path, smallest=TEST_PATCH)
    if len(images) < 2:
        raise BadInput(f"{path} has one photograph; give two or more, to train and to test on")
    images = [images[i] for i in stream(seed, "split").permutation(len(images))]
    count = max(1, len(images) // 4)
    return images[count:], images[:count]


def save_checkpoint(path: Path, network: Module, net: str, arguments: dict):
    """Write a network's weights, its kind ("resnet", "prior", "vqgan", ...), and its arguments."""
    content = {"format": 2, "net": net, "arguments": arguments}
    file = BytesIO()
    torch.save({**content, "state_dict": network.state_dict()}, file)
    write_file(Path(path), file.getvalue())


def with_weights(make, arguments, weights):
    """Return make(**arguments) with these weights; raises an exception if they do not fit."""
    # First a trial on the device "meta".  A network there has shapes, but takes no memory.  It
    # fails at once if the weights of the file have other shapes.
    with torch.device("meta"):
        make(**arguments).load_state_dict(weights, assign=True)
    network = build_network(make, **arguments)
    network.load_state_dict(weights)
    return network


def load_checkpoint(path: Path) -> Module:
    """Return the restoration network in a file of `train`, on the CPU; nothing in the file is run.

    torch.save writes files with Python's pickle.  Such a file can hold commands, which run when the
    "unpickler" loads it.  weights_only=True refuses them.
        Raises BadInput if the file is anything else, or was written by the first edition
    of this project, whose networks did not add their input.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        make = {**NETWORKS, "prior": VQGANPrior}[content["net"]]
        if content["format"] != 2:
            raise ValueError
        return with_weights(make, content["arguments"], content["state_dict"])
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        raise BadInput(
            f"{path} is no network of this edition's `derain.py train` ({type(problem).__name__})"
        ) from None


class Placeholder:
    """Takes the place of a class that a checkpoint asks for, but that we do not want to run.

    load_vqgan, below, uses it.  The unpickler calls both methods; they do nothing.
    """

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def load_vqgan(path: Path) -> VQGAN:
    """Return the VQGAN in a file of `vqgan`, or in a published one, on the CPU.

    Published ones are those of Esser et al. (2021) with latents 16 times smaller than the image
    (called f = 16).
    They name classes of packages that are not installed here.  Each is replaced by a Placeholder,
    and nothing in the file is run.  Raises BadInput if the file holds no such VQGAN.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        items = content["state_dict"].items()
        weights = {name: value for name, value in items if not name.startswith("loss.")}
        n_embed = len(weights["quantize.embedding.weight"])
        # A published file has no "arguments": all are the defaults, except perhaps n_embed.
        arguments = content.get("arguments", {"n_embed": n_embed})
        vqgan = with_weights(VQGAN, arguments, weights)
    except Exception as problem:  # an unpickler fails in as many ways as files are damaged
        expected = "a file of `derain.py vqgan` or a published VQGAN with f = 16 was expected"
        raise BadInput(f"{path}: {expected} ({type(problem).__name__})") from None
    vqgan.arguments = arguments  # for the checkpoint of a prior
    return vqgan


# The commands.  Each is a function run_NAME.  --help shows the three lines of its docstring: what
# it does, its usage, and an example.  Its arguments are the command's options.  A function that
# works on several files returns how many of them failed.


def run_compare(backgrounds, few, many, net, rain, steps, seed, device, out):
    """Train on few and on many backgrounds, measure in unseen rain, draw headline.png (default).

    derain.py [compare] [OPTIONS]
    example: python derain.py --seed 1
    """
    path = out / "headline.png"
    prepare_folder(path)
    images = training_and_held_out(backgrounds, seed)
    rows, pictures = few_against_many(*images, few, many, net, rain, steps, seed, device)
    print_table(rows[-2 * len(OUTPUTS) :])  # of the last step
    save_figure(figure_headline(rows, pictures), rows, path)


def run_rain(photo, range, seed, output):
    """Add rain to a photograph.

    derain.py rain PHOTO -o FILE [OPTIONS]
    example: python derain.py rain photo.jpg -o rainy.png
    """
    prepare_folder(output)
    degrade = rain_degradation(RAIN[range])
    save_image(degrade(open_image(photo)[None], stream(seed, "rain command"))[0], output)


def run_train(backgrounds, n, choice, net, rain, vqgan, steps, seed, device, output):
    """Train a network, and measure it on images that it was not trained on.

    derain.py train -o MODEL [OPTIONS]
    example: python derain.py train --backgrounds photos/ -o model.pt
    """
    prepare_folder(output)
    training, held_out = training_and_held_out(backgrounds, seed)
    arguments = {}
    if vqgan:
        net = "prior"
        vqgan = load_vqgan(vqgan)
        arguments = {"vqgan": vqgan.arguments}
    network = VQGANPrior(vqgan) if vqgan else build_network(NETWORKS[net], seed)
    network.to(device)
    patches = training_patches(training, n, seed, choice)
    train(network, patches, rain_degradation(RAIN[rain]), steps, seed, net)
    save_checkpoint(output, network, net, arguments)

    rows = []
    for kind in (rain, "unseen"):
        images = test_images(held_out, kind, seed)
        clean = images.pop("clean")
        images[net] = predict(network, images["rainy"])
        for name in images:
            measures = decoupled_evaluation(images[name], images["rainy"], clean)
            rows.append({"rain": kind, "output": name, **measures})
    print(f"on {len(held_out)} images that were not trained on:")
    print_table(rows)


def run_vqgan(backgrounds, steps, seed, device, output):
    """Pre-train a VQGAN, the content prior of train --vqgan.

    derain.py vqgan -o VQGAN [OPTIONS]
    example: python derain.py vqgan --backgrounds photos/ -o vqgan.pt
    """
    prepare_folder(output)
    training, _ = training_and_held_out(backgrounds, seed)
    vqgan = build_network(VQGAN, seed, **PRIOR).to(device)
    pretrain(vqgan, training, steps, seed, "vqgan")
    save_checkpoint(output, vqgan, "vqgan", PRIOR)


def run_restore(model, photos, device, output):
    """Remove the rain of photographs; writes NAME-restored.png.

    derain.py restore MODEL PHOTO... -o FOLDER [OPTIONS]
    example: python derain.py restore model.pt rainy1.jpg rainy2.jpg -o restored/
    """
    network = load_checkpoint(model).to(device)
    files = []
    for photo in photos:
        if photo.is_dir():
            found = image_files(photo)
            files += [file for file in found if not file.stem.endswith("-restored")]
        else:
            files.append(photo)

    sources = {}
    for file in dict.fromkeys(files):  # each once
        target = output / f"{file.stem}-restored.png"
        if target in sources:
            raise BadInput(f"{sources[target]} and {file} would both become {target}; rename one")
        sources[target] = file
    prepare_folder(output / "NAME-restored.png")

    def work(target):
        save_image(restore(network, open_image(sources[target])), target)

    return len(sources) - len(each(work, sources))


def find_pairs(rainy_folder, clean_folder):
    """Return {rainy file: clean file}, for the files in two folders and their subfolders.

    Two files belong together if their paths within the folders are equal; or else their names; or
    else the first numbers in their names.  Suffixes do not count.  A rainy file without a clean one
    has the partner None.  Raises BadInput if there is a choice between two clean files.
    """

    def keys(folder):
        """What each file is recognized by, the surest first."""
        found = {}
        for file in image_files(folder):
            path = file.relative_to(folder)
            number = re.search(r"\d+", path.stem)
            surest = (path, path.with_suffix(""), path.stem)
            # Without a number, the file itself, which is equal to nothing else.
            found[file] = (*surest, int(number[0]) if number else file)
        return found

    rainy = keys(rainy_folder)
    clean = keys(clean_folder)
    # If one folder lies within the other, the outer list also holds the files of the inner folder.
    # So it is the longer list, and the files that are in both lists are deleted from it.
    outer = max(rainy, clean, key=len)
    for file in rainy.keys() & clean.keys():
        del outer[file]

    pairs = {}
    for file, wanted in rainy.items():
        found = []
        for i in range(4):
            found = found or [other for other in clean if clean[other][i] == wanted[i]]
        if len(found) > 1:
            choice = f"{found[0]} or {found[1]}"
            raise BadInput(f"{file} may belong to {choice}; give files of a pair the same name")
        pairs[file] = found[0] if found else None
    return pairs


def run_evaluate(models, rainy, clean, device, output):
    """Measure networks on pairs of rainy and clean images; PSNR and SSIM are on RGB.

    derain.py evaluate MODEL... --rainy FOLDER --clean FOLDER [OPTIONS]
    example: python derain.py evaluate model.pt --rainy Rain100L/rainy --clean Rain100L/norain
    """
    networks = {model.name: load_checkpoint(model).to(device) for model in models}
    if len(networks) < len(models):
        raise BadInput("two models have the same file name; rename one")
    pairs = find_pairs(rainy.resolve(), clean.resolve())
    if output:
        prepare_folder(output)

    def measure(file):
        """Return a row for each output of a pair: its files, its measures, and its sums."""
        partner = pairs[file]
        if partner is None:
            raise BadInput(f"{file} has no clean partner")
        rainy = open_image(file)[None]
        clean = open_image(partner)[None]
        if rainy.shape != clean.shape:
            raise BadInput(f"{file} and {partner} differ in size")

        outputs = untrained(rainy)
        for name, network in networks.items():
            outputs[name] = restore(network, rainy[0])[None]
        rows = []
        for name, output in outputs.items():
            about = {"rainy": file, "clean": partner, "output": name}
            measures = decoupled_evaluation(output, rainy, clean)
            sums = decoupled_sums(output[0], rainy[0], clean[0])
            rows.append({**about, **measures, "sums": sums})
        # Whether there is rain is the same for every output.
        if isnan(measures["rain_left"]):
            print(f"no rain in {file}: left out of rain_left, damage and E_R")
        return rows

    done = each(measure, pairs, "evaluate")
    print_table([row_of_all(rows) for rows in zip(*done)])
    if output:
        rows = sum(done, [])
        for row in rows:
            del row["sums"]
        write_table(output, rows)
    return len(pairs) - len(done)


def row_of_all(rows):
    """Return the measures of one output over all pairs; rows holds one row for each pair.

    The sums of all pairs with rain are pooled, as if they were one set; for E_B, those of all
    pairs.  PSNR and SSIM are means over pairs; the infinite PSNR of an output that equals the clean
    image is left out and reported.
    """
    name = rows[0]["output"]
    sums = [row["sums"] for row in rows]
    with_rain = [row["sums"] for row in rows if not isnan(row["rain_left"])]
    pooled = decoupled_measures(with_rain or sums)
    pooled["E_B"] = decoupled_measures(sums)["E_B"]
    for key in ("psnr", "ssim"):
        values = [row[key] for row in rows]
        finite = [value for value in values if isfinite(value)]
        pooled[key] = sum(finite) / len(finite) if finite else nan
        if inf in values:
            print(f"{name}: {values.count(inf)} infinite PSNR are left out of the mean")
    return {"output": name, "pairs": len(rows), **pooled}


def whole_number(text, least=0):
    """Return the value of an option: a whole number, not below `least`."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise ArgumentTypeError(f"{text!r} is no whole number from {least} to 2^31")
    return int(text)


positive = partial(whole_number, least=1)


def add(parser, names, help, type=Path, **more):
    """Add an argument or an option to a parser; without a type, its value is a path."""
    parser.add_argument(*names.split(), help=help, type=type, **more)


def options(steps=None, rain=None):
    """Return the options that commands share.

    steps: the default of --steps; if given, the options of training are there.
    rain: the default of --rain; if given, --net and --rain are there, too.
    """
    parser = ArgumentParser(add_help=False)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add(parser, "--device", "where to compute", str, choices=devices, default=devices[0])
    if steps:
        add(parser, "--backgrounds", "photographs, 128 x 128 pixels or more; without, drawn faces")
        add(parser, "--steps", "number of training steps", positive, default=steps)
        add(parser, "--seed", "of all random numbers", whole_number, default=0)
    if rain:
        add(parser, "--net", "architecture", str, choices=NETWORKS, default="resnet")
        ranges = ("small", "medium", "large")
        add(parser, "--rain", "range of training rain", str, choices=ranges, default=rain)
    return parser


def make_parser():
    """Return the parser of the command line."""
    parser = ArgumentParser(
        usage="derain.py [COMMAND] [OPTIONS]",
        description="Why do networks fail on rain that they have not seen?",
        epilog="example: python derain.py --seed 1",
    )
    verbs = parser.add_subparsers(
        prog="derain.py", title="commands, each with a --help", metavar="COMMAND"
    )

    def add_verb(run, *parents):
        about, _, usage, example, _ = map(str.strip, run.__doc__.split("\n"))
        verb = verbs.add_parser(
            run.__name__[4:],
            help=about,
            description=about,
            usage=usage,
            epilog=example,
            parents=parents,
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        verb.set_defaults(run=run)
        return verb

    verb = add_verb(run_compare, options(steps=1600, rain="small"))
    add(verb, "--few", "backgrounds of one network", positive, default=8)
    add(verb, "--many", "backgrounds of the other", positive, default=MANY)
    add(verb, "--out", "folder of headline.png", default="figures")

    verb = add_verb(run_rain)
    add(verb, "photo", "image file")
    add(verb, "-o --output", "image file to write", required=True)
    add(verb, "--range", "range of the rain", str, choices=RAIN, default="medium")
    add(verb, "--seed", "of all random numbers", whole_number, default=0)

    # The defaults are the best of eleven settings on photographs: claim `advice` in claims.md.
    verb = add_verb(run_train, options(steps=2400, rain="large"))
    add(verb, "-o --output", "checkpoint to write", required=True)
    add(verb, "--n", "number of backgrounds", positive, default=MANY)
    choices = "low, high: of 3 n patches, the n least sharp, the n sharpest; any: as they come"
    add(verb, "--choice", choices, str, choices=("low", "any", "high", "plain"), default="low")
    add(verb, "--vqgan", "pre-trained content prior to fine-tune, instead of --net")

    verb = add_verb(run_vqgan, options(steps=5000))
    add(verb, "-o --output", "checkpoint to write", required=True)

    verb = add_verb(run_restore, options())
    add(verb, "model", "checkpoint of train")
    add(verb, "photos", "image files, or folders of them", nargs="+")
    add(verb, "-o --output", "folder to write into", required=True)

    verb = add_verb(run_evaluate, options())
    add(verb, "models", "checkpoints of train", nargs="+")
    add(verb, "--rainy", "folder of rainy images", required=True)
    add(verb, "--clean", "folder of their clean images", required=True)
    add(verb, "-o --output", ".csv to write, with a row for each pair")
    return parser


def main(arguments: list = sys.argv[1:]) -> int:
    """Run the command line; return the exit status.

    It is 0, or 1 if some of several files failed, 2 if nothing was done, 130 after Ctrl-C.
    """
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # for names that the terminal cannot show
    # Pillow and torch warn about some of the files that they are given; users need not see it.
    warnings.simplefilter("ignore")
    # If the first argument is an option, or there is none ("--" stands for it), no command was
    # named.  Then the command is `compare`.  Only --help is left as it is.
    first = arguments[0] if arguments else "--"
    if first.startswith("--") and first != "--help":
        arguments = ["compare", *arguments]
    args = vars(make_parser().parse_args(arguments))
    try:
        failed = args.pop("run")(**args)
        return 1 if failed else 0
    except (BadInput, OSError) as problem:
        print("derain.py:", *str(problem).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("derain.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
