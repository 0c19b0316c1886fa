# SPDX-License-Identifier: MIT
"""Tests of both scripts: `python test_smoke.py`, or under pytest. No download, no GPU.

`python test_smoke.py resume shapes` runs only the tests whose names contain one of the words.
"""
import ast
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import classifier

HERE = Path(__file__).parent
SCRIPTS = [name for name in ("classifier.py", "diffusion.py") if (HERE / name).exists()]


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
    """Let the `call`-th call of module.name send this process a signal first."""
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
                 if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))]
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
        body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))
                or getattr(node, "name", None) in names]
        space = {"__name__": "copied"}
        exec(compile(ast.Module(body, []), script, "exec"), space)
        return space[names[-1]]

    assert alone("classifier.py", "depthwise_separable")(3, 8)(torch.zeros(2, 3, 6, 4)).shape == (2, 8, 6, 4)
    assert alone("classifier.py", "Attention")(8)(torch.zeros(2, 5, 8)).shape == (2, 5, 8)
    assert alone("classifier.py", "GatedMLP")(8, 20)(torch.zeros(2, 5, 8)).shape == (2, 5, 8)
    assert alone("classifier.py", "RMSNorm")(8)(torch.ones(2, 8)).shape == (2, 8)
    assert alone("classifier.py", "fourier_positions")(6, 12).shape == (36, 12)
    assert alone("classifier.py", "draw_shapes")(5, 0)[0].shape == (5, 3, 32, 32)
    assert alone("classifier.py", "augment")(torch.zeros(3, 3, 9, 7, dtype=torch.uint8)).shape == (3, 3, 9, 7)


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
    """Every flag and mode in the README's commands is one that the script knows."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python (\w+\.py)([^\n`#|&]*)", readme)
    assert any(script == "classifier.py" for script, _ in commands)
    for script, words in commands:
        assert (HERE / script).exists(), script
        if script == "test_smoke.py":
            continue
        module = sys.modules[script[:-3]]
        known = {name.replace("_", "-") for name in module.Settings.__dataclass_fields__}
        for flag in re.findall(r"--([a-z][a-z-]*)", words):
            assert flag in known, f"README: {script} has no --{flag}"


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
            dict(downsample="strided"), *(dict(layers=n) for n in (0, 1, 2, 3, 5, 6))]


def test_classifier_budget():
    net = classifier.Classifier()
    count = sum(p.numel() for p in net.parameters())
    assert 95_000 < count < 100_000                     # the budget is used well
    assert widest().stem[-1][3].out_channels == 80      # the default is the widest that fits
    assert f"{count:,} parameters" in classifier.__doc__
    table = classifier.parameter_table(net)
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in table.splitlines()}
    assert counts.pop("total") == count == sum(counts.values())
    assert classifier.MAX_PARAMETERS == 100_000 and classifier.MAX_STEPS == 10_000
    try:
        classifier.Classifier(width=88)
    except AssertionError as error:
        over = sum(p.numel() for p in classifier_without_budget(width=88).parameters())
        assert over >= 100_000 and f"{over:,}" in str(error)
    else:
        raise AssertionError("a network over the budget was built")


def widest(**variant):
    """The network that the script builds for a variant when no width is given."""
    settings = classifier.Settings(**variant)
    run = classifier.Run(torch.device("cpu"), *[None] * 6)._replace(data=classifier.Data(*[None] * 8)._replace(names=range(100)))
    return classifier.make_network(settings, run)


def classifier_without_budget(**variant):
    with patched() as monkey:
        monkey(classifier, "MAX_PARAMETERS", 10**9)
        return classifier.Classifier(**variant)


def test_classifier_shapes():
    """All sizes different, so that no two axes can be mixed up unseen."""
    net = classifier.Classifier(classes=7, width=24, layers=2)
    assert net(torch.randn(5, 3, 32, 32)).shape == (5, 7)
    assert net.stem(torch.randn(5, 3, 32, 32)).shape == (5, 24, 8, 8)
    layer = classifier.depthwise_separable(6, 10, 3)
    assert layer(torch.randn(4, 6, 12, 20)).shape == (4, 10, 12, 20)
    assert classifier.depthwise_separable(6, 10, strided=True)(torch.randn(4, 6, 12, 20)).shape == (4, 10, 6, 10)
    assert classifier.EncoderLayer(24)(torch.randn(3, 11, 24)).shape == (3, 11, 24)


def test_variants_step():
    """Each variant builds at the largest width that fits, and a step changes its weights."""
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for variant in VARIANTS:
        net = widest(**variant)
        width = net.stem[-1][3].out_channels
        assert sum(p.numel() for p in net.parameters()) < 100_000
        wider = classifier_without_budget(**variant, width=width + 8)
        assert sum(p.numel() for p in wider.parameters()) >= 100_000, (variant, width)
        optimiser = classifier.make_optimiser(net, 0.1)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2
        before = [p.detach().clone() for p in net.parameters()]
        assert torch.isfinite(classifier.training_step(net, optimiser, x, y, 0.1, 1.0, False))
        still = [name for (name, p), old in zip(net.named_parameters(), before) if torch.equal(p, old)]
        assert not still, (variant, still)


def test_tying_is_real():
    """Four applications and one set of weights, whose gradient is the sum over the applications."""
    net = classifier.Classifier(width=16).eval()
    assert len(net.encoder) == 1
    calls = []
    net.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    net(x).square().sum().backward()
    assert len(calls) == 4
    untied = classifier_without_budget(width=16, weights="untied").eval()
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
    heads = []
    for q, k, v in zip(*(part.chunk(2, -1) for part in attention.qkv(x).chunk(3, -1))):
        heads.append(None)
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
        found = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)
                 if torch.equal(padded[:, top:top + 32, left:left + 32].flip(-1) if flip else
                                padded[:, top:top + 32, left:left + 32], result)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20 and {flip for _, _, flip in seen} == {False, True}


def test_randaugment_draws():
    """At least 16 draws for 1,024 pictures."""
    from torchvision.transforms import v2
    with patched() as monkey:
        calls = []
        monkey(v2.RandAugment, "forward", lambda self, x: (calls.append(len(x)), x)[1])
        classifier.augment(torch.zeros(1024, 3, 32, 32, dtype=torch.uint8))
    assert len(calls) >= 16 and sum(calls) == 1024


def test_normalise():
    x, _, _ = classifier.draw_shapes(500, seed=0)
    statistics = classifier.channel_statistics(x)
    z = classifier.normalise(x, **statistics)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert z.is_contiguous(memory_format=torch.channels_last)
    try:
        classifier.normalise(z, **statistics)
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
    pictures = {x.numpy().tobytes() for x in whole.train_x}
    kept, held = ({x.numpy().tobytes() for x in part} for part in (data.train_x, data.val_x))
    assert kept | held == pictures and not kept & held
    assert torch.equal(data.test_x, whole.test_x) and torch.equal(whole.val_x, whole.test_x)


def test_cifar_folder():
    """The real loader on files in CIFAR-100's format, and on damaged and missing ones."""
    import pickle
    cifar = torchvision.datasets.CIFAR100
    with tempfile.TemporaryDirectory() as root, patched() as monkey:
        folder = Path(root) / cifar.base_folder
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        content = dict(train={"data": pixels, "fine_labels": [i % 5 for i in range(20)]},
                       test={"data": pixels[:10], "fine_labels": [i % 5 for i in range(10)]},
                       meta={"fine_label_names": list("abcde")})
        for name, value in content.items():
            (folder / name).write_bytes(pickle.dumps(value))
        # Our small files have their own sums, so these must be refused ...
        message = refused(classifier, "--data", root, "--out", Path(root) / "out")
        assert "damaged" in message and root in message and cifar.tgz_md5 in message
        # ... and accepted once their sums are those expected.
        md5 = torchvision.datasets.utils.calculate_md5
        monkey(cifar, "train_list", [["train", md5(folder / "train")]])
        monkey(cifar, "test_list", [["test", md5(folder / "test")]])
        monkey(cifar, "meta", dict(cifar.meta, md5=md5(folder / "meta")))
        x, y, test_x, test_y, names = classifier.load_cifar(root)
        assert x.shape == (20, 3, 32, 32) and test_x.shape == (10, 3, 32, 32) and names == list("abcde")
        assert np.array_equal(x.numpy().reshape(20, -1), pixels) and y.tolist() == content["train"]["fine_labels"]
        # Cut short: refused and left as it is. Gone: a download, which fails with instructions.
        whole = (folder / "test").read_bytes()
        (folder / "test").write_bytes(whole[:100])
        assert "damaged" in refused(classifier, "--data", root, "--out", Path(root) / "out")
        assert (folder / "test").read_bytes() == whole[:100]
        shutil.rmtree(folder)
        def no_net(*args, **kwargs):
            raise OSError("no route to host")
        monkey(cifar, "download", no_net)
        message = refused(classifier, "--data", root, "--out", Path(root) / "out")
        for part in ("no route to host", cifar.url, "169,001,437", cifar.tgz_md5, root, "--data shapes"):
            assert part in message, part


