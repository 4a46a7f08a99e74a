"""Two replicas train under the real planner, which moves microbatches between
them, and under plans of their own, reducing gradients as chunks are announced.

Ranks are forked: no agent is made in this process.
"""

import copy
import random
import unittest

import torch
import torch.distributed as dist

import models
import plans
from pipeweaver import PLAN, SAFE, AgentOptions, StepAgent, register
from pipeweaver.job import JobView
from pipeweaver.program import check_program
from pipeweaver.torch import (
    DistributedTransport, ExecutorOptions, PipelineExecutor)
from pipeweaver.torch.collectives import (
    agree, broadcast_metadata, broadcast_registration)
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks
from test_agent import free_port
from test_live import BINARY, start_proxy, start_real, stop
from test_moves import PIPELINE, REPLICAS, pair_job, uneven_batches

DTYPE = torch.float64


def train(world_rank, _, ports, steps, name, late):
    """Trains as rank `world_rank` of all ranks of all replicas; answers losses
    (pipeline, plain), and of each step what ran and the origins.

    late: replica 1 submits when replica 0 holds its plan, and the planner waits
    for nobody.
    """
    replica, rank = divmod(world_rank, PIPELINE)
    everyone = dist.new_group(range(REPLICAS * PIPELINE))
    groups = [dist.new_group([r * PIPELINE + i for i in range(PIPELINE)])
              for r in range(REPLICAS)]
    peers = [dist.new_group([r * PIPELINE + i for r in range(REPLICAS)])
             for i in range(PIPELINE)]
    first = replica * PIPELINE
    job = JobView(pair_job(name))
    plain = models.build_model(job, "vlm", 1, DTYPE)
    mine = copy.deepcopy(plain)
    my_weights, plain_weights = (
        [p for layers in model for x in layers for p in x.parameters()]
        for model in (mine, plain))
    server = f"127.0.0.1:{ports[world_rank]}"
    registration = None
    if world_rank == 0:
        registration = register(server, job.job, name, 5.0)
    registration = broadcast_registration(registration, 0)
    executor = PipelineExecutor(
        job, rank, models.pipeline_modules(job, mine, rank),
        DistributedTransport([first + i for i in range(PIPELINE)],
                             groups[replica]),
        dtype=DTYPE, options=ExecutorOptions(deterministic=True))
    options = AgentOptions(
        prepare=executor.prepare, call_timeout_s=1.0, needed_in_s=30.0,
        budget_evaluations=10, joint_wait_s=0.0 if late else 20.0,
        move_microbatches=True)
    losses, ran = [], []
    with StepAgent(server, job.job, rank, registration, submits=rank == 0,
                   replica=replica, options=options) as agent:
        for step in range(steps):
            batches = uneven_batches(job.job, step)
            data = [models.Data(job, batch, 2 * step + r, DTYPE)
                    for r, batch in enumerate(batches)]
            if late and replica == 1:
                dist.barrier(everyone)
            agent.submit(step, broadcast_metadata(
                batches[replica] if rank == 0 else None, first,
                groups[replica]))
            agent.wait(step, 3.0)
            if late and replica == 0:
                dist.barrier(everyone)
            agree(agent, step, groups[replica], everyone)
            program = agent.program(step)
            ran.append((program.origin, [program.origin_of(b) for b in range(3)]))

            def sample(module, microbatch, items, program=program, data=data):
                replica, b = program.origin_of(microbatch)
                return data[replica](module, b, items)

            result = executor.run(program.prepared, sample)
            expected = sum(models.reference_step(job, plain, b, d)
                           for b, d in zip(batches, data))
            expected.backward()
            losses.append((0.0 if result.loss is None else float(result.loss),
                           float(expected)))
            with torch.no_grad():
                for p in my_weights:
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    dist.all_reduce(grad, group=peers[rank])
                    p -= 0.05 * grad
                    p.grad = None
                for p in plain_weights:
                    if p.grad is not None:
                        p -= 0.05 * p.grad
                    p.grad = None
        counters = dict(agent.counters)
    return losses, ran, counters


