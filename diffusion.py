# SPDX-License-Identifier: MIT
"""Class-conditional CIFAR-100 diffusion in under 1,000,000 parameters, at most 50,000 steps.

Section 2 of the paper "Modern Methods, Classical Constraints", in one file to read from the top:

    python diffusion.py                       train on CIFAR-100 (downloaded if not in ./data)
    python diffusion.py --data shapes         the same on drawn shapes: no download, no GPU needed
    python diffusion.py sample --classes rose,whale --count 16 --guidance 2
    python diffusion.py interpolate           between pairs of pictures, all noise fixed
    python diffusion.py neighbours            the training pictures nearest to samples
    python diffusion.py fid                   10,000 samples against the 10,000 test pictures
    python diffusion.py schedules             draw the three noise schedules

A run writes one folder, runs/diffusion-<data set>: checkpoint.pt, log.csv, loss.png, a grid of
samples every so often, and at the end samples, interpolations, neighbours, and on a GPU FID. Start
the same command again and it goes on where it stopped. The modes above, but for the last, take all
settings that you don't give from the checkpoint (after shapes, say --data shapes again). Results,
each with its command, stand in README.md.

The network predicts the velocity v of a noised picture. Widths a, b, c = 48, 96, 144:

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

Skips are added, not joined as in [28] (our choice): the 1x1 convolution works before doubling, on a
quarter of the places, and blocks take fewer channels in. A step took 0.8 of the time so (CPU).
The embedding also scales and shifts the channels in every block, which the paper's design doesn't
have (--recipe paper): see `modulate` in the settings.

Shapes in comments: B pictures, C channels, H x W pixels, E width of an embedding.
Symbols: x a picture in [-1,1]; t in [0,1] the noise level, 0 clean and 1 pure noise; log_snr the
paper's lambda; alpha and sigma the scales of signal and noise, alpha² + sigma² = 1 (alpha is not
DDPM's alpha_t, which is a ratio of neighbouring alpha²); x_t a noised picture; v the velocity.
Tags like [2.2] name the paper's section, (1) to (4) its equations; `our choice` marks what it
leaves open. References, numbered as in the paper: [11] DDPM, [12] classifier-free guidance,
[20] variational diffusion, [24] cosine schedule, EMA, [28] U-Net, [29] dynamic clipping, [30]
velocity, [35] DDIM, [39] slerp, [42] attention. [4] is the splice of Crowson's v-diffusion.
Each function says what it takes and returns; layers and formulas can be copied alone.

For CIFAR-10, write CIFAR10 for CIFAR100 in load_cifar: class count and names come from the data.
"""
import argparse, copy, collections, concurrent.futures, dataclasses, datetime, functools, hashlib
import math, os, shlex, signal, sys, time, zlib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import numpy as np
import torch, torchvision, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

MAX_PARAMETERS = 1_000_000   # [2.1] fewer than this, asserted where the network is built
MAX_STEPS = 50_000           # [2.1] gradient updates at most, asserted before every update
CHUNK = 50                   # samples that share a noise generator, see sample_set
INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


# ----------------------------------------------------------------------------------------------
# 1. Settings
# ----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    """A field is a command-line flag: type, what --help says, smallest and largest value, default.

    The defaults are the paper's design but for `modulate`; where it names no number, our choice.
    """
    data: Annotated[str, "folder of CIFAR-100 (downloaded if none), or shapes: see SHAPES"] = "data"
    out: Annotated[str, "folder to write to; empty: runs/diffusion-<data set>"] = ""
    seed: Annotated[int, "decides weights, data order, noise and samples", 0, 2**31] = 0
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], "where to compute"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "compiled training; auto: on CUDA"] = "auto"
    log_every: Annotated[int, "steps between lines of progress", 1, MAX_STEPS] = 50
    eval_every: Annotated[int, "steps between validations, each with a save", 1, MAX_STEPS] = 1000
    grid_every: Annotated[int, "steps between grids of samples", 1, MAX_STEPS] = 5000
    steps: Annotated[int, "optimiser steps", 1, MAX_STEPS] = MAX_STEPS
    batch_size: Annotated[int, "pictures a step", 1, 65_536] = 256
    # Validation loss in the same time: 0.140 with 2e-3, 0.150 with 1e-3.
    max_lr: Annotated[float, "peak learning rate, then a cosine to 0", 1e-8, 10.0] = 2e-3
    warm_up: Annotated[int, "steps until the peak", 1, MAX_STEPS] = 500
    clip_norm: Annotated[float, "largest norm of the gradient", 1e-6, 1e6] = 1.0
    ema: Annotated[float, "decay of the averaged weights; rises to it", 0.0, 0.99999] = 0.999
    label_drop: Annotated[float, "share of labels dropped; 0: no guidance", 0.0, 1.0] = 0.1
    schedule: Annotated[Literal["cosine", "linear", "spliced"], "when training"] = "cosine"
    timesteps: Annotated[Literal["sobol", "independent"], "how t is drawn"] = "sobol"
    width: Annotated[int, "channels at 32x32; 0: as many as the budget allows", 0, 4096] = 0
    after_injection: Annotated[Literal["regular", "separable"], "convolution there"] = "regular"
    # Beyond the paper, on because figures decided: validation loss 0.140 with it, 0.147 without it
    # at the width that then fits (840 s of one CPU core, batch 64, seed 0: 892 and 669 steps).
    modulate: Annotated[Literal["off", "on"], "embedding scales and shifts in all blocks"] = "on"
    recipe: Annotated[Literal["ours", "paper"], "paper: nothing that goes beyond it"] = "ours"
    # From here on: of sampling only, so free to differ from one command to the next.
    sample_schedule: Annotated[Literal["same", "cosine", "linear", "spliced"], "sampling"] = "same"
    sample_steps: Annotated[int, "network calls a sample", 1, 10_000] = 100
    eta: Annotated[float, "fresh noise a step; 1: DDPM, 0: DDIM", 0.0, 1.0] = 1.0
    # The paper's w = 3 also scored best after 12,000 steps of 32 on a CPU: FID-1280 (see README)
    # of 2,000 samples 8.1, 7.6, 7.1, 6.6, 6.1, 6.0 with w = 0, 0.25, 0.5, 1, 2, 3.
    guidance: Annotated[float, "w of equation (4)", -1.0, 100.0] = 3.0
    clip: Annotated[Literal["none", "static", "dynamic"], "of predicted pictures"] = "dynamic"
    classes: Annotated[str, "names or numbers to sample, by commas; empty: all, mixed"] = ""
    count: Annotated[int, "pictures to sample", 1, 1_000_000] = 64
    sample_seed: Annotated[int, "seed of samples", 0, 2**31] = 0
    sample_batch: Annotated[int, "pictures sampled at once, rounded up to 50s", 1, 65_536] = 250
    fid_count: Annotated[int, "samples for fid", 2, 1_000_000] = 10_000
    inception: Annotated[str, "file of the FID network; empty: torch hub's folder"] = ""


# These don't shape the trained network, so they may change when a run goes on. (The pictures
# themselves are compared by checksum, wherever they lie.)
FREE_TO_CHANGE = ("data", "out", "device", "compile", "log_every", "eval_every", "grid_every",
                  "sample_schedule", "sample_steps", "eta", "guidance", "clip", "classes", "count",
                  "sample_seed", "sample_batch", "fid_count", "inception", "recipe")

# Defaults for drawn shapes: a small network, four minutes on a CPU. The linear schedule
# dwells on high noise, where shapes form. Dynamic clipping would pale bright colours.
SHAPES = dict(width=24, schedule="linear", steps=1000, batch_size=32, max_lr=5e-3, warm_up=50,
              ema=0.98, eval_every=500, guidance=2.0, sample_steps=30, clip="static")

# What `--recipe paper` gives back; a flag of the same command still wins.
PAPER = dict(modulate="off")


# ----------------------------------------------------------------------------------------------
# 2. Data
# ----------------------------------------------------------------------------------------------
# The whole data set lies on the device: pictures x uint8 (N,3,32,32) in [0,255], labels y (N,).
# names are the class names; the checksum is of the training part.

Data = collections.namedtuple("Data", "train_x train_y test_x test_y names checksum")


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


def load_data(source, device="cpu"):
    """`source`, "shapes" or the folder of CIFAR-100, as a `Data` on `device`."""
    x, y, *test, names = load_cifar(source) if source != "shapes" else (
        *draw_shapes(20_000, seed=1)[:2], *draw_shapes(2_000, seed=2))
    return Data(*(part.to(device) for part in (x, y, *test)), names, zlib.crc32(x.numpy()))


def to_model(x):
    """The border between storage and network: uint8 [0,255] -> fp32 [-1,1], channels last.

    Raises AssertionError if x is not uint8: then it is in [0,1], or has been here already.
    """
    assert x.dtype == torch.uint8, f"to_model wants uint8 pictures in [0,255], not {x.dtype}"
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_uint8(x):
    """The way back: fp32 [-1,1] -> uint8 [0,255], with what lies outside cut off."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def find_classes(words, names):
    """Class numbers from "rose,7,whale" (an empty text: none). Raises SystemExit, one line."""
    numbers = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        if not (word in names or word.isdigit() and int(word) < len(names)):
            sys.exit(f"error: --classes {word}: not one of the {len(names)}, such as {names[0]}")
        numbers.append(names.index(word) if word in names else int(word))
    return numbers


