"""What reports say of controls."""

from __future__ import annotations

from slgr_jax.experiments import arms, render


def test_every_control_is_explained() -> None:
    """A control without a line here would end a comparison in a KeyError, after all training."""
    assert set(render.EXPLAINED) == set(arms.CONTROLS)
    texts = [text.format(m="paper") for text in render.EXPLAINED.values()]
    assert all("paper" in text for text in texts)