# ------------------------------------------------------------------------------------------------
# classifier.py: training and evaluation
# ------------------------------------------------------------------------------------------------

def test_schedule():
    """OneCycle as train() uses it: rises to the peak at 30 %, ends near 0, and every step has a rate."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        rates, step = [], classifier.training_step
        def noting(net, optimiser, *rest):
            rates.append(optimiser.param_groups[0]["lr"])
            return step(net, optimiser, *rest)
        monkey(classifier, "training_step", noting)
        run(classifier, *TINY, "--steps", 40, "--max-lr", 0.01, "--out", out)
    assert len(rates) == 40
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
    torch.manual_seed(0)
    net, x, y = classifier.Classifier(width=8), torch.randn(6, 3, 32, 32), torch.arange(6)
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    logits = net.train()(x)
    target = F.one_hot(y, 100) * 0.8 + 0.2 / 100
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    loss = classifier.training_step(net, optimiser, x, y, 0.2, 0.01, False)
    torch.testing.assert_close(loss, expected.detach())
    moved = torch.cat([(p - old).flatten() for p, old in zip(net.parameters(), before)]).norm()
    assert 0.0099 < moved <= 0.0101                      # SGD with rate 1 moves by the clipped gradient


def test_evaluate_is_exact():
    """Against a plain count; and top-5, the spread over batches, the mode."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8)
    y = torch.randint(0, 9, (600,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 9))
    prepare = lambda x: x.float() / 255
    with torch.no_grad():
        logits = net(prepare(x))
    got = classifier.evaluate(net, x, y, prepare)._asdict()
    hit = (logits.argmax(1) == y).float()
    assert abs(got["acc"] - hit.double().mean().item()) < 1e-9 and got["count"] == 600
    assert abs(got["loss"] - F.cross_entropy(logits, y).item()) < 1e-5
    assert abs(got["top5"] - (logits.topk(5).indices == y[:, None]).any(1).float().mean().item()) < 1e-6
    assert got["batch"] == 600 and got["spread"] == 0
    half = classifier.evaluate(net, x.repeat(3, 1, 1, 1)[:1400], y.repeat(3)[:1400], prepare)
    assert half.batch == 700
    smooth = classifier.evaluate(net, x, y, prepare, label_smoothing=0.2)
    assert abs(smooth.loss - F.cross_entropy(logits, y, label_smoothing=0.2).item()) < 1e-5


