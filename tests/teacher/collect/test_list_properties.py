"""Whatever the dress and the prompt: the truth is read, or the answer is refused with a reason;
another order never comes out.

A dress is a function (label -> score, label -> title) -> text. `SCORES` are of prompts that ask
for scores, `ORDERS` of those that ask for an order; each is also tried on the other prompt.
"""

from __future__ import annotations

import json
import pathlib
import random
import re

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from teacher.collect.reading import parse

from slgr_jax.teacher.ask.prompts import label
from slgr_jax.teacher.collect.refusals import KINDS, Refused

many = hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
TITLES = (
    "Heat (1995) (Action, Crime)", "M (1931)", "2001: A Space Odyssey (1968)", "I, Robot (2004)",
    "Up (2009)", "Seven > Eight", "Mission: 2", "10", "Final Destination 3 (2006)", "B (2010)",
    "Plan A: 0.1", "Se7en - The Return, Part 2", "Sorry, Wrong Number (1948)", "Borat 5/10",
    "No. 1 (First Draft)", "½ a Life", "Actually, Love", "A", "Low", "99% Perfect",
    "The Worst to Best | Movie",
)  # fmt: skip


def rows(form):
    return lambda scores, titles: "\n".join(form(a, s, titles[a]) for a, s in scores.items())


def best_first(scores):
    return sorted(scores, key=lambda a: -scores[a])


def comma(score):
    return str(score).replace(".", ",")


def bold(label_, score):
    return f"**{label_}**: **{score}**"


def chain(labels):
    return " > ".join(labels)


def lines(scores, titles):
    return "\n".join(f"{a}: {s}" for a, s in scores.items())


def halved(scores):
    return dict.fromkeys(scores, 0.5)


def reversed_scores(scores):
    return {a: round(1 - s, 2) for a, s in scores.items()}


