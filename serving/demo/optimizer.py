"""Muon (Jordan et al. 2024) for the matrices, Adam for embeddings, head, routers and norms, over one flat table of weights.

Muon replaces a matrix's momentum by the nearest orthogonal one, found with five Newton-Schulz steps; stacked weights
take their matrices through it in one batch. State is a table of tensors, so that a run can be saved and resumed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from serving.demo.trainable import QUANTISED

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """bf16 [..., out, in] of the same row and column space with singular values near 1."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal


class Optimizer:
    """Updates fp32 `weights` in place. `state` holds `<name>.m` for every weight and `<name>.v` for those under Adam."""

    def __init__(self, weights: Mapping[str, Tensor], *, muon_rate: float = 0.02, adam_rate: float = 2e-3) -> None:
        self._weights = weights
        self._rates = {name: muon_rate if name in QUANTISED else adam_rate for name in weights}
        self.state = {f"{name}.m": torch.zeros_like(weight) for name, weight in weights.items()}
        self.state |= {
            f"{name}.v": torch.zeros_like(weight) for name, weight in weights.items() if name not in QUANTISED
        }

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], count: int, rate: float) -> None:
        """Update number `count` (from 1), with every learning rate times `rate`."""
        for name, weight in self._weights.items():
            gradient, factor = gradients[name].float(), self._rates[name] * rate
            if name in QUANTISED:
                self._muon(name, weight, gradient, factor)
            else:
                self._adam(name, weight, gradient, factor, count)

    def _muon(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> None:
        momentum = self.state[f"{name}.m"].lerp_(gradient, 0.05)
        update = orthogonalise(gradient.lerp(momentum, 0.95))
        tallness = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
        weight.mul_(1 - 0.01 * rate).add_(update.float(), alpha=-rate * tallness)

    def _adam(self, name: str, weight: Tensor, gradient: Tensor, rate: float, count: int) -> None:
        mean = self.state[f"{name}.m"].lerp_(gradient, 0.1)
        square = self.state[f"{name}.v"].lerp_(gradient.square(), 0.02)
        corrected = (square / (1 - 0.98**count)).sqrt_().add_(1e-10)
        weight.addcdiv_(mean / (1 - 0.9**count), corrected, value=-rate)
