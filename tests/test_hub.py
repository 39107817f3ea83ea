"""Sharing by the Hub: real huggingface_hub and datasets in processes of their own, against a small Hub in memory."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from d4m_plugin import D4MDataModule, DistilledDataset, HuggingFace, InputError, Recipe, distill
from d4m_plugin.card import merged_card
from d4m_plugin.datamodules import d4m
from d4m_plugin.distilled import checksums, with_png, write_parquet
from d4m_plugin.errors import InputWarning
from d4m_plugin.hub import NotOnTheHub, persistently, without_folders
from tests import families, hub_server
from tests.toys import Squares

REPO = "me/squares-d4m"
RECIPE = Recipe(ipc=2, num_inference_steps=2)
TOKENS = (hub_server.WRITER, hub_server.READER, "hf_old")  # what no client may print


@pytest.fixture
def hub(the_hub):
    the_hub.forget()
    yield the_hub
    assert not [line for line in the_hub.log if "no route" in line]


@pytest.fixture
def made(distilled_once, squares, tmp_path):
    return distilled_once(RECIPE, tmp_path / "a-secret-place" / "set")


# Neither we nor huggingface_hub wait between two tries.
WITHOUT_WAITS = """
import json
import d4m_plugin.hub
from huggingface_hub.utils import _http
d4m_plugin.hub.WAITS = (0, 0)
for each in (_http.http_backoff, _http.http_stream_backoff.__wrapped__):
    each.__kwdefaults__["base_wait_time"] = 0
"""


@pytest.fixture
def client(hub, forks, tmp_path):
    """Runs code in a process of its own, whose Hub is the server, and returns the JSON that it prints last."""
    shutil.rmtree(forks.environment["HF_HOME"], ignore_errors=True)

    def run(code, token=hub_server.WRITER, **environment):
        own = {"HF_TOKEN": token, "D4M_CACHE": str(tmp_path / "d4m")}
        before = f"{WITHOUT_WAITS}SQUARES = {Squares.diffusion!r}\n"
        script = tmp_path / "client.py"  # a file, which Lightning runs again for a second process
        script.write_text(before + code)
        if environment:  # of which a fork would have read another at import
            env = forks.with_others(own | environment)
            result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
        else:
            result = forks.run(script, folder=tmp_path, **own)
        assert not [each for each in TOKENS if each in result.stdout + result.stderr]
        print(result.stderr, file=sys.stderr)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else None

    return run


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """Lets this process see the server as the Hub, logged in and with nothing fetched: no client takes seconds."""
    from huggingface_hub import constants

    address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    own = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": address, "HF_HUB_CACHE": str(tmp_path / "hf")}
    for name, value in (own | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(constants, name, value)
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_DATASETS_CACHE", tmp_path / "rows")):
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr("d4m_plugin.hub.WAITS", (0, 0))
    monkeypatch.setenv("HF_TOKEN", hub_server.WRITER)
    return hub


def pushing(folder, repo=REPO, **options):
    return f"""
from d4m_plugin import DistilledDataset
print(json.dumps(DistilledDataset({str(folder)!r}).push_to_hub({repo!r}, **{options!r})))
"""


READING = """
from d4m_plugin import DistilledDataset, InputError
def read(root, revision=None):
    try:
        DistilledDataset(root, revision=revision)
    except InputError as error:
        return str(error)
"""


def files_of(hub, repo=REPO):
    return hub.repos["dataset", repo].commits[-1][1]


def card_of(hub, repo=REPO):
    return DatasetCard(files_of(hub, repo)["README.md"].decode())


def test_a_pushed_set_is_read_by_anyone_and_tells_nothing_of_this_machine(hub, client, made, tmp_path_factory):
    commit = client(pushing(made.root, tag="v1", private=True))
    repo = hub.repos["dataset", REPO]
    assert repo.tags == {"v1": commit}
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own, and one
    secrets = (str(tmp_path_factory.getbasetemp()), "a-secret-place", f"{os.environ.get('USER', 'root')}/")
    for name, content in files_of(hub).items():
        assert not [secret for secret in secrets if secret.encode() in content], name
    found = client(f"""
