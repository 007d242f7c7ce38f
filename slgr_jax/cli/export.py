"""Vectors, an index of them, and the scorer of a run, as files for other programs.

    slgr export --workdir=RUN --out=DIR
    slgr export --workdir=RUN --out=DIR --format=npy --index=usearch --k=20
    slgr export --workdir=RUN --out=DIR --format=none --scorer

Vectors of users and items whose inner product is the score, biases folded in, with their ids.
An index of the items by inner product, and its recall against brute force. The scorer as
StableHLO for CPU, CUDA and TPU, which runs with jax, numpy and flatbuffers alone. All of it as of
the end of validation. DIR/manifest.json says what each file holds, how to score with it, and its
checksum. usearch and StableHLO need the extra: pip install 'slgr_jax[export]'.

Click models have no vectors: their scorer, or slgr recommend, takes their place.

Several processes make vectors together as they train (docs/cluster.md), each those of the users of
its devices where these are split by --user_shards: --coordinator=HOST:PORT --processes=N
--process_id=0..N-1, or srun. The first of them writes; --index, --scorer and --new_items are left
to one process.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api, cluster
from slgr_jax.cli import flags, job
from slgr_jax.config import ClusterConfig

USAGE = __doc__ or ""
SECTIONS = (ClusterConfig,)


def define() -> None:
    """Define the command's flags."""
    absl_flags.DEFINE_string("workdir", None, "directory of a run")
    absl_flags.DEFINE_string("out", None, "directory to write")
    absl_flags.DEFINE_string(
        "format", "parquet", "of the vectors: parquet, npy, safetensors; none: no vectors"
    )
    absl_flags.DEFINE_string("index", "none", "index of the item vectors: none, or usearch")
    absl_flags.DEFINE_bool("scorer", False, "write the scorer as StableHLO, with its weights")
    absl_flags.DEFINE_integer(
        "k", None, "length of the scorer's lists and of those that judge the index; 10 if not given"
    )
    absl_flags.DEFINE_string(
        "new_items",
        "",
        "file of vectors of items that the run has never seen (Parquet with item and vector, npz, "
        "batch results), which its --item_vectors adapter scores",
    )
    absl_flags.DEFINE_bool("overwrite", False, "replace --out where it is an export")
    absl_flags.DEFINE_string("checkpoint", "best", "state to export: best or last")
    absl_flags.DEFINE_string("data", "", "where the dataset of the run is now, if it was moved")


def main(_: list[str]) -> None:
    """Export, and say what was written."""
    job.guarded(_export, "interrupted; --out is not there, or as it was")


def _export() -> None:
    given = flags.FLAGS
    names = ("format", "index", "scorer", "k", "overwrite", "checkpoint", "data", "new_items")
    options = {name: given[name].value for name in names}
    written = api.export(given.workdir, given.out, **options, **flags.given_knobs(*SECTIONS))
    if cluster.is_first():
        print(written)


def run() -> None:
    """`slgr export`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr export",
        sections=SECTIONS,
        define=define,
        required=("workdir", "out"),
    )
