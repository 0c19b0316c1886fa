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
it stopped, and --restart begins anew. The other modes read that run's weights.pt, or
--weights FILE.

Result of the first command, in some ten minutes on an H200: a velocity loss of 0.1115 on test
pictures, where a network that always says zero has 0.645. That run had another rate, other noise
in training, and blocks that did not start as the identity. README.md has its log and pictures.

Training mixes a picture with noise, and lets the network predict the velocity v, from which
both the picture and the noise follow. Sampling starts from noise alone; at each step the
network guesses the picture, which is then mixed with noise again, a little less each time.

The network has 960,755 parameters; a, b, c = 48, 96, 144 channels. Both vertical lines on the
right are the embedding's way to its injections, the other two are skips:

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

Three things differ from the paper: the embedding also scales and shifts the channels in every
block, training sees cleaner pictures than the schedule says, and sampling has other
defaults. `--recipe paper` undoes all three, and widens the network to 56, 112, 168 channels.

Sections 1 to 9 are the story. To understand the model read 1 (layers and U-Net), to understand
diffusion 3 (noise), 4 (objective), 6 (training) and 8 (guidance and sampler). What follows the
double line supports the story.

Shapes in comments: B pictures, C channels, H x W pixels, E width of the embedding, N pictures
of a set, P pairs.
Symbols: x       a picture in [-1,1]
         noise   the paper's epsilon
         t       the time in [0,1]: 0 is nearly clean, 1 is nearly pure noise
         x_t     a noised picture, x_noised in the paper
         log_snr how clean x_t is, the paper's lambda: about 20 is clean, -20 is noise
         alpha   scale of the picture in x_t (not DDPM's alpha_t, which is a ratio)
         sigma   scale of the noise in x_t; alpha² + sigma² = 1
         v       the velocity
         pred_   before a name: the network's guess of it (x_hat and so on in formulas)

Tags like [2.2] name a section of the paper: 2.1 Strategy, 2.2 Methodology, 2.3 Discussion,
2.4 Results, 2.5 Limitations; Eq. (1) to (4) are its equations. `our choice` marks what it leaves
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
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

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


def zeroed(layer):
    """The layer, its weights and bias set to zero: at first it gives zeros for any input. As the
    last layer of what is added to x, it makes the sum start as x itself, and a deep network
    start as a shallow one (our choice)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal_embedding(log_snr, width=64):
    """Sines and cosines of the noise level [42]: (B,) -> (B,width).

    [2.2] says "timestep embeddings", but in Eq. (4) the network gets lambda, the log-SNR. So it
    does not depend on the schedule, and can be sampled on another one.

    log_snr lies between -20 and 20. Wavelengths go from 3 to 300 (our choice): the long ones
    order all levels, the short ones tell neighbours apart.
    """
    low, high = math.log10(0.02), math.log10(2)
    frequency = 10 ** torch.linspace(low, high, width // 2, device=log_snr.device)
    angle = log_snr[:, None].float() * frequency  # (B,width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,H,W) -> (B,C,H,W).

    GroupNorm takes its statistics from one picture; BatchNorm's would mix pictures of different
    noise levels. This form of block, SiLU, and 8 groups, so that C is a multiple of 8, are our
    choice. It starts as the identity, as the last layer of conv2 is zeroed.

    With `e_width`, an embedding (B,e_width) scales and shifts the channels after the second
    norm. That is ours; elsewhere it is known as FiLM or adaptive GroupNorm.
    """

    def __init__(self, channels, e_width=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = separable_conv(channels, channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = separable_conv(channels, channels)
        zeroed(self.conv2[-1])
        self.modulate = nn.Linear(e_width, 2 * channels) if e_width else None

    def forward(self, x, embedding=None):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.modulate is not None:
            # scale and shift, each (B,C,1,1)
            scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift  # zeros change nothing
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

    [2.2] speaks of self-attention, the abstract of transformer layers, which have an MLP too.
    Attention alone is our choice. So are C / 64 heads, rounded, one group in the norm, and that it
    starts as the identity.
    No positions are added: convolutions pad with zeros, so the channels already tell where the
    border is.
    """

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, round(channels / 64))
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

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

    The embedding is added to the input of norm and convolution only, and their result to x, as
    in any residual block (our choice, as are norm, activation and the two places in the
    network). The convolution is a regular one: a separable one looks at each channel by itself
    before it mixes them, and the paper blames wave-like artefacts on that [2.3]. `conv` takes
    either.
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
    which goes beyond the paper. Raises ValueError, GroupNorm's, if `width` is no multiple of
    8.
    """

    def __init__(self, classes=100, width=48, after_injection="regular", modulate=True):
        super().__init__()
        e_width = 128
        self.no_class = classes  # classes are 0 to classes - 1
        a = width
        b = 2 * width
        c = 3 * width
        conv = regular_conv if after_injection == "regular" else separable_conv

        def block(channels):
            return ResidualBlock(channels, e_width if modulate else 0)

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

        # Up: 8x8 -> 16x16 -> 32x32. [28] concatenates skips; here they are added. So the 1x1
        # convolution needs x alone and can work before doubling, on a quarter of the positions.
        self.join2 = nn.Conv2d(c, b, 1)
        self.up2 = Stage(block(b), block(b))
        self.join1 = nn.Conv2d(b, a, 1)
        self.up1 = Stage(block(a), block(a))

        # The first guess is v = 0: our choice.
        self.out = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), zeroed(regular_conv(a, 3)))

        # In this layout 1x1 convolutions run faster.
        self.to(memory_format=torch.channels_last)

    def embed(self, labels):
        """Class embeddings (B,E) of class numbers (B,); embeddings pass through."""
        if labels.is_floating_point():
            return labels
        return self.embed_class(labels)

    def forward(self, x, log_snr, labels):
        e = self.embed_log_snr(sinusoidal_embedding(log_snr)) + self.embed(labels)
        e = F.silu(e)  # (B,E); what takes it in is linear, so the nonlinearity comes here

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

        # The last layers are in fp32 even where training and sampling compute the others in
        # bf16, because guidance multiplies rounding errors.
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


def load_cifar(folder):
    """(train_x, train_y, test_x, test_y, names of classes) from the folder: pictures x uint8
    (N,3,32,32) in [0,255], labels y int64 (N,).

    The data set is downloaded if the folder has none, but only into one that exists, or into
    the default one. torchvision verifies its md5. Raises UserError, with what to do by
    hand, if it is damaged or can't be had.
    """
    folder = Path(folder).expanduser()
    if folder.name == DATASET.base_folder:  # one level too deep
        folder = folder.parent
    if not folder.is_dir() and folder != Path("data"):
        raise UserError(f"--data {folder}: no such folder (drawn shapes are: shapes)")

    missing = not (folder / DATASET.base_folder).exists()
    parts = []
    advice = f"get {DATASET.url}, unpack it there; or do without: --data shapes"
    with using(f"{DATASET.__name__} in {folder}", advice):  # any failure becomes one line
        for train in (True, False):
            part = DATASET(folder, train, download=missing)
            x = torch.from_numpy(part.data).permute(0, 3, 1, 2)
            parts += [x.contiguous(), torch.tensor(part.targets)]
    return *parts, part.classes


def load_data(source, device="cpu", expected=None):
    """As load_cifar, on the device. `source` is the folder, or "shapes" for drawn shapes. Raises
    UserError as load_cifar, and if the classes are not the `expected` ones."""
    if source == "shapes":
        train_x, train_y, names = draw_shapes(10_000, seed=1)
        test_x, test_y, _ = draw_shapes(1_000, seed=2)
        parts = [train_x, train_y, test_x, test_y]
    else:
        *parts, names = load_cifar(source)
    if expected and names != expected:
        raise UserError("--data: the network was made for other classes")
    return *[part.to(device) for part in parts], names


def to_model(x):
    """uint8 [0,255] -> fp32 [-1,1], channels last: the one place where stored pictures
    become network input. Raises AssertionError if x is not uint8: then it has been here
    already."""
    assert x.dtype == torch.uint8, "to_model wants uint8 in [0,255]"
    x = x.float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def to_uint8(x):
    """The way back: fp32 [-1,1] -> uint8 [0,255], with what lies outside cut off."""
    x = (x.float().clamp(-1, 1) + 1) * 127.5
    return x.round().to(torch.uint8)


def seeded_generator(device, *numbers):
    """A generator of random numbers on the device that depends on these numbers alone.

    All that is random in training follows from the seed and the step (in sampling, from its
    seed and the batch). So a run that was stopped can go on exactly as it would have, and
    its checkpoint need not say where any generator stood. SeedSequence makes seeds that
    have nothing in common from numbers as close as 1 and 2.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1).item()
    return torch.Generator(device).manual_seed(seed)


# --------------------------------------------------------------------------------------
# 3. Noise: schedules, alpha and sigma, velocity
# --------------------------------------------------------------------------------------
# A schedule maps t in [0,1] to the log-SNR, lambda = log(alpha²/sigma²): strictly falling
# and invertible [2.2]. Ours are finite at both ends too.


def cosine_schedule(t):
    """alpha = cos(a t + b) and sigma = sin(a t + b), so lambda = -2 log tan(a t + b) [2.2, 24],
    from 20 at t = 0 to -20 at t = 1; t any shape.

    b = atan(e^-10) and a = pi/2 - 2b cut off the infinite ends, as in [12] (our choice).
    """
    b = math.atan(math.exp(-10))
    a = math.pi / 2 - 2 * b

    # With phi = a t + b, tan(phi) = sin(phi) / sin(pi/2 - phi), and as a + 2b = pi/2,
    #     pi/2 - phi = a (1 - t) + b.
    # Two sines are accurate in fp32 near t = 1 too, where the tangent is not.
    return 2 * (torch.sin(a * (1 - t) + b).log() - torch.sin(a * t + b).log())


def linear_schedule(t):
    """alpha² = e^-(1e-4 + 10 t²), so lambda = -log(e^(1e-4 + 10 t²) - 1), from 9.2 at t = 0 to
    -10 at t = 1; t any shape. This is close to DDPM's linear betas in continuous time [11, 20],
    and Crowson's code [3] had it [2.3]."""
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


def spliced_schedule(t):
    """Cosine first, then linear [2.3, 4], from 20 at t = 0 to -10 at t = 1; t any shape.

    Cosine at 0.80074257 and linear at 0.48536712 have nearly the same value, -2.256, and the same
    slope; both constants are Crowson's [4], for a cosine with infinite ends. There the two are
    joined, at t = 0.609. Here value and slope agree to 2 parts in 10,000.
    """
    # u is the cosine's own time, and u - shift the linear one's.
    shift = 0.80074257 - 0.48536712
    u = (1 + shift) * t

    # `where` computes both for all of t; the clamps keep the one not taken finite.
    early = cosine_schedule(u.clamp(max=1))
    late = linear_schedule((u - shift).clamp(min=0))
    return torch.where(u < 0.80074257, early, late)


# A schedule of your own goes here: it can then be trained, sampled and drawn.
SCHEDULES = dict(cosine=cosine_schedule, linear=linear_schedule, spliced=spliced_schedule)


def to_alpha_sigma(log_snr):
    """alpha = sqrt(sigmoid(lambda)) and sigma = sqrt(sigmoid(-lambda)), which solve
    alpha² / sigma² = e^lambda and alpha² + sigma² = 1, shaped to scale pictures: (B,) -> two of
    (B,1,1,1)."""
    log_snr = log_snr.view(-1, 1, 1, 1)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def velocity(x, noise, alpha, sigma):
    """v = alpha * noise - sigma * x: Eq. (1) [30].

    Pictures (B,3,H,W); alpha and sigma (B,1,1,1) or numbers, here and in the next two. As
    alpha² + sigma² = 1, they are cos(phi) and sin(phi) of an angle phi. As it goes from 0 to
    pi/2, x_t = cos(phi) x + sin(phi) noise goes from x to noise, and v = d x_t / d phi is its
    velocity.

    From a guess of the noise the picture would be (x_t - sigma noise) / alpha, of no use where
    alpha is near 0; from a guess of the picture the noise would be (x_t - alpha x) / sigma, of no
    use where sigma is near 0. With v nothing is divided: see split.
    """
    return alpha * noise - sigma * x


def add_noise(x, noise, alpha, sigma):
    """x_t = alpha * x + sigma * noise: Eq. (2)."""
    return alpha * x + sigma * noise


def split(x_t, v, alpha, sigma):
    """(x, noise) that make up x_t if v is its velocity: Eq. (1) and (2) solved for both. From
    (x, noise) to (x_t, v) is a rotation by phi; this is the rotation back."""
    pred_x0 = alpha * x_t - sigma * v
    pred_noise = sigma * x_t + alpha * v
    return pred_x0, pred_noise


# --------------------------------------------------------------------------------------
# 4. Objective and optimiser
# --------------------------------------------------------------------------------------
# The objective is |v - v_hat|², Eq. (3), with the mean over pixels in place of the sum: one line
# of the training loop. `split` turns the network's v_hat into x_hat and noise_hat. So, with the
# same x_t,
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


def learning_rate(step, steps, peak, warm_up=500):
    """Rate of update number `step` (from 0): a cosine from `peak` to 0 over all `steps`, times
    a ramp from 0 to 1 over the first `warm_up`, or about a tenth of all if that is less (our
    choice)."""
    warm_up = min(warm_up, 1 + steps // 10)
    ramp = min(1, (step + 1) / warm_up)
    return peak * ramp * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema_net, net, decay, step):
    """ema_net += (1 - decay) (net - ema_net), weight by weight [2.2, 11, 24], after update
    number `step` (from 0).

    Averaging smooths the jitter of single steps; that helps most while the rate is high. The
    decay is our choice, and so is its warm-up, at most (1 + step) / (10 + step), so that the
    average forgets the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))

    # lerp(a, b, w) is a + w (b - a); with _foreach_, of all tensors of two lists in one call.
    torch._foreach_lerp_(list(ema_net.parameters()), list(net.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------
# 5. Settings
# --------------------------------------------------------------------------------------


def setting(default, help, *allowed):
    """A field of Settings: its default, what --help says, and what is allowed: the least and the
    greatest number, or the words; without any, anything."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclasses.dataclass
class Settings:
    """All settings; each is a flag of the command line too, `batch_size` as --batch-size.
    Raises UserError for a value that its field does not allow.

    The paper does not name the optimiser, mirroring, clipping of the gradient or the course of
    the learning rate: those are our choice, as is every number that it does not give. Where
    runs decided one, they are in .github/experiments.md. `recipe` and data="shapes" change the
    defaults of other fields: see choose_settings, which alone does that. Those of sampling are
    explained in section 8.
    """

    # Where pictures come from and results go to
    data: str = setting("data", "folder of the data set, downloaded if none; or: shapes")
    out: str = setting(f"runs/diffusion-{DATASET.__name__.lower()}", "folder to write to")
    weights: str = setting("", "file of weights to draw with; empty: weights.pt of the run")
    restart: bool = setting(False, "begin anew, over the run in the folder")

    # Where it runs (each kind of device has its own rounding and random numbers), and how often
    # it reports
    device: str = setting("auto", "auto: a GPU where there is one", "auto", "cpu")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", "auto", "on", "off")
    precision: str = setting("auto", "for matrices", "auto", "float32", "bfloat16", "float16")
    log_every: int = setting(50, "steps between lines of progress", 1, MAX_STEPS)
    eval_every: int = setting(1000, "steps between validations; each saves", 1, MAX_STEPS)
    grid_every: int = setting(5000, "steps between grids of samples", 1, MAX_STEPS)

    # How it is trained
    seed: int = setting(0, "decides all that is random in training", 0, 2**31)
    steps: int = setting(MAX_STEPS, "optimiser steps", 1, MAX_STEPS)
    batch_size: int = setting(256, "pictures per step", 1, 10_000)
    max_lr: float = setting(3e-3, "peak learning rate", 1e-8, 10.0)
    ema: float = setting(0.999, "decay of the averaged weights; rises to it", 0.0, 0.99999)
    label_drop: float = setting(0.1, "share of labels dropped; 0: no guidance", 0.0, 0.9)
    schedule: str = setting("cosine", "noise schedule", *SCHEDULES)

    # Not the paper's: training multiplies the log-SNR by the first of these and adds the second,
    # so its levels lie closer together, and on the whole are cleaner; validation and sampling
    # don't. Samples come nearer to real pictures. (Training goes from 17 to -13, and sampling
    # begins at -20; at -13 too alpha is below 0.002, so x_t is noise.)
    log_snr_scale: float = setting(0.75, "times log-SNR in training", 0.01, 10.0)
    log_snr_shift: float = setting(2.0, "added to that", -10.0, 10.0)

    # The network. `modulate` is not the paper's; without it width 56 fits into the budget.
    width: int = setting(48, "channels at 32x32, a multiple of 8", 8, 512)
    after_injection: str = setting("regular", "convolution there", "regular", "separable")
    modulate: str = setting("on", "scale and shift in all blocks", "on", "off")
    recipe: str = setting("ours", "paper: its design and sampling", "ours", "paper")

    # How it is sampled. The paper samples with DDPM's noise (eta = 1), w = 3 and dynamic
    # clipping. Our steps, eta, w and clipping together come nearer to the real pictures.
    sample_schedule: str = setting("", "of sampling; empty: as training", "", *SCHEDULES)
    sample_steps: int = setting(50, "denoising steps per sample", 1, 10_000)
    eta: float = setting(0.6, "fresh noise per step; 1: DDPM, 0: DDIM", 0.0, 1.0)
    guidance: float = setting(2.0, "w of Eq. (4); 0: none, -1: no class", -1.0, 100.0)
    clip_x0: str = setting("none", "how a guess is cut", "none", "static", "dynamic")

    # What is sampled
    classes: str = setting("", "names of classes, by commas; empty: all, mixed")
    count: int = setting(0, "of sample, neighbours, fid; 0: 64, for fid 10,000", 0, 1_000_000)
    sample_seed: int = setting(0, "decides the noise of samples", 0, 2**31)
    inception: str = setting("", "file of the FID network; empty: torch hub's folder")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if self.width % 8 != 0:
            raise UserError("--width is not a multiple of 8")


# --------------------------------------------------------------------------------------
# 6. Training
# --------------------------------------------------------------------------------------


def train(settings):
    """Train [2.2], or go on with a run that was stopped, then draw samples, interpolations and
    neighbours; returns the validation loss.

    Writes into settings.out. Raises UserError or OSError for settings, data, a folder or
    a checkpoint that can't be used, and if the loss is no longer finite; AssertionError if a
    budget is exceeded; KeyboardInterrupt after Ctrl-C or SIGTERM, when all is saved.
    """
    device = set_up(settings)
    out = make_folder(settings)
    train_x, train_y, test_x, test_y, names = load_data(settings.data, device)
    batches = len(train_y) // settings.batch_size  # per epoch; a last incomplete one is dropped
    if batches == 0:
        raise UserError("--batch-size is above the number of training pictures")

    # The network, and one with the average of its weights, which is what is validated and
    # sampled from.
    net = build_network(settings, len(names)).to(device)
    ema_net = copy.deepcopy(net).eval().requires_grad_(False)
    compile_network(net, settings.compile)
    compile_network(ema_net, settings.compile)

    # Adam, as in [11], without weight decay; `fused` updates all weights in one kernel. With
    # a second beta of 0.99 it forgets large gradients sooner than with 0.999 (our choice).
    # Its rate is set before each step.
    optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)

    # fp16 can't hold small gradients, so the loss is scaled up before the backward pass and
    # the gradients down after it. In fp32 and bf16 the scaler does nothing.
    fp16 = choose_precision(device, settings.precision) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    # The times t of all steps, of low discrepancy [2.2]: a Sobol sequence puts each number into
    # the largest gaps left so far. So every batch covers [0,1] evenly, and the loss estimate
    # varies less [2.3, 19]. (Row i of a batch of 256 always gets a t from the same 1/128 of
    # [0,1]. As the pictures come in random order, no picture always has the same t.)
    sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=settings.seed)
    times = sobol.draw(settings.steps * settings.batch_size)
    times = times.view(settings.steps, -1).to(device)
    schedule = SCHEDULES[settings.schedule]

    # A run that was stopped goes on.
    path = out / "checkpoint.pt"
    written = modified(path)
    made = describe(settings, names)
    parts = dict(net=net, ema=ema_net, optimiser=optimiser, scaler=scaler)
    first = 0
    rows = []  # of the log
    if written and not settings.restart:
        first, rows = resume(path, made, parts)
    step = first

    # The parameter budget [2.1].
    count = count_parameters(net)
    stages = {name: count_parameters(stage) for name, stage in net.named_children()}
    print(f"{count:,} parameters: {stages}")
    assert count < MAX_PARAMETERS, "too many parameters"

    losses = []  # since the last row of the log
    clock = time.perf_counter()
    stopping = False
    with stop_requests() as stop:  # after Ctrl-C the step ends, and all is saved
        while step < settings.steps and not stopping:
            # The step budget [2.1].
            assert step < MAX_STEPS, "all optimiser steps are spent"

            # An epoch is one random order of the training pictures.
            epoch, batch = divmod(step, batches)
            if batch == 0 or step == first:
                random = seeded_generator(device, settings.seed, 0, epoch)  # 0 is for orders
                order = torch.randperm(len(train_y), generator=random, device=device)

            # Choose pictures, the next ones in order, and times.
            start = batch * settings.batch_size
            chosen = order[start : start + settings.batch_size]
            x = to_model(train_x[chosen])  # (B,3,32,32)
            y = train_y[chosen]  # (B,)
            t = times[step]  # (B,)

            # Mirror half of them (our choice). Drop some labels: the network learns "no class"
            # too, which guidance needs [12].
            random = seeded_generator(device, settings.seed, 1, step)  # 1 is for steps
            flip, drop = torch.rand(2, len(y), generator=random, device=device)
            x = torch.where(flip[:, None, None, None] < 0.5, x.flip(-1), x)
            labels = y.masked_fill(drop < settings.label_drop, net.no_class)

            # Noise each picture to the level of its own t, scaled and shifted: Eq. (2). The target
            # is v: Eq. (1).
            noise = torch.randn(x.shape, generator=random, device=device)
            log_snr = settings.log_snr_scale * schedule(t) + settings.log_snr_shift  # (B,)
            alpha, sigma = to_alpha_sigma(log_snr)  # (B,1,1,1)
            x_t = add_noise(x, noise, alpha, sigma)
            v = velocity(x, noise, alpha, sigma)

            # Forward, in bf16 or fp16 on a GPU.
            with autocast(device, settings.precision):
                pred_v = net(x_t, log_snr, labels)

            # Loss, in fp32: Eq. (3), as a mean over pictures and pixels.
            loss = (v - pred_v).square().mean()

            # The gradient, clipped to norm 1 (our choice). (The scaler's lines count in fp16.)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)

            # One optimiser step, and the averaged weights follow. (A step whose fp16
            # gradients overflowed leaves the weights as they are, and lowers the scale.)
            rate = learning_rate(step, settings.steps, settings.max_lr)
            optimiser.param_groups[0]["lr"] = rate
            scaler.step(optimiser)
            scaler.update()
            update_ema(ema_net, net, settings.ema, step)
            step += 1

            # That was the algorithm. It never copies a number from a GPU: a copy would wait
            # until the GPU has done all its work. So the rest happens only now and then.
            losses.append(loss.detach())
            stopping = len(stop) > 0
            validating = step % settings.eval_every == 0 or step == settings.steps
            if validating or stopping or step == 1 or step % settings.log_every == 0:
                row = new_row(step, settings, losses, rate, clock)
                if validating:
                    scores = validate(ema_net, test_x, test_y, schedule, settings.precision)
                    row.update(scores)
                show_row(row)
                rows.append(row)
                if validating or stopping:
                    written = save_checkpoint(path, written, made, parts, rows)
                    save_log(out, rows)
                if validating:
                    save_weights(out / "weights.pt", made, ema_net, row["val_loss"])
                losses = []
                clock = time.perf_counter()
            if step % settings.grid_every == 0 or step == settings.steps:
                save_class_grid(ema_net, names, settings, step)
                clock = time.perf_counter()

    if stopping:
        raise KeyboardInterrupt(
            "stopped, and all is saved: the same command goes on (without --restart)"
        )
    sample_mode(ema_net, names, settings)
    interpolate_mode(ema_net, names, settings)
    neighbours_mode(ema_net, names, settings)
    return rows[-1]["val_loss"]


