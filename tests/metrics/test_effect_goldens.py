"""Effect, DE and discrimination metrics equal the reference implementations on the same cells."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scldm_cd4 import metrics

GOLDENS = Path(__file__).parent / "goldens"
_spec = importlib.util.spec_from_file_location("effects_cells", GOLDENS / "effects_cells.py")
assert _spec is not None
assert _spec.loader is not None
cells = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cells)
CONTROL, GENES = cells.CONTROL, cells.GENES


@pytest.fixture(scope="module")
def goldens():
    return json.loads((GOLDENS / "effects.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sides():
    out = {}
    for side in ("real", "pred"):
        counts, labels = cells.effect_cells(side)
        out[side] = (metrics.log_normalize(counts), *metrics.condition_codes([labels]), counts)
    return out


@pytest.fixture(scope="module")
def bulks(sides):
    return {
        side: metrics.pseudobulks(values, codes, keys, counts=counts)
        for side, (values, codes, keys, counts) in sides.items()
    }


def expected(golden, name, keys):
    return np.array([golden[name].get(key[-1], np.nan) for key in keys])


class TestCellEval:
    """cell-eval 0.8.2: log-normalised values, control of each side's own."""

    def test_deltas_and_errors(self, bulks, goldens):
        table = metrics.effect_table(bulks["real"], bulks["pred"], control=CONTROL, control_source="pred")
        keys, golden = bulks["real"].conditions(CONTROL), goldens["cell_eval"]
        for name in ("pearson_delta", "mse", "mae"):
            np.testing.assert_allclose(table[name], expected(golden, name, keys), rtol=1e-6, err_msg=name)
        length = np.sqrt(expected(golden, "mse_delta", keys) * len(GENES))
        np.testing.assert_allclose(table["l2_delta"], length, rtol=1e-6)

    @pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
    def test_discrimination(self, bulks, goldens, metric):
        keys = bulks["real"].conditions(CONTROL)
        deltas = [side.means[side.rows(keys)] - side.means[side.rows([(CONTROL,)])] for side in bulks.values()]
        mask = metrics.target_mask(keys, GENES)
        assert mask.sum() == len(keys)
        scores = metrics.discrimination(*deltas, metric=metric, exclude=mask, scope="own", denominator="n")
        golden = expected(goldens["cell_eval"], f"discrimination_score_{metric}", keys)
        assert golden.min() < 1, "the golden must tell implementations apart"
        np.testing.assert_allclose(scores, golden, atol=1e-6)

    def test_significant_genes(self, sides, goldens):
        tests = {}
        for side, (values, codes, keys, _) in sides.items():
            own = metrics.control_ranks(values, codes, keys, control=CONTROL)
            # no pseudocount in cell-eval; every gene is expressed here
            tests[side] = metrics.de_tests(
                values, codes, keys, own, control=CONTROL, mean="geometric", pseudocount=1e-12
            )
        table = metrics.de_table(tests["real"], tests["pred"], min_genes=2, top=(50, 1000))
        keys, golden = tests["real"].keys, goldens["cell_eval"]
        names = {
            "de_overlap": "overlap_at_N",
            "de_overlap_top50": "overlap_at_50",
            "de_precision_top50": "precision_at_50",
            "de_precision_top1000": "precision_at_N",
            "de_recall": "de_sig_genes_recall",
            "de_direction_match": "de_direction_match",
            "de_spearman_lfc": "de_spearman_lfc_sig",
            "de_n_real": "de_nsig_counts_real",
            "de_n_pred": "de_nsig_counts_pred",
        }
        for ours, theirs in names.items():
            np.testing.assert_allclose(table[ours], expected(golden, theirs, keys), atol=1e-6, err_msg=ours)

    def test_areas_with_adjusted_p_as_score(self, sides, goldens):
        tests = {}
        for side, (values, codes, keys, _) in sides.items():
            own = metrics.control_ranks(values, codes, keys, control=CONTROL)
            tests[side] = metrics.de_tests(values, codes, keys, own, control=CONTROL)
        score = -np.log10(np.clip(tests["pred"].p_adjusted, 1e-10, 1))
        everything = np.ones(score.shape, dtype=bool)
        roc, pr = metrics.area_under_curves(tests["real"].significant(), score, everything)
        np.testing.assert_allclose(roc, expected(goldens["cell_eval"], "roc_auc", tests["real"].keys), atol=1e-6)
        np.testing.assert_allclose(pr, expected(goldens["cell_eval"], "pr_auc", tests["real"].keys), atol=1e-6)


