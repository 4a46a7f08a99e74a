"""Trainer-side agent of the PipeWeaver planner; pipeweaver.torch runs plans."""

from pipeweaver.agent import (
    PLAN, SAFE, AgentOptions, Registration, StepAgent, StepProgram, register)
from pipeweaver.client import ClientOptions, PlannerClient
from pipeweaver.metadata import MetadataBuilder
from pipeweaver.program import BadProgram, CheckedProgram, check_program

__all__ = [
    "AgentOptions", "BadProgram", "CheckedProgram", "ClientOptions",
    "MetadataBuilder", "PLAN", "PlannerClient", "Registration", "SAFE",
    "StepAgent", "StepProgram", "check_program", "register",
]
