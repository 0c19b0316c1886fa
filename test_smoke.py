# SPDX-License-Identifier: MIT
"""What both scripts promise, as tests: `python test_smoke.py`, or under pytest. They need no
download and no GPU; if there is one, the last test uses it.

`python test_smoke.py resume shapes` runs only the tests whose names contain one of the words.
The tests come in the order of the scripts' sections.
"""
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from pathlib import Path
from unittest import mock

# The tests say what happens on a CPU, so torch must not see a GPU.
ENVIRONMENT = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import classifier
import diffusion

HERE = Path(__file__).resolve().parent
BOTH = (classifier, diffusion)


# --------------------------------------------------------------------------------------
# Help
# --------------------------------------------------------------------------------------


def few(draw):
    """draw_shapes of a script, but for at most 240 pictures, so that a run takes a second."""
    return functools.cache(lambda count, seed: draw(min(count, 240), seed))


for module in BOTH:
    module.draw_shapes = few(module.draw_shapes)


@functools.cache
def session():
    """The folder that all tests write into; it goes when the process ends."""
    return tempfile.TemporaryDirectory()


def new_folder():
    """A folder of a test's own."""
    return Path(tempfile.mkdtemp(dir=session().name))


def tiny(module, **given):
    """Settings of the smallest useful run of a script, but for those given."""
    small = dict(data="shapes", width=8, batch_size=40, steps=12, log_every=1, eval_every=4)
    if module is classifier:
        small.update(layers=1)
    else:
        small.update(count=4, sample_steps=2)
    small.update(given)
    small.update(out=str(given.get("out") or new_folder()))
    return module.choose_settings(**small)


def blank(net, labels, settings, start=None):
    """Stands in for diffusion.generate where no test looks at the pictures."""
    return torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)


def train(module, **given):
    """(what training returns, its folder), with tiny settings but for those given."""
    settings = tiny(module, **given)
    with quiet(), mock.patch.object(diffusion, "generate", blank):
        return module.train(settings), Path(settings.out)


def quiet():
    """A context in which what is printed goes into the text that it gives."""
    return contextlib.redirect_stdout(io.StringIO())


def command(module, *words):
    """(exit status or error, printed text) of `python module.py words`."""
    status = 0
    with quiet() as text, mock.patch.object(sys, "argv", ["", *map(str, words)]):
        try:
            module.main()
        except SystemExit as end:
            status = end.code
    return status, text.getvalue()


def python(*words, **options):
    """A finished process of Python with these words, in the repository's folder."""
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=HERE, capture_output=True, text=True, **options)


@contextlib.contextmanager
def raises(kind, words=""):
    """Fails unless what stands inside raises that kind of error, with the words in its text."""
    try:
        with quiet():
            yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def recorded(owner, name, calls):
    """A patch under which each call of a function leaves (arguments, result) in `calls`."""
    function = getattr(owner, name)

    def noting(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    return mock.patch.object(owner, name, noting)


def at_update(module, number, act):
    """A patch under which act() is called in the middle of that update of a training."""
    name = "one_cycle" if module is classifier else "learning_rate"
    rate = getattr(module, name)

    def acting(step, *rest):
        if step == number:
            act()
        return rate(step, *rest)

    return mock.patch.object(module, name, acting)


def load(path):
    """What a file of torch holds."""
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether all tensors in two dicts are equal to the bit."""
    a, b = [filter(torch.is_tensor, tree_leaves(part)) for part in (a, b)]
    return all(itertools.starmap(torch.equal, zip(a, b, strict=True)))


def checkpoint(out):
    """The checkpoint of a run, and the number of its last step."""
    state = load(out / "checkpoint.pt")
    return state, state["rows"][-1]["step"]


def same_run(out, other):
    """Whether two runs ended at the same step with the same weights and averages."""
    a, step = checkpoint(out)
    b, other_step = checkpoint(other)
    return step == other_step and same(a, b)


def random_pictures(*shape):
    """Pictures of random pixels, uint8."""
    random = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def as_bytes(pictures):
    """A list with the bytes of each picture, which a set can hold."""
    return [picture.numpy().tobytes() for picture in pictures]


def random_unet():
    """A small U-Net in evaluation mode, none of whose layers gives zeros only."""
    torch.manual_seed(0)
    net = diffusion.UNet(100, width=8).requires_grad_(False)
    for p in net.parameters():
        if not p.any():
            p.normal_(0, 0.2)
    return net.eval()


# --------------------------------------------------------------------------------------
# Layers and networks
# --------------------------------------------------------------------------------------


def test_parameter_counts_are_those_of_the_readme():
    cases = [
        (classifier, "ours", 93_924),
        (classifier, "paper", 98_804),
        (diffusion, "ours", 960_755),
        (diffusion, "paper", 946_587),
    ]
    for module, recipe, count in cases:
        net = module.build_network(module.choose_settings(recipe=recipe), 100)
        assert module.count_parameters(net) == sum(p.numel() for p in net.parameters()) == count


def test_paper_recipe_trains_and_samples_as_the_paper():
    """At the levels of the schedule itself; with DDPM's noise, w = 3 and dynamic clipping."""
    paper = diffusion.choose_settings(recipe="paper")
    assert (paper.log_snr_scale, paper.log_snr_shift) == (1, 0)
    assert (paper.eta, paper.guidance, paper.clip_x0) == (1, 3, "dynamic")


def test_depthwise_separable_is_filters_then_a_mixture():
    """Two filters for each channel here, and after each half a norm and SiLU."""
    layer = classifier.depthwise_separable(3, 5, filters_per_channel=2).eval()
    filters, mixture = layer[0].weight, layer[3].weight
    assert filters.numel() + mixture.numel() == 9 * 3 * 2 + 3 * 2 * 5
    x = torch.randn(4, 3, 8, 8)
    h = F.silu(layer[1](F.conv2d(x, filters, padding=1, groups=3)))
    assert_close(layer(x), F.silu(layer[4](F.conv2d(h, mixture))))
    assert isinstance(layer[1], nn.BatchNorm2d)


def attention_by_hand(layer, x, heads):
    """Softmax attention head by head on tokens (B,T,D), with the weights of a layer."""
    q, k, v = [part.chunk(heads, dim=2) for part in layer.qkv(x).chunk(3, dim=2)]
    mixed = []
    for i in range(heads):
        scores = q[i] @ k[i].mT / math.sqrt(q[i].shape[2])
        mixed.append(scores.softmax(dim=2) @ v[i])
    return layer.out(torch.cat(mixed, dim=2))


def test_attention_by_formula():
    layer = classifier.Attention(16)
    x = torch.randn(2, 9, 16)
    assert_close(layer(x), attention_by_hand(layer, x, heads=4))

    # In the U-Net it has 1 head per 64 channels, starts as the identity, and is residual.
    layer = diffusion.Attention(144)
    x = 3 * torch.randn(2, 144, 4, 5) + 1
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.out.weight)
    tokens = F.group_norm(x, 1).flatten(2).mT
    y = attention_by_hand(layer, tokens, heads=2).mT.view_as(x)
    assert_close(layer(x), x + y, atol=1e-4, rtol=1e-4)


def test_gated_mlp_with_local_gate_by_formula():
    """The gate of token row * 8 + column is a weighted sum over the gates around it."""
    layer = classifier.GatedMLP(8, 16, local=True)
    x = torch.randn(2, 64, 8)
    gates = F.pad(layer.gate(x).view(2, 8, 8, 16), (0, 0, 1, 1, 1, 1))
    around = gates[:, 3:6, 7:10]  # of row 3 and column 7, the last one
    gate = torch.einsum("brcd,drc->bd", around, layer.filter.weight[:, 0]) + layer.filter.bias
    token = 3 * 8 + 7
    y = layer.out(F.silu(gate) * layer.value(x[:, token]))
    assert_close(layer(x)[:, token], y)


