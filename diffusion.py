# SPDX-License-Identifier: MIT
"""Class-conditional CIFAR-100 diffusion in under 1,000,000 parameters, at most 50,000 steps.

Section 2 of the paper "Modern Methods, Classical Constraints", in one file that reads
from the top:

    python diffusion.py                    train on CIFAR-100 (downloaded if not in ./data)
    python diffusion.py --data shapes      the same on drawn shapes: no download, no GPU
    python diffusion.py sample --classes rose,whale --count 16 --guidance 3
    python diffusion.py interpolate        between pairs of noises and classes
    python diffusion.py neighbours         the training pictures nearest to samples
    python diffusion.py fid                10,000 samples against the 10,000 test pictures
    python diffusion.py schedules          draw the three noise schedules
    python diffusion.py export --weights FILE    the averaged weights, in a small file
    python diffusion.py --help             all settings

Result: the first command ends at a velocity loss of 0.1115 on test pictures, where always
predicting zero gives 0.645 (ten minutes of training on an H200 that a classifier shared at
first, seed 0, 2026-11-27, torch 2.11.0). FID-1280 of the 10,000 samples that it draws at its
end is 2.40, and that of 10,000 training pictures 0.398. FID-1280 is the Fréchet distance in
an earlier layer of the FID network: much smaller than FID, and not to be compared with it
(.github/experiments.md). The averaged weights, in fp16, are in this repository. README.md has
the log and the pictures.

A run writes one folder, runs/diffusion-<data set>. Start the same command again and it goes
on where it stopped. In the modes sample, interpolate, neighbours and fid a setting without a
flag is the checkpoint's, but for classes, out, weights, device, compile and precision.
Where training was given --data shapes or --out, give it to every mode again.

The network predicts the velocity v of a noised picture. It has 960,755 parameters; widths
a, b, c = 48, 96, 144:

    noised picture (B,3,32,32) --conv--> (B,a,32,32)       log-SNR, class --> embedding (B,E)
    inject 1: + embedding, regular convolution    (B,a,32,32) <---------------------'  |
    block                                         (B,a,32,32) --------------------.    |
    halve, 1x1, 2 blocks                          (B,b,16,16) ---------------.    |    |
    halve, 1x1, block, attention                  (B,c, 8, 8)                |    |    |
    inject 2: + embedding, regular convolution    (B,c, 8, 8) <--------------|----|----'
    block, attention, block                       (B,c, 8, 8)                |    |
    1x1, double, +, 2 blocks                      (B,b,16,16) <--------------'    |
    1x1, double, +, 2 blocks                      (B,a,32,32) <-------------------'
    norm, SiLU, conv                              (B,3,32,32) = v

Skips are added, not concatenated as in [28] (our choice): the 1x1 convolution works before
doubling, on a quarter of the positions, and blocks take fewer channels in, so a step costs
less. The embedding also scales and shifts the channels in every block (known as FiLM, or adaptive
GroupNorm), which the paper's design doesn't have: see `modulate` in the settings. Nor does it
shift the noise of training, as `log_snr_shift` does. --recipe paper gives that design, and the
paper's way of sampling.

Map. Sections 1 to 8 are the story; to understand the model read 2 (layers and U-Net), to
understand diffusion 4 (noise), 5 (objective and training loop) and 7 (guidance and sampler);
3 is the data, 6 the validation loss, 8 interpolation and grids. What follows the double line
is support: 9 neighbours, 10 FID, 11 modes, 12 log and pictures, 13 checkpoints, 14 device and
width, 15 drawn shapes, 16 command line.

Shapes in comments: B pictures, C channels, H x W pixels, E width of an embedding.
Symbols: x a picture in [-1,1]; t in [0,1] the time, 0 clean and 1 pure noise; x_t a noised
picture; log_snr, the paper's lambda, how clean it is, which is what the network is told
(the cosine schedule goes from 20, clean, to -20, noise); alpha and sigma the scales of signal
and noise, alpha² + sigma² = 1 (alpha is not DDPM's alpha_t, a ratio of neighbouring alpha²); v
the velocity.
Tags like [2.2] name the paper's section, (1) to (4) its equations; `our choice` marks what it
leaves open. Numbers without a dot are the paper's references:
    [3]  Crowson's Colab, from which the      [24] Improved DDPM (cosine schedule)
         paper's code was adapted             [28] U-Net
    [4]  Crowson's v-diffusion (the splice)   [29] Photorealistic Text-to-Image Diffusion
    [11] Denoising Diffusion Probabilistic         (Imagen: dynamic clipping)
         Models (DDPM)                        [30] Progressive Distillation (velocity)
    [12] Classifier-Free Guidance             [35] Denoising Diffusion Implicit Models (DDIM)
    [19] Understanding Diffusion Objectives   [39] slerp
    [20] Variational Diffusion Models         [42] Attention Is All You Need

For CIFAR-10, replace CIFAR100 by CIFAR10 in the line DATASET = ...: the rest follows from it.
"""
import argparse
import concurrent.futures
import copy
import ctypes
import dataclasses
import datetime
import hashlib
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFont

DATASET = torchvision.datasets.CIFAR100
MAX_PARAMETERS = 1_000_000  # [2.1] fewer than this, asserted right above the training loop
MAX_STEPS = 50_000  # [2.1] gradient updates at most, asserted in the training loop


# --------------------------------------------------------------------------------------
# 1. Settings
# --------------------------------------------------------------------------------------

SCHEDULES = ("cosine", "linear", "spliced")
PRECISIONS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


class UserError(ValueError):
    """What the user can put right, said in the text: `main` prints that alone, and no
    traceback."""


