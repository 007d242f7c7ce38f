"""Teacher products on disk: checked rows, manifests, combinations, controls."""
