"""Printed numbers beside ours: what is read of a clone, what is run, what is gained."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import pickle
import sys

import pytest

from slgr_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

import coldllm  # noqa: E402
import idgenrec  # noqa: E402
import kd_family  # noqa: E402
import reproduce  # noqa: E402
import reproduction  # noqa: E402


def pairs_of(path: pathlib.Path) -> list[str]:
    header, *lines = path.read_text().splitlines()
    assert header == "user,item"
    return lines


def cold_clone(root: pathlib.Path) -> pathlib.Path:
    """A tiny ColdLLM: users 0 to 24; items 0 and 1 are warm, 8 and 9 cold."""
    folder = root / "data" / "CiteULike"
    folder.mkdir(parents=True)
    parts = {
        "warm_emb": [(user, user % 2) for user in range(25)],
        "warm_val": [(0, 1)],
        "warm_test": [(1, 0)],
        "cold_item_val": [(2, 8)],
        "cold_item_test": [(3, 9)],
    }
    for name, pairs in parts.items():
        reproduction.write_pairs(folder / f"{name}.csv", pairs)
    answers = ["item_id,user_id,clk/no", "8,4,Yes", "8,5,No", "9,6,Yes", "9,7,Yes"]
    name = "CiteULike_askllama_llamawidetower20_0105.csv"
    (folder / name).write_text("\n".join(answers) + "\n")
    return root


def test_cold_items_and_the_pairs_of_each_arm(tmp_path: pathlib.Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    files = coldllm.read(cold_clone(tmp_path / "clone"), raw)
    assert len(files) == 6
    assert len(pairs_of(raw / "train.csv")) == 25
    assert pairs_of(raw / "valid.csv") == ["0,1", "2,8"]
    assert pairs_of(raw / "test.csv") == ["1,0", "3,9"]
    filtered = pairs_of(raw / "filter.csv")
    assert filtered == ["4,8", "5,8", "6,9", "7,9"]
    assert pairs_of(raw / "yes.csv") == ["4,8", "6,9", "7,9"]
    thinned = pairs_of(raw / "thinned.csv")
    assert len(set(thinned)) == 3
    assert set(thinned) < set(filtered)
    drawn = [line.split(",") for line in pairs_of(raw / "random.csv")]
    for item in ("8", "9"):
        users = {user for user, of in drawn if of == item}
        assert len(users) == 20
        assert users <= set(map(str, range(25)))
    assert len(drawn) == 40


def test_a_file_that_is_missing_or_a_pointer_is_named(tmp_path: pathlib.Path) -> None:
    clone = cold_clone(tmp_path)
    answers = next((clone / "data" / "CiteULike").glob("*askllama*"))
    answers.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(InputError, match="pointer to Git LFS; run `git lfs pull`"):
        coldllm.read(clone, tmp_path)
    answers.unlink()
    with pytest.raises(InputError, match="ColdLLM-Team/ColdLLM-repo as --input"):
        coldllm.read(clone, tmp_path)


def test_parts_that_are_pickles_are_read_and_run_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "dataset").mkdir()
    parts = {"Train": {0: {3: 1, 5: 1}, 1: {4: 1}}, "Valid": {0: 4, 1: 3}, "Test": {0: 6, 1: 5}}
    for name, part in parts.items():
        (tmp_path / "dataset" / name).write_bytes(pickle.dumps(part))
    kd_family.read(tmp_path, tmp_path)
    assert pairs_of(tmp_path / "train.csv") == ["0,3", "0,5", "1,4"]
    assert pairs_of(tmp_path / "valid.csv") == ["0,4", "1,3"]
    assert pairs_of(tmp_path / "test.csv") == ["0,6", "1,5"]
    (tmp_path / "dataset" / "Test").write_bytes(pickle.dumps({0: os.system}))
    with pytest.raises(InputError, match="only dicts of numbers are read"):
        kd_family.read(tmp_path, tmp_path)


class Commands:
    """In place of a budget: remembers commands and writes what they would."""

    def __init__(self, recalls: dict[str, float], most: int) -> None:
        self.seen: list[tuple[str, ...]] = []
        self._recalls, self._most = recalls, most

    def run(self, *words: str) -> None:
        flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
        if words[0] == "train" and sum(seen[0] == "train" for seen in self.seen) == self._most:
            raise idgenrec.OutOfTimeError
        self.seen.append(words)
        if words[0] == "prepare":
            written, facts = pathlib.Path(flags["out"], "manifest.json"), {"split_hash": "ab" * 8}
        elif words[0] == "teach":
            written = pathlib.Path(flags["data"], "teacher", flags["name"], "manifest.json")
            facts = {}
        elif words[0] == "evaluate":
            workdir = pathlib.Path(flags["workdir"])
            value = self._recalls[workdir.name]
            written, facts = workdir / "metrics.json", {"test": {"overall": {"recall@20": value}}}
        else:
            return
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(facts))


def tiny_target() -> reproduction.Target:
    """Two arms of one column; the second learns a product."""
    product = reproduction.Product(
        "teacher/word", (("teach", "import", "--data={data}", "--name=word", "--at={raw}/x"),)
    )

    def read(clone: pathlib.Path, raw: pathlib.Path) -> list[pathlib.Path]:
        return [clone / "file"]

    return reproduction.Target(
        name="coldllm",
        title="Tiny",
        repository="a/b",
        source="printed: there",
        read=read,
        flags=("--epochs=1",),
        columns=(reproduction.Column("R", "overall", "recall@20"),),
        arms=(
            reproduction.Arm("none", "nothing", printed={"R": 0.25}),
            reproduction.Arm("word", "an LLM's word", ("--teacher=word",), product, {"R": 0.5}),
        ),
        questions=(
            reproduction.Question("the word", "word", "none", "R"),
            reproduction.Question("nothing", "none", "none", "R"),
        ),
        differs=("all of it.",),
    )


def test_arms_are_run_once_and_told_beside_the_printed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    recalls = {"none_0": 0.2, "word_0": 0.5, "none_1": 0.3, "word_1": 0.3}
    commands, out = Commands(recalls, most=3), tmp_path / "out"
    facts = reproduction.run(tiny_target(), tmp_path, out, 2, commands)  # type: ignore[arg-type]
    assert facts["inputs"] == {"file": hashlib.sha256(b"abc").hexdigest()}
    assert facts["cut"] == ["word, seed 1"]
    assert [row["ours"]["R"] for row in facts["rows"]] == [[0.2, 0.3], [0.5]]
    gain = facts["gains"][0]
    assert gain["printed"] == 0.25
    assert gain["ours"] == gain["low"] == pytest.approx(0.3)  # of the seed that both have

    again = Commands(recalls, most=3)
    facts = reproduction.run(tiny_target(), tmp_path, out, 2, again)  # type: ignore[arg-type]
    assert [words[0] for words in again.seen] == ["train", "evaluate"]
    gain = facts["gains"][0]
    assert (gain["low"], gain["high"]) == (pytest.approx(0.0), pytest.approx(0.3))
    page = "\n".join(reproduce.results_page.reproduced(facts))
    assert "| nothing | .2500 / .2500 |" in page
    assert "| an LLM's word | .5000 / .4000 |" in page
    assert "| the word | R | +.2500 / +.1500 |" in page
    assert "- *Differs:* all of it." in page
    assert "Cut for want" not in page
    made = [words for words in commands.seen if words[0] == "teach"]
    assert made == [
        ("teach", "import", f"--data={out / 'data'}", "--name=word", f"--at={out / 'raw'}/x")
    ]


@pytest.mark.parametrize("target", reproduce.TARGETS.values(), ids=reproduce.TARGETS)
def test_questions_and_printed_numbers_are_of_the_tables_own_arms(
    target: reproduction.Target,
) -> None:
    columns = {column.name for column in target.columns}
    arms = {arm.name for arm in target.arms}
    assert len(arms) == len(target.arms)
    for question in target.questions:
        assert {question.arm, question.base} <= arms
        assert question.column in columns
    assert all(set(arm.printed) <= columns for arm in target.arms)
