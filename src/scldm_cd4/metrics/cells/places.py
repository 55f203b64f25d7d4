"""Where cells keep their counts and the names of their genes."""

from collections.abc import Mapping
from typing import Any

from scldm_cd4._errors import DataError
from scldm_cd4.data.setup import GENERATED, SETUP_KEY, read_declaration
from scldm_cd4.registry import suggestion


def declared(adata: Any) -> dict[str, str | None]:
    """Return what `setup_anndata` declared of real cells; nothing where it was not called, and of generated cells."""
    uns = getattr(adata, "uns", {})
    return read_declaration(adata) if SETUP_KEY in uns and GENERATED not in uns else {}


def layers_of(cells: Mapping[str, Any], layer: str | None = None, *, counts: bool = True) -> dict[str, str | None]:
    """Decide where the values of cells are read.

    Parameters
    ----------
    cells
        AnnData by what they are called in messages.
    layer
        The layer asked for; cells that lack it, such as generated ones, are read as by default.
    counts
        Whether counts are read; else ``X`` is the default.

    Returns
    -------
    The layer of each, None for ``X``. By default that of the declared counts.

    Raises
    ------
    DataError
        If none of the cells have the layer that was asked for, or some lack the declared one.
    """
    if layer is not None and not any(layer in adata.layers for adata in cells.values()):
        what, first = next(iter(cells.items()))
        raise DataError(
            f"there is no layer {layer!r}.{suggestion(layer, first.layers.keys(), f'layers of {what} are')}"
        )
    return {what: _layer(adata, layer, counts, what) for what, adata in cells.items()}


def _layer(adata: Any, layer: str | None, counts: bool, what: str) -> str | None:
    if layer is not None and layer in adata.layers:
        return layer
    own = declared(adata).get("layer") if counts else None
    if own is not None and own not in adata.layers:
        raise DataError(
            f"{what}: setup_anndata declared the counts to be in layers[{own!r}], which is not there any more; put "
            "them back, or call setup_anndata again"
        )
    return own
