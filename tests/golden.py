"""Reference outputs of published networks, and the rule by which their parameters were filled.

Each array in tests/data was computed by the original implementation of a network.  Its parameters
are not stored: each is a hash of its index, and of its rank among the sorted published names.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import Module, Parameter

DATA = Path(__file__).parent / "data"

# The published name of each part of SwinIR that derain.py calls something else.
PUBLISHED = {
    "first": "conv_first",
    "norm_first": "patch_embed.norm",
    "groups": "layers",
    "blocks": "residual_group.blocks",
    "norm": "norm1",
    "attention": "attn",
    "position_bias": "relative_position_bias_table",
    "project": "proj",
    "perceptron_0": "norm2",
    "perceptron_1": "mlp.fc1",
    "perceptron_3": "mlp.fc2",
    "norm_last": "norm",
    "after_groups": "conv_after_body",
    "last": "conv_last",
}


def agree(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Check that two results are equal, and that they depend on the inputs in the same way."""

    def gradient(output):
        return torch.cat([part.flatten() for part in grad(output.square().sum(), inputs)])

    for one, other in ((found, expected), (gradient(found), gradient(expected))):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def swinir_names(module: Module) -> dict[str, Parameter]:
    """Return the parameters of derain.SwinIR under their published names."""
    published = {}
    for name, parameter in module.named_parameters():
        parts = name.replace("perceptron.", "perceptron_").split(".")
        published[".".join(PUBLISHED.get(part, part) for part in parts)] = parameter
    return published


def fill(module: Module, names: dict[str, Parameter] | None = None) -> Module:
    """Overwrite every parameter in place, by rule; buffers stay.

    names: {published name: parameter}, for a module whose parameters have other names.
    """
    parameters = names or dict(module.named_parameters())
    with torch.no_grad():
        for rank, name in enumerate(sorted(parameters)):
            parameter = parameters[name]
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            hashed = torch.sin(12.9898 * index + 78.233 * rank).abs() * 43758.5453
            wave = (2 * torch.frac(hashed) - 1).view_as(parameter)
            if parameter.ndim > 1:
                parameter.copy_(wave * (3 / parameter[0].numel()) ** 0.5)
            else:  # gains near 1, biases near 0
                parameter.copy_(name.endswith("weight") + 0.1 * wave)
    return module


def ramp(*shape: int) -> torch.Tensor:
    """Return a batch of test images in [0, 1], by rule."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.013 * index**1.1)).reshape(shape).float()