def reduce_announced(world_rank, _, steps):
    """As rank `world_rank` of all ranks of all replicas, runs each replica's
    [batch, programs] of a step; its chunks' gradients, reduced over the replicas
    from when they are announced, are the plain model's on all batches."""
    replica, rank = divmod(world_rank, PIPELINE)
    groups = [dist.new_group([r * PIPELINE + i for i in range(PIPELINE)])
              for r in range(REPLICAS)]
    peers = [dist.new_group([r * PIPELINE + i for r in range(REPLICAS)])
             for i in range(PIPELINE)]
    job = JobView(pair_job())
    plain = models.build_model(job, "vlm", 1, DTYPE)
    mine = copy.deepcopy(plain)
    reductions = []

    def grads_ready(*chunk):
        weights = executor._runners[chunk].parameters
        total = torch.cat([(torch.zeros_like(p) if p.grad is None else
                            p.grad).flatten() for p in weights])
        reductions.append((chunk, total, dist.all_reduce(
            total, group=peers[rank], async_op=True)))

    executor = PipelineExecutor(
        job, rank, models.pipeline_modules(job, mine, rank),
        DistributedTransport(
            [replica * PIPELINE + i for i in range(PIPELINE)],
            groups[replica]),
        dtype=DTYPE, options=ExecutorOptions(grads_ready=grads_ready))
    for step, replicas in enumerate(steps):
        data = [models.Data(job, batch, 2 * step + r, DTYPE)
                for r, (batch, _) in enumerate(replicas)]
        batch, programs = replicas[replica]
        executor.run(executor.prepare(check_program(
            programs[rank], programs[rank].identity.key, rank), batch),
            data[replica])
        sum(models.reference_step(job, plain, b, d)
            for (b, _), d in zip(replicas, data)).backward()
        for (m, s, k), total, reduction in reductions:
            reduction.wait()
            chunk = job.chunks[m][s][k]
            expected = torch.cat([
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for layer in plain[m][chunk.first_layer:
                                      chunk.first_layer + chunk.num_layers]
                for p in layer.parameters()])
            torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
        reductions.clear()
        for p in (p for model in (mine, plain) for layers in model
                  for x in layers for p in x.parameters()):
            p.grad = None


class ReducedGradientsTest(unittest.TestCase):

    def test_replicas_with_different_plans(self):
        view = JobView(pair_job())
        steps, ends = [], []
        for step in range(6):
            steps.append([])
            for r in range(REPLICAS):
                seed = REPLICAS * step + r
                batch = models.make_batch(view.job, random.Random(seed), 3)
                key = plan_pb2.PlanKey(job="pair", step=step, replica=r)
                made = plans.random_plan(view, batch, seed, key=key)
                steps[-1].append((batch, made))
                ends.append([plans.chunk_ends(check_program(p, key, rank))
                             for rank, p in enumerate(made)])
        # The plans end chunks in differing orders.
        self.assertGreater(sum(a != b for a, b in zip(ends[::2], ends[1::2])), 3)
        run_ranks(REPLICAS * PIPELINE, "gloo", reduce_announced, steps)


@unittest.skipUnless(BINARY.exists(), f"{BINARY} is missing")
class TwoReplicasTest(unittest.TestCase):

    def setUp(self):
        self.port = free_port()
        self.server = start_real(self.port)
        self.addCleanup(stop, self.server)

    def trained(self, steps, ports=None, late=False):
        """What each step ran, and [replica][step] its origins; losses are the
        plain model's on both batches."""
        answers = run_ranks(
            REPLICAS * PIPELINE, "gloo", train, ports or [self.port] * 4, steps,
            self.id().rsplit(".", 1)[1], late, timeout_s=180)
        for step in zip(*(a[0] for a in answers)):
            total = sum(loss for loss, _ in step)
            self.assertLess(abs(total - step[0][1]), 1e-9 * abs(step[0][1]))
        programs = [[program for program, _ in a[1]] for a in answers]
        self.assertEqual(programs, [programs[0]] * 4)
        origins = [[origins for _, origins in a[1]] for a in answers]
        self.assertEqual(origins[0], origins[1])
        self.assertEqual(origins[2], origins[3])
        for mine, theirs in zip(origins[0], origins[2]):
            self.assertEqual(sorted(mine + theirs), [
                (r, b) for r in range(REPLICAS) for b in range(3)])
        self.counters = [a[2] for a in answers]
        return programs[0], [origins[0], origins[2]]

    def test_all_arrive(self):
        ran, origins = self.trained(5)
        self.assertEqual(ran, [PLAN] * 5, self.counters)
        moved = [any(replica != 0 for replica, _ in step)
                 for step in origins[0]]
        self.assertIn(True, moved)

    def test_one_rank_of_one_replica_has_no_plan(self):
        port = free_port()
        proxy = start_proxy("fault_proxy.py", port, self.port,
                            '{"lose": [[1, 1]]}')
        self.addCleanup(stop, proxy)
        ran, origins = self.trained(3, [self.port] * 3 + [port])
        self.assertEqual(ran, [PLAN, SAFE, PLAN], self.counters)
        own = [(0, b) for b in range(3)]
        self.assertEqual(origins[0][1], own)
        self.assertNotEqual(origins[0][0], own)
        self.assertEqual(self.counters[0]["replicas_disagreed"], 1)

    def test_a_replica_comes_too_late(self):
        ran, origins = self.trained(3, late=True)
        self.assertEqual(ran, [PLAN] * 3, self.counters)
        for r, steps in enumerate(origins):
            self.assertEqual(steps, [[(r, b) for b in range(3)]] * 3)


if __name__ == "__main__":
    unittest.main()
