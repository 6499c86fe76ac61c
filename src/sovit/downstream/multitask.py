"""Captions and answers from a frozen encoder: a small decoder is trained on its tokens, then scored on test images.

SoViT's multitask decoding (arXiv 2305.13035, tables 4 and 6): captions, VQA, OCR-VQA and GQA in one mixture. A blind
decoder, trained alike on zeros, gives the chance level of the log-perplexities and of the captions. Both are kept in a file
beside the result, from which ``decoder=FILE`` scores again. The embedded scenes are the same for every encoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sovit.config import ConfigError
from sovit.downstream import decoder_file
from sovit.downstream.adapted import adapted, check_size
from sovit.downstream.decoder_file import BLIND, SEEING
from sovit.downstream.frozen_tokens import FrozenTokens
from sovit.downstream.multitask_config import QUESTION, Config, check_values, recipe_of
from sovit.downstream.multitask_parts import examples_in, size_of, sources, vocabulary_of
from sovit.downstream.multitask_text import lines
from sovit.downstream.sets import digest
from sovit.downstream.spoken import Asked, Search, asked, by_chance, say, scored
from sovit.downstream.training import ResumeFile
from sovit.language.decoder import Decoder
from sovit.language.examples import CAPTION
from sovit.language.mixture import Examples
from sovit.language.training import NotFinite, Recipe, Score, blind, decoder_of, losses, scores, train_decoder
from sovit.language.vocabulary import Vocabulary
from sovit.lit.trained import Trained

LOOKS = 8  # steps of a training whose loss is in the result
SHOWN = 8  # texts in the result, two of a task


def check(cfg: Config, trained: Trained) -> None:
    check_values(cfg)
    size = size_of(cfg, trained)
    check_size(trained, size)
    vocabulary_of(cfg.vocabulary)
    train, test = sources(cfg, trained)
    read = _read(cfg, trained)
    examples_in(cfg, train, test, cfg.length if read is None else read[1].length)


def depends(trained: Trained, cfg: Config) -> list[str]:
    found = [source.fingerprint for source in sources(cfg, trained)] + [vocabulary_of(cfg.vocabulary).identity]
    return found if cfg.decoder is None else [*found, digest(cfg.decoder, key="task.decoder")]


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Log-perplexities, metrics of what is said, each with a 95 % interval and its chance level, and some of the texts."""
    device, vocabulary = next(trained.model.parameters()).device, vocabulary_of(cfg.vocabulary)
    train, test = sources(cfg, trained)
    read = _read(cfg, trained)
    parts = examples_in(cfg, train, test, cfg.length if read is None else read[1].length)
    resume = ResumeFile(work / "resume.ckpt", cfg.checkpoint_every_s)
    model = _encoder(trained, cfg).to(device)
    memory = FrozenTokens(model, test, work, "test")
    rows: dict[str, list[dict[str, Any]]] = {}
    if read is None:
        recipe, about = recipe_of(cfg, parts[0]), _about(trained, cfg)
        seen = FrozenTokens(model, train, work, "train")
        decoders = {}
        for kind in (SEEING, BLIND):
            decoders[kind], rows[kind] = _trained(kind, seen, parts[0], vocabulary, cfg, recipe, resume)
        states = {kind: decoder.state_dict() for kind, decoder in decoders.items()}
        decoder_file.write(_place(work), states, recipe, vocabulary, about)
    else:
        decoders, recipe, about = read
        recipe = replace(recipe, bfloat16=cfg.precision == "bf16-mixed")
        decoders = {kind: decoder.to(device) for kind, decoder in decoders.items()}
    found = {
        kind: losses(decoders[kind], memory if kind == SEEING else blind(memory), parts[1], vocabulary, recipe)
        for kind in (SEEING, BLIND)
    }
    wanted = asked(test, list(parts[1].of))
    said = _said(decoders[SEEING], memory, wanted, vocabulary, cfg, resume)
    caption = say(decoders[BLIND], blind(memory), [Asked(0, CAPTION, "", ())], vocabulary, _search(cfg))[0]
    chance = by_chance(train, wanted, caption)
    return {
        "dataset": test.name,
        "image_size": size_of(cfg, trained),
        "tokens": list(memory.shape),
        "num_train": len(train),
        "num_test": len(test),
        "vocabulary_size": vocabulary.size,
        "texts": {task: [len(part.of[task]) for part in parts] for task in parts[0].of},
        "cut": {part: dict(of.cut) for part, of in zip(("train", "test"), parts, strict=True)},
        "left_out": {
            part: {"count": source.left_out.count, "named": [list(pair) for pair in source.left_out.named[:5]]}
            for part, source in (("train", train), ("test", test))
        },
        "interval": "95 %, drawing test images anew; not the luck of the training",
        "steps": recipe.steps,
        "decoder": {"file": cfg.decoder or _place(work).name, "of": about, "ours": _about(trained, cfg)},
        "log_perplexity": _log_perplexities(found),
        "scores": scored(wanted, said, chance),
        "blind_caption": caption if CAPTION in parts[0].of else None,
        "curves": rows,
        "said": _some(wanted, said, chance),
    }


def text(result: dict[str, Any]) -> list[str]:
    return lines(result)


