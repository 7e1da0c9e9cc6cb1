"""Checkpointed blocks: their operations and sites are the graph's own."""

from __future__ import annotations

import operator

import torch.fx as fx

from .. import compat


def unfold(gm: fx.GraphModule) -> int:
    """Put in place of each checkpointed block what it computes; return how many there were.

    ```
    body = get_attr[wrap_body_0]                         l = linear(x, w)
    c    = tag_activation_checkpoint(body, x, w)   ->    s = site(l, "l", "output", 0, True)
    y    = getitem(c, 0)                                 out = relu(s)
    ```

    Inside a block no plan would reach its markers. And run as it is, such a graph draws other random numbers in its backward
    than in its forward (torch 2.13). Which values a backward keeps is for the compiler to say; `eager` keeps all.
    """
    found = 0
    while nodes := [n for n in gm.graph.nodes if compat.graphs.checkpointed(n)]:
        for node in nodes:
            _unfold(gm, node)
            found += 1
    if found:
        gm.delete_all_unused_submodules()
    return found


def _unfold(gm: fx.GraphModule, node: fx.Node) -> None:
    held, *given = node.args
    assert isinstance(held, fx.Node)
    body = gm.get_submodule(str(held.target))
    assert isinstance(body, fx.GraphModule)
    values: dict = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.find_nodes(op="get_attr"):
            name = f"{held.target}_{inner.target}".replace(".", "_")
            setattr(gm, name, _attribute(body, str(inner.target)))
            values[inner] = gm.graph.get_attr(name)
            values[inner].meta = dict(inner.meta)
        outputs = gm.graph.graph_copy(body.graph, values)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index, call-overload, arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not held.users:
        gm.graph.erase_node(held)


def _attribute(module: object, path: str) -> object:
    return operator.attrgetter(path)(module)
