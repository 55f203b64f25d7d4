import logging
import os
import random
import signal
import warnings
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from scldm_cd4 import _precision as precision_module
from scldm_cd4._compile import compiler_error
from scldm_cd4._errors import CheckpointError, DataError, TrainingError
from scldm_cd4.config import StageConfig
from scldm_cd4.data.splits import Split
from scldm_cd4.train import stage as stage_module
from scldm_cd4.train.loaders import CountBatches, make_loader
from scldm_cd4.train.plans import FlowPlan, VAEPlan
from scldm_cd4.train.rng import keyed_generator
from scldm_cd4.train.runner import fit
from scldm_cd4.train.stage import is_out_of_memory, n_epochs

pytestmark = pytest.mark.filterwarnings("ignore:The decoder makes little use of the latent")


def train(job, vae=None, **options):
    vae = vae or job.vae()
    options = {"seed": 3, "progress": False, "accelerator": "cpu"} | options
    return vae, fit(vae, job.dit, job.cells, job.split, job.config, **options)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class At(pl.Callback):
    """Does something once, at the start of a step of a stage."""

    def __init__(self, action, steps, plan=VAEPlan):
        self.action, self.steps, self.plan, self.done = action, steps, plan, False

    def on_train_batch_start(self, trainer, pl_module, *args):
        if isinstance(pl_module, self.plan) and trainer.global_step == self.steps - 1 and not self.done:
            self.done = True
            self.action()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_both_stages_learn_and_tell_their_history(job):
    job.config = replace(
        job.config,
        train_vae=replace(job.config.train_vae, target_steps=60),
        train_flow=replace(job.config.train_flow, target_steps=60),
    )
    vae, result = train(job)
    assert result.trained == {"vae": True, "flow": True}
    assert result.n_steps == {"vae": 60, "flow": 60}
    for stage, columns in (
        ("vae", ["train_loss", "validation_loss", "mean_profile_nll", "lr"]),
        ("flow", ["train_loss", "validation_loss", "lr"]),
    ):
        history = result.history[stage]
        assert history.index.name == "epoch"
        assert list(history.columns) == columns
        assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
        losses = history["validation_loss"].dropna()
        assert losses.iloc[-1] < losses.iloc[0]
    assert not vae.training
    assert not result.dit.training
    online, averaged = result.online, result.dit.state_dict()
    assert any(not torch.equal(online[k], averaged[k]) for k in online)


def test_equal_seeds_give_equal_models_and_leave_the_global_generators_alone(job):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    one, first = train(job)
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.rand(3)
    two, second = train(job)
    three, third = train(job, seed=4)
    assert same_weights(one, two)
    assert same_weights(first.dit, second.dit)
    assert not same_weights(one, three)
    assert not same_weights(first.dit, third.dit)


