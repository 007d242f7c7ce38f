"""A folder of answers as a model wrote them, a text file a user -> ranked titles.

    user_12.txt, user_12_checkpoint_EXP_1.txt, 12.txt     a list that user 12 was given

The layout of github.com/sisinflab/Recommender-ChatGPT (chat_gpt_output/checkpoints and their like),
and what a loop over users leaves behind. How a list is read: `title_answers.read_titles`.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

import pyarrow as pa

from slgr_jax.errors import InputError, listing
from slgr_jax.teacher.collect import title_answers
from slgr_jax.teacher.collect.readings import ListRefused

_NAME = re.compile(r"(?:user_)?(?P<user>[^_.]+)(?:_.*)?\.txt")
_ASKED = 0  # titles asked for: nobody said


class AnswerFolder(NamedTuple):
    """What a folder holds.

    Attributes:
      table: columns user and item (text; the item is a title) and rank (text, 1 the best).
      counts: answers, and answers_unread: those without a list.
    """

    table: pa.Table
    counts: dict[str, int]


def read(path: pathlib.Path) -> AnswerFolder:
    """The lists of a folder's text files, in the order of their names.

    Raises:
      InputError: there is no such file, two are of one user, one is not UTF-8, or none has a list.
    """
    names = sorted(file.name for file in path.iterdir() if _NAME.fullmatch(file.name))
    if not names:
        found = listing(sorted(file.name for file in path.iterdir()), 3)
        raise InputError(
            f"{path} holds no answers: they are text files called by the user, as user_12.txt or "
            f"user_12_answer.txt; files found: {found}"
        )
    file_of: dict[str, str] = {}
    users: list[str] = []
    titles: list[str] = []
    ranks: list[str] = []
    unread, reason = 0, ""
    for name in names:
        match = _NAME.fullmatch(name)
        assert match is not None
        user = match["user"]
        if user in file_of:
            raise InputError(f"{path}: {file_of[user]} and {name} are both of user {user}")
        file_of[user] = name
        try:
            text = (path / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path / name} is not UTF-8: {error}") from error
        answer = title_answers.read_titles(text, _ASKED, cut=False)
        if isinstance(answer, ListRefused):
            unread += 1
            reason = reason or f"{name}: {answer.kind}: {answer.detail}"
            continue
        written, _ = answer
        users += [user] * len(written)
        titles += written
        ranks += map(str, range(1, len(written) + 1))
    if not users:
        raise InputError(f"{path}: none of {len(names)} answers has a list; {reason}")
    table = pa.table({"user": users, "item": titles, "rank": ranks})
    return AnswerFolder(table, {"answers": len(names), "answers_unread": unread})
