"""Why do restoration networks fail on unseen noise? The idea of derain.py in one dimension.

A network learns to turn a noisy signal into a clean one. There are two ways to do it. The network
can learn what clean signals look like, or it can learn what the noise looks like. Both ways work on
the training noise. Only the first way works on other noise. Hu et al. (arXiv 2502.12600) found, for
images in rain, that a network learns whichever of the two is simpler. Here is the same in 1-D:

    function (the clean signal)  =  a sum of 3 shapes from a list of K shapes
    noise                        =  a sum of 3 shapes from another list of J shapes
    noisy signal                 =  function + noise

All shapes are random. Nothing but the length of the lists tells functions from noise, and the
shorter list is the simpler one. We train with these two lists. Then we test with unseen noise,
which is made of a third list of shapes.

    here                                     in derain.py
    a function; K                            a background; the number of training backgrounds
    the noise; J                             the rain; how much the training rain varies
    a shape in the noise                     a streak
    unseen noise: a third list of shapes     unseen rain: other directions and lengths
    noise left, damage                       rain_left, damage
    the codebook of the K function shapes    the VQGAN: its codebook and its decoder

The toy leaves out a lot. It tests on new sums of the same K shapes; derain.py tests on new
backgrounds. Noise is made like functions and is as large; rain is thin and bright. Backgrounds also
differ in sharpness. The codebook is given here; a VQGAN has to learn it. The one network here is
small, and it does not add its input to its output.

    python toy_denoise.py        # the first picture after a few seconds, all of it in a minute

1. Signals: what is a function, and what is noise?
2. Training: what does the network learn from?
3. Measures: was the noise removed, and was the function kept?
4. Content prior: can the output be held to the function shapes?
5. Experiment: what does one network do with noise that it has never seen?
6. Verdict: does a network learn the shorter list?
7. Figure: what does the result look like?
8. Command line: what is trained, and what is written?
"""

import argparse
import io
import os
import statistics
import time

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

# ---- 1. Signals: what is a function, and what is noise? ------------------------------------------
# Both are sums of 3 shapes, and the same code makes them. Only the lengths of their lists differ:
# K shapes for the functions, J shapes for the training noise.

SAMPLES = 64  # numbers in a signal
WIDTH = 9  # numbers in a shape
PLACES = SAMPLES - WIDTH + 1  # a shape fits into a signal at 56 places
LENGTHS = (1, 8, 64)  # the values of K and of J that we try


def draw_lists(k: int, j: int, seed: int) -> tuple[Tensor, ...]:
    """Draw four lists of random shapes.

    Returns, in this order: the K function shapes; the J shapes of the training noise; 64 shapes of
    the unseen noise; K wrong shapes, which no signal is made of (section 5 needs them).
    Each list is (length, WIDTH). In each shape the mean is 0 and the sum of squares is 1.
    With the same seed, a short list is the beginning of a long one.
    """
    torch.manual_seed(seed)
    shapes = torch.randn(4, 64, WIDTH)  # 4 lists of 64 shapes

    shapes = shapes - shapes.mean(2, keepdim=True)
    functions, training, unseen, wrong = normalize(shapes, dim=2)

    return functions[:k], training[:j], unseen, wrong[:k]


def place_everywhere(shapes: Tensor) -> Tensor:
    """Put each shape at each place where it fits, with zeros around it.

    A shape at one place is called an atom. For example, a shape (a, b) fits into a signal of 4
    numbers at 3 places. This gives 3 atoms:

        a b 0 0
        0 a b 0
        0 0 a b

    shapes: (count, WIDTH). Returns the atoms, (count * PLACES, SAMPLES).
    """
    atoms = torch.zeros(len(shapes), PLACES, SAMPLES)

    for place in range(PLACES):
        atoms[:, place, place : place + WIDTH] = shapes

    return atoms.flatten(0, 1)  # (count, PLACES, SAMPLES) to (count * PLACES, SAMPLES)


def draw_sums(count: int, atoms: Tensor) -> Tensor:
    """Draw signals: each is the sum of 3 random atoms, each times a random height.

    Functions and noise are both drawn here. The heights are Gaussian. An atom may be drawn twice.
    atoms: from `place_everywhere`. Returns (count, SAMPLES). Each signal is scaled to RMS 1, where
    RMS is the root of the mean of the squares.
    """
    chosen = torch.randint(len(atoms), (count, 3))  # 3 numbers of atoms for each signal
    heights = torch.randn(count, 3, 1)
    sums = (heights * atoms[chosen]).sum(1)  # (count, 3, SAMPLES) to (count, SAMPLES)

    return normalize(sums) * SAMPLES**0.5  # normalize: the sum of squares is 1


