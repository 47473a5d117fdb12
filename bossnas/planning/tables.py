"""The tables of `bossnas plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bossnas.planning.plan import shown

NOTE = "to set"  # the one column that may take several lines
LEFT = ("schedule", "engine", "winner", NOTE)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints what `plan` gave as tables."""
    config = result["config"]
    table = _table(
        f"Blocks, a micro-batch of {config['micro_batch']} images, {config['precision']}",
        [
            "block",
            "winner",
            "input",
            "paths",
            "parameters M",
            "forward TFLOP",
            "backward",
            "moved GB",
            "s on one GPU",
            "of peak",
            "activations GiB",
            "checkpointing",
        ],
    )
    for number, block in enumerate(result["blocks"]):
        flop = block["tflop"]
        table.add_row(
            str(number),
            block["winner"],
            "x".join(map(str, block["input"])),
            str(block["paths"]),
            f"{(block['parameters'] + block['predictor']) / 1e6:.1f}",
            f"{flop['prefix'] + flop['target'] + flop['online']:.2f}",
            f"{flop['backward']:.2f}",
            f"{sum(block['gb'].values()):.0f}",
            f"{block['seconds']:.3f}",
            f"{block['of_peak']:.0%}",
            f"{block['activations_gib']:.1f}",
            f"{block['checkpointing_gib']:.1f}",
        )
    console.print(table)

    table = _table(
        f"Hours on {result['gpu']}, batch {config['batch']}",
        [
            "GPUs",
            "schedule",
            "engine",
            "micro",
            "accum.",
            "GiB",
            "step s",
            "idle",
            "work h",
            "exchange",
            "waiting",
            "rating",
            "total h",
            "scaling",
            "images/s",
            "cores/GPU",
            NOTE,
        ],
    )
    for row in shown(result["rows"], config["engine"]):
        head = [str(row["gpus"]), row["schedule"], row["engine"]]
        if not row["runs"]:
            table.add_row(*head, *[""] * 13, "cannot run: " + row["reason"])
            continue
        hours = row["hours"]
        values = [
            hours["work"] + hours["update"],
            hours["shuffle"] + hours["gradients"],
            hours.get("waiting", 0.0),
            hours["rating"],
            hours["total"],
        ]
        table.add_row(
            *head,
            str(row["micro_batch"]),
            str(row["accumulate"]),
            f"{row['memory_gib']['total']:.0f}" + ("" if row["fits"] else " too much"),
            f"{row['step_s']:.2f}",
            f"{row['idle']:.0%}",
            *(f"{value:.2f}" for value in values),
            f"{row['scaling']:.0%}",
            f"{row['images_per_s']:.0f}",
            f"{row['cores_per_gpu']:.1f}",
            row["change"] or "",
        )
    console.print(table)

    table = _table(
        "Memory of a rank, GiB, and what it receives in a step, by engine",
        [
            "GPUs",
            "schedule",
            "engine",
            "weights",
            "gradients",
            "optimizer",
            "inputs",
            "activations",
            "total",
            "received GB",
            "total h",
        ],
    )
    for row in result["rows"]:
        if row["runs"]:
            names = ("weights", "gradients", "optimizer", "inputs", "activations", "total")
            table.add_row(
                str(row["gpus"]),
                row["schedule"],
                row["engine"],
                *(f"{row['memory_gib'][name]:.1f}" for name in names),
                f"{row['received_gb']:.1f}",
                f"{row['hours']['total']:.2f}",
            )
    console.print(table)
    for title in ("assumptions", "limits"):
        console.print(title.capitalize() + ":", *(f"- {text}" for text in result[title]), sep="\n", highlight=False)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in LEFT else "right",
            no_wrap=column != NOTE,
            max_width=34 if column == NOTE else None,
        )
    return table
