"""Small faults in the functions of a file, for `mutate`, and how one is planted in a living
process."""

import ast
import copy
import gc
import hashlib
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import _lru_cache_wrapper
from pathlib import Path
from types import CodeType, FunctionType

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add}
PAIRS = (
    *(("min", "max"), ("any", "all"), ("argmin", "argmax"), ("amin", "amax")),
    *(("append", "appendleft"), ("ceil", "floor")),
)
SYMMETRIC = ("min", "max", "minimum", "maximum")
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
# What runs at import, what says something to people alone, what only guards or hastens.
UNTOUCHED_FIELDS = ("annotation", "returns", "decorator_list")
UNTOUCHED = (ast.arguments, ast.JoinedStr, ast.Assert)
UNTOUCHED_KEYWORDS = ("strict", "non_blocking", "pin_memory")

SEEN = "_mutants_seen"  # what a watched function calls, a name of its module

Place = tuple[str, int]  # a function's qualified name and first line
Change = tuple[str, int, ast.AST, str, int | None, ast.AST]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Mutant:
    """A fault.

    Args:
        function: file and function.
        name: both, line and change, which mean the same in later versions of the file.
        line: where the statement begins that has it.
        codes: of the functions that change, their new code.
    """

    file: str
    module: str
    function: str
    name: str
    line: int
    codes: dict[Place, CodeType]

    def rank(self, seed: int) -> str:
        """Those of the lowest ranks are chosen: one that goes or comes moves no other."""
        return hashlib.sha256(f"{seed} {self.name}".encode()).hexdigest()


def mutants_of(file: Path, module: str) -> Iterator[Mutant]:
    """All faults of a file that change the code of a function."""
    source = file.read_text(encoding="utf-8")
    tree, text = ast.parse(source), source.splitlines()
    original = _functions(compile(source, str(file), "exec"))
    known: Counter[str] = Counter()
    for function, line, owner, field, index, new in _changes(tree):
        old = _exchange(owner, field, index, ast.copy_location(new, _at(owner, field, index)))
        changed = _functions(compile(ast.fix_missing_locations(tree), str(file), "exec"))
        _exchange(owner, field, index, old)
        codes = {place: code for place, code in changed.items() if code != original[place]}
        # The cells of a living function cannot be changed.
        if not codes or any(c.co_freevars != original[p].co_freevars for p, c in codes.items()):
            continue
        what = (
            "returns at once"
            if isinstance(old, ast.FunctionDef)
            else f"{_words(old)} -> {_words(new)}"
        )
        name = f"{file} {function}: `{text[line - 1].strip()}` {what}"
        known[name] += 1
        number = f" #{known[name]}" if known[name] > 1 else ""
        yield Mutant(
            file=str(file),
            module=module,
            function=f"{file} {function}",
            name=name + number,
            line=line,
            codes=codes,
        )


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand instead of a node. (Long for it is a table, a case for each kind.)"""
    nothing = ast.Return(value=ast.Constant(value=None))
    match node:
        case ast.FunctionDef() if not _is_empty(node):
            yield _with(node, body=[nothing, *node.body])
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield nothing
        case ast.Raise() if _is_abstract(node):
            pass
        case (
            ast.Raise()
            | ast.Expr(value=ast.Call())
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_])
        ):
            yield ast.Pass()
        case ast.AugAssign():
            yield ast.Pass()
            if type(node.op) in OPERATORS:
                yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Compare():
            for place, one in enumerate(node.ops):
                for other in COMPARISONS[type(one)]:
                    ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                    yield _with(node, ops=ops)
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            yield _with(node, operand=ast.Constant(value=value + 1))
            yield ast.Constant(value=1 - value)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.Constant(value=bool(value)):
            yield ast.Constant(value=not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value=value + 1)
            yield ast.Constant(value=value - 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value=value + 1.0)
        case ast.Name(id=name) if name in NAMES:
            yield _with(node, id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield _with(node, attr=NAMES[name])
        case ast.Call(args=[first, second, *rest]):
            loose = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
            if not loose and not ast.unparse(node.func).endswith(SYMMETRIC):
                yield _with(node, args=[second, first, *rest])
    if isinstance(node, ast.If | ast.While | ast.IfExp) and isinstance(
        node.test, ast.Name | ast.Attribute | ast.Call | ast.Subscript
    ):
        yield _with(node, test=ast.UnaryOp(op=ast.Not(), operand=node.test))


def watched(file: Path) -> dict[Place, CodeType]:
    """The functions of a file, each statement of which first calls `SEEN` with its line."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(node, ast.Module | ast.ClassDef) or not isinstance(block, list):
                continue
            calls = [ast.parse(f"{SEEN}({str(file)!r}, {one.lineno})").body[0] for one in block]
            for call, one in zip(calls, block, strict=True):
                for part in ast.walk(call):
                    ast.copy_location(part, one)
            both = zip(calls, block, strict=True)
            setattr(node, field, [statement for pair in both for statement in pair])
    return _functions(compile(tree, str(file), "exec"))


