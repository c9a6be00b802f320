"""The kernels of `specdec.kernels.gpu`, with bits that do not depend on who else is computed.

Of a token, hidden states, keys, values and logits are a function of its own prefix alone: see
`specdec.kernels.exact.attend` for attention; products add up in an order that follows from the
weight's shape (`specdec.kernels.gpu.stream`); everything else goes row by row there too.
"""

from functools import partial

from specdec.kernels.exact import attend
from specdec.kernels.gpu import *  # noqa: F403
from specdec.kernels.gpu import __all__ as __all__
from specdec.kernels.gpu.linear import gated_linear as _gated_linear
from specdec.kernels.gpu.linear import linear as _linear
from specdec.kernels.gpu.linear import project as _project

tree_attention = attend.tree_attention  # type: ignore[assignment]  # no `blocks`, for tuning
gated_linear = partial(_gated_linear, exact=True)
linear = partial(_linear, exact=True)
project = partial(_project, exact=True)
