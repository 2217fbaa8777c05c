"""Which claims hold here, the paper's and our own?  Trainings, verdicts, figures, claims.md.

    python figures/claims.py                    every claim: trains what is missing, then reports
    python figures/claims.py few --seeds 2 --steps 20 --runs trial      one, short, in trial/
    torchrun --nproc_per_node=2 figures/claims.py       the same on two cores

With more machines, all must share runs/.  If one process stops, stop all and start again, as the
others would wait for its results.  With other seeds or steps than usual, the report is written to
runs/, and the tracked files stay.

Panels, primary measures and seeds were fixed before a claim's first run.  What was changed later is
told in claims.md.

1 runs       a Run is one training and its tests
2 files      its result is a file in runs/, and is never done twice; runs.csv collects them all
3 claims     statements as contrasts: differences of measures, above zero if the statement holds
4 verdicts   from the 95 % interval of a contrast's mean over the seeds
5 report     claims.md
6 figures    verdicts.png, balance.png, detail.png, default.png
7 command    what is asked for

In what follows, table[run, test, step] is a dict of what a run measured in a test after a step.
`photographs` is a folder, or None; in section 3 it is the name of their set.
"""

import csv
import json
import math
import os
import sys
import time
import zlib
from argparse import ArgumentParser
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))
import derain  # noqa: E402
from derain import MANY  # noqa: E402
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
NUMBERS = (2, 8, 64, MANY)  # of backgrounds
RANGES = ("small", "medium", "large")  # of training rain
UNTRAINED = {
    "rainy": torch.clone,
    "opening 5": derain.opening,
    "opening 7": partial(derain.opening, size=7),
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
    return sorted({math.ceil(run.steps / 12), run.steps})


def tests_of(run):
    """Return the names of the degradations that a run is tested in."""
    if not run.steps:
        return [*RAIN, *GROUP, *NOISE, "dry"]
    # After small rain, one factor is changed in further tests; after Gaussian noise, the noise.
    further = {"small": FACTORS, "gaussian": NOISE}.get(run.trained_on, ())
    return list(dict.fromkeys(["unseen", *GROUP, run.trained_on, *further, "dry"]))  # each once


@lru_cache(4)  # keeps the last four sets, as making them takes time
def images_of(images, seed, photographs):
    """Return images (3, h, w) to train on, and others to test on.

    A fifth of the drawn images is for tests.  Of photographs, a quarter is, which the seed picks.
    """
    if images not in PAINTERS:
        return derain.training_and_held_out(photographs, seed)
    drawn = [
        draw_background(images, 256, rng=derain.stream(seed, "backgrounds", i)) for i in range(80)
    ]
    return drawn[16:], drawn[:16]


def make_network(run, training=()):
    """Return the network of a run before its training; a prior is pre-trained on `training`."""
    if run.net in derain.NETWORKS:
        return derain.build_network(partial(derain.NETWORKS[run.net], run.channels), run.seed)

    vqgan = derain.build_network(derain.VQGAN, seed=run.seed, **derain.PRIOR)
    if run.net != "prior":
        vqgan.quantize = NoCodebook(derain.PRIOR["n_embed"], derain.PRIOR["embed_dim"])
    if run.net == "from nothing":
        return FromNothing(vqgan)
    # 5,000 steps before a run of 2,400, as with `derain.py vqgan`.
    derain.pretrain(vqgan, training, steps=math.ceil(run.steps * 5000 / STEPS), seed=run.seed)
    return derain.VQGANPrior(vqgan)


def measure(run, folder, photographs=None):
    """Train as a run says; test on 16 patches of 96 x 96 pixels; return a row for each test.

    bright_detail is the largest among the training patches, in grey levels.  Trained weights are
    written to the folder; default.png is drawn with them.
    """
    training, held_out = images_of(run.images, run.seed, photographs)
    clean = derain.sample_patches(
        held_out, 16, size=96, rng=derain.stream(run.seed, "test patches")
    )
    detail = math.nan
    rows = []

    def test(step, restore):
        for kind in tests_of(run):
            degraded = degradation(kind)(clean, derain.stream(run.seed, "test", kind))
            measures = derain.decoupled_evaluation(restore(degraded), degraded, clean=clean)
            measures["bright_detail"] = detail
            rounded = {name: round(value, 4) for name, value in measures.items()}
            rows.append({**asdict(run), "step": step, "tested_on": kind, **rounded})

    if run.net in UNTRAINED:
        test(0, UNTRAINED[run.net])
        return rows

    network = make_network(run, training)
    patches = backgrounds(training, run.n, seed=run.seed, choice=run.choice)
    detail = 255 * derain.bright_detail(patches).max().item()

    def after_step(step):
        if step in steps_of(run):
            test(step, partial(derain.predict, network))

    train = partial(
        derain.train,
        network,
        patches,
        degrade=degradation(run.trained_on, training=True),
        steps=run.steps,
        seed=run.seed,
        after_step=after_step,
    )
    if run.net in derain.NETWORKS:
        train()
    else:
        train(loss=network.loss, rate=derain.PRIOR_RATE)
    derain.save_checkpoint(file_of(run, folder, suffix="pt"), network, net=run.net)
    return rows


# ---- 2  Files: how are results kept? ------------------------------------------------------------

MEASURES = ("rain_left", "damage", "psnr")  # what the claims use
COLUMNS = ("rain_left", "damage", "E_R", "E_B", "psnr", "ssim", "bright_detail")  # of runs.csv


def file_of(run, folder, suffix="json"):
    """Return the file for the result of a run."""
    name = "_".join(map(str, astuple(run)))
    return folder / f"{name}.{suffix}".replace(" ", "-")


def whole(table, runs):
    """Return whether the table holds all tests of all runs."""
    return all(
        (run, *place) in table for run in runs for place in product(tests_of(run), steps_of(run))
    )


def add_rows(table, rows):
    """Put rows, lines of runs.csv or of a result, into the table; return how many are damaged."""
    damaged = 0
    for row in rows:
        try:
            about = {field.name: field.type(row[field.name]) for field in fields(Run)}
            # Where a line ends early, a cell is None; float(None) raises TypeError.
            found = {name: float(row.get(name, "nan")) for name in COLUMNS}
            if math.isnan(found["damage"] + found["psnr"]):  # these can always be measured
                raise ValueError
            table[Run(**about), row["tested_on"], int(row["step"])] = found
        except (ValueError, TypeError, KeyError):
            damaged += 1
    return damaged


def read_table(path):
    """Return the table in runs.csv; print how much of it is damaged."""
    table = {}
    if not path.exists():
        return table
    text = path.read_text("utf-8-sig", "replace")
    # A last line without an end may be cut inside a number: 2 may be left of 23.4.
    lines = text.rpartition("\n")[0].splitlines()
    damaged = add_rows(table, csv.DictReader(lines, quoting=csv.QUOTE_NONE))
    if damaged or not text.endswith("\n"):
        print(f"{path}: {damaged} damaged lines, {len(table)} others")
    return table


def is_missing(run, table, folder):
    """Look for a run in the table, then in its file, which is added to the table."""
    file = file_of(run, folder)
    if not whole(table, [run]) and file.exists():
        try:
            add_rows(table, json.loads(file.read_bytes()))
        except (ValueError, TypeError):
            pass  # it is missing
    return not whole(table, [run])


def do_runs(runs, table, folder, photographs):
    """Do the runs that are missing, and put all into the table.

    Under torchrun, each process does its share, and waits for those of the others.  Runs on
    photographs are left out if there are none.
    """
    for run in runs:
        if is_missing(run, table, folder=folder) and file_of(run, folder).exists() and not RANK:
            print(f"{file_of(run, folder)} is damaged or lacks a measure: its run is missing")
    possible = [run for run in runs if run.images in PAINTERS or photographs]
    mine = possible[RANK::RANKS]
    for done, run in enumerate(mine, start=1):
        if is_missing(run, table, folder=folder):
            print(f"{done} of {len(mine)}: {run}")
            rows = measure(run, folder, photographs=photographs)
            derain.write_file(file_of(run, folder), json.dumps(rows).encode())
            if is_missing(run, table, folder=folder):
                raise derain.BadInput("the training of this run diverged: it gave no number")
    for run in possible:
        while is_missing(run, table, folder=folder):
            time.sleep(1)


# ---- 3  Claims: what is said, and which runs can tell? ------------------------------------------


class Term(NamedTuple):
    """A term of a contrast: what a run measured in a test after a step, with a weight."""

    weight: int
    run: Run
    test: str
    step: int


def alone(run, test="unseen"):
    """Return a run after its last step, as a term."""
    return Term(1, run, test=test, step=run.steps)


def better(first, second, test="unseen"):
    """Return the contrast that is above zero if the first run is better, after the last step."""
    return [alone(first, test), alone(second, test)._replace(weight=-1)]


def more(first, second):
    """Return the contrast that is above zero if the first contrast is larger than the second."""
    return first + [term._replace(weight=-term.weight) for term in second]


def few(run, test="unseen"):
    """Return the contrast that is above zero if 8 backgrounds are better than 1,024."""
    return better(replace(run, n=8), replace(run, n=MANY), test=test)


def many(run, test="unseen"):
    """Return the contrast that is above zero if 1,024 backgrounds are better than 8."""
    return better(replace(run, n=MANY), replace(run, n=8), test=test)


class Claim(NamedTuple):
    """A statement; its panels are contrasts that are above zero if it holds."""

    statement: str
    panels: dict[str, list[Term]]
    primary: str = "rain_left"  # the measure that decides
    shown: Sequence[Term] = ()  # for a figure or a table
    often: Sequence[Term] = ()  # the same, with twice as many seeds
    first: int = 10  # of its seeds
    count: int = 5  # of its seeds

    def seeds(self, times=1):
        """Return the seeds, or `times` as many."""
        return range(self.first, self.first + times * self.count)


# The panels of `detail`: a setting of `few`, the number of backgrounds, and two choices of them.
DETAIL = (
    ("resnet, faces", 8, "plain", "exchanged"),
    ("unet, faces", 8, "plain", "exchanged"),
    ("swinir, faces", 8, "plain", "exchanged"),
    ("resnet, photographs", 8, "plain", "exchanged"),
    ("resnet, faces", 8, "inverted", "exchanged"),
    ("resnet, faces", 8, "edge", "exchanged"),
    ("resnet, faces", 512, "plain", "detailed"),
    ("resnet, photographs", 512, "plain", "detailed"),
    ("resnet, faces", 8, "plain", "detailed"),
    ("resnet, photographs", 8, "plain", "detailed"),
    ("resnet, faces", MANY, "opened", "closed"),
    ("resnet, photographs", MANY, "opened", "closed"),
)
# From none to the patch with the most bright detail, by quantiles of it.
DOSE = ("plain", "quantile 0.6", "quantile 0.75", "quantile 0.9", "quantile 0.975", "exchanged")


def make_claims(photographs, steps=STEPS):
    """Return all claims by name; photographs: the name of their set."""
    faces = Run(steps=steps)
    photos = replace(faces, images=photographs)
    settings = {f"{net}, faces": replace(faces, net=net) for net in derain.NETWORKS}
    settings["resnet, photographs"] = photos
    for images in ("natural", "manga", "urban"):
        settings[f"resnet, {images}"] = replace(faces, images=images)
    detail = Claim(
        "ours: one background with bright, thin structure among eight plain ones spoils the "
        "removal of unseen rain; 512 plain are better than 512 detailed; and 1,024 without "
        "bright detail are better than 1,024 that kept it",
        {
            f"{name}, {n:,} {first} against {second}": better(
                replace(settings[name], n=n, choice=first),
                replace(settings[name], n=n, choice=second),
            )
            for name, n, first, second in DETAIL
        },
        shown=[alone(replace(faces, n=8, choice=choice)) for choice in DOSE],
        often=[alone(replace(faces, n=8))],
        first=20,
    )
    return {
        **claims_on_number(settings, faces, photos=photos),
        **claims_on_more(faces, photos),
        "detail": detail,
    }


def claims_on_number(settings, faces, photos):
    """Return the claims on the number of backgrounds; settings: {name: run}."""
    number = {name: few(run) for name, run in settings.items()}
    for test in ("group medium", "group large"):
        pair = few(replace(photos, trained_on="group small"), test)
        number[f"resnet, photographs, group small to {test}"] = pair
    steps = steps_of(faces)
    return {
        "few": Claim(
            "8 backgrounds beat 1,024 in unseen rain, when trained in small rain (Fig. 1, 4)",
            number,
            shown=filters(photos.images),
        ),
        "steps": Claim(
            f"what 8 gain over 1,024 is more after {steps[-1]:,} steps than after {steps[0]:,}",
            {
                name: more(few(run), [term._replace(step=steps[0]) for term in few(run)])
                for name, run in settings.items()
            },
        ),
        "benchmark": Claim(
            "in the training rain, 1,024 backgrounds have a higher PSNR than 8 (Fig. 1)",
            {name: many(run, "small") for name, run in settings.items()},
            primary="psnr",
        ),
        "factors": Claim(
            "what 8 gain over 1,024 is more where one factor of rain leaves the training range",
            {name: more(few(faces, name), few(faces, "small")) for name in FACTORS},
        ),
        "capacity": Claim(
            "8 beat 1,024 with a quarter of the ResNet's parameters, and with four times",
            {f"{size} channels": few(replace(faces, channels=size)) for size in (8, 32)},
        ),
        "noise": Claim(
            "8 backgrounds beat 1,024 in other noise, when trained in Gaussian noise",
            {
                test: few(replace(faces, trained_on="gaussian"), test)
                for test in ("correlated", "salt and pepper")
            },
        ),
    }


def claims_on_more(faces, photos):
    """Return the claims on the range of rain, simple images and the prior."""
    balance = {}
    prior = {}
    for name, run in (("faces", faces), ("photographs", photos)):
        balance[name] = more(many(replace(run, trained_on="large")), many(run))
        for net in ("resnet", "from nothing", "no codebook"):
            pair = better(replace(run, net="prior"), replace(run, net=net))
            prior[f"{name}, prior against {net}"] = pair
    # Cut, as it takes more than an hour of one core.
    prior.pop("photographs, prior against no codebook")
    low = replace(photos, choice="low")
    high = replace(photos, choice="high")
    return {
        "balance": Claim(
            "what 1,024 gain over 8 is more if trained in large rain than if in small",
            balance,
            primary="psnr",
            shown=[alone(replace(faces, n=n, trained_on=rain)) for rain in RANGES for n in NUMBERS],
        ),
        "sharp": Claim(
            "photographs: backgrounds of low sharpness beat those of high (Fig. 5); "
            "and what 8 gain over 1,024 is less at low sharpness than at any",
            {
                "gain of 8, any against low": more(few(photos), few(low)),
                "64, low against high": better(replace(low, n=64), replace(high, n=64)),
                "1,024, low against high": better(low, high),
            },
        ),
        "prior": Claim(
            "on 1,024 backgrounds, a content prior beats the ResNet and two controls",
            prior,
            primary="psnr",
        ),
        "default": Claim(
            "the default of `derain.py train` beats the usual training: 1,024 of low sharpness in "
            "large rain against 1,024 of any sharpness in small rain",
            {
                f"photographs, {test}": better(replace(low, trained_on="large"), photos, test=test)
                for test in ("unseen", *GROUP, "dry")
            },
            primary="psnr",
        ),
    }


def filters(photographs):
    """Return UNTRAINED in unseen rain, and on photographs in other tests."""
    places = [(images, "unseen") for images in (*PAINTERS, photographs)]
    places += [(photographs, test) for test in (*GROUP, "dry")]
    return [
        alone(Run(net=net, images=images, n=0, trained_on="", steps=0), test)
        for net, (images, test) in product(UNTRAINED, places)
    ]


def seeded(terms, seeds):
    """Return the runs of terms, with each of the seeds."""
    return [replace(term.run, seed=seed) for seed, term in product(seeds, terms)]


def shown_runs(claim):
    """Return the runs of a claim that are in no panel, with their seeds."""
    return seeded(claim.often, claim.seeds(2)) + seeded(claim.shown, claim.seeds())


def all_runs(claim):
    """Return all runs that a claim needs, with their seeds."""
    terms = chain.from_iterable(claim.panels.values())
    return shown_runs(claim) + seeded(terms, claim.seeds())


# ---- 4  Verdicts: what do the numbers say? ------------------------------------------------------

SIGN = np.array([-1, -1, 1])  # of the MEASURES: -1 if what is nearer to 0 is better
# 97.5 % quantiles of Student's t-distribution with 1, 2, ... degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class Verdict(NamedTuple):
    """A contrast by one measure: the mean over the seeds, and what follows from its interval."""

    effects: np.ndarray  # the contrast in each seed
    mean: float
    half: float  # of the width of the 95 % interval
    word: str  # "reproduced", "opposite" or "undecided"
    firm: bool  # the word stays whichever seed is left out


def interval(effects, photographs):
    """Return the mean of a contrast, from its values in 2 to 10 seeds, and half its 95 % interval.

    photographs: the seeds share the same images, so they are not independent.  With s^2, the
    variance of the values, that of their mean is then estimated by (1 / n + 6 / 18) s^2, where 6 of
    24 photographs are for tests and 18 for training (Nadeau & Bengio 2003).  For other numbers from
    4 on, the ratio is 1 / 3 or less, so that the interval is not too short.
    """
    n = len(effects)
    variance = np.var(effects, ddof=1) * (1 / n + (6 / 18 if photographs else 0))
    return np.mean(effects), T_975[n - 2] * math.sqrt(variance)


def verdict(effects, photographs=False):
    """Return the verdict on a contrast, from its values in 2 to 10 seeds."""

    def word(effects):
        mean, half = interval(effects, photographs)
        if abs(mean) > half:
            return "reproduced" if mean > 0 else "opposite"
        return "undecided"

    firm = len(effects) > 2
    for seed in range(len(effects)):
        firm = firm and word(np.delete(effects, seed)) == word(effects)
    mean, half = interval(effects, photographs)
    return Verdict(effects, mean, half=half, word=word(effects), firm=firm)


def correlation(points):
    """Return the correlation of x and y of points, and its 95 % interval by Fisher's z."""
    z = np.arctanh(np.corrcoef(np.transpose(points))[0, 1])
    return np.tanh(z + np.array([0, -1.96, 1.96]) / math.sqrt(len(points) - 3))


def measured(table, term, seeds):
    """Return what the run of a term measured, (seeds, measures)."""
    places = [(run, term.test, term.step) for run in seeded([term], seeds)]
    return np.array([[table[place][name] for name in MEASURES] for place in places])


def judge(table, terms, seeds):
    """Return the verdict on a contrast by each of the MEASURES; rain left without its sign."""
    effects = sum(term.weight * SIGN * abs(measured(table, term, seeds=seeds)) for term in terms)
    photographs = terms[0].run.images not in PAINTERS
    return {name: verdict(effects[:, i], photographs) for i, name in enumerate(MEASURES)}


# ---- 5  Report: what stands in claims.md? -------------------------------------------------------

INTRODUCTION = """\
# What came out, claim by claim

A *panel* says by how much one training beats another, or one such gain another; all else of a seed is the same, and the claim holds above 0.
Rain left (`rain_left`) counts in points nearer to 0 %, damage in grey levels less, PSNR (`psnr`) in dB; in `unseen` rain, if no other is named.
Mean over the seeds ± half its 95 % interval: *reproduced* if all of it is above 0, *opposite* if below, else *undecided*; *firm*: reproduced whichever seed is left out.
The primary measure, fixed before a claim's first run, decides: [its intervals, a tick a seed](verdicts.png).

Panels share runs, seeds and sets of eight: this is one experiment seen from many sides, without a score over all.  Photographs are the same 24 in every seed; their intervals (Nadeau & Bengio 2003) say nothing of others.  **Changed after runs were seen:** a first edition (seeds 0 to 4, networks without a skip, measures E_R and E_W) came before these statements, measures and seeds, its claim `blur` (8 beat 1,024 in motion blur) was refuted by E_R and dropped, and `detail` was found on seeds 0 to 14 before its panels and seeds were fixed.  When seed 10 had been seen, the prior's control *from nothing* lost its codebook (with one it drew one image whatever its input), and to save time *prior against no codebook* on photographs, 2 and 64 backgrounds beside `few`, a map of `balance` on photographs, and SwinIR among the settings for `default` were cut.

| claim | it says | primary | panels | rain left | damage | PSNR | means by the primary | weakest panel |
|-|-|-|-|-|-|-|-|-|"""
NOTES = {
    "prior": "The prior was pre-trained on clean images; its encoder then learns in rain.  *No codebook*: the same without quantization.  *From nothing*: neither codebook nor pre-training; all parts learn in rain, by L1.  The ResNet has fewer parameters, no pre-training, four times the learning rate, and adds its input.\n\n",
    "default": "Chosen among eleven settings (claim `advice` of the second edition) on 16 of the 24 photographs, seeds 100 to 104, by mean PSNR in `unseen`, `group medium` and `group large`, which are not unseen to it.  Four settings tied (the first 0.1 ± 1.6 dB above the second, ahead in three seeds of five).  Picture: [default.png](default.png).\n\n",
}
DETAIL_TEXT = """\
- *Without a verdict*, `detail`: 512 plain against 8 plain, rain left, with a margin of ± 10 points: faces {texts[1]}, photographs {texts[2]}.  With 8 faces as they come, rain left and their largest bright detail correlate by {found:.2f} (95 % interval {low:.2f} to {high:.2f}): [detail.png](detail.png).

| one of 8 plain faces exchanged for | nothing | quantile 0.6 | 0.75 | 0.9 | 0.975 | 1 of bright detail |
|-|-|-|-|-|-|-|
| rain left %/damage/PSNR | {texts[0]} |
"""
FOLD = """\
<details><summary>{name}, {claim.count} seeds from {claim.first}</summary>

{note}| panel | first | second | seeds | rain left | damage | PSNR | verdict |
|-|-|-|-|-|-|-|-|"""
FILTERS = """
| not trained | faces | natural | manga | urban | photographs | photographs, group small | group medium | group large | no rain |
|-|-|-|-|-|-|-|-|-|-|"""


def text_of(found):
    """Return a verdict's interval as text, with two digits where it ends near to 0."""
    digits = 2 if abs(abs(found.mean) - found.half) <= 0.1 else 1
    return f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}".replace("+nan ± nan", "–")


