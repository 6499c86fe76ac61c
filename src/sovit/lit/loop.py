"""Lightning's loop over batches without what a run here does not use, which costs a tiny model a tenth of its step.

Left out: validation, schedulers, Lightning's own metrics and profiler, the look at ``training_step``'s signature at every
step, and a broadcast at every step that tells all processes of a SIGTERM and waits for the GPU; `callbacks.Resume` tells
them without waiting. Batches, hooks and counters are those of `_TrainingEpochLoop` of Lightning 2.6, so its checkpoints
are too.
"""

from __future__ import annotations

import os
import time
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepLoop(_TrainingEpochLoop):
    """One batch a step, manual optimisation, and the hooks around a batch, for which every callback is asked once."""

    def __init__(self, trainer: pl.Trainer) -> None:
        given = trainer.fit_loop.epoch_loop
        super().__init__(trainer, min_steps=given.min_steps, max_steps=given.max_steps)
        trainer.fit_loop.epoch_loop = self
        self.waited = 0.0  # seconds for batches, by the clock of this process
        if trainer.strategy.root_device.type == "cpu":
            # Lightning has torch ask NVIDIA's library for GPUs, opened each time, and Adam asks at every step.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

    @property
    def global_step(self) -> int:
        return self.manual_optimization.optim_step_progress.total.completed

    def advance(self, data_fetcher: Any) -> None:
        trainer: Any = self.trainer
        progress = self.batch_progress
        module, strategy = trainer.lightning_module, trainer.strategy
        began = time.perf_counter()
        batch, _, _ = next(data_fetcher)
        self.waited += time.perf_counter() - began
        index = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        if strategy.root_device.type != "cpu":
            batch = move_data_to_device(batch, strategy.root_device)
        batch = trainer.datamodule.on_after_batch_transfer(batch, 0)
        progress.increment_ready()
        for callback in trainer.callbacks:
            callback.on_train_batch_start(trainer, module, batch, index)
        progress.increment_started()
        self.manual_optimization.on_run_start()
        output = strategy.training_step(batch, index)
        self.manual_optimization.on_run_end()
        progress.increment_processed()
        for callback in trainer.callbacks:
            callback.on_train_batch_end(trainer, module, output, batch, index)
        progress.increment_completed()

    def on_advance_end(self, data_fetcher: Any) -> None:
        self._batches_that_stepped += 1