def setting(default, help, low=None, high=None, choices=None):
    """A field of Settings: its default, what --help says, and which values it may
    have."""
    limits = dict(help=help, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass
class Settings:
    """All settings; each is a flag of the command line too. Raises ValueError, with a
    readable message, for a value that its field does not allow.

    The defaults are the paper's design but for `modulate`, `log_snr_shift` and the way of
    sampling. Numbers that it doesn't name are our choice, and so are the optimiser,
    mirroring, clipping of the gradient and the course of the rate, of which it says nothing.
    `recipe` and data="shapes" change the defaults of other fields: see choose_settings.
    """

    # Where pictures come from and results go to.
    data: str = setting("data", "folder of the data set, downloaded if none; or: shapes")
    out: str = setting("", "folder to write to; empty: runs/diffusion-<data set>")
    weights: str = setting("", "file of weights: to draw with, or to export to")
    seed: int = setting(0, "decides weights, data order, noise", 0, 2**31)

    # Where it runs. Each kind of device rounds in its own way and has its own random
    # numbers: there the same seed is another run, and the same sample_seed other samples.
    device: str = setting("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    compile: str = setting("auto", "torch.compile; auto: CUDA", choices=("auto", "on", "off"))
    precision: str = setting("auto", "type of matrix products", choices=("auto", *PRECISIONS))
    log_every: int = setting(50, "steps between lines of progress", 1, MAX_STEPS)
    eval_every: int = setting(1000, "steps between validations; each saves", 1, MAX_STEPS)
    grid_every: int = setting(5000, "steps between grids of samples", 1, MAX_STEPS)

    # How it is trained.
    steps: int = setting(MAX_STEPS, "optimiser steps", 1, MAX_STEPS)
    batch_size: int = setting(256, "pictures per step", 1, 65_536)

    # Validation loss after 840 s of one CPU core, some 890 steps of 64: 0.140 with 2e-3,
    # 0.150 with 1e-3. Not compared at length.
    max_lr: float = setting(2e-3, "peak learning rate, then a cosine to 0", 1e-8, 10.0)
    warm_up: int = setting(500, "steps in which the rate rises; at most a tenth", 1, MAX_STEPS)
    clip_norm: float = setting(1.0, "largest norm of the gradient", 1e-6, 1e6)
    ema: float = setting(0.999, "decay of the averaged weights; rises to it", 0.0, 0.99999)
    label_drop: float = setting(0.1, "share of labels dropped; 0: no guidance", 0.0, 1.0)
    schedule: str = setting("cosine", "noise schedule of training", choices=SCHEDULES)
    timesteps: str = setting("sobol", "how t is drawn", choices=("sobol", "independent"))

    # Not the paper's: training sees somewhat cleaner pictures than the schedule says, by
    # this much; validation and sampling don't. The loss falls on nearly clean pictures, and
    # hardly rises on the noisiest. After 12,000 steps of 32, seeds 0 and 1, FID-1280 of
    # 2,000 samples, drawn as in the paper in 25 steps, is 5.58 and 5.59 with 1, and 6.04 and
    # 6.20 with 0.
    log_snr_shift: float = setting(1.0, "added to log-SNR in training", -10.0, 10.0)

    # The network.
    width: int = setting(0, "channels at 32x32; 0: as many as the budget allows", 0, 512)
    after_injection: str = setting("regular", "after injections", choices=("regular", "separable"))

    # Beyond the paper, and on by default because it helped. Without it width 56 fits,
    # and a step takes a third longer. After 12,000 steps of 32, seed 0, the validation loss
    # is 0.1184 with it and 0.1191 without, and FID-1280 of 2,000 samples, drawn as in the
    # paper in 25 steps, 6.0 and 7.0.
    modulate: str = setting("on", "scale and shift in all blocks", choices=("off", "on"))
    recipe: str = setting("ours", "paper: its network, noise, sampling", choices=("ours", "paper"))

    # From here on: of sampling only, so free to differ from one command to the next.
    sample_schedule: str = setting("same", "of sampling", choices=("same", *SCHEDULES))

    # The paper samples with DDPM's noise (eta = 1), w = 3 and dynamic clipping, and doesn't
    # say in how many steps. These four together score better: FID-1280 of 2,000 samples, of the
    # network that the defaults train, is 3.12 with them, and 3.29 as in the paper in 100
    # steps. They were chosen on networks that had seen fewer pictures. Of one trained with 16
    # per step, sampled in 25 steps, it was 5.13 as in the paper, 5.06 with w = 2, 5.02 with
    # eta = 0.6, 4.97 with w = 2 and no clipping, 4.74 with all three, and 4.66 with 50 steps
    # as well.
    #
    # A network trained less needs guidance more. After 12,000 steps of 32, in 25 steps but
    # otherwise as in the paper, w = 0, 1, 2, 3 gave 8.1, 6.6, 6.1, 6.0; of the network that the
    # defaults train, w = 1, 2, 3 and the rest as here 2.93, 3.12, 3.65. With 2, which stays
    # the default, its pictures are more typical of their class: our classifier recognises
    # 89 %, and 79 % with 1.
    sample_steps: int = setting(50, "denoising steps per sample", 1, 10_000)
    eta: float = setting(0.6, "fresh noise per step; 1: DDPM, 0: DDIM", 0.0, 1.0)
    guidance: float = setting(2.0, "w of Eq. (4); 0: none, -1: no class", -1.0, 100.0)
    clip_x0: str = setting("none", "how x0 is cut", choices=("none", "static", "dynamic"))

    classes: str = setting("", "names or numbers to sample, by commas; empty: all, mixed")
    count: int = setting(64, "pictures to sample", 1, 1_000_000)
    sample_seed: int = setting(0, "decides the noise of samples", 0, 2**31)
    sample_batch: int = setting(250, "samples at once, in multiples of 50", 1, 65_536)
    fid_count: int = setting(10_000, "samples for fid", 2, 50_000)
    inception: str = setting("", "file of the FID network; empty: torch hub's folder")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if self.label_drop == 0 and self.guidance < 0:
            raise UserError("--guidance below 0 needs a --label-drop above 0")
        if self.width % 8 != 0:
            raise UserError(f"--width {self.width} is not a multiple of 8")

    def folder(self):
        """The folder that a run with these settings writes to, as a Path."""
        name = "shapes" if self.data == "shapes" else DATASET.__name__.lower()
        return Path(self.out or f"runs/diffusion-{name}")

    def checkpoint(self):
        """The file with the network to use: `weights`, or what training wrote."""
        return Path(self.weights or self.folder() / "checkpoint.pt")


# These may change when a run is resumed: they touch what is learned by rounding alone,
# and on another kind of device by other random numbers. (The pictures themselves are
# compared by checksum, wherever they lie.)
FREE_TO_CHANGE = (
    "data out weights device compile precision log_every eval_every grid_every recipe "
    "sample_schedule sample_steps eta guidance clip_x0 classes count sample_seed "
    "sample_batch fid_count inception"
).split()

# Defaults for drawn shapes: a small network, minutes on a CPU. The linear schedule dwells
# on high noise, where shapes form. (With `--recipe paper` as well, the paper's sampling
# counts, on this schedule; its dynamic clipping washes out bright colours.)
SHAPES = dict(
    width=24,
    steps=1000,
    batch_size=32,
    max_lr=5e-3,
    warm_up=50,
    ema=0.98,
    eval_every=500,
    schedule="linear",
    log_snr_shift=0.0,
    sample_steps=30,
)

# What `--recipe paper` sets; a flag of the same command still wins. (The number of steps
# is our choice: so much fresh noise needs more of them.)
PAPER = dict(
    modulate="off",
    log_snr_shift=0.0,
    sample_steps=100,
    eta=1.0,
    guidance=3.0,
    clip_x0="dynamic",
)


# --------------------------------------------------------------------------------------
# 2. Layers and U-Net
# --------------------------------------------------------------------------------------


def separable_conv(c_in, c_out):
    """Depthwise-separable 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W).

    Space first, one 3x3 filter per channel, then features, a 1x1 mixture of channels:
    9 * c_in + c_in * c_out weights instead of 9 * c_in * c_out.
    "The majority" of convolutions here [2.2].
    """
    space = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
    features = nn.Conv2d(c_in, c_out, 1)
    return nn.Sequential(space, features)


def regular_conv(c_in, c_out):
    """Regular 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W)."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def sinusoidal_embedding(log_snr, width=64):
    """Sines and cosines of the noise level: (B,) -> (B,width) [42]. [2.2] says "timestep
    embeddings"; what Eq. (4) gives the network is lambda, the log-SNR. So it knows
    nothing of the schedule, and can be sampled on another than it was trained on.

    log_snr is between -20 and 20, and up to 21 in training. Wavelengths go from 3 to 300
    (our choice): the long ones order all levels, the short ones tell neighbours apart.
    """
    low, high = math.log10(0.02), math.log10(2)
    frequency = 10 ** torch.linspace(low, high, width // 2, device=log_snr.device)
    angle = log_snr[:, None].float() * frequency  # (B,width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,H,W) -> (B,C,H,W).

    GroupNorm, not BatchNorm: a batch mixes noise levels, whose statistics have nothing
    in common, and BatchNorm's running averages would be those of the raw weights and
    not of the averaged ones (EMA). This form of block, SiLU, and 8 groups, so that C is
    a multiple of 8, are our choice.

    `conv` is separable_conv or regular_conv. With `e_width`, an embedding (B,e_width)
    scales and shifts the channels after the second norm. (A separable convolution
    follows this too. The paper found one harmful after its injections, see Injection. We
    saw its waves in neither place, but tried the latter in short runs only.)
    """

    def __init__(self, channels, conv, e_width=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = conv(channels, channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = conv(channels, channels)
        self.modulate = nn.Linear(e_width, 2 * channels) if e_width else None

    def forward(self, x, embedding=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.modulate is not None:
            # scale and shift, each (B,C,1,1)
            scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Stage(nn.Sequential):
    """Layers one after another, blocks with the embedding: (B,C,H,W), (B,E) ->
    (B,C',H',W')."""

    def forward(self, x, embedding):
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, embedding)
            else:
                x = layer(x)
        return x


class Attention(nn.Module):
    """Self-attention among all positions of a picture [2.2, 42]: (B,C,H,W) -> (B,C,H,W).
    (The abstract speaks of transformer layers, which would have an MLP too; that we
    follow [2.2] is our choice.)

    C / 64 heads, rounded, or the next smaller number that divides C; one group in the
    norm; zeros in the last layer, so that it starts as the identity: all our choice. No
    positions are added: the zeros that convolutions pad with show where the border is.
    """

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, round(channels / 64))
        while channels % self.heads != 0:
            self.heads -= 1
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        # Every position is a token.
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B,HW,C)

        # Query, key and value come from one matrix, and each is cut into heads.
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (B,HW,3,heads,C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B,heads,HW,C/heads)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B,heads,HW,C/heads)

        # Heads side by side, and tokens back to their positions.
        y = self.out(mixed.transpose(1, 2).flatten(2))  # (B,HW,C)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Injection(nn.Module):
    """Adds the embedding of noise level and class [2.2], then convolves: (B,C,H,W),
    (B,E) -> (B,C,H,W).

    The embedding goes into the branch only; x passes by unchanged, as in any residual
    block (our choice, as are norm, activation and the two places in the network). A
    regular convolution, because a separable one looks at each channel by
    itself before it mixes them: the paper saw wave-like artefacts and blames them on
    that [2.3]. `conv` takes either.
    """

    def __init__(self, e_width, channels, conv):
        super().__init__()
        self.project = nn.Linear(e_width, channels)
        self.norm = nn.GroupNorm(8, channels)
        self.conv = conv(channels, channels)

    def forward(self, x, embedding):
        h = x + self.project(embedding)[:, :, None, None]
        return x + self.conv(F.silu(self.norm(h)))


class UNet(nn.Module):
    """Velocity network [2.2, 28]: net(x_t, log_snr, labels) -> v (B,3,32,32).

    x_t (B,3,32,32), log_snr (B,), labels: class numbers (B,), where the number
    `no_class` stands for "no class" (null label), or class embeddings (B,E) as `embed`
    gives them; E is `e_width`. The diagram is in this file's header. Widths, depths and
    kernels, 2x2 average pooling, doubling by repetition, and the added skips are our
    choice. `modulate` goes beyond the paper: the embedding acts in every block, not at
    two points alone. Raises ValueError if `width` is no multiple of 8.
    """

    def __init__(
        self, classes=100, width=48, after_injection="regular", modulate=True, e_width=128
    ):
        super().__init__()
        if width < 8 or width % 8 != 0:
            raise ValueError(f"--width {width} is not a multiple of 8")
        self.no_class = classes  # classes are 0 to classes - 1
        a = width
        b = 2 * width
        c = 3 * width
        conv = regular_conv if after_injection == "regular" else separable_conv

        def block(channels):
            return ResidualBlock(channels, separable_conv, e_width if modulate else 0)

        def halve(c_in, c_out):
            return nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1)

        # The embedding of the noise level, which goes in as the log-SNR. These two layers,
        # and that the class embedding is added to their output, are our choice.
        self.time = nn.Sequential(
            nn.Linear(64, e_width), nn.SiLU(), nn.Linear(e_width, e_width)
        )

        # The last class embedding is that of "no class", learned like the others.
        self.label = nn.Embedding(classes + 1, e_width)

        # Down: 32x32 -> 16x16 -> 8x8
        self.stem = regular_conv(3, a)
        self.inject1 = Injection(e_width, a, conv)
        self.down1 = block(a)
        self.down2 = Stage(*halve(a, b), block(b), block(b))
        self.down3 = Stage(*halve(b, c), block(c), Attention(c))

        # Middle: 8x8
        self.inject2 = Injection(e_width, c, conv)
        self.middle = Stage(block(c), Attention(c), block(c))

        # Up: 8x8 -> 16x16 -> 32x32
        self.join2 = nn.Conv2d(c, b, 1)
        self.up2 = Stage(block(b), block(b))
        self.join1 = nn.Conv2d(b, a, 1)
        self.up1 = Stage(block(a), block(a))

        # Zeros in the last layer, so that the first guess is v = 0: our choice.
        last = regular_conv(a, 3)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.out = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), last)

        # In this layout 1x1 convolutions run faster.
        self.to(memory_format=torch.channels_last)

    def embed(self, labels):
        """Class embeddings (B,E) of class numbers (B,); embeddings are passed
        through."""
        if labels.is_floating_point():
            return labels
        return self.label(labels)

    def forward(self, x, log_snr, labels):
        e = self.time(sinusoidal_embedding(log_snr)) + self.embed(labels)
        e = F.silu(e)  # (B,E)

        # Down
        x1 = self.inject1(self.stem(x), e)
        x1 = self.down1(x1, e)  # (B,a,32,32)
        x2 = self.down2(x1, e)  # (B,b,16,16)
        x3 = self.down3(x2, e)  # (B,c,8,8)

        # Middle
        x3 = self.inject2(x3, e)
        x3 = self.middle(x3, e)  # (B,c,8,8)

        # Up, each pixel repeated 2x2 (nearest neighbour); the skips x2 and x1 are added.
        x2 = F.interpolate(self.join2(x3), scale_factor=2) + x2
        x2 = self.up2(x2, e)  # (B,b,16,16)
        x1 = F.interpolate(self.join1(x2), scale_factor=2) + x1
        x1 = self.up1(x1, e)  # (B,a,32,32)

        # The last layer is fp32 where the others are bf16: guidance amplifies rounding errors.
        with torch.autocast(x.device.type, enabled=False):
            return self.out(x1.float())  # (B,3,32,32)


def count_parameters(net):
    """How many numbers the network has; training changes all of them. The averaged weights
    (EMA) are not counted again: what is kept in the end is one network of this size."""
    return sum(p.numel() for p in net.parameters())


