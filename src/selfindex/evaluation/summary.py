"""From records to tables: estimates with 95 % bootstrap intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .records import Records
from .run import FLOOR
from .stats import bootstrap, mean_of_means, wilson
from .tasks import GROUPS

STRETCH = 32
"""Tokens averaged in a row of KL by position."""


def summary(records: Records, methods: list[str]) -> dict[str, Any]:
    """All parts of an evaluation; methods in this order."""
    return {
        "fidelity": _fidelity(records.of("fidelity"), methods),
        "layers": _layers(records.of("layers"), methods),
        "tasks": (tasks := _tasks(records.of("tasks"), methods)),
        "means": {length: _means(found) for length, found in tasks.items()},
        "batches": _batches(records.of("batches"), methods),
        "heatmap": _heatmap(records.of("heatmap"), methods),
        "failed": _failed(records.rows),
    }


def summarise(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Pool runs over texts: estimate and interval per metric, worst text for KL and top-1."""
    table: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        windows = {metric: [run[name][metric] for run in runs] for metric in ("kl", "top1", "nll")}
        table[name] = {metric: bootstrap(parts) for metric, parts in windows.items()}
        table[name]["perplexity"] = math.exp(table[name]["nll"][0])
        table[name]["kl_by_text"] = [round(float(part.mean()), 5) for part in windows["kl"]]
        table[name]["top1_by_text"] = [round(float(part.mean()), 5) for part in windows["top1"]]
        if "bytes" in runs[0][name]:
            table[name]["bytes"] = runs[0][name]["bytes"]
    return table


def _failed(rows: list[dict[str, Any]]) -> list[str]:
    """What could not be measured, apart from tasks, whose tables say so."""
    failed = (row for row in rows if "failed" in row and row["part"] != "tasks")
    return list(
        dict.fromkeys(f"{r['method']}, {r['part']} at {r['length']:,} tokens: {r['failed']}" for r in failed)
    )


def _lengths(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["length"] for row in rows})