# ---- 2. Training: what does the network learn from? ----------------------------------------------
# It sees pairs: a noisy signal, and the function that is in it. Nobody tells it the two lists. From
# the pairs it finds out what to keep and what to remove.


def build_network() -> nn.Sequential:
    """Build a small convolutional network with random weights.

    It takes noisy signals, (n, SAMPLES), and returns signals of the same size.
    A convolution of 9 numbers sees 4 numbers on each side. Three of them see 12 on each side, which
    is enough for a whole shape.
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


def train(network: nn.Module, functions: Tensor, noises: Tensor, steps: int) -> float:
    """Train the network to turn noisy signals into functions.

    functions: the atoms of the functions, (K * PLACES, SAMPLES).
    noises: the atoms of the training noise, (J * PLACES, SAMPLES).
    Returns the loss of the last step: the mean of (output - function) ** 2.
    """
    adam = torch.optim.Adam(network.parameters(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)  # lets lr fall to 0

    for _ in range(steps):
        clean = draw_sums(32, functions)  # (32, SAMPLES), new signals at each step
        noise = draw_sums(32, noises)

        output = network(clean + noise)
        loss = mse_loss(output, clean)

        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()

    return loss.item()


# ---- 3. Measures: was the noise removed, and was the function kept? ------------------------------
# One number cannot answer both questions: an output of zeros has no noise, but no function either.
# So we look at the error, output - clean, and split it into two parts:
#
#     output - clean  =  slope * noise  +  rest
#
# The slope is the number that makes the rest as small as possible (a regression on the noise). It
# says how much of the noise is left. The rest is all other damage. For some outputs we know both:
#
#     output               noise left    damage
#     the noisy signal     100 %         0 %        nothing was done
#     the function         0 %           0 %        perfect
#     zeros                0 %           100 %      nearly; exactly, if <function, noise> is 0
#     0.3 * noisy          30 %          70 %       nearly; exactly, if <function, noise> is 0
#
# Here <a, b> is the scalar product: multiply number by number, then add up.


def measure(output: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Measure noise left, damage and total error, in per cent of the noise.

    noise left: the slope of output - clean over the noise. damage: the RMS of the rest, over the
    RMS of the noise. error: the RMS of output - clean, over the RMS of the noise.
    The best value is 0. The error holds both others: error ** 2 = noise_left ** 2 + damage ** 2.
    All arguments are (n, SAMPLES), and all n signals count as one long signal. Returns (3,).
    Source: decoupled_evaluation in derain.py (shapes have mean 0, so no mean is subtracted here).
    """
    change = output - clean
    slope = (change * noise).sum() / (noise * noise).sum()
    rest = change - slope * noise

    damage = rest.norm() / noise.norm()  # a ratio of norms is a ratio of RMS
    error = change.norm() / noise.norm()

    return 100 * torch.stack([slope, damage, error])


# ---- 4. Content prior: can the output be held to the function shapes? ----------------------------
# A content prior is knowledge of clean signals. Ours is a codebook: all atoms of the K function
# shapes. It replaces the output of the network by a sum of 3 atoms of the codebook. So what comes
# out looks like a function, whatever the noise was. The VQGAN does this for images in derain.py.
# A short codebook holds the output more than a long one: fewer signals can come out.
#
# Which 3 atoms? Matching pursuit (Mallat & Zhang 1993) finds them one by one. In each round:
#
#     1. Take the scalar product of the signal with each atom. It is the best height for this atom.
#     2. Choose the atom with the largest height, positive or negative. Subtract height * atom.
#     3. Go on with what remains.
#
# For example, take the two atoms a = (1, 0) and b = (0.6, 0.8), and the signal (4, 3):
#
#     round    remains          height of a    height of b    subtract
#     1        (4, 3)           4              4.8            4.8 b    =  (2.88, 3.84)
#     2        (1.12, -0.84)    1.12           0              1.12 a   =  (1.12, 0)
#     3        (0, -0.84)       0              -0.672         -0.672 b =  (-0.4032, -0.5376)
#              (0.4032, -0.3024)
#
# The sum of the 3 subtracted parts is the result, (3.5968, 3.3024). It is close to the signal.


