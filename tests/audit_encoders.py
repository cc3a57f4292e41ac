"""Networks for audits in tests: one that hides the image in a channel, one that says nothing, an honest one."""

import torch
from torch import nn


class Leak(nn.Module):
    """Seven loud channels that do not depend on the image, and the image's luma, faintly, in the last."""

    def forward(self, images):
        loud = torch.randn(7, *images.shape[2:], generator=torch.Generator().manual_seed(0)).to(images)
        luma = images.mean(1, keepdim=True) * 1e-3
        return {"features": torch.cat([100 * loud.expand(len(images), -1, -1, -1), luma], 1)}


class Constant(nn.Module):
    """The same features for every image."""

    def forward(self, images):
        return torch.ones(len(images), 4, images.shape[2] // 4, images.shape[3] // 4) + 0 * images.mean()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())
        self.rest = nn.Sequential(
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(32, 20)

    def forward(self, images):
        return self.head(self.rest(self.stem(images)) * 100)


class TwoLayers(nn.Module):
    """Two layers of 8 and 16 channels; what is behind the second raises on images that the first does not mind."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)

    def forward(self, images):
        return self.second(self.first(images).relu()).relu().mean((2, 3))
