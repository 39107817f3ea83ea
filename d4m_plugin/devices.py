"""Which device and precision to compute in, where the user has not said, and how much at once."""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from d4m_plugin.errors import InputError

T = TypeVar("T")


class Batches:
    """Work on many items, as many at once as memory holds.

    Args:
        size: items at once; halved for good where the device's memory runs out.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[slice], T], count: int) -> list[T]:
        """Return what `work` gives of each batch of `count` items.

        Raises:
            InputError: where memory runs out with one item.
        """
        done: list[T] = []
        start = 0
        while start < count:
            batch = slice(start, min(start + self.size, count))
            try:
                done.append(work(batch))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.size == 1:
                    raise InputError(
                        "the device's memory does not hold one image; use a smaller model or `resolution`."
                    ) from error
                self.size = math.ceil(min(self.size, count) / 2)
                continue
            start = batch.stop
        return done


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory has run out, of which Apple's tells in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def default_device() -> torch.device:
    """Return the accelerator that is there, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def this_device() -> int | list[int]:
    """Return Lightning's `devices` for one process on the default device: the accelerator's number, else one CPU."""
    return [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else 1


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype a model's passes run in under autocast on a device: bfloat16 where it is fast.

    A CPU with AMX multiplies bfloat16 matrices several times faster than float32, one with AVX512-BF16 nearly twice
    as fast; one without either emulates it slowly.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a model's passes run in a dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def trainer_precision() -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """Return Lightning's name for mixed precision in `compute_dtype` on the default device."""
    dtype = compute_dtype(default_device())
    if dtype == torch.float32:
        return "32-true"
    return "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
