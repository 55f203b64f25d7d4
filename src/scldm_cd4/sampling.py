"""Conditions to generated cells: work units, latents, counts.

A request becomes work units: plain data that say which replicates of which conditions are computed together. A unit can
be computed by any thread or process, in any order. Its cells do not depend on the other units, nor on their place in
the unit: noise is keyed by condition and replicate (`noise`), a unit goes through the networks in passes of a constant
number of rows (the last is padded), that number is a multiple of `ALIGN` so that no row falls into the tail of a
vectorised loop, and on a CPU each unit is computed by one thread, as the split of a loop over threads would depend on
their number.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from scldm_cd4._compile import compiled, compiler_error
from scldm_cd4._errors import DataError
from scldm_cd4._parallel import in_order, one_thread_each
from scldm_cd4._passes import ALIGN, Passes, pass_rows
from scldm_cd4._precision import choose
from scldm_cd4.conditions import Request
from scldm_cd4.config import ROLES
from scldm_cd4.data.matrix import MAX_TOTAL
from scldm_cd4.flow import SOLVERS, conditioned_on, guided, solve
from scldm_cd4.flow.guidance import EVERYWHERE, Guidance
from scldm_cd4.flow.path import Velocity
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.nn.likelihood import nb_quantile
from scldm_cd4.noise import BLOCK, count_uniforms, latent_normals, library_uniforms
from scldm_cd4.registry import Registry
from scldm_cd4.size_factors import SizeFactors

Output = Literal["counts", "mean", "lognorm", "latent"]
OUTPUTS = ("counts", "mean", "lognorm", "latent")
TARGET_SUM = 1e4
CPU_BATCH, GPU_BATCH = 128, 1024
"""Cells of a work unit."""
N_STEPS, CAREFUL_STEPS = 6, 10
"""Steps of the flow: for models trained here (docs/performance.md has the errors); and where none were measured, which
is for imported weights, or where cells are carried to noise and back, which shows smaller errors."""
CPU_DECODED = 16
"""Rows of a pass through the decoder on a CPU, at most: values of all genes are large and should stay in the caches."""


@dataclass(frozen=True)
class Sampling:
    """How cells are drawn."""

    seed: int
    output: Output = "counts"
    guidance: Guidance = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    solver: str = "midpoint"
    n_steps: int = N_STEPS
    precision: str = "fp32"
    batch_size: int = CPU_BATCH
    compile: bool = False
    """Compile the flow network; velocities differ by rounding."""

    @classmethod
    def resolve(
        cls,
        device: torch.device,
        *,
        seed: int,
        output: str = "counts",
        guidance: Guidance = 1.0,
        guidance_interval: tuple[float, float] = EVERYWHERE,
        solver: str | None = None,
        n_steps: int | None = None,
        precision: Any = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> "Sampling":
        """Fill in what is left open and check the rest; warns where nothing can be compiled.

        Raises
        ------
        DataError
            A value is not possible.
        """
        if output not in OUTPUTS:
            raise DataError(f"output must be one of {OUTPUTS}, got {output!r}")
        solver, n_steps = solver or cls.solver, cls.n_steps if n_steps is None else n_steps
        if solver not in SOLVERS:
            raise DataError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        if isinstance(n_steps, bool) or not isinstance(n_steps, int | np.integer) or n_steps < 1:
            raise DataError(f"n_steps must be a whole number of at least 1, got {n_steps!r}")
        name = choose(precision, device).name
        size = (GPU_BATCH if device.type == "cuda" else CPU_BATCH) if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise DataError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        rows = ALIGN * -(-int(size) // ALIGN)
        if compile and (error := compiler_error(device.type)) is not None:
            compile = False
            warnings.warn(f"nothing can be compiled here, cells are made without: {error}", UserWarning, stacklevel=4)
        return cls(int(seed), output, guidance, guidance_interval, solver, int(n_steps), name, rows, compile)  # type: ignore[arg-type]


def used_roles(dit: DiT, sampling: Sampling) -> frozenset[str]:
    """Return the roles on which the output depends at a guidance.

    Raises
    ------
    DataError
        The guidance is not possible for the network.
    """
    try:
        return conditioned_on(dit.config.label_dropout, sampling.guidance, sampling.guidance_interval)
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error


@dataclass(frozen=True)
class Segment:
    """Consecutive replicates of one condition, all of one block of noise."""

    labels: tuple[str | None, ...]
    block: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class WorkUnit:
    """Cells that are computed together; plain data, which any process can turn into cells."""

    first: int
    """Row of its first cell in the output."""
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def plan_units(requests: Iterable[Request], batch_size: int) -> Iterator[WorkUnit]:
    """Yield the work units of requests: their cells in order, `batch_size` to a unit."""
    first, held, segments = 0, 0, list[Segment]()
    for request in requests:
        done = 0
        while done < request.n_cells:
            block, start = divmod(request.first + done, BLOCK)
            n = min(request.n_cells - done, BLOCK - start, batch_size - held)
            segments.append(Segment(request.labels, block, start, start + n))
            done, held = done + n, held + n
            if held == batch_size:
                yield WorkUnit(first, tuple(segments))
                first, held, segments = first + held, 0, []
    if segments:
        yield WorkUnit(first, tuple(segments))


@dataclass(frozen=True)
class Drawn:
    """The cells of one unit."""

    values: Any
    """What the output asks: CSR float32 (counts, lognorm) or float32 array; (n, n_genes), or (n, S L) for latents."""
    library: NDArray[np.float64]


class Sampler:
    """Turns work units into cells.

    Parameters
    ----------
    vae, dit
        Trained networks in evaluation mode, on one device.
    registry
        Meaning of the labels, and library sizes.
    sampling
        How cells are drawn.
    noise_labels
        Labels that key the noise of a condition; by default its own. Conditions with equal ones share all noise.

    Raises
    ------
    DataError
        The guidance is not possible for the network.
    """

    def __init__(
        self,
        vae: VAE,
        dit: DiT,
        registry: Registry,
        sampling: Sampling,
        *,
        noise_labels: Callable[[tuple[str | None, ...]], tuple[str | None, ...]] = tuple,
    ) -> None:
        self.vae, self.dit, self.registry, self.sampling = vae, dit, registry, sampling
        self.noise_labels = noise_labels
        self.device = next(dit.parameters()).device
        rows = pass_rows(vae.config.latent_tokens, self.device, sampling.batch_size)
        self._passes = Passes(rows, self.device, choose(sampling.precision, self.device))
        self.used = used_roles(dit, sampling)
        self._network: Velocity = compiled(dit.forward) if sampling.compile else dit
        self.velocity = self.velocity_at(sampling.guidance, sampling.guidance_interval)
        self._code = [{level: i for i, level in enumerate(a.levels)} for a in registry.attributes]
        self._genes = torch.arange(1, vae.n_genes + 1, device=self.device)

    def velocity_at(self, guidance: Guidance, interval: tuple[float, float] = EVERYWHERE) -> Any:
        """Return the guided velocity of the network."""
        return guided(
            self._network,
            strategy=self.dit.config.label_dropout,
            guidance=guidance,
            unconditional=self.dit.unconditional,
            interval=interval,
        )

    def run(self, unit: WorkUnit, library: NDArray[np.float64] | None = None) -> Drawn:
        """Draw the cells of a unit; `library` (n,) replaces the drawn library sizes."""
        if library is None:
            library = np.concatenate([self._library(s) for s in unit.segments])
        noise = np.concatenate([self._noise(s) for s in unit.segments])
        codes = np.concatenate([np.tile(self.codes(s.labels), (len(s), 1)) for s in unit.segments])
        latent = self.flow(noise, codes)
        if self.sampling.output == "latent":
            return Drawn(latent.reshape(len(unit), -1), library)
        uniforms = None
        if self.sampling.output != "mean":
            uniforms = np.concatenate([self._uniforms(s) for s in unit.segments])
        return Drawn(self.express(latent, codes, library, uniforms), library)

    def codes(self, labels: Sequence[str | None]) -> NDArray[np.int64]:
        """Return the codes (3,) of labels; None gives that of a dropped label."""
        return np.array(
            [len(known) if x is None else known[x] for x, known in zip(labels, self._code, strict=True)], dtype=np.int64
        )

    def _noise(self, s: Segment) -> NDArray[np.float32]:
        shape = (self.vae.config.latent_tokens, self.vae.config.n_channels)
        width = shape[0] * shape[1]
        z = latent_normals(self.sampling.seed, self.noise_labels(s.labels), s.block, s.start, s.stop, width)
        return z.reshape(-1, *shape)

    def _library(self, s: Segment) -> NDArray[np.float64]:
        uniform = library_uniforms(self.sampling.seed, self.noise_labels(s.labels), s.block, s.start, s.stop)
        return size_factors_of(self.registry).sample(s.labels[0], s.labels[1], uniform, s.labels[2])

    def _uniforms(self, s: Segment) -> NDArray[np.float64]:
        labels = self.noise_labels(s.labels)
        return count_uniforms(self.sampling.seed, labels, s.block, s.start, s.stop, self.vae.n_genes)

    def flow(
        self, x: NDArray[np.float32], codes: NDArray[np.int64], *, reverse: bool = False, velocity: Any = None
    ) -> NDArray[np.float32]:
        """Carry states (n, S, L) of labels (n, 3) to the other end of the flow."""

        def carry(state: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            solver, n_steps = self.sampling.solver, self.sampling.n_steps
            field = velocity or self.velocity
            return solve(field, state, labels, solver=solver, n_steps=n_steps, reverse=reverse)

        return np.concatenate(list(self._passes(carry, x, codes)))

    def express(
        self,
        latent: NDArray[np.float32],
        codes: NDArray[np.int64],
        library: NDArray[np.float64],
        uniforms: NDArray[np.float64] | None,
    ) -> Any:
        """Decode latents (n, S, L) of labels (n, 3) at library sizes (n,): means, or counts at uniforms (n, G)."""

        def decode(
            z: torch.Tensor, labels: torch.Tensor, total: torch.Tensor, u: torch.Tensor | None = None
        ) -> torch.Tensor:
            mu, theta = self.vae.decode(z, self._genes, total.float()[:, None], labels)
            return mu.float() if u is None else nb_quantile(u, mu.double(), theta.double())

        inputs = [latent, codes, library, *(() if uniforms is None else (uniforms,))]
        parts = self._passes(decode, *inputs, at_most=CPU_DECODED if self.device.type == "cpu" else None)
        if uniforms is None:
            return np.concatenate(list(parts))
        counts = sparse.vstack([sparse.csr_matrix(part) for part in parts], format="csr")
        return lognormal(counts) if self.sampling.output == "lognorm" else counts


def size_factors_of(registry: Registry) -> SizeFactors:
    """Return the library sizes that a model knows.

    Raises
    ------
    DataError
        It knows none.
    """
    if registry.size_factors is None:
        raise DataError("the model has no library sizes; pass size_factors= to generate")
    return registry.size_factors


def lognormal(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log1p(1e4 counts / total) of every cell, float32; a cell without counts stays zero."""
    out = counts.astype(np.float64)
    total = np.asarray(out.sum(axis=1)).ravel()
    factor = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    out.data = np.log1p(out.data * np.repeat(factor, np.diff(out.indptr)))
    return out.astype(np.float32)


