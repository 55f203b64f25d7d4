"""`CD4Model`: set up, train, embed, generate, rank, save. It delegates and computes nothing itself."""

from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd

from scldm_cd4._base import (
    random_shares,
    recorded_split,
    refuse_extended,
    resolve_seed,
    train_options,
    warn_without_control,
)
from scldm_cd4._encoding import EncodingMethods
from scldm_cd4._errors import DataError
from scldm_cd4._query import QueryMethods
from scldm_cd4._settings import settings
from scldm_cd4._state import State
from scldm_cd4.conditions import resolve_requests, told_by_role
from scldm_cd4.config import ModelConfig, resolve_config
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.mudata import as_anndata, setup_mudata
from scldm_cd4.data.setup import fit_registry, setup_anndata
from scldm_cd4.data.splits import VALIDATION, make_split, warn_of_seen
from scldm_cd4.distributed import generate_divided
from scldm_cd4.evaluation import evaluate
from scldm_cd4.familiarity import warn_of_far_cells
from scldm_cd4.generation import counterfactual_cells, generate_cells
from scldm_cd4.pp._query import prepare_query_anndata
from scldm_cd4.ranking import rank_perturbations
from scldm_cd4.reliability import fit_reliability, reliability
from scldm_cd4.sampling import used_roles
from scldm_cd4.sinks import open_written


