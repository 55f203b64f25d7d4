"""The README of a saved model: what it was trained on, how well it does, and what it is not for."""

import math
from collections.abc import Mapping
from typing import Any

from scldm_cd4 import __version__
from scldm_cd4.config import STAGES, ModelConfig
from scldm_cd4.registry import Registry

HEAD = """---
library_name: scldm_cd4
tags:
- biology
- single-cell
- perturbation
---

"""
LOAD = """```python
from scldm_cd4 import CD4Model

model = CD4Model.from_pretrained(folder_or_name)
```"""
USE = """## Intended use and limits

- For research: to explore and to plan experiments. Not for clinical decisions, diagnosis or treatment.
- Only perturbations, donors and time points that were trained can be asked for. A combination of known labels that was
  never measured can be generated; it is then a guess of the model, and the cells say so (`n_train_cells` is 0).
- Generated cells are not measurements. Check conclusions against measured cells, and beside a simple baseline.
- The names of genes, donors and perturbations, the numbers of training cells, and the training history are in these
  files.
"""


def model_card(
    config: ModelConfig,
    registry: Registry,
    history: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    n_parameters: int,
    scores: Any = None,
) -> str:
    """Return a model card in Markdown.

    Parameters
    ----------
    config, registry, history, record
        The model and its training; `history` holds tables of losses by stage.
    n_parameters
        Numbers in the networks.
    scores
        A table of scores beside their baselines, such as `scldm_cd4.metrics` gives, which the card then shows.
    """
    parts = [
        f"{HEAD}# A scLDM.CD4 model",
        f"Generates CD4+ T cell expression for a perturbation, a donor and a time point. Written by scldm_cd4 "
        f"{__version__}.\n\n{LOAD}",
        "## Data\n\n" + "\n".join(_data(registry)),
        "## Model and training\n\n" + "\n".join(_training(config, record, n_parameters)),
        "## How well it does\n\n" + "\n".join(_figures(history, scores)),
        USE,
    ]
    return "\n\n".join(parts)


def _data(registry: Registry) -> list[str]:
    n_cells = sum(n for by_donor in registry.train_counts.values() for t in by_donor.values() for n in t.values())
    seen = sum(n > 0 for by_donor in registry.train_counts.values() for t in by_donor.values() for n in t.values())
    lines = [f"- {registry.n_genes} genes"]
    lines += [
        f"- {len(a)} {a.role}{'s' if len(a) != 1 else ''}" + (f" (`{a.column}`)" if a.column else "")
        for a in registry.attributes
    ]
    lines.append(f"- control: {'none' if registry.control is None else f'`{registry.control}`'}")
    known = f"- {n_cells} training cells in {seen} conditions" if n_cells else "- numbers of training cells: not known"
    return [*lines, known]


def _training(config: ModelConfig, record: Mapping[str, Any], n_parameters: int) -> list[str]:
    lines = [f"- {n_parameters:,} parameters; latent of {config.vae.latent_tokens} tokens x {config.vae.n_channels}"]
    if pretrained := record.get("pretrained"):
        lines.append(f"- weights read from a checkpoint in the {pretrained['layout']} layout ({pretrained['weights']})")
    for stage, name in STAGES.items():
        if stage not in record:
            continue
        facts = record[stage]
        lines.append(f"- {name}: {facts.get('n_steps', 'unknown')} steps of {facts.get('batch_size', '?')} cells, seed "
                     f"{facts['seed']}" + (" (interrupted)" if facts["interrupted"] else ""))  # fmt: skip
        lines += [f"  - {note}" for note in facts.get("notes", [])]
    splits = [record[stage]["split"] for stage in STAGES if stage in record]
    if splits:
        numbers = splits[-1]["n_cells"]
        lines.append("- split: " + ", ".join(f"{n} cells for {part}" for part, n in numbers.items())
                     + f" ({splits[-1].get('kind', 'given')})")  # fmt: skip
        held = [f"{k} of {len(v)} labels or rows" for k, v in splits[-1].items() if k in ("hold_out", "conditions")]
        lines += [f"  - held out whole: {', '.join(held)} (listed in `history.json`)"] if held else []
    return lines


def _figures(history: Mapping[str, Any], scores: Any) -> list[str]:
    rows = []
    for stage, what in (
        ("vae", "nats per cell, negative log-likelihood"),
        ("flow", "mean squared error of velocities"),
    ):
        if stage not in history:
            continue
        last = history[stage].iloc[-1]
        baseline = last.get("mean_profile_nll", math.nan) if stage == "vae" else math.nan
        said = "the mean profile of the training cells" if math.isfinite(baseline) else "none"
        losses = (_number(last[name]) for name in ("train_loss", "validation_loss"))
        cells = (STAGES[stage], what, *losses, f"{_number(baseline)} ({said})")
        rows.append(f"| {' | '.join(cells)} |")
    lines = []
    if rows:
        lines = ["| stage | loss | training | validation | baseline |", "|---|---|---|---|---|", *rows, ""]
    if scores is None:
        return [*lines, "No scores against held-out cells were given when this model was saved."]
    table = scores.reset_index() if scores.index.name is not None else scores
    lines += ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return lines + ["| " + " | ".join(_number(value) for value in row) + " |" for row in table.itertuples(index=False)]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value).replace("|", "\\|").replace("\n", " ")
