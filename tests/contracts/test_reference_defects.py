"""What the reference does wrong, row by row, and where it is tested that this package does not.

======  ==========================================================================================================
row     test (or why there is none)
======  ==========================================================================================================
D1      generation/test_generate: test_d1_unconditional_cells_do_not_depend_on_labels_and_say_so
P1      generation/test_generate: test_p1_network_rows
P2      generation/test_generate: test_p1_network_rows (20 rows a cell); flow/test_flow: test_solvers_converge_...
D2      properties/test_reproducible: test_d2_another_batch_size_gives_equal_latents
P3      not applicable: nothing is compiled, attention is SDPA everywhere
P4      here: test_p4
P5      here: test_p5
P6      later issue (speed of the encoder on zeros); ``encode="expressed"`` in golden/test_parity
P7      generation/test_generate: test_p7_library_sizes_are_drawn_by_block
D3      generation/test_generate: test_d3_...; data/test_registry: test_reference_layout
D4      model/test_embedding: test_latent_forms, test_normalized_expression, test_reconstruction_error_...
D5      model/test_face: test_d5_averaged_weights_generate
D6      generation/test_generate: test_d6_..., test_refused; flow/test_guidance: test_joint_takes_equal_weights_only
D7      here: test_d7
D8      here: test_d8; flow/test_flow: test_mutually_exclusive_keeps_one_attribute_per_batch
D9      not applicable: nothing is generated while training
P8      train/test_training: test_early_stopping_ends_and_keeps_the_best (one held-out loss an epoch)
D10     train/test_initialise: test_the_fresh_decoder_gives_the_mean_profile_...
D11     golden/test_released_size: test_padding_changes_nothing_and_a_cell_without_genes_is_finite
D12     later issue (several devices); one process: train/test_batches_of_training: test_processes_share_the_same_cells
D13-15  every test that trains does so on a CPU; model/test_face: test_device_that_is_not_there
D16     properties/test_reproducible: test_d16_noise_differs_by_condition_block_and_purpose
D17     checkpoint/test_native_folder: test_round_trip; checkpoint/test_reference_weights: ..._aliases_are_taken_...
D18     train/test_batches_of_training: test_worker_processes_started_by_spawn_give_the_same_batches
D19     the same test; workers stay between epochs
D20     train/test_training: test_gene_subsets_are_scaled_to_the_panel_and_may_be_empty
D21     data/test_splits: test_fewer_than_ten_cells_do_not_all_go_to_validation
D22     model/test_face: test_d22_vocabulary_...; data/test_registry: test_unknown_label_is_never_mapped
D23     not applicable: no parameters from outside; the average covers all: train/test_schedules_ema
D24     not applicable: batches carry what a stage needs
D25     golden/test_parity: test_no_stored_tensor_is_left_out, test_outputs (values, not shapes)
D26     package/test_package: test_readme_has_the_two_commands, test_ci_takes_its_commands_from_the_readme
P9      model/test_face: test_p9_saved_model_generates_the_same_without_cells
P10     data/test_cells: test_expressed_batch_holds_exactly_the_counts
P11     generation/test_generate: test_p11_cells_leave_memory_as_they_come, test_streamed_file_holds_the_same_cells
P12     train/test_training: test_epochs_follow_from_the_number_of_cells; precision and speed on GPUs: later issue
P13     not applicable to released weights (their widths are fixed); ``multiple_of`` is an option
O1      model/test_face: test_o1_nothing_is_unpickled; package/test_package: test_nothing_is_unpickled_...
O2      package/test_package: test_constraints_pin_every_direct_dependency
O3      here: test_o3; checkpoint/test_native_folder: test_nothing_is_replaced_unasked
4b-1    data/test_setup: test_missing_labels, test_missing_in_categorical_and_nullable
4b-2    data/test_cells: test_missing_genes, test_gene_order_...; contracts/test_public_reports
4b-3    data/test_setup: test_a_single_bad_value_...; train/test_training: test_a_loss_that_is_no_number_...
4b-4    contracts/test_public_reports: test_cells_of_a_new_donor_can_be_embedded_but_not_generated
4b-5    data/test_setup: test_labels_of_every_dtype_...; test_public_reports: test_labels_of_any_dtype_go_round
4b-6    model/test_face: test_load_on_an_instance_gives_the_trained_model
4b-7    checkpoint/test_native_folder: test_older_formats_are_migrated_or_say_who_wrote_them
4b-8    model/test_face: test_every_subset_of_conditions_trains_and_reloads
4b-9    checkpoint/test_native_folder: test_a_missing_file_is_named, test_unlisted_files_are_named_...
4b-10   train/test_training: test_out_of_memory_halves_the_batch_and_equals_the_smaller_batch
4b-11   generation/test_generate: test_refused; the gene-embedding mode is not built
4b-12   generation/test_generate: test_refused; data/test_cells: test_missing_genes
4b-13   contracts/test_public_reports: test_predict_takes_conditions_..., test_a_model_takes_its_own_cells
4b-14   data/test_setup: test_keys_not_given_are_absent_and_give_one_level; tutorials: later issue
4b-15   model/test_face: test_without_control_training_warns_and_ranking_refuses
4b-16   generation/test_generate: test_cells_are_labelled_counts_with_evidence
4b-17   later issue (perturbations without a training label are refused)
4b-18   ranking/test_ranking: test_table
4b-19   contracts/test_public_reports: test_one_or_two_perturbations_train
4b-20   metrics/test_metric_values: test_edges, test_too_few_cells_and_other_features
4b-21   contracts/test_public_reports: test_odd_column_names_survive_a_file; data/test_files: test_truncated_...
4b-22   checkpoint/test_native_folder: test_killed_at_any_point_..., test_a_full_disk_leaves_the_old_model
4b-23   data/test_files: test_external_link, test_external_storage, test_claimed_terabyte, test_sparse_indices_...
4b-24   train/test_batches_of_training: test_worker_processes_...; data/test_registry: test_fall_back_from_...
======  ==========================================================================================================
"""

