# SPDX-License-Identifier: MIT
"""CIFAR-100 classifier in under 100,000 parameters and at most 10,000 optimiser steps.

Section 1 of the paper "Modern Methods, Classical Constraints", in one file to read from the top:

    python classifier.py                     train on CIFAR-100 (downloaded if not in ./data)
    python classifier.py --data shapes       the same on drawn shapes: no download, no GPU needed
    python classifier.py eval                measure the trained network again, and on the test set
    python classifier.py lr-find             learning-rate range test (reference 33 of the paper)

A run writes one folder, runs/classifier-<data set>: checkpoint.pt, log.csv, curve.png (the paper's
Figure 2) and predictions.png. Start the same command again and it goes on where it stopped.
Results, each with its command, device, seed and date, stand in README.md.

The paper's Figure 1 with our widths (D = 80, 98,804 parameters; "x + depthwise" is ours):

    picture                                          (B,  3, 32, 32)
    depthwise-separable convolution, max-pool     -> (B, 40, 16, 16)
    depthwise-separable convolution, max-pool     -> (B, 80,  8,  8)
    x + depthwise-separable convolution, twice    -> (B, 80,  8,  8)
    8x8 places become 64 tokens, add positions    -> (B, 64, 80)
    one encoder layer, applied four times:        -> (B, 64, 80)
        x + attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))
    RMSNorm, mean over the tokens                 -> (B, 80)
    linear, linear                                -> (B, 100) logits

Shapes in comments: B pictures, C channels, H x W pixels, T tokens of width D.
Tags like [1.2.1] name the paper's section; `our choice` marks what the paper leaves open.
References, numbered as in the paper: [5] RandAugment, [17] BatchNorm, [22] AdamW, [31, 41]
depthwise-separable convolution, [32] gated MLPs, [33] range test, [34] OneCycle, [42] attention,
[44] RMSNorm. Each function says what it takes; layers and `augment` copy alone.

For CIFAR-10, write CIFAR10 for CIFAR100 in load_cifar: class count and names come from the data.
"""
import argparse, collections, copy, dataclasses, datetime, math, os, shlex, signal, sys, time, zlib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import torch, torchvision, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms import v2

MAX_PARAMETERS = 100_000   # [1.1] fewer than this, asserted where the network is built
MAX_STEPS = 10_000         # [1.1] gradient updates at most, asserted before every update


