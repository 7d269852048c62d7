"""Plan a load, copy it, report it."""
