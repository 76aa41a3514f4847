"""The operators of usaf_ext: typed wrappers over `torch.ops.usaf`.

Each checks its arguments before anything is written: TypeError for a wrong type or dtype, ValueError for a wrong shape,
value or device; the message names the argument. Importing this package registers fakes (shapes without data, for
`torch.compile`) and autograd formulas, nothing else. An op without a formula raises when it is differentiated.
"""

from .adam import dequantize_moments8, empty_moments8, masked_adam_
from .codec import dequantize_blocks, quantize_blocks, quantize_rows_, scale_dtype
from .gather import expert_gather, expert_scatter
from .glu import glu, glu_backward
from .residual import dequantize_residual, quantize_residual
from .router_uniform import router_uniform_
from .row_gradient import row_gradient_, row_importance_

__all__ = [
    "dequantize_blocks",
    "dequantize_moments8",
    "dequantize_residual",
    "empty_moments8",
    "expert_gather",
    "expert_scatter",
    "glu",
    "glu_backward",
    "masked_adam_",
    "quantize_blocks",
    "quantize_residual",
    "quantize_rows_",
    "router_uniform_",
    "row_gradient_",
    "row_importance_",
    "scale_dtype",
]
