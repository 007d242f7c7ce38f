"""The best items of users as a file: ids in, ids out.

    slgr recommend --workdir=RUN --users=all --k=10 --out=lists.parquet
    slgr recommend --workdir=RUN --users=users.txt --deny=out_of_stock.txt --out=lists.csv
    slgr recommend --workdir=RUN --users=u1,u2 --k=5 --mask_seen=false --out=lists.jsonl

A row a listed item: user, item, rank (from 1), score (a logit). The lists are those that slgr
evaluate measures on the test part: as of the end of validation, training and validation items
left out, ties by item index. A user with fewer than k items left has fewer rows. Any number of
users are written a block at a time; the file appears when it is whole.

Files of ids are text (one id a line), CSV or TSV with a header, or Parquet. --allow and --deny
with a user column beside the item's hold for the users they name, each for its own items; with
such an --allow a user that it does not name gets nothing.

Models that read features of interactions list as of each user's last one; --context=hour=18
--context=device=phone asks about everybody at six on a phone.

--histories has the events (user, item and perhaps a time) of users that the run has never seen:
they are folded in, and nothing that was trained changes.

Several processes recommend together as they train (docs/cluster.md), each the users of its devices
where these are split by --user_shards: --coordinator=HOST:PORT --processes=N --process_id=0..N-1,
or srun. The first of them writes; --histories and --new_items are left to one process.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags as absl_flags

from slgr_jax import api, cluster
from slgr_jax.cli import flags, job
from slgr_jax.config import ClusterConfig
from slgr_jax.errors import ConfigError

USAGE = __doc__ or ""
SECTIONS = (ClusterConfig,)


def define() -> None:
    """Define the command's flags."""
    absl_flags.DEFINE_string("workdir", None, "directory of a run")
    absl_flags.DEFINE_string("users", "", "file of user ids, all, or ids separated by commas")
    absl_flags.DEFINE_string(
        "histories", "", "in place of --users: file of what new users have done, an event a row"
    )
    absl_flags.DEFINE_string("out", None, "file to write; ends in .parquet, .csv or .jsonl")
    absl_flags.DEFINE_integer("k", 10, "items a user", lower_bound=1)
    absl_flags.DEFINE_bool("mask_seen", True, "leave out a user's training and validation items")
    absl_flags.DEFINE_string("allow", "", "file of the only items to list; empty: all")
    absl_flags.DEFINE_string("deny", "", "file of items not to list")
    absl_flags.DEFINE_string(
        "unknown", "refuse", "ids that the run does not know: refuse, or skip (and count)"
    )
    absl_flags.DEFINE_string("user_column", "", "column of users in CSV and Parquet; user if empty")
    absl_flags.DEFINE_string("item_column", "", "column of items in CSV and Parquet; item if empty")
    absl_flags.DEFINE_multi_string(
        "context", [], "NAME=VALUE of a feature of interactions to list in; once for each"
    )
    absl_flags.DEFINE_string(
        "new_items",
        "",
        "file of vectors of items that the run has never seen (Parquet with item and vector, npz, "
        "batch results), which its --item_vectors adapter scores",
    )
    absl_flags.DEFINE_bool("overwrite", False, "replace --out where it is there")
    absl_flags.DEFINE_string("checkpoint", "best", "state to recommend with: best or last")
    absl_flags.DEFINE_string("data", "", "where the dataset of the run is now, if it was moved")


def _context(entries: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as a mapping; of a name that is there several times, all of its values."""
    values: dict[str, list[str]] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise ConfigError(f"--context={entry!r} is not NAME=VALUE, as hour=18")
        values.setdefault(name, []).append(value)
    return {name: texts[0] if len(texts) == 1 else texts for name, texts in values.items()}


def main(_: list[str]) -> None:
    """Recommend, and say how many users and rows."""
    job.guarded(_recommend, "interrupted; --out is not there, or as it was")


def _recommend() -> None:
    given = flags.FLAGS
    names = ["k", "mask_seen", "allow", "deny", "unknown", "user_column", "item_column"]
    names.append("new_items")
    written = api.recommend(
        given.workdir,
        given.users,
        given.out,
        histories=given.histories,
        context=_context(given.context),
        data=given.data,
        checkpoint=given.checkpoint,
        overwrite=given.overwrite,
        **{name: given[name].value for name in names},
        **flags.given_knobs(*SECTIONS),
    )
    if cluster.is_first():
        print(written)


def run() -> None:
    """`slgr recommend`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr recommend",
        sections=SECTIONS,
        define=define,
        required=("workdir", "out"),
    )
