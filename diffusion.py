# SPDX-License-Identifier: MIT
"""Class-conditional CIFAR-100 diffusion in under 1,000,000 parameters, at most 50,000 steps.

Section 2 of the paper "Modern Methods, Classical Constraints", in one file that reads from
the top:

    python diffusion.py                  train on CIFAR-100 (downloaded if not in ./data)
    python diffusion.py --data shapes    the same on drawn shapes: no download, no GPU
    python diffusion.py sample --classes rose,whale --count 16 --guidance 3
    python diffusion.py interpolate      pictures between pairs of noises and classes
    python diffusion.py neighbours       the training pictures nearest to samples
    python diffusion.py fid              FID of 10,000 samples against the test pictures
    python diffusion.py schedules        draw the noise schedules

A run writes into one folder, runs/diffusion-<data set>; the same command again goes on where
it stopped. The other modes read that run's weights.pt, or --weights FILE.

Result of the first command, in some ten minutes on an H200: a velocity loss of 0.1115 on test
pictures, where a network that always says zero has 0.645. README.md has its log and pictures.

The network sees a noised picture and predicts the velocity v, from which both the picture and
the noise follow. It has 960,755 parameters; a, b, c = 48, 96, 144 channels:

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

Two things go beyond the paper: the embedding also scales and shifts the channels in every
block, and training sees slightly cleaner pictures than the schedule says. `--recipe paper`
takes both back, and samples as the paper does.

Sections 1 to 9 are the story. To understand the model read 1 (layers and U-Net), to understand
diffusion 3 (noise), 4 (objective), 6 (training) and 8 (guidance and sampler). What follows the
double line supports the story.

Shapes in comments: B pictures, C channels, H x W pixels, E width of the embedding.
Symbols: x       a picture in [-1,1]
         t       the time in [0,1]: 0 is clean, 1 is pure noise
         x_t     a noised picture, x_noised in the paper
         log_snr how clean x_t is, the paper's lambda: about 20 is clean, -20 is noise
         alpha   scale of the picture in x_t (not DDPM's alpha_t, which is a ratio)
         sigma   scale of the noise in x_t; alpha² + sigma² = 1
         v       the velocity

Tags like [2.2] name a section of the paper: 2.1 Strategy, 2.2 Methodology, 2.3 Discussion,
2.4 Results, 2.5 Limitations; (1) to (4) are its equations. `our choice` marks what it leaves
open. Numbers without a dot are its references:

    [3]  Crowson's Colab (2024), from which the paper's code was adapted
    [4]  Crowson, v-diffusion (2024): the spliced schedule
    [11] Denoising Diffusion Probabilistic Models (DDPM, 2020)
    [12] Classifier-Free Diffusion Guidance (2022)
    [19] Understanding Diffusion Objectives as the ELBO (2023)
    [20] Variational Diffusion Models (2021)
    [24] Improved DDPM (2021): the cosine schedule
    [28] U-Net (2015)
    [29] Photorealistic Text-to-Image Diffusion (Imagen, 2022): dynamic clipping
    [30] Progressive Distillation (2022): the velocity
    [35] Denoising Diffusion Implicit Models (DDIM, 2020)
    [39] slerp
    [42] Attention Is All You Need (2017)

For CIFAR-10, replace CIFAR100 by CIFAR10 in the line DATASET = ...: the rest follows from it.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import io
import itertools
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.utils._pytree import tree_leaves

DATASET = torchvision.datasets.CIFAR100
MAX_PARAMETERS = 1_000_000  # [2.1] fewer than this, asserted right above the training loop
MAX_STEPS = 50_000  # [2.1] gradient updates at most, asserted in the training loop


# --------------------------------------------------------------------------------------
# 1. Layers and U-Net
# --------------------------------------------------------------------------------------


def separable_conv(c_in, c_out):
    """Depthwise-separable 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W).

    Space first, one 3x3 filter per channel, then features, a 1x1 mixture of channels:
    9 * c_in + c_in * c_out weights instead of 9 * c_in * c_out. "The majority" of the
    convolutions [2.2].
    """
    # groups=c_in: each channel has a filter of its own.
    space = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
    features = nn.Conv2d(c_in, c_out, 1)
    return nn.Sequential(space, features)


def regular_conv(c_in, c_out):
    """Regular 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W)."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def sinusoidal_embedding(log_snr, width=64):
    """Sines and cosines of the noise level [42]: (B,) -> (B,width).

    [2.2] says "timestep embeddings"; what Eq. (4) gives the network is lambda, the log-SNR.
    So the network knows nothing of the schedule, and can be sampled on another one.

    log_snr lies between -20 and 20. Wavelengths go from 3 to 300 (our choice): the long ones
    order all levels, the short ones tell neighbours apart.
    """
    low, high = math.log10(0.02), math.log10(2)
    frequency = 10 ** torch.linspace(low, high, width // 2, device=log_snr.device)
    angle = log_snr[:, None].float() * frequency  # (B,width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,H,W) -> (B,C,H,W).

    GroupNorm, not BatchNorm: a batch mixes noise levels, whose statistics have nothing in
    common. This form of block, SiLU, and 8 groups, so that C is a multiple of 8, are our
    choice.

    `conv` is separable_conv or regular_conv. With `e_width`, an embedding (B,e_width) scales
    and shifts the channels after the second norm. That is ours; elsewhere it is known as
    FiLM or adaptive GroupNorm.
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
    """Layers one after another; blocks also get the embedding: (B,C,H,W), (B,E) ->
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

    The abstract speaks of transformer layers, which would have an MLP too; that we follow
    [2.2] is our choice. So are C / 64 heads (rounded, or the next smaller number that divides
    C), one group in the norm, and zeros in the last layer, so that it starts as the identity.
    No positions are added: the zeros that convolutions pad with show where the border is.
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

        # softmax(q k^T / sqrt(C/heads)) v: each token takes a weighted mean of all tokens.
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B,heads,HW,C/heads)

        # Heads side by side, and tokens back to their positions.
        y = self.out(mixed.transpose(1, 2).flatten(2))  # (B,HW,C)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Injection(nn.Module):
    """Adds the embedding of noise level and class [2.2], then convolves: (B,C,H,W), (B,E) ->
    (B,C,H,W).

    The embedding goes into the branch only; x passes by unchanged, as in any residual block
    (our choice, as are norm, activation and the two places in the network). The convolution
    is a regular one: a separable one looks at each channel by itself before it mixes them,
    and the paper blames wave-like artefacts on that [2.3]. `conv` takes either.
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

    x_t (B,3,32,32); log_snr (B,); labels (B,), class numbers, where the number `no_class`
    stands for "no class", or (B,E), embeddings as `embed` gives them. The diagram is in this
    file's header. Widths, depths and kernels, 2x2 average pooling, doubling by repetition,
    and that skips are added are our choice. `modulate` lets the embedding act in every block,
    which goes beyond the paper. Raises ValueError if `width` is no multiple of 8.
    """

    def __init__(
        self, classes=100, width=48, after_injection="regular", modulate=True, e_width=128
    ):
        super().__init__()
        if width < 8 or width % 8 != 0:
            raise ValueError(f"width {width} is not a multiple of 8")
        self.no_class = classes  # classes are 0 to classes - 1
        a = width
        b = 2 * width
        c = 3 * width
        conv = regular_conv if after_injection == "regular" else separable_conv

        def block(channels):
            return ResidualBlock(channels, separable_conv, e_width if modulate else 0)

        def halve(c_in, c_out):
            return nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1)

        # The embedding is the sum of two, one of the noise level and one of the class; the
        # last class is "no class", learned like the others. These layers are our choice.
        self.embed_log_snr = nn.Sequential(
            nn.Linear(64, e_width), nn.SiLU(), nn.Linear(e_width, e_width)
        )
        self.embed_class = nn.Embedding(classes + 1, e_width)

        # Down: 32x32 -> 16x16 -> 8x8
        self.stem = regular_conv(3, a)
        self.inject1 = Injection(e_width, a, conv)
        self.down1 = block(a)
        self.down2 = Stage(*halve(a, b), block(b), block(b))
        self.down3 = Stage(*halve(b, c), block(c), Attention(c))

        # Middle: 8x8
        self.inject2 = Injection(e_width, c, conv)
        self.middle = Stage(block(c), Attention(c), block(c))

        # Up: 8x8 -> 16x16 -> 32x32. As skips are added and not concatenated, as they are in
        # [28], the 1x1 convolution can work before doubling, on a quarter of the positions.
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
        """Class embeddings (B,E) of class numbers (B,); embeddings pass through."""
        if labels.is_floating_point():
            return labels
        return self.embed_class(labels)

    def forward(self, x, log_snr, labels):
        e = self.embed_log_snr(sinusoidal_embedding(log_snr)) + self.embed(labels)
        e = F.silu(e)  # (B,E)

        # Down
        x = self.inject1(self.stem(x), e)
        skip1 = self.down1(x, e)  # (B,a,32,32)
        skip2 = self.down2(skip1, e)  # (B,b,16,16)
        x = self.down3(skip2, e)  # (B,c,8,8)

        # Middle
        x = self.inject2(x, e)
        x = self.middle(x, e)  # (B,c,8,8)

        # Up, each pixel repeated 2x2 (nearest neighbour), and the skips added
        x = F.interpolate(self.join2(x), scale_factor=2) + skip2
        x = self.up2(x, e)  # (B,b,16,16)
        x = F.interpolate(self.join1(x), scale_factor=2) + skip1
        x = self.up1(x, e)  # (B,a,32,32)

        # The last layers are in fp32 where the others are in bf16, because guidance
        # amplifies rounding errors.
        with torch.autocast(x.device.type, enabled=False):
            return self.out(x.float())  # (B,3,32,32)


def count_parameters(net):
    """How many numbers the network has; training changes all of them. The averaged weights
    (EMA) are not counted again: what is kept in the end is one network of this size."""
    return sum(p.numel() for p in net.parameters())


# --------------------------------------------------------------------------------------
# 2. Data
# --------------------------------------------------------------------------------------
# The whole data set lies on the device, 184 MB as bytes. So a batch is an index, and there
# are no worker processes.


class Data(NamedTuple):
    """Pictures x are uint8 (N,3,32,32) in [0,255], labels y int64 (N,)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    names: list  # of the classes


def load_cifar(folder):
    """(train_x, train_y, test_x, test_y, names) as in Data, from the folder.

    The data set is downloaded if the folder has none, but only into one that exists, or into
    the default one. torchvision verifies its md5. Raises UserError, with what to do by
    hand, if it is damaged or can't be had.
    """
    folder = Path(folder).expanduser()
    if folder.name == DATASET.base_folder:  # one level too deep
        folder = folder.parent
    if not folder.is_dir() and folder != Path("data"):
        raise UserError(f"--data {folder}: no such folder (for drawn shapes: --data shapes)")

    missing = not (folder / DATASET.base_folder).exists()
    parts = []
    try:
        for train in (True, False):
            part = DATASET(folder, train, download=missing)
            x = torch.from_numpy(part.data).permute(0, 3, 1, 2)
            parts += [x.contiguous(), torch.tensor(part.targets)]
    except Exception as error:  # no net, host down, disk full, file damaged
        raise UserError(
            f"no {DATASET.__name__} in {folder} ({in_one_line(error)}): get {DATASET.url} "
            f"(md5 {DATASET.tgz_md5}), unpack it there in place of what may be damaged; "
            "or do without, with --data shapes"
        ) from error
    return *parts, part.classes


def load_data(source, device="cpu"):
    """`source`, "shapes" or the folder of the data set, as a Data on `device`. Raises
    UserError as load_cifar."""
    if source == "shapes":
        train_x, train_y, names = draw_shapes(10_000, seed=1)
        test_x, test_y, _ = draw_shapes(1_000, seed=2)
        parts = [train_x, train_y, test_x, test_y]
    else:
        *parts, names = load_cifar(source)
    return Data(*[part.to(device) for part in parts], names)


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
    """Mirror the pictures (B,3,H,W) whose `draw` (B,), from 0 to 1, is below a half: the one
    augmentation (our choice)."""
    return torch.where(draw.view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)


def seeded_generator(device, *numbers):
    """A generator of random numbers on the device that depends on these numbers alone.

    All that is random in training follows from the seed and the step (in sampling, from its
    seed and the batch). So a run that was stopped can go on exactly as it would have, and
    its checkpoint need not say where any generator stood. SeedSequence makes seeds that
    have nothing in common from numbers as close as 1 and 2.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(seed))


# --------------------------------------------------------------------------------------
# 3. Noise: schedules, alpha and sigma, velocity
# --------------------------------------------------------------------------------------
# A schedule maps t in [0,1] to the log-SNR, lambda = log(alpha²/sigma²): strictly falling
# and invertible [2.2]. Ours are finite at both ends too.


def cosine_schedule(t):
    """lambda = -2 log tan(a t + b) [2.2, 24], from 20 at t = 0 to -20 at t = 1; t any shape.

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
    """lambda = -log(e^(1e-4 + 10 t²) - 1), from 9.2 at t = 0 to -10 at t = 1; t any shape.
    This is close to DDPM's linear betas in continuous time [11, 20], and Crowson's code [3]
    had it [2.3]."""
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


def spliced_schedule(t):
    """Cosine first, then linear [2.3, 4]; t any shape.

    At t = 0.80074257 the cosine schedule has the value (-2.256) and very nearly the slope
    per t of the linear one at 0.48536712; both constants are Crowson's [4]. So the two are
    joined there, and t is stretched such that it still goes from 0 to 1: the joint lies at
    t = 0.609. Value and slope agree to 2 parts in 10,000 and not better, as the constants
    are for a cosine whose infinite ends are not cut off.
    """
    shift = 0.80074257 - 0.48536712
    u = (1 + shift) * t

    # `where` computes both for all of t; the clamps keep the one not taken finite.
    early = cosine_schedule(u.clamp(max=1))
    late = linear_schedule((u - shift).clamp(min=0))
    return torch.where(u < 0.80074257, early, late)


# A schedule of your own goes here: it can then be trained, sampled and drawn.
SCHEDULES = dict(cosine=cosine_schedule, linear=linear_schedule, spliced=spliced_schedule)


def to_alpha_sigma(log_snr):
    """alpha = sqrt(sigmoid(lambda)) and sigma = sqrt(sigmoid(-lambda)), shaped to scale
    pictures: (B,) -> two of (B,1,1,1)."""
    log_snr = log_snr.view(-1, 1, 1, 1)
    alpha = torch.sigmoid(log_snr).sqrt()
    sigma = torch.sigmoid(-log_snr).sqrt()
    return alpha, sigma


def velocity(x, noise, alpha, sigma):
    """v = alpha * noise - sigma * x: Eq. (1) [30].

    Pictures (B,3,H,W); alpha and sigma (B,1,1,1) or numbers, here and in the next two. As
    alpha² + sigma² = 1, they are cos(phi) and sin(phi) of an angle phi, x_t moves on a circle
    from x to noise, and v is its velocity, d x_t / d phi.

    Why v and not the noise: where all is noise, a guess of the noise does not tell the
    picture; where all is clean, a guess of the picture does not tell the noise. v tells both
    at every level: see split.
    """
    return alpha * noise - sigma * x


def add_noise(x, noise, alpha, sigma):
    """x_t = alpha * x + sigma * noise: Eq. (2)."""
    return alpha * x + sigma * noise


def split(x_t, v, alpha, sigma):
    """(x, noise) that make up x_t if v is its velocity: Eq. (1) and (2) solved for both.
    They turn (x, noise) by phi, and this turns (x_t, v) back."""
    pred_x0 = alpha * x_t - sigma * v
    pred_noise = sigma * x_t + alpha * v
    return pred_x0, pred_noise


# --------------------------------------------------------------------------------------
# 4. Objective and optimiser
# --------------------------------------------------------------------------------------
# The objective is the mean of |v - v_hat|², Eq. (3), one line of the training loop. The
# network's v_hat stands for a picture and a noise too, x_hat and noise_hat, by `split`.
# So, with the same x_t,
#
#     x - x_hat = -sigma (v - v_hat)      and      noise - noise_hat = alpha (v - v_hat),
#
# and as 1/sigma² = e^lambda + 1 and 1/alpha² = e^-lambda + 1, the objective has three forms:
#
#     |v - v_hat|²  =  (e^lambda + 1) |x - x_hat|²  =  (e^-lambda + 1) |noise - noise_hat|²
#
# The paper prints the last weight as e^lambda - 1, a misprint: below lambda = 0 it would be
# negative. An error of the picture weighs most on clean pictures, an error of the noise on
# noisy ones.


def make_optimiser(net):
    """Adam, as in [11], without weight decay; `fused` updates all weights in one kernel. With
    a second beta of 0.99 it forgets large gradients sooner than with 0.999 (our choice). Its
    rate is set before each step."""
    return torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)


