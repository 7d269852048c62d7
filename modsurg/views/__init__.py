"""Look at a model or a file: summary, comparison, rendering."""
