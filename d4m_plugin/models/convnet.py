"""The ConvNet of dataset distillation."""

from collections import OrderedDict

from torch import nn


class ConvNet(nn.Sequential):
    """Blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear layer.

    Gidaris and Komodakis, arXiv:1804.09458; Zhao et al., arXiv:2006.05929, where depth 3 and width 128 became the
    field's standard for 32x32 images.

    Args:
        num_classes: size of the output.
        image_size: edge in pixels of the input, at least 2**depth.
        width: channels of each block.
        depth: number of blocks.
    """

    def __init__(self, num_classes: int, image_size: int = 32, width: int = 128, depth: int = 3) -> None:
        channels = [3, *[width] * depth]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            (f"block{i + 1}", _block(channels[i], channels[i + 1])) for i in range(depth)
        )
        edge = image_size // 2**depth
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(width * edge**2, num_classes))
        super().__init__(OrderedDict(features=nn.Sequential(blocks), classifier=classifier))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(outputs, outputs),  # one channel a group: instance norm with scale and shift
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
    )