def test_encoder_layers_are_pre_norm():
    """RMSNorm and no biases, or LayerNorm and biases."""
    x = 3 * torch.randn(2, 64, 8) + 1
    rms = x / x.square().mean(dim=2, keepdim=True).sqrt()
    for block, normed in [("llama", rms), ("gpt2", F.layer_norm(x, (8,)))]:
        layer = classifier.EncoderLayer(8, block)
        y = x + layer.attention(normed)
        assert_close(layer(x), y + layer.mlp(layer.norm2(y)), atol=1e-4, rtol=1e-4)
        assert (layer.attention.out.bias is None) == (block == "llama")


def test_fourier_positions_tell_rows_from_columns():
    table = classifier.fourier_positions(8, 16).view(8, 8, 2, 8)
    for row, column in [(0, 0), (3, 5), (7, 2)]:
        for place, wave in zip((row, column), table[row, column]):
            angles = math.pi * place * 8 ** -torch.tensor([0, 1 / 3, 2 / 3, 1])
            assert_close(wave, torch.cat([angles.sin(), angles.cos()]), atol=1e-5, rtol=0)


def test_classifier_by_its_diagram():
    """Tied layers are one, applied again; the variants of stem and head are in their place."""
    x = torch.randn(2, 3, 32, 32)
    for tied, stem, head in [("on", "residual", "single"), ("off", "plain", "pair")]:
        net = classifier.Classifier(100, 8, layers=3, tied=tied, stem=stem, head=head).eval()
        convolutions = [layer for layer in net.stem if isinstance(layer, nn.Sequential)]
        first, second, third, fourth = [nn.Sequential(*layer) for layer in convolutions]
        h = second(F.max_pool2d(first(x), 2))
        if stem == "plain":
            h = fourth(third(F.max_pool2d(h, 2)))
        else:
            h = h + third(h)
            h = F.max_pool2d(h + fourth(h), 2)
        h = h.flatten(2).mT + classifier.fourier_positions(8, 8)
        layers = 3 * list(net.encoder) if tied == "on" else net.encoder
        for layer in layers:
            h = layer(h)
        assert_close(net(x), net.head(net.norm(h).mean(dim=1)))


def test_blocks_of_the_unet_by_formula():
    """The embedding scales and shifts in a residual block, which starts as the identity, and is
    added in an injection."""
    x = torch.randn(2, 16, 4, 4)
    e = torch.randn(2, 12)
    block = diffusion.ResidualBlock(16, 12)
    assert torch.equal(block(x, e), x)
    nn.init.normal_(block.conv2[1].weight)
    scale, shift = block.modulate(e).view(2, 2, 16, 1, 1).unbind(1)
    h = block.conv1(F.silu(F.group_norm(x, 8)))
    h = F.group_norm(h, 8) * (1 + scale) + shift
    assert_close(block(x, e), x + block.conv2(F.silu(h)))

    injection = diffusion.Injection(12, 16, diffusion.regular_conv)
    h = F.group_norm(x + injection.project(e)[:, :, None, None], 8)
    assert_close(injection(x, e), x + injection.conv(F.silu(h)))


def test_unet_by_its_diagram():
    net = random_unet()
    x = torch.randn(2, 3, 32, 32)
    log_snr = torch.tensor([3.0, -2.0])
    labels = torch.tensor([7, 100])

    e = net.embed_log_snr(diffusion.sinusoidal_embedding(log_snr))
    e = F.silu(e + net.embed_class.weight[labels])
    first = net.down1(net.inject1(net.stem(x), e), e)
    second = net.down2(first, e)
    h = net.middle(net.inject2(net.down3(second, e), e), e)
    h = net.up2(net.join2(h).repeat_interleave(2, 2).repeat_interleave(2, 3) + second, e)
    h = net.up1(net.join1(h).repeat_interleave(2, 2).repeat_interleave(2, 3) + first, e)
    assert_close(net(x, log_snr, labels), net.out(h))
    assert not diffusion.UNet(100, 8)(x, log_snr, labels).any()  # untrained


def test_every_variant_takes_a_step():
    """Each of its weights gets a finite gradient."""
    nets = [
        classifier.Classifier(100, 8, block="gpt2", activation="gelu", positions="learned"),
        classifier.Classifier(100, 8, layers=0, positions="none", activation="relu"),
        classifier.Classifier(100, 8, downsample="strided", stem="plain", gate="plain"),
        diffusion.UNet(100, 8, after_injection="separable", modulate=False),
    ]
    for net in nets:
        inputs = [torch.randn(2, 3, 32, 32)]
        if net is nets[-1]:
            nn.init.normal_(net.out[-1].weight)
            inputs += [torch.zeros(2), torch.tensor([0, 1])]
        net(*inputs).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())


# --------------------------------------------------------------------------------------
# Data and augmentation
# --------------------------------------------------------------------------------------


def test_randaugment_makes_the_pixels_of_torchvision():
    """At each magnitude all results of torchvision's RandAugment are ours, and the reverse, but
    for a rounded pixel here and there."""
    x = random_pictures(1, 3, 32, 32)
    torch.manual_seed(0)
    for magnitude in (0, 6, 13, 30):
        kinds = itertools.product(classifier.OPERATIONS, [magnitude], (1, -1))
        ours = torch.cat([classifier.apply_operation(x, *kind) for kind in kinds])
        reference = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=31)
        theirs = torch.cat([reference(x) for _ in range(300)])
        distance = torch.cdist(ours.flatten(1).float(), theirs.flatten(1).float(), p=1) / 3072
        assert distance.min(dim=0).values.max() < 0.03, magnitude
        assert distance.min(dim=1).values.max() < 0.03, magnitude


def test_augmentation_draws_are_uniform():
    """Each picture meets each kind equally often, and stays at its place."""
    x = torch.arange(0, 200, 10)
    kinds = [(kind,) for kind in range(5)]
    count = torch.zeros(20, 5)
    for seed in range(500):
        random = torch.Generator().manual_seed(seed)
        changed = x.clone()
        classifier.change_parts(changed, torch.add, kinds, random)
        count += F.one_hot(changed - x, 5)
    assert 60 < count.min() and count.max() < 140  # 100 each, standard deviation 9


def test_every_crop_and_mirror_occurs():
    """A shift by up to four pixels with the mirror image coming in, half of the pictures
    mirrored: all 162 are equally frequent."""
    picture = random_pictures(3, 32, 32)
    padded = np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = set()
    for top, left in itertools.product(range(9), repeat=2):
        window = padded[:, top : top + 32, left : left + 32]
        windows |= {window.tobytes(), window[:, :, ::-1].tobytes()}
    x = picture.repeat(324, 1, 1, 1)
    found = as_bytes(classifier.augment(x, torch.Generator(), operations=0))
    assert sorted(found) == sorted(2 * list(windows))


def test_augment_takes_its_numbers():
    """So many operations, at that magnitude, in both directions."""
    kinds = set()

    def brighter(x, *kind):
        kinds.add(kind)
        return x + 1

    x = torch.zeros(56, 3, 32, 32)
    with mock.patch.object(classifier, "apply_operation", brighter):
        result = classifier.augment(x, torch.Generator(), 3, 17)
    assert result[0, 0, 16, 16] == 3
    assert kinds == set(itertools.product(classifier.OPERATIONS, [17], (1, -1)))


