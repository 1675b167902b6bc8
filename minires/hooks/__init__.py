"""What can watch the engine: context managers, entered around a forward, a backward or a whole training step.

    with TraceHook() as trace:      # which ops and kernels ran, and what they keep for backward
        loss = model(x).sum()
    print(trace)

TimerHook: where the time goes. BranchGradHook: the gradient of a residual block's input, path by path, before the
paths are summed. AnomalyHook and find_anomaly: the op and module that first made a NaN or Inf.
"""

from .anomaly import AnomalyError, AnomalyHook, find_anomaly
from .base import Hook, module_path
from .branches import BranchGradHook, Join, Share
from .timer import TimerHook
from .trace import TraceHook, TraceRecord

__all__ = [
    "AnomalyError",
    "AnomalyHook",
    "BranchGradHook",
    "Hook",
    "Join",
    "Share",
    "TimerHook",
    "TraceHook",
    "TraceRecord",
    "find_anomaly",
    "module_path",
]
