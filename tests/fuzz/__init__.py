"""Files that nobody would write, for every reader that modsurg has. `python -m fuzz --help` (in tests/)."""
