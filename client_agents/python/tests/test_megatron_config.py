"""What of Megatron's config the adapter honours, and what it refuses.

On a stand-in for what it uses of megatron.core, written after 0.16's schedules; the
real thing is in ../interop/test_megatron.py.
"""

import sys
import types
import unittest
from unittest import mock

import torch
from torch import nn

from pipeweaver.job import BatchView, JobView
from pipeweaver.lowering import safe_programs
from pipeweaver.program import check_program
from pipeweaver.split import split_batch
from pipeweaver.torch.megatron import MegatronAdapter, _accumulate
from pipeweaver.v1 import batch_pb2, job_pb2, plan_pb2
from ranks import run_ranks

SEQUENCE, WIDTH, MICROBATCHES = 8, 4, 2


class SideLoss(torch.autograd.Function):
    """Adds a loss by the side, as MoE layers do; its scale is set by the
    schedule."""
    scale = None

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, SideLoss.scale


def calc_loss(model, output, loss_func, config, vp_stage, non_loss, microbatches,
              store, cp_group_size=None, is_last_stage=None):
    num_tokens = torch.tensor(0, dtype=torch.int)
    if is_last_stage:
        outputs = loss_func(output)
        if len(outputs) == 3:
            output, num_tokens, reduced = outputs
            if not config.calculate_per_token_loss:
                output = output / num_tokens / microbatches
        else:
            output, reduced = outputs
            output = output * cp_group_size / microbatches
        store.append(reduced)
    if config.timers is not None:
        config.timers("forward-compute").stop()
    if config.num_moe_experts is not None:
        SideLoss.scale = torch.tensor(1.0 if config.calculate_per_token_loss else
                                      cp_group_size / microbatches)
    return output, num_tokens


class Timer:
    running = False

    def __call__(self, name, log_level=None):
        return self

    def start(self):
        assert not self.running
        self.running = True

    def stop(self):
        assert self.running
        self.running = False


def stand_in():
    """Modules by name."""
    names = ("megatron", "megatron.core", "megatron.core.pipeline_parallel",
             "megatron.core.pipeline_parallel.schedules", "megatron.core.utils",
             "megatron.core.tensor_parallel")
    made = {name: types.ModuleType(name) for name in names}
    schedules = made["megatron.core.pipeline_parallel.schedules"]
    schedules.forward_step_calc_loss = calc_loss
    made["megatron.core.pipeline_parallel"].schedules = schedules
    utils = made["megatron.core.utils"]
    utils.get_attr_wrapped_model = getattr
    utils.get_model_config = lambda model: model.config
    made["megatron.core.tensor_parallel"].get_cuda_rng_tracker = lambda: (
        types.SimpleNamespace(get_states=dict))
    return mock.patch.dict(sys.modules, made)


class Model(nn.Module):

    def __init__(self, side_loss=False, **config):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
        self.input, self.side_loss = None, side_loss
        self.finalized = []
        self.config = types.SimpleNamespace(**{
            "calculate_per_token_loss": False, "grad_scale_func": None,
            "timers": Timer(), "enable_autocast": False, "autocast_dtype": None,
            "context_parallel_size": 1, "num_moe_experts": None,
            "finalize_model_grads_func":
                lambda chunks, num_tokens: self.finalized.append(num_tokens),
            **config})

    def set_input_tensor(self, tensors):
        self.input = tensors[0]

    def forward(self, x):
        x = x if self.input is None else self.input
        if self.side_loss:
            x = SideLoss.apply(x, self.w.sum())
        return x * self.w


