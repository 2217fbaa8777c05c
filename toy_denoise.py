"""Why do restoration networks fail on unseen noise? The idea of derain.py on 1-D functions.

A clean signal is a sum of K sinusoids, the noise a sum of J others, equally loud. A small network
learns noisy -> clean. It may learn what the functions look like, or learn what the noise looks
like and pass on the rest. Both are right on the training noise; on unseen noise only the first is.
By Hu et al. (arXiv 2502.12600) it learns the simpler of the two. K and J are the knobs to turn.

1. Signals: what is a simple function, and what is a simple noise?
2. Training: how does one network learn to denoise?
3. Evaluation: was the noise removed, and was the function kept?
4. Content prior: can the output be held to the clean functions?
5. The claim: does a network learn the simpler of the two? Figure and command line follow.
"""
import argparse
import math
import os
import time
from collections.abc import Callable
from itertools import combinations, product

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

# ---- 1. Signals: what is a simple function, and what is a simple noise? --------------------------
# Both are sums of tones. Only their number and their band differ: swapping K and J swaps the roles.
N = 64  # samples in a signal
TONES = (1, 2, 4, 8)  # the positions of both knobs, K and J
FUNCTION_BAND, NOISE_BAND, UNSEEN_BAND = 1, 11, 21  # lowest frequency, in cycles per signal
ANGLES = 2 * math.pi * torch.arange(N // 2)[:, None] * torch.arange(N) / N
WAVES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # (32, 2, N), by cycles per signal


def tones(n: int, lowest: int, count: int, rng: torch.Generator) -> Tensor:
    """Sums of `count` tones of random amplitudes and phases, RMS 1: (n, N)."""
    amplitudes = torch.randn(n, 2 * TONES[-1], generator=rng)  # as many draws for every count
    waves = WAVES[lowest:lowest + count].flatten(0, 1)  # (2 count, N)
    return nn.functional.normalize(amplitudes[:, :2 * count] @ waves) * math.sqrt(N)


def clicks(n: int, rng: torch.Generator) -> Tensor:
    """Noise of another kind: only 4 random samples of a signal are hit, RMS 1: (n, N)."""
    hit = torch.rand(n, N, generator=rng).argsort(-1) < 4
    return nn.functional.normalize(hit * torch.randn(n, N, generator=rng)) * math.sqrt(N)


# ---- 2. Training: how does one network learn to denoise? -----------------------------------------
def train(k: int, j: int, seed: int, steps: int) -> tuple[nn.Sequential, float]:
    """Train a network on functions of k tones in noise of j tones; returns it and its last loss.
    Of one seed, all networks have the same initial weights and draws: only k and j differ."""
    model = nn.Sequential(nn.Linear(N, 128), nn.ReLU(),
                          nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, N))
    rng = torch.Generator().manual_seed(seed)
    for layer in model[::2]:  # initial weights as in He et al. (2015)
        weight = torch.randn(layer.in_features, layer.out_features, generator=rng)
        layer.weight.data = math.sqrt(2 / layer.in_features) * weight.T.contiguous()
        layer.bias.data.zero_()
    adam = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    rng = torch.Generator().manual_seed(1_000_000 + seed)
    for _ in range(steps):
        clean = tones(32, FUNCTION_BAND, k, rng)  # (32, N), new signals at every step
        noise = tones(32, NOISE_BAND, j, rng)
        loss = nn.functional.mse_loss(model(clean + noise), clean)
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    return model, loss.item()


# ---- 3. Evaluation: was the noise removed, and was the function kept? ----------------------------
def decoupled_evaluation(restore: Callable, clean: Tensor, noise: Tensor) -> Tensor:
    """`noise_left` and `damage`, in per cent, 0 being ideal: (2,). clean, noise: (n, N), RMS 1.
    The network gets each noise twice, as it is and upside down. What turns over in the output is
    noise left; what does not, less the clean function, is damage. noise_left^2 + damage^2 = total
    error^2. Passing all on gives (100, 0), a blank output (0, 100): one alone says little."""
    plus, minus = restore(clean + noise), restore(clean - noise)
    noise_left = (plus - minus) / 2
    damage = (plus + minus) / 2 - clean
    return 100 * torch.stack([noise_left, damage]).square().mean((1, 2)).sqrt()


# ---- 4. Content prior: can the output be held to the clean functions? ----------------------------
def content_prior(functions: Tensor) -> Tensor:
    """The projection (N, N) onto all combinations of clean functions (n, N); x @ it fits x best.
    The VQGAN's part in 1-D: it has seen no noise, and puts out only what functions are made of."""
    return torch.linalg.pinv(functions, rtol=1e-3) @ functions


# ---- 5. The claim: does a network learn the simpler of the two? ----------------------------------
@torch.no_grad()
def evaluate(model: nn.Module, k: int, j: int, seed: int) -> tuple[dict, Tensor]:
    """{(noise, restorer): noise_left, damage}; noisy, clean, output of an unseen signal, (3, N)."""
    rng = torch.Generator().manual_seed(2_000_000 + seed)
    clean = tones(256, FUNCTION_BAND, k, rng)
    noises = {"unseen band": tones(256, UNSEEN_BAND, TONES[-1], rng),
              "unseen clicks": clicks(256, rng),
              "trained": tones(256, NOISE_BAND, j, rng)}
    prior = content_prior(tones(N, FUNCTION_BAND, k, rng))
    restorers = {"network": model,
                 "prior alone": lambda x: x @ prior,
                 "network + prior": lambda x: model(x) @ prior}
    measures = {}
    for noise, restorer in product(noises, restorers):
        measures[noise, restorer] = decoupled_evaluation(restorers[restorer], clean, noises[noise])
    noisy = clean + noises["unseen band"]
    return measures, torch.stack([noisy, clean, model(noisy)])[:, 0]


