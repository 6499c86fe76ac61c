"""One segment of a run: the model, its module and the trainer, from a configuration."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger

from sovit import records, schedule
from sovit.config import RunConfig
from sovit.derived import model_options, num_hidden, num_outputs, shape_of
from sovit.families import TEXT
from sovit.lit import checkpoints
from sovit.lit.callbacks import Ema, Evaluate, Log, Resume, Watch
from sovit.lit.contrast import PAIR_LOSSES, LitTower
from sovit.lit.data import TrainData
from sovit.lit.evaluation import Evaluation
from sovit.lit.layout import Layout, on_gpu
from sovit.lit.locked import Locked, locked_of
from sovit.lit.loop import StepLoop
from sovit.lit.module import LOSSES, LitClassifier
from sovit.lit.pairs import PairData
from sovit.lit.peak import Peak, peak
from sovit.lit.progress import step_gflops
from sovit.lit.ranks import Ranks
from sovit.lit.strategy import make_strategy, spread
from sovit.lit.teacher import Teacher, teacher_of
from sovit.lit.towers import tower_of
from sovit.models.families import BUILDERS
from sovit.objectives import Distilled, Masked, Objective
from sovit.optim import build_optimizer


class Work(NamedTuple):
    """What the segments of a run share.

    ``growing`` is None but in the first process. The run would have begun at ``clock_zero`` had its processes left no
    gaps. ``check`` raises if the run is no longer this process's own. ``beside``: the trained model that the run needs
    beside its own, loaded and hashed once a process.
    """

    cfg: RunConfig
    plan: list[schedule.Segment]
    directory: Path
    growing: records.GrowingFiles | None
    loggers: list[Logger]
    clock_zero: float
    ranks: Ranks
    layout: Layout
    check: Callable[[], None]
    beside: Teacher | Locked | None = None


def fit(
    work: Work,
    index: int,
    begin: checkpoints.ResumePoint | None,
    evaluation: Evaluation,
    stop_requested: Callable[[], bool],
) -> int:
    """Train one segment from a resume point (None: the random initialisation); returns the steps this took."""
    cfg, ranks, segment = work.cfg, work.ranks, work.plan[index]
    pl.seed_everything(cfg.seed, verbose=False)
    module = build_module(cfg, segment, work.layout, ranks, work.beside)
    ema = Ema(cfg.eval.ema_horizon) if cfg.eval.weights == "ema" else None
    watch = Watch(segment, above=cfg.optim.diverged_above, scaled=cfg.trainer.precision == "16-mixed", ranks=ranks)
    callbacks = [
        *([ema] if ema else []),
        watch,
        Log(
            work.growing,
            every=cfg.trainer.log_every_n_steps,
            batch_size=cfg.trainer.global_batch_size,
            gflops=step_gflops(cfg),
            peak=device_peak(cfg) if work.growing is not None else None,
            done=schedule.steps_trained(work.plan[:index]) - segment.start,  # done + global_step counts all steps
            total=schedule.steps_trained(work.plan),
            clock_zero=work.clock_zero,
            ranks=ranks,
        ),
        Evaluate(segment, evaluation, ema, at_start=index == 0),
        Resume(
            work.growing,
            work.directory,
            work.plan,
            index,
            watch=watch,
            config_hash=records.config_hash(cfg),
            every_s=cfg.trainer.checkpoint_every_s,
            stop_requested=stop_requested,
            ranks=ranks,
        ),
    ]
    with warnings.catch_warnings():
        # The first two are meant: batches are rendered in this process, and a resume inside an epoch is exact here (the
        # position in the data is a function of the step). The third is between Lightning 2.6 and torch. The last are the
        # modules of a locked tower.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*You're resuming from a checkpoint that ended before the epoch ended.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # a machine with Slurm, not used here
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training.*")
        environment = TorchElasticEnvironment() if ranks.world > 1 else LightningEnvironment()
        trainer = pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=ranks.local_world,
            num_nodes=ranks.world // ranks.local_world,
            strategy=make_strategy(cfg.parallel.kind, ranks, work.check),
            # Lightning would load a float64 checkpoint into float32 weights first, and has no float64 for sharded ones.
            precision="32-true" if cfg.trainer.precision == "64-true" else cfg.trainer.precision,  # type: ignore[arg-type]
            max_steps=segment.stop,
            max_epochs=-1,
            callbacks=callbacks,
            logger=work.loggers or False,
            # Who is who is settled. A Slurm that Lightning detects would be asked again, and requeued behind our back.
            plugins=[checkpoints.CheckpointFiles(work.check), environment],
            default_root_dir=work.directory,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # not used: the Log callback decides
            use_distributed_sampler=False,
        )
        StepLoop(trainer)
        path = work.directory / begin.name if begin else None
        place = {"rank": ranks.rank, "world": ranks.world}
        data = (
            PairData(cfg, segment.stop, vocabulary=work.beside.vocabulary, **place)
            if isinstance(work.beside, Locked)
            else TrainData(cfg, segment.stop, **place)
        )
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer.global_step - (begin.step if begin else 0)


def device_peak(cfg: RunConfig) -> Peak:
    """What the utilisation of a run is a share of."""
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu(cfg) else torch.device("cpu")
    return peak(device, cfg.trainer.precision)


def beside_of(cfg: RunConfig) -> Teacher | Locked | None:
    """The trained model that a run needs beside its own: a teacher, or a locked image tower. Raises ConfigError."""
    return locked_of(cfg) or teacher_of(cfg)


def build_model(cfg: RunConfig, locked: Locked | None = None) -> torch.nn.Module:
    """The model a configuration asks for, freshly initialised from torch's global generator.

    A text tower needs to know what it is trained against; it is loaded if it is not given. Raises ConfigError.
    """
    if cfg.model.family == TEXT:
        locked = locked or locked_of(cfg)
        assert locked is not None
        return tower_of(cfg, locked.vocabulary, locked.embed_dim)
    return BUILDERS[cfg.model.family](
        shape_of(cfg),
        image_size=cfg.model.image_size,
        channels=cfg.model.channels,
        num_classes=num_outputs(cfg),
        pool=cfg.model.pool,
        **model_options(cfg),
        init=cfg.model.init,
        head_bias=cfg.model.head_bias,
        drop_path_rate=cfg.model.drop_path_rate,
    )


def build_module(
    cfg: RunConfig,
    segment: schedule.Segment,
    layout: Layout,
    ranks: Ranks,
    beside: Teacher | Locked | None = None,
) -> LitClassifier:
    """The LightningModule of a segment, with a fresh model; ``beside``: as of `Work`, loaded if it is not given."""
    beside = beside or beside_of(cfg)
    optim, parallel = cfg.optim, cfg.parallel
    drawn_elsewhere = parallel.kind == "fsdp" and not ranks.first
    with torch.device("meta") if drawn_elsewhere else contextlib.nullcontext():
        model = build_model(cfg, beside if isinstance(beside, Locked) else None)
    if cfg.trainer.precision == "64-true":
        model.double()
    optimizer = functools.partial(
        build_optimizer,
        name=optim.name,  # type: ignore[arg-type]
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        head_weight_decay=optim.head_weight_decay,
        lr_rule=optim.lr_rule,  # type: ignore[arg-type]
        base_width=optim.base_width,
        base_depth=optim.base_depth,
        base_mlp_dim=optim.base_mlp_dim,
        beta1=optim.beta1,
        beta2=optim.beta2,
    )

    def lr_scale(step: int) -> float:
        return schedule.learning_rate_scale(
            step,
            kind=cfg.schedule.kind,  # type: ignore[arg-type]
            total_steps=segment.total_steps,
            warmup_steps=cfg.schedule.warmup_steps,
            timescale=cfg.schedule.timescale,
            cooldown_steps=segment.cooldown_steps,
        )

    prepare = spread(
        kind=parallel.kind,
        checkpointing=layout.checkpointing,
        compiled=layout.compiled,
        precision=cfg.trainer.precision,
        shard=parallel.shard,
        ranks=ranks,
    )
    if isinstance(beside, Locked):
        return LitTower(
            model,
            locked=beside,
            loss=PAIR_LOSSES[optim.loss],
            optimizer=optimizer,
            lr_scale=lr_scale,
            clip_norm=optim.clip_norm,
            prepare=prepare,
            micro_batch=layout.micro_batch,
        )
    return LitClassifier(
        model,
        loss=LOSSES.get(optim.loss),
        objective=_objective(cfg, beside),
        optimizer=optimizer,
        lr_scale=lr_scale,
        clip_norm=optim.clip_norm,
        prepare=prepare,
        micro_batch=layout.micro_batch,
        noise_seed=cfg.seed if cfg.model.drop_path_rate else None,
    )


def _objective(cfg: RunConfig, teacher: Teacher | None) -> Objective | None:
    """What takes the place of a loss of labels, if anything does."""
    if cfg.optim.loss == "masked":
        return Masked(cfg.seed, num_hidden(cfg), shape_of(cfg).patch_size)
    return Distilled(teacher.model, cfg.optim.temperature, teacher.sha256) if teacher else None
