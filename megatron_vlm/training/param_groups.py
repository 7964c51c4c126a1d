"""Keep the recipe's learning rates and weight decay when an optimizer is loaded from a checkpoint.

megatron-core stores max_lr and min_lr with each parameter group, and start_wd and end_wd where a model part has its own
weight decay. Version 0.16 matches stored groups without comparing them: a new `lr` has no effect, and if one model part
has its own rate, all parts get the rate of the last group. Version 0.19 matches them by their rates and finds no match
for a new `lr`, nor for a new weight decay.
"""

from __future__ import annotations

from typing import Any

_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What identifies a group, apart from its rates."""
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
_OF_RECIPE = (*_RATES, "default_config")

Group = dict[str, Any]


def _kind(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in _KIND)


def _rates(group: Group) -> Group:
    return {name: group[name] for name in _RATES if name in group}


def _with_rates(stored: Group, rates: Group) -> Group:
    return {name: value for name, value in stored.items() if name not in _RATES} | rates


def recipe_settings(groups: list[Group]) -> list[Group]:
    """What the recipe sets in an optimizer's parameter groups, to be read before a checkpoint is loaded."""
    return [{name: group[name] for name in _OF_RECIPE if name in group} for group in groups]


def restore_settings(groups: list[Group], settings: list[Group]) -> None:
    """Set what `recipe_settings` returned, and nothing else of its kind, after a checkpoint was loaded."""
    for group, own in zip(groups, settings, strict=True):
        for name in _OF_RECIPE:
            group.pop(name, None)
        group.update(own)


def match_param_groups(stored: Any, current: list[Group]) -> None:
    """Change the rates of stored groups so that megatron-core finds one for each current group; in place.

    Args:
        stored: a loaded optimizer state, in which lists of groups are nested at several depths.
        current: the groups of the optimizer that will load it, with the recipe's rates.
    """
    if isinstance(stored, list | tuple):
        for nested in stored:
            match_param_groups(nested, current)
    elif isinstance(stored, dict):
        for name, nested in stored.items():
            if name == "param_groups":
                _match_groups(nested, current)
            else:
                match_param_groups(nested, current)


def _match_groups(stored: list[Group], current: list[Group]) -> None:
    for group in current:
        same_kind = [other for other in stored if _kind(other) == _kind(group)]
        if not same_kind or any(_rates(other) == _rates(group) for other in same_kind):
            continue
        wanted = [_rates(other) for other in current if _kind(other) == _kind(group)]
        unused = [other for other in same_kind if _rates(other) not in wanted]
        if unused:
            stored[stored.index(unused[0])] = _with_rates(unused[0], _rates(group))
        else:
            stored.append(_with_rates(same_kind[0], _rates(group)))
