"""Build step of the package: generates the protocol's Python classes.

The rest of the build is declared in pyproject.toml. `python3 setup.py protos`
writes the classes into the source tree, for running without an installation.
"""

import os
import pathlib
import shutil
import subprocess

from setuptools import Command, setup
from setuptools.command.egg_info import egg_info

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = ["job", "batch", "plan", "profile", "planner_service"]


class GenerateProtos(Command):
    description = "generate pipeweaver/v1 from ../../proto with protoc"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        protoc = os.environ.get("PROTOC") or shutil.which("protoc")
        if not protoc:
            raise SystemExit(
                "protoc was not found: install it (Debian: protobuf-compiler) "
                "or name it in the environment variable PROTOC")
        root = HERE.parent.parent / "proto"
        if not root.is_dir():
            raise SystemExit(f"{root} was not found: install from a checkout")
        files = [str(root / "pipeweaver" / "v1" / f"{name}.proto")
                 for name in PROTOS]
        subprocess.run(
            [protoc, f"-I{root}", f"--python_out={HERE}", *files], check=True)
        (HERE / "pipeweaver" / "v1" / "__init__.py").write_text(
            '"""The wire protocol, generated from proto/pipeweaver/v1."""\n')


class EggInfo(egg_info):
    """The first command of an installation; it looks for the packages."""

    def run(self):
        self.run_command("protos")
        super().run()


setup(cmdclass={"egg_info": EggInfo, "protos": GenerateProtos})
