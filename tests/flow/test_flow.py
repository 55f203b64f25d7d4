"""Path, label dropout, coupling and solvers, against closed forms."""

import builtins
import math

import pytest
import torch

from scldm_cd4.flow import SOLVERS, drop_labels, flow_loss, interpolate, pair, solve
from scldm_cd4.flow.solvers import evaluations, time_grid

UNCONDITIONAL = torch.tensor([4, 3, 9])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.randint(int(k), (n,), generator=generator(seed + i)) for i, k in enumerate((4, 3, 9))], 1)


def test_path_ends_at_noise_and_data_and_moves_at_the_target_velocity():
    x0, x1 = torch.randn(2, 5, 3, 2, generator=generator())
    start, u = interpolate(x0, x1, torch.zeros(5))
    end, _ = interpolate(x0, x1, torch.ones(5))
    torch.testing.assert_close(start, x0)
    torch.testing.assert_close(end, x1)
    t = torch.rand(5, generator=generator(1))
    x_t, u_t = interpolate(x0, x1, t)
    torch.testing.assert_close(x_t, x0 + t[:, None, None] * u)
    assert torch.equal(u, u_t)


def test_loss_is_a_mean_over_everything_but_cells():
    v, u = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    v[1] = 2.0
    assert flow_loss(v, u).tolist() == [0.0, 4.0]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_joint_drops_all_labels_of_a_cell_or_none(p):
    labels = labels_of(20_000)
    dropped = drop_labels(labels, UNCONDITIONAL, strategy="joint", p=p, generator=generator(7)) == UNCONDITIONAL
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert abs(dropped[:, 0].float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 20_000)


def test_independent_drops_each_label_on_its_own():
    labels, p, n = labels_of(40_000), 0.2, 40_000
    dropped = drop_labels(labels, UNCONDITIONAL, strategy="independent", p=p, generator=generator(7)) == UNCONDITIONAL
    for pattern in range(8):
        bits = torch.tensor([bool(pattern & 1 << i) for i in range(3)])
        expected = math.prod(p if b else 1 - p for b in bits.tolist())
        seen = (dropped == bits).all(1).float().mean().item()
        assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_mutually_exclusive_keeps_one_attribute_per_batch():
    kept, share = [], []
    for seed in range(300):
        new = drop_labels(labels_of(50), UNCONDITIONAL, strategy="mutually_exclusive", p=0.2, generator=generator(seed))
        columns = (new != UNCONDITIONAL).any(0)
        assert columns.sum() == 1
        kept.append(int(columns.int().argmax()))
        share.append((new[:, kept[-1]] == UNCONDITIONAL[kept[-1]]).float().mean().item())
    assert all(abs(kept.count(c) - 100) < 4 * math.sqrt(300 * 2 / 9) for c in range(3))
    assert abs(sum(share) / 300 - 0.2) < 4 * math.sqrt(0.16 / 15_000)


