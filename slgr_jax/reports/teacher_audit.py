"""The report on a teacher: report.md, report.json and report.png (`slgr teach report`)."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from slgr_jax.config import BaselineConfig, ReportConfig, SliceConfig
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import InputError
from slgr_jax.evaluation.ranking_metrics import bins
from slgr_jax.files import atomically
from slgr_jax.reports import added_value, teacher_recommendation
from slgr_jax.reports.plots import COLORS
from slgr_jax.reports.tables import markdown_table, text_table
from slgr_jax.teacher.audit import accuracy as accuracy_lib
from slgr_jax.teacher.audit import consistency
from slgr_jax.teacher.audit.accuracy import FEWEST_USERS, Agreement, TeacherAudit
from slgr_jax.teacher.collect import answer_log
from slgr_jax.teacher.products import preferences

MARKDOWN, JSON, PICTURE = "report.md", "report.json", "report.png"
_FREE = BaselineConfig()
_ADDED = """\
Validation NDCG@10 of recommenders that cost nothing, *alone* and with w / rank in the teacher's
list *added* to their scores. Each user's w was chosen by the other half of the users; *w* is that
of all of them. [low, high] is the 95 % interval of the gain over users. Users without a list count,
with a gain of 0."""
_KNOWN = {
    "held-in": "training items that had been hidden from the teacher",
    "validation": "validation items",
}
_HOW = f"""\
A known pair is an item that the user chose (training items that had been hidden from the teacher,
or validation items) beside one without a training or validation interaction. Accuracy is the share
of the known pairs that are ordered right: pairs count alike, so that random answers, free lists
too, come to one half. [low, high] is its 95 % interval, over users. Beside it, on the very same
pairs: *popularity* (more training users) and *item-item* (cosines with the user's training items;
a hidden item is scored as if the user had not chosen it), where a tie counts one half. *gain* is
accuracy - item-item, with the interval of the paired difference. Believed are slices of
{FEWEST_USERS} users or more where the whole intervals are above one half and above a gain of 0:
about one slice in forty gains by chance alone. Cold, tail, history and popularity count training
interactions; items are those that were chosen. Matched pairs are of two items neither of which is
more than 1.5 times as popular as the other; slices of items by popularity are believed on matched
pairs only, as on the others a coin beats whatever knows that few choose an unpopular item. What
users did not choose they may still like: accuracies compare, they do not certify."""


def make(
    dataset: Dataset,
    name: str,
    options: ReportConfig,
    *,
    prices: tuple[float, float],
    seed: int,
    free: BaselineConfig = _FREE,
) -> TeacherAudit:
    """Measure the product `name`, with its answer log DATA/answers/NAME where there is one.

    Args:
      prices: money per million prompt tokens, per million answer tokens.
      free: the recommenders that its lists are added to.

    Raises:
      ManifestError, ShardError: there is no such product, or it or the log cannot be used.
    """
    teacher = preferences.load(dataset, name)
    answers = cost = None
    root = answer_log.log_path(dataset.path, name)
    if root.is_dir():
        rows, log = answer_log.load_log(dataset, name)
        if not answer_log.is_free(log):  # which shows nothing in an order
            answers = consistency.measure(rows)
        cost = _cost(root / answer_log.LEDGER, prices)

    slices = SliceConfig()
    audit = accuracy_lib.measure(
        dataset,
        teacher,
        history_bins=bins("history", slices.history_bins),
        popularity_bins=bins("popularity", slices.popularity_bins),
        most_pairs=options.known_negatives,
        most_users=options.known_users,
        seed=seed,
        answers=answers,
        cost=cost,
    )
    value = added_value.measure(dataset, teacher, free, seed=seed)
    return dataclasses.replace(audit, value=value)


def _cost(path: pathlib.Path, prices: tuple[float, float]) -> accuracy_lib.Cost | None:
    if not path.is_file():
        return None
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        paid = [ledger["accepted"], ledger["quarantined"]]
        tokens = [sum(int(usage[f"{kind}_tokens"]) for usage in paid) for kind in _TOKENS]
        return accuracy_lib.Cost(
            answers=int(paid[0]["answers"]),
            unusable=int(paid[1]["answers"]),
            untold=int(paid[0]["without_usage"]),
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            money=sum(price * count for price, count in zip(prices, tokens, strict=True)) / 1e6,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; run slgr teach collect again") from error


_TOKENS = ("prompt", "completion")


def write(audit: TeacherAudit, out: str | pathlib.Path) -> list[pathlib.Path]:
    """Write the three files into the folder `out`; returns their paths."""
    root = pathlib.Path(out)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={root} cannot be made: {error.strerror}") from error
    text, data = markdown(audit), json.dumps(as_json(audit), indent=2, allow_nan=False) + "\n"
    return [
        atomically(root / MARKDOWN, lambda path: path.write_text(text, encoding="utf-8")),
        atomically(root / JSON, lambda path: path.write_text(data, encoding="utf-8")),
        atomically(root / PICTURE, lambda path: draw(audit, path)),
    ]


# --- words and tables ----------------------------------------------------------------------------


def verdict(audit: TeacherAudit) -> list[str]:
    """What the numbers say, in sentences; the first says whether to believe the teacher at all."""
    rows = [row for row in audit.agreement if row.known == audit.deciding]
    if not rows:
        return [
            "Nothing is known about its correctness: it orders no pair of a validation item (or a "
            "hidden training item) and another item. Ask it about calibration candidates "
            "(slgr teach candidates).",
            *_rest(audit),
        ]

    believed = [row for row in rows if row.believed]
    lines = []
    if believed:
        shown = "; ".join(f"{row.name} ({_gain(row)}, {row.users:,} users)" for row in believed)
        lines.append(f"Believe it on: {shown}. Elsewhere it knows no more than the data.")
    else:
        lines.append(
            "Believe it nowhere beyond what the data know: on no slice does it beat item-item."
        )

    total = rows[0]
    lines.append(
        f"Tested on {_KNOWN[audit.deciding]}: {total.accuracy:.1%} of {total.pairs:,} known "
        f"pairs of {total.users:,} users are right [{total.low:.1%}, {total.high:.1%}]; "
        f"popularity gets {total.popularity:.1%}, item-item {total.item_item:.1%}."
    )
    wrong = [row.name for row in rows if row.tells and row.high < 0.5]
    if wrong:
        where = "overall" if "all" in wrong else f"on: {'; '.join(wrong)}"
        lines.append(f"It is wrong more often than right {where}.")

    if audit.deciding == "validation" and audit.manifest.unlisted != "below":
        lines.append(
            "These answers may be easier or harder than those it was asked for; calibration "
            "candidates (slgr teach candidates) test it on hidden training items."
        )
    return [*lines, *_rest(audit)]


def _gain(row: Agreement) -> str:
    return f"{row.gain:+.1%} [{row.gain_low:+.1%}, {row.gain_high:+.1%}] over item-item"


def _rest(audit: TeacherAudit) -> list[str]:
    share = {row.slice: row.covered / row.total for row in audit.coverage}
    rest = ("users", "cold users", "items", "tail items")
    lines = [] if audit.value is None else added_value.said(audit.value)
    lines.append(
        "It has something to say on "
        + ", ".join(f"{share[name]:.0%} of {name}" for name in rest if name in share)
        + "."
    )

    answers, cost = audit.answers, audit.cost
    if answers is not None and answers.both_orders:
        lines.append(
            f"Of {answers.both_orders:,} pairs asked both ways round, "
            f"{answers.same_both_orders:.1%} got the same answer; being shown first is "
            f"worth {answers.bias:+.1%}."
        )
    if answers is not None and answers.list_pairs:
        lines.append(
            f"Of {answers.list_pairs:,} pairs in lists asked in several orders, "
            f"{answers.same_in_lists:.1%} kept their order; from first to last place a score moves "
            f"by {answers.place_slope:+.2f} standard deviations."
        )

    if cost is not None:
        money = f", {cost.money:,.2f} in money" if cost.money else ""
        lines.append(
            f"It cost {cost.prompt_tokens:,} prompt and {cost.completion_tokens:,} answer tokens"
            f"{money}, for {cost.answers:,} answers ({cost.unusable:,} more could not be used)."
        )
    return lines


def agreement_table(audit: TeacherAudit, known: str) -> list[dict[str, Any]]:
    """Rows for `text_table` and `markdown_table`."""
    return [
        {
            "slice": row.name,
            "pairs": row.pairs,
            "users": row.users,
            "accuracy": row.accuracy,
            "low": row.low,
            "high": row.high,
            "popularity": row.popularity,
            "item-item": row.item_item,
            "gain": row.gain,
            "gain low": row.gain_low,
            "gain high": row.gain_high,
            "believe": "yes" if row.believed else "",
        }
        for row in audit.agreement
        if row.known == known
    ]


def coverage_table(audit: TeacherAudit) -> list[dict[str, Any]]:
    """Rows for `text_table` and `markdown_table`."""
    return [
        {"slice": r.slice, "of": r.total, "covered": r.covered, "share": r.covered / r.total}
        for r in audit.coverage
    ]


def terminal(audit: TeacherAudit) -> str:
    """The verdict, the main table and what to do."""
    lines = [*verdict(audit)]
    if audit.deciding:
        lines += ["", f"known pairs of {_KNOWN[audit.deciding]}:"]
        lines.append(text_table(agreement_table(audit, audit.deciding)))
    if audit.value is not None:
        lines += ["", "validation NDCG@10 of score + w / rank in its list, cross-fitted:"]
        lines.append(text_table(added_value.table(audit.value)))
    return "\n".join([*lines, "", *teacher_recommendation.recommend(audit)])


def markdown(audit: TeacherAudit) -> str:
    """The whole report."""
    manifest = audit.manifest
    parts = [f"# How accurate is the teacher {manifest.name}?"]
    said = [*verdict(audit), *teacher_recommendation.recommend(audit)]
    parts.append("\n".join(f"- {line}" for line in said))
    parts.append(f"![accuracy and coverage by slice]({PICTURE})")

    for known in dict.fromkeys(row.known for row in audit.agreement):
        parts.append(f"## Agreement with {_KNOWN[known]}")
        parts.append(
            f"It orders {audit.ordered[known]:.1%} of the known pairs that were looked at."
        )
        parts.append(markdown_table(agreement_table(audit, known)).rstrip())

    if audit.value is not None:
        table = markdown_table(added_value.table(audit.value)).rstrip()
        parts += ["## Added when scoring", _ADDED, table]
    parts += ["## Coverage", markdown_table(coverage_table(audit)).rstrip()]
    if audit.answers is not None and (audit.answers.pairs or audit.answers.twice_listed):
        rows = [
            {"fact": name.replace("_", " "), "value": value}
            for name, value in dataclasses.asdict(audit.answers).items()
        ]
        parts += ["## Asked twice", markdown_table(rows).rstrip()]

    counts = [{"count": name.replace("_", " "), "": n} for name, n in manifest.counts.items() if n]
    parts += ["## What the product is", f"```\n{preferences.report(manifest)}\n```"]
    parts += ["Duplicates, contradictions and whatever else was counted:"]
    parts += [markdown_table(counts).rstrip(), "## How to read this", _HOW]
    return "\n\n".join(parts) + "\n"


def as_json(audit: TeacherAudit) -> dict[str, Any]:
    """Everything in the report; null where there is no value."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    data = dataclasses.asdict(audit)
    del data["manifest"]["files"]
    for row, agreement in zip(data["agreement"], audit.agreement, strict=True):
        row["believed"] = agreement.believed
    verdicts = {"verdict": verdict(audit), "deciding": audit.deciding}
    verdicts["recommendation"] = teacher_recommendation.recommend(audit)
    return verdicts | {key: plain(value) for key, value in data.items()}


