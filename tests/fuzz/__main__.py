"""Fuzzing guided by coverage: `python -m fuzz [--seconds N] [READER ...]`, in tests/, with atheris installed.

Each reader runs in a process of its own, which ends at the first fault: an exception that is none of ours, ten seconds
for one input, or two gigabytes. The input is kept in build/fuzz/ and `python -m fuzz READER --replay FILE` reads it
again.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parents[2] / "build" / "fuzz"


def main() -> int:
    """Run the readers in turn, each for its part of the time."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER")
    parser.add_argument("--seconds", type=int, default=1800, help="for all of them together")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one input again")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return _fuzz(options.readers[0], options.seconds)
    from fuzz.readers import READERS

    names = options.readers or list(READERS)
    if options.replay:
        READERS[names[0]](options.replay.read_bytes())
        return 0
    return max(_run(name, options.seconds // len(names)) for name in names)


def _run(name: str, seconds: int) -> int:
    started = time.monotonic()
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    command = [sys.executable, "-m", "fuzz", name, "--seconds", str(seconds), "--alone"]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    lines = log.read_text(errors="replace").splitlines()
    runs = next(
        (line.split(":")[-1].strip() for line in lines if line.startswith("stat::number_of_executed_units")), "?"
    )
    peak = next((line.split(":")[-1].strip() for line in lines if line.startswith("stat::peak_rss_mb")), "?")
    ended = "no fault" if status == 0 else f"FAULT, see {log}"
    print(f"{name:13} {time.monotonic() - started:5.0f} s  {runs:>8} inputs  peak {peak:>5} MB  {ended}", flush=True)
    return int(status != 0)


def _fuzz(name: str, seconds: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["modsurg"]):
        from fuzz.readers import READERS

    reader = READERS[name]
    corpus = HERE / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        random = Random(seed)
        changed = atheris.Mutate(data, limit) if random.randrange(4) == 0 else reader.mutate(data, random)
        return changed[:limit]

    limits = ["-timeout=10", "-rss_limit_mb=3000", "-max_len=65536", "-len_control=0", "-print_final_stats=1"]
    arguments = [str(corpus), f"-artifact_prefix={HERE / name}/", f"-max_total_time={seconds}", *limits]
    atheris.Setup([sys.argv[0], *arguments], reader, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
