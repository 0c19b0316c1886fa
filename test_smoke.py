# SPDX-License-Identifier: MIT
"""Tests of both scripts: `python test_smoke.py`, or under pytest. No download, no GPU.

`python test_smoke.py resume shapes` runs only the tests whose names contain one of the words.
"""
import ast
import contextlib
import csv
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import classifier
import diffusion

HERE = Path(__file__).parent
SCRIPTS = ["classifier.py", "diffusion.py"]


# ------------------------------------------------------------------------------------------------
# Help
# ------------------------------------------------------------------------------------------------

def run(module, *argv):
    """(result of main(argv), all that it printed)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        result = module.main([str(word) for word in argv])
    return result, text.getvalue()


def refused(module, *argv):
    """The one message with which main(argv) ends; fails if it ends well, or with a traceback."""
    try:
        run(module, *argv)
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.startswith("error: "), repr(stop.code)
        return stop.code
    raise AssertionError(f"{argv} was not refused")


def small_shapes(module, monkey, train=600, test=200):
    """Make `module` draw fewer shapes, so that a run takes a second."""
    draw = module.draw_shapes
    monkey(module, "draw_shapes", lambda count, seed: draw(train if count > 5000 else test, seed))


@contextlib.contextmanager
def patched():
    """A function monkey(object, name, value) whose changes are taken back at the end."""
    changes = []
    def monkey(thing, name, value):
        changes.append((thing, name, getattr(thing, name)))
        setattr(thing, name, value)
    try:
        yield monkey
    finally:
        for thing, name, value in reversed(changes):
            setattr(thing, name, value)


def same(a, b):
    """Whether two nested structures of tensors and values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_at(module, monkey, name, call, number=signal.SIGINT):
    """Let call number `call` of module.name, a function that each training step calls once, send
    this process a signal first."""
    function, calls = getattr(module, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*args, **kwargs)
    monkey(module, name, wrapped)


TINY = "--data shapes --width 8 --layers 1 --batch-size 100 --log-every 5 --eval-every 50".split()


# ------------------------------------------------------------------------------------------------
# The frame: what holds for every script
# ------------------------------------------------------------------------------------------------

def test_pieces_copy_alone():
    """Each top-level function and class executes with only the file's imports and constants."""
    for script in SCRIPTS:
        tree = ast.parse((HERE / script).read_text(encoding="utf-8"))
        frame = [node for node in tree.body
                 if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))
                 or getattr(node, "name", None) == "setting"]
        pieces = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(pieces) > 20
        for piece in pieces:
            space = {"__name__": "copied"}
            exec(compile(ast.Module([*frame, piece], []), script, "exec"), space)
            assert callable(space[piece.name])
            assert ast.get_docstring(piece), f"{script}: {piece.name} has no docstring"


def test_layers_work_alone():
    """A reader who copies one layer or function, and nothing else, can call it."""
    def alone(script, *names):
        tree = ast.parse((HERE / script).read_text(encoding="utf-8"))
        frame = (ast.Import, ast.ImportFrom, ast.Assign)
        body = [node for node in tree.body
                if isinstance(node, frame) or getattr(node, "name", None) in names]
        space = {"__name__": "copied"}
        exec(compile(ast.Module(body, []), script, "exec"), space)
        return space[names[-1]]

    one, two = "classifier.py", "diffusion.py"
    x = torch.zeros(2, 3, 6, 4)
    assert alone(one, "depthwise_separable")(3, 8)(x).shape == (2, 8, 6, 4)
    assert alone(one, "Attention")(8)(torch.zeros(2, 5, 8)).shape == (2, 5, 8)
    assert alone(one, "GatedMLP")(8, 20)(torch.zeros(2, 5, 8)).shape == (2, 5, 8)
    assert alone(one, "RMSNorm")(8)(torch.ones(2, 8)).shape == (2, 8)
    assert alone(one, "fourier_positions")(6, 12).shape == (36, 12)
    draw = alone(one, "shape_distance", "draw_shapes")
    assert draw(5, 0)[0].shape == (5, 3, 32, 32)
    assert alone(one, "random_crop_and_flip")(x.byte()).shape == x.shape
    assert alone(one, "strength", "apply_operation", "randaugment")(x.byte()).shape == x.shape
    assert alone(two, "separable_conv")(3, 8)(x).shape == (2, 8, 6, 4)
    assert alone(two, "Attention")(4)(torch.zeros(2, 4, 3, 5)).shape == (2, 4, 3, 5)
    assert alone(two, "cosine_schedule")(torch.tensor([0.5])).abs() < 1e-5
    assert alone(two, "clip_picture")(x).shape == x.shape
    assert alone(two, "slerp")(x, x, torch.ones(2)).shape == x.shape


def test_imports_are_required():
    """Every import is the standard library, in requirements.txt, or Pillow (torchvision's)."""
    required = {re.split(r"[<>=~! ]", line)[0] for line in
                (HERE / "requirements.txt").read_text().splitlines() if line and line[0] != "#"}
    assert required == {"torch", "torchvision", "numpy"}
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((HERE / script).read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                root = name.split(".")[0]
                assert root in required | {"PIL"} or root in sys.stdlib_module_names, (script, name)


def test_readme_flags_exist():
    """Every flag and mode in the commands of README.md and experiments.md is known to its script."""
    for name in ("README.md", ".github/experiments.md"):
        text = (HERE / name).read_text(encoding="utf-8").replace("\\\n", " ")
        commands = re.findall(r"python (\w+\.py)([^\n`#|&]*)", text)
        assert {"classifier.py", "diffusion.py"} <= {script for script, _ in commands}
        for script, words in commands:
            assert (HERE / script).exists(), script
            if script == "test_smoke.py":
                continue
            module = sys.modules[script[:-3]]
            known = {name.replace("_", "-") for name in module.Settings.__dataclass_fields__}
            for flag in re.findall(r"--([a-z][a-z0-9-]*)", words):
                assert flag in known | {"help"}, f"{name}: {script} has no --{flag}"


def test_readme_links():
    """Each link of the README into a script leads to the section that it names."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\[(\d+) ([^\]]+)\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) == 12 + 16
    for number, title, script, line in links:
        lines = (HERE / script).read_text(encoding="utf-8").splitlines()
        assert lines[int(line) - 1] == f"# {number}. {title}", (script, number, title)


def test_header_and_top_level():
    for script in SCRIPTS:
        text = (HERE / script).read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: MIT\n")
        assert max(map(len, text.splitlines())) <= 100, f"{script}: a line over 100 columns"
        last = ast.parse(text).body[-2:]
        assert last[0].name == "main" and isinstance(last[1], ast.If)


# ------------------------------------------------------------------------------------------------
# classifier.py: network
# ------------------------------------------------------------------------------------------------

VARIANTS = [dict(block="gpt2"), dict(activation="gelu"), dict(activation="relu"),
            dict(weights="untied"), dict(positions="learned"), dict(positions="none"),
            dict(downsample="strided"), dict(stem="plain"),
            *(dict(layers=n) for n in (0, 1, 2, 3, 5, 6))]


def test_classifier_budget():
    """The default is the widest that fits, the table adds up, and training refuses more."""
    net = classifier.Classifier()
    count = sum(p.numel() for p in net.parameters())
    assert 95_000 < count < 100_000                     # the budget is used well
    assert widest().stem[-1][3].out_channels == 80      # the default is the widest that fits
    assert f"{count:,} parameters" in classifier.__doc__
    for variant in ({}, dict(positions="learned", width=72)):
        net = classifier.Classifier(**variant)
        count = sum(p.numel() for p in net.parameters())
        check_table(classifier.parameter_table(net), count)
    assert classifier.MAX_PARAMETERS == 100_000 and classifier.MAX_STEPS == 10_000
    over = sum(p.numel() for p in classifier.Classifier(width=88).parameters())
    message = refused_in_small(classifier, "--width", 88)
    assert over >= 100_000 and f"{over:,} parameters, not under 100,000" in message


def check_table(table, count):
    """The lines of a parameter table add up to `count`, which is its last."""
    counts = {}
    for line in table.splitlines():
        name, number = line.split()
        counts[name] = int(number.replace(",", ""))
    assert counts.pop("total") == count == sum(counts.values())


def refused_in_small(module, *flags):
    """The message with which training on few drawn shapes ends."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(module, monkey)
        return refused(module, "--data", "shapes", "--batch-size", 50, "--out", out, *flags)


def test_step_budget():
    """The loop refuses the update after the last one allowed, whatever the settings say."""
    for module in (classifier, diffusion):
        with patched() as monkey:
            monkey(module, "MAX_STEPS", 3)
            message = refused_in_small(module, "--width", 8, "--steps", 5)
        assert "all 3 optimiser steps are spent" in message


def widest(**variant):
    """The network that the script builds for a variant when no width is given."""
    return classifier.build_network(classifier.Settings(**variant), classes=100)


def test_classifier_shapes():
    """All sizes different, so that no two axes can be mixed up unseen."""
    net = classifier.Classifier(classes=7, width=24, layers=2)
    assert net(torch.randn(5, 3, 32, 32)).shape == (5, 7)
    assert net.stem(torch.randn(5, 3, 32, 32)).shape == (5, 24, 8, 8)
    layer = classifier.depthwise_separable(6, 10, 3)
    assert layer(torch.randn(4, 6, 12, 20)).shape == (4, 10, 12, 20)
    layer = classifier.depthwise_separable(6, 10, strided=True)
    assert layer(torch.randn(4, 6, 12, 20)).shape == (4, 10, 6, 10)
    assert classifier.EncoderLayer(24)(torch.randn(3, 11, 24)).shape == (3, 11, 24)


def test_variants_step():
    """Each variant builds at the largest width that fits, and a step changes its weights."""
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for variant in VARIANTS:
        net = widest(**variant)
        width = net.stem[-1][3].out_channels
        assert sum(p.numel() for p in net.parameters()) < 100_000
        wider = classifier.Classifier(**variant, width=width + 8)
        assert sum(p.numel() for p in wider.parameters()) >= 100_000, (variant, width)
        optimiser = classifier.make_optimiser(net, 0.1)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2
        before = [p.detach().clone() for p in net.parameters()]
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()
        assert torch.isfinite(loss)
        for (name, p), old in zip(net.named_parameters(), before):
            assert not torch.equal(p, old), (variant, name)


def test_tying_is_real():
    """Four applications and one set of weights, whose gradient is the sum over the applications."""
    net = classifier.Classifier(width=16).eval()
    assert len(net.encoder) == 1
    calls = []
    net.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    net(x).square().sum().backward()
    assert len(calls) == 4
    untied = classifier.Classifier(width=16, weights="untied").eval()
    for own in untied.encoder:
        own.load_state_dict(net.encoder[0].state_dict())
    untied.load_state_dict({name: value for name, value in net.state_dict().items()
                            if not name.startswith("encoder")}, strict=False)
    torch.testing.assert_close(untied(x), net(x))
    untied(x).square().sum().backward()
    summed = sum(own.mlp.gate.weight.grad for own in untied.encoder)
    torch.testing.assert_close(net.encoder[0].mlp.gate.weight.grad, summed, rtol=1e-3, atol=1e-6)
    assert len(set(map(id, untied.encoder.parameters()))) == 4 * len(list(net.encoder.parameters()))


def test_rmsnorm_and_swiglu_by_formula():
    x = torch.randn(3, 5, 8)
    norm = classifier.RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt() * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    mlp = classifier.GatedMLP(8, 12)
    gate, value = x @ mlp.gate.weight.T, x @ mlp.value.weight.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * value) @ mlp.out.weight.T)


