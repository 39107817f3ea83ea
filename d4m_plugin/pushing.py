"""Upload a distilled set to the Hugging Face Hub in one commit, and read it back."""

import copy
import hashlib
import logging
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from d4m_plugin.cache import checksum
from d4m_plugin.card import merged_card
from d4m_plugin.distilled import PARQUET, DistilledDataset, columns_of, shards
from d4m_plugin.errors import InputError
from d4m_plugin.hub import fetch_set, persistently
from d4m_plugin.record import Record, encoded, read_record

logger = logging.getLogger(__name__)


def check_write_access(repo_id: str, private: bool = False) -> None:
    """Make the repository where it is not there, and ask the Hub whether this user may write to it.

    Raises:
        InputError: where not.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"`hub_id` is {repo_id!r}, but you are not logged in: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="d4m-plugin")

    def check() -> None:
        # None leaves the choice to the organisation's settings, as false would not.
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        api.auth_check(repo_id, repo_type="dataset", write=True)
        if private and not api.dataset_info(repo_id).private:
            raise InputError(
                f"`private` is true, but {repo_id} is there already, and public; make it private in its settings, or "
                "name another as `hub_id`."
            )

    persistently(check, repo_id)


def push(
    dataset: DistilledDataset,
    repo_id: str,
    private: bool,
    tag: str | None,
    source_license: str | None,
    model_license: str | None,
) -> str:
    """Upload a set as DistilledDataset.push_to_hub says, and return the commit."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="d4m-plugin")
    _check_files(dataset)
    metadata = _with_licenses(dataset.metadata, source_license, model_license)
    check_write_access(repo_id, private)
    if tag is not None:
        refs = persistently(lambda: api.list_repo_refs(repo_id, repo_type="dataset"), repo_id)
        if tag in [ref.name for ref in refs.tags]:
            raise InputError(f"`tag` is {tag!r}, which {repo_id} has already; name another.")
    commit = persistently(lambda: _commit(api, dataset, repo_id, metadata), repo_id, str(dataset.root))
    if tag is not None:
        # It may be there by an earlier try, whose answer was lost.
        tagging = partial(api.create_tag, repo_id, tag=tag, revision=commit, repo_type="dataset", exist_ok=True)
        persistently(tagging, repo_id)
    _compare(dataset, repo_id, commit, metadata)
    return commit


def _check_files(dataset: DistilledDataset) -> None:
    """Refuse a folder that does not hold what its record says: those files are pushed, and no others.

    More files, but hidden ones, are refused too: a stranger's may link to a secret of this user's. Beside a set of the
    Hub, which is fetched whole now, they are other people's.
    """
    folder, recorded = dataset.folder, dataset.metadata["checksums"]
    dataset.fetch_whole()
    found = {path.name: path for path in folder.iterdir() if path.name != "d4m.json"}
    found = {name: path for name, path in found.items() if name in recorded or name[0] != "."}  # Finder leaves some
    if dataset.revision is not None:
        found = {name: path for name, path in found.items() if name in recorded}
    for name, path in sorted(found.items()):
        if name not in recorded or not path.is_file() or checksum(path) != recorded[name]:
            raise InputError(
                f"{str(path)!r} is not as its d4m.json records it, or not recorded at all; remove it, or make or fetch "
                "the set anew."
            )
    if missing := sorted(recorded.keys() - found.keys()):
        raise InputError(f"{str(folder / missing[0])!r} is missing; make or fetch the set anew.")


def _with_licenses(metadata: Record, source: str | None, model: str | None) -> Record:
    metadata = copy.deepcopy(metadata)
    for part, told, given in (("source", metadata["source"], source), ("model", metadata["model"], model)):
        told["license"] = given or told["license"]
        if told["license"] == "unknown":
            logger.warning(
                "The licence of the %s is not known, and the card will say so; name it as `%s_license`.", part, part
            )
    return metadata


def _commit(api: Any, dataset: DistilledDataset, repo_id: str, metadata: Record) -> str:
    """Make one commit of the set over the newest one, and return it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_download

    config = dataset.folder.name
    head = api.dataset_info(repo_id)
    there = [file.rfilename for file in head.siblings]
    of_config = {name for name in there if name.startswith(f"{config}/")}
    if of_config and f"{config}/d4m.json" not in of_config:
        raise InputError(f"`hub_id` is {repo_id!r}, whose {config} was not written by d4m-plugin; name another.")
    if of_config:
        file = hf_hub_download(repo_id, f"{config}/d4m.json", repo_type="dataset", revision=head.sha)
        _check_same_source(Path(file).parent, metadata, repo_id)
    card = None
    if "README.md" in there:
        file = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=head.sha)
        card = Path(file).read_bytes()
    files: dict[str, Any] = {f"{config}/{name}": dataset.folder / name for name in sorted(metadata["checksums"])}
    size = sum(path.stat().st_size for path in shards(dataset.folder))
    files[f"{config}/d4m.json"] = encoded(metadata)
    files["README.md"] = merged_card(card, config, metadata, size, repo_id, there).encode()
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    # What `datasets` would read as rows of this set; other files there are other people's.
    old = [name for name in sorted(of_config - set(files)) if PurePath(name).match(f"{config}/{PARQUET}")]
    operations += map(CommitOperationDelete, old)
    message = f"{config} of {metadata['source']['name']}, distilled"
    # The parent makes the Hub refuse where another commit came between, whose card would be lost.
    made = api.create_commit(
        repo_id, operations, commit_message=message, repo_type="dataset", parent_commit=head.sha or None
    )
    return str(made.oid)


def _check_same_source(there: Path, metadata: Record, repo_id: str) -> None:
    """Refuse to put a set in the place of one of another source."""
    try:
        other = read_record(there)["source"]["name"]
    except InputError:  # damaged, or of another format: replaced
        return
    name = metadata["source"]["name"]
    if name != other:
        raise InputError(
            f"`hub_id` is {repo_id!r}, whose {there.name} is of {other}, where yours is of {name}; name another."
        )


def _compare(dataset: DistilledDataset, repo_id: str, commit: str, metadata: Record) -> None:
    """Read a pushed set back, and compare it with the one here."""
    from datasets import load_dataset_builder

    config = dataset.folder.name
    sent = metadata["checksums"] | {"d4m.json": hashlib.sha256(encoded(metadata)).hexdigest()}
    there = fetch_set(repo_id, commit, config, whole=True)
    found = {name: checksum(there / name) for name in sent if (there / name).is_file()}
    features = persistently(lambda: load_dataset_builder(repo_id, config, revision=commit).info.features, repo_id)
    differs = sorted(name for name in sent if sent[name] != found.get(name))
    if features != columns_of(dataset.classes, dataset.logits is not None):
        differs.append("features")
    if differs:
        raise InputError(
            f"{repo_id} at {commit} differs from {str(dataset.root)!r} in {', '.join(differs)}: push anew."
        )
