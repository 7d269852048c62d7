"""What differs between two models, states or files."""
