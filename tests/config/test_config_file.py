"""Config files: three formats of the same knobs, refused by name and type where they are wrong."""

from __future__ import annotations

import json
import re

import pytest

from slgr_jax import config
from slgr_jax.config import config_file, knobs
from slgr_jax.errors import ConfigError

TOML = """
data = "DATA"
lr = 1e-3
ks = [5, 10]
[guidance]
guidance = "pairwise"
lambda = 1
[search]
dim = [8, 16]
"""
YAML = """
data: DATA
lr: 1e-3
ks: [5, 10]
guidance: {guidance: pairwise, lambda: 1}
search: {dim: [8, 16]}
"""
VALUES = {
    "data": "DATA",
    "lr": 1e-3,
    "ks": [5, 10],
    "guidance": "pairwise",
    "lambda": 1,
    "search": {"dim": [8, 16]},
}


def _file(tmp_path, text, name="knobs.toml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_every_format_gives_the_same_values(tmp_path):
    assert config_file.read(_file(tmp_path, TOML)) == VALUES
    nested = {"data": "DATA", "lr": 1e-3, "ks": [5, 10], "search": {"dim": [8, 16]}}
    nested["guidance"] = {"guidance": "pairwise", "weight": 1}
    assert config_file.read(_file(tmp_path, json.dumps(nested), "k.json")) == VALUES
    pytest.importorskip("yaml", reason="needs the extra yaml")
    assert config_file.read(_file(tmp_path, YAML, "k.yml")) == VALUES


def test_what_a_run_writes_is_a_config_file(tmp_path):
    run = config.make_run("d", "w", backbone="sasrec", ks=(3, 7), lr=0.25, dropout=0.5)
    values = config_file.read(_file(tmp_path, knobs.to_json(run), "config.json"))
    data, workdir = values.pop("data"), values.pop("workdir")
    typed = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    assert config.make_run(data, workdir, **typed) == run


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("lr 3", "k.toml", "k.toml is not TOML: "),
        ("{", "k.json", "k.json is not JSON: "),
        ("a: [", "k.yaml", "k.yaml is not YAML: "),
        ("- 1", "k.yaml", "k.yaml holds [1]; expected names and values"),
        ("lr: 3", "k.cfg", "must end in one of .toml, .yaml, .yml, .json"),
        ("train = 3", "k.toml", "train = 3: a section is a table of knobs"),
        ("lr = 1\n[optimizer]\nlr = 2", "k.toml", "lr is given twice"),
        ("[train]\nrestart = true", "k.toml", "restart deletes a run; remove it"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, text, name, message):
    if "yaml" in name:
        pytest.importorskip("yaml", reason="needs the extra yaml")
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_file.read(_file(tmp_path, text, name))
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        config_file.read(str(tmp_path / "none.toml"))