from datasets import load_dataset
from d4m_plugin import DistilledDataset
rows = load_dataset({REPO!r}, "ipc-2", revision={commit!r}, split="train")
streamed = list(load_dataset({REPO!r}, split="train", streaming=True))
ours = DistilledDataset({REPO!r}, config_name="ipc-2", revision="v1")
print(json.dumps([rows["label"][:], rows.features["label"].names, [row["label"] for row in streamed],
                  ours.targets, ours.classes, ours.revision, ours.images.sum().item()]))
""")
    sums = [commit, made.images.sum().item()]
    assert found == [made.targets, made.classes, made.targets, made.targets, made.classes, *sums]
    offline = f"""
from datasets import load_dataset
from d4m_plugin import DistilledDataset
print(json.dumps([len(load_dataset({REPO!r}, "ipc-2", split="train")), len(DistilledDataset({REPO!r}))]))
"""
    client(offline)
    hub.log.clear()
    assert client(offline, HF_HUB_OFFLINE="1") == [6, 6]
    assert not hub.log


def test_of_a_path_the_last_part_alone_is_told():
    assert without_folders("transformers:/home/me/vit") == "transformers:vit"
    assert without_folders("transformers:google/vit") == "transformers:google/vit"
    assert without_folders({"roots": [Path("/home/me/a"), "/home/me/b", 1]}) == {"roots": ["a", "b", 1]}


def test_several_sets_share_a_card_with_other_people(hub, client, made, squares, tmp_path):
    theirs = """---
license: mit
tags: [fun]
configs:
- config_name: real
  data_files: real.parquet
---
# My squares

Mine.
"""
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "real.parquet")
    hub.dataset(REPO, {"README.md": theirs.encode(), "real.parquet": (tmp_path / "real.parquet").read_bytes()})
    client(pushing(made.root))
    more = distill(squares, Recipe(ipc=4, num_inference_steps=2), output=tmp_path / "more")
    client(pushing(more.root))
    hub_server_card = files_of(hub)["README.md"].decode()
    mine = hub_server_card.replace("Mine.", "Mine, still.")
    hub.dataset(REPO, files_of(hub) | {"README.md": mine.encode()})
    client(pushing(more.root, source_license="cc0-1.0", model_license="apache-2.0"))

    card = card_of(hub)
    assert [config["config_name"] for config in card.data.configs] == ["real", "ipc-2", "ipc-4"]
    assert [config.get("default") for config in card.data.configs] == [True, None, None]
    assert {info["config_name"] for info in card.data.dataset_info} == {"ipc-2", "ipc-4"}
    assert set(card.data.license) == {"mit", "unknown", "cc0-1.0", "apache-2.0"}
    assert {"fun", "d4m", "dataset-distillation"} <= set(card.data.tags)
    assert card.text.strip().startswith("# My squares\n\nMine, still.\n")
    assert [card.text.count(f"## ipc-{ipc}: ") for ipc in (2, 4)] == [1, 1]
    assert "real.parquet" in files_of(hub)
    assert f"--data.hub_id {REPO} --data.config_name ipc-4" in card.text  # else there are two to choose from
    read = client(f"""
import datasets
print(json.dumps([len(datasets.load_dataset({REPO!r}, name, split="train")) for name in ("ipc-2", "ipc-4", "real")]))
""")
    assert read == [6, 12, 1]


def test_data_that_no_config_names_is_not_hidden(hub, client, made):
    hub.dataset(REPO, {"train.csv": b"label\n0\n"})
    said = client(f"""
from d4m_plugin import DistilledDataset, InputError
try:
    DistilledDataset({str(made.root)!r}).push_to_hub({REPO!r})
