"""Digests, the program check, the safe order and the split: as in C++."""

import json
import pathlib
import random
import unittest

from google.protobuf import json_format

import models
import plans
from pipeweaver import digest
from pipeweaver.job import BatchView, JobView, SplitView
from pipeweaver.lowering import StepGraph, safe_problem, safe_programs
from pipeweaver.memory import StageMemory
from pipeweaver.program import BadProgram, check_program, verify_digests
from pipeweaver.safe_order import (
    Choice, DoesNotFit, Problem, Stage, Sweep, safe_order)
from pipeweaver.split import split_batch, split_items
from pipeweaver.v1 import batch_pb2, job_pb2, plan_pb2

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
VECTORS = REPOSITORY / "search" / "plan" / "testdata" / "safe_order.json"
SPLIT_VECTORS = (REPOSITORY / "search" / "partition" / "testdata" /
                 "batch_split.json")
PROGRAM_VECTORS = REPOSITORY / "search" / "testdata" / "safe_program.json"


class DigestTest(unittest.TestCase):

    def test_sha256_matches_the_standards_vector(self):
        self.assertEqual(
            digest.sha256(b"abc").hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")

    def test_canonical_form_leaves_out_unknown_fields(self):
        items = batch_pb2.ModuleItems(module=3, tokens=[300])
        known = digest.canonical_bytes(items)
        self.assertEqual(known.hex(), "08031202ac02")
        extended = batch_pb2.ModuleItems.FromString(known + b"\xa0\x06\x01")
        self.assertEqual(digest.canonical_bytes(extended), known)

    def test_token_is_never_the_one_of_no_plan(self):
        self.assertEqual(digest.digest_token(bytes(32)), 1)
        self.assertEqual(digest.digest_token(b"\xff" * 32), 2 ** 63 - 1)
        self.assertEqual(digest.digest_token(b"\xff" * 32, 24), 2 ** 24 - 1)


def vector_problem(p):
    index = {s["id"]: i for i, s in enumerate(p["segments"])}
    return Problem(p["ranks"], p["split_backward"], p["memory_limit_bytes"], [
        Sweep(s["id"], s["backward"], [index[a] for a in s["after"]], [
            Stage(t["rank"], [
                Choice(c["activation_bytes"], c["backward_bytes"],
                       c["weight_grad_bytes"], c["weight_grad_ns"] > 0,
                       c.get("fused_backward_bytes"))
                for c in t["choices"]]) for t in s["stages"]])
        for s in p["segments"]])


class SafeOrderTest(unittest.TestCase):

    def test_equals_the_planners_on_all_vectors(self):
        vectors = json.loads(VECTORS.read_text())
        self.assertGreaterEqual(len(vectors), 20)
        fitting = 0
        for vector in vectors:
            problem = vector_problem(vector["problem"])
            if vector["schedule"] is None:
                with self.assertRaisesRegex(DoesNotFit, "over the limit of"):
                    safe_order(problem)
                continue
            fitting += 1
            order = [[{"kind": s.kind, "segment": problem.sweeps[s.sweep].id,
                       "stage": s.stage, "choice": s.choice} for s in rank]
                     for rank in safe_order(problem)]
            self.assertEqual(order, vector["schedule"]["ranks"])
        self.assertGreaterEqual(fitting, 10)


class SplitTest(unittest.TestCase):

    def test_prefers_neighbours_and_else_balances(self):
        self.assertEqual(split_items([1.0] * 4, 2), [[0, 1], [2, 3]])
        self.assertEqual(split_items([3.0, 1.0, 3.0, 1.0], 2), [[0, 1], [2, 3]])
        self.assertEqual(split_items([4.0, 4.0, 1.0, 1.0, 1.0, 1.0], 2),
                         [[0, 2, 4], [1, 3, 5]])
        self.assertEqual(split_items([0.0, 0.0, 5.0], 3), [[0], [1], [2]])

    def test_equals_the_planners_on_many_short_items(self):
        vectors = json.loads(SPLIT_VECTORS.read_text())
        job = JobView(json_format.ParseDict(vectors["job"], job_pb2.Job()))
        batch = BatchView(job, json_format.ParseDict(
            vectors["batch"], batch_pb2.BatchMetadata()))
        subs = [[sub.module, sub.microbatch, list(sub.items)]
                for sub in split_batch(batch).subs]
        self.assertEqual(len(subs), len(vectors["sub_microbatches"]))
        for sub, expected in zip(subs, vectors["sub_microbatches"]):
            self.assertEqual(sub, expected)

    def test_every_item_is_in_one_sub_microbatch(self):
        job = JobView(models.make_job("omni", 2))
        for seed in range(20):
            batch = BatchView(job, models.make_batch(
                job.job, random.Random(seed), 3))
            subs = split_batch(batch).subs
            found = sorted((s.microbatch, s.module, i)
                           for s in subs for i in s.items)
            self.assertEqual(found, [
                (b, m, i) for b, mb in enumerate(batch.microbatches)
                for m, t in enumerate(mb.item_tokens) for i in range(len(t))])


    def test_padding_fills_up_to_the_next_bucket(self):
        buckets = (5, 9, 16, 40)
        job = JobView(models.make_job("vlm", 2, buckets=buckets))
        batch = BatchView(job, models.make_batch(
            job.job, random.Random(1), 4))
        split = split_batch(batch)
        self.assertTrue(any(s.padding for s in split.subs))
        for sub in split.subs:
            self.assertEqual(sum(sub.lengths), next(
                b for b in buckets if b >= sum(sub.item_tokens)))
        self.assertEqual(SplitView.from_proto(batch, split.to_proto()).subs,
                         split.subs)


class ProgramCheckTest(unittest.TestCase):

    def setUp(self):
        self.key = plan_pb2.PlanKey(job="vlm", attempt=1, step=3)
        job = JobView(models.make_job("vlm", 2))
        batch = models.make_batch(job.job, random.Random(0), 2)
        self.programs = plans.random_plan(job, batch, 5, key=self.key)

    def resealed(self, change, rank=0):
        """The rank's program with changed columns and digests that fit."""
        program = plan_pb2.Program()
        program.CopyFrom(self.programs[rank])
        actions = plan_pb2.ActionColumns.FromString(program.actions)
        split = plan_pb2.BatchSplit.FromString(program.split)
        change(actions, split)
        program.actions = actions.SerializeToString()
        program.split = split.SerializeToString()
        program.rank_digests[rank] = digest.sha256(program.actions)
        program.plan_digest = digest.plan_digest(
            program.identity, program.split, program.rank_digests)
        return program

    def refuses(self, message, change):
        with self.assertRaisesRegex(BadProgram, message):
            check_program(self.resealed(change), self.key, 0)

    def test_accepts_what_was_planned(self):
        for rank, program in enumerate(self.programs):
            self.assertEqual(
                check_program(program, self.key, rank).program, program)

    def test_refuses_another_key_or_rank(self):
        other = plan_pb2.PlanKey(job="vlm", attempt=1, step=4)
        with self.assertRaisesRegex(BadProgram, "identity.key: vlm/1/3/0"):
            check_program(self.programs[0], other, 0)
        with self.assertRaisesRegex(BadProgram, "rank: 0, asked for 1"):
            check_program(self.programs[0], self.key, 1)

    def test_refuses_any_changed_byte(self):
        data = self.programs[0].SerializeToString()
        rng = random.Random(1)
        for _ in range(300):
            at = rng.randrange(len(data))
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
            try:
                program = plan_pb2.Program.FromString(bytes(changed))
            except Exception:
                continue  # does not parse: refused as well
            if program.choices != self.programs[0].choices:
                continue  # the executor judges choices
            program.DiscardUnknownFields()
            if program == self.programs[0]:
                continue
            with self.assertRaises(BadProgram):
                check_program(program, self.key, 0)

    def test_names_the_broken_column(self):
        self.refuses("actions.peer: .* must be as many",
                     lambda a, s: a.peer.pop())
        self.refuses("split.items: ", lambda a, s: s.items.pop())
        self.refuses(r"actions.kind\[0\]: 99: no such action",
                     lambda a, s: a.kind.__setitem__(0, 99))
        self.refuses("must be below", lambda a, s:
                     a.sub_microbatch.__setitem__(0, 10 ** 6))
        self.refuses(r"actions.edge_sub_microbatch\[0\]: 1000000: must be at",
                     lambda a, s: a.edge_sub_microbatch.__setitem__(0, 10 ** 6))
        self.refuses(r"actions.chunk\[0\]: 9: no chunk of `choices` is it",
                     lambda a, s: a.chunk.__setitem__(0, 9))
        self.refuses(r"actions.chunk\[0\]: .* and segment 9",
                     lambda a, s: a.segment.__setitem__(0, 9))

        def choose(a, s):
            i = list(a.kind).index(1)
            a.choice[i] = 99
        self.refuses(r"actions.choice\[\d+\]: 99: must be below its", choose)

    def test_refuses_posts_out_of_order_and_lost_waits(self):
        def swap(a, s):
            posts = [i for i, k in enumerate(a.kind) if k in (5, 6)]
            i, j = posts[0], posts[1]
            a.transfer[i], a.transfer[j] = a.transfer[j], a.transfer[i]
        self.refuses("ascending order|not posted", swap)

        def lose(a, s):
            i = max(i for i, k in enumerate(a.kind) if k in (7, 8))
            for name in a.DESCRIPTOR.fields_by_name:
                del getattr(a, name)[i]
        self.refuses("never waited for", lose)

    def test_refuses_a_backward_before_its_forward(self):
        def back(a, s):
            i = next(i for i, k in enumerate(a.kind) if k in (2, 3))
            a.kind[next(j for j, k in enumerate(a.kind) if k == 1)] = a.kind[i]
        self.refuses("comes before its forward", back)

    def test_verify_digests_names_the_part(self):
        program = plan_pb2.Program()
        program.CopyFrom(self.programs[1])
        program.actions += b"x"
        with self.assertRaisesRegex(BadProgram, r"rank_digests\[1\]"):
            verify_digests(program)


def bytes_of(choice):
    fused = choice.fused_backward_bytes
    return (f"{choice.activation_bytes} {choice.backward_bytes} "
            f"{choice.weight_grad_bytes} {-1 if fused is None else fused}")


def order_of(graph, table, order):
    """As in search/safe_program_test.cc."""
    found = []
    for s in order:
        sweep = graph.sweeps[s.sweep]
        module = graph.split.subs[sweep.sub].module
        name = table[module, sweep.segment, s.stage][s.choice].name
        found.append(f"{s.kind} {sweep.sub}/{sweep.segment}/{s.stage} {name}")
    return ", ".join(found)


class SafeProgramTest(unittest.TestCase):

    def test_equals_the_planners_for_whole_jobs(self):
        vectors = json.loads(PROGRAM_VECTORS.read_text())
        self.assertGreaterEqual(len(vectors), 10)
        names = set()
        for vector in vectors:
            job = JobView(json_format.ParseDict(vector["job"], job_pb2.Job()))
            batch = BatchView(job, json_format.ParseDict(
                vector["batch"], batch_pb2.BatchMetadata()))
            graph = StepGraph(split_batch(batch))
            memory = StageMemory(graph.split, vector["memory_limit_bytes"])
            problem = safe_problem(graph, memory)
            self.assertEqual(
                [[", ".join(map(bytes_of, stage.choices))
                  for stage in sweep.stages] for sweep in problem.sweeps],
                vector["bytes"])
            table = memory.table()
            order = safe_order(problem)
            self.assertEqual([order_of(graph, table, x) for x in order],
                             vector["ranks"])
            names |= {stage.split()[-1] for rank in vector["ranks"]
                      for stage in rank.split(", ") if stage}
        self.assertEqual(names, {"keep", "selective", "full"})

    def test_every_rank_makes_the_same_and_it_passes_the_check(self):
        job = JobView(models.make_job("omni", 4, v_placement=True))
        for seed in range(10):
            proto = models.make_batch(job.job, random.Random(seed), 3)
            key = plan_pb2.PlanKey(job="omni", step=seed)
            made = [safe_programs(plan_pb2.PlanIdentity(key=key),
                                  split_batch(BatchView(job, proto)), limit)
                    for limit in ((), (), [1] * 4)]
            self.assertEqual(made[0], made[1])
            for programs in made:  # the last does not fit: one at a time
                for rank, program in enumerate(programs):
                    check_program(program, key, rank)


if __name__ == "__main__":
    unittest.main()
