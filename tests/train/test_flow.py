"""Laws of the objective, against formulas written a second time in float64."""

import math

import numpy as np
import pytest
import torch

from train.flow import SigmaLaw, expert_range, flow_loss, interpolate, mass_below, sigma_at, velocity

U = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)


def oracle(distribution: str, shift: float, u: np.ndarray) -> np.ndarray:
    """Sigma of uniform draws, from the papers: logit-normal, and `mode` as f(1 - u) of its decreasing f."""
    if distribution == "LOGIT_NORMAL":
        normal = np.array([np.sqrt(2) * _erfinv(2 * value - 1) for value in u])
        u = 1 / (1 + np.exp(-normal))
    if distribution == "MODE":
        v = 1 - u
        u = 1 - v - 1.29 * (np.cos(np.pi / 2 * v) ** 2 - 1 + v)
    return shift * u / (1 + (shift - 1) * u)


def _erfinv(value: float) -> float:
    low, high = -6.0, 6.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < value else (low, middle)
    return low


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("distribution", ["UNIFORM", "LOGIT_NORMAL", "MODE"])
def test_sigma_follows_the_published_distribution(distribution: str, shift: float) -> None:
    found = sigma_at(SigmaLaw(distribution, shift), U)
    np.testing.assert_allclose(found.numpy(), oracle(distribution, shift, U.numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distribution", ["UNIFORM", "LOGIT_NORMAL", "MODE"])
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_an_experts_draws_are_the_whole_laws_draws_that_fall_into_its_range(distribution: str, expert: str) -> None:
    low, high = expert_range(expert, 0.875)
    part = sigma_at(SigmaLaw(distribution, 3.0, low, high), U)
    whole = sigma_at(SigmaLaw(distribution, 3.0), torch.rand(200_000, dtype=torch.float64))
    kept = whole[(whole >= low) & (whole < high)]
    assert part.min() >= low and part.max() <= high
    quantiles = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(part.quantile(quantiles), kept.quantile(quantiles), atol=0.01, rtol=0)


def test_shares_of_the_experts_are_those_of_the_facts() -> None:
    """Uniform draws above the boundary: 41.7 % at 0.875 and shift 5, 63 % at shift 12, 12.5 % without a shift."""
    for shift, share in ((5.0, 0.4167), (12.0, 0.6316), (1.0, 0.125)):
        assert 1 - mass_below("UNIFORM", shift, 0.875) == pytest.approx(share, abs=1e-4)
    assert mass_below("UNIFORM", 5.0, 0.0) == 0 and mass_below("LOGIT_NORMAL", 5.0, 1.0) == 1


def test_one_step_along_the_velocity_recovers_latent_and_noise() -> None:
    latent, noise = torch.randn(2, 2, 3, 4, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.9, 0.0], dtype=torch.float64)[:2]
    latent, noise = latent[:2], noise[:2]
    noisy, step = interpolate(latent, noise, sigma), sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - step * velocity(latent, noise), latent)
    torch.testing.assert_close(noisy + (1 - step) * velocity(latent, noise), noise)


def test_losses_are_their_formulas() -> None:
    error = torch.randn(3, 2, 2, 4, 4) * 2
    wide = error.double().numpy()
    huber = np.where(np.abs(wide) <= 1, wide**2, 2 * np.abs(wide) - 1)
    np.testing.assert_allclose(flow_loss(error).numpy(), (wide**2).mean((1, 2, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(flow_loss(error, "HUBER").numpy(), huber.mean((1, 2, 3, 4)), rtol=1e-6)
    assert flow_loss(error.bfloat16()).dtype == torch.float32
