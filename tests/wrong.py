"""Wrong solutions that students write; the marked tests must catch each, and pass the right one.

Each: the function, the mistake, what the right solution says, what the wrong one says instead.
"""

import ast
import textwrap
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "derain.py"

WRONG = (
    ("streak_kernel", "degrees for radians", "torch.deg2rad(", "("),
    ("streak_kernel", "leans the other way", "angle = torch", "angle = -torch"),
    ("streak_kernel", "sigma for width", " / math.sqrt(8 * math.log(2))", ""),
    ("streak_kernel", "half the length for the length", "length / 2", "length"),
    ("streak_kernel", "scaled to a sum of 1", "/ (2 * torch.erf(length / 2 / blur))",
     "/ box.sum()"),
    ("streak_seeds", "threshold on the wrong side", "above > 0", "above < 0"),
    ("streak_seeds", "all streaks equally bright", "low + (high - low) * above",
     "torch.full_like(above, high)"),
    ("streak_seeds", "seeds per 1,000 pixels", "10_000", "1_000"),
    ("streak_seeds", "brightest where the noise is lowest", "low + (high", "high - (high"),
    ("streak_seeds", "one quantity for the whole batch", "[:, None, None]", ".mean()"),
    ("rain_layers", "one draw for the whole batch", "rng.uniform(low, high, n)",
     "np.full(n, rng.uniform(low, high))"),
    ("rain_layers", "mirrors all or none", "rng.choice([-1, 1], n)", "rng.choice([-1, 1])"),
    ("rain_layers", "kernel flipped from left to right", "rfft2(kernel,", "rfft2(kernel.flip(-1),"),
    ("rain_layers", "one kernel for the whole batch", "rfft2(kernel,", "rfft2(kernel[:1],"),
    ("rain_layers", "one noise for the whole batch", "(n, *canvas)", "(1, *canvas)"),
    ("rain_layers", "streaks wrap around", "margin:, margin:", ":, :"),
    ("rain_layers", "not clipped", ".clamp(0, 1)", ""),
    ("add_rain", "not clipped", ".clamp(0, 1)", ""),
    ("add_rain", "in one channel only", "background + rain",
     "torch.cat([background[:, :1] + rain, background[:, 1:]], 1)"),
    ("add_rain", "changes its input", "background + rain", "background.add_(rain)"),
    ("rain_mask", "a threshold of 1 grey level", "RAIN_THRESHOLD + 1e-6", "1 / 255"),
    ("rain_mask", "mean of the channels", ".amax(1", ".mean(1"),
    ("rain_mask", "first channel only", ".abs().amax(1, keepdim=True)", ".abs()[:, :1]"),
    ("rain_mask", "a mask per channel", ".amax(1, keepdim=True)", ""),
    ("rain_mask", "rain that darkens is missed", ".abs()", ""),
    ("decoupled_evaluation", "a mask per channel", "rain_mask(rainy, clean).expand_as(clean)",
     "(rainy - clean).abs() > RAIN_THRESHOLD"),
    ("decoupled_evaluation", "mean of roots", ".square().mean().sqrt()", ".square().sqrt().mean()"),
    ("decoupled_evaluation", "E_R against the clean image", "rms((output - rainy)[wet])",
     "rms((output - clean)[wet])"),
    ("decoupled_evaluation", "E_W against the rainy image", '"E_W": rms((output - clean)[wet])',
     '"E_W": rms((output - rainy)[wet])'),
    ("decoupled_evaluation", "E_W off the mask", '"E_W": rms((output - clean)[wet])',
     '"E_W": rms((output - clean)[~wet])'),
    ("decoupled_evaluation", "E_B on the mask", "[~wet]", "[wet]"),
    ("decoupled_evaluation", "not in grey levels", "255 * ", ""),
    ("decoupled_evaluation", "PSNR against the rainy image", "psnr(output, clean)",
     "psnr(output, rainy)"),
    ("decoupled_evaluation", "shapes checked in part", "output.shape == rainy.shape == clean.shape",
     "output.shape == rainy.shape"),
    ("decoupled_evaluation", "clamps its input in place", "    wet =",
     "    output.clamp_(0, 1)\n    wet ="),
    ("psnr", "of the mean over all images", ".flatten(1).mean(1)", ".mean()"),
    ("psnr", "20 log10 of the squared error", "-10 *", "-20 *"),
    ("psnr", "shapes unchecked", "output.shape != clean.shape", "False"),
    ("psnr", "clamps its input in place", "    mse =", "    output.clamp_(0, 1)\n    mse ="),
    ("ssim", "zero padding", "x.double()[None], y.double()[None]",
     "F.pad(x.double()[None], (5,) * 4), F.pad(y.double()[None], (5,) * 4)"),
    ("ssim", "a flat window", "window = window / window.sum()",
     "window = torch.ones_like(window) / 11"),
    ("ssim", "of the mean of the channels", "zip(output.flatten(0, 1), clean.flatten(0, 1))",
     "zip(output.mean(1), clean.mean(1))"),
    ("ssim", "checks only the width", "min(clean.shape[-2:]) < 11", "clean.shape[-1] < 11"),
    ("sharpness", "sum of the two differences", "torch.hypot(down, right)",
     "(down.abs() + right.abs())"),
    ("sharpness", "one number for the batch", "mean((1, 2))", "mean()"),
    ("sharpness", "one channel for grey", "patches.mean(1)", "patches[:, 0]"),
    ("sample_patches", "never the last row and column", "side - size + 1", "max(side - size, 1)"),
    ("sample_patches", "always the first images", "rng.permutation(len(images))",
     "np.arange(len(images))"),
    ("sample_patches", "images drawn with replacement", "np.concatenate(order)[:n]",
     "rng.integers(len(images), size=n)"),
    ("draw_dead_leaves", "leaves shine through", "coverage, colour", "0.5 * coverage, colour"),
    ("draw_dead_leaves", "radii all alike", "r = (", "r = smallest + u  # ("),
    ("draw_dead_leaves", "radii uniform", "r = (", "r = smallest + (largest - smallest) * u  # ("),
    ("draw_dead_leaves", "too few leaves, with gaps", "math.ceil(8 * ", "math.ceil(0.2 * "),
    ("ResNet.forward", "blocks that replace", "features + block(features)", "block(features)"),
    ("pad_to_multiple", "at the left and the top", "0, right, 0, bottom", "right, 0, bottom, 0"),
    ("pad_to_multiple", "the edge repeated", '"reflect" if', '"replicate" if'),
    ("UNet.forward", "details lost", "details.pop()", "torch.zeros_like(details.pop())"),
    ("UNet.forward", "cropped at the wrong side", ":degraded.shape[2]", "-degraded.shape[2]:"),
    ("UNet.forward", "details last", "[details.pop(), grow(features)]",
     "[grow(features), details.pop()]"),
    ("train", "gradients that add up", "optimizer.zero_grad()", "pass"),
    ("train", "never mirrored", "< 0.5", "< 0"),
    ("train", "the batch mirrored as a whole", "(BATCH, 1, 1, 1)", "(1, 1, 1, 1)"),
    ("train", "only the first backgrounds", "size=BATCH)", "size=BATCH) % BATCH"),
    ("train", "the seed not used", "stream(seed", "stream(0"),
    ("train", "squared errors", "F.l1_loss", "F.mse_loss"),
    ("train", "weights that decay", "optim.Adam(", "optim.AdamW("),
    ("train", "a constant rate", "0.5 * (1 + math.cos(math.pi * step / steps))", "1"),
    ("train", "always the same batch", '"training", step)', '"training")'),
    ("to_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("from_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("shift_mask", "the wrong way round", "0.0, -100.0", "-100.0, 0.0"),
    ("shift_mask", "across one pair of edges only", "+ band(w)", "+ 0 * band(w)"),
    ("WindowAttention.forward", "scaled by all channels", "(c // self.heads) ** -0.5", "c ** -0.5"),
    ("WindowAttention.forward", "offsets the wrong way", "[self.offset]", "[self.offset.T]"),
    ("WindowAttention.forward", "softmax over the queries", ".softmax(-1)", ".softmax(-2)"),
    ("SwinBlock.forward", "shift not undone", ".roll((self.shift, self.shift), (1, 2))", ""),
    ("SwinBlock.forward", "shift the wrong way", "-self.shift, -self", "self.shift, self"),
    ("SwinBlock.forward", "no mask", "mask = shift_mask(", "_ = shift_mask("),
    ("ResidualBlock.forward", "no shortcut", "self.nin_shortcut(x) + ", ""),
    ("ResidualBlock.forward", "one swish too few", "F.silu(self.norm2(y))", "self.norm2(y)"),
    ("PixelAttention.forward", "keys and values swapped", "(q, k, v)", "(q, v, k)"),
    ("PixelAttention.forward", "not of the normalized input", "y = self.norm(x)", "y = x"),
    ("Codebook.forward", "no straight-through gradient", "latent + (quantized - latent).detach()",
     "quantized"),
    ("Codebook.forward", "beta on the wrong term", "to_codes + 0.25 * F", "0.25 * to_codes + F"),
    ("Codebook.forward", "no stop-gradient in the loss", "latent, quantized.detach()",
     "latent, quantized"),
    ("Codebook.forward", "largest product for smallest distance", "codes.square().sum(1) - 2 *",
     "-2 *"),
    ("VQGANPrior.draw", "shows [-1, 1] for [0, 1]", "+ 1) / 2", ")"),
    ("VQGANPrior.draw", "cropped at the wrong side", ":shape[2]", "-shape[2]:"),
    ("VQGANPrior.loss", "the latent, not its codes, as target",
     "codes, _, _ = self.vqgan.quantize(", "codes = ("),
    ("VQGANPrior.loss", "taught by itself", "self.teacher(", "self.vqgan.encode("),
    ("VQGANPrior.loss", "no L1", " + F.l1_loss(self.draw(latent, clean.shape), clean)", ""),
)


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function of a dotted name, such as "train" or "ResNet.forward"; KeyError if missing."""
    node = tree
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            raise KeyError(name)
        node = named[-1]
    return node


def source_of(name: str) -> str:
    """The source of a function of derain.py."""
    text = SOURCE.read_text(encoding="utf-8")
    node = find(ast.parse(text), name)
    return textwrap.dedent("\n".join(text.split("\n")[node.lineno - 1:node.end_lineno]))


def put(monkeypatch, derain, name: str, source: str) -> None:
    """Replace a function or method of the module derain by what `source` defines."""
    *owner, last = name.split(".")
    made = {}
    exec(compile(source, "wrong", "exec"), vars(derain), made)
    monkeypatch.setattr(getattr(derain, owner[0]) if owner else derain, last, made[last])