SCORES = {
    "json": lambda s, t: json.dumps(s),
    "json and prose": lambda s, t: f"Sure, here are 2 things: {json.dumps(s)} Enjoy!",
    "fenced": lambda s, t: f"Scores:\n```json\n{json.dumps(s, indent=1)}\n```\nHope this helps.",
    "objects": lambda s, t: json.dumps({a: {"score": v, "year": 1995} for a, v in s.items()}),
    "rows": lambda s, t: json.dumps([{"year": 3, "label": a, "score": v} for a, v in s.items()]),
    "rows of titles": lambda s, t: json.dumps([{"title": t[a], "score": v} for a, v in s.items()]),
    "a row a line": rows(lambda a, v, t: json.dumps({"label": a, "title": t, "score": v})),
    "an object a line": rows(lambda a, v, t: json.dumps({a: v})),
    "parallel": lambda s, t: json.dumps({"labels": list(s), "scores": list(s.values())}),
    "order beside": lambda s, t: json.dumps({"ranking": list(s), "scores": s}),
    "reasoning beside": lambda s, t: json.dumps({"reasoning": "A: 0.9, B > A", "scores": s}),
    "draft beside": lambda s, t: json.dumps({"draft": reversed_scores(s), "final": s}),
    "python": lambda s, t: str(s),
    "python pairs": lambda s, t: str(list(s.items())),
    "text in json": lambda s, t: json.dumps({a: str(v) for a, v in s.items()}),
    "comma in json": lambda s, t: json.dumps({a: comma(v) for a, v in s.items()}),
    "percent in json": lambda s, t: json.dumps({a: f"{v:.0%}" for a, v in s.items()}),
    "titles": lambda s, t: json.dumps({t[a]: v for a, v in s.items()}),
    "label and title": lambda s, t: json.dumps({f"{a}. {t[a]}": v for a, v in s.items()}),
    "colon": rows(lambda a, v, t: f"{a}: {v}"),
    "equals": lambda s, t: ", ".join(f"{a} = {v}" for a, v in s.items()),
    "dash": rows(lambda a, v, t: f"{a} - {v}"),
    "long dash": rows(lambda a, v, t: f"{a} — {v}"),
    "short dash": rows(lambda a, v, t: f"{a} – {v}"),
    "full width": rows(lambda a, v, t: f"{a}：{v}"),
    "arrow": rows(lambda a, v, t: f"{a} → {v}"),
    "tab": rows(lambda a, v, t: f"{a}\t{v}"),
    "space": rows(lambda a, v, t: f"{a} {v}"),
    "brackets": rows(lambda a, v, t: f"[{a}] {v}"),
    "parentheses": rows(lambda a, v, t: f"{a} ({v})"),
    "bold": rows(lambda a, v, t: bold(a, v)),
    "bullets": rows(lambda a, v, t: f"- {bold(a, v)}"),
    "numbered": rows(lambda a, v, t: f"{ord(a[-1]) % 9}. {a}: {v}"),
    "lower": rows(lambda a, v, t: f"{a.lower()}: {v}"),
    "leading dot": rows(lambda a, v, t: f"{a}: {str(v).removeprefix('0')}"),
    "percent": rows(lambda a, v, t: f"{a}: {v:.0%}"),
    "percent word": rows(lambda a, v, t: f"{a} = {round(v * 100)} percent"),
    "comma": rows(lambda a, v, t: f"{a}: {comma(v)}"),
    "of a hundred": rows(lambda a, v, t: f"{a}: {round(v * 100)}/100"),
    "out of a hundred": rows(lambda a, v, t: f"{a} - {round(v * 100)} out of 100"),
    "twice": rows(lambda a, v, t: f"{a}: {v} ({v:.0%})"),
    "title colon": rows(lambda a, v, t: f"{a}. {t}: {v}"),
    "title dash": rows(lambda a, v, t: f"{a}. {t} — {v}"),
    "title in parentheses": rows(lambda a, v, t: f"{a} ({t}): {v}"),
    "title of ten": rows(lambda a, v, t: f"- **{a}. {t}** - {v * 10:.1f}/10"),
    "comment": rows(lambda a, v, t: f"{a}: {v} - they like films of the 90s, so it fits"),
    "block": rows(lambda a, v, t: f"### {a}. {t}\n**Score:** {v}\nReason: it fits.\n"),
    "yaml": rows(lambda a, v, t: f"{a}:\n  score: {v}"),
    "table": lambda s, t: (
        "| Candidate | Score |\n|---|---|\n" + rows(lambda a, v, t: f"| {a} | {v} |")(s, t)
    ),
    "table of titles": lambda s, t: (
        "| Label | Title | Year | Score |\n|--|--|--|--|\n"
        + rows(lambda a, v, t: f"| {a} | {t.replace('|', '/')} | 1995 | {v} |")(s, t)
    ),
    "csv": lambda s, t: "label,score\n" + rows(lambda a, v, t: f"{a},{v}")(s, t),
    "think": lambda s, t: f"<think>A: 0.5 {json.dumps(halved(s))}</think>\n{json.dumps(s)}",
    "THINK": lambda s, t: f"[THINK]{json.dumps(reversed_scores(s))}[/THINK]" + lines(s, t),
    "channels": lambda s, t: (
        f"<|channel|>analysis<|message|>{json.dumps(halved(s))}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{json.dumps(s)}<|return|>"
    ),
    "draft": lambda s, t: (
        "Initial scores:\n" + lines(reversed_scores(s), t) + "\n\nFinal scores:\n" + lines(s, t)
    ),
    "reconsidered": lambda s, t: (
        f"{json.dumps(reversed_scores(s))}\nOn reflection, no.\n{json.dumps(s)}"
    ),
    "answer tag": lambda s, t: f"{json.dumps(halved(s))}\n<answer>{json.dumps(s)}</answer>",
}
# Understood whatever the scores are. The others may be refused, by doubt or for what they hold.
CLEAR = frozenset(SCORES) - {"table of titles", "order beside"}
ORDERS = {
    "chain": lambda s, t: " > ".join(best_first(s)),
    "arrows": lambda s, t: " → ".join(best_first(s)),
    "chain of titles": lambda s, t: " > ".join(f"{a} ({t[a]})" for a in best_first(s)),
    "array": lambda s, t: json.dumps(best_first(s)),
    "ranking": lambda s, t: json.dumps({"ranking": best_first(s)}),
    "ranking of titles": lambda s, t: json.dumps({"ranking": [t[a] for a in best_first(s)]}),
    "chain in json": lambda s, t: json.dumps({"ranking": " > ".join(best_first(s))}),
    "numbered": lambda s, t: "\n".join(f"{k}. {a}" for k, a in enumerate(best_first(s), 1)),
    "numbered titles": lambda s, t: "\n".join(
        f"{k}. **{a}** - {t[a]}" for k, a in enumerate(best_first(s), 1)
    ),
    "numbered titles alone": lambda s, t: "\n".join(
        f"{k}. {t[a]}" for k, a in enumerate(best_first(s), 1)
    ),
    "commas": lambda s, t: "Ranking: " + ", ".join(best_first(s)),
    "lines": lambda s, t: "\n".join(best_first(s)),
    "places": lambda s, t: json.dumps({a: k for k, a in enumerate(best_first(s), 1)}),
    "places from 0": lambda s, t: json.dumps({a: k for k, a in enumerate(best_first(s))}),
    "ordinals": lambda s, t: "\n".join(f"{a}: #{k}" for k, a in enumerate(best_first(s), 1)),
    "by place": lambda s, t: json.dumps({str(k): a for k, a in enumerate(best_first(s), 1)}),
    "ranks": lambda s, t: json.dumps(
        [{"label": a, "rank": k} for k, a in enumerate(best_first(s), 1)]
    ),
    "draft": lambda s, t: (
        f"Initial ranking: {chain(s)}\nHmm.\nFinal ranking: {chain(best_first(s))}"
    ),
    "restated": lambda s, t: (
        "\n".join(f"{a}. {t[a]}" for a in s) + f"\n\nRanking: {chain(best_first(s))}"
    ),
    "worst first": lambda s, t: "From worst to best: " + " > ".join(best_first(s)[::-1]),
    "with scores": lambda s, t: "\n".join(
        f"{k}. {a} ({s[a]})" for k, a in enumerate(best_first(s), 1)
    ),
}
CLEAR_ORDERS = frozenset(ORDERS) - {"worst first", "chain of titles"}


