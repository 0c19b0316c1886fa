# SPDX-License-Identifier: MIT
"""CIFAR-100 classifier in under 100,000 parameters and at most 10,000 optimiser steps.

Section 1 of the paper "Modern Methods, Classical Constraints", in one file that reads from
the top:

    python classifier.py                  train on CIFAR-100 (downloaded if not in ./data)
    python classifier.py --data shapes    the same on drawn shapes: no download, no GPU
    python classifier.py eval             measure the trained network again
    python classifier.py predict FILE...  the likeliest classes of pictures of your own
    python classifier.py lr-find          learning-rate range test, 200 steps

A run writes into one folder, runs/classifier-<data set>; the same command again goes on where
it stopped, and --restart begins anew. The modes eval and predict read that run's weights.pt, or
--weights FILE.

Result of the first command, in five minutes on an H200: 69.12 % of the test pictures right, and
70.67 % from six views of each, shifted and mirrored. Crops were still black outside the picture
then. README.md has its log, .github/experiments.md what was tried.

The paper's network [1.2.1], as `--recipe paper` builds it: 98,804 parameters at our widths
(D = 80); the paper's has 99,546. We could not see its Figure 1.

    picture                                          (B,  3, 32, 32)
    depthwise-separable convolution, max-pool     -> (B, 40, 16, 16)
    depthwise-separable convolution, max-pool     -> (B, 80,  8,  8)
    depthwise-separable convolution, twice        -> (B, 80,  8,  8)
    8x8 places become 64 tokens, add positions    -> (B, 64, 80)
    one encoder layer, applied four times:        -> (B, 64, 80)
        x + attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))
    RMSNorm, mean over the tokens                 -> (B, 80)
    linear, linear                                -> (B, 100) logits

The default goes beyond it in four places, in 93,924 parameters; `--recipe paper` takes back all
four:

    stem        x + convolution(x) in the last two, and the second pooling after them,
                so that they see 16x16 places
    gate        3x3 filters over the 8x8 tokens in the gate of SwiGLU
    head        one linear layer, as two with nothing between are no more than one
    optimiser   Muon for matrices and filters, AdamW for gains and biases

Sections 1 to 6 are the story. To understand the model read 1 (layers and network), to
understand how it learns 2 (data), 3 (objective and optimisers) and 5 (training). What follows
the double line supports the story.

Shapes in comments: B pictures, C channels, H x W pixels, T tokens of width D.
Tags like [1.2.1] name a section of the paper: 1.1 The Discriminative Modelling Problem, 1.2
Methodology, 1.2.1 Model Architecture, 1.2.2 Discussion, 1.3 Results, 1.4 Limitations. `our
choice` marks what it leaves open. Numbers from 5 on are its references:

    [5]  RandAugment (2019)
    [6]  Language Modeling with Gated Convolutional Networks (2016)
    [7]  Universal Transformers (2018): tied layers
    [10] GELU, [26] Searching for Activation Functions (2017): SiLU
    [14] MobileNets (2017), [41] Learning Visual Representations at Scale (2014)
    [17] Batch Normalization (2015)
    [22] Decoupled Weight Decay Regularization (AdamW, 2017)
    [32] GLU Variants Improve Transformer (2020)
    [33] A disciplined approach to hyper-parameters (2018): the range test
    [34] Super-Convergence (2018): OneCycle
    [40] LLaMA (2023)
    [42] Attention Is All You Need (2017)
    [44] Root Mean Square Layer Normalization (2019)

Not the paper's: [M] Keller Jordan, "Muon: An optimizer for hidden layers in neural networks"
(2024).

For CIFAR-10, replace CIFAR100 by CIFAR10 in the line DATASET = ...: the rest follows from it.
"""
import argparse
import contextlib
import csv
import dataclasses
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as transform

DATASET = torchvision.datasets.CIFAR100
MAX_PARAMETERS = 100_000  # [1.1] fewer than this, asserted right above the training loop
MAX_STEPS = 10_000  # [1.1] gradient updates at most, asserted in the training loop


# --------------------------------------------------------------------------------------
# 1. Layers and network
# --------------------------------------------------------------------------------------


def depthwise_separable(c_in, c_out, filters_per_channel=1, strided=False, activation=nn.SiLU):
    """Depthwise-separable convolution [14, 41]: (B,c_in,H,W) -> (B,c_out,H,W).

    A 3x3 convolution costs 9 * c_in * c_out weights. Split in two, first 3x3 filters for each
    channel (space), then a 1x1 mixture of the channels (features), it costs
    9 * c_in * f + c_in * f * c_out, with f filters per channel: with one about an eighth, for
    80 channels. The first layer takes more than one, as three colours alone would leave the
    mixture too little to mix. The paper puts BatchNorm [17] and SiLU [10, 26] after "each
    convolutional layer" [1.2.1]: here after each half, as in MobileNets [14].

    `strided` is the paper's "4,2,1" [1.2.2] instead of max-pooling. We read it as kernel,
    stride and padding, and give it to the first half. Then the result is (B,c_out,H/2,W/2).
    """
    c_mid = c_in * filters_per_channel
    kernel, stride = (4, 2) if strided else (3, 1)

    # groups=c_in: each channel has filters of its own. No biases: BatchNorm would subtract
    # them again.
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, kernel, stride, padding=1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_mid),
        activation(),
        nn.Conv2d(c_mid, c_out, kernel_size=1, bias=False),
        nn.BatchNorm2d(c_out),
        activation(),
    )


