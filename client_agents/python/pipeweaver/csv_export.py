"""Plans as schedules of torch.distributed.pipelining.

`_PipelineScheduleRuntime._load_csv` reads one row of actions a rank, such as
`0F0`: stage, action, microbatch. That executor has limits that plans of
multimodal batches do not have; where a plan passes one, NotExportable names it.
"""

import csv
import io
from typing import Dict, List, Sequence, Tuple

from pipeweaver import program as actions
from pipeweaver.job import BatchView, JobView, SplitView
from pipeweaver.program import CheckedProgram
from pipeweaver.v1 import batch_pb2

COMPUTE_ONLY, COMPUTE_COMMS = "compute_only", "compute_comms"

_COMPUTE = {actions.FORWARD: "F", actions.BACKWARD: "B",
            actions.INPUT_GRAD: "I", actions.WEIGHT_GRAD: "W"}


class NotExportable(ValueError):
    """The plan passes a limit of that executor; the message names it."""


def export_csv(job: JobView, programs: Sequence[CheckedProgram],
               batch: batch_pb2.BatchMetadata, form: str = COMPUTE_ONLY,
               vocabulary: Sequence[str] = ()) -> str:
    """The plan as CSV. programs: all ranks', rank 0 first.

    Stages are the modules' chunks along the chain of modules. vocabulary: with
    COMPUTE_COMMS, which of WAIT_SEND_F, WAIT_SEND_B, REDUCE_GRAD,
    WAIT_REDUCE_GRAD the torch at hand knows (torch_vocabulary() says); others
    are left out.
    """
    if form not in (COMPUTE_ONLY, COMPUTE_COMMS):
        raise ValueError(f"form: {form!r}, must be {COMPUTE_ONLY!r} or "
                         f"{COMPUTE_COMMS!r}")
    split = SplitView.from_proto(BatchView(job, batch), programs[0].split)
    chain = _chain(job)
    _check_batch(job, split)
    stages: Dict[Tuple[int, int, int], int] = {}
    for m in chain:
        for s, segment in enumerate(job.chunks[m]):
            for k in range(len(segment)):
                stages[m, s, k] = len(stages)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for checked in programs:
        row = _row(job, split, stages, checked, form, vocabulary)
        last = [int(cell.split("F")[1]) for cell in row
                if cell.startswith(f"{len(stages) - 1}F")]
        if last != sorted(last):
            raise NotExportable(
                f"the last stage runs microbatches in the order {last}: their "
                "losses are told apart by ascending order")
        writer.writerow(row)
    return out.getvalue()


def torch_vocabulary() -> List[str]:
    """Actions that the installed torch knows past the oldest ones."""
    from torch.distributed.pipelining import schedules
    return [x.value for x in schedules._ComputationType
            if isinstance(x.value, str)]


def _chain(job: JobView) -> List[int]:
    for m in range(job.num_modules):
        if len(job.inputs[m]) > 1 or len(job.outputs[m]) > 1:
            raise NotExportable(
                f"module {job.module_name(m)!r} has {len(job.inputs[m])} "
                f"producers and {len(job.outputs[m])} consumers: stages must "
                "form one chain")
        if not job.trainable[m] and not job.upstream[m]:
            raise NotExportable(
                f"module {job.module_name(m)!r} is frozen with nothing trained "
                "upstream: every stage must have a backward")
    if sum(not job.inputs[m] for m in range(job.num_modules)) > 1:
        raise NotExportable("the module graph has several sources: stages must "
                            "form one chain")
    return job.order


def _check_batch(job: JobView, split: SplitView) -> None:
    if split.batch.forward_only:
        raise NotExportable("the step is forward-only: a schedule has "
                            "backwards")
    count: Dict[Tuple[int, int], int] = {}
    tokens: Dict[int, set] = {}
    for sub in split.subs:
        key = (sub.microbatch, sub.module)
        count[key] = count.get(key, 0) + 1
        tokens.setdefault(sub.module, set()).add(sub.tokens)
    for b in range(len(split.batch.microbatches)):
        for m in range(job.num_modules):
            n = count.get((b, m), 0)
            if n != 1:
                raise NotExportable(
                    f"microbatch {b} has {n} sub-microbatches of module "
                    f"{job.module_name(m)!r}: every stage must run each "
                    "microbatch once")
    for m, sizes in tokens.items():
        if len(sizes) > 1:
            raise NotExportable(
                f"microbatches have {min(sizes)} to {max(sizes)} tokens of "
                f"module {job.module_name(m)!r}: all must have one shape")


def _row(job: JobView, split: SplitView, stages: Dict[Tuple[int, int, int], int],
         checked: CheckedProgram, form: str,
         vocabulary: Sequence[str]) -> List[str]:
    row: List[str] = []
    choices = {(c.module, c.segment, c.chunk): c.choices
               for c in checked.program.choices}
    a = checked.actions
    for kind, sub, segment, chunk, choice, gradient in zip(
            a.kind, a.sub_microbatch, a.segment, a.chunk, a.choice, a.gradient):
        module = split.subs[sub].module
        microbatch = split.subs[sub].microbatch
        stage = stages[module, segment, chunk]
        if kind in _COMPUTE:
            picked = choices[module, segment, chunk][choice]
            if (picked.offload_layers or picked.full_recompute_layers or
                    picked.selective_recompute_layers):
                raise NotExportable(
                    f"module {job.module_name(module)!r}, segment {segment}, "
                    f"chunk {chunk}: memory choice {picked.name!r}: a schedule "
                    "cannot say what is recomputed or offloaded")
            row.append(f"{stage}{_COMPUTE[kind]}{microbatch}")
            continue
        if form == COMPUTE_ONLY:
            continue
        if kind == actions.GRADS_READY:
            row += [f"{stage}{word}" for word in
                    ("REDUCE_GRAD", "WAIT_REDUCE_GRAD") if word in vocabulary]
            continue
        letter = "B" if gradient else "F"
        word = {actions.POST_SEND: f"SEND_{letter}",
                actions.POST_RECV: f"RECV_{letter}",
                actions.WAIT_SEND: f"WAIT_SEND_{letter}"}.get(kind)
        # Receives are waited for by the stage that needs them.
        if word and (kind != actions.WAIT_SEND or word in vocabulary):
            row.append(f"{stage}{word}{microbatch}")
    return row