# ----------------------------------------------------------------------------------------------
# 3. Layers
# ----------------------------------------------------------------------------------------------

def separable_conv(c_in, c_out):
    """Depthwise-separable 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W).

    Space first, a 3x3 filter a channel, then features, a 1x1 mixture of channels: 9 * c_in +
    c_in * c_out weights instead of 9 * c_in * c_out. "The majority" of convolutions here [2.2].
    """
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
                         nn.Conv2d(c_in, c_out, 1))


def regular_conv(c_in, c_out):
    """Regular 3x3 convolution: (B,c_in,H,W) -> (B,c_out,H,W)."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def sinusoidal_embedding(log_snr, width=64):
    """Sines and cosines of the noise level: (B,) -> (B,width) [2.2, 42].

    log_snr is within 20 and -20. Wavelengths go from 3 to 300 (our choice): the long ones order all
    levels, the short ones tell neighbours apart.
    """
    frequency = torch.logspace(math.log10(0.02), math.log10(2), width // 2, device=log_snr.device)
    angle = log_snr[:, None].float() * frequency                            # (B,width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,H,W) -> (B,C,H,W).

    GroupNorm, not BatchNorm: a batch mixes noise levels, whose statistics have nothing in common,
    and averaged weights (EMA) would not fit running averages. 8 groups, so C is a multiple of 8:
    our choice. With `e_width`, an embedding (B,e_width) scales and shifts channels in the middle.
    """

    def __init__(self, channels, conv, e_width=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), conv(channels, channels)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), conv(channels, channels)
        self.modulate = nn.Linear(e_width, 2 * channels) if e_width else None

    def forward(self, x, embedding=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulate:
            scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Stage(nn.Sequential):
    """Layers one after another, blocks with the embedding: (B,C,H,W), (B,E) -> (B,C',H',W')."""

    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class Attention(nn.Module):
    """Self-attention among all places of a picture [2.2, 42]: (B,C,H,W) -> (B,C,H,W).

    C / 64 heads, rounded (they must divide C), and zeros in the last layer, so that it starts as
    the identity: both our choice.
    """

    def __init__(self, channels):
        super().__init__()
        self.heads, self.norm = max(1, round(channels / 64)), nn.GroupNorm(1, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        for p in self.out.parameters(): nn.init.zeros_(p)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)              # a place a token: (B,HW,C)
        heads = self.qkv(tokens).unflatten(2, (3, self.heads, -1))    # (B,HW,3,heads,C/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                        # each (B,heads,HW,C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)     # (B,HW,C)
        return x + self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Injection(nn.Module):
    """Adds the embedding of noise level and class, then convolves: (B,C,H,W), (B,E) -> (B,C,H,W).

    The embedding goes into the branch only; x passes by unchanged, as in any residual block. A
    regular convolution, because a separable one looks at each channel by itself before it mixes
    them: the paper saw wave-like artefacts and blames that [2.3]. `conv` takes either.
    """

    def __init__(self, e_width, channels, conv):
        super().__init__()
        self.project, self.norm = nn.Linear(e_width, channels), nn.GroupNorm(8, channels)
        self.conv = conv(channels, channels)

    def forward(self, x, embedding):
        h = x + self.project(embedding)[:, :, None, None]
        return x + self.conv(F.silu(self.norm(h)))


# ----------------------------------------------------------------------------------------------
# 4. Network
# ----------------------------------------------------------------------------------------------

class UNet(nn.Module):
    """Velocity network [2.2, 28]: net(x_t, log_snr, labels) -> v (B,3,32,32).

    x_t (B,3,32,32), log_snr (B,), labels: class numbers (B,), in which `classes` means "no class",
    or class embeddings (B,E) as `embed` gives them; `e` is E. The ladder is in this file's header;
    all widths and depths are our choice. `modulate` goes beyond the paper: the embedding acts in
    every block, not at two points alone. Raises AssertionError at 1,000,000 parameters or more.
    """

    def __init__(self, classes=100, width=48, after_injection="regular", modulate=True, e=128):
        super().__init__()
        self.classes = classes
        a, b, c = width, 2 * width, 3 * width
        conv = dict(regular=regular_conv, separable=separable_conv)[after_injection]
        block = functools.partial(ResidualBlock, conv=separable_conv, e_width=e * modulate)
        self.time = nn.Sequential(nn.Linear(64, e), nn.SiLU(), nn.Linear(e, e))
        self.label = nn.Embedding(classes + 1, e)                # the last: "no class", learned
        self.stem = regular_conv(3, a)
        self.inject1 = Injection(e, a, conv)
        self.down1 = block(a)                                                        # 32x32
        self.down2 = Stage(nn.AvgPool2d(2), nn.Conv2d(a, b, 1), block(b), block(b))  # 16x16
        self.down3 = Stage(nn.AvgPool2d(2), nn.Conv2d(b, c, 1), block(c), Attention(c))
        self.inject2 = Injection(e, c, conv)
        self.middle = Stage(block(c), Attention(c), block(c))                        # 8x8
        self.join2, self.up2 = nn.Conv2d(c, b, 1), Stage(block(b), block(b))         # 16x16
        self.join1, self.up1 = nn.Conv2d(b, a, 1), Stage(block(a), block(a))         # 32x32
        self.out = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), regular_conv(a, 3))
        for p in self.out[2].parameters(): nn.init.zeros_(p)     # first guess v = 0: our choice
        self.to(memory_format=torch.channels_last)               # 1x1 convolutions run faster so
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        assert count < MAX_PARAMETERS, f"{count:,} parameters, not under {MAX_PARAMETERS:,}"

    def embed(self, labels):
        """Class embeddings (B,E) of class numbers (B,); embeddings are passed through."""
        return labels if labels.is_floating_point() else self.label(labels)

    def forward(self, x, log_snr, labels):
        e = F.silu(self.time(sinusoidal_embedding(log_snr)) + self.embed(labels))    # (B,E)
        x1 = self.down1(self.inject1(self.stem(x), e), e)                            # (B,a,32,32)
        x2 = self.down2(x1, e)                                                       # (B,b,16,16)
        x3 = self.middle(self.inject2(self.down3(x2, e), e), e)                      # (B,c,8,8)
        x2 = self.up2(F.interpolate(self.join2(x3), scale_factor=2) + x2, e)         # (B,b,16,16)
        x1 = self.up1(F.interpolate(self.join1(x2), scale_factor=2) + x1, e)         # (B,a,32,32)
        # The last layer is fp32 where the others are bf16: guidance magnifies what v is rounded by.
        with torch.autocast(x.device.type, enabled=False): return self.out(x1.float())


