import pytest
import torch
from safetensors import safe_open
from torch import nn

from scldm_cd4.config import PRESETS, StageConfig
from scldm_cd4.train.ema import EMA
from scldm_cd4.train.plans import ema_start
from scldm_cd4.train.schedules import wsd_schedule


@pytest.mark.parametrize(
    ("name", "kind", "fraction"), [("cosine", "cosine", 1.0), ("cosine", "cosine", 0.1), ("sqrt", "sqrt", 0.1)]
)
def test_schedule_equals_the_reference(shared_dir, name, kind, fraction):
    with safe_open(shared_dir / "parity/tiny_extras.safetensors", "pt") as handle:
        golden = handle.get_tensor(f"schedule_{name}_f{fraction}")
    own = [wsd_schedule(s, n_steps=1000, n_warmup=100, decay_fraction=fraction, kind=kind) for s in range(1002)]
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), golden, rtol=0, atol=1e-15)


def test_ema_equals_the_reference(shared_dir):
    with safe_open(shared_dir / "parity/tiny_extras.safetensors", "pt") as handle:
        golden = handle.get_tensor("ema/values_update_every10_after100_beta0.9999").float()
    module = nn.Linear(1, 1, bias=False)
    ema, own = EMA(module, after=100), []
    for i in range(600):
        nn.init.constant_(module.weight, i)
        ema.update(module)
        own.append(ema.values["weight"].item())
    torch.testing.assert_close(torch.tensor(own), golden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_steps", [1, 2, 10])
def test_short_schedules_stay_within_bounds(n_steps):
    factors = [wsd_schedule(s, n_steps=n_steps, n_warmup=int(0.1 * n_steps)) for s in range(n_steps + 2)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[-1] == 0.1


def test_ema_state_goes_on_where_it_was():
    module = nn.Linear(3, 2)
    one, two = (EMA(module, decay=0.9, every=2, after=3) for _ in range(2))

    def move(i: int) -> None:
        nn.init.constant_(module.weight, i)

    for i in range(8):
        move(i)
        one.update(module)
    two.load_state_dict(one.state_dict())
    for i in range(8, 15):
        move(i)
        one.update(module)
        two.update(module)
    assert torch.equal(one.values["weight"], two.values["weight"])
    two.copy_to(module)
    assert torch.equal(module.weight, two.values["weight"])


def test_ema_of_short_runs_starts_after_a_tenth_and_of_the_released_recipe_late():
    assert ema_start(PRESETS["small"].train_flow, 2_500) == 250
    assert ema_start(PRESETS["small"].train_flow, 10**6) == 10_000
    assert ema_start(PRESETS["cd4"].train_flow, 2_500) == 10_000
    assert ema_start(StageConfig(ema_decay=0.99, ema_every=1), 5) == 0
