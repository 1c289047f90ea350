"""The source of microshop, for the tests that read it: its files, its layers and their size."""
import ast
import io
import shutil
import tokenize
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from microshop import SERVICES
from tests.helpers import TOP

HOUSE = TOP / "microshop"
SOURCES = {path.relative_to(HOUSE).as_posix(): path.read_text()
           for path in sorted(HOUSE.rglob("*.py"))}  # by name, like "chassis/wire.py"
SERVICE_FILES = {name: f"{name}.py" for name in SERVICES if f"{name}.py" in SOURCES}
PATTERN_FILES = {"__init__.py", "gateway.py", *SERVICE_FILES.values()}
COPIED = ("microshop", "tests", "README.md", "Makefile", "setup.cfg")  # what a copy consists of
LAYERS = ("pattern", "chassis", "tools", "tour")

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}


def copy_project(top: Path) -> None:
    """Copy the project into a folder that exists."""
    for name in COPIED:
        if (TOP / name).is_dir():
            shutil.copytree(TOP / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(TOP / name, top)


def layer_of(name: str) -> str:
    """Return the layer of a file, one of LAYERS."""
    folder = name.partition("/")[0]
    if folder in ("chassis", "tour"):
        return folder
    return "pattern" if name in PATTERN_FILES else "tools"


def lines_of_code(source: str) -> int:
    """Count the lines that are not blank and not only comment or docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = set(chain.from_iterable(range(token.start[0], token.end[0] + 1)
                                    for token in tokens if token.type not in NO_CODE))
    return len(lines.difference(*docstrings(ast.parse(source))))


def docstrings(tree: ast.AST) -> Iterator[range]:
    """Yield the lines of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                yield range(node.body[0].lineno, node.body[0].end_lineno + 1)


def size_of_layers() -> dict[str, int]:
    """Return the lines of code of each layer."""
    sizes = dict.fromkeys(LAYERS, 0)
    for name, source in SOURCES.items():
        sizes[layer_of(name)] += lines_of_code(source)
    return sizes


def imported(source: str) -> set[str]:
    """Return the full names of all modules that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "microshop"  # from . import name
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str:
    """Return the full name of the module in a file, like "microshop.chassis.wire"."""
    parts = ["microshop", *name.removesuffix(".py").split("/")]
    return ".".join(parts).removesuffix(".__init__")


def strings(source: str) -> Iterator[str]:
    """Yield the text of each string in a source, and of each piece of an f-string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            yield node.value if isinstance(node.value, str) else node.value.decode("latin-1")
