"""Operators and their backends."""
