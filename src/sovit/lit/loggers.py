"""Where training metrics go: always a local JSON-lines file, and Weights & Biases beside it when it can be had."""

from __future__ import annotations

import dataclasses
import netrc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

from sovit import records
from sovit.config import RunConfig, model_geometry, shape_of
from sovit.flops import forward_gflops

FINISH_TIMEOUT_S = 60  # how long a finished cell waits for its upload; what is left over is in the offline files


class MetricsFile(Logger):
    """Appends every metric to ``metrics.jsonl`` as it comes. (Lightning's CSVLogger deletes its file on a resume.)"""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    @property
    def name(self) -> str:
        return self._directory.parent.name

    @property
    def version(self) -> str:
        return self._directory.name

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # What hangs on the clock is not written, so that two runs of one cell leave the same file.
        kept = {key: value for key, value in metrics.items() if not key.startswith("perf/")}
        records.append_lines(self._directory / records.METRICS, [{"step": step, **kept}])

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration stands in run.json."""


class QuietWandb(WandbLogger):
    """W&B that falls silent, after one line in the log, if its service fails in the middle of a run."""

    failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.failed:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # whatever it is, it must not end the run
            self.failed = True
            print(f"W&B stopped taking metrics ({type(error).__name__}: {error}); the local records go on.")


def make_loggers(cfg: RunConfig, directory: Path) -> list[Logger]:
    """The metrics file, and a W&B run unless it is switched off or cannot be had (one warning line, never an error)."""
    loggers: list[Logger] = [MetricsFile(directory)]
    if cfg.logger.name == "wandb":
        run = _wandb_run(cfg, directory)
        if run is not None:
            loggers.append(QuietWandb(experiment=run))
    return loggers


def _wandb_run(cfg: RunConfig, directory: Path) -> Any:
    try:
        import wandb
    except ImportError:
        print("W&B is not installed; the local records are written all the same.")
        return None
    shape = shape_of(cfg)
    config = {
        **shape.as_dict(),
        "shape": str(shape),
        "seed": cfg.seed,
        "forward_gflops": forward_gflops(shape, **model_geometry(cfg)),
        "cfg": dataclasses.asdict(cfg),  # under one key: a sweep locks the keys it sets itself
    }
    under_agent = "WANDB_SWEEP_ID" in os.environ  # an agent has chosen the id
    online = cfg.logger.mode == "online" or (cfg.logger.mode == "auto" and (under_agent or logged_in()))
    for mode in ("online", "offline") if online else ("offline",):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # wandb's own deprecations are not the user's business
                run = wandb.init(
                    project=cfg.logger.project,
                    entity=cfg.logger.entity,
                    id=None if under_agent else f"{records.run_id(cfg)}-{records.config_hash(cfg)}",
                    name=records.run_id(cfg),
                    group=cfg.name,
                    tags=[cfg.name, f"seed{cfg.seed}"],
                    config=config,
                    dir=directory,
                    mode=mode,
                    resume="allow",
                    settings=wandb.Settings(
                        init_timeout=cfg.logger.init_timeout_s,
                        finish_timeout=FINISH_TIMEOUT_S,
                        finish_timeout_raises=False,
                        console="off",
                        silent=True,
                        x_disable_stats=True,
                    ),
                )
            run.define_metric("t_gflops")
            run.define_metric("eval/*", step_metric="t_gflops")
            return run
        except Exception as error:  # W&B must never stop a run, whatever it raises
            print(f"W&B could not start {mode} ({type(error).__name__}: {error}); the local records go on.")
    return None


def logged_in() -> bool:
    """Whether W&B has an API key, looked up the way its client does but without ever prompting."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def finish(loggers: list[Logger], exit_code: int) -> None:
    """Close the W&B run, if there is one, with the exit code the process is about to end with."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            try:
                logger.experiment.finish(exit_code=exit_code)
            except Exception as error:  # as above
                print(f"W&B could not finish ({type(error).__name__}: {error}); the local records are complete.")
