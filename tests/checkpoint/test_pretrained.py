"""Checkpoints in the reference's layout through `from_pretrained`, and out again through `export_reference`."""

import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scldm_cd4 import CD4Model, _errors
from scldm_cd4.checkpoint.export import packaged_config
from scldm_cd4.checkpoint.reference import to_reference
from scldm_cd4.config import PRESETS, FlowConfig, VAEConfig
from scldm_cd4.nn import VAE, DiT

N_GENES = 30
LABELS = {
    "donor_id": ["d1", "d2"],
    "guide_target_ensembl": ["NTC", "GATA3", "IL2_RA"],
    "experimental_perturbation_time_point": ["Rest", "Stim8hr", "Stim48hr"],  # not in the order of the alphabet
}
CLASSES = ("donor_id", "experimental_perturbation_time_point", "guide_target_ensembl")
GENES = [f"ENSG{i}" for i in range(N_GENES)]
VOCABULARY = {"genes": GENES, **LABELS}
SIZES = VAEConfig(width=8, n_tokens=4, n_channels=4, n_layers=1, n_heads=2, n_cross_heads=1)
FLOW = FlowConfig(width=16, n_layers=2, n_heads=2)


def settings(vae: VAEConfig = SIZES, flow: FlowConfig = FLOW) -> dict[str, Any]:
    """A job's config.yaml as a tree."""
    tree = packaged_config("cd4_fm")
    encoder = tree["model"]["module"]["vae_model"]["encoder"]
    encoder |= {"n_layer": vae.n_layers, "n_inducing_points": vae.n_tokens, "n_embed": vae.width}
    encoder |= {"n_embed_latent": vae.n_channels, "n_head": vae.n_heads, "n_head_cross": vae.n_cross_heads}
    network = tree["model"]["module"]["diffusion_model"]["nnet"]
    network |= {"n_embed": flow.width, "n_layer": flow.n_layers, "n_head": flow.n_heads}
    tree["datamodule"]["label_encoder"] |= {
        "n_genes": N_GENES,
        "class_vocab_sizes": {name: len(levels) for name, levels in LABELS.items()},
    }
    return tree


def tensors(online_shift: float = 1.0) -> dict[str, torch.Tensor]:
    """All names of a compiled job; the online weights of the flow are shifted against the averaged ones."""
    torch.manual_seed(0)
    vae, dit = VAE(SIZES, N_GENES), DiT(FLOW, SIZES.n_tokens, SIZES.n_channels, (2, 3, 3))
    for p in dit.final_layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    named = to_reference(vae.state_dict(), dit.state_dict())
    out = {}
    for key, tensor in named.items():
        part, name = key.split(".", 1)
        shift = online_shift if part == "diffusion_model" else 0.0
        out[key] = tensor + shift
        out[f"{part}_compiled._orig_mod.{name}"] = tensor + shift
        if shift:
            out |= {f"ema_model.online_model.{name}": tensor + shift, f"ema_model.ema_model.{name}": tensor.clone()}
    return out | {"ema_model.initted": torch.tensor(True), "ema_model.step": torch.tensor(123)}


def cells(n: int = 60) -> ad.AnnData:
    """Training cells with categories in the checkpoint's order."""
    rng = np.random.default_rng(0)
    obs = {
        name: pd.Categorical(rng.permutation(np.resize(levels, n)), categories=levels)
        for name, levels in LABELS.items()
    }
    index = [f"c{i}" for i in range(n)]
    counts = rng.poisson(3.0, (n, N_GENES)).astype(np.float32)
    return ad.AnnData(counts, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "job"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings()))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "job"))


