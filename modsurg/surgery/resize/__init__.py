"""Change the size of one layer."""
