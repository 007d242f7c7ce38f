"""Table 2 and Table 3 of S-LLMR (arXiv 2512.21526): what to run, and what was printed.

Published AUC, data sets in the order of `DOMAINS`. Its rows None, KD, KAR and LLM-CF equal those of
LLM-CF (arXiv 2403.17688) cell for cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from slgr_jax.experiments.arms import VECTOR_ARMS
from slgr_jax.experiments.summary import Row

DOMAINS = ("Sports", "Beauty", "Toys")
# Names of data sets of slgr prepare --source=s3rec, and of --source=idgenrec.
_DOMAIN_OF = {
    **{domain: domain for domain in DOMAINS},
    "Sports_and_Outdoors": "Sports",
    "Toys_and_Games": "Toys",
}

Triple = tuple[float, float, float]
FRAMEWORKS = ("None", "KD", "KAR", "LLM-CF", "S-LLMR")
TABLE2: Mapping[str, Mapping[str, Triple]] = {
    backbone: dict(zip(FRAMEWORKS, cells, strict=True))
    for backbone, cells in {
        "deepfm": (
            (0.7990, 0.7853, 0.7681),
            (0.8043, 0.7959, 0.7713),
            (0.7991, 0.7870, 0.7698),
            (0.8137, 0.8044, 0.7881),
            (0.8176, 0.8101, 0.7961),
        ),
        "xdeepfm": (
            (0.8158, 0.8065, 0.7836),
            (0.8169, 0.8104, 0.7865),
            (0.8161, 0.8101, 0.7898),
            (0.8196, 0.8113, 0.7947),
            (0.8240, 0.8183, 0.7985),
        ),
        "autoint": (
            (0.8003, 0.7949, 0.7630),
            (0.8012, 0.7961, 0.7635),
            (0.8039, 0.7939, 0.7683),
            (0.8088, 0.8090, 0.7754),
            (0.8161, 0.8145, 0.7849),
        ),
        "dcn": (
            (0.8023, 0.8146, 0.7621),
            (0.8040, 0.8147, 0.7652),
            (0.8024, 0.8165, 0.7651),
            (0.8092, 0.8182, 0.7702),
            (0.8190, 0.8189, 0.7960),
        ),
        "dcnv2": (
            (0.8110, 0.8028, 0.7774),
            (0.8112, 0.8057, 0.7827),
            (0.8087, 0.8003, 0.7759),
            (0.8131, 0.8033, 0.7812),
            (0.8150, 0.8177, 0.7927),
        ),
        "din": (
            (0.7986, 0.7861, 0.7586),
            (0.8023, 0.7934, 0.7652),
            (0.7971, 0.7861, 0.7620),
            (0.8089, 0.7967, 0.7783),
            (0.8100, 0.8010, 0.7829),
        ),
    }.items()
}
# method -> slice -> AUC by domain, on DCNv2; our arm of the same idea.
TABLE3: Mapping[str, Mapping[str, Triple]] = {
    "none": {
        "overall": (0.811, 0.8028, 0.7774),
        "cold_users": (0.8140, 0.8006, 0.7868),
        "tail_items": (0.7677, 0.7702, 0.7402),
    },
    "global": {
        "overall": (0.8114, 0.7911, 0.7887),
        "cold_users": (0.8140, 0.7797, 0.7858),
        "tail_items": (0.7640, 0.7330, 0.7390),
    },
    "pointwise": {
        "overall": (0.8069, 0.7999, 0.7705),
        "cold_users": (0.8119, 0.7922, 0.7671),
        "tail_items": (0.7571, 0.7445, 0.7391),
    },
    "paper": {
        "overall": (0.8150, 0.8177, 0.7927),
        "cold_users": (0.8170, 0.8063, 0.7917),
        "tail_items": (0.7877, 0.7716, 0.7502),
    },
}
_ROWS = (
    "Rows: 5-core data of S3-Rec, --split=leave_last, targets with an earlier event, one drawn "
    "negative to each positive, drawn anew at each step. The training rows are as many as the "
    "paper's '#Reviews' in all three domains; its negatives, and how they were drawn, are not "
    "published: pooled AUC is comparable between arms, not with the printed numbers to the digit."
)
_TEACHER = (
    "The paper's teacher (GPT-4o-mini on item texts) is not published: --teacher is another one, "
    "and without it only `none` can be run."
)
_COLD = (
    "Cold in the paper: fewer than 3 events, which no test row has under leave-last; here: users "
    "with at most cold_user_history training items."
)
_COPIED = (
    "The paper's rows None, KD, KAR and LLM-CF equal LLM-CF's own table cell for cell: embedding "
    "32 and learning rate .01 there, 64 and .001 for S-LLMR. Seeds are not stated. Ours are all "
    "run in one setting: width 64, batches of 128 positives with as many negatives, binary "
    "cross-entropy, 30 epochs at most, patience 2; learning rate, penalty, dropout and lambda are "
    "searched alike for every arm."
)
_SHAPES = (
    "Networks as LLM-CF has them (MLP 200-80; DCN of 3 layers; DCNv2 of 2 with 4 experts of rank "
    "4; xDeepFM 100-100-100; AutoInt of one layer, 2 heads, width 64; DIN 64-16), but for its "
    "batch normalisation in DCN and DCNv2, and without brands."
)
_PAIRS = (
    "Pairs by the paper's rule, those of the largest score gaps (--pair_selection=largest_gap), "
    "of any user and not of those in the batch; their loss is a mean and not a sum."
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a preset says where the command line does not.

    Attributes:
      backbones, arms: what is compared; arms that read vectors only where there are some.
      knobs: of every run.
      backbone_knobs: backbone -> knobs of its runs.
      remarks: what differs from the paper.
    """

    backbones: tuple[str, ...]
    arms: tuple[str, ...]
    knobs: Mapping[str, Any]
    backbone_knobs: Mapping[str, Mapping[str, Any]]
    remarks: tuple[str, ...]


