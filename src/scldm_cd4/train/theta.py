"""Dispersions by maximum likelihood for given means."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._passes import chunks
from scldm_cd4.nn import VAE
from scldm_cd4.train.latents import decode_means, encode, inference_batch_size
from scldm_cd4.train.loaders import CountBatches

BOUNDS = (1e-3, 1e4)
"""Range of fitted dispersions; the upper end is Poisson for all that matters."""
SCALES = (-3.0, 3.0)
"""Range of the logarithm of the factor that held-out cells give to all of them."""
TRIMMED = 0.05
"""Share of held-out cells, the least likely, that have no say: one count of a thousand in a rare gene outweighs all."""
MAX_CELLS = 5_000
MAX_VALUES = 15_000_000
"""Cells times genes that a fit looks at."""


def fit_theta(x: Tensor, mu: Tensor, n_iterations: int = 15) -> Tensor:
    """Inverse dispersion of each gene that maximises the negative binomial likelihood at given means.

    Newton steps on log theta, with bisection of a bracket where a step leaves it, all genes at once.

    Parameters
    ----------
    x, mu
        Counts and means (n, G).

    Returns
    -------
    (G,) within `BOUNDS`; the upper bound for a gene without counts.
    """
    low, high = (torch.full(x.shape[1:], math.log(b), dtype=torch.float64, device=x.device) for b in BOUNDS)
    u = moment_theta(x, mu).double().clamp(*BOUNDS).log()
    positive = _positive_counts(x)
    for _ in range(n_iterations):
        theta = u.exp()
        first, second = _derivatives(theta, x, mu, *positive)
        slope, curvature = theta * first, theta * theta * second + theta * first
        low, high = torch.where(slope > 0, u, low), torch.where(slope > 0, high, u)
        step = u - slope / curvature
        inside = (curvature < 0) & (step > low) & (step < high)
        u = torch.where(inside, step, 0.5 * (low + high))
    return torch.where(x.sum(0) > 0, u.exp(), BOUNDS[1]).to(mu.dtype)


def _positive_counts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Different pairs of gene and positive count: genes, counts, and how many cells have them (P,) each."""
    row, gene = torch.nonzero(x, as_tuple=True)
    count = x[row, gene].round().long()
    base = int(count.max()) + 1 if len(count) else 1
    pairs, n_cells = torch.unique(gene * base + count, return_counts=True)
    return pairs // base, (pairs % base).double(), n_cells.double()


