"""Commands that use a trained model: encode, generate, rank, and evaluate what came of it."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import CD4Model, metrics
from scldm_cd4._errors import DataError
from scldm_cd4.cli._paths import check_free, say, write_table, write_whole
from scldm_cd4.data.files import open_h5ad


def encode(options: argparse.Namespace) -> str:
    """Embed cells."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".npy", ".csv", ".h5ad"))
    model = CD4Model.from_pretrained(options.model, device=options.device)
    adata = open_h5ad(options.data, backed=options.out is None or options.out.suffix != ".h5ad")
    say(f"embedding {adata.n_obs} cells ...")
    z = model.get_latent(adata, batch_size=options.batch_size, allow_missing=options.allow_missing)
    if options.out is None or options.out.suffix == ".csv":
        table = pd.DataFrame(z, index=adata.obs_names, columns=[f"z{i}" for i in range(z.shape[1])])
        return write_table(table.rename_axis("cell"), options.out, index=True)
    if options.out.suffix == ".npy":
        write_whole(options.out, lambda part: np.save(part, z, allow_pickle=False))
        return ""
    adata.obsm[options.key_added] = z
    write_whole(options.out, adata.write_h5ad)
    return ""


def generate(options: argparse.Namespace) -> str:
    """Generate cells."""
    check_free(options.out, options.overwrite, (".h5ad",))
    conditions = None if options.conditions is None else _read_csv(options.conditions, dtype=object)
    if conditions is not None and "n_cells" in conditions:
        conditions["n_cells"] = pd.to_numeric(conditions["n_cells"], errors="coerce")
    model = CD4Model.from_pretrained(options.model, device=options.device)
    say("generating ...")
    cells = model.generate(
        options.perturbation,
        options.donor,
        options.timepoint,
        n_cells=options.n_cells,
        conditions=conditions,
        output=options.output,
        guidance=options.guidance,
        solver=options.solver,
        n_steps=options.n_steps,
        size_factors=options.size_factor,
        seed=options.seed,
        batch_size=options.batch_size,
        out=options.out,
        overwrite=options.overwrite,
    )
    say(f"{cells.n_obs} cells written to {options.out}, seed {int(cells.uns['scldm_cd4']['seed'])}")
    return ""


def rank(options: argparse.Namespace) -> str:
    """Rank perturbations."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".csv",))
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
    )
    named = any(name is not None for name in table.index.names)
    return write_table(table, options.out, index=named)


def evaluate(options: argparse.Namespace) -> str:
    """Score generated cells."""
    if options.out is not None:
        check_free(options.out, options.overwrite, (".csv",))
    if options.report is not None:
        check_free(options.report, options.overwrite, (".html",))
    paths = (options.real, options.pred, options.train)
    real, pred, train = (None if path is None else open_h5ad(path) for path in paths)
    say("scoring ...")
    shared: dict[str, Any] = {
        "train": train,
        "perturbation_key": options.perturbation_key,
        "context_keys": options.context_keys,
        "control": options.control,
        "allow_missing": options.allow_missing,
        "seed": options.seed or 0,
    }
    table = metrics.evaluate(real, pred, profile=options.profile, **shared)
    if options.report is not None:
        say("drawing ...")
        metrics.report(real, pred, options.report, table=table, overwrite=options.overwrite, **shared)
    return write_table(table, options.out)


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
