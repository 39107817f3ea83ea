"""Plain modules around other libraries' networks, as their users write them."""

import lightning as L
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification


class Module(L.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class TimmModule(Module):
    """With a loss helper for both kinds of step."""

    def __init__(self, num_classes: int, name: str = "resnet10t") -> None:
        import timm

        super().__init__()
        self.net = timm.create_model(name, num_classes=num_classes)

    def compute_loss(self, batch, stage):
        images, labels = batch
        logits = self.net(images)
        self.log(f"{stage}_acc", (logits.argmax(1) == labels).float().mean())
        return F.cross_entropy(logits, labels)

    def training_step(self, batch, batch_idx):
        return self.compute_loss(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.compute_loss(batch, "val")


class ViTModule(Module):
    """As transformers' documentation has it: the batch goes in by name, and the loss comes out."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=num_classes, **sizes))

    def training_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def validation_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        self.log("val_acc", (outputs.logits.argmax(1) == batch["labels"]).float().mean())


class ResNetModule(Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=num_classes)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return {"loss": F.cross_entropy(self(images), labels)}

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())


class InceptionModule(ResNetModule):
    """Its network returns an auxiliary head's logits too while training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.model = torchvision.models.googlenet(
            num_classes=num_classes, aux_logits=True, init_weights=False, dropout=0.0, dropout_aux=0.0
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits, first, second = self.model(images)
        return sum(F.cross_entropy(each, labels) for each in (logits, first, second))


class DemoModule(Module):
    """As Lightning's own introduction has it, with layers in place of a network."""

    def __init__(self, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.l1 = nn.Linear(3 * 32 * 32, hidden)
        self.l2 = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.l2(torch.relu(self.l1(x.view(x.size(0), -1))))

    def training_step(self, batch, batch_nb):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return {"loss": loss, "log": {"train_loss": loss.detach()}}

    def validation_step(self, batch, batch_nb):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())
