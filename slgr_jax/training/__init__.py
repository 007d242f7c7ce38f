"""The train step, the loop around it, and a run's directory."""
