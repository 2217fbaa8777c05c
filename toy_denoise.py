"""Why do restoration networks fail on unseen noise? The idea of derain.py in one dimension.

A network learns to turn a noisy signal into a clean one. It can learn what clean signals look like,
or what the noise looks like. Both ways work on the training noise. Only the first way works on
other noise. Hu et al. (arXiv 2502.12600) found, for images in rain, that a network learns whichever
of the two is simpler. Here is the same in 1-D:

    function (the clean signal)  =  a sum of 3 shapes from a list of K shapes
    noise                        =  a sum of 3 shapes from another list of J shapes
    noisy signal                 =  function + noise

All shapes are random. Only the lengths of the lists tell functions from noise, and the shorter list
is the simpler one. We train with these two lists. Then we test with unseen noise, from a third
list.

    here                                     in derain.py
    a function; K                            a background; how complex the backgrounds are
    the noise; J                             the rain; how much the training rain varies
    a shape in the noise                     a streak
    unseen noise: a third list of shapes     unseen rain: other directions and lengths
    noise left, damage                       rain_left, damage
    the codebook of the K function shapes    the VQGAN: its codebook and its decoder

The toy tests on new sums of the same K shapes; derain.py tests on new backgrounds. Noise is as
large as functions; rain is thin and bright. The codebook is given; a VQGAN has to learn it.

    python toy_denoise.py        # the first picture after a few seconds, all of it in a minute
"""

import argparse
import io
import statistics
import time
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

# ---- 1. Signals: what is a function, and what is noise? ------------------------------------------
# The same code makes both.

SAMPLES = 64  # numbers in a signal
WIDTH = 9  # numbers in a shape
PLACES = SAMPLES - WIDTH + 1  # where a shape fits into a signal: 56 places
LENGTHS = (1, 8, 64)  # the K and the J that we try


def draw_lists(k: int, j: int, seed: int) -> tuple[Tensor, ...]:
    """Draw four lists of random shapes.

    Returns the K function shapes, the J shapes of the training noise, 64 shapes of the unseen noise
    and K wrong shapes (for section 5), each (length, WIDTH). A shape has mean 0 and norm 1. The
    norm is the root of the sum of squares. A short list is the beginning of a long one.
    """
    torch.manual_seed(seed)
    shapes = torch.randn(4, 64, WIDTH)  # 4 lists of 64 shapes

    shapes = shapes - shapes.mean(2, keepdim=True)
    functions, training, unseen, wrong = F.normalize(shapes, dim=2)

    return functions[:k], training[:j], unseen, wrong[:k]


def place_everywhere(shapes: Tensor) -> Tensor:
    """Put each shape at each place where it fits, with zeros around it.

    A shape at one place is called an atom. For example, a shape (a, b) fits into a signal of 4
    numbers at 3 places, which gives 3 atoms:

        a b 0 0
        0 a b 0
        0 0 a b

    shapes: (count, WIDTH). Returns the atoms, (count * PLACES, SAMPLES).
    """
    atoms = torch.zeros(len(shapes), PLACES, SAMPLES)

    for place in range(PLACES):
        atoms[:, place, place : place + WIDTH] = shapes

    return atoms.flatten(0, 1)  # (count * PLACES, SAMPLES)


def draw_sums(count: int, atoms: Tensor) -> Tensor:
    """Draw signals: each is the sum of 3 random atoms, each times a random height.

    The heights are Gaussian. An atom may be drawn twice.
    atoms: from `place_everywhere`. Returns (count, SAMPLES). Each signal is scaled to RMS 1, where
    RMS is the root of the mean of the squares.
    """
    chosen = torch.randint(len(atoms), (count, 3))  # indices of atoms
    heights = torch.randn(count, 3, 1)
    sums = (heights * atoms[chosen]).sum(1)  # (count, 3, SAMPLES) to (count, SAMPLES)

    return F.normalize(sums) * SAMPLES**0.5  # norm 1 to RMS 1


