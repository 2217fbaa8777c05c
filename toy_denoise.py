"""Why do restoration networks fail on unseen noise? The idea of derain.py on 1-D functions, in half a minute.

A clean signal is a sum of K sinusoids, the noise a sum of J others, equally loud. A small network learns
noisy -> clean. It may learn what the function looks like, or learn what the noise looks like and pass on all
the rest. Both are right on the training noise; on noise of another kind only the first is. By Hu et al.
(arXiv 2502.12600) it learns the simpler of the two. So K and J are two knobs here: turn them, and look.
"""
import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product

import torch
from matplotlib.figure import Figure
from torch import Tensor

# ---- 1. What is a simple function, and what is a simple noise? ---------------------------------------------
# Both are sums of tones with random amplitudes and phases, from one and the same function, equally loud. Only
# the number of tones (the complexity) and the band differ: swapping K and J swaps the two roles exactly.
N, CLICKS = 64, 4                                       # samples in a signal, and how many of them clicks hit
TONES = (1, 2, 4, 8)                                    # the positions of both knobs, K and J
FUNCTION_BAND, NOISE_BAND, UNSEEN_BAND = 1, 11, 21      # lowest frequency of each, in cycles per signal


def unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def tones(coefficients: Tensor, first: int, count: int) -> Tensor:
    """Sums of the `count` sinusoids of `first`, `first` + 1, ... cycles per signal; RMS 1. Returns (..., N).
    coefficients: (..., 2 * count or more), standard normal, for each cosine and sine; the rest is ignored."""
    angle = 2 * math.pi * torch.arange(first, first + count)[:, None] * torch.arange(N) / N
    waves = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)        # (2 count, N): cos, sin, cos, ...
    return unit_rms(coefficients[..., :2 * count] @ waves)


def clicks(n: int, rng: torch.Generator) -> Tensor:
    """Noise of quite another kind: CLICKS random samples are hit, the others not; RMS 1. Returns (n, N)."""
    hit = torch.rand(n, N, generator=rng).argsort(-1) < CLICKS
    return unit_rms(hit * torch.randn(n, N, generator=rng))


def draw(n: int, rngs: list[torch.Generator]) -> Tensor:
    """Coefficients for `tones`, (seeds, n, 16). One generator a seed: no seed depends on the others."""
    return torch.stack([torch.randn(n, 2 * TONES[-1], generator=rng) for rng in rngs])


def grid(functions: list[Tensor], noises: list[Tensor]) -> tuple[Tensor, Tensor]:
    """From (seeds, n, N) for each K and each J to clean and noise of every pair: both (members, n, N)."""
    clean = torch.stack([f for f in functions for _ in noises]).flatten(0, 1)
    return clean, torch.stack(noises * len(functions)).flatten(0, 1)


# ---- 2. How are 80 networks trained at once? ---------------------------------------------------------------
# A member is one network: for one K, one J and one seed, in this order. 4 x 4 x 5 members by default.
WIDTHS, BATCH, LEARNING_RATE = (N, 128, 128, N), 32, 5e-3


def initial_weights(seed: int) -> list[Tensor]:
    """One network: weight (in, out) and bias (1, out) of each layer in turn, scaled as in He et al. 2015."""
    rng = torch.Generator().manual_seed(seed)
    return [w for a, b in zip(WIDTHS, WIDTHS[1:])
            for w in (torch.randn(a, b, generator=rng) * math.sqrt(2 / a), torch.zeros(1, b))]


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    """All members at once: weights stacked to (members, in, out), x and the result (members, n, N)."""
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
        x = torch.baddbmm(bias, x, weight).relu()               # each member multiplies its own signals only
    return torch.baddbmm(weights[-1], x, weights[-2])


