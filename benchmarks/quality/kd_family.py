"""Distillation from a wide teacher to a narrow student, on CiteULike as HTD's authors split it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reproduction import (
    Arm,
    Column,
    Product,
    Question,
    Target,
    clone_file,
    read_numbers,
    write_pairs,
)

REPOSITORY = "SeongKu-Kang/Topology_Distillation_KDD21"
_PARTS = {"train": "Train", "valid": "Valid", "test": "Test"}


def read(clone: pathlib.Path, raw: pathlib.Path) -> Sequence[pathlib.Path]:
    """Write the three parts: a user's items of training, and the one of validation and of test."""
    files = []
    for part, name in _PARTS.items():
        path = clone_file(clone, f"dataset/{name}", REPOSITORY)
        write_pairs(raw / f"{part}.csv", _pairs(read_numbers(path)))
        files.append(path)
    return files


def _pairs(items_of: Mapping[int, Any]) -> Iterator[tuple[int, int]]:
    for user, items in items_of.items():
        for item in items if isinstance(items, Mapping) else (items,):
            yield user, item


_R50, _R10 = "Recall@50", "Recall@10"
_VECTORS = Product(
    "embeddings/teacher",
    (
        ("export", "--workdir={runs}/teacher_0", "--out={raw}/teacher"),
        (
            *("teach", "embed", "--data={data}", "--name=teacher"),
            *("--vectors={raw}/teacher/items.parquet", "--built_from=train_only"),
            *("--user_vectors={raw}/teacher/users.parquet", "--model=teacher"),
        ),
    ),
)
_LISTS = Product(
    "teacher/teacher",
    (
        (
            *("teach", "from_run", "--data={data}", "--name=teacher"),
            *("--run={runs}/teacher_0", "--listed=500"),
        ),
    ),
)
_TOPOLOGY = ("--guidance=htd", "--teacher_vectors=teacher", "--aligned_per_step=128")
_STUDENT = ("--dim=20", "--l2=0.04")

TARGET = Target(
    name="kd_family",
    title="Topology distillation and its rivals: a BPR student of 20 numbers (CiteULike)",
    repository=REPOSITORY,
    source="printed: Recall@50 after 100 epochs in its logs, Recall@10 in KDD 2021",
    read=read,
    flags=(
        *("--backbone=mf", "--noitem_bias", "--lr=0.1", "--batch_size=4096", "--epochs=100"),
        *("--eval_every=20", "--patience=0", "--ks=10,50", "--early_stop_metric=recall@50"),
        "--nopooled_auc",
    ),
    columns=(Column(_R50, "overall", "recall@50"), Column(_R10, "overall", "recall@10")),
    arms=(
        Arm("teacher", "teacher, 200 numbers", ("--dim=200", "--l2=0.02"), None, {_R50: 0.3123}),
        Arm("student", "student", _STUDENT, None, {_R50: 0.2276, _R10: 0.1014}),
        Arm(
            "htd",
            "student, HTD",
            (*_STUDENT, *_TOPOLOGY, "--htd_groups=30", "--htd_positive", "--lambda=0.3"),
            _VECTORS,
            {_R50: 0.2744, _R10: 0.1247},
        ),
        Arm(
            "ftd",
            "student, FTD",
            (*_STUDENT, *_TOPOLOGY, "--htd_groups=0", "--lambda=1"),
            _VECTORS,
            {_R50: 0.2516, _R10: 0.1131},
        ),
        Arm(
            "rrd",
            "student, RRD",
            (
                *(*_STUDENT, "--guidance=rrd", "--teacher=teacher", "--lambda=0.04"),
                *("--rrd_interesting=40", "--rrd_uninteresting=40", "--lists_per_step=128"),
            ),
            _LISTS,
        ),
        Arm(
            "hint",
            "student, hint",
            (
                *(*_STUDENT, "--guidance=hint", "--teacher_vectors=teacher"),
                *("--lambda=0.3", "--aligned_per_step=128"),
            ),
            _VECTORS,
        ),
        Arm(
            "rd",
            "student, RD",
            (*_STUDENT, "--guidance=rd", "--teacher=teacher", "--lambda=0.1"),
            _LISTS,
        ),
    ),
    questions=(
        Question("the teacher on the student", "teacher", "student", _R50),
        Question("FTD on the student", "ftd", "student", _R50),
        Question("HTD on the student", "htd", "student", _R50),
        Question("HTD on FTD", "htd", "ftd", _R50),
        Question("RRD on the student", "rrd", "student", _R50),
    ),
    differs=(
        "rows move by Adagrad, at a learning rate of .1, where a batch touches them; theirs by "
        "Adam at .001 with a weight decay of .001, which moves every row at every step. Steps are "
        "of 4,096 triples, theirs of 1,024; both see the training part a hundred times. L2 was "
        "chosen by the student's validation, .04 over .02, in steps of 1,024; .05 was tried as a "
        "learning rate beside it.",
        "numbers are of the best of five validations, theirs of the last epoch.",
        "losses are means where theirs are sums over a batch: a weight of .001 is between .15 "
        "and .5 for the two parts of HTD (.3 here) and about .04 for RRD. For FTD it is about 8, "
        "which validation put below the student; 1 here. Hint and RD have weights of ours, "
        "untuned.",
        "a step's topology is that of 128 triples and not of 1,024; HTD's map of a group is "
        "linear, and its prototypes meet the rows of other groups alone.",
        "RRD's authors print it for another draw of the split, with 499 drawn items in place of "
        "the catalogue, which the clone does not hold: Hit@10 .5559 of the student, .5727 of RRD.",
    ),
)
