"""The family of a set of artifacts: who came from whom. Pure graph questions over manifests; reads no file and draws nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from llmworks.artifact import Artifact

HELD_OUT = ("held_out", "validation", "test", "tests", "prompts")  # inputs of trainings that are not learned


@dataclass(frozen=True)
class Node:
    """An artifact, or an ancestor known only by its digest and reference (`artifact` is None)."""

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
    """Nodes by digest, in an order where parents come before children."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def ancestors(self, digest: str) -> list[Node]:
        """The node and everything it came from, parents first."""
        wanted: set[str] = set()
        todo = [digest]
        while todo:
            current = todo.pop()
            if current not in wanted and current in self.nodes:
                wanted.add(current)
                todo += [parent for _, parent in self.nodes[current].parents]
        return [node for node in self.nodes.values() if node.digest in wanted]

    def children(self, digest: str) -> list[tuple[str, Node]]:
        """(role, child) for every artifact that consumed this one."""
        return [(role, node) for node in self.nodes.values() for role, parent in node.parents if parent == digest]

    def trained_on(self, digest: str) -> list[Node]:
        """The data sets that it, or an ancestor, was trained on, as texts: of packed tokens what they were made from; held-out rows are not among them."""
        found: dict[str, Node] = {}
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

    def roots(self) -> list[Node]:
        """Nodes without parents."""
        return [node for node in self.nodes.values() if not node.parents]

    def restricted(self, digests: Iterable[str]) -> Family:
        """The family of the given nodes and their ancestors."""
        keep = {node.digest for digest in digests for node in self.ancestors(digest)}
        return Family({d: n for d, n in self.nodes.items() if d in keep})


def family_of(artifacts: Iterable[Artifact], names: Mapping[str, Artifact] | None = None) -> Family:
    """Build the family of artifacts; `names` (label to artifact) decide how people call them."""
    labels = {a.digest: label.split("/")[-1] for label, a in (names or {}).items()}
    every = {a.digest: a for a in [*artifacts, *(names or {}).values()]}
    nodes: dict[str, Node] = {}
    for artifact in every.values():
        m = artifact.manifest
        assert m is not None
        parents = tuple((p.role, p.digest) for p in m.parents)
        nodes[m.digest] = Node(m.digest, m.kind, labels.get(m.digest, ""), m.stage, m.derivation, parents, artifact, artifact.ref)
        for p in m.parents:
            labels.setdefault(p.digest, p.name)
            if p.digest not in every and p.digest not in nodes:
                nodes[p.digest] = Node(p.digest, p.kind, p.name, "", "declared", (), None, p.ref)
    named = {d: replace(n, label=n.label or labels.get(d, "") or d[:12]) for d, n in nodes.items()}
    return Family(_sorted(named))


def _sorted(nodes: dict[str, Node]) -> dict[str, Node]:
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((parent, node.digest) for node in nodes.values() for _, parent in node.parents if parent in nodes)

    def age(digest: str) -> tuple[str, str]:
        artifact = nodes[digest].artifact
        return (artifact.manifest.finished if artifact is not None and artifact.manifest is not None else "", digest)

    order = networkx.lexicographical_topological_sort(graph, key=age)
    return {digest: nodes[digest] for digest in order}
