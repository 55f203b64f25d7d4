"""What every use of a model stands on: state, device, looking at it."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scldm_cd4 import __version__
from scldm_cd4._errors import DataError, NotTrainedError
from scldm_cd4._precision import choose
from scldm_cd4._settings import settings
from scldm_cd4._state import State
from scldm_cd4.config import PRESETS, STAGES, ModelConfig
from scldm_cd4.data.cells import CellData, identity, registered
from scldm_cd4.data.mudata import as_anndata, is_mudata
from scldm_cd4.data.splits import Split
from scldm_cd4.generation import Trained
from scldm_cd4.nn import VAE
from scldm_cd4.registry import Registry
from scldm_cd4.sampling import CAREFUL_STEPS, Sampling


class ModelBase:
    """A model without its verbs."""

    adata: Any
    """The cells that the model was built or loaded with; None without."""
    mdata: Any
    """The MuData that the cells in `adata` came with; None for an AnnData."""

    def _start(self, state: State, adata: Any, device: Any) -> None:
        self.mdata = adata if is_mudata(adata) else None
        self.adata = as_anndata(adata)
        self._state = state
        state.registry = registered(state.registry, self.adata)
        self._split = self._saved_split()
        self._hash: str | None = None
        self.to_device(device)

    def _saved_split(self) -> Split | None:
        """Return the split of the training, where the cells of the model are those that it was of."""
        split = self._state.split
        if split is None or self.adata is None:
            return None
        return split if split.spec["cells"] == identity(self.adata, self._state.registry) else None

    def _known_split(self) -> Split | None:
        """Return the split of the training, or None; raise DataError where cells were changed in place since."""
        if self._split is not None and self._split.spec["cells"] != identity(self.adata, self._state.registry):
            raise DataError(
                "the cells of this model were filtered, reordered, renamed or relabelled in place since training, so "
                "it is not known which of them it has seen. Save the model and load it with the cells as they were, "
                "CD4Model.load(folder, adata); evaluate also takes cells as adata= and train="
            )
        return self._split

    @property
    def registry(self) -> dict[str, Any]:
        """Genes, vocabularies, control, library sizes and training cells as plain values."""
        return self._state.registry.to_dict()

    @property
    def config(self) -> ModelConfig:
        """Sizes and training settings."""
        return self._state.config

    @property
    def perturbations(self) -> tuple[str, ...]:
        """The levels of the perturbation, the control among them."""
        return self._state.registry.perturbation.levels

    @property
    def donors(self) -> tuple[str, ...]:
        """The levels of the donor."""
        return self._state.registry.donor.levels

    @property
    def timepoints(self) -> tuple[str, ...]:
        """The levels of the time point."""
        return self._state.registry.timepoint.levels

    @property
    def is_trained_(self) -> bool:
        """Whether both stages are trained."""
        return self._state.vae is not None and self._state.dit is not None

    @property
    def history_(self) -> dict[str, pd.DataFrame]:
        """Losses by epoch, by stage (``vae``, ``flow``)."""
        return self._state.history

    is_trained, history = is_trained_, history_

    @property
    def training_(self) -> dict[str, Any]:
        """Facts on the training by stage (seed, seconds, steps, split, notes)."""
        return self._state.record

    @property
    def train_indices(self) -> np.ndarray | None:
        """Rows of `adata` with the training cells; None before training, or loaded with other cells.

        Of a MuData, they are rows of the modality with the counts: ``model.adata[model.train_indices]``. Where cells
        were filtered, reordered, renamed or relabelled in place since, this raises DataError.
        """
        split = self._known_split()
        return None if split is None else split.train

    @property
    def validation_indices(self) -> np.ndarray | None:
        """Rows of `adata` with the validation cells; see `train_indices`."""
        split = self._known_split()
        return None if split is None else split.validation

    @property
    def test_indices(self) -> np.ndarray | None:
        """Rows of `adata` with the cells that training never saw; see `train_indices`."""
        split = self._known_split()
        return None if split is None else split.test

    def to_device(self, device: Any) -> None:
        """Move the model to a device.

        Parameters
        ----------
        device
            For example ``"cuda:0"``, ``"cpu"`` or ``"auto"``.

        Raises
        ------
        DataError
            There is no such device.

        Examples
        --------
        >>> model.to_device("cpu")
        >>> model.device
        device(type='cpu')
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._device = torch.device(device)
            self._state.to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise DataError(f"there is no device {device!r}: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._device

    def view_anndata_setup(self) -> pd.DataFrame:
        """Return what was declared, as a table.

        Returns
        -------
        One row per attribute, genes, counts and control: ``key``, ``levels`` (their number), ``first`` (some of them).

        Examples
        --------
        >>> model.view_anndata_setup().loc["perturbation", "key"]
        'perturbation'
        """
        registry = self._state.registry
        rows = [(a.role, a.column or "", len(a), ", ".join(a.levels[:5])) for a in registry.attributes]
        rows.append(("genes", registry.gene_id_key or "var_names", registry.n_genes, ", ".join(registry.genes[:5])))
        rows.append(("counts", registry.layer or "X", 1, ""))
        rows.append(("control", "", int(registry.control is not None), registry.control or ""))
        return pd.DataFrame(rows, columns=["what", "key", "levels", "first"]).set_index("what")

    def _facts(self) -> dict[str, str]:
        registry, state = self._state.registry, self._state
        trained = [
            STAGES[part] + (" (interrupted)" if state.record.get(part, {}).get("interrupted") else "")
            for part, network in (("vae", state.vae), ("flow", state.dit))
            if network is not None
        ]
        size = sum(p.numel() for net in (state.vae, state.dit) if net is not None for p in net.parameters())
        sizes = [f"{len(a)} {a.role}{'s' if len(a) != 1 else ''}" for a in reversed(registry.attributes)]
        preset = next((name for name, config in PRESETS.items() if config == state.config), "own configuration")
        return {
            "preset": preset,
            "genes": str(registry.n_genes),
            "conditions": ", ".join(sizes),
            "control": registry.control or "none",
            "trained": " and ".join(trained) or "no",
            **{f"training of the {STAGES[name]}": _told(table) for name, table in state.history.items() if len(table)},
            "parameters": f"{size:,}" if size else "not built yet",
            "device": f"{self.device}, {choose('auto', self.device).name}",
        }

    def __repr__(self) -> str:
        return "CD4Model\n" + "\n".join(f"  {name}: {value}" for name, value in self._facts().items())

    def _repr_html_(self) -> str:
        from html import escape

        facts = self._facts().items()
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
        return f"<b>CD4Model</b><table>{rows}</table>"

    def _require(self, part: str) -> State:
        """Return the state if the part is trained."""
        if getattr(self._state, part) is None:
            what = {"vae": "autoencoder", "dit": "flow"}[part]
            how = "train()" if self._state.vae is None else "train(stage='flow')"
            raise NotTrainedError(f"the {what} is not trained: call {how} first, or CD4Model.load a trained model")
        return self._state

    def _vae(self) -> VAE:
        vae = self._require("vae").vae
        assert vae is not None
        return vae

    def _trained(self) -> Trained:
        vae, state = self._vae(), self._require("dit")
        assert state.dit is not None
        self._hash = self._hash or state.fingerprint()
        return Trained(vae, state.dit, state.registry, {"package_version": __version__, "model_hash": self._hash})

    def _sampling(
        self, *, seed: int | None, batch_size: int | None = None, careful: bool = False, **options: Any
    ) -> Sampling:
        """Return how cells are drawn; `careful` where they are carried to noise and back."""
        if options.get("n_steps") is None and (careful or "pretrained" in self._state.record):
            options["n_steps"] = CAREFUL_STEPS
        size = settings.batch_size if batch_size is None else batch_size
        options |= {"seed": resolve_seed(seed), "batch_size": size, "compile": settings.compile}
        return Sampling.resolve(self.device, **options)

    def _adata(self, adata: Any) -> Any:
        adata = self.adata if adata is None else as_anndata(adata)
        if adata is None:
            raise DataError("this model was loaded without cells: pass adata=")
        return adata

    def _cells(self, adata: Any, *, decoded: bool = False, allow_missing: bool = False) -> CellData:
        """Return aligned cells; with labels only where they are to be decoded and the decoder takes labels."""
        labels = decoded and self.config.vae.label_rank > 0
        return CellData.from_adata(adata, self._state.registry, labels=labels, allow_missing=allow_missing)


def _told(table: pd.DataFrame) -> str:
    """Say how long a stage was trained and how low its loss came."""
    validated = "validation_loss" in table and table["validation_loss"].notna().any()
    column, what = ("validation_loss", "validation") if validated else ("train_loss", "training")
    return f"{len(table)} epochs, best {what} loss {table[column].min():.4g}"


def resolve_seed(seed: int | None, resume_from: str | Path | None = None) -> int:
    """Return the seed given, that of a training resumed, that of the settings, or one drawn.

    Raises
    ------
    CheckpointError
        `resume_from` holds no record of a training.
    DataError
        It is not a whole number of at least 0.
    """
    if seed is None and resume_from is not None:
        from scldm_cd4.train.checkpoint_io import recorded_seed

        return recorded_seed(resume_from)
    seed = settings.seed if seed is None else seed
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"seed must be a whole number of at least 0, got {seed!r}")
    return int(seed)


