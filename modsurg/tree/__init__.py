"""Read a module tree: select in it, find what is shared, describe it, run its shadow."""
