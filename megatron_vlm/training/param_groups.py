"""Learning rates of a run that goes on are its recipe's, whatever its checkpoint and megatron-core's loading say.

megatron-core stores with each parameter group what it is and its highest and lowest rate. Version 0.16 knows groups
again without looking at the rates: a new `lr` has no effect, and where one part has a rate of its own, all get that of
whichever group came last. Version 0.19 knows them again by their rates, and finds none under a new `lr`.
"""

from __future__ import annotations

from typing import Any

_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What a group is, besides its rates."""
_RATES = ("max_lr", "min_lr")
_OF_RECIPE = (*_RATES, "default_config")

Group = dict[str, Any]


def _kind(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in _KIND)


def _rates(group: Group) -> Group:
    return {name: group[name] for name in _RATES if name in group}


def recipe_lrs(groups: list[Group]) -> list[Group]:
    """What the recipe gave each parameter group of an optimizer; taken before anything is loaded."""
    return [{name: group[name] for name in _OF_RECIPE if name in group} for group in groups]


def restore_lrs(groups: list[Group], rates: list[Group]) -> None:
    """Give parameter groups what `recipe_lrs` found, after a checkpoint was loaded."""
    for group, own in zip(groups, rates, strict=True):
        group.update(own)


def match_param_groups(stored: Any, current: list[Group]) -> None:
    """Let megatron-core find a stored group for each current one, of the same kind, whatever its rates; in place.

    Args:
        stored: an optimizer's state as it was loaded; groups lie in it nested in several ways.
        current: parameter groups of the optimizer that it goes into, with the recipe's rates.
    """
    if isinstance(stored, list | tuple):
        for part in stored:
            match_param_groups(part, current)
    elif isinstance(stored, dict):
        for name, part in stored.items():
            if name == "param_groups":
                _match_groups(part, current)
            else:
                match_param_groups(part, current)


def _match_groups(stored: list[Group], current: list[Group]) -> None:
    for group in current:
        alike = [other for other in stored if _kind(other) == _kind(group)]
        if not alike or any(_rates(other) == _rates(group) for other in alike):
            continue
        wanted = [_rates(other) for other in current if _kind(other) == _kind(group)]
        unused = [other for other in alike if _rates(other) not in wanted]
        if unused:
            unused[0].update(_rates(group))
        else:
            stored.append(alike[0] | _rates(group))
