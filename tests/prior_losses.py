"""What does each term of the prior's loss buy?  `python tests/prior_losses.py`, after `derain.py reproduce prior`.

Fine-tunes the VQGAN of that experiment with its own loss (the distance of the latents), with L1 of the drawn image
added, and with L1 alone; writes figures/prior-losses.csv, a row for each loss, number of backgrounds, seed and kind of
test.  About 20 minutes on one core; rows that are there are kept, so that it can stop and go on.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import derain  # noqa: E402  (it lies a folder up)

latents_alone = derain.VQGANPrior.loss


def l1_alone(network: derain.VQGANPrior, degraded: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(network(degraded), clean)


def both(network: derain.VQGANPrior, degraded: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return latents_alone(network, degraded, clean) + l1_alone(network, degraded, clean)


LOSSES = {"latents": latents_alone, "latents and L1": both, "L1": l1_alone}
SEEDS = (0, 1, 2)


def main(target: Path = ROOT / "figures" / "prior-losses.csv", runs: Path = ROOT / "runs") -> None:
    torch.set_num_threads(1)
    rows = list(csv.DictReader(target.read_text().splitlines())) if target.exists() else []
    done = {(row["loss"], int(row["n"]), int(row["seed"])) for row in rows}
    for name, loss in LOSSES.items():
        derain.VQGANPrior.loss = loss
        for n in (8, 1024):
            for seed in SEEDS:
                run = derain.Run(n=n, net="prior", seed=seed)
                if (name, n, seed) in done:
                    continue
                if name == "latents" and run.file(runs).exists():  # that is the experiment's own run
                    found = derain.read_result(run.file(runs))
                else:
                    vqgan = derain.load_vqgan(derain.prior_file(run, runs))
                    found, _ = derain.measure(run, *derain.training_and_held_out(None, run.images, seed), vqgan)
                rows += [{"loss": name, "n": n, "seed": seed, "steps": run.steps, "rate": derain.VQGANPrior.rate, **row}
                         for row in found]
                derain.save_table(rows, target)
    for name in LOSSES:
        for n in (8, 1024):
            for tested in ("small", "unseen"):
                chosen = [row for row in rows if (row["loss"], int(row["n"]), row["tested_on"]) == (name, n, tested)]
                print(f"{name:16}{n:5} backgrounds, {tested:8}" + "".join(
                    "{:>8} {:6.2f} ± {:.2f}".format(key, np.mean(values), np.std(values, ddof=1))
                    for key in ("E_R", "E_B", "psnr") for values in [[float(row[key]) for row in chosen]]))


if __name__ == "__main__":
    main()
