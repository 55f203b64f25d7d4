"""The page on metrics names every metric, baseline, profile and convention that there is."""

from pathlib import Path

import pytest

from scldm_cd4 import metrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@pytest.mark.parametrize(
    "names",
    [metrics.registry.METRICS, metrics.baselines.BASELINES, metrics.registry.PROFILES, metrics.compat.CONVENTIONS],
    ids=["metrics", "baselines", "profiles", "conventions"],
)
def test_page_names_everything(names):
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []
