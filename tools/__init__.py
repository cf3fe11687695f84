"""Helpers of the repository itself: not installed, imported by tests and by the Makefile."""