def test_attention_by_formula():
    x, attention = torch.randn(2, 5, 8), classifier.Attention(8, heads=2)
    q, k, v = attention.qkv(x).chunk(3, -1)
    heads = [torch.softmax(a @ b.transpose(1, 2) / 2, -1) @ c          # sqrt(4 channels a head) = 2
             for a, b, c in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1))]
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_positions_differ():
    table = classifier.fourier_positions(8, 16)
    distance = torch.cdist(table, table) + 9 * torch.eye(64)
    assert distance.min() > 0.1                                        # no two places are alike
    grid = table.view(8, 8, 16)
    torch.testing.assert_close(grid[3, :, :8], grid[3, :1, :8].expand(8, -1))      # first half: row
    torch.testing.assert_close(grid[:, 5, 8:], grid[:1, 5, 8:].expand(8, -1))      # second: column


# ------------------------------------------------------------------------------------------------
# classifier.py: data
# ------------------------------------------------------------------------------------------------

def test_shapes_data():
    x, y, names = classifier.draw_shapes(300, seed=3)
    again, _, _ = classifier.draw_shapes(300, seed=3)
    other, _, _ = classifier.draw_shapes(300, seed=4)
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.uint8 and len(set(names)) == 100
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert "red circle" in names and y.min() >= 0 and y.max() < 100
    # A circle's middle has its colour: a red one is red there, a blue one blue.
    x, y, _ = classifier.draw_shapes(3000, seed=5)
    for name, channel in ("red circle", 0), ("blue circle", 2):
        of = x[y == names.index(name)].float()
        assert (of[:, channel] > 200).flatten(1).any(1).all(), name


def test_shapes_defaults():
    """--data shapes trains with defaults of its own, which a flag overrides; CIFAR-100 does not."""
    for module in (classifier, diffusion):
        with patched() as monkey:
            monkey(module, "train", lambda settings, *_, **__: settings)
            drawn, _ = run(module, "--data", "shapes", "--steps", 7)
            usual, _ = run(module)
        assert drawn.steps == 7 and drawn.batch_size == module.SHAPES["batch_size"]
        assert usual == module.Settings(out=usual.out) and usual.batch_size != drawn.batch_size
        assert str(drawn.folder()).endswith("shapes") and str(usual.folder()).endswith(module.DATASET.__name__.lower())


def test_recipe_paper():
    """--recipe paper gives the paper's design back, whatever the defaults; a flag still wins."""
    for module in classifier, diffusion:
        with patched() as monkey:
            monkey(module, "train", lambda settings, *_, **__: settings)
            paper, _ = run(module, "--recipe", "paper")
            drawn, _ = run(module, "--recipe", "paper", "--data", "shapes")
            usual, _ = run(module)
            for name, value in module.PAPER.items():
                assert getattr(usual, name) != value, f"{name}: PAPER names what is the default"
                assert getattr(paper, name) == getattr(drawn, name) == value
                mixed, _ = run(module, "--recipe", "paper", "--" + name.replace("_", "-"),
                               getattr(usual, name))
                assert getattr(mixed, name) == getattr(usual, name)
    assert classifier.PAPER["stem"] == "plain" and diffusion.PAPER["modulate"] == "off"
    # The two classifiers differ in the last two convolutions alone, by the input that is added.
    torch.manual_seed(0)
    ours, x = classifier.Classifier(width=16).eval(), torch.randn(2, 3, 32, 32)
    plain = classifier.Classifier(width=16, stem="plain").eval()
    plain.load_state_dict(ours.state_dict())
    middle = plain.stem[:4](x)
    assert torch.equal(middle, ours.stem[:4](x))
    assert torch.allclose(ours.stem[4](middle), middle + plain.stem[4](middle))
    assert torch.allclose(plain.stem[5](plain.stem[4](middle)), plain.stem(x))


