import csv
import hashlib
import io
import json
import logging
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from PIL import Image

from d4m_plugin import D4MDataModule, Digits, DistilledDataset, ImageClassifier, cli, console
from d4m_plugin.errors import InputWarning
from tests.toys import Squares

SHORT = ["--data.num_inference_steps", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
UNMEASURED = [*SHORT[2:], "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]


def table_of(out):
    """The rows of the table that a command ends with."""
    rows = [line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  ") and "  " in line.strip()]
    return {name: value.strip() for name, value in rows}


def test_fit_alone_runs_whole_and_finds_its_set_again(run):
    status, out, err = run("fit", "--data", "D4MDataModule", *SHORT)
    assert status == 0
    rows = table_of(out)
    assert rows["accuracy on real test images"].endswith("%")
    assert "ipc-10" in rows["distilled set"]
    assert rows["preview"].endswith("preview.png")
    assert rows["next"].startswith("lightning fit --config")
    for stage in ("Encoding", "Synthesising", "Training"):
        assert stage in err

    status, again, err = run("fit", "--data", "D4MDataModule", *SHORT)
    assert status == 0
    assert rows["distilled set"] in again
    assert table_of(again)["accuracy on real test images"] == rows["accuracy on real test images"]  # the same training
    assert "Training" in err
    assert "Synthesising" not in err

    status, out, err = run(*rows["next"].split()[1:], *SHORT[2:])
    assert status == 0, err
    assert "accuracy on real test images" in out
    assert "Synthesising" not in err

    status, out, err = run("fit", "--data", "D4MDataModule", *SHORT, "--trainer.limit_test_batches", "0")
    assert status == 0, err
    assert "accuracy on real test images" not in table_of(out)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_measured(run, command):
    status, _, err = run(command, "--data", "D4MDataModule")
    assert status == 2
    assert err == (
        "error: `ckpt_path` is missing: an ImageClassifier has random weights without one; name the last.ckpt of a run "
        "of `lightning fit`.\n"
    )


def test_batches_that_our_own_module_does_not_take_are_told(run):
    status, _, err = run("fit", "--data.batch_keys", "[image, label]", *SHORT)
    assert status == 2
    assert err.endswith("but an ImageClassifier takes batches as tuples; leave it out.\n")


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", ["no/last.ckpt", "nothing", "best"])
def test_a_checkpoint_that_is_not_there_is_named(run, command, path):
    status, _, err = run(command, "--ckpt_path", path)
    assert (status, err) == (2, f"error: `ckpt_path` is {path!r}, and there is no such file.\n")


def test_weights_of_a_modules_own_are_not_taken_for_a_checkpoint(run, monkeypatch):
    def setup(self, stage):
        torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(3, 2).state_dict())

    monkeypatch.setattr(ImageClassifier, "setup", setup)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        run("fit", "--data.train_on", "random", *SHORT[2:])


def test_what_a_module_makes_of_a_checkpoint_is_its_own(run, monkeypatch):
    words = ["--data.train_on", "random", "--trainer.max_steps", "1", "--data.batch_size", "20"]
    checkpoint = table_of(run("fit", *words)[1])["checkpoint"]
    monkeypatch.setattr(ImageClassifier, "on_load_checkpoint", lambda self, checkpoint: checkpoint["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        run("test", "--ckpt_path", checkpoint)


@pytest.mark.parametrize(("option", "value"), [("strategy", "ddp_foo"), ("accelerator", "foo")])
def test_what_a_trainer_cannot_be_is_told_in_a_sentence(run, option, value):
    status, _, err = run("fit", *SHORT, f"--trainer.{option}", value)
    assert status == 2
    assert err.startswith("error: ")
    assert value in err
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_barebones_trainer_trains(run):
    words = ["--data.train_on", "random", "--trainer.max_steps", "1", "--trainer.barebones", "true"]
    status, _, err = run("fit", *words, "--data.batch_size", "4")
    assert status == 0, err


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_of_the_last_step_can_be_validated_tested_and_asked(run, monkeypatch):
    status, out, _ = run("fit", "--data.train_on", "random", "--trainer.max_steps", "3", "--data.batch_size", "20")
    assert status == 0
    rows = table_of(out)
    assert torch.load(rows["checkpoint"], weights_only=True)["global_step"] == 3
    accuracy = float(rows["accuracy on real test images"].rstrip("%")) / 100
    for command in ("validate", "test"):
        status, out, err = run(command, "--data", "D4MDataModule", "--ckpt_path", rows["checkpoint"])
        assert status == 0, err
        measured = float(re.search(r"_accuracy\W+([0-9.]+)", out)[1])
        assert measured == pytest.approx(accuracy, abs=1e-4)

    words = ["--data.train_on", "real", "--matching.teacher", "null", "--data.batch_size", "20"]
    status, out, err = run("fit", *words, "--trainer.max_steps", "4", "--ckpt_path", rows["checkpoint"])  # goes on
    assert status == 0, err
    assert "--ckpt_path null" in table_of(out)["as a teacher"]  # a student of its own

    status, out, err = run("predict", "--ckpt_path", rows["checkpoint"])
    assert status == 0, err
    on_two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--ckpt_path", rows["checkpoint"]]
    assert "predict writes one file: use 1" in run("predict", *on_two)[2]  # half the labels would lack
    with open(table_of(out)["predictions"]) as file:
        of_images = list(csv.DictReader(file))
    predicted = [int(row["label"]) for row in of_images]
    right = [row["label"] == row["true label"] for row in of_images]
    assert [int(row["true label"]) for row in of_images] == list(Digits().test().targets)
    assert sum(right) / 500 == pytest.approx(accuracy, abs=1e-4)

    out = run("predict", "--ckpt_path", rows["checkpoint"], "--trainer.limit_predict_batches", "2")[1]
    assert len(Path(table_of(out)["predictions"]).read_text().splitlines()) == 1 + 2 * 100

    monkeypatch.setattr(ImageClassifier, "predict_step", lambda self, batch, at: self(batch[0]))
    status, out, err = run("predict", "--ckpt_path", rows["checkpoint"])
    with open(table_of(out)["predictions"]) as file:
        assert [int(row["label"]) for row in csv.DictReader(file)] == predicted  # of logits, too
    monkeypatch.setattr(ImageClassifier, "predict_step", lambda self, batch, at: batch[0])
    with pytest.warns(InputWarning, match="returns neither a label nor 10 logits of each image, so that no predict"):
        assert run("predict", "--ckpt_path", rows["checkpoint"])[0] == 0

    monkeypatch.setattr(Digits, "classes", Digits.classes[::-1])
    status, _, err = run("test", "--ckpt_path", rows["checkpoint"])
    assert (status, "has them as 9, 8, 7, …: another order" in err) == (2, True)
    monkeypatch.setattr(Digits, "classes", [f"digit {name}" for name in Digits.classes])
    with pytest.warns(InputWarning, match=r"other data than digits: class '0' \(here: 'digit 9'\), .*, …\."):
        assert run("test", "--ckpt_path", rows["checkpoint"])[0] == 0
    monkeypatch.setattr(Digits, "classes", [*Digits.classes, "ten"])
    status, _, err = run("test", "--ckpt_path", rows["checkpoint"])
    assert (status, "of another model, or of another number of classes" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.ipc", "0"], "`ipc` is 0"),
        (["--data.prototypes", "3"], "`prototypes` is 3"),
        (["--data.strength", "0"], "`strength` is 0.0"),
        (["--data.num_inference_steps", "1"], "at least 2 steps"),
        (["--data.guidance_scale", "-1"], "`guidance_scale` is -1.0"),
        (["--data.diffusion", "nonsense"], "`diffusion` is 'nonsense'"),
        (["--data.set_folder", "."], "is not a distilled set"),
        (["--matching.teacher", "nonsense"], "`teacher` is 'nonsense'"),
        (["--matching.temperature", "0"], "`temperature` is 0.0"),
        (["--matching.student", "nonsense"], "`student` is 'nonsense'"),
        (["--model.student", "nonsense"], "`student` is 'nonsense'"),
        (["--data.cache_dir", "/dev/null/cache"], "`cache_dir` is '/dev/null/cache'"),
        (
            ["--data.source", "Nonsense"],
            "`data.source` is 'Nonsense', which is no such class; name one of CIFAR10, CIFAR100, Digits, HuggingFace",
        ),
        (["--data.source", "ImageFolder"], "`data.source.root` is missing; name it too."),
        (["--data", "Nonsense"], "`data` is 'Nonsense'"),
        (["--data.ipc", "ten"], "`data.ipc` is ten; it must be a whole number.\n"),
        (["--data.nonsense", "1"], "Option 'nonsense' is not accepted\n"),
        (["--data.ipcs", "1"], "`data`: Option 'ipcs' is not accepted (is ipc meant?)\n"),
        (["--data.recipe.ipc", "1"], "unrecognized arguments: --recipe.ipc=1 (is ipc meant?)\n"),
        (["--data.source", "ImageFolder", "--data.source.rot", "x"], "(is root meant?)\n"),
        (["--trainer.max_stepts", "1"], "(is trainer.max_steps meant?)\n"),
        (
            ["--data.train_on", "distiled"],
            "`data.train_on` is distiled; it must be one of 'distilled', 'real', 'random'.\n",
        ),
        (["--data.prototypes", "x"], "`data.prototypes` is x; it must be a whole number or null.\n"),
        (["--data.crop_scale", "[1]"], "`data.crop_scale` is [1]; it must be a list of 2.\n"),
        (["--trainer.devices", "0"], "0"),
        (["--trainer.max_steps", "x"], "`trainer.max_steps` is x; it must be a whole number.\n"),
        (["--config", "nope.yaml"], "nope.yaml"),
        (
            ["--config", torch.__file__.replace("__init__.py", "lib/libtorch.so")],
            "`config` names a file that is no text",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_before_any_work(run, words, says):
    status, _out, err = run("fit", "--data", "D4MDataModule", *words)
    assert status == 2
    message = [line for line in err.splitlines(keepends=True) if line.startswith("error: ")]
    assert len(message) == 1, err
    assert says in message[0]
    assert "Traceback" not in err
    assert "Encoding" not in err
    assert "Training" not in err


def test_progress_and_errors_are_added_to_a_file(run, tmp_path):
    log = tmp_path / "d4m.log"
    words = ["distill", "--ipc", "1", "--num_inference_steps", "2", "--max_images_per_class", "5", "--log_file"]
    assert run(*words, log)[0] == 0
    assert "Synthesising: 10 of 10 images" in log.read_text()
    assert run(*words, log, "--diffusion", "nonsense")[0] == 2
    assert "error: `diffusion` is 'nonsense'" in log.read_text().splitlines()[-1]
    assert "error: `log_file` is '/dev/null/x', which cannot be written" in run(*words, "/dev/null/x")[2]


def test_a_set_can_be_distilled_alone_and_trained_on(run, tmp_path):
    status, out, _ = run("distill", "--ipc", "1", "--num_inference_steps", "4", "--output", tmp_path / "set")
    assert status == 0
    assert str(tmp_path / "set") in out
    status, out, err = run("fit", "--data.set_folder", tmp_path / "set", *UNMEASURED)
    assert status == 0
    assert str(tmp_path / "set") in out
    assert "Synthesising" not in err


@pytest.mark.filterwarnings("ignore:.* knows nothing of 2 of 10 prompts, such as 'zero'")
@pytest.mark.parametrize("names", ['{"3": "three", "0": "zero"}', "names.yaml"])
def test_class_names_are_a_mapping_or_a_file(run, names):
    Path("names.yaml").write_text("3: three\n0: zero\n", encoding="utf-8")
    words = ["--ipc", "1", "--num_inference_steps", "2", "--max_images_per_class", "5", "--resize", "squash"]
    status, _, err = run("distill", "--output", "set", "--class_names", names, *words)
    assert status == 0, err
    recipe = json.loads(next(Path("set").rglob("d4m.json")).read_text(encoding="utf-8"))["recipe"]
    assert recipe["class_names"] == {"3": "three", "0": "zero"}
    assert (recipe["resize"], recipe["max_images_per_class"]) == ("squash", 5)


def test_a_warning_about_the_data_is_one_line(capsys):
    before = warnings.formatwarning
    console.to_the_user(
        lambda: print(warnings.formatwarning(InputWarning("two cats"), InputWarning, "file.py", 1), end="")
    )
    assert capsys.readouterr().out == "warning: two cats\n"
    assert warnings.formatwarning is before


def test_a_saved_configuration_of_swa_can_be_read_back(run):
    words = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"]
    out = run("fit", *words, "--print_config")[1]
    assert yaml.safe_load(out)["trainer"]["callbacks"][0]["init_args"]["device"] == "cpu"


def test_the_config_of_a_run_reproduces_it(run):
    status, out, _ = run("fit", "--data", "D4MDataModule", "--print_config")
    config = yaml.safe_load(out)
    assert status == 0
    assert config["data"]["init_args"]["guidance_scale"] == 8.0
    assert config["matching"]["temperature"] == 20.0
    assert config["model"]["init_args"]["student"] == "convnet"


def test_help_names_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in cli.COMMANDS)


def test_the_version_is_the_packages(run):
    assert run("--version")[1].startswith("d4m-plugin 0.")


def test_an_unknown_command_is_named(run):
    status, *_ = run("nonsense")
    assert "no command 'nonsense'" in status


def test_words_that_are_not_ours_go_to_the_lightning_sdk(monkeypatch):
    import types

    called = []
    module = types.ModuleType("lightning_sdk.cli.entrypoint")
    module.main_cli = lambda: called.append(sys.argv)
    for name in ("lightning_sdk", "lightning_sdk.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", module)
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    cli.lightning()
    assert called == [["lightning", "login"]]
    monkeypatch.setattr(sys, "argv", ["lightning", "--version"])
    cli.lightning()
    assert len(called) == 1


def test_the_program_has_three_names():
    scripts = Path(sys.executable).parent  # which need not be on the PATH
    for words in ([scripts / "lightning"], [scripts / "d4m"], [sys.executable, "-m", "d4m_plugin"]):
        result = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("usage: d4m COMMAND")


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['--help']; from d4m_plugin.cli import d4m; d4m(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "jsonargparse"} & set(result.stdout.split())


def test_a_module_in_the_working_folder_can_be_named(run, squares):
    Path("mine.py").write_text(
        "from tests.toys import Squares\nclass Mine(Squares):\n    classes = ('a', 'b')\n"
        "    def __init__(self):\n        super().__init__(classes=('a', 'b'))\n"
    )
    status, out, err = run(
        "fit", "--data.source", "mine.Mine", "--data.train_on", "real", "--matching.teacher", "null", *SHORT[2:]
    )
    assert status == 0, err
    assert "accuracy on real test images" in out


def test_stored_labels_are_written_read_by_anyone_and_learnt_from(run, tmp_path, caplog):
    words = ["--output", tmp_path / "set", "--ipc", "2", "--num_inference_steps", "2"]
    assert run("distill", *words)[0] == 0
    status, out, err = run("relabel", tmp_path / "set")
    assert status == 0, err
    assert table_of(out)["teacher"].startswith("auto: names 99% of 256 real test images of digits rightly, by class")
    rows = load_dataset(str(tmp_path / "set"), split="train")
    logits = torch.tensor(rows["logits"])
    assert logits.shape == (20, 10)
    assert (logits.argmax(1) == torch.tensor(rows["label"])).float().mean() > 0.5
    metadata = json.loads((tmp_path / "set" / "ipc-2" / "d4m.json").read_text())
    parquet = tmp_path / "set" / "ipc-2" / "train-00000-of-00001.parquet"
    assert metadata["checksums"][parquet.name] == hashlib.sha256(parquet.read_bytes()).hexdigest()

    words = ["--data.set_folder", tmp_path / "set", "--matching.teacher", "stored"]
    status, out, err = run("fit", *words, *UNMEASURED)
    assert status == 0, err
    assert "names 99%" not in caplog.text  # no teacher was loaded
    status, out, err = run("fit", *words[:-1], "[stored, digits]", *UNMEASURED)
    assert status == 0, err
    assert shlex.split(table_of(out)["next"])[-2:] == ["--matching.teacher", '["auto", "digits"]']

    status, _, err = run("relabel", tmp_path)
    assert status == 2
    assert "is not a distilled set" in err


def test_several_teachers_can_be_named(run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)  # in 2.6.0 it does not
    words = ["--matching.teacher", "[auto, digits]", "--matching.loss", "mse", "--matching.hard_label_weight", "0.1"]
    status, _, err = run("fit", "--data.train_on", "random", *words, *UNMEASURED)
    assert status == 0, err
    for teacher in ("auto", "digits"):
        assert f"Teacher {teacher}: names 99%" in caplog.text


def test_a_dry_run_counts_and_makes_nothing(run, tmp_path):
    words = ["--output", tmp_path / "set", "--ipc", "3", "--num_inference_steps", "10", "--batch_size", "20"]
    status, out, err = run("distill", "--dry_run", "true", *words)
    assert status == 0, err
    rows = table_of(out)
    assert rows["images to encode"] == "1,297, at 32 pixels"
    assert rows["images to make"] == "30, 3 of each of 10 classes"
    assert rows["passes of the model"] == "420: 14 an image, in 7 steps"
    assert rows["checking, once"].endswith("images/s in a process)")
    assert rows["in all"].endswith("and the clustering")
    assert "latents" not in rows["on disk"] + rows["memory"]
    assert not (tmp_path / "set").exists()


def test_a_dry_run_counts_latents_that_are_kept_and_tells_where_they_fill_the_memory(run, monkeypatch):
    monkeypatch.setattr("d4m_plugin.rehearsal.MUCH", 50_000)
    words = ["--ipc", "1", "--num_inference_steps", "2", "--keep_latents", "true", "--max_images_per_class", "50"]
    status, out, err = run("distill", "--dry_run", "true", *words)
    assert status == 0, err
    rows = table_of(out)  # of 500 images and of 50, at 4 x 8 x 8 numbers of 4 bytes
    assert rows["on disk"].endswith("; 512 kB of latents, kept in the cache")
    assert rows["memory"].endswith("; 51.2 kB of a class's latents, less by `max_images_per_class`")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", [["distill", "--dry_run", "true"], ["preview", "--images", "1", "--of_class", "2"]])
def test_what_processes_do_not_share_is_done_by_one_whoever_started_them(run, monkeypatch, command, rank):
    launched = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in (launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    status, out, err = run(*command, "--num_inference_steps", "2")
    assert status == 0, err
    assert bool(out) == (rank == 0)


def test_a_preview_shows_prototypes_and_images_of_a_few_classes(run, tmp_path):
    seen = tmp_path / "pictures" / "seen.png"  # in a folder that is not there yet
    words = ["--output", seen, "--num_inference_steps", "2", "--classes", "2", "--images", "3"]
    status, _, err = run("preview", *words, "--of_class", "10", "--prototypes", "4")  # of a recipe's ten images
    assert status == 0, err
    with Image.open(seen) as picture:
        assert picture.height == 2 * 2 * (64 + 2)
        assert picture.width > 3 * (64 + 2)


def test_a_set_cannot_take_the_place_of_a_file(run):
    Path("notes.txt").touch()
    status, _, err = run("distill", "--output", "notes.txt")
    assert (status, err) == (2, "error: `output` is 'notes.txt', which is a file; name a folder.\n")


@pytest.mark.parametrize("command", [["preview", "--images", "1"], ["distill", "--dry_run", "true", "--ipc", "1"]])
def test_a_class_without_images_is_told_before_a_try(run, monkeypatch, command):
    monkeypatch.setattr(Digits, "train", lambda _: Squares(classes=("a", "b")).train())
    status, _, err = run(*command)
    assert (status, err) == (2, "error: class '2' of digits (label 2) has no training images.\n")


def test_a_tilde_in_a_value_is_the_users_home(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--ipc", "1", "--num_inference_steps", "2", "--output=~/set"]
    assert run("distill", *words)[0] == 0
    for root in ("~/set", Path("~/set")):
        assert DistilledDataset(root).folder == tmp_path / "set" / "ipc-1"
    assert D4MDataModule(Digits(), set_folder="~/set").distilled.folder == tmp_path / "set" / "ipc-1"
    assert run("preview", "--images", "1", "--classes", "1", "--of_class", "2", "--output=~/look.png")[0] == 0
    assert (tmp_path / "look.png").is_file()


@pytest.mark.filterwarnings("ignore:.* cannot be read and are left out")
@pytest.mark.parametrize("command", [["preview", "--images", "1"], ["distill", "--dry_run", "true", "--ipc", "1"]])
def test_before_the_long_run_too_a_bad_image_can_be_skipped(run, command):
    for number in range(3):
        for name in ("train/0", "train/1", "val/0", "val/1"):
            Path(f"photos/{name}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (90 * number, 0, 0)).save(f"photos/{name}/{number}.png")
    Path("photos/train/0/bad.jpg").write_text("no image")
    source = ["--source", "ImageFolder", "--source.root", "photos"]
    words = [*source, "--diffusion", "digits", "--num_inference_steps", "2"]
    assert "bad.jpg' cannot be read as an image" in run(*command, *words)[2]
    status, _, err = run(*command, *words, "--skip_bad_images", "true", "--num_workers", "1")
    assert status == 0, err


OWN_MODULE = """
from config_examples.own_module import PlainClassifier


class Saving(PlainClassifier):
    def __init__(self, num_classes: int, hidden: int = 8) -> None:
        super().__init__(num_classes, hidden)
        self.save_hyperparameters()
"""


def test_a_checkpoint_of_a_module_that_saves_its_hyperparameters_is_read_back(run, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    Path("saving_module.py").write_text(OWN_MODULE, encoding="utf-8")
    words = ["--model", "saving_module.Saving", "--data.train_on", "random"]
    status, out, err = run("fit", *words, "--model.hidden", "16", "--trainer.max_steps", "2")
    assert status == 0, err
    checkpoint = table_of(out)["checkpoint"]
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["hidden"] == 16
    status, _, err = run("test", *words, "--data", "D4MDataModule", "--ckpt_path", checkpoint)
    assert status == 0, err
    status, out, err = run("fit", *words, "--trainer.max_steps", "3", "--ckpt_path", checkpoint)
    assert status == 0, err
    assert torch.load(table_of(out)["checkpoint"], weights_only=True)["global_step"] == 3
    assert "Saving has no `predict_step`" in run("predict", *words, "--ckpt_path", checkpoint)[2]


OWN_OPTIONS = """
from pathlib import Path

import lightning as L
import torch
from torch.nn import functional as F


class Mine(L.LightningModule):
    def __init__(self, num_classes: int, lr: float = 0.01, where: Path = Path("x")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, num_classes))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_mine", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 7) -> None:
        super().__init__()
"""


@pytest.fixture
def own_options():
    Path("own_options.py").write_text(OWN_OPTIONS, encoding="utf-8")


@pytest.mark.parametrize("by_file", [False, True])
def test_a_class_of_the_users_has_its_own_defaults(run, own_options, by_file):
    words = ["--model", "own_options.Mine", "--data", "own_options.Data"]
    if by_file:
        named = {part: {"class_path": f"own_options.{name}"} for part, name in (("model", "Mine"), ("data", "Data"))}
        Path("own.yaml").write_text(yaml.safe_dump(named), encoding="utf-8")
        words = ["--config", "own.yaml"]
    status, out, err = run("fit", *words, "--print_config")
    assert status == 0, err
    config = yaml.safe_load(out)
    assert config["model"]["init_args"] == {"lr": 0.01, "where": "x"}
    assert config["data"]["init_args"] == {"batch_size": 7}
    status, out, err = run("fit", *words, "--print_config", "--model.lr", "0.5")
    assert yaml.safe_load(out)["model"]["init_args"]["lr"] == 0.5, err
    status, out, err = run("fit", *words, "--print_config=skip_default")
    assert yaml.safe_load(out)["model"]["class_path"] == "own_options.Mine", err


def test_what_is_given_beside_a_checkpoint_counts(run, own_options):
    status, out, err = run("fit", *UNMEASURED, "--trainer.max_steps", "1", "--data.train_on", "random")
    assert status == 0, err
    checkpoint = ["--ckpt_path", table_of(out)["checkpoint"]]
    words = ["--data.train_on", "random", *checkpoint]
    says = "names a checkpoint of d4m_plugin.ImageClassifier, but `model` is own_options.Mine"
    assert says in run("validate", "--model", "own_options.Mine", *words)[2]
    assert "names a checkpoint of another model" in run("validate", "--model.student", "resnet18", *words)[2]
    status, out, err = run("fit", *UNMEASURED, "--trainer.max_steps", "2", *words, "--model.lr", "0.5")
    assert status == 0, err
    assert torch.load(table_of(out)["checkpoint"], weights_only=True)["hyper_parameters"]["lr"] == 0.5


def test_a_checkpoint_of_more_than_tensors_is_read_where_the_user_says_so(run, own_options, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    import lightning as L
    from own_options import Mine

    data, module = D4MDataModule(Digits(), train_on="random", ipc=1), Mine(10)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, logger=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint("mine.ckpt")  # whose hyperparameters have a Path
    words = ["--model", "own_options.Mine", "--data.train_on", "random", "--ckpt_path", "mine.ckpt"]
    status, _, err = run("validate", *words)
    assert status == 2
    assert "`weights_only: false` lets a `ckpt_path` that you trust" in err
    status, out, err = run("validate", *words, "--weights_only", "false")
    assert status == 0, err
    assert "val_mine" in out


def test_who_asks_for_validation_each_epoch_has_it(run):
    words = ["--data.train_on", "random", "--data.ipc", "1", "--trainer.max_epochs", "2", "--trainer.limit_val_batches"]
    status, _, err = run("fit", *words, "1", "--trainer.check_val_every_n_epoch", "1", "--data.batch_size", "5")
    assert status == 0, err
    with Path("lightning_logs/version_0/metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val_accuracy"]]
    assert steps == [1, 3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "null"], "`model` is null; name a class"),
        (
            ["--trainer.val_check_interval", "100", "--trainer.check_val_every_n_epoch", "1"],
            "`val_check_interval` (100) must be less than or equal to the number of the training batches",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(run, words, says):
    status, _, err = run("fit", *UNMEASURED, "--data.train_on", "random", *words)
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {says}")


def test_a_metric_that_nobody_logs_is_one_sentence(run):
    words = ["--data.train_on", "random", "--trainer.callbacks", "EarlyStopping"]
    status, _, err = run("fit", *UNMEASURED, *words, "--trainer.callbacks.monitor", "val_acc")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: Early stopping conditioned on metric `val_acc`")


def test_a_class_whose_package_is_not_here_is_one_sentence(run):
    Path("needy.py").write_text(
        "from lightning.pytorch.loggers import Logger\n"
        "class Needy(Logger):\n"
        "    def __init__(self):\n        raise ModuleNotFoundError('needs a package')\n"
        "    name = version = log_metrics = log_hyperparams = None\n"
    )
    status, _, err = run("fit", *UNMEASURED, "--data.train_on", "random", "--trainer.logger", "needy.Needy")
    assert status == 2
    assert err.splitlines()[-1] == "error: 'needy.Needy' cannot be made: needs a package"


def test_what_a_terminal_cannot_show_is_no_error(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console.to_the_user(lambda: print("\N{MINUS SIGN}0.5", flush=True))
    assert written.getvalue() == b"\\u22120.5\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["distill", "--num_workers", "-1"], "`num_workers` is -1; it must be at least 0."),
        (["distill", "--dry_run", "true", "--batch_size", "0"], "`batch_size` is 0; it must be at least 1."),
        (["sweep", "--strength", "[0.5]", "--seeds", "0"], "`seeds` is 0; it must be at least 1."),
        (["sweep", "--strength", "[0.5]", "--num_workers", "-1"], "`num_workers` is -1; it must be at least 0."),
        (["preview", "--num_workers", "-1"], "`num_workers` is -1; it must be at least 0."),
    ],
)
def test_a_number_below_the_least_is_told_by_every_command(run, words, says):
    status, _, err = run(*words)
    assert status == 2
    assert err.strip() == f"error: {says}"


@pytest.mark.parametrize(
    ("words", "says"), [(["--classes", "0"], "`classes` is 0"), (["--output", "seen.gif"], "must end in .png")]
)
def test_a_preview_that_cannot_be_drawn_is_told(run, words, says):
    status, _, err = run("preview", *words)
    assert status == 2
    assert says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "one", "--seeds", "2"], "`distilled_sets` has 1; name at least two"),
        (["compare", "one", "two"], "`distilled_set` is 'one': no folder or file here"),
        (["compare", "one", "--seeds", "2", "--budget=3", "two"], "`distilled_set` is 'one': no folder or file here"),
        (["evaluate", "one", "--arms", "[medoids]"], "`arms` is medoids; it must be one of 'distilled', 'random', "),
        (["sweep", "--ipc", "1"], "nothing is varied; give values of `strength`"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(run, words, says):
    status, _, errors = run(*words)
    assert status == 2
    assert says in errors
    assert len(errors.splitlines()) == 1
