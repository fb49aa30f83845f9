"""What contenders measured, as rows: ratios, shares of the machine's limit, growth; and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, linear_regression
from typing import Any

from emreason.bench.contenders import EXACT, OURS, Contender
from emreason.bench.work import TARGET
from emreason.reports.forms import Entry, Table, markdown

SAME_LOSS, SAME_ROUNDED = 1e-3, 0.02
"""Largest difference of a step's loss from ours in float32 that counts as the same work: absolute in float32, relative with bf16, whose
rounding alone (in us and in TRL) is about a percent after the first updates.
"""


def rows_of(contender: Contender, result: dict[str, Any], works: Sequence[str]) -> list[dict[str, Any]]:
    """One row per piece of work, also of a contender that failed."""
    about = {"phase": contender.phase, "contender": contender.name, **({"note": contender.note} if contender.note else {})}
    if "error" in result:
        return [{**about, "work": work, "error": result["error"]} for work in works]
    more = {key: result[key] for key in ("dtype", "loading_seconds", "peak_memory_bytes") if key in result}
    rows = []
    for row in result["rows"]:
        if contender.phase == "iteration":  # what a user waits for: the whole process
            row = {**row, "seconds": result["process_seconds"]}
            row["other_seconds"] = row["seconds"] - row["e_step_seconds"] - row["m_step_seconds"] - row["evaluation_seconds"]
        rows.append({**about, **more, **row})
    return rows


def over_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one contender under several seeds as one: means of seconds and shares, lists of what was learned; or the first error."""
    failed = next((r for r in results if "error" in r), None)
    if failed:
        return failed
    rows = [r["rows"][0] for r in results]
    row: dict[str, Any] = {key: fmean(r[key] for r in rows) for key, value in rows[0].items() if isinstance(value, float)}
    row |= {
        "work": rows[0]["work"],
        "accuracies": [r["accuracies"] for r in rows],
        "accuracy": fmean(r["accuracies"][0] for r in rows),
        "accepted": fmean(r["accepted"][0] for r in rows),
        "iterations": [len(r["accuracies"]) for r in rows],
        "reached": sum(r["accuracies"][-1] >= TARGET for r in rows),
        "seeds": len(rows),
        "process_seconds": [r["process_seconds"] for r in results],
    }
    seconds, peak = fmean(row["process_seconds"]), max(r["peak_memory_bytes"] for r in results)
    return {"rows": [row], "dtype": results[0]["dtype"], "process_seconds": seconds, "peak_memory_bytes": peak}


def finish(rows: list[dict[str, Any]], parameters: int, peak: float, lora: bool = False) -> None:
    """Add to each row of the E-step, M-step and iteration how much faster ours is; speeds with their share of the machine's limit (2 FLOP
    per parameter and token sampled, 6 trained, 4 with frozen weights); and to the M-step's how far its losses are from ours in float32.
    """
    for row in rows:
        if "error" not in row and row.get("tokens") and row["phase"] in ("E-step", "M-step"):
            row["tokens_per_second"] = row["tokens"] / row["seconds"]
            row["share_of_limit"] = (
                row["tokens_per_second"] * (2 if row["phase"] == "E-step" else 4 if lora else 6) * parameters / (peak * 1e9)
            )
    ours = {row["work"]: row for row in rows if row["contender"] == OURS and "error" not in row}
    for row in rows:
        mine = ours.get(row["work"])
        if "error" in row or mine is None or row["phase"] == "growth":
            continue
        # the E-step's contenders draw what they draw: speeds are compared, not times
        by = mine["tokens_per_second"] / row["tokens_per_second"] if "tokens_per_second" in row else row["seconds"] / mine["seconds"]
        row["ours_is_faster_by"] = by
    exact = next((row["losses"] for row in rows if row["contender"] == EXACT and "losses" in row), None)
    for row in rows:
        if "losses" in row and exact is not None:
            row |= compared(row["losses"], exact, row["dtype"])