# ----------------------------------------------------------------------------------------------
# 1. Settings
# ----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    """A field is a command-line flag: type, what --help says, smallest and largest value, default.

    The defaults are the paper's design but for `stem`. Its optimal values are "in the provided
    implementation" [1.2.2], which is not public, so all numbers but batch size, steps and layers
    are our choice.
    """
    data: Annotated[str, "folder of CIFAR-100 (downloaded if none), or shapes: see SHAPES"] = "data"
    out: Annotated[str, "folder to write to; empty: runs/classifier-<data set>"] = ""
    holdout: Annotated[int, "training pictures kept for validation; 0: test set", 0, 25_000] = 0
    seed: Annotated[int, "decides weights, data order and augmentation", 0, 2**31] = 0
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], "where to compute"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile; auto: on CUDA only"] = "auto"
    log_every: Annotated[int, "steps between lines of progress", 1, MAX_STEPS] = 50
    eval_every: Annotated[int, "steps between validations, each with a save", 1, MAX_STEPS] = 500
    steps: Annotated[int, "optimiser steps", 1, MAX_STEPS] = MAX_STEPS
    batch_size: Annotated[int, "pictures a step", 1, 65_536] = 1024
    max_lr: Annotated[float, "peak learning rate of OneCycle", 1e-8, 10.0] = 8e-3
    weight_decay: Annotated[float, "L2 on matrices and filters", 0.0, 10.0] = 0.05
    label_smoothing: Annotated[float, "share of the target spread evenly", 0.0, 0.99] = 0.1
    clip: Annotated[float, "largest norm of the gradient", 1e-6, 1e6] = 1.0
    # Light, as small networks underfit under heavy augmentation: 1 operation at magnitude 2 of 30
    # cost the prototype next to nothing (held-out accuracy after 400 steps 24.4 %, 24.7 % without).
    randaugment_ops: Annotated[int, "RandAugment operations a picture; 0: none", 0, 10] = 1
    randaugment_magnitude: Annotated[int, "RandAugment strength", 0, 30] = 2
    # What the paper varied [1.2.2]; by default what it ended with, or what works for us.
    block: Annotated[Literal["llama", "gpt2"], "kind of encoder layer"] = "llama"
    activation: Annotated[Literal["silu", "gelu", "relu"], "in convolutions and MLPs"] = "silu"
    layers: Annotated[int, "how often the encoder is applied", 0, 6] = 4
    weights: Annotated[Literal["tied", "untied"], "of the encoder layers"] = "tied"
    positions: Annotated[Literal["fourier", "learned", "none"], "added to tokens"] = "fourier"
    downsample: Annotated[Literal["max-pool", "strided"], "how pictures shrink"] = "max-pool"
    width: Annotated[int, "channels D; 0: as many as the budget allows", 0, 4096] = 0
    # Beyond the paper, on because figures decided: x + f(x) in the last two convolutions reached
    # 31.7 % of 5,000 held-out pictures, f(x) alone 26.5 % (600 steps of 128, seed 0).
    stem: Annotated[Literal["residual", "plain"], "the convolutions that keep size"] = "residual"
    recipe: Annotated[Literal["ours", "paper"], "paper: nothing that goes beyond it"] = "ours"


# These don't shape the result, so they may change when a run goes on. (The pictures themselves
# are compared by checksum, wherever they lie.)
FREE_TO_CHANGE = ("data", "out", "device", "compile", "log_every", "eval_every", "recipe")

# The drawn shapes are learnt in minutes, on a CPU too: defaults in their case.
SHAPES = dict(steps=250, batch_size=128, eval_every=125)

# What `--recipe paper` gives back; a flag of the same command still wins.
PAPER = dict(stem="plain")


# ----------------------------------------------------------------------------------------------
# 2. Data
# ----------------------------------------------------------------------------------------------
# The whole data set lies on the device: pictures x uint8 (N,3,32,32) in [0,255], labels y (N,).
# `val` is the test set, or the hold-out if there is one; names are the class names; the checksum
# is of the training part.

Data = collections.namedtuple("Data", "train_x train_y val_x val_y test_x test_y names checksum")


def load_cifar(root):
    """CIFAR-100 from the folder `root`: (train_x, train_y, test_x, test_y, names).

    Downloads it if there is none. What is there is verified by its md5 and never overwritten.
    Raises SystemExit with one message if it is damaged or can't be had.
    """
    cifar, root = torchvision.datasets.CIFAR100, Path(root)
    archive, sound = root / cifar.filename, torchvision.datasets.utils.check_integrity
    try:
        assert not archive.exists() or sound(archive, cifar.tgz_md5), f"{archive} is damaged"
        fetch = not (root / cifar.base_folder).exists()      # from the archive, if that is there
        parts = cifar(root, train=True, download=fetch), cifar(root, train=False)
    except Exception as error:     # no net, host down, disk full: whatever it was, say what helps
        sys.exit(f"error: no CIFAR-100 in {root.resolve()}: {error}\n  Delete what is damaged, "
                 f"and get {cifar.url}\n  into it (169,001,437 bytes, md5 {cifar.tgz_md5}); "
                 "or use no download at all: --data shapes")
    x, test_x = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts)
    y, test_y = (torch.tensor(part.targets) for part in parts)
    return x, y, test_x, test_y, parts[0].classes


def draw_shapes(count, seed):
    """Draw `count` pictures of 10 shapes x 10 colours: x uint8 (count,3,32,32), y, class names.

    A shape is where f(u, v) < 0; u points right, v up, and the shape fits into [-1,1]. Outside f
    grows like the distance, so f * size is in pixels and a clamp to one pixel smooths the edge.
    The same seed draws the same pictures.
    """
    colours = "red orange yellow lime cyan blue magenta pink tan white".split()
    box = lambda u, v: u.abs().maximum(v.abs())                  # a distance with square corners
    shapes = dict(
        circle=lambda u, v: u.hypot(v) - 1, ring=lambda u, v: (u.hypot(v) - 0.75).abs() - 0.22,
        square=lambda u, v: box(u, v) - 0.85, frame=lambda u, v: (box(u, v) - 0.7).abs() - 0.2,
        triangle=lambda u, v: (-v - 0.65).maximum(u.abs() * 0.87 + v * 0.5 - 0.5),
        diamond=lambda u, v: (u.abs() + v.abs() - 1) * 0.7,
        plus=lambda u, v: (u.abs().minimum(v.abs()) - 0.28).maximum(box(u, v) - 1),
        cross=lambda u, v: ((u.abs() - v.abs()).abs() - 0.4).maximum(box(u, v) - 0.9),
        star=lambda u, v: u.hypot(v) - 0.68 - 0.34 * (5 * torch.atan2(u, v)).cos(),
        moon=lambda u, v: (u.hypot(v) - 1).maximum(0.8 - (u - 0.5).hypot(v)))
    draw = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *size: low + (high - low) * torch.rand(*size, generator=draw)
    y = torch.randint(len(shapes) * len(colours), (count,), generator=draw)
    size = uniform(11, 14, count, 1, 1)                                         # half, in pixels
    middle = 15.5 + uniform(-1, 1, 2, count, 1, 1) * (15.5 - size)             # wholly inside
    u = (torch.arange(32.0) - middle[0]) / size                                # (count,1,32)
    v = (middle[1] - torch.arange(32.0)[:, None]) / size                       # (count,32,1)
    cover = torch.empty(count, 1, 32, 32)                   # share of a pixel that the shape fills
    for i, f in enumerate(shapes.values()):
        of = y // len(colours) == i
        cover[of, 0] = (0.5 - f(u[of], v[of]) * size[of]).clamp(0, 1)
    paint = torch.tensor([ImageColor.getrgb(name) for name in colours])[y % len(colours)].float()
    x = uniform(10, 50, count, 1, 1, 1).lerp(paint[:, :, None, None], cover).byte()    # on grey
    return x, y, [f"{colour} {shape}" for shape in shapes for colour in colours]


def load_data(source, holdout=0, device="cpu"):
    """`source`, "shapes" or the folder of CIFAR-100, as a `Data` on `device`.

    `holdout` training pictures, always the same, as many of each class, become the validation part
    instead of the test set. Raises SystemExit if that many don't divide evenly among the classes.
    """
    x, y, *test, names = load_cifar(source) if source != "shapes" else (
        *draw_shapes(20_000, seed=1)[:2], *draw_shapes(2_000, seed=2))
    checksum, val, share = zlib.crc32(x.numpy()), test, holdout // len(names)
    if holdout % len(names): sys.exit(f"error: --holdout {holdout}: not {len(names)} equal shares")
    if holdout:
        # A random order, sorted by class without losing it: each class's first few are held out. A
        # mask picks them, so that both parts keep the data's own order, in which classes mix.
        mixed = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        groups = mixed[y[mixed].argsort(stable=True)].split(y.bincount().tolist())
        held = torch.isin(torch.arange(len(y)), torch.cat([g[:share] for g in groups]))
        val, x, y = (x[held], y[held]), x[~held], y[~held]
    return Data(*(part.to(device) for part in (x, y, *val, *test)), names, checksum)


def augment(x, operations=1, magnitude=2, group=16, pad=4):
    """RandAugment [1.2.2, 5], then random crop and flip (our choice): uint8 (B,3,H,W), as before.

    Draws from torch's CPU generator alone, so a seed means the same on every device. RandAugment
    chooses its operations on the host; picture by picture that costs more than a training step. So
    `group` neighbours share a draw: 64 draws for 1,024 pictures. Batches are in random order, hence
    groups are new each time: one gradient sees less variety, training as a whole the same.
    """
    if operations:
        x = torch.cat([v2.RandAugment(operations, magnitude)(some) for some in x.split(group)])
    # Pad with black, then cut a window at a random place, which for all pictures at once is one
    # gather on pixel numbers. A flip (half the pictures) reads the window's columns backwards.
    (height, width), (top, left) = x.shape[2:], torch.randint(2 * pad + 1, (2, len(x), 1))
    columns = torch.arange(width)
    columns = left + torch.where(torch.rand(len(x), 1) < 0.5, columns.flip(0), columns)  # (B,W)
    rows = (top + torch.arange(height)) * (width + 2 * pad)                              # (B,H)
    rows, columns = (part.to(x.device, non_blocking=True) for part in (rows, columns))
    pixel = (rows[:, :, None] + columns[:, None]).flatten(1)                             # (B,H*W)
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)                # (B,3,(H+2pad)*(W+2pad))
    return padded.gather(2, pixel[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def channel_statistics(x):
    """dict(mean=, std=) a channel, both (3,1,1), of uint8 pictures scaled to [0,1]."""
    # A channel at a time: the whole training set as fp32 would take 600 MB.
    std, mean = zip(*(torch.std_mean(x[:, i].float() / 255) for i in range(x.shape[1])))
    return dict(mean=torch.stack(mean)[:, None, None], std=torch.stack(std)[:, None, None])


def normalise(x, mean, std):
    """The one border between storage and network: uint8 [0,255] -> fp32, mean 0 and variance 1.

    (B,3,H,W) in channels-last memory, the layout in which convolutions run fastest. Raises
    AssertionError if x is not uint8: then it is in [0,1], or has been normalised already.
    """
    assert x.dtype == torch.uint8, f"normalise wants uint8 pictures in [0,255], not {x.dtype}"
    return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------
# 3. Layers
# ----------------------------------------------------------------------------------------------

def depthwise_separable(c_in, c_out, filters=1, strided=False, activation=nn.SiLU):
    """Depthwise-separable convolution [31, 41]: (B,c_in,H,W) -> (B,c_out,H,W); strided: H/2, W/2.

    A 3x3 convolution costs 9 * c_in * c_out weights. Split in two, first 3x3 filters a channel
    (space), then a 1x1 mixture of channels (features), it costs 9 * c_in + c_in * c_out: about
    eight times less. BatchNorm [17] and activation follow each half, as in MobileNet (our choice).
    `filters` a channel: three colours alone would leave the mixture too little to mix. `strided`
    is the paper's "4,2,1" [1.2.2]: kernel, stride, padding, instead of max-pooling.
    """
    kernel, stride, c_mid = (4, 2, c_in * filters) if strided else (3, 1, c_in * filters)
    return nn.Sequential(       # no biases: BatchNorm would subtract them again
        nn.Conv2d(c_in, c_mid, kernel, stride, 1, groups=c_in, bias=False), nn.BatchNorm2d(c_mid),
        activation(), nn.Conv2d(c_mid, c_out, 1, bias=False), nn.BatchNorm2d(c_out), activation())


class Residual(nn.Sequential):
    """x + layers(x), for layers that keep the shape: they learn what to change, not all anew."""

    def forward(self, x):
        return x + super().forward(x)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) * gain over the last axis [44]: LayerNorm without mean and bias."""

    def forward(self, x):
        # Under autocast x is bf16 and the gain fp32, and torch would leave its fused kernel.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention [42]: (B,T,D) -> (B,T,D). 4 heads: our choice."""

    def __init__(self, width, heads=4, bias=False):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                   # (B,heads,T,D/heads)
        return self.out(x.transpose(1, 2).flatten(2))                 # heads side by side: (B,T,D)


