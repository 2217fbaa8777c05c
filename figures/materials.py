"""What only the claims need: more backgrounds, more degradations, and the controls of the prior.

1 backgrounds   draw_dead_leaves, draw_manga, draw_urban; draw_background paints any category
2 rain          GROUP, the rain of the paper's group; FACTORS, one factor outside `small`
3 noise         gaussian, correlated, salt_and_pepper; degradation returns any by its name
4 controls      FromNothing and NoCodebook, what the prior is compared with

Conventions are those of derain.py.
"""

import math
from functools import partial
from itertools import product
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import derain

# ---- 1  Backgrounds: which others are there? ----------------------------------------------------
#
# Each painter is a function draw(size, rng) that returns an image (3, size, size).  Shapes are
# described by their signed distance: how far a pixel is from the outline, negative inside.


def inside(distance, softness):
    """Return how much of each pixel a shape covers, 0 to 1, from the signed distance.

    softness: the width of the outline, in the unit of the distance.
    """
    return np.clip(0.5 - distance / softness, 0, 1)


def paint(image, coverage, colour):
    """Lay a colour (3, 1, 1) or (3, h, w) over an image (3, h, w), in place.

    coverage: (h, w), 1 where the colour hides the image, 0 where it leaves it.
    """
    image += coverage * (colour - image)


def repeat(place, count):
    """Return coordinates that run from -0.5 to 0.5 `count` times while `place` runs from 0 to 1."""
    return place * count % 1 - 0.5


def draw_dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw dead leaves: discs that hide one another, as things do in photographs.

    The density of their radii r is r^-3, so that there is as much to see at any scale (Lee,
    Mumford & Huang 2001).  On average a pixel is covered five to six times.
    """
    image = np.zeros((3, size, size), np.float32)
    scene = rng.uniform(0.2, 0.7) + rng.normal(0, 0.08, 3)
    smallest = 2.5 * 4 ** rng.random()
    largest = size / 2 + 10
    # The mean of pi r^2 under the density r^-3.
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest**-2 - largest**-2)

    for _ in range(math.ceil(8 * (size + 2 * smallest) ** 2 / mean_area)):
        share = rng.random()  # the share of discs that are smaller than this one
        radius = (smallest**-2 * (1 - share) + largest**-2 * share) ** -0.5
        centre = rng.uniform(-radius, size + radius, 2)  # x, y
        # Only the part of the image where the disc is has to be painted.
        left, top = np.clip(centre - radius - 2, 0, size).astype(int)
        right, bottom = np.clip(centre + radius + 2, 0, size).astype(int)
        x = (np.arange(left, right) - centre[0]) / radius
        y = (np.arange(top, bottom)[:, None] - centre[1]) / radius

        colour = np.clip(scene + rng.normal(0, 0.2) + rng.normal(0, 0.06, 3), 0.05, 1)
        shading = 1 + rng.normal(0, 0.1) * x + rng.normal(0, 0.1) * y
        disc = inside((np.hypot(x, y) - 1) * radius, 1)
        paint(image[:, top:bottom, left:right], disc, colour=colour[:, None, None] * shading)
    return image


MANGA_SOFT = 1.2  # width of an outline of ink, in pixels of a page of 256


def screentone(x, y, pitch, grey):
    """Return dots of ink on a grid turned by 45 degrees, which cover the share `grey`."""
    u = (x + y) / math.sqrt(2) % pitch - pitch / 2
    v = (x - y) / math.sqrt(2) % pitch - pitch / 2
    return inside(np.hypot(u, v) - pitch * math.sqrt(grey / math.pi), MANGA_SOFT)


def ink_line(distance, thickness):
    """Return the ink of a line where the distance is 0."""
    return inside(abs(distance) - thickness / 2, MANGA_SOFT)


def manga_panel(x, y, rng):
    """Return the ink of a panel's drawing; x and y are measured from its middle."""
    angle = np.arctan2(y, x)
    radius = np.hypot(x, y)

    if rng.random() < 0.5:  # lines of speed towards the middle
        gap = abs(repeat(angle / (2 * math.pi), rng.integers(30, 60))) * radius / 8
        ink = inside(gap - rng.uniform(0.4, 0.9), MANGA_SOFT) * (radius > 60)
    else:  # a sky of dots, a ridge, and dark ground
        ridge = y - 25 * np.sin(x / rng.uniform(12, 40) + rng.uniform(0, 6)) - 8 * np.sin(x / 5)
        sky = screentone(x, y, pitch=rng.uniform(4, 8), grey=rng.uniform(0.1, 0.5))
        ground = inside(rng.uniform(20, 60) - ridge, MANGA_SOFT)
        ink = np.maximum.reduce([sky * inside(ridge, MANGA_SOFT), ground, ink_line(ridge, 3)])

    # The hero: a blob with a shadow of dots at one side.
    wobble = np.sin(rng.integers(3, 9) * angle + rng.uniform(0, 6))
    outline = radius - rng.uniform(22, 42) * (1 + 0.12 * wobble)
    dark = np.sin(angle + rng.uniform(0, 6)) > 0
    shadow = dark * screentone(x, y, pitch=rng.uniform(4, 7), grey=0.25)
    ink = np.where(outline < 0, shadow, ink)
    ink = np.maximum(ink, ink_line(outline, rng.uniform(2, 4)))

    for _ in range(3):  # strokes that swell and taper, as a pen's do
        curve = y - rng.uniform(-40, 40) - rng.uniform(-0.6, 0.6) * x
        curve -= 10 * np.sin(x / rng.uniform(10, 40))
        stroke = ink_line(curve, rng.uniform(1, 3.5) * (1 + np.sin(x / 30)))
        ink = np.maximum(ink, stroke * (radius < 80))
    return ink