def learning_rate(step, steps, peak, warm_up):
    """Rate of update number `step` (from 0): a cosine from `peak` to 0 over all `steps`,
    times a ramp up to 1 over the first `warm_up`, or over a tenth of the steps if that is
    less (our choice). When the ramp ends, the rate is just below the peak."""
    warm_up = min(warm_up, max(1, steps // 10))
    ramp = min(1, (step + 1) / warm_up)
    return peak * ramp * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema_net, net, decay, step):
    """ema_net += (1 - decay) (net - ema_net), weight by weight [2.2, 11, 24], after update
    number `step` (from 0).

    The average leaves out the jitter of the last steps, which counts while the rate is high.
    The decay is our choice, and so is its warm-up, at most (1 + step) / (10 + step), so that
    the average forgets the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema_net.parameters())
    torch._foreach_lerp_(averages, list(net.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------
# 5. Settings
# --------------------------------------------------------------------------------------


def setting(default, help, *allowed):
    """A field of Settings: its default, what --help says, and what is allowed: for numbers
    the least and the greatest, for texts the words; nothing: any."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))


PRECISIONS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@dataclasses.dataclass
class Settings:
    """All settings; each is a flag of the command line too, `batch_size` as --batch-size.
    Raises UserError for a value that its field does not allow.

    Numbers that the paper doesn't name are our choice, and so are the optimiser, mirroring,
    clipping of the gradient and the course of the rate, of which it says nothing. What
    decided a number is in .github/experiments.md. `recipe` and data="shapes" change the
    defaults of other fields: see choose_settings.
    """

    # Where pictures come from and results go to
    data: str = setting("data", "folder of the data set, downloaded if none; or: shapes")
    out: str = setting("", "folder to write to; empty: runs/diffusion-<data set>")
    weights: str = setting("", "file of weights to draw with; empty: weights.pt of the run")
    restart: bool = setting(False, "begin anew, over the run in the folder")

    # Where it runs. Each kind of device has its own rounding and its own random numbers.
    device: str = setting("auto", "where to compute", "auto", "cuda", "mps", "cpu")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", "auto", "on", "off")
    precision: str = setting("auto", "of matrix products", "auto", *PRECISIONS)
    log_every: int = setting(50, "steps between lines of progress", 1, MAX_STEPS)
    eval_every: int = setting(1000, "steps between validations; each saves", 1, MAX_STEPS)
    grid_every: int = setting(5000, "steps between grids of samples", 1, MAX_STEPS)

    # How it is trained
    seed: int = setting(0, "decides weights, order of pictures, noise", 0, 2**31)
    steps: int = setting(MAX_STEPS, "optimiser steps", 1, MAX_STEPS)
    batch_size: int = setting(256, "pictures per step", 1, 65_536)
    max_lr: float = setting(2e-3, "peak learning rate", 1e-8, 10.0)
    warm_up: int = setting(500, "steps in which the rate rises", 1, MAX_STEPS)
    ema: float = setting(0.999, "decay of the averaged weights; rises to it", 0.0, 0.99999)
    label_drop: float = setting(0.1, "share of labels dropped; 0: no guidance", 0.0, 1.0)
    schedule: str = setting("cosine", "noise schedule", *SCHEDULES)

    # Not the paper's: training sees somewhat cleaner pictures than the schedule says, by
    # this much; validation and sampling don't. The loss falls on nearly clean pictures and
    # hardly rises on the noisiest, and samples come nearer to real pictures.
    log_snr_shift: float = setting(1.0, "added to log-SNR in training", -10.0, 10.0)

    # The network. `modulate` is not the paper's; without it width 56 fits into the budget.
    width: int = setting(48, "channels at 32x32, a multiple of 8", 8, 512)
    after_injection: str = setting("regular", "convolution", "regular", "separable")
    modulate: str = setting("on", "scale and shift in all blocks", "on", "off")
    recipe: str = setting("ours", "paper: its design and sampling", "ours", "paper")

    # How it is sampled. The paper samples with DDPM's noise (eta = 1), w = 3 and dynamic
    # clipping; these four together come nearer to the real pictures.
    sample_schedule: str = setting("same", "of sampling", "same", *SCHEDULES)
    sample_steps: int = setting(50, "denoising steps per sample", 1, 10_000)
    eta: float = setting(0.6, "fresh noise per step; 1: DDPM, 0: DDIM", 0.0, 1.0)
    guidance: float = setting(2.0, "w of Eq. (4); 0: none, -1: no class", -1.0, 100.0)
    clip_x0: str = setting("none", "how a guessed picture is cut", "none", "static", "dynamic")

    # What is sampled
    classes: str = setting("", "names of classes, by commas; empty: all, mixed")
    count: int = setting(0, "samples; 0: 64, and 10,000 for fid", 0, 1_000_000)
    sample_seed: int = setting(0, "decides the noise of samples", 0, 2**31)
    inception: str = setting("", "file of the FID network; empty: torch hub's folder")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if self.width % 8 != 0:
            raise UserError(f"--width {self.width} is not a multiple of 8")

    def folder(self):
        """The folder that a run with these settings writes to, as a Path."""
        name = "shapes" if self.data == "shapes" else DATASET.__name__.lower()
        return Path(self.out or f"runs/diffusion-{name}").expanduser()


# These decide what is learned. A run goes on only where they are as they were.
LEARNING = (
    "seed steps batch_size max_lr warm_up ema label_drop schedule log_snr_shift width "
    "after_injection modulate"
).split()

# These decide how samples are drawn, unless a command says otherwise.
SAMPLING = "sample_schedule sample_steps eta guidance clip_x0".split()

# Defaults for drawn shapes: a small network, minutes on a CPU. The linear schedule dwells on
# high noise, where shapes form.
SHAPES = dict(
    width=24,
    steps=1000,
    batch_size=32,
    max_lr=5e-3,
    warm_up=50,
    ema=0.98,
    eval_every=100,
    grid_every=200,
    schedule="linear",
    log_snr_shift=0.0,
    sample_steps=30,
)

# What `--recipe paper` sets; a flag of the same command still wins. That it takes 100 steps is
# our choice: so much fresh noise needs more of them.
PAPER = dict(
    modulate="off",
    width=56,
    log_snr_shift=0.0,
    sample_steps=100,
    eta=1.0,
    guidance=3.0,
    clip_x0="dynamic",
)


def choose_settings(**given):
    """Settings from those `given`. For the rest, in this order: the defaults
    for data="shapes", what recipe="paper" sets, the defaults. Raises UserError as Settings does."""
    values = {}
    if given.get("recipe") == "paper":
        values.update(PAPER)
    if given.get("data") == "shapes":
        values.update(SHAPES)
    return Settings(**{**values, **given})


def build_network(settings, classes):
    """The UNet of `settings` on the CPU, its weights drawn from their seed. Seeds torch's
    generator for that."""
    torch.manual_seed(settings.seed)
    modulate = settings.modulate == "on"
    return UNet(classes, settings.width, settings.after_injection, modulate)


# --------------------------------------------------------------------------------------
# 6. Training
# --------------------------------------------------------------------------------------


def train(settings):
    """Train [2.2], or go on with a run that was stopped, then sample; returns the validation
    loss.

    Writes into settings.folder(). Raises UserError or OSError for settings, data, a folder or
    a checkpoint that can't be used, and if the loss is no longer finite; AssertionError if a
    budget is exceeded; KeyboardInterrupt after Ctrl-C or SIGTERM, when all is saved.
    """
    if settings.weights:
        raise UserError("training takes no --weights: it begins anew, or goes on with its own run")
    device, precision = set_up(settings)
    out = make_folder(settings)
    data = load_data(settings.data, device)
    pictures = len(data.train_y)
    batches = pictures // settings.batch_size  # per epoch; a last incomplete one is dropped
    if batches == 0:
        raise UserError(f"--batch-size {settings.batch_size}: there are {pictures} pictures")
    find_classes(settings.classes, data.names)  # a mistyped name should fail now

    # The network, and the average of its weights, which is what validates and samples.
    net = build_network(settings, len(data.names)).to(device)
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)
    compile_network(net, settings.compile)
    compile_network(ema_net, settings.compile)
    optimiser = make_optimiser(net)

    # fp16 can't hold small gradients, so the loss is scaled up before the backward pass and
    # the gradients down after it. In fp32 and bf16 the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    # The times t of all steps, of low discrepancy [2.2]: a Sobol sequence, of which each
    # draw falls into a gap that the earlier ones left. So a batch covers [0,1] evenly and
    # the loss estimate varies less [2.3, 19]. In a batch of 2^n, row i gets its t from nearly
    # the same part of [0,1] each time, so the pictures must come in random order.
    sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=settings.seed)
    times = sobol.draw(settings.steps * settings.batch_size)
    times = times.view(settings.steps, settings.batch_size).to(device)

    # A run that was stopped goes on.
    path = out / "checkpoint.pt"
    seen = modified(path)
    parts = dict(net=net, ema=ema_net, optimiser=optimiser, scaler=scaler)
    first = 0
    rows = []  # of the log
    if seen and not settings.restart:
        first, rows = resume(path, settings, data.names, parts)
    step = first

    # The parameter budget [2.1].
    count = count_parameters(net)
    for name, stage in net.named_children():
        print(f"  {name:<15}{count_parameters(stage):>8,}")
    print(f"  {'parameters':<15}{count:>8,}")
    assert count < MAX_PARAMETERS, f"{count:,} parameters, not under {MAX_PARAMETERS:,}"

    losses = []  # since the last row of the log
    clock = time.perf_counter()
    stopping = False
    with stop_requests() as stop:  # after Ctrl-C the step ends, and all is saved
        while step < settings.steps and not stopping:
            # The step budget [2.1].
            assert step < MAX_STEPS, f"all {MAX_STEPS:,} optimiser steps are spent"

            # An epoch is one random order of the training pictures.
            epoch, batch = divmod(step, batches)
            if batch == 0 or step == first:
                random = seeded_generator(device, settings.seed, 0, epoch)
                order = torch.randperm(pictures, generator=random, device=device)

            # Choose pictures, the next ones in order, and times.
            start = batch * settings.batch_size
            chosen = order[start : start + settings.batch_size]
            x = to_model(data.train_x[chosen])  # (B,3,32,32)
            y = data.train_y[chosen]  # (B,)
            t = times[step]  # (B,)

            # Mirror half of them. Drop some labels: the network learns "no class" too,
            # which guidance needs [12].
            random = seeded_generator(device, settings.seed, 1, step)
            flip, drop = torch.rand(2, len(y), generator=random, device=device)
            x = random_flip(x, flip)
            labels = y.masked_fill(drop < settings.label_drop, net.no_class)

            # Noise each picture to the level of its own t, or, which is ours, a little less:
            # Eq. (2). The target is v: Eq. (1).
            noise = torch.randn(x.shape, generator=random, device=device)
            log_snr = SCHEDULES[settings.schedule](t) + settings.log_snr_shift  # (B,)
            alpha, sigma = to_alpha_sigma(log_snr)  # (B,1,1,1)
            x_t = add_noise(x, noise, alpha, sigma)
            v = velocity(x, noise, alpha, sigma)

            # Forward, in bf16 on a GPU that has it.
            with autocast(device, precision):
                pred_v = net(x_t, log_snr, labels)

            # Loss, in fp32: Eq. (3), as a mean over pictures and pixels.
            loss = (v - pred_v).square().mean()

            # The gradient; all of it is scaled down if its norm is above 1 (our choice).
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)

            # One optimiser step, and the averaged weights follow. (A step whose fp16
            # gradients overflowed leaves the weights as they are, and lowers the scale.)
            rate = learning_rate(step, settings.steps, settings.max_lr, settings.warm_up)
            optimiser.param_groups[0]["lr"] = rate
            scaler.step(optimiser)
            scaler.update()
            update_ema(ema_net, net, settings.ema, step)
            step += 1

            # That was the algorithm; it reads no number back from a GPU. Reading one waits
            # for all that was launched, so the rest happens only now and then.
            losses.append(loss.detach())
            stopping = len(stop) > 0
            validating = step % settings.eval_every == 0 or step == settings.steps
            if validating or stopping or step == 1 or step % settings.log_every == 0:
                row = new_row(step, settings, losses, rate, clock)
                if validating:
                    row.update(validate(ema_net, data, settings, precision))
                show_row(row)
                rows.append(row)
                if validating or stopping:
                    seen = save_checkpoint(path, seen, step, settings, data.names, parts, rows)
                    save_log(out, rows, settings.steps)
                if validating:
                    save_weights(out / "weights.pt", settings, ema_net, data.names, row)
                losses = []
                clock = time.perf_counter()
            if step % settings.grid_every == 0 or step == settings.steps:
                save_class_grid(settings, ema_net, data.names, step)
                clock = time.perf_counter()

    if stopping:
        raise KeyboardInterrupt(
            f"saved at step {step:,}: the same command goes on (without --restart)"
        )
    seconds = sum(row["seconds"] for row in rows)
    print(f"{step * settings.batch_size:,} pictures in {seconds:,.0f} s of training")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() >> 20:,} MiB")
    sample_mode(settings, ema_net, data.names)
    interpolate_mode(settings, ema_net, data.names)
    neighbours_mode(settings, ema_net, data.names)
    return rows[-1]["val_loss"]


