"""Wrong solutions that students write; the marked tests must catch each, and pass the right one.

Each: the function, the mistake, what the right solution says, what the wrong one says instead.
"""

import ast
import textwrap
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "derain.py"

WRONG = (
    ("streak_kernel", "degrees for radians", "torch.deg2rad(", "("),
    ("streak_kernel", "leans the other way", "angle = torch", "angle = -torch"),
    ("streak_kernel", "sigma for width", " / 2.3548", ""),
    ("streak_kernel", "sigma twice too large", " / 2.3548", " / 1.1774"),
    ("streak_kernel", "half the length", "half = as", "half = 0.5 * as"),
    ("streak_kernel", "a radius too small by one", "radius = ceil", "radius = -1 + ceil"),
    ("streak_kernel", "a radius of the whole length", "ceil((half", "ceil((2 * half"),
    (
        "streak_kernel",
        "scaled to a sum of 1",
        "(2 * erf(half / blur))",
        "(gaussian * box).sum((-1, -2), keepdim=True)",
    ),
    ("streak_seeds", "threshold on the wrong side", "above > 0", "above < 0"),
    ("streak_seeds", "all equally bright", "low + (high - low) * above", "high"),
    ("streak_seeds", "changes its input", "noise - (1 - share)", "noise.sub_(1 - share)"),
    ("streak_seeds", "seeds per 1,000 pixels", "10_000", "1_000"),
    ("streak_seeds", "brightest where the noise is lowest", "low + (high", "high - (high"),
    ("streak_seeds", "one quantity for the batch", "[:, None, None]", ".mean()"),
    (
        "rain_layers",
        "one draw for the batch",
        "rng.uniform(low, high, n)",
        "np.full(n, rng.uniform(low, high))",
    ),
    ("rain_layers", "mirrors all or none", "rng.choice([-1, 1], n)", "rng.choice([-1, 1])"),
    ("rain_layers", "a kernel flipped left to right", "rfft2(kernel,", "rfft2(kernel.flip(-1),"),
    ("rain_layers", "one kernel for the batch", "rfft2(kernel,", "rfft2(kernel[:1],"),
    ("rain_layers", "one noise for the batch", "(n, *canvas)", "(1, *canvas)"),
    (
        "rain_layers",
        "streaks wrap around",
        "margin : margin + height, margin : margin + width",
        ":height, :width",
    ),
    (
        "rain_layers",
        "no streaks enter from outside",
        "spectrum =",
        "seeds[:, :margin] = 0; seeds[:, :, :margin] = 0; spectrum =",
    ),
    ("rain_layers", "of 64 bits", ".clamp(0, 1)", ".clamp(0, 1).double()"),
    ("rain_layers", "not clipped", ".clamp(0, 1)", ""),
    ("add_rain", "not clipped", ".clamp(0, 1)", ""),
    (
        "add_rain",
        "in one channel only",
        "background + rain",
        "torch.cat([background[:, :1] + rain, background[:, 1:]], 1)",
    ),
    ("add_rain", "changes its input", "background + rain", "background.add_(rain)"),
    ("rain_mask", "no tolerance", "RAIN_THRESHOLD + 1e-6", "RAIN_THRESHOLD"),
    ("rain_mask", "4 grey levels are wet", "> RAIN_THRESHOLD + 1e-6", ">= RAIN_THRESHOLD"),
    ("rain_mask", "mean of the channels", ".amax(1", ".mean(1"),
    ("rain_mask", "first channel only", ".abs().amax(1, keepdim=True)", ".abs()[:, :1]"),
    ("rain_mask", "a mask per channel", ".amax(1, keepdim=True)", ""),
    ("rain_mask", "rain that darkens is missed", ".abs()", ""),
    ("decoupled_sums", "means not taken off", "r - r.mean()", "r"),
    (
        "decoupled_sums",
        "the mean of each channel taken off",
        "r.mean()",
        "r.mean((1, 2), keepdim=True)",
    ),
    (
        "decoupled_sums",
        "a mask per channel",
        "rain_mask(rainy[None], clean[None])[0].expand_as(clean)",
        "r.abs() > RAIN_THRESHOLD",
    ),
    ("decoupled_sums", "E_R against the clean image", "(d - r)[wet]", "d[wet]"),
    ("decoupled_sums", "E_B everywhere", "d[~wet]", "d"),
    ("decoupled_measures", "damage with the rain in it", "rms(rest", 'rms(sums["d * d"]'),
    (
        "decoupled_measures",
        "damage around the mean of the rain",
        'sums["r * d"] + slope**2 * sums["r * r"]',
        'sums["pattern * d"] + slope**2 * sums["pattern * pattern"]',
    ),
    ("decoupled_measures", "not in grey levels", "255 * ", ""),
    (
        "decoupled_measures",
        "0 where there is no rain",
        "100 * slope if rain else nan",
        "100 * slope",
    ),
    ("decoupled_measures", "0 where nothing is wet", "if count else nan", "if count else 0"),
    (
        "decoupled_evaluation",
        "one mean of the rain for the set",
        "decoupled_sums(*images) for images in triples",
        "decoupled_sums(*(torch.cat([*t], 2) for t in (output, rainy, clean)))",
    ),
    (
        "decoupled_evaluation",
        "means over images",
        "measures = decoupled_measures([decoupled_sums(*images) for images in triples])",
        "each = [decoupled_measures([decoupled_sums(*images)]) for images in triples]\n"
        "    measures = {}\n"
        "    for k in each[0]:\n"
        "        measures[k] = np.mean([one[k] for one in each if one[k] == one[k]] or nan)",
    ),
    (
        "decoupled_evaluation",
        "PSNR against the rainy image",
        "psnr(output, clean)",
        "psnr(output, rainy)",
    ),
    ("decoupled_evaluation", "PSNR of a clamped output", "psnr(output", "psnr(output.clamp(0, 1)"),
    (
        "decoupled_evaluation",
        "shapes checked in part",
        "output.shape == rainy.shape == clean.shape",
        "output.shape == rainy.shape",
    ),
    (
        "decoupled_evaluation",
        "SSIM with the rainy image",
        "ssim(output, clean)",
        "ssim(output, rainy)",
    ),
    ("decoupled_evaluation", "SSIM by the width", "min(clean.shape[-2:])", "clean.shape[-1]"),
    (
        "decoupled_evaluation",
        "clamps its input in place",
        "triples =",
        "output.clamp_(0, 1); triples =",
    ),
    ("psnr", "one squared error for the set", ".mean((1, 2, 3))", ".mean()"),
    ("psnr", "of a clamped output", "(output - clean)", "(output.clamp(0, 1) - clean)"),
    ("psnr", "of the mean of the channels", "(output - clean)", "(output - clean).mean(1, True)"),
    ("psnr", "shapes unchecked", "output.shape != clean.shape", "False"),
    ("psnr", "clamps its input in place", "mse =", "output.clamp_(0, 1); mse ="),
    ("ssim", "zero padding", "conv2d(image[None],", "conv2d(pad(image[None], (5,) * 4),"),
    ("ssim", "a flat window", "window /= window.sum()", "window[:] = 1 / 11"),
    (
        "ssim",
        "of the mean of the channels",
        "zip(output.flatten(0, 1).double(), clean.flatten(0, 1).double())",
        "zip(*(t.mean(1, True).expand_as(t).flatten(0, 1).double() for t in (output, clean)))",
    ),
    ("ssim", "without the first constant", "1e-4", "0"),
    ("ssim", "of a clamped output", "output.flatten(0, 1)", "output.clamp(0, 1).flatten(0, 1)"),
    ("ssim", "11 pixels are refused", "< 11", "<= 11"),
    ("ssim", "checks only the width", "min(clean.shape[-2:]) < 11", "clean.shape[-1] < 11"),
    ("sharpness", "sum of both", "torch.hypot(down, right)", "(down.abs() + right.abs())"),
    ("sharpness", "one number for the batch", "mean((1, 2))", "mean()"),
    ("sharpness", "one channel for grey", "patches.mean(1)", "patches[:, 0]"),
    ("sample_patches", "all images as large as the first", "images[i].shape", "images[0].shape"),
    ("sample_patches", "never the last row", "height - size + 1", "max(height - size, 1)"),
    ("sample_patches", "never the last column", "width - size + 1", "max(width - size, 1)"),
    ("sample_patches", "the height for the width", "width - size", "height - size"),
    ("sample_patches", "the shorter side for both", "width - size", "min(height, width) - size"),
    (
        "sample_patches",
        "the shorter side on portraits",
        "height - size",
        "min(height, width) - size",
    ),
    (
        "sample_patches",
        "first images first",
        "rng.permutation(len(images))",
        "np.arange(len(images))",
    ),
    (
        "sample_patches",
        "images drawn with replacement",
        "np.concatenate(order)[:n]",
        "rng.integers(len(images), size=n)",
    ),
    ("training_patches", "low and high swapped", 'third == "high"', 'third == "low"'),
    ("training_patches", "nothing to choose from", "3 * n", "n"),
    ("training_patches", "8 are not among 1,024", "max(n, MANY)", "n"),
    ("training_patches", "a limit of 0.1 GB", "52_000", "5_200"),
    ("training_patches", "the seed not used", "stream(seed", "stream(0"),
    ("ResNet.forward", "blocks that replace", "features + block(features)", "block(features)"),
    (
        "ResNet.forward",
        "the head never learns",
        "self.head(degraded)",
        "self.head(degraded).detach()",
    ),
    (
        "pad_to_multiple",
        "at the left and the top",
        "(0, right, 0, bottom)",
        "(right, 0, bottom, 0)",
    ),
    ("pad_to_multiple", "the edge repeated", '"reflect" if', '"replicate" if'),
    ("pad_to_multiple", "multiples of 4 only", "% multiple", "% 4"),
    ("pad_to_multiple", "by two multiples", "% multiple", "% (2 * multiple)"),
    (
        "pad_to_multiple",
        "repeats on one axis only",
        "    return",
        '    if mode == "replicate" and right < width:\n'
        '        images, right = pad(images, (0, right, 0, 0), "reflect"), 0\n'
        '    if mode == "replicate" and bottom < height:\n'
        '        images, bottom = pad(images, (0, 0, 0, bottom), "reflect"), 0\n'
        "    return",
    ),
    ("UNet.forward", "details lost", "cat([middle", "cat([0 * middle"),
    (
        "UNet.forward",
        "details last",
        "[fine, self.enlarge1(middle)]",
        "[self.enlarge1(middle), fine]",
    ),
    ("UNet.forward", "details without gradient", "[fine, self", "[fine.detach(), self"),
    ("UNet.forward", "the input not added", "image + self.tail", "self.tail"),
    (
        "UNet.forward",
        "cropped at the wrong side",
        "return crop(image + self.tail(fine), degraded)",
        "return (image + self.tail(fine))[..., -degraded.shape[2] :, -degraded.shape[3] :]",
    ),
    ("train", "gradients that add up", "optimizer.zero_grad()", "pass"),
    ("train", "never mirrored", "< 0.5", "< 0"),
    ("train", "mirrored with a chance of 0.25", "< 0.5", "< 0.25"),
    ("train", "mirrored top to bottom", "flip(-1)", "flip(-2)"),
    (
        "train",
        "every second one mirrored",
        "rng.random((BATCH, 1, 1, 1)) < 0.5",
        "np.arange(BATCH)[:, None, None, None] % 2 > 0",
    ),
    ("train", "the batch mirrored as a whole", "(BATCH, 1, 1, 1)", "(1, 1, 1, 1)"),
    ("train", "only the first backgrounds", "size=BATCH)", "size=BATCH) % BATCH"),
    (
        "train",
        "backgrounds in order",
        "rng.integers(len(backgrounds), size=BATCH)",
        "np.arange(step * BATCH, step * BATCH + BATCH) % len(backgrounds)",
    ),
    (
        "train",
        "no background twice in a batch",
        "rng.integers(len(backgrounds), size=BATCH)",
        "np.resize(rng.permutation(len(backgrounds)), BATCH)",
    ),
    (
        "train",
        "no background again before all are used",
        "rng.integers(len(backgrounds), size=BATCH)",
        "np.array([stream(seed, i // len(backgrounds)).permutation(len(backgrounds))"
        "[i % len(backgrounds)] for i in range(step * BATCH, step * BATCH + BATCH)])",
    ),
    ("train", "the seed not used", "stream(seed", "stream(0"),
    ("train", "always the same batch", '"training", step)', '"training")'),
    ("train", "always the same rain", "degrade(clean, rng)", "degrade(clean, stream(seed))"),
    (
        "train",
        "rain from numpy's global generator",
        "degrade(clean, rng)",
        "degrade(clean, stream(np.random.randint(2**31)))",
    ),
    (
        "train",
        "rain from torch's global generator",
        "degrade(clean, rng)",
        "degrade(clean, stream(torch.randint(2**31, ()).item()))",
    ),
    (
        "train",
        "mirrored again after the rain",
        "degrade(clean, rng)",
        "degrade(clean, rng)\n        clean = where(mirrored, clean.flip(-1), clean)",
    ),
    ("train", "squared errors", "l1_loss", "mse_loss"),
    ("train", "own loss with its arguments swapped", "(degraded, clean)\n", "(clean, degraded)\n"),
    ("train", "own rate ignored", 'getattr(network, "rate", RATE)', "RATE"),
    (
        "train",
        "weights that decay",
        "Adam(network.parameters()",
        "torch.optim.AdamW(network.parameters()",
    ),
    ("train", "a constant rate", " * cosine_decay(step, steps)", ""),
    ("train", "steps counted from 1", "cosine_decay(step,", "cosine_decay(step + 1,"),
    ("train", "losses that are tensors", "loss.item()", "loss.detach()"),
    ("train", "measured before the step", "after_step(step + 1)", "after_step(step)"),
    ("to_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("from_windows", "a reshape alone", "cut.transpose(2, 3)", "cut"),
    ("shift_mask", "the wrong way round", "0.0, -100.0", "-100.0, 0.0"),
    ("shift_mask", "across one pair of edges only", "+ rolled_in(w)", "+ 0 * rolled_in(w)"),
    ("shift_mask", "regions that share a number", "2 * rolled_in(h)", "rolled_in(h)"),
    ("WindowAttention.forward", "scaled by all channels", "sqrt(c // self.heads)", "sqrt(c)"),
    ("WindowAttention.forward", "offsets the wrong way", "[self.table_row]", "[self.table_row.T]"),
    ("WindowAttention.forward", "always two heads", "self.heads", "2"),
    ("WindowAttention.forward", "weights without gradient", "max(-1)", "max(-1).detach()"),
    ("WindowAttention.forward", "softmax over the queries", ".softmax(-1)", ".softmax(-2)"),
    (
        "WindowAttention.forward",
        "a window's mask for all images before the next",
        "mask.repeat(b // len(mask), 1, 1)",
        "mask.repeat_interleave(b // len(mask), 0)",
    ),
    ("SwinBlock.forward", "shift not undone", ".roll((self.shift, self.shift), (1, 2))", ""),
    ("SwinBlock.forward", "shift the wrong way", "-self.shift, -self", "self.shift, self"),
    ("SwinBlock.forward", "no mask", "if self.shift else", "if False else"),
    ("ResidualBlock.forward", "no shortcut", "self.nin_shortcut(x) + ", ""),
    ("ResidualBlock.forward", "a shortcut without gradient", "shortcut(x)", "shortcut(x.detach())"),
    ("ResidualBlock.forward", "one SiLU too few", "silu(self.norm2(y))", "self.norm2(y)"),
    (
        "PixelAttention.forward",
        "keys and values swapped",
        "(query, key, value)",
        "(query, value, key)",
    ),
    ("PixelAttention.forward", "no gradient", "self.norm(x)", "self.norm(x.detach())"),
    ("PixelAttention.forward", "not of the normalized input", "y = self.norm(x)", "y = x"),
    (
        "Codebook.forward",
        "no straight-through gradient",
        "latent + (quantized - latent).detach()",
        "quantized",
    ),
    (
        "Codebook.forward",
        "0.25 on the wrong term",
        "moves_latents + 0.25 * moves_codes",
        "0.25 * moves_latents + moves_codes",
    ),
    ("Codebook.forward", "no stop-gradient", "latent, quantized.detach()", "latent, quantized"),
    ("Codebook.forward", "a term detached", "moves_latents +", "moves_latents.detach() +"),
    (
        "Codebook.forward",
        "largest product for smallest distance",
        "torch.cdist(vectors, self.embedding.weight[None, None])",
        "-(vectors @ self.embedding.weight.T)",
    ),
    ("VQGANPrior.draw", "limited to [0, 1]", "+ 1) / 2", "+ 1).clamp(0, 2) / 2"),
    (
        "VQGANPrior.draw",
        "cropped at the wrong side",
        ": shape[2], : shape[3]",
        "-shape[2] :, -shape[3] :",
    ),
    (
        "VQGANPrior.draw",
        "no codebook",
        "quantized, _, _ = self.vqgan.quantize(latent)",
        "quantized = latent",
    ),
    (
        "VQGANPrior.loss",
        "the latent as target",
        "clean_codes, _, _ = self.vqgan.quantize(",
        "clean_codes = (",
    ),
    ("VQGANPrior.loss", "taught by itself", "self.teacher(", "self.vqgan.encode("),
    ("VQGANPrior.loss", "no L1", " + l1_loss(self.draw(latent, clean.shape), clean)", ""),
    (
        "VQGANPrior.loss",
        "no gradient",
        "latent = self",
        "latent = self.vqgan.encode(self.prepare(degraded)).detach()  # ",
    ),
    ("VQGANPrior.loss", "codes without gradient", "mse_loss(latent,", "mse_loss(latent.detach(),"),
    ("VQGANPrior.loss", "L1 without gradient", "self.draw(latent,", "self.draw(latent.detach(),"),
    (
        "VQGANPrior.loss",
        "the drawn image limited",
        "clean.shape), clean)",
        "clean.shape).clamp(0, 1), clean)",
    ),
)


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """Return the function of a dotted name, such as "ResNet.forward"; KeyError if missing."""
    node = tree
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            raise KeyError(name)
        node = named[-1]
    return node


parse = cache(ast.parse)  # parsing takes longer than most tests


def source_of(name: str, text: str = SOURCE.read_text("utf-8")) -> str:
    """Return the source of a function, as a text, derain.py, defines it."""
    node = find(parse(text), name)
    return textwrap.dedent("\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno]))


def put(monkeypatch, derain, name: str, source: str) -> None:
    """Replace a function or method of the module derain by what `source` defines."""
    *owner, last = name.split(".")
    made = {}
    exec(compile(source, "wrong", "exec"), vars(derain), made)
    monkeypatch.setattr(getattr(derain, owner[0]) if owner else derain, last, made[last])
