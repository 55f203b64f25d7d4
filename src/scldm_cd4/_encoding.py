"""What a trained model says about given cells: their latents, their decoded means, their likelihood."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scldm_cd4 import embedding
from scldm_cd4._base import ModelBase
from scldm_cd4._errors import DataError
from scldm_cd4.data.mudata import writable
from scldm_cd4.engines import one_caller
from scldm_cd4.output import gene_positions


class EncodingMethods(ModelBase):
    """Cells through the autoencoder."""

    def get_latent(
        self,
        adata: Any = None,
        *,
        indices: Any = None,
        give_mean: bool = True,
        flatten: bool = True,
        batch_size: int | None = None,
        key_added: str | None = None,
        allow_missing: bool = False,
        seed: int | None = None,
        out: str | Path | None = None,
        engine: Any = None,
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Cells with raw counts; None takes those that the model was built with. Genes are matched by name.
        indices
            Row numbers, cell names or a mask; None takes all.
        give_mean
            Return the mean of the latent; False is not possible.
        flatten
            Return (n, tokens x channels), which scanpy takes as ``use_rep``; else (n, tokens, channels).
        batch_size
            Cells at a time.
        key_added
            Also write the flat latents to this key of ``adata.obsm`` (all cells); of a MuData, of the modality with the
            counts.
        allow_missing
            Accept that up to half of the model's genes are missing.
        seed
            Not used: the latent is not random.
        out
            A ``.npy`` file to write latents to as they come; it is returned memory-mapped.
        engine
            ``"ray"``, or a `scldm_cd4.engines.Ray`: its workers encode the cells, which this process reads.

        Returns
        -------
        float32 array.

        Raises
        ------
        NotTrainedError
            The autoencoder is not trained.
        DataError, GeneMismatchError
            The cells cannot be used.

        Examples
        --------
        >>> model.get_latent(adata[:5]).shape
        (5, 16)
        >>> model.get_latent(adata[:5], flatten=False).shape
        (5, 4, 4)
        """
        vae = self._vae()
        if not give_mean:
            raise DataError("give_mean=False is not supported: the latent of a cell is given by its mean")
        if key_added is not None and (indices is not None or not flatten):
            raise DataError("key_added= writes flat latents of all cells: leave out indices= and flatten=")
        place = writable((self.adata if self.mdata is None else self.mdata) if adata is None else adata)
        cells = self._cells(self._adata(adata), allow_missing=allow_missing)
        rows, workers = embedding.as_rows(indices, cells), None if engine is None else one_caller(engine)
        how: dict[str, Any] = {"flatten": flatten, "batch_size": batch_size, "out": out, "engine": workers}
        z = embedding.latents(vae, cells, rows, **how)
        if key_added is not None:
            place.obsm[key_added] = z
        return z

    def get_latent_representation(
        self,
        adata: Any = None,
        indices: Any = None,
        give_mean: bool = True,
        mc_samples: int | None = None,
        batch_size: int | None = None,
        return_dist: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Embed cells; `get_latent` with the keywords of scvi-tools.

        Parameters
        ----------
        adata, indices, give_mean, batch_size
            As for `get_latent`.
        mc_samples
            Has no effect: the latent is not random.
        return_dist
            Only False is possible.
        options
            Other keywords of `get_latent`.

        Returns
        -------
        float32 array, (n, tokens x channels).

        Raises
        ------
        DataError
            ``return_dist=True``, or the cells cannot be used.
        NotTrainedError
            The autoencoder is not trained.

        Examples
        --------
        >>> model.get_latent_representation(adata, indices=[0, 1, 2]).shape
        (3, 16)
        """
        if return_dist:
            raise DataError("return_dist=True is not supported: the latent of a cell is a point")
        return self.get_latent(adata, indices=indices, give_mean=give_mean, batch_size=batch_size, **options)

    def get_normalized_expression(
        self,
        adata: Any = None,
        indices: Any = None,
        *,
        gene_list: Any = None,
        library_size: float | str = 1.0,
        batch_size: int | None = None,
        return_numpy: bool = False,
        allow_missing: bool = False,
    ) -> pd.DataFrame | np.ndarray:
        """Return the decoded mean expression of cells.

        Parameters
        ----------
        adata, indices, batch_size, allow_missing
            As for `get_latent`.
        gene_list
            Genes to return; None returns all. Means are shares of all genes in either case.
        library_size
            What the means of a cell add up to; ``"latent"`` takes the counts of the cell.
        return_numpy
            Return an array instead of a table.

        Returns
        -------
        Cells x genes, float32.

        Raises
        ------
        NotTrainedError
            The autoencoder is not trained.
        DataError, GeneMismatchError
            The cells or genes cannot be used.

        Examples
        --------
        >>> model.get_normalized_expression(adata[:3], gene_list=["GATA3", "IFNGR1"], library_size=1e4).shape
        (3, 2)
        """
        vae = self._vae()
        cells = self._cells(self._adata(adata), decoded=True, allow_missing=allow_missing)
        rows, genes = embedding.as_rows(indices, cells), gene_positions(self._state.registry, gene_list)
        values = embedding.normalized_expression(
            vae, cells, rows, library_size=library_size, genes=genes, batch_size=batch_size
        )
        if return_numpy:
            return values
        names = np.array(self._state.registry.genes, dtype=object)
        return pd.DataFrame(values, index=cells.obs_names[rows], columns=names if genes is None else names[genes])

    def get_reconstruction_error(
        self, adata: Any = None, indices: Any = None, *, batch_size: int | None = None, allow_missing: bool = False
    ) -> np.ndarray:
        """Return the negative log-likelihood of cells, each decoded from its own latent.

        Parameters
        ----------
        adata, indices, batch_size, allow_missing
            As for `get_latent`.

        Returns
        -------
        Nats per cell, summed over genes, float64 (n,).

        Raises
        ------
        NotTrainedError
            The autoencoder is not trained.
        DataError, GeneMismatchError
            The cells cannot be used.

        Examples
        --------
        >>> model.get_reconstruction_error(adata[:3]).shape
        (3,)
        """
        vae = self._vae()
        cells = self._cells(self._adata(adata), decoded=True, allow_missing=allow_missing)
        return embedding.reconstruction_error(vae, cells, embedding.as_rows(indices, cells), batch_size=batch_size)
