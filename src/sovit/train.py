"""Train one cell: ``python -m sovit.train shape=384x12x1536 experiment=star_tiny trainer.max_steps=50``.

Hydra composes ``conf/``; ``--cfg job`` and ``--help`` work without importing torch. Exit codes: 0 done, 1 failed,
2 configuration, 3 diverged, 75 stopped by a signal (the same command goes on from there), 76 another process runs it.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from sovit.config import CONF_DIR, ConfigError, check_overrides, resolve


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base=None)
def _main(composed: DictConfig) -> None:
    try:
        cfg = resolve(composed)
        from sovit.lit.engine import run  # torch, Lightning and timm load here

        code = run(cfg)
    except ConfigError as error:
        _refuse(error)
    sys.exit(code)


def _refuse(error: ConfigError) -> None:
    print(f"sovit.train: {error}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        _refuse(
            ConfigError("Hydra's multirun cannot resume; write the cells into a sweep file and use `sovit run FILE`.")
        )
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        try:
            check_overrides(sys.argv[1:])
        except ConfigError as error:
            _refuse(error)
    _main()


if __name__ == "__main__":
    main()