def parameter_table(net):
    """Parameters a stage and in total, as lines of text."""
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    stages = dict.fromkeys([*(name.split(".")[0] for name in sizes), ""])            # "": them all
    total = lambda stage: sum(size for name, size in sizes.items() if name.startswith(stage))
    return "\n".join(f"  {stage or 'total':<10}{total(stage):>8,}" for stage in stages)

# ----------------------------------------------------------------------------------------------
# 5. Objective: noise schedules, velocity, guidance, sampler
# ----------------------------------------------------------------------------------------------
# A schedule maps t in [0,1] to the log-SNR, lambda = log(alpha²/sigma²), strictly falling, finite
# at both ends, and invertible [2.2].

def cosine_schedule(t):
    """lambda = -2 log tan(a t + b) [2.2, 24], from 20 at t = 0 to -20 at t = 1; t any shape.

    b = atan(e^-10) and a = atan(e^10) - b cut off the infinite ends, as in [12]. As tan(x) =
    sin(x) / sin(pi/2 - x) and a + 2b = pi/2, two sines say the same, exact in fp32 near t = 1 too.
    """
    b = math.atan(math.exp(-10))
    a = math.pi / 2 - 2 * b
    return 2 * (torch.sin(a * (1 - t) + b).log() - torch.sin(a * t + b).log())


def cosine_inverse(log_snr):
    """t of cosine_schedule: (atan(e^(-lambda/2)) - b) / a."""
    b = math.atan(math.exp(-10))
    return (torch.atan(torch.exp(-log_snr / 2)) - b) / (math.pi / 2 - 2 * b)


def linear_schedule(t):
    """lambda = -log(e^(1e-4 + 10 t²) - 1), DDPM's linear betas in continuous time [11, 20]."""
    return -torch.log(torch.expm1(1e-4 + 10 * t ** 2))


def linear_inverse(log_snr):
    """t of linear_schedule: sqrt((log(1 + e^-lambda) - 1e-4) / 10)."""
    return ((F.softplus(-log_snr) - 1e-4).clamp(min=0) / 10).sqrt()


def spliced_schedule(t):
    """Cosine first, linear then [2.3, 4]: with u = 1.31537545 t, the cosine schedule at u below the
    joint u = 0.80074257, else the linear one at u - 0.31537545. Value and slope meet there."""
    u = 1.31537545 * t
    return torch.where(u < 0.80074257, cosine_schedule(u.clamp(max=1)),
                       linear_schedule((u - 0.31537545).clamp(min=0)))


def spliced_inverse(log_snr):
    """t of spliced_schedule."""
    u = cosine_inverse(log_snr)
    return torch.where(u < 0.80074257, u, linear_inverse(log_snr) + 0.31537545) / 1.31537545


def to_log_snr(t, schedule="cosine"):
    """The log-SNR at t of the schedule of that name."""
    functions = dict(cosine=cosine_schedule, linear=linear_schedule, spliced=spliced_schedule)
    return functions[schedule](t)


def to_alpha_sigma(log_snr):
    """alpha = sqrt(sigmoid(lambda)) and sigma = sqrt(sigmoid(-lambda)), shaped to scale pictures:
    (B,) -> two of (B,1,1,1)."""
    log_snr = log_snr.view(-1, 1, 1, 1)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def velocity(x, noise, alpha, sigma):
    """v = alpha * noise - sigma * x: Eq. (1) [30]."""
    return alpha * noise - sigma * x


def add_noise(x, noise, alpha, sigma):
    """x_noised = alpha * x + sigma * noise: Eq. (2)."""
    return alpha * x + sigma * noise


def to_x0_and_noise(x_t, v, alpha, sigma):
    """The picture and the noise that v says are in x_t: (1) and (2) solved for both."""
    return alpha * x_t - sigma * v, sigma * x_t + alpha * v