def test_augment():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(1)
    first = classifier.augment(x, 2, 9)
    torch.manual_seed(1)
    second = classifier.augment(x, 2, 9)
    assert first.dtype == torch.uint8 and first.shape == x.shape
    assert torch.equal(first, second) and not torch.equal(first, x)
    assert not torch.equal(classifier.augment(x, 2, 9), first)
    # Crop and flip alone: every picture is a window of the padded one, flipped or not; and both
    # flips and many places occur.
    out, seen = classifier.augment(x, 0), set()
    for picture, result in zip(x, out):
        padded = F.pad(picture, (4, 4, 4, 4))
        found = [(top, left, flip) for top in range(9) for left in range(9)
                 for flip, window in enumerate([padded[:, top:top + 32, left:left + 32],
                                                padded[:, top:top + 32, left:left + 32].flip(-1)])
                 if torch.equal(window, result)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20 and {flip for _, _, flip in seen} == {0, 1}


def test_randaugment_pixels():
    """What torchvision's RandAugment makes of a picture over many draws is what our operations
    make of it, each with each sign: the same set of pictures, to the bit."""
    from torchvision.transforms import v2
    torch.manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for magnitude in (2, 9, 20):
        theirs = {v2.RandAugment(1, magnitude)(x).numpy().tobytes() for _ in range(400)}
        ours = set()
        for name in classifier.OPERATIONS:
            for sign in (1, -1):
                changed = classifier.apply_operation(x, name, magnitude, sign)
                ours.add(changed.numpy().tobytes())
        assert ours == theirs, magnitude
        assert len(ours) > 10                       # operations differ from each other


def test_randaugment_draws():
    """Every picture draws for itself, evenly, and comes back to its own place."""
    torch.manual_seed(0)
    sizes = {}
    apply = classifier.apply_operation
    def counting(x, name, magnitude, sign):
        assert (name, sign) not in sizes                # one call for all that drew the same
        sizes[name, sign] = len(x)
        return apply(x, name, magnitude, sign)
    with patched() as monkey:
        monkey(classifier, "apply_operation", counting)
        classifier.randaugment(torch.zeros(14_000, 3, 4, 4, dtype=torch.uint8))
    assert len(sizes) == 28 and sum(sizes.values()) == 14_000
    expected, deviation = 500, (14_000 * 1 / 28 * 27 / 28) ** 0.5
    assert all(abs(size - expected) < 4.5 * deviation for size in sizes.values()), sizes
    # Number i of the result is one of the operations on number i, for every i; and there are many.
    x = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    out, seen = classifier.randaugment(x, 9), set()
    for picture, result in zip(x[:, None], out[:, None]):
        kinds = [(name, sign) for name in classifier.OPERATIONS for sign in (1, -1)
                 if torch.equal(apply(picture, name, 9, sign), result)]
        assert kinds
        seen.add(kinds[0])
    assert len(seen) > 10
    # Two operations: some pictures are what no single one makes.
    twice = classifier.augment(x, 2, 9)
    assert not torch.equal(twice, x) and twice.shape == x.shape


def test_normalise():
    x, _, _ = classifier.draw_shapes(500, seed=0)
    mean, std = classifier.channel_statistics(x)
    z = classifier.normalise(x, mean, std)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert z.is_contiguous(memory_format=torch.channels_last)
    try:
        classifier.normalise(z, mean, std)
    except AssertionError as error:
        assert "uint8" in str(error)
    else:
        raise AssertionError("floats were normalised a second time")


def test_holdout():
    with patched() as monkey:
        small_shapes(classifier, monkey, train=6000)
        whole, data = classifier.load_data("shapes"), classifier.load_data("shapes", 1000)
        again = classifier.load_data("shapes", 1000)
    assert len(data.val_y) == 1000 and (data.val_y.bincount(minlength=100) == 10).all()
    assert len(data.train_y) == 5000 and same(list(data), list(again))
    assert len(data.train_y[:1000].unique()) > 90          # in mixed order, not class after class
    pictures = {x.numpy().tobytes() for x in whole.train_x}
    kept, held = ({x.numpy().tobytes() for x in part} for part in (data.train_x, data.val_x))
    assert kept | held == pictures and not kept & held
    assert torch.equal(data.test_x, whole.test_x) and torch.equal(whole.val_x, whole.test_x)


def test_cifar_folder():
    """The real loader on files in the data set's format, on damaged and on missing ones; and with
    CIFAR-10 in place of CIFAR-100, which is one word in the script."""
    for module in (classifier, diffusion):
        for dataset in (torchvision.datasets.CIFAR100, torchvision.datasets.CIFAR10):
            with tempfile.TemporaryDirectory() as root, patched() as monkey:
                monkey(module, "DATASET", dataset)
                check_cifar_folder(module, dataset, monkey, root)


def check_cifar_folder(module, cifar, monkey, root):
    """What test_cifar_folder says, for one data set."""
    import pickle
    folder = Path(root) / cifar.base_folder
    folder.mkdir()
    assert module.Settings().folder().name.endswith(cifar.__name__.lower())
    train, test = cifar.train_list[0][0], cifar.test_list[0][0]
    meta = cifar.meta["filename"]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [i % 5 for i in range(20)]
    content = {train: {"data": pixels, "labels": labels},
               test: {"data": pixels[:10], "labels": labels[:10]},
               meta: {cifar.meta["key"]: list("abcde")}}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    flags = ["--data", root, "--out", Path(root) / "out"]

    # Our small files have their own sums, so these must be refused ...
    message = refused(module, *flags)
    assert "damaged" in message or "corrupted" in message
    assert root in message and cifar.tgz_md5 in message and cifar.__name__ in message

    # ... and accepted once their sums are those expected.
    md5 = torchvision.datasets.utils.calculate_md5
    monkey(cifar, "train_list", [[train, md5(folder / train)]])
    monkey(cifar, "test_list", [[test, md5(folder / test)]])
    monkey(cifar, "meta", dict(cifar.meta, md5=md5(folder / meta)))
    x, y, test_x, test_y, names = module.load_cifar(root)
    assert x.shape == (20, 3, 32, 32) and test_x.shape == (10, 3, 32, 32)
    assert np.array_equal(x.numpy().reshape(20, -1), pixels)
    assert y.tolist() == labels and test_y.tolist() == labels[:10] and names == list("abcde")

    # Cut short: refused and left as it is. Gone: a download, which fails with instructions.
    whole = (folder / test).read_bytes()
    (folder / test).write_bytes(whole[:100])
    assert cifar.tgz_md5 in refused(module, *flags)
    assert (folder / test).read_bytes() == whole[:100]
    shutil.rmtree(folder)
    def no_net(*args, **kwargs):
        raise OSError("no route to host")
    monkey(cifar, "download", no_net)
    message = refused(module, *flags)
    for part in ("no route to host", cifar.url, cifar.tgz_md5, root, "--data shapes"):
        assert part in message, part


# ------------------------------------------------------------------------------------------------
# classifier.py: training and evaluation
# ------------------------------------------------------------------------------------------------

def log_column(out, name):
    """The numbers of one column of log.csv."""
    rows = list(csv.DictReader((Path(out) / "log.csv").open()))
    return [float(row[name]) for row in rows]


def test_schedule():
    """OneCycle as train() uses it: rises to the peak at 30 %, ends near 0, a rate for each step."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        used, step = [], torch.optim.AdamW.step
        def noting(self, *args, **kwargs):
            used.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)
        monkey(torch.optim.AdamW, "step", noting)
        run(classifier, *TINY, "--steps", 40, "--max-lr", 0.01, "--log-every", 1, "--out", out)
        rates = log_column(out, "lr")
    assert rates == used and len(rates) == 40           # the log has the rate that was used
    peak = int(np.argmax(rates))
    assert abs(rates[peak] - 0.01) < 3e-4 and abs(peak - 0.3 * 40) <= 1.5
    assert rates[0] < 0.0005 and rates[-1] < 1e-4
    assert all(a < b for a, b in zip(rates[:peak], rates[1:peak + 1]))
    assert all(a > b for a, b in zip(rates[peak:], rates[peak + 1:]))


def test_weight_decay_groups():
    optimiser = classifier.make_optimiser(classifier.Classifier(width=16), 0.3)
    for group in optimiser.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim > 1 else 0.0)


def test_label_smoothing_and_clip():
    """What train() minimises is the smoothed cross-entropy, and no gradient is longer than asked."""
    losses, norms = [], []
    cross_entropy, clip = F.cross_entropy, torch.nn.utils.clip_grad_norm_
    def noting_loss(logits, y, **kwargs):
        loss = cross_entropy(logits, y, **kwargs)
        if logits.requires_grad:
            target = F.one_hot(y, 100) * 0.8 + 0.2 / 100
            expected = -(target * logits.log_softmax(1)).sum(1).mean()
            losses.append((loss.item(), expected.item()))
        return loss
    def noting_clip(parameters, most):
        parameters = list(parameters)
        before = clip(parameters, most)
        norms.append((before.item(), torch.cat([p.grad.flatten() for p in parameters]).norm()))
        return before
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        monkey(F, "cross_entropy", noting_loss)
        monkey(torch.nn.utils, "clip_grad_norm_", noting_clip)
        run(classifier, *TINY, "--steps", 3, "--label-smoothing", 0.2, "--clip-norm", 0.01,
            "--out", out)
    assert len(losses) == len(norms) == 3
    for got, expected in losses:
        assert abs(got - expected) < 1e-5
    for before, after in norms:
        assert before > 0.01 and 0.0099 < after <= 0.0101


def test_evaluate_is_exact():
    """Against a plain count; and top-5, the spread over batches, the mode."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8)
    y = torch.randint(0, 9, (600,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 9))
    scale = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with torch.no_grad():
        logits = net(x.float() / 255)
    got = classifier.evaluate(net, x, y, *scale)._asdict()
    hit = (logits.argmax(1) == y).float()
    assert abs(got["accuracy"] - hit.double().mean().item()) < 1e-9 and got["count"] == 600
    assert abs(got["loss"] - F.cross_entropy(logits, y).item()) < 1e-5
    five = (logits.topk(5).indices == y[:, None]).any(1).double().mean().item()
    assert abs(got["top5"] - five) < 1e-9
    assert got["batch"] == 600 and got["spread"] == 0
    half = classifier.evaluate(net, x.repeat(3, 1, 1, 1)[:1400], y.repeat(3)[:1400], *scale)
    assert half.batch == 700
    smooth = classifier.evaluate(net, x, y, *scale, label_smoothing=0.2)
    assert abs(smooth.loss - F.cross_entropy(logits, y, label_smoothing=0.2).item()) < 1e-5


def test_resume_is_bit_identical():
    """Stopped in mid-epoch by Ctrl-C, resumed past the epoch's end, RandAugment on: same bits."""
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(classifier, monkey)                 # 600 pictures, 6 batches an epoch
        flags, before = [*TINY, "--steps", 23], signal.getsignal(signal.SIGINT)
        run(classifier, *flags, "--out", f"{root}/whole")
        with patched() as inner:
            stop_at(classifier, inner, "augment", 9)             # in the second epoch
            try:
                run(classifier, *flags, "--out", f"{root}/parts")
            except SystemExit as stop:
                assert stop.code == 128 + signal.SIGINT
            else:
                raise AssertionError("Ctrl-C did not stop the run")
        state = torch.load(f"{root}/parts/checkpoint.pt", weights_only=True)
        assert state["step"] == 9
        assert signal.getsignal(signal.SIGINT) is before
        _, text = run(classifier, *flags, "--out", f"{root}/parts")
        assert "9 of 23 steps" in text
        a, b = (torch.load(f"{root}/{name}/checkpoint.pt", weights_only=True)
                for name in ("whole", "parts"))
        for key in ("net", "optimiser", "schedule", "random", "order", "position"):
            assert same(a[key], b[key]), key
        assert same(a["log"]["loss"], b["log"]["loss"])
        # Finished: started again, it only says its result, and trains nothing.
        monkey(torch.nn.utils, "clip_grad_norm_", None)
        first, second = (run(classifier, *flags, "--out", f"{root}/{name}")[0]
                         for name in ("whole", "parts"))
        third, _ = run(classifier, "eval", "--data", "shapes", "--out", f"{root}/whole")
        assert first == second == third
        other = refused(classifier, *flags, "--seed", 5, "--out", f"{root}/whole")
        assert "seed is 0, not 5" in other


def test_killed_process_resumes():
    """SIGKILL in a real process: the checkpoint is whole, and the run goes on to the end."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*TINY[:-1], "5", "--steps", "60", "--out", out]
        code = ("import sys, classifier as c; draw = c.draw_shapes; "
                "c.draw_shapes = lambda count, seed: draw(count // 20, seed); c.main(sys.argv[1:])")
        process = subprocess.Popen([sys.executable, "-c", code, *flags], cwd=HERE,
                                   stdout=subprocess.DEVNULL)
        path = Path(out) / "checkpoint.pt"
        until = time.time() + 60
        while not path.exists() and time.time() < until:
            time.sleep(0.02)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        step = torch.load(path, weights_only=True)["step"]
        assert 0 < step < 60
        with patched() as monkey:
            small_shapes(classifier, monkey, train=1000, test=100)
            _, text = run(classifier, *flags)
        assert f"{step} of 60 steps" in text
        assert torch.load(path, weights_only=True)["step"] == 60


def test_learns_shapes():
    """A few seconds of training beat chance (1 %) many times over, on pictures never seen."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey, train=6000, test=500)
        run(classifier, "--data", "shapes", "--width", 24, "--layers", 1, "--steps", 120,
            "--batch-size", 100, "--max-lr", 0.02, "--out", out)
        rows = (Path(out) / "log.csv").read_text().splitlines()
        last = dict(zip(rows[0].split(","), rows[-1].split(",")))
        assert float(last["val_acc"]) > 0.10, last
        for name in ("curve.png", "predictions.png"):
            assert (Path(out) / name).stat().st_size > 2000


def test_holdout_and_eval():
    """With a hold-out, training never looks at the test set; eval does, and repeats the rest."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey, train=6000)
        seen, load = [], classifier.load_data
        def poisoned(*args):
            data = load(*args)
            return data._replace(test_x=None) if not seen else data
        monkey(classifier, "load_data", poisoned)
        result, _ = run(classifier, *TINY, "--steps", 6, "--holdout", 500, "--out", out)
        assert "500 held-out pictures" in result and "test" not in result
        seen.append(1)
        again, _ = run(classifier, "eval", "--data", "shapes", "--out", out)
        assert again.startswith(result) and "test: " in again[len(result):]


def test_lr_find():
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        peak, text = run(classifier, "lr-find", *TINY, "--steps", 40, "--out", out)
        assert 1e-6 < peak < 1 and "proposed: --max-lr" in text
        assert (Path(out) / "lr_find.png").stat().st_size > 2000
        assert not (Path(out) / "checkpoint.pt").exists()


def test_compile_falls_back():
    """Where torch.compile fails, one line says so and the run goes on; both scripts."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        def broken(self, *args, **kwargs):
            raise RuntimeError("no compiler")
        monkey(torch.nn.Module, "compile", broken)
        for module, flags in (classifier, TINY), (diffusion, SMALL):
            small_shapes(module, monkey)
            _, text = run(module, *flags, "--steps", 3, "--compile", "on", "--out",
                          f"{out}/{module.__name__}")
            assert "going on without torch.compile: RuntimeError: no compiler" in text
            assert "3/3" in text


def test_not_finite_stops():
    """A loss that is not finite stops the run with advice and keeps the last good checkpoint."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        cross_entropy, calls = F.cross_entropy, []
        def breaking(logits, y, **kwargs):
            loss = cross_entropy(logits, y, **kwargs)
            if logits.requires_grad:
                calls.append(1)
                if len(calls) == 13:
                    loss = loss * float("nan")
            return loss
        monkey(F, "cross_entropy", breaking)
        flags = [*TINY[:-1], "10", "--steps", 40, "--out", out]
        try:
            run(classifier, *flags)
        except SystemExit as stop:
            assert "not finite" in stop.code and "--max-lr" in stop.code
        else:
            raise AssertionError("the run went on with nan")
        state = torch.load(f"{out}/checkpoint.pt", weights_only=True)
        assert state["step"] == 10 and torch.isfinite(state["net"]["head.0.weight"]).all()


def test_bad_input():
    """One clear line each, a non-zero exit, nothing overwritten."""
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(classifier, monkey)
        out = f"{root}/run"
        for flags, words in [
                (["--steps", 10_001], "--steps 10001 is not within 1 to 10000"),
                (["--steps", 0], "--steps 0"), (["--steps", -3], "--steps -3"),
                (["--steps", "many"], "--steps"), (["--step=5"], "--step=5"),
                (["--max-lr", "nan"], "--max-lr nan"), (["--layers", 7], "--layers 7"),
                (["--batch-size", 601], "--batch-size 601: there are 600"), (["--block", "bert"], "bert"),
                (["--width", 88], "parameters, not under 100,000"), (["--no-such"], "no-such"),
                (["--width", 18], "multiple of 4"), (["--holdout", 150], "150"),
                (["dance"], "dance"),
                *([(["--device", "cuda"], "cuda")] if not torch.cuda.is_available() else []),
                *([(["--device", "mps"], "mps")] if not torch.backends.mps.is_available() else [])]:
            message = refused(classifier, *TINY[:2], "--batch-size", 100, "--out", out, *flags)
            assert words in message and "\n" not in message, message
        assert not Path(out, "checkpoint.pt").exists()
        Path(f"{root}/file").write_text("mine")
        for bad in (f"{root}/file", f"{root}/file/below"):
            assert "can't be written" in refused(classifier, *TINY, "--out", bad)
        assert Path(f"{root}/file").read_text() == "mine"
        # Checkpoints that are empty, cut short, something else, or of another architecture.
        run(classifier, *TINY, "--steps", 2, "--out", out)
        path = Path(out, "checkpoint.pt")
        good = path.read_bytes()
        other = io.BytesIO()
        state = torch.load(path, weights_only=True)
        torch.save(dict(state, net=classifier.Classifier(width=16, layers=1).state_dict()), other)
        stranger = io.BytesIO()
        torch.save({"weights": torch.zeros(3)}, stranger)
        for content in (b"", good[:len(good) // 2], b"hello", stranger.getvalue(),
                        other.getvalue()):
            path.write_bytes(content)
            for mode in ([], ["eval"]):
                message = refused(classifier, *mode, *TINY, "--steps", 2, "--out", out)
                assert "can't use" in message and "\n" not in message, message
            assert path.read_bytes() == content
        message = refused(classifier, "eval", "--data", "shapes", "--out", f"{root}/none")
        assert "can't use" in message


def test_damaged_checkpoint():
    """One changed byte in any tensor is noticed; so is a tensor of another shape."""
    for module, flags in (classifier, TINY), (diffusion, SMALL):
        with patched() as monkey, tempfile.TemporaryDirectory() as out:
            small_shapes(module, monkey)
            for mode in ("show_results", "report", "draw_predictions"):
                if hasattr(module, mode):
                    monkey(module, mode, lambda *args, **kwargs: "")
            run(module, *flags, "--steps", 1, "--out", out)
            path = Path(out, "checkpoint.pt")
            good = path.read_bytes()
            module.load_checkpoint(path)
            with zipfile.ZipFile(path) as archive:
                records = [info for info in archive.infolist() if "/data/" in info.filename]
            assert len(records) > 30
            for info in records:
                bad = bytearray(good)
                # A zip entry: 30 bytes, of which 26 to 29 give the lengths of a name and an extra.
                header = info.header_offset
                name, extra = np.frombuffer(good[header + 26:header + 30], "<u2").tolist()
                bad[header + 30 + name + extra + info.file_size // 2] ^= 4
                path.write_bytes(bad)
                try:
                    module.load_checkpoint(path)
                except ValueError as error:
                    assert "can't use" in str(error) and "\n" not in str(error)
                else:
                    raise AssertionError(f"{info.filename} was damaged, and accepted")


def test_errors_are_exceptions():
    """In a notebook a mistake is a ValueError or an OSError, never the end of the process."""
    for module in (classifier, diffusion):
        for wrong in (dict(steps=0), dict(steps=10**6), dict(device="tpu"), dict(max_lr=-1.0),
                      dict(max_lr=float("nan")), dict(recipe="theirs")):
            fails(ValueError, lambda: module.Settings(**wrong))
        with tempfile.TemporaryDirectory() as out:
            settings = module.Settings(data=out, out=out)
            with patched() as monkey:
                def no_net(*args, **kwargs):
                    raise OSError("no route to host")
                monkey(module.DATASET, "download", no_net)
                fails(OSError, lambda: module.train(settings))
            given = dict(data="shapes", out=out, steps=1)
            large = module.choose_settings(**given, batch_size=30_000)
            fails(ValueError, lambda: module.train(large))
            wide = module.choose_settings(**given, width=104)
            fails(AssertionError, lambda: module.train(wide))
            fails(ValueError, lambda: module.load_checkpoint(Path(out, "none.pt")))


def fails(kind, call):
    """Fails unless call() raises an exception of that kind, with a text."""
    try:
        call()
    except kind as error:
        assert str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


# ------------------------------------------------------------------------------------------------
# diffusion.py: the mathematics
# ------------------------------------------------------------------------------------------------

def cosine_inverse(log_snr):
    """t of cosine_schedule: (atan(e^(-lambda/2)) - b) / a."""
    b = math.atan(math.exp(-10))
    a = math.pi / 2 - 2 * b
    return (torch.atan(torch.exp(-log_snr / 2)) - b) / a


def linear_inverse(log_snr):
    """t of linear_schedule: sqrt((log(1 + e^-lambda) - 1e-4) / 10)."""
    return ((F.softplus(-log_snr) - 1e-4).clamp(min=0) / 10).sqrt()


def spliced_inverse(log_snr):
    """t of spliced_schedule."""
    early = cosine_inverse(log_snr)
    late = linear_inverse(log_snr) + 0.31537545
    return torch.where(early < 0.80074257, early, late) / 1.31537545


SCHEDULES = {"cosine": (diffusion.cosine_schedule, cosine_inverse),
             "linear": (diffusion.linear_schedule, linear_inverse),
             "spliced": (diffusion.spliced_schedule, spliced_inverse)}


def test_schedules():
    """Finite, strictly falling, invertible, alpha² + sigma² = 1, the ends; in fp32 as used."""
    for name, (schedule, inverse) in SCHEDULES.items():
        t = torch.linspace(0, 1, 1001)
        log_snr = schedule(t)
        assert torch.isfinite(log_snr).all() and (log_snr.diff() < 0).all(), name
        torch.testing.assert_close(inverse(log_snr), t, atol=2e-5, rtol=0)
        torch.testing.assert_close(inverse(schedule(t.double())), t.double(), atol=1e-8, rtol=0)
        alpha, sigma = diffusion.to_alpha_sigma(log_snr)
        torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones(1001, 1, 1, 1))
        assert torch.equal(diffusion.to_log_snr(t, name), log_snr)
    ends = diffusion.cosine_schedule(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([20.0, -20.0]))
    # The cosine schedule is -2 log tan(a t + b); the linear one is DDPM's integral of beta.
    t = torch.linspace(0, 1, 99).double()
    b = np.arctan(np.exp(-10))
    direct = -2 * torch.tan((np.arctan(np.exp(10)) - b) * t + b).log()
    torch.testing.assert_close(diffusion.cosine_schedule(t), direct, atol=1e-6, rtol=1e-6)
    alpha_squared = torch.exp(-(1e-4 + 10 * t ** 2))
    torch.testing.assert_close(diffusion.linear_schedule(t), torch.logit(alpha_squared))


def test_splice_joint():
    """Value and slope meet at the joint, and each side is the schedule that it should be."""
    joint = 0.80074257 / 1.31537545
    t = torch.tensor([joint - 1e-6, joint + 1e-6], dtype=torch.double, requires_grad=True)
    value = diffusion.spliced_schedule(t)
    slope, = torch.autograd.grad(value.sum(), t)
    # The constants are of the cosine schedule with infinite ends, hence not closer than that.
    assert abs(value[0] - value[1]) < 5e-4 and abs(slope[0] / slope[1] - 1) < 5e-4
    early, late = torch.tensor(0.3).double(), torch.tensor(0.9).double()
    torch.testing.assert_close(diffusion.spliced_schedule(early),
                               diffusion.cosine_schedule(1.31537545 * early))
    torch.testing.assert_close(diffusion.spliced_schedule(late),
                               diffusion.linear_schedule(1.31537545 * late - 0.31537545))


def test_equations_1_to_3():
    """Eq. (1) and (2), their solution for picture and noise, and the three forms of Eq. (3), of
    which the paper misprints the last: with its weight e^lambda - 1 they are not equal."""
    torch.manual_seed(0)
    x, noise, pred_v = torch.randn(3, 6, 3, 8, 8, dtype=torch.double)
    log_snr = torch.linspace(-6, 6, 6).double()
    alpha, sigma = diffusion.to_alpha_sigma(log_snr)
    torch.testing.assert_close((alpha ** 2 / sigma ** 2).log().flatten(), log_snr)
    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    v = diffusion.velocity(x, noise, alpha, sigma)
    torch.testing.assert_close(x_t, alpha * x + sigma * noise)
    torch.testing.assert_close(v, alpha * noise - sigma * x)
    x0, eps = diffusion.split(x_t, v, alpha, sigma)
    torch.testing.assert_close(x0, x)
    torch.testing.assert_close(eps, noise)

    pred_x0, pred_noise = diffusion.split(x_t, pred_v, alpha, sigma)
    of_v = (v - pred_v).square().mean((1, 2, 3))
    of_x0 = (x - pred_x0).square().mean((1, 2, 3))
    of_noise = (noise - pred_noise).square().mean((1, 2, 3))
    torch.testing.assert_close((log_snr.exp() + 1) * of_x0, of_v)
    torch.testing.assert_close(((-log_snr).exp() + 1) * of_noise, of_v)
    assert not torch.allclose((log_snr.exp() - 1) * of_noise, of_v)


def test_guidance():
    a, b = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(diffusion.guide(a, b, 3.0), 4 * a - 3 * b)
    torch.testing.assert_close(diffusion.guide(a, b, 0.0), a)
    net, x, log_snr = tiny_unet(), torch.randn(4, 3, 32, 32), torch.linspace(-3, 3, 4)
    labels, none = torch.tensor([0, 3, 6, 2]), torch.full((4,), 7)
    with torch.no_grad():
        cond, uncond = net(x, log_snr, labels), net(x, log_snr, none)
        assert (cond - uncond).abs().max() > 1e-3                          # "no class" is its own
        for w in (0.0, 1.5):
            got = diffusion.guided_velocity(net, labels, w)(x, log_snr)
            torch.testing.assert_close(got, diffusion.guide(cond, uncond, w), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(net(x, log_snr, net.embed(labels)), cond)


def test_clipping():
    x = torch.randn(2, 3, 32, 32) * torch.tensor([0.2, 5.0]).view(2, 1, 1, 1)
    assert torch.equal(diffusion.clip_picture(x, "none"), x)
    assert torch.equal(diffusion.clip_picture(x, "static"), x.clamp(-1, 1))
    y = diffusion.clip_picture(x, "dynamic")
    assert torch.equal(y[0], x[0])                                     # in range: left as it was
    s = np.quantile(x[1].abs().numpy(), 0.995)
    torch.testing.assert_close(y[1], x[1].clamp(-s, s) / s, atol=1e-5, rtol=1e-5)
    assert y.abs().max() <= 1


def gaussian_model(mean, std):
    """The exact velocity for data N(mean, std²), each pixel for itself."""
    def model(x, log_snr):
        alpha, sigma = diffusion.to_alpha_sigma(log_snr)
        x0 = mean + alpha * std ** 2 / (alpha ** 2 * std ** 2 + sigma ** 2) * (x - alpha * mean)
        return (alpha * x - x0) / sigma                                    # x0 = alpha x - sigma v
    return model


def gaussian_result(mean, std, steps, eta):
    """(mean, variance) with which `steps` steps end, by the closed form of one step."""
    log_snr = diffusion.cosine_schedule(torch.linspace(1, 0, steps + 1)[:-1].double())
    alpha, sigma = (scale.flatten() for scale in diffusion.to_alpha_sigma(log_snr))
    m, var = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    for i in range(steps):
        a, s = alpha[i], sigma[i]
        gain = a * std ** 2 / (a ** 2 * std ** 2 + s ** 2)       # x0 = mean + gain (x - a mean)
        if i == steps - 1:
            return mean + gain * (m - a * mean), gain ** 2 * var
        a2, s2 = alpha[i + 1], sigma[i + 1]
        fresh = eta ** 2 * s2 ** 2 / s ** 2 * (1 - a ** 2 / a2 ** 2)
        keep = (s2 ** 2 - fresh).clamp(min=0).sqrt()
        scale = a2 * gain + keep * (1 - a * gain) / s
        shift = (a2 - keep * a / s) * mean * (1 - gain * a)
        m, var = scale * m + shift, scale ** 2 * var + fresh


def test_sampler_on_gaussian():
    """Against the closed form, float64, no clipping: the mean and the variance of many samples."""
    torch.manual_seed(0)
    mean, std, count = 0.4, 0.3, 40_000
    for eta in (0.0, 0.5, 1.0):
        for steps in (3, 10):
            x = torch.randn(count, 1, 1, 1, dtype=torch.double)
            log_snr = diffusion.cosine_schedule(torch.linspace(1, 0, steps + 1)[:-1].double())
            x = diffusion.ddim_sample(gaussian_model(mean, std), x, log_snr, eta, "none")
            m, var = gaussian_result(mean, std, steps, eta)
            error = (var / count).sqrt()
            assert abs(x.mean() - m) < 4.5 * error, (eta, steps)
            assert abs(x.var() / var - 1) < 4.5 * (2 / count) ** 0.5, (eta, steps, x.var(), var)
    # One noisy step and the last one, written out, with fresh noise that is known.
    log_snr, eta = torch.tensor([-2.0, 0.5]).double(), 0.7
    alpha, sigma = (scale.flatten() for scale in diffusion.to_alpha_sigma(log_snr))
    model, x = gaussian_model(mean, std), torch.tensor([0.8]).double().view(1, 1, 1, 1)
    got = diffusion.ddim_sample(model, x, log_snr, eta, "none", draw_noise=lambda x: 0 * x + 1.3)
    v = model(x, log_snr[:1])
    x0, eps = alpha[0] * x - sigma[0] * v, sigma[0] * x + alpha[0] * v
    fresh = eta ** 2 * (sigma[1] / sigma[0]) ** 2 * (1 - (alpha[0] / alpha[1]) ** 2)
    x = alpha[1] * x0 + (sigma[1] ** 2 - fresh).sqrt() * eps + fresh ** 0.5 * 1.3
    torch.testing.assert_close(got, alpha[1] * x - sigma[1] * model(x, log_snr[1:]))
    # DDIM follows the exact path, x0 = mean + std * x1: its error falls about as 1/steps.
    x, errors = torch.linspace(-2, 2, 9).double().view(-1, 1, 1, 1), []
    for steps in (20, 40, 80):
        log_snr = diffusion.cosine_schedule(torch.linspace(1, 0, steps + 1)[:-1].double())
        y = diffusion.ddim_sample(gaussian_model(mean, std), x, log_snr, 0.0, "none")
        assert torch.equal(y, diffusion.ddim_sample(gaussian_model(mean, std), x, log_snr, 0.0, "none"))
        errors.append((y - mean - std * x).abs().max().item())
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4, errors


def test_slerp():
    a, b = torch.randn(2, 3, 2, 5, 5, dtype=torch.double)
    torch.testing.assert_close(diffusion.slerp(a, b, torch.zeros(3)), a)
    torch.testing.assert_close(diffusion.slerp(a, b, torch.ones(3)), b)
    u, v = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    half = diffusion.slerp(u, v, torch.full((3,), 0.5)).flatten(1)
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3).double())   # stays on the sphere
    torch.testing.assert_close((half * u.flatten(1)).sum(1), (half * v.flatten(1)).sum(1))
    near = diffusion.slerp(a, a * (1 + 1e-9), torch.full((3,), 0.3))
    torch.testing.assert_close(near, a)
    torch.testing.assert_close(diffusion.slerp(a, a, torch.full((3,), 0.3)), a)


def test_sobol_is_even():
    """The timesteps of a batch fill [0,1] better than independent ones; fast_forward repeats."""
    engine = torch.quasirandom.SobolEngine(1, scramble=True, seed=3)
    engine.draw(64)
    t = engine.draw(64)[:, 0].sort().values
    gap = lambda t: torch.cat([t[:1], t.diff(), 1 - t[-1:]]).max()
    torch.manual_seed(0)
    assert gap(t) < 0.5 * min(gap(torch.rand(64).sort().values) for _ in range(20))
    again = torch.quasirandom.SobolEngine(1, scramble=True, seed=3)
    again.fast_forward(64)
    assert torch.equal(again.draw(64)[:, 0].sort().values, t)


def test_timesteps():
    """What training gets: a batch of Sobol t covers [0,1] evenly, an independent one doesn't, and
    each step's t differ from the last one's. With all else equal, pictures and labels too."""
    seen, gaps = {}, lambda t: torch.cat([t[:1], t.diff(), 1 - t[-1:]]).max().item()
    for how in ("sobol", "independent"):
        with patched() as monkey, tempfile.TemporaryDirectory() as out:
            small_shapes(diffusion, monkey)
            seen[how] = []
            schedule, noise = diffusion.to_log_snr, diffusion.add_noise
            times, pictures = [], []
            def spy_t(t, name):
                times.append(t.clone())
                return schedule(t, name)
            def spy_x(x, *rest):
                pictures.append(x.clone())
                return noise(x, *rest)
            monkey(diffusion, "to_log_snr", spy_t)
            monkey(diffusion, "add_noise", spy_x)
            monkey(diffusion, "show_results", lambda *args: None)
            monkey(diffusion, "validate", lambda *args: dict(val_loss=0.0, **{f"bin{i}": 0.0 for i in range(5)}))
            run(diffusion, "--data", "shapes", "--width", 8, "--steps", 4, "--batch-size", 64,
                "--timesteps", how, "--out", out)
            seen[how] = list(zip(pictures, times))
            assert "timesteps" in refused(diffusion, "--data", "shapes", "--width", 8, "--steps", 4,
                                          "--batch-size", 64, "--timesteps",
                                          "sobol" if how == "independent" else "independent",
                                          "--out", out)             # a run keeps what it began with
    # 64 Sobol points: one in each 64th of [0,1]. Independent ones leave gaps of some ln(64)/64.
    assert all(gaps(t.sort().values) < 2 / 64 for _, t in seen["sobol"])
    assert all(gaps(t.sort().values) > 2 / 64 for _, t in seen["independent"])
    for batches in seen.values():
        assert len(batches) == 4 and not any(torch.equal(a[1], b[1]) for a, b in zip(batches, batches[1:]))
    assert torch.equal(seen["sobol"][0][0], seen["independent"][0][0])


def test_ema():
    net, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    old = [p.detach().clone() for p in average.parameters()]
    diffusion.update_ema(average, net, 0.9, step=10**6)
    for p, q, new in zip(average.parameters(), old, net.parameters()):
        torch.testing.assert_close(p, 0.9 * q + 0.1 * new)
    old = [p.detach().clone() for p in average.parameters()]
    diffusion.update_ema(average, net, 0.9, step=2)                        # warm-up: decay 3/12
    for p, q, new in zip(average.parameters(), old, net.parameters()):
        torch.testing.assert_close(p, 0.25 * q + 0.75 * new)


def test_learning_rate():
    rates = [diffusion.learning_rate(step, 1000, 2.0, 100) for step in range(1000)]
    assert abs(rates[0] - 0.02) < 1e-4 and 1.9 < max(rates) <= 2.0 and 98 <= np.argmax(rates) <= 100
    assert rates[-1] < 1e-4 and all(a > b for a, b in zip(rates[100:], rates[101:]))


# ------------------------------------------------------------------------------------------------
# diffusion.py: network, evaluation
# ------------------------------------------------------------------------------------------------

def tiny_unet(classes=7):
    """A small network whose last layers are not zero, so that it says something."""
    torch.manual_seed(0)
    net = diffusion.UNet(classes, width=8).eval()
    for module in net.modules():
        for p in module.parameters(recurse=False):
            if p.abs().max() == 0 or p.ndim == 4 and p.std() < 1e-6:
                torch.nn.init.normal_(p, std=0.1)
    return net


def test_unet_budget():
    net = diffusion.UNet()
    count = sum(p.numel() for p in net.parameters())
    assert 900_000 < count < 1_000_000
    check_table(diffusion.parameter_table(net), count)
    assert f"{count:,} parameters" in diffusion.__doc__
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    # "Mostly depthwise-separable": of the 3x3 convolutions, most work on each channel by itself.
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    threes = [m for m in convolutions if m.kernel_size == (3, 3)]
    assert sum(m.groups == m.in_channels for m in threes) > 0.75 * len(threes)
    for kind, groups in ("regular", 1), ("separable", 8):
        small = diffusion.UNet(width=8, after_injection=kind)
        conv = [m for m in small.inject1.modules() if isinstance(m, torch.nn.Conv2d)][0]
        assert conv.groups == groups
    # Without --width, the largest that fits; modulation costs parameters, so without it more does.
    for modulate, width in ("on", 48), ("off", 56):
        net = diffusion.build_network(diffusion.Settings(modulate=modulate), classes=100)
        assert net.stem.out_channels == width
        wider = diffusion.UNet(width=width + 8, modulate=modulate == "on")
        assert sum(p.numel() for p in wider.parameters()) >= 1_000_000
    assert diffusion.MAX_PARAMETERS == 1_000_000 and diffusion.MAX_STEPS == 50_000
    message = refused_in_small(diffusion, "--width", 72)
    assert "parameters, not under 1,000,000" in message


def test_modulation():
    """Scale and shift in the middle of a block, by formula; and in every block, if asked for."""
    torch.manual_seed(0)
    block = diffusion.ResidualBlock(16, diffusion.separable_conv, e_width=4)
    x, e = torch.randn(2, 16, 6, 6), torch.randn(2, 4)
    scale, shift = block.modulate(e)[:, :, None, None].split(16, dim=1)
    middle = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, e), x + block.conv2(F.silu(middle)))
    plain = diffusion.ResidualBlock(16, diffusion.separable_conv)
    plain.load_state_dict(block.state_dict(), strict=False)
    assert not torch.allclose(block(x, e), plain(x))
    for p in block.modulate.parameters():
        torch.nn.init.zeros_(p)
    torch.testing.assert_close(block(x, e), plain(x))
    for on in (False, True):
        net = diffusion.UNet(width=8, modulate=on)
        blocks = [m for m in net.modules() if isinstance(m, diffusion.ResidualBlock)]
        assert len(blocks) == 10
        assert all((m.modulate is not None) == on for m in blocks)
        assert net(torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([3, 100])).shape[1] == 3


def test_unet_attention_by_formula():
    """x + out(heads side by side), each head a softmax average among the places of a picture."""
    torch.manual_seed(0)
    attention, x = diffusion.Attention(128), torch.randn(2, 128, 3, 5)       # 2 heads of 64
    assert torch.equal(attention(x), x)                                     # starts as the identity
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    tokens = attention.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 128)
    q, k, v = attention.qkv(tokens).split(128, dim=2)
    heads = [torch.softmax(q[..., i] @ k[..., i].transpose(1, 2) / 8, -1) @ v[..., i]
             for i in (slice(0, 64), slice(64, 128))]
    out = attention.out(torch.cat(heads, 2)).reshape(2, 3, 5, 128).permute(0, 3, 1, 2)
    torch.testing.assert_close(attention(x), x + out, atol=1e-5, rtol=1e-4)


def test_unet_depends_on_all():
    """Shape, and that picture, noise level and class each change the prediction."""
    net, x, log_snr = tiny_unet(), torch.randn(5, 3, 32, 32), torch.linspace(-8, 8, 5)
    labels = torch.arange(5)
    with torch.no_grad():
        y = net(x, log_snr, labels)
        assert y.shape == (5, 3, 32, 32)
        for other in (net(x + 0.1, log_snr, labels), net(x, log_snr + 1, labels),
                      net(x, log_snr, labels + 1), net(x, log_snr, torch.full((5,), 7))):
            assert (other - y).flatten(1).abs().amax(1).min() > 1e-4
        alone = net(x[2:3], log_snr[2:3], labels[2:3])
        torch.testing.assert_close(alone, y[2:3], atol=1e-4, rtol=1e-4)


def test_generate():
    """The same whatever the batch, the seed decides, no two chunks alike, N need not be round."""
    net, labels = tiny_unet(), torch.arange(103) % 7
    how = dict(steps=3, guidance=1.0, seed=2)
    far = lambda a, b: (a.float() - b.float()).abs()
    x = diffusion.generate(net, labels, batch=50, **how)
    assert x.shape == (103, 3, 32, 32) and x.dtype == torch.uint8
    # 1e-4 of the range is less than one of 255 levels, but it can tip the rounding.
    assert far(diffusion.generate(net, labels, batch=200, **how), x).max() <= 1
    assert far(diffusion.generate(net, labels[:60], batch=60, **how), x[:60]).max() <= 1
    assert far(diffusion.generate(net, labels, **{**how, "seed": 3}), x).mean() > 5
    assert far(x[:50], x[50:100]).mean() > 5


def test_no_guidance_without_dropped_labels():
    """Without dropped labels "no class" is an embedding that was never trained."""
    device = torch.device("cpu")
    for drop, w in ((0.1, 3.0), (0.0, 0.0)):
        settings = diffusion.Settings(label_drop=drop, guidance=3.0)
        assert diffusion.sampling_options(settings, device)["guidance"] == w


def test_interpolation_ends():
    net = tiny_unet()
    ends, labels = torch.randn(2, 3, 3, 32, 32), torch.tensor([[0, 1, 2], [3, 4, 5]])
    x = diffusion.interpolate(net, ends, labels, count=4, steps=3, guidance=2.0)
    x = x.view(3, 4, 3, 32, 32)
    for i, side in (0, 0), (1, 3):
        plain = diffusion.generate(net, labels[i], start=ends[i], steps=3, guidance=2.0, eta=0.0)
        assert (x[:, side].float() - plain.float()).abs().max() <= 1
    assert (x[:, 1].float() - x[:, 0].float()).abs().mean() > 1


def test_nearest_neighbours():
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (7000, 3, 8, 8), dtype=torch.uint8)
    queries = torch.cat([pictures[[6123]], pictures[[0]].flip(-1), pictures[[5001]].clone()])
    queries[2, 0, 0, 0] ^= 3
    distance, index, flipped = diffusion.nearest_neighbours(queries, pictures, k=3, chunk=2)
    assert index[:, 0].tolist() == [6123, 0, 5001]
    assert flipped[:, 0].tolist() == [False, True, False]
    assert distance[:2, 0].tolist() == [0, 0] and 0 < distance[2, 0] <= 3
    # A picture counts once, however alike it and its flip are: one that equals its flip is in too.
    pictures[77] = pictures[77].maximum(pictures[77].flip(-1))
    queries = torch.cat([queries, pictures[[77]]])
    distance, index, flipped = diffusion.nearest_neighbours(queries, pictures, k=3, chunk=2)
    assert index[3, 0] == 77 and all(len(set(row)) == 3 for row in index.tolist())
    apart = lambda x: torch.cdist(queries.flatten(1).float(), x.flatten(1).float(), 2,
                                  "donot_use_mm_for_euclid_dist")
    expected = apart(pictures).minimum(apart(pictures.flip(-1))).topk(3, largest=False).values
    torch.testing.assert_close(distance, expected, atol=0.05, rtol=1e-4)


def test_validation_loss():
    """Repeats itself, draws nothing, and is the mean square of v where the network says 0."""
    x, y, _ = diffusion.draw_shapes(200, seed=0)
    net = diffusion.UNet(width=8).eval()                                   # as built, it says 0
    torch.manual_seed(5)
    before = torch.get_rng_state()
    total, bins = diffusion.validation_loss(net, x, y, count=100)
    assert torch.equal(torch.get_rng_state(), before)
    assert (total, bins) == diffusion.validation_loss(net, x, y, count=100)
    chosen = np.random.RandomState(0).permutation(200)[:100]
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    t = (torch.arange(100) + 0.5) / 100 * np.pi / 2
    v = t.cos().view(-1, 1, 1, 1) * noise - t.sin().view(-1, 1, 1, 1) * (x[chosen] / 127.5 - 1)
    torch.testing.assert_close(torch.tensor(total), v.square().mean(), atol=1e-4, rtol=1e-4)
    expected = [part.square().mean().item() for part in v.chunk(5)]
    torch.testing.assert_close(torch.tensor(bins), torch.tensor(expected), atol=1e-3, rtol=1e-3)


def test_ranges():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    z = diffusion.to_model(x)
    assert z.min() == -1 and z.max() == 1 and torch.equal(diffusion.to_uint8(z), x)
    assert diffusion.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    try:
        diffusion.to_model(z)
    except AssertionError:
        return
    raise AssertionError("floats were taken for uint8")


def test_frechet():
    """Closed forms: equal Gaussians, a shift, commuting and one-dimensional covariances."""
    torch.manual_seed(0)
    a = torch.randn(6, 6).double()
    a = a @ a.T
    mean = torch.randn(6).double()
    assert abs(diffusion.frechet_distance(mean, a, mean, a)) < 1e-6
    assert abs(diffusion.frechet_distance(mean, a, mean + 2, a) - 24) < 1e-6
    p, q = torch.rand(2, 6).double()
    got = diffusion.frechet_distance(mean, p.diag(), mean, q.diag())
    assert abs(got - (p.sqrt() - q.sqrt()).square().sum()) < 1e-9
    b = torch.randn(6, 3).double()
    b = b @ b.T                                                            # singular
    values = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = a.trace() + b.trace() - 2 * values
    assert abs(diffusion.frechet_distance(mean, a, mean, b) - expected) < 1e-4


class StubInception(torch.nn.Module):
    """Has what the FID network has: `layers`, from 299x299 pictures to (B,2048,1,1)."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d((16, 16)), torch.nn.Flatten(),
            torch.nn.Linear(768, 2048), torch.nn.Unflatten(1, (2048, 1, 1)))


