"""Which of the paper's claims hold here?  Trainings, verdicts, figures, and figures/claims.md.

    python figures/claims.py                    every claim: trains what is missing, then reports
    python figures/claims.py few --seeds 2 --steps 20 --runs trial      one, short, in trial/
    torchrun --nproc_per_node=2 figures/claims.py       the same on two cores

With more machines, all must share runs/.  If one process stops, stop all and start again, as the
others would wait for its results.  A call with other seeds overwrites claims.md, unless --runs
names another folder.

Claims, panels, primary measures and seeds were fixed before the first run.  Since then one control
was changed, and a panel was cut; claims.md says so under `prior`.

1 runs       a Run is one training and its tests
2 files      its result is a file in runs/, and is never done twice; runs.csv collects them all
3 claims     what the paper says, as contrasts: differences of measures, above zero if it holds
4 verdicts   from the 95 % interval of a contrast's mean over the seeds
5 advice     what `derain.py train` should do if it is not told otherwise
6 report     claims.md
7 figures    verdicts.png, balance.png, advice.png, default.png
8 command    what is asked for

In what follows, table[run, test, step] is a dict of what a run measured in a test after a step.
`photographs` is a tuple of images (3, h, w), empty if none were given; in section 3 it is the name
of their set.
"""

import csv
import io
import json
import os
import sys
import time
import zlib
from argparse import ArgumentParser
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import ceil, isnan, nan, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parent
sys.path[:0] = [str(FIGURES), str(FIGURES.parent)]
import derain  # noqa: E402
from materials import (  # noqa: E402
    FACTORS,
    GROUP,
    NOISE,
    PAINTERS,
    RAIN,
    FromNothing,
    NoCodebook,
    backgrounds,
    degradation,
    draw_background,
)

RANK = int(os.environ.get("RANK", 0))  # of this process, under torchrun
RANKS = int(os.environ.get("WORLD_SIZE", 1))

# ---- 1  Runs: what is trained, and how is it tested? --------------------------------------------

STEPS = 2400
MANY = 1024
NUMBERS = (2, 8, 64, MANY)  # of backgrounds
RANGES = ("small", "medium", "large")  # of training rain
UNTRAINED = {
    "rainy": lambda images: images,
    "opening 5": derain.opening,
    "opening 7": lambda images: derain.opening(images, 7),
}


@dataclass(frozen=True, order=True)
class Run:
    """One training and its tests: everything that their results depend on."""

    net: str = "resnet"  # in derain.NETWORKS or UNTRAINED; "prior", "from nothing", "no codebook"
    channels: int = 16  # used only with a network of derain.NETWORKS
    images: str = "faces"  # of materials.PAINTERS, or the name of a set of photographs
    choice: str = "any"  # of backgrounds, see materials.backgrounds
    n: int = MANY  # backgrounds
    trained_on: str = "small"  # a name that materials.degradation knows
    steps: int = STEPS  # 0 for what is not trained
    seed: int = 0


def steps_of(run):
    """Return the steps after which a run is measured: a twelfth of all, and all (200 and 2,400)."""
    return sorted({ceil(run.steps / 12), run.steps})


def tests_of(run):
    """Return the names of the degradations that a run is tested in."""
    if not run.steps:
        return [*RAIN, *GROUP, *NOISE, "dry"]
    # After small rain, one factor is changed in further tests; after Gaussian noise, the noise.
    further = {"small": FACTORS, "gaussian": NOISE}
    kinds = ["unseen", *GROUP, run.trained_on, *further.get(run.trained_on, ()), "dry"]
    return list(dict.fromkeys(kinds))  # each once


