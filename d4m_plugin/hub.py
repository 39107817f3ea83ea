"""The Hugging Face Hub: what is read from it, and what is said where it does not answer.

A dataset repository holds several sets, each a folder and a config of `datasets`; its README.md is their card.
"""

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tqdm.auto import tqdm

from d4m_plugin.cache import refusal_of
from d4m_plugin.errors import InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import RepoCard

WAITS = (1, 2, 4, 8)  # seconds before another try, where the Hub says nothing else
LONGEST_WAIT = 300  # seconds that are waited because the Hub says so
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)  # statuses that another try may not meet

TRANSFORMERS = "transformers:"  # before a classifier's Hub id or folder

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit."""

    repo_id: str
    revision: str
    configs: list[str]


def find_repository(repo_id: str, revision: str | None = None) -> Repository:
    """Return a dataset repository of the Hub; without a network, as much as was fetched of it.

    Args:
        repo_id: as user/name.
        revision: branch, tag or commit; by default the newest.

    Raises:
        NotOnTheHub: where there is no such repository.
        InputError: where the Hub does not give it.
    """
    folder = _snapshot(repo_id, revision, ["*/d4m.json", "README.md"], tqdm_class=_Silent)
    return Repository(repo_id, folder.name, sorted(path.parent.name for path in folder.glob("*/d4m.json")))


def fetch_set(repo_id: str, revision: str, config: str, whole: bool = False) -> Path:
    """Return the folder of one of a repository's sets, fetched or found in huggingface_hub's cache.

    Args:
        repo_id: as user/name.
        revision: the commit, on which the folder depends.
        config: the set.
        whole: fetch the prototypes too.

    Raises:
        InputError: where the Hub does not give it.
    """
    patterns = [f"{config}/*"] if whole else [f"{config}/{name}" for name in ("*.parquet", "*.json", "*.png")]
    return _snapshot(repo_id, revision, patterns) / config


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form user/name, as no path of ours begins."""
    return name.count("/") == 1 and name[0] not in "./~"


class NotOnTheHub(InputError):
    """There is no such repository, or none that this user may see."""


class _Silent(tqdm):  # type: ignore[type-arg]  # not generic at run time
    """A bar that is not shown: of files too small to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    options |= {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    return persistently(lambda: Path(snapshot_download(repo_id, **options)), repo_id)


def license_of(name: str, kind: Literal["dataset", "model"], revision: str | None = None) -> str:
    """Return the licence that the card of a folder or of a Hub repository states; "unknown" where there is none.

    Args:
        name: the folder, or the repository.
        kind: of repository.
        revision: of the repository; by default the newest.

    Returns:
        The Hub's name for it; several are in a row: "mit, cc0-1.0".
    """
    import httpx2
    from huggingface_hub import hf_hub_download

    try:
        file = Path(name).expanduser() / "README.md"
        if not file.parent.exists():
            file = Path(hf_hub_download(name, "README.md", repo_type=kind, revision=revision))
        stated = card_of(file.read_bytes(), str(file)).data.get("license")
    except (OSError, ValueError, httpx2.HTTPError):
        return "unknown"
    licenses = stated if isinstance(stated, list) else [stated]
    return ", ".join(dict.fromkeys(str(each) for each in licenses if each)) or "unknown"


def card_of(content: bytes, name: str) -> "RepoCard":
    """Return a README.md as a card: YAML and text.

    Args:
        content: the file's.
        name: what an error calls it.

    Raises:
        InputError: where it is no text, or its YAML is damaged.
    """
    import yaml
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard(content.decode("utf-8-sig").replace("\r\n", "\n"))
        card.content.encode()  # what cannot be written again is told now
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{name} cannot be read ({' '.join(str(error).split())}); mend it first.") from error
    return card


def without_folders(value: Any) -> Any:
    """Return what may be told to others of an option's value: of a path on this machine, the last part alone."""
    if isinstance(value, str) and value.startswith(TRANSFORMERS):
        return TRANSFORMERS + without_folders(value.removeprefix(TRANSFORMERS))
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        lies_here = path.is_absolute() or os.path.exists(path) or str(value)[:1] == "."
        return path.resolve().name if lies_here else str(value)
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    return value