def test_resize():
    """Size, range, and Pillow's own bicubic picture of one channel."""
    from PIL import Image
    x, _, _ = diffusion.draw_shapes(2, seed=1)
    y = diffusion.resize_for_inception(x)
    assert y.shape == (2, 3, 299, 299) and y.dtype == torch.float32
    assert y.min() >= 0 and y.max() <= 255
    plane = Image.fromarray(x[1, 2].numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC)
    assert np.array_equal(y[1, 2].numpy(), np.asarray(plane).clip(0, 255))


# ------------------------------------------------------------------------------------------------
# diffusion.py: training and modes
# ------------------------------------------------------------------------------------------------

SMALL = ("--data shapes --width 8 --batch-size 50 --log-every 5 --eval-every 50 --sample-steps 2 "
         "--count 8").split()


def test_diffusion_resume():
    """As the classifier: bit-identical, with EMA and Sobol; all modes run from the checkpoint."""
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(diffusion, monkey, train=300, test=100)               # 6 batches an epoch
        flags = [*SMALL, "--steps", 14]
        # A grid in between must not disturb the run.
        run(diffusion, *flags, "--grid-every", 3, "--out", f"{root}/whole")
        with patched() as inner:
            stop_at(diffusion, inner, "update_ema", 8)
            try:
                run(diffusion, *flags, "--out", f"{root}/parts")
            except SystemExit as stop:
                assert stop.code == 128 + signal.SIGINT
            else:
                raise AssertionError("Ctrl-C did not stop the run")
        _, text = run(diffusion, *flags, "--out", f"{root}/parts")
        assert "8 of 14 steps" in text
        a, b = (torch.load(f"{root}/{name}/checkpoint.pt", weights_only=True)
                for name in ("whole", "parts"))
        for key in ("net", "ema", "optimiser", "random", "order", "position"):
            assert same(a[key], b[key]), key
        assert same(a["log"]["loss"], b["log"]["loss"])
        assert not same(a["net"], a["ema"])
        for name in ("grid-000003.png", "grid-000014.png", "samples.png", "interpolations.png",
                     "neighbours.png", "loss.png"):
            assert (Path(root) / "whole" / name).stat().st_size > 500, name
        out = ["--data", "shapes", "--out", f"{root}/whole", "--sample-steps", 2]
        with patched() as inner:                        # samples need no data set, hence no download
            inner(diffusion, "load_data", None)
            run(diffusion, "interpolate", *out)
            x, _ = run(diffusion, "sample", *out, "--classes", "red circle,7", "--count", 5,
                       "--eta", 0)
        saved = np.load(f"{root}/whole/samples.npz")
        assert saved["labels"].tolist() == [0, 7, 0, 7, 0]
        assert np.array_equal(saved["samples"], x.permute(0, 2, 3, 1).numpy())
        with patched() as inner:            # what no flag says is as the training command said it
            inner(diffusion, "sample_mode", lambda settings, net, names: settings)
            how, _ = run(diffusion, "sample", "--out", f"{root}/whole", "--eta", 0.5)
        assert (how.width, how.sample_steps, how.count, how.eta, how.classes) == (8, 2, 8, 0.5, "")
        assert "unicorn" in refused(diffusion, "sample", *out, "--classes", "unicorn")
        assert "100" in refused(diffusion, "sample", *out, "--classes", "100")
        medians, _ = run(diffusion, "neighbours", *out, "--count", 8)
        assert all(median > 0 for median in medians)
        run(diffusion, "schedules", "--out", f"{root}/whole")
        # FID with a stand-in for the network; without one, the samples stay.
        none = ["--inception", f"{root}/none.pt"]
        monkey(torch.hub, "download_url_to_file", lambda *args: 1 / 0)     # no test downloads
        message = refused(diffusion, "fid", *out, "--fid-count", 60, *none)
        assert diffusion.INCEPTION_SHA256 in message and "none.pt" in message
        assert np.load(f"{root}/whole/fid-samples.npz")["samples"].shape == (60, 32, 32, 3)
        monkey(diffusion, "load_inception", lambda path: StubInception())
        result, text = run(diffusion, "fid", *out, "--fid-count", 60)
        assert result > 0 and "not comparable" in text and "floor" in text
        kept, _ = run(diffusion, "fid", *out, "--fid-count", 60, "--sample-seed", 0)
        assert kept > 0


