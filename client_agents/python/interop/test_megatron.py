"""Megatron-core's real GPTModel under our programs, on a CPU.

Two CUDA calls are replaced: torch.cuda.current_device, and fork() of the tracker
of CUDA random states, which here forks the host's. Megatron's own schedules do not
run on a CPU; what ours computes is compared with the chunks run one behind the
other, without dropout, and with dropout with itself under another plan.
"""

import contextlib
import unittest

import torch

from pipeweaver.job import BatchView, JobView
from pipeweaver.lowering import safe_programs
from pipeweaver.program import check_program
from pipeweaver.split import split_batch
from pipeweaver.v1 import batch_pb2, job_pb2, plan_pb2
import plans
from ranks import run_ranks

RANKS, VIRTUAL, LAYERS, HIDDEN, SEQUENCE, BATCH, VOCAB = 2, 2, 4, 16, 8, 2, 32
MICROBATCHES = 4


def make_job():
    job = job_pb2.Job(name="megatron")
    module = job.modules.add(name="text", modality=job_pb2.MODALITY_TEXT)
    module.layers.add(kind=job_pb2.LAYER_KIND_TRANSFORMER, count=LAYERS,
                      hidden_size=HIDDEN, ffn_size=4 * HIDDEN, heads=2,
                      causal=True)
    job.parallelism.pipeline_parallel = RANKS
    job.executor.full_recompute = True
    entry = job.layout.modules.add(module="text",
                                   sub_microbatch_tokens=SEQUENCE * BATCH)
    for s in range(VIRTUAL):
        segment = entry.segments.add()
        for rank in range(RANKS):
            segment.chunks.add(rank=rank, first_layer=s * RANKS + rank,
                               num_layers=1)
    return job


def build_chunks(attention_dropout=0.0, **more):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec)
    from megatron.core.transformer.transformer_config import TransformerConfig
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=2,
        use_cpu_initialization=True, pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=RANKS,
        virtual_pipeline_model_parallel_size=VIRTUAL, hidden_dropout=0.0,
        attention_dropout=attention_dropout, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, **more)
    torch.manual_seed(0)
    stages = RANKS * VIRTUAL
    return [GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB, max_sequence_length=SEQUENCE, pre_process=i == 0,
        post_process=i == stages - 1, vp_stage=i // RANKS)
        for i in range(stages)]