def persistently(attempt: Callable[[], T], repo_id: str, local: str | None = None) -> T:
    """Return what an attempt does, made again where its failure may pass.

    Raises:
        InputError: where it does not pass; it says what to do, and that the set in `local` is whole.
    """
    for wait in (*WAITS, None):
        try:
            with _hub_errors():
                return attempt()
        except _HubError as error:
            if wait is None or not error.may_pass or error.retry_after > LONGEST_WAIT:
                raise _explained(error, repo_id, local) from error
            pause = max(wait, error.retry_after)
            logger.warning("The Hub: %s. Trying again in %d s.", error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


class _HubError(Exception):
    """What went wrong, whichever of the libraries below says so."""

    def __init__(self, cause: BaseException) -> None:
        response = getattr(cause, "response", None)
        self.cause, self.status = cause, None if response is None else int(response.status_code)
        stated = "" if response is None else response.headers.get("Retry-After", "")
        self.retry_after = int(stated) if stated.isdecimal() else 0
        said = (getattr(cause, "server_message", None) or "").rstrip(".") or first_line(cause)
        super().__init__(f"{self.status}, {said}" if self.status else said)

    @property
    def may_pass(self) -> bool:
        import httpx2

        if self.status is not None:
            return self.status in PASSING
        return isinstance(self.cause, httpx2.TransportError)


@contextmanager
def _hub_errors() -> Iterator[None]:
    import httpx2

    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        for cause in _causes(error):  # uploads wrap it, `datasets` too
            if isinstance(cause, httpx2.HTTPError) or refusal_of(cause):
                raise _HubError(cause) from error
        raise _HubError(error) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def why_unread(error: BaseException) -> str:
    """Return, after "which", why diffusers could not read a model: the Hub's own answer, which it hides, if any."""
    from huggingface_hub import errors

    answers = list(_causes(error))
    for kind, reason in (
        (errors.GatedRepoError, "is gated: ask for access on its page, then log in (`hf auth login`)"),
        (errors.RevisionNotFoundError, "has no such `diffusion_revision`; leave it out for the newest"),
        (errors.RepositoryNotFoundError, "the Hub has not, or hides: check the name, and log in where it is private"),
        (errors.OfflineModeIsEnabled, "was not fetched before, and HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError, "was not fetched before, and the Hub cannot be reached"),
    ):
        if any(isinstance(answer, kind) for answer in answers):
            return reason
    if any(getattr(answer, "errno", None) == errno.ENOSPC for answer in answers):
        return "does not fit on the disk"
    reason = first_line(error)
    if "necessary `safetensors` weights" in reason:
        return "has no .safetensors weights; a pickled checkpoint can run code and is not read"
    return f"is no loadable image-to-image model: {reason}"


def _explained(error: _HubError, repo_id: str, local: str | None) -> InputError:
    """Return the sentence that says what to do."""
    from huggingface_hub import errors

    cause, status = error.cause, error.status
    whole = f"; the set in {local!r} is whole: push it later" if local else ""
    what = f"`hub_id` is {repo_id!r}"
    if refusal := refusal_of(cause):  # this machine's disk, not the Hub
        return InputError(f"{what}, but {refusal.rstrip('.')}{whole}.")
    if isinstance(cause, errors.HFValidationError):
        return InputError(f"{what}, which is no name of the Hub's: {error}")
    if isinstance(cause, errors.GatedRepoError):
        return InputError(f"{what}, which is gated: ask for access on its page, then log in (`hf auth login`).")
    if isinstance(cause, errors.RevisionNotFoundError):
        return InputError(f"{what}, which has no such `revision`; leave it out for the newest.")
    if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return InputError(f"{what}, which was not fetched before, and the Hub cannot be reached ({error}){whole}.")
    if status == 401 and not isinstance(cause, errors.RepositoryNotFoundError):
        return InputError(f"{what}, but the Hub does not accept your token: log in anew (`hf auth login`){whole}.")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return NotOnTheHub(
            f"{what}, but the Hub has no such dataset{_or_a_model(repo_id)}, or hides it from you: check the name, and "
            f"log in (`hf auth login`) where it is private{whole}."
        )
    if status == 403:
        return InputError(
            f"{what}, to which your token may not write: use one with write access to it (`hf auth login`), or another "
            f"name{whole}."
        )
    if status == 429:
        after = f" in {error.retry_after} s" if error.retry_after else ""
        return InputError(f"{what}, but the Hub takes no more requests from you for now: try again{after}{whole}.")
    if error.may_pass:
        return InputError(f"{what}, but the Hub did not do its part ({error}): try again later{whole}.")
    return InputError(f"{what}, and the Hub refuses: {error}{whole}.")


def _or_a_model(repo_id: str) -> str:
    """Return a hint where a repository is there but is no dataset."""
    import httpx2
    from huggingface_hub import HfApi

    try:
        return " (it is a model)" if HfApi().repo_exists(repo_id, repo_type="model") else ""
    except (OSError, httpx2.HTTPError):
        return ""
