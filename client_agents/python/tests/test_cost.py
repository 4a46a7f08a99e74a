"""What the agent costs a trainer: time on the critical path, memory a rank.

Prints both; holds the memory to its limit, and the time, which a busy machine
stretches, in the critical thread's own CPU time.
"""

import random
import re
import statistics
import subprocess
import sys
import time
import unittest

import models
from pipeweaver import PLAN, SAFE, AgentOptions, StepAgent, register
from pipeweaver.job import JobView
from pipeweaver.torch import PipelineExecutor
from ranks import run_ranks
from test_agent import free_port, start_server
from test_executor import NoTransport

MICROBATCHES = 16


def resident_bytes():
    with open("/proc/self/status", encoding="ascii") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) * 1024


def measure(rank, transport, port):
    job = JobView(models.make_job("vlm", 4))
    executor = PipelineExecutor(
        job, 0, models.pipeline_modules(
            job, models.build_model(job, "vlm", 1, models.torch.float32), 0),
        NoTransport())
    batch = models.make_batch(job.job, random.Random(0), MICROBATCHES)
    before = resident_bytes()
    server = f"127.0.0.1:{port}"
    critical, cpu, submits, fallbacks = [], [], [], []
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
            begin, cpu_begin = time.perf_counter(), time.thread_time()
            token = agent.vote(step)
            agent.settle(step, token, token)
            program = agent.program(step)
            agent.report(step, 1, [0] * 10, [0] * 10)
            critical.append(time.perf_counter() - begin)
            cpu.append(time.thread_time() - cpu_begin)
            if program.origin != PLAN:
                raise AssertionError("not the plan")
        for step in range(5, 10):  # the ranks disagree
            agent.submit(step, batch)
            agent.wait(step, 60.0)
            agent.vote(step)
            begin = time.perf_counter()
            agent.settle(step, 0, 1)
            if agent.program(step).origin != SAFE:
                raise AssertionError("not the safe program")
            fallbacks.append(time.perf_counter() - begin)
        held = resident_bytes() - before
    return critical, cpu, submits, fallbacks, held


class CostTest(unittest.TestCase):

    def test_under_a_millisecond_and_fifty_megabytes(self):
        port = free_port()
        server = start_server(port, {})
        try:
            [(critical, cpu, submits, fallbacks, held)] = run_ranks(
                1, "none", measure, port)
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
        median = statistics.median
        print(f"agent: {median(critical) * 1e6:.0f} us a step on the critical "
              f"path (worst {max(critical) * 1e6:.0f}), "
              f"{median(fallbacks) * 1e6:.0f} us to the safe program, submit "
              f"{median(submits) * 1e3:.1f} ms for {MICROBATCHES} "
              f"microbatches, {(held + imported) / 1e6:.1f} MB a rank")
        self.assertLess(median(cpu), 1e-3)
        self.assertLess(held + imported, 50e6)


if __name__ == "__main__":
    unittest.main()
