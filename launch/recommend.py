"""`slgr recommend` from a checkout: python launch/recommend.py --help"""

from slgr_jax.cli import recommend

if __name__ == "__main__":
    recommend.run()
