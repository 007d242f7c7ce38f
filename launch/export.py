"""`slgr export` from a checkout: python launch/export.py --help"""

from slgr_jax.cli import export

if __name__ == "__main__":
    export.run()
