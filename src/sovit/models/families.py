"""The builder of each family of models (`sovit.families`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from sovit.models.mixer import build_mixer
from sovit.models.swin import build_swin
from sovit.models.vit import build_vit

BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"vit": build_vit, "mixer": build_mixer, "swin": build_swin}
