"""The README's code calls what there is, and never exchanges host tensors over the
default group, which may be NCCL's."""

import ast
import inspect
import pathlib
import re
import textwrap
import unittest

import pipeweaver
import pipeweaver.torch
from pipeweaver.job import JobView
from pipeweaver.torch import collectives
from pipeweaver.torch.megatron import MegatronAdapter

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
# What names in the code stand for.
KNOWN = {**vars(pipeweaver), **vars(pipeweaver.torch), **vars(collectives),
         "JobView": JobView, "MegatronAdapter": MegatronAdapter}
RECEIVERS = {"pipeweaver": pipeweaver, "agent": pipeweaver.StepAgent,
             "builder": pipeweaver.MetadataBuilder, "view": JobView,
             "program": pipeweaver.StepProgram, "adapter": MegatronAdapter,
             "executor": pipeweaver.torch.PipelineExecutor}


def calls():
    """(function, arguments of the call bound to its parameters)."""
    for block in re.findall(r"^ *```python\n(.*?)^ *```", README.read_text(),
                            re.M | re.S):
        for call in ast.walk(ast.parse(textwrap.dedent(block))):
            if not isinstance(call, ast.Call):
                continue
            function, arguments = None, list(call.args)
            if isinstance(call.func, ast.Name):
                function = KNOWN.get(call.func.id)
            elif (isinstance(call.func, ast.Attribute) and
                  isinstance(call.func.value, ast.Name)):
                owner = RECEIVERS.get(call.func.value.id)
                if owner is None:
                    continue
                function = getattr(owner, call.func.attr)
                if inspect.isclass(owner) and not isinstance(
                        inspect.getattr_static(owner, call.func.attr),
                        staticmethod):
                    arguments.insert(0, owner)
            if function is not None:
                yield function, inspect.signature(function).bind(
                    *arguments, **{k.arg: k.value for k in call.keywords})


class ReadmeTest(unittest.TestCase):

    def test_calls_fit_and_exchanges_name_their_group(self):
        found = set()
        for function, bound in calls():
            found.add(function)
            if inspect.getmodule(function) is collectives:
                self.assertIn("group", bound.arguments, function)
            if function is pipeweaver.torch.PipelineExecutor:
                self.assertLessEqual({"device", "dtype"}, set(bound.arguments))
        self.assertLessEqual(
            {pipeweaver.register, collectives.broadcast_registration,
             collectives.broadcast_metadata, collectives.agree,
             pipeweaver.torch.PipelineExecutor, pipeweaver.StepAgent,
             pipeweaver.StepAgent.report}, found)


if __name__ == "__main__":
    unittest.main()
