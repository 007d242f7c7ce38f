"""The knobs of baselines, that a run is shown beside."""

from __future__ import annotations

import dataclasses

from slgr_jax.config.knobs import COUNT, WIDTH, Section, knob
from slgr_jax.errors import ConfigError, listing

BASELINES = ("popular", "item_item", "ease", "ials")
# Items: 1,682 take 0.4 s of one core for each lambda, and the time grows with their cube.
EASE_BY_DEFAULT = 5_000


@dataclasses.dataclass(frozen=True)
class BaselineConfig(Section):
    """Recommenders of a few seconds that a run is shown beside."""

    baselines: str = knob(
        "auto",
        "popular, item_item, ease, ials, or several with commas; none; auto = popular, and ease up "
        "to 5,000 items (its time grows with their cube; named here it is fitted to any number). "
        "Settings are chosen by validation ndcg@10, or rows_auc of runs that stop by it",
    )
    ease_lambdas: tuple[int, ...] = knob(
        (10, 50, 100, 200, 400, 1000, 2000), "ease: L2 weights to try", minimum=1, maximum=COUNT
    )
    ease_gb: float = knob(
        16.0,
        "ease, item_item: most memory, in gigabytes (24, 12 bytes x items^2)",
        above=0,
        maximum=1_000_000,
    )
    ials_dim: int = knob(64, "ials: width of a factor (extra: ials)", minimum=1, maximum=WIDTH)
    ials_regularizations: tuple[int, ...] = knob(
        (1, 3, 10, 30), "ials: L2 weights to try", minimum=0, maximum=COUNT
    )
    ials_alphas: tuple[int, ...] = knob(
        (1, 10),
        "ials: weights of an interaction to try; any other pair weighs 1",
        minimum=1,
        maximum=COUNT,
    )
    ials_iterations: int = knob(20, "ials: sweeps over users and items", minimum=1, maximum=COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.baselines.split(",")
        unknown = [name for name in names if name not in BASELINES]
        if unknown and self.baselines not in ("auto", "none"):
            known = listing(("auto", "none", *BASELINES))
            raise ConfigError(f"--baselines={self.baselines}: choose from {known}")
        for name in ("ease_lambdas", "ials_regularizations", "ials_alphas"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty; give at least one value")