except InputError as error:
    print(json.dumps(str(error)))
""")
    assert "whose data (train.csv) has no config that names it" in said
    assert len(hub.repos["dataset", REPO].commits) == 1


@pytest.mark.parametrize("name", ["0.jpeg", "a/IMG_1.JPG", "b.webp", "c.csv.gz", "d.tar", "e.zip", "f.txt"])
def test_data_of_any_kind_is_not_hidden(made, name):
    others = [".gitattributes", ".github/logo.png", "README.md", "LICENSE", "LICENSE.txt", "NOTES.md", "pyproject.toml"]
    others.append(name)
    with pytest.raises(InputError, match=rf"whose data \({name}\) has no config that names it; name another"):
        merged_card(None, "ipc-2", made.metadata, 1, REPO, others)
    assert merged_card(None, "ipc-2", made.metadata, 1, REPO, others[:-1])


def test_a_set_is_replaced_whole_and_pushed_once(hub, client, made, squares, tmp_path):
    first = client(pushing(made.root))
    assert client(pushing(made.root)) == first
    old = files_of(hub) | {"ipc-2/train-00001-of-00002.parquet": b"of a larger one"}
    hub.dataset(REPO, old)
    other = distill(squares, Recipe(ipc=2, num_inference_steps=2, seed=1), output=tmp_path / "other")
    client(pushing(other.root))
    assert {name for name in files_of(hub) if name.startswith("ipc-2/")} == {
        f"ipc-2/{path.name}" for path in other.folder.iterdir()
    }
    assert hub.repos["dataset", REPO].commits[-1][1]["ipc-2/preview.png"] == other.preview.read_bytes()


def test_a_class_name_that_yaml_would_fold_is_pushed(here, squares, tmp_path):
    squares.classes = ("a\x85b", "a b", "\u2028 \x0b c")
    made = distill(squares, RECIPE, output=tmp_path / "set")
    commit = made.push_to_hub(REPO)
    assert DistilledDataset(REPO).classes == list(squares.classes)
    read = datasets.load_dataset_builder(REPO, "ipc-2", revision=commit).info.features["label"].names
    assert read == ["a b", "a b (2)", "\u2028 \x0b c"]


def test_a_set_of_the_hub_is_pushed_again_whole_and_other_peoples_files_stay(here, made):
    made.push_to_hub(REPO)
    pushed = files_of(here)
    of_others = {"ipc-2/NOTES.md": b"mine", "ipc-2/notes.png": b"mine", "ipc-2/notes/a.txt": b"mine"}
    here.dataset(REPO, pushed | of_others)
    commit = DistilledDataset(REPO).push_to_hub(REPO, tag="v2")
    assert here.repos["dataset", REPO].tags == {"v2": commit}
    assert files_of(here) == pushed | of_others


def test_an_answer_that_is_lost_is_not_a_second_commit(hub, client, made):
    hub.faults = [hub_server.Fault("POST", "/commit/", after=True)]
    commit = client(pushing(made.root))
    assert [oid for oid, _ in hub.repos["dataset", REPO].commits][1:] == [commit]


def test_an_answer_about_a_tag_that_is_lost_is_no_failure(here, made):
    here.faults = [hub_server.Fault("POST", "/tag/", after=True)]
    commit = made.push_to_hub(REPO, tag="v1")
    assert here.repos["dataset", REPO].tags == {"v1": commit}
    with pytest.raises(InputError, match="`tag` is 'v1', which me/squares-d4m has already; name another"):
        made.push_to_hub(REPO, tag="v1")


def test_what_arrives_changed_is_noticed(hub, client, made):
    """A Hub that gives back other bytes than it got."""
    made_commit = hub_server.Handler.make_commit

    def damages(self, name, revision):
        self.server.blobs = {oid: blob[::-1] for oid, blob in self.server.blobs.items()}
        made_commit(self, name, revision)

    routes = [(route, damages if handle is made_commit else handle) for route, handle in hub_server.ROUTES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server, "ROUTES", routes)
        said = client(f"""