def recorded_split(resume_from: str | Path | None, cells: CellData) -> Split | None:
    """Return the split of a training to resume, None where there is none; see `scldm_cd4.train.checkpoint_io`."""
    if resume_from is None:
        return None
    from scldm_cd4.train.checkpoint_io import recorded_split as recorded

    return recorded(resume_from, cells)


def train_options(given: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Return further keywords of training, with the settings of the package where they are left out.

    Raises
    ------
    DataError
        A keyword is neither `own` nor one that training or Lightning takes.
    """
    from scldm_cd4.train.options import check_keywords

    check_keywords(given, own)
    return {"progress": settings.progress, "num_workers": settings.num_workers or 0, **given}


def random_shares(split: Any, train: float, validation: float) -> dict[str, float]:
    """Return shares for `scldm_cd4.data.splits.make_split`."""
    if split is not None:
        raise DataError("give either split= or train_size=")
    test = 1.0 - train - validation
    if not 0 < train < 1 or test < -1e-9:
        raise DataError(f"train_size={train} and validation_size={validation} must be shares that add up to at most 1")
    return {"validation": validation, "test": test if test > 1e-9 else 0.0}


def refuse_extended(registry: Registry) -> None:
    """Raise DataError for a model with levels that were added: its cells are not those that it learned from."""
    if registry.extended:
        raise DataError(
            "this model was extended, which has fitted all that is new: there is nothing left to train. To learn all "
            "weights from more cells, train a new CD4Model on all of them"
        )


def warn_without_control(registry: Registry) -> None:
    """Say early what cannot be done without a control."""
    if registry.control is None:
        column = registry.perturbation.column
        warnings.warn(
            f"no control was declared for obs[{column!r}]: cells can be generated, but perturbations cannot be ranked. "
            "Name it with setup_anndata(..., control=...)",
            UserWarning,
            stacklevel=3,
        )
