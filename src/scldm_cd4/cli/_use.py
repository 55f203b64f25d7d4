"""Commands that use a trained model: encode, generate, rank, and evaluate what came of it."""

import argparse
import os
from pathlib import Path
from typing import Any

import pandas as pd

from scldm_cd4 import CD4Model, metrics, open_cells, pp
from scldm_cd4._errors import DataError
from scldm_cd4._whole import whole_file
from scldm_cd4.cli._paths import check_free, say, write_table
from scldm_cd4.data.files import open_h5ad
from scldm_cd4.data.labels import read_labels
from scldm_cd4.distributed import generate_divided, merge_units, run_folder
from scldm_cd4.engines import Engine, Ray, Units, local_device
from scldm_cd4.metrics.cells.samples import Keys
from scldm_cd4.units import ENDING, RunFolder

OF_FILES = ("perturbation_key", "context_keys", "control", "layer", "genes", "allow_missing")
"""What `evaluate` is told of files of generated cells."""


def encode(options: argparse.Namespace) -> str:
    """Embed cells."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".npy", ".csv", ".h5ad"))
    model = CD4Model.from_pretrained(options.model, device=options.device)
    copied = options.out is not None and options.out.suffix == ".h5ad"
    adata: Any = open_h5ad(options.data) if copied else open_cells(options.data)
    say(f"embedding {adata.n_obs} cells ...")
    how = {"batch_size": options.batch_size, "allow_missing": options.allow_missing}
    if options.out is not None and options.out.suffix == ".npy":
        with whole_file(options.out) as part:
            model.get_latent(adata, out=part, **how)
        return ""
    z = model.get_latent(adata, **how)
    if options.out is None or options.out.suffix == ".csv":
        table = pd.DataFrame(z, index=adata.obs_names, columns=[f"z{i}" for i in range(z.shape[1])])
        return write_table(table.rename_axis("cell"), options.out, index=True)
    adata.obsm[options.key_added] = z
    with whole_file(options.out) as part:
        adata.write_h5ad(part)
    return ""


def generate(options: argparse.Namespace) -> str:
    """Generate cells."""
    engine = _engine(options)
    if engine is None:
        check_free(options.out, options.overwrite, (".h5ad", ".zarr"))
    conditions = None if options.conditions is None else _read_csv(options.conditions, dtype=object)
    if conditions is not None and "n_cells" in conditions:
        conditions["n_cells"] = pd.to_numeric(conditions["n_cells"], errors="coerce")
    device = options.device if engine is None else local_device(options.device, os.environ)
    model = CD4Model.from_pretrained(options.model, device=device)
    say("generating ...")
    labels = {role: getattr(options, role) for role in ("perturbation", "donor", "timepoint")}
    names = ("output", "guidance", "solver", "n_steps", "batch_size")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    asked = {name: getattr(options, name) for name in ("n_cells", "seed", "out", "overwrite")}
    asked |= {"conditions": conditions, "size_factors": options.size_factor}
    if engine is not None:
        path = generate_divided(model, engine, labels, sampling=how, **asked)
        say(f"cells written to {path}" if path else f"units are in {run_folder(options.out)}, others are not done yet")
        return ""
    cells = model.generate(**labels, **how, **asked)
    say(f"{cells.n_obs} cells written to {options.out}, seed {int(cells.uns['scldm_cd4']['seed'])}")
    return ""


def merge(options: argparse.Namespace) -> str:
    """Join the units of a generation."""
    out = options.out
    if out is None:
        if options.folder.suffix != ENDING:
            raise DataError(f"{options.folder} does not end in {ENDING}: say with --out FILE where the cells go")
        out = options.folder.with_suffix("")
    if out.exists() and not options.folder.exists():
        raise DataError(f"there is no folder {options.folder}; {out} is there, so that its units were joined before")
    run = RunFolder.read(options.folder.resolve())
    if merge_units(run, out.resolve(), overwrite=options.overwrite) is None:
        missing = len(run.cutting()) - run.n_files()
        what = f"{missing} of {len(run.cutting())} units are missing" if missing else "another process is joining them"
        raise DataError(f"{options.folder}: {what}; run the command that generates them again")
    return f"{out}\n"


def _engine(options: argparse.Namespace) -> Engine | None:
    """Return who computes, or None for this process alone."""
    if options.engine is None:
        if given := [name for name in ("address", "share") if getattr(options, name, None) is not None]:
            raise DataError(f"--{given[0]} needs --engine")
        if Units.of(os.environ).count > 1 and "SLURM_ARRAY_TASK_ID" not in os.environ:
            raise DataError("several processes would do the same work: divide it with --engine units")
        return None
    if options.engine == "ray":
        if getattr(options, "share", None) is not None:
            raise DataError("--share is for --engine units; Ray divides the work itself")
        return Ray(options.address)
    if options.address is not None:
        raise DataError("--address is for --engine ray")
    return Units(*options.share) if options.share else Units.of(os.environ)


def rank(options: argparse.Namespace) -> str:
    """Rank perturbations."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".csv",))
    engine = _engine(options)
    target = _signature(options.target)
    model = CD4Model.from_pretrained(options.model, device=options.device)
    say("ranking ...")
    table = model.rank_perturbations(
        target,
        perturbations=options.perturbation,
        donor=options.donor,
        timepoint=options.timepoint,
        direction=options.direction,
        n_cells=options.n_cells,
        seed=options.seed,
        engine=engine,
    )
    named = any(name is not None for name in table.index.names)
    return write_table(table, options.out, index=named)


