"""Text towers in folders that transformers saved: CLIP, SigLIP, BERT, T5.

Nothing is downloaded and no code of a folder is run: the library's own classes, with safetensors. A model whose weights are
not all there is refused, where the library would draw them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sovit.language.contrastive import BIAS, LOG_SCALE
from sovit.language.external import INSTALL, ExternalTower, Reads, external_tower
from sovit.language.tower import at_end, mean_of
from sovit.language.vocabulary import Vocabulary, load


def transformers_tower(
    folder: str | Path,
    *,
    embed_dim: int,
    locked: bool = False,
    vocabulary: Vocabulary | None = None,
    log_scale: float = LOG_SCALE,
    bias: float | None = BIAS,
) -> ExternalTower:
    """The text tower in a folder that transformers' ``save_pretrained`` wrote, of CLIP, SigLIP, BERT or T5.

    CLIP's text is its end, projected if the folder holds the projection; SigLIP's is its last token, projected; BERT's the
    token before the text; T5's the mean of the encoder's tokens. ``vocabulary`` None: the folder's tokenizer.json.
    ``log_scale`` and ``bias`` begin the loss, as in `sovit.language.tower.build_tower`. Dropout is off. The projection is
    drawn from torch's generator. Raises ValueError for what is not there, not whole or of another kind.
    """
    folder = Path(folder).expanduser()
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{folder} needs the package transformers; {INSTALL}.") from None
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} has no config.json of transformers; give a folder that save_pretrained wrote."
        ) from None
    if kind not in _READERS:
        raise ValueError(f"{folder} holds a model of type {kind!r}; text towers are read of {', '.join(_READERS)}.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors; save the model anew with safe_serialization.")
    # its bar and its report of what was not needed
    loud, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        reads = _READERS[kind](transformers, folder)
    finally:
        transformers.logging.set_verbosity(loud)
        if bar:
            transformers.logging.enable_progress_bar()
    return external_tower(
        reads, folder, vocabulary or load(folder), embed_dim=embed_dim, locked=locked, log_scale=log_scale, bias=bias
    )


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers with every weight from the folder, float32, without dropout. Raises ValueError."""
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        config = config.get_text_config() if hasattr(config, "text_config") else config
        for name in vars(config):
            if "dropout" in name and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)  # a resumed run would draw other noise
        model, report = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the library raises many kinds, of its own and of others
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of its text tower, the first {missing[0]}.")
    return model


def _clip(transformers: Any, folder: Path) -> Reads:
    # By hand, because the library takes the end of a text for its highest id where a configuration says eos_token_id=2.
    try:
        model = _loaded(transformers.CLIPTextModelWithProjection, folder)
    except ValueError as error:
        if "text_projection" not in str(error):
            raise
        model = _loaded(transformers.CLIPTextModel, folder)
        width, pooled = model.config.hidden_size, _clip_end
    else:
        width, pooled = model.config.projection_dim, _clip_projected
    return Reads(model, width, model.config.vocab_size, model.config.max_position_embeddings, pooled, begins=True)


def _clip_end(model: Any, tokens: Tensor, inside: Tensor) -> Tensor:
    return at_end(model(tokens).last_hidden_state, inside)


def _clip_projected(model: Any, tokens: Tensor, inside: Tensor) -> Tensor:
    return model.text_projection(_clip_end(model.text_model, tokens, inside))


def _siglip(transformers: Any, folder: Path) -> Reads:
    model = _loaded(transformers.SiglipTextModel, folder)
    config = model.config
    most, padding = config.max_position_embeddings, config.pad_token_id
    width = config.projection_size
    return Reads(model, width, config.vocab_size, most, _siglip_text, padding=padding, whole=True)


def _siglip_text(model: Any, tokens: Tensor, inside: Tensor) -> Tensor:
    return model(tokens).pooler_output


def _bert(transformers: Any, folder: Path) -> Reads:
    model = _loaded(transformers.BertModel, folder, add_pooling_layer=False)
    config = model.config
    return Reads(
        model, config.hidden_size, config.vocab_size, config.max_position_embeddings, _bert_text, begins=True,
        padding=config.pad_token_id or 0,
    )  # fmt: skip


def _bert_text(model: Any, tokens: Tensor, inside: Tensor) -> Tensor:
    return model(tokens, attention_mask=inside.long()).last_hidden_state[:, 0]


def _t5(transformers: Any, folder: Path) -> Reads:
    model = _loaded(transformers.T5EncoderModel, folder)
    config = model.config
    # Its positions are relative: any length will do, and this is what it was trained on.
    most = getattr(config, "n_positions", 512)
    return Reads(model, config.d_model, config.vocab_size, most, _t5_text, padding=config.pad_token_id or 0)


def _t5_text(model: Any, tokens: Tensor, inside: Tensor) -> Tensor:
    return mean_of(model(tokens, attention_mask=inside.long()).last_hidden_state, inside)


_READERS: dict[str, Callable[[Any, Path], Reads]] = {
    "clip": _clip,
    "clip_text_model": _clip,
    "siglip": _siglip,
    "siglip_text_model": _siglip,
    "bert": _bert,
    "t5": _t5,
}