def three_losses(x, noise, pred_v, log_snr):
    """The three forms of Eq. (3), each (B,), mean over pixels; all the same number.

    |v - v_hat|², (e^lambda + 1) |x - x_hat|², (e^-lambda + 1) |noise - noise_hat|². The paper
    prints the last weight as e^lambda - 1, a misprint: below lambda = 0 it would be negative.
    Training uses the first form; the others show what it weighs.
    """
    alpha, sigma = to_alpha_sigma(log_snr)
    pred_x0, pred_noise = to_x0_and_noise(add_noise(x, noise, alpha, sigma), pred_v, alpha, sigma)
    mean = lambda error: error.square().flatten(1).mean(dim=1)
    of_v, of_x0 = mean(velocity(x, noise, alpha, sigma) - pred_v), mean(x - pred_x0)
    return of_v, (log_snr.exp() + 1) * of_x0, ((-log_snr).exp() + 1) * mean(noise - pred_noise)


def guide(v_cond, v_uncond, w):
    """Classifier-free guidance, Eq. (4) [12]: (1 + w) v_cond - w v_uncond. w = 0: no guidance."""
    return (1 + w) * v_cond - w * v_uncond


def guided_velocity(net, labels, w):
    """The function (x_t, log_snr) -> v that a sampler calls: `net` with guidance w.

    labels as UNet takes them, (B,) or (B,E). Both halves of Eq. (4) go through the network as one
    batch of 2B.
    """
    wanted = net.embed(labels)                                                            # (B,E)
    none = net.embed(torch.full((1,), net.classes, device=wanted.device)).expand_as(wanted)
    def model(x_t, log_snr):
        if w == 0: return net(x_t, log_snr, wanted)
        both = net(torch.cat([x_t, x_t]), torch.cat([log_snr, log_snr]), torch.cat([wanted, none]))
        return guide(*both.chunk(2), w)
    return model


