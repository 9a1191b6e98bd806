"""The lineage graph of a set of artifacts.

Pure graph queries over manifests; reads no files and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from llmworks.core.artifact import Artifact

HELD_OUT = (
    "eval_data",
    "held_out",
    "validation",
    "test",
    "tests",
    "prompts",
)  # training inputs that are not trained on


@dataclass(frozen=True)
class LineageNode:
    """An artifact, or an ancestor known only by digest and reference (`artifact` is None)."""

    digest: str
    kind: str
    label: str
    stage: str
    derivation: str
    parents: tuple[tuple[str, str], ...]  # (role, digest)
    artifact: Artifact | None = None
    ref: str = ""


@dataclass
class Family:
    """Lineage graph: nodes by digest, in topological order (parents before children)."""

    nodes: dict[str, LineageNode] = field(default_factory=dict)

    def ancestors(self, digest: str) -> list[LineageNode]:
        """Return the node and all its ancestors, parents first."""
        wanted: set[str] = set()
        todo = [digest]
        while todo:
            current = todo.pop()
            if current not in wanted and current in self.nodes:
                wanted.add(current)
                todo += [parent for _, parent in self.nodes[current].parents]
        return [node for node in self.nodes.values() if node.digest in wanted]

    def children(self, digest: str) -> list[tuple[str, LineageNode]]:
        """List (role, child) for every artifact made from this one."""
        return [(role, node) for node in self.nodes.values() for role, parent in node.parents if parent == digest]

    def list_training_data(self, digest: str) -> list[LineageNode]:
        """List the datasets that the node or an ancestor was trained on, as text: packed tokens are traced back to
        their sources; held-out data is excluded.
        """
        found: dict[str, LineageNode] = {}
        for node in self.ancestors(digest):
            if not node.stage.startswith(("train.", "align.")):
                continue
            todo = [parent for role, parent in node.parents if role.split("[")[0] not in HELD_OUT]
            while todo:
                parent = self.nodes.get(todo.pop())
                if parent is None or parent.kind != "dataset":
                    continue
                tokens = parent.artifact is not None and parent.artifact.about.get("schema") == "tokens"
                if tokens:
                    todo += [d for _, d in parent.parents]
                else:
                    found[parent.digest] = parent
        return list(found.values())

    def filter_kinds(self, *kinds: str) -> Family:
        """Keep the nodes of some kinds; edges skip the nodes in between."""

        def nearest(digest: str, visited: frozenset[str] = frozenset()) -> list[str]:
            node = self.nodes.get(digest)
            if node is None or digest in visited:
                return []
            return (
                [digest]
                if node.kind in kinds
                else [one for _, parent in node.parents for one in nearest(parent, visited | {digest})]
            )

        found: dict[str, LineageNode] = {}
        for digest, node in self.nodes.items():
            if node.kind in kinds:
                parents = [
                    (role if parent == above else f"{role}, indirectly", above)
                    for role, parent in node.parents
                    for above in nearest(parent)
                ]
                roles: dict[str, str] = {}
                for role, parent in parents:
                    roles.setdefault(parent, role)
                found[digest] = replace(node, parents=tuple((role, parent) for parent, role in roles.items()))
        return Family(_sort_topologically(found))

    def subgraph(self, digests: Iterable[str]) -> Family:
        """Return the subgraph of the given nodes and their ancestors."""
        keep = {node.digest for digest in digests for node in self.ancestors(digest)}
        return Family({d: n for d, n in self.nodes.items() if d in keep})


@dataclass(frozen=True)
class ExtraParent:
    """A parent that is in no manifest: claimed by a file or inferred from weights.

    `digest`: the parent's, or a placeholder where only its name is known.
    """

    child: str
    digest: str
    name: str
    role: str
    ref: str = ""


def build_family(
    artifacts: Iterable[Artifact], names: Mapping[str, Artifact] | None = None, kin: Iterable[ExtraParent] = ()
) -> Family:
    """Build the lineage graph of artifacts; `names` (label to artifact) give display names; `kin`: parents in addition
    to those in manifests.

    Of artifacts with one recorded digest the last in `artifacts` is the node: its files may differ from the others'.
    """
    labels = {a.digest: label.split("/")[-1] for label, a in (names or {}).items()}
    every = {a.digest: a for a in [*(names or {}).values(), *artifacts]}
    nodes: dict[str, LineageNode] = {}
    for artifact in every.values():
        m = artifact.manifest
        assert m is not None
        parents = tuple((p.role, p.digest) for p in m.parents)
        nodes[m.digest] = LineageNode(
            m.digest, m.kind, labels.get(m.digest, ""), m.stage, m.derivation, parents, artifact, artifact.ref
        )
        for p in m.parents:
            labels.setdefault(p.digest, p.name)
            if p.digest not in every and p.digest not in nodes:
                nodes[p.digest] = LineageNode(p.digest, p.kind, p.name, "", "declared", (), None, p.ref)
    for one in kin:
        node = nodes.get(one.child)
        if node is None or one.digest == one.child or any(digest == one.digest for _, digest in node.parents):
            continue
        if one.digest not in nodes:
            nodes[one.digest] = LineageNode(one.digest, "model", one.name, "", "declared", (), None, one.ref)
        if one.child not in _find_ancestors(nodes, one.digest):
            nodes[one.child] = replace(node, parents=(*node.parents, (one.role, one.digest)))
    named = {d: replace(n, label=n.label or labels.get(d, "") or d[:12]) for d, n in nodes.items()}
    return Family(_sort_topologically(named))


def _find_ancestors(nodes: Mapping[str, LineageNode], digest: str) -> set[str]:
    """Return a node and all its ancestors."""
    found, todo = set[str](), [digest]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += [parent for _, parent in nodes[current].parents] if current in nodes else []
    return found


def _sort_topologically(nodes: dict[str, LineageNode]) -> dict[str, LineageNode]:
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(
        (parent, node.digest) for node in nodes.values() for _, parent in node.parents if parent in nodes
    )

    def age(digest: str) -> tuple[str, str]:
        artifact = nodes[digest].artifact
        return (artifact.manifest.finished if artifact is not None and artifact.manifest is not None else "", digest)

    order = networkx.lexicographical_topological_sort(graph, key=age)
    return {digest: nodes[digest] for digest in order}