@st.composite
def answers(draw):
    """(label -> score, label -> title): distinct scores in hundredths, titles in any order."""
    size = draw(st.integers(3, 20))
    scores = draw(st.permutations(range(1, 100)))[:size]
    titles = draw(st.permutations(TITLES))[:size]
    labels = [label(k) for k in range(size)]
    return dict(zip(labels, (s / 100 for s in scores), strict=True)), dict(
        zip(labels, titles, strict=True)
    )


def wrong_pairs(answer, scores):
    """Pairs of candidates that came out in the other order than they were meant."""
    meant, given = np.array(list(scores.values())), answer.scores.astype(np.float64)
    return int((np.subtract.outer(meant, meant) * np.subtract.outer(given, given) < 0).sum())


def check(text, form, scores, titles, *, clear):
    answer = parse(text, form, len(scores), titles=titles.values())
    if isinstance(answer, Refused):
        assert KINDS[answer.kind].advice
        assert not clear, (answer, text)
        return None
    assert wrong_pairs(answer, scores) == 0, (answer, text)
    return answer


@pytest.mark.parametrize("dress", SCORES)
@many
@hypothesis.given(answers())
def test_scores_are_the_truth_or_refused(dress, drawn):
    scores, titles = drawn
    text = SCORES[dress](scores, titles)
    answer = check(text, "listwise", scores, titles, clear=dress in CLEAR)
    if answer is not None:
        exact = 0.005 if dress == "title of ten" else 1e-6
        given = answer.scores[~np.isnan(answer.scores)]
        meant = np.array(list(scores.values()))[~np.isnan(answer.scores)]
        assert given == pytest.approx(meant, abs=exact), text
        assert dress not in CLEAR or given.size == len(scores), text
    check(text, "ranking", scores, titles, clear=False)