def clip_x0(pred_x0, how="dynamic", percentile=0.995):
    """Keep predicted pictures (B,3,H,W) in range: "none", "static" (cut at ±1), or "dynamic" [29].

    Guidance drives predictions out of [-1,1]. Cutting saturates them; dynamic clipping cuts a
    picture at s = max(1, 99.5th percentile of its |values|) and divides by s (99.5: our choice).
    """
    if how == "none": return pred_x0
    if how == "static": return pred_x0.clamp(-1, 1)
    s = pred_x0.abs().flatten(1).quantile(percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return pred_x0.clamp(-s, s) / s


@torch.no_grad()
def sample(model, x, log_snrs, eta=1.0, clip="dynamic", draw=torch.randn_like):
    """Pictures from noise: x (B,3,H,W) at log_snrs[0] -> the last x_0 predicted [2.3, 11, 35].

    model(x_t, log_snr (B,)) gives v; log_snrs (S,) rises, a call of the model each. A step from t
    to s splits x_t into picture and noise, and mixes them anew at s. Of the noise, the variance
    eta² (sigma_s²/sigma_t²) (1 - alpha_t²/alpha_s²) is fresh: eta = 1 is DDPM, eta = 0 DDIM. The
    last step ends with the picture it has split off. `draw(x)` gives fresh noise in x's shape.
    """
    alphas, sigmas = (scale.view(-1) for scale in to_alpha_sigma(log_snrs))
    for i, log_snr in enumerate(log_snrs):
        alpha, sigma, v = alphas[i], sigmas[i], model(x, log_snr.expand(len(x)))
        pred_x0 = clip_x0(to_x0_and_noise(x, v, alpha, sigma)[0], clip)
        # To mix it with the noise left at t = 0 would be seen where sigma is 0.01, as in the linear
        # schedule: FID-1280 of 500 samples 20.0, and 19.5 without.
        if i == len(log_snrs) - 1: return pred_x0
        next_alpha, next_sigma = alphas[i + 1], sigmas[i + 1]
        pred_noise = (x - alpha * pred_x0) / sigma                 # fits the clipped picture
        # With eta = 1 this is DDPM's posterior: its mean given pred_x0, and its variance [11].
        fresh = eta ** 2 * (next_sigma / sigma) ** 2 * (1 - (alpha / next_alpha) ** 2)  # variance
        x = next_alpha * pred_x0 + (next_sigma ** 2 - fresh).clamp(min=0).sqrt() * pred_noise
        if eta > 0: x = x + fresh.sqrt() * draw(x)


def slerp(a, b, share):
    """Spherical interpolation [2.3, 39]: (B,...) and (B,...) at share (B,) of the way, each row
    flattened whole. Between nearly parallel rows, where it would divide 0 by 0, a straight line.
    """
    u, v, share = a.flatten(1), b.flatten(1), share.view(-1, 1).to(a.dtype)
    cosine = (F.normalize(u, dim=1) * F.normalize(v, dim=1)).sum(1, keepdim=True)
    angle = cosine.clamp(-1, 1).acos()
    parallel = angle.sin().abs() < 1e-3
    sine = angle.sin().where(~parallel, torch.ones_like(angle))
    left = torch.where(parallel, 1 - share, ((1 - share) * angle).sin() / sine)
    right = torch.where(parallel, share, (share * angle).sin() / sine)
    return (left * u + right * v).view_as(a)


def learning_rate(step, steps, peak, warm_up):
    """Rate of update number `step` (from 0): linear to `peak` in `warm_up` steps, and down to 0 on
    a cosine over all `steps` (our choice)."""
    return peak * min(1, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(average, net, decay, step):
    """average += (1 - decay) (net - average), weight by weight [2.2, 11, 24], after update number
    `step` (from 0). Warm-up, our choice: decay is at most (1 + step)/(10 + step), so that the
    average forgets the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


# ----------------------------------------------------------------------------------------------
# 6. Evaluation
# ----------------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(net, x, y, schedule="cosine", bf16=False, count=1024):
    """Eq. (3) on at most `count` test pictures, x uint8 (N,3,32,32), y (N,), each with fixed noise,
    at t = (i + 1/2)/count: (mean, list of the means in five equal bins of t, clean to noisy).

    Nothing in it is random, so two networks, or two moments of one, compare picture by picture.
    """
    chosen = torch.from_numpy(np.random.RandomState(0).permutation(len(y))[:count]).to(y.device)
    noise = torch.randn(len(chosen), *x.shape[1:], generator=torch.Generator().manual_seed(1))
    t = (torch.arange(len(chosen)) + 0.5) / len(chosen)
    parts = []
    for i, eps, level in zip(chosen.split(256), noise.split(256), t.split(256)):
        picture, eps = to_model(x[i]), eps.to(y.device)
        log_snr = to_log_snr(level.to(y.device), schedule)
        alpha, sigma = to_alpha_sigma(log_snr)
        with torch.autocast(y.device.type, torch.bfloat16, enabled=bf16):
            pred_v = net(add_noise(picture, eps, alpha, sigma), log_snr, y[i])
        parts.append((velocity(picture, eps, alpha, sigma) - pred_v).square().flatten(1).mean(1))
    losses = torch.cat(parts).cpu()
    return losses.mean().item(), [part.mean().item() for part in losses.chunk(5)]


def sample_set(net, labels, seed=0, schedule="cosine", steps=100, eta=1.0, guidance=3.0,
               clip="dynamic", batch=250, bf16=False, start=None, say=lambda done, count: None):
    """One sample for each of labels, (N,) or (N,E), as uint8 (N,3,32,32) on the CPU.

    CHUNK samples share a generator, whose seed comes from `seed` and their number: so the noise is
    the same whatever the batch, and memory does not grow with N. `start` (N,3,32,32) is the first
    noise, if not drawn. `say` hears of progress. Leaves `net` in evaluation mode.
    """
    net, device, pictures = net.eval(), labels.device, []
    log_snrs = to_log_snr(torch.linspace(1, 0, steps + 1, device=device)[:-1], schedule)
    batch = math.ceil(batch / CHUNK) * CHUNK
    for first in range(0, len(labels), batch):
        some = labels[first:first + batch]
        generators = [torch.Generator(device).manual_seed(1_000_003 * seed + (first + i) // CHUNK)
                      for i in range(0, len(some), CHUNK)]
        def draw(x=None):
            noise = [torch.randn(CHUNK, 3, 32, 32, generator=g, device=device) for g in generators]
            return torch.cat(noise)[:len(some)]
        x = draw() if start is None else start[first:first + batch]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = sample(guided_velocity(net, some, guidance), x, log_snrs, eta, clip, draw)
        pictures.append(to_uint8(x).cpu())
        say(first + len(some), len(labels))
    return torch.cat(pictures)


def interpolate(net, ends, labels, count=10, **how):
    """Pictures between pairs [2.3]: `ends` (2,P,3,32,32) first noises, `labels` (2,P) classes of P
    pairs -> uint8 (P*count,3,32,32), pair after pair, ends included.

    Noise and class embedding both go along the sphere, and eta = 0 keeps the rest free of chance:
    so the outer pictures are those that the ends' own noise and class give. `how`: as sample_set.
    """
    pairs = ends.shape[1]
    share = torch.linspace(0, 1, count, device=ends.device).repeat(pairs)               # (P*count,)
    noise = [end.repeat_interleave(count, 0) for end in ends]
    with torch.no_grad():
        classes = [net.embed(end).repeat_interleave(count, 0) for end in labels]
    how = {**how, "eta": 0.0, "start": slerp(*noise, share)}
    return sample_set(net, slerp(*classes, share), **how)


def nearest_neighbours(queries, pictures, k=1, chunk=250):
    """The k pictures nearest to each query, each as it is or flipped, by Euclidean distance of
    pixels in [0,255]: distance (Q,k), index (Q,k), flipped (Q,k). Both uint8 (.,3,H,W), one device.

    Chunk by chunk: no tensor over 400 MB for CIFAR-100.
    """
    flat = lambda x: x.flatten(1).float()
    both, found = torch.cat([pictures, pictures.flip(-1)]), []                       # (2N,3,H,W)
    for some in queries.split(chunk):
        far = torch.cat([torch.cdist(flat(some), flat(part)) for part in both.split(5000)], dim=1)
        least, flip = far.view(len(some), 2, -1).min(dim=1)         # (q,N): a picture counts once
        i = least.topk(k, largest=False).indices
        i = i + flip.gather(1, i) * len(pictures)                                 # (q,k), in `both`
        # cdist multiplies matrices, which cancels badly for near copies: measure these again.
        exact = (flat(some)[:, None] - flat(both[i.flatten()]).view(*i.shape, -1)).norm(dim=2)
        found.append((exact, i % len(pictures), i >= len(pictures)))
    return tuple(torch.cat(parts) for parts in zip(*found))


def resize_for_inception(x):
    """Pictures as clean-fid shows them to the FID network: uint8 (B,3,H,W) -> fp32 (B,3,299,299) in
    [0,255]. Pillow's bicubic filter on each channel in floating point, then cut to the range."""
    def one(plane):
        image = Image.fromarray(plane.astype(np.float32)).resize((299, 299), Image.BICUBIC)
        return np.asarray(image).clip(0, 255)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        planes = list(pool.map(one, x.flatten(0, 1).cpu().numpy()))
    return torch.from_numpy(np.stack(planes)).view(len(x), 3, 299, 299)


def load_inception(path=""):
    """The FID network (Inception of 2015-12-05) from `path`, or from torch hub's folder, downloaded
    into it at need. Raises OSError if it can't be had or is not that file."""
    path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), INCEPTION_SHA256)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == INCEPTION_SHA256, "wrong SHA-256"
        return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:
        raise OSError(f"the FID network can't be had ({str(error)[:80]!r}): fetch {INCEPTION} "
                      f"(SHA-256 {INCEPTION_SHA256}) to {path}, or name it with --inception")


@torch.no_grad()
def inception_features(network, x, batch=50):
    """Features of pictures uint8 (N,3,H,W): float64 (N,2048) on the CPU. `network` is that of
    load_inception; its forward would resize by itself, so only its layers are called."""
    device, rows = x.device, []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):     # fp32, as others have it
        for some in x.split(batch):
            resized = resize_for_inception(some).to(device)
            rows.append(network.layers((resized - 128) / 128).view(len(some), -1).cpu().double())
    return torch.cat(rows)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)) of two Gaussians, float64, as a float.

    The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of sqrt(A) B sqrt(A),
    which is symmetric, so the eigenvalues are real and can be had safely.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# ----------------------------------------------------------------------------------------------
# 7. Pictures
# ----------------------------------------------------------------------------------------------

