"""Is a JAX function the same as its PyTorch twin, and if not, which one is wrong?

Imports without PyTorch; what runs PyTorch is in ``torch_side`` and loads it when it is used.
"""

from .against import Difference, differences
from .compare import Comparison, compare
from .exact import exact_inputs
from .frozen import assert_frozen
from .guards import refuse, vacuity
from .jax_order import reordered
from .jax_taps import tap
from .names import To
from .noise import noise_floor
from .page import to_html
from .report import Report, from_json, to_json, to_markdown
from .stepping import optimizer_step
from .trace import Trace, trace
from .trajectories import Step, Trajectory, trajectory
from .verdicts import UNIT_ROUNDOFF, TensorVerdict, Verdict, judge, rel_l2, slope, worst

__all__ = [
    "UNIT_ROUNDOFF",
    "Comparison",
    "Difference",
    "Report",
    "Step",
    "TensorVerdict",
    "To",
    "Trace",
    "Trajectory",
    "Verdict",
    "assert_frozen",
    "compare",
    "differences",
    "exact_inputs",
    "from_json",
    "judge",
    "noise_floor",
    "optimizer_step",
    "refuse",
    "rel_l2",
    "reordered",
    "slope",
    "tap",
    "to_html",
    "to_json",
    "to_markdown",
    "trace",
    "trajectory",
    "vacuity",
    "worst",
]