# ---- 2. Training: what does the network learn from? ----------------------------------------------
# It sees pairs: a noisy signal, and the function that is in it. Nobody tells it the two lists.


def build_network() -> nn.Sequential:
    """Build a small convolutional network with random weights.

    Takes noisy signals, (n, SAMPLES), and returns signals of the same size.
    A convolution of 9 numbers sees 4 on each side. Three of them see 12, enough for a whole shape.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, SAMPLES)),  # (n, SAMPLES) to (n, 1, SAMPLES): one channel
        nn.Conv1d(1, 8, 9, padding="same"),  # (n, 8, SAMPLES): 8 channels
        nn.ReLU(),
        nn.Conv1d(8, 8, 9, padding="same"),
        nn.ReLU(),
        nn.Conv1d(8, 1, 9, padding="same"),  # (n, 1, SAMPLES)
        nn.Flatten(),  # (n, SAMPLES)
    )


def train(network: nn.Module, functions: Tensor, noises: Tensor, steps: int) -> None:
    """Train the network to turn noisy signals into functions.

    functions, noises: their atoms, (K * PLACES, SAMPLES) and (J * PLACES, SAMPLES).
    """
    adam = torch.optim.Adam(network.parameters(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)  # lets lr fall to 0

    for _ in range(steps):
        clean = draw_sums(32, functions)  # (32, SAMPLES), new at each step
        noise = draw_sums(32, noises)

        output = network(clean + noise)
        loss = F.mse_loss(output, clean)

        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()


# ---- 3. Measures: was the noise removed, and was the function kept? ------------------------------
# One number cannot answer both: an output of zeros has no noise, but no function either. So we
# split the error into two parts:
#
#     output - clean  =  slope * noise  +  rest
#
# The slope is the number that makes the rest as small as possible (a regression on the noise). It
# says how much noise is left. The rest is other damage. For some outputs we know both:
#
#     output               noise left    damage
#     the noisy signal     100 %         0 %        nothing was done
#     the function         0 %           0 %        perfect
#     zeros                0 %           100 %      nearly
#     0.3 * noisy          30 %          70 %       nearly
#
# Nearly: exactly, if the scalar product of function and noise is 0 (multiply number by number, then
# add up).


def measure(output: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Measure noise left, damage and total error, in per cent of the noise. The best value is 0.

    noise left: the slope. damage: the RMS of the rest. error: the RMS of output - clean. Each RMS
    is divided by that of the noise. So error ** 2 = noise_left ** 2 + damage ** 2.
    All arguments are (n, SAMPLES), and count as one long signal. Returns (3,).
    Source: decoupled_evaluation in derain.py (here the mean of the noise is 0 already).
    """
    change = output - clean
    slope = (change * noise).sum() / (noise * noise).sum()
    rest = change - slope * noise

    damage = rest.norm() / noise.norm()  # a ratio of norms is a ratio of RMS
    error = change.norm() / noise.norm()

    return 100 * torch.stack([slope, damage, error])


# ---- 4. Content prior: can the output be held to the function shapes? ----------------------------
# A content prior is knowledge of clean signals. Ours is a codebook: all atoms of the K function
# shapes. It replaces the output of the network by a sum of 3 of its atoms. So what comes out looks
# like a function, whatever the noise was. The shorter the codebook, the fewer signals can come out.
#
# Which 3 atoms? Matching pursuit finds them one by one. In each round:
#
#     1. For each atom, find the best height: the scalar product of the signal with the atom. (Atoms
#        have norm 1, so this height makes the norm of signal - height * atom smallest.)
#     2. Choose the atom with the largest height, positive or negative. Subtract height * atom.
#     3. Go on with what remains.
#
# For example, with the atoms a = (1, 0) and b = (0.6, 0.8), and the signal (4, 3):
#
#     round    remains          height of a    height of b    subtract
#     1        (4, 3)           4              4.8            4.8 b    =  (2.88, 3.84)
#     2        (1.12, -0.84)    1.12           0              1.12 a   =  (1.12, 0)
#     3        (0, -0.84)       0              -0.672         -0.672 b =  (-0.4032, -0.5376)
#              (0.4032, -0.3024)
#
# The subtracted parts add up to the result, (3.5968, 3.3024). It is close to the signal.


