"""How is rain made, what stands behind it, and how is its removal measured?  Three pictures.

python figures/explain.py        draws rain.png, backgrounds.png and decoupled.png into figures/
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

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
    drops = derain.drops(noise, quantity=torch.tensor([60.0]))
    kernel = derain.streak_kernel(width=2, length=16, direction=20)
    rain = F.conv2d(drops[None], kernel.flip(0, 1)[None, None], padding="same").clamp(0, 1)
    background = face(seed, 0)[None, :, 60 : 60 + SIDE, 60 : 60 + SIDE]

    show(line[0], noise[0], "1  uniform noise")
    show(line[1], drops[0], "2  brightest 0.6 %: drops")
    show(line[2], kernel, "3  kernel: one streak")
    show(line[3], rain[0, 0], "4  filtered drops: rain R")
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


# ---- 2  What stands behind it, and what in it looks like rain? ----------------------------------

SQUARES = {"cheek": (136, 80, "#0072b2"), "eye": (100, 136, "#d55e00")}  # top, left, colour


def draw_detail(axes, patch: Tensor, name: str) -> dict:
    """Draw what an opening takes away from a patch, three times as bright; return its row."""
    detail = 255 * derain.bright_detail(patch[None]).item()
    show(axes, (3 * (patch - derain.opening(patch[None])[0])).clamp(0, 1), f"{detail:.2f}")
    return {"patch": name, "bright_detail": detail}


def figure_backgrounds(seed: int) -> tuple:
    """Draw where in a face bright detail is, and training patches with little and with much."""
    faces = [face(seed, i) for i in range(12)]
    figure = Figure(figsize=(11, 10.5), layout="constrained")
    figure.suptitle("An opening takes away what is bright and thin: this looks like rain.", size=15)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    left, right = top.subfigures(1, 2, width_ratios=(1, 1.5))
    whole = left.subplots()
    show(whole, faces[0], "a drawn face, 256 x 256 pixels")

    rows = []
    grid = right.subplots(2, 3)
    for line, (name, (y, x, colour)) in zip(grid, SQUARES.items()):
        whole.add_patch(Rectangle((x, y), 40, 40, fill=False, edgecolor=colour, linewidth=4))
        patch = faces[0][:, y : y + 40, x : x + 40]
        show(line[0], patch, name)
        show(line[1], derain.opening(patch[None])[0], "its opening, 5 x 5")
        rows.append(draw_detail(line[2], patch, name))
        line[2].set_title(f"what is gone: {rows[-1]['bright_detail']:.1f}")

    for i, (part, choice) in enumerate(zip(bottom.subfigures(2, 1), ("plain", "detailed"))):
        part.suptitle(choice)
        lines = part.subplots(2, 8)
        for column, patch in zip(lines.T, derain.training_patches(faces, 8, seed, choice)):
            show(column[0], patch)
            rows.append(draw_detail(column[1], patch, choice))
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
        "blur, 21 x 21 pixels": F.avg_pool2d(
            F.pad(rainy, (10, 10, 10, 10), mode="reflect"), 21, stride=1
        ),
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
        measures = derain.decoupled_evaluation(output, rainy, clean=clean)
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


DRAW = {"rain": figure_rain, "backgrounds": figure_backgrounds, "decoupled": figure_decoupled}


def main(arguments: list[str] | None = None) -> int:
    """Draw all three; return 0, 2 if they cannot be written, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description="How is rain made, what stands behind it, and how is its removal measured?",
        epilog="example: python figures/explain.py --seed 1 --out runs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=derain.whole_number, default=0, help="of all drawings")
    parser.add_argument("--out", type=Path, default="figures", help="folder of the pictures")
    args = parser.parse_args(arguments)
    try:
        derain.prepare_folder(args.out / "rain.png")
        for name in DRAW:
            figure, rows = DRAW[name](args.seed)
            derain.save_figure(figure, args.out / f"{name}.png")
            derain.write_table(args.out / f"{name}.csv", rows)
    except (derain.BadInput, OSError) as problem:
        print("explain.py:", problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("explain.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