def forward_step(iterator, model):
    ids = next(iterator)
    positions = torch.arange(SEQUENCE)[None].expand(BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    output = model(ids, positions, mask, labels=ids)

    def loss_func(losses):
        loss = losses.mean()
        return loss, {"lm loss": loss.detach().clone()}

    return output, loss_func


@contextlib.contextmanager
def fork_on_host(tracker, name="model-parallel-rng"):
    default = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    yield
    tracker.states_[name] = torch.get_rng_state()
    torch.set_rng_state(default)


def initialize():
    torch.cuda.current_device = lambda: "cpu"
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as random_states
    random_states.CudaRNGStatesTracker.fork = fork_on_host
    parallel_state.initialize_model_parallel(
        1, RANKS, virtual_pipeline_model_parallel_size=VIRTUAL)


def seed_tracker():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    get_cuda_rng_tracker().set_states({
        "model-parallel-rng": torch.Generator().manual_seed(1).get_state()})


def make_batch():
    batch = batch_pb2.BatchMetadata()
    for _ in range(MICROBATCHES):
        batch.microbatches.add().items.add(module=0, tokens=[SEQUENCE] * BATCH)
    return batch


def make_data():
    return [torch.randint(VOCAB, (BATCH, SEQUENCE),
                          generator=torch.Generator().manual_seed(b))
            for b in range(MICROBATCHES)]


def run_step(run, chunks, data):
    return run(forward_step_func=forward_step,
               data_iterator=[iter(data) for _ in chunks], model=chunks,
               num_microbatches=MICROBATCHES, seq_length=SEQUENCE,
               micro_batch_size=BATCH, forward_only=False)


def train(rank, transport, seed):
    initialize()
    seed_tracker()
    from megatron.core import pipeline_parallel
    from pipeweaver.torch.megatron import MegatronAdapter
    view = JobView(make_job())
    batch = make_batch()
    key = plan_pb2.PlanKey(job="megatron", step=seed)
    if seed == 0:
        made = safe_programs(plan_pb2.PlanIdentity(key=key),
                             split_batch(BatchView(view, batch)))
    else:
        made = plans.random_plan(view, batch, seed, 0.0, ("keep", "full"), key,
                                 split_as_planned=True)
    plain = build_chunks()
    chunks = build_chunks()[rank::RANKS]  # the same weights, by the seed
    prepared = None
    adapter = MegatronAdapter(
        view, rank, chunks, transport, lambda: prepared,
        tensor_shape=(SEQUENCE, BATCH, HIDDEN), deterministic=True)
    prepared = adapter.executor.prepare(
        check_program(made[rank], key, rank), batch)
    data = make_data()
    restore = adapter.install()
    run = pipeline_parallel.get_forward_backward_func()
    reduced = run_step(run, chunks, data)
    restore()
    if pipeline_parallel.get_forward_backward_func() == run:
        raise AssertionError("Megatron's function is not back")
    losses = []
    for ids in data:
        x = None
        for chunk in plain:
            chunk.set_input_tensor([x])
            x, loss_func = forward_step(iter([ids]), chunk)
        loss, _ = loss_func(x)
        losses.append(float(loss.detach()))
        (loss / MICROBATCHES).backward()
    if rank == RANKS - 1:
        got = [float(r["lm loss"]) for r in reduced]
        if any(abs(a - b) > 1e-5 for a, b in zip(got, losses)) or (
                len(got) != MICROBATCHES):
            raise AssertionError(f"losses {got}, expected {losses}")
    compared = 0
    for mine, theirs in zip(chunks, plain[rank::RANKS]):
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
            off = float((p.grad - q.grad).abs().max() / q.grad.abs().max())
            if off > 1e-4:
                raise AssertionError(f"{name}: off by {off}")
            compared += 1
    return compared


def drop_out(rank, transport):
    """Gradients of one plan with dropout, kept and recomputed."""
    initialize()
    from pipeweaver.torch.megatron import MegatronAdapter
    view = JobView(make_job())
    batch = make_batch()
    key = plan_pb2.PlanKey(job="megatron", step=1)
    found = []
    for choice in "keep", "full":
        seed_tracker()
        made = plans.random_plan(view, batch, 1, 0.0, (choice,), key,
                                 split_as_planned=True)
        chunks = build_chunks(attention_dropout=0.5)[rank::RANKS]
        adapter = MegatronAdapter(
            view, rank, chunks, transport, lambda: prepared,
            tensor_shape=(SEQUENCE, BATCH, HIDDEN), deterministic=True)
        prepared = adapter.executor.prepare(
            check_program(made[rank], key, rank), batch)
        run_step(adapter.forward_backward, chunks, make_data())
        found.append([p.grad for c in chunks for p in c.parameters()])
    for kept, recomputed in zip(*found):
        if not torch.allclose(kept, recomputed, 1e-4, 1e-6):
            raise AssertionError(f"off by {(kept - recomputed).abs().max()}")
    return len(found[0])


def count_tokens(rank, transport):
    """Of a loss per token: what finalize_model_grads_func gets, and a gradient's
    norm; that of means over as many tokens in each microbatch, too."""
    initialize()
    seed_tracker()
    from pipeweaver.torch.megatron import MegatronAdapter
    view = JobView(make_job())
    batch = make_batch()
    key = plan_pb2.PlanKey(job="megatron")
    made = safe_programs(plan_pb2.PlanIdentity(key=key),
                         split_batch(BatchView(view, batch)))
    found = []

    def step(iterator, model):
        output, _ = forward_step(iterator, model)
        return output, lambda losses: (
            losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {})

    for per_token in (True, False):
        chunks = build_chunks(
            calculate_per_token_loss=per_token, finalize_model_grads_func=(
                lambda model, num_tokens: found.append(
                    None if num_tokens is None else int(num_tokens))
            ))[rank::RANKS]
        adapter = MegatronAdapter(
            view, rank, chunks, transport, lambda: prepared,
            tensor_shape=(SEQUENCE, BATCH, HIDDEN), deterministic=True)
        prepared = adapter.executor.prepare(
            check_program(made[rank], key, rank), batch)
        adapter.forward_backward(
            forward_step_func=step, data_iterator=[
                iter(make_data()) for _ in chunks], model=chunks,
            num_microbatches=MICROBATCHES, seq_length=SEQUENCE,
            micro_batch_size=BATCH)
        found.append(float(next(chunks[0].parameters()).grad.norm()))
    return found


class MegatronTest(unittest.TestCase):

    def test_real_gpt_model_by_the_safe_program(self):
        for compared in run_ranks(RANKS, "gloo", train, 0):
            self.assertGreater(compared, 20)

    def test_real_gpt_model_by_random_plans(self):
        for seed in (1, 2, 3):
            for compared in run_ranks(RANKS, "gloo", train, seed):
                self.assertGreater(compared, 20)

    def test_full_recompute_drops_out_what_the_forward_did(self):
        for compared in run_ranks(RANKS, "gloo", drop_out):
            self.assertGreater(compared, 20)

    def test_loss_per_token(self):
        tokens = MICROBATCHES * SEQUENCE * BATCH
        for rank, (count, norm, none, norm_of_means) in enumerate(
                run_ranks(RANKS, "gloo", count_tokens)):
            self.assertEqual(count, tokens if rank == RANKS - 1 else 0)
            self.assertIsNone(none)
            self.assertAlmostEqual(norm / tokens / norm_of_means, 1, 4)


if __name__ == "__main__":
    unittest.main()