def save_grid(path, x, columns, scale=2):
    """Pictures uint8 (N,3,32,32) as one PNG, row by row, each pixel drawn `scale` wide."""
    grid = torchvision.utils.make_grid(x.cpu(), columns, padding=1, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


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
    colours = ("#d1495b", "#00798c", "#7a5195")                     # three curves at most
    for (name, points), colour, height in zip(curves.items(), colours, (660, 705, 750)):
        pen.line([at(x, y) for x, y in points or [(x0, y0)]], colour, 5, "curve")
        pen.text((1370, height), name, colour, font, "rm")
    for place, text in ((765, 45), title), ((765, 865), x_label), ((90, 45), y_label):
        pen.text(place, text, "#111", font, "mm")
    image.resize((720, 450), Image.LANCZOS).save(path)


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

Run = collections.namedtuple("Run", "device bf16 out data made")


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
    data = load_data(settings.data, kind)
    if (most := len(data.train_y)) < settings.batch_size: sys.exit(f"error: --batch-size > {most}")
    find_classes(settings.classes, data.names)        # refuses unknown ones, early as well
    # bf16 has fp32's range, so unlike fp16 it needs no loss scaling; emulated, it is only slow.
    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"torch {torch.__version__} on {kind}, {'bf16' if bf16 else 'fp32'}; {most:,} pictures")
    made = {**dataclasses.asdict(settings), **dict.fromkeys(FREE_TO_CHANGE), "data": data.checksum}
    return Run(torch.device(kind), bf16, out, data, made)


def make_network(settings, run):
    """The UNet of `settings`, weights drawn from their seed, at the given width, or else the
    largest that the budget allows. Raises SystemExit, one line, if the given one can't be built."""
    for width in [settings.width] if settings.width else range(96, 0, -8):
        torch.manual_seed(settings.seed)
        try:
            return UNet(len(run.data.names), width, after_injection=settings.after_injection,
                        modulate=settings.modulate == "on").to(run.device)
        except (AssertionError, ValueError) as error:
            if settings.width: sys.exit(f"error: --width {width}: {error}")


def compile_network(net, how, run, batch):
    """torch.compile in place (so the weights keep their names) if `how`, "auto" or "on", asks for
    it. Where it fails, it fails at the first call: so a copy goes first, there and back, with a
    batch like training's, and training goes on without compiling."""
    if how == "on" or (how == "auto" and run.device.type == "cuda"):
        try:
            (probe := copy.deepcopy(net)).compile()
            x, y = run.data.train_x[:batch], run.data.train_y[:batch]
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                probe(to_model(x), y.float(), y).sum().backward()
            net.compile()
        except Exception as error:
            print(f"going on without torch.compile: {type(error).__name__}: {str(error)[:200]}")


def training_step(net, optimiser, x, y, t, drop_label, noise, schedule, clip_norm, bf16):
    """One gradient update on the first form of Eq. (3); returns the loss, 0-d, without waiting.

    x (B,3,32,32) in [-1,1], y (B,), t (B,), noise like x; drop_label (B,) is True where the label
    is to be hidden, so that the network learns "no class" too, which guidance needs [12].
    """
    log_snr = to_log_snr(t, schedule)
    alpha, sigma = to_alpha_sigma(log_snr)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x_t, labels = add_noise(x, noise, alpha, sigma), y.masked_fill(drop_label, net.classes)
        pred_v = net(x_t, log_snr, labels)
    loss = (velocity(x, noise, alpha, sigma) - pred_v).square().mean()
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    optimiser.step()
    return loss.detach()


def train(settings, command="python diffusion.py"):
    """Train [2.2], or go on with it, then sample; returns the validation loss.

    Raises SystemExit: 128 + its number after a signal (all saved), or one line if the loss is no
    longer finite or the checkpoint in the folder is of another run.
    """
    run, steps, batch = set_up(settings), settings.steps, settings.batch_size
    data, path = run.data, run.out / "checkpoint.pt"
    net = make_network(settings, run)
    average_net = copy.deepcopy(net).eval().requires_grad_(False)
    compile_network(net, settings.compile, run, batch)
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    # Low-discrepancy t [2.2]: each draw falls into a gap the earlier ones left, so a batch covers
    # [0,1] evenly and the loss estimate varies less. If the batch is a power of two, a place in it
    # keeps to its own part of [0,1], so nothing else here may depend on the place: the pictures
    # come in random order.
    sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=settings.seed)
    # All other chance comes from one generator on the device; sampling has its own, so a grid in
    # between changes nothing. An epoch is one random order of the pictures. `average` is of the
    # loss, over some 50 steps.
    random = torch.Generator(run.device).manual_seed(settings.seed)
    shuffle = lambda: torch.randperm(len(data.train_y), generator=random, device=run.device)
    step, position, seconds, history, order, average = 0, 0, 0.0, [], shuffle(), torch.zeros(())
    if path.exists():
        state = load_checkpoint(path, run.made, net)
        average_net.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        step, position, seconds, history, order, average = state["progress"]
        sobol.fast_forward(step * batch)
        # Each kind of device has its own kind of generator.
        if state["device"] == run.device.type: random.set_state(state["random"])
    order, average = order.to(run.device), average.to(run.device)      # checkpoints are on the CPU
    print(f"parameters:\n{parameter_table(net)}\n{path}: {step:,} of {steps:,} steps done")

    # Ctrl-C and SIGTERM leave a note, and the loop ends after its step. A second one kills at once.
    received, numbers, stop = [], (signal.SIGINT, signal.SIGTERM), False
    handle = lambda *handlers: [signal.signal(*pair) for pair in zip(numbers, handlers)]
    take_note = lambda number, _: received.append(number) or handle(signal.SIG_DFL, signal.SIG_DFL)
    former = handle(take_note, take_note)
    clock, clock_step = time.perf_counter(), step
    while step < steps and not stop:
        if position + batch > len(order):            # a rest smaller than a batch is left out
            order, position = shuffle(), 0
        chosen = order[position:position + batch]
        x, y = to_model(data.train_x[chosen]), data.train_y[chosen]
        flip, drop_label = torch.rand(2, batch, generator=random, device=run.device)
        x = torch.where(flip.view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)    # the one augmentation
        noise = torch.randn(x.shape, generator=random, device=run.device)
        t = sobol.draw(batch)[:, 0].to(run.device, non_blocking=True)
        if settings.timesteps == "independent":
            t = torch.rand(batch, generator=random, device=run.device)
        assert step < MAX_STEPS, "the step budget is spent"
        rate = learning_rate(step, steps, settings.max_lr, settings.warm_up)
        optimiser.param_groups[0]["lr"] = rate
        loss = training_step(net, optimiser, x, y, t, drop_label < settings.label_drop, noise,
                             settings.schedule, settings.clip_norm, run.bf16)
        update_ema(average_net, net, settings.ema, step)
        step, position = step + 1, position + batch
        average = average.lerp(loss, max(0.02, 1 / step))
        # Up to here nothing waits for the device. Reading a number does, so only now and then.
        validate, stop = step % settings.eval_every == 0 or step == steps, bool(received)
        grid = step % settings.grid_every == 0 and step < steps
        if not (step % settings.log_every == 0 or validate or grid or stop): continue
        if not torch.isfinite(average + sum(p.detach().sum() for p in net.parameters())):
            sys.exit(f"\nerror: loss not finite at step {step:,}: lower --max-lr, in another --out")
        took = time.perf_counter() - clock
        seconds, speed = seconds + took, (step - clock_step) * batch / took
        left = datetime.timedelta(seconds=int((steps - step) * batch / speed))
        row = dict(step=step, loss=average.item(), lr=rate, images_per_s=speed)
        line = (f"step {step:6,}/{steps:,}  loss {row['loss']:.4f}  lr {rate:.2e}  "
                f"{speed:7,.0f} images/s  left {left}")
        if validate:
            row["val_loss"], bins = validation_loss(average_net, data.test_x, data.test_y,
                                                    settings.schedule, run.bf16)
            row.update({f"bin{i}": value for i, value in enumerate(bins)})
            line += f"  val {row['val_loss']:.4f}: " + " ".join(f"{value:.3f}" for value in bins)
        print(line, end="\r" if sys.stdout.isatty() and not validate else "\n", flush=True)
        history.append(row)
        if validate or stop:
            write_log(run.out, history, steps)
            state = dict(made=run.made, settings=dataclasses.asdict(settings), net=net.state_dict(),
                         ema=average_net.state_dict(), optimiser=optimiser.state_dict(),
                         progress=(step, position, seconds, history, order, average),
                         random=random.get_state(), device=run.device.type)
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)     # `path` is always whole, old or new
        if grid: draw_demo(run.out / f"grid-{step:06}.png", average_net, run, settings)
        clock, clock_step = time.perf_counter(), step   # validation, files and grids don't count
    handle(*former)
    if received:
        print(f"\nstopped after step {step:,}, all saved in {path}. To go on:\n  {command}")
        sys.exit(128 + received[0])
    print(f"{step * batch:,} pictures in {seconds:,.1f} s, {step * batch / seconds:,.0f} images/s")
    if run.device.type == "cuda": print(f"peak {torch.cuda.max_memory_allocated() >> 20:,} MiB")
    draw_demo(run.out / f"grid-{step:06}.png", average_net, run, settings)
    for mode in (run_sample, run_interpolate, run_neighbours):
        mode(settings, run, average_net)
    # FID wants 10,000 samples, hours on a CPU, and has no meaning for drawn shapes.
    if run.device.type != "cpu" and settings.data != "shapes": run_fid(settings, run, average_net)
    else: print("FID is left out on a CPU, and of drawn shapes; the mode fid computes it")
    return history[-1]["val_loss"]


