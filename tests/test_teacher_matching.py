import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d4m_plugin import D4MDataModule, ImageClassifier, InputError, Teacher, TeacherMatching
from d4m_plugin.matching import cutmix, matching_loss
from tests.test_datamodule import quiet_trainer
from tests.toys import Squares


class Plain(L.LightningModule):
    """Anyone's classifier; notes the labels that its metrics see."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))
        self.labels = []

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.labels.append(labels)
        logits = self(images)
        self.log("train_acc", (logits.argmax(1) == labels).float().mean())
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ReturnsDict(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


class CallsSubmodule(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])


def fit(module, matching, **options):
    data = D4MDataModule(Squares(), train_on="real", batch_size=6)
    trainer = quiet_trainer(callbacks=[matching], **({"max_epochs": 2} | options))
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def teacher():
    """Knows the squares by their mean colour."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Teacher(network, Squares().classes, 16, Squares.mean, Squares.std)


@pytest.mark.parametrize("student", [Plain, ReturnsDict])
@pytest.mark.parametrize("mixing", ["cutmix", "none"])
def test_training_equals_a_plain_loop(teacher, student, mixing):
    torch.manual_seed(0)
    module = student()
    by_hand = copy.deepcopy(module.model)

    fit(module, TeacherMatching(teacher, temperature=4.0, mixing=mixing))

    data = D4MDataModule(Squares(), train_on="real", batch_size=6)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(2):
        for pixels, _ in data.train_dataloader():
            images = data.augmented(pixels)
            if mixing == "cutmix":
                images = cutmix(images).images
            loss = matching_loss(by_hand(images), teacher(data.to_unit_range(images)), 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, reference in zip(module.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def test_the_modules_metrics_get_integer_labels(teacher):
    module = Plain()
    trainer = fit(module, TeacherMatching(teacher))
    labels = torch.cat(module.labels)
    assert labels.dtype == torch.int64
    assert labels.shape == (36,)
    assert set(labels.tolist()) <= {0, 1, 2}
    assert {"train_acc", "matching_loss"} <= set(trainer.callback_metrics)


def test_no_trace_of_the_teacher_is_left(teacher, tmp_path):
    plain_keys = set(Plain().state_dict())
    module = Plain()
    own = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            own.append(sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"]))
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    data = D4MDataModule(Squares(), train_on="real")
    matching = TeacherMatching(teacher)
    quiet_trainer(max_epochs=1, callbacks=[matching, Looks()]).fit(module, datamodule=data)
    assert own == [sum(p.numel() for p in module.parameters())]
    checkpoint = torch.load(tmp_path / "during.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict()) == plain_keys
    assert not checkpoint["callbacks"]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_module_is_its_own_again_after_fitting(teacher):
    module = Plain()
    matching = TeacherMatching(teacher)
    fit(module, matching)
    assert "training_step" not in vars(module)
    pickle.loads(pickle.dumps(module.model))
    copy.deepcopy(module)
    fit(module, matching)  # and again
    assert "training_step" not in vars(module)


def test_an_exception_while_training_restores_the_module(teacher):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("mid-epoch")

    module = Fails()
    with pytest.raises(RuntimeError, match="mid-epoch"):
        fit(module, TeacherMatching(teacher))
    assert "training_step" not in vars(module)
    assert not module._forward_hooks


def test_a_step_set_on_the_instance_comes_back(teacher):
    module = Plain()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx)
    own = module.training_step
    fit(module, TeacherMatching(teacher))
    assert module.training_step is own


def test_the_students_logits_can_come_from_a_submodule(teacher):
    module = CallsSubmodule()
    assert "matching_loss" in fit(module, TeacherMatching(teacher, student="model")).callback_metrics


def test_logits_that_are_not_seen_are_an_error_that_says_what_to_set(teacher):
    with pytest.raises(InputError, match=r"saw no logits of shape \(2, 3\) .* set `student`"):
        fit(CallsSubmodule(), TeacherMatching(teacher))


def test_logits_that_go_missing_while_training_are_an_error(teacher):
    class NeedsTrainer(CallsSubmodule):
        def training_step(self, batch, batch_idx):
            assert self.trainer.training  # so that no step can be tried before
            return super().training_step(batch, batch_idx)

    with pytest.raises(InputError, match=r"saw no logits of shape \(6, 3\) .* set `student`"):
        fit(NeedsTrainer(), TeacherMatching(teacher))


def test_trying_a_step_leaves_module_and_random_state_alone(teacher):
    module = Plain()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    data = D4MDataModule(Squares(), train_on="real")
    TeacherMatching(teacher)._check_that_logits_are_seen(module, data)
    assert module.labels == []
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_an_unknown_submodule_is_named(teacher):
    with pytest.raises(InputError, match="`student` is 'net', which Plain does not have; it has model"):
        fit(Plain(), TeacherMatching(teacher, student="net"))


def test_manual_optimisation_is_refused(teacher):
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(InputError, match="Plain has `automatic_optimization` set to False"):
        fit(module, TeacherMatching(teacher))


def test_other_data_is_refused(teacher):
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([])

    with pytest.raises(InputError, match="needs a D4MDataModule as `data`; it is Other"):
        quiet_trainer(max_epochs=1, callbacks=[TeacherMatching(teacher)]).fit(Plain(), datamodule=Other())


class TakesNoIndex(CallsSubmodule):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class TakesOtherNames(CallsSubmodule):
    def training_step(self, b, i):
        return super().training_step(b, i)


@pytest.mark.parametrize("student", [TakesNoIndex, TakesOtherNames])
def test_a_step_of_any_signature_is_tried_before(teacher, student):
    with pytest.raises(InputError, match=r"saw no logits of shape \(2, 3\)"):
        fit(student(), TeacherMatching(teacher))


def test_layers_may_be_built_late(teacher):
    class Late(CallsSubmodule):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            self.model = Plain().model

    assert "matching_loss" in fit(Late(), TeacherMatching(teacher, student="model")).callback_metrics


def test_a_teacher_at_chance_is_refused(teacher):
    shuffled = Teacher(teacher.model, ["green / blue", "ünï 🦆", "red"], 16, Squares.mean, Squares.std)
    with pytest.raises(InputError, match=r"`teacher` names 0% of 12 real test images .* no more than chance \(33%\)"):
        fit(Plain(), TeacherMatching(shuffled))


def test_an_unknown_mixing_is_refused():
    with pytest.raises(InputError, match="`mixing` is 'mixup'; use cutmix or none"):
        TeacherMatching(mixing="mixup")


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(InputError, match="`temperature` is 0"):
        TeacherMatching(temperature=0)


def test_without_a_teacher_the_module_keeps_its_loss():
    trainer = fit(Plain(), TeacherMatching(None))
    assert "matching_loss" not in trainer.callback_metrics


def test_matching_a_trained_teacher_teaches():
    """The embedded teacher, on real digits: labels play no part in the loss, yet the student learns them."""
    torch.manual_seed(0)
    data = D4MDataModule(train_on="real", crop_scale=(0.8, 1.0))
    module = ImageClassifier(data.num_classes, data.image_size)
    trainer = quiet_trainer(max_epochs=3, callbacks=[TeacherMatching()])
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] > 0.8


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}]
)
def test_the_trainers_own_options_go_on(teacher, options):
    assert fit(Plain(), TeacherMatching(teacher), **options).callback_metrics["matching_loss"] > 0
