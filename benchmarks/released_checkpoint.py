"""Write a checkpoint of exactly the released layout with seeded random weights, read it, and time that.

python benchmarks/released_checkpoint.py FOLDER: writes 830 MB (630 tensors) once, then imports and generates in a fresh
process, and prints seconds and peak memory. The weights are random: nothing but size, names and speed is real.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from scldm_cd4 import CD4Model
from scldm_cd4.checkpoint.export import packaged_config
from scldm_cd4.checkpoint.reference import from_reference, read_safetensors, to_reference
from scldm_cd4.config import PRESETS
from scldm_cd4.nn import VAE, DiT

N_GENES = 3699
LABELS = {
    "donor_id": [f"donor_{i}" for i in range(4)],
    "guide_target_ensembl": ["NTC", *(f"ENSG{i:011d}" for i in range(10570))],
    "experimental_perturbation_time_point": ["Rest", "Stim48hr", "Stim8hr"],
}
VOCABULARY = {"genes": [f"gene_{i}" for i in range(N_GENES)], **LABELS}


def released_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the 630 tensors; the averaged flow is another draw than the online one."""
    torch.manual_seed(seed)
    config = PRESETS["cd4"]
    vae = VAE(config.vae, N_GENES)
    online, average = (DiT(config.flow, 256, 16, (4, 3, 10571)) for _ in range(2))
    for dit in (online, average):
        for layer in (*[block.adaln_modulation for block in dit.blocks], dit.final_layer):
            for p in layer.parameters():
                torch.nn.init.normal_(p, std=0.02)
    out: dict[str, torch.Tensor] = {}
    for key, tensor in to_reference(vae.state_dict(), online.state_dict()).items():
        part, name = key.split(".", 1)
        out[key], out[f"{part}_compiled._orig_mod.{name}"] = tensor, tensor.clone()
        if part == "diffusion_model":
            out[f"ema_model.online_model.{name}"] = tensor.clone()
    for key, tensor in to_reference({}, average.state_dict()).items():
        out[f"ema_model.ema_model.{key.split('.', 1)[1]}"] = tensor
    return out | {"ema_model.initted": torch.tensor(True), "ema_model.step": torch.tensor(100_000)}


def write(folder: Path) -> None:
    """Write weights, config and vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(released_tensors(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(packaged_config("cd4_fm")))
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))


def read(folder: Path) -> dict[str, Any]:
    """Import, check that every distinct tensor arrived, and generate; return seconds and peak memory."""
    start = time.perf_counter()
    model = CD4Model.from_pretrained(folder, device="cpu")
    seconds, peak = time.perf_counter() - start, _peak()
    start = time.perf_counter()
    cells = model.generate(
        "ENSG00000000007",
        donor="donor_1",
        timepoint="Rest",
        n_cells=2,
        solver="euler",
        n_steps=1,
        size_factors=1500,
        seed=0,
    )
    made = time.perf_counter() - start
    tensors = read_safetensors(folder / "model.safetensors")
    found = from_reference(tensors)
    state = {f"vae.{k}": v for k, v in found.vae_state.items()} | {f"dit.{k}": v for k, v in found.dit_state.items()}
    mine = model._state.tensors()
    return {
        "tensors": len(tensors),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "distinct": len(mine),
        "all_equal": mine.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in mine.items()),
        "import_seconds": round(seconds, 2),
        "peak_gb": round(peak, 3),
        "generate_seconds": round(made, 2),
        "counts": float(cells.X.sum()),
    }


def _peak() -> float:
    """Peak resident memory of this process, in GB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Write where needed, and read in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--read-only", action="store_true", help="import in this process")
    options = parser.parse_args()
    if options.read_only:
        print(json.dumps(read(options.folder)))
        return
    if not (options.folder / "vocabulary.json").exists():
        write(options.folder)
    subprocess.run([sys.executable, __file__, str(options.folder), "--read-only"], check=True)


if __name__ == "__main__":
    main()
