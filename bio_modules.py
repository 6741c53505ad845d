"""Brain-inspired blocks: one class each, chosen by a flag of GPTConfig through the slot dicts in model.py."""
import torch
import torch.nn as nn


class Oscillating(nn.Module):
    """An activation whose units oscillate: sin(w*x + phi) * tanh(x) + b, with w, phi and b learned per unit.

    (..., units) -> (..., units). w ~ N(1, 0.1), phi ~ N(0, 0.1), b = 0; vectors, so no weight decay.
    One such neuron can separate XOR (2108.12943; so can one GELU, tests/test_switches.py shows both).
    """

    def __init__(self, units):
        super().__init__()
        self.w, self.phi, self.b = (nn.Parameter(torch.empty(units)) for _ in range(3))

    def init_weights(self, normal_):
        normal_(self.w, 0.1)
        self.w.add_(1.0)
        normal_(self.phi, 0.1)
        nn.init.zeros_(self.b)

    def forward(self, x):
        w, phi, b = (p.to(x.dtype) for p in (self.w, self.phi, self.b))
        return torch.sin(w * x + phi) * torch.tanh(x) + b
