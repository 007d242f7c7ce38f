"""Knobs: every one has a flag, a help text and a default in its own range; JSON keeps them all."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from slgr_jax import config
from slgr_jax.cli import teach
from slgr_jax.config import (
    EvaluationConfig,
    GateConfig,
    GuidanceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SliceConfig,
    TrainConfig,
    applies,
    knobs,
)
from slgr_jax.errors import ConfigError
from slgr_jax.guidance import make_guidance
from slgr_jax.guidance.gates import make_gate
from slgr_jax.models.backbones import make_backbone
from slgr_jax.models.row_optimizers import make_row_optimizer
from slgr_jax.sampling.context import Sizes

RUN_SECTIONS = tuple(config.sections().values())
SECTIONS = (config.PrepareConfig, *config.TEACH_SECTIONS, *RUN_SECTIONS)
KNOBS = [(section, field) for section in SECTIONS for field in dataclasses.fields(section)]
IDS = [f"{section.__name__}.{field.name}" for section, field in KNOBS]


def _outside(meta: knobs.Knob) -> list[float]:
    """A value just past each end of a knob's range."""
    out = [] if meta.minimum is None else [meta.minimum - 1]
    out += [] if meta.above is None else [meta.above, meta.above - 1]
    out += [] if meta.maximum is None else [meta.maximum + max(1, meta.maximum * 0.001)]
    return out + ([] if meta.below is None else [meta.below, meta.below + 1])


@pytest.mark.parametrize(("section", "field"), KNOBS, ids=IDS)
def test_every_knob_is_described_and_keeps_its_range(section, field):
    meta = knobs.knob_of(field)
    assert len(meta.help) > 10, "a help text says what the knob means"
    for value in _outside(meta):
        wrong = (int(value),) if isinstance(field.default, tuple) else value
        with pytest.raises(ConfigError, match=f"--{knobs.flag_name(field)}="):
            section(**{field.name: wrong})
    if meta.choices is not None:
        assert field.default in meta.choices
        with pytest.raises(ConfigError, match=f"--{knobs.flag_name(field)}='nonsense' is not one"):
            section(**{field.name: "nonsense"})


# The sections of guidance have no upper bounds so far.
_BOUNDED = (*RUN_SECTIONS, config.BaselineConfig)


@pytest.mark.parametrize("section", _BOUNDED, ids=lambda section: section.__name__)
def test_no_number_is_without_an_end(section):
    """What is past it would end in an abort or an overflow that names no knob."""
    for field in dataclasses.fields(section):
        kind = (*field.default, 0)[0] if isinstance(field.default, tuple) else field.default
        meta = knobs.knob_of(field)
        if not isinstance(kind, bool | str):
            assert meta.maximum is not None or meta.below is not None, field.name


def test_the_metric_to_stop_by_is_one_that_there_is():
    for values, metric in (
        ({}, "ndcg@10"),
        ({"ks": (5,)}, "ndcg@5"),
        ({"ks": (20, 10)}, "ndcg@10"),
        ({"ranking": False, "rows": "sampled"}, "rows_auc"),
        ({"ks": (5,), "early_stop_metric": "recall@5"}, "recall@5"),
    ):
        run = config.make_run("d", "w", **values)
        assert run.train.early_stop_metric == metric


def test_sizes_beyond_memory_are_refused_by_name():
    huge = 2**31
    for values, text in (
        ({"dim": huge}, "--dim=2147483648 is over its maximum 16384"),
        ({"layers": huge}, "--layers=2147483648 is over its maximum 256"),
        ({"mlp": (200, huge)}, "--mlp=2147483648 is over its maximum 16384"),
        ({"batch_size": huge}, "--batch_size=2147483648 is over its maximum 10000000"),
        ({"epochs": huge}, "--epochs=2147483648 is over its maximum 2000000000"),
        ({"dense_lr": 1e308}, r"--dense_lr=1e\+308 is over its maximum 3.4e\+38"),
    ):
        with pytest.raises(ConfigError, match=text):
            config.make_run("d", "w", **values)


def test_flag_names_are_distinct_within_a_command():
    of_teach = [command.flag_sections() for command in teach.COMMANDS.values()]
    for sections in ((config.PrepareConfig,), *of_teach, RUN_SECTIONS):
        names = [knobs.flag_name(f) for section in sections for f in dataclasses.fields(section)]
        assert len(set(names)) == len(names)


