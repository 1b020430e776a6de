"""A diffusion problem whose solution is known: a Gaussian mixture with exact scores, float64.

The data are a mixture of isotropic Gaussians N(mu_k, s_k^2); the condition selects some components.
At time t component k is N(alpha mu_k, alpha^2 s_k^2 + sigma^2), so the noise prediction

    eps(x, t) = -sigma grad log p_t(x)

is exact for both branches, and the probability-flow ODE in half log-SNR lambda,

    dx/dlambda = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps = sigma^2 x - sigma eps,

can be integrated to any accuracy (alpha' = alpha sigma^2, sigma' = -sigma alpha^2 for VP
schedules).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp

from thg_engine.schedule import Point


def vp_point(index: float, lambda_t: float) -> Point:
    """The VP point at half log-SNR ``lambda_t``; the denoiser is told ``index``."""
    alpha = math.sqrt(1 / (1 + math.exp(-2 * lambda_t)))
    sigma = math.sqrt(1 / (1 + math.exp(2 * lambda_t)))
    return Point(index, alpha, sigma)


def vp_points(num_steps: int, start: float = -3.0, stop: float = 3.0) -> tuple[Point, ...]:
    """N + 1 points, uniform in lambda; timesteps are their indices, which float32 holds exactly."""
    return tuple(
        vp_point(i, value) for i, value in enumerate(np.linspace(start, stop, num_steps + 1))
    )


def flow_points(num_steps: int, start: float = 0.95, stop: float = 0.05) -> tuple[Point, ...]:
    """The same for flow matching: alpha = 1 - sigma, uniform in sigma."""
    sigmas = np.linspace(start, stop, num_steps + 1)
    return tuple(Point(i, 1 - s, s) for i, s in enumerate(map(float, sigmas)))


@dataclass
class Mixture:
    """Components in d dimensions; ``cond`` rows are weights over the components."""

    means: torch.Tensor
    stds: torch.Tensor

    @classmethod
    def random(cls, seed: int, components: int = 4, dim: int = 3) -> Mixture:
        generator = torch.Generator().manual_seed(seed)
        means = 1.5 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
        stds = 0.4 + 0.6 * torch.rand(components, generator=generator, dtype=torch.float64)
        return cls(means, stds)

    def weights(self, chosen: list[int], batch: int) -> torch.Tensor:
        """Conditioning that keeps the ``chosen`` components, shape ``(batch, K)``."""
        row = torch.zeros(len(self.stds), dtype=torch.float64)
        row[chosen] = 1 / len(chosen)
        return row.expand(batch, -1).clone()

    def eps(self, x: torch.Tensor, point: Point, weights: torch.Tensor) -> torch.Tensor:
        """Exact noise prediction, shape of ``x`` (B, d)."""
        alpha, sigma = point.alpha_t, point.sigma_t
        variance = alpha**2 * self.stds**2 + sigma**2
        offset = x[:, None, :] - alpha * self.means
        log_p = -0.5 * (offset**2).sum(-1) / variance - 0.5 * x.shape[1] * variance.log()
        share = torch.softmax(log_p + weights.log(), dim=1)
        return sigma * (share[..., None] * offset / variance[:, None]).sum(1)

    def output(self, x, point: Point, weights, prediction_type: str) -> torch.Tensor:
        """What a model of ``prediction_type`` returns."""
        eps = self.eps(x, point, weights)
        x0 = (x - point.sigma_t * eps) / point.alpha_t
        return {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": point.alpha_t * eps - point.sigma_t * x0,
            "flow_prediction": eps - x0,
        }[prediction_type]

    def denoiser(self, points, prediction_type: str = "epsilon"):
        """A denoiser over ``points``, which counts the rows it evaluates in ``.rows``."""

        def call(model_input, timestep, conditioning):
            call.rows += len(model_input)
            assert len(set(timestep.tolist())) == 1
            point = points[int(timestep[0])]
            return self.output(model_input, point, conditioning, prediction_type)

        call.rows = 0
        return call

    def solve(self, x, points, cond, uncond, guidance_scale: float) -> torch.Tensor:
        """Guided ODE from the first to the last of ``points`` by DOP853, relative error 1e-11."""

        def field(lambda_t, flat):
            state = torch.from_numpy(flat.reshape(x.shape))
            point = vp_point(0, lambda_t)
            e_cond, e_uncond = self.eps(state, point, cond), self.eps(state, point, uncond)
            eps = e_uncond + guidance_scale * (e_cond - e_uncond)
            return (point.sigma_t**2 * state - point.sigma_t * eps).numpy().ravel()

        span = (points[0].lambda_t, points[-1].lambda_t)
        solution = solve_ivp(field, span, x.numpy().ravel(), "DOP853", rtol=1e-11, atol=1e-12)
        return torch.from_numpy(solution.y[:, -1].reshape(x.shape))
