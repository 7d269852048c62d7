"""Run a script piece by piece: its code as a reader would type it, and what each piece prints."""

import ast
import contextlib
import io
import sys
import textwrap
import types
from pathlib import Path

SETUP = ("argparse", "parser.", "options = ", "if __name__")


def pieces(file: Path) -> list[tuple[str, str]]:
    """Run the script; the source of each piece and what it printed.

    A piece ends behind the statement that printed something. What stands before `main`, and then each statement of
    `main`, are the statements; reading the command line is left out.
    """
    text = file.read_text()
    tree = ast.parse(text, str(file))
    printed: list[str] = []
    heard = io.StringIO()

    def note() -> None:
        printed.append(heard.getvalue())
        heard.truncate(0)
        heard.seek(0)

    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=str(file), _note=note)
    sys.modules["__main__"] = module
    before = [node for node in tree.body[1:] if not _is_main(node) and not isinstance(node, ast.If)]
    main = next(node for node in tree.body if _is_main(node))
    body = main.body[1:] if ast.get_docstring(main) else main.body
    main.body = [each for node in body for each in (node, ast.parse("_note()").body[0])]
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        exec(compile(ast.fix_missing_locations(tree), str(file), "exec"), module.__dict__)
    found = [("\n\n".join(_source(text, before)), "")]
    code: list[ast.stmt] = []
    for node, output in zip(body, printed, strict=True):
        code.append(node)
        if output:
            found.append(("\n".join(_source(text, code)), output.rstrip()))
            code = []
    if rest := "\n".join(_source(text, code)):
        found.append((rest, ""))
    return [(code, output) for code, output in found if code]


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "main"


def _source(text: str, nodes: list[ast.stmt]) -> list[str]:
    """The lines of each statement, with the comments above it; imports stay together."""
    lines = text.splitlines()
    found: list[str] = []
    imports: list[str] = []
    for node in nodes:
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        code = textwrap.dedent("\n".join(lines[first : node.end_lineno]))
        if any(word in code for word in SETUP):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(code)
        else:
            found.append(code)
    return [*(["\n".join(imports)] if imports else []), *found]