def test_a_message_names_the_ends_of_a_range():
    for make, text in (
        (lambda: GuidanceConfig(weight=-1.0), "--lambda=-1.0 is below its minimum 0"),
        (lambda: GateConfig(alpha=1.5), "--alpha=1.5 is over its maximum 1"),
        (lambda: OptimizerConfig(lr=0.0), "--lr=0.0 must be greater than 0"),
        (lambda: ModelConfig(dropout=1.0), "--dropout=1.0 must be less than 1"),
        (lambda: OptimizerConfig(l2=math.nan), "--l2=nan is not a finite number"),
        (lambda: OptimizerConfig(lr=math.inf), "--lr=inf is not a finite number"),
        (lambda: EvaluationConfig(ks=(10, 0)), "--ks=0 is below its minimum 1"),
        (lambda: EvaluationConfig(ks=()), "--ks is empty; .*--ks=10,20"),
        (lambda: TrainConfig(seed=2**31), "--seed=2147483648 is over its maximum"),
        (lambda: GuidanceConfig(guidance="x"), "--guidance='x' is not one of: none, pairwise"),
        (lambda: config.PrepareConfig(source="x"), "--source='x' is not one of: movielens"),
    ):
        with pytest.raises(ConfigError, match=text):
            make()


def _product(guidance):
    """What a guidance learns from."""
    if guidance == "none":
        return {}
    return {"teacher_vectors" if guidance in config.ALIGNMENTS else "teacher": "t"}


def test_a_name_that_config_offers_can_be_made_and_no_other():
    """The registries and the choices are two lists: neither may have what the other lacks."""
    for name in config.BACKBONES:
        sizes = Sizes(users=3, items=4, longest_history=5)
        assert make_backbone(ModelConfig(backbone=name), sizes).tables
    for name in config.GATES:
        assert callable(make_gate(GateConfig(gate=name)))
    for name in config.GUIDANCE:
        guided = config.make_run("d", "w", guidance=name, **_product(name))
        assert (make_guidance(guided) is None) == (name == "none")
    for name in config.TABLE_OPTIMIZERS:
        assert make_row_optimizer(OptimizerConfig(table_optimizer=name)).initial(2).ndim == 1
    unknown = object.__new__(OptimizerConfig)
    vars(unknown).update(dataclasses.asdict(OptimizerConfig()) | {"table_optimizer": "adam"})
    with pytest.raises(KeyError):
        make_row_optimizer(unknown)


# --- JSON -----------------------------------------------------------------------------------------


# Where not every value goes with those that the other knobs are changed to.
_FITTING = {
    "track": "mlflow",
    **{"loss": "bce", "negatives": "popularity", "gate_inputs": "margin,reference"},
    **{"uncertainty": "ensemble", "reference_runs": "a,b"},
}
# What a run with --init_from cannot have.
_WITHOUT = {
    "adapter_chunks": False,
    "adapter_gate": False,
    "adapter_neighbours": 0,
    "dual_view": False,
    "towers": "none",
    "item_side_weight": 0.0,
    "user_side_weight": 0.0,
    "init_item_vectors": "",
    "init_user_vectors": "",
    "item_rows": True,
    "user_rows": True,
    "user_fusion": "none",
}


def _changed(section: type) -> object:
    """A section in which every knob that has a second value has it."""
    values = {}
    for field in dataclasses.fields(section):
        meta, default = knobs.knob_of(field), field.default
        if meta.choices is not None:
            choices = list(meta.choices)
            other = choices[-1 if default == choices[0] else 0]
            values[field.name] = _FITTING.get(field.name, other)
        elif isinstance(default, bool):
            values[field.name] = not default
        elif isinstance(default, str):
            values[field.name] = _FITTING.get(field.name, f'{default}é "x"')
        elif isinstance(default, tuple):
            values[field.name] = (*default, 1000)
        elif isinstance(default, int):
            values[field.name] = default + 1
        else:
            values[field.name] = 0.37
    return section(**values)


