"""A mixture of round Gaussians: latents that are not Gaussian, and still with a known best prediction.

For x drawn from N(mean_k, std_k^2 I) with probability weight_k, z = t x + (1 - t) eps comes from component k with

    p(k | z) proportional to weight_k N(z; t mean_k, V_k I),   V_k = t^2 std_k^2 + (1 - t)^2                 (1)
    E[x | z, k]   = mean_k + t std_k^2 / V_k (z - t mean_k)                                                  (2)
    E[eps | z, k] = (1 - t) / V_k (z - t mean_k)                                                             (3)

and the best predictions of x and eps, hence of every target, are the means of (2) and (3) over (1).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """A mixture: `means` (k, d), `stds` (k,) above 0 and `weights` (k,) that sum to 1."""

    means: Float[Tensor, "k d"]
    stds: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Draw independent points."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.stds[component, None] * noise

    def expected(
        self, z: Float[Tensor, "n d"], t: float | Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Return E[x | z] and E[eps | z], equations (1) to (3); the exact velocity is their difference."""
        time = torch.as_tensor(t, dtype=z.dtype, device=z.device).reshape(-1, 1)
        variance = (time * self.stds) ** 2 + (1 - time) ** 2  # (n or 1, k)
        offset = z[:, None] - time[..., None] * self.means  # (n, k, d)
        log_density = -offset.square().sum(2) / (2 * variance) - self.means.shape[1] / 2 * variance.log()
        share = torch.softmax(self.weights.log() + log_density, dim=1)[..., None]
        x = self.means + (time * self.stds**2 / variance)[..., None] * offset
        eps = ((1 - time) / variance)[..., None] * offset
        return (share * x).sum(1), (share * eps).sum(1)
