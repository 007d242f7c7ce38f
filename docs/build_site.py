"""What the documentation site has besides docs/: the knobs, from the code, and the measurements.

mkdocs calls these hooks (mkdocs.yml). Nothing here is read by the package.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from slgr_jax import config
from slgr_jax.config.knobs import Section, flag_name, knob_of

ROOT = pathlib.Path(__file__).parents[1]
KNOBS = "reference/knobs.md"
# Where a page's links to files of the repository lead on the site.
_LINKS = {
    "../README.md": "index.md",
    "../benchmarks/": "measurements/",
}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the page of knobs, and every Markdown file and picture of benchmarks/."""
    files.append(File.generated(config, KNOBS, content=knobs_page()))
    benchmarks = ROOT / "benchmarks"
    for path in sorted([*benchmarks.rglob("*.md"), *benchmarks.rglob("*.png")]):
        place = f"measurements/{path.relative_to(benchmarks).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Let links out of docs/ lead to the copies on the site; others name the file in the text."""
    if page.file.src_uri.startswith("measurements/"):
        # What benchmarks/ links to outside itself is no page here, nor is a folder.
        return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)]*|results)\)", r"\1", markdown)
    up = "../" * page.file.src_uri.count("/")
    for source, target in _LINKS.items():
        markdown = markdown.replace(f"]({up}{source}", f"]({up}{target}")
    return markdown


def knobs_page() -> str:
    """A table per section of `slgr_jax.config`: flag, default, meaning, valid values."""
    lines = [
        "# Knobs",
        "",
        "Flags of the commands, and keyword arguments of the Python API (`lambda` is `lambda_` "
        "there). Made from `slgr_jax/config`.",
        "",
    ]
    for title, sections in _groups():
        lines += [f"## {title}", ""]
        for section in sections:
            doc = (section.__doc__ or section.__name__).strip().splitlines()[0].rstrip(".")
            lines += [f"### {doc}", "", "| flag | default | meaning | values |"]
            lines += ["|---|---|---|---|", *map(_row, dataclasses.fields(section)), ""]
    return "\n".join(lines)


def _groups() -> Iterator[tuple[str, list[type[Section]]]]:
    yield "slgr prepare", [config.PrepareConfig]
    yield "slgr teach", list(dict.fromkeys(config.TEACH_SECTIONS))
    yield "slgr train", [*config.sections().values(), config.ClusterConfig]
    yield "slgr evaluate", [config.BaselineConfig]
    yield "slgr serve", [config.ServeConfig]


def _row(field: dataclasses.Field[Any]) -> str:
    knob, default = knob_of(field), field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    values = [", ".join(filter(None, knob.choices))] if knob.choices is not None else []
    for sign, bound in (
        *((">=", knob.minimum), (">", knob.above)),
        *(("<=", knob.maximum), ("<", knob.below)),
    ):
        values += [] if bound is None else [f"{sign} {bound:g}"]
    cells = (f"`--{flag_name(field)}`", f"`{shown}`" if shown else "", knob.help, ", ".join(values))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
