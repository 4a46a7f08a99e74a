"""What the executor promises besides right gradients."""

import ctypes
import pathlib
import random
import subprocess
import tempfile
import time
import unittest
from unittest import mock

import torch
import torch.distributed as dist

import models
import plans
from pipeweaver import digest
from pipeweaver.job import BatchView, JobView
from pipeweaver.profile import layer_key
from pipeweaver.program import BadProgram, check_program
from pipeweaver.split import condition_tokens
from pipeweaver.torch import (
    ExecutorOptions, ExtraRng, Hooks, PipelineExecutor)
from pipeweaver.torch.cupti import CuptiHooks
from pipeweaver.torch.transport import Transport, flatten
from pipeweaver.v1 import job_pb2, plan_pb2, profile_pb2
from ranks import run_ranks

KEY = plan_pb2.PlanKey(job="j", step=3)


def connect_late(rank, transport, pairs, late):
    """Connects as on NCCL, gloo takes its operations, too; one rank comes half a
    second later. How long it took, and the peers of each kind of operation."""
    transport._by_tag = False
    asked = []
    batch = dist.batch_isend_irecv

    def recorded(operations):
        asked.extend((o.op is dist.isend, o.peer) for o in operations)
        return batch(operations)

    if rank == late:
        time.sleep(0.5)
    begin = time.monotonic()
    with mock.patch("torch.distributed.batch_isend_irecv", recorded):
        transport.connect(pairs)
    took = time.monotonic() - begin
    return took, [sorted(peer for send, peer in asked if send == kind)
                  for kind in (True, False)]


def connect_nothing(rank, transport):
    """Where nothing comes, connecting fails."""
    class Done:
        def wait(self):
            pass

    transport._by_tag = False
    with mock.patch("torch.distributed.batch_isend_irecv",
                    lambda operations: [Done() for _ in operations]):
        try:
            transport.connect([(0, 1)])
        except RuntimeError as error:
            return str(error)


class Connecting(Transport):
    """Wants ranks connected, once, before they exchange anything."""

    def __init__(self, link):
        self.link, self.pairs = link, None

    def connect(self, pairs):
        if self.pairs is not None:
            raise AssertionError("connected twice")
        self.pairs = list(pairs)

    def post(self, posts, batched):
        me = dist.get_rank()
        for p in posts:
            pair = (min(me, p.peer), max(me, p.peer))
            if pair not in self.pairs:
                raise AssertionError(f"{pair} not among {self.pairs}")
        return self.link.post(posts, batched)

    def wait(self, handle):
        self.link.wait(handle)


def run_connected(rank, transport, job, batch, programs, model):
    transport = Connecting(transport)
    run_plan(rank, transport, job, batch, programs, model=model)
    return transport.pairs


class NoTransport(Transport):
    def post(self, posts, batched):
        raise AssertionError("nothing to post")

    def wait(self, handle):
        raise AssertionError("nothing to wait for")


def run_plan(rank, transport, job, batch, programs, deterministic=True,
             hooks=None, model="vlm"):
    """Gradients of the rank's weights, and its loss."""
    view = JobView(job)
    layers = models.build_model(view, model, 1, torch.float32)
    executor = PipelineExecutor(
        view, rank, models.pipeline_modules(view, layers, rank), transport,
        options=ExecutorOptions(deterministic=deterministic), hooks=hooks)
    result = executor.run(
        executor.prepare(check_program(programs[rank], KEY, rank), batch),
        models.Data(view, batch, 0, torch.float32))
    return [p.grad for p in executor.parameters()], result


def reproduce(rank, transport, job, batch, first, second):
    a, loss_a = run_plan(rank, transport, job, batch, first)
    b, loss_b = run_plan(rank, transport, job, batch, second)
    for x, y in zip(a, b):
        if x is None or not torch.equal(x, y):
            raise AssertionError("gradients differ")
    if loss_a.loss is not None and not torch.equal(loss_a.loss, loss_b.loss):
        raise AssertionError("losses differ")
    return len(a)


def evaluate(rank, transport, job, batch, programs):
    gradients, result = run_plan(rank, transport, job, batch, programs)
    if any(g is not None for g in gradients):
        raise AssertionError("a forward-only step left gradients")
    view = JobView(job)
    expected = models.reference_step(
        view, models.build_model(view, "vlm", 1, torch.float32), batch,
        models.Data(view, batch, 0, torch.float32))
    return float(result.loss or 0.0), float(expected)


