"""Every stored tensor of the reference networks against ours: same weights, same inputs, same numbers.

The fixtures of any size are taken up by their file names (``<size>_weights``, ``_io``, ``_grads``, ``_extras``).
All stored tensors are compared or used as input: `test_no_stored_tensor_is_left_out` fails otherwise.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from scldm_cd4.checkpoint.reference import CLASS_NAMES, Reference, from_reference, read_safetensors, to_reference
from scldm_cd4.config import ROLES, FlowConfig, VAEConfig
from scldm_cd4.flow import flow_loss, guided, interpolate, solve
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.nn.dit import position_table, time_features
from scldm_cd4.nn.vae import CountHead, InputLayer
from scldm_cd4.train.ema import EMA
from scldm_cd4.train.schedules import wsd_schedule

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"
SIZES = sorted(path.name.removesuffix("_weights.safetensors") for path in PARITY.glob("*_weights.safetensors"))
if not SIZES:
    pytest.skip(f"the reference fixtures are not at {PARITY}", allow_module_level=True)

HEADS = {"head_shared": {}, "head_unshared": {"theta": "cell_gene"}}
HEADS |= {"head_decoupled_shared": {"head": "decoupled", "gene_bias": True}}
HEADS |= {"head_decoupled_unshared": {"head": "decoupled", "gene_bias": True, "theta": "cell_gene"}}
VARIANTS = {
    "vae_cross_attention_projection": {"projection": "cross_attention"},
    "vae_positional": {"positional": True},
    "vae_own_decoder_embedding": {"shared_embedding": False},
    "vae_log1p_unshared_theta": {"aggregation": "log1p", "theta": "cell_gene"},
}
SCHEDULES = {"cosine_f1.0": ("cosine", 1.0), "cosine_f0.1": ("cosine", 0.1), "sqrt_f0.1": ("sqrt", 0.1)}


def stored_keys(size: str, part: str) -> list[str]:
    path = PARITY / f"{size}_{part}.safetensors"
    if not path.exists():
        return []
    with safe_open(path, "pt") as file:
        return list(file.keys())


def outputs(part: str) -> list[tuple[str, str]]:
    """(size, key) of every stored tensor that is a result."""
    keys = [(size, key) for size in SIZES for key in stored_keys(size, part)]
    return [(s, k) for s, k in keys if not k.startswith("in/") and "/weights/" not in k and k != "head_input"]


class Stored:
    """The tensors of one size, and which of them were used as input."""

    def __init__(self, size: str) -> None:
        self.size, self.used = size, set[str]()
        self.tensors: dict[str, Tensor] = {}
        for part in ("io", "grads", "extras"):
            if stored_keys(size, part):
                self.tensors |= read_safetensors(PARITY / f"{size}_{part}.safetensors")
        with safe_open(PARITY / f"{size}_io.safetensors", "pt") as file:
            metadata = file.metadata()
        self.config, self.nfe = json.loads(metadata["config"]), json.loads(metadata["nfe"])

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def weights(self, tag: str) -> dict[str, Tensor]:
        at = f"{tag}/weights/"
        return {key.removeprefix(at): self[key] for key in self.tensors if key.startswith(at)}

    def labels(self) -> Tensor:
        return torch.stack([self[f"in/condition/{CLASS_NAMES[role]}"] for role in ROLES], dim=1)

    def reference(self) -> Reference:
        c = self.config
        return from_reference(
            read_safetensors(PARITY / f"{self.size}_weights.safetensors"),
            vae={"n_heads": c["n_head"], "n_cross_heads": c["n_head_cross"]},
            flow={"n_heads": c["dit_head"]},
        )

    def networks(self) -> tuple[VAE, DiT]:
        ref = self.reference()
        vae, dit = VAE(ref.vae, ref.n_genes), DiT(ref.flow, ref.vae.latent_tokens, ref.vae.n_channels, ref.vocabulary)
        return loaded(vae, ref.vae_state), loaded(dit, ref.dit_state)


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module.eval()


def vae_results(s: Stored, vae: VAE) -> dict[str, Tensor]:
    counts, genes, library = s["in/counts"], s["in/genes"], s["in/library_size"]
    order = s["in/gene_permutation"]
    tokens = vae.input_layer(counts, genes)
    z = vae.encode(counts, genes)
    mu, theta = vae.decode(z, genes, library)
    nll = -vae.log_prob(counts, mu, theta)
    x_mu, x_theta = vae.decode(s["in/x"], genes[0], library)
    z_subset = vae.encode(s["in/counts_subset"], s["in/genes_subset"])
    return {
        "vae/input_tokens": tokens,
        "vae/mcab_tokens": vae.encoder.ca_layer(vae.encoder.ca_layer.keys_values(tokens)),
        "vae/encoder_tokens_before_projection": vae.encoder_tokens(counts, genes),
        "vae/latent": z,
        "vae/latent_permuted_genes": vae.encode(counts[:, order], genes[:, order]),
        "vae/mu": mu,
        "vae/theta": theta.expand_as(mu),
        "vae/nll_elementwise": nll,
        "vae/nll_per_cell": nll.sum(1),
        "vae/nll_loss": nll.sum(1).mean()[None],
        "vae/decode_x_mu": x_mu,
        "vae/decode_x_theta": x_theta.expand_as(x_mu),
        "vae/subset_latent": z_subset,
        "vae/subset_mu": vae.decode(z_subset, genes, library)[0],
    }


def flow_results(s: Stored, dit: DiT) -> dict[str, Tensor]:
    x, t, labels, null = s["in/x"], s["in/t"], s.labels(), dit.unconditional
    masked = torch.where(s["in/drop_mask"][:, None], null, labels)
    scales = dict(zip(("donor", "perturbation", "timepoint"), s["in/cfg_additive_scales"].tolist(), strict=True))
    additive = {"strategy": "mutually_exclusive", "unconditional": null}
    x_t, u = interpolate(s["in/noise"], s["vae/latent"], t)
    out = {
        "dit/pos_embed": position_table(*dit.pos_embed.shape[1:]),
        "dit/timestep_features": time_features(t),
        "dit/t_embedding": dit.t_embedder(t),
        "dit/condition_embedding": dit.condition_embedding(labels),
        "dit/velocity_cond": dit(x, t, labels),
        "dit/velocity_null": dit(x, t, null.expand_as(labels)),
        "dit/velocity_drop_mask": dit(x, t, masked),
        "dit/cfg_additive_uncond_half": guided(dit, guidance=0.0, **additive)(x, t, labels),
        "dit/cfg_additive_cond_half": guided(dit, guidance=scales, **additive)(x, t, labels),
        "flow/x_t": x_t,
        "flow/u_t": u,
    }
    for w in (1.0, 2.5):
        out[f"dit/cfg_joint_w{w}"] = guided(dit, strategy="joint", guidance=w, unconditional=null)(x, t, labels)
    for i, role in enumerate(ROLES):
        only = null.expand_as(labels).clone()
        only[:, i] = labels[:, i]
        out[f"dit/velocity_only_{CLASS_NAMES[role]}"] = dit(x, t, only)
    for name, c in (("cond", labels), ("drop_mask", masked)):
        loss = flow_loss(dit(x_t, t, c), u)
        out |= {f"flow/loss_per_cell_{name}": loss, f"flow/loss_{name}": loss.mean()[None]}
    return out


def ode_results(s: Stored, vae: VAE, dit: DiT) -> dict[str, Tensor]:
    labels, out = s.labels(), {}
    for key in [k for k in s.tensors if k.startswith("ode/") and not k.startswith("ode/decoded")]:
        solver, w = key.removeprefix("ode/").split("_")[0], re.search(r"_w([\d.]+)$", key)
        velocity = guided(dit, strategy="joint", guidance=float(w[1]) if w else 1.0, unconditional=dit.unconditional)
        options = {name: float(v) for name, v in re.findall(r"_(rtol|atol)([\de.-]+)", key)}
        if points := re.search(r"_num_steps(\d+)", key):  # the reference counts time points
            options["n_steps"] = int(points[1]) - 1
        else:
            pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
        out[key] = solve(velocity, s["in/noise"], labels, solver=solver.replace("heun2", "heun"), **options)
    end = s["ode/dopri5_rtol1e-3_atol1e-6_w1.0"]
    out["ode/decoded_mu_from_dopri5_w1.0"] = vae.decode(end, s["in/genes"][0], s["in/library_size"])[0]
    return out


def grad_results(s: Stored, vae: VAE, dit: DiT) -> dict[str, Tensor]:
    with torch.enable_grad():
        counts, genes, library = s["in/counts"], s["in/genes"], s["in/library_size"]
        vae_loss = -vae.log_prob(counts, *vae.decode(vae.encode(counts, genes), genes, library)).sum(1).mean()
        vae_loss.backward()
        labels = torch.where(s["in/drop_mask"][:, None], dit.unconditional, s.labels())
        x_t, u = interpolate(s["in/noise"], s["vae/latent"], s["in/t"])
        flow_loss(dit(x_t, s["in/t"], labels), u).mean().backward()
    grads = [{k: p.grad for k, p in m.named_parameters() if p.grad is not None} for m in (vae, dit)]
    return {f"grad/{key}": grad for key, grad in to_reference(*grads).items()}


def extra_results(s: Stored, vae: VAE, dit: DiT) -> dict[str, Tensor]:
    if not stored_keys(s.size, "extras"):
        return {}
    out, n_genes = {}, vae.n_genes
    counts, genes, library = s["in/counts"], s["in/genes"], s["in/library_size"]
    base = {
        k: getattr(vae.config, k) for k in ("width", "n_tokens", "n_channels", "n_layers", "n_heads", "n_cross_heads")
    }
    for name in ("log1p", "log1pzero", "anscombe", "sqrt", "proj", "projconcat", "softbin"):
        layer = InputLayer(VAEConfig(**base, aggregation=name), n_genes)
        out[f"agg_{name}/out"] = loaded(layer, s.weights(f"agg_{name}"))(counts, genes)
    for tag, options in HEADS.items():
        head = loaded(CountHead(VAEConfig(**base, **options), n_genes), s.weights(tag))
        mu, theta = head(s["head_input"], genes, library)
        out |= {f"{tag}/mu": mu, f"{tag}/theta": theta.expand_as(mu)}
    for tag, options in VARIANTS.items():
        variant = loaded(VAE(VAEConfig(**base, **options), n_genes), s.weights(tag))
        z = variant.encode(counts, genes)
        mu, theta = variant.decode(z, genes, library)
        out |= {f"{tag}/latent": z, f"{tag}/mu": mu, f"{tag}/theta": theta.expand_as(mu)}
    weights = {f"diffusion_model.{k}": v for k, v in s.weights("dit_bias").items()}
    vae_weights = to_reference(vae.state_dict(), {})
    heads = {k: base[k] for k in ("n_heads", "n_cross_heads")}
    ref = from_reference(vae_weights | weights, vae=heads, flow={"n_heads": dit.config.n_heads})
    assert ref.flow.bias
    biased = loaded(DiT(ref.flow, ref.vae.latent_tokens, ref.vae.n_channels, ref.vocabulary), ref.dit_state)
    out["dit_bias/velocity_cond"] = biased(s["in/x"], s["in/t"], s.labels())
    return out | training_results()


def training_results() -> dict[str, Tensor]:
    out = {}
    for name, (kind, fraction) in SCHEDULES.items():
        factors = [wsd_schedule(i, n_steps=1000, n_warmup=100, decay_fraction=fraction, kind=kind) for i in range(1002)]
        out[f"schedule_{name}"] = torch.tensor(factors, dtype=torch.float64)
    scalar = nn.Linear(1, 1, bias=False)
    ema, values = EMA(scalar, decay=0.9999, every=10, after=100), []
    for i in range(600):
        scalar.weight.data.fill_(float(i))
        ema.update(scalar)
        values.append(float(ema.values["weight"]))
    return out | {"ema/values_update_every10_after100_beta0.9999": torch.tensor(values, dtype=torch.float64)}


@pytest.fixture(scope="module")
def results():
    """Per size: the stored tensors and all of our results; computed once."""
    cache: dict[str, tuple[Stored, dict[str, Tensor]]] = {}

    def compute(size: str) -> tuple[Stored, dict[str, Tensor]]:
        if size not in cache:
            s = Stored(size)
            vae, dit = s.networks()
            with torch.no_grad():
                ours = vae_results(s, vae) | flow_results(s, dit) | ode_results(s, vae, dit)
                ours |= extra_results(s, vae, dit)
            cache[size] = s, ours | grad_results(s, vae, dit)
        return cache[size]

    return compute


def tolerance(key: str) -> tuple[float, float]:
    """Relative and absolute tolerance at the tiny size, from the notes that come with the fixtures."""
    exact = ("input_tokens", "timestep_features", "condition_embedding", "pos_embed", "x_t", "u_t")
    rules = [
        (key.startswith("dit/pos_embed"), (0.0, 0.0)),
        (key.endswith(exact) or key.startswith("agg_"), (1e-6, 1e-6)),
        (key.startswith("schedule_"), (0.0, 1e-15)),
        (key.startswith("ema/"), (2e-7, 0.0)),
        (key.startswith("vae_log1p_unshared_theta/mu"), (0.0, 1e-2)),
        (key.startswith("vae_own_decoder_embedding/mu"), (0.0, 1e-4)),
        (key.startswith(("vae_log1p", "vae_own")) and key.endswith("latent"), (0.0, 1e-4)),
        ("dopri5" in key and "decoded" not in key, (0.0, 0.1)),
        (key.endswith("theta"), (1e-5, 0.0)),
        (re.search(r"[/_]mu(_|$)", key), (1e-5, 1e-7)),
        ("nll" in key, (0.0, 1e-4)),
        (key.startswith("grad/"), (1e-5, 2e-5)),
        (key.startswith("flow/loss"), (1e-5, 1e-6)),
        (key.startswith(("vae", "dit/t_embedding")), (0.0, 1e-5)),
        (key.startswith("ode/") and key.endswith("w2.5"), (0.0, 2e-4)),
        (key.startswith(("ode/", "dit")), (0.0, 5e-5)),
    ]
    return next(limits for applies, limits in rules if applies)


def assert_close(size: str, key: str, ours: Tensor, stored: Tensor) -> None:
    assert ours.shape == stored.shape
    relative, absolute = tolerance(key)
    if key == "vae_log1p_unshared_theta/theta":  # weights without fan-in scaling: exp() overflows and underflows
        assert torch.equal(torch.isinf(ours), torch.isinf(stored))
        finite = torch.isfinite(stored) & (stored > 0) & (ours > 0)
        ours, stored, relative, absolute = ours[finite].log(), stored[finite].log(), 0.0, 0.5
    if size == "tiny":
        torch.testing.assert_close(ours.to(stored.dtype), stored, rtol=relative, atol=absolute)
        return
    # rounding grows with the sizes: root mean square, and more of it
    error = (ours.double() - stored.double()).square().mean().sqrt().item()
    scale = stored.double().square().mean().sqrt().item()
    assert error <= 10 * (absolute + relative * scale) + (0.5 if key.startswith("ode/") else 0.0)


@pytest.mark.parametrize(("size", "key"), outputs("io"))
def test_outputs(results, size, key):
    s, ours = results(size)
    assert_close(size, key, ours[key], s.tensors[key])


@pytest.mark.parametrize(("size", "key"), outputs("grads"))
def test_gradients(results, size, key):
    s, ours = results(size)
    assert_close(size, key, ours[key], s.tensors[key])


@pytest.mark.parametrize(("size", "key"), outputs("extras"))
def test_variants_schedules_and_averages(results, size, key):
    s, ours = results(size)
    assert_close(size, key, ours[key], s.tensors[key])


@pytest.mark.parametrize("size", SIZES)
def test_no_stored_tensor_is_left_out(results, size):
    s, ours = results(size)
    assert set(s.tensors) == set(ours) | s.used
    assert not [key for key in ours if key not in s.tensors]


@pytest.mark.parametrize("size", SIZES)
def test_solvers_evaluate_the_velocity_as_often_as_the_reference(results, size):
    s, _ = results(size)
    checked = 0
    for name, n in s.nfe.items():
        points = re.match(r"(euler|midpoint|heun2|rk4)_num_steps(\d+)", name)
        if not points:
            continue
        calls = []

        def velocity(x: Tensor, t: Tensor, labels: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return torch.zeros_like(x)

        solver, steps = points[1].replace("heun2", "heun"), int(points[2]) - 1
        solve(velocity, s["in/noise"], s.labels(), solver=solver, n_steps=steps)
        assert len(calls) == n
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    summary = json.loads((PARITY / f"{size}_summary.json").read_text())
    vae, dit = Stored(size).networks()
    assert sum(p.numel() for p in vae.parameters()) == summary["n_params_vae"]
    assert sum(p.numel() for p in dit.parameters()) == summary["n_params_flow"]
    assert isinstance(dit.config, FlowConfig)