class Residual(nn.Sequential):
    """x + layers(x), for layers that keep the shape: they learn a correction to x."""

    def forward(self, x):
        return x + super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention [42]: (B,T,D) -> (B,T,D). Four heads: our choice."""

    heads = 4

    def __init__(self, width, bias=False):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x):
        # Query, key and value come from one matrix, and each is cut into heads.
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B,T,3,4,D/4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3,B,4,T,D/4), so each (B,4,T,D/4)

        # softmax(q k^T / sqrt(D/4)) v: each token takes a weighted mean of all tokens.
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B,4,T,D/4)

        # The heads side by side again.
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B,T,D)


class GatedMLP(nn.Module):
    """out(act(gate(x)) * value(x)) [6]: (B,T,D) -> (B,T,D). With SiLU it is called SwiGLU
    [32].

    A `local` gate, which is ours, is act(filter(gate(x))): a 3x3 filter for each channel, over
    the square that the tokens come from. So a token's gate sees its eight neighbours too, for
    nine weights and a bias per hidden channel.
    """

    def __init__(self, width, hidden, activation=nn.SiLU, local=False):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        self.activation = activation()
        self.filter = None
        if local:
            self.filter = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x):
        gate = self.gate(x)  # (B,T,hidden)
        if self.filter is not None:
            # To channels of a picture and back. These are views and copy nothing: channels-last
            # memory stores a picture as its tokens, one after the other.
            side = math.isqrt(x.shape[1])
            square = gate.transpose(1, 2).unflatten(2, (side, side))  # (B,hidden,8,8)
            gate = self.filter(square).flatten(2).transpose(1, 2)  # (B,T,hidden)
        return self.out(self.activation(gate) * self.value(x))


class EncoderLayer(nn.Module):
    """A pre-norm transformer encoder layer: (B,T,D) -> (B,T,D).

    "llama" is the paper's [1.2.1]: RMSNorm [44], x / sqrt(mean(x²) + eps) * gain, and a gated
    MLP, without dropout; pre-norm and linear layers without biases are LLaMA's [40], hidden width
    2D is our choice. "gpt2" is our reading of what the paper compares with: LayerNorm, biases,
    and an MLP of width 4D without a gate, also without dropout. `local_gate` is GatedMLP's, and
    ours, so for "llama" alone.
    """

    def __init__(self, width, block="llama", activation=nn.SiLU, local_gate=False):
        super().__init__()
        norm = nn.RMSNorm if block == "llama" else nn.LayerNorm
        self.norm1 = norm(width)
        self.norm2 = norm(width)
        self.attention = Attention(width, bias=block == "gpt2")
        if block == "llama":
            self.mlp = GatedMLP(width, 2 * width, activation, local_gate)
        else:
            widen = nn.Linear(width, 4 * width)
            self.mlp = nn.Sequential(widen, activation(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def fourier_positions(side, width):
    """Sines and cosines [1.2.2, 42] of row and column, each at width/4 frequencies:
    (side²,width).

    Two axes are our choice, and so are wavelengths from 2 to 2 * side tokens: the shortest tells
    neighbours apart (its sine is 0 everywhere, and its cosine 1 and -1 in turn), the longest
    gives each place another value.
    """
    place = torch.arange(side)[:, None]  # (side,1)
    half_cycles = side ** -torch.linspace(0, 1, width // 4)  # (D/4,), per token: 1 to 1/side
    angle = place * math.pi * half_cycles  # (side,D/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side,D/2)

    # Token number row * side + column: the first half tells the row, the second the column.
    row = wave.repeat_interleave(side, dim=0)  # (side²,D/2)
    column = wave.repeat(side, 1)  # (side²,D/2)
    return torch.cat([row, column], dim=1)


class Classifier(nn.Module):
    """The classifier [1.2.1]: normalised pictures (B,3,32,32) -> logits (B,classes).

    The arguments are the paper's variants [1.2.2], and from `stem` on ours. With
    stem="plain", gate="plain" and head="pair" it is the paper's; this file's header shows
    both. Pictures of another size than 32x32 don't fit the positions. `width` must be a
    multiple of 4 (four heads; sine and cosine of two axes).
    """

    def __init__(
        self,
        classes=100,
        width=80,
        *,
        layers=4,
        tied="on",
        block="llama",
        activation="silu",
        positions="fourier",
        downsample="max-pool",
        stem="residual",
        gate="local",
        head="single",
    ):
        super().__init__()
        activation = dict(silu=nn.SiLU, gelu=nn.GELU, relu=nn.ReLU)[activation]

        # Our choice: four convolutions, their widths and kernels, and eight filters per colour.
        strided = downsample == "strided"
        pool = nn.Identity() if strided else nn.MaxPool2d(2)
        first = depthwise_separable(3, width // 2, 8, strided, activation)
        second = depthwise_separable(width // 2, width, 1, strided, activation)
        third = depthwise_separable(width, width, activation=activation)
        fourth = depthwise_separable(width, width, activation=activation)

        if stem == "plain":
            # Max-pooling "after the first two layers" [1.2.1].
            self.stem = nn.Sequential(first, pool, second, pool, third, fourth)
        else:
            # Ours: the last two are x + convolution(x), and come before the second pooling.
            # (With strided convolutions there is no pooling to move, so they see 8x8. A
            # Sequential unpacks into its layers.)
            third = Residual(*third)
            fourth = Residual(*fourth)
            self.stem = nn.Sequential(first, pool, second, third, fourth, pool)

        # Attention by itself does not see where a token is. Learned positions are weights,
        # which begin small (0.02: our choice). The others are constants, hence a buffer and
        # not in the checkpoint.
        side = 8
        if positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(side**2, width))
        else:
            table = torch.zeros(side**2, width)
            if positions == "fourier":
                table = fourier_positions(side, width)
            self.register_buffer("positions", table, persistent=False)

        # Tied weights [1.2.2, 7]: one layer, applied again and again. At width 80, with the
        # local gate, it has 65,760 weights; four layers of their own would need 263,040. Tying
        # is not free depth, though: all applications must make do with the same weights.
        self.layers = layers
        self.encoder = nn.ModuleList()
        distinct = min(layers, 1) if tied == "on" else layers
        for _ in range(distinct):
            self.encoder.append(EncoderLayer(width, block, activation, gate == "local"))

        # A norm at the end, as in LLaMA [40].
        self.norm = nn.RMSNorm(width) if block == "llama" else nn.LayerNorm(width)

        # "A pair of linear transformations" [1.2.1] with nothing between them; the width
        # between is our choice. Such a pair multiplies out to one matrix, so ours is one
        # layer. That saves 6,480 parameters; with them, the local gate would break the budget.
        self.head = nn.Linear(width, classes)
        if head == "pair":
            self.head = nn.Sequential(nn.Linear(width, width), self.head)

        # In this layout convolutions run fastest.
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.stem(x)  # (B,D,8,8)

        # Every place of the 8x8 becomes a token.
        x = x.flatten(2).transpose(1, 2)  # (B,64,D)
        x = x + self.positions  # in fp32 from here on, where bf16 is on

        for i in range(self.layers):
            # Tied weights: there is one layer, number 0, each time.
            x = self.encoder[i % len(self.encoder)](x)  # (B,64,D)

        # The mean over the tokens is our choice.
        x = self.norm(x).mean(dim=1)  # (B,D)
        return self.head(x)  # (B,classes)


def count_parameters(net):
    """How many numbers training can change. BatchNorm's running averages are measured, not
    trained, and constant positions don't change: they don't count."""
    return sum(p.numel() for p in net.parameters())


# --------------------------------------------------------------------------------------
# 2. Data
# --------------------------------------------------------------------------------------
# The whole data set lies on the device, 184 MB as bytes, and an epoch is augmented at once. So
# a batch is a slice, and there are no worker processes.


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
    with using(f"{DATASET.__name__} in {folder}", advice):
        for train in (True, False):
            part = DATASET(folder, train, download=missing)
            x = torch.from_numpy(part.data).permute(0, 3, 1, 2)
            parts += [x.contiguous(), torch.tensor(part.targets)]
    return *parts, part.classes


def held_out(y, per_class):
    """Mask (N,), bool, of the pictures to hold out: `per_class` of each class in the labels y
    (N,), always the same ones.

    A mask keeps both parts in the data's own order, in which the classes mix: so the first n
    pictures of either hold all classes.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        mask[order[y[order] == label][:per_class]] = True
    return mask


