"""Why do restoration networks fail on unseen noise?  The idea of derain.py on 1-D functions.

A clean signal is a sum of K sinusoids, the noise a sum of J others, equally loud.  A small network
learns noisy -> clean.  It may learn what the function looks like, or what the noise looks like.
Both are right on the training noise; on other noise only the first is.  By Hu et al. (arXiv
2502.12600) it learns the simpler of the two.  K and J are two knobs: turn them."""
import argparse
import math
import os
import time
from itertools import product

import torch
from matplotlib.figure import Figure
from torch import Tensor

# ---- 1. What is a simple function, and what is a simple noise? -----------------------------------
# Both are sums of tones, equally loud.  Only number and band differ: swapping K and J swaps roles.
N, CLICKS = 64, 4  # samples in a signal; how many of them clicks hit
TONES = (1, 2, 4, 8)  # the positions of both knobs, K and J
FUNCTION_BAND, NOISE_BAND, UNSEEN_BAND = 1, 11, 21  # lowest frequency, in cycles per signal

def unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()

def tones(coefficients: Tensor, first: int, count: int) -> Tensor:
    """Sums of cosines and sines of `first` ... `first` + count - 1 cycles, RMS 1: (..., N)."""
    angle = 2 * math.pi * torch.arange(first, first + count)[:, None] * torch.arange(N) / N
    waves = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)    # (2 count, N)
    return unit_rms(coefficients[..., :2 * count] @ waves)

def clicks(n: int, rng: torch.Generator) -> Tensor:
    """Noise of another kind: CLICKS random samples are hit, the others not; RMS 1: (n, N)."""
    hit = torch.rand(n, N, generator=rng).argsort(-1) < CLICKS
    return unit_rms(hit * torch.randn(n, N, generator=rng))

def draw(n: int, rngs: list[torch.Generator]) -> Tensor:
    """Coefficients for `tones`, (seeds, n, 16); no seed depends on another."""
    return torch.stack([torch.randn(n, 2 * TONES[-1], generator=rng) for rng in rngs])

def grid(functions: list[Tensor], noises: list[Tensor]) -> tuple[Tensor, Tensor]:
    """From (seeds, n, N) for each K and each J to clean and noise of all pairs: (members, n, N)."""
    clean = torch.stack([f for f in functions for _ in noises]).flatten(0, 1)
    return clean, torch.stack(noises * len(functions)).flatten(0, 1)

# ---- 2. How are 80 networks trained at once? -----------------------------------------------------
WIDTHS, BATCH, LEARNING_RATE = (N, 128, 128, N), 32, 5e-3

def initial_weights(seed: int) -> list[Tensor]:
    """One network: weight (in, out) and bias (1, out) of each layer, as in He et al. (2015)."""
    rng, weights = torch.Generator().manual_seed(seed), []
    for a, b in zip(WIDTHS, WIDTHS[1:]):
        weights += [torch.randn(a, b, generator=rng) * math.sqrt(2 / a), torch.zeros(1, b)]
    return weights

def network(weights: list[Tensor], x: Tensor) -> Tensor:
    """All members at once: weights (members, in, out), x and result (members, n, N)."""
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
        x = torch.baddbmm(bias, x, weight).relu()  # each member multiplies its own signals only
    return torch.baddbmm(weights[-1], x, weights[-2])

