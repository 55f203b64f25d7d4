"""The sampler that this package is measured against computes what the reference computes."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scldm_cd4.checkpoint.reference import CLASS_NAMES, from_reference, read_safetensors
from scldm_cd4.config import ROLES
from scldm_cd4.nn import VAE, DiT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rival() -> Any:
    if not (ROOT / "benchmarks" / "rival.py").exists():
        pytest.skip("the benchmarks are not part of this copy of the project")
    pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("benchmarks.rival")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def stored(shared_dir: Path) -> Any:
    """The reference's tensors, evaluations and networks of the tiny size."""
    path = shared_dir / "parity" / "tiny_io.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    c = json.loads(metadata["config"])
    found = from_reference(
        read_safetensors(path.with_name("tiny_weights.safetensors")),
        vae={"n_heads": c["n_head"], "n_cross_heads": c["n_head_cross"]},
        flow={"n_heads": c["dit_head"]},
    )
    vae = VAE(found.vae, found.n_genes)
    dit = DiT(found.flow, found.vae.latent_tokens, found.vae.n_channels, found.vocabulary)
    vae.load_state_dict(found.vae_state)
    dit.load_state_dict(found.dit_state)
    return read_safetensors(path), json.loads(metadata["nfe"]), vae.eval(), dit.eval()


def labels_of(tensors: Any) -> Tensor:
    return torch.stack([tensors[f"in/condition/{CLASS_NAMES[role]}"] for role in ROLES], dim=1)


def test_its_networks_give_the_reference(rival: Any, stored: Any) -> None:
    tensors, _, vae, dit = stored
    with torch.no_grad():
        v = rival.velocity(dit, tensors["in/x"], tensors["in/t"], labels_of(tensors))
        mu, _ = rival.decode(vae, tensors["in/x"], tensors["in/library_size"], labels_of(tensors))
    torch.testing.assert_close(v, tensors["dit/velocity_cond"], rtol=0, atol=2e-5)
    torch.testing.assert_close(mu, tensors["vae/decode_x_mu"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_its_end_points_are_those_of_the_reference(rival: Any, stored: Any, w: float) -> None:
    tensors, nfe, vae, dit = stored
    name = f"dopri5_rtol1e-3_atol1e-6_w{w}"
    sampler = rival.Rival(vae, dit, w)
    z = sampler.latents(tensors["in/noise"], labels_of(tensors))
    for half in z.chunk(2):
        torch.testing.assert_close(half, tensors[f"ode/{name}"], rtol=0, atol=0.1)
    assert abs(sampler.evaluations - nfe[name]) <= 6 * 3  # rounding moves its first step, so some steps more or less


def test_it_draws_two_cells_for_each_that_was_asked(rival: Any, stored: Any) -> None:
    tensors, _, vae, dit = stored
    labels = labels_of(tensors)
    sizes = {"_".join(str(x) for x in row.tolist()[:2]): (6.0, 0.1) for row in labels}
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = rival.Rival(vae, dit).cells(tensors["in/noise"], labels, sizes)
    assert counts.shape == (2 * len(labels), vae.n_genes)
    assert torch.equal(counts, counts.round())
    assert counts.sum(1).mean().item() == pytest.approx(400, rel=0.3)
    assert torch.equal(before, torch.get_rng_state())