from d4m_plugin import DistilledDataset, InputError
try:
    DistilledDataset({str(made.root)!r}).push_to_hub({REPO!r})
except InputError as error:
    print(json.dumps(str(error)))
""")
    assert re.search("differs from .* in .*preview.png.*: push anew", said)


WHOLE = "the set in '.*set' is whole: push it later"
# What the Hub does, how often, and what the user is told; nothing where another try helps.
FAULTS = {
    "token gone stale": ("GET", "/auth-check", 401, 9, "does not accept your token: log in anew"),
    "forbidden": ("GET", "/auth-check", 403, 9, "your token may not write"),
    "gone": ("GET", "/auth-check", 404, 9, "Hub refuses: 404"),
    "commit conflict": ("POST", "/commit/", 409, 1, None),
    "commit came between": ("POST", "/commit/", 412, 2, None),  # someone else's, after ours has read the card
    "too many requests": ("POST", "/commit/", 429, 1, None),
    "too many requests, for long": ("POST", "/commit/", 429, 9, f"takes no more requests .* in 600 s; {WHOLE}"),
    "server error": ("POST", "/commit/", 500, 2, None),
    "server error for ever": ("POST", "/commit/", 503, 9, f"did not do its part .503, .*: try again later; {WHOLE}"),
    "server error of an upload": ("PUT", "/lfs/", 500, 1, None),
    "cut off": ("POST", "/commit/", None, 1, None),
    "cut off in an upload": ("PUT", "/lfs/", None, 1, None),
    "cut off for ever": ("POST", "/commit/", None, 9, f"did not do its part .*: try again later; {WHOLE}"),
    "bad card": ("POST", "/validate-yaml", 400, 9, f"refuses: .*; {WHOLE}"),
    "read back after an error": ("GET", "/resolve/", 500, 1, None),
    "too slow": ("GET", "/resolve/", "slow", 2, None),
}


def test_every_fault_is_got_over_or_told_in_a_sentence(hub, client, made):
    before = checksums(made.folder)
    cases = {
        name: (
            f"me/case-{number}",
            {
                "method": method,
                "path": path,
                "status": None if status == "slow" else status,
                "delay": 2 if status == "slow" else 0,
                "times": times,
                "headers": {"Retry-After": "600" if times > 1 else "1"} if status == 429 else {},
            },
        )
        for number, (name, (method, path, status, times, _)) in enumerate(FAULTS.items())
    }
    said = client(
        f"""
import httpx2
from d4m_plugin import DistilledDataset, InputError
made, said = DistilledDataset({str(made.root)!r}), {{}}
for name, (repo, fault) in json.loads({json.dumps(cases)!r}).items():
    httpx2.post({hub.url!r} + "/faults", json=[fault])
    try:
        made.push_to_hub(repo)
        said[name] = None
    except InputError as error:
        said[name] = str(error)
print(json.dumps(said))
""",
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )
    for name, (*_, expected) in FAULTS.items():
        if expected is None:
            assert said[name] is None, name
            assert "ipc-2/d4m.json" in files_of(hub, cases[name][0])
        else:
            assert re.search(expected, said[name] or ""), (name, said[name])
            assert "\n" not in said[name]
    assert hub.log.count(f"POST /api/datasets/{cases['commit came between'][0]}/commit/main") == 2 + 1
    assert checksums(made.folder) == before


# Where to, with which token, and what the user is told; nothing where it may.
PUSHES = [
    ("me/squares d4m", hub_server.WRITER, "is no name of the Hub's"),
    ("you/squares", hub_server.WRITER, "to which your token may not write"),
    ("me/squares", hub_server.READER, "to which your token may not write"),
    ("me/squares", "", "you are not logged in: run `hf auth login`, or set HF_TOKEN"),
    ("me/squares", "hf_old", "the Hub does not accept your token: log in anew"),
    ("me/a-model", hub_server.WRITER, None),  # a model of that name is no hindrance
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_closed_disk_is_not_the_hubs_refusal(number):
    def fetch():
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("the download failed") from error  # as some libraries wrap it

    with pytest.raises(InputError, match=f"the disk could not be used .{os.strerror(number)}"):
        persistently(fetch, REPO)


def test_who_may_push_where(hub, client, made):
    hub.repository("model", "me/a-model")
    said = client(f"""
