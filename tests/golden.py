"""Reference outputs of published networks, and the rule by which their parameters were filled.

Each array in tests/data was computed by the original implementation of a network.  Its parameters
are not stored: each is a hash of its index, and of its rank among the sorted names.
"""

from pathlib import Path

import torch

DATA = Path(__file__).parent / "data"


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every parameter in place, by rule; buffers stay."""
    with torch.no_grad():
        for rank, (name, parameter) in enumerate(sorted(module.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = 2 * torch.frac(torch.sin(12.9898 * index + 78.233 * rank).abs() * 43758.5453) - 1
            wave = wave.reshape(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(wave * (3 / (parameter.numel() / len(parameter))) ** 0.5)
            else:  # gains near 1, biases near 0
                parameter.copy_(name.endswith("weight") + 0.1 * wave)
    return module


def ramp(*shape: int) -> torch.Tensor:
    """A batch of test images in [0, 1], by rule."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.013 * index ** 1.1)).reshape(shape).float()
