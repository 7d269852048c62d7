"""Keep a model: states, whole models, runs, and the formats beneath them."""
