"""Commands that look at files or change their layout: convert, info, validate."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from scldm_cd4 import CD4Model
from scldm_cd4._errors import DataError, ScldmError
from scldm_cd4.cli._arguments import KEYS
from scldm_cd4.cli._paths import say
from scldm_cd4.config import PRESETS
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.files import open_h5ad


class NotValid(ScldmError):
    """What was to be checked is not valid."""

    status = 1


def convert(options: argparse.Namespace) -> str:
    """Write a model in the other layout."""
    given = {name: getattr(options, name) for name in ("vocabulary", "size_factors", "control", "revision")}
    if options.weights != "auto":
        given["weights"] = options.weights
    model = CD4Model.from_pretrained(options.source, **given, allow_pickle=options.allow_pickle, device="cpu")
    say(f"writing the {options.to} layout ...")
    write = model.save if options.to == "native" else model.export_reference
    write(options.out, overwrite=options.overwrite)
    return f"{options.out}\n"


def info(options: argparse.Namespace) -> str:
    """Tell what a model knows, or what a run will take."""
    if options.plan:
        return _plan(options)
    if options.model is None:
        raise DataError("say which MODEL, or ask for a --plan")
    model = CD4Model.from_pretrained(options.model, device="cpu")
    if not options.json:
        return f"{model!r}\n"
    values = {
        "registry": model.registry,
        "config": model.config.to_dict(),
        "training": model.training_,
        "trained": model.is_trained_,
        "parameters": sum(t.numel() for t in model._state.tensors().values()),
        "hash": model._state.fingerprint(),
    }
    return json.dumps(values, indent=1) + "\n"


def _plan(options: argparse.Namespace) -> str:
    """Tell what training on cells and generating cells take."""
    from scldm_cd4 import planning

    if options.n_cells is None:
        raise DataError("--plan needs --n-cells, the number of training cells")
    n_genes, config = options.n_genes, PRESETS[options.preset or "cd4"]
    if options.model is not None:
        if options.preset is not None:
            raise DataError("give a MODEL or a --preset, not both")
        model = CD4Model.from_pretrained(options.model, device="cpu")
        n_genes, config = n_genes or len(model.registry["genes"]), model.config
    if n_genes is None:
        raise DataError("--plan needs --n-genes where there is no MODEL")
    here = options.machine == "this"
    work = planning.measure(config, n_genes, seconds=2.0 if here else 0.0)
    machine = planning.this_machine(work) if here else planning.named_machine(options.machine, options.devices or 1)
    if here and options.devices is not None:
        machine = replace(machine, n_devices=options.devices)
    given = {name: getattr(options, name) for name in ("n_cells", "n_generated", "solver", "n_steps", "density")}
    table = planning.plan(config, work, machine, n_genes=n_genes, batch_size=options.batch_size, **given)
    if options.json:
        return json.dumps({"stages": table.to_dict("index"), **table.attrs}, indent=1) + "\n"
    return f"{planning.sentences(table)}\n"


def validate(options: argparse.Namespace) -> str:
    """Check a model or cells."""
    path = Path(options.path)
    try:
        return _valid_cells(path, options) if path.suffix == ".h5ad" else _valid_model(options.path)
    except (ScldmError, OSError) as error:
        raise NotValid(f"{options.path} is not valid: {error}") from error


def _valid_model(source: str) -> str:
    model = CD4Model.from_pretrained(source, device="cpu")
    if wrong := [name for name, t in model._state.tensors().items() if not bool(t.isfinite().all())]:
        raise DataError(f"these weights are not finite: {', '.join(wrong[:5])}")
    return f"valid model: {len(model.registry['genes'])} genes, hash {model._state.fingerprint()}\n"


def _valid_cells(path: Path, options: argparse.Namespace) -> str:
    given: dict[str, Any] = {name: getattr(options, name) for name in KEYS if getattr(options, name) is not None}
    if "perturbation_key" not in given and options.model is None:
        raise DataError("cells are checked with --perturbation-key (the obs column of the perturbations) or --model")
    adata = open_h5ad(path)
    if "perturbation_key" in given:
        CD4Model.setup_anndata(adata, **given)
    text = f"valid cells: {adata.n_obs} cells x {adata.n_vars} genes of raw counts"
    if options.model is not None:
        model = CD4Model.from_pretrained(options.model, device="cpu")
        report = CellData.from_adata(adata, model._state.registry).report
        text += f"; {report}"
    return f"{text}\n"
