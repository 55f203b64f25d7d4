"""One process of a training, started by torchrun or alone: ddp_script.py OUT BATCH [--resume] [--kill STEP]."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from safetensors.torch import save_file

import scldm_cd4.train.guard as guard
from scldm_cd4 import CD4Model, datasets
from scldm_cd4.train.loaders import CountBatches, LatentBatches


class Kill(pl.Callback):
    """Ends one process as the kernel would, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def log_draws(folder: Path) -> None:
    """Write down which cells are drawn in training."""
    name = folder / f"drawn.{os.environ.get('RANK', 0)}"
    for kind, method in ((CountBatches, "_batch"), (LatentBatches, "__getitem__")):
        setattr(kind, method, logged(kind, method, name))


def logged(kind: type, method: str, name: Path) -> Any:
    """Return the method, with a line for each draw of training."""
    whole = getattr(kind, method)

    def wrapped(self: Any, *args: Any) -> Any:
        if getattr(args[-1], "n_total", None) is not None:
            with name.open("a") as handle:
                handle.write(f"{kind.__name__} {args[-1].epoch} {' '.join(map(str, args[-1].positions))}\n")
        return whole(self, *args)

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("batch", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--stage", default="both")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    guard.SAVE_EVERY = 0.0
    log_draws(options.out)
    cells = datasets.synthetic_cd4(106, 30, n_perturbations=2, n_donors=2, n_timepoints=1, seed=0)
    keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
    CD4Model.setup_anndata(cells, control="NTC", **keys)
    stage = {"ema_decay": 0.9, "balance": 0.0}
    sizes = {"width": 16, "n_tokens": 4, "n_channels": 4, "n_heads": 2, "n_cross_heads": 2}
    flow = {"width": 16, "n_layers": 1, "n_heads": 2}
    model = CD4Model(cells, "tiny", vae=sizes, flow=flow, train_vae=stage | {"refit_theta": False}, train_flow=stage)
    split = np.array(["train"] * 95 + ["validation"] * 11)  # 95: batches and processes get unequal shares
    state = options.out / "state"
    model.train(
        max_epochs=7,
        batch_size=options.batch,
        split=split,
        early_stopping=False,
        progress=False,
        seed=None if options.resume else 0,
        checkpoint_dir=state,
        resume_from=state if options.resume else None,
        callbacks=[] if options.kill is None else [Kill(options.kill)],
    )
    if os.environ.get("RANK", "0") == "0":
        weights = {k: v.contiguous() for k, v in model._state.tensors().items() if k.startswith(("vae.", "dit."))}
        save_file(weights, options.out / "weights.safetensors")
        model.history_["vae"].join(model.history_["flow"], rsuffix="_flow").to_csv(options.out / "history.csv")


if __name__ == "__main__":
    main()
