"""What a model is made of: configuration, registry, networks, history; trained, written and read here."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from scldm_cd4._errors import CheckpointError, TrainingError
from scldm_cd4.checkpoint.card import model_card
from scldm_cd4.checkpoint.export import export_reference
from scldm_cd4.checkpoint.native import load_folder, save_folder
from scldm_cd4.checkpoint.pretrained import Pretrained
from scldm_cd4.config import ModelConfig
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.splits import Split
from scldm_cd4.familiarity import Familiarity
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.registry import Registry
from scldm_cd4.train.rng import isolated_rng

if TYPE_CHECKING:
    from scldm_cd4.train.runner import TrainResult

PARTS = ("vae", "dit")
PARTS_OF_CELLS = "split.parts"
"""Name of the tensor that says which cells trained and which were held out."""


@dataclass
class State:
    """A model, trained or not."""

    config: ModelConfig
    registry: Registry
    vae: VAE | None = None
    dit: DiT | None = None
    history: dict[str, pd.DataFrame] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    """Plain facts on the training: seed, seconds, cells, notes."""
    familiarity: Familiarity | None = None
    """Training cells to set query cells against; None in imported and early models."""
    split: Split | None = None
    """Which cells trained and which were held out; None in imported and early models."""

    def train(self, cells: CellData, split: Split, *, seed: int, stage: str, **options: Any) -> "TrainResult":
        """Train stages on fresh networks, which replace the old ones; see `scldm_cd4.CD4Model.train`.

        After an exception, a model that could generate is as it was before. One that could not has the last good
        weights of the stages that made some steps; an autoencoder that it had stays where the new one did not end. An
        interrupt keeps the weights of the moment, but for a model that could generate where the new autoencoder did not
        end.
        """
        from scldm_cd4.train.runner import TrainResult, fit

        vae = self.vae if stage == "flow" and self.vae is not None else self._new_vae(seed)
        start = {k: v.clone() for k, v in vae.state_dict().items()}
        made: list[DiT] = []
        registry = self.registry.with_training(_labels(cells, split.train), library_sizes(cells, split.train))
        result = TrainResult()

        def new_dit() -> DiT:
            made.append(self._new_dit())
            return made[-1]

        def take(dit: DiT | None, *, ended: bool) -> None:
            if vae is not self.vae:
                self.dit, self.history, self.record = None, {}, {}
                self.familiarity = Familiarity.fit(vae.eval(), cells, split, seed) if ended else None
            self.vae, self.registry, self.split = vae.eval(), registry, split
            self.dit = self.dit if dit is None else dit.eval()
            self.history |= result.history
            self.record.pop("reliability", None)
            self._remember(result, split)

        try:
            fit(vae, new_dit, cells, split, self.config, seed=seed, stage=stage, result=result, **options)  # type: ignore[arg-type]
        except BaseException as error:
            ended = vae is self.vae or "vae" in result.trained
            if self.dit is None and (self.vae is None or ended):
                good = made if isinstance(error, TrainingError) else []  # which puts back the last good weights
                dit = next((dit for dit in good if any(p.abs().max() > 0 for p in dit.final_layer.parameters())), None)
                if dit is not None or _moved(vae, start):
                    take(dit, ended=ended)
            raise
        kept = result.interrupted and result.dit is None and self.dit is not None
        if not kept:
            take(result.dit, ended=True)
        if result.interrupted:
            what = "is as it was before" if kept else "holds the weights of that moment"
            warnings.warn(
                f"the training was interrupted and the model {what}: train(resume_from=...) goes on where "
                "checkpoint_dir= was given",
                UserWarning,
                stacklevel=3,
            )
        return result

    def _new_vae(self, seed: int) -> VAE:
        with isolated_rng(seed):
            return VAE(self.config.vae, self.registry.n_genes, self.registry.vocabulary)

    def _new_dit(self) -> DiT:
        vae = self.config.vae
        return DiT(self.config.flow, vae.latent_tokens, vae.n_channels, self.registry.vocabulary)

    def new_networks(self) -> tuple[VAE, DiT]:
        """Return networks of the right shapes, to be filled with weights."""
        with isolated_rng(0):
            return self._new_vae(0), self._new_dit()

    def _remember(self, result: "TrainResult", split: Split) -> None:
        facts = {"seed": result.seed, "split": split.spec}
        for name in result.history:
            facts["interrupted"] = not result.trained[name]
            other = "flow:" if name == "vae" else "vae:"
            facts["notes"] = [note for note in result.notes if not note.startswith(other)]
            numbers = {k: getattr(result, k).get(name) for k in ("seconds", "batch_size", "n_steps")}
            self.record[name] = facts | {k: v for k, v in numbers.items() if v is not None}

    def to(self, device: torch.device) -> None:
        """Move the networks."""
        for part in PARTS:
            network = getattr(self, part)
            if network is not None:
                network.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name."""
        networks = {part: getattr(self, part) for part in PARTS}
        return {f"{p}.{k}": v for p, net in networks.items() if net is not None for k, v in net.state_dict().items()}

    def fingerprint(self) -> str:
        """Return a hash of weights, genes and levels."""
        digest = hashlib.sha256(repr((self.registry.genes, [a.levels for a in self.registry.attributes])).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, *, overwrite: bool = False, scores: pd.DataFrame | None = None) -> Path:
        """Write a folder; see `scldm_cd4.checkpoint.native`. The model card shows `scores`."""
        n_parameters = sum(v.numel() for v in self.tensors().values())
        history = {name: {"epoch": list(t.index), **t.to_dict("list")} for name, t in self.history.items()}
        return save_folder(
            path,
            tensors=self.tensors() | self._kept(),
            config={"model": self.config.to_dict(), "parts": [p for p in PARTS if getattr(self, p) is not None]},
            registry=self.registry.to_dict(),
            history={
                "epochs": history,
                "training": self.record,
                "split": None if self.split is None else self.split.spec,
            },
            readme=model_card(
                self.config, self.registry, self.history, self.record, n_parameters=n_parameters, scores=scores
            ),
            overwrite=overwrite,
        )

    def _kept(self) -> dict[str, Tensor]:
        kept = {} if self.familiarity is None else self.familiarity.tensors()
        split = {} if self.split is None else {PARTS_OF_CELLS: torch.from_numpy(self.split.parts)}
        return {f"familiarity.{name}": value for name, value in kept.items()} | split

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Read a folder.

        Raises
        ------
        CheckpointError
            The folder is missing or damaged.
        """
        saved = load_folder(path)
        try:
            config = ModelConfig.from_dict(saved.config["model"])
            parts = [str(part) for part in saved.config["parts"]]
            history = {name: _table(columns) for name, columns in saved.history["epochs"].items()}
            record = dict(saved.history["training"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the saved model at {path} is damaged: {error!r}") from error
        state = cls(config, Registry.from_dict(saved.registry), history=history, record=record)
        networks = dict(zip(PARTS, state.new_networks(), strict=True))
        for part in parts:
            if part not in networks:
                raise CheckpointError(f"the saved model at {path} has an unknown part {part!r}")
            own = {k.removeprefix(f"{part}."): v for k, v in saved.tensors.items() if k.startswith(f"{part}.")}
            try:
                setattr(state, part, _fill(networks[part], own))
            except RuntimeError as error:
                raise CheckpointError(f"the weights of {path} do not fit its configuration: {error}") from error
        if kept := {
            k.removeprefix("familiarity."): v for k, v in saved.tensors.items() if k.startswith("familiarity.")
        }:
            vae = state.config.vae
            state.familiarity = Familiarity.from_tensors(kept, vae.latent_tokens * vae.n_channels)
        if PARTS_OF_CELLS in saved.tensors:
            state.split = Split.saved(saved.tensors[PARTS_OF_CELLS].numpy(), saved.history.get("split"))
        return state

    @classmethod
    def of(cls, found: Pretrained) -> "State":
        """Build the networks of a checkpoint of the reference."""
        state = cls(found.config, found.registry, record={"pretrained": found.facts})
        with isolated_rng(0):
            state.vae = _fill(state._new_vae(0), found.vae_state)
            state.dit = _fill(state._new_dit(), found.dit_state) if found.dit_state else None
        return state

    def export(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the reference's layout; see `scldm_cd4.checkpoint.export`."""
        assert self.vae is not None
        dit = {} if self.dit is None else self.dit.state_dict()
        return export_reference(
            path, self.config, self.registry, self.vae.state_dict(), dit, record=self.record, overwrite=overwrite
        )


def library_sizes(cells: CellData, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the library sizes of some cells to draw from in generation.

    These are the counts on the panel; or declared size factors, scaled to add up to these, since shares of the panel
    times a library size are the counts that the decoder expects.
    """
    totals = cells.totals[rows]
    if cells.registry.size_factor_key is None:
        return totals
    declared = cells.library[rows]
    return declared * (totals.sum() / declared.sum())


def _labels(cells: CellData, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the codes of some cells in half the memory, by column."""
    assert cells.labels is not None
    codes = np.empty((cells.labels.shape[1], len(rows)), dtype=np.int32)
    for own, column in zip(codes, cells.labels.T, strict=True):
        own[:] = column[rows]
    return codes.T


def _moved(network: torch.nn.Module, start: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(v.cpu(), start[k].cpu()) for k, v in network.state_dict().items())


def _table(columns: Mapping[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame({name: values for name, values in columns.items() if name != "epoch"}, dtype="float64")
    return table.set_index(pd.Index(columns["epoch"], dtype="int64", name="epoch"))


def _fill(network: Any, weights: Mapping[str, Tensor]) -> Any:
    network.load_state_dict(weights)
    return network.eval()
