"""Is a JAX function the same as its PyTorch twin, and if not, which one is wrong?

Imports without PyTorch; what runs PyTorch is in ``torch_side`` and loads it when it is used.
"""

from .assert_frozen import assert_frozen
from .compare import Comparison, compare
from .exact_inputs import exact_inputs
from .guards import refuse, vacuity
from .reports.differences import Difference, differences
from .reports.markdown import to_markdown
from .reports.page import to_html
from .reports.report import Report, from_json, to_json
from .sides.jax_order import reordered
from .tensors import To
from .tracing.marks import tap
from .tracing.trace import Trace, trace
from .training.noise import noise_floor
from .training.stepping import optimizer_step
from .training.trajectories import Step, Trajectory, trajectory
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
