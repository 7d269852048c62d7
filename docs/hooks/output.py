"""Put what a command prints where a page asks for it, at every build: `<!-- output: modsurg --help -->`."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
PROMPTS = re.compile(r"^( *)```python\n(?= *>>>)", re.MULTILINE)
ASKED = re.compile(r"^<!-- output: (.+) -->$", re.MULTILINE)


@functools.cache
def output(command: str) -> str:
    """What the command prints, run once a build in the project's folder with this Python."""
    program, *arguments = shlex.split(command)
    start = {"python": [sys.executable], "modsurg": [sys.executable, "-m", "modsurg"]}.get(program, [program])
    done = subprocess.run(
        [*start, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
    )
    if done.returncode:
        raise PluginError(f"{command} ended with exit status {done.returncode}:\n{done.stdout}")
    return done.stdout.rstrip()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace each request by the command and what it printed; colour prompts as prompts."""
    markdown = PROMPTS.sub(r"\1```pycon\n", markdown)
    return ASKED.sub(lambda asked: f"```console\n$ {asked[1]}\n{output(asked[1])}\n```", markdown)