class TestCellEval2:
    """cell-eval2 0.20.0, preset of 2026: counts, real control on both sides, target genes left out."""

    def test_discrimination(self, bulks, goldens):
        keys, control = bulks["real"].conditions(CONTROL), bulks["real"].rows([(CONTROL,)])
        base = bulks["real"].log_sum[control]
        deltas = [side.log_sum[side.rows(keys)] - base for side in bulks.values()]
        scores = metrics.discrimination(*deltas, exclude=metrics.target_mask(keys, GENES))
        golden = expected(goldens["cell_eval2"], "pds_cosine", keys)
        assert golden.min() < 1
        np.testing.assert_allclose(scores, golden, atol=1e-6)

    def test_significant_genes(self, sides, goldens):
        values, codes, keys, _ = sides["real"]
        controls = metrics.control_ranks(values, codes, keys, control=CONTROL)
        options = {"control": CONTROL, "min_control": 0.05, "pseudocount": 1e-11}
        real = metrics.de_tests(values, codes, keys, controls, **options)
        pred = metrics.de_tests(*sides["pred"][:3], controls, **options)
        table = metrics.de_table(real, pred, exclude=metrics.target_mask(real.keys, GENES))
        names = {
            "de_jaccard": "de_wilcoxon_sig_jaccard",
            "de_lfc_nmae": "de_wilcoxon_lfc_nmae",
            "de_direction_yield": "de_wilcoxon_direction_fidelity_yield_raw",
            "de_direction_reach": "de_wilcoxon_direction_reach_raw",
        }
        for ours, theirs in names.items():
            golden = expected(goldens["cell_eval2"], theirs, real.keys)
            np.testing.assert_allclose(table[ours], golden, atol=1e-6, err_msg=ours)
        assert np.nanmin(expected(goldens["cell_eval2"], "de_wilcoxon_direction_reach_raw", real.keys)) < 1

    def test_error_without_sampling_noise(self, bulks, goldens):
        keys = bulks["real"].conditions(CONTROL)
        mask = metrics.target_mask(keys, GENES)
        table = metrics.effect_table(
            bulks["real"], bulks["pred"], control=CONTROL, exclude=mask, space="log_sum", budget=True
        )
        golden = goldens["cell_eval2"]
        effect = expected(golden, "expr_distance_unbiased", keys)
        np.testing.assert_allclose(table["mse_effect"], effect, rtol=1e-4)
        error = expected(golden, "expr_mse_unbiased_capped", keys)
        np.testing.assert_allclose(table["mse_corrected"], error, rtol=1e-4)
        assert table["mse_corrected"].sum() / table["mse_effect"].sum() == pytest.approx(error.sum() / effect.sum())

    def test_corrections_within_the_budget(self, bulks, goldens):
        """A prediction without effects claims more correction than its profiles spread."""
        keys = bulks["real"].conditions(CONTROL)
        counts, labels = cells.effect_cells("flat")
        flat = metrics.pseudobulks(metrics.log_normalize(counts), *metrics.condition_codes([labels]), counts=counts)
        options = {"control": CONTROL, "exclude": metrics.target_mask(keys, GENES), "space": "log_sum"}
        bounded = metrics.effect_table(bulks["real"], flat, budget=True, **options)["mse_corrected"]
        golden = expected(goldens["cell_eval2_flat"], "expr_mse_unbiased_capped", keys)
        np.testing.assert_allclose(bounded, golden, rtol=1e-4)
        assert (bounded > metrics.effect_table(bulks["real"], flat, **options)["mse_corrected"]).all()


class TestOthers:
    def test_p_values_of_pdex_and_illico(self, sides, goldens):
        values, codes, keys, _ = sides["real"]
        controls = metrics.control_ranks(values, codes, keys, control=CONTROL)
        p = metrics.de_tests(values, codes, keys, controls, control=CONTROL).p[0]
        for name in ("pdex", "illico"):
            np.testing.assert_allclose(p, goldens["p_values"][name], rtol=1e-5, err_msg=name)

    def test_weighted_errors_of_scperteval(self, bulks, goldens):
        table = metrics.effect_table(bulks["real"], bulks["pred"], control=CONTROL)
        assert table["wmse"][0] == pytest.approx(goldens["scperteval"]["wmse"], rel=1e-9)
        assert table["wr2_delta"][0] == pytest.approx(goldens["scperteval"]["wr2"], rel=1e-9)


@pytest.mark.slow
def test_goldens_are_what_the_packages_give_today(tmp_path, goldens):
    """Needs the extra ``test-ref``, here or in the environment whose python SCLDM_CD4_REF_PYTHON names."""
    python = os.environ.get("SCLDM_CD4_REF_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import cell_eval, cell_eval2, pdex, illico, scperteval"], check=False)
    if probe.returncode:
        pytest.skip(f"the extra test-ref is not installed for {python}")
    path = tmp_path / "effects.json"
    subprocess.run([python, "-W", "ignore", str(GOLDENS / "make_effects.py"), str(path)], check=True)
    fresh = json.loads(path.read_text(encoding="utf-8"))
    assert fresh["versions"] == goldens["versions"]
    for group in ("cell_eval", "cell_eval2", "cell_eval2_flat"):
        for name, values in goldens[group].items():
            assert fresh[group][name] == pytest.approx(values, rel=1e-6, nan_ok=True), name
