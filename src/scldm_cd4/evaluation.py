"""Generated cells of a model scored against real cells that it has not seen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import metrics
from scldm_cd4._errors import DataError
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.ranking.effects import target_genes
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import role_columns


def evaluate(
    self: Any,
    adata: Any = None,
    *,
    profile: Any = "paper",
    train: Any = None,
    baselines: Sequence[str] | None = None,
    n_cells: int | None = None,
    generate: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Generate cells of held-out conditions and score them beside baselines and a repeat of the experiment.

    Parameters
    ----------
    adata
        Real cells that the model has not seen, with raw counts and the declared columns. None takes the test cells of
        the training split (the validation cells where it has none) of the cells that the model was built with.
    train
        The cells that the model was trained on, which baselines and components see. None takes those of the training
        split; a model that was loaded knows it where it was loaded with the same cells.
    profile, baselines
        As in `scldm_cd4.metrics.evaluate`.
    n_cells
        Cells to generate per condition; as many as there are real ones by default.
    generate
        Keywords of `generate`, such as ``{"guidance": 1.5}``.
    seed
        Of the generated cells and of all draws of the scores.
    options
        Other keywords of `scldm_cd4.metrics.evaluate`. In ``target_genes``, a perturbation that is not given has the
        gene that carries its name, as identifier or in a string column of ``var``.

    Returns
    -------
    The table of `scldm_cd4.metrics.evaluate`. Without training cells there are no baselines. Conditions with a label
    that the model was not trained on are left out, and named in ``attrs["not_generated"]``; all are generated where
    the numbers of training cells are not known, as in an imported checkpoint.

    Raises
    ------
    NotTrainedError
        A stage is not trained.
    DataError
        There are no held-out cells, no control was declared, the cells of the model were changed in place since
        training, or the cells cannot be used.

    Examples
    --------
    >>> table = model.evaluate(profile="minimal", baselines=["additive"], seed=0)
    >>> "baseline_additive" in table.columns
    True
    """
    sampling_seed = int(self._sampling(seed=seed).seed)
    registry: Registry = self._trained().registry
    if registry.control is None:
        raise DataError("no control was declared, so effects cannot be scored: setup_anndata(..., control=...)")
    split: Any = self._known_split() if adata is None or train is None else None
    own = None if split is None else CellData.from_adata(self.adata, registry)
    if train is not None:
        train = _all_cells(train, registry)
    elif own is not None:
        train = _as_adata(own, split.train)
    if adata is not None:
        real = _all_cells(adata, registry)
    else:
        if own is None:
            raise DataError(
                "the model was not loaded with the cells that it was trained on, so it knows no held-out cells: "
                "CD4Model.load(folder, adata) with these, in the same order, or pass adata= with real cells that it "
                "has not seen, and train= with those that it was trained on, for baselines"
            )
        held = split.test if len(split.test) else split.validation
        if not len(held):
            raise DataError("the training split held out no cells: pass adata= with real cells that it has not seen")
        real = _as_adata(own, held)
    keys = role_columns(registry)
    conditions, left_out = _conditions(real, registry, keys, n_cells)
    pred = self.generate(conditions=conditions, **{**(generate or {}), "seed": sampling_seed})
    named = _targets(registry, conditions[keys["perturbation"]].unique())
    options["target_genes"] = named | dict(options.get("target_genes") or {})
    if baselines is not None:
        options["baselines"] = baselines
    table: pd.DataFrame = metrics.evaluate(
        real[~_marked(real, left_out, keys)],
        pred,
        train=train,
        perturbation_key=keys["perturbation"],
        context_keys=[keys[role] for role in ("donor", "timepoint") if role in keys],
        control=registry.control,
        profile=profile,
        seed=sampling_seed % 2**32,
        **options,
    )
    table.attrs["not_generated"] = left_out.astype(str).to_dict("records")
    table.attrs["model_hash"] = pred.uns["scldm_cd4"].get("model_hash")
    return table


def _all_cells(adata: Any, registry: Registry) -> Any:
    """Give cells of a user as AnnData with the genes and labels of the model."""
    cells = CellData.from_adata(adata, registry)
    return _as_adata(cells, np.arange(cells.n_cells))


def _as_adata(cells: CellData, rows: np.ndarray) -> Any:
    """Give some cells as AnnData with the genes and labels of the model."""
    import anndata as ad

    registry = cells.registry
    assert cells.labels is not None
    columns = {
        column: np.array(attribute.levels, dtype=object)[cells.labels[rows, position]]
        for position, (role, attribute) in enumerate(zip(ROLES, registry.attributes, strict=True))
        if (column := role_columns(registry).get(role)) is not None
    }
    obs = pd.DataFrame(columns, index=cells.obs_names[rows].astype(str))
    return ad.AnnData(cells.counts(rows), obs=obs, var=pd.DataFrame(index=pd.Index(registry.genes)))


def _conditions(
    real: Any, registry: Registry, keys: Mapping[str, str], n_cells: int | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give the perturbed conditions with their numbers of cells, and those with a label that was never trained."""
    columns = list(keys.values())
    table = real.obs.groupby(columns, observed=True, sort=True).size().rename("n_cells").reset_index()
    table = table[table[keys["perturbation"]] != registry.control]
    if not len(table):
        raise DataError(f"the real cells are all controls ({registry.control!r}): there is no effect to score")
    unknown = np.zeros(len(table), dtype=bool)
    if registry.train_counts:  # else not known which labels were trained
        for role, column in keys.items():
            unknown |= table[column].isin(registry.untrained(role)).to_numpy(dtype=bool)
    if unknown.all():
        raise DataError("none of the real conditions can be generated: a label of each has no training cells")
    if n_cells is not None:
        table = table.assign(n_cells=n_cells)
    return table[~unknown].reset_index(drop=True), table.loc[unknown, columns].reset_index(drop=True)


def _targets(registry: Registry, names: Iterable[str]) -> dict[str, str]:
    """Give the gene that carries the name of each perturbation, where there is one."""
    found = {name: np.flatnonzero(target_genes(registry, name)) for name in names}
    return {name: registry.genes[hits[0]] for name, hits in found.items() if len(hits)}


def _marked(real: Any, conditions: pd.DataFrame, keys: Mapping[str, str]) -> np.ndarray:
    """Mark the cells of some conditions."""
    columns = list(keys.values())
    if not len(conditions):
        return np.zeros(real.n_obs, dtype=bool)
    wanted = pd.MultiIndex.from_frame(conditions[columns])
    return np.asarray(pd.MultiIndex.from_frame(real.obs[columns]).isin(wanted))
