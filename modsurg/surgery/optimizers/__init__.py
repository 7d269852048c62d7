"""Optimizers and schedulers follow an edit."""
