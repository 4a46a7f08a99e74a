"""A chunk's backward, whole and split, under every memory choice.

Gradients are compared with plain autograd over the same layers, and which of
them come with the weight gradient is checked.
"""

import contextlib
import copy
import threading
import unittest
import weakref
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from pipeweaver.job import SubMicrobatch
from pipeweaver.torch import ExtraRng, StageContext, chunk
from pipeweaver.torch.chunk import ChunkRunner, LayerTracer

MODES = ("keep", "selective", "full", "offload")
WIDTH = 6


class Scale(nn.Module):
    """An elementwise weight and bias, as of hand-written norms."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.shift = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x, *, power=1):
        y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return {"y": y * self.scale ** power + self.shift, "x": x}


class Convolutions(nn.Module):
    """Over tokens, over tokens x width, and over a volume of one channel."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.two = nn.Conv2d(1, 2, 3, padding=1)
        self.three = nn.Conv3d(2, 1, 3, padding=1)
        self.norm = nn.GroupNorm(2, WIDTH)

    def forward(self, state, context):
        x = state[0]
        y = self.norm(self.one(x.t()[None]))[0].t()
        z = self.two(y[None, None])
        return (x + self.three(z[:, :, None])[0, 0, 0],)


class Norms(nn.Module):
    """Norms, elementwise weights, an attention with its projections."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = Scale()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, state, context):
        x = self.scale(self.norm(state[0]), power=2)["y"]
        x = context.selective(lambda t: F.gelu(t) * t.tanh(), x)
        y, _ = self.attention(x[:, None], x[:, None], x[:, None])
        return (state[0] + y[:, 0],)


class Tied(nn.Module):
    """An embedding, its weight used once more by name, a frozen part, a weight
    of the layer's own, a loss, an activation changed in place, dropout."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.up = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(inplace=True))
        self.down = nn.Linear(9, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, context):
        x = state[0] + self.table(torch.arange(len(state[0])) % 5)
        x = self.frozen(x) + self.down(self.up(x)) * self.gain
        x = F.dropout(x, 0.3)
        logits = context.selective(F.linear, x, self.table.weight)
        context.add_loss(logits.logsumexp(-1).sum())
        return (x, *state[1:])


class FirstLayer(nn.Module):
    """Its modules' inputs want no gradient."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, state, context):
        return (self.table(context.data),)


class Around(nn.Module):
    """A module with weights between a linear and an elementwise use of all that it
    returns; scalars are losses."""

    def __init__(self, module):
        super().__init__()
        self.linear, self.module = nn.Linear(WIDTH, WIDTH), module

    def forward(self, state, context):
        found = self.module(self.linear(state[0]))
        values = found.values() if isinstance(found, dict) else found
        y = state[0]
        for t in values:
            if t.dim() == 0:
                context.add_loss(t)
            else:
                y = y + t.sin()
        return (y,)


class FusedNorm(nn.Module):
    """Hands on the sum that it has normalised."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        r = x + x.cos()
        return (r * torch.rsqrt(r.square().mean(-1, keepdim=True) + 1e-6) *
                self.scale, r)


class Twice(nn.Linear):
    """Hands on what its second output is made of."""

    def forward(self, x):
        h = super().forward(x)
        return h, h.sin()


class Activated(nn.Linear):
    """An output that its own operation saves, among other things than tensors."""

    def forward(self, x):
        return {"y": super().forward(x).relu()}


class SavedOutput(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight):
        y = (x * weight).exp()
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, y = ctx.saved_tensors
        return gradient * y * weight, (gradient * y * x).sum(0)


class OwnFunction(nn.Module):

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return (SavedOutput.apply(x, self.weight),)


class Router(nn.Linear):
    """Of a mixture of experts: logits, and a loss that keeps them small."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.logsumexp(-1).square().mean()


class Force(nn.Module):
    """Adds the gradient of an energy, which is differentiated once more."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, context):
        with torch.enable_grad():
            at = torch.ones(8, WIDTH, requires_grad=True)
            energy = self.energy(at).sin().sum()
            force, = torch.autograd.grad(energy, at, create_graph=True)
        return (state[0] + force,)


def context_of(data=None):
    return StageContext(SubMicrobatch(0, 0, 0, (0,), (8,)), 0, 0, (),
                        lambda: data, False)


class Taken(list):
    """Weights and their gradients as they were handed over."""

    def __call__(self, weight, gradient):
        self.append((weight, gradient))


def backward(runner, tape, gradients, split):
    """Gradients of the inputs, and what was taken of weights' ones."""
    taken = Taken()
    return runner.backward(tape, gradients, 1.0,
                           None if split else taken), taken


