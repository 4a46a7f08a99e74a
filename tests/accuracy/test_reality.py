"""Tests of the accuracy program's parts that are not timing, and one run of all
of it that judges nothing but that it ends with figures.

The latter needs the server's binary: environment PIPEWEAVER_SERVER_BINARY, by
default bazel-bin/server/pipeweaver_server.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

import reality
from reality import Case, Step, replay, summary

BINARY = pathlib.Path(os.environ.get(
    "PIPEWEAVER_SERVER_BINARY",
    reality.ROOT / "bazel-bin" / "server" / "pipeweaver_server"))


class ReplayTest(unittest.TestCase):

    def test_a_transfer_takes_its_time_from_its_post(self):
        self.assertEqual(110, replay([
            [Step("run", 30), Step("send", 50, 1), Step("run", 20)],
            [Step("recv", transfer=1), Step("run", 30)]]))

    def test_what_came_early_is_not_waited_for(self):
        self.assertEqual(120, replay([
            [Step("send", 5, 1), Step("run", 10)],
            [Step("run", 100), Step("recv", transfer=1), Step("run", 20)]]))

    def test_back_and_forth(self):
        self.assertEqual(5 * 10 + 4 * 1, replay([
            [Step("run", 10), Step("send", 1, 0), Step("recv", transfer=1),
             Step("run", 10), Step("send", 1, 2), Step("recv", transfer=3),
             Step("run", 10)],
            [Step("recv", transfer=0), Step("run", 10), Step("send", 1, 1),
             Step("recv", transfer=2), Step("run", 10), Step("send", 1, 3)]]))

    def test_a_cycle_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "wait for each other"):
            replay([[Step("recv", transfer=0), Step("send", 1, 1)],
                    [Step("recv", transfer=1), Step("send", 1, 0)]])


class FiguresTest(unittest.TestCase):

    def test_errors_are_of_medians_and_few_runs_do_not_count(self):
        cases = [
            Case("a", [100, 110, 90], {"calibrated": 102, "analytic": 150}),
            Case("b", [200, 200, 200], {"calibrated": 200, "analytic": 100}),
            Case("c", [100, 100], {"calibrated": 500, "analytic": 500})]
        found = summary(cases)
        self.assertEqual((3, 2), (found["cases"], found["judged"]))
        self.assertAlmostEqual(0.01, found["calibrated"]["mean_error"])
        self.assertEqual("a", found["calibrated"]["worst_case"])
        self.assertAlmostEqual(0.02, found["calibrated"]["worst_error"])
        self.assertAlmostEqual(0.5, found["analytic"]["mean_error"])
        self.assertAlmostEqual(0.05, found["spread"])
        self.assertAlmostEqual(0.075, found["limit"])
        self.assertTrue(found["met"])

    def test_without_spread_the_target_is_the_papers(self):
        found = summary([Case("a", [1000] * 3, {"calibrated": 1025})])
        self.assertAlmostEqual(0.024, found["limit"])
        self.assertFalse(found["met"])

    def test_nothing_to_judge(self):
        self.assertEqual({"cases": 1, "judged": 0},
                         summary([Case("a", [1], {"calibrated": 1})]))


class ForeignTest(unittest.TestCase):

    def test_busy_counts_all_but_idle_and_waiting(self):
        self.assertEqual(2.0, reality.busy_seconds(
            "cpu  100 20 30 9999 9999 10 20 20 7 7", 100))

    def test_process_names_may_hold_anything(self):
        fields = ["S"] + ["1"] * 10 + ["250", "50"] + ["9"] * 20
        self.assertEqual(3.0, reality.process_seconds(
            "17 (a ) b) " + " ".join(fields), 100))

    def test_own_work_is_not_foreign(self):
        watch_own = reality.Watch([os.getpid()])
        watch_nobody = reality.Watch([])
        begun, used = time.monotonic(), time.process_time()
        while time.process_time() - used < 0.3:
            sum(range(10_000))
        foreign, all_busy = watch_own.foreign_share(), watch_nobody.foreign_share()
        wall = time.monotonic() - begun
        # What one counts and the other does not is this process.
        self.assertGreater(all_busy - foreign,
                           0.5 * 0.3 / (wall * (os.cpu_count() or 1)))


@unittest.skipUnless(BINARY.exists(), f"{BINARY} is missing")
class RealityTest(unittest.TestCase):

    def test_runs_from_profile_to_figures(self):
        with tempfile.NamedTemporaryFile() as out:
            done = subprocess.run(
                [sys.executable, reality.__file__, f"--server={BINARY}",
                 "--cases=3", "--fit-steps=2", "--fit-runs=1", "--minutes=0",
                 "--foreign=1", f"--out={out.name}"], timeout=600,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            # What it measures here is not judged.
            self.assertIn(done.returncode, (0, 1), done.stdout)
            found = json.load(out)
        self.assertEqual(3, found["judged"])
        self.assertGreater(found["measured_share"], 0.5)
        self.assertGreater(found["stages"], 0)
        # The replay knows what the planner's emulator does.
        self.assertLess(found["replay_error"], 0.02)
        for run in found["runs"]:
            self.assertEqual(reality.RUNS, len(run["measured_ns"]))


if __name__ == "__main__":
    unittest.main()
