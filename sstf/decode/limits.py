"""What a policy asks of a method that cannot draft it (`DraftLimits`): what was set is refused, defaults are cut."""

from __future__ import annotations

from sstf.decode.adaptive import AnyPolicy, BanditPolicy
from sstf.errors import ConfigError
from sstf.methods.base import DraftLimits
from sstf.trees import AnyTree, Chain, StaticTree


def refuse_beyond(limits: DraftLimits, policy: AnyPolicy, drafter: str, key: str = "policy") -> None:
    """Refuse a policy, or an arm of it, that `drafter` cannot draft.

    Args:
        limits: of the method.
        policy: what was asked for.
        drafter: the method or head in words, which begin the sentence's second half.
        key: where the policy was set.

    Raises:
        ConfigError: what it asks for, and the values that are allowed.
    """
    if isinstance(policy, BanditPolicy):
        for name, arm in policy.arms.items():
            refuse_beyond(limits, arm, drafter, f"{key}.arms.{name}")
        return
    allowed = "any depth" if limits.depth is None else f"a depth of 1 to {limits.depth}"
    if not limits.trees and not isinstance(policy, Chain):
        raise ConfigError(
            f"{key} is a {policy.kind} tree, but {drafter} drafts chains; expected kind: chain, {allowed}"
        )
    if limits.depth is not None and policy.depth > limits.depth:
        raise ConfigError(
            f"{key} has depth {policy.depth}, but {drafter} drafts {limits.depth} tokens at once; expected {allowed}"
        )


def within(limits: DraftLimits, policy: AnyPolicy) -> AnyPolicy:
    """The policy, cut to what a method can draft; for policies that nobody asked for."""
    if isinstance(policy, BanditPolicy):
        return policy.model_copy(update={"arms": {name: _cut(limits, arm) for name, arm in policy.arms.items()}})
    return _cut(limits, policy)


def _cut(limits: DraftLimits, policy: AnyTree) -> AnyTree:
    depth = policy.depth if limits.depth is None else min(policy.depth, limits.depth)
    if not limits.trees and not isinstance(policy, Chain):
        return Chain(depth=depth, lookup=policy.lookup)
    if depth == policy.depth:
        return policy
    if isinstance(policy, StaticTree):
        return policy.model_copy(update={"paths": tuple(path for path in policy.paths if len(path) <= depth)})
    return policy.model_copy(update={"depth": depth})