@pytest.mark.parametrize("method", config.method_sections())
def test_json_gives_back_every_knob(method):
    """A guidance's own knobs go with that guidance alone."""
    others = config.method_sections().keys() - {method}
    kept = {name: section for name, section in config.sections().items() if name not in others}
    sections = {name: _changed(section) for name, section in kept.items()}
    vectors = sections["vectors"]
    sections["vectors"] = dataclasses.replace(vectors, **_WITHOUT)
    products = {"teacher": "", "teacher_vectors": ""} | _product(method)
    unused = {name for name, product in products.items() if not product}
    guidance = dataclasses.replace(sections["guidance"], guidance=method, **products)
    sections["guidance"] = guidance
    # Each is of another backbone or another way to draw.
    sections["edits"] = dataclasses.replace(sections["edits"], inserted="")
    sections["hardness"] = dataclasses.replace(sections["hardness"], product="")
    sections["examples"] = dataclasses.replace(sections["examples"], product="", vectors="")
    unused |= {"insert", "keep_hard", "examples", "example_vectors"}
    few = {"user_shards": 0, "train_only": "all", "init_ids_from": ""}  # what goes with few
    sections["train"] = dataclasses.replace(sections["train"], **few)
    unused |= few.keys()
    run = RunConfig(data="a b", workdir="ü", **sections)
    again = knobs.from_json(RunConfig, knobs.to_json(run), "config")
    assert again == run
    assert type(again.evaluation.ks) is tuple
    plain = RunConfig(data="d", workdir="w")
    changed = {text[2:].split(":")[0] for text in config.differences(plain, run)}
    fields = [field for section in kept.values() for field in dataclasses.fields(section)]
    only = {"backbone"} if len(config.BACKBONES) == 1 else set()
    assert changed == {knobs.flag_name(field) for field in fields} - only - _WITHOUT.keys() - unused
    assert config.differences(run, again) == []
    # Knobs that are refused beside --adapter_experts.
    for alone in (
        {"adapter_chunks": True, "init_item_vectors": vectors.init_item_vectors},
        {"adapter_neighbours": 7, "adapter_hidden": ()},
        {"item_side_weight": 0.37, "user_side_weight": 0.37},
    ):
        kept = dataclasses.replace(vectors, **_WITHOUT | {"adapter_experts": 0} | alone)
        run = config.make_run("d", "w", backbone="lightgcn")
        run = dataclasses.replace(run, vectors=kept)
        assert knobs.from_json(RunConfig, knobs.to_json(run), "config") == run


@pytest.mark.parametrize("guidance", ["none", "pairwise", "pointwise", "rrd"])
def test_knobs_of_another_guidance_are_refused(guidance):
    """They would do nothing."""
    teacher = "" if guidance == "none" else "t"
    for method, values, text in (
        ("pairwise", {"margin": 2.0}, "--margin=2.0"),
        ("rrd", {"rrd_pool": 9, "rrd_temperature": 2.0}, "--rrd_temperature=2.0, --rrd_pool=9"),
    ):
        if method == guidance:
            config.make_run("d", "w", guidance=guidance, teacher=teacher, **values)
            continue
        said = f"{text} is not used with --guidance={guidance}; add --guidance={method}"
        with pytest.raises(ConfigError, match=said):
            config.make_run("d", "w", guidance=guidance, teacher=teacher, **values)


def test_a_knob_newer_than_the_run_has_its_default():
    values = json.loads(knobs.to_json(RunConfig("d", "w", model=ModelConfig(dim=3))))
    del values["model"]["item_bias"], values["checksum"]
    assert knobs.from_json(RunConfig, json.dumps(values), "config").model == ModelConfig(dim=3)


def test_knobs_of_older_runs_have_the_names_of_now():
    values = json.loads(knobs.to_json(RunConfig("d", "w")))
    del values["checksum"], values["guidance"]["lists_per_step"], values["train"]["track"]
    values["rrd"]["lists_per_step"], values["train"]["tensorboard"] = 7, True
    run = knobs.from_json(RunConfig, json.dumps(values), "config", upgrade=config.upgrade)
    assert (run.guidance.lists_per_step, run.train.track) == (7, "tensorboard")