def resolve_library(registry: Registry, requests: Sequence[Request], size_factors: Any) -> NDArray[np.float64] | None:
    """Return the library size of every cell (n,), or None to draw them.

    Raises
    ------
    DataError
        Values are not above 0 and at most a million, or not one per cell.
    """
    if size_factors is None:
        size_factors_of(registry)
        return None
    numbers = [request.n_cells for request in requests]
    if isinstance(size_factors, str):
        if size_factors != "context":
            raise DataError(
                f"size_factors takes None, 'context', a number or one number per cell, got {size_factors!r}"
            )
        known = size_factors_of(registry)
        labels = (request.labels for request in requests)
        typical = [known.sample(d, t, np.array([0.5]), p)[0] for d, t, p in labels]
        return np.repeat(np.array(typical), numbers)
    return given_library(size_factors, sum(numbers))


def given_library(values: Any, n: int) -> NDArray[np.float64]:
    """Return one library size per cell (n,) from one number or n.

    Raises
    ------
    DataError
        Values are not above 0 and at most a million, or not one per cell.
    """
    try:
        library = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"size_factors takes numbers: {error}") from error
    if library.shape not in ((), (n,)):
        raise DataError(f"size_factors needs one number, or one for each of the {n} cells, got shape {library.shape}")
    if not ((library > 0).all() and (library <= MAX_TOTAL).all()):  # time to draw counts grows with them
        raise DataError(f"size_factors are counts per cell: above 0 and at most {MAX_TOTAL:,.0f}")
    return np.array(np.broadcast_to(library, (n,)))


def draw(
    sampler: Sampler, requests: Sequence[Request], library: NDArray[np.float64] | None, workers: int | None = None
) -> Generator[Drawn, None, None]:
    """Yield the cells of requests in order, unit by unit; close it to give torch its threads back."""

    def run(unit: WorkUnit) -> Drawn:
        rows = slice(unit.first, unit.first + len(unit))
        return sampler.run(unit, None if library is None else library[rows])

    with one_thread_each(sampler.device, workers) as n:
        yield from in_order(run, plan_units(requests, sampler.sampling.batch_size), n)


def role_columns(registry: Registry) -> dict[str, str]:
    """Return the user's column of each role that has one."""
    return {r: a.column for r, a in zip(ROLES, registry.attributes, strict=True) if a.column is not None}
