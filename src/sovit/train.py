"""Train one cell: ``python -m sovit.train shape=384x12x1536 experiment=star_tiny trainer.max_steps=50``.

Hydra composes ``conf/``; ``--cfg job`` and ``--help`` work without importing torch. ``--rerun RUN_JSON runs_dir=DIR``
trains the cell of a record again: its configuration alone decides, ``conf/`` is not read. Exit codes: 0 done, 1 failed,
2 configuration, 3 diverged, 75 stopped by a signal (the same command goes on from there), 76 another process runs it,
77 out of device memory (the same command goes on with a smaller micro-batch), 78 its port was taken; 128 + n: one of
its processes was killed by signal n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sovit.config import CONF_DIR, ConfigError, RunConfig, check_overrides, compose
from sovit.launch import processes
from sovit.records import run_id
from sovit.strict import nearest

RERUN = "--rerun"
# Hydra's flags that show something, and those of them that a word follows. The others would load another configuration.
_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--shell-completion", "-sc", "--cfg", "-c")
_WITH_WORD = {"--cfg": ("job",), "-c": ("job",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cell that the arguments describe, or show what they ask for; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    processes.follow_parent()
    try:
        if RERUN in arguments:
            cfg = _recorded(arguments)
        elif "--shell-completion" in arguments or "-sc" in arguments:
            return _show(arguments)
        else:
            overrides = _overrides(arguments)
            check_overrides(overrides)
            cfg = compose(overrides)
            if len(overrides) < len(arguments):
                return _show(arguments)
        if devices := processes.wanted(cfg):
            return processes.start(arguments, devices=devices)
        from sovit.lit.engine import run  # torch, Lightning and timm load here
        from sovit.lit.progress import shown

        with shown(run_id(cfg)):
            return run(cfg, arguments)
    except ConfigError as error:
        print(f"sovit.train: {error}", file=sys.stderr)
        return 2


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments that are no flags. Raises ConfigError for a flag that would make a run another than it says."""
    overrides, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, word = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in ("-m", "--multirun"):
            raise ConfigError(
                "Hydra's multirun cannot resume; write the cells into a sweep file and use `sovit run FILE`."
            )
        elif flag not in _FLAGS:
            raise ConfigError(f"{flag} is not an option of sovit.train{nearest(flag, [*_FLAGS, RERUN])}")
        elif flag in _WITH_WORD:
            word = word if equals else rest.pop(0) if rest else ""
            if word not in _WITH_WORD[flag]:
                raise ConfigError(f"{flag} {word} is not known; write {flag} {_WITH_WORD[flag][0]}.")
    return overrides


def _recorded(arguments: Sequence[str]) -> RunConfig:
    """The configuration for ``--rerun RUN_JSON runs_dir=DIR``."""
    from sovit.launch.rerun import recorded_config

    if len(arguments) != 3 or arguments[0] != RERUN or not arguments[2].startswith("runs_dir="):
        raise ConfigError(f"write {RERUN} RUN_JSON runs_dir=DIR, and nothing else.")
    return recorded_config(Path(arguments[1]), runs_dir=arguments[2].partition("=")[2])


def _show(arguments: Sequence[str]) -> int:
    """Let Hydra answer --help, --cfg and the like."""
    import hydra

    sys.argv[1:] = arguments
    hydra.main(config_path=str(CONF_DIR), config_name="config", version_base=None)(lambda composed: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
