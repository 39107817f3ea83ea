"""Other people's modules, unedited, learn from a teacher on a distilled set. Some need the extra `third-party`."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from d4m_plugin import ConvNet, D4MDataModule, InputError, LatentDiffusion, TeacherMatching
from d4m_plugin.evaluation.pictures import judge, open_network
from d4m_plugin.matching import matching_loss, soften
from d4m_plugin.seeding import generator_of
from d4m_plugin.teachers import load_teacher
from tests import families, third_party
from tests.test_datamodule import quiet_trainer

pytestmark = pytest.mark.filterwarnings("default")  # they warn of much
DICTS = {"torchgeo": ["image", "label"], "transformers": ["pixel_values", "labels"]}


def torchgeo_task(num_classes):
    from torchgeo.trainers import ClassificationTask

    return ClassificationTask("resnet18", num_classes=num_classes)


def torch_uncertainty_routine(num_classes):
    from torch_uncertainty.routines import ClassificationRoutine

    return ClassificationRoutine(
        ConvNet(num_classes),
        num_classes,
        nn.CrossEntropyLoss(),
        optim_recipe=lambda model: {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01)},
    )


ROUTINE = {
    "class_path": "torch_uncertainty.routines.ClassificationRoutine",
    "init_args": {
        "model": {"class_path": "d4m_plugin.ConvNet", "init_args": {"num_classes": 10}},
        "loss": "torch.nn.CrossEntropyLoss",
    },
}
# What needs to be installed; the module as a notebook builds it; and as a config file names it.
MODULES = {
    "torchgeo": (torchgeo_task, {"class_path": "torchgeo.trainers.ClassificationTask"}),
    "torch_uncertainty": (torch_uncertainty_routine, ROUTINE),
    "timm": (third_party.TimmModule, {"class_path": "tests.third_party.TimmModule"}),
    "transformers": (third_party.ViTModule, {"class_path": "tests.third_party.ViTModule"}),
    "torchvision": (third_party.ResNetModule, {"class_path": "tests.third_party.ResNetModule"}),
    "torchvision.models": (third_party.InceptionModule, {"class_path": "tests.third_party.InceptionModule"}),
    "lightning": (third_party.DemoModule, {"class_path": "tests.third_party.DemoModule"}),
}
RECIPE = {"ipc": 2, "num_inference_steps": 2}


@pytest.mark.parametrize("package", MODULES)
def test_through_the_command_line(run, package, tmp_path):  # the fixture imported above
    pytest.importorskip(package)
    config = {
        "data": {"class_path": "D4MDataModule", "init_args": RECIPE | {"batch_keys": DICTS.get(package)}},
        "model": MODULES[package][1],
        "trainer": {"max_epochs": 2, "val_check_interval": 1.0, "limit_val_batches": 2, "log_every_n_steps": 1},
    }
    if package == "torch_uncertainty":
        config["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    status, out, err = run("fit", "--config", tmp_path / "config.yaml")
    assert status == 0, err
    assert "distilled set" in out
    (metrics,) = Path("lightning_logs").glob("*/metrics.csv")
    assert "matching_loss" in metrics.read_text()


@pytest.mark.parametrize("package", MODULES)
def test_in_a_notebook_the_loss_is_that_of_its_own_logits(package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    data = D4MDataModule(crop_scale=(1.0, 1.0), batch_size=20, batch_keys=DICTS.get(package), **RECIPE)
    module = MODULES[package][0](data.num_classes)
    before = copy.deepcopy(module).train()
    trainer = quiet_trainer(max_epochs=1, callbacks=[TeacherMatching(mixing="none")], limit_val_batches=2)
    trainer.fit(module, datamodule=data)

    images = data.normalised(data.distilled.images)
    network = next((child for child in (getattr(before, at, None) for at in ("net", "model")) if child), before)
    with torch.no_grad():
        output = network(images)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    softened = soften(load_teacher("auto", data.source)(data.to_unit_range(images)), 20.0)
    expected = matching_loss(logits, softened, 20.0)
    torch.testing.assert_close(trainer.callback_metrics["matching_loss"], expected, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(p, module.get_parameter(name)) for name, p in before.named_parameters())


def test_a_lora_is_added_to_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    folder = families.save("sd", tmp_path / "model")
    stock = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(1)
    stock.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(stock.unet)
    stock.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)

    starts = torch.randn(2, 4, 8, 8, generator=generator_of(0))

    def denoised(**options):
        model = LatentDiffusion(str(folder), dtype=torch.float32, **options)
        generators = [generator_of(1, index) for index in range(2)]
        return model.denoise(starts, ["a", "b"], generators, num_inference_steps=4)

    with_lora = LatentDiffusion(str(folder), dtype=torch.float32)
    with_lora.pipeline.load_lora_weights(tmp_path / "lora")  # beside the weights, as diffusers shows it
    generators = [generator_of(1, index) for index in range(2)]
    expected = with_lora.denoise(starts, ["a", "b"], generators, num_inference_steps=4)
    torch.testing.assert_close(denoised(lora=str(tmp_path / "lora")), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(denoised(), expected, atol=1e-2)
    with pytest.raises(InputError, match="`lora` is '/nowhere', which is no LoRA of StableDiffusionImg2ImgPipeline"):
        denoised(lora="/nowhere")
    (tmp_path / "pickled.bin").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"`lora` is '.*pickled\.bin', which is no LoRA"):
        denoised(lora=str(tmp_path / "pickled.bin"))


def test_a_lora_needs_peft(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(InputError, match="`lora` is 'some', which needs the package peft"):
        LatentDiffusion(str(families.save("sd", tmp_path / "model")), lora="some")


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """Where torch keeps the weights of Inception that it has fetched: these are random ones."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            """Keep the weights."""

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / inception.URL_INCEPTION_V3.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save({}, file)
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], str(file))
    for weights in network.parameters():
        if weights.ndim > 1:
            nn.init.kaiming_normal_(weights)  # or nothing would come through all the layers
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.filterwarnings("ignore")  # torchmetrics warns of its memory, and of one split
def test_the_figures_of_inception_are_those_of_torchmetrics(inception_weights):
    made, real = (torch.randint(256, (count, 3, 32, 32), generator=generator_of(count)).byte() for count in (6, 8))
    real = real // 2
    figures = judge(open_network("inception"), "inception", made, None, real, None)
    distance, kernel = FrechetInceptionDistance(), KernelInceptionDistance(subset_size=6)
    score = InceptionScore(splits=1)
    for metric in (distance, kernel):
        metric.update(made, real=False)
        metric.update(real, real=True)
    score.update(made)
    assert figures.frechet_distance == pytest.approx(float(distance.compute()), rel=1e-4)
    torch.manual_seed(0)  # for the same subsets
    assert figures.kernel_distance == pytest.approx(float(kernel.compute()[0]), rel=1e-4)
    assert figures.inception_score == pytest.approx(float(score.compute()[0]), rel=1e-6)
    assert figures.frechet_distance > 1
    assert figures.agreement is figures.real_agreement is None


def test_inception_whose_weights_are_not_to_be_had_is_told_where_to_put_them(inception_weights, monkeypatch):
    inception_weights.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"whose weights cannot be had from https://.*\.pth \(.*put that file into '"):
        open_network("inception")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"`features` is 'inception', which needs `pip install torch-fidelity`"):
        open_network("inception")
