import copy
import itertools
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import ImageClassifierOutput

from d4m_plugin import (
    D4MDataModule,
    DistilledDataset,
    ImageClassifier,
    InputError,
    Recipe,
    Teacher,
    TeacherMatching,
    distill,
)
from d4m_plugin.callbacks import teacher_matching
from d4m_plugin.devices import trainer_precision
from d4m_plugin.errors import InputWarning
from d4m_plugin.matching import MIXINGS, Mixed, matching_loss, soften
from d4m_plugin.relabelling import relabel
from tests.test_datamodule import quiet_trainer
from tests.toys import Squares

LR = 0.02
pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")


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
        return torch.optim.SGD(self.parameters(), lr=LR)


class ReturnsDict(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


class CallsSubmodule(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])


class CallsForwardOnly(Plain):
    """As lightly's classifiers do: no hook of the module itself is run."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


class HasLossHelper(Plain):
    def loss_of(self, batch):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def training_step(self, batch, batch_idx):
        return self.loss_of(batch)


class TakesNoIndex(CallsSubmodule):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class TakesOtherNames(CallsSubmodule):
    def training_step(self, b, i):
        return super().training_step(b, i)


class NeedsTrainer(CallsSubmodule):
    """No step of it can be tried before training."""

    def training_step(self, batch, batch_idx):
        assert self.trainer.training
        return super().training_step(batch, batch_idx)


class ReturnsProbabilities(Plain):
    def forward(self, images):
        return self.model(images).softmax(1)

    def training_step(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]).log(), batch[1])


class HasSoftmaxForAMetric(Plain):
    def __init__(self):
        super().__init__()
        self.softmax = nn.LogSoftmax(1)

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.log("sure", self.softmax(3 * logits).max())
        return F.cross_entropy(logits, batch[1])


class WithOutput(nn.Module):
    """Wraps what a network returns."""

    def __init__(self, network, wrap):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, images):
        return self.wrap(self.network(images))


class _Wraps(Plain):
    def __init__(self):
        super().__init__()
        self.wrapper = WithOutput(self.model, self.wrap)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits_of(self.wrapper(batch[0])), batch[1])


class ReturnsAuxiliaryLogits(_Wraps):
    """As Inception and GoogLeNet do."""

    @staticmethod
    def wrap(logits):
        return logits, 2 * logits

    @staticmethod
    def logits_of(output):
        return output[0]


class ReturnsAuxiliaryLogitsByName(_Wraps):
    """The auxiliary ones first."""

    @staticmethod
    def wrap(logits):
        return {"aux_logits": 2 * logits, "logits": logits}

    @staticmethod
    def logits_of(output):
        return output["logits"]


class ReturnsAnOutputObject(_Wraps):
    """As transformers do."""

    @staticmethod
    def wrap(logits):
        return ImageClassifierOutput(loss=None, logits=logits)

    @staticmethod
    def logits_of(output):
        return output.logits


class TakesDicts(Plain):
    def training_step(self, batch, batch_idx):
        assert set(batch) == {"image", "label"}
        return F.cross_entropy(self(batch["image"]), batch["label"])


STUDENTS = [
    Plain,
    ReturnsDict,
    CallsSubmodule,
    CallsForwardOnly,
    HasLossHelper,
    TakesNoIndex,
    TakesOtherNames,
    NeedsTrainer,
    ReturnsProbabilities,
    HasSoftmaxForAMetric,
    ReturnsAuxiliaryLogits,
    ReturnsAuxiliaryLogitsByName,
    ReturnsAnOutputObject,
    TakesDicts,
]


def fit(module, matching, batch_keys=None, **options):
    data = D4MDataModule(Squares(), train_on="real", batch_size=6, batch_keys=batch_keys)
    trainer = quiet_trainer(callbacks=[matching], **({"max_epochs": 2} | options))
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def teacher():
    """Knows the squares by their mean colour."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Teacher(network, Squares().classes, 16, Squares.mean, Squares.std)


