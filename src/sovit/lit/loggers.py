"""Where training metrics go beside the local files: to Weights & Biases, when it can be had."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from sovit import records
from sovit.config import RunConfig
from sovit.derived import model_geometry, shape_of
from sovit.flops import forward_gflops
from sovit.launch.wandb import run as wandb_run


class QuietWandb(Logger):
    """A W&B run that counts its rows, and falls silent after one line in the log if its service fails.

    A resumed cell makes again the rows since its resume point; their numbers tell W&B that it has them. Rows that are only
    in the local files (made offline, or lost with a killed process) are sent first.
    """

    def __init__(self, live: wandb_run.Live) -> None:
        super().__init__()
        self.live, self.failed = live, False
        rows = wandb_run.rows(live.directory)
        for number, row in enumerate(rows):
            self._log(number, row)
        self.num_rows = len(rows)

    @property
    def name(self) -> str:
        return self.live.directory.parent.name

    @property
    def version(self) -> str:
        return self.live.directory.name

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._log(self.num_rows, (step or 0, dict(metrics)))
        self.num_rows += 1

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run was started with its configuration."""

    def _log(self, number: int, row: wandb_run.Row) -> None:
        if self.failed:
            return
        try:
            self.live.log(number, row)
        except Exception as error:  # whatever it is, it must not end the run
            self.failed = True
            print(f"W&B stopped taking metrics ({type(error).__name__}: {error}); the local records go on.")


def make_loggers(cfg: RunConfig, directory: Path) -> list[Logger]:
    """A W&B run, unless it is switched off or cannot be had (one warning line, never an error)."""
    loggers: list[Logger] = []
    if cfg.logger.name == "wandb" and os.environ.get("WANDB_MODE") != "disabled":
        try:
            live = _start(cfg, directory)
        except Exception as error:  # W&B must never stop a run, whatever it raises
            print(f"W&B could not start ({type(error).__name__}: {error}); the local records go on.")
        else:
            loggers += [QuietWandb(live)] if live is not None else []
    return loggers


def _start(cfg: RunConfig, directory: Path) -> wandb_run.Live | None:
    """Continue or begin the cell's run at W&B; None if it cannot be had, which is no reason not to train."""
    shape = shape_of(cfg)
    agent = "WANDB_SWEEP_ID" in os.environ
    default = wandb_run.Identity(
        f"{records.run_id(cfg)}-{records.config_hash(cfg)}", cfg.logger.entity, cfg.logger.project
    )
    identity = wandb_run.identify(directory, default)
    told = wandb_run.about(
        records.run_id(cfg), shape, forward_gflops(shape, **model_geometry(cfg)), dataclasses.asdict(cfg)
    )
    mode = _mode(cfg, agent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # wandb's own deprecations are not the user's business
            live = wandb_run.start(identity, told, directory, mode=mode, timeout=cfg.logger.init_timeout_s)
    except ImportError:
        print("W&B is not installed; the local records are written all the same.")
        return None
    except Exception as error:
        print(
            f"W&B could not start {mode} ({type(error).__name__}: {wandb_run.reason(error)}); the local records go on, and "
            f"`sovit wandb push {directory.parent}` sends them."
        )
        return None
    if mode == "online":  # names that the server has filled in, for whoever continues or sends this run
        wandb_run.note(directory, replace(identity, entity=live.run.entity, project=live.run.project))
    return live


def _mode(cfg: RunConfig, under_agent: bool) -> str:
    """Online when logged in, else offline. WANDB_MODE=offline is a machine's wish and stands above the configuration."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun") or cfg.logger.mode == "offline":
        return "offline"
    wanted = cfg.logger.mode == "online" or mode == "online" or under_agent or wandb_run.logged_in()
    return "online" if wanted else "offline"


def finish(loggers: list[Logger], exit_code: int) -> None:
    """Close the W&B run, if there is one, with the exit code the process is about to end with. Bounded; never raises."""
    for logger in loggers:
        if isinstance(logger, QuietWandb):
            try:
                logger.live.close(exit_code)
            except Exception as error:  # as above
                sweep = logger.live.directory.parent
                print(
                    f"W&B does not have everything of this run ({type(error).__name__}: {wandb_run.reason(error)}); the "
                    f"local records are complete, and `sovit wandb push {sweep}` sends the rest."
                )