def test_ranges_of_pictures():
    """[0,255] becomes [-1,1] and returns; or mean 0 and variance 1; never twice."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = diffusion.to_model(x)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    assert torch.equal(diffusion.to_uint8(1.001 * scaled), x)

    x = random_pictures(50, 3, 32, 32)
    x[:, 1] //= 3
    y = classifier.normalise(x, classifier.channel_statistics(x))
    found = torch.std_mean(y, dim=(0, 2, 3))
    assert_close(found, (torch.ones(3), torch.zeros(3)), atol=1e-4, rtol=0)
    with raises(AssertionError, "uint8"):
        classifier.normalise(y, found)


def test_held_out_pictures_are_balanced_and_never_trained_on():
    """Nor are they in the statistics that pictures are normalised with."""
    y = torch.arange(300) % 10
    assert torch.bincount(y[classifier.held_out(y, 4)]).tolist() == 10 * [4]

    epochs = []

    def keep(x, *settings):
        epochs.append(sorted(as_bytes(x)))
        return x

    with mock.patch.object(classifier, "augment", keep):
        _, out = train(classifier, holdout=100)
    x, _, val_x, _, _ = classifier.load_data("shapes", holdout=100)
    assert not set(as_bytes(x)) & set(as_bytes(val_x))
    assert epochs[0] == sorted(as_bytes(x))
    statistics = load(out / "weights.pt")["statistics"]
    assert torch.equal(statistics, classifier.channel_statistics(x))


def test_data_folders_are_understood():
    """~ is the home; the folder inside is as good; only one that exists is downloaded into."""
    folder = new_folder()
    (folder / "inside").mkdir()
    cifar = mock.MagicMock(base_folder="inside", url="", __name__="CIFAR")
    cifar.return_value.data = np.zeros((1, 32, 32, 3), np.uint8)
    cifar.return_value.targets = [0]
    home = mock.patch.dict(os.environ, HOME=str(folder))
    for module in BOTH:
        with home, mock.patch.object(module, "DATASET", cifar):
            for path in ("~", folder / "inside", folder.parent):
                module.load_cifar(path)
            with raises(module.UserError, "no such folder"):
                module.load_cifar("shape")
        calls = [(*call.args, call.kwargs["download"]) for call in cifar.call_args_list[-6:]]
        assert calls[:4] == 2 * [(folder, True, False), (folder, False, False)]
        assert calls[4:] == [(folder.parent, True, True), (folder.parent, False, True)]


# --------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------


def test_schedules_fall_between_their_ends():
    t = torch.linspace(0, 1, 2001)
    ends = dict(cosine=[20, -20], linear=[9.21, -10], spliced=[20, -10])
    for name, expected in ends.items():
        log_snr = diffusion.SCHEDULES[name](t)
        assert (log_snr.diff() < 0).all(), name
        assert np.allclose(log_snr[[0, -1]], expected, atol=0.01), name

    # In between, by formula.
    t = torch.linspace(0.05, 0.95, 50).double()
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    assert_close(diffusion.cosine_schedule(t), -2 * (a * t + b).tan().log())
    assert_close(diffusion.linear_schedule(t), -((1e-4 + 10 * t**2).exp() - 1).log())


def test_spliced_schedule_joins_two_curves():
    """The cosine first, then the linear one, moved so that they meet, in value and slope."""
    shift = 0.80074257 - 0.48536712
    joint = 0.80074257 / (1 + shift)
    t = joint + torch.tensor([-0.3, -1e-4, -1e-6, 1e-6, 1e-4, 0.3]).double()
    u = (1 + shift) * t
    early = diffusion.cosine_schedule(u)
    late = diffusion.linear_schedule(u - shift)
    assert_close(diffusion.spliced_schedule(t), torch.where(t < joint, early, late))
    assert_close(early[1:5], late[1:5], atol=1e-3, rtol=0)


def test_equations_1_to_3():
    """The velocity is that of the way from picture to noise, it can be split again, and the
    objective has three forms."""
    log_snr = torch.linspace(-6, 6, 7).double()
    alpha, sigma = diffusion.to_alpha_sigma(log_snr)
    phi = torch.atan((-log_snr / 2).exp()).view_as(alpha)
    assert_close((alpha, sigma), (phi.cos(), phi.sin()))

    x, noise, guess = torch.randn(3, 7, 3, 4, 4).double()
    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    v = diffusion.velocity(x, noise, alpha, sigma)
    later = diffusion.add_noise(x, noise, (phi + 1e-6).cos(), (phi + 1e-6).sin())
    assert_close((later - x_t) / 1e-6, v, atol=1e-4, rtol=1e-4)
    assert_close(diffusion.split(x_t, v, alpha, sigma), (x, noise))

    pred_x0, pred_noise = diffusion.split(x_t, guess, alpha, sigma)
    ratio = log_snr.exp().view_as(alpha)
    loss = (v - guess).square()
    assert_close((ratio + 1) * (x - pred_x0).square(), loss)
    assert_close((1 / ratio + 1) * (noise - pred_noise).square(), loss)


# --------------------------------------------------------------------------------------
# Objective and optimisers
# --------------------------------------------------------------------------------------


def test_only_matrices_decay():
    """Where gradients are zero, they shrink by lr * decay, and nothing else moves."""
    for name in ("muon", "adamw"):
        net = classifier.Classifier(100, 8, positions="learned")
        before = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for optimiser in classifier.make_optimisers(net, 0.3, name):
            optimiser.param_groups[0]["lr"] = 0.1
            optimiser.step()
        for old, p in zip(before, net.parameters()):
            assert_close(p.detach(), old * (0.97 if p.ndim > 1 else 1))


def newton_schulz(x):
    """Five rounds for one matrix that has no more rows than columns."""
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_muon_by_formula():
    """Mean, Nesterov's step ahead, orthogonal direction, scale and decay, one matrix at a time:
    so that all of them lie in one stack, filled up with zeros, changes nothing."""
    shapes = [(5, 3), (4, 9), (6, 1, 3, 3), (20, 4)]
    weights = [nn.Parameter(torch.randn(shape).double()) for shape in shapes]
    expected = [p.detach().clone() for p in weights]
    means = [torch.zeros_like(p) for p in expected]
    muon = classifier.Muon(weights, weight_decay=0.2)
    for lr in (0.1, 0.02, 0.03):
        for i, p in enumerate(weights):
            p.grad = torch.randn_like(p)
            means[i] = 0.95 * means[i] + 0.05 * p.grad
            ahead = (0.95 * means[i] + 0.05 * p.grad).flatten(1)
            rows, columns = ahead.shape
            if rows <= columns:
                change = newton_schulz(ahead)
            else:
                change = newton_schulz(ahead.T).T * math.sqrt(rows / columns)
            expected[i] = expected[i] * (1 - lr * 0.2) - lr * change.view_as(p)
        muon.param_groups[0]["lr"] = lr
        muon.step()
    assert_close([p.detach() for p in weights], expected, atol=1e-5, rtol=1e-5)


def test_one_cycle_is_that_of_torch():
    """For one step more."""
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    reference = torch.optim.lr_scheduler.OneCycleLR(adamw, 0.01, total_steps=51)
    for step in range(50):
        group = adamw.param_groups[0]
        found = classifier.one_cycle(step, 50, 0.01)
        assert np.allclose(found, (group["lr"], group["betas"][0]), rtol=1e-6)
        adamw.step()
        reference.step()


def test_learning_rate_warms_up_and_falls_to_zero():
    half = 0.5 + 0.5 * math.cos(0.04 * math.pi)
    cases = [
        (499, 50_000, 1),
        (25_000, 50_000, 0.5),
        (49_999, 50_000, 0),
        (4, 100, 5 / 11 * half),
    ]
    for step, steps, share in cases:
        rate = diffusion.learning_rate(step, steps, 2e-3)
        assert math.isclose(rate, 2e-3 * share, rel_tol=1e-3, abs_tol=1e-10), step


def test_averaged_weights_by_formula():
    """Early updates count more, so that the random start is forgotten."""
    net = nn.Linear(3, 2)
    average = nn.Linear(3, 2)
    for step, decay in [(0, 0.1), (5, 0.4), (10_000, 0.95)]:
        expected = decay * average.weight.detach() + (1 - decay) * net.weight.detach()
        diffusion.update_ema(average, net, 0.95, step)
        assert_close(average.weight.detach(), expected)


# --------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------


def test_classifier_learns_what_is_said_of_pictures():
    """Each picture comes with its own label, once an epoch, in another order each time; the
    loss is cross-entropy with smoothed targets; the optimiser is the one asked for."""
    batches, losses, optimisers = [], [], []
    unchanged = mock.patch.object(classifier, "augment", lambda x, *rest: x)
    with unchanged, recorded(classifier, "normalise", batches):
        with recorded(F, "cross_entropy", losses):
            with recorded(classifier, "make_optimisers", optimisers):
                given = dict(weight_decay=0.3, optimiser="adamw")
                _, out = train(classifier, label_smoothing=0.3, eval_every=12, **given)
    assert optimisers[0][0][1:] == (0.3, "adamw")
    x, y, _, _, _ = classifier.load_data("shapes")
    label_of = dict(zip(as_bytes(x), y))

    seen = []
    for i, row in enumerate(checkpoint(out)[0]["rows"]):
        pictures = as_bytes(batches[i][0][0])
        logits, labels = losses[i][0]
        assert [label_of[picture] for picture in pictures] == labels.tolist()
        seen += pictures
        target = 0.7 * F.one_hot(labels, 100) + 0.3 / 100
        loss = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
        assert math.isclose(row["loss"], loss.item(), rel_tol=1e-4)
    first, second = seen[:240], seen[240:]
    assert sorted(first) == sorted(second) == sorted(label_of)
    assert first != second


def test_diffusion_learns_what_is_said_of_pictures():
    """Each picture once an epoch, in another order each time, half of them mirrored; some
    labels dropped; times that cover [0,1] evenly; the network is told the level that the
    picture has, scaled and shifted; the target is the velocity."""
    times, noised, calls = [], [], []
    linear = diffusion.linear_schedule
    straight = mock.patch.dict(diffusion.SCHEDULES, linear=lambda t: times.append(t) or linear(t))
    with straight, recorded(diffusion, "add_noise", noised):
        with recorded(diffusion.UNet, "forward", calls):
            given = dict(schedule="linear", batch_size=64, label_drop=0.3)
            given.update(log_snr_scale=0.5, log_snr_shift=1.5)
            _, out = train(diffusion, steps=8, eval_every=8, max_lr=0.1, **given)
    assert sorted((512 * torch.cat(times[:8])).int()) == list(range(512))

    x, y, _, _, _ = diffusion.load_data("shapes")
    both = as_bytes(torch.cat([x, x.flip(-1)]))
    numbers, labels = [], []
    for i, row in enumerate(checkpoint(out)[0]["rows"]):
        picture, noise, alpha, sigma = noised[i][0]
        (_, seen, log_snr, told), pred_v = calls[i]
        numbers += [both.index(one) for one in as_bytes(diffusion.to_uint8(picture))]
        labels += told
        assert_close(log_snr, 0.5 * linear(times[i]) + 1.5)
        assert_close(alpha.flatten(), log_snr.sigmoid().sqrt())
        assert_close(seen, alpha * picture + sigma * noise)
        loss = (alpha * noise - sigma * picture - pred_v).square().mean()
        assert math.isclose(row["loss"], loss.item(), rel_tol=1e-4)
        assert not torch.equal(noise, noised[i - 1][0][1]) and abs(noise.std() - 1) < 0.02

    order = np.array(numbers) % 240
    dropped = np.array(labels) == 100
    assert np.array_equal(np.where(dropped, 100, y[order]), labels)
    assert 0.2 < dropped.mean() < 0.4
    assert 0.4 < (np.array(numbers) >= 240).mean() < 0.6
    first, second = order[:192].tolist(), order[192:384].tolist()  # three batches each
    assert len(set(first)) == len(set(second)) == 192
    assert first != second


def gradient_norms(module, factor, **given):
    """The norm of the whole gradient when the weights are updated, at each of four steps, with
    a loss of another size: `factor` times as large for the classifier."""
    squares = []

    def note(optimiser, args, kwargs):
        weights = optimiser.param_groups[0]["params"]
        squares.append(sum(p.grad.square().sum().item() for p in weights))

    entropy, velocity = F.cross_entropy, diffusion.velocity
    steeper = mock.patch.object(F, "cross_entropy", lambda *a, **k: factor * entropy(*a, **k))
    larger = mock.patch.object(diffusion, "velocity", lambda *a: factor * velocity(*a))
    handle = register_optimizer_step_pre_hook(note)
    with steeper, larger:
        train(module, steps=4, **given)
    handle.remove()
    return np.sqrt(np.reshape(squares, (4, -1)).sum(axis=1))


def test_gradients_are_clipped_in_their_own_size():
    """At norm 1, and with fp16 after they are scaled down again."""
    for module in BOTH:
        small = gradient_norms(module, 0.1)
        assert (small < 0.9).all()
        assert np.allclose(gradient_norms(module, 0.1, precision="float16"), small, rtol=0.2)
        assert np.allclose(gradient_norms(module, 100), 1, atol=1e-3)


def test_both_learn_shapes():
    given = dict(steps=60, eval_every=60)
    _, out = train(classifier, max_lr=0.02, randaugment_ops=0, **given)
    assert checkpoint(out)[0]["rows"][-1]["train_acc"] > 0.1  # 0.01 is chance
    loss, _ = train(diffusion, ema=0.5, max_lr=5e-3, **given)
    assert loss < 0.5  # 0.7 before


def test_budgets_are_asserted():
    assert (classifier.MAX_STEPS, diffusion.MAX_STEPS) == (10_000, 50_000)
    for module, width in [(classifier, 88), (diffusion, 56)]:
        with raises(AssertionError, "too many"):
            train(module, width=width)
        out = new_folder()
        fewer = mock.patch.object(module, "MAX_STEPS", 3)
        with fewer, raises(AssertionError, "steps are spent"):
            train(module, eval_every=1, out=out)
        assert checkpoint(out)[1] == 3


def stop(module, number, out, sent=signal.SIGINT, **given):
    """Train until a signal comes in update `number`, counted from 0."""
    with at_update(module, number, lambda: signal.raise_signal(sent)):
        with raises(KeyboardInterrupt, "the same command goes on"):
            train(module, out=out, **given)
    assert checkpoint(out)[1] == number + 1


def test_resume_is_bit_exact():
    """After Ctrl-C and SIGTERM, in the middle and at the end of an epoch of six steps; and a
    run that has ended is measured again."""
    for module in BOTH:
        given = dict(log_every=50)
        result, whole = train(module, **given)
        out = new_folder()
        stop(module, 4, out, **given)
        stop(module, 5, out, signal.SIGTERM, **given)
        for _ in range(2):
            again, _ = train(module, out=out, **given)
            assert again == result
            assert same_run(out, whole)
        assert same(load(out / "weights.pt"), load(whole / "weights.pt"))


def killed(name, out):
    """What the process of the next test does: it ends in the middle of a training."""
    module = globals()[name]
    with at_update(module, 6, lambda: signal.raise_signal(signal.SIGKILL)):
        train(module, out=out)


def test_resume_after_kill_is_bit_exact():
    for module in BOTH:
        out = new_folder()
        code = f"import test_smoke; test_smoke.killed({module.__name__!r}, {str(out)!r})"
        assert python("-c", code).returncode == -signal.SIGKILL
        assert checkpoint(out)[1] == 4
        train(module, out=out)
        _, whole = train(module)
        assert same_run(out, whole)


def test_second_signal_ends_at_once_and_handlers_return():
    before = signal.getsignal(signal.SIGINT)
    for module in BOTH:
        with module.stop_requests() as received:
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL != before
        assert signal.getsignal(signal.SIGINT) == before


def test_training_in_a_thread():
    for module in BOTH:
        out = new_folder()
        thread = threading.Thread(target=train, args=(module,), kwargs=dict(out=out, steps=2))
        thread.start()
        thread.join()
        assert (out / "weights.pt").exists()


def test_run_with_other_settings_is_refused():
    """Nothing is written over, and --restart begins anew."""
    for module, name, value in [(classifier, "optimiser", "adamw"), (diffusion, "ema", 0.5)]:
        _, out = train(module)
        before = (out / "checkpoint.pt").read_bytes()
        for given in ({name: value}, dict(steps=13)):
            with raises(module.UserError, f"its {list(given)[0]} is"):
                train(module, out=out, **given)
        assert (out / "checkpoint.pt").read_bytes() == before
        _, fresh = train(module, seed=1)
        train(module, out=out, seed=1, restart=True)
        assert same_run(out, fresh)


def damages(good, path):
    """Contents of checkpoints, each damaged in another way, made from a good one."""
    state = load(path)
    net, made = state["net"], state["made"]
    name = next(iter(net))
    key = "optimiser" if "optimiser" in state else "large"
    averages = dict(state[key]["state"])
    averages[0] = {average: torch.zeros(1) for average in averages[0]}

    # A bit of a weight that is another one, in a file that is whole otherwise.
    at = good.find(net[name].numpy().tobytes())
    yield good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    yield good[:5000]
    for part in (
        dict(net={**net, name: net[name] * math.nan}),
        {key: dict(state[key], state=averages)},
        dict(made=dict(made, names=["cat"])),
        dict(rows=5),
    ):
        torch.save({**state, **part}, path)
        yield path.read_bytes()


def test_damaged_checkpoint_is_refused_and_kept():
    """So is that of another data set. The error names the file."""
    for module in BOTH:
        _, out = train(module, log_every=50)
        path = out / "checkpoint.pt"
        for content in list(damages(path.read_bytes(), path)):
            path.write_bytes(content)
            with raises(module.UserError, str(path)):
                train(module, out=out)
            assert path.read_bytes() == content


def test_failed_save_keeps_the_old_file_and_leaves_nothing_else():
    """As when a disk is full."""
    for module in (classifier, diffusion):
        path = new_folder() / "checkpoint.pt"
        module.save_whole(dict(step=1), path)
        with mock.patch.object(module.os, "replace", side_effect=OSError("full")):
            with raises(module.UserError, "full"):
                module.save_whole(dict(step=2), path)
        assert list(path.parent.iterdir()) == [path]
        assert load(path) == dict(step=1)


def test_weights_with_code_or_no_end_are_refused():
    path = new_folder() / "weights.pt"
    torch.save(dict(made=print), path)
    for module in BOTH:
        for file in (path, "/dev/zero"):
            with raises(module.UserError, str(file)):
                module.open_network(weights=str(file))


def test_second_run_in_a_folder_is_refused():
    """What the other one has saved stays."""
    for module in BOTH:
        path = new_folder() / "checkpoint.pt"
        other = at_update(module, 5, lambda: path.write_bytes(b"another"))
        with other, raises(module.UserError, "another run"):
            train(module, out=path.parent)
        assert path.read_bytes() == b"another"


def test_loss_that_is_not_finite_stops_and_saves_nothing():
    for module in BOTH:
        out = new_folder()
        row = dict(loss=math.nan)
        broken = mock.patch.object(module, "new_row", return_value=row)
        with at_update(module, 5, broken.start), raises(module.UserError, "not finite"):
            train(module, out=out)
        broken.stop()
        assert checkpoint(out)[1] == 4


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


class FirstPixel(nn.Module):
    """Its logits are the colours of a picture's first pixel. As a CUDA graph does, each call
    overwrites what the last one returned."""

    answer = torch.empty(250, 3)

    def forward(self, x):
        return self.answer[: len(x)].copy_(x[:, :, 0, 0])


def test_evaluation_by_formula():
    """Cross-entropy, accuracy and its spread over thousands, whatever the batch."""
    x = random_pictures(2300, 3, 32, 32)
    y = torch.arange(2300) % 3
    ones = torch.ones(2, 1, 3, 1, 1)
    logits = x[:, :, 0, 0] / 255 - 1
    hits = (logits.argmax(dim=1) == y).float().numpy()
    spread = np.std([hits[:1000].mean(), hits[1000:2000].mean(), hits[2000:].mean()])
    expected = F.cross_entropy(logits, y), hits.mean(), spread
    assert np.allclose(classifier.evaluate(FirstPixel(), x, y, ones), expected, rtol=1e-4)

    # A network is measured in evaluation mode.
    net = classifier.Classifier(100, 8)
    loss, _, _ = classifier.evaluate(net, x[:250], y[:250], ones)
    with torch.no_grad():
        logits = net.eval()(classifier.normalise(x[:250], ones))
    assert math.isclose(loss, F.cross_entropy(logits, y[:250]), rel_tol=1e-5)


def test_six_views():
    """Up to one pixel along the diagonal, and mirrored; the answer is the mean of the six."""
    x = random_pictures(2, 3, 32, 32)
    padded = F.pad(x.float(), (1, 1, 1, 1), mode="reflect").byte()
    expected = []
    for start in range(3):
        view = padded[:, :, start : start + 32, start : start + 32]
        expected += [view, view.flip(-1)]
    assert sorted(as_bytes(classifier.six_views(x))) == sorted(as_bytes(expected))

    mean = torch.stack([view[:, :, 0, 0] / 255 - 1 for view in expected]).mean(dim=0)
    ones = torch.ones(2, 1, 3, 1, 1)
    assert_close(classifier.predict_logits(FirstPixel(), x, ones, tta=True), mean)


def test_eval_gives_the_figure_of_training():
    """Again from weights.pt, and on the test set where a hold-out was validated on."""
    accuracy, out = train(classifier, steps=40, holdout=100, randaugment_ops=0)
    line = ["eval", "--data", "shapes", "--out", str(out)]
    with quiet():
        assert classifier.run(line) == accuracy > 0
        tested = classifier.run([*line, "--holdout", "0"])
        net, _, statistics, _ = classifier.open_network(out=str(out))
    _, _, x, y, _ = classifier.load_data("shapes")
    assert tested == classifier.evaluate(net, x, y, statistics)[1]
    assert same(net.state_dict(), checkpoint(out)[0]["net"])


def test_validation_loss_is_of_test_pictures_at_fixed_noise():
    calls = []

    def zero(x_t, log_snr, labels):
        calls.append((x_t, log_snr, labels))
        return torch.zeros_like(x_t)

    _, _, x, y, _ = diffusion.load_data("shapes")
    scores = diffusion.validate(zero, x, y, diffusion.spliced_schedule)
    assert scores == diffusion.validate(zero, x, y, diffusion.spliced_schedule)
    x_t, log_snr, labels = calls[0]
    assert_close(log_snr, diffusion.spliced_schedule((torch.arange(240) + 0.5) / 240))

    # Zero's error is the velocity itself: alpha² for the noise, sigma² for the picture.
    pictures = diffusion.to_model(x)
    losses = log_snr.sigmoid() + (-log_snr).sigmoid() * pictures.square().mean()
    assert math.isclose(scores["val_loss"], losses.mean(), rel_tol=0.02)

    # At the cleanest levels one still sees whose label it is.
    nearest = torch.cdist(x_t[:20].flatten(1), pictures.flatten(1)).argmin(dim=1)
    assert torch.equal(y[nearest], labels[:20])


def test_validation_and_weights_are_of_the_averaged_network():
    """weights.pt holds what was validated, rounded to fp16, and not the raw weights."""
    out = new_folder()
    stop(diffusion, 19, out, steps=60, eval_every=20, max_lr=0.02)
    state, _ = checkpoint(out)
    half = {name: value.half() for name, value in state["ema"].items()}
    assert same(load(out / "weights.pt")["net"], half)

    _, _, x, y, _ = diffusion.load_data("shapes")
    net = random_unet()
    losses = []
    for weights in (state["ema"], state["net"]):
        net.load_state_dict(weights)
        losses.append(diffusion.validate(net, x, y, diffusion.linear_schedule)["val_loss"])
    validated = state["rows"][-1]["val_loss"]
    assert math.isclose(losses[0], validated, rel_tol=1e-5)
    assert abs(losses[1] / validated - 1) > 0.01


# --------------------------------------------------------------------------------------
# Guidance and sampler
# --------------------------------------------------------------------------------------


def test_guidance_is_equation_4():
    """w = 0 is none, w = -1 ignores the class; embeddings do for class numbers."""
    net = random_unet()
    x = torch.randn(2, 3, 32, 32)
    log_snr = torch.full((2,), 0.7)
    labels = torch.tensor([3, 8])
    wanted = net(x, log_snr, net.embed_class.weight[labels])
    none = net(x, log_snr, torch.tensor([100, 100]))
    for w, expected in [(0, wanted), (-1, none), (3, 4 * wanted - 3 * none)]:
        guided = diffusion.guided_velocity(net, labels, w)(x, 0.7)
        assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_clipping_of_guesses():
    x = torch.randn(2, 3, 32, 32) * torch.tensor([0.2, 5.0]).view(2, 1, 1, 1)
    assert torch.equal(diffusion.clip_picture(x, "none"), x)
    assert torch.equal(diffusion.clip_picture(x, "static"), x.clamp(-1, 1))
    y = diffusion.clip_picture(x, "dynamic")
    limit = np.quantile(x[1].abs(), 0.995)
    assert torch.equal(y[0], x[0])
    assert_close(y[1], x[1].clamp(-limit, limit) / limit)


def scales(log_snr):
    """alpha and sigma, as numbers."""
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


def test_sampler_draws_from_a_gaussian():
    """With the exact velocity for data N(0.4, 0.3²), DDIM goes the exact way, its error halved
    by twice the steps, and DDPM's samples have that mean and deviation."""

    def model(x, log_snr):
        alpha, sigma = scales(log_snr)
        gain = alpha * 0.09 / (alpha**2 * 0.09 + sigma**2)
        x0 = 0.4 + gain * (x - alpha * 0.4)
        return (alpha * x - x0) / sigma

    def sample(x, steps, eta):
        t = torch.linspace(1, 0, steps + 1)[:-1].double()
        return diffusion.ddim_sample(model, x, diffusion.cosine_schedule(t), eta)

    x = torch.linspace(-2, 2, 9).double().view(-1, 1, 1, 1)
    coarse, fine = [(sample(x, steps, 0.0) - 0.4 - 0.3 * x).abs().max() for steps in (40, 80)]
    assert 1.6 < coarse / fine < 2.4 and fine < 0.05

    y = sample(torch.randn(20_000, 1, 1, 1).double(), 600, 1.0)
    assert abs(y.mean() - 0.4) < 0.01 and abs(y.std() - 0.3) < 0.007