def swap_effect(noise_left: Tensor) -> Tensor:
    """noise_left (K, J, seeds) where K > J, less that with K and J swapped: mean, (seeds,)."""
    pairs = combinations(range(len(noise_left)), 2)
    return torch.stack([noise_left[k, j] - noise_left[j, k] for j, k in pairs]).mean(0)


def verdict(effects: Tensor) -> str:
    """Mean of the effects (seeds,), its 95 % confidence interval, and on which side of 0 it is."""
    student_t = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds
    mean, n = effects.mean().item(), len(effects)
    agree = f"{(effects > 0).sum()} of {n} seeds agree"
    if n not in student_t:
        return f"{mean:+.1f} points, {agree}: too few seeds"
    half = student_t[n] * effects.std().item() / math.sqrt(n)
    side = "reproduced" if mean > 0 else "refuted"
    word = side if abs(mean) > half else "undecided"
    return f"{mean:+.1f} points (95 %: {mean - half:+.1f} to {mean + half:+.1f}), {agree}: {word}"


def draw_figure(results: dict, signals: dict) -> Figure:
    """Top: a signal of each extreme cell, A and B. Bottom: means over seeds, by K and J."""
    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    titles = {(0, 3): "A: simple function (K = 1, J = 8)", (3, 0): "B: simple noise (K = 8, J = 1)"}
    for axes, (k, j) in zip(top.subplots(1, 2), titles):
        for signal, colour in zip(signals[k, j].numpy(), ("0.75", "black", "#d55e00")):
            axes.plot(signal, color=colour)
        axes.legend(("noisy", "clean", "output"), ncols=3, loc="lower center", frameon=False)
        share = results["unseen band", "network"][0, k, j].mean()
        axes.set(xlim=(0, N - 1), ylim=(-4.5, 4), xlabel="sample", ylabel="signal (clean: RMS 1)",
                 title=f"{titles[k, j]}, {share:.0f} % of unseen noise left")
    maps = product(("network", "network + prior"), (0, 1))
    for axes, (restorer, measure) in zip(bottom.subplots(1, 4), maps):
        values = results["unseen band", restorer][measure].mean(-1).numpy()
        axes.imshow(values, ("Blues", "Oranges")[measure], vmin=0, vmax=80, origin="lower")
        for k, j in product(range(4), repeat=2):
            name = titles.get((k, j), "")[:3]  # "A: ", "B: " or nothing
            axes.text(j, k, f"{name}{values[k, j]:.0f}", ha="center", va="center")
        axes.set(title=f"{restorer}:\n{('unseen noise left', 'damage')[measure]} (%)",
                 xlabel="J, tones in training noise", xticks=range(4), xticklabels=TONES,
                 ylabel="K, tones in functions", yticks=range(4), yticklabels=TONES)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(epilog="example: python toy_denoise.py --seeds 1 --out runs",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"toy_denoise.py: {message}\n")  # one line
    parser.add_argument("--seeds", type=int, default=5, help="networks a cell; a verdict takes 5")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of a network")
    parser.add_argument("--out", default="figures", help="folder for toy.csv and toy.png")
    args = parser.parse_args()
    if args.seeds not in range(1, 11) or args.steps < 1:
        parser.error("--seeds must be from 1 to 10, --steps 1 or more")
    try:
        os.makedirs(args.out, exist_ok=True)
        open(f"{args.out}/toy.csv", "a").close()  # find out before the training, not after it
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    torch.set_num_threads(1)  # a second thread gains nothing on matrices this small
    results, signals = {}, {}
    total, begun = 16 * args.seeds, time.monotonic()
    cells = product(range(4), range(4), range(args.seeds))
    for done, (k, j, seed) in enumerate(cells, 1):
        model, loss = train(TONES[k], TONES[j], seed, args.steps)
        measures, views = evaluate(model, TONES[k], TONES[j], seed)
        signals.setdefault((k, j), views)  # of the first seed
        for key, pair in measures.items():
            results.setdefault(key, torch.zeros(2, 4, 4, args.seeds))[:, k, j, seed] = pair
        if done % args.seeds == 0:  # a cell of the grid is complete
            left = (time.monotonic() - begun) * (total / done - 1)
            print(f"{done}/{total} networks, step {args.steps}, loss {loss:.4f}: {left:.0f} s left")

    with open(f"{args.out}/toy.csv", "w") as file:
        print("noise,restorer,function_tones,noise_tones,seed,noise_left,damage", file=file)
        for key, k, j, seed in product(results, range(4), range(4), range(args.seeds)):
            pair = [f"{value:.3f}" for value in results[key][:, k, j, seed]]
            print(*key, TONES[k], TONES[j], seed, *pair, sep=",", file=file)
    draw_figure(results, signals).savefig(f"{args.out}/toy.png", metadata={"Software": None})
    print(f"wrote {args.out}/toy.csv and {args.out}/toy.png")
    alone, held = (results["unseen band", name][0] for name in ("network", "network + prior"))
    print("prior: noise left without it, less with it:", verdict((alone - held).mean((0, 1))))
    for noise in ("unseen clicks", "unseen band"):
        effects = swap_effect(results[noise, "network"][0])
        print(f"{noise}: noise left where K > J, less with K and J swapped:", verdict(effects))


if __name__ == "__main__":
    main()
