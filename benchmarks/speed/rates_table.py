"""Rows of `throughput.py` as a table, under a header that says on what they were measured."""

from __future__ import annotations

from collections.abc import Sequence

from cases import Row
from turns import Facts

# Column of the table: key of a row and what one unit of the column is.
COLUMNS: dict[str, tuple[str, float]] = {
    "size": ("size", 0),
    "backbone": ("backbone", 0),
    "guidance": ("guidance", 0),
    "dtype": ("dtype", 0),
    "batch": ("batch_size", 0),
    "counted": ("counted", 0),
    "k/s": ("triples_per_s", 1e3),
    "min": ("min", 1e3),
    "max": ("max", 1e3),
    "k rows/s": ("rows_per_s", 1e3),
    "plain steps": ("plain_steps", 0),
    "plain min": ("plain_steps_min", 0),
    "plain max": ("plain_steps_max", 0),
    "bytes each": ("bytes_per_triple", 1),
    "share %": ("bandwidth_share", 0.01),
    "compile s": ("compile_s", 1),
    "peak MB": ("peak_mb", 1),
    "device MB": ("device_peak_mb", 1),
    "peer": ("peer", 0),
    "peer k/s": ("peer_triples_per_s", 1e3),
    "peer k rows/s": ("peer_rows_per_s", 1e3),
    "peer MB": ("peer_peak_mb", 1),
    "ratio": ("ratio", 0),
    "ratio min": ("ratio_min", 0),
    "ratio max": ("ratio_max", 0),
}


def render(rows: Sequence[Row]) -> str:
    """A header that says on what the rows were measured, and a table of them."""
    from slgr_jax.reports import tables

    shown = [
        {
            name: round(row[key] / unit) if unit else row[key]
            for name, (key, unit) in COLUMNS.items()
            if row.get(key) is not None
        }
        for row in rows
    ]
    columns = [name for name in COLUMNS if any(name in cells for cells in shown)]
    return f"{header(rows)}\n\n{tables.markdown_table(shown, columns)}"


def header(rows: Sequence[Row]) -> str:
    """Machine, versions, optimisers, the measured bandwidth of each size, and the peers."""
    first = rows[0]
    lines = [
        f"{first['devices']}, {first['cores']} cores; {_versions(first['versions'])}; "
        f"d = {first['dim']}, kernels: {first['kernels']}; {first['repeats']} turns"
    ]

    optimizers: dict[str, list[str]] = {}
    for row in {row["backbone"]: row for row in rows}.values():
        optimizers.setdefault(row["table_optimizer"], []).append(row["backbone"])
    for name, backbones in optimizers.items():
        lines.append(f"table_optimizer={name}: {', '.join(backbones)}")

    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = [row for row in rows if row["size"] == size]
        row = of_size[0]
        lines.append(
            f"{size}: {row['users']:,} users, {row['items']:,} items, "
            f"{row['interactions']:,} interactions; random rows of 256 bytes: "
            f"{row['gather_bandwidth'] / 1e9:.1f} GB/s"
        )
        peers = {(row["peer"], row["backbone"]): row for row in of_size if row["peer"]}
        lines += dict.fromkeys(_about_peer(row) for row in peers.values())
    return "\n".join(lines)


def _about_peer(row: Row) -> str:
    facts = row["peer_facts"]
    model = f" {facts['model']}" if "model" in facts else ""
    batch = f", batch {facts['batch_size']}" if "batch_size" in facts else ""
    return (
        f"  {row['peer']}{model}: {_versions(facts['versions'])} on {facts['device']}, "
        f"{facts['threads']} threads, {facts['optimizer']}{batch}, "
        f"{facts['skipped']:.0%} of its triples skipped"
    )


def _versions(versions: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
