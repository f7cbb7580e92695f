"""How fast: faster bodies of the operators that `formats` defines, and the fused ones.

Importing this package registers them: from then on `torch.ops.halfbyte.*` runs the native kernels
on CPU tensors, and the reference bodies wherever there are none. Every module that calls an
operator imports this package first. `kernels.backends` says what is in use and why.
"""

from halfbyte.kernels import activations as activations
from halfbyte.kernels import attention as attention
from halfbyte.kernels import backends
from halfbyte.kernels import cross_entropy as cross_entropy
from halfbyte.kernels import decode as decode
from halfbyte.kernels import elementwise as elementwise
from halfbyte.kernels import gemm as gemm
from halfbyte.kernels.linear import linear, linear_input_gradient

__all__ = ["linear", "linear_input_gradient"]

backends.load()
