"""The protocol that scores generated cells against held-out real cells. Knows nothing of the model.

Cells and roles, per context (every combination of ``context_key`` columns):

- *held-out*: the real cells of a condition in ``test``; they are fixed, and n is their number.
- *reference controls*: the held-out control cells and a seeded half of the training control cells. All deltas and
  rank tests, real and generated, are taken against them.
- *baseline*: n cells drawn from the other half of the training controls, so disjoint from the reference controls.
- *ceiling*: n real training cells of the same condition: a repeat of the experiment.
- *model*: n generated cells of the same condition.

Every draw takes the same number of cells per context as are held out. Deltas are taken within context and averaged
with the held-out cells as weights. Rank tests are stratified over contexts (van Elteren). Energy distance and W2
compare the pooled cells of the perturbation, whose composition over contexts is equal on both sides, on principal
components fitted on training cells only. The perturbation's own target gene is left out of deltas and rank tests.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import metrics

HIGHER_IS_BETTER = {"pearson_delta": True, "energy_distance": False, "de_f1": True}
ANCHORED = tuple(HIGHER_IS_BETTER)


@dataclass(frozen=True)
class Cells:
    """Cells in the form that the scores need."""

    values: Any  # CSR float64, log-normalised
    pcs: np.ndarray
    perturbation: np.ndarray
    context: np.ndarray  # integer codes
    counts: Any

    def rows(self, perturbation: str, context: int | None = None) -> np.ndarray:
        """Positions of the cells of a condition."""
        mask = self.perturbation == perturbation
        return np.flatnonzero(mask if context is None else mask & (self.context == context))


@dataclass
class _Truth:
    """The held-out cells of one perturbation."""

    sizes: dict[int, int]  # context -> n
    delta: np.ndarray
    pcs: np.ndarray
    within: float
    significant: np.ndarray
    keep: np.ndarray  # genes that are not the target
    n_de_train: int  # significant genes of all training cells of the perturbation
    draws: dict[str, pd.DataFrame] = field(default_factory=dict)  # ceiling, baseline


class ConditionScorer:
    """Ceilings and baselines of one data set, prepared once, and any number of generated sets scored against them.

    Parameters
    ----------
    train, test
        Real cells with raw counts in ``X`` and the same genes; the model may have seen ``train`` only.
    perturbation_key, context_key
        Columns of ``obs``; ``context_key`` may be one, several or none.
    control
        Label of the control.
    n_redraws
        Redraws of ceiling and baseline (and of the model, where more cells are generated than held out).
    n_w2
        Redraws that W2 is taken over; it is slow and not anchored.
    target_genes
        Perturbation -> gene left out; by default the gene of the same name.
    fdr
        Level of significance of the rank tests.
    seed
        Of the control halves and the redraws.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        *,
        perturbation_key: str,
        control: str,
        context_key: str | Sequence[str] | None = None,
        n_redraws: int = 20,
        n_components: int = 30,
        n_w2: int = 5,
        target_genes: Mapping[str, str] | None = None,
        fdr: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.perturbation_key, self.control, self.fdr, self.seed = perturbation_key, control, fdr, seed
        self.context_key = [context_key] if isinstance(context_key, str) else list(context_key or [])
        self.n_redraws, self.n_w2 = n_redraws, min(n_w2, n_redraws)
        self.genes = pd.Index(train.var_names.astype(str))
        self._contexts: dict[tuple[str, ...], int] = {}
        values = metrics.log_normalize(train)
        self.projection = metrics.fit_projection(values, min(n_components, min(values.shape) - 1))
        self.train, self.test = self.cells(train, new=True), self.cells(test, new=True)
        self._target_genes = dict(target_genes or {})
        self._split_controls()
        names = sorted(set(self.test.perturbation) - {control})
        self._truth = {name: truth for name in names if (truth := self._prepare(name)) is not None}

    def cells(self, adata: Any, *, new: bool = False) -> Cells:
        """Align, normalise and project cells."""
        missing = self.genes.difference(adata.var_names.astype(str))
        if len(missing):
            raise ValueError(f"{len(missing)} training genes are not in the cells to score, e.g. {list(missing[:3])}")
        adata = adata[:, self.genes]
        values = metrics.log_normalize(adata)
        columns = [adata.obs[key].astype(str) for key in self.context_key]
        keys = list(zip(*columns, strict=True)) if columns else [()] * adata.n_obs
        if new:
            for key in sorted(set(keys)):
                self._contexts.setdefault(key, len(self._contexts))
        unknown = set(keys) - set(self._contexts)
        if unknown:
            raise ValueError(f"contexts {sorted(unknown)} do not occur in the real cells")
        context = np.array([self._contexts[key] for key in keys], dtype=np.int64)
        perturbation = adata.obs[self.perturbation_key].astype(str).to_numpy()
        return Cells(values, self.projection.apply(values), perturbation, context, adata.X)

    def _split_controls(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        self._reference: dict[int, metrics.ControlRanks] = {}
        self._reference_mean: dict[int, np.ndarray] = {}
        self._pool: dict[int, np.ndarray] = {}
        for context in self._contexts.values():
            rows = rng.permutation(self.train.rows(self.control, context))
            held = self.test.rows(self.control, context)
            half = rows[: len(rows) // 2]
            values = np.vstack([self.train.values[half].toarray(), self.test.values[held].toarray()])
            if len(values) and len(rows) > len(half):
                self._reference[context] = metrics.ControlRanks(values)
                self._reference_mean[context] = values.mean(axis=0)
                self._pool[context] = rows[len(half) :]

    def _prepare(self, name: str) -> _Truth | None:
        rows = self.test.rows(name)
        rows = rows[np.isin(self.test.context[rows], list(self._reference))]
        if not len(rows):
            return None
        keep = self.genes != self._target_genes.get(name, name)
        context = self.test.context[rows]
        levels, sizes = np.unique(context, return_counts=True)
        dense, pcs = self.test.values[rows].toarray(), self.test.pcs[rows]
        significant = self._significant(dense, context, keep, name)
        within = metrics.within_distance(pcs)
        sizes_of = dict(zip(levels.tolist(), sizes.tolist(), strict=True))
        full = np.concatenate([self.train.rows(name, s) for s in sizes_of])
        n_de_train = self._n_de(self.train, full, keep, f"training cells of {name}")
        truth = _Truth(sizes_of, self._delta(dense, context), pcs, within, significant, keep, n_de_train)
        pools = {
            "ceiling": {s: self.train.rows(name, s) for s in truth.sizes},
            "baseline": {s: self._pool[s] for s in truth.sizes},
        }
        for which, pool in pools.items():
            draws = self._draws(pool, truth.sizes, name, which)
            truth.draws[which] = self._score_draws(truth, self.train, draws, f"{which} cells of {name}")
        return truth

    def _draws(
        self, pool: Mapping[int, np.ndarray], sizes: Mapping[int, int], name: str, which: str
    ) -> Iterator[np.ndarray]:
        """Draw n cells per context without replacement (with, where there are too few), anew for every redraw."""
        rng = np.random.default_rng([self.seed, 2, *f"{which}/{name}".encode()])
        for _ in range(self.n_redraws):
            picks = [rng.choice(pool[s], n, replace=len(pool[s]) < n) for s, n in sizes.items() if len(pool[s])]
            yield np.concatenate(picks) if picks else np.empty(0, dtype=np.int64)

    def _delta(self, dense: np.ndarray, context: np.ndarray) -> np.ndarray:
        shifts = [
            (context == s).sum() * (dense[context == s].mean(axis=0) - self._reference_mean[s])
            for s in set(context.tolist())
        ]
        return np.sum(shifts, axis=0) / len(dense)

    def _significant(self, dense: np.ndarray, context: np.ndarray, keep: np.ndarray, what: str) -> np.ndarray:
        _, p = metrics.context_test(dense, context, self._reference, what)
        return metrics.benjamini_hochberg(p[keep]) <= self.fdr

    def _n_de(self, cells: Cells, rows: np.ndarray, keep: np.ndarray, what: str) -> int:
        if not len(rows):
            return 0
        return int(self._significant(cells.values[rows].toarray(), cells.context[rows], keep, what).sum())

    def _score_draws(self, truth: _Truth, cells: Cells, draws: Iterator[np.ndarray], what: str) -> pd.DataFrame:
        return pd.DataFrame([self._score(truth, cells, rows, what, i < self.n_w2) for i, rows in enumerate(draws)])

    def _score(self, truth: _Truth, cells: Cells, rows: np.ndarray, what: str, with_w2: bool) -> dict[str, float]:
        if len(rows) < 2:
            return dict.fromkeys((*ANCHORED, "n_de", "w2"), float("nan"))
        dense, context, pcs = cells.values[rows].toarray(), cells.context[rows], cells.pcs[rows]
        significant = self._significant(dense, context, truth.keep, what)
        delta = metrics.safe_pearson(truth.delta[truth.keep], self._delta(dense, context)[truth.keep])
        return {
            "pearson_delta": 0.0 if np.isnan(delta) else delta,  # no predicted change earns nothing
            "energy_distance": metrics.energy_distance(truth.pcs, pcs, within_x=truth.within),
            "de_f1": metrics.de_recovery(truth.significant, significant)["f1"],
            "n_de": float(significant.sum()),
            "w2": metrics.wasserstein(truth.pcs, pcs) if with_w2 else float("nan"),
        }

    def score(self, generated: Any | None = None) -> pd.DataFrame:
        """Score generated cells.

        Parameters
        ----------
        generated
            Cells with raw counts and the same columns of ``obs``; at least as many per condition as are held out.
            Where k times as many are given, k redraws are scored on disjoint blocks of cells in the order given. None
            scores ceiling and baseline only.

        Returns
        -------
        One row per perturbation and metric, see :func:`score_conditions`.

        Raises
        ------
        ValueError
            If a held-out condition has too few generated cells, or genes or contexts do not fit.
        """
        cells = None if generated is None else self.cells(generated)
        rows: list[dict[str, Any]] = []
        for name, truth in self._truth.items():
            model = (
                None
                if cells is None
                else self._score_draws(truth, cells, self._blocks(cells, truth, name), f"generated cells of {name}")
            )
            rows.extend(self._rows(name, truth, model))
        return pd.DataFrame(rows)

    def _blocks(self, cells: Cells, truth: _Truth, name: str) -> Iterator[np.ndarray]:
        pool = {s: cells.rows(name, s) for s in truth.sizes}
        short = {s: len(pool[s]) for s, n in truth.sizes.items() if len(pool[s]) < n}
        if short:
            raise ValueError(
                f"{name}: generated {short} cells in contexts where {truth.sizes} are held out; generate more"
            )
        n_blocks = min(self.n_redraws, min(len(pool[s]) // n for s, n in truth.sizes.items()))
        for i in range(n_blocks):
            yield np.concatenate([pool[s][i * n : (i + 1) * n] for s, n in truth.sizes.items()])

    def _rows(self, name: str, truth: _Truth, model: pd.DataFrame | None) -> Iterator[dict[str, Any]]:
        ceiling, baseline = truth.draws["ceiling"], truth.draws["baseline"]
        for metric in (*ANCHORED, "w2", "n_de"):
            values = np.array([np.nan]) if model is None else model[metric].to_numpy()
            low, high = baseline[metric].to_numpy(), ceiling[metric].to_numpy()
            better = HIGHER_IS_BETTER.get(metric, False)
            anchored = metrics.anchored_score(values, low, high, higher_is_better=better)
            single = metrics.anchored_score(values, low, high, higher_is_better=better, single_draw=True)
            repeat = (
                (high - anchored.baseline) / (anchored.ceiling - anchored.baseline)
                if anchored.counted
                else high * np.nan
            )
            row = {
                "perturbation": name,
                "metric": metric,
                "n": sum(truth.sizes.values()),
                "n_train": len(self.train.rows(name)),
                "n_de_real": int(truth.significant.sum()),
                "n_de_train": truth.n_de_train,
                **vars(anchored),
                "counted_single": single.counted,
                "repeat_q05": float(np.nanquantile(repeat, 0.05)) if anchored.counted else float("nan"),
                "real_q95": upper(np.concatenate([low, high])),
                "model_max": float(np.max(values)),
            }
            if metric not in ANCHORED:
                row.update(score=float("nan"), counted=False, counted_single=False, repeat_q05=float("nan"))
            yield row


def score_conditions(
    train: Any,
    test: Any,
    generated: Any | None,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | Sequence[str] | None = None,
    n_redraws: int = 20,
    **options: Any,
) -> pd.DataFrame:
    """Score generated cells against held-out cells beside baseline and ceiling.

    Parameters
    ----------
    train, test, generated
        Cells with raw counts; see :class:`ConditionScorer`, which is quicker for several generated sets.
    perturbation_key, control, context_key, n_redraws, options
        See :class:`ConditionScorer`.

    Returns
    -------
    One row per perturbation and metric (``pearson_delta``, ``energy_distance``, ``de_f1`` anchored; ``w2`` raw, whose
    ``ceiling`` is its floor; ``n_de``, the number of significant genes): ``n`` held-out cells, ``n_train``,
    ``n_de_real``, ``model``, ``baseline``, ``ceiling`` each with its standard error ``*_se`` over redraws, ``score``,
    ``counted``, ``counted_single`` (see :func:`summarise`), ``repeat_q05``, ``real_q95`` (95th percentile over the
    real redraws), ``n_de_train``.
    """
    scorer = ConditionScorer(
        train,
        test,
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        n_redraws=n_redraws,
        **options,
    )
    return scorer.score(generated)


def upper(draws: np.ndarray) -> float:
    """95th percentile of the defined draws, as a value that occurred."""
    values = draws[~np.isnan(draws)]
    return float(np.quantile(values, 0.95, method="higher")) if values.size else float("nan")


def summarise(scores: pd.DataFrame, flag: str = "counted") -> pd.DataFrame:
    """Median and minimum anchored score per metric over the perturbations that count, and who falls below 0.4.

    Parameters
    ----------
    scores
        Table of :func:`score_conditions`.
    flag
        ``counted`` (the gap exceeds 3 standard errors of the means over redraws) or ``counted_single`` (3 standard
        deviations of one draw at this n: conditions where a single repeat of the experiment can be told from the
        control).

    Returns
    -------
    One row per metric. ``repeat_minimum`` is the lowest 5th percentile that single repeats of the experiment reach: a
    bar above it would refuse real cells.
    """
    rows = []
    for metric in ANCHORED:
        counted = scores[(scores["metric"] == metric) & scores[flag]]
        rows.append(
            {
                "metric": metric,
                "n_counted": len(counted),
                "median": counted["score"].median(),
                "minimum": counted["score"].min(),
                "repeat_minimum": counted["repeat_q05"].min(),
                "below_0.4": ", ".join(counted.loc[counted["score"] < 0.4, "perturbation"]),
            }
        )
    return pd.DataFrame(rows).set_index("metric")


def no_effect(scores: pd.DataFrame) -> pd.DataFrame:
    """Count false DE genes of the perturbations without an effect.

    A perturbation has no effect where neither its held-out cells nor all of its training cells have a significant
    gene besides the target, against the reference controls. The allowed number is the 95th percentile of significant
    genes over the real-against-real redraws at the same n: training cells of the perturbation and control cells, each
    against the reference controls.

    Returns
    -------
    One row per perturbation: n, mean and largest number of significant genes over the generated blocks, the allowed
    number, and whether the mean stays within it.
    """
    table = scores[(scores["metric"] == "n_de") & (scores["n_de_real"] == 0) & (scores["n_de_train"] == 0)]
    table = table.set_index("perturbation")[["n", "model", "model_max", "real_q95"]]
    return table.rename(columns={"real_q95": "allowed"}).assign(within=table["model"] <= table["real_q95"])
