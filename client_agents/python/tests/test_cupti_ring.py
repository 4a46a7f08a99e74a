"""Tests of measured layers' way from the CUPTI agent's ring to the planner.

The last one runs the real agent library over its stand-in for libcupti against
the real server; it needs what Bazel builds of //profiler/cupti/... and //server.
"""

import ctypes
import os
import pathlib
import re
import struct
import subprocess
import tempfile
import time
import unittest
from unittest import mock

import models
from pipeweaver import StepAgent, register
from pipeweaver.cupti_ring import (
    KERNEL, LayerTimes, RingReader, as_in_record)
from pipeweaver.profile import ProfileRecords, layer_key
from pipeweaver.torch.cupti import CuptiHooks
from pipeweaver.v1 import planner_service_pb2 as service
from test_agent import free_port
from test_live import BINARY, start_real

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUILT = ROOT / "bazel-bin"
AGENT = BUILT / "profiler" / "cupti" / "libpipeweaver_cupti.so"
FAKE = BUILT / "profiler" / "cupti" / "testing" / "libfake_cupti.so"
LAYER = "pw:module=text,layer=transformer,pass=forward,items=2,tokens=64," \
        "sum_squares=2048,max_tokens=32,tp=1,cp=1"

PID, DROPPED, LOST, YIELDS = 3, 6, 7, 9