def run_chunk(layers, mode, split, x=None, data=None):
    """Output, losses, gradients of x and of the weights by name, and the names
    of those that came with the weight gradient."""
    names = {}  # a shared weight goes by its first name
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters(prefix=str(i)):
            names.setdefault(p, name)
    runner = ChunkRunner(layers, torch.device("cpu"))
    torch.manual_seed(5)
    state = () if x is None else (x,)
    out, tape, losses = runner.forward(state, [True] * len(state),
                                       context_of(data), [mode] * len(layers),
                                       True, split)
    if mode == "offload":
        runner.offload(tape)
        held = [s for r in tape.records for s in r.slots]
        assert held and all(s.tensor is None for s in held)
        runner.reload(tape)
        runner.wait_copies(tape)
    found, taken = backward(runner, tape, [torch.cos(out[0])], split)
    early = {names[p] for p, _ in [*tape.gradients, *taken]}
    gradients = {}
    runner.weight_gradients(tape, taken)
    for p, g in taken:
        gradients[names[p]] = gradients.get(names[p], 0) + g
    return [out[0], *losses, *found], gradients, set(gradients) - early


class Recorder(LayerTracer):
    """Names of the passes told, each ended before the next."""

    def __init__(self):
        self.passes, self.open = [], False

    def begin(self, layer, what, context):
        assert not self.open
        self.passes.append(what)
        self.open = True

    def end(self):
        assert self.open
        self.open = False


def run_plain(layers, x=None, data=None):
    torch.manual_seed(5)
    leaf = None if x is None else x.clone().requires_grad_()
    state, losses = () if x is None else (leaf,), []
    for layer in layers:
        context = context_of(data)
        state = layer(state, context)
        losses += context._losses
    torch.autograd.backward([state[0], *losses],
                            [torch.cos(state[0].detach()),
                             *(torch.ones_like(a) for a in losses)])
    gradients = {}
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters(prefix=str(i)):
            if p.grad is not None:
                gradients[name] = p.grad
                p.grad = None
    return [state[0].detach(), *(a.detach() for a in losses),
            *([] if leaf is None else [leaf.grad])], gradients


