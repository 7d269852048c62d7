"""Change a module tree: verbs, transactions, and what has to follow an edit."""
