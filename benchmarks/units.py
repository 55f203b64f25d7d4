"""Cells drawn as work units by one process, Ray and torchrun, with workers killed on the way: cost, memory, identity.

    python benchmarks/units.py --n-cells 100000 --folder /tmp/units

Every way runs in a process of its own, with one thread each. Times are processor seconds of that process and all that
it started (Ray's own processes among them), so that they mean something on a busy machine. Needs the extra ray.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GENES, PERTURBATIONS, COUNTS = 40, 5, 100.0
WAYS = ("plain", "units", "ray1", "ray2", "ray4", "torchrun2")


def descendants(root: int) -> list[int]:
    """Return the processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                    int(entry.name)
                )
            except OSError:
                continue
    found, todo = [], [root]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor seconds that processes and their ended children took."""
    total = 0
    for pid in pids:
        try:
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return total / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int | str = "self") -> float:
    """Return the largest resident memory that a process had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def make_model(folder: Path) -> None:
    """Train a model of the smallest size for a moment; what it draws does not matter here."""
    import warnings

    from scldm_cd4 import CD4Model, datasets

    warnings.simplefilter("ignore")
    adata = datasets.synthetic_cd4(2000, GENES, n_perturbations=PERTURBATIONS, n_donors=2, n_timepoints=2, seed=0)
    keys = {"perturbation_key": "perturbation", "donor_key": "donor_id", "timepoint_key": "timepoint"}
    CD4Model.setup_anndata(adata, **keys, control="NTC")
    stage = {"target_steps": 40}
    model = CD4Model(adata, "tiny", vae={"n_tokens": 4}, flow={"n_layers": 1}, train_vae=stage, train_flow=stage)
    model.train(seed=0)
    model.save(folder)


def draw(folder: Path, n_cells: int, way: str, kill: bool) -> dict[str, float]:
    """Generate in this process by one way."""
    import torch

    from scldm_cd4 import CD4Model, settings
    from scldm_cd4.distributed import generate_divided
    from scldm_cd4.engines import Ray

    torch.set_num_threads(1)
    settings.num_workers, settings.progress = 1, False
    out = folder / f"{way}.h5ad"
    model = CD4Model.load(folder / "model", device="cpu")
    each = -(-n_cells // (2 * 2 * (PERTURBATIONS + 1)))
    how = {"solver": "euler", "n_steps": 2, "batch_size": 128}
    labels = {"perturbation": None, "donor": None, "timepoint": None}
    if way.startswith("ray"):
        import ray

        ray.init(num_cpus=int(way[3:]), include_dashboard=False, log_to_driver=False)
    everybody = [os.getpid(), *descendants(os.getpid())]
    cpu, wall = cpu_seconds(everybody), time.time()
    workers: list[int] = []
    if kill:
        threading.Thread(target=kill_worker, args=(out, workers), daemon=True).start()
    if way == "plain":
        model.generate(n_cells=each, seed=0, out=out, size_factors=COUNTS, **how)
    else:
        engine = Ray() if way.startswith("ray") else "units"
        asked = {"n_cells": each, "seed": 0, "out": out, "size_factors": COUNTS, "genes": None}
        generate_divided(model, engine, labels, sampling=how, overwrite=False, **asked)
    everybody = [os.getpid(), *descendants(os.getpid())]
    peaks = [peak_mb(pid) for pid in descendants(os.getpid()) if command_of(pid).startswith(b"ray::")]
    return {
        "cpu": cpu_seconds(everybody) - cpu,
        "wall": time.time() - wall,
        "peak_mb": peak_mb(),
        "worker_mb": max(peaks, default=0.0),
        "killed": float(len(workers)),
    }


def command_of(pid: int) -> bytes:
    """Return the command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_at_work(pid: int) -> bool:
    """Return whether a process is one of Ray's workers that draws a unit."""
    return b"ray::_apply" in command_of(pid)


def kill_worker(out: Path, killed: list[int]) -> None:
    """Kill one worker when some units are there."""
    units = Path(f"{out}.units")
    while not killed:
        time.sleep(0.02)
        if units.is_dir() and len(list(units.glob("unit-*"))) >= 3:
            for pid in filter(is_at_work, descendants(os.getpid())):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break


def torchrun(folder: Path, n_cells: int) -> dict[str, float]:
    """Run the command under torchrun with two processes, kill one on the way, and run it again."""
    out = folder / "torchrun2.h5ad"
    each = -(-n_cells // (2 * 2 * (PERTURBATIONS + 1)))
    words = f"generate {folder / 'model'} --out {out} --n-cells {each} --solver euler --n-steps 2 --batch-size 128"
    words += f" --size-factor {COUNTS}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "scldm_cd4.cli"]
    command += [*words.split(), "--seed", "0", "--device", "cpu", "--engine", "units"]
    units, before = Path(f"{out}.units"), os.times()
    wall = time.time()
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list(units.glob("unit-*"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    victim = next(pid for pid in descendants(run.pid) if b"scldm_cd4.cli" in command_of(pid))
    os.kill(victim, signal.SIGKILL)
    status = run.wait()
    there = {p.name: p.stat().st_mtime_ns for p in units.glob("unit-*")}
    joined = threading.Event()
    redrawn: set[str] = set()

    def watch() -> None:
        while not joined.is_set():
            for name, when in there.items():
                try:
                    if (units / name).stat().st_mtime_ns != when:
                        redrawn.add(name)
                except OSError:
                    continue
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    joined.set()
    after = os.times()
    return {
        "cpu": after.children_user + after.children_system - before.children_user - before.children_system,
        "wall": time.time() - wall,
        "killed": 1.0,
        "first_status": float(status),
        "kept_units": float(len(there)),
        "redrawn": float(len(redrawn)),
    }


def digest(path: Path) -> str:
    """Return a hash of counts, labels and genes, and of the whole file."""
    import anndata as ad

    adata = ad.read_h5ad(path)
    parts = [adata.X.data, adata.X.indices, adata.X.indptr]
    content = hashlib.sha256(b"".join(p.tobytes() for p in parts))
    content.update(adata.obs.to_csv().encode() + adata.var.to_csv().encode())
    return f"{adata.n_obs} cells, {content.hexdigest()[:12]}, file {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def main() -> None:
    """Run all ways one after the other, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-cells", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("units_benchmark"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.one is not None:
        kill = options.one in ("ray2", "ray4")
        print(json.dumps(draw(folder, options.n_cells, options.one, kill)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        make_model(folder / "model")
    for n_cells in (options.n_cells // 5, options.n_cells):
        ways = (
            options.ways
            if n_cells == options.n_cells
            else [way for way in options.ways if way in ("plain", "units", "ray1")]
        )
        for way in ways:
            for old in (folder / f"{way}.h5ad", folder / f"{way}.h5ad.units"):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            if way == "torchrun2":
                found = torchrun(folder, n_cells)
            else:
                command = [sys.executable, __file__, "--one", way, "--n-cells", str(n_cells), "--folder", str(folder)]
                text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(text.splitlines()[-1])
            figures = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            print(f"{way:10s} {figures} | load {os.getloadavg()[0]:.1f} | {digest(folder / f'{way}.h5ad')}", flush=True)


if __name__ == "__main__":
    main()
