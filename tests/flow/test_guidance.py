"""Guided velocities against the formulas, and the number of network passes."""

import math

import pytest
import torch

from scldm_cd4.flow import conditioned_on, guided

UNCONDITIONAL = torch.tensor([4, 3, 9])


class Counting:
    """A velocity that depends on everything it is given, and remembers its batches."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x, t, labels):
        self.rows.append(len(x))
        a = torch.sin(labels.double() @ torch.tensor([1.0, 2.3, 0.7], dtype=torch.float64))
        return x * a[:, None] + t[:, None]


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 2, generator=g).double(), torch.rand(5, generator=g).double()
    return x, t, torch.tensor([[0, 1, 2], [3, 2, 8], [1, 0, 0], [2, 2, 5], [0, 0, 0]])


def dropped(labels, *kept):
    out = UNCONDITIONAL.expand_as(labels).clone()
    for role in kept:
        out[:, role] = labels[:, role]
    return out


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 2.5])
def test_joint(state, w):
    x, t, labels = state
    v = Counting()
    v0, vc = v(x, t, dropped(labels)), v(x, t, labels)
    counted = Counting()
    out = guided(counted, strategy="joint", guidance=w, unconditional=UNCONDITIONAL)(x, t, labels)
    torch.testing.assert_close(out, v0 + w * (vc - v0))
    assert counted.rows == [5 if w in (0.0, 1.0) else 10]


@pytest.mark.parametrize("strategy", ["joint", "mutually_exclusive", "independent"])
def test_outside_its_interval_the_conditional_flow_is_left_alone(state, strategy):
    x, _, labels = state
    options = {"strategy": strategy, "unconditional": UNCONDITIONAL}
    field = guided(Counting(), guidance=2.0, interval=(0.2, 0.8), **options)
    for t, guidance in ((0.1, 1.0), (0.2, 2.0), (0.5, 2.0), (0.8, 2.0), (0.9, 1.0)):
        time = torch.full((5,), t).double()
        expected = guided(Counting(), guidance=guidance, **options)(x, time, labels)
        torch.testing.assert_close(field(x, time, labels), expected, rtol=0, atol=0)
    assert conditioned_on(strategy, 0.0) == frozenset()
    assert conditioned_on(strategy, 0.0, (0.0, 0.5)) == {"donor", "timepoint", "perturbation"}


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.5,), 0.5, "ab", (0.0, float("nan"))])
def test_an_interval_lies_within_the_flow(interval):
    with pytest.raises(ValueError, match="guidance interval"):
        guided(Counting(), strategy="joint", guidance=2.0, unconditional=UNCONDITIONAL, interval=interval)


def test_unconditional_output_does_not_depend_on_the_condition(state):
    x, t, labels = state
    for strategy in ("joint", "mutually_exclusive", "independent"):
        counted = Counting()
        field = guided(counted, strategy=strategy, guidance=0.0, unconditional=UNCONDITIONAL)
        assert torch.equal(field(x, t, labels), field(x, t, labels.flip(0)))
        assert counted.rows == [5, 5]


@pytest.mark.parametrize(
    "weights", [{"donor": 0.5, "timepoint": 2.0, "perturbation": 3.0}, {"donor": 0.0}, {}, {"perturbation": 0.25}]
)
def test_mutually_exclusive(state, weights):
    x, t, labels = state
    v = Counting()
    v0 = v(x, t, dropped(labels))
    expected = v0.clone()
    for i, role in enumerate(("donor", "timepoint", "perturbation")):
        expected += weights.get(role, 1.0) * (v(x, t, dropped(labels, i)) - v0)
    field = guided(v, strategy="mutually_exclusive", guidance=weights, unconditional=UNCONDITIONAL)
    torch.testing.assert_close(field(x, t, labels), expected)


@pytest.mark.parametrize(
    ("guidance", "n_passes"),
    [
        ({"context": 1.5, "perturbation": 3.0}, 3),
        ({"perturbation": 2.0}, 2),
        (1.0, 1),
        (2.0, 2),
        ({"perturbation": 0.0}, 1),
    ],
)
def test_independent_guides_the_perturbation_relative_to_its_context(state, guidance, n_passes):
    x, t, labels = state
    weights = {"context": guidance, "perturbation": guidance} if isinstance(guidance, float) else guidance
    v = Counting()
    v0, ctx, full = v(x, t, dropped(labels)), v(x, t, dropped(labels, 0, 1)), v(x, t, labels)
    expected = v0 + weights.get("context", 1.0) * (ctx - v0) + weights["perturbation"] * (full - ctx)
    counted = Counting()
    field = guided(counted, strategy="independent", guidance=guidance, unconditional=UNCONDITIONAL)
    torch.testing.assert_close(field(x, t, labels), expected)
    assert counted.rows == [5 * n_passes]


def test_joint_takes_equal_weights_only(state):
    equal = dict.fromkeys(("donor", "timepoint", "perturbation"), 2.0)
    one, many = (
        guided(Counting(), strategy="joint", guidance=g, unconditional=UNCONDITIONAL)(*state) for g in (2.0, equal)
    )
    assert torch.equal(one, many)
    with pytest.raises(ValueError, match="dropped together"):
        guided(Counting(), strategy="joint", guidance=equal | {"donor": 1.0}, unconditional=UNCONDITIONAL)
    with pytest.raises(ValueError, match="dropped together"):
        guided(Counting(), strategy="joint", guidance={"perturbation": 2.0}, unconditional=UNCONDITIONAL)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, {"perturbation": -0.5}, {"guide": 1.0}])
@pytest.mark.parametrize("strategy", ["joint", "mutually_exclusive", "independent"])
def test_senseless_weights_are_refused(strategy, bad):
    with pytest.raises(ValueError, match="guidance weight"):
        guided(Counting(), strategy=strategy, guidance=bad, unconditional=UNCONDITIONAL)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="unknown guidance strategy"):
        guided(Counting(), strategy="additive", guidance=1.0, unconditional=UNCONDITIONAL)