# --------------------------------------------------------------------------------------
# 7. Validation loss
# --------------------------------------------------------------------------------------


@torch.no_grad()
def validate(net, x, y, schedule=cosine_schedule, precision="auto"):
    """Eq. (3) on n pictures, at most 1,024 of x uint8 (N,3,32,32), y (N,), with fixed noise,
    number i at t = (i + 1/2)/n. Returns a dict: val_loss, the mean, and bin0 to bin4, the means
    of five nearly equal parts, from clean to noisy.

    All its seeds are fixed, so two networks, or two moments of one, compare picture by
    picture, on the same data and schedule. Settings that were chosen by it look a little too
    good on these pictures.
    """
    chosen = np.random.RandomState(0).permutation(len(y))[:1024]
    picture = to_model(x[chosen])
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    noise = noise.to(y.device)

    t = (torch.arange(len(chosen), device=y.device) + 0.5) / len(chosen)
    log_snr = schedule(t)
    alpha, sigma = to_alpha_sigma(log_snr)
    x_t = add_noise(picture, noise, alpha, sigma)
    with autocast(y.device, precision):
        pred_v = net(x_t, log_snr, y[chosen])
    error = velocity(picture, noise, alpha, sigma) - pred_v

    losses = error.square().flatten(1).mean(1)  # (count,)
    scores = dict(val_loss=losses.mean().item())
    for i, part in enumerate(losses.chunk(5)):
        scores[f"bin{i}"] = part.mean().item()
    return scores


