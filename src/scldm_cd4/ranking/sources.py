"""Where effects come from; generated ones may be computed by the workers of an engine, some perturbations at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scldm_cd4._errors import DataError
from scldm_cd4.data.cells import CellData
from scldm_cd4.engines import Engine, trained_on
from scldm_cd4.generation import Trained
from scldm_cd4.ranking.effects import Both, Change, Context, Control, EffectSource, Generated, Observed, Summariser
from scldm_cd4.ranking.population import latent_embedding
from scldm_cd4.sampling import Sampler, Sampling


def generated_effects(
    trained: Trained, sampling: Sampling, summariser: Summariser | None = None, workers: int | None = None
) -> Generated:
    """Return effects from generated cells whose noise is keyed by the context alone.

    A perturbation and its control then share all noise.
    """
    sampler = Sampler(trained.vae, trained.dit, trained.registry, sampling, noise_labels=_context)
    return Generated(sampler, summariser or Summariser(), workers)


def _context(labels: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return labels[0], labels[1], None


@dataclass(frozen=True)
class Job:
    """What a worker needs for the effects of any perturbation."""

    trained: Trained
    sampling: Sampling
    summariser: Summariser
    controls: Mapping[Context, Control]
    n_cells: int

    def on(self, device: str) -> "Job":
        """Return it with the networks on a kind of device."""
        return replace(self, trained=trained_on(self.trained, device))


def changes_of(job: Job, names: Sequence[str]) -> list[dict[Context, Change]]:
    """Return the effects of some perturbations."""
    embed = latent_embedding(job.trained.vae, job.trained.registry)  # with the networks of this worker
    populations = tuple(replace(population, embed=embed) for population in job.summariser.populations)
    source = generated_effects(job.trained, job.sampling, Summariser(populations), workers=1)
    return list(source.changes(names, job.controls, job.n_cells))


@dataclass(frozen=True)
class Divided:
    """Generated effects, the perturbations of which are the work units of an engine; equal to those of one process."""

    trained: Trained
    sampling: Sampling
    summariser: Summariser
    engine: Engine
    workers: int | None = None
    name: str = "generated"

    def controls(self, contexts: Sequence[Context], n_cells: int) -> dict[Context, Control]:
        """Generate the controls, in this process."""
        source = generated_effects(self.trained, self.sampling, self.summariser, self.workers)
        return source.controls(contexts, n_cells)

    def changes(
        self, names: Sequence[str], controls: Mapping[Context, Control], n_cells: int
    ) -> Iterator[dict[Context, Change]]:
        """Generate the cells of each condition on the workers; a unit has at least the cells of a network pass."""
        size = math.ceil(self.sampling.batch_size / max(1, n_cells * len(controls)))
        parts = [names[i : i + size] for i in range(0, len(names), size)]
        shipped = Summariser(tuple(replace(p, embed=_nothing) for p in self.summariser.populations))
        job = Job(self.trained, self.sampling, shipped, controls, n_cells)
        gpu = next(self.trained.dit.parameters()).device.type != "cpu"
        for changes in self.engine.map(changes_of, job, parts, gpu=gpu):
            yield from changes


def _nothing(counts: Any) -> Any:
    """Stand for an embedding, which each worker makes with its own networks."""


def effect_source(
    trained: Trained,
    sampling: Sampling,
    effects: Any,
    summariser: Summariser,
    adata: Any,
    workers: int | None,
    engine: Engine | None,
) -> EffectSource:
    """Return where effects come from, by the word of a user.

    Raises
    ------
    DataError
        The word is unknown, cells are needed, or the target or the engine does not go with it.
    """
    if engine is not None and effects not in ("generated", "both"):
        raise DataError("engine= divides the generation of cells: effects= must be 'generated' or 'both'")
    if hasattr(effects, "changes") and hasattr(effects, "controls"):
        if summariser.populations:
            raise DataError("a target population needs cells: effects= must be 'generated' or 'observed'")
        source: EffectSource = effects
        return source
    if effects not in ("generated", "observed", "both"):
        raise DataError(f"effects must be 'generated', 'observed', 'both' or an EffectSource, got {effects!r}")
    registry = trained.registry
    generated: EffectSource = generated_effects(trained, sampling, summariser, workers)
    if engine is not None:
        generated = Divided(trained, sampling, summariser, engine, workers)
    if effects == "generated":
        return generated
    if effects == "both" and summariser.populations:
        raise DataError("effects='both' mixes changes of expression, not distances: a population needs one of the two")
    if adata is None:
        raise DataError(f"effects={effects!r} needs cells: load the model with adata=")
    observed = Observed(CellData.from_adata(adata, registry), registry, summariser, sampling.seed)
    return observed if effects == "observed" else Both(generated, observed)