class Recorder(Hooks):
    def __init__(self):
        self.ids, self.depth, self.names, self.layers = [], 0, [], 0

    def push(self, correlation_id):
        self.ids.append(correlation_id)
        self.depth += 1

    def pop(self):
        self.depth -= 1

    def layer_begin(self, annotation):
        self.names.append(annotation)
        self.layers += 1

    def layer_end(self):
        self.layers -= 1


class ExecutorTest(unittest.TestCase):

    def test_losses_and_gradients_reproduce_bit_by_bit(self):
        job = models.make_job("vlm", 2)
        batch = models.make_batch(job, random.Random(1), 4)
        first, second = (plans.random_plan(
            JobView(job), batch, seed, 0.0, ("keep", "full"), KEY,
            split_as_planned=True) for seed in (1, 2))
        self.assertNotEqual(first[0].actions, second[0].actions)
        for count in run_ranks(2, "gloo", reproduce, job, batch, first, second):
            self.assertGreater(count, 10)

    def test_ranks_that_exchange_are_connected_first(self):
        for model, ranks, v in (("vlm", 2, False), ("omni", 4, True),
                                ("t2v", 4, False)):
            job = models.make_job(model, ranks, v_placement=v)
            batch = models.make_batch(job, random.Random(1), 2)
            made = plans.random_plan(JobView(job), batch, 1, key=KEY)
            pairs = JobView(job).exchanging_ranks()
            self.assertEqual(run_ranks(ranks, "gloo", run_connected, job, batch,
                                       made, model), [pairs] * ranks)
        # Of a chain, neighbours and the way back to the second segment.
        self.assertEqual(pairs, [(0, 1), (0, 3), (1, 2), (2, 3)])

    def test_connecting_waits_for_the_other_rank_of_a_pair(self):
        pairs = [(0, 1), (0, 3), (1, 2)]
        peers = [[1, 3], [0, 2], [1], [0]]
        found = run_ranks(4, "gloo", connect_late, pairs, 3)
        self.assertEqual([asked for _, asked in found], [[p, p] for p in peers])
        self.assertGreater(found[0][0], 0.25)  # rank 3 is its peer

    def test_connecting_sees_that_nothing_came(self):
        for error in run_ranks(2, "gloo", connect_nothing):
            self.assertIn("executors must be made on all ranks at once", error)

    def test_a_message_of_nothing_has_the_executors_type(self):
        nothing = flatten([torch.zeros(0, 3)], torch.float64, "cpu")
        self.assertEqual((nothing.dtype, nothing.shape), (torch.float64, (1,)))

    def test_forward_only_step(self):
        job = models.make_job("vlm", 2)
        batch = models.make_batch(job, random.Random(1), 3, forward_only=True)
        made = plans.random_plan(JobView(job), batch, 1, key=KEY)
        answers = run_ranks(2, "gloo", evaluate, job, batch, made)
        self.assertAlmostEqual(sum(a for a, _ in answers), answers[0][1], 4)

    def test_hooks_see_every_action(self):
        job = models.make_job("vlm", 1)
        batch = models.make_batch(job, random.Random(1), 2)
        # Backwards that recompute are not told.
        made = plans.random_plan(JobView(job), batch, 2, names=("keep",),
                                 key=KEY)
        hooks = Recorder()
        _, result = run_plan(0, NoTransport(), job, batch, made, hooks=hooks)
        self.assertEqual((hooks.depth, hooks.layers), (0, 0))
        for name in ("forward", "backward", "input_grad", "weight_grad"):
            self.assertTrue(any(
                n.startswith(f"pw:module=vision,layer=transformer,pass={name},"
                             "items=") for n in hooks.names), name)
        count = len(plan_pb2.ActionColumns.FromString(made[0].actions).kind)
        self.assertEqual(hooks.ids, [(3 << 32) + i for i in range(count)])
        self.assertEqual(len(result.start_offset_ns), count)
        self.assertEqual(result.start_offset_ns,
                         sorted(result.start_offset_ns))

    def test_chunks_are_announced_in_one_order_whatever_the_plan(self):
        job = models.make_job("omni", 1, frozen=("vision",))
        view = JobView(job)
        made = {}  # gradients by chunk, as announced
        executor = PipelineExecutor(
            view, 0, models.pipeline_modules(view, models.build_model(
                view, "omni", 1, torch.float32), 0), NoTransport(),
            options=ExecutorOptions(
                grads_ready=lambda *chunk: made.update({chunk: gradients(chunk)})))

        def gradients(chunk):
            return [None if p.grad is None else p.grad.clone()
                    for p in executor._runners[chunk].parameters]

        names = [module.name for module in job.modules]
        expected = [(names.index(name), segment, 0) for name, segment in (
            ("dit", 1), ("dit", 0), ("text", 1), ("text", 0), ("audio_proj", 0),
            ("audio", 0))]
        self.assertEqual(executor.reduction_order, expected)
        ends = set()  # orders in which the plans end chunks
        for seed in range(12):
            batch = models.make_batch(job, random.Random(seed), 1 + seed % 3)
            [program] = plans.random_plan(view, batch, seed, key=KEY)
            checked = check_program(program, KEY, 0)
            ends.add(plans.chunk_ends(checked))
            made.clear()
            executor.run(executor.prepare(checked, batch),
                         models.Data(view, batch, seed, torch.float32))
            self.assertEqual(list(made), expected)
            for chunk, announced in made.items():
                for a, b in zip(announced, gradients(chunk)):
                    self.assertTrue(a is b if b is None else torch.equal(a, b))
        self.assertGreater(len(ends), 6)
        self.assertLess(min(map(len, ends)), len(expected))

    def test_a_weight_that_chunks_share_is_whole_when_announced(self):
        job = models.make_job("vlm", 1, v_placement=True)
        view = JobView(job)
        layers = models.build_model(view, "vlm", 1, torch.float32)
        embedding, head = layers[1][0], layers[1][-1]
        shared = head.proj.weight = embedding.table.weight
        announced = []
        executor = PipelineExecutor(
            view, 0, models.pipeline_modules(view, layers, 0), NoTransport(),
            options=ExecutorOptions(grads_ready=lambda *chunk: announced.append(
                (chunk, shared.grad.clone()))))
        weights = {p for module in layers for x in module for p in x.parameters()}
        self.assertEqual(len(executor.parameters()), len(weights))
        self.assertEqual(set(executor.parameters()), weights)
        for seed in range(6):
            batch = models.make_batch(job, random.Random(seed), 2)
            [program] = plans.random_plan(view, batch, seed, key=KEY)
            announced.clear()
            shared.grad = None
            executor.run(executor.prepare(check_program(program, KEY, 0), batch),
                         models.Data(view, batch, seed, torch.float32))
            found = dict(announced)
            self.assertEqual([chunk for chunk, _ in announced],
                             executor.reduction_order)
            for chunk in ((1, 0, 0), (1, 1, 0)):
                self.assertTrue(torch.equal(found[chunk], shared.grad))

    def test_recompute_brings_the_trainers_random_states_back(self):
        job = models.make_job("vlm", 1)
        batch = models.make_batch(job, random.Random(1), 2)
        view = JobView(job)
        states = [0]

        def get():
            states.append(states[-1] + 1)
            return states[-1]

        brought_back = []
        for name, recomputes in ("keep", False), ("full", True):
            executor = PipelineExecutor(
                view, 0, models.pipeline_modules(view, models.build_model(
                    view, "vlm", 1, torch.float32), 0), NoTransport(),
                options=ExecutorOptions(
                    extra_rng=ExtraRng(get, brought_back.append)))
            [program] = plans.random_plan(view, batch, 1, names=(name,), key=KEY)
            executor.run(
                executor.prepare(check_program(program, KEY, 0), batch),
                models.Data(view, batch, 0, torch.float32))
            self.assertEqual(bool(brought_back), recomputes)
        self.assertEqual(sorted(brought_back), sorted(set(brought_back)))
        self.assertLessEqual(set(brought_back), set(states[1:]))

    def test_layers_say_what_condition_they_attend_to(self):
        job = models.make_job("t2v", 1)
        batch = models.make_batch(job, random.Random(1), 2)
        made = plans.random_plan(JobView(job), batch, 1, key=KEY)
        hooks = Recorder()
        run_plan(0, NoTransport(), job, batch, made, hooks=hooks, model="t2v")
        view = JobView(job)
        names = [module.name for module in job.modules]
        conditioned = {
            names[m] for m, module in enumerate(job.modules)
            if any(g.kind == job_pb2.LAYER_KIND_DIT for g in module.layers)}
        self.assertTrue(conditioned)
        expected = {name: 0 for name in names}
        for mb in BatchView(view, batch).microbatches:
            for m, name in enumerate(names):
                expected[name] += sum(condition_tokens(view, m, mb))
        self.assertGreater(max(expected.values()), 0)
        seen = {name: 0 for name in names}
        for key in map(layer_key, hooks.names):
            self.assertIsNotNone(key)
            if key.layer == "dit" and getattr(
                    key, "pass") == profile_pb2.LAYER_PASS_FORWARD:
                seen[key.module] += key.condition_tokens
            self.assertEqual(key.condition_tokens > 0,
                             key.module in conditioned)
            if key.items == 1:
                self.assertEqual(key.condition_products,
                                 key.condition_tokens * key.tokens)
        for name in conditioned:
            layers = sum(g.count for g in job.modules[names.index(name)].layers
                         if g.kind == job_pb2.LAYER_KIND_DIT)
            self.assertEqual(seen[name], layers * expected[name])

    def refuses(self, message, change, ranks=2):
        """A program that passes its check, but not the executor's."""
        job = models.make_job("vlm", ranks)
        view = JobView(job)
        batch = models.make_batch(job, random.Random(1), 2)
        program = plans.random_plan(view, batch, 1, key=KEY)[0]
        actions = plan_pb2.ActionColumns.FromString(program.actions)
        change(actions, program)
        program.actions = actions.SerializeToString()
        program.rank_digests[0] = digest.sha256(program.actions)
        program.plan_digest = digest.plan_digest(
            program.identity, program.split, program.rank_digests)
        layers = models.build_model(view, "vlm", 1, torch.float32)
        executor = PipelineExecutor(view, 0, models.pipeline_modules(
            view, layers, 0), NoTransport())
        with self.assertRaisesRegex(BadProgram, message):
            executor.prepare(check_program(program, KEY, 0), batch)

    def test_refuses_programs_that_cannot_run(self):
        def drop(actions, kinds):
            for i in reversed([i for i, k in enumerate(actions.kind)
                               if k in kinds]):
                for name in actions.DESCRIPTOR.fields_by_name:
                    del getattr(actions, name)[i]

        self.refuses("which is not received before it",
                     lambda a, p: drop(a, (6, 8)))
        self.refuses("names .* layers, the chunk has", lambda a, p: [
            c.choices[i].__setattr__("keep_layers", 99)
            for c in p.choices for i in range(len(c.choices))])
        def elsewhere(a, p):
            first = next(i for i, k in enumerate(a.kind) if k == 1)
            stage = (a.sub_microbatch[first], a.segment[first])
            for i, k in enumerate(a.kind):
                if (a.sub_microbatch[i], a.segment[i]) == stage and (
                        k not in (5, 6, 7, 8)):
                    a.chunk[i] = 1
            for c in list(p.choices):
                p.choices.add(module=c.module, segment=c.segment, chunk=1,
                              choices=c.choices)

        self.refuses("is not on rank 0", elsewhere)
        self.refuses("is on rank 1", lambda a, p: a.peer.__setitem__(
            next(i for i, k in enumerate(a.kind) if k == 5), 2), ranks=3)

    def test_refuses_chunks_that_are_not_the_layouts(self):
        view = JobView(models.make_job("vlm", 2))
        layers = models.build_model(view, "vlm", 1, torch.float32)
        modules = models.pipeline_modules(view, layers, 1)
        with self.assertRaisesRegex(ValueError, "the layout puts 3 layers here"):
            PipelineExecutor(view, 0, modules, NoTransport())


