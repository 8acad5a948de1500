"""Keeps the colours of a long video from drifting: each frame takes the Lab mean and spread of the first picture.

CIE Lab in float64 from sRGB with the D65 white point (IEC 61966-2-1, CIE 15). A float32 or table-driven Lab is
visibly off over many clips.
"""

import torch
from torch import Tensor

# linear sRGB → XYZ, and the D65 white point that Lab is relative to
_XYZ_FROM_RGB = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
    dtype=torch.float64,
)
_WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)


def match_color(video: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Give every frame the mean and standard deviation of `reference` in each Lab channel.

    video: float32 [3, frames, height, width] in [-1, 1]; reference: float32 [3, height, width] in [-1, 1];
    strength: 0 (unchanged) to 1 (matched fully), blended in RGB → float32 like video. The standard deviation is the
    population's. A channel that is constant over a frame becomes the reference's mean. Reinhard et al. 2001, in Lab.
    """
    if strength == 0:
        return video
    reference_lab = lab_from_rgb(_unit(reference).flatten(1))
    mean = reference_lab.mean(dim=1, keepdim=True)
    std = reference_lab.std(dim=1, keepdim=True, correction=0)
    matched = torch.empty_like(video)
    for index in range(video.shape[1]):  # frame by frame: float64 copies of a whole clip would be large
        frame = _unit(video[:, index])
        lab = lab_from_rgb(frame.flatten(1))
        lab_mean = lab.mean(dim=1, keepdim=True)
        lab_std = lab.std(dim=1, keepdim=True, correction=0)
        scale = torch.where(lab_std == 0, 0.0, std / lab_std)
        rgb = rgb_from_lab((lab - lab_mean) * scale + mean).view_as(frame)
        matched[:, index] = ((1 - strength) * frame + strength * rgb).to(video.dtype) * 2 - 1
    return matched


def _unit(pixels: Tensor) -> Tensor:
    return ((pixels.double() + 1) / 2).clamp(0, 1)


def lab_from_rgb(rgb: Tensor) -> Tensor:
    """[3, pixels] sRGB in [0, 1] → [3, pixels] Lab."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = (_XYZ_FROM_RGB.to(rgb.device) @ linear) / _WHITE.to(rgb.device)[:, None]
    x, y, z = torch.where(xyz > 0.008856, xyz.pow(1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def rgb_from_lab(lab: Tensor) -> Tensor:
    """[3, pixels] Lab → [3, pixels] sRGB, clipped to [0, 1]."""
    y = (lab[0] + 16) / 116
    x = lab[1] / 500 + y
    z = (y - lab[2] / 200).clamp(min=0)
    f = torch.stack([x, y, z])
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * _WHITE.to(lab.device)[:, None]
    linear = torch.linalg.inv(_XYZ_FROM_RGB).to(lab.device) @ xyz
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)