def write_log(out, history, steps):
    """log.csv and loss.png from the rows so far, whole each time, so that a run set back to its
    checkpoint leaves no rows of the steps it lost."""
    names = "step loss lr images_per_s val_loss bin0 bin1 bin2 bin3 bin4".split()
    lines = [",".join(str(row.get(name, "")) for name in names) for row in history]
    (out / "log.csv").write_text("\n".join([",".join(names), *lines, ""]))
    # The first losses, near 1, would flatten all that follows: cut at 0.5.
    curve = lambda key: [(row["step"], min(row[key], 0.5)) for row in history if key in row]
    plot(out / "loss.png", dict(train=curve("loss"), validation=curve("val_loss")),
         "Velocity loss, Eq. (3)", ("optimiser step", 0, steps), ("loss", 0, 0.5))


def sampling(settings, run):
    """What sample_set takes from the settings, as keywords; `say` prints progress and speed."""
    # Where no label was ever dropped, "no class" was not learnt: guidance would add noise.
    w, clock = settings.guidance if settings.label_drop > 0 else 0.0, time.perf_counter()
    def say(done, count):
        speed, end = done / (time.perf_counter() - clock), "\r" if done < count else "\n"
        print(f"sampled {done:,} of {count:,}, {speed:,.1f} a second", end=end, flush=True)
    return dict(seed=settings.sample_seed, steps=settings.sample_steps, eta=settings.eta, say=say,
                schedule=settings.sample_schedule.replace("same", settings.schedule), bf16=run.bf16,
                guidance=w, clip=settings.clip, batch=settings.sample_batch)


def choose_labels(settings, run, count):
    """Class numbers (count,) on the device: the classes asked for in turn, or if none were, all of
    them in an order drawn from the seed of samples."""
    random = torch.Generator().manual_seed(settings.sample_seed)
    order = torch.randperm(len(run.data.names), generator=random).tolist()
    classes = find_classes(settings.classes, run.data.names) or order
    return torch.tensor([classes[i % len(classes)] for i in range(count)], device=run.device)


def draw_demo(path, net, run, settings):
    """A row a class for ten classes (those asked for, or ten from all over the list), ten pictures
    each, as a PNG; always from the same noise, so that grids of one run compare."""
    names = run.data.names
    spread = torch.linspace(0, len(names) - 1, 10).long().tolist()
    classes = (find_classes(settings.classes, names) or spread)[:10]
    labels = torch.tensor(classes, device=run.device).repeat_interleave(10)
    save_grid(path, sample_set(net, labels, **sampling(settings, run)), columns=10)
    print(f"{path}: " + ", ".join(names[i] for i in classes))


def open_run(settings):
    """(run, averaged network) from the checkpoint that `settings` belong to."""
    run = set_up(settings)
    net = make_network(settings, run)
    run.made.pop("data")                    # other pictures than it was trained on may be at hand
    net.load_state_dict(load_checkpoint(run.out / "checkpoint.pt", run.made)["ema"])
    return run, net


def run_sample(settings, run, net):
    """Sample `count` pictures, none picked: samples.png (400 at most) and, for other tools,
    samples.npz with `samples` uint8 (N,32,32,3) and `labels`. Returns the pictures."""
    labels = choose_labels(settings, run, settings.count)
    x = sample_set(net, labels, **sampling(settings, run))
    save_samples(run.out / "samples.npz", x, labels)
    save_grid(run.out / "samples.png", x[:400], columns=max(8, math.isqrt(min(len(x), 400))))
    print(f"{run.out / 'samples.png'}, {run.out / 'samples.npz'}")
    return x


def save_samples(path, x, labels):
    """uint8 (N,3,32,32) and labels (N,) as a .npz: `samples` uint8 (N,32,32,3), `labels`."""
    np.savez_compressed(path, samples=x.permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())


