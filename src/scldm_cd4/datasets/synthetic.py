"""Simulated CD4+ T cell Perturb-seq with known truth, calibrated on published figures."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4.datasets._regulators import DONORS, LOG_LIBRARY, PROGRAMMES, TIMEPOINTS
from scldm_cd4.datasets._truth import (
    Array,
    GeneTruth,
    choose_panel,
    choose_targets,
    draw_effects,
    draw_genes,
    draw_interactions,
)

CONTROL = "NTC"
_ACTIVATION_SD = 0.4
_CHUNK = 1024


def synthetic_cd4(
    n_cells: int = 6000,
    n_genes: int = 500,
    *,
    n_perturbations: int = 12,
    n_donors: int = 4,
    n_timepoints: int = 3,
    control_share: float = 0.2,
    no_effect_share: float = 0.3,
    effect_scale: float = 1.0,
    interaction: float = 0.25,
    responder_share: float = 0.9,
    depth: float = 1.0,
    seed: int = 0,
) -> ad.AnnData:
    """Simulate raw counts of a CD4+ T cell Perturb-seq whose truth is known.

    The data are SIMULATED (``uns["simulated"]`` is True): no figure computed on them says anything about real cells.
    Each cell's counts are negative binomial around its library size times the expression of its donor, time point and
    perturbation. Gene names, expression at rest, time effects, library sizes and the list of known regulators are
    published facts (sources in the modules beside this one); the sizes of all perturbation effects are made up.
    Knock-downs of known Th1 and Th2 regulators move the genes of their programmes together, so the ranking toward
    ``var["true_th1_axis"]`` has a known answer: loss of GATA3, STAT6, IL4R leads toward Th1, loss of IFNGR1, JAK2,
    STAT1, TBX21 away from it.

    Parameters
    ----------
    n_cells
        Cells, spread evenly over donors, time points and perturbations.
    n_genes
        Genes. The first 634 have real names; beyond that they are called ``SIM00001`` and so on.
    n_perturbations
        Knock-downs beside the control ``NTC``. Up to 60 % are known regulators (at most 30).
    n_donors
        Donors, 1 to 4.
    n_timepoints
        Time points, 1 to 3, in the order ``Rest``, ``Stim8hr``, ``Stim48hr``.
    control_share
        Share of the cells that are controls.
    no_effect_share
        Share of the perturbations that change nothing but their own target (published: 0.30). Of all perturbations,
        23 % change more than 10 genes, 10 % more than 75 and 3.5 % more than 500 (published), or more where the known
        regulators make up more.
    effect_scale
        Multiplies all log2 effects on genes other than the target; with 0 only the knock-downs remain.
    interaction
        Share of each perturbation's effect variance (over genes and contexts, target excluded) that differs between
        contexts. With a single context there is none.
    responder_share
        Share of the perturbed cells in which the knock-down worked; the others are like controls.
    depth
        Multiplies the published library sizes, which are those of a panel of 3,699 genes. Smaller panels are therefore
        denser than the real one; ``depth=n_genes / 3699`` gives them its zeros.
    seed
        Seed of the one random generator used.

    Returns
    -------
    AnnData
        Cells in random order, with

        - ``X``: raw counts, CSR float32, whole numbers
        - ``obs``: ``donor_id``, ``timepoint``, ``perturbation`` (categorical), ``true_library`` (expected counts),
          ``true_responder``, ``true_activation`` (position of the cell on the activation axis)
        - ``var``: ``gene_id`` (Ensembl, empty for made-up genes), ``programme``, ``true_base_log2``,
          ``true_dispersion`` (inverse: variance = mean + mean^2 / dispersion), ``true_activation_log2``,
          ``true_th1_axis`` (1 Th1 gene, -1 Th2 gene, 0 else)
        - ``varm``: ``true_timepoint_log2fc``, ``true_donor_log2fc``, ``true_perturbation_log2fc`` (main effects in
          responders, genes x perturbations), ``true_interaction_log2fc`` (sparse, genes x perturbations * donors *
          time points, in this order)
        - ``uns``: ``simulated``, ``synthetic_cd4`` (the settings, the levels, the kind of each perturbation)

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Examples
    --------
    >>> adata = datasets.synthetic_cd4(400, 60, n_perturbations=3, n_donors=2)
    >>> adata.shape
    (400, 60)
    """
    settings: dict[str, Any] = dict(locals())
    _check(**settings)
    rng = np.random.default_rng(seed)
    donors, timepoints = list(DONORS[:n_donors]), list(TIMEPOINTS[:n_timepoints])
    targets, kinds = choose_targets(n_perturbations, no_effect_share)
    panel = choose_panel(n_genes, targets)
    genes = draw_genes(panel, n_donors, n_timepoints, rng)
    effects = draw_effects(panel, targets, kinds, effect_scale, rng)
    added = draw_interactions(effects, targets, panel, (n_donors, n_timepoints), interaction, rng)
    codes = _draw_design(n_cells, n_perturbations, n_donors * n_timepoints, control_share, rng)
    obs = _draw_cells(codes, donors, timepoints, targets, responder_share, depth, rng)
    counts = _draw_counts(codes, obs, genes, effects, added, rng)
    uns = {
        "simulated": True,
        "synthetic_cd4": {
            **settings,
            "donors": np.array(donors),
            "timepoints": np.array(timepoints),
            "perturbations": np.array(targets),
            "kinds": np.array(kinds),
        },
    }
    var = _describe_genes(genes)
    varm = {
        "true_timepoint_log2fc": pd.DataFrame(genes.timepoint, index=var.index, columns=timepoints),
        "true_donor_log2fc": pd.DataFrame(genes.donor, index=var.index, columns=donors),
        "true_perturbation_log2fc": pd.DataFrame(effects, index=var.index, columns=targets),
        "true_interaction_log2fc": sparse.csr_matrix(added.T),
    }
    return ad.AnnData(counts, obs=obs, var=var, varm=varm, uns=uns)


def true_log2fc(
    adata: ad.AnnData,
    perturbation: str,
    donor: str | None = None,
    timepoint: str | None = None,
    *,
    responders_only: bool = False,
) -> pd.Series:
    """Return the log2 fold changes against control that infinitely many simulated cells would show.

    Counts are compared as shares of the library, so the planted effects of other genes enter through the total. Cells
    in which the knock-down failed weaken the effect, unless `responders_only`.

    Parameters
    ----------
    adata
        Cells made by `synthetic_cd4`, or a subset of them.
    perturbation
        A knock-down, or ``NTC`` (all zero).
    donor, timepoint
        The context; None averages over all of them.
    responders_only
        Leave out the cells in which the knock-down failed.

    Returns
    -------
    Series
        log2 fold change, indexed by gene.

    Raises
    ------
    ValueError
        If the cells are not of `synthetic_cd4` or a name is not one of its levels.

    Examples
    --------
    >>> effect = datasets.true_log2fc(adata, "GATA3", donor="CE0008162", timepoint="Rest")
    >>> bool(effect["GATA3"] < -1)  # the knock-down itself
    True
    """
    if "synthetic_cd4" not in adata.uns:
        raise ValueError("These cells have no uns['synthetic_cd4']: true_log2fc knows only data of synthetic_cd4().")
    settings = adata.uns["synthetic_cd4"]
    levels = {name: [str(level) for level in settings[name]] for name in ("perturbations", "donors", "timepoints")}
    if perturbation == CONTROL:
        return pd.Series(0.0, index=adata.var_names, name=perturbation)
    p = _find(perturbation, levels["perturbations"], "perturbation")
    donors = range(len(levels["donors"])) if donor is None else [_find(donor, levels["donors"], "donor")]
    n_times = len(levels["timepoints"])
    times = range(n_times) if timepoint is None else [_find(timepoint, levels["timepoints"], "time point")]
    n_contexts = len(levels["donors"]) * n_times
    working = 1.0 if responders_only else float(settings["responder_share"])
    table = sparse.csc_matrix(adata.varm["true_interaction_log2fc"])
    changes = []
    for d in donors:
        for t in times:
            base = adata.var["true_base_log2"].to_numpy() + adata.varm["true_timepoint_log2fc"].to_numpy()[:, t]
            base = base + adata.varm["true_donor_log2fc"].to_numpy()[:, d]
            effect = adata.varm["true_perturbation_log2fc"].to_numpy()[:, p]
            effect = effect + table[:, p * n_contexts + d * n_times + t].toarray().ravel()
            mixed = working * _shares(base + effect) + (1 - working) * _shares(base)
            changes.append(np.log2(mixed / _shares(base)))
    return pd.Series(np.mean(changes, axis=0), index=adata.var_names, name=perturbation)


def _find(name: str, levels: list[str], what: str) -> int:
    if name not in levels:
        raise ValueError(f"{name!r} is no {what} of these simulated cells; they have {', '.join(levels)}.")
    return levels.index(name)


def _shares(log2_expression: Array) -> Array:
    """Turn log2 expression into shares of the library along the last axis."""
    raised = np.exp2(log2_expression - log2_expression.max(axis=-1, keepdims=True))
    shares: Array = raised / raised.sum(axis=-1, keepdims=True)
    return shares


def _check(**settings: Any) -> None:
    """Refuse arguments that make no data set, with a sentence that says what is allowed."""
    for name, low, high in (
        ("n_perturbations", 1, 20_000),
        ("n_donors", 1, len(DONORS)),
        ("n_timepoints", 1, len(TIMEPOINTS)),
        ("n_genes", 20, 100_000),
        ("n_cells", 1, 100_000_000),
        ("seed", 0, 2**63),
    ):
        value = settings[name]
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    for name, least, most in (
        ("control_share", 0.01, 0.99),
        ("no_effect_share", 0.0, 1.0),
        ("effect_scale", 0.0, 3.0),
        ("interaction", 0.0, 0.9),
        ("responder_share", 0.0, 1.0),
        ("depth", 0.001, 100.0),
    ):
        value = settings[name]
        if (
            not isinstance(value, int | float | np.integer | np.floating)
            or isinstance(value, bool)
            or not least <= value <= most
        ):
            raise ValueError(f"{name} must be a number from {least} to {most}, not {value!r}.")
    n_genes, n_perturbations = settings["n_genes"], settings["n_perturbations"]
    if n_genes < 2 * n_perturbations:
        raise ValueError(
            f"n_genes={n_genes} is too few for {n_perturbations} perturbations, each of which needs its target in the "
            f"panel: ask for at least {2 * n_perturbations} genes."
        )
    contexts = settings["n_donors"] * settings["n_timepoints"]
    n_control = round(settings["control_share"] * settings["n_cells"])
    if n_control < contexts or settings["n_cells"] - n_control < contexts * n_perturbations:
        raise ValueError(
            f"n_cells={settings['n_cells']} with control_share={settings['control_share']} cannot give each of the "
            f"{contexts} contexts a control cell and a cell of each of the {n_perturbations} perturbations: "
            "ask for more cells, or for fewer perturbations, donors or time points."
        )


def _draw_design(
    n_cells: int, n_perturbations: int, n_contexts: int, control_share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the condition of each cell, n_cells x 2: context (donor-major) and perturbation, the control being last."""
    n_control = round(control_share * n_cells)
    control = np.arange(n_control) % n_contexts
    perturbed = np.arange(n_cells - n_control) % (n_contexts * n_perturbations)
    order = rng.permutation(n_contexts * n_perturbations)[perturbed]
    codes = np.concatenate(
        [
            np.column_stack([control, np.full(n_control, n_perturbations)]),
            np.column_stack([order // n_perturbations, order % n_perturbations]),
        ]
    )
    return rng.permutation(codes, axis=0)


def _draw_cells(
    codes: NDArray[np.int64],
    donors: list[str],
    timepoints: list[str],
    targets: list[str],
    responder_share: float,
    depth: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    n = len(codes)
    contexts = [(donor, timepoint) for donor in donors for timepoint in timepoints]
    library = np.array([LOG_LIBRARY[context] for context in contexts])[codes[:, 0]]
    donor, timepoint = np.divmod(codes[:, 0], len(timepoints))
    return pd.DataFrame(
        {
            "donor_id": pd.Categorical.from_codes(donor, donors),
            "timepoint": pd.Categorical.from_codes(timepoint, timepoints),
            "perturbation": pd.Categorical.from_codes(codes[:, 1], [*targets, CONTROL]),
            "true_library": depth * np.exp(rng.normal(library[:, 0], library[:, 1])),
            "true_responder": (rng.random(n) < responder_share) & (codes[:, 1] < len(targets)),
            "true_activation": rng.normal(0.0, _ACTIVATION_SD, n),
        },
        index=[f"sim_{i:07d}" for i in range(n)],
    )


def _describe_genes(genes: GeneTruth) -> pd.DataFrame:
    programme = {gene: name for name in ("interferon", "th1", "th2", "tcr", "rest") for gene in PROGRAMMES[name]}
    names = [programme.get(gene, "none") for gene in genes.symbols]
    return pd.DataFrame(
        {
            "gene_id": genes.gene_ids,
            "programme": pd.Categorical(names),
            "true_base_log2": genes.base,
            "true_dispersion": genes.theta,
            "true_activation_log2": genes.activation,
            "true_th1_axis": [float(name == "th1") - float(name == "th2") for name in names],
        },
        index=pd.Index(genes.symbols),
    )


def _draw_counts(
    codes: NDArray[np.int64],
    obs: pd.DataFrame,
    genes: GeneTruth,
    effects: Array,
    added: sparse.csr_matrix,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw the counts, cells x genes, in chunks of cells."""
    base = (genes.base[:, None, None] + genes.donor[:, :, None] + genes.timepoint[:, None, :]).reshape(len(effects), -1)
    by_context, by_perturbation = base.T.astype(np.float32), effects.T.astype(np.float32)
    library, activation = obs["true_library"].to_numpy(), obs["true_activation"].to_numpy(dtype=np.float32)
    responder = obs["true_responder"].to_numpy()
    theta, loading = genes.theta.astype(np.float32), genes.activation.astype(np.float32)
    blocks = []
    for start in range(0, len(codes), _CHUNK):
        rows = slice(start, start + _CHUNK)
        context, perturbation = codes[rows].T
        log2_expression = by_context[context] + np.outer(activation[rows], loading)
        hit = np.flatnonzero(responder[rows])
        log2_expression[hit] += by_perturbation[perturbation[hit]]
        log2_expression[hit] += added[perturbation[hit] * len(by_context) + context[hit]].toarray()
        mean = library[rows, None] * _shares(log2_expression)
        rate = rng.standard_gamma(np.broadcast_to(theta, mean.shape), dtype=np.float32) * (mean / theta)
        blocks.append(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(blocks, format="csr"))
