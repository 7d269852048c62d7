"""torch.distributed.checkpoint directories."""
