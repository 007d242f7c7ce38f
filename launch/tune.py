"""`slgr tune` from a checkout: python launch/tune.py --help"""

from slgr_jax.cli import tune

if __name__ == "__main__":
    tune.run()