from typing import Any

import numpy as np
import pytest

from scldm_cd4 import CD4Model

CONDITION = {"perturbation": "NTC", "donor": "CE0008162", "timepoint": "Rest"}
QUIET = pytest.mark.filterwarnings("ignore:The decoder makes little use of the latent")


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_p4_one_decoding_per_cell(trained: Any, monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    """P4: whatever the guidance, a cell that is asked for is decoded once (within its block of 64)."""
    rows: list[int] = []
    vae = trained._state.vae
    decode = vae.decode

    def spy(z: Any, *args: Any, **options: Any) -> Any:
        rows.append(len(z))
        return decode(z, *args, **options)

    monkeypatch.setattr(vae, "decode", spy)
    cells = trained.generate(**CONDITION, n_cells=64, guidance=guidance, seed=0)
    assert cells.n_obs == sum(rows) == 64


@QUIET
def test_p5_cells_are_encoded_as_often_for_many_epochs_as_for_one(
    simulated: Any, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: the frozen encoder is not run in each step of the flow."""
    from scldm_cd4.train.latents import CellEncoder

    model = CD4Model(simulated, "tiny", **quick)
    model.train(seed=0, max_epochs=1, stage="vae")
    encode, rows = CellEncoder.__call__, []

    def spy(self: Any, batch: Any) -> Any:
        rows.append(len(batch["counts"]))
        return encode(self, batch)

    monkeypatch.setattr(CellEncoder, "__call__", spy)
    seen = []
    for epochs in (1, 4):
        rows.clear()
        model.train(seed=0, max_epochs=epochs, stage="flow", early_stopping=False)
        seen.append(sum(rows))
    assert seen[0] == seen[1] > 0


@pytest.mark.parametrize(
    "overrides",
    [{"p_drop": 0.8}, {"cfg_dropout_prob": 0.8}, {"flow": {"cfg_dropout_prob": 0.8}}, {"train_flow": {"p_drop": 0.8}}],
)
def test_d7_a_setting_at_the_wrong_place_is_refused(simulated: Any, overrides: dict[str, Any]) -> None:
    """D7: nothing is swallowed; a setting one level too high, or of another part, is named."""
    with pytest.raises(ValueError, match="p_drop|cfg_dropout_prob"):
        CD4Model(simulated, "tiny", **overrides)


@QUIET
def test_d7_the_share_of_dropped_labels_reaches_training(
    simulated: Any, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7: what is configured is what drops labels."""
    from scldm_cd4.nn import DiT

    forward, dropped = DiT.forward, []

    def spy(self: Any, x: Any, t: Any, labels: Any) -> Any:
        if self.training:
            dropped.extend((labels == self.unconditional).all(dim=1).tolist())
        return forward(self, x, t, labels)

    monkeypatch.setattr(DiT, "forward", spy)
    changed = quick | {"flow": quick["flow"] | {"p_drop": 0.8}}
    CD4Model(simulated, "tiny", **changed).train(seed=0, max_epochs=3)
    assert np.mean(dropped) == pytest.approx(0.8, abs=0.06)


@QUIET
@pytest.mark.parametrize("strategy", ["mutually_exclusive", "independent"])
def test_d8_every_way_of_dropping_labels_trains_validates_and_generates(
    simulated: Any, quick: Any, strategy: str
) -> None:
    """D8: the mutually exclusive strategy is refused by the reference's own validation."""
    changed = quick | {"flow": quick["flow"] | {"label_dropout": strategy}}
    model = CD4Model(simulated, "tiny", **changed)
    model.train(seed=0, max_epochs=2)
    assert np.isfinite(model.history_["flow"]["validation_loss"]).all()
    weights = {"perturbation": 2.0}
    cells = model.generate(**CONDITION, n_cells=3, guidance=weights, seed=0)
    assert cells.uns["scldm_cd4"]["guidance"] == weights
    assert np.isfinite(cells.X.data).all()


def test_o3_use_writes_nothing_into_the_folder_of_the_model(trained: Any, tmp_path: Any) -> None:
    """O3: inference leaves the saved model as it was."""
    trained.save(tmp_path / "m")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "m").iterdir()}
    model = CD4Model.load(tmp_path / "m")
    model.generate(**CONDITION, n_cells=2, seed=0)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "m").iterdir()} == before
