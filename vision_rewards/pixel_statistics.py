"""Statistics of the pixels, as probes for artefacts and for rewards being hacked.

None of these says that a picture is good.  Beside a learned reward they show what an optimiser
does to pictures: colours that burn, contrast that creeps up, chequerboards.  Brightness is
``Y = 0.299 R + 0.587 G + 0.114 B`` (ITU-R BT.601).  Of a video the mean over frames is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of

GREY_LEVELS = 255.0  # published thresholds of two of the statistics are in 8-bit grey levels
BT601 = (0.299, 0.587, 0.114)


def luma(pixels: Tensor) -> Tensor:
    """Brightness ``(N, H, W)`` of pixels ``(N, 3, H, W)``."""
    red, green, blue = (w * channel for w, channel in zip(BT601, pixels.unbind(1), strict=True))
    return red + green + blue


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, not infinite (a flat picture is no exception)."""
    return torch.where(x > 0, x, 1.0).sqrt() * (x > 0)


def _variance(x: Tensor) -> Tensor:
    """Variance of each row of ``(N, ...)``, over all its elements (not the sample estimate)."""
    return x.flatten(1).var(1, correction=0)


class PixelStatistic(PixelReward):
    """A number read off each picture or frame: implement :meth:`measure`, set ``info``.

    Attributes:
        smallest: the shorter side, in pixels, below which there is nothing to measure.
        version: changes whenever the formula does.
    """

    smallest = 1
    version = 1

    @property
    def identity(self) -> str:
        """Name, version and settings."""
        return f"{self.info.name}@{self.version}{self._settings()}"

    def _settings(self) -> str:
        return ""

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)`` of pixels ``(N, 3, H, W)`` in [0, 1]."""
        raise NotImplementedError

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Measure pictures, or frames and average; unscored where they are too small."""
        count, side = len(pixels), min(pixels.shape[-2:])
        if side < self.smallest:
            note = f"{self.info.name} needs {self.smallest} pixels a side, the picture has {side}"
            return Reading(pixels.new_full((count,), torch.nan), notes=[note] * count)
        frames = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
        return Reading(self.measure(frames).view(count, -1).mean(1))


class Sharpness(PixelStatistic):
    """Variance of the Laplacian of brightness, in squared 8-bit grey levels.

    ``Var[255 (Y_left + Y_right + Y_up + Y_down - 4 Y)]`` over the pixels that have four
    neighbours (Pech-Pacheco et al. 2000).  Low is blurred; noise is "sharp" as well.
    """

    info = info_of("sharpness")
    smallest = 3

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        y = GREY_LEVELS * luma(pixels)
        beside = y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
        above = y[:, :-2, 1:-1] + y[:, 2:, 1:-1]
        return _variance(beside + above - 4 * y[:, 1:-1, 1:-1])


class Saturation(PixelStatistic):
    """Mean saturation of HSV: ``(max - min) / max`` of the three channels, 0 for black."""

    info = info_of("saturation")

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        high, low = pixels.amax(1), pixels.amin(1)
        lit = high > 0
        return (torch.where(lit, high - low, 0.0) / torch.where(lit, high, 1.0)).mean((1, 2))


class Colorfulness(PixelStatistic):
    """Colourfulness M3 of Hasler and Suesstrunk (2003), in 8-bit units.

    With ``rg = R - G`` and ``yb = (R + G) / 2 - B``: ``sqrt(std_rg^2 + std_yb^2) +
    0.3 sqrt(mean_rg^2 + mean_yb^2)``. The paper calls 15 slightly, 45 averagely, 82 highly and
    109 extremely colourful.
    """

    info = info_of("colorfulness")

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        red, green, blue = (GREY_LEVELS * pixels).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        spread = _root(_variance(rg) + _variance(yb))
        return spread + 0.3 * _root(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2)


class Contrast(PixelStatistic):
    """Root-mean-square contrast: the standard deviation of brightness (Peli 1990), at most 0.5."""

    info = info_of("contrast")

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        return _root(_variance(luma(pixels)))


class GridEnergy(PixelStatistic):
    """Minus the share of high-frequency energy that repeats with the period of a grid.

    Decoders that upsample, and transformers over patches, leave chequerboards and seams whose
    period divides the patch (Odena et al. 2016; Durall et al. 2020).  A pattern of period ``p``
    has energy only at frequencies ``k / p``, the Nyquist frequency among them. With the power
    ``P(u, v)`` of brightness and the power ``w`` of the Laplacian, which evens out the fall of
    natural spectra and makes the mean brightness irrelevant::

        w(u, v) = (4 - 2 cos 2 pi u - 2 cos 2 pi v)^2
        value = - sum_{pu, pv integer} w P / sum w P

    A pure grid is -1; white noise is ``-p^2 / (H W)`` on average; a flat picture is 0. The picture
    is cut to whole periods.

    Args:
        period: of the grid in pixels, at least 2: what one latent pixel or patch covers.

    Raises:
        ValueError: a period below 2.
    """

    info = info_of("grid_energy")
    # Deviations of a ten-thousandth are rounding, not a pattern.
    _DUST = 20 * 1e-8  # mean of w times the variance of such noise

    def __init__(self, *, period: int = 8) -> None:
        super().__init__()
        if period < 2:
            raise ValueError(f"the period of a grid is at least 2 pixels, got {period}")
        self.period = period
        self.smallest = 2 * period

    def _settings(self) -> str:
        return f"-period{self.period}"

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        height, width = (side - side % self.period for side in pixels.shape[-2:])
        power = torch.fft.fft2(luma(pixels[..., :height, :width]), norm="ortho").abs().square()
        u, v = (2 * torch.pi * torch.fft.fftfreq(n, device=pixels.device) for n in (height, width))
        energy = power * (4 - 2 * u.cos()[:, None] - 2 * v.cos()[None, :]) ** 2
        grid = energy[:, :: height // self.period, :: width // self.period]
        return -grid.sum((1, 2)) / (energy.sum((1, 2)) + self._DUST * height * width)


class Clipping(PixelStatistic):
    """Minus the share of pixels that are pure black or pure white in 8 bits."""

    info = info_of("clipping")

    def measure(self, pixels: Tensor) -> Tensor:
        """The statistic ``(N,)``."""
        levels = (GREY_LEVELS * pixels).round()
        crushed, blown = (levels <= 0).all(1), (levels >= GREY_LEVELS).all(1)
        return -(crushed | blown).float().mean((1, 2))
