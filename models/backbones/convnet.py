"""A small convolutional classifier: the eyes of an evaluation where no pretrained features are at hand."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three strided convolutions, a mean over positions, a hidden layer (the features) and class scores."""

    kind = "classifier"

    def __init__(
        self, *, channels: int = 3, width: int = 32, num_features: int = 64, num_classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU())
        self.hidden = nn.Linear(2 * width * 4, num_features)
        self.scores = nn.Linear(num_features, num_classes)

    def features(self, pictures: Tensor) -> Tensor:
        """Return the features (B, num_features) of pictures (B, channels, H, W) in [-1, 1]."""
        grid = nn.functional.adaptive_avg_pool2d(self.body(pictures), 2)
        return nn.functional.silu(self.hidden(grid.flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the class scores (B, num_classes)."""
        return self.scores(self.features(pictures))
