"""Encoding from expressed genes alone, beside encoding from all genes.

    python -m benchmarks encoding --preset small            # random weights, simulated counts
    python -m benchmarks encoding --preset cd4 --expressed 500 --cells 8
    python -m benchmarks encoding --model my_model --data cells.h5ad --cells 200

Three ways: every gene of every cell is projected (``all genes``); each pair of gene and count once (``pairs``, what
`VAE.encode` does on a CPU); expressed genes alone (`SparseEncoder`). The limit is the ratio of the multiplications of
the first and the last way.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measure import cpu_seconds, ratio, report
from scipy import sparse

from scldm_cd4.config import PRESETS, VAEConfig
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.nn import VAE
from scldm_cd4.nn.sparse import SparseEncoder

PANEL = {"tiny": 1000, "small": 2000, "cd4": 3699}
EXPRESSED = {"tiny": 130, "small": 260, "cd4": 500}
GOAL = {"tiny": 1.5, "small": 1.5, "cd4": 1.25}
MAX_ERROR = 1e-6


def simulated(n_cells: int, n_genes: int, n_expressed: int, seed: int = 0) -> sparse.csr_matrix:
    """Draw counts of `n_expressed` genes in each cell, most of them small."""
    rng = np.random.default_rng(seed)
    columns = np.concatenate([np.sort(rng.choice(n_genes, n_expressed, replace=False)) for _ in range(n_cells)])
    counts = 1 + rng.negative_binomial(0.7, 0.35, n_cells * n_expressed)
    starts = np.arange(n_cells + 1) * n_expressed
    return sparse.csr_matrix((counts.astype(np.float32), columns, starts), shape=(n_cells, n_genes))


def plain_encode(vae: VAE, counts: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    """Project every gene of every cell: counts and genes (B, G) -> latents."""
    keys_values = vae.encoder.ca_layer.keys_values(vae.input_layer(counts, genes))
    mask = (genes != 0)[:, None, None, :] if vae.config.mask_padding else None
    return vae.latent(vae.encoder.tokens(keys_values, mask), counts, genes)


def multiplications(config: VAEConfig, n_genes: int, n_attended: int) -> float:
    """Multiplications to encode a cell: keys and values of `n_genes`, attention to `n_attended`, the blocks."""
    e, s = config.width, config.n_tokens
    hidden = config.multiple_of * -(-int(8 * e / 3) // config.multiple_of)
    blocks = config.n_layers * s * (4 * e * e + 3 * e * hidden + 2 * s * e)
    return n_genes * 2 * e * e + n_attended * 2 * s * e + s * (2 * e * e + 3 * e * hidden) + blocks


def all_of(vae: VAE, counts: sparse.csr_matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Return counts and numbers of all genes (B, G), those without counts masked where the network masks them."""
    dense = torch.from_numpy(counts.toarray())
    genes = torch.arange(1, vae.n_genes + 1).expand(len(dense), -1)
    return dense, genes if vae.config.encode == "all" else torch.where(dense > 0, genes, 0)


@torch.no_grad()
def compare(name: str, vae: VAE, counts: sparse.csr_matrix, *, goal: float, rounds: int) -> dict[str, Any]:
    """Time the three ways on the same cells."""
    genes, values = (torch.from_numpy(x) for x in expressed_batch(counts))
    whole, encoder, n = all_of(vae, counts), SparseEncoder(vae), counts.shape[0]
    ways = {
        "all genes": lambda: plain_encode(vae, *whole),
        "pairs": lambda: vae.encode(*whole),
        "expressed": lambda: encoder(values, genes),
    }
    exact, single = plain_encode(vae.double(), whole[0].double(), whole[1]), plain_encode(vae.float(), *whole)
    errors = [
        float((z.double() - to.double()).norm() / to.double().norm())
        for z, to in ((ways["expressed"](), single), (ways["expressed"](), exact), (single, exact))
    ]
    times = cpu_seconds(ways, rounds=rounds)
    mean = counts.nnz / n
    limit = multiplications(vae.config, vae.n_genes, vae.n_genes) / multiplications(
        vae.config, int(mean), 2 * int(mean)
    )
    value = ratio(times, "all genes", "expressed")
    facts = {"over_pairs": ratio(times, "pairs", "expressed"), "limit": limit, "fraction_of_limit": value / limit}
    facts |= {"genes": vae.n_genes}
    facts |= {"expressed": mean, "cells": n, "relative_error": errors[0], "error_within_bound": errors[0] <= MAX_ERROR}
    facts |= {"error_to_float64": errors[1], "error_of_all_genes_to_float64": errors[2]}
    return report(f"exact sparse encoding, {name}", times, value=value, goal=goal, per=n, **facts)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PANEL), default="small")
    parser.add_argument("--expressed", type=int, default=None, help="genes with counts in each simulated cell")
    parser.add_argument("--cells", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--model", type=Path, default=None, help="folder of a trained model, in place of random weights"
    )
    parser.add_argument("--data", type=Path, default=None, help="h5ad of cells for --model")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.model is None:
        base = PRESETS[options.preset].vae
        config = replace(base, encode="all", mask_padding=False, label_rank=0)
        generator = np.random.default_rng(0)
        torch.manual_seed(int(generator.integers(2**31)))
        vae = VAE(config, PANEL[options.preset]).eval()
        n = options.cells or {"cd4": 8}.get(options.preset, 100)
        counts = simulated(n, vae.n_genes, options.expressed or EXPRESSED[options.preset])
        compare(options.preset, vae, counts, goal=GOAL[options.preset], rounds=options.rounds)
        return
    import anndata as ad

    from scldm_cd4 import CD4Model
    from scldm_cd4.data.cells import CellData
    from scldm_cd4.registry import Registry

    model = CD4Model.load(options.model)
    cells = CellData.from_adata(ad.read_h5ad(options.data), Registry.from_dict(model.registry), labels=False)
    counts = cells.counts(np.arange(min(options.cells or 100, cells.n_cells)))
    own = model._state.vae
    compare(f"trained {options.model.name}", own, counts, goal=1.5, rounds=options.rounds)
    every = VAE(replace(own.config, encode="all", mask_padding=False, label_rank=0), own.n_genes).eval()
    every.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("label_effects")})
    compare(f"trained {options.model.name}, zeros attended to", every, counts, goal=1.5, rounds=options.rounds)


if __name__ == "__main__":
    main()
