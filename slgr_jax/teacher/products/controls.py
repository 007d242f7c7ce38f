"""Teachers that are no LLM: what a product must beat before its text can be said to help.

Each control of a product NAME has its coverage (the same users, the same number of answers):

    shuffled    another user's answers: what is said of the items stays, what is said of this user
                does not. Without echo: none on this user's own training items
    consensus   the crowd's: s_i = how many users' lists name i (of products without lists: its mean
                score, or how much more often it is preferred than not), the same for everybody
    popularity  s_ui = number of training users of i
    item_item   s_ui = sum over training items j != i of u of n_ij / sqrt(n_i n_j), with n_i users
                of i and n_ij users of both: cosine similarity of items
    ease, ials  s_ui of a recommender fitted on train and tuned on validation, who gives the scores
                is up to the caller (`fit`; evaluation/teacher_lists.py)

Those that score rate what the product was asked about. Where an unlisted item ranks below the
list (`unlisted == "below"`: the teacher chose what to list) they list the L best items outside the
user's training items, L as long as the product's list without its echo. They are kept as
DATA/teacher/NAME.CONTROL.

Shape letters: U users, I items, n rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from slgr_jax.data import schema, shards
from slgr_jax.data.dataset import Dataset
from slgr_jax.errors import ConfigError, InputError, listing
from slgr_jax.teacher.products import preferences, training_items
from slgr_jax.teacher.products.same_split import seen_in

CONTROLS = ("shuffled", "consensus", "popularity", "item_item", "ease", "ials")
COLLABORATIVE = ("ease", "ials")  # whose scores come from a fitted recommender
_CHUNK = 256  # users scored at once: [256, I] float64 is what must fit
_KINDS = {
    "consensus": "what is said of the item over all users",
    "popularity": "training count",
    "item_item": "sum of item-item cosines",
    "ease": "EASE",
    "ials": "iALS",
}

# Scores of some users [B] for every item: [B, I] floats.
ScoreUsers = Callable[[np.ndarray], np.ndarray]
# Name of a collaborative control -> its scores.
Fit = Callable[[str], ScoreUsers]


def control_name(name: str, control: str) -> str:
    """The product that holds a control of the product `name`."""
    return f"{name}.{control}"


def ensure(
    dataset: Dataset, name: str, control: str, *, seed: int = 0, fit: Fit | None = None
) -> str:
    """The name of a control product, written if there is none; one that is there is kept.

    Args:
      dataset: whose product `name` is.
      name: the product to control.
      control: one of `CONTROLS`.
      seed: of `shuffled`.
      fit: fits one of `COLLABORATIVE`; called where its product is not there.

    Raises:
      ConfigError: unknown control, or what is there was made from other answers.
      ManifestError, ShardError, InputError: the product cannot be used, or controlled.
    """
    control_product = control_name(name, control)
    root = preferences.product_path(dataset.path, control_product)
    if not (root / schema.MANIFEST).is_file():
        write(dataset, name, control, seed=seed, fit=fit)
        return control_product

    stated_model = preferences.load(dataset, control_product, verify=False).manifest.model
    product = preferences.load(dataset, name, verify=False).manifest
    if stated_model != _model(product, control, seed):
        raise ConfigError(
            f"{root} says {stated_model!r}, not {_model(product, control, seed)!r}: it controls "
            f"other answers than {name} holds, or was made otherwise; remove it, and it is made "
            "anew"
        )
    return control_product


def write(
    dataset: Dataset, name: str, control: str, *, seed: int = 0, fit: Fit | None = None
) -> schema.TeacherManifest:
    """Write one control of the product `name`; arguments and errors as for `ensure`."""
    if control not in CONTROLS:
        raise ConfigError(f"unknown control {control!r}; choose one of: {listing(CONTROLS)}")
    manifest = preferences.load(dataset, name).manifest
    root = preferences.product_path(dataset.path, name)
    expected = schema.TEACHER_SCHEMAS[manifest.kind]
    table = shards.read_shards(root, manifest.files, expected, verify=False).combine_chunks()

    below = manifest.unlisted == "below" and manifest.kind == "scores"
    if below and manifest.training_items != "hidden":  # echo is nothing that a control must match
        table = training_items.drop(table, dataset, f"teacher {name}")[0]
    if control == "shuffled":
        controlled, kind = _shuffled(table, manifest, dataset, seed), manifest.score_kind
    else:
        score, kind = _scorer(dataset, control, table, manifest, fit), _KINDS[control]
        if manifest.kind == "preferences":
            controlled = _reoriented(table, score)
        elif below:
            controlled = _listed(table, dataset, score)
        else:
            controlled = _rescored(table, score)

    provenance = preferences.Provenance(
        built_from=manifest.built_from
        if control in ("shuffled", "consensus")
        else seen_in(dataset),
        unlisted=manifest.unlisted,
        model=_model(manifest, control, seed),
        score_kind=kind,
        training_items=_training_items(manifest.training_items, control, below=below),
    )
    return preferences.write_product(
        dataset, control_name(name, control), controlled, provenance=provenance
    )


def _training_items(stated: str, control: str, *, below: bool) -> str:
    """What a control says of training items, where its product says `stated`."""
    if stated != "hidden":
        return stated
    if below:
        return "none"  # its lists have none
    # What was hidden from the LLM was not hidden from a recommender that is fitted on it.
    return "shown" if control in COLLABORATIVE else stated


def _model(product: schema.TeacherManifest, control: str, seed: int) -> str:
    """What a control's manifest says of itself: of which answers it is the control."""
    answers = schema.files_hash(product.files)
    drawn = f", without echo, seed {seed}" if control == "shuffled" else ""
    return f"control: {control} of {product.name} (answers {answers[:8]}{drawn})"


