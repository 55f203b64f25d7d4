"""Saving and loading of a model: its own folder, the reference's layout, the hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import pandas as pd

from scldm_cd4._base import ModelBase
from scldm_cd4._errors import CheckpointError, DataError
from scldm_cd4._settings import settings
from scldm_cd4._state import State
from scldm_cd4.checkpoint.hub import find_model, push_folder
from scldm_cd4.checkpoint.native import load_folder
from scldm_cd4.checkpoint.pretrained import Options, has_vocabulary, is_reference, read_reference
from scldm_cd4.data.mudata import as_anndata
from scldm_cd4.data.setup import require_anndata


class StorageMethods(ModelBase):
    """Where a model comes from and goes to."""

    def save(self, dir_path: str | Path, *, overwrite: bool = False, scores: pd.DataFrame | None = None) -> None:
        """Write the model to a folder of safetensors and JSON, with a model card.

        Parameters
        ----------
        dir_path
            The folder.
        overwrite
            Replace a saved model.
        scores
            Table of scores for the model card, such as that of `evaluate`.

        Raises
        ------
        NotTrainedError
            Nothing is trained yet.
        FileExistsError
            There is something at the path, and it may not be replaced.
        CheckpointError
            The folder cannot be written.

        Examples
        --------
        >>> model.save("my_model")
        >>> CD4Model.load("my_model").is_trained
        True
        """
        self._require("vae")
        self._state.save(dir_path, overwrite=overwrite, scores=scores)

    @classmethod
    def load(cls, dir_path: str | Path, adata: Any = None, *, device: Any = None) -> Self:
        """Read a model from a folder.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Cells for methods that use those of the model; generation needs none.
        device
            ``auto``, ``cpu``, ``cuda:0`` and the like.

        Returns
        -------
        A new model, also when called on an instance.

        Raises
        ------
        CheckpointError
            The folder is missing, damaged, or of an unknown format.
        DataError
            `dir_path` is no path, or `adata` is no AnnData.

        Examples
        --------
        >>> model = CD4Model.load(saved)  # generates without cells
        >>> model.generate(perturbation="GATA3", donor="CE0008162", timepoint="Rest", n_cells=2, seed=0).n_obs
        2
        """
        if not isinstance(dir_path, str | os.PathLike):
            raise DataError(
                "load takes the folder of a saved model first, then the cells: CD4Model.load(folder, adata); got "
                f"{type(dir_path).__name__} as folder"
            )
        if adata is not None:
            require_anndata(as_anndata(adata))
        model = cls.__new__(cls)
        model._start(State.load(dir_path), adata, settings.device if device is None else device)
        return model

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        adata: Any = None,
        vocabulary: Any = None,
        size_factors: Any = None,
        control: str | None = None,
        weights: Literal["auto", "ema", "online"] = "auto",
        allow_pickle: bool = False,
        columns: Mapping[str, str] | None = None,
        vae: Mapping[str, Any] | None = None,
        flow: Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: Any = None,
    ) -> Self:
        """Read a model that `save` wrote, or a checkpoint in the layout of the released scLDM.CD4.

        Parameters
        ----------
        source
            A folder, a file of weights with its ``config.yaml`` beside it, or the name ``org/name`` of a model on the
            Hugging Face hub. What follows up to `flow` is for the reference's layout alone.
        adata
            Cells for methods that use those of the model. If nothing else gives the vocabulary, it is read from them
            as the training cells.
        vocabulary
            Gene names and condition labels, which a reference checkpoint lacks: the training AnnData (``var_names`` and
            the categories of the label columns) or its h5ad file, or JSON (a file, or a dict) with ``genes`` and a list
            of labels for each class name in the order of the codes. An AnnData also gives library sizes and the numbers
            of training cells. None looks for
            ``registry.json`` or ``vocabulary.json`` in the folder.
        size_factors
            Library sizes to draw from: a JSON file or dict ``{"mean": {key: ...}, "sd": {key: ...}}``, a folder with
            the reference's two pickled dicts, or the paths of both. They are read without being unpickled.
        control
            The label of unperturbed cells; None takes the one that the folder names, or ``NTC``.
        weights
            Copy of the flow's weights: the running average (``ema``), the last step's (``online``), or the average
            where there is one (``auto``).
        allow_pickle
            Read a Lightning ``.ckpt``. Its tensors are read; nothing in it is run.
        columns
            What the checkpoint calls the attributes, such as ``{"perturbation": "gene", "donor": "cell_line"}``, where
            the names are not those of scLDM.CD4.
        vae, flow
            Fields of the configuration that neither ``config.yaml`` nor the weights tell, such as ``{"n_heads": 4}``.
        revision, cache_dir, local_files_only, token
            As `huggingface_hub.snapshot_download` takes them.
        device
            ``auto``, ``cpu``, ``cuda:0`` and the like.

        Returns
        -------
        A new model.

        Raises
        ------
        CheckpointError
            There is no such model, or it is damaged, incomplete, or does not fit what was given; all that does not fit
            is named.

        Examples
        --------
        >>> model = CD4Model.from_pretrained(saved)
        >>> model.is_trained
        True
        """
        folder = find_model(
            source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        given = (vocabulary, size_factors, control, columns, vae, flow)
        if not is_reference(folder):
            if any(value is not None for value in given) or weights != "auto":
                raise CheckpointError(
                    f"{source} is a model that save wrote, which needs nothing but adata= and device="
                )
            return cls.load(folder, adata, device=device)
        if adata is not None:
            require_anndata(as_anndata(adata))
            vocabulary = adata if vocabulary is None and not has_vocabulary(folder) else vocabulary
        options = Options(
            vocabulary, size_factors, control, weights, allow_pickle, columns, dict(vae or {}), dict(flow or {})
        )
        model = cls.__new__(cls)
        state = State.of(read_reference(folder, options))
        model._start(state, adata, settings.device if device is None else device)
        return model

    def export_reference(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model in the layout of the released scLDM.CD4: weights under all its names, and ``config.yaml``.

        ``registry.json`` beside them holds what that layout lacks, and `from_pretrained` reads it again. The model has
        one copy of the flow's weights, which is written for the online and the averaged ones alike.

        Parameters
        ----------
        dir_path
            The folder.
        overwrite
            Replace what is there.

        Raises
        ------
        NotTrainedError
            Nothing is trained yet.
        CheckpointError
            The model has parts that the reference does not know (as those of the presets ``tiny`` and ``small``), or
            the folder cannot be written.
        FileExistsError
            There is something at the path, and it may not be replaced.

        Examples
        --------
        >>> plain.export_reference("reference_layout")
        >>> CD4Model.from_pretrained("reference_layout").is_trained
        True
        """
        self._require("vae")
        self._state.export(dir_path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        scores: pd.DataFrame | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, as `save` writes it.

        Gene names, condition labels (the donors among them), numbers of training cells and the training history are
        part of the model and become visible to everybody who can see the repository; a warning says so.

        Parameters
        ----------
        repo_id
            ``org/name``. The repository is made where there is none.
        private
            Make a new repository private.
        revision
            Branch; None is the main one.
        token, commit_message
            As `huggingface_hub` takes them.
        scores
            As for `save`.

        Returns
        -------
        The address of the commit.

        Raises
        ------
        NotTrainedError
            Nothing is trained yet.
        CheckpointError
            The hub cannot be reached or refuses.

        Examples
        --------
        >>> model.push_to_hub("org/name", private=True)  # doctest: +SKIP
        """
        self._require("vae")
        with TemporaryDirectory() as folder:
            self._state.save(Path(folder) / "model", scores=scores)
            options: dict[str, Any] = {"revision": revision, "token": token, "commit_message": commit_message}
            return push_folder(Path(folder) / "model", repo_id, private=private, **options)

    @staticmethod
    def load_registry(dir_path: str | Path) -> dict[str, Any]:
        """Return genes, vocabularies and training evidence of a saved model as plain values.

        Parameters
        ----------
        dir_path
            The folder.

        Returns
        -------
        Plain dict, as of the property `registry`.

        Raises
        ------
        CheckpointError
            The folder is missing, damaged, or of an unknown format.

        Examples
        --------
        >>> CD4Model.load_registry(saved)["control"]
        'NTC'
        """
        return load_folder(dir_path).registry
