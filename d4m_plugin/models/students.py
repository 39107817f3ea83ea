"""Students by name."""

from typing import Any

import torch
import torchvision
from torch import nn

from d4m_plugin.errors import InputError
from d4m_plugin.models.convnet import ConvNet

SMALL_IMAGE = 64  # pixels; up to here the stem of an ImageNet model would leave too little to see


def create_student(name: str, num_classes: int, image_size: int) -> nn.Module:
    """Return an untrained classifier.

    Args:
        name: `convnet`, or a classifier of torchvision such as `resnet18`.
        num_classes: size of the output.
        image_size: edge in pixels of the input. Up to 64, a torchvision model whose first convolution shrinks the
            image gets stride 1 there; a ResNet gets a 3x3 one with no pooling after it, as is usual for CIFAR.

    Raises:
        InputError: where there is no such classifier, or its layers leave nothing of an image of that size.
    """
    if name == "convnet":
        if image_size < 8:
            raise InputError(f"`image_size` is {image_size}; a convnet, which halves it three times, needs at least 8.")
        return ConvNet(num_classes, image_size)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"`student` is {name!r}; use convnet or a torchvision classifier such as resnet18.")
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        student: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        if image_size <= SMALL_IMAGE:
            _keep_small_images(student)
            with torch.no_grad():
                student.eval()(torch.zeros(1, 3, image_size, image_size))
    except NotImplementedError:  # on the meta device, of a RegNet, which computes its widths
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"`student` is {name!r}, which cannot take images of {image_size} pixels: {error}") from error
    return student.train()


def _keep_small_images(student: nn.Module) -> None:
    if isinstance(student, torchvision.models.ResNet):
        # He et al., arXiv:1512.03385, section 4.2: CIFAR's ResNets start with one 3x3 convolution of stride 1.
        student.conv1 = nn.Conv2d(3, student.conv1.out_channels, 3, padding=1, bias=False)
        student.maxpool = nn.Identity()
        return
    first = next(module for module in student.modules() if isinstance(module, nn.Conv2d))
    if first.kernel_size[0] > first.stride[0]:  # not the patches of a transformer
        first.stride = (1, 1)
