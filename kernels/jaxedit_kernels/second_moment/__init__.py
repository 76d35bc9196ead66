"""``xᵀ x`` of 16-bit vectors, upper triangle only, added to a float32 sum in place. See README.md."""

from jaxedit_kernels.second_moment.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
)
from jaxedit_kernels.second_moment.api import (
    Resolution as Resolution,
)
from jaxedit_kernels.second_moment.api import (
    bytes_moved as bytes_moved,
)
from jaxedit_kernels.second_moment.api import (
    flops as flops,
)
from jaxedit_kernels.second_moment.api import (
    resolve_implementation as resolve_implementation,
)
from jaxedit_kernels.second_moment.api import (
    second_moment as second_moment,
)
