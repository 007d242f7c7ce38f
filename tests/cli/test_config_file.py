"""--config=FILE: the command line wins, wrong names and types are one line, a run repeats."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import worlds
from absl import flags as absl_flags

from slgr_jax import api, config
from slgr_jax.cli import flags, train
from slgr_jax.training import restore

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def command():
    """Parse a command line of `slgr train` with more flags; what `main` would see."""
    before = set(flags.FLAGS)
    train.define()
    absl_flags.DEFINE_list("backbones", ["mf"], "a list")
    absl_flags.DEFINE_integer("seeds", 5, "a number", lower_bound=2)
    own = tuple(set(flags.FLAGS) - before)
    for section in train.SECTIONS:
        flags.define_section(section)

    def parse(path, *arguments):
        flags.FLAGS(["slgr", *arguments])
        flags._read_config_file(str(path), train.SECTIONS, own)
        return flags.FLAGS

    yield parse
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_command_line_wins_and_the_rest_is_given(tmp_path, command):
    path = tmp_path / "k.toml"
    path.write_text('data = "D"\nlr = 1\ndim = 16\nks = [3]\nbackbones = ["mf", "din"]\nseeds = 3')
    given = command(path, "--dim=32", "--workdir=W")
    assert (given.data, given.workdir, given.seeds) == ("D", "W", 3)
    assert given.backbones == ["mf", "din"]
    knobs = flags.given_knobs(*train.SECTIONS)
    assert knobs == {"lr": 1.0, "dim": 32, "ks": (3,)}
    assert config.make_run("D", "W", **knobs).train.early_stop_metric == "ndcg@3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "no knob of this command is called 'epoch'; did you mean epochs?"),
        ("qqq = 3", "no knob of this command is called 'qqq'; see --help"),
        ('epochs = "3"', 'epochs = "3" is text; --epochs takes a whole number'),
        ("epochs = 3.5", "epochs = 3.5 is a number; --epochs takes a whole number"),
        ("epochs = true", "epochs = true is true or false; --epochs takes a whole number"),
        ("item_bias = 1", "item_bias = 1 is a whole number; --item_bias takes true or false"),
        ("ks = 10", "ks = 10 is a whole number; --ks takes a list of whole numbers"),
        ("ks = [1.5]", "ks = 1.5 is a number; --ks takes a whole number"),
        ("data = 3", "data = 3 is a whole number; --data takes text"),
        ("seeds = 1", "seeds: 1 is not integer >= 2"),
        ("backbone = {}", "backbone = {} is a table; --backbone takes text"),
    ],
)
def test_a_wrong_name_or_type_is_one_line(tmp_path, command, capsys, text, message):
    path = tmp_path / "k.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        command(path)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {path}: {message}")
    assert shown.count("\n") == 1


def test_a_run_is_repeated_bit_by_bit_from_what_it_wrote(tmp_path, command):
    data = worlds.random_dataset(tmp_path / "d")
    first, second = tmp_path / "first", tmp_path / "second"
    knobs = {"epochs": 2, "batch_size": 64, "dim": 8, "seed": 3, "lr": 0.125, "kernels": "xla"}
    api.train(data.path, first, restart=True, **knobs)
    given = command(first / "config.json", f"--workdir={second}")
    assert given.data == str(data.path)
    api.train(given.data, given.workdir, **flags.given_knobs(*train.SECTIONS))

    logs = [
        [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
        for root in (first, second)
    ]
    for log in logs:
        for record in log:
            del record["time"], record["triples_per_s"]
    assert logs[0] == logs[1]
    a, b = (restore.restore_run(str(root), "last").serving for root in (first, second))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
