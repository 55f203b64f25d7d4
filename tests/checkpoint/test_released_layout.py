"""The layout and the settings of the released checkpoint, at its own size."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scldm_cd4.checkpoint.export import _all_names, packaged_config
from scldm_cd4.checkpoint.job import (
    Job,
    class_sizes,
    configured,
    control_name,
    flow_fields,
    n_genes,
    refuse_resolvers,
    stage_config,
    vae_fields,
)
from scldm_cd4.checkpoint.reference import to_reference
from scldm_cd4.cli._config import compose
from scldm_cd4.config import PRESETS, FlowConfig, VAEConfig
from scldm_cd4.nn import VAE, DiT

CD4 = PRESETS["cd4"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("part", "n"), [("fm", 630), ("vae", 360)])
def test_an_export_has_exactly_the_released_names_shapes_and_types(shared_dir: Path, part: str, n: int):
    with (shared_dir / "spec" / f"state_dict_{part}.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    listed = {r["key"]: ("" if r["shape"] == "scalar" else r["shape"], r["dtype"]) for r in rows}
    with torch.device("meta"):
        vae, dit = VAE(CD4.vae, 3699), DiT(CD4.flow, 256, 16, (4, 3, 10571))
    named = _all_names(to_reference(vae.state_dict(), dit.state_dict() if part == "fm" else {}), step=1)
    found = {k: ("x".join(map(str, v.shape)), str(v.dtype).removeprefix("torch.")) for k, v in named.items()}
    assert len(found) == n
    assert found == listed


def reference_configs(table: Path, folder: Path) -> None:
    """Write the reference's own config files from the list of their keys."""
    trees: dict[str, Any] = {}
    with table.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            node = trees.setdefault(row["file"], {})
            *parents, last = row["key"].split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = None if row["value"] == "None" else yaml.safe_load(row["value"])
    for name, tree in trees.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(tree))


def test_the_references_own_configs_give_the_preset(shared_dir: Path, tmp_path: Path):
    pytest.importorskip("hydra", reason="the extra hydra is not installed")
    reference_configs(shared_dir / "spec" / "config_keys.tsv", tmp_path)
    vae, flow = (compose(name, tmp_path, []) for name in ("marson_vae", "marson_fm"))
    assert configured(vae, VAEConfig(), vae_fields(vae)) == CD4.vae
    assert stage_config(vae, "vae") == CD4.train_vae
    assert configured(flow, FlowConfig(), flow_fields(flow)) == CD4.flow  # p_drop 0.1, not the 0.8 that has no effect
    assert stage_config(flow, "flow") == CD4.train_flow
    for job in (vae, flow):
        assert (n_genes(job), job.whole("seed")) == (3699, 56)
        assert class_sizes(job) == {
            "donor_id": 4,
            "guide_target_ensembl": 10571,
            "experimental_perturbation_time_point": 3,
        }
    assert control_name(flow) == "NTC"
    changed = compose("marson_vae", tmp_path, ["model.batch_size=16", "training.num_epochs=2"])
    assert (stage_config(changed, "vae").batch_size, stage_config(changed, "vae").max_epochs) == (16, 2)


def test_the_packaged_configs_give_the_preset_with_and_without_hydra():
    vae, flow = (Job(packaged_config(name), name) for name in ("cd4_vae", "cd4_fm"))
    assert configured(vae, VAEConfig(), vae_fields(vae)) == CD4.vae
    assert configured(flow, VAEConfig(), vae_fields(flow)) == CD4.vae
    assert configured(flow, FlowConfig(), flow_fields(flow)) == CD4.flow
    assert (stage_config(vae, "vae"), stage_config(flow, "flow")) == (CD4.train_vae, CD4.train_flow)
    assert (n_genes(flow), class_sizes(flow)) == (None, {})  # those of the cells
    pytest.importorskip("hydra", reason="the extra hydra is not installed")
    assert compose("cd4_fm", None, []).values == flow.values


def test_interpolations_are_followed_and_resolvers_are_not_called():
    tree = {
        "a": {"b": 3, "name": "b", "text": "n${a.b}", "deep": "${a.${a.name}}", "group": "${list}"},
        "list": [1, {"x": "${a.b}"}],
        "loop": "${loop}",
        "env": "${oc.env:HOME}",
        "odd": "${a.group}s",
        "small": "1e-8",
    }
    job = Job(tree, "here")
    assert [job.get(k) for k in ("a.deep", "a.text", "a.group", "a.group.1.x", "list.0", "none", "a.b.c")] == [
        3, "n3", [1, {"x": 3}], 3, 1, None, None,
    ]  # fmt: skip
    assert job.number("small") == 1e-8
    for key, match in (("loop", "back to itself"), ("env", "'oc.env'"), ("odd", "into a string")):
        with pytest.raises(ValueError, match=match):
            job.get(key)
    refuse_resolvers("a: ${eval:'1'} ${now:%Y} ${b.c}", "here")
    for text in ("${oc.env:HOME}", "${ oc.env:HOME,x}", "${a.${oc.decode:x}}", "${mine:}"):
        with pytest.raises(ValueError, match="is refused"):
            refuse_resolvers(text, "here")


@pytest.mark.slow
def test_a_checkpoint_of_the_released_size_is_read_in_seconds(tmp_path: Path):
    script = str(ROOT / "benchmarks" / "released_checkpoint.py")
    run = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["tensors"], found["distinct"], found["all_equal"]) == (630, 247, True)
    assert found["bytes"] == pytest.approx(830_407_681, rel=1e-3)
    assert found["import_seconds"] < 20
    assert found["peak_gb"] < 2.5
    assert found["counts"] > 0
