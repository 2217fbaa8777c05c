"""Which of the paper's claims hold here?  Runs, verdicts, figures, and figures/claims.md.

A `Run` is one training and its tests; its result is a file in runs/, written when it is done, and
never done twice.  Finished runs are collected in figures/runs.csv, which is read first.
"""

import argparse
import csv
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from torch import Tensor, nn

FIGURES = Path(__file__).resolve().parent
sys.path[:0] = [str(FIGURES), str(FIGURES.parent)]
import derain  # noqa: E402
from materials import BLUR, NOISE, degradation  # noqa: E402

# ---- 1  What is one experiment? ------------------------------------------------------------------

class Autoencoder(nn.Module):
    """The control of the prior: its encoder and decoder without codebook, trained from nothing."""
    rate = derain.VQGANPrior.rate

    def __init__(self):
        super().__init__()
        self.vqgan = derain.VQGAN(**derain.PRIOR)

    def forward(self, degraded: Tensor) -> Tensor:
        latent = self.vqgan.encode(2 * derain.pad_to_multiple(degraded, 8) - 1)
        restored = self.vqgan.decode(latent)
        return (restored[..., :degraded.shape[2], :degraded.shape[3]] + 1) / 2

STEPS, SEEDS = 2400, 5  # of the grid in figures/; a run with fewer is a taste

@dataclass(frozen=True)
class Run:
    """One training and its tests: everything that the result depends on."""
    net: str = "resnet"  # one of NETWORKS, "autoencoder"; or untrained: "rainy" (input), "opening"
    size: int = 0  # channels of the network; 0: its default
    images: str = "faces"  # what is drawn, or photographs
    third: str = "any"  # low, high: of 3n patches, the n least or most sharp
    n: int = 1024  # backgrounds
    trained_on: str = "small"
    steps: int = STEPS
    seed: int = 0

def tests_of(run: Run) -> tuple[str, ...]:
    """The degradations that a run is tested in."""
    for family in (NOISE, BLUR):
        if run.trained_on in family:
            return tuple(family)
    return ("unseen", "strokes", run.trained_on)

