collect_ignore = ["data_parallel.py"]  # a script for torchrun
