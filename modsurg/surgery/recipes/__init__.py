"""Edits as data that can be replayed."""
