"""A module tree as plain data, and back."""
