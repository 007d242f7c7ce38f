"""Backbones, embedding tables, how a step reads and writes their rows, losses, scores."""