@lru_cache(4)  # keeps the last four sets, as drawing them takes time
def images_of(images, seed, photographs):
    """Return images (3, h, w) to train on, and others to test on.

    A fifth of the drawn images is for tests.  Of photographs, a quarter is, which the seed picks.
    """
    if images in PAINTERS:
        rngs = [derain.stream(seed, "backgrounds", i) for i in range(80)]
        drawn = [draw_background(images, 256, rng) for rng in rngs]
        return drawn[16:], drawn[:16]

    order = derain.stream(seed, "split").permutation(len(photographs))
    found = [photographs[i] for i in order]
    count = max(1, len(found) // 4)
    return found[count:], found[:count]


def make_network(run, training=()):
    """Return the network of a run before its training; a prior is pre-trained on `training`."""
    if run.net in derain.NETWORKS:
        return derain.build_network(partial(derain.NETWORKS[run.net], run.channels), run.seed)

    vqgan = derain.build_network(derain.VQGAN, run.seed, **derain.PRIOR)
    if run.net != "prior":
        vqgan.quantize = NoCodebook(*vqgan.quantize.embedding.weight.shape)
    if run.net == "from nothing":
        return FromNothing(vqgan)
    # 5,000 steps before a run of 2,400, as with `derain.py vqgan`.
    derain.pretrain(vqgan, training, ceil(run.steps * 5000 / STEPS), run.seed)
    return derain.VQGANPrior(vqgan)


def measure(run, folder, photographs=()):
    """Train as a run says; test on 16 patches of 96 x 96 pixels.

    Returns a row for each test after each of steps_of(run).  Trained weights are written to the
    folder; default.png is drawn with them.
    """
    training, held_out = images_of(run.images, run.seed, photographs)
    clean = derain.sample_patches(held_out, 16, 96, derain.stream(run.seed, "test patches"))
    rows = []

    def test(step, restore):
        for kind in tests_of(run):
            degraded = degradation(kind)(clean, derain.stream(run.seed, "test", kind))
            measures = derain.decoupled_evaluation(restore(degraded), degraded, clean)
            if run.steps:
                measures["bright_detail"] = 255 * derain.bright_detail(patches).max().item()
            known = {key: round(measures[key], 4) for key in measures if not isnan(measures[key])}
            rows.append({**asdict(run), "step": step, "tested_on": kind, **known})

    if run.net in UNTRAINED:
        test(0, UNTRAINED[run.net])
    else:
        network = make_network(run, training)
        patches = backgrounds(training, run.n, run.seed, run.choice)

        def after_step(step):
            if step in steps_of(run):
                test(step, lambda degraded: derain.predict(network, degraded))

        degrade = degradation(run.trained_on, training=True)
        derain.train(network, patches, degrade, run.steps, run.seed, after_step=after_step)
        content = io.BytesIO()
        torch.save(network.state_dict(), content)
        write(file_of(run, folder, "pt"), content.getvalue())
    return rows


# ---- 2  Files: how are results kept? ------------------------------------------------------------

MEASURES = ("rain_left", "damage", "psnr")  # what the claims use


def write(path, content):
    """Write bytes under another name, then rename the file, so that it is never half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def file_of(run, folder, suffix="json"):
    """Return the file for the result of a run."""
    name = "_".join(map(str, astuple(run)))
    return folder / f"{name}.{suffix}".replace(" ", "-")


def finished(table, run):
    """Return whether the table holds all tests of a run, with all measures that the claims use."""
    for test, step in product(tests_of(run), steps_of(run)):
        lacking = set(MEASURES) - table.get((run, test, step), {}).keys()
        if test == "dry":
            lacking.discard("rain_left")  # without rain, none can be left
        if lacking:
            return False
    return True


def add_rows(table, rows):
    """Put rows, lines of runs.csv or of a result, into the table; return how many are damaged."""
    damaged = 0
    for row in rows:
        try:
            # type(value) is str or int; in a csv, all cells are text.
            about = {key: type(value)(row.pop(key)) for key, value in asdict(Run()).items()}
            place = (Run(**about), row.pop("tested_on"), int(row.pop("step")))
            # A cell is empty where nothing could be measured.  It is None where the line ends
            # early; float(None) raises TypeError.
            table[place] = {name: float(cell) for name, cell in row.items() if cell != ""}
        except (ValueError, TypeError, AttributeError, KeyError):
            damaged += 1
    return damaged


def read_table(path):
    """Return the table in runs.csv; print how much of it is damaged."""
    table = {}
    text = path.read_text("utf-8-sig", "replace") if path.exists() else ""
    # A last line without an end may be cut inside a number: 2 may be left of 23.4.
    lines = text.rpartition("\n")[0].splitlines()
    damaged = add_rows(table, csv.DictReader(lines, quoting=csv.QUOTE_NONE))
    lacking = {run for run, _, _ in table if not finished(table, run)}
    if damaged or lacking or text and not table:
        print(f"{path}: {damaged} damaged lines, {len(lacking)} runs incomplete, {len(table)} rows")
    return table


def write_table(table, path):
    """Write runs.csv, sorted, so that the same runs give the same bytes."""
    rows = []
    for run, test, step in sorted(table):
        rows.append({**asdict(run), "step": step, "tested_on": test, **table[run, test, step]})
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def do_runs(runs, table, folder, photographs):
    """Do the runs that are missing, and put all into the table.

    Under torchrun, each process does its share, and waits for those of the others.  Runs on
    photographs are left out if there are none.
    """

    def missing(run, tell=False):
        """Look for a run in its file; return whether it is missing."""
        file = file_of(run, folder)
        if file.exists() and not finished(table, run):
            try:
                add_rows(table, json.loads(file.read_text("utf-8")))
            except (ValueError, TypeError):
                pass  # told below
            if tell and not finished(table, run):
                print(f"{file} is damaged or lacks a measure: its run counts as missing")
        return not finished(table, run)

    for run in runs:
        missing(run, tell=RANK == 0)
    possible = [run for run in runs if run.images in PAINTERS or photographs]
    mine = possible[RANK::RANKS]
    for done, run in enumerate(mine, 1):
        if missing(run):
            print(f"{done} of {len(mine)}: {run}", flush=True)
            rows = measure(run, folder, photographs)
            write(file_of(run, folder), json.dumps(rows).encode())
            add_rows(table, rows)
            if missing(run):
                raise derain.BadInput("the training of this run diverged: it gave no number")
    for run in possible:
        while RANKS > 1 and missing(run):
            time.sleep(1)


# ---- 3  Claims: what does the paper say, and which runs can tell? -------------------------------


class Term(NamedTuple):
    """A term of a contrast: what a run measured in a test after a step, with a weight."""

    weight: int
    run: Run
    test: str
    step: int


def better(first, second, test="unseen", step=0):
    """Return the contrast that is above zero if the first run is better.

    step: after which both are measured, 0 for the last.
    """
    step = step or first.steps
    return [Term(1, first, test, step), Term(-1, second, test, step)]


def more(first, second):
    """Return the contrast that is above zero if the first contrast is larger than the second."""
    return first + [term._replace(weight=-term.weight) for term in second]


def few(run, test="unseen", step=0):
    """Return the contrast that is above zero if 8 backgrounds are better than 1,024."""
    return better(replace(run, n=8), replace(run, n=MANY), test, step)


class Claim(NamedTuple):
    """A statement of the paper; its panels are contrasts that are above zero if it holds."""

    statement: str
    panels: dict[str, list[Term]]
    primary: str = "rain_left"  # the measure that decides
    shown: list[Run] = []  # runs whose numbers stand beside, without a verdict
    first: int = 10  # the first of its seeds, if --first does not say otherwise
    often: list[Run] = []  # runs with twice as many seeds


DETAIL = ("resnet, faces", "unet, faces", "swinir, faces", "resnet, photographs")
DOSE = (0.6, 0.75, 0.9, 0.975)  # quantiles of bright detail; 1 is "exchanged"


def balance_map(run):
    """Return the runs of balance.png: each number of backgrounds in each range of rain."""
    return [replace(run, n=n, trained_on=rain) for n, rain in product(NUMBERS, RANGES)]


def make_claims(photographs, steps=STEPS):
    """Return all claims by name, in the order of work; photographs: the name of their set."""
    faces = Run(steps=steps)
    photos = replace(faces, images=photographs)
    settings = {f"{net}, faces": replace(faces, net=net) for net in derain.NETWORKS}
    settings["resnet, photographs"] = photos
    for images in ("natural", "manga", "urban"):
        settings[f"resnet, {images}"] = replace(faces, images=images)

    number = {name: few(run) for name, run in settings.items()}
    group = replace(photos, trained_on="group small")
    for test in ("group medium", "group large"):
        number[f"resnet, photographs, group small to {test}"] = few(group, test)

    balance = {}
    prior = {}
    for name, run in {"faces": faces, "photographs": photos}.items():
        balance[name] = more(few(run), few(replace(run, trained_on="large")))
        for net in ("resnet", "from nothing", "no codebook"):
            pair = better(replace(run, net="prior"), replace(run, net=net))
            prior[f"{name}, prior against {net}"] = pair
    # Cut before its runs: they take more than an hour of one core.
    del prior["photographs, prior against no codebook"]

    low = replace(photos, choice="low")
    sharp = {"gain of 8, any against low": more(few(photos), few(low))}
    for n in (64, MANY):
        high = replace(photos, choice="high", n=n)
        sharp[f"{n:,}, low against high"] = better(replace(low, n=n), high)

    first = steps_of(faces)[0]
    noise = replace(faces, trained_on="gaussian")
    detail = {}
    plain = {name: replace(settings[name], choice="plain", n=8) for name in DETAIL}
    for name, run in plain.items():
        detail[f"{name}, plain against exchanged"] = better(run, replace(run, choice="exchanged"))
    for control in ("inverted", "edge"):
        run = plain["resnet, faces"]
        pair = better(replace(run, choice=control), replace(run, choice="exchanged"))
        detail[f"resnet, faces, {control} against exchanged"] = pair
    for name in ("resnet, faces", "resnet, photographs"):
        for n in (512, 8):
            run = replace(plain[name], n=n)
            pair = better(run, replace(run, choice="detailed"))
            detail[f"{name}, {n} plain against detailed"] = pair
        opened = replace(settings[name], choice="opened")
        pair = better(opened, replace(opened, choice="closed"))
        detail[f"{name}, 1,024 opened against closed"] = pair
    dose = [replace(plain["resnet, faces"], choice=f"quantile {q}") for q in DOSE]

    # What `derain.py train` does if it is not told otherwise, against the usual training.
    default = replace(low, trained_on="large")
    tests = ("unseen", *GROUP, "dry")
    return {
        "detail": Claim(
            "ours: one background with bright, thin structure among eight plain ones spoils the "
            "removal of unseen rain; 512 plain are better than 512 detailed; and 1,024 without "
            "bright detail are better than 1,024 that kept it",
            detail,
            shown=dose,
            first=20,
            often=[replace(faces, n=8)],
        ),
        "default": Claim(
            "the default of `derain.py train` beats the usual training: 1,024 of low sharpness in "
            "large rain against 1,024 of any sharpness in small rain",
            {f"photographs, {test}": better(default, photos, test) for test in tests},
            "psnr",
        ),
        "few": Claim(
            "8 backgrounds beat 1,024 in unseen rain, when trained in small rain (Fig. 1, 4)",
            number,
        ),
        "steps": Claim(
            f"what 8 gain over 1,024 is more after {steps:,} steps than after {first:,}",
            {name: more(few(run), few(run, step=first)) for name, run in settings.items()},
        ),
        "benchmark": Claim(
            "in the training rain, 1,024 backgrounds have a higher PSNR than 8 (Fig. 1)",
            {name: better(run, replace(run, n=8), "small") for name, run in settings.items()},
            "psnr",
        ),
        "factors": Claim(
            "what 8 gain over 1,024 is more where one factor of rain leaves the training range",
            {name: more(few(faces, name), few(faces, "small")) for name in FACTORS},
        ),
        "balance": Claim(
            "what 1,024 gain over 8 is more if trained in large rain than if in small",
            balance,
            "psnr",
            balance_map(faces),
        ),
        "sharp": Claim(
            "photographs: backgrounds of low sharpness beat those of high (Fig. 5); "
            "and what 8 gain over 1,024 is less at low sharpness than at any",
            sharp,
        ),
        "capacity": Claim(
            "8 beat 1,024 with a quarter of the ResNet's parameters, and with four times",
            {f"{size} channels": few(replace(faces, channels=size)) for size in (8, 32)},
        ),
        "prior": Claim(
            "on 1,024 backgrounds, a content prior beats the ResNet and two controls",
            prior,
            "psnr",
        ),
        "noise": Claim(
            "8 backgrounds beat 1,024 in other noise, when trained in Gaussian noise",
            {test: few(noise, test) for test in ("correlated", "salt and pepper")},
        ),
    }


def with_untrained(runs):
    """Return the runs, then for each the UNTRAINED on the same images; no run twice."""
    empty = dict(channels=16, choice="any", n=0, trained_on="", steps=0)
    untrained = [replace(run, net=net, **empty) for run, net in product(runs, UNTRAINED)]
    return list(dict.fromkeys(runs + untrained))


def runs_of(claim):
    """Return the runs that a claim needs."""
    runs = list(claim.shown)
    for terms in claim.panels.values():
        runs += [term.run for term in terms]
    return with_untrained(runs)


def seeded(runs, seeds):
    """Return the runs with each of the seeds."""
    return [replace(run, seed=seed) for seed, run in product(seeds, runs)]


def seeds_of(claim, first, count):
    """Return the seeds of a claim: `count` from `first`, or from its own first one."""
    first = claim.first if first is None else first
    return range(first, first + count)


def all_runs(claim, first, count):
    """Return all runs that a claim needs, with their seeds."""
    runs = seeded(runs_of(claim), seeds_of(claim, first, count))
    return runs + seeded(claim.often, seeds_of(claim, first, 2 * count))


def whole(table, runs, seeds):
    """Return whether the table holds all of the runs with all of the seeds."""
    return all(finished(table, run) for run in seeded(runs, seeds))


# ---- 4  Verdicts: what do the numbers say? ------------------------------------------------------

SIGN = np.array([-1, -1, 1])  # of the MEASURES: -1 if what is nearer to 0 is better
# 97.5 % quantiles of Student's t-distribution with 1, 2, ... degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class Verdict(NamedTuple):
    """The mean of a contrast, half of its 95 % interval, and what follows."""

    mean: float
    half: float
    agree: int  # seeds in which the contrast is above zero
    word: str  # "reproduced", "opposite" or "undecided"


def verdict(effects, photographs=False):
    """Return the verdict on a contrast, from its values in 2 to 10 seeds.

    photographs: the seeds share the same images, so they are not independent.  With s^2, the
    variance of the values, that of their mean is then estimated by (1 / n + 6 / 18) s^2, where 6 of
    24 photographs are for tests and 18 for training (Nadeau & Bengio 2003).  For other numbers from
    4 on, the ratio is 1 / 3 or less, so that the interval is not too short.
    """
    n = len(effects)
    mean = np.mean(effects)
    variance = np.var(effects, ddof=1) * (1 / n + (6 / 18 if photographs else 0))
    half = T_975[n - 2] * sqrt(variance)
    word = "undecided"
    if abs(mean) > half:
        word = "reproduced" if mean > 0 else "opposite"
    return Verdict(mean, half, sum(effects > 0), word)


def measured(table, run, test, step, seeds):
    """Return what a run measured in a test after a step, (seeds, measures); NaN where no value is.

    What was not trained is measured at step 0, which stands for every step.
    """
    rows = []
    for one in seeded([run], seeds):
        found = table.get((one, test, step if run.steps else 0), {})
        rows.append([found.get(name, nan) for name in MEASURES])
    return np.array(rows)


def judge(table, terms, seeds):
    """Return the verdict on a contrast by each of the MEASURES; rain left without its sign."""
    effects = 0
    for term in terms:
        found = measured(table, term.run, term.test, term.step, seeds)
        effects += term.weight * SIGN * abs(found)
    photographs = terms[0].run.images not in PAINTERS
    return {name: verdict(effects[:, i], photographs) for i, name in enumerate(MEASURES)}


# ---- 6  Report: what stands in claims.md? -------------------------------------------------------

INTRODUCTION = """\
# The claims, and what came out

Written by claims.py from runs.csv, for the seeds {seeds.start} to {last}.

{count} verdicts.  If no effect existed, about 5 % of them, {chance:.1f}, would still be
*reproduced* or *opposite*.

A panel is a contrast: how much better one training is than another, or the difference of two such
gains.  It is oriented so that the claim holds above zero, and stands as the mean over the seeds ±
half the width of its 95 % interval.  Rain left (%) enters as -|rain left|, damage (grey levels) as
-damage, so that more is better in every column.  The claim's primary measure, fixed before the
first run, decides: *reproduced* if the interval lies above zero, *opposite* if below, *undecided*
if it contains zero.  The last columns hold the primary measure in the three rains of the paper's
group; they are empty where a panel is not tested in `unseen`.  The second table of a claim holds
means over the seeds; where there is no rain (dry), rain left is not a number (nan).  There, "mean
PSNR" is that over `unseen`, `group medium` and `group large`.  "resnet 16, faces, 64 low, medium"
is a ResNet of 16 channels, trained on the 64 least sharp of 192 patches of faces in medium rain.
(For the prior and its controls, the 16 means nothing.)

A seed changes all at once: images, patches, first weights, rain, tests.  The runs of a panel share
all of these, and differ only in what the panel or its claim names.  With "any", the 8 backgrounds
are among the 1,024; with "low" they are not.  Photographs are the same in every seed; only which of
them are for tests changes: their intervals use the variance of Nadeau & Bengio (2003), and say
nothing of other photographs.  Panels share seeds and runs, so they are not independent.
"""
NOTES = {
    "prior": """
The prior was pre-trained on clean images, at first without its codebook; codebook and decoder are
then frozen, and the encoder learns by L1 and by the distance from the codes of the clean image.
Control "no codebook" differs in the codebook alone: latents pass unquantized, in pre-training and
after it.  On photographs it was not run.  Control "from nothing" has no codebook either, and
nothing is pre-trained: all parts are trained in rain, by L1.  (At first it had a codebook that was
trained with the rest.  In seed 10 it then drew one image whatever the input, at 14.1 dB on faces,
where two codes were left in use, and at 10.0 dB on photographs.  To beat that would say little.)
The ResNet was not pre-trained, adds its input to its output, has fewer parameters, and a learning
rate four times as high.  Pre-training takes more steps than the training after it, on all training
images.
""",
}


def label(run):
    """Return what a run is, as a cell of a table."""
    images = run.images.split("-")[0]
    if not run.steps:
        return f"{run.net}, {images}"
    return f"{run.net} {run.channels}, {images}, {run.n:,} {run.third}, {run.trained_on}"


def table_lines(rows):
    """Return rows of cells, of which the first are headings, as a table in Markdown."""
    rows.insert(1, ["---"] * len(rows[0]))
    return ["", *(f"| {' | '.join(row)} |" for row in rows)]


def interval(found):
    """Return a verdict's interval as text."""
    return f"{found.mean:+.1f} ± {found.half:.1f}"


def number_lines(table, runs, columns, seeds):
    """Return a table of the measures of runs; columns: pairs of a test and a step."""
    heading = ["rain left % / damage / PSNR dB", "mean PSNR"]
    rows = [heading + [f"{test}, step {step:,}" for test, step in columns]]
    for run in runs:
        row = [label(run), f"{score(table, run, seeds):.2f}"]
        for test, step in columns:
            means = measured(table, run, test, step, seeds).mean(0)
            row.append(" / ".join(f"{mean:.1f}" for mean in means))
        rows.append(row)
    return table_lines(rows)


def claim_lines(table, name, claim, panels, seeds):
    """Return a claim's part of claims.md; panels: those that are finished."""
    rows = [["panel", f"verdict by {claim.primary}", *MEASURES, *GROUP]]
    columns = set()
    for panel, terms in panels.items():
        judged = judge(table, terms, seeds)
        found = judged[claim.primary]
        psnr = judged["psnr"]
        text = f"**{found.word}**, {found.agree} of {len(seeds)} seeds"
        if psnr.word not in ("undecided", found.word):
            text += f"; by PSNR **{psnr.word}**"
        row = [panel, text, *map(interval, judged.values())]
        for test in GROUP:
            elsewhere = [term._replace(test=test) for term in terms if term.test == "unseen"]
            row.append(interval(judge(table, elsewhere, seeds)[claim.primary]) if elsewhere else "")
        rows.append(row)
        columns |= {(term.test, term.step) for term in terms}
    runs = sorted(run for run in runs_of(claim) if whole(table, [run], seeds))
    last = max(run.steps for run in runs)
    columns |= {(test, last) for test in ("unseen", *GROUP, "dry")}
    columns = sorted(columns, key=lambda column: (column[0] in ("dry", *GROUP), column))
    numbers = number_lines(table, runs, columns, seeds)
    heading = f"\n## {name}: {claim.statement}"
    verdicts = table_lines(rows) if panels else []
    return [heading, NOTES.get(name, ""), *verdicts, *numbers]


# ---- 7  Figures: what is seen at a glance? ------------------------------------------------------

COLOURS = {"reproduced": "#0072b2", "opposite": "#d55e00", "undecided": "0.5"}


def figure_verdicts(results):
    """Draw all intervals, a line a panel; results: {name and measure of the panel: Verdict}."""
    figure = Figure((11, 1.5 + 0.25 * len(results)), layout="constrained")
    axes = figure.subplots()
    for i, found in enumerate(results.values()):
        axes.errorbar(found.mean, i, xerr=found.half, fmt="o", color=COLOURS[found.word])
    axes.axvline(0, color="black")
    axes.set_yticks(range(len(results)), results)
    axes.invert_yaxis()
    axes.set(
        title="The claim holds right of 0.\nBlue: reproduced, orange: opposite, grey: undecided",
        xlabel="mean contrast and its 95 % interval, in % of the rain or in dB",
        xscale="symlog",
    )
    return figure


def figure_balance(table, runs, seeds):
    """Draw the PSNR in unseen rain; runs: those of a balance map."""
    found = [measured(table, run, "unseen", run.steps, seeds)[:, 2].mean() for run in runs]
    cells = np.reshape(found, (len(NUMBERS), len(RANGES)))
    figure = Figure((6.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cells, "Blues", aspect="auto", alpha=0.5)
    for (i, j), mean in np.ndenumerate(cells):
        frame = {"fc": "none", "lw": 3} if mean == cells[:, j].max() else None
        axes.text(j, i, f"{mean:.1f}", size=16, ha="center", va="center", bbox=frame)
    axes.set_xticks(range(len(RANGES)), RANGES)
    axes.set_yticks(range(len(NUMBERS)), NUMBERS)
    axes.set(
        title="ResNet on faces: PSNR in unseen rain, dB.\nFramed: the best number for a range",
        xlabel="range of training rain",
        ylabel="backgrounds",
    )
    return figure


def figure_default(runs, folder, photographs):
    """Draw a photograph that was set aside, in rain and dry, and what is made of it.

    By the opening, and by the networks of two runs: the chosen training and the usual one.
    """
    clean = photographs[::3][:3][-1][None, :, :320, :320]  # the third, if there is one
    rainy = degradation("unseen")(clean, derain.stream(0, "default"))
    figure = Figure((10, 5.8), layout="constrained")
    for line, kind, image in zip(
        figure.subplots(2, 4), ("in unseen rain", "without rain"), (rainy, clean)
    ):
        outputs = {kind: image, "opening 7": derain.opening(image, 7)}
        for name, run in zip(("chosen training", "usual training"), runs):
            network = make_network(run)
            network.load_state_dict(torch.load(file_of(run, folder, "pt"), weights_only=True))
            outputs[name] = derain.restore(network, image[0])[None]
        for axes, (name, output) in zip(line, outputs.items()):
            axes.imshow(output[0].permute(1, 2, 0))
            axes.set(
                title=name, xlabel=f"{derain.psnr(output, clean):.1f} dB", xticks=[], yticks=[]
            )
    return figure


# ---- 8  Command line: what is asked for? --------------------------------------------------------


def report(table, claims, wanted, seeds):
    """Return the lines of claims.md on what is finished, and its figures by name.

    Tells which panels of the wanted claims are left out, as their runs are missing.
    """
    lines = []
    results = {}
    figures = {}
    for name, claim in claims.items():
        panels = {}
        for panel, terms in claim.panels.items():
            if whole(table, [term.run for term in terms], seeds):
                panels[panel] = terms
                found = judge(table, terms, seeds)[claim.primary]
                results[f"{name}: {panel} ({claim.primary})"] = found
        complete = whole(table, runs_of(claim), seeds)
        if name in wanted and not complete:
            print(f"{name}: runs are missing", *sorted(claim.panels.keys() - panels), sep=" | ")
        if panels or complete:
            lines += claim_lines(table, name, claim, panels, seeds)

    if whole(table, claims["balance"].shown, seeds):
        figures["balance"] = figure_balance(table, claims["balance"].shown, seeds)
    if lines:
        lines.insert(
            0,
            INTRODUCTION.format(
                seeds=seeds, last=seeds[-1], count=len(results), chance=len(results) / 20
            ),
        )
    if results:
        figures["verdicts"] = figure_verdicts(results)
    return lines, figures


def main():
    """Do what is missing, collect it in runs.csv, and report."""
    parser = ArgumentParser(usage="claims.py [CLAIM...] [OPTIONS]")
    add = parser.add_argument
    add("claims", nargs="*", help="few, steps, ..., noise, advice; without, all of them")
    add("--seeds", type=int, default=5, choices=range(2, 11), help="number of seeds, 2 to 10 (5)")
    add("--first", type=derain.whole_number, help="the first of them (20 for detail, 10)")
    add(
        "--steps",
        type=derain.positive,
        default=STEPS,
        help="of each training (2400); with another number, all is written to runs/",
    )
    add("--backgrounds", help="folder of photographs, for the panels on photographs")
    add("--runs", type=Path, help="folder for all that is written, in place of runs/ and figures/")
    args = parser.parse_args()
    torch.set_num_threads(1)

    folder = args.runs or FIGURES.parent / "runs"
    out = args.runs or (FIGURES if args.steps == STEPS else folder)
    table = read_table(out / "runs.csv")

    photographs = tuple(derain.load_images(args.backgrounds, 96)) if args.backgrounds else ()
    # Without photographs: the set with the most rows.
    known = [run.images for run, _, _ in table if run.images not in PAINTERS]
    images = max(known, key=known.count, default="photographs")
    if photographs:
        pixels = b"".join(image.numpy().tobytes() for image in photographs)
        images = f"photographs-{zlib.crc32(pixels):08x}"

    claims = make_claims(images, args.steps)
    wanted = args.claims or list(claims)
    if set(wanted) - claims.keys() or 0 < len(photographs) < 4:
        parser.error(f"give 4 photographs or more, and claims out of {', '.join(claims)}")
    runs = []
    for name in wanted:
        runs += all_runs(claims[name], args.first, args.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    do_runs(list(dict.fromkeys(runs)), table, folder, photographs)
    if RANK:
        return

    lines, figures = report(table, claims, wanted, range(args.first or 10, (args.first or 10) + args.seeds))
    if not lines:
        print("no claim has all its runs, so no report; --backgrounds PATH gives photographs")
        return
    write_table(table, out / "runs.csv")
    write(out / "claims.md", "\n".join([*lines, ""]).encode())
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
    print(f"wrote claims.md and {', '.join(figures)} in {out}")


if __name__ == "__main__":
    try:
        main()
    except (derain.BadInput, OSError, csv.Error) as problem:
        print("claims.py:", problem, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("claims.py: stopped; finished runs are kept", file=sys.stderr)
        sys.exit(130)
