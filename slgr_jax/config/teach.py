"""The knobs of slgr teach: a section per command, and what commands share."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.baselines import BASELINES
from slgr_jax.config.derive import DeriveConfig
from slgr_jax.config.examples import ExampleFileConfig
from slgr_jax.config.knobs import Section, knob
from slgr_jax.config.teach_texts import TEXT_PROMPTS, TextConfig
from slgr_jax.config.teach_vectors import (
    EmbedConfig,
    FactorConfig,
    NearestConfig,
    SimilarConfig,
)

# What a teacher product was built from; the loader refuses `includes_eval`.
BUILT_FROM = ("train_only", "prefix", "includes_label", "includes_valid", "includes_eval")
# What an item outside a user's list means: never asked about, or ranked below the list (a list
# that the teacher wrote freely over the whole catalogue).
UNLISTED = ("unknown", "below")
# Training items of a user among the answers: not asked about; hidden from the history that the
# teacher was shown, so that the answers on them test the teacher; or perhaps shown to it.
TRAINING_ITEMS = ("none", "hidden", "shown")
SCORERS = ("wordllama", "transformers")
# What a request asks for, by the form of its answer.
PROMPTS = ("listwise", "ranking", "pairwise", "pointwise", "rating", "free_list")
# Most items of a list (free_list: titles) where --list_size is 0.
LIST_SIZES = {"free_list": 50, "": 20}
# What a request for a free list shows to choose from.
CATALOGUES = ("none", "all")
ORDERS = ("random", "both", "one")
# How a request states the form of its answer: a JSON schema with its labels and range of scores,
# any JSON object, or words alone.
STRUCTURED = ("json_schema", "json_object", "none")
REQUEST_FORMATS = ("jsonl", "parquet")
# What services call the most tokens of an answer.
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
# Items that a carried list could not name.
NEW_ITEMS = ("error", "below", "unknown")
# How teachers are made one.
FUSIONS = ("reciprocal", "rrf", "borda", "mean", "latest")


@dataclasses.dataclass(frozen=True)
class TeachConfig(Section):
    """What commands share."""

    data: str = knob("", "dataset directory that slgr prepare wrote")
    name: str = knob(
        "",
        "what to write or inspect: DATA/teacher/NAME (candidates: DATA/candidates/NAME, requests: "
        "DATA/requests/NAME, collect: also DATA/answers/NAME; of texts DATA/texts/NAME in place of "
        "the first)",
    )
    model: str = knob("", "import, requests, collect: the LLM that answered or is to answer")
    seed: int = knob(0, "seed of all draws", minimum=0)
    delimiter: str = knob(",", "import: CSV column separator; tab is '\\t'")
    rows_per_shard: int = knob(4_194_304, "most rows in one Arrow shard", minimum=1)
    overwrite: bool = knob(False, "replace what NAME holds when it exists")
    with_validation: bool = knob(
        False,
        "make it of training and validation: what a refit learns from in place of the product that "
        "was made of training (slgr train --refit=RUN --teacher=NAME, slgr compare "
        "--refit_teacher=NAME); everything else refuses it",
    )
    subtitles: bool = knob(
        False,
        "titles (import --items_as=titles, collect of free lists): one without a subtitle also "
        "means the only item that has it before one (Sapiens: A Brief History); wrong where it "
        "means another (Mad Max, of which DATA has Mad Max: Fury Road)",
    )


@dataclasses.dataclass(frozen=True)
class ImportConfig(Section):
    """import: answers of any LLM in a file of your own."""

    scores: str = knob(
        "",
        "Parquet, Arrow, JSON lines or CSV file with user, item, score (empty score: not "
        "answered), or user, item, rank (1 the best), or user, preferred, other[, margin]; ids as "
        "in the raw data. Or a folder with an answer a user as the model wrote it, user_12.txt: "
        "lists of titles",
    )
    interactions: str = knob(
        "",
        "in place of --scores: a file with user, item[, weight] of what users take in the LLM's "
        "word, to be learned as interactions (slgr train --guidance=interactions); weights above 0 "
        "and up to 1, without them all are 1",
    )
    edits: str = knob(
        "",
        "in place of --scores: a file with user, item or position (0 the oldest), noise (0 to 1)"
        "[, replacement]: how likely an LLM takes a training interaction for noise, and by what it "
        "would replace it (slgr train --edits=NAME); written to DATA/edits/NAME",
    )
    built_from: str = knob(
        "train_only",
        "what the teacher saw; train_only = training interactions, prefix = what came "
        "before each interaction, includes_label = also the training answers it scores, "
        "includes_valid = validation (slgr train --refit alone takes it), includes_eval = the test "
        "part (training refuses it)",
        choices=BUILT_FROM,
    )
    unlisted: str = knob(
        "unknown",
        "an item outside a user's list was never asked about (unknown) or ranks below "
        "the list (below: the teacher wrote it freely over the whole catalogue)",
        choices=UNLISTED,
    )
    training_items: str = knob(
        "shown",
        "training items of a user among the answers were not asked about (none), had been hidden "
        "from the history that the teacher was shown, so that they test it (hidden), or may have "
        "been shown to it (shown)",
        choices=TRAINING_ITEMS,
    )
    prompt_hash: str = knob("", "hash or name of the prompt, for reports")
    keep_training_items: bool = knob(
        False,
        "keep answers on a user's own training items, which echo the prompt; by default they are "
        "dropped and counted, unless --training_items=hidden",
    )
    score_kind: str = knob(
        "score",
        "rank = the scores are ranks, 1 the best, and are turned; logit, prob, rating, ...: for "
        "reports",
    )
    unknown: str = knob(
        "error",
        "rows with an id that DATA does not have; drop counts them",
        choices=("error", "drop"),
    )
    user_column: str = knob("user", "--scores: column with user ids, where it is not called user")
    item_column: str = knob("item", "--scores: column with item ids or titles, likewise")
    score_column: str = knob("score", "--scores: column with scores, likewise")
    weight_column: str = knob("weight", "--interactions: column with weights, likewise")
    items_as: str = knob(
        "ids",
        "what names the items: ids of the raw data, or titles (what names no item, or two, is "
        "dropped and counted)",
        choices=("ids", "titles"),
    )
    append: bool = knob(
        False,
        "add the rows to the product that there is, as new shards; a pair that it has already is "
        "an error",
    )
    duplicates: str = knob(
        "error",
        "rows that disagree about one user's same items; equal rows count once",
        choices=("error", "mean"),
    )


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Section):
    """score: a language model that runs locally (it takes the first sets of candidates, too)."""

    scorer: str = knob(
        "wordllama",
        "wordllama = token vectors (extra llm; seconds), transformers = a causal language model of "
        "yours (extra transformers); a model behind a server: see ask",
        choices=SCORERS,
    )
    llm: str = knob("", "transformers: name or folder of the model")
    noun: str = knob(
        "", "language models: what the items are, in the plural, for the prompt (movies, books)"
    )
    max_users: int = knob(0, "score only that many users, drawn at random; 0 = all", minimum=0)
    held_in: int = knob(
        200,
        "language models: training items that are hidden and asked for to see how often the "
        "teacher is right; 0 = not checked",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class CandidateConfig(Section):
    """candidates: whom to ask about what (score: the sets up to --tail_users)."""

    candidates: int = knob(
        20, "items per user with history, drawn from the popular pool", minimum=0
    )
    popular_pool: int = knob(1000, "size of the pool, most training users first", minimum=1)
    cold_candidates: int = knob(
        20, "more items per cold user, evenly spread over the text space", minimum=0
    )
    tail_fraction: float = knob(
        0.1, "tail items are this share of the catalogue", minimum=0, maximum=1
    )
    tail_users: int = knob(20, "users drawn per tail item", minimum=0)
    run: str = knob(
        "",
        "WORKDIR of a trained run: for the two hard sets and --doubtful (empty: none of them); "
        "from_run: whose lists",
    )
    hard_top: int = knob(10, "items per user at the top of the run's unseen items", minimum=0)
    hard_uncertain: int = knob(
        5, "items per user whose score the run is least sure of (nearest 0)", minimum=0
    )
    doubtful: int = knob(
        0,
        "items per user, training items among them, that --run dropped as noise and whose scores "
        "vary least, to be asked about anew (a run with --keep_hard and --hard_variance_share); "
        "prompts hide them",
        minimum=0,
    )
    doubtful_drops: int = knob(
        3, "--doubtful: the run dropped them at least so often (LLMHD: 3 to 9)", minimum=1
    )
    calibration_users: int = knob(
        500,
        "users asked about training items that their prompts hide, so that it is known how often "
        "the teacher is right",
        minimum=0,
    )
    calibration_positives: int = knob(
        1, "hidden training items per such user; at least one stays in the prompt", minimum=1
    )
    calibration_negatives: int = knob(
        9, "items without a training interaction, drawn uniformly, beside them", minimum=1
    )
    calibration_pick: str = knob(
        "last",
        "which training items are hidden: the last by time (random where there are no times), or "
        "random",
        choices=("last", "random"),
    )
    exclude_evaluation: bool = knob(
        False,
        "never ask about a user's own validation and test items; leaks: an item that is never "
        "asked about is then more likely one of them. By default they are drawn like any item",
    )


@dataclasses.dataclass(frozen=True)
class RequestConfig(Section):
    """requests: prompts as batch-API files (candidates: the plan and the budget)."""

    candidate_set: str = knob(
        "", "DATA/candidates/... to ask about; empty: NAME (score: pairs are drawn anew)"
    )
    out: str = knob("", "directory to write; empty: DATA/requests/NAME (report: DATA/reports/NAME)")
    prompt: str = knob(
        "listwise",
        "listwise = a score per item of a list, ranking = the list in order, pairwise = one of "
        "two items, pointwise = yes or no for one item, rating = 1 to 5 for one item, free_list = "
        "titles of the LLM's own choice, best first. Without candidates, a text of each user "
        "(item): user_profile, item_description, kar_user, kar_item = a text a factor, "
        "user_attributes, item_attributes = a phrase a factor",
        choices=(*PROMPTS, *TEXT_PROMPTS),
    )
    template: str = knob("", "text file to use instead of the one that comes with --prompt")
    history_items: int = knob(10, "training items in the prompt: the last by time", minimum=1)
    list_size: int = knob(
        0,
        "listwise, ranking: most items in one request; free_list: titles to ask for; 0 = "
        f"{LIST_SIZES['']}, free_list {LIST_SIZES['free_list']}",
        minimum=0,
    )
    catalogue: str = knob(
        "none",
        "free_list: none = the LLM chooses from the world at large, and titles that DATA lacks are "
        "counted; all = from the titles of all items, which the prompt shows",
        choices=CATALOGUES,
    )
    catalogue_tokens: int = knob(
        32_000, "free_list: most tokens of a catalogue that a prompt shows", minimum=1
    )
    permutations: int = knob(
        1,
        "listwise, ranking: how often the same list is asked, in another order; free_list: how "
        "often a user is asked (another order of the catalogue, or --temperature)",
        minimum=1,
    )
    pairs: int = knob(20, "pairwise: most pairs per user, calibration pairs first", minimum=1)
    orders: str = knob(
        "random",
        "pairwise: ask each pair in one random order (the bias for a place turns into noise, at "
        "half the price), in both orders, or in one (the first candidate first)",
        choices=ORDERS,
    )
    logprobs: bool = knob(
        False, "pairwise, pointwise, rating: ask for the probabilities of the token that answers"
    )
    top_logprobs: int = knob(20, "how many tokens to ask for; services cap it", minimum=1)
    temperature: float = knob(0.0, "sampling temperature of the request", minimum=0)
    answer_tokens: int = knob(
        0, "most tokens of an answer; 0 = twice what an answer needs, and 16", minimum=0
    )
    token_limit: str = knob(
        "max_tokens",
        "what the service calls that limit; reasoning models of OpenAI want max_completion_tokens "
        "(their thoughts count: raise --answer_tokens)",
        choices=TOKEN_LIMITS,
    )
    structured: str = knob(
        "json_schema",
        "the form of an answer (response_format): json_schema = exactly the labels asked for and "
        "scores within --score_range, for services and servers that enforce it (OpenAI, vLLM, "
        "Ollama, LM Studio; llama.cpp: the labels, not the range); json_object = some JSON; none = "
        "asked for in words only",
        choices=STRUCTURED,
    )
    body: str = knob(
        "", 'JSON object with more fields of each request, e.g. {"seed": 1}; null takes one away'
    )
    file_format: str = knob(
        "jsonl",
        "of the request files: jsonl = OpenAI's batch API, vllm run-batch; parquet = the same "
        "requests as columns custom_id, method, url, body (JSON), for Ray Data or Spark",
        choices=REQUEST_FORMATS,
    )
    requests_per_file: int = knob(50_000, "most requests in one file", minimum=1)
    megabytes_per_file: float = knob(200.0, "most megabytes (10^6) in one file", above=0)
    max_requests: int = knob(0, "budget: requests; 0 = no limit", minimum=0)
    max_tokens: int = knob(0, "budget: tokens of prompts and answers; 0 = no limit", minimum=0)
    max_cost: float = knob(0.0, "budget: money; 0 = no limit", minimum=0)
    price_in: float = knob(0.0, "also report: money per million prompt tokens", minimum=0)
    price_out: float = knob(0.0, "also report: money per million answer tokens", minimum=0)
    dry_run: bool = knob(False, "print the plan and write nothing")
    open: bool = knob(
        False,
        "requests: write only what has no whole answer in DATA/answers/NAME, as requests-open-*, "
        "for another batch; ask: ask only that",
    )
    more_tokens: int = knob(
        2, "--open: answers that were cut off get so many times the tokens", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class AskConfig(Section):
    """ask: a server that answers now (the budget and prices above hold)."""

    base_url: str = knob(
        "",
        "OpenAI-compatible server, e.g. http://localhost:8000/v1 (vLLM), http://localhost:11434/v1 "
        "(Ollama), http://localhost:8080/v1 (llama.cpp)",
    )
    api_key_env: str = knob(
        "OPENAI_API_KEY", "environment variable that holds the key of the server, if it wants one"
    )
    concurrency: int = knob(8, "requests under way at once", minimum=1, maximum=4096)
    timeout: float = knob(120.0, "seconds to wait for an answer", above=0)
    retries: int = knob(
        6, "more tries where the server is busy, fails or does not answer", minimum=0
    )
    backoff: float = knob(
        0.5, "seconds before the first of them; twice as many before each further one", minimum=0
    )
    cut_retries: int = knob(
        2, "how often an answer that was cut off is asked for with twice the tokens", minimum=0
    )
    requests_per_minute: float = knob(0.0, "rate limit: requests; 0 = none", minimum=0)
    tokens_per_minute: float = knob(
        0.0, "rate limit: tokens of prompts and the most of answers; 0 = none", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class CollectConfig(Section):
    """collect: batch-API results to an answer log and a product."""

    requests: str = knob("", "directory that `requests` wrote; empty: DATA/requests/NAME")
    results: str = knob(
        "",
        "result files or folders of them, separated by commas: JSON lines or arrays (also .gz, "
        ".zst, .bz2), Parquet or Arrow with custom_id and text; of OpenAI, vLLM, Anthropic, "
        "Gemini, Bedrock",
    )
    score_range: tuple[int, ...] = knob(
        (0, 1),
        "listwise: lowest and highest score that the prompt asks for; an answer with scores "
        "outside of it is refused",
    )
    aggregate: str = knob(
        "raw",
        "listwise, ranking: mean over permutations of the scores, or of each score's place in its "
        "own answer (rank: 0 worst, 1 best)",
        choices=("raw", "rank"),
    )
    pairs_to: str = knob(
        "preferences",
        "pairwise: preferences with margin |2p - 1|, or each item's mean probability to win "
        "(scores)",
        choices=("preferences", "scores"),
    )


@dataclasses.dataclass(frozen=True)
class FreeTeacherConfig(Section):
    """from_baseline, factors: a recommender without an LLM."""

    baseline: str = knob(
        "ease",
        "whose lists, or factors: popular, item_item, ease or ials (extra ials)",
        choices=BASELINES,
    )


@dataclasses.dataclass(frozen=True)
class CombineConfig(Section):
    """combine: teachers of DATA, with scores, as one."""

    names: str = knob("", "two or more of DATA/teacher, separated by commas")
    method: str = knob(
        "reciprocal",
        "reciprocal = mean of 1/rank, rrf = sum of 1/(rrf_k + rank), borda = mean of 1 - (rank - "
        "1)/length of the list, mean = mean of scores scaled to 0..1, a teacher at a time, latest "
        "= the score of the last of --names that has one, as it is. Where unlisted items of all "
        "teachers rank below, an item that a teacher does not list counts 0 (mean, latest: is left "
        "out), and those of the result rank below. Otherwise it is left out of the mean, but is 0 "
        "for a teacher whose own list it is below, and unlisted items of the result are unknown",
        choices=FUSIONS,
    )
    rrf_k: int = knob(60, "rrf: the larger, the less the first ranks stand out", minimum=0)
    min_votes: int = knob(1, "keep items that at least this many teachers answered", minimum=1)


@dataclasses.dataclass(frozen=True)
class ExportConfig(Section):
    """export: a product as a file with external ids."""

    out: str = knob("", "file to write: .csv, .parquet or .jsonl")


@dataclasses.dataclass(frozen=True)
class CarryConfig(Section):
    """carry: a product of the dataset that DATA was appended to."""

    parent: str = knob("", "dataset directory that has the product: DATA's parent", flag="from")
    new_items: str = knob(
        "error",
        "where unlisted items rank below the lists: items that the parent had not rank below, too, "
        "though the teacher could not name them (below); or unlisted items become unknown, and "
        "only the order within the lists is kept (unknown)",
        choices=NEW_ITEMS,
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig(Section):
    """report: where the teacher is right."""

    known_negatives: int = knob(
        50, "most pairs with each item whose user is known to have chosen it", minimum=1
    )
    known_users: int = knob(
        20_000, "most users whose known pairs are looked at, drawn with --seed", minimum=1
    )


TEACH_SECTIONS: tuple[type[Section], ...] = (
    TeachConfig,
    ImportConfig,
    ScoreConfig,
    CandidateConfig,
    RequestConfig,
    TextConfig,
    AskConfig,
    CollectConfig,
    EmbedConfig,
    NearestConfig,
    SimilarConfig,
    FactorConfig,
    FreeTeacherConfig,
    CombineConfig,
    DeriveConfig,
    ExampleFileConfig,
    ExportConfig,
    CarryConfig,
    ReportConfig,
)