# --------------------------------------------------------------------------------------
# 7. Validation loss
# --------------------------------------------------------------------------------------


@torch.no_grad()
def validation_losses(
    net, x, y, schedule=cosine_schedule, precision=torch.float32, count=1024
):
    """Eq. (3) for each of at most `count` test pictures, x uint8 (N,3,32,32), y (N,), with
    fixed noise: (count,), number i at t = (i + 1/2)/count, so from clean to noisy.

    All its seeds are fixed, so two networks, or two moments of one, compare picture by
    picture. Settings that were chosen by it look a little too good on these pictures.
    """
    chosen = np.random.RandomState(0).permutation(len(y))[:count]
    chosen = torch.from_numpy(chosen).to(y.device)
    count = len(chosen)
    t = (torch.arange(count, device=y.device) + 0.5) / count
    noise = torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    noise = noise.to(y.device)

    picture = to_model(x[chosen])
    log_snr = schedule(t)
    alpha, sigma = to_alpha_sigma(log_snr)
    x_t = add_noise(picture, noise, alpha, sigma)
    with autocast(y.device, precision):
        pred_v = net(x_t, log_snr, y[chosen])
    error = velocity(picture, noise, alpha, sigma) - pred_v
    return error.square().flatten(1).mean(1)


def validate(net, data, settings, precision):
    """The validation loss, and its means in five bins of t of nearly equal size, clean to
    noisy, for one row of the log."""
    labels = data.test_y
    if settings.label_drop == 1:  # trained without classes
        labels = torch.full_like(labels, net.no_class)
    schedule = SCHEDULES[settings.schedule]
    losses = validation_losses(net, data.test_x, labels, schedule, precision)
    scores = dict(val_loss=losses.mean().item())
    for i, part in enumerate(losses.chunk(5)):
        scores[f"bin{i}"] = part.mean().item()
    return scores


