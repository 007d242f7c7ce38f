"""Does guidance help, and does selecting? Arms and controls, tuned alike, many seeds.

    slgr compare --data=DATA --teacher=NAME --out=DIR
    slgr compare --data=DATA --teacher=NAME --out=DIR --backbones=mf,lightgcn,sasrec,dcnv2 \\
        --guidance=none,global,rule,paper,calibrated --seeds=10
    slgr compare --quick --data=DATA --teacher=NAME
    slgr compare --preset=table3 --data=SPORTS,BEAUTY,TOYS --out=DIR

1. Tuning, on validation with seed 0: one search without guidance (--nobase: none), at whose best
   settings those of all arms begin; then one search for every arm, with as many trials, the same
   sampler and the same ranges (learning rate, penalty, dropout, width, loss, the power of
   popularity that negatives are drawn by, of mf whether rows begin with EASE's factors; --search
   for others). An arm's own knobs (lambda, its
   loss, ...) are searched within the same trials. Where the best trial is at an end of a range,
   that range gets wider, and the report says so. Needs the extra tune.
2. --seeds runs of every arm; of auto each with what that seed's validation prefers.
3. Every run meets the test part, once.
4. Each once more, on training and validation, with its settings, epochs and gate: what one would
   serve, and what the verdict is about. --norefit leaves it out, and so do presets. With
   --refit_teacher the teacher, and what controls teach, is made anew of these as well, as it would
   be where it is served.

Arms: none; global (alpha 1); pointwise (the teacher's scores as labels); rule, paper, budget,
calibrated; hard_negatives (what the teacher lists against what the reference would recommend
instead, calibrated with the reference's margin among its inputs), on the same pairs
global_hard_negatives (alpha 1) and paper_hard_negatives (the paper's gate); auto (none, global,
calibrated, paper or, of free lists, rrd, rrd_selective, hard_negatives: which of them, its own
search and then each seed's validation say); hard_own (no teacher: a user's own training items
against a share of what `none` ranks highest); --arm for others. The reference is the run of the
same seed of that arm without an LLM's word (none, hard_own, pruned; of those that are compared)
which tuning found best (--arm=NAME:reference_runs=strongest; reference_runs=none: of `none`).
Controls, in every report: constant (the matched gate's mean weight, on the same pairs); shuffled
(another user's answers, without this user's own training items); and as teachers consensus (what
the LLM names most, the same for everybody), popularity, item_item, EASE (ease; ials where it is
asked for).

Called again it goes on where it was: finished runs are known by their settings and data. Other
knobs of a run (--epochs, --batch_size, ...) hold for every arm; what is given is not searched.
Writes DIR/report.md, report.json, summary.md, .csv and .tex, and pictures; of several data sets, in
DIR/NAME. Ends with the small table and the verdict. Comparisons of several teachers may share DIR:
the runs of `none` are trained once, and the report of another teacher moves to DIR/reports/TEACHER.

--quick trains nothing: in a few minutes, on validation, what the lists of --teacher add when
scoring to the best recommender that costs nothing, beside what each control's lists add, overall,
for cold users and tail items; what more answers would be worth; and the command that trains what is
best.
Writes quick.md and quick.json to DATA/reports/NAME (or --out).
"""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import Any

from absl import flags as absl_flags

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section
from slgr_jax.errors import ConfigError

USAGE = __doc__ or ""


def run_sections() -> list[type[Section]]:
    """The sections of a run without the knobs that a comparison sets itself."""
    from slgr_jax.experiments import planning

    return [flags.without(section, planning.SET_HERE) for section in config.sections().values()]