def test_noise_of_one_step_is_ddpms_posterior():
    """With eta = 1 the fresh noise has the variance of Bayes' rule; the rest of the next
    level's variance is the noise found, for which a clipped guess counts."""
    log_snrs = torch.tensor([-2.0, 0.5])
    (alpha, sigma), (next_alpha, next_sigma) = map(scales, log_snrs.tolist())
    ratio = alpha / next_alpha
    added = sigma**2 - ratio**2 * next_sigma**2
    variance = 1 / (1 / next_sigma**2 + ratio**2 / added)
    for guess, clip, eta in [(0.3, "none", 0.0), (0.3, "none", 0.6), (1.7, "static", 1.0)]:
        seen = []

        def model(x_t, log_snr):
            seen.append(x_t.item())
            alpha, sigma = scales(log_snr)
            return (alpha * x_t - guess) / sigma

        x = torch.full((1, 1, 1, 1), 0.5)
        diffusion.ddim_sample(model, x, log_snrs, eta, clip, draw_noise=torch.ones_like)
        picture = min(guess, 1)
        fresh = eta * math.sqrt(variance)
        noise = (0.5 - alpha * picture) / sigma
        kept = math.sqrt(next_sigma**2 - fresh**2)
        expected = next_alpha * picture + kept * noise + fresh
        assert math.isclose(seen[1], expected, rel_tol=1e-5), eta