def matching_pursuit(signals: Tensor, atoms: Tensor) -> Tensor:
    """Replace each signal by a sum of 3 atoms.

    signals: (n, SAMPLES). atoms: (m, SAMPLES), each of norm 1. Returns (n, SAMPLES).
    Source: Mallat & Zhang, "Matching pursuits with time-frequency dictionaries", 1993.
    """
    remains = signals

    for _ in range(3):
        heights = remains @ atoms.T  # (n, m)
        index = heights.abs().argmax(1)  # (n,), the index of the best atom
        height = heights.gather(1, index[:, None])  # (n, 1)
        remains = remains - height * atoms[index]  # (n, SAMPLES)

    return signals - remains


# ---- 5. Experiment: what does a network do with unseen noise? ------------------------------------
# A restorer is a network, alone or with a prior behind it. Any prior makes a signal smaller,
# because 3 atoms give back only a part of it. So less noise left is no merit yet. The control is a
# prior with a wrong list of K shapes. Only the right list can also keep the function, so the total
# error compares the two.


def experiment(k: int, j: int, seed: int, steps: int) -> tuple[dict, tuple]:
    """Train one network, and test it on 256 new signals.

    Returns the results, a dict from (noise, restorer, K, J, seed) to what `measure` returns; and an
    example for the figure: the lists of `draw_lists`, and the function, the unseen noise and the
    output of one test, (SAMPLES,) each.
    """
    lists = draw_lists(k, j, seed)
    functions, training, unseen, wrong = map(place_everywhere, lists)

    network = build_network()  # the same weights for all K and J: draw_lists set the seed
    train(network, functions, training, steps)
    results = {}

    for noise_name, noises in (("training", training), ("unseen", unseen)):
        torch.manual_seed(1_000 + seed)  # the same functions in both noises
        clean = draw_sums(256, functions)
        noise = draw_sums(256, noises)
        output = network(clean + noise).detach()

        restored = {
            "network": output,
            "network + prior": matching_pursuit(output, functions),
            "network + wrong prior": matching_pursuit(output, wrong),
        }

        for restorer, signals in restored.items():
            results[noise_name, restorer, k, j, seed] = measure(signals, clean, noise)

    # In test 4, function and unseen noise do not overlap (seed 0).
    return results, (lists, clean[4], noise[4], output[4])


# ---- 6. Verdict: does a network learn the shorter list? ------------------------------------------
# If it does, more of the unseen noise is left where the noise list is the shorter one. So we swap
# K and J, and look at the difference. Each seed has other shapes and weights, and gives the mean of
# three such swaps. The 95 % confidence interval over n seeds with standard deviation s is
#
#     mean - t * s / sqrt(n)    to    mean + t * s / sqrt(n)
#
# If all of it is above 0, the verdict is "reproduced"; if it is below 0, "opposite"; otherwise
# "undecided".

STUDENT_T = (12.706, 4.303, 3.182, 2.776)  # t for 2, 3, 4 and 5 seeds, from Student (1908)


def average(results: dict, *wanted) -> Tensor:
    """Average the measures over all results whose key begins with `wanted`.

    For example, average(results, "unseen", "network", 1, 64) is the mean over the seeds.
    results: from `experiment`. Returns noise left, damage and error, (3,).
    """
    found = [measures for key, measures in results.items() if key[: len(wanted)] == wanted]

    return torch.stack(found).mean(0)  # (number found, 3) to (3,)