class FrozenTest(unittest.TestCase):

    def made(self, frozen, change, forward_only=False):
        """All layers, and what runs a step; change(layers) comes before the
        executor is made."""
        job = models.make_job("vlm", 1, frozen)
        view = JobView(job)
        layers = models.build_model(view, "vlm", 1, torch.float32)
        change(layers)
        executor = PipelineExecutor(
            view, 0, models.pipeline_modules(view, layers, 0), NoTransport())
        batch = models.make_batch(job, random.Random(1), 2, forward_only)
        [program] = plans.random_plan(view, batch, 1, key=KEY)
        prepared = executor.prepare(check_program(program, KEY, 0), batch)
        return layers, lambda: executor.run(
            prepared, models.Data(view, batch, 0, torch.float32))

    def test_a_frozen_module_has_no_weights_that_want_gradients(self):
        with self.assertRaises(ValueError) as raised:
            self.made(("vision",), lambda layers: layers[0][2].down
                      .requires_grad_(True))
        self.assertEqual(
            str(raised.exception),
            "module 'vision', segment 0, chunk 0, layer 2, weight 'down.weight': "
            "requires_grad: True, must be False in a module that the job has "
            "frozen")

    def test_a_trained_module_may_have_frozen_weights(self):
        def change(layers):
            for layer in layers[1][:-1]:
                layer.requires_grad_(False)
            layers[1][2].up.requires_grad_(True)

        layers, run = self.made((), change)
        run()
        for layer in layers[0] + layers[1]:
            for p in layer.parameters():
                self.assertEqual(p.grad is not None, p.requires_grad)

    def test_which_weights_are_trained_is_fixed(self):
        for frozen in (False, True):
            layers, run = self.made(
                (), lambda layers: layers[1][3].up.requires_grad_(frozen))
            run()
            layers[1][3].up.requires_grad_(not frozen)
            self.refuses(run, f"requires_grad: {not frozen}, must be as when the "
                              "executor was made; make another")

    def refuses(self, run, message):
        with self.assertRaises(ValueError) as raised:
            run()
        self.assertEqual(
            str(raised.exception),
            "module 'text', segment 0, chunk 0, layer 3, weight 'up.weight': " +
            message)

    def test_which_objects_the_weights_are_is_fixed(self):
        layers, run = self.made((), lambda layers: None)
        run()
        up = layers[1][3].up
        up.weight = torch.nn.Parameter(up.weight.detach().clone())
        self.refuses(run, "another object than when the executor was made; make "
                          "another")

    def test_a_weight_of_another_layer_is_another_object(self):
        layers, run = self.made((), lambda layers: None)
        layers[1][3].up.weight = layers[1][2].up.weight
        self.refuses(run, "another object than when the executor was made; make "
                          "another")

    @unittest.skipIf(int(torch.__version__.split(".")[0]) >= 2,
                     "this torch's autograd.grad calls hooks")
    def test_weights_have_no_hooks_that_are_not_called(self):
        layers, run = self.made((), lambda layers: None)
        hook = layers[1][3].up.weight.register_hook(lambda gradient: gradient / 2)
        self.refuses(run, "has hooks, which this torch calls in no backward of the "
                          "executor; must have none")
        hook.remove()
        run()

    def test_a_step_without_backwards_takes_any(self):
        layers, run = self.made((), lambda layers: None, forward_only=True)
        for module in layers:
            for layer in module:
                layer.requires_grad_(False)
        run()


class CuptiTest(unittest.TestCase):

    def test_tells_the_library_where_the_trainer_is(self):
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder) / "fake.c"
            source.write_text("""
                #include <stdio.h>
                #include <stdint.h>
                static char said[256];
                void pw_cupti_start(void) {}
                void pw_cupti_step(int64_t n) {
                  snprintf(said, 256, "step %d", (int)n);
                }
                void pw_cupti_push(const char* a) {
                  snprintf(said, 256, "push %s", a);
                }
                void pw_cupti_pop(void) { snprintf(said, 256, "pop"); }
                const char* last(void) { return said; }
                """)
            library = str(pathlib.Path(folder) / "libfake.so")
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", library,
                            str(source)], check=True)
            hooks = CuptiHooks(library)
            last = ctypes.CDLL(library).last
            last.restype = ctypes.c_char_p
            hooks.step(7)
            self.assertEqual(last(), b"step 7")
            hooks.layer_begin("pw:module=a")
            self.assertEqual(last(), b"push pw:module=a")
            hooks.layer_end()
            self.assertEqual(last(), b"pop")


if __name__ == "__main__":
    unittest.main()
