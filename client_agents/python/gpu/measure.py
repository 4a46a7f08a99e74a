"""Trains a vision-language model on one GPU under a live planner, and prints what
was predicted and what was measured.

    python3 measure.py costs      # step times and memory, before and after the
                                  # CUPTI agent's profile has come
    python3 measure.py overhead   # what the CUPTI agent costs a step

The numbers are this GPU's and this machine's; nothing is asserted. For its
environment see tests/gpu.sh, which runs it.
"""

import argparse
import os
import random
import statistics
import time
import uuid

AGENT = os.environ["PIPEWEAVER_CUPTI_AGENT"]
MICROBATCHES = 8


def costs(options):
    # Before torch: what the driver reads when CUDA starts.
    os.environ["CUDA_INJECTION64_PATH"] = AGENT
    os.environ["PIPEWEAVER_CUPTI_DUTY"] = "3/6"
    import torch
    import large_models as large
    import pipeweaver
    from pipeweaver.job import JobView
    from pipeweaver.torch.cupti import CuptiHooks
    from pipeweaver.v1 import planner_service_pb2 as service
    from test_agent import free_port
    from test_live import start_real, stop

    port = free_port()
    address = f"127.0.0.1:{port}"
    server = start_real(port)
    try:
        job = large.make_job(f"gpu-{uuid.uuid4().hex[:8]}")
        samples = [large.make_batch(job, random.Random(100 + i), MICROBATCHES)
                   for i in range(4)]
        registration = pipeweaver.register(address, job, "run",
                                           sample_batches=samples)
        job.layout.CopyFrom(registration.layout)
        view = JobView(job)
        client = pipeweaver.PlannerClient(address)
        uploads = []
        trainer = None

        def prepare(checked, batch):
            return trainer.executor.prepare(checked, batch)

        with pipeweaver.StepAgent(
                address, job, 0, registration, submits=True,
                options=pipeweaver.AgentOptions(prepare=prepare)) as agent:

            def upload(profile):
                uploads.append(len(profile.points))
                agent.upload_profile(profile)

            torch.cuda.init()
            hooks = CuptiHooks(AGENT, upload=upload)
            trainer = large.Trainer(view, hooks)
            rng = random.Random(0)
            begin = time.monotonic()
            rows = []
            step = 0
            while time.monotonic() - begin < options.seconds:
                batch = large.make_batch(job, rng, MICROBATCHES)
                agent.submit(step, batch)
                agent.wait(step, 10.0)
                token = agent.vote(step)
                agent.settle(step, token, token)
                program = agent.program(step)
                result = trainer.executor.run(program.prepared,
                                              large.RandomData(view, batch))
                trainer.optimizer_step()
                torch.cuda.synchronize()
                agent.report(step, result.step_ns, result.start_offset_ns,
                             result.duration_ns, result.peak_memory_bytes)
                step += 1
                if program.origin != pipeweaver.PLAN:
                    print(f"step {step - 1}: {program.origin} program, "
                          f"{result.step_ns * 1e-6:.1f} ms", flush=True)
                    continue
                report = client.call("GetPlan", service.GetPlanRequest(
                    key=program.checked.program.identity.key),
                    5.0).plan.report
                busy = sum(result.duration_ns)
                rows.append((report.measured_share, result.step_ns,
                             report.makespan_ns, result.peak_memory_bytes,
                             report.peak_memory_bytes[0]))
                if step < 10 or step % 10 == 0:
                    print(f"step {step - 1}: measured {result.step_ns * 1e-6:.1f}"
                          f" ms (actions {busy * 1e-6:.1f}), predicted "
                          f"{report.makespan_ns * 1e-6:.1f} "
                          f"({report.measured_share:.2f} of it measured), peak "
                          f"{result.peak_memory_bytes * 1e-9:.2f} GB, predicted "
                          f"{report.peak_memory_bytes[0] * 1e-9:.2f}; loss "
                          f"{float(result.loss):.3f}", flush=True)
            hooks.close()
            print("counters", dict(agent.counters), "uploads", uploads[:5], "...",
                  len(uploads), "profiles")
            for name, part in (
                    ("no layer measured", [r for r in rows[3:] if r[0] == 0]),
                    ("over 0.9 measured", [r for r in rows if r[0] > 0.9])):
                if not part:
                    print(f"{name}: no step")
                    continue
                ratios = [r[1] / r[2] for r in part]
                print(f"{name}: {len(part)} steps, measured over predicted "
                      f"{statistics.mean(ratios):.3f} "
                      f"({min(ratios):.3f} to {max(ratios):.3f})")
            ratios = [r[3] / r[4] for r in rows[1:]]
            if ratios:
                print(f"peak memory, measured over predicted: "
                      f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to "
                      f"{max(ratios):.3f})")
            known = client.call("DescribeJob", service.DescribeJobRequest(
                job=job.name), 5.0).costs
            print(f"{known.measured_layers} layers measured, "
                  f"{sum(known.extra_reserve_bytes) * 1e-9:.2f} GB set aside, "
                  f"{known.drifted_steps} steps drifted; factors " + ", ".join(
                      f"{f.factor:.2f}" for f in known.factors))
        client.close()
    finally:
        stop(server)


