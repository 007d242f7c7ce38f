"""A product with the ids of the raw data, to a file that `slgr teach import` reads back.

    slgr teach export --data=DATA --name=my_llm --out=answers.csv
    slgr teach export --data=DATA --name=my_llm --out=answers.parquet --overwrite

CSV, Parquet or JSON lines by the ending of --out; the import that gives the same product is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slgr_jax import config
from slgr_jax.cli import flags
from slgr_jax.cli.teach.sub_command import SubCommand

if TYPE_CHECKING:
    from slgr_jax.data.dataset import Dataset


def work(dataset: Dataset, common: config.TeachConfig) -> None:
    """Write the file, and say how to import it."""
    from slgr_jax.teacher.products import export

    out = flags.section_from_flags(config.ExportConfig).out
    manifest, table = export.export(dataset, common.name, out, overwrite=common.overwrite)
    print(f"wrote {table.num_rows:,} rows ({', '.join(table.column_names)}) to {out}; back again:")
    print("  " + export.command(manifest, table, out, common.data))


COMMAND = SubCommand(
    usage=__doc__ or "",
    work=work,
    common=("overwrite",),
    sections=(config.ExportConfig,),
    required=("out",),
)