def levels(table, terms, seeds):
    """Return cells with means over the seeds: rain left / damage / PSNR."""
    cells = []
    for term in terms:
        left, damage, psnr = measured(table, term, seeds=seeds).mean(0)
        cells.append(f"{left:.0f}/{damage:.0f}/{psnr:.1f}".replace("nan", "–"))
    return " | ".join(cells)


def summary_line(name, claim, panels):
    """Return a claim's line in the first table; panels: {name: verdicts}."""
    counts = []
    for measure in MEASURES:
        words = [verdicts[measure].word for verdicts in panels.values()]
        counts.append(f"{words.count('reproduced')} yes, {words.count('opposite')} no")
    found = {panel: verdicts[claim.primary] for panel, verdicts in panels.items()}
    means = [one.mean for one in found.values()]
    weakest = min(found, key=lambda panel: found[panel].mean - found[panel].half)
    return (
        f"| `{name}` | {claim.statement} | {claim.primary} | {len(panels)} | {' | '.join(counts)} "
        f"| {min(means):+.1f} to {max(means):+.1f} | {weakest}: {text_of(found[weakest])} |"
    )


def panel_line(table, claim, panel, verdicts):
    """Return a panel's line in the table of its claim."""
    terms = claim.panels[panel]
    found = verdicts[claim.primary]
    word = found.word
    if word == "reproduced" and found.firm:
        word += ", firm"
    if len(terms) > 2:
        gain = judge(table, terms[:2], seeds=claim.seeds())[claim.primary]
        word += f"; first gain {text_of(gain)}"
    pair = levels(table, terms[:2], seeds=claim.seeds())
    effects = [f"{effect:.2g}" for effect in found.effects]
    intervals = [text_of(one) for one in verdicts.values()]
    return f"| {panel} | {pair} | {' '.join(effects)} | {' | '.join(intervals)} | {word} |"


