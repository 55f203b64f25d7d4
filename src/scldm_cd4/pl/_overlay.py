"""Real and generated cells, as AnnData, in one plane."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.pl._embedding import METHODS, embed_like, real_vs_generated

N_NAMED = 5
MAX_SHAPING = 3000
"""Real cells that shape the plane, at most."""


def overlay(
    real: Any,
    generated: Any,
    *,
    reference: Any = None,
    method: str = "umap",
    perturbation_key: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    layer: str | None = None,
    named: Sequence[str] | None = None,
    n_cells: int = 2000,
    n_components: int = 30,
    title: str = "",
    seed: int = 0,
    save: str | Path | None = None,
) -> Any:
    """Draw generated over real cells in a plane fitted to other real cells, and real over real cells beside it.

    All kinds have the same number of cells of every condition, so that neither density nor composition misleads, and
    are drawn in shuffled order. A condition with fewer than two real cells (four without `reference`) cannot be
    compared and is left out, with a warning. Counts are log-normalised by each cell's own total. The panel with two
    samples of real cells shows how different two samples of one distribution look.

    Parameters
    ----------
    real
        AnnData of raw counts; conditions that were not generated play no part in the comparison.
    generated
        Generated cells with ``output="counts"`` and the same genes in any order.
    reference
        AnnData of real cells that the plane is fitted to, such as the training cells. None takes half of `real`, which
        is then not drawn.
    method
        ``umap``, or ``pca`` for the first two principal components of the reference.
    perturbation_key, context_keys
        Columns of ``obs``; from ``generated.uns["scldm_cd4"]`` by default.
    layer
        Layer with the counts of the cells that have it; by default as ``setup_anndata`` declared, else ``X``.
    named
        Perturbations with a colour of their own, at most 7; by default those farthest from the average cell.
    n_cells
        Cells of each kind, at most.
    n_components
        Principal components that the UMAP starts from.
    title
        Of the figure; say here whether the cells are simulated.
    seed
        Of the choice of cells, the UMAP and the order of drawing.
    save
        File to write the figure to.

    Returns
    -------
    The Figure, of four panels.

    Raises
    ------
    DataError
        The method or a column is unknown, values are no counts, `n_cells` is below 1, or no condition has enough real
        and generated cells.
    GeneMismatchError
        The genes differ.

    Warns
    -----
    UserWarning
        Conditions were left out.

    Examples
    --------
    >>> figure = pl.overlay(real, cells, reference=train, method="pca", title="SIMULATED")
    """
    from scldm_cd4.metrics import fit_projection
    from scldm_cd4.metrics.cells.samples import Keys, read_samples

    if method not in METHODS:
        raise DataError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    if n_cells < 1:
        raise DataError(f"n_cells must be at least 1, got {n_cells!r}")
    keys = Keys.resolve(generated, perturbation_key, context_keys, control="")
    sides = {"real": real, "generated": generated} | ({} if reference is None else {"reference": reference})
    samples = read_samples(sides, keys, layer=layer)
    rng = np.random.default_rng([seed, 3])
    kinds, shaping = _choose(samples["real"], samples["generated"], reference is None, n_cells, rng)
    shapes = samples["real"].values[shaping] if reference is None else samples["reference"].values
    shapes = shapes[rng.permutation(shapes.shape[0])[:MAX_SHAPING]]
    if shapes.shape[0] < 4:
        hint = "; give other real cells as reference=" if reference is None else ""
        raise DataError(f"a plane needs at least 4 reference cells, got {shapes.shape[0]}{hint}")
    axes = fit_projection(shapes, min(n_components, shapes.shape[0] - 1, shapes.shape[1] - 1))
    origin = (samples["real"], samples["real"], samples["generated"])
    features = [axes.apply(sample.values[rows]) for sample, rows in zip(origin, kinds, strict=True)]
    places = [x[:, :2] for x in features] if method == "pca" else embed_like(axes.apply(shapes), *features, seed=seed)
    groups = [
        np.array([key[-1] for key in sample.keys], dtype=object)[sample.codes[rows]]
        for sample, rows in zip(origin, kinds, strict=True)
    ]
    chosen = _farthest(features[0], groups[0]) if named is None else list(named)
    return real_vs_generated(
        places[0],
        places[2],
        groups[0],
        groups[2],
        named=chosen,
        title=title,
        other_real=places[1],
        names=("real", "generated"),
        group_title=keys.perturbation,
        axis=METHODS[method],
        seed=seed,
        save=save,
    )


def _choose(
    real: Any, generated: Any, with_shaping: bool, n_cells: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the rows of real, other real and generated cells, equally many of each condition, and those that shape."""
    kinds: list[list[np.ndarray]] = [[], [], []]
    shaping = [np.empty(0, dtype=np.int64)]
    needed = 4 if with_shaping else 2
    shared = [len(rows) for key, rows in real.groups.items() if len(generated.rows(key))]
    few = sum(n < needed for n in shared)
    if few == len(shared):
        found = (
            f"the {few} conditions that both have hold {max(shared)} real cells at most" if few else "none is shared"
        )
        raise DataError(
            f"a condition is compared by at least {needed} real cells{' (2 with reference=)' * with_shaping} and one "
            f"generated cell of the same labels, but {found}"
        )
    if few:
        warnings.warn(
            f"{few} of {len(shared)} conditions are left out: they have fewer than {needed} real cells"
            f"{' (2 are enough with reference=)' * with_shaping}",
            UserWarning,
            stacklevel=3,
        )
    for key, rows in real.groups.items():
        mixed = rng.permutation(rows)
        if with_shaping:
            shaping.append(mixed[: len(mixed) // 2])
            mixed = mixed[len(mixed) // 2 :]
        made = rng.permutation(generated.rows(key))
        n = min(len(mixed) // 2, len(made))
        for kind, cells in zip(kinds, (mixed[:n], mixed[n : 2 * n], made[:n]), strict=True):
            kind.append(cells)
    whole = [np.concatenate(kind) for kind in kinds]
    kept = np.sort(rng.permutation(len(whole[0]))[:n_cells])
    return [rows[kept] for rows in whole], np.concatenate(shaping)


def _farthest(features: np.ndarray, groups: np.ndarray) -> list[str]:
    """Return the groups whose mean is farthest from that of all cells, farthest first."""
    names = np.unique(groups.astype(str))
    middle = features.mean(axis=0)
    far = [float(np.linalg.norm(features[groups == name].mean(axis=0) - middle)) for name in names]
    return [str(names[i]) for i in np.argsort(far)[::-1][:N_NAMED]]
