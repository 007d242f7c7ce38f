"""`slgr serve` from a checkout: python launch/serve.py --help"""

from slgr_jax.cli import serve

if __name__ == "__main__":
    serve.run()