def trained_by_hand(
    network,
    teachers,
    data,
    mixing,
    loss_of,
    epochs=2,
    accumulate=1,
    clip=None,
    autocast=False,
    shuffle=True,
    after_step=lambda step: None,
):
    """Train a network as TeacherMatching should, in plain PyTorch."""
    loader = data.train_dataloader()
    if not shuffle:
        loader = DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
    steps = itertools.count()
    first = copy.deepcopy(list(network.parameters()))
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    torch.manual_seed(1)
    for _ in range(epochs):
        for index, (pixels, labels) in enumerate(loader):
            mixed = MIXINGS[mixing](data.augmented(pixels))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                student = network(mixed.images)
            logits = [teacher(data.to_unit_range(mixed.images)) for teacher in teachers]
            (loss_of(student, logits, mixed, labels) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip:
                    assert nn.utils.clip_grad_norm_(network.parameters(), clip) > clip
                optimizer.step()
                optimizer.zero_grad()
                after_step(next(steps))
    assert max((now - before).abs().max() for now, before in zip(network.parameters(), first, strict=True)) > 1e-4
    return network


def the_papers_loss(student, teachers, mixed, labels):
    return matching_loss(student, torch.stack([soften(logits, 4.0) for logits in teachers]).mean(0), 4.0)


def squares_to_train_on():
    return D4MDataModule(Squares(), train_on="real", batch_size=6)


def assert_same_weights(ours, reference):
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("student", STUDENTS)
def test_training_any_student_equals_a_plain_loop(teacher, student):
    torch.manual_seed(0)
    module = student()
    by_hand = copy.deepcopy(module.model)
    keys = ("image", "label") if student is TakesDicts else None
    fit(module, TeacherMatching(teacher, temperature=4.0), batch_keys=keys)
    trained_by_hand(by_hand, [teacher], squares_to_train_on(), "cutmix", the_papers_loss)
    assert_same_weights(module.model, by_hand)
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("mixing", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize(
    ("options", "loss_of"),
    [
        ({}, lambda s, t, mixed, y: matching_loss(s, soften(t[0], 4.0), 4.0)),
        ({"scale_by_temperature": True}, lambda s, t, mixed, y: 16 * matching_loss(s, soften(t[0], 4.0), 4.0)),
        ({"loss": "mse"}, lambda s, t, mixed, y: ((s - t[0]) ** 2).mean()),
        (
            {"hard_label_weight": 0.3},
            lambda s, t, mixed, y: (
                matching_loss(s, soften(t[0], 4.0), 4.0)
                + 0.3 * mixed.share * F.cross_entropy(s, y)
                + 0.3 * (1 - mixed.share) * F.cross_entropy(s, y[mixed.permutation])
            ),
        ),
    ],
    ids=["kl", "kl times T²", "mse", "with hard labels"],
)
def test_each_loss_and_mixing_equals_a_plain_loop(teacher, mixing, options, loss_of):
    torch.manual_seed(0)
    module = Plain()
    by_hand = copy.deepcopy(module.model)
    fit(module, TeacherMatching(teacher, temperature=4.0, mixing=mixing, **options))
    trained_by_hand(by_hand, [teacher], squares_to_train_on(), mixing, loss_of)
    assert_same_weights(module.model, by_hand)


def test_several_teachers_are_averaged(teacher):
    torch.manual_seed(0)
    module, other = (
        Plain(),
        Teacher(nn.Sequential(teacher.model, nn.Linear(3, 3)), Squares().classes, 16, Squares.mean, Squares.std),
    )
    nn.init.eye_(other.model[1].weight)
    by_hand = copy.deepcopy(module.model)
    fit(module, TeacherMatching([teacher, other], temperature=4.0))
    trained_by_hand(by_hand, [teacher, other], squares_to_train_on(), "cutmix", the_papers_loss)
    assert_same_weights(module.model, by_hand)


@pytest.mark.parametrize("keys", [None, ("image", "label")])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_stored_logits_equal_a_plain_loop(teacher, squares, tmp_path, monkeypatch, keys, loss):
    distill(squares, Recipe(ipc=3, num_inference_steps=2), output=tmp_path / "set")
    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    stored = relabel(tmp_path / "set", squares)
    pixels = stored.images / 255
    torch.testing.assert_close(stored.logits, teacher(pixels).half().float())

    torch.manual_seed(0)
    module = TakesDicts() if keys else Plain()
    by_hand = copy.deepcopy(module.model)
    options = {"batch_size": 3, "set_folder": tmp_path / "set"}
    data = D4MDataModule(squares, batch_keys=keys, **options)
    torch.manual_seed(1)
    matching = TeacherMatching("stored", temperature=4.0, loss=loss)
    quiet_trainer(max_epochs=2, callbacks=[matching]).fit(module, datamodule=data)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR)
    data = D4MDataModule(squares, **options)
    data.give_logits(True)
    torch.manual_seed(1)
    for _ in range(2):
        for images, _, logits in data.train_dataloader():
            mixed = MIXINGS["cutmix"](data.augmented(images))
            student = by_hand(mixed.images)
            if loss == "kl":
                matching_loss(student, mixed.values((logits / 4).softmax(1)), 4.0).backward()
            else:
                ((student - mixed.values(logits)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(module.model, by_hand)


def test_stored_logits_need_a_set_that_has_them(squares, tmp_path):
    distill(squares, Recipe(ipc=3, num_inference_steps=2), output=tmp_path / "set")
    for data in (D4MDataModule(squares), D4MDataModule(squares, set_folder=tmp_path / "set")):
        with pytest.raises(InputError, match=r"'stored', which needs a distilled set .* `d4m relabel FOLDER`"):
            quiet_trainer(max_epochs=1, callbacks=[TeacherMatching("stored")]).fit(Plain(), datamodule=data)


def test_the_modules_metrics_get_integer_labels(teacher):
    module = Plain()
    trainer = fit(module, TeacherMatching(teacher))
    labels = torch.cat(module.labels)
    assert labels.dtype == torch.int64
    assert labels.shape == (36,)
    assert set(labels.tolist()) <= {0, 1, 2}
    assert {"train_acc", "matching_loss"} <= set(trainer.callback_metrics)


class Notes(Plain):
    """Notes the images of each step, and draws random numbers there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0])
        return super().training_step(batch, batch_idx) + 0 * torch.rand(())


def test_the_modules_metrics_get_the_labels_of_the_larger_parts(teacher, monkeypatch):
    monkeypatch.setitem(MIXINGS, "cutmix", lambda images: Mixed(images, torch.arange(len(images)).flip(0), 0.2))
    module = Notes()
    fit(module, TeacherMatching(teacher))
    for images, labels in zip(module.seen, module.labels, strict=True):
        assert torch.equal(labels.flip(0), images.mean((2, 3)).argmax(1))  # each square is of its class's colour


def test_what_is_logged_is_the_loss_and_what_the_step_returns_stays(teacher):
    torch.manual_seed(0)
    module, losses, returned = ReturnsDict(), [], []
    by_hand = copy.deepcopy(module.model)

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            returned.append(
                (outputs["extra"], outputs["loss"].item(), trainer.callback_metrics["matching_loss"].item())
            )

    data = squares_to_train_on()
    trainer = quiet_trainer(callbacks=[TeacherMatching(teacher, temperature=4.0), Looks()], max_epochs=1)
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)

    def loss_of(*given):
        losses.append(the_papers_loss(*given))
        return losses[-1]

    trained_by_hand(by_hand, [teacher], squares_to_train_on(), "cutmix", loss_of, epochs=1)
    assert returned == [(1, pytest.approx(loss.item()), pytest.approx(loss.item())) for loss in losses]


def test_the_batches_are_the_same_whatever_the_teacher_and_the_trial_draw(teacher, monkeypatch):
    def seen():
        torch.manual_seed(0)
        module = Notes()
        fit(module, TeacherMatching(teacher))
        return torch.cat(module.seen)

    plain, own = seen(), teacher_matching.tried_teacher
    with monkeypatch.context() as patch:
        patch.setattr(teacher_matching, "tried_teacher", lambda *args: (torch.rand(3), own(*args))[1])
        assert torch.equal(seen(), plain)
    monkeypatch.setattr(TeacherMatching, "_tried", lambda *_: "")
    assert torch.equal(seen(), plain)


def test_validating_needs_no_teacher():
    class Validates(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    trainer = quiet_trainer(callbacks=[TeacherMatching("none.ckpt")])
    assert trainer.validate(Validates(), datamodule=squares_to_train_on(), verbose=False)[0]["val_loss"] > 0


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


def test_stored_logits_are_gone_from_the_next_fit(teacher, squares, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    distill(squares, Recipe(ipc=2, num_inference_steps=2), output=tmp_path / "set")
    relabel(tmp_path / "set", squares)
    data = D4MDataModule(squares, set_folder=tmp_path / "set")
    for matching in (TeacherMatching("stored"), TeacherMatching(None)):
        quiet_trainer(max_epochs=1, callbacks=[matching]).fit(Plain(), datamodule=data)


class LooksFirst(Plain):
    """Runs itself for a metric, and a frozen copy, before the pass that it learns by."""

    def __init__(self):
        super().__init__()
        self.old = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0])
        self.old(batch[0])
        return super().training_step(batch, batch_idx)


def test_the_pass_with_gradients_is_the_one_that_counts(teacher):
    module = LooksFirst()
    network = copy.deepcopy(module.model)
    fit(module, TeacherMatching(teacher, temperature=4.0))
    trained_by_hand(network, [teacher], squares_to_train_on(), "cutmix", the_papers_loss)
    assert_same_weights(module.model, network)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_may_skip_a_batch(teacher):
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    assert "matching_loss" in fit(Skips(), TeacherMatching(teacher)).callback_metrics


def test_two_callbacks_are_refused_and_leave_the_module_alone(teacher):
    module = Plain()
    trainer = quiet_trainer(max_epochs=1, callbacks=[TeacherMatching(teacher), TeacherMatching(teacher)])
    with pytest.raises(InputError, match="two callbacks are TeacherMatching"):
        trainer.fit(module, datamodule=squares_to_train_on())
    assert "training_step" not in vars(module)


def test_a_seed_gives_the_same_batches_whatever_the_teacher(teacher):
    seen = []

    class Notes(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    for each in (teacher, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), None):
        fit(Notes(), TeacherMatching(each, mixing="none"), max_epochs=1)
    seen = [total for total in seen if total]  # not the black images that a step is tried on
    assert seen[:3] == seen[3:6] == seen[6:]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_whole_precisions_train(teacher, precision):
    assert fit(Plain(), TeacherMatching(teacher), precision=precision).global_step == 6


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in both")
def test_a_modules_own_hook_for_batches_runs(teacher):
    class Mirrors(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append(batch[0])
            return batch[0].flip(3), batch[1]

        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    seen = []
    fit(Mirrors(), TeacherMatching(teacher, mixing="none"), max_steps=1)
    assert torch.equal(seen[-2].flip(3), seen[-1])


@pytest.mark.filterwarnings("ignore:You have overridden `.*` in")
def test_no_hook_of_a_module_meets_stored_logits(teacher, squares, tmp_path, monkeypatch):
    class Unpacks(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            return images, labels

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            images, labels = batch
            return images.to(device), labels.to(device)

        def on_train_batch_start(self, batch, batch_idx):
            _images, _labels = batch

        def on_train_batch_end(self, outputs, batch, batch_idx):
            _images, _labels = batch

    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    distill(squares, Recipe(ipc=2, num_inference_steps=2), output=tmp_path / "set")
    relabel(tmp_path / "set", squares)
    data = D4MDataModule(squares, set_folder=tmp_path / "set")
    module = Unpacks()
    quiet_trainer(max_epochs=1, callbacks=[TeacherMatching("stored")]).fit(module, datamodule=data)
    assert len(module.labels) == 1


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in both")
@pytest.mark.parametrize("keys", [None, ("image", "label")])
def test_a_modules_own_hook_sees_no_stored_logits_and_may_add_to_the_batch(
    teacher, squares, tmp_path, monkeypatch, keys
):
    class Adds(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch.values() if keys else batch
            more = images.mean()
            return {**batch, "mean": more} if keys else (images, labels, more)

        def training_step(self, batch, batch_idx):
            images, labels, mean = batch.values() if keys else batch
            seen.append((images.mean(), mean))
            return super().training_step((images, labels), batch_idx)

    seen = []
    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    distill(squares, Recipe(ipc=2, num_inference_steps=2), output=tmp_path / "set")
    relabel(tmp_path / "set", squares)
    for matching in (TeacherMatching("stored", mixing="none"), TeacherMatching(teacher, mixing="none")):
        data = D4MDataModule(squares, set_folder=tmp_path / "set", batch_keys=keys)
        quiet_trainer(max_epochs=1, callbacks=[matching]).fit(Adds(), datamodule=data)
    assert len(seen) == 4  # each module's trial, and a batch
    assert all(images == mean for images, mean in seen)


def test_a_set_whose_labelling_was_cut_off_is_as_it_was_or_has_no_stored_logits(
    teacher, squares, tmp_path, monkeypatch
):
    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    monkeypatch.setattr("d4m_plugin.distilled.SHARD", 1)
    monkeypatch.setattr("d4m_plugin.distillation.BLOCK", 2)
    distill(squares, Recipe(ipc=2, num_inference_steps=2), output=tmp_path / "set")
    relabel(tmp_path / "set", squares)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    write, written = pq.write_table, []

    def killed_at_the_third(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("d4m_plugin.relabelling.pq.write_table", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            relabel(tmp_path / "set", squares)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("d4m_plugin.relabelling.checksum", None)
        with pytest.raises(TypeError):
            relabel(tmp_path / "set", squares)
    assert DistilledDataset(tmp_path / "set").logits is None
    assert relabel(tmp_path / "set", squares).logits is not None


def test_labelling_takes_nothing_else_that_lies_in_the_folder_for_the_sets(teacher, squares, tmp_path, monkeypatch):
    monkeypatch.setattr("d4m_plugin.teachers.load_teacher", lambda *_: teacher)
    made = distill(squares, Recipe(ipc=2, num_inference_steps=2), output=tmp_path / "set")
    (made.folder / ".ipynb_checkpoints").mkdir()
    (made.folder / ".train-00000-of-00001.parquet.host.123").touch()  # of one that was killed
    (made.folder / "prototypes.safetensors").write_bytes(b"damaged since")
    found = relabel(tmp_path / "set", squares).metadata["checksums"]
    changed = {name for name in found if found[name] != made.metadata["checksums"].get(name)}
    assert changed == {"train-00000-of-00001.parquet"}
    assert found.keys() == made.metadata["checksums"].keys()


def test_the_teacher_sees_the_batch_whatever_the_step_does_to_it_in_place(teacher, squares, tmp_path):
    class InPlace(Plain):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            loss = super().training_step((-images.neg_(), labels), batch_idx)
            labels.zero_()
            return loss

    module = Plain()
    in_place = InPlace()
    in_place.load_state_dict(module.state_dict())
    for each in (module, in_place):
        fit(each, TeacherMatching(teacher, mixing="none", hard_label_weight=1.0))
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), in_place.parameters(), strict=True))


def test_a_step_that_fails_by_itself_is_told_before_the_long_work(teacher):
    class Slip(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), nothing)  # noqa: F821  # the slip that is to be told

    with (
        pytest.warns(InputWarning, match=r"step of Slip, .* failed \(NameError: name 'nothing' is not defined\)"),
        pytest.raises(NameError),
    ):
        fit(Slip(), TeacherMatching(teacher))

    class MadeLate(Plain):
        def on_train_start(self):
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    class ReadsTheTuple(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            assert images.dtype == torch.uint8
            return images, labels

        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    with warnings.catch_warnings(action="error", category=InputWarning):
        fit(NeedsTrainer(), TeacherMatching(teacher))
        fit(MadeLate(), TeacherMatching(teacher))
        fit(ReadsTheTuple(), TeacherMatching(teacher), batch_keys=("image", "label"))


@pytest.mark.filterwarnings("ignore:a trial of the training step of Fails")
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


def test_the_student_can_be_named(teacher):
    assert "matching_loss" in fit(CallsSubmodule(), TeacherMatching(teacher, student="model")).callback_metrics


@pytest.mark.parametrize("student", [CallsSubmodule, TakesNoIndex, TakesOtherNames])
def test_a_named_student_that_gives_no_logits_is_an_error_before_training(teacher, student):
    with pytest.raises(InputError, match=r"saw no logits of shape \(2, 3\) returned by its submodule 'model.1' .* set"):
        fit(student(), TeacherMatching(teacher, student="model.1"))


def test_logits_that_go_missing_while_training_are_an_error(teacher):
    with pytest.raises(InputError, match=r"saw no logits of shape \(6, 3\) .* set `student`"):
        fit(NeedsTrainer(), TeacherMatching(teacher, student="model.1"))


def test_logits_that_no_module_returns_are_an_error(teacher):
    class Functional(Plain):
        def training_step(self, batch, batch_idx):
            hidden = self.model[1](batch[0].flatten(1))
            return F.cross_entropy(F.linear(hidden, self.model[3].weight), batch[1])

    with pytest.raises(
        InputError, match=r"returned by it or a submodule of it in the training step of Functional; set"
    ):
        fit(Functional(), TeacherMatching(teacher))


def test_trying_a_step_leaves_module_and_random_state_alone(teacher):
    module = Plain()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    data = D4MDataModule(Squares(), train_on="real")
    assert TeacherMatching(teacher)._tried(module, data) == ""
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

    class Late(Plain):
        def setup(self, stage):
            self.automatic_optimization = False

    with pytest.raises(InputError, match="Late has `automatic_optimization` set to False"):
        fit(Late(), TeacherMatching(teacher))


def test_other_data_is_refused(teacher):
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([])

    with pytest.raises(InputError, match="needs a D4MDataModule as `data`; it is Other"):
        quiet_trainer(max_epochs=1, callbacks=[TeacherMatching(teacher)]).fit(Plain(), datamodule=Other())


@pytest.mark.parametrize("student", [None, "model", "modl"])
def test_layers_may_be_built_late_and_named(teacher, student):
    class Late(CallsSubmodule):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            self.model = Plain().model

    if student == "modl":
        with pytest.raises(InputError, match="`student` is 'modl', which Late does not have; it has model"):
            fit(Late(), TeacherMatching(teacher, student=student))
    else:
        trainer = fit(Late(), TeacherMatching(teacher, student=student))
        assert trainer.global_step == 6
        assert "matching_loss" in trainer.callback_metrics


def test_of_layers_built_late_the_named_ones_learn_from_the_first_step_on(teacher):
    class Late(Plain):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            self.model, self.other = Plain().model, Plain().model
            self.first = copy.deepcopy(self.other.state_dict())

        def training_step(self, batch, batch_idx):
            self.other(batch[0])
            return F.cross_entropy(self.model(batch[0]), batch[1])

    module = Late()
    fit(module, TeacherMatching(teacher, student="model"), max_steps=1)
    assert all(torch.equal(weight, module.first[name]) for name, weight in module.other.state_dict().items())


def test_a_teacher_at_chance_is_refused(teacher):
    shuffled = Teacher(teacher.model, ["green / blue", "ünï 🦆", "red"], 16, Squares.mean, Squares.std)
    with pytest.raises(
        InputError, match=r"`teacher` names 0% of 12 real test images .* from 67% on it is told from chance \(33%\)"
    ):
        fit(Plain(), TeacherMatching(shuffled))


def test_an_unknown_mixing_is_refused():
    with pytest.raises(InputError, match="`mixing` is 'cutmux'; use cutmix, mixup, none"):
        TeacherMatching(mixing="cutmux")


@pytest.mark.parametrize("teacher", ["", [], ()])
def test_an_empty_teacher_is_told(teacher):
    with pytest.raises(InputError, match="name one, or null for the labels alone"):
        TeacherMatching(teacher)


@pytest.mark.parametrize("option", ["temperature", "hard_label_weight"])
def test_infinite_options_are_refused(option):
    with pytest.raises(InputError, match=f"`{option}` is inf"):
        TeacherMatching(**{option: float("inf")})


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
    options = {"max_epochs": 2, "limit_val_batches": 0, "precision": trainer_precision()}
    trainer = quiet_trainer(callbacks=[TeacherMatching()], **options)
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] > 0.7


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
        ({"gradient_clip_val": 0.03}, {"clip": 0.03}),
        ({"precision": "bf16-mixed"}, {"autocast": True}),
        ({"precision": "16-mixed"}, {"autocast": True}),  # on a CPU Lightning makes it bfloat16
        ({"max_epochs": 5, "overfit_batches": 3}, {"epochs": 5, "shuffle": False}),
    ],
    ids=["accumulation", "clipping", "bf16", "fp16", "overfit_batches"],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:You passed `Trainer")
def test_the_trainers_own_options_equal_a_plain_loop(teacher, options, by_hand):
    torch.manual_seed(0)
    module = Plain()
    network = copy.deepcopy(module.model)
    fit(module, TeacherMatching(teacher, temperature=4.0), **options)
    trained_by_hand(network, [teacher], squares_to_train_on(), "cutmix", the_papers_loss, **by_hand)
    assert_same_weights(module.model, network)


class Checkpoints(Plain):
    """Computes its hidden layer again in the backward pass."""

    def forward(self, images):
        return self.model[2:](checkpoint(self.model[:2], images, use_reentrant=False))


CAPTURED = "aot_eager"  # what torch.compile captures, forward and backward; no code is made of it, which takes long


class Compiles(Plain):
    def __init__(self):
        super().__init__()
        self.model.compile(backend=CAPTURED)


class CompilesASubmodule(CallsSubmodule):
    def __init__(self):
        super().__init__()
        self.model.compile(backend=CAPTURED)


class HoldsACompiledNetwork(CallsSubmodule):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(self.model, backend=CAPTURED)


@pytest.mark.parametrize("student", [Checkpoints, Compiles, CompilesASubmodule, HoldsACompiledNetwork])
def test_checkpointed_and_compiled_students_equal_a_plain_loop(teacher, student):
    torch.manual_seed(0)
    module = student()
    network = Plain().model
    network.load_state_dict({name.removeprefix("_orig_mod."): w for name, w in module.model.state_dict().items()})
    fit(module, TeacherMatching(teacher, temperature=4.0))
    trained_by_hand(network, [teacher], squares_to_train_on(), "cutmix", the_papers_loss)
    assert_same_weights(module.model, network)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # asked for by torch.compile itself
@pytest.mark.parametrize("student", [Plain, CallsSubmodule])
def test_a_compiled_lightning_module_equals_a_plain_loop(teacher, student):
    torch.manual_seed(0)
    module = student()
    network = copy.deepcopy(module.model)
    fit(torch.compile(module, backend=CAPTURED), TeacherMatching(teacher, temperature=4.0))
    trained_by_hand(network, [teacher], squares_to_train_on(), "cutmix", the_papers_loss)
    assert_same_weights(module.model, network)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(teacher, tmp_path):
    def run(epochs, resume=None):
        torch.manual_seed(0)
        module = Plain()
        # All images in each batch and no chance in it, since Lightning keeps no random state.
        data = D4MDataModule(Squares(), train_on="real", batch_size=18, crop_scale=(1.0, 1.0), flip=False)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[TeacherMatching(teacher, mixing="none")])
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module, trainer

    whole, _ = run(4)
    _, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, tmp_path / "half.ckpt")
    assert_same_weights(resumed, whole)


def test_a_compiled_teacher_teaches_the_same(teacher):
    def trained(**options):
        torch.manual_seed(0)
        module = Plain()
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        fit(module, TeacherMatching(Teacher(network, Squares().classes, 16, Squares.mean, Squares.std), **options))
        return module, network

    module, network = trained(compile_teacher=True)
    assert network._compiled_call_impl is not None
    assert_same_weights(module, trained()[0])


def test_averaged_weights_are_the_average_of_a_plain_loops(teacher):
    torch.manual_seed(0)
    module = Plain()
    network = copy.deepcopy(module.model)
    averaged = copy.deepcopy(module.model)
    matching = TeacherMatching(teacher, temperature=4.0)
    data = squares_to_train_on()
    trainer = quiet_trainer(max_epochs=2, callbacks=[matching, EMAWeightAveraging(decay=0.5)])
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)

    def average(step):
        for mean, now in zip(averaged.parameters(), network.parameters(), strict=True):
            mean.data = now.detach().clone() if step == 0 else mean.lerp(now, 0.5)

    trained_by_hand(network, [teacher], squares_to_train_on(), "cutmix", the_papers_loss, after_step=average)
    assert_same_weights(module.model, averaged)
    pickle.loads(pickle.dumps(module))


RUN_IN_TWO_PROCESSES = """
import sys
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tests.test_datamodule import quiet_trainer
from tests.test_teacher_matching import Plain, Sharded, matching_of_colours, still_squares

if __name__ == "__main__":
    kind = sys.argv[2]
    torch.manual_seed(0)
    module = Sharded() if kind == "sharded" else Plain()
    if kind == "unused":
        module.unused = torch.nn.Linear(1, 1)
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = quiet_trainer(
        max_epochs=2,
        callbacks=[matching_of_colours()],
        accelerator="cpu",
        devices=2,
        strategy=sharded if kind == "sharded" else "ddp",
    )
    trainer.fit(module, datamodule=still_squares())
    weights = get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True))
    if trainer.is_global_zero:
        torch.save(weights, sys.argv[1])
"""


class Sharded(Plain):
    """Weights, gradients and optimiser state in parts, one a process (FSDP2; Lightning keeps FSDP1 for GPUs)."""

    def configure_model(self):
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def still_squares():
    """Batches that depend on their order alone."""
    return D4MDataModule(Squares(), train_on="real", batch_size=3, crop_scale=(1.0, 1.0), flip=False)


def matching_of_colours():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classes, mean, std = Squares().classes, Squares.mean, Squares.std
    return TeacherMatching(Teacher(network, classes, 16, mean, std), temperature=4.0, mixing="none")


@pytest.fixture
def in_two_processes(forks, tmp_path):
    """Runs the script in a process, where Lightning starts a second one."""
    script = tmp_path / "two.py"
    script.write_text(RUN_IN_TWO_PROCESSES)
    return lambda kind: forks.run(script, tmp_path / "weights.pt", kind, folder=tmp_path)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_equal_a_plain_loop_over_the_batches_of_both(in_two_processes, teacher, tmp_path, kind):
    result = in_two_processes(kind)
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    network = Plain().model
    data = still_squares()
    held = data.train_dataloader().dataset
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    samplers = [DistributedSampler(held, 2, rank, shuffle=True, seed=0) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [torch.tensor(list(sampler)).split(3) for sampler in samplers]
        for both in zip(*orders, strict=True):
            for chosen in both:
                images = data.normalised(held.tensors[0][chosen])
                softened = soften(teacher(data.to_unit_range(images)), 4.0)
                (matching_loss(network(images), softened, 4.0) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(trained[name], weight)


@pytest.fixture
def alone_in_a_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (DistributedDataParallel, True),
        (partial(DistributedDataParallel, find_unused_parameters=True), False),
        (partial(DistributedDataParallel, static_graph=True), False),
        (nn.Sequential, False),  # as DeepSpeed's engine, which takes the gradients away
    ],
)
def test_parameters_are_missed_where_processes_would_wait_for_them(alone_in_a_group, wrap, told):
    matching, plain = TeacherMatching(None), Plain()
    matching._restore = lambda: None
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=wrap(plain)), global_step=0)
    with pytest.raises(InputError, match="4 parameters of Plain") if told else nullcontext():
        matching.on_after_backward(trainer, plain)


def test_parameters_without_a_part_in_the_logits_are_named_under_ddp(in_two_processes):
    result = in_two_processes("unused")
    assert result.returncode != 0
    assert (
        "2 parameters of Plain have no part in its logits, such as 'unused.weight'; set `strategy` "
        "(`--trainer.strategy`) to ddp_find_unused_parameters_true." in result.stderr
    )