def compared(losses: Sequence[float], exact: Sequence[float], dtype: str) -> dict[str, Any]:
    """How far the losses of a contender's optimizer steps are from the `exact` ones, and whether that is the same work."""
    if len(losses) != len(exact):
        return {"loss_difference": None, "same_work": f"no: {len(losses)} optimizer steps"}
    difference = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    if dtype == "float32":
        return {"loss_difference": difference, "same_work": "yes" if difference <= SAME_LOSS else "no: other losses"}
    rounded = max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))
    return {"loss_difference": difference, "same_work": "yes, rounded" if rounded <= SAME_ROUNDED else "no: other losses"}


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the growth rows: the exponent of time against questions (least squares in logarithms), the largest over the smallest peak memory,
    and the peak memory of the M-step, all of the host.
    """
    sampled = [row for row in rows if row["phase"] == "growth" and "error" not in row and "questions" in row]
    trained = [row for row in rows if row["phase"] == "growth" and "error" not in row and "questions" not in row]
    found: dict[str, Any] = {}
    if len(sampled) > 1:
        x, y = [math.log(row["questions"]) for row in sampled], [math.log(row["seconds"]) for row in sampled]
        found["exponent"] = linear_regression(x, y).slope
        peaks = [row["peak_memory_bytes"] for row in sampled]
        found["memory_ratio"] = max(peaks) / min(peaks)
    if trained:
        found |= {"m_step": trained[0]["work"], "m_step_peak_bytes": max(row["peak_memory_bytes"] for row in trained)}
    return found


# ---- tables ------------------------------------------------------------------------------------------------------------------------------


def tables_of(bench: dict[str, Any]) -> list[Table]:
    """A table per piece of work; a contender that cannot run has a row that says why."""
    found = []
    for phase, work in dict.fromkeys((row["phase"], row["work"]) for row in bench["rows"]):
        rows = [row for row in bench["rows"] if (row["phase"], row["work"]) == (phase, work)]
        columns = _columns(phase)
        shown = [
            [f"{row['contender']}, cannot run: {row['error']}", *["–"] * len(columns)]
            if "error" in row
            else [row["contender"], *(cell(row) for cell in columns.values())]
            for row in rows
        ]
        numeric = [i for i, name in enumerate(columns, 1) if name not in ("dtype", "decoder", "same work", "note")]
        found.append(Table("", [work, *columns], [[Entry(text) for text in row] for row in shown], tuple(numeric)))
    return found


def _number(key: str, form: str, scale: float = 1.0, unit: str = "") -> Any:
    return lambda row: f"{row[key] / scale:{form}}{unit}" if row.get(key) is not None else "–"


def _columns(phase: str) -> dict[str, Any]:
    ours, memory = _number("ours_is_faster_by", ".2f", unit=" ×"), _number("peak_memory_bytes", ".1f", 1e9)
    seconds, speed = _number("seconds", ".1f"), _number("tokens_per_second", ".0f")
    dtype, note = (lambda row: row.get("dtype", "–")), (lambda row: row.get("note", ""))
    if phase == "iteration":
        parts = {"E-step s": "e_step", "M-step s": "m_step", "evaluation s": "evaluation", "loading etc. s": "other"}
        named = {words: _number(f"{part}_seconds", ".1f") for words, part in parts.items()}
        learned = {
            "reached": lambda row: f"{row['reached']} of {row['seeds']}" if "reached" in row else "–",
            "after one iteration": _number("accuracy", ".0%"),
        }
        return {"seconds": seconds, "theirs / ours": ours, **learned, **named, "accepted": _number("accepted", ".0f"), "host GB": memory}
    if phase == "growth":
        return {"seconds": seconds, "tokens/s": speed, "host GB": memory}
    if phase == "family":
        speeds = {"tokens/s": speed, "generate": _number("generate_tokens_per_second", ".0f"), "ours / it": ours}
        return {"decoder": lambda row: row["decoder"], **speeds, "rows with its ids": _number("equal_rows", ".0f")}
    columns = {"dtype": dtype, "tokens/s": speed, "ours / it": ours}
    columns |= {"of limit": _number("share_of_limit", ".0%"), "seconds": seconds, "host GB": memory}
    if phase == "M-step":
        columns |= {"loss off by": _number("loss_difference", ".1e"), "same work": lambda row: row.get("same_work", "–"), "note": note}
    return columns


def title(bench: dict[str, Any]) -> str:
    """What was measured where."""
    peak = ", ".join(f"{name} {value:.0f}" for name, value in bench["peak_gflops"].items())
    return f"emreason bench: {bench['model']} on {bench['device']} (matmul limit, GFLOP/s: {peak})"


def growth_line(found: dict[str, Any]) -> str:
    """The growth section as one sentence; empty if nothing was measured."""
    said = []
    if "exponent" in found:
        said.append(f"E-step time grows with questions^{found['exponent']:.2f}, peak memory by {found['memory_ratio'] - 1:.0%}")
    if "m_step_peak_bytes" in found:
        said.append(f"{found['m_step']} takes {found['m_step_peak_bytes'] / 1e9:.2f} GB of the host's memory")
    return "; ".join(said) + "." if said else ""


def markdown_of(bench: dict[str, Any]) -> str:
    """For `table.md`."""
    said = growth_line(bench["growth"])
    return "\n".join([f"**{title(bench)}**\n", *map(markdown, tables_of(bench)), *([f"{said}\n"] if said else [])])