def parameter_table(net):
    """Parameters per stage and in total, as lines of text."""
    lines = []
    for name, stage in net.named_children():
        lines.append(f"  {name:<10}{count_parameters(stage):>8,}")
    lines.append(f"  {'total':<10}{count_parameters(net):>8,}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# 3. Data
# --------------------------------------------------------------------------------------
# The whole data set lies on the device, 184 MB as bytes. So a batch is an index: no workers.


class Data(NamedTuple):
    """Pictures x are uint8 (N,3,32,32) in [0,255], labels y int64 (N,)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    names: list  # of the classes
    checksum: int  # of the training pictures: a resumed run must find the same ones


def load_cifar(root):
    """The data set from the folder `root`: (train_x, train_y, test_x, test_y, names).

    Downloads it if there is none. What is there is verified by its md5 and never
    overwritten. Raises OSError, with what to do by hand, if it is damaged or can't be
    had.
    """
    root = Path(root)
    archive = root / DATASET.filename
    check = torchvision.datasets.utils.check_integrity
    try:
        if archive.exists() and not check(archive, DATASET.tgz_md5):
            raise OSError(f"{archive} is damaged")

        # With no folder, torchvision unpacks the archive, which it downloads if needed.
        missing = not (root / DATASET.base_folder).exists()
        train = DATASET(root, train=True, download=missing)
        test = DATASET(root, train=False)
    except Exception as error:  # no net, host down, disk full, pickle damaged: say what helps
        raise OSError(
            f"no {DATASET.__name__} in {root.resolve()}: {error}\n"
            f"  Delete what is damaged, if anything is there, and get {DATASET.url}\n"
            f"  into that folder (md5 {DATASET.tgz_md5});\n"
            "  or do without a download: --data shapes"
        ) from error

    return (
        torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(train.targets),
        torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(test.targets),
        train.classes,
    )


def load_data(source, device="cpu"):
    """`source`, "shapes" or the folder of the data set, as a Data on `device`. Raises
    OSError as load_cifar."""
    if source == "shapes":
        x, y, names = draw_shapes(20_000, seed=1)
        test_x, test_y, _ = draw_shapes(2_000, seed=2)
    else:
        x, y, test_x, test_y, names = load_cifar(source)
    checksum = zlib.crc32(x.numpy())
    tensors = [part.to(device) for part in (x, y, test_x, test_y)]
    return Data(*tensors, names, checksum)


def to_device(x, device):
    """x on the device, without the host waiting for it: CUDA fetches pinned memory by
    itself, when its turn comes."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_model(x):
    """uint8 [0,255] -> fp32 [-1,1], channels last: the one place where stored pictures
    become network input. Raises AssertionError if x is not uint8: then it has been here
    already."""
    assert x.dtype == torch.uint8, f"to_model wants uint8 in [0,255], not {x.dtype}"
    x = x.float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def to_uint8(x):
    """The way back: fp32 [-1,1] -> uint8 [0,255], with what lies outside cut off."""
    x = (x.float().clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8)


def random_flip(x, draw):
    """Mirror the pictures (B,3,H,W) whose `draw` (B,), from 0 to 1, is below a half:
    the one augmentation (our choice)."""
    return torch.where(draw.view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)


# --------------------------------------------------------------------------------------
# 4. Noise: schedules, alpha and sigma, velocity
# --------------------------------------------------------------------------------------
# A schedule maps t in [0,1] to the log-SNR, lambda = log(alpha²/sigma²): strictly
# falling and invertible [2.2]. Ours are finite at both ends too.


def cosine_schedule(t):
    """lambda = -2 log tan(a t + b) [2.2, 24], from 20 at t = 0 to -20 at t = 1; t any
    shape.

    b = atan(e^-10) and a = atan(e^10) - b cut off the infinite ends, as in [12] (our
    choice).
    """
    b = math.atan(math.exp(-10))
    a = math.pi / 2 - 2 * b

    # tan(x) = sin(x) / sin(pi/2 - x), and as a + 2b = pi/2,
    #     pi/2 - (a t + b) = a (1 - t) + b.
    # Two sines are accurate in fp32 near t = 1 too, where the tangent is not.
    return 2 * (torch.sin(a * (1 - t) + b).log() - torch.sin(a * t + b).log())


def linear_schedule(t):
    """lambda = -log(e^(1e-4 + 10 t²) - 1), from 9.2 at t = 0 to -10 at t = 1; t any
    shape. This is close to DDPM's linear betas in continuous time [11, 20], and
    Crowson's code [3] had it [2.3]."""
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


def spliced_schedule(t):
    """Cosine first, then linear [2.3, 4].

    At t = 0.80074257 the cosine schedule has the value (-2.256) and very nearly the
    slope per t of the linear one at 0.48536712; both constants are Crowson's [4]. So
    the two are joined there, and t is stretched such that it still goes from 0 to 1:
    the joint lies at t = 0.609. Value and slope agree to 2 parts in 10,000 and not
    better, as the constants are for a cosine whose infinite ends are not cut off.
    """
    shift = 0.80074257 - 0.48536712
    u = (1 + shift) * t

    # `where` computes both for all of t; the clamps keep the one not taken finite.
    early = cosine_schedule(u.clamp(max=1))
    late = linear_schedule((u - shift).clamp(min=0))
    return torch.where(u < 0.80074257, early, late)


def to_log_snr(t, schedule="cosine"):
    """The log-SNR at t, any shape, of the schedule of that name. Raises ValueError if
    there is none."""
    if schedule == "cosine":
        return cosine_schedule(t)
    if schedule == "linear":
        return linear_schedule(t)
    if schedule == "spliced":
        return spliced_schedule(t)
    raise ValueError(f"no schedule {schedule}: {', '.join(SCHEDULES)}")


def to_alpha_sigma(log_snr):
    """alpha = sqrt(sigmoid(lambda)) and sigma = sqrt(sigmoid(-lambda)), shaped to scale
    pictures: (B,) -> two of (B,1,1,1)."""
    log_snr = log_snr.view(-1, 1, 1, 1)
    alpha = torch.sigmoid(log_snr).sqrt()
    sigma = torch.sigmoid(-log_snr).sqrt()
    return alpha, sigma


def velocity(x, noise, alpha, sigma):
    """v = alpha * noise - sigma * x: Eq. (1) [30].

    Pictures (B,3,H,W); alpha and sigma (B,1,1,1) or numbers, here and in the next two.
    As alpha² + sigma² = 1, they are cos(phi) and sin(phi) of an angle phi, x_t moves on a
    circle from x to noise, and v is its velocity, d x_t / d phi.

    Why v and not the noise: where all is noise, a guess of the noise does not tell the
    picture; where all is clean, a guess of the picture does not tell the noise. v tells
    both at every level: see split.
    """
    return alpha * noise - sigma * x


def add_noise(x, noise, alpha, sigma):
    """x_t = alpha * x + sigma * noise: Eq. (2), where x_t is called x_noised."""
    return alpha * x + sigma * noise


def split(x_t, v, alpha, sigma):
    """(x, noise) that make up x_t if v is its velocity: Eq. (1) and (2) solved for
    both. They turn (x, noise) by phi, and this turns (x_t, v) back."""
    pred_x0 = alpha * x_t - sigma * v
    pred_noise = sigma * x_t + alpha * v
    return pred_x0, pred_noise


# --------------------------------------------------------------------------------------
# 5. Objective and training
# --------------------------------------------------------------------------------------
# The objective is Eq. (3). By (1) and (2) it has three forms:
#     |v - v_hat|²  =  (e^lambda + 1) |x - x_hat|²  =  (e^-lambda + 1) |noise - noise_hat|²
# The paper prints the last weight as e^lambda - 1, a misprint: below lambda = 0 it would
# be negative. An error of the picture weighs most on clean pictures, an error of the
# noise on noisy ones.


def learning_rate(step, steps, peak, warm_up):
    """Rate of update number `step` (from 0): a cosine from `peak` to 0 over all
    `steps`, times a ramp from 0 to 1 over the first `warm_up`, or over a tenth of the
    steps if that is less (our choice). When the ramp ends, the rate is just below the peak.
    """
    warm_up = min(warm_up, max(1, steps // 10))
    ramp = min(1, (step + 1) / warm_up)
    return peak * ramp * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema_net, net, decay, step):
    """ema_net += (1 - decay) (net - ema_net), weight by weight [2.2, 11, 24], after
    update number `step` (from 0).

    The average leaves out the jitter of the last steps. While the rate is high that counts
    (a validation loss of 0.151 instead of 0.157 after 500 of 1,500 steps of 32); once it has
    fallen to 0 there is no jitter left. The decay is our choice, and so is its warm-up, at
    most (1 + step) / (10 + step), so that the average forgets the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema_net.parameters())
    torch._foreach_lerp_(averages, list(net.parameters()), 1 - decay)


def train(settings, command="train(settings), with the same settings"):
    """Train [2.2], or resume a run that was stopped, then sample; returns the
    validation loss.

    Writes into settings.folder(). Raises ValueError or OSError, with a readable
    message, for settings, data, a folder or a checkpoint that can't be used, and if the
    loss is no longer finite; AssertionError if a budget is exceeded; Stopped after a
    signal, when all is saved. `command` is printed then, as what resumes the run.
    """
    if settings.weights:
        raise UserError("training can't start from --weights, only anew or by resuming")
    device, precision, out = set_up(settings)
    data = load_data(settings.data, device)
    check_batch_size(settings.batch_size, len(data.train_y))
    find_classes(settings.classes, data.names)  # better to fail now than after training

    # Build it. On CUDA it is compiled too, by trial calls on example inputs: section 14.
    net = build_network(settings, len(data.names), device)
    example = network_example(data.train_x, data.train_y, settings.batch_size)
    compile_network(net, settings.compile, [example], precision)

    # The averaged network is used to validate and to sample; it learns nothing by itself.
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)
    examples = [
        network_example(data.test_x, data.test_y, EVAL_BATCH),
        sampler_example(ema_net, settings),
    ]
    compile_network(ema_net, settings.compile, examples, precision)

    # Adam, as in [11], and no weight decay. With a second beta of 0.99 it forgets large
    # gradients sooner than with 0.999 (our choice). `fused` updates all weights in one
    # kernel. Its rate is set before each step.
    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)

    # fp16 can't hold small gradients, so the loss is scaled up before the backward pass
    # and the gradients down after it. In fp32 and bf16 the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    # Low-discrepancy t [2.2]: a Sobol sequence, of which each draw falls into a gap
    # that the earlier ones left, so a batch covers [0,1] evenly and the loss estimate
    # varies less, which often speeds training up [2.3, 19]. (Here its variance is 2.7 times
    # smaller with 32 pictures per step, 4.4 times with 64, and the loss at the end of a short
    # run the same.) In a batch of 2^n, row i gets its t from nearly the same part of [0,1]
    # each time, so nothing else may depend on the row: the pictures come in random order.
    sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=settings.seed)

    # All other random numbers come from one generator on the device; sampling has its
    # own, so a grid in between changes nothing.
    random = torch.Generator(device).manual_seed(settings.seed)
    on_device = dict(generator=random, device=device)

    # An epoch is one random order of the training pictures, and a time t for each;
    # `position` is how far we are. A last incomplete batch is dropped.
    step = 0
    position = 0
    pictures = len(data.train_y)
    epoch_size = pictures - pictures % settings.batch_size
    order = torch.empty(0, device=device)
    times = torch.empty(0, device=device)

    # The checkpoint of a run that was stopped puts all of this back to where it was.
    path = out / "checkpoint.pt"
    log = TrainingLog(out, settings.steps, settings.batch_size, device)
    parts = dict(net=net, ema=ema_net, optimiser=optimiser, log=log)
    if path.exists():
        print(f"resuming from {path}")
        state = load_checkpoint(path, settings, data.checksum)
        restore(parts, state)
        step = state["step"]
        position = state["position"]
        order = state["order"].to(device)
        times = state["times"].to(device)

        # All t drawn so far: those used, and the rest of this epoch's.
        sobol.fast_forward(step * settings.batch_size + len(times) - position)
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])

        # Each kind of device has its own kind of generator. On another kind than before
        # it begins anew, at numbers that the run hasn't had yet.
        if state["device"] == device.type:
            random.set_state(state["random"])
        else:
            random.manual_seed(settings.seed + step)
    print(f"{step:,} of {settings.steps:,} steps done")

    # The parameter budget [2.1].
    print(f"parameters:\n{parameter_table(net)}")
    count = count_parameters(net)
    assert count < MAX_PARAMETERS, f"{count:,} parameters, not under {MAX_PARAMETERS:,}"

    stopping = False
    log.start_clock(step)
    with StopSignals() as stop:  # Ctrl-C lets the step end and saves: section 13
        while step < settings.steps and not stopping:
            # The step budget [2.1].
            assert step < MAX_STEPS, f"all {MAX_STEPS:,} optimiser steps are spent"

            # A new epoch: pictures in a new order, and all their t in one go.
            if position == len(order):
                order = torch.randperm(pictures, **on_device)[:epoch_size]
                if settings.timesteps == "sobol":
                    times = to_device(sobol.draw(epoch_size)[:, 0], device)
                else:
                    times = torch.rand(epoch_size, **on_device)
                position = 0

            # Choose pictures and times: the next ones in order.
            end = position + settings.batch_size
            chosen = order[position:end]
            t = times[position:end]  # (B,)
            y = data.train_y[chosen]  # (B,)
            x = to_model(data.train_x[chosen])  # (B,3,32,32)
            position = end

            # Mirror half of them. Drop some labels: the network learns "no class" too,
            # which guidance needs [12].
            flip_draw, label_draw = torch.rand(2, settings.batch_size, **on_device)
            x = random_flip(x, flip_draw)
            labels = y.masked_fill(label_draw < settings.label_drop, net.no_class)

            # Noise each picture to the level of its own t, or, which is ours, a little less:
            # Eq. (2). The target is v: Eq. (1).
            noise = torch.randn(x.shape, **on_device)
            log_snr = to_log_snr(t, settings.schedule) + settings.log_snr_shift  # (B,)
            alpha, sigma = to_alpha_sigma(log_snr)  # (B,1,1,1)
            x_t = add_noise(x, noise, alpha, sigma)
            v = velocity(x, noise, alpha, sigma)

            # Forward, in bf16 on a GPU that has it: section 14.
            with autocast(device, precision):
                pred_v = net(x_t, log_snr, labels)

            # Loss, in fp32: Eq. (3), as a mean over pictures and pixels.
            loss = (v - pred_v).square().mean()

            # The gradient; all of it is scaled down if its norm is above clip_norm (our choice).
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), settings.clip_norm)

            # One optimiser step, and the averaged weights follow. (A step whose fp16
            # gradients overflowed leaves the weights as they are, and lowers the scale.)
            rate = learning_rate(step, settings.steps, settings.max_lr, settings.warm_up)
            optimiser.param_groups[0]["lr"] = rate

            scaler.step(optimiser)
            scaler.update()
            update_ema(ema_net, net, settings.ema, step)
            step += 1

            # That was the algorithm; it reads no number back from a GPU. Reading one waits
            # for all that was launched, so the rest happens only now and then: sections
            # 6, 8, 12 and 13.
            log.add(step, loss.detach())
            stopping = stop.received is not None
            validating = step % settings.eval_every == 0 or step == settings.steps
            drawing = step % settings.grid_every == 0 and step < settings.steps
            if step % settings.log_every == 0 or validating or drawing or stopping:
                log.new_row(step, rate, net)
                if validating:
                    schedule, label_drop = settings.schedule, settings.label_drop
                    scores = validate(ema_net, data, schedule, precision, label_drop)
                    log.add_scores(scores)
                log.show(validating or drawing)
                if validating or stopping:
                    progress = dict(
                        step=step,
                        position=position,
                        order=order,
                        times=times,
                        random=random.get_state(),
                        device=device.type,
                        scaler=scaler.state_dict(),
                        command=command,
                    )
                    save_checkpoint(path, settings, data, parts, progress)
                    log.write_files()
                if drawing:
                    save_class_grid(settings, ema_net, data.names, step)
                log.start_clock(step)

    if stop.received is not None:
        raise stop.stopped(step, path, command)
    log.summarise(step)
    show_results(settings, ema_net, data, step)
    return log.rows[-1]["val_loss"]


# --------------------------------------------------------------------------------------
# 6. Validation loss
# --------------------------------------------------------------------------------------


EVAL_BATCH = 256  # pictures at once


@torch.no_grad()
def validation_loss(
    net, x, y, schedule="cosine", precision=torch.float32, count=1024
):
    """Eq. (3) on at most `count` test pictures, x uint8 (N,3,32,32), y (N,), each with
    fixed noise, at t = (i + 1/2)/count: (mean, list of the means in five bins of t of
    nearly equal size, clean to noisy).

    All its seeds are fixed, so two networks, or two moments of one, compare picture by
    picture. Settings that were chosen by it look a little too good on these pictures.
    """
    chosen = np.random.RandomState(0).permutation(len(y))[:count]
    chosen = torch.from_numpy(chosen).to(y.device)
    count = len(chosen)
    generator = torch.Generator().manual_seed(1)
    noises = torch.randn(count, *x.shape[1:], generator=generator)
    times = (torch.arange(count) + 0.5) / count

    losses = []
    batches = [part.split(EVAL_BATCH) for part in (chosen, noises, times)]
    for i, noise, t in zip(*batches):
        picture = to_model(x[i])
        noise = noise.to(y.device)
        log_snr = to_log_snr(t.to(y.device), schedule)
        alpha, sigma = to_alpha_sigma(log_snr)
        x_t = add_noise(picture, noise, alpha, sigma)
        with autocast(y.device, precision):
            pred_v = net(x_t, log_snr, y[i])
        error = velocity(picture, noise, alpha, sigma) - pred_v
        losses.append(error.square().flatten(1).mean(1))

    losses = torch.cat(losses).cpu()
    bins = [part.mean().item() for part in losses.chunk(5)]
    return losses.mean().item(), bins


def validate(net, data, schedule, precision, label_drop=0.0):
    """The validation loss and its five bins, for one row of the log."""
    net.eval()
    labels = data.test_y
    if label_drop == 1:  # trained without classes
        labels = torch.full_like(labels, net.no_class)
    loss, bins = validation_loss(net, data.test_x, labels, schedule, precision)
    scores = dict(val_loss=loss)
    for i, value in enumerate(bins):
        scores[f"bin{i}"] = value
    return scores


# --------------------------------------------------------------------------------------
# 7. Guidance, clipping, sampler
# --------------------------------------------------------------------------------------


def guide(v_cond, v_uncond, w):
    """Classifier-free guidance, Eq. (4) [12]: (1 + w) v_cond - w v_uncond.

    v_cond - v_uncond is what the class changes in the guess. With w = 0 it counts as
    learned, with w > 0 more than that, so that pictures are clearer and less varied, with
    w = -1 not at all. Others call 1 + w the guidance scale: their 4 is the paper's w = 3.
    """
    return (1 + w) * v_cond - w * v_uncond


def guided_velocity(net, labels, w):
    """The function (x_t, log_snr) -> v that a sampler calls, log_snr a number: `net`
    with guidance w.

    labels as UNet takes them, (B,) or (B,E). Both halves of Eq. (4) go through the
    network as one batch of 2B. With w = 0 the first half is enough, and a call costs
    half.
    """
    wanted = net.embed(labels)  # (B,E)
    no_class = torch.full((1,), net.no_class, device=wanted.device)
    none = net.embed(no_class).expand_as(wanted)  # (B,E)

    def model(x_t, log_snr):
        log_snrs = torch.full((len(x_t),), log_snr, device=x_t.device)
        if w == 0:
            return net(x_t, log_snrs, wanted)
        twice = torch.cat([x_t, x_t])
        log_snrs = torch.cat([log_snrs, log_snrs])
        v_cond, v_uncond = net(twice, log_snrs, torch.cat([wanted, none])).chunk(2)
        return guide(v_cond, v_uncond, w)

    return model


def clip_picture(pred_x0, how, percentile=0.995):
    """Keep predicted pictures (B,3,H,W) in range: "none", "static" (cut at ±1), or
    "dynamic", which [29] calls dynamic thresholding.

    Guidance drives predictions out of [-1,1]. Cutting saturates them; dynamic clipping
    cuts a picture at s = max(1, 99.5th percentile of its |values|) and divides by s
    (99.5: our choice). With w = 2, "none" scored better than "dynamic": see `clip_x0` in
    the settings.
    """
    if how == "none":
        return pred_x0
    if how == "static":
        return pred_x0.clamp(-1, 1)
    s = pred_x0.abs().flatten(1).quantile(percentile, dim=1)  # (B,)
    s = s.clamp(min=1).view(-1, 1, 1, 1)
    return pred_x0.clamp(-s, s) / s


@torch.no_grad()
def ddim_sample(model, x_t, log_snrs, eta=0.6, clip="none", draw_noise=torch.randn_like):
    """Pictures from noise [2.3, 11, 35]: x_t (B,3,H,W) at log_snrs[0] -> the last
    predicted x_0.

    model(x_t, log_snr) gives v, log_snr a number; log_snrs (S,), on the CPU, rises, and
    the model is called once for each. eta scales the fresh noise: 1 adds what DDPM adds,
    0 (DDIM) adds none. draw_noise(x_t) gives noise in its shape.
    """
    # All pictures have the same level of noise here, so plain numbers do.
    alphas, sigmas = to_alpha_sigma(log_snrs)
    alphas = alphas.flatten().tolist()  # S of them
    sigmas = sigmas.flatten().tolist()
    for i, log_snr in enumerate(log_snrs.tolist()):
        # Which picture is in x_t?
        alpha = alphas[i]
        sigma = sigmas[i]
        v = model(x_t, log_snr)
        pred_x0, _ = split(x_t, v, alpha, sigma)
        pred_x0 = clip_picture(pred_x0, clip)

        # The last step ends with the picture. A schedule has a little noise left at the
        # end (sigma = 0.01 on the linear one), which the picture need not have again.
        if i + 1 == len(log_snrs):
            break

        # And which noise? split returns one as well, but it belongs to the picture before
        # clipping. Picture and noise must add up to x_t, so it is computed again.
        pred_noise = (x_t - alpha * pred_x0) / sigma

        # Of the next level's variance, next_sigma², a part is fresh noise:
        #     eta² * next_sigma² / sigma² * beta
        # and the rest is the noise just found. With eta = 1 that is DDPM's posterior: its
        # mean given pred_x0, and the smaller of the two variances that [11] tries (our
        # choice). beta is DDPM's beta_t, the variance that comes in when a picture goes
        # from the next level, which is cleaner, to this one.
        next_alpha = alphas[i + 1]
        next_sigma = sigmas[i + 1]
        beta = 1 - (alpha / next_alpha) ** 2
        fresh_variance = eta**2 * (next_sigma / sigma) ** 2 * beta

        # Mix both at the next noise level. (Rounding could make the difference negative.)
        kept_scale = math.sqrt(max(0.0, next_sigma**2 - fresh_variance))
        x_t = next_alpha * pred_x0 + kept_scale * pred_noise
        if eta > 0:
            x_t = x_t + math.sqrt(fresh_variance) * draw_noise(x_t)
    return pred_x0


NOISE_CHUNK = 50  # samples that share a generator of noise


def whole_chunks(batch):
    """A number of samples, rounded up to a multiple of 50."""
    return math.ceil(batch / NOISE_CHUNK) * NOISE_CHUNK


class SampleNoise:
    """Noise for samples number `first` to `first + count`; each call gives
    (count,3,32,32).

    Each block of 50 samples has a generator of its own, with a seed from `seed` and the
    number of the block. So the noise is the same whatever the batch; `first` is a
    multiple of 50.
    """

    def __init__(self, seed, first, count, device):
        self.count = count
        self.device = device
        self.generators = []
        for number in range(first // NOISE_CHUNK, math.ceil((first + count) / NOISE_CHUNK)):
            # No run has a million chunks, so two values of `seed` share no generator.
            # (Very large ones may: the CPU's takes a seed modulo 2^32.)
            generator = torch.Generator(device).manual_seed(1_000_003 * seed + number)
            self.generators.append(generator)

    def __call__(self, x=None):  # x is ignored: ddim_sample gives it
        shape = (NOISE_CHUNK, 3, 32, 32)
        chunks = []
        for generator in self.generators:
            chunks.append(torch.randn(shape, generator=generator, device=self.device))
        return torch.cat(chunks)[: self.count]


def generate(
    net,
    labels,
    *,
    schedule="cosine",
    steps=50,
    eta=0.6,
    guidance=2.0,
    clip="none",
    seed=0,
    start=None,
    batch=250,
    precision=torch.float32,
    progress=None,
):
    """One sample for each of labels, (N,) or (N,E), as uint8 (N,3,32,32) on the CPU.

    `schedule` and `steps` say at which noise levels, `eta` and `clip` are those of
    ddim_sample, `guidance` is w of Eq. (4). `seed` decides the noise. `start`
    (N,3,32,32) is the first noise, if it is not to be drawn. `progress(done, count)` is
    called after each batch. `batch` bounds the memory of the device. Leaves `net` in
    evaluation mode.
    """
    net.eval()
    device = labels.device
    t = torch.linspace(1, 0, steps + 1)[:-1]
    log_snrs = to_log_snr(t, schedule)  # (steps,), from pure noise; t = 0 needs no call
    batch = whole_chunks(batch)

    pictures = []
    for first in range(0, len(labels), batch):
        some = labels[first : first + batch]
        noise = SampleNoise(seed, first, len(some), device)
        x = noise()  # drawn in any case, so that the noise of the steps is always the same
        if start is not None:
            x = start[first : first + batch]
        with torch.no_grad(), autocast(device, precision):
            model = guided_velocity(net, some, guidance)
            x = ddim_sample(model, x, log_snrs, eta, clip, noise)
        pictures.append(to_uint8(x).cpu())
        if progress:
            progress(first + len(some), len(labels))
    return torch.cat(pictures)


# --------------------------------------------------------------------------------------
# 8. Interpolation, grid dump
# --------------------------------------------------------------------------------------


def slerp(a, b, share):
    """Spherical interpolation [2.3, 39]: (B,...) and (B,...) at share (B,) of the way,
    each row flattened whole.

    Noise of 3,072 numbers is nearly always of the same length. The middle of a straight
    line between two would be 0.7 times as long, a noise that the network has never seen.
    Between nearly parallel or opposite rows, where it would divide by 0, a straight line.
    """
    flat_a = a.flatten(1)
    flat_b = b.flatten(1)
    share = share.view(-1, 1).to(a.dtype)
    product = F.normalize(flat_a, dim=1) * F.normalize(flat_b, dim=1)
    cosine = product.sum(1, keepdim=True)
    angle = cosine.clamp(-1, 1).acos()

    straight = angle.sin().abs() < 1e-3
    sine = angle.sin().where(~straight, torch.ones_like(angle))
    weight_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    weight_b = torch.where(straight, share, (share * angle).sin() / sine)
    return (weight_a * flat_a + weight_b * flat_b).view_as(a)


def interpolate(net, ends, labels, count=10, **options):
    """Pictures between pairs [2.3]: `ends` (2,P,3,32,32) first noises, `labels` (2,P)
    classes of P pairs -> uint8 (P*count,3,32,32), pair after pair, ends included.
    `options` as generate.

    Noise and class embedding both go along the sphere, and eta = 0 makes the rest
    deterministic: so the outer pictures are those that the ends' own noise and class
    give.
    """
    pairs = ends.shape[1]
    share = torch.linspace(0, 1, count, device=ends.device).repeat(pairs)  # (P*count,)

    def between(both):
        # (2,P,...) -> the left and the right end for each picture: (P*count,...)
        left, right = both.repeat_interleave(count, dim=1)
        return slerp(left, right, share)

    with torch.no_grad():
        embeddings = between(net.embed(labels))  # (P*count,E)
    options.update(eta=0.0, start=between(ends))
    return generate(net, embeddings, **options)


def save_grid(path, x, columns, scale=2):
    """Pictures uint8 (N,3,32,32) as one PNG, row by row, each pixel drawn `scale`
    wide."""
    grid = torchvision.utils.make_grid(x.cpu(), columns, padding=1, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    size = (image.width * scale, image.height * scale)
    image.resize(size, Image.NEAREST).save(path)


def save_class_grid(settings, net, names, step):
    """grid-<step>.png: one row per class for ten classes (those asked for, or ten from
    all over the list), ten pictures each; always from the same noise, so that grids of
    one run compare."""
    spread = torch.linspace(0, len(names) - 1, 10).long().tolist()
    classes = (find_classes(settings.classes, names) or spread)[:10]
    device = next(net.parameters()).device
    labels = torch.tensor(classes, device=device).repeat_interleave(10)
    x = generate(net, labels, **sampling_options(settings, device))

    path = settings.folder() / f"grid-{step:06}.png"
    save_grid(path, x, columns=10)
    print(f"{path}: " + ", ".join(names[i] for i in classes))


# ======================================================================================
# The story ends here. What follows supports it, and can wait for a second reading.
# ======================================================================================


# --------------------------------------------------------------------------------------
# 9. Neighbours
# --------------------------------------------------------------------------------------


def pixel_distances(a, b):
    """Euclidean distances between pictures uint8 (A,3,H,W) and (B,3,H,W): (A,B), pixels
    in [0,255]. 5,000 of b at a time, for the memory."""
    a = a.flatten(1).float()
    parts = [torch.cdist(a, some.flatten(1).float()) for some in b.split(5000)]
    return torch.cat(parts, dim=1)


def nearest_neighbours(queries, pictures, k=1, chunk=250):
    """The k pictures nearest to each query, each as it is or mirrored, by Euclidean
    distance of pixels in [0,255]: distance (Q,k), index (Q,k), mirrored (Q,k). Both
    uint8 (.,3,H,W), one device.
    """
    found = []
    flipped = pictures.flip(-1)
    for some in queries.split(chunk):
        # The nearer of the two ways to show a picture: so each counts once.
        plain = pixel_distances(some, pictures)  # (q,N)
        mirrored = pixel_distances(some, flipped)
        index = torch.minimum(plain, mirrored).topk(k, largest=False).indices  # (q,k)
        mirror = (mirrored < plain).gather(1, index)

        # cdist multiplies matrices, which cancels badly for near copies: measure these again.
        near = torch.where(mirror[..., None, None, None], flipped[index], pictures[index])
        error = near.float() - some[:, None].float()  # (q,k,3,H,W)
        found.append((error.flatten(2).norm(dim=2), index, mirror))
    return tuple(torch.cat(parts) for parts in zip(*found))


# --------------------------------------------------------------------------------------
# 10. FID
# --------------------------------------------------------------------------------------

INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def resize_plane(plane):
    """One channel, (H,W), as Pillow's bicubic filter shows it at 299x299, cut to
    [0,255]."""
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((299, 299), Image.BICUBIC)).clip(0, 255)


def resize_for_inception(x):
    """Pictures as clean-fid shows them to the FID network: uint8 (B,3,H,W) -> fp32
    (B,3,299,299) in [0,255], each channel in floating point."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        planes = list(pool.map(resize_plane, x.flatten(0, 1).cpu().numpy()))
    return torch.from_numpy(np.stack(planes)).view(len(x), 3, 299, 299)


def load_inception(path=""):
    """The FID network (Inception of 2015-12-05) from `path`, or from torch hub's
    folder, downloaded into it at need. Raises OSError if it can't be had or is not that
    file."""
    name = INCEPTION.rsplit("/", 1)[1]
    path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), INCEPTION_SHA256)
        if hashlib.sha256(path.read_bytes()).hexdigest() != INCEPTION_SHA256:
            raise OSError("wrong SHA-256")
        return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # no net, host gone, disk full: say what helps
        raise OSError(
            f"the FID network can't be had ({str(error)[:80]!r}): fetch {INCEPTION} "
            f"(SHA-256 {INCEPTION_SHA256}) to {path}, or name it with --inception"
        ) from error


