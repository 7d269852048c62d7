# PYTHON_ARGCOMPLETE_OK
"""The command line: `modsurg summary`, `diff`, `convert`, `merge`, `verify` and `env`.

The one place that prints. Exit status: 0 when all is well or both sides are the same, 1 when something differs or a
file is damaged, 2 when the question could not be answered. Nothing heavy is imported before a command needs it, so that
`modsurg summary FILE.safetensors` starts without torch.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from modsurg.errors import FormatError, ModsurgError, TrustError, counted, visible

if TYPE_CHECKING:
    import torch

    from modsurg.views.diff.result import Diff
    from modsurg.views.summary.api import Summary

SAME, DIFFERENT, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_PART = "of a file of torch.save with several things in it, the one under this name, such as optimizer"
_EACH_ITS_PART = ". --part is for both files; in Python: diff(read_state(A, part=...), read_state(B))"
_TARGET = "the suffix chooses: .safetensors, .pt, .pth, .bin; none is a directory of DCP"
_EPILOG = "exit status: 0 identical or valid, 1 different or damaged, 2 error. Each command has its own --help."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser(as_json="--json" in words)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        from argcomplete import autocomplete

        autocomplete(parser)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status: int = options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _fail(options, text, type(error).__name__)
    except ModsurgError as error:
        return _fail(options, str(error), type(error).__name__)
    return status


def _fail(options: argparse.Namespace, text: str, kind: str) -> int:
    if options.json:
        print(json.dumps({"error": kind, "message": text}, indent=2, ensure_ascii=False))
    _complain(text)
    return FAILED


class _Parser(argparse.ArgumentParser):
    """A parser whose errors can be JSON too."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the arguments, and exit."""
        if self.as_json:
            print(json.dumps({"error": "UsageError", "message": message}, indent=2, ensure_ascii=False))
        super().error(message)


