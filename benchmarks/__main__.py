"""Every measurement in turn: `python -m benchmarks` (three runs of each) or `python -m benchmarks --full` (nine)."""

import subprocess
import sys
from pathlib import Path

RUNS = "9" if "--full" in sys.argv[1:] else "3"
for file in ("editing.py", "keeping.py", "looking.py", "training.py"):
    print(f"== {file} --runs {RUNS}", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(file), "--runs", RUNS], check=True)
