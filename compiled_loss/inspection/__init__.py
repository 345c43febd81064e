"""What the compiler made of a function: graphs, kernels, memory launch by launch, machine code; with no GPU needed."""

from compiled_loss.inspection.errors import InspectionError
from compiled_loss.inspection.inspector import inspect
from compiled_loss.inspection.record import Inspection
from compiled_loss.inspection.targets import GPUS, TARGETS

__all__ = ["GPUS", "TARGETS", "Inspection", "InspectionError", "inspect"]
