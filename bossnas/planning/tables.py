"""The tables of `bossnas plan`."""

from __future__ import annotations

from typing import Any

from bossnas.layout import Column, brief, exact, paragraph, table
from bossnas.planning.plan import shown


def lines(result: dict[str, Any], space: int) -> list[str]:
    """What `plan` gave as text of at most ``space`` columns."""
    text = [*_blocks(result, space), "", *_hours(result, space), "", *_memory(result, space)]
    for title in ("assumptions", "limits"):
        text += ["", f"{title.capitalize()}:"]
        for sentence in result[title]:
            text += paragraph(f"- {sentence}", space, "  ")
    return text


def _blocks(result: dict[str, Any], space: int) -> list[str]:
    config, blocks = result["config"], result["blocks"]
    flop = [block["tflop"] for block in blocks]
    columns = [
        Column("block", [str(number) for number in range(len(blocks))]),
        Column("winner", [block["winner"] for block in blocks], text=True),
        Column("input", ["x".join(map(str, block["input"])) for block in blocks]),
        Column("paths", [exact(block["paths"]) for block in blocks]),
        Column("para-\nmeters", [brief(block["parameters"] + block["predictor"]) for block in blocks]),
        Column("activations\nGiB", [f"{block['activations_gib']:,.1f}" for block in blocks]),
        Column("checkpointing\nGiB", [f"{block['checkpointing_gib']:,.1f}" for block in blocks]),
        Column("forward\nTFLOP", [f"{of['prefix'] + of['target'] + of['online']:,.2f}" for of in flop]),
        Column("backward\nTFLOP", [f"{of['backward']:,.2f}" for of in flop]),
        Column("moved\nGB", [f"{sum(block['gb'].values()):,.0f}" for block in blocks]),
        Column("one GPU\ns", [f"{block['seconds']:,.3f}" for block in blocks]),
        Column("of\npeak", [f"{block['of_peak']:.0%}" for block in blocks]),
    ]
    title = f"Blocks, a micro-batch of {exact(config['micro_batch'])} images, {config['precision']}"
    return table(title, columns, space, names=2)


def _hours(result: dict[str, Any], space: int) -> list[str]:
    rows = shown(result["rows"], result["config"]["engine"])

    def runs(heading: str, cell: Any) -> Column:
        return Column(heading, [cell(row) if row["runs"] else "" for row in rows])

    def hours(heading: str, *names: str) -> Column:
        return runs(heading, lambda row: f"{sum(row['hours'].get(name, 0.0) for name in names):,.2f}")

    columns = [
        *_heads(rows),
        hours("total\nh", "total"),
        runs("scaling", lambda row: f"{row['scaling']:.0%}"),
        runs("memory\nGiB", lambda row: f"{row['memory_gib']['total']:,.0f}"),
        Column("to set", [_note(row) for row in rows], text=True),
        runs("micro-\nbatch", lambda row: exact(row["micro_batch"])),
        runs("accum.", lambda row: exact(row["accumulate"])),
        runs("step\ns", lambda row: f"{row['step_s']:,.2f}"),
        runs("idle", lambda row: f"{row['idle']:.0%}"),
        runs("images\nper s", lambda row: f"{row['images_per_s']:,.0f}"),
        runs("cores\nper GPU", lambda row: f"{row['cores_per_gpu']:,.1f}"),
        hours("work\nh", "work", "update"),
        hours("exchange\nh", "shuffle", "gradients"),
        hours("waiting\nh", "waiting"),
        hours("rating\nh", "rating"),
    ]
    title = f"Hours on {result['gpu']}, batch {exact(result['config']['batch'])}"
    return table(title, columns, space, names=3)


def _note(row: dict[str, Any]) -> str:
    """What is to be set for a row of the plan, or why there is none."""
    if not row["runs"]:
        return "cannot run: " + row["reason"]
    return "; ".join(part for part in ("" if row["fits"] else "too much memory", row["change"] or "") if part)


def _memory(result: dict[str, Any], space: int) -> list[str]:
    rows = [row for row in result["rows"] if row["runs"]]
    columns = _heads(rows)
    for name in ("total", "weights", "gradients", "optimizer", "inputs", "activations"):
        columns.append(Column(f"{name}\nGiB", [f"{row['memory_gib'][name]:,.1f}" for row in rows]))
    columns.append(Column("received\nGB", [f"{row['received_gb']:,.1f}" for row in rows]))
    columns.append(Column("total\nh", [f"{row['hours']['total']:,.2f}" for row in rows]))
    return table("Memory of a rank, and what it receives in a step, by engine", columns, space, names=3)


def _heads(rows: list[dict[str, Any]]) -> list[Column]:
    return [
        Column("GPUs", [exact(row["gpus"]) for row in rows]),
        Column("schedule", [row["schedule"] for row in rows], text=True),
        Column("engine", [row["engine"] for row in rows], text=True),
    ]