# --------------------------------------------------------------------------------------
# 8. Guidance and sampler
# --------------------------------------------------------------------------------------


def guide(v_cond, v_uncond, w):
    """Classifier-free guidance, Eq. (4) [12]: (1 + w) v_cond - w v_uncond.

    v_cond - v_uncond is what the class changes in the guess: it points to pictures that the
    class explains better. w = 0 uses v_cond alone; w > 0 exaggerates the class, so that pictures
    are clearer and less varied; w = -1 ignores the class. Others call 1 + w the guidance scale:
    their 4 is the paper's w = 3.
    """
    return (1 + w) * v_cond - w * v_uncond


def guided_velocity(net, labels, w):
    """The function (x_t, log_snr) -> v that a sampler calls, log_snr one number for the whole
    batch: `net` with guidance w.

    labels as UNet takes them, (B,) or (B,E). Both halves of Eq. (4) go through the network
    as one batch of 2B.
    """
    wanted = net.embed(labels)  # (B,E)
    none = net.embed_class.weight[net.no_class].expand_as(wanted)  # (B,E)

    def model(x_t, log_snr):
        twice = torch.cat([x_t, x_t])
        log_snrs = torch.full((len(twice),), log_snr, device=x_t.device)
        v_cond, v_uncond = net(twice, log_snrs, torch.cat([wanted, none])).chunk(2)
        return guide(v_cond, v_uncond, w)

    return model


