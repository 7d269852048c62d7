"""The safetensors format, single files and sharded sets."""