@torch.no_grad()
def feature_statistics(network, x, batch=50):
    """(mean (2048,), covariance (2048,2048)) of the features of pictures uint8
    (N,3,H,W), float64 on the CPU. `network` is that of load_inception; its forward
    would resize by itself, so only its layers are called."""
    rows = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32, as others have it
        for some in x.split(batch):
            resized = resize_for_inception(some).to(x.device)
            features = network.layers((resized - 128) / 128)
            rows.append(features.view(len(some), -1).cpu().double())
    features = torch.cat(rows)
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)) of two Gaussians, float64, as a
    float.

    The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of
    sqrt(A) B sqrt(A), which is symmetric, so the eigenvalues are real and can be had
    safely.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# --------------------------------------------------------------------------------------
# 11. Modes
# --------------------------------------------------------------------------------------


class Progress:
    """Prints how many samples are drawn, and how fast: called with (done, count)."""

    def __init__(self):
        self.start = time.perf_counter()

    def __call__(self, done, count):
        speed = done / (time.perf_counter() - self.start)
        in_place = sys.stdout.isatty() and done < count
        end = "\r" if in_place else "\n"
        print(f"sampled {done:,} of {count:,}, {speed:,.1f} per second", end=end, flush=True)


def possible_guidance(settings):
    """The w of Eq. (4) that the settings ask for, if training allows it."""
    # Where no label was ever dropped, the embedding of "no class" was never trained, and
    # where all were, those of the classes weren't. Sampling must do without them.
    if settings.label_drop == 0:
        return 0.0
    if settings.label_drop == 1:
        return -1.0
    return settings.guidance


