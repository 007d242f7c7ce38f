"""Whom to ask about what, and the files that ask it."""
