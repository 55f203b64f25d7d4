"""New donors and time points of a trained model: their embeddings are fitted, everything else stays as it is.

A new level gets a row of its own in the table of label embeddings, before the unconditional row, and one among the
effects of labels. Both start at the mean of the levels that were trained and leave it as far as the cells given say so.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from scldm_cd4._errors import DataError
from scldm_cd4._state import State, library_sizes
from scldm_cd4.conditions import known_label
from scldm_cd4.config import ROLES
from scldm_cd4.data.cells import CellData
from scldm_cd4.data.labels import as_label, read_labels
from scldm_cd4.data.mudata import as_anndata
from scldm_cd4.data.setup import require_anndata
from scldm_cd4.familiarity import warn_of_far_cells
from scldm_cd4.flow import drop_labels, flow_loss, interpolate
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.registry import Registry
from scldm_cd4.train.latents import decode_means, encode_rows
from scldm_cd4.train.rng import keyed_generator

EXTENDABLE = ("donor", "timepoint")
N_STEPS = 200
BATCH = 128
"""Draws of cell, noise and time per step."""
N_START = 8
"""Draws to measure the loss at the start."""
LR = 0.05
"""Of Adam, in units of the spread of the trained levels."""
PRIOR_CELLS = 1.0
"""An embedding as far from the mean as trained levels are costs what `PRIOR_CELLS` / n of the loss of n cells does."""


@dataclass(frozen=True)
class Prior:
    """Where the levels of a role lie: mean (D,) and standard deviation (one for all dimensions) of the trained rows."""

    mean: Tensor
    sd: float


def new_levels(registry: Registry, given: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the levels to add by role, as the model spells them.

    Raises
    ------
    DataError
        A level has training cells already or was added before, is named twice, the model has no column for the role,
        or none is named.
    """
    out = {}
    for role, value in given.items():
        if value is None:
            continue
        attribute = getattr(registry, role)
        labels = [as_label(v) for v in ([value] if isinstance(value, str | bytes) or np.ndim(value) == 0 else value)]
        if attribute.column is None:
            raise DataError(f"the model was trained without a {role} column, so it cannot get a new {role}")
        if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
            raise DataError(f"new {role} levels must be different labels, got {labels}")
        untrained = registry.untrained(role) if registry.train_counts else ()
        if known := [label for label in labels if label in attribute.levels and label not in untrained]:
            raise DataError(
                f"the model knows the {role} {known[0]!r} already. To fit it to other cells, extend a model that does "
                "not; to learn from more cells of it, train a new model on all cells"
            )
        if labels:
            out[role] = labels
    if not out:
        raise DataError("say what is new: extend(adata, donor=...) or extend(adata, timepoint=...)")
    return out


def unknown_levels(adata: Any, registry: Registry) -> dict[str, list[str]]:
    """Return the donors and time points of cells that a model was not trained on."""
    adata = as_anndata(adata)
    require_anndata(adata)
    out = {}
    for role in EXTENDABLE:
        attribute = getattr(registry, role)
        if attribute.column is None:
            continue
        _, levels = read_labels(adata.obs, attribute.column, f"{role}_key")
        untrained = registry.untrained(role) if registry.train_counts else ()
        out[role] = [x for x in levels if x not in attribute.levels or x in untrained]
    return {role: labels for role, labels in out.items() if labels}


