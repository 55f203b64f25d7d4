"""What a training step is, as Lightning modules: one plan for the autoencoder, one for the flow."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scldm_cd4._compile import compiled
from scldm_cd4.config import StageConfig
from scldm_cd4.flow import drop_labels, flow_loss, interpolate, pair
from scldm_cd4.nn import VAE, DiT
from scldm_cd4.train.ema import EMA
from scldm_cd4.train.latents import encoder_input
from scldm_cd4.train.loaders import Batch
from scldm_cd4.train.rng import key_seed, keyed_generator
from scldm_cd4.train.schedules import wsd_schedule

RELEASED_EMA_START = 10_000
MAX_PANEL_RATIO = 16
"""The panel over the genes decoded per step, at the most: fewer counts than that tell little of a cell."""


class Mean:
    """Running mean of values that stay on their device."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.n = 0

    def add(self, value: Tensor, n: int) -> None:
        """Add the mean over `n` cells."""
        self.total = self.total + value * n
        self.n += n

    def take(self) -> tuple[float, int]:
        """Return total and number, and start anew; waits for the device."""
        out = float(self.total), self.n
        self.total, self.n = 0.0, 0
        return out


class StagePlan(pl.LightningModule):
    """What both stages share: optimiser, schedule, running losses, and draws keyed by seed, epoch and batch.

    Parameters
    ----------
    config
        Learning rate and the like.
    seed
        Seed of all draws.
    """

    def __init__(self, config: StageConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.train_loss, self.validation_loss = Mean(), Mean()

    @property
    def network(self) -> nn.Module:
        """The network in training."""
        raise NotImplementedError

    def compile_step(self) -> None:
        """Compile the pass through the network that training steps make, for the shapes that come."""
        raise NotImplementedError

    def step_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss to minimise and loss to report, both means over the cells of the batch."""
        raise NotImplementedError

    def held_out_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Loss to report for cells that were not trained on."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimiser."""
        return [{"params": [p for p in self.network.parameters() if p.requires_grad]}]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, weighted so that the mean over processes is the mean over all cells."""
        keys, n = (self.current_epoch, batch_idx), n_cells(batch)
        torch.manual_seed(
            key_seed(self.seed, 0, *keys, self.global_rank)
        )  # dropout layers; the caller's generator is put back afterwards
        loss, reported = self.step_loss(batch, keyed_generator(self.seed, 1, *keys, 0, device=self.device))
        self.train_loss.add(reported.detach(), n)
        weight = n * self.trainer.world_size / batch["n_total"] if "n_total" in batch else 1.0
        return loss if weight == 1.0 else loss * weight

    def own(self, batch: Batch) -> tuple[int, slice]:
        """Return the cells of a batch in all processes, for which numbers are drawn, and those of this process."""
        n = n_cells(batch)
        if "n_total" not in batch:
            return n, slice(None)
        first = batch["n_total"] * self.global_rank // self.trainer.world_size
        return batch["n_total"], slice(first, first + n)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the loss of one batch, with the same draws in every epoch."""
        generator = keyed_generator(self.seed, 2, batch_idx, device=self.device)
        self.validation_loss.add(self.held_out_loss(batch, generator), n_cells(batch))

    def configure_optimizers(self) -> Any:
        """AdamW, fused where torch has it, with warm-up and cosine decay per step."""
        c, n_steps = self.config, int(self.trainer.estimated_stepping_batches)
        options: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        if self.device.type in ("cpu", "cuda") and "fused" in inspect.signature(torch.optim.AdamW).parameters:
            options["fused"] = True
        optimizer = torch.optim.AdamW(self.parameter_groups(), **options)

        def factor(step: int) -> float:
            return wsd_schedule(step, n_steps=n_steps, n_warmup=int(c.warmup * n_steps), final_factor=c.final_lr)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients; Lightning refuses to with a fused optimiser under autocast, also in bf16."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # fp16, where its reason holds
        if scaled or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val
            )

    def snapshot(self) -> dict[str, Any]:
        """Return copies of all that a return to this moment needs."""
        return {"network": {k: v.detach().to("cpu", copy=True) for k, v in self.network.state_dict().items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `snapshot`."""
        self.network.load_state_dict(state["network"])

    def begin(self) -> None:
        """Forget an earlier run."""
        self.train_loss, self.validation_loss = Mean(), Mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running loss of an unfinished epoch, of all processes."""
        total, n = torch.as_tensor(self.train_loss.total), self.train_loss.n
        if self.trainer.world_size > 1:
            both = torch.stack([total.double().to(self.device), torch.tensor(float(n), device=self.device).double()])
            both = self.trainer.strategy.reduce(both, reduce_op="sum")
            total, n = both[0], round(float(both[1]))
        checkpoint["train_loss"] = (total, n)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the running loss, in the first process."""
        if self.global_rank == 0:
            total, self.train_loss.n = checkpoint["train_loss"]
            self.train_loss.total = total.to(self.device)


def n_cells(batch: Batch) -> int:
    """Cells of a batch."""
    return len(next(iter(batch.values())))


class VAEPlan(StagePlan):
    """Training of the autoencoder: negative log-likelihood of the counts, summed over genes.

    With `StageConfig.genes_per_step`, each step decodes that many random genes of the panel; softmax and library are
    those of the subset. Losses are reported per cell for the whole panel (times genes / subset).

    Parameters
    ----------
    vae
        The network.
    """

    def __init__(self, vae: VAE, config: StageConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.vae = vae
        self._decode: Callable[..., tuple[Tensor, Tensor]] = vae.decode

    def compile_step(self) -> None:
        """Compile the decoder; the encoder's input changes its width from batch to batch."""
        self._decode = compiled(self.vae.decode)

    @property
    def network(self) -> nn.Module:
        """The autoencoder."""
        return self.vae

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters; with a `StageConfig.theta_lr` the dispersions apart, without weight decay."""
        if self.config.theta_lr == 1.0:
            return super().parameter_groups()
        head = self.vae.decoder_head
        tables = [table.weight for name in ("theta", "theta_embed") if (table := getattr(head, name, None)) is not None]
        special = {id(p) for p in tables}
        rest = [p for p in self.vae.parameters() if p.requires_grad and id(p) not in special]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if tables:
            groups.append({"params": tables, "lr": self.config.lr * self.config.theta_lr, "weight_decay": 0.0})
        return groups

    def step_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss of a random subset of the genes, and the same scaled to the panel."""
        target, n_genes = batch["target"], self.vae.n_genes
        width = n_genes
        if self.config.genes_per_step is not None:
            width = min(max(self.config.genes_per_step, n_genes // MAX_PANEL_RATIO), n_genes)
        genes = torch.arange(n_genes, device=target.device)
        if width < n_genes:
            genes = torch.randperm(n_genes, generator=generator, device=generator.device)[:width]
            target = target[:, genes]
        divergence: Tensor | float = 0.0
        if self.vae.config.kl_weight > 0:
            mean, log_variance = self.vae.posterior(*encoder_input(self.vae, batch))
            n, own = self.own(batch)
            noise = torch.randn((n, *mean.shape[1:]), generator=generator, device=mean.device, dtype=mean.dtype)[own]
            z = mean + noise * (0.5 * log_variance).exp()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2)).mean()
            divergence = self.vae.config.kl_weight * kl * (width / n_genes)
        else:
            z = self.vae.encode(*encoder_input(self.vae, batch))
        loss = self._nll(self._decode, z, genes, target) + divergence
        return loss, loss * (n_genes / width)

    def held_out_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of all genes from the (mean) latent."""
        target = batch["target"]
        z = self.vae.encode(*encoder_input(self.vae, batch))
        return self._nll(self.vae.decode, z, torch.arange(self.vae.n_genes, device=target.device), target)

    def _nll(self, decode: Callable[..., tuple[Tensor, Tensor]], z: Tensor, genes: Tensor, target: Tensor) -> Tensor:
        mu, theta = decode(z, genes + 1, target.sum(1, keepdim=True))
        return -self.vae.log_prob(target, mu, theta.float()).sum(1).mean()


class FlowPlan(StagePlan):
    """Training of the flow on cached latents: squared error of the velocity on the linear path.

    The averaged weights are those that are validated and generate.

    Parameters
    ----------
    dit
        The network.
    """

    def __init__(self, dit: DiT, config: StageConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.dit = dit
        self._velocity: Callable[..., Tensor] = dit.forward
        self._unconditional = dit.unconditional
        self.begin()

    def compile_step(self) -> None:
        """Compile the whole network."""
        self._velocity = compiled(self.dit.forward)

    @property
    def network(self) -> nn.Module:
        """The diffusion transformer."""
        return self.dit

    def begin(self) -> None:
        """Forget an earlier run."""
        super().begin()
        self.ema: EMA | None = None
        self._ema_state: dict[str, Any] | None = None

    def on_fit_start(self) -> None:
        """Start the average once the length of the run is known."""
        if self.ema is None:
            c = self.config
            after = ema_start(c, int(self.trainer.estimated_stepping_batches))
            self.ema = EMA(self.dit, decay=c.ema_decay, every=c.ema_every, after=after)
            if self._ema_state is not None:
                self.ema.load_state_dict(self._ema_state)
        self.ema.to(self.device)
        self._unconditional = self.dit.unconditional  # made once: a copy to the device would wait for it

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then take the new weights into the average."""
        super().optimizer_step(*args, **kwargs)
        assert self.ema is not None
        self.ema.update(self.dit)

    def step_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss at random times and noise, some labels dropped."""
        flow = self.dit.config
        x0, t = self._draw(batch, generator)
        x0 = pair(x0, batch["latent"], batch["labels"], flow.coupling)
        n, own = self.own(batch)
        labels = batch["labels"].new_zeros((n, 3))
        labels[own] = batch["labels"]
        labels = drop_labels(
            labels, self._unconditional, strategy=flow.label_dropout, p=flow.p_drop, generator=generator
        )[own]
        x_t, u = interpolate(x0, batch["latent"], t)
        loss = flow_loss(self._velocity(x_t, t, labels), u).mean()
        return loss, loss

    def held_out_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Loss of the averaged weights with all labels."""
        assert self.ema is not None
        x0, t = self._draw(batch, generator)
        x_t, u = interpolate(x0, batch["latent"], t)
        return flow_loss(functional_call(self.dit, self.ema.values, (x_t, t, batch["labels"])), u).mean()

    def _draw(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x1 = batch["latent"]
        n, own = self.own(batch)
        x0 = torch.randn((n, *x1.shape[1:]), generator=generator, device=x1.device)
        return x0[own], torch.rand(n, generator=generator, device=x1.device)[own]

    def snapshot(self) -> dict[str, Any]:
        """Weights and their average."""
        assert self.ema is not None
        state = self.ema.state_dict()
        state["values"] = {k: v.to("cpu", copy=True) for k, v in state["values"].items()}
        return super().snapshot() | {"ema": state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `snapshot`."""
        super().restore(state)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average."""
        super().on_save_checkpoint(checkpoint)
        assert self.ema is not None
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the average for the start."""
        super().on_load_checkpoint(checkpoint)
        self._ema_state = checkpoint["ema"]


def ema_start(config: StageConfig, n_steps: int) -> int:
    """Step up to which the average copies: 10 % of the run, at most 10,000; always 10,000 with the released decay."""
    released = config.ema_decay >= 0.9999 and config.ema_every >= 10
    return RELEASED_EMA_START if released else min(RELEASED_EMA_START, n_steps // 10)
