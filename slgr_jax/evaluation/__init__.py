"""Rankings and their metrics, labelled rows, significance, baselines."""
