"""Guidance arms and controls over backbones and seeds: plan, run, test, report."""