def clip_picture(pred_x0, how):
    """Keep guessed pictures (B,3,H,W) in range: "none", "static" (cut at ±1), or "dynamic"
    [2.3], which [29] calls dynamic thresholding.

    Guidance drives guesses out of [-1,1]. Cutting saturates them; dynamic clipping cuts a
    picture at s = max(1, 99.5th percentile of its |values|) and divides by s (99.5: our
    choice).
    """
    if how == "none":
        return pred_x0
    s = 1.0
    if how == "dynamic":
        s = pred_x0.abs().flatten(1).quantile(0.995, dim=1)  # (B,)
        s = s.clamp(min=1).view(-1, 1, 1, 1)
    return pred_x0.clamp(-s, s) / s


@torch.no_grad()
def ddim_sample(model, x_t, log_snrs, eta=0.6, clip="none", draw_noise=torch.randn_like):
    """Pictures from noise, by DDIM, DDPM and what lies between [2.3, 11, 35]: x_t (B,3,H,W)
    at log_snrs[0] -> the last guessed picture.

    model(x_t, log_snr) gives v, log_snr a number; log_snrs (S,), on the CPU, go from noisy to
    clean, and the model is called once for each. eta scales the fresh noise: 1 adds what DDPM
    adds, which forgives errors of earlier steps; 0 (DDIM) adds none, so that the first noise
    decides the picture. draw_noise(x_t) gives noise in its shape.
    """
    # All pictures have the same level of noise here, so plain numbers do.
    alphas, sigmas = [scale.flatten().tolist() for scale in to_alpha_sigma(log_snrs)]
    for i, log_snr in enumerate(log_snrs.tolist()):
        # Which picture is in x_t?
        alpha = alphas[i]
        sigma = sigmas[i]
        v = model(x_t, log_snr)
        pred_x0, _ = split(x_t, v, alpha, sigma)
        pred_x0 = clip_picture(pred_x0, clip)

        # At the last level the guessed picture is the result: no noise is added again.
        if i + 1 == len(log_snrs):
            break

        # And which noise? It must add up to x_t with the clipped picture. (What split returns
        # as its second part does so with the picture before clipping.)
        pred_noise = (x_t - alpha * pred_x0) / sigma

        # The next level has noise of variance next_sigma². A part of it is drawn afresh, and the
        # rest is the noise just found; the two are independent, so their variances add up.
        #
        # How much is fresh, DDPM tells. Noising from the next, cleaner level x_next to this one is
        #     x_t = sqrt(1 - beta) x_next + sqrt(beta) noise,  sqrt(1 - beta) = alpha / next_alpha
        # with DDPM's beta_t. So we know two Gaussian things about x_next: from pred_x0 its
        # variance next_sigma², and from x_t the variance beta / (1 - beta). Together (by Bayes'
        # rule 1/variance adds up) its variance is next_sigma² / sigma² * beta. This is the
        # smaller of the two variances that [11] tries (our choice); eta² scales it.
        next_alpha = alphas[i + 1]
        next_sigma = sigmas[i + 1]
        beta = 1 - (alpha / next_alpha) ** 2
        fresh_variance = eta**2 * (next_sigma / sigma) ** 2 * beta

        # Mix them at the next noise level. (Rounding could make the difference negative.)
        kept_scale = math.sqrt(max(0.0, next_sigma**2 - fresh_variance))
        x_t = next_alpha * pred_x0 + kept_scale * pred_noise
        x_t = x_t + math.sqrt(fresh_variance) * draw_noise(x_t)
    return pred_x0


