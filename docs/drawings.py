"""Draw what each verb does to a tree, the README's terminal, and the packages: `python docs/drawings.py`.

Each picture comes from the code: the model before, the edit, the model after. A test holds that the files are those
that this script draws.
"""

import ast
import html
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import modsurg
from modsurg import Report

PICTURES = Path(__file__).parent / "pictures"
ROW, INDENT, WIDTH, GAP = 26, 18, 250, 70
COLOURS = {"same": ("#eef1f5", "#3d4663"), "added": ("#d7f2de", "#1a7f37"), "removed": ("#fde2e0", "#cf222e")}
COLOURS |= {"changed": ("#fff1d0", "#8a5a00")}


class Net(nn.Module):
    """A network of five layers that fits on a stamp."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Scaled(nn.Module):
    """A wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


VERBS: dict[str, tuple[str, Callable[[nn.Module], Report]]] = {
    "replace": ('replace(model, "body.1", nn.GELU)', lambda m: modsurg.replace(m, "body.1", nn.GELU)),
    "insert": (
        'insert_after(model, "body.0", nn.BatchNorm2d(8))',
        lambda m: modsurg.insert_after(m, "body.0", nn.BatchNorm2d(8)),
    ),
    "remove": ('remove(model, "body.0")', lambda m: modsurg.remove(m, "body.0")),
    "add": (
        'add(model, "neck", nn.Identity(), before="head")',
        lambda m: modsurg.add(m, "neck", nn.Identity(), before="head"),
    ),
    "wrap": ('wrap(model, "body.0", Scaled)', lambda m: modsurg.wrap(m, "body.0", Scaled)),
    "rename": ('rename(model, "body.1", "act")', lambda m: modsurg.rename(m, "body.1", "act")),
    "resize": ('resize(model, "head", out_features=10)', lambda m: modsurg.resize(m, "head", out_features=10)),
}