import os
from d4m_plugin import DistilledDataset, InputError
said = []
for repo, token, _ in {PUSHES!r}:
    os.environ["HF_TOKEN"] = token
    try:
        said.append([DistilledDataset({str(made.root)!r}).push_to_hub(repo)])
    except InputError as error:
        said.append(str(error))
print(json.dumps(said))
""")
    for sentence, (repo, token, says) in zip(said, PUSHES, strict=True):
        assert (says in sentence) if says else re.fullmatch("[0-9a-f]{40}", sentence[0]), (repo, token)


def test_a_private_set_is_not_pushed_where_all_can_read_it(here, made):
    here.dataset(REPO)
    with pytest.raises(InputError, match=f"`private` is true, but {REPO} is there already, and public"):
        made.push_to_hub(REPO, private=True)
    assert set(files_of(here)) == {".gitattributes"}
    assert made.push_to_hub("me/secret", private=True)
    assert made.push_to_hub("me/secret", private=True, tag="again")


def test_a_set_does_not_take_the_place_of_another_sources(here, made):
    made.push_to_hub(REPO)
    record = json.loads((made.folder / "d4m.json").read_text())
    record["source"]["name"] = "photos"
    here.dataset(REPO, files_of(here) | {"ipc-2/d4m.json": json.dumps(record).encode()})
    with pytest.raises(InputError, match=f"{REPO}', whose ipc-2 is of photos, where yours is of squares; name another"):
        made.push_to_hub(REPO)
    here.dataset(REPO, files_of(here) | {"ipc-2/d4m.json": b"{"})
    assert made.push_to_hub(REPO)


def rows_of(labels):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=labels))
    pictures = [Image.new("L", (8, 8), level) for level in range(4)]
    file = io.BytesIO()
    datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}, features).to_parquet(file)
    return {f"{split}.parquet": file.getvalue() for split in ("train", "test")}


def test_a_revision_of_a_source_is_that_one_or_none(here):
    repo = here.dataset("you/photos", rows_of(["a", "b"]) | {"README.md": b"---\nlicense: mit\n---\n"})
    repo.tags["v1"] = repo.commits[-1][0]
    here.dataset("you/photos", rows_of(["c", "d"]) | {"README.md": b"---\nlicense: cc0-1.0\n---\n"})
    first = HuggingFace("you/photos", revision="v1")
    assert (first.classes, first.license) == (["a", "b"], "mit")
    cut_off = [hub_server.Fault(method, ".", times=1000) for method in ("GET", "HEAD", "POST")]
    here.faults = cut_off
    assert HuggingFace("you/photos", revision="v1").classes == ["a", "b"]
    here.faults = []
    newest = HuggingFace("you/photos")
    assert (newest.classes, newest.license) == (["c", "d"], "cc0-1.0")
    with pytest.raises(InputError, match="Revision 'v7' doesn't exist for dataset 'you/photos' on the Hub"):
        HuggingFace("you/photos", revision="v7")
    here.faults = cut_off
    assert HuggingFace("you/photos").classes == ["c", "d"]
    with pytest.raises(InputError, match=f"`revision` is 'v1', but .* is of commit {repo.commits[-1][0]}; name that"):
        HuggingFace("you/photos", revision="v1")
    assert HuggingFace("you/photos", revision=repo.commits[-1][0]).classes == ["c", "d"]


def test_configurations_that_can_be_named_are_told(here):
    configs = "".join(f"- {{config_name: {name}, data_files: train.parquet}}\n" for name in "xy")
    card = f"---\nconfigs:\n{configs}---\n".encode()
    here.dataset("you/several", rows_of(["a", "b"]) | {"README.md": card})
    with pytest.raises(InputError, match=r"available configs: \['x', 'y'\]; name one as `config`"):
        HuggingFace("you/several")


def test_what_cannot_be_read_is_told(hub, client):
    hub.repository("model", "me/a-model")
    hub.dataset("me/gated", gated=True)
    hub.dataset(REPO)
    cases = {
        ("me/missing", None): "Hub has no such dataset, or hides it",
        ("me/a-model", None): "Hub has no such dataset (it is a model)",
        ("me/gated", None): "which is gated: ask for access on its page",
        (REPO, "v9"): "has no such `revision`",
        (REPO, None): "is not a distilled set",
    }
    said = client(READING + f"print(json.dumps([read(*case) for case in {list(cases)}]))", hub_server.READER)
    for sentence, (case, says) in zip(said, cases.items(), strict=True):
        assert says in sentence, case


OPENING = """
from d4m_plugin import InputError, LatentDiffusion
def opened(model, revision):
    try:
        return type(LatentDiffusion(model, revision).pipeline).__name__
    except InputError as error:
        return str(error)
