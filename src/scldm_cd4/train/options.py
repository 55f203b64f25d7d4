"""What a caller asks of a training, checked and taken apart by stage."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import lightning.pytorch as pl

from scldm_cd4._errors import DataError
from scldm_cd4.config import STAGES, ModelConfig, StageConfig
from scldm_cd4.registry import near_matches


def check_keywords(given: Iterable[str], own: Iterable[str] = ()) -> None:
    """Refuse keywords of training that nothing takes; `own` are further ones that the caller takes.

    Raises
    ------
    DataError
        Names the first such keyword, near matches, and the place for settings of the optimiser.
    """
    known = set(inspect.signature(pl.Trainer).parameters) | {"num_workers", "progress", "compile"}
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    name = unknown[0]
    close = near_matches(name, sorted({*known, *own}))
    hint = f" Near matches: {', '.join(map(repr, close))}." if close else ""
    example = name if name in {f.name for f in fields(StageConfig)} else "lr"
    raise DataError(
        f"training takes no keyword {name!r}.{hint} Settings of the optimiser go to plan_kwargs, such as "
        f"plan_kwargs={{{example!r}: ...}}; others are those of lightning.pytorch.Trainer"
    )


def by_stage(value: Any, name: str) -> dict[str, Any]:
    """Return a value for each stage, from one for both or a dict; `name` is that of the argument.

    Raises
    ------
    DataError
        The dict has other keys.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(STAGES, value)
    if unknown := sorted(set(value) - set(STAGES)):
        raise DataError(f"{name} takes one value or a dict with keys 'vae' and 'flow', not {unknown}")
    return {stage: value.get(stage) for stage in STAGES}


def stage_configs(config: ModelConfig, changes: Mapping[str, Any] | None) -> dict[str, StageConfig]:
    """Return how each stage is trained, with the changes of a caller, for both stages or a dict by stage.

    Raises
    ------
    DataError
        There is no such setting.
    """
    split = changes is not None and set(changes) <= set(STAGES)
    wanted = by_stage(changes if split else dict.fromkeys(STAGES, changes), "plan_kwargs")
    known = sorted(f.name for f in fields(StageConfig))
    out = {}
    for stage, base in zip(STAGES, (config.train_vae, config.train_flow), strict=True):
        own = dict(wanted[stage] or {})
        if unknown := sorted(set(own) - set(known)):
            raise DataError(f"unknown in plan_kwargs for {stage!r}: {unknown}; known: {known}")
        out[stage] = replace(base, **own)
    return out
