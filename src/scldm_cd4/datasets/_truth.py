"""Draw the known truth behind the simulated data: genes, contexts, perturbation effects and their interactions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4.datasets._genes import GeneFact, read_gene_facts
from scldm_cd4.datasets._regulators import KNOWN_REGULATORS, PROGRAMMES, REACH_SHARES

Array = NDArray[np.float64]

_LIMIT = 4.0
"""Largest planted absolute log2 fold change of a gene other than the target."""
_TIME_SD = (0.92, 0.77)
"""Spread over genes of the log2 fold changes at 8 and 48 hours (base means of Zhu, Dann et al. 2025)."""
_TIME_CORRELATION = 0.6
_TCR_PATTERN = (-1.0, 0.7, 0.3)
"""How the effect of a T cell receptor gene departs from its mean at rest, 8 and 48 hours."""


@dataclass(frozen=True)
class GeneTruth:
    """What is planted for each gene; arrays over genes, all in log2 except `theta`."""

    symbols: list[str]
    gene_ids: list[str]
    base: Array
    theta: Array
    activation: Array
    timepoint: Array
    donor: Array


def choose_panel(n_genes: int, targets: list[str]) -> list[str]:
    """Return gene names in alphabetical order: targets, programme genes, other real genes, then made-up names."""
    facts = read_gene_facts()
    longest = max(map(len, PROGRAMMES.values()))
    programmes = [genes[i] for i in range(longest) for genes in PROGRAMMES.values() if i < len(genes)]
    made_up = [f"SIM{i:05d}" for i in range(1, n_genes + 1)]
    return sorted(list(dict.fromkeys([*targets, *programmes, *facts, *made_up]))[:n_genes])


def choose_targets(n_perturbations: int, no_effect_share: float) -> tuple[list[str], list[str]]:
    """Return target names and their kinds: ``known``, ``other`` (effects on genes drawn at random) or ``none``.

    Targets of the last two kinds are plainly expressed genes without a part in a programme.
    """
    n_none = round(no_effect_share * n_perturbations)
    n_known = min(len(KNOWN_REGULATORS), round(0.6 * n_perturbations), n_perturbations - n_none)
    n_other = n_perturbations - n_none - n_known
    programme = {gene for genes in PROGRAMMES.values() for gene in genes}
    named = {*KNOWN_REGULATORS, *programme}
    plain = [gene for gene, fact in reversed(read_gene_facts().items()) if gene not in named and fact.base >= 6]
    plain += [f"SIM{i:05d}" for i in range(1, n_other + n_none + 1)]
    names = [*list(KNOWN_REGULATORS)[:n_known], *plain[: n_other + n_none]]
    return names, ["known"] * n_known + ["other"] * n_other + ["none"] * n_none


def draw_genes(panel: list[str], n_donors: int, n_timepoints: int, rng: np.random.Generator) -> GeneTruth:
    """Draw what is not typed in: expression of made-up genes, unknown changes, dispersions, donor effects."""
    facts = read_gene_facts()
    n = len(panel)
    blank = GeneFact("", "", np.nan, None, None)
    known = [facts.get(gene, blank) for gene in panel]
    base = np.array([fact.base for fact in known])
    base = np.where(np.isnan(base), rng.normal(3.5, 2.0, n), base)
    noise = rng.standard_normal((n, 2))
    noise[:, 1] = _TIME_CORRELATION * noise[:, 0] + np.sqrt(1 - _TIME_CORRELATION**2) * noise[:, 1]
    typed = np.array([(fact.stim_8h, fact.stim_48h) for fact in known], dtype=np.float64)
    stimulated = np.where(np.isnan(typed), noise * _TIME_SD, typed)
    timepoint = np.column_stack([np.zeros(n), stimulated])
    return GeneTruth(
        symbols=panel,
        gene_ids=[fact.gene_id for fact in known],
        base=base,
        theta=np.exp(rng.normal(np.log(4.1), 0.8, n)).clip(0.3, 50),
        activation=0.5 * stimulated.mean(axis=1),
        timepoint=timepoint[:, :n_timepoints],
        donor=rng.normal(0.0, 0.2, (n, n_donors)) * (n_donors > 1),
    )


def draw_effects(
    panel: list[str], targets: list[str], kinds: list[str], scale: float, rng: np.random.Generator
) -> Array:
    """Draw the main effects, genes x perturbations, in log2; the target's own knock-down is not scaled."""
    row = {gene: i for i, gene in enumerate(panel)}
    programmes = {name: [row[gene] for gene in genes if gene in row] for name, genes in PROGRAMMES.items()}
    size = np.exp(rng.normal(np.log(0.9), 0.35, len(panel)))
    effects = np.zeros((len(panel), len(targets)))
    for p in np.flatnonzero(np.array(kinds) == "known"):
        for name, weight in KNOWN_REGULATORS[targets[p]].items():
            genes = programmes[name]
            effects[genes, p] += weight * size[genes] * np.exp(rng.normal(0.0, 0.2, len(genes)))
    others = np.flatnonzero(np.array(kinds) == "other")
    for p, n_changed in zip(others, _draw_reach(np.count_nonzero(effects, axis=0), len(others), rng), strict=True):
        changed = rng.choice(len(panel), min(n_changed, int(0.4 * len(panel))), replace=False)
        sign = np.where(rng.random(len(changed)) < 0.55, 1.0, -1.0)
        effects[changed, p] = sign * np.exp(rng.normal(np.log(0.8), 0.45, len(changed)))
    effects = (scale * effects).clip(-_LIMIT, _LIMIT)
    on_target = rng.normal(-2.9, 0.6, len(targets)).clip(-4.5, -1.2)
    effects[[row[target] for target in targets], np.arange(len(targets))] = on_target
    return effects


