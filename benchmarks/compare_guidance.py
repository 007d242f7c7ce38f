"""`slgr compare` from a checkout: python benchmarks/compare_guidance.py --help"""

from slgr_jax.cli import compare

if __name__ == "__main__":
    compare.run()
