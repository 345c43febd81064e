"""Reports on what the compiler makes of a function: graphs, kernels, live memory and machine code, without a GPU."""

from compiled_loss.inspection.errors import InspectionError
from compiled_loss.inspection.inspector import inspect
from compiled_loss.inspection.record import Inspection
from compiled_loss.inspection.targets import GPUS, TARGETS

__all__ = ["GPUS", "TARGETS", "Inspection", "InspectionError", "inspect"]
