"""How is rain made, what stands behind it, and how is its removal measured?  Three pictures.

    python figures/explain.py        draws rain.png, backgrounds.png and decoupled.png into figures/
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import derain  # noqa: E402

def show(axes, picture: Tensor, title: str = "", **options):
    """Draw an image (3, h, w) or a map (h, w) without ticks; returns matplotlib's handle."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    picture = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).numpy()
    return axes.imshow(picture, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})

# ---- 1  How is rain made? ------------------------------------------------------------------------

FACTORS = {"quantity": 50, "width": 2, "length": 18, "direction": 10}  # of rain, when fixed
LEVELS = {"quantity": (10, 40, 80, 160), "width": (1, 1.5, 2, 3), "length": (6, 12, 24, 36),
          "direction": (-45, 0, 45, 70)}
UNITS = {"quantity": " / 10⁴ px", "width": " px", "length": " px", "direction": "°"}

def draw_steps(line: list, seed: int) -> None:
    """The steps from uniform noise to a rainy image, in a line of five axes."""
    noise = torch.from_numpy(derain.stream(seed, "figure").random((1, 96, 96), dtype="float32"))
    seeds = derain.streak_seeds(noise, torch.tensor([60.0]))
    kernel = derain.streak_kernel(2, 16, 20)
    rain = F.conv2d(seeds[None], kernel.flip(0, 1)[None, None], padding="same").clamp(0, 1)
    face = derain.draw_background("faces", 96, derain.stream(seed, "figure background"))
    rainy = derain.add_rain(face[None], rain)
    steps = {"1  uniform noise": noise[0], "2  brightest 0.6 %: seeds": seeds[0],
             "3  kernel: one streak": kernel, "4  filtered seeds: rain R": rain[0, 0],
             "5  clip(background + R)": rainy[0]}
    for axes, (title, picture) in zip(line, steps.items()):
        show(axes, picture, title)

def draw_layer(axes, layer: Tensor, row: str, title: str, rain_range: derain.RainRange) -> dict:
    """Draw a rain layer (h, w); returns its numbers."""
    show(axes, layer, title)
    wet = (layer > derain.RAIN_THRESHOLD).float().mean().item()
    intervals = {name: "{} to {}".format(*getattr(rain_range, name)) for name in FACTORS}
    return {"row": row, **intervals, "mean_rain": layer.mean().item(), "wet_share": wet}

def figure_rain(seed: int) -> tuple[Figure, list[dict]]:
    """The synthesis, each factor alone, and four layers of each range; a row of numbers a layer."""
    figure = Figure(figsize=(11, 8.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4), hspace=0.03)
    left, right = bottom.subfigures(1, 2, wspace=0.03)
    top.suptitle("How a rainy image is made", weight="bold")
    left.suptitle("One factor changes, the others are fixed", weight="bold")
    right.suptitle("Ranges: each layer draws its factors", weight="bold")
    draw_steps(top.subplots(1, 5), seed)
    rows = []
    for line, (factor, levels) in zip(left.subplots(4, 4), LEVELS.items()):
        line[0].set_ylabel(factor, fontsize=11)
        for axes, level in zip(line, levels):
            factors = {**FACTORS, factor: level}
            rain_range = derain.RainRange(**{name: (v, v) for name, v in factors.items()})
            rng = derain.stream(seed, "figure", factor)  # the same noise for all levels
            layer = derain.rain_layers(1, 96, rain_range, rng)[0, 0]
            rows.append(draw_layer(axes, layer, factor, f"{level}{UNITS[factor]}", rain_range))
    for line, (name, rain_range) in zip(right.subplots(4, 4), derain.RAIN.items()):
        direction = "±({} to {})°" if rain_range.either_side else "{} to {}°"
        line[0].set_ylabel(f"{name}\n{direction}".format(*rain_range.direction), fontsize=11)
        layers = derain.rain_layers(4, 96, rain_range, derain.stream(seed, "figure", name))
        for axes, layer in zip(line, layers[:, 0]):
            rows.append(draw_layer(axes, layer, name, "", rain_range))
    return figure, rows

