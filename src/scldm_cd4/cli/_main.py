"""Arguments, errors and exit status of ``scldm-cd4``; the work is imported when a command runs."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TextIO

from scldm_cd4 import __version__
from scldm_cd4._console import LOGGER
from scldm_cd4._errors import DataError, ScldmError
from scldm_cd4.cli._arguments import add_commands, natural, positive
from scldm_cd4.config import PRESETS

FAILED, INTERRUPTED = 2, 130
KEYS = ("perturbation_key", "donor_key", "timepoint_key", "control", "toward")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments; None for those of the process.

    Returns
    -------
    Exit status: 0, 1 for what ``validate`` finds not valid, 2 after an error that a sentence on stderr explains, or 130
    after an interrupt.
    """
    options = _parse(argv)
    try:
        with warnings.catch_warnings(), _lines_told():
            warnings.showwarning = _show_warning
            sys.stdout.write(_run(options))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except (ScldmError, OSError) as error:
        return _fail(str(error), getattr(error, "status", FAILED))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; KEY=VALUE may stand anywhere after ``train``."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.run == "_train:train":
        if options.data is not None and "=" in str(options.data) and not options.data.exists():
            rest, options.data = [str(options.data), *rest], None
        options.overrides = [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in options.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _run(options: argparse.Namespace) -> str:
    if options.run == "demo":
        return _demo(options)
    module, function = options.run.split(":")
    return str(getattr(import_module(f"scldm_cd4.cli.{module}"), function)(options))


def _demo(options: argparse.Namespace) -> str:
    given = [name for name in KEYS if getattr(options, name) is not None]
    if options.data is None and given:
        raise DataError(f"--{given[0].replace('_', '-')} describes cells of your own: give them with --data FILE")
    if options.data is not None and (options.perturbation_key is None or options.control is None):
        raise DataError(
            "--data needs --perturbation-key (the obs column of the perturbations) and --control (its label of "
            "unperturbed cells)"
        )
    from scldm_cd4.cli._demo import run_demo

    return run_demo(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scldm-cd4", description="Generate and rank CD4+ T cell perturbation responses."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the whole main job on simulated cells or on yours",
        description="Set up, train, embed, generate, rank, save and reload; score generated beside held-out real "
        "cells. Without --data the cells are SIMULATED, and all files and figures say so.",
        epilog="example: scldm-cd4 demo --data cells.h5ad --perturbation-key target --donor-key donor --control NTC",
    )
    demo.set_defaults(run="demo")
    own = demo.add_argument_group("cells of your own")
    own.add_argument("--data", type=Path, metavar="FILE", help="h5ad with raw counts in X")
    own.add_argument("--perturbation-key", metavar="COLUMN", help="obs column of the perturbations")
    own.add_argument("--donor-key", metavar="COLUMN", help="obs column of the donors")
    own.add_argument("--timepoint-key", metavar="COLUMN", help="obs column of the time points")
    own.add_argument("--control", metavar="LABEL", help="the perturbation label of unperturbed cells")
    own.add_argument(
        "--toward",
        metavar="LABEL",
        help="rank toward the effect of this perturbation (default: the one that shifts most)",
    )
    simulated = demo.add_argument_group("simulated cells")
    simulated.add_argument("--n-cells", type=positive, default=8000, metavar="N", help="default %(default)s")
    simulated.add_argument("--n-genes", type=positive, default=500, metavar="N", help="default %(default)s")
    simulated.add_argument("--n-perturbations", type=positive, default=20, metavar="N", help="default %(default)s")
    demo.add_argument(
        "--out", type=Path, default=Path("scldm_cd4_demo"), metavar="DIR", help="folder to write (default %(default)s)"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in --out")
    demo.add_argument("--preset", choices=sorted(PRESETS), default="small", help="size of the model (default small)")
    demo.add_argument("--max-epochs", type=positive, metavar="N", help="of each stage, in place of the preset's")
    demo.add_argument("--seed", type=natural, default=0, metavar="N", help="of everything drawn (default 0)")
    add_commands(commands)
    return parser


@contextmanager
def _lines_told() -> Iterator[None]:
    """Write to stderr what long work tells the logger where there is no bar, such as in the log of a batch job."""
    handler, level = logging.StreamHandler(sys.stderr), LOGGER.level
    handler.setFormatter(logging.Formatter("scldm-cd4: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"scldm-cd4: {message}\n")
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(f"scldm-cd4: warning: {message}\n")