def _log_perplexities(found: dict[str, Any]) -> dict[str, Any]:
    """By task and MEAN: value, chance (the blind decoder's) and how much lower the value is, with intervals."""

    def interval(score: Score) -> dict[str, float | None]:
        if score.stderr is None:
            return {"value": score.value, "stderr": None, "lo": None, "hi": None}
        half = 1.96 * score.stderr
        return {"value": score.value, "stderr": score.stderr, "lo": score.value - half, "hi": score.value + half}

    seen, unseen = scores(found[SEEING]), scores(found[BLIND])
    gains = scores(found[SEEING], found[BLIND])
    return {
        one.name: {
            **interval(one),
            "num": one.num,
            "num_tokens": one.num_tokens,
            "chance": other.value,
            "below_chance": interval(gain),
        }
        for one, other, gain in zip(seen, unseen, gains, strict=True)
    }


def _trained(
    kind: str,
    memory: FrozenTokens,
    examples: Examples,
    vocabulary: Vocabulary,
    cfg: Config,
    recipe: Recipe,
    resume: ResumeFile,
) -> tuple[Decoder, list[dict[str, Any]]]:
    """The decoder of a kind, and its loss at some steps; from ``resume`` as far as it has come."""
    done = resume.content.get(kind)
    if done is not None:
        decoder = decoder_of(recipe, vocabulary, memory.shape[-1])
        decoder.load_state_dict(done["decoder"])
        return decoder.to(memory.device).eval(), list(done["rows"])
    state = resume.content.get(f"{kind} in training")
    rows = [] if state is None else list(state["rows"])
    look_at = {round(recipe.steps * k / LOOKS) for k in range(1, LOOKS + 1)}

    def after(made: int, loss: float, snapshot: Any) -> None:
        if made in look_at:
            rows.append({"step": made, "loss": loss})
        if resume.due():
            resume.write(**{f"{kind} in training": {**snapshot(), "rows": list(rows)}})

    try:
        decoder = train_decoder(
            memory if kind == SEEING else blind(memory),
            examples,
            vocabulary,
            recipe,
            memory.shape[-1],
            state=state,
            after=after,
        )
    except NotFinite as error:
        raise ConfigError(str(error).replace("with lr=", "with task.lr=")) from None
    resume.write(**{kind: {"decoder": decoder.state_dict(), "rows": rows}, f"{kind} in training": None})
    return decoder, rows


def _said(
    decoder: Decoder, memory: FrozenTokens, wanted: list[Asked], vocabulary: Vocabulary, cfg: Config, resume: ResumeFile
) -> list[str]:
    def after(said: list[str]) -> None:
        if resume.due():
            resume.write(said=said)

    return say(decoder, memory, wanted, vocabulary, _search(cfg), said=resume.content.get("said", ()), after=after)


def _some(wanted: list[Asked], said: list[str], chance: list[str]) -> list[dict[str, Any]]:
    """A few of the texts of every task, of different images."""
    found = []
    of_task = {
        task: [k for k, one in enumerate(wanted) if one.task == task] for task in dict.fromkeys(w.task for w in wanted)
    }
    for of in of_task.values():
        for k in of[:: max(1, len(of) // (SHOWN // len(of_task)))][: SHOWN // len(of_task)]:
            one = wanted[k]
            found.append(
                {
                    "task": one.task,
                    "image": one.row,
                    "question": one.question,
                    "said": said[k],
                    "chance": chance[k],
                    "references": list(one.references[:5]),
                }
            )
    return found


def _read(cfg: Config, trained: Trained) -> tuple[dict[str, Decoder], Recipe, dict[str, Any]] | None:
    """The decoders of ``decoder=FILE``; None where they are to be trained. Raises ConfigError."""
    if cfg.decoder is None:
        return None
    path = Path(cfg.decoder).expanduser()
    found = decoder_file.read(path, vocabulary_of(cfg.vocabulary), trained.model.num_features)
    if found[1].length < cfg.max_tokens + QUESTION:
        raise ConfigError(
            f"task.decoder={path} reads {found[1].length} tokens, which leaves too little for a question beside "
            f"task.max_tokens={cfg.max_tokens}; give {max(1, found[1].length - QUESTION)} or fewer."
        )
    return found


def _encoder(trained: Trained, cfg: Config) -> torch.nn.Module:
    size = size_of(cfg, trained)
    model: torch.nn.Module = trained.model
    if size != trained.cfg.model.image_size:
        model = adapted(trained, image_size=size, num_classes=trained.cfg.data.num_classes, positions=cfg.positions)
    return model.eval().requires_grad_(False)


def _about(trained: Trained, cfg: Config) -> dict[str, Any]:
    """Which encoder a decoder looks at."""
    weights = trained.weights
    return {
        "run_id": weights.run_id,
        "step": weights.step,
        "weights": weights.kind,
        "image_size": size_of(cfg, trained),
    }


def _search(cfg: Config) -> Search:
    return Search(cfg.max_tokens, cfg.beams, cfg.length_penalty)


def _place(work: Path) -> Path:
    """Of the decoder's file: beside the result, under its name."""
    return work.with_name(work.name.removeprefix(".").removesuffix(".work") + ".safetensors")
