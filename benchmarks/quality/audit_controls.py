"""How much of a gain is the LLM's? Its lists beside controls that have no language model.

    python benchmarks/quality/audit_controls.py --data=DATA --teacher=NAME --out=DIR

DATA has a validation part, NAME holds lists (unlisted items rank below them). Every row is the
same recommender with the same settings but what is said here:

    none               no guidance
    none_train_valid   no guidance, trained on train + validation for as many epochs as `none`
                       of the same seed took to its best validation
    global             the LLM's lists, believed everywhere, against any unlisted item
    llm                the LLM's lists through --method
    no_echo            the same without what a user interacted with in training
    ease               the lists of EASE in the LLM's place, as long and through the same method
    consensus          one list for everybody, of what the LLM names most often
    training_items     no teacher: a user's training items against 100 hard negatives, alpha 1
    popular, EASE itself, EASE fitted on train + validation (of catalogues up to 5,000 items)

Where --lambdas or --constant_lambdas names several, seed 0's validation chooses one for each arm.
Every run meets the test part once. Called again it goes on where it was; more seeds or arms may
be asked for. Writes DIR/audit.json and DIR/audit.md and prints the latter: NDCG@10, means over
seeds, and the differences of `llm` with paired t-tests over seeds and over users (each user's mean
over seeds), corrected by Holm over the table.
"""

from __future__ import annotations

import dataclasses
import pathlib

from slgr_jax.cli import flags
from slgr_jax.config.knobs import Section, knob
from slgr_jax.errors import ConfigError, listing

METHODS = ("hard_negatives", "calibrated")
UNGUIDED = ("none", "none_train_valid")
BY_METHOD = ("llm", "no_echo", "ease", "consensus")
ALPHA_1 = ("global", "training_items")
ARMS = (*UNGUIDED, "global", *BY_METHOD, "training_items")


@dataclasses.dataclass(frozen=True)
class AuditConfig(Section):
    """What is audited, with which settings."""

    data: str = knob("", "dataset directory with a validation part")
    teacher: str = knob("", "product of lists under DATA/teacher")
    out: str = knob("", "directory of the runs and the report")
    arms: str = knob(",".join(ARMS), "rows of the report, with commas; none is always among them")
    method: str = knob(
        "hard_negatives",
        "how lists are used: hard_negatives = against the 100 items that `none` of the same seed "
        "ranks highest, gate with a reference; calibrated = against any unlisted item",
        choices=METHODS,
    )
    seeds: int = knob(3, "runs of an arm, seeds 0, 1, ...", minimum=1)
    recommender: str = knob("mf", "what is trained", choices=("mf", "lightgcn"))
    learning_rate: float = knob(0.1, "of every run", above=0)
    l2_plain: float = knob(0.02, "L2 penalty of runs without guidance", minimum=0)
    l2_guided: float = knob(-1.0, "L2 penalty of guided runs; -1 = --l2_plain", minimum=-1)
    triples: int = knob(2048, "triples per step", minimum=1)
    epochs: int = knob(200, "most epochs", minimum=1)
    eval_every: int = knob(5, "epochs between two validations", minimum=1)
    patience: int = knob(8, "validations without a better one before stopping; 0 = never")
    lambdas: str = knob("10", "weights tried with --method, with commas")
    constant_lambdas: str = knob("0.01,0.03,0.1", "weights tried with alpha 1, with commas")

    @property
    def asked(self) -> tuple[str, ...]:
        """The arms in the order of the report.

        Raises:
          ConfigError: an unknown arm.
        """
        asked = {"none", *self.arms.split(",")}
        unknown = sorted(asked - set(ARMS))
        if unknown:
            raise ConfigError(f"--arms: {listing(unknown)} is not one of: {listing(ARMS, 99)}")
        return tuple(arm for arm in ARMS if arm in asked)

    def weights(self, arm: str) -> tuple[float, ...]:
        """The values of lambda tried for an arm; (0,) without guidance."""
        if arm in UNGUIDED:
            return (0.0,)
        name = "constant_lambdas" if arm in ALPHA_1 else "lambdas"
        text = getattr(self, name)
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError as error:
            raise ConfigError(f"--{name}={text}: {error}; give numbers, e.g. 0.1,1") from error


def main(_: list[str]) -> None:
    import audit_rows

    from slgr_jax.data import dataset as dataset_lib
    from slgr_jax.experiments import results

    audit: AuditConfig = flags.section_from_flags(AuditConfig)
    dataset = dataset_lib.load(audit.data)
    if not len(dataset.valid):
        raise ConfigError(f"{audit.data} has no validation part: nothing to choose epochs by")
    out = pathlib.Path(audit.out)
    out.mkdir(parents=True, exist_ok=True)

    facts = audit_rows.report(audit, dataset, audit_rows.measure_arms(audit, dataset))
    results.write_json(out / "audit.json", facts)
    text = audit_rows.render(facts)
    (out / "audit.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    flags.run(main, usage=__doc__, sections=[AuditConfig], required=("data", "teacher", "out"))
