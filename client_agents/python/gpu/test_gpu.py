"""The executor and the CUPTI agent on a real GPU. One is enough."""

import glob
import os
import random
import time
import unittest

# Before torch: asks the driver's library for GPUs, which leaves CUDA untouched in
# this process, so that ranks may be forked from it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch  # noqa: E402

import large_models as large  # noqa: E402
import plans  # noqa: E402
from pipeweaver.job import JobView  # noqa: E402
from pipeweaver.profile import layer_key  # noqa: E402
from pipeweaver.program import check_program  # noqa: E402
from pipeweaver.torch.cupti import CuptiHooks  # noqa: E402
from pipeweaver.v1 import plan_pb2  # noqa: E402
from ranks import run_ranks  # noqa: E402
from test_gradients import check  # noqa: E402

AGENT = os.environ["PIPEWEAVER_CUPTI_AGENT"]
ACTIVE, YIELDED = 2, 3  # pw_cupti_state
GIGABYTE = 10 ** 9


class GradientTest(unittest.TestCase):
    """As test_gradients.py, with weights and data on the GPU."""

    def check(self, model, ranks, v, dtype, frozen=(), buckets=()):
        check(self, "nccl" if ranks > 1 else "none", model, ranks, frozen, v,
              dtype, buckets, "cuda")

    def test_one_rank(self):
        self.check("omni", 1, False, torch.float64)

    def test_two_ranks(self):
        self.check("vlm", 2, False, torch.float32)

    def test_two_ranks_frozen(self):
        self.check("t2v", 2, True, torch.float64, ("text",))

    def test_two_ranks_padded(self):
        self.check("t2v", 2, False, torch.float64, (), (5, 9, 16, 40))

    def test_four_ranks(self):
        self.check("omni", 4, True, torch.float64)


def run_choice(rank, transport, choice):
    """A step of the large model under one memory choice: memory at rest, at its
    most and after it, and the step's times."""
    view = JobView(large.make_job("gpu", pinned=True))
    batch = large.make_batch(view.job, random.Random(0), 2)
    trainer = large.Trainer(view)
    key = plan_pb2.PlanKey(job="gpu", step=0)
    made = plans.random_plan(view, batch, 0, 0.0, (choice,), key)
    prepared = trainer.executor.prepare(check_program(made[0], key, 0), batch)
    data = large.RandomData(view, batch)
    trainer.executor.run(prepared, data)
    torch.cuda.synchronize()
    rest = torch.cuda.memory_allocated()
    begin = time.perf_counter_ns()
    result = trainer.executor.run(prepared, data)
    wall = time.perf_counter_ns() - begin
    result.loss = None
    return (rest, result.peak_memory_bytes, result.step_ns, wall,
            result.start_offset_ns, result.duration_ns,
            torch.cuda.memory_allocated())


class DeviceTest(unittest.TestCase):

    def test_times_and_memory(self):
        peaks = {}
        for choice in ("keep", "selective", "full", "offload"):
            (rest, peak, step_ns, wall, starts, durations, after), = run_ranks(
                1, "none", run_choice, choice)
            peaks[choice] = peak - rest
            self.assertEqual(after, rest, choice)
            self.assertLessEqual(step_ns, wall)
            self.assertEqual(len(starts), len(durations))
            self.assertEqual(starts[0], 0)
            for a, b, d in zip(starts, starts[1:], durations):
                self.assertLess(abs(a + d - b), 2000)
            # The device's time of all actions is the step's, but for what the
            # host does before the first and after the last.
            self.assertLess(starts[-1] + durations[-1], step_ns)
            self.assertGreater(starts[-1] + durations[-1], 0.8 * step_ns)
            print(f"device: {choice}: activations {peaks[choice] / GIGABYTE:.2f} "
                  f"GB at most, step {step_ns * 1e-6:.1f} ms")
        self.assertLess(peaks["full"], 0.6 * peaks["keep"])
        self.assertLess(peaks["offload"], 0.8 * peaks["keep"])
        self.assertLessEqual(peaks["selective"], peaks["keep"])


