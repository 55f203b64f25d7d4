"""Reference weights of any size, in and out."""

import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from scldm_cd4 import _errors
from scldm_cd4.checkpoint.reference import from_reference, read_safetensors, split_reference, to_reference
from scldm_cd4.config import FlowConfig, VAEConfig
from scldm_cd4.nn import VAE, DiT

HEADS = {"vae": {"n_heads": 2, "n_cross_heads": 1}, "flow": {"n_heads": 2}}
VAE_SIZES = VAEConfig(width=8, n_tokens=3, n_channels=4, n_layers=2, n_heads=2, n_cross_heads=1)
FLOW_SIZES = FlowConfig(width=12, n_layers=3, n_heads=2)
N_GENES, VOCABULARY = 7, (2, 3, 5)

VARIANTS = [
    {},
    {"n_layers": 1, "n_bins": 4, "bin_hidden": 6},
    {"bias": True, "positional": True, "multiple_of": 16},
    {"projection": "cross_attention", "n_channels": 6},
    {"shared_embedding": False, "theta": "cell_gene"},
    {"head": "decoupled", "gene_bias": True},
    {"head": "decoupled"},
    {"aggregation": "proj"},
    {"aggregation": "projconcat"},
]


def states(vae: VAEConfig = VAE_SIZES, flow: FlowConfig = FLOW_SIZES) -> tuple[VAE, DiT]:
    return VAE(vae, N_GENES), DiT(flow, vae.latent_tokens, vae.n_channels, VOCABULARY)


def checkpoint(prefix: str = "diffusion_model.nnet.") -> dict[str, torch.Tensor]:
    vae, dit = states()
    tensors = to_reference(vae.state_dict(), dit.state_dict())
    return {key.replace("diffusion_model.nnet.", prefix): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("options", VARIANTS)
def test_sizes_and_variants_are_read_from_the_tensors(options):
    config = replace(VAE_SIZES, **options)
    vae, dit = states(config, replace(FLOW_SIZES, bias=bool(options.get("bias"))))
    ref = from_reference(to_reference(vae.state_dict(), dit.state_dict()), **HEADS)
    assert (ref.vae, ref.flow, ref.n_genes, ref.vocabulary) == (config, dit.config, N_GENES, VOCABULARY)
    for module, state in ((VAE(ref.vae, ref.n_genes), ref.vae_state), (states(config, ref.flow)[1], ref.dit_state)):
        module.load_state_dict(state, strict=True)
    assert all(torch.equal(ref.vae_state[k], v) for k, v in vae.state_dict().items())
    assert all(torch.equal(ref.dit_state[k], v) for k, v in dit.state_dict().items())


def test_the_attributes_get_their_own_tables():
    tensors = checkpoint()
    for i, name in enumerate(("donor_id", "experimental_perturbation_time_point", "guide_target_ensembl")):
        tensors[f"diffusion_model.nnet.class_embeddings.{name}.weight"].fill_(i)
    state = split_reference(tensors)[1]
    means = [state[f"class_embeddings.{role}.weight"].mean().item() for role in ("donor", "timepoint", "perturbation")]
    assert means == [0.0, 1.0, 2.0]


def test_average_and_last_step_are_told_apart_and_aliases_are_taken_where_needed():
    tensors = checkpoint()
    vae = {k: v for k, v in tensors.items() if k.startswith("vae_model.")}
    flow = {k: v for k, v in tensors.items() if k.startswith("diffusion_model.")}
    names = {"online": "diffusion_model.nnet.", "ema": "ema_model.ema_model.nnet."}
    copies = {f"ema_model.ema_model.nnet.{k.removeprefix(names['online'])}": v + 1 for k, v in flow.items()}
    scalars = {"ema_model.initted": torch.tensor(True), "ema_model.step": torch.tensor(5)}
    whole = tensors | copies | scalars
    key = "input_proj.weight"
    for weights, expected, taken in (("auto", 1, "ema"), ("ema", 1, "ema"), ("online", 0, "online")):
        _, state, which = split_reference(whole, weights=weights)
        assert which == taken
        torch.testing.assert_close(state[key], flow[names["online"] + key] + expected)
    assert split_reference(tensors)[2] == "online"
    compiled = {k.replace("vae_model.", "vae_model_compiled._orig_mod.", 1): v for k, v in vae.items()}
    compiled |= {k.replace("diffusion_model.", "diffusion_model_compiled._orig_mod.", 1): v for k, v in flow.items()}
    ref = from_reference(compiled, **HEADS)
    assert torch.equal(ref.dit_state[key], flow[names["online"] + key])
    assert split_reference(vae)[1:] == ({}, None)


@pytest.mark.parametrize(
    ("weights", "prefix"), [("ema", "diffusion_model.nnet."), ("online", "ema_model.ema_model.nnet.")]
)
def test_a_copy_that_is_not_there_is_not_replaced_by_the_other(weights, prefix):
    with pytest.raises(_errors.CheckpointError, match="take weights="):
        split_reference(checkpoint(prefix), weights=weights)


def test_every_missing_unexpected_and_misshaped_tensor_is_named():
    tensors = checkpoint()
    gone = ["vae_model.decoder.decoder_layers.1.mlp.w1.weight", "diffusion_model.nnet.blocks.2.attn.c_proj.weight"]
    for key in gone:
        del tensors[key]
    added = ["vae_model.encoder.novel", "diffusion_model.nnet.class_embeddings.cell_line.weight"]
    tensors |= {key: torch.zeros(2) for key in added}
    bent = "diffusion_model.nnet.t_embedder.mlp.2.bias"
    tensors[bent] = torch.zeros(13)
    with pytest.raises(_errors.CheckpointError) as error:
        from_reference(tensors, **HEADS)
    assert all(key in str(error.value) for key in (*gone, *added, bent))
    assert "(13,), not (12,)" in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "vae_model.input_layer.gene_embedding.weight",
        "vae_model.encoder.ca_layer.inducing_points",
        "diffusion_model.nnet.class_embeddings.guide_target_ensembl.weight",
        "diffusion_model.nnet.pos_embed",
        "diffusion_model.nnet.blocks.0.mlp.w1.weight",
    ],
)
def test_a_tensor_that_gives_a_size_is_named_when_missing(key):
    tensors = checkpoint()
    del tensors[key]
    with pytest.raises(_errors.CheckpointError, match=key.replace(".", r"\.")):
        from_reference(tensors, **HEADS)