@lru_cache(maxsize=3)
def images_of(images: str, seed: int, path: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Images to train on, and images held out."""
    drawn = images in derain.BACKGROUNDS
    if not drawn and not path:
        raise derain.BadInput(f"to train on {images}, give --backgrounds")
    return derain.training_and_held_out(None if drawn else path, images, seed)

def prior_of(run: Run, folder: Path, path: str | None) -> derain.VQGAN:
    """The VQGAN of a run of the prior.  One serves all seeds, except for split photographs."""
    seed = 0 if run.images in derain.BACKGROUNDS else run.seed
    steps = max(1, round(5000 / 2400 * run.steps))
    file = folder / f"vqgan_{run.images}_{steps}_{seed}.pt"
    if not file.exists():
        vqgan = derain.build_network(derain.VQGAN, seed, **derain.PRIOR)
        derain.pretrain(vqgan, images_of(run.images, seed, path)[0], steps, seed)
        temporary = file.with_suffix(f".{os.getpid()}")
        derain.save_checkpoint(temporary, vqgan, "vqgan", derain.PRIOR)
        os.replace(temporary, file)
    return derain.load_vqgan(file)

def measure(run: Run, folder: Path, path: str | None = None) -> list[dict]:
    """Train as `run` says and test on 32 patches of 96x96 held out: a row for each test."""
    training, held_out = images_of(run.images, run.seed, path)
    if run.steps:
        arguments = {"channels": run.size} if run.size else {}
        if run.net == "prior":
            arguments = {"vqgan": prior_of(run, folder, path)}
        make = Autoencoder if run.net == "autoencoder" else derain.NETWORKS[run.net]
        network = derain.build_network(make, run.seed, **arguments)
        patches = derain.training_patches(training, run.n, run.seed, run.third)
        derain.train(network, patches, degradation(run.trained_on), run.steps, run.seed)
    clean = derain.sample_patches(held_out, 32, 96, derain.stream(run.seed, "test patches"))
    rows = []
    for kind in tests_of(run):
        degraded = degradation(kind)(clean, derain.stream(run.seed, "test", kind))
        if run.steps:
            output = derain.predict(network, degraded)
        else:
            output = degraded if run.net == "rainy" else derain.opening(degraded)
        measured = derain.decoupled_evaluation(output, degraded, clean)
        rows.append({**asdict(run), "tested_on": kind, **measured})
    return rows

def yardstick(run: Run, net: str) -> Run:
    """The untrained run, "rainy" or "opening", on the images and in the tests of `run`."""
    return Run(net, images=run.images, n=0, trained_on=run.trained_on, steps=0, seed=run.seed)

# ---- 2  How are many runs done, and kept? --------------------------------------------------------

def file_of(run: Run, folder: Path) -> Path:
    """Where the result of a run is kept until it is collected."""
    return folder / ("_".join(map(str, astuple(run))) + ".json")

def read_table(path: Path) -> dict[Run, list[dict]]:
    """The finished runs in runs.csv, each with its rows."""
    table = {}
    if path.exists():
        for row in csv.DictReader(open(path, encoding="utf-8")):
            fields = {key: type(value)(row[key]) for key, value in asdict(Run()).items()}
            words = (*fields, "tested_on")
            row = {key: row[key] if key in words else float(row[key]) for key in row} | fields
            table.setdefault(Run(**fields), []).append(row)
    return table

def write_table(table: dict[Run, list[dict]], path: Path) -> None:
    """Write all finished runs, sorted, so that the same runs give the same bytes."""
    rows = list(itertools.chain(*(table[run] for run in sorted(table, key=astuple))))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")

def do_runs(runs: list[Run], table: dict[Run, list[dict]], folder: Path, path: str | None) -> None:
    """Do the missing runs; under torchrun, this rank's share.  Rank 0 fills the table."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [run for run in runs[rank::ranks]
            if run not in table and not file_of(run, folder).exists()]
    begun = time.monotonic()
    for i, run in enumerate(mine):
        rows = measure(run, folder, path)
        temporary = file_of(run, folder).with_suffix(f".{rank}")
        temporary.write_text(json.dumps(rows))
        os.replace(temporary, file_of(run, folder))
        left = (time.monotonic() - begun) / (i + 1) * (len(mine) - i - 1) / 60
        print(f"{temporary.stem}: {i + 1} of {len(mine)}, {left:.0f} min left", flush=True)
    if rank == 0:
        for run in [run for run in runs if run not in table]:
            while not file_of(run, folder).exists():  # until the other ranks are done
                time.sleep(1)
            table[run] = json.loads(file_of(run, folder).read_text())

# ---- 3  What does the paper claim, and which runs can tell? --------------------------------------