def sampling_options(settings, device):
    """What generate takes from the settings, as keywords."""
    schedule = settings.sample_schedule
    if schedule == "same":
        schedule = settings.schedule
    return dict(
        seed=settings.sample_seed,
        schedule=schedule,
        steps=settings.sample_steps,
        eta=settings.eta,
        guidance=possible_guidance(settings),
        clip=settings.clip_x0,
        batch=settings.sample_batch,
        precision=choose_precision(device, settings.precision)[0],
        progress=Progress(),
    )


def find_classes(words, names):
    """Class numbers from "rose,7,whale"; none from an empty text. Raises ValueError, as
    a sentence, for a word that is neither a name nor a number of a class."""
    numbers = []
    for word in words.split(","):
        word = word.strip().lower()
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            numbers.append(int(word))
        elif word:
            raise UserError(
                f"--classes {word}: no number from 0 to {len(names) - 1}, and none of "
                + ", ".join(names)
            )
    return numbers


def pick_labels(settings, names, count, device):
    """Class numbers (count,) on the device: the classes asked for in turn, or if none
    were, all of them in an order drawn from the seed of sampling."""
    random = torch.Generator().manual_seed(settings.sample_seed)
    classes = find_classes(settings.classes, names)
    if not classes:
        classes = torch.randperm(len(names), generator=random).tolist()
    labels = [classes[i % len(classes)] for i in range(count)]
    return torch.tensor(labels, device=device)


def save_samples(path, x, labels):
    """uint8 (N,3,32,32) and labels (N,) as a .npz: `samples` uint8 (N,32,32,3),
    `labels`."""
    samples = x.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(path, samples=samples, labels=labels.cpu().numpy())


