"""Every message of an error, read out of the code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prose import escaped, one_line

from vtc import errors

PACKAGES = ("vtc", "adapters", "kernels")
HOLE = "…"
HEAD = f"""# All messages

Every message in the code, by the class of its error; {HOLE} stands for what differs. What to do
about the common ones is told under [troubleshooting](../troubleshooting.md).
"""


@dataclass(frozen=True, order=True)
class Message:
    """A message.

    Attributes:
        error: the name of its class.
        text: with holes where something is filled in.
    """

    error: str
    text: str


def page(root: Path) -> str:
    """The page."""
    found = messages(root)
    parts = [HEAD]
    for name, cls in classes().items():
        texts = [m.text for m in found if m.error == name]
        parts.append(f"\n## {name}\n\n{one_line(inspect.getdoc(cls) or '')}\n\n")
        parts += [f"- {escaped(' '.join(text.split()))}\n" for text in texts]
    return "".join(parts)


def classes() -> dict[str, type[errors.VtcError]]:
    """The error classes, in the order in which they are written."""
    found = vars(errors).items()
    return {n: c for n, c in found if isinstance(c, type) and issubclass(c, errors.VtcError)}


def messages(root: Path) -> list[Message]:
    """All messages, ascending, each once."""
    paths = (path for name in PACKAGES for path in sorted((root / name).rglob("*.py")))
    return sorted({m for path in paths for m in _of(ast.parse(path.read_text()))})


def _of(tree: ast.AST) -> Iterator[Message]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        name = ast.unparse(node.exc.func).rpartition(".")[2]
        text = _text(node.exc.args[0]) if node.exc.args else HOLE
        # what is made elsewhere as a whole has no words of its own here
        if name in classes() and text.strip(f"{HOLE}: ;"):
            yield Message(name, text)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE
