import os

from hypothesis import HealthCheck, settings

collect_ignore = ["training/data_parallel.py"]  # a script for torchrun

# A loaded machine is not a fault of the code. The gate gives one verdict on one code; elsewhere examples are new.
settings.register_profile(
    "patient", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
