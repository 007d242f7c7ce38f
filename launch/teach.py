"""`slgr teach` from a checkout: python launch/teach.py --help"""

from slgr_jax.cli import teach

if __name__ == "__main__":
    teach.run()
