"""Where a student's logits come from: some module of it returns them in its training step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def logits_in(output: Any, shape: tuple[int, int]) -> Tensor | None:
    """Return the logits in what a module returned.

    Args:
        output: a tensor, a tuple whose first fitting tensor counts (the rest may be an auxiliary head's), a mapping,
            whose `logits` or `out` come first, or an object with `logits`, as transformers return.
        shape: the logits' shape: images of the batch, classes.
    """
    parts: Any = ()
    if isinstance(output, Tensor):
        parts = (output,)
    elif isinstance(getattr(output, "logits", None), Tensor):
        parts = (output.logits,)
    elif isinstance(output, Mapping):
        parts = [*(output[name] for name in ("logits", "out") if name in output), *output.values()]
    elif isinstance(output, list | tuple):
        parts = output
    return next((part for part in parts if isinstance(part, Tensor) and part.shape == shape), None)


def _students(output: Any, shape: tuple[int, int]) -> Tensor | None:
    """Return the logits that a loss can reach: not those of a metric without gradients, nor of a frozen copy."""
    logits = logits_in(output, shape)
    return logits if logits is not None and logits.requires_grad else None


class LogitsHook:
    """Notes the logits that a module returns.

    It stays in place from step to step, so that compiled modules keep their code.

    Args:
        module: the one that returns them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._shape = (0, 0)
        self._seen: Tensor | None = None
        self.remove = module.register_forward_hook(self._see).remove

    def expect(self, shape: tuple[int, int]) -> None:
        """Forget what was seen, and look out for logits of a shape."""
        self._shape, self._seen = shape, None

    def take(self) -> Tensor | None:
        """Return the first logits seen since, and forget them."""
        seen, self._seen = self._seen, None
        return seen

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._seen is None:
            self._seen = _students(output, self._shape)


@contextmanager
def all_logits(root: nn.Module, shape: tuple[int, int]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect what looks like logits from any module, with the module's name, in the order of the calls' ends."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            logits = _students(output, shape)
            if logits is not None:
                seen.append((name, logits))

        return module.register_forward_hook(see)

    hooks = [watch(name, module) for name, module in root.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would be made with these hooks in it
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def source_of_logits(seen: list[tuple[str, Tensor]]) -> str | None:
    """Return the name of the module whose output is the student's logits, "" for the root; None where there is none.

    That is the outermost; of several, the first that was called: a later one is a softmax for a metric or a second
    head. Probabilities are none: they were logits further inside.

    Args:
        seen: from `all_logits`.
    """
    names = [name for name, logits in seen if not _are_probabilities(logits)]
    return next((name for name in names if not any(_contains(other, name) for other in names)), None)


def _contains(outer: str, inner: str) -> bool:
    return outer != inner and (outer == "" or inner.startswith(f"{outer}."))


def _are_probabilities(logits: Tensor) -> bool:
    totals = logits.float().sum(1)
    return bool((logits >= 0).all() and torch.allclose(totals, torch.ones_like(totals), atol=1e-2))