def define() -> None:
    """Define the flags that are no knobs of a run."""
    from slgr_jax.experiments import arms, planning, presets

    absl_flags.DEFINE_list("data", [], "dataset directories that slgr prepare wrote")
    absl_flags.DEFINE_string("out", "", "directory of the runs and the report")
    absl_flags.DEFINE_bool(
        "quick", False, "train nothing: what the teacher's lists add when scoring; a few minutes"
    )
    absl_flags.DEFINE_string(
        "preset", "", f"shape of a published table: {', '.join(presets.PRESETS)}"
    )
    absl_flags.DEFINE_list("backbones", ["mf"], f"recommenders: {', '.join(config.BACKBONES)}")
    absl_flags.DEFINE_list(
        "guidance",
        list(planning.DEFAULT_ARMS),
        f"arms: {', '.join((*arms.ARMS, arms.AUTO, *arms.CONTROLS))}",
    )
    absl_flags.DEFINE_multi_string(
        "arm", [], "one more arm: NAME:knob=value,knob=value; may be given several times"
    )
    absl_flags.DEFINE_list(
        "controls",
        list(arms.DEFAULT_CONTROLS),
        f"controls besides, of {', '.join(arms.CONTROLS)}; --controls= for none of them",
    )
    absl_flags.DEFINE_string(
        "matched_to",
        "",
        f"arm that controls copy; the first there is of {', '.join((arms.AUTO, *arms.GATED))}",
    )
    absl_flags.DEFINE_string(
        "focus", "", "arm that the verdict is about; --matched_to unless given"
    )
    absl_flags.DEFINE_string("teacher", "", "name of the teacher product under DATA/teacher")
    absl_flags.DEFINE_string(
        "vectors",
        "",
        "name of the product under DATA/embeddings that init, adapter, kar, kser and others read",
    )
    for knob, of_arms in arms.PRODUCT_ARMS.items():
        absl_flags.DEFINE_string(
            knob.removeprefix("--"), "", f"name of the product that {' and '.join(of_arms)} read"
        )
    absl_flags.DEFINE_integer("seeds", 5, "seeds per arm", lower_bound=2)
    absl_flags.DEFINE_bool(
        "refit",
        True,
        "also train every run once more on training and validation, with its settings, epochs and "
        "gate: a second table and the verdict; not with --preset unless it is given",
    )
    absl_flags.DEFINE_string(
        "refit_teacher",
        "",
        "--teacher made anew of training and validation (slgr teach nearest --with_validation): "
        "what guided refits learn from; controls are made of it likewise",
    )
    flags.define_space(
        "search",
        "ranges in place of the usual ones, or of more knobs: lr=1e-3..1e-1:log,layers=1..4,"
        "dim=32|64|128; a table in a file",
    )
    absl_flags.DEFINE_integer(
        "workers", 0, "processes on a CPU; 0 = one per core; accelerators take one", lower_bound=0
    )


def _quick(given: absl_flags.FlagValues) -> None:
    """--quick: refuse what it would not use; compare, and show what was found."""
    from slgr_jax.experiments import quick

    used = ("data", "teacher", "out", "quick", "config")
    module = given.find_module_defining_flag
    others = [
        name
        for name in given
        if given[name].present and name not in used and not str(module(name)).startswith("absl")
    ]
    if others:
        raise ConfigError(f"--{others[0]} is not used with --quick, which trains nothing; drop it")
    if len(given.data) != 1 or not given.teacher:
        raise ConfigError("--quick needs one --data=DATA and --teacher=NAME")
    verdict = quick.compare(given.data[0], given.teacher)
    out = pathlib.Path(given.out or pathlib.Path(given.data[0], "reports", given.teacher))
    paths = quick.write(verdict, out)
    print(f"wrote {', '.join(map(str, paths))}\n\n{quick.render(verdict)}", end="")


def main(_: list[str]) -> None:
    """Compare; end with what was found."""
    from slgr_jax.experiments import comparison, planning, search_space

    given = flags.FLAGS
    if given.quick:
        _quick(given)
        return
    if not given.out:
        raise ConfigError("missing --out; see slgr compare --help")

    def chosen(name: str) -> Any:
        return given[name].value if given[name].present else None

    request = planning.Request(
        teacher=given.teacher,
        vectors=given.vectors,
        edits=given.edits,
        insert=given.insert,
        keep_hard=given.keep_hard,
        preset=given.preset,
        backbones=chosen("backbones"),
        guidance=chosen("guidance"),
        arm=given.arm,
        controls=chosen("controls"),
        matched_to=given.matched_to,
        focus=given.focus,
        seeds=given.seeds,
        search=search_space.as_mapping(given.search),
        options=flags.section_from_flags(config.CompareConfig),
        refit=chosen("refit"),
        refit_teacher=given.refit_teacher,
        knobs=flags.given_knobs(*run_sections()),
    )
    compared = comparison.compare_all(
        given.data,
        pathlib.Path(given.out),
        request,
        workers=given.workers,
        command=shlex.join(["slgr", "compare", *sys.argv[1:]]),
    )
    print(f"\n{compared}")


def run() -> None:
    """`slgr compare`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr compare",
        sections=[config.CompareConfig, *run_sections()],
        define=define,
        required=("data",),
    )