# --------------------------------------------------------------------------------------
# 9. Samples, interpolation, grid
# --------------------------------------------------------------------------------------

SAMPLE_BATCH = 250  # samples at once


@torch.no_grad()
def generate(net, labels, settings, start=None):
    """One sample for each of labels, class numbers (N,) or embeddings (N,E), as the Settings
    say: uint8 (N,3,32,32) on the CPU. `start` (N,3,32,32) is the first noise, if it is not to
    be drawn."""
    # From pure noise, t = 1, on; t = 0 needs no call.
    t = torch.linspace(1, 0, settings.sample_steps + 1)[:-1]  # (steps,)
    log_snrs = SCHEDULES[settings.sample_schedule or settings.schedule](t)

    # Where no label was dropped in training, "no class" was not learned.
    w = settings.guidance if settings.label_drop > 0 else 0.0

    device = net.embed_class.weight.device
    pictures = []
    for batch, some in enumerate(labels.to(device).split(SAMPLE_BATCH)):
        print(f"drawing {len(some)} of {len(labels)} pictures", flush=True)

        # On a GPU the compiled network has one batch size, so a short last batch is filled up by
        # repeating its labels; the extra pictures are cut off at the end.
        rows = len(some) if device.type == "cpu" else SAMPLE_BATCH
        index = torch.arange(rows, device=device) % len(some)

        # One generator per batch, and noise for a whole batch each time: so sample number i gets
        # the same noise however many are asked for.
        random = seeded_generator(device, settings.sample_seed, 2, batch)  # 2 is for samples

        def draw_noise(x=None):  # the sampler gives x_t; its shape is known
            noise = torch.randn(SAMPLE_BATCH, 3, 32, 32, generator=random, device=device)
            return noise[:rows]

        x = draw_noise()
        if start is not None:
            x = start.split(SAMPLE_BATCH)[batch].to(device)[index]
        with autocast(device, settings.precision):
            model = guided_velocity(net, some[index], w)
            x = ddim_sample(model, x, log_snrs, settings.eta, settings.clip_x0, draw_noise)
        pictures.append(to_uint8(x[: len(some)]).cpu())
    return torch.cat(pictures)


def find_classes(words, names):
    """Class numbers from words like "rose, Aquarium Fish"; none from an empty text. Case and
    underscores don't matter. Raises UserError, with names that are near, for other words."""
    known = [name.replace("_", " ") for name in names]
    numbers = []
    for word in words.lower().replace("_", " ").split(","):
        word = word.strip()
        if word and word not in known:
            near = difflib.get_close_matches(word, known, cutoff=0.5) or known
            raise UserError(f"--classes {word}: no such class; there is {', '.join(near)}")
        if word:
            numbers.append(known.index(word))
    return numbers


def pick_labels(settings, names, count):
    """Class numbers (count,): the classes asked for in turn, or if none were, all of them in
    an order drawn from the seed of sampling."""
    random = torch.Generator().manual_seed(settings.sample_seed)
    mixed = torch.randperm(len(names), generator=random).tolist()
    classes = find_classes(settings.classes, names) or mixed
    return torch.tensor(list(itertools.islice(itertools.cycle(classes), count)))


def save_grid(path, x, columns):
    """Pictures uint8 (N,3,32,32) as one PNG, row by row, each pixel drawn twice as large."""
    x = F.interpolate(x.cpu() / 255, scale_factor=2)
    torchvision.utils.save_image(x, path, nrow=columns, pad_value=1)
    print(path)


def sample_mode(net, names, settings):
    """Figure 3, left: `count` samples, not cherry-picked. Writes samples.png (the first 64) and
    samples.npz: arr_0, uint8 (count,32,32,3), as other programs for FID read it, and arr_1,
    the class numbers. Returns the pictures, uint8 (count,3,32,32)."""
    labels = pick_labels(settings, names, settings.count or 64)
    x = generate(net, labels, settings)
    out = make_folder(settings)
    save_grid(out / "samples.png", x[:64], columns=8)
    np.savez_compressed(out / "samples.npz", x.permute(0, 2, 3, 1).numpy(), labels.numpy())
    return x


