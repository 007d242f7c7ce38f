"""`slgr prepare` from a checkout: python launch/prepare.py --help"""

from slgr_jax.cli import prepare

if __name__ == "__main__":
    prepare.run()
