"""Run a model without computing: meta copy, observer, inputs, multiply-adds."""