def slerp(a, b, share):
    """Spherical interpolation [2.3, 39]: (B,...) and (B,...), each row one long vector, at
    share (B,) in [0,1] of the way from a to b.

    Noise of 3,072 numbers is nearly always of the same length, and two of them are nearly at
    right angles. The middle of a straight line between them would be 0.7 times as long, a noise
    that the network has never seen. Nearly parallel or opposite rows are joined by a straight
    line, as the formula would divide by 0.
    """
    flat_a = a.flatten(1)
    flat_b = b.flatten(1)
    angle = F.cosine_similarity(flat_a, flat_b).clamp(-1, 1).acos()  # (B,)
    sine = angle.sin()

    # How much of each end: (2,B). `where` computes both; what was divided by 0 is not taken.
    shares = torch.stack([1 - share, share]).to(a.dtype)
    weights = torch.where(sine < 1e-3, shares, (shares * angle).sin() / sine)
    weight_a, weight_b = weights[:, :, None]
    return (weight_a * flat_a + weight_b * flat_b).view_as(a)


@torch.no_grad()
def interpolate(net, ends, labels, settings, count=10):
    """Pictures between pairs [2.3]: `ends` (2,P,3,32,32) first noises, `labels` (2,P) classes
    of P pairs -> uint8 (P*count,3,32,32), pair after pair, ends included.

    Noise and class embedding both go along the sphere, and eta = 0 makes the rest
    deterministic: so the first and the last picture of a row are what the two ends give by
    themselves.
    """
    share = torch.linspace(0, 1, count).repeat(ends.shape[1])  # (P*count,)
    embeddings = net.embed_class.weight.cpu()[labels]  # (2,P,E)

    # The left and the right end for each picture.
    ends = ends.repeat_interleave(count, dim=1)  # (2,P*count,3,32,32)
    embeddings = embeddings.repeat_interleave(count, dim=1)  # (2,P*count,E)
    settings = dataclasses.replace(settings, eta=0.0)
    return generate(net, slerp(*embeddings, share), settings, start=slerp(*ends, share))


def interpolate_mode(net, names, settings, pairs=8):
    """Figure 3, middle: interpolations.png, one row per pair, ends included. Returns the
    pictures, uint8 (pairs*10,3,32,32)."""
    labels = pick_labels(settings, names, 2 * pairs).view(pairs, 2).T
    random = torch.Generator().manual_seed(settings.sample_seed)
    ends = torch.randn(2, pairs, 3, 32, 32, generator=random)
    x = interpolate(net, ends, labels, settings)
    save_grid(make_folder(settings) / "interpolations.png", x, columns=10)
    return x


def save_class_grid(net, names, settings, step):
    """grid-<step>.png: one row per class for ten classes, ten pictures each; always from the
    same noise, so that grids of one run compare."""
    labels = pick_labels(settings, names, 10)
    print("rows:", [names[label] for label in labels])
    x = generate(net, labels.repeat_interleave(10), settings)
    save_grid(make_folder(settings) / f"grid-{step:06}.png", x, columns=10)


# ======================================================================================
# The story ends here. What follows supports it, and can wait for a second reading.
# ======================================================================================


# --------------------------------------------------------------------------------------
# 10. Neighbours and FID
# --------------------------------------------------------------------------------------


def nearest_neighbours(queries, pictures, k=1):
    """The k pictures nearest to each query, among the pictures as they are and mirrored, by
    Euclidean distance of pixels in [0,255]: distance (Q,k), and pictures (Q,k,3,H,W). Both
    uint8 (.,3,H,W), on one device.

    cdist multiplies matrices in fp32, so distances below some 20 are rounding errors.
    """
    pictures = torch.cat([pictures, pictures.flip(-1)])  # (2N,3,H,W)
    flat = pictures.flatten(1).float()
    distances, nearest = [], []
    for query in queries.flatten(1).float().split(250):
        distance, index = torch.cdist(query, flat).topk(k, largest=False)  # each (q,k)
        distances.append(distance)
        nearest.append(pictures[index])
    return torch.cat(distances), torch.cat(nearest)


def neighbours_mode(net, names, settings):
    """Figure 3, right: neighbours.png, 16 samples, each with its four nearest training pictures
    beside it. Returns the median distance of samples to the nearest one, and that of 500
    test pictures.

    The paper sees in such pictures that its model mimics the training set [2.5]. A network
    that copies comes much nearer to its training pictures than new photographs do. A little
    nearer proves nothing, as smooth pictures are near to everything.
    """
    device = net.embed_class.weight.device
    train_x, _, test_x, _, _ = load_data(settings.data, device, names)
    labels = pick_labels(settings, names, settings.count or 64)
    x = generate(net, labels, settings).to(device)
    distance, near = nearest_neighbours(x, train_x, k=4)
    test_distance, _ = nearest_neighbours(test_x[:500], train_x)

    tiles = torch.cat([x[:16, None], near[:16]], dim=1)  # (16,5,3,32,32)
    save_grid(make_folder(settings) / "neighbours.png", tiles.flatten(0, 1), columns=10)
    median = distance[:, 0].median().item()
    test_median = test_distance.median().item()
    print(f"median distance: samples {median:.0f}, test pictures {test_median:.0f}")
    return median, test_median


INCEPTION = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def load_inception(path=""):
    """The FID network (Inception of 2015-12-05) from the file `path`; without one, from torch
    hub's folder, downloaded into it at need. Raises UserError if it can't be had or is not
    that file."""
    file = Path(path or f"{torch.hub.get_dir()}/inception-2015-12-05.pt").expanduser()
    advice = (
        f"fetch {INCEPTION} (SHA-256 {INCEPTION_SHA256}) and name it with --inception; `sample "
        "--count 10000` writes samples.npz, for other programs, without it"
    )
    with using(f"the FID network in {file}", advice):
        if not path and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(file))
        if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
            raise ValueError("wrong SHA-256")
        return torch.jit.load(str(file), map_location="cpu").eval()


@torch.no_grad()
def feature_statistics(network, x):
    """(mean (2048,), covariance (2048,2048)) of the features of pictures uint8 (N,3,H,W),
    float64 on the CPU. `network` is that of load_inception; its forward would resize by
    itself, so only its layers are called, on pictures resized as clean-fid does: bicubic,
    in floating point, cut to [0,255]."""
    features = []
    for some in x.split(50):
        large = F.interpolate(some.float(), (299, 299), mode="bicubic", antialias=True)
        found = network.layers((large.clamp(0, 255) - 128) / 128)
        features.append(found.flatten(1).cpu().double())
    features = torch.cat(features)
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)) of two Gaussians, float64, as a float.
    The trace of (A B)^(1/2) is the sum of the square roots of A B's eigenvalues."""
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def fid_mode(net, names, settings):
    """FID [2.4]: `count` samples, 10,000 by default, with classes as in the test set, against
    all test pictures. The paper names no protocol; this is clean-fid's, our choice. Prints
    it, with its floor, which is the FID of as many training pictures; returns FID. Raises
    UserError, before anything is drawn, if the FID network can't be had."""
    device = net.embed_class.weight.device
    train_x, _, test_x, test_y, _ = load_data(settings.data, device, names)
    network = load_inception(settings.inception).to(device)
    count = settings.count or 10_000
    labels = test_y.repeat(1 + count // len(test_y))[:count]
    x = generate(net, labels, settings).to(device)

    print("measuring samples, test pictures, training pictures", flush=True)
    test = feature_statistics(network, test_x)
    fid = frechet_distance(*feature_statistics(network, x), *test)
    floor = frechet_distance(*feature_statistics(network, train_x[:count]), *test)
    print(
        f"FID {fid:.3f} of {count} samples, {floor:.3f} of as many training pictures (under "
        "10,000 don't compare). Against all test pictures, by Inception 2015-12-05, bicubic as "
        f"in clean-fid; {settings}"
    )
    return fid


# --------------------------------------------------------------------------------------
# 11. Log and plots
# --------------------------------------------------------------------------------------


def new_row(step, settings, losses, rate, clock):
    """A row of the log after `step` updates: the mean of the losses since the last row (list of
    0-d tensors), and the speed. `clock` is time.perf_counter() at the last row."""
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
    print("  ".join(f"{name} {value:,.5g}" for name, value in row.items()), flush=True)
    if not all(map(math.isfinite, row.values())):
        raise UserError(
            "the loss is not finite: begin anew with --restart and a lower --max-lr (what was "
            "saved before, if anything, is kept until then)"
        )


def save_log(out, rows):
    """log.csv, and loss.png of the validated rows, whole each time. Where they can't be
    written (a spreadsheet may hold the table), one line says so, and training goes on."""
    try:
        validated = [row for row in rows if "val_loss" in row]
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, max(rows, key=len))
            writer.writeheader()
            writer.writerows(rows)
        if validated:
            names = ("step", "loss", "val_loss")
            plot(out / "loss.png", {name: [row[name] for row in validated] for name in names})
    except Exception as error:
        print(f"going on without log.csv or loss.png: {error}")