# --------------------------------------------------------------------------------------
# 8. Guidance and sampler
# --------------------------------------------------------------------------------------


def guide(v_cond, v_uncond, w):
    """Classifier-free guidance, Eq. (4) [12]: (1 + w) v_cond - w v_uncond.

    v_cond - v_uncond is what the class changes in the guess. With w = 0 it counts as
    learned; with w > 0 more than that, so that pictures are clearer and less varied; with
    w = -1 not at all. Others call 1 + w the guidance scale: their 4 is the paper's w = 3.
    """
    return (1 + w) * v_cond - w * v_uncond


def guided_velocity(net, labels, w):
    """The function (x_t, log_snr) -> v that a sampler calls, log_snr a number: `net` with
    guidance w.

    labels as UNet takes them, (B,) or (B,E). Both halves of Eq. (4) go through the network
    as one batch of 2B. With w = 0 the first half is enough, and a call costs half.
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
    """Keep guessed pictures (B,3,H,W) in range: "none", "static" (cut at ±1), or "dynamic"
    [2.3], which [29] calls dynamic thresholding.

    Guidance drives guesses out of [-1,1]. Cutting saturates them; dynamic clipping cuts a
    picture at s = max(1, 99.5th percentile of its |values|) and divides by s (99.5: our
    choice).
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
    """Pictures from noise, by DDIM, DDPM and what lies between [2.3, 11, 35]: x_t (B,3,H,W)
    at log_snrs[0] -> the last guessed picture.

    model(x_t, log_snr) gives v, log_snr a number; log_snrs (S,), on the CPU, rises, and the
    model is called once for each. eta scales the fresh noise: 1 adds what DDPM adds, 0 (DDIM)
    adds none. draw_noise(x_t) gives noise in its shape.
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

        # The last step ends with the picture. A schedule has a little noise left at the end
        # (sigma = 0.01 on the linear one), which the picture need not have again.
        if i + 1 == len(log_snrs):
            break

        # And which noise? split returns one as well, but it belongs to the picture before
        # clipping. Picture and noise must add up to x_t, so it is computed again.
        pred_noise = (x_t - alpha * pred_x0) / sigma

        # The next level has noise of variance next_sigma². A part of it is drawn afresh:
        #     eta² * next_sigma² / sigma² * beta,
        # and the rest is the noise just found. beta is DDPM's beta_t: what a picture at the
        # next, cleaner level is scaled by is alpha / next_alpha = sqrt(1 - beta), and the
        # noise added to it has variance beta. By Bayes' rule, the picture at the next level,
        # given x_t and pred_x0, then has variance next_sigma² / sigma² * beta. So eta = 1 is
        # DDPM with the smaller of the two variances that [11] tries (our choice).
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


# --------------------------------------------------------------------------------------
# 9. Samples, interpolation, grid
# --------------------------------------------------------------------------------------

SAMPLE_BATCH = 250  # samples at once


def noise_source(seed, batch, count, device):
    """A function that draws noise (count,3,32,32) for batch number `batch` of samples.

    It draws for a whole batch and returns the first `count`, so sample number i gets the same
    noise however many are asked for.
    """
    random = seeded_generator(device, seed, batch)

    def draw_noise(x=None):  # x is not used: ddim_sample gives it
        noise = torch.randn(SAMPLE_BATCH, 3, 32, 32, generator=random, device=device)
        return noise[:count]

    return draw_noise


@torch.no_grad()
def generate(
    net,
    labels,
    *,
    schedule=cosine_schedule,
    steps=50,
    eta=0.6,
    guidance=2.0,
    clip="none",
    seed=0,
    start=None,
    precision=torch.float32,
):
    """One sample for each of labels, class numbers (N,) or embeddings (N,E): uint8
    (N,3,32,32) on the CPU.

    `schedule` and `steps` say at which noise levels, `eta` and `clip` are those of
    ddim_sample, `guidance` is w of Eq. (4), `seed` decides the noise. `start` (N,3,32,32) is
    the first noise, if it is not to be drawn. `net` should be in evaluation mode.
    """
    t = torch.linspace(1, 0, steps + 1)[:-1]  # (steps,), from pure noise; t = 0 needs no call
    log_snrs = schedule(t)
    pictures = []
    for batch, some in enumerate(labels.split(SAMPLE_BATCH)):
        first = batch * SAMPLE_BATCH
        print(f"drawing {first:,} to {first + len(some):,} of {len(labels):,}", flush=True)

        # Noise is drawn in any case, so that that of the steps is always the same.
        draw_noise = noise_source(seed, batch, len(some), labels.device)
        x = draw_noise()
        if start is not None:
            x = start[first : first + len(some)]
        with autocast(labels.device, precision):
            model = guided_velocity(net, some, guidance)
            x = ddim_sample(model, x, log_snrs, eta, clip, draw_noise)
        pictures.append(to_uint8(x).cpu())
    return torch.cat(pictures)


def sampling_options(settings, device):
    """What generate takes from the settings, as keywords."""
    # Where no label was ever dropped, the embedding of "no class" was never trained, and
    # where all were, those of the classes weren't. Sampling must do without them.
    guidance = {0.0: 0.0, 1.0: -1.0}.get(settings.label_drop, settings.guidance)
    name = settings.sample_schedule
    return dict(
        schedule=SCHEDULES[settings.schedule if name == "same" else name],
        steps=settings.sample_steps,
        eta=settings.eta,
        guidance=guidance,
        clip=settings.clip_x0,
        seed=settings.sample_seed,
        precision=choose_precision(device, settings.precision),
    )


def find_classes(words, names):
    """Class numbers from words like "rose, Aquarium Fish"; none from an empty text. Case and
    underscores don't matter. Raises UserError, with names that are near, for other words."""
    known = {name.lower().replace("_", " "): i for i, name in enumerate(names)}
    numbers = []
    for word in words.lower().replace("_", " ").split(","):
        word = word.strip()
        if word in known:
            numbers.append(known[word])
        elif word:
            near = difflib.get_close_matches(word, known, cutoff=0.5) or list(known)
            raise UserError(f"--classes {word}: no such class; there is {', '.join(near)}")
    return numbers


