"""What a trained model does with cells of contexts that it was not trained on."""

from pathlib import Path
from typing import Any, Self

from scldm_cd4._base import resolve_seed
from scldm_cd4._errors import DataError
from scldm_cd4._state import State


class QueryMethods:
    """New donors and time points from a few cells."""

    adata: Any
    device: Any
    _state: State

    def _start(self, state: State, adata: Any, device: Any) -> None:
        raise NotImplementedError

    def _trained(self) -> Any:
        raise NotImplementedError

    @classmethod
    def load(cls, dir_path: str | Path, adata: Any = None, *, device: Any = None) -> Self:
        """Read a model from a folder."""
        raise NotImplementedError

    def extend(self, adata: Any = None, *, donor: Any = None, timepoint: Any = None, seed: int | None = None) -> Self:
        """Give a model that also knows a new donor or time point, fitted to a few cells of it.

        Only what belongs to the new level is fitted: its label embedding in the flow, its effects in the decoder (in
        closed form), and the library sizes of its contexts. All other weights and numbers stay as they are to the bit, so do
        do generated cells of all other conditions. The fewer the cells, the nearer the new level stays to the average
        of those that were trained.

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
        A new model with `adata` as its cells; this one is not changed, so that both can be compared, and no result
        made with it before becomes wrong. Save it with `save`; it is extended further by calling `extend` on it.

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
        >>> wider = model.extend(controls_of_d5, donor="D5", seed=0)
        >>> cells = wider.generate(perturbation="GATA3", donor="D5", timepoint="Stim8hr", n_cells=500, seed=0)
        """
        from scldm_cd4.extension import extend, new_levels

        self._trained()
        levels = new_levels(self._state.registry, {"donor": donor, "timepoint": timepoint})
        state, cells = extend(self._state, adata, levels, seed=resolve_seed(seed))
        model = type(self).__new__(type(self))
        model._start(state, self.adata if cells is None else adata, self.device)
        return model

    @classmethod
    def load_query_data(cls, adata: Any, reference_model: Any, *, seed: int | None = None, device: Any = None) -> Self:
        """Give a model for query cells: a saved one, extended by the donors and time points that it does not know.

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

        Raises
        ------
        CheckpointError
            The folder is missing or damaged.
        DataError, GeneMismatchError, UnknownCategoryError
            As for `extend`.
        """
        from scldm_cd4.extension import unknown_levels

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
        same._start(model._state, adata, model.device)
        return same
