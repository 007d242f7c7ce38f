"""`slgr quickstart` from a checkout: python launch/quickstart.py --help"""

from slgr_jax.cli import quickstart

if __name__ == "__main__":
    quickstart.run()