def change(folder: Path, **values: Any) -> None:
    """Set keys of config.yaml, dots written as two underscores."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def refused(folder: Path, match: str, **options: Any) -> str:
    with pytest.raises(_errors.CheckpointError, match=match) as error:
        CD4Model.from_pretrained(folder, **{"vocabulary": VOCABULARY, **options})
    return str(error.value)


def test_the_fixture_gives_its_numbers_through_this_door(shared_dir: Path, tmp_path: Path):
    sizes = VAEConfig(width=32, n_tokens=8, n_channels=4, n_layers=2, n_heads=4, n_cross_heads=2)
    tree = settings(sizes, FlowConfig(width=64, n_layers=2, n_heads=4))
    labels = {"donor_id": 3, "guide_target_ensembl": 11, "experimental_perturbation_time_point": 2}
    tree["datamodule"]["label_encoder"] |= {"n_genes": 60, "class_vocab_sizes": labels}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    shutil.copy(shared_dir / "parity" / "tiny_weights.safetensors", tmp_path / "model.safetensors")
    names = {name: [f"{name}{i}" for i in range(n)] for name, n in labels.items()}
    model = CD4Model.from_pretrained(
        tmp_path, vocabulary={"genes": [f"g{i}" for i in range(60)], **names}, control="guide_target_ensembl0"
    )
    io = load_file(shared_dir / "parity" / "tiny_io.safetensors")
    obs = {name: [names[name][i] for i in io[f"in/condition/{name}"].tolist()] for name in names}
    index = [f"c{i}" for i in range(6)]
    query = ad.AnnData(io["in/counts"].numpy(), obs=pd.DataFrame(obs, index=index))
    query.var_names = model.registry["genes"]
    z = model.get_latent(query[:, ::-1].copy(), flatten=False)
    np.testing.assert_allclose(z, io["vae/latent"].numpy(), atol=1e-5)
    mu = model.get_normalized_expression(query, library_size="latent", return_numpy=True)
    np.testing.assert_allclose(mu, io["vae/mu"].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.get_reconstruction_error(query), io["vae/nll_per_cell"].numpy(), rtol=1e-5)
    codes = np.stack([io[f"in/condition/{name}"].numpy() for name in sorted(labels, key=CLASSES.index)], axis=1)
    velocity = model._state.dit(io["in/x"], io["in/t"], torch.from_numpy(codes))
    np.testing.assert_allclose(velocity.detach().numpy(), io["dit/velocity_cond"].numpy(), atol=2e-4)


def test_average_by_default_and_online_on_request(folder: Path):
    both = {w: CD4Model.from_pretrained(folder, vocabulary=VOCABULARY, weights=w) for w in ("auto", "ema", "online")}
    found = {w: model._state.dit.input_proj.weight.detach() for w, model in both.items()}
    assert torch.equal(found["auto"], found["ema"])
    torch.testing.assert_close(found["online"], found["ema"] + 1.0)
    assert [model.training_["pretrained"]["weights"] for model in both.values()] == ["ema", "ema", "online"]
    assert both["auto"].config.vae == SIZES
    assert both["auto"].config.flow == FLOW
    assert both["auto"].config.train_flow == PRESETS["cd4"].train_flow
    assert both["auto"].registry["control"] == "NTC"
    assert both["auto"].timepoints == ("Rest", "Stim8hr", "Stim48hr")
    assert both["auto"].is_trained_


def test_vocabulary_and_library_sizes_come_from_the_training_cells(folder: Path, tmp_path: Path):
    adata = cells()
    adata.write_h5ad(tmp_path / "train.h5ad")
    model = CD4Model.from_pretrained(folder, vocabulary=tmp_path / "train.h5ad")
    assert model.timepoints == tuple(LABELS["experimental_perturbation_time_point"])
    assert model.registry["genes"] == GENES
    generated = model.generate("GATA3", donor="d1", timepoint="Rest", n_cells=3, seed=0)
    assert generated.var_names.tolist() == GENES
    here = (adata.obs[list(LABELS)] == ["d1", "GATA3", "Rest"]).all(axis=1)
    assert generated.obs["n_train_cells"].unique().tolist() == [here.sum()]
    logs = np.log(adata.X.sum(axis=1))
    overall = model.registry["size_factors"]["overall"]
    # those of cells whose perturbation shifts nothing: these random counts hardly depend on it
    assert (overall["mean"], overall["sd"]) == pytest.approx((logs.mean(), logs.std()), rel=0.02)
    again = CD4Model.from_pretrained(folder, adata=adata)
    assert again.registry == model.registry
    assert again.get_latent().shape == (60, 16)


def test_json_in_a_file_with_codes_or_beside_the_weights(folder: Path, tmp_path: Path):
    coded = {"genes": GENES} | {name: {label: i for i, label in enumerate(x)} for name, x in LABELS.items()}
    (tmp_path / "names.json").write_text(json.dumps(coded))
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    models = [CD4Model.from_pretrained(folder, vocabulary=tmp_path / "names.json"), CD4Model.from_pretrained(folder)]
    assert models[0].registry == models[1].registry
    assert models[0].perturbations == ("NTC", "GATA3", "IL2_RA")
    with pytest.raises(_errors.DataError, match="size_factors="):
        models[0].generate("GATA3", donor="d1", timepoint="Rest", n_cells=2, seed=0)
    assert models[0].generate("GATA3", donor="d1", timepoint="Rest", n_cells=2, size_factors=900, seed=0).n_obs == 2


def flat(shift: float) -> dict[str, float]:
    times = LABELS["experimental_perturbation_time_point"]
    return {f"{t}_{d}": np.float64(shift + i + 10 * j) for i, t in enumerate(times) for j, d in enumerate(["d1", "d2"])}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_library_sizes_from_the_pickles_of_the_reference(folder: Path, tmp_path: Path, protocol: int, monkeypatch):
    times = LABELS["experimental_perturbation_time_point"]
    group = "donor_id_guide_target_ensembl_experimental_perturbation_time_point"
    nested = {
        group: {
            f"{d}_{p}_{t}": np.float64(i + 10 * j + k - 1)
            for i, t in enumerate(times)
            for j, d in enumerate(["d1", "d2"])
            for k, p in enumerate(LABELS["guide_target_ensembl"])
        }
    }
    spread = {group: dict.fromkeys(nested[group], 0.5)}
    for name, mean, sd in (("flat", flat(0.0), flat(0.5)), ("nested", nested, spread)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log_size_factor_mu.pkl").write_bytes(pickle.dumps(mean, protocol=protocol))
        (tmp_path / name / "log_size_factor_sd.pkl").write_bytes(pickle.dumps(sd, protocol=protocol))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    found = {}
    for name in ("flat", "nested"):
        model = CD4Model.from_pretrained(folder, vocabulary=VOCABULARY, size_factors=tmp_path / name)
        found[name] = model.registry["size_factors"]["contexts"]
    assert found["flat"]["Stim48hr"]["d2"] | {"n": 0, "quantiles": 0} == {
        "mean": 12,
        "sd": 12.5,
        "n": 0,
        "quantiles": 0,
    }
    assert found["nested"]["Stim48hr"]["d2"]["mean"] == pytest.approx(12.0)
    assert found["nested"]["Stim48hr"]["d2"]["sd"] == pytest.approx(np.sqrt(0.25 + 2 / 3))


def test_unknown_numbers_of_training_cells_are_missing_and_no_reason_to_refuse(folder: Path, tmp_path: Path):
    sizes = dict.fromkeys(flat(0.0), np.float64(4.5)), dict.fromkeys(flat(0.0), np.float64(0.2))
    for name, values in zip(("mu", "sd"), sizes, strict=True):
        (tmp_path / f"log_size_factor_{name}.pkl").write_bytes(pickle.dumps(values))
    model = CD4Model.from_pretrained(folder, vocabulary=VOCABULARY, size_factors=tmp_path)
    assert not model.registry["train_counts"]
    scores = model.evaluate(cells(720), profile=["pearson_delta"], n_repeats=1, seed=0)
    assert len(scores) == 12
    assert scores.attrs["not_generated"] == []
    assert np.isfinite(scores["value"]).all()
    believed = model.reliability("GATA3", "d1", "Rest", n_cells=20, seed=0)
    assert believed["note"].str.contains("imported without numbers of training cells").all()
    with pytest.raises(_errors.DataError, match="imported without numbers of training cells"):
        model.fit_reliability(cells(720))
    signature = pd.Series(np.random.default_rng(0).normal(size=N_GENES), index=GENES)
    ranked = model.rank_perturbations(signature, n_cells=20, seed=0)
    for table in (believed, ranked):
        assert table[["n_train_cells", "n_train_contexts"]].isna().all(axis=None)
    assert believed["n_train_cells_perturbation"].isna().all()
    assert not ranked["warning"].str.contains("training cells").any()


class Harm:
    """What a hostile pickle does."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_hostile_pickles_are_not_run(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ({"Rest_d1": Harm()}, Harm(), {"Rest_d1": [1]}, {1: 2.0}, {"Rest_d1": float("nan")}, {}):
        for name in ("mu", "sd"):
            (tmp_path / f"log_size_factor_{name}.pkl").write_bytes(pickle.dumps(value))
        refused(folder, "log_size_factor_mu", size_factors=tmp_path)
    whole = pickle.dumps(flat(0.0))
    for data in (b"", whole[:-5], whole[: len(whole) // 2], b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04I00\n", b"x" * 99):
        (tmp_path / "mu.pkl").write_bytes(data)
        refused(folder, r"mu\.pkl", size_factors=(tmp_path / "mu.pkl", tmp_path / "mu.pkl"))
    assert not Path("harmed").exists()


def test_a_lightning_checkpoint_is_read_only_where_trusted_and_never_run(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = OrderedDict(tensors())
    state["vae_model_compiled._orig_mod.encoder.ca_layer.inducing_points"] = state[
        "vae_model.encoder.ca_layer.inducing_points"
    ]
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    (folder / "model.safetensors").rename(tmp_path / "kept.safetensors")
    torch.save(
        {"state_dict": state, "hyper_parameters": Harm(), "optimizer_states": [optimiser.state_dict()]},
        folder / "last.ckpt",
    )
    refused(folder, "allow_pickle=True")
    monkeypatch.setattr(torch, "load", None)
    model = CD4Model.from_pretrained(folder, vocabulary=VOCABULARY, allow_pickle=True)
    shutil.copy(tmp_path / "kept.safetensors", folder / "model.safetensors")
    same(model, CD4Model.from_pretrained(folder, vocabulary=VOCABULARY))
    assert not Path("harmed").exists()
    data = (folder / "last.ckpt").read_bytes()
    for damaged in (data[: len(data) // 2], b"", data.replace(b"FloatStorage", b"OtherStorage")):
        (folder / "last.ckpt").write_bytes(damaged)
        refused(folder / "last.ckpt", r"last\.ckpt", allow_pickle=True)
    flipped = bytearray(data)
    flipped[data.index(state["vae_model.encoder.ca_layer.inducing_points"].numpy().tobytes()) + 5] ^= 4
    (folder / "last.ckpt").write_bytes(flipped)
    refused(folder / "last.ckpt", r"last\.ckpt", allow_pickle=True)


def same(one: CD4Model, other: CD4Model) -> None:
    a, b = one._state.tensors(), other._state.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (one.config.vae, one.config.flow, one.registry) == (other.config.vae, other.config.flow, other.registry)


def test_export_and_import_are_bit_identical(folder: Path, tmp_path: Path):
    model = CD4Model.from_pretrained(folder, vocabulary=cells())
    model.export_reference(tmp_path / "out")
    again = CD4Model.from_pretrained(tmp_path / "out")
    same(model, again)
    assert again.training_["pretrained"]["ema_step"] == 123
    one, other = (m.generate(["GATA3", "NTC"], n_cells=3, seed=1) for m in (model, again))
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
    written, read = load_file(tmp_path / "out" / "model.safetensors"), tensors()
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in read.items()}
    assert all(torch.equal(v, read[k]) for k, v in written.items() if k.startswith(("vae", "ema_model.ema_model")))
    tree = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert tree["model"]["module"]["vae_model"]["encoder"] == settings()["model"]["module"]["vae_model"]["encoder"]
    again.export_reference(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.export_reference(tmp_path / "out")
    model.export_reference(tmp_path / "out", overwrite=True)
    model.save(tmp_path / "own")
    same(model, CD4Model.load(tmp_path / "own"))
    with pytest.raises(FileExistsError):
        model.export_reference(tmp_path / "own", overwrite=True)


def test_damage_of_an_exported_folder_is_named(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    CD4Model.from_pretrained(folder, vocabulary=VOCABULARY).export_reference(out)
    for name in ("model.safetensors", "config.yaml", "registry.json"):
        whole = (out / name).read_bytes()
        for data in (
            whole[:-7],
            whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
        ):
            (out / name).write_bytes(data)
            refused(out, name.replace(".", r"\."), vocabulary=None)
        (out / name).write_bytes(whole)
    (out / "checksums.json").write_text(json.dumps({"../secret": "0"}))
    refused(out, "outside the folder")


def test_a_model_with_parts_of_ours_is_not_exported(trained: CD4Model, tmp_path: Path):
    with pytest.raises(_errors.CheckpointError, match=r"vae\.label_rank.*'cd4' can be exported"):
        trained.export_reference(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_everything_that_does_not_fit_is_named(folder: Path):
    fewer = {**VOCABULARY, "genes": GENES[1:], "donor_id": ["d1"]}
    message = refused(folder, "29 genes are given, the weights have 30", vocabulary=fewer)
    assert "donor_id: 1 labels are given, the weights have 2" in message
    refused(folder, "has no labels for 'donor_id'", vocabulary={k: v for k, v in VOCABULARY.items() if k != "donor_id"})
    refused(folder, "has no 'genes'", vocabulary=LABELS)
    refused(folder, "names something twice", vocabulary={**VOCABULARY, "genes": [*GENES[:-1], GENES[0]]})
    refused(folder, "holds no gene names and labels", vocabulary=None)
    refused(folder, "is not among the perturbations", control="ntc")
    change(folder, datamodule__label_encoder__n_genes=31)
    refused(folder, r"config\.yaml says 31 genes, the weights have 30")
    change(folder, datamodule__label_encoder__n_genes=30, model__module__vae_model__encoder__n_layer=2)
    refused(folder, "n_layers is given as 2, the weights say 1")
    extra = load_file(folder / "model.safetensors") | {"optimizer.state": torch.ones(1)}
    save_file(extra, folder / "model.safetensors")
    refused(folder, r"optimizer\.state")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model__module__vae_model__encoder__n_head", "${oc.env:HOME}", "resolver 'oc.env'"),
        ("model__module__vae_model__encoder__n_head", "${eval:'1+1'}", "resolver 'eval'"),
        ("model__module__vae_model__encoder__n_head", "${nowhere.at.all}", "points to nothing"),
        ("model__module__vae_model__encoder__n_head", "${model.module.vae_model.encoder.n_head}", "back to itself"),
        ("model__module__vae_model__encoder__n_head", "two", "a number is expected"),
        ("model__module__vae_model__encoder__n_head", 1.5, "a whole number is expected"),
        ("model__module__vae_model__encoder__bias", "no", "true or false"),
        ("model__module__vae_model__encoder__n_head", 3, "does not divide"),
        ("model__module__vae_model__encoder__norm_layer", "rmsnorm", "only 'layernorm' is known"),
        ("model__module__vae_model__decoder__use_adaln", True, "only False is known"),
        ("model__module__vae_model__decoder__n_layer", 9, "both must be alike"),
        ("model__decoder_name", "poisson", "points to nothing"),
        ("model__module__diffusion_model__nnet__dropout", 0.5, "no dropout"),
        ("model__module__diffusion_model__nnet__condition_strategy", "both", "joint"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder: Path, key: str, value: Any, match: str):
    change(folder, **{key: value})
    refused(folder, match)


def test_a_config_is_data(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm = {"_target_": "pathlib.Path.touch", "_args_": ["harmed"]}
    change(folder, model__module__vae_model__input_layer___target_="os.system", training__callbacks=harm)
    change(folder, paths={"home": "${oc.env:HOME}"})  # at a key that nobody asks for
    CD4Model.from_pretrained(folder, vocabulary=VOCABULARY)
    for text in ("!!python/object/apply:pathlib.Path.touch ['harmed']", "- a", "a: [", "", "a: &a [*a]\n" * 2, "\x00"):
        (folder / "config.yaml").write_text(text)
        refused(folder, r"config\.yaml")
    (folder / "config.yaml").write_bytes(b"a: " + b"[" * 100_000)
    refused(folder, r"config\.yaml is no plain YAML")
    with (folder / "config.yaml").open("wb") as file:
        file.truncate(2**21)
    refused(folder, r"config\.yaml has 2097152 bytes, more than")
    assert not Path("harmed").exists()


def test_weights_that_are_damaged_hostile_or_missing_are_named(folder: Path, tmp_path: Path):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:4], whole[: len(whole) // 2], b"\x80\x04" + whole, (2**62).to_bytes(8, "little") + whole):
        path.write_bytes(data)
        refused(folder, r"model\.safetensors")
    values = load_file_of(whole, tmp_path)
    values["vae_model.decoder_head.params.bias"][0] = float("nan")
    save_file(values, path)
    refused(folder, r"not finite: vae_model\.decoder_head\.params\.bias")
    (tmp_path / "elsewhere").write_bytes(whole)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, "link out of its folder")
    path.unlink()
    refused(folder, "holds no weights")
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(whole)
    refused(folder, r"several files of weights \(a\.safetensors, b\.safetensors\)")
    assert CD4Model.from_pretrained(folder / "a.safetensors", vocabulary=VOCABULARY).is_trained_
    refused(tmp_path / "nowhere", "no folder or file")


def load_file_of(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "copy").write_bytes(data)
    return load_file(folder / "copy")


def test_a_model_that_save_wrote_comes_through_the_same_door(trained: CD4Model, tmp_path: Path):
    trained.save(tmp_path / "own")
    same(trained, CD4Model.from_pretrained(tmp_path / "own"))
    refused(tmp_path / "own", "needs nothing but adata")


def test_base_scldm_maps_where_its_classes_are_named(folder: Path):
    base = {}
    for key, value in tensors().items():
        if "donor_id" not in key:
            key = key.replace("diffusion_model.nnet.", "diffusion_model.").replace("_orig_mod.nnet.", "_orig_mod.")
            key = key.replace("_model.nnet.", "_model.").replace("guide_target_ensembl", "gene")
            base[key.replace("experimental_perturbation_time_point", "time")] = value
    save_file(base, folder / "model.safetensors")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    diffusion = tree["model"]["module"]["diffusion_model"]
    tree["model"]["module"]["diffusion_model"] = diffusion.pop("nnet")
    tree["datamodule"]["label_encoder"].pop("class_vocab_sizes")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    names = {"genes": GENES, "gene": LABELS["guide_target_ensembl"], "time": ["a", "b", "c"]}
    refused(folder, "condition classes gene, time: say what gene, time means", vocabulary=names)
    columns = {"perturbation": "gene", "timepoint": "time"}
    model = CD4Model.from_pretrained(folder, vocabulary=names, columns=columns)
    assert (model.donors, model.timepoints) == (("all",), ("a", "b", "c"))
    x, t = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    whole = tensors()
    with torch.no_grad():
        whole["ema_model.ema_model.nnet.class_embeddings.donor_id.weight"].zero_()
    reference = DiT(FLOW, 4, 4, (2, 3, 3))
    ema = {
        k.removeprefix("ema_model.ema_model.nnet."): v for k, v in whole.items() if k.startswith("ema_model.ema_model")
    }
    renames = {
        "donor_id": "donor",
        "experimental_perturbation_time_point": "timepoint",
        "guide_target_ensembl": "perturbation",
    }
    for old, new in renames.items():
        ema[f"class_embeddings.{new}.weight"] = ema.pop(f"class_embeddings.{old}.weight")
    reference.load_state_dict(ema)
    labels = torch.tensor([[0, 1, 2], [0, 2, 0]])
    torch.testing.assert_close(model._state.dit(x, t, labels), reference(x, t, labels), rtol=0, atol=0)


def test_a_vae_job_feeds_the_flow(folder: Path, tmp_path: Path):
    vae = {k: v for k, v in tensors().items() if k.startswith("vae_model")}
    save_file(vae, folder / "model.safetensors")
    adata = cells(120)
    names = {"perturbation_key": "guide_target_ensembl", "donor_key": "donor_id"}
    CD4Model.setup_anndata(adata, **names, timepoint_key="experimental_perturbation_time_point", control="NTC")
    model = CD4Model.from_pretrained(folder, adata=adata, flow={"width": 16, "n_layers": 1, "n_heads": 2})
    assert not model.is_trained_
    before = {k: v.clone() for k, v in model._state.vae.state_dict().items()}
    model.train(stage="flow", max_epochs=2, batch_size=32, seed=0, accelerator="cpu")
    assert all(torch.equal(v, before[k]) for k, v in model._state.vae.state_dict().items())
    assert model.generate("GATA3", donor="d1", timepoint="Rest", n_cells=2, seed=0).n_obs == 2
    model.export_reference(tmp_path / "out")
    same(model, CD4Model.from_pretrained(tmp_path / "out"))