class TimedHooks(CuptiHooks):
    """Measures passes by CUDA events, too: from a pass's first launch to its last
    kernel's end, which is as long as its kernels where the GPU never waits."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = {}
        self.open = None

    def _mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def layer_begin(self, annotation):
        super().layer_begin(annotation)
        self.open = (annotation, self._mark())

    def layer_end(self):
        annotation, begin = self.open
        self.events.setdefault(annotation, []).append((begin, self._mark()))
        super().layer_end()

    def event_ns(self):
        torch.cuda.synchronize()
        return {a: sum(int(b.elapsed_time(e) * 1e6) for b, e in marks)
                for a, marks in self.events.items()}


def start_agent(injected, upload=None, kind=CuptiHooks):
    os.environ["PIPEWEAVER_CUPTI_DUTY"] = "1/1"
    if injected:
        os.environ["CUDA_INJECTION64_PATH"] = AGENT
    torch.cuda.init()
    return kind(AGENT, upload=upload)


def prepare_large(hooks, steps, split):
    view = JobView(large.make_job("gpu", pinned=True))
    batch = large.make_batch(view.job, random.Random(0), 2)
    executor = large.Trainer(view, hooks).executor
    data = large.RandomData(view, batch)
    prepared = []
    for step in range(steps):
        key = plan_pb2.PlanKey(job="gpu", step=step)
        made = plans.random_plan(view, batch, step, split, ("keep",), key)
        prepared.append(executor.prepare(check_program(made[0], key, 0), batch))
    return [lambda p=p: executor.run(p, data) for p in prepared]


def traced(rank, transport, injected, split):
    """Layers' times as the agent and as events have them, by annotation."""
    profiles = []
    hooks = start_agent(injected, upload=profiles.append, kind=TimedHooks)
    runs = prepare_large(hooks, 6, split)
    for run in runs[:2]:  # kernels are loaded
        run()
    torch.cuda.synchronize()
    hooks.events.clear()
    hooks._times._steps.clear()
    was = set()
    for run in runs[2:]:
        run()
        was.add(hooks.state())
    events = hooks.event_ns()
    time.sleep(3)
    lost = hooks._ring.lost()
    hooks.close()
    annotations = {layer_key(a).SerializeToString(): a for a in events}
    kernels = {}
    for profile in profiles:
        for p in profile.points:
            a = annotations[p.key.layer.SerializeToString()]
            kernels[a] = kernels.get(a, 0) + p.total_ns
    left = glob.glob(f"/dev/shm/pipeweaver-cupti-{os.getuid()}-{os.getpid()}-*")
    return kernels, events, was, hooks._times.steps_left_out, lost, left


def beside_profiler(rank, transport, detach, teardown):
    """Kernels that torch.profiler saw, and the agent's states: before, while and
    after it ran. teardown: the profiler is told to leave CUPTI behind it."""
    if teardown:
        os.environ["TEARDOWN_CUPTI"] = "1"
    hooks = start_agent(True)
    runs = prepare_large(hooks, 8, 0.0)
    states = []
    for run in runs[:3]:
        run()
        states.append(hooks.state())
    if detach:
        hooks.detach()
    with torch.profiler.profile(activities=[
            torch.profiler.ProfilerActivity.CPU,
            torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for run in runs[3:5]:
            run()
            states.append(hooks.state())
        torch.cuda.synchronize()
    if detach:
        hooks.attach()
    for run in runs[5:]:
        run()
        states.append(hooks.state())
    seen = sum(e.device_type == torch.autograd.DeviceType.CUDA
               for e in profiler.events())
    hooks.close()
    return seen, states


class CuptiAgentTest(unittest.TestCase):

    def check(self, injected, split):
        (kernels, events, was, left_out, lost, left), = run_ranks(
            1, "none", traced, injected, split, timeout_s=180)
        self.assertEqual(was, {ACTIVE})
        self.assertEqual((left_out, lost, left), (0, 0, []))
        # Nobody wants a gradient of what a module's first layer reads.
        silent = set(events) - set(kernels)
        self.assertEqual([a for a in silent if "embed" not in a or
                          "pass=input_grad" not in a], [])
        passes = {a.split("pass=")[1].split(",")[0] for a in kernels}
        self.assertEqual(passes, {"forward", "input_grad", "weight_grad"}
                         if split else {"forward", "backward"})
        total, timed = sum(kernels.values()), sum(events.values())
        print(f"cupti: {'injected' if injected else 'loaded'}, "
              f"{len(kernels)} kinds of passes, kernels {total * 1e-6:.1f} ms of "
              f"{timed * 1e-6:.1f} between events")
        self.assertGreater(total, 0.85 * timed)
        for a, ns in kernels.items():
            self.assertLess(ns, 1.1 * events[a] + 50_000, a)
            if "module=text,layer=transformer" in a:  # large enough
                self.assertGreater(ns, 0.7 * events[a], a)

    def test_injected(self):
        self.check(True, 0.0)

    def test_loaded_by_the_trainer(self):
        self.check(False, 1.0)

    def profile(self, detach, teardown):
        (seen, states), = run_ranks(1, "none", beside_profiler, detach, teardown)
        print(f"cupti: beside torch.profiler, detach={detach}, "
              f"teardown={teardown}: {seen} {states}")
        self.assertEqual(states[:5], [ACTIVE] * 3 + [YIELDED] * 2)
        self.assertGreater(seen, 1000 if detach else 0)
        return states[5:]

    def test_gives_way_to_torch_profiler_for_good(self):
        self.assertEqual(self.profile(True, False), [YIELDED] * 3)

    def test_comes_back_when_torch_profiler_leaves(self):
        self.assertEqual(self.profile(True, True), [ACTIVE] * 3)

    def test_torch_profiler_without_a_word(self):
        self.profile(False, False)


if __name__ == "__main__":
    unittest.main()