def extend(
    state: State, adata: Any, levels: Mapping[str, list[str]], *, seed: int, n_steps: int | None = None
) -> tuple[State, CellData | None]:
    """Return a model that knows further levels, and the cells that it was fitted to; see `CD4Model.extend`."""
    registry = state.registry.with_levels(levels)
    cells = None if adata is None else _cells_of(adata, registry, state.registry, levels)
    for role, labels in levels.items():
        if cells is None:
            _warn_without_cells(state.registry, role, labels)
    new = _grown(state, registry, levels)
    if cells is not None:
        rows = np.arange(cells.n_cells)
        assert cells.labels is not None
        assert new.vae is not None
        assert new.dit is not None
        warn_of_far_cells(state.familiarity, new.vae, cells, stacklevel=5)
        latents = encode_rows(new.vae, cells, rows)
        device = next(new.dit.parameters()).device
        tables = fit_embeddings(
            new.dit,
            latents.to(device),
            torch.from_numpy(cells.labels).to(device),
            {role: (registry_codes(registry, role, labels), _prior(state, role)) for role, labels in levels.items()},
            seed=seed,
            n_steps=N_STEPS if n_steps is None else n_steps,
        )
        with torch.no_grad():
            for role, table in tables.items():
                _table(new.dit, role).copy_(table)
        if new.vae.config.label_rank:
            codes = {role: registry_codes(registry, role, labels) for role, labels in levels.items()}
            trained = {role: _trained_codes(state.registry, role) for role in levels}
            fit_label_effects(new.vae, latents, cells.counts(rows), cells.labels, codes, trained)
        new.registry = registry.with_further_cells(cells.labels, library_sizes(cells, rows))
    facts = {"levels": dict(levels), "n_cells": 0 if cells is None else cells.n_cells, "seed": seed}
    new.record = state.record | {"extensions": [*state.record.get("extensions", []), facts]}
    return new, cells


def copied(state: State) -> State:
    """Return a state with networks, history and record of its own, which can be trained while the other stays."""
    vae, dit = deepcopy(state.vae), deepcopy(state.dit)
    return replace(state, vae=vae, dit=dit, history=dict(state.history), record=dict(state.record))


def registry_codes(registry: Registry, role: str, labels: Sequence[str]) -> list[int]:
    """Return the codes of levels of a role."""
    return [int(code) for code in getattr(registry, role).encode(labels)]


def _cells_of(adata: Any, registry: Registry, before: Registry, levels: Mapping[str, list[str]]) -> CellData:
    """Return the cells that carry a new level, checked and aligned."""
    adata = as_anndata(adata)
    require_anndata(adata)
    chosen = np.zeros(adata.n_obs, dtype=bool)
    for role, labels in levels.items():
        column = getattr(registry, role).column
        codes, names = read_labels(adata.obs, column, f"{role}_key")
        found = np.isin(np.array(names, dtype=object), labels)
        if lost := sorted(set(labels) - set(names)):
            raise DataError(
                f"obs[{column!r}] has no cell of the {role} {lost[0]!r}. Without cells, extend({role}={lost[0]!r}) "
                "alone takes the average of the trained levels"
            )
        chosen |= found[codes]
    cells = CellData.from_adata(adata, registry, rows=np.flatnonzero(chosen))
    assert cells.labels is not None
    for position, attribute in enumerate(registry.attributes):
        for label in attribute.decode(np.unique(cells.labels[:, position])):
            if label not in levels.get(attribute.role, ()):
                known_label(before, attribute, label)
    return cells


def _warn_without_cells(before: Registry, role: str, labels: Sequence[str]) -> None:
    warnings.warn(
        f"no cells of the new {role} {', '.join(map(repr, labels))} were given: cells are generated as of the average "
        f"of {len(_trained_codes(before, role))} trained {role} levels, and nothing of its own is known",
        UserWarning,
        stacklevel=5,
    )


def _trained_codes(registry: Registry, role: str) -> list[int]:
    """Return the codes of levels with trained embeddings; those that were added later are no part of the average."""
    untrained = set(registry.untrained(role)) if registry.train_counts else set()
    untrained |= set(registry.extended.get(role, ()))
    return [code for code, level in enumerate(getattr(registry, role).levels) if level not in untrained]


def _table(dit: DiT, role: str) -> Tensor:
    tables: Any = dit.class_embeddings
    weight: Tensor = tables[role].weight
    return weight


def _prior(state: State, role: str) -> Prior:
    assert state.dit is not None
    known = _table(state.dit, role).detach()[_trained_codes(state.registry, role)]
    sd = float(known.std(0, unbiased=True).square().mean().sqrt()) if len(known) > 1 else 0.0
    return Prior(known.mean(0), sd or state.config.flow.label_std)


