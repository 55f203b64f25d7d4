"""Opening h5ad files that may be damaged or made to harm."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError

MAX_BYTES = 64 * 2**30
"""Default of the largest size in memory that a file may ask for."""
MAX_OBJECTS = 100_000
MAX_CHUNK = 2**30
"""The largest chunk in bytes; HDF5 holds a whole chunk in memory."""
MAX_RATIO = 1100
"""Above the compression that gzip can reach (1,032)."""
SMALL = 64 * 2**20
"""Datasets below this size in bytes may be unwritten or compress at any ratio."""
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
"""Filters that are part of HDF5 or h5py; any other would load a plugin."""


def open_h5ad(path: str | Path, backed: bool = False, *, max_bytes: int = MAX_BYTES) -> Any:
    """Open an h5ad file after a look at its structure.

    Parameters
    ----------
    path
        The file; it is only read.
    backed
        Leave ``X`` in the file and read rows when asked for.
    max_bytes
        Largest size in memory, in bytes, of all that is loaded at once.

    Returns
    -------
    AnnData.

    Raises
    ------
    DataError
        The file is missing, truncated, damaged or no h5ad; refers to other files (external or virtual data, links);
        asks for more memory than allowed or than its stored bytes can hold; needs a filter plugin; or holds a sparse
        matrix whose indices do not fit its shape. All of this is found before any large allocation.
    """
    import anndata as ad
    import h5py

    path = Path(path)
    with _readable(path):
        with h5py.File(path, "r") as file:
            _inspect(file, backed, max_bytes)
        return ad.read_h5ad(path, backed="r" if backed else None)


def open_group(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Open an h5ad file or a zarr store of one AnnData to read parts of it.

    Of an h5ad file the structure is looked at as by `open_h5ad`; matrices are looked at when they are read.

    Parameters
    ----------
    path
        The file, or the folder of the zarr store; it is only read.
    max_bytes
        Largest size in memory, in bytes, of ``obs`` and ``var`` together.

    Returns
    -------
    The root, of h5py or zarr.

    Raises
    ------
    DataError
        There is no such file, or it is refused.
    """
    import h5py

    path = Path(path)
    if path.is_dir():
        import zarr

        try:
            return zarr.open_group(str(path), mode="r")
        except Exception as error:
            raise DataError(f"{path} cannot be read as a zarr store: {error}") from error
    with _readable(path):
        file = h5py.File(path, "r")
        _inspect(file, True, max_bytes, loaded=("/obs/", "/var/"))
    return file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong with an h5ad file into a DataError that names it."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} is refused: {error}") from None
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as h5ad, it is damaged, truncated or of another kind: {error}"
        ) from error


def _inspect(file: Any, backed: bool, max_bytes: int, loaded: tuple[str, ...] = ()) -> None:
    """Look at all objects; with `loaded`, only what lies there counts as read into memory."""
    import h5py

    total = 0
    for obj in _walk(file):
        if isinstance(obj, h5py.Dataset):
            size = _check_dataset(obj)
            if obj.name.startswith(loaded) if loaded else not (backed and _is_backed(obj.name)):
                total += size
            if total > max_bytes:
                raise DataError(
                    f"{obj.name} with shape {obj.shape} brings the file to {total:.3g} bytes in memory, more than "
                    f"max_bytes={max_bytes:.3g}; open it with backed=True, or raise max_bytes if you trust it"
                )
    for obj in _walk(file):
        if isinstance(obj, h5py.Group) and {"data", "indices", "indptr"} <= set(obj):
            _check_sparse(obj, whole=not loaded)


def _is_backed(name: str) -> bool:
    return name in ("/X", "/raw/X") or name.startswith(("/X/", "/raw/X/"))


def _walk(file: Any) -> Iterator[Any]:
    """Yield all groups and datasets; refuse links out of the file and objects that can be reached twice."""
    import h5py

    stack = [file]
    seen: set[int] = set()
    while stack:
        group = stack.pop()
        yield group
        for name in group:
            where = f"{group.name.rstrip('/')}/{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise DataError(f"{where} is a link to another place or file; h5ad files hold their own data")
            obj = group[name]
            address = h5py.h5o.get_info(obj.id).addr
            if address in seen or len(seen) > MAX_OBJECTS:
                raise DataError(f"{where} is linked twice, or the file has more than {MAX_OBJECTS} objects")
            seen.add(address)
            if isinstance(obj, h5py.Group):
                stack.append(obj)
            else:
                yield obj


def _check_dataset(data: Any) -> int:
    """Return the size in memory of a dataset, in bytes."""
    if data.external or data.is_virtual:
        raise DataError(f"{data.name} keeps its values in another file; copy the data into one file")
    plan = data.id.get_create_plist()
    codes = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if unknown := [code for code in codes if code not in FILTERS]:
        raise DataError(
            f"{data.name} needs the HDF5 filter plugin {unknown[0]}; write it again with compression='gzip'"
        )
    item = data.dtype.itemsize
    size = math.prod(data.shape or (0,)) * item
    if data.chunks and math.prod(data.chunks) * item > MAX_CHUNK:
        raise DataError(f"{data.name} has chunks {data.chunks} of more than {MAX_CHUNK:.3g} bytes")
    stored = data.id.get_storage_size()
    if size > SMALL and size > MAX_RATIO * stored:
        raise DataError(f"{data.name} claims shape {data.shape}, {size:.3g} bytes, but only {stored} are stored")
    return size


def _check_sparse(group: Any, whole: bool) -> None:
    """Look at shape and starts of the rows, and with `whole` at all indices."""
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format"))
    if shape is None or kind is None:
        return  # three datasets that happen to bear these names; anndata reads them as a plain dict
    data, indices, indptr = group["data"], group["indices"], group["indptr"]
    shape = [int(n) for n in np.asarray(shape).ravel()]
    if len(shape) != 2 or min(shape) < 0 or any(part.ndim != 1 for part in (data, indices, indptr)):
        raise DataError(f"{group.name} is no sparse matrix: shape {shape}")
    if indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        raise DataError(f"{group.name} is damaged: its indices are no whole numbers")
    major, minor = shape[::-1] if str(kind).startswith("csc") else shape
    if len(indptr) != major + 1 or len(data) != len(indices):
        raise DataError(
            f"{group.name} is damaged: shape {shape} does not fit {len(indptr)} row starts, {len(indices)} indices, "
            f"{len(data)} values"
        )
    last = 0
    for part in _parts(indptr):
        if part[0] < last or np.any(part[1:] < part[:-1]):
            raise DataError(f"{group.name} is damaged: its row starts do not ascend")
        last = int(part[-1])
    if int(indptr[0]) != 0 or last != len(indices):
        raise DataError(f"{group.name} is damaged: its row starts do not span the {len(indices)} values")
    for part in _parts(indices) if whole else ():
        if part.min() < 0 or part.max() >= minor:
            raise DataError(f"{group.name} is damaged: it has an index outside 0..{minor - 1}")


def _parts(data: Any) -> Iterator[np.ndarray]:
    """Yield a dataset in parts of 8 million values, none empty."""
    step = 1 << 23
    for start in range(0, len(data), step):
        yield data[start : start + step]
