"""A result of `task=multitask` as lines for the terminal."""

from __future__ import annotations

from typing import Any

LONGEST = 76  # letters of a text that is shown


def lines(result: dict[str, Any]) -> list[str]:
    """Log-perplexities, scores, a few texts, and what was left out."""
    num, width = result["tokens"]
    found = [
        f"{result['dataset']}: {result['num_train']:,} images to train on and {result['num_test']:,} to test on, "
        f"{result['image_size']} pixels, {num} tokens of width {width}; decoder {_decoder(result)}",
        "",
        f"{'log-perplexity':<14} {'nats per token':<24} {'blind':<7} {'below blind':<24} tokens",
    ]
    for name, one in result["log_perplexity"].items():
        gain = _interval(one["below_chance"])
        found.append(f"{name:<14} {_interval(one):<24} {one['chance']:<7.3f} {gain:<24} {one['num_tokens']:,}")
    found += ["", f"{'task':<8} {'metric':<14} {'of what is said':<24} {'chance':<7} texts"]
    for one in result["scores"]:
        score = _interval(one)
        found.append(f"{one['task']:<8} {one['metric']:<14} {score:<24} {one['chance']:<7.3f} {one['num']:,}")
    found += ["", f"Intervals: {result['interval']}."]
    found.append("Chance of an answer: the commonest one to that question in training.")
    if result["blind_caption"] is not None:
        found.append(f"Chance of a caption: the blind decoder's, {_short(result['blind_caption'])!r}.")
    found.append("")
    for one in result["said"]:
        question = f" {_short(one['question'])!r}" if one["question"] else ""
        found.append(f"image {one['image']}, {one['task']}:{question}")
        found.append(f"    said {_short(one['said'])!r}, in the data {_short(one['references'][0])!r}")
    for part, of in result["left_out"].items():
        if of["count"]:
            name, reason = of["named"][0]
            found.append(f"{part}: could not be used: {of['count']:,}, such as {name!a} ({reason})")
    for part, of in result["cut"].items():
        if of:
            said = ", ".join(f"{num:,} of {task}" for task, num in of.items())
            found.append(f"{part}: texts cut to the decoder's length: {said}")
    about, ours = result["decoder"]["of"], result["decoder"]["ours"]
    if about != ours:
        found.append(
            f"This decoder was trained on another encoder, {about.get('run_id')} at step {about.get('step')} and "
            f"{about.get('image_size')} pixels; a low score may be no fault of this one."
        )
    return found


def _decoder(result: dict[str, Any]) -> str:
    return f"{result['decoder']['file']}, {result['steps']:,} steps"


def _interval(one: dict[str, Any]) -> str:
    """Such as ``1.234 [1.201, 1.267]``."""
    if one["lo"] is None:
        return f"{one['value']:.3f}"
    return f"{one['value']:.3f} [{one['lo']:.3f}, {one['hi']:.3f}]"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
