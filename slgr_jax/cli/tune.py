"""Search hyperparameters by validation: Optuna's samplers, early stopping of bad trials.

    slgr tune --data=DATA --out=STUDY --search=lr=1e-3..1e-1:log,l2=1e-3..1:log,dim=32|64|128
    slgr tune --config=space.toml --out=STUDY --trials=50 --jobs=4

A search space is NAME=LOW..HIGH[:log] or NAME=A|B|C, with commas; in a config file, the table
[search]. Other knobs of a run hold for every trial. The first trial has the defaults, where the
space holds them. The value of a trial is its best --early_stop_metric on validation; the test part
is never read. Called again it goes on where it was, also after a kill; a greater --trials adds to
it. Writes STUDY/best.toml, which slgr train --config takes. Needs the extra tune.
"""

from __future__ import annotations

from absl import flags as absl_flags

from slgr_jax import api, config
from slgr_jax.cli import flags
from slgr_jax.config import TuneConfig
from slgr_jax.config.knobs import Section

USAGE = __doc__ or ""
SECTIONS: tuple[type[Section], ...] = (
    TuneConfig,
    *(flags.without(section, ("restart", "refit")) for section in config.sections().values()),
)


def define() -> None:
    """Define the flags that are no knobs."""
    absl_flags.DEFINE_string("data", None, "dataset directory that slgr prepare wrote")
    absl_flags.DEFINE_string("out", None, "directory of the study")
    flags.define_space("search", "what to search: lr=1e-3..1e-1:log,layers=1..4,dim=32|64|128")


def main(_: list[str]) -> None:
    """Search, then show the best trials and how to train the best."""
    given = flags.FLAGS
    print(api.tune(given.data, given.out, given.search, **flags.given_knobs(*SECTIONS)))


def run() -> None:
    """`slgr tune`."""
    flags.run(
        main,
        usage=USAGE,
        name="slgr tune",
        sections=SECTIONS,
        define=define,
        required=("data", "out"),
    )