def matching_pursuit(signals: Tensor, atoms: Tensor) -> Tensor:
    """Replace each signal by a sum of 3 atoms.

    signals: (n, SAMPLES). atoms: (m, SAMPLES), the sum of squares of each is 1.
    Returns (n, SAMPLES).
    Source: Mallat & Zhang, "Matching pursuits with time-frequency dictionaries", 1993.
    """
    remains = signals

    for _ in range(3):
        heights = remains @ atoms.T  # (n, m): one scalar product for each signal and atom
        best = heights.abs().argmax(1, keepdim=True)  # (n, 1): the number of the chosen atom
        height = heights.gather(1, best)  # (n, 1): the height of the chosen atom
        remains = remains - height * atoms[best[:, 0]]  # (n, SAMPLES)

    return signals - remains


# ---- 5. Experiment: what does one network do with noise that it has never seen? ------------------
# An experiment has a K, a J and a seed. It trains one network, and tests it in the training noise
# and in the unseen noise. A restorer is the network alone, or the network with a prior behind it.
#
# Any prior makes a signal smaller, and so less noise is left. This is no merit yet. So there is a
# control: the prior with a wrong list of K shapes. Only the right list can also keep the function.
# The two priors are therefore compared by the total error.


def experiment(k: int, j: int, seed: int, steps: int) -> tuple[dict, tuple, float]:
    """Train one network, and test it on 256 new signals.

    Returns three things:
    - the results, a dict from (noise, restorer, K, J, seed) to what `measure` returns;
    - an example for the figure: the lists of `draw_lists`; the function, the unseen noise and the
      output of one test, (SAMPLES,) each;
    - the loss of the last training step.
    """
    lists = draw_lists(k, j, seed)
    functions, training, unseen, wrong = map(place_everywhere, lists)  # from shapes to atoms

    network = build_network()  # the same weights for all K and J: draw_lists has set the seed
    loss = train(network, functions, training, steps)
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

    # Test number 4 is easy to look at: its function and its unseen noise do not overlap (seed 0).
    return results, (lists, clean[4], noise[4], output[4]), loss


# ---- 6. Verdict: does a network learn the shorter list? ------------------------------------------
# If it does, more of the unseen noise is left where the noise list is the shorter one. So we swap
# K and J, and look at the difference. There are three such swaps; we take their mean. Each seed has
# other shapes and other weights, and gives one such mean.
#
# How sure is the mean over the seeds? The 95 % confidence interval is
#
#     mean - t * s / sqrt(n)    to    mean + t * s / sqrt(n)
#
# for n seeds with standard deviation s. The number t depends on n. The verdict is "reproduced" if
# the whole interval is above 0, "opposite" if it is below 0, and otherwise "undecided".

STUDENT_T = (12.706, 4.303, 3.182, 2.776)  # t for 2, 3, 4 and 5 seeds, from Student (1908)


def average(results: dict, *wanted) -> Tensor:
    """Average the measures over all results whose key begins with `wanted`.

    A key is (noise, restorer, K, J, seed). So average(results, "unseen", "network", 1, 64) is the
    mean over the seeds.
    results: from `experiment`. Returns noise left, damage and error, (3,).
    """
    found = [measures for key, measures in results.items() if key[: len(wanted)] == wanted]

    return torch.stack(found).mean(0)  # (number found, 3) to (3,)


def swap_effect(results: dict, seed: int) -> float:
    """Compute how many points more noise is left where the noise list is the shorter one.

    results: from `experiment`, for all K and J. A point is 1 per cent of the noise.
    Above 0, the networks learned the shorter list. Below 0, they learned the longer one.
    """
    effect = 0

    for k, j in ((8, 1), (64, 1), (64, 8)):
        noise_list_shorter = results["unseen", "network", k, j, seed]
        function_list_shorter = results["unseen", "network", j, k, seed]
        effect += noise_list_shorter - function_list_shorter

    return effect[0].item() / 3  # number 0 is noise left


def judge(effects: list[float]) -> str:
    """Tell on which side of 0 the mean effect is, and whether this is sure.

    effects: from `swap_effect`, one for each of 1 to 5 seeds.
    Returns two lines: the finding with its verdict, and the mean effect with its interval.
    """
    mean = statistics.fmean(effects)
    finding = "Does the network learn the shorter list? (undecided)"
    effect = f"Swapping K and J: {mean:+.1f} points of noise left"

    if len(effects) < 2:
        return f"{finding}\n{effect} (one seed tells no interval)"

    half = STUDENT_T[len(effects) - 2] * statistics.stdev(effects) / len(effects) ** 0.5

    if mean > half:
        finding = "The network learns the shorter list (reproduced)"
    if mean < -half:
        finding = "The network learns the longer list (opposite)"

    return f"{finding}\n{effect} (95 %: {mean - half:+.1f} to {mean + half:+.1f})"