def test_an_integer_is_a_float_where_a_float_is_meant():
    values = json.loads(knobs.to_json(RunConfig("d", "w")))
    values["optimizer"]["lr"] = 1
    del values["checksum"]
    lr = knobs.from_json(RunConfig, json.dumps(values), "config").optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def test_a_value_that_changed_into_another_valid_one_is_damage():
    text = knobs.to_json(RunConfig("d", "w", model=ModelConfig(dim=3)))
    assert knobs.from_json(RunConfig, text, "config").model.dim == 3
    with pytest.raises(ConfigError, match=r"config is damaged: its SHA-256 is \w+, it states '\w+"):
        knobs.from_json(RunConfig, text.replace('"dim": 3', '"dim": 2'), "config")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50_000, "x is damaged: maximum recursion depth"),
        ("9" * 5_000, "x is damaged: Exceeds the limit"),
        ('{"data": "d", "wor', "x is damaged: "),
        ("[1]", r"x is \[1\]; expected an object"),
        ('{"data": "d"}', "x: missing key workdir"),
        ('{"data": "d", "workdir": "w", "foo": 1}', "x: unknown key foo; known: data, workdir, "),
        ('{"data": 5, "workdir": "w"}', "x: data is 5, of another type"),
        ('{"data": "d", "workdir": "w", "model": null}', "x: model is null; expected an object"),
        ('{"data": "d", "workdir": "w", "model": {"dim": "8"}}', 'x: model: dim is "8", of'),
        ('{"data": "d", "workdir": "w", "model": {"dim": true}}', "x: model: dim is true, of"),
        ('{"data": "d", "workdir": "w", "model": {"dim": 0}}', "--dim=0 is below its minimum 1"),
        ('{"data": "d", "workdir": "w", "evaluation": {"ks": 10}}', "x: evaluation: ks is 10, of"),
        ('{"data": "d", "workdir": "w", "evaluation": {"ks": [1.5]}}', "ks is 1.5, of another"),
    ],
)
def test_damaged_json_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        knobs.from_json(RunConfig, text, "x")


# --- knobs that contradict each other -----------------------------------------------------------


def test_guidance_and_teacher_come_together():
    with pytest.raises(ConfigError, match=r"--guidance=pairwise needs --teacher=NAME"):
        RunConfig("d", "w", guidance=GuidanceConfig(guidance="pairwise"))
    with pytest.raises(ConfigError, match=r"--teacher=x is not used with --guidance=none"):
        RunConfig("d", "w", guidance=GuidanceConfig(teacher="x"))


def test_preferences_follow_the_batch_unless_told():
    guided = GuidanceConfig(guidance="pairwise", teacher="x")
    assert RunConfig("d", "w").preferences_per_step == 0
    assert RunConfig("d", "w", guidance=guided).preferences_per_step == 2048
    told = dataclasses.replace(guided, preferences_per_step=7)
    assert RunConfig("d", "w", guidance=told).preferences_per_step == 7


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SliceConfig().cold_user_history = 3  # type: ignore[misc]


def test_what_a_gate_resolves_its_knobs_to():
    def run(**values):
        return config.make_run("d", "w", **{"guidance": "pairwise", "teacher": "t"} | values)

    calibrated = run(gate="calibrated", batch_size=300)
    assert calibrated.guidance_loss_name == "confidence"
    assert (calibrated.gate_lr, calibrated.labelled_per_step) == (0.02, 150)
    reads = {"gate_inputs": "reference,teacher", "reference_runs": "base"}
    assert run(gate="calibrated", **reads).guidance_loss_name == "gain"
    assert run(gate="budget").guidance_loss_name == "hinge"
    for wrong in ({"gate": "calibrated"}, {"gate": "paper"}, {"gate": "rule"}):
        with pytest.raises(ConfigError, match=r"gain weighs by what a teacher adds to a ref"):
            run(guidance_loss="gain", **wrong)
    paper = run(gate="paper", dense_lr=0.003)
    assert (paper.guidance_loss_name, paper.gate_lr, paper.labelled_per_step) == ("hinge", 0.003, 0)
    given = run(gate="budget", guidance_loss="logistic", gate_lr=0.5)
    assert (given.guidance_loss_name, given.gate_lr, given.labelled_per_step) == (
        "logistic",
        0.5,
        0,
    )
    assert config.make_run("d", "w").labelled_per_step == 0
    with pytest.raises(ConfigError, match=r"--gate_inputs=history,fame: choose from margin"):
        run(gate="calibrated", gate_inputs="history,fame")
    for method in config.GUIDANCE_DEFAULTS:  # what their authors believe, unless told
        guided = {"guidance": method, **_product(method)}
        assert config.make_run("d", "w", **guided).gate.gate == "constant"
        assert config.make_run("d", "w", **guided, gate="rule").gate.gate == "rule"
        assert config.make_run("d", "w", **guided, **{"lambda": 0.7}).guidance.weight == 0.7
        (product,) = _product(method)
        with pytest.raises(ConfigError, match=f"--guidance={method} needs --{product}=NAME"):
            config.make_run("d", "w", guidance=method)
    aligned = config.make_run("d", "w", guidance="rlmrec_con", teacher_vectors="v")
    assert aligned.guidance.weight == 0.001
    with pytest.raises(ConfigError, match=r"--teacher=t is not used with --guidance=htd; add"):
        config.make_run("d", "w", guidance="htd", teacher_vectors="v", teacher="t")
    with pytest.raises(ConfigError, match=r"--teacher_vectors=v is not used with --guidance=rd"):
        config.make_run("d", "w", guidance="rd", teacher_vectors="v", teacher="t")