def detail_text(table, claim, rows):
    """Return what stands of `detail` beside its panels; rows: those of detail.csv."""
    drawn = [(row["bright_detail"], row["rain_left"]) for row in rows if row["choice"] == "any"]
    found, low, high = correlation(drawn)
    texts = [levels(table, claim.shown, seeds=claim.seeds())]
    for name in ("faces", "photographs"):
        run = claim.panels[f"resnet, {name}, 8 plain against detailed"][0].run
        judged = judge(table, better(replace(run, n=512), run), seeds=claim.seeds())
        texts.append(text_of(judged["rain_left"]))
    return DETAIL_TEXT.format(texts=texts, found=found, low=low, high=high)


def fold_lines(table, name, claim, panels):
    """Return a claim's table, folded; panels: {name: verdicts}."""
    lines = [FOLD.format(name=name, claim=claim, note=NOTES.get(name, ""))]
    for panel, verdicts in panels.items():
        lines.append(panel_line(table, claim, panel=panel, verdicts=verdicts))
    return [*lines, "\n</details>"]


# ---- 6  Figures: what is seen at a glance? ------------------------------------------------------

COLOURS = {"reproduced": "#0072b2", "opposite": "#d55e00", "undecided": "0.5"}


def figure_verdicts(every):
    """Draw all intervals; every: {primary measure: {panel: verdict by this}}."""
    figure = Figure((17, 11), layout="constrained")
    figure.suptitle(
        "Right of 0 the claim holds.  Blue: reproduced, orange: opposite, grey: undecided.\n"
        "Dot and line: mean and 95 % interval.  Ticks: seeds.",
    )
    names = ("rain left: points nearer to 0 %", "PSNR: dB")
    for axes, name, panels in zip(figure.subplots(1, 2), names, every.values()):
        for y, found in enumerate(panels.values()):
            axes.plot(found.effects, [y] * len(found.effects), "k|")
            axes.errorbar(found.mean, y, xerr=found.half, fmt="o", color=COLOURS[found.word])
        axes.axvline(0, color="black")
        axes.set_yticks(range(len(panels)), panels)
        axes.invert_yaxis()
        axes.set_xlabel(name)
    return figure


