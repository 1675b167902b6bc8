"""What the documents say is true: Python blocks run, paths and commands exist, public names are explained."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from minires.kernels import registry
from minires.kernels.checking import check_case

import minires
from minires import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "kernels/interpreter/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(page, match, id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in FENCE.finditer(page.read_text(encoding="utf-8"))
]
MODULES = sorted(m.name for m in pkgutil.walk_packages(minires.__path__, "minires.") if "__main__" not in m.name)


@pytest.mark.parametrize("page, block", BLOCKS)
def test_block_runs(page, block, tmp_path, monkeypatch, capsys):
    """Each by itself, in an empty folder. A kernel that it registers is checked."""
    monkeypatch.chdir(tmp_path)
    before = set(registry.kernels())
    line = page.read_text(encoding="utf-8")[: block.start(1)].count("\n")
    try:
        exec(compile("\n" * line + block[1], str(page), "exec"), {"__name__": "example"})
        added = set(registry.kernels()) - before
        results = [r for k in added for case in k.problem.cases if "test" in case.tags for r in check_case(k, case)]
        assert bool(results) == bool(added) and all(r.ok for r in results), "\n".join(map(str, results))
    finally:
        for k in set(registry.kernels()) - before:
            registry.forget(k.problem.name, k.name)


def test_there_are_blocks():
    assert {param.values[0] for param in BLOCKS} == set(PAGES)


def test_translations_have_the_same_code_and_figures():
    english, chinese = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "tutorial.zh.md")
    )
    codes = [[ast.dump(ast.parse(block[1])) for block in FENCE.finditer(text)] for text in (english, chinese)]
    assert codes[0] == codes[1]
    figures = [re.findall(r"(?<![\w.])[+-]?\d[\d,]*\.\d+(?:e[+-]\d+)?", text) for text in (english, chinese)]
    assert sorted(figures[0]) == sorted(figures[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    paths = set(re.findall(r"(?<![\w/.~-])((?:minires|kernels|tests|benchmarks|\.ci)/[\w./]*)", text))
    missing = [p for p in paths if not (ROOT / p).exists() and not (page.parent / p).exists()]
    assert not missing


def test_commands_exist(capsys):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent in (ROOT, ROOT / "docs"))
    commands = set(re.findall(r"^ {4}minires ([a-z]+)((?: [a-z]+)?)", text, re.M))
    assert {name for name, _ in commands} >= {"train", "info", "kernels"}
    for name, sub in commands:
        assert cli.main([name, *(sub.split() if name in ("kernels", "study") else ()), "--help"]) == 0
    capsys.readouterr()


def test_docstring_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = [name for name in MODULES if doctest.testmod(importlib.import_module(name)).failed]
    assert not failed


@pytest.mark.parametrize(
    "name", ["minires", "minires.nn", "minires.nn.functional", "minires.optim", "minires.data", "minires.study"]
)
def test_public_names_are_explained(name):
    module = importlib.import_module(name)
    bare = [n for n in module.__all__ if _is_ours(value := getattr(module, n)) and not inspect.getdoc(value)]
    assert module.__doc__ and not bare


def _is_ours(value):
    made = inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value)
    return made and (getattr(value, "__module__", None) or value.__name__).startswith("minires")
