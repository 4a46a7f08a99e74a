"""Microbatches that move between replicas: what one program and one agent
check."""

import random
import unittest

import models
import plans
from pipeweaver import (
    PLAN, SAFE, AgentOptions, Registration, StepAgent, digest)
from pipeweaver.job import BatchView, JobView
from pipeweaver.program import BadProgram, check_program
from pipeweaver.torch.collectives import agree
from pipeweaver.v1 import batch_pb2, plan_pb2

PIPELINE = 2
REPLICAS = 2


def pair_job(name="pair"):
    job = models.make_job("vlm", PIPELINE, name=name)
    job.parallelism.data_parallel = REPLICAS
    job.executor.moved_microbatches = True
    return job


def uneven_batches(job, step):
    """Of both replicas: the second has the three heaviest of six."""
    batch = models.make_batch(job, random.Random(step), 6)
    view = BatchView(JobView(job), batch)
    order = sorted(range(6), key=lambda b: sum(
        sum(tokens) for tokens in view.microbatches[b].item_tokens))
    return [batch_pb2.BatchMetadata(
        microbatches=[batch.microbatches[b] for b in part])
        for part in (order[:3], order[3:])]


class MovedProgramTest(unittest.TestCase):

    def setUp(self):
        self.job = pair_job()
        mine, theirs = uneven_batches(self.job, 1)
        self.mine = mine
        self.key = plan_pb2.PlanKey(job="pair", attempt=1, step=3)
        # Replica 0 keeps its last microbatch.
        self.moves = plan_pb2.MicrobatchMoves(
            num_microbatches=[3, 3], from_replica=[1, 1, 0, 0, 0, 1],
            from_microbatch=[2, 0, 2, 0, 1, 1])
        self.batch = batch_pb2.BatchMetadata(microbatches=[
            theirs.microbatches[2], theirs.microbatches[0],
            mine.microbatches[2]])

    def program(self, change=None, **identity):
        """Rank 0's program after `change`, with digests that fit."""
        view = JobView(self.job)
        [program, _] = plans.random_plan(
            view, self.batch, 5, identity=plan_pb2.PlanIdentity(
                key=self.key, job_digest=digest.job_digest(self.job),
                layout_digest=digest.canonical_digest(self.job.layout),
                batch_digest=digest.canonical_digest(self.mine), **identity))
        program.moves.CopyFrom(self.moves)
        program.batch.CopyFrom(self.batch)
        program.replica_plan_digests.extend([bytes(32), b"1" * 32])
        if change is not None:
            change(program)
        for name, field in (("moves", "moves_digest"),
                            ("batch", "moved_batch_digest")):
            setattr(program.identity, field,
                    digest.canonical_digest(getattr(program, name)))
        program.plan_digest = digest.plan_digest(
            program.identity, program.split, program.rank_digests)
        program.replica_plan_digests[0] = program.plan_digest
        return program

    def refuses(self, message, change):
        with self.assertRaisesRegex(BadProgram, message):
            check_program(self.program(change), self.key, 0)

    def test_says_where_microbatches_come_from(self):
        checked = check_program(self.program(), self.key, 0)
        self.assertTrue(checked.moved)
        self.assertEqual(checked.origins, ((1, 2), (1, 0), (0, 2)))
        self.assertEqual(checked.origin_of(1), (1, 0))
        [unmoved, _] = plans.random_plan(
            JobView(self.job), self.mine, 5, key=self.key)
        checked = check_program(unmoved, self.key, 0)
        self.assertFalse(checked.moved)
        self.assertEqual(checked.origins, ())
        self.assertEqual(checked.origin_of(1), (0, 1))

    def test_digests_cover_moves_and_batch(self):
        good = self.program()
        self.assertEqual(
            digest.agreement_digest(good), digest.sha256(
                good.identity.moves_digest + good.plan_digest + b"1" * 32))
        for message, change in (
                ("moves: missing", lambda p: p.ClearField("moves")),
                ("batch: missing", lambda p: p.ClearField("batch")),
                ("moves: set", lambda p: p.moves.from_replica.__setitem__(0, 0)),
                ("batch: set", lambda p: p.batch.microbatches.pop()),
                ("plan_digest:", lambda p: p.identity.ClearField(
                    "moves_digest")),
                ("replica_plan_digests:", lambda p: p.ClearField(
                    "replica_plan_digests")),
                ("replica 0's must be plan_digest", lambda p:
                 p.replica_plan_digests.__setitem__(0, bytes(32)))):
            program = plan_pb2.Program()
            program.CopyFrom(good)
            change(program)
            with self.assertRaisesRegex(BadProgram, message):
                check_program(program, self.key, 0)
        [unmoved, _] = plans.random_plan(
            JobView(self.job), self.mine, 5, key=self.key)
        unmoved.replica_plan_digests.append(unmoved.plan_digest)
        with self.assertRaisesRegex(BadProgram, "in a program without moves"):
            check_program(unmoved, self.key, 0)

    def test_each_microbatch_stands_in_one_place(self):
        def put(column, i, value):
            return lambda p: getattr(p.moves, column).__setitem__(i, value)
        self.refuses(r"from_microbatch\[3\]: 2 of replica 0: stands in two "
                     "places", put("from_microbatch", 3, 2))
        self.refuses("3 of replica 1: does not exist",
                     put("from_microbatch", 0, 3))
        self.refuses("2 of replica 2: does not exist", put("from_replica", 0, 2))
        self.refuses("must be the sum of num_microbatches: 6",
                     lambda p: p.moves.from_replica.append(0))
        self.refuses("3 replicas, must be as many as",
                     lambda p: p.moves.num_microbatches.append(0))
        self.refuses("batch.microbatches: 2, must be as many",
                     lambda p: p.batch.microbatches.pop())
        self.refuses(r"replica_plan_digests\[1\]: 1 bytes, must be 32",
                     lambda p: p.replica_plan_digests.__setitem__(1, b"1"))

    def agent(self, **options):
        registration = Registration("run", 1, self.job.layout)
        return StepAgent("127.0.0.1:1", self.job, 0, registration,
                         options=AgentOptions(**options))

    def verified(self, change=None, **options):
        """What an agent that submitted `mine` says of a program."""
        with self.agent(**options) as agent:
            agent.submit(3, self.mine)
            return agent._verify(self.program(change), self.key,
                                 agent._state(3))

    def test_agent_refuses_what_its_replica_knows_better(self):
        moving = {"joint_wait_s": 1.0, "move_microbatches": True}
        self.assertTrue(self.verified(**moving).moved)
        with self.assertRaisesRegex(BadProgram, "was not asked for"):
            self.verified()

        def grow(p):
            p.batch.microbatches[2].items[0].tokens[0] += 1
        with self.assertRaisesRegex(
                BadProgram, r"batch.microbatches\[2\]: not the sizes of "
                "microbatch 2"):
            self.verified(grow, **moving)

        def third(p):
            p.moves.num_microbatches.append(0)
            p.replica_plan_digests.append(b"2" * 32)
        with self.assertRaisesRegex(BadProgram, "has 2 replicas"):
            self.verified(third, **moving)
        with self.assertRaisesRegex(BadProgram, "batch.forward_only: True"):
            self.verified(lambda p: setattr(p.batch, "forward_only", True),
                          **moving)

    def test_agent_refuses_options_that_cannot_hold(self):
        with self.assertRaisesRegex(ValueError, "joint_wait_s is None"):
            self.agent(move_microbatches=True)
        moving = {"joint_wait_s": 1.0, "move_microbatches": True}
        self.job.executor.moved_microbatches = False
        with self.assertRaisesRegex(ValueError, "executor.moved_microbatches"):
            self.agent(**moving)
        self.job.executor.moved_microbatches = True
        with self.agent(**moving) as agent:
            with self.assertRaisesRegex(ValueError, "all_replicas: None"):
                agree(agent, 0)
        self.job.parallelism.data_parallel = 1
        with self.assertRaisesRegex(ValueError, "data_parallel is below 2"):
            self.agent(**moving)

    def test_plan_with_moves_runs_by_the_vote_of_all_replicas_alone(self):
        def settled(*extremes):
            with self.agent(joint_wait_s=1.0, move_microbatches=True) as agent:
                agent.submit(3, self.mine)
                state = agent._state(3)
                state.plan = agent._prepared(
                    PLAN, agent._verify(self.program(), self.key, state), state)
                mine, all_of_them = agent.vote(3), agent.vote_everywhere(3)
                self.assertNotEqual(mine, all_of_them)
                known = {"mine": mine, "all": all_of_them, "none": 0}
                origin = agent.settle(3, *(known[e] for e in extremes))
                return origin, dict(agent.counters)

        self.assertEqual(settled("mine", "mine", "all", "all"),
                         (PLAN, {"steps_plan": 1}))
        self.assertEqual(settled("none", "none", "all", "all")[0], PLAN)
        for extremes in (("mine", "mine"), ("mine", "mine", "none", "all"),
                         ("mine", "mine", "none", "none")):
            self.assertEqual(settled(*extremes), (
                SAFE, {"steps_safe": 1, "replicas_disagreed": 1}))


if __name__ == "__main__":
    unittest.main()
