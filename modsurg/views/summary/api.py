"""Look at a model, or at a checkpoint without its code, as a tree."""

import html
import os
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from modsurg.checkpoints.formats.remote import PathOrFile, is_binary
from modsurg.errors import NoMatchError, SummaryError, listed
from modsurg.tree.patterns import matcher
from modsurg.views.summary.fold import SummaryLine, View
from modsurg.views.summary.render_text import Medium, coloured, plain, styled
from modsurg.views.summary.rows import Content, Row
from modsurg.views.svg import draw_svg
from modsurg.views.text import at_terminal, in_colour

if TYPE_CHECKING:
    from torch import nn

    from modsurg.tree.selection import Where


def summary(
    model_or_path: "nn.Module | PathOrFile",
    example: object = None,
    *,
    depth: int | None = None,
    where: "Where | None" = None,
    part: str | None = None,
    expand: Literal["first"] | None = None,
) -> "Summary":
    """Look at a model, or at a checkpoint file: layers, shapes, parameters and multiply-adds as a tree.

    Args:
        model_or_path: A module on any device, meta included, or a checkpoint of any format, which needs no code; of a
            safetensors file only the header is read, without torch.
        example: What forward takes: a tensor, a tuple of arguments or a dict of keyword arguments. Instead of an
            argument that is a tensor its shape will do, such as `(1, 3, 224, 224)`; inside a list or dict that is an
            argument, give tensors. A copy on meta runs, so that nothing is computed and the model stays as it is; where
            that can't be done, a real copy runs, and a line says so.
        depth: Levels to show, blocks that are alike opened. By default everything is shown, and a run of equal blocks
            is one line.
        where: Only what this selects, opened, with its parents: a path, glob, class or anything else that `select`
            takes; of a file a path, glob or regular expression.
        expand: `"first"` opens the first of each run of equal blocks; the line of the run has the sums of all.
        part: Of a file of torch.save that holds several things, the one under this name: `"optimizer"`.

    Returns:
        The summary. `print` it, or use its `to_dict`, `to_markdown` and `to_svg`; a notebook shows it as a table that
        folds. One multiply-add (MAC) is two FLOPs; biases, norms and activations do not count; memory is that of the
        modules' outputs.

    Raises:
        SummaryError: Forward fails on the example; the message shows the tree up to the layer that failed.
        NoMatchError: Nothing at `where`.
        FileNotFoundError: No such file.
        FormatError: The file is not a checkpoint.

    Example:
        >>> from torch import nn
        >>> print(summary(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (1, 4)))
        Sequential   1x4 -> 1x2                  cpu, float32, train
        name  layer        output  params     %  MACs     %  memory
        0     Linear 4->8       8      40  69.0    32  66.7    32 B
        1     ReLU              8       .     .     .     .    32 B
        2     Linear 8->2       2      18  31.0    16  33.3     8 B
        params 58 (0 frozen, 0 shared), 232 B; buffers 0; 48 MACs; outputs 72 B
    """
    _check_depth(depth)
    if expand not in (None, "first"):
        raise SummaryError(f'expand={expand!r} must be "first" or None')
    is_file = isinstance(model_or_path, str | os.PathLike) or is_binary(model_or_path)
    if part is not None and not is_file:
        raise SummaryError(f"part={part!r} is for a file; of a model take where={part!r}")
    if isinstance(model_or_path, str | os.PathLike) or is_binary(model_or_path):
        return _of_file(model_or_path, example, part, depth, where, expand == "first")
    from modsurg.views.summary.from_model import collect, opened  # needs torch, which a file does without

    paths = None
    if where is not None:
        from modsurg.tree.selection import select

        paths = frozenset(select(opened(model_or_path)[0], where).paths)
    content, trace = collect(model_or_path, example)
    if trace is not None and trace.failure is not None:
        hint = f"\n{trace.hint}" if trace.hint else _hint(example, trace.failure.error)
        raise SummaryError(_failed(content, trace.failure.path, f"{trace.failure}{hint}"))
    return Summary(content, View(depth, paths, expand == "first"))


