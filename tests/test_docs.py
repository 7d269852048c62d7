"""Every Python block of the README and of the documentation runs, page by page, as a reader would type it."""

import doctest
import io
import re
import runpy
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import modsurg
from modsurg import errors

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^<!-- .* -->$|!\[[^]]*\]\(([^)]*)\)", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
GENERATED = re.compile(r"^<!-- (output|steps|source): ([^\n]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
EVERY = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(page):
    """What somebody wrote, with empty lines for what docs/hooks/output.py filled in."""
    return GENERATED.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


PAGES = [page for page in EVERY if FENCE.search(written(page))]


def blocks(page):
    """(first line number, code) of each fence."""
    text = written(page)
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start("code")), textwrap.dedent(match["code"])


def run_prompts(code, namespace, page, line):
    """Type the lines behind the prompts, and compare what is printed."""
    example = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), line)
    example.globs = namespace
    told = io.StringIO()
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=told.write, clear_globs=False)
    assert not result.failed, told.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    torch.manual_seed(0)
    for line, code in blocks(page):
        if ">>>" in code:
            run_prompts(code, main.__dict__, page, line)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), main.__dict__)


def test_the_drawings_of_the_verbs_are_those_that_the_code_makes():
    drawings = runpy.run_path(str(ROOT / "docs/drawings.py"))["drawings"]()
    for name, picture in drawings.items():
        if name.startswith("verbs/"):  # the terminal shows a message of torch, which each release words anew
            assert (ROOT / "docs/pictures" / name).read_text() == picture, "run: python docs/drawings.py"


def test_the_generated_blocks_are_filled_and_sources_are_those_of_the_project():
    """So that a page can be read without the site."""
    filled = 0
    for page in EVERY:
        assert page.read_text().count("<!-- end -->") == len(GENERATED.findall(page.read_text())) or "measured" in (
            page.read_text()
        )
        for kind, argument, content in GENERATED.findall(page.read_text()):
            filled += 1
            assert content.strip(), f"{page.name}: run python docs/hooks/output.py"
            if kind == "source":
                assert (ROOT / argument).read_text().rstrip() in content, page.name
            elif kind == "output":
                assert content.startswith(f"```console\n$ {argument}\n```\n"), page.name
            else:
                code = "".join(re.findall(r"```python\n(.*?)```", content, re.DOTALL))
                script = " ".join((ROOT / argument).read_text().split())
                missing = [line for line in code.splitlines() if " ".join(line.split()) not in script]
                assert not missing, f"{page.name}: run python docs/hooks/output.py"
    assert filled > 40


def test_blocks_name_their_language():
    """A fence without a language would be neither coloured nor run."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
        bare = [number for number, language in enumerate(fences[::2]) if not language.strip()]
        assert not bare, f"{page.name}: fence {bare}"


def test_every_error_has_its_entry():
    """Its name in bold, before the cause, the fix and an example."""
    named = set(re.findall(r"\*\*(\w+)\*\*", (ROOT / "docs/reference/errors.md").read_text()))
    assert {name for name in vars(errors) if name.endswith(("Error", "Warning"))} <= named | {"ModsurgError"}


def test_the_reference_shows_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    names = set(re.findall(r"^::: modsurg\.\S+\.(\w+)$", pages, re.MULTILINE))
    assert set(modsurg.__all__) <= names


def test_every_page_has_its_chinese():
    """Those that a beginner reads."""
    pages = [ROOT / "docs/index.md", ROOT / "docs/quickstart.md", *(ROOT / "docs/tutorial").glob("*[a-z].md")]
    for page in pages:
        if not page.name.endswith(".zh.md"):
            chinese = page.with_suffix(".zh.md").read_text()
            assert SHOWN.findall(page.read_text()) == SHOWN.findall(chinese), page.name
