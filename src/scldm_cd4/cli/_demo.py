"""The whole main job: set up, train, embed, generate, rank, save and reload, with a summary of figures."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import CD4Model, __version__, datasets, metrics, pl
from scldm_cd4._errors import DataError
from scldm_cd4.cli._cells import Cells
from scldm_cd4.cli._report import SIMULATED, Report
from scldm_cd4.cli._scores import MAX_PERTURBATIONS, MIN_CELLS, Scorer, summarise
from scldm_cd4.cli._truth import axis_of, compare_effects, compare_ranking
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.files import open_h5ad
from scldm_cd4.data.setup import fit_registry

TEST = 0.2
"""Share of the cells of every condition that is held out."""
STEPS = {"vae": 400, "flow": 800}
"""Training steps on simulated cells, where the preset has more; it takes minutes and reaches the truth."""
BLOCKS, MAX_PER_CONDITION = 4, 400
"""Generated cells per held-out cell, and the most of one condition."""
N_RANKED = 30
"""Generated cells per perturbation and context in the ranking."""
MAX_DRAWN = 1200
"""Cells of each kind in the figure."""
NAMES = {
    "generated": "generated.h5ad",
    "ranking": "ranking.csv",
    "scores": "scores.csv",
    "model": "model",
    "figure": "real_vs_generated.png",
    "text": "summary.txt",
    "json": "summary.json",
}


@dataclass
class Steps:
    """Tells on stderr what is being done, and keeps how long it took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a step."""
        sys.stderr.write(f"{name} ...\n")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run_demo(options: argparse.Namespace) -> str:
    """Run the demo.

    Parameters
    ----------
    options
        Arguments of the command.

    Returns
    -------
    The summary.

    Raises
    ------
    DataError
        The output folder is in use, or the cells cannot be used.
    """
    _check_out(options.out, options.overwrite)
    steps = Steps()
    with steps("set up"):
        adata = _open(options)
        simulated = bool(adata.uns.get("simulated", False))
        model = CD4Model(adata, config=options.preset)
    with steps("train"):
        model.train(split={"test": TEST}, seed=options.seed, **_length(options, model))
    with steps("embed"):
        latent = model.get_latent(adata)
    job = _Job(options, adata, model, latent, simulated, steps)
    return job.run()


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(f"--out {out} is not empty; give another folder, or --overwrite to replace an earlier run")
    out.mkdir(parents=True, exist_ok=True)


def _open(options: argparse.Namespace) -> Any:
    """Return declared cells: those of the file, or simulated ones."""
    if options.data is None:
        try:
            adata = datasets.synthetic_cd4(
                options.n_cells, options.n_genes, n_perturbations=options.n_perturbations, seed=options.seed
            )
        except ValueError as error:
            raise DataError(str(error)) from error
        keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
        control = "NTC"
    else:
        adata = open_h5ad(options.data)
        keys = {name: getattr(options, name) for name in ("perturbation_key", "donor_key", "timepoint_key")}
        control = options.control
    CD4Model.setup_anndata(adata, **keys, control=control)
    return adata


def _length(options: argparse.Namespace, model: CD4Model) -> dict[str, Any]:
    """Return how long to train, as arguments of ``CD4Model.train``."""
    if options.max_epochs is not None:
        return {"max_epochs": options.max_epochs}
    if options.data is not None:
        return {}
    preset = {"vae": model.config.train_vae, "flow": model.config.train_flow}
    return {"plan_kwargs": {name: {"target_steps": min(STEPS[name], preset[name].target_steps)} for name in STEPS}}


@dataclass
class _Job:
    """What follows training."""

    options: argparse.Namespace
    adata: Any
    model: CD4Model
    latent: np.ndarray
    simulated: bool
    steps: Steps

    def __post_init__(self) -> None:
        self.registry = fit_registry(self.adata)
        cells = CellData.from_adata(self.adata, self.registry)
        assert cells.labels is not None
        self.labels = cells.labels
        everything = Cells.of(cells.counts(slice(None)), cells.labels, self.registry)
        self.train_rows, self.test_rows = np.asarray(self.model.train_indices), np.asarray(self.model.test_indices)
        self.train, self.held_out = everything[self.train_rows], everything[self.test_rows]
        self.scorer = Scorer(self.train, self.held_out, self.registry, self.options.seed)

    def run(self) -> str:
        """Generate, rank, save, score and draw; return the summary."""
        seed = self.options.seed
        conditions = self._conditions()
        with self.steps("generate"):
            generated = self.model.generate(conditions=conditions, seed=seed)
        if self.simulated:
            generated.uns["simulated"] = True
        target, toward = self._target()
        with self.steps("rank"):
            ranking = self.model.rank_perturbations(target, n_cells=N_RANKED, seed=seed)
        with self.steps("save and reload"):
            generated.write_h5ad(self._path("generated"), compression="gzip")
            ranking.to_csv(self._path("ranking"), index=False)
            self.model.save(self._path("model"), overwrite=self.options.overwrite)
            again = CD4Model.load(self._path("model")).generate(conditions=conditions.head(2), seed=seed)
        first = conditions["n_cells"].head(2).sum()
        same = abs(again.X - generated.X[:first]).sum() == 0
        cells = Cells.generated(generated, self.registry)
        with self.steps("score"):
            scores = self.scorer.score(cells)
            quality = {**self._quality(cells, scores), "reload_equal": float(same)}
            scores.to_csv(self._path("scores"), index=False)
        with self.steps("draw"):
            self._draw(cells)
        report = self._report(scores, quality, ranking, toward, cells)
        self._path("json").write_text(report.to_json(), encoding="utf-8")
        self._path("text").write_text(report.to_text(), encoding="utf-8")
        return report.to_text()

    def _path(self, what: str) -> Path:
        return self.options.out / f"{SIMULATED + '_' if self.simulated else ''}{NAMES[what]}"

    def _conditions(self) -> pd.DataFrame:
        """Ask for the held-out conditions of the perturbations with most held-out cells, and of the control."""
        labels = self.labels[self.test_rows]
        sizes = np.bincount(labels[:, 2], minlength=len(self.registry.perturbation))
        sizes[self.scorer.control_code] = sizes.max() + 1
        wanted = np.argsort(-sizes, kind="stable")[: MAX_PERTURBATIONS + 1]
        codes, n = np.unique(labels[np.isin(labels[:, 2], wanted)], axis=0, return_counts=True)
        columns = {
            a.column: a.decode(codes[:, i]) for i, a in enumerate(self.registry.attributes) if a.column is not None
        }
        return pd.DataFrame({**columns, "n_cells": np.maximum(n, np.minimum(BLOCKS * n, MAX_PER_CONDITION))})

    def _target(self) -> tuple[pd.Series, str]:
        """Return the signature to rank toward, and its name."""
        if self.simulated and "synthetic_cd4" in self.adata.uns and self.options.toward is None:
            return axis_of(self.adata, self.registry.genes), "Th1 along the planted Th1-Th2 axis"
        deltas = {code: self._shift(code) for code in self._strongest(1)}
        if self.options.toward is not None:
            code = int(self.registry.perturbation.encode(self.options.toward)[0])
            deltas = {code: self._shift(code)}
        ((code, delta),) = deltas.items()
        name = self.registry.perturbation.levels[code]
        return pd.Series(delta, index=list(self.registry.genes)), f"the effect of {name} in the training cells"

    def _shift(self, code: int) -> np.ndarray:
        """Return the mean shift of a perturbation in the training cells, (genes,)."""
        cells, control = self.train.of_perturbation(code), self.scorer.reference
        cells = cells[np.flatnonzero(np.isin(cells.context, control.context))]
        return metrics.context_delta(cells.values, control.values, cells.context, control.context)

    def _strongest(self, n: int) -> list[int]:
        """Return the perturbations whose training cells differ most from the control, in the principal components."""
        control, projection = self.scorer.reference, self.scorer.projection
        sizes = {}
        for code in np.unique(self.train.perturbation).tolist():
            n_cells = int(np.isin(self.train.of_perturbation(code).context, control.context).sum())
            if code != self.scorer.control_code and n_cells >= MIN_CELLS:
                noise = projection.explained_variance.sum() * (1 / n_cells + 1 / len(control))  # of the squared shift
                sizes[code] = float(np.square(projection.components @ self._shift(code)).sum() - noise)
        if not sizes:
            raise DataError(
                f"no perturbation has {MIN_CELLS} training cells in a donor and time point with control cells"
            )
        return sorted(sizes, key=lambda code: -sizes[code])[:n]

    def _quality(self, generated: Cells, scores: pd.DataFrame) -> dict[str, float]:
        """Return figures of cells and model beside their floors."""
        test = self.adata[self.test_rows]
        share, theta = metrics.intercept_nb(self.train.counts)
        library = np.asarray(self.held_out.counts.sum(axis=1))
        out = {
            "zeros_generated": _zeros(generated),
            "zeros_held_out": _zeros(self.held_out),
            "counts_generated": _median_counts(generated),
            "counts_held_out": _median_counts(self.held_out),
            "nb_error": float(np.mean(self.model.get_reconstruction_error(test))),
            "nb_error_intercept": metrics.nb_error(self.held_out.counts, library * share, theta),
            "n_latent": float(self.latent.shape[1]),
        }
        pcs = [self.scorer.projection.apply(side.values) for side in (self.train, self.held_out)]
        latents = [self.latent[rows] for rows in (self.train_rows, self.test_rows)]
        contexts = [self.train.context, self.held_out.context]
        out |= {"probe_latent": _probe(latents, contexts), "probe_pcs": _probe(pcs, contexts)}
        out["probe_chance"] = 1.0 / len(np.unique(contexts[0]))
        if "synthetic_cd4" in self.adata.uns:
            settings = self.adata.uns["synthetic_cd4"]
            none = np.asarray(settings["perturbations"])[np.asarray(settings["kinds"]) == "none"]
            found = scores[(scores["measure"] == "n_significant") & scores["perturbation"].isin(none)]
            out["significant_generated"] = float(found["generated"].mean())
            out["significant_repeat_q95"] = float(found["ceiling_q95"].mean())
        return out

    def _draw(self, generated: Cells) -> None:
        """Draw held-out and generated cells of equal conditions in a UMAP of training cells."""
        rng = np.random.default_rng([self.options.seed, 5])
        contexts = max(self.train.context.max(), self.held_out.context.max()) + 1
        joint = [
            replace(cells, context=cells.perturbation * contexts + cells.context)
            for cells in (self.held_out, generated)
        ]
        real = joint[0][np.flatnonzero(np.isin(joint[0].context, joint[1].context))]
        real = real[rng.permutation(len(real))[:MAX_DRAWN]]
        drawn = joint[1].draw(real.context, rng)
        assert drawn is not None  # at least as many cells as held out were generated of every condition
        basis = self.train[rng.permutation(len(self.train))[: 2 * MAX_DRAWN]]
        places = pl.embed_like(
            *(self.scorer.projection.apply(cells.values) for cells in (basis, real, drawn)), seed=self.options.seed
        )
        names = self.registry.perturbation.levels
        figure = pl.real_vs_generated(
            *places,
            *([names[code] for code in cells.perturbation] for cells in (real, drawn)),
            named=[names[code] for code in (*self._strongest(5), self.scorer.control_code)],
            title=f"{SIMULATED + ' cells' if self.simulated else 'real cells'}, held out, and generated cells, in a "
            "UMAP fitted on the training cells only",
            seed=self.options.seed,
        )
        figure.savefig(self._path("figure"), dpi=150)

    def _report(
        self, scores: pd.DataFrame, quality: dict[str, float], ranking: pd.DataFrame, toward: str, cells: Cells
    ) -> Report:
        n_donor, n_time, n_pert = self.registry.vocabulary
        steps = {name: self.model.training_[name]["n_steps"] for name in STEPS}
        settings = {
            "cells": f"{self.adata.n_obs} x {self.registry.n_genes} genes; {n_pert - 1} perturbations and "
            f"{self.registry.control}, donors: {n_donor}, time points: {n_time}",
            "held out": f"{len(self.held_out)} cells, {TEST:.0%} of every condition",
            "model": f"preset {self.options.preset}, trained {steps['vae']} and {steps['flow']} steps in "
            f"{self.steps.seconds['train']:.0f} s, seed {self.options.seed}",
            "generated": f"{len(cells)} cells",
        }
        report = Report(
            simulated=self.simulated,
            version=__version__,
            settings=settings,
            summary=summarise(scores),
            quality=quality,
            ranked_toward=toward,
            ranking=ranking,
            seconds=self.steps.seconds,
            files=[str(self._path(name)) for name in NAMES],
        )
        if "synthetic_cd4" in self.adata.uns:
            report.effects = compare_effects(self.adata, self.scorer, cells)
            report.planted, report.truth = compare_ranking(report.effects, ranking)
        return report


def _zeros(cells: Cells) -> float:
    return 1.0 - cells.counts.count_nonzero() / float(np.prod(cells.counts.shape))


def _median_counts(cells: Cells) -> float:
    return float(np.median(np.asarray(cells.counts.sum(axis=1))))


def _probe(features: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """Return the balanced accuracy on held-out cells of a linear classifier fitted on training cells."""
    if len(np.unique(labels[0])) < 2:
        return float("nan")
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import balanced_accuracy_score

    probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features[0], labels[0])
    return float(balanced_accuracy_score(labels[1], probe.predict(features[1])))