def sample_mode(settings, net, names):
    """Figure 3, left: draw `count` samples, not cherry-picked: samples.png (400 at most)
    and, for other tools, samples.npz. Returns the pictures, uint8 (count,3,32,32)."""
    device = next(net.parameters()).device
    labels = pick_labels(settings, names, settings.count, device)
    x = generate(net, labels, **sampling_options(settings, device))

    out = settings.folder()
    save_samples(out / "samples.npz", x, labels)
    shown = x[:400]
    save_grid(out / "samples.png", shown, columns=max(8, math.isqrt(len(shown))))
    print(f"{out / 'samples.png'}, {out / 'samples.npz'}")
    return x


def interpolate_mode(settings, net, names, pairs=8):
    """Figure 3, middle: interpolations.png, one row per pair, ends included. Returns
    the pictures."""
    device = next(net.parameters()).device
    labels = pick_labels(settings, names, 2 * pairs, device).view(pairs, 2).T
    random = torch.Generator().manual_seed(settings.sample_seed)
    ends = torch.randn(2, pairs, 3, 32, 32, generator=random).to(device)
    x = interpolate(net, ends, labels, **sampling_options(settings, device))

    path = settings.folder() / "interpolations.png"
    save_grid(path, x, columns=10)
    print(path)
    return x


def neighbours_mode(settings, net, names, data, shown=16, k=4):
    """Figure 3, right: neighbours.png, samples each with its k nearest training
    pictures beside it.

    The paper sees in such pictures that its model mimics the training set [2.5]. Our
    measure of that, printed, is the median nearest distance of the samples and that of
    test pictures: a network that copies comes much nearer than new photographs do. A
    little nearer proves nothing, as smooth pictures are near to everything.
    Returns both medians.
    """
    device = next(net.parameters()).device
    labels = pick_labels(settings, names, settings.count, device)
    x = generate(net, labels, **sampling_options(settings, device)).to(device)
    distance, index, mirrored = nearest_neighbours(x, data.train_x, k)

    random = torch.Generator().manual_seed(settings.sample_seed)
    test = torch.randperm(len(data.test_y), generator=random)[: max(settings.count, 500)]
    test_distance, _, _ = nearest_neighbours(data.test_x[test.to(device)], data.train_x)

    near = data.train_x[index[:shown]]  # (shown,k,3,32,32)
    near = torch.where(mirrored[:shown, :, None, None, None], near.flip(-1), near)
    tiles = torch.cat([x[:shown, None], near], dim=1)
    path = settings.folder() / "neighbours.png"
    save_grid(path, tiles.flatten(0, 1), columns=2 * (k + 1))

    medians = distance[:, 0].median().item(), test_distance.median().item()
    print(
        f"{path}: median distance to the nearest training picture "
        f"{medians[0]:.0f} ({len(x)} samples), {medians[1]:.0f} ({len(test)} test pictures)"
    )
    return medians


def fid_mode(settings, net, data):
    """FID [2.4]: `fid_count` samples, classes as in the test set, against all test
    pictures. The paper names no protocol; this is clean-fid's, our choice.

    Prints FID, the protocol, and the floor, which is the FID of as many training
    pictures; returns FID. Where its network can't be had it says so at once, draws and
    saves the samples all the same, then raises OSError.
    """
    device = next(net.parameters()).device
    out = settings.folder()
    count = settings.fid_count
    options = sampling_options(settings, device)
    samples_path = out / "fid-samples.npz"

    # Without the network there is no FID, but other programs can measure the samples.
    network = missing = None
    try:
        network = load_inception(settings.inception).to(device)
    except OSError as error:
        missing = error
        print(f"{missing}\nThe samples are drawn all the same (Ctrl-C ends it)")

    labels = data.test_y[torch.arange(count, device=device) % len(data.test_y)]
    x = generate(net, labels, **options)
    save_samples(samples_path, x, labels)
    if missing:
        raise OSError(f"{missing}. The samples are kept in {samples_path}")

    # The test pictures' statistics and the floor are the same each time: keep them.
    reference_path = out / f"fid-reference-{count}-{data.checksum}.pt"
    if not reference_path.exists():
        test = feature_statistics(network, data.test_x)
        random = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(data.train_y), generator=random)[:count].to(device)
        real = feature_statistics(network, data.train_x[chosen])
        save_whole(dict(test=test, floor=frechet_distance(*real, *test)), reference_path)
    reference = torch.load(reference_path, weights_only=True)
    fid = frechet_distance(*feature_statistics(network, x.to(device)), *reference["test"])

    shown = ("seed", "schedule", "steps", "eta", "guidance", "clip")
    protocol = ", ".join(f"{name} {options[name]}" for name in shown)
    warning = " (under 10,000 samples: not comparable)" if count < 10_000 else ""
    print(
        f"FID {fid:.3f}{warning}\n"
        f"  {count:,} samples, {len(data.test_y):,} test pictures; {protocol}; "
        f"EMA {settings.ema}\n"
        f"  Inception 2015-12-05, SHA-256 {INCEPTION_SHA256[:8]}; bicubic to 299 as clean-fid\n"
        f"  floor, as many training pictures in place of samples: {reference['floor']:.3f}"
    )
    return fid


def schedules_mode(settings):
    """schedules.png: log-SNR against t of the three noise schedules [2.3]."""
    out = settings.folder()
    make_folder(out)
    t = torch.linspace(0, 1, 200)
    curves = {}
    for name in SCHEDULES:
        curves[name] = list(zip(t.tolist(), to_log_snr(t, name).tolist()))
    path = out / "schedules.png"
    plot(path, curves, "Noise schedules", Axis("t", 0, 1), Axis("log-SNR", -20, 20))
    print(path)


def show_results(settings, net, data, step):
    """What training ends with: a grid, samples, interpolations, neighbours, and on
    CUDA FID."""
    save_class_grid(settings, net, data.names, step)
    sample_mode(settings, net, data.names)
    interpolate_mode(settings, net, data.names)
    neighbours_mode(settings, net, data.names, data)

    # FID wants 10,000 samples, hours on a CPU, and has no meaning for drawn shapes.
    if data.test_x.device.type != "cuda" or settings.data == "shapes":
        print("FID is left to the mode fid: training adds it on CUDA alone, not for shapes")
        return
    try:
        fid_mode(settings, net, data)
    except (OSError, RuntimeError) as error:  # all else is done: no reason for a traceback
        print(f"no FID: {error}")


def open_network(settings, count, checksum=None):
    """(averaged network, class names) from settings.checkpoint(), to draw `count`
    samples with. Needs no data set; `checksum` is that of one it must have been trained
    on. Raises ValueError or OSError, with a readable message."""
    device, precision, _ = set_up(settings)
    state = load_checkpoint(settings.checkpoint(), settings, checksum)
    net = build_network(settings, len(state["names"]), device).requires_grad_(False)
    restore(dict(ema=net), state)

    # Compiling takes long, too long for a few samples (our choice).
    if settings.compile == "on" or count >= 2000:
        examples = [sampler_example(net, settings)]
        compile_network(net, settings.compile, examples, precision)
    return net, state["names"]


# --------------------------------------------------------------------------------------
# 12. Log and pictures
# --------------------------------------------------------------------------------------