class TracerTest(unittest.TestCase):

    def test_a_pass_that_recomputes_is_no_backward(self):
        for mode in MODES:
            for split in (False, True):
                tracer = Recorder()
                runner = ChunkRunner([Norms()], torch.device("cpu"),
                                     tracer=tracer)
                x = torch.rand(8, WIDTH)
                out, tape, _ = runner.forward((x,), [True], context_of(),
                                              [mode], True, split)
                backward(runner, tape, [out[0]], split)
                told = ["input_grad" if split else "backward"]
                self.assertEqual(
                    tracer.passes,
                    ["forward"] + (told if mode in ("keep", "offload") else []))


    def test_a_pass_is_one_threads_and_holds_no_seeds(self):
        tracer = Recorder()
        ran, seeded = [], []
        full_like = torch.full_like

        def seed(*args):
            seeded.append(tracer.open)
            return full_like(*args)

        class Watch(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                # Where torch cannot say, autograd has no such threads on a CPU.
                threads = getattr(torch._C, "_is_multithreading_enabled",
                                  lambda: False)()
                ran.append((tracer.open, threading.get_ident(), threads))
                return gradient

        class Watched(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(WIDTH))

            def forward(self, x):
                return x * Watch.apply(self.w)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.watched = Watched()

            def forward(self, state, context):
                x = self.watched(Watch.apply(state[0]))
                context.add_loss(x.sum())
                return (x,)

        for split in (False, True):
            runner = ChunkRunner([Layer()], torch.device("cpu"), tracer=tracer)
            _, tape, _ = runner.forward((torch.rand(8, WIDTH),), [True],
                                        context_of(), ["keep"], True, split)
            with mock.patch("torch.full_like", seed):
                _, taken = backward(runner, tape, [None], split)
            runner.weight_gradients(tape, taken)
            self.assertEqual(len(taken), 1)
        self.assertEqual(tracer.passes, ["forward", "backward", "forward",
                                         "input_grad", "weight_grad"])
        self.assertEqual(seeded, [False] * 2)
        # Of the input and the weight; a split backward runs them apart.
        self.assertEqual(ran, [(True, threading.get_ident(), False)] * 4)

    @unittest.skipIf(hasattr(torch.autograd, "set_multithreading_enabled"),
                     "this torch's autograd runs in the calling thread on demand")
    def test_what_a_devices_thread_runs_is_not_told(self):
        tracer = Recorder()
        runner = ChunkRunner([Norms()], torch.device("cuda"), tracer=tracer)
        out, tape, _ = runner.forward((torch.rand(8, WIDTH),), [True],
                                      context_of(), ["keep"], True, False)
        backward(runner, tape, [out[0]], False)
        self.assertEqual(tracer.passes, ["forward"])


class HandOverTest(unittest.TestCase):

    def test_a_layers_gradients_are_gone_before_the_next_ones_are_made(self):
        layers = [Norms() for _ in range(4)]
        grad = torch.autograd.grad
        for split in (False, True):
            tracer = Recorder()
            runner = ChunkRunner(layers, torch.device("cpu"), tracer=tracer)
            out, tape, _ = runner.forward((torch.rand(8, WIDTH),), [True],
                                          context_of(), ["keep"] * 4, True, split)
            taken, alive = [], []

            def take(weight, gradient):
                taken.append(len(tracer.passes))
                alive.append(weakref.ref(gradient))

            def made(*args, **kwargs):
                self.assertEqual([g for g in alive if g() is not None], [])
                return grad(*args, **kwargs)

            with mock.patch("torch.autograd.grad", made):
                runner.backward(tape, [out[0]], 1.0, None if split else take)
                runner.weight_gradients(tape, take)
            self.assertEqual(len(taken), len(runner.parameters))
            # Behind all forwards; of a split pair behind all input gradients, of
            # which some weights have theirs already.
            self.assertEqual(sorted(set(taken)), [8, 9, 10, 11, 12] if split
                             else [5, 6, 7, 8])


class SplitTest(unittest.TestCase):

    def check(self, layers, x=None, data=None):
        """Equal under all choices; the weights left to the weight gradient."""
        layers = [layer.double() for layer in layers]
        expected, gradients = run_plain(layers, x, data)
        deferred = {}
        for mode in MODES:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    values, mine, late = run_chunk(layers, mode, split, x, data)
                    self.assertEqual(set(mine), set(gradients))
                    for a, b in [*zip(values, expected),
                                 *((mine[n], gradients[n]) for n in mine)]:
                        self.assertLessEqual(float((a - b).abs().max()),
                                             1e-9 * float(b.abs().max()) + 1e-30)
                    if not split:
                        self.assertEqual(late, set())
                    deferred[mode] = late
        return deferred["keep"], set(gradients)

    def x(self):
        return torch.linspace(-1, 1, 8 * WIDTH, dtype=torch.float64).view(
            8, WIDTH)

    def test_convolutions_come_with_the_weight_gradient(self):
        torch.manual_seed(1)
        late, all_weights = self.check([Convolutions(), Convolutions()], self.x())
        self.assertEqual(len(all_weights), 16)
        self.assertEqual(late, all_weights)

    def test_norms_and_elementwise_weights_come_with_it(self):
        torch.manual_seed(1)
        late, all_weights = self.check([Norms(), Norms()], self.x())
        # An attention that uses its parts' weights by name is not cut out.
        self.assertEqual(late, {n for n in all_weights if "attention" not in n})

    def test_weights_used_by_name_come_whole(self):
        torch.manual_seed(1)
        late, all_weights = self.check([Tied(), Tied()], self.x())
        self.assertEqual({n for n in all_weights if n.startswith("0.")} - late,
                         {"0.gain", "0.table.weight"})

    def test_a_module_whose_graph_saves_its_outputs(self):
        for kind in (FusedNorm, Twice, Activated, OwnFunction):
            with self.subTest(kind=kind.__name__):
                torch.manual_seed(1)
                arguments = ((WIDTH, WIDTH) if issubclass(kind, nn.Linear)
                             else ())
                late, all_weights = self.check(
                    [Around(kind(*arguments)) for _ in range(2)], self.x())
                self.assertEqual(late, all_weights)

    def test_a_module_that_returns_a_scalar(self):
        torch.manual_seed(1)
        late, all_weights = self.check(
            [Around(Router(WIDTH, WIDTH)) for _ in range(2)], self.x())
        self.assertEqual(late, all_weights)

    def test_a_module_shared_by_layers(self):
        torch.manual_seed(1)
        layer = Norms()
        self.check([layer, Convolutions(), layer], self.x())

    def test_a_first_layer(self):
        torch.manual_seed(1)
        late, _ = self.check([FirstLayer()], data=torch.arange(8) % 7)
        self.assertEqual(late, {"0.table.weight"})

    @unittest.skipUnless(hasattr(nn, "RMSNorm"), "this torch has no RMSNorm")
    def test_rms_norm(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.RMSNorm(WIDTH)

            def forward(self, state, context):
                return (self.norm(state[0]),)

        late, all_weights = self.check([Layer()], self.x())
        self.assertEqual(late, all_weights)

    def test_modules_are_left_as_they_were(self):
        layer = Norms().double()
        run_chunk([layer], "keep", True, self.x())
        for module in layer.modules():
            self.assertNotIn("forward", vars(module))

    def test_what_the_weight_gradient_does_not_read_is_freed(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

            def forward(self, state, context):
                return (self.b(self.a(state[0]).sin().exp()),)

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor

        saved = weakref.WeakSet()

        def pack(tensor):
            saved.add(found := Saved(tensor))
            return found

        layer = Layer().double()
        weights = {p.data_ptr() for p in layer.parameters()}

        def sizes():
            return sorted(x.tensor.shape[-1] for x in saved
                          if x.tensor.data_ptr() not in weights)

        runner = ChunkRunner([layer], torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(
                pack, lambda x: x.tensor):
            out, tape, _ = runner.forward((self.x(),), [True], context_of(),
                                          ["keep"], True, True)
        # Inputs of the layers; what sine and exponential read.
        self.assertEqual(sizes(), [WIDTH, 9, 9, 9])
        _, taken = backward(runner, tape, [torch.ones_like(out[0])], True)
        self.assertEqual(sizes(), [WIDTH, 9])
        for _, calls in tape.calls:
            for call in calls:
                self.assertTrue(all(t.stride() == (0, 0) for t in call.outputs))
        runner.weight_gradients(tape, taken)
        self.assertEqual(len(taken), 4)
        self.assertEqual(sizes(), [])


class Stream:
    """A copy stream whose copies are over at once."""

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self):
        return object()


@contextlib.contextmanager
def streams_on_the_cpu():
    """What a copy stream needs; yields the tensors that went to the host."""
    hosted = []

    def pinned_like(tensor):
        hosted.append(torch.empty_like(tensor))
        return hosted[-1]

    with mock.patch("torch.cuda.current_stream", lambda device: Stream()), \
            mock.patch("torch.cuda.stream", contextlib.nullcontext), \
            mock.patch("torch.Tensor.record_stream", lambda t, stream: None), \
            mock.patch.object(chunk, "_pinned_like", pinned_like):
        yield hosted


class OffloadTest(unittest.TestCase):

    def gradients(self, layer, mode, copy_stream):
        """And how many values went to the host."""
        runner = ChunkRunner([layer], torch.device("cpu"), copy_stream)
        x = torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)
        with streams_on_the_cpu() as hosted:
            out, tape, _ = runner.forward((x,), [True], context_of(), [mode],
                                          True, False)
            if mode == "offload":
                runner.offload(tape)
                runner.wait_copies(tape)
                self.assertTrue(all(s.tensor is None for r in tape.records
                                    for s in r.slots))
                runner.reload(tape)
                runner.wait_copies(tape)
            found, taken = backward(runner, tape, [torch.cos(out[0])], False)
        sizes = sum(t.numel() for t in hosted)
        return [*found, *(g for _, g in taken)], sizes

    def test_views_are_copied_as_what_they_show(self):
        class Rotated(nn.Module):
            """Saves an expanded tensor of a row, and a tensor of all."""
            copied = WIDTH + 8 * WIDTH

            def __init__(self):
                super().__init__()
                self.q = nn.Linear(WIDTH, WIDTH)

            def forward(self, state, context):
                x = self.q(state[0])
                turn = torch.arange(float(WIDTH)).cos()[None].expand_as(x)
                return (x * turn + x.exp(),)

        class Masked(nn.Module):
            """Saves a mask of a column."""
            copied = 8

            def __init__(self):
                super().__init__()
                self.q = nn.Linear(WIDTH, WIDTH)

            def forward(self, state, context):
                x = self.q(state[0])
                keep = (torch.arange(8) % 3 > 0)[:, None].expand_as(x)
                return (torch.where(keep, x, x.new_zeros(())),)

        class Joint(nn.Module):
            """Saves slices of a joint projection; one of them is transposed."""
            copied = 2 * 8 * WIDTH

            def __init__(self):
                super().__init__()
                self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

            def forward(self, state, context):
                q, _, v = self.qkv(state[0]).chunk(3, -1)
                return ((q.t() @ v)[:1].expand(8, WIDTH),)

        class Spectrum(nn.Module):
            """Saves a complex tensor and its conjugate, a view."""
            copied = 2 * 8 * WIDTH // 2

            def __init__(self):
                super().__init__()
                self.q = nn.Linear(WIDTH, WIDTH)

            def forward(self, state, context):
                z = torch.view_as_complex(self.q(state[0]).view(8, -1, 2))
                return ((z * z.conj()).real.repeat(1, 2),)

        for kind in (Rotated, Masked, Joint, Spectrum):
            with self.subTest(kind=kind.__name__):
                layer = kind()
                expected, _ = self.gradients(layer, "keep", None)
                for stream in (None, Stream()):
                    found, copied = self.gradients(layer, "offload", stream)
                    for a, b in zip(found, expected):
                        self.assertTrue(torch.equal(a, b))
                    if stream is not None:
                        self.assertEqual(copied, kind.copied)


class AutocastTest(unittest.TestCase):
    """Weights' gradients under one autocast around all passes."""

    def layer(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

            def forward(self, state, context):
                x = context.selective(lambda t: self.b(self.a(t).tanh()),
                                      state[0])
                context.add_loss(x.float().square().sum())
                return (x.float(),)

        torch.manual_seed(1)
        return Layer()

    def gradients(self, layer, modes, split):
        """Of one stage after the other, all forwards before the backwards."""
        runner = ChunkRunner([layer], torch.device("cpu"))
        x = torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)
        found = {}
        with torch.autocast("cpu", torch.bfloat16):
            tapes = [runner.forward((x + i,), [False], context_of(), [mode],
                                    True, split)[1]
                     for i, mode in enumerate(modes)]
            for tape in tapes:
                _, taken = backward(runner, tape, [None], split)
                runner.weight_gradients(tape, taken)
                for p, g in taken:
                    found[p] = found.get(p, 0) + g
        return [found[p] for p in layer.parameters()]

    def test_gradients_are_the_plain_models(self):
        for modes in (*((mode, mode) for mode in MODES[:3]), ("full", "keep"),
                      ("keep", "full"), ("full", "selective")):
            for split in (False, True):
                with self.subTest(modes=modes, split=split):
                    layer = self.layer()
                    mine = self.gradients(layer, modes, split)
                    x = torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)
                    contexts = [context_of() for _ in modes]
                    with torch.autocast("cpu", torch.bfloat16):
                        for i, context in enumerate(contexts):
                            layer((x + i,), context)
                    sum(loss for c in contexts for loss in c._losses).backward()
                    for g, p in zip(mine, layer.parameters()):
                        self.assertLessEqual(float((g - p.grad).abs().max()),
                                             1e-2 * float(p.grad.abs().max()))

    def test_a_pass_without_gradients_leaves_no_cast(self):
        layer = self.layer()
        runner = ChunkRunner([layer], torch.device("cpu"))
        x = torch.rand(8, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            runner.forward((x,), [False], context_of(), ["keep"], False, False)
            self.assertTrue(layer.a(x).requires_grad)
            self.assertTrue(torch.is_autocast_cache_enabled())


class Tracker:
    """Random states as Megatron's tracker has them."""

    def __init__(self):
        self.states = {"model": torch.Generator().manual_seed(1).get_state()}

    @contextlib.contextmanager
    def fork(self):
        default = torch.get_rng_state()
        torch.set_rng_state(self.states["model"])
        yield
        self.states["model"] = torch.get_rng_state()
        torch.set_rng_state(default)

    def rng(self):
        return ExtraRng(
            lambda: dict(self.states),
            lambda states: setattr(self, "states", dict(states)))


class ExtraRngTest(unittest.TestCase):

    def test_recompute_draws_what_the_forward_drew(self):
        class Layer(nn.Module):
            def __init__(self, tracker):
                super().__init__()
                self.linear = nn.Linear(WIDTH, WIDTH)
                self.tracker = tracker

            def drop(self, x):
                with self.tracker.fork():
                    return F.dropout(x, 0.5)

            def forward(self, state, context):
                x = self.drop(self.linear(state[0]))
                return (context.selective(
                    lambda t: self.drop(t.exp()) + F.dropout(t, 0.5), x),)

        def run(mode, split):
            """Of two stages, gradients and the states they leave."""
            torch.manual_seed(1)
            tracker = Tracker()
            layers = [Layer(tracker), Layer(tracker)]
            runner = ChunkRunner(layers, torch.device("cpu"),
                                 extra_rng=tracker.rng())
            made = [runner.forward((torch.rand(8, WIDTH),), [True],
                                   context_of(), [mode] * 2, True, split)
                    for _ in range(2)]
            found = []
            for out, tape, _ in made:
                inputs, taken = backward(runner, tape, [out[0]], split)
                runner.weight_gradients(tape, taken)
                found += inputs
                gradients = dict(taken)
                found += [gradients[p] for p in runner.parameters]
            return found + [tracker.states["model"], torch.get_rng_state()]

        expected = run("keep", False)
        for mode in MODES:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    for a, b in zip(run(mode, split), expected):
                        self.assertTrue(torch.allclose(a, b))


class BuffersTest(unittest.TestCase):
    """Recompute finds buffers as the forward did, and changes none once more."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
            self.up = nn.utils.parametrizations.spectral_norm(
                nn.Linear(WIDTH, WIDTH))
            self.norm = nn.BatchNorm1d(WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.register_buffer("table", torch.ones(WIDTH))

        def centred(self, x):
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            return x - self.mean.clone()

        def part(self, x):
            return self.norm(self.up(self.centred(x))) * self.table

        def forward(self, state, context):
            x = context.selective(self.part, self.linear(state[0]).sin())
            return (state[0] + x.tanh() * context.selective(self.centred, x),)

    def step(self, layers, run):
        """Of two stages whose forwards come before the backwards. Gradients of the
        weights, and the buffers behind it."""
        for layer in layers:
            layer.zero_grad(set_to_none=True)
        run([torch.linspace(-1, i, 8 * WIDTH, dtype=torch.float64).view(8, WIDTH)
             for i in (1, 2)])
        return [t for layer in layers for t in (
            *(p.grad for p in layer.parameters()), *layer.buffers())]

    def check(self, mode, split):
        torch.manual_seed(1)
        plain = [self.Layer().double() for _ in range(2)]
        layers = [copy.deepcopy(layer) for layer in plain]
        runner = ChunkRunner(layers, torch.device("cpu"))

        def take(weight, gradient):
            weight.grad = gradient + (0 if weight.grad is None else weight.grad)

        def run_all(inputs):
            outputs = [plain[1](plain[0]((x,), context_of()), context_of())[0]
                       for x in inputs]
            sum(y.cos().sum() for y in outputs).backward()

        def run_chunks(inputs):
            made = [runner.forward((x,), [True], context_of(), [mode] * 2, True,
                                   split) for x in inputs]
            for out, tape, _ in made:
                runner.backward(tape, [-out[0].sin()], 1.0, None if split else take)
                runner.weight_gradients(tape, take)

        for training in (True, True, False, True):
            for layer in plain + layers:
                layer.norm.train(training)
            for a, b in zip(self.step(layers, run_chunks),
                            self.step(plain, run_all)):
                self.assertLessEqual(float((a - b).abs().max()),
                                     1e-9 * float(b.abs().max()) + 1e-30)

    def test_are_the_plain_models(self):
        for mode in MODES[:3]:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    self.check(mode, split)

    def test_are_held_only_where_the_forward_changes_them(self):
        layer = self.Layer()
        runner = ChunkRunner([layer], torch.device("cpu"))
        for mode in ("full", "selective"):
            for training in (True, True, False):
                layer.norm.train(training)
                copied = []
                with mock.patch.object(
                        chunk._Buffers, "copies", autospec=True,
                        side_effect=lambda buffers, made=chunk._Buffers.copies:
                        copied.append(made(buffers)) or copied[-1]):
                    runner.forward((torch.rand(8, WIDTH),), [True], context_of(),
                                   [mode], True, False)
                self.assertTrue(copied)
                changed = {"weight_u", "weight_v", "_u", "_v", "mean"}
                if training:
                    changed |= {"running_mean", "running_var",
                                "num_batches_tracked"}
                for copies in copied:
                    self.assertEqual({name for _, name in copies}, changed)


class ReplacedBuffersTest(unittest.TestCase):
    """Buffers that a forward does not change in place are the layer's business."""

    class Growing(nn.Module):
        """Like a rotary embedding whose table grows with the length."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.length = 4
            self.register_buffer("table", torch.ones(4, 1))
            self.register_buffer("sparse", torch.eye(WIDTH).to_sparse())
            self.register_buffer("absent", torch.empty(2, device="meta"))
            self.register_buffer("dropped", torch.ones(1))

        def forward(self, state, context):
            if hasattr(self, "dropped"):
                del self.dropped
            if len(state[0]) > self.length:
                self.length = len(state[0])
                self.table = torch.arange(1.0, self.length + 1)[:, None]
            x = context.selective(torch.sin, self.linear(state[0]))
            return (x * self.table[:len(x)],)

    def test_are_left_to_it(self):
        made = {}
        for mode in MODES[:3]:
            torch.manual_seed(1)
            layer = self.Growing()
            runner = ChunkRunner([layer], torch.device("cpu"))
            for rows in (8, 16, 6):
                out, tape, _ = runner.forward(
                    (torch.ones(rows, WIDTH),), [False], context_of(), [mode], True,
                    False)
                runner.backward(tape, [torch.ones_like(out[0])], 1.0,
                                lambda p, g: made.setdefault(mode, []).append(g))
        for mode in MODES[1:3]:
            self.assertEqual(len(made[mode]), len(made[MODES[0]]))
            for a, b in zip(made[mode], made[MODES[0]]):
                self.assertTrue(torch.allclose(a, b))

    class Counting(nn.Module):
        """Counts where gradients are computed, as routers do."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("rows", torch.zeros(()))

        def forward(self, state, context):
            if torch.is_grad_enabled():
                self.rows += len(state[0])
            return (self.linear(state[0]),)

    def test_change_with_gradients_or_without(self):
        layer = self.Counting()
        runner = ChunkRunner([layer], torch.device("cpu"))
        for mode in ("selective", "full", "full", "selective"):
            out, tape, _ = runner.forward(
                (torch.ones(8, WIDTH),), [False], context_of(), [mode], True, False)
            runner.backward(tape, [torch.ones_like(out[0])], 1.0, lambda p, g: None)
        self.assertEqual(float(layer.rows), 4 * 8)


class DataTest(unittest.TestCase):

    def test_is_asked_for_once_a_stage_and_kept_until_its_backward_is_over(self):
        class Ids:
            def __init__(self):
                self.ids = torch.arange(8) % 7

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(7, WIDTH)

            def forward(self, state, context):
                x = self.table(context.data.ids)
                x = context.selective(
                    lambda t: t * context.data.ids.sum().sin(), x)
                return (x + sum(state),)

        for mode in MODES:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    asked = []

                    def data():
                        asked.append(weakref.ref(found := Ids()))
                        return found

                    context = StageContext(
                        SubMicrobatch(0, 0, 0, (0,), (8,)), 0, 0, (), data,
                        False)
                    layers = [Layer(), Layer()]
                    runner = ChunkRunner(layers, torch.device("cpu"))
                    out, tape, _ = runner.forward(
                        (torch.rand(8, WIDTH),), [True], context, [mode] * 2,
                        True, split)
                    self.assertIsNotNone(asked[0]())
                    _, taken = backward(runner, tape, [torch.ones_like(out[0])],
                                        split)
                    self.assertEqual(len(asked), 1)
                    self.assertIsNone(asked[0]())
                    runner.weight_gradients(tape, taken)
                    self.assertEqual(len(taken), 2)

    def test_may_draw_random_numbers(self):
        class Layer(nn.Module):
            def __init__(self, tracker, inside):
                super().__init__()
                self.linear = nn.Linear(WIDTH, WIDTH)
                self.tracker, self.inside = tracker, inside

            def noisy(self, x, context):
                with self.tracker.fork():
                    x = F.dropout(x, 0.5)
                return F.dropout(self.linear(x + context.data), 0.5)

            def forward(self, state, context):
                if not self.inside:
                    x = self.noisy(state[0], context)
                    return (context.selective(F.dropout, x, 0.5),)
                x = context.selective(self.noisy, state[0], context)
                return (x + context.selective(self.noisy, x, context),)

        def run(inside, mode, split):
            """Gradients, and the states that all passes leave."""
            torch.manual_seed(1)
            tracker = Tracker()
            layers = [Layer(tracker, inside), Layer(tracker, inside)]
            runner = ChunkRunner(layers, torch.device("cpu"),
                                 extra_rng=tracker.rng())

            def noise():
                with tracker.fork():
                    torch.rand(3)
                return torch.randn(8, WIDTH)

            context = StageContext(SubMicrobatch(0, 0, 0, (0,), (8,)), 0, 0, (),
                                   noise, False)
            out, tape, _ = runner.forward((torch.rand(8, WIDTH),), [True],
                                          context, [mode] * 2, True, split)
            found, taken = backward(runner, tape, [torch.cos(out[0])], split)
            runner.weight_gradients(tape, taken)
            gradients = dict(taken)
            return [out[0], *found, *(gradients[p] for p in runner.parameters),
                    tracker.states["model"], torch.get_rng_state()]

        for inside in (False, True):
            expected = run(inside, "keep", False)
            for mode in MODES:
                for split in (False, True):
                    with self.subTest(inside=inside, mode=mode, split=split):
                        for a, b in zip(run(inside, mode, split), expected):
                            self.assertTrue(torch.allclose(a, b))

    def test_is_not_asked_for_where_no_layer_looks(self):
        context = StageContext(SubMicrobatch(0, 0, 0, (0,), (8,)), 0, 0, (),
                               lambda: self.fail("asked"), False)
        runner = ChunkRunner([Norms()], torch.device("cpu"))
        out, tape, _ = runner.forward((torch.rand(8, WIDTH),), [True], context,
                                      ["full"], True, False)
        backward(runner, tape, [out[0]], False)


class FreedTest(unittest.TestCase):

    def test_a_stage_that_has_no_backward_after_all(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(WIDTH, WIDTH)

            def forward(self, state, context):
                x = context.selective(F.dropout, self.linear(state[0]), 0.5)
                context.add_loss(x.sum())
                return (x.exp(),)

        runner = ChunkRunner([Layer()], torch.device("cpu"))
        for mode in MODES:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    context = context_of()
                    made = runner.forward((torch.rand(8, WIDTH),), [True], context,
                                          [mode], True, split)
                    alive = [weakref.ref(x) for x in (
                        context, *made[1].records[0].outputs)]
                    del made, context
                    self.assertEqual([x() for x in alive if x() is not None], [])


class InPlaceTest(unittest.TestCase):

    class Layer(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.linear, self.in_place = nn.Linear(WIDTH, WIDTH), in_place

        def forward(self, state, context):
            x = state[1]
            if self.in_place:
                x += 1
            return (self.linear(state[0]) + x,)

    def forward(self, in_place, mode, has_backward, split=False):
        x = torch.ones(8, WIDTH)
        return ChunkRunner([self.Layer(in_place)], torch.device("cpu")).forward(
            (x, x.clone()), [True, False], context_of(), [mode], has_backward,
            split)

    def test_a_layer_that_changes_its_state_is_refused(self):
        for mode in MODES:
            for has_backward, split in ((True, False), (True, True),
                                        (False, False)):
                with self.subTest(mode=mode, has_backward=has_backward):
                    with self.assertRaisesRegex(
                            RuntimeError, r"^Layer: changes state\[1\] in place"):
                        self.forward(True, mode, has_backward, split)
                    self.forward(False, mode, has_backward, split)

    def test_inference_mode_counts_no_changes(self):
        with torch.inference_mode():
            self.forward(False, "keep", False)


class OthersWeightsTest(unittest.TestCase):

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, WIDTH)

        def forward(self, state, context):
            return (state[0] + self.table(torch.arange(8)),)

    class Head(nn.Module):
        """Reads the table's weight, which it does not register: a list hides it."""

        def __init__(self, table):
            super().__init__()
            self.tables = [table]
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, state, context):
            logits = F.linear(self.norm(state[0]), self.tables[0].table.weight)
            context.add_loss(F.cross_entropy(logits, torch.arange(8)))
            return state

    def test_a_weight_that_no_layer_would_get_a_gradient_for_is_refused(self):
        for mode in MODES:
            for split in (False, True):
                with self.subTest(mode=mode, split=split):
                    table = self.Table()
                    with self.assertRaisesRegex(
                            RuntimeError, r"^Head: reads a weight of shape \(9, 6\) "
                            "that is no parameter of the layer"):
                        run_chunk([table, self.Head(table)], mode, split,
                                  torch.ones(8, WIDTH))

    def test_a_leaf_of_the_layers_own_making_is_not(self):
        layer, x = Force(), torch.ones(8, WIDTH)
        _, gradients = run_plain([layer], x)
        for mode in ("keep", "full"):
            _, mine, _ = run_chunk([layer], mode, False, x)
            self.assertEqual(set(mine), set(gradients))
            for name, gradient in mine.items():
                self.assertTrue(torch.equal(gradient, gradients[name]))


class RefusedTest(unittest.TestCase):
    """What a split backward cannot follow is refused, not got wrong."""

    def refuses(self, message, layer):
        x = torch.ones(8, WIDTH, requires_grad=True)
        with self.assertRaisesRegex(RuntimeError, message):
            run_chunk([layer], "keep", True, x.detach())
        run_chunk([layer], "keep", False, x.detach())

    def test_an_output_that_the_backward_reads_changed_in_place(self):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(WIDTH))

            def forward(self, x):
                return torch.exp(x * self.w)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = Gate()

            def forward(self, state, context):
                y = self.gate(state[0])
                if context._cuts is not None:
                    y = y.mul_(2)
                return (y,)

        self.refuses("its output is changed in place.*split_backward", Layer())

    def test_a_module_that_hands_tensors_on_by_the_side(self):
        class Router(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(WIDTH))

            def forward(self, x):
                self.balance = (x * self.w).sum()
                return x * self.w

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.router = Router()

            def forward(self, state, context):
                y = self.router(state[0])
                context.add_loss(self.router.balance)
                return (y,)

        self.refuses("besides its outputs", Layer())

    def test_a_module_differentiated_by_its_layer(self):
        self.refuses("differentiates it in its own forward", Force())

    def test_a_module_that_reads_tensors_by_the_side(self):
        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(WIDTH))

            def forward(self, x):
                return x * self.w * self.other

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixer = Mixer()

            def forward(self, state, context):
                self.mixer.other = state[0].sin()
                return (self.mixer(state[0]),)

        self.refuses("besides its arguments", Layer())

    def test_a_module_that_reads_tensors_by_the_side_in_some_calls(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(WIDTH))
                self.vision = None

            def forward(self, x):
                y = x * self.w
                return y if self.vision is None else y + self.vision * self.w

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.gated = Gated()

            def forward(self, state, context):
                self.gated.vision = state[1].tanh() if len(state[1]) else None
                return (self.gated(state[0]), state[1])

        runner = ChunkRunner([Layer()], torch.device("cpu"))

        def forward(condition):
            runner.forward((torch.ones(8, WIDTH), condition), [True, True],
                           context_of(), ["keep"], True, True)

        forward(torch.ones(0, WIDTH))
        with self.assertRaisesRegex(RuntimeError, "besides its arguments"):
            forward(torch.ones(8, WIDTH))


if __name__ == "__main__":
    unittest.main()
