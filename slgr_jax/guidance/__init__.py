"""Uses of an LLM product in training: one file a family."""