def _grown(state: State, registry: Registry, levels: Mapping[str, list[str]]) -> State:
    """Return a copy with rows for the new levels, which hold the mean of the trained ones; the last row stays last."""
    assert state.vae is not None
    assert state.dit is not None
    new = State(state.config, registry, history=dict(state.history), familiarity=state.familiarity, split=state.split)
    weights = {part: dict(getattr(state, part).state_dict()) for part in ("vae", "dit")}
    for role, labels in levels.items():
        names = [("dit", f"class_embeddings.{role}.weight")]
        names += [("vae", f"label_effects.vectors.{role}.weight")] if state.config.vae.label_rank else []
        for part, name in names:
            old = weights[part][name]
            n_new = len(getattr(registry, role)) - len(getattr(state.registry, role))
            table = torch.cat([old[:-1], old.new_zeros(n_new, old.shape[1]), old[-1:]])
            table[registry_codes(registry, role, labels)] = old[_trained_codes(state.registry, role)].mean(0)
            weights[part][name] = table
    device = next(state.dit.parameters()).device
    new.vae, new.dit = new.new_networks()
    new.vae.load_state_dict(weights["vae"])
    new.dit.load_state_dict(weights["dit"])
    new.vae.eval()
    new.dit.eval()
    new.to(device)
    return new


