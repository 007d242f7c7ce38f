"""`slgr train` from a checkout: python launch/train.py --help"""

from slgr_jax.cli import train

if __name__ == "__main__":
    train.run()
