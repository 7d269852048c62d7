"""Files that torch.save wrote, read as data."""
