# SPDX-License-Identifier: MIT
"""Tests of both scripts: `python test_smoke.py`, or under pytest. No download, no GPU.
If there is one, one test uses it; from all others it is hidden.

`python test_smoke.py resume shapes` runs only the tests whose names contain one of the
words.
"""
import ast
import collections
import contextlib
import csv
import functools
import inspect
import io
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

# Torch must not see an NVIDIA GPU: the tests say what happens on a CPU, and some pretend
# that there is a GPU, by their own rules.
ENVIRONMENT = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import torch.nn.functional as F
import torchgen
import torchvision
from PIL import Image
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import classifier
import diffusion

HERE = Path(__file__).parent
SCRIPTS = ["classifier.py", "diffusion.py"]
MODULES = [classifier, diffusion]

# Flags of the smallest useful run of each script.
TINY = (
    "--data shapes --width 8 --layers 1 --batch-size 100 --log-every 5 --eval-every 50"
).split()
SMALL = (
    "--data shapes --width 8 --batch-size 50 --log-every 5 --eval-every 50 "
    "--sample-steps 2 --count 8"
).split()


# --------------------------------------------------------------------------------------
# Help
# --------------------------------------------------------------------------------------


def run(module, *argv):
    """(result of main(argv), all that it printed)."""
    text = io.StringIO()
    words = [str(word) for word in argv]
    with contextlib.redirect_stdout(text):
        result = module.main(words)
    return result, text.getvalue()


def run_quietly(function, *args):
    """What a function returns; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def raised(kind, function, *args, **kwargs):
    """The exception of that kind that a call ends with; fails if there is none, or none
    with a text. What the call prints is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function(*args, **kwargs)
    except kind as error:
        assert str(error)
        return error
    raise AssertionError(f"no {kind.__name__}")


def refused(module, *argv):
    """The one message with which main(argv) ends; fails if it ends well, or with a
    traceback."""
    message = raised(SystemExit, run, module, *argv).code
    assert isinstance(message, str), message
    assert message.startswith("error: "), message
    return message


def refused_in_small(module, *flags):
    """The message with which training on few drawn shapes ends."""
    with small_run(module) as (_, out):
        return refused(
            module, "--data", "shapes", "--batch-size", 50, "--out", out, *flags
        )