# --------------------------------------------------------------------- another user's answers


def _shuffled(
    table: pa.Table, manifest: schema.TeacherManifest, dataset: Dataset, seed: int
) -> pa.Table:
    """Users trade their answers in pairs (three of an odd number in a ring), without echo.

    In the order of (number of answers, random), neighbours trade: the numbers are nearly kept.
    Lists are as long as they are: a user's scores stay and get the items of the neighbour's list
    in its order, the user's own training items left out, filled up from the next neighbours'.
    """
    users = table.column("user").to_numpy()
    answered = np.ones(users.size, np.int64)
    if manifest.kind == "scores":
        answered = table.column("score").is_valid().to_numpy().astype(np.int64)

    answered_users, rows = np.unique(users, return_inverse=True)
    if answered_users.size < 2:
        raise InputError(
            f"teacher {manifest.name} answers for {answered_users.size} user; a shuffled one needs "
            "two"
        )

    counts = np.bincount(rows, weights=answered)
    order = np.lexsort((np.random.default_rng(seed).permutation(answered_users.size), counts))
    takers = order.copy()  # the rows of user order[k] go to user takers[k]
    even = answered_users.size - answered_users.size % 2
    takers[:even] = order[:even].reshape(-1, 2)[:, ::-1].reshape(-1)
    if even < answered_users.size:
        takers[-3:] = np.roll(order[-3:], 1)
    if manifest.kind == "scores" and manifest.unlisted == "below":
        return _traded_lists(table, dataset, answered_users[order], answered_users[takers])

    taker_of = np.empty(answered_users.size, np.int64)
    taker_of[order] = takers
    new = answered_users[taker_of[rows]].astype(np.int32)
    moved = table.set_column(
        table.schema.get_field_index("user"), table.schema.field("user"), pa.array(new)
    )
    moved = moved.take(pa.array(np.argsort(new, kind="stable")))
    if manifest.training_items == "hidden":  # answers on them test a teacher, this one too
        return moved
    return training_items.drop(moved, dataset, f"the shuffled answers of {manifest.name}")[0]


def _traded_lists(
    table: pa.Table, dataset: Dataset, givers: np.ndarray, takers: np.ndarray
) -> pa.Table:
    """Lists of `takers` [k] with the items of `givers` [k], then of the givers that follow."""
    columns = _by_user(table)
    listed = ~np.isnan(columns["score"])
    users, items, scores = (columns[name][listed] for name in ("user", "item", "score"))
    best_first = np.lexsort((items, -scores, users))
    users, items, scores = users[best_first], items[best_first], scores[best_first]
    bounds = np.searchsorted(users, np.arange(dataset.n_users + 1))
    train = dataset.positives(("train",))

    new_items = np.full(items.size, -1, np.int32)
    for place, taker in enumerate(takers.tolist()):
        begin, length = bounds[taker], bounds[taker + 1] - bounds[taker]
        taken = np.zeros(dataset.n_items, bool)
        taken[train.row(taker)] = True
        filled = 0
        for giver in np.roll(givers, -place).tolist():
            if filled == length:
                break
            if giver == taker:
                continue
            theirs = items[bounds[giver] : bounds[giver + 1]]
            fresh = theirs[~taken[theirs]][: length - filled]
            new_items[begin + filled : begin + filled + fresh.size] = fresh
            taken[fresh] = True
            filled += fresh.size
    kept = new_items >= 0
    owners = users[kept].astype(np.int32)
    return _scores_table(owners, new_items[kept], scores[kept], np.zeros(owners.size, bool))


# --------------------------------------------------------------------- teachers that score


