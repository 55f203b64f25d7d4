"""Registry, attributes and size factors: codes, exact JSON, fall-backs, draws."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scldm_cd4._errors import CheckpointError, DataError, UnknownCategoryError
from scldm_cd4.config import ROLES
from scldm_cd4.registry import Attribute, Registry, SizeFactors

ODD = ("A", "A_B", "B_C", "C", "CD4 Tß 細胞", " padded ", "1.0", "a/b\\\"'")


def make_registry(donors=("d1", "d2"), timepoints=("Rest", "Stim"), perturbations=("GATA3", "NTC")) -> Registry:
    return Registry(
        genes=("g1", "g2", "g3"),
        donor=Attribute("donor", "donor_id", tuple(donors)),
        timepoint=Attribute("timepoint", None, tuple(timepoints)),
        perturbation=Attribute("perturbation", "guide", tuple(perturbations)),
        control=perturbations[-1],
        var={"symbol": ("x", "y", "")},
    )


def trained(registry: Registry, n: int = 400, seed: int = 0) -> Registry:
    generator = np.random.default_rng(seed)
    labels = np.stack([generator.integers(0, k, n) for k in registry.vocabulary], axis=1)
    return registry.with_training(labels, np.exp(generator.normal(7, 0.5, n)))


def test_order_of_roles_is_one_everywhere():
    registry = make_registry(donors=("d1", "d2", "d3"))
    assert tuple(a.role for a in registry.attributes) == ROLES == ("donor", "timepoint", "perturbation")
    assert registry.vocabulary == (3, 2, 2)
    codes = registry.encode(["d3", "d1"], ["Stim", "Rest"], ["NTC", "GATA3"])
    assert codes.dtype == np.int64
    assert codes.tolist() == [[2, 1, 1], [0, 0, 0]]


def test_encode_and_decode_are_inverse_and_take_one_label():
    attribute = Attribute("donor", "donor_id", ODD)
    assert attribute.decode(attribute.encode(ODD)).tolist() == list(ODD)
    assert attribute.encode("A_B").tolist() == [1]


@pytest.mark.parametrize("name", ["gata3", "NOTAGENE", None, "", np.nan, 0])
def test_unknown_label_is_never_mapped(name):
    attribute = Attribute("perturbation", "guide", ("GATA3", "NTC", "STAT5B"))
    with pytest.raises(UnknownCategoryError, match="column 'guide'") as error:
        attribute.encode(["NTC", name])
    assert repr(name) in str(error.value)
    assert "'STAT5B'" in str(error.value)  # a short vocabulary is listed


def test_near_matches_are_offered_from_a_large_vocabulary():
    attribute = Attribute("perturbation", "guide", tuple(f"GENE{i}" for i in range(500)) + ("STAT5B",))
    with pytest.raises(UnknownCategoryError, match="Near matches: 'STAT5B'"):
        attribute.encode("stat5b")


def test_codes_of_dropped_labels_have_no_name():
    with pytest.raises(UnknownCategoryError):
        Attribute("donor", None, ("a", "b")).decode([2])


def test_json_round_trip_is_exact():
    registry = trained(make_registry(ODD, ODD[::-1], ODD))
    text = json.dumps(registry.to_dict(), allow_nan=False)
    assert Registry.from_dict(json.loads(text)) == registry
    assert Registry.from_dict(json.loads(json.dumps(make_registry().to_dict()))) == make_registry()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
def test_json_round_trip_of_any_text(levels):
    registry = trained(make_registry(donors=levels, perturbations=levels), n=20)
    assert Registry.from_dict(json.loads(json.dumps(registry.to_dict()))) == registry


def test_labels_that_join_to_the_same_text_stay_apart():
    registry = make_registry(donors=("A", "A_B"), timepoints=("B_C", "C"))
    labels = np.array([[0, 0, 0]] * 40 + [[1, 1, 0]] * 50)  # A + B_C, and A_B + C
    library = np.array([10.0] * 40 + [1000.0] * 50)
    back = Registry.from_dict(json.loads(json.dumps(registry.with_training(labels, library).to_dict())))
    assert back.n_train("GATA3", "A", "B_C") == 40
    assert back.n_train("GATA3", "A_B", "C") == 50
    half = np.array([0.5])
    np.testing.assert_allclose(back.size_factors.sample("A", "B_C", half), 10)
    np.testing.assert_allclose(back.size_factors.sample("A_B", "C", half), 1000)


def test_training_evidence():
    registry = make_registry()
    assert registry.n_train("GATA3", "d1", "Rest") == 0
    labels = np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    registry = registry.with_training(labels, np.array([5.0, 6.0, 7.0, 8.0]))
    assert registry.n_train("GATA3", "d1", "Rest") == 2
    assert registry.n_train("GATA3", "d2", "Rest") == 0
    assert registry.n_train_contexts("GATA3") == 2
    assert registry.n_train_contexts("NTC") == 1
    assert registry.n_train_contexts("absent") == 0
    assert [registry.untrained(role) for role in ROLES] == [("d2",), (), ()]


def test_wrong_parts_are_refused():
    attribute = Attribute("donor", None, ("all",))
    with pytest.raises(DataError, match="not unique"):
        Attribute("donor", None, ("a", "a"))
    with pytest.raises(DataError, match="role"):
        Registry(("g",), attribute, attribute, attribute)
    values = make_registry().to_dict()
    for name, bad in [
        ("genes", "g1"),
        ("genes", ["g1", "g1"]),
        ("genes", [1, 2]),
        ("donor", {"column": None}),
        ("donor", None),
        ("perturbation", {"column": 3, "levels": ["a"]}),
        ("control", "absent"),
        ("var", {"symbol": ["x"]}),
        ("train_counts", {"GATA3": {"d1": {"Rest": -1}}}),
        ("train_counts", {"GATA3": 3}),
        ("size_factors", {"overall": {}}),
    ]:
        with pytest.raises(CheckpointError, match="registry is damaged"):
            Registry.from_dict(values | {name: bad})
    for damaged in ({**values, "extra": 1}, {k: v for k, v in values.items() if k != "genes"}):
        with pytest.raises(CheckpointError, match="extra|genes"):
            Registry.from_dict(damaged)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("sd", -1.0), ("mean", float("nan")), ("quantiles", [1.0, 2.0]), ("quantiles", [2.0] + [1.0] * 100)],
)
def test_damaged_size_factors_are_refused(name, bad):
    values = copy.deepcopy(trained(make_registry()).to_dict())
    values["size_factors"]["overall"][name] = bad
    with pytest.raises(CheckpointError, match="damaged"):
        Registry.from_dict(values)


class TestSizeFactors:
    def fit(self, sizes: dict[tuple[int, int], int], min_cells: int = 30) -> SizeFactors:
        generator = np.random.default_rng(1)
        donor = np.concatenate([[d] * n for (d, _), n in sizes.items()])
        time = np.concatenate([[t] * n for (_, t), n in sizes.items()])
        log_library = generator.normal(6 + donor + 0.1 * time, 0.3)
        return SizeFactors.fit(log_library, donor, time, donors=("a", "b"), timepoints=("x", "y"), min_cells=min_cells)

    def test_statistics_are_natural_log_with_ddof_0(self):
        log_library = np.log(np.array([100.0, 200.0, 400.0]))
        zero = np.zeros(3, dtype=int)
        stats = SizeFactors.fit(log_library, zero, zero, donors=("a",), timepoints=("x",)).overall
        assert stats.mean == pytest.approx(np.mean(log_library))
        assert stats.sd == pytest.approx(np.std(log_library))
        assert (stats.n, len(stats.quantiles)) == (3, 101)
        np.testing.assert_allclose(stats.draw(np.array([1e-12, 0.5, 1 - 1e-12])), [100, 200, 400])

    def test_fall_back_from_context_to_timepoint_to_all(self):
        factors = self.fit({(0, 0): 40, (1, 0): 10, (0, 1): 5})
        assert factors.lookup("a", "x")[1] == "context"
        assert factors.lookup("b", "x") == (factors.timepoints["x"], "timepoint")
        assert factors.lookup(None, "x")[1] == "timepoint"
        assert factors.lookup("a", "y") == (factors.overall, "all")
        assert factors.lookup(None, None)[1] == "all"
        assert factors.lookup("never", "seen")[1] == "all"

    def test_shifts_of_perturbations_carry_over_to_contexts_without_them(self):
        rng = np.random.default_rng(3)
        donor, perturbation = rng.integers(0, 3, 3000), rng.integers(0, 3, 3000)
        seen = ~((donor == 2) & (perturbation == 1))
        donor, perturbation = donor[seen], perturbation[seen]
        noise = rng.normal(0, 0.4, len(donor)) * np.array([1.0, 0.5, 1.0])[perturbation]
        log_library = 6 + 0.5 * donor + np.array([0.0, 0.6, 0.0])[perturbation] + noise
        names = {"donors": ("a", "b", "c"), "timepoints": ("x",), "perturbations": ("NTC", "strong", "none")}
        factors = SizeFactors.fit(log_library, donor, np.zeros_like(donor), perturbation=perturbation, **names)
        uniform = (np.arange(2000) + 0.5) / 2000
        for d, label, mean, sd in ((2, "strong", 7.6, 0.2), (2, "NTC", 7.0, 0.4), (0, "strong", 6.6, 0.2)):
            drawn = np.log(factors.sample("abc"[d], "x", uniform, label))
            assert drawn.mean() == pytest.approx(mean, abs=0.05)
            assert drawn.std() == pytest.approx(sd, rel=0.15)
        assert SizeFactors.from_dict(json.loads(json.dumps(factors.to_dict()))) == factors
        own = SizeFactors.fit(  # controls of a further donor: its library is not taken for a shift of the control
            np.full(50, 9.0),
            np.zeros(50, int),
            np.zeros(50, int),
            perturbation=np.zeros(50, int),
            shifts=factors.perturbations,
            **names | {"donors": ("d",)},
        )
        drawn = np.log(factors.with_contexts(own).sample("d", "x", uniform, "NTC"))
        assert drawn.mean() == pytest.approx(9.0, abs=0.01)

    def test_perturbations_without_a_shift_keep_the_library_sizes_of_the_context(self):
        rng = np.random.default_rng(4)
        perturbation = rng.integers(0, 30, 1500)
        zero = np.zeros(1500, int)
        labels = tuple(f"p{i}" for i in range(30))
        names = {"donors": ("a",), "timepoints": ("x",), "perturbations": labels}
        factors = SizeFactors.fit(rng.normal(7, 0.5, 1500), zero, zero, perturbation=perturbation, **names)
        shifts = np.array([s.shift for s in factors.perturbations.values()])
        assert np.sqrt(np.mean(shifts**2)) < 0.04  # raw means of 50 cells: 0.07
        uniform = rng.random(100)
        np.testing.assert_array_equal(factors.sample("a", "x", uniform), factors.sample("a", "x", uniform, "unknown"))

    def test_draws_follow_the_context(self):
        factors = self.fit({(0, 0): 3000, (1, 0): 3000})
        uniform = np.random.default_rng(2).random((50, 40))
        for donor, mean in (("a", 6), ("b", 7)):
            drawn = factors.sample(donor, "x", uniform)
            assert drawn.shape == uniform.shape
            assert drawn.dtype == np.float64
            assert np.log(drawn).mean() == pytest.approx(mean, abs=0.03)
            assert np.log(drawn).std() == pytest.approx(0.3, abs=0.02)
        assert np.array_equal(np.argsort(drawn.ravel()), np.argsort(uniform.ravel()))

    @pytest.mark.parametrize("uniform", [0.0, 1.0, -0.1, np.nan])
    def test_uniform_numbers_must_be_inside(self, uniform):
        with pytest.raises(DataError, match="uniform"):
            self.fit({(0, 0): 40}).sample("a", "x", np.array([uniform]))

    def test_reference_layout(self):
        mean = {"Rest_CE0006864": 7.1, "Rest_CE_1": 7.3, "Stim8hr_CE0006864": 7.7}
        sd = dict.fromkeys(mean, 0.5)
        factors = SizeFactors.from_reference(mean, sd, donors=("CE0006864", "CE_1"), timepoints=("Rest", "Stim8hr"))
        uniform = np.random.default_rng(0).random(20000)
        drawn = np.log(factors.sample("CE0006864", "Stim8hr", uniform))
        assert drawn.mean() == pytest.approx(7.7, abs=0.02)
        assert drawn.std() == pytest.approx(0.5, abs=0.02)
        assert factors.lookup("CE_1", "Stim8hr")[1] == "timepoint"
        assert factors.timepoints["Rest"].mean == pytest.approx(7.2)
        assert factors.timepoints["Rest"].sd == pytest.approx(np.sqrt(0.25 + 0.01))
        assert SizeFactors.from_dict(json.loads(json.dumps(factors.to_dict()))) == factors

    def test_reference_keys_that_fit_no_or_two_contexts(self):
        with pytest.raises(DataError, match="fits 0 contexts"):
            SizeFactors.from_reference({"x_zz": 7.0}, {"x_zz": 0.5}, donors=("a",), timepoints=("x",))
        with pytest.raises(DataError, match="fits 2 contexts"):
            SizeFactors.from_reference({"A_B_C": 7.0}, {"A_B_C": 0.5}, donors=("C", "B_C"), timepoints=("A", "A_B"))
        with pytest.raises(DataError, match="same keys"):
            SizeFactors.from_reference({"x_a": 7.0}, {}, donors=("a",), timepoints=("x",))

    def test_no_cells(self):
        with pytest.raises(DataError, match="at least one cell"):
            SizeFactors.fit(np.zeros(0), np.zeros(0), np.zeros(0), donors=("a",), timepoints=("x",))