def test_any_tensor_of_another_shape_is_refused():
    whole = checkpoint()
    shapes = [(), (0,), (3,), (2, 0), (400, 1), (1, 400), (2, 2, 2), (1, 3, 400)]
    for i, key in enumerate(whole):
        with pytest.raises(ValueError, match="shape|does not divide|width"):
            from_reference(whole | {key: torch.zeros(shapes[i % len(shapes)])}, **HEADS)


def test_foreign_names_and_files_without_autoencoder_are_refused():
    with pytest.raises(_errors.CheckpointError, match=r"optimizer\.state"):
        split_reference(checkpoint() | {"optimizer.state": torch.zeros(1)})
    with pytest.raises(_errors.CheckpointError, match="no autoencoder"):
        split_reference({k: v for k, v in checkpoint().items() if not k.startswith("vae_model")})
    with pytest.raises(ValueError, match="'auto', 'ema' or 'online'"):
        split_reference(checkpoint(), weights="best")


def test_what_the_shapes_do_not_tell_must_be_given():
    with pytest.raises(ValueError, match="n_cross_heads"):
        from_reference(checkpoint(), vae={"n_heads": 2}, flow=HEADS["flow"])
    with pytest.raises(ValueError, match="flow=.*n_heads"):
        from_reference(checkpoint(), vae=HEADS["vae"])
    with pytest.raises(ValueError, match="does not divide"):
        from_reference(checkpoint(), vae={"n_heads": 3, "n_cross_heads": 1}, flow=HEADS["flow"])
    with pytest.raises(ValueError, match="the weights say 8"):
        from_reference(checkpoint(), vae=HEADS["vae"] | {"width": 16}, flow=HEADS["flow"])
    vae, dit = states(replace(VAE_SIZES, aggregation="sqrt"))
    tensors = to_reference(vae.state_dict(), dit.state_dict())
    with pytest.raises(ValueError, match="aggregation"):
        from_reference(tensors, **HEADS)
    ref = from_reference(tensors, vae=HEADS["vae"] | {"aggregation": "sqrt"}, flow=HEADS["flow"])
    assert ref.vae.aggregation == "sqrt"


def test_parts_that_the_reference_lacks_are_not_exported():
    vae = VAE(replace(VAE_SIZES, kl_weight=0.1), N_GENES)
    with pytest.raises(_errors.CheckpointError, match=r"latent_log_variance.*novel_part"):
        to_reference(vae.state_dict() | {"novel_part.weight": torch.zeros(1)}, {})


def test_lower_precision_is_read_as_float32(tmp_path):
    save_file({k: v.bfloat16().contiguous() for k, v in checkpoint().items()}, tmp_path / "half.safetensors")
    ref = from_reference(read_safetensors(tmp_path / "half.safetensors"), **HEADS)
    assert {v.dtype for state in (ref.vae_state, ref.dit_state) for v in state.values()} == {torch.float32}


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_and_damaged_files_are_refused_without_being_run(tmp_path):
    path = tmp_path / "model weights.ckpt"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
        with pytest.raises(_errors.CheckpointError, match="model weights.ckpt"):
            read_safetensors(path)
    torch.save({"vae_model.x": torch.zeros(2)}, path)
    with pytest.raises(_errors.CheckpointError, match="pickled"):
        read_safetensors(path)
    with pytest.raises(_errors.CheckpointError, match="no file"):
        read_safetensors(tmp_path)
    save_file(checkpoint(), path)
    whole = path.read_bytes()
    for n in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(_errors.CheckpointError, match="model weights.ckpt"):
            read_safetensors(path)
