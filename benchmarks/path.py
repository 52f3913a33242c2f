"""How much code a reader passes through: files and functions that a run and a step enter.

python benchmarks/path.py [--checkout NAME=FOLDER ...] [--list] [--results FILE]

A plain `tunesmith train` of a tiny model runs on a CPU in one process: six steps of four documents,
no held-out data, a fresh cache. Data is prepared in that process too, since whether others are
started depends on the clock. `sys.settrace` notes each code object of `src/tunesmith` that is
entered, in all threads.

- A file is entered when code of it runs that is not the module's own body: a function or the body
  of a class.
- Lines are those of the functions entered, decorators, docstrings and comments included. A line of
  a function inside a function counts once. Bodies of modules and classes do not count.
- Lines of code are those of them without docstrings, comments and empty lines.
- The number of functions leaves comprehensions out, which newer Pythons do not enter.
- A step is what is entered between the progress lines of two steps in the middle of the run: the
  step itself, the plan of the next one, the records, the progress line, and the questions of the
  loop whether an evaluation or a checkpoint is due.

`--list` also prints the files with their lines, the longest first.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(r"\bstep (\d+)/")
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
STEPS, STEP = 6, 3
INPUTS = """
import sys
from pathlib import Path
from tiny import chat_rows, tiny_folder, write_jsonl
folder = Path(sys.argv[1])
tiny_folder(folder / "model", num_hidden_layers=2)
write_jsonl(folder / "rows.jsonl", chat_rows(22))
"""


class Recorder:
    """Notes the code objects entered, by the number of the step whose progress line comes next."""

    def __init__(self, package: Path, progress: TextIO) -> None:
        self.package, self.progress = str(package) + os.sep, progress
        self.step = 1
        self.entered: dict[int, set[CodeType]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """The trace function; None, since lines inside of the frame are not traced."""
        code = frame.f_code
        if code.co_filename.startswith(self.package):
            self.entered.setdefault(self.step, set()).add(code)

    def write(self, text: str) -> int:
        """Stands in for standard error."""
        if (found := PROGRESS.search(text)) is not None:
            self.step = int(found[1]) + 1
        return self.progress.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.progress, name)


def described(code: CodeType, package: Path) -> dict[str, Any]:
    """File, lines and kind of a code object."""
    lines, first = inspect.getsourcelines(code)
    return {
        "file": Path(code.co_filename).relative_to(package).as_posix(),
        "first": first,
        "last": first + len(lines) - 1,
        "is_function": bool(code.co_flags & inspect.CO_OPTIMIZED),
        "is_comprehension": code.co_name in COMPREHENSIONS,
    }


def trace(checkout: Path, found: Path, arguments: Sequence[str]) -> None:
    """Run the command line in this process and write what it entered."""
    package = checkout.resolve() / "src" / "tunesmith"
    recorder = Recorder(package, sys.stderr)
    sys.stderr = recorder  # type: ignore[assignment]
    threading.settrace(recorder)
    sys.settrace(recorder)
    from tunesmith.__main__ import main

    try:
        main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    of_run = set().union(*recorder.entered.values())
    parts = {"run": of_run, "step": recorder.entered.get(STEP, set())}
    record = {
        name: [described(code, package) for code in codes if code.co_name != "<module>"]
        for name, codes in parts.items()
    }
    found.write_text(json.dumps(record), encoding="utf-8")


def code_lines(path: Path) -> set[int]:
    """The numbers of the lines that hold code: no docstring, no comment alone, not empty."""
    with tokenize.open(path) as text:
        source = text.read()
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    held = {
        line
        for line, text in enumerate(source.splitlines(), start=1)
        if text.strip() and not text.lstrip().startswith("#")
    }
    return held - prose


@dataclass(frozen=True)
class Entered:
    """What was entered."""

    files: int
    functions: int
    lines: Counter[str]  # of functions, by file
    code: int  # lines of functions without docstrings, comments and empty lines

    @classmethod
    def count(cls, codes: Iterable[dict[str, Any]], package: Path) -> Entered:
        codes = list(codes)
        functions = [code for code in codes if code["is_function"]]
        lines = {
            (code["file"], line)
            for code in functions
            for line in range(code["first"], code["last"] + 1)
        }
        return cls(
            files=len({code["file"] for code in codes}),
            functions=sum(not code["is_comprehension"] for code in functions),
            lines=Counter(file for file, _ in lines),
            code=sum(
                len(code_lines(package / file) & {n for other, n in lines if other == file})
                for file in {file for file, _ in lines}
            ),
        )


def measure(checkout: Path) -> dict[str, Entered]:
    """What a run of this checkout enters, and one step of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        common = {
            **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "TUNESMITH_CACHE": str(folder / "cache"),
        }  # fmt: skip
        run([sys.executable, "-c", INPUTS, str(folder)], {**common, "PYTHONPATH": f"{ROOT}/tests"})
        command = [
            "train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"),
            "--out", str(folder / "run"), f"train.steps={STEPS}", "batch.documents=4",
            "model.dtype=float32", "device.kind=cpu", "device.threads=1",
            f"device.{name_of_num_proc(checkout, common)}=1",
        ]  # fmt: skip
        found = folder / "entered.json"
        run(
            [sys.executable, __file__, "--trace", str(checkout), str(found), *command],
            {**common, "PYTHONPATH": str(checkout.resolve() / "src")},
        )
        record = json.loads(found.read_text(encoding="utf-8"))
    if not record["step"]:
        raise SystemExit(f"error: {checkout} printed no progress line of step {STEP}")
    package = checkout / "src" / "tunesmith"
    return {name: Entered.count(codes, package) for name, codes in record.items()}