def plot(path, columns):
    """Draw the columns of a table, a dict name -> list of N numbers, over the first of them,
    which rises, into a PNG, with the least and the greatest value of each."""
    image = Image.new("RGB", (900, 600), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(20)
    x, *curves = np.array(list(columns.values()))  # each (N,)
    across = np.interp(x, [x[0], x[-1]], [20, 880])
    for number, (name, values) in enumerate(columns.items()):
        colour = f"hsl({110 * number}, 60%, 40%)"
        text = f"{name}: {min(values):,.4g} to {max(values):,.4g}"
        pen.text((20, 10 + 26 * number), text, colour, font)
        if number > 0:
            down = np.interp(values, [np.min(curves), np.max(curves)], [580, 120])
            pen.line(np.stack([across, down], axis=1).flatten().tolist(), colour, 3)
    image.save(path)


def schedules_mode(settings):
    """schedules.png: log-SNR against t of the noise schedules [2.3]."""
    t = torch.linspace(0, 1, 200)
    columns = dict(t=t.tolist())
    for name, schedule in SCHEDULES.items():
        columns[name] = schedule(t).tolist()
    path = make_folder(settings) / "schedules.png"
    plot(path, columns)
    print(path)


# --------------------------------------------------------------------------------------
# 12. Checkpoint and weights
# --------------------------------------------------------------------------------------


class UserError(ValueError):
    """What the user can put right, said in the text: `main` prints that alone, and no
    traceback."""


@contextlib.contextmanager
def using(source, advice=""):
    """Whatever fails inside this becomes one UserError with the source and the reason, and
    the advice: a damaged file can fail in any way."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"can't use {source} ({reason}) {advice}") from error


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
        number = isinstance(leaf, (float, torch.Tensor))
        if number and not torch.as_tensor(leaf).isfinite().all():
            raise ValueError("it holds numbers that are not finite")
    return state


def save_whole(state, path):
    """torch.save, first beside `path`, under a name of its own, then renamed: so it is always
    a whole file, the old or the new one. Raises UserError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with using(path, "to save"):
            torch.save(state, beside)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def modified(path):
    """When a file was last written to; 0 if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


# These decide what is learned: a run goes on only where they are as they were.
LEARNING = (
    "seed steps batch_size max_lr ema label_drop schedule log_snr_scale log_snr_shift "
    "width after_injection modulate"
).split()

# These decide how samples are drawn. Both kinds are kept with the weights.
SAMPLING = "sample_schedule sample_steps eta guidance clip_x0".split()


def describe(settings, names):
    """What a file says of the run that made it: the settings that count, the class names."""
    made = {name: getattr(settings, name) for name in LEARNING + SAMPLING}
    return dict(made, names=names)


def check_same(made, asked):
    """Raises ValueError where `asked` says otherwise than `made`, both like describe's."""
    for name in LEARNING + ["names"]:
        if name in asked and asked[name] != made[name]:
            raise ValueError(
                f"its {name} is {made[name]}: use that, another --out, or --restart"
            )


def save_checkpoint(path, written, made, parts, rows):
    """Write all that a run needs to go on: the states of its `parts` and the log, whose last
    row tells the step. Order of pictures, times and noise follow from that and the seed.

    `written` is when this run last wrote or found it; returns when it did now. Raises UserError
    if another run has written it since.
    """
    if modified(path) != written:
        raise UserError(f"another run writes to {path}: give this one another --out")
    states = {name: part.state_dict() for name, part in parts.items()}
    save_whole(dict(states, made=made, rows=rows), path)
    return modified(path)


def resume(path, made, parts):
    """Put what save_checkpoint wrote back into the `parts`. Returns how many steps are done,
    and the rows of the log. Raises UserError if the file can't be used."""
    with using(path):
        state = load_file(path)
        check_same(state["made"], made)

        for name, part in parts.items():
            part.load_state_dict(state[name])

        # Of the optimiser's state its running averages count; the rest is as it was made.
        # Adam's fused kernel would write past averages that are too small.
        optimiser = parts["optimiser"]
        optimiser.param_groups[0].update(optimiser.defaults)
        for p in optimiser.param_groups[0]["params"]:
            averages = optimiser.state[p].items()
            shapes = [value.shape for name, value in averages if name != "step"]
            if shapes != [p.shape, p.shape]:
                raise ValueError("the optimiser's state does not fit")

        print(f"going on from {path}, which ends with")
        rows = list(state["rows"])
        show_row(rows[-1])
        step = int(rows[-1]["step"])
        if not 0 < step <= made["steps"]:
            raise ValueError("its step is out of range")
    return step, rows


def save_weights(path, made, net, val_loss):
    """Write what all modes but training need: the averaged weights, as fp16, and how they were
    `made`, as describe says it."""
    half = {name: value.half() for name, value in net.state_dict().items()}
    save_whole(dict(net=half, made=made, val_loss=val_loss), path)


def build_network(settings, classes):
    """The UNet of `settings` on the CPU, its weights drawn from their seed. Seeds torch's
    generator for that."""
    torch.manual_seed(settings.seed)
    modulate = settings.modulate == "on"
    return UNet(classes, settings.width, settings.after_injection, modulate)


def open_network(**given):
    """(averaged network in evaluation mode, class names, Settings): from the file that
    `weights` names, or from what training wrote into `out`.

    Of what is not `given`, LEARNING and SAMPLING come from the file, the rest are defaults.
    recipe="paper" samples as the paper does. Needs no data set. Raises UserError if there is
    no such file or it can't be used.
    """
    asked = choose_settings(**given)
    path = Path(asked.weights or f"{asked.out}/weights.pt").expanduser()
    if not path.is_file():
        raise UserError(f"no {path}: train first, or say where it is, with --out or --weights")
    device = set_up(asked)
    with using(path):
        state = load_file(path)
        made = state["made"]
        check_same(made, given)
        names = list(made.pop("names"))
        if asked.recipe == "paper":
            made.update(PAPER_SAMPLING)
        settings = Settings(**{**made, **given})
        net = build_network(settings, len(names)).to(device)
        net.load_state_dict(state["net"])
    return net.eval().requires_grad_(False), names, settings


# --------------------------------------------------------------------------------------
# 13. Signals and device
# --------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_requests():
    """Inside this, the first Ctrl-C or SIGTERM only leaves its number in the list given, so
    that a step can be finished and saved; a second one ends the program at once. Python lets
    only the main thread handle signals, so in another thread this does nothing."""
    received = []
    former = {}

    def take_note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, take_note)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def choose_precision(device, name="auto"):
    """The dtype of matrix products and convolutions: that of the name, or for "auto"
    bf16 where a GPU computes with it, as it has fp32's range and so needs no scaling of the
    loss; fp16 on an older one, such as a T4; fp32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def autocast(device, precision="auto"):
    """A context in which matrix products and convolutions are computed in the dtype that
    choose_precision gives. What lies between them keeps its input's; weights stay fp32."""
    dtype = choose_precision(device, precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_up(settings):
    """What each mode begins with: the device, a GPU (CUDA or Apple's) where there is one."""
    device = torch.device("cpu")
    if settings.device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or device
    print(f"torch {torch.__version__}, {device}, {choose_precision(device, settings.precision)}")

    # What is said to be fp32 is fp32: TF32 rounds more.
    torch.backends.cudnn.allow_tf32 = False

    # A precaution: with 64 tokens, as here, and a mask, which we don't have, cuDNN's
    # attention can give NaN gradients on an H100 (PyTorch issue 196678). In bf16 no
    # GradScaler would catch them.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def make_folder(settings):
    """The folder of a run, made if there is none. Raises OSError if files can't be written
    there: better now than after an hour."""
    path = Path(settings.out).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
    return path


def compile_network(net, how):
    """torch.compile `net` in place, so that its weights keep their names, if `how` (on, off,
    or auto: on CUDA) asks for it: at its first call, which takes a minute. Where no compiler
    works, one line says so, and the network runs uncompiled."""
    device = next(net.parameters()).device
    if how == "off" or (how == "auto" and device.type != "cuda"):
        return
    try:
        torch.compile(nn.SiLU())(torch.ones(8, device=device))
    except Exception as error:
        print(f"going on without torch.compile: {error!r:.150}")
        return

    # A step launches some 900 kernels, most of which are over before the next one is
    # launched. So on CUDA the launches of a call are recorded once, as a CUDA graph, and then
    # played back as a whole. What a call returns is overwritten by the next call; training,
    # validation and sampler have computed new tensors from it by then.
    net.compile(mode="reduce-overhead", dynamic=False)


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
COLOURS = "red orange yellow lime cyan blue magenta pink tan white".split()


def draw_shapes(count, seed):
    """Draw `count` pictures of 5 outlines, solid or hollow, in 10 colours: (x uint8
    (count,3,32,32), y (count,), 100 class names). The same seed draws the same pictures."""
    random = np.random.RandomState(seed)
    kinds = itertools.product(COLOURS, ("solid", "hollow"), OUTLINES)
    names = [" ".join(words) for words in kinds]
    y = random.randint(len(names), size=count)
    x = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        colour, fill, outline = names[y[i]].split()
        tips, inner = OUTLINES[outline]

        # Corners x + iy, in a square of 128 pixels; scaling down smooths the edges.
        size = random.uniform(40, 54)
        corners = size * np.exp(1j * np.pi * (np.arange(2 * tips) / tips - 0.5))
        corners[1::2] *= inner
        corners += complex(*random.uniform(size, 128 - size, 2))

        # The shape on a dark grey, its edge ten pixels wide.
        grey = "#202020"
        image = Image.new("RGB", (128, 128), grey)
        pen = ImageDraw.Draw(image)
        inside = colour if fill == "solid" else grey
        pen.polygon(corners.view(float).tolist(), inside, colour, width=10)
        x[i] = image.reduce(4)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), names


