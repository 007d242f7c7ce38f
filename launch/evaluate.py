"""`slgr evaluate` from a checkout: python launch/evaluate.py --help"""

from slgr_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.run()