def pick_labels(settings, names, count, device):
    """Class numbers (count,) on the device: the classes asked for in turn, or if none were,
    all of them in an order drawn from the seed of sampling."""
    classes = find_classes(settings.classes, names)
    if not classes:
        random = torch.Generator().manual_seed(settings.sample_seed)
        classes = torch.randperm(len(names), generator=random).tolist()
    labels = [classes[i % len(classes)] for i in range(count)]
    return torch.tensor(labels, device=device)


def save_grid(path, x, columns, scale=2):
    """Pictures uint8 (N,3,32,32) as one PNG, row by row, each pixel drawn `scale` wide."""
    grid = torchvision.utils.make_grid(x.cpu(), columns, padding=1, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    size = (image.width * scale, image.height * scale)
    image.resize(size, Image.NEAREST).save(path)
    print(path)


def sample_mode(settings, net, names):
    """Figure 3, left: `count` samples, not cherry-picked. Writes samples.png (400 at most) and
    samples.npz: arr_0, uint8 (count,32,32,3), as other programs for FID read it, and arr_1,
    the class numbers. Returns the pictures, uint8 (count,3,32,32)."""
    device = choose_device(settings.device)
    labels = pick_labels(settings, names, settings.count or 64, device)
    x = generate(net, labels, **sampling_options(settings, device))

    out = make_folder(settings)
    shown = x[:400]
    save_grid(out / "samples.png", shown, columns=max(8, math.isqrt(len(shown))))
    np.savez_compressed(out / "samples.npz", x.permute(0, 2, 3, 1).numpy(), labels.cpu().numpy())
    print(out / "samples.npz")
    return x


def slerp(a, b, share):
    """Spherical interpolation [2.3, 39]: (B,...) and (B,...) at share (B,) of the way, each
    row flattened whole.

    Noise of 3,072 numbers is nearly always of the same length. The middle of a straight line
    between two would be 0.7 times as long, a noise that the network has never seen. Between
    nearly parallel or opposite rows, where it would divide by 0, a straight line.
    """
    flat_a = a.flatten(1)
    flat_b = b.flatten(1)
    share = share.view(-1, 1).to(a.dtype)
    cosine = F.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    angle = cosine.acos()[:, None]  # (B,1)
    sine = angle.sin()

    # `where` computes both; the one that was divided by 0 is not taken.
    straight = sine.abs() < 1e-3
    weight_a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    weight_b = torch.where(straight, share, (share * angle).sin() / sine)
    return (weight_a * flat_a + weight_b * flat_b).view_as(a)


@torch.no_grad()
def interpolate(net, ends, labels, count=10, **options):
    """Pictures between pairs [2.3]: `ends` (2,P,3,32,32) first noises, `labels` (2,P) classes
    of P pairs -> uint8 (P*count,3,32,32), pair after pair, ends included. `options` as
    generate.

    Noise and class embedding both go along the sphere, and eta = 0 makes the rest
    deterministic: so the outer pictures are those that the ends' own noise and class give.
    """
    pairs = ends.shape[1]
    share = torch.linspace(0, 1, count, device=ends.device).repeat(pairs)  # (P*count,)

    # The left and the right end for each picture, each (P*count,...).
    noise_a, noise_b = ends.repeat_interleave(count, dim=1)
    class_a, class_b = net.embed(labels).repeat_interleave(count, dim=1)

    options.update(eta=0.0, start=slerp(noise_a, noise_b, share))
    return generate(net, slerp(class_a, class_b, share), **options)


def interpolate_mode(settings, net, names, pairs=8):
    """Figure 3, middle: interpolations.png, one row per pair, ends included. Returns the
    pictures, uint8 (pairs*10,3,32,32)."""
    device = choose_device(settings.device)
    labels = pick_labels(settings, names, 2 * pairs, device).view(pairs, 2).T
    random = torch.Generator().manual_seed(settings.sample_seed)
    ends = torch.randn(2, pairs, 3, 32, 32, generator=random).to(device)
    x = interpolate(net, ends, labels, **sampling_options(settings, device))
    save_grid(make_folder(settings) / "interpolations.png", x, columns=10)
    return x


def save_class_grid(settings, net, names, step):
    """grid-<step>.png: one row per class for ten classes (those asked for, or ten from all
    over the list), ten pictures each; always from the same noise, so that grids of one run
    compare."""
    spread = torch.linspace(0, len(names) - 1, 10).long().tolist()
    classes = (find_classes(settings.classes, names) or spread)[:10]
    device = choose_device(settings.device)
    labels = torch.tensor(classes, device=device).repeat_interleave(10)
    x = generate(net, labels, **sampling_options(settings, device))
    print("from the top: " + ", ".join(names[i] for i in classes))
    save_grid(make_folder(settings) / f"grid-{step:06}.png", x, columns=10)


# ======================================================================================
# The story ends here. What follows supports it, and can wait for a second reading.
# ======================================================================================


# --------------------------------------------------------------------------------------
# 10. Neighbours and FID
# --------------------------------------------------------------------------------------


def nearest_neighbours(queries, pictures, k=1):
    """The k pictures nearest to each query, each as it is or mirrored, by Euclidean distance
    of pixels in [0,255]: distance (Q,k), and pictures (Q,k,3,H,W). Both uint8 (.,3,H,W), on
    one device.

    cdist multiplies matrices in fp32, so distances below some 20 are rounding errors.
    """
    both = torch.stack([pictures, pictures.flip(-1)])  # (2,N,3,H,W)
    flat = both.flatten(2).float()  # (2,N,3*H*W)
    distances, nearest = [], []
    for query in queries.flatten(1).float().split(250):
        # The nearer of the two ways to show a picture, so that each counts once.
        distance, way = torch.cdist(query, flat).min(dim=0)  # (2,q,N) -> each (q,N)
        distance, index = distance.topk(k, largest=False)  # each (q,k)
        distances.append(distance)
        nearest.append(both[way.gather(1, index), index])
    return torch.cat(distances), torch.cat(nearest)


def real_pictures(settings, names, device):
    """The Data of settings.data. Raises UserError if its classes are not `names`."""
    data = load_data(settings.data, device)
    if data.names != names:
        raise UserError(f"--data {settings.data}: the network was made for other classes")
    return data


def neighbours_mode(settings, net, names, shown=16, k=4):
    """Figure 3, right: neighbours.png, samples each with its k nearest training pictures
    beside it. Returns the median distance of samples to the nearest one, and that of 500
    test pictures.

    The paper sees in such pictures that its model mimics the training set [2.5]. A network
    that copies comes much nearer to its training pictures than new photographs do. A little
    nearer proves nothing, as smooth pictures are near to everything.
    """
    device = choose_device(settings.device)
    data = real_pictures(settings, names, device)
    labels = pick_labels(settings, names, settings.count or 64, device)
    x = generate(net, labels, **sampling_options(settings, device)).to(device)
    distance, near = nearest_neighbours(x, data.train_x, k)

    random = torch.Generator().manual_seed(settings.sample_seed)
    chosen = torch.randperm(len(data.test_y), generator=random)[:500].to(device)
    test_distance, _ = nearest_neighbours(data.test_x[chosen], data.train_x)

    tiles = torch.cat([x[:shown, None], near[:shown]], dim=1)  # (shown,1+k,3,32,32)
    save_grid(make_folder(settings) / "neighbours.png", tiles.flatten(0, 1), 2 * (k + 1))
    medians = distance[:, 0].median().item(), test_distance.median().item()
    print("median distance to the nearest training picture: samples %.0f, test %.0f" % medians)
    return medians


INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def load_inception(path=""):
    """The FID network (Inception of 2015-12-05) from the file `path`; without one, from torch
    hub's folder, downloaded into it at need. Raises UserError if it can't be had or is not
    that file."""
    file = Path(path or f"{torch.hub.get_dir()}/{Path(INCEPTION).name}").expanduser()
    try:
        if not path and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(file))
        if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
            raise ValueError("wrong SHA-256")
        return torch.jit.load(str(file), map_location="cpu").eval()
    except Exception as error:  # no net, host gone, disk full, another file
        raise UserError(
            f"no FID network in {file} ({in_one_line(error)}): fetch {INCEPTION} "
            f"(SHA-256 {INCEPTION_SHA256}) and name it with --inception; `sample --count "
            "10000` writes samples.npz, for other programs, without it"
        ) from error


