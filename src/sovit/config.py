"""The configuration: the way from Hydra's YAML to checked plain values.

`compose` runs Hydra over ``conf/``; `resolve` checks names and types against the dataclasses of `sovit.schema`, and what
types cannot exclude by `sovit.requirements`, and returns them filled in. Nobody else in the package sees OmegaConf.
Importing this module loads no torch.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sovit.overrides import check_input, groups_of
from sovit.requirements import check
from sovit.schema import RunConfig
from sovit.strict import ConfigError, build, keys_of

REPOSITORY = Path(__file__).resolve().parents[2]
CONF_DIR = REPOSITORY / "conf"


def schema_keys() -> list[str]:
    """Every dotted key of the schema, inner nodes included."""
    return list(keys_of(RunConfig))


def config_groups() -> dict[str, list[str]]:
    """Config groups of ``conf/`` and their options, for example {"experiment": ["star_tiny", ...]}."""
    return groups_of(CONF_DIR)


def check_overrides(overrides: Sequence[str], *, once: bool = True) -> None:
    """Raise ConfigError for an override, or a file it leads to, with a wrong key or option; names the nearest valid one.

    ``once``: refuse a key given two values, as on a command line; otherwise the last of them counts.
    """
    check_input(overrides, CONF_DIR, RunConfig, once=once)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose ``conf/config.yaml`` with Hydra overrides, the last of a key. Raises ConfigError with one sentence."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_overrides(overrides, once=False)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base=None):
            return resolve(hydra_compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_sentence(error)) from None


def resolve(composed: Any) -> RunConfig:
    """Check a composed DictConfig against the schema and return plain dataclasses. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for key in sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{key} has no value; give {key}=...")
        container = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_sentence(error)) from None
    return from_mapping(typing.cast(dict[str, Any], container))


def from_mapping(content: Mapping[str, Any]) -> RunConfig:
    """A checked configuration from plain values, such as the ``config`` of a run.json. Raises ConfigError."""
    cfg = build(RunConfig, content)
    check(cfg)
    return cfg


def one_sentence(error: Exception) -> str:
    """OmegaConf's and Hydra's multi-line messages as one sentence that names the key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
    return (f"{key}: " if key and key not in text else "") + text.rstrip(".") + "."
