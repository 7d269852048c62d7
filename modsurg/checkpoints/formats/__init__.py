"""The file formats: each reads and writes tensors by key, and knows nothing of models."""