# ---- 7. Figure: what does the result look like? --------------------------------------------------
# Blue is for functions, orange for noise, black for what the network does with both.

# K and J of all networks. The first two differ most. The figure calls them A and B.
CELLS = ((1, 64), (64, 1), (1, 1), (1, 8), (8, 1), (8, 8), (8, 64), (64, 8), (64, 64))


def draw_figure(results: dict, examples: dict, title: str) -> bytes:
    """Draw A and B, and below them the map of K and J if there are more networks.

    results: from `experiment`. examples: {(K, J): an example from `experiment`}.
    Returns the bytes of a PNG file.
    """
    figure = Figure(figsize=(10, 11), layout="constrained")
    figure.suptitle(title, fontsize=15)
    parts = figure.subfigures(3)

    for part, name, (k, j) in zip(parts, "AB", CELLS):
        noise_left = average(results, "unseen", "network", k, j)[0]
        part.suptitle(
            f"{name}: function list {k}, noise list {j}: {noise_left:.0f} % of unseen noise is left"
        )

        lists, clean, noise, output = examples[k, j]
        first, second, third = part.subplots(1, 3)

        # The function list begins at x = 0, the noise list at x = 120. Each has 8 shapes in a row.
        for shapes, left, colour in zip(lists, (0, 120), ("tab:blue", "tab:orange")):
            for number, shape in enumerate(shapes):
                x = left + 12 * (number % 8) + torch.arange(WIDTH)
                first.plot(x, shape - 1.5 * (number // 8), colour)

        first.set(xlim=(0, 220), title="blue: function list\norange: noise list")
        first.axis("off")

        second.plot(clean + noise, "silver")
        second.plot(clean, "tab:blue")
        second.plot(output, "black")
        second.set_title("64 samples, grey: noisy\nblue: clean, black: output")

        third.plot(noise, "tab:orange")
        third.plot(output - clean, "black")
        third.set_title("orange: unseen noise\nblack: output − clean")

    if len(examples) > 2:
        axes = parts[2].subplots()
        axes.set(
            title="Disc: unseen noise left, mean over the seeds (A: bottom right, B: top left)",
            xlabel="J: shapes in the noise list",
            ylabel="K: shapes in the function list",
        )
        axes.margins(0.3)  # room for the discs

        for k in LENGTHS:
            for j in LENGTHS:
                noise_left, damage, _ = average(results, "unseen", "network", k, j)
                axes.scatter(str(j), str(k), 40 * abs(noise_left), "moccasin")
                axes.text(
                    str(j),
                    str(k),
                    f"{noise_left:.0f} %\n(damage {damage:.0f} %)",
                    ha="center",
                    va="center",
                )

    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


# ---- 8. Command line: what is trained, and what is written? --------------------------------------
# A and B are trained first, so that there is soon a picture to look at.


def save(folder: str, name: str, content: bytes) -> None:
    """Write a file under another name, then rename it.

    So toy.png and toy.csv are never half written, even if the disk is full.
    Raises OSError if the file cannot be written.
    """
    part = f"{folder}/part-{name}"

    with open(part, "wb") as file:
        file.write(content)

    os.replace(part, f"{folder}/{name}")
    print(f"wrote {folder}/{name}")


def run(folder: str, seeds: int, steps: int) -> None:
    """Train all networks, write toy.png and toy.csv, and print the verdict.

    folder: is made if it is missing. seeds: 1 to 5. steps: training steps of each network.
    Raises OSError if a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    torch.set_num_threads(1)  # a second thread gains nothing on tensors as small as these
    results, examples = {}, {}
    total = seeds * len(CELLS)
    done = 0
    begun = time.monotonic()

    for seed in range(seeds):
        for k, j in CELLS:
            measured, example, loss = experiment(k, j, seed, steps)
            results |= measured  # adds the new entries
            examples.setdefault((k, j), example)  # keeps the one of the first seed
            done += 1

            left = (time.monotonic() - begun) * (total / done - 1)
            print(
                f"network {done} of {total}, K = {k}, J = {j}, loss {loss:.3f}: "
                f"{measured['unseen', 'network', k, j, seed][0]:.0f} % of the unseen noise left; "
                f"{left:.0f} s to go",
                flush=True,
            )

            if done == 2:  # A and B
                save(
                    folder,
                    "toy.png",
                    draw_figure(results, examples, "A first look, no verdict yet"),
                )

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
    """Read the command line.

    The status is 0, or 2 for bad input, or 130 after Ctrl-C.
    """
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