class GatedMLP(nn.Module):
    """out(act(gate(x)) * value(x)): (B,T,D) -> (B,T,D). With SiLU it is called SwiGLU [32]."""

    def __init__(self, width, hidden, activation=nn.SiLU):
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.out, self.activation = nn.Linear(hidden, width, False), activation()

    def forward(self, x):
        return self.out(self.activation(self.gate(x)) * self.value(x))


class EncoderLayer(nn.Module):
    """A transformer encoder layer, each half normalised before it: (B,T,D) -> (B,T,D).

    "llama" is the paper's [1.2.1]: RMSNorm, gated MLP, no biases; hidden width 2D is our choice.
    "gpt2" is the one it compared: LayerNorm, plain MLP 4D wide, biases. Neither has dropout.
    """

    def __init__(self, width, block="llama", activation=nn.SiLU):
        super().__init__()
        norm = RMSNorm if block == "llama" else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = Attention(width, bias=block == "gpt2")
        self.mlp = GatedMLP(width, 2 * width, activation) if block == "llama" else nn.Sequential(
            nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def fourier_positions(side, width):
    """Sines and cosines of row and column [42], each at width/4 frequencies: (side², width).

    Wavelengths go from 2 tokens, which tells neighbours apart, to 2 * side, which differs at every
    place (our choice).
    """
    angle = torch.arange(side)[:, None] * math.pi * side ** -torch.linspace(0, 1, width // 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                            # (side,D/2)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)   # row, column


# ----------------------------------------------------------------------------------------------
# 4. Network
# ----------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """The paper's classifier [1.2.1]: normalised pictures (B,3,32,32) -> logits (B,classes).

    The arguments are the paper's variants [1.2.2]; this file's header shows the default. Raises
    AssertionError if the network has 100,000 trainable parameters or more, or if `width` is no
    multiple of 8 (4 heads; sine and cosine of two axes).
    """

    def __init__(self, classes=100, width=80, layers=4, weights="tied", block="llama",
                 activation="silu", positions="fourier", downsample="max-pool", stem="residual"):
        super().__init__()
        assert width > 0 and width % 8 == 0, f"width {width} is not a multiple of 8"
        act = dict(silu=nn.SiLU, gelu=nn.GELU, relu=nn.ReLU)[activation]
        strided, wrap = downsample == "strided", Residual if stem == "residual" else nn.Sequential
        pool = nn.Identity() if strided else nn.MaxPool2d(2)
        # Max-pool "after the first two layers" [1.2.1]; four layers and their widths: our choice.
        # The last two add to their input, which is ours: see `stem` in the settings.
        self.stem = nn.Sequential(
            depthwise_separable(3, width // 2, 8, strided, act), pool,          # (B,D/2,16,16)
            depthwise_separable(width // 2, width, 1, strided, act), pool,      # (B,D,8,8)
            *(wrap(*depthwise_separable(width, width, activation=act)) for _ in range(2)))
        if positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        else:                            # constants: no parameters, and not in the checkpoint
            table = fourier_positions(8, width) * (positions == "fourier")
            self.register_buffer("positions", table, persistent=False)
        # Tied [1.2.2]: the weights of one layer, applied again and again. Depth for free.
        self.layers, own = layers, min(layers, 1) if weights == "tied" else layers
        self.encoder = nn.ModuleList(EncoderLayer(width, block, act) for _ in range(own))
        self.norm = RMSNorm(width) if block == "llama" else nn.LayerNorm(width)
        # "A pair of linear transformations" [1.2.1], nothing between them, although they multiply
        # out to one matrix: with SiLU between, the prototype of this network fell from 27.4 to
        # 25.1 % (5,000 held-out pictures, 400 steps of 256, seed 0). Width between: our choice.
        self.head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, classes))
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        assert count < MAX_PARAMETERS, f"{count:,} parameters, not under {MAX_PARAMETERS:,}"

    def forward(self, x):
        x = self.stem(x)                                                   # (B,D,8,8)
        x = x.flatten(2).transpose(1, 2) + self.positions.to(x.dtype)      # (B,64,D)
        for i in range(self.layers):
            x = self.encoder[i % len(self.encoder)](x)                     # (B,64,D)
        return self.head(self.norm(x).mean(dim=1))    # mean over tokens, our choice: (B,classes)


def parameter_table(net):
    """Parameters a stage and in total, as lines of text."""
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    stages = dict.fromkeys([*(name.split(".")[0] for name in sizes), ""])            # "": them all
    total = lambda stage: sum(size for name, size in sizes.items() if name.startswith(stage))
    return "\n".join(f"  {stage or 'total':<10}{total(stage):>8,}" for stage in stages)


# ----------------------------------------------------------------------------------------------
# 5. Objective
# ----------------------------------------------------------------------------------------------

def make_optimiser(net, weight_decay):
    """AdamW [22]: decoupled weight decay, the paper's "L2" [1.2.2], on matrices and filters only.

    A norm's gain sets a scale; pulling it to 0 fights the norm (our choice). The learning rate
    comes from the schedule.
    """
    matrices = dict(params=[p for p in net.parameters() if p.ndim > 1], weight_decay=weight_decay)
    vectors = dict(params=[p for p in net.parameters() if p.ndim <= 1], weight_decay=0.0)
    return torch.optim.AdamW([matrices, vectors])


def training_step(net, optimiser, x, y, label_smoothing, clip, bf16):
    """One gradient update [1.2.2]. x (B,3,32,32) normalised, y (B,); returns the loss, 0-d.

    With smoothing s the target is 1 - s + s/K for the true one of K classes and s/K for the rest.
    Nothing here waits for the device.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): logits = net.train()(x)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimiser.step()
    return loss.detach()


# ----------------------------------------------------------------------------------------------
# 6. Evaluation
# ----------------------------------------------------------------------------------------------

# Loss in nats, accuracy (acc) and top5 from 0 to 1, all exact over `count` pictures; `spread` is
# the standard deviation of accuracy over equal batches of `batch` of them.

Figures = collections.namedtuple("Figures", "loss acc top5 spread batch count")


def evaluate(net, x, y, prepare, bf16=False, label_smoothing=0.0):
    """`Figures` of `net` on pictures x, uint8 (N,3,32,32), with labels y (N,).

    `prepare` turns some of x into the network's input. The batches are as large as divides N, up
    to 1,024, the paper's training batch. Leaves `net` in evaluation mode.
    """
    net, parts = net.eval(), []
    for some, target in zip(x.split(250), y.split(250)):           # small: less memory, and faster
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = net(prepare(some)).float()
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        hits = logits.topk(5).indices == target[:, None]      # (B,5): ties don't favour the truth
        parts.append(torch.stack([loss, hits[:, 0].float(), hits.any(1).float()]))
    parts = torch.cat(parts, dim=1).cpu().double()                      # (3,N); MPS has no double
    batch = next(size for size in range(min(1024, len(y)), 0, -1) if len(y) % size == 0)
    spread = parts[1].view(-1, batch).mean(1).std(correction=0).item()
    return Figures(*parts.mean(1).tolist(), spread, batch, len(y))


def report(net, run, settings, with_test=False):
    """The result as text, and predictions.png: the paper's line [1.3], and what its figures mean.
    `with_test` adds the test set where validation is on a hold-out.

    The paper's train loss (1.931) is above its val loss (1.419) though its train accuracy is the
    higher: the two are of different criteria. Here both are plain cross-entropy on pictures left
    as they are; the criterion that training minimises stands beside them under its own name.
    """
    data, measure = run.data, lambda x, y: evaluate(net, x, y, run.prepare, run.bf16)
    fit, val = measure(data.train_x, data.train_y), measure(data.val_x, data.val_y)
    with torch.random.fork_rng():                    # the same augmentation whenever this is asked
        torch.manual_seed(settings.seed)
        hard = evaluate(net, *data[:2], run.noisy, run.bf16, settings.label_smoothing)
    draw_predictions(run.out / "predictions.png", net, data, run.prepare)
    text = (f"train loss: {fit.loss:.3f}, val loss: {val.loss:.3f}, train acc: {fit.acc:.3f}±"
            f"{fit.spread:.3f}, val acc: {val.acc:.3f}±{val.spread:.3f}\n  val: {val.count:,} "
            f"{'held-out' if settings.holdout else 'test'} pictures, {val.acc:.2%} (top-5 "
            f"{val.top5:.2%}, train {fit.top5:.2%}); ± over batches of {val.batch:,}, not seeds\n"
            f"  losses: plain cross-entropy; as trained (smoothed, augmented): {hard.loss:.3f}")
    if with_test and settings.holdout:
        text += "\n  test: {0.count:,} pictures, {0.acc:.2%}, loss {0.loss:.3f}".format(
            measure(data.test_x, data.test_y))
    return text


# ----------------------------------------------------------------------------------------------
# 7. Pictures
# ----------------------------------------------------------------------------------------------

def plot(path, curves, title, x_axis, y_axis):
    """Draw `curves`, name -> list of (x, y), into a PNG. An axis is (label, lowest, highest)."""
    (x_label, x0, x1), (y_label, y0, y1) = x_axis, y_axis
    at = lambda x, y: (130 + 1270 * (x - x0) / (x1 - x0), 780 - 690 * (y - y0) / (y1 - y0))
    # Drawn at twice the final size: scaling down smooths the lines.
    image, font = Image.new("RGB", (1440, 900), "white"), ImageFont.load_default(26)
    pen = ImageDraw.Draw(image)
    for x, y in [(x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5) for i in range(6)]:
        for ends in ([at(x, y0), at(x, y1)], [at(x0, y), at(x1, y)]): pen.line(ends, "#d8d8d8", 2)
        pen.text((at(x, y)[0], 810), f"{x:,g}", "#333", font, "mm")
        pen.text((115, at(x, y)[1]), f"{y:.4g}", "#333", font, "rm")
    for (name, points), colour, height in zip(curves.items(), ("#d1495b", "#00798c"), (690, 735)):
        pen.line([at(x, y) for x, y in points or [(x0, y0)]], colour, 5, "curve")
        pen.text((1370, height), name, colour, font, "rm")
    for place, text in ((765, 45), title), ((765, 865), x_label), ((90, 45), y_label):
        pen.text(place, text, "#111", font, "mm")
    image.resize((720, 450), Image.LANCZOS).save(path)


def draw_predictions(path, net, data, prepare, rows=5, columns=8):
    """PNG of validation pictures, spread evenly over all; under each its true name, and under that
    the name `net` gives it, green if right, red if wrong."""
    chosen = torch.linspace(0, len(data.val_y) - 1, rows * columns).long().to(data.val_y.device)
    with torch.no_grad(): guesses = net.eval()(prepare(data.val_x[chosen])).argmax(dim=1).tolist()
    image, font = Image.new("RGB", (columns * 140, rows * 160), "white"), ImageFont.load_default(13)
    pen, pixels = ImageDraw.Draw(image), data.val_x[chosen].permute(0, 2, 3, 1).cpu().numpy()
    for i, (truth, guess) in enumerate(zip(data.val_y[chosen].tolist(), guesses)):
        x, y, colour = i % columns * 140, i // columns * 160, ("#c62828", "#1a7f37")[guess == truth]
        image.paste(Image.fromarray(pixels[i]).resize((112, 112), Image.NEAREST), (x + 14, y + 8))
        pen.text((x + 70, y + 130), data.names[truth], "#333", font, "mm")
        pen.text((x + 70, y + 146), data.names[guess], colour, font, "mm")
    image.save(path)


# ----------------------------------------------------------------------------------------------
# 8. Checkpoints
# ----------------------------------------------------------------------------------------------

def load_checkpoint(path, made=None, net=None):
    """The dict that training saved, on the CPU, its weights put into `net`. Raises SystemExit, one
    line, if the file can't be read or was not made as `made` says (settings and data, see set_up).
    """
    try:         # weights_only: a file from elsewhere may hold data, but no code that would run
        state = torch.load(path, map_location="cpu", weights_only=True)
        Settings(**state["settings"])                     # fails if another script wrote the file
        for name, value in (made or {}).items():
            assert value == (was := state["made"].get(name)), f"{name} is {was}, not {value}"
        net.load_state_dict(state["net"]) if net else None
        return state
    except Exception as error:
        sys.exit(f"error: can't use {path} ({str(error)[:60]!r}): use its settings, or other --out")


# ----------------------------------------------------------------------------------------------
# 9. Training
# ----------------------------------------------------------------------------------------------
# `prepare` turns uint8 pictures into the network's input; `noisy` augments them first.

Run = collections.namedtuple("Run", "device bf16 out data prepare noisy made")


def set_up(settings):
    """What every mode begins with, a `Run`. Raises SystemExit, one line, for a device, a folder or
    data that can't be used."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = max(there, key=there.get) if settings.device == "auto" else settings.device
    if not there[kind]: sys.exit(f"error: --device {kind}: this machine, or this torch, has none")
    try:
        (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
        (out / "log.csv").open("a").close()           # better to fail now than after an hour
    except OSError as error:
        sys.exit(f"error: --out {out} can't be written ({error.strerror}): choose another folder")
    data = load_data(settings.data, settings.holdout, kind)
    if (most := len(data.train_y)) < settings.batch_size: sys.exit(f"error: --batch-size > {most}")
    # bf16 has fp32's range, so unlike fp16 it needs no loss scaling; emulated, it is only slow.
    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"torch {torch.__version__} on {kind}, {'bf16' if bf16 else 'fp32'}; {most:,} pictures")
    prepare = lambda x, scale=channel_statistics(data.train_x): normalise(x, **scale)
    noisy = lambda x: prepare(augment(x, settings.randaugment_ops, settings.randaugment_magnitude))
    made = {**dataclasses.asdict(settings), **dict.fromkeys(FREE_TO_CHANGE), "data": data.checksum}
    return Run(torch.device(kind), bf16, out, data, prepare, noisy, made)


def make_network(settings, run):
    """The Classifier of `settings`, weights drawn from their seed; at the given width, or else the
    largest that the budget allows. Raises SystemExit, one line, if the given one is too large.

    Compiled if `settings` say so. Where torch.compile fails, it fails at the first call: so a copy
    goes first, there and back. Compiled in place, the weights keep their names.
    """
    names = ("layers", "weights", "block", "activation", "positions", "downsample", "stem")
    variant = {name: getattr(settings, name) for name in names}
    for width in [settings.width] if settings.width else range(256, 0, -8):
        torch.manual_seed(settings.seed)
        try:
            net = Classifier(len(run.data.names), width, **variant)
            break
        except AssertionError as error:
            if settings.width: sys.exit(f"error: {error}")
    net.to(run.device, memory_format=torch.channels_last)
    if settings.compile == "on" or (settings.compile == "auto" and run.device.type == "cuda"):
        try:
            (probe := copy.deepcopy(net)).compile()
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                probe(run.prepare(run.data.train_x[:settings.batch_size])).sum().backward()
            net.compile()
        except Exception as error:
            print(f"going on without torch.compile: {type(error).__name__}: {str(error)[:200]}")
    return net


def train(settings, command="python classifier.py", only_measure=False):
    """Train [1.2.2], or go on with it, then measure; returns the result as text. `only_measure`
    takes the checkpoint as it is.

    Raises SystemExit: 128 + its number after a signal (all saved), or one line if the loss is no
    longer finite or the checkpoint in the folder is of another run.
    """
    run, steps, batch = set_up(settings), settings.steps, settings.batch_size
    data, path = run.data, run.out / "checkpoint.pt"
    net, recipe = make_network(settings, run), (settings.label_smoothing, settings.clip, run.bf16)
    optimiser = make_optimiser(net, settings.weight_decay)
    # OneCycle [34]: up to the peak in 30 % of the steps, down to almost 0 in the rest, while
    # Adam's first beta goes the other way: torch's defaults, so our choice.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.max_lr, steps + 1)
    # An epoch is one random order of the pictures. `average` is of the loss, over some 50 steps.
    step, position, seconds, history = 0, 0, 0.0, []
    order, average = torch.randperm(len(data.train_y)), torch.zeros(())
    if path.exists() or only_measure:
        state = load_checkpoint(path, run.made, net)
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        step, position, seconds, history, order, average = state["progress"]
        torch.set_rng_state(state["random"])     # the one generator; last, as the network drew some
    print(f"parameters:\n{parameter_table(net)}\n{path}: {step:,} of {steps:,} steps done")
    order, average = order.to(run.device), average.to(run.device)

    # Ctrl-C and SIGTERM leave a note, and the loop ends after its step. A second one kills at once.
    received, numbers, stop = [], (signal.SIGINT, signal.SIGTERM), only_measure
    handle = lambda *handlers: [signal.signal(*pair) for pair in zip(numbers, handlers)]
    take_note = lambda number, _: received.append(number) or handle(signal.SIG_DFL, signal.SIG_DFL)
    former = handle(take_note, take_note)
    clock, clock_step = time.perf_counter(), step
    while step < steps and not stop:
        if position + batch > len(order):            # a rest smaller than a batch is left out
            order, position = torch.randperm(len(order)).to(run.device), 0
        chosen = order[position:position + batch]
        x, y = run.noisy(data.train_x[chosen]), data.train_y[chosen]
        assert step < MAX_STEPS, "the step budget is spent"
        loss = training_step(net, optimiser, x, y, *recipe)
        schedule.step()
        step, position = step + 1, position + batch
        average = average.lerp(loss, max(0.02, 1 / step))
        # Up to here nothing waits for the device. Reading a number does, so only now and then.
        validate, stop = step % settings.eval_every == 0 or step == steps, bool(received)
        if not (step % settings.log_every == 0 or validate or stop): continue
        if not torch.isfinite(average + sum(p.detach().sum() for p in net.parameters())):
            sys.exit(f"\nerror: the loss is not finite at step {step:,}: try another --out with "
                     "a lower --max-lr; the last good checkpoint, if any, is kept")
        took = time.perf_counter() - clock
        seconds, speed = seconds + took, (step - clock_step) * batch / took
        left = datetime.timedelta(seconds=int((steps - step) * batch / speed))
        row = dict(step=step, loss=average.item(), lr=schedule.get_last_lr()[0], images_per_s=speed)
        line = (f"step {step:6,}/{steps:,}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"{speed:7,.0f} images/s  left {left}")
        if validate:               # for Figure 2, on as many training pictures as validation ones
            x, y = data.train_x[:len(data.val_y)], data.train_y[:len(data.val_y)]
            fit = evaluate(net, x, y, run.prepare, run.bf16)
            val = evaluate(net, data.val_x, data.val_y, run.prepare, run.bf16)
            row.update(train_acc=fit.acc, val_acc=val.acc, val_loss=val.loss)
            line += f"  train acc {fit.acc:.2%}  val acc {val.acc:.2%}"
        print(line, end="\r" if sys.stdout.isatty() and not validate else "\n", flush=True)
        history.append(row)
        if validate or stop:
            write_log(run.out, history, steps)
            state = dict(made=run.made, settings=dataclasses.asdict(settings), net=net.state_dict(),
                         optimiser=optimiser.state_dict(), schedule=schedule.state_dict(),
                         progress=(step, position, seconds, history, order, average),
                         random=torch.get_rng_state())
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)     # `path` is always whole, old or new
        clock, clock_step = time.perf_counter(), step     # validation and files are not counted
    handle(*former)
    if received:
        print(f"\nstopped after step {step:,}, all saved in {path}. To go on:\n  {command}")
        sys.exit(128 + received[0])
    if run.device.type == "cuda": print(f"peak {torch.cuda.max_memory_allocated() >> 20:,} MiB")
    print(f"{step * batch:,} pictures in {seconds:,.1f} s, {step * batch / seconds:,.0f} images/s; "
          "measuring ...", flush=True)
    print(result := report(net, run, settings, with_test=only_measure))
    return result


def write_log(out, history, steps):
    """log.csv and curve.png (the paper's Figure 2) from the rows so far, whole each time, so that
    a run set back to its checkpoint leaves no rows of the steps it lost."""
    names = "step loss lr images_per_s train_acc val_acc val_loss".split()
    lines = [",".join(str(row.get(name, "")) for name in names) for row in history]
    (out / "log.csv").write_text("\n".join([",".join(names), *lines, ""]))
    curve = lambda key: [(row["step"], 100 * row[key]) for row in history if key in row]
    plot(out / "curve.png", dict(train=curve("train_acc"), validation=curve("val_acc")),
         "Train and validation accuracy", ("optimiser step", 0, steps), ("accuracy (%)", 0, 100))


def run_lr_find(settings, lowest=1e-5, highest=1.0, longest=200):
    """Range test [33]: raise the rate exponentially over at most `longest` steps, watch the loss,
    draw it, and propose a peak for OneCycle. Returns that rate. Touches no checkpoint."""
    run, steps, curve, average = set_up(settings), min(settings.steps, longest), [], 0.0
    net, recipe = make_network(settings, run), (settings.label_smoothing, settings.clip, run.bf16)
    optimiser = make_optimiser(net, settings.weight_decay)
    for step in range(steps):
        rate = lowest * (highest / lowest) ** (step / steps)
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = rate
        chosen = torch.randint(len(run.data.train_y), (settings.batch_size,)).to(run.device)
        x, y = run.noisy(run.data.train_x[chosen]), run.data.train_y[chosen]
        loss = training_step(net, optimiser, x, y, *recipe)
        average = 0.9 * average + 0.1 * loss.item()
        curve.append((math.log10(rate), average / (1 - 0.9 ** (step + 1))))      # weighted mean
        print(f"step {step + 1:4}/{steps}  lr {rate:.2e}  loss {curve[-1][1]:.4f}", flush=True)
    # OneCycle stays near its peak for long, so keep clear of the rate at which the loss turns up:
    # a third of it (our choice).
    turn, least = min(curve, key=lambda point: point[1])
    peak, low, top = 10 ** turn / 3, math.floor(least), math.floor(curve[0][1]) + 1
    curves = {"training loss": [(x, y) for x, y in curve if y < top],
              f"proposed: {peak:.1e}": [(math.log10(peak), y) for y in (low, top)]}
    plot(run.out / "lr_find.png", curves, "Range test", ("log10 lr", -5, 0), ("loss", low, top))
    print(f"proposed: --max-lr {peak:.1e}, a third of the rate of least loss, {least:.3f}")
    return peak


# ----------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------

def main(argv=None):
    """What `python classifier.py ARGV` does; returns the result of the mode. Raises SystemExit, one
    line, for a command that can't be meant."""
    parser = argparse.ArgumentParser("classifier.py", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"error: {message} (--help lists all flags)")
    parser.add_argument("mode", nargs="?", choices=["train", "eval", "lr-find"], default="train")
    hints = get_type_hints(Settings, include_extras=True)
    for name, hint in hints.items():
        choices, text = get_args(hint.__origin__), f"; default {getattr(Settings, name)!r}"
        kind = dict(choices=choices) if choices else dict(type=hint.__origin__)
        parser.add_argument("--" + name.replace("_", "-"), help=hint.__metadata__[0] + text, **kind)
    given = vars(parser.parse_args(argv))
    mode, command = given.pop("mode"), "python classifier.py " + shlex.join(argv or sys.argv[1:])
    for name, value in given.items():
        low, high = hints[name].__metadata__[1:] or (value, value)
        if not low <= value <= high:                                      # nan fails as well
            parser.error(f"--{name.replace('_', '-')} {value} is not within {low} to {high}")
    shapes = given.get("data") == "shapes"
    given["out"] = given.get("out") or f"runs/classifier-{'shapes' if shapes else 'cifar100'}"
    if shapes and mode != "eval": given = {**SHAPES, **given}
    if given.get("recipe") == "paper": given = {**PAPER, **given}
    if mode == "lr-find": return run_lr_find(Settings(**given))
    if mode == "eval":        # a checkpoint knows how it was made, but not on which machine we are
        made = load_checkpoint(Path(given["out"]) / "checkpoint.pt")["settings"]
        given = {**made, "device": "auto", **given}
    return train(Settings(**given), command, only_measure=mode == "eval")


if __name__ == "__main__":
    main()