# --- knobs that do nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate": "rule"}, "--gate=rule is not used with --guidance=none; add --guidance=pairwise"),
        ({"lambda": 3.0}, "--lambda=3.0 is not used with --guidance=none"),
        ({"layers": 4}, "--layers=4 is not used with --backbone=mf; it goes with --backbone one of "
                        "lightgcn, sasrec, gru4rec, bert4rec, autoint, dcn, dcnv2; or drop it"),
        ({"backbone": "lightgcn", "item_bias": False},
         "--item_bias=False is not used with --backbone=lightgcn; add --backbone=mf; or drop it"),
        ({"backbone": "mf", "mlp": (8, 4), "heads": 4}, "mlp=8,4 is not .*; .*heads=4.* drop them"),
        ({"backbone": "sasrec", "item_vectors": "t", "dual_view_heads": 4},
         "--dual_view_heads=4 is not used with --dual_view=False; add --dual_view=True"),
        ({"backbone": "sasrec", "user_vectors": "t", "user_fusion": "concat",
          "user_fusion_heads": 2}, "heads=2 is not used with --user_fusion=concat; add --user_fus"),
        ({"popularity_power": 0.5}, "is not used with --negatives=uniform; add --negatives=pop"),
        ({"shared_negatives": 9}, "--shared_negatives=9 is not used with --loss=bpr; add --loss"),
        ({"row_seed": 3}, "--row_seed=3 is not used with --rows=none"),
        ({"guidance": "pairwise", "teacher": "t", "budget": 0.5},
         "--budget=0.5 is not used with --gate=paper; add --gate=budget"),
        ({"guidance": "pairwise", "teacher": "t", "gate": "calibrated", "margin": 2.0},
         "--margin=2.0 is not used with --guidance_loss=confidence"),
        ({"loss": "bce", "rating_threshold": 4.0, "rating_power": 1.0},
         "--rating_power=1.0 is not used with --rating_threshold=4.0; add --rating_threshold=0.0"),
        ({"slice_preset": "llm_esr", "cold_user_history": 2},
         "--cold_user_history=2 is not used with --slice_preset=llm_esr; add --slice_preset=own"),
        ({"guidance": "rrd", "teacher": "t", "rrd_sample": False, "rrd_pool": 9},
         "--rrd_pool=9 is not used with --rrd_sample=False"),
        ({"guidance": "pairwise", "teacher": "t", "lists_per_step": 9},
         "--lists_per_step=9 is not used with --guidance=pairwise"),
    ],
)  # fmt: skip
def test_a_knob_that_does_nothing_is_refused(values, message):
    run = config.make_run("d", "w", **values)
    with pytest.raises(ConfigError, match=message):
        config.check_used(run, values)


def test_a_knob_that_does_something_is_not():
    for values in (
        {"backbone": "sasrec", "layers": 3, "heads": 4, "hidden": 8, "max_history": 9},
        {"backbone": "dcnv2", "experts": 2, "low_rank": 4, "mlp": (8,), "row_negatives": 2},
        {"guidance": "pairwise", "teacher": "t", "lambda": 2.0, "margin": 2.0, "gate_lr": 0.1},
        {"loss": "sampled_softmax", "shared_negatives": 9, "negatives": "popularity"},
        {"lambda": 0.1, "layers": 2},  # their defaults
    ):
        config.check_used(config.make_run("d", "w", **values), values)


def test_every_condition_names_knobs_that_there_are():
    names = {
        knobs.flag_name(field)
        for section in config.sections().values()
        for field in dataclasses.fields(section)
    }
    conditions = applies._APPLIES
    assert conditions.keys() <= names
    assert {condition.flag for condition in conditions.values()} <= names


def test_drawing_by_rating_goes_with_no_windows():
    with pytest.raises(ConfigError, match=r"--backbone=sasrec learns each window of a history"):
        config.make_run("d", "w", backbone="sasrec", rating_power=1.0)
