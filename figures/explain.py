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

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))
import derain  # noqa: E402

def show(axes, picture: Tensor, title: str = "", **options):
    """Draw an image (3, h, w) or a map (h, w) without ticks; returns matplotlib's handle."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    picture = picture.permute(1, 2, 0) if picture.ndim == 3 else picture
    return axes.imshow(picture, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})

# ---- 1  How is rain made? ------------------------------------------------------------------------

def synthesis(line: list, seed: int) -> None:
    """The steps from uniform noise to a rainy image."""
    noise = torch.from_numpy(derain.stream(seed, "figure").random((1, 96, 96), dtype="float32"))
    seeds = derain.streak_seeds(noise, torch.tensor([60.0]))
    kernel = derain.streak_kernel(2, 16, 20)
    rain = F.conv2d(seeds[None], kernel.flip(0, 1)[None, None], padding="same").clamp(0, 1)
    face = derain.draw_background("faces", 96, derain.stream(seed, "figure background"))
    rainy = derain.add_rain(face[None], rain)
    steps = {"1  uniform noise": noise[0], "2  top 0.6 %: seeds": seeds[0],
             "3  streak kernel": kernel, "4  filtered: rain R": rain[0, 0],
             "5  clip(B + R)": rainy[0]}
    for axes, (title, picture) in zip(line, steps.items()):
        show(axes, picture, title)

def figure_rain(seed: int) -> tuple[Figure, list[dict]]:
    """The synthesis, each factor alone, and five layers of each range; a row of numbers a layer."""
    figure, rows = Figure(figsize=(8.5, 15), layout="constrained"), []
    grid = figure.subplots(9, 5)
    synthesis(grid[0], seed)
    grid[0, 0].set_ylabel("step by step", fontsize=11)
    middle = {"quantity": 50, "width": 2, "length": 18, "direction": 10}
    varied = {"quantity": (10, 25, 50, 100, 160), "width": (1, 1.5, 2, 2.5, 3),
              "length": (6, 12, 18, 24, 36), "direction": (-70, -45, 0, 45, 70)}
    units = {"quantity": " / 10,000 px", "width": " px", "length": " px", "direction": "°"}
    lines = []
    for factor, levels in varied.items():
        ranges = []
        for level in levels:
            factors = {**middle, factor: level}
            ranges.append(derain.RainRange(**{key: (v, v) for key, v in factors.items()}))
        lines.append((factor, ranges, [f"{level}{units[factor]}" for level in levels]))
    for name, rain_range in derain.RAIN.items():
        lines.append((f"range:\n{name}", [rain_range] * 5, [""] * 5))
    for line, (label, ranges, titles) in zip(grid[1:], lines):
        line[0].set_ylabel(label, fontsize=11)
        for i, axes in enumerate(line):
            rng = derain.stream(seed, "figure", label, i)
            layer = derain.rain_layers(1, 96, ranges[i], rng)[0, 0]
            show(axes, layer, titles[i])
            wet = (layer > derain.RAIN_THRESHOLD).float().mean().item()
            rows.append({"row": label.replace("\n", " "), "column": i, "level": titles[i],
                         "mean_rain": layer.mean().item(), "wet_share": wet})
    return figure, rows

# ---- 2  What stands behind it? -------------------------------------------------------------------

def figure_backgrounds(seed: int) -> tuple[Figure, list[dict]]:
    """Five drawn backgrounds of each category, with their sharpness."""
    figure, rows = Figure(figsize=(9, 4), layout="constrained"), []
    for line, category in zip(figure.subplots(2, 5), derain.BACKGROUNDS):
        line[0].set_ylabel(category, fontsize=11)
        for i, axes in enumerate(line):
            rng = derain.stream(seed, "figure", category, i)
            image = derain.draw_background(category, 256, rng)
            sharpness = derain.sharpness(image[None]).item()
            rows.append({"category": category, "image": i, "sharpness": sharpness})
            show(axes, image, f"sharpness {sharpness:.3f}")
    return figure, rows

# ---- 3  Was the rain removed, and was the background kept? ---------------------------------------

def figure_decoupled(seed: int) -> tuple[Figure, list[dict]]:
    """Four answers to one rainy image, none of them trained, and what each measure says of them."""
    clean = derain.draw_background("faces", 128, derain.stream(seed, "figure decoupled"))[None]
    rng = derain.stream(seed, "figure unseen")
    rainy = derain.rain_degradation(derain.RAIN["unseen"])(clean, rng)
    blurred = F.avg_pool2d(F.pad(rainy, (10,) * 4, "reflect"), 21, 1)
    answers = {"rainy input:\nnothing removed": rainy, "all black:\nall removed": 0 * rainy,
               "blur, 21x21 pixels": blurred, "opening, 5x5 pixels": derain.opening(rainy),
               "clean: perfect": clean}
    wet = derain.rain_mask(rainy, clean)[0, 0]
    figure, rows = Figure(figsize=(11, 7.2), layout="constrained"), []
    grid = figure.subplots(3, 5)
    for column, (title, output) in zip(grid.T, answers.items()):
        measured = derain.decoupled_evaluation(output, rainy, clean)
        rows.append({"output": title.split("\n")[0].strip(":"), **measured})
        error = 255 * (output - clean)[0].square().mean(0).sqrt()
        show(column[0], output[0], title)
        column[0].set_xlabel("E_R {E_R:.0f} of {E_R_ideal:.0f},  {psnr:.1f} dB".format(**measured))
        for axes, part, name in ((column[1], wet, "E_W"), (column[2], ~wet, "E_B")):
            axes.set_facecolor("0.8")  # where the measure does not look
            handle = show(axes, torch.where(part, error, math.nan), cmap="viridis", vmax=100)
            axes.set_xlabel(f"{name} {measured[name]:.0f}", fontsize=11)
    for axes, label in zip(grid[:, 0], ("output", "error where it rained", "error elsewhere")):
        axes.set_ylabel(label, fontsize=11)
    figure.colorbar(handle, ax=grid[1:], label="grey levels", shrink=0.6)
    figure.suptitle("E_R alone is highest for the worst output: it counts every change as removal."
                    "  E_W and E_B see the damage.")
    return figure, rows

def main() -> None:
    """Draw all three."""
    parser = derain.Parser(prog="explain.py", description=__doc__.splitlines()[0],
                           epilog="example: python figures/explain.py --seed 1 --out runs",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=derain.whole, default=0, help="of all that is drawn")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the pictures")
    args = parser.parse_args()
    derain.save_figure(*figure_rain(args.seed), args.out / "rain.png")
    derain.save_figure(*figure_backgrounds(args.seed), args.out / "backgrounds.png")
    derain.save_figure(*figure_decoupled(args.seed), args.out / "decoupled.png")

if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        print(f"explain.py: {problem}", file=sys.stderr)
        sys.exit(2)