@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and pairs of runs that differ in one thing.

    panels: of each pair the first should be the better.  tested_on: degradations; "training" is the
    one trained on, "other" the mean over all others of its family.  alike: all panels ask the same,
    so that their mean says something.
    """
    paper: str
    panels: dict[str, tuple[Run, Run]]
    tested_on: tuple[str, ...] = ("unseen", "strokes")
    alike: bool = True

NUMBERS, RANGES = (2, 8, 64, 1024), ("small", "medium", "large")

def few(run: Run) -> tuple[Run, Run]:
    """8 backgrounds against 1,024."""
    return replace(run, n=8), replace(run, n=1024)

def make_claims(photographs: str, steps: int) -> dict[str, Claim]:
    """All claims, in the order in which they are run; photographs: their name, or "" for none."""
    run = Run(steps=steps)
    worlds = {name: replace(run, images=images)
              for name, images in (("faces", "faces"), ("photographs", photographs)) if images}
    panels = {f"{net}, faces": few(replace(run, net=net)) for net in ("resnet", "unet", "swinir")}
    for kind in ("natural", "manga", "urban", photographs):
        if kind:
            panels[f"resnet, {kind.split('-')[0]}"] = few(replace(run, images=kind))
    sharp, balance, advice = {}, {}, {}
    for name, world in worlds.items():
        large = replace(world, trained_on="large")
        balance[f"{name}: 1,024, 8 in large rain"] = (large, replace(large, n=8))
        balance[f"{name}: large, small rain on 1,024"] = (large, world)
        low = replace(world, third="low", n=64)
        for label, setting in advised(world).items():
            advice[f"{name}: {label}"] = (setting, yardstick(setting, "opening"))
        if name == "faces":
            low = replace(low, images="natural")
        sharp[low.images.split("-")[0]] = (low, replace(low, third="high"))
    return {
        "few": Claim("8 backgrounds beat 1,024 in unseen rain (Fig. 1, 4)", panels),
        "benchmark": Claim("the usual benchmark, in the training rain, picks 1,024 (Fig. 1)", {
            label: (many, fewer) for label, (fewer, many) in panels.items()}, ("training",)),
        "balance": Claim("the wider the range of rain, the more backgrounds are best", balance,
                         alike=False),
        "sharp": Claim("64 backgrounds of low sharpness beat 64 of high (Fig. 5)", sharp),
        "blur": Claim("the same for motion blur of other directions", {
            "8 against 1,024": few(replace(run, trained_on="blur-narrow")),
            "wide against narrow": (replace(run, trained_on="blur-wide"),
                                    replace(run, trained_on="blur-narrow"))},
                      ("blur-other",), alike=False),
        "noise": Claim("the same for noise of other kinds", {
            f"on {kind}": few(replace(run, trained_on=kind)) for kind in NOISE}, ("other",)),
        "capacity": Claim("it is not network capacity: `few` holds at other sizes", {
            "5,115 parameters": few(replace(run, size=8)),
            "75,747 parameters": few(replace(run, size=32))}),
        "prior": Claim("a content prior generalises better than a network trained from nothing", {
            f"{n:,}, {net}": (replace(run, net="prior", n=n), replace(run, net=net, n=n))
            for n, net in itertools.product((1024, 8), ("resnet", "autoencoder"))}, alike=False),
        "advice": Claim("trained as the paper advises, networks beat the opening (ours)", advice,
                        alike=False),
    }

def advised(run: Run) -> dict[str, Run]:
    """The usual training on the images of `run`, and what the paper advises instead."""
    large = replace(run, trained_on="large")
    settings = {"resnet, usual": run, "resnet, few": replace(run, n=8),
                "resnet, few and simple": replace(run, third="low", n=64),
                "resnet, wide range, few and simple": replace(large, third="low", n=64)}
    for net in ("resnet", "unet", "swinir"):
        settings[f"{net}, wide range"] = replace(large, net=net)
        settings[f"{net}, wide range and few"] = replace(large, net=net, n=64)
    settings["lines, diverse"] = replace(run, net="lines", trained_on="diverse", n=64)
    if run.images == "faces":  # 18 photographs do not make a prior
        settings["prior, usual"] = replace(run, net="prior")
        settings["prior, wide range"] = replace(large, net="prior")
    return settings

def balance_map(run: Run) -> list[Run]:
    """The map of `balance`: number of backgrounds x range of training rain."""
    cells = itertools.product(NUMBERS, RANGES)
    return [replace(run, n=n, trained_on=rain) for n, rain in cells]

def runs_of(name: str, claim: Claim, seeds: int) -> list[Run]:
    """All runs that a claim needs, seed by seed, with the untrained ones."""
    runs = list(itertools.chain(*claim.panels.values()))
    if name == "balance":
        for first, _ in [*claim.panels.values()][::2]:
            runs += balance_map(first)
    runs += [yardstick(run, net) for run, net in itertools.product(runs, ("rainy", "opening"))]
    pairs = itertools.product(range(seeds), dict.fromkeys(runs))
    return [replace(run, seed=seed) for seed, run in pairs]

# ---- 4  What do the numbers say? -----------------------------------------------------------------

SIGN = {"E_R": 1, "E_W": -1, "E_B": -1, "psnr": 1}  # -1: lower is better
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by n - 1

def values(table: dict, run: Run, tested_on: str, metric: str, seeds: int) -> np.ndarray:
    """A metric of a run in each seed, (seeds,)."""
    kinds = {"training": {run.trained_on}, "other": {*tests_of(run)} - {run.trained_on}}
    kinds = kinds.get(tested_on, {tested_on})
    found = []
    for seed in range(seeds):
        rows = table[replace(run, seed=seed)]
        found.append(np.mean([row[metric] for row in rows if row["tested_on"] in kinds]))
    return np.array(found)

def effect(table: dict, pair: tuple, tested_on: str, metric: str, seeds: int) -> np.ndarray:
    """What the claim says is above zero, in each seed: how much the first of the pair is better."""
    first, second = (values(table, run, tested_on, metric, seeds) for run in pair)
    return SIGN[metric] * (first - second)

def verdict(effects: np.ndarray) -> tuple[float, float, str]:
    """Mean of paired differences, half the width of its 95 % confidence interval, and a word."""
    mean, n = effects.mean(), len(effects)
    if n < SEEDS:
        return mean, math.nan, "too few seeds"
    half = T_975[n - 2] * effects.std(ddof=1) / math.sqrt(n)
    if abs(mean) <= half:
        return mean, half, "undecided"
    return mean, half, "reproduced" if mean > 0 else "refuted"

def map_of(table: dict, run: Run, metric: str, seeds: int) -> np.ndarray:
    """A metric in unseen rain: (numbers of backgrounds, ranges of training rain, seeds)."""
    cells = [values(table, cell, "unseen", metric, seeds) for cell in balance_map(run)]
    return np.reshape(cells, (len(NUMBERS), len(RANGES), seeds))

def map_of_toy() -> dict[str, np.ndarray]:
    """The same three of toy_denoise.py, (tones in functions, tones in noise, seeds)."""
    rows = csv.DictReader(open(FIGURES / "toy.csv", encoding="utf-8"))
    found = [(float(row["noise_left"]), float(row["damage"])) for row in rows
             if (row["noise"], row["restorer"]) == ("unseen band", "network")]
    left, damage = np.reshape(found, (4, 4, -1, 2)).transpose(3, 0, 1, 2)
    error = np.hypot(left, damage)
    return {"E_R": 100 - left, "E_W": error, "psnr": -20 * np.log10(error / 100)}

def balance_lines(claim: Claim, table: dict, seeds: int) -> list[str]:
    """Best numbers of backgrounds, seed by seed, as lines of claims.md."""
    lines = ["", "The best number of backgrounds in unseen rain, in each seed:", ""]
    for run, _ in [*claim.panels.values()][::2]:
        for metric in ("E_R", "E_W", "psnr"):
            best = (SIGN[metric] * map_of(table, run, metric, seeds)).argmax(0)  # (ranges, seeds)
            numbers = np.array(NUMBERS)[best]
            lists = [f"{rain} rain {', '.join(map(str, line))}"
                     for rain, line in zip(RANGES, numbers)]
            doublings = np.log2(numbers[-1] / numbers[0])
            lines.append(f"- {run.images}, by {metric}: {'; '.join(lists)}.  Large less small rain,"
                         f" in doublings: {cell(doublings)}")
    return lines

def cell(effects: np.ndarray) -> str:
    """Effects as text."""
    mean, half, word = verdict(effects)
    return f"{mean:+.1f} ± {half:.1f} ({(effects > 0).sum()} of {len(effects)}) {word}"

def claim_lines(claim: Claim, table: dict, seeds: int) -> list[str]:
    """A claim's verdicts and its table, as lines of claims.md."""
    lines = ["| panel | tested on | E_W: first, second, opening, rainy | E_R | E_W | PSNR |",
             "|---|---|---|---|---|---|"]
    verdicts = []
    for tested_on in claim.tested_on:
        total = np.zeros((3, seeds))
        for label, pair in claim.panels.items():
            runs = (*pair, yardstick(pair[0], "opening"), yardstick(pair[0], "rainy"))
            errors = [values(table, run, tested_on, "E_W", seeds).mean() for run in runs]
            effects = [effect(table, pair, tested_on, m, seeds) for m in ("E_R", "E_W", "psnr")]
            total += effects
            words = [label, tested_on, ", ".join(f"{e:.1f}" for e in errors), *map(cell, effects)]
            lines.append(f"| {' | '.join(words)} |")
        means = total / len(claim.panels)
        if claim.alike:
            verdicts.append([f"tested on {tested_on}", *(verdict(mean)[2] for mean in means)])
            words = ["**mean of the panels**", tested_on, "", *map(cell, means)]
            lines.append(f"| {' | '.join(words)} |")
    sentences = ["**{}**: by E_R {}, by E_W {}, by PSNR {}.".format(*words) for words in verdicts]
    return [*sentences, "", *lines] if sentences else lines