def train(function_tones: list[int], noise_tones: list[int], seeds: list[int], steps: int,
          progress: Callable = lambda step: None) -> list[Tensor]:
    """Train one network for each cell of the grid and each seed. Returns their weights, stacked.

    Why an ensemble is as good as training one by one: the losses are summed, and no member's loss contains
    another's weights, so the gradient of the sum for a member's weights is that of its own loss. Adam works
    number by number. Hence each member takes the very steps that it would take alone (to rounding)."""
    # All cells of a seed start from the same weights and see the same random numbers: only K and J differ.
    weights = [torch.stack(w).repeat(len(function_tones) * len(noise_tones), 1, 1).requires_grad_()
               for w in zip(*map(initial_weights, seeds))]
    rngs = [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]
    adam = torch.optim.Adam(weights, LEARNING_RATE, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        a, b = draw(BATCH, rngs), draw(BATCH, rngs)             # new signals at every step: none to memorise
        clean, noise = grid([tones(a, FUNCTION_BAND, k) for k in function_tones],
                            [tones(b, NOISE_BAND, j) for j in noise_tones])
        loss = (network(weights, clean + noise) - clean).square().mean((1, 2)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
        progress(step + 1)
    return [w.detach() for w in weights]


# ---- 3. Was the noise removed, and was the function kept? --------------------------------------------------
def decoupled_evaluation(restore: Callable, clean: Tensor, noise: Tensor) -> Tensor:
    """E_R, the noise left, and E_B, the damage to the function, in per cent, 0 being ideal: (2, members).

    Give the network each noise twice, as it is and upside down (which is as likely). What flips in the output
    is what is left of the noise; what does not flip, less the clean function, is damage to the function:
        E_R = RMS((y+ - y-) / 2) / RMS(noise),   E_B = RMS((y+ + y-) / 2 - clean) / RMS(clean).
    At equal RMS, E_R^2 + E_B^2 is the whole mean squared error: nothing counts twice and nothing hides.
    Passing all on gives (100, 0), a blank output (0, 100): never look at one without the other.
    clean, noise: (members, n, N). Beware: E_R in derain.py is the rain removed; here less is better."""
    plus, minus = restore(clean + noise), restore(clean - noise)
    parts = torch.stack([(plus - minus) / 2, (plus + minus) / 2 - clean])
    return 100 * (parts.square().mean((2, 3)) / torch.stack([noise, clean]).square().mean((2, 3))).sqrt()


# ---- 4. Can the output be held to the clean functions? -----------------------------------------------------
def content_prior(dictionary: Tensor) -> Tensor:
    """The projection onto all combinations of the clean functions in `dictionary` (..., n, N): (..., N, N).
    The VQGAN's part in 1-D: known from clean functions only, and only what they are made of can come out."""
    return torch.linalg.pinv(dictionary, rtol=1e-3) @ dictionary        # x @ this: the least-squares fit to x


# ---- 5. Does the claim hold? -------------------------------------------------------------------------------
def measure(weights: list[Tensor], seeds: list[int], n: int = 256) -> tuple[dict, Tensor]:
    """Test the whole grid on functions like those of the training, under noise seen and unseen.

    Returns {(noise, restorer): E_R and E_B, (2, K, J, seeds)}; and noisy, clean and output, (3, K, J, N), of
    the first test signal of the first seed in the unseen band."""
    rngs = [torch.Generator().manual_seed(2_000_000 + seed) for seed in seeds]
    a, b, dictionary = draw(n, rngs), draw(n, rngs), draw(N, rngs)
    prior = torch.cat([content_prior(tones(dictionary, FUNCTION_BAND, k)) for k in TONES for _ in TONES])
    restorers = {"network": lambda x: network(weights, x), "prior alone": lambda x: x @ prior,
                 "network + prior": lambda x: network(weights, x) @ prior}
    noises = {"trained": [tones(b, NOISE_BAND, j) for j in TONES],
              "unseen clicks": [torch.stack([clicks(n, rng) for rng in rngs])] * len(TONES),
              "unseen band": [tones(b, UNSEEN_BAND, TONES[-1])] * len(TONES)}
    results, shape = {}, (len(TONES), len(TONES), len(seeds))
    for (kind, noise), (name, restore) in product(noises.items(), restorers.items()):
        clean, noise = grid([tones(a, FUNCTION_BAND, k) for k in TONES], noise)
        results[kind, name] = decoupled_evaluation(restore, clean, noise).view(2, *shape)
    views = torch.stack([clean + noise, clean, network(weights, clean + noise)])        # of the unseen band
    return results, views.view(3, *shape, n, N)[:, :, :, 0, 0]


def swap_effect(E_R: Tensor) -> Tensor:
    """E_R (K, J, seeds) where K > J, less E_R with the two numbers swapped: mean over such pairs, (seeds,).
    Above 0: the simpler the functions against the noise, the less unseen noise is left."""
    return (E_R - E_R.transpose(0, 1))[torch.ones(E_R.shape[:2]).tril(-1).bool()].mean(0)


def verdict(effects: Tensor | list[float]) -> str:
    """'reproduced' if every seed's effect is above 0, 'refuted' if every one is below 0, else 'undecided'
    (also if one is not a number). effects: one per seed. Raises RuntimeError if there are none."""
    lowest, highest = torch.as_tensor(effects).aminmax()
    return "reproduced" if lowest > 0 else "refuted" if highest < 0 else "undecided"


# ---- 6. What does it look like? ----------------------------------------------------------------------------
def draw_figure(results: dict, views: Tensor) -> Figure:
    """Of what `measure` returns: left, a signal of each extreme cell; right, the maps of the unseen band."""
    figure, extremes = Figure(figsize=(10.8, 5.8), layout="constrained"), {(0, 3): "A: ", (3, 0): "B: "}
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    for row, restorer in zip(right.subplots(2, 2, sharex=True, sharey=True), ("network", "network + prior")):
        looks = zip(row, ("E_R, unseen noise left", "E_B, damage"), ("Blues", "Oranges"))
        for (axes, title, colours), values in zip(looks, results["unseen band", restorer].mean(-1).numpy()):
            axes.imshow(values, colours, vmin=0, vmax=80, origin="lower", aspect="auto")
            axes.axline((0, 0), slope=1, color="white", lw=5)           # K = J: neither is the simpler
            for k, j in product(range(len(TONES)), repeat=2):
                axes.text(j, k, f"{extremes.get((k, j), '')}{values[k, j]:.0f}", ha="center", va="center")
            axes.set(title=f"{restorer}:\n{title} (%)", xticks=range(len(TONES)), xticklabels=TONES,
                     yticks=range(len(TONES)), yticklabels=TONES)
    right.supxlabel("J, tones in the training noise", fontsize="medium")
    right.supylabel("K, tones in the functions", fontsize="medium")
    for axes, (k, j), simpler in zip(left.subplots(2, 1), extremes, ("function", "noise")):
        for y, name, colour in zip(views[:, k, j], ("noisy", "clean", "output"), ("0.7", "black", "#d55e00")):
            axes.plot(y, color=colour, label=name)
        axes.fill_between(range(N), *views[1:, k, j], color="#d55e00", alpha=0.3, label="error")
        axes.set(xlim=(0, N - 1), ylim=(-4, 4), xlabel="sample", ylabel="signal (clean: RMS 1)",
                 title=f"{extremes[k, j]}the {simpler} is simpler (K = {TONES[k]}, J = {TONES[j]})\n"
                       f"{results['unseen band', 'network'][0, k, j].mean():.0f} % of the unseen noise left")
    axes.legend(ncols=4, loc="lower center", frameon=False)
    return figure


# ---- 7. How is it run? -------------------------------------------------------------------------------------
def write(out: str, results: dict, figure: Figure, seeds: list[int]) -> None:
    """Write toy.csv (every cell and seed) and toy.png into the folder `out`. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=out) as folder:        # both are moved into place only when complete
        with open(f"{folder}/toy.csv", "w") as file:
            print("noise,restorer,function_tones,noise_tones,seed,E_R,E_B", file=file)
            for key, (k, K), (j, J), (s, seed) in product(results, *map(enumerate, (TONES, TONES, seeds))):
                print(*key, K, J, seed, *(f"{e:.3f}" for e in results[key][:, k, j, s]), sep=",", file=file)
        figure.savefig(f"{folder}/toy.png", dpi=150, metadata={"Software": None})
        for name in ("toy.csv", "toy.png"):
            os.replace(f"{folder}/{name}", os.path.join(out, name))
            print("wrote", os.path.join(out, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog="example: python toy_denoise.py --seeds 5 --out figures")
    parser.error = lambda message: parser.exit(2, f"toy_denoise.py: {message}\n")       # one line, no usage
    parser.add_argument("--seeds", type=int, default=5, help="networks per cell, 1 to 50 (a verdict takes 5)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps, 1 to 100000")
    parser.add_argument("--out", default="figures", help="folder for toy.png and toy.csv")
    args = parser.parse_args()
    for name, most in (("seeds", 50), ("steps", 100_000)):
        if not 1 <= vars(args)[name] <= most:
            parser.error(f"--{name} must be from 1 to {most}, not {vars(args)[name]}")
    torch.set_num_threads(1)    # a second thread gains nothing on matrices this small, and may cost a lot
    begun, shown, seeds, live = time.monotonic(), 0.0, list(range(args.seeds)), sys.stderr.isatty()

    def progress(step: int) -> None:
        nonlocal shown
        now = time.monotonic() - begun
        if step == args.steps or now > shown + (0.2 if live else 5):
            shown, left = now, now / step * (args.steps - step)
            print("\r" * live + f"training: step {step} of {args.steps}, {left:.0f} s left ", file=sys.stderr,
                  end="" if live and step < args.steps else "\n", flush=True)
    try:
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()            # find out before the training, not after it
        results, views = measure(train(TONES, TONES, seeds, args.steps, progress), seeds)
        write(args.out, results, draw_figure(results, views), seeds)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to, not {args.out} ({error.strerror})")
    E_R, held = (results["unseen band", name][0] for name in ("network", "network + prior"))
    for claim, x in (("the noise knob, J = 1 less J = 8", (E_R[:, 0] - E_R[:, -1]).mean(0)),
                     ("the function knob, K = 8 less K = 1", (E_R[-1] - E_R[0]).mean(0)),
                     ("the content prior, without less with it", (E_R - held).mean((0, 1))),
                     ("the claim on clicks", swap_effect(results["unseen clicks", "network"][0])),
                     ("toy: the simpler the functions against the noise, the better unseen noise is removed",
                      swap_effect(E_R))):
        print(f"{claim}: E_R {x.mean():+.1f} ± {x.std(correction=len(x) > 1):.1f} points (mean ± sd over "
              f"seeds), {(x > 0).sum()} of {len(x)} seeds agree: {verdict(x)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ntoy_denoise.py: stopped, nothing was written", file=sys.stderr)
        sys.exit(130)