def figure_balance(table, claim):
    """Draw the PSNR in unseen rain over the number of backgrounds, with 95 % intervals."""
    figure = Figure((8, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, rain in enumerate(RANGES):
        terms = [term for term in claim.shown if term.run.trained_on == rain]
        found = [measured(table, term, seeds=claim.seeds())[:, -1] for term in terms]
        means, halves = np.transpose([interval(psnr, photographs=False) for psnr in found])
        places = np.arange(len(NUMBERS)) + i / 15  # beside each other
        axes.errorbar(places, means, yerr=halves, fmt="o-", label=rain)
    axes.set_xticks(range(len(NUMBERS)), NUMBERS)
    axes.set(
        title="ResNet on faces: PSNR in unseen rain, mean and 95 % interval",
        xlabel="backgrounds",
        ylabel="PSNR, dB",
    )
    axes.legend(title="range of training rain", loc="upper left")
    return figure


def figure_detail(rows):
    """Draw unseen rain that is left over bright detail; rows: those of detail.csv."""
    figure = Figure((12, 5.6), layout="constrained")
    figure.suptitle(
        "The more bright detail one of 8 backgrounds has, the more rain is left", size=16
    )
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for row in rows:
        axes = left if row["choice"] == "any" else right
        axes.plot(row["bright_detail"], row["rain_left"], "o", color="#0072b2", ms=9)
    left.set(title="8 faces as they come, ten seeds", ylabel="unseen rain that is left, %")
    right.set(title="8 plain ones, one of them exchanged, five seeds", ylim=(0, 100))
    figure.supxlabel("most bright detail among the 8 (grey levels)")
    return figure


def figure_default(runs, folder, held_out):
    """Draw a test image in unseen rain and without; and what is made of it."""
    networks = [derain.load_checkpoint(file_of(run, folder, suffix="pt")) for run in runs]
    images = derain.test_images(held_out, "unseen", seed=runs[0].seed)["unseen"]
    clean = images["clean"][2:3]
    names = ("unseen rain", "opening 7", "default of train", "usual training")
    figure = Figure((12, 6.8), layout="constrained")
    for line, image in zip(figure.subplots(2, 4), (images["rainy"][2:3], clean)):
        outputs = [image, derain.opening(image, 7)]
        outputs += [derain.predict(network, image) for network in networks]
        for axes, name, output in zip(line, names, outputs):
            title = f"{name}: {derain.psnr(output, clean):.1f} dB"
            derain.show(
                axes, output[0], title="no rain: unchanged" if output.equal(clean) else title
            )
    return figure


# ---- 7  Command line: what is asked for? --------------------------------------------------------


def report(table, claims, wanted, out):
    """Write runs.csv, claims.md, and the figures whose runs are finished.

    Tells which panels of the wanted claims are left out, as their runs are missing.
    """
    lines = [INTRODUCTION]
    folds = []
    every = {"rain_left": {}, "psnr": {}}
    firm = []
    undecided = []
    for name, claim in claims.items():
        panels = {}
        for panel, terms in claim.panels.items():
            if whole(table, seeded(terms, claim.seeds())):
                panels[panel] = judge(table, terms, seeds=claim.seeds())
                found = panels[panel][claim.primary]
                every[claim.primary][f"{name}: {panel}"] = found
                if found.word == "reproduced":
                    firm.append(found.firm)
                if found.word == "undecided":
                    undecided.append(f"`{name}` {panel}")
            elif name in wanted:
                print(f"{name}: runs are missing for {panel}")
        if panels:
            lines.append(summary_line(name, claim, panels=panels))
            folds += fold_lines(table, name, claim=claim, panels=panels)
    if not folds:
        print("no claim has all its runs, so no report; --backgrounds PATH gives photographs")
        return

    lines.append(
        f"\n- Of {len(firm)} reproduced, {firm.count(False)} lose the word if one seed is left out.\n"
        f"- *Undecided* by the primary measure: {'; '.join(undecided)}.\n"
        "- In the tables, *first* and *second* are the two trainings of the (first) gain: rain left "
        "%/damage/PSNR."
    )
    derain.save_figure(figure_verdicts(every), out / "verdicts.png")
    if whole(table, shown_runs(claims["few"])):
        folds.append(FILTERS)
        for net in UNTRAINED:
            terms = [term for term in claims["few"].shown if term.run.net == net]
            folds.append(f"| {net} | {levels(table, terms, seeds=claims['few'].seeds())} |")
    if whole(table, shown_runs(claims["balance"])):
        derain.save_figure(figure_balance(table, claims["balance"]), out / "balance.png")
    dose = shown_runs(claims["detail"])
    if whole(table, dose):
        rows = [{**asdict(run), **table[run, "unseen", run.steps]} for run in dose]
        derain.write_table(out / "detail.csv", rows)
        derain.save_figure(figure_detail(rows), out / "detail.png")
        if whole(table, all_runs(claims["detail"])):
            lines.append(detail_text(table, claims["detail"], rows=rows))
    text = "\n".join([*lines, *folds, ""]).replace("</details>\n<details>", "</details><details>")
    derain.write_file(out / "claims.md", text.encode())

    rows = [
        {**asdict(run), "step": step, "tested_on": test, **table[run, test, step]}
        for run, test, step in sorted(table)  # so that the same runs give the same bytes
    ]
    derain.write_table(out / "runs.csv", rows)


def main():
    """Do what is missing, collect it in runs.csv, and report."""
    parser = ArgumentParser(usage="claims.py [CLAIM...] [OPTIONS]")
    add = parser.add_argument
    add("claims", nargs="*", help="few, steps, ..., detail, default; without, all of them")
    add("--seeds", type=int, default=5, choices=range(2, 11), help="number of seeds, 2 to 10 (5)")
    add("--first", type=derain.whole_number, help="the first of them (10, detail: 20)")
    add("--steps", type=derain.positive, default=STEPS, help="of each training (2400)")
    add("--backgrounds", type=Path, help="folder of photographs, for the panels on photographs")
    add("--runs", type=Path, help="folder for all that is written, in place of runs/ and figures/")
    args = parser.parse_args()
    torch.set_num_threads(1)

    folder = args.runs or FIGURES.parent / "runs"
    table = read_table((args.runs or FIGURES) / "runs.csv")

    # Without photographs: the set with the most rows.
    known = [run.images for run, _, _ in table if run.images not in PAINTERS]
    images = max(known, key=known.count, default="photographs")
    if args.backgrounds:
        photographs = derain.load_images(args.backgrounds, derain.TEST_PATCH)
        if len(photographs) < 4:
            parser.error("give four photographs or more")
        pixels = b"".join(image.numpy().tobytes() for image in photographs)
        images = f"photographs-{zlib.crc32(pixels):08x}"

    claims = make_claims(images, args.steps)
    for name, claim in claims.items():
        first = claim.first if args.first is None else args.first
        claims[name] = claim._replace(first=first, count=args.seeds)
    wanted = args.claims or list(claims)
    if set(wanted) - claims.keys():
        parser.error(f"give claims out of {', '.join(claims)}")
    runs = dict.fromkeys(run for name in wanted for run in all_runs(claims[name]))  # each once
    folder.mkdir(parents=True, exist_ok=True)
    do_runs(runs, table, folder=folder, photographs=args.backgrounds)
    if RANK:
        return
    options = (args.runs, args.seeds, args.first, args.steps)
    out = FIGURES if options == (None, 5, None, STEPS) else folder
    report(table, claims, wanted=wanted, out=out)
    default = claims["default"]
    pair = seeded(default.panels["photographs, unseen"], [default.first])
    if args.backgrounds and all(file_of(run, folder, suffix="pt").exists() for run in pair):
        _, held_out = images_of(images, default.first, args.backgrounds)
        derain.save_figure(figure_default(pair, folder, held_out=held_out), out / "default.png")


if __name__ == "__main__":
    try:
        main()
    except (derain.BadInput, OSError, csv.Error) as problem:
        print("claims.py:", problem, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("claims.py: stopped; finished runs are kept", file=sys.stderr)
        sys.exit(130)
