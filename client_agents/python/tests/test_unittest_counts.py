"""What runners of tests count, by real runs of unittest."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

COUNTS = pathlib.Path(__file__).resolve().parent / "unittest_counts.sh"


class CountsTest(unittest.TestCase):

    def counts(self, source):
        """(passed, failed, skipped) of a module of tests."""
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "test_some.py").write_text(
                "import unittest\n" + source)
            script = (f'source "{COUNTS}"; '
                      f'"{sys.executable}" -m unittest test_some >log 2>&1; '
                      'count_tests log $?; '
                      'echo $tests_passed $tests_failed $tests_skipped')
            done = subprocess.run(
                ["bash", "-uc", script],
                cwd=folder, env={**os.environ, "PYTHONPATH": folder},
                stdout=subprocess.PIPE, text=True, check=True)
        return tuple(map(int, done.stdout.split()))

    def test_skipped_tests_have_not_passed(self):
        tests = """
class Test(unittest.TestCase):
    def test_a(self): pass
    def test_b(self): pass
    def test_c(self): self.skipTest("not here")
"""
        self.assertEqual(self.counts(tests), (2, 0, 1))
        self.assertEqual(self.counts(tests + "    def test_d(self): 1 / 0\n"),
                         (2, 1, 1))
        self.assertEqual(self.counts(
            tests.replace("class", "@unittest.skip('all')\nclass")), (0, 0, 3))

    def test_a_module_that_does_not_load_has_failed(self):
        self.assertEqual(self.counts("import nothing_of_that_name\n"), (0, 1, 0))

    def test_a_run_that_was_ended_has_failed(self):
        self.assertEqual(self.counts("import os\nos._exit(1)\n"), (0, 1, 0))


if __name__ == "__main__":
    unittest.main()