def test_diffusion_learns():
    """After some steps the loss with true labels is below the loss with shuffled ones."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(diffusion, monkey, train=6000, test=400)
        monkey(diffusion, "show_results", lambda *args: None)
        loss, _ = run(diffusion, "--data", "shapes", "--width", 16, "--steps", 100,
                      "--max-lr", 5e-3, "--batch-size", 64, "--warm-up", 20, "--ema", 0.95, "--label-drop", 0,
                      "--out", out)
        net = diffusion.UNet(width=16)
        net.load_state_dict(torch.load(f"{out}/checkpoint.pt", weights_only=True)["ema"])
        data = diffusion.load_data("shapes")
        true, _ = diffusion.validation_loss(net, data.test_x, data.test_y, "linear")
        assert abs(true - loss) < 1e-6
        mixed = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))
        wrong = data.test_y[mixed]
        shuffled, _ = diffusion.validation_loss(net, data.test_x, wrong, "linear")
        # A network that says zero has 0.75 here.
        assert loss < 0.4 and shuffled > 1.3 * true, (true, shuffled)


def test_diffusion_bad_input():
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(diffusion, monkey)
        out = f"{root}/run"
        for flags, words in [
                (["--steps", 50_001], "--steps 50001"), (["--steps", 0], "--steps 0"),
                (["--max-lr", "nan"], "nan"), (["--batch-size", 601], "--batch-size 601: there are 600"),
                (["--width", 72], "parameters, not under 1,000,000"),
                (["--width", 20], "--width 20"), (["--eta", 2], "--eta 2"),
                (["--classes", "rose"], "rose"), (["--clip-x0", "hard"], "hard"),
                (["sample"], "checkpoint.pt"), (["fly"], "fly"), (["--no-such"], "no-such")]:
            message = refused(diffusion, *flags, *SMALL[:2], "--out", out,
                              *([] if "--batch-size" in flags else ["--batch-size", 50]))
            assert words in message and "\n" not in message, message
        assert not Path(out, "checkpoint.pt").exists()
        # The other script's checkpoint, and one that is cut.
        run(classifier, *TINY, "--batch-size", 50, "--steps", 1, "--out", out)
        path = Path(out, "checkpoint.pt")
        for content in (path.read_bytes(), path.read_bytes()[:1000], b""):
            path.write_bytes(content)
            for mode in ([], ["sample"]):
                assert "can't use" in refused(diffusion, *mode, *SMALL, "--steps", 1, "--out", out)
            assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")
             and (len(sys.argv) < 2 or any(word in name for word in sys.argv[1:]))]
    failed, began = 0, time.time()
    for name, test in tests:
        start = time.time()
        try:
            test()
            print(f"ok      {time.time() - start:5.1f} s  {name}", flush=True)
        except BaseException as error:                    # SystemExit too: a test must not end us
            if isinstance(error, KeyboardInterrupt):
                raise
            import traceback
            traceback.print_exc()
            print(f"FAILED  {time.time() - start:5.1f} s  {name}", flush=True)
            failed += 1
    print(f"in {time.time() - began:.0f} s\n{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
