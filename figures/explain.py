"""How is rain made, what stands behind it, and how is its removal measured?  Three pictures.

python figures/explain.py        draws rain.png, backgrounds.png and decoupled.png into figures/
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import derain  # noqa: E402


def show(axes, picture: Tensor, title: str = ""):
    """Draw an image (3, h, w), or a map (h, w) in grey, without ticks."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    if picture.ndim == 3:
        picture = picture.permute(1, 2, 0)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)


def face(seed: int, i: int):
    """Return drawn face number i of a seed, (3, 256, 256)."""
    return torch.from_numpy(derain.draw_face(derain.IMAGE, derain.stream(seed, "figure face", i)))


# ---- 1  How is rain made? -----------------------------------------------------------------------

FIXED = (50, 2, 18, 10)  # quantity, width, length, direction, where they are fixed
LEVELS = {
    "quantity\n(per 10⁴ pixels)": (10, 40, 80, 160),
    "width (pixels)": (1, 1.5, 2, 3),
    "length (pixels)": (6, 12, 24, 36),
    "direction (°)": (-45, 0, 45, 70),
}
SIDE = 96  # of a rain layer in the figure, in pixels


def draw_steps(line, seed: int):
    """Draw the steps from uniform noise to a rainy image into five axes."""
    rng = derain.stream(seed, "figure")
    noise = torch.from_numpy(rng.random((1, SIDE, SIDE), "float32"))
    seeds = derain.streak_seeds(noise, torch.tensor([60.0]))
    kernel = derain.streak_kernel(2, 16, 20)
    rain = conv2d(seeds[None], kernel.flip(0, 1)[None, None], padding="same").clamp(0, 1)
    background = face(seed, 0)[None, :, 60 : 60 + SIDE, 60 : 60 + SIDE]

    show(line[0], noise[0], "1  uniform noise")
    show(line[1], seeds[0], "2  brightest 0.6 %: seeds")
    show(line[2], kernel, "3  kernel: one streak")
    show(line[3], rain[0, 0], "4  filtered seeds: rain R")
    show(line[4], derain.add_rain(background, rain)[0], "5  clip(background + R)")


def draw_layer(axes, layer: Tensor, name: str, title: str) -> dict:
    """Draw a rain layer (h, w); return its row: what share of it is wet."""
    show(axes, layer, title)
    wet = (layer > derain.RAIN_THRESHOLD).float()
    return {"layer": f"{name} {title}".replace("\n", " "), "wet_share": wet.mean().item()}


def figure_rain(seed: int) -> tuple:
    """Draw the synthesis, each factor alone, and four layers of each range; a row a layer."""
    figure = Figure(figsize=(11, 8.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    left, right = bottom.subfigures(1, 2)
    top.suptitle("How a rainy image is made")
    left.suptitle("One factor changes, the others are fixed")
    right.suptitle("Ranges: each layer draws its factors")
    draw_steps(top.subplots(1, 5), seed)

    rows = []
    for i, (line, factor) in enumerate(zip(left.subplots(4, 4), LEVELS)):
        line[0].set_ylabel(factor)
        for axes, level in zip(line, LEVELS[factor]):
            factors = [*FIXED]
            factors[i] = level
            rain_range = derain.RainRange(*[(value, value) for value in factors])
            rng = derain.stream(seed, "figure", i)  # the same noise for all levels
            layer = derain.rain_layers(1, SIDE, rain_range, rng)[0, 0]
            rows.append(draw_layer(axes, layer, factor, f"{level}"))

    for line, (name, rain_range) in zip(right.subplots(4, 4), derain.RAIN.items()):
        low, high = rain_range.direction
        directions = f"±({low} to {high})°" if rain_range.either_side else f"{low} to {high}°"
        line[0].set_ylabel(f"{name}\n{directions}")
        layers = derain.rain_layers(4, SIDE, rain_range, derain.stream(seed, "figure", name))
        rows += [draw_layer(axes, layer, name, "") for axes, layer in zip(line, layers[:, 0])]
    return figure, rows


# ---- 2  What stands behind it? ------------------------------------------------------------------


def figure_backgrounds(seed: int) -> tuple:
    """Draw five faces, and five training patches of each third by sharpness, with their sharpness.

    The patches of a third are evenly spaced from the least sharp to the sharpest.
    """
    faces = [face(seed, i) for i in range(12)]
    lines = {"drawn faces": torch.stack(faces[:5])}
    for third in ("low", "any", "high"):
        patches = derain.training_patches(faces, 64, seed, third)
        order = derain.sharpness(patches).argsort()
        lines[f"training patches:\n{third} sharpness"] = patches[order[::15]]

    figure = Figure(figsize=(8.5, 7), layout="constrained")
    rows = []
    for axes_line, (name, images) in zip(figure.subplots(4, 5), lines.items()):
        axes_line[0].set_ylabel(name)
        for axes, image, value in zip(axes_line, images, derain.sharpness(images).tolist()):
            show(axes, image, f"sharpness {value:.3f}")
            rows.append({"row": name.replace("\n", " "), "sharpness": value})
    return figure, rows


# ---- 3  Was the rain removed, and was the background kept? --------------------------------------


def figure_decoupled(seed: int) -> tuple:
    """Draw five outputs for one rainy image, and how rain left and damage are read from each."""
    clean = face(seed, 1)[None, :, 64:192, 64:192]
    rng = derain.stream(seed, "figure unseen")
    rainy = derain.rain_degradation(derain.RAIN["unseen"])(clean, rng)
    outputs = {
        "rainy input": rainy,
        "half of the rain left": (rainy + clean) / 2,
        "opening, 7 x 7 pixels": derain.opening(rainy, 7),
        "blur, 21 x 21 pixels": avg_pool2d(pad(rainy, (10,) * 4, "reflect"), 21, 1),
        "all black": 0 * rainy,
    }

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(
        "Rain left is the slope: how much of the rain is still in the output's error.\n"
        "Damage is the rest of the error. Only both near 0 mean a good output."
    )
    rows = []
    grid = figure.subplots(2, 5, sharey="row")
    for column, (name, output) in zip(grid.T, outputs.items()):
        measures = derain.decoupled_evaluation(output, rainy, clean)
        rows.append({"output": name, **measures})
        show(column[0], output[0], name)
        label = "rain left {rain_left:.0f} %\ndamage {damage:.0f}".format(**measures)
        column[0].set_xlabel(label)

        r = 255 * (rainy - clean).flatten().numpy()
        d = 255 * (output - clean).flatten().numpy()
        slope = measures["rain_left"] / 100
        middle = (d - slope * r).mean().item()
        column[1].plot(r, d, ",", color="0.6")
        column[1].axline((0, middle), slope=slope, color="#d55e00")
        column[1].set(xlabel="rain r = rainy - clean", ylim=(-260, 260))
    grid[1, 0].set_ylabel("error d = output - clean\n(grey levels)")
    return figure, rows


def main(arguments: list = sys.argv[1:]) -> int:
    """Draw all three; return 0, or 2 if they cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python figures/explain.py --seed 1 --out runs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=derain.whole_number, default=0, help="of all drawings")
    parser.add_argument("--out", type=Path, default="figures", help="folder of the pictures")
    args = parser.parse_args(arguments)
    try:
        for draw in (figure_rain, figure_backgrounds, figure_decoupled):
            name = draw.__name__.removeprefix("figure_")
            derain.save_figure(*draw(args.seed), args.out / f"{name}.png")
    except derain.BadInput as problem:
        print(f"explain.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
