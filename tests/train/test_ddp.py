"""Two processes train as one: torchrun with gloo, weights compared, cells counted, a process killed."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ddp_script.py")
pytestmark = pytest.mark.slow


def train(out: Path, batch: int, *options: str, processes: int = 1, fails: bool = False) -> dict:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(out), str(batch), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return {} if fails else load_file(out / "weights.safetensors")


def drawn(folder: Path, kind: str) -> dict[int, Counter]:
    epochs: dict[int, Counter] = {}
    for file in folder.glob("drawn.*"):
        for line in file.read_text().splitlines():
            name, epoch, *positions = line.split()
            if name == kind:
                epochs.setdefault(int(epoch), Counter()).update(positions)
    return epochs


NO_GRADIENT = "vae.decoder_head.params.bias"
"""Added to all gene logits alike, it changes nothing: Adam makes full steps of the rounding in its gradient."""


def distance(a: dict, b: dict, *, but: str = "") -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel() and k != but)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("two")
    return folder, train(folder, 8, processes=2)


def test_two_processes_reach_the_weights_of_one(two, tmp_path):
    one = train(tmp_path, 16)
    assert distance(one, two[1], but=NO_GRADIENT) < 1e-4
    histories = [pd.read_csv(folder / "history.csv") for folder in (tmp_path, two[0])]
    assert len(histories[0]) == 7  # 42 steps of each stage
    np.testing.assert_allclose(*(h.to_numpy() for h in histories), rtol=1e-4)


@pytest.mark.parametrize("kind", ["CountBatches", "LatentBatches"])
def test_every_training_cell_is_seen_once_in_an_epoch(two, kind):
    epochs = drawn(two[0], kind)
    assert sorted(epochs) == list(range(7))
    assert all(counts == Counter(map(str, range(95))) for counts in epochs.values())


def test_a_killed_process_and_a_resume_give_the_same_weights(two, tmp_path):
    train(tmp_path, 8, "--kill", "25", processes=2, fails=True)
    assert not (tmp_path / "weights.safetensors").exists()
    resumed = train(tmp_path, 8, "--resume", processes=2)
    assert distance(resumed, two[1]) == 0.0
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "history.csv") for folder in (tmp_path, two[0])))