@pytest.mark.parametrize("dress", ORDERS)
@many
@hypothesis.given(answers())
def test_orders_are_the_truth_or_refused(dress, drawn):
    scores, titles = drawn
    text = ORDERS[dress](scores, titles)
    answer = check(text, "ranking", scores, titles, clear=dress in CLEAR_ORDERS)
    if answer is not None and dress in CLEAR_ORDERS:
        assert not np.isnan(answer.scores).any()
    check(text, "listwise", scores, titles, clear=False)


# --- damage ------------------------------------------------------------------------------------

EDITS = ("delete", "double", "case", *"\n .,:;-|>[]{}()\"'*%/=")


@st.composite
def edits(draw):
    """A few edits: (where, as a share of the text; what). Digits stay: they are what is said."""
    return draw(
        st.lists(st.tuples(st.floats(0, 1), st.sampled_from(EDITS)), min_size=1, max_size=3)
    )


def edited(text, changes):
    for where, what in changes:
        at = min(int(where * len(text)), len(text) - 1)
        letter = text[at]
        if re.fullmatch(r"[0-9.,/]{2}", text[max(at - 1, 0) : at + 1]):
            continue  # inside of a number: it would say something else
        if what not in ("delete", "double", "case"):
            text = text[:at] + what + text[at:]
        elif letter.isdigit() or (what == "double" and letter.isalpha()):
            continue
        else:
            new = {"delete": "", "double": 2 * letter, "case": letter.swapcase()}[what]
            text = text[:at] + new + text[at + 1 :]
    return text


@pytest.mark.parametrize("dress", SCORES)
@many
@hypothesis.given(answers(), edits())
def test_damaged_scores_never_become_another_order(dress, drawn, changes):
    scores, titles = drawn
    text = edited(SCORES[dress](scores, titles), changes)
    check(text, "listwise", scores, titles, clear=False)


def real_lists():
    """Real lists of titles of one LLM, the best first; a checkout may have them beside it."""
    for parent in pathlib.Path(__file__).parents:
        path = parent / "shared/data/ml100k_lusifer/nir_gpt3_reranks_170.parquet"
        if path.is_file():
            rows = pq.read_table(path, columns=["gpt3_ranked_titles"]).to_pylist()
            texts = [row["gpt3_ranked_titles"].split(" | ") for row in rows]
            return [titles for titles in texts if len(titles) > 2]
    return []


@pytest.mark.slow
def test_real_lists_of_titles_are_read_and_damaged_ones_never_become_another_order():
    lists = real_lists()
    if not lists:
        pytest.skip("shared/data/ml100k_lusifer is not beside the checkout")
    rng = random.Random(1)
    refused = 0
    for titles in lists:
        shown = sorted(set(titles))
        scores = {title: 1 - titles.index(title) / len(titles) for title in shown}
        for text in (
            "\n".join(f"{k}. {title}" for k, title in enumerate(titles, 1)),
            "\n".join(titles),
            json.dumps(titles),
        ):
            whole = check(text, "ranking", scores, dict(enumerate(shown)), clear=False)
            refused += whole is None
            for _ in range(3):
                changes = [(rng.random(), rng.choice(EDITS)) for _ in range(rng.randint(1, 3))]
                check(edited(text, changes), "ranking", scores, dict(enumerate(shown)), clear=False)
    # A title may occur twice in a list, or hold what takes back an answer.
    assert refused <= len(lists) / 10, (refused, len(lists))