@torch.no_grad()
def feature_statistics(network, x, batch=50):
    """(mean (2048,), covariance (2048,2048)) of the features of pictures uint8 (N,3,H,W),
    float64 on the CPU. `network` is that of load_inception; its forward would resize by
    itself, so only its layers are called, on pictures resized as clean-fid does: bicubic,
    in floating point, cut to [0,255]."""
    rows = []
    for some in x.split(batch):
        large = F.interpolate(some.float(), (299, 299), mode="bicubic", antialias=True)
        features = network.layers((large.clamp(0, 255) - 128) / 128)
        rows.append(features.view(len(some), -1).cpu().double())
    features = torch.cat(rows)
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)) of two Gaussians, float64, as a
    float.

    The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of
    sqrt(A) B sqrt(A), which is symmetric, so the eigenvalues are real and can be had safely.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def fid_mode(settings, net, names):
    """FID [2.4]: `count` samples, 10,000 by default, with classes as in the test set, against
    all test pictures. The paper names no protocol; this is clean-fid's, our choice. Prints
    it, with its floor, which is the FID of as many training pictures; returns FID. Raises
    UserError, before anything is drawn, if the FID network can't be had."""
    device = choose_device(settings.device)
    network = load_inception(settings.inception).to(device)
    data = real_pictures(settings, names, device)
    options = sampling_options(settings, device)
    count = min(settings.count or 10_000, len(data.train_y))

    labels = data.test_y[torch.arange(count, device=device) % len(data.test_y)]
    x = generate(net, labels, **options)
    print("measuring samples, test pictures, training pictures", flush=True)
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data.train_y), generator=random)[:count]
    drawn, real, floor = [
        feature_statistics(network, pictures.to(device))
        for pictures in (x, data.test_x, data.train_x[chosen.to(device)])
    ]
    fid = frechet_distance(*drawn, *real)
    print(f"FID {fid:.3f}, floor {frechet_distance(*floor, *real):.3f}: {count:,} samples")
    if count < 10_000:
        print("  (under 10,000 samples: not comparable)")
    print(f"  {len(data.test_y):,} test pictures, Inception 2015-12-05, bicubic as clean-fid")
    print(f"  {options}")
    return fid


# --------------------------------------------------------------------------------------
# 11. Log and plots
# --------------------------------------------------------------------------------------

# The columns of log.csv, and how a line of progress shows them.
COLUMNS = dict(
    step="6,.0f",
    loss=".4f",
    lr=".1e",
    seconds=",.1f",
    images_per_s=",.0f",
    minutes_left=",.1f",
    val_loss=".4f",
    bin0=".3f",
    bin1=".3f",
    bin2=".3f",
    bin3=".3f",
    bin4=".3f",
)