@pytest.mark.parametrize("strategy", ["joint", "mutually_exclusive", "independent"])
def test_dropout_depends_on_its_generator_alone_and_keeps_its_input(strategy):
    labels = labels_of(64)
    before, state = labels.clone(), torch.get_rng_state()
    first, second, other = (
        drop_labels(labels, UNCONDITIONAL, strategy=strategy, p=0.5, generator=generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(labels, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert ((first == labels) | (first == UNCONDITIONAL)).all()


@pytest.mark.parametrize(("strategy", "p"), [("joint", -0.1), ("joint", 1.5), ("joint", float("nan")), ("all", 0.1)])
def test_dropout_refuses_what_it_cannot_do(strategy, p):
    with pytest.raises(ValueError, match="between 0 and 1|unknown label dropout"):
        drop_labels(labels_of(3), UNCONDITIONAL, strategy=strategy, p=p, generator=generator())


def exponential(x, t, labels):
    return t[:, None] * x  # x(1) = x(0) e^(1/2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 2), ("rk4", 4)])
def test_solvers_converge_at_their_order(solver, order):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    labels, exact = torch.zeros(5, 3, dtype=torch.long), x * math.exp(0.5)
    coarse, fine = (
        (solve(exponential, x, labels, solver=solver, n_steps=n) - exact).abs().max().item() for n in (8, 16)
    )
    assert order - 0.25 < math.log2(coarse / fine) < order + 0.5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_reverse_undoes_forward(solver, shift):
    if solver == "dopri5":
        pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
    x = torch.randn(4, 2, generator=generator()).double()
    labels = torch.zeros(4, 3, dtype=torch.long)
    options = {"solver": solver, "n_steps": 400, "shift": shift, "rtol": 1e-7, "atol": 1e-9}
    there = solve(exponential, x, labels, **options)
    back = solve(exponential, there, labels, reverse=True, **options)
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=5e-3, atol=5e-3)


def test_solvers_see_times_and_labels_of_their_cells():
    seen = []

    def velocity(x, t, labels):
        seen.append((t.clone(), labels))
        return torch.zeros_like(x)

    labels = labels_of(3)
    x = solve(velocity, torch.ones(3, 2, dtype=torch.bfloat16), labels, solver="midpoint", n_steps=2)
    assert x.dtype == torch.bfloat16
    assert all(t.shape == (3,) and t.dtype == torch.float32 and torch.equal(c, labels) for t, c in seen)
    assert [t[0].item() for t, _ in seen] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dopri5"])
def test_evaluations_are_counted(solver):
    calls = []

    def velocity(x, t, labels):
        calls.append(float(t[0]))
        return torch.zeros_like(x)

    solve(velocity, torch.ones(2, 2), labels_of(2), solver=solver, n_steps=5)
    assert len(calls) == evaluations(solver, 5)
    assert evaluations("dopri5", 5) is None


def test_ab2_is_of_second_order_on_an_uneven_grid():
    x, labels = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.long)
    errors = [
        (solve(exponential, x, labels, solver="ab2", n_steps=n, shift=0.5) - math.exp(0.5)).abs().item()
        for n in (20, 40)
    ]
    assert 3.2 < errors[0] / errors[1] < 4.8


def test_state_keeps_its_precision_where_the_network_is_coarser():
    def velocity(x, t, labels):
        return torch.full_like(x, 1 / 3).bfloat16()

    x = solve(velocity, torch.zeros(1, 1), torch.zeros(1, 3, dtype=torch.long), solver="euler", n_steps=7)
    assert x.dtype == torch.float32
    third = float(torch.tensor(1 / 3).bfloat16())
    assert x.item() == pytest.approx(third, rel=1e-6)


def test_shift_puts_steps_near_the_noise_and_keeps_the_ends():
    even, shifted = time_grid(10), time_grid(10, 3.0)
    assert even == pytest.approx([i / 10 for i in range(11)])
    assert (shifted[0], shifted[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in zip(shifted[:-1], shifted[1:], strict=True))
    assert all(s < e for s, e in zip(shifted[1:-1], even[1:-1], strict=True))


@pytest.mark.parametrize(
    "bad", [{"solver": "rk5"}, {"n_steps": 0}, {"n_steps": 2.5}, {"n_steps": True}, {"shift": 0.0}, {"shift": math.nan}]
)
def test_impossible_grids_are_refused(bad):
    with pytest.raises(ValueError, match="unknown solver|at least one step|positive number"):
        solve(exponential, torch.ones(1, 1), torch.zeros(1, 3, dtype=torch.long), **bad)


def test_one_step_is_enough_for_a_straight_flow():
    x0, x1 = torch.randn(2, 4, 3, generator=generator())
    for solver in ("euler", "midpoint", "heun", "rk4", "ab2"):
        end = solve(lambda x, t, c: x1 - x0, x0, torch.zeros(4, 3, dtype=torch.long), solver=solver, n_steps=1)
        torch.testing.assert_close(end, x1)


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"scldm_cd4\[ode\]"):
        solve(exponential, torch.ones(1, 1), torch.zeros(1, 3, dtype=torch.long), solver="dopri5")


def test_ot_pairs_within_conditions_at_the_least_cost():
    x0, x1 = torch.randn(2, 24, 2, 3, generator=generator())
    labels = torch.zeros(24, 3, dtype=torch.long)
    labels[:, 2] = torch.arange(24) % 3
    labels[23] = torch.tensor([1, 0, 0])  # a condition of one cell
    paired = pair(x0, x1, labels, "ot")
    rows = [int(torch.nonzero((x0 == row).flatten(1).all(1))[0]) for row in paired]
    assert sorted(rows) == list(range(24))
    assert torch.equal(labels[rows], labels)
    assert rows[23] == 23

    cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square().numpy()
    from scipy.optimize import linear_sum_assignment

    for k in range(3):
        members = torch.nonzero((labels == torch.tensor([0, 0, k])).all(1))[:, 0].numpy()
        block = cost[members][:, members]
        best = block[linear_sum_assignment(block)].sum()
        assert sum(cost[rows[m], m] for m in members) == pytest.approx(best, rel=1e-5)


def test_independent_coupling_leaves_the_noise_and_others_are_refused():
    x0, x1, labels = torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4, 3, dtype=torch.long)
    assert pair(x0, x1, labels) is x0
    assert pair(x0[:0], x1[:0], labels[:0], "ot").shape == (0, 2)
    with pytest.raises(ValueError, match="unknown coupling"):
        pair(x0, x1, labels, "sinkhorn")
