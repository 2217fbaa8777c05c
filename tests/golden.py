"""Comparisons that say what differs and where, and reference outputs of published networks.

Each array in tests/data was computed by the original implementation of a network.  Its parameters
are not stored: each is a hash of its index, and of its rank among the sorted published names.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"

# The published name of each part of SwinIR that derain.py calls something else.
PUBLISHED = dict(
    first="conv_first",
    norm_first="patch_embed.norm",
    groups="layers",
    blocks="residual_group.blocks",
    norm="norm1",
    attention="attn",
    position_bias="relative_position_bias_table",
    project="proj",
    perceptron_0="norm2",
    perceptron_1="mlp.fc1",
    perceptron_3="mlp.fc2",
    norm_last="norm",
    after_groups="conv_after_body",
    last="conv_last",
)


def apply(function: Callable, *arguments):
    """Return function(*arguments), or fail if it changes one of the tensors that it is given."""
    before = copy.deepcopy(arguments)
    result = function(*arguments)
    for i, (now, then) in enumerate(zip(arguments, before), start=1):
        if isinstance(now, Tensor) and not torch.equal(now, then):
            name = getattr(function, "__name__", type(function).__name__)
            raise AssertionError(f"{name} changes its argument number {i}")
    return result


def check(function: Callable, *arguments, expected, tolerance: float = 1e-5) -> None:
    """Check function(*arguments), and that these stay as they are."""
    __tracebackhide__ = True
    near(function.__name__, apply(function, *arguments), expected, tolerance)


def near(what: str, found, expected, tolerance: float = 1e-5) -> None:
    """Check that two arrays are equal; or else say by how much they differ at most, and where."""
    __tracebackhide__ = True
    found = torch.as_tensor(found).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
        raise AssertionError(f"{what} has the shape {shapes}")
    equal = (found == expected) | (found.isnan() & expected.isnan())  # also if infinite
    difference = torch.where(equal, 0, (found - expected).abs())
    if not (difference <= tolerance).all():
        place = tuple(map(int, np.unravel_index(int(difference.argmax()), difference.shape)))
        where = f"at {place} it" if place else "it"
        numbers = f"{found[place]:.6g} in place of {expected[place]:.6g}"
        raise AssertionError(
            f"{what} differs by up to {difference[place]:.2g}: {where} is {numbers}"
        )


def agree(name: str, found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """Check that two results are equal, and that they depend on the inputs in the same way."""
    __tracebackhide__ = True
    near(name, found, expected, 1e-4 * expected.abs().max().item())

    def gradients(output):
        loss = output.square().sum()
        return torch.autograd.grad(
            loss, list(inputs.values()), retain_graph=True, materialize_grads=True
        )

    right = gradients(expected)
    tolerance = 1e-4 * max(gradient.abs().max().item() for gradient in right)
    for part, one, other in zip(inputs, gradients(found), right):
        near(f"{name}: the gradient of {part}", one, other, tolerance)


def agree_forward(layer: nn.Module, expected: Tensor, image: Tensor, *others) -> None:
    """Check layer(image, *others), and the gradients of the image and of the parameters."""
    __tracebackhide__ = True
    inputs = {"its input": image, **dict(layer.named_parameters())}
    agree(f"{type(layer).__name__}.forward", apply(layer, image, *others), expected, inputs)


def swinir_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of derain.SwinIR under their published names."""
    published = {}
    for name, parameter in module.named_parameters():
        parts = name.replace("perceptron.", "perceptron_").split(".")
        published[".".join(PUBLISHED.get(part, part) for part in parts)] = parameter
    return published


def fill(module: nn.Module, names: dict[str, nn.Parameter] | None = None) -> nn.Module:
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


def ramp(*shape: int) -> Tensor:
    """Return a batch of test images in [0, 1], by rule."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.013 * index**1.1)).reshape(shape).float()
