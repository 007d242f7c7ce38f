"""docs/results.md is what benchmarks/results holds; so is README's table."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import results_page  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_made_from_the_files() -> None:
    written = results_page.PAGE.read_text(encoding="utf-8")
    assert written == results_page.read(), "run python benchmarks/results_page.py"


def test_readme_has_the_same_numbers() -> None:
    """Each row of README's table that an audit has, cell by cell."""
    assert "docs/results.md" in README
    columns = ("lastfm", "books", "ml")
    audits = [json.loads((results_page.RESULTS / f"audit_{name}.json").read_text())
              for name in columns]  # fmt: skip
    arm_of = {shown: arm for arm, shown in results_page.ARM_NAMES.items()}
    compared = 0
    for line in README.splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if len(cells) != 4 or cells[0] not in arm_of:
            continue
        for audit, cell in zip(audits, cells[1:], strict=True):
            rows = {row["arm"]: row["mean"] for row in audit["rows"]}
            mean = rows.get(arm_of[cells[0]])
            expected = (
                "not run"
                if mean is None
                else " / ".join(results_page.number(mean[name]) for name in results_page.SLICES)
            )
            assert cell == expected, (cells[0], audit["data"])
            compared += 1
    assert compared == 27


def audit(**tests: tuple[float, float]) -> dict[str, object]:
    """An audit of controls: name -> (difference, p over users)."""
    rows: list[dict[str, object]] = [
        {"arm": "llm", "mean": {"overall": 0.5}, "llm_minus_this": {}},
        {
            "arm": "global",  # no control: it has the LLM's word
            "mean": {"overall": 0.6},
            "llm_minus_this": {
                "overall": {"difference": -0.1, "p_users": 0.1, "p_users_holm": 1.0}
            },
        },
    ]
    for name, (difference, p) in tests.items():
        test = {"difference": difference, "p_users": p, "p_users_holm": 2 * p}
        rows.append(
            {
                "arm": name,
                "mean": {"overall": 0.5 - difference},
                "llm_minus_this": {"overall": test},
            }
        )
    return {"data": "facebook_book", "rows": rows}


def test_the_interval_is_that_of_the_test() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.3, 2000)
    t = stats.ttest_1samp(values, 0.0)
    facts = results_page.gain(audit(none=(values.mean(), t.pvalue)), "overall")
    expected = t.confidence_interval(0.95)
    assert (facts["low"], facts["high"]) == pytest.approx(tuple(expected), rel=2e-3)


def test_a_gain_is_over_every_control() -> None:
    facts = results_page.gain(audit(none=(0.2, 0.02), ease=(0.1, 0.001)), "overall")
    assert (facts["best"], facts["difference"], facts["p"]) == ("ease", 0.1, 0.04)
    assert facts["relative"] == pytest.approx(0.25)
    assert results_page.verdict(facts["difference"], facts["p"]) == "yes"
    below = results_page.gain(audit(none=(0.2, 1e-9), ease=(-0.1, 1e-9)), "overall")
    assert (below["best"], below["p"]) == ("ease", 1.0)
    assert results_page.verdict(below["difference"], below["p"]) == "no"
    assert results_page.verdict(0.1, 0.06) == "not shown"


def test_numbers_are_written_as_in_readme() -> None:
    shown = [results_page.number(value) for value in (0.0654321, -0.00002, 1.25, None)]
    assert shown == [".0654", "-.0000", "1.2500", ""]
    assert results_page.number(0.01, sign=True) == "+.0100"


def test_all_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", results_page.PAGE.read_text(encoding="utf-8")):
        assert (results_page.PAGE.parent / target).is_file(), target
