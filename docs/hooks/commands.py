"""Run the commands of the documentation, each in a fork of one process that has imported torch already.

A command is `python FILE ...`, `modsurg ...`, or `steps FILE`, which runs a script piece by piece and prints JSON.

Started by output.py: on stdin [[command, folder], ...] as JSON, on stdout the exit status of each.
"""

import json
import os
import runpy
import shlex
import sys
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import steps

ROOT = Path(__file__).parents[2]
IMPORTS = ("torchvision.datasets", "torch.utils.tensorboard", "matplotlib.figure", "modsurg.views.environment")


def run(command: str, folder: str) -> None:
    """Run a command in the folder; what it prints goes into its file "printed"."""
    program, *arguments = shlex.split(command)
    os.chdir(folder)
    with open("printed", "w", buffering=1) as printed:
        sys.stdout = sys.stderr = printed
        if program == "modsurg":
            sys.argv = [program, *arguments]
            runpy.run_module("modsurg", run_name="__main__")
        elif program == "steps":
            file = ROOT / arguments[0]
            sys.argv, sys.path[0] = arguments, str(file.parent)
            json.dump(steps.pieces(file), printed)
        else:
            file = ROOT / arguments[0]
            sys.argv, sys.path[0] = arguments, str(file.parent)
            runpy.run_path(str(file), run_name="__main__")


def main() -> None:
    """Run them, as many at once as there are cores."""
    tasks = json.load(sys.stdin)
    for name in IMPORTS:
        __import__(name)
    fork = get_context("fork")
    processes = [fork.Process(target=run, args=task) for task in tasks]
    waiting, running = processes[::-1], set()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            waiting[-1].start()
            running.add(waiting.pop())
        done = wait([process.sentinel for process in running])
        running = {process for process in running if process.sentinel not in done}
    json.dump([process.exitcode for process in processes], sys.stdout)


if __name__ == "__main__":
    main()
