"""Fill the pages with what commands print and draw, and with the files of the project: `python docs/hooks/output.py`.

A page asks for it with a comment, and holds it from there to `<!-- end -->`, so that it is read without the site too:

- `<!-- output: python examples/lora.py -->`: the command and what it prints,
- `<!-- steps: examples/tutorial/07_convolution.py -->`: a script in pieces, each with what it prints,
- `<!-- source: examples/lora.py -->`: a file.

A command runs in an empty folder; the pictures that it leaves there under runs/ go to docs/pictures. Building the site
runs all commands again and shows what they print then.
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
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^<!-- (output|steps|source): ([^\n]+) -->\n(?:.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)

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


def run_all() -> None:
    """Run the commands of all pages that have not run yet."""
    asked = {}
    for page in DOCS.rglob("*.md"):
        for kind, argument in BLOCK.findall(page.read_text()):
            asked |= {"output": {argument: None}, "steps": {f"steps {argument}": None}}.get(kind, {})
    if commands := [command for command in asked if command not in printed]:
        run(commands)


def render(kind: str, argument: str) -> str:
    """What a comment asks for, as Markdown."""
    if kind == "source":
        return f'```python title="{argument}"\n{(ROOT / argument).read_text().rstrip()}\n```'
    if kind == "output":
        return f"```console\n$ {argument}\n```\n\n```text\n{printed[argument]}\n```"
    blocks = []
    for code, output in json.loads(printed[f"steps {argument}"]):
        blocks.append(f"```python\n{code}\n```")
        blocks += [f"```text\n{output}\n```"] if output else []
    return "\n\n".join(blocks)


def fill(text: str) -> str:
    """A page with every block filled anew."""
    return BLOCK.sub(lambda asked: f"<!-- {asked[1]}: {asked[2]} -->\n{render(asked[1], asked[2])}\n<!-- end -->", text)


def on_config(config: MkDocsConfig) -> None:
    """Run the commands."""
    run_all()


@event_priority(-100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Show the pictures as they were drawn now, after the plugin for languages, which knows only files on disk."""
    for name, content in pictures.items():
        if (old := files.get_file_from_path(f"pictures/{name}")) is not None:
            files.remove(old)
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Show what the commands printed now."""
    return BLOCK.sub(lambda asked: _with_output(render(asked[1], asked[2])), markdown)


def _with_output(text: str) -> str:
    """The blocks of a script's output joined to those of its code."""
    return text.replace("```text\n", "```{.text .output}\n")


if __name__ == "__main__":
    run_all()
    for page in DOCS.rglob("*.md"):
        page.write_text(fill(page.read_text()))
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    for name, content in pictures.items():
        if f"pictures/{name}" in text:
            (DOCS / "pictures" / name).write_bytes(content)
