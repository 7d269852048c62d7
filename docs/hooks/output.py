"""Put what a command prints and draws, and the files of the project, where a page asks for them, at every build.

`<!-- output: python examples/lora.py -->` becomes the command and its output, `<!-- source: examples/lora.py -->` the
file. Each command runs once for all pages, in an empty folder; the pictures that it leaves there under runs/ are at
pictures/ in the site.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTPUT = re.compile(r"^<!-- output: (.+) -->$", re.MULTILINE)
SOURCE = re.compile(r"^<!-- source: (.+) -->$", re.MULTILINE)

printed: dict[str, str] = {}
pictures: dict[str, bytes] = {}


def run(commands: list[str]) -> None:
    """Fill `printed` and `pictures`."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number, _ in enumerate(commands)]
        for folder in folders:
            folder.mkdir()
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("commands.py")],
            input=json.dumps([(command, str(folder)) for command, folder in zip(commands, folders, strict=True)]),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        )
        for command, folder, status in zip(commands, folders, json.loads(done.stdout), strict=True):
            text = (folder / "printed").read_text().replace(f"{ROOT}/", "")
            if status:
                raise PluginError(f"{command} ended with exit status {status}:\n{text}")
            printed[command] = text.rstrip()
            for file in folder.glob("runs/**/*.[ps][nv]g"):
                if pictures.setdefault(file.name, file.read_bytes()) != file.read_bytes():
                    raise PluginError(f"{command} draws another {file.name} than a command before it")


def on_config(config: MkDocsConfig) -> None:
    """Run the commands of all pages that have not run yet."""
    pages = Path(config.docs_dir).rglob("*.md")
    asked = dict.fromkeys(command for page in pages for command in OUTPUT.findall(page.read_text()))
    if commands := [command for command in asked if command not in printed]:
        run(commands)


@event_priority(-100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, after the plugin for languages, which knows only files on disk."""
    for name, content in pictures.items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def source(name: str) -> str:
    """The file as a block of code under its name."""
    return f'```python title="{name}"\n{(ROOT / name).read_text().rstrip()}\n```'


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace each request."""
    markdown = SOURCE.sub(lambda asked: source(asked[1]), markdown)
    return OUTPUT.sub(lambda asked: f"```console\n$ {asked[1]}\n{printed[asked[1]]}\n```", markdown)