def swap_effect(results: dict, seed: int) -> float:
    """Compute how many points more noise is left where the noise list is the shorter one.

    results: from `experiment`, for all K and J. A point is 1 per cent of the noise.
    """
    more_left = [  # index 0 is noise left
        results["unseen", "network", k, j, seed][0] - results["unseen", "network", j, k, seed][0]
        for k, j in ((8, 1), (64, 1), (64, 8))
    ]

    return statistics.fmean(more_left)


def judge(effects: list[float]) -> str:
    """Tell on which side of 0 the mean effect is, and whether this is sure.

    effects: from `swap_effect`, one for each of 1 to 5 seeds. Returns two lines, for `draw_figure`.
    """
    mean = statistics.fmean(effects)
    finding = "Does the network learn the shorter list?\nUndecided:"
    effect = f"swapping K and J changes the unseen noise left by {mean:+.1f} points"

    if len(effects) < 2:
        return f"{finding} {effect} (one seed tells no interval)"

    half = STUDENT_T[len(effects) - 2] * statistics.stdev(effects) / len(effects) ** 0.5

    if mean > half:
        finding = (
            "The network learns the shorter list: a short noise list leaves more unseen noise\n"
            "Reproduced:"
        )
    if mean < -half:
        finding = (
            "The network learns the longer list: a short noise list leaves less unseen noise\n"
            "Opposite:"
        )

    return f"{finding} {effect} (95 % interval {mean - half:+.1f} to {mean + half:+.1f})"


# ---- 7. Figure: what does the result look like? --------------------------------------------------
# Blue is for functions, orange for noise. Colour-blind people can tell these two apart.

BLUE, ORANGE = "#56B4E9", "#E69F00"

# K and J of all networks. The first two differ most. They are trained first, for a first picture.
CELLS = ((1, 64), (64, 1), (1, 1), (1, 8), (8, 1), (8, 8), (8, 64), (64, 8), (64, 64))


def draw_list(axes: Axes, shapes: Tensor, colour: str, title: str) -> None:
    """Draw a list of shapes, (length, WIDTH), with 8 in a row."""
    axes.set(title=title, xlim=(-1, 97), ylim=(-12, 1))  # room for 64
    axes.set_axis_off()

    for index, shape in enumerate(shapes):
        x = 12 * (index % 8) + torch.arange(WIDTH)
        axes.plot(x, shape - 1.5 * (index // 8), colour)


def draw_map(axes: Axes, results: dict, cells: dict) -> None:
    """Draw a square for each (K, J) in `cells`: the more noise is left, the darker."""
    colours = torch.zeros(3, 3)

    for k, j in cells:
        noise_left, damage, _ = average(results, "unseen", "network", k, j)
        row, column = LENGTHS.index(k), LENGTHS.index(j)
        colours[row, column] = noise_left
        axes.text(column, row, f"{noise_left:.0f} %", fontsize=17, ha="center")
        axes.text(column, row + 0.2, f"damage {damage:.0f} %", ha="center")

    axes.imshow(colours.numpy(), "Oranges", vmin=0, vmax=150)  # 100: too dark for the text
    axes.set(
        title="unseen noise left, mean over the seeds",
        xlabel="J: shapes in the noise list",
        ylabel="K: shapes in the function list",
        xticks=range(3),
        yticks=range(3),
        xticklabels=LENGTHS,
        yticklabels=LENGTHS,
    )


def draw_figure(results: dict, examples: dict, title: str) -> bytes:
    """Draw the lists and an output of two networks, and beside them the map of K and J.

    results, examples: from `experiment`, examples by (K, J). title: a headline and a line below.
    Returns the bytes of a PNG file.
    """
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    headline, small_print = title.split("\n")
    figure.suptitle(headline, fontsize=16, weight="bold")
    figure.supxlabel(small_print)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.1))
    rows = left.subplots(2, 3, width_ratios=(1, 1, 3))

    for (k, j), (first, second, third) in zip(CELLS, rows):
        lists, clean, noise, output = examples[k, j]
        noise_left = average(results, "unseen", "network", k, j)[0]

        draw_list(first, lists[0], BLUE, f"function list\nK = {k}")
        draw_list(second, lists[1], ORANGE, f"noise list\nJ = {j}")

        third.fill_between(range(SAMPLES), clean, color=BLUE, label="clean function")
        third.fill_between(range(SAMPLES), noise, color=ORANGE, label="unseen noise")
        third.plot(output, "black", label="output")
        third.legend()
        third.set(
            title=f"K = {k}, J = {j}: {noise_left:.0f} % of the unseen noise is left",
            xlabel="sample",
            ylabel="height (RMS = 1)",
            ylim=(None, 7),
        )

    draw_map(right.subplots(), results, examples)
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