# --------------------------------------------------------------------------------------
# Samples and interpolation
# --------------------------------------------------------------------------------------


def test_sample_does_not_depend_on_how_many():
    """It does depend on its place, its class and its seed."""
    net = random_unet()
    labels = torch.tensor([3, 1, 4, 3, 5])
    settings = tiny(diffusion, eta=1.0)
    reseeded = dataclasses.replace(settings, sample_seed=1)
    with quiet(), mock.patch.object(diffusion, "SAMPLE_BATCH", 3):
        x = diffusion.generate(net, labels, settings).int()
        assert (x[:4] - diffusion.generate(net, labels[:4], settings)).abs().max() <= 1
        others = [x[3], diffusion.generate(net, labels + 1, settings)[0]]
        others.append(diffusion.generate(net, labels, reseeded)[0])
    assert all((x[0] - other).abs().max() > 9 for other in others)


def test_sampling_settings_arrive():
    """And there is no guidance where no label was dropped in training."""
    given = dict(sample_schedule="spliced", sample_steps=4, eta=0.3, clip_x0="dynamic")
    for label_drop, w in [(0.1, 1.5), (0.0, 0.0)]:
        sampled, guided = [], []
        settings = tiny(diffusion, guidance=1.5, label_drop=label_drop, **given)
        with quiet(), recorded(diffusion, "ddim_sample", sampled):
            with recorded(diffusion, "guided_velocity", guided):
                diffusion.generate(random_unet(), torch.tensor([2]), settings)
        _, _, log_snrs, *others = sampled[0][0]
        t = torch.tensor([1, 0.75, 0.5, 0.25])
        assert_close(log_snrs, diffusion.spliced_schedule(t))
        assert others[:2] == [0.3, "dynamic"] and guided[0][0][2] == w