def rows_of(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """Return path, depth, text and identity of each module."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            size = ""
            if isinstance(module, nn.Conv2d):
                size = f" {module.in_channels}->{module.out_channels}"
            elif isinstance(module, nn.Linear):
                size = f" {module.in_features}->{module.out_features}"
            name = path.rpartition(".")[2]
            found.append((path, path.count("."), f"{name}  {type(module).__name__}{size}", id(module)))
    return found


def draw_verb(code: str, apply: Callable[[nn.Module], Report]) -> str:
    """Draw the tree before and after an edit; what went is red, what came green, what changed yellow."""
    model = Net()
    before = rows_of(model)
    held = dict(model.named_modules())  # keeps the identities of what goes
    apply(model)
    after = rows_of(model)
    old, new = {row[3]: row for row in before}, {row[3]: row for row in after}
    texts = {key: row[2] for key, row in old.items()}
    sides = [
        [
            (row, "same" if row[3] in new and new[row[3]][2] == row[2] else "changed" if row[3] in new else "removed")
            for row in before
        ],
        [(row, "same" if texts.get(row[3]) == row[2] else "changed" if row[3] in old else "added") for row in after],
    ]
    del held
    parts = [_text(0, 16, code, "#000", "bold")]
    for side, rows in enumerate(sides):
        left = side * (WIDTH + GAP)
        for number, ((_, depth, text, _), state) in enumerate(rows):
            fill, ink = COLOURS[state]
            x, y = left + depth * INDENT, 30 + number * ROW
            if depth:
                parts.append(f'<path d="M{x - 9} {y - 5}V{y + 10}H{x}" fill="none" stroke="#b6bdcc"/>')
            parts.append(
                f'<rect x="{x}" y="{y}" width="{WIDTH - depth * INDENT}" height="{ROW - 6}" rx="4" fill="{fill}"/>'
            )
            parts.append(_text(x + 8, y + 14, text, ink))
    height = 30 + max(map(len, sides)) * ROW
    middle = 30 + (height - 30) // 2
    arrow = WIDTH + GAP // 2
    parts.append(
        f'<path d="M{arrow - 16} {middle}h28m-8 -6l8 6l-8 6" fill="none" stroke="#e4572e" stroke-width="2.5"/>'
    )
    return _svg(2 * WIDTH + GAP, height, parts, code)


def draw_terminal() -> str:
    """Draw an edit, an error and an undo as a terminal shows them."""
    from torchvision.models import resnet18

    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lines: list[tuple[str, str]] = [("code", '>>> replace(model, "layer4.0.con1", nn.Identity)')]
    try:
        modsurg.replace(model, "layer4.0.con1", nn.Identity)
    except modsurg.errors.ModsurgError as error:
        lines += _wrap("error", f"{type(error).__name__}: {error}")
    lines += [("", ""), ("code", '>>> replace(model, "fc", nn.Linear(500, 10), example=(1, 3, 224, 224))')]
    try:
        modsurg.replace(model, "fc", nn.Linear(500, 10), example=(1, 3, 224, 224))
    except modsurg.errors.ModsurgError as error:
        lines += _wrap("error", f"{type(error).__name__}: {error}")
    lines += [("", ""), ("code", '>>> report = replace(model, "fc", lambda old: nn.Linear(old.in_features, 10),')]
    lines += [
        ("code", "...                  example=(1, 3, 224, 224), optimizer=optimizer)"),
        ("code", ">>> print(report)"),
    ]
    report = modsurg.replace(
        model, "fc", lambda old: nn.Linear(old.in_features, 10), example=(1, 3, 224, 224), optimizer=optimizer
    )
    for line in str(report).splitlines():
        lines += _wrap("changed" if line[:1] == "~" else "note", line)
    lines += [("code", ">>> report.undo()"), ("code", ">>> model.fc")]
    report.undo()
    lines.append(("note", repr(model.fc)))
    inks = {"code": "#e6edf3", "error": "#ff9a8f", "changed": "#f0c65c", "note": "#9fb0c8", "": "#fff"}
    height = 44 + 19 * len(lines)
    parts = [f'<rect width="820" height="{height}" rx="8" fill="#16213e"/>']
    parts += [
        f'<circle cx="{20 + 16 * n}" cy="17" r="5" fill="{c}"/>'
        for n, c in enumerate(("#ff7f50", "#f0c65c", "#4ac26b"))
    ]
    parts += [_text(18, 48 + 19 * n, text, inks[kind]) for n, (kind, text) in enumerate(lines)]
    return _svg(820, height, parts, "An edit that is refused, one that is made, and its undo")


LEVELS = [["cli"], ["training"], ["views"], ["surgery", "checkpoints"], ["tracing", "structure"], ["tree"], ["errors"]]
VERB_OF = {"training": "train", "views": "look", "surgery": "change", "checkpoints": "keep", "tree": "read"}


def draw_house() -> str:
    """Draw the packages, each on those that it imports, with the topics that are in it."""
    root = Path(modsurg.__file__).parent
    parts, y = [], 0
    for level in LEVELS:
        boxes = [(name, *_room(root, name)) for name in level]
        height = 46 + 16 * max(len(topics) for _, topics, _ in boxes)
        width = (860 - 20 * (len(level) - 1)) // len(level)
        for number, (name, topics, imports) in enumerate(boxes):
            x = number * (width + 20)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#eef1f5" stroke="#c3cad8"/>'
            )
            verb = f"   {VERB_OF[name]}" if name in VERB_OF else ""
            parts.append(_text(x + 10, y + 19, f"{name}{verb}", "#16213e", "bold"))
            parts += [_text(x + 10, y + 37 + 16 * n, line, "#3d4663") for n, line in enumerate(topics)]
            stands = f"imports {', '.join(imports)}" if imports else "imports no other"
            parts.append(_text(x + 10, y + height - 8, stands, "#e4572e"))
        y += height + 14
    return _svg(860, y, parts, "The packages of modsurg")


def _room(root: Path, name: str) -> tuple[list[str], list[str]]:
    """Return the topics in a package, as lines, and the packages that it imports."""
    home = root / name
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("modsurg."):
                imported.add(node.module.split(".")[1])
    if not home.is_dir():
        return [], [each for level in LEVELS for each in level if each in imported - {name}]
    inside = [f"{path.name}/" for path in sorted(home.iterdir()) if (path / "__init__.py").exists()]
    inside += [path.stem for path in sorted(home.glob("*.py")) if path.stem != "__init__"]
    count = len([each for level in LEVELS if name in level for each in level])
    lines = [row for _, row in _wrap("", "  ".join(inside), 105 // count)]
    return lines, [each for level in LEVELS for each in level if each in imported - {name}]


def _wrap(kind: str, text: str, width: int = 96) -> list[tuple[str, str]]:
    rows, row = [], ""
    for word in text.replace("\n", " ").split(" "):
        if row and len(row) + 1 + len(word) > width:
            rows.append(row)
            row = "  " + word
        else:
            row = f"{row} {word}" if row else word
    return [(kind, row) for row in [*rows, row]]


def _text(x: int, y: int, text: str, ink: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{ink}" font-weight="{weight}" xml:space="preserve">{html.escape(text)}</text>'


def _svg(width: int, height: int, parts: list[str], title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8} {height + 8}" width="{width + 8}" '
        f'role="img" font-family="ui-monospace,Menlo,Consolas,monospace" font-size="13">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect x="-4" y="-4" width="{width + 8}" height="{height + 8}" rx="8" fill="#fff"/>\n{body}\n</svg>\n'
    )


def drawings() -> dict[str, str]:
    """Return each picture by its path under docs/pictures."""
    torch.manual_seed(0)
    found = {f"verbs/{name}.svg": draw_verb(code, apply) for name, (code, apply) in VERBS.items()}
    return found | {"terminal.svg": draw_terminal(), "house.svg": draw_house()}


if __name__ == "__main__":
    for name, picture in drawings().items():
        file = PICTURES / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(picture)
