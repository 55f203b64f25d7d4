"""Cells encoded by their expressed genes alone have the latents that all genes give."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy import sparse

from scldm_cd4._errors import DataError
from scldm_cd4.config import VAEConfig
from scldm_cd4.data.matrix import expressed_batch
from scldm_cd4.nn import VAE
from scldm_cd4.nn import sparse as sparse_module
from scldm_cd4.nn.sparse import SparseEncoder
from scldm_cd4.train import latents as latents_module
from scldm_cd4.train.latent_cache import cached_latents
from scldm_cd4.train.latents import CellEncoder, encode, encode_rows, latent_bytes
from scldm_cd4.train.loaders import CountBatches

N_GENES = 60
SIZES = {"width": 16, "n_tokens": 4, "n_channels": 4, "n_layers": 2, "n_heads": 2, "n_cross_heads": 2}
VARIANTS = {
    "as released": {"norm_eps": 1e-6},
    "positions, biases, linear path": {"positional": True, "bias": True, "linear_rank": 4, "log_counts": True},
    "logarithms": {"aggregation": "log1p", "projection": "cross_attention"},
    "posterior": {"aggregation": "projconcat", "kl_weight": 0.1},
    "expressed genes": {"encode": "expressed", "mask_padding": True, "log_counts": True},
}


def cells_of(n: int, density: float = 0.2, seed: int = 0) -> sparse.csr_matrix:
    """Counts of which a share is not zero; cells differ in how many."""
    rng = np.random.default_rng(seed)
    shown = rng.random((n, N_GENES)) < density * rng.uniform(0.2, 1.8, size=(n, 1))
    shown[:, 0] = True
    return sparse.csr_matrix((shown * (1 + rng.poisson(2.0, shown.shape))).astype(np.float32))


def trained_vae(**changes) -> VAE:
    """An autoencoder after some steps, whose encoder tells genes and counts apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE(VAEConfig(**SIZES | changes), N_GENES)
        optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=1e-2)
        target = torch.from_numpy(cells_of(64, seed=1).toarray())
        genes = torch.arange(1, N_GENES + 1)
        for _ in range(15):
            z = vae.encode(*dense(vae, target))
            mu, theta = vae.decode(z, genes, target.sum(1, keepdim=True))
            loss = -vae.log_prob(target, mu, theta).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return vae.eval()


def dense(vae: VAE, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of all genes; those without counts masked where the network sees expressed genes alone."""
    genes = torch.arange(1, N_GENES + 1).expand(len(target), -1)
    return target, genes if vae.config.encode == "all" else torch.where(target > 0, genes, 0)


def expressed(counts: sparse.csr_matrix) -> tuple[torch.Tensor, torch.Tensor]:
    genes, values = expressed_batch(counts)
    return torch.from_numpy(values), torch.from_numpy(genes)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_latents_equal_those_from_all_genes(variant: str) -> None:
    with torch.enable_grad():
        vae = trained_vae(**VARIANTS[variant])
    counts = cells_of(50)
    whole = vae.encode(*dense(vae, torch.from_numpy(counts.toarray())))
    assert whole.std(0).mean() > 1e-4  # cells differ by more than what is allowed between the two ways
    assert error(SparseEncoder(vae)(*expressed(counts)), whole) <= 1e-6


@torch.no_grad()
def test_parts_of_the_work_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad():
        vae = trained_vae()
    counts = cells_of(30)
    encoder = SparseEncoder(vae)
    whole = encoder(*expressed(counts))
    monkeypatch.setattr(sparse_module, "CHUNK_BYTES", {"cpu": 1})
    assert error(encoder(*expressed(counts)), whole) <= 1e-6
    order = np.random.default_rng(0).permutation(30)
    assert error(encoder(*expressed(counts[order])), whole[order]) <= 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(encoder(*expressed(counts)), whole) < 0.05


@torch.no_grad()
def test_sums_that_cancel_and_dense_cells_go_through_all_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad():
        vae = trained_vae(aggregation="log1pzero")
    table = vae.input_layer.gene_embedding.weight
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    vae.encoder.ca_layer.attn.c_attn.weight.mul_(30.0)  # nearly all weight on few genes, and exp out of range
    calls = []
    original = SparseEncoder._dense
    monkeypatch.setattr(SparseEncoder, "_dense", lambda self, *a: calls.append(len(a[0])) or original(self, *a))
    counts = cells_of(50)
    single = vae.encode(*dense(vae, _whole(counts)))
    exact = vae.double().encode(_whole(counts).double(), dense(vae, _whole(counts))[1])
    vae.float()
    assert error(SparseEncoder(vae)(*expressed(counts)), exact) < 10 * error(single, exact)
    assert calls
    assert calls[0] < 50
    calls.clear()
    with torch.enable_grad():
        plain = trained_vae()
    full = cells_of(20, density=1.0)
    assert error(SparseEncoder(plain)(*expressed(full)), plain.encode(*dense(plain, _whole(full)))) <= 1e-6
    assert calls == [20]


def _whole(counts: sparse.csr_matrix) -> torch.Tensor:
    return torch.from_numpy(counts.toarray())


def test_attention_to_padding_cannot_be_summed() -> None:
    vae = VAE(VAEConfig(**SIZES, encode="expressed", mask_padding=False), N_GENES)
    with pytest.raises(ValueError, match="padding"):
        SparseEncoder(vae)
    counts = expressed(cells_of(3))
    z = CellEncoder(vae)({"counts": counts[0], "genes": counts[1]})
    assert torch.equal(z, vae.encode(*counts))


def test_a_device_without_double_precision_takes_all_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "supports", lambda vae: False)
    vae, counts = trained_vae(), cells_of(5)
    values, genes = expressed(counts)
    with torch.no_grad():
        assert torch.equal(
            CellEncoder(vae)({"counts": values, "genes": genes}), vae.encode(*dense(vae, _whole(counts)))
        )


def test_cells_are_encoded_with_the_weights_of_the_moment(job) -> None:
    vae, rows = job.vae(), np.arange(8)
    first = encode_rows(vae, job.cells, rows)
    assert vae.training
    with torch.no_grad():
        vae.encoder.ca_layer.attn.c_attn.weight.mul_(2.0)
    changed = encode_rows(vae, job.cells, rows)
    assert error(changed, first) > 1e-3
    genes, counts = expressed_batch(job.cells.counts(rows))
    with torch.no_grad():
        assert error(changed, vae.encode(torch.from_numpy(counts), torch.from_numpy(genes))) <= 1e-6


def test_cached_latents_need_room(job, tmp_path, monkeypatch) -> None:
    vae, data = job.vae(), CountBatches(job.cells, np.arange(10), expressed=True)
    assert latent_bytes(vae.config, 10) == 4 * 10 * 4 * 4
    monkeypatch.setattr(latents_module, "free_memory", lambda: 100)
    with pytest.raises(DataError, match=r"latents of 10 cells.*memory.*checkpoint_dir"):
        encode(vae, data)
    monkeypatch.setattr(latents_module, "free_memory", lambda: None)  # a system that does not say
    path = tmp_path / "z.bin"
    in_file = cached_latents(vae, job.cells, np.arange(10), path)
    assert path.stat().st_size == in_file.nbytes == 640
    assert torch.equal(encode(vae, data), in_file)
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(100))
    with pytest.raises(DataError, match="latents of 9 cells.*disk.*fewer cells"):
        cached_latents(vae, job.cells, np.arange(9), path)
    assert not path.exists()