# The paper's rows, loss, negatives, width, batch and pairs; LLM-CF's stopping.
_KNOBS = {
    "min_history": 1,
    "loss": "bce",
    "negatives": "uniform",
    "dim": 64,
    "batch_size": 128,
    "epochs": 30,
    "patience": 2,
    "pair_selection": "largest_gap",
}
# LLM-CF's networks, where they are not our defaults.
_NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "autoint": {"layers": 1},
    "dcn": {"layers": 3},
    "dcnv2": {"low_rank": 4},
}
PRESETS: Mapping[str, Preset] = {
    "table2": Preset(
        tuple(TABLE2),
        ("none", "kd", "kar", "global", "pointwise", "paper", "calibrated"),
        _KNOBS,
        _NETWORKS,
        (
            _ROWS,
            _TEACHER,
            _COPIED,
            _SHAPES,
            _PAIRS,
            "The paper's KD distils soft labels of a fine-tuned LLaMA-2-7B into every row; `kd` "
            "here those of --teacher into the pairs that it scored. `kar` has the experts of KAR "
            "over --vectors, a user's being what the product says. There is no LLM-CF here: its "
            "product, chains of thought of training rows, is not published.",
        ),
    ),
    "table3": Preset(
        ("dcnv2",),
        ("none", "global", "pointwise", "paper", "calibrated"),
        _KNOBS,
        _NETWORKS,
        (_ROWS, _TEACHER, _COLD, _COPIED, _SHAPES, _PAIRS),
    ),
}


def arms_of(preset: Preset, vectors: str) -> tuple[str, ...]:
    """The preset's arms, without those that read vectors where there are none.

    Args:
      vectors: product under DATA/embeddings, or empty.
    """
    return tuple(arm for arm in preset.arms if vectors or arm not in VECTOR_ARMS)


def table(name: str, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The preset's table in Markdown: printed numbers beside ours.

    Args:
      name: of `PRESETS`.
      reports: data set's name -> what its report.json holds.
    """
    from slgr_jax.reports import tables

    lines = [
        f"# S-LLMR, Table {name[-1]}: AUC on labelled test rows",
        "",
        tables.markdown_table(rows(name, reports)),
        "",
    ]
    others = [data for data in reports if data not in _DOMAIN_OF]
    if others:
        lines += [f"Not in the paper: {', '.join(others)}.", ""]
    run = {_DOMAIN_OF.get(data) for data in reports}
    missing = [domain for domain in DOMAINS if domain not in run]
    if missing:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    return "\n".join([*lines, *(f"- {remark}" for remark in PRESETS[name].remarks)]) + "\n"


def rows(name: str, reports: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows: printed numbers, which end in "(printed)", beside ours."""
    return _table2(reports) if name == "table2" else _table3(reports)


def _ours(report: Mapping[str, Any], backbone: str, arm: str, name: str) -> Row:
    """The row of an arm; {} where it was not run."""
    wanted = (backbone, arm, name, "rows_auc")
    for row in report["rows"]:
        if (row["backbone"], row["arm"], row["slice"], row["metric"]) == wanted:
            return dict(row)
    return {}


def _printed(cells: Triple | None, data: str) -> float | None:
    domain = _DOMAIN_OF.get(data)
    return None if cells is None or domain is None else cells[DOMAINS.index(domain)]


def _table2(reports: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    out: list[Row] = []
    for data, report in reports.items():
        for backbone in report["protocol"]["backbones"]:
            printed = TABLE2.get(backbone, {})
            row: Row = {"data": data, "backbone": backbone}
            for framework in FRAMEWORKS:
                row[f"{framework} (printed)"] = _printed(printed.get(framework), data)
            for arm in report["protocol"]["arms"]:
                row[arm] = _ours(report, backbone, arm, "overall").get("mean")
            out.append(row)
    return out


def _table3(reports: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    out: list[Row] = []
    for data, report in reports.items():
        for backbone in report["protocol"]["backbones"]:
            printed = TABLE3 if backbone == "dcnv2" and data in _DOMAIN_OF else {}
            for arm in dict.fromkeys([*printed, *report["protocol"]["arms"]]):
                row: Row = {"data": data, "backbone": backbone, "arm": arm}
                for name in ("overall", "cold_users", "tail_items"):
                    cells = printed.get(arm, {}).get(name)
                    ours = _ours(report, backbone, arm, name)
                    row[f"{name} (printed)"] = _printed(cells, data)
                    row[name] = ours.get("mean")
                    row[f"{name} +-"] = _half(ours)
                out.append(row)
    return out


def _half(row: Row) -> float | None:
    low, high = row.get("low"), row.get("high")
    return None if low is None or high is None else (high - low) / 2