"""


def test_a_models_repository_is_opened_or_one_sentence_says_why_not(hub, client, tmp_path):
    folder = families.save("sd", tmp_path / "sd")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo = hub.repository("model", "me/model", files)
    repo.tags["v1"] = repo.commits[-1][0]
    hub.repository("model", "me/gated", files, gated=True)
    hub.repository("model", "me/private", files, private=True)
    hub.repository("model", "me/text", {"config.json": b"{}"})
    pickled = {name.replace(".safetensors", ".bin"): content for name, content in files.items()}
    hub.repository("model", "me/pickled", pickled)
    cases = {
        ("me/model", "v1"): "StableDiffusionImg2ImgPipeline",
        ("me/model", "v9"): "which has no such `diffusion_revision`; leave it out for the newest.",
        ("me/gated", None): "which is gated: ask for access on its page, then log in (`hf auth login`).",
        ("me/private", None): "which the Hub has not, or hides: check the name, and log in where it is private.",
        ("me/missing", None): "which the Hub has not, or hides: check the name, and log in where it is private.",
        ("me/text", None): "which is no loadable image-to-image model: me/text does not appear to have a file named "
        "model_index.json.",
        ("me/pickled", None): "which has no .safetensors weights; a pickled checkpoint can run code and is not read.",
    }
    said = client(f"{OPENING}\nprint(json.dumps([opened(*case) for case in {list(cases)}]))", hub_server.READER)
    for sentence, (case, end) in zip(said, cases.items(), strict=True):
        assert sentence.endswith(end), case
        assert sentence == end or sentence.startswith(f"`diffusion` is {case[0]!r}, which ")
    again = f"{OPENING}\nprint(json.dumps([opened('me/model', 'v1'), opened('me/other', None)]))"
    assert client(again, HF_HUB_OFFLINE="1") == [
        "StableDiffusionImg2ImgPipeline",
        "`diffusion` is 'me/other', which was not fetched before, and HF_HUB_OFFLINE is set.",
    ]
    assert client(again, HF_ENDPOINT="http://127.0.0.1:9") == [
        "StableDiffusionImg2ImgPipeline",
        "`diffusion` is 'me/other', which was not fetched before, and the Hub cannot be reached.",
    ]


FITTING = """
import sys
from tests.toys import Squares
Squares.diffusion = SQUARES
from d4m_plugin.cli import d4m
WORDS = (
    "fit --data D4MDataModule --data.source tests.toys.Squares --data.num_inference_steps 2 --matching.teacher null"
    " --trainer.max_steps 1 --trainer.logger false --trainer.enable_checkpointing false"
    " --trainer.enable_progress_bar false"
)
def fit(*options):
    sys.argv = [sys.argv[0], *WORDS.split(), *options]
    try:
        d4m()
        return 0
    except SystemExit as end:
        return end.code
