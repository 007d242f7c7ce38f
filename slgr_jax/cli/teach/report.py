"""What the teacher is worth: where it is right, and whether the data know that already.

    slgr teach report --data=DATA --name=NAME
    slgr teach report --data=DATA --name=NAME --price_in=0.15 --price_out=0.6 --out=FOLDER

By slice and margin, beside popularity and item-item on the same pairs; what its lists are worth
alone, and what they add when scoring to popular, item-item and EASE; position bias; cost. Ends with
what to do: the command that trains with it, or "leave it".
Writes Markdown, PNG and JSON to DATA/reports/NAME.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Audit the teacher, show the findings and write the report."""
    from slgr_jax.reports import teacher_audit

    costs = flags.section_from_flags(config.RequestConfig)
    audit = teacher_audit.make(
        dataset,
        common.name,
        flags.section_from_flags(config.ReportConfig),
        prices=(costs.price_in, costs.price_out),
        seed=common.seed,
        free=flags.section_from_flags(config.BaselineConfig),
    )
    out = costs.out or dataset.path / "reports" / common.name
    paths = teacher_audit.write(audit, out)
    print(f"wrote {', '.join(map(str, paths))}\n\n{teacher_audit.terminal(audit)}")


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("seed",),
    sections=(config.ReportConfig, config.BaselineConfig),
    parts={config.RequestConfig: ("price_in", "price_out", "out")},
)