# ---- 5  What does it look like? ------------------------------------------------------------------

MEASURES = {"E_R": "E_R, change where wet\n(high: removal or damage)",
            "E_W": "E_W, error where wet\n(lower: better)",
            "E_B": "E_B, error elsewhere\n(lower: better)", "psnr": "PSNR, dB\n(higher: better)"}

def figure_pairs(claim: Claim, table: dict, seeds: int) -> Figure:
    """A panel in each row, a measure in each column; a line for each seed, thick for the mean."""
    figure = Figure(figsize=(9, 1.2 + 1.6 * len(claim.panels)), layout="constrained")
    grid = figure.subplots(len(claim.panels), 4, squeeze=False)
    tested_on = claim.tested_on[0]
    for line, (label, pair) in zip(grid, claim.panels.items()):
        differ = [key for key in asdict(pair[0]) if getattr(pair[0], key) != getattr(pair[1], key)]
        for axes, metric in zip(line, MEASURES):
            first, second = (values(table, run, tested_on, metric, seeds) for run in pair)
            axes.plot([0, 1], [first, second], color="#0072b2", lw=0.7)
            axes.plot([0, 1], [first.mean(), second.mean()], "o-", color="#0072b2", lw=3)
            for net, style in (("rainy", ":"), ("opening", "--")):
                mean = values(table, yardstick(pair[0], net), tested_on, metric, seeds).mean()
                axes.axhline(mean, color="#d55e00", ls=style, lw=1, label=net)
            if metric == "E_R":
                ideal = values(table, pair[0], tested_on, "E_R_ideal", seeds).mean()
                axes.axhline(ideal, color="black", lw=1, label="ideal")
            axes.set_xticks([0, 1], [getattr(run, differ[0]) for run in pair], fontsize=8)
            axes.set(xlim=(-0.3, 1.3))
            axes.set_title(MEASURES[metric] if line[0] is grid[0, 0] else "", fontsize=9)
        line[0].set_ylabel(label, fontsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{claim.paper}; tested on: {tested_on}", fontsize=10, wrap=True)
    return figure

def figure_balance(claim: Claim, table: dict, seeds: int) -> Figure:
    """Maps of complexity of content x of degradation, of the toy, of faces, of photographs."""
    maps = {"1-D toy": map_of_toy()}
    for run, _ in [*claim.panels.values()][::2]:
        maps[run.images.split("-")[0]] = {
            metric: map_of(table, run, metric, seeds) for metric in ("E_R", "E_W", "psnr")}
    figure = Figure(figsize=(9, 0.9 + 2.7 * len(maps)), layout="constrained")
    for line, (world, metrics) in zip(figure.subplots(len(maps), 3), maps.items()):
        toy = world == "1-D toy"
        line[0].set_ylabel(f"{world}\n{'K, tones of function' if toy else 'backgrounds'}")
        for axes, (metric, cells) in zip(line, metrics.items()):
            good = SIGN[metric] * cells
            axes.imshow(good.mean(-1), "cividis", origin="lower", aspect="auto")
            for (i, j), mean in np.ndenumerate(cells.mean(-1)):
                box = {"fc": "white", "lw": 0, "alpha": 0.8, "pad": 1.5}
                label = f"{mean:.1f}" if metric == "psnr" else f"{mean:.0f}"
                if i == good.mean(-1)[:, j].argmax():
                    box.update(alpha=1, lw=2.5, ec="#d55e00")
                    wins = (good[:, j].argmax(0) == i).sum()
                    label += f"\n{wins} of {cells.shape[2]}"
                axes.text(j, i, label, ha="center", va="center", fontsize=9, bbox=box)
            axes.set_xticks(range(cells.shape[1]), (1, 2, 4, 8) if toy else RANGES)
            axes.set_yticks(range(4), (1, 2, 4, 8) if toy else NUMBERS)
            axes.set_xlabel("J, tones of training noise" if toy else "range of training rain")
            names = {"E_R": "noise removed, %", "E_W": "error, %", "psnr": "error, dB"}
            axes.set_title(names[metric] if toy else MEASURES[metric], fontsize=9)
    figure.suptitle("Unseen noise and rain.  Yellow is good; framed: the best of a column, and in"
                    " how many seeds", fontsize=11)
    return figure

COLOURS = {"usual": "0.6", "few": "#e69f00", "few and simple": "#f0e442", "wide range": "#56b4e9",
           "wide range and few": "#0072b2", "wide range, few and simple": "#009e73",
           "diverse": "#d55e00"}
MARKERS = {"resnet": "o", "unet": "s", "swinir": "D", "prior": "^", "lines": "P"}

def figure_advice(claim: Claim, table: dict, seeds: int) -> Figure:
    """E_W against E_B of each training, and of the opening; lines of about equal PSNR."""
    worlds = [*dict.fromkeys(run.images for run, _ in claim.panels.values())]
    figure = Figure(figsize=(4 * len(worlds) + 2.4, 7.6), layout="constrained")
    grid = figure.subplots(2, len(worlds), squeeze=False)
    for axes, (tested_on, images) in zip(grid.flat, itertools.product(claim.tested_on, worlds)):
        def means(run):
            return [values(table, run, tested_on, m, seeds).mean() for m in ("E_B", "E_W", "psnr")]

        panels = {k: pair for k, pair in claim.panels.items() if pair[0].images == images}
        points = {}
        for label, (run, opening) in panels.items():
            net, setting = label.split(": ")[1].split(", ", 1)
            points[setting, net] = means(run)[:2]
            axes.plot(*points[setting, net], MARKERS[net], color=COLOURS[setting], mec="black",
                      ms=13 if net == "lines" else 9, zorder=3, label=f"{net}, {setting}")
        steps = ("usual", "few and simple", "wide range, few and simple")
        path = np.array([points[setting, "resnet"] for setting in steps])  # (3, 2)
        axes.plot(path[:, 0], path[:, 1], "k--", lw=1, zorder=1,
                  label="the paper's advice, step by step")
        axes.plot(*means(opening)[:2], "*", color="black", ms=15, label="opening, untrained")
        dry, wet, db = means(yardstick(opening, "rainy"))  # these three give the share of wet
        share = (255 ** 2 * 10 ** (-db / 10) - dry ** 2) / (wet ** 2 - dry ** 2)
        x, y = np.meshgrid(np.linspace(0, axes.get_xlim()[1]), np.linspace(0, axes.get_ylim()[1]))
        error = np.maximum(share * y ** 2 + (1 - share) * x ** 2, 1)
        lines = axes.contour(x, y, -10 * np.log10(error / 255 ** 2), range(14, 32, 2),
                             colors="0.8", linewidths=0.8, zorder=0)
        axes.clabel(lines, fmt="%d dB", fontsize=7)
        axes.set(title=f"{images.split('-')[0]}, tested on {tested_on}",
                 xlabel="E_B, error where dry", ylabel="E_W, error where wet")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Lower left is better.  Usual: 1,024 backgrounds in `small` rain; wide range:"
                    " `large` rain; diverse: `diverse` rain on 64; few: 8, in wide range 64;"
                    " simple: the 64 least sharp of 192",
                    fontsize=10, wrap=True)
    return figure