def _draw_reach(known: NDArray[np.int64], n_others: int, rng: np.random.Generator) -> list[int]:
    """Draw how many genes the other perturbations change, so that all together have the published shares.

    `known` holds the number of genes that each perturbation, of all of them, changes already.
    """
    left = [round(share * len(known)) - int((known > bound).sum()) for bound, share in REACH_SHARES]
    reach = []
    for rank in range(n_others):
        tier = sum(rank >= places for places in left)
        low, high = ((501, 2000), (76, 500), (11, 75), (1, 10))[tier]
        reach.append(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
    return reach


def draw_interactions(
    effects: Array,
    targets: list[str],
    panel: list[str],
    shape: tuple[int, int],
    share: float,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw what each context adds to the main effects: perturbations * donors * time points x genes, in log2.

    Each gene's effect is scaled by a factor that varies over contexts around one, so that the additions sum to zero
    over contexts and hold exactly `share` of the perturbation's variance. The factor is made of a part that all genes
    of a time point share, one that they share in a donor, and one of the gene's own. The knock-down of the target
    itself is the same everywhere.
    """
    n_donors, n_timepoints = shape
    n_contexts = n_donors * n_timepoints
    added = sparse.lil_matrix((len(targets) * n_contexts, len(panel)))
    if share == 0 or n_contexts == 1:
        return sparse.csr_matrix(added)
    row = {gene: i for i, gene in enumerate(panel)}
    for p, target in enumerate(targets):
        main = effects[:, p].copy()
        main[row[target]] = 0.0
        genes = np.flatnonzero(main)
        if len(genes) == 0:
            continue
        timepoint = rng.standard_normal(n_timepoints)
        if "tcr" in KNOWN_REGULATORS.get(target, ()):
            timepoint = np.array(_TCR_PATTERN[:n_timepoints])
        donor = rng.standard_normal(n_donors)
        own = rng.standard_normal((len(genes), n_donors, n_timepoints))
        factor = (0.8 * timepoint + 0.5 * donor[:, None] + 0.6 * own).reshape(len(genes), n_contexts)
        extra = main[genes, None] * (factor - factor.mean(axis=1, keepdims=True))
        wanted = share / (1 - share) * n_contexts * np.square(main).sum()
        rows = np.arange(p * n_contexts, (p + 1) * n_contexts)
        added[np.ix_(rows, genes)] = extra.T * np.sqrt(wanted / np.square(extra).sum())
    return sparse.csr_matrix(added)
