"""Runs the code cells of a notebook, in one namespace, from the root of the checkout.

    python tests/run_notebook.py examples/finetune.ipynb            # stops at the first error
    python tests/run_notebook.py examples/finetune.ipynb --write    # and stores the outputs in the notebook

It needs no Jupyter. What a cell prints is kept, and the picture, HTML or text of its last expression.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_cell(source: str, number: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; its outputs as a notebook stores them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    name, printed, value = f"<cell {number}>", io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if value is not None:
        result = {"execution_count": number, "metadata": {}, "output_type": "execute_result"}
        outputs.append({"data": shown(value)} | result)
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """What Jupyter would show of a value."""
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    if hasattr(value, "_repr_png_"):
        return {"image/png": base64.b64encode(value._repr_png_()).decode()} | data
    if hasattr(value, "_repr_html_"):
        return {"text/html": lines(value._repr_html_())} | data
    return data


def lines(text: str) -> list[str]:
    """Text as notebooks store it."""
    return text.splitlines(keepends=True)


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of its cells."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        source = "".join(cell["source"])
        cell["outputs"], cell["execution_count"] = run_cell(source, number, namespace), number
    return notebook


if __name__ == "__main__":
    file = Path(sys.argv[1])
    done = run(file)
    if "--write" in sys.argv[2:]:
        file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
