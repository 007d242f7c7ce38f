"""docs/results.md from the JSON files of benchmarks/results.

    python benchmarks/results_page.py

audit_*.json are reports of quality/audit_controls.py, confirmation.json of quality/confirm.py
(confirmation_first.json, _second.json by the first editions of its protocol), table3.json of
quality/paper_tables.py, all_methods.json of quality/all_methods.py, reproduction.json of
quality/reproduce.py. No number of the page is written by hand; a test holds the page to the files.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
LEVEL = 0.05
# What a reader calls a data set of the audit.
NAMES: Mapping[str, str] = {
    "facebook_book": "Facebook Books",
    "hetrec2011_lastfm_2k": "Last.fm",
    "ml_small_2018": "ml-latest-small",
}
SLICES: Mapping[str, str] = {
    "overall": "all users",
    "cold_users": "cold users",
    "tail_items": "tail items",
}
METHOD = "llm"
# Arms of an audit that hold this LLM's word on this user: no controls.
WITH_LLM = (METHOD, "global", "no_echo")
ARM_NAMES: Mapping[str, str] = {
    "none": "no guidance",
    "none_train_valid": "no guidance, trained on train + validation",
    "global": "the LLM's lists, believed everywhere",
    METHOD: "the LLM's lists, through the gate",
    "no_echo": "the same without a user's own training items",
    "ease": "EASE's lists as the teacher",
    "consensus": "one list for everybody: what the LLM names most",
    "training_items": "hard negatives without any teacher",
    "popular": "most popular",
    "EASE itself": "EASE",
    "EASE, train + validation": "EASE on train + validation",
}


def page(
    audits: Sequence[Mapping[str, Any]],
    confirmations: Sequence[Mapping[str, Any]],
    table3: Mapping[str, Any] | None,
    all_methods: Mapping[str, Mapping[str, Any]],
    reproductions: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page in Markdown."""
    parts = (
        _survives(audits),
        _audits(audits),
        _confirmed(confirmations),
        _table3(table3),
        _all_methods(all_methods),
        _reproductions(reproductions),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def number(value: float | None, *, sign: bool = False) -> str:
    """`.0650`, `+.0127`; empty for None."""
    if value is None:
        return ""
    text = f"{abs(value):.4f}".removeprefix("0")
    mark = "-" if value < 0 else "+" if sign else ""
    return f"{mark}{text}"


def gain(audit: Mapping[str, Any], slice_name: str) -> dict[str, Any]:
    """What the method gains on the best control of an audit, in one slice.

    best: the control that it gains least on. low, high: the 95 % interval of that difference over
    users, from its p: difference -+ 1.96 |difference| / z, z the normal quantile of p (hundreds of
    users). p: the greatest over all controls, corrected by Holm over the audit; 1 where one of
    them is above the method.
    """
    rows = {row["arm"]: row for row in audit["rows"]}
    tests = {
        arm: row["llm_minus_this"][slice_name]
        for arm, row in rows.items()
        if arm not in WITH_LLM and slice_name in row["llm_minus_this"]
    }
    best = min(tests, key=lambda arm: tests[arm]["difference"])
    difference, p = tests[best]["difference"], tests[best]["p_users"]
    normal = statistics.NormalDist()
    z = -normal.inv_cdf(p / 2) if p and p < 1 else None
    half = normal.inv_cdf(1 - LEVEL / 2) * abs(difference) / z if z else None
    control = rows[best]["mean"][slice_name]
    return {
        "best": best,
        "method": rows[METHOD]["mean"][slice_name],
        "control": control,
        "difference": difference,
        "relative": difference / control if control else None,
        "low": None if half is None else difference - half,
        "high": None if half is None else difference + half,
        "p": max(
            1.0 if test["difference"] <= 0 else test["p_users_holm"] for test in tests.values()
        ),
    }


def verdict(difference: float, p: float) -> str:
    """yes, no (the control is above), or not shown."""
    if difference <= 0:
        return "no"
    return "yes" if p < LEVEL else "not shown"


_INTRODUCTION = """\
# Results

Made from `benchmarks/results/*.json` by `python benchmarks/results_page.py`; how to make those:
[repeat our numbers](repeat.md). NDCG@10 over the whole catalogue, test part.

## What survives

The LLM's lists through the gate against the best that does without this LLM's word on this user (no
guidance, also on train + validation; EASE, likewise; hard negatives without a teacher; EASE's lists
as the teacher; one list for everybody). The interval is over users, of the difference from the best
control; p is the greatest over all controls, corrected by Holm. The LLM's rows are trained on the
training part alone: validation taught the gate. These are the data sets that the arms were designed
on, so the intervals are optimistic.

| data | slice | method | best control | gain | 95 % | p | survives |
|---|---|---:|---|---:|---|---:|---|
"""


def _survives(audits: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield from _INTRODUCTION.splitlines()
    for audit in audits:
        for name, shown in SLICES.items():
            facts = gain(audit, name)
            relative = "" if facts["relative"] is None else f" ({facts['relative']:+.1%})"
            yield _row(
                NAMES[audit["data"]],
                shown,
                number(facts["method"]),
                f"{ARM_NAMES[facts['best']]}, {number(facts['control'])}",
                f"{number(facts['difference'], sign=True)}{relative}",
                _interval(facts["low"], facts["high"]),
                f"{facts['p']:.2g}",
                verdict(facts["difference"], facts["p"]),
            )
    yield ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{number(low, sign=True)} to {number(high, sign=True)}"


def _audits(audits: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Every row"
    yield ""
    yield "Mean over seeds, standard deviation in brackets."
    for audit in audits:
        protocol = audit["protocol"]
        yield from ("", f"### {NAMES[audit['data']]}", "")
        yield (
            f"Teacher {protocol['teacher']}, through `{protocol['method']}`, {protocol['seeds']} "
            f"seeds, {protocol['recommender']}; split {audit['split_hash'][:12]}."
        )
        yield from ("", _row("", *SLICES.values()), "|---|" + "---:|" * len(SLICES))
        for row in audit["rows"]:
            setting = f" ({row['setting']})" if row["setting"] else ""
            cells = (
                number(row["mean"][name])
                + (f" ({number(row['sd'][name])})" if row["seeds"] > 1 else "")
                for name in SLICES
            )
            yield _row(f"{ARM_NAMES[row['arm']]}{setting}", *cells)
    yield ""


def _confirmed(confirmations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("## Confirmation", "")
    yield "Data that no choice was made on, by [PROTOCOL.md](../benchmarks/PROTOCOL.md), which was"
    yield "fixed before. Runs are refitted on training and validation. A gain of AUC is that of all"
    yield "rows together; its interval and p are of each user's own AUC."
    if not confirmations:
        yield "Not run yet."
    for facts in confirmations:
        edition = facts.get("edition", 1)
        yield from ("", f"### Edition {edition}", "")
        yield f"Scale: {facts['scale']}, {facts['seeds']} seeds, {facts['users']:.0%} of the users."
        for result in facts["results"]:
            yield from _cell(result)
        yield from ("", f"Cut for want of time: {'; '.join(facts['cut']) or 'nothing'}.")


def _cell(result: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"#### {result['cell']}", "")
    chosen = ", ".join(result.get("chosen", ()))
    by_seed = f" ({chosen} by seed)" if chosen else ""
    yield f"Validation chose `{result['method']}`{by_seed}. Split {result['split_hash'][:12]}."
    yield ""
    yield "| question | best control | gain | 95 % over users | p | survives |"
    yield "|---|---|---:|---|---:|---|"
    for question, test in result["tests"].items():
        if test is None:
            yield _row(question, "none was run", "", "", "", "")
            continue
        yield _row(
            question,
            f"`{test['best']}`",
            number(test["difference"], sign=True),
            _interval(test["low_users"], test["high_users"]),
            f"{test['p_users_holm']:.2g}",
            verdict(test["difference"], test["p_users_holm"]),
        )
    columns = list(next(iter(result["means"].values())))
    yield from ("", _row("arm", *columns), "|---|" + "---:|" * len(columns))
    for arm, means in result["means"].items():
        yield _row(f"`{arm}`", *(number(means[column]) for column in columns))


def _table3(facts: Mapping[str, Any] | None) -> Iterator[str]:
    yield from ("", "## The paper's table 3", "")
    yield "AUC of labelled test rows, DCNv2: printed numbers beside ours, whose teacher is another"
    yield "([how](repeat.md)). Ours are comparable with each other, not with the printed."
    if facts is None:
        yield "Not run yet."
        return
    yield ""
    columns = [column for column in facts["rows"][0] if not column.endswith("+-")]
    yield from (_row(*columns), "|---|---|---|" + "---:|" * (len(columns) - 3))
    for row in facts["rows"]:
        yield _row(
            *(row[name] for name in columns[:3]),
            *(
                number(row[name])
                + (f" ± {number(spread)}" if (spread := row.get(f"{name} +-")) else "")
                for name in columns[3:]
            ),
        )
    yield ""
    for cell, found in facts["found"].items():
        yield from (f"{cell}:", "", *found, "")
    yield f"`{' '.join(facts['flags'])}`. Cut: {'; '.join(facts['cut']) or 'nothing'}."


_SCREENED = """\
## All methods

Every arm that fits, tuned alike (the same trials of one search, begun at the same base), refitted
on training and validation, test part ([how](repeat.md)). *Gain*: over the best of what does without
this LLM's word on this user, its p the greatest over all of them. *Selecting*: over the same
believed everywhere. p over users, corrected by Holm over the arms of a table; NDCG@10, of tail
items NDCG@100.
A screening: few trials, two seeds, on data that arms were designed on.
"""


def _all_methods(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", *_SCREENED.splitlines())
    if not tables:
        yield "Not run yet."
    for facts in tables.values():
        yield from ("", *screened(facts))


def screened(facts: Mapping[str, Any]) -> Iterator[str]:
    """A data set of quality/all_methods.py: arms by validation, the best first, controls below."""
    yield f"### {NAMES.get(facts['data'], facts['data'])}, {facts['backbone']}"
    yield ""
    vectors = f", vectors {facts['vectors']}" if facts["vectors"] else ""
    yield (
        f"Teacher {facts['teacher']}{vectors}; {facts['trials']} trials an arm, {facts['seeds']} "
        f"seeds; split {facts['split_hash'][:12]}."
    )
    yield ""
    gains = [f"gain, {shown}" for shown in SLICES.values()]
    yield _row("arm", "validation", *SLICES.values(), *gains, "selecting")
    yield "|---|" + "---:|" * (2 + 2 * len(SLICES))
    by_overall = sorted(facts["arms"].items(), key=lambda of: -of[1]["means"]["overall"])
    for is_control in (False, True):
        for arm, of_arm in by_overall:
            if of_arm["control"] is not is_control:
                continue
            shown = f"`{arm}`" + (", a control" if is_control else "")
            over = of_arm.get("over_controls", {})
            yield _row(
                shown,
                number(of_arm["valid"]),
                *(number(of_arm["means"][name]) for name in SLICES),
                *(_gained(over.get(name)) for name in SLICES),
                _gained(of_arm.get("selection", {}).get("overall")),
            )
    yield ""
    best = {of["over_controls"]["overall"]["best"] for _, of in by_overall if not of["control"]}
    yield f"The best control overall: {', '.join(f'`{arm}`' for arm in sorted(best))}."
    for baseline in facts["baselines"]:
        if baseline["slice"] == "overall":
            yield f"{baseline['baseline']}: {number(baseline['ndcg@10'])}."


def _gained(test: Mapping[str, Any] | None) -> str:
    """`+.0012 (p .03)`; empty where nothing was tested."""
    if test is None:
        return ""
    p = test["p_users_holm"]
    told = "" if p is None else f" (p {number(p)})" if p >= 1e-4 else " (p < 1e-4)"
    return f"{number(test['difference'], sign=True)}{told}"


def _reproductions(reproductions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", "## Printed numbers of others", "")
    yield "Papers whose repositories ship their split, and products where there are any: what they"
    yield "print / what the same arms come to here, test part ([how](repeat.md)). `-`: not printed."
    for facts in reproductions.values():
        yield from ("", *reproduced(facts))


def reproduced(facts: Mapping[str, Any]) -> Iterator[str]:
    """A target of quality/reproduce.py: printed beside ours, what is gained, what differs."""
    columns, rows = facts["columns"], facts["rows"]
    seeds = max(len(of_seeds) for row in rows for of_seeds in row["ours"].values())
    yield from (f"### {facts['title']}", "")
    yield f"github.com/{facts['repository']}; {facts['source']}."
    yield f"Split {facts['split_hash'][:12]}, {seeds} seed{'s' * (seeds != 1)}."
    yield from ("", _row("", *columns), "|---|" + "---:|" * len(columns))
    for row in rows:
        cells = (_both(row["printed"].get(name), _mean(row["ours"][name])) for name in columns)
        yield _row(row["title"], *cells)
    yield from ("", _row("gain", "of", "printed / ours"), "|---|---|---:|")
    for of in facts["gains"]:
        both = _both(of["printed"], of["ours"], sign=True)
        yield _row(of["question"], of["column"], both)
    yield from ("", *(f"- *Differs:* {text}" for text in facts["differs"]))
    if facts["cut"]:
        yield f"- *Cut for want of time:* {'; '.join(facts['cut'])}."


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _both(printed: float | None, ours: float | None, *, sign: bool = False) -> str:
    return f"{number(printed, sign=sign) or '-'} / {number(ours, sign=sign) or '-'}"


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read() -> str:
    """The page of what is committed."""
    audits = [json.loads((RESULTS / f"audit_{name}.json").read_text(encoding="utf-8"))
              for name in ("books", "lastfm", "ml")]  # fmt: skip
    editions = map(
        _read,
        (
            "confirmation.json",
            "confirmation_second.json",
            "confirmation_first.json",
        ),
    )
    confirmed = [facts for facts in editions if facts]
    return page(
        audits,
        confirmed,
        _read("table3.json"),
        _read("all_methods.json") or {},
        _read("reproduction.json") or {},
    )


if __name__ == "__main__":
    PAGE.write_text(read(), encoding="utf-8")
    print(f"wrote {PAGE}")