def figure_photograph(model: str) -> tuple[Figure, list[dict]]:
    """Grace Hopper (matplotlib's sample) in unseen rain, behind the opening and a checkpoint."""
    clean = derain.open_image(get_sample_data("grace_hopper.jpg", asfileobj=False))[None]
    rainy = degradation("unseen")(clean, derain.stream(0, "photograph"))
    network = derain.load_checkpoint(model)
    outputs = {"unseen rain": rainy, "opening, untrained": derain.opening(rainy),
               "trained": derain.restore(network, rainy[0])[None], "clean": clean}
    figure, rows = Figure(figsize=(11, 4), layout="constrained"), []
    for axes, (name, output) in zip(figure.subplots(1, 4), outputs.items()):
        rows.append({"output": name, **derain.decoupled_evaluation(output, rainy, clean)})
        axes.imshow(output[0].permute(1, 2, 0).numpy())
        axes.set(title=name, xticks=[], yticks=[])
        if output is not clean:
            axes.set_xlabel("E_W {E_W:.1f}, E_B {E_B:.1f}, {psnr:.1f} dB".format(**rows[-1]))
    dry = {"opening": derain.opening(clean), "trained": derain.restore(network, clean[0])[None]}
    for name, output in dry.items():  # what is done to an image without rain
        rows.append({"output": f"{name}, dry", **derain.decoupled_evaluation(output, clean, clean)})
    return figure, rows

