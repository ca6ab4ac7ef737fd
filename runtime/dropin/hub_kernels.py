"""A mapping for the Hugging Face `kernels` package: its layers by our kernels, in any model that names them.

`transformers` marks its RMSNorm as a layer that the package may replace; the other layers that it marks are single
activations and the rotation of q and k apart, which here are parts of other kernels. Nothing is fetched from a hub: the
layer is in this file.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.functional import rms_norm
from ...kernels.launch import DTYPES
from ...kernels.rms_norm import WIDEST
from ..errors import TritiumError
from .packages import theirs


class RMSNorm(nn.Module):
    """RMSNorm with a weight of one dimension: the forward that takes the place of `transformers`' own.

    Its attributes are those of the module that it is put on: the package demands that a layer has none.
    """

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype == self.weight.dtype and hidden_states.dtype in DTYPES and len(self.weight) <= WIDEST:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


@dataclass(frozen=True)
class Layer:
    """Where the package finds a layer: what it calls a repository, without one."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name]


LAYERS: dict[str, type[nn.Module]] = {"RMSNorm": RMSNorm}
DEVICES = ("cuda", "rocm", "cpu")  # on the last the definitions compute, so that a mapping serves every device


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """What `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping` take: layer -> device -> where it is.

    Raises TritiumError where the package is absent, or of a version that `transformers` does not take: there its models
    mark no layer, and a mapping would silently do nothing.
    """
    if not theirs("utils.import_utils").is_kernels_available():
        try:
            found = f"kernels {version('kernels')} is installed"
        except PackageNotFoundError:
            found = "it is not installed"
        wanted = theirs("dependency_versions_table").deps["kernels"]
        raise TritiumError(f"kernel_mapping needs the package kernels as transformers takes it, {wanted!r}; {found}")
    return {name: dict.fromkeys(DEVICES, Layer(name)) for name in LAYERS}
