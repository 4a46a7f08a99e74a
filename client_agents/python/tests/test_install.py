"""What `pip install` puts there, and that it works without torch."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
PROTOCOL = ("batch", "job", "plan", "profile", "planner_service")


class InstallTest(unittest.TestCase):

    def setUp(self):
        """A checkout in which nothing has been generated yet."""
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.target = pathlib.Path(temporary.name) / "target"
        checkout = pathlib.Path(temporary.name) / "checkout"
        self.folder = checkout / "client_agents" / "python"
        shutil.copytree(
            REPOSITORY / "client_agents" / "python", self.folder,
            ignore=shutil.ignore_patterns("v1", "build", "*.egg-info",
                                          "__pycache__"))
        shutil.copytree(REPOSITORY / "proto", checkout / "proto")

    def pip(self, *arguments):
        subprocess.run([sys.executable, "-m", "pip", arguments[0], "-q",
                        "--no-deps", "--no-build-isolation", *arguments[1:],
                        str(self.target), str(self.folder)], check=True)

    def test_wheel_has_the_package_and_nothing_else(self):
        sources = {str(path.relative_to(self.folder)) for path in
                   (self.folder / "pipeweaver").rglob("*.py")}
        sources |= {f"pipeweaver/v1/{name}_pb2.py" for name in PROTOCOL}
        sources |= {"pipeweaver/v1/__init__.py", "pipeweaver/py.typed"}
        self.pip("wheel", "-w")
        [wheel] = self.target.iterdir()
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
        self.pip("install", "--target")
        out = subprocess.run(
            [sys.executable, "-c",
             "import sys; sys.modules['torch'] = None; import pipeweaver; "
             "print(pipeweaver.__file__)"],
            check=True, cwd=self.target, stdout=subprocess.PIPE, text=True,
            env={"PYTHONPATH": str(self.target)}).stdout
        self.assertTrue(out.startswith(str(self.target)), out)


if __name__ == "__main__":
    unittest.main()
