"""Count distributions in the (mean, dispersion) form: likelihood and sampling."""

import numpy as np
import torch
from torch import Tensor

EPS = 1e-8

LARGE_THETA = 50.0
"""Above this inverse dispersion, differences of lnG are taken by Stirling's series."""

FIRST_COUNTS, MAX_SUMMED = 4, 2**20
"""Counts whose probabilities are summed at once, twice as many each time; values that are laid out for it."""


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Negative binomial log-likelihood, element by element, in nats.

    log NB(x; mu, theta) = theta (ln(theta + e) - ln(theta + mu + e)) + x (ln(mu + e) - ln(theta + mu + e))
    + lnG(x + theta) - lnG(theta) - lnG(x + 1), variance mu + mu^2 / theta, e = 1e-8 (Lopez et al. 2018,
    10.1038/s41592-018-0229-2), written so that it does not cancel at large theta.

    Parameters
    ----------
    x
        Counts.
    mu, theta
        Mean and inverse dispersion, broadcastable to `x`.
    """
    log_total = torch.log(theta + mu + EPS)
    return (
        -theta * torch.log1p(mu / (theta + EPS))
        + x * (torch.log(mu + EPS) - log_total)
        + _log_rising(theta, x)
        - torch.lgamma(x + 1)
    )


def _log_rising(theta: Tensor, x: Tensor) -> Tensor:
    """Return lnG(x + theta) - lnG(theta) without the cancellation that single precision suffers at large theta.

    There Stirling's series gives (theta - 1/2) ln(1 + x / theta) + x ln(theta + x) - x + 1 / (12 (theta + x)) - 1 / (12
    theta). Left as a difference of two large numbers, its rounding would reward dispersions that grow without bound.
    """
    small = theta.clamp(max=LARGE_THETA)
    direct = torch.lgamma(x + small) - torch.lgamma(small)
    total = theta + x
    series = (theta - 0.5) * torch.log1p(x / theta) + x * (torch.log(total) - 1) + (1 / total - 1 / theta) / 12
    return torch.where(theta > LARGE_THETA, series, direct)


def poisson_log_prob(x: Tensor, mu: Tensor) -> Tensor:
    """Poisson log-likelihood, element by element, in nats: x ln(mu + e) - mu - lnG(x + 1)."""
    return x * torch.log(mu + EPS) - mu - torch.lgamma(x + 1)


def nb_quantile(u: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Smallest count k with NB(k; mu, theta) cumulative probability of at least `u`, on the device of the tensors.

    One uniform number makes one count, so that a small change of `mu` moves few counts and cells that share their
    uniforms share their sampling noise. Probabilities are summed from 0 upward by
    p(k+1) = p(k) (k + theta) / (k + 1) * mu / (mu + theta); means whose p(0) underflows go through scipy.

    Parameters
    ----------
    u
        Uniform numbers in [0, 1), float64 (n, G).
    mu
        Means, float64 (n, G).
    theta
        Inverse dispersions, float64, broadcastable to `mu`; infinite is the Poisson limit.

    Returns
    -------
    Whole numbers as float32, shape (n, G).
    """
    poisson = torch.isinf(theta)
    finite = torch.where(poisson, 1.0, theta)
    log_p0 = torch.where(poisson, -mu, -finite * torch.log1p(mu / finite))
    p = torch.exp(log_p0).flatten()
    out = torch.zeros(mu.numel(), dtype=torch.float32, device=mu.device)
    active = torch.nonzero(u.flatten() >= p)[:, 0]
    far = log_p0.flatten()[active] < -600.0
    theta = theta.expand_as(mu).flatten()
    if far.any():
        hard = active[far]
        out[hard] = _scipy_quantile(u.flatten()[hard], mu.flatten()[hard], theta[hard])
        active = active[~far]
    # the running state of the elements whose cumulative probability is still below u; columns are counts from k + 1
    u, m, th, p = (x.flatten()[active, None] for x in (u, mu, theta, p))
    infinite = torch.isinf(th)
    ratio = torch.where(infinite, m, m / (m + th))
    start, slope = torch.where(infinite, 1.0, th), torch.where(infinite, 0.0, 1.0)
    cumulative, k, width = p, 0, FIRST_COUNTS
    while n := len(active):
        width = max(1, min(width, MAX_SUMMED // n))
        j = torch.arange(k, k + width, dtype=p.dtype, device=p.device)
        # in the order of one after the other, so that the last bits do not depend on the width
        p = torch.cumprod(torch.cat([p, (start + slope * j) / (j + 1) * ratio], 1), 1)[:, 1:]
        cumulative = torch.cumsum(torch.cat([cumulative, p], 1), 1)[:, 1:]
        # p below the rounding of 1 cannot move the sum any more: u lies beyond what doubles resolve
        done = (u < cumulative) | ((p < 1e-18) & (j + 1 > m))
        ended = done[:, -1]  # what is done at a count is done at the next
        out[active[ended]] = (k + 1 + done.int().argmax(1)[ended]).float()
        keep = torch.nonzero(~ended)[:, 0]
        active, u, p, cumulative = active[keep], u[keep], p[keep, -1:], cumulative[keep, -1:]
        ratio, start, slope, m = ratio[keep], start[keep], slope[keep], m[keep]
        k, width = k + width, 2 * width
    return out.view(mu.shape)


def _scipy_quantile(u: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    from scipy import stats

    q, m, th = (x.cpu().numpy() for x in (u, mu, theta))
    poisson = np.isinf(th)
    out = np.empty_like(m)
    out[poisson] = stats.poisson.ppf(q[poisson], m[poisson])
    nb = ~poisson
    out[nb] = stats.nbinom.ppf(q[nb], th[nb], th[nb] / (th[nb] + m[nb]))
    return torch.from_numpy(np.maximum(out, 0.0)).to(mu.device, torch.float32)
