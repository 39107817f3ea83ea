import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import families
from tests.test_cli import table_of

EXAMPLES = Path(__file__).parent.parent / "config_examples"
RUN_HERE = {"digits.yaml", "teacher_digits.yaml", "own_module.yaml", "small_batch.yaml", "strong.yaml"}
OWN_SOURCE = "own_source.yaml"
MODELS = {  # and the tiny pipeline that stands for each
    "sd2.yaml": "sd_v_prediction",
    "sdxl.yaml": "sdxl",
    "sdxl_turbo.yaml": "sdxl",
    "lcm.yaml": "lcm",
    "sd3.yaml": "sd3",
    "flux.yaml": "flux",
}
NEED_DATA = {"cifar10.yaml", "paper_cifar10.yaml", "teacher_cifar10.yaml", "paper_imagenet.yaml"}  # and a GPU


@pytest.fixture(autouse=True)
def beside_the_examples(cache):
    shutil.copytree(EXAMPLES, "config_examples")


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == RUN_HERE | NEED_DATA | {OWN_SOURCE} | set(MODELS)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # of the teacher
@pytest.mark.parametrize("name", sorted(RUN_HERE))
def test_an_example_runs(run, name):  # the fixture imported above
    short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--data.ipc", "2"]
    short += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
    status, out, err = run("fit", "--config", f"config_examples/{name}", *short, "--data.num_inference_steps", "4")
    assert status == 0, err
    assert "on real test images" in out
    if name == "teacher_digits.yaml":
        teacher = Path("teachers/digits/last.ckpt")
        weights = teacher.read_bytes()
        status, out, err = run(*shlex.split(table_of(out)["as a teacher"])[1:])
        assert status == 0, err
        assert table_of(out)["checkpoint"].endswith("teachers/digits/last-v1.ckpt")
        assert teacher.read_bytes() == weights


@pytest.mark.filterwarnings(
    "ignore:2 of 2 classes have fewer different images", "ignore:.* knows nothing of 2 of 2 prompts"
)
def test_an_own_source_runs(run):  # the fixture imported above
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_labels"] = np.repeat([0, 1], [3, 9])[:, None].astype(np.uint8)
        noise = generator.integers(0, 60, (12, 28, 28))
        arrays[f"{split}_images"] = (noise + 150 * arrays[f"{split}_labels"][..., None]).astype(np.uint8)
    np.savez("own.npz", **arrays)
    words = ["--data.source.file", "own.npz", "--data.diffusion", "digits", "--data.num_inference_steps", "2"]
    status, out, err = run("fit", "--config", f"config_examples/{OWN_SOURCE}", *words, "--trainer.max_steps", "2")
    assert status == 0, err
    assert "medmnist-ipc-10" in table_of(out)["distilled set"]


@pytest.mark.parametrize("name", sorted(NEED_DATA))
def test_an_example_for_other_data_parses(run, name):  # the fixture imported above
    status, out, err = run("fit", "--config", f"config_examples/{name}", "--print_config")
    assert status == 0, err
    assert "d4m_plugin.ImageClassifier" in out


@pytest.mark.parametrize("name", MODELS)
def test_a_models_settings_suit_its_family(run, name, tmp_path):  # the fixture imported above
    tiny = families.save(MODELS[name], tmp_path / "tiny")
    words = ["--data.diffusion", tiny, "--data.resolution", "16", "--data.vae", "null", "--data.ipc", "2"]
    words += ["--data.source", "tests.toys.Squares", "--matching.teacher", "null", "--trainer.max_steps", "1"]
    status, out, err = run("fit", "--config", f"config_examples/{name}", *words)
    assert status == 0, err
    assert "ipc-2" in table_of(out)["distilled set"]
