"""CSV schedules: the format, and a clear error for each limit."""

import random
import unittest

import models
import plans
from pipeweaver.csv_export import COMPUTE_COMMS, NotExportable, export_csv
from pipeweaver.job import JobView
from pipeweaver.program import check_program
from pipeweaver.v1 import batch_pb2, plan_pb2

KEY = plan_pb2.PlanKey(job="j")


def text_job():
    job = models.make_job("vlm", 2, v_placement=True)
    del job.modules[0], job.edges[0], job.layout.modules[0]
    return job


def text_batch(tokens):
    batch = batch_pb2.BatchMetadata()
    for n in tokens:
        batch.microbatches.add().items.add(module=0, tokens=[n])
    return batch


def exported(job, batch, names=("keep",), **kw):
    view = JobView(job)
    made = plans.random_plan(view, batch, 1, 0.5, names, KEY)
    return export_csv(view, [check_program(p, KEY, r)
                             for r, p in enumerate(made)], batch, **kw)


class CsvTest(unittest.TestCase):

    def test_every_stage_runs_every_microbatch(self):
        rows = exported(text_job(), text_batch([4, 4, 4])).splitlines()
        self.assertEqual(len(rows), 2)
        done = {cell for row in rows for cell in row.split(",")}
        for stage in range(4):
            for b in range(3):
                self.assertIn(f"{stage}F{b}", done)
                self.assertTrue(f"{stage}B{b}" in done or
                                {f"{stage}I{b}", f"{stage}W{b}"} <= done)
        # The second segment runs back: the V's stages 0 and 3 on rank 0.
        self.assertEqual({c[0] for c in rows[0].split(",")}, {"0", "3"})

    def test_comms_pair_up(self):
        rows = exported(text_job(), text_batch([4, 4]), form=COMPUTE_COMMS,
                        vocabulary=["WAIT_SEND_F", "REDUCE_GRAD"]).splitlines()
        cells = ",".join(rows).split(",")
        self.assertEqual(sum("SEND_F" in c and "WAIT" not in c for c in cells),
                         sum("RECV_F" in c for c in cells))
        self.assertTrue(any("WAIT_SEND_F" in c for c in cells))
        self.assertFalse(any("WAIT_SEND_B" in c for c in cells))
        self.assertEqual(sum("REDUCE_GRAD" in c for c in cells), 4)

    def refused(self, message, job, batch, **kw):
        with self.assertRaisesRegex(NotExportable, message):
            exported(job, batch, **kw)

    def test_names_the_limit(self):
        self.refused("4 to 5 tokens of module 'text': all must have one shape",
                     text_job(), text_batch([4, 5]))
        self.refused("memory choice 'full'", text_job(), text_batch([4]),
                     names=("full",))
        forward_only = text_batch([4])
        forward_only.forward_only = True
        self.refused("forward-only", text_job(), forward_only)
        omni = models.make_job("omni", 2)
        self.refused("must form one chain", omni,
                     models.make_batch(omni, random.Random(0), 1))
        vlm = models.make_job("vlm", 2)
        self.refused("microbatch 0 has 0 sub-microbatches of module 'vision'",
                     vlm, batch_pb2.BatchMetadata(microbatches=[
                         batch_pb2.Microbatch(items=[batch_pb2.ModuleItems(
                             module=1, tokens=[3])])]))
        frozen = models.make_job("vlm", 2, ("vision",))
        self.refused("'vision' is frozen", frozen,
                     models.make_batch(frozen, random.Random(0), 1))


if __name__ == "__main__":
    unittest.main()
