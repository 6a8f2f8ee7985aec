"""The networks that are measured, named as in docs/PERFORMANCE.md."""

import dataclasses
import math
from typing import Literal

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A network in the authors' layout: the first scale at the image's resolution, a squeeze before
    every other, nothing factored out; bottleneck branches 3×3, 1×1, 3×3 with ELU, ActNorm.

    Attributes:
      kind: what a training step does.
      image_shape: (height, width, channels).
      depths: residual blocks of each scale.
      features: channels inside the branches of each scale.
      batch: images in a step.
      padding: zero channels appended to the image.
      power_steps: power-iteration steps in a training step.
      coeff: norm allowed to each layer.
    """

    kind: Literal["density", "classification"] = "density"
    image_shape: Shape
    depths: tuple[int, ...]
    features: tuple[int, ...]
    batch: int
    padding: int = 0
    power_steps: int = 1
    coeff: float = 0.9

    def scale_shapes(self) -> list[Shape]:
        """The shape in which each scale's blocks see an image."""
        height, width, channels = self.image_shape
        channels += self.padding
        return [(height >> i, width >> i, channels << 2 * i) for i in range(len(self.depths))]

    def convolution_flops(self) -> int:
        """Multiplications and additions in the convolutions of one forward pass of a batch."""
        total = 0
        for (height, width, channels), depth, width_inside in zip(
            self.scale_shapes(), self.depths, self.features, strict=True
        ):
            per_pixel = 2 * 9 * channels * width_inside + width_inside**2
            total += 2 * self.batch * height * width * depth * per_pixel
        return total

    def step_flops(self, num_terms: int) -> int:
        """Floating point operations that one training step has to spend in convolutions.

        A density step: one forward pass, ``num_terms`` Jacobian-vector products, one more along the
        Neumann vector, and for the forward pass and the latter the gradient by input and by
        kernel: 6 + n passes. A classification step: 3. Power iterations and whatever is recomputed
        do not count.
        """
        passes = 6 + num_terms if self.kind == "density" else 3
        return passes * self.convolution_flops()

    def deeper(self, factor: int) -> "Spec":
        """The same network with ``factor`` times as many blocks in each scale."""
        return dataclasses.replace(self, depths=tuple(factor * depth for depth in self.depths))

    @property
    def dim(self) -> int:
        """Dimensions of one image."""
        return math.prod(self.image_shape)


SPECS = {
    "D1": Spec(image_shape=(32, 32, 1), depths=(4, 4, 4), features=(32, 32, 32), batch=32),
    "D2": Spec(image_shape=(32, 32, 3), depths=(8, 8, 8), features=(64, 64, 64), batch=16),
    #: The authors' density model of CIFAR-10; for a GPU.
    "D3": Spec(image_shape=(32, 32, 3), depths=(16, 16, 16), features=(512, 512, 512), batch=128),
    "C": Spec(
        kind="classification",
        image_shape=(32, 32, 3),
        depths=(7, 7, 7),
        features=(32, 64, 128),
        batch=32,
        padding=13,
    ),
    #: To see that a benchmark runs.
    "tiny": Spec(image_shape=(8, 8, 1), depths=(2, 2), features=(8, 8), batch=4),
    "tiny-C": Spec(
        kind="classification",
        image_shape=(8, 8, 1),
        depths=(2, 2),
        features=(8, 8),
        batch=4,
        padding=1,
    ),
}