class TrainingLog:
    """Lines of progress, log.csv and loss.png in the folder `out`, and the figures for
    them.

    Its state is part of the checkpoint, so a resumed run goes on in the same table.
    """

    columns = "step loss lr images_per_s val_loss bin0 bin1 bin2 bin3 bin4".split()

    def __init__(self, out, steps, batch_size, device):
        self.out = out
        self.steps = steps
        self.batch_size = batch_size
        self.rows = []
        self.seconds = 0.0  # of training alone
        self.loss = torch.zeros((), device=device)  # running mean, over some 50 steps

    def state_dict(self):
        """What a resumed run needs of it."""
        return dict(rows=self.rows, seconds=self.seconds, loss=self.loss)

    def load_state_dict(self, state):
        """Go on from what state_dict gave."""
        self.rows = state["rows"]
        self.seconds = state["seconds"]
        self.loss = state["loss"].to(self.loss.device)

    def add(self, step, loss):
        """Take the loss (0-d) of update number `step`, from 1, into the mean, without
        waiting."""
        self.loss = self.loss.lerp(loss, max(0.02, 1 / step))

    def start_clock(self, step):
        """Training goes on from `step` updates: validation and files are not
        counted."""
        self.clock = time.perf_counter()
        self.clock_step = step

    def new_row(self, step, rate, net):
        """A new row of the table: loss, rate, and speed since start_clock. Raises
        ValueError if the loss or a weight is not finite."""
        total = self.loss + sum(p.detach().sum() for p in net.parameters())
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is not finite at step {step:,}: try another --out with "
                "a lower --max-lr; the last good checkpoint, if any, is kept"
            )

        seconds = time.perf_counter() - self.clock
        self.seconds += seconds
        speed = (step - self.clock_step) * self.batch_size / seconds
        row = dict(step=step, loss=self.loss.item(), lr=rate, images_per_s=speed)
        self.rows.append(row)

    def add_scores(self, scores):
        """Figures of a validation, name -> value, into the newest row."""
        self.rows[-1].update(scores)

    def show(self, keep):
        """Print the newest row; on a terminal in place, unless it is to be kept."""
        row = self.rows[-1]
        pictures = (self.steps - row["step"]) * self.batch_size
        left = int(pictures / row["images_per_s"])  # seconds
        line = (
            f"step {row['step']:6,}/{self.steps:,}  loss {row['loss']:.4f}  "
            f"lr {row['lr']:.2e}  {row['images_per_s']:7,.0f} images/s  "
            f"left {left // 3600:2}:{left // 60 % 60:02}:{left % 60:02}"
        )
        if "val_loss" in row:
            bins = " ".join(f"{row[f'bin{i}']:.3f}" for i in range(5))
            line += f"  val {row['val_loss']:.4f}: {bins}"
        in_place = sys.stdout.isatty() and not keep
        print(line, end="\r" if in_place else "\n", flush=True)

    def write_files(self):
        """log.csv and loss.png, whole each time: so a run that went back to its
        checkpoint leaves no rows of the steps it lost."""
        write_csv(self.out / "log.csv", self.columns, self.rows)
        curves = dict(train=self.curve("loss"), validation=self.curve("val_loss"))

        # The first losses, 0.65 where the network still says zero, would flatten all that
        # follows. So the axis reaches 0.1 up from just below the least one, or as far as
        # the newest ones need.
        least = min(value for points in curves.values() for _, value in points)
        newest = max(points[-1][1] for points in curves.values() if points)
        low = 0.02 * math.floor(least / 0.02)
        high = max(low + 0.1, 0.02 * math.ceil(newest / 0.02 + 1))
        for name, points in curves.items():
            curves[name] = [(step, value) for step, value in points if value < high]

        plot(
            self.out / "loss.png",
            curves,
            "Velocity loss, Eq. (3)",
            Axis("optimiser step", 0, self.steps),
            Axis("loss", low, high),
        )

    def curve(self, name):
        """[(step, value)] of a column, where it has one."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def summarise(self, step):
        """Print what training took."""
        pictures = step * self.batch_size
        speed = pictures / max(self.seconds, 1e-9)
        print(f"{pictures:,} pictures in {self.seconds:,.1f} s, {speed:,.0f} images/s")
        if self.loss.is_cuda:
            print(f"peak memory {torch.cuda.max_memory_allocated() >> 20:,} MiB")


def write_csv(path, columns, rows):
    """A table: `rows` are dicts, in which a column may be missing."""
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(str(row.get(name, "")) for name in columns))
    path.write_text("\n".join(lines) + "\n")


class Axis(NamedTuple):
    """An axis of a plot: what it says, and from where to where it goes."""

    label: str
    low: float
    high: float

    def share(self, value):
        """Where a value lies: 0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def plot(path, curves, title, x_axis, y_axis):
    """Draw `curves`, name -> [(x, y)], three at most, into a PNG of 720 x 450
    pixels."""
    # Drawn at twice the final size: scaling down smooths the lines.
    image = Image.new("RGB", (1440, 900), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    left, right, top, bottom = 130, 1400, 90, 780

    def place(x, y):
        across = left + (right - left) * x_axis.share(x)
        down = bottom + (top - bottom) * y_axis.share(y)
        return across, down

    # Six lines in each direction, with their numbers.
    for i in range(6):
        x = x_axis.low + (x_axis.high - x_axis.low) * i / 5
        y = y_axis.low + (y_axis.high - y_axis.low) * i / 5
        across, down = place(x, y)
        pen.line([(across, top), (across, bottom)], "#d8d8d8", 2)
        pen.line([(left, down), (right, down)], "#d8d8d8", 2)
        pen.text((across, 810), f"{x:,g}", "#333", font, "mm")
        pen.text((115, down), f"{y:.4g}", "#333", font, "rm")

    # The curves, which fall, and their names in the upper right corner.
    height = 130
    for (name, points), colour in zip(curves.items(), ("#d1495b", "#00798c", "#7a5195")):
        if points:
            places = [place(x, y) for x, y in points]
            pen.line(places, colour, 5, "curve")
            pen.circle(places[-1], 6, colour)  # a single point has no line
        pen.text((1370, height), name, colour, font, "rm")
        height += 45

    pen.text((765, 45), title, "#111", font, "mm")
    pen.text((765, 865), x_axis.label, "#111", font, "mm")
    pen.text((90, 45), y_axis.label, "#111", font, "mm")
    image.resize((720, 450), Image.LANCZOS).save(path)


# --------------------------------------------------------------------------------------
# 13. Checkpoints and signals
# --------------------------------------------------------------------------------------


def save_checkpoint(path, settings, data, parts, progress):
    """All that a run needs to go on, in one file. `parts` are things with a state_dict,
    by name; `progress` is a dict of plain values and tensors."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state.update(progress)
    state.update(
        settings=dataclasses.asdict(settings),
        names=list(data.names),
        checksum=data.checksum,
    )

    save_whole(state, path)


def save_whole(state, path):
    """torch.save, first beside `path`, then renamed: so it is always a whole file, the
    old or the new one. Raises OSError, with a readable message."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # not into the file: what it says of a full disk is no OSError
    beside = path.with_suffix(".tmp")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written ({error.strerror})") from error


def load_checkpoint(path, settings=None, checksum=None):
    """The dict that save_checkpoint wrote, with its tensors on the CPU.

    Raises ValueError, with a readable message, if the file is missing, damaged, or of
    another program; and, if `settings` or a `checksum` are given, if the run was made
    with others.
    """
    try:
        # torch writes a zip file with a checksum for each tensor, but doesn't look at them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")

        # weights_only: a file from elsewhere may hold data, but no code that would run.
        state = torch.load(path, map_location="cpu", weights_only=True)
        made = state["settings"]
        if list(made) != [field.name for field in dataclasses.fields(Settings)]:
            raise ValueError("made by another script, or another version of this one")
        Settings(**made)
    except FileNotFoundError as error:
        raise UserError(
            f"no {path}: train first, or say where it is (--out, --weights)"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        reason = in_one_line(error)
        raise UserError(f"can't use {path}: no sound checkpoint ({reason})") from error

    if settings is not None:
        for name, value in dataclasses.asdict(settings).items():
            if name not in FREE_TO_CHANGE and made[name] != value:
                hint = ""
                if name in ("steps", "seed", "schedule"):
                    hint = f"; of sampling it is --sample-{name}"
                raise other_run(path, f"{name} is {made[name]}, not {value}{hint}")
    if checksum is not None and state["checksum"] != checksum:
        raise other_run(path, "it was trained on other pictures")
    return state


def other_run(path, reason):
    """The UserError for a checkpoint of a run that is not the one asked for."""
    return UserError(f"can't use {path} ({reason}): use its settings, or another --out")


def in_one_line(error):
    """What an error says, cut to one line."""
    return " ".join(str(error).split())[:100] or type(error).__name__


def restore(parts, state):
    """Put a checkpoint's states into the `parts` that save_checkpoint took. Raises
    ValueError, with a readable message, where they don't fit."""
    for name, part in parts.items():
        if name not in state:
            raise UserError(f"the checkpoint has no {name}: exported weights can't be resumed")
        try:
            part.load_state_dict(state[name])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise other_run(f"the {name} of the checkpoint", in_one_line(error)) from error


def export(settings):
    """Write the averaged network of a run to settings.weights, without what only
    training needs: weights as fp16, class names, settings, and `about`, which says where
    it is from. Returns the path; raises ValueError or OSError, with a readable message.
    """
    if not settings.weights:
        raise UserError("export wants --weights FILE, the file to write")
    path = Path(settings.weights)
    source = settings.folder() / "checkpoint.pt"

    # Only what was exported before is overwritten: no run, and no file of another kind.
    if path.exists() and "log" in load_checkpoint(path):
        raise UserError(
            f"--weights {path}, the file to write, is a run: the run to export is named by --out"
        )
    state = load_checkpoint(source)
    if "log" not in state:
        raise UserError(f"{source} is exported already")
    newest = state["log"]["rows"][-1]
    if "val_loss" not in newest:  # Ctrl-C saves between validations too
        raise UserError(
            f"{source}, step {state['step']:,}, has not been validated: resume the run first"
        )

    # A file for others says nothing of where the data lay on this machine.
    kept = {name: state[name] for name in ("step", "names", "checksum")}
    kept["settings"] = {**state["settings"], "out": "", "weights": "", "inception": ""}
    if kept["settings"]["data"] != "shapes":
        kept["settings"]["data"] = "data"
    kept["ema"] = {name: value.half() for name, value in state["ema"].items()}
    kept["about"] = dict(
        command=without_folders(state["command"]),
        date=datetime.date.fromtimestamp(source.stat().st_mtime).isoformat(),
        result=f"validation loss {newest['val_loss']:.4f}",
        licence="MIT",
    )
    make_folder(path.parent)
    save_whole(kept, path)
    print(f"{path}: {path.stat().st_size:,} bytes, {kept['about']}")
    return path


def without_folders(command):
    """A command line without the folders of the machine that it ran on. (What `train`
    says by itself, in a notebook, has none.)"""
    if not command.startswith("python "):
        return command
    python, script, *words = shlex.split(command)
    kept = [python, Path(script).name]
    words = iter(words)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--data", "--out", "--inception"):
            kept.append(word)
            continue
        if not equals:
            value = next(words)
        if (flag, value) == ("--data", "shapes"):  # these lie in no folder
            kept += [flag, value]
    return shlex.join(kept)


def as_typed(command, windows=os.name == "nt"):
    """A command line as the shell wants it: that of Windows doesn't know the single
    quotes which shlex writes."""
    return subprocess.list2cmdline(shlex.split(command)) if windows else command


class Stopped(Exception):
    """Training was stopped by the signal `number`, and everything is saved."""

    def __init__(self, text, number):
        super().__init__(text)
        self.number = number


class StopSignals:
    """A context in which Ctrl-C and SIGTERM only leave a note, in `received`, so that a
    step can be finished and saved. A second signal acts as it would have without
    this."""

    def __enter__(self):
        self.received = None
        self.former = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.former[number] = signal.signal(number, self.take_note)
        return self

    def take_note(self, number, frame):
        """What a signal does here."""
        self.received = number
        self.put_back()

    def put_back(self):
        """Let signals do again what they did before."""
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self.put_back()

    def stopped(self, step, path, command):
        """The Stopped to raise, which says what resumes the run."""
        command = as_typed(command)
        return Stopped(
            f"stopped after step {step:,}, all saved in {path}. To resume:\n  {command}",
            self.received,
        )


# --------------------------------------------------------------------------------------
# 14. Device, compile, width
# --------------------------------------------------------------------------------------


def choose_device(name="auto"):
    """The torch.device of that name; "auto" is the fastest kind there is. Raises
    ValueError if there is none of the kind asked for."""
    available = dict(
        cuda=torch.cuda.is_available(),
        mps=torch.backends.mps.is_available(),
        cpu=True,
    )
    if name == "auto":
        name = [kind for kind, there in available.items() if there][0]
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this torch, has none")
    return torch.device(name)


def choose_precision(device, name="auto"):
    """(dtype, why): in which numbers matrix products and convolutions are computed.

    `name` is one of PRECISIONS, or "auto": bf16 where a GPU computes with it, as it has
    fp32's range and so needs no scaling of the loss; fp16 on a GPU that has tensor cores
    for that alone, such as a T4; else fp32.
    """
    if name != "auto":
        return PRECISIONS[name], "as asked for"
    if device.type != "cuda":
        return torch.float32, "as always outside CUDA"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "which this GPU computes with"
    if torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16, "as this GPU has no bf16"
    return torch.float32, "as this GPU has no tensor cores"


def autocast(device, dtype):
    """A context in which matrix products and convolutions are computed in `dtype`, one
    of PRECISIONS. Weights stay fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_up(settings):
    """What modes that use a network begin with: (device, dtype of matrix products, folder
    to write to). Raises ValueError or OSError, with a readable message, where the device
    or the folder can't be had."""
    keep_freed_memory()
    device = choose_device(settings.device)
    precision, why = choose_precision(device, settings.precision)
    out = make_folder(settings.folder())
    torch.backends.cudnn.allow_tf32 = False  # what is said to be fp32 is fp32

    # A precaution: with 64 tokens, as here, and a mask, which we don't have, cuDNN's
    # attention can give NaN gradients on an H100 (PyTorch issue 196678, September 2026).
    # In bf16 no GradScaler would catch them.
    torch.backends.cuda.enable_cudnn_sdp(False)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"torch {torch.__version__} on {name}, {str(precision).removeprefix('torch.')} {why}")
    return device, precision, out


def keep_freed_memory():
    """Let the C library of Linux keep freed memory for the next step. By itself it gives
    large blocks back, and the system must clear every page of new ones: on a CPU a step
    of the default batch took 1.4 times as long. Elsewhere this does nothing."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:  # glibc's; the numbers are of its malloc.h
            mallopt(-4, 0)  # M_MMAP_MAX: no block comes from the system by itself
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: none goes back


def make_folder(path):
    """Make the folder and check that files can be written there: better to fail now
    than after an hour. Returns it; raises OSError, with a readable message."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial = path / "trial.tmp"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise OSError(
            f"{path} can't be written to ({error.strerror}): choose another folder"
        ) from error
    return path


def check_batch_size(batch_size, count):
    """Raises ValueError if a batch is larger than the training set."""
    if batch_size > count:
        raise UserError(f"--batch-size {batch_size}: there are {count} training pictures")