def _parser(as_json: bool = False) -> argparse.ArgumentParser:
    description = "Look at, compare, convert, merge and check PyTorch checkpoints."
    parser = _Parser(prog="modsurg", description=description, epilog=_EPILOG)
    parser.as_json = as_json
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, text, example, add_arguments) in _commands().items():
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\nexample: modsurg {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.as_json = as_json
        added.add_argument("--json", action="store_true", help="print JSON")
        add_arguments(added)
        added.set_defaults(command=function, parser=added)
    return parser


Command = tuple[Callable[[argparse.Namespace], int], str, str, Callable[[argparse.ArgumentParser], None]]


def _commands() -> dict[str, Command]:
    """What runs, what it does, an example, and what adds its arguments, by name."""
    return {
        "summary": (
            _summary,
            "print a checkpoint as a tree, without its code",
            "summary model.safetensors --depth 2",
            _add_summary,
        ),
        "diff": (
            _diff,
            "compare two checkpoints: structure, shapes, dtypes and every value",
            "diff before.safetensors after.pt",
            _add_diff,
        ),
        "convert": (
            _convert,
            "write a checkpoint in another format, tensor by tensor",
            "convert model.pt model.safetensors --dtype bf16",
            _add_convert,
        ),
        "merge": (
            _merge,
            "combine checkpoints into one: an average, task arithmetic, a LoRA adapter",
            "merge soup.safetensors a.safetensors=0.5 b.safetensors=0.5",
            _add_merge,
        ),
        "verify": (
            _verify,
            "check sizes, header, and the stored hash of every tensor",
            "verify model.safetensors",
            _add_file,
        ),
        "env": (_env, "print versions, devices and memory, for a bug report", "env", lambda parser: None),
    }


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint of any format")


def _add_summary(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    parser.add_argument("--depth", type=int, metavar="N", help="levels to show")
    parser.add_argument("--expand", choices=["first"], help="open the first of each run of equal blocks")
    parser.add_argument("--where", metavar="PATTERN", help="only these: a path, a glob such as 'layer4.**', or re:...")
    parser.add_argument("--part", metavar="NAME", help=_PART)
    _add_outputs(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="A", help="a checkpoint of any format")
    parser.add_argument("new", metavar="B", help="another, of the same format or not")
    parser.add_argument("--part", metavar="NAME", help=_PART)
    parser.add_argument(
        "--atol", type=float, default=0.0, metavar="X", help="values that differ by at most X are equal"
    )
    _add_outputs(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint of any format")
    parser.add_argument("target", metavar="TARGET", help=_TARGET)
    parser.add_argument("--part", metavar="NAME", help=_PART)
    parser.add_argument("--dtype", help="for floating tensors, such as bfloat16 or bf16")
    parser.add_argument("--allow-overflow", action="store_true", help="store values beyond the dtype's range as inf")
    parser.add_argument("--shard-size", metavar="SIZE", help="split into files of at most this size, such as 5GB")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only these keys; may be given again")
    parser.add_argument(
        "--rename", action="append", metavar="OLD=NEW", help="new names for keys, as in backbone.=; may be given again"
    )
    parser.add_argument(
        "--rule",
        action="append",
        metavar="RULE",
        help="a rule of modsurg.rules, as in 'Transpose(\"h.*.c_attn\")'; may be given again",
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="OUT", help=_TARGET)
    parser.add_argument("sources", metavar="FILE=WEIGHT", nargs="+", help="a checkpoint and its weight, as in a.pt=0.5")
    parser.add_argument("--method", default="linear", help="linear, slerp, task, ties or dare; linear by default")
    parser.add_argument("--base", metavar="FILE", help="what task, ties and dare compare with")
    parser.add_argument("--density", type=float, metavar="SHARE", help="differences that ties and dare keep")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for dare; 0 by default")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="combine these keys; may be given again")
    parser.add_argument("--lora", metavar="FOLDER", help="a PEFT adapter to fold in")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--html", metavar="FILE", help="write a page there as well")
    parser.add_argument("--svg", metavar="FILE", help="write a picture there as well")
    parser.add_argument("--width", type=int, metavar="N", help="columns; by default those of the terminal")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from modsurg.views.environment import version

        print(f"modsurg {version('modsurg') or 'of a checkout'}")
        parser.exit()


def _summary(options: argparse.Namespace) -> int:
    from modsurg.views.summary.api import summary
    from modsurg.views.text import at_terminal, in_colour

    if _print_plain_part(options):
        return SAME
    found = summary(options.file, depth=options.depth, where=options.where, part=options.part, expand=options.expand)
    _print_view(options, found, lambda: found.render(options.width, color=in_colour(), bars=at_terminal()))
    return SAME


def _print_plain_part(options: argparse.Namespace) -> bool:
    """Print a value that lies beside the state and holds no tensors; returns whether `--part` names one."""
    if options.part is None:
        return False
    from modsurg.checkpoints.formats.registry import open_source

    try:
        with open_source(options.file) as source:
            plain = source.plain
    except (FormatError, TrustError):
        return False
    if options.part not in plain:
        return False
    value = plain[options.part]
    try:
        json.dumps(value, allow_nan=False)
        data = {"part": options.part, "value": value}
    except ValueError:
        data = {"part": options.part, "value": repr(value)}
    _print(options, lambda: data, lambda: visible(f"{options.part} = {value!r}"))
    return True


def _diff(options: argparse.Namespace) -> int:
    from modsurg.checkpoints.formats.registry import open_source
    from modsurg.views.diff.api import diff
    from modsurg.views.text import in_colour, size

    with _Bar("comparing") as progress, ExitStack() as files:
        try:
            old, new = (files.enter_context(open_source(path, options.part)) for path in (options.old, options.new))
        except FormatError as error:
            if options.part is None:
                raise
            raise FormatError(f"{error}{_EACH_ITS_PART}") from error
        found = diff(old, new, atol=options.atol, progress=progress)
    same = "" if found else f"same: {counted(found.tensors, 'tensor', 'tensors')}, {size(found.nbytes)}"
    _print_view(options, found, lambda: "\n".join(filter(None, [same, found.render(options.width, color=in_colour())])))
    return DIFFERENT if found else SAME


def _convert(options: argparse.Namespace) -> int:
    from modsurg.checkpoints.convert import convert
    from modsurg.checkpoints.rules import parse_rule
    from modsurg.views.text import size

    for text in options.rename or ():
        if "=" not in text:
            raise ModsurgError(f"--rename {text}: give OLD=NEW, as in --rename {text}=head")
    rename = {old: new for old, _, new in (text.rpartition("=") for text in options.rename or ())}
    with _Bar("converting") as progress:
        done = convert(
            options.source,
            options.target,
            part=options.part,
            dtype=_dtype(options.dtype),
            allow_overflow=options.allow_overflow,
            shard_size=options.shard_size,
            only=options.only,
            rename=rename or None,
            rules=[parse_rule(text) for text in options.rule or ()],
            progress=progress,
        )
    data = {
        "source": str(done.source),
        "target": str(done.target),
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "taken": done.taken,
        "left": list(done.left),
        "kept": list(done.kept),
    }
    _print(options, lambda: data, lambda: _seen(str(done).replace(f"{done.nbytes:,} bytes", size(done.nbytes))))
    return SAME


def _merge(options: argparse.Namespace) -> int:
    from modsurg.checkpoints.merge import merge

    sources = []
    for text in options.sources:
        path, _, weight = text.rpartition("=")
        try:
            sources.append((path, float(weight)))
        except ValueError:
            raise ModsurgError(f"{text}: give FILE=WEIGHT, as in {text.rstrip('=')}=0.5") from None
    names = ("method", "base", "density", "seed", "only", "lora")
    with _Bar("merging") as progress:
        done = merge(sources, options.target, progress=progress, **{name: getattr(options, name) for name in names})
    data = {"target": str(done.target), "method": done.method, "tensors": done.tensors, "bytes": done.nbytes}
    _print(options, lambda: data | {"lora": list(done.lora)}, lambda: _seen(str(done)))
    return SAME


def _verify(options: argparse.Namespace) -> int:
    from modsurg.checkpoints.verify import verify

    with _Bar("checking") as progress:
        found = verify(options.file, progress=progress)
    data = {
        "path": found.path,
        "good": bool(found),
        "checked": list(found.checked),
        "unhashed": list(found.unhashed),
        "damaged": list(found.damaged),
        "problem": found.problem,
    }
    _print(options, lambda: data, lambda: _seen(str(found)))
    if found.foreign:
        return FAILED
    return SAME if found else DIFFERENT


def _env(options: argparse.Namespace) -> int:
    from modsurg.views.environment import environment, table

    found = environment()
    _print(options, lambda: found, lambda: table(found))
    return SAME


def _print(options: argparse.Namespace, data: Callable[[], Any], text: Callable[[], str]) -> None:
    print(json.dumps(data(), indent=2, ensure_ascii=False, allow_nan=False) if options.json else text())


def _print_view(options: argparse.Namespace, view: "Summary | Diff", text: Callable[[], str]) -> None:
    """Write the files that were asked for, and print."""
    from modsurg.checkpoints.formats.atomic import writing

    for path, render in ((options.html, view.to_html), (options.svg, view.to_svg)):
        if path is not None:
            content = render().encode()
            with writing(path, len(content)) as file:
                file.write(content)
    _print(options, view.to_dict, view.to_markdown if options.markdown else text)


def _seen(text: str) -> str:
    return "\n".join(map(visible, text.splitlines()))


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    dtype = getattr(torch, _SHORT.get(name, name), None) if name else None
    if name and not isinstance(dtype, torch.dtype):
        raise ModsurgError(f"--dtype {name}: torch has no such dtype; take float32, float16, bfloat16 or float64")
    return dtype


def _complain(text: str) -> None:
    print(f"modsurg: {visible('; '.join(line.strip() for line in text.splitlines()))}", file=sys.stderr)


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    _complain(f"warning: {message}")


class _Bar:
    """A progress bar for what takes over a second, at a terminal; nothing otherwise."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int], None] | None:
        from time import monotonic

        self._start = monotonic()
        return self._show if sys.stderr.isatty() else None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, done: int, total: int) -> None:
        from time import monotonic

        if self._bar is None and monotonic() - self._start > 1:
            self._bar = _started(self._verb)
        if self._bar is not None:
            self._bar.update(0, completed=done, total=total)


def _started(verb: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task(verb)
    bar.start()
    return bar
