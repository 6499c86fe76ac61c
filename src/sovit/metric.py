"""What a row of ``evals.jsonl`` measures: how it is named for a logger and a sweep file, and how it is said in words.

A metric is a data set and a number of shots. All are errors in [0, 1], but for those of the multitask decoder, which are
log-perplexities in nats per token and know no shots (0). Importing this module loads nothing.
"""

from __future__ import annotations

import re

ERROR, LOG_PERPLEXITY = "error", "log_perplexity"  # of a row's key ``metric``; absent means error
MULTITASK = "multitask"  # the unweighted mean over the tasks; one task is multitask.caption
DEFAULT_SHOTS = 10

Metric = tuple[str, int]  # data set, shots


def is_multitask(dataset: str) -> bool:
    """Whether a data set of this name is the decoder's, or one of its tasks."""
    return dataset == MULTITASK or dataset.startswith(f"{MULTITASK}.")


def kind_of(dataset: str, shots: int) -> str:
    """What is measured: `LOG_PERPLEXITY` of the multitask decoder, else `ERROR`."""
    return LOG_PERPLEXITY if shots == 0 and is_multitask(dataset) else ERROR


def shots_of(dataset: str, shots: int | None) -> int:
    """The number of shots that is meant where none is given: 0 for the multitask decoder, else 10."""
    return shots if shots is not None else 0 if is_multitask(dataset) else DEFAULT_SHOTS


def key(dataset: str, shots: int) -> str:
    """Its name in W&B and in a sweep file: eval/fractals_10shot/error, eval/multitask/log_perplexity.

    A task is eval/multitask_caption/log_perplexity: a point in a name would open a level at W&B.
    """
    if kind_of(dataset, shots) == LOG_PERPLEXITY:
        return f"eval/{dataset.replace('.', '_', 1)}/{LOG_PERPLEXITY}"
    return f"eval/{dataset}_{shots}shot/{ERROR}"


def parse_key(name: str) -> Metric:
    """The data set and shots of such a name. Raises ValueError for any other text."""
    match = re.fullmatch(r"eval/([\w.-]+)_(\d+)shot/error", name)
    if match:
        return match[1], int(match[2])
    match = re.fullmatch(rf"eval/{MULTITASK}(?:_(\w+))?/{LOG_PERPLEXITY}", name)
    if match:
        return f"{MULTITASK}.{match[1]}" if match[1] else MULTITASK, 0
    raise ValueError(
        f"metric name {name!a} is not one that runs log; write eval/fractals_10shot/error, or "
        f"eval/{MULTITASK}/{LOG_PERPLEXITY} of metric=multitask"
    )


def parse(text: str) -> Metric:
    """The metric of a command line's word: fractals@10, fractals (10 shots), multitask. Raises ValueError."""
    dataset, at, shots = text.partition("@")
    if not dataset or (at and not re.fullmatch(r"[0-9]{1,6}", shots)):
        raise ValueError(f"{text!a} is no metric; write DATASET@SHOTS such as fractals@10, or multitask.")
    return dataset, shots_of(dataset, int(shots) if at else None)


def label(dataset: str, shots: int) -> str:
    """Short, and read back by `parse`: fractals@10, multitask."""
    return dataset if kind_of(dataset, shots) == LOG_PERPLEXITY else f"{dataset}@{shots}"


def place(dataset: str, shots: int) -> str:
    """Where it was evaluated: fractals at 10 shots; multitask."""
    return dataset if kind_of(dataset, shots) == LOG_PERPLEXITY else f"{dataset} at {shots} shots"


def value_name(dataset: str, shots: int) -> str:
    """What the number is called: log-perplexity or error."""
    return "log-perplexity" if kind_of(dataset, shots) == LOG_PERPLEXITY else "error"


def shot_name(dataset: str, shots: int | str) -> str:
    """What is measured, without the data set: 10-shot error, zero-shot error, log-perplexity."""
    if isinstance(shots, int) and kind_of(dataset, shots) == LOG_PERPLEXITY:
        return "log-perplexity"
    return "zero-shot error" if shots == 0 else f"{shots}-shot error"


def words(dataset: str, shots: int | str) -> str:
    """10-shot error on fractals; log-perplexity, multitask; log-perplexity, multitask caption."""
    if isinstance(shots, int) and kind_of(dataset, shots) == LOG_PERPLEXITY:
        return f"log-perplexity, {dataset.replace('.', ' ', 1)}"
    return f"{shot_name(dataset, shots)} on {dataset}"
