"""A training that is killed goes on with ``--resume`` to bit-identical weights."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = textwrap.dedent("""
    import os, signal, sys, warnings
    from pathlib import Path
    import numpy, torch
    from scldm_cd4 import config, datasets
    from scldm_cd4.checkpoint.native import load_folder
    from scldm_cd4.cli import main
    from scldm_cd4.train import guard

    torch.set_num_threads(1)
    folder, first, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    guard.SAVE_EVERY = 0.0  # state after every step
    adata = datasets.synthetic_cd4(150, 24, n_perturbations=2, n_donors=1, n_timepoints=2, seed=0)
    adata.write_h5ad(folder / "cells.h5ad")
    keys = ["--perturbation-key", "perturbation", "--timepoint-key", "timepoint", "--control", "NTC"]
    size = ["--preset", "tiny", "--max-epochs", "2", "--batch-size", "64", "--seed", "3", "--device", "cpu"]
    arguments = ["train", str(folder / "cells.h5ad"), *keys, *size]
    small = {"width": 8, "n_layers": 1, "n_heads": 2}
    changes = {"vae": {**small, "n_tokens": 2, "n_channels": 4, "n_cross_heads": 2}, "flow": small}
    config.PRESETS["tiny"] = config.PRESETS["tiny"].with_overrides(**changes)

    def train(out, *more, kill_at=None):
        \"\"\"Run the command in a child that kills itself at a moment; return whether it lived.\"\"\"
        child = os.fork()
        if child == 0:
            left = [kill_at]
            def counted(real):
                def call(*args, **kwargs):
                    if left[0] is not None:
                        left[0] -= 1
                        if left[0] < 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)
                return call
            # moments: every training step, every write of state, every rename
            guard.Guard.on_train_batch_end = counted(guard.Guard.on_train_batch_end)
            guard.Guard.on_train_epoch_end = counted(guard.Guard.on_train_epoch_end)
            Path.replace, Path.rename, os.fsync = counted(Path.replace), counted(Path.rename), counted(os.fsync)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            status = main([*arguments, "--out", str(out), *more])
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return not os.WIFSIGNALED(status)

    assert train(folder / "whole")
    expected = load_folder(folder / "whole").tensors
    point, killed, alive = first, 0, False
    while not alive:
        out = folder / f"killed_{point}"
        alive = train(out, kill_at=point)
        assert train(out, "--resume")
        found = load_folder(out).tensors
        assert found.keys() == expected.keys()
        wrong = [k for k in found if not torch.equal(found[k], expected[k])]
        assert not wrong, (point, wrong)
        left = [p.name for p in folder.iterdir() if p.name.startswith(f".{out.name}")]
        assert not left, left
        killed += not alive
        point += stride
    print(killed, "killed of", point, "moments")
""")


def run(tmp_path: Path, first: int, stride: int, at_least: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(first), str(stride)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= at_least


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_at_some_moments_of_both_stages(tmp_path: Path):
    run(tmp_path, first=2, stride=31, at_least=2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_at_every_moment_of_both_stages(tmp_path: Path):
    run(tmp_path, first=0, stride=1, at_least=40)
