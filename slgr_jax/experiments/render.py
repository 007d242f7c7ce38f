"""The report in Markdown: verdict, tables by backbone and metric, tuning, controls, gates, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slgr_jax.experiments import results
from slgr_jax.experiments.arms import CONTROLS
from slgr_jax.experiments.summary import REFERENCES, Row
from slgr_jax.experiments.tuning import as_text

Tuned = Mapping[str, Mapping[str, Mapping[str, Any]]]
_TESTS = (
    "Means over seeds; +- half of the 95 % interval (Student's t over seeds). vs: difference to "
    "that arm, seed by seed. p seeds: paired t-test over seeds; p users: over users, each user's "
    "mean over seeds (of rows: each user's own AUC). Both are Holm-corrected, {family}."
)


_COST = (
    "triples_per_s: of the fastest epoch of all seeds; speed_vs_none: that over `none`'s, the "
    "ratio of steps a second. best_at_the_end: seeds whose last epoch was their best. "
    "cpu_seconds: of the process, compilation and validation included. Runs share the machine "
    "with each other: for orientation."
)


_REFIT = (
    "Every run once more: its settings, its epochs to its best validation, its gate as that left "
    "it; validation, which chose them and taught the gate, is trained on too. Test alone is "
    "ranked; slices count training interactions as above. The verdict is over these."
)
# Slices of the small table.
_SHORT = ("overall", "cold_users", "tail_items")


def render(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report of one data set.

    Args:
      report: what report.json holds.
      pictures: files beside it.
    """
    protocol, rows = report["protocol"], report["rows"]
    title = f"# {protocol['data']}"
    title += f", teacher {protocol['teacher']}" if protocol["teacher"] else ""

    tuned = report["tuned"]
    lines = [title, "", *_verdict(report["verdict"]), *_choices(tuned), *_ends(tuned)]
    lines += _still_rising(report["cost"], protocol["seeds"])
    lines += _protocol(protocol)
    lines += [f"![{name}]({name})" for name in pictures] + [""]
    lines += _primary(protocol, rows)
    lines += _refit(protocol, report.get("refit"))
    lines += _others(rows)
    lines += _baselines(report["baselines"])
    lines += _tuning(report["tuned"])
    lines += _gates(report["gate"])
    lines += ["## Cost of training", "", _markdown(report["cost"]), "", _COST]
    return "\n".join(lines) + "\n"


def short_rows(report: Mapping[str, Any]) -> list[Row]:
    """A row per backbone and arm: the primary metric by slice, and overall against `none`.

    Of refitted arms too, named `none, refit`.
    """
    again = [
        {**row, "arm": f"{row['arm']}, refit"} for row in _short_rows(report.get("refit") or {})
    ]
    return [*_short_rows(report), *again]


def _short_rows(report: Mapping[str, Any]) -> list[Row]:
    shown: dict[tuple[str, str], Row] = {}
    for row in report.get("rows", ()):
        if not row["primary"] or row["slice"] not in _SHORT:
            continue
        line = shown.setdefault(
            (row["backbone"], row["arm"]),
            {"backbone": row["backbone"], "metric": row["metric"], "arm": row["arm"]},
        )
        line[row["slice"].replace("_", " ")] = row["mean"]
        if row["slice"] == "overall":
            against = row.get("vs_none") or {}
            relative = against.get("relative")
            line["none %"] = None if relative is None else 100 * relative
            line["p seeds"] = against.get("p_seeds_holm")
            line["p users"] = against.get("p_users_holm")

    baselines: dict[tuple[str, str], Row] = {}
    for row in report.get("baselines", ()):
        if row["slice"] not in _SHORT:
            continue
        for metric in row.keys() - {"baseline", "slice", "users", "rows"}:
            line = {"backbone": "-", "metric": metric, "arm": row["baseline"]}
            line = baselines.setdefault((metric, row["baseline"]), line)
            line[row["slice"].replace("_", " ")] = row[metric]
    return [*shown.values(), *baselines.values()]


