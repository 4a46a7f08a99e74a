"""A fake PlannerService: random plans at once, and faults on demand.

    python3 fake_server.py PORT FAULTS_JSON

Faults: "delay_s": {step: seconds before its programs are answered}, "corrupt":
[[step, rank]] a byte of the actions changed, "wrong_batch": [step] a plan of
another batch, "lose": [[step, rank]] answered UNAVAILABLE.
"""

import concurrent.futures
import json
import sys
import time

import grpc

import plans
from pipeweaver import digest
from pipeweaver.client import METHODS, SERVICE
from pipeweaver.job import JobView
from pipeweaver.v1 import plan_pb2, planner_service_pb2 as service_pb2

CHUNK = 700  # small, so that programs travel in several
REFUSED_MICROBATCHES = 9  # a batch of so many is refused


class FakePlanner:

    def __init__(self, faults):
        self.faults = faults
        self.attempts = {}  # job -> {request id: attempt}
        self.jobs = {}
        self.plans = {}  # serialised key -> programs
        self.reports = 0

    def RegisterJob(self, request, context):
        name = request.job.name
        ids = self.attempts.setdefault(name, {})
        if ids and 0 < request.attempt < max(ids.values()):
            context.abort(grpc.StatusCode.ABORTED, "attempt: is over")
        attempt = ids.setdefault(
            request.request_id,
            request.attempt or max(ids.values(), default=0) + 1)
        self.jobs[name] = request.job
        return service_pb2.RegisterJobResponse(
            job_digest=digest.job_digest(request.job), attempt=attempt,
            layout=request.job.layout, layout_confirmed=True,
            layout_digest=digest.canonical_digest(request.job.layout))

    def DescribeJob(self, request, context):
        if request.job not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, "job: not registered")
        return service_pb2.DescribeJobResponse(
            reports=self.reports,
            attempt=max(self.attempts[request.job].values()),
            request_id=max(self.attempts[request.job],
                           key=self.attempts[request.job].get))

    def _check(self, key, context):
        if key.job not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, "job: not registered")
        latest = max(self.attempts[key.job].values())
        if key.attempt < latest:
            context.abort(grpc.StatusCode.ABORTED, f"attempt {latest} exists")
        if key.attempt > latest:
            context.abort(grpc.StatusCode.NOT_FOUND, "attempt: unknown")

    def SubmitStep(self, request, context):
        self._check(request.key, context)
        job = self.jobs[request.key.job]
        batch = request.batch
        if len(batch.microbatches) == REFUSED_MICROBATCHES:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "batch: refused")
        batch_digest = digest.canonical_digest(batch)
        if request.key.step in self.faults.get("wrong_batch", ()):
            batch_digest = bytes(32)
        identity = plan_pb2.PlanIdentity(
            key=request.key, job_digest=digest.job_digest(job),
            layout_digest=request.layout_digest, batch_digest=batch_digest,
            origin=plan_pb2.PLAN_ORIGIN_SEARCH_FINISHED)
        self.plans[request.key.SerializeToString()] = plans.random_plan(
            JobView(job), batch, request.key.step, identity=identity)
        return service_pb2.SubmitStepResponse(batch_digest=batch_digest)

    def GetProgram(self, request, context):
        self._check(request.key, context)
        step, rank = request.key.step, request.rank
        programs = self.plans.get(request.key.SerializeToString())
        if programs is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "step: not submitted")
        if [step, rank] in self.faults.get("lose", ()):
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        time.sleep(self.faults.get("delay_s", {}).get(str(step), 0))
        program = programs[rank]
        if [step, rank] in self.faults.get("corrupt", ()):
            program = plan_pb2.Program()
            program.CopyFrom(programs[rank])
            program.actions = program.actions[:-1] + bytes(
                [program.actions[-1] ^ 1])
        data = program.SerializeToString()
        return service_pb2.GetProgramResponse(
            total_bytes=len(data),
            data=data[request.offset:request.offset + CHUNK])

    def ReportStep(self, request, context):
        self.reports += 1
        return service_pb2.ReportStepResponse()


def serve(port, faults):
    fake = FakePlanner(faults)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(fake, name),
            request_deserializer=getattr(
                service_pb2, f"{name}Request").FromString,
            response_serializer=getattr(
                service_pb2, f"{name}Response").SerializeToString)
        for name in METHODS if hasattr(fake, name)}
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if not server.add_insecure_port(f"127.0.0.1:{port}"):
        raise SystemExit(f"port {port} is taken")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    serve(int(sys.argv[1]), json.loads(sys.argv[2]))