def test_slerp_stays_on_the_sphere():
    a, b = torch.eye(4)[:2].view(2, 1, 2, 2)
    expected = math.cos(0.3 * math.pi / 2) * a + math.sin(0.3 * math.pi / 2) * b
    assert_close(diffusion.slerp(a, b, torch.tensor([0.3])), expected)
    assert_close(diffusion.slerp(a, a, torch.tensor([0.5])), a)  # not a division by 0


def test_interpolation_goes_from_sample_to_sample():
    """The outer pictures are those that the ends give, without fresh noise; the classes change
    as well."""
    net = random_unet()
    ends = torch.randn(2, 1, 3, 32, 32).expand(2, 3, 3, 32, 32)
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with quiet():
        x = diffusion.interpolate(net, ends, labels, tiny(diffusion, eta=1.0), count=3)
        x = x.int().unflatten(0, (3, 3))
        for i, place in [(0, 0), (1, 2)]:
            expected = diffusion.generate(net, labels[i], tiny(diffusion, eta=0.0), ends[i])
            assert (x[:, place] - expected).abs().max() <= 1
    assert (x[0, 1] - x[1, 1]).abs().max() > 9


def test_class_names_are_understood():
    """Case and underscores don't matter, what is near is suggested, and by default all
    classes come once before one comes twice."""
    names = ["rose", "aquarium_fish", "whale"]
    assert diffusion.find_classes("Rose, Aquarium Fish,aquarium_FISH", names) == [0, 1, 1]
    with raises(diffusion.UserError, "there is rose"):
        diffusion.find_classes("rosse", names)
    mixed = diffusion.pick_labels(tiny(diffusion), names, 6).tolist()
    assert sorted(mixed[:3]) == sorted(mixed[3:]) == [0, 1, 2]


