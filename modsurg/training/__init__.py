"""Train a model: a small loop, devices, logs, history."""