def new_row(step, settings, losses, rate, clock):
    """A row of the log after `step` updates: the mean of the losses (list of 0-d tensors) and
    the speed since the last row, which was when time.perf_counter() gave `clock`."""
    loss = torch.stack(losses).mean().item()  # a GPU has done all its work when this is here
    seconds = time.perf_counter() - clock
    per_step = seconds / len(losses)
    return dict(
        step=step,
        loss=loss,
        lr=rate,
        seconds=seconds,
        images_per_s=settings.batch_size / per_step,
        minutes_left=(settings.steps - step) * per_step / 60,
    )


def show_row(row):
    """Print a row of the log. Raises UserError if a number in it is not finite."""
    shown = [f"{name} {row[name]:{form}}" for name, form in COLUMNS.items() if name in row]
    print("  ".join(shown), flush=True)
    if not all(math.isfinite(value) for value in row.values()):
        raise UserError(
            "the loss is not finite: begin anew with --restart and a lower --max-lr (what was "
            "saved before, if anything, is kept until then)"
        )


def save_log(out, rows, steps):
    """log.csv and loss.png, whole each time. Where they can't be written (a spreadsheet may
    hold the table), one line says so, and training goes on."""
    # The first losses, 0.65 where the network still says zero, would flatten the rest.
    shown = [row for row in rows if row["step"] >= 0.02 * steps]
    train = [(row["step"], row["loss"]) for row in shown]
    validation = [(row["step"], row["val_loss"]) for row in shown if "val_loss" in row]
    try:
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        plot(out / "loss.png", dict(train=train, validation=validation), "Loss by step")
    except OSError as error:
        print(f"going on without log.csv and loss.png: {error}")


def plot(path, curves, title):
    """Draw `curves`, name -> [(x, y)], into a PNG of 720 x 450 pixels. The axes go from the
    least to the greatest value that there is."""
    curves = {name: np.array(curve) for name, curve in curves.items() if curve}
    if not curves:
        return
    points = np.concatenate(list(curves.values()))  # (N,2)
    low = points.min(0)
    span = np.ptp(points, 0) + 1e-9

    # Drawn at twice the final size: scaling down smooths the lines.
    image = Image.new("RGB", (1440, 900), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(26)
    pen.text((765, 45), title, "#111", font, "mm")

    # Six lines in each direction, with their numbers.
    for i in range(6):
        x, y = low + span * i / 5
        across = 130 + 254 * i
        down = 820 - 146 * i
        pen.line((across, 90, across, 820), "#d8d8d8", 2)
        pen.line((130, down, 1400, down), "#d8d8d8", 2)
        pen.text((across, 850), f"{x:,.5g}", "#333", font, "mm")
        pen.text((115, down), f"{y:.3g}", "#333", font, "rm")

    for number, (name, curve) in enumerate(curves.items()):
        colour = ("#d1495b", "#00798c", "#7a5195", "#c77f00")[number % 4]
        places = (curve - low) / span * (1270, -730) + (130, 820)
        pen.line(places.flatten().tolist(), colour, 5)
        pen.text((1380, 120 + 40 * number), name, colour, font, "rm")
    image.resize((720, 450), Image.LANCZOS).save(path)


def schedules_mode(settings):
    """schedules.png: log-SNR against t of the noise schedules [2.3]. Returns its path."""
    t = torch.linspace(0, 1, 200)
    curves = {}
    for name, schedule in SCHEDULES.items():
        curves[name] = torch.stack([t, schedule(t)], dim=1).tolist()
    path = make_folder(settings) / "schedules.png"
    plot(path, curves, "log-SNR by t")
    print(path)
    return path


# --------------------------------------------------------------------------------------
# 12. Checkpoint and weights
# --------------------------------------------------------------------------------------


class UserError(ValueError):
    """What the user can put right, said in the text: `main` prints that alone, and no
    traceback."""


def in_one_line(error):
    """What an error says, cut to one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__


@contextlib.contextmanager
def reading(path):
    """Whatever a file's content makes fail inside this becomes one UserError with the file
    and the reason: a damaged file can fail in any way."""
    try:
        yield
    except Exception as error:
        raise UserError(f"can't use {path}: {in_one_line(error)}") from error


def load_file(path):
    """The dict that save_whole wrote to `path`, with its tensors on the CPU. Raises an
    exception of some kind if the file is damaged, or holds numbers that are not finite."""
    # torch writes a zip file with a checksum for each tensor, but doesn't look at them.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")

    # weights_only: a file from elsewhere may hold data, but no code that would run.
    state = torch.load(path, map_location="cpu", weights_only=True)
    for leaf in tree_leaves(state):
        if isinstance(leaf, (float, torch.Tensor)):
            if not torch.as_tensor(leaf).isfinite().all():
                raise ValueError("it holds numbers that are not finite")
    return state


def save_whole(state, path):
    """torch.save, first beside `path`, under a name of its own, then renamed: so it is always
    a whole file, the old or the new one. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # not into the file: what it says of a full disk is no OSError
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def modified(path):
    """When a file was last written to; 0 if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def save_checkpoint(path, seen, step, settings, names, parts, rows):
    """Write all that a run needs to go on: the states of its `parts`, the log, and how many
    steps are done. Order of pictures, times and noise follow from the seed and the step.

    Returns when it was written. Raises UserError if another run has written it since `seen`.
    """
    if modified(path) != seen:
        raise UserError(f"another run writes to {path}: give this one another --out")
    state = {name: part.state_dict() for name, part in parts.items()}
    state.update(step=step, rows=rows, settings=dataclasses.asdict(settings), names=names)
    save_whole(state, path)
    return modified(path)


def resume(path, settings, names, parts):
    """Put what save_checkpoint wrote back into the `parts`. Returns how many steps are done,
    and the rows of the log. Raises UserError if the file can't be used."""
    with reading(path):
        state = load_file(path)
        check_same(state["settings"], dataclasses.asdict(settings))
        if state["names"] != names:
            raise ValueError("it was trained on other classes")

        # Adam's fused kernel would write past running averages that are too small. Of its
        # state they alone count: its settings are those it was made with.
        optimiser = parts["optimiser"]
        averages = state["optimiser"]["state"].values()
        for p, saved in zip(parts["net"].parameters(), averages, strict=True):
            shapes = {name: value.shape for name, value in saved.items()}
            if shapes != dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape):
                raise ValueError("the optimiser's state does not fit")
        state["optimiser"]["param_groups"] = optimiser.state_dict()["param_groups"]

        for name, part in parts.items():
            if state[name]:  # that of a scaler that does nothing is empty
                part.load_state_dict(state[name])
        rows = []
        for row in state["rows"]:
            rows.append({name: float(row[name]) for name in COLUMNS if name in row})
        step = int(rows[-1]["step"])
        if step != state["step"] or not 0 < step <= settings.steps:
            raise ValueError("its log ends at another step")
    print(f"going on from {path} at step {step:,}")
    return step, rows


def check_same(made, asked):
    """Raises ValueError where `asked`, a dict of settings, says otherwise than the settings
    that a file was `made` with."""
    for name in LEARNING:
        if name in asked and asked[name] != made[name]:
            raise ValueError(
                f"its {name} is {made[name]}, not {asked[name]}: use its settings, another "
                "--out, or begin anew with --restart"
            )


def save_weights(path, settings, net, names, row):
    """Write what all modes but training need: the averaged weights, as fp16, the class names,
    the settings that made them, and the validation loss in the log's `row`."""
    half = {name: value.half() for name, value in net.state_dict().items()}
    made = {name: getattr(settings, name) for name in LEARNING + SAMPLING}
    save_whole(dict(net=half, names=names, settings=made, val_loss=row["val_loss"]), path)


def open_network(**given):
    """(averaged network in evaluation mode, class names, Settings): from the file that
    `weights` names, or from what training wrote into `out`.

    What is not `given` is as it was in training, but for what to draw and where to compute.
    recipe="paper" samples as the paper does. Needs no data set. Raises UserError if there is
    no such file or it can't be used.
    """
    asked = choose_settings(**given)
    path = Path(asked.weights or asked.folder() / "weights.pt").expanduser()
    if not path.is_file():
        raise UserError(f"no {path}: train first, or say where it is, with --out or --weights")
    device, _ = set_up(asked)
    with reading(path):
        state = load_file(path)
        made = state["settings"]
        check_same(made, given)
        kept = {name: made[name] for name in LEARNING + SAMPLING}
        if asked.recipe == "paper":
            kept.update({name: PAPER[name] for name in SAMPLING if name in PAPER})
        settings = Settings(**{**kept, **given})
        names = [str(name) for name in state["names"]]
        net = build_network(settings, len(names)).to(device)
        net.load_state_dict(state["net"])
    return net.eval().requires_grad_(False), names, settings


