"""The rules of the house: which file imports which, what lies at the top, and how a line may read."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

from support.tests.common import HERE

ALONE = ('pfgm', 'unet')
SCRIPTS = ('train', 'sample', 'evaluate')
NOT_IMPORTED = ('support.bench', 'support.figures')
TOP = ('.ci', '.gitignore', 'LICENSE', 'README.md', 'RESULTS.md', 'assets', 'requirements.txt',
       'support', 'test_pfgm.py', *(f'{name}.py' for name in (*ALONE, *SCRIPTS)))
SUPPORT = sorted(f'support.{path.stem}' for path in (HERE / 'support').glob('[!_]*.py'))
PRODUCT = (*ALONE, *SCRIPTS, *SUPPORT)


def path_of(module):
    return HERE / f'{module.replace(".", "/")}.py'


def parsed(module):
    return ast.parse(path_of(module).read_text())


def nodes_of(module, *types):
    return [node for node in ast.walk(parsed(module)) if isinstance(node, types)]


def imports_of(module):
    """The modules of this project that a module imports, at its top or inside a function."""
    names = set()
    for node in nodes_of(module, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:  # from support import cli, or from support.cli import say
            assert node.level == 0, f'{module}: relative import'
            names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return names & set(PRODUCT)


# ---------------------------------------------------------------- who imports whom

def test_imports__of_the_method_and_the_network_are_none_of_ours():
    for module in ALONE:
        assert not imports_of(module), module


def test_imports__of_support_are_no_script():
    for module in SUPPORT:
        assert not imports_of(module) & set(SCRIPTS), module


def test_imports__of_a_script_are_no_other_script():
    for module in SCRIPTS:
        assert not imports_of(module) & set(SCRIPTS), module


def test_imports__of_benches_and_figures_are_made_by_nobody():
    for module in PRODUCT:
        assert not imports_of(module) & set(NOT_IMPORTED), module


def test_imports__go_in_no_circle():
    remaining = {module: imports_of(module) for module in PRODUCT}
    while remaining:  # take away the floors one by one, from below
        floor = {module for module, imports in remaining.items() if not imports & set(remaining)}
        assert floor, f'a circle among {sorted(remaining)}'
        remaining = {module: remaining[module] for module in remaining if module not in floor}


# ---------------------------------------------------------------- what lies where

def test_top_level__holds_what_is_allowed():
    if not (HERE / '.git').exists():
        pytest.skip('not a git checkout, so nothing says which files belong to the project')
    listed = subprocess.run(['git', 'ls-files'], cwd=HERE, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert {Path(name).parts[0] for name in listed.stdout.splitlines()} == set(TOP)


def test_docstrings__of_support_say_whether_one_needs_to_read_the_file():
    for module in SUPPORT:
        words = ' '.join((ast.get_docstring(parsed(module)) or '').split())
        assert re.search(r'You need not read it|Read it (if|when|to)', words), module


# ---------------------------------------------------------------- how a line reads

def test_args__stop_at_the_scripts():
    """In support/ no function but a main takes them, and run(main, args), which hands them on."""
    for module in (*ALONE, *SUPPORT):
        for function in nodes_of(module, ast.FunctionDef):
            if function.name != 'main' and (module, function.name) != ('support.processes', 'run'):
                names = [argument.arg for argument in ast.walk(function.args)
                         if isinstance(argument, ast.arg)]
                assert 'args' not in names, f'{module}: {function.name}'


def is_text_or_list(node):
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, (ast.JoinedStr, ast.List))


def test_lines__multiply_no_text_or_list_by_a_condition():
    for module in PRODUCT:
        for node in nodes_of(module, ast.BinOp):
            if not isinstance(node.op, ast.Mult):
                continue
            for side, times in ((node.left, node.right), (node.right, node.left)):
                by_condition = is_text_or_list(side) and not isinstance(times, ast.Constant)
                assert not by_condition, f'{module}: line {node.lineno}: {ast.unparse(node)}'


def test_lines__nest_no_if_expressions():
    for module in PRODUCT:
        for node in nodes_of(module, ast.IfExp):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]
            assert inner == [node], f'{module}: line {node.lineno}: {ast.unparse(node)}'


def test_lines__are_at_most_100_columns_wide():
    for module in PRODUCT:
        for number, line in enumerate(path_of(module).read_text().splitlines(), 1):
            assert len(line) <= 100, f'{module}: line {number}'