def short(report: Mapping[str, Any]) -> str:
    """The small table and the verdict, as the last thing that a command prints."""
    from slgr_jax.reports import tables

    protocol = report["protocol"]
    teacher = f", teacher {protocol['teacher']}" if protocol["teacher"] else ""
    title = f"in short ({protocol['data']}{teacher}, test, mean of {protocol['seeds']} seeds):"
    return "\n".join(
        [
            title,
            tables.text_table(short_rows(report)),
            *_choices(report["tuned"]),
            *_ends(report["tuned"]),
            *_still_rising(report["cost"], protocol["seeds"]),
            *short_verdict(report),
        ]
    )


def short_verdict(report: Mapping[str, Any]) -> list[str]:
    """The verdict's sentences, without its heading."""
    return [line for line in _verdict(report["verdict"])[1:] if line]


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    from slgr_jax.reports import tables

    return tables.markdown_table(rows)


# --------------------------------------------------------------------- parts of it


def _primary(protocol: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The metric that each backbone was tuned on: slices with tests, then bins without."""
    family = f"over all {protocol['tests']} tests of this kind in the report's primary metrics"
    lines: list[str] = []
    for backbone, metric in protocol["primary"].items():
        of_metric = _select(rows, backbone, metric)
        lines += [f"## {backbone}: test {metric}", "", _TESTS.format(family=family), ""]
        lines += [_table(of_metric, results.MAIN_SLICES), ""]

        bins = [row for row in of_metric if row["slice"] not in results.MAIN_SLICES]
        if bins:
            lines += [f"Bins and other slices, {metric}, without tests:", "", _wide(bins), ""]
    return lines


def _refit(protocol: Mapping[str, Any], refit: Mapping[str, Any] | None) -> list[str]:
    """The same arms on training and validation: main slices, and the baselines fitted alike."""
    if not refit:
        return []
    lines = ["# Refitted on training and validation", "", _REFIT, ""]
    if anew := protocol.get("refit_teacher"):
        lines += [f"Teachers, too: {anew}, and controls that were made of it.", ""]
    counted = {**protocol, "tests": refit["tests"]}
    lines += _primary(counted, [r for r in refit["rows"] if r["slice"] in results.MAIN_SLICES])
    return [*lines, *_baselines(refit["baselines"])]


def _select(rows: Sequence[Row], backbone: str, metric: str) -> list[Row]:
    return [row for row in rows if (row["backbone"], row["metric"]) == (backbone, metric)]


def _verdict(verdict: Row | None) -> list[str]:
    if verdict is None:
        return []
    focus, lines = verdict["focus"], ["## Verdict", ""]
    references = " and ".join(o for o in verdict["against"] if o in REFERENCES)
    for key, claim in (
        ("holds_overall", f"at least as good as {references} overall, within the interval, in"),
        ("wins_cold_or_tail", f"better than {references} for cold users or tail items in"),
    ):
        where = f" ({', '.join(verdict[key])})" if verdict[key] else ""
        lines.append(
            f"{focus} is {claim} {len(verdict[key])} of {verdict['backbones']} backbones{where}. "
        )
    lines.append("")
    for other, counts in verdict["against"].items():
        cells = counts["cells"]
        if not cells:
            continue
        lines.append(
            f"- **{focus} against {other}**: at least as good within the 95 % interval in "
            f"{len(counts['at_least'])} of {cells} cells; "
            + "; ".join(_significant(counts, word) for word in ("better", "worse"))
            + "."
        )
    note = "A cell is a backbone on all users, on cold users or on tail items. Better and worse: "
    return [*lines, "", note + "p < .05 after correction, over seeds or over users.", ""]


def _significant(counts: Mapping[str, Any], word: str) -> str:
    """`better over seeds in 2 (mf overall, mf cold_users), over users in none`."""
    parts = []
    for over in ("seeds", "users"):
        cells = counts[f"{word}_over_{over}"]
        listed = f"{len(cells)} ({', '.join(cells)})" if cells else "none"
        parts.append(f"over {over} in {listed}")
    return f"{word} " + ", ".join(parts)


# What each control is, of the arm {m} that it is matched to.
EXPLAINED: Mapping[str, str] = {
    "constant": "a constant gate on the pairs of {m}, of the mean weight that {m} gave them in its "
    "best epoch (settings of {m})",
    "shuffled": "{m} with another user's answers (settings of {m})",
    "consensus": "{m} with what the LLM names most as the teacher, the same for everybody, tuned",
    "popularity": "{m} with training popularity as the teacher, tuned",
    "item_item": "{m} with item-item similarity as the teacher, tuned",
    "ease": "{m} with EASE as the teacher, tuned",
    "ials": "{m} with iALS as the teacher, tuned",
}


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    tuned = ", ".join(f"{b} by validation {m}" for b, m in protocol["primary"].items())
    lines = [
        "## Protocol",
        "",
        f"- Tuned with seed 0: {tuned}. {_search(protocol['search'])} Trials of each tuned arm: "
        + "; ".join(
            f"{backbone} " + ", ".join(f"{arm} {n}" for arm, n in arms.items())
            for backbone, arms in protocol["budget"].items()
        )
        + ".",
        f"- Then {protocol['seeds']} seeds of each arm, which met the test part once, at the end.",
        "- Cold users, tail items and bins count training interactions only: "
        + as_text(protocol["thresholds"])
        + ".",
    ]

    controls = [arm for arm in protocol["arms"] if arm in CONTROLS]
    for arm in controls:
        lines.append(f"- Control {arm}: " + EXPLAINED[arm].format(m=protocol["matched_to"]) + ".")
    return [*lines, ""]


def _search(options: Mapping[str, Any]) -> str:
    """How every arm was searched."""
    first = "the defaults"
    if options.get("base"):
        first = "what as many trials without guidance found before (base)"
    more = (
        ", then two times a quarter as many, in wider ranges where the best is at an end"
        if options["widen"]
        else ""
    )
    return (
        f"One search for every arm: {options['trials']} trials of {options['sampler']}, sampler "
        f"seed {options['sampler_seed']}, the first at {first}{more}; of auto as many less as "
        "its second finalists are."
    )


def _half(row: Mapping[str, Any]) -> float | None:
    return None if row["low"] is None else (row["high"] - row["low"]) / 2


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line per slice and arm; the references' columns are those that some arm has."""
    shown = []
    for name in names:
        for row in (row for row in rows if row["slice"] == name):
            line = {"slice": name, "arm": row["arm"], "users": row["users"]}
            line |= {row["metric"]: row["mean"], "+-": _half(row)}
            for other in ("none", "global"):
                against = row.get(f"vs_{other}") or {}
                relative = against.get("relative")
                line[f"vs {other}"] = against.get("difference")
                line[f"{other} %"] = None if relative is None else 100 * relative
                line[f"p seeds {other}"] = against.get("p_seeds_holm")
                line[f"p users {other}"] = against.get("p_users_holm")
            shown.append(line)
    empty = [k for k in (shown[0] if shown else {}) if all(line[k] is None for line in shown)]
    return _markdown([{k: v for k, v in line.items() if k not in empty} for line in shown])


def _wide(rows: Sequence[Row]) -> str:
    """A line per slice, a column per arm."""
    arms, names = (dict.fromkeys(row[key] for row in rows) for key in ("arm", "slice"))
    means = {(row["slice"], row["arm"]): row for row in rows}
    shown = []
    for name in names:
        first = next(means[name, arm] for arm in arms if (name, arm) in means)
        line: Row = {"slice": name, "n": first.get("rows", first["users"])}
        line |= {arm: (means.get((name, arm)) or {}).get("mean") for arm in arms}
        shown.append(line)
    return _markdown(shown)


def _others(rows: Sequence[Row]) -> list[str]:
    lines = ["## Other metrics", ""]
    keys = dict.fromkeys((row["backbone"], row["metric"]) for row in rows if not row["primary"])
    for backbone, metric in keys:
        of_metric = _select(rows, backbone, metric)
        of_metric = [row for row in of_metric if row["slice"] in results.MAIN_SLICES]
        lines += [f"{backbone}, test {metric}:", "", _wide(of_metric), ""]
    return lines if keys else []


def _baselines(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    return ["## Beside them, tuned on validation, without tests", "", _markdown(rows), ""]


def _ends(tuned: Tuned) -> list[str]:
    """Whose best trial is still at an end of a range, before anybody reads the tables."""
    lines = [
        f"- {backbone} {arm}: {'; '.join(of_arm['ends'])}"
        for backbone, arms in tuned.items()
        for arm, of_arm in arms.items()
        if of_arm.get("ends")
    ]
    if not lines:
        return []
    title = "**Chosen at an end of its range**, so that a wider one may change the outcome:"
    return [title, "", *lines, ""]


def _still_rising(costs: Sequence[Row], seeds: int) -> list[str]:
    """Who was best at the last epoch: which arm learns faster says nothing of where they end."""
    lines = [
        f"- {row['backbone']} {row['arm']}: {row['best_at_the_end']} of {seeds} seeds"
        for row in costs
        if row.get("best_at_the_end")
    ]
    if not lines:
        return []
    title = "**Best at the last epoch**, so that more (--epochs) may change the outcome:"
    return [title, "", *lines, ""]


def _choices(tuned: Tuned) -> list[str]:
    """What `auto`, and controls that choose as it does, are in each seed."""
    lines = []
    for backbone, arms in tuned.items():
        for arm, of_arm in arms.items():
            chosen = [choice["variant"] for choice in of_arm.get("by_seed", ())]
            if chosen:
                text = ", ".join(f"seed {seed} {variant}" for seed, variant in enumerate(chosen))
                lines.append(f"- {arm} of {backbone} is by validation: {text}")
    return [*lines, ""] if lines else []


def _tuning(tuned: Tuned) -> list[str]:
    rows: list[Row] = []
    ranges, widened = [], []
    for backbone, arms in tuned.items():
        for arm, of_arm in arms.items():
            rows.append({"backbone": backbone, "arm": arm, **_chosen(of_arm)})
            if of_arm["tried"]:
                texts = ", ".join(f"{name} {of}" for name, of in of_arm["ranges"].items())
                ranges.append(f"- {backbone} {arm}: {texts}")
                steps = "; ".join(of_arm["widened"]) or "none"
                widened.append(f"- {backbone} {arm}: {steps}")

    lines = ["## Tuned on validation", "", _markdown(rows), ""]
    for backbone, arms in tuned.items():
        if base := next((of_arm["base"] for of_arm in arms.values() if "base" in of_arm), None):
            lines += [
                f"All searches of {backbone} began at {as_text(base['settings'])}: validation "
                f"{base['valid']:.4f}, the best of {base['trials']} trials without guidance.",
                "",
            ]
    if ranges:
        lines += ["Ranges:", "", *ranges, "", "Ranges that were widened:", "", *widened, ""]
    return lines


def _chosen(of_arm: Mapping[str, Any]) -> Row:
    """How many trials an arm had, what was chosen, and the range of what was tried."""
    settings = as_text(of_arm["chosen"])
    if "settings_of" in of_arm:
        settings += f" (those of {of_arm['settings_of']})"
    values = [row["valid"] for row in of_arm["tried"] if row["valid"] is not None]
    return {
        "trials": len(of_arm["tried"]),
        "chosen": settings,
        "worst": min(values, default=None),
        "best": max(values, default=None),
    }


def _gates(gates: Sequence[Row]) -> list[str]:
    if not gates:
        return []
    shown: dict[tuple[str, str], Row] = {}
    for gate in gates:
        for name, values in gate["slices"].items():
            line = shown.setdefault(
                (gate["backbone"], name), {"backbone": gate["backbone"], "slice": name}
            )
            line |= {f"{gate['arm']} {key}": values[key] for key in ("alpha", "right")}

    whole = [
        {key: value for key, value in gate.items() if key not in ("slices", "reliability")}
        for gate in gates
    ]
    return [
        "## Gates: alpha against the teacher",
        "",
        "auc, calibration_error: of alpha on pairs whose order is known.",
        "",
        _markdown(whole),
        "",
        "alpha: its mean; right: share of known pairs that the teacher orders correctly.",
        "",
        _markdown(list(shown.values())),
        "",
    ]
