"""Rows of `sovit bench` as a table for the terminal, with what a reader has to know beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sovit.analysis.report.words import number
from sovit.inference import gb
from sovit.launch.tables import count_text, table

Record = Mapping[str, Any]
BUSY = 0.8  # of the cores that the threads asked for


def line(record: Record) -> str:
    """One row while the others are still to come."""
    what = f"{record['subject']}, {record['image_size']} px, batch {record['batch_size']}, {record['precision']}"
    what += f", {record['mode']}"
    if record["status"] != "measured":
        return f"{what}: not measured: {record['why']}"
    return f"{what}: {number(record['latency_ms']['p50'])} ms"


def rows(found: Sequence[Record]) -> Table:
    """The table. Over timm: how many times as fast, the median of turns with its middle half."""
    shown = table(
        ("model", "left"), ("px", "right"), ("batch", "right"), ("precision", "left"), ("mode", "left"),
        ("p50, ms", "right"), ("p95, ms", "right"), ("images/s", "right"), ("of peak", "right"), ("memory", "right"),
        ("J/image", "right"), ("over timm", "right"),
    )  # fmt: skip
    for record in found:
        name, size = record["subject"], str(record["image_size"])
        head = (name, size, str(record["batch_size"]), record["precision"], record["mode"])
        if record["status"] != "measured":
            shown.add_row(*head, "not measured", *[""] * 6)
            continue
        took, joules, rival = record["latency_ms"], record["energy_j_per_image"], record["timm"]
        ratio = rival["ratio"] if rival else None
        shown.add_row(
            *head,
            number(took["p50"]),
            number(took["p95"]),
            count_text(record["images_per_s"]),
            f"{record['utilisation']:.0%}" if record["utilisation"] >= 0.1 else f"{record['utilisation']:.1%}",
            "-" if record["memory_bytes"] is None else gb(record["memory_bytes"]),
            number(joules) if joules is not None else "not told",
            f"{ratio['median']:.2f} ({ratio['lo']:.2f}-{ratio['hi']:.2f})" if ratio else "-",
        )
    return shown


def notes(found: Sequence[Record]) -> list[str]:
    """Sentences below the table: what could not be measured, and what the figures rest on."""
    said = [f"{line(record)}." for record in found if record["status"] != "measured"]
    measured = [record for record in found if record["status"] == "measured"]
    if not measured:
        return said
    first = measured[0]
    gpu = first["device"] == "cuda"
    name = " + ".join(first["machine"]["gpus"]) if gpu else first["machine"]["cpu"]
    threads = "" if gpu else f", {first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    said.append(
        f"{name}{threads}, torch {first['machine']['torch']}; a call is one forward pass of a batch, no gradients."
    )
    if first["clock"] == "processor":
        said.append("Times are those for which this process had a core, as if nothing else ran.")
    peaks = {record["precision"]: record for record in measured}
    of = ", ".join(
        f"{number(one['peak_gflops_per_s'], 4)} GFLOP/s in {precision} ({one['peak_basis']})"
        for precision, one in peaks.items()
    )
    said.append(f"Of peak: FLOPs by the closed form over {of}.")
    if any(record["latency_ms"]["p95"] is None for record in measured):
        said.append("No p95 below 20 calls; --seconds gives more of them.")
    basis = {record["memory_basis"] for record in measured if record["memory_basis"]}
    if basis:
        said.append(f"Memory: weights, images and activations, by the {' and '.join(sorted(basis))}.")
    if not gpu and any(record["mode"] == "compiled" for record in measured):
        said.append("Of a compiled model on a CPU the memory is not told: the compiler's own is in the same process.")
    told = {record["energy_basis"] for record in measured if record["energy_basis"]}
    said.append(
        f"Energy: {' and '.join(sorted(told))}, other programs' share in it."
        if told
        else "Energy: not told by this device (RAPL on Linux, NVML with the package nvidia-ml-py)."
    )
    shares = [record["cpu_share"] for record in measured if record["cpu_share"] is not None]
    if shares and min(shares) < BUSY and first["clock"] == "wall":
        said.append(
            f"Other programs ran meanwhile: a row got as little as {min(shares):.0%} of its threads' time, so single times "
            "are too long; the ratios to timm were taken in turns."
        )
    return said
