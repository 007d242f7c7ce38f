"""Evaluated runs as tables for a terminal and for Markdown. Needs no device."""

from __future__ import annotations

import csv
import io
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slgr_jax.config import EvaluationConfig, SliceConfig
from slgr_jax.errors import ConfigError, listing
from slgr_jax.evaluation import click_metrics
from slgr_jax.evaluation.ranking_metrics import APART, DEFINITIONS, check_metric
from slgr_jax.evaluation.results import MAIN_SLICES, EvaluatedRun, thresholds
from slgr_jax.evaluation.significance import compare, holm
from slgr_jax.files import write_atomically

_PAIRED_NOTE = (
    "p: paired t-test; p_flip: sign-flip permutation test; p_holm: p corrected for the rows above "
    "(Holm); no p where fewer than {least} users differ\n"
)
# Of fewer users that differ no sign-flip test can find p < .05: 2 / 2^5 = .0625.
LEAST_DIFFERENT = 6

# ------------------------------------------------------------------------ tables


def cell(value: Any) -> str:
    """A value as tables show it: `-` where there is none, floats with four decimals."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != value:
            return "-"
        return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1000 else f"{value:.4g}"
    return str(value)


def _columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> list[str]:
    if columns is not None:
        return list(columns)
    return list(dict.fromkeys(name for row in rows for name in row))


def _numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    return all(v is None or isinstance(v, int | float | np.number) for v in values)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of dicts as a Markdown table, padded so that it reads as plain text too.

    Args:
      rows: one dict a row; a missing key or None shows as `-`, floats with four decimals.
      columns: which keys, in which order; default is every key in order of first use.
    """
    names = _columns(rows, columns)
    cells = [[cell(row.get(name)).replace("|", "\\|") for name in names] for row in rows]
    lines = _aligned(names, cells, [_numeric(rows, name) for name in names], "|")

    # The rule says how each column is aligned: `---:` of numbers.
    lengths = [len(part) for part in lines[0].strip("|").split("|")]
    rule = "|".join(
        "-" * (n - 1) + (":" if _numeric(rows, name) else "-")
        for n, name in zip(lengths, names, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of dicts as aligned columns for a terminal; arguments as for `markdown_table`."""
    names = _columns(rows, columns)
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    lines = _aligned(names, cells, [_numeric(rows, name) for name in names], "")
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _aligned(
    names: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], edge: str
) -> list[str]:
    widths = [
        max(len(name), *(len(row[i]) for row in cells)) if cells else len(name)
        for i, name in enumerate(names)
    ]
    lines = []
    for row in (names, *cells):
        padded = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        line = f" {edge} ".join(padded) if edge else "  ".join(padded).rstrip()
        lines.append(f"{edge} {line} {edge}" if edge else line)
    return lines


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of dicts as CSV, in full precision: a spreadsheet rounds by itself."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows, None), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}"})


def latex_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of dicts as a `tabular` for the package booktabs."""
    names = _columns(rows, None)
    cells = [[cell(row.get(name)).translate(_LATEX) for name in names] for row in rows]
    lines = [" & ".join(line) + r" \\" for line in ([n.translate(_LATEX) for n in names], *cells)]
    align = "".join("r" if _numeric(rows, name) else "l" for name in names)
    begin = [f"\\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def write_summary(
    rows: Sequence[Mapping[str, Any]], directory: pathlib.Path, *, title: str, note: str
) -> list[pathlib.Path]:
    """Write one small table as summary.md, between a title and a note, summary.csv, summary.tex."""
    texts = {
        ".md": f"{title}\n\n{markdown_table(rows)}\n{note}",
        ".csv": csv_table(rows),
        ".tex": latex_table(rows),
    }
    for ending, text in texts.items():
        write_atomically(directory / f"summary{ending}", text)
    return [directory / f"summary{ending}" for ending in texts]


def click_rows(runs: Sequence[EvaluatedRun], part: str) -> list[dict[str, Any]]:
    """A row per run and slice of labelled rows; rela_impr is over the first run."""
    scored = [run for run in runs if part in run.rows]
    out = []
    for name, base in scored[0].rows[part].items():
        for run in scored:
            values = run.rows[part][name]
            row = {"slice": name, "run": run.label, **values}
            if len(scored) > 1:
                auc, base_auc = values["auc"], base["auc"]
                row["rela_impr"] = None
                if run is not scored[0] and auc is not None and base_auc is not None:
                    row["rela_impr"] = click_metrics.rela_impr(auc, base_auc)
            if values["n"]:
                out.append(row)
    return out


def main_columns(ks: Sequence[int]) -> tuple[str, ...]:
    """The metrics that the printed table shows."""
    return (*(f"{name}@{k}" for k in ks for name in ("recall", "ndcg")), "mrr", "auc")


def metric_rows(
    runs: Sequence[EvaluatedRun], part: str, *, bins: bool = True
) -> list[dict[str, Any]]:
    """A row per run and slice (slice by slice, so that runs are next to each other).

    Slices that no user is in are left out; with `bins` off, so are the history and popularity
    bins.
    """
    names = dict.fromkeys(
        name
        for run in runs
        for name, values in run.parts[part].slices.items()
        if values["n"] and (bins or name in MAIN_SLICES or name in APART)
    )
    rows = []
    for name in names:
        for run in runs:
            values = run.parts[part].slices.get(name)
            if values is None:
                continue
            row: dict[str, Any] = {"slice": name}
            if len(runs) > 1:
                row["run"] = run.label
            row["n"] = values["n"]
            rows.append(row | {key: values[key] for key in main_columns(run.config.evaluation.ks)})
    return rows


def gate_rows(runs: Sequence[EvaluatedRun], *, bins: bool = True) -> list[dict[str, Any]]:
    """A row per slice and gated run: mean alpha, how often the teacher is right, pairs."""
    gated = [run for run in runs if run.gate is not None]
    names = dict.fromkeys(
        name for run in gated for name in (run.gate or {})["slices"] if bins or name in MAIN_SLICES
    )
    return [
        {"slice": name, "run": run.label} | dict(run.gate["slices"][name])
        for name in names
        for run in gated
        if run.gate is not None and name in run.gate["slices"]
    ]


def _gate_note(runs: Sequence[EvaluatedRun]) -> str:
    """What the rows of `gate_rows` are, and each gate's two numbers."""
    lines = [
        "pairs of a test item and an item the user never chose on which the teacher has a word, "
        "drawn as training draws preferences"
    ]
    for run in runs:
        if run.gate is not None:
            auc, error = run.gate["auc"], run.gate["calibration_error"]
            shown = "undefined" if auc is None else f"{auc:.3f}"
            lines.append(f"{run.label}: AUC of alpha {shown}, calibration error {error:.3f}")
    return "\n".join(lines) + "\n"


def list_rows(runs: Sequence[EvaluatedRun], part: str) -> list[dict[str, Any]]:
    """A row per run: what only `overall` has (pooled AUC, coverage, popularity)."""
    rows = []
    for run in runs:
        values = run.parts[part].slices["overall"]
        names = [name for name in values if name.startswith(("auc_", "coverage@", "mean_"))]
        rows.append({"run": run.label} | {name: values[name] for name in names})
    return rows


def paired_rows(
    runs: Sequence[EvaluatedRun], part: str, metric: str, *, resamples: int = 999
) -> list[dict[str, Any]]:
    """Each later run against the first, user by user, on the main slices and those of `APART`.

    `p_holm` corrects `p` (paired t-test) for the number of rows that are tested. A slice in which
    fewer than `LEAST_DIFFERENT` users differ between the runs is not tested: its p are None.
    """
    first = runs[0]
    rows: list[dict[str, Any]] = []
    for run in runs[1:]:
        results = (first.parts[part], run.parts[part])
        apart = [name for name in APART if all(name in result.slices for result in results)]
        for name in (*MAIN_SLICES, *apart):
            users, values = _user_values(run, part, name, metric)
            users_first, values_first = _user_values(first, part, name, metric)
            # Users of both, and where they are in each.
            shared, places, places_first = np.intersect1d(users, users_first, return_indices=True)
            if not shared.size:
                continue
            test = compare(values[places], values_first[places_first], resamples=resamples)
            different = np.sum(np.abs(values[places] - values_first[places_first]) > 0)
            tested = different >= LEAST_DIFFERENT
            rows.append(
                {
                    "slice": name,
                    "run": run.label,
                    "n": test.n,
                    "first": test.mean_b,
                    "this": test.mean_a,
                    "difference": test.difference,
                    "95% low": test.low,
                    "95% high": test.high,
                    "p": test.p_t if tested else None,
                    "p_flip": test.p_sign_flip if tested else None,
                    "p_holm": None,
                }
            )

    tested_rows = [row for row in rows if row["p"] is not None]
    adjusted = holm([row["p"] for row in tested_rows])
    for row, p_holm in zip(tested_rows, adjusted, strict=True):
        row["p_holm"] = p_holm
    return rows


def _user_values(
    run: EvaluatedRun, part: str, name: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    result = run.parts[part]
    table = result.users[name.replace("_items", "") if "_items" in name else "all"]
    mask = result.data.masks.users.get(name)
    chosen = slice(None) if mask is None else mask[table.users]
    if metric not in table.values:
        known = listing(table.values, limit=len(table.values))
        raise ConfigError(f"--metric={metric} has no value per user; choose one of: {known}")
    return table.users[chosen], table.values[metric][chosen]


def footer(run: EvaluatedRun, *, definitions: bool = True) -> str:
    """What the numbers mean: thresholds and masks, and with `definitions` the metrics'."""
    lines = ["thresholds (training counts only):"]
    facts = thresholds(run)
    lines.append(
        f"  cold users: at most {facts['cold_user_history']} training items "
        f"({facts['n_cold_users']} of {run.dataset.n_users} users)"
    )
    lines.append(
        f"  tail items: {_tail(run.config.slices)}at most "
        f"{facts['tail_item_popularity']} training users "
        f"({facts['n_tail_items']} of {run.dataset.n_items} items)"
    )
    for part, masked in facts["masked"].items():
        dropped = facts["dropped_relevant"][part]
        note = f"; {dropped} relevant pairs dropped because masked" if dropped else ""
        lines.append(f"  {part}: masks each user's {' and '.join(masked)} items{note}")
    if not definitions:
        return "\n".join(lines) + "\n"

    lines.append(f"definitions (checkpoint: {run.checkpoint}):")
    shown = {
        **(DEFINITIONS if run.parts else {}),
        **(click_metrics.DEFINITIONS if run.rows else {}),
    }
    for name, text in shown.items():
        lines += textwrap.wrap(
            f"{name}: {text}", 96, initial_indent="  ", subsequent_indent="      "
        )
    return "\n".join(lines) + "\n"


def _tail(slices: SliceConfig) -> str:
    """`the 20% least popular, ` where a share of the catalogue is the tail."""
    given = slices.thresholds
    share = given.tail_item_popularity < 0
    return f"the {given.tail_item_fraction:.0%} least popular, " if share else ""


def labels(workdirs: Sequence[str]) -> list[str]:
    """Short distinct names of runs: as few trailing path components as tell them apart."""
    parts = [pathlib.Path(os.path.abspath(workdir)).parts for workdir in workdirs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"--workdir names the same run twice: {listing(workdirs)}")


# ------------------------------------------------------------------------ everything


def choose_metric(asked: str, config: EvaluationConfig) -> str:
    """The metric to draw and to test: `asked`, or ndcg@10 (ndcg at the first cut-off without 10);
    of runs that only score rows, rows_auc.

    Raises:
      ConfigError: there is no such metric.
    """
    ks, rows = config.ks, config.rows != "none"
    default = f"ndcg@{10 if 10 in ks else ks[0]}" if config.ranking else "rows_auc"
    return check_metric(asked or default, ks, ranking=config.ranking, rows=rows)


def render(
    runs: Sequence[EvaluatedRun], metric: str, *, bins: bool = True, definitions: bool = True
) -> str:
    """The tables of every part, test first, paired tests against the first run, and what it means.

    Baselines are tested apart, so that p_holm of the runs is the same with and without them.
    `bins` off leaves history and popularity bins to the picture and to metrics.json;
    `definitions` off leaves out those of the metrics.
    """
    first = runs[0]
    families = {
        "run": [run for run in runs[1:] if run.is_run],
        "baseline": [run for run in runs[1:] if run.baseline is not None],
    }
    splits = {run.dataset.manifest.split_hash for run in runs}
    comparable = len(splits) == 1

    out = []
    for part in sorted(first.parts):  # test before validation
        ranked = [run for run in runs if part in run.parts]  # a refit has no validation
        out += [
            f"{part}: full ranking, mean over users",
            text_table(metric_rows(ranked, part, bins=bins)),
            f"{part}: the lists of all users",
            text_table(list_rows(ranked, part)),
        ]
        for family, others in families.items():
            tested = [first, *(run for run in others if part in run.parts)]
            rows = paired_rows(tested, part, metric) if comparable else []
            if rows:
                out += [
                    f"{part}: {metric} user by user, each {family} minus {first.label}",
                    text_table(rows) + _PAIRED_NOTE.format(least=LEAST_DIFFERENT),
                ]
        out += _blend_lines(runs, part, metric)
    for part in sorted(first.rows):
        out += [f"{part}: labelled rows", text_table(click_rows(runs, part))]

    if rows := gate_rows(runs, bins=bins):
        out += [
            "test: how far the gate believed the teacher, and how often it was right",
            text_table(rows) + _gate_note(runs),
        ]
    if not comparable:
        out.append("no paired tests: the runs were trained on different splits\n")
    refits = [run.label for run in runs if run.baseline is None and run.config.train.refit]
    if refits:
        out.append(f"trained on validation too, so ranked on test alone: {listing(refits)}\n")
    out += [_settings_line(run) for run in runs if run.baseline is not None]
    return "\n".join([*out, footer(first, definitions=definitions)])


def blend_rows(runs: Sequence[EvaluatedRun], part: str, metric: str) -> list[dict[str, Any]]:
    """Each run with a teacher's lists added against that run without, as in `paired_rows`; Holm's
    correction is over all of them."""
    by_label = {run.label: run for run in runs}
    rows = [
        row
        for run in runs
        if run.blend is not None
        for row in paired_rows([by_label[run.blend["run"]], run], part, metric)
    ]
    tested = [row for row in rows if row["p"] is not None]
    for row, p_holm in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p_holm
    return rows


def _blend_lines(runs: Sequence[EvaluatedRun], part: str, metric: str) -> list[str]:
    rows = blend_rows(runs, part, metric)
    if not rows:
        return []
    weights = ", ".join(f"{r.label}: w {r.blend['weight']:.4g}" for r in runs if r.blend)
    optimistic = "; w was chosen on this part" if part == "valid" else ""
    return [
        f"{part}: {metric} user by user, score + w / rank in the teacher's list minus score alone",
        f"{text_table(rows)}{weights}, by validation{optimistic}\n",
    ]


def _settings_line(run: EvaluatedRun) -> str:
    """What a baseline was given, and how that was chosen."""
    assert run.baseline is not None
    text = ", ".join(f"{name} {value:g}" for name, value in run.baseline["settings"].items())
    tried = len(run.baseline["tried"])
    why = f", the best of {tried} by {run.baseline['tuned_on']}" if tried else ""
    why += ", fitted on training and validation" if run.dataset.as_split else ""
    return f"baseline {run.label}: {text or 'no settings'}{why}\n"
