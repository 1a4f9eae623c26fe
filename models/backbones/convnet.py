"""A small convolutional classifier: the eyes of an evaluation where no pretrained features are at hand.

Its features are those of the third convolution. The layers after it decide the class, and are blind to blur:
to them the mean of all sevens is a perfect seven (see the experiments in CHANGELOG.md).
"""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three strided convolutions (the features), a fourth, a hidden layer and class scores."""

    kind = "classifier"

    def __init__(
        self, *, channels: int = 3, width: int = 32, hidden: int = 64, num_classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.quarters = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.num_features = 4 * 2 * width
        self.decision = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            self.quarters,
            nn.Linear(self.num_features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_classes),
        )

    def features(self, pictures: Tensor) -> Tensor:
        """Return features (B, num_features) of pictures (B, C, H, W) in [-1, 1], averaged over quarters."""
        return self.quarters(self.body(pictures))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the class scores (B, num_classes)."""
        return self.decision(self.body(pictures))
