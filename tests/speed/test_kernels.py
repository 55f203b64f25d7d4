"""Faster ways through the networks give the numbers of the plain ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from scldm_cd4.config import PRESETS
from scldm_cd4.nn import VAE, DiT, layers
from scldm_cd4.nn.decoding import folds

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {},
    "bias": {"bias": True},
    "poisson": {"head": "poisson"},
    "decoupled": {"head": "decoupled", "gene_bias": True},
    "dispersion of each cell": {"theta": "cell_gene"},
    "own embedding": {"shared_embedding": False},
    "cross attention": {"projection": "cross_attention"},
    "one head": {"n_cross_heads": 1},
}


def randomised(module: Any, std: float) -> Any:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.normal_(std=std, generator=generator)
    return module.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_many_cells_gives_the_plain_decoder(name: str) -> None:
    config = replace(PRESETS["small"].vae, **VARIANTS[name])
    vae = randomised(VAE(config, 301, (2, 3, 4)), 0.1)
    assert folds(vae.decoder.decoder_cross_attention, config.n_tokens)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, 16, 8, generator=generator)
    labels, genes = torch.randint(0, 3, (8, 3), generator=generator), torch.arange(1, 302)
    plain = vae.decode(z, genes, torch.full((8, 1), 900.0), labels)
    with torch.inference_mode():
        fast = vae.decode(z, genes, torch.full((8, 1), 900.0), labels)
        some = vae.decode(z, genes[5:20], torch.full((8, 1), 900.0), labels)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=3e-6, atol=0)
    assert some[0].shape == (8, 15)


def test_large_models_keep_the_order_of_products_that_takes_fewer() -> None:
    config = PRESETS["cd4"].vae
    vae = VAE(replace(config, n_layers=0), 10)
    assert not folds(vae.decoder.decoder_cross_attention, config.n_tokens)


@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(4, 8, 8, 16), (4, 16, 16, 32), (2, 300, 16, 16)])
def test_written_out_attention_equals_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, heads: int, queries: int, keys: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, width, generator=generator) for n in (queries, keys, keys))
    mask = torch.rand(3, 1, 1, keys, generator=generator) < 0.7
    mask[..., 0] = True
    for m in (None, mask):
        found = []
        for limit in (10**9, 0):
            monkeypatch.setattr(layers, "EXPLICIT_ATTENTION_KEYS", limit)
            found.append(layers.attend(q, k, v, m))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("rows", [8, 64])
def test_a_cell_does_not_depend_on_its_place_in_the_pass(preset: str, rows: int) -> None:
    config = PRESETS[preset]
    tokens, channels = config.vae.n_tokens, config.vae.n_channels
    dit = randomised(DiT(config.flow, tokens, channels, (2, 3, 4)), 0.1)
    vae = randomised(VAE(config.vae, 331, (2, 3, 4)), 0.1)
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(rows, tokens, channels, generator=generator), torch.randint(0, 3, (rows, 3))
    order, t, library = torch.randperm(rows, generator=generator), torch.full((rows,), 0.3), torch.full((rows, 1), 9e2)
    genes = torch.arange(1, 332)
    with torch.inference_mode():
        assert torch.equal(dit(x, t, labels)[order], dit(x[order], t, labels[order]))
        means = [vae.decode(z, genes, library, c)[0] for z, c in ((x, labels), (x[order], labels[order]))]
        assert torch.equal(means[0][order], means[1])