def train(function_tones: list, noise_tones: list, seeds: list, steps: int) -> list[Tensor]:
    """Train one network for each cell of the grid and each seed; returns their weights, stacked.
    No member's loss contains another's weights, and Adam works number by number: each takes the
    steps that it would take alone.  Cells of a seed share initial weights and random numbers."""
    cells = len(function_tones) * len(noise_tones)
    layers = zip(*map(initial_weights, seeds))
    weights = [torch.stack(layer).repeat(cells, 1, 1).requires_grad_() for layer in layers]
    rngs = [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]
    adam = torch.optim.Adam(weights, LEARNING_RATE, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    begun = time.monotonic()
    for step in range(1, steps + 1):
        a, b = draw(BATCH, rngs), draw(BATCH, rngs)  # new signals at every step
        functions = [tones(a, FUNCTION_BAND, k) for k in function_tones]
        clean, noise = grid(functions, [tones(b, NOISE_BAND, j) for j in noise_tones])
        loss = (network(weights, clean + noise) - clean).square().mean((1, 2)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
        if step % 250 == 0:
            left = (time.monotonic() - begun) / step * (steps - step)
            print(f"step {step} of {steps}, loss {loss / len(clean):.4f}, {left:.0f} s left")
    return [w.detach() for w in weights]

# ---- 3. Was the noise removed, and was the function kept? ----------------------------------------
def decoupled_evaluation(restore, clean: Tensor, noise: Tensor) -> Tensor:
    """Noise left, and damage to the function, in per cent, 0 being ideal: (2, members).
    Give the network each noise as it is and upside down.  What flips in the output is noise that is
    left; what does not, less the clean function, is damage.  At equal RMS their squares add up to
    the whole mean squared error.  Passing all on gives (100, 0), a blank output (0, 100)."""
    plus, minus = restore(clean + noise), restore(clean - noise)
    parts = torch.stack([(plus - minus) / 2, (plus + minus) / 2 - clean])
    powers = torch.stack([noise, clean]).square().mean((2, 3))
    return 100 * (parts.square().mean((2, 3)) / powers).sqrt()

# ---- 4. Can the output be held to the clean functions? -------------------------------------------
def content_prior(dictionary: Tensor) -> Tensor:
    """The projection onto combinations of clean functions (..., n, N): (..., N, N)."""
    return torch.linalg.pinv(dictionary, rtol=1e-3) @ dictionary  # x @ this: least-squares fit

# ---- 5. Does the claim hold? ---------------------------------------------------------------------
def measure(weights: list[Tensor], seeds: list[int], n: int = 256) -> tuple[dict, Tensor]:
    """Test the whole grid: {(noise, restorer): noise left and damage, (2, K, J, seeds)}; and noisy,
    clean, output, (3, K, J, N), of the first signal of the first seed in the unseen band."""
    rngs = [torch.Generator().manual_seed(2_000_000 + seed) for seed in seeds]
    a, b, dictionary = draw(n, rngs), draw(n, rngs), draw(N, rngs)
    projections = [content_prior(tones(dictionary, FUNCTION_BAND, k)) for k in TONES]
    prior = torch.cat([p for p in projections for _ in TONES])
    restorers = {"network": lambda x: network(weights, x), "prior alone": lambda x: x @ prior,
                 "network + prior": lambda x: network(weights, x) @ prior}
    noises = {"trained": [tones(b, NOISE_BAND, j) for j in TONES],
              "unseen clicks": [torch.stack([clicks(n, rng) for rng in rngs])] * len(TONES),
              "unseen band": [tones(b, UNSEEN_BAND, TONES[-1])] * len(TONES)}
    results, functions = {}, [tones(a, FUNCTION_BAND, k) for k in TONES]
    for kind, name in product(noises, restorers):
        clean, noise = grid(functions, noises[kind])
        measured = decoupled_evaluation(restorers[name], clean, noise)
        results[kind, name] = measured.view(2, 4, 4, len(seeds))
    views = torch.stack([clean + noise, clean, network(weights, clean + noise)])    # unseen band
    return results, views.view(3, 4, 4, len(seeds), n, N)[:, :, :, 0, 0]

def swap_effect(left: Tensor) -> Tensor:
    """Noise left (K, J, seeds) where K > J, less that with K and J swapped: mean, (seeds,)."""
    return (left - left.transpose(0, 1))[torch.ones(left.shape[:2]).tril(-1).bool()].mean(0)

def verdict(effects: Tensor) -> str:
    """Mean and 95 % confidence interval of the effects of 5 seeds, and on which side of 0 it is."""
    mean = effects.mean().item()
    if len(effects) != 5:
        return f"{mean:+.1f} points (a verdict takes 5 seeds)"
    half = 2.776 * effects.std().item() / math.sqrt(5)  # Student's t of 4 degrees of freedom
    side = "reproduced" if mean > 0 else "refuted"
    word = side if abs(mean) > half else "undecided"
    return f"{mean:+.1f} +- {half:.1f} points, {(effects > 0).sum()} of 5 seeds agree: {word}"

# ---- 6. What does it look like? ------------------------------------------------------------------
def draw_figure(results: dict, views: Tensor) -> Figure:
    """Left, a signal of each extreme cell, A and B; right, the maps of the unseen band."""
    figure = Figure(figsize=(10.8, 5.8), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    for row, restorer in zip(right.subplots(2, 2), ("network", "network + prior")):
        maps = results["unseen band", restorer].mean(-1).numpy()
        for axes, values, title in zip(row, maps, ("unseen noise left", "damage")):
            colours = "Oranges" if title == "damage" else "Blues"
            axes.imshow(values, colours, vmin=0, vmax=80, origin="lower", aspect="auto")
            axes.axline((0, 0), slope=1, color="white", lw=5)  # K = J: neither is the simpler
            for k, j in product(range(4), repeat=2):
                axes.text(j, k, f"{values[k, j]:.0f}", ha="center", va="center")
            axes.set(title=f"{restorer}:\n{title} (%)", xticks=range(4), xticklabels=TONES,
                     yticks=range(4), yticklabels=TONES)
    right.supxlabel("J, tones in the training noise")
    right.supylabel("K, tones in the functions")
    cells = {"A: the function is simpler (K = 1, J = 8)": (0, 3),
             "B: the noise is simpler (K = 8, J = 1)": (3, 0)}
    for axes, (title, (k, j)) in zip(left.subplots(2, 1), cells.items()):
        axes.plot(views[0, k, j], color="0.7", label="noisy")
        axes.plot(views[1, k, j], color="black", label="clean")
        axes.plot(views[2, k, j], color="#d55e00", label="output")
        share = results["unseen band", "network"][0, k, j].mean()
        axes.set(xlim=(0, N - 1), ylim=(-4, 4), xlabel="sample", ylabel="signal (clean: RMS 1)",
                 title=f"{title}\n{share:.0f} % of the unseen noise is left")
    axes.legend(ncols=3, loc="lower center", frameon=False)
    return figure

# ---- 7. How is it run? ---------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(epilog="example: python toy_denoise.py --out runs",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"toy_denoise.py: {message}\n")  # one line
    parser.add_argument("--seeds", type=int, default=5, help="networks a cell; a verdict takes 5")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--out", default="figures", help="folder for toy.png and toy.csv")
    args = parser.parse_args()
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be 1 or more")
    torch.set_num_threads(1)  # a second thread gains nothing on matrices this small
    seeds = range(args.seeds)
    try:
        os.makedirs(args.out, exist_ok=True)
        results, views = measure(train(TONES, TONES, seeds, args.steps), seeds)
        with open(f"{args.out}/toy.csv", "w") as file:
            print("noise,restorer,function_tones,noise_tones,seed,noise_left,damage", file=file)
            for key, k, j, seed in product(results, range(4), range(4), seeds):
                pair = (f"{value:.3f}" for value in results[key][:, k, j, seed])
                print(*key, TONES[k], TONES[j], seed, *pair, sep=",", file=file)
        draw_figure(results, views).savefig(f"{args.out}/toy.png", metadata={"Software": None})
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    print(f"wrote {args.out}/toy.csv and {args.out}/toy.png")
    left, held = (results["unseen band", name][0] for name in ("network", "network + prior"))
    for claim, effects in (
            ("the content prior, without less with it", (left - held).mean((0, 1))),
            ("the claim, on clicks", swap_effect(results["unseen clicks", "network"][0])),
            ("the claim: the simpler the function, the less noise is left", swap_effect(left))):
        print(f"{claim}: {verdict(effects)}")

if __name__ == "__main__":
    main()