def test_modes_write_what_they_say():
    """They draw as training was told; samples.npz is as other programs read it."""
    _, out = train(diffusion, guidance=1.25)
    calls = []
    with recorded(diffusion, "generate", calls):
        for mode in ("sample", "interpolate", "neighbours"):
            assert command(diffusion, mode, "--out", out, "--data", "shapes")[0] == 0
    samples = np.load(out / "samples.npz")
    (_, labels, settings), x = calls[0]
    assert settings.guidance == 1.25
    assert np.array_equal(samples["arr_0"], x.permute(0, 2, 3, 1))
    assert np.array_equal(samples["arr_1"], labels)
    with Image.open(out / "samples.png") as image:
        assert np.array_equal(np.asarray(image)[2:66:2, 2:66:2], samples["arr_0"][0])


def test_new_schedule_is_drawn():
    straight = mock.patch.dict(diffusion.SCHEDULES, straight=torch.neg)
    with quiet(), straight, mock.patch.object(diffusion, "plot") as plot:
        diffusion.schedules_mode(tiny(diffusion))
    assert list(plot.call_args[0][1]) == ["t", "cosine", "linear", "spliced", "straight"]


# --------------------------------------------------------------------------------------
# Neighbours and FID
# --------------------------------------------------------------------------------------


def test_nearest_neighbours_are_exact_and_mirrored():
    pictures = random_pictures(40, 3, 8, 8)
    queries = pictures.flip(-1) // 2 + pictures.roll(1, 0) // 3
    distance, near = diffusion.nearest_neighbours(queries, pictures, k=2)
    both = torch.cat([pictures, pictures.flip(-1)])
    exact = torch.cdist(queries.flatten(1).double(), both.flatten(1).double())
    values, index = exact.topk(2, largest=False)
    assert_close(distance, values.float(), rtol=1e-3, atol=0)
    assert torch.equal(near, both[index])
    assert index.min() < 40 <= index.max()


def test_frechet_distance_by_closed_form():
    """2x2 matrices have a square root in closed form, also where they don't commute."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    shift = torch.tensor([0.3, -0.4]).double()
    root = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    expected = 0.25 + a.trace() + b.trace() - 2 * root
    found = diffusion.frechet_distance(shift, a, 0 * shift, b)
    assert math.isclose(found, expected, rel_tol=1e-6)


class MeanColours(nn.Module):
    """Stands in for the FID network: its features are the mean colours."""

    def layers(self, x):
        assert x.shape[2:] == (299, 299) and x.abs().max() <= 1
        return x.mean(dim=(2, 3))


def test_fid_compares_samples_with_test_pictures():
    """With the classes that these have; its floor takes training pictures."""
    train_x, _, test_x, test_y, names = diffusion.load_data("shapes")
    drawn, found, measured = [], [], []
    samples = mock.patch.object(diffusion, "generate", lambda *args: test_x.flip(0))
    network = mock.patch.object(diffusion, "load_inception", lambda path: MeanColours())
    with quiet(), samples, network, recorded(diffusion, "generate", drawn):
        with recorded(diffusion, "feature_statistics", measured):
            with recorded(diffusion, "frechet_distance", found):
                fid = diffusion.fid_mode(random_unet(), names, tiny(diffusion, count=240))
    assert torch.equal(drawn[0][0][1], test_y)
    assert fid == found[0][1] < 1e-5 < found[1][1]
    seen = as_bytes(args[1] for args, _ in measured)
    assert seen == as_bytes([test_x, test_x.flip(0), train_x])


def test_covariance_of_features_is_unbiased():
    colours = random_pictures(60, 3)
    x = colours[:, :, None, None].expand(60, 3, 4, 4)
    _, covariance = diffusion.feature_statistics(MeanColours(), x)
    features = colours / 128 - 1
    assert np.allclose(covariance, np.cov(features.T), rtol=1e-3, atol=1e-4)


def test_fid_without_its_network_draws_nothing():
    wrong = new_folder() / "wrong.pt"
    wrong.write_bytes(b"wrong")
    stand_ins = dict(get_dir=lambda: str(new_folder()), download_url_to_file=None)
    names = diffusion.draw_shapes(1, 1)[2]
    for path, why in [("", "not callable"), (wrong, "SHA-256"), ("no/such", "No such file")]:
        settings = tiny(diffusion, inception=str(path))
        offline = mock.patch.multiple(torch.hub, **stand_ins)
        with offline, mock.patch.object(diffusion, "generate", None):
            with raises(diffusion.UserError, why):
                diffusion.fid_mode(random_unet(), names, settings)


# --------------------------------------------------------------------------------------
# Support
# --------------------------------------------------------------------------------------


def test_log_is_a_table_of_the_run():
    """Where it can't be written, training goes on."""
    for module in BOTH:
        _, out = train(module, log_every=3, eval_every=6)
        lines = (out / "log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == "step 1 3 6 9 12".split()

        shut = new_folder()
        (shut / "log.csv").mkdir()
        train(module, out=shut)
        assert same_run(shut, out)


def test_training_stays_on_the_device():
    """Three steps on a GPU that is not there: nothing meets a tensor of another device, and no
    number is read back between rows. (Fake tensors raise an error where one is.)"""
    cuda = torch.device("cuda")
    mode = FakeTensorMode()
    for module in BOTH:
        settings = tiny(module, steps=3, log_every=50, eval_every=50, precision="float32")
        moving = mock.patch.object(nn.Module, "to", lambda net, *args, **kwargs: net)
        with mode, cuda, moving:
            net = module.build_network(settings, 100)
            x = torch.zeros(240, 3, 32, 32, dtype=torch.uint8)
            y = torch.zeros(240, dtype=torch.int64)

        # A backward pass on a GPU wants a driver.
        def backward(loss):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)

        names = [name for name in dir(module) if re.match("save_|report|.*_mode$", name)]
        stand_ins = dict.fromkeys([*names, "new_row", "validate", "show_row"], mock.MagicMock())
        stand_ins.update(
            set_up=lambda settings: cuda,
            build_network=lambda *args: net,
            load_data=lambda *args: (x, y, x, y, list(range(100))),
            seeded_generator=lambda *args: None,
        )
        with (
            quiet(),
            mode,
            mock.patch.multiple(module, **stand_ins),
            mock.patch.object(diffusion.copy, "deepcopy", lambda net: net),
            mock.patch.object(torch.quasirandom, "SobolEngine") as sobol,
            moving,
            mock.patch.object(torch.Tensor, "backward", backward),
        ):
            sobol.return_value.draw = lambda count: torch.zeros(count, 1)
            module.train(settings)


