"""What `pip install` puts there, and that it works without torch."""

import pathlib
import subprocess
import sys
import tempfile
import unittest
import zipfile

FOLDER = pathlib.Path(__file__).resolve().parents[1]
PROTOCOL = ("batch", "job", "plan", "planner_service")


class InstallTest(unittest.TestCase):

    def test_wheel_has_the_package_and_nothing_else(self):
        sources = {str(path.relative_to(FOLDER)) for path in
                   (FOLDER / "pipeweaver").rglob("*")
                   if path.suffix == ".py" or path.name == "py.typed"}
        self.assertIn("pipeweaver/py.typed", sources)
        self.assertLessEqual(
            {f"pipeweaver/v1/{name}_pb2.py" for name in PROTOCOL}, sources)
        with tempfile.TemporaryDirectory() as target:
            subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps",
                 "--no-build-isolation", "-w", target, str(FOLDER)], check=True)
            [wheel] = pathlib.Path(target).iterdir()
            with zipfile.ZipFile(wheel) as archive:
                found = set(archive.namelist())
                [metadata] = [archive.read(n).decode() for n in found
                              if n.endswith("METADATA")]
        self.assertEqual({n for n in found if ".dist-info/" not in n}, sources)
        required = [line.split()[1] for line in metadata.splitlines()
                    if line.startswith("Requires-Dist:") and "extra" not in line]
        self.assertEqual(sorted(x.split(">=")[0].strip("(") for x in required),
                         ["grpcio", "protobuf"])

    def test_installed_from_the_folder_it_runs_without_torch(self):
        with tempfile.TemporaryDirectory() as target:
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                 "--no-build-isolation", "--target", target, str(FOLDER)],
                check=True)
            out = subprocess.run(
                [sys.executable, "-c",
                 "import sys; sys.modules['torch'] = None; import pipeweaver; "
                 "print(pipeweaver.__file__)"],
                check=True, cwd=target, stdout=subprocess.PIPE, text=True,
                env={"PYTHONPATH": target}).stdout
            self.assertTrue(out.startswith(target), out)


if __name__ == "__main__":
    unittest.main()