def draw_manga(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a page of manga: four panels, with flat white and black, lines of ink and screentone."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (256 / size)  # a page is 256 wide
    # The gutters cross somewhere near the middle; the upright one leans.
    gutter_x = rng.uniform(90, 166) + rng.uniform(-0.15, 0.15) * (y - 128)
    gutter_y = rng.uniform(90, 166)
    border = np.maximum(abs(x - 128), abs(y - 128)) - 124

    page = np.zeros_like(x)
    for side, above in product((-1, 1), repeat=2):
        frame = np.maximum.reduce([4 - side * (x - gutter_x), 4 - above * (y - gutter_y), border])
        drawing = manga_panel(
            x - (gutter_x.mean() + side * rng.uniform(40, 80)),
            y - (gutter_y + above * rng.uniform(40, 80)),
            rng=rng,
        )
        drawing *= inside(frame, MANGA_SOFT)
        page = np.maximum.reduce([page, drawing, ink_line(frame, 2.5)])
    return 1 - np.stack([page] * 3)


def paint_building(image, x, y, depth, rng):
    """Paint a building in place: one window, many times, with the same panes in each.

    x, y: of the pixels, 0 to 1.  depth: 0 for the building at the back.
    """
    width = rng.uniform(0.45, 0.9)
    u = (x - rng.uniform(-0.2, 0.7)) / width  # from 0 at its left to 1 at its right
    v = (y - 0.55) * (1 + rng.uniform(-0.5, 0.5) * (u - 0.5))  # the storeys converge to one side
    v += 0.55 - rng.uniform(-0.1, 0.5) + 0.1 * depth  # 0 at the roof, negative above it
    soft = 1.5 / (width * len(x))
    body = inside(np.maximum(abs(u - 0.5) - 0.5, -v), soft)

    columns = rng.integers(4, 12)
    rows = rng.uniform(5, 14)
    across = repeat(u, columns)
    down = repeat(v, rows)
    half_width = rng.uniform(0.22, 0.38)
    half_height = rng.uniform(0.25, 0.40)
    window = np.maximum(abs(across) - half_width, abs(down) - half_height)  # signed distance
    pane_x = repeat(across / (2 * half_width), rng.integers(2, 4))
    pane_y = repeat(down / (2 * half_height), 2)
    bars = np.maximum(abs(pane_x), abs(pane_y)) > 0.42
    lamps = 1 + 0.5 * np.sin(7 * np.floor(u * columns) + 13 * np.floor(v * rows))  # rooms differ

    wall = rng.uniform(0.25, 0.9) * np.clip(rng.normal(1, 0.15, 3), 0, 1.1)[:, None, None]
    trim = np.minimum(wall * rng.uniform(1.15, 1.5), 1)
    glass = rng.uniform(0.05, 0.45) * np.array([0.8, 0.95, 1.1])[:, None, None]
    soft *= columns  # in the unit of `window`
    paint(image, body, colour=wall * (1.05 - 0.25 * u))
    paint(image, body * (abs(down) > 0.47), colour=0.75 * wall)  # between two storeys
    paint(image, body * inside(window - 0.07, soft), colour=trim)
    body = body * inside(window, soft)
    paint(image, body, colour=glass * lamps)
    paint(image, body * bars, colour=trim)


def draw_urban(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a street: a sky, and two to four buildings, each in front of the one before."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    image = rng.uniform(0.6, 1.1) * np.array([0.55, 0.7, 0.9])[:, None, None]  # the sky
    image = image * (1 - 0.3 * y) + 0.25 * y
    for depth in range(rng.integers(2, 5)):
        paint_building(image, x, y=y, depth=depth, rng=rng)
    return image


PAINTERS = {
    "faces": derain.draw_face,
    "natural": draw_dead_leaves,
    "manga": draw_manga,
    "urban": draw_urban,
}


def draw_background(category: str, size: int, rng: np.random.Generator) -> Tensor:
    """Return a background (3, size, size) in [0, 1] of a category, a key of PAINTERS."""
    return torch.from_numpy(PAINTERS[category](size, rng)).float().clamp(0, 1)


def backgrounds(images: list[Tensor], n: int, seed: int, choice: str) -> Tensor:
    """Return training patches as derain.training_patches does, with more choices.

    "opened" and "closed" are "any" through a filter of 5 x 5 pixels.  The others are "plain" with
    the first patch replaced: "inverted" by the patch with the most bright detail, inverted; "edge"
    by the sharpest of the plain half; "quantile 0.9" by the patch at this quantile of bright detail
    among all, where 1 would be the one with the most.
    """
    patches = partial(derain.training_patches, images, seed=seed)
    if choice == "opened":
        return derain.opening(patches(n))
    if choice == "closed":
        return -derain.opening(-patches(n))
    if choice == "inverted":
        first = 1 - patches(1, choice="exchanged")[0]
    elif choice == "edge":
        half = patches(derain.MANY // 2, choice="plain")
        first = half[derain.sharpness(half).argmax()]
    elif choice.startswith("quantile"):
        every = patches(derain.MANY)
        place = round(float(choice.removeprefix("quantile")) * (len(every) - 1))
        first = every[derain.bright_detail(every).argsort()[place]]
    else:
        return patches(n, choice=choice)
    return torch.cat([first[None], patches(n, choice="plain")[1:]])


# ---- 2  Rain: what does the paper's group use? --------------------------------------------------
#
# A public fork of BasicSR by one of the paper's authors (zhiyuanyou/BasicSR, branches on deraining)
# shows how the group worked, in contrast to derain.py:
#
#                          their fork                             derain.py
#   rain                   uniform noise, the top kept; motion    the same steps, streak peaks
#                          blur, turned; weight 0.7-1.0; nine     0.3-0.8, every image
#                          of ten images
#   small, medium, large:
#   drops per 10,000       20-40, 50-70, 80-100                   60-80, 40-120, 20-160, nested
#   width, pixels          1-3, 3-7, 7-9 (side of their kernel)   1.5-2, 1.3-2.5, 1-3
#   length, pixels         25-35, 35-45, 45-55                    12-16, 9-20, 6-24; unseen 28-36
#   direction, degrees     10, 30, 60 to both sides               5, 20, 45; unseen 55-75
#   images, patches        DIV2K at 1,024 pixels, patches of 128  drawn 256 or photographs, 40
#   network                SwinIR, 60 channels, 4 x 6 blocks      ResNet, UNet, SwinIR of 2 blocks,
#                                                                 16 channels
#   training               L1, Adam 2e-4, batch 8, 120,000 steps  L1, Adam 2e-3, batch 8, 2,400 steps
#   wet pixels             rain above 50 of 255                   seen change above 4 of 255


class GroupRain(NamedTuple):
    """What the rain of each image is drawn from: intervals (low, high), and a list of widths."""

    amount: tuple[int, int]  # drops per 10,000 pixels
    widths: tuple[int, ...]  # of these, the side of the Gaussian's kernel in pixels
    length: tuple[int, int]  # of the line, in whole pixels
    direction: tuple[int, int]  # whole degrees from vertical; a positive streak leans like "/"


# From a fork of BasicSR by one of the authors (zhiyuanyou/BasicSR, branches on deraining).
GROUP = {
    "group small": GroupRain((20, 40), (1, 3), (25, 35), (-10, 10)),
    "group medium": GroupRain((50, 70), (3, 5, 5, 7), (35, 45), (-30, 30)),  # 5 twice as often
    "group large": GroupRain((80, 100), (7, 9), (45, 55), (-60, 60)),
}

# Rain in which one factor alone leaves the range of `small`.
small = derain.RAIN["small"]
FACTORS = {
    "quantity 100-160": small._replace(quantity=(100, 160)),
    "width 2.5-3": small._replace(width=(2.5, 3)),
    "length 28-36": small._replace(length=(28, 36)),
    "direction 55-75": small._replace(direction=(55, 75), either_side=True),
}


def group_lines(length: Tensor, direction: Tensor, radius: int) -> Tensor:
    """Return lines (n, k, k) through the middle, 1 pixel thick, where k = 2 radius + 1.

    length: in pixels.  direction: in degrees from vertical.  Both are (n, 1, 1).
    The group's code draws the diagonal of a square and turns it.  So, near 45 degrees, its lines
    are longer, by up to a factor of sqrt(2).
    """
    angle = torch.deg2rad(direction)
    x = torch.arange(-radius, radius + 1)
    y = x[:, None]  # grows downwards
    along = x * torch.sin(angle) - y * torch.cos(angle)
    across = x * torch.cos(angle) + y * torch.sin(angle)
    ends = (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return ends * (1 - across.abs()).clamp(0)


def group_gaussians(width: Tensor) -> Tensor:
    """Return Gaussian kernels (n, 9, 9), 0 outside of width x width pixels; width: (n, 1, 1)."""
    sigma = 0.3 * ((width - 1) / 2 - 1) + 0.8
    x = torch.arange(-4, 5)
    weights = torch.exp(-(x**2 + x[:, None] ** 2) / (2 * sigma**2))
    weights = weights * (torch.maximum(x.abs(), x[:, None].abs()) <= width / 2)
    return weights / weights.sum((1, 2), keepdim=True)


def add_group_rain(rain: GroupRain, dry: float, clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Add rain to images (n, 3, h, w) as the paper's group does.

    Uniform noise below a threshold becomes 0.  The rest is filtered three times: by a kernel with 8
    in the middle and 0.1 at the four neighbours, by a line, and by a Gaussian.  Each image's layer
    is scaled to 0-1 by its least and largest value, and added with a weight from 0.7 to 1.
    dry: the chance that an image gets no rain.
    Order of the draws: n amounts, n widths, n lengths, n directions, n weights, n chances to stay
    dry; then the noise (n, *canvas) in float32.  The canvas is larger than the image by the sides
    of the three kernels less one each, then rounded up to multiples of 16.  The image is the part
    of it that begins at (margin, margin).
    """
    n, _, height, width = clean.shape
    each = (n, 1, 1)  # a number for each image
    amount = rng.uniform(*rain.amount, each)
    side = torch.from_numpy(rng.choice(rain.widths, each))
    length = torch.from_numpy(rng.integers(*rain.length, each, endpoint=True))
    direction = torch.from_numpy(rng.integers(*rain.direction, each, endpoint=True))
    weight = rng.uniform(0.7, 1, each) * (rng.random(each) >= dry)

    kernels = (
        torch.tensor([[[0, 0.1, 0], [0.1, 8, 0.1], [0, 0.1, 0]]]),
        group_lines(length, direction, radius=rain.length[1] // 2 + 1),
        group_gaussians(side),
    )
    margin = sum(kernel.shape[-1] - 1 for kernel in kernels)
    canvas = [math.ceil((edge + margin) / 16) * 16 for edge in (height, width)]
    noise = torch.from_numpy(rng.random((n, *canvas), np.float32))
    noise[noise < torch.from_numpy(1 - amount / 10_000)] = 0
    # As in derain.rain_layers, to filter is to multiply Fourier transforms.
    spectrum = torch.fft.rfft2(noise)
    for kernel in kernels:
        spectrum = spectrum * torch.fft.rfft2(kernel, s=canvas)
    layer = torch.fft.irfft2(spectrum, s=canvas)[:, margin:, margin:][:, :height, :width]

    layer = layer - layer.amin((1, 2), keepdim=True)
    layer = layer / layer.amax((1, 2), keepdim=True).clamp(1e-3)  # an empty layer stays empty
    layer = layer * torch.from_numpy(weight)
    return derain.add_rain(clean, layer[:, None].float())


# ---- 3  Noise: is it the same for another degradation? ------------------------------------------
#
# All are about as strong: on mid grey, a root mean square of about 0.1.  The level is drawn anew
# for each image.

DEVIATION = (0.09, 0.11)  # of gaussian and correlated noise, where 1 is the range of an image


def level(interval, clean, rng):
    """Return a level (n, 1, 1, 1) for each image."""
    return torch.from_numpy(rng.uniform(*interval, (len(clean), 1, 1, 1))).float()


def gaussian(clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise to images (n, 3, h, w), to each pixel and channel by itself."""
    white = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
    return (clean + level(DEVIATION, clean, rng=rng) * white).clamp(0, 1)


def correlated(clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise that was blurred by a Gaussian of sigma 1.5: neighbours are alike."""
    n, channels, height, width = clean.shape
    white = rng.standard_normal((n * channels, 1, height + 8, width + 8), np.float32)
    x = torch.arange(-4, 5) / 1.5
    kernel = torch.exp(-(x**2 + x[:, None] ** 2) / 2)
    kernel /= kernel.square().sum().sqrt()  # keeps the variance of white noise
    noise = F.conv2d(torch.from_numpy(white), kernel[None, None]).view(clean.shape)
    return (clean + level(DEVIATION, clean, rng=rng) * noise).clamp(0, 1)


def salt_and_pepper(clean: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn some pixels of images (n, 3, h, w) black or white, with equal chances."""
    share = level((0.03, 0.05), clean, rng=rng)  # of the pixels
    chance = torch.from_numpy(rng.random(clean[:, :1].shape, np.float32))
    return torch.where(chance < share, (chance < share / 2).float(), clean)


NOISE = {"gaussian": gaussian, "correlated": correlated, "salt and pepper": salt_and_pepper}
RAIN = derain.RAIN | FACTORS


def degradation(name: str, training: bool = False) -> Callable:
    """Return a function degrade(clean, rng): a rain, a noise, or "dry", which changes nothing.

    training: in the group's rain, a tenth of the images gets none.
    """
    if name == "dry":
        return lambda clean, rng: clean
    if name in GROUP:
        return partial(add_group_rain, GROUP[name], 0.1 if training else 0)
    if name in NOISE:
        return NOISE[name]
    return derain.rain_degradation(RAIN[name])


# ---- 4  Controls: what makes the content prior work? --------------------------------------------


class FromNothing(derain.VQGANPrior):
    """Control: the prior's network, but nothing was pre-trained, and all parts are trained, by L1.

    It should be given a VQGAN with NoCodebook.  A codebook that is trained from the start, in rain,
    may end with two codes in use: then the network draws one image, whatever the input.
    """

    def __init__(self, vqgan: derain.VQGAN):
        super().__init__(vqgan)
        self.vqgan.requires_grad_(True)

    def loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """Return L1: there is no teacher to ask."""
        return F.l1_loss(self(degraded), clean)


class NoCodebook(derain.Codebook):
    """Stands in a VQGAN where the codebook was, and passes the latent on unchanged.

    `derain.pretrain` then trains a plain autoencoder, and `derain.VQGANPrior` freezes its decoder.
    """

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the latent, the index of one code for pretrain to count, and no loss."""
        return latent, torch.zeros(1, dtype=torch.long), 0.0