"""


def test_fit_pushes_what_it_distils_and_finds_it_again(hub, client, squares):
    status = client(
        FITTING
        + f"""
pushed = fit("--data.hub_id", {REPO!r}, "--data.push", "true", "--data.ipc", "2")
again = fit("--data.hub_id", {REPO!r}, "--data.push", "true", "--data.ipc", "2")
second = fit("--data.hub_id", {REPO!r}, "--data.push", "true", "--data.ipc", "4")
elsewhere = fit("--data.hub_id", {REPO!r}, "--data.ipc", "4", "--data.cache_dir", "empty")
differs = fit("--data.hub_id", {REPO!r}, "--data.ipc", "4", "--data.strength", "0.5")
unpushed = fit("--data.hub_id", {REPO!r}, "--data.push", "true", "--data.ipc", "4", "--data.seed", "1")
print(json.dumps([pushed, again, second, elsewhere, differs, unpushed]))
"""
    )
    assert status == [0, 0, 0, 0, 2, 2]
    assert len(hub.repos["dataset", REPO].commits) == 3
    assert {"ipc-2/d4m.json", "ipc-4/d4m.json"} <= set(files_of(hub))


def test_of_two_processes_one_asks_and_pushes(hub, client, squares):
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words = ["--data.hub_id", REPO, "--data.push", "true", "--data.ipc", "2", *devices]
    code = (
        FITTING
        + f"""
if __name__ == "__main__":
    from d4m_plugin.progress import is_first
    status = fit(*{words!r})
    if is_first():
        print(status)
"""
    )
    assert client(code) == 0
    assert len([line for line in hub.log if line.endswith(("/repos/create", "/commit/main"))]) == 3  # twice, and once
    assert "ipc-2/d4m.json" in files_of(hub)


def test_without_leave_to_push_nothing_is_distilled(hub, client, squares, tmp_path):
    hub.dataset(REPO)
    code = FITTING + f"""print(json.dumps(fit("--data.hub_id", {REPO!r}, "--data.push", "true", "--data.ipc", "2")))"""
    assert client(code, hub_server.READER) == 2
    assert not list((tmp_path / "d4m").glob("sets/*"))


def test_the_hubs_set_brings_its_own_recipe_unless_asked_otherwise(hub, client, squares, tmp_path):
    made = distill(squares, Recipe(ipc=2, num_inference_steps=2, strength=0.5, image_size=8), output=tmp_path / "own")
    client(pushing(made.root))
    found = client(f"""
from d4m_plugin import D4MDataModule, InputError
from tests.toys import Squares
Squares.diffusion = SQUARES
data = D4MDataModule(Squares(), hub_id={REPO!r})
says = []
for source, options in ((Squares(), dict(strength=0.6, ipc=2)), (Squares(classes=("red", "green", "blue")), {{}})):
    try:
        D4MDataModule(source, hub_id={REPO!r}, **options)
    except InputError as error:
        says.append(str(error))