def run_interpolate(settings, run, net, pairs=8):
    """Figure 3, middle: interpolations.png, a row a pair, ends included. Returns the pictures."""
    labels = choose_labels(settings, run, 2 * pairs).view(pairs, 2).T
    random = torch.Generator().manual_seed(settings.sample_seed)
    ends = torch.randn(2, pairs, 3, 32, 32, generator=random).to(run.device)
    x = interpolate(net, ends, labels, **sampling(settings, run))
    save_grid(run.out / "interpolations.png", x, columns=10)
    print(run.out / "interpolations.png")
    return x


def run_neighbours(settings, run, net, shown=16, k=4):
    """Figure 3, right: neighbours.png, samples each with its k nearest training pictures beside it.

    Says the median nearest distance of the samples and that of test pictures: a network that copies
    the training set comes much nearer to it than new photographs do [2.5]. A little nearer proves
    nothing, as smooth pictures are near to everything. Returns both medians.
    """
    labels = choose_labels(settings, run, settings.count)
    x = sample_set(net, labels, **sampling(settings, run)).to(run.device)
    distance, index, flipped = nearest_neighbours(x, run.data.train_x, k)
    random = torch.Generator().manual_seed(settings.sample_seed)
    test = torch.randperm(len(run.data.test_y), generator=random)[:max(settings.count, 500)]
    test_distance, _, _ = nearest_neighbours(run.data.test_x[test.to(run.device)], run.data.train_x)
    near = run.data.train_x[index[:shown].flatten()]
    near = torch.where(flipped[:shown].flatten()[:, None, None, None], near.flip(-1), near)
    tiles = torch.cat([x[:shown, None], near.view(-1, k, *x.shape[1:])], dim=1)
    save_grid(run.out / "neighbours.png", tiles.flatten(0, 1), columns=2 * (k + 1))
    medians = distance[:, 0].median().item(), test_distance.median().item()
    print(f"{run.out / 'neighbours.png'}: median distance to the nearest training picture "
          f"{medians[0]:.0f} ({len(x)} samples), {medians[1]:.0f} ({len(test)} test pictures)")
    return medians


def run_fid(settings, run, net):
    """FID as the coursework defines it: `fid_count` samples, classes as in the test set, against
    all test pictures; with the protocol, and the floor: as many training pictures against the test
    pictures. Returns FID, or None where its network can't be had; by then the samples are on disk.
    """
    count, data, how = settings.fid_count, run.data, sampling(settings, run)
    labels = data.test_y[torch.arange(count, device=run.device) % len(data.test_y)]
    x = sample_set(net, labels, **how)
    save_samples(run.out / "fid-samples.npz", x, labels)
    try:
        network = load_inception(settings.inception).to(run.device)
    except OSError as error:
        print(f"error: {error}. The samples are kept in {run.out / 'fid-samples.npz'}")
        return None
    def statistics(x):
        features = inception_features(network, x.to(run.device))
        return features.mean(0), torch.cov(features.T)
    kept = run.out / f"fid-reference-{count}.pt"            # the test pictures' and the floor
    if not kept.exists():
        test, draw = statistics(data.test_x), torch.Generator().manual_seed(0)
        real = torch.randperm(len(data.train_y), generator=draw)[:count].to(run.device)
        floor = frechet_distance(*statistics(data.train_x[real]), *test)
        torch.save(dict(test=test, floor=floor), kept)
    reference = torch.load(kept, weights_only=True)
    fid = frechet_distance(*statistics(x), *reference["test"])
    how = ", ".join(f"{key} {how[key]}" for key in "seed schedule steps eta guidance clip".split())
    print(f"FID {fid:.3f}{' (under 10,000 samples: not comparable)' * (count < 10_000)}\n"
          f"  {count:,} samples, {len(data.test_y):,} test pictures; {how}; EMA {settings.ema}\n"
          f"  Inception 2015-12-05, SHA-256 {INCEPTION_SHA256[:8]}; bicubic to 299 as clean-fid\n"
          f"  floor, as many training pictures in place of samples: {reference['floor']:.3f}")
    return fid


def run_schedules(out):
    """schedules.png in the folder `out`: log-SNR against t of the three noise schedules [2.3]."""
    t, out = torch.linspace(0, 1, 200), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves = {name: list(zip(t.tolist(), to_log_snr(t, name).tolist()))
              for name in ("cosine", "linear", "spliced")}
    plot(out / "schedules.png", curves, "Noise schedules", ("t", 0, 1), ("log-SNR", -20, 20))
    print(out / "schedules.png")


# ----------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------

def main(argv=None):
    """What `python diffusion.py ARGV` does; returns the result of the mode. Raises SystemExit, one
    line, for a command that can't be meant."""
    modes = dict(sample=run_sample, interpolate=run_interpolate, neighbours=run_neighbours,
                 fid=run_fid)                             # these need a trained network
    parser = argparse.ArgumentParser("diffusion.py", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"error: {message} (--help lists all flags)")
    parser.add_argument("mode", nargs="?", default="train",
                        choices=["train", *modes, "schedules"])
    hints = get_type_hints(Settings, include_extras=True)
    for name, hint in hints.items():
        choices, text = get_args(hint.__origin__), f"; default {getattr(Settings, name)!r}"
        kind = dict(choices=choices) if choices else dict(type=hint.__origin__)
        parser.add_argument("--" + name.replace("_", "-"), help=hint.__metadata__[0] + text, **kind)
    given = vars(parser.parse_args(argv))
    mode, command = given.pop("mode"), "python diffusion.py " + shlex.join(argv or sys.argv[1:])
    for name, value in given.items():
        low, high = hints[name].__metadata__[1:] or (value, value)
        if not low <= value <= high:                                      # nan fails as well
            parser.error(f"--{name.replace('_', '-')} {value} is not within {low} to {high}")
    shapes = given.get("data") == "shapes"
    given["out"] = given.get("out") or f"runs/diffusion-{'shapes' if shapes else 'cifar100'}"
    if shapes and mode == "train": given = {**SHAPES, **given}
    if given.get("recipe") == "paper": given = {**PAPER, **given}
    if mode == "train": return train(Settings(**given), command)
    if mode == "schedules": return run_schedules(given["out"])
    # A checkpoint knows how it was made, but not on which machine we are.
    made = load_checkpoint(Path(given["out"]) / "checkpoint.pt")["settings"]
    settings = Settings(**{**made, "device": "auto", "classes": "", **given})
    result = modes[mode](settings, *open_run(settings))
    return sys.exit(1) if result is None else result               # FID's network can't be had


if __name__ == "__main__":
    main()