def overhead(options):
    """Steps of one fixed program, traced and not, in one process."""
    if not options.without_agent:
        os.environ["CUDA_INJECTION64_PATH"] = AGENT
        os.environ["PIPEWEAVER_CUPTI_DUTY"] = "5/10"
    import torch
    import large_models as large
    import models
    import plans
    from pipeweaver.job import JobView
    from pipeweaver.program import check_program
    from pipeweaver.torch import PipelineExecutor
    from pipeweaver.torch.cupti import CuptiHooks
    from pipeweaver.v1 import plan_pb2

    torch.cuda.init()
    hooks = None if options.without_agent else CuptiHooks(AGENT)
    for model in ("launch-bound", "compute-bound"):
        if model == "launch-bound":
            job = models.make_job("vlm", 1)
            view = JobView(job)
            executor = PipelineExecutor(
                view, 0, models.pipeline_modules(view, models.build_model(
                    view, "vlm", 1, torch.float32, "cuda"), 0), None,
                device="cuda", hooks=hooks)
            batch = models.make_batch(job, random.Random(0), 4)
            data = models.Data(view, batch, 0, torch.float32, "cuda")
        else:
            job = large.make_job("overhead", pinned=True)
            view = JobView(job)
            executor = large.Trainer(view, hooks).executor
            batch = large.make_batch(job, random.Random(0), 4)
            data = large.RandomData(view, batch)
        key = plan_pb2.PlanKey(job=job.name, step=0)
        prepared = []
        for step in range(options.steps):
            key.step = step
            made = plans.random_plan(view, batch, 0, 0.0, ("keep",), key)
            prepared.append(executor.prepare(check_program(made[0], key, 0),
                                             batch))
        times = {}
        for step, program in enumerate(prepared):
            begin = time.perf_counter()
            executor.run(program, data)
            state = hooks.state() if hooks else -1
            times.setdefault(state, []).append(time.perf_counter() - begin)
        for state, found in sorted(times.items()):
            name = {-1: "no agent", 0: "off", 1: "idle", 2: "tracing",
                    3: "gave way"}[state]
            found = found[2:]
            print(f"{model}, {name}: {len(found)} steps, median "
                  f"{statistics.median(found) * 1e3:.2f} ms ("
                  f"{min(found) * 1e3:.2f} to {max(found) * 1e3:.2f})",
                  flush=True)
    if hooks:
        hooks.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("costs", "overhead"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--without-agent", action="store_true")
    options = parser.parse_args()
    {"costs": costs, "overhead": overhead}[options.what](options)


if __name__ == "__main__":
    main()