def fit_embeddings(
    dit: DiT,
    latents: Tensor,
    labels: Tensor,
    rows: Mapping[str, tuple[list[int], Prior]],
    *,
    seed: int,
    n_steps: int = N_STEPS,
) -> dict[str, Tensor]:
    r"""Fit rows of the label embeddings to cells, all else frozen.

    Minimises the flow-matching loss relative to its start, L(e) / L(mean), plus
    :math:`\sum_r \frac{k}{n_r} \frac{\|e_r - m\|^2}{D s^2}` with m and s the mean and standard deviation of the trained
    rows, D their width, n_r the cells of row r and k = `PRIOR_CELLS`: a normal prior on the row, whose weight falls
    with the number of cells.

    Parameters
    ----------
    dit
        The network; not changed.
    latents, labels
        Of the cells, (n, S, L) and (n, 3).
    rows
        Codes to fit by role, with the prior.
    seed
        Of cells, noise and times.
    n_steps
        Steps; the result is the mean over their last third.

    Returns
    -------
    The whole table of each role, fitted rows in place.
    """
    tables = {role: _table(dit, role).detach() for role in rows}
    steps = {role: torch.zeros_like(tables[role][codes]).requires_grad_(True) for role, (codes, _) in rows.items()}
    penalties = {
        role: torch.stack([PRIOR_CELLS / (labels[:, ROLES.index(role)] == c).sum().clamp(min=1) for c in codes])
        for role, (codes, _) in rows.items()
    }
    draws = _draws(dit, latents, labels, seed)
    with torch.no_grad():
        start = [flow_loss(dit(x_t, t, chosen), u).mean() for x_t, t, chosen, u in islice(draws, N_START)]
    scale = torch.stack(start).mean().clamp(min=1e-12)
    frozen = {name: value.detach() for name, value in dit.state_dict().items()}
    optimiser = torch.optim.Adam(list(steps.values()), lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps, eta_min=0.1 * LR)
    mean, n_averaged = {role: torch.zeros_like(step) for role, step in steps.items()}, max(1, n_steps // 3)
    for i, (x_t, t, chosen, u) in enumerate(islice(draws, n_steps)):
        weights = frozen | {
            f"class_embeddings.{role}.weight": table for role, table in _filled(tables, rows, steps).items()
        }
        loss = flow_loss(functional_call(dit, weights, (x_t, t, chosen)), u).mean() / scale
        for role, step in steps.items():
            loss = loss + (penalties[role] * step.square().mean(1)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if i >= n_steps - n_averaged:
            for role, step in steps.items():
                mean[role] += step.detach() / n_averaged
    return _filled(tables, rows, mean)


def _filled(
    tables: Mapping[str, Tensor], rows: Mapping[str, tuple[list[int], Prior]], steps: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tables with rows at steps from the prior mean, in units of its standard deviation."""
    out = {}
    for role, (codes, prior) in rows.items():
        index = torch.tensor(codes, device=tables[role].device)
        out[role] = tables[role].index_copy(0, index, prior.mean + prior.sd * steps[role])
    return out


def _draws(dit: DiT, latents: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield states, times, labels and target velocities of `BATCH` draws; times are spread evenly in each."""
    device, n, generator = latents.device, len(latents), keyed_generator(seed, 40)
    while True:
        index = torch.randperm(n, generator=generator)[torch.arange(BATCH) % n].to(device)
        t = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
        x0 = torch.randn((BATCH, *latents.shape[1:]), generator=generator).to(device)
        chosen, strategy = labels[index], dit.config.label_dropout
        if strategy != "joint":  # where all labels are dropped together, nothing of a row is learned
            p = dit.config.p_drop
            chosen = drop_labels(chosen, dit.unconditional, strategy=strategy, p=p, generator=generator)
        x_t, u = interpolate(x0, latents[index], t.to(device))
        yield x_t, t.to(device), chosen, u


def fit_label_effects(
    vae: VAE,
    latents: Tensor,
    counts: Any,
    labels: NDArray[np.int64],
    rows: Mapping[str, Sequence[int]],
    trained: Mapping[str, Sequence[int]],
) -> None:
    r"""Write what the latents leave untold of new levels into the effects of labels, in closed form.

    For a gene with o observed counts in n cells and e decoded ones, with those of the new level at the mean of trained
    levels, the effect is
    :math:`\frac{\tau^2}{\tau^2 + 1/e + 1/(n \theta)} \ln\frac{o + 1/2}{e + 1/2}`: shrunk as the ratio of negative
    binomial counts of inverse dispersion :math:`\theta` is uncertain and as trained levels vary, with variance
    :math:`\tau^2` over levels and genes. Projected onto the loadings that the model has it is added to the row.

    Parameters
    ----------
    vae
        Changed in place, in the rows given alone, which hold the mean of the trained ones.
    latents, counts, labels
        Of the cells: (n, S, L), CSR (n, G) and (n, 3).
    rows, trained
        Codes of the new and of the trained levels by role.
    """
    effects: Any = vae.label_effects
    loadings = effects.loadings.weight[1:].detach().double().cpu().numpy()  # (G, R)
    library = torch.from_numpy(np.asarray(counts.sum(axis=1), dtype=np.float32).reshape(-1, 1))
    for role, codes in rows.items():
        position, table = ROLES.index(role), effects.vectors[role].weight
        known = table.detach().double().cpu().numpy()[list(trained[role])] @ loadings.T  # (levels, G)
        spread = float(np.var(known, axis=0, ddof=1).mean()) if len(known) > 1 else 0.0
        for code in codes:
            index = np.flatnonzero(labels[:, position] == code)
            if not len(index):
                continue
            chosen = torch.from_numpy(index)
            mean = decode_means(vae, latents[chosen], library[chosen], torch.from_numpy(labels[index])).double()
            expected = mean.sum(0).numpy() + 0.5
            observed = np.asarray(counts[index].sum(axis=0), dtype=np.float64).ravel() + 0.5
            variance = 1 / expected + _inverse_theta(vae) / len(index)
            vector = np.linalg.lstsq(loadings, spread / (spread + variance) * np.log(observed / expected), rcond=1e-6)[
                0
            ]
            with torch.no_grad():
                table[code] += torch.from_numpy(vector).to(table)


def _inverse_theta(vae: VAE) -> NDArray[np.float64]:
    """Return 1 / theta of each gene; 0 where the head has no table of dispersions."""
    head: Any = vae.decoder_head
    if not (hasattr(head, "theta") or hasattr(head, "theta_embed")):
        return np.zeros(vae.n_genes)
    return 1 / head.dispersion().detach().double().cpu().numpy()