def _derivatives(
    theta: Tensor, x: Tensor, mu: Tensor, gene: Tensor, count: Tensor, n_cells: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second derivative of the log-likelihood by theta (G,), digammas taken once per gene and count."""
    t = theta.to(mu.dtype)
    total = t + mu
    n = x.shape[0]
    first = n * (theta.log() + 1) - (total.log() + (t + x) / total).sum(0, dtype=torch.float64)
    second = n / theta - (2 / total - (t + x) / total.square()).sum(0, dtype=torch.float64)
    shifted = count + theta[gene]
    for out, f in ((first, torch.digamma), (second, lambda v: torch.polygamma(1, v))):
        out.index_add_(0, gene, n_cells * (f(shifted) - f(theta)[gene]))
    return first, second


def moment_theta(x: Tensor, mu: Tensor) -> Tensor:
    """Inverse dispersion (G,) from sum (x - mu)^2 = sum mu + sum mu^2 / theta; counts and means (n, G)."""
    excess = ((x - mu).square() - mu).sum(0)
    theta = mu.square().sum(0) / excess.clamp(min=1e-12)
    return theta.clamp(*BOUNDS)


def set_theta(vae: VAE, theta: Tensor) -> bool:
    """Write dispersions (G,) into the table of the head; False where the head has none."""
    head: Any = vae.decoder_head
    with torch.no_grad():
        if hasattr(head, "theta"):
            head.theta.weight[1:, 0] = theta.log().to(head.theta.weight)
        elif hasattr(head, "theta_embed"):
            raw = (theta.double() - 1e-5).clamp(min=1e-6)  # inverse of softplus + 1e-5
            head.theta_embed.weight[1:, 0] = (raw + torch.log(-torch.expm1(-raw))).to(head.theta_embed.weight)
        else:
            return False
    return True


def sample_rows(rows: NDArray[np.int64], n_genes: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """At most `MAX_CELLS` of the rows, fewer for wide panels, in order."""
    n = min(len(rows), MAX_CELLS, max(200, MAX_VALUES // n_genes))
    return np.sort(generator.choice(rows, n, replace=False))


def refit_theta(
    vae: VAE, data: CountBatches, generator: np.random.Generator, held_out: CountBatches | None = None
) -> bool:
    """Fit the table of dispersions to the means that the trained networks give for a sample of the training cells.

    Training leaves them for cells of which the encoder saw a part, whose means are less sure; cells are generated from
    latents of whole cells, and the wider spread of the others would bias the mean logarithms of rare genes.

    Parameters
    ----------
    data
        Training cells, not split.
    generator
        Draws the sample.
    held_out
        Cells not trained on. Means of cells that were learned too well lie too near to their counts, which makes
        dispersions too small: all are scaled by the one factor that makes these cells most likely (trimmed likelihood,
        Hadi & Luceno 1997), and are not taken where those of training make them more likely still.

    Returns
    -------
    False where the head has no such table or the new one was not taken.
    """
    head: Any = vae.decoder_head
    table = getattr(head, "theta", getattr(head, "theta_embed", None))
    if table is None:
        return False
    theta = fit_theta(*_targets_and_means(vae, data.take(sample_rows(np.arange(len(data)), vae.n_genes, generator))))
    if held_out is None:
        return set_theta(vae, theta)
    x, mu = _targets_and_means(vae, held_out.take(sample_rows(np.arange(len(held_out)), vae.n_genes, generator)))
    before, likelihood = table.weight.detach().clone(), _log_likelihood(vae, x, mu)
    set_theta(vae, theta * _best_scale(vae, theta, x, mu))
    if _log_likelihood(vae, x, mu) >= likelihood:
        return True
    with torch.no_grad():
        table.weight.copy_(before)
    return False


@torch.no_grad()
def _best_scale(vae: VAE, theta: Tensor, x: Tensor, mu: Tensor) -> float:
    """Return the factor of all inverse dispersions (G,) that makes counts of given means (n, G) most likely."""
    from scipy.optimize import minimize_scalar

    def loss(log_scale: float) -> float:
        return -_trimmed(vae.log_prob(x, mu, theta * math.exp(log_scale)))

    return math.exp(minimize_scalar(loss, bounds=SCALES, method="bounded", options={"xatol": 0.01}).x)


@torch.no_grad()
def _log_likelihood(vae: VAE, x: Tensor, mu: Tensor) -> float:
    head: Any = vae.decoder_head
    return _trimmed(vae.log_prob(x, mu, head.dispersion()))


def _trimmed(log_prob: Tensor) -> float:
    """Sum up log probabilities of counts (n, G) or of cells (n,) without the cells of the lowest."""
    cells = log_prob.double().reshape(len(log_prob), -1).sum(1).sort().values
    return float(cells[min(math.ceil(TRIMMED * len(cells)), len(cells) - 1) :].sum())


def _targets_and_means(vae: VAE, data: CountBatches) -> tuple[Tensor, Tensor]:
    size = inference_batch_size(vae.n_genes)
    latents = encode(vae, data, batch_size=size)
    x = torch.cat([data[index]["target"] for index in chunks(len(data), size)])
    labels = None if data.cells.labels is None else torch.from_numpy(data.cells.labels[data.rows])
    return x, decode_means(vae, latents, x.sum(1, keepdim=True), labels)