class Living:
    """The functions of this process, to give them other code: methods and decorated ones too.

    Args:
        modules: imported ones, whose functions these are.

    Raises:
        RuntimeError: none is found, so that no fault could be planted.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        files = {sys.modules[name].__file__: name for name in modules}
        self._functions: defaultdict[tuple[str, Place], list[FunctionType]] = defaultdict(list)
        self._caches = []
        gc.unfreeze()  # what tests have frozen would not be seen
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename in files:
                place = thing.__code__.co_qualname, thing.__code__.co_firstlineno
                self._functions[files[thing.__code__.co_filename], place].append(thing)
            elif type(thing) is _lru_cache_wrapper and thing.__module__.startswith("specdec"):
                self._caches.append(thing)
        gc.freeze()  # processes that are forked share what none of them touches
        if not self._functions:
            raise RuntimeError(f"no function found of {', '.join(files.values())}")

    def plant(self, module: str, codes: Mapping[Place, CodeType]) -> None:
        """From now on functions of the module have other code, and what was kept of earlier calls
        is forgotten."""
        for place, code in codes.items():
            for function in self._functions[module, place]:
                function.__code__ = code
        for cache in self._caches:
            cache.cache_clear()


def _functions(code: CodeType) -> dict[Place, CodeType]:
    """Those of a module, its classes and its functions, less those without a name."""
    found: dict[Place, CodeType] = {}
    for part in code.co_consts:
        if isinstance(part, CodeType) and not part.co_name.startswith("<"):
            if part.co_flags & inspect.CO_NEWLOCALS:  # which the body of a class has not
                found[part.co_qualname, part.co_firstlineno] = part
            found |= _functions(part)
    return found


def _changes(
    node: ast.AST, scope: str = "", line: int = 0, *, inside: bool = False
) -> Iterator[Change]:
    """Function and line of the statement, and where in the tree which node may stand instead of
    what is there."""
    for field, value in ast.iter_fields(node):
        if field in UNTOUCHED_FIELDS or isinstance(node, ast.Raise):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _untouched(node, child):
                continue
            name, function = scope, isinstance(child, ast.FunctionDef)
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{scope}.{child.name}".lstrip(".")
            if isinstance(child, ast.stmt):
                line = child.body[0].lineno if isinstance(child, ast.FunctionDef) else child.lineno
            if inside or function:
                for new in replacements(child):
                    yield name, line, node, field, index, new
            yield from _changes(child, name, line, inside=inside or function)


def _untouched(parent: ast.AST, node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg in UNTOUCHED_KEYWORDS
    # The number of a negative one changes with its sign.
    signed = isinstance(parent, ast.UnaryOp) and isinstance(node, ast.Constant)
    return signed or isinstance(node, UNTOUCHED)


def _at(owner: ast.AST, field: str, index: int | None) -> ast.AST:
    value = getattr(owner, field)
    found: ast.AST = value if index is None else value[index]
    return found


def _exchange(owner: ast.AST, field: str, index: int | None, new: ast.AST) -> ast.AST:
    """Put a node in its place; returns the one that was there."""
    old = _at(owner, field, index)
    if index is None:
        setattr(owner, field, new)
    else:
        getattr(owner, field)[index] = new
    return old


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_empty(function: ast.FunctionDef) -> bool:
    """Whether it does nothing, as what others are to define."""
    return all(
        _is_abstract(one) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        for one in function.body
    )


def _is_abstract(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and ast.unparse(statement) == (
        "raise NotImplementedError"
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _words(node: ast.AST) -> str:
    """A node in a few words."""
    if isinstance(node, ast.If | ast.While):
        node = node.test
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())[:60]
