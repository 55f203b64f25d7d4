"""The commands that train, use, convert and check models."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scldm_cd4 import CD4Model, datasets, metrics
from scldm_cd4.checkpoint.native import load_folder
from scldm_cd4.cli import main
from scldm_cd4.cli._arguments import EXAMPLES
from scldm_cd4.cli._train import describe, take_launcher
from scldm_cd4.config import PRESETS

COLUMNS = {"--perturbation-key": "perturbation", "--donor-key": "donor_id", "--timepoint-key": "timepoint"}
KEYS = (*(word for pair in COLUMNS.items() for word in pair), "--control", "NTC")
ENCODER = "model.module.vae_model.encoder"
NETWORK = "model.module.diffusion_model.nnet"
SMALL_VAE = [
    f"{ENCODER}.{x}"
    for x in ("n_layer=1", "n_embed=16", "n_inducing_points=4", "n_embed_latent=4", "n_head=2", "n_head_cross=1")
]
SMALL_FLOW = [f"{NETWORK}.{x}" for x in ("n_layer=1", "n_embed=16", "n_head=2")]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    datasets.synthetic_cd4(300, 50, n_perturbations=3, n_donors=2, n_timepoints=2, seed=0).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def model(trained: CD4Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    trained.save(folder)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any]) -> None:
    """The preset tiny, made to train in a second."""
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"].with_overrides(**quick))


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What a command writes to stdout; for a failing one, its last line on stderr."""
    assert main([*map(str, arguments)]) == status
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    if status == 0:
        return str(out)
    assert out == ""
    return str(error.splitlines()[-1])


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_help_has_an_example_and_the_common_options(command: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: {EXAMPLES[command]}" in text
    assert all(option in text for option in ("--seed", "--device", "--overwrite"))


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_examples_are_understood(command: str):
    from scldm_cd4.cli._main import _parse

    words = re.sub(" > .*", "", EXAMPLES[command]).split()
    assert _parse(words[1:]).run.endswith(f":{command}")


@pytest.mark.filterwarnings("ignore:The decoder makes little use")
def test_train_writes_a_model_and_is_reproducible(cells: Path, tiny: None, tmp_path: Path, capsys):
    arguments = ("train", cells, *KEYS, "--preset", "tiny", "--seed", 4, "--device", "cpu", "--test", 0.2)
    assert run(capsys, *arguments, "--out", tmp_path / "a") == f"{tmp_path / 'a'}\n"
    run(capsys, *arguments, "--out", tmp_path / "b")
    one, other = (load_folder(tmp_path / name) for name in "ab")
    assert all(torch.equal(v, other.tensors[k]) for k, v in one.tensors.items())
    assert one.history["training"]["vae"]["split"]["n_cells"]["test"] > 40
    assert one.history["training"]["flow"]["seed"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no state is left
    assert "--overwrite" in run(capsys, *arguments, "--out", tmp_path / "a", status=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    assert "is no saved model" in run(capsys, *arguments, "--out", tmp_path / "mine", "--overwrite", status=2)
    assert (tmp_path / "mine" / "notes").read_text() == "precious"


def test_train_says_the_effective_rate_and_batch():
    text = describe("vae", PRESETS["cd4"].train_vae, processes=4, accumulate=2)
    assert "effective learning rate 0.0001" in text
    assert "effective batch 64 cells = 8 x 4 processes x 2 accumulated" in text


def test_launchers_give_the_same_variables():
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    assert take_launcher(slurm) == 8
    assert {k: slurm[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    before = dict(torchrun)
    assert take_launcher(torchrun) == 2
    assert torchrun == before
    assert take_launcher({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == 1
    assert take_launcher({}) == 1


@pytest.mark.filterwarnings("ignore:The decoder makes little use")
def test_both_jobs_of_the_reference_and_the_way_between_the_layouts(cells: Path, tmp_path: Path, capsys):
    pytest.importorskip("hydra", reason="the extra hydra is not installed")
    adata = ad.read_h5ad(cells)
    names = {"perturbation": "guide_target_ensembl", "timepoint": "experimental_perturbation_time_point"}
    adata.obs = adata.obs.rename(columns=names)
    data = tmp_path / "train.h5ad"
    adata.write_h5ad(data)
    at = ("--device", "cpu", "training.num_epochs=1", "model.batch_size=64")
    run(capsys, "train", f"datamodule.datamodule.train_adata_path={data}", "--config-name", "cd4_vae", *SMALL_VAE, *at,
        "--out", tmp_path / "vae")  # fmt: skip
    vae = CD4Model.load(tmp_path / "vae")
    assert (vae.config.vae.width, vae.config.vae.n_cross_heads, vae.training_["vae"]["seed"]) == (16, 1, 56)
    assert not vae.is_trained_
    run(capsys, "convert", tmp_path / "vae", tmp_path / "jobs" / "cd4_vae", "--to", "reference")
    flow = ("train", data, "--config-name", "cd4_fm", *SMALL_FLOW, *at)
    message = run(capsys, *flow, "--out", tmp_path / "flow", status=2)
    assert "the flow needs a trained autoencoder" in message
    run(capsys, *flow, f"vae_model_params.ckpt_path={tmp_path / 'jobs'}", "--out", tmp_path / "flow")
    trained = CD4Model.load(tmp_path / "flow")
    assert trained.is_trained_
    assert all(torch.equal(v, trained._state.vae.state_dict()[k]) for k, v in vae._state.vae.state_dict().items())
    assert trained.config.train_flow.lr == 3e-5
    run(capsys, "convert", tmp_path / "flow", tmp_path / "back", "--to", "reference")
    run(capsys, "convert", tmp_path / "back", tmp_path / "again")
    again = CD4Model.load(tmp_path / "again")
    assert again._state.fingerprint() == trained._state.fingerprint()
    assert "overwrite" in run(capsys, "convert", tmp_path / "back", tmp_path / "again", status=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("seed=${oc.env:HOME}", "resolver 'oc.env' is refused"),
        ("seed=${my.own:1}", "resolver 'my.own' is refused"),
        ("no.such=1", "cannot be composed"),
        ("datamodule.label_encoder.n_genes=3699", r"n_genes=50 \(the config says 3699\)"),
        ("model.module.vae_optimizer.caution=true", "only False is known"),
        ("model.module.vae_scheduler.decay_type=sqrt", "only 'cosine' is known"),
        ("datamodule.datamodule.sample_genes=expressed", "only 'none' is known"),
        ("model.module.vae_optimizer.lr=fast", "a number is expected"),
    ],
)
def test_configs_are_data_and_mistakes_are_named(cells: Path, tmp_path: Path, capsys, change: str, match: str):
    pytest.importorskip("hydra", reason="the extra hydra is not installed")
    arguments = ("train", cells, "--config-name", "cd4_vae", *KEYS, change, "--out", tmp_path / "out")
    assert re.search(match, run(capsys, *arguments, status=2))
    assert not list(tmp_path.iterdir())


def test_config_folders_are_looked_at_before_they_are_composed(cells: Path, tmp_path: Path, capsys):
    pytest.importorskip("hydra", reason="the extra hydra is not installed")
    (tmp_path / "mine.yaml").write_text("defaults:\n  - part: ${oc.env:HOME}\nmodel: {}\n")
    at = ("train", cells, *KEYS, "--out", tmp_path / "out", "--config-dir", tmp_path)
    assert "'oc.env' is refused" in run(capsys, *at, "--config-name", "mine", status=2)
    assert "there are: mine" in run(capsys, *at, "--config-name", "other", status=2)
    for name in ("../mine", "/etc/passwd", ""):
        assert "no name of a config" in run(capsys, *at, "--config-name", name, status=2)
    (tmp_path / "mine.yaml").write_text("model: [\n")
    assert "cannot be composed" in run(capsys, *at, "--config-name", "mine", status=2)


def test_encode_gives_the_latents(model: Path, cells: Path, trained: CD4Model, tmp_path: Path, capsys):
    expected = trained.get_latent(ad.read_h5ad(cells))
    table = run(capsys, "encode", model, cells, "--device", "cpu")
    (tmp_path / "z.csv").write_text(table)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "z.csv", index_col="cell").to_numpy(), expected, rtol=1e-5)
    run(capsys, "encode", model, cells, "--out", tmp_path / "z.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)
    run(capsys, "encode", model, cells, "--out", tmp_path / "z.h5ad", "--key-added", "X_z")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "z.h5ad").obsm["X_z"], expected)
    assert "--overwrite" in run(capsys, "encode", model, cells, "--out", tmp_path / "z.npy", status=2)
    assert "must end in" in run(capsys, "encode", model, cells, "--out", tmp_path / "z.txt", status=2)
    run(capsys, "encode", model, cells, "--out", tmp_path / "z.npy", "--overwrite")


def test_generate_rank_and_evaluate(
    model: Path, cells: Path, trained: CD4Model, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "g.h5ad"
    given = ("--perturbation", "NTC", trained.perturbations[1], "--n-cells", 12, "--seed", 3, "--device", "cpu")
    run(capsys, "generate", model, *given, "--out", out)
    made = ad.read_h5ad(out)
    expected = trained.generate(["NTC", trained.perturbations[1]], n_cells=12, seed=3)
    np.testing.assert_array_equal(made.X.toarray(), expected.X.toarray())
    assert "--overwrite" in run(capsys, "generate", model, *given, "--out", out, status=2)
    assert "Near matches" in run(
        capsys, "generate", model, "--perturbation", "ntc", "--out", tmp_path / "h.h5ad", status=2
    )
    (tmp_path / "c.csv").write_text("perturbation,donor,timepoint,n_cells\nNTC,CE0008162,Stim8hr,5\n")
    run(capsys, "generate", model, "--conditions", tmp_path / "c.csv", "--out", tmp_path / "t.h5ad", "--seed", 1)
    assert ad.read_h5ad(tmp_path / "t.h5ad").n_obs == 5

    genes = trained.registry["genes"]
    pd.DataFrame({"gene": genes, "weight": np.arange(len(genes)) - 20.0}).to_csv(tmp_path / "s.csv", index=False)
    ranked = run(capsys, "rank", model, "--target", tmp_path / "s.csv", "--n-cells", 20, "--seed", 0)
    (tmp_path / "r.csv").write_text(ranked)
    assert set(pd.read_csv(tmp_path / "r.csv")["perturbation"]) == set(trained.perturbations) - {"NTC"}
    (tmp_path / "s.csv").write_text("gene,weight\nA,much\n")
    assert "weight of 'A' is no number" in run(capsys, "rank", model, "--target", tmp_path / "s.csv", status=2)

    scores = tmp_path / "scores.csv"
    arguments = ("evaluate", cells, out, "--train", cells, "--profile", "minimal", "--seed", 0, "--out", scores)
    assert "were not predicted" in run(capsys, *arguments, status=2)
    run(capsys, *arguments, "--allow-missing")
    table = pd.read_csv(scores)
    assert {"perturbation", "metric", "value", "floor", "ceiling"} <= set(table.columns)
    assert table["value"].notna().any()
    taken = tmp_path / "page.html"
    taken.write_text("mine")
    refused = run(capsys, *arguments[:-2], "--report", taken, status=2)
    assert "page.html" in refused
    assert taken.read_text() == "mine"
    page = tmp_path / "own.html"
    monkeypatch.setattr("scldm_cd4.pl.embed_like", lambda first, *others, seed: [x[:, :2] for x in others])
    run(capsys, *arguments[:-2], "--allow-missing", "--report", page)
    assert "<html" in page.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:The decoder makes little use")
def test_evaluate_a_model_on_its_held_out_cells(
    tiny: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts in a layer, which the model knows; the page is of the same cells as the table."""
    adata = datasets.synthetic_cd4(400, 40, n_perturbations=2, n_donors=1, n_timepoints=1, seed=0)
    adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    data, folder, scores, page = (tmp_path / name for name in ("c.h5ad", "m", "s.csv", "p.html"))
    adata.write_h5ad(data)
    keys = ("--perturbation-key", "perturbation", "--donor-key", "donor_id", "--control", "NTC", "--layer", "counts")
    train = ("train", data, *keys, "--preset", "tiny", "--test", 0.3, "--seed", 0, "--device", "cpu", "--out", folder)
    assert main([*map(str, train)]) == 0
    assert f"scored by: scldm-cd4 evaluate {data} --model {folder}" in capsys.readouterr().err
    model = CD4Model.load(folder, adata, device="cpu")
    shown = []
    report = metrics.report
    monkeypatch.setattr(metrics, "report", lambda **options: shown.append(options) or report(**options))
    monkeypatch.setattr("scldm_cd4.metrics.page.parts.sections", lambda *_: [])  # takes long
    how = ("--profile", "minimal", "--seed", 3, "--min-cells", 8)
    run(capsys, "evaluate", data, "--model", folder, "--device", "cpu", *how, "--out", scores, "--report", page)
    expected = model.evaluate(profile="minimal", min_cells=8, seed=3)
    found = pd.read_csv(scores, keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(found.drop(columns="note"), expected.drop(columns="note"), check_dtype=False)
    assert "<html" in page.read_text(encoding="utf-8")

    real, pred, trained = (shown[0][side] for side in ("real", "pred", "train"))
    real.layers["counts"], real.X = real.X, real.X.log1p()
    files = held, made, seen = [tmp_path / f"{name}.h5ad" for name in ("held_out", "generated", "train")]
    for side, path in zip((real, pred, trained), files, strict=True):
        side.write_h5ad(path)
    scores.write_text(run(capsys, "evaluate", held, made, "--train", seen, "--layer", "counts", *how))
    pd.testing.assert_frame_equal(pd.read_csv(scores, keep_default_na=False, na_values=[""]), found)

    assert "either PRED" in run(capsys, "evaluate", data, status=2)
    assert "either PRED" in run(capsys, "evaluate", data, made, "--model", folder, status=2)
    assert "--layer is for files" in run(capsys, "evaluate", data, "--model", folder, "--layer", "counts", status=2)
    assert "does not hold the cells that" in run(capsys, "evaluate", held, "--model", folder, status=2)


def test_evaluate_finds_targets_by_symbol(cells: Path, tmp_path: Path, capsys) -> None:
    adata = ad.read_h5ad(cells)
    made = adata[(adata.obs["perturbation"] != "NTC").to_numpy()].copy()
    made.var["symbol"] = made.var_names
    made.uns["scldm_cd4"] = {"perturbation_key": "perturbation", "control": "NTC"}
    paths = tmp_path / "real.h5ad", tmp_path / "made.h5ad"
    for side, path in zip((adata, made), paths, strict=True):
        side.obs_names = side.obs_names + path.stem
        side.X = np.random.default_rng(len(path.stem)).poisson(side.X.toarray()).astype(np.float32)
        side.var_names = [f"ENS{i}" for i in range(side.n_vars)]
        side.write_h5ad(path)
    text = run(capsys, "evaluate", *paths, "--profile", "minimal", "--genes", "intersection")
    assert "its target is not among the genes" not in text
    assert "'targ' is not a column" in run(capsys, "evaluate", *paths, "--perturbation-key", "targ", status=2)
    made.var = made.var[[]]
    made.write_h5ad(paths[1])
    assert "its target is not among the genes" in run(capsys, "evaluate", *paths, "--profile", "minimal")


def test_info_and_validate(model: Path, cells: Path, trained: CD4Model, tmp_path: Path, capsys):
    assert "genes: 50" in run(capsys, "info", model)
    values = json.loads(run(capsys, "info", model, "--json"))
    assert values["registry"]["genes"] == trained.registry["genes"]
    assert values["hash"] == trained._state.fingerprint()
    assert "valid model" in run(capsys, "validate", model)
    assert "50 of the model's 50 genes found" in run(capsys, "validate", cells, "--model", model)
    assert "raw counts" in run(capsys, "validate", cells, *KEYS)
    assert "'perturbatio' is not a column" in run(
        capsys, "validate", cells, "--perturbation-key", "perturbatio", status=1
    )
    (model / "config.json").rename(tmp_path / "config.json")
    assert "config.json missing" in run(capsys, "validate", model, status=1)
    assert "config.json missing" in run(capsys, "info", model, status=2)
    (tmp_path / "config.json").rename(model / "config.json")
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(cells.read_bytes()[:5000])
    assert "is not valid" in run(capsys, "validate", broken, *KEYS, status=1)


@pytest.mark.filterwarnings("ignore:The decoder makes little use")
def test_nothing_is_unpickled_from_training_to_ranking(cells: Path, tiny: None, tmp_path: Path, capsys, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(owner, name, refuse)
    folder, out = tmp_path / "m", tmp_path / "g.h5ad"
    train = ("train", cells, *KEYS, "--preset", "tiny", "--seed", 0, "--device", "cpu", "--out", folder)
    state = tmp_path / ".m.training"
    real = CD4Model.save
    monkeypatch.setattr(CD4Model, "save", None)  # the training ends and its state stays
    with pytest.raises(TypeError):
        main([*map(str, train)])
    assert (state / "flow.safetensors").exists()
    monkeypatch.setattr(CD4Model, "save", real)
    run(capsys, *train, "--resume")
    run(capsys, "generate", folder, "--n-cells", 12, "--seed", 0, "--out", out)
    genes = CD4Model.load(folder).registry["genes"]
    pd.DataFrame({"gene": genes, "weight": np.arange(len(genes)) - 20.0}).to_csv(tmp_path / "s.csv", index=False)
    run(capsys, "rank", folder, "--target", tmp_path / "s.csv", "--n-cells", 20, "--seed", 0)
    run(capsys, "evaluate", cells, out, "--train", cells, "--profile", "minimal", "--seed", 0)
    assert run(capsys, "info", folder)