# --------------------------------------------------------------------------------------
# 13. Signals and device
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_requests():
    """Inside this, the first Ctrl-C or SIGTERM only leaves its number in the list given, so
    that a step can be finished and saved; a second one acts as always. Python lets only the
    main thread handle signals, so in another thread this does nothing."""
    received = []
    former = {}

    def put_back():
        for number, handler in former.items():
            signal.signal(number, handler)

    def take_note(number, frame):
        received.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, take_note)
    try:
        yield received
    finally:
        put_back()


def choose_device(name="auto"):
    """The torch.device of that name; "auto" is a GPU where there is one. Raises UserError if
    there is none of the kind asked for."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    best = gpu.type if gpu else "cpu"
    if name not in ("auto", "cpu", best):
        raise UserError(f"--device {name}: this machine, or this torch, has none")
    return torch.device(best if name == "auto" else name)


def choose_precision(device, name="auto"):
    """The dtype of matrix products and convolutions: one of PRECISIONS by name, or "auto":
    bf16 where a GPU computes with it, as it has fp32's range and so needs no scaling of the
    loss; fp16 on a GPU that has tensor cores for that alone, such as a T4; else fp32."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


def autocast(device, dtype):
    """A context in which matrix products and convolutions are computed in `dtype`, one of
    PRECISIONS. Weights stay fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_up(settings):
    """What each mode begins with: (device, dtype of matrix products). Raises UserError where
    the device can't be had."""
    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)

    # What is said to be fp32 is fp32. So TF32, which rounds more, is off, and the compiler's
    # advice to switch it on is of no use.
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")

    # A precaution: with 64 tokens, as here, and a mask, which we don't have, cuDNN's
    # attention can give NaN gradients on an H100 (PyTorch issue 196678). In bf16 no
    # GradScaler would catch them.
    torch.backends.cuda.enable_cudnn_sdp(False)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"torch {torch.__version__} on {name}, {str(precision).removeprefix('torch.')}")
    return device, precision


def make_folder(settings):
    """The folder of a run, made if there is none. Raises OSError or UserError if files can't
    be written there: better to fail now than after an hour."""
    path = settings.folder()
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UserError(f"files can't be written to {path}: name another folder with --out")
    return path


def compile_network(net, how):
    """torch.compile `net` in place, so that its weights keep their names, if `how` (on, off,
    or auto: on CUDA) asks for it. It is compiled at its first call, which takes a minute;
    where that fails, one line says so, and it runs uncompiled."""
    device = next(net.parameters()).device
    if how == "off" or (how == "auto" and device.type != "cuda"):
        return
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(say_uncompiled)

    # A step launches some 900 kernels, most of which are over before the next one is
    # launched. So on CUDA the launches of a call are recorded once, as a CUDA graph, and then
    # played back as a whole. What a call returns is overwritten by the next call; training,
    # validation and sampler have computed new tensors from it by then.
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    net.compile(mode=mode, dynamic=False)


def say_uncompiled(record):
    """A filter of the compiler's log, which reports a failure at great length."""
    reason = record.getMessage().strip().splitlines()[-1]
    print(f"going on without torch.compile: {reason[:150]}", flush=True)
    return False


# --------------------------------------------------------------------------------------
# 14. Drawn shapes
# --------------------------------------------------------------------------------------
# A stand-in for photographs: nothing to download, and learned in minutes on a CPU.

# An outline goes from tip to tip by way of an inner corner: (tips, radius of that corner).
# Where the corner lies on the straight line between two tips, the star is a polygon.
OUTLINES = dict(
    triangle=(3, 0.5),
    diamond=(4, 0.7071),
    circle=(24, 1.0),
    star=(5, 0.4),
    spark=(4, 0.3),
)
FILLS = ("", "hollow ")
COLOURS = "red orange yellow lime cyan blue magenta pink tan white".split()


def draw_shapes(count, seed):
    """Draw `count` pictures of 5 outlines, filled or hollow, in 10 colours: (x uint8
    (count,3,32,32), y (count,), 100 class names). The same seed draws the same pictures."""
    random = np.random.RandomState(seed)
    kinds = list(itertools.product(COLOURS, FILLS, OUTLINES))
    y = random.randint(len(kinds), size=count)
    x = np.empty((count, 32, 32, 3), np.uint8)
    for i, label in enumerate(y):
        colour, fill, outline = kinds[label]
        tips, inner = OUTLINES[outline]

        # Corners, in a square of 128 pixels; scaling down smooths the edges.
        size = random.uniform(40, 54)
        middle = random.uniform(size, 128 - size, 2)
        angle = np.pi * np.arange(2 * tips) / tips
        corners = np.stack([np.sin(angle), -np.cos(angle)], axis=1)  # (2*tips,2)
        corners[1::2] *= inner

        # The shape on a dark grey, and in a hollow one the grey again.
        grey = (random.randint(10, 50),) * 3
        image = Image.new("RGB", (128, 128), grey)
        pen = ImageDraw.Draw(image)
        pen.polygon((middle + size * corners).flatten().tolist(), colour)
        if fill:
            pen.polygon((middle + 0.55 * size * corners).flatten().tolist(), grey)
        x[i] = image.reduce(4)

    names = [f"{colour} {fill}{outline}" for colour, fill, outline in kinds]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), names


# --------------------------------------------------------------------------------------
# 15. Command line
# --------------------------------------------------------------------------------------


def check_value(field, value):
    """Raises UserError if a field of Settings may not have this value."""
    allowed = field.metadata["allowed"]
    fits = isinstance(value, (int, float) if field.type is float else field.type)
    if fits and allowed:
        if field.type is str:
            fits = value in allowed
        else:
            fits = allowed[0] <= value <= allowed[1]
    if not fits:
        wanted = "a " + field.type.__name__
        if allowed:
            wanted += (" of " if field.type is str else " within ") + f"{allowed}"
        raise UserError(f"{flag_of(field)} is {value!r}, and should be {wanted}")


def flag_of(field):
    """The flag of a field of Settings on the command line."""
    return "--" + field.name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises UserError for a command that is not valid, instead of ending the process."""

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def parse(argv):
    """(mode, dict of the settings that `argv` gives). Raises UserError."""
    parser = Parser(
        description="\n\n".join((__doc__ or "").split("\n\n")[:3]),
        epilog="With --data shapes or --recipe paper some defaults are others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # so -1e-1 is no flag
    parser.add_argument("mode", nargs="?", default="train")
    flags = []
    for field in dataclasses.fields(Settings):
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action="store_true")
        text = f"{field.metadata['help']}; default {field.default!r}"
        flags.append(flag_of(field))
        parser.add_argument(flags[-1], help=text, **kind)

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], flags, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no {unknown[0]}{hint} (--help lists all flags)")
    given = vars(given)
    return given.pop("mode"), given


def run(argv):
    """What `python diffusion.py ARGV` does; returns the mode's result. Raises what the mode
    raises."""
    mode, given = parse(argv)
    if mode == "train":
        return train(choose_settings(**given))
    if mode == "schedules":
        return schedules_mode(choose_settings(**given))

    # The others draw with a network that training, or somebody, has left.
    modes = dict(
        sample=sample_mode,
        interpolate=interpolate_mode,
        neighbours=neighbours_mode,
        fid=fid_mode,
    )
    if mode not in modes:
        raise UserError(f"no mode {mode}, only train, schedules, {', '.join(modes)}")
    net, names, settings = open_network(**given)
    make_folder(settings)  # better to fail now
    if mode == "fid" or settings.count >= 2000:  # for fewer it would take longer
        compile_network(net, settings.compile)
    return modes[mode](settings, net, names)


def main(argv=None):
    """`run`, with errors as one line and an exit status: the only place that ends the
    process."""
    # What a console can't show is replaced.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError, AssertionError) as error:
        if not str(error):  # an assert that says nothing: its place is all there is to tell
            raise
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.exit("error: out of memory: a quarter of --batch-size takes less than half of it")
    except KeyboardInterrupt as stopped:
        print(stopped)
        sys.exit(130)


if __name__ == "__main__":
    main()
