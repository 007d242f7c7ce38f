"""`python -m slgr_jax.cli` is `slgr`, where the console script is not on the path."""

from slgr_jax.cli.main import main

if __name__ == "__main__":
    main()