def statistics(claims: dict[str, Claim], seeds: int) -> list[str]:
    """What the verdicts rest on, as lines of claims.md."""
    panels = sum(len(claim.panels) * len(claim.tested_on) for claim in claims.values())
    return ["## What the statistics rest on", "", *f"""
- A seed changes all at once: the images (for photographs, which are held out), the patches, the
  network's first weights, the training rain, the test images and the test rain.
- The runs of a pair share all of these but the one thing in which they differ, so differences are
  taken within a seed; the interval is Student's t for {seeds} differences.
- Panels are not independent: they share seeds, and often one of their two runs.  The mean of the
  panels is taken within each seed first, so its interval allows for that.
- The photographs are 24, the same for all seeds, split anew: intervals say nothing of others.
- There are {panels} comparisons of two runs in each of three measures, {3 * panels} in all.  If no
  effect existed, about {0.05 * 3 * panels:.0f} would be called reproduced or refuted by chance.
- Decided beforehand: claims, panels, seeds, steps, measures, the verdict.  Decided after a look at
  shorter trainings: 2,400 steps; that E_R alone decides nothing; 4 channels a group in the prior.
  Decided on seed 100 and other photographs: the prior's loss, size and pre-training; `lines`.
""".strip().splitlines()]

def report(claims: dict[str, Claim], table: dict, seeds: int, out: Path) -> None:
    """Draw a figure for each claim, and write claims.md."""
    lines = ["# The claims, and what came out", "",
             f"By claims.py, from runs.csv, seeds 0 to {seeds - 1}.  E_R, E_W, PSNR: by how much"
             " the first of two runs is better, mean and half of the 95 % confidence interval."]
    figures = {"balance": figure_balance, "advice": figure_advice}
    for name, claim in claims.items():
        lines += ["", f"## {name}: {claim.paper}", "", *claim_lines(claim, table, seeds)]
        if name == "balance":
            lines += balance_lines(claim, table, seeds)
        figure = figures.get(name, figure_pairs)(claim, table, seeds)
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {out / name}.png")
    lines += ["", *statistics(claims, seeds)]
    (out / "claims.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {out / 'claims.md'}")