@contextlib.contextmanager
def patched():
    """A function monkey(object, name, value) that is undone at the end of the block."""
    changes = []

    def monkey(thing, name, value):
        changes.append((thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    try:
        yield monkey
    finally:
        for thing, name, value in reversed(changes):
            setattr(thing, name, value)


def small_shapes(module, monkey, train=600, test=200):
    """Make `module` draw fewer shapes, so that a run takes a second."""
    draw = module.draw_shapes

    def draw_few(count, seed):
        return draw(train if count > 5000 else test, seed)

    monkey(module, "draw_shapes", draw_few)


@contextlib.contextmanager
def small_run(module, train=600, test=200):
    """(monkey, a folder to write to), while `module` draws few shapes."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(module, monkey, train, test)
        yield monkey, Path(out)


def nothing(*args, **kwargs):
    """Stands in for a function whose work a test doesn't need."""


def no_net(*args, **kwargs):
    """Stands in for a download on a machine without a network."""
    raise OSError("no route to host")


def first_argument(value, *args, **kwargs):
    """Stands in for a mode, to show the settings that it would get, or for a step that
    should leave pictures as they are."""
    return value


def without_results(module, monkey):
    """Skip what training ends with: reports, samples, pictures."""
    for name in ("report", "draw_predictions", "show_results"):
        if hasattr(module, name):
            monkey(module, name, nothing)


def interrupted(module, name, call, *argv):
    """Run main(argv) with Ctrl-C right before call number `call` of module.name, a
    function that the training loop calls; fails unless the run ends with the exit
    status of Ctrl-C."""
    function = getattr(module, name)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    with patched() as monkey:
        monkey(module, name, wrapped)
        stop = raised(SystemExit, run, module, *argv)
    assert stop.code == 128 + signal.SIGINT


def same(first, second):
    """Whether two nested structures of tensors and values are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def load_state(out, name="checkpoint.pt"):
    """The contents of the checkpoint in a run's folder."""
    return torch.load(Path(out) / name, weights_only=True)


def log_column(out, name):
    """The numbers of one column of log.csv, where it has some."""
    with (Path(out) / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows if row[name]]


def is_picture(path):
    """Whether a file is larger than an empty plot would be."""
    return path.stat().st_size > 2000


def parameter_count(net):
    """How many weights a network has, counted apart from the scripts."""
    return sum(weight.numel() for weight in net.parameters())


def weight_copies(net):
    """Copies of all weights, as they are now."""
    return [weight.detach().clone() for weight in net.parameters()]


def check_table(table, count):
    """The lines of a parameter table add up to `count`, which is its last."""
    counts = {}
    for line in table.splitlines():
        name, number = line.split()
        counts[name] = int(number.replace(",", ""))
    total = counts.pop("total")
    assert total == count
    assert sum(counts.values()) == count


def random_bytes(*shape):
    """Pictures of random pixels, uint8."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# --------------------------------------------------------------------------------------
# The frame: what holds for every script
# --------------------------------------------------------------------------------------


def source_of(script):
    """The text of a script."""
    return (HERE / script).read_text(encoding="utf-8")


@functools.cache
def syntax_tree(script):
    """The syntax tree of a script."""
    return ast.parse(source_of(script))


def copied(script, *names):
    """What the last of `names` is after these definitions of a script were executed
    with its imports and constants, and nothing else."""
    frame = (ast.Import, ast.ImportFrom, ast.Assign)
    body = []
    for node in syntax_tree(script).body:
        if isinstance(node, frame) or getattr(node, "name", None) in names:
            body.append(node)

    space = {"__name__": "copied"}
    code = compile(ast.Module(body, []), script, "exec")
    exec(code, space)
    return space[names[-1]]


def test_pieces_copy_alone():
    """Each top-level function and class executes with only the file's imports and
    constants, and says what it does."""
    for script in SCRIPTS:
        pieces = []
        for node in syntax_tree(script).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                pieces.append(node)
        assert len(pieces) > 20

        for piece in pieces:
            assert callable(copied(script, "setting", piece.name))
            assert ast.get_docstring(piece), f"{script}: {piece.name} has no docstring"


def test_layers_work_alone():
    """A reader who copies one layer or function, and nothing else, can call it."""
    one = functools.partial(copied, "classifier.py")
    two = functools.partial(copied, "diffusion.py")
    x = torch.zeros(2, 3, 6, 4)
    tokens = torch.zeros(2, 5, 8)

    assert one("depthwise_separable")(3, 8)(x).shape == (2, 8, 6, 4)
    assert one("Attention")(8)(tokens).shape == (2, 5, 8)
    assert one("GatedMLP")(8, 20)(tokens).shape == (2, 5, 8)
    muon = one("orthogonalise", "MuonWithAdamW")
    assert muon([dict(params=[torch.nn.Parameter(x)], muon=True)]).step() is None
    assert one("RMSNorm")(8)(torch.ones(2, 8)).shape == (2, 8)
    assert one("fourier_positions")(6, 12).shape == (36, 12)
    draw = one("shape_distance", "draw_shapes")
    assert draw(5, 0)[0].shape == (5, 3, 32, 32)
    assert one("to_device", "random_crop_and_flip")(x.byte()).shape == x.shape
    tools = ["to_device", "strength", "pixel_sources", "sharpen", "apply_operation"]
    randaugment = one(*tools, "randaugment")
    assert randaugment(x.byte()).shape == x.shape

    assert two("separable_conv")(3, 8)(x).shape == (2, 8, 6, 4)
    picture = torch.zeros(2, 4, 3, 5)
    assert two("Attention")(4)(picture).shape == picture.shape
    assert two("cosine_schedule")(torch.tensor([0.5])).abs() < 1e-5
    assert two("clip_picture")(x, "dynamic").shape == x.shape
    assert two("slerp")(x, x, torch.ones(2)).shape == x.shape


def imported_modules(tree):
    """The names of all modules that a syntax tree imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def test_imports_are_required():
    """Every import is of the standard library, in requirements.txt, or Pillow, which
    torchvision brings."""
    required = set()
    for line in (HERE / "requirements.txt").read_text().splitlines():
        if line and line[0] != "#":
            required.add(re.split(r"[<>=~! ]", line)[0])
    assert required == {"torch", "torchvision", "numpy"}

    allowed = required | {"PIL"} | sys.stdlib_module_names
    for script in SCRIPTS:
        for name in imported_modules(syntax_tree(script)):
            assert name.split(".")[0] in allowed, (script, name)


def test_readme_flags_exist():
    """Every flag in the commands of README.md and experiments.md is known to its
    script."""
    for name in ("README.md", ".github/experiments.md"):
        text = source_of(name).replace("\\\n", " ")
        commands = re.findall(r"python (\w+\.py)([^\n`#|&]*)", text)
        assert set(SCRIPTS) <= {script for script, _ in commands}

        for script, words in commands:
            assert (HERE / script).exists(), script
            if script == "test_smoke.py":
                continue
            module = sys.modules[script.removesuffix(".py")]
            known = {"help"}
            for field in module.Settings.__dataclass_fields__:
                known.add(field.replace("_", "-"))
            for flag in re.findall(r"--([a-z][a-z0-9-]*)", words):
                assert flag in known, f"{name}: {script} has no --{flag}"

            # The front page's commands are right in mode and values too.
            if name == "README.md":
                *_, given = module.parse(shlex.split(words))
                module.choose_settings(**given)


def test_freed_memory_is_kept():
    """After set_up a large tensor takes the pages of one that was freed: next to no page
    faults, where there are thousands each time otherwise. (Without the trim threshold
    that depends on what happens to lie above it, so this fails in most runs, not in
    all.)"""
    if sys.platform != "linux":
        return
    program = """
import resource, sys, torch
module = __import__(sys.argv[1])
if sys.argv[2] == "kept":
    module.set_up(module.Settings(out=sys.argv[3]))
faults = []
for _ in range(8):  # the first few cut kept memory up, and need a new block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    with tempfile.TemporaryDirectory() as out:
        for name in ("classifier", "diffusion"):
            for how in ("kept", "given back"):
                command = [sys.executable, "-c", program, name, how, out]
                done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
                settled = [int(word) for word in done.stdout.split()[-4:]]
                for faults in settled:
                    assert (faults < 1_000) == (how == "kept"), (name, how, settled)


def test_readme_links():
    """Each link of the README into a script leads to the section that it names."""
    pattern = r"\[(\d+) ([^\]]+)\]\((\w+\.py)#L(\d+)\)"
    links = re.findall(pattern, source_of("README.md"))
    assert len(links) == 12 + 16
    for number, title, script, line in links:
        lines = source_of(script).splitlines()
        heading = lines[int(line) - 1]
        assert heading == f"# {number}. {title}", (script, number, title)


def test_header_and_top_level():
    """Each script names its licence, has no line over 100 columns, and ends with main
    and its call."""
    for script in SCRIPTS:
        text = source_of(script)
        assert text.startswith("# SPDX-License-Identifier: MIT\n")
        longest = max(map(len, text.splitlines()))
        assert longest <= 100, f"{script}: a line over 100 columns"

        main_function, call = syntax_tree(script).body[-2:]
        assert main_function.name == "main"
        assert isinstance(call, ast.If)


# --------------------------------------------------------------------------------------
# classifier.py: network
# --------------------------------------------------------------------------------------

VARIANTS = [
    dict(block="gpt2"),
    dict(activation="gelu"),
    dict(activation="relu"),
    dict(tied="off"),
    dict(positions="learned"),
    dict(positions="none"),
    dict(downsample="strided"),
    dict(stem="plain"),
    dict(stem="plain", downsample="strided"),
    dict(gate="plain"),
    dict(head="pair"),
    dict(optimiser="adamw"),
    dict(recipe="paper"),
    dict(layers=0),
    dict(layers=1),
    dict(layers=2),
    dict(layers=3),
    dict(layers=5),
    dict(layers=6),
]


def widest(**variant):
    """The network that the script builds for a variant when no width is given."""
    settings = classifier.choose_settings(**variant)
    return classifier.build_network(settings, classes=100)


def stem_width(net):
    """How many channels a classifier's stem ends with."""
    return net.positions.shape[1]


def test_classifier_budget():
    """The default is the widest network that fits and uses the budget well, the printed
    table adds up, and training refuses more."""
    net = classifier.Classifier()
    count = parameter_count(net)
    assert stem_width(widest()) == 80
    words = " ".join(classifier.__doc__.split())
    assert f"beyond it in four places, in {count:,} parameters" in words
    paper = parameter_count(widest(recipe="paper"))
    assert f"`--recipe paper` builds, in {paper:,} parameters" in words
    assert 90_000 < count < paper < 100_000

    learned = classifier.Classifier(positions="learned", width=72)
    for some in (net, learned):
        table = classifier.parameter_table(some)
        check_table(table, parameter_count(some))

    assert classifier.MAX_PARAMETERS == 100_000
    assert classifier.MAX_STEPS == 10_000
    over = parameter_count(classifier.Classifier(width=88))
    assert over >= 100_000
    message = refused_in_small(classifier, "--width", 88)
    assert f"{over:,} parameters, not under 100,000" in message


def test_step_budget():
    """The loop refuses the update after the last one allowed, whatever the settings
    say."""
    for module in MODULES:
        with patched() as monkey:
            monkey(module, "MAX_STEPS", 3)
            message = refused_in_small(module, "--width", 8, "--steps", 5)
        assert "all 3 optimiser steps are spent" in message


def test_classifier_shapes():
    """All sizes different, so that no two axes can be mixed up unseen."""
    x = torch.randn(5, 3, 32, 32)
    net = classifier.Classifier(classes=7, width=24, layers=2)
    assert net(x).shape == (5, 7)
    assert net.stem(x).shape == (5, 24, 8, 8)

    # In bf16 the logits are still of fp32's fineness.
    for block in ("llama", "gpt2"):
        net = classifier.Classifier(classes=7, width=24, layers=2, block=block)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())

    x = torch.randn(4, 6, 12, 20)
    layer = classifier.depthwise_separable(6, 10, 3)
    assert layer(x).shape == (4, 10, 12, 20)
    layer = classifier.depthwise_separable(6, 10, strided=True)
    assert layer(x).shape == (4, 10, 6, 10)

    tokens = torch.randn(3, 11, 24)
    assert classifier.EncoderLayer(24)(tokens).shape == (3, 11, 24)
    tokens = torch.randn(3, 25, 24)
    assert classifier.EncoderLayer(24, local_gate=True)(tokens).shape == (3, 25, 24)


def test_variants_step():
    """Each variant builds at the largest width that fits, and a step changes all of its
    weights."""
    x = torch.randn(4, 3, 32, 32)
    y = torch.tensor([0, 1, 2, 3])
    for variant in VARIANTS:
        net = widest(**variant)
        width = stem_width(net)
        assert parameter_count(net) < 100_000
        wider = widest(**variant, width=width + 8)
        assert parameter_count(wider) >= 100_000, (variant, width)

        name = classifier.choose_settings(**variant).optimiser
        optimiser = classifier.make_optimiser(net, 0.1, name)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2
        before = weight_copies(net)
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()

        assert torch.isfinite(loss)
        for (name, weight), old in zip(net.named_parameters(), before):
            assert not torch.equal(weight, old), (variant, name)


def network_arguments(module, network, **given):
    """The arguments with which build_network makes the network of these settings: width
    and all after it."""
    kind = getattr(module, network)
    seen = []

    def noting(classes, width, **variant):
        assert classes == 100
        seen.append(dict(variant, width=width))
        return kind(classes, width, **variant)

    with patched() as monkey:
        monkey(module, network, noting)
        module.build_network(module.choose_settings(**given), 100)
    (arguments,) = seen
    return arguments


def check_arguments(module, network, cases):
    """Each of the settings `cases` changes the argument of its name, and no other, from
    the default of the network's class."""
    defaults = {}
    for name, parameter in inspect.signature(getattr(module, network)).parameters.items():
        if name not in ("classes", "e_width"):
            defaults[name] = parameter.default
    defaults["width"] = 16
    assert network_arguments(module, network, width=16) == defaults

    together = dict(item for case in cases for item in case.items())
    for case in [*cases, together]:
        changed = {}
        for name, value in case.items():
            changed[name] = value == "on" if value in ("on", "off") else value
        assert network_arguments(module, network, width=16, **case) == {**defaults, **changed}


def test_network_settings_arrive():
    """Every setting of the network reaches it, each by itself; without any the network is
    the one that its class builds by default."""
    other = {"recipe", "optimiser"}  # not the network's own
    cases = [case for case in VARIANTS if not other & set(case)]
    assert len(set().union(*cases)) == 9
    check_arguments(classifier, "Classifier", cases)
    check_arguments(diffusion, "UNet", [dict(after_injection="separable"), dict(modulate="off")])


def test_tying_is_real():
    """Four applications and one set of weights, whose gradient is the sum over the
    applications."""
    net = classifier.Classifier(width=16).eval()
    assert len(net.encoder) == 1

    calls = []
    hook = net.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    net(x).square().sum().backward()
    assert len(calls) == 4
    hook.remove()

    # Four layers of their own, all with these weights, compute the same.
    untied = classifier.Classifier(width=16, tied=False).eval()
    for own in untied.encoder:
        own.load_state_dict(net.encoder[0].state_dict())
    others = {}
    for name, value in net.state_dict().items():
        if not name.startswith("encoder"):
            others[name] = value
    untied.load_state_dict(others, strict=False)
    assert_close(untied(x), net(x))

    untied(x).square().sum().backward()
    summed = sum(own.mlp.gate.weight.grad for own in untied.encoder)
    tied = net.encoder[0].mlp.gate.weight.grad
    assert_close(tied, summed, rtol=1e-3, atol=1e-6)
    separate = set(map(id, untied.encoder.parameters()))
    assert len(separate) == 4 * len(list(net.encoder.parameters()))


def test_rmsnorm_and_swiglu_by_formula():
    """Both layers against their formulas; and the norm keeps bf16 as it is."""
    x = torch.randn(3, 5, 8)
    norm = classifier.RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    size = x.square().mean(-1, keepdim=True).sqrt()
    assert_close(norm(x), x / size * norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16

    mlp = classifier.GatedMLP(8, 12)
    gate = x @ mlp.gate.weight.T
    value = x @ mlp.value.weight.T
    hidden = gate * torch.sigmoid(gate) * value
    assert_close(mlp(x), hidden @ mlp.out.weight.T)


def test_attention_by_formula():
    """Each head is a softmax average of its values, with scores over sqrt(channels per
    head)."""
    x = torch.randn(2, 5, 8)
    attention = classifier.Attention(8, heads=2)
    queries, keys, values = attention.qkv(x).chunk(3, -1)

    heads = []
    for q, k, v in zip(queries.chunk(2, -1), keys.chunk(2, -1), values.chunk(2, -1)):
        scores = q @ k.transpose(1, 2) / math.sqrt(4)
        heads.append(torch.softmax(scores, -1) @ v)
    assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_positions_differ():
    """No two places are alike; the first half of the channels tells the row, the second
    the column."""
    table = classifier.fourier_positions(8, 16)
    distance = torch.cdist(table, table) + 9 * torch.eye(64)
    assert distance.min() > 0.1

    grid = table.view(8, 8, 16)
    assert_close(grid[3, :, :8], grid[3, :1, :8].expand(8, -1))
    assert_close(grid[:, 5, 8:], grid[:1, 5, 8:].expand(8, -1))


# --------------------------------------------------------------------------------------
# classifier.py: data
# --------------------------------------------------------------------------------------


def test_shapes_data():
    """The seed alone decides what is drawn, all classes are there, and a shape has the
    colour that its name says."""
    x, y, names = classifier.draw_shapes(300, seed=3)
    again, _, _ = classifier.draw_shapes(300, seed=3)
    other, _, _ = classifier.draw_shapes(300, seed=4)
    assert x.shape == (300, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert len(set(names)) == 100
    assert "red circle" in names
    assert y.min() >= 0
    assert y.max() < 100

    # Somewhere in each picture is the circle's own colour: red or blue.
    x, y, _ = classifier.draw_shapes(3000, seed=5)
    for name, channel in [("red circle", 0), ("blue circle", 2)]:
        pictures = x[y == names.index(name)]
        bright = (pictures[:, channel] > 200).flatten(1).any(1)
        assert bright.all(), name


def test_shapes_defaults():
    """--data shapes trains with defaults of its own, which a flag overrides; the usual
    data set does not, and each has its own folder."""
    for module in MODULES:
        with patched() as monkey:
            monkey(module, "train", first_argument)
            drawn, _ = run(module, "--data", "shapes", "--steps", 7)
            usual, _ = run(module)

        assert drawn.steps == 7
        assert drawn.batch_size == module.SHAPES["batch_size"]
        assert usual == module.Settings(out=usual.out)
        assert usual.batch_size != drawn.batch_size
        assert str(drawn.folder()).endswith("shapes")
        assert str(usual.folder()).endswith(module.DATASET.__name__.lower())


def test_recipe_paper():
    """--recipe paper gives the paper's design back, whatever the defaults; a flag still
    wins."""
    for module in MODULES:
        with patched() as monkey:
            monkey(module, "train", first_argument)
            paper, _ = run(module, "--recipe", "paper")
            drawn, _ = run(module, "--recipe", "paper", "--data", "shapes")
            usual, _ = run(module)
            for name, value in module.PAPER.items():
                default = getattr(usual, name)
                assert default != value, f"{name}: PAPER names what is the default"
                assert getattr(paper, name) == value
                assert getattr(drawn, name) == value

                flag = "--" + name.replace("_", "-")
                mixed, _ = run(module, "--recipe", "paper", flag, default)
                assert getattr(mixed, name) == default

    paper = dict(stem="plain", gate="plain", head="pair", optimiser="adamw")
    assert classifier.PAPER == paper
    assert classifier.Settings().batch_size == 1024

    paper = dict(modulate="off", log_snr_shift=0.0)
    sampling = dict(sample_steps=100, eta=1.0, guidance=3.0, clip_x0="dynamic")
    assert diffusion.PAPER == {**paper, **sampling}

    # Drawn shapes are learned in small batches, with the paper's recipe too.
    drawn = classifier.choose_settings(data="shapes", recipe="paper")
    assert drawn.batch_size == classifier.SHAPES["batch_size"]


def test_plain_stem():
    """The paper's stem has our weights. It differs from ours in the last two
    convolutions alone: ours adds their input to their output, and pools after them
    instead of before."""
    torch.manual_seed(0)
    ours = classifier.Classifier(width=16).eval()
    plain = classifier.Classifier(width=16, stem="plain", gate="plain").eval()
    state = dict(zip(plain.stem.state_dict(), ours.stem.state_dict().values()))
    plain.stem.load_state_dict(state)

    x = torch.randn(2, 3, 32, 32)
    middle = plain.stem[:3](x)
    assert middle.shape == (2, 16, 16, 16)
    assert torch.equal(middle, ours.stem[:3](x))
    pool = torch.nn.MaxPool2d(2)
    third, fourth = plain.stem[4:]
    assert_close(plain.stem(x), fourth(third(pool(middle))))

    added = middle + third(middle)
    assert_close(ours.stem(x), pool(added + fourth(added)))


def test_local_gate():
    """Each channel of the gate is filtered over the square of the tokens, before the
    activation; so a token's output depends on its eight neighbours and on no other."""
    torch.manual_seed(0)
    mlp = classifier.GatedMLP(8, 6, local=True)
    x = torch.randn(2, 25, 8, requires_grad=True)
    gate = torch.zeros(2, 25, 6)
    linear = mlp.gate(x)
    for row in range(5):
        for column in range(5):
            for i in range(max(row - 1, 0), min(row + 2, 5)):
                for j in range(max(column - 1, 0), min(column + 2, 5)):
                    weight = mlp.filter.weight[:, 0, i - row + 1, j - column + 1]
                    gate[:, 5 * row + column] += weight * linear[:, 5 * i + j]
    gate = F.silu(gate + mlp.filter.bias)
    assert_close(mlp(x), mlp.out(gate * mlp.value(x)))

    # Token 7 is row 1, column 2.
    mlp(x)[0, 7].sum().backward()
    seen = x.grad[0].abs().sum(1).nonzero().flatten()
    assert seen.tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert x.grad[1].abs().sum() == 0


def test_orthogonalise():
    """The singular vectors stay, and singular values from 0.01 to 1 of the largest
    possible end between 0.68 and 1.14, whichever axis is longer, whatever the scale."""
    torch.manual_seed(0)
    sizes = [(6, 6), (9, 4), (4, 9), (1, 9), (9, 1)]
    for rows, columns in sizes:
        for scale in (1e-4, 1.0, 1e4):
            few = min(rows, columns)
            u = torch.linalg.qr(torch.randn(rows, few)).Q
            v = torch.linalg.qr(torch.randn(columns, few)).Q
            s = torch.logspace(0, -1.5, few)
            result = classifier.orthogonalise(scale * (u * s) @ v.T)

            # Each singular value by the polynomial, five times.
            expected = s / (s.norm() + 1e-7 / scale)
            for _ in range(5):
                odd = expected, expected**3, expected**5
                expected = 3.4445 * odd[0] - 4.775 * odd[1] + 2.0315 * odd[2]

            assert result.shape == (rows, columns)
            inner = u.T @ result @ v
            values = inner.diagonal()
            assert_close(inner, expected.diag(), rtol=0, atol=1e-3)
            assert values.min() > 0.67, values
            assert values.max() < 1.15, values


def test_muon():
    """Three updates of Muon against the formulas, of a matrix, a tall one and a filter;
    what has one axis moves as under AdamW; what has no gradient stays."""
    torch.manual_seed(0)
    shapes = [(4, 6), (8, 2), (5, 1, 3, 3), (7,), (3, 3)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    net = torch.nn.ParameterList(weights)
    vector = torch.nn.Parameter(weights[3].detach().clone())
    adamw = torch.optim.AdamW([vector], lr=0.1, weight_decay=0.0)
    muon = classifier.MuonWithAdamW(
        [
            dict(params=weights[:3] + weights[4:], weight_decay=0.3, muon=True),
            dict(params=weights[3:4], weight_decay=0.0),
        ]
    )
    for group in muon.param_groups:
        group["lr"] = 0.1

    expected = weight_copies(net)
    means = [torch.zeros(shape) for shape in shapes]
    for _ in range(3):
        for i, weight in enumerate(weights[:4]):
            weight.grad = torch.randn_like(weight)
            means[i] = 0.95 * means[i] + 0.05 * weight.grad
            ahead = 0.05 * weight.grad + 0.95 * means[i]
            if i < 3:
                rows = len(weight)
                columns = weight.numel() // rows
                turned = classifier.orthogonalise(ahead.view(rows, columns))
                longer = max(1, rows / columns) ** 0.5
                move = 0.1 * longer * turned.view_as(weight)
                expected[i] = expected[i] * (1 - 0.1 * 0.3) - move
        vector.grad = weights[3].grad.clone()
        adamw.step()
        muon.step()
        muon.zero_grad()

    expected[3] = vector.detach()
    for weight, value in zip(weights, expected):
        assert_close(weight.detach(), value)


def windows(picture):
    """Every ((top, left, flip), window) that crop and flip can make of a picture."""
    padded = F.pad(picture, (4, 4, 4, 4))
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            yield (top, left, 0), window
            yield (top, left, 1), window.flip(-1)


def test_augment():
    """The seed alone decides, pictures stay uint8; crop and flip alone make windows of
    the padded picture, at many places, both ways round."""
    torch.manual_seed(0)
    x = random_bytes(40, 3, 32, 32)
    torch.manual_seed(1)
    first = classifier.augment(x, 2, 9)
    torch.manual_seed(1)
    second = classifier.augment(x, 2, 9)
    assert first.dtype == torch.uint8
    assert first.shape == x.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, x)
    assert not torch.equal(classifier.augment(x, 2, 9), first)

    seen = set()
    for picture, result in zip(x, classifier.augment(x, 0)):
        found = []
        for place, window in windows(picture):
            if torch.equal(window, result):
                found.append(place)
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20
    assert {flip for _, _, flip in seen} == {0, 1}


def test_crop_and_mirror():
    """Shifts by -4 to 4 pixels, both ways, and mirror images are all equally likely."""
    torch.manual_seed(0)
    x = torch.zeros(9000, 3, 11, 11, dtype=torch.uint8)
    x[:, :, 5, 5] = 255
    x[:, :, 5, 6] = 100
    result = classifier.random_crop_and_flip(x)[:, 0]
    row = (result == 255).any(dim=2).long().argmax(dim=1)
    column = (result == 255).any(dim=1).long().argmax(dim=1)
    beside = (result == 100).any(dim=1).long().argmax(dim=1)
    mirrored = beside < column
    assert torch.equal(beside, torch.where(mirrored, column - 1, column + 1))

    # 1,000 of each are expected, and six standard deviations are 180.
    for place in (row, column):
        counts = place.bincount(minlength=11)
        assert counts[0] == counts[10] == 0
        assert (counts[1:10] - 1000).abs().max() < 180
    assert abs(mirrored.float().mean() - 0.5) < 0.03


def test_randaugment_pixels():
    """What torchvision's RandAugment makes of a picture over many draws is what our
    operations make of it, each with each sign: the same set of pictures, to the bit."""
    torch.manual_seed(0)
    x = random_bytes(1, 3, 32, 32) // 2 + 40  # so that autocontrast has something to do
    assert (classifier.apply_operation(x, "autocontrast", 9, 1) != x).any()
    for magnitude in (2, 9, 20):
        reference = v2.RandAugment(1, magnitude)
        theirs = set()
        for _ in range(400):
            theirs.add(reference(x).numpy().tobytes())

        ours = set()
        for name in classifier.OPERATIONS:
            for sign in (1, -1):
                changed = classifier.apply_operation(x, name, magnitude, sign)
                ours.add(changed.numpy().tobytes())
        assert ours == theirs, magnitude

        # The operations differ from each other.
        assert len(ours) > 10


def operations_that_make(picture, result):
    """All (operation, sign) that turn a picture into the result, at magnitude 9."""
    found = []
    for name in classifier.OPERATIONS:
        for sign in (1, -1):
            changed = classifier.apply_operation(picture[None], name, 9, sign)
            if torch.equal(changed[0], result):
                found.append((name, sign))
    return found


def test_randaugment_draws():
    """Every picture draws for itself, evenly, in one call for all that drew the same,
    and comes back to its own place; two operations are two."""
    torch.manual_seed(0)
    sizes = {}
    apply = classifier.apply_operation

    def counting(x, name, magnitude, sign):
        assert (name, sign) not in sizes
        sizes[name, sign] = len(x)
        return apply(x, name, magnitude, sign)

    count = 14_000
    with patched() as monkey:
        monkey(classifier, "apply_operation", counting)
        classifier.randaugment(torch.zeros(count, 3, 4, 4, dtype=torch.uint8))
    assert len(sizes) == 28
    assert sum(sizes.values()) == count
    expected = count / 28
    deviation = (expected * 27 / 28) ** 0.5
    for size in sizes.values():
        assert abs(size - expected) < 4.5 * deviation, sizes

    # Each result is one of the operations on the picture at the same place.
    x = random_bytes(60, 3, 8, 8)
    seen = set()
    for picture, result in zip(x, classifier.randaugment(x, 9)):
        kinds = operations_that_make(picture, result)
        assert kinds
        seen.add(kinds[0])
    assert len(seen) > 10

    # After two operations, many pictures are what no single one makes.
    with patched() as monkey:
        monkey(classifier, "random_crop_and_flip", first_argument)
        twice = classifier.augment(x, 2, 9)
    new = 0
    for picture, result in zip(x, twice):
        new += not operations_that_make(picture, result)
    assert new > 20


def test_normalise():
    """Mean 0 and deviation 1 per channel, in channels-last memory; a second call on the
    same pictures is refused."""
    x, _, _ = classifier.draw_shapes(500, seed=0)
    mean, std = classifier.channel_statistics(x)
    normal = classifier.normalise(x, mean, std)
    assert normal.mean((0, 2, 3)).abs().max() < 1e-3
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert normal.is_contiguous(memory_format=torch.channels_last)

    error = raised(AssertionError, classifier.normalise, normal, mean, std)
    assert "uint8" in str(error)


def picture_set(x):
    """Pictures as a set of byte strings."""
    return {picture.numpy().tobytes() for picture in x}


def test_holdout():
    """Ten pictures per class are held out, always the same; no picture is lost or on
    both sides, the order stays mixed, and the test set is untouched."""
    with patched() as monkey:
        small_shapes(classifier, monkey, train=6000)
        whole = classifier.load_data("shapes")
        data = classifier.load_data("shapes", 1000)
        again = classifier.load_data("shapes", 1000)

    assert len(data.val_y) == 1000
    assert (data.val_y.bincount(minlength=100) == 10).all()
    assert len(data.train_y) == 5000
    assert same(list(data), list(again))
    assert len(data.train_y[:1000].unique()) > 90

    kept = picture_set(data.train_x)
    held = picture_set(data.val_x)
    assert kept | held == picture_set(whole.train_x)
    assert not kept & held
    assert torch.equal(data.test_x, whole.test_x)
    assert torch.equal(whole.val_x, whole.test_x)


def test_cifar_folder():
    """The real loader on files in the data set's format, on damaged and on missing
    ones; and with CIFAR-10 in place of CIFAR-100, which is one word in the script."""
    datasets = [torchvision.datasets.CIFAR100, torchvision.datasets.CIFAR10]
    for module in MODULES:
        for dataset in datasets:
            with tempfile.TemporaryDirectory() as root, patched() as monkey:
                monkey(module, "DATASET", dataset)
                check_cifar_folder(module, dataset, monkey, root)


def check_cifar_folder(module, cifar, monkey, root):
    """What test_cifar_folder says, for one data set."""
    assert module.Settings().folder().name.endswith(cifar.__name__.lower())
    train = cifar.train_list[0][0]
    test = cifar.test_list[0][0]
    meta = cifar.meta["filename"]

    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [number % 5 for number in range(20)]
    content = {
        train: {"data": pixels, "labels": labels},
        test: {"data": pixels[:10], "labels": labels[:10]},
        meta: {cifar.meta["key"]: list("abcde")},
    }
    folder = Path(root) / cifar.base_folder
    folder.mkdir()
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    flags = ["--data", root, "--out", Path(root) / "out"]

    # Our small files have their own sums, so these must be refused ...
    message = refused(module, *flags)
    assert "damaged" in message or "corrupted" in message
    for part in (root, cifar.tgz_md5, cifar.__name__):
        assert part in message, part

    # ... and accepted once their sums are those expected.
    md5 = torchvision.datasets.utils.calculate_md5
    monkey(cifar, "train_list", [[train, md5(folder / train)]])
    monkey(cifar, "test_list", [[test, md5(folder / test)]])
    monkey(cifar, "meta", dict(cifar.meta, md5=md5(folder / meta)))
    x, y, test_x, test_y, names = module.load_cifar(root)
    assert x.shape == (20, 3, 32, 32)
    assert test_x.shape == (10, 3, 32, 32)
    assert np.array_equal(x.numpy().reshape(20, -1), pixels)
    assert np.array_equal(test_x.numpy().reshape(10, -1), pixels[:10])
    assert y.tolist() == labels
    assert test_y.tolist() == labels[:10]
    assert names == list("abcde")

    # Cut short: refused, and left as it is.
    whole = (folder / test).read_bytes()
    (folder / test).write_bytes(whole[:100])
    assert cifar.tgz_md5 in refused(module, *flags)
    assert (folder / test).read_bytes() == whole[:100]

    # Gone: a download, which fails with instructions.
    shutil.rmtree(folder)
    monkey(cifar, "download", no_net)
    message = refused(module, *flags)
    for part in ("no route to host", cifar.url, cifar.tgz_md5, root, "--data shapes"):
        assert part in message, part


# --------------------------------------------------------------------------------------
# classifier.py: training and evaluation
# --------------------------------------------------------------------------------------


def picture_numbers(x, pictures):
    """Which of `pictures` each of x is: their numbers. All uint8, all different."""
    number = {picture.numpy().tobytes(): i for i, picture in enumerate(pictures)}
    return [number[picture.numpy().tobytes()] for picture in x]


def classifier_batches(seed):
    """Two epochs of three steps as train() makes them: the numbers of the pictures of
    each epoch, and the weights that it ends with. What `augment` is told and what the
    network gets are checked on the way."""
    augment = classifier.augment
    forward = classifier.Classifier.forward
    numbers, changed, seen = [], [], []

    def noting_augment(x, operations, magnitude):
        assert (operations, magnitude) == (2, 7)
        numbers.extend(picture_numbers(x, data.train_x))
        changed.append(augment(x, operations, magnitude))
        return changed[-1]

    def noting_forward(self, x):
        if self.training:
            seen.append(x.clone())
        return forward(self, x)

    flags = [*TINY, "--randaugment-ops", 2, "--randaugment-magnitude", 7, "--seed", seed]
    with small_run(classifier, train=60, test=100) as (monkey, out):
        data = classifier.load_data("shapes")
        without_results(classifier, monkey)
        monkey(classifier, "augment", noting_augment)
        monkey(classifier.Classifier, "forward", noting_forward)
        steps = ["--batch-size", 20, "--steps", 6, "--eval-every", 3]
        run(classifier, *flags, *steps, "--out", out)
        weights = load_state(out)["net"]

    mean, std = classifier.channel_statistics(data.train_x)
    assert len(seen) == 6
    for x, result in zip(seen, changed):
        assert torch.equal(x, classifier.normalise(result, mean, std))
    return numbers[:60], numbers[60:], weights


def test_classifier_batches():
    """Each epoch has every picture once, in an order of its own; what is trained on is
    what `augment` made of them; and another seed is another run."""
    first, second, weights = classifier_batches(0)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert sorted(first) not in (first, second)
    other, _, other_weights = classifier_batches(1)
    assert other != first
    assert not same(weights, other_weights)


def test_augment_takes_its_magnitude():
    """What `augment` does of a high magnitude, it does not of a low one: black comes in
    from the side by up to 14 pixels, where a crop alone brings 4."""
    torch.manual_seed(0)
    grey = torch.full((300, 3, 32, 32), 100, dtype=torch.uint8)
    widest = {}
    for magnitude in (2, 30):
        x = classifier.augment(grey, 1, magnitude)
        columns = (x == 0).all(dim=1).all(dim=1)  # (300,32): black from top to bottom
        widest[magnitude] = columns.sum(dim=1).max().item()
    assert widest[2] <= 4 + 1
    assert widest[30] > 10


def test_schedule():
    """OneCycle as train() uses it: rises to the peak at 30 %, ends near 0, a rate for
    each step, and the log has the rates that were used. AdamW's first beta goes the
    other way, and the weight decay is the one asked for."""
    used, betas, decays = [], [], []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        betas.append(self.param_groups[1]["betas"][0])
        decays.append([group["weight_decay"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    flags = ["--steps", 40, "--max-lr", 0.01, "--log-every", 1, "--weight-decay", 0.3]
    with small_run(classifier, train=200, test=100) as (monkey, out):
        monkey(torch.optim.AdamW, "step", noting)
        without_results(classifier, monkey)
        run(classifier, *TINY, *flags, "--out", out)
        rates = log_column(out, "lr")

    assert rates == used
    assert len(rates) == 40
    peak = int(np.argmax(rates))
    assert abs(rates[peak] - 0.01) < 3e-4
    assert abs(peak - 0.3 * 40) <= 1.5
    assert rates[0] < 0.0005
    assert rates[-1] < 1e-4

    changes = np.diff(rates)
    assert (changes[:peak] > 0).all()
    assert (changes[peak:] < 0).all()
    assert abs(betas[0] - 0.95) < 1e-6
    assert abs(betas[peak] - 0.85) < 0.01
    assert abs(betas[-1] - 0.95) < 1e-3
    assert decays == [[0.3, 0.0]] * 40


def test_weight_decay_groups():
    """Matrices and filters decay; biases, norms and other vectors don't."""
    net = classifier.Classifier(width=16)
    for name in ("muon", "adamw"):
        optimiser = classifier.make_optimiser(net, 0.3, name)
        count = 0
        for group in optimiser.param_groups:
            for weight in group["params"]:
                assert group["weight_decay"] == (0.3 if weight.ndim > 1 else 0.0)
                count += weight.numel()
        assert count == parameter_count(net)


def test_optimiser_is_used():
    """Training has the optimiser that was asked for: with Muon's running means, or with
    AdamW's squares for all weights, as in the paper's recipe."""
    for flags, muon in [
        ([], True),
        (["--optimiser", "muon"], True),
        (["--optimiser", "adamw"], False),
        (["--recipe", "paper"], False),
    ]:
        with small_run(classifier) as (monkey, out):
            without_results(classifier, monkey)
            run(classifier, *TINY, *flags, "--steps", 1, "--out", out)
            state = load_state(out)
        squares = ["exp_avg_sq" in kept for kept in state["optimiser"]["state"].values()]
        means = ["mean" in kept for kept in state["optimiser"]["state"].values()]
        assert any(means) == muon, flags
        assert all(squares) == (not muon), flags


def test_label_smoothing_and_clip():
    """What train() minimises is the smoothed cross-entropy, and no gradient is longer
    than asked."""
    losses = []
    norms = []
    cross_entropy = F.cross_entropy
    clip = torch.nn.utils.clip_grad_norm_

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
        gradient = torch.cat([weight.grad.flatten() for weight in parameters])
        norms.append((before.item(), gradient.norm()))
        return before

    flags = ["--steps", 3, "--label-smoothing", 0.2, "--clip-norm", 0.01]
    with small_run(classifier) as (monkey, out):
        monkey(F, "cross_entropy", noting_loss)
        monkey(torch.nn.utils, "clip_grad_norm_", noting_clip)
        without_results(classifier, monkey)
        run(classifier, *TINY, *flags, "--out", out)

    assert len(losses) == 3
    for loss, expected in losses:
        assert abs(loss - expected) < 1e-5
    assert len(norms) == 3
    for before, after in norms:
        assert before > 0.01
        assert 0.0099 < after <= 0.0101


def test_evaluate_is_exact():
    """Loss, accuracy and top-5 against a plain count, the batches over which the spread
    is taken, and that the network is in evaluation mode."""
    torch.manual_seed(0)
    x = random_bytes(600, 3, 8, 8)
    y = torch.randint(0, 9, (600,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 9))
    scale = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with torch.no_grad():
        logits = net(x.float() / 255)
    scores = classifier.evaluate(net.train(), x, y, *scale)
    assert not net.training

    hits = (logits.argmax(1) == y).double()
    assert abs(scores.accuracy - hits.mean().item()) < 1e-9
    assert scores.count == 600
    loss = F.cross_entropy(logits, y)
    assert abs(scores.loss - loss.item()) < 1e-5
    five = (logits.topk(5).indices == y[:, None]).any(1)
    assert abs(scores.top5 - five.double().mean().item()) < 1e-9

    # The largest equal batches of at most 1,024, but two at least: one has no spread.
    assert scores.batch == 300
    halves = hits.view(2, 300).mean(1)
    assert abs(scores.spread - halves.std(correction=0).item()) < 1e-9
    more = torch.cat([x, x, x])[:1400]
    labels = torch.cat([y, y, y])[:1400]
    scores = classifier.evaluate(net, more, labels, *scale)
    assert scores.batch == 700
    halves = torch.cat([hits, hits, hits])[:1400].view(2, 700).mean(1)
    assert abs(scores.spread - halves.std(correction=0).item()) < 1e-9
    assert scores.spread > 0

    smooth = classifier.evaluate(net, x, y, *scale, label_smoothing=0.2)
    expected = F.cross_entropy(logits, y, label_smoothing=0.2)
    assert abs(smooth.loss - expected.item()) < 1e-5


def test_command_for_the_shell():
    """The command that resumes a run: for Windows with double quotes, where it needs
    any; elsewhere as it was given."""
    for module in MODULES:
        command = "python x.py " + shlex.join(["--out", "C:\\x", "--data", "my data"])
        typed = module.as_typed(command, windows=True)
        assert typed == 'python x.py --out C:\\x --data "my data"'
        assert module.as_typed(command, windows=False) == command

        stop = module.StopSignals()
        stop.received = signal.SIGINT
        with patched() as monkey:
            monkey(module, "as_typed", "typed: {}".format)
            assert f"typed: {command}" in str(stop.stopped(1, Path("x"), command))


def test_six_views():
    """The six views are what they are said to be, accuracy over them is that of the mean
    of the logits, and the report says it of the validation pictures."""
    torch.manual_seed(0)
    x = random_bytes(300, 3, 8, 8)
    views = classifier.six_views(x)
    assert torch.equal(views[0], x)
    down, up = views[2], views[4]
    assert torch.equal(down[:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert torch.equal(up[:, :, :-1, :-1], x[:, :, 1:, 1:])
    for black in (down[:, :, 0], down[..., 0], up[:, :, -1], up[..., -1]):
        assert (black == 0).all()
    for i in (0, 2, 4):
        assert torch.equal(views[i + 1], views[i].flip(-1))

    y = torch.randint(0, 9, (300,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 9)).eval()
    scale = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with torch.no_grad():
        one = net(x.float() / 255)
        six = sum(net(view.float() / 255) for view in views) / 6
        assert_close(classifier.predict_logits(net, x, *scale), one)
        assert_close(classifier.predict_logits(net, x, *scale, tta=True), six)
    scores = classifier.evaluate(net, x, y, *scale, tta=True)
    right = (six.argmax(1) == y).float().mean().item()
    assert abs(scores.accuracy - right) < 1e-6
    assert abs(scores.loss - F.cross_entropy(six, y).item()) < 1e-5

    # 200 labels are what the six views say; in the other parts of the data none are.
    y[:200] = six.argmax(1)[:200]
    right = (six.argmax(1) == y).float().mean().item()
    assert right > (one.argmax(1) == y).float().mean().item()
    no_y = (six.argmax(1) + 1) % 9
    names = [str(i) for i in range(9)]
    data = classifier.Data(x, no_y, x, y, x, no_y, names, 0)
    text = classifier.report(net, data, classifier.Settings(), *scale)
    assert f"six views of each picture averaged (not the paper's): {right:.2%}" in text


class Brightness(torch.nn.Module):
    """Says class 0, the more surely the brighter the normalised picture."""

    def forward(self, x):
        logits = torch.zeros(len(x), 10)
        logits[:, 0] = 2 + x.mean(dim=(1, 2, 3))
        return logits


def test_report():
    """Each figure is of the pictures and of the criterion that its name says."""
    x = random_bytes(600, 3, 32, 32)
    labels = torch.arange(200) % 9 + 1  # none is 0
    parts = []
    for share in (0.3, 0.5, 0.7):
        y = labels.clone()
        y[: int(share * 200)] = 0
        parts.append(y)
    train_x, val_x, test_x = x.split(200)
    train_y, val_y, test_y = parts
    names = [str(i) for i in range(10)]
    data = classifier.Data(train_x, train_y, val_x, val_y, test_x, test_y, names, 0)
    scale = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    net = Brightness()

    def loss(x, y, **options):
        return F.cross_entropy(net(x.float() / 255), y, **options).item()

    scores = classifier.validate(net, data, *scale, torch.float32)
    assert abs(scores["train_acc"] - 0.3) < 1e-6
    assert abs(scores["val_acc"] - 0.5) < 1e-6
    assert abs(scores["val_loss"] - loss(val_x, val_y)) < 1e-4

    given = dict(randaugment_ops=3, randaugment_magnitude=11)
    settings = classifier.Settings(holdout=200, label_smoothing=0.4, **given)

    def blackened(x, operations, magnitude):
        assert (operations, magnitude) == (3, 11)
        return torch.zeros_like(x)

    with patched() as monkey:
        monkey(classifier, "augment", blackened)
        text = classifier.report(net, data, settings, *scale, with_test=True)
    trained = loss(torch.zeros_like(train_x), train_y, label_smoothing=0.4)
    assert f"train loss: {loss(train_x, train_y):.3f}, " in text
    assert f"val loss: {loss(val_x, val_y):.3f}, " in text
    assert "train acc: 0.300±" in text
    assert "val acc: 0.500±" in text
    assert f"augmented): {trained:.3f}" in text
    assert f"70.00%, loss {loss(test_x, test_y):.3f}" in text


def test_resume_is_bit_identical():
    """Stopped in mid-epoch by Ctrl-C and resumed past the epoch's end, RandAugment on:
    the same bits as a run that was never stopped."""
    # 300 pictures are 6 batches per epoch, so step 9 is in the second epoch.
    with small_run(classifier, train=300, test=100) as (monkey, root):
        flags = [*TINY, "--batch-size", 50, "--steps", 23]
        whole = ["--out", root / "whole"]
        parts = ["--out", root / "parts"]
        first, _ = run(classifier, *flags, *whole)

        handler = signal.getsignal(signal.SIGINT)
        interrupted(classifier, "augment", 9, *flags, *parts)
        assert signal.getsignal(signal.SIGINT) is handler
        assert load_state(root / "parts")["step"] == 9

        second, text = run(classifier, *flags, *parts)
        assert "9 of 23 steps" in text
        expected = load_state(root / "whole")
        state = load_state(root / "parts")
        for key in ("net", "optimiser", "schedule", "random", "order", "position"):
            assert same(state[key], expected[key]), key
        assert same(state["log"]["loss"], expected["log"]["loss"])
        assert [row["step"] for row in expected["log"]["rows"]] == [5, 10, 15, 20, 23]
        assert [row["step"] for row in state["log"]["rows"]] == [5, 9, 10, 15, 20, 23]
        assert first == second

        # Finished: started again, it only says its result, and trains nothing.
        monkey(torch.nn.utils, "clip_grad_norm_", None)
        again, _ = run(classifier, *flags, *parts)
        evaluated, _ = run(classifier, "eval", "--data", "shapes", *whole)
        assert first == again
        assert first == evaluated

        other = refused(classifier, *flags, "--seed", 5, *whole)
        assert "seed is 0, not 5" in other

        # Other pictures in the folder: neither trained nor measured.
        small_shapes(classifier, monkey, 7, 7)
        for mode in ("train", "eval"):
            message = refused(classifier, mode, *flags, *whole)
            assert "other pictures" in message


def test_seed_of_the_weights():
    """The seed of the settings decides the weights a network begins with."""
    for module in MODULES:
        nets = []
        for seed in (0, 0, 1):
            settings = module.Settings(width=8, seed=seed)
            nets.append(module.build_network(settings, 7).state_dict())
        assert same(nets[0], nets[1])
        assert not same(nets[0], nets[2])


def test_free_to_change():
    """What a resumed run may not change: all that shapes the trained network."""
    shaping = {
        classifier: "holdout seed steps batch_size max_lr weight_decay label_smoothing "
        "clip_norm randaugment_ops randaugment_magnitude block activation layers tied "
        "positions downsample width stem gate head optimiser",
        diffusion: "seed steps batch_size max_lr warm_up clip_norm ema "
        "label_drop schedule timesteps log_snr_shift width after_injection modulate",
    }
    for module, names in shaping.items():
        fields = set(module.Settings.__dataclass_fields__)
        assert fields - set(module.FREE_TO_CHANGE) == set(names.split())


def test_running_loss():
    """The loss of the log begins with that of the first step and then follows in
    fiftieths."""
    for module in MODULES:
        log = module.TrainingLog(Path(), 100, 10, "cpu")
        log.add(1, torch.tensor(4.0))
        assert log.loss == 4
        log.add(200, torch.tensor(5.0))
        assert_close(log.loss, torch.tensor(4.02))


def test_loss_picture():
    """loss.png shows the end of a run closely: its axis spans a tenth, with the least
    loss in the lowest fifth, and only the losses in it."""
    with small_run(diffusion) as (monkey, out):
        calls = []
        monkey(diffusion, "plot", lambda *args: calls.append(args))
        log = diffusion.TrainingLog(out, 30, 10, "cpu")
        log.rows = [
            dict(step=10, loss=0.6, lr=1e-3),
            dict(step=20, loss=0.19, lr=1e-3, val_loss=0.1159),
            dict(step=30, loss=0.118, lr=1e-3),
        ]
        log.write_files()
    path, curves, _, _, axis = calls[0]
    assert path.name == "loss.png"
    assert curves == dict(train=[(20, 0.19), (30, 0.118)], validation=[(20, 0.1159)])
    assert math.isclose(axis.low, 0.1) and math.isclose(axis.high, 0.2)

    # Early, when all losses are far above the validation's, the newest are still in it.
    with small_run(diffusion) as (monkey, out):
        monkey(diffusion, "plot", lambda *args: calls.append(args))
        log.out = out
        log.rows = [
            dict(step=10, loss=0.6, lr=1e-3),
            dict(step=20, loss=0.41, lr=1e-3, val_loss=0.2859),
        ]
        log.write_files()
    _, curves, _, _, axis = calls[1]
    assert curves == dict(train=[(20, 0.41)], validation=[(20, 0.2859)])
    assert axis.low < 0.2859 < 0.41 < axis.high < 0.5


def test_plot_of_one_point():
    """A curve that has one point so far is seen, as a dot in its colour."""
    for module in MODULES:
        with tempfile.TemporaryDirectory() as out:
            path = Path(out) / "plot.png"
            axes = module.Axis("x", 0, 10), module.Axis("y", 0, 10)
            dots = []
            for points in ([], [(5, 5)]):
                module.plot(path, dict(a=points), "title", *axes)
                pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
                red = abs(pixels - (209, 73, 91)).max(axis=2) < 30
                dots.append(red.sum())
        assert dots[1] > dots[0] + 10


def test_plot_of_two_points():
    """In a plot, right is more and up is more."""
    for module in MODULES:
        with tempfile.TemporaryDirectory() as out:
            path = Path(out) / "plot.png"
            axes = module.Axis("x", 0, 10), module.Axis("y", 0, 10)
            module.plot(path, {"": [(1, 9)], " ": [(9, 2)]}, "title", *axes)
            pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        places = []
        for colour in [(209, 73, 91), (0, 121, 140)]:
            dot = abs(pixels - colour).max(axis=2) < 40
            down, across = np.argwhere(dot).mean(axis=0)
            places.append((across, down))
        (across1, down1), (across2, down2) = places
        assert across1 < 200 and down1 < 130
        assert across2 > 550 and down2 > 250


def test_predictions_picture():
    """Each picture stands over its true name, and the name it was given is green if that
    is right and red if not."""
    torch.manual_seed(0)
    x = random_bytes(40, 3, 32, 32)
    y = torch.zeros(40, dtype=torch.int64)
    y[::3] = 1
    data = classifier.Data(x, y, x, y, x, y, ["apple", "rose"], 0)
    mean = torch.rand(3, 1, 1)
    std = torch.rand(3, 1, 1) + 0.5
    inputs = []

    class AlwaysApple(torch.nn.Module):
        def forward(self, x):
            inputs.append(x)
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "predictions.png"
        classifier.draw_predictions(path, AlwaysApple(), data, mean, std, torch.float32)
        pixels = np.asarray(Image.open(path)).astype(int)
    assert_close(inputs[0], (x.float() / 255 - mean) / std)

    for i in range(40):
        tile = pixels[i // 8 * 160 :, i % 8 * 140 :][:160, :140]
        middles = (torch.arange(32) * 3.5 + 1.5).long()  # of 3.5 pixels each
        shown = torch.from_numpy(tile[8:120, 14:126]).permute(2, 0, 1)
        assert torch.equal(shown[:, middles][:, :, middles], x[i].long())
        name = tile[138:156]
        green = (abs(name - (26, 127, 55)).max(axis=2) < 60).any()
        red = (abs(name - (198, 40, 40)).max(axis=2) < 60).any()
        assert (green, red) == (y[i] == 0, y[i] == 1), i


def test_grid_picture():
    """A grid shows the pictures row by row, upright, in their own colours."""
    torch.manual_seed(0)
    x = random_bytes(6, 3, 32, 32)
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "grid.png"
        diffusion.save_grid(path, x, columns=3)
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert pixels.shape == (3, 2 * (1 + 2 * 33), 2 * (1 + 3 * 33))
    for i, picture in enumerate(x):
        top = 2 * (1 + i // 3 * 33)
        left = 2 * (1 + i % 3 * 33)
        shown = pixels[:, top : top + 64, left : left + 64]
        assert torch.equal(shown[:, ::2, ::2], picture)
        assert torch.equal(shown[:, 1::2, 1::2], picture)


def test_second_signal():
    """A first signal of either kind is noted; a second one acts as ever."""
    # Where this runs in the background, Ctrl-C may be switched off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for module in MODULES:
            for number in (signal.SIGINT, signal.SIGTERM):
                with module.StopSignals() as stop:
                    signal.raise_signal(number)
                    assert stop.received == number
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.raise_signal(signal.SIGINT)
                        raise AssertionError("the second signal was swallowed")
    finally:
        signal.signal(signal.SIGINT, before)


def test_killed_process_resumes():
    """SIGKILL in a real process: the checkpoint is whole, and the run goes on to the
    end."""
    code = (
        "import sys, classifier; draw = classifier.draw_shapes; "
        "classifier.draw_shapes = lambda count, seed: draw(count // 100, seed); "
        "classifier.main(sys.argv[1:])"
    )
    with small_run(classifier, train=200, test=20) as (_, out):
        more = ["--batch-size", "50", "--eval-every", "5", "--steps", "40"]
        flags = [*TINY, *more, "--out", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *flags], cwd=HERE, stdout=subprocess.DEVNULL
        )
        path = out / "checkpoint.pt"
        until = time.time() + 60
        while not path.exists() and time.time() < until:
            time.sleep(0.02)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()

        step = load_state(out)["step"]
        assert 0 < step < 40
        _, text = run(classifier, *flags)
        assert f"{step} of 40 steps" in text
        assert load_state(out)["step"] == 40


def test_learns_shapes():
    """A few seconds of training beat chance (1 %) many times over, on pictures never
    seen, and tell shapes too, which are a tenth each: colour alone would not do."""
    flags = (
        "--data shapes --width 24 --layers 1 --steps 100 --batch-size 50 --max-lr 0.02"
    ).split()
    with small_run(classifier, train=1500, test=300) as (_, out):
        run(classifier, *flags, "--out", out)
        with (out / "log.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        assert float(last["val_acc"]) > 0.10, last

        net = classifier.Classifier(width=24, layers=1).eval()
        state = load_state(out)
        net.load_state_dict(state["net"])
        data = classifier.load_data("shapes")
        x = classifier.normalise(data.test_x, state["mean"], state["std"])
        right = net(x).argmax(dim=1) // 10 == data.test_y // 10
        assert right.float().mean() > 0.2, right.float().mean()
        assert is_picture(out / "curve.png")
        assert is_picture(out / "predictions.png")


def test_holdout_and_eval():
    """With a hold-out, training never looks at the test set; eval does, and repeats the
    rest."""
    load = classifier.load_data

    def without_test(*args):
        return load(*args)._replace(test_x=None)

    with small_run(classifier, train=1000) as (monkey, out):
        flags = [*TINY, "--steps", 6, "--holdout", 200, "--out", out]
        with patched() as inner:
            inner(classifier, "load_data", without_test)
            result, _ = run(classifier, *flags)
        assert "200 held-out pictures" in result
        assert "test" not in result

        paper = refused(classifier, "eval", "--recipe", "paper", "--out", out)
        assert "stem is residual, not plain" in paper
        again, _ = run(classifier, "eval", "--data", "shapes", "--out", out)
        assert again.startswith(result)
        assert "test: " in again[len(result) :]

        # The paper's recipe is that of a network, however many pictures a step had.
        flags = [*TINY, "--steps", 2, "--recipe", "paper", "--out", out / "paper"]
        run(classifier, *flags)
        run(classifier, "eval", "--recipe", "paper", "--data", "shapes", "--out", out / "paper")


def check_export(module, out, part, *flags):
    """Export the run in `out`: its weights in half of the bytes, where they are from,
    and nothing that only training needs or that names the folder. Returns the path."""
    path = out / "given" / "weights.pt"
    run(module, "export", *flags, "--out", out, "--weights", path)
    state = load_state(path.parent, path.name)
    assert "optimiser" not in state
    assert set(state["about"]) == {"command", "date", "result", "licence"}
    command = f"python {module.__name__}.py --data shapes"
    assert state["about"]["command"].startswith(command)
    last = load_state(out)["log"]["rows"][-1]
    result = f"{last['val_acc']:.2%}" if "val_acc" in last else f"{last['val_loss']:.4f}"
    assert result in state["about"]["result"]
    assert str(out) not in state["about"]["command"]
    for words in (
        ["--out", "my runs/1", "--seed", "3", "--data=/data", "--steps", "5"],
        ["--out=my runs/1", "--seed", "3", "--data", "/home/o'neil/d", "--steps", "5"],
        ["--seed", "3", "--data=C:\\my data", "--steps", "5", "--out", "C:\\x"],
    ):
        folders = "python x.py " + shlex.join(words)
        assert module.without_folders(folders) == "python x.py --seed 3 --steps 5"
    if module is diffusion:
        network = "python x.py --inception 'my net.pt' fid"
        assert module.without_folders(network) == "python x.py fid"
    notebook = "train(settings), with the same settings"
    assert module.without_folders(notebook) == notebook
    drawn = "python x.py --data shapes --steps 5"
    assert module.without_folders(drawn + " --out shapes/1") == drawn
    assert str(out) not in str(state["settings"])
    assert state["settings"]["data"] == "shapes"

    # What is exported can't be exported again.
    twice = out / "twice"
    twice.mkdir()
    shutil.copy(path, twice / "checkpoint.pt")
    words = ["export", *flags, "--out", twice, "--weights", twice / "weights.pt"]
    assert "already" in refused(module, *words)

    trained = load_state(out)[part]
    for name, value in state[part].items():
        if value.is_floating_point():
            assert value.dtype == torch.float16
            assert_close(value.float(), trained[name], rtol=1e-3, atol=1e-6)
    return path


def test_exported_classifier():
    """The exported weights, on a machine without the run: `eval` measures what training
    measured, `predict` names picture files without a data set; bad files are refused in
    a line."""
    load = classifier.load_data
    with small_run(classifier, train=1000) as (monkey, out):
        flags = [*TINY, "--steps", 40, "--eval-every", 20, "--max-lr", 0.02]
        trained, _ = run(classifier, *flags, "--out", out)
        path = check_export(classifier, out, "net")
        own = ["export", "--data", "shapes", "--out", out]
        message = refused(classifier, *own, "--weights", out / "checkpoint.pt")
        assert "is a run" in message
        here = ["--weights", path, "--out", out / "other"]
        result, _ = run(classifier, "eval", *here)
        pattern = r"val acc: ([0-9.]+)"
        measured = [float(re.search(pattern, text)[1]) for text in (trained, result)]
        assert abs(measured[0] - measured[1]) < 0.01, measured

        # A picture of 32 x 32 is taken as it is; a larger one, of any shape, is shrunk.
        x, _, names = classifier.draw_shapes(1, seed=2)
        x = x[:1]
        pixels = x[0].permute(1, 2, 0).numpy()
        small = out / "small.png"
        wide = out / "wide.jpg"
        Image.fromarray(pixels).save(small)
        Image.fromarray(pixels).resize((90, 60)).convert("L").save(wide)
        assert torch.equal(classifier.open_picture(small), x)
        assert classifier.open_picture(wide).shape == (1, 3, 32, 32)

        # The middle of it, not all of it squashed; and turned as the camera was.
        stripes = np.zeros((32, 96, 3), np.uint8)
        stripes[:, 32:64] = 255
        Image.fromarray(stripes).save(out / "stripes.png")
        assert (classifier.open_picture(out / "stripes.png") == 255).all()
        halves = np.zeros((64, 64, 3), np.uint8)
        halves[:32] = 255
        exif = Image.Exif()
        exif[274] = 3  # upside down
        Image.fromarray(halves).save(out / "turned.png", exif=exif)
        turned = classifier.open_picture(out / "turned.png")[0, 0]
        assert (turned[:15] == 0).all()
        assert (turned[17:] == 255).all()

        # What is transparent is white; a file that claims to be enormous is refused.
        seen = Image.fromarray(pixels).convert("RGBA")
        seen.putalpha(0)
        seen.save(out / "clear.png")
        assert (classifier.open_picture(out / "clear.png") == 255).all()

        # 16 bits per pixel become 8; a damaged PNG is refused by its name.
        ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
        Image.fromarray(ramp).save(out / "deep.png")
        eight_bits = torch.from_numpy((ramp // 256).astype(np.uint8))
        assert (classifier.open_picture(out / "deep.png")[0] == eight_bits).all()
        other_end = Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes())
        other_end.save(out / "deep.tif")
        assert (classifier.open_picture(out / "deep.tif")[0] == eight_bits).all()
        whole = small.read_bytes()
        start = whole.index(b"IDAT")
        (out / "part.png").write_bytes(whole[: start + 20])

        # This one's pixels end early, with a chunk of no known name.
        short = (10).to_bytes(4, "big") + whole[start : start + 14] + bytes(8)
        (out / "chunk.png").write_bytes(whole[: start - 4] + short + b"I\0\0T" + bytes(20))
        for name in ("chunk.png", "part.png"):
            assert name in str(raised(OSError, classifier.open_picture, out / name))

        monkey(Image, "MAX_IMAGE_PIXELS", 100)
        assert "wide.jpg" in str(raised(OSError, classifier.open_picture, wide))
        monkey(Image, "MAX_IMAGE_PIXELS", None)

        monkey(classifier, "load_data", None)
        guesses, text = run(classifier, "predict", small, wide, *here)

        # The same from a notebook.
        notebook = classifier.checkpoint_settings(weights=str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            assert classifier.predict(notebook, [small, wide]) == guesses
        again, _ = run(classifier, "predict", *here, small, wide)
        assert again == guesses

        # It computes in the numbers asked for.
        kinds = []
        autocast = classifier.autocast

        def noting(device, dtype):
            kinds.append(dtype)
            return autocast(device, dtype)

        with patched() as inner:
            inner(classifier, "autocast", noting)
            run(classifier, "predict", *here, small, "--precision", "bf16")
        assert kinds == [torch.bfloat16]

        # It looks at six views.
        with patched() as inner:
            inner(classifier, "six_views", lambda x: [torch.zeros_like(x)] * 6)
            _, of_black = run(classifier, "predict", *here, small)
        assert of_black.splitlines()[0] != text.splitlines()[0]
        assert all(guess in names for guess in guesses)
        first = text.splitlines()[0]
        assert first.startswith(f"{small}: {guesses[0]} ")
        shares = [float(share) for share in re.findall(r"([0-9.]+)%", first)]
        assert len(shares) == 5

        # They are the network's, with the trained weights and in evaluation mode.
        state = load_state(path.parent, path.name)
        net = classifier.build_network(notebook, len(names)).eval()
        net.load_state_dict(state["net"])
        views = torch.cat(classifier.six_views(x))
        normal = classifier.normalise(views, state["mean"], state["std"])
        probability = net(normal).mean(0).softmax(0)
        likeliest = probability.sort(descending=True).values[:5]
        assert_close(torch.tensor(shares), 100 * likeliest.detach(), atol=0.06, rtol=0)

        (out / "text.png").write_text("no picture")
        assert "text.png" in refused(classifier, "predict", out / "text.png", *here)
        assert "none.png" in refused(classifier, "predict", out / "none.png", *here)
        assert "picture files" in refused(classifier, "predict", *here)
        assert "picture files" in refused(classifier, "eval", small, *here)
        assert "--weights" in refused(classifier, *TINY, *here)
        path.write_bytes(path.read_bytes()[:-100])
        assert "can't use" in refused(classifier, "predict", small, *here)

        # A run whose last weights were never measured has nothing to say.
        early = ["--out", out / "early"]
        monkey(classifier, "load_data", load)
        interrupted(classifier, "augment", 25, *flags, *early)
        export = ["export", "--data", "shapes", *early]
        assert "--weights FILE" in refused(classifier, *export)
        message = refused(classifier, *export, "--weights", out / "early.pt")
        assert "step 25, has not been validated" in message


def test_no_advice_on_tf32():
    """Compiling on a GPU advises TF32 for the product that is fp32 on purpose: that is not
    shown, and other warnings are."""
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available"
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        settings = classifier.Settings(out=out, device="cpu")
        run_quietly(classifier.set_up, settings)
        warnings.warn(advice)
        assert not seen
        warnings.warn("another")
        assert len(seen) == 1


def test_weights_in_this_repository():
    """The weights that come with the scripts fit them, and both networks still compute what
    they did when these were made: the classifier knows an apple, and the velocity loss on
    the apple is the same at five levels of noise."""
    picture = HERE / ".github" / "apple.png"
    weights = HERE / ".weights"
    flags = ["predict", "--weights", weights / "classifier.pt", picture]
    (name,), text = run(classifier, *flags)
    assert name == "apple"
    assert abs(float(re.search(r"apple ([0-9.]+)%", text)[1]) - 85.5) < 0.5

    with tempfile.TemporaryDirectory() as out:
        given = dict(weights=str(weights / "diffusion.pt"), out=out, device="cpu")
        settings = diffusion.checkpoint_settings(**given)
        net, names = run_quietly(diffusion.open_network, settings, 1)
    x = diffusion.to_model(classifier.open_picture(picture)).expand(16, -1, -1, -1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.full((16,), names.index("apple"))

    # Measured when these weights came (torch 2.14.1). With bilinear instead of nearest
    # doubling the second would be 0.1149.
    expected = {8.0: 0.42625, 4.0: 0.11218, 0.0: 0.03949, -4.0: 0.16039, -8.0: 0.34145}
    for level, loss in expected.items():
        log_snr = torch.full((16,), level)
        scales = diffusion.to_alpha_sigma(log_snr)
        pred_v = net(diffusion.add_noise(x, noise, *scales), log_snr, labels)
        error = diffusion.velocity(x, noise, *scales) - pred_v
        assert_close(error.square().mean(), torch.tensor(loss), rtol=1e-3, atol=0)


def test_exported_diffusion():
    """The exported averaged weights draw, without run and data set, what the checkpoint
    draws, but for the rounding."""
    with small_run(diffusion) as (monkey, out):
        monkey(diffusion, "show_results", nothing)
        run(diffusion, *SMALL, "--steps", 3, "--out", out)
        path = check_export(diffusion, out, "ema")
        own = ["export", "--data", "shapes", "--out", out]
        assert "--weights FILE" in refused(diffusion, *own)

        # It overwrites no run, whether its own or another, and no file of another kind.
        checkpoint = (out / "checkpoint.pt").read_bytes()
        other = out / "other.pt"
        for contents in (checkpoint, b"my notes"):
            other.write_bytes(contents)
            assert "other.pt" in refused(diffusion, *own, "--weights", other)
            assert other.read_bytes() == contents
        assert "is a run" in refused(diffusion, *own, "--weights", out / "checkpoint.pt")
        assert (out / "checkpoint.pt").read_bytes() == checkpoint
        assert "can't use" in refused(diffusion, *own, "--weights", out)

        # Exported weights are no run to go on from.
        (out / "copy").mkdir()
        shutil.copy(path, out / "copy" / "checkpoint.pt")
        flags = [*SMALL, "--steps", 3, "--out", out / "copy"]
        assert "exported weights can't be resumed" in refused(diffusion, *flags)

        # A run whose last weights were never measured has nothing to say.
        state = load_state(out)
        del state["log"]["rows"][-1]["val_loss"]
        (out / "early").mkdir()
        torch.save(state, out / "early" / "checkpoint.pt")
        early = ["export", "--data", "shapes", "--out", out / "early"]
        message = refused(diffusion, *early, "--weights", out / "early.pt")
        assert "step 3, has not been validated" in message

        monkey(diffusion, "load_data", None)
        expected, _ = run(diffusion, "sample", "--data", "shapes", "--out", out)
        here = ["--weights", path, "--out", out / "other"]
        x, _ = run(diffusion, "sample", *here)
        assert (x.float() - expected.float()).abs().mean() < 0.5
        run(diffusion, "interpolate", *here)
        assert (out / "other" / "interpolations.png").exists()
        assert not (out / "other" / "checkpoint.pt").exists()
        assert "--weights" in refused(diffusion, *SMALL, *here)
        paper = refused(diffusion, "sample", "--recipe", "paper", *here)
        assert "modulate is on, not off" in paper


def test_lr_find():
    """The range test proposes a rate, draws its curve, and writes no checkpoint."""
    used, pictures, norms = [], [], []
    step = torch.optim.AdamW.step
    augment = classifier.augment
    clip = torch.nn.utils.clip_grad_norm_
    cross_entropy = F.cross_entropy

    def noting(self):
        used.append([group["lr"] for group in self.param_groups])
        return step(self)

    def noting_augment(x, operations, magnitude):
        pictures.append(x)
        assert (operations, magnitude) == (1, 2)
        return augment(x, operations, magnitude)

    def noting_loss(logits, y, label_smoothing):
        numbers = picture_numbers(pictures[-1], data.train_x)
        assert torch.equal(y, data.train_y[numbers])
        assert label_smoothing == 0.1
        return cross_entropy(logits, y, label_smoothing=label_smoothing)

    def noting_clip(parameters, norm):
        norms.append(norm)
        return clip(parameters, norm)

    with small_run(classifier) as (monkey, out):
        data = classifier.load_data("shapes")
        monkey(torch.optim.AdamW, "step", noting)
        monkey(classifier, "augment", noting_augment)
        monkey(F, "cross_entropy", noting_loss)
        monkey(torch.nn.utils, "clip_grad_norm_", noting_clip)
        peak, text = run(classifier, "lr-find", *TINY, "--steps", 40, "--out", out)
        assert "proposed: --max-lr" in text

        # A third of the rate at which the loss was least; rates rise from 1e-5 by the
        # same factor each time.
        found = re.findall(r"lr ([0-9.e+-]+)  loss ([0-9.]+)", text)
        rates = [float(rate) for rate, _ in found]
        losses = [float(loss) for _, loss in found]
        assert len(rates) == 40
        assert_close(torch.tensor(used), torch.tensor([rates, rates]).T, rtol=0.01, atol=0)
        exponents = torch.linspace(-5, -0.125, 40)
        assert_close(torch.tensor(rates).log10(), exponents, atol=0.01, rtol=0)
        least = [rate for rate, loss in zip(rates, losses) if loss == min(losses)]
        assert min(abs(peak / (rate / 3) - 1) for rate in least) < 0.01
        assert norms == [1.0] * 40
        assert is_picture(out / "lr_find.png")
        assert not (out / "checkpoint.pt").exists()


def test_compile_falls_back():
    """Where torch.compile fails, one line says so and the run goes on; both scripts."""

    def broken(self, *args, **kwargs):
        raise RuntimeError("no compiler")

    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        with small_run(module) as (monkey, out):
            monkey(torch.nn.Module, "compile", broken)
            without_results(module, monkey)
            _, text = run(module, *flags, "--steps", 3, "--compile", "on", "--out", out)
        assert "going on without torch.compile: RuntimeError: no compiler" in text
        assert "3/3" in text


def nan_at_call(number, function):
    """`function`, whose result is not a number from call `number` on."""
    calls = []

    def breaking(*args, **kwargs):
        calls.append(number)
        result = function(*args, **kwargs)
        return result * math.nan if len(calls) >= number else result

    return breaking


def test_not_finite_stops():
    """A loss that is not finite stops the run with advice and keeps the last good
    checkpoint; both scripts."""
    cases = [
        (classifier, TINY, F, "cross_entropy", dict(train_acc=0.0, val_acc=0.0)),
        (diffusion, SMALL, diffusion, "velocity", no_scores()),
    ]
    for module, flags, place, name, scores in cases:
        with small_run(module) as (monkey, out):
            monkey(module, "validate", lambda *args: scores)
            monkey(place, name, nan_at_call(13, getattr(place, name)))
            flags = [*flags, "--eval-every", 10, "--steps", 40]
            message = refused(module, *flags, "--out", out)
            assert "not finite at step 15" in message
            assert "--max-lr" in message

            state = load_state(out)
            assert state["step"] == 10
            assert all(torch.isfinite(weight).all() for weight in state["net"].values())


def check_refused(module, cases, out):
    """main() answers each of these flags with one line that contains the words beside
    them, and writes no checkpoint."""
    for flags, words in cases.items():
        command = [*flags.split(), "--data", "shapes", "--out", out]
        message = refused(module, *command)
        assert words in message, message
        assert "\n" not in message, message
    assert not (out / "checkpoint.pt").exists()


def check_unusable(module, contents, out, *commands):
    """A checkpoint with any of these contents is refused in one line by each command,
    and left as it is."""
    path = out / "checkpoint.pt"
    for content in contents:
        path.write_bytes(content)
        for command in commands:
            message = refused(module, *command, "--steps", 2, "--out", out)
            assert "can't use" in message, message
            assert "\n" not in message, message
        assert path.read_bytes() == content


def saved_bytes(value):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_bad_input():
    """One clear line each, a non-zero exit, nothing overwritten."""
    cases = {
        "--steps 10001": "--steps 10001 is not within 1 to 10000",
        "--steps 0": "--steps 0",
        "--steps -3": "--steps -3",
        "--steps many": "--steps",
        "--step=5": "no --step (",
        "--epochs 5": "no --epochs (",
        "--max-lr nan": "--max-lr nan",
        "--layers 7": "--layers 7",
        "--batch-size 601": "--batch-size 601: there are 600",
        "--block bert": "bert",
        "--width 88": "parameters, not under 100,000",
        "--width 18": "multiple of 4",
        "--holdout 150": "150",
        "--no-such": "no-such",
        "dance": "dance",
    }
    if not torch.cuda.is_available():
        cases["--device cuda"] = "cuda"
    if not torch.backends.mps.is_available():
        cases["--device mps"] = "mps"

    with small_run(classifier) as (_, root):
        out = root / "run"
        check_refused(classifier, cases, out)

        # A file where the folder, or the folder above it, should be.
        file = root / "file"
        file.write_text("mine")
        for bad in (file, file / "below"):
            assert "can't be written" in refused(classifier, *TINY, "--out", bad)
        assert file.read_text() == "mine"

        # Checkpoints that are empty, cut short, something else, or of another
        # architecture.
        run(classifier, *TINY, "--steps", 2, "--out", out)
        good = (out / "checkpoint.pt").read_bytes()
        other = classifier.Classifier(width=16, layers=1).state_dict()
        contents = [
            b"",
            good[: len(good) // 2],
            b"hello",
            saved_bytes({"weights": torch.zeros(3)}),
            saved_bytes(dict(load_state(out), net=other)),
        ]
        check_unusable(classifier, contents, out, TINY, ["eval", *TINY])
        missing = ["--data", "shapes", "--out", root / "none"]
        assert "train first" in refused(classifier, "eval", *missing)


def flip_a_bit(archive, entry):
    """The bytes of a zip file with one bit changed in the middle of an entry's data."""
    # An entry begins with 30 bytes, of which 26 to 29 are the lengths of its name and
    # of an extra field. Both come before the data.
    header = entry.header_offset
    name, extra = np.frombuffer(archive[header + 26 : header + 30], "<u2").tolist()
    middle = header + 30 + name + extra + entry.file_size // 2
    changed = bytearray(archive)
    changed[middle] ^= 4
    return changed


def test_damaged_checkpoint():
    """One changed bit in any tensor of a checkpoint is noticed."""
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        with small_run(module) as (monkey, out):
            without_results(module, monkey)
            run(module, *flags, "--steps", 1, "--out", out)
            path = out / "checkpoint.pt"
            good = path.read_bytes()
            module.load_checkpoint(path)

            entries = []
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if "/data/" in entry.filename:
                        entries.append(entry)
            assert len(entries) > 30

            # Some 30 of them, from the first to the last.
            for place in np.linspace(0, len(entries) - 1, 30).astype(int):
                path.write_bytes(flip_a_bit(good, entries[place]))
                message = str(raised(ValueError, module.load_checkpoint, path))
                assert "can't use" in message
                assert "\n" not in message


class Intruder:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_run_no_code():
    """A checkpoint from elsewhere is refused before anything in it runs."""
    for module in MODULES:
        with tempfile.TemporaryDirectory() as out:
            path = Path(out) / "checkpoint.pt"
            made = Path(out) / "made"
            settings = vars(module.Settings())
            torch.save(dict(settings=settings, intruder=Intruder(made)), path)
            raised(ValueError, module.load_checkpoint, path)
            assert not made.exists()


def test_another_machine():
    """Device, compiling, precision and folders are this machine's, not those of the
    machine that made the checkpoint."""
    for module in MODULES:
        with tempfile.TemporaryDirectory() as out:
            there = dict(device="cuda", compile="on", precision="bf16")
            there.update(out="/home/alice/run", weights="/home/alice/small.pt")
            settings = vars(module.Settings(**there, width=8))
            torch.save(dict(settings=settings), Path(out) / "checkpoint.pt")
            here = module.checkpoint_settings(out=out)
        assert here.width == 8
        assert here.out == out
        assert here.weights == ""
        assert (here.device, here.compile, here.precision) == ("auto",) * 3


def test_no_cudnn_attention():
    """cuDNN's attention, which can give NaN gradients, is off wherever networks are
    trained or measured."""
    for module in MODULES:
        with tempfile.TemporaryDirectory() as out:
            torch.backends.cuda.enable_cudnn_sdp(True)
            with contextlib.redirect_stdout(io.StringIO()):
                module.set_up(module.Settings(out=out))
            assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_full_disk():
    """Where a checkpoint can't be written, one line says so; the old one stays, and no
    part of the new one."""

    def full(path, contents):
        with open(path, "wb") as file:
            file.write(contents[:10])
        raise OSError(28, "No space left on device")

    for module in MODULES:
        with patched() as monkey, tempfile.TemporaryDirectory() as out:
            path = Path(out) / "checkpoint.pt"
            module.save_whole(dict(step=1), path)
            monkey(Path, "write_bytes", full)
            error = raised(OSError, module.save_whole, dict(step=2), path)
            assert "checkpoint.pt can't be written (No space left" in str(error)
            assert load_state(out) == dict(step=1)
            assert [file.name for file in Path(out).iterdir()] == ["checkpoint.pt"]


def test_progress_line():
    """The time left is hours, minutes and seconds, of the same width for days too."""
    for module in MODULES:
        log = module.TrainingLog(Path("none"), 1000, 10, torch.device("cpu"))
        for speed, left in [(0.1, "27:45:00"), (1000.0, " 0:00:09")]:
            log.rows = [dict(step=1, loss=1.0, lr=1e-3, images_per_s=speed)]
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                log.show(True)
            assert text.getvalue().endswith(f"left {left}\n")


def test_speed():
    """Speed is pictures per second of training alone: what comes between a row of the log
    and the next start of the clock is not counted."""
    for module in MODULES:
        log = module.TrainingLog(Path("none"), 1000, 20, torch.device("cpu"))
        net = torch.nn.Linear(2, 2)
        clock = SimpleNamespace(perf_counter=lambda: seconds)
        with patched() as monkey:
            monkey(module, "time", clock)
            seconds = 100.0
            log.start_clock(5)
            seconds = 102.0
            log.new_row(15, 0.1, net)
            seconds = 150.0
            log.start_clock(15)
            seconds = 151.0
            log.new_row(25, 0.1, net)
        assert [row["images_per_s"] for row in log.rows] == [100.0, 200.0]
        assert log.seconds == 3.0


def test_clock_leaves_out_validation():
    """In a run, the time that validation takes is not counted as training."""
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        names = []
        add_scores = module.TrainingLog.add_scores
        start_clock = module.TrainingLog.start_clock

        def noting_scores(log, scores):
            names.append("validated")
            add_scores(log, scores)

        def noting_start(log, step):
            names.append(step)
            start_clock(log, step)

        with small_run(module) as (monkey, out):
            without_results(module, monkey)
            monkey(module.TrainingLog, "add_scores", noting_scores)
            monkey(module.TrainingLog, "start_clock", noting_start)
            flags = [*flags, "--log-every", 1, "--eval-every", 2, "--steps", 3]
            run(module, *flags, "--out", out)
        assert names == [0, 1, "validated", 2, "validated", 3]


def test_command_line():
    """What resumes a run is a command that works in the folder where it was typed, and
    what an export says of it names no folder."""
    here = os.getcwd()
    for module in MODULES:
        script = Path(module.__file__).resolve()
        try:
            os.chdir(script.parent)
            assert module.command_line(["--seed", "1"]) == f"python {script.name} --seed 1"
            with tempfile.TemporaryDirectory() as elsewhere:
                os.chdir(elsewhere)
                command = module.command_line(["--out", "my runs", "--seed", "1"])
                os.chdir(here)
        finally:
            os.chdir(here)
        assert shlex.split(command) == ["python", str(script), "--out", "my runs", "--seed", "1"]
        assert module.without_folders(command) == f"python {script.name} --seed 1"


def test_errors_are_exceptions():
    """In a notebook a mistake is a ValueError or an OSError, never the end of the
    process."""
    wrong = [
        dict(steps=0),
        dict(steps=10**6),
        dict(device="tpu"),
        dict(max_lr=-1.0),
        dict(max_lr=math.nan),
        dict(recipe="theirs"),
        dict(steps="100"),
        dict(batch_size=128.0),
        dict(steps=True),
    ]
    for module in MODULES:
        for values in wrong:
            raised(ValueError, module.Settings, **values)

        with small_run(module) as (monkey, out):
            monkey(module.DATASET, "download", no_net)
            settings = module.Settings(data=str(out), out=str(out))
            raised(OSError, module.train, settings)

            given = dict(data="shapes", out=str(out), steps=1)
            large = module.choose_settings(**given, batch_size=30_000)
            raised(ValueError, module.train, large)
            wide = module.choose_settings(**given, width=104)
            raised(AssertionError, module.train, wide)
            with_weights = module.choose_settings(**given, weights="small.pt")
            raised(ValueError, module.train, with_weights)
            raised(ValueError, module.load_checkpoint, out / "none.pt")


def test_mistakes_in_code_are_traced():
    """What is wrong in a command is one line; a mistake in the code, such as a reader
    makes who changes a layer, keeps its traceback."""
    cases = [(classifier, "Classifier", TINY), (diffusion, "UNet", SMALL)]
    for module, network, flags in cases:
        with small_run(module) as (monkey, out):
            monkey(getattr(module, network), "forward", unpacks_wrongly)
            flags = [*flags, "--steps", 1, "--out", out]
            error = raised(ValueError, run, module, *flags)
            assert "unpack" in str(error)

            # An assert without a text says nothing but where it stands.
            monkey(getattr(module, network), "forward", claims_wrongly)
            try:
                run(module, *flags)
            except AssertionError as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
            assert place.name == "claims_wrongly"


def unpacks_wrongly(net, *inputs):
    """A forward method with a mistake."""
    a, b = 1, 2, 3


def claims_wrongly(net, *inputs):
    """A forward method with another. (Written out, as pytest gives a text to an assert.)"""
    raise AssertionError


# --------------------------------------------------------------------------------------
# diffusion.py: the mathematics
# --------------------------------------------------------------------------------------


def cosine_inverse(log_snr):
    """t of cosine_schedule: (atan(e^(-lambda/2)) - offset) / range."""
    offset = math.atan(math.exp(-10))
    angle = torch.atan(torch.exp(-log_snr / 2))
    return (angle - offset) / (math.pi / 2 - 2 * offset)


def linear_inverse(log_snr):
    """t of linear_schedule: sqrt((log(1 + e^-lambda) - 1e-4) / 10)."""
    squared = (F.softplus(-log_snr) - 1e-4) / 10
    return squared.clamp(min=0).sqrt()


def spliced_inverse(log_snr):
    """t of spliced_schedule."""
    early = cosine_inverse(log_snr)
    late = linear_inverse(log_snr) + 0.31537545
    return torch.where(early < 0.80074257, early, late) / 1.31537545


SCHEDULES = {
    "cosine": (diffusion.cosine_schedule, cosine_inverse),
    "linear": (diffusion.linear_schedule, linear_inverse),
    "spliced": (diffusion.spliced_schedule, spliced_inverse),
}


def test_schedules():
    """Each schedule is finite, strictly falling and invertible, in fp32 as used; the
    ends and the formulas are those that it names, and alpha² + sigma² = 1."""
    t = torch.linspace(0, 1, 1001)
    for name, (schedule, inverse) in SCHEDULES.items():
        log_snr = schedule(t)
        assert torch.isfinite(log_snr).all(), name
        assert (log_snr.diff() < 0).all(), name
        assert torch.equal(diffusion.to_log_snr(t, name), log_snr)

        exact = t.double()
        assert_close(inverse(log_snr), t, atol=2e-5, rtol=0)
        assert_close(inverse(schedule(exact)), exact, atol=1e-8, rtol=0)
        alpha, sigma = diffusion.to_alpha_sigma(log_snr)
        assert_close(alpha**2 + sigma**2, torch.ones(1001, 1, 1, 1))

    ends = diffusion.cosine_schedule(torch.tensor([0.0, 1.0]))
    assert_close(ends, torch.tensor([20.0, -20.0]))

    # The cosine schedule is -2 log tan of an angle that grows evenly.
    t = torch.linspace(0, 1, 99).double()
    least = math.atan(math.exp(-10))
    most = math.atan(math.exp(10))
    direct = -2 * torch.tan(least + (most - least) * t).log()
    assert_close(diffusion.cosine_schedule(t), direct, atol=1e-6, rtol=1e-6)

    # The linear one is close to DDPM's integral of beta.
    alpha_squared = torch.exp(-(1e-4 + 10 * t**2))
    assert_close(diffusion.linear_schedule(t), torch.logit(alpha_squared))


def test_splice_joint():
    """Value and slope meet at the joint, and each side is the schedule that it should
    be."""
    joint = 0.80074257 / 1.31537545
    around = [joint - 1e-6, joint + 1e-6]
    t = torch.tensor(around, dtype=torch.double, requires_grad=True)
    value = diffusion.spliced_schedule(t)
    (slope,) = torch.autograd.grad(value.sum(), t)

    # The constants are of the cosine schedule with infinite ends, hence not closer than
    # that.
    assert abs(value[0] - value[1]) < 5e-4
    assert abs(slope[0] / slope[1] - 1) < 5e-4

    early = torch.tensor(0.3).double()
    expected = diffusion.cosine_schedule(1.31537545 * early)
    assert_close(diffusion.spliced_schedule(early), expected)
    late = torch.tensor(0.9).double()
    expected = diffusion.linear_schedule(1.31537545 * late - 0.31537545)
    assert_close(diffusion.spliced_schedule(late), expected)


def test_equations_1_to_3():
    """Eq. (1) and (2), their solution for picture and noise, and the three forms of Eq.
    (3), of which the paper misprints the last: with its weight e^lambda - 1 they are
    not equal."""
    torch.manual_seed(0)
    x, noise, pred_v = torch.randn(3, 6, 3, 8, 8, dtype=torch.double)
    log_snr = torch.linspace(-6, 6, 6).double()
    alpha, sigma = diffusion.to_alpha_sigma(log_snr)
    assert_close((alpha**2 / sigma**2).log().flatten(), log_snr)

    x_t = diffusion.add_noise(x, noise, alpha, sigma)
    v = diffusion.velocity(x, noise, alpha, sigma)
    assert_close(x_t, alpha * x + sigma * noise)
    assert_close(v, alpha * noise - sigma * x)
    solved_x, solved_noise = diffusion.split(x_t, v, alpha, sigma)
    assert_close(solved_x, x)
    assert_close(solved_noise, noise)

    pred_x0, pred_noise = diffusion.split(x_t, pred_v, alpha, sigma)
    of_v = (v - pred_v).square().mean((1, 2, 3))
    of_x0 = (x - pred_x0).square().mean((1, 2, 3))
    of_noise = (noise - pred_noise).square().mean((1, 2, 3))
    assert_close((log_snr.exp() + 1) * of_x0, of_v)
    assert_close(((-log_snr).exp() + 1) * of_noise, of_v)
    assert not torch.allclose((log_snr.exp() - 1) * of_noise, of_v)


def test_guidance():
    """Eq. (4) by formula; and the sampler's model combines what the network says with
    and without the class."""
    cond, uncond = torch.randn(2, 4, 3, 5, 5)
    assert_close(diffusion.guide(cond, uncond, 3.0), 4 * cond - 3 * uncond)
    assert_close(diffusion.guide(cond, uncond, 0.0), cond)

    net = tiny_unet()
    x = torch.randn(4, 3, 32, 32)
    log_snr = torch.full((4,), 0.7)
    labels = torch.tensor([0, 3, 6, 2])
    no_class = torch.full((4,), 7)
    with torch.no_grad():
        cond = net(x, log_snr, labels)
        uncond = net(x, log_snr, no_class)
        assert (cond - uncond).abs().max() > 1e-3
        for guidance in (0.0, 1.5):
            model = diffusion.guided_velocity(net, labels, guidance)
            expected = diffusion.guide(cond, uncond, guidance)
            assert_close(model(x, 0.7), expected, atol=1e-4, rtol=1e-4)
        assert_close(net(x, log_snr, net.embed(labels)), cond)


def test_clipping():
    """None, static and dynamic clipping by formula; dynamic leaves alone what is in
    range."""
    scale = torch.tensor([0.2, 5.0]).view(2, 1, 1, 1)
    x = torch.randn(2, 3, 32, 32) * scale
    assert torch.equal(diffusion.clip_picture(x, "none"), x)
    assert torch.equal(diffusion.clip_picture(x, "static"), x.clamp(-1, 1))

    y = diffusion.clip_picture(x, "dynamic")
    assert torch.equal(y[0], x[0])
    limit = np.quantile(x[1].abs().numpy(), 0.995)
    assert_close(y[1], x[1].clamp(-limit, limit) / limit, atol=1e-5, rtol=1e-5)
    assert y.abs().max() <= 1


def gaussian_model(mean, std):
    """The exact velocity for data N(mean, std²), each pixel for itself."""

    def model(x, log_snr):
        alpha, sigma = flat_scales(torch.tensor([log_snr]).double())
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return (alpha * x - x0) / sigma

    return model


def sampling_levels(steps):
    """The noise levels of `steps` sampling steps, from pure noise down."""
    t = torch.linspace(1, 0, steps + 1)[:-1]
    return diffusion.cosine_schedule(t.double())


def flat_scales(log_snr):
    """alpha and sigma, one number for each level."""
    return [scale.flatten() for scale in diffusion.to_alpha_sigma(log_snr)]


def gaussian_result(data_mean, std, steps, eta):
    """(mean, variance) with which `steps` steps end, by the closed form of one step."""
    alphas, sigmas = flat_scales(sampling_levels(steps))
    mean = torch.tensor(0.0).double()
    variance = torch.tensor(1.0).double()
    for step in range(steps):
        alpha = alphas[step]
        sigma = sigmas[step]

        # The prediction is x0 = data_mean + gain * (x - alpha * data_mean).
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        if step == steps - 1:
            return data_mean + gain * (mean - alpha * data_mean), gain**2 * variance

        next_alpha = alphas[step + 1]
        next_sigma = sigmas[step + 1]
        fresh = eta**2 * (next_sigma / sigma) ** 2 * (1 - (alpha / next_alpha) ** 2)
        keep = (next_sigma**2 - fresh).clamp(min=0).sqrt()
        scale = next_alpha * gain + keep * (1 - alpha * gain) / sigma
        shift = (next_alpha - keep * alpha / sigma) * (1 - gain * alpha) * data_mean
        mean = scale * mean + shift
        variance = scale**2 * variance + fresh


def test_sampler_on_gaussian():
    """The sampler against closed forms, in float64 without clipping: the mean and the
    variance of many samples; one noisy step written out; and the rate at which DDIM's
    error falls."""
    torch.manual_seed(0)
    mean = 0.4
    std = 0.3
    count = 40_000
    model = gaussian_model(mean, std)
    for eta in (0.0, 0.5, 1.0):
        for steps in (3, 10):
            x = torch.randn(count, 1, 1, 1, dtype=torch.double)
            x = diffusion.ddim_sample(model, x, sampling_levels(steps), eta, "none")
            expected, variance = gaussian_result(mean, std, steps, eta)
            error = (variance / count).sqrt()
            assert abs(x.mean() - expected) < 4.5 * error, (eta, steps)
            relative = (2 / count) ** 0.5
            assert abs(x.var() / variance - 1) < 4.5 * relative, (eta, steps)

    # One noisy step and the last one, written out, with fresh noise that is known.
    log_snr = torch.tensor([-2.0, 0.5]).double()
    alpha, sigma = flat_scales(log_snr)
    eta = 0.7
    x = torch.tensor([0.8]).double().view(1, 1, 1, 1)

    def known_noise(x):
        return torch.full_like(x, 1.3)

    sampled = diffusion.ddim_sample(
        model, x, log_snr, eta, "none", draw_noise=known_noise
    )
    v = model(x, -2.0)
    x0 = alpha[0] * x - sigma[0] * v
    noise = sigma[0] * x + alpha[0] * v
    ratio = alpha[0] / alpha[1]
    fresh = eta**2 * (sigma[1] / sigma[0]) ** 2 * (1 - ratio**2)
    x = alpha[1] * x0 + (sigma[1] ** 2 - fresh).sqrt() * noise + fresh**0.5 * 1.3
    last = alpha[1] * x - sigma[1] * model(x, 0.5)
    assert_close(sampled, last)

    # With clipping, the noise is what makes up x_t beside the clipped picture.
    def bright_at_first(x, log_snr):
        alpha, sigma = flat_scales(torch.tensor([log_snr]).double())
        x0 = torch.full_like(x, 1.5) if log_snr < 0 else x / 2
        return (alpha * x - x0) / sigma

    x = torch.tensor([0.8]).double().view(1, 1, 1, 1)
    sampled = diffusion.ddim_sample(bright_at_first, x, log_snr, 0.0, "static")
    noise = (x - alpha[0] * 1) / sigma[0]
    assert_close(sampled, (alpha[1] * 1 + sigma[1] * noise) / 2)

    # DDIM follows the exact path, x0 = mean + std * x1: its error falls about as
    # 1/steps.
    x = torch.linspace(-2, 2, 9).double().view(-1, 1, 1, 1)
    exact = mean + std * x
    errors = []
    for steps in (20, 40, 80):
        levels = sampling_levels(steps)
        y = diffusion.ddim_sample(model, x, levels, 0.0, "none")
        again = diffusion.ddim_sample(model, x, levels, 0.0, "none")
        assert torch.equal(y, again)
        errors.append((y - exact).abs().max().item())
    assert 1.6 < errors[0] / errors[1] < 2.4, errors
    assert 1.6 < errors[1] / errors[2] < 2.4, errors


def test_slerp():
    """The ends are the ends, the middle of two unit vectors is on the sphere and as
    near to one as to the other, and equal vectors don't divide by zero."""
    first, second = torch.randn(2, 3, 2, 5, 5, dtype=torch.double)
    assert_close(diffusion.slerp(first, second, torch.zeros(3)), first)
    assert_close(diffusion.slerp(first, second, torch.ones(3)), second)

    one = F.normalize(first.flatten(1))
    two = F.normalize(second.flatten(1))
    middle = diffusion.slerp(
        one.view_as(first), two.view_as(first), torch.full((3,), 0.5)
    ).flatten(1)
    assert_close(middle.norm(dim=1), torch.ones(3).double())
    assert_close((middle * one).sum(1), (middle * two).sum(1))

    share = torch.full((3,), 0.3)
    near = first * (1 + 1e-9)
    assert_close(diffusion.slerp(first, near, share), first)
    assert_close(diffusion.slerp(first, first, share), first)


def largest_gap(t):
    """The longest stretch of [0,1] without one of the timesteps."""
    t = t.sort().values
    return torch.cat([t[:1], t.diff(), 1 - t[-1:]]).max().item()


def no_scores(*args):
    """Stands in for a validation."""
    return dict.fromkeys("val_loss bin0 bin1 bin2 bin3 bin4".split(), 0.0)


def training_batches(how, other):
    """The (pictures, t) of each step of a short training with `--timesteps how`; that
    run refuses to go on with the `other` way."""
    times = []
    pictures = []
    schedule = diffusion.to_log_snr
    noise = diffusion.add_noise

    def noting_times(t, name):
        times.append(t.clone())
        return schedule(t, name)

    def noting_pictures(x, *rest):
        pictures.append(x.clone())
        return noise(x, *rest)

    with small_run(diffusion) as (monkey, out):
        monkey(diffusion, "to_log_snr", noting_times)
        monkey(diffusion, "add_noise", noting_pictures)
        monkey(diffusion, "show_results", nothing)
        monkey(diffusion, "validate", no_scores)
        flags = ["--data", "shapes", "--width", 8, "--steps", 4, "--batch-size", 64]
        run(diffusion, *flags, "--timesteps", how, "--out", out)
        message = refused(diffusion, *flags, "--timesteps", other, "--out", out)
    assert "timesteps" in message
    return pictures, times


def test_timesteps():
    """What training gets: a batch of Sobol t covers [0,1] evenly, an independent one
    doesn't, and each step's t differ from the last one's. The pictures are the same,
    mirrored or not."""
    sobol_pictures, sobol = training_batches("sobol", "independent")
    pictures, independent = training_batches("independent", "sobol")
    for some, others in zip(sobol_pictures, pictures):
        assert torch.equal(some + some.flip(-1), others + others.flip(-1))

    # 64 Sobol points: one in each 64th of [0,1]. Independent ones leave gaps of some
    # ln(64)/64.
    assert all(largest_gap(t) < 2 / 64 for t in sobol)
    assert all(largest_gap(t) > 2 / 64 for t in independent)

    for times in (sobol, independent):
        assert len(times) == 4
        for t, following in zip(times, times[1:]):
            assert not torch.equal(t, following)


def noise_levels(shift, schedule="linear"):
    """Log-SNRs with --log-snr-shift, in three tensors: what the network was told in two
    training steps, what in a validation, and what its pictures had in both; then the times
    of both."""
    told = {True: [], False: []}
    noised = []
    times = []
    forward = diffusion.UNet.forward
    scales = diffusion.to_alpha_sigma
    convert = diffusion.to_log_snr

    def noting_times(t, name):
        times.append(t.clone())
        return convert(t, name)

    def noting_told(net, x, log_snr, labels):
        told[net.training].append(log_snr.clone())
        return forward(net, x, log_snr, labels)

    def noting_noised(log_snr):
        noised.append(log_snr.clone())
        return scales(log_snr)

    with small_run(diffusion) as (monkey, out):
        monkey(diffusion.UNet, "forward", noting_told)
        monkey(diffusion, "to_alpha_sigma", noting_noised)
        monkey(diffusion, "to_log_snr", noting_times)
        monkey(diffusion, "show_results", nothing)
        flags = ["--steps", 2, "--log-snr-shift", shift, "--schedule", schedule]
        run(diffusion, *SMALL, *flags, "--out", out)
    assert len(told[True]) == 2 and told[False]
    levels = torch.cat(told[True]), torch.cat(told[False]), torch.cat(noised)
    return *levels, torch.cat(times)


def test_log_snr_shift():
    """Training sees cleaner pictures by the shift, and the network is told so; validation
    stays as it was, so that runs compare."""
    training, validation, noised, _ = noise_levels(1.5)
    assert torch.equal(noised, torch.cat([training, validation]))

    unshifted, same_validation, _, _ = noise_levels(0)
    assert_close(training, unshifted + 1.5)
    assert torch.equal(validation, same_validation)


def test_schedule_is_used():
    """Training and validation noise the pictures as the schedule asked for says."""
    schedules = dict(
        cosine=diffusion.cosine_schedule,
        linear=diffusion.linear_schedule,
        spliced=diffusion.spliced_schedule,
    )
    for name, schedule in schedules.items():
        _, _, noised, times = noise_levels(0, name)
        assert_close(noised, schedule(times))


def diffusion_batches(seed):
    """Two epochs of a training with three in ten labels dropped, 600 pictures each: for
    each picture its number, whether it was mirrored and whether its label was dropped;
    then the noise, and the weights that it ends with."""
    forward = diffusion.UNet.forward
    add = diffusion.add_noise
    pictures, noises, labels = [], [], []

    def noting_noise(x, noise, *rest):
        pictures.append(x.clone())
        noises.append(noise.clone())
        return add(x, noise, *rest)

    def noting_forward(self, x, log_snr, y):
        if self.training:
            labels.append(y.clone())
        return forward(self, x, log_snr, y)

    flags = ["--batch-size", 60, "--steps", 20, "--label-drop", 0.3, "--seed", seed]
    with small_run(diffusion) as (monkey, out):
        data = diffusion.load_data("shapes")
        without_results(diffusion, monkey)
        monkey(diffusion, "validate", no_scores)
        monkey(diffusion, "add_noise", noting_noise)
        monkey(diffusion.UNet, "forward", noting_forward)
        run(diffusion, *SMALL, *flags, "--out", out)
        weights = load_state(out)["net"]

    both = torch.cat([data.train_x, data.train_x.flip(-1)])
    seen = picture_numbers(diffusion.to_uint8(torch.cat(pictures)), both)
    seen = torch.tensor(seen)
    number = seen % 600
    mirrored = seen >= 600
    dropped = torch.cat(labels) == 100
    assert torch.equal(torch.cat(labels)[~dropped], data.train_y[number][~dropped])
    return number, mirrored, dropped, torch.cat(noises), weights


def test_diffusion_batches():
    """Each epoch has every picture once, in an order of its own; half are mirrored; the
    labels asked for are dropped, mirrored or not; and another seed is another run."""
    number, mirrored, dropped, noise, weights = diffusion_batches(0)
    first, second = number.split(600)
    everything = torch.arange(600)
    assert torch.equal(first.sort().values, everything)
    assert torch.equal(second.sort().values, everything)
    assert not torch.equal(first, second)
    assert not torch.equal(first, everything)

    # 1,200 draws: four standard deviations are 0.06 of half of them, 0.08 of a half's 0.3.
    assert abs(mirrored.float().mean() - 0.5) < 0.06
    for side in (mirrored, ~mirrored):
        assert abs(dropped[side].float().mean() - 0.3) < 0.08

    other, _, _, other_noise, other_weights = diffusion_batches(1)
    assert not torch.equal(other, number)
    assert not torch.equal(other_noise, noise)
    assert not same(weights, other_weights)


def check_average(step, share):
    """One update of the average at this step moves it by `share` of the way."""
    net = torch.nn.Linear(2, 2)
    average = torch.nn.Linear(2, 2)
    before = weight_copies(average)
    diffusion.update_ema(average, net, 0.9, step=step)
    for weight, old, new in zip(average.parameters(), before, net.parameters()):
        assert_close(weight, (1 - share) * old + share * new)


def test_diffusion_optimiser():
    """Each step of Adam, of all weights and without decay, has the rate of the schedule,
    and the log has the last one."""
    used, rates = [], []
    step = torch.optim.Adam.step

    def noting(self):
        (group,) = self.param_groups
        used.append(group)
        rates.append(group["lr"])
        return step(self)

    flags = [*SMALL, "--max-lr", 0.01, "--warm-up", 3, "--steps", 40]
    with small_run(diffusion) as (monkey, root):
        without_results(diffusion, monkey)
        monkey(diffusion, "validate", no_scores)
        monkey(torch.optim.Adam, "step", noting)
        run(diffusion, *flags, "--out", root)
        state = load_state(root)
    assert len(rates) == 40
    for i, rate in enumerate(rates):
        assert abs(rate - diffusion.learning_rate(i, 40, 0.01, 3)) < 1e-9
    assert state["log"]["rows"][-1]["lr"] == rates[-1]

    group = used[0]
    assert len(group["params"]) == len(state["net"])
    assert group["betas"] == (0.9, 0.99)
    assert group["weight_decay"] == 0


def test_dropped_labels():
    """A dropped label becomes "no class", the last row of the class embeddings: with
    all dropped that row alone is trained, with none all others are."""
    for share in (1, 0):
        with small_run(diffusion) as (monkey, root):
            without_results(diffusion, monkey)
            run(diffusion, *SMALL, "--label-drop", share, "--steps", 4, "--out", root / "a")
            state = load_state(root / "a")
            data = diffusion.load_data("shapes", torch.device("cpu"))
        settings = diffusion.Settings(**state["settings"])
        net = diffusion.build_network(settings, len(state["names"]))
        start = net.label.weight.detach().clone()
        moved = (state["net"]["label.weight"] != start).any(dim=1)
        assert moved[-1] == (share == 1)
        assert moved[:-1].any() == (share == 0)

        # The log's loss is with the labels that were learned.
        net.load_state_dict(state["ema"])
        labels = data.test_y
        if share == 1:
            labels = torch.full_like(labels, net.no_class)
        loss, _ = diffusion.validation_loss(net.eval(), data.test_x, labels, "linear")
        assert abs(state["log"]["rows"][-1]["val_loss"] - loss) < 1e-5


def test_ema():
    """The average decays as asked, and less in the warm-up, where it would still
    remember the start: after 2 steps by 3/12."""
    check_average(step=10**6, share=0.1)
    check_average(step=2, share=0.75)


def test_learning_rate():
    """A linear warm-up to the peak, then a fall that never pauses, to zero."""
    rates = [diffusion.learning_rate(step, 1000, 2.0, 100) for step in range(1000)]
    assert abs(rates[0] - 0.02) < 1e-4
    assert 1.9 < max(rates) <= 2.0
    assert 98 <= np.argmax(rates) <= 100
    assert rates[-1] < 1e-4
    assert (np.diff(rates[100:]) < 0).all()

    # A short run reaches its peak too: the warm-up takes a tenth of it at most.
    rates = [diffusion.learning_rate(step, 50, 2.0, 500) for step in range(50)]
    assert max(rates) > 1.9


# --------------------------------------------------------------------------------------
# diffusion.py: network, evaluation
# --------------------------------------------------------------------------------------


def tiny_unet(modulate=True):
    """A small network whose last layers are not zero, so that it says something."""
    torch.manual_seed(0)
    net = diffusion.UNet(classes=7, width=8, modulate=modulate).eval()
    for weight in net.parameters():
        filters = weight.ndim == 4 and weight.std() < 1e-6
        if filters or weight.abs().max() == 0:
            torch.nn.init.normal_(weight, std=0.1)
    return net


def modules_of(net, kind):
    """All parts of a network that are of one class."""
    return [part for part in net.modules() if isinstance(part, kind)]


def test_unet_budget():
    """The default uses the budget well, each variant gets the largest width that fits,
    the printed table adds up, and training refuses more."""
    net = diffusion.UNet()
    count = parameter_count(net)
    assert 900_000 < count < 1_000_000
    check_table(diffusion.parameter_table(net), count)
    assert f"{count:,} parameters" in diffusion.__doc__
    assert diffusion.MAX_PARAMETERS == 1_000_000
    assert diffusion.MAX_STEPS == 50_000

    # Modulation costs parameters, so more width fits without it.
    for modulate, width in [("on", 48), ("off", 56)]:
        settings = diffusion.Settings(modulate=modulate)
        net = diffusion.build_network(settings, classes=100)
        assert net.stem.out_channels == width
        wider = diffusion.UNet(width=width + 8, modulate=modulate == "on")
        assert parameter_count(wider) >= 1_000_000

    message = refused_in_small(diffusion, "--width", 72)
    assert "parameters, not under 1,000,000" in message


def test_unet_convolutions():
    """No BatchNorm; most 3x3 convolutions are separable, as in the paper; and the one
    after an injection is of the kind that was asked for."""
    net = diffusion.UNet()
    assert not modules_of(net, torch.nn.modules.batchnorm._BatchNorm)

    threes = 0
    separable = 0
    for conv in modules_of(net, torch.nn.Conv2d):
        if conv.kernel_size == (3, 3):
            threes += 1
            separable += conv.groups == conv.in_channels
    assert separable > 0.75 * threes

    for kind, groups in [("regular", 1), ("separable", 8)]:
        net = diffusion.UNet(width=8, after_injection=kind)
        assert modules_of(net.inject1, torch.nn.Conv2d)[0].groups == groups


def test_modulation():
    """Scale and shift in the middle of a block, by formula; and in every block, if
    asked for."""
    torch.manual_seed(0)
    block = diffusion.ResidualBlock(16, diffusion.separable_conv, e_width=4)
    x = torch.randn(2, 16, 6, 6)
    embedding = torch.randn(2, 4)
    scale, shift = block.modulate(embedding)[:, :, None, None].split(16, dim=1)
    middle = block.conv1(F.silu(block.norm1(x)))
    middle = block.norm2(middle) * (1 + scale) + shift
    assert_close(block(x, embedding), x + block.conv2(F.silu(middle)))

    # Where scale and shift are zero, it is the block without modulation.
    plain = diffusion.ResidualBlock(16, diffusion.separable_conv)
    plain.load_state_dict(block.state_dict(), strict=False)
    assert not torch.allclose(block(x, embedding), plain(x))
    for weight in block.modulate.parameters():
        torch.nn.init.zeros_(weight)
    assert_close(block(x, embedding), plain(x))

    x = torch.randn(2, 3, 32, 32)
    for modulated in (False, True):
        net = diffusion.UNet(width=8, modulate=modulated)
        blocks = modules_of(net, diffusion.ResidualBlock)
        assert len(blocks) == 10
        for block in blocks:
            assert (block.modulate is not None) == modulated
        assert net(x, torch.zeros(2), torch.tensor([3, 100])).shape == x.shape


def test_classifier_by_formula():
    """The encoder layer normalises before each half; each half of a depthwise-separable
    convolution has its norm and activation; tokens are places; positions and activations
    are those asked for."""
    first, norm1, act1, second, norm2, act2 = layer = classifier.depthwise_separable(6, 10)
    x = torch.randn(4, 6, 5, 5)
    h = F.silu(norm1(first(x)))
    assert_close(layer(x), F.silu(norm2(second(h))))
    assert type(act1) is type(act2) is torch.nn.SiLU

    net = classifier.Classifier(width=16, layers=1).eval()
    x = torch.randn(2, 3, 32, 32)
    stem = net.stem(x)
    tokens = [stem[:, :, place // 8, place % 8] for place in range(64)]
    tokens = net.encoder[0](torch.stack(tokens, dim=1) + net.positions)
    assert_close(net(x), net.head(net.norm(tokens).mean(dim=1)))

    layer = classifier.EncoderLayer(24)
    x = torch.randn(2, 9, 24)
    middle = x + layer.attention(layer.norm1(x))
    assert_close(layer(x), middle + layer.mlp(layer.norm2(middle)))

    net = classifier.Classifier(width=16)
    assert torch.equal(net.positions, classifier.fourier_positions(8, 16))
    assert not classifier.Classifier(width=16, positions="none").positions.any()
    for name, kind in [("silu", "SiLU"), ("gelu", "GELU"), ("relu", "ReLU")]:
        net = classifier.Classifier(width=16, activation=name)
        kinds = {type(layer).__name__ for layer in net.modules()}
        assert kinds & {"SiLU", "GELU", "ReLU"} == {kind}


def test_unet_by_formula():
    """The injection is a branch beside x; the skips are added; every weight takes part;
    the noise level's waves are 3 to 300 long; the last layer is fp32 under bf16."""
    net = tiny_unet()
    x = torch.randn(3, 3, 32, 32)
    log_snr = torch.tensor([-3.0, 0.0, 4.0])
    labels = torch.arange(3)

    inject = net.inject1
    h = torch.randn(3, 8, 6, 6)
    e = torch.randn(3, 128)
    shifted = inject.norm(h + inject.project(e)[:, :, None, None])
    assert_close(inject(h, e), h + inject.conv(shifted * shifted.sigmoid()))

    waves = diffusion.sinusoidal_embedding(log_snr)
    assert waves.shape == (3, 64)
    assert_close(waves[:, 0], (0.02 * log_snr).sin())
    assert_close(waves[:, 63], (2 * log_snr).cos())

    net(x, log_snr, torch.tensor([0, 3, 7])).square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad.any(), name

    with torch.autocast("cpu", torch.bfloat16):
        v = net(x, log_snr, labels)
    assert v.dtype == torch.float32
    assert not torch.equal(v, v.bfloat16().float())

    # With nothing from below, what is left at each size is its skip.
    net.requires_grad_(False)
    for join, skip in [(net.join2, net.down2), (net.join1, net.down1)]:
        for weight in join.parameters():
            weight.zero_()
        before = net(x, log_snr, labels)
        for weight in skip.parameters():
            weight.mul_(1.5)
        assert (net(x, log_snr, labels) - before).abs().max() > 1e-4


def test_unet_attention_by_formula():
    """x + out(heads side by side), each head a softmax average among the places of a
    picture; as built, the identity."""
    torch.manual_seed(0)
    attention = diffusion.Attention(128)
    x = torch.randn(2, 128, 3, 5)
    assert torch.equal(attention(x), x)

    # 128 channels are two heads of 64, 312 not five but four of 78.
    uneven = diffusion.Attention(312)
    assert uneven.heads == 4
    assert uneven(torch.randn(1, 312, 2, 2)).shape == (1, 312, 2, 2)
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    tokens = attention.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 128)
    queries, keys, values = attention.qkv(tokens).split(128, dim=2)
    heads = []
    for q, k, v in zip(queries.split(64, 2), keys.split(64, 2), values.split(64, 2)):
        scores = q @ k.transpose(1, 2) / math.sqrt(64)
        heads.append(torch.softmax(scores, -1) @ v)
    out = attention.out(torch.cat(heads, 2))
    out = out.reshape(2, 3, 5, 128).permute(0, 3, 1, 2)
    assert_close(attention(x), x + out, atol=1e-5, rtol=1e-4)


def test_unet_depends_on_all():
    """Picture, noise level and class each change the prediction, and other pictures of
    the batch don't; without modulation too, where the injections alone carry both."""
    x = torch.randn(5, 3, 32, 32)
    log_snr = torch.linspace(-8, 8, 5)
    labels = torch.arange(5)
    changed = [
        (x + 0.1, log_snr, labels),
        (x, log_snr + 1, labels),
        (x, log_snr, labels + 1),
        (x, log_snr, torch.full((5,), 7)),
    ]
    for modulate in (True, False):
        net = tiny_unet(modulate).requires_grad_(False)
        y = net(x, log_snr, labels)
        assert y.shape == (5, 3, 32, 32)
        for inputs in changed:
            difference = (net(*inputs) - y).flatten(1).abs().amax(1)
            assert difference.min() > 1e-4

        alone = net(x[2:3], log_snr[2:3], labels[2:3])
        assert_close(alone, y[2:3], atol=1e-4, rtol=1e-4)


def levels_apart(first, second):
    """By how many of the 256 levels two stacks of pictures differ, pixel by pixel."""
    return (first.float() - second.float()).abs()


def test_generate():
    """The same whatever the batch, the seed decides, no two chunks are alike, and the
    count need not be round."""
    net = tiny_unet()
    labels = torch.arange(103) % 7
    generate = functools.partial(diffusion.generate, net, steps=3, guidance=1.0)
    x = generate(labels, batch=50, seed=2)
    assert x.shape == (103, 3, 32, 32)
    assert x.dtype == torch.uint8

    # A batch of another size sums in another order. 1e-4 of the range is less than one
    # of 255 levels, but it can tip the rounding.
    whole = generate(labels, batch=200, seed=2)
    assert levels_apart(whole, x).max() <= 1
    fewer = generate(labels[:60], batch=60, seed=2)
    assert levels_apart(fewer, x[:60]).max() <= 1

    other = generate(labels, seed=3)
    assert levels_apart(other, x).mean() > 5
    assert levels_apart(x[:50], x[50:100]).mean() > 5

    # Whoever gives the start that would have been drawn gets the same pictures: the noise
    # of the steps doesn't begin with it again.
    start = diffusion.SampleNoise(2, 0, len(labels), "cpu")()
    again = generate(labels, batch=200, seed=2, start=start)
    assert torch.equal(again, whole)


def test_generate_options():
    """What generate is told reaches the sampler: levels of the schedule from pure noise
    to just before t = 0, w, eta, clipping. Different seeds share no chunk of noise."""
    calls = []
    guided = diffusion.guided_velocity

    def noting_sampler(model, x, log_snrs, eta, clip, noise):
        calls.append((log_snrs, eta, clip))
        return x

    def noting_guidance(net, labels, w):
        calls.append((labels.tolist(), w))
        return guided(net, labels, w)

    labels = torch.tensor([3, 1])
    with patched() as monkey:
        monkey(diffusion, "ddim_sample", noting_sampler)
        monkey(diffusion, "guided_velocity", noting_guidance)
        how = dict(schedule="linear", steps=4, eta=0.3, guidance=1.7, clip="static")
        diffusion.generate(tiny_unet(), labels, **how)
    guidance, (log_snrs, *rest) = calls
    assert guidance == ([3, 1], 1.7)
    assert rest == [0.3, "static"]
    expected = diffusion.linear_schedule(torch.tensor([1.0, 0.75, 0.5, 0.25]))
    assert_close(log_snrs, expected)

    second = diffusion.SampleNoise(2, 50, 50, "cpu")()
    third = diffusion.SampleNoise(3, 0, 50, "cpu")()
    assert not torch.equal(second, third)


def test_sampling_options():
    """Every flag of sampling is what generate gets; the schedule is training's unless
    another is asked for."""
    asked = dict(
        sample_seed=5,
        seed=6,
        schedule="spliced",
        sample_steps=7,
        eta=0.3,
        guidance=1.5,
        clip_x0="static",
        sample_batch=99,
    )
    device = torch.device("cpu")
    options = diffusion.sampling_options(diffusion.Settings(**asked), device)
    options.pop("progress")
    assert options == dict(
        seed=5,
        schedule="spliced",
        steps=7,
        eta=0.3,
        guidance=1.5,
        clip="static",
        batch=99,
        precision=torch.float32,
    )
    everything = diffusion.Settings(label_drop=1.0)  # no class was ever learned
    assert diffusion.sampling_options(everything, device)["guidance"] == -1
    raised(ValueError, diffusion.to_log_snr, torch.zeros(1), "cosin")
    settings = diffusion.Settings(**asked, sample_schedule="linear")
    assert diffusion.sampling_options(settings, device)["schedule"] == "linear"

    # Called from Python without them, generate samples as the command does.
    usual = diffusion.sampling_options(diffusion.Settings(), device)
    parameters = inspect.signature(diffusion.generate).parameters
    for name in ("seed", "schedule", "steps", "eta", "guidance", "clip", "batch"):
        assert parameters[name].default == usual[name], name
    parameters = inspect.signature(diffusion.ddim_sample).parameters
    for name in ("eta", "clip"):
        assert parameters[name].default == usual[name], name


def test_pictures_are_of_the_average():
    """Grids during training and all that follows it are drawn by the averaged network;
    a grid has one row per class."""
    drawn, shown, widths = [], [], []

    def noting_generate(net, labels, **options):
        drawn.append((weight_copies(net), labels.tolist()))
        return random_bytes(len(labels), 3, 32, 32)

    def noting_results(settings, net, data, step):
        shown.append(weight_copies(net))

    with small_run(diffusion) as (monkey, out):
        monkey(diffusion, "generate", noting_generate)
        monkey(diffusion, "show_results", noting_results)
        flags = ["--steps", 6, "--grid-every", 3, "--eval-every", 3, "--out", out]
        averages = []
        save = diffusion.save_checkpoint

        def noting_save(*args):
            save(*args)
            averages.append(list(load_state(out)["ema"].values()))

        monkey(diffusion, "save_grid", lambda path, x, columns: widths.append(columns))
        monkey(diffusion, "save_checkpoint", noting_save)
        run(diffusion, *SMALL, *flags)
    weights, labels = drawn[0]
    assert len(drawn) == 1
    assert same(weights, averages[0])
    assert same(shown[0], averages[1])
    assert labels == [number for number in labels[::10] for _ in range(10)]
    assert len(set(labels)) == 10
    assert widths == [10]


def test_no_guidance_without_dropped_labels():
    """Without dropped labels "no class" is an embedding that was never trained, so
    sampling doesn't use it."""
    device = torch.device("cpu")
    for label_drop, guidance in [(0.1, 3.0), (0.0, 0.0)]:
        settings = diffusion.Settings(label_drop=label_drop, guidance=3.0)
        options = diffusion.sampling_options(settings, device)
        assert options["guidance"] == guidance


def test_default_classes():
    """Where no class is asked for, samples go through all of them, in an order that the
    seed of sampling decides, and both ends of an interpolation differ."""
    names = [str(number) for number in range(100)]
    orders = []
    for seed in (0, 1):
        settings = diffusion.Settings(sample_seed=seed)
        labels = diffusion.pick_labels(settings, names, 130, "cpu").tolist()
        assert sorted(labels[:100]) == list(range(100))
        assert labels[100:] == labels[:30]
        orders.append(labels)
    assert orders[0] != orders[1]

    pairs = []

    def noting_pairs(net, ends, labels, **options):
        pairs.append((ends, labels))
        return random_bytes(80, 3, 32, 32)

    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        monkey(diffusion, "interpolate", noting_pairs)
        settings = diffusion.Settings(out=out)
        run_quietly(diffusion.interpolate_mode, settings, tiny_unet(), names)
    ((ends, labels),) = pairs
    assert ends.shape == (2, 8, 3, 32, 32)
    assert labels.shape == (2, 8)
    assert len(set(labels.flatten().tolist())) == 16


def test_interpolation_ends():
    """The first and last picture of a row are the samples of its two ends, and what is
    between them differs."""
    net = tiny_unet()
    ends = torch.randn(2, 3, 3, 32, 32)
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    how = dict(steps=3, guidance=2.0)
    x = diffusion.interpolate(net, ends, labels, count=4, **how)
    x = x.view(3, 4, 3, 32, 32)

    for end, column in [(0, 0), (1, 3)]:
        plain = diffusion.generate(net, labels[end], start=ends[end], eta=0.0, **how)
        assert levels_apart(x[:, column], plain).max() <= 1
    assert levels_apart(x[:, 1], x[:, 0]).mean() > 1

    # Along the sphere: noise in the middle is as long as at the ends. A straight line
    # would have 0.7 of it.
    starts = []
    classes = []

    def noting_generate(net, embeddings, *, start, **options):
        starts.append(start)
        classes.append(embeddings)

    with patched() as monkey:
        monkey(diffusion, "generate", noting_generate)
        diffusion.interpolate(net, ends, labels, count=3, **how)
    lengths = starts[0].flatten(1).norm(dim=1).view(3, 3)
    assert (lengths[:, 1] / lengths.mean(dim=1) - 1).abs().max() < 0.05

    # So do the classes.
    left, right = net.embed(labels)
    half = torch.full((3,), 0.5)
    assert_close(classes[0].view(3, 3, -1)[:, 1], diffusion.slerp(left, right, half))


def exact_distances(queries, pictures):
    """Distances between stacks of pictures, without the shortcut that loses digits."""
    return torch.cdist(
        queries.flatten(1).float(),
        pictures.flatten(1).float(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )


def test_nearest_neighbours():
    """A copy, a mirrored copy and a nearly equal picture find their originals, a
    picture counts once, and the distances are those of a plain search."""
    torch.manual_seed(0)
    pictures = random_bytes(7000, 3, 8, 8)
    queries = torch.cat([pictures[[6123]], pictures[[0]].flip(-1), pictures[[5001]]])
    queries[2, 0, 0, 0] ^= 3
    nearest = functools.partial(diffusion.nearest_neighbours, k=3, chunk=2)
    distance, index, flipped = nearest(queries, pictures)
    assert index[:, 0].tolist() == [6123, 0, 5001]
    assert flipped[:, 0].tolist() == [False, True, False]
    assert distance[:2, 0].tolist() == [0, 0]
    assert 0 < distance[2, 0] <= 3

    # However alike a picture and its flip are, even where they are equal, it counts
    # once.
    pictures[77] = pictures[77].maximum(pictures[77].flip(-1))
    queries = torch.cat([queries, pictures[[77]]])
    distance, index, flipped = nearest(queries, pictures)
    assert index[3, 0] == 77
    assert all(len(set(row)) == 3 for row in index.tolist())

    straight = exact_distances(queries, pictures)
    mirrored = exact_distances(queries, pictures.flip(-1))
    expected = straight.minimum(mirrored).topk(3, largest=False).values
    assert_close(distance, expected, atol=0.05, rtol=1e-4)


def test_validation_loss():
    """Repeats itself, draws nothing, and is the mean square of v where the network says
    zero, as it does when it is built."""
    x, y, _ = diffusion.draw_shapes(200, seed=0)
    net = diffusion.UNet(width=8).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    total, bins = diffusion.validation_loss(net, x, y, count=100)
    assert torch.equal(torch.get_rng_state(), before)
    assert (total, bins) == diffusion.validation_loss(net, x, y, count=100)

    chosen = np.random.RandomState(0).permutation(200)[:100]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100, 3, 32, 32, generator=generator)
    angle = (torch.arange(100) + 0.5) / 100 * math.pi / 2
    angle = angle.view(-1, 1, 1, 1)
    picture = x[chosen] / 127.5 - 1
    v = angle.cos() * noise - angle.sin() * picture
    assert_close(torch.tensor(total), v.square().mean(), atol=1e-4, rtol=1e-4)

    expected = v.square().view(5, -1).mean(1)
    assert_close(torch.tensor(bins), expected, atol=1e-3, rtol=1e-3)


def test_ranges():
    """Every byte survives the way to [-1,1] and back, what lies outside is cut, and
    pictures that went already are refused."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    scaled = diffusion.to_model(x)
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert torch.equal(diffusion.to_uint8(scaled), x)

    outside = torch.tensor([-3.0, 3.0])
    assert diffusion.to_uint8(outside).tolist() == [0, 255]
    raised(AssertionError, diffusion.to_model, scaled)


def test_frechet():
    """Closed forms: equal Gaussians, a shift, diagonal covariances, and one that is
    singular."""
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    full = root @ root.T
    mean = torch.randn(6).double()
    distance = diffusion.frechet_distance
    assert abs(distance(mean, full, mean, full)) < 1e-6
    assert abs(distance(mean, full, mean + 2, full) - 24) < 1e-6

    first, second = torch.rand(2, 6).double()
    expected = (first.sqrt() - second.sqrt()).square().sum()
    assert abs(distance(mean, first.diag(), mean, second.diag()) - expected) < 1e-9

    root = torch.randn(6, 3).double()
    singular = root @ root.T
    values = torch.linalg.eigvals(full @ singular).real
    overlap = values.clamp(min=0).sqrt().sum()
    expected = full.trace() + singular.trace() - 2 * overlap
    assert abs(distance(mean, full, mean, singular) - expected) < 1e-4


class StubInception(torch.nn.Module):
    """Has what the FID network has: `layers`, from 299x299 pictures to (B,C,1,1);
    64 channels, not 2,048, whose eigenvalues would take seconds."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d((8, 8)),
            torch.nn.Flatten(),
            torch.nn.Linear(192, 64),
            torch.nn.Unflatten(1, (64, 1, 1)),
        )


def test_resize():
    """Size, range, and Pillow's own bicubic picture of one channel."""
    x, _, _ = diffusion.draw_shapes(2, seed=1)
    y = diffusion.resize_for_inception(x)
    assert y.shape == (2, 3, 299, 299)
    assert y.dtype == torch.float32
    assert y.min() >= 0
    assert y.max() <= 255

    plane = Image.fromarray(x[1, 2].numpy().astype(np.float32))
    plane = plane.resize((299, 299), Image.BICUBIC)
    assert np.array_equal(y[1, 2].numpy(), np.asarray(plane).clip(0, 255))


# --------------------------------------------------------------------------------------
# diffusion.py: training and modes
# --------------------------------------------------------------------------------------


def test_diffusion_resume():
    """As the classifier's: bit-identical, with EMA and Sobol, and whatever grids were
    drawn in between; then all modes run from the checkpoint."""
    # 150 pictures are 6 batches per epoch, so step 8 is in the second epoch.
    with small_run(diffusion, train=150, test=60) as (monkey, root):
        flags = [*SMALL, "--batch-size", 25, "--steps", 14]
        whole = root / "whole"
        parts = root / "parts"
        run(diffusion, *flags, "--grid-every", 10, "--out", whole)
        with patched() as inner:
            without_results(diffusion, inner)
            interrupted(diffusion, "update_ema", 8, *flags, "--out", parts)
            _, text = run(diffusion, *flags, "--out", parts)
        assert "8 of 14 steps" in text

        expected = load_state(whole)
        state = load_state(parts)
        for key in ("net", "ema", "optimiser", "random", "order", "position"):
            assert same(state[key], expected[key]), key
        assert same(state["log"]["loss"], expected["log"]["loss"])
        assert not same(state["net"], state["ema"])

        pictures = (
            "grid-000010.png grid-000014.png samples.png "
            "interpolations.png neighbours.png loss.png"
        )
        for name in pictures.split():
            assert (whole / name).stat().st_size > 500, name
        check_sampling_modes(whole)
        check_fid_mode(monkey, whole)


def test_resume_on_another_device():
    """A run that goes on on another kind of device draws numbers that it hasn't had."""
    states = []
    flip = diffusion.random_flip

    def noting_flip(x, draw):
        states.append(draw.clone())
        return flip(x, draw)

    with small_run(diffusion) as (monkey, out):
        without_results(diffusion, monkey)
        monkey(diffusion, "random_flip", noting_flip)
        flags = [*SMALL, "--steps", 4, "--out", out]
        interrupted(diffusion, "update_ema", 2, *flags)
        state = load_state(out)
        torch.save(dict(state, device="elsewhere"), out / "checkpoint.pt")
        run(diffusion, *flags)
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(states[2], torch.rand(2, 50, generator=generator)[0])


def check_sampling_modes(out):
    """Samples and interpolations from a checkpoint of the network SMALL; then the modes
    that need training pictures, or nothing."""
    flags = ["--data", "shapes", "--out", out, "--sample-steps", 2]

    # Samples need no data set, hence no download.
    with patched() as monkey:
        monkey(diffusion, "load_data", None)
        run(diffusion, "interpolate", *flags)
        some = ["--classes", "red circle,7", "--count", 5, "--eta", 0]
        x, _ = run(diffusion, "sample", *flags, *some)
    saved = np.load(out / "samples.npz")
    assert saved["labels"].tolist() == [0, 7, 0, 7, 0]
    assert np.array_equal(saved["samples"], x.permute(0, 2, 3, 1).numpy())

    # What no flag says is as the training command said it.
    with patched() as monkey:
        monkey(diffusion, "sample_mode", first_argument)
        settings, _ = run(diffusion, "sample", "--out", out, "--eta", 0.5)
    assert settings.width == 8
    assert settings.sample_steps == 2
    assert settings.count == 8
    assert settings.eta == 0.5
    assert settings.classes == ""
    assert "--sample-steps" in refused(diffusion, "sample", *flags, "--steps", 3)

    for word in ("unicorn", "100"):
        assert word in refused(diffusion, "sample", *flags, "--classes", word)
    medians, _ = run(diffusion, "neighbours", *flags, "--count", 8)
    x, _ = run(diffusion, "sample", *flags, "--count", 8)
    data = diffusion.load_data("shapes")
    both = torch.cat([data.train_x, data.train_x.flip(-1)])
    for median, pictures in zip(medians, (x, data.test_x)):
        nearest = exact_distances(pictures, both).amin(1).median()
        assert abs(median / nearest - 1) < 1e-3
    run(diffusion, "schedules", "--out", out)
    assert is_picture(out / "schedules.png")


def stub_statistics(network, x):
    """(mean, covariance) of a stand-in's features of pictures uint8 (N,3,H,W), made
    apart from the script: its network wants [-1,1]."""
    resized = diffusion.resize_for_inception(x) / 128 - 1
    features = network.layers(resized).flatten(1).detach().double()
    return features.mean(0), features.T.cov()


def check_fid_mode(monkey, out):
    """FID with a stand-in for its network. Without one, the samples stay; and what it
    finds out about the test pictures is kept for the next time."""
    flags = ["--data", "shapes", "--out", out, "--sample-steps", 2, "--fid-count", 30]

    # No test downloads.
    monkey(torch.hub, "download_url_to_file", no_net)
    message = refused(diffusion, "fid", *flags, "--inception", out / "none.pt")
    assert diffusion.INCEPTION_SHA256 in message
    assert "none.pt" in message
    (out / "junk.pt").write_text("another network")
    assert "wrong SHA-256" in refused(diffusion, "fid", *flags, "--inception", out / "junk.pt")
    kept = np.load(out / "fid-samples.npz")
    assert kept["samples"].shape == (30, 32, 32, 3)

    # It is said before anything is drawn.
    generate = diffusion.generate
    monkey(diffusion, "generate", stopped_by_hand)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        diffusion.main(["fid", "--data", "shapes", "--out", str(out)])
    assert "the FID network can't be had" in text.getvalue()
    monkey(diffusion, "generate", generate)

    data = diffusion.load_data("shapes")
    assert kept["labels"].tolist() == data.test_y[:30].tolist()

    torch.manual_seed(0)
    network = StubInception()
    monkey(diffusion, "load_inception", lambda path: network)
    result, text = run(diffusion, "fid", *flags)
    samples = torch.from_numpy(kept["samples"]).permute(0, 3, 1, 2)
    test = stub_statistics(network, data.test_x)
    distance = diffusion.frechet_distance(*stub_statistics(network, samples), *test)
    assert abs(distance / result - 1) < 1e-3
    assert "not comparable" in text

    # The floor is that of 30 training pictures.
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data.train_y), generator=generator)[:30]
    real = stub_statistics(network, data.train_x[chosen])
    floor = diffusion.frechet_distance(*real, *test)
    printed = float(re.search(r"floor, .*: ([0-9.]+)", text)[1])
    assert abs(printed - floor) < 0.001 + 1e-3 * floor

    # The same seed again: the same FID, from the samples' statistics alone.
    statistics = diffusion.feature_statistics
    counts = []

    def noting(network, x):
        counts.append(len(x))
        return statistics(network, x)

    monkey(diffusion, "feature_statistics", noting)
    kept, _ = run(diffusion, "fid", *flags)
    assert abs(kept / result - 1) < 1e-3
    assert counts == [30]


def stopped_by_hand(*args, **kwargs):
    """In place of a function: Ctrl-C while it runs."""
    raise KeyboardInterrupt


def test_signal_while_drawing():
    """A signal that comes when a step's saving is over ends the run after the next
    step, and what the message says is saved is saved."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(diffusion, monkey)
        flags = [*SMALL, "--steps", 9, "--grid-every", 3, "--out", out]
        interrupted(diffusion, "save_class_grid", 1, *flags)
        assert load_state(out)["step"] == 4


def test_signal_in_last_validation():
    """A signal that comes while the last step is validated ends the run when that is
    saved, before any measuring and drawing; started again, it does these."""
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        result = "report" if module is classifier else "show_results"
        with small_run(module) as (monkey, out):
            function = getattr(module, result)
            monkey(module, result, None)
            flags = [*flags, "--steps", 2, "--out", out]
            interrupted(module, "validate", 1, *flags)
            assert load_state(out)["step"] == 2
            assert (out / "log.csv").exists()
            monkey(module, result, function)
            without_results(module, monkey)
            _, text = run(module, *flags)
            assert "2 of 2 steps" in text


def test_diffusion_loss_and_clip():
    """What train() minimises is Eq. (3), the mean square of the velocity's error, and the
    gradient that Adam takes is no longer than asked, in fp16 too, where it was scaled."""
    velocity = diffusion.velocity
    forward = diffusion.UNet.forward
    add = diffusion.TrainingLog.add
    step = torch.optim.Adam.step
    wanted, predicted, losses, norms = [], [], [], []

    def noting_velocity(*args):
        wanted.append(velocity(*args))
        return wanted[-1]

    def noting_forward(net, *inputs):
        predicted.append(forward(net, *inputs))
        return predicted[-1]

    def noting_add(log, number, loss):
        losses.append(loss)
        add(log, number, loss)

    def noting_step(self):
        gradients = [weight.grad.flatten() for weight in self.param_groups[0]["params"]]
        norm = torch.cat(gradients).norm()

        # What is still scaled, Adam's kernel divides by this.
        scale = getattr(self, "grad_scale", None)
        norms.append((norm if scale is None else norm / scale).item())
        return step(self)

    for precision in ("fp32", "fp16"):
        with small_run(diffusion) as (monkey, out):
            without_results(diffusion, monkey)
            monkey(diffusion, "validate", no_scores)
            monkey(diffusion, "velocity", noting_velocity)
            monkey(diffusion.UNet, "forward", noting_forward)
            monkey(diffusion.TrainingLog, "add", noting_add)
            monkey(torch.optim.Adam, "step", noting_step)
            flags = ["--steps", 3, "--clip-norm", 0.01, "--precision", precision]
            run(diffusion, *SMALL, *flags, "--out", out)

    assert len(losses) == 6
    for loss, v, pred_v in zip(losses, wanted, predicted):
        assert_close(loss, ((v - pred_v.detach()) ** 2).mean())
    assert len(norms) == 6
    assert all(0.0099 < norm < 0.0101 for norm in norms), norms


def test_diffusion_step():
    """What train() does beside forward and backward: it mirrors about half of the
    pictures, clips the gradient, and averages the weights with the decay asked for."""
    most, decays, mirrored, steps = [], [], [], []
    clip = torch.nn.utils.clip_grad_norm_
    update = diffusion.update_ema
    flip = diffusion.random_flip

    def noting_clip(parameters, norm):
        most.append(norm)
        return clip(parameters, norm)

    def noting_update(ema_net, net, decay, step):
        decays.append(decay)
        steps.append(step)
        update(ema_net, net, decay, step)

    def noting_flip(x, draw):
        result = flip(x, draw)
        changed = (result != x).flatten(1).any(dim=1)
        assert torch.equal(result[changed], x[changed].flip(-1))
        mirrored.append(changed.float().mean().item())
        return result

    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(diffusion, monkey)
        monkey(torch.nn.utils, "clip_grad_norm_", noting_clip)
        monkey(diffusion, "update_ema", noting_update)
        monkey(diffusion, "random_flip", noting_flip)
        monkey(diffusion, "show_results", nothing)
        flags = ["--steps", 4, "--clip-norm", 0.3, "--ema", 0.77, "--out", out]
        run(diffusion, *SMALL, *flags)
    assert most == [0.3] * 4
    assert decays == [0.77] * 4
    assert steps == [0, 1, 2, 3]
    assert len(mirrored) == 4
    assert 0.3 < sum(mirrored) / 4 < 0.7


def test_diffusion_learns():
    """After some steps the loss with true labels is below the loss with shuffled ones,
    and far below that of a network that says zero, 0.75 here."""
    flags = (
        "--data shapes --width 16 --steps 130 --max-lr 5e-3 --batch-size 24 "
        "--warm-up 20 --ema 0.95 --label-drop 0"
    ).split()
    with small_run(diffusion, train=6000, test=200) as (monkey, out):
        without_results(diffusion, monkey)
        loss, _ = run(diffusion, *flags, "--out", out)

        net = diffusion.UNet(width=16)
        net.load_state_dict(load_state(out)["ema"])
        data = diffusion.load_data("shapes")
        x = data.test_x
        y = data.test_y
        true, _ = diffusion.validation_loss(net, x, y, "linear")
        assert abs(true - loss) < 1e-6

        generator = torch.Generator().manual_seed(0)
        mixed = y[torch.randperm(len(y), generator=generator)]
        shuffled, _ = diffusion.validation_loss(net, x, mixed, "linear")
        assert loss < 0.4, loss
        assert shuffled > 1.3 * true, (true, shuffled)


def test_diffusion_bad_input():
    """One clear line each, a non-zero exit, nothing overwritten."""
    cases = {
        "--steps 50001": "--steps 50001",
        "--steps 0": "--steps 0",
        "--max-lr nan": "nan",
        "--batch-size 601": "--batch-size 601: there are 600",
        "--width 72": "parameters, not under 1,000,000",
        "--width 20": "--width 20",
        "--eta 2": "--eta 2",
        "--classes rose": "rose",
        "--clip-x0 hard": "hard",
        "--no-such": "no-such",
        "--epochs 5": "no --epochs (",
        "sample": "checkpoint.pt",
        "fly": "fly",
    }
    with small_run(diffusion) as (monkey, root):
        out = root / "run"
        check_refused(diffusion, cases, out)

        # Samples are compared with the pictures that the network learned from, no others.
        trained = root / "trained"
        monkey(diffusion, "show_results", nothing)
        run(diffusion, *SMALL, "--steps", 1, "--out", trained)
        small_shapes(diffusion, monkey, 700, 200)
        for mode in ("fid", "neighbours"):
            message = refused(diffusion, mode, "--data", "shapes", "--out", trained)
            assert "other pictures" in message

        # The other script's checkpoint, whole, cut short and empty.
        with small_run(classifier) as (monkey, _):
            without_results(classifier, monkey)
            run(classifier, *TINY, "--steps", 1, "--out", out)
        good = (out / "checkpoint.pt").read_bytes()
        contents = [good, good[:1000], b""]
        check_unusable(diffusion, contents, out, SMALL, ["sample", *SMALL])


# --------------------------------------------------------------------------------------
# A GPU without one
# --------------------------------------------------------------------------------------

# Operations after which the host has to know what the device computed.
NO_LAUNCH = "device empty empty_strided empty_like new_empty _unsafe_view".split()
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")


class FakeCuda(FakeTensorMode):
    """A context in which CUDA tensors have shapes and types but no numbers, so that the
    scripts' work for a GPU runs anywhere; CPU tensors are real.

    Raises AssertionError where a CPU tensor meets a CUDA one. `waits` collects what
    would make the host wait for the device, `launches` counts the operations that
    compute or copy.
    """

    avoid_device_init = True  # torch.tensor(..., device="cuda") too

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = []
        self.launches = collections.Counter()
        self.depth = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        name = operation.overloadpacket.__name__
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_cuda = [isinstance(tensor, FakeTensor) for tensor in tensors]
        to_cuda = "cuda" in str(kwargs.get("device"))
        if not any(on_cuda) and not to_cuda:
            return operation(*args, **kwargs)

        if name in READS:
            self.waits.append(name)
            return False if name == "equal" else 0.0
        if name in ("_to_copy", "copy_"):
            self.check_copy(tensors, kwargs)
        else:
            for tensor, fake in zip(tensors, on_cuda):
                assert fake or tensor.ndim == 0, f"{name}: a CPU tensor meets CUDA"

        # An operation may be made of others here, where a GPU has one kernel.
        if self.depth == 0 and not operation.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1

        # A generator of the device, which there is none of.
        if "generator" in kwargs:
            kwargs["generator"] = None
        self.depth += 1
        try:
            return super().__torch_dispatch__(operation, types, args, kwargs)
        finally:
            self.depth -= 1

    def check_copy(self, tensors, kwargs):
        """Note a copy between the two for which the host waits."""
        target = kwargs.get("device") or tensors[0].device
        source = tensors[-1]
        if source.device.type == torch.device(target).type:
            return
        pinned = getattr(source, "is_pinned_copy", False)
        if not (pinned and kwargs.get("non_blocking")):
            self.waits.append(f"copy of {tuple(source.shape)} from {source.device}")


def pinned_copy(x):
    """Stands in for Tensor.pin_memory, which wants a driver."""
    x = x.clone()
    x.is_pinned_copy = True
    return x


@contextlib.contextmanager
def fake_cuda(module, precision):
    """(monkey, mode) while `module` believes that it has a GPU and computes in that
    precision; loads few shapes."""
    device = torch.device("cuda")
    load = module.load_data
    generator = torch.Generator

    def on_cuda(source, *rest):
        data = load(source, *rest[:-1])
        return type(data)(*[to_cuda(part) for part in data])

    def to_cuda(part):
        return part.to(device) if isinstance(part, torch.Tensor) else part

    classifier.pixel_sources.cache_clear()
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(module, monkey)
        monkey(module, "load_data", on_cuda)
        monkey(module, "set_up", lambda settings: (device, precision, Path(out)))
        monkey(torch, "Generator", lambda device="cpu": generator())
        monkey(torch.Tensor, "pin_memory", pinned_copy)
        monkey(torch.cuda, "is_available", lambda: True)
        monkey(torch.cuda, "is_bf16_supported", lambda *args: True)
        monkey(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *args: True)
        with FakeCuda() as mode:
            yield monkey, mode
    classifier.pixel_sources.cache_clear()


def train_on_fake_cuda(module, precision, *flags):
    """(what the host waited for, launches) in the three steps of a training, without
    what happens only now and then. The backward pass needs a driver, so all gradients
    are zeros."""
    build = module.build_network
    nets = []

    def noting(*args):
        nets.append(build(*args))
        return nets[0]

    def no_backward(loss):
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        for weight in nets[0].parameters():
            weight.grad = torch.zeros_like(weight)

    with fake_cuda(module, precision) as (monkey, mode):

        def started(log, step):
            mode.waits.clear()
            mode.launches.clear()

        def stopped(log, *rest):
            waits.extend(mode.waits)
            launches.update(mode.launches)
            log.rows.append(no_scores())

        waits, launches = [], collections.Counter()
        monkey(module, "build_network", noting)
        monkey(torch.Tensor, "backward", no_backward)
        monkey(module, "validate", no_scores)
        monkey(module, "save_checkpoint", nothing)
        monkey(module.TrainingLog, "start_clock", started)
        monkey(module.TrainingLog, "new_row", stopped)
        for name in ("show", "write_files", "summarise"):
            monkey(module.TrainingLog, name, nothing)
        without_results(module, monkey)
        run(module, *flags, "--steps", 3, "--log-every", 50, "--compile", "off")
    return waits, launches


def test_training_never_waits():
    """On a fake GPU no step of either script lets the host wait for the device, in any
    precision, and few launches do what concerns all weights. But for fp16 in the
    classifier: its Muon asks once a step whether a gradient overflowed."""
    adam = {classifier: "_fused_adamw_", diffusion: "_fused_adam_"}
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        for precision in module.PRECISIONS.values():
            waits, launches = train_on_fake_cuda(module, precision, *flags)
            scaled = precision == torch.float16
            asked = 3 if scaled and module is classifier else 0
            assert waits == asked * ["_local_scalar_dense"], (module, precision, waits)

            # Per step: Adam is one launch, its arithmetic none beside it, and the
            # average of all weights one. (The classifier's matrices are Muon's.)
            assert launches[adam[module]] == 3
            assert launches["addcdiv_"] == launches["_foreach_addcdiv_"] == 0
            assert launches["_foreach_norm"] == launches["_foreach_mul_"] == 3
            assert launches["_amp_update_scale_"] == 3 * scaled
            if module is diffusion:
                assert launches["_foreach_lerp_"] == 3


def test_fake_cuda_sees_waits():
    """The fake GPU notices what it is there for: a blocking copy, a number read back,
    a CPU tensor beside a CUDA one."""
    with FakeCuda() as mode:
        x = torch.zeros(3, device="cuda")
        index = torch.tensor([0, 2])
        assert mode.waits == []

        index.to("cuda")
        assert len(mode.waits) == 1
        pinned_copy(index).to("cuda", non_blocking=True)
        assert len(mode.waits) == 1
        pinned_copy(index).to("cuda")
        assert len(mode.waits) == 2
        x.cpu()
        assert len(mode.waits) == 3
        x.sum().item()
        assert len(mode.waits) == 4
        raised(AssertionError, lambda: x[index])
        raised(AssertionError, lambda: x + torch.zeros(3))


def test_randaugment_launches():
    """A batch in which all 28 kinds occur takes at most six launches for each."""
    with fake_cuda(classifier, torch.float32) as (_, mode):
        x = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8, device="cuda")
        classifier.randaugment(x)  # this one looks for where pixels come from
        mode.launches.clear()
        mode.waits.clear()
        classifier.randaugment(x)
    assert not mode.waits
    assert mode.launches.total() < 6 * 28, mode.launches


def test_sampling_on_fake_cuda():
    """Samples with guidance, interpolations and neighbours on a fake GPU: one device
    throughout, and the host waits only for whole batches of pictures."""
    with fake_cuda(diffusion, torch.float16) as (_, mode):
        device = torch.device("cuda")
        net = diffusion.UNet(width=8).to(device)
        labels = torch.zeros(100, dtype=torch.int64, device=device)
        mode.waits.clear()
        options = dict(steps=5, guidance=3.0, batch=50, precision=torch.float16)
        x = diffusion.generate(net, labels, **options)
        assert x.shape == (100, 3, 32, 32)
        assert len(mode.waits) == 2, mode.waits

        mode.waits.clear()
        ends = torch.randn(2, 4, 3, 32, 32, device=device)
        x = diffusion.interpolate(net, ends, labels[:8].view(2, 4), count=3, steps=2)
        assert x.shape == (12, 3, 32, 32)
        assert len(mode.waits) == 1, mode.waits

        mode.waits.clear()
        pictures = torch.zeros(300, 3, 32, 32, dtype=torch.uint8, device=device)
        distance, index, _ = diffusion.nearest_neighbours(pictures[:20], pictures, 4)
        assert distance.shape == index.shape == (20, 4)
        assert distance.device.type == "cuda"
        assert not mode.waits


def test_validation_on_fake_cuda():
    """What both scripts measure during a training runs on a fake GPU."""
    with fake_cuda(classifier, torch.bfloat16):
        data = classifier.load_data("shapes", 0, torch.device("cuda"))
        mean, std = classifier.channel_statistics(data.train_x)
        net = classifier.Classifier(width=8).to("cuda")
        scores = classifier.validate(net, data, mean, std, torch.bfloat16)
        assert set(scores) == {"train_acc", "val_acc", "val_loss"}
    with fake_cuda(diffusion, torch.bfloat16):
        data = diffusion.load_data("shapes", torch.device("cuda"))
        net = diffusion.UNet(width=8).to("cuda")
        scores = diffusion.validate(net, data, "cosine", torch.bfloat16)
        assert set(scores) == set(no_scores())


# --------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------


def test_precision_is_chosen():
    """bf16 where a GPU computes with it, fp16 with tensor cores but no bf16 (a T4),
    fp32 elsewhere or where asked for."""
    cuda = torch.device("cuda")
    cases = [
        (True, (9, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),
        (False, (6, 1), torch.float32),
    ]
    for module in MODULES:
        choose = module.choose_precision
        assert choose(torch.device("cpu"))[0] == torch.float32
        assert choose(torch.device("mps"))[0] == torch.float32
        assert choose(cuda, "fp32")[0] == torch.float32
        for has_bf16, capability, expected in cases:
            with patched() as monkey:
                monkey(torch.cuda, "is_bf16_supported", lambda *a, **k: has_bf16)
                monkey(torch.cuda, "get_device_capability", lambda device: capability)
                dtype, why = choose(cuda)
            assert dtype == expected
            assert why


class Operations(TorchDispatchMode):
    """A context that notes the `names` of all operations, and the `dtypes` of the
    floating-point tensors that they give; plain numbers, as scales are, left out."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.dtypes = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.name().removeprefix("aten::"))
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 0:
                if tensor.is_floating_point():
                    self.dtypes.add(tensor.dtype)
        return result


def last_loss(module, precision):
    """The running loss after 60 steps on shapes in that precision, after which the
    averaged network draws two samples, or the classifier is measured."""
    flags = [*TINY, "--batch-size", 40]
    if module is diffusion:
        flags = [*SMALL, "--batch-size", 6, "--count", 2]
    with small_run(module, train=240, test=40) as (monkey, out):
        if module is diffusion:
            monkey(module, "show_results", sample_after_training)
        command = [*flags, "--precision", precision, "--steps", 60, "--out", out]
        _, text = run(module, *command)
        name = str(module.PRECISIONS[precision]).removeprefix("torch.")
        assert f"{name} as asked for" in text
        assert all(map(math.isfinite, log_column(out, "val_loss")))
        return log_column(out, "loss")[-1]


def sample_after_training(settings, net, data, step):
    """Stands in for all that a diffusion training ends with."""
    x = diffusion.sample_mode(settings, net, data.names)
    assert x.float().std() > 5


def test_precision_in_training():
    """In bf16 and fp16 training ends with the loss of fp32, to 2 %; measuring and
    sampling work in them too. (Slow, as a CPU emulates both.)"""
    for module in MODULES:
        expected = last_loss(module, "fp32")
        for precision in ("bf16", "fp16"):
            loss = last_loss(module, precision)
            assert abs(loss / expected - 1) < 0.02, (module, precision, loss, expected)


def test_precision_is_used():
    """A step computes in the type asked for and in fp32, and with no tensor in fp64."""
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        for name, dtype in module.PRECISIONS.items():
            with small_run(module) as (monkey, out):
                without_results(module, monkey)
                monkey(module, "validate", no_scores)
                command = [*flags, "--batch-size", 10, "--precision", name]
                with Operations() as seen:
                    run(module, *command, "--steps", 2, "--out", out)
            assert seen.dtypes == {torch.float32, dtype}, (module, name, seen.dtypes)


def test_scaler():
    """In fp16 the loss is scaled, and the checkpoint knows how much: a stopped run goes
    on to the bit. Steps whose gradients overflow change no weight, and halve the scale.
    A run in another precision can be resumed in fp16."""
    calls = [(classifier, "augment", TINY), (diffusion, "update_ema", SMALL)]
    for module, call, flags in calls:
        with small_run(module, train=60) as (monkey, root):
            without_results(module, monkey)
            monkey(module, "validate", no_scores)
            flags = [*flags, "--batch-size", 10, "--steps", 6]
            half = [*flags, "--precision", "fp16"]
            run(module, *half, "--out", root / "whole")
            interrupted(module, call, 4, *half, "--out", root / "parts")
            run(module, *half, "--out", root / "parts")
            state = load_state(root / "parts")
            expected = load_state(root / "whole")
            for key in ("net", "optimiser", "scaler"):
                assert same(state[key], expected[key]), key
            assert state["scaler"]["scale"] > 1

            # So large a scale that each of the last two steps overflows.
            interrupted(module, call, 4, *half, "--out", root / "large")
            state = load_state(root / "large")
            before = state["net"]
            state["scaler"]["scale"] = 2.0**120
            torch.save(state, root / "large" / "checkpoint.pt")
            run(module, *half, "--out", root / "large")
            state = load_state(root / "large")
            assert state["step"] == 6
            assert state["scaler"]["scale"] == 2.0**118
            for name, weight in before.items():
                if not name.endswith(("running_mean", "running_var", "tracked")):
                    assert torch.equal(state["net"][name], weight), name

            interrupted(module, call, 4, *flags, "--out", root / "other")
            assert load_state(root / "other")["scaler"] == {}
            run(module, *half, "--out", root / "other")
            assert load_state(root / "other")["scaler"]["scale"] > 1


# --------------------------------------------------------------------------------------
# Compilation, memory, Apple's GPUs
# --------------------------------------------------------------------------------------


def compiled_graphs():
    """How many graphs torch.compile has made since it was reset."""
    return counters["stats"]["unique_graphs"]


def counting_graphs(module, monkey, names):
    """name -> how many graphs torch.compile had made, in all, when that function of
    `module` last returned."""
    graphs = {}

    def counted(name, function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            graphs[name] = counters["stats"]["unique_graphs"]
            return result

        return wrapped

    for name in names:
        monkey(module, name, counted(name, getattr(module, name)))
    return graphs


def test_compilations():
    """One graph for training, and one for each thing that a network does besides,
    though batches have several sizes: the classifier measures; the averaged network
    validates and samples. The trials at the start cost none of their own."""
    compile_module = torch.nn.Module.compile

    def without_a_compiler(net, mode="default"):
        compile_module(net, backend="eager")

    small = [*SMALL, "--count", 70]
    cases = [
        (classifier, TINY, 300, dict(compile_network=2, evaluate=2)),
        (classifier, TINY, 100, dict(compile_network=2, evaluate=2)),
        (diffusion, small, 300, dict(compile_network=3, validate=3, generate=3)),
    ]
    for module, flags, batch, expected in cases:
        torch._dynamo.reset()
        counters.clear()
        with small_run(module, train=1400, test=768) as (monkey, out):
            monkey(torch.nn.Module, "compile", without_a_compiler)
            graphs = counting_graphs(module, monkey, expected)
            flags = [*flags, "--batch-size", batch, "--compile", "on", "--steps", 6]
            run(module, *flags, "--eval-every", 3, "--out", out)
        assert graphs == expected
    torch._dynamo.reset()


def test_sampler_example():
    """What the sampler's network is compiled for is what generate calls it with, for a
    batch that is no multiple of 50 too, and without guidance."""
    for guidance in (0.0, 2.0):
        given = dict(data="shapes", width=8, guidance=guidance, sample_batch=64)
        settings = diffusion.choose_settings(**given)
        net = diffusion.build_network(settings, 100)
        shapes = []
        net.register_forward_pre_hook(
            lambda net, inputs: shapes.append([x.shape for x in inputs])
        )

        options = diffusion.sampling_options(settings, torch.device("cpu"))
        options.update(steps=1, progress=None)
        diffusion.generate(net, torch.zeros(130, dtype=torch.int64), **options)
        example = diffusion.sampler_example(net, settings)
        assert [x.shape for x in example] == shapes[0]


def test_cuda_graphs():
    """The U-Net is compiled into CUDA graphs on CUDA; on a CPU without them, and only if
    asked for."""

    class Net:
        def __init__(self, device):
            self.weight = SimpleNamespace(device=torch.device(device), requires_grad=False)

        def parameters(self):
            yield self.weight

        def compile(self, mode):
            modes.append(mode)

    cases = [
        ("cuda", "auto", ["reduce-overhead"] * 2),  # a trial copy and the network itself
        ("cuda", "off", []),
        ("cpu", "on", ["default"] * 2),
        ("cpu", "auto", []),
    ]
    for device, how, expected in cases:
        modes = []
        diffusion.compile_network(Net(device), how, [], torch.float32)
        assert modes == expected, (device, how)


def test_out_of_memory():
    """Where memory runs out, the run ends in one line that says which flags to change;
    other errors inside torch stay what they are."""

    def too_large(*args, **kwargs):
        torch.empty(2**50)

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    def broken(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        for failure in (too_large, no_room):
            with small_run(module) as (monkey, out):
                monkey(torch.nn.utils, "clip_grad_norm_", failure)
                message = refused(module, *flags, "--out", out)
            assert "--batch-size" in message
            assert "\n" not in message
        with small_run(module) as (monkey, out):
            monkey(torch.nn.utils, "clip_grad_norm_", broken)
            raised(RuntimeError, run, module, *flags, "--out", out)


def operation_table():
    """torch's own table of operations, name -> entry."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    table = {}
    for entry in re.split(r"\n(?=- func: )", path.read_text(encoding="utf-8")):
        name = re.match(r"- func: ([\w.]+)\(", entry)
        if name:
            table[name[1]] = entry
    return table


def runs_on_mps(name, table):
    """Whether an operation has a kernel for Apple's GPUs, or is made of others."""
    entry = table[name]
    delegate = re.search(r"structured_delegate: ([\w.]+)", entry)
    if delegate:
        return runs_on_mps(delegate[1], table)
    _, _, dispatch = entry.partition("dispatch:")
    keys = re.findall(r"\w+(?=[\w, ]*:)", dispatch)
    if not dispatch or "MPS" in keys:
        return True

    # One that makes its result and has it filled is as good as what fills it.
    filling = name.partition(".")[0] + ".out"
    if filling in table and filling != name:
        return runs_on_mps(filling, table)
    return any("Composite" in key for key in keys)


def test_real_gpu():
    """Where there is an NVIDIA GPU, both scripts train on it, compiled, to their end, and
    a finished run is opened again."""
    if not shutil.which("nvidia-smi"):
        raise unittest.SkipTest("no GPU")

    def outcome(script, flags, out):
        command = [sys.executable, script, *flags, "--out", out]
        done = subprocess.run(
            command, cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert " on cpu" not in done.stdout.splitlines()[0]
        assert "without torch.compile" not in done.stdout
        return done.stdout

    for script, flags in [("classifier.py", TINY), ("diffusion.py", SMALL)]:
        flags = [*flags, "--steps", "10", "--eval-every", "5"]
        with tempfile.TemporaryDirectory() as out:
            first = outcome(script, flags, out)
            again = outcome(script, flags, out)
        assert "\n0 of 10 steps" in first
        assert "10/10" in first
        assert "10 of 10 steps" in again


def test_mps_has_kernels():
    """Each operation of a short run of either script, training, measuring, sampling and
    neighbours, has a kernel for Apple's GPUs by torch's own table."""
    table = operation_table()
    assert not runs_on_mps("logspace", table)
    assert not runs_on_mps("_scaled_dot_product_flash_attention_for_cpu", table)
    for module, flags in [(classifier, TINY), (diffusion, SMALL)]:
        names = set()
        with small_run(module) as (_, out):
            with Operations() as seen:
                run(module, *flags, "--steps", 2, "--out", out)
        for operation in seen.names:
            # Attention chooses its kernel by device.
            if "flash_attention_for_cpu" in operation or "profiler" in operation:
                continue
            names.add(operation)
            assert runs_on_mps(operation, table), operation
        assert len(names) > 80


# --------------------------------------------------------------------------------------


def main():
    """Run the tests whose names contain a word of the command line, or all."""
    torch.manual_seed(0)
    tests = {}
    for name, test in globals().items():
        chosen = len(sys.argv) < 2 or any(word in name for word in sys.argv[1:])
        if name.startswith("test_") and chosen:
            tests[name] = test

    failed = 0
    left_out = 0
    began = time.time()
    for name, test in tests.items():
        start = time.time()
        verdict = "ok    "
        try:
            test()
        except unittest.SkipTest as reason:
            verdict = f"left out, {reason}"
            left_out += 1
        except KeyboardInterrupt:
            raise
        except BaseException:  # SystemExit too: a test must not end us
            traceback.print_exc()
            verdict = "FAILED"
            failed += 1
        print(f"{verdict}  {time.time() - start:5.1f} s  {name}", flush=True)

    print(f"in {time.time() - began:.0f} s")
    passed = len(tests) - failed - left_out
    print(f"{passed} passed, {failed} failed, {left_out} left out")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
