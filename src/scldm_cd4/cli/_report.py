"""The summary of a demo as text and as JSON."""

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from scldm_cd4.checkpoint.native import to_json
from scldm_cd4.cli._scores import MEASURES

SIMULATED = "SIMULATED"
NOTICE = "SIMULATED cells: nothing below says anything about real cells."


@dataclass
class Report:
    """What a demo has to say."""

    simulated: bool
    version: str
    settings: dict[str, Any]
    """Facts of cells and model, in the order shown."""
    summary: pd.DataFrame
    """From `scldm_cd4.cli._scores.summarise`."""
    quality: dict[str, float]
    """Further figures of cells and model."""
    ranked_toward: str
    ranking: pd.DataFrame
    effects: pd.DataFrame | None = None
    """From `scldm_cd4.cli._truth.compare_effects`, for simulated cells."""
    truth: dict[str, float] = field(default_factory=dict)
    planted: pd.DataFrame | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return strict JSON; figures that are not defined are null."""
        values = {
            "data": SIMULATED if self.simulated else "given",
            "version": self.version,
            "settings": self.settings,
            "held_out": self.summary.reset_index().to_dict("records"),
            "quality": self.quality,
            "ranked_toward": self.ranked_toward,
            "ranking": self.ranking[["perturbation", "score"]].to_dict("records"),
            "truth": self.truth,
            "effects": None if self.effects is None else self.effects.to_dict("records"),
            "seconds": self.seconds,
            "files": self.files,
        }
        return to_json(values).decode()

    def to_text(self) -> str:
        """Return the text for a reader."""
        what = NOTICE if self.simulated else "Cells as given."
        parts = [
            f"scldm-cd4 {self.version} demo. {what}",
            _pairs(self.settings),
            self._held_out(),
            self._quality(),
            self._truth(),
            self._ranking(),
            "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items()),
            "files:\n" + "\n".join(f"  {name}" for name in self.files),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _label(self, text: str) -> str:
        return f"{text} ({SIMULATED})" if self.simulated else text

    def _held_out(self) -> str:
        table = pd.DataFrame(
            {
                "measure": [MEASURES[name][0] for name in self.summary.index],
                "generated": self.summary["generated"],
                "control": self.summary["baseline"],
                "repeat": self.summary["ceiling"],
                "anchored": self.summary["score"],
                "counted": [f"{int(row.n_counted)} of {int(row.n_scored)}" for row in self.summary.itertuples()],
            }
        )
        head = self._label("Generated beside held-out cells, medians over the perturbations that count")
        note = (
            "  control: control cells in their place (baseline). repeat: real training cells of the same condition "
            "(ceiling; floor of the\n  distances). anchored: 0 as control, 1 as repeat. A perturbation counts where "
            "repeat beats control by 3 standard errors."
        )
        return f"{head}\n{_table(table)}\n{note}"

    def _quality(self) -> str:
        q = self.quality
        lines = [
            self._label("Cells and model"),
            f"  zero fraction: generated {q['zeros_generated']:.3f}, held out {q['zeros_held_out']:.3f}",
            f"  median counts per cell: generated {q['counts_generated']:.0f}, held out {q['counts_held_out']:.0f}",
            f"  reconstruction of held-out cells: {q['nb_error']:.1f} nats per cell, "
            f"{q['nb_error_intercept']:.1f} with library size alone (lower is better)",
            f"  latent: {q['n_latent']:.0f} numbers per cell; balanced accuracy of a linear classifier of the "
            f"context: {q['probe_latent']:.2f}, {q['probe_pcs']:.2f} from 30 PCs, {q['probe_chance']:.2f} by chance",
            f"  saved, loaded and generated again: {'the same cells' if q['reload_equal'] else 'OTHER CELLS'}",
        ]
        if not math.isnan(q.get("significant_generated", math.nan)):
            lines.insert(
                3,
                f"  significant genes of no-effect perturbations: generated {q['significant_generated']:.1f}, 95 % of "
                f"real repeats at most {q['significant_repeat_q95']:.1f}",
            )
        return "\n".join(lines)

    def _truth(self) -> str:
        if self.effects is None:
            return ""
        active = self.effects[self.effects["kind"] != "none"]
        t = self.truth
        medians = active[["generated", "ceiling", "baseline"]].median()
        lines = [
            self._label("Against the simulator's truth"),
            f"  log2 fold changes, median correlation over {len(active)} perturbations with an effect: generated "
            f"{medians['generated']:.2f}, training cells {medians['ceiling']:.2f}, control cells "
            f"{medians['baseline']:.2f}",
            f"  ranking toward the Th1 side of the Th1-Th2 axis, Spearman with the truth over {t['n_ranked']:.0f} "
            f"perturbations: generated {t['spearman']:.2f}, training cells {t['spearman_ceiling']:.2f}, chance 0",
            f"  planted Th1 and Th2 regulators with the right direction: {t['signs_right']:.0f} of "
            f"{t['n_regulators']:.0f}, {t['n_regulators'] / 2:.1f} by chance",
            f"  largest score of a no-effect perturbation {t['score_no_effect']:.2f}, median of the regulators "
            f"{t['score_regulators']:.2f}",
        ]
        return "\n".join(lines)

    def _ranking(self) -> str:
        table = self.ranking[["perturbation", "score"]].reset_index(drop=True)
        ends = table if len(table) <= 10 else pd.concat([table.head(5), table.tail(5)])
        text = ", ".join(f"{row.perturbation} {row.score:+.2f}" for row in ends.itertuples())
        how = "all" if len(table) <= 10 else "first and last five"
        low, high = (self.ranking[name].median() for name in ("chance_lo", "chance_hi"))
        return (
            f"{self._label(f'Ranking toward {self.ranked_toward}')}, {how}; control against control, 90 %: "
            f"{low:+.2f} to {high:+.2f}\n  {text}"
        )


def _pairs(values: dict[str, Any]) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in values.items())


def _table(table: pd.DataFrame) -> str:
    text = table.to_string(index=False, float_format="{:.3f}".format, na_rep="-", justify="right")
    return "\n".join(f"  {line}" for line in text.splitlines())