# ---- 6  Command line -----------------------------------------------------------------------------

def main() -> None:
    """Do the missing runs, collect them, and report."""
    parser = derain.Parser(description="Test the paper's claims.", prog="claims.py",
                           epilog="example: python figures/claims.py few --seeds 2 --steps 200",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="few, balance ... (none: all)")
    parser.add_argument("--backgrounds", metavar="PATH", help="photographs, for their panels")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(2, 11), metavar="N")
    parser.add_argument("--steps", type=partial(derain.whole, least=1), default=STEPS, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of finished runs")
    parser.add_argument("--fresh", action="store_true", help="do not read figures/runs.csv")
    parser.add_argument("--photograph", metavar="MODEL", help="only draw photograph.png with it")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same bytes on any number of cores
    if args.photograph:
        derain.save_figure(*figure_photograph(args.photograph), FIGURES / "photograph.png")
        return
    standard = args.seeds >= SEEDS and args.steps == STEPS and not args.fresh
    out = FIGURES if standard else args.runs
    args.runs.mkdir(parents=True, exist_ok=True)
    table = read_table(out / "runs.csv")
    photographs = ""
    if args.backgrounds:
        names = "".join(file.name for file in derain.image_files(args.backgrounds))
        photographs = f"photographs-{zlib.crc32(names.encode()):08x}"
    for run in table:
        if run.images.startswith("photographs") and not photographs:
            photographs = run.images
    claims = make_claims(photographs, args.steps)
    for name in args.claims:
        if name not in claims:
            parser.error(f"there is no claim {name!r}; there are {', '.join(claims)}")
    runs = {name: runs_of(name, claims[name], args.seeds) for name in claims}
    for name in args.claims or claims:
        do_runs(runs[name], table, args.runs, args.backgrounds)
    finished = {name: claims[name] for name in claims if table.keys() >= set(runs[name])}
    if os.environ.get("RANK", "0") == "0" and finished:
        write_table(table, out / "runs.csv")
        report(finished, table, args.seeds, out)

if __name__ == "__main__":
    try:
        main()
    except (derain.BadInput, OSError) as problem:
        print(f"claims.py: {problem}", file=sys.stderr)
        sys.exit(2)
