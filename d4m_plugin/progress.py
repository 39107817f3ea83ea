"""How far long work is: a bar on a terminal or in a notebook, plain lines elsewhere, and lines in a log."""

import io
import logging
import os
import sys
import time
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

LOG = logging.getLogger("d4m_plugin")
EVERY = 30.0  # seconds between plain lines
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}{postfix}, {rate_fmt}, {remaining} left"


def is_first() -> bool:
    """Whether this process is the first of all that work together, by what torchrun, SLURM or Lightning tells it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def say(line: str) -> None:
    """Tell the user one thing, beside the bars and in the log; once, where several processes work together."""
    if is_first():
        tqdm.write(line, file=sys.stderr)
        LOG.info(line)


class Progress(tqdm):  # type: ignore[type-arg]  # not generic at run time
    """tqdm's bar; where nobody sees one, a line every half minute and one at the end.

    Args:
        desc: the stage.
        total: what there is to do, where that is known.
        unit: of it.
        options: of tqdm.
    """

    def __init__(self, desc: str, total: int | None, unit: str = " images", **options: Any) -> None:
        notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
        self._bar = is_first() and (notebook or sys.stderr.isatty())
        self._last, self._reached = time.monotonic(), False
        where = sys.stderr if self._bar else io.StringIO()
        super().__init__(desc=desc, total=total, unit=unit, dynamic_ncols=self._bar, file=where, **options)

    def reach(self, done: int, told: str = "") -> None:
        """Move on to what is done in all, which other processes may have done; never back."""
        if not self._reached:  # found, not made now: no part of the rate
            self._reached, self.initial, self.n, self.last_print_n = True, done, done, done
        self.set_postfix_str(told, refresh=False)
        self.update(max(0, done - self.n))

    def display(self, *args: Any, **options: Any) -> Any:
        """Draw the bar, or say a line from time to time."""
        if self._bar:
            super().display(*args, **options)
        if time.monotonic() - self._last > EVERY:
            self._tell(LINE)

    def close(self) -> None:
        """Leave the finished bar, or say the last line."""
        if not self.disable and self.n > self.initial and time.time() - self.start_t >= (self.delay or 0):
            self._tell("{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {rate_fmt}", rate=None)  # of the whole time
        super().close()

    @staticmethod
    def format_meter(*args: Any, **options: Any) -> str:
        """As tqdm's, but for slow rates, which it writes as "1.40s/ images"."""
        line: str = tqdm.format_meter(*args, **options)
        return line.replace("s/ ", " s/").replace(",  ", ", ")

    def _tell(self, form: str, **others: Any) -> None:
        self._last = time.monotonic()
        if not is_first():
            return
        line = self.format_meter(**{**self.format_dict, "bar_format": form, "ncols": None, **others})
        if not self._bar:
            tqdm.write(line, file=sys.stderr)
        LOG.info(line)