print(json.dumps([data.image_size, len(data.training_set), data.distilled.recipe["strength"], *says]))
""")
    assert found[:3] == [8, 6, 0.5]
    assert "has strength 0.5 (asked for: 0.6)" in found[3]
    assert "has the classes red, green / blue, ünï 🦆 (asked for: red, green, blue)" in found[4]


def test_that_the_hub_hides_a_repository_is_told_before_its_set_is_made_here(here, squares, monkeypatch, capsys):
    here.dataset("me/private", private=True)
    monkeypatch.setenv("HF_TOKEN", hub_server.READER)
    data = D4MDataModule(squares, hub_id="me/private", ipc=2, num_inference_steps=2)
    monkeypatch.setattr(d4m, "distill", lambda *_, **__: 1 / 0)
    says = "`hub_id` is 'me/private', .* check the name, and log in .* where it is private. The set is made here"
    with pytest.warns(InputWarning, match=says), pytest.raises(ZeroDivisionError):
        _ = data.distilled
    assert "has no ipc-2" not in capsys.readouterr().err
    for options in ({"revision": "v1"}, {"config_name": "ipc-2"}):
        with pytest.raises(NotOnTheHub, match="or hides it from you"):
            D4MDataModule(squares, hub_id="me/private", **options)


@pytest.mark.parametrize(
    ("names", "labels"), [(["Green / Blue", "ünï_🦆", "red"], [2, 0, 1]), (["0", "1", "2"], [0, 1, 2])]
)
def test_a_set_by_others_trains(hub, client, squares, tmp_path, names, labels):
    """Image and label columns of any names, the classes in an order of their own, or numbers."""
    images = Squares(per_class=1).train()
    columns = {
        "picture": [images[index][0] for index in (0, 1, 2)],
        "kind": labels,
    }
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    theirs = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    theirs.to_parquet(tmp_path / "theirs.parquet")
    hub.dataset("you/theirs", {"data/train.parquet": (tmp_path / "theirs.parquet").read_bytes()})
    status, targets = client(
        FITTING
        + """
from d4m_plugin import D4MDataModule
data = D4MDataModule(Squares(), hub_id="you/theirs")
print(json.dumps([fit("--data.hub_id", "you/theirs"), data.training_set.targets]))
"""
    )
    assert (status, targets) == (0, [0, 1, 2])


def test_a_large_set_is_written_in_shards(tmp_path, squares, monkeypatch):
    made = distill(squares, Recipe(ipc=4, num_inference_steps=2), output=tmp_path / "set")
    (whole,) = made.folder.glob("*.parquet")
    import torch

    blocks = [
        {
            "image": made.images[rows],
            "label": torch.tensor(made.targets[rows]),
            "prototype": torch.arange(12)[rows] % 4,
            "weight": made.weights[rows],
            "seed": torch.arange(12)[rows],
        }
        for rows in (slice(0, 5), slice(5, 10), slice(10, 12))
    ]
    whole.unlink()
    monkeypatch.setattr("d4m_plugin.distilled.SHARD", 1)
    write_parquet(made.folder, made.classes, map(with_png, blocks))
    assert [path.name for path in sorted(made.folder.glob("*.parquet"))] == [
        f"train-0000{number}-of-00003.parquet" for number in (0, 1, 2)
    ]
    again = DistilledDataset(made.root)
    assert torch.equal(again.images, made.images)
    assert again.targets == made.targets
    read = datasets.load_dataset(str(made.root), split="train")
    assert read["label"][:] == made.targets
    assert all(isinstance(image, Image.Image) for image in read["image"])


def test_the_names_of_files_on_the_hub_do_not_leave_the_cache(hub, client, forks, made, tmp_path):
    record = (made.folder / "d4m.json").read_bytes()
    names = ["../../x/d4m.json", "a; rm -rf x/d4m.json", "*/d4m.json", "x/../../d4m.json"]
    for number, name in enumerate(names):
        hub.dataset(f"you/theirs-{number}", {name: record, "README.md": b"---\n- no card\n---\n"})
    places = (tmp_path, Path(forks.environment["HF_HOME"]).parent)

    def files():
        return {path for place in places for path in place.rglob("*") if "hf" not in path.parts}

    before = files()
    said = client(READING + f"print(json.dumps([read(f'you/theirs-{{number}}') for number in range({len(names)})]))")
    for name, sentence in zip(names, said, strict=True):
        assert "\n" not in sentence, name
        assert re.search("the Hub refuses|rename it by|is not a distilled set|no such", sentence), (name, sentence)
    assert files() <= before | {tmp_path / name for name in ("client.py", "stdout.txt", "stderr.txt")}
