"""Runs PipeWeaver programs in PyTorch: see executor.py and chunk.py."""

from pipeweaver.torch.chunk import ExtraRng, StageContext
from pipeweaver.torch.executor import (
    Boundary, ExecutorOptions, Hooks, PipelineExecutor, PipelineModule,
    PreparedStep, StepResult)
from pipeweaver.torch.transport import DistributedTransport, Transport

__all__ = [
    "Boundary", "DistributedTransport", "ExecutorOptions", "ExtraRng", "Hooks",
    "PipelineExecutor", "PipelineModule", "PreparedStep", "StageContext",
    "StepResult", "Transport",
]