class Summary:
    """What `summary` found. Printed at a terminal it is in colour, elsewhere plain text; `render()` is always plain."""

    def __init__(self, content: Content, view: View) -> None:
        self._content = content
        self._lines: list[SummaryLine] = list(view.lines(content.root))

    def render(self, width: int | None = None, color: bool = False, bars: bool | None = None) -> str:
        """The summary as text.

        Args:
            width: Terminal columns that no line exceeds; by default those of the terminal, 80 where there is none.
            color: With escape sequences for a terminal.
            bars: With bars for the shares; by default if in colour.
        """
        width = width or shutil.get_terminal_size((80, 24)).columns
        lines = styled(self._content, self._lines, Medium(max(width, 24), color if bars is None else bars))
        return coloured(lines) if color else plain(lines)

    def __repr__(self) -> str:
        return self.render(color=in_colour(), bars=at_terminal())

    def _repr_html_(self) -> str:
        from modsurg.views.summary.render_html import fragment  # only notebooks need it

        return fragment(self._content, self._lines)

    def to_html(self) -> str:
        """Return a whole page with the table that a notebook shows: it folds, without a script."""
        title = html.escape(self._content.root.layer or " ".join(self._content.about[:1]))
        return f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n{self._repr_html_()}\n'

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data.

        Returns:
            `{"class": str, "total": {...}, "rows": [...], "note": str}`. The total has `params`, `trainable_params`,
            `frozen_params`, `shared_params`, `param_bytes`, `buffers`, `buffer_bytes`, `modules`, `macs` and
            `activation_bytes`, the last two None without an example. Rows are the lines shown, runs opened, the root
            first.
        """
        rows = [self._content.root, *(row for line in self._lines for row in line.rows)]
        return {
            "class": self._content.root.kind,
            "about": list(self._content.about),
            "total": self._content.totals.to_dict(),
            "rows": [row.to_dict() for row in rows],
            "note": self._content.note,
        }

    def to_markdown(self) -> str:
        """A table for a README."""
        from modsurg.views.summary.render_markdown import table  # only asked for by name

        return table(self._content, self._lines)

    def to_svg(self, width: int = 100) -> str:
        """A picture of the text, light or dark as the reader's theme."""
        return draw_svg(styled(self._content, self._lines, Medium(width, bars=True)))


def _check_depth(depth: int | None) -> None:
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise SummaryError(f"depth={depth!r}: it is a number of levels, from 1")


def _of_file(
    path: "PathOrFile",
    example: object,
    part: str | None,
    depth: int | None,
    where: object,
    expands_first: bool,
) -> Summary:
    from modsurg.views.summary.from_file import collect_file  # only files need it

    if example is not None:
        raise SummaryError(
            f"{getattr(path, 'name', path)!s:.200} has no code to run: summary(load_model(path), example)"
        )
    content = collect_file(path, part)
    paths = None
    if where is not None:
        if not isinstance(where, str):
            raise SummaryError(f"where={where!r}: in a file it is a path, a glob or a regular expression")
        matches: Callable[[str], bool] = matcher(where)
        paths = frozenset(row.path for row in content.rows() if matches(row.path))
        if not paths:
            raise NoMatchError(_missing(content, where, str(getattr(path, "name", path))))
    return Summary(content, View(depth, paths, expands_first))


def _missing(content: Content, where: str, path: str) -> str:
    """What to say where nothing fits `where`: what there is, and how to see what lies beside it."""
    names = [child.path for child in content.root.children]
    there = f", which holds {listed(names, 8)}" if names else ""
    beside = f"; {content.note}" if content.note else ""
    return f"nothing at {where!r} in {path}{there}{beside}"


def _hint(example: object, error: Exception) -> str:
    """What to say of a dict that is not keywords, and of sizes that stayed numbers, in a list or inside an argument."""
    if isinstance(example, Mapping) and any(f"keyword argument {name!r}" in str(error) for name in example):
        return "\nA dict is keyword arguments. If forward takes the dict itself, pass it in a tuple: ({...},)."
    if (
        isinstance(example, list)
        and len(example) > 1
        and all(isinstance(each, tuple) and _sizes(each) for each in example)
    ):
        return f"\nA list is one argument. For several, use a tuple: {tuple(example)}."
    arguments = (
        example.values() if isinstance(example, Mapping) else example if isinstance(example, tuple) else [example]
    )
    found = next(filter(None, (_sizes(each) for each in arguments if isinstance(each, list | Mapping))), None)
    if found is None:
        return ""
    tensor = f"torch.ones({', '.join(map(str, found))})"
    return f"\nA tuple of sizes stands for a tensor only where it is an argument itself; anywhere, pass {tensor}."


def _sizes(value: object) -> list[int] | None:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    items = list(inner)
    if items and all(type(item) is int for item in items) and not isinstance(value, Mapping):
        return items
    return next(filter(None, map(_sizes, items)), None)


def _failed(content: Content, path: str, problem: str) -> str:
    """The message of a failed forward: the problem, then the tree as far as it ran."""
    ran = {row.path: row for row in content.rows() if row.calls}
    if path in ran:
        ran[path].notes.append("fails here")
    for row in content.rows():
        row.children = [child for child in row.children if child.calls or _ran_below(child)]
    text = Summary(content, View()).render(80)
    return f"forward fails at {problem}\nIt came as far as this:\n{text}"


def _ran_below(row: Row) -> bool:
    waiting = list(row.children)
    while waiting:
        each = waiting.pop()
        if each.calls:
            return True
        waiting += each.children
    return False