@pytest.mark.parametrize(
    ("steps", "plan"),
    [(6, VAEPlan), (5, VAEPlan), (6, FlowPlan), (4, FlowPlan)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_resumed_training_equals_an_unbroken_one(job, tmp_path, steps, plan):
    dropout = replace(job.config.vae, dropout=0.1)
    job.config = replace(job.config, vae=dropout, train_vae=replace(job.config.train_vae, refit_theta=True))
    epochs = {"max_epochs": 4}
    vae, whole = train(job, **epochs)
    _, part = train(job, checkpoint_dir=tmp_path, callbacks=[At(interrupt, steps, plan)], **epochs)
    assert part.interrupted
    assert any("interrupted" in note for note in part.notes)
    resumed_vae, resumed = train(job, resume_from=tmp_path, seed=None, **epochs)
    assert resumed.seed == 3
    assert not resumed.interrupted
    assert same_weights(vae, resumed_vae)
    assert same_weights(whole.dit, resumed.dit)
    for stage in ("vae", "flow"):
        np.testing.assert_array_equal(whole.history[stage], resumed.history[stage])


def test_a_finished_training_is_not_repeated(job, tmp_path):
    vae, whole = train(job, checkpoint_dir=tmp_path)
    again_vae, again = train(job, resume_from=tmp_path)
    assert same_weights(vae, again_vae)
    assert same_weights(whole.dit, again.dit)
    assert again.n_steps["flow"] == whole.n_steps["flow"]
    with pytest.raises(DataError, match="another training"):
        train(job, checkpoint_dir=tmp_path)


def test_a_resume_needs_state_and_the_same_seed(job, tmp_path):
    with pytest.raises(CheckpointError, match="no record"):
        train(job, resume_from=tmp_path)
    train(job, stage="vae", checkpoint_dir=tmp_path, max_epochs=1)
    with pytest.raises(DataError, match="has seed 3, not 5"):
        train(job, resume_from=tmp_path, seed=5)


def test_an_interrupt_keeps_what_was_trained_and_does_not_go_on_to_the_flow(job):
    handler = signal.getsignal(signal.SIGINT)
    vae, result = train(job, callbacks=[At(interrupt, 5)])
    assert result.interrupted
    assert result.trained == {"vae": False}
    assert result.n_steps["vae"] == 5
    assert not same_weights(vae, job.vae())
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_keyboard_interrupt_from_anywhere_does_not_end_the_process(job):
    def stop():
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    vae, result = train(job, callbacks=[At(stop, 5)])
    assert result.interrupted
    assert not same_weights(vae, job.vae())
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_loss_that_is_no_number_stops_with_the_last_good_weights(job):
    vae = job.vae()
    good = {}

    class Spoil(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            good[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.vae.state_dict().items()}
            if trainer.current_epoch == 1:
                torch.nn.init.constant_(pl_module.vae.decoder_head.params.weight, float("nan"))

    with pytest.raises(
        TrainingError, match=r"autoencoder: the loss became nan at step \d+.*lower learning rate.*counts"
    ):
        train(job, vae, stage="vae", max_epochs=4, early_stopping=False, callbacks=[Spoil()])
    assert all(torch.equal(v, good[1][k]) for k, v in vae.state_dict().items())


def test_a_learning_rate_far_too_high_is_reported(job):
    vae = job.vae()
    with pytest.raises(TrainingError, match="plan_kwargs"):
        train(job, vae, plan_kwargs={"vae": {"lr": 1e30, "clip_norm": 1e9}}, max_epochs=8)
    assert all(torch.isfinite(p).all() for p in vae.parameters())


def test_out_of_memory_halves_the_batch_and_equals_the_smaller_batch(job, monkeypatch):
    small, direct = train(job, stage="vae", batch_size=8)
    vae = job.vae()
    encode = vae.encode

    def limited(counts, genes):
        if vae.training and len(counts) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(counts, genes)

    monkeypatch.setattr(vae, "encode", limited)
    with pytest.warns(UserWarning, match="starting again with batch_size=8"):
        _, result = train(job, vae, stage="vae", batch_size=16)
    assert result.batch_size == direct.batch_size == {"vae": 8}
    assert result.notes[0] == "vae: out of memory: batch_size halved to 8"
    assert same_weights(vae, small)
    assert np.array_equal(result.history["vae"], direct.history["vae"])


def test_only_memory_errors_are_retried(job, monkeypatch):
    vae = job.vae()

    def broken(*args):
        raise RuntimeError("size of tensor a must match")

    monkeypatch.setattr(vae, "encode", broken)
    with pytest.raises(RuntimeError, match="must match"):
        train(job, vae)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not is_out_of_memory(RuntimeError("memory format is wrong"))


def test_early_stopping_ends_and_keeps_the_best(job, monkeypatch):
    # a lucky loss within the first fifth of the epochs does not count
    losses = iter([1.0, 5.0, 5.0, 5.0, 4.0, 3.0, *range(4, 100)])
    weights = []

    def scripted(self, batch, generator):
        weights.append({k: v.clone() for k, v in self.vae.state_dict().items()})
        return torch.tensor(float(next(losses)))

    monkeypatch.setattr(VAEPlan, "held_out_loss", scripted)
    vae, result = train(job, stage="vae", max_epochs=20)
    assert len(result.history["vae"]) == 6 + 5
    assert "stopped early" in result.notes[0]
    assert all(torch.equal(v, weights[5][k]) for k, v in vae.state_dict().items())
    losses = iter(range(1, 100))
    _, result = train(job, stage="vae", max_epochs=20, early_stopping=False)
    assert len(result.history["vae"]) == 20


def test_training_says_nothing(job, capfd, caplog):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        train(job, progress=None)
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""
    assert logger.level == level


def test_the_bar_shows_cells_and_loss_once_per_stage(job, capfd):
    train(job, progress=True, max_epochs=2)
    text = capfd.readouterr().err
    assert "autoencoder: 100%" in text
    assert "flow: 100%" in text
    assert "loss" in text
    assert "cells/s" in text


@pytest.mark.parametrize("part", ["single cell", "no validation", "single validation cell"])
def test_few_cells(job, part):
    rows = np.arange(job.cells.n_cells)
    empty = rows[:0]
    parts = {
        "single cell": (rows[:1], empty),
        "no validation": (rows, empty),
        "single validation cell": (rows[1:], rows[:1]),
    }[part]
    job.split = Split(*parts, empty, {})
    _, result = train(job, max_epochs=2)
    assert result.trained == {"vae": True, "flow": True}
    assert np.isfinite(result.history["flow"]["train_loss"]).all()
    assert np.isnan(result.history["vae"]["validation_loss"]).all() == (len(parts[1]) == 0)


def test_epochs_follow_from_the_number_of_cells():
    config = StageConfig(target_steps=100)
    assert n_epochs(config, 128, 128) == 100
    assert n_epochs(config, 1000, 128) == 13
    assert n_epochs(config, 10**6, 128) == 1
    assert n_epochs(replace(config, max_epochs=7), 1000, 128) == 7
    assert n_epochs(replace(config, max_epochs=7), 1000, 128, 2) == 2
    with pytest.raises(DataError, match="max_epochs"):
        n_epochs(config, 10, 2, 0)


def test_a_default_run_on_many_cells_makes_the_target_steps_only(job):
    job.config = replace(job.config, train_vae=replace(job.config.train_vae, target_steps=4, batch_size=2))
    _, result = train(job, stage="vae")
    assert result.n_steps == {"vae": 4}
    assert np.isfinite(result.history["vae"]["validation_loss"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "dit"}, "stage must be"),
        ({"plan_kwargs": {"learning_rate": 1.0}}, "learning_rate.*known.*lr"),
        ({"plan_kwargs": {"flow": {"momentum": 1.0}}}, "momentum"),
        ({"max_epochs": {"vea": 1}}, "vea"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 8.0}, "batch_size must be a whole number"),
        ({"max_epochs": 1.5}, "max_epochs must be a whole number"),
    ],
)
def test_unknown_settings_are_refused(job, options, message):
    with pytest.raises(DataError, match=message):
        train(job, **options)


