"""The text tower in a checkpoint of open_clip.

Nothing is downloaded, and nothing but tensors is read of a file; the image tower beside it is left there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sovit.language.contrastive import BIAS, LOG_SCALE
from sovit.language.external import INSTALL, ExternalTower, Reads, external_tower
from sovit.language.vocabulary import Vocabulary


def open_clip_tower(
    model: str | Path,
    checkpoint: str | Path,
    *,
    vocabulary: Vocabulary,
    embed_dim: int,
    locked: bool = False,
    log_scale: float = LOG_SCALE,
    bias: float | None = BIAS,
) -> ExternalTower:
    """The text tower of an open_clip checkpoint: ``model`` names its configuration, or is a JSON file with it.

    The checkpoint is a .safetensors, or a .pt that is read with weights_only; the image tower in it is left there. Towers
    that open_clip takes from transformers are read by `sovit.language.transformers_files`. Other arguments as there. Raises
    ValueError.
    """
    path = Path(checkpoint).expanduser()
    try:
        import open_clip
        from open_clip.model import CLIPTextCfg, _build_text_tower
    except ImportError:
        raise ValueError(f"{path} needs the package open_clip_torch; {INSTALL}.") from None
    config = _open_clip_config(open_clip, str(model))
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        raise ValueError(f"{model} takes its text tower from transformers; give the folder of {text['hf_model_name']}.")
    if text.get("embed_cls"):
        raise ValueError(f"{model} puts a token of its own behind the text, as CoCa does; that is not read here.")
    try:
        settings = CLIPTextCfg(**text)
        built: Any = _build_text_tower(config["embed_dim"], settings, quick_gelu=config.get("quick_gelu", False))
        built.load_state_dict(_text_part(_tensors(path)))
    except (TypeError, KeyError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold the text tower of {model}: {said}.") from None
    built.float()
    if built.pool_type not in ("argmax", "eos", "last"):
        raise ValueError(
            f"{model} takes {built.pool_type!r} of its tokens for the text; only its end or its last are read."
        )
    by_end = built.pool_type in ("argmax", "eos")
    built.pool_type = "eos" if by_end else built.pool_type  # argmax takes the end for the highest id
    built.eos_id = vocabulary.eos
    reads = Reads(
        built,
        built.output_dim if built.text_projection is not None else built.width,
        built.vocab_size,
        built.context_length,
        lambda module, tokens, _: module(tokens),
        begins=by_end,
        padding=built.pad_id,
        whole=True,
    )
    return external_tower(reads, path, vocabulary, embed_dim=embed_dim, locked=locked, log_scale=log_scale, bias=bias)


def _open_clip_config(open_clip: Any, model: str) -> dict[str, Any]:
    path = Path(model).expanduser()
    if path.suffix == ".json" or path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{model} is no JSON file of an open_clip model: {error}.") from None
        config = found.get("model_cfg", found) if isinstance(found, dict) else None
    elif model in open_clip.list_models():  # no name with a colon, which would be looked up elsewhere
        config = open_clip.get_model_config(model)
    else:
        raise ValueError(
            f"open_clip knows no model {model!r}; give a name it lists, or a JSON file with its configuration."
        )
    if not isinstance(config, dict) or not isinstance(config.get("text_cfg"), dict) or "embed_dim" not in config:
        raise ValueError(f"{model} is no configuration of open_clip: it has no embed_dim and text_cfg.")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; give the checkpoint's file.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    except Exception:  # whatever the first wrong byte leads to
        raise ValueError(
            f"{path} is no checkpoint that holds tensors only; give a .safetensors, or a .pt of weights."
        ) from None
    return content.get("state_dict", content) if isinstance(content, dict) else {}


def _text_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's tensors under the names that open_clip's text transformer has."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    inside = {name.removeprefix("text."): tensor for name, tensor in tensors.items() if name.startswith("text.")}
    if inside:
        return inside
    own = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(own)}
