"""Put what a command prints, or a file of the project, where a page asks for it, at every build.

`<!-- output: modsurg --help -->` becomes the command and its output, `<!-- source: examples/lora.py -->` the file.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
PROMPTS = re.compile(r"^( *)```python\n(?= *>>>)", re.MULTILINE)
OUTPUT = re.compile(r"^<!-- output: (.+) -->$", re.MULTILINE)
SOURCE = re.compile(r"^<!-- source: (.+) -->$", re.MULTILINE)


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
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise PluginError(f"{command} ended with exit status {done.returncode}:\n{done.stdout}")
    return done.stdout.replace(f"{ROOT}/", "").rstrip()


def source(name: str) -> str:
    """The file as a block of code under its name."""
    return f'```python title="{name}"\n{(ROOT / name).read_text().rstrip()}\n```'


def on_config(config: MkDocsConfig) -> None:
    """Run the commands of all pages, as many at once as there are cores."""
    pages = Path(config.docs_dir).rglob("*.md")
    commands = dict.fromkeys(command for page in pages for command in OUTPUT.findall(page.read_text()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(output, commands))


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace each request; colour prompts as prompts."""
    markdown = PROMPTS.sub(r"\1```pycon\n", markdown)
    markdown = SOURCE.sub(lambda asked: source(asked[1]), markdown)
    return OUTPUT.sub(lambda asked: f"```console\n$ {asked[1]}\n{output(asked[1])}\n```", markdown)