def evaluate(options: argparse.Namespace) -> str:
    """Score generated cells."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".csv",))
    if options.report is not None:
        check_free(options.report, options.overwrite, (".html",))
    if (options.pred is None) == (options.model is None):
        raise DataError("give either PRED, a file of generated cells, or --model MODEL, which generates them")
    table, cells = _score_files(options) if options.model is None else _score_model(options)
    if options.report is not None:
        say("drawing ...")
        metrics.report(path=options.report, table=table, overwrite=options.overwrite, **cells)
    return write_table(table, options.out)


def _score_files(options: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score generated cells of a file; return the table, and what a page is made of."""
    paths = {"real": options.real, "pred": options.pred, "train": options.train}
    cells: dict[str, Any] = {what: None if path is None else open_h5ad(path) for what, path in paths.items()}
    cells |= {name: getattr(options, name) for name in (*OF_FILES, "min_cells")} | {"seed": options.seed or 0}
    keys = Keys.resolve(cells["pred"], options.perturbation_key, options.context_keys, options.control)
    cells["target_genes"] = _targets(cells["pred"], keys.perturbation)
    say("scoring ...")
    return metrics.evaluate(profile=options.profile, **cells), cells


def _score_model(options: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score what a model generates for the cells that its training held out, likewise."""
    defaults = {"genes": "exact", "allow_missing": False}
    if given := [name for name in ("train", *OF_FILES) if getattr(options, name) != defaults.get(name)]:
        raise DataError(f"--{given[0].replace('_', '-')} is for files of generated cells: leave it out with --model")
    adata = open_cells(options.real)
    model = CD4Model.from_pretrained(options.model, adata=adata, device=options.device)
    train, test, validation = model.train_indices, model.test_indices, model.validation_indices
    if train is None or test is None or validation is None:
        raise DataError(
            f"{options.real} does not hold the cells that {options.model} was trained on, in their order, so that the "
            "held-out ones are not known: give the file that `scldm-cd4 train` was given, or held-out and generated "
            "cells as REAL PRED"
        )
    name, held = ("test", test) if len(test) else ("validation", validation)
    say(f"generating and scoring {len(held)} {name} cells ...")
    seed = options.seed or 0
    table = model.evaluate(profile=options.profile, min_cells=options.min_cells, seed=seed)
    if options.report is None:
        return table, {}
    keys = [*table.attrs["context_keys"], table.attrs["perturbation_key"]]
    conditions = table.drop_duplicates(["context", "perturbation"])
    wanted = conditions.iloc[:, 1 : 1 + len(keys)].set_axis(keys, axis=1).assign(n_cells=conditions["n_real"])
    pred = model.generate(conditions=wanted, seed=seed)  # the same cells again
    cells: dict[str, Any] = {"pred": pred, "target_genes": _targets(pred, keys[-1])}
    for what, rows in (("real", held), ("train", train)):
        cells[what], _ = pp.prepare_query_anndata(adata.to_memory(rows), model)
    return table, cells | {"allow_missing": True, "min_cells": options.min_cells, "seed": table.attrs["seed"]}


def _targets(pred: Any, key: str) -> dict[str, str]:
    """Give the gene of each perturbation that a string column of ``var`` names, and ``var_names`` does not."""
    labels = set(read_labels(pred.obs, key, "perturbation_key")[1]) - set(pred.var_names)
    columns = [pred.var[name] for name in pred.var.select_dtypes(exclude=["number", "bool"])]
    named = [(label, gene) for column in columns for gene, label in column.items() if label in labels]
    return dict(reversed(named))  # the first one counts


def _signature(path: Path) -> pd.Series:
    table = _read_csv(path)
    if table.shape[1] < 2:
        raise DataError(f"{path} needs two columns, gene and weight; it has {table.shape[1]}")
    genes, weights = table.iloc[:, 0].astype(str), pd.to_numeric(table.iloc[:, 1], errors="coerce")
    if weights.isna().any():
        raise DataError(f"{path}: the weight of {genes[weights.isna()].iloc[0]!r} is no number")
    return pd.Series(weights.to_numpy(), index=genes.to_numpy())


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        return pd.read_csv(path, **options)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
