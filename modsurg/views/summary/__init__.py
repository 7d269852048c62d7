"""The summary of a model or a file."""
