"""Tell from a chat template's source whether it writes every text as it is.

Such a template need not be run for each conversation: who speaks and which texts are blank decide
what stands around the texts (see :mod:`phi3_plugin.data.layout`). All published templates of the
family are of this kind. What is not understood here counts as not plain, which costs time only.
"""

from collections.abc import Callable, Mapping

from jinja2 import TemplateError, nodes

from phi3_plugin.data.sandbox import template_environment

SAFE, TEXT, MESSAGE, MESSAGES, LOOP = "safe", "text", "message", "messages", "loop"
"""What an expression is: independent of the texts, a text or one with something around it, …"""

FIELDS = {"role": SAFE, "content": TEXT, "tools": TEXT}
LOOP_FIELDS = ("first", "last", "index", "index0", "length", "revindex", "revindex0")
PLAIN_TESTS = ("defined", "undefined", "none", "string", "mapping", "sequence")
"""Tests of a text whose outcome does not hang on what it says."""

Names = dict[str, str]


class _Unclear(Exception):
    """Something that is not understood."""


def is_plain(source: str) -> bool:
    """Whether the template writes texts as they are, and looks only at whether they are empty."""
    try:
        _statements(template_environment().parse(source).body, {"messages": MESSAGES})
    except (_Unclear, TemplateError, RecursionError):
        return False
    return True


def _statements(body: list[nodes.Node], names: Names) -> None:
    for node in body:
        handle = STATEMENTS.get(type(node))
        if handle is None:
            raise _Unclear
        handle(node, names)


def _output(node: nodes.Output, names: Names) -> None:
    for child in node.nodes:
        if not isinstance(child, nodes.TemplateData):
            _need(child, names, SAFE, TEXT)


def _if(node: nodes.If, names: Names) -> None:
    _truth(node.test, names)
    for body in (node.body, node.elif_, node.else_):
        _statements(list(body), names)


def _for(node: nodes.For, names: Names) -> None:
    if not isinstance(node.target, nodes.Name) or node.recursive:
        raise _Unclear
    _need(node.iter, names, MESSAGES)
    inside = {**names, node.target.name: MESSAGE, "loop": LOOP}
    if node.test is not None:
        _truth(node.test, inside)
    _statements(node.body, inside)
    _statements(node.else_, names)


def _assign(node: nodes.Assign, names: Names) -> None:
    if not isinstance(node.target, nodes.Name):
        raise _Unclear
    name, value = node.target.name, _kind(node.node, names)
    # One that is set in a branch keeps its value after it, so it must be the same in both
    if names.setdefault(name, value) != value:
        raise _Unclear


def _scope(node: nodes.Scope, names: Names) -> None:
    _statements(node.body, dict(names))


STATEMENTS: Mapping[type[nodes.Node], Callable[..., None]] = {
    nodes.Output: _output,
    nodes.If: _if,
    nodes.For: _for,
    nodes.Assign: _assign,
    nodes.Scope: _scope,
    nodes.Break: lambda node, names: None,
    nodes.Continue: lambda node, names: None,
}


def _need(node: nodes.Node, names: Names, *kinds: str) -> str:
    found = _kind(node, names)
    if found not in kinds:
        raise _Unclear
    return found


def _truth(node: nodes.Node, names: Names) -> None:
    """Check an expression of which only the truth counts; of a text that is whether it is empty."""
    if isinstance(node, nodes.And | nodes.Or):
        _truth(node.left, names)
        _truth(node.right, names)
    elif isinstance(node, nodes.Not):
        _truth(node.node, names)
    else:
        _need(node, names, SAFE, TEXT, MESSAGES, MESSAGE)


def _kind(node: nodes.Node, names: Names) -> str:
    handle = EXPRESSIONS.get(type(node))
    if handle is None:
        raise _Unclear
    return handle(node, names)


def _name(node: nodes.Name, names: Names) -> str:
    return names.get(node.name, SAFE)


def _field(node: nodes.Getattr | nodes.Getitem, names: Names) -> str:
    of = _kind(node.node, names)
    if isinstance(node, nodes.Getitem) and of == MESSAGES:
        return _element(node.arg, names)
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    if of == LOOP and key in LOOP_FIELDS:
        return SAFE
    if of != MESSAGE or key not in FIELDS:
        raise _Unclear
    return FIELDS[key]


def _element(place: nodes.Node, names: Names) -> str:
    if isinstance(place, nodes.Slice):
        _all_safe(place, names)
        return MESSAGES
    number = place.node if isinstance(place, nodes.Neg) else place
    if isinstance(number, nodes.Const):
        return MESSAGE
    raise _Unclear


def _joined(node: nodes.Add | nodes.Concat, names: Names) -> str:
    parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
    return TEXT if TEXT in [_need(part, names, SAFE, TEXT) for part in parts] else SAFE


def _compared(node: nodes.Compare, names: Names) -> str:
    if [operand.op for operand in node.ops] in (["in"], ["notin"]):
        _need(node.expr, names, SAFE)
        _need(node.ops[0].expr, names, SAFE, MESSAGE)
    else:
        for part in (node.expr, *(operand.expr for operand in node.ops)):
            _need(part, names, SAFE)
    return SAFE


def _tested(node: nodes.Test, names: Names) -> str:
    kind = _need(node.node, names, SAFE, TEXT, MESSAGE, MESSAGES)
    if node.args or node.kwargs or (kind != SAFE and node.name not in PLAIN_TESTS):
        raise _Unclear
    return SAFE


def _filtered(node: nodes.Filter, names: Names) -> str:
    if node.name not in ("length", "count") or node.args or node.kwargs or node.node is None:
        raise _Unclear
    _need(node.node, names, MESSAGES, SAFE)
    return SAFE


def _called(node: nodes.Call, names: Names) -> str:
    if not isinstance(node.node, nodes.Name) or node.node.name != "raise_exception":
        raise _Unclear
    for argument in node.args:
        _need(argument, names, SAFE)
    return SAFE


def _chosen(node: nodes.CondExpr, names: Names) -> str:
    _truth(node.test, names)
    ends = [node.expr1, *([node.expr2] if node.expr2 else [])]
    return TEXT if TEXT in [_need(end, names, SAFE, TEXT) for end in ends] else SAFE


def _all_safe(node: nodes.Node, names: Names) -> str:
    for child in node.iter_child_nodes():
        _need(child, names, SAFE)
    return SAFE


EXPRESSIONS: Mapping[type[nodes.Node], Callable[..., str]] = {
    nodes.Name: _name,
    nodes.Const: lambda node, names: SAFE,
    nodes.Getattr: _field,
    nodes.Getitem: _field,
    nodes.Add: _joined,
    nodes.Concat: _joined,
    nodes.Compare: _compared,
    nodes.Test: _tested,
    nodes.Filter: _filtered,
    nodes.Call: _called,
    nodes.CondExpr: _chosen,
    **dict.fromkeys(
        (nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Sub, nodes.Mod, nodes.List, nodes.Tuple),
        _all_safe,
    ),
}
