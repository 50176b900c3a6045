"""How much to draft and in which shape, decided before drafting.

| policy | shape |
|---|---|
| `Chain` | one path |
| `StaticTree` | always the same paths, named by ranks (EAGLE-1, arXiv 2401.15077; Medusa, arXiv 2401.10774) |
| `DynamicTree` | EAGLE-2's (arXiv 2406.16858): the most probable nodes |
| `CostAwareTree` | the dynamic tree, of the size and depth that promise most tokens a second on this machine |

`growth.py` grows them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sstf.config_loading import Section

# How children are chosen: the best ones, or drawn from the draft distribution (which counts at temperature > 0 only).
Draw = Literal["top", "without_replacement", "iid"]


class _Policy(Section):
    """`lookup` adds continuations found in the text itself (n-grams) as branches of the same tree."""

    lookup: bool = False


class _Shape(_Policy):
    """A shape that does not depend on the draft distribution, so that children may also be drawn from it."""

    draw: Draw = "top"

    @model_validator(mode="after")
    def _lookup_is_not_drawn(self) -> _Shape:
        if self.lookup and self.draw != "top":
            raise ValueError(f"lookup needs draw: top, found {self.draw}: what the text offers was not drawn")
        return self


class Chain(_Shape):
    """One path of `depth` tokens."""

    kind: Literal["chain"] = "chain"
    depth: int = Field(default=4, ge=1, le=64)

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """As a static tree."""
        return tuple((0,) * length for length in range(1, self.depth + 1))

    @property
    def total_tokens(self) -> int:
        """Nodes verified at most."""
        return self.depth

    @property
    def drafted_tokens(self) -> int:
        """Nodes that the head runs on at most."""
        return self.depth


class StaticTree(_Shape):
    """The same tree always. A path names a node by the ranks that lead to it: (0,) is the root's best child,
    (0, 1) the second best child of that."""

    kind: Literal["static"] = "static"
    paths: tuple[tuple[Annotated[int, Field(ge=0, lt=128)], ...], ...] = Field(min_length=1, max_length=1024)

    @field_validator("paths")
    @classmethod
    def _a_tree(cls, paths: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        known = set(paths)
        if len(known) != len(paths) or () in known:
            raise ValueError("paths names a node twice, or the root; expected every node once")
        for path in paths:
            needed = [path[:-1]] if len(path) > 1 else []
            needed += [(*path[:-1], path[-1] - 1)] if path[-1] else []
            for other in needed:
                if other not in known:
                    raise ValueError(
                        f"paths holds {list(path)} but not {list(other)}; a node needs its parent and the siblings "
                        "that rank before it"
                    )
        return tuple(sorted(paths, key=lambda path: (len(path), path)))

    @classmethod
    def full(cls, *widths: int, draw: Draw = "top") -> StaticTree:
        """Every node of level i has `widths[i]` children."""
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in widths:
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(paths=tuple(paths), draw=draw)

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return max(len(path) for path in self.paths)

    @property
    def total_tokens(self) -> int:
        """Nodes verified at most."""
        return len(self.paths)

    @property
    def drafted_tokens(self) -> int:
        """Nodes that the head runs on at most."""
        return len(self.paths)


class _Grown(_Policy):
    """A shape that follows the draft distribution."""

    depth: int = Field(default=5, ge=1, le=64)
    top_k: int = Field(default=8, ge=1, le=128)
    total_tokens: int = Field(default=24, ge=1, le=1024)
    calibrated: bool = False

    @property
    def drafted_tokens(self) -> int:
        """Nodes that the head runs on at most."""
        return self.depth * self.top_k


class DynamicTree(_Grown):
    """EAGLE-2's tree: `depth` levels, `top_k` nodes expanded a level, `total_tokens` nodes verified.

    `calibrated` scores nodes by the acceptance that was observed for their depth, rank and confidence.
    """

    kind: Literal["dynamic"] = "dynamic"


class CostAwareTree(_Grown):
    """Grows while the expected tokens per second rise, by calibrated node scores and the measured cost of a pass.

    `depth`, `top_k` and `total_tokens` are upper limits. On a GPU it costs one more read-back a level.
    """

    kind: Literal["cost_aware"] = "cost_aware"
    depth: int = Field(default=8, ge=1, le=64)
    total_tokens: int = Field(default=48, ge=1, le=1024)
    calibrated: bool = True


TreePolicy = Annotated[Chain | StaticTree | DynamicTree | CostAwareTree, Field(discriminator="kind")]
AnyTree = Chain | StaticTree | DynamicTree | CostAwareTree