class Ring:
    """A writer of the documented layout."""

    def __init__(self, folder, slots=4, name="ring"):
        self.path = os.path.join(folder, name)
        self.slots = slots
        self.written = 0
        header = struct.pack("<8sIIQQQQQQQQ", b"PWCUPTI1", 512, 1, slots,
                             os.getpid(), 0, 0, 0, 0, 0, 0)
        with open(self.path, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(header.ljust(4096, b"\0") + bytes(512 * slots))

    def _put(self, at, data):
        with open(self.path, "r+b") as file:
            file.seek(at)
            file.write(data)

    def write(self, step, annotation, total_ns, kind=KERNEL, name=b"gemm"):
        self._put(4096 + self.written % self.slots * 512, struct.pack(
            "<qIIQQQQ232s232s", step, kind, 0, 1, total_ns, total_ns, total_ns,
            annotation.encode(), name))
        self.written += 1
        self._put(32, struct.pack("<Q", self.written))

    def count(self, word, number):
        self._put(8 * word, struct.pack("<Q", number))


class RingTest(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.ring = Ring(folder.name)

    def test_reads_around_the_end_and_frees_what_it_read(self):
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        for first in (0, 3, 6):
            for i in range(3):
                self.ring.write(first + i, LAYER, 10 * i)
            self.assertEqual([first, first + 1, first + 2],
                             [r.step for r in reader.read()])
        self.assertEqual([], reader.read())
        with open(self.ring.path, "rb") as file:
            self.assertEqual(9, struct.unpack_from("<Q", file.read(), 40)[0])

    def test_another_file_is_no_ring(self):
        with open(self.ring.path, "r+b") as file:
            file.write(b"PWCUPTI9")
        with self.assertRaisesRegex(ValueError, "is no ring"):
            RingReader(self.ring.path)
        with open(self.ring.path, "wb") as file:
            file.write(b"PWCUPTI1")
        with self.assertRaisesRegex(ValueError, "is no ring"):
            RingReader(self.ring.path)

    def test_a_ring_that_others_may_write_is_refused(self):
        for mode in (0o666, 0o620, 0o604):
            os.chmod(self.ring.path, mode)
            with self.assertRaisesRegex(
                    ValueError, f"{self.ring.path}: has mode 0{mode:o}; .* 0600"):
                RingReader(self.ring.path)
        os.chmod(self.ring.path, 0o600)
        user = os.getuid()
        with mock.patch("os.getuid", return_value=user + 1):
            with self.assertRaisesRegex(
                    ValueError, f"{self.ring.path}: belongs to user {user}; must "
                    f"belong to user {user + 1}"):
                RingReader(self.ring.path)
        RingReader(self.ring.path).close()

    def test_a_ring_of_another_process_is_refused(self):
        self.ring.count(PID, os.getpid() + 1)
        with self.assertRaisesRegex(
                ValueError, f"{self.ring.path}: is the ring of process "
                f"{os.getpid() + 1}; must be of process {os.getpid()}"):
            RingReader(self.ring.path)

    def take(self, reader, times, **kwargs):
        profile = times.take(reader, **kwargs)
        return [] if profile is None else list(profile.points)

    def test_kernels_of_a_step_are_shared_out_over_its_passes(self):
        now = [0.0]
        times = LayerTimes("host", 6.0, lambda: now[0])
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        times.step(0)
        for _ in range(3):
            times.layer(LAYER)
        times.step(1)
        self.ring.write(0, LAYER, 1000, name=b"gemm")
        self.ring.write(0, LAYER, 500, name=b"add")
        self.ring.write(0, "no layer", 77)
        self.assertEqual([], self.take(reader, times), "not settled")
        self.ring.write(0, LAYER, 1, name=b"late")
        now[0] = 7.0
        [point] = self.take(reader, times)
        self.assertEqual((3, 1501, 500), (point.count, point.total_ns,
                                          point.median_ns))
        self.assertEqual(layer_key(LAYER), point.key.layer)
        self.assertEqual([], self.take(reader, times, everything=True))

    def test_a_record_that_the_agent_held_is_still_counted(self):
        now = [0.0]
        times = LayerTimes("host", clock=lambda: now[0])
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        times.step(0)
        times.layer(LAYER)
        times.step(1)
        self.ring.write(0, LAYER, 1000)
        now[0] = 3.0
        self.assertEqual([], self.take(reader, times))
        # Taken in at the end of the agent's grace, held for its last straggler.
        text = (ROOT / "profiler" / "cupti" / "agent.h").read_text()
        grace_s = int(re.search(r" grace_ms = (\d+);", text)[1]) / 1000
        stragglers = int(re.search(r" kStragglers = (\d+);", text)[1])
        now[0] = grace_s + (stragglers + 1) * grace_s
        self.assertEqual([], self.take(reader, times))
        self.ring.write(0, LAYER, 9000)
        now[0] += 2.0
        [point] = self.take(reader, times)
        self.assertEqual(10_000, point.total_ns)

    def test_a_long_annotation_is_found_as_its_record_holds_it(self):
        # As agent_test.cc has it.
        short = as_in_record("pw:module=" + "m" * 300)
        self.assertEqual("pw:module=" + "m" * 204 + "~0852f0792d9d1771", short)
        self.assertEqual(LAYER, as_in_record(LAYER))
        annotation = LAYER.replace("text", "m" * 200)
        times = LayerTimes("host")
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        times.step(0)
        times.layer(annotation)
        self.ring.write(0, as_in_record(annotation), 1000)
        [point] = self.take(reader, times, everything=True)
        self.assertEqual(layer_key(annotation), point.key.layer)

    def test_nothing_is_kept_of_settled_steps(self):
        now = [0.0]
        times = LayerTimes("host", 6.0, lambda: now[0])
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        for step in range(100):
            times.step(step)
            times.layer(LAYER)
            self.ring.write(step, LAYER, 1000)
            self.ring.write(step, "optimizer", 77)
            self.ring.write(step, "", 5)
            self.take(reader, times)
            now[0] += 10.0
        times.step(100)
        now[0] += 10.0
        self.take(reader, times)
        kept = {name: len(value) for name, value in vars(times).items()
                if isinstance(value, dict)}
        self.assertEqual(1, sum(kept.values()), kept)

    def test_steps_with_losses_say_nothing(self):
        times = LayerTimes("host")
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        times.step(0)
        times.layer(LAYER)
        self.ring.write(0, LAYER, 1000)
        self.ring.count(DROPPED, 2)
        self.assertEqual([], self.take(reader, times, everything=True))
        self.assertEqual(1, times.steps_left_out)
        times.step(1)
        times.layer(LAYER)
        self.ring.write(1, LAYER, 1000)
        self.assertEqual(1, len(self.take(reader, times, everything=True)))

    def test_a_step_that_lost_a_part_says_nothing_of_the_rest(self):
        times = LayerTimes("host")
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        for step, word in enumerate((DROPPED, LOST, YIELDS)):
            with self.subTest(word=word):
                times.step(step)
                for _ in range(5):
                    times.layer(LAYER)
                self.ring.write(step, LAYER, 5000)
                self.ring.count(word, 1)
                self.assertEqual([], self.take(reader, times))
                for _ in range(5):
                    times.layer(LAYER)
                self.ring.write(step, LAYER, 1000)
                self.assertEqual([], self.take(reader, times, everything=True))
                self.assertEqual(step + 1, times.steps_left_out)

    def test_a_step_begun_again_before_it_is_settled_says_nothing(self):
        times = LayerTimes("host")
        reader = RingReader(self.ring.path)
        self.addCleanup(reader.close)
        for step in (3, 4, 3):
            times.step(step)
            times.layer(LAYER)
            self.ring.write(step, LAYER, 1000)
        [point] = self.take(reader, times, everything=True)
        self.assertEqual((1, 1000), (point.count, point.total_ns))
        self.assertEqual(1, times.steps_left_out)


class HooksTest(unittest.TestCase):
    """CuptiHooks over a library that only has a state."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        source = pathlib.Path(folder.name) / "fake.c"
        source.write_text("""
            #include <stddef.h>
            #include <stdint.h>
            int state;
            void pw_cupti_start(void) {}
            void pw_cupti_stop(void) {}
            void pw_cupti_step(int64_t n) {}
            void pw_cupti_push(const char* a) {}
            void pw_cupti_pop(void) {}
            int pw_cupti_status(char* reason, size_t bytes) { return state; }
            """)
        cls.library = str(pathlib.Path(folder.name) / "libfake.so")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", cls.library,
                        str(source)], check=True)
        cls.state = ctypes.c_int.in_dll(ctypes.CDLL(cls.library), "state")

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.ring = Ring(self.folder)
        self.state.value = 1
        self.use(self.ring.path)

    def use(self, path):
        patch = mock.patch.dict(os.environ, PIPEWEAVER_CUPTI_RING=path)
        patch.start()
        self.addCleanup(patch.stop)

    def train(self, ring):
        """What a training of one step uploads."""
        sent = []
        hooks = CuptiHooks(self.library, sent.append)
        hooks.step(0)
        hooks.layer_begin(LAYER)
        ring.write(0, LAYER, 1000)
        hooks.layer_end()
        hooks.close()
        return [point.total_ns for profile in sent for point in profile.points]

    def test_reads_the_agents_ring(self):
        self.assertEqual([1000], self.train(self.ring))

    def test_training_goes_on_without_a_ring_to_be_trusted(self):
        os.chmod(self.ring.path, 0o644)
        with self.assertLogs("pipeweaver") as logs:
            self.assertEqual([], self.train(self.ring))
        self.assertIn(f"{self.ring.path}: has mode 0644", logs.output[0])

    def test_a_ring_left_by_a_killed_run_is_not_read(self):
        # Of the same process id, as in a container that was started again.
        self.state.value = 0
        self.assertEqual([], self.train(self.ring))

    def test_a_planted_file_does_not_hide_the_agents(self):
        self.use("")
        planted = Ring(self.folder, name="ring-2")
        os.chmod(planted.path, 0o666)
        planted.write(0, LAYER, 7)
        with mock.patch("glob.glob",
                        return_value=[self.ring.path, planted.path]):
            with self.assertLogs("pipeweaver") as logs:
                self.assertEqual([1000], self.train(self.ring))
        self.assertIn(f"{planted.path}: has mode 0666", logs.output[0])


class ProfileRecordsTest(unittest.TestCase):

    def test_annotations_that_name_no_layer(self):
        for text in ("forward", "pw:", "pw:module=a,layer=b", LAYER + ",x=1",
                     LAYER + ",tokens=3", LAYER.replace("64", "-1"),
                     LAYER.replace("=forward", "=sideways"),
                     LAYER.replace("=64", "=" + "9" * 30)):
            self.assertIsNone(layer_key(text), text)
        key = layer_key(LAYER)
        self.assertEqual(("text", "transformer", 64), (key.module, key.layer,
                                                       key.tokens))

    def test_fields_in_another_order_are_the_same_pass(self):
        records = ProfileRecords("cupti_agent", "host")
        records.add(LAYER, 10)
        head, _, rest = LAYER[3:].partition(",")
        records.add(f"pw:{rest},{head}", 30)
        records.add("no layer", 1)
        profile = records.take()
        [point] = profile.points
        self.assertEqual((2, 10, 30, 40), (point.count, point.min_ns,
                                           point.max_ns, point.total_ns))
        self.assertEqual(1, records.left_out)
        self.assertIsNone(records.take())

    def test_memory_is_bounded(self):
        records = ProfileRecords("cupti_agent", "host", most_layers=1)
        records.add(LAYER, 1)
        records.add(LAYER.replace("64", "65"), 1)
        records.add(LAYER, 1)
        self.assertEqual(1, records.left_out)
        self.assertEqual(2, records.take().points[0].count)


NEEDED = (AGENT, FAKE, BINARY)
for needed in NEEDED:
    if not needed.exists():
        print(f"skipped: {needed} is missing")


@unittest.skipUnless(all(x.exists() for x in NEEDED), "not built")
class EndToEndTest(unittest.TestCase):

    def test_kernels_measured_in_the_trainer_reach_the_planner(self):
        ring = os.path.join(tempfile.mkdtemp(), "ring")
        os.environ.update(PIPEWEAVER_CUPTI_RING=ring, PIPEWEAVER_CUPTI_DUTY="1/2",
                          PIPEWEAVER_CUPTI_LIBRARY=str(FAKE))
        fake = ctypes.CDLL(str(FAKE))
        fake.fake_cupti_launch.argtypes = [ctypes.c_char_p, ctypes.c_uint64,
                                           ctypes.c_int]
        port = free_port()
        server = start_real(port)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        job = models.make_job("vlm", 2, name="measured")
        address = f"127.0.0.1:{port}"
        registration = register(address, job, "run")
        sent = []
        with StepAgent(address, job, 0, registration) as agent:
            def upload(profile):
                sent.append(profile)
                agent.upload_profile(profile)

            hooks = CuptiHooks(str(AGENT), upload)
            for step in range(4):  # every other one is traced
                hooks.step(step)
                half = LAYER.replace("items=2,tokens=64,sum_squares=2048",
                                     "items=1,tokens=32,sum_squares=1024")
                for tokens, annotation in (64, LAYER), (64, LAYER), (32, half):
                    hooks.layer_begin(annotation)
                    fake.fake_cupti_launch(b"gemm", 1000 * tokens, 0)
                    fake.fake_cupti_launch(b"gelu", 10 * tokens, 0)
                    hooks.layer_end()
                fake.fake_cupti_launch(b"optimizer", 7, 0)
            hooks.close()
            self.assertFalse(os.path.exists(ring))
            points = {p.key.layer.tokens: p for p in sent[-1].points}
            self.assertEqual({32, 64}, set(points))
            # Steps 0 and 2.
            self.assertEqual((4, 4 * 64_640), (points[64].count,
                                               points[64].total_ns))
            self.assertEqual((2, 32_320), (points[32].count,
                                           points[32].median_ns))
            deadline = time.monotonic() + 30
            costs = None
            while time.monotonic() < deadline:
                costs = agent._client.call(
                    "DescribeJob", service.DescribeJobRequest(job="measured"),
                    5.0).costs
                if costs.version:
                    break
                time.sleep(0.05)
            self.assertEqual(2, costs.measured_layers, costs)
            self.assertNotIn("profiles_lost", agent.counters)


if __name__ == "__main__":
    unittest.main()
