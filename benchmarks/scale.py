"""Training from files: memory by number of cells, throughput of the loader, share of a step that waits for cells.

python -m benchmarks.scale memory --cells 200000 800000 --stage vae
python -m benchmarks.scale memory --cells 200000 800000 --stage flow
python -m benchmarks.scale loader --cells 40000
python -m benchmarks.scale wait --cells 40000
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

N_GENES, EXPRESSED = 3_699, 400
PIECE = 20_000
KEYS = {"perturbation_key": "perturbation", "donor_key": "donor", "control": "P0"}
SMALL = {
    "vae": {"width": 16, "n_tokens": 4, "n_channels": 4, "n_heads": 2, "n_cross_heads": 2, "label_rank": 0},
    "flow": {"width": 16, "n_layers": 1, "n_heads": 2},
}


def write_cells(path: Path, n: int, expressed: int = EXPRESSED, **storage: Any) -> Path:
    """Write random counts to an h5ad file piece by piece, unless it is there."""
    if path.exists():
        return path
    rng, width = np.random.default_rng(0), N_GENES // expressed
    obs = {
        "perturbation": pd.Categorical.from_codes(rng.integers(0, 200, n), [f"P{i}" for i in range(200)]),
        "donor": pd.Categorical.from_codes(rng.integers(0, 4, n), list("abcd")),
    }
    table = pd.DataFrame(obs, index=pd.Index([f"cell{i:08d}" for i in range(n)]))
    empty = sparse.csr_matrix((n, N_GENES), dtype=np.float32)
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as file:
        write_elem(file, "/", ad.AnnData(empty, table, pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])))
        group, size = file["X"], n * expressed
        for name in ("data", "indices", "indptr"):
            del group[name]
        data = group.create_dataset("data", (size,), "f4", chunks=(1 << 16,), **storage)
        indices = group.create_dataset("indices", (size,), "i4", chunks=(1 << 16,), **storage)
        group.create_dataset("indptr", data=np.arange(n + 1, dtype=np.int64) * expressed)
        for start in range(0, n, PIECE):
            rows = min(PIECE, n - start)
            span = slice(start * expressed, (start + rows) * expressed)
            steps = rng.integers(0, width, (rows, expressed), dtype=np.int32)
            indices[span] = (np.arange(expressed, dtype=np.int32) * width + steps).ravel()
            data[span] = rng.geometric(0.3, rows * expressed)
    part.replace(path)
    return path


def peak_anonymous(command: list[str]) -> float:
    """Run a process and return its largest anonymous memory, MiB (pages of mapped files do not count).

    It is looked at from outside: a thread inside would miss peaks of some milliseconds while it waits for its turn.
    """
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak / 1024


def train(path: Path, stage: str, batches: int) -> None:
    """Train one stage on a file; the flow takes the autoencoder that was trained before."""
    from scldm_cd4 import CD4Model, open_cells

    cells, saved = open_cells(path), path.with_name("autoencoder")
    CD4Model.setup_anndata(cells, **KEYS)
    model = CD4Model(cells, "tiny", **SMALL) if stage == "vae" else CD4Model.load(saved, cells)
    model.train(max_epochs=1, stage=stage, batch_size=256, seed=0, limit_train_batches=batches, early_stopping=False)
    if stage == "vae":
        model.save(saved, overwrite=True)


def memory(folder: Path, sizes: list[int], stage: str, batches: int, rounds: int) -> None:
    """Print the largest memory of training on files of several sizes, each in processes of their own."""
    for n in sizes:
        path = write_cells(folder / f"cells{n}.h5ad", n)
        command = [sys.executable, __file__, "train", "--file", str(path), "--stage", stage, "--batches", str(batches)]
        before = os.times()
        peaks = [f"{peak_anonymous(command):.0f}" for _ in range(rounds)]
        cpu = (os.times().children_user - before.children_user) / rounds
        print(f"{n} cells, {stage}: peak {', '.join(peaks)} MiB, {cpu:.0f} s CPU each", flush=True)


def loader(folder: Path, n: int, rounds: int, batch: int = 512) -> None:
    """Print cells per CPU second of ways to read shuffled batches as dense arrays, interleaved."""
    from scldm_cd4 import CD4Model, open_cells
    from scldm_cd4.data.cells import CellData
    from scldm_cd4.train.loaders import CountBatches, make_loader

    path = write_cells(folder / f"cells{n}.h5ad", n)
    zipped = write_cells(folder / f"gzip{n // 4}.h5ad", n // 4, compression="gzip")
    matrix, backed = ad.read_h5ad(path).X, ad.read_h5ad(path, backed="r").X
    matrix = sparse.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
    rng = np.random.default_rng(0)

    def stored(path: Path) -> CountBatches:
        store = open_cells(path)
        CD4Model.setup_anndata(store, **KEYS)
        cells = CellData.from_adata(store)
        rows = np.flatnonzero(rng.random(cells.n_cells) < 0.9)  # a tenth is held out
        return CountBatches(cells, rows, expressed=False)

    def arrays(source: Any, cells: int) -> Any:
        order = rng.permutation(source.shape[0])
        for start in range(0, cells, batch):
            yield source[np.sort(order[start : start + batch])].toarray()

    def ours(data: CountBatches) -> Any:
        for part in make_loader(data, batch, int(rng.integers(1000))):
            yield part["target"]

    def of_scdataset(data: CountBatches) -> Any:
        from scdataset import BlockShuffling, scDataset

        class Rows:
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, index: Any) -> Any:
                return data.cells.counts(data.rows[index])

        for part in scDataset(Rows(), BlockShuffling(64), batch, 16, seed=0):
            yield part.toarray()

    plain, compressed = stored(path), stored(zipped)
    ways = {
        "in-memory CSR": lambda: arrays(matrix, n // 2),
        "backed h5ad, random rows (anndata)": lambda: arrays(backed, 4 * batch),
        "open_cells": lambda: ours(plain),
        "open_cells, gzip": lambda: ours(compressed),
        "gzip, random rows": lambda: arrays(ad.read_h5ad(zipped, backed="r").X, 256),
    }
    if find_spec("scdataset") is not None:
        ways["scDataset over open_cells"] = lambda: of_scdataset(plain)
    times: dict[str, list[float]] = {name: [] for name in ways}
    warnings.simplefilter("ignore")
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            cells = sum(len(part) for part in way())
            times[name].append(cells / (time.process_time() - began))
    base, naive = (np.median(times[name]) for name in list(ways)[:2])
    for name, values in times.items():
        rate = np.median(values)
        print(f"{name:38} {rate:>9,.0f} cells/CPU-s  {rate / base:6.3f} of memory  {rate / naive:6.2f} x naive")
    print("load", os.getloadavg())


def wait(folder: Path, n: int, batches: int) -> None:
    """Print the share of the training time of `tiny` in which the step waits for a batch."""
    from scldm_cd4 import CD4Model, open_cells
    from scldm_cd4.train.loaders import ResumableLoader

    store = open_cells(write_cells(folder / f"cells{n}.h5ad", n))
    CD4Model.setup_anndata(store, **KEYS)
    clocks, iterate = (time.perf_counter, time.thread_time), ResumableLoader.__iter__
    waited, whole = [0.0, 0.0], [0.0, 0.0]

    def add(to: list[float], began: list[float]) -> None:
        to[:] = [total + clock() - start for total, clock, start in zip(to, clocks, began, strict=True)]

    def timed(self: Any) -> Any:
        items = iterate(self)
        while True:
            began = [clock() for clock in clocks]
            batch = next(items, None)
            if batch is None:
                return
            training = self.sampler.seed is not None
            add(waited if training else [0.0, 0.0], began)
            yield batch
            add(whole if training else [0.0, 0.0], began)

    ResumableLoader.__iter__ = timed  # type: ignore[method-assign]
    model = CD4Model(store, "tiny", vae={"label_rank": 0})  # effects of labels come after the last step
    model.train(max_epochs=1, stage="vae", seed=0, batch_size=256, limit_train_batches=batches, validation_size=0.01)
    for name, part, total in zip(("clock", "CPU of the training thread"), waited, whole, strict=True):
        print(f"waiting for batches, {name}: {part:.2f} of {total:.2f} s, {part / total:.1%}")
    print("load", os.getloadavg())


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "loader", "wait", "train"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--cells", type=int, nargs="+", default=[40_000])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--stage", choices=("vae", "flow"), default="vae")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "train":
        train(options.file, options.stage, options.batches)
    elif options.what == "memory":
        memory(options.folder, options.cells, options.stage, options.batches, options.rounds)
    elif options.what == "loader":
        loader(options.folder, options.cells[0], options.rounds)
    else:
        wait(options.folder, options.cells[0], options.batches)


if __name__ == "__main__":
    main()