# ---- 8. Command line: what is trained, and what is written? --------------------------------------


def save(folder: str, name: str, content: bytes) -> None:
    """Write a file under another name, then rename it, so that it is never half written.

    Raises OSError if the file cannot be written.
    """
    part = Path(folder, f"part-{name}")
    part.write_bytes(content)
    part.replace(f"{folder}/{name}")
    print(f"wrote {folder}/{name}")


def run(folder: str, seeds: int, steps: int) -> None:
    """Train all networks, write toy.png and toy.csv, and print the verdict.

    folder: is made if it is missing. seeds: 1 to 5. steps: of each training. Raises OSError.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more gain nothing on such small tensors
    results, examples = {}, {}
    begun = time.monotonic()

    for done, (seed, (k, j)) in enumerate(product(range(seeds), CELLS), start=1):
        measured, example = experiment(k, j, seed, steps)
        results |= measured
        examples.setdefault((k, j), example)  # keeps that of the first seed

        print(
            f"network {done} of {seeds * len(CELLS)}, K = {k}, J = {j}: "
            f"{measured['unseen', 'network', k, j, seed][0]:.0f} % of the unseen noise left, "
            f"{(time.monotonic() - begun) / done * (seeds * len(CELLS) - done):.0f} s to go",
            flush=True,
        )

        if done == 2:
            save(folder, "toy.png", draw_figure(results, examples, "First look\nNo verdict yet"))

    table = "noise,restorer,K,J,seed,noise_left,damage,error\n"
    for (noise, restorer, k, j, seed), (noise_left, damage, error) in sorted(results.items()):
        table += f"{noise},{restorer},{k},{j},{seed},{noise_left:.3f},{damage:.3f},{error:.3f}\n"
    save(folder, "toy.csv", table.encode())

    for restorer in ("network", "network + prior", "network + wrong prior"):
        error = average(results, "unseen", restorer)[2]
        print(f"total error in unseen noise, mean of all K and J: {error:.0f} %, {restorer}")

    verdict = judge([swap_effect(results, seed) for seed in range(seeds)])
    save(folder, "toy.png", draw_figure(results, examples, verdict))
    print(verdict)


def main() -> None:
    """Read the command line. The status is 0, or 2 for bad input, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # without it, an error is one line
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, 6),
        default=3,
        help="networks for each K and J, default %(default)s; one tells no interval",
    )
    parser.add_argument(
        "--steps", type=int, default=800, help="training steps of a network, default %(default)s"
    )
    parser.add_argument(
        "--out",
        default="figures",
        help="folder for toy.png and toy.csv, default %(default)s. "
        "Example: python toy_denoise.py --seeds 2 --out runs/toy",
    )
    args = parser.parse_args()

    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, for example 800, not {args.steps}")

    try:
        run(args.out, args.seeds, args.steps)
    except OSError as error:
        parser.error(
            f"--out must be a folder that can be written to, for example runs/toy: {error}"
        )
    except KeyboardInterrupt:
        parser.exit(130, "toy_denoise.py: stopped\n")


if __name__ == "__main__":
    main()