def _scorer(
    dataset: Dataset,
    control: str,
    table: pa.Table,
    manifest: schema.TeacherManifest,
    fit: Fit | None,
) -> ScoreUsers:
    """Scores of any users for every item: [B] -> [B, I]."""
    if control in COLLABORATIVE:
        assert fit is not None, f"the caller fits {control}"
        return fit(control)

    popularity = dataset.learned_popularity.astype(np.float64)
    if control in ("popularity", "consensus"):
        of_items = popularity
        if control == "consensus":
            of_items = _consensus(table, manifest, dataset.n_items)
        return lambda users: np.broadcast_to(of_items, (users.size, dataset.n_items))
    x = dataset.positives(("train",)).matrix(dataset.n_items, np.float64)
    scale = 1 / np.sqrt(np.maximum(popularity, 1))

    def item_item(users: np.ndarray) -> np.ndarray:
        histories = x[users]
        # x_u D X^T X D with D = diag(scale), through users: [I, I] never exists.
        through = (histories.multiply(scale[None, :]).tocsr() @ x.T).tocsr() @ x
        return np.asarray(through.toarray() * scale[None, :] - histories.toarray())  # cos(i, i) = 1

    return item_item


def _consensus(table: pa.Table, manifest: schema.TeacherManifest, n_items: int) -> np.ndarray:
    """[I] what the product says of each item over all users; -inf: lists that never name it."""
    columns = _by_user(table)
    if manifest.kind == "preferences":
        won, lost = (
            np.bincount(columns[name], minlength=n_items) for name in ("preferred", "other")
        )
        return np.asarray((won - lost) / np.maximum(won + lost, 1))
    said = ~np.isnan(columns["score"])
    items, scores = columns["item"][said], columns["score"][said]
    votes = np.bincount(items, minlength=n_items).astype(np.float64)
    if manifest.unlisted == "below":
        return np.where(votes > 0, votes, -np.inf)
    return np.bincount(items, weights=scores, minlength=n_items) / np.maximum(votes, 1)


def _chunks(users: np.ndarray, score: ScoreUsers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(users, their scores [B, I]) of the distinct `users`, a chunk at a time."""
    distinct = np.unique(users)
    for begin in range(0, distinct.size, _CHUNK):
        chunk = distinct[begin : begin + _CHUNK]
        yield chunk, score(chunk)


def _scores_at(users: np.ndarray, items: np.ndarray, score: ScoreUsers) -> np.ndarray:
    """[n] float32: the scores of pairs, of which `users` ascend."""
    out = np.empty(users.size, np.float32)
    for chunk, scores in _chunks(users, score):
        low, high = np.searchsorted(users, [chunk[0], chunk[-1] + 1])
        rows = np.searchsorted(chunk, users[low:high])
        out[low:high] = scores[rows, items[low:high]]
    return out


def _by_user(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns as arrays, rows in order of user; a missing score is NaN."""
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    order = np.argsort(columns["user"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _rescored(table: pa.Table, score: ScoreUsers) -> pa.Table:
    """The same pairs with other scores; what was not answered stays so."""
    rows = _by_user(table)
    scores = _scores_at(rows["user"], rows["item"], score)
    return _scores_table(rows["user"], rows["item"], scores, np.isnan(rows["score"]))


def _listed(table: pa.Table, dataset: Dataset, score: ScoreUsers) -> pa.Table:
    """For each user the best items outside training, as many as the user has answers."""
    seen = dataset.positives(("train",))
    answered = table.column("user").to_numpy()[table.column("score").is_valid().to_numpy()]
    counts = np.bincount(answered, minlength=dataset.n_users)
    users, items, kept_scores = [], [], []
    for chunk, scores in _chunks(answered, score):
        for user, user_scores in zip(chunk, scores, strict=True):
            user_scores = user_scores.astype(np.float32)
            user_scores[seen.row(user)] = -np.inf
            best = np.argsort(-user_scores, kind="stable")[: counts[user]]  # ties: the lower index
            best = np.sort(best[user_scores[best] > -np.inf])
            users.append(np.full(best.size, user, np.int32))
            items.append(best.astype(np.int32))
            kept_scores.append(user_scores[best])
    owners = np.concatenate(users)
    nothing_missing = np.zeros(owners.size, bool)
    return _scores_table(
        owners, np.concatenate(items), np.concatenate(kept_scores), nothing_missing
    )


def _scores_table(
    users: np.ndarray, items: np.ndarray, scores: np.ndarray, unanswered: np.ndarray
) -> pa.Table:
    return pa.table(
        [pa.array(users), pa.array(items), pa.array(scores, mask=unanswered)],
        schema=schema.TEACHER_SCORES,
    )


def _reoriented(table: pa.Table, score: ScoreUsers) -> pa.Table:
    """The same pairs, each put in the scores' order; equal scores are no preference."""
    rows = _by_user(table)
    first, second = (
        _scores_at(rows["user"], rows[name], score).astype(np.float64)
        for name in ("preferred", "other")
    )
    gap = (first - second).astype(np.float32)
    kept = gap != 0
    turned = gap < 0
    columns = {
        "user": rows["user"],
        "preferred": np.where(turned, rows["other"], rows["preferred"]),
        "other": np.where(turned, rows["preferred"], rows["other"]),
        "margin": np.abs(gap),
    }
    return pa.table(
        [pa.array(columns[name][kept]) for name in schema.TEACHER_PREFERENCES.names],
        schema=schema.TEACHER_PREFERENCES,
    )
