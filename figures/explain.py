"""How is rain made, what stands behind it, and how is its removal measured?  Three pictures.

python figures/explain.py        draws rain.png, backgrounds.png and decoupled.png into figures/
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import derain  # noqa: E402

matplotlib.rc("axes", titlesize=10)


def face(seed: int, i: int):
    """Return drawn face number i of a seed, (3, 256, 256)."""
    return torch.from_numpy(derain.draw_face(256, derain.stream(seed, "figure face", i)))


# ---- 1  How is rain made? -----------------------------------------------------------------------

FIXED = (50, 2, 18, 10)  # quantity, width, length, direction, where they are fixed
LEVELS = {
    "drops per 10⁴ pixels": (10, 40, 80, 160),
    "width (pixels)": (1, 1.5, 2, 3),
    "length (pixels)": (6, 12, 24, 36),
    "direction (°)": (-45, 0, 45, 70),
}
SIDE = 96  # of a rain layer in the figure, in pixels


def draw_steps(line, seed: int):
    """Draw the steps from uniform noise to a rainy image into five axes."""
    noise = torch.from_numpy(derain.stream(seed, "figure").random((1, SIDE, SIDE), "float32"))
    drops = derain.drops(noise, quantity=torch.tensor([60.0]))
    kernel = derain.streak_kernel(width=2, length=16, direction=20)
    rain = F.conv2d(drops[None], kernel[None, None], padding="same").clamp(0, 1)
    background = face(seed, 0)[:, 60:156, 60:156]

    pictures = {
        "1  uniform noise": noise,
        "2  brightest 0.6 %: drops": drops,
        "3  kernel: one streak": kernel,
        "4  filtered drops: rain R": rain[0],
        "5  clip(background + R)": derain.add_rain(background, rain[0]),
    }
    for axes, (title, picture) in zip(line, pictures.items()):
        derain.show(axes, picture.expand(3, -1, -1), title)


def draw_layer(axes, layer: Tensor, name: str, title: str) -> dict:
    """Draw a rain layer (1, h, w); return its row: what share of it is wet."""
    derain.show(axes, layer.expand(3, -1, -1), title)
    wet = (layer > derain.RAIN_THRESHOLD).float().mean().item()
    return {"layer": f"{name} {title}", "wet_share": wet}


def figure_rain(seed: int) -> tuple:
    """Draw the synthesis, each factor alone, and four layers of each range; a row a layer."""
    figure = Figure(figsize=(11, 8.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    left, right = bottom.subfigures(1, 2)
    top.suptitle("How a rainy image is made")
    left.suptitle("One factor changes, the others are fixed")
    right.suptitle("Ranges and their directions (unseen: to either side)")
    draw_steps(top.subplots(1, 5), seed)

    rows = []
    for i, (line, factor) in enumerate(zip(left.subplots(4, 4), LEVELS)):
        line[0].set_ylabel(factor)
        for axes, level in zip(line, LEVELS[factor]):
            factors = [(value, value) for value in FIXED]
            factors[i] = (level, level)
            rng = derain.stream(seed, "figure", i)  # the same noise for all levels
            layers = derain.rain_layers(1, SIDE, derain.RainRange(*factors), rng)
            rows.append(draw_layer(axes, layers[0], factor, f"{level}"))

    for line, (name, rain_range) in zip(right.subplots(4, 4), derain.RAIN.items()):
        line[0].set_ylabel(f"{name}\n{rain_range.direction}°")
        layers = derain.rain_layers(4, SIDE, rain_range, derain.stream(seed, "figure", name))
        rows += [draw_layer(axes, layer, name, "") for axes, layer in zip(line, layers)]
    return figure, rows


# ---- 2  What stands behind it, and what in it looks like rain? ----------------------------------


def draw_patch(axes, patch: Tensor, name: str, colour: str = "black") -> dict:
    """Draw a patch, its opening, and what is lost, three times as bright; return its row."""
    lost = patch - derain.opening(patch[None])[0]
    detail = 255 * lost.mean().item()
    derain.show(axes[0], patch, name, colour)
    derain.show(axes[1], patch - lost, "opening")
    derain.show(
        axes[2], (3 * lost).clamp(0, 1), f"3 x (patch - opening)\nbright detail {detail:.1f}"
    )
    return {"patch": name, "bright_detail": detail}


def figure_backgrounds(seed: int) -> tuple:
    """Draw where a face has bright detail, and training patches with less and with more of it."""
    faces = [face(seed, i) for i in range(12)]
    figure = Figure(figsize=(11, 10.5), layout="constrained")
    figure.suptitle(
        "Bright detail: what is bright and thin. An eye has it, a cheek has not.", size=16
    )
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subfigures(1, 2)
    whole = left.subplots()
    derain.show(whole, faces[0], "a drawn face")

    rows = []
    squares = (("a cheek", 136, 80, "#0072b2"), ("an eye", 100, 130, "#d55e00"))
    for axes, (name, y, x, colour) in zip(right.subplots(2, 3), squares):
        rows.append(draw_patch(axes, faces[0][:, y : y + 40, x : x + 40], name, colour))
        whole.add_patch(Rectangle((x, y), 40, 40, fill=False, edgecolor=colour, linewidth=5))

    bottom.suptitle(
        "Seven of 1,024 training patches, in order of bright detail. Plain: no. 0 to 511."
    )
    patches = derain.training_patches(faces, 1024, seed)
    patches = patches[derain.bright_detail(patches).argsort()]
    for axes, place in zip(bottom.subplots(3, 7).T, (0, 256, 511, 768, 921, 998, 1023)):
        rows.append(draw_patch(axes, patches[place], f"no. {place}"))
    return figure, rows


# ---- 3  Was the rain removed, and was the background kept? --------------------------------------


def figure_decoupled(seed: int) -> tuple:
    """Draw five outputs for one rainy image, and how rain left and damage are read from each."""
    clean = face(seed, 1)[None, :, 64:192, 64:192]
    degrade = derain.rain_degradation(derain.RAIN["unseen"])
    rainy = degrade(clean, derain.stream(seed, "figure unseen"))
    r = 255 * (rainy - clean).flatten()
    outputs = {
        "rainy input": rainy,
        "half of the rain left": (rainy + clean) / 2,
        "opening, 7 x 7 pixels": derain.opening(rainy, 7),
        "blur, 21 x 21 pixels": F.avg_pool2d(F.pad(rainy, 4 * (10,), mode="reflect"), 21, stride=1),
        "all black": 0 * rainy,
    }

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(
        "Rain left is the slope: how much of the rain is still in the output's error.\n"
        "Damage is the rest of the error. Only both near 0 mean a good output."
    )
    rows = []
    grid = figure.subplots(2, 5, sharey="row")
    for (picture, plot), (name, output) in zip(grid.T, outputs.items()):
        measures = derain.decoupled_evaluation(output, rainy, clean=clean)
        rows.append({"output": name, **measures})
        derain.show(picture, output[0], name)
        picture.set_xlabel(
            f"rain left {measures['rain_left']:.0f} %\ndamage {measures['damage']:.0f}"
        )
        d = 255 * (output - clean).flatten()
        plot.plot(r, d, ",")
        plot.axline((r.mean(), d.mean()), slope=measures["rain_left"] / 100, color="#d55e00")
        plot.set(xlabel="rain r = rainy - clean", ylim=(-260, 260))
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
        args.out.mkdir(parents=True, exist_ok=True)
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
