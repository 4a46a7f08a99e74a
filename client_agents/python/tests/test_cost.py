"""What the agent costs a trainer: time on the critical path, memory a rank."""

import random
import re
import statistics
import subprocess
import sys
import time
import unittest

import models
from pipeweaver import PLAN, AgentOptions, StepAgent, register
from pipeweaver.job import JobView
from pipeweaver.torch import PipelineExecutor
from ranks import run_ranks
from test_agent import free_port, start_server

MICROBATCHES = 16


def resident_bytes():
    with open("/proc/self/status", encoding="ascii") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024


def measure(rank, transport, port):
    job = JobView(models.make_job("vlm", 4))
    executor = PipelineExecutor(
        job, 0, models.pipeline_modules(
            job, models.build_model(job, "vlm", 1, models.torch.float32), 0),
        transport)
    batch = models.make_batch(job.job, random.Random(0), MICROBATCHES)
    before = resident_bytes()
    server = f"127.0.0.1:{port}"
    critical, submits = [], []
    with StepAgent(server, job.job, 0, register(server, job.job, "run"),
                   submits=True, options=AgentOptions(
                       prepare=executor.prepare, needed_in_s=20,
                       call_timeout_s=60)) as agent:
        for step in range(5):
            begin = time.perf_counter()
            agent.submit(step, batch)
            submits.append(time.perf_counter() - begin)
            if not agent.wait(step, 60.0):
                raise AssertionError("no plan")
            begin = time.perf_counter()
            token = agent.vote(step)
            agent.settle(step, token, token)
            program = agent.program(step)
            agent.report(step, 1, [0] * 10, [0] * 10)
            critical.append(time.perf_counter() - begin)
            if program.origin != PLAN:
                raise AssertionError("not the plan")
        held = resident_bytes() - before
    return critical, submits, held


class CostTest(unittest.TestCase):

    def test_under_a_millisecond_and_fifty_megabytes(self):
        port = free_port()
        server = start_server(port, {})
        try:
            [(critical, submits, held)] = run_ranks(1, "none", measure, port)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
        # What importing the package adds beside torch.
        imported = int(subprocess.run(
            [sys.executable, "-c",
             "import torch, sys, re\n"
             "rss = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', "
             "open('/proc/self/status').read())[1]) * 1024\n"
             "before = rss()\n"
             "import pipeweaver, pipeweaver.torch\n"
             "print(rss() - before)"], check=True, stdout=subprocess.PIPE,
            text=True).stdout)
        median = statistics.median(critical)
        print(f"agent: {median * 1e6:.0f} us a step on the critical path "
              f"(worst {max(critical) * 1e6:.0f}), submit "
              f"{statistics.median(submits) * 1e3:.1f} ms for {MICROBATCHES} "
              f"microbatches, {(held + imported) / 1e6:.1f} MB a rank")
        self.assertLess(median, 1e-3)
        self.assertLess(held + imported, 50e6)


if __name__ == "__main__":
    unittest.main()
