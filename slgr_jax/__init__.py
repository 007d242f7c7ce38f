"""Train recommenders with offline LLM knowledge, believed only where it is right.

Importing this package imports nothing heavy: `--help` of a launch script must not
wait for JAX. Import the room you need, e.g. `from slgr_jax import step`.
"""

__version__ = "0.1.0"
