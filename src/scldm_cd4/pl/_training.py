"""How a training went."""

from pathlib import Path
from typing import Any

import numpy as np

from scldm_cd4._errors import DataError
from scldm_cd4.pl._figure import COLOURS, GREY, INK, finish, new_figure, open_sides

STAGES = {"vae": ("autoencoder", "negative log-likelihood per cell (nats)"), "flow": ("flow", "squared error")}
LINES = {"train_loss": ("training", COLOURS[0]), "validation_loss": ("validation", COLOURS[1])}
NO_SIGNAL = ("mean_profile_nll", "mean profile (no latent)")


def training_history(model: Any, *, title: str = "", save: str | Path | None = None) -> Any:
    """Draw the losses of both stages by epoch, with the epoch whose weights were kept.

    Parameters
    ----------
    model
        A trained `scldm_cd4.CD4Model`, or its ``history_``: tables by stage (``vae``, ``flow``) with ``train_loss`` and
        ``validation_loss`` by epoch.
    title
        Of the figure.
    save
        File to write the figure to.

    Returns
    -------
    The Figure, one panel per stage. The losses are those of the stage, so the panels have axes of their own. The dotted
    line of the autoencoder is the loss of a decoder that gives every cell the mean profile: above it nothing was
    learned. The flow's loss cannot reach 0, as noise and data are drawn independently.

    Raises
    ------
    DataError
        There is no history, or the file cannot be written.

    Examples
    --------
    >>> figure = pl.training_history(model, title="SIMULATED")
    >>> [ax.get_xlabel() for ax in figure.axes]
    ['epoch', 'epoch']
    """
    history = getattr(model, "history_", model)
    stages = [name for name in STAGES if name in history and len(history[name])]
    if not stages:
        raise DataError("there is no history: the model was not trained here, or was imported")
    figure = new_figure((4.8 * len(stages), 3.4))
    for ax, name in zip(figure.subplots(1, len(stages), squeeze=False).ravel(), stages, strict=True):
        _draw(ax, history[name], *STAGES[name])
    if title:
        figure.suptitle(title)
    return finish(figure, save)


def _draw(ax: Any, table: Any, title: str, ylabel: str) -> None:
    epochs = table.index.to_numpy() + 1
    shown = []
    for column, (name, colour) in LINES.items():
        if column not in table or table[column].isna().all():
            continue
        known = table[column].notna().to_numpy()
        values = table[column].to_numpy(dtype=np.float64)[known]
        mark = "o" if len(values) < 30 else None
        ax.plot(epochs[known], values, color=colour, marker=mark, ms=3, lw=1.5, label=name)
        shown.append(values)
        if column == "validation_loss":
            best = int(np.argmin(values))
            label = f"lowest: {values[best]:.4g}, epoch {epochs[known][best]}"
            ax.plot(epochs[known][best], values[best], "o", ms=9, mfc="none", mec=INK, mew=1.2, ls="", label=label)
    column, name = NO_SIGNAL
    if column in table and table[column].notna().any():
        level = float(table[column].dropna().iloc[-1])
        ax.axhline(level, color=GREY, lw=1.0, ls=":", label=name)
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    open_sides(ax)
    ax.legend(frameon=False, fontsize=8)