def test_shapes_are_the_same_pictures_for_the_same_seed():
    """Alike in both scripts, of 100 classes; all white ones are white."""
    x, y, names = classifier.draw_shapes(240, seed=3)
    again, labels, _ = diffusion.draw_shapes(240, seed=3)
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert not torch.equal(x, classifier.draw_shapes(240, seed=4)[0])
    white = [names[label].startswith("white") for label in y]
    assert x[white].amin(dim=1).amax() > 230 > x[~torch.tensor(white)].amin(dim=1).amax()


def test_flags_are_checked():
    """One line says what is wrong, and the process ends with an error."""
    wrong = "nosuchmode,--steps 0,--steps 50001,--width 10,--precision half,--max-lr nan"
    for module in BOTH:
        for line in wrong.split(","):
            status, _ = command(module, *line.split())
            assert status.startswith("error: ") and "\n" not in status, line
    assert diffusion.parse(["sample", "--guidance", "-1e-1"]) == ("sample", dict(guidance=-0.1))
    words, _ = classifier.parse(["predict", "--width", "8", "--", "-cat.png"])
    assert words == ["predict", "-cat.png"]


def test_predict_goes_on_after_a_bad_file():
    """It reads folders, any size and mode, white where transparent; status 1 at the end."""
    _, out = train(classifier)
    folder = new_folder()
    Image.new("RGBA", (60, 40), (255, 0, 0, 0)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    Image.new("L", (20, 20)).save(folder / "c.png")
    status, text = command(classifier, "predict", folder, "no.png", "--out", out)
    assert status == "error: not all files could be read"
    assert [line.count("%") for line in text.splitlines()] == [0, 5, 0, 5, 0]
    assert classifier.open_picture(folder / "a.png")[0, :, 4, 1].tolist() == [255, 255, 255]


def test_scripts_run_on_any_console():
    """Without docstrings, where only ASCII can be shown, and without a stdout."""
    out = new_folder()
    picture = out / "猫.png"
    Image.new("RGB", (32, 32)).save(picture)
    train(classifier, out=out, steps=1)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python("-OO", "classifier.py", "predict", picture, "--out", out, env=ascii_only)
    assert done.returncode == 0 and "?.png: " in done.stdout, done.stderr
    closed = f"{shlex.quote(sys.executable)} diffusion.py schedules --out {out} >&-"
    assert subprocess.run(closed, shell=True, cwd=HERE).returncode == 0


# --------------------------------------------------------------------------------------
# Repository
# --------------------------------------------------------------------------------------


def test_weights_in_the_repository():
    """They name the apple, and know what is noise on it."""
    x = classifier.open_picture(HERE / ".github/apple.png")
    folder = f"{HERE}/.weights"
    with quiet():
        net, names, statistics, _ = classifier.open_network(weights=f"{folder}/classifier.pt")
        unet, _, _ = diffusion.open_network(weights=f"{folder}/diffusion.pt")
    apple = names.index("apple")
    logits = classifier.predict_logits(net, x, statistics, tta=True)
    assert logits.softmax(dim=1)[0, apple] > 0.5

    picture = diffusion.to_model(x)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    x_t = (picture + noise) / math.sqrt(2)
    v = (noise - picture) / math.sqrt(2)
    error = unet(x_t, torch.zeros(1), torch.tensor([apple])) - v
    assert error.square().mean() < 0.06


def test_readme_commands_are_valid():
    """Each has a mode that there is and flags that may have these values."""
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"^python (classifier|diffusion)\.py(.*)$", text, re.MULTILINE)
    commands += re.findall(r"`python (classifier|diffusion)\.py([^`]*)`", text)
    assert len(commands) > 8
    for script, rest in commands:
        module = globals()[script]
        begun = dict(set_up=mock.DEFAULT, make_folder=mock.DEFAULT)
        with mock.patch.multiple(module, **begun) as parts:
            for part in parts.values():
                part.side_effect = InterruptedError
            with mock.patch.object(Path, "is_file", lambda path: True):
                with raises(InterruptedError):
                    module.run(shlex.split(rest, comments=True))


def test_readme_notebook_lines_run():
    """One block after another; only drawing takes too long here."""
    text = (HERE / "README.md").read_text().replace('".', f'"{HERE}/.')
    lines = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    grids = mock.Mock()
    with quiet() as printed, mock.patch.multiple(diffusion, generate=blank, save_grid=grids):
        exec(lines, {})
    assert [len(call.args[1]) for call in grids.call_args_list] == [32, 10]
    assert "apple tensor(0." in printed.getvalue()


def test_readme_names_what_there_is():
    """Its links lead to files and to sections of the scripts, its flags are those of one."""
    text = (HERE / "README.md").read_text()
    for label, target in re.findall(r"\[([^\[\]]*)\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert path.startswith("http") or (HERE / path).exists(), target
        if re.fullmatch(r"L\d+", anchor):
            lines = (HERE / path).read_text().splitlines()
            assert label.split()[-1] in lines[int(anchor[1:]) - 1], label
    for flag in re.findall(r"`--([a-z0-9-]+)", text):
        name = flag.replace("-", "_")
        assert flag == "help" or any(hasattr(module.Settings, name) for module in BOTH), flag


COPIED = {
    (classifier, "depthwise_separable"): (3, 4),
    (classifier, "Attention"): (8,),
    (classifier, "GatedMLP"): (8, 16),
    (classifier, "fourier_positions"): (8, 8),
    (diffusion, "cosine_schedule"): (torch.ones(2),),
    (diffusion, "to_alpha_sigma"): (torch.ones(2),),
    (diffusion, "slerp"): (torch.ones(1, 4), torch.eye(1, 4), torch.ones(1)),
}


def test_pieces_copy_alone():
    """Layers and functions run outside their script, with nothing but torch and math."""
    for (module, name), args in COPIED.items():
        space = dict(math=math, torch=torch, nn=nn, F=F)
        exec(inspect.getsource(getattr(module, name)), space)
        assert str(space[name](*args)) == str(getattr(module, name)(*args)), name


def test_real_gpu():
    """Where there is an NVIDIA GPU, both scripts train on it, compiled, stop, go on, and draw."""
    if not shutil.which("nvidia-smi"):
        raise unittest.SkipTest("no NVIDIA GPU")
    for module in BOTH:
        out = new_folder()
        line = f"-u {module.__name__}.py --data shapes --steps 30 --log-every 1 --out {out}"
        line = [sys.executable, *line.split()]
        options = dict(cwd=HERE, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        process = subprocess.Popen(line, **options)
        assert "cuda" in process.stdout.readline()
        for printed in process.stdout:
            assert "without torch.compile" not in printed
            if printed.startswith("step 5 "):
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130 and 5 <= checkpoint(out)[1] < 30
        assert subprocess.run(line, **options).returncode == 0
        losses = [row["loss"] for row in checkpoint(out)[0]["rows"]]
        assert len(losses) == 30 and losses[-1] < losses[0]


# --------------------------------------------------------------------------------------


def main():
    """Run the tests whose names contain a word of the command line, or all of them."""
    words = sys.argv[1:] or [""]
    counts = {"passed": 0, "failed": 0, "left out": 0}
    for name, test in list(globals().items()):
        if not name.startswith("test_") or not any(word in name for word in words):
            continue
        start = time.perf_counter()
        torch.manual_seed(0)
        verdict = "passed"
        try:
            test()
        except unittest.SkipTest:
            verdict = "left out"
        except (Exception, SystemExit):
            verdict = "failed"
            traceback.print_exc()
        counts[verdict] += 1
        print(f"{time.perf_counter() - start:5.1f} s  {verdict}  {name}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(counts["failed"] > 0 or not any(counts.values()))


if __name__ == "__main__":
    main()