# --------------------------------------------------------------------------------------
# 15. Command line
# --------------------------------------------------------------------------------------


# Defaults for drawn shapes: a small network, minutes on a CPU. The linear schedule dwells on
# high noise, where shapes form.
SHAPES = dict(
    out="runs/diffusion-shapes",
    width=24,
    steps=1000,
    batch_size=32,
    max_lr=5e-3,
    ema=0.98,
    eval_every=100,
    grid_every=200,
    schedule="linear",
    log_snr_scale=1.0,
    log_snr_shift=0.0,
    sample_steps=30,
)

# What `--recipe paper` sets; a flag of the same command still wins. That it takes 100 steps is
# our choice: so much fresh noise needs more of them.
PAPER_SAMPLING = dict(sample_steps=100, eta=1.0, guidance=3.0, clip_x0="dynamic")
PAPER = dict(
    modulate="off",
    width=56,
    log_snr_scale=1.0,
    log_snr_shift=0.0,
    **PAPER_SAMPLING,
)


def choose_settings(**given):
    """Settings from those `given`. For the rest the first of these that has a value: the
    defaults for data="shapes", what recipe="paper" sets, the defaults. Raises UserError as
    Settings does."""
    paper = PAPER if given.get("recipe") == "paper" else {}
    shapes = SHAPES if given.get("data") == "shapes" else {}
    return Settings(**{**paper, **shapes, **given})


def check_value(field, value):
    """Raises UserError if a field of Settings may not have this value."""
    allowed = field.metadata["allowed"]
    fits = isinstance(value, (int, float) if field.type is float else field.type)
    if fits and allowed:
        low, *_, high = allowed
        fits = value in allowed if field.type is str else low <= value <= high
    if not fits:
        raise UserError(f"{field.name} is {value!r}, no {field.type.__name__} of {allowed}")


def parse(argv):
    """(mode, dict of the settings that `argv` gives). Where it is not valid, the process ends,
    with a line that says why."""
    parser = argparse.ArgumentParser(
        usage="python diffusion.py [mode] [--flag value ...]",
        description=(__doc__ or "").partition("\n\nA run")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # so -1e-1 is no flag
    parser.add_argument("mode", nargs="?", default="train")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action="store_true")
        help = f"{field.metadata['help']}; default {field.default!r}"
        parser.add_argument(flag, help=help, **kind)
    given = vars(parser.parse_args(argv))
    return given.pop("mode"), given


def run(argv):
    """What `python diffusion.py ARGV` does; returns the mode's result. Raises what the mode
    raises."""
    mode, given = parse(argv)
    if mode in ("train", "schedules"):
        settings = choose_settings(**given)
        if settings.weights:
            raise UserError("training begins anew or goes on with its own run: no --weights here")
        return train(settings) if mode == "train" else schedules_mode(settings)

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
    return modes[mode](net, names, settings)


def main():
    """`run`, with errors as one line and an exit status: the only place that ends the
    process."""
    # What a console can't show is replaced.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        run(sys.argv[1:])
    except (UserError, OSError, AssertionError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print(stopped)
        sys.exit(130)


if __name__ == "__main__":
    main()