# ---- 2  What stands behind it? -------------------------------------------------------------------

def figure_backgrounds(seed: int) -> tuple[Figure, list[dict]]:
    """Five drawn backgrounds of each category, with their sharpness."""
    figure, rows = Figure(figsize=(10, 4.3), layout="constrained"), []
    for line, category in zip(figure.subplots(2, 5), derain.BACKGROUNDS):
        for i, axes in enumerate(line):
            rng = derain.stream(seed, "figure", category, i)
            image = derain.draw_background(category, derain.IMAGE, rng)
            sharpness = derain.sharpness(image[None]).item()
            rows.append({"category": category, "image": i, "sharpness": sharpness})
            show(axes, image, f"sharpness {sharpness:.3f}")
        mean = sum(row["sharpness"] for row in rows[-5:]) / 5
        line[0].set_ylabel(f"{category}\nmean {mean:.3f}", fontsize=11)
    return figure, rows

# ---- 3  Was the rain removed, and was the background kept? ---------------------------------------

def figure_decoupled(seed: int) -> tuple[Figure, list[dict]]:
    """Five outputs for one rainy image, from no network, and what each measure says of them."""
    clean = derain.draw_background("faces", 128, derain.stream(seed, "figure decoupled"))[None]
    rng = derain.stream(seed, "figure unseen")
    rainy = derain.rain_degradation(derain.RAIN["unseen"])(clean, rng)
    blurred = F.avg_pool2d(F.pad(rainy, (10,) * 4, "reflect"), 21, 1)
    outputs = {"rainy input": rainy, "all black": 0 * rainy, "blur, 21x21 pixels": blurred,
               "opening, 5x5 pixels": derain.opening(rainy), "clean image": clean}
    wet = derain.rain_mask(rainy, clean)[0, 0]
    figure, rows = Figure(figsize=(11, 7.3), layout="constrained"), []
    grid = figure.subplots(3, 5)
    for column, (name, output) in zip(grid.T, outputs.items()):
        measured = derain.decoupled_evaluation(output, rainy, clean)
        rows.append({"output": name, **measured})
        error = 255 * (output - clean)[0].square().mean(0).sqrt()  # (h, w)
        show(column[0], output[0], name)
        label = "E_R {E_R:.0f} (perfect: {E_R_ideal:.0f})\nPSNR {psnr:.1f} dB".format(**measured)
        column[0].set_xlabel(label, fontsize=10, weight="bold")
        for axes, part, measure in ((column[1], wet, "E_W"), (column[2], ~wet, "E_B")):
            axes.set_facecolor("0.8")  # where the measure does not look
            handle = show(axes, torch.where(part, error, math.nan), cmap="viridis", vmax=100)
            axes.set_xlabel(f"{measure} {measured[measure]:.0f}", fontsize=11, weight="bold")
    labels = ("output", "error where it rained\n(grey: elsewhere)", "error elsewhere\n(grey: rain)")
    for axes, label in zip(grid[:, 0], labels):
        axes.set_ylabel(label, fontsize=11)
    figure.colorbar(handle, ax=grid[1:], label="grey levels", shrink=0.6, extend="max")
    figure.suptitle("E_R counts every change as rain removed: the black image has the highest.\n"
                    "E_W and E_B show the damage.", weight="bold")
    return figure, rows

def main(arguments: list[str] | None = None) -> int:
    """Draw all three; returns 0, or 2 if they cannot be written."""
    parser = derain.Parser(prog="explain.py", description=__doc__.splitlines()[0],
                           epilog="example: python figures/explain.py --seed 1 --out runs",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=derain.whole, default=0, help="of all that is drawn")
    parser.add_argument("--out", type=Path, default="figures", help="folder of the pictures")
    args = parser.parse_args(arguments)
    try:
        derain.save_figure(*figure_rain(args.seed), args.out / "rain.png")
        derain.save_figure(*figure_backgrounds(args.seed), args.out / "backgrounds.png")
        derain.save_figure(*figure_decoupled(args.seed), args.out / "decoupled.png")
    except OSError as problem:
        print(f"explain.py: {problem}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