def name_of_num_proc(checkout: Path, environment: dict[str, str]) -> str:
    """The key for the processes that prepare data, which older checkouts name otherwise."""
    path = {"PYTHONPATH": str(checkout.resolve() / "src")}
    schema = run([sys.executable, "-m", "tunesmith", "schema"], {**environment, **path})
    return "num_proc" if '"num_proc"' in schema else "prepare_processes"


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run it, and return what it printed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command[:3])}\n{done.stderr[-3000:]}")
    return done.stdout


def table(measured: dict[str, dict[str, Entered]]) -> str:
    lines = [
        "| checkout | | files | functions | lines of them | lines of code |",
        "|---|---|---|---|---|---|",
    ]
    for name, parts in measured.items():
        for part, found in parts.items():
            numbers = (
                f"{found.files} | {found.functions:,} | {found.lines.total():,} | {found.code:,}"
            )
            lines.append(f"| {name} | {part} | {numbers} |")
    return "\n".join(lines) + "\n"


def page(measured: dict[str, dict[str, Entered]]) -> str:
    return (
        "# The way through\n\nFiles and functions of `src/tunesmith` that a plain `tunesmith train`"
        " enters, and one step of it. Written by `benchmarks/path.py`, which says what counts.\n\n"
        + table(measured)
    )


def listing(parts: dict[str, Entered]) -> str:
    rows = [
        f"{parts['run'].lines[file]:6,} {parts['step'].lines[file]:6,}  {file}"
        for file, _ in sorted(parts["run"].lines.items(), key=lambda item: (-item[1], item[0]))
    ]
    return "\n".join(["   run   step  file", *rows]) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--trace"]:
        return trace(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkout", action="append", metavar="[NAME=]FOLDER",
        help="a checkout to measure, this one by default; may be given again",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="also the files with their lines")
    parser.add_argument("--results", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    measured = {}
    for given in options.checkout or [f"this={ROOT}"]:
        name, _, folder = given.rpartition("=")
        measured[name or Path(folder).resolve().name] = measure(Path(folder))
    print(table(measured))
    if options.list:
        for name, parts in measured.items():
            print(f"{name}\n{listing(parts)}")
    if options.results is not None:
        options.results.write_text(page(measured), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
