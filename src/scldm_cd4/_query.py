"""What a trained model does with cells of contexts that it was not trained on."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from scldm_cd4._base import resolve_seed
from scldm_cd4._errors import DataError
from scldm_cd4._storage import StorageMethods
from scldm_cd4.conditions import told_by_role
from scldm_cd4.data.splits import Split
from scldm_cd4.embedding import as_rows
from scldm_cd4.familiarity import Familiarity


class QueryMethods(StorageMethods):
    """New donors and time points from a few cells."""

    @told_by_role
    def extend(self, adata: Any = None, *, donor: Any = None, timepoint: Any = None, seed: int | None = None) -> Self:
        """Return a model that also knows a new donor or time point, fitted to a few cells of it.

        Only what belongs to the new level is fitted: its label embedding in the flow, its effects in the decoder (in
        closed form), and the library sizes of its contexts. All other weights and numbers stay as they are to the
        bit, and so do generated cells of all other conditions. The fewer the cells, the nearer the new level stays to
        the average of those that were trained.

        Parameters
        ----------
        adata
            Cells with raw counts of the model's genes and the columns that the model was trained with. Those that carry
            the new level are used: controls are enough, perturbed cells of known perturbations are used as well. None
            gives the average of the trained levels, with a warning.
        donor, timepoint
            The new label, or several. It must not be among the levels that were trained.
        seed
            Of the fit; None draws one, which is recorded in `training_`.

        Returns
        -------
        A new model with `adata` as its cells. This model is not changed, so both can be compared, and results made with
        it stay valid. Save the new one with `save`; call its `extend` to add more levels.

        Raises
        ------
        NotTrainedError
            A stage is not trained.
        DataError
            The level is known already, no cell carries it, or the cells cannot be used.
        GeneMismatchError
            Genes of the model are missing in `adata`.
        UnknownCategoryError
            A cell carries another label that the model was not trained on.

        Examples
        --------
        >>> controls = adata[adata.obs["perturbation"] == "NTC"].copy()
        >>> controls.obs["donor_id"] = "D5"
        >>> wider = model.extend(controls, donor="D5", seed=0)
        >>> wider.generate(perturbation="GATA3", donor="D5", timepoint="Rest", n_cells=5, seed=0).n_obs
        5
        """
        from scldm_cd4.extension import extend, new_levels

        self._trained()
        levels = new_levels(self._state.registry, {"donor": donor, "timepoint": timepoint})
        state, cells = extend(self._state, adata, levels, seed=resolve_seed(seed))
        model = type(self).__new__(type(self))
        model._start(state, (self.adata if self.mdata is None else self.mdata) if cells is None else adata, self.device)
        return model

    @classmethod
    def load_query_data(cls, adata: Any, reference_model: Any, *, seed: int | None = None, device: Any = None) -> Self:
        """Return a model for query cells: a saved one, extended by the donors and time points that it does not know.

        The fit is part of this call: unlike in scvi-tools there is nothing left to `train`.

        Parameters
        ----------
        adata
            The query cells, as for `extend`. Cells of known donors and time points are allowed and change nothing.
        reference_model
            The folder of a saved model, or a model.
        seed
            As for `extend`.
        device
            As for `load`.

        Returns
        -------
        A new model that knows the query cells; `reference_model` is not changed by it, nor by what is done with it.

        Raises
        ------
        CheckpointError
            The folder is missing or damaged.
        DataError, GeneMismatchError, UnknownCategoryError
            As for `extend`.

        Examples
        --------
        >>> controls = adata[adata.obs["perturbation"] == "NTC"].copy()
        >>> controls.obs["donor_id"] = "D5"
        >>> "D5" in CD4Model.load_query_data(controls, saved, seed=0).donors
        True
        """
        from scldm_cd4.extension import copied, unknown_levels

        model = reference_model
        if not isinstance(reference_model, QueryMethods):
            if not isinstance(reference_model, str | Path):
                raise DataError(
                    "load_query_data takes the query cells first, then a saved model: CD4Model.load_query_data(adata, "
                    f"folder); got {type(reference_model).__name__} as model"
                )
            model = cls.load(reference_model, device=device)
        if levels := unknown_levels(adata, model._state.registry):
            return model.extend(adata, seed=seed, **levels)
        same = cls.__new__(cls)
        same._start(copied(model._state), adata, model.device)
        return same

    def query_distance(
        self, adata: Any = None, *, indices: Any = None, reference: Any = None, allow_missing: bool = False
    ) -> pd.DataFrame:
        """Measure how near cells lie to the training cells, compared with held-out cells of the same data.

        Parameters
        ----------
        adata
            Cells with raw counts; labels play no part. None takes those that the model was built with.
        indices
            Row numbers, cell names or a mask; None takes all.
        reference
            Cells to use as training cells, for a model that does not know its own: an imported one, or one of an
            early version. A fifth of them are used as held-out cells.
        allow_missing
            As for `get_latent`.

        Returns
        -------
        One row per cell: ``latent_distance``, the mean distance in the latent to the ten nearest of up to 2,000
        training cells; ``nll``, the negative log-likelihood of its counts (nats); ``latent_percentile`` and
        ``nll_percentile``, the percentage of held-out cells with a smaller one (of ``nll`` after a fit on library
        size); ``is_far``, beyond the 99th percentile in either, as 1 to 2 % of cells like the training cells are.
        ``attrs`` says how many held-out cells there were.

        Raises
        ------
        NotTrainedError
            The autoencoder is not trained.
        DataError, GeneMismatchError
            The model knows no training cells and there is no `reference`, or cells cannot be used.

        Examples
        --------
        >>> model.query_distance(adata[:5]).shape
        (5, 5)
        """
        vae = self._vae()
        known = self._state.familiarity
        if reference is not None:
            given = self._cells(reference)
            order = np.arange(given.n_cells)
            known = Familiarity.fit(vae, given, Split(order, order[:0], order[:0], {}), seed=0)
        if known is None:
            raise DataError(
                "this model knows no latents of its training cells (it was imported, or saved by an early version): "
                "pass reference= with cells like those it was trained on"
            )
        cells = self._cells(self._adata(adata), allow_missing=allow_missing)
        return known.compare(vae, cells, as_rows(indices, cells))