def load_data(source, holdout=0, device="cpu"):
    """(train_x, train_y, val_x, val_y, names) on the device, as load_cifar: of `source`, the
    folder of the data set, or of drawn shapes, if it is "shapes".

    Validation uses the test pictures. With `holdout` it uses that many training pictures instead,
    the same number of each class (rounded down, at least one). Raises UserError as load_cifar.
    """
    if source == "shapes":
        x, y, _ = draw_shapes(10_000, seed=1)
        val_x, val_y, names = draw_shapes(1_000, seed=2)
    else:
        x, y, val_x, val_y, names = load_cifar(source)

    if holdout > 0:
        mask = held_out(y, max(1, holdout // len(names)))
        val_x, val_y = x[mask], y[mask]
        x, y = x[~mask], y[~mask]
    return *[part.to(device) for part in (x, y, val_x, val_y)], names


OPERATIONS = (
    "identity shear-x shear-y translate-x translate-y rotate brightness colour contrast "
    "sharpness posterise solarise autocontrast equalise"
).split()


def apply_operation(x, name, magnitude, sign):
    """One of RandAugment's fourteen operations [5] on pictures uint8 (B,3,32,32).

    `magnitude` is 0 to 30; `sign`, 1 or -1, is the direction, where an operation has one. What
    each operation does at a magnitude is, but for rounding, as in torchvision's RandAugment: at
    30 a shear by 0.3, a shift by 150 of 331 pixels, 30 degrees, factors of 1.9 and 0.1, four bits.
    """
    share = sign * magnitude / 30
    shear = math.degrees(math.atan(0.3 * share))
    shift = int(150 / 331 * 32 * share)
    factor = 1 + 0.9 * share
    tilts = {"shear-x": [shear, 0.0], "shear-y": [0.0, shear]}
    moves = {"translate-x": [shift, 0], "translate-y": [0, shift]}
    tones = dict(
        brightness=transform.adjust_brightness,
        colour=transform.adjust_saturation,
        contrast=transform.adjust_contrast,
        sharpness=transform.adjust_sharpness,
    )
    if name in tilts:
        return transform.affine(x, 0.0, [0, 0], 1.0, tilts[name], center=[0, 0])
    if name in moves:
        return transform.affine(x, 0.0, moves[name], 1.0, [0.0, 0.0])
    if name in tones:
        return tones[name](x, factor)
    if name == "rotate":
        return transform.rotate(x, 30 * share)
    if name == "posterise":
        return transform.posterize(x, 8 - round(4 * magnitude / 30))
    if name == "solarise":
        return transform.solarize(x, 255 * (1 - magnitude / 30))
    if name == "autocontrast":
        return transform.autocontrast(x)
    if name == "equalise":
        return transform.equalize(x)
    return x  # identity


def crop_and_flip(x, top, left, flip):
    """Pictures uint8 (B,3,32,32), continued by four pixels on each side, cut back to their size
    from (top, left) on, 0 to 8, and mirrored if `flip`.

    They are continued by their own mirror image. Black borders would add edges that no test
    picture has, and the variance that BatchNorm measures would be partly theirs.
    """
    x = transform.pad(x, [4], padding_mode="reflect")
    x = x[:, :, top : top + 32, left : left + 32]
    return x.flip(-1) if flip else x


def change_parts(x, change, kinds, random):
    """Change pictures uint8 (N,3,H,W) in place, each by change(x, *kind), with one of the list
    `kinds`.

    The pictures are shuffled by `random`, a generator on the CPU, and cut into equal parts, and
    part number k is changed by kinds[k]. So each picture's kind is random, and there are as many
    calls as kinds, not as pictures.
    """
    order = torch.randperm(len(x), generator=random).to(x.device)
    for part, kind in zip(order.tensor_split(len(kinds)), kinds):
        x[part] = change(x[part], *kind)


def augment(x, random, operations=2, magnitude=6):
    """What training sees of pictures uint8 (N,3,32,32), a whole epoch: uint8, as before. x itself
    is changed.

    `operations` times RandAugment [1.2.2, 5]: one of fourteen operations, in one of two
    directions, at `magnitude`, 0 to 30. Then, our choice, a shift by up to four pixels, and
    a random half mirrored. All randomness comes from `random`, a generator on the CPU, so a
    seed means the same on every device.
    """
    # Two parts per kind, as a CPU is faster with smaller ones.
    kinds = 2 * list(itertools.product(OPERATIONS, [magnitude], (1, -1)))
    for _ in range(operations):
        change_parts(x, apply_operation, kinds, random)
    kinds = list(itertools.product(range(9), range(9), (False, True)))
    change_parts(x, crop_and_flip, kinds, random)
    return x


def seeded_generator(*numbers):
    """A generator of random numbers on the CPU that depends on these numbers alone.

    Order and augmentation of an epoch follow from the seed and the number of the epoch. So a
    run that was stopped can go on exactly as it would have, and its checkpoint need not say
    where any generator stood. SeedSequence makes seeds that have nothing in common from
    numbers as close as 1 and 2.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1).item()
    return torch.Generator().manual_seed(seed)


def channel_statistics(x):
    """Standard deviation and mean, in that order, of each channel, (2,1,3,1,1), of uint8
    pictures (N,3,H,W) scaled to [0,1]."""
    return torch.stack(torch.std_mean(x / 255, dim=(0, 2, 3), keepdim=True))


def normalise(x, statistics):
    """uint8 [0,255] -> fp32 of mean 0 and variance 1 in each channel (our choice): the one
    place where stored pictures become network input. `statistics` (2,1,3,1,1) are those of
    channel_statistics.

    (B,3,H,W), in channels-last memory. Raises AssertionError if x is not uint8: then it is
    in [0,1], or has been normalised already.
    """
    assert x.dtype == torch.uint8, "normalise wants uint8 in [0,255]"
    std, mean = statistics
    x = (x / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------
# 3. Objective and optimisers
# --------------------------------------------------------------------------------------
# The objective is cross-entropy with label smoothing [1.2.2]: with smoothing s and K classes
# the target is 1 - s + s/K for the true class and s/K for each of the rest, so the network is
# not pushed towards ever larger logits. It is one call in the training loop. What stands here
# are the optimisers.


def orthogonalise(x, rounds=5):
    """Approximately U V^T of each matrix x = U S V^T (its singular value decomposition) in a
    stack (N,rows,columns), rows <= columns: the same directions, all of nearly the same size.

    The Newton-Schulz iteration of Muon [M] needs matrix products alone. As x x^T = U S² U^T, an
    odd polynomial of x, such as x + (x x^T) x, changes S and leaves U and V. Each round maps every
    singular value s to 3.4445 s - 4.775 s³ + 2.0315 s⁵. Five rounds take any s from 0.0015 to 1
    to between 0.67 and 1.21; a smaller one stays smaller. ([M] chose the numbers to be steep at
    0, so that few rounds lift small values; the price is that they end near 1 and not at it.)
    """
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # sum of all s² is 1: none is above
    for _ in range(rounds):
        # x = 3.4445 x + (-4.775 gram + 2.0315 gram²) x; baddbmm scales, multiplies and adds
        # in one kernel.
        gram = x @ x.mT  # (N,rows,rows)
        change = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, change, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Muon [M], for weights with two axes or more; filters (out,in,height,width) are the
    matrix (out, in * height * width).

    Adam scales each number of a gradient by itself. Muon takes a matrix as a whole: it makes
    the running mean of the gradients orthogonal and moves the matrix against that, so that
    rare directions are learned as fast as frequent ones. Momentum, rounds and the scaling of
    the step are [M]'s; that depthwise filters and the last layer are matrices too is our choice.
    """

    def __init__(self, weights, lr=0.0, weight_decay=0.0):
        super().__init__(weights, dict(lr=lr, weight_decay=weight_decay))
        for p in weights:
            self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        """One update of all weights."""
        group = self.param_groups[0]
        weights = group["params"]
        gradients = [p.grad for p in weights]
        means = [self.state[p]["mean"] for p in weights]

        # mean = 0.95 mean + 0.05 gradient, and Nesterov's momentum: the mean as it would be if
        # this gradient came once more. (lerp(a, b, w) is a + w (b - a); with _foreach_, of all
        # tensors of two lists in one call.)
        torch._foreach_lerp_(means, gradients, 1 - 0.95)
        ahead = torch._foreach_lerp(gradients, means, 0.95)

        # All matrices are written into one stack of zeros, and read from it when it has been
        # made orthogonal: so a step takes as few calls as one matrix. The zeros around a matrix
        # leave its singular values as they are.
        shapes = [p.flatten(1).shape for p in weights]
        short = max(min(shape) for shape in shapes)
        long = max(max(shape) for shape in shapes)
        stack = weights[0].new_zeros(len(weights), short, long)
        torch._foreach_copy_(matrices(stack, weights), ahead)
        directions = matrices(orthogonalise(stack), weights)

        # Orthonormal columns give a tall matrix rows of length sqrt(columns / rows) on average.
        # This brings them to 1, so that each output changes as much as a square matrix's.
        scales = [math.sqrt(max(1, rows / columns)) for rows, columns in shapes]
        changes = torch._foreach_mul(directions, scales)

        # Decay the weights, then move them.
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, changes, alpha=-group["lr"])


def matrices(stack, weights):
    """For each of the weights the upper left corner of its layer of the stack (N,short,long), as
    a view in the weight's shape. A weight with more rows than columns lies there transposed."""
    views = []
    for matrix, p in zip(stack, weights):
        rows, columns = p.flatten(1).shape
        if rows > columns:
            matrix = matrix.T
        views.append(matrix[:rows, :columns].unflatten(1, p.shape[1:]))
    return views


def make_optimisers(net, weight_decay, name="muon"):
    """Two optimisers: Muon or, if `name` is "adamw", AdamW [1.2.2, 22] for what has two axes
    or more (matrices, filters, learned positions), AdamW for the rest.

    Weight decay, the paper's "L2 regularisation" [1.2.2], shrinks the weights themselves, as in
    [22]. (Adding it to the gradient would not be the same for Adam, which divides by the
    gradient's size.) Gains and biases do not decay: a gain sets a scale, which pulling it to 0
    would fight, and a bias adds no capacity to speak of (our choice). `fused` does all that AdamW
    updates in one kernel. Before each step both get the same rate, as numbers change by about
    the rate in either (our choice).
    """
    large = [p for p in net.parameters() if p.ndim > 1]
    small = [p for p in net.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(small, weight_decay=0.0, fused=True)
    if name == "muon":
        return Muon(large, weight_decay=weight_decay), adamw
    return torch.optim.AdamW(large, weight_decay=weight_decay, fused=True), adamw


def one_cycle(step, steps, peak):
    """(rate, beta) of update number `step` (from 0) by OneCycle [1.2.2, 34]: the rate goes up to
    the peak in 30 % of the steps, from 1/25 of it, and down to almost 0 in the rest, by half
    waves of a cosine, while AdamW's first beta goes the other way, from 0.95 to 0.85 and back.
    Muon's momentum stays. The paper gives none of these numbers; they are torch's defaults (our
    choice). This equals torch's OneCycleLR with total_steps = steps + 1, whose last rate no
    update would use."""
    top = 0.3 * (steps + 1) - 1
    if step < top:
        low = peak / 25
        share = 0.5 - 0.5 * math.cos(math.pi * step / top)
    else:
        low = peak / 250_000
        share = 0.5 + 0.5 * math.cos(math.pi * (step - top) / (steps - top))
    return low + (peak - low) * share, 0.95 - 0.1 * share


# --------------------------------------------------------------------------------------
# 4. Settings
# --------------------------------------------------------------------------------------


def setting(default, help, *allowed):
    """A field of Settings: its default, what --help says, and what is allowed: the least and the
    greatest number, or the words; without any, anything."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclasses.dataclass
class Settings:
    """All settings; each is a flag of the command line too, `batch_size` as --batch-size.
    Raises UserError for a value that its field does not allow.

    The paper's optimal values are "in the provided implementation" [1.2.2], which is not
    public. So all numbers but layers, batch and the limit of steps are our choice. Where runs
    decided one, they are in .github/experiments.md. `recipe` and data="shapes" change the
    defaults of other fields: see choose_settings, which alone does that.
    """

    # Where pictures come from and results go to
    data: str = setting("data", "folder of the data set, downloaded if none; or: shapes")
    out: str = setting(f"runs/classifier-{DATASET.__name__.lower()}", "folder to write to")
    holdout: int = setting(0, "training pictures to validate on; 0: the test set", 0, 49_000)
    weights: str = setting("", "file of weights to use; empty: weights.pt of the run")
    restart: bool = setting(False, "begin anew, over the run in the folder")

    # Where it runs, which changes how numbers are rounded, and how often it reports
    device: str = setting("auto", "auto: a GPU where there is one", "auto", "cpu")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", "auto", "on", "off")
    precision: str = setting("auto", "for matrices", "auto", "float32", "bfloat16", "float16")
    log_every: int = setting(50, "steps between lines of progress", 1, MAX_STEPS)
    eval_every: int = setting(500, "steps between validations; each saves", 1, MAX_STEPS)

    # How it is trained. The batch is the paper's, "as a proxy for increasing the number of
    # training epochs" [1.2.2]: here each picture is seen 205 times. The more often it comes back,
    # the more decay and augmentation it should meet: with 128 per step, one operation of
    # magnitude 2 is better.
    seed: int = setting(0, "decides weights, order, augmentation", 0, 2**31)
    steps: int = setting(MAX_STEPS, "optimiser steps", 1, MAX_STEPS)
    batch_size: int = setting(1024, "pictures per step", 1, 10_000)
    max_lr: float = setting(8e-3, "peak learning rate of OneCycle", 1e-8, 10.0)
    weight_decay: float = setting(0.2, "decoupled weight decay", 0.0, 10.0)
    label_smoothing: float = setting(0.1, "share of the target spread evenly", 0.0, 0.99)
    randaugment_ops: int = setting(2, "RandAugment operations per picture; 0: none", 0, 10)
    randaugment_magnitude: int = setting(6, "RandAugment magnitude", 0, 30)

    # What the paper varied [1.2.2]. Block, activation, layers, tied weights and max-pooling are
    # its choice; it leaves the positions open. "none" and the width are ours.
    block: str = setting("llama", "kind of encoder layer", "llama", "gpt2")
    activation: str = setting("silu", "function in all layers", "silu", "gelu", "relu")
    layers: int = setting(4, "how often the encoder layer is applied", 0, 6)
    tied: str = setting("on", "one encoder layer, each time", "on", "off")
    positions: str = setting("fourier", "position code of the tokens", "fourier", "learned", "none")
    downsample: str = setting("max-pool", "how to shrink", "max-pool", "strided")
    width: int = setting(0, "channels D; 0: as many as the budget allows", 0, 512)

    # Beyond the paper: with 128 pictures per step each gained 1.0 to 1.5 points of held-out
    # accuracy, but for the head, which makes room for the gate.
    stem: str = setting("residual", "x + f(x) in the last two convolutions", "residual", "plain")
    gate: str = setting("local", "3x3 filters in the gate of the MLP", "local", "plain")
    head: str = setting("single", "linear layers at the end", "single", "pair")
    optimiser: str = setting("muon", "optimiser of matrices and filters", "muon", "adamw")
    recipe: str = setting("ours", "paper: its network, AdamW", "ours", "paper")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if self.width % 4 != 0:
            raise UserError("--width is not a multiple of 4")


# --------------------------------------------------------------------------------------
# 5. Training
# --------------------------------------------------------------------------------------


def train(settings):
    """Train [1.2], or go on with a run that was stopped, then measure; returns the accuracy on
    the validation pictures, 0 to 1.

    Writes into settings.out. Raises UserError or OSError for settings, data, a folder or a
    checkpoint that can't be used, and if the loss is no longer finite; AssertionError if a
    budget is exceeded; KeyboardInterrupt after Ctrl-C or SIGTERM, when all is saved.
    """
    device = set_up(settings)
    out = make_folder(settings)
    data = load_data(settings.data, settings.holdout, device)
    train_x, train_y, val_x, val_y, names = data
    batches = len(train_y) // settings.batch_size  # per epoch; a last incomplete one is dropped
    if batches == 0:
        raise UserError("--batch-size is above the number of training pictures")
    statistics = channel_statistics(train_x)

    net = build_network(settings, len(names)).to(device)
    compile_network(net, settings.compile)
    optimisers = make_optimisers(net, settings.weight_decay, settings.optimiser)

    # fp16 can't hold small gradients, so the loss is scaled up before the backward pass and
    # the gradients down after it. In fp32 and bf16 the scaler does nothing.
    fp16 = choose_precision(device, settings.precision) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    # A run that was stopped goes on.
    path = out / "checkpoint.pt"
    written = modified(path)
    made = describe(settings, names)
    parts = dict(net=net, large=optimisers[0], small=optimisers[1], scaler=scaler)
    first = 0
    rows = []  # of the log
    if written and not settings.restart:
        first, rows = resume(path, made, parts)
    step = first

    # The parameter budget [1.1].
    count = count_parameters(net)
    stages = {name: count_parameters(stage) for name, stage in net.named_children()}
    print(f"{count:,} parameters: {stages}")
    assert count < MAX_PARAMETERS, "too many parameters"

    losses = []  # since the last row of the log
    clock = time.perf_counter()
    stopping = False
    with stop_requests() as stop:  # after Ctrl-C the step ends, and all is saved
        while step < settings.steps and not stopping:
            # The step budget [1.1].
            assert step < MAX_STEPS, "all optimiser steps are spent"

            # A new epoch: all training pictures in random order, augmented as bytes.
            epoch, batch = divmod(step, batches)
            if batch == 0 or step == first:
                random = seeded_generator(settings.seed, epoch)
                order = torch.randperm(len(train_y), generator=random).to(device)
                epoch_y = train_y[order]
                epoch_x = augment(
                    train_x[order],
                    random,
                    settings.randaugment_ops,
                    settings.randaugment_magnitude,
                )

            # The next pictures of it.
            start = batch * settings.batch_size
            x = normalise(epoch_x[start : start + settings.batch_size], statistics)
            y = epoch_y[start : start + settings.batch_size]  # (B,); x is (B,3,32,32)

            # Forward, in bf16 on a GPU that has it. train(), because validation leaves the
            # network in evaluation mode.
            net.train()
            with autocast(device, settings.precision):
                logits = net(x).float()  # (B,classes)

            # Loss: section 3.
            loss = F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)

            # The gradient, clipped [1.2.2] to norm 1 (our choice). Muon's step is of one size
            # whatever the gradient's; there clipping bounds how much one batch weighs in the
            # running mean. (The scaler's lines count in fp16.)
            net.zero_grad()
            scaler.scale(loss).backward()
            for optimiser in optimisers:
                scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)

            # One optimiser step. (One whose fp16 gradients overflowed changes nothing, and
            # lowers the scale.)
            rate, beta = one_cycle(step, settings.steps, settings.max_lr)
            for optimiser in optimisers:
                optimiser.param_groups[0].update(lr=rate, betas=(beta, 0.999))  # for AdamW
                scaler.step(optimiser)
            scaler.update()
            step += 1

            # That was the algorithm. It never copies a number from a GPU (but for fp16, where the
            # scaler asks whether Muon's gradients overflowed): a copy would wait until the GPU
            # has done all its work. So the rest happens only now and then.
            losses.append(loss.detach())
            stopping = len(stop) > 0
            validating = step % settings.eval_every == 0 or step == settings.steps
            if validating or stopping or step == 1 or step % settings.log_every == 0:
                row = new_row(step, settings, losses, rate, clock)
                if validating:
                    row.update(validate(net, data, statistics, settings.precision))
                show_row(row)
                rows.append(row)
                if validating or stopping:
                    written = save_checkpoint(path, written, made, parts, rows)
                    save_log(out, rows)
                if validating:
                    save_weights(out / "weights.pt", made, net, statistics, row["val_acc"])
                losses = []
                clock = time.perf_counter()

    if stopping:
        raise KeyboardInterrupt(
            "stopped, and all is saved: the same command goes on (without --restart)"
        )
    return report(net, data, statistics, settings)


# --------------------------------------------------------------------------------------
# 6. Evaluation
# --------------------------------------------------------------------------------------


def six_views(x):
    """A list of six versions of pictures x, each (B,3,32,32) again: as they are, shifted by
    one pixel down and right, shifted by one up and left, continued as in training; and the
    mirror image of each of these."""
    padded = transform.pad(x, [1], padding_mode="reflect")
    views = []
    for start in (1, 0, 2):
        shifted = padded[:, :, start : start + 32, start : start + 32]
        views += [shifted, shifted.flip(-1)]
    return views


def predict_logits(net, x, statistics, precision="auto", tta=False):
    """Logits (B,classes) of `net` for pictures x, uint8 (B,3,32,32); with `tta` their mean over
    six views of each picture; `statistics` as normalise takes them.

    That is test-time augmentation, which is ours. Max-pooling cuts every picture into the same
    2x2 squares, so shifting a picture by one pixel changes the answer; in the mean of such
    answers errors partly cancel.
    """
    views = six_views(x) if tta else [x]
    with autocast(x.device, precision):
        # The sum is a tensor of its own; what a compiled network returns, its next call may
        # overwrite.
        logits = sum(net(normalise(view, statistics)).float() for view in views)
    return logits / len(views)


@torch.no_grad()
def evaluate(net, x, y, statistics, precision="auto", tta=False):
    """(loss, accuracy, spread) of `net` on pictures x, uint8 (N,3,32,32), with labels y (N,):
    mean cross-entropy in nats, share of right answers (0 to 1), and its standard deviation over
    batches of 1,000 pictures (0 if there is one). Other arguments are predict_logits's. Leaves
    `net` in evaluation mode.

    The paper's ± (0.014 and 0.011) is of the size that batches of 1,024 give: sqrt(0.62 * 0.38 /
    1024) is 0.015.
    """
    net.eval()
    logits = []
    for some in x.split(250):  # on a CPU faster than more, and it takes less memory
        logits.append(predict_logits(net, some, statistics, precision, tta))
    logits = torch.cat(logits)  # (N,classes)
    hits = (logits.argmax(dim=1) == y).float()
    spread = torch.stack([part.mean() for part in hits.split(1000)]).std(correction=0)
    return F.cross_entropy(logits, y).item(), hits.mean().item(), spread.item()


def validate(net, data, statistics, precision):
    """For one row of the log: accuracy (0 to 1) on the validation pictures and on as many training
    pictures, the curves of the paper's Figure 2, and the validation loss (nats)."""
    train_x, train_y, val_x, val_y, _ = data
    count = len(val_y)
    _, train_acc, _ = evaluate(net, train_x[:count], train_y[:count], statistics, precision)
    val_loss, val_acc, _ = evaluate(net, val_x, val_y, statistics, precision)
    return dict(train_acc=train_acc, val_acc=val_acc, val_loss=val_loss)


def report(net, data, statistics, settings):
    """Print the result as the paper's line does [1.3], and return the accuracy on the
    validation pictures.

    The paper's train loss (1.931) is above its val loss (1.419) though its train accuracy is
    the higher one, so they were hardly measured alike; perhaps the former was taken while
    training, with smoothing and augmentation. Here both are plain cross-entropy on pictures
    left as they are.
    """
    train_x, train_y, val_x, val_y, _ = data
    options = statistics, settings.precision
    print("measuring", flush=True)
    val_loss, val_acc, val_spread = evaluate(net, val_x, val_y, *options)
    _, six, _ = evaluate(net, val_x, val_y, *options, tta=True)
    loss, acc, spread = evaluate(net, train_x, train_y, *options)
    print(
        f"train loss: {loss:.3f}, val loss: {val_loss:.3f}, train acc: {acc:.3f}±{spread:.3f}, "
        f"val acc: {val_acc:.4f}±{val_spread:.3f} (± over batches, not seeds); from six views of "
        f"each picture, not the paper's: {six:.4f}"
    )
    return val_acc


def eval_mode(net, names, statistics, settings):
    """Measure a trained network again. If it was validated on a hold-out, --holdout 0 measures it
    on the test set. Returns its accuracy."""
    data = load_data(settings.data, settings.holdout, statistics.device)
    if data[-1] != names:
        raise UserError("--data: the network was made for other classes")
    return report(net, data, statistics, settings)


def open_picture(path):
    """A picture file as the network sees pictures: the largest square in its middle, in
    colour, on white where it is transparent, shrunk to uint8 (1,3,32,32). Raises UserError
    if it can't be read."""
    with using(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGBA")
        picture = Image.new("RGBA", upright.size, "white")
        picture.alpha_composite(upright)
        small = ImageOps.fit(picture.convert("RGB"), (32, 32))
        return transform.pil_to_tensor(small)[None]


@torch.no_grad()
def predict_mode(net, names, statistics, settings, paths):
    """Print the five likeliest classes of each picture file, or of those in a folder, with
    their probabilities, from six views of it. The network knows its own classes only, and no
    "none of these". Raises UserError at the end if a file could not be read."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    failed = False
    for path in files:
        try:
            x = open_picture(path).to(statistics.device)
        except UserError as error:
            print(error)
            failed = True
            continue
        logits = predict_logits(net, x, statistics, settings.precision, tta=True)
        shares, numbers = logits[0].softmax(dim=0).topk(5)
        found = [f"{names[i]} {share:.1%}" for i, share in zip(numbers, shares.tolist())]
        print(f"{path}:", ", ".join(found))
    if failed:
        raise UserError("not all files could be read")


# ======================================================================================
# The story ends here. What follows supports it, and can wait for a second reading.
# ======================================================================================


# --------------------------------------------------------------------------------------
# 7. Range test
# --------------------------------------------------------------------------------------


def lr_find_mode(settings):
    """Range test [1.2.2, 33]: raise the rate, exponentially (our choice), from 1e-5 to 1, over
    settings.steps but at most 200 steps, watch the loss, draw it, and propose a peak for
    OneCycle. Returns that rate. Touches no checkpoint. Raises as train does, but goes on where the
    loss is not finite."""
    device = set_up(settings)
    out = make_folder(settings)
    train_x, train_y, _, _, names = load_data(settings.data, settings.holdout, device)
    statistics = channel_statistics(train_x)
    net = build_network(settings, len(names)).to(device)
    optimisers = make_optimisers(net, settings.weight_decay, settings.optimiser)
    random = seeded_generator(settings.seed)
    epoch_x = train_x.clone()
    augment(epoch_x, random, settings.randaugment_ops, settings.randaugment_magnitude)
    powers = np.linspace(-5, 0, min(settings.steps, 200)).tolist()  # log10 of the rate
    curve = [math.log(len(names))]  # the loss of a network that knows nothing

    for power in powers:
        # The update of train, but in fp32, with one beta, and on pictures drawn from one
        # augmented epoch.
        chosen = torch.randint(len(train_y), (settings.batch_size,), generator=random).to(device)
        logits = net(normalise(epoch_x[chosen], statistics))
        loss = F.cross_entropy(logits, train_y[chosen], label_smoothing=settings.label_smoothing)
        net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), max_norm=1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0].update(lr=10**power)
            optimiser.step()

        # A running mean
        curve.append(0.9 * curve[-1] + 0.1 * loss.item())
        print(f"rate {10**power:.1e}  loss {curve[-1]:.4f}", flush=True)

    # OneCycle stays near its peak for long, so keep clear of the rate at which the loss turns
    # up: a third of it (our choice). What is above the first loss is not drawn.
    curve = curve[1:]
    peak = 10 ** powers[np.nanargmin(curve)] / 3
    shown = np.fmin(curve, curve[0]).tolist()
    plot(out / "lr_find.png", dict(power=powers, loss=shown))
    print(f"proposed: --max-lr {peak:.1e}, a third of the rate of least loss")
    return peak


# --------------------------------------------------------------------------------------
# 8. Log and plots
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
    """log.csv, and curve.png, the paper's Figure 2, whole each time. Where they can't be
    written (a spreadsheet may hold the table), one line says so, and training goes on."""
    try:
        validated = [row for row in rows if "val_acc" in row]
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, max(rows, key=len))
            writer.writeheader()
            writer.writerows(rows)
        if validated:
            names = ("step", "train_acc", "val_acc")
            plot(out / "curve.png", {name: [row[name] for row in validated] for name in names})
    except Exception as error:
        print(f"going on without log.csv or curve.png: {error}")


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


# --------------------------------------------------------------------------------------
# 9. Checkpoint and weights
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
    "holdout seed steps batch_size max_lr weight_decay label_smoothing randaugment_ops "
    "randaugment_magnitude block activation layers tied positions downsample width stem gate "
    "head optimiser"
).split()


def describe(settings, names):
    """What a file says of the run that made it: the settings that count, the class names."""
    made = {name: getattr(settings, name) for name in LEARNING}
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
    row tells the step. Order and augmentation of the pictures follow from that and the seed.

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

        # Of an optimiser's state its running averages count; the rest is as it was made.
        # AdamW's fused kernel would write past averages that are too small.
        for optimiser in (parts["large"], parts["small"]):
            optimiser.param_groups[0].update(optimiser.defaults)
            count = 2 if "betas" in optimiser.defaults else 1  # Muon has one
            for p in optimiser.param_groups[0]["params"]:
                averages = optimiser.state[p].items()
                shapes = [value.shape for name, value in averages if name != "step"]
                if shapes != [p.shape] * count:
                    raise ValueError("the optimiser's state does not fit")

        print(f"going on from {path}, which ends with")
        rows = list(state["rows"])
        show_row(rows[-1])
        step = int(rows[-1]["step"])
        if not 0 < step <= made["steps"]:
            raise ValueError("its step is out of range")
    return step, rows


def save_weights(path, made, net, statistics, val_acc):
    """Write what all modes but training need: the network, the statistics of its pictures,
    and how it was `made`, as describe says it."""
    state = dict(net=net.state_dict(), statistics=statistics, made=made, val_acc=val_acc)
    save_whole(state, path)


def build_network(settings, classes):
    """The Classifier of `settings` on the CPU, its weights drawn from their seed, at the given
    width, or else at the largest that the budget allows, in steps of 8. Seeds torch's generator
    for that."""
    names = "layers tied block activation positions downsample stem gate head".split()
    variant = {name: getattr(settings, name) for name in names}
    width = settings.width or widest_that_fits(classes, variant)
    torch.manual_seed(settings.seed)
    return Classifier(classes, width, **variant)


def widest_that_fits(classes, variant):
    """The largest width, a multiple of 8, at which the Classifier of `variant`, a dict of its
    arguments, is within the parameter budget."""
    width = 8
    with torch.device("meta"):  # there a network has shapes but no memory
        while count_parameters(Classifier(classes, width + 8, **variant)) < MAX_PARAMETERS:
            width += 8
    return width


def open_network(**given):
    """(network in evaluation mode, class names, statistics as normalise takes them, Settings):
    from the file that `weights` names, or from what training wrote into `out`.

    Of what is not `given`, LEARNING comes from the file, the rest are defaults. Needs no data set.
    Raises UserError if there is no such file or it can't be used.
    """
    asked = choose_settings(**given)
    path = Path(asked.weights or f"{asked.out}/weights.pt").expanduser()
    if not path.is_file():
        raise UserError(f"no {path}: train first, or say where it is, with --out or --weights")
    device = set_up(asked)
    with using(path):
        state = load_file(path)
        made = state["made"]
        check_same(made, {**given, "holdout": made["holdout"]})
        names = list(made.pop("names"))
        settings = Settings(**{**made, **given})
        net = build_network(settings, len(names)).to(device)
        net.load_state_dict(state["net"])
        statistics = state["statistics"].view(2, 1, 3, 1, 1).to(device)
    return net.eval().requires_grad_(False), names, statistics, settings


# --------------------------------------------------------------------------------------
# 10. Signals and device
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

    # A step launches hundreds of kernels, most of which are over before the next one is
    # launched. So on CUDA the launches of a call are recorded once, as a CUDA graph, and then
    # played back as a whole. What a call returns is overwritten by the next call; by then
    # the loss, or the sum over views, has been computed from it.
    net.compile(mode="reduce-overhead", dynamic=False)


# --------------------------------------------------------------------------------------
# 11. Drawn shapes
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
# 12. Command line
# --------------------------------------------------------------------------------------


# Defaults for drawn shapes, which are learned in minutes, on a CPU too.
SHAPES = dict(
    out="runs/classifier-shapes",
    steps=250,
    batch_size=128,
    eval_every=25,
    weight_decay=0.05,
    randaugment_ops=1,
    randaugment_magnitude=2,
)

# What `--recipe paper` sets; a flag of the same command still wins. Crop and mirror, of which
# the paper says nothing, stay.
PAPER = dict(stem="plain", gate="plain", head="pair", optimiser="adamw")


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
    """(words that are no flags, dict of the settings that `argv` gives). Where it is not
    valid, the process ends, with a line that says why."""
    parser = argparse.ArgumentParser(
        usage="python classifier.py [mode] [--flag value ...]",
        description=(__doc__ or "").partition("\n\nA run")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # so -1e-1 is no flag
    parser.add_argument("words", nargs="*")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action="store_true")
        help = f"{field.metadata['help']}; default {field.default!r}"
        parser.add_argument(flag, help=help, **kind)
    given = vars(parser.parse_intermixed_args(argv))
    return given.pop("words", []), given


def run(argv):
    """What `python classifier.py ARGV` does; returns the mode's result. Raises what the mode
    raises."""
    words, given = parse(argv)
    mode, *files = words or ["train"]
    if mode not in ("train", "eval", "predict", "lr-find"):
        raise UserError(f"no mode {mode}, only train, eval, predict FILE..., lr-find")
    if (mode == "predict") != bool(files):
        raise UserError("predict, and no other mode, wants picture files after it")
    if mode in ("train", "lr-find"):
        settings = choose_settings(**given)
        if settings.weights:
            raise UserError("training begins anew or goes on with its own run: no --weights here")
        return train(settings) if mode == "train" else lr_find_mode(settings)
    opened = open_network(**given)
    return eval_mode(*opened) if mode == "eval" else predict_mode(*opened, files)


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