def test_settings_by_stage(job):
    _, result = train(job, max_epochs={"vae": 1, "flow": 2}, batch_size={"flow": 8}, plan_kwargs={"flow": {"lr": 1e-5}})
    assert [len(result.history[s]) for s in ("vae", "flow")] == [1, 2]
    assert result.batch_size == {"vae": 16, "flow": 8}
    assert result.history["flow"]["lr"].max() <= 1e-5 < result.history["vae"]["lr"].max()


def test_gene_subsets_are_scaled_to_the_panel_and_may_be_empty(job):
    vae = job.vae().eval()
    target = torch.from_numpy(job.cells.counts(np.arange(8)).toarray())
    whole = VAEPlan(vae, StageConfig(), 0)
    loss, reported = whole.step_loss({"target": target}, keyed_generator(0))
    torch.testing.assert_close(loss, whole.held_out_loss({"target": target}, keyed_generator(0)))
    torch.testing.assert_close(loss, reported)
    half = VAEPlan(vae, StageConfig(genes_per_step=10), 0)
    loss, reported = half.step_loss({"target": target}, keyed_generator(0))
    torch.testing.assert_close(reported, 2 * loss)
    empty = torch.zeros_like(target)
    loss, _ = half.step_loss({"target": empty}, keyed_generator(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in vae.parameters())


def test_divergence_counts_when_asked_for(job):
    job.config = replace(job.config, vae=replace(job.config.vae, kl_weight=0.1))
    plan = VAEPlan(job.vae(), StageConfig(), 0)
    batch = {"target": torch.from_numpy(job.cells.counts(np.arange(8)).toarray())}
    loss, _ = plan.step_loss(batch, keyed_generator(0))
    assert loss > plan.held_out_loss(batch, keyed_generator(0))
    assert train(job)[1].trained == {"vae": True, "flow": True}


def test_dispersions_learn_faster_and_do_not_decay(job):
    plan = VAEPlan(job.vae(), StageConfig(lr=1e-3, theta_lr=30.0), 0)
    rest, tables = plan.parameter_groups()
    assert tables == {"params": [plan.vae.decoder_head.theta.weight], "lr": 0.03, "weight_decay": 0.0}
    assert len(rest["params"]) + 1 == len(list(plan.vae.parameters()))
    assert len(VAEPlan(job.vae(), StageConfig(), 0).parameter_groups()) == 1


def test_gradients_of_several_batches_make_one_step(job):
    job.split = Split(np.arange(40), np.arange(40, 48), np.arange(0), {})
    job.config = replace(
        job.config, train_vae=replace(job.config.train_vae, genes_per_step=None, theta_lr=1.0, target_steps=6)
    )
    whole, one = train(job, stage="vae", batch_size=20)
    parts, two = train(job, stage="vae", batch_size=10, accumulate_grad_batches=2)
    assert one.n_steps == two.n_steps == {"vae": 6}
    np.testing.assert_array_equal(one.history["vae"]["lr"], two.history["vae"]["lr"])
    np.testing.assert_allclose(one.history["vae"], two.history["vae"], rtol=1e-4)

    def distance(a, b):  # the head's bias apart: the softmax over genes removes it, its gradient is rounding
        return sum(float((a[k] - b[k]).square().sum()) for k in a if not k.endswith("params.bias")) ** 0.5

    assert distance(parts.state_dict(), whole.state_dict()) < 0.01 * distance(
        whole.state_dict(), job.vae().state_dict()
    )


@pytest.mark.parametrize(("steps", "plan"), [(3, VAEPlan), (2, FlowPlan)])
def test_a_resumed_training_with_gathered_gradients_equals_an_unbroken_one(job, tmp_path, steps, plan):
    options = {"max_epochs": 3, "batch_size": 8, "accumulate_grad_batches": 2}
    vae, whole = train(job, **options)
    _, part = train(job, checkpoint_dir=tmp_path, callbacks=[At(interrupt, steps, plan)], **options)
    assert part.interrupted
    resumed_vae, resumed = train(job, resume_from=tmp_path, seed=None, **options)
    assert same_weights(vae, resumed_vae)
    assert same_weights(whole.dit, resumed.dit)
    assert resumed.n_steps["flow"] == whole.n_steps["flow"] == 3 * 3  # 39 cells: 5 batches, 3 steps an epoch


def test_a_default_run_counts_optimiser_steps(job):
    job.config = replace(job.config, train_vae=replace(job.config.train_vae, target_steps=4, batch_size=2))
    _, result = train(job, stage="vae", accumulate_grad_batches=3)
    assert result.n_steps == {"vae": 4}
    assert n_epochs(StageConfig(target_steps=100), 1000, 128, accumulate=4) == 50


def test_without_a_compiler_training_goes_on_and_says_so_once(job, monkeypatch):
    monkeypatch.setattr(stage_module, "compiler_error", lambda device: "no C++ compiler")
    plain, _ = train(job, max_epochs=1)
    with pytest.warns(UserWarning, match=r"compile=True is not possible here.*no C\+\+ compiler") as record:
        vae, result = train(job, compile=True, max_epochs=1)
    assert sum("compile" in str(warning.message) for warning in record) == 1
    assert sum("compile" in note for note in result.notes) == 1
    assert same_weights(vae, plain)


def test_compiled_steps_see_one_shape_and_give_the_same_loss(job, monkeypatch):
    shapes = {"vae": set(), "flow": set()}

    def compiled(function, *, dynamic):
        assert dynamic is False

        def call(x, *args):
            shapes["flow" if function.__name__ == "forward" else "vae"].add((x.shape, *(a.shape for a in args)))
            return function(x, *args)

        return call

    monkeypatch.setattr(stage_module, "compiler_error", lambda device: None)
    monkeypatch.setattr(torch, "compile", compiled)
    _, result = train(job, compile=True, batch_size=16, max_epochs=2)  # 39 cells: 13 in each of 3 batches
    assert {name: len(seen) for name, seen in shapes.items()} == {"vae": 1, "flow": 1}
    assert result.n_steps == {"vae": 6, "flow": 6}
    data = CountBatches(job.cells, np.arange(40), expressed=True)
    assert [len(batch["target"]) for batch in make_loader(data, 16, 0, even=True)] == [14, 14, 14]
    assert sorted(len(batch["target"]) for batch in make_loader(data, 16, 0)) == [13, 13, 14]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself, about its own code
def test_a_compiled_training_learns_the_same(job):
    if compiler_error("cpu") is not None:
        pytest.skip(f"torch.compile cannot work here: {compiler_error('cpu')}")
    job.split = Split(np.arange(32), np.arange(32, 48), np.arange(0), {})
    _, plain = train(job, max_epochs=3)
    _, compiled = train(job, compile=True, max_epochs=3)
    for name in ("vae", "flow"):
        np.testing.assert_allclose(plain.history[name], compiled.history[name], rtol=1e-3)


def test_products_are_made_as_asked_inside_a_training_only(job, monkeypatch):
    monkeypatch.setattr(precision_module, "onednn_route", lambda: True)
    before, inside = torch.get_float32_matmul_precision(), []
    watch = At(lambda: inside.append(torch.get_float32_matmul_precision()), 1)
    train(job, stage="vae", max_epochs=1, callbacks=[watch])
    assert inside == ["medium"]
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(DataError, match="tf32.*CUDA"):
        train(job, precision="tf32")
    job.config = replace(job.config, vae=replace(job.config.vae, linear_rank=4))
    _, result = train(job, precision="bf16", max_epochs=1)
    assert np.isfinite(result.history["flow"]["train_loss"]).all()
    assert all(value.dtype == torch.float32 for value in result.online.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_does_not_wait_for_it(job):
    vae, dit = job.vae().cuda(), job.dit().cuda()
    data = CountBatches(job.cells, np.arange(16), expressed=True)[np.arange(16)]
    latents = torch.zeros(16, 4, 4, device="cuda")
    labels = torch.zeros(16, 3, dtype=torch.int64, device="cuda")
    plans = [
        (VAEPlan(vae, job.config.train_vae, 0), {name: value.cuda() for name, value in data.items()}),
        (FlowPlan(dit, job.config.train_flow, 0), {"latent": latents, "labels": labels}),
    ]
    for plan, batch in plans:
        generator = keyed_generator(0, device="cuda")
        plan.step_loss(batch, generator)[0].backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.step_loss(batch, generator)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
