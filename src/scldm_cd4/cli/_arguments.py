"""Arguments of the commands beside the demo; imports nothing heavy."""

import argparse
from pathlib import Path

from scldm_cd4.config import PRESETS

KEYS = ("perturbation_key", "donor_key", "timepoint_key", "control", "layer")
"""What `setup_anndata` is told of cells."""
MODEL = "a saved model, a folder of the reference's layout, or org/name on the hub"
EXAMPLES = {
    "train": "scldm-cd4 train cells.h5ad --out model --perturbation-key target --donor-key donor --control NTC",
    "encode": "scldm-cd4 encode model cells.h5ad --out latents.npy",
    "generate": "scldm-cd4 generate model --perturbation GATA3 NTC --donor D1 --n-cells 500 --out generated.h5ad",
    "merge": "scldm-cd4 merge generated.h5ad.units",
    "rank": "scldm-cd4 rank model --target signature.csv --timepoint Stim8hr > ranking.csv",
    "evaluate": "scldm-cd4 evaluate cells.h5ad --model model --out scores.csv --report report.html",
    "convert": "scldm-cd4 convert released_folder model --vocabulary train.h5ad",
    "info": "scldm-cd4 info model --json",
    "validate": "scldm-cd4 validate cells.h5ad --perturbation-key target --control NTC",
}


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if (value := natural(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def natural(text: str) -> int:
    """Read a whole number."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def share(text: str) -> tuple[int, int]:
    """Read I/N."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, not {text!r}")
    return int(index), int(count)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add all commands beside the demo."""
    for add in (_train, _encode, _generate, _merge, _rank, _evaluate, _convert, _info, _validate):
        add(commands)


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, long: str, run: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=long, epilog=f"example: {EXAMPLES[name]}"
    )
    parser.set_defaults(run=run)
    return parser


def _train(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "train",
        "train a model on an h5ad file of raw counts",
        "Train the autoencoder and the flow, by a preset, or by a config in the style of the reference (--config-name; "
        "needs the extra hydra), which trains its one stage and takes changes as KEY=VALUE. The path of the model goes "
        "to stdout. A training that was killed goes on with --resume to the same weights. Runs under torchrun, SLURM.",
        "_train:train",
    )
    p.add_argument("data", type=Path, metavar="DATA", nargs="?", help="h5ad; default: the config's train_adata_path")
    p.add_argument("--stream", action="store_true", help="leave the counts in the file (as for a zarr store)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the model")
    p.add_argument("--preset", choices=sorted(PRESETS), help="size and training (default small)")
    p.add_argument("--config-name", metavar="NAME", help="cd4_vae, cd4_fm, or one in --config-dir such as marson_vae")
    p.add_argument("--config-dir", type=Path, metavar="DIR", help="folder of configs; default: the packaged ones")
    p.add_argument("--vae", metavar="MODEL", help=f"trained autoencoder for the flow: {MODEL}")
    p.add_argument("--allow-pickle", action="store_true", help="read a --vae that is a Lightning .ckpt")
    p.add_argument("--stage", choices=("both", "vae", "flow"), help="stage to train with a preset (default both)")
    _keys(p)
    p.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="cells of every condition kept for test")
    p.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="default %(default)s")
    p.add_argument("--max-epochs", type=positive, metavar="N", help="of each stage")
    p.add_argument("--batch-size", type=positive, metavar="N", help="cells per step and process")
    p.add_argument("--num-workers", type=natural, default=0, metavar="N", help="processes that prepare batches")
    p.add_argument("--resume", action="store_true", help="go on with a training to the same --out that did not end")
    _common(p)


def _encode(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "encode",
        "embed cells",
        "Write the latents of cells: .npy (float32, cells x numbers), .csv with cell names, or .h5ad (the cells with "
        "obsm). Without --out, CSV goes to stdout.",
        "_use:encode",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("data", type=Path, metavar="DATA", help="h5ad with raw counts; genes are matched by name")
    p.add_argument("--out", type=Path, metavar="FILE", help=".npy, .csv or .h5ad")
    p.add_argument("--key-added", default="X_scldm_cd4", metavar="KEY", help="place in obsm (default %(default)s)")
    p.add_argument("--allow-missing", action="store_true", help="accept that up to half of the genes are missing")
    p.add_argument("--batch-size", type=positive, metavar="N", help="cells at a time")
    _common(p)


def _generate(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "generate",
        "generate cells of conditions",
        "Generate cells. Labels left out stand for all that were trained.",
        "_use:generate",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=".h5ad or .zarr to write")
    _labels(p)
    p.add_argument("--conditions", type=Path, metavar="CSV", help="one condition per row, optionally with n_cells")
    p.add_argument("--n-cells", type=positive, metavar="N", help="per condition (default 100)")
    p.add_argument("--output", choices=("counts", "mean", "lognorm", "latent"), default="counts", help="what X holds")
    p.add_argument("--guidance", type=float, default=1.0, metavar="W", help="1 conditional, 0 unconditional")
    p.add_argument("--solver", metavar="NAME", help="default midpoint")
    p.add_argument(
        "--n-steps", type=positive, metavar="N", help="steps of the solver (default 6; 10 for imported weights)"
    )
    p.add_argument("--size-factor", type=float, metavar="COUNTS", help="counts per cell; default: drawn as in training")
    p.add_argument("--batch-size", type=positive, metavar="N", help="cells at a time")
    _engine(p, ("ray", "units"))
    p.add_argument(
        "--share",
        type=share,
        metavar="I/N",
        help="with --engine units: the units of process I (from 0) of N; default: as torchrun or SLURM say",
    )
    _common(p)


def _merge(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "merge",
        "join the units of a generation in one file",
        "Join the units that `generate --engine` left in a folder, once all are there, and delete the folder. The last "
        "process does so by itself; this is for runs whose last process was killed.",
        "_use:merge",
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="the folder of the units, FILE.units")
    p.add_argument("--out", type=Path, metavar="FILE", help=".h5ad or .zarr; default: the folder without .units")
    _common(p)


def _rank(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "rank",
        "rank perturbations toward a wanted effect",
        "Rank perturbations by how far their generated effects lead toward a signature. CSV goes to stdout or --out.",
        "_use:rank",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--target", type=Path, required=True, metavar="CSV", help="two columns: gene, weight")
    p.add_argument("--out", type=Path, metavar="FILE", help="CSV to write")
    _labels(p, several=False)
    p.add_argument("--direction", choices=("toward", "away"), default="toward", help="default %(default)s")
    p.add_argument("--n-cells", type=positive, default=200, metavar="N", help="per condition (default %(default)s)")
    _engine(p, ("ray",))
    _common(p)


def _evaluate(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "evaluate",
        "score generated cells beside held-out real ones, with baselines",
        "Score a model on the cells that its training held out: evaluate REAL --model MODEL, with the file that it was "
        "trained on. Or generated cells of any model: evaluate REAL PRED --train FILE, with REAL held out and FILE "
        "trained on. One row per condition and metric, beside floor, ceiling and baselines. CSV goes to stdout or "
        "--out.",
        "_use:evaluate",
    )
    p.add_argument(
        "real", type=Path, metavar="REAL", help="h5ad of held-out cells with their controls; with --model, of all cells"
    )
    p.add_argument("pred", type=Path, metavar="PRED", nargs="?", help="h5ad of generated cells")
    p.add_argument(
        "--model", metavar="MODEL", help="in place of PRED: what this model generates for its held-out cells"
    )
    p.add_argument("--train", type=Path, metavar="FILE", help="h5ad of the training cells, which baselines need")
    p.add_argument("--out", type=Path, metavar="FILE", help="CSV to write")
    p.add_argument("--report", type=Path, metavar="FILE", help="HTML page with figures to write beside")
    p.add_argument("--profile", default="paper", metavar="NAME", help="set of metrics (default %(default)s)")
    p.add_argument("--perturbation-key", metavar="COLUMN", help="default: as the generated cells say")
    p.add_argument("--allow-missing", action="store_true", help="score the conditions that both files have")
    p.add_argument("--context-keys", nargs="+", metavar="COLUMN", help="default: as the generated cells say")
    p.add_argument("--control", metavar="LABEL", help="default: as the generated cells say")
    p.add_argument(
        "--layer", metavar="NAME", help="layer of the raw counts in files that have it; default: as they say, else X"
    )
    p.add_argument("--genes", choices=("exact", "intersection"), default="exact", help="default %(default)s")
    p.add_argument(
        "--min-cells", type=positive, default=10, metavar="N", help="of a condition to be scored (default %(default)s)"
    )
    _common(p)


def _convert(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "convert",
        "turn a reference checkpoint into a saved model, or back",
        "Read a model from one layout and write the other. A reference checkpoint needs its vocabulary.",
        "_files:convert",
    )
    p.add_argument("source", metavar="MODEL", help=MODEL)
    p.add_argument("out", type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--to", choices=("native", "reference"), default="native", help="layout (default %(default)s)")
    p.add_argument("--vocabulary", metavar="FILE", help="training h5ad, or JSON of genes and labels")
    p.add_argument("--size-factors", type=Path, metavar="PATH", help="JSON, or folder of the reference's two pickles")
    p.add_argument("--control", metavar="LABEL", help="the perturbation label of unperturbed cells")
    p.add_argument("--weights", choices=("auto", "ema", "online"), default="auto", help="copy of the flow's weights")
    p.add_argument("--allow-pickle", action="store_true", help="read a Lightning .ckpt; nothing in it is run")
    p.add_argument("--revision", metavar="NAME", help="of a model on the hub")
    _common(p)


def _info(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "info",
        "tell what a model knows, or what a run will take",
        "Tell genes, labels, sizes and training of a model; with --plan, hours, memory and disk of training and of "
        "generating cells.",
        "_files:info",
    )
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    p.add_argument("--json", action="store_true", help="as JSON, with all labels")
    plan = p.add_argument_group("with --plan")
    plan.add_argument("--plan", action="store_true", help="tell what training and generating take")
    plan.add_argument("--preset", choices=sorted(PRESETS), help="in place of a MODEL (default cd4)")
    plan.add_argument("--n-cells", type=positive, metavar="N", help="training cells")
    plan.add_argument("--n-genes", type=positive, metavar="N", help="default: those of the MODEL")
    plan.add_argument("--n-generated", type=positive, metavar="N", help="default: as many as training cells")
    plan.add_argument("--machine", default="this", metavar="NAME", help="H200, H100, or this one after a short probe")
    plan.add_argument(
        "--devices", type=positive, metavar="N", help="devices of that name, or cores (default 1, or all)"
    )
    plan.add_argument("--batch-size", type=positive, metavar="N", help="cells per step and device in training")
    plan.add_argument("--solver", metavar="NAME", help="default: as generate")
    plan.add_argument("--n-steps", type=positive, metavar="N", help="default: as generate")
    plan.add_argument(
        "--density", type=float, default=0.13, metavar="SHARE", help="counts above 0 (default %(default)s)"
    )
    _common(p)


def _validate(commands: argparse._SubParsersAction) -> None:
    p = _command(
        commands,
        "validate",
        "check a saved model, or cells before training",
        "Check every file of a model, or every count and label of an h5ad file. Exit status 1 where it is not valid.",
        "_files:validate",
    )
    p.add_argument("path", metavar="PATH", help=f"h5ad, or {MODEL}")
    p.add_argument("--model", metavar="MODEL", help="check that cells fit this model")
    _keys(p)
    _common(p)


def _keys(p: argparse.ArgumentParser) -> None:
    p.add_argument("--perturbation-key", metavar="COLUMN", help="obs column of the perturbations")
    p.add_argument("--donor-key", metavar="COLUMN", help="obs column of the donors")
    p.add_argument("--timepoint-key", metavar="COLUMN", help="obs column of the time points")
    p.add_argument("--control", metavar="LABEL", help="the perturbation label of unperturbed cells")
    p.add_argument("--layer", metavar="NAME", help="layer of the raw counts (default X)")


def _labels(p: argparse.ArgumentParser, *, several: bool = True) -> None:
    nargs = "+" if several else None
    p.add_argument("--perturbation", nargs="+", metavar="LABEL", help="one or several; default all")
    p.add_argument("--donor", nargs=nargs, metavar="LABEL", help="default all" + ("" if several else "; or 'each'"))
    p.add_argument("--timepoint", nargs=nargs, metavar="LABEL", help="default all" + ("" if several else "; or 'each'"))


def _engine(p: argparse.ArgumentParser, engines: tuple[str, ...]) -> None:
    about = "Ray's workers compute (needs the extra ray)"
    if "units" in engines:
        about += "; or units: the processes of torchrun, srun or a SLURM array; a killed run goes on when run again"
    p.add_argument("--engine", choices=engines, help=about)
    p.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, such as auto; default: this machine")


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=natural, metavar="N", help="of everything drawn; default: drawn and recorded")
    p.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:0, ... (default %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote to --out")