class CD4Model(EncodingMethods, QueryMethods):
    """A generative model of perturbed cells: an autoencoder for counts and a flow in its latent space.

    Parameters
    ----------
    adata
        Cells declared by `setup_anndata`, or a MuData declared by `setup_mudata`. Not copied and not changed.
    config
        Name of a preset (``tiny``, ``small``, ``cd4``) or a `scldm_cd4.config.ModelConfig`.
    overrides
        Changes by part of the configuration, such as ``vae={"n_tokens": 32}``.

    Raises
    ------
    DataError
        `adata` is not declared.
    ValueError
        The configuration is unknown.

    Examples
    --------
    >>> adata = datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=2)
    >>> CD4Model.setup_anndata(adata, perturbation_key="perturbation", donor_key="donor_id", control="NTC")
    >>> model = CD4Model(adata, config="tiny")
    >>> model.is_trained
    False
    """

    def __init__(self, adata: Any, config: str | ModelConfig = "small", **overrides: Any) -> None:
        self._start(State(resolve_config(config, **overrides), fit_registry(as_anndata(adata))), adata, settings.device)

    setup_anndata = staticmethod(setup_anndata)
    setup_mudata = staticmethod(setup_mudata)
    prepare_query_anndata = staticmethod(prepare_query_anndata)
    evaluate = evaluate
    rank_perturbations = rank_perturbations
    reliability = reliability
    fit_reliability = fit_reliability

    def train(
        self,
        max_epochs: Any = None,
        *,
        batch_size: Any = None,
        stage: str = "both",
        split: Any = None,
        train_size: float | None = None,
        validation_size: float = VALIDATION,
        plan_kwargs: Any = None,
        accelerator: str = "auto",
        devices: Any = "auto",
        precision: Any = "auto",
        early_stopping: bool = True,
        resume_from: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        seed: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the autoencoder, then the flow in its latent space.

        Parameters
        ----------
        max_epochs, batch_size
            One value, or a dict with keys ``vae`` and ``flow``; None goes by the configuration and the data.
        stage
            ``both``, ``vae`` or ``flow``; ``flow`` keeps the trained autoencoder. A stage starts from fresh weights.
        split
            Which cells are held out, see `scldm_cd4.data.splits.make_split`; None holds out a random share
            `validation_size` of every condition, for validation. For ``stage="flow"`` None keeps the split of an
            autoencoder, also of one that was saved and loaded with the same cells; with `resume_from`, that of the
            training resumed.
        train_size, validation_size
            Shares of the cells for a random split (`train_size` instead of `split`); what is left is for test.
        plan_kwargs
            Changes of the `scldm_cd4.config.StageConfig`, such as ``{"lr": 1e-3}``, or a dict of them by stage.
        accelerator, devices, precision
            As Lightning takes them; ``auto`` is CUDA with bf16 where there is one, else the CPU with fp32.
        early_stopping
            End a stage when the validation loss no longer falls, and keep the best weights.
        resume_from
            Folder given as `checkpoint_dir` to a training that did not end; goes on where it stopped.
        checkpoint_dir
            Folder for training state; None writes nothing.
        seed
            Of all random draws; None draws one, which is recorded in `training_`.
        trainer_kwargs
            ``num_workers``, ``progress``, ``compile`` (compile the training steps with ``torch.compile``), and what
            ``lightning.pytorch.Trainer`` takes, such as ``accumulate_grad_batches``.

        Raises
        ------
        DataError
            The model has no cells, an argument is not possible, or the training to resume had other cells or parts.
        NotTrainedError
            ``stage="flow"`` without a trained autoencoder.
        TrainingError
            A loss became infinite or not a number. A model that could generate is as before; another keeps the last
            good weights, those of an earlier autoencoder where the new one did not end.
        CheckpointError
            `resume_from` has no usable training state.

        Notes
        -----
        An interrupt (Ctrl-C, the stop button of a notebook) ends the stage after the step in hand, with a warning. The
        model keeps the weights of that moment, no further stage begins, and `training_` says ``interrupted``. A model
        that could generate stays as it was where its new autoencoder did not end.

        Examples
        --------
        >>> model = CD4Model(adata, config="tiny", train_vae={"batch_size": 128}, flow={"n_layers": 1})
        >>> model.train(max_epochs=1, split={"test": 0.2}, seed=0)
        >>> list(model.history)
        ['vae', 'flow']
        """
        refuse_extended(self._state.registry)
        trainer_kwargs = train_options(trainer_kwargs, signature(self.train).parameters)
        if stage == "flow":
            self._require("vae")
        seed = resolve_seed(seed, resume_from)
        if train_size is not None:
            split = random_shares(split, train_size, validation_size)
        cells = CellData.from_adata(self._adata(None), self._state.registry)
        warn_without_control(self._state.registry)
        before, known = self._state.registry, self._known_split() if stage == "flow" else None
        if split is None and validation_size == VALIDATION and (kept := recorded_split(resume_from, cells) or known):
            parts = kept
        else:
            parts = make_split(cells, split, validation=validation_size, seed=seed)
        if known is not None:
            warn_of_seen(known, parts)
        try:
            self._state.train(
                cells,
                parts,
                seed=seed,
                stage=stage,
                max_epochs=max_epochs,
                batch_size=batch_size,
                plan_kwargs=plan_kwargs,
                accelerator=accelerator,
                devices=devices,
                precision=precision,
                early_stopping=early_stopping,
                resume_from=resume_from,
                checkpoint_dir=checkpoint_dir,
                **trainer_kwargs,
            )
        finally:
            if self._state.registry is not before:  # else the weights are still those of the earlier split
                self._split, self._hash = parts, None
            self._state.to(self.device)

    @told_by_role
    def generate(
        self,
        perturbation: Any = None,
        donor: Any = None,
        timepoint: Any = None,
        *,
        n_cells: Any = None,
        conditions: pd.DataFrame | None = None,
        cells: Any = None,
        output: str = "counts",
        guidance: Any = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        n_steps: int | None = None,
        solver: str | None = None,
        size_factors: Any = None,
        genes: Any = None,
        precision: Any = "auto",
        seed: int | None = None,
        batch_size: int | None = None,
        out: str | Path | None = None,
        overwrite: bool = False,
        engine: Any = None,
    ) -> Any:
        """Generate cells of conditions, or given cells under other conditions.

        Parameters
        ----------
        perturbation, donor, timepoint
            A label, several, or None for all levels that were trained. Cells are made for every combination, in the
            order donor (slowest), time point, perturbation. A combination that training did not see is allowed; its
            ``n_train_cells`` in ``obs`` is then 0.
        n_cells
            Cells per condition; 100 by default. The first k of n cells are those that ``n_cells=k`` gives.
        conditions
            Instead of labels, a table with one condition per row: the user's columns, and optionally ``n_cells``.
        cells
            AnnData of real cells: each is predicted as it would be under the labels named (one per argument); a label
            left out stays. A cell is carried back to noise under its own labels and forward under the new ones.
        output
            What ``X`` holds: ``counts`` (CSR float32, whole numbers), ``mean``, ``lognorm`` or ``latent``.
        guidance
            1 is the conditional flow, 0 is unconditional (labels in ``obs`` are then ``unconditional``); or a dict of
            weights, see `scldm_cd4.flow.guided`.
        guidance_interval
            Times from noise (0) to data (1) between which `guidance` holds; elsewhere the weight is 1, which costs one
            network pass.
        n_steps, solver
            Of the flow; ``midpoint`` with 6 steps, or 10 for `cells` and for imported weights.
        size_factors
            Library sizes: None draws from those of the training cells of the context, shifted as the perturbation
            shifts them in training; ``"context"`` takes their median, or one number, or one per cell. For `cells`,
            None takes their own.
        genes
            Genes to return; all are drawn.
        precision
            ``auto`` (bf16 on CUDA, else fp32), ``fp32``, ``tf32`` (CUDA only) or ``bf16``.
        seed
            Of all random draws; None draws one, which is recorded in ``uns``. Equal seeds give equal cells, whatever
            else is asked for.
        batch_size
            Cells computed together, rounded up to a multiple of 8; on CUDA, the rows of a network pass.
        out
            An h5ad file or a zarr store to which cells are written as they are made; ``X`` stays on disk.
        overwrite
            Replace that file.
        engine
            ``"ray"`` or ``"units"`` (the processes of torchrun or SLURM) divide the cells into units of work, see
            `scldm_cd4.engines.Ray` and `scldm_cd4.engines.Units`. The same call goes on with a run that was killed.
            None is returned while units of other processes are missing.

        Returns
        -------
        AnnData with labels, ``is_generated``, ``size_factor``, ``n_train_cells`` and ``n_train_contexts`` in ``obs``,
        and how it was made in ``uns["scldm_cd4"]``.

        Raises
        ------
        NotTrainedError
            A stage is not trained.
        UnknownCategoryError
            A label is unknown or was never trained.
        DataError
            An argument is not possible.
        FileExistsError
            `out` exists.

        Examples
        --------
        >>> cells = model.generate(["GATA3", "NTC"], donor="CE0008162", timepoint="Rest", n_cells=5, seed=0)
        >>> cells.shape
        (10, 60)
        >>> cells.obs["perturbation"].value_counts().to_dict()
        {'GATA3': 5, 'NTC': 5}
        >>> others = model.generate(cells=adata[:3], perturbation="GATA3", seed=0)
        """
        how = {"output": output, "solver": solver, "n_steps": n_steps, "precision": precision, "batch_size": batch_size}
        how |= {"guidance": guidance, "guidance_interval": guidance_interval}
        options = {"size_factors": size_factors, "genes": genes, "out": out, "overwrite": overwrite}
        labels = {"perturbation": perturbation, "donor": donor, "timepoint": timepoint}
        if cells is not None and not (conditions is n_cells is engine is None):
            raise DataError("cells= gives one cell for each: leave out n_cells=, conditions= and engine=")
        if engine is not None:
            asked = {"n_cells": n_cells, "conditions": conditions, "seed": seed}
            path = generate_divided(self, engine, labels, sampling=how, **asked, **options)
            return None if path is None else open_written(path)
        trained = self._trained()
        sampling = self._sampling(seed=seed, careful=cells is not None, **how)
        options["workers"] = settings.num_workers
        if cells is not None:
            given = CellData.from_adata(cells, self._state.registry)
            warn_of_far_cells(self._state.familiarity, trained.vae, given, stacklevel=4)
            return counterfactual_cells(trained, sampling, given, labels, **options)
        used = used_roles(trained.dit, sampling)
        requests = resolve_requests(trained.registry, n_cells=n_cells, conditions=conditions, used=used, **labels)
        return generate_cells(trained, sampling, requests, **options)

    def predict(self, conditions: pd.DataFrame, **options: Any) -> Any:
        """Generate cells of a table of conditions; `generate` with ``conditions=``.

        Parameters
        ----------
        conditions
            One condition per row: the user's columns, and optionally ``n_cells``.
        options
            Other keywords of `generate`.

        Returns
        -------
        AnnData, as of `generate`.

        Raises
        ------
        NotTrainedError, UnknownCategoryError, DataError
            As for `generate`.

        Examples
        --------
        >>> wanted = pd.DataFrame({"perturbation": ["GATA3"], "donor_id": "CE0008162", "timepoint": "Rest"})
        >>> model.predict(wanted, n_cells=4, seed=0).n_obs
        4
        """
        return self.generate(conditions=conditions, **options)