def _fidelity(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Length -> method -> what `summarise` gives, bytes, and KL and top-1 by position."""
    found: dict[str, Any] = {}
    for length in _lengths(rows):
        here = [row for row in rows if row["length"] == length]
        texts = sorted({row["name"] for row in here})
        runs = []
        for text in texts:
            mine = {row["method"]: row for row in here if row["name"] == text and "failed" not in row}
            runs.append({m: _arrays(mine[m]) for m in methods if m in mine})
        complete = [m for m in methods if all(m in run for run in runs)]
        table = summarise([{m: run[m] for m in complete} for run in runs])
        for method, row in table.items():
            row["read"] = runs[0][method]["read"]
            row["position"] = {
                metric: [
                    round(float(np.mean([run[method][metric][i : i + STRETCH] for run in runs])), 5)
                    for i in range(0, len(runs[0][method][metric]), STRETCH)
                ]
                for metric in ("kl", "top1", "nll")
            }
        found[str(length)] = {"texts": texts, "methods": table}
    return found


def _arrays(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.array(value, dtype=np.float64) if isinstance(value, list) else value
        for name, value in row.items()
        if name in ("kl", "top1", "nll", "bytes", "read")
    }


def _layers(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Length -> method -> metric -> "mean", "worst" head, and the means by layer and head."""
    found: dict[str, Any] = {}
    for length in _lengths(rows):
        table: dict[str, Any] = {}
        for method in methods:
            mine = [row for row in rows if row["length"] == length and row["method"] == method]
            if mine and not any("failed" in row for row in mine):
                table[method] = {m: _spread([row[m] for row in mine]) for m in ("mass", "error", "overlap")}
                table[method]["error"]["worst"] = max(map(max, table[method]["error"]["heads"]))
        found[str(length)] = table
    return found


def _spread(texts: list[list[list[float]]]) -> dict[str, Any]:
    heads = np.mean(np.array(texts), 0)  # [layers, heads]
    return {
        "mean": round(float(heads.mean()), 5),
        "worst": round(float(heads.min()), 5),
        "layers": [round(float(x), 5) for x in heads.mean(1)],
        "heads": [[round(float(x), 5) for x in row] for row in heads],
    }


def _tasks(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Length -> task -> method -> samples, score, bytes; other methods only where the dense model can do it.

    All methods of a task are compared over the same samples: those that all of them have answered which
    have answered half of what the dense model has. A method that ran out of memory has "failed" and no score.
    """
    found: dict[str, Any] = {}
    for length in _lengths(rows):
        tasks: dict[str, Any] = {}
        for task in dict.fromkeys(row["name"] for row in rows if row["length"] == length):
            here = [row for row in rows if row["length"] == length and row["name"] == task]
            answered = {m: {row["sample"]: row for row in here if row["method"] == m} for m in methods}
            dense = answered.get("dense", {})
            failed = {
                m: next(row["failed"] for row in mine.values() if "failed" in row)
                for m, mine in answered.items()
                if any("failed" in row for row in mine.values())
            }
            known = {
                m: mine
                for m, mine in answered.items()
                if mine and m not in failed and 2 * len(mine) >= len(dense)
            }
            if "dense" not in known:
                continue
            common = sorted(set.intersection(*(set(mine) for mine in known.values())))
            if not common:
                continue
            scored = {m: [mine[i] for i in common] for m, mine in known.items()}
            able = np.mean([row["score"] for row in scored["dense"]]) >= FLOOR
            if able and len(methods) > 1 and len(known) == 1 and not failed:
                continue  # interrupted before others were asked
            tasks[task] = {m: _scored(own) for m, own in scored.items() if able or m == "dense"}
            tasks[task] |= {m: {"samples": 0, "failed": why} for m, why in failed.items() if able}
        found[str(length)] = tasks
    return found


def _scored(rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    own = {"samples": len(rows), "score": wilson(np.array(scores)), "scores": [round(x, 4) for x in scores]}
    own |= {name: rows[0][name] for name in ("bytes", "read") if name in rows[0]}
    if "exact" in rows[0]:
        own["exact"] = wilson(np.array([row["exact"] for row in rows]))
    return own


def _means(tasks: dict[str, Any]) -> dict[str, Any]:
    """Group -> method -> mean over the group's tasks, and points less than dense, with 95 % intervals.

    Only methods that answered all of the group's tasks that the dense model can do.
    """
    found: dict[str, Any] = {}
    for group, members in GROUPS.items():
        able = [name for name in tasks if name in members and len(tasks[name]) > 1]
        for method in tasks[able[0]] if able else ():
            if all("score" in tasks[name].get(method, {}) for name in able):
                own = [np.array(tasks[name][method]["scores"]) for name in able]
                less = [
                    np.array(tasks[name]["dense"]["scores"]) - x for name, x in zip(able, own, strict=True)
                ]
                found.setdefault(group, {})[method] = {
                    "mean": mean_of_means(own),
                    "less": mean_of_means(less),
                }
    return found


def _batches(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Task -> method -> samples, mean score alone and together, share of equal replies."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(row["name"] for row in rows):
        for method in methods:
            mine = [r for r in rows if r["name"] == task and r["method"] == method and "same" in r]
            if mine:
                means = {
                    key: round(float(np.mean([row[key] for row in mine])), 4)
                    for key in ("score", "together", "same")
                }
                found.setdefault(task, {})[method] = {
                    "samples": len(mine),
                    "length": mine[0]["length"],
                } | means
    return found


def _heatmap(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Method -> length -> mean score by depth, from the start to the end."""
    found: dict[str, Any] = {}
    for method in methods:
        mine = [row for row in rows if row["method"] == method and "score" in row]
        for length in _lengths(mine):
            depths = sorted({row["depth"] for row in mine if row["length"] == length})
            found.setdefault(method, {})[str(length)] = {
                f"{depth:.2f}": round(
                    float(
                        np.mean(
                            [row["score"] for row in mine if (row["length"], row["depth"]) == (length, depth)]
                        )
                    ),
                    4,
                )
                for depth in depths
            }
    return found
