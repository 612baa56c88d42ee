"""Where a Swift's head is, and how to run Swift up to it.

The fused op runs the head, so Swift has to stop one step short. The user's module tree is never edited for that:
`find` builds a *view* of Swift, a shallow copy of the modules on the path from the root to the head, in which the
head's slot hands its input through. Every parameter, buffer and other submodule is the user's own, and it is Swift's
own `forward` that runs, pooling, last-token pick and all: what the view returns as "logits" is the head's input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Head = str | Callable[[Any], nn.Module]

_registered: dict[type | str, Head] = {}


@dataclass(frozen=True)
class Backbone:
    """A Swift, split where its head can be taken over."""

    run: Callable[..., Any]  # gives the head's input [N, H] in place of logits; without a head, the logits [N, C]
    head: nn.Linear | None


def register_backbone(swift: type | str, head: Head) -> None:
    """Say where the head of an architecture is, when `find` cannot see it.

    Swift's `forward` must end with the head, up to a choice of positions: with `y = head(x)` replaced by `y = x` it
    has to return the head's input, [N, H], where it used to return logits.

    Args:
        swift: the model's class (subclasses are covered), or its name.
        head: dotted path of the head inside the model (`"classifier.out_proj"`), or a function from the model to that
            module.

    Raises:
        TypeError: `swift` is no class and no name, or `head` no path and no function.
    """
    if not isinstance(swift, type | str):
        raise TypeError(f"swift: got {type(swift).__name__}, wanted a class or the name of one")
    if not (isinstance(head, str) or callable(head)):
        raise TypeError(
            f"head: got {type(head).__name__}, wanted a dotted path or a function from the model to its head"
        )
    _registered[swift] = head


def find(swift: Any) -> Backbone:
    """Split Swift at its head, or leave it whole where that would not be the same computation.

    The head is the one that `register_backbone` names; else, in a Hugging Face `*ForSequenceClassification`, the last
    linear layer with `config.num_labels` outputs outside of the base model. Swift stays whole (`head` is None) if
    there is none, or if the head is not a plain `nn.Linear` (quantised, LoRA), or if it or a module above it is
    wrapped, hooked, compiled or has its `forward` replaced.

    Raises:
        ValueError: a registered head that is not there.
    """
    path = _head_path(swift) if isinstance(swift, nn.Module) else None
    if path is None:
        return Backbone(swift, None)
    names = path.split(".")
    chain = [swift.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    if not (_is_plain_linear(chain[-1]) and all(map(_runs_as_written, chain))):
        return Backbone(swift, None)
    return Backbone(_view(chain[:-1], names), chain[-1])


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: `.logits`, the first item of a tuple, or the tensor itself."""
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"output of a model: got {type(output).__name__}, wanted .logits, a tensor, or a tuple of them")
    return logits


def _head_path(swift: Any) -> str | None:
    for cls in type(swift).__mro__:
        head = _registered.get(cls, _registered.get(cls.__name__))
        if head is not None:
            return _registered_path(swift, head)
    if not (type(swift).__name__.endswith("ForSequenceClassification") and hasattr(swift, "base_model_prefix")):
        return None
    # A forward of the user's own may do anything around the head: only they can tell, by register_backbone.
    forward_of = next(cls for cls in type(swift).__mro__ if "forward" in vars(cls))
    if forward_of.__module__.split(".")[0] != "transformers":
        return None
    heads = [
        name
        for name, module in swift.named_modules()
        if getattr(module, "out_features", None) == swift.config.num_labels
        and not name.startswith(f"{swift.base_model_prefix}.")
    ]
    return heads[-1] if heads and _is_last_step(swift, heads[-1]) else None


def _registered_path(swift: nn.Module, head: Head) -> str:
    modules = dict(swift.named_modules())
    if isinstance(head, str):
        found = [head] if head in modules else []
    else:
        wanted = head(swift)
        found = [name for name, module in modules.items() if module is wanted]
    if not found or not found[0]:
        linear = ", ".join(name for name, module in modules.items() if isinstance(module, nn.Linear))
        raise ValueError(f"head: {head!r} is no submodule of {type(swift).__name__}, whose linear layers are: {linear}")
    return found[0]


def _is_last_step(swift: Any, path: str) -> bool:
    """Whether the architecture, as far as its structure tells, does nothing to what the head returns."""
    written_in = {cls.__module__ for cls in type(swift).__mro__}
    parent = swift
    for name in path.split("."):
        # A class from elsewhere (an adapter, a user's wrapper) may do anything to the output of what it holds.
        if type(parent).__module__ not in written_in and type(parent) is not nn.Sequential:
            return False
        children = dict(parent.named_children())
        if parent is swift:
            children.pop(swift.base_model_prefix, None)
        after = list(children.values())[list(children).index(name) + 1 :]
        if not all(isinstance(module, nn.Dropout | nn.Identity) for module in after):
            return False
        parent = children[name]
    return True


def _is_plain_linear(module: nn.Module) -> bool:
    # A quantised weight is a subclass of Parameter.
    return type(module) is nn.Linear and all(type(parameter) is nn.Parameter for parameter in module.parameters())


def _runs_as_written(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module) and module._compiled_call_impl is None


def _view(chain: list[nn.Module], names: list[str]) -> nn.Module:
    """`chain`: the modules from the root to the head's parent. `names`: the step from each to the next."""
    inner: nn.Module = nn.Identity().eval()
    for module, name in zip(reversed(chain), reversed(names), strict=True):
        twin = copy.copy(module)
        twin._modules = {**module._modules, name: inner}
        twin.training = False
        inner = twin
    return inner