def run_step(rank, transport, ranks, model, loss_func):
    """Of MICROBATCHES microbatches of ones."""
    job = job_pb2.Job(name="m")
    module = job.modules.add(name="text", modality=job_pb2.MODALITY_TEXT)
    module.layers.add(kind=job_pb2.LAYER_KIND_TRANSFORMER, count=ranks,
                      hidden_size=WIDTH, ffn_size=WIDTH, heads=1)
    job.parallelism.pipeline_parallel = ranks
    segment = job.layout.modules.add(
        module="text", sub_microbatch_tokens=SEQUENCE).segments.add()
    for r in range(ranks):
        segment.chunks.add(rank=r, first_layer=r, num_layers=1)
    view = JobView(job)
    batch = batch_pb2.BatchMetadata()
    for _ in range(MICROBATCHES):
        batch.microbatches.add().items.add(module=0, tokens=[SEQUENCE])
    key = plan_pb2.PlanKey(job="m")
    made = safe_programs(plan_pb2.PlanIdentity(key=key),
                         split_batch(BatchView(view, batch)))
    adapter = MegatronAdapter(view, rank, [model], transport, lambda: prepared,
                              tensor_shape=[SEQUENCE, 1, WIDTH])
    prepared = adapter.executor.prepare(check_program(made[rank], key, rank), batch)

    def forward_step(iterator, model):
        return model(next(iterator)), loss_func

    return adapter.forward_backward(
        forward_step_func=forward_step,
        data_iterator=iter([torch.ones(SEQUENCE, 1, WIDTH)] * MICROBATCHES),
        model=[model], num_microbatches=MICROBATCHES, seq_length=SEQUENCE,
        micro_batch_size=1)


def run_alone(loss_func, **config):
    model = Model(**config)
    with stand_in():
        run_step(0, None, 1, model, loss_func)
    return model


def side_losses(rank, transport):
    with stand_in():
        model = Model(side_loss=True, num_moe_experts=2)
        run_step(rank, transport, 2, model,
                 lambda x: (0 * x.sum(), {}))
    return model.w.grad.tolist()


def with_tokens(x):
    return x.sum(), torch.tensor(SEQUENCE, dtype=torch.int), {}


class ConfigTest(unittest.TestCase):

    def test_loss_per_token(self):
        model = run_alone(with_tokens, calculate_per_token_loss=True)
        [num_tokens] = model.finalized
        self.assertEqual(int(num_tokens), SEQUENCE * MICROBATCHES)
        self.assertEqual(model.w.grad.tolist(), [SEQUENCE * MICROBATCHES] * WIDTH)
        model = run_alone(with_tokens)
        self.assertEqual(model.finalized, [None])
        self.assertEqual(model.w.grad.tolist(), [1] * WIDTH)

    def test_context_parallel(self):
        model = run_alone(lambda x: (x.sum(), {}), context_parallel_size=3)
        self.assertEqual(model.w.grad.tolist(), [3 * SEQUENCE] * WIDTH)

    def test_losses_by_the_side_are_scaled_on_all_ranks(self):
        # Each microbatch adds the sum of the weights over MICROBATCHES.
        self.assertEqual(run_ranks(2, "gloo", side_losses), [[1] * WIDTH] * 2)

    def test_autocast(self):
        seen = []

        def loss_func(x):
            return x.float().sum(), {}

        class Linear(Model):
            def forward(self, x):
                y = x @ self.w.diag()
                seen.append(y.dtype)
                return y

        with stand_in():
            run_step(0, None, 1, Linear(enable_autocast=True,
                                        autocast_dtype=torch.bfloat16), loss_func)
        self.assertEqual(seen, [torch.bfloat16] * MICROBATCHES)

    def test_refuses_what_it_does_not_act_on(self):
        for name, value in (("delay_wgrad_compute", True), ("fp8", "hybrid"),
                            ("defer_embedding_wgrad_compute", True)):
            with self.assertRaisesRegex(
                    ValueError, rf"config\.{name}: .*{value}.*, must be off"):
                run_alone(with_tokens, **{name: value})

    def test_gradients_that_a_layer_has_added_itself_are_not_added_again(self):
        p = nn.Parameter(torch.zeros(2))
        p.main_grad = torch.zeros(2)
        one = torch.ones(2)
        for fused, zeroed, total in ((False, False, 1), (True, False, 1),
                                     (True, True, 2)):
            p.grad_added_to_main_grad, p.zero_out_wgrad = fused, zeroed
            _accumulate(p, one)
            self.assertEqual(p.main_grad.tolist(), [total] * 2)


if __name__ == "__main__":
    unittest.main()
