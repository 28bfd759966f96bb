"""Ground for composed scenes: as bright, rough and streaky as a photograph, and showing nothing.

A photograph's Fourier amplitudes with random phases make a texture with the photograph's mean, variance and
autocorrelation (Galerne, Gousseau, Morel, "Random phase textures", IEEE Transactions on Image Processing 20, 2011). No
threshold on brightness, contrast or frequency then tells a cell from the ground; its outline, busbars and cracks do.
"""

from __future__ import annotations

import numpy
from numpy import ndarray
from numpy.random import Generator


def random_phase(photograph: ndarray, generator: Generator) -> ndarray:
    """A texture with a photograph's amplitudes, [height, width] float64, of the same mean and variance.

    The phases are those of white noise, which have the symmetry that makes the result real.
    """
    noise = numpy.angle(numpy.fft.rfft2(generator.standard_normal(photograph.shape)))
    noise[0, 0] = 0.0  # the mean stays
    amplitude = numpy.abs(numpy.fft.rfft2(photograph.astype(numpy.float64)))
    return numpy.fft.irfft2(amplitude * numpy.exp(1j * noise), s=photograph.shape)


def ground(photograph: ndarray, size: int, generator: Generator) -> ndarray:
    """[size, size] float64: a photograph's texture, lit from one side.

    The texture is periodic, so that it is laid side by side without a seam where the ground is larger than the
    photograph. The light falls off by up to a third from one edge to the other, in a random direction.
    """
    texture = random_phase(photograph, generator)
    repeats = [-(-size // side) for side in texture.shape]
    texture = numpy.tile(texture, repeats)[:size, :size]
    angle, fall = generator.uniform(0, 2 * numpy.pi), generator.uniform(0, 1 / 3)
    rows, columns = numpy.mgrid[:size, :size] / max(1, size - 1) - 0.5
    slope = (columns * numpy.cos(angle) + rows * numpy.sin(angle)) / numpy.sqrt(2)  # in [-1/2, 1/2]
    return texture * (1 + fall * slope)