def test_resume_is_bit_identical():
    """Stopped in mid-epoch by Ctrl-C, resumed past the epoch's end, RandAugment on: the same bits."""
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(classifier, monkey)                 # 600 pictures, 6 batches an epoch
        flags = [*TINY, "--steps", 23]
        run(classifier, *flags, "--out", f"{root}/whole")
        with patched() as inner:
            stop_at(classifier, inner, "training_step", 9)             # in the second epoch
            try:
                run(classifier, *flags, "--out", f"{root}/parts")
            except SystemExit as stop:
                assert stop.code == 128 + signal.SIGINT
            else:
                raise AssertionError("Ctrl-C did not stop the run")
        state = torch.load(f"{root}/parts/checkpoint.pt", weights_only=True)
        assert state["progress"][0] == 9
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        _, text = run(classifier, *flags, "--out", f"{root}/parts")
        assert "9 of 23 steps" in text
        a, b = (torch.load(f"{root}/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
        for key in ("net", "optimiser", "schedule", "random"):
            assert same(a[key], b[key]), key
        assert same(a["progress"][4:], b["progress"][4:])              # data order, average loss
        # Finished: started again, it only says its result, and trains nothing.
        monkey(classifier, "training_step", None)
        first, second = (run(classifier, *flags, "--out", f"{root}/{name}")[0] for name in ("whole", "parts"))
        assert first == second == run(classifier, "eval", "--data", "shapes", "--out", f"{root}/whole")[0]
        other = refused(classifier, *flags, "--seed", 5, "--out", f"{root}/whole")
        assert "seed is 0, not 5" in other


def test_killed_process_resumes():
    """SIGKILL in a real process: the checkpoint is whole, and the run goes on to the end."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*TINY[:-1], "5", "--steps", "60", "--out", out]
        code = ("import sys, classifier as c; draw = c.draw_shapes; "
                "c.draw_shapes = lambda count, seed: draw(count // 20, seed); c.main(sys.argv[1:])")
        process = subprocess.Popen([sys.executable, "-c", code, *flags], cwd=HERE, stdout=subprocess.DEVNULL)
        path = Path(out) / "checkpoint.pt"
        until = time.time() + 60
        while not path.exists() and time.time() < until:
            time.sleep(0.02)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        step = torch.load(path, weights_only=True)["progress"][0]
        assert 0 < step < 60
        with patched() as monkey:
            small_shapes(classifier, monkey, train=1000, test=100)
            _, text = run(classifier, *flags)
        assert f"{step} of 60 steps" in text
        assert torch.load(path, weights_only=True)["progress"][0] == 60


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
    """Where torch.compile fails, one line says so and the run goes on."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        def broken(self, *args, **kwargs):
            raise RuntimeError("no compiler")
        monkey(torch.nn.Module, "compile", broken)
        _, text = run(classifier, *TINY, "--steps", 3, "--compile", "on", "--out", out)
        assert "torch.compile doesn't work here (RuntimeError)" in text


def test_not_finite_stops():
    """A loss that is not finite stops the run with advice and keeps the last good checkpoint."""
    with patched() as monkey, tempfile.TemporaryDirectory() as out:
        small_shapes(classifier, monkey)
        step, calls = classifier.training_step, []
        def breaking(net, *rest):
            calls.append(1)
            if len(calls) == 13:
                with torch.no_grad():
                    net.head[0].weight.fill_(float("nan"))
            return step(net, *rest)
        monkey(classifier, "training_step", breaking)
        flags = [*TINY[:-1], "10", "--steps", 40, "--out", out]
        try:
            run(classifier, *flags)
        except SystemExit as stop:
            assert "not finite" in stop.code and "--max-lr" in stop.code
        else:
            raise AssertionError("the run went on with nan")
        state = torch.load(f"{out}/checkpoint.pt", weights_only=True)
        assert state["progress"][0] == 10 and torch.isfinite(state["net"]["head.0.weight"]).all()


def test_bad_input():
    """One clear line each, a non-zero exit, nothing overwritten."""
    with patched() as monkey, tempfile.TemporaryDirectory() as root:
        small_shapes(classifier, monkey)
        out = f"{root}/run"
        for flags, words in [
                (["--steps", 10_001], "--steps 10001 is not within 1 to 10000"), (["--steps", 0], "--steps 0"),
                (["--steps", -3], "--steps -3"), (["--steps", "many"], "--steps"),
                (["--max-lr", "nan"], "--max-lr nan"), (["--batch-size", 601], "--batch-size > 600"),
                (["--layers", 7], "--layers 7"), (["--block", "bert"], "bert"), (["--no-such"], "no-such"),
                (["--step=5"], "--step=5"), (["--width", 88], "parameters, not under 100,000"),
                (["--width", 20], "multiple of 8"), (["--holdout", 150], "150"), (["dance"], "dance"),
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
        for content in (b"", good[:len(good) // 2], b"hello", stranger.getvalue(), other.getvalue()):
            path.write_bytes(content)
            for mode in ([], ["eval"]):
                message = refused(classifier, *mode, *TINY, "--steps", 2, "--out", out)
                assert "can't use" in message and "\n" not in message, message
            assert path.read_bytes() == content
        assert "can't use" in refused(classifier, "eval", "--data", "shapes", "--out", f"{root}/none")


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