# --- the picture ---------------------------------------------------------------------------------


def draw(audit: TeacherAudit, path: str | pathlib.Path) -> None:
    """Accuracy by slice with its interval, beside both baselines; coverage by slice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in audit.agreement if row.known == audit.deciding]
    height = 1.6 + 0.27 * max(len(rows), len(audit.coverage))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)

    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    if rows:
        _draw_agreement(left, rows)
        left.set_title(f"known pairs of {_KNOWN[audit.deciding]}: share ordered right", fontsize=10)
    else:
        left.set_axis_off()
        left.text(0.5, 0.5, "no pair whose right order is known", ha="center")

    shares = [row.covered / row.total for row in audit.coverage]
    places = np.arange(len(shares))
    right.barh(places, shares, 0.7, color=COLORS[4], zorder=2)
    _finish(right, [f"{row.slice} (n = {row.total:,})" for row in audit.coverage])
    right.set_title("covered: the teacher has something to say", fontsize=10)
    right.set_xlim(0, 1)

    figure.suptitle(f"{audit.manifest.name} on {audit.manifest.dataset}: {_short(audit)}")
    figure.savefig(path, dpi=150)


def _short(audit: TeacherAudit) -> str:
    if not audit.deciding:
        return "nothing is known about its correctness"
    count = sum(row.believed for row in audit.agreement if row.known == audit.deciding)
    return (
        f"beats item-item on {count} slice{'s' * (count > 1)}"
        if count
        else "nowhere beyond what the data know"
    )


def _draw_agreement(axis: Any, rows: Sequence[Agreement]) -> None:
    places = np.arange(len(rows))
    accuracy = np.array([row.accuracy for row in rows])
    ends = np.array([[row.low, row.high] for row in rows])
    ends = np.where(np.isnan(ends), accuracy[:, None], ends)
    around = np.abs(ends - accuracy[:, None]).T

    axis.errorbar(
        accuracy, places, xerr=around, fmt="o", color=COLORS[0], label="teacher, 95 %", zorder=4
    )
    for values, color, mark, label in (
        ([row.popularity for row in rows], COLORS[1], "|", "popularity"),
        ([row.item_item for row in rows], COLORS[2], "D", "item-item"),
    ):
        axis.scatter(values, places, 40, color, marker=mark, label=label, zorder=3)
    for place, row in zip(places, rows, strict=True):
        if row.believed:
            axis.axhspan(place - 0.45, place + 0.45, color="0.9", zorder=0)

    axis.axvline(0.5, color="0.6", linewidth=1, zorder=1)
    _finish(axis, [f"{row.name} (n = {row.users:,})" for row in rows])
    axis.set_xlim(-0.02, 1.02)
    axis.legend(loc="lower left", fontsize=8)


def _finish(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(np.arange(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", color="0.88", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
