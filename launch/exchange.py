"""`slgr exchange` from a checkout: python launch/exchange.py --help"""

from slgr_jax.cli import exchange

if __name__ == "__main__":
    exchange.run()
