"""Rules for tensors that another project stores otherwise; see `modsurg.checkpoints.rules`."""

from modsurg.checkpoints.rules import Concat, Interpolate, Split, Transpose

__all__ = ["Concat", "Interpolate", "Split", "Transpose"]