def build_network(settings, classes, device="cpu"):
    """The UNet of `settings` on the device, its weights drawn from their seed; at the
    given width, or else at the largest that the budget allows, in steps of 8. Raises
    ValueError for a width that no network can have."""
    variant = dict(
        after_injection=settings.after_injection,
        modulate=settings.modulate == "on",
    )
    width = settings.width or widest_that_fits(classes, variant)
    torch.manual_seed(settings.seed)
    return UNet(classes, width, **variant).to(device)


def widest_that_fits(classes, variant):
    """The largest width, a multiple of 8, at which the UNet of `variant` is within the
    parameter budget."""
    width = 8
    while True:
        # On the meta device a network has shapes but no memory.
        with torch.device("meta"):
            wider = UNet(classes, width + 8, **variant)
        if count_parameters(wider) >= MAX_PARAMETERS:
            return width
        width += 8


def network_example(x, y, batch):
    """Arguments like those with which training and validation call the network: torch
    compiles for their shapes and types, whatever their values."""
    x = to_model(x[:batch])
    y = y[:batch].clone()  # not a view: for torch.compile that would be another kind of input
    return x, torch.zeros(len(y), device=y.device), y


def sampler_example(net, settings):
    """Arguments like those with which guided_velocity calls `net` for a full batch of
    samples."""
    device = next(net.parameters()).device
    rows = whole_chunks(settings.sample_batch)
    if possible_guidance(settings) != 0:  # both halves of Eq. (4)
        rows *= 2

    x = torch.zeros(rows, 3, 32, 32, device=device)
    log_snr = torch.zeros(rows, device=device)
    classes = torch.zeros(rows, dtype=torch.int64, device=device)
    with torch.no_grad():
        embeddings = net.embed(classes)
    return x, log_snr, embeddings


def compile_network(net, how, examples, precision):
    """torch.compile `net` in place, so that its weights keep their names, if `how` asks
    for it.

    Where compiling fails, it fails at the first call. So a copy goes first, forward and,
    if its weights are trained, backward, with each of the `examples`, which are arguments
    like those to come. If the copy fails, one line says so and all goes on without. What
    was compiled for it serves `net` too, as torch keeps that by class and by the kind of
    input. (CUDA graphs are recorded at the second call with an input, so by `net`.)
    """
    device = next(net.parameters()).device
    if how == "off" or (how == "auto" and device.type != "cuda"):
        return
    trained = next(net.parameters()).requires_grad

    # A step launches some 900 kernels, most of which are over before the next one is
    # launched. So on CUDA the launches of a call are recorded once, as a CUDA graph, and
    # then played back as a whole: on an H200 a step of 256 takes 10.1 ms instead of 21.6
    # ms, and its kernels alone 9.7 ms. What a call returns is overwritten by the next
    # call; training, validation and sampler have computed new tensors from it by then.
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    try:
        probe = copy.deepcopy(net)
        probe.compile(mode=mode)
        for example in examples:
            with torch.set_grad_enabled(trained), autocast(device, precision):
                v = probe(*example)
            if trained:
                v.sum().backward()
        net.compile(mode=mode)
    except Exception as error:  # a compiler can fail in any way
        print(f"going on without torch.compile: {type(error).__name__}: {in_one_line(error)}")


# --------------------------------------------------------------------------------------
# 15. Drawn shapes
# --------------------------------------------------------------------------------------
# A stand-in for photographs: nothing to download, and learned in minutes on a CPU.

SHAPE_NAMES = "circle ring square frame triangle diamond plus cross star moon".split()
COLOUR_NAMES = "red orange yellow lime cyan blue magenta pink tan white".split()


def shape_distance(name, u, v):
    """How far the place (u, v) is outside a shape, below 0 inside; u points right, v
    up.

    The shape fits into [-1,1] (the star's tips reach 1.02). Outside, this grows about
    like the distance.
    """
    radius = u.hypot(v)
    square = u.abs().maximum(v.abs())  # a distance with square corners
    if name == "circle":
        return radius - 1
    if name == "ring":
        return (radius - 0.75).abs() - 0.22
    if name == "square":
        return square - 0.85
    if name == "frame":
        return (square - 0.7).abs() - 0.2
    if name == "triangle":
        return (-v - 0.65).maximum(u.abs() * 0.87 + v * 0.5 - 0.5)
    if name == "diamond":
        return (u.abs() + v.abs() - 1) * 0.7
    if name == "plus":
        return (u.abs().minimum(v.abs()) - 0.28).maximum(square - 1)
    if name == "cross":
        return ((u.abs() - v.abs()).abs() - 0.4).maximum(square - 0.9)
    if name == "star":
        return radius - 0.68 - 0.34 * (5 * torch.atan2(u, v)).cos()
    return (radius - 1).maximum(0.8 - (u - 0.5).hypot(v))  # moon


def draw_shapes(count, seed):
    """Draw `count` pictures of 10 shapes x 10 colours: (x uint8 (count,3,32,32), y
    (count,), class names). The same seed draws the same pictures."""
    random = torch.Generator().manual_seed(seed)
    classes = len(SHAPE_NAMES) * len(COLOUR_NAMES)
    y = torch.randint(classes, (count,), generator=random)

    # Half a shape's size in pixels, and its middle, such that it lies wholly inside.
    size = 11 + 3 * torch.rand(count, 1, 1, generator=random)
    shift = -1 + 2 * torch.rand(2, count, 1, 1, generator=random)
    middle_x, middle_y = 15.5 + shift * (15.5 - size)

    # Every pixel's place as the shape sees it.
    u = (torch.arange(32.0) - middle_x) / size  # (count,1,32)
    v = (middle_y - torch.arange(32.0)[:, None]) / size  # (count,32,1)

    # Which share of a pixel the shape covers: the distance in pixels, cut to one pixel,
    # gives a smooth edge.
    cover = torch.empty(count, 1, 32, 32)
    for i, name in enumerate(SHAPE_NAMES):
        members = y // len(COLOUR_NAMES) == i
        distance = shape_distance(name, u[members], v[members]) * size[members]
        cover[members, 0] = (0.5 - distance).clamp(0, 1)

    # Paint the shape on a dark grey.
    palette = torch.tensor([ImageColor.getrgb(name) for name in COLOUR_NAMES]).float()
    colour = palette[y % len(COLOUR_NAMES)][:, :, None, None]
    grey = 10 + 40 * torch.rand(count, 1, 1, 1, generator=random)
    x = grey.lerp(colour, cover).byte()

    names = [f"{colour} {shape}" for shape in SHAPE_NAMES for colour in COLOUR_NAMES]
    return x, y, names


# --------------------------------------------------------------------------------------
# 16. Command line
# --------------------------------------------------------------------------------------


def check_value(field, value):
    """Raises ValueError, with a readable message, if a field of Settings may not have
    this value."""
    flag = "--" + field.name.replace("_", "-")
    limits = field.metadata
    kinds = (int, float) if field.type is float else field.type
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{flag} {value!r} is not of type {field.type.__name__}")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{flag} {value} is none of {', '.join(limits['choices'])}")
    if limits["low"] is not None:
        # Written so that nan fails as well.
        if not limits["low"] <= value <= limits["high"]:
            raise UserError(
                f"{flag} {value} is not within {limits['low']} to {limits['high']}"
            )


# What is not taken from a checkpoint, which may have been made on another machine.
THIS_MACHINE = dict(device="auto", compile="auto", precision="auto", out="", weights="")


def choose_settings(**given):
    """Settings from those `given`. For the rest, in this order: what `recipe="paper"`
    sets, the defaults for data="shapes", the defaults. Raises ValueError as Settings
    does."""
    values = {}
    if given.get("data") == "shapes":
        values.update(SHAPES)
    if given.get("recipe") == "paper":
        values.update(PAPER)
    values.update(given)
    return Settings(**values)


def checkpoint_settings(**given):
    """Settings to draw with, from a checkpoint or exported weights: those `given`, and
    for the rest those that it was made with. Raises ValueError, with a readable
    message, if there is no such file or it can't be used.

    A checkpoint knows how it was made, but not on which machine we are; and `classes`
    is of one command only. Where recipe="paper" is asked for, the checkpoint must be
    of that recipe.
    """
    made = load_checkpoint(choose_settings(**given).checkpoint())["settings"]
    asked = PAPER if given.get("recipe") == "paper" else {}
    return Settings(**{**made, **THIS_MACHINE, "classes": "", **asked, **given})


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a command that is not valid, instead of ending the
    process."""

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def parse(argv):
    """(mode, dict of the settings that `argv` gives). Raises ValueError, with a
    readable message."""
    parser = Parser(
        "diffusion.py",
        description=__doc__.split("\n\n")[0],
        epilog="With --data shapes or --recipe paper some defaults are others.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    modes = "train sample interpolate neighbours fid schedules export".split()
    parser.add_argument("mode", nargs="?", choices=modes, default="train")
    flags = ["--help"]
    for field in dataclasses.fields(Settings):
        flags.append("--" + field.name.replace("_", "-"))
        parser.add_argument(
            flags[-1],
            type=field.type,
            choices=field.metadata["choices"],
            help=f"{field.metadata['help']}; default {field.default!r}",
        )

    # The value of a flag that there isn't would be taken for the mode.
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in flags:
            parser.error(f"there is no {flag}")
    given = vars(parser.parse_args(argv))
    mode = given.pop("mode")
    return mode, given


def command_line(argv):
    """The command that was typed, as one that can be typed again from the same folder."""
    script = Path(__file__).resolve()
    if script.parent == Path.cwd():
        script = script.name
    return shlex.join(["python", str(script), *argv])


def run(argv):
    """What `python diffusion.py ARGV` does; returns the mode's result. Raises what the
    mode raises."""
    mode, given = parse(argv)
    if mode == "export":
        return export(choose_settings(**given))
    if mode == "train":
        command = command_line(argv)
        return train(choose_settings(**given), command)
    if mode == "schedules":
        return schedules_mode(choose_settings(**given))

    # The others start from a checkpoint.
    settings = checkpoint_settings(**given)
    if mode == "sample":
        return sample_mode(settings, *open_network(settings, settings.count))
    if mode == "interpolate":
        count = 80  # eight pairs, ten pictures of each
        return interpolate_mode(settings, *open_network(settings, count))

    # Neighbours and FID compare with real pictures, those that the network learned from.
    make_folder(settings.folder())  # better to fail now than after a download
    data = load_data(settings.data, choose_device(settings.device))
    count = settings.fid_count if mode == "fid" else settings.count
    net, names = open_network(settings, count, data.checksum)
    if mode == "neighbours":
        return neighbours_mode(settings, net, names, data)
    return fid_mode(settings, net, data)


LESS_MEMORY = (
    "out of memory: training with a quarter of --batch-size takes less than half of it (give "
    "that run another --out); sampling takes less with a smaller --sample-batch"
)


def main(argv=None):
    """`run`, with errors as one line and an exit status: the only place that ends the
    process."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError, AssertionError) as error:
        if not str(error):  # an assert that says nothing: its place is all there is to tell
            raise
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        # CUDA, its libraries, Apple's GPUs and the CPU each say it in their own words.
        words = ("out of memory", "ALLOC_FAILED", "allocate memory", "not enough memory")
        words += ("unable to find an engine",)  # cuDNN, when none has the memory it needs
        if not any(word in str(error) for word in words):
            raise
        sys.exit(f"error: {LESS_MEMORY}")
    except Stopped as stopped:
        print(f"\n{stopped}")
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:  # outside the training loop there is nothing to save
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
